"""LoRA on a linearised network, over ranks: loss against steps, and its optima.

Few examples, balanced over the classes, in float64; `lam` is given relative to
||grad F||_2 at the pre-trained weights, from which on zero is the optimum (N1-N6).

References:
  Jang, Lee and Ryu, LoRA training in the NTK regime has no spurious local minima,
  2024, arXiv 2402.11867.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
from matplotlib import ticker
import matplotlib.figure
import numpy as np
import optax
import scipy.stats
import tqdm

from bernoulli_lora_jax.studies import few_shot
from bernoulli_lora_jax.studies import study as study_lib
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import exponents
from bernoulli_lora_jax.theory import lora
from bernoulli_lora_jax.theory import ntk
from bernoulli_lora_jax.theory import nuclear
from bernoulli_lora_jax.training import figures

_FLOOR = 1e-14  # Of gaps in figures: what is below is rounding.
_GAPS = (1e-3, 1e-6)  # Relative gaps whose first steps are reported.
_CLOSE = 1e-8  # Relative duality gap of a run that has reached the optimum.
_MOST_CURVES = 7  # Of a figure.
_STATIONARY = 1e-6  # Gradient norm, and curvature over lam, that count as zero.


def ranks(
    task: task_lib.Task,
    *,
    num_samples: int = 32,
    select: str | None = 'Dense_1/kernel',
    ranks: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 12, 15, 16, 17, 18, 24),
    num_seeds: int = 5,
    relative_lam: float = 0.01,
    optimizer: optax.GradientTransformation | None = None,
    num_steps: int = 3000,
    polish_steps: int = 400,
    seed: int = 0,
    progress: bool = True,
) -> study_lib.Study:
  """Trains LoRA of many ranks on the linearised network, from many starts.

  Args:
    task: classification, with `outputs`.
    num_samples: N of the few examples.
    select: regular expression of the matrices; None for all kernels.
    ranks: rising, in [1, shortest side].
    num_seeds: random starts a rank, >= 1.
    relative_lam: lam over the one from which on zero is optimal, in (0, 1).
    optimizer: of optax, on full gradients; None for SGD with momentum 0.9 and half
      of the largest stepsize of 2^-j with which 200 steps at the largest rank do
      not diverge.
    num_steps: of it.
    polish_steps: of L-BFGS afterwards, so that what is left is the landscape's.
    seed: of the examples and of the starts.
    progress: whether to show a bar.

  Returns:
    Table 'ranks': the objective over the optimum of N1, relative to it, after
    SGD (median of the starts) and after L-BFGS; of the worst start the gradient's
    spectral norm over lam (1 at the optimum), the norm of the factors' gradient
    and, if it is not certified, the least curvature over lam; median steps of
    SGD. Figures 'loss' and 'thresholds', notes.

  Raises:
    ValueError: an argument outside its range.
  """
  few_shot.check_sizes(
      relative_lam,
      num_seeds=num_seeds,
      num_steps=num_steps,
      polish_steps=polish_steps,
  )
  exponents.check_rising('ranks', ranks)
  with jax.enable_x64(True), tqdm.tqdm(
      total=1 + len(ranks), desc='N1, then ranks', disable=not progress
  ) as bar:
    few = few_shot.few_problem(task, num_samples, select, relative_lam, seed)
    bar.update()
    runs = _run_ranks(
        few,
        ranks,
        num_seeds,
        optimizer,
        num_steps,
        polish_steps,
        seed,
        bar.update,
    )
    rows = [_rank_row(few, run) for run in runs]
  title = f'{task.name}, N = {num_samples}, K = {few.problem.start.shape[1]}'
  return study_lib.Study(
      tables={'ranks': rows},
      figures={
          'loss': _plot_loss(runs, title),
          'thresholds': _plot_thresholds(few, runs, rows, title),
      },
      notes=_rank_notes(few, runs),
  )


class _Run(NamedTuple):
  """The starts of one rank."""

  rank: int
  gaps: np.ndarray  # (seeds, steps + 1), N2's objective over the optimum of N1.
  polished: np.ndarray  # (seeds,), after L-BFGS.
  certificate: nuclear.Certificate  # (seeds,), after L-BFGS.
  # (seeds,), least one of the Hessian after L-BFGS; nan where certified.
  curvature: np.ndarray
  slope: np.ndarray  # (seeds,), norm of N2's gradient, after L-BFGS.


def _run_ranks(
    few, ranks, num_seeds, optimizer, num_steps, polish_steps, seed, report
) -> list[_Run]:
  # Factors of all ranks are padded with columns that stay zero: one program.
  problem, lam, width = few.problem, few.lam, max(ranks)
  best = float(few.solution.certificate.value)
  keys = jax.random.split(jax.random.key(seed), num_seeds)
  starts = {
      r: jax.vmap(
          lambda key, r=r: lora.init_factors(problem, r, key, width=width)
      )(keys)
      for r in ranks
  }
  if optimizer is None:
    optimizer = _default_optimizer(problem, lam, starts[width])

  @jax.jit
  def train(problem, lam, factors):
    def one(factors):
      run = lora.train_lora(
          problem, lam, factors, optimizer, num_steps=num_steps
      )
      end = lora.train_lora(problem, lam, run.factors, num_steps=polish_steps)
      delta = lora.product(end.factors)
      slope = jax.grad(lora.make_objective(problem, lam))(end.factors)
      certificate = nuclear.certify(problem, lam, delta)
      return run.values, end, certificate, optax.tree.norm(slope)

    return jax.vmap(one)(factors)

  runs = []
  for r in ranks:
    values, end, certificate, slope = train(problem, lam, starts[r])
    reached = certificate.gap <= _CLOSE * best
    own = jax.tree.map(lambda x, r=r: x[..., :r], end.factors)
    curvature = np.full(num_seeds, np.nan)
    for i in np.flatnonzero(~np.asarray(reached)):
      factors = jax.tree.map(lambda x, i=i: x[i], own)
      found = lora.least_curvature(problem, lam, factors, keys[i])
      curvature[i] = found.low
    runs.append(
        _Run(
            rank=r,
            gaps=np.asarray(values) - best,
            polished=np.asarray(end.values[:, -1]) - best,
            certificate=jax.tree.map(np.asarray, certificate),
            curvature=curvature,
            slope=np.asarray(slope),
        )
    )
    report()
  return runs


def _default_optimizer(problem, lam, starts):
  """Returns SGD with momentum, of half the largest stable stepsize of 2^-j."""

  @jax.jit
  def values(problem, lam, rate):
    tx = optax.sgd(rate, 0.9)
    run = lambda x: lora.train_lora(problem, lam, x, tx, num_steps=200).values
    return jax.vmap(run)(starts)

  for j in range(-4, 30):
    seen = np.asarray(values(problem, lam, 2.0**-j))
    # Momentum may overshoot at first; what is stable ends below its start.
    if np.all(np.isfinite(seen)) and np.all(seen[:, 100:].max(1) < seen[:, 0]):
      return optax.sgd(2.0 ** -(j + 1), 0.9)  # Later on the curvature grows.
  raise ValueError(
      'Expected a loss on which SGD descends, got none of 2^4 to 2^-29 that does:'
      ' give an optimizer.'
  )


def _is_optimal(few, run) -> np.ndarray:
  return run.certificate.gap <= _CLOSE * few.solution.certificate.value


def _first_steps(few, run, gap) -> np.ndarray:
  """Returns the first step within the relative gap of each seed, or inf."""
  inside = run.gaps <= gap * float(few.solution.certificate.value)
  return np.where(inside.any(1), inside.argmax(1), np.inf)


def _thresholds(problem: ntk.Problem) -> dict[str, ntk.Thresholds]:
  """Returns N3's ranks by the name of their count, the least ones last."""
  num_samples, num_outputs = problem.start.shape
  found = {'KN': ntk.rank_thresholds(num_outputs, num_samples)}
  if problem.loss == ntk.LOSSES['cross_entropy']:
    found['(K-1)N'] = ntk.rank_thresholds(
        num_outputs, num_samples, 'cross_entropy'
    )
  return found


