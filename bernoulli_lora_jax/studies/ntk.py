"""Studies of LoRA in the linear regime: ranks and validity (N1-N6).

They take few examples, balanced over the classes, and compute in float64;
`lam` is given relative to ||grad F||_2 at the pre-trained weights, from which on
zero is the optimum.

References:
  Jang, Lee and Ryu, LoRA training in the NTK regime has no spurious local minima,
  2024, arXiv 2402.11867.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import scipy.stats
import tqdm

from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.studies import study as study_lib
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import lora
from bernoulli_lora_jax.theory import ntk
from bernoulli_lora_jax.theory import nuclear
from bernoulli_lora_jax.training import figures

_FLOOR = 1e-14  # Of gaps in figures: what is below is rounding.
_GAPS = (1e-3, 1e-6)  # Relative gaps whose first steps are reported.
_CLOSE = 1e-8  # Relative duality gap of a run that has reached the optimum.


def few_shot(
    task: task_lib.Task, num_samples: int, seed: int
) -> task_lib.Batch:
  """Returns training examples, as many of each class up to one.

  Args:
    task: of classes batch['y'], shape (N,) int.
    num_samples: N, in [1, examples of the training split].
    seed: of the draw.

  Returns:
    A batch of N distinct examples.

  Raises:
    ValueError: more examples than there are, or no classes.
  """
  labels = np.asarray(task.data['train']['y'])
  ntk.check(
      np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1,
      "a task whose data['train']['y'] are classes",
      name=task.name,
  )
  ntk.check(
      1 <= num_samples <= len(labels),
      f'num_samples in [1, {len(labels)}], the training examples',
      num_samples=num_samples,
  )
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(labels))
  # Sorted by how many of its class came before: round after round of classes.
  place = np.zeros(len(labels), int)
  for k in np.unique(labels):
    place[labels[order] == k] = np.arange(np.sum(labels == k))
  rows = np.sort(order[np.argsort(place, kind='stable')[:num_samples]])
  return task_lib.take(task.data['train'], jnp.asarray(rows))


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
    ranks: in [1, shortest side].
    num_seeds: random starts a rank, >= 1.
    relative_lam: lam over the one from which on zero is optimal, in (0, 1).
    optimizer: of optax, on full gradients; None for SGD with momentum 0.9 and the
      largest stepsize of 2^-j that does not diverge at the largest rank.
    num_steps: of it.
    polish_steps: of L-BFGS afterwards, so that what is left is the landscape's.
    seed: of the examples and of the starts.
    progress: whether to show a bar.

  Returns:
    Table 'ranks', figures 'loss' and 'thresholds', notes.

  Raises:
    ValueError: an argument outside its range.
  """
  check_sizes(relative_lam, num_seeds=num_seeds, polish_steps=polish_steps)
  with jax.enable_x64(True):
    few = _few_problem(task, num_samples, select, relative_lam, seed)
    runs = _run_ranks(
        few,
        ranks,
        num_seeds,
        optimizer,
        num_steps,
        polish_steps,
        seed,
        progress,
    )
    rows = [_rank_row(few, run) for run in runs]
  title = f'{task.name}, N = {num_samples}, K = {few.problem.start.shape[1]}'
  return study_lib.Study(
      tables={'ranks': rows},
      figures={
          'loss': _plot_loss(runs, title),
          'thresholds': _plot_thresholds(few, runs, rows, title),
      },
      notes=_rank_notes(few, rows),
  )


class _Few(NamedTuple):
  """A few examples, linearised, and the optimum of N1."""

  problem: ntk.Problem
  lam: float
  solution: nuclear.Solution
  rank: int  # Of the solution, the largest of its matrices.


class _Run(NamedTuple):
  """The starts of one rank."""

  rank: int
  gaps: np.ndarray  # (seeds, steps + 1), N2's objective over the optimum of N1.
  polished: np.ndarray  # (seeds,), after L-BFGS.
  certificate: nuclear.Certificate  # (seeds,), after L-BFGS.
  # (seeds,), least one of the Hessian after L-BFGS; nan where certified.
  curvature: np.ndarray
  slope: np.ndarray  # (seeds,), norm of N2's gradient, after L-BFGS.


