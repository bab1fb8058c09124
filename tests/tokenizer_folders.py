"""Small tokenizers, trained here and written as checkpoint folders."""

from collections.abc import Callable
import functools
import json
import pathlib

import chat_templates
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers

CORPUS = [
    'user assistant system model tool [INST] [/INST] <<SYS>> <</SYS>>',
    'Hello there, how are you today? I am fine; the answer is 42.',
    'Once upon a time there was a tokenizer that the world had trained.',
    'def add(x, y):\n    return x + y\n\nprint(add(2, 3))\n',
    '<think>\nLet me think.\n</think>\n\n<tool_call>\n{"name": "add"}\n</tool_call>',
    'Grüße aus Zürich, 你好世界, emoji 🙂 and naïve café.',
] * 4
SPECIAL = chat_templates.SPECIAL_TOKENS
NAMES = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>'}


def _trained_once(make: Callable[..., tokenizers.Tokenizer]):
  """Makes a function return copies: training breaks ties anew each time."""
  text = functools.cache(lambda *args: make(*args).to_str())
  return lambda *args: tokenizers.Tokenizer.from_str(text(*args))


def byte_level(trim_offsets: bool = True) -> tokenizers.Tokenizer:
  """A byte-level BPE in the way of GPT-2, Llama 3 and Qwen."""
  tokenizer = _byte_level()
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
  return tokenizer


def byte_level_with_bos() -> tokenizers.Tokenizer:
  """The same with <s> before a text, as Llama 3 writes it down."""
  tokenizer = _byte_level()
  bos = processors.TemplateProcessing(
      single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', 0)]
  )
  trim = processors.ByteLevel(trim_offsets=True)
  tokenizer.post_processor = processors.Sequence([trim, bos])
  return tokenizer


@_trained_once
def _byte_level():
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=500,
      special_tokens=list(SPECIAL),
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
  )
  tokenizer.train_from_iterator(CORPUS, trainer)
  return tokenizer


@_trained_once
def metaspace(kind: str = 'prepend') -> tokenizers.Tokenizer:
  """A BPE with bytes to fall back on, spaces as ▁, and <s> before: Llama 2.

  Args:
    kind: 'prepend', a normaliser that writes ▁ before every piece of text between
      special tokens; or 'first', a pre-tokenizer that writes it before the text.
  """
  spaces = ['<unk>', *SPECIAL, *(f'<0x{i:02X}>' for i in range(256))]
  tokenizer = tokenizers.Tokenizer(
      models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True)
  )
  if kind == 'prepend':
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
    )
  else:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme='first', split=False
    )
  tokenizer.decoder = decoders.Sequence(
      [
          decoders.Replace('▁', ' '),
          decoders.ByteFallback(),
          decoders.Fuse(),
          decoders.Strip(' ', 1, 0),
      ]
  )
  trainer = trainers.BpeTrainer(
      vocab_size=600, special_tokens=spaces, show_progress=False
  )
  lines = [part for line in CORPUS for part in line.split('\n')]
  tokenizer.train_from_iterator(lines, trainer)
  tokenizer.post_processor = processors.TemplateProcessing(
      single='<s> $A',
      pair='<s> $A <s> $B',
      special_tokens=[('<s>', tokenizer.token_to_id('<s>'))],
  )
  return tokenizer


@_trained_once
def word_piece() -> tokenizers.Tokenizer:
  """A lower-casing WordPiece: accents go, spaces are no tokens."""
  tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token='<unk>'))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece(cleanup=False)
  trainer = trainers.WordPieceTrainer(
      vocab_size=400,
      special_tokens=['<unk>', *SPECIAL],
      show_progress=False,
  )
  tokenizer.train_from_iterator(CORPUS, trainer)
  return tokenizer


def write(
    folder: pathlib.Path,
    tokenizer: tokenizers.Tokenizer,
    template: str | None = None,
    **config,
) -> pathlib.Path:
  """Writes a folder with tokenizer.json and a config; returns it."""
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', **NAMES, **config}
  if template is not None:
    config['chat_template'] = template
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


def bert() -> tokenizers.Tokenizer:
  """A WordPiece with <s> before and </s> behind, and types of pairs."""
  return _around(word_piece(), '<s> $A </s>', '<s> $A </s> $B:1 </s>:1')


def roberta() -> tokenizers.Tokenizer:
  """A byte-level BPE with <s> before and </s> behind, twice between pairs."""
  return _around(_byte_level(), '<s> $A </s>', '<s> $A </s> </s> $B </s>')


def _around(tokenizer, single, pair):
  named = [(x, tokenizer.token_to_id(x)) for x in ('<s>', '</s>')]
  tokenizer.post_processor = processors.TemplateProcessing(
      single=single, pair=pair, special_tokens=named
  )
  return tokenizer
