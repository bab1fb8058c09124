"""Cross-entropy of a large vocabulary, a chunk of positions at a time.

The logits of a batch, b x s x vocabulary in float32, would be its largest array by
far. Here those of b x chunk positions exist at once, and the forward pass leaves the
gradient of the hidden states in their own dtype, nothing else. A head that nobody
differentiates costs no gradient of it; one that somebody does costs its sum in
float32. An adapter of the head is met in the products (see `follow`): its factors
get their gradients and nothing of the head's size is formed.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import follow


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int = 1024,
) -> jax.Array:
  """Returns sum over positions of weight x -log softmax(hidden head)[target].

  Args:
    hidden: (b, s, d).
    head: (d, vocabulary).
    targets: (b, s) int, in [0, vocabulary); where the weight is 0 anything, else
      one outside makes the value NaN.
    weights: (b, s) of the positions, >= 0. They are data: not differentiated.
    chunk: positions whose logits exist at once, over all rows; at least one a row.

  Returns:
    (), float32 or wider.

  Guarantees:
    Value and derivatives are those of the plain formula in float32, to rounding.
  """
  checks.integers(1, chunk=chunk)
  shape = jnp.broadcast_shapes(hidden.shape[:2], targets.shape, weights.shape)
  if not hidden.shape[:2] == targets.shape == weights.shape == shape:
    raise ValueError(
        'Expected targets and weights of shape (b, s) for hidden (b, s, d), got'
        f' {targets.shape} and {weights.shape} for {hidden.shape}.'
    )
  checks.that(0 not in shape, 'hidden of at least one position', shape=shape)
  rows, length, _ = hidden.shape
  size = min(length, max(1, chunk // rows))
  wide = jnp.promote_types(hidden.dtype, jnp.float32)
  weights = jax.lax.stop_gradient(weights).astype(wide)
  # A negative one would be counted from the end.
  targets = targets.astype(jnp.promote_types(targets.dtype, jnp.int32))
  targets = jnp.where(targets < 0, head.shape[1], targets)
  targets = jnp.where(weights == 0, 0, targets)
  chunks = _chunks(size, hidden, targets, weights)
  return _sum(chunks, head.astype(hidden.dtype))


def _chunks(size: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Returns (b, s, ...) as (s / size, b, size, ...), zeros at the end.

  Rows stay whole, so that rows on several devices stay where they are.
  """

  def split(x):
    missing = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  return tuple(map(split, arrays))


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
  wide = jnp.promote_types(hidden.dtype, jnp.float32)
  return jnp.matmul(hidden, head, preferred_element_type=wide)


def _values(
    logits: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
  """Returns the sum of weight x (log sum exp - logit of the target)."""
  return _sum_of(jax.nn.logsumexp(logits, axis=-1), logits, targets, weights)


def _log_sum_exp(logits: jax.Array) -> jax.Array:
  """Returns log sum exp over the last axis; on a GPU it reads logits once."""
  plain = lambda x: jax.nn.logsumexp(x, axis=-1)
  return jax.lax.platform_dependent(logits, cuda=_read_once, default=plain)


def _read_once(logits: jax.Array) -> jax.Array:
  """Returns log sum exp over the last axis by one reduction of two numbers.

  A number stands for (maximum, sum of exp(x - maximum)); two of them are joined by
  rescaling the sum of the smaller maximum.
  """

  def joined(a, b):
    top = jnp.maximum(a[0], b[0])
    # The difference of two infinities would be NaN.
    scaled = lambda c: c[1] * jnp.where(c[0] == top, 1, jnp.exp(c[0] - top))
    return top, scaled(a) + scaled(b)

  none = jnp.array(-jnp.inf, logits.dtype), jnp.zeros((), logits.dtype)
  pairs = logits, jnp.ones_like(logits)
  top, total = jax.lax.reduce(pairs, none, joined, (logits.ndim - 1,))
  return top + jnp.log(total)


def _sum_of(
    total: jax.Array, logits: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.vdot(weights, total - chosen)


def _plain(chunks: Any, head: jax.Array) -> jax.Array:
  """The value, a chunk at a time; its own derivative forms the logits again."""

  @jax.checkpoint
  def one(hidden, head, targets, weights):
    return _values(_logits(hidden, head), targets, weights)

  def body(total, chunk):
    hidden, targets, weights = chunk
    return total + one(hidden, head, targets, weights), None

  wide = jnp.promote_types(chunks[0].dtype, jnp.float32)
  return jax.lax.scan(body, jnp.zeros((), wide), chunks)[0]


_plain.__name__ = follow.EXACT
_named = jax.jit(_plain)


@jax.custom_vjp
def _sum(chunks: Any, head: jax.Array) -> jax.Array:
  return _named(chunks, head)


def _forward(chunks: Any, head: Any) -> tuple[jax.Array, Any]:
  """Returns the value and, with it, the derivatives that are asked for."""
  chunks = jax.tree.map(lambda x: x.value, chunks, is_leaf=_is_primal)
  is_moved, head = head.perturbed, head.value
  wide = jnp.promote_types(chunks[0].dtype, jnp.float32)

  def body(carry, chunk):
    total, of_head = carry
    hidden, targets, weights = chunk
    logits = _logits(hidden, head)
    norm = _log_sum_exp(logits)
    total = total + _sum_of(norm, logits, targets, weights)
    slope = jnp.exp(logits - norm[..., None])
    slope -= jax.nn.one_hot(targets, logits.shape[-1], dtype=slope.dtype)
    slope = (slope * weights[..., None]).astype(hidden.dtype)
    of_hidden = jnp.matmul(slope, head.T, preferred_element_type=wide)
    if is_moved:
      of_head += jnp.einsum(
          'bsd,bsv->dv', hidden, slope, preferred_element_type=wide
      )
    return (total, of_head), of_hidden.astype(hidden.dtype)

  first = jnp.zeros(head.shape, wide) if is_moved else None
  carry = (jnp.zeros((), wide), first)
  (total, of_head), of_hidden = jax.lax.scan(body, carry, chunks)
  of_head = None if of_head is None else of_head.astype(head.dtype)
  return total, (of_hidden, of_head)


def _backward(residuals: Any, slope: jax.Array) -> Any:
  of_hidden, of_head = residuals
  times = lambda x: None if x is None else (slope * x).astype(x.dtype)
  return (times(of_hidden), None, None), times(of_head)


def _is_primal(x: Any) -> bool:
  return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


_sum.defvjp(_forward, _backward, symbolic_zeros=True)