def _rank_row(few: few_shot.Few, run: _Run) -> dict[str, Any]:
  value = float(few.solution.certificate.value)
  optimal = _is_optimal(few, run)
  least = list(_thresholds(few.problem).values())[-1]
  guarantee = 'none'
  if run.rank >= least.existence:
    guarantee = 'optimum exists'
  if run.rank >= least.no_spurious:
    guarantee = 'no spurious minima'
  row = {
      'rank': run.rank,
      'r(r+1)/2': run.rank * (run.rank + 1) // 2,
      'guarantee': guarantee,
      'certified': f'{optimal.sum()} of {len(optimal)}',
      'relative gap, SGD': float(np.median(run.gaps[:, -1])) / value,
      'then L-BFGS, least': float(run.polished.min()) / value,
      'median': float(np.median(run.polished)) / value,
      'largest': float(run.polished.max()) / value,
      'spectral norm/lam': float(run.certificate.spectral_norm.max() / few.lam),
      'gradient norm': float(run.slope.max()),
      'curvature/lam': (
          float(np.nanmin(run.curvature) / few.lam) if not optimal.all() else ''
      ),
  }
  for gap in _GAPS:
    steps = float(np.median(_first_steps(few, run, gap)))
    row[f'steps to {gap:g}'] = steps
  return row


