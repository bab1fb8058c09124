"""`blora finetune`: from a checkpoint and a file to merged weights or an adapter.

The command is a run of `tasks.language_model` like any other: its directory has
config.json, metrics.jsonl, checkpoints/ and recipe/, is resumed by the same command and
read by `blora report`. Here are its flags, what it prints, and what it writes at the end
(`tuned`).
"""

import math
import os
import pathlib
import re
import sys
from typing import Any, Literal

import jax
from ml_collections import config_dict
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import files
from bernoulli_lora_jax.models import generate
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import language_model
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import figures
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import tuned

# Of Adam, by method; see "Code to English" in docs/evidence.md.
LEARNING_RATES = {
    'full': 1e-4,
    'lora': 1e-3,
    'cola': 1e-3,
    'rac_left': 1e-3,
    'rac_right': 1e-3,
    'bernoulli': 1e-3,
}
# {what --export calls it: (its folder, style of `peft_format`, None for weights)}.
EXPORTS = {
    'merged': ('merged', None),
    'adapter': ('adapter', 'peft'),
    'adapter:peft': ('adapter', 'peft'),
    'adapter:vllm': ('adapter_vllm', 'vllm'),
}
_SECONDS = 2.0  # Of a dispatch, about: between two looks at signals and losses.
_RATES = {'cpu': 1e10, 'gpu': 3e14, 'tpu': 1e14}  # FLOP/s, of a CPU's core.
_SAMPLE = 48  # Tokens of a sample.
_FITS = 0.92  # Part of a device's memory that a step may take.


def finetune(
    model: str,
    data: str,
    output: str,
    method: Literal[
        'bernoulli', 'rac_left', 'rac_right', 'lora', 'cola', 'full'
    ] = 'bernoulli',
    rank: int = 16,
    period: int = 100,
    prob: float = 0.5,
    alpha: float | None = None,
    sketch: str = 'gaussian',
    num_steps: int = 0,
    num_epochs: float = 1.0,
    batch_size: int = 8,
    micro_batches: int = 1,
    max_length: int = 1024,
    learning_rate: float | None = None,
    schedule: Literal['constant', 'cosine', 'linear'] = 'cosine',
    warmup: int = 0,
    optimizer: Literal['adam', 'adamw', 'sgd'] = 'adam',
    weight_decay: float = 0.01,
    clip_norm: float | None = None,
    seed: int = 0,
    eval_fraction: float = 0.02,
    eval_data: str = '',
    watch_data: str = '',
    num_evals: int = 10,
    early_stopping: int = 0,
    targets: str = '',
    train_others: str = '',
    train_tokens: str = '',
    kind: Literal['auto', 'instruction', 'language_model'] = 'auto',
    tokenizer: str = '',
    template: bool = False,
    turns: Literal['all', 'last', 'each'] = 'all',
    over_limit: Literal['error', 'truncate', 'drop'] = 'error',
    skip_bad: bool = False,
    separator: str = '',
    mode: Literal['auto', 'speed', 'memory'] = 'auto',
    dtype: str = '',
    compute_dtype: str = '',
    rounding: Literal['auto', 'nearest', 'stochastic', 'compensated'] = 'auto',
    parallel: Literal['none', 'jit'] = 'none',
    checkpoint_every: int = 0,
    export: str = 'auto',
    adapter_rank: int = 0,
    prompt: str = '',
    progress: bool = True,
) -> None:
  """Fine-tunes a decoder of the Hugging Face hub on text of yours.

  Writes OUTPUT/merged (transformers and vLLM serve it), OUTPUT/adapter (for peft),
  metrics.jsonl, loss.png, checkpoints and a recipe. The same command again resumes, or
  writes what is still missing.

  Args:
    model: a folder, owner/name on the hub, or the OUTPUT of an earlier run.
    data: JSON lines of chats or of prompt and completion, text, or a dataset.
    output: directory of the run.
    method: which chain, LoRA, or full fine-tuning; left and right are frozen sides.
    rank: of the factors.
    period: steps of a link, after which it is merged.
    prob: P(left), of bernoulli.
    alpha: the scale is alpha / rank; None for 1.
    sketch: law of the frozen factors.
    num_steps: of the run; 0 for num_epochs.
    num_epochs: passes through the data.
    batch_size: rows of max_length tokens a step, of all devices.
    micro_batches: parts of a batch, one after another: less memory.
    max_length: tokens of a row, into which documents are packed.
    learning_rate: the peak; None for the method's own, see docs/evidence.md.
    schedule: of the learning rate after its warm-up; cosine and linear end at 0.
    warmup: steps of linear warm-up.
    optimizer: of what trains.
    weight_decay: of adamw.
    clip_norm: most of the gradient's global norm; None for no clipping.
    seed: of frames, coins and the order of the data.
    eval_fraction: part of the documents that is held out.
    eval_data: files in place of it.
    watch_data: further text whose loss is shown: what the model should not forget.
    num_evals: evaluations, evenly spaced.
    early_stopping: evaluations without a lower loss after which the run stops, its best
      weights kept; 0 never.
    targets: regular expression of linear maps, as 'q_proj|v_proj'; '' for all of the
      layers'.
    train_others: regular expression of further weights, trained at full size, as 'norm'.
    train_tokens: regular expression of tokens whose rows of embedding and head train,
      as new ones.
    kind: of the data; auto looks at the first document.
    tokenizer: a folder, or bytes; '' for that of the model.
    template: whether prompt and completion are turns of a chat.
    turns: of the assistant that are trained; each makes a document of each.
    over_limit: what becomes of instructions longer than max_length.
    skip_bad: whether bad lines are left out in place of an error.
    separator: of documents in files of text.
    mode: speed (layers unrolled, nothing recomputed), memory (scanned, recomputed),
      or the first that fits.
    dtype: of the weights; '' for that of the files, float32 for full.
    compute_dtype: '' for that of the files.
    rounding: of merges; auto is stochastic for bfloat16 and float16 weights.
    parallel: jit splits batches over all devices.
    checkpoint_every: steps; 0 for each evaluation.
    export: of merged, adapter, adapter:vllm, joined by commas; none; auto for merged and
      adapter.
    adapter_rank: most of the adapter; 0 for the exact sum of all links.
    prompt: of the sample; '' for the beginning of a held-out document.
    progress: whether to show a progress bar.
  """
  arguments_given = dict(locals())
  chosen = _exports(export, method, bool(train_others or train_tokens))
  directory = pathlib.Path(output)
  found = hf.open_folder(resolve(model))
  config = make_config(arguments_given, found)
  config, program = _fitting(config, mode, directory)
  _check_exports(directory, chosen, program.settings.num_steps)
  _show_start(config, program, directory)
  experiment.check_workdir(config, directory)
  summary = loop.train(*experiment.run_of(config, directory, program))
  task = program.task
  del program
  run = tuned.load(directory)
  _write(run, directory, chosen, adapter_rank, dtype)
  _draw(directory)
  _show_end(run, directory, summary, task, tokenizer, prompt)


