"""How many numbers the thin factors of a matrix hold, train and send.

A matrix of m x n with factors of rank r: a left link sketches R^m and trains the
right factor, of min(r, m) n numbers, a right link the left one, of m min(r, n).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def of_factors(m: int, n: int, rank: int) -> dict[str, int]:
  """Returns the numbers of each trained factor, without padding."""
  return {'left': m * min(rank, n), 'right': min(rank, m) * n}


def mean_trained(m: int, n: int, *, rank: int, prob: Any) -> Any:
  """Returns the mean number of trained parameters of one matrix a step.

  Args:
    m: length of the left side.
    n: length of the right side.
    rank: dimension of the subspaces.
    prob: P(left).

  Returns:
    prob min(rank, m) n + (1 - prob) m min(rank, n).
  """
  sizes = of_factors(m, n, rank)
  return prob * sizes['right'] + (1 - prob) * sizes['left']


def sent(
    rows: Iterable[
        tuple[int, Mapping[str, int], jax.Array | None, Sequence[str]]
    ],
    beside: int = 0,
) -> jax.Array:
  """Returns the numbers of what a link trains, shape (), a float.

  Args:
    rows: (entries of the stack, numbers of each factor, coin of each entry or
      None, the factors that train without a coin), a matrix each.
    beside: numbers of other leaves.
  """
  known, total = beside, jnp.zeros([], jnp.result_type(float))
  for entries, sizes, coin, sides in rows:  # Known ones may be beyond 32 bits.
    if coin is None:
      known += entries * sum(sizes[side] for side in sides)
    else:
      known += entries * sizes['left']
      more = float(sizes['right'] - sizes['left'])
      total += jnp.sum(coin).astype(total.dtype) * more
  return total + float(known)
