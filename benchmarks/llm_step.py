"""Tokens a second and memory of a step of fine-tuning, beside what others run.

  python benchmarks/llm_step.py --out=results --style=github
  python benchmarks/llm_step.py --lengths=512,2048,8192 --ranks=4,16,64,256 \
      --only=peft_compiled,bare_lora,sketched_rac_left
  python benchmarks/llm_step.py --shapes=8b --batch=1 --length=4096 \
      --micro_batches=2 --against=bare_lora_r64 \
      --only=matmul,bare_lora_r64,sketched_rac_left_r128

One GPU, random bfloat16 weights, rank --rank on all seven linear maps of a layer, rows
full of random tokens. Each row of the table is a process of its own, printed and
written to --out as it comes. Parts in brackets may be there, in any order:

  matmul           a product of 8192 x 8192 in bfloat16 and a copy, a second of each
  peft_eager, peft_compiled     transformers and PEFT: bfloat16 adapters, sdpa without
                   the mask that transformers forms when it is compiled, fused AdamW,
                   the loss under torch.compile; [_checkpointed]: layers computed
                   twice; [_mask]: with the mask; [_autocast]: float32 adapters, as
                   ours are
  hf_full_compiled          all weights and both moments in bfloat16; hf_full_eager
  plain_lora       LoRA by hand in JAX on our decoder
  floor_dx         forward and dx alone, no step
  bare_METHOD      our step alone, AdamW on adapters beside W; METHOD: lora, rac_left,
                   rac_right, bernoulli
  sketched_METHOD  Adam moves W itself; METHOD: rac_left, rac_right, bernoulli
  command_METHOD   `python -m bernoulli_lora_jax finetune`, without training's like

JAX rows: unrolled layers, no remat; [_memory]: scanned layers, full remat (also of
command_*); [_unpacked]: a batch of nothing but tokens, where it is packed as the
command's is; chains: [_rademacher], [_coordinate], [_srht]; [_stochastic],
[_compensated]; [_shared], one coin for all matrices; [_grouped], one left frame for q,
k and v, one for gate and up. All rows: [_r64], the rank;
[_len4096], the tokens of a row, of which a step has as many as before. --ranks and
--lengths make each row of --only once for each.

*tokens/s* is over --steps steps that nothing waits for, *synchronised* of the median
of --synchronised ones that are waited for, both after four to warm up. Of a command
it is over the steps after so many as stand before --steps in other rows. *peak* is the
most that the process's allocator had in use since it started, so weights, init and
compilation are included; not the context of CUDA nor what its graphs hold. *compile*
is tracing and compiling, of PyTorch the first step less the median. *TFLOP/s* are
those of `measuring.flops`, beside the rate of the row matmul. *loop* is what a command
loses of the bare step's.
"""

import importlib.util
import itertools
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
import decoders
import jax
import measuring
import numpy as np
import tabulate

_ROWS = [
    *('matmul', 'peft_eager', 'peft_eager_checkpointed', 'peft_compiled'),
    *('peft_compiled_checkpointed', 'hf_full_compiled', 'plain_lora'),
    *('bare_lora', 'floor_dx', 'sketched_rac_left', 'sketched_rac_left_r128'),
    *('sketched_rac_left_r128_coordinate', 'sketched_bernoulli'),
    *('sketched_bernoulli_shared', 'sketched_rac_left_memory'),
]

_ONLY = flags.DEFINE_list('only', _ROWS, 'Rows, in this order.')
_RANKS = flags.DEFINE_list('ranks', [], 'Each row at each of these ranks.')
_LENGTHS = flags.DEFINE_list('lengths', [], 'Each row at these tokens a row.')
_AGAINST = flags.DEFINE_string('against', 'peft_compiled', 'Row of ratio 1.')
_SHAPES = flags.DEFINE_string('shapes', '1b', 'tiny, small, 1b, 8b.')
_RANK = flags.DEFINE_integer('rank', 16, 'Rank of the factors.')
_PERIOD = flags.DEFINE_integer('period', 100, 'Steps of a link of a chain.')
_BATCH = flags.DEFINE_integer('batch', 0, 'Rows of a micro-batch; 0: 8 (1b).')
_LENGTH = flags.DEFINE_integer('length', 0, 'Tokens of a row; 0: 1024 (1b).')
_MICRO = flags.DEFINE_integer('micro_batches', 1, 'Micro-batches of a step.')
_CHUNK = flags.DEFINE_integer('chunk', 2048, 'Positions with logits at a time.')
_STEPS = flags.DEFINE_integer('steps', 100, 'Steps that are timed together.')
_SYNCHRONISED = flags.DEFINE_integer(
    'synchronised', 15, 'Timed one by one.', lower_bound=14
)
_RATE = flags.DEFINE_float('learning_rate', 1e-4, 'Of Adam and AdamW.')
_COMPILE = flags.DEFINE_string('compile_mode', 'default', 'Of torch.compile.')
_FLAGS = flags.DEFINE_multi_string('flag', [], 'Further ones of the command.')
_TIMEOUT = flags.DEFINE_float('timeout', 400.0, 'Seconds that a row may take.')
_FOLDER = flags.DEFINE_string('folder', '', 'Of checkpoints; else temporary.')
_OUT = flags.DEFINE_string('out', '', 'Folder for results as JSON lines, logs.')
_STYLE = flags.DEFINE_string('style', 'simple', 'Table format of tabulate.')
_PROFILE = flags.DEFINE_string(
    'profile', '', 'Folder for traces of rows in JAX, ROW.trace.json.gz.'
)
_ONE = flags.DEFINE_string('one', '', 'Runs one row in this process.')

