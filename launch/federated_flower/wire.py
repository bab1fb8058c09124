"""What both sides share: the config, arrays that travel, files of a state."""

from collections.abc import Mapping
import hashlib
import json
import pathlib
import runpy
from typing import Any

from flwr.app import Array
from flwr.app import ArrayRecord
from flwr.app import Context
import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np

from bernoulli_lora_jax import files
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import parties as parties_lib


def load_config(context: Context) -> config_dict.ConfigDict:
  """Returns the config of the run, with its overrides.

  A node that has the file elsewhere names it in its own `config`.
  """
  chosen = context.node_config.get('config') or context.run_config['config']
  path, _, variant = str(chosen).partition(':')
  if not pathlib.Path(path).is_absolute():
    raise ValueError(
        "Expected config='/absolute/path.py:variant', got"
        f' config={str(chosen)!r}.'
    )
  config = runpy.run_path(path)['get_config'](variant)
  overrides = json.loads(str(context.run_config['overrides']))
  config = experiment.apply_overrides(config, overrides)
  jax.config.update('jax_enable_x64', config.x64)
  return config


def fingerprint(config: config_dict.ConfigDict) -> str:
  """Returns a hash of all fields but where the data is."""
  config = experiment.apply_overrides(config, {'task.data_dir': ''})
  return hashlib.sha256(config.to_json_best_effort().encode()).hexdigest()[:16]


def to_record(payload: parties_lib.Payload) -> ArrayRecord:
  """Returns a payload as Flower carries it."""
  return ArrayRecord({path: Array(x) for path, x in payload.items()})


def from_record(record: Any) -> parties_lib.Payload:
  """Returns the payload of a record; nothing in it is executed."""
  return {path: array.numpy() for path, array in record.items()}


def flatten(tree: Any) -> parties_lib.Payload:
  """Returns the leaves of a tree as arrays; of typed keys their data."""
  is_key = lambda x: jnp.issubdtype(
      getattr(x, 'dtype', int), jax.dtypes.prng_key
  )
  leaves = [
      jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree)
  ]
  return {str(i): np.asarray(x) for i, x in enumerate(leaves)}


def unflatten(arrays: Mapping[str, np.ndarray], like: Any) -> Any:
  """Returns the tree of which `flatten` made the arrays.

  Args:
    arrays: as `flatten` returns.
    like: tree of arrays, `jax.ShapeDtypeStruct`s or numbers; numbers come back
      as Python numbers.

  Raises:
    ValueError: arrays of another tree.
  """
  leaves: list[Any] = []
  for i, leaf in enumerate(jax.tree.leaves(like)):
    x: Any = arrays[str(i)]
    if isinstance(leaf, int | float):
      leaves.append(type(leaf)(x))
      continue
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      x = jax.random.wrap_key_data(x)
    if x.shape != leaf.shape:
      raise ValueError(
          f'Expected leaf {i} of shape {leaf.shape}, got {x.shape}.'
      )
    leaves.append(x if isinstance(leaf, np.ndarray) else jnp.asarray(x))
  if len(leaves) != len(arrays):
    raise ValueError(f'Expected {len(leaves)} leaves, got {len(arrays)}.')
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays to an npz file that appears whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_arrays(path, arrays)


def load(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """Returns what `save` wrote, or None."""
  if not path.exists():
    return None
  return files.read_arrays(path)
