"""What both sides share: the config, records of arrays, files of a state."""

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


def save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays to an npz file that appears whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_arrays(path, arrays)


def load(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """Returns what `save` wrote, or None."""
  if not path.exists():
    return None
  return files.read_arrays(path)
