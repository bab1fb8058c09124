"""How solutions of the full problem generalise, beside their bound (N7).

The network is linearised at the pre-trained weights and computes in float64.

Reference: Maurer, A vector-contraction inequality for Rademacher complexities,
2016, arXiv 1605.00251.
"""

from collections.abc import Sequence
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import scipy.stats
import tqdm

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.studies import few_shot
from bernoulli_lora_jax.studies import study as study_lib
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import exponents
from bernoulli_lora_jax.theory import ntk
from bernoulli_lora_jax.theory import nuclear
from bernoulli_lora_jax.training import figures


def generalisation(
    task: task_lib.Task,
    *,
    sizes: Sequence[int] = (16, 32, 64, 128),
    select: str | None = 'Dense_1/kernel',
    relative_lams: Sequence[float] = (0.1, 0.03, 0.01),
    num_draws: int = 4,
    num_signs: int = 100,
    reference_size: int = 512,
    eta: float = 0.05,
    tolerance: float = 1e-5,
    seed: int = 0,
    progress: bool = True,
) -> study_lib.Study:
  """Compares N7's bound with what the solutions of N1 lose on the test split.

  All losses are of the linearised network. D is the least power of two above
  ||delta||_*, at the cost of a union over the powers; the loss's range is taken
  from the largest gradient among the examples drawn, so that the bound is an
  estimate, also because the examples are balanced over the classes, not drawn
  independently. Excess risk is relative to the best delta seen: the solution for
  `reference_size` training examples with the least test loss.

  Args:
    task: classification, with `outputs` and a test split.
    sizes: N of the few examples.
    select: regular expression of the matrices; None for all kernels.
    relative_lams: lam over ||grad F||_2 at zero of the reference examples.
    num_draws: of the few examples, >= 2.
    num_signs: draws of signs of the Rademacher average, >= 2.
    reference_size: examples of the reference, clipped to the training split.
    eta: the bound's probability of failure.
    tolerance: of N1's duality gap, relative to the loss at zero.
    seed: of the draws.
    progress: whether to show a bar.

  Returns:
    Table 'generalisation', means over draws with half of their 95% intervals
    ('+-'), figure 'generalisation', notes, all numbers in the appendix.

  Raises:
    ValueError: an argument outside its range, a task without a test split.
  """
  for relative_lam in relative_lams:
    few_shot.check_sizes(relative_lam)
  checks.at_least(2, num_draws=num_draws, num_signs=num_signs)
  exponents.check_rising('sizes', sizes)
  checks.that(
      len(relative_lams) > 0, 'one relative_lam or more', relative_lams=()
  )
  checks.that(
      'test' in task.data, "a task with data['test']", splits=sorted(task.data)
  )
  with jax.enable_x64(True):
    params = task.init(jax.random.key(seed))
    matrices = few_shot.selection(select)
    test = ntk.linearize(task, params, task.data['test'], matrices)
    full = few_shot.few_shot(task, min(reference_size, task.num_samples), seed)
    full = ntk.linearize(task, params, full, matrices)
    top = float(nuclear.largest_lam(full))
    lams = {relative: relative * top for relative in relative_lams}
    tolerance = tolerance * float(full.loss.value(full.start, full.targets))
    solutions = _solve_all(full, lams, tolerance)
    best = min(
        float(_linear_loss(test, one.delta)) for one in solutions.values()
    )
    measured = []
    jobs = [(n, draw) for n in sizes for draw in range(num_draws)]
    for n, draw in tqdm.tqdm(jobs, desc='generalisation', disable=not progress):
      few = few_shot.few_shot(task, n, seed + 1 + draw)
      problem = ntk.linearize(task, params, few, matrices)
      key = jax.random.fold_in(jax.random.key(seed), draw)
      average = ntk.rademacher(problem, key, num_draws=num_signs)
      radius = float(
          jnp.max(jnp.linalg.norm(ntk.gradient_norms(problem), axis=1))
      )
      solutions = _solve_all(problem, lams, tolerance)
      for relative, solution in solutions.items():
        measured.append(
            {
                'N': n,
                'relative lam': relative,
                'lam': lams[relative],
                'nuclear norm': float(solution.certificate.nuclear_norm),
                'rank': few_shot.numerical_rank(solution.delta),
                'rademacher': float(average.mean),
                'gradient': radius,
                'start loss': _largest_loss(problem),
                'train loss': float(_linear_loss(problem, solution.delta)),
                'test loss': float(_linear_loss(test, solution.delta)),
                'duality gap': float(solution.certificate.gap),
            }
        )
    lipschitz = float(test.loss.lipschitz)
  num_outputs = test.start.shape[1]
  largest = max(one['gradient'] for one in measured)
  start_loss = max(one['start loss'] for one in measured)
  for one in measured:
    _add_bound(one, best, num_outputs, lipschitz, largest, start_loss, eta)
  rows = _generalisation_rows(measured)
  return study_lib.Study(
      tables={'generalisation': [_told_row(row) for row in rows]},
      figures={'generalisation': _plot_generalisation(rows, task.name)},
      notes=_generalisation_notes(rows, best, eta),
      appendix={'generalisation in full': rows},
  )


