"""Bounds and recommendations for matrices of given shapes, as tables."""

import collections
from collections.abc import Sequence
import re
from typing import Any

import matplotlib.figure
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax.studies import study
from bernoulli_lora_jax.theory import bounds
from bernoulli_lora_jax.theory import recommendation
from bernoulli_lora_jax.training import figures

_THEOREMS = {
    **bounds.THEOREMS,
    'nonsmooth': 'T8, constant step',
    'polyak': "T8, Polyak's step",
}
_FUNCTIONS = {
    **{name: bound for name, (_, bound) in bounds.METHODS.items()},
    'nonsmooth': bounds.nonsmooth,
    'polyak': bounds.polyak,
}
ESTIMATORS = tuple(_THEOREMS)
_PROBS = np.linspace(0, 1, 21)  # Shown beside the best.

Shapes = Sequence[tuple[int, int]]


def parse_shapes(text: str) -> list[tuple[int, int]]:
  """Returns the shapes of '64x64,128x32*12': twelve matrices of 128 x 32.

  Raises:
    ValueError: another form.
  """
  shapes = []
  for part in text.split(','):
    found = re.fullmatch(r'\s*(\d+)x(\d+)(?:\*(\d+))?\s*', part)
    if not found or '0' in found.groups():
      raise ValueError(f'Expected shapes like 64x64,128x32*12, got {part!r}.')
    m, n, count = found.groups()
    shapes += [(int(m), int(n))] * int(count or 1)
  return shapes


def predict(
    shapes: Shapes,
    *,
    estimator: str,
    rank: int,
    prob: float,
    num_steps: Sequence[int],
    stepsize: float | None = None,
    sketch: str = 'gaussian',
    all_trained: bool = True,
    **constants: Any,
) -> study.Study:
  """Returns the bound of an estimator over T.

  Args:
    shapes: of the trained matrices.
    estimator: of `ESTIMATORS`.
    rank: r.
    prob: P(left); the constants of PAGE and MARINA have q as `prob` in
      `bounds`, as `q` here.
    num_steps: T of the table.
    stepsize: gamma; None for the largest that the theorem allows (at the largest
      T, where it depends on it).
    sketch: name of the law of the subspaces.
    all_trained: False where other leaves are trained in full.
    **constants: of the bound.

  Returns:
    Tables of lambda and of the bound; a figure of the bound against T.

  Raises:
    ValueError: a constant that is missing, unknown or outside its range; a
      stepsize above its limit, with the limit.
  """
  checks.one_of(ESTIMATORS, estimator=estimator)
  if not num_steps or min(num_steps) < 1:
    raise ValueError(f'Expected steps >= 1, got steps={list(num_steps)}.')
  num_steps = sorted(set(num_steps))
  found = bounds.spectrum(
      shapes,
      rank=rank,
      prob=prob,
      sketch=sketches.by_name(sketch),
      all_trained=all_trained,
  )
  if estimator == 'polyak' and stepsize is not None:
    raise ValueError(
        f"Expected no stepsize with Polyak's step, got stepsize={stepsize}."
    )
  constants = _with_q(constants, estimator)
  known = {'lmin': found.lmin, 'lmax': found.lmax, **constants}
  bound = _FUNCTIONS[estimator]
  bounds.check_constants(bound, estimator, constants)
  if stepsize is None and estimator != 'polyak':
    stepsize = bounds.largest_stepsize(
        estimator, known | {'num_steps': max(num_steps)}
    )
  at = lambda steps: bounds.call(
      bound, known | {'num_steps': steps, 'stepsize': stepsize}
  )
  values = at(np.asarray(num_steps))
  first = num_steps[0] if len(num_steps) > 1 else max(1, num_steps[0] / 100)
  grid = np.unique(np.geomspace(first, num_steps[-1], 200).round())
  is_gap = constants.get('pl') is not None or estimator in (
      'nonsmooth',
      'polyak',
  )
  what = 'f - f*' if is_gap else 'mean squared gradient norm'
  figure = matplotlib.figure.Figure(figsize=(6, 4), layout='constrained')
  panel = figure.subplots()
  look = _look()
  panel.plot(grid, at(grid), **look | {'marker': ''})
  panel.plot(num_steps, values, **look | {'linestyle': ''})
  panel.set_xscale('log')
  if np.any(values > 0):
    panel.set_yscale('log')
  step = '' if stepsize is None else f', gamma = {stepsize:.4g}'
  title = f'{_THEOREMS[estimator]} ({estimator}), {_told(shapes)}'
  panel.set_title(f'{title}\nrank {rank}, p = {prob:g}{step}', fontsize=10)
  panel.set_xlabel('steps T')
  panel.set_ylabel(f'bound of {what}')
  figures.grid(panel)
  rows = [
      {'steps': int(t), f'bound of {what}': float(value)}
      for t, value in zip(num_steps, values, strict=True)
  ]
  kappa = {'lmin': found.lmin, 'lmax': found.lmax, 'kappa': found.kappa}
  notes = [
      f'{_THEOREMS[estimator]} bounds E[{what}]'
      + (' of the mean iterate' if estimator in ('nonsmooth', 'polyak') else '')
      + f' by {values[-1]:.4g} after {num_steps[-1]:,} steps.'
  ]
  if stepsize is not None:
    kappa['stepsize'] = stepsize
  clipped = [(m, n) for m, n in shapes if rank > min(m, n)]
  if clipped:
    notes.append(
        f'Rank {rank} is clipped to the shorter side of {len(clipped)} of'
        f' {len(shapes)} matrices, whose sketch is the whole space there.'
    )
  return study.Study(
      {'spectrum of E[H]': [kappa], _THEOREMS[estimator]: rows},
      {estimator: figure},
      notes,
  )


