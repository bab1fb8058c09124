"""The papers' linear regression (X1), one figure a claim.

Runs of one method that differ in stepsize and seed are one compiled program:
seeds are mapped (of GD vmapped), stepsizes vmapped with the seed's draws shared, so
that PAGE's coin stays a branch, and a minibatch is gathered once for all stepsizes.
"""

from collections.abc import Sequence
import itertools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import tqdm

from bernoulli_lora_jax.studies import numpy_chain
from bernoulli_lora_jax.studies import study
from bernoulli_lora_jax.tasks import linear_regression
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import bounds
from bernoulli_lora_jax.training import figures
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import methods

FACTORS = tuple(2.0**i for i in range(-7, 3))  # gamma = factor / L
ESTIMATORS = ('gd', 'sgd', 'page', 'mvr')
NAMES = {
    'rac_left': 'RAC-LoRA left',
    'rac_right': 'RAC-LoRA right',
    'bernoulli': 'Bernoulli-LoRA',
}
CLAIMS = ('rank', 'prob', 'bound')
MOMENTUM = 0.9  # 1 - b of MVR.
_PATIENCE = 14  # Steps times lmin after which the target counts as missed.
_TARGET = 1e-3  # Of the squared gradient norm, relative to the start.


class Size(NamedTuple):
  """How large X1 is."""

  dim: int  # d, a square.
  num_pretraining: int
  num_samples: int  # N
  batch_size: int
  wide: tuple[int, int]  # (m, n) of the rectangular variant, m n = d.


SIZES = {
    'paper': Size(4096, 90_000, 10_000, 100, (32, 128)),
    'small': Size(256, 9_000, 1_000, 10, (8, 32)),
    'smoke': Size(16, 50, 40, 4, (2, 8)),
}


class Curves(NamedTuple):
  """Runs of one method over seeds and stepsizes."""

  passes: np.ndarray  # (seeds, evaluations), data passes so far.
  norms: np.ndarray  # (seeds, factors, evaluations), ||grad f||^2.
  compile_seconds: float
  seconds: float  # Without compilation.


def train(
    task: task_lib.Task,
    estimator: str,
    name: str,
    *,
    factors: Sequence[float],
    num_seeds: int,
    num_steps: int,
    num_evals: int,
    rank: int,
    prob: float | Sequence[float] = 0.5,
) -> Curves:
  """Trains all seeds and stepsizes of a method in one program.

  Args:
    task: that knows its L.
    estimator: 'gd', 'sgd', 'page' or 'mvr'.
    name: 'rac_left', 'rac_right' or 'bernoulli'.
    factors: gamma L of the runs.
    num_seeds: of coins, subspaces and minibatches.
    num_steps: T, a multiple of num_evals.
    num_evals: evaluations after the first.
    rank: r.
    prob: P(left) of 'bernoulli'; a sequence is zipped with the factors.

  Returns:
    `Curves` with num_evals + 1 evaluations, the first at W_0.
  """
  if num_steps % num_evals:
    raise ValueError(
        f'Expected num_evals={num_evals} to divide num_steps={num_steps}.'
    )
  if task.smoothness is None:
    raise ValueError(f'Expected a task that knows L, got {task.name}.')
  rates = jnp.asarray(factors) / task.smoothness
  probs = prob
  if not isinstance(prob, (int, float)):
    probs = jnp.asarray(prob)

  def one(key, rate, p, data):
    method = methods.gradient_method(
        task.loss,
        methods.make_transformation(name, rate, rank=rank, prob=p),
        estimator=estimator,
        num_samples=task.num_samples,
        batch_size=task.batch_size,
        momentum=MOMENTUM,
    )
    steps = loop.make_steps(task, method)
    every = num_steps // num_evals

    def measure(state):
      grad = jax.grad(lambda p: task.loss(p, data['train'], None)[0])
      squares = jax.tree.map(lambda g: jnp.vdot(g, g), grad(state.params))
      return sum(jax.tree.leaves(squares)), state.data_passes

    def body(state, i):
      state, _ = steps(state, data, key, i * every, every)
      return state, measure(state)

    start = loop.make_start(task, method)(key)
    _, rest = jax.lax.scan(body, start, jnp.arange(num_evals))
    return jax.tree.map(
        lambda a, b: jnp.concatenate([a[None], b]), measure(start), rest
    )

  axis = 0 if isinstance(probs, jax.Array) else None
  of_seed = lambda key, data: jax.vmap(one, (None, 0, axis, None), (0, 0))(
      key, rates, probs, data
  )
  # Seeds of GD share the reading of X; others would each gather a minibatch at
  # once, and PAGE's coin would become a select.
  if estimator == 'gd':
    whole = jax.jit(jax.vmap(of_seed, (0, None)))
  else:
    whole = jax.jit(
        lambda keys, data: jax.lax.map(lambda key: of_seed(key, data), keys)
    )
  keys = jnp.stack([jax.random.key(i) for i in range(num_seeds)])
  begun = time.perf_counter()
  compiled = whole.lower(keys, task.data).compile()
  middle = time.perf_counter()
  norms, passes = jax.block_until_ready(compiled(keys, task.data))
  ended = time.perf_counter()
  return Curves(
      np.asarray(passes)[:, 0],
      np.asarray(norms),
      middle - begun,
      ended - middle,
  )


