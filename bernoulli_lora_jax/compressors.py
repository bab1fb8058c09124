"""Compressors of gradients: what travels, what it restores, which law it obeys.

A compressor is a pair of pure functions. `encode` turns an array into a payload,
a dict of arrays whose bytes are what would be sent: indices and codes are packed
to the bit, random choices that the receiver can repeat are sent as a seed of 64
bits. `decode` restores the array.

Symbols: x the array, d its number of elements, C the compressor. *Unbiased* ones
(E5, E6) have E C(x) = x and E||C(x) - x||^2 <= omega ||x||^2; *contractive* ones
(E7) have E||C(x) - x||^2 <= (1 - beta) ||x||^2. In exact arithmetic; floats that
are not finite stay so, which lets a receiver notice them.

| compressor | law | payload, in bits (w: width of a float; v: w, 32 at least) |
|---|---|---|
| identity | omega = 0, beta = 1 | d w |
| randk(K) | omega = d/K - 1 | K w + 64 |
| topk(K) | beta = K/d | K w + min(K ceil(log2 d), d) |
| natural | omega = 1/8 | d (1 + exponent bits): 9 d in float32 |
| dithering(s) | omega = min(d/(4 s^2), sqrt(d)/s) | d ceil(log2(2s + 1)) + v |
| powersgd(r) | beta = min(r, k)/k, k = min(m, n) | min(r, k) (m + n) v |
| sign | beta >= 1/d | d + v |

Packed parts are rounded up to whole bytes.

Reference: Alistarh et al., QSGD, arXiv 1610.02132; Horvath et al., Natural
compression, arXiv 1905.10988; Vogels et al., PowerSGD, arXiv 1905.13727;
Karimireddy et al., Error feedback fixes SignSGD, arXiv 1901.09847; Richtarik et
al., EF21, arXiv 2106.05203.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices

Payload = dict[str, jax.Array]
Shape = tuple[int, ...]

_BYTE = 8
_LARGEST = 2**31 - 1  # Elements that indices of 32 bits tell apart.


class Compressor(NamedTuple):
  """An encode / decode pair with its constant.

  `omega` is None for biased compressors, `beta` for those that are not
  contractive. Both take d or a shape.
  """

  name: str
  # (key, x) -> payload; with `init`, (key, x, state) -> (payload, state).
  encode: Callable[..., Any]
  # (payload, shape, dtype) -> x restored.
  decode: Callable[[Payload, Shape, Any], jax.Array]
  omega: Callable[[int | Shape], float] | None = None
  beta: Callable[[int | Shape], float] | None = None
  init: Callable[[Shape, Any], Any] | None = None  # (shape, dtype) -> state.

  def bits(self, payload: Payload) -> int:
    """Returns the size of a payload, of arrays or their shapes, in bits."""
    leaves = jax.tree.leaves(payload)
    return sum(_BYTE * math.prod(x.shape) * x.dtype.itemsize for x in leaves)

  def payload_bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
    """Returns the size of the payload of an array, without computing it."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    args = [jax.eval_shape(lambda: jax.random.key(0)), x]
    if self.init is not None:
      args.append(jax.eval_shape(lambda: self.init(shape, dtype)))
      return self.bits(jax.eval_shape(self.encode, *args)[0])
    return self.bits(jax.eval_shape(self.encode, *args))


def identity() -> Compressor:
  """Returns the compressor that sends everything: omega = 0, beta = 1."""
  return Compressor(
      'identity',
      lambda key, x: {'values': x},
      lambda payload, shape, dtype: (
          payload['values'].reshape(shape).astype(dtype)
      ),
      omega=lambda shape: 0.0,
      beta=lambda shape: 1.0,
  )


def randk(k: int | None = None, *, fraction: float | None = None) -> Compressor:
  """Returns RandK: K of d elements, times d/K.

  The elements, turned by a random offset, fall into K blocks of d/K, one of each
  is drawn: every element is included with probability K/d. The seed travels in
  place of the indices.

  Args:
    k: K >= 1, at most d elements are sent.
    fraction: in place of k, in (0, 1]; K = ceil(fraction d).

  Raises:
    ValueError: none or both of k and fraction, or one outside its range.

  Guarantees:
    E C(x) = x.
    E||C(x) - x||^2 = (d/K - 1) ||x||^2.
    Exactly K elements are sent; K = d is the identity.
  """
  count = _count(k, fraction)

  def encode(key, x):
    _check_size('RandK', x.shape)
    seed = jax.random.bits(key, (2,), jnp.uint32)
    rows = _one_a_block(seed, x.size, count(x.size))
    values = _take(x.reshape(-1), rows)
    # What is not finite may be among the elements left out: all say so.
    values = jnp.where(jnp.all(jnp.isfinite(x)), values, jnp.nan)
    return {'seed': seed, 'values': values}

  def decode(payload, shape, dtype):
    dim = math.prod(shape)
    rows = _one_a_block(payload['seed'], dim, count(dim))
    # d/K may overflow float16.
    values = payload['values'].astype(matrices.wide(dtype))
    values = values * (dim / max(1, count(dim)))
    return _scatter(rows, values.astype(dtype), shape)

  return Compressor(
      f'RandK {_count_name(k, fraction)}',
      encode,
      decode,
      omega=lambda shape: _size(shape) / count(_size(shape)) - 1,
  )


