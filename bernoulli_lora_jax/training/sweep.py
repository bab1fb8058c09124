"""Every run of a config's sweep(), each in a directory of its own.

Runs of a small task that differ in the seed, in `prob` or in the learning rate
alone are trained in one program (`together`), as are those of a task of some size on
an accelerator, where a program takes longer to compile than to run; others one after
another.
"""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import inspect
import json
import pathlib
from typing import Any, NamedTuple

import jax
from ml_collections import config_dict
import tqdm

from bernoulli_lora_jax import files
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import config_files
from bernoulli_lora_jax.training import directory
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import fields
from bernoulli_lora_jax.training import labels
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import metrics_log
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import together

# Fields that runs of one program may differ in, with the argument they become.
_TRACED = {
    'method.prob': 'prob',
    'method.learning_rate': 'learning_rate',
    'method.stepsize_factor': 'learning_rate',
}
_SMALL = 2**20  # Most parameters of a model whose runs are trained at a time.
# And of one whose runs share a program, by platform.
_MEDIUM = {'cpu': _SMALL, 'gpu': 2**27, 'tpu': 2**27}


class Run(NamedTuple):
  """One run of a sweep."""

  config: config_dict.ConfigDict
  directory: pathlib.Path


def load(path: str, variant: str = '') -> list[dict[str, Any]]:
  """Returns what sweep(variant) of a config file returns: overrides a run.

  Raises:
    ValueError: a file without it.
  """
  module = config_files.run_file(path)
  if 'sweep' not in module:
    raise ValueError(f'Expected a function sweep() in {path}.')
  takes_variant = inspect.signature(module['sweep']).parameters
  with config_files.running(path):
    grid = module['sweep'](variant) if takes_variant else module['sweep']()
  is_grid = isinstance(grid, (list, tuple)) and grid
  if not is_grid or not all(isinstance(run, Mapping) for run in grid):
    raise ValueError(
        f'Expected sweep() of {path} to return overrides [{{field: value}}], got'
        f' {str(grid)[:80]}.'
    )
  return list(grid)


def run_name(overrides: Mapping[str, Any]) -> str:
  """Returns `name=bernoulli,rank=4/seed=0`: a directory of one run.

  Raises:
    ValueError: two fields of one name, or a value that would be folders.
  """
  for field, value in overrides.items():
    if not str(value).isprintable() or '/' in str(value):
      raise ValueError(
          f'Expected values that can name a directory, got {field}={value!r}: set'
          ' it in the config or by a flag, not in sweep().'
      )
  short = {k.rsplit('.', 1)[-1]: v for k, v in overrides.items()}
  if len(short) < len(overrides):
    raise ValueError(f'Expected fields of different names, got {overrides}.')
  seed = short.pop('seed', None)
  name = ','.join(f'{k}={v}' for k, v in short.items()) or 'default'
  return name if seed is None else f'{name}/seed={seed}'


def check_flags(
    grid: Sequence[Mapping[str, Any]], flags: Iterable[str]
) -> None:
  """Raises ValueError for a field set by a flag that the grid would overwrite."""
  for field in flags:
    values = [overrides[field] for overrides in grid if field in overrides]
    if values:
      raise ValueError(
          f'Expected no flag --config.{field}, which sweep() sets (to'
          f' {values[0]!r} first): edit sweep(), or use launch/train.py.'
      )


def train(
    config: config_dict.ConfigDict,
    grid: Sequence[Mapping[str, Any]],
    workdir: str | pathlib.Path,
    *,
    progress: bool = True,
) -> None:
  """Trains the runs that are not finished yet.

  Args:
    config: what the runs have in common.
    grid: flat overrides of each run.
    workdir: their directories are below it, named by the overrides.
    progress: whether to show a bar.

  Raises:
    ValueError: two runs with one name, a field outside its range, a directory
      of another configuration or with another process in it. All runs are checked
      before the first is trained.
  """
  directory.check(workdir)
  runs = []
  for overrides in grid:
    run = experiment.apply_overrides(
        config, {'training.progress': False, **overrides}
    )
    fields.check(run)
    runs.append(Run(run, pathlib.Path(workdir) / run_name(overrides)))
  if len({run.directory for run in runs}) < len(runs):
    raise ValueError('Expected runs of different names, got two with one.')
  todo = [run for run in runs if not _is_finished(run)]
  bar = tqdm.tqdm(
      total=len(runs),
      initial=len(runs) - len(todo),
      unit='run',
      disable=not progress,
      mininterval=0.5,
      bar_format='{l_bar}{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}'
      '{postfix}]',
  )
  groups = _groups(todo)
  _check(groups)
  names, _ = labels.names(
      [members[0].config.to_dict() for members in groups], _TRACED
  )
  task_key, task, evaluators = None, None, {}
  with bar:
    for name, members in zip(names, groups, strict=True):
      first = members[0].config
      if task is None or arguments.task_key(first) != task_key:
        task_key = arguments.task_key(first)
        task, evaluators = arguments.make_task(first), {}
      bar.set_postfix_str(name)
      if _share_program(first, task):
        with contextlib.ExitStack() as stack:
          for run in members:
            stack.enter_context(directory.hold(run.directory))
          _train_together(members, task, bar, evaluators)
      else:
        _train_in_turn(members, task, bar)


