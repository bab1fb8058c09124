"""Audits a finished run: its constants, its assumptions, its bound.

The run is replayed from its configuration, which takes as long as the run did,
and whether it ends in its checkpoint is reported; the constants are estimated at points along the
path. L, Lbar and sigma^2 seen along a path are at most the true ones, mu at least,
so the bound printed is an estimate and no certificate. The bound is of an
expectation, the measured curve is one run.
"""

import math
import pathlib
from typing import Any, NamedTuple

import jax
from matplotlib import ticker
import matplotlib.figure
import numpy as np
import tqdm

from bernoulli_lora_jax import chain
from bernoulli_lora_jax import checks
from bernoulli_lora_jax.studies import constants as constants_lib
from bernoulli_lora_jax.studies import guarantee
from bernoulli_lora_jax.studies import runs
from bernoulli_lora_jax.studies import study
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import estimates
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import figures
from bernoulli_lora_jax.training import labels
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import reporting

_CLOSE = 1e-3  # Of the checkpoint, relative: the replay took the same path.
_MOST_LINKS = 2000  # Of which the subspaces are drawn again.


class Measured(NamedTuple):
  """What a run has logged of its gradient; arrays of one length."""

  steps: np.ndarray
  norms: np.ndarray  # ||grad f||^2 there.
  means: np.ndarray  # Mean over the steps (starts of links) before.
  is_exact: bool  # Whether every one of them was logged.


def name_of(directory: str | pathlib.Path) -> str:
  """Returns the last part of a run's path, for the names of files."""
  return pathlib.Path(directory).resolve().name


def measured(run: reporting.Run, period: int = 1) -> Measured:
  """Returns ||grad||^2 where it was logged, and its mean over the steps before.

  Args:
    run: with evaluations of the gradient.
    period: K > 1 for the mean over starts of links, W_0, W_K, ..., of which T1
      speaks; evaluations elsewhere are left out.

  Returns:
    `Measured`; the mean is trapezoidal between steps that are not logged.

  Raises:
    ValueError: fewer than two evaluations to take it from.
  """
  lines = [line for line in run.metrics if 'grad_norm_sq' in line]
  if len(lines) < 2:
    raise ValueError(
        'Expected evaluations with grad_norm_sq (training.eval_gradient), got'
        f' {len(lines)} in {run.path / "metrics.jsonl"}.'
    )
  kept = [line for line in lines if line['step'] % period == 0]
  if len(kept) < 2:
    raise ValueError(
        f'Expected evaluations at starts of links of {period} steps, got steps'
        f' {[line["step"] for line in lines[:5]]}, ...: train it with'
        f' training.num_evals={int(lines[-1]["step"]) // period}.'
    )
  steps = np.asarray([line['step'] for line in kept], float)
  norms = np.asarray([line['grad_norm_sq'] for line in kept], float)
  gaps = np.diff(steps) / period
  middle = np.where(gaps == 1, norms[:-1], (norms[1:] + norms[:-1]) / 2)
  means = np.cumsum(gaps * middle) / (steps[1:] / period)
  means = np.concatenate([norms[:1], means])
  return Measured(steps, norms, means, bool(np.all(gaps == 1)))


def audit(
    directory: str | pathlib.Path,
    *,
    num_points: int = 8,
    num_products: int = 12,
    num_batches: int = 32,
    progress: bool = True,
) -> study.Study:
  """Audits a run directory.

  Args:
    directory: of a finished run with checkpoints.
    num_points: of the path at which constants are estimated, >= 2.
    num_products: Hessian-vector products a point, >= 1.
    num_batches: minibatches a point, >= 2.
    progress: whether to show progress bars.

  Returns:
    Tables of the constants, of the realised lambda, of the assumptions, and of
    the bound beside the measured mean; a figure of both curves.

  Raises:
    ValueError: a directory without a finished run, or without checkpoints.
  """
  checks.at_least(2, points=num_points, batches=num_batches)
  checks.at_least(1, products=num_products)
  finished = runs.load(directory)
  measured(finished.run)  # What is missing is said before the replay.
  with jax.enable_x64(finished.config.x64):  # Others keep their own.
    return _audit(finished, num_points, num_products, num_batches, progress)


