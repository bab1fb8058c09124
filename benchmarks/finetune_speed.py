"""Tokens a second and peak memory of `finetune` beside Hugging Face's PEFT.

  python benchmarks/finetune_speed.py --out=results --style=github

One GPU, random bfloat16 weights of the shapes of Llama 3.2 1B, rank --rank on all
seven linear maps of a layer, AdamW, full rows of random tokens. Rows, each a process
of its own, printed as they come:

  peft_eager      transformers and PEFT, bfloat16 adapters, sdpa, fused AdamW
  peft_compiled   the same under torch.compile, loss included; attention without the
                  mask that transformers forms when it is compiled
  bare_METHOD     our step alone: unrolled layers, no remat, the batch as the command
                  makes it (packed) on the device
  command_METHOD  `python -m bernoulli_lora_jax finetune --mode=speed`
  command_METHOD_memory     the same with --mode=memory

METHOD is lora, rac_left or bernoulli. Further ones, by --only:

  peft_compiled_mask        as transformers does it: with the mask
  peft_compiled_autocast    float32 adapters, as ours are, under autocast
  bare_METHOD_unpacked      a batch of nothing but tokens
  sketched_METHOD           as bare, of a sketched chain: rac_left, rac_right, bernoulli;
                            with _coordinate, _stochastic behind
  bare_METHOD_memory, sketched_METHOD_memory     scanned layers, full remat
  floor_dx                  forward and dx alone, no chain
  plain_lora, plain_lora_unpacked     LoRA by hand in JAX on the same decoder

*tokens/s* is over --steps steps that nothing waits for, *synchronised* the median
of --synchronised ones that are waited for. Of a command it is over the lines of its
metrics but for the first, which compiles. *loop* is what a command loses of the
bare step's. FLOPs are those of the formula in `flops`, of --peak_tflops a second.
"""

import functools
import gzip
import itertools
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app
from absl import flags
import decoders
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabulate

import bernoulli_lora_jax as bl
from bernoulli_lora_jax.models import decoder

_ROWS = [
    *('peft_eager', 'peft_compiled', 'bare_lora', 'command_lora'),
    *('command_rac_left', 'command_bernoulli', 'command_lora_memory'),
]

_ONLY = flags.DEFINE_list('only', _ROWS, 'Rows, in this order.')
_SHAPES = flags.DEFINE_string('shapes', '1b', 'tiny, 1b, 8b.')
_RANK = flags.DEFINE_integer('rank', 16, 'Rank of the factors.')
_PERIOD = flags.DEFINE_integer('period', 100, 'Steps of a link of a chain.')
_BATCH = flags.DEFINE_integer('batch', 0, 'Rows of a batch; 0: 8 (1b).')
_LENGTH = flags.DEFINE_integer('length', 0, 'Tokens of a row; 0: 1024 (1b).')
_CHUNK = flags.DEFINE_integer('chunk', 2048, 'Positions with logits at a time.')
_STEPS = flags.DEFINE_integer('steps', 150, 'Steps that are timed together.')
_SYNCHRONISED = flags.DEFINE_integer('synchronised', 15, 'Timed one by one.')
_RATE = flags.DEFINE_float('learning_rate', 1e-4, 'Of AdamW.')
_TFLOPS = flags.DEFINE_float('peak_tflops', 989.0, 'Of the card, bfloat16.')
_COMPILE = flags.DEFINE_string('compile_mode', 'default', 'Of torch.compile.')
_FLAGS = flags.DEFINE_multi_string('flag', [], 'Further ones of the command.')
_TIMEOUT = flags.DEFINE_float('timeout', 240.0, 'Seconds that a row may take.')
_FOLDER = flags.DEFINE_string('folder', '', 'Of checkpoints; else temporary.')
_OUT = flags.DEFINE_string('out', '', 'Folder for results as JSON lines, logs.')
_STYLE = flags.DEFINE_string('style', 'simple', 'Table format of tabulate.')
_PROFILE = flags.DEFINE_string(
    'profile', '', 'Folder for the kernels of three steps of rows in JAX.'
)
_ONE = flags.DEFINE_string('one', '', 'Runs one row in this process.')

Row = dict[str, Any]

# {part of a kernel's name: its kind}
_KINDS = {
    'cudnn': 'attention',
    'nvjet': 'products, cuBLAS',
    'gemm_fusion': 'products, Triton',
    'memcpy': 'copies',
}

_COMMAND = (sys.executable, '-m', 'bernoulli_lora_jax', 'finetune')


