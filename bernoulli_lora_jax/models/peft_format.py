"""Adapters of decoders in the format of PEFT: names, places, and the way out.

    thin = export.of_links(recipes.link_factors(recipe, base.params))
    rows = peft_format.save('adapter', thin, base)      # PeftModel loads it
    rows = peft_format.save('served', thin, base, style='vllm')

A folder holds adapter_config.json and adapter_model.safetensors. Theirs is W + s B A
with W (out, in), ours is W + s L R with W (in, out): A is L transposed, B is R
transposed, s in it. `peft_import` is the way in.
"""

import collections
from collections.abc import Iterator, Mapping
import dataclasses
import os
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import export
from bernoulli_lora_jax import files
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import hf

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
STYLES = ('peft', 'vllm')
DTYPES = {'float32': np.float32, 'bfloat16': jnp.bfloat16}
# What vLLM takes as its max_lora_rank, but for 1.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

_LINEAR = re.compile(
    r'^(layers(_\d+)?/(self_attn|mlp)/\w+_proj|lm_head)/kernel$'
)
PREFIX = 'base_model.model.'
_Factor = tuple[np.ndarray, np.ndarray]  # L (in, r) and R (r, out) of a module.


class Place(NamedTuple):
  """Where the factors of a module are among ours."""

  path: str
  index: tuple[int, ...]  # (layer,) of a stack, () else.
  shape: tuple[int, int]  # (in, out)


def save(
    folder: str | os.PathLike[str],
    thin: Mapping[str, export.Thin],
    checkpoint: hf.Checkpoint,
    *,
    style: str = 'peft',
    dtype: str = 'float32',
    base_name: str | None = None,
) -> list[dict[str, Any]]:
  """Writes a folder that PEFT, or vLLM, loads.

  Args:
    folder: that is not there yet; it appears whole or not at all.
    thin: {path: factors}, layers stacked or not, see `export`.
    checkpoint: the base; its weights are not looked at.
    style: 'peft', a rank a module; 'vllm', one rank for all, padded by zeros to the
      next in `VLLM_RANKS`, and no module but those that vLLM adapts.
    dtype: 'float32' or 'bfloat16'.
    base_name: what the adapter calls its base; None for the checkpoint's folder.

  Returns:
    Rows {'module', 'rank', 'lost', 'rounding'}: the rank as stored, `lost` of
    `export.Thin`, and ||L R - stored||_F / ||L R||_F.

  Raises:
    FileExistsError: the folder is there: nothing is ever overwritten.
    ValueError: factors of no linear map of the decoder, of another shape or not
      finite, by path; a rank or a module that vLLM does not take.
  """
  checks.one_of(STYLES, style=style)
  checks.one_of(DTYPES, dtype=dtype)
  files.check_new(folder)
  modules = _modules_of(thin, checkpoint)
  ranks = {
      name: max(1, int(thin[place.path].ranks[place.index]))
      for name, place in modules.items()
  }
  if style == 'vllm':
    ranks = dict.fromkeys(ranks, _vllm_rank(ranks))
  tensors, rows = {}, []
  for name, place in modules.items():
    one = thin[place.path]
    left, right = one.entry(place.index)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
      raise ValueError(f'Expected finite factors, got others of {place.path}.')
    stored = left.astype(DTYPES[dtype]), right.astype(DTYPES[dtype])
    width = ranks[name] - left.shape[1]
    a, b = stored[0].T, stored[1].T
    # Copies in C order: safetensors writes memory as it lies.
    a = np.ascontiguousarray(np.pad(a, ((0, width), (0, 0))))
    b = np.ascontiguousarray(np.pad(b, ((0, 0), (0, width))))
    tensors[f'{PREFIX}{name}.lora_A.weight'] = a
    tensors[f'{PREFIX}{name}.lora_B.weight'] = b
    rows.append(
        {
            'module': name,
            'rank': ranks[name],
            'lost': float(one.lost[place.index]),
            'rounding': _rounding((left, right), stored),
        }
    )
  if base_name is None:
    base_name = str(checkpoint.folder or '')
  config = _config(ranks, checkpoint.config, base_name, style)
  with files.new_folder(folder) as scratch:
    files.write_json(scratch / CONFIG, config)
    hf.write_tensors(tensors, scratch / TENSORS)
  return rows


