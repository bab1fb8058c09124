"""`config.json` and names of tensors of encoders of the hub, and back.

What an encoder of ours would compute otherwise than the checkpoint's own code is
refused by its name: relative positions, other activations, cross-attention, heads
other than that of classification. Of models of masked words, as most are published,
the encoder is taken and the head left out.
"""

from collections.abc import Mapping
import re
from typing import Any

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.models import encoder

# What files leave out, as the family's own code fills it in.
_BERT = {
    'vocab_size': 30522,
    'hidden_size': 768,
    'intermediate_size': 3072,
    'num_hidden_layers': 12,
    'num_attention_heads': 12,
    'max_position_embeddings': 512,
    'type_vocab_size': 2,
    'layer_norm_eps': 1e-12,
}
FAMILIES: dict[str, dict[str, Any]] = {
    'bert': {**_BERT, 'pad_token_id': 0},
    'roberta': {**_BERT, 'vocab_size': 50265, 'pad_token_id': 1},
}
_CLASSES = {'bert': 'Bert', 'roberta': 'Roberta'}
_CLASSIFIER = 'ForSequenceClassification'
# What a family's classifier is made of.
_HEADS = {'bert': ('linear', 'pooler'), 'roberta': ('dense', 'cls')}
_ENDS = ('Model', _CLASSIFIER, 'ForMaskedLM', 'ForPreTraining')
_SIZES = {
    'vocab_size': 'vocab_size',
    'hidden_size': 'hidden_size',
    'intermediate_size': 'intermediate_size',
    'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_heads',
    'max_position_embeddings': 'num_positions',
    'type_vocab_size': 'num_types',
}
_TYPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    'a whole number': (int, tuple(_SIZES)),
    'a whole number or null': (int | None, ('pad_token_id', 'num_labels')),
    'a number': (int | float, ('layer_norm_eps',)),
    'true, false or null': (bool | None, ('is_decoder', 'add_cross_attention')),
    'an object or null': (
        Mapping | None,
        ('id2label', 'label2id', 'quantization_config'),
    ),
    'a list or null': (list | tuple | None, ('architectures',)),
    'text or null': (
        str | None,
        ('hidden_act', 'position_embedding_type', 'problem_type'),
    ),
}
# Fields by the values that mean what is computed here.
_KNOWN = {
    'hidden_act': ('gelu',),
    'position_embedding_type': ('absolute', None),
    'is_decoder': (False, None),
    'add_cross_attention': (False, None),
    'problem_type': ('single_label_classification', None),
    'quantization_config': (None,),
}
_RUN = {'scan_layers', 'remat', 'dtype', 'pooling', 'pooler'}

_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight'}
_DENSE = ('kernel', 'bias')