def _solve_all(problem, lams, tolerance) -> dict[float, nuclear.Solution]:
  """Returns N1's solution for each lam, from the largest on, warm-started."""
  solutions, start = {}, None
  for relative, lam in sorted(lams.items(), reverse=True):
    found = nuclear.solve(problem, lam, tolerance=tolerance, start=start)
    solutions[relative], start = found, found.delta
  return solutions


@jax.jit
def _linear_loss(problem, delta):
  forward = ntk.operators(problem)[0]
  return problem.loss.value(problem.start + forward(delta), problem.targets)


def _largest_loss(problem) -> float:
  """Returns the largest loss of an example at delta = 0."""
  one = lambda z, y: problem.loss.value(z[None], y[None])
  return float(jnp.max(jax.vmap(one)(problem.start, problem.targets)))


def _add_bound(
    one, best, num_outputs, lipschitz, gradient, start_loss, eta
) -> None:
  """Adds what is measured and N7's bound at D = 2^j."""
  power = math.ceil(math.log2(max(one['nuclear norm'], 1e-12)))
  radius = 2.0**power
  # sum over j of 1 / (2 (|j| + 1) (|j| + 2)) is 3/4.
  share = eta / (2 * (abs(power) + 1) * (abs(power) + 2))
  one['gap'] = one['test loss'] - one['train loss']
  one['excess'] = one['test loss'] - best
  one['rademacher term'] = ntk.risk_bound(
      one['rademacher'],
      radius=radius,
      num_samples=one['N'],
      num_outputs=num_outputs,
      lipschitz=lipschitz,
      loss_range=0.0,
  )
  one['bound'] = ntk.risk_bound(
      one['rademacher'],
      radius=radius,
      num_samples=one['N'],
      num_outputs=num_outputs,
      lipschitz=lipschitz,
      loss_range=start_loss + lipschitz * radius * gradient,
      eta=share,
  )
  one['lam * nuclear norm'] = one['lam'] * one['nuclear norm']


def _generalisation_rows(measured) -> list[dict[str, Any]]:
  """Returns the mean and the half 95% interval over draws of each N and lam."""
  groups: dict[tuple[float, int], list[dict[str, Any]]] = {}
  for one in measured:
    groups.setdefault((one['relative lam'], one['N']), []).append(one)
  rows = []
  names = (
      'gap',
      'excess',
      'rademacher term',
      'bound',
      'nuclear norm',
      'rank',
      'lam * nuclear norm',
      'rademacher',
      'train loss',
      'test loss',
  )
  for (relative, n), members in groups.items():
    row = {'relative lam': relative, 'lam': members[0]['lam'], 'N': n}
    quantile = scipy.stats.t.ppf(0.975, len(members) - 1)
    for name in names:
      values = np.asarray([one[name] for one in members])
      row[name] = float(values.mean())
      half = quantile * values.std(ddof=1) / math.sqrt(len(values))
      row[f'{name} +-'] = float(half)
    row['duality gap, largest'] = max(one['duality gap'] for one in members)
    rows.append(row)
  return rows


def _told_row(row: dict[str, Any]) -> dict[str, Any]:
  """Returns what is read of a row: means with half of their 95% intervals."""
  told = {
      'lam / lam_max': row['relative lam'],
      'N': row['N'],
      'rank': row['rank'],
  }
  for name in ('nuclear norm', 'gap', 'rademacher term', 'bound', 'excess'):
    told[name] = _told(row, name)
  return told


