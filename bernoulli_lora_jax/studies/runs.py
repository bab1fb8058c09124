"""A finished run: read from its directory, and trained again along its path."""

from collections.abc import Callable
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import reporting


class Finished(NamedTuple):
  """A run directory, read and checked."""

  run: reporting.Run
  config: config_dict.ConfigDict


class Path(NamedTuple):
  """A replayed run."""

  steps: list[int]
  points: list[Any]  # Params at those steps.
  start: Any  # State at step 0.
  error: float  # ||end - checkpoint|| / ||checkpoint - start||.


def load(directory: str | pathlib.Path) -> Finished:
  """Reads a finished run.

  Args:
    directory: of one run, as `launch/train.py` wrote it.

  Raises:
    ValueError: no finished run, several, or one without checkpoints.
  """
  directory = pathlib.Path(directory)
  for name in ('config.json', 'summary.json', 'metrics.jsonl'):
    if (directory / name).is_file():
      continue
    nested = sorted(directory.glob('*/summary.json'))
    if nested:
      raise ValueError(
          f'Expected one run, got {directory} with {len(nested)} runs in it:'
          f' give one of them, as {nested[0].parent}.'
      )
    raise ValueError(
        f'Expected a finished run with {name}, got {directory}: give the'
        ' --workdir of one launch/train.py.'
    )
  saved = directory / 'checkpoints'
  if not saved.is_dir() or not any(p.name.isdigit() for p in saved.iterdir()):
    raise ValueError(
        f'Expected checkpoints in {saved}, got none: of runs that were trained'
        ' together (a sweep) --config.training.keep_weights=True keeps the end.'
    )
  found = reporting.load_runs([directory])
  if len(found) != 1:
    raise ValueError(f'Expected one run in {directory}, got {len(found)}.')
  run = found[0]
  if not isinstance(run.summary, dict) or 'step' not in run.summary:
    raise ValueError(
        f'Expected a summary with step, got {run.summary} in'
        f' {directory / "summary.json"}.'
    )
  if 'diverged' in run.summary:
    raise ValueError(f'Expected a run that ended, got {run.summary}.')
  return Finished(run, experiment.read_config(directory))


def replay(
    finished: Finished,
    program: programs.Program,
    num_points: int,
    report: Callable[[int], Any] = lambda steps: None,
) -> Path:
  """Trains the run again and keeps points of its path.

  Args:
    finished: the run.
    program: of its configuration.
    num_points: kept, >= 2, about evenly spaced, first and last included.
    report: called with the steps done.
  """
  checks.at_least(2, points=num_points)
  num_steps = int(finished.run.summary['step'])
  every = min(program.settings.eval_every, num_steps)
  count = math.ceil(num_steps / every)
  kept = np.linspace(0, count, num_points).round().astype(int) * every
  wanted = {min(int(step), num_steps) for step in kept}
  key = jax.random.key(finished.config.seed)
  start = program.start(key)
  state = program.put(jax.tree.map(jnp.copy, start))
  steps, points = [0], [program.params(state)]
  for begin in range(0, num_steps, every):
    num = min(every, num_steps - begin)
    run = program.jit(num, state)
    state, _ = run(program.data, state, key, begin, ())
    report(num)
    if begin + num in wanted:
      steps.append(begin + num)
      points.append(program.params(state))
  with loop.open_checkpoints(program, finished.run.path, start) as saver:
    end, _, _ = loop.restore(saver, program, program.get(state))
    saved = program.params(program.put(end))
  distance = lambda a, b: math.sqrt(
      sum(
          float(jnp.sum((x - y) ** 2))
          for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
      )
  )
  moved = distance(saved, points[0]) or 1.0
  return Path(steps, points, start, distance(points[-1], saved) / moved)
