"""Who takes part in a round, and the average of what they send.

M clients are the leading axis of arrays. To spread them over devices, shard that
axis under `jit`: sums over it are then reductions between the devices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import matrices

_COHORT = 2  # Purpose folded into a round's key; 0, 1: federated.py.


class Clients(NamedTuple):
  """Who takes part, and how what they send is averaged."""

  num_clients: int
  weights: tuple[float, ...] | jax.Array  # (M,), of sum 1; an array if traced.
  cohort: int | None


def weighted_sum(stack: Any, weights: Any) -> Any:
  """Returns sum_l w_l x_l over the clients, in the dtype of x."""

  def total(x):
    wide = matrices.wide(x.dtype)
    spread = jnp.asarray(weights, wide).reshape(-1, *[1] * (x.ndim - 1))
    # A client of weight zero adds nothing, not NaN times zero.
    terms = jnp.where(spread == 0, 0, spread * x.astype(wide))
    return jnp.sum(terms, axis=0).astype(x.dtype)

  return jax.tree.map(total, stack)


def present(
    clients: Clients, round_key: jax.Array, participants: jax.Array | None
) -> jax.Array:
  """Returns who takes part, shape=(M,), bool."""
  num = clients.num_clients
  if participants is not None:
    if clients.cohort is not None:
      raise ValueError(
          'Expected one of cohort and participants, got'
          f' cohort={clients.cohort} and a mask.'
      )
    if jnp.shape(participants) != (num,):
      raise ValueError(
          f'Expected participants of shape ({num},), got'
          f' {jnp.shape(participants)}.'
      )
    return jnp.asarray(participants, bool)
  if clients.cohort is None:
    return jnp.ones(num, bool)
  key = jax.random.fold_in(round_key, _COHORT)
  return jax.random.permutation(key, num) < clients.cohort


def effective_weights(
    clients: Clients, present: jax.Array, is_mean: bool
) -> jax.Array:
  """Returns the weights of what arrived: w_l M/c, or normalised to sum 1."""
  weights = jnp.asarray(clients.weights, jnp.result_type(float)) * present
  if is_mean:
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1)
  return weights * (
      clients.num_clients / (clients.cohort or clients.num_clients)
  )


def where(mask: jax.Array, new: Any, old: Any) -> Any:
  """Returns `new` for the clients of the mask, `old` for the others."""
  spread = lambda x: mask.reshape(-1, *[1] * (x.ndim - 1))
  return jax.tree.map(lambda n, o: jnp.where(spread(n), n, o), new, old)


def make_clients(
    num_clients: int,
    weights: Sequence[float] | jax.Array | None,
    cohort: int | None,
) -> Clients:
  """Returns `Clients`, the weights normalised.

  Raises:
    TypeError: a number of clients that is traced.
    ValueError: an argument outside its range; of traced weights only the shape.
  """
  num_clients = matrices.static_int('num_clients', num_clients)
  if num_clients < 1:
    raise ValueError(
        f'Expected num_clients >= 1, got num_clients={num_clients}.'
    )
  if cohort is not None:
    cohort = matrices.static_int('cohort', cohort)
  if cohort is not None and not 1 <= cohort <= num_clients:
    raise ValueError(
        f'Expected cohort in [1, {num_clients}], got cohort={cohort}.'
    )
  if isinstance(weights, jax.core.Tracer) and weights.shape == (num_clients,):
    return Clients(num_clients, weights / jnp.sum(weights), cohort)
  values = (
      np.ones(num_clients) if weights is None else np.asarray(weights, float)
  )
  if values.shape != (num_clients,) or not (
      np.all(np.isfinite(values)) and np.all(values >= 0) and values.sum() > 0
  ):
    raise ValueError(
        f'Expected weights: {num_clients} finite numbers >= 0, not all zero, got'
        f' weights={weights}.'
    )
  shares = (values / values.sum()).tolist()
  return Clients(num_clients, tuple(shares), cohort)
