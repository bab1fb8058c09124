"""What every matrix of a tree draws at one link, and what it does with it.

A link of the chain (A1) tosses a coin for each matrix and draws a random
subspace of its left or its right side. The update of a matrix is a product of
two thin factors either way, Q_L (Q_L^T G) or (G Q_R) Q_R^T. The coin chooses
among the factors; the one product outside of the choice fuses with whatever
follows it, and nothing of shape m x m or n x n exists.

Symbols: G in R^(m x n) the incoming update, Q_L (m, r) and Q_R (n, r) the
orthonormal bases, r = min(rank, side).

Reference: Sokolov et al., Bernoulli-LoRA, arXiv 2508.03820, Algorithm 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax.matrices import Matrix
from bernoulli_lora_jax.sketches import Sketch

_COIN = 0  # Purposes folded into a matrix's key of the link.
_FRAME = 1


class Link(NamedTuple):
  """What one matrix draws at one link."""

  coin: jax.Array | None  # shape=batch, bool, True: left. None: known at trace.
  left: sketches.Basis  # Basis of the left sketch; None when it is all of R^m.
  right: sketches.Basis  # Basis of the right sketch; None when all of R^n.
  is_left: bool | None  # The side where `prob` is 0 or 1, else None.


def draw_links(
    key: jax.Array,
    found: Sequence[Matrix],
    *,
    ranks: Sequence[int],
    probs: Sequence[float | jax.Array],
    sketch: Sketch,
    shared_coin: bool = False,
    frame: str = 'orthonormal',
    named: Sequence[Matrix] | None = None,
) -> list[Link]:
  """Draws coin and bases for every matrix of a tree.

  Keys are folded from the link's key, the path and the layer of each matrix, so
  a draw depends on nothing else. Bases of one length are drawn together: the
  compiled program grows with the number of different lengths.

  Args:
    key: typed PRNG key of the link.
    found: the matrices, see `matrices.find`.
    ranks: dimension of the subspace of each, clipped to each side.
    probs: P(left) of each; a Python 0 or 1 draws only the side it needs.
    sketch: law of the subspaces.
    shared_coin: one uniform number decides for the whole tree.
    frame: 'orthonormal', or 'raw' for the samples as drawn (never None then).
    named: for each matrix the one whose left basis it has, of as many rows; None
      for its own. A square one with a coin draws its right basis likewise.

  Returns:
    One `Link` for each matrix.
  """
  sides = [known_side(prob) for prob in probs]
  keys = matrix_keys(key, found)
  starts = np.cumsum([0] + [matrix.entries.size for matrix in found])
  coins = draw_coins(key, found, probs=probs, shared_coin=shared_coin)
  if named is not None:
    keys = jnp.concatenate([keys, matrix_keys(key, named)])
  bases = _draw_bases(keys, starts, found, ranks, sketch, sides, frame)

  def link(i: int) -> Link:
    reshape = lambda x: x.reshape(found[i].batch + x.shape[1:])
    get = lambda side: (reshape(bases[i, side]) if (i, side) in bases else None)
    return Link(coins[i], get('left'), get('right'), sides[i])

  return [link(i) for i in range(len(found))]


def draw_coins(
    key: jax.Array,
    found: Sequence[Matrix],
    *,
    probs: Sequence[float | jax.Array],
    shared_coin: bool = False,
) -> list[jax.Array | None]:
  """Draws the coins of a link alone, as `draw_links` does.

  Returns:
    For each matrix shape=batch, bool, True: left; None where its prob is a
    Python 0 or 1.
  """
  sides = [known_side(prob) for prob in probs]
  if None not in sides:
    return [None] * len(found)
  sizes = [matrix.entries.size for matrix in found]
  spread = jnp.concatenate(
      [
          jnp.full(size, prob, jnp.result_type(float))
          for size, prob in zip(sizes, probs, strict=True)
      ]
  )
  coins = jax.vmap(_toss, (None if shared_coin else 0, 0))(
      key if shared_coin else matrix_keys(key, found), spread
  )
  parts = jnp.split(coins, np.cumsum(sizes)[:-1])
  return [
      part.reshape(matrix.batch) if side is None else None
      for part, matrix, side in zip(parts, found, sides, strict=True)
  ]


def draw_shared_coin(key: jax.Array, prob: float) -> jax.Array:
  """Returns the coin of all matrices of a link, as `draw_coins` does; shape ()."""
  return _toss(key, jnp.asarray(prob, jnp.result_type(float)))


def _toss(key: jax.Array, prob: jax.Array) -> jax.Array:
  return jax.random.bernoulli(jax.random.fold_in(key, _COIN), prob)


def matrix_keys(key: jax.Array, found: Sequence[Matrix]) -> jax.Array:
  """Returns the link's key of every entry of every matrix, concatenated."""
  words = np.concatenate(
      [
          np.stack(
              np.broadcast_arrays(
                  *map(np.uint32, m.path_hash), m.entries.ravel()
              ),
              -1,
          )
          for m in found
      ]
  )

  def fold(words):
    folded = key
    for i in range(3):
      folded = jax.random.fold_in(folded, words[i])
    return folded

  return jax.vmap(fold)(jnp.asarray(words))


