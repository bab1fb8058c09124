"""The training loop: many steps a dispatch, exact resume, nothing half-written."""

from collections.abc import Callable, Mapping
import contextlib
import functools
import math
import pathlib
import signal
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from bernoulli_lora_jax import deprecated
from bernoulli_lora_jax import files
from bernoulli_lora_jax import merging
from bernoulli_lora_jax import recipes
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import batches
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import directory
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import metrics_log
from bernoulli_lora_jax.training import parallel
from bernoulli_lora_jax.training import programs

Program = programs.Program
Settings = programs.Settings


class DivergedError(FloatingPointError):
  """The loss or a parameter is no longer finite."""


class Progress(NamedTuple):
  """What a checkpoint holds beside the method's state."""

  step: int  # Steps done.
  best_step: int  # Step of the lowest validation loss.
  best_loss: float
  stale: int  # Evaluations since then.
  flat: int  # Evaluations since then or since the learning rate dropped.
  seconds: float  # Wall time of steps and evaluations, without compilation.


def make_program(
    task: task_lib.Task,
    method: methods.Method,
    settings: Settings,
    driver: parallel.Driver | None = None,
) -> Program:
  """Deprecated: `Program`."""
  deprecated.warn('loop.make_program', 'loop.Program')
  return Program(task, method, settings, driver or parallel.Driver())


def make_params(task: task_lib.Task) -> Callable[..., Any]:
  """Deprecated: `init_params`."""
  deprecated.warn(
      'loop.make_params(task)(key, weights)', 'loop.init_params(...)'
  )
  return functools.partial(programs.init_params, task)


def judge(
    loss: Any, best_loss: Any, stale: Any, flat: Any, settings: Settings
) -> tuple[Any, Any, Any, Any]:
  """Returns what an evaluation's loss means, for numbers or arrays of runs.

  Args:
    loss: of the validation split, or of training where there is none.
    best_loss: the lowest so far.
    stale: evaluations since then.
    flat: evaluations since then or since the learning rate dropped.
    settings: their patience.

  Returns:
    is_best, stale, flat, and whether the learning rate drops now.
  """
  is_best = loss < best_loss
  stale = np.where(is_best, 0, stale + 1)
  flat = np.where(is_best, 0, flat + 1)
  patience = settings.plateau_patience
  drops = flat >= patience if patience else np.zeros_like(flat, bool)
  return is_best, stale, np.where(drops, 0, flat), drops


