"""`config.json` of the Hugging Face hub as a config of ours, and back.

What a decoder of ours would compute otherwise than the checkpoint's own code is
refused by its name: other families, activations, rotary embeddings, quantised weights.
What is said of encoders is in `hf_encoders`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import encoder
from bernoulli_lora_jax.models import hf_encoders
from bernoulli_lora_jax.models import rotary as rotary_lib

# Class of each family; what its files leave out, as its own code fills it in.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    'llama': ('LlamaForCausalLM', {}),
    'mistral': ('MistralForCausalLM', {'sliding_window': 4096}),
    'qwen2': ('Qwen2ForCausalLM', {'sliding_window': 4096}),
    'qwen3': (
        'Qwen3ForCausalLM',
        {'sliding_window': 4096, 'head_dim': 128},
    ),
}
_SIZES = {
    'vocab_size': 'vocab_size',
    'hidden_size': 'hidden_size',
    'intermediate_size': 'intermediate_size',
    'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_heads',
}
_ROTARY = {
    'factor': 'factor',
    'low_freq_factor': 'low_freq_factor',
    'high_freq_factor': 'high_freq_factor',
    'original_max_position_embeddings': 'original_length',
}
# Fields by what they must be, where they are there.
_TYPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    'a whole number': (
        int,
        (*_SIZES, 'max_position_embeddings', 'max_window_layers'),
    ),
    'a whole number or null': (
        int | None,
        ('num_key_value_heads', 'head_dim', 'sliding_window'),
    ),
    'a number': (int | float, ('rms_norm_eps', *_ROTARY)),
    'a number or null': (int | float | None, ('rope_theta',)),
    'true, false or null': (
        bool | None,
        (
            *('tie_word_embeddings', 'use_sliding_window'),
            *('attention_bias', 'mlp_bias'),
        ),
    ),
    'an object or null': (
        Mapping | None,
        ('rope_scaling', 'rope_parameters', 'quantization_config'),
    ),
    'a list or null': (list | tuple | None, ('architectures', 'layer_types')),
    'text or null': (str | None, ('model_type', 'hidden_act')),
}
# Of each kind of rotary embedding; what else a file says of it is refused.
_ROTARY_KEYS = {
    'default': (),
    'linear': ('factor',),
    'llama3': tuple(_ROTARY),
}


def family_of(raw: Mapping[str, Any], where: str = 'config.json') -> str:
  """Returns the family that a config names.

  Raises:
    ValueError: none, or one that is not supported, with the list.
  """
  checks.types(_TYPES, raw, where)
  family = raw.get('model_type')
  if family in hf_encoders.FAMILIES:
    return family
  if family not in FAMILIES:
    families = (*FAMILIES, *hf_encoders.FAMILIES)
    raise ValueError(
        f'Expected model_type in {families}, got {family!r} in {where}: no'
        ' other family is supported.'
    )
  known = FAMILIES[family][0]
  named = raw.get('architectures') or [known]
  if known not in named:
    raise ValueError(
        f'Expected architectures with {known}, got {named} in {where}: only'
        ' language models with their head are supported.'
    )
  return family


def from_dict(
    raw: Mapping[str, Any], where: str = 'config.json', **run: Any
) -> Any:
  """Returns what a `config.json` describes: a `DecoderConfig` or `EncoderConfig`.

  Args:
    raw: its content.
    where: what errors call it.
    **run: fields of `DecoderConfig` that say how it is run: scan_layers, remat,
      dtype, max_segments; of `EncoderConfig` see `hf_encoders.from_dict`.

  Raises:
    ValueError: a field that is missing, or says what is not supported.
  """
  family = family_of(raw, where)
  if family in hf_encoders.FAMILIES:
    return hf_encoders.from_dict(family, raw, where, **run)
  raw = {**FAMILIES[family][1], **raw}
  _refuse(raw, where)
  missing = [key for key in _SIZES if not isinstance(raw.get(key), int)]
  if missing:
    raise ValueError(f'Expected {missing[0]}, a whole number, in {where}.')
  sizes = {ours: raw[theirs] for theirs, ours in _SIZES.items()}
  heads = sizes['num_heads']
  checks.that(
      heads > 0, f'attention heads in {where}', num_attention_heads=heads
  )
  kv_heads = raw.get('num_key_value_heads')
  if (
      kv_heads is None
      and family != 'llama'
      and 'num_key_value_heads' not in raw
  ):
    raise ValueError(f'Expected num_key_value_heads in {where}.')
  head_dim = raw.get('head_dim')
  if head_dim is None:
    if family == 'qwen3':  # Whose own code takes no head_dim from the others.
      raise ValueError(f'Expected head_dim, a whole number, in {where}.')
    if sizes['hidden_size'] % heads:
      raise ValueError(
          f'Expected head_dim in {where}: hidden_size={sizes["hidden_size"]} is no'
          f' multiple of num_attention_heads={heads}.'
      )
    head_dim = sizes['hidden_size'] // heads
  bias = bool(raw.get('attention_bias', False))
  window, windowed = _windows(family, raw, where)
  return decoder.DecoderConfig(
      **sizes,
      num_kv_heads=heads if kv_heads is None else kv_heads,
      head_dim=head_dim,
      rotary=_rotary(raw, where),
      norm_eps=raw.get('rms_norm_eps', 1e-6),
      qkv_bias=family == 'qwen2' or (bias and family != 'mistral'),
      output_bias=bias and family in ('llama', 'qwen3'),
      mlp_bias=family == 'llama' and bool(raw.get('mlp_bias', False)),
      qk_norm=family == 'qwen3',
      tied=bool(raw.get('tie_word_embeddings', False)),
      window=window,
      windowed=windowed,
      max_length=raw.get('max_position_embeddings', 2048),
      **run,
  )


def to_dict(
    config: decoder.DecoderConfig | encoder.EncoderConfig,
    dtype: str = 'float32',
) -> Any:
  """Returns a `config.json` for a model that came from none.

  Args:
    config: of the model.
    dtype: of the weights.

  Raises:
    ValueError: a model that no family describes.
  """
  if isinstance(config, encoder.EncoderConfig):
    return hf_encoders.to_dict(config, dtype)
  c = config
  family = 'qwen3' if c.qk_norm else 'llama'
  if not c.qk_norm and c.qkv_bias and not c.output_bias:
    family = 'qwen2'
  elif not c.qk_norm and (c.window or c.hidden_size % c.num_heads):
    family = 'mistral'  # Others of these have no windows, or whole heads alone.
  rotary = {'rope_type': c.rotary.kind, 'rope_theta': c.rotary.theta}
  for key in _ROTARY_KEYS[c.rotary.kind]:
    rotary[key] = getattr(c.rotary, _ROTARY[key])
  raw = {
      'architectures': [FAMILIES[family][0]],
      'model_type': family,
      **{theirs: getattr(c, ours) for theirs, ours in _SIZES.items()},
      'num_key_value_heads': c.num_kv_heads,
      'head_dim': c.head_dim,
      'hidden_act': 'silu',
      'rms_norm_eps': c.norm_eps,
      'rope_parameters': rotary,
      'rope_theta': c.rotary.theta,  # Read by versions before 5.
      'tie_word_embeddings': c.tied,
      'attention_bias': c.qkv_bias,
      'mlp_bias': c.mlp_bias,
      'max_position_embeddings': c.max_length,
      'sliding_window': c.window,
      'dtype': dtype,
  }
  if c.rotary.kind != 'default':
    raw['rope_scaling'] = rotary
  if family in ('qwen2', 'qwen3'):
    raw['use_sliding_window'] = c.window is not None
    raw['max_window_layers'] = 0
  if family in ('qwen2', 'qwen3') or len(set(c.windows)) > 1:
    raw['layer_types'] = [
        'sliding_attention' if window else 'full_attention'
        for window in c.windows
    ]
  if from_dict(raw) != _as_stored(c):
    raise ValueError(
        f'Expected a decoder of one of {tuple(FAMILIES)}, got {config}: no family'
        ' has these biases, norms and windows together.'
    )
  return raw


def updated(raw: Mapping[str, Any], config: Any) -> dict[str, Any]:
  """Returns the content of config.json for the model as it is now.

  Args:
    raw: what it was.
    config: of the model.

  Raises:
    ValueError: a head that the family's own code would run otherwise.
  """
  if isinstance(config, encoder.EncoderConfig):
    return hf_encoders.updated(raw, config)
  return {**raw, 'vocab_size': config.vocab_size}


def _as_stored(config: decoder.DecoderConfig) -> decoder.DecoderConfig:
  """Returns a config without what its file does not hold."""
  return dataclasses.replace(
      config, scan_layers=True, remat='none', dtype=None, max_segments=64
  )


def _refuse(raw: Mapping[str, Any], where: str) -> None:
  """Raises for what would be computed otherwise."""
  act = raw.get('hidden_act', 'silu')
  if act not in ('silu', 'swish'):
    raise ValueError(f"Expected hidden_act 'silu' in {where}, got {act!r}.")
  if raw.get('quantization_config'):
    kind = raw['quantization_config'].get('quant_method', 'unknown')
    raise ValueError(
        f'Expected weights that are not quantised, got {kind!r} in {where}:'
        ' load the checkpoint that it was made from.'
    )
  if raw.get('partial_rotary_factor', 1.0) not in (1, None):
    raise ValueError(
        f'Expected partial_rotary_factor 1 in {where}, got'
        f' {raw["partial_rotary_factor"]}.'
    )


def _rotary(raw: Mapping[str, Any], where: str) -> rotary_lib.Rotary:
  """Returns the rotary embedding of a config, as written before 5 or since."""
  said = dict(raw.get('rope_scaling') or raw.get('rope_parameters') or {})
  if any(isinstance(value, dict) for value in said.values()):
    raise ValueError(
        f'Expected one rotary embedding for all layers in {where}, got'
        f' {sorted(said)}.'
    )
  kind = said.pop('rope_type', None) or said.pop('type', None) or 'default'
  said.pop('type', None)
  theta = said.pop('rope_theta', None)
  theta = raw.get('rope_theta') if theta is None else theta
  theta = 10000.0 if theta is None else theta
  if kind not in rotary_lib.KINDS:
    raise ValueError(
        f'Expected a rope_type in {rotary_lib.KINDS}, got {kind!r} in {where}.'
    )
  if said.pop('partial_rotary_factor', 1.0) not in (1, None):
    raise ValueError(f'Expected partial_rotary_factor 1 in {where}.')
  keys = _ROTARY_KEYS[kind]
  checks.types(_TYPES, {'rope_theta': theta}, where)
  said = {k: v for k, v in said.items() if v is not None}
  if kind == 'llama3':
    key = 'original_max_position_embeddings'
    said.setdefault(key, raw.get('max_position_embeddings'))
    said[key] = raw.get(key, said[key])  # Outside it takes precedence.
  missing = [key for key in keys if said.get(key) is None]
  if missing:
    raise ValueError(f'Expected {missing[0]} of rope_type {kind!r} in {where}.')
  checks.types(_TYPES, {key: said[key] for key in keys}, where)
  return rotary_lib.Rotary(
      float(theta), kind, **{_ROTARY[key]: said[key] for key in keys}
  )


def _windows(
    family: str, raw: Mapping[str, Any], where: str
) -> tuple[int | None, tuple[bool, ...]]:
  """Returns the window, and of each layer whether it has one; () for all."""
  window = raw.get('sliding_window')
  num = raw['num_hidden_layers']
  if family == 'llama':
    return None, ()
  kinds = raw.get('layer_types')
  if family == 'mistral' and kinds is None:
    return window, ()
  if family != 'mistral' and not raw.get('use_sliding_window', False):
    window = None
  if kinds is None:
    first = raw.get('max_window_layers', 28)
    kinds = [
        'sliding_attention'
        if window is not None and i >= first
        else 'full_attention'
        for i in range(num)
    ]
  known = ['full_attention', 'sliding_attention']
  if len(kinds) != num or any(kind not in known for kind in kinds):
    raise ValueError(
        f'Expected layer_types of {num} layers in {known}, got'
        f' {kinds} in {where}.'
    )
  windowed = tuple(kind == 'sliding_attention' for kind in kinds)
  if any(windowed) and window is None:
    raise ValueError(
        f'Expected use_sliding_window and sliding_window in {where}: layer_types'
        ' names sliding_attention.'
    )
  if not any(windowed):
    return None, ()
  return window, () if all(windowed) else windowed