def resolve(model: str) -> str:
  """Returns the folder of a model: of a run its merged weights.

  Raises:
    ValueError: a run that has none.
  """
  folder = pathlib.Path(model).expanduser()
  if (folder / 'merged' / 'config.json').is_file():
    return str((folder / 'merged').absolute())
  if (folder / 'metrics.jsonl').is_file():
    raise ValueError(
        f'Expected merged weights in {folder}, got a run without them: blora merge'
        f' {folder} {folder / "merged"}.'
    )
  return str(folder.absolute()) if folder.is_dir() else model


def make_config(
    given: dict[str, Any], found: hf.Checkpoint
) -> config_dict.ConfigDict:
  """Returns the config of a run.

  Args:
    given: arguments of `finetune`.
    found: the model.

  Raises:
    ValueError: an argument outside its range, by name.
  """
  is_full = given['method'] == 'full'
  low = {'BF16': 'bfloat16', 'F16': 'float16'}
  stored = [low[d] for d in found.dtypes.values() if d in low]
  # A step that is smaller than the spacing of bfloat16 would be lost.
  dtype = given['dtype'] or ('float32' if is_full and stored else '')
  compute = given['compute_dtype'] or (stored[0] if is_full and stored else '')
  rounding = given['rounding']
  if rounding == 'auto':
    is_low = dtype in low.values() or not dtype and bool(stored)
    rounding = 'stochastic' if is_low else 'nearest'
  config = base_config.get_config()
  config.seed = given['seed']
  config.task.name = tuned.TASK
  config.task.batch_size = given['batch_size']
  config.task.kwargs = config_dict.ConfigDict(
      {
          'model': str(found.folder),
          'data': _absolute(given['data']),
          'eval_data': _absolute(given['eval_data']),
          'watch_data': _absolute(given['watch_data']),
          'dtype': dtype,
          'compute_dtype': compute,
          'scan_layers': given['mode'] != 'speed',
          'remat': 'none' if given['mode'] == 'speed' else 'full',
          **{
              name: given[name]
              for name in (
                  *('kind', 'tokenizer', 'max_length', 'eval_fraction'),
                  *('template', 'turns', 'over_limit', 'skip_bad', 'separator'),
              )
          },
      }
  )
  c = config.method
  c.mode = 'gradient' if is_full else 'adapter'
  c.name, c.rank, c.prob = given['method'], given['rank'], given['prob']
  c.period = given['period'] if given['method'] != 'lora' and not is_full else 1
  c.sketch, c.optimizer = given['sketch'], given['optimizer']
  c.weight_decay, c.rounding = given['weight_decay'], rounding
  c.alpha, c.clip_norm = given['alpha'], given['clip_norm']
  c.select, c.train_others = given['targets'], is_full
  rate = given['learning_rate']
  c.learning_rate = LEARNING_RATES[c.name] if rate is None else rate
  c.schedule, c.warmup_steps = given['schedule'], given['warmup']
  if is_full and (given['targets'] or given['train_others']):
    raise ValueError(
        "Expected targets='' and train_others='' with method=full, which trains all"
        f' weights, got targets={given["targets"]!r},'
        f' train_others={given["train_others"]!r}.'
    )
  c.others, c.other_rows = _others(given, found)
  t = config.training
  t.num_steps, t.num_passes = given['num_steps'], float(given['num_epochs'])
  t.num_evals, t.patience = given['num_evals'], given['early_stopping']
  t.num_micro_batches = given['micro_batches']
  t.checkpoint_every = given['checkpoint_every']
  t.recipe = not is_full and not c.others
  t.parallel, t.progress = given['parallel'], given['progress']
  t.max_to_keep = 1
  return config


