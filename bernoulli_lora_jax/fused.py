"""Kernels for GPUs, of what XLA passes over twice: each reads and writes once.

They are of Pallas, which jax calls experimental: they stand here alone, behind a check
of what is there, and where that is not, or does not take an array, those who call them
do the same by XLA. They run where there is one device: arrays over several are XLA's
to part.

W + L R, rounded (`add_product`). XLA writes the product in float32 and reads it again,
twelve bytes a number of bfloat16; the kernel reads and writes W alone, four. One H100,
2048 x 8192, rank 16, microseconds: a sum of W and a number 27; the kernel 31 to
nearest, 34 at random; XLA 52. At rank 128 the product takes longer than W does (69
beside 53 of XLA), so that ranks above 32 are left to XLA.

The derivative of RMSNorm by its input (`norm_slope`). XLA reads a row for a mean, and
again for the result. 8192 x 2048, of three products and the stream beside: 73, XLA 117.
Times within a step are in docs/evidence.md.
"""

from collections.abc import Sequence
import functools
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

# Rows and columns that a block of threads has: the fastest of thirteen shapes.
_TILE = 32, 128
_WARPS = 4
_MAX_RANK = 32
_MODES = ('nearest', 'stochastic')
_MAX_WIDTH = 2**14  # Of a row that one block of threads has.


def is_there() -> bool:
  """Returns whether kernels run: on one GPU of compute capability 8 or more."""
  return (
      pl is not None
      and jax.default_backend() == 'gpu'
      and jax.device_count() == 1
      and float(getattr(jax.devices()[0], 'compute_capability', 0)) >= 8
  )


def takes(weight: Any, rank: int, mode: str) -> bool:
  """Returns whether `add_product` takes matrices, or their shapes, here."""
  return is_there() and fits(weight, rank, mode)


def fits(weight: Any, rank: int, mode: str) -> bool:
  """Returns whether `add_product` takes matrices, on whatever machine."""
  *_, m, n = weight.shape
  return (
      mode in _MODES
      and weight.dtype == jnp.bfloat16
      and m % _TILE[0] == 0
      and n % _TILE[1] == 0
      and rank <= _MAX_RANK
      and m * n < 2**31
  )


def add_product(
    weight: jax.Array,
    left: jax.Array,
    right: jax.Array,
    keys: jax.Array | None = None,
    mode: str = 'nearest',
    interpret: bool = False,
) -> jax.Array:
  """Returns W + L R, summed in float32 and rounded once.

  Args:
    weight: (*batch, m, n), bfloat16, see `fits`; overwritten where nothing else
      reads it.
    left: (*batch, m, r), float32 or bfloat16.
    right: (*batch, r, n), of the same dtype.
    keys: shape=batch, typed PRNG keys, of 'stochastic' alone.
    mode: 'nearest' or 'stochastic', by `rounding.dithered`.
    interpret: whether to run the kernel step by step, on any machine.

  Returns:
    (*batch, m, n), bfloat16. L R is a product of TF32 or bfloat16.
  """
  flat = lambda x: x.reshape(-1, *x.shape[-2:])
  left, right = flat(left), flat(right)
  missing = -left.shape[-1] % 16  # What matrix units multiply at once.
  left = jnp.pad(left, ((0, 0), (0, 0), (0, missing)))
  right = jnp.pad(right, ((0, 0), (0, missing), (0, 0)))
  words = jnp.zeros((len(left), 2), jnp.uint32)
  if mode == 'stochastic':
    assert keys is not None
    draw = lambda key: jax.random.bits(key, (2,), jnp.uint32)
    words = jax.vmap(draw)(keys.reshape(-1))
  total = _call(flat(weight), left, right, words, mode, interpret)
  return total.reshape(weight.shape)