Row = measuring.Row

_COMMAND = (sys.executable, '-m', 'bernoulli_lora_jax', 'finetune')


def setting_of(name: str) -> tuple[str, measuring.Setting]:
  """Returns a row's name without rank and length, and what it is measured at."""
  raw, rows, length = decoders.CONFIGS[_SHAPES.value]
  rows, length = _BATCH.value or rows, _LENGTH.value or length
  kind, given = measuring.parsed(name)
  own = given.get('len', length)
  if rows * length % own:
    raise ValueError(
        f'Expected len to divide the {rows * length} tokens of a micro-batch,'
        f' got len={own}.'
    )
  trace = pathlib.Path(_PROFILE.value) / f'{name}.trace.json.gz'
  return kind, measuring.Setting(
      raw=raw,
      rank=given.get('r', _RANK.value),
      period=_PERIOD.value,
      rows=rows * length // own,
      length=own,
      micro_batches=_MICRO.value,
      chunk=_CHUNK.value,
      learning_rate=_RATE.value,
      steps=_STEPS.value,
      synchronised=_SYNCHRONISED.value,
      compile_mode=_COMPILE.value,
      trace=str(trace) if _PROFILE.value else '',
  )


def measure(name: str) -> Row:
  """Returns a row that is measured in this process."""
  name, setting = setting_of(name)
  if is_peer(name):
    import peers as library  # Has torch.
  else:
    import steps as library
  return library.measure(name, setting)


def is_peer(name: str) -> bool:
  """Returns whether a row needs torch, transformers and peft."""
  return name.startswith(('peft_', 'hf_'))


def command(name: str, work: pathlib.Path, log) -> Row:
  """Runs the command in a process of its own and reads what it wrote."""
  kind, setting = setting_of(name)
  mode = 'memory' if kind.endswith('_memory') else 'speed'
  method = kind.removeprefix('command_').removesuffix('_memory')
  model, data, output = work / _SHAPES.value, work / 'data.jsonl', work / name
  if not model.exists():
    decoders.write(model, setting.raw)
  write_text(data, setting.batch * (setting.steps + 1), setting.length)
  shutil.rmtree(output, ignore_errors=True)  # Else it would be resumed.
  arguments = {
      'model': model,
      'data': data,
      'output': output,
      'method': method,
      'rank': setting.rank,
      'num_steps': setting.steps,
      'batch_size': setting.batch,
      'micro_batches': setting.micro_batches,
      'max_length': setting.length,
      'learning_rate': setting.learning_rate,
      'mode': mode,
      'eval_fraction': 0,
      'export': 'none',
      'tokenizer': 'bytes',
      'kind': 'language_model',
  }
  if method != 'lora':
    arguments['period'] = setting.period
  given = [f'--{name}={value}' for name, value in arguments.items()]
  finish([*_COMMAND, *given, *_FLAGS.value], log)
  lines = [
      json.loads(x) for x in (output / 'metrics.jsonl').read_text().splitlines()
  ]
  summary = json.loads((output / 'summary.json').read_text())
  if _OUT.value:
    for file in ('metrics.jsonl', 'summary.json'):
      shutil.copy(output / file, pathlib.Path(_OUT.value) / f'{name}.{file}')
  shutil.rmtree(output)
  losses = [x['loss'] for x in lines if 'loss' in x]
  return {
      'tokens_per_second': rate_of(lines, 4 + setting.synchronised)
      or summary['tokens_per_second'],
      'summary_tokens_per_second': summary['tokens_per_second'],
      'compile_seconds': summary['compile_seconds'],
      'peak_gib': (summary.get('peak_memory_bytes') or 0) / 2**30,
      'seconds': summary['seconds'],
      'loss': losses[-1] if losses else None,
  }


def rate_of(lines, warm: int) -> float | None:
  """Returns tokens a second over the lines of metrics after some steps."""
  count = seconds = 0.0
  for old, new in itertools.pairwise(lines):
    if old['step'] >= warm and new.get('tokens_per_second'):
      count += new['step'] - old['step']
      seconds += (new['step'] - old['step']) / new['tokens_per_second']
  return count / seconds if count else None


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