def train_numpy(
    problem: linear_regression.Problem,
    task: task_lib.Task,
    estimator: str,
    name: str,
    *,
    factors: Sequence[float],
    num_seeds: int,
    num_steps: int,
    num_evals: int,
    rank: int,
) -> float:
  """Does the work of `train` as a plain NumPy loop; returns its seconds."""
  x, y, b = problem.x, problem.y, task.batch_size
  side = round(len(problem.start) ** 0.5)
  prob = {'rac_left': 1.0, 'rac_right': 0.0}.get(name, 0.5)
  q, every = b / (b + len(y)), num_steps // num_evals
  begun = time.perf_counter()
  for seed, factor in itertools.product(range(num_seeds), factors):
    rng = np.random.default_rng(seed)

    def each(step, w):
      if step % every == 0:
        grad = numpy_chain.gradient(w.ravel(), x, y, problem.regularisation)
        np.vdot(grad, grad)

    with np.errstate(all='ignore'):  # Long steps diverge.
      numpy_chain.run(
          x,
          y,
          problem.regularisation,
          problem.start.reshape(side, side),
          estimator=estimator,
          stepsize=factor / problem.smoothness,
          steps=numpy_chain.draws(rng, (side, side), rank, prob),
          batches=(rng.integers(0, len(y), b) for _ in itertools.count()),
          coins=(bool(rng.random() < q) for _ in itertools.count()),
          num_steps=num_steps,
          momentum=MOMENTUM,
          each=each,
      )
  return time.perf_counter() - begun


def num_steps_of(
    task: task_lib.Task, estimator: str, num_passes: float, num_evals: int
) -> int:
  """Returns the steps that a budget of data passes takes, whole evaluations."""
  part = task.batch_size / task.num_samples
  prob = task.batch_size / (task.batch_size + task.num_samples)
  cost = {
      'gd': 1.0,
      'sgd': part,
      'page': prob + (1 - prob) * 2 * part,
      'mvr': 2 * part,
  }[estimator]
  return max(1, round(num_passes / cost / num_evals)) * num_evals


def make_tasks(
    size: str,
) -> tuple[linear_regression.Problem, task_lib.Task, task_lib.Task]:
  """Returns the problem of X1 at a size, its square task and its wide one."""
  if size not in SIZES:
    raise ValueError(f'Expected size in {tuple(SIZES)}, got size={size!r}.')
  s = SIZES[size]
  problem = linear_regression.make_problem(
      dim=s.dim, num_pretraining=s.num_pretraining, num_samples=s.num_samples
  )
  make = lambda shape: linear_regression.make_task(
      problem, batch_size=s.batch_size, shape=shape
  )
  return problem, make(None), make(s.wide)