def _rank_notes(few: few_shot.Few, runs: Sequence[_Run]) -> list[str]:
  """Returns what the ends of all starts say of N1's optimum, by rank."""
  thresholds = _thresholds(few.problem)
  least = list(thresholds.values())[-1]
  listed = ', '.join(
      f'{found.existence} / {found.no_spurious} by {name} = {found.equations}'
      for name, found in thresholds.items()
  )
  certified = [run for run in runs if _is_optimal(few, run).all()]
  others = [run for run in runs if not _is_optimal(few, run).all()]
  notes = [
      f'N1 at lam = {few.lam:.4g}: value'
      f' {float(few.solution.certificate.value):.8g}, duality gap'
      f' {float(few.solution.certificate.gap):.1e}, rank {few.rank}.',
      f'Thresholds (optimum exists / no spurious minima): ranks {listed}.',
  ]
  if certified:
    notes.append(
        'All starts reached the optimum of N1, certified by a relative duality'
        f' gap of {_CLOSE:g} after L-BFGS, at ranks'
        f' {[run.rank for run in certified]}.'
    )
  late = [run.rank for run in others if run.rank >= least.no_spurious]
  if late:
    notes.append(f'At ranks {late} the claim was not met within the steps.')
  notes += [_other_note(few, run) for run in others]
  if certified and certified[0].rank < least.existence:
    notes.append(
        'The thresholds are sufficient, not necessary here: rank'
        f' {certified[0].rank} was enough, the rank of the solution being'
        f' {few.rank}.'
    )
  return notes + _speed_notes(few, certified)


def _other_note(few: few_shot.Few, run: _Run) -> str:
  """Returns what the starts that are not certified have come to."""
  value = float(few.solution.certificate.value)
  gaps = run.polished / value
  missed = ~_is_optimal(few, run)
  is_stationary = run.slope < _STATIONARY
  is_flat = np.nan_to_num(run.curvature / few.lam) > -_STATIONARY
  text = (
      f'Rank {run.rank}: {missed.sum()} of {len(missed)} starts miss it, at'
      f' relative gaps {gaps.min():.3g} to {gaps.max():.3g}'
  )
  if not np.all((is_stationary & is_flat)[missed]):
    return f'{text}; not all of these ends are minima: unfinished.'
  text += f', all stationary (below {_STATIONARY:g}) without negative curvature'
  if gaps.max() - gaps.min() > _CLOSE:
    return f'{text}: spurious minima, as other starts end lower.'
  return f'{text} and alike: perhaps the best of this rank.'


def _speed_notes(few: few_shot.Few, certified: Sequence[_Run]) -> list[str]:
  """Returns whether smaller ranks were slower, by rank correlation."""
  if len(certified) < 2:
    return []
  steps = np.stack([_first_steps(few, run, _GAPS[0]) for run in certified])
  ranks = [run.rank for run in certified]
  found = scipy.stats.spearmanr(np.repeat(ranks, steps.shape[1]), steps.ravel())
  listed = ', '.join(
      f'rank {rank}: {np.median(row):g}'
      for rank, row in zip(ranks, steps, strict=True)
  )
  if math.isnan(found.statistic) or found.pvalue > 0.05:
    claim = 'no trend is seen'
  else:
    claim = 'smaller ranks were ' + (
        'slower' if found.statistic < 0 else 'faster'
    )
  return [
      f'Median steps to a relative gap of {_GAPS[0]:g} among ranks that reach the'
      f' optimum: {listed}; rank correlation over all starts'
      f' {found.statistic:+.2f} (p = {found.pvalue:.2g}): {claim}.'
  ]


