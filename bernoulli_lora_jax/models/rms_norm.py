"""RMSNorm, and the norm of a stream that goes on beside it.

A layer reads its stream x twice: through a norm, by several products, and beside it,
x + f(norm(x)). The derivative by x is the sum of that beside and of the norm's, and
that the sum of those of the products. `fan_out` has all of them in one place, so that
one kernel adds them (`fused.norm_slope`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bernoulli_lora_jax import fused
from bernoulli_lora_jax import sharded


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Returns x / sqrt(mean of squares + eps), scaled, in float32 or wider.

  Args:
    x: (..., d).
    scale: (d,).
    eps: added to the mean square, >= 0.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  normed = (wide * jax.lax.rsqrt(square + eps)).astype(x.dtype)
  scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
  return normed * scale.astype(x.dtype)


def fan_out(
    x: jax.Array, scale: jax.Array, eps: float, num: int
) -> tuple[jax.Array, ...]:
  """Returns x, and its norm `num` times: once for each product that reads it.

  Args:
    x: (..., d).
    scale: (d,).
    eps: added to the mean square, >= 0.
    num: of products.
  """
  # On explicit meshes types say where results are placed.
  if fused.takes_rows(x) and sharded.mesh_of(x) is None:
    return _fan_out(x, scale, eps, num)
  return x, *[formed(rms_norm(x, scale, eps))] * num


@jax.custom_jvp
def formed(x: jax.Array) -> jax.Array:
  """Returns x, in memory once.

  On GPUs XLA takes what is computed before a product into it, for each product anew,
  and takes it out again where cuBLAS is faster: a norm before gate and up is computed
  twice. Nor does it join what reads two products: SwiGLU's derivatives are two passes.
  Apart from the products both are one.
  """
  return jax.lax.optimization_barrier(x)


@formed.defjvp
def _formed_jvp(primals, tangents):
  return formed(*primals), tangents[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fan_out(
    x: jax.Array, scale: jax.Array, eps: float, num: int
) -> tuple[jax.Array, ...]:
  return x, *[formed(rms_norm(x, scale, eps))] * num


def _forward(x: Any, scale: Any, eps: float, num: int) -> Any:
  # Told by the structure: numbers would be traced.
  moved = {'x': x.perturbed, 'scale': scale.perturbed}
  moved = {name: () for name, is_moved in moved.items() if is_moved}
  out = _fan_out(x.value, scale.value, eps, num)
  return out, (x.value, scale.value, moved)


def _backward(eps: float, num: int, residuals: Any, given: Any) -> Any:
  del num
  x, scale, moved = residuals
  # A product that is not there has no slope.
  is_zero = lambda y: isinstance(y, jax.custom_derivatives.SymbolicZero)
  beside, *slopes = given
  beside = jnp.zeros_like(x) if is_zero(beside) else beside
  slopes = [y for y in slopes if not is_zero(y)] or [jnp.zeros_like(x)]
  of_x = of_scale = None
  if 'x' in moved:
    of_x = fused.norm_slope(x, scale, beside, slopes, eps)
  if 'scale' in moved:
    _, pull = jax.vjp(lambda scale: rms_norm(x, scale, eps), scale)
    of_scale = pull(sum(slopes))[0]
  return of_x, of_scale


_fan_out.defvjp(_forward, _backward, symbolic_zeros=True)