def _absolute(data: str) -> str:
  """Returns a file's name from wherever it is called; others as they are."""
  path = pathlib.Path(data).expanduser()
  is_here = data and (path.exists() or '*' in data)
  return os.path.abspath(path) if is_here else data


def _others(
    given: dict[str, Any], found: hf.Checkpoint
) -> tuple[str, tuple[int, ...]]:
  """Returns what trains at full size: a pattern, and rows where tokens are named."""
  if not given['train_tokens']:
    return given['train_others'], ()
  if given['train_others']:
    raise ValueError(
        'Expected train_others or train_tokens, got both:'
        f' {given["train_others"]!r} and {given["train_tokens"]!r}.'
    )
  words = tokenizer_lib.load(given['tokenizer'] or str(found.folder))
  rows = sorted(
      number
      for token, number in words.backend.get_vocab(True).items()
      if re.fullmatch(given['train_tokens'], token)
  )
  checks.that(
      bool(rows),
      'tokens of the vocabulary that train_tokens matches as a whole',
      train_tokens=given['train_tokens'],
  )
  return r'^embed_tokens/embedding$|^lm_head/kernel$', tuple(rows)


def _exports(export: str, method: str, has_others: bool) -> list[str]:
  """Returns the names of what is written at the end."""
  if export == 'auto':
    no_adapter = method == 'full' or has_others
    return ['merged'] if no_adapter else ['merged', 'adapter']
  names = [name for name in export.split(',') if name and name != 'none']
  for name in names:
    checks.one_of([*EXPORTS, 'none', 'auto'], export=name)
    if name.startswith('adapter') and (method == 'full' or has_others):
      raise ValueError(
          'Expected export=merged where whole weights train (method=full,'
          f' train_others, train_tokens), got export={name!r}: no adapter holds'
          ' them.'
      )
  return names


def _check_exports(
    directory: pathlib.Path, chosen: list[str], num_steps: int
) -> None:
  """Raises where what a longer run would write is there of a shorter one."""
  for name in chosen:
    folder = directory / EXPORTS[name][0]
    if not folder.exists():
      continue
    step = tuned.step_of(folder)
    summary = directory / 'summary.json'
    is_of_run = summary.is_file() and files.read_json(summary).get('step')
    if step is None or is_of_run != num_steps:
      raise ValueError(
          f'Expected no {folder}, which is of'
          f' {"another run" if step is None else f"step {step}"} where this run has'
          f' {num_steps} steps: move it, or choose another output.'
      )


