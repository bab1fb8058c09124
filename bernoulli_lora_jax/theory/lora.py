"""LoRA on the linearised network: training, curvature, escapes (N2, N5).

The objective is F(f_0 + G u v^T) + lam/2 (||u||^2 + ||v||^2), `lam` the weight
decay; symbols as in `ntk`.

Reference: Jang, Lee and Ryu, LoRA training in the NTK regime has no spurious local
minima, 2024, arXiv 2402.11867.
"""

from collections.abc import Callable, Mapping
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.theory import lanczos
from bernoulli_lora_jax.theory import ntk

Factors = dict[str, dict[str, jax.Array]]  # {path: {'u': (m, r), 'v': (n, r)}}


def product(factors: Factors) -> ntk.Delta:
  """Returns u v^T of each matrix."""
  return {path: pair['u'] @ pair['v'].T for path, pair in factors.items()}


def init_factors(
    problem: ntk.Problem,
    rank: int | Mapping[str, int],
    key: jax.Array,
    *,
    width: int | None = None,
) -> Factors:
  """Returns LoRA's usual start: u Gaussian of variance 1/m, v zero.

  Args:
    problem: gives the shapes.
    rank: of all matrices, or {path: rank}, in [1, min(m, n)].
    key: typed PRNG key; a matrix's draw depends on its place among the paths.
    width: columns of the result, the further ones zero; None for the rank. They
      have no gradient and stay zero, so factors of different ranks fit one array.

  Returns:
    {path: {'u': (m, width), 'v': (n, width)}}.

  Raises:
    ValueError: a rank outside [1, min(m, n)] or above the width.
  """
  if isinstance(rank, Mapping):
    checks.that(
        set(rank) == set(problem.zeros),
        f'rank of each of {list(problem.zeros)}',
        rank=dict(rank),
    )
  factors = {}
  for i, (path, like) in enumerate(problem.zeros.items()):
    r = rank[path] if isinstance(rank, Mapping) else rank
    (m, n), columns = like.shape, r if width is None else width
    checks.that(
        isinstance(r, (int, np.integer)) and 1 <= r <= min(m, n),
        f'a whole rank in [1, {min(m, n)}], the shorter side of {path}',
        rank=r,
    )
    checks.that(r <= columns, 'width >= rank', width=width, rank=r)
    normal = jax.random.normal(jax.random.fold_in(key, i), (m, r), like.dtype)
    u = jnp.zeros((m, columns), like.dtype).at[:, :r].set(normal / m**0.5)
    factors[path] = {'u': u, 'v': jnp.zeros((n, columns), like.dtype)}
  return factors


def make_objective(
    problem: ntk.Problem, lam: float | jax.Array, *, is_linear: bool = True
) -> Callable[[Factors], jax.Array]:
  """Returns N2: factors -> F(outputs of u v^T) + lam/2 (||u||^2 + ||v||^2).

  Args:
    problem: of `linearize` or `from_gradients`.
    lam: weight decay, > 0.
    is_linear: whether the outputs are f_0 + G delta or those of the network.
  """
  ntk.check_lam(lam)
  if is_linear:
    forward = ntk.operators(problem)[0]
    outputs = lambda delta: problem.start + forward(delta)
  else:
    outputs = problem.model

  def objective(factors):
    value = problem.loss.value(outputs(product(factors)), problem.targets)
    return value + lam / 2 * optax.tree.norm(factors, squared=True)

  return objective


class Trained(NamedTuple):
  """The end of `train_lora` and the way to it."""

  factors: Factors
  values: jax.Array  # shape=(num_steps + 1,); N2's objective, start to end.


def train_lora(
    problem: ntk.Problem,
    lam: float | jax.Array,
    factors: Factors,
    optimizer: optax.GradientTransformation | str = 'lbfgs',
    *,
    num_steps: int,
    is_linear: bool = True,
) -> Trained:
  """Minimises N2 over the factors.

  It may be vmapped over factors. Of the end report `nuclear.certify`: a stationary
  point is a global minimiser if and only if the gradient's spectral norm is at
  most lam.

  Args:
    problem: of `linearize` or `from_gradients`.
    lam: weight decay, > 0.
    factors: start, see `init_factors`.
    optimizer: any of optax, or 'lbfgs' for L-BFGS with a line search.
    num_steps: >= 1, of full gradients.
    is_linear: whether to train f_0 + G delta or the network itself.

  Returns:
    `Trained`.

  Raises:
    ValueError: lam <= 0, num_steps < 1, an unknown optimiser, factors of other
      shapes than the matrices.
  """
  ntk.check_lam(lam)
  checks.that(num_steps >= 1, 'num_steps >= 1', num_steps=num_steps)
  if isinstance(optimizer, str):
    checks.that(
        optimizer == 'lbfgs',
        "optimizer to be 'lbfgs' or of optax",
        optimizer=optimizer,
    )
    optimizer = optax.lbfgs()
  _check_factors(problem, factors)
  return _train(problem, lam, factors, optimizer, num_steps, is_linear)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _train(problem, lam, factors, optimizer, num_steps, is_linear):
  f = make_objective(problem, lam, is_linear=is_linear)
  tx = optax.with_extra_args_support(optimizer)

  def step(carry, _):
    factors, state = carry
    value, grad = jax.value_and_grad(f)(factors)
    updates, state = tx.update(
        grad, state, factors, value=value, grad=grad, value_fn=f
    )
    return (optax.apply_updates(factors, updates), state), value

  (factors, _), values = jax.lax.scan(
      step, (factors, tx.init(factors)), length=num_steps
  )
  return Trained(factors, jnp.append(values, f(factors)))


