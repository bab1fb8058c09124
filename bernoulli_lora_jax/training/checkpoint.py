"""Checkpoints by orbax, and the record of the configuration they belong to."""

import base64
from collections.abc import Iterator, Mapping
import contextlib
import hashlib
import json
import logging as python_logging
import os
import pathlib
import shutil
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bernoulli_lora_jax import files
from bernoulli_lora_jax.training import base_config

# Fields that may differ between the run and its continuation.
_FREE = (
    'training.parallel',
    'training.num_devices',
    'training.progress',
    'training.keep_weights',
    'training.max_to_keep',
    'training.group_size',
    'training.steps_per_dispatch',
    'task.data_dir',
)
_DIGEST = 'digest.json'  # Of a checkpoint's files, in its folder.
_FROZEN = 'frozen.json'  # Of what is not in it: shape, dtype and hash by path.
_STREAM = 'stream.json'  # Place of the stream of batches.


class Checkpointer:
  """The checkpoints of one run; a context manager.

  Saving is atomic: a checkpoint that was interrupted is never listed. A digest of
  its files tells a whole one from a damaged one.
  """

  def __init__(
      self,
      workdir: str | os.PathLike[str],
      max_to_keep: int = 2,
      frozen: Mapping[str, Any] | None = None,
      stream: Any = None,
  ):
    """Opens the checkpoints of a run.

    Args:
      workdir: directory of the run.
      max_to_keep: checkpoints kept.
      frozen: {path: leaf} that no step changes: their hashes are stored in place
        of them, and compared when a checkpoint is restored.
      stream: iterator with get_state and set_state, whose place is stored.
    """
    # At once: a step donates them.
    self._frozen = {
        path: _fingerprint(leaf) for path, leaf in (frozen or {}).items()
    }
    self._stream = stream
    self._max_to_keep = max_to_keep
    self._is_broken = False
    self._directory = pathlib.Path(workdir).absolute() / 'checkpoints'
    self._manager = ocp.CheckpointManager(
        epath.Path(self._directory),
        options=ocp.CheckpointManagerOptions(
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        ),
    )

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, *unused: Any) -> None:
    self._manager.close()
    if self._is_broken:
      self._clear()

  def save(self, step: int, tree: Any) -> None:
    """Saves a tree of arrays and typed keys as the checkpoint of a step.

    Older ones go once this one is whole.

    Raises:
      OSError: one that could not be written; nothing of it is left.
    """
    try:
      with _errors_raised_alone():
        self._write(step, without(tree, self._frozen))
    except Exception as e:
      self._is_broken = True
      if step in self._steps():
        _remove(self._directory / str(step))
      self._clear()
      is_full = 'No space left on device' in str(e)
      reason = 'no space left on the device' if is_full else str(e)
      raise OSError(
          f'Expected to write the checkpoint of step {step} in {self._directory}, got'
          f' {reason}; the last one is kept.'
      ) from e
    for old in sorted(self._steps())[: -self._max_to_keep]:
      self._manager.delete(old)

  def _write(self, step: int, tree: Any) -> None:
    self._manager.save(step, args=ocp.args.StandardSave(tree), force=True)
    folder = self._directory / str(step)
    files.write_json(folder / _FROZEN, self._frozen)
    if self._stream is not None:
      place = self._stream.get_state()
      if isinstance(place, bytes):
        place = {'base64': base64.b64encode(place).decode()}
      files.write_json(folder / _STREAM, place)
    files.write_json(folder / _DIGEST, _digest(folder))

  def _clear(self) -> None:
    """Removes what is half-written, which threads of orbax may still fill."""
    for _ in range(20):
      found = list(self._directory.glob('*-tmp'))
      for path in found:
        shutil.rmtree(path, ignore_errors=True)
      if not found:
        return
      time.sleep(0.05)

  def latest(self) -> int | None:
    """Returns the step of the newest checkpoint."""
    return max(self._steps(), default=None)

  def _steps(self) -> list[int]:
    # Orbax does not list one whose metadata are lost.
    names = [path.name for path in self._directory.iterdir()]
    return [int(name) for name in names if name.isdigit()]

  def restore(self, like: Any, older: Mapping[str, Any] | None = None) -> Any:
    """Returns the newest whole checkpoint; a warning names damaged ones.

    Damaged ones that are newer are removed, for they are to be written again.

    Args:
      like: tree of arrays with the structure, shapes and shardings to restore
        to, on whatever number of devices. Frozen leaves are returned as they are.
      older: entries that checkpoints of the last version have besides.

    Raises:
      ValueError: a checkpoint of another structure, with other frozen leaves, or
        none that is whole.
    """
    steps = sorted(self._steps(), reverse=True)
    if not steps:
      raise ValueError(f'Expected a checkpoint in {self._directory}, got none.')
    for i, step in enumerate(steps):
      try:
        tree = self._restore(step, like, older or {})
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

  def _restore(self, step: int, like: Any, older: Mapping[str, Any]) -> Any:
    folder = self._directory / str(step)
    damage = _damage(folder)
    is_older = not (folder / _FROZEN).exists()
    stored = {**older, **like} if is_older else without(like, self._frozen)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, stored)
    if not damage and self._stream is not None:
      damage = '' if (folder / _STREAM).exists() else f'no file {_STREAM}'
    if damage:
      raise _DamagedError(
          f'Expected a whole checkpoint in {self._directory} at step {step}, got'
          f' {damage}.'
      )
    if not is_older:
      self._check_frozen(step)
    try:
      tree = self._manager.restore(
          step, args=ocp.args.StandardRestore(abstract)
      )
      if self._stream is not None:
        place = files.read_json(folder / _STREAM)
        if isinstance(place, dict) and place.keys() == {'base64'}:
          place = base64.b64decode(place['base64'])
        self._stream.set_state(place)
      return {k: v for k, v in joined(tree, like).items() if k in like}
    except Exception as e:
      what = self._difference(step, stored)
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

  def _check_frozen(self, step: int) -> None:
    """Raises where the leaves that are not stored are others than they were."""
    where = f'{self._directory} at step {step}'
    try:
      stored = files.read_json(self._directory / str(step) / _FROZEN)
    except ValueError as e:
      raise _DamagedError(
          f'Expected a whole checkpoint in {where}, got a damaged {_FROZEN}.'
      ) from e
    for path in sorted(stored.keys() | self._frozen.keys()):
      old, new = stored.get(path), self._frozen.get(path)
      if old is None or new is None or old['shape'] != new['shape']:
        shape = lambda entry: entry and tuple(entry['shape'])
        raise ValueError(
            f'Expected a checkpoint of this configuration in {where}, got {path} of'
            f' shape {shape(old)} where the configuration has {shape(new)} (None:'
            ' trained).'
        )
      if old != new:
        raise ValueError(
            f'Expected {path} as the run in {self._directory} began with, of hash'
            f' {old["hash"]}, got {new["hash"]}: the weights that it fine-tunes'
            ' have changed.'
        )

  def _difference(self, step: int, like: Any) -> str:
    """Returns the first leaf whose shape differs from the stored one."""
    folder = epath.Path(self._directory) / str(step) / 'default'
    try:
      metadata = ocp.StandardCheckpointHandler().metadata(folder)
    except Exception:  # Damaged: the reason is in the error of the restore.
      return ''
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    shapes = lambda tree: {
        _name(path): tuple(x.shape)
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
        if not (isinstance(x, jax.Array) and is_key(x))
    }
    stored = shapes(getattr(metadata, 'tree', metadata))
    for path, shape in shapes(like).items():
      if stored.get(path, shape) != shape:
        return f'{path} of shape {stored[path]} where the configuration has {shape}.'
    return ''


