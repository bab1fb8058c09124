"""Results that are computed once: pre-trained weights, constants of a task."""

from collections.abc import Callable, Mapping
import hashlib
import json
import os
import pathlib
from typing import Any

from absl import logging
import numpy as np

from bernoulli_lora_jax import files

Arrays = dict[str, np.ndarray]


def directory() -> pathlib.Path:
  """Returns `$BERNOULLI_LORA_CACHE`, else a folder in the user's cache."""
  chosen = os.environ.get('BERNOULLI_LORA_CACHE')
  if chosen:
    return pathlib.Path(chosen)
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'bernoulli_lora_jax'


def cached(
    name: str, settings: Mapping[str, Any], compute: Callable[[], Arrays]
) -> Arrays:
  """Returns compute(), or what an earlier call with equal settings stored.

  Args:
    name: beginning of the file's name.
    settings: everything the result depends on, as JSON values.
    compute: () -> {name: array}.

  Returns:
    {name: array}. Files appear whole; an unreadable one is computed anew.
  """
  text = json.dumps(dict(settings), sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:16]
  path = directory() / f'{name}-{digest}.npz'
  try:
    return files.read_arrays(path)
  except FileNotFoundError:
    pass
  except (OSError, ValueError) as e:
    logging.warning('%s is unreadable (%s); computing it anew.', path, e)
  arrays = compute()
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_arrays(path, arrays)
  return arrays


def fingerprint(*arrays: np.ndarray) -> str:
  """Returns a hash of arrays, to name data in `settings`."""
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(str((array.shape, array.dtype)).encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:16]
