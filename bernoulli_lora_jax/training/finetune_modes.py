"""The program of `blora finetune`: its steps, and the mode that fits."""

from collections.abc import Callable
import itertools
import math
import os
import pathlib
import sys
from typing import Any

import jax
from ml_collections import config_dict
import numpy as np

from bernoulli_lora_jax.tasks import language_model
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import programs

# {mode: (scan_layers, remat)}.
_MODES = {'speed': (False, 'none'), 'memory': (True, 'full')}
_SECONDS = 2.0  # Of a dispatch, about: between two looks at signals and losses.
_RATES = {'cpu': 1e10, 'gpu': 3e14, 'tpu': 1e14}  # FLOP/s, of a CPU's core.
_FITS = 0.92  # Part of a device's memory that a step may take.


def _begun(directory: pathlib.Path) -> config_dict.ConfigDict | None:
  """Returns the config of the run in a directory, None where none was begun."""
  if not (directory / 'config.json').is_file():
    return None
  return experiment.read_config(directory)


def is_sketched(given: dict[str, Any], loses_steps: bool) -> bool:
  """Returns whether a run is sketched; one that was begun goes on as it was.

  Args:
    given: arguments of the command.
    loses_steps: whether the rounding of weights would lose single steps.

  Raises:
    ValueError: what is asked for and cannot be, by name.
  """
  asked, method = given['sketched'], given['method']
  can = method in methods.SKETCHED
  if asked == 'yes' and not can:
    raise ValueError(
        f'Expected method of {", ".join(methods.SKETCHED)} with sketched=yes, got'
        f' method={method!r}.'
    )
  if asked == 'yes' and given['optimizer'] == 'adamw':
    raise ValueError(
        'Expected optimizer adam, column or sgd with sketched=yes, which has no'
        " factors to decay, got optimizer='adamw'."
    )
  begun = _begun(pathlib.Path(given['output']))
  if can and begun is not None and begun.method.mode != 'gradient':
    was = 'yes' if begun.method.mode == 'sketched' else 'no'
    if asked not in ('auto', was):
      raise ValueError(
          f'Expected sketched={was}, as in {given["output"]}, got'
          f' sketched={asked}: choose another output.'
      )
    return was == 'yes'
  if asked != 'auto':
    return asked == 'yes'
  is_one_sided = method in ('rac_left', 'rac_right')
  return is_one_sided and given['optimizer'] != 'adamw' and not loses_steps


def modes_of(mode: str, directory: pathlib.Path) -> list[str]:
  """Returns the modes that are tried; a run that was begun goes on as it was.

  Args:
    mode: as of the flag.
    directory: of the run.
  """
  if mode != 'auto':
    return [mode]
  if begun := _begun(directory):
    is_scanned = begun.task.kwargs.get('scan_layers', True)
    return ['memory' if is_scanned else 'speed']
  # On a CPU that which compiles in a fraction of the time.
  return ['memory'] if _is_cpu() else list(_MODES)


def set_mode(config: config_dict.ConfigDict, mode: str) -> dict[str, Any]:
  """Sets the mode of a config; returns how its model is loaded, see `hf.load`."""
  kwargs = config.task.kwargs
  kwargs.scan_layers, kwargs.remat = _MODES[mode]
  return {name: kwargs[name] for name in language_model.RUN_FIELDS}


def fitting(
    config: config_dict.ConfigDict,
    modes: list[str],
    directory: pathlib.Path,
    check: Callable[[programs.Settings], None],
) -> programs.Program:
  """Returns the compiled program of the first mode that fits, which the config gets.

  Args:
    config: of the run; its steps are counted here.
    modes: of `modes_of`.
    directory: of the run.
    check: called before what takes long.

  Raises:
    ValueError: what only data tell, as a length; another run in the directory.
  """
  begun, limit, task = _begun(directory), memory(), None
  for i, mode in enumerate(modes):
    run = set_mode(config, mode)
    if task is None:
      task = arguments.make_task(config)
    else:  # Data are read once.
      task = language_model.with_run(task, config.task.kwargs.model, **run)
    program = _made(config, task, begun)
    # What takes no time before what takes long.
    experiment.check_workdir(config, directory)
    check(program.settings)
    if loop.finished(directory, program.settings.num_steps) is not None:
      break
    loop.compile_ahead(program)
    needed = bytes_of(program)['step']
    if limit is None or needed <= _FITS * limit:
      break
    print(
        f'{mode} mode would take {needed / 2**30:.1f} of {limit / 2**30:.1f} GiB'
        + ('; trying memory mode.' if i + 1 < len(modes) else '.'),
        file=sys.stderr,
    )
  return program  # pyrefly: ignore