@contextlib.contextmanager
def _errors_raised_alone() -> Iterator[None]:
  """Keeps threads of orbax from logging, with tracebacks, what is raised as well."""
  logger = python_logging.getLogger('absl')
  level = logger.level
  try:
    logger.setLevel(python_logging.CRITICAL)
    yield
  finally:
    logger.setLevel(level)


def marked(tree: Any, marks: Any) -> dict[str, Any]:
  """Returns {path: leaf} of the leaves that a tree of bool marks.

  Args:
    tree: of arrays.
    marks: a tree of bool with the same leaves.
  """
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  flags = jax.tree.leaves(marks)
  return {
      _name(path): leaf
      for (path, leaf), flag in zip(flat, flags, strict=True)
      if flag
  }


def without(tree: Any, paths: Mapping[str, Any]) -> Any:
  """Returns the tree with None in place of the leaves at some paths."""
  drop = lambda path, x: None if _name(path) in paths else x
  return jax.tree_util.tree_map_with_path(drop, tree)


def joined(tree: Any, like: Any) -> Any:
  """Returns the tree with the leaves of `like` where it has None."""
  none = lambda x: x is None
  pick = lambda x, y: y if x is None else x
  return {
      name: jax.tree.map(pick, value, like[name], is_leaf=none)
      if name in like
      else value
      for name, value in tree.items()
  }


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _fingerprint(leaf: Any) -> dict[str, Any]:
  """Returns shape, dtype and hash of an array, by its bytes."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  array = np.ascontiguousarray(jax.device_get(leaf))
  digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
  return {
      'shape': list(array.shape),
      'dtype': str(array.dtype),
      'hash': digest[:32],
  }


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
  files.write_json(workdir / 'config.json', dict(config))


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
  stored = files.read_json(path)
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


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns {'a.b': value} of nested mappings."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f'{prefix}{name}.'))
    else:
      flat[prefix + name] = value
  return flat
