"""The constants of the guarantees, estimated on a task without a Hessian.

All functions take a loss or a gradient as a function of the trained leaves.
What is seen along a path bounds a supremum from below (L, Lbar, sigma^2, L_l)
and an infimum from above (mu): estimates, never certificates.

Symbols, as in `bounds`: L, Lbar, sigma^2, mu; A, B and C of
E||g||^2 <= 2 A (f - f_inf) + B ||grad||^2 + C; lambda the eigenvalues of the mean
of H over the links of a run.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax import stepsizes
from bernoulli_lora_jax.theory import lanczos

Grad = Callable[[Any], Any]
BatchGrad = Callable[[Any, Any], Any]  # (params, batch) -> gradient.


def smoothness(
    f: Callable[[Any], jax.Array],
    params: Any,
    key: jax.Array,
    *,
    num_steps: int = 20,
) -> tuple[jax.Array, jax.Array]:
  """Returns the spectral norm of the Hessian and its least eigenvalue.

  By Lanczos on Hessian-vector products. L of f is at least the norm at any
  point, and equals it for quadratics.

  Args:
    f: params -> scalar.
    params: trained leaves.
    key: typed PRNG key of the start.
    num_steps: Hessian-vector products, >= 1.

  Returns:
    (at most ||d^2 f||_2, at least its least eigenvalue), scalars.

  Raises:
    ValueError: num_steps < 1.
  """
  found = lanczos.extremes(
      lanczos.hessian_product(f, params), params, key, num_steps=num_steps
  )
  return jnp.maximum(jnp.abs(found.low), jnp.abs(found.high)), found.low


def local_smoothness(grad: Grad, a: Any, b: Any) -> jax.Array:
  """Returns ||grad(a) - grad(b)|| / ||a - b||, at most L; zero where a = b."""
  return _ratio(_norm_sq(_minus(grad(a), grad(b))), _norm_sq(_minus(a, b)))


def mean_smoothness(grad: BatchGrad, a: Any, b: Any, batches: Any) -> jax.Array:
  """Returns sqrt(mean_i ||g_i(a) - g_i(b)||^2) / ||a - b||, at most Lbar.

  Args:
    grad: (params, batch) -> gradient.
    a: one point.
    b: another.
    batches: arrays with a leading axis of minibatches; of one example each for
      T3, as the run draws them for T4.

  Returns:
    A scalar, zero where a = b.
  """
  moved = lambda batch: _norm_sq(_minus(grad(a, batch), grad(b, batch)))
  return _ratio(jnp.mean(jax.lax.map(moved, batches)), _norm_sq(_minus(a, b)))


class Moments(NamedTuple):
  """Second moments of a minibatch's gradient at a point."""

  second: jax.Array  # E||g||^2
  variance: jax.Array  # E||g - grad||^2
  error: jax.Array  # Standard error of the variance.


def moments(grad: BatchGrad, full: Any, params: Any, batches: Any) -> Moments:
  """Returns the second moments of g at a point, means over given minibatches.

  Args:
    grad: (params, batch) -> gradient.
    full: the whole gradient at params.
    params: the point.
    batches: arrays with a leading axis of at least two minibatches.
  """

  def both(batch):
    g = grad(params, batch)
    return _norm_sq(g), _norm_sq(_minus(g, full))

  second, variance = jax.lax.map(both, batches)
  error = jnp.std(variance, ddof=1) / jnp.sqrt(len(variance))
  return Moments(jnp.mean(second), jnp.mean(variance), error)


class SecondMoment(NamedTuple):
  """A, B and C of E||g||^2 <= 2 A (f - f_inf) + B ||grad||^2 + C."""

  slope: float
  growth: float
  noise: float


def fit_second_moment(
    gaps: Sequence[float],
    norms: Sequence[float],
    seconds: Sequence[float],
) -> SecondMoment:
  """Returns the A, B, C >= 0 that hold at all given points with least excess.

  The sum over points of the right side is minimised under the inequalities, each
  point scaled by its second moment: a linear program.

  Args:
    gaps: f - f_inf >= 0 of each point.
    norms: ||grad||^2 of each point.
    seconds: E||g||^2 of each point; with E||g - grad||^2 the result is
      (A, B - 1, C) of the bounded-variance form.

  Raises:
    ValueError: lengths that differ, or values that are negative or not finite.
  """
  rows = np.stack(
      [
          2 * np.asarray(gaps, float),
          np.asarray(norms, float),
          np.ones(len(gaps)),
      ],
      axis=1,
  )
  values = np.asarray(seconds, float)
  is_valid = np.all(np.isfinite(rows)) and np.all(rows >= 0)
  if not (is_valid and np.all(np.isfinite(values)) and np.all(values >= 0)):
    raise ValueError(
        'Expected gaps, norms and seconds >= 0 and finite, got'
        f' gaps={list(gaps)}, norms={list(norms)}, seconds={list(seconds)}.'
    )
  is_noisy = values > 0  # Elsewhere the inequality holds for every A, B, C.
  if not np.any(is_noisy):
    return SecondMoment(0.0, 0.0, 0.0)
  scaled = rows[is_noisy] / values[is_noisy, None]
  columns = np.maximum(scaled.max(0), 1e-300)  # Of magnitude one.
  scaled = scaled / columns
  found = scipy.optimize.linprog(
      scaled.sum(0), A_ub=-scaled, b_ub=-np.ones(len(scaled))
  )
  if found.x is None:
    raise ValueError(
        f'Expected second moments of comparable size, got {found.message}'
    )
  return SecondMoment(*(found.x / columns).tolist())


