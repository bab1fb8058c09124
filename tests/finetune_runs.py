"""A small checkpoint with a tokenizer, data, and the command's flags for them."""

import json
import pathlib

import chat_templates
import decoders
import tokenizer_folders

END = 300  # What ends an answer beside the tokenizer's end.
FLAGS = {
    'num_steps': 12,
    'period': 3,
    'rank': 2,
    'max_length': 64,
    'batch_size': 2,
    'num_evals': 4,
    'checkpoint_every': 3,
    'eval_fraction': 0.2,
    'learning_rate': 0.01,
}


def write_model(folder):
  """Writes a decoder of random weights, which a byte-level BPE fits; returns it."""
  folder = decoders.write(folder, 'llama2', vocab_size=512, num_hidden_layers=2)
  tokenizer_folders.write(
      folder,
      tokenizer_folders.byte_level_with_bos(),
      template=chat_templates.GENERATION,
  )
  # As chat models have it: the end of a turn beside that of a text.
  path = folder / 'generation_config.json'
  path.write_text(json.dumps({'eos_token_id': [END]}))
  return folder


def write_data(path, count=60):
  """Writes prompts and completions as JSON lines; returns the file."""
  records = [
      {
          'prompt': f'Question {i}: how are you?',
          'completion': f' I am fine, the answer is {i * 7 % 13}.',
      }
      for i in range(count)
  ]
  path = pathlib.Path(path)
  path.write_text(''.join(json.dumps(x) + '\n' for x in records))
  return path


def command(folder, output, /, **flags):
  """Returns the words of the command on `model` and `data.jsonl` of a folder."""
  folder = pathlib.Path(folder)
  given = {
      'model': folder / 'model',
      'data': folder / 'data.jsonl',
      'output': output,
      **FLAGS,
      **flags,
  }
  words = ['finetune', '--no-progress']
  for name, value in given.items():
    if value is not None:
      words += [f'--{name}', str(value)]
  return words
