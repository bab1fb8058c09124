"""The constants of a run, estimated along its path over the trained leaves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import checks
from bernoulli_lora_jax import parts as parts_lib
from bernoulli_lora_jax.studies import runs
from bernoulli_lora_jax.tasks import partition
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import estimates
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import programs


class Constants(NamedTuple):
  """Estimates along a path, over the trained leaves."""

  smoothness: float  # L, from below.
  least_curvature: float  # Least eigenvalue of a Hessian: below 0, not convex.
  local_smoothness: float  # L, from below, between points.
  mean_smoothness: float  # Lbar of single examples, sampled; at least L.
  batch_smoothness: float  # Lbar of minibatches, sampled; at least L.
  variance: float  # sigma^2 of a minibatch's gradient, the largest of means.
  variance_error: float  # Its standard error.
  slope: float  # A, B and C, with E||g - grad||^2 in place of E||g||^2
  growth: float  # (B >= 1).
  noise: float
  pl: float  # mu, from above.
  initial_gap: float  # D0 = f(W_0) - f_inf.
  lower_bound: float  # f_inf, or what is known below it.
  best: float  # Least f at a point.
  client_smoothness: tuple[float, ...]
  client_error: float  # sum_l w_l ||grad f_l(W_0)||^2


def estimate(
    finished: runs.Finished,
    task: task_lib.Task,
    method: methods.Method,
    path: runs.Path,
    *,
    num_products: int = 12,
    num_batches: int = 32,
    report: Callable[[int], Any] = lambda points: None,
) -> Constants:
  """Estimates the constants at the points of a path.

  Args:
    finished: the run.
    task: what it trained.
    method: how; names the leaves that move.
    path: see `runs.replay`.
    num_products: Hessian-vector products a point.
    num_batches: minibatches a point, >= 2.
    report: called with 1 after each point.
  """
  checks.at_least(2, batches=num_batches)
  key = jax.random.key(finished.config.seed)
  moving = lambda params: averaging.trained_part(params, method.trained)
  is_federated = 'clients' in task.data
  draw = task.batch
  if is_federated:  # Its minibatch is all there is.
    draw = task_lib.uniform_batch(task.batch_size)
  assert draw is not None

  def draw_one(data, key, step):
    del step
    rows = jax.random.randint(key, (1,), 0, task.num_samples)
    return task_lib.take(data['train'], rows)

  def loss(part, params, batch, key):
    return task.loss(averaging.joined(params, part), batch, key)[0]

  def whole_loss(part, params, data):
    """Returns f, in chunks of which the derivatives keep one at a time."""
    one = lambda part, batch: task.loss(
        averaging.joined(params, part), batch, None
    )
    if task.chunk:
      one = jax.checkpoint(one)
    return parts_lib.chunked(one, task.chunk)(part, data['train'])[0]

  def grad_at(params):
    return lambda part, drawn: jax.grad(loss)(part, params, *drawn)

  def drawn(draw, data, key):
    """Returns minibatches and the keys of their noise."""

    def one(i):
      one_key = jax.random.fold_in(key, i)
      noise = programs.noise_key(one_key, 0)  # Apart from the batch's keys.
      return draw(data, one_key, jnp.int32(0)), noise

    return jax.vmap(one)(jnp.arange(num_batches))

  @jax.jit
  def at_point(params, data, key):
    part = moving(params)
    f = lambda part: whole_loss(part, params, data)
    value, full = jax.value_and_grad(f)(part)
    norm, low = estimates.smoothness(f, part, key, num_steps=num_products)
    found = estimates.moments(
        grad_at(params), full, part, drawn(draw, data, key)
    )
    square = sum(jnp.vdot(g, g) for g in jax.tree.leaves(full))
    return value, square, norm, low, found.variance, found.error

  @jax.jit
  def between(a, b, data, key):
    parts = moving(a), moving(b)
    full = jax.grad(lambda part: whole_loss(part, a, data))
    means = [
        estimates.mean_smoothness(grad_at(a), *parts, drawn(one, data, key))
        for one in (draw_one, draw)
    ]
    return estimates.local_smoothness(full, *parts), *means

  rows, pairs = [], []
  for i, params in enumerate(path.points):
    point_key = jax.random.fold_in(key, i)
    rows.append(at_point(params, task.data, point_key))
    if i:
      pairs.append(between(path.points[i - 1], params, task.data, point_key))
    report(1)
  floats = np.asarray(rows, float).T.tolist()
  values, squares, hessians, curvatures, variances, errors = floats
  local, single, batched = np.asarray(pairs, float).max(0)
  bound = task.optimum if task.optimum is not None else task.lower_bound
  lower = min(values) if bound is None else bound
  best = min(values) if task.optimum is None else task.optimum
  gaps = [max(value - lower, 0.0) for value in values]
  fitted = estimates.fit_second_moment(gaps, squares, variances)
  smoothness = max(*hessians, local)
  # Gaps below rounding have no PL ratio.
  floor = 1e3 * float(jnp.finfo(rows[0][0].dtype).eps) * max(map(abs, values))
  clients, error = (), 0.0
  if is_federated:
    clients, error = _clients(finished, task, path.points, moving, num_products)
  return Constants(
      smoothness=smoothness,
      least_curvature=min(curvatures),
      local_smoothness=local,
      # By Jensen L is at most either.
      mean_smoothness=max(smoothness, single),
      batch_smoothness=max(smoothness, batched),
      variance=max(variances),
      variance_error=errors[int(np.argmax(variances))],
      slope=fitted.slope,
      growth=1 + fitted.growth,
      noise=fitted.noise,
      pl=estimates.pl_constant(
          [value - best for value in values], squares, floor=floor
      ),
      initial_gap=gaps[0],
      lower_bound=lower,
      best=min(values),
      client_smoothness=clients,
      client_error=error,
  )


def _clients(
    finished: runs.Finished,
    task: task_lib.Task,
    points: list[Any],
    moving: Callable[[Any], Any],
    num_products: int,
) -> tuple[tuple[float, ...], float]:
  """Returns L_l of each client, and sum_l w_l ||grad f_l(W_0)||^2."""
  client_loss = partition.client_loss(task.loss)

  @jax.jit
  def of_clients(params, data):
    part = moving(params)

    def of_client(client):
      f = lambda part: client_loss(
          averaging.joined(params, part), client, None
      )[0]
      norm, _ = estimates.smoothness(
          f, part, jax.random.key(0), num_steps=num_products
      )
      square = sum(jnp.vdot(g, g) for g in jax.tree.leaves(jax.grad(f)(part)))
      return norm, square

    return jax.lax.map(of_client, data['clients'])

  found = [of_clients(params, task.data) for params in points]
  weights = np.asarray(arguments.make_cohort(finished.config, task).weights)
  return (
      tuple(np.max([np.asarray(norms) for norms, _ in found], 0).tolist()),
      float(weights @ np.asarray(found[0][1])),
  )
