"""The papers' linear regression (X1), one figure a claim."""

from collections.abc import Callable, Sequence
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import matplotlib.figure
import numpy as np
import tqdm

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.studies import regression
from bernoulli_lora_jax.studies import study
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import bounds
from bernoulli_lora_jax.training import figures

FACTORS = tuple(2.0**i for i in range(-7, 3))  # gamma = factor / L
CLAIMS = ('rank', 'prob', 'bound')
_PATIENCE = 14  # Steps times lmin after which the target counts as missed.
_TARGET = 1e-3  # Of the squared gradient norm, relative to the start.
_SHOWN = 'geometric mean and 95% interval over seeds'

Curves = regression.Curves
Run = Callable[..., Curves]  # (task, estimator, name, **arguments)


class Claim(NamedTuple):
  """What GD at 1/L shows of one claim."""

  rows: list[dict[str, Any]]
  figure: matplotlib.figure.Figure
  note: str
  curves: list[Curves]  # For the wall time.


def rates(
    size: str = 'small',
    *,
    num_passes: float = 60.0,
    num_seeds: int = 5,
    factors: Sequence[float] = FACTORS,
    rank: int = 2,
    claims: Sequence[str] = CLAIMS,
    numpy_runs: int = 0,
    progress: bool = True,
) -> study.Study:
  """Runs X1: every estimator under both RACs and Bernoulli-LoRA.

  Args:
    size: of `SIZES`.
    num_passes: budget of data passes, > 0.
    num_seeds: >= 2, for the bands.
    factors: gamma L.
    rank: r, in [1, sqrt(d)].
    claims: of `CLAIMS`.
    numpy_runs: of each program, timed as a plain NumPy loop too, the others by
      proportion; 0 for none.
    progress: whether to show a progress bar.

  Returns:
    Tables of the best stepsize a method and of the claims; figures `estimators`
    (||grad f||^2 against data passes, best stepsize a method), `variance`
    (PAGE and MVR against SGD), `rank`, `prob` and `bound`, each with its wall
    time and that of the NumPy loop.

  Raises:
    ValueError: an argument outside its range.
  """
  checks.at_least(2, seeds=num_seeds)
  checks.at_least(0, numpy=numpy_runs)
  if not factors or not all(0 < factor < math.inf for factor in factors):
    raise ValueError(f'Expected factors > 0, got factors={list(factors)}.')
  checks.positive(passes=num_passes)
  checks.one_of(regression.SIZES, size=size)
  if set(claims) - set(CLAIMS):
    raise ValueError(f'Expected claims among {CLAIMS}, got claims={claims}.')
  side = math.isqrt(regression.SIZES[size].dim)
  checks.within(f'[1, {side}]', rank=rank)
  with jax.enable_x64(True):
    return _rates(
        size,
        num_passes,
        num_seeds,
        factors,
        rank,
        claims,
        numpy_runs,
        progress,
    )