def _fitting(
    config: config_dict.ConfigDict, mode: str, directory: pathlib.Path
) -> tuple[config_dict.ConfigDict, programs.Program]:
  """Returns the config and its compiled program, in the first mode that fits.

  A run that was begun goes on as it was.
  """
  modes = {'speed': (False, 'none'), 'memory': (True, 'full')}
  tried = list(modes) if mode == 'auto' else [mode]
  if mode == 'auto' and jax.devices()[0].platform == 'cpu':
    tried = ['memory']  # It compiles in a fraction of the time.
  if mode == 'auto' and (directory / 'config.json').is_file():
    kwargs = experiment.read_config(directory).task.kwargs
    is_scanned = kwargs.get('scan_layers', True)
    tried = ['memory' if is_scanned else 'speed']
  limit = _memory()
  for i, name in enumerate(tried):
    config.task.kwargs.scan_layers, config.task.kwargs.remat = modes[name]
    config, program = _compiled(config)
    needed = _bytes_of(program)['step']
    if limit is None or needed <= _FITS * limit:
      break
    print(
        f'{name} mode would take {needed / 2**30:.1f} of {limit / 2**30:.1f} GiB'
        + ('; trying memory mode.' if i + 1 < len(tried) else '.'),
        file=sys.stderr,
    )
  return config, program  # pyrefly: ignore


