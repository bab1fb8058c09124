"""Adapters of PEFT as factors to train on.

    adapter = peft_import.load('adapter', base)         # or folders, and weights
    chain, state = peft_import.start(adapter, optax.adamw(1e-4), key, base.params)
    merged = chain.params(state)

What would be computed otherwise than PEFT does is refused by its name; pickled
adapters are never opened. See `peft_format` for the format, and the way out.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import checks
from bernoulli_lora_jax import export
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import peft_format

CONFIG, TENSORS = peft_format.CONFIG, peft_format.TENSORS
_PREFIX = peft_format.PREFIX
# Copies of the base that PEFT stores where head or embedding are adapted.
_COPY = re.compile(
    r'^base_model\.model\.(lm_head|model\.embed_tokens)(\.base_layer)?\.weight$'
)
_TENSOR = re.compile(r'^base_model\.model\.(.+)\.lora_([AB])\.weight$')

# Fields that say how W + s B A is made, with what is plain; each has a reason in
# `_WHY` or is no plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    'bias': ('none', None),
    # These leave the base as it is: B A is relative to it.
    'init_lora_weights': (True, False, None, 'gaussian', 'orthogonal', 'eva'),
    'layers_pattern': (None, '', 'layers', ['layers']),
}
_KINDS: dict[str, tuple[type, ...]] = {
    'r': (int,),
    'lora_alpha': (int, float),
    'rank_pattern': (dict, type(None)),
    'alpha_pattern': (dict, type(None)),
    'target_modules': (str, list),
    'exclude_modules': (str, list, type(None)),
    'layers_to_transform': (int, list, type(None)),
    'use_rslora': (bool, type(None)),
}
_WHY = {
    'use_dora': 'its magnitudes are no low-rank change; merge it with PEFT and'
    ' take export.of_change of the result',
    'modules_to_save': 'full copies of modules are no low-rank change; train them'
    ' as `others` of a chain',
    'trainable_token_indices': 'rows of the embedding are no low-rank change',
    'fan_in_fan_out': 'no decoder here stores weights as (in, out)',
    'bias': 'trained biases are no part of the factors',
    'lora_bias': 'biases of B are no part of the factors',
    'target_parameters': 'the parameters of decoders are those of modules',
    'layer_replication': 'the base has other layers',
    'megatron_config': 'its layers are split',
    'init_lora_weights': 'its factors are relative to a changed base; save it with'
    ' path_initial_model_for_weight_conversion',
}
# Fields that inform, steer training, or are read below.
_KNOWN = frozenset(
    'alpha_pattern auto_mapping base_model_name_or_path corda_config eva_config'
    ' ensure_weight_tying exclude_modules inference_mode'
    ' layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config'
    ' megatron_core peft_type peft_version qalora_group_size r rank_pattern'
    ' revision runtime_config target_modules task_type use_rslora'.split()
)


@dataclasses.dataclass(frozen=True)
class Adapter:
  """An adapter to train on, see `start`.

  Attributes:
    factors: {path: {'left': (*batch, in, r), 'right': (*batch, r, out)}} float32,
      without the scale s; layers of a lower rank, or of none, are padded by zeros.
    policy: plain LoRA with the rank and the scale of each path.
    matrices: for `adapters.make_chain`.
  """

  factors: dict[str, dict[str, np.ndarray]]
  policy: adapters.ChainPolicy
  matrices: matrices_lib.Matrices


def load(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    checkpoint: hf.Checkpoint,
    weights: Sequence[float] | None = None,
) -> Adapter:
  """Returns a LoRA adapter of PEFT, or the weighted sum of several, as factors.

  One adapter keeps its A and B, and its scale is the policy's, so that gradients
  are PEFT's. Where the layers of a stack differ in scale, the largest is the
  policy's, and the rest is in B; a rank above the shorter side of a matrix is
  reduced exactly. The sum of several is exact, with new factors and scale 1.

  Args:
    source: a folder with adapter_config.json and adapter_model.safetensors, or
      several.
    checkpoint: the base; layers are stacked as its config says. Of its weights
      head and embedding are looked at where the adapter holds copies of them.
    weights: of the sum; None for one adapter as it is, or 1 for each.

  Raises:
    FileNotFoundError: a file that is missing, or pickled.
    ValueError: what is no plain LoRA of this base, by field or tensor.
  """
  is_one = isinstance(source, str | os.PathLike)
  sources = [source] if is_one else list(source)
  checks.that(len(sources) > 0, 'at least one adapter', source=source)
  places = dict(peft_format.places_of(checkpoint))
  read = [
      _read(pathlib.Path(s).expanduser(), places, checkpoint) for s in sources
  ]
  if weights is None and len(read) == 1:
    found = read[0]
  else:
    weights = [1.0] * len(read) if weights is None else list(weights)
    if len(weights) != len(read) or not np.isfinite(weights).all():
      raise ValueError(
          f'Expected {len(read)} finite weights, one an adapter, got {weights}.'
      )
    found = _weighted_sum(read, weights)
  return _adapter(found, places, checkpoint.config)


def start(
    adapter: Adapter,
    tx: optax.GradientTransformation,
    key: jax.Array,
    params: Any,
    **options: Any,
) -> tuple[adapters.Chain, adapters.AdapterState]:
  """Returns a chain and its state that go on from an adapter.

  Args:
    adapter: see `load`.
    tx: optimiser of the factors.
    key: typed PRNG key of the chain; nothing is drawn from it but what the factors
      replace.
    params: weights of the base.
    **options: of `adapters.make_chain`.

  Returns:
    (chain, state): `chain.params(state)` are the merged weights.
  """
  chain = adapters.make_chain(adapter.policy, tx, adapter.matrices, **options)
  state = chain.init(key, params)
  return chain, adapters.with_factors(chain, state, adapter.factors)


class _Module(NamedTuple):
  """A module of an adapter that was read."""

  left: np.ndarray  # (in, r) float32
  right: np.ndarray  # (r, out) float32
  scale: float


def _read(
    folder: pathlib.Path,
    places: Mapping[str, peft_format.Place],
    checkpoint: hf.Checkpoint,
) -> dict[str, _Module]:
  """Returns {module: factors} of a folder; raises for what is no plain LoRA."""
  raw = hf.read_object(folder, CONFIG)
  where = folder / CONFIG
  _check_plain(raw, where)
  if not (folder / TENSORS).is_file():
    pickled = sorted(p.name for p in folder.glob('*.bin'))
    why = (
        f'; {pickled[0]} is pickled, which runs code when it is read: save the'
        ' adapter with safe_serialization=True'
        if pickled
        else ''
    )
    raise FileNotFoundError(f'Expected {TENSORS} in {folder}{why}.')
  found: dict[str, dict[str, np.ndarray]] = {}
  with hf.open_tensors(folder / TENSORS) as f:
    for name in sorted(f.keys()):
      if _COPY.search(name) and _is_copy(f.get_tensor(name), name, checkpoint):
        continue
      match = _TENSOR.search(name)
      if match is None or match.group(1) not in places:
        raise ValueError(
            f'Expected no tensor {name} in {folder / TENSORS}:'
            f' {_why_not(name)}.'
        )
      module, letter = match.groups()
      stored = f.get_tensor(name)
      if not jnp.issubdtype(stored.dtype, jnp.floating):
        raise ValueError(
            f'Expected {name} of floating point in {folder / TENSORS}, got'
            f' {stored.dtype}.'
        )
      found.setdefault(module, {})[letter] = stored.astype(np.float32)
  for module in places:
    is_target = _is_target(raw, module, where)
    if is_target and module not in found:
      found[module] = {}  # Both of its tensors are missing.
    if module in found and not is_target:
      raise ValueError(
          f'Expected no factors of {module} in {folder / TENSORS}, which'
          f' {CONFIG} does not select: PEFT would leave them out.'
      )
  checks.that(bool(found), f'factors in {folder / TENSORS}', modules=[])
  return {
      module: _module(module, letters, raw, places[module].shape, folder)
      for module, letters in found.items()
  }


def _check_plain(raw: Mapping[str, Any], where: pathlib.Path) -> None:
  """Raises for what is no LoRA, or not plain, by its field."""
  if raw.get('peft_type') != 'LORA':
    raise ValueError(
        f"Expected peft_type 'LORA' in {where}, got {raw.get('peft_type')!r}: no"
        ' other kind is a low-rank change alone.'
    )
  for field, kinds in _KINDS.items():
    # What a config leaves out has PEFT's default, but for what it adapts.
    if field not in raw and field != 'target_modules':
      continue
    if not isinstance(raw.get(field), kinds):
      names = ', '.join(kind.__name__ for kind in kinds)
      raise ValueError(
          f'Expected {field} of kind {names} in {where}, got {raw.get(field)!r}.'
      )
  for field, value in raw.items():
    if field in _KNOWN:
      continue
    plain = _PLAIN.get(field, (None, False))
    if value not in (*plain, [], {}):
      why = _WHY.get(field, 'it is no part of plain LoRA')
      raise ValueError(
          f'Expected {field} in {plain} in {where}, got {value!r}: {why}.'
      )


def _is_copy(x: np.ndarray, name: str, checkpoint: hf.Checkpoint) -> bool:
  """Returns whether a tensor is that of the base, in a dtype of its own."""
  leaves = matrices_lib.named_leaves(checkpoint.params)
  ours = leaves.get('embed_tokens/embedding')
  if 'lm_head' in name and not checkpoint.config.tied:
    ours = leaves['lm_head/kernel'].T if leaves else None
  return ours is not None and np.array_equal(
      x, np.asarray(ours).astype(x.dtype)
  )


def _why_not(name: str) -> str:
  """Returns why a tensor is none that can be taken."""
  if 'lora_magnitude_vector' in name:
    return 'DoRA is no low-rank change'
  if _COPY.search(name):
    return (
        'it is not that of the base (checkpoint.params), and a module saved whole'
        ' is no low-rank change'
    )
  if 'lora_embedding' in name or 'embed_tokens' in name:
    return 'an embedding is looked up, not multiplied: it is not adapted'
  if _TENSOR.search(name):
    return 'the base has no such linear map, or its head is tied'
  if not name.startswith(_PREFIX):
    return f'names of PEFT begin with {_PREFIX}'
  return 'it is no factor of LoRA; a module saved whole is no low-rank change'


def _is_target(
    raw: Mapping[str, Any], module: str, where: pathlib.Path
) -> bool:
  """Returns whether the config says that a module is adapted, as PEFT reads it."""
  targets = raw.get('target_modules')
  excluded = raw.get('exclude_modules') or []
  ends = lambda names: any(f'.{module}'.endswith(f'.{x}') for x in names)
  matches = lambda names: (
      _full_match(names, module, where)
      if isinstance(names, str)
      else ends(names)
  )
  if targets == 'all-linear':
    targets = [] if module == 'lm_head' else [module]
  if not targets or matches(excluded) or not matches(targets):
    return False
  layers = raw.get('layers_to_transform')
  if layers is None or layers == []:
    return True
  number = re.search(r'layers\.(\d+)\.', module)
  layers = [layers] if isinstance(layers, int) else layers
  return number is not None and int(number.group(1)) in layers


def _full_match(pattern: str, module: str, where: pathlib.Path) -> bool:
  """Returns whether a regular expression of a config matches a whole name."""
  try:
    return re.fullmatch(pattern, module) is not None
  except re.error as e:
    raise ValueError(
        f'Expected a regular expression in {where}, got {pattern!r}: {e}.'
    ) from e


def _of_pattern(
    raw: Mapping[str, Any],
    field: str,
    usual: str,
    module: str,
    folder: pathlib.Path,
) -> Any:
  """Returns what a pattern, else the config, says of a module, as PEFT reads it."""
  for pattern, value in (raw.get(field) or {}).items():
    if _full_match(rf'(.*\.)?({pattern})', module, folder / CONFIG):
      return value
  return raw.get(usual, 8)  # PEFT's own.


def _module(
    module: str,
    letters: Mapping[str, np.ndarray],
    raw: Mapping[str, Any],
    shape: tuple[int, int],
    folder: pathlib.Path,
) -> _Module:
  """Returns the factors of a module, checked against config and base."""
  rank = _of_pattern(raw, 'rank_pattern', 'r', module, folder)
  alpha = _of_pattern(raw, 'alpha_pattern', 'lora_alpha', module, folder)
  checks.integers(1, **{f'the rank of {module} in {folder / CONFIG}': rank})
  checks.positive(**{f'the alpha of {module} in {folder / CONFIG}': alpha})
  size_in, size_out = shape
  expected = {'A': (rank, size_in), 'B': (size_out, rank)}
  for letter, theirs in expected.items():
    name = f'{_PREFIX}{module}.lora_{letter}.weight'
    got = letters[letter].shape if letter in letters else None
    if got != theirs:
      raise ValueError(
          f'Expected {name} of shape {theirs} in {folder / TENSORS}, as config'
          f' and base say, got {got}.'
      )
    if not np.isfinite(letters[letter]).all():
      raise ValueError(f'Expected finite factors, got others in {name}.')
  root = math.sqrt(rank) if raw.get('use_rslora') else rank
  return _Module(letters['A'].T, letters['B'].T, alpha / root)


def _weighted_sum(
    read: Sequence[Mapping[str, _Module]], weights: Sequence[float]
) -> dict[str, _Module]:
  """Returns the exact sum of weighted adapters, of scale 1."""
  scaled = [
      {
          name: {'left': m.left, 'right': np.float64(w * m.scale) * m.right}
          for name, m in modules.items()
      }
      for modules, w in zip(read, weights, strict=True)
  ]
  return {
      name: _Module(one.left, one.right, 1.0)
      for name, one in export.of_links(scaled).items()
  }


def _adapter(
    found: Mapping[str, _Module],
    places: Mapping[str, peft_format.Place],
    config: decoder.DecoderConfig,
) -> Adapter:
  """Returns modules as factors of our paths."""
  of_path: dict[str, dict[tuple[int, ...], _Module]] = {}
  for name, module in found.items():
    path, index, shape = places[name]
    if module.left.shape[1] > min(shape):  # More than such a product needs.
      pair = {'left': module.left, 'right': module.right}
      one = export.of_links([{name: pair}])[name]
      module = _Module(one.left, one.right, module.scale)
    of_path.setdefault(path, {})[index] = module
  factors, targets = {}, []
  shapes = {place.path: place for place in places.values()}
  for path, modules in of_path.items():
    batch = (config.num_layers,) if shapes[path].index else ()
    size_in, size_out = shapes[path].shape
    rank = max(1, *(m.left.shape[1] for m in modules.values()))
    scale = max(m.scale for m in modules.values())
    left = np.zeros((*batch, size_in, rank), np.float32)
    right = np.zeros((*batch, rank, size_out), np.float32)
    for index, m in modules.items():
      own = m.left.shape[1]
      left[index][:, :own] = m.left
      # At equal scales B is theirs to the bit.
      right[index][:own] = (
          m.right if m.scale == scale else (m.right * (m.scale / scale))
      )
    factors[path] = {'left': left, 'right': right}
    pattern = f'^{re.escape(path)}$'
    targets.append(adapters.Target(pattern, rank=rank, alpha=scale * rank))
  policy = adapters.ChainPolicy.lora(
      max(t.rank for t in targets), targets=tuple(targets)
  )
  rules = decoder.matrices(config).rules
  if not any(path.startswith('layers/') for path in factors):
    rules = ()
  return Adapter(factors, policy, matrices_lib.Matrices(rules=rules))
