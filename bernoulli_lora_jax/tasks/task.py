"""The task side of the narrow waist, and how minibatches are drawn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]

_ROUNDS = 12  # Four are enough for thousands, not for ten elements.


class Task(NamedTuple):
  """Data, model and loss; any task runs under any method.

  `data` maps a split ('train', and where they exist 'validation', 'test') to a
  batch of all its examples, so `data['train']` is the batch of the full
  gradient; the entry 'clients' of a federated task is no split, see `partition`. It
  is always an argument of what is compiled, never captured.
  """

  name: str
  init: Callable[[jax.Array], Any]  # (key) -> params to fine-tune.
  data: dict[str, Batch]  # Arrays with a leading axis; 'index' is (N,) int32.
  # (params, batch, key) -> (scalar mean, metrics). Noise comes from
  # fold_in(key, index of the example); key None is the loss without noise.
  loss: Callable[[Any, Batch, jax.Array | None], tuple[jax.Array, dict]]
  batch: Callable[[dict[str, Batch], jax.Array, jax.Array], Batch]
  # (params, data, split) -> metrics; validation steers, test is looked at once.
  evaluate: Callable[[Any, dict[str, Batch], str], dict[str, jax.Array]]
  num_samples: int  # Examples of the training split.
  batch_size: int
  optimum: float | None = None  # f* where it is known.
  lower_bound: float | None = None  # Of f, where one is known.
  # (params, batch) -> (b, K) float, without noise, where the loss is the mean of
  # a convex function `criterion` of each row: 'cross_entropy' (batch['y'] are
  # classes), 'squared' (half of the square) or 'absolute' (batch['y'] are numbers).
  outputs: Callable[[Any, Batch], jax.Array] | None = None
  criterion: str | None = None
  smoothness: float | None = None  # L where it is known.


def take(split: Batch, rows: jax.Array) -> Batch:
  """Returns the examples at `rows`, shape (b,)."""
  return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), split)


def uniform_batch(batch_size: int):
  """Returns `Task.batch` that draws with replacement, as T2-T4 assume."""

  def batch(data: dict[str, Batch], key: jax.Array, step: jax.Array) -> Batch:
    size = data['train']['index'].shape[0]
    step_key = jax.random.fold_in(key, step)
    rows = jax.random.randint(step_key, (batch_size,), 0, size)
    return take(data['train'], rows)

  return batch


def epoch_batch(batch_size: int):
  """Returns `Task.batch` that passes through a fresh shuffle every epoch.

  An epoch is floor(N / batch_size) batches; what is left over, other examples
  every time, is skipped. The shuffle is evaluated where it is needed (see
  `shuffled`), so any step can be drawn without the steps before it.
  """

  def batch(data: dict[str, Batch], key: jax.Array, step: jax.Array) -> Batch:
    size = data['train']['index'].shape[0]
    steps_per_epoch = size // batch_size
    if steps_per_epoch == 0:
      raise ValueError(
          f'Expected batch_size <= {size}, the number of training examples, got'
          f' batch_size={batch_size}.'
      )
    epoch_key = jax.random.fold_in(key, step // steps_per_epoch)
    first = step % steps_per_epoch * batch_size
    rows = shuffled(epoch_key, first + jnp.arange(batch_size), size)
    return take(data['train'], rows)

  return batch


def shuffled(key: jax.Array, position: jax.Array, size: int) -> jax.Array:
  """Returns the entries of a pseudo-random permutation of range(size).

  A Feistel network on the next even power of two, walked along its
  cycles until it falls below `size`: no array of length `size` is formed, so it
  is cheap inside a training step and under `vmap`.

  Args:
    key: typed PRNG key; names the permutation.
    position: integers in [0, size), any shape.
    size: number of permuted elements, at most 2^30.

  Returns:
    Integers in [0, size), distinct for distinct positions.

  References:
    Black and Rogaway, Ciphers with arbitrary finite domains, 2002 (cycle
    walking).
  """
  half = max(1, ((size - 1).bit_length() + 1) // 2)
  low = jnp.uint32((1 << half) - 1)
  round_keys = jax.random.bits(key, (_ROUNDS,), jnp.uint32)

  def mix(x: jax.Array) -> jax.Array:  # The finaliser of MurmurHash3.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

  def permute(x: jax.Array) -> jax.Array:
    left, right = x >> half, x & low
    for i in range(_ROUNDS):
      left, right = right, left ^ (mix(right + round_keys[i]) & low)
    return (left << half) | right

  def walk(x: jax.Array) -> jax.Array:
    return jnp.where(x < size, x, permute(x))

  x = permute(position.astype(jnp.uint32))
  is_outside = lambda x: jnp.any(x >= size)
  return jax.lax.while_loop(is_outside, walk, x).astype(jnp.int32)
