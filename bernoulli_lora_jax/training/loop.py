"""The training loop: many steps a dispatch, exact resume, nothing half-written."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import signal
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import metrics_log
from bernoulli_lora_jax.training import parallel

_METHOD, _BATCH, _NOISE = range(3)  # Purposes folded into the run's key.


class DivergedError(FloatingPointError):
  """The loss or a parameter is no longer finite."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """How long and how often; counts are of steps.

  Attributes:
    num_steps: T >= 1.
    eval_every: steps between evaluations, >= 1; also after the last step.
    checkpoint_every: steps between checkpoints; 0 saves only at the end.
    steps_per_dispatch: most steps in one compiled loop, >= 1.
    patience: evaluations without a lower validation loss after which the run
      stops; 0 never stops early. The params of the lowest one are then kept.
    progress: whether to show a progress bar.
    max_to_keep: checkpoints kept.
  """

  num_steps: int
  eval_every: int
  checkpoint_every: int = 0
  steps_per_dispatch: int = 1000
  patience: int = 0
  progress: bool = True
  max_to_keep: int = 2

  def __post_init__(self):
    least = {
        'num_steps': 1,
        'eval_every': 1,
        'checkpoint_every': 0,
        'steps_per_dispatch': 1,
        'patience': 0,
        'max_to_keep': 1,
    }
    for name, low in least.items():
      if getattr(self, name) < low:
        raise ValueError(
            f'Expected training.{name} >= {low}, got'
            f' {name}={getattr(self, name)}.'
        )


class Progress(NamedTuple):
  """What a checkpoint holds beside the method's state."""

  step: int  # Steps done.
  best_step: int  # Step of the lowest validation loss.
  best_loss: float
  stale: int  # Evaluations since then.
  seconds: (
      float  # Wall time of the steps and evaluations, compilation included.
  )


class Program(NamedTuple):
  """The compiled parts of a run, shared by runs that differ in the seed."""

  task: task_lib.Task
  method: methods.Method
  driver: parallel.Driver
  settings: Settings
  data: Any  # Where the steps read it.
  # (state, key, start, num) -> a function of the same state, key and start
  # that runs num steps: (state, metrics). Compiled once for each num.
  prepare: Callable[..., Callable[..., Any]]
  evaluate: Callable[[Any], dict[str, jax.Array]]  # Not on the test split.
  test: Callable[[Any], dict[str, jax.Array]]


def make_program(
    task: task_lib.Task,
    method: methods.Method,
    settings: Settings,
    driver: parallel.Driver | None = None,
) -> Program:
  """Returns what `train` runs; compile once, train with many seeds."""
  driver = parallel.make_driver('none') if driver is None else driver
  data = driver.put(task.data)
  eval_data = driver.get(data)
  compiled = {}

  def steps(state, data, key, start, num):
    batch_key = jax.random.fold_in(key, _BATCH)
    noise_key = jax.random.fold_in(key, _NOISE)

    def body(state, step):
      batch = task.batch(data, batch_key, step)
      noise = jax.random.fold_in(noise_key, step)
      return method.step(state, batch, noise, data['train'])

    return jax.lax.scan(body, state, start + jnp.arange(num))

  def prepare(state, key, start, num):
    if num not in compiled:
      run = functools.partial(steps, num=num)
      compiled[num] = driver.compile(run, (state, data, key, start))
    return lambda state, key, start: compiled[num](state, data, key, start)

  def evaluate(params, data):
    grad = jax.grad(lambda p: task.loss(p, data['train'], None)[0])(params)
    squares = jax.tree.map(
        lambda moves, g: jnp.vdot(g, g) if moves else 0.0,
        method.trained(params),
        grad,
    )
    metrics = {'grad_norm_sq': sum(jax.tree.leaves(squares))}
    for split in sorted(data.keys() - {'test'}):
      for name, value in task.evaluate(params, data, split).items():
        metrics[f'{split}_{name}'] = value
    return metrics

  test_split = 'test' if 'test' in task.data else 'train'
  jit_evaluate = jax.jit(evaluate)
  jit_test = jax.jit(lambda p, data: task.evaluate(p, data, test_split))
  return Program(
      task,
      method,
      driver,
      settings,
      data,
      prepare,
      lambda params: jit_evaluate(params, eval_data),
      lambda params: {
          f'{test_split}_{name}': value
          for name, value in jit_test(params, eval_data).items()
      },
  )


