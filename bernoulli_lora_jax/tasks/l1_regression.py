"""Robust (l1) regression, convex and not smooth, with its optimum known (T8).

f(W) = (1/N) ||X w - y||_1, w the row-major entries of W in R^(m x n), W_0 = 0.
X is standard normal and y = X w_true + noise, of which a few entries are far
off. f* and a minimiser W* come from linear programming. Every subgradient is
X^T z / N with |z_i| <= 1, so ||s||_F <= ||X||_2 ||z|| / N <= ||X||_2 / sqrt(N),
which is the L0 used here.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.tasks import cache
from bernoulli_lora_jax.tasks import task as task_lib

_NOISE = 0.1  # Standard deviation of the targets that are no outliers.
_OUTLIER = 10.0  # And of what outliers add to theirs.


class Problem(NamedTuple):
  """Data, optimum and the constants of T8; see `make_problem`."""

  x: np.ndarray  # (N, m n) float64
  y: np.ndarray  # (N,) float64
  shape: tuple[int, int]  # (m, n)
  optimum: float  # f*
  minimiser: np.ndarray  # (m, n), W*; one of them where there are many.
  lipschitz: float  # L0 = ||X||_2 / sqrt(N)
  distance: float  # R0 = ||W_0 - W*||_F = ||W*||_F


def make_problem(
    *,
    shape: tuple[int, int],
    num_samples: int,
    outliers: float = 0.1,
    seed: int = 0,
) -> Problem:
  """Returns data with outliers, and the optimum.

  Args:
    shape: (m, n) of W, each >= 1.
    num_samples: N, rows of X, >= 1.
    outliers: share of the targets that are far off, in [0, 1].
    seed: of the data.

  Returns:
    A `Problem`; optimum and minimiser are cached.

  Raises:
    ValueError: an argument outside its range.
  """
  m, n = shape
  if m < 1 or n < 1:
    raise ValueError(f'Expected shape of positive sides, got shape={shape}.')
  checks.at_least(1, num_samples=num_samples)
  checks.within('[0, 1]', outliers=outliers)
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(num_samples, m * n))
  y = x @ rng.normal(size=m * n) + _NOISE * rng.normal(size=num_samples)
  far = rng.permutation(num_samples)[: round(outliers * num_samples)]
  y[far] += _OUTLIER * rng.normal(size=len(far))
  solved = cache.cached(
      'l1_regression',
      {'data': cache.fingerprint(x, y)},
      lambda: {'minimiser': minimise(x, y)},
  )
  w = solved['minimiser']
  return Problem(
      x,
      y,
      (m, n),
      float(np.mean(np.abs(x @ w - y))),
      w.reshape(m, n),
      float(np.linalg.norm(x, 2)) / num_samples**0.5,
      float(np.linalg.norm(w)),
  )


def minimise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns a minimiser of ||X w - y||_1 by linear programming, shape (d,).

  min sum(u + v) subject to X w + u - v = y, u >= 0, v >= 0.

  Args:
    x: (N, d).
    y: (N,).

  Raises:
    RuntimeError: the solver failed.
  """
  size, dim = x.shape
  eye = scipy.sparse.identity(size)
  found = scipy.optimize.linprog(
      np.concatenate([np.zeros(dim), np.ones(2 * size)]),
      A_eq=scipy.sparse.hstack([scipy.sparse.csr_matrix(x), eye, -eye]),
      b_eq=y,
      bounds=[(None, None)] * dim + [(0, None)] * (2 * size),
      method='highs',
  )
  if not found.success:
    raise RuntimeError(f'The linear program was not solved: {found.message}')
  return found.x[:dim]


def make_task(problem: Problem, *, batch_size: int) -> task_lib.Task:
  """Returns the task of minimising f over W, shape (m, n), from zero.

  Args:
    problem: data and optimum.
    batch_size: rows a minibatch, drawn with replacement.

  Returns:
    A `Task` in the default float dtype; `smoothness` is None, as f is not.
    Metric `gap` is f - f* (of a minibatch: its mean less f*).

  Raises:
    ValueError: batch_size outside [1, N].
  """
  dtype = jnp.result_type(float)

  def outputs(params, batch):
    return (batch['x'] @ params['w'].reshape(-1))[:, None]

  def loss(params, batch, key):
    del key
    residual = outputs(params, batch)[:, 0] - batch['y']
    value = jnp.mean(jnp.abs(residual))
    return value, {'gap': value - problem.optimum}

  return task_lib.from_arrays(
      'l1_regression',
      loss,
      init=lambda key: {'w': jnp.zeros(problem.shape, dtype)},
      train={
          'x': jnp.asarray(problem.x, dtype),
          'y': jnp.asarray(problem.y, dtype),
      },
      batch_size=batch_size,
      sampling='replacement',
      optimum=problem.optimum,
      lower_bound=problem.optimum,
      outputs=outputs,
      criterion='absolute',
  )
