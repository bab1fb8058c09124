"""Peak memory of fine-tuning a decoder on one GPU: load, init and steps.

  python benchmarks/decoder_memory.py --shapes=1b,8b --style=github

Random bfloat16 weights of the shapes of Llama 3.2 1B and Llama 3 8B, memory mode
(scanned layers, full remat), rank --rank on all linear maps of all layers, adapters in
float32 with Adam, a link's end among the steps. A checkpoint folder is written to --folder
first (2.2 and 16 GB) and loaded from there; with --folder= the weights are drawn on
the device. Each row is a process of its own; peaks are the allocator's.
"""

import json
import pathlib
import subprocess
import sys
import time

from absl import app
from absl import flags
import decoders
import jax
import numpy as np
import optax
import tabulate

from bernoulli_lora_jax.models import hf

_SHAPES = flags.DEFINE_list('shapes', ['1b'], 'tiny, 1b, 8b.')
_METHODS = flags.DEFINE_list('methods', ['lora', 'rac_left', 'bernoulli'], '')
_RANK = flags.DEFINE_integer('rank', 16, 'Rank of the factors.')
_ROWS = flags.DEFINE_integer('rows', 0, 'Rows of a batch; 0: 8 (1b), 4 (8b).')
_LENGTH = flags.DEFINE_integer('length', 0, 'Tokens a row; 0: 1024, 2048.')
_FOLDER = flags.DEFINE_string('folder', '', 'Where checkpoints are written.')
_STYLE = flags.DEFINE_string('style', 'simple', 'Table format of tabulate.')
_ONE = flags.DEFINE_string('one', '', 'Runs one row: shape,method.')


def measure(shape: str, method: str) -> dict[str, object]:
  """Returns a row of the table."""
  raw, rows, length = decoders.CONFIGS[shape]
  rows, length = _ROWS.value or rows, _LENGTH.value or length
  run = dict(scan_layers=True, remat='full')
  start = time.perf_counter()
  if _FOLDER.value:
    model = hf.load(pathlib.Path(_FOLDER.value) / shape, **run)
    config, params = model.config, model.params
    del model
  else:
    config, params = decoders.drawn(raw, **run)
  jax.block_until_ready(params)
  loading = time.perf_counter() - start
  weights = sum(x.nbytes for x in jax.tree.leaves(params)) / 2**30
  loaded = decoders.peak()
  policy = decoders.policy(method, _RANK.value, period=5)
  _, state, step = decoders.start(
      config, params, policy, optax.adam(1e-4), chunk=2048
  )
  del params
  factors = sum(x.nbytes for x in jax.tree.leaves(state.factors)) / 2**30
  moments = sum(x.nbytes for x in jax.tree.leaves(state.opt_state)) / 2**30
  started = decoders.peak()
  key, times = jax.random.key(1), []
  for i in range(12):  # The second link begins with the sixth.
    tokens = jax.random.randint(
        jax.random.fold_in(key, i), (rows, length), 0, config.vocab_size
    )
    start = time.perf_counter()
    state, (value, _) = jax.block_until_ready(step(state, {'tokens': tokens}))
    times.append(time.perf_counter() - start)
  if not np.isfinite(float(value)):
    raise SystemExit(f'Expected a finite loss, got {value}.')
  speed = rows * length / np.median(times[6:])
  return {
      'device': f'{jax.devices()[0].device_kind}, jax {jax.__version__}',
      'shapes': shape,
      'method': method,
      'batch': f'{rows} x {length}',
      'weights, GiB': f'{weights:.2f}',
      'factors': f'{factors:.3f}',
      'moments': f'{moments:.3f}',
      'peak after load': f'{loaded:.2f}',
      'after init': f'{started:.2f}',
      'after 12 steps': f'{decoders.peak():.2f}',
      'tokens/s': f'{speed:,.0f}',
      'load, s': f'{loading:.0f}',
      'compile, s': f'{times[0]:.0f}',
  }


def main(argv):
  if _ONE.value:
    print(json.dumps(measure(*_ONE.value.split(','))))
    return
  jax.config.update('jax_platforms', 'cpu')  # Rows have the GPU to themselves.
  table = []
  for shape in _SHAPES.value:
    folder = pathlib.Path(_FOLDER.value) / shape
    if _FOLDER.value and not folder.exists():
      decoders.write(folder, decoders.CONFIGS[shape][0])
    for method in _METHODS.value:
      flag = f'--one={shape},{method}'
      found = subprocess.run(
          [sys.executable, *argv[:1], *sys.argv[1:], flag],
          stdout=subprocess.PIPE,
          text=True,
          check=True,
      )
      table.append(json.loads(found.stdout.splitlines()[-1]))
      print(tabulate.tabulate(table[-1:], headers='keys'), flush=True)
  print('\n' + ' and '.join({row.pop('device') for row in table}) + '\n')
  print(tabulate.tabulate(table, headers='keys', tablefmt=_STYLE.value))


if __name__ == '__main__':
  app.run(main)
