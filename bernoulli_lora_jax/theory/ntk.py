"""A network that is linear in what LoRA changes: maps, thresholds, risk (N3, N7).

Symbols: N samples, K outputs, `delta` the change of the selected matrices, a dict
{path: (m, n)}, G the gradient of the outputs at the pre-trained weights: the
outputs are f_0 + G delta, and G^T theta is the change whose inner product with any
other is that of theta, shape (N, K), with its outputs. F is the mean loss. Norms
of several matrices: nuclear norms are summed, of spectral norms the largest is
taken. `nuclear` solves the full problem, `lora` trains factors.

References:
  Jang, Lee and Ryu, LoRA training in the NTK regime has no spurious local minima,
  2024, arXiv 2402.11867.
  Maurer, A vector-contraction inequality for Rademacher complexities, 2016,
  arXiv 1605.00251.
"""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.tasks import task as task_lib

Delta = dict[str, jax.Array]  # {path: (m, n)}


class Loss(NamedTuple):
  """A convex loss of each row, its mean over rows, and its conjugate."""

  value: Callable[[jax.Array, jax.Array], jax.Array]  # F(z), (N, K) -> ().
  # F*(theta) = sup_z <theta, z> - F(z), infinite outside its domain.
  conjugate: Callable[[jax.Array, jax.Array], jax.Array]
  lipschitz: (
      float  # rho of a row in the Euclidean norm; inf where there is none.
  )
  curvature: float  # Lipschitz constant of a row's gradient.


class Problem(NamedTuple):
  """A network around its weights; a pytree, so that it may enter jit."""

  # delta -> (N, K), the network itself, linearised at `zeros` by `operators`.
  model: Callable[[Delta], jax.Array]
  zeros: Delta
  start: jax.Array  # f_0; shape=(N, K).
  targets: jax.Array  # shape=(N,) int classes, or (N, K).
  loss: Loss


def _squared(z, y):
  return jnp.sum((z - y) ** 2) / (2 * len(z))


def _squared_conjugate(theta, y):
  return len(y) / 2 * jnp.sum(theta**2) + jnp.sum(theta * y)


def _cross_entropy(z, y):
  losses = optax.softmax_cross_entropy_with_integer_labels(z, y)
  return jnp.mean(losses)


def _cross_entropy_conjugate(theta, y):
  # Of one row: the negative entropy of p = theta + e_y, if that is a distribution.
  p = len(y) * theta + jax.nn.one_hot(y, theta.shape[1], dtype=theta.dtype)
  slack = 1e3 * jnp.finfo(theta.dtype).eps  # Rounding of theta, by len(y).
  is_inside = jnp.all(p >= -slack) & jnp.all(jnp.abs(p.sum(1) - 1) <= slack)
  p = jnp.maximum(p, 0)
  entropy = jnp.mean(jnp.sum(jax.scipy.special.xlogy(p, p), 1))
  return jnp.where(is_inside, entropy, jnp.inf)


_function = jax.tree_util.Partial  # A function as a pytree without leaves.
LOSSES = {
    'squared': Loss(
        _function(_squared), _function(_squared_conjugate), math.inf, 1.0
    ),
    # The Hessian diag(p) - p p^T has norm at most 1/2.
    'cross_entropy': Loss(
        _function(_cross_entropy),
        _function(_cross_entropy_conjugate),
        math.sqrt(2),
        0.5,
    ),
}


def linearize(
    task: task_lib.Task,
    params: Any,
    batch: task_lib.Batch,
    matrices: matrices_lib.Matrices | None = None,
) -> Problem:
  """Returns a task's network around `params` as a function of some matrices.

  Args:
    task: with `outputs` and a smooth `criterion`, 'squared' or 'cross_entropy'.
    params: pre-trained weights.
    batch: N examples with 'y'.
    matrices: what changes; None for the default selection. No stacks.

  Returns:
    A `Problem` in the default float dtype, to which params and batch are cast.

  Raises:
    ValueError: a task without outputs or of another criterion, a stack of
      matrices, targets that do not fit the outputs.
  """
  checks.that(
      task.outputs is not None and task.criterion in LOSSES,
      f'a task with outputs and a criterion among {sorted(LOSSES)}',
      name=task.name,
      criterion=task.criterion,
  )
  params, batch = _cast(params), _cast(batch)
  found = matrices_lib.find(params, matrices)
  for matrix in found:
    checks.that(
        not matrix.batch,
        'matrices, no stacks: select others, or unstack the layers',
        path=matrix.path,
        batch=matrix.batch,
    )
  zeros = {x.path: jnp.zeros((x.m, x.n), x.dtype) for x in found}
  model = jax.tree_util.Partial(
      _perturbed(task.outputs, matrices), params, batch
  )
  return _problem(model, zeros, batch['y'], task.criterion)


