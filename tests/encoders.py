"""Small checkpoints of encoders: configs, weights by name, folders.

As `decoders`: weights come from the names of tensors, so that the stored results of
the reference (`golden/encoders.npz`) need no stored weights.
"""

import json
import pathlib

import decoders
import numpy as np
from safetensors import numpy as safetensors

_SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_act='gelu',
    max_position_embeddings=40,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    pad_token_id=0,
    torch_dtype='float32',
)
_ROBERTA = dict(type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1)


def _labels(num):
  return {
      'id2label': {str(i): f'kind {i}' for i in range(num)},
      'label2id': {f'kind {i}': i for i in range(num)},
  }


def _config(family, architecture, **more):
  named = {'model_type': family, 'architectures': [architecture]}
  return {**named, **_SIZES, **more}


CONFIGS = {
    'bert': _config('bert', 'BertModel', position_embedding_type='absolute'),
    'bert_masked': _config('bert', 'BertForMaskedLM'),
    'bert_classifier': _config(
        'bert', 'BertForSequenceClassification', **_labels(5)
    ),
    'roberta': _config('roberta', 'RobertaModel', **_ROBERTA),
    'roberta_classifier': _config(
        'roberta', 'RobertaForSequenceClassification', **_ROBERTA, **_labels(3)
    ),
}
CLASSIFIERS = ('bert_classifier', 'roberta_classifier')


def shapes(raw):
  """Returns {name: shape} of the tensors of a config, from the published code."""
  d, ffn = raw['hidden_size'], raw['intermediate_size']
  (architecture,) = raw['architectures']
  is_base = architecture.endswith('Model')
  is_classifier = architecture.endswith('ForSequenceClassification')
  prefix = '' if is_base else f'{raw["model_type"]}.'
  found = {
      f'{prefix}embeddings.{name}_embeddings.weight': (raw[size], d)
      for name, size in (
          ('word', 'vocab_size'),
          ('position', 'max_position_embeddings'),
          ('token_type', 'type_vocab_size'),
      )
  }

  def add(name, *shape):
    found[f'{name}.weight'], found[f'{name}.bias'] = shape, shape[:1]

  add(f'{prefix}embeddings.LayerNorm', d)
  for i in range(raw['num_hidden_layers']):
    layer = f'{prefix}encoder.layer.{i}'
    for name in ('self.query', 'self.key', 'self.value', 'output.dense'):
      add(f'{layer}.attention.{name}', d, d)
    add(f'{layer}.attention.output.LayerNorm', d)
    add(f'{layer}.intermediate.dense', ffn, d)
    add(f'{layer}.output.dense', d, ffn)
    add(f'{layer}.output.LayerNorm', d)
  if is_base or architecture == 'BertForSequenceClassification':
    add(f'{prefix}pooler.dense', d, d)
  if is_classifier:
    num = len(raw['id2label'])
    if raw['model_type'] == 'bert':
      add('classifier', num, d)
    else:
      add('classifier.dense', d, d)
      add('classifier.out_proj', num, d)
  return found


def weights(raw):
  """Returns {name: float32 array}, of unit gain."""
  made = {
      name: decoders.tensor(name, shape) for name, shape in shapes(raw).items()
  }
  for name, x in made.items():  # Sums of three tables are of order one, too.
    made[name] = 4 * x if '_embeddings.' in name else x
  return made


def batch(raw, seed=0):
  """Returns tokens, mask, types and labels, of which the second row is padded."""
  tokens = decoders.tokens(24, rows=3, seed=seed)
  mask = np.ones(tokens.shape, bool)
  mask[1, 17:], mask[2, 5:] = False, False
  tokens[~mask] = raw['pad_token_id']
  types = np.broadcast_to(np.arange(24) >= 9, tokens.shape).astype(np.int32)
  types = np.minimum(types, raw['type_vocab_size'] - 1)
  labels = np.array([2, 0, 1], np.int32)
  return {'tokens': tokens, 'mask': mask, 'types': types, 'labels': labels}


def slope(shape):
  """Returns with what hidden states are multiplied for a loss without labels."""
  return decoders.tensor('slope', (1, int(np.prod(shape)))).reshape(shape)


def write(folder, name, dtype=np.float32, **changes):
  """Writes a checkpoint as a folder and returns it."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  raw = {**CONFIGS[name], **changes}
  raw = {k: v for k, v in raw.items() if v is not ...}
  (folder / 'config.json').write_text(json.dumps(raw))
  tensors = {k: v.astype(dtype) for k, v in weights(raw).items()}
  safetensors.save_file(tensors, folder / 'model.safetensors')
  return folder
