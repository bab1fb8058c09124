"""Kills a run at random moments until it is done, and compares it with a whole one.

  python tests/kill_runs.py --kills=50
  python tests/kill_runs.py --kills=10 --finetune

The run is Bernoulli-LoRA on digits with dropout, minibatches in two parts, bfloat16
weights and stochastic rounding at merges, a checkpoint every few steps. Signals in
turn: KILL, TERM, INT; moments at random, some of them while a checkpoint or a line of
metrics is being written. In the end the last checkpoint must
hold the bits of the unbroken run's, metrics.jsonl must be equal, and summary.json
but for times and memory. A process that was ended by TERM or INT must say so in one
line and exit 143 or 130.

With --finetune the run is the command of that name on a small decoder, and is also
killed while it exports: weights, adapter and recipe must be equal, too.
"""

import argparse
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

from ml_collections import config_dict

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_EVERY = 5  # Steps between checkpoints.
_TIMES = (
    'seconds',
    'compile_seconds',
    'peak_memory_bytes',
    'tokens_per_second',
)
_EXPORTED = ('adapter_config.json', 'tokenizer.json', 'end.json', 'recipe.json')
_READY = 'ready to train'


def make_config(num_steps: int) -> config_dict.ConfigDict:
  """Returns the config of the run."""
  from bernoulli_lora_jax.training import base_config

  config = base_config.get_config()
  config.task.hidden = (16,)
  config.task.pretrain_epochs = 1
  config.task.dropout = 0.2
  config.task.param_dtype = 'bfloat16'
  config.method.mode = 'adapter'
  config.method.rank = 2
  config.method.period = 3
  config.method.optimizer = 'adam'
  config.method.learning_rate = 0.02
  config.method.rounding = 'stochastic'
  config.training.num_micro_batches = 2
  config.training.num_steps = num_steps
  config.training.num_evals = num_steps // _EVERY
  config.training.checkpoint_every = _EVERY
  config.training.progress = False
  return config


def train(workdir: str, num_steps: int) -> None:
  """Trains the run; the body of the processes that are killed."""
  from bernoulli_lora_jax import cli
  from bernoulli_lora_jax.training import experiment

  with cli.guarded([]):
    program = experiment.make_program(make_config(num_steps))
    print(_READY, flush=True)
    experiment.train(make_config(num_steps), workdir, program)


def start(
    workdir: pathlib.Path, num_steps: int, model: pathlib.Path | None
) -> subprocess.Popen:
  """Starts a process that trains; with a model the command finetune."""
  if model is None:
    command = [sys.executable, __file__, '--train', str(workdir)]
    command.append(f'--steps={num_steps}')
  else:
    import finetune_runs

    flags = {'num_steps': num_steps, 'num_evals': num_steps // _EVERY}
    flags |= {'period': _EVERY, 'checkpoint_every': _EVERY}
    command = [sys.executable, '-u', '-m', 'bernoulli_lora_jax']
    command += finetune_runs.command(model, workdir, **flags)
  return subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)},
  )


def wait_for(process: subprocess.Popen, workdir: pathlib.Path, what: str):
  """Returns once a write has begun, or the process or a second has ended."""
  end = time.time() + (60 if what == 'export' else 1)
  log = workdir / 'metrics.jsonl'
  size = log.stat().st_size if log.exists() else 0
  while process.poll() is None and time.time() < end:
    if what == 'checkpoint' and list((workdir / 'checkpoints').glob('*tmp*')):
      return
    if what == 'export' and any(p.is_dir() for p in workdir.glob('.*')):
      return
    if what == 'line' and log.exists() and log.stat().st_size > size:
      return
    time.sleep(0.0005)


def kill(
    workdir: pathlib.Path,
    num_steps: int,
    model: pathlib.Path | None,
    number: signal.Signals,
    what: str,
    rng: random.Random,
) -> str:
  """Starts the run, kills it at some moment; returns '' or what is wrong."""
  process = start(workdir, num_steps, model)
  if rng.random() < 0.1:  # While it imports or compiles.
    time.sleep(3 * rng.random())
    number = signal.SIGKILL
  else:
    process.stdout.readline()
    if what == 'any':
      time.sleep(1.5 * rng.random())
    else:
      wait_for(process, workdir, what)
      time.sleep(0.02 * rng.random())
  process.send_signal(number)
  _, errors = process.communicate(timeout=300)
  lines = [line for line in errors.splitlines() if line.startswith('Ended by')]
  if process.returncode == 0:  # It was faster.
    return ''
  wanted = -number if number == signal.SIGKILL else 128 + number
  if number == signal.SIGTERM and process.returncode == -number:
    return ''  # Before it began: there is nothing to save.
  if process.returncode != wanted or 'Traceback' in errors:
    return f'{number.name}: exit status {process.returncode}: {errors}'
  if number != signal.SIGKILL and len(lines) != 1:
    return f'{number.name}: no line that says so: {errors}'
  return ''