def selection(select: str | None) -> matrices_lib.Matrices | None:
  """Returns the matrices whose paths match, None for the default."""
  return None if select is None else matrices_lib.Matrices(select=select)


def _few_problem(task, num_samples, select, relative_lam, seed) -> _Few:
  params = task.init(jax.random.key(seed))
  batch = few_shot(task, num_samples, seed)
  problem = ntk.linearize(task, params, batch, selection(select))
  lam = relative_lam * float(nuclear.largest_lam(problem))
  solution = nuclear.solve(problem, lam)
  return _Few(problem, lam, solution, numerical_rank(solution.delta))


def numerical_rank(delta: ntk.Delta) -> int:
  """Returns the largest number of singular values above rounding."""
  spectra = [np.linalg.svd(x, compute_uv=False) for x in delta.values()]
  top = max(s[0] for s in spectra)
  return max(int(np.sum(s > 1e-6 * top)) for s in spectra)


def _run_ranks(
    few, ranks, num_seeds, optimizer, num_steps, polish_steps, seed, progress
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
  for r in tqdm.tqdm(ranks, desc='ranks', disable=not progress):
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
  return runs


def _default_optimizer(problem, lam, starts):
  """Returns SGD with momentum and the largest stable stepsize among 2^-j."""

  @jax.jit
  def values(problem, lam, rate):
    tx = optax.sgd(rate, 0.9)
    run = lambda x: lora.train_lora(problem, lam, x, tx, num_steps=200).values
    return jax.vmap(run)(starts)

  for j in range(30):
    seen = np.asarray(values(problem, lam, 2.0**-j))
    late = seen[:, 100:].max(1)
    if np.all(np.isfinite(seen)) and np.all(late < 0.5 * seen[:, 0]):
      break
  # Half of it: later on the curvature grows.
  return optax.sgd(2.0 ** -(j + 1), 0.9)


def _is_optimal(few, run) -> np.ndarray:
  return run.certificate.gap <= _CLOSE * few.solution.certificate.value


def _first_steps(few, run, gap) -> np.ndarray:
  """Returns the first step within the relative gap of each seed, or inf."""
  inside = run.gaps <= gap * float(few.solution.certificate.value)
  return np.where(inside.any(1), inside.argmax(1), np.inf)


def _rank_row(few: _Few, run: _Run) -> dict[str, Any]:
  num_samples, num_outputs = few.problem.start.shape
  value = float(few.solution.certificate.value)
  optimal = _is_optimal(few, run)
  row = {
      'rank': run.rank,
      'r(r+1)/2': run.rank * (run.rank + 1) // 2,
      'KN': num_outputs * num_samples,
      '(K-1)N': (num_outputs - 1) * num_samples,
      'guarantee KN': _guarantee(run.rank, num_outputs, num_samples, 'squared'),
      'guarantee (K-1)N': _guarantee(
          run.rank, num_outputs, num_samples, 'cross_entropy'
      ),
      'gap/value, trained, median': float(np.median(run.gaps[:, -1])) / value,
      'gap/value, polished, median': float(np.median(run.polished)) / value,
      'gap/value, polished, largest': float(run.polished.max()) / value,
      'spectral norm/lam, largest': float(
          run.certificate.spectral_norm.max() / few.lam
      ),
      'duality gap/value, largest': float(run.certificate.gap.max()) / value,
      'gradient norm, largest': float(run.slope.max()),
      'least curvature/lam, not certified': (
          float(np.nanmin(run.curvature) / few.lam) if not optimal.all() else ''
      ),
      'certified': f'{optimal.sum()} of {len(optimal)}',
  }
  for gap in _GAPS:
    steps = float(np.median(_first_steps(few, run, gap)))
    row[f'steps to {gap:g}, median'] = steps
  return row


def _guarantee(rank, num_outputs, num_samples, criterion) -> str:
  found = ntk.rank_thresholds(num_outputs, num_samples, criterion)
  if rank >= found.no_spurious:
    return 'no spurious minima'
  return 'optimum exists' if rank >= found.existence else 'none'


def _rank_notes(few: _Few, rows: list[dict[str, Any]]) -> list[str]:
  num_samples, num_outputs = few.problem.start.shape
  wide = ntk.rank_thresholds(num_outputs, num_samples)
  narrow = ntk.rank_thresholds(num_outputs, num_samples, 'cross_entropy')
  done = lambda row: len(set(row['certified'].split(' of '))) == 1
  all_ok = [row['rank'] for row in rows if done(row)]
  some = [row['rank'] for row in rows if not done(row)]
  notes = [
      f'N1 at lam = {few.lam:.4g}: value'
      f' {float(few.solution.certificate.value):.8g}, duality gap'
      f' {float(few.solution.certificate.gap):.1e}, rank {few.rank}.',
      f'Thresholds (optimum exists / no spurious minima): ranks'
      f' {wide.existence} / {wide.no_spurious} by KN = {wide.equations},'
      f' {narrow.existence} / {narrow.no_spurious} by (K-1)N ='
      f' {narrow.equations}.',
      'All starts reached the optimum of N1, certified by a relative duality gap'
      f' of {_CLOSE:g} after L-BFGS, at ranks {all_ok}.',
  ]
  failed = [row for row in rows if row['rank'] in some]
  late = [r for r in some if r >= narrow.no_spurious]
  if late:
    notes.append(f'At ranks {late} the claim was not met within the steps.')
  if failed:
    minima = [
        row['rank']
        for row in failed
        if row['least curvature/lam, not certified'] > -1e-6
        and row['gradient norm, largest'] < 1e-6
    ]
    notes.append(
        f'Not all starts did so at ranks {some}; at ranks {minima} all ends are'
        ' stationary (gradient below 1e-6) without negative curvature, which'
        ' speaks for spurious minima (below the rank of the solution: for minima'
        ' that no start can avoid).'
    )
  if all_ok and min(all_ok) < narrow.existence:
    notes.append(
        'The thresholds are sufficient, not necessary here: rank'
        f' {min(all_ok)} was enough, the rank of the solution being {few.rank}.'
    )
  return notes + _speed_notes(rows, all_ok)


def _speed_notes(rows, all_ok) -> list[str]:
  name = f'steps to {_GAPS[0]:g}, median'
  steps = [(row['rank'], row[name]) for row in rows if row['rank'] in all_ok]
  steps = [(rank, count) for rank, count in steps if math.isfinite(count)]
  if len(steps) < 2:
    return []
  order = scipy.stats.spearmanr(*zip(*steps, strict=True)).statistic
  if math.isnan(order):
    return []
  claim = 'smaller ranks were slower' if order < 0 else 'they were not slower'
  listed = ', '.join(f'rank {rank}: {count:g}' for rank, count in steps)
  return [
      f'Median steps to a relative gap of {_GAPS[0]:g} among ranks that reach the'
      f' optimum: {listed}; rank correlation {order:+.2f}, {claim} here.'
  ]


def _plot_loss(runs: Sequence[_Run], title: str) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(8.6, 4.8), layout='constrained')
  panel = figure.subplots()
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
      ylabel='LoRA objective - optimum of the full problem',
      title=title,
  )
  panel.grid(True, which='major', linewidth=0.4, alpha=0.6)
  figure.legend(
      loc='outside right center',
      fontsize=9,
      title='median, band: all starts',
      title_fontsize=9,
  )
  return figure