def topk(k: int | None = None, *, fraction: float | None = None) -> Compressor:
  """Returns TopK: the K elements of largest magnitude.

  Their places travel as packed indices or as a bitmap, whichever is less. Under
  `jit` with a sharded axis of clients XLA gathers what `lax.top_k` sorts on every
  device; under `pmap` and `shard_map` each device sorts its own.

  Args:
    k: K >= 1, at most d elements are sent.
    fraction: in place of k, in (0, 1]; K = ceil(fraction d).

  Raises:
    ValueError: none or both of k and fraction, or one outside its range.

  Guarantees:
    ||C(x) - x||^2 <= (1 - K/d) ||x||^2, surely.
    Of equal magnitudes those of the lowest row-major index are sent; K = d is
      the identity.

  References:
    Richtarik et al., EF21, arXiv 2106.05203, example 2.
  """
  count = _count(k, fraction)
  width = lambda dim: max(1, (dim - 1).bit_length())
  is_bitmap = lambda dim: count(dim) * width(dim) > dim

  def encode(key, x):
    del key
    _check_size('TopK', x.shape)
    flat, num = x.reshape(-1), count(x.size)
    rows = jnp.sort(jax.lax.top_k(jnp.abs(flat), num)[1])
    if is_bitmap(x.size):
      marks = jnp.zeros(x.size, jnp.uint32).at[rows].set(1)
      places = pack(marks, 1)
    else:
      places = pack(rows.astype(jnp.uint32), width(x.size))
    return {'places': places, 'values': _take(flat, rows)}

  def decode(payload, shape, dtype):
    dim = math.prod(shape)
    num = count(dim)
    if is_bitmap(dim):
      marks = unpack(payload['places'], 1, dim)
      rows = jnp.nonzero(marks, size=num, fill_value=0)[0]
    else:
      rows = unpack(payload['places'], width(dim), num)
    return _scatter(rows, payload['values'].astype(dtype), shape)

  return Compressor(
      f'TopK {_count_name(k, fraction)}',
      encode,
      decode,
      beta=lambda shape: count(_size(shape)) / _size(shape),
  )


def natural() -> Compressor:
  """Returns natural compression: rounding to a power of two at random.

  Sign and exponent travel, 9 bits in float32 and bfloat16, 12 in float64, 6 in
  float16.

  Guarantees:
    E C(x) = x.
    E||C(x) - x||^2 <= ||x||^2 / 8, for numbers that are not subnormal; those
      are rounded to zero or the least normal number, still unbiased where the
      device does not flush them.
    Numbers above the largest power of two may become infinite.

  References:
    Horvath et al., Natural compression, arXiv 1905.10988, theorem 1.
  """

  def encode(key, x):
    unsigned, mantissa, exponents = _layout(x.dtype)
    bits = jax.lax.bitcast_convert_type(x.reshape(-1), unsigned)
    low = bits & unsigned((1 << mantissa) - 1)
    code = bits >> unsigned(mantissa)  # Sign and exponent.
    random = jax.random.bits(key, bits.shape, unsigned) >> unsigned(
        unsigned.dtype.itemsize * _BYTE - mantissa
    )
    is_finite = jnp.isfinite(x.reshape(-1))
    code = code + ((random < low) & is_finite)
    return {'codes': pack(code.astype(jnp.uint32), 1 + exponents)}

  def decode(payload, shape, dtype):
    unsigned, mantissa, exponents = _layout(jnp.dtype(dtype))
    code = unpack(payload['codes'], 1 + exponents, math.prod(shape))
    bits = code.astype(unsigned) << unsigned(mantissa)
    return jax.lax.bitcast_convert_type(bits, dtype).reshape(shape)

  return Compressor('natural', encode, decode, omega=lambda shape: 1 / 8)


