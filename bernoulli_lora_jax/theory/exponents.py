"""Exponents of a grid of gaps, gap = c r^a N^b, with bootstrapped intervals."""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np
import scipy.stats

from bernoulli_lora_jax import checks


class Interval(NamedTuple):
  """An estimate with its bootstrap standard error and confidence interval."""

  value: float
  error: float
  low: float
  high: float


class Fit(NamedTuple):
  """gap = centre (r / r0)^rank (N / N0)^size, r0 and N0 geometric means."""

  rank: Interval
  size: Interval
  centre: Interval


def fit_exponents(
    gaps: np.ndarray,
    ranks: Sequence[int],
    sizes: Sequence[int],
    *,
    statistic: str = 'mean',
    level: float = 0.95,
    num_bootstraps: int = 400,
    seed: int = 0,
) -> Fit:
  """Fits gap = c r^a N^b over the cells of a grid.

  The mean is fitted in its own units by weighted nonlinear least squares, so
  cells whose mean is negative by chance count like others and nothing is
  dropped; the weights are those of a smoothed standard deviation of the cells,
  the power law of statistic 'sd'. Where the gap is no power law the exponents
  are thus those of the cells that are measured best, mostly the small samples.
  Statistic 'sd', the spread of single runs, is positive and fitted by least
  squares in logarithms.

  Args:
    gaps: (ranks, sizes, draws).
    ranks: two or more, rising.
    sizes: two or more, rising.
    statistic: 'mean' or 'sd' over the draws.
    level: of the intervals, in (0, 1).
    num_bootstraps: resamples of the draws, whole grids at a time, >= 2.
    seed: of the resamples.

  Returns:
    `Fit`; intervals are value -+ t error with Student's t of draws - 1 degrees
    of freedom and the bootstrap's standard error.

  Raises:
    ValueError: arguments outside their range or of another shape, or gaps that
      are not finite.
  """
  gaps = np.asarray(gaps, np.float64)
  for name, values in (('ranks', ranks), ('sizes', sizes)):
    check_rising(name, values)
    if len(values) < 2:
      raise ValueError(f'Expected two {name} or more, got {name}={values}.')
  if gaps.shape[:-1] != (len(ranks), len(sizes)) or gaps.shape[-1] < 3:
    raise ValueError(
        f'Expected gaps of shape ({len(ranks)}, {len(sizes)}, draws >= 3), got'
        f' {gaps.shape}.'
    )
  if not np.all(np.isfinite(gaps)):
    raise ValueError('Expected finite gaps, got some that are not.')
  is_known = statistic in ('mean', 'sd')
  checks.that(is_known, "statistic 'mean' or 'sd'", statistic=repr(statistic))
  checks.within('(0, 1)', level=level)
  checks.at_least(2, num_bootstraps=num_bootstraps)
  num_draws = gaps.shape[-1]
  x, z = (np.log(v) - np.mean(np.log(v)) for v in (ranks, sizes))
  design = np.stack(
      [np.ones(gaps[..., 0].size), np.repeat(x, len(z)), np.tile(z, len(x))], -1
  )
  flat = gaps.reshape(-1, num_draws)
  picks = np.random.default_rng(seed).integers(
      num_draws, size=(num_bootstraps, num_draws)
  )
  picks = np.concatenate(
      [np.arange(num_draws)[None], picks]
  )  # First: the data.
  resampled = flat.T[picks]  # (1 + bootstraps, draws, cells)
  tiny = 1e-9 * max(np.abs(flat).max(), np.finfo(float).tiny)
  if statistic == 'sd':
    spread = np.maximum(resampled.std(1, ddof=1), tiny)
    values = np.log(spread) @ np.linalg.pinv(design).T
    values[:, 0] = np.exp(values[:, 0])
  else:
    spread = np.log(np.maximum(flat.std(1, ddof=1), tiny))
    smooth = np.exp(design @ (np.linalg.pinv(design) @ spread))
    values = _fit_mean(resampled.mean(1), design, smooth)
  error = values[1:].std(0, ddof=1) * math.sqrt(num_draws / (num_draws - 1))
  half = scipy.stats.t.ppf((1 + level) / 2, num_draws - 1) * error
  centre, rank, size = (
      Interval(*map(float, row))
      for row in np.transpose(
          [values[0], error, values[0] - half, values[0] + half]
      )
  )
  return Fit(rank, size, centre)


def _fit_mean(
    means: np.ndarray, design: np.ndarray, spread: np.ndarray
) -> np.ndarray:
  """Returns (fits, 3): c, a, b of c exp(a x + b z), by Levenberg-Marquardt.

  Args:
    means: (fits, cells).
    design: (cells, 3), rows (1, x, z).
    spread: (cells,), what residuals are divided by.
  """
  scale = np.maximum(np.abs(means).max(1, keepdims=True), np.finfo(float).tiny)
  means = means / scale
  weights = spread.min() / spread

  def residuals(theta):
    # Steps that are tried far out must not overflow; they are refused.
    power = np.exp(np.clip(theta[:, 1:] @ design[:, 1:].T, -50, 50))
    return weights * (theta[:, :1] * power - means), power

  logs = np.log(np.maximum(means, 1e-3))
  theta = logs @ np.linalg.pinv(design).T
  theta[:, 0] = np.exp(theta[:, 0])
  damping = np.full(len(means), 1e-3)
  error, power = residuals(theta)
  for _ in range(100):
    # d/dc, d/da, d/db of the model: its power times 1, c x, c z.
    inner = np.where(np.arange(3) == 0, 1.0, theta[:, :1])[:, None]
    jacobian = (weights * power)[..., None] * (inner * design)
    gram = jacobian.mT @ jacobian
    slope = (jacobian.mT @ error[..., None])[..., 0]
    diagonal = np.einsum('fii->fi', gram) + 1e-12
    damped = gram + damping[:, None, None] * (diagonal[..., None] * np.eye(3))
    move = np.linalg.solve(damped, slope[..., None])[..., 0]
    if np.all(np.abs(move) <= 1e-10 * (np.abs(theta) + 1e-3)):
      break
    trial = theta - move
    new_error, new_power = residuals(trial)
    is_better = np.sum(new_error**2, 1) < np.sum(error**2, 1)
    theta = np.where(is_better[:, None], trial, theta)
    error = np.where(is_better[:, None], new_error, error)
    power = np.where(is_better[:, None], new_power, power)
    damping = np.clip(np.where(is_better, damping / 5, damping * 5), 1e-9, 1e9)
  theta[:, 0] *= scale[:, 0]
  return theta


def check_rising(name: str, values: Sequence[int]) -> None:
  """Raises ValueError unless integers rise from 1 or more."""
  found = np.asarray(values)
  is_whole = found.ndim == 1 and np.issubdtype(found.dtype, np.integer)
  if not (
      is_whole and found.size and found[0] >= 1 and np.all(np.diff(found) > 0)
  ):
    raise ValueError(
        f'Expected {name} to rise from 1 or more, in whole numbers, got'
        f' {name}={tuple(values)}.'
    )
