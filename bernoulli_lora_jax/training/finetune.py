"""`blora finetune`: from a checkpoint and a file to merged weights or an adapter.

The command is a run of `tasks.language_model` like any other: its directory has
config.json, metrics.jsonl, checkpoints/ and recipe/, is resumed by the same command and
read by `blora report`. Here are its flags, what it prints, and what it writes at the end
(`tuned`).
"""

from collections.abc import Iterator
import contextlib
import math
import os
import pathlib
import re
import shutil
import sys
from typing import Any, Literal

import jax
from ml_collections import config_dict
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import files
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.models import generate
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import language_model
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import directory as directory_lib
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import fields
from bernoulli_lora_jax.training import figures
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import served
from bernoulli_lora_jax.training import tuned

# Of Adam, by method: guesses, which no study has chosen yet. The decoder of 1.7 million
# numbers in the README wants 12 to 25 times as much.
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
# {flag: its field}.
_FIELDS = {
    'seed': 'seed',
    'batch_size': 'task.batch_size',
    'method': 'method.name',
    'rank': 'method.rank',
    'period': 'method.period',
    'prob': 'method.prob',
    'alpha': 'method.alpha',
    'sketch': 'method.sketch',
    'optimizer': 'method.optimizer',
    'weight_decay': 'method.weight_decay',
    'clip_norm': 'method.clip_norm',
    'targets': 'method.select',
    'schedule': 'method.schedule',
    'warmup': 'method.warmup_steps',
    'num_steps': 'training.num_steps',
    'num_evals': 'training.num_evals',
    'early_stopping': 'training.patience',
    'micro_batches': 'training.num_micro_batches',
    'checkpoint_every': 'training.checkpoint_every',
    'parallel': 'training.parallel',
    'progress': 'training.progress',
}
# Of which the field has more than the flag.
_DERIVED = {
    'learning_rate': 'method.learning_rate',
    'rounding': 'method.rounding',
    'train_others': 'method.others',
    'train_tokens': 'method.other_rows',
    'num_epochs': 'training.num_passes',
    'output': 'workdir',
}
_OF_TASK = (
    *('kind', 'max_length', 'eval_fraction', 'template'),
    *('turns', 'over_limit', 'skip_bad', 'separator'),
)
# {mode: (scan_layers, remat)}.
_MODES = {'speed': (False, 'none'), 'memory': (True, 'full')}
_END = 'end.json'  # What was printed at the end, and at which step.
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
    dtype: Literal['', 'float32', 'bfloat16', 'float16'] = '',
    compute_dtype: Literal['', 'float32', 'bfloat16', 'float16'] = '',
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
    learning_rate: the peak; None for 1e-3, with full 1e-4: a guess, try others.
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
      or the first that fits; memory on a CPU.
    dtype: of the weights; '' for that of the files, float32 for full.
    compute_dtype: '' for that of the weights, with full for that of the files.
    rounding: of merges; auto is stochastic for bfloat16 and float16 weights.
    parallel: jit splits batches over all devices.
    checkpoint_every: steps; 0 for about two minutes.
    export: of merged, adapter, adapter:vllm, joined by commas; none; auto for merged and
      adapter.
    adapter_rank: most of the adapter; 0 for the exact sum of all links.
    prompt: of the sample; '' for the beginning of a held-out document.
    progress: whether to show a progress bar.
  """
  given = dict(locals())
  directory = pathlib.Path(output)
  with _flags_named():
    chosen = _exports(export, method, bool(train_others or train_tokens))
    checks.integers(0, adapter_rank=adapter_rank)
    directory_lib.check(output)
    _check_output(directory)
    _check_rank(directory, chosen, adapter_rank)
    found = hf.open_folder(tuned.resolve(model))
    config = make_config(given, found)
    modes = _modes(mode, directory)
    _check_method(config, modes, chosen)
    config, program = _fitting(config, modes, directory, chosen)
  _show_start(config, program, directory)
  try:
    summary = loop.train(*experiment.run_of(config, directory, program))
  except loop.DivergedError as e:
    raise loop.DivergedError(_with_checkpoint(str(e), directory)) from e
  task = program.task
  del program  # And what it has compiled.
  with directory_lib.hold(directory):
    _draw(directory)
    end = _finish(directory, chosen, adapter_rank, task, tokenizer, prompt)
  _show_end(directory, chosen, summary, end)


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
  checks.that(bool(given['data']), 'data to be named', data="''")
  checks.that(
      given['num_steps'] > 0 or given['num_epochs'] > 0,
      'num_steps > 0 or num_epochs > 0',
      num_steps=given['num_steps'],
      num_epochs=given['num_epochs'],
  )
  checks.that(
      not given['early_stopping']
      or bool(given['eval_data'])
      or given['eval_fraction'] > 0,
      'something held out (eval_fraction, eval_data) with early_stopping',
      early_stopping=given['early_stopping'],
  )
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
  for flag in ('targets', 'train_others', 'train_tokens'):
    if is_full and given[flag]:
      raise ValueError(
          f"Expected {flag}='' with method=full, which trains all weights, got"
          f' {flag}={given[flag]!r}.'
      )
  config = base_config.get_config()
  rate = given['learning_rate']
  others, other_rows = _others(given, found)
  values = {field: given[flag] for flag, field in _FIELDS.items()}
  values |= {
      'task.name': tuned.TASK,
      'method.mode': 'gradient' if is_full else 'adapter',
      'method.learning_rate': LEARNING_RATES[given['method']]
      if rate is None
      else rate,
      'method.rounding': rounding,
      'method.train_others': is_full,
      'method.others': others,
      'method.other_rows': other_rows,
      'training.num_passes': float(given['num_epochs']),
      # Of LoRA the state holds all that a recipe would.
      'training.recipe': given['method'] not in ('full', 'lora') and not others,
      'training.max_to_keep': 1,
  }
  if is_full or given['method'] == 'lora':
    values['method.period'] = 1
  config.update_from_flattened_dict(values)
  is_fast = given['mode'] == 'speed'
  config.task.kwargs = config_dict.ConfigDict(
      {
          'model': str(found.folder),
          'data': _absolute(given['data']),
          'eval_data': _absolute(given['eval_data']),
          'watch_data': _absolute(given['watch_data']),
          'dtype': dtype,
          'compute_dtype': compute,
          'scan_layers': not is_fast,
          'remat': 'none' if is_fast else 'full',
          **{name: given[name] for name in _OF_TASK},
          'tokenizer': _absolute(given['tokenizer']),
      }
  )
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
  words = language_model.load_tokenizer(given['tokenizer'], found)
  if not isinstance(words, tokenizer_lib.Tokenizer):
    raise ValueError(
        'Expected a tokenizer with a vocabulary for train_tokens, got bytes.'
    )
  _pattern('train_tokens', given['train_tokens'])
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


def _pattern(name: str, pattern: str) -> re.Pattern[str]:
  """Returns a regular expression; raises for what is none."""
  try:
    return re.compile(pattern)
  except re.error as e:
    raise ValueError(
        f'Expected {name} to be a regular expression, got {name}={pattern!r}: {e}.'
    ) from e


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


@contextlib.contextmanager
def _flags_named() -> Iterator[None]:
  """Names flags in errors where a config has fields."""
  try:
    yield
  except ValueError as e:
    text = str(e)
    for flag, field in {**_FIELDS, **_DERIVED}.items():
      *section, name = field.split('.')
      text = re.sub(rf'(?<![\w.])({re.escape(field)}|{name}(?==))', flag, text)
    raise ValueError(text) from e


def _check_output(directory: pathlib.Path) -> None:
  """Raises for a directory of other things."""
  path = directory / 'config.json'
  record = files.read_json(path) if path.is_file() else {}
  task = record.get('task') if isinstance(record, dict) else None
  if not isinstance(task, dict) or task.get('name') != tuned.TASK:
    others = {p.name for p in directory.glob('*')} - {'.lock'}
    if others:
      raise ValueError(
          f'Expected an output that is new, empty or of an earlier run, got {directory}'
          f' with {", ".join(sorted(others)[:3])}.'
      )


def _check_method(
    config: config_dict.ConfigDict, modes: list[str], chosen: list[str]
) -> None:
  """Raises for what is wrong whatever the data are, before they are read."""
  fields.check(config)
  config = config.copy_and_resolve_references()
  kwargs = config.task.kwargs
  for mode in modes:  # Of which each has paths of its own.
    kwargs.scan_layers, kwargs.remat = _MODES[mode]
    run = {name: kwargs[name] for name in language_model.RUN_FIELDS}
    bare = language_model.without_data(
        model=kwargs.model, batch_size=config.task.batch_size, **run
    )
    _check_patterns(config, bare.task, mode)
  if 'adapter:vllm' in chosen:
    _check_vllm(config.method.select, bare.task)
  # Of epochs it is not known yet.
  config.training.num_steps = config.training.num_steps or 1 << 30
  experiment.make_program(config, bare.task)
  language_model.load_tokenizer(kwargs.tokenizer, bare.checkpoint)


def _check_patterns(
    config: config_dict.ConfigDict, task: task_lib.Task, mode: str
) -> None:
  """Raises for patterns that match no path of a mode's weights."""
  paths = list(matrices_lib.named_leaves(task_lib.shapes(task)))
  linear = [path for path in paths if path.endswith('/kernel')]
  for flag, pattern, known in (
      ('targets', config.method.select, linear),
      ('train_others', config.method.others, paths),
  ):
    if pattern and not any(map(_pattern(flag, pattern).search, known)):
      kinds = sorted({tuned.kind(path) for path in known})
      raise ValueError(
          f'Expected {flag} to match one of {", ".join(kinds)}, such as'
          f' {max(known, key=len)} with mode={mode}, got {flag}={pattern!r}.'
      )