def dithering(levels: int) -> Compressor:
  """Returns random dithering (QSGD): multiples of ||x|| / s, rounded at random.

  Args:
    levels: s >= 1; codes -s..s.

  Raises:
    ValueError: levels < 1.

  Guarantees:
    E C(x) = x.
    E||C(x) - x||^2 <= min(d/(4 s^2), sqrt(d)/s) ||x||^2.

  References:
    Alistarh et al., QSGD, arXiv 1610.02132, lemma 3.1.
  """
  checks.at_least(1, levels=levels)
  width = (2 * levels).bit_length()

  def encode(key, x):
    x = _wide_real(x.reshape(-1))
    norm = _norm(x)
    scaled = levels * (jnp.abs(x) / jnp.where(norm > 0, norm, 1))
    dither = jax.random.uniform(key, x.shape, x.dtype)
    level = jnp.clip(jnp.floor(scaled + dither), 0, levels)
    code = levels + (jnp.sign(x) * level).astype(jnp.int32)
    return {'norm': norm, 'codes': pack(code.astype(jnp.uint32), width)}

  def decode(payload, shape, dtype):
    norm = payload['norm']
    code = unpack(payload['codes'], width, math.prod(shape))
    level = code.astype(jnp.int32) - levels
    return (
        (norm * (level.astype(norm.dtype) / levels))
        .reshape(shape)
        .astype(dtype)
    )

  def omega(shape):
    dim = _size(shape)
    return min(dim / (4 * levels**2), math.sqrt(dim) / levels)

  return Compressor(f'dithering {levels}', encode, decode, omega=omega)


def powersgd(rank: int, *, start: str = 'fresh') -> Compressor:
  """Returns compression to rank r: P, an orthonormal basis, and P^T x.

  Matrices are the last two axes; leading axes are a batch. Vectors, and matrices
  with r (m + n) >= m n, are sent whole.

  Args:
    rank: r >= 1, clipped to k = min(m, n).
    start: how P is found: 'svd' (the r leading left singular vectors), 'fresh'
      (the range of x G with a Gaussian G drawn anew) or 'warm' (of x Q with the
      last P^T x as Q^T, PowerSGD). 'warm' has state (`init`).

  Raises:
    ValueError: rank < 1 or another start.

  Guarantees:
    ||C(x) - x||^2 <= (1 - min(r, k)/k) ||x||^2: surely for 'svd', in the mean
      for 'fresh'. 'warm' is never worse than zero but has no worst-case
      constant (beta is None): T7 does not cover it.

  References:
    Vogels et al., PowerSGD, arXiv 1905.13727, algorithm 1.
  """
  checks.at_least(1, rank=rank)
  if start not in ('svd', 'fresh', 'warm'):
    raise ValueError(
        f"Expected start to be 'svd', 'fresh' or 'warm', got {start!r}."
    )

  def is_whole(shape):
    if len(shape) < 2:
      return True
    m, n = shape[-2:]
    return min(rank, m, n) * (m + n) >= m * n

  def factor(x, q):
    x = _wide_real(x)
    product = jnp.matmul(x, q, precision=jax.lax.Precision.HIGHEST)
    basis = _orthonormal(product)
    right = jnp.matmul(basis.mT, x, precision=jax.lax.Precision.HIGHEST)
    return {'basis': basis, 'right': right}

  def draw(key, shape, dtype):
    dtype = matrices.wide(dtype)
    *batch, m, n = shape
    return jax.random.normal(key, (*batch, n, min(rank, m, n)), dtype)

  def encode(key, x):
    if is_whole(x.shape):
      return {'values': x}
    if start == 'svd':
      wide = _wide_real(x)
      # LAPACK returns from NaN, but may not from infinity.
      wide = jnp.where(jnp.isinf(wide), jnp.nan, wide)
      left, values, right = jnp.linalg.svd(wide, full_matrices=False)
      r = min(rank, *x.shape[-2:])
      right = values[..., :r, None] * right[..., :r, :]
      return {'basis': left[..., :r], 'right': right}
    return factor(x, draw(key, x.shape, x.dtype))

  def init(shape, dtype):
    if is_whole(shape):
      return ()
    return draw(jax.random.key(0), shape, dtype)

  def warm_encode(key, x, q):
    del key
    if is_whole(x.shape):
      return {'values': x}, q
    payload = factor(x, q)
    # Zero or NaN once would be so for good.
    size = jnp.sum(jnp.abs(payload['right'].mT), axis=-2, keepdims=True)
    is_usable = (size > 0) & jnp.isfinite(size)
    return payload, jnp.where(is_usable, payload['right'].mT, q)

  def decode(payload, shape, dtype):
    if is_whole(shape):
      return payload['values'].astype(dtype)
    basis, right = payload['basis'], payload['right']
    product = jnp.matmul(basis, right, precision=jax.lax.Precision.HIGHEST)
    return product.astype(dtype)

  def beta(shape):
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if is_whole(shape):
      return 1.0
    return min(rank, *shape[-2:]) / min(shape[-2:])

  name = f'rank {rank} ({start})'
  if start == 'warm':
    return Compressor(name, warm_encode, decode, init=init)
  return Compressor(name, encode, decode, beta=beta)


