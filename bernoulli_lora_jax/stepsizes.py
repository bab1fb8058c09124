"""The largest stepsizes that T1-T8 allow, from named constants.

Symbols, in the order of the README's table: `smoothness` L, `mean_smoothness`
Lbar (mean-square smoothness of the samples), `lmin` and `lmax` the extreme
eigenvalues lambda of E[H] over the trained matrices (see `chain_eigenvalues`),
kappa = lmax / lmin, `prob` q of PAGE, `momentum` 1 - b of MVR, `pl` the
Polyak-Lojasiewicz constant mu (f - f* <= ||grad||^2 / (2 mu)); with `pl` given
each function returns the stepsize of the linear rate. Federated: f = sum_l w_l f_l,
`client_smoothness` the L_l, `weights` the w_l (1/M by default), `omega` and `beta`
the compressor's.

References: Sokolov et al., Bernoulli-LoRA, arXiv 2508.03820, with the constants
derived anew; Li et al., PAGE, arXiv 2008.10898.
"""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import sketches


def matrix_eigenvalues(
    shapes: Sequence[tuple[int, int]],
    *,
    rank: int | Sequence[int],
    prob: float | Sequence[float],
    sketch: sketches.Sketch | None = None,
) -> list[tuple[float, float]]:
  """Returns the extreme eigenvalues of E[H] for each matrix.

  Args:
    shapes: (m, n) of each matrix.
    rank: dimension of the subspaces, clipped to each side; one for all or one
      for each matrix.
    prob: P(left), in [0, 1]; one for all or one for each.
    sketch: law of the subspaces, default `sketches.gaussian()`.

  Returns:
    (low, high) of each matrix: prob low_m + (1 - prob) low_n, for isotropic
    sketches both prob min(rank, m)/m + (1 - prob) min(rank, n)/n.

  Raises:
    ValueError: no shapes, a rank below 1, a prob outside [0, 1], or another number
      of ranks or probs.
  """
  checks.that(len(shapes) > 0, 'at least one shape', shapes=shapes)
  ranks = one_each('rank', rank, len(shapes))
  probs = one_each('prob', prob, len(shapes))
  sketch = sketches.gaussian() if sketch is None else sketch
  side = lambda dim, r: (
      (1.0, 1.0) if r >= dim else sketch.mean_eigenvalues(dim, r)
  )
  found = []
  for (m, n), r, p in zip(shapes, ranks, probs, strict=True):
    checks.that(m >= 1 and n >= 1, 'shapes of positive lengths', shape=(m, n))
    is_whole = isinstance(r, (int, np.integer)) and not isinstance(r, bool)
    checks.that(bool(is_whole and r >= 1), 'rank >= 1, a whole number', rank=r)
    checks.that(0 <= p <= 1, 'prob in [0, 1]', prob=p)
    left, right = side(m, r), side(n, r)
    low, high = (p * left[i] + (1 - p) * right[i] for i in (0, 1))
    found.append((low, high))
  return found


def chain_eigenvalues(
    shapes: Sequence[tuple[int, int]],
    *,
    rank: int | Sequence[int],
    prob: float | Sequence[float],
    all_trained: bool = True,
    sketch: sketches.Sketch | None = None,
) -> tuple[float, float]:
  """Returns (lmin, lmax) of a tree of matrices.

  Args:
    shapes: (m, n) of each matrix.
    rank: as for `matrix_eigenvalues`, like prob and sketch.
    prob: P(left).
    all_trained: False when other leaves are trained in full beside the chain;
      they count with lambda = 1.
    sketch: law of the subspaces.

  Returns:
    The least and largest over matrices.

  Raises:
    ValueError: see `matrix_eigenvalues`.
  """
  each = matrix_eigenvalues(shapes, rank=rank, prob=prob, sketch=sketch)
  if not all_trained:
    each = [*each, (1.0, 1.0)]
  return min(low for low, _ in each), max(high for _, high in each)


def gd(*, smoothness: float) -> float:
  """Returns 1/L (T1, with and without PL)."""
  checks.positive(smoothness=smoothness)
  return 1 / smoothness