def _plot_thresholds(
    few: _Few, runs: Sequence[_Run], rows: list[dict[str, Any]], title: str
) -> matplotlib.figure.Figure:
  num_samples, num_outputs = few.problem.start.shape
  figure = matplotlib.figure.Figure(figsize=(10, 4.2), layout='constrained')
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
  left.set(yscale='log', ylabel='objective - optimum')
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
  for criterion, line, name in (
      ('cross_entropy', ':', '(K-1)N'),
      ('squared', '--', 'KN'),
  ):
    found = ntk.rank_thresholds(num_outputs, num_samples, criterion)
    lines.append((found.no_spurious, line, f'no spurious minima by {name}'))
  for panel in (left, right):
    for place, line, name in lines:
      label = name if panel is left else None
      panel.axvline(place, color='0.4', linestyle=line, label=label)
    panel.set_xlabel('rank')
    panel.set_xscale('log', base=2)
    panel.xaxis.set_major_formatter('{x:g}')
    panel.grid(True, which='major', linewidth=0.4, alpha=0.6)
  left.legend(fontsize=8, title='median, bar: all starts', title_fontsize=8)
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


def linearisation(
    task: task_lib.Task,
    *,
    num_samples: int = 32,
    select: str | None = 'Dense_1/kernel',
    ranks: Sequence[int] = (1, 4, 16),
    num_seeds: int = 5,
    relative_lam: float = 0.01,
    learning_rate: float = 0.02,
    num_steps: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> study_lib.Study:
  """Trains the network itself by LoRA and asks how linear it has stayed.

  Args:
    task: classification, with `outputs`.
    num_samples: N of the few examples.
    select: regular expression of the matrices; None for all kernels.
    ranks: in [1, shortest side].
    num_seeds: random starts a rank, >= 1.
    relative_lam: as in `ranks`.
    learning_rate: of gradient descent.
    num_steps: of it, >= 1.
    seed: of the examples and of the starts.
    progress: whether to show a bar.

  Returns:
    Table 'linearisation', figure 'linearisation', notes.

  Raises:
    ValueError: an argument outside its range.
  """
  check_sizes(relative_lam, num_seeds=num_seeds, num_steps=num_steps)
  with jax.enable_x64(True):
    few = _few_problem(task, num_samples, select, relative_lam, seed)
    keys = jax.random.split(jax.random.key(seed), num_seeds)
    tx = optax.sgd(learning_rate)
    seen = {}
    for r in tqdm.tqdm(ranks, desc='linearisation', disable=not progress):
      start = jax.vmap(lambda key, r=r: lora.init_factors(few.problem, r, key))(
          keys
      )
      seen[r] = jax.tree.map(
          np.asarray,
          _real_runs(few.problem, few.lam, start, tx, num_steps),
      )
  rows = [_linearisation_row(r, one) for r, one in seen.items()]
  title = f'{task.name}, N = {num_samples}, lam = {few.lam:.3g}'
  return study_lib.Study(
      tables={'linearisation': rows},
      figures={'linearisation': _plot_linearisation(seen, title)},
      notes=_linearisation_notes(rows),
  )


class _Seen(NamedTuple):
  """Along runs of the network itself; shape=(seeds, steps)."""

  step: Any
  norm: Any  # ||delta||_F
  error: Any  # ||f_0 + G delta - f|| / ||f - f_0||, over the few examples.
  loss: Any  # N2's objective of the network.
  linear_loss: Any  # The linearised one at the same factors.
  linear_run: Any  # The linearised one along its own run from the same start.


def _real_runs(problem, lam, start, tx, num_steps) -> _Seen:
  @jax.jit
  def run(problem, lam, factors):
    real = lora.make_objective(problem, lam, is_linear=False)
    linear = lora.make_objective(problem, lam)
    forward = ntk.operators(problem)[0]

    def step(carry, i):
      factors, state = carry
      updates, state = tx.update(jax.grad(real)(factors), state, factors)
      factors: Any = optax.apply_updates(factors, updates)
      delta = lora.product(factors)
      change = problem.model(delta) - problem.start
      error = jnp.linalg.norm(forward(delta) - change)
      seen = _Seen(
          step=i + 1,
          norm=optax.tree.norm(delta),
          error=error / jnp.linalg.norm(change),
          loss=real(factors),
          linear_loss=linear(factors),
          linear_run=0.0,
      )
      return (factors, state), seen

    carry = (factors, tx.init(factors))
    seen = jax.lax.scan(step, carry, jnp.arange(num_steps))[1]
    alone = lora.train_lora(problem, lam, factors, tx, num_steps=num_steps)
    return seen._replace(linear_run=alone.values[1:])

  return jax.vmap(run, (None, None, 0))(problem, lam, start)


def _linearisation_row(rank: int, seen: _Seen) -> dict[str, Any]:
  above = np.median(seen.error, 0) > 0.1
  norms = np.median(seen.norm, 0)
  return {
      'rank': rank,
      'norm of delta, end': float(norms[-1]),
      'relative error, end': float(np.median(seen.error[:, -1])),
      'norm of delta at error 0.1': (
          float(norms[above.argmax()]) if above.any() else math.inf
      ),
      'step at error 0.1': (
          int(seen.step[0][above.argmax()]) if above.any() else math.inf
      ),
      'loss, end': float(np.median(seen.loss[:, -1])),
      'linearised loss there': float(np.median(seen.linear_loss[:, -1])),
      'linearised run, end': float(np.median(seen.linear_run[:, -1])),
  }


def _linearisation_notes(rows: list[dict[str, Any]]) -> list[str]:
  passed = lambda row: (
      '10% was passed at ||delta||_F ='
      f' {row["norm of delta at error 0.1"]:.3g}, step {row["step at error 0.1"]}'
      if math.isfinite(row['step at error 0.1'])
      else '10% was not passed'
  )
  return [
      f'Rank {row["rank"]}: at the end ||delta||_F ='
      f' {row["norm of delta, end"]:.3g}, the linearised outputs are off by'
      f' {100 * row["relative error, end"]:.0f}% of the change ({passed(row)});'
      f' objective {row["loss, end"]:.4g}, the'
      f' linearised one at the same factors {row["linearised loss there"]:.4g},'
      f' along its own run {row["linearised run, end"]:.4g}.'
      for row in rows
  ]


def _plot_linearisation(seen, title) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(12, 4.4), layout='constrained')
  left, right = figure.subplots(1, 2)
  size = next(iter(seen.values())).step.shape[1]
  shown = np.unique(np.geomspace(1, size, 100).astype(int)) - 1
  seen = {
      r: jax.tree.map(lambda x: x[:, shown], one) for r, one in seen.items()
  }
  for i, (rank, one) in enumerate(seen.items()):
    _band(left, np.median(one.norm, 0), one.error, f'rank {rank}', i)
  left.axhline(0.1, color='0.4', linestyle=':', linewidth=1)
  left.set(
      xlabel='||delta||_F, median along the run',
      ylabel='||f_lin - f|| / ||f - f_0||',
      # Before a ReLU flips a network of them is linear in one matrix: rounding.
      ylim=(1e-4, None),
      yscale='log',
  )
  left.legend(fontsize=8, title='median, band: all starts', title_fontsize=8)
  names = ('loss', 'linear_loss', 'linear_run')
  labels = ('network', 'linearised, same factors', 'linearised, own run')
  count = 0
  for rank in (min(seen), max(seen)) if len(seen) > 1 else seen:
    for name, label in zip(names, labels, strict=True):
      values = getattr(seen[rank], name)
      _band(right, seen[rank].step[0], values, f'rank {rank}: {label}', count)
      count += 1
  right.set(xlabel='step (a full gradient each)', ylabel='objective')
  right.legend(fontsize=8)
  for panel in (left, right):
    panel.set(xscale='log', yscale='log')
    panel.grid(True, which='major', linewidth=0.4, alpha=0.6)
  figure.suptitle(title)
  return figure


def _band(panel, x, values, label, i):
  """Draws the median and the range of values, shape (seeds, points)."""
  panel.plot(
      x,
      np.median(values, 0),
      label=label,
      markersize=5,
      markevery=0.1,
      linewidth=1.2,
      **figures.style(i),
  )
  panel.fill_between(
      x,
      values.min(0),
      values.max(0),
      alpha=0.15,
      linewidth=0,
      color=figures.style(i)['color'],
  )


def check_sizes(relative_lam: float, **sizes: int) -> None:
  """Raises ValueError unless 0 < relative_lam < 1 and all sizes are >= 1."""
  ntk.check(
      0 < relative_lam < 1, 'relative_lam in (0, 1)', relative_lam=relative_lam
  )
  for name, value in sizes.items():
    ntk.check(value >= 1, f'{name} >= 1', **{name: value})
