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
from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors import numpy as safetensors
import tabulate

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import inject
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import hf_config

_SHAPES = flags.DEFINE_list('shapes', ['1b'], 'tiny, 1b, 8b.')
_METHODS = flags.DEFINE_list('methods', ['lora', 'rac_left', 'bernoulli'], '')
_RANK = flags.DEFINE_integer('rank', 16, 'Rank of the factors.')
_ROWS = flags.DEFINE_integer('rows', 0, 'Rows of a batch; 0: 8 (1b), 4 (8b).')
_LENGTH = flags.DEFINE_integer('length', 0, 'Tokens a row; 0: 1024, 2048.')
_FOLDER = flags.DEFINE_string('folder', '', 'Where checkpoints are written.')
_STYLE = flags.DEFINE_string('style', 'simple', 'Table format of tabulate.')
_ONE = flags.DEFINE_string('one', '', 'Runs one row: shape,method.')

_LLAMA = dict(
    model_type='llama',
    architectures=['LlamaForCausalLM'],
    hidden_act='silu',
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_theta=500000.0,
    max_position_embeddings=8192,
)


def _shape(vocab, hidden, ffn, layers, heads, kv_heads, rows, length):
  raw = dict(
      _LLAMA,
      vocab_size=vocab,
      hidden_size=hidden,
      intermediate_size=ffn,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      num_key_value_heads=kv_heads,
  )
  return raw, rows, length


CONFIGS = {
    'tiny': _shape(512, 128, 256, 4, 4, 2, 2, 64),
    '1b': _shape(32000, 2048, 8192, 16, 32, 8, 8, 1024),
    '8b': _shape(128256, 4096, 14336, 32, 32, 8, 4, 2048),
}
POLICIES = {
    'lora': dict(side=None, period=None),
    'rac_left': dict(side='left', period=5),
    'bernoulli': dict(side='bernoulli', prob=0.5, period=5),
}


def write(folder: pathlib.Path, raw) -> None:
  """Writes a checkpoint of random weights, a file a layer."""
  folder.mkdir(parents=True)
  config = hf_config.from_dict(raw, scan_layers=False)
  noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
  noise = (0.02 * noise).astype(ml_dtypes.bfloat16)
  groups, index = {}, {}
  for path, leaf in hf.param_shapes(config).items():
    (name,) = hf.tensor_names('llama', config, path)
    shape = leaf.shape[::-1] if path.endswith('kernel') else leaf.shape
    groups.setdefault(path.split('/')[0], {})[name] = shape
  for i, (room, tensors) in enumerate(groups.items()):
    file = f'model-{i + 1:05d}-of-{len(groups):05d}.safetensors'
    made = {n: np.resize(noise, shape) for n, shape in tensors.items()}
    safetensors.save_file(made, folder / file, metadata={'format': 'pt'})
    index |= dict.fromkeys(made, file)
    del made, room
  text = json.dumps({'metadata': {}, 'weight_map': index})
  (folder / hf.INDEX).write_text(text)
  (folder / 'config.json').write_text(json.dumps({**raw, 'dtype': 'bfloat16'}))


def drawn(raw, **run):
  """Returns a config and random weights, drawn on the device."""
  config = hf_config.from_dict(raw, **run)
  leaves = {
      path: 0.02 * jax.random.normal(jax.random.key(i), x.shape, jnp.bfloat16)
      for i, (path, x) in enumerate(hf.param_shapes(config).items())
  }
  return config, traverse_util.unflatten_dict(leaves, sep='/')


def peak() -> float:
  """Returns the most GiB that were in use so far, 0 where no device tells."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use', 0) / 2**30


def measure(shape: str, method: str) -> dict[str, object]:
  """Returns a row of the table."""
  raw, rows, length = CONFIGS[shape]
  rows, length = _ROWS.value or rows, _LENGTH.value or length
  run = dict(scan_layers=True, remat='full')
  start = time.perf_counter()
  if _FOLDER.value:
    model = hf.load(pathlib.Path(_FOLDER.value) / shape, **run)
    config, params = model.config, model.params
    del model
  else:
    config, params = drawn(raw, **run)
  jax.block_until_ready(params)
  loading = time.perf_counter() - start
  weights = sum(x.nbytes for x in jax.tree.leaves(params)) / 2**30
  loaded = peak()
  policy = bl.ChainPolicy(rank=_RANK.value, **POLICIES[method])
  chain = bl.adapters.make_chain(
      policy, optax.adam(1e-4), decoder.matrices(config)
  )
  state = chain.init(jax.random.key(0), params, copy=False)
  del params
  factors = sum(x.nbytes for x in jax.tree.leaves(state.factors)) / 2**30
  moments = sum(x.nbytes for x in jax.tree.leaves(state.opt_state)) / 2**30
  started = peak()
  loss = inject.by_product(decoder.make_loss(config, chunk=2048))
  step = jax.jit(lambda s, b: chain.step(s, loss, b), donate_argnums=0)
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
      'after 12 steps': f'{peak():.2f}',
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
      write(folder, CONFIGS[shape][0])
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
