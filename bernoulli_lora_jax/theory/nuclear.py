"""The full problem of LoRA in the linear regime, min F + lam ||delta||_* (N1, N4).

Symbols as in `ntk`; `grad` is G^T theta with theta = F'(f_0 + G delta), shape
(N, K). For a theta in the domain of F* with ||G^T theta||_2 <= lam,

    <theta, f_0> - F*(theta) <= min F(f_0 + G delta) + lam ||delta||_*,

so that a scaled residual bounds the distance to the optimum at any delta.

References:
  Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009.
  O'Donoghue and Candes, Adaptive restart for accelerated gradient schemes, 2015,
  arXiv 1204.3982 (the gradient scheme).
  Halko, Martinsson and Tropp, Finding structure with randomness, 2011, arXiv
  0909.4061.
  Pataki, On the rank of extreme matrices in semidefinite programs, 1998.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.theory import lanczos
from bernoulli_lora_jax.theory import ntk

_OVERSAMPLING = 8  # Columns of the sketch beyond its rank.
_NUM_POWERS = 3  # Multiplications of the sketch by X X^T.


class Certificate(NamedTuple):
  """How far a change is from the optimum of N1; all of shape ()."""

  value: jax.Array  # F + lam ||delta||_*
  bound: jax.Array  # No change has a smaller value.
  gap: jax.Array  # value - bound.
  spectral_norm: jax.Array  # ||grad||_2, at most lam at the optimum.
  misalignment: jax.Array  # lam ||delta||_* - <-grad, delta>, then zero.
  nuclear_norm: jax.Array


@jax.jit
def certify(
    problem: ntk.Problem, lam: float | jax.Array, delta: ntk.Delta
) -> Certificate:
  """Returns N1's three certificates at any change.

  Args:
    problem: of `ntk.linearize` or `ntk.from_gradients`.
    lam: > 0.
    delta: {path: (m, n)}, also a product of LoRA's factors.

  Returns:
    `Certificate`. The optimum lies in [bound, value], up to rounding; at the
    optimum gap and misalignment are zero and spectral_norm is at most lam.

  Raises:
    ValueError: lam <= 0, delta of other shapes than the matrices.
  """
  ntk.check_lam(lam)
  ntk.check_delta(problem, delta)
  forward, transpose = ntk.operators(problem)
  return _certify(problem, lam, delta, forward(delta), transpose)


def _certify(problem, lam, delta, change, transpose):
  """`certify`, with change = G delta known."""
  z = problem.start + change
  theta = ntk.residual(problem, z)
  grad = transpose(theta)
  spectral, nuclear = ntk.spectral_norm(grad), ntk.nuclear_norm(delta)
  value = problem.loss.value(z, problem.targets) + lam * nuclear
  # Scaled down it stays in the domain of F*, which is convex and holds zero.
  feasible = theta * jnp.minimum(1, lam / jnp.maximum(spectral, lam))
  conjugate = problem.loss.conjugate(feasible, problem.targets)
  bound = jnp.vdot(feasible, problem.start) - conjugate
  misalignment = lam * nuclear + jnp.vdot(theta, change)
  return Certificate(
      value, bound, value - bound, spectral, misalignment, nuclear
  )


def largest_lam(problem: ntk.Problem) -> jax.Array:
  """Returns ||grad F||_2 at delta = 0: from this lam on zero is the optimum."""
  return _largest_lam(problem)


@jax.jit
def _largest_lam(problem):
  transpose = ntk.operators(problem)[1]
  return ntk.spectral_norm(transpose(ntk.residual(problem, problem.start)))


def soft_threshold(x: jax.Array, threshold: jax.Array | float) -> jax.Array:
  """Returns the proximal point of threshold ||.||_*: singular values shrink."""
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  return (u * jnp.maximum(s - threshold, 0)[None]) @ vt


def sketched_threshold(
    x: jax.Array, threshold: jax.Array | float, key: jax.Array, rank: int
) -> jax.Array:
  """Returns `soft_threshold` from a randomised SVD, verified.

  Args:
    x: (m, n).
    threshold: > 0.
    key: typed PRNG key of the sketch.
    rank: singular values sought above the threshold, >= 1.

  Returns:
    The proximal point, up to sqrt(eps) ||X||_F / 1000: with Q the sketch's frame,
    E = X - Q Q^T X, s the singular values of Q^T X and V its right vectors, the
    discarded part has norm at most sqrt(s_dropped^2 + ||E||_2^2), which must be
    within the threshold, and what the kept vectors miss is E V_kept, which must
    be small. Otherwise the exact SVD is taken.
  """
  columns = min(rank + _OVERSAMPLING, *x.shape)
  omega = jax.random.normal(key, (x.shape[1], columns), x.dtype)
  q = jnp.linalg.qr(x @ omega)[0]
  for _ in range(_NUM_POWERS):
    q = jnp.linalg.qr(x @ jnp.linalg.qr(x.T @ q)[0])[0]
  u, s, vt = jnp.linalg.svd(q.T @ x, full_matrices=False)
  rest = x - q @ (q.T @ x)
  # ||E||_2 <= ||(E^T E)^2||_F^(1/4), of the smaller of the two squares.
  small = rest @ rest.T if x.shape[0] < x.shape[1] else rest.T @ rest
  norm = jnp.linalg.norm(small @ small) ** 0.25
  is_kept = s > threshold
  dropped = jnp.max(jnp.where(is_kept, 0, s))
  missed = jnp.linalg.norm((rest @ vt.T) * is_kept[None])
  tiny = 1e-3 * jnp.finfo(x.dtype).eps ** 0.5 * jnp.linalg.norm(x)
  is_safe = (dropped**2 + norm**2 <= threshold**2) & (missed <= tiny)
  return jax.lax.cond(
      is_safe,
      lambda: (q @ (u * jnp.maximum(s - threshold, 0)[None])) @ vt,
      lambda: soft_threshold(x, threshold),
  )


class Solution(NamedTuple):
  """An approximate minimiser of N1 with its certificate."""

  delta: ntk.Delta
  certificate: Certificate
  num_steps: jax.Array  # shape=(), dtype=int32


def solve(
    problem: ntk.Problem,
    lam: float | jax.Array,
    *,
    tolerance: float = 1e-10,
    max_steps: int = 20_000,
    check_every: int = 20,
    sketch_rank: int | None = None,
    start: ntk.Delta | None = None,
    key: jax.Array | None = None,
) -> Solution:
  """Minimises N1 by an accelerated proximal gradient method with restarts.

  The step is one over the largest eigenvalue of G G^T by Lanczos, times the
  loss's curvature over N.

  Args:
    problem: of `ntk.linearize` or `ntk.from_gradients`.
    lam: > 0.
    tolerance: > 0; stops when the duality gap is below it. In float32 gaps below
      1e-6 of the value are rounding.
    max_steps: >= 1, rounded up to whole blocks of check_every; the certificate
      tells whether the tolerance was met.
    check_every: steps between two certificates, >= 1; at most max_steps are taken.
    sketch_rank: None for the exact SVD; otherwise `sketched_threshold`'s rank.
    start: first change; None for zero.
    key: typed PRNG key of Lanczos and of the sketches; None for key(0).

  Returns:
    `Solution`.

  Raises:
    ValueError: lam, tolerance, max_steps, check_every or sketch_rank not positive,
      start of other shapes than the matrices.
  """
  ntk.check_lam(lam)
  checks.that(tolerance > 0, 'tolerance > 0', tolerance=tolerance)
  checks.at_least(1, max_steps=max_steps, check_every=check_every)
  checks.that(
      sketch_rank is None or sketch_rank >= 1,
      'sketch_rank >= 1 or None',
      sketch_rank=sketch_rank,
  )
  check_every = min(check_every, max_steps)
  start = problem.zeros if start is None else start
  ntk.check_delta(problem, start)
  key = jax.random.key(0) if key is None else key
  return _solve(
      problem, lam, start, key, tolerance, max_steps, check_every, sketch_rank
  )


@functools.partial(jax.jit, static_argnums=(6, 7))
def _solve(
    problem, lam, start, key, tolerance, max_steps, check_every, sketch_rank
):
  forward, transpose = ntk.operators(problem)
  top = lanczos.extremes(
      lambda theta: forward(transpose(theta)), problem.start, key, num_steps=60
  )
  smoothness = top.high * problem.loss.curvature / len(problem.start)
  # Ritz values are lower bounds, at 60 steps by far less than this.
  step = 1 / jnp.maximum(1.01 * smoothness, jnp.finfo(smoothness.dtype).tiny)

  def shrink(x, key):
    if sketch_rank is None:
      return soft_threshold(x, step * lam)
    return sketched_threshold(x, step * lam, key, sketch_rank)

  def descend(carry, _):
    # y extrapolates x; images under G are carried along, G being linear.
    x, x_image, y, y_image, t, count = carry
    grad = transpose(ntk.residual(problem, problem.start + y_image))
    sketch_key = jax.random.fold_in(key, count)
    new = {}
    for path in x:
      new[path] = shrink(y[path] - step * grad[path], sketch_key)
    image = forward(new)
    # Restart where momentum points uphill.
    uphill = sum(
        jnp.vdot(y[path] - new[path], new[path] - x[path]) for path in x
    )
    t = jnp.where(uphill > 0, 1.0, t)
    new_t = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
    beta = (t - 1) / new_t
    extrapolate = lambda a, b: a + beta * (a - b)
    y = jax.tree.map(extrapolate, new, x)
    y_image = extrapolate(image, x_image)
    return (new, image, y, y_image, new_t, count + 1), None

  def block(state):
    carry = jax.lax.scan(descend, state[0], length=check_every)[0]
    return carry, _certify(problem, lam, carry[0], carry[1], transpose)

  def is_running(state):
    (*_, count), certificate = state
    return (certificate.gap > tolerance) & (count < max_steps)

  image = forward(start)
  one = jnp.ones([], image.dtype)
  carry = (start, image, start, image, one, jnp.zeros([], jnp.int32))
  state = (carry, _certify(problem, lam, start, image, transpose))
  (x, _, _, _, _, count), _ = jax.lax.while_loop(is_running, block, state)
  # The images carried along have gathered rounding errors.
  certificate = _certify(problem, lam, x, forward(x), transpose)
  return Solution(x, certificate, count)


class Reduced(NamedTuple):
  """A change of lower rank with the same outputs."""

  delta: ntk.Delta
  ranks: dict[str, int]


def reduce_rank(
    problem: ntk.Problem, delta: ntk.Delta, *, tolerance: float = 1e-12
) -> Reduced:
  """Moves delta to sum_k r_k (r_k + 1) / 2 <= KN, its outputs unchanged (N4).

  With delta = u v^T a symmetric A != 0 with G(u A v^T) = 0 exists while there
  are more of its entries than outputs; along u (I + t A) v^T the outputs stay, the
  bound (||u||^2 + ||v||^2) / 2 of the nuclear norm does not grow for one of the
  signs, and at the last t with I + t A >= 0 the rank falls. Runs on the host.

  Args:
    problem: of `linearize` or `from_gradients`.
    delta: {path: (m, n)}; a minimiser of N1 stays one.
    tolerance: singular values below it, relative to the largest, count as zero.

  Returns:
    `Reduced`, the outputs equal up to rounding and tolerance, the nuclear norm
    not larger.

  Raises:
    ValueError: delta of other shapes than the matrices, a tolerance outside
      [0, 1).

  References:
    Pataki, On the rank of extreme matrices in semidefinite programs, 1998.
  """
  ntk.check_delta(problem, delta)
  checks.that(0 <= tolerance < 1, 'tolerance in [0, 1)', tolerance=tolerance)
  left, right, basis, gram = {}, {}, {}, {}
  for path, matrix in delta.items():
    u, s, vt = np.linalg.svd(np.asarray(matrix), full_matrices=False)
    r = int(np.sum(s > tolerance * s[0]))
    left[path] = u[:, :r] * np.sqrt(s[:r])
    right[path] = vt[:r].T * np.sqrt(s[:r])
    basis[path], gram[path] = np.eye(r), np.diag(s[:r])  # u^T u = v^T v
  rows = {
      path: np.asarray(x) for path, x in _rows(problem, left, right).items()
  }
  num_outputs = problem.start.size
  rng = np.random.default_rng(0)  # Any A serves.
  while True:
    # I + t A = C C^T takes u and v to u C and v C, and all that is left to C^T . C.
    ranks = {path: c.shape[1] for path, c in basis.items()}
    if sum(r * (r + 1) // 2 for r in ranks.values()) <= num_outputs:
      break
    steps = _null_step(
        {p: c.T @ rows[p] @ c for p, c in basis.items()},
        {p: c.T @ gram[p] @ c for p, c in basis.items()},
        rng,
    )
    basis = {path: c @ steps[path] for path, c in basis.items()}
  reduced = {
      p: jnp.asarray((left[p] @ c) @ (right[p] @ c).T, delta[p].dtype)
      for p, c in basis.items()
  }
  return Reduced(reduced, ranks)


@jax.jit
def _rows(problem, left, right):
  """Returns {path: (KN, r, r)}, u^T G_k(X_i) v of each output."""
  transpose = ntk.operators(problem)[1]

  def row(theta):
    grads = transpose(theta.reshape(problem.start.shape))
    return {path: left[path].T @ g @ right[path] for path, g in grads.items()}

  units = jnp.eye(problem.start.size, dtype=problem.start.dtype)
  return jax.lax.map(row, units)


def _null_step(rows, gram, rng):
  """Returns {path: C} with I + t A = C C^T singular and A in the null space."""
  indices = {p: np.triu_indices(g.shape[0]) for p, g in gram.items()}
  columns = []
  for path, (i, j) in indices.items():
    x = rows[path]
    columns.append(np.where(i == j, x[:, i, j], x[:, i, j] + x[:, j, i]))
  span = np.linalg.qr(np.concatenate(columns, 1).T)[0]
  a = rng.normal(size=span.shape[0])
  for _ in range(2):  # Twice is enough.
    a = a - span @ (span.T @ a)
  moves, first = {}, 0
  for path, (i, j) in indices.items():
    move = np.zeros_like(gram[path])
    move[i, j] = move[j, i] = a[first : first + len(i)]
    moves[path], first = move, first + len(i)
  slope = sum(np.sum(moves[p] * gram[p]) for p in moves)
  sign = -1 if slope > 0 else 1
  spectra = {p: np.linalg.eigh(sign * x) for p, x in moves.items() if x.size}
  # Negative: gram is positive and <A, gram> <= 0.
  least = min(values[0] for values, _ in spectra.values())
  result = {p: np.eye(len(x)) for p, x in moves.items()}
  for path, (values, vectors) in spectra.items():
    weights = 1 - values / least
    kept = weights > 1e-13  # The last one is zero up to rounding.
    result[path] = vectors[:, kept] * np.sqrt(weights[kept])
  return result