def _compiled(
    config: config_dict.ConfigDict,
) -> tuple[config_dict.ConfigDict, programs.Program]:
  """Returns a config with its steps counted, and its program, compiled."""
  task = arguments.make_task(config)
  t = config.training
  steps = t.num_passes * task.num_samples / task.batch_size
  t.num_steps = t.num_steps or max(1, round(steps))
  links = config.method.period if t.recipe else 1
  t.eval_every = _aligned(max(1, t.num_steps // t.num_evals), links)
  t.checkpoint_every = t.checkpoint_every or t.eval_every
  t.steps_per_dispatch = _dispatch(config, _steps_of_seconds(task))
  program = experiment.make_program(config, task)
  if program.driver.kind == 'none':
    loop.compile_ahead(program)
  return config, program


def _aligned(every: int, period: int) -> int:
  """Returns about as many steps, a multiple of the period or a part of it."""
  if every >= period:
    return round(every / period) * period
  parts = [n for n in range(1, period + 1) if period % n == 0]
  return min(parts, key=lambda n: abs(math.log(n / every)))


def _dispatch(config: config_dict.ConfigDict, most: int) -> int:
  """Returns the steps of a dispatch: of one length, where a long one divides all."""
  t = config.training
  gaps = [t.eval_every, t.checkpoint_every, t.num_steps]
  gaps += [config.method.period] if t.recipe else []
  whole = math.gcd(*gaps)
  parts = [n for n in range(1, most + 1) if whole % n == 0]
  return parts[-1] if 2 * parts[-1] >= min(most, *gaps) else most


def _steps_of_seconds(task: task_lib.Task) -> int:
  """Returns the steps that take about two seconds."""
  numbers = sum(x.size for x in jax.tree.leaves(task_lib.shapes(task)))
  platform = jax.devices()[0].platform
  rate = _RATES.get(platform, _RATES['gpu'])
  rate *= (os.cpu_count() or 1) if platform == 'cpu' else 1
  seconds = 6 * numbers * task.num_tokens / rate
  return int(np.clip(round(_SECONDS / seconds), 1, 50))


def _memory() -> int | None:
  """Returns the bytes that a device lets a process use; None where it is unsaid."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get('bytes_limit')


def _bytes_of(program: programs.Program) -> dict[str, int]:
  """Returns the bytes of a step, and of what it keeps."""
  task = program.task
  start = lambda key, weights: programs.start(
      task, program.method, key, weights
  )
  shapes = task_lib.shapes(task)
  state = jax.eval_shape(start, jax.random.key(0), shapes)
  size = lambda tree: sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  of = {'weights': size(shapes), 'optimiser and factors': 0, 'step': 0}
  of['optimiser and factors'] = size(state) - of['weights']
  for compiled in program.compiled.values():
    stats = compiled.memory_analysis()
    if stats is not None:
      of['step'] = (
          stats.argument_size_in_bytes
          + stats.output_size_in_bytes
          + stats.temp_size_in_bytes
          - stats.alias_size_in_bytes
      )
  return of


def _show_start(
    config: config_dict.ConfigDict,
    program: programs.Program,
    directory: pathlib.Path,
) -> None:
  """Prints what a user looks at before training."""
  task, settings = program.task, program.settings
  print(task.preview)
  print()
  rows = _by_kind(experiment.selection(config, task))
  print(reporting.table(rows))
  print()
  trained = experiment.trained_parameters(config, task)
  numbers = sum(x.size for x in jax.tree.leaves(task_lib.shapes(task)))
  print(f'trained a step: {trained:,.0f} of {numbers:,} numbers')
  of = _bytes_of(program)
  memory = ', '.join(f'{k} {v / 2**30:.2f}' for k, v in of.items() if v)
  limit = _memory()
  print(
      f'memory, GiB: {memory}' + (f' of {limit / 2**30:.1f}' if limit else '')
  )
  epochs = settings.num_steps * task.batch_size / task.num_samples
  print(
      f'{settings.num_steps:,} steps of {task.num_tokens:,} tokens'
      f' ({epochs:.2f} epochs of {task.num_samples:,} rows) on'
      f' {jax.devices()[0].device_kind}, into {directory}'
  )


def _by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns a table of matrices with layers of a kind in one row."""
  made: dict[Any, dict[str, Any]] = {}
  for row in rows:
    shape = row['shape'].rpartition(' x ')
    sides = f'{shape[0].split(" x ")[-1]} x {shape[2]}'
    stacked = row['shape'].split(' x ')
    layers = int(stacked[0]) if len(stacked) > 2 else 1
    name = tuned.kind(row['matrix']) or row['matrix']
    rest = {k: row[k] for k in ('rank', 'P(left)', 'scale') if k in row}
    key = name, sides, *rest.values()
    own = made.setdefault(
        key, {'matrix': name, 'layers': 0, 'shape': sides, **rest, 'trained': 0}
    )
    own['layers'] += layers
    own['trained'] += row['trained']
  return list(made.values())


def _write(
    run: tuned.Tuned,
    directory: pathlib.Path,
    chosen: list[str],
    adapter_rank: int,
    dtype: str,
) -> None:
  """Writes what is asked for and is not there yet, and prints what it lost."""
  del dtype
  thin, params = None, None
  for name in chosen:
    folder, style = EXPORTS[name]
    path = directory / folder
    if path.exists():
      continue
    if style is None:
      params = tuned.save_merged(run, path)
    else:
      thin = tuned.save_adapter(run, path, style=style, rank=adapter_rank)
    print(f'wrote {path}')
  if thin is not None:
    params = run.program.params(run.state) if params is None else params
    print('\nWhat merges and the adapter lost, against base + sum of links:\n')
    print(reporting.table(tuned.what_merges_lost(run, thin, params)))
    print()


def _draw(directory: pathlib.Path) -> None:
  """Draws the losses of a run into loss.png."""
  (run,) = reporting.load_runs([directory])
  figures.write_losses(run, directory / 'loss.png')


def _show_end(
    run: tuned.Tuned,
    directory: pathlib.Path,
    summary: dict[str, Any],
    task: task_lib.Task,
    tokenizer: str,
    prompt: str,
) -> None:
  """Prints the results, and what the model says before and after."""
  print(
      reporting.table([{'result': k, 'value': v} for k, v in summary.items()])
  )
  words = language_model.load_tokenizer(tokenizer, run.checkpoint)
  ids = words.encode(prompt) if prompt else _beginning(task)
  print(f'\nprompt: {words.decode(ids)!r}')
  ends = [] if words.eos_id is None else [words.eos_id]
  before = run.program.task.load()  # pyrefly: ignore
  say = lambda params: words.decode(
      generate.generate(
          run.checkpoint.config,
          params,
          [ids],
          max_new_tokens=_SAMPLE,
          end_tokens=ends,
      )[0]
  )
  print(f'before: {say(before)!r}')
  del before
  print(f'after:  {say(run.program.params(run.state))!r}')
  print(f'\nblora generate {directory} --prompt=... asks it more.')


def _beginning(task: task_lib.Task) -> list[int]:
  """Returns the tokens before the first that is trained of a held-out document."""
  rows = task.data.get('validation')
  if rows is None:
    assert task.stream is not None
    rows = next(task.stream(0))
  tokens, weights, segments = (
      np.asarray(rows[name][0]) for name in ('tokens', 'weights', 'segments')
  )
  tokens = tokens[segments == segments[0]]
  first = int(np.argmax(weights[: len(tokens)] > 0))
  # A text is trained from its second token on.
  return tokens[: first if first > 1 else min(16, len(tokens) - 1)].tolist()
