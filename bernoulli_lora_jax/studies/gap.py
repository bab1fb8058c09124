"""The gap of adapted models over rank and sample size, method by method.

A linear teacher, whose population loss is known, and any task with outputs.
Six methods are run on the same draws: asymmetric LoRA with either side frozen,
LoRA, RAC chains with either side frozen and a Bernoulli chain. Power laws are
fitted to the mean gap and to the spread of single runs and set beside the
claims, sqrt(r / N) from above and 1 / sqrt(N) from below.

Reference: Kratsios et al., Sharp generalization bounds for foundation models
with asymmetric randomized low-rank adapters, arXiv 2506.14530.
"""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

import jax
from matplotlib import ticker
import matplotlib.figure
import numpy as np
import optax
import scipy.stats

from bernoulli_lora_jax.studies import study
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import exponents
from bernoulli_lora_jax.theory import generalization
from bernoulli_lora_jax.theory import problems
from bernoulli_lora_jax.training import figures

_INPUTS, _OUTPUTS = 16, 8  # Of the teacher.
_SHIFT, _NOISE = 1.0, 0.5
_CLAIMS = {'rank': 0.5, 'size': -0.5}
_SHOWN = {'rank': 'r', 'size': 'N'}


class Grid(NamedTuple):
  """Cells of a problem and how each run is trained."""

  ranks: tuple[int, ...]
  sizes: tuple[int, ...]
  num_draws: int
  num_links: int
  period: int
  tx: optax.GradientTransformation
  batch_size: int | None = None
  chunk: int = 64


TEACHER = Grid(
    ranks=(1, 2, 4, 8),
    sizes=(64, 128, 256, 512, 1024),
    num_draws=32,
    num_links=16,
    period=20,
    tx=optax.sgd(0.3),
)
TASK = Grid(
    ranks=(1, 2, 4, 8),
    sizes=(64, 128, 256, 512),
    num_draws=12,
    num_links=20,
    period=20,
    tx=optax.adam(1e-2),
    batch_size=32,
    chunk=32,
)


class _Result(NamedTuple):
  """What was measured on one problem."""

  name: str
  gaps: generalization.Gaps
  # As gaps.gap, the twins' gap, of mean zero, taken off where there is one.
  means: np.ndarray
  frozen: np.ndarray  # (methods, ranks): spread over frozen factors alone.
  fits: Mapping[str, list[exponents.Fit]]  # 'mean' and 'sd', per method.
  expected: Mapping[str, np.ndarray]  # Method to (ranks, sizes), closed form.
  num_links: int