def _check_vllm(targets: str, task: task_lib.Task) -> None:
  """Raises for targets that vLLM has no adapter of."""
  assert task.matrices is not None
  found = matrices_lib.find(task_lib.shapes(task), task.matrices(targets))
  for kind in {tuned.kind(m.path) for m in found}:
    if not kind.endswith('_proj'):
      raise ValueError(
          'Expected targets of layers alone with export=adapter:vllm, got'
          f' targets={targets!r}, which matches {kind}: export merged.'
      )


def _check_exports(
    directory: pathlib.Path, chosen: list[str], settings: programs.Settings
) -> None:
  """Raises where what the run would write is there, and of another step."""
  over = loop.finished(directory, settings.num_steps) or {}
  if 'diverged' in over:  # Which is told, and not what was saved before.
    return
  last = over.get('best_step' if settings.patience else 'step')
  for name in chosen:
    folder = directory / EXPORTS[name][0]
    step = tuned.step_of(folder)
    if folder.exists() and (step is None or step != last):
      raise ValueError(
          f'Expected no {folder}, which is of'
          f' {"another run" if step is None else f"step {step}"} where this run has'
          f' {settings.num_steps} steps: move it, or choose another output.'
      )


def _check_rank(
    directory: pathlib.Path, chosen: list[str], adapter_rank: int
) -> None:
  """Raises where an adapter is there that was asked for another rank."""
  for name in chosen:
    folder = directory / EXPORTS[name][0]
    there = tuned.rank_of(folder)
    if there is not None and there != adapter_rank:
      raise ValueError(
          f'Expected adapter_rank={there}, as of {folder}, got'
          f' adapter_rank={adapter_rank}: move it, or choose another output.'
      )


