"""How the sum W + s L R is rounded into the dtype of a weight.

A merge sums in promote_types(dtype, float32) and rounds once. Many small merges
into a low-precision weight differ in what becomes of updates below half an ulp
(the spacing of the dtype's numbers):

  nearest      to the nearest number, ties to even: such updates are lost.
  stochastic   up or down at random, to x in the mean: they arrive on average,
               with a random walk of at most one ulp a merge.
  compensated  to nearest, and what was cut off is kept in a second array of the
               same dtype, added at the next merge: they arrive to a relative
               eps of one ulp a merge (float16: or to 2^-25, the half of its
               least subnormal number, where that is more).

A sum beyond the range becomes infinite, or the largest number of a dtype that has no
infinity (float8_e4m3fn): never NaN.

Reference: Gupta et al., Deep learning with limited numerical precision,
arXiv 1502.02551 (stochastic); Kahan, Further remarks on reducing truncation
errors, 1965 (compensated); Wellons, hash-prospector, 2018 (the constants of the hash of
`dithered`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MODES = ('nearest', 'stochastic', 'compensated')


def nearest(x: jax.Array, dtype: Any) -> jax.Array:
  """Returns x in another dtype, the largest number where that has no infinity."""
  info = jnp.finfo(dtype)
  infinity = np.float32(np.inf).astype(jnp.dtype(dtype)).astype(np.float32)
  if not np.isinf(infinity):
    largest = info.max.astype(x.dtype)
    x = jnp.where(jnp.abs(x) > largest, jnp.sign(x) * largest, x)
  return x.astype(dtype)


def stochastic(x: jax.Array, key: jax.Array, dtype: Any) -> jax.Array:
  """Rounds to one of the two neighbours in `dtype`, to x in the mean.

  Args:
    x: array of a wider floating-point dtype, finite or not.
    key: typed PRNG key.
    dtype: floating-point dtype of the result.

  Returns:
    Array of x's shape: the neighbour above with probability (x - below) / ulp.

  Guarantees:
    E[result] = x to the resolution 2^-23 of the uniform draws, where x lies
      within the range of `dtype`.
    |result - x| < one ulp; numbers of `dtype` are returned as they are.
  """
  near = nearest(x, dtype)
  wide = near.astype(x.dtype)
  info = jnp.finfo(dtype)  # Some dtypes have no infinity to go towards.
  other = jnp.nextafter(near, jnp.where(x > wide, info.max, info.min))
  gap = jnp.abs(other.astype(x.dtype) - wide)
  is_exact = (x == wide) | ~jnp.isfinite(x)
  prob = jnp.where(is_exact, 0, jnp.abs(x - wide) / jnp.where(gap > 0, gap, 1))
  return jnp.where(jax.random.uniform(key, x.shape) < prob, other, near)


def dithered(x: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds float32 to bfloat16, to x in the mean, in one pass over the memory.

  `stochastic` with bits of a hash of the place, ten operations a number in place of
  the hundred of jax.random: what a step may spend that rounds each weight. The bits
  are added below the last one of bfloat16, and cut off.

  Args:
    x: array of at most 2^32 numbers of float32, finite or not.
    key: typed PRNG key.

  Returns:
    bfloat16 of x's shape.

  Guarantees:
    E[result] = x to 2^-16 ulp over the draws of a place.
    Numbers of bfloat16 are returned as they are; a sum beyond its range becomes
      infinite; NaN stays.
  """
  first, second = jax.random.bits(key, (2, *[1] * x.ndim), jnp.uint32)
  place, size = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place = place + along * np.uint32(size % 2**32)
    size *= x.shape[axis]
  return dither(x, place, first, second).astype(jnp.bfloat16)


def dither(
    x: jax.Array, place: jax.Array, first: jax.Array, second: jax.Array
) -> jax.Array:
  """Returns float32 with the digits of bfloat16, see `dithered`.

  Args:
    x: float32.
    place: of each number, uint32.
    first: of the key, uint32, broadcast to x.
    second: of the key, uint32, broadcast to x.
  """
  noise = place + first
  for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
    noise = (noise ^ (noise >> np.uint32(shift))) * np.uint32(factor)
  noise = (noise ^ (noise >> np.uint32(15))) + second
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  moved = (bits + (noise >> np.uint32(16))) & np.uint32(0xFFFF0000)
  moved = jax.lax.bitcast_convert_type(moved, jnp.float32)
  return jnp.where(jnp.abs(x) < np.inf, moved, x)  # NaN and infinity stay.


def add(
    weight: jax.Array,
    update: jax.Array,
    remainder: jax.Array | None,
    keys: jax.Array,
    mode: str,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns weight + update in the weight's dtype, and the new remainder.

  Args:
    weight: (*batch, m, n).
    update: (*batch, m, n) in promote_types(weight.dtype, float32).
    remainder: of 'compensated', shape and dtype of the weight; else None.
    keys: shape=batch, typed PRNG keys, read by 'stochastic' alone.
    mode: one of `MODES`.

  Returns:
    The rounded sum; what it lacks ('compensated') or None.
  """
  total = weight.astype(update.dtype) + update
  if mode == 'stochastic':
    flat = total.reshape(-1, *total.shape[-2:])
    draw = lambda x, key: stochastic(x, key, weight.dtype)
    return jax.vmap(draw)(flat, keys.reshape(-1)).reshape(total.shape), None
  if mode == 'nearest':
    return nearest(total, weight.dtype), None
  assert remainder is not None
  total += remainder.astype(total.dtype)
  rounded = nearest(total, weight.dtype)
  rest = total - rounded.astype(total.dtype)
  rest = jnp.where(
      jnp.isfinite(rest), rest, 0
  )  # Beyond the range nothing is kept.
  # Where nothing is added nothing moves: a remainder that was rounded to half an
  # ulp would otherwise move the weight when it is added again.
  is_still = update == 0
  rounded = jnp.where(is_still, weight, rounded)
  return rounded, jnp.where(is_still, remainder, rest.astype(weight.dtype))