def sizes():
  """Returns config.json, rows of a batch and tokens of a row."""
  raw, rows, length = decoders.CONFIGS[_SHAPES.value]
  return raw, _BATCH.value or rows, _LENGTH.value or length


def flops(config: decoder.DecoderConfig, chain, found, length: int) -> float:
  """Returns the FLOPs a token of a step of which the base is frozen.

  Base and head: forward and by the input, 4 m n. Adapters: the same, 4 r (m + n),
  and 2 r m or 2 r n for each factor that trains. Sketched: 2 r (m + n) for each.
  Attention: two products over half of the positions forward, twice that backward.
  W + L R is not counted.

  Args:
    config: of the decoder.
    chain: what trains; None for nothing.
    found: what is adapted.
    length: tokens of a row.
  """
  total = 4 * config.hidden_size * config.vocab_size
  attention = 6 * length * config.num_heads * config.head_dim
  total += config.num_layers * attention
  for one in found:
    m, n, r = one.matrix.m, one.matrix.n, one.inner
    trained = {'left': m, 'right': n}
    thin = 0
    if chain is not None and chain.sketched:
      thin = 2 * r * (m + n) * len(one.trained)
    elif chain is not None:
      thin = 4 * r * (m + n)
      thin += sum(2 * r * trained[side] for side in one.trained)
    total += math.prod(one.matrix.batch) * (4 * m * n + thin)
  return float(total)


def timed(step, wait) -> dict[str, float]:
  """Returns the rates of a step; `wait` returns when all are done."""
  _, rows, length = sizes()

  def seconds(count):
    start = time.perf_counter()
    for _ in range(count):
      step()
    wait()
    return time.perf_counter() - start

  first = seconds(1)
  seconds(3)
  alone = float(np.median([seconds(1) for _ in range(_SYNCHRONISED.value)]))
  together = seconds(_STEPS.value) / _STEPS.value
  return {
      'tokens_per_second': rows * length / together,
      'synchronised': rows * length / alone,
      'compile_seconds': first - alone,
  }


def peft(kind: str) -> Row:
  """Measures transformers and PEFT: eager, compiled, compiled_*."""
  import peft as peft_lib
  import torch
  import transformers
  from transformers.integrations import sdpa_attention

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  raw, rows, length = sizes()
  is_compiled, is_wide = kind.startswith('compiled'), kind.endswith('autocast')
  torch.set_float32_matmul_precision('high')
  torch.manual_seed(0)
  # transformers forms no mask for attention that it does not know; it is causal.
  transformers.AttentionInterface.register(
      'causal', sdpa_attention.sdpa_attention_forward
  )
  with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig.from_dict(raw),
        dtype=torch.bfloat16,
        attn_implementation='sdpa' if kind.endswith('mask') else 'causal',
    )
    lora = peft_lib.LoraConfig(
        r=_RANK.value,
        lora_alpha=_RANK.value,
        target_modules='all-linear',
        task_type='CAUSAL_LM',
    )
    model = peft_lib.get_peft_model(model, lora, autocast_adapter_dtype=is_wide)
    tokens = torch.randint(raw['vocab_size'], (rows, length))
  model.train()
  trained = [x for x in model.parameters() if x.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=_RATE.value, fused=True)
  inner = model.get_base_model()

  def loss_of(tokens):
    with torch.autocast(device, torch.bfloat16, enabled=is_wide):
      return inner(input_ids=tokens, labels=tokens, use_cache=False).loss

  run = loss_of
  if is_compiled:
    run = torch.compile(loss_of, dynamic=False, mode=_COMPILE.value)
  losses = []

  def step():
    torch.compiler.cudagraph_mark_step_begin()
    loss = run(tokens)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses[:] = [loss.detach()]

  is_cuda = device == 'cuda'
  if is_cuda:
    torch.cuda.reset_peak_memory_stats()
  found = timed(step, torch.cuda.synchronize if is_cuda else lambda: None)
  peak = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0
  names = (torch, transformers, peft_lib)
  return {
      **found,
      'peak_gib': peak,
      'loss': float(losses[0]),
      'trained': sum(x.numel() for x in trained),
      'device': torch.cuda.get_device_name() if is_cuda else 'cpu',
      'versions': ', '.join(f'{x.__name__} {x.__version__}' for x in names),
  }


