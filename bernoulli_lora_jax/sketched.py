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
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bernoulli_lora_jax import fused
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import merging
from bernoulli_lora_jax import policies
from bernoulli_lora_jax import rounding as rounding_lib


def moved(
    leaves: Sequence[Any],
    pairs: Mapping[str, inject.Pair],
    remainders: Mapping[str, jax.Array],
    keys: Mapping[str, jax.Array],
    found: Sequence[policies.Adapted],
    rounding: str,
) -> tuple[list[Any], dict[str, jax.Array]]:
  """Returns the leaves of params with W + L R in place of adapted W.

  Args:
    leaves: of params, in their order.
    pairs: {path: left (*batch, m, r), right (*batch, r, n)}, the scale s in them:
      the frozen factor, and the increment of the trained one.
    remainders: {path: (*batch, m, n)} of 'compensated', else {}.
    keys: {path: shape=batch, typed PRNG keys} of the step.
    found: what is adapted.
    rounding: 'nearest', 'stochastic' or 'compensated', see `rounding`.

  Returns:
    The leaves, and the new remainders.
  """
  leaves, rests = list(leaves), dict(remainders)
  for one in found:
    m, rest = one.matrix, None
    weight, pair, own = m.view(leaves[m.index]), pairs[m.path], keys[m.path]
    if fused.takes(weight, one.inner, rounding):
      total = fused.add_product(
          weight, pair['left'], pair['right'], own, rounding
      )
    else:
      total, rest = merging.entry_by_entry(
          functools.partial(_add, mode=rounding),
          weight,
          pair,
          rests.get(m.path),
          own,
      )
    leaves[m.index] = m.unview(total)
    if rest is not None:
      rests[m.path] = rest
  return leaves, rests


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