def _with_checkpoint(text: str, directory: pathlib.Path) -> str:
  """Returns what has diverged, and where the last good checkpoint is."""
  step = tuned.last_checkpoint(directory)
  if step is None:
    return f'{text} None was saved yet in {directory}.'
  return (
      f'{text} It is that of step {step}, which blora merge {directory}'
      ' writes; another try needs another output.'
  )


def _begun(directory: pathlib.Path) -> config_dict.ConfigDict | None:
  """Returns the config of the run in a directory, None where none was begun."""
  if not (directory / 'config.json').is_file():
    return None
  return experiment.read_config(directory)


def _modes(mode: str, directory: pathlib.Path) -> list[str]:
  """Returns the modes that are tried; a run that was begun goes on as it was."""
  if mode != 'auto':
    return [mode]
  if begun := _begun(directory):
    is_scanned = begun.task.kwargs.get('scan_layers', True)
    return ['memory' if is_scanned else 'speed']
  # On a CPU that which compiles in a fraction of the time.
  return ['memory'] if _is_cpu() else list(_MODES)


def _fitting(
    config: config_dict.ConfigDict,
    modes: list[str],
    directory: pathlib.Path,
    chosen: list[str],
) -> tuple[config_dict.ConfigDict, programs.Program]:
  """Returns the config and its compiled program, in the first mode that fits."""
  begun, limit, task = _begun(directory), _memory(), None
  kwargs = config.task.kwargs
  for i, name in enumerate(modes):
    kwargs.scan_layers, kwargs.remat = _MODES[name]
    if task is None:
      task = arguments.make_task(config)
    else:  # Data are read once.
      run = {name: kwargs[name] for name in language_model.RUN_FIELDS}
      task = language_model.with_run(task, kwargs.model, **run)
    program = _made(config, task, begun)
    # What takes no time before what takes long.
    experiment.check_workdir(config, directory)
    _check_exports(directory, chosen, program.settings)
    if loop.finished(directory, program.settings.num_steps) is not None:
      break
    loop.compile_ahead(program)
    needed = _bytes_of(program)['step']
    if limit is None or needed <= _FITS * limit:
      break
    print(
        f'{name} mode would take {needed / 2**30:.1f} of {limit / 2**30:.1f} GiB'
        + ('; trying memory mode.' if i + 1 < len(modes) else '.'),
        file=sys.stderr,
    )
  return config, program  # pyrefly: ignore


