"""Checks attention on a GPU: values and gradients against formed scores in float32.

  python benchmarks/attention_check.py --style=github

Plain, windowed and packed, at odd lengths, with unused segments and with as many as
there may be. An error is the largest difference of a tensor, in terms of its largest
entry or 0.1; bfloat16 has a resolution of 0.4%. Exits with 1 above --limit. Times are medians
of --rounds synchronised calls of value and gradients, beside the formed scores.
"""

import sys
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import tabulate

from bernoulli_lora_jax.models import attention

_STYLE = flags.DEFINE_string('style', 'simple', 'Table format of tabulate.')
_LIMIT = flags.DEFINE_float('limit', 0.02, 'Largest error that passes.')
_ROUNDS = flags.DEFINE_integer('rounds', 10, 'Calls a time is a median of.')
_HEADS = flags.DEFINE_list('heads', ['32', '8', '64'], 'Heads, of keys, width.')

_MOST = 16  # Segments in a row.


def segments_of(rows: int, length: int, count: int, seed: int) -> np.ndarray:
  """Returns (rows, length) of up to `count` documents of random lengths."""
  rng = np.random.default_rng(seed)
  found = np.zeros((rows, length), np.int32)
  for row in found:
    own = rng.integers(1, count + 1)
    cuts = rng.choice(np.arange(1, length), min(own, length) - 1, replace=False)
    row[np.sort(cuts)] = 1
  # Any number that differs from the one before: here some come again.
  return np.cumsum(found, axis=1) % 5 + 3 * (np.arange(rows)[:, None] % 2)


def formed(q, k, v, window, segments):
  """Returns attention whose scores are formed, in float32 at full precision."""
  length, group = q.shape[1], q.shape[2] // k.shape[2]
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
  scores = jnp.einsum('bsnh,btnh->bnst', q, k, precision='highest')
  place = jnp.arange(length)
  seen = attention.sees(place[:, None], place[None], window)[None]
  if segments is not None:
    runs = jnp.cumsum(attention.is_start(segments), axis=1)
    seen = seen & (runs[:, :, None] == runs[:, None])
  scores = jnp.where(seen[:, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1)
  return jnp.einsum('bnst,btnh->bsnh', probs, v, precision='highest')


def both(function):
  """Returns value and gradients of a weighted sum of a function's result."""

  def run(q, k, v, weight):
    total = lambda *x: jnp.vdot(weight, function(*x).astype(jnp.float32))
    return function(q, k, v), *jax.grad(total, argnums=(0, 1, 2))(q, k, v)

  return jax.jit(run)


def seconds(run, *args) -> float:
  """Returns the median time of a call."""
  times = []
  for _ in range(_ROUNDS.value + 2):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    times.append(time.perf_counter() - start)
  return float(np.median(times[2:]))


def row(length, window, count, seed):
  """Returns a row of the table, and whether it passes."""
  heads, kv_heads, dim = map(int, _HEADS.value)
  keys = jax.random.split(jax.random.key(seed), 4)
  draw = lambda key, n: jax.random.normal(
      key, (2, length, n, dim), jnp.bfloat16
  )
  q, weight = draw(keys[0], heads), draw(keys[3], heads)
  k, v = draw(keys[1], kv_heads), draw(keys[2], kv_heads)
  segments = None
  if count:
    segments = jnp.asarray(segments_of(2, length, count, seed))
  ours = both(
      lambda q, k, v: attention.attend(
          q, k, v, window=window, segments=segments, max_segments=_MOST
      )
  )
  reference = both(lambda q, k, v: formed(q, k, v, window, segments))
  got, want = ours(q, k, v, weight), reference(q, k, v, weight)
  errors = [
      float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 0.1))
      for a, b in zip(got, want, strict=True)
  ]
  passes = all(e < _LIMIT.value for e in errors)  # NaN does not.
  time_of = seconds(ours, q, k, v, weight), seconds(reference, q, k, v, weight)
  names = ('output', 'grad q', 'grad k', 'grad v')
  return {
      'length': length,
      'window': window or '-',
      'documents': f'<= {count}' if count else '-',
      **{n: f'{e:.1e}' for n, e in zip(names, errors, strict=True)},
      'ms': f'{1e3 * time_of[0]:.2f}',
      'ms, formed': f'{1e3 * time_of[1]:.2f}',
  }, passes


def main(argv):
  del argv
  print(
      f'{jax.devices()[0].device_kind}, jax {jax.__version__}; packed attention is'
      f' {"fused" if attention.packed_is_fused() else "a mask"}; 2 rows, bfloat16,'
      f' heads, of keys, width: {", ".join(_HEADS.value)}\n'
  )
  rows, passed = [], []
  for seed, (length, window, count) in enumerate(
      [
          *((n, None, 0) for n in (1, 17, 129, 1023, 1024, 4096)),
          *((n, 100, 0) for n in (17, 129, 1023, 4096)),
          *((n, None, 1) for n in (17, 1023)),
          *((n, None, _MOST) for n in (17, 129, 1023, 1024, 4096)),
          *((n, 100, _MOST) for n in (129, 1023, 4096)),
      ]
  ):
    made, passes = row(length, window, count, seed)
    rows.append(made)
    passed.append(passes)
  print(tabulate.tabulate(rows, headers='keys', tablefmt=_STYLE.value))
  if attention.packed_is_fused():
    # More documents than there may be are loud, not mixed.
    q = jnp.ones((2, 64, 8, 64), jnp.bfloat16)
    segments = jnp.stack([jnp.arange(64) // 32, jnp.arange(64)])
    out = attention.attend(q, q, q, segments=segments, max_segments=4)
    is_loud = bool(jnp.all(jnp.isnan(out[1])) and jnp.all(jnp.isfinite(out[0])))
    print(f'\nA row of more than max_segments documents is NaN: {is_loud}.')
    passed.append(is_loud)
  sys.exit(0 if all(passed) else 1)


if __name__ == '__main__':
  app.run(main)
