"""Trains every run of a config's sweep(), one after another.

  python launch/sweep.py --config=configs/digits.py --workdir=runs/digits

Each run has a directory of its own below --workdir, named by its overrides; a
second call skips the finished ones. Runs that differ in the seed alone share
one compiled program. `launch/report.py` makes the tables and figures.
"""

import pathlib
import runpy
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags
import tqdm

from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import cli
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file with a function sweep().', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the runs.', required=True
)
flags.mark_flag_as_required('config')


def load_sweep(path: str) -> list[dict[str, Any]]:
  """Returns what sweep() of a config file returns: flat overrides a run."""
  module = runpy.run_path(path)
  if 'sweep' not in module:
    raise ValueError(f'Expected a function sweep() in {path}.')
  return module['sweep']()


def run_name(overrides: dict[str, Any]) -> str:
  """Returns `name=bernoulli,rank=4/seed=0`: a directory of one run."""
  short = {k.rsplit('.', 1)[-1]: v for k, v in overrides.items()}
  if len(short) < len(overrides):
    raise ValueError(f'Expected fields of different names, got {overrides}.')
  seed = short.pop('seed', None)
  name = ','.join(f'{k}={v}' for k, v in short.items()) or 'default'
  return name if seed is None else f'{name}/seed={seed}'


def train_or_record(
    run: Any, directory: pathlib.Path, program: loop.Program
) -> None:
  """Trains a run; one that diverges gets a summary that says so."""
  try:
    experiment.train(run, directory, program)
  except loop.DivergedError as e:
    tqdm.tqdm.write(f'{directory}: {e}')
    trained = experiment.trained_parameters(run, program.task)
    checkpoint.write_json(
        directory / 'summary.json',
        {'diverged': str(e), 'trained_parameters': trained, 'seconds': 0.0},
    )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise ValueError(f'Expected flags only, got {argv[1:]}.')
  config = _CONFIG.value
  jax.config.update('jax_enable_x64', config.x64)
  filename = config_flags.get_config_filename(flags.FLAGS['config'])
  grid = load_sweep(filename.partition(':')[0])
  tasks, programs = {}, {}  # The last one of each: neighbours share it.
  bar = tqdm.tqdm(grid, unit='run', mininterval=1.0)
  for overrides in bar:
    run = experiment.apply_overrides(
        config, {'training.progress': False, **overrides}
    )
    directory = pathlib.Path(_WORKDIR.value) / run_name(overrides)
    if (directory / 'summary.json').exists():
      continue
    bar.set_postfix_str(run_name(overrides), refresh=False)
    task_key = run.task.to_json_best_effort()
    if task_key not in tasks:
      tasks = {task_key: experiment.make_task(run)}
    program_key = experiment.apply_overrides(
        run, {'seed': 0}
    ).to_json_best_effort()
    if program_key not in programs:
      programs = {program_key: experiment.make_program(run, tasks[task_key])}
    train_or_record(run, directory, programs[program_key])


if __name__ == '__main__':
  cli.run(main)