def sign() -> Compressor:
  """Returns the sign, scaled by the mean magnitude: ||x||_1/d sign(x).

  Guarantees:
    ||C(x) - x||^2 = (1 - ||x||_1^2/(d ||x||^2)) ||x||^2
      <= (1 - 1/d) ||x||^2, surely.

  References:
    Karimireddy et al., Error feedback fixes SignSGD, arXiv 1901.09847.
  """

  def encode(key, x):
    del key
    x = _wide_real(x.reshape(-1))
    is_negative = (x < 0).astype(jnp.uint32)
    scale = jnp.sum(jnp.abs(x) / max(1, x.size))  # No overflow of the sum.
    return {'scale': scale, 'signs': pack(is_negative, 1)}

  def decode(payload, shape, dtype):
    is_negative = unpack(payload['signs'], 1, math.prod(shape)) > 0
    scale = payload['scale']
    return jnp.where(is_negative, -scale, scale).reshape(shape).astype(dtype)

  return Compressor('sign', encode, decode, beta=lambda shape: 1 / _size(shape))


def contractive(compressor: Compressor) -> Compressor:
  """Returns an unbiased compressor over 1 + omega: beta = 1/(1 + omega).

  RandK so scaled keeps K elements as they are: beta = K/d.

  Args:
    compressor: an unbiased one.

  Raises:
    ValueError: omega is None.

  References:
    Richtarik et al., EF21, arXiv 2106.05203, lemma 8.
  """
  omega = compressor.omega
  if omega is None:
    raise ValueError(f'Expected an unbiased compressor, got {compressor.name}.')

  def decode(payload, shape, dtype):
    # In float16 C(x) may overflow before it is scaled, unless its values are
    # codes of that very dtype.
    wide = matrices.wide(dtype)
    is_coded = set(payload) == {'codes'}
    x = compressor.decode(payload, shape, dtype if is_coded else wide)
    return (x / (1 + omega(shape))).astype(dtype)

  return Compressor(
      f'{compressor.name}, scaled',
      compressor.encode,
      decode,
      beta=lambda shape: 1 / (1 + omega(shape)),
  )


def by_name(name: str, argument: float | None = None) -> Compressor:
  """Returns a compressor by its name in configs.

  Args:
    name: 'identity', 'randk', 'topk', 'natural', 'dithering', 'powersgd' or
      'sign'.
    argument: of randk and topk, K as a whole number, or a fraction below 1; of
      dithering s; of powersgd r. None for the others.

  Raises:
    ValueError: another name, an argument missing or out of place.
  """
  plain = {'identity': identity, 'natural': natural, 'sign': sign}
  whole = {'dithering': dithering, 'powersgd': powersgd}
  parts = {'randk': randk, 'topk': topk}
  if name in plain:
    if argument is not None:
      raise ValueError(f'Expected no argument of {name}, got {argument}.')
    return plain[name]()
  if name not in {**whole, **parts}:
    known = (*plain, *whole, *parts)
    raise ValueError(f'Expected compressor in {known}, got {name!r}.')
  if argument is None:
    raise ValueError(f'Expected an argument of {name}, got None.')
  if name in parts and 0 < argument < 1:
    return parts[name](fraction=argument)
  if not math.isfinite(argument) or argument != int(argument):
    raise ValueError(f'Expected a whole number for {name}, got {argument}.')
  return {**whole, **parts}[name](int(argument))


