"""The training loop: many steps a dispatch, exact resume, nothing half-written."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
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

from bernoulli_lora_jax import files
from bernoulli_lora_jax import parts
from bernoulli_lora_jax import recipes
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import directory
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import metrics_log
from bernoulli_lora_jax.training import parallel

_METHOD, _BATCH, _NOISE, _INIT = range(4)  # Purposes folded into the run's key.


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
    plateau_patience: evaluations without a lower validation loss after which
      the learning rate is multiplied by `plateau_factor`; 0 never.
    plateau_factor: in (0, 1).
    eval_gradient: whether evaluations report the squared norm of the full
      gradient over trained leaves, at the cost of a data pass.
    recipe: whether an adapter-mode run writes its recipe, see `recipes`.
    progress: whether to show a progress bar.
    max_to_keep: checkpoints kept.
  """

  num_steps: int
  eval_every: int
  checkpoint_every: int = 0
  steps_per_dispatch: int = 1000
  patience: int = 0
  plateau_patience: int = 0
  plateau_factor: float = 0.1
  eval_gradient: bool = True
  recipe: bool = False
  progress: bool = True
  max_to_keep: int = 2

  def __post_init__(self):
    least = {
        'num_steps': 1,
        'eval_every': 1,
        'checkpoint_every': 0,
        'steps_per_dispatch': 1,
        'patience': 0,
        'plateau_patience': 0,
        'max_to_keep': 1,
    }
    for name, low in least.items():
      if getattr(self, name) < low:
        raise ValueError(
            f'Expected training.{name} >= {low}, got'
            f' {name}={getattr(self, name)}.'
        )
    if not 0 < self.plateau_factor < 1:
      raise ValueError(
          'Expected training.plateau_factor in (0, 1), got'
          f' plateau_factor={self.plateau_factor}.'
      )


class Progress(NamedTuple):
  """What a checkpoint holds beside the method's state."""

  step: int  # Steps done.
  best_step: int  # Step of the lowest validation loss.
  best_loss: float
  stale: int  # Evaluations since then.
  flat: int  # Evaluations since then or since the learning rate dropped.
  seconds: float  # Wall time of steps and evaluations, without compilation.


class Program(NamedTuple):
  """The compiled parts of a run, shared by runs that differ in the seed."""

  task: task_lib.Task
  method: methods.Method
  driver: parallel.Driver
  settings: Settings
  data: Any  # Where the steps read it.
  # (state, key, start, num) -> a function of the same state, key and start (and
  # of the num batches of a stream) that runs num steps: (state, metrics). Compiled
  # once for each num.
  prepare: Callable[..., Callable[..., Any]]
  start: Callable[[jax.Array], Any]  # (run's key) -> state at step 0.
  put: Callable[[Any], Any]  # (state) -> where the steps read it.
  get: Callable[[Any], Any]  # (state of the steps) -> as at the start.
  params: Callable[[Any], Any]  # (state) -> merged params, on one device.
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
  steps = make_steps(task, method)

  def prepare(state, key, start, num, batches=()):
    if num not in compiled:

      def run(state, data, key, start, batches):
        return steps(state, data, key, start, num, batches)

      compiled[num] = driver.compile(run, (state, data, key, start, batches))
    return lambda state, key, start, batches=(): compiled[num](
        state, data, key, start, batches
    )

  marks = method.per_client or (lambda state: None)
  get = lambda state: driver.get(state, marks(state))
  evaluate = make_evaluate(task, method, settings)
  jit_params = jax.jit(method.params)
  split = test_split(task)
  jit_evaluate = jax.jit(evaluate)
  jit_test = jax.jit(lambda p, data: of_split(task, p, data, split))
  jit_start = jax.jit(make_start(task, method))
  return Program(
      task,
      method,
      driver,
      settings,
      data,
      prepare,
      lambda key: jit_start(key, task.weights),
      lambda state: driver.put(state, marks(state)),
      get,
      lambda state: jit_params(get(state)),
      lambda params: jit_evaluate(params, eval_data),
      lambda params: {
          f'{split}_{name}': value
          for name, value in jit_test(params, eval_data).items()
      },
  )