def sgd(
    *,
    smoothness: float,
    lmin: float,
    lmax: float,
    growth: float = 1.0,
    slope: float = 0.0,
    num_steps: int | None = None,
    bounded_variance: bool = False,
    pl: float | None = None,
) -> float:
  """Returns the stepsize of T2.

  The gradients satisfy E||g||^2 <= 2 A (f - f_inf) + B ||grad||^2 + C.

  Args:
    smoothness: L > 0.
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].
    growth: B >= 0; with bounded_variance, B >= 1.
    slope: A >= 0.
    num_steps: T; where A > 0 the stepsize is also at most
      1 / sqrt(L lmax A T), so that (1 + a)^T <= e.
    bounded_variance: the bound holds for E||g - grad||^2 with B - 1 in place of
      B: 1 / (L (1 + (B - 1) kappa)) then suffices.
    pl: mu; the stepsize is also at most mu lmin / (2 L A lmax).

  Returns:
    The largest stepsize that all conditions given allow.

  Raises:
    ValueError: a constant outside its range.
  """
  checks.positive(smoothness=smoothness)
  check_lambdas(lmin, lmax)
  checks.at_least(0, slope=slope)
  if bounded_variance:
    checks.that(1 <= growth < math.inf, 'growth >= 1 and finite', growth=growth)
    bounds = [1 / (smoothness * (1 + (growth - 1) * lmax / lmin))]
  else:
    checks.positive(growth=growth)
    bounds = [lmin / (smoothness * growth * lmax)]
  if slope > 0 and num_steps is not None:
    checks.positive(num_steps=num_steps)
    bounds.append(1 / math.sqrt(smoothness * lmax * slope * num_steps))
  if slope > 0 and pl is not None:
    checks.positive(pl=pl)
    bounds.append(pl * lmin / (2 * smoothness * slope * lmax))
  return min(bounds)


def page(
    *,
    smoothness: float,
    mean_smoothness: float,
    lmax: float,
    prob: float,
    batch_size: int,
    num_samples: int | None = None,
    lmin: float | None = None,
    pl: float | None = None,
) -> float:
  """Returns the stepsize of T3.

  1 / (L + Lbar sqrt(lmax (1 - q) / (q b'))), with the factor 2 inside the root
  and at most q / (2 mu lmin) under PL.

  Args:
    smoothness: L > 0.
    mean_smoothness: Lbar >= 0.
    lmax: largest eigenvalue of E[H], in (0, 1].
    prob: q in (0, 1].
    batch_size: b' >= 1.
    num_samples: N, given when minibatches are drawn without replacement: b' is
      then replaced by b' (N - 1) / (N - b').
    lmin: least eigenvalue of E[H]; needed with pl.
    pl: mu.

  Returns:
    The largest stepsize that T3 allows.

  Raises:
    ValueError: a constant outside its range.
  """
  checks.positive(smoothness=smoothness, batch_size=batch_size)
  checks.at_least(0, mean_smoothness=mean_smoothness)
  checks.within('(0, 1]', prob=prob, lmax=lmax)
  inverse_batch = 1 / batch_size
  if num_samples is not None:
    checks.that(
        batch_size <= num_samples < math.inf,
        'num_samples >= batch_size and finite',
        num_samples=num_samples,
        batch_size=batch_size,
    )
    if num_samples > 1:
      inverse_batch *= (num_samples - batch_size) / (num_samples - 1)
  factor = 1 if pl is None else 2
  root = math.sqrt(factor * lmax * (1 - prob) * inverse_batch / prob)
  return _with_pl(1 / (smoothness + mean_smoothness * root), prob, lmin, pl)


def mvr(
    *,
    smoothness: float,
    mean_smoothness: float,
    lmax: float,
    momentum: float,
    lmin: float | None = None,
    pl: float | None = None,
) -> float:
  """Returns the stepsize of T4, with b = 1 - momentum.

  1 / (L + Lbar sqrt(2 lmax (1 - b)^2 / (b (2 - b)))), with 4 in place of 2 and
  at most b (2 - b) / (2 mu lmin) under PL.

  Args:
    smoothness: L > 0.
    mean_smoothness: Lbar >= 0.
    lmax: largest eigenvalue of E[H], in (0, 1].
    momentum: 1 - b in [0, 1).
    lmin: least eigenvalue of E[H]; needed with pl.
    pl: mu.

  Returns:
    The largest stepsize that T4 allows.

  Raises:
    ValueError: a constant outside its range.
  """
  checks.positive(smoothness=smoothness)
  checks.at_least(0, mean_smoothness=mean_smoothness)
  checks.within('[0, 1)', momentum=momentum)
  checks.within('(0, 1]', lmax=lmax)
  b = 1 - momentum
  factor = 2 if pl is None else 4
  root = math.sqrt(factor * lmax * momentum**2 / (b * (2 - b)))
  return _with_pl(
      1 / (smoothness + mean_smoothness * root), b * (2 - b), lmin, pl
  )


