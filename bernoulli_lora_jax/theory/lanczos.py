"""Extreme eigenvalues of a symmetric operator that is known by its products.

Symbols: A a symmetric linear map of trees of arrays, k steps, V the Krylov basis
and T = V^T A V tridiagonal, whose extreme eigenvalues (Ritz values) lie within
the spectrum of A and approach its ends.

Reference: Golub and Van Loan, Matrix Computations, chapter 10.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices


class Extremes(NamedTuple):
  """Least and largest Ritz value of an operator, with their directions."""

  low: jax.Array  # shape=(), at least the least eigenvalue.
  low_vector: Any  # Tree, of unit norm.
  low_residual: jax.Array  # ||A v - low v||: an eigenvalue is this near.
  high: jax.Array  # shape=(), at most the largest eigenvalue.
  high_vector: Any
  high_residual: jax.Array


def extremes(
    product: Callable[[Any], Any],
    like: Any,
    key: jax.Array,
    *,
    num_steps: int = 30,
) -> Extremes:
  """Returns the ends of the spectrum by Lanczos with full reorthogonalisation.

  Args:
    product: v -> A v, symmetric, trees like `like`; it may be traced.
    like: tree of floating-point arrays or shapes.
    key: typed PRNG key of the Gaussian start.
    num_steps: products, >= 1; clipped to the dimension, at which the result is
      exact to rounding. Memory: num_steps vectors.

  Returns:
    `Extremes` in the dtype of the raveled tree.

  Raises:
    ValueError: num_steps < 1.
  """
  checks.at_least(1, num_steps=num_steps)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  flat, unravel = ravel_pytree(zeros)
  size, dtype = flat.shape[0], flat.dtype
  num_steps = min(num_steps, size)

  def apply(v):
    result = matrices.align(like, product(unravel(v)), ('like', 'a product'))
    return ravel_pytree(result)[0]

  tiny = 100 * jnp.finfo(dtype).eps

  def orthogonal(w, basis):
    for _ in range(2):  # Twice is enough.
      w = w - basis.T @ (basis @ w)
    return w

  def step(carry, i):
    basis, v, scale = carry
    basis = basis.at[i].set(v)
    w = apply(v)
    diagonal = jnp.vdot(v, w)
    scale = jnp.maximum(scale, jnp.linalg.norm(w))
    w = orthogonal(w, basis)
    beta = jnp.linalg.norm(w)
    # An invariant subspace: go on from a fresh direction, which beta = 0 splits.
    is_over = beta <= tiny * scale
    fresh = jax.random.normal(jax.random.fold_in(key, i + 1), (size,), dtype)
    fresh = orthogonal(fresh, basis)
    following = jnp.where(is_over, fresh, w)
    norm = jnp.linalg.norm(following)
    following = following / jnp.where(norm > 0, norm, 1)
    beta = jnp.where(is_over, 0, beta)
    return (basis, following, scale), (diagonal, beta)

  start = jax.random.normal(jax.random.fold_in(key, 0), (size,), dtype)
  carry = (
      jnp.zeros((num_steps, size), dtype),
      start / jnp.linalg.norm(start),
      jnp.zeros([], dtype),
  )
  (basis, _, _), (diagonal, beta) = jax.lax.scan(
      step, carry, jnp.arange(num_steps)
  )
  small = jnp.diag(diagonal)
  small += jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)
  values, vectors = jnp.linalg.eigh(small)

  def ritz(i):
    vector = basis.T @ vectors[:, i]
    vector = vector / jnp.linalg.norm(vector)
    return values[i], unravel(vector), beta[-1] * jnp.abs(vectors[-1, i])

  return Extremes(*ritz(0), *ritz(-1))


def hessian_product(
    f: Callable[[Any], jax.Array], params: Any
) -> Callable[[Any], Any]:
  """Returns v -> (d^2 f / d params^2) v, forward over reverse, no Hessian formed."""
  return lambda v: jax.jvp(jax.grad(f), (params,), (v,))[1]
