"""Many runs of a small task in one compiled program.

Runs that differ in the seed, in `prob` or in the learning rate alone form a
group: they are vmapped as many at a time as the device holds, their steps are
scanned, and one program, compiled once, takes them from one evaluation to the
next. Early stopping, learning-rate plateaus and divergence are kept for each run
by masks; a group ends when all of its runs have. The numbers are those of the
same runs one after another, to rounding.

The number of a step is the same in all runs and stays out of the batch, so that
the end of a link remains a branch; under `vmap` PAGE's choice would become a
select that computes the full gradient at each step, so its runs are mapped one
after another, within the same program. So are those of models that fill a device
alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import math
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import programs

# What a method is made from in each run: {'prob', 'learning_rate'} or fewer.
Hyper = Mapping[str, jax.Array]

_FINAL = 'final:'  # Before the names of the test split's metrics.
_RUNS_PER_CORE = 10  # On CPUs more at a time are slower (caches).
_RUNS = 256  # On accelerators.
_MEMORY = 0.6  # Part of the device's memory that a group may take.


class Result(NamedTuple):
  """One finished run of a group."""

  lines: list[dict[str, float]]  # As in metrics.jsonl.
  summary: dict[str, Any]  # As in summary.json, without facts of the config.
  state: Any  # Of the method, after the last step.
  # `Method.snapshot` at the lowest validation loss; None without patience.
  best: Any
  progress: loop.Progress  # At the end.


class _Program(NamedTuple):
  """The compiled parts of a group of a size."""

  start: Callable[..., Any]  # (keys, hyper, weights) -> states
  # (states, params, keys, hyper, active, data, step) -> states, params, metrics.
  steps: Callable[..., Any]
  evaluate: Callable[..., Any]  # (params, data) -> metrics of all splits.
  snapshot: Callable[[Any], Any]  # states -> what their params are made of.


def train_together(
    task: task_lib.Task,
    make_method: Callable[[Hyper], methods.Method],
    settings: programs.Settings,
    seeds: Sequence[int],
    hypers: Mapping[str, Sequence[float]],
    *,
    group_size: int = 0,
    one_by_one: bool = False,
    evaluators: dict[Any, Any] | None = None,
    report: Callable[[int], None] = lambda steps: None,
) -> Iterator[tuple[int, Result]]:
  """Trains runs in groups and yields each with its number.

  Args:
    task: what all runs train.
    make_method: hyper -> method; called while tracing, with traced values.
    settings: of each run; checkpoints and recipes are not written.
    seeds: of the runs.
    hypers: {name: value of each run}.
    group_size: runs at a time; 0 for as many as the device holds.
    one_by_one: whether the runs of a group are mapped in place of vmapped.
    evaluators: compiled evaluations of this task, kept from call to call.
    report: called with the steps that runs have done or do not need.

  Yields:
    (number of the run, `Result`), a group at a time.
  """
  if settings.num_steps % settings.eval_every:
    raise ValueError(
        f'Expected num_steps={settings.num_steps} to be a multiple of'
        f' eval_every={settings.eval_every} for runs that train together.'
    )
  count = len(seeds)
  keys = jnp.stack([jax.random.key(seed) for seed in seeds])
  values = {
      k: jnp.asarray(v, jnp.result_type(float)) for k, v in hypers.items()
  }
  parts = _Parts(task, make_method, settings, one_by_one)
  evaluators = {} if evaluators is None else evaluators
  size, program = _fit(parts, keys, values, group_size, evaluators)
  for first in range(0, count, size):
    # The last group is filled with runs of the first, so that it fits.
    rows = [(first + i) if first + i < count else i for i in range(size)]
    places = np.asarray(rows)
    take = lambda x, places=places: x[places]
    members = rows[: min(size, count - first)]
    results = _train_group(
        program,
        task,
        settings,
        take(keys),
        jax.tree.map(take, values),
        len(members),
        report,
    )
    yield from zip(members, results, strict=True)


class _Parts(NamedTuple):
  """The functions of one run, and their mapping over the runs of a group."""

  task: task_lib.Task
  make_method: Callable[[Hyper], methods.Method]
  settings: programs.Settings
  one_by_one: bool

  def start(self, key, hyper, weights):
    return programs.start(self.task, self.make_method(hyper), key, weights)

  def steps(self, state, params, key, hyper, active, data, start):
    """Trains to the next evaluation; a run that has ended stays as it is."""
    method = self.make_method(hyper)
    num = self.settings.eval_every
    new, metrics = programs.steps(
        self.task, method, num, data, state, key, start
    )
    line = {name: value.mean() for name, value in metrics.items()}
    line |= {
        name: metrics[name][-1]
        for name in methods.CUMULATIVE
        if name in metrics
    }
    line['bad_step'] = jnp.argmax(~jnp.isfinite(metrics['loss']))
    keep = lambda a, b: jnp.where(active, a, b)
    kept = jax.tree.map(keep, new, state)
    params = jax.tree.map(keep, method.params(new), params)
    return _with_count(kept, _count(new)), params, line

  def evaluate(self, method):
    """Returns (params, data) -> metrics of all splits, the test split too."""

    def all_splits(params, data):
      metrics = programs.evaluate(
          self.task, method, self.settings, params, data
      )
      split = programs.test_split(self.task)
      found = programs.of_split(self.task, params, data, split)
      for name, value in found.items():
        metrics[_FINAL + name] = value
      return metrics

    return all_splits

  def mapped(self, f, in_axes, out_axes):
    """Returns f over the runs of a group, vmapped or one after another."""
    if not self.one_by_one:
      return jax.vmap(f, in_axes, out_axes)

    def run(*args):
      pairs = list(zip(args, in_axes, strict=True))
      shared = [a for a, axis in pairs if axis is None]
      own = [a for a, axis in pairs if axis is not None]
      return jax.lax.map(lambda own: f(*own, *shared), own)

    return run


def _compile(
    parts: _Parts, keys: jax.Array, hyper: Hyper, evaluators: dict[Any, Any]
) -> tuple[_Program, int]:
  """Compiles for a group of len(keys) runs; returns also the bytes it takes."""
  data, size = parts.task.data, len(keys)
  start = jax.jit(
      lambda keys, hyper, weights: _shared_count(
          jax.vmap(parts.start, (0, 0, None))(keys, hyper, weights),
          parts.one_by_one,
      )
  )
  states = jax.eval_shape(start, keys, hyper, parts.task.weights)
  axes = 0 if parts.one_by_one else _axes(states)
  method = parts.make_method({name: value[0] for name, value in hyper.items()})
  params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype),
      task_lib.shapes(parts.task),
  )
  steps = jax.jit(
      parts.mapped(parts.steps, (axes, 0, 0, 0, 0, None, None), (axes, 0, 0)),
      donate_argnums=(0, 1),
  )
  flags = jax.ShapeDtypeStruct((size,), bool)
  step = jax.ShapeDtypeStruct((), jnp.int32)
  steps = steps.lower(states, params, keys, hyper, flags, data, step).compile()
  trained = method.trained(task_lib.shapes(parts.task))
  name = (size, tuple(jax.tree.leaves(trained)), parts.settings.eval_gradient)
  name += (parts.one_by_one,)
  if name not in evaluators:
    evaluate = jax.jit(parts.mapped(parts.evaluate(method), (0, None), 0))
    evaluators[name] = evaluate.lower(params, data).compile()
  evaluate = evaluators[name]
  needed = max(_bytes(steps), _bytes(evaluate))
  return _Program(start, steps, evaluate, method.snapshot), needed


def _fit(
    parts: _Parts,
    keys: jax.Array,
    hyper: Hyper,
    group_size: int,
    evaluators: dict[Any, Any],
) -> tuple[int, _Program]:
  """Returns the number of runs at a time, and the program for it."""
  device = jax.devices()[0]
  limit = group_size
  if not limit:
    is_cpu = device.platform == 'cpu'
    limit = _RUNS_PER_CORE * (os.cpu_count() or 1) if is_cpu else _RUNS
  num_groups = math.ceil(len(keys) / limit)
  while True:
    size = math.ceil(len(keys) / num_groups)
    rows = lambda x, size=size: x[:size]
    program, needed = _compile(
        parts, rows(keys), jax.tree.map(rows, dict(hyper)), evaluators
    )
    if size == 1 or group_size or needed <= _MEMORY * _memory(device):
      return size, program
    num_groups = math.ceil(num_groups * needed / (_MEMORY * _memory(device)))


@jax.jit
def _keep(chosen: jax.Array, new: Any, old: Any) -> Any:
  """Returns the new tree for chosen runs, the old one for others."""
  choose = jax.vmap(lambda c, a, b: jnp.where(c, a, b))
  return jax.tree.map(lambda a, b: choose(chosen, a, b), new, old)


def _train_group(
    program: _Program,
    task: task_lib.Task,
    settings: programs.Settings,
    keys: jax.Array,
    hyper: Hyper,
    count: int,
    report: Callable[[int], None],
) -> list[Result]:
  """Trains one group; the runs after `count` only fill it."""
  begun = time.perf_counter()
  size, data = len(keys), task.data
  states = program.start(keys, hyper, task.weights)
  init = jax.vmap(
      functools.partial(programs.init_params, task), (0, None), axis_size=size
  )
  params = jax.jit(init)(keys, task.weights)
  best = jax.tree.map(jnp.copy, params)  # `params` is donated.
  snapshot = lambda states: program.snapshot(_with_count(states, None))
  best_states = ()
  if settings.patience:
    best_states = jax.tree.map(jnp.copy, snapshot(states))
  final = program.evaluate(params, data)
  lines = [[{'step': 0, **line}] for line in _rows(final) if _drop_final(line)]
  best_step, best_loss = np.zeros(size, int), np.full(size, np.inf)
  stale, flat = np.zeros(size, int), np.zeros(size, int)
  end, bad_step = np.zeros(size, int), np.full(size, -1)
  active = np.arange(size) < count
  for start in range(0, settings.num_steps, settings.eval_every):
    if not active.any():
      report(count * (settings.num_steps - start))
      break
    states, params, metrics = program.steps(
        states,
        params,
        keys,
        hyper,
        jnp.asarray(active),
        data,
        jnp.asarray(start, jnp.int32),
    )
    rows = _rows({**metrics, **program.evaluate(params, data)})
    step = start + settings.eval_every
    is_finite = np.array(
        [math.isfinite(r['loss'] + r['train_loss']) for r in rows]
    )
    loss = np.array([r.get('validation_loss', r['train_loss']) for r in rows])
    is_best, new_stale, new_flat, drops = loop.judge(
        loss, best_loss, stale, flat, settings
    )
    is_best, drops = is_best & active, drops & active
    if settings.patience:
      chosen = jnp.asarray(is_best)
      best = _keep(chosen, params, best)
      best_states = _keep(chosen, snapshot(states), best_states)
    if drops.any():
      scale = np.where(drops, settings.plateau_factor, 1.0)
      lr_scale = states.lr_scale * scale.astype(states.lr_scale.dtype)
      states = states._replace(lr_scale=lr_scale)
    for i in np.flatnonzero(active):
      place = start + int(rows[i].pop('bad_step'))
      if math.isfinite(rows[i]['loss']):  # Found by the evaluation.
        place = step
      if is_finite[i]:
        _drop_final(rows[i])
        lines[i].append({'step': step, **rows[i]})
      else:
        bad_step[i] = place
    best_step = np.where(is_best, step, best_step)
    best_loss = np.where(is_best, loss, best_loss)
    stale, flat = np.where(active, [new_stale, new_flat], [stale, flat])
    end = np.where(active, step, end)
    active &= is_finite
    if settings.patience:
      active &= stale < settings.patience
    report(count * settings.eval_every)
  final = _rows(program.evaluate(best if settings.patience else params, data))
  seconds = time.perf_counter() - begun
  return [
      Result(
          lines[i],
          _summary(task, settings, final[i], end[i], best_step[i], bad_step[i])
          | {'seconds': seconds / count, 'runs_together': count},
          _state_of(_with_count(states, None), i, end[i], states),
          _state_of(best_states, i, best_step[i], states)
          if settings.patience
          else None,
          loop.Progress(
              int(end[i]),
              int(best_step[i]),
              float(best_loss[i]),
              int(stale[i]),
              int(flat[i]),
              seconds / count,
          ),
      )
      for i in range(count)
  ]


def _summary(
    task: task_lib.Task,
    settings: programs.Settings,
    final: dict[str, float],
    end: Any,
    best_step: Any,
    bad_step: Any,
) -> dict[str, Any]:
  """Returns the summary of a run."""
  if bad_step >= 0:
    return {
        'diverged': f'Expected a finite loss, got NaN or infinity at step {bad_step}.'
    }
  split = programs.test_split(task)
  named = {
      name.replace(_FINAL, f'{split}_'): value for name, value in final.items()
  }
  return {
      'step': int(end),
      'stopped': bool(end < settings.num_steps),
      'best_step': int(best_step),
      'device': jax.devices()[0].device_kind,
      **named,
  }


def _drop_final(line: dict[str, float]) -> dict[str, float]:
  """Removes the metrics of the test split, which is looked at once."""
  for name in [name for name in line if name.startswith(_FINAL)]:
    del line[name]
  return line


def _rows(metrics: Mapping[str, Any]) -> list[dict[str, float]]:
  """Returns one mapping a run."""
  arrays = {name: np.asarray(value) for name, value in metrics.items()}
  count = len(next(iter(arrays.values())))
  return [
      {name: float(value[i]) for name, value in arrays.items()}
      for i in range(count)
  ]


def _count(state: Any) -> Any:
  """Returns the number of steps of an adapter-mode state, else None."""
  if isinstance(state, methods.AdapterMethodState):
    return state.chain.count
  return None


def _with_count(state: Any, count: Any) -> Any:
  if isinstance(state, methods.AdapterMethodState):
    return state._replace(chain=state.chain._replace(count=count))
  return state


def _shared_count(states: Any, one_by_one: bool) -> Any:
  """Returns states with one number of steps for all runs."""
  count = _count(states)
  if count is None or one_by_one:
    return states
  return _with_count(states, count[0])


def _state_of(counted: Any, i: int, step: int, states: Any) -> Any:
  """Returns the state of one run after some steps.

  Args:
    counted: states of all runs without their number of steps.
    i: of the run.
    step: the steps it has done.
    states: with it.
  """
  one = jax.tree.map(lambda x: x[i], counted)
  count = _count(states)
  return (
      one if count is None else _with_count(one, jnp.asarray(step, count.dtype))
  )


def _axes(states: Any) -> Any:
  """Returns the axis of the runs in each leaf: None for the number of steps."""
  axes = jax.tree.map(lambda _: 0, states)
  return _with_count(axes, None)


def _bytes(compiled: Any) -> int:
  stats = compiled.memory_analysis()
  if stats is None:
    return 0
  return stats.temp_size_in_bytes + stats.argument_size_in_bytes


def _memory(device: Any) -> int:
  stats = device.memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