def _audit(
    finished: runs.Finished,
    num_points: int,
    num_products: int,
    num_batches: int,
    progress: bool,
) -> study.Study:
  """Returns `audit` of a run in the run's precision."""
  config = finished.config
  task = arguments.make_task(config)
  measured(finished.run, guarantee.period_of(config, task))
  program = experiment.make_program(config, task)
  method = program.method
  num_steps = int(finished.run.summary['step'])
  bar = lambda total, unit: tqdm.tqdm(
      total=total, unit=unit, disable=not progress
  )
  with bar(num_steps, 'step') as steps:
    path = runs.replay(finished, program, num_points, steps.update)
  with bar(len(path.points), 'point') as points:
    found = constants_lib.estimate(
        finished,
        task,
        method,
        path,
        num_products=num_products,
        num_batches=num_batches,
        report=points.update,
    )
  bound = guarantee.find_bound(finished, task, method, found)
  realised = _realised(finished, task, method, path)
  tables = {
      'constants': _constant_rows(task, found),
      'assumptions': _assumption_rows(finished, task, found, bound, path),
      'bound and run': _bound_rows(finished, bound),
  }
  if realised:
    tables['lambda'] = realised
  return study.Study(
      tables,
      {'bound': _figure(finished, bound)},
      [*_notes(finished, bound), *_doubts(tables['assumptions'], bound)],
  )


def _realised(
    finished: runs.Finished,
    task: task_lib.Task,
    method: methods.Method,
    path: runs.Path,
) -> list[dict[str, Any]]:
  """Returns the table of the realised lambda, of the chain's draws."""
  config = finished.config
  is_rounds = config.federated.num_clients and config.method.mode == 'adapter'
  if not guarantee.is_chain(config) or is_rounds:
    return []
  if method.chain is not None:
    key = path.start.chain.key
  else:
    key = chain.states(path.start)[0].key
  found, ranks, probs = guarantee.drawn(finished, task, method)
  period = arguments.period_of(config, task)
  num_links = min(
      math.ceil(int(finished.run.summary['step']) / period), _MOST_LINKS
  )
  rows = estimates.realised_eigenvalues(
      key,
      num_links,
      found,
      ranks=ranks,
      probs=probs,
      sketch=arguments.make_sketch(config),
      shared_coin=config.method.shared_coin,
  )
  return [
      {
          'matrix': row.path,
          'links': num_links,
          'left, %': 100 * row.left,
          'mean eigenvalue': row.mean,
          'least, drawn': max(row.low, 0.0),  # Below zero by rounding.
          'least, E[H]': row.exact[0],
          'largest, drawn': row.high,
          'largest, E[H]': row.exact[1],
      }
      for row in rows
  ]


def _constant_rows(
    task: task_lib.Task, found: constants_lib.Constants
) -> list[dict[str, Any]]:
  form = 'E||g - grad||^2 <= 2A(f - f_inf) + (B - 1)||grad||^2 + C'
  sampled = 'largest on the path, from minibatches drawn anew'
  mu = 'from above: least PL ratio on the path'
  if found.pl > found.smoothness:
    mu += '; above L, so too short a path to tell'
  rows = [
      (
          'L',
          found.smoothness,
          'from below: Hessians and differences on the path',
      ),
      ('L between points', found.local_smoothness, 'from below'),
      ('least curvature', found.least_curvature, 'below 0: not convex there'),
      ('Lbar, examples', found.mean_smoothness, f'{sampled}; at least L'),
      ('Lbar, minibatches', found.batch_smoothness, f'{sampled}; at least L'),
      (
          'sigma^2',
          found.variance,
          f'{sampled}, +- {found.variance_error:.2g} (standard error)',
      ),
      ('A', found.slope, f'fitted: {form}'),
      ('B', found.growth, 'the same fit'),
      ('C', found.noise, 'the same fit'),
      ('mu', found.pl, mu),
      ('D0', found.initial_gap, f'f(W_0) - {found.lower_bound:.6g}'),
  ]
  if task.smoothness is not None:
    rows.insert(1, ('L known', task.smoothness, 'exact; the bound takes it'))
  rows += [
      (f'L of client {i}', value, 'from below')
      for i, value in enumerate(found.client_smoothness)
  ]
  return [{'constant': n, 'value': float(v), 'what': w} for n, v, w in rows]