def train(
    program: Program,
    seed: int,
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
  """Trains to the end, resuming from the newest checkpoint of `workdir`.

  Args:
    program: see `Program`.
    seed: of the method, the minibatches and the noise.
    workdir: directory of the run.
    config: JSON record of the run; a workdir of another one is refused.
    facts: JSON values that the summary repeats.

  Returns:
    The summary, as in summary.json; a finished run is not run again.

  Raises:
    ValueError: a workdir of another configuration, of more steps than this one
      has, or with another process in it.
    DivergedError: a loss or parameter that is not finite, with the step; the
      last good checkpoint stays, and the summary says so.
    SystemExit: 143 after a SIGTERM, 130 after a SIGINT, once a checkpoint is
      saved.
  """
  settings, key = program.settings, jax.random.key(seed)
  with contextlib.ExitStack() as stack:
    stack.enter_context(directory.hold(workdir))
    checkpoint.compare_config(workdir, config)
    summary = finished(workdir, settings.num_steps)
    checkpoint.check_config(workdir, config)
    if summary is not None and 'diverged' in summary:
      raise DivergedError(summary['diverged'])
    if summary is not None:
      return summary
    # Before all else: an interrupt within a compilation would end in jax's errors.
    terminated = stack.enter_context(_catch_signals())
    stream = batches.Batches(program.task, program.driver, seed)
    saver, state, best, progress = _restored(
        program, workdir, key, stream, stack
    )
    # Of fewer steps: the run is not finished any more.
    (workdir / 'summary.json').unlink(missing_ok=True)
    log = stack.enter_context(metrics_log.MetricsLog(workdir, progress.step))
    bar = stack.enter_context(_bar(program, progress.step))
    begun, speeds = time.perf_counter() - progress.seconds, []
    sides = program.sides_of_links(state, progress.step)
    try:
      # After a resume, too: it compiles what `seconds` is not to hold.
      first = _floats(program.evaluate(state))
      if progress.step == 0:
        log.write(0, first)
      while (num := _num_next(program, progress)) > 0:
        if (
            program.period
            and progress.step
            and not progress.step % program.period
        ):
          state = program.next_link(state)
        args = program.data, state, key, progress.step, stream.take(num)
        side = sides[program.link(progress.step)] if sides else None
        kind = num, side
        since = time.perf_counter()
        if kind not in program.compiled:  # Here, for a short way to a fault.
          lowered = program.jit(num, state, side).lower(*args)
          program.compiled[kind] = lowered.compile()
          program.compile_seconds[kind] = time.perf_counter() - since
        since = time.perf_counter()
        state, metrics = program.compiled[kind](*args)
        step = progress.step + num
        # While the device works.
        stream.prepare(_num_next(program, progress._replace(step=step)))
        line = _means(program.driver.get(metrics), progress.step)
        if program.task.num_tokens:
          spent = time.perf_counter() - since
          speeds.append(num * program.task.num_tokens / spent)
          line['tokens_per_second'] = speeds[-1]
        if step % settings.eval_every == 0 or step == settings.num_steps:
          line |= _check_line(_floats(program.evaluate(state)), step)
        seconds = progress.seconds + time.perf_counter() - since
        progress = progress._replace(step=step, seconds=seconds)
        if line.keys() & _JUDGED:
          is_best, drops, progress = _judged(line, progress, settings)
          if is_best and settings.patience:  # A copy: the state is donated.
            best = program.snapshot(program.get(state))
          if drops:
            scale = state.lr_scale * settings.plateau_factor
            state = state._replace(lr_scale=scale)
        if settings.recipe and program.method.chain is not None:
          _save_link(program, workdir, state, step)
        log.write(step, line)
        _show(bar, program, step, line)
        every = settings.checkpoint_every
        is_due = terminated or (every and step % every == 0)
        if is_due or _num_next(program, progress) == 0:
          _save(saver, program.get(state), best, progress)
        if step < settings.num_steps:
          _end_if_terminated(
              terminated, f'a checkpoint of step {step} is saved'
          )
    except DivergedError as e:
      spent = time.perf_counter() - begun
      summary = {'diverged': str(e), 'seconds': spent, **facts}
      files.write_json(workdir / 'summary.json', summary)
      raise
    log.close()
    if settings.patience:
      state = program.filled(best, state)
    if speeds:
      facts = {'tokens_per_second': float(np.median(speeds)), **facts}
    summary = {
        'step': progress.step,
        'stopped': progress.step < settings.num_steps,
        'best_step': progress.best_step,
        'seconds': progress.seconds,
        **facts,
        'peak_memory_bytes': _peak_memory(),
        'compile_seconds': sum(program.compile_seconds.values()),
        'device': jax.devices()[0].device_kind,
        **_floats(program.evaluate(state)),
        **_floats(program.test(state)),
    }
    if settings.recipe:  # After what looks at the peak, and at the state.
      _save_recipe(program, workdir, key, state)
    files.write_json(workdir / 'summary.json', summary)
    _end_if_terminated(terminated, 'the run is finished')
    return summary


def finished(workdir: pathlib.Path, num_steps: int) -> dict[str, Any] | None:
  """Returns the summary of a run that is over, None while there is work left.

  Raises:
    ValueError: a damaged summary, or one of a longer run.
  """
  path = workdir / 'summary.json'
  if not path.exists():
    return None
  summary = read_summary(path)
  _check_length(workdir, summary.get('step', 0), num_steps)
  is_over = summary.get('step', 0) >= num_steps or summary.get('stopped')
  return summary if is_over or 'diverged' in summary else None


def read_summary(path: pathlib.Path) -> dict[str, Any]:
  """Returns a summary; raises ValueError for a damaged one, with its name."""
  summary = files.read_json(path)
  if not isinstance(summary, dict) or not summary.keys() & {'step', 'diverged'}:
    raise ValueError(
        f'Expected a summary with step or diverged in {path}, got {summary!r}:'
        ' remove it to resume from the checkpoints.'
    )
  return summary


def _check_length(workdir: pathlib.Path, step: int, num_steps: int) -> None:
  if step > num_steps:
    raise ValueError(
        f'Expected training.num_steps >= {step}, the steps done in {workdir}, got'
        f' num_steps={num_steps}: choose another workdir, or remove this one.'
    )


def _restored(
    program: Program,
    workdir: pathlib.Path,
    key: jax.Array,
    stream: batches.Batches,
    stack: contextlib.ExitStack,
) -> tuple[checkpoint.Checkpointer, Any, Any, Progress]:
  """Returns checkpoints, state, best snapshot and progress to go on from."""
  state = program.start(key)
  # Of the start, for a run that has found no better one.
  best = program.snapshot(state) if program.settings.patience else None
  progress = Progress(0, 0, math.inf, 0, 0, 0.0)
  place = None if program.task.stream is None else stream
  saver = stack.enter_context(open_checkpoints(program, workdir, state, place))
  if saver.latest() is not None:
    state, best, progress = restore(saver, program, state)
  _check_length(workdir, progress.step, program.settings.num_steps)
  return saver, program.put(state), best, progress


def _bar(program: Program, step: int) -> tqdm.tqdm:
  """Returns a progress bar of the steps, in tokens where they are counted."""
  tokens = program.task.num_tokens
  return tqdm.tqdm(
      total=program.settings.num_steps * (tokens or 1),
      initial=step * (tokens or 1),
      unit='tok' if tokens else 'step',
      unit_scale=bool(tokens),
      disable=not program.settings.progress,
  )


_JUDGED = ('validation_loss', 'train_loss')  # The first that is there.
_SHOWN = ('loss', 'accuracy', 'validation_accuracy', 'validation_loss')


def _show(
    bar: tqdm.tqdm, program: Program, step: int, line: Mapping[str, float]
) -> None:
  bar.update(step * (program.task.num_tokens or 1) - bar.n)
  bar.set_postfix({k: f'{v:.4g}' for k, v in line.items() if k in _SHOWN})


def _num_next(program: Program, progress: Progress) -> int:
  """Returns the steps of the next dispatch, 0 at the end of the run.

  It depends on `progress` alone, so a resumed run has the dispatches of the
  uninterrupted one. They are counted from what has happened last (an evaluation, a
  checkpoint, the end of a link), so that few lengths are compiled.
  """
  settings, chain, period = (
      program.settings,
      program.method.chain,
      program.period,
  )
  if settings.patience and progress.stale >= settings.patience:
    return 0
  cadences = [settings.eval_every]
  cadences += [settings.checkpoint_every] if settings.checkpoint_every else []
  if chain is not None and settings.recipe:
    period = recipes.steps_of_link(chain)
  elif chain is not None and program.sides != (None,):
    period = chain.policy.period
  cadences += [period] if period else []
  step, longest = progress.step, settings.steps_per_dispatch
  last = max(step // every * every for every in cadences)
  ends = [(step // every + 1) * every for every in cadences]
  left = min(settings.num_steps, *ends) - step
  return min(longest - (step - last) % longest, left)


def compile_ahead(program: Program) -> list[Any]:
  """Returns the first dispatch compiled from shapes, nothing loaded; of each side.

  Args:
    program: of one process, not of pmap, with a stream.

  Returns:
    What jax compiles to, of each of `Program.sides`; `memory_analysis` tells what it
    takes of each device.
  """
  num = _num_next(program, Progress(0, 0, math.inf, 0, 0, 0.0))
  task, key = program.task, jax.random.key(0)
  start = functools.partial(programs.start, task, program.method)
  state = jax.eval_shape(start, key, task_lib.shapes(task))
  one = task_lib.example(task)
  rows = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((num, *x.shape), x.dtype), one
  )
  state, rows = program.driver.placed(state, rows)
  args = program.data, state, key, 0, rows
  for side in program.sides:
    begun = time.perf_counter()
    lowered = program.jit(num, state, side).lower(*args)
    program.compiled[num, side] = lowered.compile()
    program.compile_seconds[num, side] = time.perf_counter() - begun
  return list(program.compiled.values())


def _means(metrics: Mapping[str, Any], start: int) -> dict[str, float]:
  """Returns the metrics of a dispatch: means, of sums over all steps the last."""
  arrays = {name: np.asarray(value) for name, value in metrics.items()}
  bad = np.flatnonzero(~np.isfinite(arrays['loss']))
  if bad.size:
    raise DivergedError(
        f'Expected a finite loss, got {arrays["loss"][bad[0]]} at step'
        f' {start + int(bad[0])}: lower the learning rate; the last good'
        ' checkpoint is kept.'
    )
  return {
      name: float(x[-1] if name in methods.CUMULATIVE else x.mean())
      for name, x in arrays.items()
  }


def _check_line(line: dict[str, float], step: int) -> dict[str, float]:
  """Returns what an evaluation has found, if training is not to stop for it."""
  for name in {*_JUDGED, 'grad_norm_sq'} & line.keys():
    value = line[name]
    # Held out, a probability of zero makes a loss that is bad, and no other.
    is_inf = name == 'validation_loss' and math.isinf(value)
    if not math.isfinite(value) and not is_inf:
      raise DivergedError(
          f'Expected a finite {name}, got {value} at step {step}; the last'
          ' good checkpoint is kept.'
      )
  return line


def _judged(
    line: Mapping[str, float], progress: Progress, settings: Settings
) -> tuple[bool, bool, Progress]:
  """Returns whether params are the best and the rate drops, and the progress."""
  loss = next(line[name] for name in _JUDGED if name in line)
  is_best, stale, flat, drops = judge(
      loss, progress.best_loss, progress.stale, progress.flat, settings
  )
  progress = progress._replace(stale=int(stale), flat=int(flat))
  if is_best:
    progress = progress._replace(best_step=progress.step, best_loss=loss)
  return bool(is_best), bool(drops), progress


def _save_link(
    program: Program, workdir: pathlib.Path, state: Any, step: int
) -> None:
  """Writes what a link has trained, if it ends at this step or with the run."""
  chain, num_steps = program.method.chain, program.settings.num_steps
  assert chain is not None
  period = recipes.steps_of_link(chain) or num_steps
  if step % period and step != num_steps:
    return
  inner = program.get(state).chain
  link = recipes.trained_factors(inner, chain)
  recipes.save_link(workdir / 'recipe', (step - 1) // period, link)


def _save_recipe(
    program: Program, workdir: pathlib.Path, key: jax.Array, state: Any
) -> None:
  """Completes the recipe of a finished run, of the state that it keeps.

  A state of weights that are loaded is consumed.
  """
  chain = program.method.chain
  if chain is None:
    raise ValueError('Expected training.recipe=False in gradient mode.')
  final = program.get(state).chain
  step = int(final.count)
  num_links = -(-step // (recipes.steps_of_link(chain) or max(1, step)))
  folder = workdir / 'recipe'
  # Stopped early, or kept from before the end: within a link.
  if step != program.settings.num_steps and num_links:
    recipes.save_link(
        folder, num_links - 1, recipes.trained_factors(final, chain)
    )
  links = [recipes.load_link(folder, i) for i in range(num_links)]
  base, merged = _checksums(program, key, state)
  made = recipes.Recipe(
      base,
      merged,
      chain.policy,
      chain.matrices,
      final.key,
      step,
      tuple(links),
      chain.keeps,
  )
  recipes.save_recipe(folder, made, links=False)  # They are there.


def _checksums(program: Program, key: jax.Array, state: Any) -> tuple[str, str]:
  """Returns those of the base and of the merged weights; see `_save_recipe`."""
  task = program.task
  if task.load is None:
    base = programs.init_params(task, key, task.weights)
    return recipes.checksum(base), recipes.checksum(program.params(state))
  own = program.get(state)
  params = program.method.params_of_large(own, in_place=True)
  merged = recipes.checksum(params)
  # One set of weights at a time is on the device.
  jax.tree.map(lambda leaf: leaf.delete(), params)
  return recipes.checksum(task.load()), merged


def _save(
    saver: checkpoint.Checkpointer, state: Any, best: Any, progress: Progress
) -> None:
  leaves = [
      (path, merging.all_finite(leaf))
      for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
      if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  paths, finite = zip(*leaves, strict=True)
  for path, is_finite in zip(paths, jax.device_get(finite), strict=True):
    if not is_finite:
      raise DivergedError(
          'Expected finite parameters, got NaN or infinity in'
          f' {jax.tree_util.keystr(path)} at step {progress.step}; the last good'
          ' checkpoint is kept.'
      )
  saver.save(progress.step, checkpoint_tree(state, best, progress))


def save_end(
    program: Program,
    workdir: pathlib.Path,
    state: Any,
    best: Any,
    progress: Progress,
) -> None:
  """Saves the end of a run that was trained elsewhere, as `train` does.

  Args:
    program: of the run.
    workdir: its directory.
    state: of the method, after the last step.
    best: `Method.snapshot` at the lowest validation loss; None without patience.
    progress: at the end.
  """
  best = None if best is None else program.snapshot(best)
  with open_checkpoints(program, workdir, state) as saver:
    _save(saver, state, best, progress)


def checkpoint_tree(
    state: Any, best: Any, progress: Progress
) -> dict[str, Any]:
  """Returns what a checkpoint holds; `best` is None without early stopping."""
  numbers = {k: np.asarray(v) for k, v in progress._asdict().items()}
  tree = {'method': state, 'progress': numbers}
  return tree if best is None else {**tree, 'best': best}


def open_checkpoints(
    program: Program,
    workdir: str | pathlib.Path,
    state: Any,
    stream: Any = None,
) -> checkpoint.Checkpointer:
  """Returns the checkpoints of a run of the program.

  Args:
    program: see `Program`.
    workdir: directory of the run.
    state: at step 0, as `program.start` returns it: what the method never moves
      is not stored, but compared with it.
    stream: whose place is stored beside the state.
  """
  marks = {'method': program.method.frozen(state)}
  frozen = checkpoint.marked({'method': state}, marks)
  return checkpoint.Checkpointer(
      workdir, program.settings.max_to_keep, frozen, stream
  )


def restore(
    saver: checkpoint.Checkpointer, program: Program, state: Any
) -> tuple[Any, Any, Progress]:
  """Returns state, best snapshot (or None) and progress of the newest checkpoint.

  The snapshot is on the host, as `Program.snapshot` gives it.

  Args:
    saver: see `open_checkpoints`.
    program: see `Program`.
    state: at step 0; of weights that are loaded, what has been trained is given
      up for what is read.
  """
  zero = Progress(0, 0, 0.0, 0, 0, 0.0)
  best = program.snapshot(state) if program.settings.patience else None
  like = checkpoint_tree(state, best, zero)  # The best of the host stays there.
  # Checkpoints of the first version hold params besides.
  params = jax.eval_shape(program.method.params, state)
  if program.task.load is not None:  # Not twice at once.
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    drop = lambda x, stays: None if stays or not is_float(x) else x.delete()
    jax.tree.map(drop, state, program.method.frozen(state))
  tree = saver.restore(like, older={'best': params})
  found = {name: value.item() for name, value in tree['progress'].items()}
  return tree['method'], tree.get('best'), Progress(**found)


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
  return {name: float(value) for name, value in metrics.items()}


def _peak_memory() -> int | None:
  stats = jax.devices()[0].memory_stats()
  return stats.get('peak_bytes_in_use') if stats else None


def _end_if_terminated(received: list[int], what: str) -> None:
  if received:
    name = signal.Signals(received[0]).name
    print(f'Ended by {name}: {what}.', file=sys.stderr)
    raise SystemExit(128 + received[0])


@contextlib.contextmanager
def _catch_signals():
  """Yields a list that SIGTERM and SIGINT fill; the loop looks at it.

  A second SIGINT ends the process at once.
  """
  received: list[int] = []

  def receive(number, _):
    if received and number == signal.SIGINT:
      raise KeyboardInterrupt
    received.append(number)

  old = {}
  try:
    for number in (signal.SIGTERM, signal.SIGINT):
      old[number] = signal.signal(number, receive)
  except ValueError:  # Not the main thread: the caller handles signals.
    yield received
    return
  try:
    yield received
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