def _rates(
    size: str,
    num_passes: float,
    num_seeds: int,
    factors: Sequence[float],
    rank: int,
    claims: Sequence[str],
    numpy_runs: int,
    progress: bool,
) -> study.Study:
  """Returns `rates` of arguments that are valid, in the current precision."""
  problem, task, wide = regression.make_tasks(size)
  run = functools.partial(regression.run, problem, numpy_runs=numpy_runs)
  timing = lambda curves: str(regression.timing(curves, numpy_runs))
  num_evals = 60 if size != 'smoke' else 4
  curves, rows = {}, []
  cells = list(itertools.product(regression.ESTIMATORS, regression.NAMES))
  for estimator, name in tqdm.tqdm(cells, unit='method', disable=not progress):
    arguments: dict[str, Any] = {
        'factors': factors,
        'num_seeds': num_seeds,
        'num_steps': regression.num_steps_of(
            task, estimator, num_passes, num_evals
        ),
        'num_evals': num_evals,
        'rank': rank,
    }
    found = run(task, estimator, name, **arguments)
    best = _best(found)
    mean, half = _log_interval(found.norms[:, best, -1])
    curves[estimator, name] = found, best
    row: dict[str, Any] = {
        'estimator': estimator.upper(),
        'method': regression.NAMES[name],
        'best stepsize': _stepsize(factors[best]),
        'start': float(found.norms[0, 0, 0]),
        'end': math.exp(mean),
        'x/ 95%': math.exp(half),
        'stepsizes that diverged': f'{_diverged(found)} of {len(factors)}',
        'compile, s': found.compile_seconds,
        'all runs, s': found.seconds,
    }
    if numpy_runs:
      row['NumPy loop, s'] = found.numpy_seconds
    rows.append(row)
  of_all = timing([found for found, _ in curves.values()])
  of_one = timing([curves[e, 'bernoulli'][0] for e in regression.ESTIMATORS])
  drawn = {
      'estimators': _figure_estimators(curves, factors, of_all),
      'variance': _figure_variance(curves, factors, of_one),
  }
  tables = {'best stepsize a method': rows}
  notes = [
      f'd = {len(problem.start)}, N = {task.num_samples}, batch'
      f' {task.batch_size}, rank {rank}, {num_seeds} seeds; the targets are'
      ' mostly noise (effective_rank), and shifting X to mean 1 adds a rank-one'
      ' spike to the Hessian.',
      'The best stepsize is the one whose seeds end lowest, and its interval is of'
      ' the same seeds. Start and end are squared gradient norms, the end a'
      ' geometric mean over seeds and the factor of its 95% interval. Wall time:'
      f' {of_all}.',
  ]
  side = round(len(problem.start) ** 0.5)
  makers = {
      'rank': lambda: _claim_rank(run, task, side, num_seeds),
      'prob': lambda: _claim_prob(
          run, wide, regression.SIZES[size].wide, rank, num_seeds
      ),
      'bound': lambda: _claim_bound(run, task, side, rank, num_seeds),
  }
  for claim in tqdm.tqdm(claims, unit='claim', disable=not progress):
    found = makers[claim]()
    took = timing(found.curves)
    _sign(found.figure, took)
    tables[claim], drawn[claim] = found.rows, found.figure
    notes.append(f'{found.note} Wall time: {took}.')
  notes.append(_variance_note(curves))
  ends = {factors[best] for _, best in curves.values()} & {
      min(factors),
      max(factors),
  }
  if ends:
    notes.append(
        'A best stepsize at the end of the grid, '
        + ', '.join(_stepsize(end) for end in sorted(ends))
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


def _geometric(values: np.ndarray) -> tuple[np.ndarray, ...]:
  """Returns the geometric mean over axis 0 and the ends of its 95% interval."""
  mean, half = _log_interval(values)
  return np.exp(mean), np.exp(mean - half), np.exp(mean + half)


def _arithmetic(values: np.ndarray) -> tuple[np.ndarray, ...]:
  """Returns the mean over axis 0 and the ends of its 95% interval."""
  mean, half = figures.mean_interval(values)
  return mean, mean - half, mean + half


def _band(
    panel: Any, x: Any, ends: tuple[np.ndarray, ...], label: str, i: int
) -> None:
  """Draws a mean with the ends of its interval."""
  mean, low, high = ends
  look = figures.style(i)
  panel.plot(x, mean, label=label, markersize=4, markevery=0.12, **look)
  panel.fill_between(x, low, high, alpha=0.2, linewidth=0, color=look['color'])


def _stepsize(factor: float) -> str:
  """Returns the stepsize as a label, 2^k/L where that is what it is."""
  power = math.log2(factor)
  return f'2^{power:g}/L' if power.is_integer() else f'{factor:g}/L'


def _sign(figure: matplotlib.figure.Figure, timing: str) -> None:
  """Puts the wall times below a figure."""
  figure.supxlabel(timing, fontsize=8, x=0.99, ha='right')


def _guide() -> dict[str, Any]:
  """Returns the look of a line that theory draws."""
  return figures.style(1) | {'marker': ''}


def _finish(panel: Any, xlabel: str, ylabel: str = '') -> None:
  panel.set_xlabel(xlabel)
  panel.set_ylabel(ylabel)
  figures.grid(panel)
  panel.legend(fontsize=8)


def _figure_estimators(
    curves: dict[Any, tuple[Curves, int]],
    factors: Sequence[float],
    timing: str,
) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(13, 4), layout='constrained')
  panels = figure.subplots(1, len(regression.ESTIMATORS))
  for panel, estimator in zip(panels, regression.ESTIMATORS, strict=True):
    for i, name in enumerate(regression.NAMES):
      found, best = curves[estimator, name]
      label = f'{regression.NAMES[name]}, {_stepsize(factors[best])}'
      ends = _geometric(found.norms[:, best])
      _band(panel, found.passes.mean(0), ends, label, i)
    panel.set_yscale('log')
    panel.set_title(estimator.upper())
    _finish(panel, 'data passes')
  panels[0].set_ylabel('squared gradient norm')
  figure.suptitle(f'Best stepsize a method; {_SHOWN}', fontsize=10)
  _sign(figure, timing)
  return figure


