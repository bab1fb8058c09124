"""The pairs of thin factors of a chain of adapters: how they start, which train.

A link begins with L R = 0: one factor of a pair is drawn and frozen (both may
train), the other is zero. Shapes: left (*batch, m, r), right (*batch, r, n).
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import inject
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import lowrank
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import merging
from bernoulli_lora_jax import policies
from bernoulli_lora_jax import sketches

Adapted = policies.Adapted
ChainPolicy = policies.ChainPolicy
Pairs = merging.Pairs  # {path: {'left' and/or 'right': array}}

_FACTOR = 2  # Purpose folded into a matrix's key; 0, 1: links.py.


class Start(NamedTuple):
  """The factors and coins with which a link begins."""

  factors: Pairs  # Frozen and trained.
  coins: dict[str, jax.Array]  # {path: shape=batch, True: left}; traced ones.


def draw_link(
    key: jax.Array,
    link: int | jax.Array,
    found: Sequence[Adapted],
    policy: ChainPolicy,
    sketched: bool = False,
) -> Start:
  """Returns the factors and coins with which a link begins.

  Args:
    key: typed PRNG key of the chain.
    link: number of the link, from 0.
    found: what is adapted.
    policy: how it is drawn.
    sketched: whether frames of unit vectors are given by their rows.

  Returns:
    A `Start`. The product of each pair is zero. By rows, {side + '_rows': (*batch,
    r) int32}: the sorted places of the ones in the columns of a frozen factor, and
    places beyond its side for columns of zeros, as all are where a coin fell to
    the other side.
  """
  link_key = jax.random.fold_in(key, link)
  # Of the factors' dtype: float8 promotes to nothing by itself.
  matrices = [
      one.matrix._replace(dtype=matrices_lib.wide(one.matrix.dtype))
      for one in found
  ]
  by_rows = sketched and policy.sketch.rows is not None
  if policy.side is None:
    return Start(_both(link_key, found, policy), {})
  drawn = links_lib.draw_links(
      link_key,
      matrices,
      ranks=[one.rank for one in found],
      probs=[one.prob for one in found if one.prob is not None],
      sketch=policy.sketch,
      shared_coin=policy.shared_coin,
      frame='orthonormal' if by_rows else policy.frame,
      named=[one.frame for one in found] if policy.shared_frames else None,
  )
  start = _rows if by_rows else _one_sided
  coins = {
      m.path: link.coin
      for m, link in zip(matrices, drawn, strict=True)
      if link.coin is not None
  }
  return Start(
      {
          one.matrix.path: start(one, link)
          for one, link in zip(found, drawn, strict=True)
      },
      coins,
  )


def scaled(
    factors: Pairs, found: Sequence[Adapted], sketched: bool = False
) -> dict[str, inject.Pair]:
  """Returns the factors as losses see them: the scale s in the right one.

  Args:
    factors: of each, left and right; beside rows both are trained, and have s.
    found: what is adapted.
    sketched: whether their products are zero and stay so.
  """
  pairs = {}
  for one in found:
    own = factors[one.matrix.path]
    rows = rows_of(own)
    pairs[one.matrix.path] = inject.Pair(
        one.scale * own['left'] if rows else own['left'],
        one.scale * own['right'],
        one.matrix.axes,
        one.trained if sketched else (),
        rows,
    )
  return pairs


def rows_of(pair: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns {side: rows} of what a state keeps of a matrix."""
  names = {side: f'{side}_rows' for side in ('left', 'right')}
  return {side: pair[name] for side, name in names.items() if name in pair}


def dense(
    pair: Mapping[str, jax.Array], m: matrices_lib.Matrix
) -> dict[str, jax.Array]:
  """Returns a completed pair with the frames of its rows formed."""
  left, right = pair['left'], pair['right']
  if 'left_rows' in pair:
    left += lowrank.frame(pair['left_rows'], m.m).astype(left.dtype)
  if 'right_rows' in pair:
    right += lowrank.frame(pair['right_rows'], m.n).mT.astype(right.dtype)
  return {'left': left, 'right': right}