def make_steps(
    task: task_lib.Task, method: methods.Method
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
  """Returns (state, data, key, start, num) -> (state, metrics of num steps).

  A further argument are the num batches of a stream, stacked.
  """

  def steps(state, data, key, start, num, batches=()):
    if task.batch is None and not jax.tree.leaves(batches):
      raise ValueError(f'Expected batches of the stream of {task.name}.')
    batch_key = jax.random.fold_in(key, _BATCH)

    def body(state, inputs):
      step, batch = inputs
      if task.batch is not None:
        batch = task.batch(data, batch_key, step)
      noise = noise_key(key, step)
      return method.step(state, batch, noise, data.get('train'))

    inputs = start + jnp.arange(num), batches
    return jax.lax.scan(body, state, inputs)

  return steps


def method_key(key: jax.Array) -> jax.Array:
  """Returns the key of the method's init, from the run's."""
  return jax.random.fold_in(key, _METHOD)


def noise_key(key: jax.Array, step: Any) -> jax.Array:
  """Returns the key of a method's step, from the run's."""
  return jax.random.fold_in(jax.random.fold_in(key, _NOISE), step)


def make_start(
    task: task_lib.Task, method: methods.Method
) -> Callable[..., Any]:
  """Returns (run's key, task.weights) -> state of the method at step 0."""

  def start(key, weights=None):
    params = make_params(task)(key, weights)
    return method.init(method_key(key), params)

  return start


def make_params(task: task_lib.Task) -> Callable[..., Any]:
  """Returns (run's key, task.weights) -> params at step 0.

  Weights are an argument: as constants of what is compiled they would be copied
  into the program.
  """

  def params(key, weights=None):
    return (
        task.init(jax.random.fold_in(key, _INIT))
        if weights is None
        else weights
    )

  return params


def test_split(task: task_lib.Task) -> str | None:
  """Returns the split that is looked at once, at the end; None without splits."""
  return 'test' if 'test' in task.data else 'train' if task.data else None


def of_split(
    task: task_lib.Task, params: Any, data: Any, split: str | None
) -> dict[str, jax.Array]:
  """Returns the metrics of a split, none where there is none."""
  if split is None:
    return {}
  return task_lib.evaluate(task, params, data, split)


def make_evaluate(
    task: task_lib.Task, method: methods.Method, settings: Settings
) -> Callable[..., dict[str, jax.Array]]:
  """Returns (params, data) -> metrics of all splits but the test split."""

  def evaluate(params, data):
    metrics: dict[str, Any] = {}
    if settings.eval_gradient:
      value = lambda p, batch: task.loss(p, batch, None)
      grad_fn = jax.value_and_grad(value, has_aux=True)
      _, grad = parts.chunked(grad_fn, task.chunk)(params, data['train'])
      squares = jax.tree.map(
          lambda moves, g: jnp.vdot(g, g) if moves else 0.0,
          method.trained(params),
          grad,
      )
      metrics['grad_norm_sq'] = sum(jax.tree.leaves(squares))
    for split in sorted(data.keys() - {'test', 'clients'}):
      for name, value in task_lib.evaluate(task, params, data, split).items():
        metrics[f'{split}_{name}'] = value
    return metrics

  return evaluate


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
    program: see `make_program`.
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
  with directory.hold(workdir):
    checkpoint.compare_config(workdir, config)
    summary = finished(workdir, program.settings.num_steps)
    checkpoint.check_config(workdir, config)
    if summary is None:
      summary = _train(program, seed, workdir, facts)
  if 'diverged' in summary:
    raise DivergedError(summary['diverged'])
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


def _train(
    program: Program,
    seed: int,
    workdir: pathlib.Path,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
  """Trains and writes the summary, of a diverged run too; returns it."""
  key = jax.random.key(seed)
  with contextlib.ExitStack() as stack:
    # First: an interrupt within a compilation would end in jax's own errors.
    terminated = stack.enter_context(_catch_signals())
    state = program.start(key)
    base = make_params(program.task)(key, program.task.weights)
    best = base if program.settings.patience else None
    progress = Progress(0, 0, math.inf, 0, 0, 0.0)
    stream = None
    if program.task.stream is not None:
      stream = program.task.stream(seed)
    saver = stack.enter_context(
        open_checkpoints(program, workdir, state, stream)
    )
    if saver.latest() is not None:
      state, best, progress = restore(saver, program, state, base)
    _check_length(workdir, progress.step, program.settings.num_steps)
    state = program.put(state)
    # Of fewer steps: the run is not finished any more.
    (workdir / 'summary.json').unlink(missing_ok=True)
    log = stack.enter_context(metrics_log.MetricsLog(workdir, progress.step))
    bar = stack.enter_context(
        tqdm.tqdm(
            total=program.settings.num_steps,
            initial=progress.step,
            unit='step',
            disable=not program.settings.progress,
        )
    )
    begun = time.perf_counter()
    try:
      state, best, progress = _run_to_end(
          program,
          key,
          state,
          best,
          progress,
          stream,
          saver,
          log,
          bar,
          terminated,
      )
    except DivergedError as e:
      spent = progress.seconds + time.perf_counter() - begun
      summary = {'diverged': str(e), 'seconds': spent, **facts}
      files.write_json(workdir / 'summary.json', summary)
      return summary
    log.close()
    if program.settings.recipe:
      _save_recipe(program, workdir, base, state)
    params = best if program.settings.patience else program.params(state)
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
    files.write_json(workdir / 'summary.json', summary)
    _end_if_terminated(terminated, 'the run is finished')
  return summary


def _run_to_end(
    program: Program,
    key: jax.Array,
    state: Any,
    best: Any,
    progress: Progress,
    stream: task_lib.Stream | None,
    saver: checkpoint.Checkpointer,
    log: metrics_log.MetricsLog,
    bar: Any,
    terminated: list[int],
) -> tuple[Any, Any, Progress]:
  """Runs dispatches, evaluations and checkpoints until the run ends."""
  settings = program.settings
  last_save = progress.step
  # After a resume, too: it compiles what `seconds` is not to hold.
  first = _evaluate(program, state)
  if progress.step == 0:
    log.write(0, first)
  while progress.step < settings.num_steps:
    if settings.patience and progress.stale >= settings.patience:
      break
    state, line, progress = _advance(program, key, state, progress, stream)
    step = progress.step
    if 'train_loss' in line:
      loss = line.get('validation_loss', line['train_loss'])
      is_best, stale, flat, drops = judge(
          loss, progress.best_loss, progress.stale, progress.flat, settings
      )
      progress = progress._replace(stale=int(stale), flat=int(flat))
      if is_best:
        progress = progress._replace(best_step=step, best_loss=loss)
      if is_best and settings.patience:
        best = jax.tree.map(
            jnp.copy, program.params(state)
        )  # State is donated.
      if drops:
        scale = state.lr_scale * settings.plateau_factor
        state = state._replace(lr_scale=scale)
    if settings.recipe and program.method.chain is not None:
      _save_link(program, log.directory, state, step)
    log.write(step, line)
    bar.update(step - bar.n)
    bar.set_postfix({k: f'{v:.4g}' for k, v in line.items() if k in _SHOWN})
    is_due = settings.checkpoint_every and not step % settings.checkpoint_every
    if is_due or terminated or step == settings.num_steps:
      _save(saver, program.get(state), best, progress)
      last_save = step
    if step < settings.num_steps:
      _end_if_terminated(terminated, f'a checkpoint of step {step} is saved')
  if last_save < progress.step:
    _save(saver, program.get(state), best, progress)
  return state, best, progress


def _advance(
    program: Program,
    key: jax.Array,
    state: Any,
    progress: Progress,
    stream: task_lib.Stream | None,
) -> tuple[Any, dict[str, float], Progress]:
  """Runs one dispatch and the evaluation that is due after it."""
  settings, start = program.settings, progress.step
  num = _next_event(start, program) - start
  batches: Any = ()
  if stream is not None:
    rows = [next(stream) for _ in range(num)]
    batches = jax.tree.map(lambda *xs: np.stack(xs), *rows)
  run = program.prepare(state, key, start, num, batches)
  begun = time.perf_counter()
  state, metrics = run(state, key, start, batches)
  metrics = {name: np.asarray(value) for name, value in metrics.items()}
  _check_finite(metrics['loss'], start)
  step = start + num
  line = {name: float(value.mean()) for name, value in metrics.items()}
  line |= {
      name: float(value[-1])
      for name, value in metrics.items()
      if name in methods.CUMULATIVE
  }
  if step % settings.eval_every == 0 or step == settings.num_steps:
    line |= _evaluate(program, state)
    for name in {'grad_norm_sq', 'train_loss'} & line.keys():
      if not math.isfinite(line[name]):
        raise DivergedError(
            f'Expected a finite {name}, got {line[name]} at step {step}.'
        )
  seconds = progress.seconds + time.perf_counter() - begun
  return state, line, progress._replace(step=step, seconds=seconds)


_SHOWN = ('loss', 'accuracy', 'validation_accuracy', 'validation_loss')


def _next_event(step: int, program: Program) -> int:
  """Returns the next step at which a dispatch ends.

  It depends on `step` alone, so a resumed run has the dispatches of the
  uninterrupted one.
  """
  settings, chain = program.settings, program.method.chain
  cadences = [settings.eval_every, settings.steps_per_dispatch]
  cadences += [settings.checkpoint_every] if settings.checkpoint_every else []
  if settings.recipe and chain is not None and chain.policy.period:
    cadences.append(chain.policy.period)
  ends = [(step // every + 1) * every for every in cadences]
  return min(settings.num_steps, *ends)


def _evaluate(program: Program, state: Any) -> dict[str, float]:
  return _floats(program.evaluate(program.params(state)))


def _save_link(
    program: Program, workdir: pathlib.Path, state: Any, step: int
) -> None:
  """Writes what a link has trained, if it ends at this step or with the run."""
  chain, num_steps = program.method.chain, program.settings.num_steps
  assert chain is not None
  period = chain.policy.period or num_steps
  if step % period and step != num_steps:
    return
  inner = program.get(state).chain
  link = recipes.trained_factors(inner, chain)
  recipes.save_link(workdir / 'recipe', (step - 1) // period, link)


def _save_recipe(
    program: Program, workdir: pathlib.Path, base: Any, state: Any
) -> None:
  """Completes the recipe of a finished run."""
  chain = program.method.chain
  if chain is None:
    raise ValueError('Expected training.recipe=False in gradient mode.')
  final = program.get(state).chain
  step = int(final.count)
  num_links = -(-step // (chain.policy.period or step))
  folder = workdir / 'recipe'
  if step != program.settings.num_steps:  # Stopped early, within a link.
    recipes.save_link(
        folder, num_links - 1, recipes.trained_factors(final, chain)
    )
  links = [recipes.load_link(folder, i) for i in range(num_links)]
  recipes.save_recipe(
      folder,
      recipes.make_recipe(base, chain, final.key, links, final),
  )


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
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  for path, leaf in leaves:
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    if is_float and not bool(jnp.all(jnp.isfinite(leaf))):
      raise DivergedError(
          'Expected finite parameters, got NaN or infinity in'
          f' {jax.tree_util.keystr(path)} at step {progress.step}; the last good'
          ' checkpoint is kept.'
      )
  saver.save(progress.step, checkpoint_tree(state, best, progress))


def save_end(
    program: Program,
    workdir: pathlib.Path,
    result: Any,
) -> None:
  """Saves the end of a run that was trained together with others, `Result`."""
  if 'diverged' in result.summary:
    return
  names = ('step', 'best_step', 'seconds')
  progress = Progress(0, 0, math.inf, 0, 0, 0.0)._replace(
      **{name: result.summary[name] for name in names}
  )
  with open_checkpoints(program, workdir, result.state) as saver:
    _save(saver, result.state, result.best, progress)


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
    stream: task_lib.Stream | None = None,
) -> checkpoint.Checkpointer:
  """Returns the checkpoints of a run of the program.

  Args:
    program: see `make_program`.
    workdir: directory of the run.
    state: at step 0, as `program.start` returns it: what the method never moves
      is not stored, but compared with it.
    stream: whose place is stored beside the state.
  """
  frozen = {}
  if program.method.frozen is not None:
    marks = {'method': program.method.frozen(state)}
    frozen = checkpoint.marked({'method': state}, marks)
  return checkpoint.Checkpointer(
      workdir, program.settings.max_to_keep, frozen, stream
  )


def restore(
    saver: checkpoint.Checkpointer, program: Program, state: Any, params: Any
) -> tuple[Any, Any, Progress]:
  """Returns state, best params (or None) and progress of the newest checkpoint.

  Args:
    saver: see `open_checkpoints`.
    program: see `make_program`.
    state: at step 0.
    params: of their shapes.
  """
  zero = Progress(0, 0, 0.0, 0, 0, 0.0)
  best = params if program.settings.patience else None
  like = jax.tree.map(jnp.asarray, checkpoint_tree(state, best, zero))
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