def _figure_variance(
    curves: dict[Any, tuple[Curves, int]],
    factors: Sequence[float],
    timing: str,
) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout='constrained')
  panel = figure.subplots()
  for i, estimator in enumerate(regression.ESTIMATORS):
    found, best = curves[estimator, 'bernoulli']
    label = f'{estimator.upper()}, {_stepsize(factors[best])}'
    ends = _geometric(found.norms[:, best])
    _band(panel, found.passes.mean(0), ends, label, i)
  panel.set_yscale('log')
  panel.set_title(f'Bernoulli-LoRA; {_SHOWN}', fontsize=10)
  _finish(panel, 'data passes', 'squared gradient norm')
  _sign(figure, timing)
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
    run: Run, task: task_lib.Task, side: int, num_seeds: int
) -> Claim:
  """Steps of GD at 1/L to the target are proportional to 1/r (T1)."""
  ranks = [2**i for i in range(int(math.log2(side)) + 1)]
  rows, steps, done = [], [], []
  for rank in ranks:
    num = math.ceil(_PATIENCE * side / rank)
    arguments: dict[str, Any] = {
        'factors': (1.0,),
        'num_seeds': num_seeds,
        'num_steps': num,
        'num_evals': num,
        'rank': rank,
    }
    done.append(run(task, 'gd', 'bernoulli', **arguments))
    steps.append(_steps_to_target(done[-1])[:, 0])
    mean, half = figures.mean_interval(steps[-1])
    rows.append(
        {
            'rank': rank,
            'lmin': rank / side,
            'steps to 1e-3': float(mean),
            '+- 95%': float(half),
            'steps x lmin': mean * rank / side,
            'seeds that missed it': int(np.isnan(steps[-1]).sum()),
        }
    )
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
  panel.set_xticks(ranks, [str(rank) for rank in ranks])
  panel.set_yscale('log')
  panel.set_title('Bernoulli-LoRA, GD, gamma = 1/L', fontsize=10)
  _finish(panel, 'rank r', 'steps to 1e-3 of the squared gradient norm')
  note = _rank_note(ranks, np.stack(steps), side)
  return Claim(rows, figure, note, done)


def _rank_note(ranks: Sequence[int], steps: np.ndarray, side: int) -> str:
  """Returns what (ranks, seeds) steps to the target say of 1/r.

  The exponent is fitted for each seed to ranks up to a quarter of the side: near
  it the few steps fall faster, as log(1 - lmin) is no longer -lmin.
  """
  used = [
      i
      for i, rank in enumerate(ranks)
      if rank <= max(side / 4, 2) and not np.isnan(steps[i]).any()
  ]
  missed = np.asarray(ranks)[np.isnan(steps).any(1)].tolist()
  text = f'Some seeds missed the target at ranks {missed}. ' if missed else ''
  if len(used) < 2:
    return f'{text}Steps against r: fewer than two ranks to fit.'
  chosen = np.asarray(ranks)[used]
  slopes = np.polyfit(np.log(chosen), np.log(steps[used]), 1)[0]
  mean, error = slopes.mean(), slopes.std(ddof=1) / math.sqrt(len(slopes))
  away = abs(mean + 1) / error if error > 0 else math.inf
  return (
      f'{text}Steps against r, in the bound r^-1: for ranks {chosen[0]} to'
      f' {chosen[-1]} of {side} steps to the target fall as'
      f' r^({mean:.3f} +- {error:.3f}) (standard error), {away:.1f} standard errors'
      ' from -1.'
  )