def qgd(
    *,
    smoothness: float,
    client_smoothness: Sequence[float],
    omega: float,
    lmin: float,
    lmax: float,
    num_steps: int,
    weights: Sequence[float] | None = None,
    pl: float | None = None,
) -> float:
  """Returns the stepsize of T5: T2 with A = omega max_l(w_l L_l), B = 1.

  With equal weights A = omega Lmax / M.

  Args:
    smoothness: L > 0, of f.
    client_smoothness: L_l > 0 of each client.
    omega: of the compressor, >= 0.
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].
    num_steps: T >= 1.
    weights: w_l >= 0, normalised to sum 1; None for 1/M.
    pl: mu; the stepsize is then at most mu lmin / (2 L A lmax), whatever T.

  Returns:
    min{1/L, 1/sqrt(L A lmax T)}, under PL min{1/L, mu lmin / (2 L A lmax)}. The
    bounded-variance form of T2 with B = 1.

  Raises:
    ValueError: a constant outside its range.
  """
  checks.at_least(0, omega=omega)
  pairs = clients(client_smoothness, weights)
  return sgd(
      smoothness=smoothness,
      lmin=lmin,
      lmax=lmax,
      slope=omega * max(w * each for w, each in pairs),
      num_steps=num_steps if pl is None else None,
      bounded_variance=True,
      pl=pl,
  )


def marina(
    *,
    smoothness: float,
    client_smoothness: Sequence[float],
    omega: float,
    prob: float,
    lmax: float,
    weights: Sequence[float] | None = None,
    lmin: float | None = None,
    pl: float | None = None,
) -> float:
  """Returns the stepsize of T6.

  1 / (L + sqrt(lmax (1 - q) omega sum_l w_l^2 L_l^2 / q)), with the factor 2
  inside the root and at most q / (2 mu lmin) under PL. With equal weights the sum
  is Lt^2 / M. With L in place of Lt opposed clients diverge.

  Args:
    smoothness: L > 0, of f.
    client_smoothness: L_l > 0 of each client.
    omega: of the compressor, >= 0.
    prob: q in (0, 1].
    lmax: largest eigenvalue of E[H], in (0, 1].
    weights: w_l >= 0, normalised to sum 1; None for 1/M.
    lmin: least eigenvalue of E[H]; needed with pl.
    pl: mu.

  Returns:
    The largest stepsize that T6 allows.

  Raises:
    ValueError: a constant outside its range.
  """
  checks.positive(smoothness=smoothness)
  checks.at_least(0, omega=omega)
  checks.within('(0, 1]', prob=prob, lmax=lmax)
  total = sum(
      (w * each) ** 2 for w, each in clients(client_smoothness, weights)
  )
  factor = 1 if pl is None else 2
  root = math.sqrt(factor * lmax * (1 - prob) * omega * total / prob)
  return _with_pl(1 / (smoothness + root), prob, lmin, pl)


def ef21(
    *,
    smoothness: float,
    client_smoothness: Sequence[float],
    beta: float,
    lmax: float,
    weights: Sequence[float] | None = None,
    lmin: float | None = None,
    pl: float | None = None,
) -> float:
  """Returns the stepsize of T7.

  1 / (L + Lt sqrt(lmax beta' / theta)) with theta = 1 - sqrt(1 - beta),
  beta' = (1 - beta) / theta and Lt^2 = sum_l w_l L_l^2; with the factor 2 inside
  the root and at most theta / (2 mu lmin) under PL.

  Args:
    smoothness: L > 0, of f.
    client_smoothness: L_l > 0 of each client.
    beta: of the compressor, in (0, 1].
    lmax: largest eigenvalue of E[H], in (0, 1].
    weights: w_l >= 0, normalised to sum 1; None for 1/M.
    lmin: least eigenvalue of E[H]; needed with pl.
    pl: mu.

  Returns:
    The largest stepsize that T7 allows.

  Raises:
    ValueError: a constant outside its range.
  """
  checks.positive(smoothness=smoothness)
  checks.within('(0, 1]', beta=beta)
  checks.within('(0, 1]', lmax=lmax)
  total = sum(w * each**2 for w, each in clients(client_smoothness, weights))
  theta = beta / (1 + math.sqrt(1 - beta))  # 1 - sqrt(1 - beta), exactly.
  factor = 1 if pl is None else 2
  root = math.sqrt(factor * lmax * (1 - beta) * total) / theta
  return _with_pl(1 / (smoothness + root), theta, lmin, pl)