def batch_of(vocabulary: int, is_packed: bool) -> dict[str, jax.Array]:
  """Returns random tokens; packed: as batches of text are, a document a row."""
  _, rows, length = sizes()
  shape = (rows, length)
  batch = {
      'tokens': jax.random.randint(jax.random.key(1), shape, 0, vocabulary)
  }
  if is_packed:
    places = jnp.arange(length, dtype=jnp.int32)
    batch['positions'] = jnp.broadcast_to(places, shape)
    batch['segments'] = jnp.ones(shape, jnp.int32)
    batch['weights'] = jnp.ones(shape).at[:, 0].set(0)
  return batch


def jax_step(start, kind: str) -> Row:
  """Measures a step in JAX, of `start(method, config, params)`."""
  raw, _, length = sizes()
  is_lean = kind.endswith('_memory')
  kind = kind.removesuffix('_memory')
  method = kind.removesuffix('_unpacked')
  config, params = decoders.drawn(
      raw,
      scan_layers=is_lean,
      remat='full' if is_lean else 'none',
      max_segments=4,
  )
  chain, state, step = start(method, config, params)
  batch = batch_of(config.vocab_size, is_packed=method == kind)
  training = None if start is floor else chain
  per_token = flops(config, training, chain.adapted(params), length)
  trained = sum(x.size for x in jax.tree.leaves(state.factors))
  del params
  carry: list[Any] = [state, None]
  del state

  def once():
    carry[:] = step(carry[0], batch)

  found = timed(once, lambda: jax.block_until_ready(carry))
  if _PROFILE.value:
    kinds = profile(once, lambda: jax.block_until_ready(carry))
    found['kernels_ms'] = kinds
    print(tabulate.tabulate(kinds.items(), floatfmt='.2f'), file=sys.stderr)
  rate = found['tokens_per_second'] * per_token / 1e12
  return {
      **found,
      'peak_gib': decoders.peak(),
      'loss': float(carry[1][0]),
      'factors': trained,
      'gflops_per_token': per_token / 1e9,
      'tflops': rate,
      'of_peak': rate / _TFLOPS.value,
      'device': jax.devices()[0].device_kind,
      'versions': f'jax {jax.__version__}',
  }


def profile(step, wait) -> dict[str, float]:
  """Returns milliseconds of a step by kind of kernel; writes a trace of three steps.

  ROW_RANK.trace.json.gz below --profile is for chrome://tracing.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(3):
        step()
      wait()
    (trace,) = pathlib.Path(folder).rglob('*.trace.json.gz')
    target = pathlib.Path(_PROFILE.value)
    target.mkdir(parents=True, exist_ok=True)
    target /= f'{_ONE.value}_{_RANK.value}.trace.json.gz'
    shutil.copy(trace, target)
  return kernels(target)


def kernels(trace: pathlib.Path) -> dict[str, float]:
  """Returns milliseconds a step by kind of kernel, of a trace of three steps."""
  events = json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
  names = {}
  for e in events:
    if e.get('ph') == 'M' and e['name'] in ('process_name', 'thread_name'):
      names[e['name'], e['pid'], e.get('tid')] = e['args']['name']
  on_gpu = {k[1] for k, x in names.items() if 'GPU' in x}
  streams = {k[1:] for k, x in names.items() if x.startswith('Stream')}
  found = dict.fromkeys((*_KINDS.values(), 'elementwise', 'all'), 0.0)
  for e in events:
    if e.get('ph') != 'X' or e['pid'] not in on_gpu:
      continue
    if (e['pid'], e['tid']) not in streams:
      continue
    kinds = (kind for part, kind in _KINDS.items() if part in e['name'].lower())
    for kind in (next(kinds, 'elementwise'), 'all'):
      found[kind] += e['dur'] / 3e3
  return found


def bare(method: str, config, params):
  """Starts a chain's own step."""
  policy = decoders.policy(method, _RANK.value, _PERIOD.value)
  tx = optax.adamw(_RATE.value)
  return decoders.start(config, params, policy, tx, chunk=_CHUNK.value)


def sketched(method: str, config, params):
  """Starts a sketched chain's own step."""
  method, is_coordinate = cut(method, '_coordinate')
  method, is_stochastic = cut(method, '_stochastic')
  fields: dict[str, Any] = {}
  if is_coordinate:
    fields['sketch'] = bl.sketches.coordinate()
  if is_stochastic:
    fields['rounding'] = 'stochastic'
  policy = decoders.policy(method, _RANK.value, _PERIOD.value, **fields)
  tx = optax.adam(_RATE.value)
  return decoders.start(
      config, params, policy, tx, chunk=_CHUNK.value, sketched=True
  )


def cut(name: str, end: str) -> tuple[str, bool]:
  """Returns a name without its end, and whether it had it."""
  return name.removesuffix(end), name.endswith(end)