def _claim_prob(
    run: Run,
    task: task_lib.Task,
    shape: tuple[int, int],
    rank: int,
    num_seeds: int,
) -> Claim:
  """Steps of GD at 1/L on m x n are proportional to 1/lmin(p)."""
  m, n = shape
  rank = min(rank, m)
  probs = np.linspace(0, 1, 9)
  lmin = probs * rank / m + (1 - probs) * rank / n
  num = math.ceil(_PATIENCE / lmin.min())
  found = run(
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
          'steps to 1e-3': float(a),
          '+- 95%': float(b),
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
  scale = np.nanmean(mean * lmin)
  panels[0].plot(
      probs,
      scale / lmin,
      label='proportional to 1/lmin(p), fitted',
      **_guide(),
  )
  panels[0].set_ylim(bottom=0)
  _finish(panels[0], 'p = P(left)', f'steps to {_TARGET:g} of the squared norm')
  panels[1].errorbar(
      probs,
      mean * numbers,
      half * numbers,
      capsize=3,
      label='measured',
      **figures.style(0),
  )
  panels[1].set_ylim(bottom=0)
  _finish(panels[1], 'p = P(left)', f'trained numbers to {_TARGET:g}')
  figure.suptitle(
      f'W in R^({m} x {n}), rank {rank}, GD, gamma = 1/L', fontsize=10
  )
  complete = ~np.isnan(steps).any(0)
  note = f'p when m != n ({m} x {n}): '
  if not complete.all():
    note += (
        f'some seeds missed the target at p in {probs[~complete].tolist()}; '
    )
  if complete.any():
    first, last = np.flatnonzero(complete)[[0, -1]]
    scaled = (mean * lmin)[complete]
    note += (
        f'steps go from {mean[first]:.0f} at p = {probs[first]:g} to'
        f' {mean[last]:.0f} at p = {probs[last]:g}, lmin from {lmin[first]:.3g} to'
        f' {lmin[last]:.3g}; steps x lmin stays within [{scaled.min():.3g},'
        f' {scaled.max():.3g}]; in trained numbers'
        f' {mean[first] * numbers[first]:,.0f} against'
        f' {mean[last] * numbers[last]:,.0f}.'
    )
  return Claim(rows, figure, note, [found])


def _claim_bound(
    run: Run,
    task: task_lib.Task,
    side: int,
    rank: int,
    num_seeds: int,
) -> Claim:
  """The mean of ||grad||^2 over the steps against T1, every constant known."""
  num = math.ceil(_PATIENCE * side / rank)
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
  rows, held, done = [], [], []
  for i, name in enumerate(regression.NAMES):
    found = run(
        task,
        'gd',
        name,
        factors=(1.0,),
        num_seeds=num_seeds,
        num_steps=num,
        num_evals=num,
        rank=rank,
    )
    done.append(found)
    means = np.cumsum(found.norms[:, 0, :-1], axis=1) / steps
    _band(panel, steps, _arithmetic(means), regression.NAMES[name], i)
    held.append(bool(np.all(means.mean(0) <= bound)))
    rows.append(
        {
            'method': regression.NAMES[name],
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
  panel.set_title(f'GD, gamma = 1/L, D0 = f(W_0), rank {rank}', fontsize=10)
  _finish(panel, 'steps T', 'mean squared gradient norm over T steps')
  note = 'T1 with known constants ' + (
      'held at every step of every method.'
      if all(held)
      else 'was VIOLATED by the mean over seeds: see the table.'
  )
  return Claim(rows, figure, note, done)