def pack(codes: jax.Array, width: int) -> jax.Array:
  """Packs numbers below 2^width, the low bits first.

  Args:
    codes: (d,) uint32.
    width: bits each, in [1, 32].

  Returns:
    (ceil(d width / 8),) uint8.
  """
  dim = codes.shape[0]
  groups = jnp.pad(codes, (0, -dim % _BYTE)).reshape(-1, _BYTE)
  columns = []
  for byte in range(width):  # Eight codes fill `width` bytes.
    column = jnp.zeros(groups.shape[0], jnp.uint32)
    for i in range(_BYTE):
      shift = i * width - byte * _BYTE
      if 0 <= shift < _BYTE:
        column |= groups[:, i] << shift
      elif -width < shift < 0:
        column |= groups[:, i] >> -shift
    columns.append((column & 255).astype(jnp.uint8))
  return jnp.stack(columns, -1).reshape(-1)[: -(-dim * width // _BYTE)]


def unpack(packed: jax.Array, width: int, dim: int) -> jax.Array:
  """Returns the (dim,) uint32 codes of `pack`."""
  missing = -(-dim // _BYTE) * width - packed.shape[0]
  groups = jnp.pad(packed, (0, missing)).reshape(-1, width).astype(jnp.uint32)
  columns = []
  for i in range(_BYTE):
    column = jnp.zeros(groups.shape[0], jnp.uint32)
    for byte in range(width):
      shift = byte * _BYTE - i * width
      if 0 <= shift < width:
        column |= groups[:, byte] << shift
      elif -_BYTE < shift < 0:
        column |= groups[:, byte] >> -shift
    columns.append(column & jnp.uint32((1 << width) - 1))
  return jnp.stack(columns, -1).reshape(-1)[:dim]


def _check_size(name: str, shape: Shape) -> None:
  if math.prod(shape) > _LARGEST:
    raise ValueError(
        f'Expected at most {_LARGEST} elements at once for {name}, got'
        f' {math.prod(shape)} of shape {tuple(shape)}: compress leaf by leaf'
        ' (concatenate=False), or stacked layers one by one.'
    )


def _wide_real(x: jax.Array) -> jax.Array:
  """Returns x in float32 or wider; raises for complex numbers."""
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    raise TypeError(f'Expected real numbers to compress, got {x.dtype}.')
  return x.astype(matrices.wide(x.dtype))


def _size(shape: int | Shape) -> int:
  """Returns d of the laws, 1 of an empty leaf."""
  return max(1, shape if isinstance(shape, int) else math.prod(shape))


def _count(k: int | None, fraction: float | None) -> Callable[[int], int]:
  """Returns d -> K."""
  if (k is None) == (fraction is None):
    raise ValueError(
        f'Expected one of k and fraction, got k={k}, fraction={fraction}.'
    )
  if fraction is not None:
    checks.within('(0, 1]', fraction=fraction)
    # 0.07 * 100 is 7.000000000000001.
    return lambda dim: math.ceil(round(fraction * dim, 9)) or min(dim, 1)
  if isinstance(k, bool) or not isinstance(k, int) or k < 1:
    raise ValueError(f'Expected a whole number k >= 1, got k={k}.')
  return lambda dim: min(k, dim)


def _count_name(k: int | None, fraction: float | None) -> str:
  return f'{k}' if fraction is None else f'{100 * fraction:g}%'


def _one_a_block(seed: jax.Array, dim: int, count: int) -> jax.Array:
  """Returns (count,) distinct indices, each of range(dim) equally probable."""
  key = jax.random.wrap_key_data(seed, impl='threefry2x32')
  offset_key, place_key = jax.random.split(key)
  size, longer = divmod(dim, max(1, count))
  blocks = jnp.arange(count, dtype=jnp.uint32)
  starts = blocks * size + jnp.minimum(blocks, longer)
  sizes = jnp.where(blocks < longer, size + 1, size).astype(jnp.uint32)
  offset = jax.random.randint(offset_key, (), 0, dim, jnp.uint32)
  places = jax.random.randint(place_key, (count,), 0, sizes, jnp.uint32)
  return (starts + places + offset) % max(1, dim)


def _take(flat: jax.Array, rows: jax.Array) -> jax.Array:
  return flat.at[rows].get(mode='promise_in_bounds', unique_indices=True)


def _scatter(rows: jax.Array, values: jax.Array, shape: Shape) -> jax.Array:
  flat = jnp.zeros(math.prod(shape), values.dtype)
  return flat.at[rows].set(values, unique_indices=True).reshape(shape)


def _layout(dtype: Any) -> tuple[Any, int, int]:
  """Returns the unsigned type of the same width, mantissa and exponent bits."""
  info = jnp.finfo(dtype)
  unsigned = {16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}.get(info.bits)
  if unsigned is None:
    raise ValueError(f'Expected floats of 16, 32 or 64 bits, got {dtype}.')
  return unsigned, info.nmant, info.nexp


def _norm(x: jax.Array) -> jax.Array:
  """Returns the 2-norm without overflow of the squares."""
  largest = jnp.max(jnp.abs(x), initial=0)
  scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
  return scale * jnp.sqrt(jnp.sum((x / scale) ** 2))


def _orthonormal(x: jax.Array) -> jax.Array:
  """Returns an orthonormal basis of at least the range, (..., m, r)."""
  return jnp.linalg.qr(x)[0]