def train(
    program: Program,
    seed: int,
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
  """Trains to the end, resuming from the newest checkpoint of `workdir`.

  Args:
    program: see `make_program`.
    seed: of the method, the minibatches and the noise.
    workdir: directory of the run.
    config: JSON record of the run; a workdir of another one is refused.
    facts: JSON values that the summary repeats.

  Returns:
    The summary, as in summary.json; a finished run is not run again.

  Raises:
    ValueError: a workdir of another configuration.
    DivergedError: a loss or parameter that is not finite, with the step; the
      last good checkpoint stays.
    SystemExit: 143 after a SIGTERM, once a checkpoint is saved.
  """
  checkpoint.check_config(workdir, config)
  summary_path = workdir / 'summary.json'
  if summary_path.exists():
    summary = json.loads(summary_path.read_text())
    is_over = summary.get('step', 0) >= program.settings.num_steps
    if is_over or summary.get('stopped'):
      return summary
  key = jax.random.key(seed)
  init_key = jax.random.fold_in(key, _METHOD)
  params = program.task.init(init_key)
  state = program.method.init(init_key, params)
  progress, best = Progress(0, 0, math.inf, 0, 0.0), params
  with contextlib.ExitStack() as stack:
    saver = stack.enter_context(
        checkpoint.Checkpointer(workdir, program.settings.max_to_keep)
    )
    if saver.latest() is not None:
      state, best, progress = _restore(saver, state, best)
    state = program.driver.put(state)
    log = stack.enter_context(metrics_log.MetricsLog(workdir, progress.step))
    terminated = stack.enter_context(_catch_sigterm())
    bar = stack.enter_context(
        tqdm.tqdm(
            total=program.settings.num_steps,
            initial=progress.step,
            unit='step',
            disable=not program.settings.progress,
        )
    )
    state, best, progress = _run_to_end(
        program, key, state, best, progress, saver, log, bar, terminated
    )
    log.close()
  params = (
      best
      if program.settings.patience
      else program.method.params(program.driver.get(state))
  )
  summary = {
      'step': progress.step,
      'stopped': progress.step < program.settings.num_steps,
      'best_step': progress.best_step,
      'seconds': progress.seconds,
      **facts,
      'peak_memory_bytes': _peak_memory(),
      'device': jax.devices()[0].device_kind,
      **_floats(program.evaluate(params)),
      **_floats(program.test(params)),
  }
  checkpoint.write_json(summary_path, summary)
  return summary


def _run_to_end(
    program: Program,
    key: jax.Array,
    state: Any,
    best: Any,
    progress: Progress,
    saver: checkpoint.Checkpointer,
    log: metrics_log.MetricsLog,
    bar: Any,
    terminated: list[int],
) -> tuple[Any, Any, Progress]:
  """Runs dispatches, evaluations and checkpoints until the run ends."""
  settings, driver = program.settings, program.driver
  last_save = progress.step
  if progress.step == 0:
    log.write(0, _evaluate(program, state))
  while progress.step < settings.num_steps:
    if settings.patience and progress.stale >= settings.patience:
      break
    state, line, progress = _advance(program, key, state, progress)
    step = progress.step
    if 'grad_norm_sq' in line:
      progress, is_best = _judge(progress, line)
      if is_best and settings.patience:
        best = program.method.params(driver.get(state))
        best = jax.tree.map(jnp.copy, best)  # The state is donated.
    log.write(step, line)
    bar.update(step - bar.n)
    bar.set_postfix({k: f'{v:.4g}' for k, v in line.items() if k in _SHOWN})
    is_due = settings.checkpoint_every and not step % settings.checkpoint_every
    if is_due or terminated or step == settings.num_steps:
      _save(saver, driver.get(state), best, progress)
      last_save = step
    if terminated:
      raise SystemExit(128 + signal.SIGTERM)
  if last_save < progress.step:
    _save(saver, driver.get(state), best, progress)
  return state, best, progress


def _advance(
    program: Program, key: jax.Array, state: Any, progress: Progress
) -> tuple[Any, dict[str, float], Progress]:
  """Runs one dispatch and the evaluation that is due after it."""
  settings, start = program.settings, progress.step
  num = _next_event(start, settings) - start
  run = program.prepare(state, key, start, num)
  begun = time.perf_counter()
  state, metrics = run(state, key, start)
  metrics = {name: np.asarray(value) for name, value in metrics.items()}
  _check_finite(metrics['loss'], start)
  step = start + num
  line = {name: float(value.mean()) for name, value in metrics.items()}
  line['data_passes'] = float(metrics['data_passes'][-1])
  if step % settings.eval_every == 0 or step == settings.num_steps:
    line |= _evaluate(program, state)
    if not math.isfinite(line['grad_norm_sq']):
      raise DivergedError(
          f'Expected a finite gradient, got {line["grad_norm_sq"]} at step'
          f' {step}.'
      )
  seconds = progress.seconds + time.perf_counter() - begun
  return state, line, progress._replace(step=step, seconds=seconds)


_SHOWN = ('loss', 'accuracy', 'validation_accuracy', 'validation_loss')


def _next_event(step: int, settings: Settings) -> int:
  """Returns the next step at which a dispatch ends.

  It depends on `step` alone, so a resumed run has the dispatches of the
  uninterrupted one.
  """
  cadences = [settings.eval_every, settings.steps_per_dispatch]
  cadences += [settings.checkpoint_every] if settings.checkpoint_every else []
  ends = [(step // every + 1) * every for every in cadences]
  return min(settings.num_steps, *ends)


def _judge(
    progress: Progress, line: Mapping[str, float]
) -> tuple[Progress, bool]:
  """Compares the validation loss with the best one so far."""
  loss = line.get('validation_loss', line['train_loss'])
  if loss < progress.best_loss:
    return (
        progress._replace(best_step=progress.step, best_loss=loss, stale=0),
        True,
    )
  return progress._replace(stale=progress.stale + 1), False


def _evaluate(program: Program, state: Any) -> dict[str, float]:
  params = program.method.params(program.driver.get(state))
  return _floats(program.evaluate(params))


def _check_finite(losses: np.ndarray, start: int) -> None:
  bad = np.flatnonzero(~np.isfinite(losses))
  if bad.size:
    raise DivergedError(
        f'Expected a finite loss, got {losses[bad[0]]} at step'
        f' {start + int(bad[0])}: lower the learning rate; the last good'
        ' checkpoint is kept.'
    )


def _save(
    saver: checkpoint.Checkpointer, state: Any, best: Any, progress: Progress
) -> None:
  if not all(
      bool(jnp.all(jnp.isfinite(leaf)))
      for leaf in jax.tree.leaves(state)
      if jnp.issubdtype(leaf.dtype, jnp.floating)
  ):
    raise DivergedError(
        f'Expected finite parameters, got others at step {progress.step}; the'
        ' last good checkpoint is kept.'
    )
  numbers = {k: np.asarray(v) for k, v in progress._asdict().items()}
  tree = {'method': state, 'best': best, 'progress': numbers}
  saver.save(progress.step, tree)


def _restore(
    saver: checkpoint.Checkpointer, state: Any, best: Any
) -> tuple[Any, Any, Progress]:
  numbers = jax.tree.map(jnp.asarray, Progress(0, 0, 0.0, 0, 0.0)._asdict())
  tree = saver.restore({'method': state, 'best': best, 'progress': numbers})
  found = {name: value.item() for name, value in tree['progress'].items()}
  return tree['method'], tree['best'], Progress(**found)


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
  return {name: float(value) for name, value in metrics.items()}


def _peak_memory() -> int | None:
  stats = jax.devices()[0].memory_stats()
  return stats.get('peak_bytes_in_use') if stats else None


@contextlib.contextmanager
def _catch_sigterm():
  """Yields a list that a SIGTERM fills; the loop looks at it."""
  received: list[int] = []
  try:
    old = signal.signal(
        signal.SIGTERM, lambda number, _: received.append(number)
    )
  except ValueError:  # Not the main thread: the caller handles signals.
    yield received
    return
  try:
    yield received
  finally:
    signal.signal(signal.SIGTERM, old)
