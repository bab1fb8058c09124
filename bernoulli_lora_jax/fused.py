"""W + L R, rounded, in one pass over W: a kernel for GPUs.

XLA writes the product in float32 and reads it again, twelve bytes a number of
bfloat16; the kernel reads and writes W alone, four. One H100, 2048 x 8192, one call:
53 us to nearest and 63 at random for rank 16, 100 and 120 for rank 128; XLA 73, 74, 134
and 140; reading and writing W alone is 22. It is of Pallas, which jax calls
experimental: it stands here alone, behind a check of what is there, and where it is
not, or does not take a matrix, `sketched` does the same by XLA.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from bernoulli_lora_jax import rounding as rounding_lib

try:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
except ImportError:  # A later jax may have moved it, or a build has none.
  pl: Any = None
  triton: Any = None

_TILE = 128  # Rows and columns that a block of threads has.
_DEPTH = 32  # Columns of L that are multiplied at once.
_MODES = ('nearest', 'stochastic')


def takes(weight: jax.Array, mode: str) -> bool:
  """Returns whether `add_product` is there for a matrix on this machine.

  On one GPU of compute capability 8 or more, for a matrix of bfloat16 with sides that
  are multiples of 128: what runs over several devices is XLA's to part.
  """
  return (
      pl is not None
      and jax.default_backend() == 'gpu'
      and jax.device_count() == 1
      and float(getattr(jax.devices()[0], 'compute_capability', 0)) >= 8
      and fits(weight, mode)
  )


def fits(weight: jax.Array, mode: str) -> bool:
  """Returns whether `add_product` takes a matrix, on whatever machine."""
  return (
      mode in _MODES
      and weight.dtype == jnp.bfloat16
      and weight.ndim == 2
      and all(size % _TILE == 0 for size in weight.shape)
      and math.prod(weight.shape) < 2**31
  )


def add_product(
    weight: jax.Array,
    left: jax.Array,
    right: jax.Array,
    key: jax.Array,
    mode: str,
    interpret: bool = False,
) -> jax.Array:
  """Returns W + L R, summed in float32 and rounded once.

  Args:
    weight: (m, n), bfloat16, see `fits`; overwritten where nothing else reads it.
    left: (m, r), float32.
    right: (r, n), float32.
    key: typed PRNG key, read by 'stochastic' alone.
    mode: 'nearest' or 'stochastic', by `rounding.dithered`.
    interpret: whether to run the kernel step by step, on any machine.

  Returns:
    (m, n), bfloat16. L R is a product of TF32.
  """
  (m, n), rank = weight.shape, left.shape[1]
  missing = -rank % 16
  left = jnp.pad(left, ((0, 0), (0, missing)))
  right = jnp.pad(right, ((0, missing), (0, 0)))
  depth = math.gcd(rank + missing, _DEPTH)
  words = jax.random.bits(key, (2,), jnp.uint32)
  kernel = functools.partial(_kernel, columns=n, depth=depth, mode=mode)
  return pl.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct(weight.shape, weight.dtype),
      grid=(m // _TILE, n // _TILE),
      in_specs=[
          pl.BlockSpec((2,), lambda i, j: (0,)),
          pl.BlockSpec((_TILE, _TILE), lambda i, j: (i, j)),
          pl.BlockSpec((_TILE, rank + missing), lambda i, j: (i, 0)),
          pl.BlockSpec((rank + missing, _TILE), lambda i, j: (0, j)),
      ],
      out_specs=pl.BlockSpec((_TILE, _TILE), lambda i, j: (i, j)),
      input_output_aliases={1: 0},
      compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
      interpret=interpret,
      name='add_product',
  )(words, weight, left, right)


def _kernel(words, weight, left, right, out, *, columns, depth, mode):
  """Adds one tile."""
  total = weight[...].astype(jnp.float32)
  for first in range(0, left.shape[1], depth):
    here = pl.ds(first, depth)
    # Of f32: the product is TF32 on the matrix units.
    total += triton.dot(left[:, here], right[here, :], allow_tf32=True)
  if mode == 'stochastic':
    shape = total.shape
    along = lambda axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    row = along(0) + pl.program_id(0) * _TILE
    place = row * columns + along(1) + pl.program_id(1) * _TILE
    place = place.astype(jnp.uint32)
    total = rounding_lib.dither(total, place, words[0], words[1])
  out[...] = total.astype(out.dtype)