def least_curvature(
    problem: ntk.Problem,
    lam: float | jax.Array,
    factors: Factors,
    key: jax.Array,
    *,
    num_steps: int = 60,
) -> lanczos.Extremes:
  """Returns the ends of the spectrum of N2's Hessian, with directions (N5).

  Args:
    problem: of `linearize` or `from_gradients`.
    lam: weight decay, > 0.
    factors: the point.
    key: typed PRNG key of Lanczos' start.
    num_steps: Hessian-vector products, >= 1.

  Returns:
    `Extremes`; `low` is at least the least eigenvalue, so that a negative one
    proves that the point is no local minimum; a positive one is evidence only.

  Raises:
    ValueError: lam <= 0, factors of other shapes than the matrices.
  """
  ntk.check_lam(lam)
  _check_factors(problem, factors)
  return _least_curvature(problem, lam, factors, key, num_steps)


@functools.partial(jax.jit, static_argnums=4)
def _least_curvature(problem, lam, factors, key, num_steps):
  f = make_objective(problem, lam)
  hessian = lanczos.hessian_product(f, factors)
  return lanczos.extremes(hessian, factors, key, num_steps=num_steps)


class Escape(NamedTuple):
  """A step along the direction of least curvature."""

  factors: Factors
  decrease: jax.Array  # shape=(), >= 0; of N2's objective.
  curvature: jax.Array  # shape=(); the least Ritz value at the start.


def escape(
    problem: ntk.Problem,
    lam: float | jax.Array,
    factors: Factors,
    key: jax.Array,
    *,
    num_steps: int = 60,
) -> Escape:
  """Leaves a saddle along x + t d - t^2 grad, d of least curvature.

  The best t of a geometric grid is taken, and zero where none decreases.

  Args:
    problem: of `linearize` or `from_gradients`.
    lam: weight decay, > 0.
    factors: the point x.
    key: typed PRNG key of Lanczos' start.
    num_steps: Hessian-vector products, >= 1.

  Returns:
    `Escape`; the decrease is positive where the curvature is negative by more than
    the objective's rounding.

  Raises:
    ValueError: lam <= 0, factors of other shapes than the matrices.

  References:
    More and Sorensen, On the use of directions of negative curvature in a
    modified Newton method, 1979.
  """
  found = least_curvature(problem, lam, factors, key, num_steps=num_steps)
  return _escape(problem, lam, factors, found)


@jax.jit
def _escape(problem, lam, factors, found):
  f = make_objective(problem, lam)
  value, grad = jax.value_and_grad(f)(factors)
  slope = jnp.asarray(optax.tree.vdot(grad, found.low_vector))
  sign = jnp.where(slope > 0, -1, 1)
  move = lambda t: jax.tree.map(
      lambda x, d, g: x + t * sign * d - t**2 * g,
      factors,
      found.low_vector,
      grad,
  )
  grid = jnp.append(0, 2.0 ** jnp.arange(-26, 6)).astype(value.dtype)
  values = jax.lax.map(lambda t: f(move(t)), grid)
  # A diverged loss may be nan, which argmin would prefer.
  best = jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
  return Escape(move(grid[best]), value - values[best], found.low)


def _check_factors(problem: ntk.Problem, factors: Factors) -> None:
  checks.that(
      set(factors) == set(problem.zeros),
      f'factors of {list(problem.zeros)}',
      factors=list(factors),
  )
  for path, like in problem.zeros.items():
    pair = factors[path]
    got = {name: jnp.shape(x) for name, x in pair.items()}
    m, n = like.shape
    rank = got.get('u', (0, 0))[-1]
    checks.that(
        got == {'u': (m, rank), 'v': (n, rank)} and rank > 0,
        f"factors['{path}'] of shapes u ({m}, r) and v ({n}, r)",
        factors=got,
    )