def _made(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    begun: config_dict.ConfigDict | None,
) -> programs.Program:
  """Returns the program of a config, whose steps are counted in it."""
  t = config.training
  steps = t.num_passes * task.num_samples / task.batch_size
  t.num_steps = t.num_steps or max(1, round(steps))
  links = config.method.period if t.recipe else 1
  t.eval_every = _aligned(max(1, t.num_steps // t.num_evals), links)
  if begun is not None:  # A longer one goes on as it was, too.
    t.eval_every = begun.training.eval_every
    t.checkpoint_every = t.checkpoint_every or begun.training.checkpoint_every
  # A checkpoint takes seconds: every two minutes.
  most = _steps_of_seconds(task, config.task.kwargs.max_length)
  apart = max(1, round(60 * most / t.eval_every))
  t.checkpoint_every = t.checkpoint_every or apart * t.eval_every
  t.steps_per_dispatch = _dispatch(config, most)
  return experiment.make_program(config, task)


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


def _steps_of_seconds(task: task_lib.Task, length: int) -> int:
  """Returns the steps that take about two seconds, on rows of a length."""
  numbers = sum(x.size for x in jax.tree.leaves(task_lib.shapes(task)))
  rate = _RATES.get(jax.devices()[0].platform, _RATES['gpu'])
  rate *= (os.cpu_count() or 1) if _is_cpu() else 1
  seconds = 6 * numbers * task.batch_size * length / rate
  return int(np.clip(round(_SECONDS / seconds), 1, 50))


def _is_cpu() -> bool:
  return jax.devices()[0].platform == 'cpu'


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
      f'{settings.num_steps:,} steps of {task.num_tokens:,} tokens in'
      f' {task.batch_size} rows of {config.task.kwargs.max_length:,}'
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


def _finish(
    directory: pathlib.Path,
    chosen: list[str],
    adapter_rank: int,
    task: task_lib.Task,
    tokenizer: str,
    prompt: str,
) -> dict[str, Any]:
  """Writes what is asked for and is not there yet.

  Returns:
    {'step', 'exports', 'prompt', 'before', 'after', 'lost'}: what the model says, and
    what merges and the adapter lost.
  """
  folders = {EXPORTS[name][0]: EXPORTS[name][1] for name in chosen}
  missing = [name for name in folders if not (directory / name).exists()]
  end = files.read_json(directory / _END) if (directory / _END).exists() else {}
  asked = {'exports': sorted(folders), 'prompt': prompt}
  last = tuned.last_step(directory)
  if not missing and {**asked, 'step': last}.items() <= end.items():
    return end
  for path in directory.glob('.*'):  # Of a process that was killed.
    if path.is_dir() and path.name.strip('.').split('.')[0] in folders:
      shutil.rmtree(path, ignore_errors=True)
  run = tuned.load(directory)
  thin = None
  for name, style in folders.items():
    if style is None:
      continue
    if name in missing:
      thin = tuned.save_adapter(
          run, directory / name, style=style, rank=adapter_rank
      )
    else:
      thin = tuned.change(run, adapter_rank)
  if thin is None and folders and not tuned.why_no_adapter(run):
    thin = tuned.change(run, adapter_rank)
  params = tuned.merged(run)
  if 'merged' in missing:
    tuned.save_merged(run, directory / 'merged', params=params)
  words = language_model.load_tokenizer(tokenizer, run.checkpoint)
  ids = words.encode(prompt) if prompt else _beginning(task)
  say = lambda params: words.decode(
      generate.generate(
          run.checkpoint.config,
          params,
          [ids],
          max_new_tokens=_SAMPLE,
          end_tokens=served.end_tokens(run.checkpoint, words),
      )[0]
  )
  after = say(params)
  params = tuned.on_host(params)  # Before another base is on the device.
  base = run.program.task.load()  # pyrefly: ignore
  end = {
      **asked,
      'step': run.step,
      'begins': words.decode(ids),
      'before': say(base),
      'after': after,
      'lost': tuned.what_merges_lost(run, thin, base, params) if thin else [],
  }
  files.write_json(directory / _END, end)
  return end


def _draw(directory: pathlib.Path) -> None:
  """Draws the losses of a run into loss.png."""
  (run,) = reporting.load_runs([directory])
  figures.write_losses(run, directory / 'loss.png')


def _show_end(
    directory: pathlib.Path,
    chosen: list[str],
    summary: dict[str, Any],
    end: dict[str, Any],
) -> None:
  """Prints what a run has come to."""
  if end['lost']:
    print('\nMerges and adapter against base + sum of links, parts lost:\n')
    print(reporting.table(end['lost']))
  (run,) = reporting.load_runs([directory])
  first = next((line for line in run.metrics if line['step'] == 0), {})
  rows = [
      {
          'text': name,
          'loss before': first.get(f'{split}_loss', math.nan),
          'after': summary[f'{split}_loss'],
          'perplexity before': first.get(f'{split}_perplexity', math.nan),
          'after ': summary[f'{split}_perplexity'],
      }
      for split, name in (('validation', 'held out'), ('watched', 'watched'))
      if f'{split}_loss' in summary
  ]
  if rows:
    print('\n' + reporting.table(rows))
  best = summary['best_step']  # Which is kept with early stopping alone.
  keeps_best = run.config['training']['patience'] and best != summary['step']
  peak = summary.get('peak_memory_bytes')
  # None of a run that was killed after its last step.
  speed = summary.get('tokens_per_second')
  facts = [
      f'{summary["step"]:,} steps'
      + (f', the weights those of {best:,}' if keeps_best else ''),
      f'{summary["seconds"]:,.0f} s and {summary["compile_seconds"]:,.0f} s to'
      ' compile',
      *([f'{speed:,.0f} tokens/s'] if speed else []),
      *([f'at most {peak / 2**30:.1f} GiB'] if peak else []),
  ]
  print('\n' + '; '.join(facts))
  print(f'\nprompt: {end["begins"]!r}')
  print(f'before: {end["before"]!r}')
  print(f'after:  {end["after"]!r}\n')
  for name in chosen:
    print(f'{EXPORTS[name][0]}: {directory / EXPORTS[name][0]}')
  print(f'losses: {directory / "loss.png"}')
  print(f'more:   blora generate {directory} --prompt ...')


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