def from_gradients(
    gradients: Mapping[str, jax.Array],
    targets: jax.Array,
    *,
    start: jax.Array | None = None,
    criterion: str = 'squared',
) -> Problem:
  """Returns the problem of explicit gradients.

  Args:
    gradients: {path: (N, K, m, n)}.
    targets: (N, K) numbers, or (N,) classes for 'cross_entropy'.
    start: f_0, shape (N, K); None for zeros.
    criterion: 'squared' or 'cross_entropy'.

  Returns:
    A `Problem` in the default float dtype, exactly linear.

  Raises:
    ValueError: shapes that do not agree, an unknown criterion.
  """
  checks.that(
      criterion in LOSSES,
      f'criterion among {sorted(LOSSES)}',
      criterion=criterion,
  )
  dtype = jnp.result_type(float)
  gradients = {path: jnp.asarray(g, dtype) for path, g in gradients.items()}
  shapes = {path: g.shape for path, g in gradients.items()}
  rows = {shape[:2] for shape in shapes.values()}
  checks.that(
      len(rows) == 1 and all(len(shape) == 4 for shape in shapes.values()),
      'gradients of shape (N, K, m, n) with one N and K',
      gradients=shapes,
  )
  checks.that(
      all(
          g.size and bool(jnp.all(jnp.isfinite(g))) for g in gradients.values()
      ),
      'gradients that are finite, of one sample or more',
      gradients=shapes,
  )
  start = jnp.zeros(rows.pop()) if start is None else start
  start = _cast(jnp.asarray(start))
  checks.that(
      {start.shape} == {shape[:2] for shape in shapes.values()},
      'start of shape (N, K), as in gradients',
      start=start.shape,
      gradients=shapes,
  )
  zeros = {
      path: jnp.zeros(g.shape[2:], g.dtype) for path, g in gradients.items()
  }
  model = jax.tree_util.Partial(_explicit, gradients, start)
  return _problem(model, zeros, jnp.asarray(targets), criterion)


def operators(
    problem: Problem,
) -> tuple[Callable[[Delta], jax.Array], Callable[[jax.Array], Delta]]:
  """Returns G, delta -> (N, K), and its transpose, theta -> G^T theta.

  The network runs once, here; call it outside loops and inside jit.
  """
  forward = jax.linearize(problem.model, problem.zeros)[1]
  transpose = jax.linear_transpose(forward, problem.zeros)
  return forward, lambda theta: transpose(theta)[0]


def residual(problem: Problem, z: jax.Array) -> jax.Array:
  """Returns the gradient of F at the outputs z; both of shape (N, K)."""
  return jax.grad(problem.loss.value)(z, problem.targets)


class Thresholds(NamedTuple):
  """Ranks that N3 finds sufficient; neither is sharp."""

  equations: int  # KN, or (K - 1) N.
  existence: int  # From here on LoRA's optimal value is that of N1.
  no_spurious: int  # From here on there are no spurious local minima.