def _assumption_rows(
    finished: runs.Finished,
    task: task_lib.Task,
    found: constants_lib.Constants,
    bound: guarantee.Bound,
    path: runs.Path,
) -> list[dict[str, Any]]:
  """Returns what the guarantee assumes, and what its rates would need besides."""
  config = finished.config
  rows = []

  def tell(assumption: str, seen: str, is_held: bool | None) -> None:
    held = '-' if is_held is None else 'yes' if is_held else 'no'
    rows.append({'assumption': assumption, 'found': seen, 'held': held})

  distance = f'relative distance of the ends {path.error:.2g}'
  tell('the replay is the run', distance, path.error <= _CLOSE)
  speaks = bound.theorem or bound.reason
  tell('a guarantee speaks of the method', speaks, bool(bound.theorem))
  if bound.limit is not None:
    gamma = guarantee.stepsize_of(finished, task)
    seen = f'{gamma:.6g}, limit {bound.limit:.6g}'
    seen += '' if bound.limit_is_known else ' (estimate, from above)'
    is_below = gamma <= bound.limit * (1 + guarantee.ROUNDING)
    tell('stepsize within its limit', seen, is_below)
  is_sampled = not guarantee.is_plain_gd(config, task)
  if config.method.estimator in ('sgd', 'page', 'mvr') and is_sampled:
    noisy = config.task.dropout > 0 and 'accuracy' in ''.join(
        finished.run.metrics[-1]
    )
    seen = 'f is taken without dropout' if noisy else 'no noise but the draw'
    tell('minibatch gradients unbiased for f', seen, not noisy)
    is_fresh = guarantee.draws_afresh(task)
    seen = 'drawn with replacement' if is_fresh else 'epochs of a shuffle'
    tell('minibatches independent', seen, is_fresh)
  is_bounded = task.lower_bound is not None
  least = f'by {found.lower_bound:.6g}'
  least += '' if is_bounded else ', the least seen'
  tell('f bounded below', least, is_bounded)
  seen = f'L of Hessians and differences at most {found.smoothness:.4g}'
  is_smooth = True
  if task.criterion == 'absolute':
    seen, is_smooth = 'the loss has kinks', False
  elif task.smoothness is not None:
    seen += f', known {task.smoothness:.4g}'
    is_smooth = found.smoothness <= task.smoothness * (1 + 1e-3)
  tell('smooth: one L for the path', seen, is_smooth)
  tell('PL on the path (not needed)', f'mu at most {found.pl:.3g}', None)
  is_convex = found.least_curvature >= -1e-6 * found.smoothness
  seen = f'least curvature seen {found.least_curvature:.3g}'
  seen += ': so far it is' if is_convex else ': it is not'
  tell('convex on the path (not needed)', seen, None)
  return rows


