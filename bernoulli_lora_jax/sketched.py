"""A4: weights that move at each step by the increment of a thin factor.

A link of a chain that trains one factor from zero can stay merged: after each step
of the optimiser W <- W + s L dR (left links, L frozen) or W + s dL R. The loss then
meets W alone, L R being zero, and its derivative is formed by the trained factor
alone (`inject.Pair.trained`, `lowrank.sketched_product`):

  forward      x W
  backward     dx = dy W^T; left: (x L)^T dy, of which x L is kept, r numbers a
               token, in place of x; right: x^T (dy R^T)
  step         W read and written once, in place where the state is donated

Neither x^T dy, of the size of W, nor an adapter's product with x exists.
`adapters.make_chain(sketched=True)` is the chain; this file moves its weights.

The sum W + s L R is formed in float32 or wider and rounded once a step: with
bfloat16 weights to nearest (changes below half an ulp of W are lost), at random
('stochastic', they arrive in the mean) or with what was cut off kept ('compensated',
a second W). Products with weights narrower than float32 are at the default precision
of the device's matrix units (TF32 and finer: 2^-11 of the increment), others at
the highest.

Of a coordinate sketch x L and dy R^T are gathers, and W moves by r lines: rows of a
left link, columns of a right one. Lines of a W narrower than float32 are kept wide
for the link (`masters`): each step moves these and sets what they are rounded to in W,
so that within a link nothing is lost; 'compensated' keeps what the last rounding cut
off for the links that follow.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bernoulli_lora_jax import factors as factors_lib
from bernoulli_lora_jax import fused
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import merging
from bernoulli_lora_jax import policies
from bernoulli_lora_jax import rounding as rounding_lib

# Of a frozen side, the factor that moves the lines at its rows.
_MOVING = {'left': 'right', 'right': 'left'}


def masters(
    leaves: Sequence[Any],
    factors: merging.Pairs,
    remainders: Mapping[str, jax.Array],
    found: Sequence[policies.Adapted],
) -> merging.Pairs:
  """Returns the lines of W that a link moves, as they are at its start.

  Args:
    leaves: of params, in their order.
    factors: {path: {'left_rows', 'right_rows'}}, see `factors.draw_link`; others
      have no lines.
    remainders: {path: (*batch, m, n)} of 'compensated', else {}.
    found: what is adapted.

  Returns:
    {path: {'right': (*batch, r, n), 'left': (*batch, m, r)}}, float32 or wider, of
    the matrices that are narrower and have rows.
  """
  made: merging.Pairs = {}
  for one in found:
    m, rows = one.matrix, factors_lib.rows_of(factors[one.matrix.path])
    if rows and matrices_lib.wide(m.dtype) != m.dtype:
      leaf, rest = leaves[m.index], remainders.get(m.path)
      made[m.path] = {
          _MOVING[side]: _lines(m, leaf, rest, side, places)
          for side, places in rows.items()
      }
  return made


def moved(
    leaves: Sequence[Any],
    pairs: Mapping[str, inject.Pair],
    masters: merging.Pairs,
    remainders: Mapping[str, jax.Array],
    keys: Mapping[str, jax.Array],
    found: Sequence[policies.Adapted],
    rounding: str,
) -> tuple[list[Any], merging.Pairs, dict[str, jax.Array]]:
  """Returns the leaves of params with W + L R in place of adapted W.

  Args:
    leaves: of params, in their order.
    pairs: {path: left (*batch, m, r), right (*batch, r, n)}, the scale s in them:
      the frozen factor, or its rows, and the increment of the trained one.
    masters: of the link, see `masters`.
    remainders: {path: (*batch, m, n)} of 'compensated', else {}.
    keys: {path: shape=batch, typed PRNG keys} of the step.
    found: what is adapted.
    rounding: 'nearest', 'stochastic' or 'compensated', see `rounding`.

  Returns:
    The leaves, the new masters and the new remainders.
  """
  leaves, kept, rests = list(leaves), dict(masters), dict(remainders)
  for one in found:
    m = one.matrix
    leaf, pair, rest = leaves[m.index], pairs[m.path], rests.get(m.path)
    if pair.rows:
      leaf, lines, rest = _with_lines(
          m, leaf, pair, kept.get(m.path), rest, keys[m.path], rounding
      )
      if m.path in kept:
        kept[m.path] = lines
    else:
      total, rest = _whole(m.view(leaf), pair, rest, keys[m.path], rounding)
      leaf = m.unview(total)
    leaves[m.index] = leaf
    if rest is not None:
      rests[m.path] = rest
  return leaves, kept, rests


def _whole(
    weight: jax.Array,
    pair: inject.Pair,
    remainder: jax.Array | None,
    keys: jax.Array,
    mode: str,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns W + L R of all entries, rounded, and the remainder."""
  if fused.takes(weight, pair.left.shape[-1], mode):
    return fused.add_product(weight, pair.left, pair.right, keys, mode), None
  add = functools.partial(_add, mode=mode)
  return merging.entry_by_entry(add, weight, pair, remainder, keys)


def _with_lines(
    m: matrices_lib.Matrix,
    leaf: jax.Array,
    pair: inject.Pair,
    masters: Mapping[str, jax.Array] | None,
    remainder: jax.Array | None,
    keys: jax.Array,
    mode: str,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array | None]:
  """Returns W with its lines moved, the lines, and the remainder."""
  round_all, made = functools.partial(_rounded, m.dtype, mode), {}
  for _ in m.batch:
    round_all = jax.vmap(round_all)
  for side, rows in pair.rows.items():
    name = _MOVING[side]
    old = masters[name] if masters else _lines(m, leaf, remainder, side, rows)
    made[name] = old + getattr(pair, name)
    lines, rest = round_all(made[name], keys)
    leaf = m.with_lines(leaf, side, rows, lines)
    if remainder is not None and rest is not None:
      remainder = m.viewed.with_lines(remainder, side, rows, rest)
  return leaf, made, remainder


def _lines(
    m: matrices_lib.Matrix,
    leaf: jax.Array,
    remainder: jax.Array | None,
    side: str,
    rows: jax.Array,
) -> jax.Array:
  """Returns lines of W with what it lacks, wide."""
  wide = matrices_lib.wide(m.dtype)
  lines = m.lines(leaf, side, rows).astype(wide)
  if remainder is None:
    return lines
  return lines + m.viewed.lines(remainder, side, rows).astype(wide)


def _rounded(
    dtype: Any, mode: str, lines: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the lines of one matrix rounded, and what they then lack."""
  if mode == 'stochastic' and dtype == jnp.bfloat16:
    return rounding_lib.dithered(lines, key), None
  zero = jnp.zeros(lines.shape, dtype)
  return rounding_lib.add(zero, lines, zero, key, mode)


def _add(
    weight: jax.Array,
    pair: Mapping[str, jax.Array],
    remainder: jax.Array | None,
    key: jax.Array,
    *,
    mode: str,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns W + L R of one matrix, rounded, and its remainder."""
  left, right = pair['left'], pair['right']
  is_narrow = weight.dtype.itemsize < left.dtype.itemsize
  precision = 'default' if is_narrow else 'highest'
  change = jnp.matmul(left, right, precision=precision)
  if mode == 'stochastic' and weight.dtype == jnp.bfloat16:
    total = weight.astype(change.dtype) + change
    return rounding_lib.dithered(total, key), None
  return rounding_lib.add(weight, change, remainder, key, mode)
