"""Checkpoints by orbax, and the record of the configuration they belong to."""

from collections.abc import Mapping
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from bernoulli_lora_jax.training import base_config

# Fields that may differ between the run and its continuation.
_FREE = (
    'training.parallel',
    'training.num_devices',
    'training.progress',
    'training.max_to_keep',
    'training.group_size',
    'task.data_dir',
)
_DIGEST = 'digest.json'  # Of a checkpoint's files, in its folder.


class Checkpointer:
  """The checkpoints of one run; a context manager.

  Saving is atomic: a checkpoint that was interrupted is never listed. A digest of
  its files tells a whole one from a damaged one.
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
    folder = self._directory / str(step)
    write_json(folder / _DIGEST, _digest(folder))

  def latest(self) -> int | None:
    """Returns the step of the newest checkpoint."""
    return max(self._steps(), default=None)

  def _steps(self) -> list[int]:
    # Orbax does not list one whose metadata are lost.
    names = [path.name for path in self._directory.iterdir()]
    return [int(name) for name in names if name.isdigit()]

  def restore(self, like: Any) -> Any:
    """Returns the newest whole checkpoint; a warning names damaged ones.

    Damaged ones that are newer are removed, for they are to be written again.

    Args:
      like: tree of arrays with the structure, shapes and shardings to restore
        to, on whatever number of devices.

    Raises:
      ValueError: a checkpoint of another structure, or none that is whole.
    """
    steps = sorted(self._steps(), reverse=True)
    if not steps:
      raise ValueError(f'Expected a checkpoint in {self._directory}, got none.')
    for i, step in enumerate(steps):
      try:
        tree = self._restore(step, like)
      except _DamagedError as e:
        message = str(e)
        rest = (
            f'that of step {steps[i + 1]} is tried'
            if i + 1 < len(steps)
            else 'no other is there: remove the directory to start anew'
        )
        if i + 1 == len(steps):
          raise ValueError(f'{message} {rest.capitalize()}.') from e
        logging.warning('%s In its place %s.', message, rest)
        continue
      for damaged in steps[:i]:
        _remove(self._directory / str(damaged))
      if i:
        self._manager.reload()
      return tree
    raise AssertionError

  def _restore(self, step: int, like: Any) -> Any:
    folder = self._directory / str(step)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    damage = _damage(folder)
    if damage:
      raise _DamagedError(
          f'Expected a whole checkpoint in {self._directory} at step {step}, got'
          f' {damage}.'
      )
    try:
      return self._manager.restore(
          step, args=ocp.args.StandardRestore(abstract)
      )
    except Exception as e:
      what = self._difference(step, like)
      if not what and (folder / _DIGEST).exists():
        what = f'one that does not restore: {e}'  # Whole, of another structure.
      if what:
        raise ValueError(
            'Expected a checkpoint of this configuration in'
            f' {self._directory} at step {step}, got {what}'
        ) from e
      raise _DamagedError(
          f'Expected a whole checkpoint in {self._directory} at step {step}, got'
          f' one that does not restore: {e}.'
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


class _DamagedError(Exception):
  """A checkpoint that is not what was saved."""


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink()


def _digest(folder: pathlib.Path) -> dict[str, str]:
  """Returns {file below a checkpoint's folder: hash of its content}."""
  found = {}
  for path in sorted(folder.rglob('*')):
    if path.is_file() and path.name != _DIGEST:
      with path.open('rb') as f:
        content = hashlib.file_digest(f, 'sha256').hexdigest()
      found[path.relative_to(folder).as_posix()] = content
  return found


def _damage(folder: pathlib.Path) -> str:
  """Returns what is wrong with a checkpoint's files, '' for nothing.

  One without a digest, of an older version or a process that was killed before it
  wrote it, is left to what restores it.
  """
  path = folder / _DIGEST
  if not folder.is_dir():
    return 'a file in place of its folder'
  if not path.exists():
    return '' if any(folder.iterdir()) else 'an empty folder'
  try:
    stored = json.loads(path.read_text())
  except ValueError as e:
    return f'a damaged {_DIGEST} ({e})'
  found = _digest(folder)
  if not isinstance(stored, dict):
    return f'a damaged {_DIGEST}'
  for name, content in stored.items():
    if name not in found:
      return f'no file {name}'
    if found[name] != content:
      return f'a damaged file {name}'
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
    config: nested JSON values.

  Raises:
    ValueError: as `compare_config`.
  """
  compare_config(workdir, config)
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(workdir / 'config.json', dict(config))


def compare_config(
    workdir: pathlib.Path, config: Mapping[str, Any], *, longer: bool = True
) -> None:
  """Raises unless a directory is of this configuration, or of none.

  Args:
    workdir: directory of the run.
    config: nested JSON values. A field that an older version did not have
      counts as its default.
    longer: whether the number of steps may differ, where no learning rate and no
      early stop depends on it.

  Raises:
    ValueError: the run belongs to another configuration; the first field that
      differs is named with both values.
  """
  path = workdir / 'config.json'
  if not path.exists():
    return
  stored = read_json(path)
  if not isinstance(stored, dict):
    raise ValueError(f'Expected a mapping in {path}, got {stored!r}.')
  new = flatten(json.loads(json.dumps(dict(config))))
  defaults = json.loads(base_config.get_config().to_json_best_effort())
  old, new = (
      {**flatten(defaults), **given} for given in (flatten(stored), new)
  )
  free = set(_FREE)
  reason = ''
  if old['training.num_steps'] and new['training.num_steps']:
    free.add('training.num_passes')  # Not read.
  needed = {
      'method.schedule': 'constant',
      'training.patience': 0,
      'training.plateau_patience': 0,
  }
  bound = [name for name, value in needed.items() if new[name] != value]
  if longer and not bound:
    free |= {'training.num_steps', 'training.num_passes'}
  elif bound:
    reason = f' ({bound[0]}={new[bound[0]]!r} depends on the number of steps)'
  for field in sorted(old.keys() | new.keys()):
    if field not in free and old.get(field) != new.get(field):
      is_length = field in ('training.num_steps', 'training.num_passes')
      raise ValueError(
          f'Expected {field}={old.get(field)!r}, as in {path}, got'
          f' {field}={new.get(field)!r}{reason if is_length else ""}: choose'
          ' another workdir, or remove this one.'
      )


def read_json(path: pathlib.Path) -> Any:
  """Returns the value of a JSON file; a fault names the file."""
  try:
    return json.loads(path.read_text())
  except ValueError as e:  # UnicodeDecodeError is one, too.
    raise ValueError(f'Expected JSON in {path}, got {e}.') from e


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns {'a.b': value} of nested mappings."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f'{prefix}{name}.'))
    else:
      flat[prefix + name] = value
  return flat
