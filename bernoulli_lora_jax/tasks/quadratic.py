"""The counterexample that motivates the chain (algorithms, section 4).

f(W) = x^T M x + b^T x with x the row-major entries of W in R^(3 x 3), M and b
below, W_0 = 0, L = 20, mu = 0.2. With step 1/L ordinary LoRA diverges here, and
every chain of rank 1 converges linearly.
"""

import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax.tasks import task as task_lib

CURVATURE = np.array([10, 8, 6, 4, 2, 1, 0.5, 0.25, 0.1])  # The diagonal of M.
SLOPE = np.array([-60, 32, -12, -16, -12, 2, -1, -1, -0.8])  # b
MINIMISER = -SLOPE / (2 * CURVATURE)
OPTIMUM = float(-np.sum(SLOPE**2 / (4 * CURVATURE)))  # f* = -166.1
SMOOTHNESS = 20.0  # L
PL = 0.2  # mu


def make_task() -> task_lib.Task:
  """Returns the task; its one 'sample' is the objective itself."""

  def loss(params, batch, key):
    del batch, key
    x = params['w'].reshape(-1)
    curvature = jnp.asarray(CURVATURE, x.dtype)
    value = jnp.sum(curvature * x**2) + jnp.dot(jnp.asarray(SLOPE, x.dtype), x)
    return value, {'gap': value - OPTIMUM}

  return task_lib.Task(
      name='quadratic',
      init=lambda key: {'w': jnp.zeros((3, 3), jnp.result_type(float))},
      data={'train': {'index': jnp.zeros((1,), jnp.int32)}},
      loss=loss,
      num_samples=1,
      batch_size=1,
      sampling='full',
      batch=lambda data, key, step: data['train'],
      optimum=OPTIMUM,
      lower_bound=OPTIMUM,
      smoothness=SMOOTHNESS,
  )