def nonsmooth(
    *,
    distance: float,
    lipschitz: float,
    lmin: float,
    lmax: float,
    num_steps: int,
) -> float:
  """Returns the best constant stepsize of T8 for convex Lipschitz objectives.

  It minimises R0^2 / (2 gamma lmin T) + gamma L0^2 kappa / 2; for isotropic
  E[H] = alpha I this is R0 / (L0 sqrt(alpha T)).

  Args:
    distance: R0 = ||W_0 - W*||_F > 0.
    lipschitz: L0 > 0, a bound of the subgradients' Frobenius norm.
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].
    num_steps: T >= 1.

  Returns:
    R0 / (L0 sqrt(lmax T)).

  Raises:
    ValueError: a constant outside its range.
  """
  checks.positive(distance=distance, lipschitz=lipschitz, num_steps=num_steps)
  check_lambdas(lmin, lmax)
  return distance / (lipschitz * math.sqrt(lmax * num_steps))


def polyak_damping(*, lmin: float, lmax: float) -> float:
  """Returns 1 / kappa, by which T8 multiplies Polyak's step.

  Polyak's step itself is optax's, before the projection and uncapped, with f*
  given, so that it sees the unprojected norm:

      optax.chain(
          optax.scale_by_polyak(f_min=f_star, max_learning_rate=jnp.inf),
          bl.scale_by_bernoulli_chain(key, rank=r),
          optax.scale(-bl.stepsizes.polyak_damping(lmin=lmin, lmax=lmax)))

  whose update takes `value=f(W)`. Isotropic sketches need no damping.

  Args:
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].

  Returns:
    lmin / lmax.

  Raises:
    ValueError: a constant outside its range.
  """
  check_lambdas(lmin, lmax)
  return lmin / lmax


def _with_pl(
    stepsize: float, rate: float, lmin: float | None, pl: float | None
) -> float:
  """Applies gamma <= rate / (2 mu lmin), the condition of the PL forms."""
  if pl is None:
    return stepsize
  if lmin is None:
    raise ValueError('Expected lmin with pl, got lmin=None.')
  checks.positive(pl=pl, lmin=lmin)
  return min(stepsize, rate / (2 * pl * lmin))


def clients(
    smoothness: Sequence[float], weights: Sequence[float] | None
) -> list[tuple[float, float]]:
  """Returns (w_l, L_l) of each client, the weights of sum 1."""
  checks.that(
      np.ndim(smoothness) == 1
      and len(smoothness) > 0
      and all(0 < each < math.inf for each in smoothness),
      'client_smoothness > 0 and finite, one a client',
      client_smoothness=smoothness,
  )
  weights = [1.0] * len(smoothness) if weights is None else weights
  checks.that(
      len(weights) == len(smoothness)
      and all(0 <= w < math.inf for w in weights)
      and sum(weights) > 0,
      f'weights: {len(smoothness)} finite numbers >= 0, not all zero',
      weights=weights,
  )
  total = sum(weights)
  return [
      (w / total, each) for w, each in zip(weights, smoothness, strict=True)
  ]


def one_each(name: str, value: Any, count: int) -> list[Any]:
  """Returns a value for each of `count` matrices."""
  if np.ndim(value) == 0:
    return [value] * count
  checks.that(len(value) == count, f'{count} values of {name}', **{name: value})
  return list(value)


def check_lambdas(lmin: float, lmax: float) -> None:
  """Raises ValueError unless 0 < lmin <= lmax <= 1."""
  checks.that(
      0 < lmin <= lmax <= 1, '0 < lmin <= lmax <= 1', lmin=lmin, lmax=lmax
  )