def _plot_loss(runs: Sequence[_Run], title: str) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(8.6, 4.8), layout='constrained')
  panel = figure.subplots()
  if len(runs) > _MOST_CURVES:  # More cannot be told apart.
    places = np.linspace(0, len(runs) - 1, _MOST_CURVES).round().astype(int)
    runs = [runs[i] for i in places]
  for i, run in enumerate(runs):
    steps = np.arange(run.gaps.shape[1]) + 1
    gaps = np.maximum(run.gaps, _FLOOR)
    every = max(1, len(steps) // 400)
    shown = np.unique(np.r_[steps[:50], steps[::every], steps[-1]]) - 1
    panel.plot(
        steps[shown],
        np.median(gaps, 0)[shown],
        label=f'rank {run.rank}',
        markersize=5,
        markevery=(0.02 * (i % 5), 0.12),
        linewidth=1.2,
        **figures.style(i),
    )
    panel.fill_between(
        steps[shown],
        gaps.min(0)[shown],
        gaps.max(0)[shown],
        alpha=0.15,
        linewidth=0,
        color=figures.style(i)['color'],
    )
  panel.set(
      xscale='log',
      yscale='log',
      xlabel='step + 1 (a full gradient each)',
      ylabel=f'LoRA objective - optimum of the full problem (>= {_FLOOR:g})',
      title=title,
  )
  figures.grid(panel)
  figure.legend(
      loc='outside right center',
      fontsize=9,
      title='median, band: all starts',
      title_fontsize=9,
  )
  return figure


def _plot_thresholds(
    few: few_shot.Few,
    runs: Sequence[_Run],
    rows: list[dict[str, Any]],
    title: str,
) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(10, 4.8), layout='constrained')
  left, right = figure.subplots(1, 2)
  places = [run.rank for run in runs]
  for i, (name, values) in enumerate(
      [
          ('trained', [run.gaps[:, -1] for run in runs]),
          ('then L-BFGS', [run.polished for run in runs]),
          ('duality gap, then', [run.certificate.gap for run in runs]),
      ]
  ):
    _bars(left, places, np.maximum(np.stack(values), _FLOOR), name, i)
  left.set(yscale='log', ylabel='objective - optimum, or duality gap')
  for i, gap in enumerate(_GAPS):
    steps = np.stack([_first_steps(few, run, gap) for run in runs])
    known = np.isfinite(steps).all(1)
    _bars(
        right,
        np.asarray(places)[known],
        steps[known],
        f'to a relative gap of {gap:g}',
        i,
    )
  right.set(yscale='log', ylabel='steps, where all starts arrive')
  lines = [(few.rank, '-.', 'rank of the optimum found')]
  for line, (name, found) in zip(
      ('--', ':'), _thresholds(few.problem).items(), strict=False
  ):
    lines.append((found.no_spurious, line, f'no spurious minima by {name}'))
  shown = places[:1]  # Ranks whose labels do not touch.
  for place in places:
    if place > 1.18 * shown[-1]:
      shown.append(place)
  for panel in (left, right):
    for place, line, name in lines:
      label = name if panel is left else None
      # Before its rank, so that it hides no bar: from here on.
      place = place / 1.03
      panel.axvline(place, color='0.6', linestyle=line, label=label, zorder=0)
    panel.set_xlabel('rank')
    panel.set_xscale('log', base=2)
    panel.set_xticks(shown, [str(place) for place in shown])
    panel.xaxis.set_minor_locator(ticker.NullLocator())
    figures.grid(panel)
  figure.legend(
      *left.get_legend_handles_labels(),
      loc='outside lower center',
      ncols=3,
      fontsize=8,
      title='median, bar: all starts',
      title_fontsize=8,
  )
  if right.get_legend_handles_labels()[0]:
    right.legend(fontsize=8)
  figure.suptitle(title)
  return figure


def _bars(panel, places, values, name, i):
  """Draws the median and the range of values, shape (places, seeds)."""
  if not len(values):
    return
  middle = np.median(values, 1)
  error = np.abs(np.stack([values.min(1), values.max(1)]) - middle)
  panel.errorbar(
      places, middle, error, label=name, capsize=3, **figures.style(i)
  )