def is_done(workdir: pathlib.Path, model: pathlib.Path | None) -> bool:
  """Returns whether all is there that a run writes."""
  last = 'summary.json' if model is None else 'end.json'
  return (workdir / last).exists()


def result(
    workdir: pathlib.Path, num_steps: int, model: pathlib.Path | None
) -> dict[str, object]:
  """Returns what a finished run has left, comparable to the bit."""
  import jax
  import numpy as np

  from bernoulli_lora_jax.training import experiment
  from bernoulli_lora_jax.training import loop
  from bernoulli_lora_jax.training import tuned

  if model is None:
    config = make_config(num_steps)
    program = experiment.make_program(config)
  else:
    config, program = tuned.read_config(workdir), tuned.load(workdir).program
  key = jax.random.key(config.seed)
  state = program.start(key)
  with loop.open_checkpoints(program, workdir, state) as saver:
    state, best, progress = loop.restore(saver, program, state)
  progress = jax.tree.map(np.asarray, progress._replace(seconds=0.0))
  tree = {'method': state, 'best': best, 'progress': progress}
  found = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    found[jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
  summary = json.loads((workdir / 'summary.json').read_text())
  found['summary'] = {k: v for k, v in summary.items() if k not in _TIMES}
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  # Speeds are of the machine.
  found['metrics'] = [
      {k: v for k, v in json.loads(line).items() if k != 'tokens_per_second'}
      for line in lines
  ]
  if model is not None:
    for path in workdir.rglob('*'):
      if path.suffix in ('.safetensors', '.npz') or path.name in _EXPORTED:
        found[str(path.relative_to(workdir))] = path.read_bytes()
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--steps', type=int, default=600)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--train', default='', help=argparse.SUPPRESS)
  parser.add_argument('--finetune', action='store_true')
  args = parser.parse_args()
  if args.train:
    train(args.train, args.steps)
    return
  rng = random.Random(args.seed)
  with tempfile.TemporaryDirectory() as folder:
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{folder}/compiled')
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    model, moments = None, ('any', 'checkpoint', 'line')
    if args.finetune:
      import finetune_runs

      model, moments = pathlib.Path(folder), (*moments, 'export')
      finetune_runs.write_model(model / 'model')
      finetune_runs.write_data(model / 'data.jsonl')
    of_run = args.steps, model
    whole = pathlib.Path(folder, 'whole')
    _, errors = start(whole, *of_run).communicate()
    if not is_done(whole, model):
      raise SystemExit(f'The unbroken run did not finish: {errors}')
    expected = result(whole, *of_run)
    kills, runs, wrong = {}, 0, []
    while sum(kills.values()) < args.kills:
      runs += 1
      cut = pathlib.Path(folder, f'cut{runs}')
      while not is_done(cut, model):
        done = sum(kills.values())
        # Each signal at each moment.
        turn = done if len(moments) % len(_SIGNALS) else done // len(_SIGNALS)
        what = moments[turn % len(moments)]
        is_trained = (cut / 'summary.json').exists() and what != 'export'
        if done >= args.kills or is_trained:  # To the end.
          _, errors = start(cut, *of_run).communicate()
          if not is_done(cut, model):
            raise SystemExit(f'A resumed run did not finish: {errors}')
          break
        number = _SIGNALS[done % len(_SIGNALS)]
        fault = kill(cut, *of_run, number, what, rng)
        kills[number.name, what] = kills.get((number.name, what), 0) + 1
        if fault:
          wrong.append(fault)
      found = result(cut, *of_run)
      wrong += [
          f'run {runs}: another {name}'
          for name in expected.keys() | found.keys()
          if expected.get(name) != found.get(name)
      ]
      stray = [p for p in cut.rglob('*') if re.search(r'tmp|^\.', p.name)]
      wrong += [f'run {runs}: left behind {path}' for path in stray]
  for (name, what), count in sorted(kills.items()):
    print(f'{name:8} {what:11} {count}')
  print(f'{sum(kills.values())} kills in {runs} runs, {len(wrong)} faults')
  for fault in wrong:
    print(fault)
  raise SystemExit(bool(wrong))


if __name__ == '__main__':
  main()