def completed(factors: Pairs, found: Sequence[Adapted]) -> Pairs:
  """Returns the factors with zeros for those that are not there."""
  pairs = {}
  for one in found:
    m, pair = one.matrix, factors[one.matrix.path]
    shapes = {'left': (m.m, one.inner), 'right': (one.inner, m.n)}
    dtype = matrices_lib.wide(m.dtype)
    zeros = {
        side: jnp.zeros((*m.batch, *shape), dtype)
        for side, shape in shapes.items()
        if side not in pair
    }
    pairs[m.path] = {**zeros, **pair}
  return pairs


def shared(factors: Pairs, found: Sequence[Adapted]) -> Pairs:
  """Returns the factors with one array for what a group of left links froze.

  What reads it with the same x is then one operation, once it is compiled.
  """
  first: dict[tuple[str, str], jax.Array] = {}
  pairs = {}
  for one in found:
    pair = dict(factors[one.matrix.path])
    if one.trained == ('right',):
      for name in {'left', 'left_rows'} & pair.keys():
        pair[name] = first.setdefault((one.frame.path, name), pair[name])
    pairs[one.matrix.path] = pair
  return pairs


def trained_pairs(factors: Pairs, found: Sequence[Adapted]) -> Pairs:
  """Returns the factors that an optimiser sees."""
  return {
      one.matrix.path: {
          side: factors[one.matrix.path][side] for side in one.trained
      }
      for one in found
  }


def joined(factors: Pairs, trained: Pairs) -> Pairs:
  """Returns the factors with the trained ones replaced."""
  return {path: {**factors[path], **trained[path]} for path in factors}


def moving(
    trained: Pairs, coins: dict[str, jax.Array], side: str | None = None
) -> Pairs:
  """Returns {path: {side: does it train?}}, broadcastable to the factors.

  Args:
    trained: what an optimiser sees.
    coins: of a state.
    side: on which they fell, where it is known: the answer is then NumPy's.
  """
  always = jnp.ones((), bool)
  moves = {}
  for path, pair in trained.items():
    moves[path] = {name: always for name in pair}
    if path in coins:
      is_left: Any = coins[path][..., None, None]
      if side is not None:
        is_left = np.full(is_left.shape, side == 'left')
      moves[path] = {'left': ~is_left, 'right': is_left}
  return moves


def where(condition: Any, new: Any, old: Any) -> Any:
  """Returns `new` where the condition, a tree like them, holds, else `old`.

  A condition of NumPy, one answer for all entries, computes nothing.
  """
  return jax.tree.map(_where, condition, new, old)


def _where(condition: Any, new: jax.Array, old: jax.Array) -> jax.Array:
  if isinstance(condition, np.ndarray):
    return new if condition.all() else old
  return jnp.where(condition, new, old)


def without_product(
    one: Adapted,
    pair: dict[str, jax.Array],
    coins: dict[str, jax.Array],
    zero: str,
) -> dict[str, jax.Array]:
  """Returns a pair with L R = 0: what started from zero is zero again."""
  zeros = jax.tree.map(jnp.zeros_like, pair)
  if one.prob is None:
    return {**pair, zero: zeros[zero]}
  moves = moving({one.matrix.path: {s: pair[s] for s in one.trained}}, coins)
  moves = moves[one.matrix.path]
  return {**pair, **{s: jnp.where(moves[s], zeros[s], pair[s]) for s in moves}}


