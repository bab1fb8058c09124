"""Times one optimiser step (update and apply) on a transformer-shaped tree.

  python benchmarks/update_time.py                      # CPU: 60M parameters
  python benchmarks/update_time.py --hidden=2048 --kv=512 --ffn=8192 --layers=16

The floor is what any dense step must move: read G, read W, write W once, at the
copy rate measured here. Times are medians over rounds of `--calls` dispatches
closed by one synchronisation. GaLore's refresh of its SVDs, once in 200 steps,
is not in its time.
"""

from collections.abc import Callable, Iterator
import math
import os
import platform
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabulate

import bernoulli_lora_jax as bl

_HIDDEN = flags.DEFINE_integer('hidden', 1024, 'Width of the model.')
_KV = flags.DEFINE_integer('kv', 256, 'Width of keys and values.')
_FFN = flags.DEFINE_integer('ffn', 4096, 'Width of the feed-forward layers.')
_LAYERS = flags.DEFINE_integer('layers', 4, 'Number of layers.')
_RANK = flags.DEFINE_integer('rank', 16, 'Rank of chains and GaLore.')
_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Rounds; the median is quoted.')
_CALLS = flags.DEFINE_integer('calls', 5, 'Steps dispatched in a round.')
_ONLY = flags.DEFINE_list('only', [], 'Names to run; all by default.')
_STYLE = flags.DEFINE_string('style', 'simple', 'Table format of tabulate.')


def make_tree(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
  """Returns random matrices: seven linear maps a layer."""
  d, kv, f = _HIDDEN.value, _KV.value, _FFN.value
  shapes = {
      'query': (d, d),
      'key': (d, kv),
      'value': (d, kv),
      'out': (d, d),
      'gate': (d, f),
      'up': (d, f),
      'down': (f, d),
  }
  tree = {}
  for i in range(_LAYERS.value):
    keys = jax.random.split(jax.random.fold_in(key, i), len(shapes))
    tree[f'layers_{i}'] = {
        name: jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
  return tree


def optimisers() -> Iterator[tuple[str, optax.GradientTransformation]]:
  """Yields (name, transformation)."""
  yield 'optax.sgd', optax.sgd(1e-3)
  yield 'optax.adamw', optax.adamw(1e-3)
  for name in ('gaussian', 'rademacher', 'srht', 'coordinate'):
    yield f'chain, {name}', bl.bernoulli_lora(
        1e-3,
        jax.random.key(0),
        rank=_RANK.value,
        sketch=getattr(bl.sketches, name)(),
    )
  for side in ('left', 'right'):
    yield f'RAC {side}, gaussian', bl.rac_lora(
        1e-3, jax.random.key(0), rank=_RANK.value, side=side
    )
  yield 'chain, gaussian, Adam, K=10', bl.bernoulli_lora(
      1e-3,
      jax.random.key(0),
      rank=_RANK.value,
      period=10,
      inner=optax.scale_by_adam(),
  )
  yield 'optax.contrib.galore', optax.contrib.galore(1e-3, rank=_RANK.value)


def median_time(call: Callable[[], Any]) -> float:
  """Returns the median seconds of a call over rounds, one to warm up."""
  times = []
  for _ in range(_ROUNDS.value + 1):
    start = time.perf_counter()
    for _ in range(_CALLS.value):
      result = call()
    jax.block_until_ready(result)
    times.append((time.perf_counter() - start) / _CALLS.value)
  return float(np.median(times[1:]))


def copy_rate(num_bytes: int) -> float:
  """Returns bytes read plus bytes written a second, in place, best of rounds."""
  x = jnp.ones((min(num_bytes, 2**32) // 4,), jnp.float32)
  copy = jax.jit(lambda x: x * 1.0001, donate_argnums=0)
  best, num_bytes = math.inf, x.nbytes
  x = copy(x).block_until_ready()
  for _ in range(_ROUNDS.value):
    start = time.perf_counter()
    for _ in range(_CALLS.value):
      x = copy(x)
    x.block_until_ready()
    best = min(best, (time.perf_counter() - start) / _CALLS.value)
  return 2 * num_bytes / best


def time_step(tx: optax.GradientTransformation, grads: Any, params: Any):
  """Returns (seconds a step, seconds of compilation, bytes of temporaries)."""
  state = jax.jit(tx.init)(params)

  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return state, optax.apply_updates(params, updates)

  start = time.perf_counter()
  compiled = (
      jax.jit(step, donate_argnums=(1, 2)).lower(grads, state, params).compile()
  )
  seconds = time.perf_counter() - start
  carry = [(state, params)]

  def call():
    carry[0] = compiled(grads, *carry[0])
    return carry[0]

  median = median_time(call)
  return median, seconds, compiled.memory_analysis().temp_size_in_bytes


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Expected flags only, got {argv[1:]}.')
  grads = jax.jit(make_tree)(jax.random.key(1))
  sizes = [x.nbytes for x in jax.tree.leaves(grads)]
  device = jax.devices()[0]
  rate = copy_rate(sum(sizes))
  floor = 3 * sum(sizes) / rate
  print(
      f'{device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores,'
      f' {platform.machine()}, jax {jax.__version__}\n{sum(sizes) / 4e6:.0f}M'
      f' float32 parameters in {len(sizes)} matrices, rank {_RANK.value};'
      f' copy {rate / 1e9:.1f} GB/s, floor {floor * 1e3:.2f} ms'
  )
  rows, sgd = [], None
  for name, tx in optimisers():
    if _ONLY.value and name not in _ONLY.value:
      continue
    params = jax.jit(make_tree)(jax.random.key(2))  # Donated below.
    seconds, compile_seconds, temporaries = time_step(tx, grads, params)
    sgd = seconds if sgd is None else sgd
    rows.append(
        {
            'optimiser': name,
            'ms': f'{seconds * 1e3:.2f}',
            'x sgd': f'{seconds / sgd:.2f}',
            'x floor': f'{seconds / floor:.2f}',
            'compile, s': f'{compile_seconds:.1f}',
            'temporaries, % of G': f'{100 * temporaries / sum(sizes):.1f}',
        }
    )
    print(f'{name}: {seconds * 1e3:.2f} ms', flush=True)
  print(
      tabulate.tabulate(
          rows,
          headers='keys',
          tablefmt=_STYLE.value,
          disable_numparse=True,
          colalign=('left', *['right'] * 5),
      )
  )


if __name__ == '__main__':
  app.run(main)