def _bound_rows(
    finished: runs.Finished, bound: guarantee.Bound
) -> list[dict[str, Any]]:
  steps, norms, means, _ = measured(finished.run, bound.period)
  chosen = np.unique(np.geomspace(1, len(steps) - 1, 8).round().astype(int))
  rows = []
  for i in chosen:
    row = {
        'steps': int(steps[i]),
        'squared gradient norm': norms[i],
        _mean_name(bound): means[i],
    }
    if bound.curve is not None:
      value = float(bound.curve(steps[i]))
      name = 'reference' if bound.reason else 'bound (estimate)'
      row |= {name: value, f'{name.split()[0]} / mean': value / means[i]}
    rows.append(row)
  return rows


def _mean_name(bound: guarantee.Bound) -> str:
  """Returns what the mean is over."""
  if bound.period == 1:
    return 'mean so far'
  return f'mean over starts of links ({bound.period} steps each)'


def _notes(finished: runs.Finished, bound: guarantee.Bound) -> list[str]:
  seen = measured(finished.run, bound.period)
  notes = []
  if bound.reason:
    shown = f' Shown beside it: {bound.label}.' if bound.curve else ''
    notes.append(f'No guarantee speaks of this run: {bound.reason}.{shown}')
  else:
    assert bound.curve is not None
    values = bound.curve(seen.steps[1:])
    held = np.all(seen.means[1:] <= values)
    notes += [
        f'{bound.theorem} with estimated constants'
        + (' lies above' if held else ' does NOT lie above')
        + f' the measured {_mean_name(bound)} at every evaluation; at the end'
        f' it is {values[-1] / seen.means[-1]:.3g} times as large.',
        'L and the L_l are seen from below, Lbar, sigma^2, A, B and C from'
        ' samples on the path, mu from above and, without a known lower bound of'
        ' f, D0 from below: the bound printed is an estimate. It is of an'
        ' expectation; the run is one draw.',
    ]
  if not seen.is_exact:
    notes.append(
        'Between evaluations the mean is trapezoidal; training.num_evals'
        f'={int(seen.steps[-1]) // bound.period} logs every one.'
    )
  return notes


def _doubts(rows: list[dict[str, Any]], bound: guarantee.Bound) -> list[str]:
  """Returns which assumptions of a guarantee did not hold, in one sentence."""
  missed = [row['assumption'] for row in rows if row['held'] == 'no']
  if not bound.theorem or bound.reason or not missed:
    return []
  return [
      f'Not all that {bound.theorem} assumes held, so it does not speak of this'
      f' run strictly: no {", no ".join(repr(name) for name in missed)}.'
  ]


def _figure(
    finished: runs.Finished, bound: guarantee.Bound
) -> matplotlib.figure.Figure:
  steps, norms, means, _ = measured(finished.run, bound.period)
  figure = matplotlib.figure.Figure(figsize=(7.2, 4.4), layout='constrained')
  panel = figure.subplots()
  last = len(steps) - 2  # The last point is the one that is compared.
  places = np.geomspace(1, last + 1, 9).round().astype(int) - 1
  many = {'markersize': 4, 'markevery': sorted({*places.tolist(), last})}
  panel.plot(
      steps[1:],
      means[1:],
      label=f'run: {_mean_name(bound)}',
      **many,
      **figures.style(0),
  )
  panel.plot(
      steps[1:],
      norms[1:],
      label='run: at the step',
      linewidth=1,
      **many,
      **figures.style(3),
  )
  if bound.curve is not None:
    panel.plot(
        steps[1:],
        bound.curve(steps[1:]),
        label=bound.label,
        **many,
        **figures.style(1),
    )
  panel.set_xscale('log')
  panel.set_yscale('log')
  panel.xaxis.set_minor_formatter(ticker.NullFormatter())
  panel.set_xlabel('steps')
  panel.set_ylabel('squared gradient norm, trained leaves')
  config = finished.run.config
  title = f'{config["task"]["name"]}: {labels.name(config)}'
  panel.set_title(
      title
      if bound.curve is not None
      else f'{title}\n(no bound: {bound.reason})',
      fontsize=10,
  )
  figures.grid(panel)
  panel.legend(fontsize=9)
  return figure