def _made(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    begun: config_dict.ConfigDict | None,
) -> programs.Program:
  """Returns the program of a config, whose steps are counted in it."""
  t = config.training
  steps = t.num_passes * task.num_samples / task.batch_size
  t.num_steps = t.num_steps or max(1, round(steps))
  links = config.method.period if _ends_at_links(config) else 1
  t.eval_every = _aligned(max(1, t.num_steps // t.num_evals), links)
  if begun is not None:  # A longer one goes on as it was, too.
    t.eval_every = begun.training.eval_every
    t.checkpoint_every = t.checkpoint_every or begun.training.checkpoint_every
  # A checkpoint takes seconds: every two minutes.
  most = _steps_of_seconds(task, config.task.kwargs.max_length)
  apart = max(1, round(60 * most / t.eval_every))
  t.checkpoint_every = t.checkpoint_every or apart * t.eval_every
  t.steps_per_dispatch = _dispatch(config, most)
  return experiment.make_program(config, task)


def _ends_at_links(config: config_dict.ConfigDict) -> bool:
  """Returns whether dispatches end with links, as those of evaluations should."""
  c = config.method
  has_sides = c.shared_coin and c.name == 'bernoulli'  # See `Program.sides`.
  return config.training.recipe or c.mode == 'sketched' or has_sides


def _aligned(every: int, period: int) -> int:
  """Returns about as many steps, a multiple of the period or a part of it."""
  if every >= period:
    return round(every / period) * period
  parts = [n for n in range(1, period + 1) if period % n == 0]
  return min(parts, key=lambda n: abs(math.log(n / every)))


def _dispatch(config: config_dict.ConfigDict, most: int) -> int:
  """Returns the most steps of a dispatch, so that a run has two lengths, or one.

  A length is a program to compile. One length is better than a dispatch up to twice
  as long; two are better than any that makes a third.
  """
  t = config.training
  gaps = [t.eval_every, t.checkpoint_every]
  gaps += [config.method.period] if _ends_at_links(config) else []
  ends = {n for gap in gaps for n in range(0, t.num_steps, gap)}
  spans = itertools.pairwise(sorted(ends | {t.num_steps}))
  spans = {end - begin for begin, end in spans}

  def count(n):
    return len({n for x in spans if x >= n} | ({x % n for x in spans} - {0}))

  longest = min(most, max(spans))
  near = range(longest, (longest - 1) // 2, -1)
  best = min(near, key=count)
  if count(best) <= 2:
    return best
  return next(n for n in range(longest, 0, -1) if count(n) <= 2)


def _steps_of_seconds(task: task_lib.Task, length: int) -> int:
  """Returns the steps that take about two seconds, on rows of a length."""
  numbers = sum(x.size for x in jax.tree.leaves(task_lib.shapes(task)))
  rate = _RATES.get(jax.devices()[0].platform, _RATES['gpu'])
  rate *= (os.cpu_count() or 1) if _is_cpu() else 1
  seconds = 6 * numbers * task.batch_size * length / rate
  return int(np.clip(round(_SECONDS / seconds), 1, 50))


def _is_cpu() -> bool:
  return jax.devices()[0].platform == 'cpu'


def memory() -> int | None:
  """Returns the bytes that a device lets a process use; None where it is unsaid."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get('bytes_limit')


def bytes_of(program: programs.Program) -> dict[str, int]:
  """Returns the bytes of a step, and of what it keeps."""
  task = program.task
  start = lambda key, weights: programs.start(
      task, program.method, key, weights
  )
  shapes = task_lib.shapes(task)
  state = jax.eval_shape(start, jax.random.key(0), shapes)
  size = lambda tree: sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  of = {'weights': size(shapes), 'optimiser and factors': 0, 'step': 0}
  of['optimiser and factors'] = size(state) - of['weights']
  for compiled in program.compiled.values():
    stats = compiled.memory_analysis()
    if stats is not None:
      bytes_of_one = (
          stats.argument_size_in_bytes
          + stats.output_size_in_bytes
          + stats.temp_size_in_bytes
          - stats.alias_size_in_bytes
      )
      of['step'] = max(of['step'], bytes_of_one)
  return of