def pl_constant(
    gaps: Sequence[float], norms: Sequence[float], *, floor: float = 0.0
) -> float:
  """Returns the least ||grad||^2 / (2 (f - f_best)) along a path.

  Args:
    gaps: f - f_best of each point.
    norms: ||grad||^2 of each point.
    floor: points of gaps no larger are left out; the rounding of f, >= 0.

  Returns:
    An upper bound of mu, as f_best >= f_inf; infinite where no point is
    left.
  """
  pairs = zip(gaps, norms, strict=True)
  return min(
      (norm / (2 * gap) for gap, norm in pairs if gap > floor), default=np.inf
  )


class Realised(NamedTuple):
  """What the links of a run have drawn for one matrix."""

  path: str
  left: float  # Part of the links that fell left.
  mean: float  # Mean eigenvalue of the mean of H.
  low: float  # Least eigenvalue of the mean of H over these links.
  high: float
  exact: tuple[float, float]  # Extreme eigenvalues of E[H].


def realised_eigenvalues(
    key: jax.Array,
    num_links: int,
    found: Sequence[matrices_lib.Matrix],
    *,
    ranks: Sequence[int],
    probs: Sequence[float],
    sketch: sketches.Sketch,
    shared_coin: bool = False,
) -> list[Realised]:
  """Draws the links of a run again and returns the spectrum of their mean.

  A link maps G to H_L G or G H_R, so the mean over links has the eigenvalues
  a_i + b_j, of the sums of the left and of the right projections over their
  number. `low` lies below the exact one by chance where links are few.

  Args:
    key: of the chain, as in its state.
    num_links: links drawn, from the first, >= 1.
    found: the matrices; a stack counts as its entries' mean.
    ranks: of each.
    probs: P(left) of each.
    sketch: law of the subspaces.
    shared_coin: as in the run.

  Returns:
    One `Realised` a matrix.
  """

  def projection(basis, dim, size):
    """Returns (entries, dim, dim), Q Q^T of each entry of a matrix."""
    if basis is None:
      return jnp.broadcast_to(jnp.eye(dim), (size, dim, dim))
    if not sketches.is_frame(basis):
      rows = basis.reshape(size, -1)
      basis = jax.nn.one_hot(rows, dim, axis=1)
    frames = basis.reshape(size, dim, -1)
    return jnp.matmul(frames, frames.mT, precision=sketches.HIGHEST)

  def add(total, link):
    drawn = links_lib.draw_links(
        jax.random.fold_in(key, link),
        found,
        ranks=ranks,
        probs=probs,
        sketch=sketch,
        shared_coin=shared_coin,
    )
    new = []
    for one, m, (left, right, count) in zip(drawn, found, total, strict=True):
      size = m.entries.size
      is_left = one.coin if one.coin is not None else bool(one.is_left)
      coin = jnp.broadcast_to(is_left, m.batch).reshape(size, 1, 1)
      if one.is_left is not False:
        left = left + jnp.where(coin, projection(one.left, m.m, size), 0)
      if one.is_left is not True:
        right = right + jnp.where(coin, 0, projection(one.right, m.n, size))
      new.append((left, right, count + jnp.mean(coin.astype(count.dtype))))
    return new, None

  zeros = [
      (
          jnp.zeros((m.entries.size, m.m, m.m)),
          jnp.zeros((m.entries.size, m.n, m.n)),
          jnp.zeros([]),
      )
      for m in found
  ]
  sums = jax.jit(lambda: jax.lax.scan(add, zeros, jnp.arange(num_links))[0])()
  result = []
  for m, rank, prob, (left, right, count) in zip(
      found, ranks, probs, sums, strict=True
  ):
    ends = [
        np.linalg.eigvalsh(np.asarray(x) / num_links) for x in (left, right)
    ]
    low = np.mean(ends[0][:, 0] + ends[1][:, 0])
    high = np.mean(ends[0][:, -1] + ends[1][:, -1])
    mean = np.mean(ends[0]) + np.mean(ends[1])
    (exact,) = stepsizes.matrix_eigenvalues(
        [(m.m, m.n)], rank=rank, prob=prob, sketch=sketch
    )
    result.append(
        Realised(
            m.path,
            float(count) / num_links,
            float(mean),
            float(low),
            float(high),
            exact,
        )
    )
  return result


def _minus(a: Any, b: Any) -> Any:
  b = matrices_lib.align(a, b, ('one point or gradient', 'the other'))
  return jax.tree.map(jnp.subtract, a, b)


def _norm_sq(tree: Any) -> Any:
  return sum(jax.tree.leaves(jax.tree.map(lambda x: jnp.vdot(x, x), tree)))


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.where(b > 0, jnp.sqrt(a / jnp.where(b > 0, b, 1)), 0.0)
