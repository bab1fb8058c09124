"""Checkpoints of the Hugging Face hub in and out: config.json and safetensors.

    checkpoint = hf.load('path/of/a/folder', scan_layers=True, remat='full')
    loss = decoder.make_loss(checkpoint.config)
    ...
    hf.save('tuned', tuned_params, checkpoint)    # transformers loads it

Tensors go one by one from the file to the device, in the layout, dtype and sharding
asked for: the host holds one leaf at a time. What is missing, superfluous or of
another shape is named and refused; pickled weights are never opened.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import importlib
import mmap
import os
import pathlib
import re
import shutil
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import files
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import encoder
from bernoulli_lora_jax.models import hf_config
from bernoulli_lora_jax.models import hf_encoders

INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
# What a folder holds beside weights and config, copied as it is.
TOKENIZER = (
    'tokenizer.json',
    'tokenizer.model',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'vocab.json',
    'vocab.txt',
    'merges.txt',
    'chat_template.jinja',
    'chat_template.json',
)
BESIDE = (
    'generation_config.json',
    *TOKENIZER,
    'LICENSE',
    'LICENSE.txt',
    'NOTICE',
)

# Path of a leaf: name of its tensor, {} for the number of the layer. The kernels of
# projections are transposed: theirs are (out, in), ours (in, out).
_TOP = {
    'embed_tokens/embedding': 'model.embed_tokens.weight',
    'norm/scale': 'model.norm.weight',
    'lm_head/kernel': 'lm_head.weight',
}
_NORMS = {
    f'{name}/scale': f'model.layers.{{}}.{name}.weight'
    for name in ('input_layernorm', 'post_attention_layernorm')
}
_LINEAR = {
    f'{room}/{name}/{leaf}': f'model.layers.{{}}.{room}.{name}.{theirs}'
    for room, names in (
        ('self_attn', ('q_proj', 'k_proj', 'v_proj', 'o_proj')),
        ('mlp', ('gate_proj', 'up_proj', 'down_proj')),
    )
    for name in names
    for leaf, theirs in (('kernel', 'weight'), ('bias', 'bias'))
}
_HEAD_NORMS = {
    f'self_attn/{name}/scale': f'model.layers.{{}}.self_attn.{name}.weight'
    for name in ('q_norm', 'k_norm')
}
_LLAMA = {**_TOP, **_NORMS, **_LINEAR}
NAMES: dict[str, dict[str, str]] = {
    'llama': _LLAMA,
    'mistral': _LLAMA,
    'qwen2': _LLAMA,
    'qwen3': {**_LLAMA, **_HEAD_NORMS},
    **dict.fromkeys(hf_encoders.FAMILIES, hf_encoders.NAMES),
}
# Tables that old files store and that are made anew.
_MADE_ANEW = re.compile(r'\.rotary_emb\.inv_freq$|^embeddings\.position_ids$')
_CHUNK = 2 << 20  # Bytes read at a time: what is mapped counts as memory.


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A folder as a model.

  Attributes:
    config: of the model, a `DecoderConfig` or an `EncoderConfig`.
    params: its weights; None once they are given away, see `load`.
    family: see `hf_config.FAMILIES`, `hf_encoders.FAMILIES`.
    raw: content of config.json.
    folder: where it came from; None for a model of one's own.
    dtypes: {name of a tensor: its dtype in the files}, see `tensor_names`.
  """

  config: Any
  params: Any
  family: str
  raw: Mapping[str, Any]
  folder: pathlib.Path | None
  dtypes: Mapping[str, str]