def rates(
    size: str = 'small',
    *,
    num_passes: float = 60.0,
    num_seeds: int = 5,
    factors: Sequence[float] = FACTORS,
    rank: int = 2,
    claims: Sequence[str] = CLAIMS,
    compare_numpy: bool = False,
    progress: bool = True,
) -> study.Study:
  """Runs X1: every estimator under both RACs and Bernoulli-LoRA.

  Args:
    size: of `SIZES`.
    num_passes: budget of data passes, > 0.
    num_seeds: >= 2, for the bands.
    factors: gamma L.
    rank: r, in [1, sqrt(d)].
    claims: of `CLAIMS`; at full size they take longer than all the rest.
    compare_numpy: whether the same work is timed as a NumPy loop.
    progress: whether to show a progress bar.

  Returns:
    Tables of the best factor a method and of the claims; figures `estimators`
    (||grad f||^2 against data passes, best factor a method), `variance`
    (PAGE and MVR against SGD), `rank`, `prob` and `bound`.

  Raises:
    ValueError: an argument outside its range.
  """
  if num_seeds < 2:
    raise ValueError(f'Expected seeds >= 2, got seeds={num_seeds}.')
  if not 0 < num_passes < math.inf:
    raise ValueError(f'Expected passes > 0, got passes={num_passes}.')
  if size not in SIZES:
    raise ValueError(f'Expected size in {tuple(SIZES)}, got size={size!r}.')
  if set(claims) - set(CLAIMS):
    raise ValueError(f'Expected claims among {CLAIMS}, got claims={claims}.')
  side = math.isqrt(SIZES[size].dim)
  if not 1 <= rank <= side:
    raise ValueError(f'Expected rank in [1, {side}], got rank={rank}.')
  with jax.enable_x64(True):
    return _rates(
        size,
        num_passes,
        num_seeds,
        factors,
        rank,
        claims,
        compare_numpy,
        progress,
    )


def _rates(
    size: str,
    num_passes: float,
    num_seeds: int,
    factors: Sequence[float],
    rank: int,
    claims: Sequence[str],
    compare_numpy: bool,
    progress: bool,
) -> study.Study:
  """Returns `rates` of arguments that are valid, in the current precision."""
  problem, task, wide = make_tasks(size)
  num_evals = 60 if size != 'smoke' else 4
  curves, rows = {}, []
  cells = list(itertools.product(ESTIMATORS, NAMES))
  for estimator, name in tqdm.tqdm(cells, unit='method', disable=not progress):
    arguments: dict[str, Any] = {
        'factors': factors,
        'num_seeds': num_seeds,
        'num_steps': num_steps_of(task, estimator, num_passes, num_evals),
        'num_evals': num_evals,
        'rank': rank,
    }
    found = train(task, estimator, name, **arguments)
    best = _best(found)
    curves[estimator, name] = found, best
    row = {
        'estimator': estimator.upper(),
        'method': NAMES[name],
        'best factor': f'2^{math.log2(factors[best]):g}',
        'start': float(found.norms[0, 0, 0]),
        'squared gradient norm at the end': _interval(found.norms[:, best, -1]),
        'diverged': f'{_diverged(found)} of {len(factors)}',
        'compile, s': found.compile_seconds,
        'all runs, s': found.seconds,
    }
    if compare_numpy:
      row['NumPy loop, s'] = train_numpy(
          problem, task, estimator, name, **arguments
      )
    rows.append(row)
  timing = _timing(rows)
  drawn = {
      'estimators': _figure_estimators(curves, factors, timing),
      'variance': _figure_variance(curves, factors, timing),
  }
  tables = {'best factor a method': rows}
  notes = [
      f'd = {len(problem.start)}, N = {task.num_samples}, batch'
      f' {task.batch_size}, rank {rank}, {num_seeds} seeds; the targets are'
      ' mostly noise (effective_rank), and shifting X to mean 1 adds a rank-one'
      ' spike to the Hessian.',
      timing,
  ]
  side = round(len(problem.start) ** 0.5)
  makers = {
      'rank': lambda: _claim_rank(
          task, side, num_seeds, compare_numpy, problem
      ),
      'prob': lambda: _claim_prob(wide, SIZES[size].wide, rank, num_seeds),
      'bound': lambda: _claim_bound(task, side, rank, num_seeds, num_passes),
  }
  for claim in claims:
    table, figure, note = makers[claim]()
    tables[claim], drawn[claim] = table, figure
    notes.append(note)
  notes.append(_variance_note(curves))
  ends = {factors[best] for _, best in curves.values()} & {
      min(factors),
      max(factors),
  }
  if ends:
    notes.append(
        'A best factor at the end of the grid, '
        + ', '.join(f'2^{math.log2(end):g}' for end in sorted(ends))
        + ': the true best may lie beyond.'
    )
  return study.Study(tables, drawn, notes)


def _best(found: Curves) -> int:
  """Returns the factor of the least geometric mean at the end."""
  last = found.norms[:, :, -1]
  with np.errstate(all='ignore'):
    means = np.where(np.isfinite(last).all(0), np.log(last).mean(0), np.inf)
  return int(np.argmin(means))


