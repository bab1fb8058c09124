"""Checkpoints by orbax, and the record of the configuration they belong to."""

from collections.abc import Mapping
import json
import os
import pathlib
import tempfile
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from bernoulli_lora_jax.training import base_config

# Fields that may differ between the run and its continuation.
_FREE = (
    'training.num_steps',
    'training.num_passes',
    'training.parallel',
    'training.num_devices',
    'training.progress',
    'training.max_to_keep',
    'training.group_size',
    'task.data_dir',
)


class Checkpointer:
  """The checkpoints of one run; a context manager.

  Saving is atomic: a checkpoint that was interrupted is never listed.
  """

  def __init__(self, workdir: str | os.PathLike[str], max_to_keep: int = 2):
    self._directory = pathlib.Path(workdir).absolute() / 'checkpoints'
    self._manager = ocp.CheckpointManager(
        epath.Path(self._directory),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        ),
    )

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, *unused: Any) -> None:
    self._manager.close()

  def save(self, step: int, tree: Any) -> None:
    """Saves a tree of arrays and typed keys as the checkpoint of a step."""
    self._manager.save(step, args=ocp.args.StandardSave(tree), force=True)

  def latest(self) -> int | None:
    """Returns the step of the newest whole checkpoint."""
    return self._manager.latest_step()

  def restore(self, like: Any) -> Any:
    """Returns the newest checkpoint.

    Args:
      like: tree of arrays with the structure, shapes and shardings to restore
        to, on whatever number of devices.

    Raises:
      ValueError: a checkpoint of another structure, or a damaged one.
    """
    step = self.latest()
    if step is None:
      raise ValueError(f'Expected a checkpoint in {self._directory}, got none.')
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
      return self._manager.restore(
          step, args=ocp.args.StandardRestore(abstract)
      )
    except Exception as e:
      what = self._difference(step, like) or f'one that does not restore: {e}'
      raise ValueError(
          f'Expected a checkpoint of this configuration in {self._directory} at'
          f' step {step}, got {what}'
      ) from e

  def _difference(self, step: int, like: Any) -> str:
    """Returns the first leaf whose shape differs from the stored one."""
    folder = epath.Path(self._directory) / str(step) / 'default'
    try:
      metadata = ocp.StandardCheckpointHandler().metadata(folder)
    except Exception:  # Damaged: the reason is in the error of the restore.
      return ''
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    shapes = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator='/'): tuple(x.shape)
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
        if not (isinstance(x, jax.Array) and is_key(x))
    }
    stored = shapes(getattr(metadata, 'tree', metadata))
    for path, shape in shapes(like).items():
      if stored.get(path, shape) != shape:
        return f'{path} of shape {stored[path]} where the configuration has {shape}.'
    return ''


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file that appears whole or not at all."""
  write_whole(path, json.dumps(value, indent=2).encode() + b'\n')


def write_whole(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that appears whole or not at all."""
  with tempfile.NamedTemporaryFile(
      dir=path.parent, prefix=f'.{path.name}.', delete=False
  ) as f:
    f.write(content)
  os.chmod(f.name, 0o644)  # A temporary file is its owner's alone.
  os.replace(f.name, path)


def check_config(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Writes config.json, or compares with the one of an earlier start.

  Args:
    workdir: directory of the run; made if it does not exist.
    config: nested JSON values. A field that an older version did not have
      counts as its default.

  Raises:
    ValueError: the run belongs to another configuration; the first field that
      differs is named with both values.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / 'config.json'
  if path.exists():
    try:
      old = flatten(json.loads(path.read_text()))
    except json.JSONDecodeError as e:
      raise ValueError(f'Expected {path} to be JSON: {e}.') from e
    new = flatten(json.loads(json.dumps(dict(config))))
    defaults = json.loads(base_config.get_config().to_json_best_effort())
    old, new = ({**flatten(defaults), **given} for given in (old, new))
    for field in sorted(old.keys() | new.keys()):
      if field not in _FREE and old.get(field) != new.get(field):
        raise ValueError(
            f'Expected {field}={old.get(field)!r}, as in {path}, got'
            f' {field}={new.get(field)!r}: choose another workdir, or remove'
            ' this one.'
        )
  write_json(path, dict(config))


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns {'a.b': value} of nested mappings."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f'{prefix}{name}.'))
    else:
      flat[prefix + name] = value
  return flat