# Compiled by itself: matrices of one shape share what is traced and lowered.
@functools.partial(jax.jit, static_argnums=(4, 5))
def _call(weight, left, right, words, mode, interpret):
  """Returns W + L R of a stack; words: (entries, 2) uint32."""
  (entries, m, n), rank, (rows, columns) = weight.shape, left.shape[-1], _TILE
  block = lambda shape, index: pl.BlockSpec((None, *shape), index)
  tile = block(_TILE, lambda b, i, j: (b, i, j))
  return pl.pallas_call(
      functools.partial(_kernel, columns=n, mode=mode),
      out_shape=jax.ShapeDtypeStruct(weight.shape, weight.dtype),
      grid=(entries, m // rows, n // columns),
      in_specs=[
          block((2,), lambda b, i, j: (b, 0)),
          tile,
          block((rows, rank), lambda b, i, j: (b, i, 0)),
          block((rank, columns), lambda b, i, j: (b, 0, j)),
      ],
      out_specs=tile,
      input_output_aliases={1: 0},
      compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
      interpret=interpret,
      name='add_product',
  )(words, weight, left, right)


def _kernel(words, weight, left, right, out, *, columns, mode):
  """Adds one tile."""
  # Of float32 by TF32, on the matrix units.
  change = triton.dot(left[...], right[...], allow_tf32=True)
  total = weight[...].astype(jnp.float32) + change
  if mode == 'stochastic':
    along = lambda axis: jax.lax.broadcasted_iota(jnp.int32, total.shape, axis)
    row = along(0) + pl.program_id(1) * _TILE[0]
    place = row * columns + along(1) + pl.program_id(2) * _TILE[1]
    total = rounding_lib.dither(
        total, place.astype(jnp.uint32), words[0], words[1]
    )
  out[...] = total.astype(out.dtype)


def takes_rows(x: jax.Array) -> bool:
  """Returns whether `norm_slope` takes an array on this machine."""
  is_half = x.dtype in (jnp.bfloat16, jnp.float16)
  return is_there() and is_half and x.shape[-1] <= _MAX_WIDTH


def norm_slope(
    x: jax.Array,
    scale: jax.Array,
    beside: jax.Array,
    slopes: Sequence[jax.Array],
    eps: float,
    interpret: bool = False,
) -> jax.Array:
  """Returns the derivative by x of x, and of scale x / sqrt(mean x^2 + eps).

  With h = scale * sum of slopes and s = 1 / sqrt(mean x^2 + eps) it is
  beside + s h - s^3 x mean(h x), in float32, rounded once.

  Args:
    x: (..., d).
    scale: (d,).
    beside: (..., d), the derivative of x itself.
    slopes: (..., d) each, those of the norm: of each product that reads it.
    eps: added to the mean square, >= 0.
    interpret: whether to run the kernel step by step, on any machine.

  Returns:
    (..., d), of x's dtype.
  """
  rows = [y.reshape(-1, x.shape[-1]) for y in (x, beside, *slopes)]
  return _norm_slope(scale[None], *rows, eps, interpret).reshape(x.shape)


@functools.partial(jax.jit, static_argnums=(-2, -1))
def _norm_slope(scale, *args):
  """Returns the derivative; args: x, beside, slopes (rows, d), eps, interpret."""
  *arrays, eps, interpret = args
  count, width = arrays[0].shape
  block = 1, 2 ** (width - 1).bit_length()  # Triton's are powers of two.
  row = pl.BlockSpec(block, lambda i: (i, 0))
  return pl.pallas_call(
      functools.partial(_norm_kernel, width=width, eps=eps),
      out_shape=jax.ShapeDtypeStruct((count, width), arrays[0].dtype),
      grid=(count,),
      in_specs=[pl.BlockSpec(block, lambda i: (0, 0)), *[row] * len(arrays)],
      out_specs=row,
      compiler_params=triton.CompilerParams(
          num_warps=max(1, min(16, block[1] // 512)), num_stages=1
      ),
      interpret=interpret,
      name='norm_slope',
  )(scale, *arrays)


def _norm_kernel(scale, x, beside, *others, width, eps):
  """Writes one row."""
  *slopes, out = others
  is_inside = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < width

  def wide(ref):
    row = triton.load(ref, mask=is_inside, other=0.0)
    return row.astype(jnp.float32)

  stream = wide(x)
  h = wide(scale) * sum(wide(ref) for ref in slopes)
  inverse = jax.lax.rsqrt(jnp.sum(stream * stream) / width + eps)
  mean = jnp.sum(h * stream) / width
  total = wide(beside) + inverse * (h - stream * (inverse * inverse * mean))
  triton.store(out, total.astype(out.dtype), mask=is_inside)