def _diverged(found: Curves) -> int:
  """Returns the factors of which some seed ends above its start."""
  last, first = found.norms[:, :, -1], found.norms[:, :, 0]
  return int(np.sum(~np.all(last < first, axis=0)))


def _log_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and half of the 95% interval of the logarithms, over axis 0."""
  return figures.mean_interval(np.log(np.maximum(values, 1e-300)))


def _interval(values: np.ndarray) -> str:
  mean, half = _log_interval(values)
  return f'{np.exp(mean):.3g} x/ {np.exp(half):.3g}'


def _timing(rows: Sequence[dict[str, Any]]) -> str:
  ours = sum(row['all runs, s'] for row in rows)
  compiling = sum(row['compile, s'] for row in rows)
  text = f'library {ours:.0f} s and {compiling:.0f} s of compilation'
  if 'NumPy loop, s' in rows[0]:
    theirs = sum(row['NumPy loop, s'] for row in rows)
    text += f', NumPy loop {theirs:.0f} s on the same work'
  return text


def _band(panel: Any, x: Any, values: np.ndarray, label: str, i: int) -> None:
  """Draws the geometric mean over axis 0 with its 95% interval."""
  mean, half = _log_interval(values)
  look = figures.style(i)
  panel.plot(x, np.exp(mean), label=label, markersize=4, markevery=0.12, **look)
  panel.fill_between(
      x,
      np.exp(mean - half),
      np.exp(mean + half),
      alpha=0.2,
      linewidth=0,
      color=look['color'],
  )


def _guide() -> dict[str, Any]:
  """Returns the look of a line that theory draws."""
  return figures.style(1) | {'marker': ''}


def _finish(panel: Any, xlabel: str, ylabel: str = '') -> None:
  panel.set_xlabel(xlabel)
  panel.set_ylabel(ylabel)
  panel.grid(True, which='major', linewidth=0.4, alpha=0.6)
  panel.legend(fontsize=8)


def _figure_estimators(
    curves: dict[Any, tuple[Curves, int]],
    factors: Sequence[float],
    timing: str,
) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(13, 4), layout='constrained')
  panels = figure.subplots(1, len(ESTIMATORS), sharey=True)
  for panel, estimator in zip(panels, ESTIMATORS, strict=True):
    for i, name in enumerate(NAMES):
      found, best = curves[estimator, name]
      label = f'{NAMES[name]}, 2^{math.log2(factors[best]):g}/L'
      _band(panel, found.passes.mean(0), found.norms[:, best], label, i)
    panel.set_yscale('log')
    panel.set_title(estimator.upper())
    _finish(panel, 'data passes')
  panels[0].set_ylabel('squared gradient norm')
  figure.suptitle(
      f'Best stepsize a method; mean and 95% interval over seeds; {timing}',
      fontsize=10,
  )
  return figure


def _figure_variance(
    curves: dict[Any, tuple[Curves, int]],
    factors: Sequence[float],
    timing: str,
) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout='constrained')
  panel = figure.subplots()
  for i, estimator in enumerate(ESTIMATORS):
    found, best = curves[estimator, 'bernoulli']
    label = f'{estimator.upper()}, 2^{math.log2(factors[best]):g}/L'
    _band(panel, found.passes.mean(0), found.norms[:, best], label, i)
  panel.set_yscale('log')
  panel.set_title(f'Bernoulli-LoRA; {timing}', fontsize=10)
  _finish(panel, 'data passes', 'squared gradient norm')
  return figure


def _variance_note(curves: dict[Any, tuple[Curves, int]]) -> str:
  ends = {}
  for estimator in ('sgd', 'page', 'mvr'):
    found, best = curves[estimator, 'bernoulli']
    ends[estimator] = np.log(found.norms[:, best, -1])
  parts = []
  for estimator in ('page', 'mvr'):
    ratio = ends[estimator] - ends['sgd']
    mean, error = ratio.mean(), ratio.std(ddof=1) / math.sqrt(len(ratio))
    parts.append(
        f'{estimator.upper()} ends at {math.exp(mean):.3g} (x/'
        f' {math.exp(error):.3g}, one standard error) times SGD'
    )
  return f'PAGE and MVR against SGD, Bernoulli-LoRA: {"; ".join(parts)}.'


def _steps_to_target(found: Curves) -> np.ndarray:
  """Returns (seeds, factors), steps to the target; NaN where it is not met.

  For GD with an evaluation a step, interpolated in the logarithm.
  """
  relative = found.norms / found.norms[:, :, :1]
  result = np.full(relative.shape[:2], np.nan)
  for seed, factor in np.ndindex(*result.shape):
    row = relative[seed, factor]
    below = np.flatnonzero(row <= _TARGET)
    if below.size:
      j = int(below[0])
      low, high = np.log(row[j - 1]), np.log(row[j])
      result[seed, factor] = j - 1 + (low - math.log(_TARGET)) / (low - high)
  return result


def _claim_rank(
    task: task_lib.Task,
    side: int,
    num_seeds: int,
    compare_numpy: bool,
    problem: linear_regression.Problem,
) -> tuple[list[dict[str, Any]], matplotlib.figure.Figure, str]:
  """Steps of GD at 1/L to the target are proportional to 1/r (T1)."""
  ranks = [2**i for i in range(int(math.log2(side)) + 1)]
  rows, steps, total, theirs = [], [], 0.0, 0.0
  for rank in ranks:
    num = math.ceil(_PATIENCE * side / rank)
    arguments: dict[str, Any] = {
        'factors': (1.0,),
        'num_seeds': num_seeds,
        'num_steps': num,
        'num_evals': num,
        'rank': rank,
    }
    found = train(task, 'gd', 'bernoulli', **arguments)
    total += found.seconds + found.compile_seconds
    if compare_numpy:
      theirs += train_numpy(problem, task, 'gd', 'bernoulli', **arguments)
    steps.append(_steps_to_target(found)[:, 0])
    mean, half = figures.mean_interval(steps[-1])
    rows.append(
        {
            'rank': rank,
            'lmin': rank / side,
            'steps to 1e-3': f'{mean:.4g} +- {half:.2g}',
            'steps x lmin': mean * rank / side,
            'seeds that missed it': int(np.isnan(steps[-1]).sum()),
        }
    )
  # The exponent of r for each seed, and its spread; near r = side the few steps
  # fall faster, as log(1 - lmin) is no longer -lmin.
  small = max(2, sum(rank <= side / 4 for rank in ranks))
  logs = np.log(np.stack(steps))  # (ranks, seeds)
  slopes = np.polyfit(np.log(ranks[:small]), logs[:small], 1)[0]
  error = slopes.std(ddof=1) / math.sqrt(num_seeds)
  figure = matplotlib.figure.Figure(figsize=(6, 4), layout='constrained')
  panel = figure.subplots()
  mean, half = figures.mean_interval(np.stack(steps, axis=1))
  panel.errorbar(
      ranks, mean, half, capsize=3, label='measured', **figures.style(0)
  )
  panel.plot(
      ranks,
      mean[0] / np.asarray(ranks),
      label='1/r through the first',
      **_guide(),
  )
  panel.set_xscale('log', base=2)
  panel.set_yscale('log')
  timing = f'library {total:.0f} s' + (
      f', NumPy loop {theirs:.0f} s' if compare_numpy else ''
  )
  panel.set_title(f'Bernoulli-LoRA, GD, gamma = 1/L; {timing}', fontsize=10)
  _finish(panel, 'rank r', 'steps to 1e-3 of the squared gradient norm')
  note = (
      f'Linear in r: for r <= {ranks[small - 1]} of {side} steps to the target fall'
      f" as r^({slopes.mean():.3f} +- {error:.3f}) (standard error); the bound's"
      ' is -1, and above these ranks log(1 - lmin) is better than linear.'
  )
  return rows, figure, note


def _claim_prob(
    task: task_lib.Task, shape: tuple[int, int], rank: int, num_seeds: int
) -> tuple[list[dict[str, Any]], matplotlib.figure.Figure, str]:
  """Steps of GD at 1/L on m x n are proportional to 1/lmin(p)."""
  m, n = shape
  rank = min(rank, m)
  probs = np.linspace(0, 1, 9)
  lmin = probs * rank / m + (1 - probs) * rank / n
  num = math.ceil(_PATIENCE / lmin.min())
  found = train(
      task,
      'gd',
      'bernoulli',
      factors=np.ones(len(probs)).tolist(),
      num_seeds=num_seeds,
      num_steps=num,
      num_evals=num,
      rank=rank,
      prob=probs.tolist(),
  )
  steps = _steps_to_target(found)
  mean, half = figures.mean_interval(steps)
  numbers = probs * rank * n + (1 - probs) * rank * m
  rows = [
      {
          'p': p,
          'lmin': low,
          'trained a step': number,
          'steps to 1e-3': f'{a:.4g} +- {b:.2g}',
          'steps x lmin': a * low,
          'numbers to 1e-3': a * number,
          'seeds that missed it': int(missed),
      }
      for p, low, number, a, b, missed in zip(
          probs, lmin, numbers, mean, half, np.isnan(steps).sum(0), strict=True
      )
  ]
  figure = matplotlib.figure.Figure(figsize=(10, 4), layout='constrained')
  panels = figure.subplots(1, 2)
  panels[0].errorbar(
      probs, mean, half, capsize=3, label='measured', **figures.style(0)
  )
  scale = np.mean(mean * lmin)
  panels[0].plot(
      probs,
      scale / lmin,
      label='proportional to 1/lmin(p)',
      **_guide(),
  )
  _finish(panels[0], 'p = P(left)', 'steps to 1e-3')
  panels[1].errorbar(
      probs,
      mean * numbers,
      half * numbers,
      capsize=3,
      label='measured',
      **figures.style(0),
  )
  panels[1].set_ylim(bottom=0)
  _finish(panels[1], 'p = P(left)', 'trained numbers to 1e-3')
  seconds = found.seconds + found.compile_seconds
  figure.suptitle(
      f'W in R^({m} x {n}), rank {rank}, GD, gamma = 1/L; library {seconds:.0f} s',
      fontsize=10,
  )
  low, high = (mean * lmin).min(), (mean * lmin).max()
  note = (
      f'p when m != n ({m} x {n}): steps fall from {mean[0]:.0f} at p = 0 to'
      f' {mean[-1]:.0f} at p = 1, as lmin rises {lmin[-1] / lmin[0]:.3g} times;'
      f' steps x lmin stays within [{low:.3g}, {high:.3g}]; in trained numbers'
      f' {mean[0] * numbers[0]:,.0f} against {mean[-1] * numbers[-1]:,.0f}.'
  )
  return rows, figure, note


def _claim_bound(
    task: task_lib.Task,
    side: int,
    rank: int,
    num_seeds: int,
    num_passes: float,
) -> tuple[list[dict[str, Any]], matplotlib.figure.Figure, str]:
  """The mean of ||grad||^2 over the steps against T1, every constant known."""
  num = max(1, int(num_passes))
  params = task.init(jax.random.key(0))
  gap = float(task.loss(params, task.data['train'], None)[0])  # f_inf >= 0.
  steps = np.arange(1, num + 1)
  smoothness = task.smoothness
  assert smoothness is not None
  bound = bounds.gd(
      steps,
      initial_gap=gap,
      stepsize=1 / smoothness,
      smoothness=smoothness,
      lmin=rank / side,
  )
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout='constrained')
  panel = figure.subplots()
  rows, held, seconds = [], [], 0.0
  for i, name in enumerate(NAMES):
    found = train(
        task,
        'gd',
        name,
        factors=(1.0,),
        num_seeds=num_seeds,
        num_steps=num,
        num_evals=num,
        rank=rank,
    )
    seconds += found.seconds + found.compile_seconds
    means = np.cumsum(found.norms[:, 0, :-1], axis=1) / steps
    _band(panel, steps, means, NAMES[name], i)
    held.append(bool(np.all(means.mean(0) <= bound)))
    rows.append(
        {
            'method': NAMES[name],
            'steps': num,
            'mean of the squared norm': float(means[:, -1].mean()),
            'T1': float(bound[-1]),
            'T1 / measured': float(bound[-1] / means[:, -1].mean()),
            'held at all steps': 'yes' if held[-1] else 'NO',
        }
    )
  panel.plot(
      steps, bound, label='T1: 2 D0 / (gamma lmin T)', color='0.4', linewidth=2
  )
  panel.set_xscale('log')
  panel.set_yscale('log')
  panel.set_title(
      f'GD, gamma = 1/L, D0 = f(W_0), rank {rank}; library {seconds:.0f} s',
      fontsize=10,
  )
  _finish(panel, 'steps T', 'mean squared gradient norm over T steps')
  note = 'T1 with known constants ' + (
      'held at every step of every method.'
      if all(held)
      else 'was VIOLATED by the mean over seeds: see the table.'
  )
  return rows, figure, note