def rank_thresholds(
    num_outputs: int, num_samples: int, criterion: str = 'squared'
) -> Thresholds:
  """Returns the thresholds of N3, which differ by one rank.

  `existence` is the largest r with r (r + 1) / 2 <= KN: a minimiser of N1 of at
  most this rank exists. `no_spurious` is the least r with r (r + 1) / 2 > KN:
  almost every small linear perturbation of the objective has only global minima,
  if the loss is convex and twice differentiable. Softmax ignores a constant a
  sample, so that 'cross_entropy' counts (K - 1) N equations; 'squared' gives the
  count KN for any loss.

  Several matrices share the equations: some minimiser has
  sum_k r_k (r_k + 1) / 2 <= KN, which may all be in one matrix, and without
  spurious minima each r_k (r_k + 1) / 2 > KN. Hence the same two numbers hold
  for the rank of every matrix.

  Args:
    num_outputs: K >= 1 (>= 2 for 'cross_entropy').
    num_samples: N >= 1.
    criterion: 'squared' or 'cross_entropy'.

  Returns:
    `Thresholds`; a rank above a matrix's sides says no more than the sides.

  Raises:
    ValueError: counts outside their range, an unknown criterion.

  References:
    Jang, Lee and Ryu, 2024, arXiv 2402.11867, theorems 3.2 and 4.1.
  """
  checks.that(
      criterion in LOSSES,
      f'criterion among {sorted(LOSSES)}',
      criterion=criterion,
  )
  is_softmax = criterion == 'cross_entropy'
  least = 2 if is_softmax else 1
  checks.that(
      num_outputs >= least,
      f'num_outputs >= {least} for {criterion}',
      num_outputs=num_outputs,
  )
  checks.at_least(1, num_samples=num_samples)
  equations = (num_outputs - is_softmax) * num_samples
  existence = (math.isqrt(8 * equations + 1) - 1) // 2
  return Thresholds(equations, existence, existence + 1)


class Estimate(NamedTuple):
  """A mean over draws."""

  mean: jax.Array  # shape=()
  standard_error: jax.Array  # shape=()


def rademacher(
    problem: Problem, key: jax.Array, *, num_draws: int = 100
) -> Estimate:
  """Estimates Rad^ = E ||(1/N) sum_ik eps_ik G_k(X_i)||_2 of N7.

  Args:
    problem: of the training examples.
    key: typed PRNG key of the signs.
    num_draws: >= 2.

  Returns:
    `Estimate`. Of several matrices the largest norm is taken, which is dual to
    the sum of nuclear norms.

  Raises:
    ValueError: num_draws < 2.

  Guarantees:
    Mean: Rad^, which is at most R sqrt(K/N) when ||G_k(X)||_F <= R.
  """
  checks.at_least(2, num_draws=num_draws)
  norms = _rademacher(problem, key, num_draws)
  error = jnp.std(norms, ddof=1) / num_draws**0.5
  return Estimate(jnp.mean(norms), error)


@functools.partial(jax.jit, static_argnums=2)
def _rademacher(problem, key, num_draws):
  transpose = operators(problem)[1]
  shape, dtype = problem.start.shape, problem.start.dtype

  def draw(i):
    signs = jax.random.rademacher(jax.random.fold_in(key, i), shape, dtype)
    return spectral_norm(transpose(signs / shape[0]))

  return jax.lax.map(draw, jnp.arange(num_draws))


def gradient_norms(problem: Problem) -> jax.Array:
  """Returns ||G_k(X_i)||_F over all matrices; shape (N, K)."""
  return _gradient_norms(problem)


@jax.jit
def _gradient_norms(problem):
  transpose = operators(problem)[1]
  shape = problem.start.shape
  norm = lambda theta: optax.tree.norm(transpose(theta.reshape(shape)))
  units = jnp.eye(problem.start.size, dtype=problem.start.dtype)
  return jax.lax.map(norm, units).reshape(shape)