def _draw_bases(
    keys: jax.Array,
    starts: np.ndarray,
    found: Sequence[Matrix],
    ranks: Sequence[int],
    sketch: Sketch,
    sides: Sequence[bool | None],
    frame: str,
) -> dict[tuple[int, str], jax.Array]:
  """Returns {(matrix, side): (entries, ...) bases}, drawn once a length.

  Both sides of a square matrix use one draw: only one of them is applied. Where
  there are twice as many keys, the second half are of left bases.
  """
  is_raw = frame == 'raw'
  draw = sketch.samples if is_raw else sketch.bases
  wanted: dict[tuple[int, int, Any], list[int]] = {}
  for i, matrix in enumerate(found):
    dims = {True: {matrix.m}, False: {matrix.n}, None: {matrix.m, matrix.n}}
    for dim in dims[sides[i]]:
      if ranks[i] < dim or is_raw:
        dtype = matrices_lib.wide(matrix.dtype)
        wanted.setdefault((dim, min(ranks[i], dim), dtype), []).append(i)
  drawn = {}
  for (dim, rank, dtype), members in wanted.items():
    places = []
    for i in members:
      is_left = dim == found[i].m and sides[i] is not False
      behind = keys.size - starts[-1] if is_left else 0
      places.append(np.arange(starts[i], starts[i + 1]) + behind)
    frame_keys = jax.vmap(lambda key: jax.random.fold_in(key, _FRAME))(
        keys[np.concatenate(places)]
    )
    stacked = draw(frame_keys, dim, rank, dtype)
    keys = sketches.behind(keys, stacked)  # One factorisation after another.
    offset = 0
    for i in members:
      size = int(starts[i + 1] - starts[i])
      part = stacked[offset : offset + size]
      offset += size
      for side, length in (('left', found[i].m), ('right', found[i].n)):
        if length == dim:
          drawn[i, side] = part
  return drawn


def compress(link: Link, g: jax.Array) -> dict[str, jax.Array]:
  """Returns the trained factor's gradients, the unchosen one zero.

  Args:
    link: the draws of this matrix.
    g: (*batch, m, n).

  Returns:
    {'left': (*batch, r, n), 'right': (*batch, m, r)}; only one of them where
    `prob` is a Python 0 or 1.
  """
  sides = {}
  for side, is_left in (('left', True), ('right', False)):
    if link.is_left in (None, is_left):
      sides[side] = sketches.compress(getattr(link, side), g, side)
  return _zero_unchosen(link, sides)


def expand(link: Link, s: dict[str, jax.Array], m: int, n: int) -> jax.Array:
  """Returns Q_L S_left where the coin fell left, else S_right Q_R^T.

  Args:
    link: the draws of this matrix.
    s: as `compress` returns; the unchosen entry is not read.
    m: length of the left side.
    n: length of the right side.

  Returns:
    (*batch, m, n).
  """
  if link.is_left is True:
    return sketches.expand(link.left, s['left'], m, 'left')
  if link.is_left is False:
    return sketches.expand(link.right, s['right'], n, 'right')
  assert link.coin is not None
  coin = link.coin[..., None, None]
  left, right = link.left, link.right
  if sketches.is_frame(left) and sketches.is_frame(right):
    thin = jnp.where(coin, left, s['right'])
    wide = jnp.where(coin, s['left'], right.mT)
    return jnp.matmul(thin, wide)
  return jnp.where(
      coin,
      sketches.expand(left, s['left'], m, 'left'),
      sketches.expand(right, s['right'], n, 'right'),
  )


def _zero_unchosen(
    link: Link, sides: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  if link.coin is None:
    return sides
  coin = link.coin[..., None, None]
  zero = lambda x: jnp.zeros((), x.dtype)
  return {
      'left': jnp.where(coin, sides['left'], zero(sides['left'])),
      'right': jnp.where(coin, zero(sides['right']), sides['right']),
  }


def chosen(link: Link, batch: tuple[int, ...]) -> list[tuple[str, Any]]:
  """Returns (side, entry) of what `compress` keeps, an entry of a stack at a time.

  Args:
    link: concrete draws of this matrix.
    batch: the matrix's.
  """
  is_left = link.is_left if link.coin is None else np.asarray(link.coin)
  flags = np.broadcast_to(np.asarray(is_left), batch)
  return [
      ('left' if flags[entry] else 'right', entry)
      for entry in np.ndindex(*batch)
  ]


def zero_factors(
    found: Sequence[Matrix], rank: int, prob: float | jax.Array
) -> dict[str, dict[str, jax.Array]]:
  """Returns zeros shaped like `compress`, by path of the matrix."""
  sides = {True: ('left',), False: ('right',), None: ('left', 'right')}[
      known_side(prob)
  ]

  def zeros(matrix: Matrix, side: str) -> jax.Array:
    dtype = matrices_lib.wide(matrix.dtype)
    left = (min(rank, matrix.m), matrix.n)
    right = (matrix.m, min(rank, matrix.n))
    shape = left if side == 'left' else right
    return jnp.zeros((*matrix.batch, *shape), dtype)

  return {
      matrix.path: {side: zeros(matrix, side) for side in sides}
      for matrix in found
  }


def known_side(prob: float | jax.Array) -> bool | None:
  """Returns whether links are left when `prob` is a Python 0 or 1, else None."""
  if isinstance(prob, jax.Array) or prob not in (0, 1):
    return None
  return bool(prob)