def _both(
    key: jax.Array, found: Sequence[Adapted], policy: ChainPolicy
) -> Pairs:
  """Returns the starts of pairs that are trained on both sides.

  Factors of one shape are drawn in one operation: each for itself they take a
  minute to compile for a model of a hundred matrices.
  """
  side = 'left' if policy.zero == 'right' else 'right'
  groups: dict[Any, list[Adapted]] = {}
  for one in found:
    m = one.matrix
    length = m.m if side == 'left' else m.n
    shape = length, one.inner, jnp.dtype(matrices_lib.wide(m.dtype))
    groups.setdefault(shape, []).append(one)
  pairs = {}
  for (length, rank, dtype), members in groups.items():
    keys = links_lib.matrix_keys(key, [one.matrix for one in members])
    draw = functools.partial(_random, length, rank, dtype, policy.init)
    drawn, place = jax.vmap(draw)(keys), 0
    for one in members:
      m = one.matrix
      size = math.prod(m.batch)
      random = drawn[place : place + size].reshape(*m.batch, length, rank)
      place += size
      if side == 'left':
        zero = jnp.zeros((*m.batch, rank, m.n), dtype)
        pairs[m.path] = {'left': random, 'right': zero}
      else:
        zero = jnp.zeros((*m.batch, m.m, rank), dtype)
        pairs[m.path] = {'left': zero, 'right': random.mT}
  return {one.matrix.path: pairs[one.matrix.path] for one in found}


def _random(
    length: int, rank: int, dtype: Any, init: str, key: jax.Array
) -> jax.Array:
  """Returns the random factor of a matrix, (length, rank)."""
  key = jax.random.fold_in(key, _FACTOR)
  if init == 'normal':
    return jax.random.normal(key, (length, rank), dtype)
  bound = 1 / math.sqrt(length)
  return jax.random.uniform(key, (length, rank), dtype, -bound, bound)


def _one_sided(one: Adapted, link: links_lib.Link) -> dict[str, jax.Array]:
  """Returns the start of a pair of which one factor is frozen."""
  m = one.matrix
  dtype = matrices_lib.wide(m.dtype)
  left = jnp.zeros((*m.batch, m.m, one.inner), dtype)
  right = jnp.zeros((*m.batch, one.inner, m.n), dtype)
  if link.is_left is not False:
    left = _frozen(link.left, m.m, one, dtype)
  if link.is_left is not True:
    right = _frozen(link.right, m.n, one, dtype).mT
  if link.coin is not None:
    coin = link.coin[..., None, None]
    left = jnp.where(coin, left, jnp.zeros((), dtype))
    right = jnp.where(coin, jnp.zeros((), dtype), right)
  return {'left': left, 'right': right}


def _rows(one: Adapted, link: links_lib.Link) -> dict[str, jax.Array]:
  """Returns the rows of the frozen factors, see `draw_link`."""
  m, rows = one.matrix, {}
  for side, dim, is_left in (('left', m.m, True), ('right', m.n, False)):
    if link.is_left is (not is_left):
      continue
    basis = getattr(link, side)
    drawn = jnp.arange(dim) if basis is None else jnp.sort(basis)
    beyond = dim + jnp.arange(one.inner, dtype=jnp.int32)
    beyond = jnp.broadcast_to(beyond, (*m.batch, one.inner))
    own = beyond.at[..., : drawn.shape[-1]].set(drawn)
    if link.coin is not None:
      own = jnp.where(link.coin[..., None] == is_left, own, beyond)
    rows[f'{side}_rows'] = own
  return rows


def _frozen(
    basis: sketches.Basis, dim: int, one: Adapted, dtype: Any
) -> jax.Array:
  """Returns a basis as (*batch, dim, inner), with zero columns to the right."""
  if basis is None:
    basis = jnp.broadcast_to(
        jnp.eye(dim, dtype=dtype), (*one.matrix.batch, dim, dim)
    )
  elif not sketches.is_frame(basis):
    basis = jax.nn.one_hot(basis, dim, dtype=dtype).mT
  missing = one.inner - basis.shape[-1]
  widths = [(0, 0)] * (basis.ndim - 1) + [(0, missing)]
  return jnp.pad(basis.astype(dtype), widths)