def recommend(
    shapes: Shapes,
    *,
    estimator: str,
    rank: int,
    target: float,
    sketch: str = 'gaussian',
    all_trained: bool = True,
    **constants: Any,
) -> study.Study:
  """Returns p, stepsize and steps for a target, beside those of other p.

  Args:
    shapes: of the trained matrices.
    estimator: a name of `bounds.METHODS`.
    rank: r.
    target: of the mean squared gradient norm, with `pl` of the gap.
    sketch: name of the law of the subspaces.
    all_trained: False where other leaves are trained in full.
    **constants: of the bound, q as `q`.

  Returns:
    A table, the best p first, without those of which no T reaches the target; a
    figure of steps and trained numbers against p.

  Raises:
    ValueError: see `recommendation.recommend`.
  """
  arguments: dict[str, Any] = {
      'rank': rank,
      'target': target,
      'estimator': estimator,
      'sketch': sketches.by_name(sketch),
      'all_trained': all_trained,
      **_with_q(constants, estimator),
  }
  best = recommendation.recommend(shapes, **arguments)
  others = []
  for p in _PROBS:
    try:
      others.append(
          recommendation.recommend(shapes, chain_prob=float(p), **arguments)
      )
    except ValueError:
      continue  # The target is below the floor, which kappa and so p moves.
  probs = [one.prob for one in others]
  row = lambda one, name: {
      '': name,
      'p': one.prob,
      'stepsize': one.stepsize,
      'steps': one.num_steps,
      'lmin': one.lmin,
      'kappa': one.lmax / one.lmin,
      'trained numbers a step': one.trained,
      'lmin a number': one.lmin_per_number,
      'trained numbers in all': one.num_steps * one.trained,
  }
  shown = [one for one in others if (4 * one.prob).is_integer()]
  rows = [row(best, 'best')] + [row(one, '') for one in shown]
  figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout='constrained')
  panels = figure.subplots(1, 2)
  for panel, label, of in (
      (panels[0], 'steps', lambda one: one.num_steps),
      (panels[1], 'trained numbers', lambda one: one.num_steps * one.trained),
  ):
    panel.plot(probs, [of(one) for one in others], markersize=4, **_look())
    panel.plot([best.prob], [of(best)], 'k*', markersize=12, label='best')
    panel.set_xlabel('p = P(left)')
    panel.set_ylabel(f'{label} to the target')
    panel.set_ylim(bottom=0)
    panel.grid(True, linewidth=0.4, alpha=0.6)
    panel.legend()
  lmins = [one.lmin for one in others]
  if np.allclose(lmins, best.lmin, rtol=1e-9):
    note = 'lmin is the same for every p here: any p is best.'
  elif best.lmin < max(lmins) * (1 - 1e-9):
    note = (
        f'lmin is largest at another p, {max(lmins):.4g}: longer steps, from a'
        ' smaller lmax or kappa, outweigh it.'
    )
  elif best.prob in (0.0, 1.0):
    note = 'lmin rises towards one side: the best p is an end.'
  else:
    note = 'Shapes differ: the best p lies where their lambdas balance.'
  notes = [
      note,
      f'{best.num_steps:,} steps of {best.trained:g} trained numbers reach the'
      f' target {target:g} with gamma = {best.stepsize:.4g}.',
  ]
  if len(others) < len(_PROBS):
    notes.append(
        f'{len(_PROBS) - len(others)} of {len(_PROBS)} values of p are left out:'
        ' no T of theirs reaches the target.'
    )
  return study.Study({'recommendation': rows}, {estimator: figure}, notes)


def _told(shapes: Shapes) -> str:
  """Returns shapes as `parse_shapes` reads them, the first few."""
  counts = collections.Counter(shapes)
  parts = [
      f'{m}x{n}' + (f'*{count}' if count > 1 else '')
      for (m, n), count in counts.items()
  ]
  return ', '.join(parts[:4]) + (', ...' if len(parts) > 4 else '')


def _look() -> dict[str, Any]:
  return figures.style(0)


def _with_q(constants: dict[str, Any], estimator: str) -> dict[str, Any]:
  """Returns the constants that are given, with q under the name of `bounds`."""
  given = {k: v for k, v in constants.items() if v is not None}
  takes_q = estimator in ('page', 'marina')
  if takes_q and 'q' not in given:
    raise ValueError(f'Expected q for {estimator}, got none.')
  if 'q' in given:
    q = given.pop('q')
    if not takes_q:
      raise ValueError(f'Expected q with page and marina alone, got q={q}.')
    checks.within('(0, 1]', q=q)
    given['prob'] = q
  return given
