"""Problems on which gaps are measured: linear teachers, and any task.

A teacher's population loss is known, and so is the mean gap of asymmetric LoRA
trained to its optimum. Symbols as in `generalization`: Delta = W* - W_0 the shift of
a teacher, sigma its label noise, N the size of a sample.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.tasks import task as task_lib

_CRITERIA: dict[str | None, Callable] = {
    'cross_entropy': optax.softmax_cross_entropy_with_integer_labels,
    'squared': lambda outputs, y: 0.5 * (outputs[:, 0] - y) ** 2,
    'absolute': lambda outputs, y: jnp.abs(outputs[:, 0] - y),
}


class Problem(NamedTuple):
  """What is adapted, on which examples, and what it is judged by."""

  name: str
  params: Any  # W_0 and whatever is not adapted.
  data: Any  # Tree of arrays, an argument of what is compiled.
  losses: Callable[[Any, Any], jax.Array]  # (params, batch) -> (n,).
  draw: Callable[[Any, jax.Array, int], Any]  # (data, key, n) -> batch.
  population: Callable[[Any, Any], jax.Array]  # (params, data) -> scalar.
  is_exact: bool = False  # Is `population` the law's own and cheap? A twin of
  # each run, trained on it, is then a control variate.
  num_samples: int | None = None  # Most examples that `draw` has.


class Teacher(NamedTuple):
  """y = x W* + sigma e with x and e standard Gaussian."""

  start: jax.Array  # (m, n), W_0.
  target: jax.Array  # (m, n), W* = W_0 + Delta.
  noise: jax.Array  # shape=(), sigma >= 0.


def make_teacher(
    key: jax.Array,
    m: int,
    n: int,
    *,
    shift: float,
    noise: float,
    shift_rank: int | None = None,
) -> Teacher:
  """Returns a random linear teacher.

  Args:
    key: typed PRNG key.
    m: inputs, >= 1.
    n: outputs, >= 1.
    shift: Frobenius norm of Delta, >= 0.
    noise: standard deviation of each label's noise, >= 0.
    shift_rank: rank of Delta, in [1, min(m, n)]; None for a dense one.

  Raises:
    ValueError: an argument outside its range.
  """
  checks.at_least(1, m=m, n=n)
  shift_rank = min(m, n) if shift_rank is None else shift_rank
  checks.within(f'[1, {min(m, n)}]', shift_rank=shift_rank)
  checks.at_least(0, shift=shift, noise=noise)
  keys = jax.random.split(key, 3)
  start = jax.random.normal(keys[0], (m, n)) / math.sqrt(m)
  thin = jax.random.normal(keys[1], (m, shift_rank))
  delta = thin @ jax.random.normal(keys[2], (shift_rank, n))
  delta = shift * delta / jnp.linalg.norm(delta)
  return Teacher(start, start + delta, jnp.asarray(noise, start.dtype))


def population_loss(weight: jax.Array, teacher: Teacher) -> jax.Array:
  """Returns E ||x W - y||^2 / 2 = ||W - W*||_F^2 / 2 + n sigma^2 / 2."""
  n = weight.shape[1]
  excess = jnp.sum((weight - teacher.target) ** 2)
  return 0.5 * (excess + n * teacher.noise**2)


def expected_gap(teacher: Teacher, side: str, rank: int, size: int) -> float:
  """Returns the mean gap of asymmetric LoRA trained to its optimum.

  Least squares with k Gaussian features and residual variance tau^2 has mean
  gap (tau^2 / 2) (k / N + k / (N - k - 1)) an output. A frozen left factor
  leaves k = r features and the noise of what it cannot reach,
  sum tau^2 = n sigma^2 + (1 - r/m) ||Delta||_F^2; a frozen right one k = m
  features for r directions of the outputs, sum tau^2 = r sigma^2.

  Args:
    teacher: the problem.
    side: the frozen factor, 'left' or 'right'.
    rank: r >= 1, clipped to the frozen side.
    size: N, more than k + 1.

  Raises:
    ValueError: another side, a rank < 1, or a size <= k + 1, where the mean is
      infinite or the sample is interpolated.
  """
  m, n = teacher.start.shape
  is_side = side in ('left', 'right')
  checks.that(is_side, "side 'left' or 'right'", side=repr(side))
  checks.at_least(1, rank=rank)
  noise = float(teacher.noise) ** 2
  rank = min(rank, m if side == 'left' else n)
  delta = np.asarray(teacher.target - teacher.start, np.float64)
  if side == 'left':
    features = rank
    variance = n * noise + (1 - rank / m) * np.sum(delta**2)
  else:
    features, variance = m, rank * noise
  if size <= features + 1:
    raise ValueError(f'Expected size > {features + 1}, got size={size}.')
  return 0.5 * variance * (features / size + features / (size - features - 1))


def teacher_problem(teacher: Teacher) -> Problem:
  """Returns the problem of a teacher; its population loss is exact."""

  def draw(teacher, key, num):
    input_key, noise_key = jax.random.split(key)
    m, n = teacher.target.shape
    x = jax.random.normal(input_key, (num, m), teacher.target.dtype)
    e = jax.random.normal(noise_key, (num, n), teacher.target.dtype)
    return {'x': x, 'y': x @ teacher.target + teacher.noise * e}

  def losses(params, batch):
    return 0.5 * jnp.sum((batch['x'] @ params['w'] - batch['y']) ** 2, -1)

  return Problem(
      name='teacher',
      params={'w': teacher.start},
      data=teacher,
      losses=losses,
      draw=draw,
      population=lambda params, teacher: population_loss(params['w'], teacher),
      is_exact=True,
  )


def task_problem(
    task: task_lib.Task, key: jax.Array, *, num_test: int | None = None
) -> Problem:
  """Returns the problem of a task: samples of its training split, test loss.

  Training samples are drawn without replacement, the population is a fixed
  random part of the test split ('validation' where there is none).

  Args:
    task: one with `outputs` and a known `criterion`.
    key: typed PRNG key of the initial weights and of the part.
    num_test: examples of the test split, >= 1; None for all.

  Raises:
    ValueError: a task without outputs or criterion, without a held-out split,
      or num_test outside its size.
  """
  outputs, criterion = task.outputs, _CRITERIA.get(task.criterion)
  if outputs is None or criterion is None:
    raise ValueError(
        f'Expected a task with outputs and a criterion in'
        f' {tuple(_CRITERIA)}, got {task.name} with'
        f' criterion={task.criterion!r}.'
    )
  held_out = [name for name in ('test', 'validation') if name in task.data]
  if not held_out:
    raise ValueError(
        "Expected a task with a split 'test' or 'validation', got"
        f' {sorted(task.data)}.'
    )
  test = task.data[held_out[0]]
  total = test['index'].shape[0]
  num_test = total if num_test is None else num_test
  checks.within(f'[1, {total}]', num_test=num_test)
  init_key, test_key = jax.random.split(key)
  rows = task_lib.shuffled(test_key, jnp.arange(num_test), total)
  params = task.init(init_key)
  losses = lambda params, batch: criterion(outputs(params, batch), batch['y'])

  def draw(data, key, num):
    rows = task_lib.shuffled(key, jnp.arange(num), task.num_samples)
    return task_lib.take(data['train'], rows)

  return Problem(
      name=task.name,
      params=params,
      data={'train': task.data['train'], 'test': task_lib.take(test, rows)},
      losses=losses,
      draw=draw,
      population=lambda params, data: jnp.mean(losses(params, data['test'])),
      num_samples=task.num_samples,
  )