def places_of(checkpoint: hf.Checkpoint) -> Iterator[tuple[str, Place]]:
  """Yields (module, its place) of the linear maps of a decoder."""
  config = checkpoint.config
  for path, leaf in hf.param_shapes(config).items():
    if _LINEAR.search(path):
      names = hf.tensor_names(checkpoint.family, config, path)
      is_stacked = path.startswith('layers/')
      for i, name in enumerate(names):
        index = (i,) if is_stacked else ()
        yield name.removesuffix('.weight'), Place(path, index, leaf.shape[-2:])


def _modules_of(
    thin: Mapping[str, export.Thin], checkpoint: hf.Checkpoint
) -> dict[str, Place]:
  """Returns {module: place} of factors; raises for those of no linear map."""
  is_scanned = any(path.startswith('layers/') for path in thin)
  config = dataclasses.replace(checkpoint.config, scan_layers=is_scanned)
  of_layout = dataclasses.replace(checkpoint, config=config)
  found = dict(places_of(of_layout))
  known = {place.path: place for place in found.values()}
  checks.that(len(thin) > 0, 'factors of at least one matrix', thin=dict(thin))
  for path, one in thin.items():
    if path not in known:
      raise ValueError(
          f'Expected factors of a linear map of the decoder, one of'
          f' {sorted(known)}, got {path}: PEFT has no LoRA of another that means'
          ' the same.'
      )
    place = known[path]
    batch = (config.num_layers,) if place.index else ()
    rank = one.left.shape[-1]
    expected = (*batch, place.shape[0], rank), (*batch, rank, place.shape[1])
    if (one.left.shape, one.right.shape) != expected:
      raise ValueError(
          f'Expected factors of shapes {expected} for {path}, got'
          f' {one.left.shape} and {one.right.shape}.'
      )
  return {name: place for name, place in found.items() if place.path in thin}


def _vllm_rank(ranks: Mapping[str, int]) -> int:
  """Returns the one rank for all; raises for what vLLM does not take."""
  others = [name for name in ranks if not name.endswith('_proj')]
  if others:
    raise ValueError(
        "Expected projections of layers alone for style='vllm', got"
        f' {others[0]}: leave it out, or merge it into the weights.'
    )
  largest = max(ranks.values())
  if largest > VLLM_RANKS[-1]:
    raise ValueError(
        f"Expected ranks <= {VLLM_RANKS[-1]} for style='vllm', got {largest}:"
        ' export.truncate reports what a lower one loses.'
    )
  return min(rank for rank in VLLM_RANKS if rank >= largest)


def _rounding(exact: _Factor, stored: _Factor) -> float:
  """Returns ||L R - stored||_F / ||L R||_F."""
  if all(x.dtype == y.dtype for x, y in zip(exact, stored, strict=True)):
    return 0.0
  wide = stored[0].astype(np.float32), stored[1].astype(np.float32)
  total = export.norm([exact])
  return export.norm([exact, (-wide[0], wide[1])]) / total if total else 0.0


def _config(
    ranks: Mapping[str, int],
    config: decoder.DecoderConfig,
    base_name: str,
    style: str,
) -> dict[str, Any]:
  """Returns adapter_config.json; the scale is in B, so alpha = r everywhere."""
  usual = collections.Counter(ranks.values()).most_common(1)[0][0]
  patterns = {} if style == 'vllm' else _patterns(ranks, usual)
  ends = collections.Counter(name.rsplit('.', 1)[-1] for name in ranks)
  is_whole = all(
      count == (config.num_layers if end.endswith('_proj') else 1)
      for end, count in ends.items()
  )
  return {
      'peft_type': 'LORA',
      'task_type': 'CAUSAL_LM',
      'base_model_name_or_path': base_name,
      'revision': None,
      'auto_mapping': None,
      'inference_mode': True,
      'r': usual,
      'lora_alpha': usual,
      'rank_pattern': patterns,
      'alpha_pattern': patterns,
      'target_modules': sorted(ends if is_whole else ranks),
      'exclude_modules': None,
      'lora_dropout': 0.0,
      'bias': 'none',
      'fan_in_fan_out': False,
      'use_rslora': False,
      'use_dora': False,
      'init_lora_weights': True,
      'modules_to_save': None,
      'layers_to_transform': None,
      'layers_pattern': None,
      'layer_replication': None,
      'megatron_config': None,
      'megatron_core': 'megatron.core',
      'loftq_config': {},
  }


def _patterns(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
  """Returns {regular expression of a module's end: its rank} of unusual ranks.

  PEFT searches (.*\\.)?(pattern)$, versions before 0.14 .*\\.pattern$; both read
  what begins behind a dot, and layers.1 is not the end of layers.11.
  """
  return {
      re.escape(name.removeprefix('model.')): rank
      for name, rank in ranks.items()
      if rank != usual
  }