def row(name: str, argv, work: pathlib.Path, log) -> Row:
  """Returns a row from a process of its own, or why there is none."""
  start = time.perf_counter()
  kind, setting = setting_of(name)
  sizes = {'rank': setting.rank, 'length': setting.length, 'rows': setting.rows}
  try:
    if kind.startswith('command_'):
      found = command(name, work, log)
    else:
      again = [sys.executable, argv[0], *sys.argv[1:], f'--one={name}']
      found = json.loads(finish(again, log).splitlines()[-1])
    if found['loss'] is None or not math.isfinite(found['loss']):
      raise ValueError(f'Expected a finite loss, got {found["loss"]}.')
  except Exception as error:  # A row that says why.
    found = {'error': f'{type(error).__name__}: {error}'}
  seconds = time.perf_counter() - start
  return {'row': name, 'kind': kind, **sizes, **found, 'wall_seconds': seconds}


def beside(new: Row, rows: list[Row], name: str) -> Row:
  """Returns the row of that name or kind, best at the same length and rank."""
  found = [x for x in rows if name in (x['row'], x['kind'])]
  same = lambda x: [x[key] == new[key] for key in ('length', 'rank')]
  return max(found, key=same, default={})


def shown(new: Row, rows: list[Row]) -> dict[str, str]:
  """Returns a row of the table, compared with other rows."""
  peer = beside(new, rows, _AGAINST.value)
  own = beside(new, rows, new['kind'].replace('command_', 'bare_'))
  best = beside(new, rows, 'matmul')

  def text(key, form, other=None, change=lambda ratio: ratio):
    value, unit = new.get(key), 1 if other is None else other.get(key)
    return f'{change(value / unit):{form}}' if value and unit else '-'

  is_command = new['kind'].startswith('command_')
  batch = f'{_MICRO.value} x {new["rows"]} x {new["length"]}'
  is_step = new['kind'] != 'matmul'
  return {
      'row': new['row'],
      'r': str(new['rank']) if measuring.has_rank(new['kind']) else '-',
      'batch': batch if is_step else '-',
      'tokens/s': text('tokens_per_second', ',.0f'),
      'synchronised': text('synchronised', ',.0f'),
      f'x {_AGAINST.value}': text('tokens_per_second', '.3f', peer),
      'peak, GiB': text('peak_gib', '.2f'),
      'x its peak': text('peak_gib', '.3f', peer),
      'compile, s': text('compile_seconds', '.0f'),
      'TFLOP/s': text('tflops', '.3g'),
      'of matmul': text('tflops', '.1%', best),
      'loop': text('tokens_per_second', '.1%', own, lambda x: 1 - x)
      if is_command
      else '-',
      'row, s': text('wall_seconds', '.0f'),
      'error': new.get('error', '')[:100],
  }


def trimmed(table: list[dict[str, str]]) -> list[dict[str, str]]:
  """Returns a table without the columns that say nothing."""
  used = [key for key in table[0] if {x[key] for x in table} - {'', '-'}]
  return [{key: x[key] for key in used} for x in table]


def main(argv):
  if _ONE.value:
    print(json.dumps(measure(_ONE.value)))
    return
  jax.config.update('jax_platforms', 'cpu')  # Rows have the GPU to themselves.
  rows: list[Row] = []
  names = measuring.expanded(_ONLY.value, _LENGTHS.value, _RANKS.value)
  libraries = ('torch', 'transformers', 'peft')
  if not all(map(importlib.util.find_spec, libraries)):
    print(f'No rows of peers: they need {", ".join(libraries)}.')
    names = [x for x in names if not is_peer(x)]
  with tempfile.TemporaryDirectory() as temporary:
    work = pathlib.Path(_FOLDER.value or temporary)
    out = pathlib.Path(_OUT.value or temporary)
    for folder in (work, out):
      folder.mkdir(parents=True, exist_ok=True)
    for name in names:
      with (out / f'{name}.log').open('w+') as log:
        rows.append(row(name, argv, work, log))
      with (out / 'llm_step.jsonl').open('a') as file:
        file.write(json.dumps(rows[-1]) + '\n')
      new = trimmed([shown(rows[-1], rows)])
      print(tabulate.tabulate(new, 'keys'), flush=True)
  table = trimmed([shown(x, rows) for x in rows])
  print('\n' + tabulate.tabulate(table, 'keys', tablefmt=_STYLE.value) + '\n')
  for key in ('device', 'versions'):
    print(f'{key}: {", ".join(sorted({x[key] for x in rows if key in x}))}')
  for x in rows:
    if 'copy_gbs' in x:
      print(f'copy: {x["copy_gbs"]:,.0f} GB/s')
  if profiled := [x for x in rows if 'kernels_ms' in x]:
    print('\nMilliseconds of a step by kind of kernel:\n')
    table = [{'row': x['row'], **x['kernels_ms']} for x in profiled]
    print(
        tabulate.tabulate(table, 'keys', tablefmt=_STYLE.value, floatfmt='.2f')
    )


if __name__ == '__main__':
  app.run(main)
