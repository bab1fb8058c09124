"""Finished runs on other data than they were tested on."""

from collections.abc import Sequence
import pathlib
from typing import Any

import jax
from ml_collections import config_dict

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import files
from bernoulli_lora_jax.studies import runs
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import directory as directory_lib
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import labels
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import reporting

_SPLITS = ('train', 'validation', 'test')


def evaluate(
    run_dirs: Sequence[str | pathlib.Path],
    data: str,
    *,
    name: str = '',
    **kwargs: Any,
) -> list[dict[str, Any]]:
  """Evaluates what finished runs have kept on data.

  Args:
    run_dirs: directories of runs, at any depth, of a task with `test_data`, as
      text_classification, and with checkpoints (of sweeps:
      training.keep_weights). Diverged runs are left out.
    data: in place of their test_data; what else the task reads, as the labels of
      training, is as it was.
    name: if given, metrics join the summaries as NAME_accuracy and so on, for
      reports.
    **kwargs: of the task, in place of the runs' own: unseen='count'.

  Returns:
    A row of metrics for each run.

  Raises:
    ValueError: a run without checkpoints or of a task without test_data, a name of
      a split.
  """
  checks.that(
      not name or name.isidentifier() and name not in _SPLITS,
      f'name to be an identifier, none of {_SPLITS}',
      name=name,
  )
  task_key, task, compiled, rows = None, None, {}, []
  metrics: Any = None
  for run in reporting.load_runs(run_dirs):
    if 'diverged' in run.summary:
      continue
    finished = runs.load(run.path)
    config = _with_data(finished.config, data, kwargs)
    if task is None or arguments.task_key(config) != task_key:
      task_key, task = arguments.task_key(config), arguments.make_task(config)
      compiled, metrics = {}, jax.jit(task.evaluate, static_argnums=2)
    like = experiment.apply_overrides(config, {'seed': 0})
    key = like.to_json_best_effort()
    if key not in compiled:
      compiled = {key: experiment.make_program(config, task)}
    params = _kept(compiled[key], run, config.seed)
    found = metrics(params, task.data, 'test')
    found = {k: float(v) for k, v in found.items()}
    if name:
      named = {f'{name}_{k}': v for k, v in found.items()}
      with directory_lib.hold(run.path):
        path = run.path / 'summary.json'
        files.write_json(path, {**run.summary, **named})
    told = labels.name(run.config)
    rows.append({'run': str(run.path), 'method': told, **found})
  return rows


def _with_data(
    config: config_dict.ConfigDict, data: str, kwargs: dict[str, Any]
) -> config_dict.ConfigDict:
  """Returns the config of a run with other data, for one device."""
  checks.that(
      'test_data' in config.task.kwargs,
      'a run of a task with config.task.kwargs.test_data',
      task=config.task.name,
  )
  config = experiment.apply_overrides(config, {'training.parallel': 'none'})
  with config.unlocked():
    config.task.kwargs.update({'test_data': data, **kwargs})
  return config


def _kept(program: programs.Program, run: reporting.Run, seed: int) -> Any:
  """Returns the weights that a run has kept: of the lowest validation loss."""
  start = program.start(jax.random.key(seed))
  with loop.open_checkpoints(program, run.path, start) as saver:
    state, best, _ = loop.restore(saver, program, start)
  state = program.put(state)
  return program.params(state if best is None else program.filled(best, state))
