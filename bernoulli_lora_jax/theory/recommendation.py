"""The p, the stepsize and the steps with which a guarantee meets a target.

lmin is the least of functions linear in p = P(left): for one matrix its best p is
0 or 1, with lmin a trained number 1/(mn) on either side; for matrices of several
shapes under one p the best may lie between. Symbols as in `bounds`.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from bernoulli_lora_jax import chain
from bernoulli_lora_jax import checks
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax import stepsizes
from bernoulli_lora_jax.theory import bounds

_POWERS = 53  # Steps are sought up to 2^52.
_MOST_STEPS = 2.0 ** (_POWERS - 1)


class Recommendation(NamedTuple):
  """What a guarantee asks for to reach a target."""

  prob: float  # P(left).
  stepsize: float  # gamma
  num_steps: int  # Least T whose bound is at most the target.
  lmin: float
  lmax: float
  trained: float  # Mean trained numbers a step, over all matrices.

  @property
  def lmin_per_number(self) -> float:
    """lmin over the trained numbers; 1/(mn) for one matrix and any p."""
    return self.lmin / self.trained


def recommend(
    shapes: Sequence[tuple[int, int]],
    *,
    rank: int | Sequence[int],
    target: float,
    estimator: str = 'gd',
    chain_prob: float | None = None,
    sketch: sketches.Sketch | None = None,
    all_trained: bool = True,
    **constants: Any,
) -> Recommendation:
  """Returns the p, the stepsize and the steps with which a bound meets a target.

  lmin is the least of functions linear in p: for one matrix its best p is 0 or 1,
  for matrices of several shapes it may lie between, at a crossing of two of them.
  The stepsize is the one of fewest steps among the limit and its parts
  2^(-j/8): below a floor that grows with gamma (sgd, qgd) the limit is too long.

  Args:
    shapes: (m, n) of each matrix.
    rank: dimension of the subspaces, one for all or one for each matrix.
    target: > 0; of the mean squared gradient norm, with pl of the gap.
    estimator: a name of `bounds.METHODS`.
    chain_prob: P(left) if it is decided; None for the best.
    sketch: law of the subspaces, default `sketches.gaussian()`.
    all_trained: see `bounds.spectrum`.
    **constants: of the estimator's bound, without num_steps, stepsize, lmin and
      lmax; `prob` is q of PAGE and MARINA.

  Returns:
    The `Recommendation` of fewest steps; among equals, of fewest numbers.

  Raises:
    ValueError: an unknown estimator, constants that its bound does not take or
      lacks, one outside its range, or a target below the floor that the bound
      has at every stepsize tried (2^-20 of the limit is the smallest).
  """
  checks.that(
      estimator in bounds.METHODS,
      f'estimator in {tuple(bounds.METHODS)}',
      estimator=estimator,
  )
  checks.that(0 < target < math.inf, 'target > 0', target=target)
  bounds.check_constants(bounds.METHODS[estimator][1], estimator, constants)
  best: tuple[tuple[float, ...], Recommendation] | None = None
  if chain_prob is None:
    probs = _probs(shapes, rank, sketch)
  else:
    probs = [chain_prob]
  for p in probs:
    found = bounds.spectrum(
        shapes, rank=rank, prob=p, sketch=sketch, all_trained=all_trained
    )
    if found.lmin <= 0:
      continue
    chosen = _fewest_steps(estimator, constants, found, target)
    if chosen is None:
      continue
    stepsize, num_steps = chosen
    ranks = stepsizes.one_each('rank', rank, len(shapes))
    trained = sum(
        chain.trained_parameters(m, n, rank=r, prob=p)
        for (m, n), r in zip(shapes, ranks, strict=True)
    )
    one = Recommendation(
        p, stepsize, num_steps, found.lmin, found.lmax, trained
    )
    order = (num_steps, trained)
    if best is None or order < best[0]:
      best = order, one
  if best is None:
    if estimator in ('sgd', 'mvr', 'qgd'):
      raise ValueError(
          f'Expected a target above the floor of the bound of {estimator}, got'
          f' target={target}: lower the noise (a larger minibatch, a momentum'
          ' nearer to 1).'
      )
    raise ValueError(
        f'Expected a target that {estimator} reaches within {_MOST_STEPS:.0e}'
        f' steps, got target={target}.'
    )
  return best[1]


def _fewest_steps(
    estimator: str,
    constants: dict[str, Any],
    found: bounds.Spectrum,
    target: float,
) -> tuple[float, int] | None:
  """Returns (stepsize, T) of fewest steps, None where no T reaches the target."""
  limit_of, bound = bounds.METHODS[estimator]
  known = {'lmin': found.lmin, 'lmax': found.lmax, **constants}
  bound_at = lambda steps, gamma: bounds.call(
      bound, known | {'num_steps': steps, 'stepsize': gamma}
  )
  limit = bounds.call(limit_of, known | {'num_steps': 1})
  best = None
  for j in range(161):
    gamma = limit * 2 ** (-j / 8)
    grid = 2 ** np.arange(_POWERS)
    if estimator == 'qgd' and constants.get('pl') is None:
      # The stepsize decides how long it is allowed.
      slope = _qgd_slope(constants)
      if slope > 0:
        longest = 1 / (constants['smoothness'] * found.lmax * slope * gamma**2)
        grid = grid[grid <= longest]
        grid = np.append(grid, int(longest)) if longest >= 1 else grid
    if not grid.size:
      continue
    reached = np.flatnonzero(bound_at(grid, gamma) <= target)
    if not reached.size:
      continue
    high = int(grid[reached[0]])
    low = int(grid[reached[0] - 1]) if reached[0] else 0
    while high - low > 1:
      middle = (low + high) // 2
      if bound_at(middle, gamma) <= target:
        high = middle
      else:
        low = middle
    if best is None or high < best[1]:
      best = gamma, high
  return best


def _qgd_slope(constants: dict[str, Any]) -> float:
  """Returns A of T5, omega max_l w_l L_l."""
  pairs = stepsizes.clients(
      constants['client_smoothness'], constants.get('weights')
  )
  return constants['omega'] * max(w * each for w, each in pairs)


def _probs(
    shapes: Sequence[tuple[int, int]], rank: Any, sketch: Any
) -> list[float]:
  """Returns where a best p may lie: ends, crossings, and a grid between."""
  ends = [
      stepsizes.matrix_eigenvalues(shapes, rank=rank, prob=p, sketch=sketch)
      for p in (0.0, 1.0)
  ]
  lines = {
      (zero[i], one[i]) for zero, one in zip(*ends, strict=True) for i in (0, 1)
  }
  found = {0.0, 1.0}
  if len(lines) > 1:
    found |= set(np.linspace(0, 1, 41).tolist())
  for zero, one in lines:
    for other_zero, other_one in lines:
      turn = (one - zero) - (other_one - other_zero)
      if turn:
        crossing = (other_zero - zero) / turn
        if 0 < crossing < 1:
          found.add(crossing)
  return sorted(found)