def load(
    source: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Callable[[str, jax.ShapeDtypeStruct], Any] | Any = None,
    **run: Any,
) -> Checkpoint:
  """Returns the model of a folder, or of a name on the hub.

  Args:
    source: a folder with config.json and safetensors, or 'owner/name', which is
      downloaded through `huggingface_hub` (and found again offline).
    dtype: of the weights; None for that of the files.
    sharding: where each leaf goes: a `Sharding` or device for all, or (path, shape)
      -> `Sharding`, see `sharding_rules`; None for the default device.
    **run: fields of the config that say how it is run: scan_layers, remat, dtype
      of the computation as `compute_dtype`, max_segments of a decoder, pooling of an
      encoder.

  Raises:
    FileNotFoundError: no such folder or name, a shard that the index names.
    ValueError: what is not supported, or does not fit, by name.
  """
  if dtype is not None:
    is_float = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    checks.that(is_float, 'dtype of floating point', dtype=dtype)
  if isinstance(sharding, jax.sharding.Mesh):  # Which can be called, too.
    raise ValueError(
        'Expected a sharding, or (path, shape) -> sharding, got a Mesh: give'
        ' sharding_rules.placer(mesh, rules).'
    )
  found = open_folder(source, **run)
  config, folder = found.config, found.folder
  assert folder is not None
  tensors = _plain_tensors(folder, found.family)
  leaves = {}
  for path, shape in param_shapes(config).items():
    names = tensor_names(found.family, config, path)
    stored = [tensors[name] for name in names]
    leaf = _read_leaf(path, shape.shape, stored, dtype, config)
    place = sharding(path, jax.typeof(leaf)) if callable(sharding) else sharding
    leaves[path] = jax.block_until_ready(jax.device_put(leaf, place))
    del leaf
  params = traverse_util.unflatten_dict(leaves, sep='/')
  if _is_tied(config) and 'lm_head.weight' in tensors:
    _check_tied(tensors, folder)
  return dataclasses.replace(found, params=params)


def open_folder(source: str | os.PathLike[str], **run: Any) -> Checkpoint:
  """Returns what a folder says of its model, checked; its weights are not read.

  Args:
    source: as of `load`.
    **run: as of `load`.

  Raises: as `load`, but for what the weights' values are.
  """
  folder = find(source).absolute()
  raw = read_object(folder, 'config.json')
  where = str(folder / 'config.json')
  run['dtype'] = run.pop('compute_dtype', None)
  family = hf_config.family_of(raw, where)
  tensors = _plain_tensors(folder, family)
  if family in hf_encoders.FAMILIES:
    run['pooler'] = hf_encoders.POOLER in tensors
  config = hf_config.from_dict(raw, where, **run)
  wanted = {
      path: tensor_names(family, config, path) for path in param_shapes(config)
  }
  _check_names(config, tensors, wanted, folder)
  dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
  return Checkpoint(config, None, family, raw, folder, dtypes)


def weight_shapes(checkpoint: Checkpoint, dtype: Any = None) -> Any:
  """Returns the tree that `load` would return as params, shapes in its places.

  Args:
    checkpoint: of `open_folder`.
    dtype: as of `load`.
  """
  leaves = {}
  for path, leaf in param_shapes(checkpoint.config).items():
    names = tensor_names(checkpoint.family, checkpoint.config, path)
    stored = {checkpoint.dtypes[name] for name in names}
    own = _leaf_dtype(path, stored, dtype)
    leaves[path] = jax.ShapeDtypeStruct(leaf.shape, own)
  return traverse_util.unflatten_dict(leaves, sep='/')