def _is_finished(run: Run) -> bool:
  """Returns whether there is a summary; raises where it is of another run."""
  checkpoint.compare_config(run.directory, _record(run), longer=False)
  path = run.directory / 'summary.json'
  if path.exists():
    return loop.read_summary(path) is not None
  directory.check(run.directory)
  return False


def _record(run: Run) -> dict[str, Any]:
  return json.loads(run.config.to_json_best_effort())


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
  """Returns runs that one program can train, neighbours of one task together."""
  groups: dict[tuple[str, str], list[Run]] = {}
  for run in runs:
    common: dict[str, Any] = {'seed': 0}
    for field in _traced_fields(run.config):
      common[field] = 1.0
    rest = experiment.apply_overrides(run.config, common)
    key = (arguments.task_key(rest), rest.to_json_best_effort())
    groups.setdefault(key, []).append(run)
  return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def _check(groups: Sequence[Sequence[Run]]) -> None:
  """Raises for a field outside its range, before anything is trained."""
  task_key, task = None, None
  for members in groups:
    first = members[0].config
    if task is None or arguments.task_key(first) != task_key:
      task_key, task = arguments.task_key(first), None
      task = arguments.make_task(first)
    experiment.make_program(first, task)
    for config in (run.config for run in members[1:]):
      experiment.argument(config, task, 'learning_rate')


def _traced_fields(config: config_dict.ConfigDict) -> list[str]:
  """Returns the fields of a run that are arguments of its program."""
  has_factor = config.method.stepsize_factor is not None
  fields = [f'method.{"stepsize_factor" if has_factor else "learning_rate"}']
  if config.method.name == 'bernoulli':
    fields.append('method.prob')
  return fields


def _share_program(config: config_dict.ConfigDict, task: task_lib.Task) -> bool:
  t = config.training
  most = _MEDIUM.get(jax.default_backend(), _SMALL)
  settings = experiment.make_settings(config, task)
  return (
      t.group_size != 1
      and _size(task) <= most
      and t.parallel == 'none'
      and task.sampling != 'stream'
      and not t.recipe
      and t.checkpoint_every == 0
      and settings.num_steps % settings.eval_every == 0
  )


def _one_by_one(config: config_dict.ConfigDict, task: task_lib.Task) -> bool:
  """Returns whether a program runs one run after another."""
  if config.training.step_together is not None:
    return not config.training.step_together
  return config.method.estimator == 'page' or _size(task) > _SMALL


def _size(task: task_lib.Task) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(task_lib.shapes(task)))


def _train_together(
    members: Sequence[Run],
    task: task_lib.Task,
    bar: Any,
    evaluators: dict[Any, Any],
) -> None:
  """Trains runs in one program and writes their directories."""
  config = members[0].config
  hypers = {
      _TRACED[field]: [
          experiment.argument(run.config, task, _TRACED[field])
          for run in members
      ]
      for field in _traced_fields(config)
  }
  settings = experiment.make_settings(config, task)
  shown = bar.n
  steps = 0

  def report(done: int) -> None:
    nonlocal steps
    steps += done
    bar.update(shown + steps / settings.num_steps - bar.n)

  results = together.train_together(
      task,
      lambda hyper: experiment.make_method(
          config,
          task,
          prob=hyper.get('prob'),
          learning_rate=hyper['learning_rate'],
      ),
      settings,
      [run.config.seed for run in members],
      hypers,
      group_size=config.training.group_size,
      one_by_one=_one_by_one(config, task),
      evaluators=evaluators,
      report=report,
  )
  flops = None
  if config.training.num_full_passes is not None:
    flops = experiment.step_flops(config, task)
  for i, result in results:
    run = members[i]
    checkpoint.check_config(run.directory, _record(run))
    with metrics_log.MetricsLog(run.directory, 0, events=False) as log:
      for line in result.lines:
        log.write(int(line['step']), line)
    if config.training.keep_weights and 'diverged' not in result.summary:
      program = experiment.make_program(run.config, task)
      end = result.state, result.best, result.progress
      loop.save_end(program, run.directory, *end)
    facts = experiment.facts(run.config, task)
    files.write_json(
        run.directory / 'summary.json',
        {**result.summary, **facts, 'step_flops': flops},
    )


def _train_in_turn(
    members: Sequence[Run], task: task_lib.Task, bar: Any
) -> None:
  """Trains runs one after another; those that differ in the seed share one
  compiled program."""
  compiled: dict[str, programs.Program] = {}
  for run in members:
    key = experiment.apply_overrides(
        run.config, {'seed': 0}
    ).to_json_best_effort()
    if key not in compiled:
      compiled = {key: experiment.make_program(run.config, task)}
    try:
      experiment.train(run.config, run.directory, compiled[key])
    except loop.DivergedError as e:
      tqdm.tqdm.write(f'{run.directory}: {e}')
    bar.update(1)
