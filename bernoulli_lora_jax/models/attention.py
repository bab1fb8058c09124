"""Causal attention: full, windowed, over packed documents, over a cache.

Shapes: queries (b, s, heads, dim), keys and values (b, t, kv_heads, dim), where
kv_heads divides heads. On GPUs cuDNN computes what it can (half precision, heads of
a multiple of 8); XLA's own attention, which forms the b x heads x s x s scores, does
the rest.

Packed documents: jax's public function knows no segments. `jax._src` has a call of
cuDNN that does, which stands here alone, behind a check of what it takes and of the
card (`packed_is_fused`). Elsewhere a mask does the same, with a warning on GPUs.
"""

from collections.abc import Callable
import functools
import inspect
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp

_HALF = (jnp.bfloat16, jnp.float16)
# Arguments of the private call; without them it is another function.
_TAKES = {
    *('query', 'key', 'value', 'q_seqlen', 'kv_seqlen', 'q_offsets'),
    *('kv_offsets', 'scale', 'mask_type', 'sliding_window_length'),
}


class SlowAttentionWarning(UserWarning):
  """Attention on a GPU that forms its scores."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    segments: jax.Array | None = None,
    max_segments: int = 64,
    packed: 'Packed | None' = None,
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(dim)) v over what each position may see.

  Args:
    q: (b, s, heads, dim).
    k: (b, s, kv_heads, dim).
    v: (b, s, kv_heads, dim).
    window: positions that one sees, itself included, >= 1; None for all before.
    segments: (b, s) int, equal within a document and different from the next
      one's: nothing is seen across a border. A number may come again. None: a row
      is one document.
    max_segments: most documents in a row, >= 1. Where a row has more and cuDNN
      is used, the whole row becomes NaN: its documents would mix.
    packed: of the segments, made once for all layers, which then are not guarded
      here: `guard` the input of the first.

  Returns:
    (b, s, heads, dim), of q's dtype.

  Warns:
    SlowAttentionWarning: packed documents on a GPU without the fused call.
  """
  if _is_fused(q) and (segments is None or packed_is_fused()):
    if segments is None or packed is not None:
      return _fused(q, k, v, window, packed)
    packed = pack(segments, max_segments)
    return guard(_fused(q, k, v, window, packed), packed)
  causal = functools.partial(
      jax.nn.dot_product_attention, q, k, v, implementation='xla'
  )
  if segments is None:
    sizes = None if window is None else (window - 1, 0)
    return causal(is_causal=True, local_window_size=sizes)
  if jax.default_backend() == 'gpu':
    warnings.warn(
        f'Packed attention of {q.dtype} on this GPU and version of jax forms its'
        ' scores, which is slow: use bfloat16 on a Hopper GPU or newer, or batches'
        ' that are not packed.',
        SlowAttentionWarning,
        stacklevel=2,
    )
  places = jnp.arange(q.shape[1])
  # A document is a run: its number may come again in the row.
  run = jnp.cumsum(is_start(segments), axis=1)
  seen = run[:, :, None] == run[:, None, :]
  seen &= sees(places[None, :, None], places[None, None], window)
  return causal(mask=seen[:, None])


def attend_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    window: int | None = None,
) -> jax.Array:
  """Returns attention of new positions over a cache.

  Args:
    q: (b, s, heads, dim) of the new positions.
    k: (b, t, kv_heads, dim), of position j at place j; what lies after a row's own
      position is not looked at.
    v: (b, t, kv_heads, dim).
    positions: (b, s) int, of q.
    window: as in `attend`.
  """
  seen = sees(positions[:, :, None], jnp.arange(k.shape[1])[None, None], window)
  return jax.nn.dot_product_attention(
      q, k, v, mask=seen[:, None], implementation='xla'
  )


def sees(i: jax.Array, j: jax.Array, window: int | None) -> jax.Array:
  """Returns whether position i looks at position j, broadcast."""
  return (j <= i) if window is None else (j <= i) & (i - j < window)