def find(source: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder of a checkpoint, downloaded where it is a name on the hub."""
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return folder
  if not re.fullmatch(r'[\w.-]+/[\w.-]+', str(source)) or folder.exists():
    raise FileNotFoundError(
        f'Expected a folder, or the name of a model on the hub, got {source}.'
    )
  hub = import_extra('huggingface_hub')
  try:
    patterns = ['*.safetensors', INDEX, 'config.json', *BESIDE]
    return pathlib.Path(
        hub.snapshot_download(str(source), allow_patterns=patterns)
    )
  except Exception as e:  # Of the network, of rights, of names.
    line = str(e).strip().partition('\n')[0]
    raise FileNotFoundError(
        f'Expected a folder, or the name of a model on the hub, got {source}, which'
        f' is no folder and could not be downloaded: {line}'
    ) from e


def param_shapes(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns {path: shape} of a model's weights, computing nothing."""
  is_encoder = isinstance(config, encoder.EncoderConfig)
  model = encoder.Encoder(config) if is_encoder else decoder.Decoder(config)
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  return matrices_lib.named_leaves(tree)


def describe(config: Any, params: Any, dtype: str = 'float32') -> Checkpoint:
  """Returns a model that came from no folder as a checkpoint, for `save`.

  Args:
    config: of the model.
    params: its weights.
    dtype: name of the dtype that is saved: 'float32', 'bfloat16' or 'float16'.
  """
  raw = hf_config.to_dict(config, dtype)
  stored = {np.dtype(d).name: name for name, d in _DTYPES.items()}
  if dtype not in stored:
    raise ValueError(f'Expected dtype in {sorted(stored)}, got {dtype!r}.')
  names = _targets(raw['model_type'], config)
  dtypes = dict.fromkeys(names, stored[dtype])
  return Checkpoint(config, params, raw['model_type'], raw, None, dtypes)


def save(
    folder: str | os.PathLike[str],
    params: Any,
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> pathlib.Path:
  """Writes a folder that `transformers` loads, as the one the model came from.

  Config, tokenizer, chat template and generation config are copied.

  Args:
    folder: that is not there yet; it appears whole or not at all.
    params: weights, layers stacked or not.
    checkpoint: what they came from; its own weights are not looked at.
    dtype: 'float32', 'bfloat16' or 'float16'; None for that of each tensor in the
      files it came from.
    max_shard_bytes: most bytes of one file, where a tensor allows it.

  Returns:
    The folder.

  Raises:
    FileExistsError: the folder is there: nothing is ever overwritten.
    ValueError: weights of other paths or shapes than the checkpoint's, or that are
      not finite in the dtype they are saved in; a head of an encoder that
      `transformers` would run otherwise.
  """
  if dtype is not None:
    checks.one_of([np.dtype(d).name for d in _DTYPES.values()], dtype=dtype)
  checks.integers(1, max_shard_bytes=max_shard_bytes)
  folder = pathlib.Path(folder).expanduser()
  files.check_new(folder)
  leaves = matrices_lib.named_leaves(params)
  is_scanned = any(path.startswith('layers/') for path in leaves)
  config = dataclasses.replace(checkpoint.config, scan_layers=is_scanned)
  _check_params(leaves, param_shapes(config))
  targets = _targets(checkpoint.family, config)
  dtypes = {}
  for name, (path, _) in targets.items():
    kept = _DTYPES.get(checkpoint.dtypes.get(name, ''), leaves[path].dtype)
    dtypes[name] = np.dtype(kept if dtype is None else jnp.dtype(dtype))
  sizes = {
      name: dtypes[name].itemsize
      * leaves[path].size
      // (1 if i is None else config.num_layers)
      for name, (path, i) in targets.items()
  }
  stored = {
      name: _stored_name(checkpoint.family, config, name) for name in sizes
  }
  shards = _shards(sizes, max_shard_bytes)
  raw = hf_config.updated(checkpoint.raw, config)
  if dtype is not None:
    raw.pop('torch_dtype', None)
    raw['dtype'] = dtype
  with files.new_folder(folder) as scratch:
    files.write_json(scratch / 'config.json', raw)
    if checkpoint.folder is not None:
      for name in BESIDE:
        if (checkpoint.folder / name).is_file():
          shutil.copyfile(checkpoint.folder / name, scratch / name)
    for file, names in shards.items():
      tensors = {
          stored[n]: _to_host(leaves, n, targets[n], dtypes[n]) for n in names
      }
      write_tensors(tensors, scratch / file)
    if len(shards) > 1:
      files.write_json(
          scratch / INDEX,
          {
              'metadata': {'total_size': sum(sizes.values())},
              'weight_map': {
                  stored[n]: f for f, names in shards.items() for n in names
              },
          },
      )
  return folder


_DTYPES = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': jnp.dtype(jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class _Stored:
  """A tensor in a file."""

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: str  # As safetensors calls it.

  def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the tensor by its rows."""
    row = max(1, _DTYPES[self.dtype].itemsize * int(np.prod(self.shape[1:])))
    step = max(1, _CHUNK // row)
    for start in range(0, self.shape[0], step):
      rows = slice(start, min(self.shape[0], start + step))
      # Each time anew: what is mapped counts.
      with open_tensors(self.file) as f:
        yield rows, f.get_slice(self.name)[rows]


@contextlib.contextmanager
def open_tensors(file: pathlib.Path):
  """Yields an open file of tensors; a damaged one is named."""
  safetensors = import_extra('safetensors')
  try:
    opened = safetensors.safe_open(file, framework='numpy')
  except safetensors.SafetensorError as e:
    raise ValueError(
        f'Expected {file} to be a whole safetensors file: {e}.'
    ) from e
  with opened as f:
    yield f


def write_tensors(
    tensors: Mapping[str, np.ndarray], file: pathlib.Path
) -> None:
  """Writes a file of tensors, in C order; raises OSError where it cannot."""
  safetensors, numpy = map(import_extra, ('safetensors', 'safetensors.numpy'))
  try:
    numpy.save_file(dict(tensors), file, metadata={'format': 'pt'})
  except safetensors.SafetensorError as e:
    raise OSError(f'Expected to write {file.name}, got: {e}.') from e


def _tensors(folder: pathlib.Path) -> dict[str, _Stored]:
  """Returns {name: tensor} of all files of a folder, reading headers alone."""
  named: dict[str, str] | None = None
  if (folder / SINGLE).is_file():  # Before an index, as for transformers.
    names = [SINGLE]
  elif (folder / INDEX).is_file():
    named = read_object(folder, INDEX).get('weight_map')
    is_map = isinstance(named, dict) and named
    if not is_map or not all(isinstance(x, str) for x in named.values()):
      raise ValueError(
          f'Expected a weight_map, names of files, in {folder / INDEX}.'
      )
    names = sorted(set(named.values()))
  else:
    pickled = sorted(p.name for p in folder.glob('*.bin'))
    pickled += sorted(p.name for p in folder.glob('*.pt*'))
    why = (
        f'; {pickled[0]} is pickled, which runs code when it is read: save the'
        ' model with safe_serialization=True'
        if pickled
        else ''
    )
    raise FileNotFoundError(f'Expected {SINGLE} or {INDEX} in {folder}{why}.')
  found: dict[str, _Stored] = {}
  for name in names:
    file = folder / name
    if not file.is_file() or pathlib.PurePath(name).name != name:
      raise FileNotFoundError(
          f'Expected {name}, named in {INDEX}, in {folder}.'
      )
    with open_tensors(file) as f:
      for key in f.keys():
        part = f.get_slice(key)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if key in found:
          raise ValueError(
              f'Expected {key} in one file, got {found[key].file} and {file}.'
          )
        found[key] = _Stored(file, key, shape, dtype)
  for key, name in (named or {}).items():
    if key not in found or found[key].file.name != name:
      raise ValueError(f'Expected {key} in {folder / name}, as {INDEX} says.')
  return found


def _plain_tensors(folder: pathlib.Path, family: str) -> dict[str, _Stored]:
  """Returns {name: tensor}, names of encoders as they are without a head."""
  tensors = _tensors(folder)
  if family not in hf_encoders.FAMILIES:
    return tensors
  found: dict[str, _Stored] = {}
  for name, tensor in tensors.items():
    plain = hf_encoders.plain_name(family, name)
    if plain in found:
      raise ValueError(
          f'Expected one of {found[plain].name} and {name} in {folder}, got both.'
      )
    if not hf_encoders.LEFT_OUT.search(plain):
      found[plain] = tensor
  return found


def _stored_name(family: str, config: Any, name: str) -> str:
  """Returns the name of a tensor in the files that are written."""
  if family in hf_encoders.FAMILIES:
    return hf_encoders.stored_name(family, config, name)
  return name


def _is_tied(config: Any) -> bool:
  return isinstance(config, decoder.DecoderConfig) and config.tied


def tensor_names(family: str, config: Any, path: str) -> list[str]:
  """Returns the names of the tensors that a leaf is made of.

  Those of encoders are as in files without a head, see `hf_encoders.plain_name`.
  """
  name = re.sub(r'^layers(_\d+)?/', '', path)
  pattern = NAMES[family][name]
  if name == path:
    return [pattern]
  layer = re.match(r'layers_(\d+)/', path)
  layers = [layer.group(1)] if layer else range(config.num_layers)
  return [pattern.format(i) for i in layers]


def _targets(family: str, config: Any) -> dict[str, tuple[str, int | None]]:
  """Returns {name of a tensor: (path of its leaf, its layer if it is stacked)}."""
  found = {}
  for path in param_shapes(config):
    names = tensor_names(family, config, path)
    is_stacked = path.startswith('layers/')
    for i, name in enumerate(names):
      found[name] = (path, i if is_stacked else None)
  return found


def _check_names(
    config: Any,
    tensors: Mapping[str, _Stored],
    wanted: Mapping[str, Sequence[str]],
    folder: pathlib.Path,
) -> None:
  """Raises for tensors that are missing, superfluous or of no float."""
  expected = {name for names in wanted.values() for name in names}
  missing = sorted(expected - tensors.keys())
  if missing:
    raise ValueError(
        f'Expected {missing[0]} in {folder}; {len(missing)} of'
        f' {len(expected)} tensors are missing.'
    )
  others = tensors.keys() - expected
  others -= {name for name in others if _MADE_ANEW.search(name)}
  others -= {'lm_head.weight'} if _is_tied(config) else set()
  if others:
    raise ValueError(
        f'Expected no tensor {sorted(others)[0]} in {folder}: config.json describes'
        f' no such part; {len(others)} are superfluous.'
    )
  for name in sorted(expected | (tensors.keys() & {'lm_head.weight'})):
    if tensors[name].dtype not in _DTYPES:
      raise ValueError(
          f'Expected {name} of a dtype in {sorted(_DTYPES)}, got'
          f' {tensors[name].dtype} in {tensors[name].file}.'
      )


def _read_leaf(
    path: str,
    shape: tuple[int, ...],
    stored: Sequence[_Stored],
    dtype: Any,
    config: Any,
) -> np.ndarray:
  """Returns a leaf in host memory, its layers stacked where they are."""
  dtype = _leaf_dtype(path, {tensor.dtype for tensor in stored}, dtype)
  is_kernel = path.endswith('/kernel')
  own = shape[1:] if path.startswith('layers/') else shape
  leaf = _empty((len(stored), *own), dtype)
  for i, tensor in enumerate(stored):
    theirs = own[::-1] if is_kernel else own
    if tensor.shape != theirs:
      raise ValueError(
          f'Expected {tensor.name} of shape {theirs}, as config.json says, got'
          f' {tensor.shape} in {tensor.file}.'
      )
    for rows, values in tensor.chunks():
      if is_kernel:
        leaf[i, :, rows] = values.T
      else:
        leaf[i, rows] = values
  return leaf.reshape(shape)


def _leaf_dtype(path: str, stored: Collection[str], dtype: Any) -> Any:
  """Returns the dtype of a leaf: the one asked for, or that of its tensors."""
  if dtype is None:
    dtype = jnp.result_type(*{_DTYPES[name] for name in stored})
  if jnp.dtype(dtype) != jax.dtypes.canonicalize_dtype(dtype):
    raise ValueError(
        f'Expected jax_enable_x64 for {path} of {jnp.dtype(dtype)}: set it, or give'
        ' load(dtype=).'
    )
  return jnp.dtype(dtype)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns an array whose memory the system gets back at once.

  Of smaller ones malloc keeps what is freed, 40 MB of the shapes of 1B.
  """
  count = int(np.prod(shape))
  memory = mmap.mmap(-1, max(1, count * dtype.itemsize))
  return np.frombuffer(memory, dtype, count).reshape(shape)


def _check_tied(tensors: Mapping[str, _Stored], folder: pathlib.Path) -> None:
  """Raises where a tied head is stored and is not the embedding."""
  head, table = tensors['lm_head.weight'], tensors['model.embed_tokens.weight']
  same = head.shape == table.shape and all(
      np.array_equal(a, b)
      for (_, a), (_, b) in zip(head.chunks(), table.chunks(), strict=True)
  )
  if not same:
    raise ValueError(
        f'Expected lm_head.weight in {folder} to be the embedding, since config.json'
        ' says tie_word_embeddings: they differ.'
    )


def _check_params(
    leaves: Mapping[str, Any], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
  """Raises for weights that are not those of the config."""
  for path in (*shapes, *leaves):
    got = tuple(leaves[path].shape) if path in leaves else None
    expected = shapes[path].shape if path in shapes else None
    if got != expected:
      raise ValueError(f'Expected {path} of shape {expected}, got {got}.')


def _shards(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
  """Returns {file: names of its tensors}, in order."""
  groups: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if groups[-1] and filled + size > most:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += size
  if len(groups) == 1:
    return {SINGLE: groups[0]}
  count = len(groups)
  return {
      f'model-{i + 1:05d}-of-{count:05d}.safetensors': group
      for i, group in enumerate(groups)
  }


def _to_host(
    leaves: Mapping[str, Any],
    name: str,
    target: tuple[str, int | None],
    dtype: np.dtype,
) -> np.ndarray:
  """Returns a tensor as it is stored."""
  path, layer = target
  leaf = leaves[path] if layer is None else leaves[path][layer]
  x = np.asarray(leaf).astype(dtype)
  if not np.isfinite(x).all():
    raise ValueError(f'Expected finite weights, got NaN or infinity in {name}.')
  return np.ascontiguousarray(x.T if path.endswith('/kernel') else x)


def read_object(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
  """Returns an object of a JSON file of the folder."""
  folder = pathlib.Path(folder)
  if not (folder / name).is_file():
    raise FileNotFoundError(f'Expected {name} in {folder}.')
  value = files.read_json(folder / name)
  if not isinstance(value, dict):
    raise ValueError(f'Expected an object in {folder / name}, got {value!r}.')
  return value


def import_extra(name: str) -> Any:
  """Returns a module of the extra `hf`."""
  try:
    return importlib.import_module(name)
  except ImportError as e:
    raise ImportError(
        f'Expected {name}, which is not installed: pip install'
        " 'bernoulli_lora_jax[hf]'."
    ) from e