def floor(method: str, config, params):
  """Starts forward and dx alone: the derivative by the first layer's norm."""
  del method
  chain, state, _ = bare('lora', config, params)
  loss = decoder.make_loss(config, _CHUNK.value)

  def step(state, batch):
    first, params = 'layers_0', state.params

    def value(scale):
      layer = {**params[first], 'input_layernorm': scale}
      return loss({**params, first: layer}, batch, None)[0]

    value, grads = jax.value_and_grad(value)(params[first]['input_layernorm'])
    return state._replace(other_states=grads), (value, None)

  return chain, state, jax.jit(step, donate_argnums=0)


def plain(method: str, config, params):
  """Starts LoRA by hand: x W + (x L) R in every dense layer, on its own state."""
  tx = optax.adamw(_RATE.value)
  chain, state, _ = bare(method, config, params)
  loss = decoder.make_loss(config, _CHUNK.value)

  def of_factors(factors, params, batch):
    def add(call, args, kwargs, context):
      out = call(*args, **kwargs)
      if not isinstance(context.module, nn.Dense):
        return out
      pair = factors['/'.join((*context.module.path, 'kernel'))]
      left, right = (pair[side].astype(out.dtype) for side in ('left', 'right'))
      return out + (args[0] @ left) @ right

    with nn.intercept_methods(add):
      return loss(params, batch, None)[0]

  def step(state, batch):
    value, grads = jax.value_and_grad(of_factors)(
        state.factors, state.params, batch
    )
    updates, moments = tx.update(grads, state.opt_state, state.factors)
    factors = optax.apply_updates(state.factors, updates)
    state = state._replace(factors=factors, opt_state=moments)
    return state, (value, None)

  return chain, state, jax.jit(step, donate_argnums=0)


def command(kind: str, work: pathlib.Path, log) -> Row:
  """Runs the command in a process of its own and reads what it wrote."""
  raw, rows, length = sizes()
  mode = 'memory' if kind.endswith('_memory') else 'speed'
  method = kind.removesuffix('_memory')
  model, data, output = work / _SHAPES.value, work / 'data.jsonl', work / kind
  if not model.exists():
    decoders.write(model, raw)
  write_text(data, rows * (_STEPS.value + 1), length)
  shutil.rmtree(output, ignore_errors=True)  # Else it would be resumed.
  arguments = {
      'model': model,
      'data': data,
      'output': output,
      'method': method,
      'rank': _RANK.value,
      'num_steps': _STEPS.value,
      'batch_size': rows,
      'max_length': length,
      'learning_rate': _RATE.value,
      'mode': mode,
      'eval_fraction': 0,
      'export': 'none',
      'tokenizer': 'bytes',
      'kind': 'language_model',
  }
  if method != 'lora':
    arguments['period'] = _PERIOD.value
  given = [f'--{name}={value}' for name, value in arguments.items()]
  finish([*_COMMAND, *given, *_FLAGS.value], log)
  lines = [
      json.loads(x) for x in (output / 'metrics.jsonl').read_text().splitlines()
  ]
  summary = json.loads((output / 'summary.json').read_text())
  if _OUT.value:
    for name in ('metrics.jsonl', 'summary.json'):
      target = pathlib.Path(_OUT.value) / f'command_{kind}.{name}'
      shutil.copy(output / name, target)
  shutil.rmtree(output)
  losses = [x['loss'] for x in lines if 'loss' in x]
  return {
      'tokens_per_second': rate_of(lines, rows * length)
      or summary['tokens_per_second'],
      'summary_tokens_per_second': summary['tokens_per_second'],
      'compile_seconds': summary['compile_seconds'],
      'peak_gib': (summary.get('peak_memory_bytes') or 0) / 2**30,
      'seconds': summary['seconds'],
      'loss': losses[-1] if losses else None,
  }


def rate_of(lines, tokens: int) -> float | None:
  """Returns tokens a second over the steps of all lines but the first."""
  lines = [x for x in lines if x.get('tokens_per_second')]
  counts = [new['step'] - old['step'] for old, new in itertools.pairwise(lines)]
  seconds = [
      count * tokens / line['tokens_per_second']
      for count, line in zip(counts, lines[1:], strict=True)
  ]
  return sum(counts) * tokens / sum(seconds) if counts else None


def write_text(path: pathlib.Path, count: int, length: int) -> None:
  """Writes documents of random ASCII that fill a row with their end token."""
  rng = np.random.default_rng(0)
  drawn = rng.integers(32, 127, (count, length - 1), np.uint8)
  lines = [json.dumps({'text': bytes(x).decode()}) for x in drawn]
  path.write_text('\n'.join(lines) + '\n')


