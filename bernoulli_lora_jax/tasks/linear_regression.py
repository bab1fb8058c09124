"""Linear regression with a non-convex regulariser (X1).

f(W) = (1/2N) ||X w - y||^2 + lam sum_j w_j^2 / (1 + w_j^2), w the row-major
entries of W in R^(side x side), lam the spectral norm of X^T X / N, so that
L = 3 lam. The start is the minimiser on the pre-training data. X is rescaled to
mean 1 as a whole, which adds a rank-one spike to the Hessian, and with
`effective_rank` the targets are mostly noise.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.optimize

from bernoulli_lora_jax.tasks import cache
from bernoulli_lora_jax.tasks import task as task_lib


class Problem(NamedTuple):
  """Data, regularisation and start; see `make_problem`."""

  x: np.ndarray  # (N, d) float64
  y: np.ndarray  # (N,) float64
  regularisation: float  # lam of the fine-tuning data.
  smoothness: float  # L = 3 lam
  start: np.ndarray  # (d,), the minimiser on the pre-training data.


def make_problem(
    *, dim: int, num_pretraining: int, num_samples: int
) -> Problem:
  """Returns the data of X1 at a given size; X1 has 4096, 90,000 and 10,000.

  Args:
    dim: d, the number of features.
    num_pretraining: rows of the pre-training data.
    num_samples: N, rows of the fine-tuning data.

  Returns:
    A `Problem`; the constants and the start are cached.
  """
  # 'effective_rank' is 64 and 32 at d = 4096, and as large a part of sqrt(d).
  side = int(round(dim**0.5))
  from sklearn import datasets  # Takes seconds.

  drawn = datasets.make_regression(
      n_samples=num_samples,
      n_features=dim,
      n_informative=dim // 2,
      noise=50.0,
      bias=10.0,
      tail_strength=0.9,
      effective_rank=max(1, side // 2),
      random_state=84,
  )
  x, y = _rescale(drawn[0]), _rescale(drawn[1])
  settings = {
      'dim': dim,
      'num_pretraining': num_pretraining,
      'num_samples': num_samples,
      'data': cache.fingerprint(x, y),
  }
  constants = cache.cached(
      'linear_regression',
      settings,
      lambda: _constants(x, dim, side, num_pretraining),
  )
  lam = float(constants['regularisation'])
  return Problem(x, y, lam, 3 * lam, constants['start'])


def make_task(
    problem: Problem,
    *,
    batch_size: int,
    shape: tuple[int, int] | None = None,
) -> task_lib.Task:
  """Returns the task of minimising f over W, shape (side, side).

  Args:
    problem: data and constants.
    batch_size: rows a minibatch, drawn with replacement.
    shape: (m, n) of W with m n = d; None for a square.

  Returns:
    A `Task` in the default float dtype.

  Raises:
    ValueError: batch_size outside [1, N], d not a square, or m n not d.
  """
  dim = problem.x.shape[1]
  if shape is None:
    side = int(round(dim**0.5))
    if side**2 != dim:
      raise ValueError(f'Expected task.dim to be a square, got dim={dim}.')
    shape = side, side
  if shape[0] * shape[1] != dim:
    raise ValueError(f'Expected m n = {dim}, got shape={shape}.')
  dtype = jnp.result_type(float)
  lam = problem.regularisation

  def loss(params, batch, key):
    del key
    w = params['w'].reshape(-1)
    residual = batch['x'] @ w - batch['y']
    penalty = jnp.sum(w**2 / (1 + w**2))
    return jnp.mean(residual**2) / 2 + lam * penalty, {}

  return task_lib.from_arrays(
      'linear_regression',
      loss,
      init=lambda key: {'w': jnp.asarray(problem.start.reshape(shape), dtype)},
      train={
          'x': jnp.asarray(problem.x, dtype),
          'y': jnp.asarray(problem.y, dtype),
      },
      batch_size=batch_size,
      sampling='replacement',
      lower_bound=0.0,
      smoothness=problem.smoothness,
  )


def _rescale(a: np.ndarray) -> np.ndarray:
  """Returns the array with mean 1 and standard deviation 2, as a whole."""
  return (a - a.mean()) / a.std() * 2 + 1


def _constants(
    x: np.ndarray, dim: int, side: int, num_pretraining: int
) -> dict[str, np.ndarray]:
  """Returns lam of the fine-tuning data and the pre-training minimiser."""
  from sklearn import datasets  # Takes seconds.

  drawn = datasets.make_regression(
      n_samples=num_pretraining,
      n_features=dim,
      n_informative=dim,
      noise=20.0,
      tail_strength=0.8,
      effective_rank=side,
      random_state=42,
  )
  old_x = (drawn[0] - drawn[0].mean(0)) / drawn[0].std(0)
  old_y = (drawn[1] - drawn[1].mean()) / drawn[1].std()
  gram = old_x.T @ old_x / num_pretraining
  moment = old_x.T @ old_y / num_pretraining
  lam = np.linalg.eigvalsh(gram)[-1]

  def value_and_grad(w):
    product = gram @ w
    value = w @ product / 2 - moment @ w + lam * np.sum(w**2 / (1 + w**2))
    return value, product - moment + lam * 2 * w / (1 + w**2) ** 2

  found = scipy.optimize.minimize(
      value_and_grad,
      np.zeros(dim),
      jac=True,
      method='L-BFGS-B',
      options={'maxiter': 10000, 'ftol': 1e-15, 'gtol': 1e-10},
  )
  spectrum = np.linalg.eigvalsh(x.T @ x / len(x))
  return {'regularisation': spectrum[-1], 'start': found.x}