def _named(start: str, rooms: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
  """Returns {path: name of its tensor}."""
  return {
      f'{room}/{leaf}': f'{start}{room.replace("/", ".")}.{_LEAVES.get(leaf, leaf)}'
      for room, leaves in rooms.items()
      for leaf in leaves
  }


# Path of a leaf: name of its tensor without the family's prefix, see `plain_name`.
NAMES: dict[str, str] = {
    **_named(
        '',
        {
            'embeddings/word_embeddings': ('embedding',),
            'embeddings/position_embeddings': ('embedding',),
            'embeddings/token_type_embeddings': ('embedding',),
            'embeddings/LayerNorm': ('scale', 'bias'),
            'pooler/dense': _DENSE,
            'classifier': _DENSE,
            'classifier/dense': _DENSE,
            'classifier/out_proj': _DENSE,
        },
    ),
    **_named(
        'encoder.layer.{}.',
        {
            'attention/self/query': _DENSE,
            'attention/self/key': _DENSE,
            'attention/self/value': _DENSE,
            'attention/output/dense': _DENSE,
            'attention/output/LayerNorm': ('scale', 'bias'),
            'intermediate/dense': _DENSE,
            'output/dense': _DENSE,
            'output/LayerNorm': ('scale', 'bias'),
        },
    ),
}
POOLER = NAMES['pooler/dense/kernel']
# Heads of masked words and of pairs of sentences.
LEFT_OUT = re.compile(r'^(cls|lm_head)\.')
_OLD = {'gamma': 'weight', 'beta': 'bias'}


def plain_name(family: str, name: str) -> str:
  """Returns the name of a tensor as it is without a head, in the words of today."""
  name = name.removeprefix(f'{family}.')
  start, _, end = name.rpartition('LayerNorm.')
  return f'{start}LayerNorm.{_OLD[end]}' if start and end in _OLD else name


def stored_name(family: str, config: encoder.EncoderConfig, name: str) -> str:
  """Returns the name that the family's own code gives to a tensor, from the plain."""
  is_inside = config.num_labels and not name.startswith('classifier.')
  return f'{family}.{name}' if is_inside else name


def from_dict(
    family: str, raw: Mapping[str, Any], where: str, **run: Any
) -> encoder.EncoderConfig:
  """Returns the encoder that a `config.json` describes.

  Args:
    family: in `FAMILIES`.
    raw: its content.
    where: what errors call it.
    **run: fields of `EncoderConfig` that say how it is run: scan_layers, remat,
      dtype, pooling (by default what the family's classifier reads); pooler,
      whether there are weights of one (by default as in the family's own code).

  Raises:
    ValueError: a field that says what is not supported.
  """
  unknown = sorted(run.keys() - _RUN)
  if unknown:
    raise ValueError(
        f'Expected of how an encoder is run {sorted(_RUN)}, got {unknown[0]}.'
    )
  checks.types(_TYPES, raw, where)
  raw = {'hidden_act': 'gelu', **FAMILIES[family], **raw}
  for key, known in _KNOWN.items():
    if raw.get(key) not in known:
      raise ValueError(
          f'Expected {key} {known[0]!r} in {where}, got {raw[key]!r}.'
      )
  is_classifier = _is_classifier(family, raw, where)
  is_roberta = family == 'roberta'
  pad_token = raw['pad_token_id'] if is_roberta else None
  if is_roberta and pad_token is None:
    raise ValueError(f'Expected pad_token_id, a whole number, in {where}.')
  if is_classifier and not is_roberta:  # Which reads it.
    run['pooler'] = True
  pooler = run.setdefault('pooler', not is_classifier)
  default = 'pooler' if pooler and not is_roberta else 'cls'
  run['pooling'] = run.get('pooling') or default
  return encoder.EncoderConfig(
      **{ours: raw[theirs] for theirs, ours in _SIZES.items()},
      norm_eps=raw['layer_norm_eps'],
      pad_token=pad_token,
      num_labels=_num_labels(raw) if is_classifier else 0,
      head='dense' if is_roberta else 'linear',
      **run,
  )


def _is_classifier(family: str, raw: Mapping[str, Any], where: str) -> bool:
  """Returns whether a config names a classifier; raises for other heads."""
  known = [_CLASSES[family] + end for end in _ENDS]
  named = raw.get('architectures') or known[:1]
  if not set(named) & set(known):
    raise ValueError(
        f'Expected architectures with one of {known}, got {named} in {where}: no'
        ' other head is supported.'
    )
  return _CLASSES[family] + _CLASSIFIER in named


def _num_labels(raw: Mapping[str, Any]) -> int:
  labels = raw.get('id2label')
  return len(labels) if labels is not None else raw.get('num_labels') or 2


def to_dict(
    config: encoder.EncoderConfig, dtype: str = 'float32'
) -> dict[str, Any]:
  """Returns a `config.json` for an encoder that came from none."""
  family = 'bert' if config.pad_token is None else 'roberta'
  raw = {
      'model_type': family,
      **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
      'hidden_act': 'gelu',
      'layer_norm_eps': config.norm_eps,
      'pad_token_id': config.pad_token or 0,
      'position_embedding_type': 'absolute',
      'dtype': dtype,
  }
  return updated(raw, config)


def updated(
    raw: Mapping[str, Any], config: encoder.EncoderConfig
) -> dict[str, Any]:
  """Returns the content of config.json with the head that an encoder has now.

  Raises:
    ValueError: a head that the family's own code would run otherwise.
  """
  family, num = raw['model_type'], config.num_labels
  name = _CLASSES[family] + (_CLASSIFIER if num else 'Model')
  raw = {**raw, 'vocab_size': config.vocab_size, 'architectures': [name]}
  if not num:
    return raw
  head, pooling = _HEADS[family]
  if (config.head, config.pooling) != (head, pooling):
    raise ValueError(
        f'Expected head={head!r} on pooling={pooling!r}, which {name} has, got'
        f' head={config.head!r}, pooling={config.pooling!r}: it would be run as the'
        ' former; save the encoder without its head.'
    )
  if len(raw.get('id2label') or ()) != num:
    raw['id2label'] = {str(i): f'LABEL_{i}' for i in range(num)}
    raw['label2id'] = {f'LABEL_{i}': i for i in range(num)}
  return raw