def risk_bound(
    average: float,
    *,
    radius: float,
    num_samples: int,
    num_outputs: int,
    lipschitz: float,
    loss_range: float,
    eta: float = 0.05,
) -> float:
  """Returns N7's bound of risk - empirical risk, with probability 1 - eta.

  2 sqrt(2) rho D Rad^ + 3 b sqrt(log(2 / eta) / (2 N)), with 2 in place of
  2 sqrt(2) when K = 1.

  Args:
    average: Rad^ >= 0, see `rademacher`.
    radius: D > 0, of the nuclear norm, fixed before the data; a union over
      D = 2^j costs a smaller eta.
    num_samples: N >= 1.
    num_outputs: K >= 1.
    lipschitz: rho, in (0, inf): the squared loss has none.
    loss_range: b >= 0, the loss's range over the class.
    eta: in (0, 1).

  Returns:
    The bound.

  Raises:
    ValueError: a constant outside its range.

  References:
    Maurer, 2016, arXiv 1605.00251 (sqrt(2) of several outputs).
  """
  checks.that(average >= 0, 'average >= 0', average=average)
  checks.that(radius > 0, 'radius > 0', radius=radius)
  checks.at_least(1, num_samples=num_samples, num_outputs=num_outputs)
  checks.within('(0, inf)', lipschitz=lipschitz)
  checks.that(loss_range >= 0, 'loss_range >= 0', loss_range=loss_range)
  checks.that(0 < eta < 1, 'eta in (0, 1)', eta=eta)
  factor = 2 if num_outputs == 1 else 2 * math.sqrt(2)
  tail = 3 * loss_range * math.sqrt(math.log(2 / eta) / (2 * num_samples))
  return factor * lipschitz * radius * average + tail


def spectral_norm(delta: Delta) -> jax.Array:
  """Returns the largest singular value of all matrices."""
  norms = [jnp.linalg.norm(x, ord=2) for x in delta.values()]
  return jnp.max(jnp.stack(norms))


def nuclear_norm(delta: Delta) -> jax.Array:
  """Returns the sum of the singular values of all matrices."""
  norms = [jnp.linalg.norm(x, ord='nuc') for x in delta.values()]
  return jnp.sum(jnp.stack(norms))


def check_delta(problem: Problem, delta: Delta) -> None:
  """Raises ValueError unless delta has the matrices' paths and shapes."""
  expected = {path: x.shape for path, x in problem.zeros.items()}
  got = {path: jnp.shape(x) for path, x in delta.items()}
  checks.that(got == expected, f'delta of shapes {expected}', delta=got)


@functools.lru_cache(maxsize=32)  # One function a task, so that jit knows it.
def _perturbed(outputs, matrices):
  """Returns (params, batch, delta) -> outputs at params + delta."""

  def model(params, batch, delta):
    found = matrices_lib.find(params, matrices)
    leaves, treedef = jax.tree.flatten(params)
    for matrix in found:
      leaves[matrix.index] += matrix.unview(delta[matrix.path])
    return outputs(treedef.unflatten(leaves), batch)

  return model


def _explicit(gradients, start, delta):
  parts = [
      jnp.einsum('ikmn,mn->ik', g, delta[path]) for path, g in gradients.items()
  ]
  return start + sum(parts)


def _problem(model, zeros, targets, criterion) -> Problem:
  start = model(zeros)
  num_samples, num_outputs = start.shape
  if criterion == 'cross_entropy':
    fits = targets.shape == (num_samples,) and jnp.issubdtype(
        targets.dtype, jnp.integer
    )
    expected = f'targets: ({num_samples},) integers'
  else:
    if targets.ndim == 1 and num_outputs == 1:
      targets = targets[:, None]
    targets = targets.astype(start.dtype)
    fits = targets.shape == start.shape
    expected = f'targets of shape {start.shape}'
  checks.that(fits, expected, targets=(targets.shape, targets.dtype))
  if criterion == 'cross_entropy':
    low, high = int(jnp.min(targets)), int(jnp.max(targets))
    checks.that(
        0 <= low and high < num_outputs,
        f'classes in [0, {num_outputs})',
        targets=(low, high),
    )
  return Problem(model, zeros, start, targets, LOSSES[criterion])


def _cast(tree: Any) -> Any:
  """Returns the tree with floats in the default dtype."""
  dtype = jnp.result_type(float)
  is_float = lambda x: jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
  cast = lambda x: jnp.asarray(x, dtype) if is_float(x) else jnp.asarray(x)
  return jax.tree.map(cast, tree)


def check_lam(lam: float | jax.Array) -> None:
  """Raises ValueError unless lam > 0 and finite, where its value is known."""
  if not isinstance(lam, jax.core.Tracer):
    checks.that(bool(0 < lam < math.inf), 'lam > 0 and finite', lam=lam)
