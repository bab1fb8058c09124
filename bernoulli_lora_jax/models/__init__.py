"""Models, in files of their own; `hf`, `tokenizer` and `chat` want the extra `hf`."""