def finish(arguments, log) -> str:
  """Runs a process, its errors into a log; returns what it printed.

  Raises:
    RuntimeError: it failed or took too long, with its last words.
  """
  place = log.tell()
  try:
    done = subprocess.run(
        arguments,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        timeout=_TIMEOUT.value,
    )
    failure = done.returncode and f'exit status {done.returncode}'
  except subprocess.TimeoutExpired as error:
    done, failure = error, f'longer than {_TIMEOUT.value:.0f} s'
  output = done.stdout or ''
  output = output if isinstance(output, str) else output.decode()
  log.seek(place)
  words = [x for x in (output + log.read()).splitlines() if x.strip()]
  log.write(output)
  log.flush()
  if failure:
    raise RuntimeError(f'{failure}: {words[-1] if words else ""}')
  return output


def measure(name: str) -> Row:
  """Returns a row that is measured in this process."""
  room, _, kind = name.partition('_')
  rooms = {
      'peft': peft,
      'bare': functools.partial(jax_step, bare),
      'sketched': functools.partial(jax_step, sketched),
      'floor': functools.partial(jax_step, floor),
      'plain': functools.partial(jax_step, plain),
  }
  return rooms[room](kind)


def row(name: str, argv, work: pathlib.Path, log) -> Row:
  """Returns a row from a process of its own, or why there is none."""
  start = time.perf_counter()
  try:
    if name.startswith('command_'):
      found = command(name.removeprefix('command_'), work, log)
    else:
      again = [sys.executable, argv[0], *sys.argv[1:], f'--one={name}']
      found = json.loads(finish(again, log).splitlines()[-1])
    if found['loss'] is None or not math.isfinite(found['loss']):
      raise ValueError(f'Expected a finite loss, got {found["loss"]}.')
  except Exception as error:  # A row that says why.
    found = {'error': f'{type(error).__name__}: {error}'}
  return {'row': name, **found, 'wall_seconds': time.perf_counter() - start}


def compared(new, rows) -> Row:
  """Returns a row with what it is beside the rows before it."""
  rate = new.get('tokens_per_second')
  rates = {x['row']: x.get('tokens_per_second') for x in rows}
  peer = rates.get('peft_compiled')
  own = rates.get(new['row'].replace('command_', 'bare_'))
  if rate and peer:
    new['times_peft_compiled'] = rate / peer
  if rate and own and new['row'].startswith('command_'):
    new['loop_cost'] = 1 - rate / own
  return new


def shown(x) -> dict[str, str]:
  """Returns a row of the table."""
  text = lambda name, form: f'{x[name]:{form}}' if x.get(name) else '-'
  return {
      'row': x['row'],
      'tokens/s': text('tokens_per_second', ',.0f'),
      'synchronised': text('synchronised', ',.0f'),
      'x peft_compiled': text('times_peft_compiled', '.3f'),
      'loop': text('loop_cost', '.1%'),
      'peak, GiB': text('peak_gib', '.2f'),
      'compile, s': text('compile_seconds', '.0f'),
      'TFLOP/s': text('tflops', '.0f'),
      'of peak': text('of_peak', '.1%'),
      'row, s': text('wall_seconds', '.0f'),
      'error': x.get('error', '')[:100],
  }


def main(argv):
  if _ONE.value:
    print(json.dumps(measure(_ONE.value)))
    return
  jax.config.update('jax_platforms', 'cpu')  # Rows have the GPU to themselves.
  rows = []
  with tempfile.TemporaryDirectory() as temporary:
    work = pathlib.Path(_FOLDER.value or temporary)
    out = pathlib.Path(_OUT.value or temporary)
    for folder in (work, out):
      folder.mkdir(parents=True, exist_ok=True)
    for name in _ONLY.value:
      with (out / f'{name}.log').open('w+') as log:
        rows.append(compared(row(name, argv, work, log), rows))
      with (out / 'finetune_speed.jsonl').open('a') as file:
        file.write(json.dumps(rows[-1]) + '\n')
      print(tabulate.tabulate([shown(rows[-1])], headers='keys'), flush=True)
  for key in ('device', 'versions'):
    print(f'{key}: {", ".join(sorted({x[key] for x in rows if key in x}))}')
  table = [shown(x) for x in rows]
  print('\n' + tabulate.tabulate(table, headers='keys', tablefmt=_STYLE.value))


if __name__ == '__main__':
  app.run(main)