def _plot_generalisation(rows, title) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(14, 5), layout='constrained')
  panels = figure.subplots(1, 3)
  lams = list(dict.fromkeys(row['relative lam'] for row in rows))
  shown = (
      (('bound', 'rademacher term', 'gap'), 'risk - empirical risk'),
      (('excess', 'lam * nuclear norm'), 'excess risk, and lam ||delta||_*'),
      (('nuclear norm',), '||delta||_*'),
  )
  labels = {
      'bound': 'bound of N7',
      'rademacher term': 'its Rademacher term',
      'gap': 'measured',
      'excess': 'test loss - best one seen',
      'lam * nuclear norm': 'lam ||delta||_*',
      'nuclear norm': 'solution',
  }
  for panel, (names, label) in zip(panels, shown, strict=True):
    for j, name in enumerate(names):
      for i, relative in enumerate(lams):
        points = [row for row in rows if row['relative lam'] == relative]
        points = [row for row in points if row[name] > 0]
        look = figures.style(i)
        look['linestyle'] = ('-', '--', ':')[(len(names) - 1 - j) % 3]
        mean = np.asarray([row[name] for row in points])
        half = np.asarray([row[f'{name} +-'] for row in points])
        panel.errorbar(
            [row['N'] for row in points],
            mean,
            [np.minimum(half, 0.9 * mean), half],
            label=f'{labels[name]}, {relative:g}',
            capsize=3,
            markersize=5,
            **look,
        )
    panel.set(yscale='log', xlabel='N', ylabel=label)
    panel.set_xscale('log', base=2)
    panel.xaxis.set_major_formatter('{x:g}')
    figures.grid(panel)
    panel.legend(
        fontsize=7,
        title='lam / lam_max',
        title_fontsize=7,
        loc='upper center',
        bbox_to_anchor=(0.5, -0.15),
        ncols=len(names),
        handlelength=3.5,
    )
  figure.suptitle(
      f'{title}; mean over draws, bar: 95% interval, cut above zero; what is not'
      ' positive is not drawn'
  )
  return figure


def _generalisation_notes(rows, best, eta) -> list[str]:
  ratio = [row['bound'] / row['gap'] for row in rows if row['gap'] > 0]
  term = [row['rademacher term'] / row['gap'] for row in rows if row['gap'] > 0]
  notes = [
      f'Best test loss of the references, linearised: {best:.4g}; below zero'
      ' excess another draw or lam does better than the reference.',
      f'The bound (eta = {eta:g}) held in {sum(r["bound"] >= r["gap"] for r in rows)}'
      f' of {len(rows)} means.',
  ]
  if ratio:
    notes.append(
        f'It is {min(ratio):.3g} to {max(ratio):.3g} times the measured gap, its'
        f' Rademacher term {min(term):.3g} to {max(term):.3g} times'
        ' (the rest is the range of the loss over the ball).'
    )
  for n in dict.fromkeys(row['N'] for row in rows):
    same: list[dict[str, Any]] = sorted(
        (row for row in rows if row['N'] == n),
        key=operator.itemgetter('lam'),
        reverse=True,
    )
    if len(same) > 1:
      ends = same[0], same[-1]
      notes.append(
          f'N = {n}, from the largest lam to the least: ||delta||_*'
          f' {" to ".join(_told(row, "nuclear norm") for row in ends)}, gap'
          f' {" to ".join(_told(row, "gap") for row in ends)}.'
      )
  for relative in dict.fromkeys(row['relative lam'] for row in rows):
    points = [r for r in rows if r['relative lam'] == relative and r['gap'] > 0]
    if len(points) > 2:
      notes.append(
          f'Over N at lam / lam_max = {relative:g} the gap goes like'
          f' N^{_slope(points, "gap"):.2f}, the Rademacher average like'
          f' N^{_slope(points, "rademacher"):.2f}.'
      )
  return notes


def _told(row: dict[str, Any], name: str) -> str:
  """Returns a mean with half of its interval."""
  return f'{row[name]:.3g} +- {row[f"{name} +-"]:.1g}'


def _slope(rows: Sequence[dict[str, Any]], name: str) -> float:
  """Returns the exponent in N."""
  x, y = (np.log([row[key] for row in rows]) for key in ('N', name))
  return float(np.polyfit(x, y, 1)[0])