def gap(
    task: task_lib.Task | None = None,
    *,
    teacher: Grid = TEACHER,
    on_task: Grid = TASK,
    prob: float = 0.5,
    num_test: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> study.Study:
  """Returns the gaps on the teacher and, if one is given, on a task.

  The teacher has 16 inputs and 8 outputs, a dense shift of norm 1 and noise
  0.5; it is trained by full gradients nearly to the optimum. One more line of
  cells, at the middle size, keeps one training sample for all draws and so
  shows the spread over frozen factors alone. The default sizes took
  76 seconds on two cores.

  Args:
    task: with `outputs` and a criterion, for instance MNIST.
    teacher: cells and training of the teacher; at least two ranks and sizes,
      sizes above 17, so that the closed form has a mean.
    on_task: the same of the task.
    prob: P(left) of the Bernoulli chain, in [0, 1].
    num_test: examples of the task's test split, at most.
    seed: of all draws.
    progress: whether to show bars.

  Returns:
    `Study`: the exponents; figures against the rank and against the sample size
    for each problem, one of the spread; in its appendix the fits in full, the
    spread of single runs and all cells.

  Raises:
    ValueError: what `generalization` refuses, among it a teacher's size <= 17.
  """
  methods = generalization.methods(prob)
  teacher_key, task_key, draw_key = jax.random.split(jax.random.key(seed), 3)
  drawn = problems.make_teacher(
      teacher_key, _INPUTS, _OUTPUTS, shift=_SHIFT, noise=_NOISE
  )
  left, right = list(methods)[:2]
  expected = {
      method: np.array(
          [
              [
                  problems.expected_gap(drawn, side, rank, size)
                  for size in teacher.sizes
              ]
              for rank in teacher.ranks
          ]
      )
      for method, side in ((left, 'left'), (right, 'right'))
  }
  measured = [(problems.teacher_problem(drawn), teacher, expected)]
  if task is not None:
    splits = [task.data[s] for s in ('test', 'validation') if s in task.data]
    if splits:
      num_test = min(num_test, splits[0]['index'].shape[0])
    problem = problems.task_problem(task, task_key, num_test=num_test)
    measured.append((problem, on_task, {}))
  results = [
      _measure(problem, grid, known, methods, draw_key, progress)
      for problem, grid, known in measured
  ]
  drawings = {}
  for result in results:
    for axis in ('rank', 'size'):
      drawings[f'{axis}_{result.name}'] = _curves(result, axis)
  drawings['spread'] = _spread(results)
  return study.Study(
      tables={
          'Exponents of the gap': [r for x in results for r in _told_rows(x)],
      },
      figures=drawings,
      notes=[n for result in results for n in _notes(result)] + _CAVEATS,
      appendix={
          'Fitted exponents': [r for x in results for r in _exponent_rows(x)],
          'Spread of single runs': [
              r for x in results for r in _spread_rows(x)
          ],
          'Gap of all cells': [r for x in results for r in _cell_rows(x)],
      },
  )


def _measure(
    problem: problems.Problem,
    grid: Grid,
    expected: Mapping[str, np.ndarray],
    methods: Mapping[str, generalization.Method],
    key: jax.Array,
    progress: bool,
) -> _Result:
  """Runs the cells of one problem and fits them."""
  program = generalization.make_grid(
      problem,
      grid.tx,
      max_rank=max(grid.ranks),
      max_size=max(grid.sizes),
      num_links=grid.num_links,
      period=grid.period,
      batch_size=grid.batch_size,
  )

  def run(sizes, resample_data):
    return generalization.measure(
        program,
        problem.data,
        key,
        methods=methods,
        ranks=grid.ranks,
        sizes=sizes,
        num_draws=grid.num_draws,
        chunk=grid.chunk,
        resample_data=resample_data,
        progress=progress,
    )

  gaps = run(grid.sizes, True)
  middle = grid.sizes[len(grid.sizes) // 2]
  frozen = run((middle,), False).gap[:, :, 0].std(-1, ddof=1)
  means = gaps.controlled
  fit = lambda values, statistic: [
      exponents.fit_exponents(v, grid.ranks, grid.sizes, statistic=statistic)
      for v in values
  ]
  fits = {'mean': fit(means, 'mean'), 'sd': fit(gaps.gap, 'sd')}
  return _Result(
      problem.name, gaps, means, frozen, fits, expected, grid.num_links
  )


def _told_rows(result: _Result) -> list[dict[str, Any]]:
  """Returns the exponents with their 95% intervals, to be read."""
  rows = []
  for i, method in enumerate(result.gaps.methods):
    mean, spread = result.fits['mean'][i], result.fits['sd'][i]
    rows.append(
        {
            'problem': result.name,
            'method': method,
            'mean gap ~ r^': _told(mean.rank),
            'mean gap ~ N^': _told(mean.size),
            'spread ~ N^': _told(spread.size),
            'gap at the middle of the grid': f'{mean.centre.value:.3g} +-'
            f' {(mean.centre.high - mean.centre.low) / 2:.1g}',
        }
    )
  return rows


def _exponent_rows(result: _Result) -> list[dict[str, Any]]:
  rows = []
  for i, method in enumerate(result.gaps.methods):
    for what, label in (('mean', 'mean gap'), ('sd', 'spread (sd)')):
      fit = result.fits[what][i]
      row: dict[str, Any] = {
          'problem': result.name,
          'method': method,
          'of': label,
      }
      for name in ('rank', 'size', 'centre'):
        value = getattr(fit, name)
        title = 'at centre' if name == 'centre' else f'{name} exponent'
        row[title] = value.value
        row[f'{title} s.e.'] = value.error
        row[f'{title} low'], row[f'{title} high'] = value.low, value.high
      rows.append(row)
  return rows


def _spread_rows(result: _Result) -> list[dict[str, Any]]:
  """Single runs at the middle size, for each method and rank."""
  gaps = result.gaps
  k = len(gaps.sizes) // 2
  rows = []
  for i, method in enumerate(gaps.methods):
    for j, rank in enumerate(gaps.ranks):
      values = gaps.gap[i, j, k]
      low, median, high = np.quantile(values, (0.05, 0.5, 0.95))
      rows.append(
          {
              'problem': result.name,
              'method': method,
              'rank': rank,
              'N': gaps.sizes[k],
              'mean': float(values.mean()),
              'sd': float(values.std(ddof=1)),
              'sd over frozen factors, one sample': float(result.frozen[i, j]),
              '5%': float(low),
              'median': float(median),
              '95%': float(high),
          }
      )
  return rows


def _cell_rows(result: _Result) -> list[dict[str, Any]]:
  gaps, rows = result.gaps, []
  for i, j, k in np.ndindex(gaps.gap.shape[:-1]):
    means, method = result.means[i, j, k], gaps.methods[i]
    row = {
        'problem': result.name,
        'method': method,
        'rank': gaps.ranks[j],
        'N': gaps.sizes[k],
        'draws': len(means),
        'mean gap': float(means.mean()),
        's.e.': float(means.std(ddof=1)) / math.sqrt(len(means)),
        'mean of single runs': float(gaps.gap[i, j, k].mean()),
        'sd of single runs': float(gaps.gap[i, j, k].std(ddof=1)),
        'training loss': float(gaps.train[i, j, k].mean()),
        'population loss': float(gaps.population[i, j, k].mean()),
    }
    if method in result.expected:
      row['closed form'] = float(result.expected[method][j, k])
    rows.append(row)
  return rows


def _curves(result: _Result, axis: str) -> matplotlib.figure.Figure:
  """Returns the mean gap against r or N, a panel a method, log-log."""
  gaps, means = result.gaps, result.means
  x, others = gaps.ranks, gaps.sizes
  if axis == 'size':
    x, others, means = others, x, means.swapaxes(1, 2)
  other = 'N' if axis == 'rank' else 'r'
  centre, half = figures.mean_interval(np.moveaxis(means, -1, 0))
  figure = matplotlib.figure.Figure(figsize=(11.5, 6.8), layout='constrained')
  panels = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
  handles: dict[str, Any] = {f'{other} = {value}': None for value in others}
  for i, (panel, method) in enumerate(zip(panels, gaps.methods, strict=True)):
    for k, value in enumerate(others):
      y, h = centre[i, :, k], half[i, :, k]
      kept = y > 0  # Others have no logarithm; the table has them.
      y, h, places = y[kept], h[kept], np.asarray(x)[kept]
      handles[f'{other} = {value}'] = panel.errorbar(
          places,
          y,
          [np.minimum(h, 0.95 * y), h],
          capsize=3,
          markersize=4,
          linewidth=1.2,
          **figures.style(k),
      )
      if method in result.expected:
        known = result.expected[method]
        known = known[:, k] if axis == 'rank' else known[k]
        handles['closed form'] = panel.plot(
            x, known, color='0.55', linewidth=3, alpha=0.5, zorder=0
        )[0]
    slope = _told(getattr(result.fits['mean'][i], axis))
    panel.set_title(f'{method}\nslope {slope}', fontsize=10)
    figures.grid(panel)
    if i % 3 == 0:
      panel.set_ylabel('mean gap: population - training loss')
    if i >= 3:
      panel.set_xlabel('rank r' if axis == 'rank' else 'training examples N')
  # Means that are lost in their noise do not stretch the axis.
  seen = centre[centre > half]
  if seen.size:
    panels[0].set_ylim(seen.min() / 2, 2 * (centre + half).max())
  _logarithmic(panels, x)
  claim = _CLAIMS[axis]
  for panel in panels:
    handles[f'slope {claim:+.1f}'] = _guide(panel, x, centre, claim)
  figure.legend(
      handles.values(),
      list(handles),
      loc='outside right center',
      title='mean,\n95% interval',
      fontsize=9,
      title_fontsize=9,
  )
  estimate = ''
  if np.any(gaps.twin):
    estimate = " (mean by control variates: each run's twin's gap taken off)"
  figure.suptitle(
      f'{result.name}: gap against {_SHOWN[axis]}{estimate}; bars are cut above'
      ' zero, means below zero not drawn',
      fontsize=10,
  )
  return figure


def _spread(results: list[_Result]) -> matplotlib.figure.Figure:
  """Returns the spread of single runs against N at a middle rank."""
  figure = matplotlib.figure.Figure(
      figsize=(4.8 * len(results) + 2.8, 4.4), layout='constrained'
  )
  panels = figure.subplots(1, len(results), squeeze=False)[0]
  handles = {}
  for panel, result in zip(panels, results, strict=True):
    gaps = result.gaps
    j = len(gaps.ranks) // 2
    spread = gaps.gap[:, j].std(-1, ddof=1)
    degrees = gaps.gap.shape[-1] - 1
    ends = np.sqrt(degrees / scipy.stats.chi2.ppf((0.975, 0.025), degrees))
    for i, method in enumerate(gaps.methods):
      # A little apart, so that equal curves can be told.
      places = np.asarray(gaps.sizes) * 1.03 ** (i - 2.5)
      y = spread[i]
      handles[method] = panel.errorbar(
          places,
          y,
          [y * (1 - ends[0]), y * (ends[1] - 1)],
          capsize=2,
          markersize=4,
          linewidth=1.2,
          **figures.style(i),
      )
    panel.set_title(f'{result.name}, rank {gaps.ranks[j]}')
    panel.set_xlabel('training examples N')
    figures.grid(panel)
    _logarithmic([panel], gaps.sizes)
    handles['slope -0.5'] = _guide(panel, gaps.sizes, spread, -0.5)
  panels[0].set_ylabel('standard deviation of the gap over runs')
  figure.legend(
      handles.values(),
      list(handles),
      loc='outside right center',
      title='95% interval (Gaussian)',
      fontsize=9,
      title_fontsize=9,
  )
  return figure


def _logarithmic(panels: Any, x: tuple[int, ...]) -> None:
  for panel in panels:
    panel.set_xscale('log')
    panel.set_yscale('log')
    panel.set_xticks(x, [str(value) for value in x])
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
    panel.minorticks_off()


def _guide(
    panel: Any, x: tuple[int, ...], values: np.ndarray, slope: float
) -> Any:
  """Draws a line of a slope through the geometric middle of what is shown."""
  ends = np.array([x[0], x[-1]], float)
  level = np.exp(np.mean(np.log(values[values > 0])))
  line = level * (ends / math.sqrt(ends[0] * ends[1])) ** slope
  return panel.plot(ends, line, color='0.35', linewidth=2.2, linestyle=':')[0]


_FITTED = 0.05  # Of the population loss: a sample that is nearly fitted.
_CAVEATS = [
    'The claims are about asymmetric LoRA and bound the largest gap over a'
    ' bounded set of parameters, with high probability over the frozen factor;'
    ' what is measured is the gap of the parameters that training ends with. A'
    ' mean gap that falls faster than 1 / sqrt(N), or grows other than sqrt(r),'
    ' contradicts neither: it says that the bound is not sharp for these runs.'
    ' A faster growth over a finite grid does not contradict an upper bound'
    ' either, whose constant is free.',
    'Squared loss with a well-specified teacher has the fast rate: the gap is'
    ' tau^2 k n / N for k n trained numbers and large N, exponents 1 and -1.'
    ' The training loss of even one fixed point fluctuates by 1 / sqrt(N), so'
    ' theory expects the order 1 / sqrt(N) of the spread of single runs, also'
    ' where their mean gap is smaller.',
]


def _notes(result: _Result) -> list[str]:
  """Returns what the fits say about the claims, a sentence each."""
  notes = []
  gaps = result.gaps
  for i, method in enumerate(gaps.methods):
    mean, spread = result.fits['mean'][i], result.fits['sd'][i]
    notes.append(
        f'{result.name}, {method}: gap ~ r^{_told(mean.rank)}'
        f' N^{_told(mean.size)}; 1/2 is {_where(mean.rank, 0.5)} in r, -1/2'
        f' {_where(mean.size, -0.5)} in N. Single runs spread as'
        f' N^{_told(spread.size)}; -1/2 is {_where(spread.size, -0.5)}.'
    )
  if np.any(gaps.twin):
    notes.append(
        f"{result.name}: the mean gap is taken with each run's twin, trained on"
        ' the population loss, for control variate: the same mean as population'
        ' minus training loss of single runs, with less noise.'
    )
  notes.append(
      f'{result.name}: chains end with a change of rank up to'
      f' {result.num_links} r or the shorter side, whatever the rank of a link,'
      ' so their rank exponent is one of the sum of links and not comparable with'
      " the others'."
  )
  spreads = [fit.size for fit in result.fits['sd']]
  useful = [s for s in spreads if s.high - s.low < 1]
  inside = sum(s.low <= -0.5 <= s.high for s in useful)
  notes.append(
      f'{result.name}: of {len(spreads)} intervals of the exponent of the spread'
      f' in N, {len(useful)} are narrower than 1, and {inside} of these contain'
      ' -1/2.'
  )
  if result.expected:
    worst = max(_misses(result, method) for method in result.expected)
    notes.append(
        f'{result.name}: the means of asymmetric LoRA lie within {worst:.1f}'
        ' standard errors of the closed form.'
    )
  share = gaps.train.mean(-1) / gaps.population.mean(-1)
  fitted = share < _FITTED
  if fitted.any():
    notes.append(
        f'{result.name}: in {fitted.sum()} of {fitted.size} cells the sample is'
        f' fitted (training loss below {_FITTED:g} of the population loss; N up'
        f' to {max(np.asarray(gaps.sizes)[np.nonzero(fitted)[2]])}): the gap'
        ' is nearly the population loss there, and follows the optimiser more'
        ' than the rank.'
    )
  return notes


def _misses(result: _Result, method: str) -> float:
  """Returns how far the means lie from the closed form at most, in s.e."""
  means = result.means[result.gaps.methods.index(method)]
  error = means.std(-1, ddof=1) / math.sqrt(means.shape[-1])
  return float(np.max(abs(means.mean(-1) - result.expected[method]) / error))


def _told(value: exponents.Interval) -> str:
  return f'{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]'


def _where(value: exponents.Interval, claim: float) -> str:
  inside = value.low <= claim <= value.high
  return 'inside the interval' if inside else 'outside the interval'