def _is_fused(q: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Returns whether cuDNN has a kernel for queries like these here."""
  return (
      jax.default_backend() == 'gpu'
      and q.dtype in _HALF
      and q.shape[-1] % 8 == 0
      and q.shape[-1] <= (256 if _capability() >= 9 else 128)
      and _capability() >= 8
  )


def _capability() -> float:
  """Returns the compute capability of the first device, 0 where it has none."""
  try:
    return float(getattr(jax.devices()[0], 'compute_capability', 0))
  except (TypeError, ValueError):
    return 0.0


@functools.cache
def packed_is_fused() -> bool:
  """Returns whether the private packed call is what it was when this was written."""
  return _fused_call() is not None and _capability() >= 9


def _fused_call() -> tuple[Callable[..., Any], Any] | None:
  """Returns jax's packed attention of cuDNN and its mask, if it is there."""
  try:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    call, mask = fused.dot_product_attention, fused.MaskType.PADDING_CAUSAL
  except (ImportError, AttributeError):
    return None
  takes = set(inspect.signature(call).parameters)
  return (call, mask) if takes >= _TAKES else None


def _fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    packed: 'Packed | None',
) -> jax.Array:
  """Returns attention by cuDNN, of an even length: it refuses some odd ones."""
  length = q.shape[1]
  if length % 2:
    # Nothing sees the place that is added: it is behind, and of no document.
    add = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))
    q, k, v = (add(x) for x in (q, k, v))
  if packed is None:
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation='cudnn',
    )
  else:
    out = _packed(q, k, v, packed, window)
  return out[:, :length]


def _packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    packed: 'Packed',
    window: int | None,
) -> jax.Array:
  """Returns attention within segments, by cuDNN's packed layout."""
  found = _fused_call()
  assert found is not None
  call, mask_type = found
  return call(
      q,
      k,
      v,
      q_seqlen=packed.lengths,
      kv_seqlen=packed.lengths,
      q_offsets=packed.starts,
      kv_offsets=packed.starts,
      scale=q.shape[-1] ** -0.5,
      mask_type=mask_type,
      sliding_window_length=window,
  )


class Packed(NamedTuple):
  """Where the documents of packed rows lie, as cuDNN takes it."""

  starts: jax.Array  # (b, max_segments + 1) int32, see `bounds`.
  lengths: jax.Array  # (b, max_segments) int32.
  is_whole: jax.Array  # (b,), whether a row has no more than max_segments.


def pack(segments: jax.Array, max_segments: int) -> Packed:
  """Returns where the documents of rows lie.

  Args:
    segments: (b, s) int, see `attend`.
    max_segments: most documents in a row; the fewer, the faster.
  """
  most = max(2, max_segments)  # With one jax takes offsets for another layout.
  starts, lengths, count = bounds(segments, most)
  return Packed(starts, lengths, count <= most)


def guard(x: jax.Array, packed: Packed) -> jax.Array:
  """Returns x (b, ...), NaN in rows whose documents would mix."""
  shape = (-1,) + (1,) * (x.ndim - 1)
  return jnp.where(packed.is_whole.reshape(shape), x, jnp.nan)


def pack_if_fused(
    x: jax.Array, head_dim: int, segments: jax.Array | None, max_segments: int
) -> Packed | None:
  """Returns what `attend` of layers takes as packed; None where no cuDNN is.

  Args:
    x: of the dtype of their queries.
    head_dim: of them.
    segments: (b, s) int, or None.
    max_segments: most documents in a row.
  """
  like = jax.ShapeDtypeStruct((1, head_dim), x.dtype)
  if segments is None or not (_is_fused(like) and packed_is_fused()):
    return None
  return pack(segments, max_segments)


def is_start(segments: jax.Array) -> jax.Array:
  """Returns whether a document begins at each position, shape (b, s)."""
  before = jnp.roll(segments, 1, axis=1)
  return (segments != before).at[:, 0].set(True)


def bounds(
    segments: jax.Array, most: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns where the segments of each row start, how long they are, how many.

  Args:
    segments: (b, s) int.
    most: segments of which the bounds are returned, >= 1.

  Returns:
    Starts (b, most + 1), the last column of no segment, and lengths (b, most), -1
    where there is none; counts (b,). All int32.
  """
  size = segments.shape[1]
  is_first = is_start(segments)
  count = jnp.sum(is_first, axis=1, dtype=jnp.int32)
  place = functools.partial(jnp.nonzero, size=most + 1, fill_value=size)
  starts = jax.vmap(lambda row: place(row)[0])(is_first).astype(jnp.int32)
  lengths = jnp.diff(starts, axis=1)
  is_there = jnp.arange(most + 1)[None] < count[:, None]
  starts = jnp.where(is_there.at[:, most].set(False), starts, -1)
  return starts, jnp.where(is_there[:, :most], lengths, -1), count
