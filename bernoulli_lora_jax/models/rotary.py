"""Rotary position embeddings: the angles by which queries and keys are turned.

The frequencies are made in float32 in the order of operations of the checkpoints'
reference implementation: at position 100,000 one unit in the last place of a
frequency is a hundredth of a radian.

Reference: Su et al., RoFormer, arXiv 2104.09864, eq. 34, with the two halves of a
head as real and imaginary parts; the scaling of Llama 3.1.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ('default', 'linear', 'llama3')


@dataclasses.dataclass(frozen=True)
class Rotary:
  """How fast the pairs of features turn.

  Attributes:
    theta: base of the wavelengths, > 0.
    kind: 'default'; 'linear', every frequency divided by `factor`; or 'llama3',
      long waves divided by it, short ones not, those in between in part.
    factor: >= 1.
    low_freq_factor: of 'llama3': waves longer than original_length / it are long.
    high_freq_factor: waves shorter than original_length / it are short.
    original_length: positions of the pre-training.
  """

  theta: float = 10000.0
  kind: str = 'default'
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
          f'Expected a rope_type in {KINDS}, got {self.kind!r}: no other is'
          ' supported.'
      )
    for name in ('theta', 'factor', 'original_length'):
      if not getattr(self, name) > 0:
        raise ValueError(f'Expected {name} > 0, got {getattr(self, name)}.')
    if self.kind == 'llama3' and not (
        0 < self.low_freq_factor < self.high_freq_factor
    ):
      raise ValueError(
          'Expected 0 < low_freq_factor < high_freq_factor, got'
          f' {self.low_freq_factor} and {self.high_freq_factor}.'
      )


def frequencies(rotary: Rotary, dim: int) -> np.ndarray:
  """Returns radians a position of each pair of features; (dim / 2,), float32."""
  one = np.float32(1)
  exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  # Libraries differ in a power in float32; one rounded once is nearest to theirs.
  power = np.power(np.float64(rotary.theta), exponents.astype(np.float64))
  plain = one / power.astype(np.float32)
  if rotary.kind == 'default':
    return plain
  factor = np.float32(rotary.factor)
  slow = plain / factor
  if rotary.kind == 'linear':
    return slow
  length = rotary.original_length
  low, high = rotary.low_freq_factor, rotary.high_freq_factor
  # PyTorch divides a number by a tensor as its product with the reciprocal, which
  # is another rounding: up to 9 units in the last place of what is in between.
  waves = np.float32(2 * math.pi) * (one / plain)
  smooth = np.float32(length) * (one / waves) - np.float32(low)
  smooth = smooth / np.float32(high - low)
  between = (one - smooth) * plain / factor + smooth * plain
  is_long = waves > np.float32(length / low)
  is_short = waves < np.float32(length / high)
  return np.select([is_long, is_short], [slow, plain], between)


def tables(
    rotary: Rotary, dim: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines of positions (b, s): (b, s, 1, dim / 2), float32."""
  angles = positions[..., None, None].astype(jnp.float32)
  angles = angles * frequencies(rotary, dim)[None, None, None]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Returns heads (b, s, heads, dim) turned, in float32 or wider, of x's dtype."""
  first, second = jnp.split(
      x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1
  )
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
