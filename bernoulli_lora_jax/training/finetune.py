"""`blora finetune`: from a checkpoint and a file to merged weights or an adapter.

The command is a run of `tasks.language_model` like any other: its directory has
config.json, metrics.jsonl, checkpoints/ and recipe/, is resumed by the same command and
read by `blora report`. Here are its flags and what it writes at the end (`tuned`);
`finetune_checks` refuses, `finetune_modes` compiles, `finetune_shown` prints.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import shutil
from typing import Any, Literal

from ml_collections import config_dict
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import files
from bernoulli_lora_jax.models import generate
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import language_model
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import directory as directory_lib
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import figures
from bernoulli_lora_jax.training import finetune_checks
from bernoulli_lora_jax.training import finetune_modes
from bernoulli_lora_jax.training import finetune_shown
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import served
from bernoulli_lora_jax.training import tuned

# Of Adam, times the width of the model: none above the best rate that was found for its
# method at width 192 (the README) and at 512 (docs/evidence.md, ranks 8 to 141). For
# wider models that is an extrapolation.
LEARNING_RATES = {
    'full': 0.5,
    'lora': 1.25,
    'cola': 1.25,
    'rac_left': 4.0,
    'rac_right': 4.0,
    'bernoulli': 4.0,
}
# alpha / rank there, which alpha=None stands for; 1 for others.
_SCALES = {'lora': 2.0, 'cola': 2.0}
# {flag: the methods that have it}.
_METHODS_OF = {
    'shared_coin': ('bernoulli',),
    'shared_frames': ('bernoulli', 'rac_left'),
}
# {flag: its field}.
_FIELDS = {
    'seed': 'seed',
    'batch_size': 'task.batch_size',
    'method': 'method.name',
    'rank': 'method.rank',
    'period': 'method.period',
    'prob': 'method.prob',
    'shared_coin': 'method.shared_coin',
    'shared_frames': 'method.shared_frames',
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
_END = 'end.json'  # What was printed at the end, and at which step.
_SAMPLE = 48  # Tokens of a sample.


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
    shared_coin: bool = False,
    shared_frames: tuple[str, ...] = (),
    alpha: float | None = None,
    sketch: str = 'gaussian',
    sketched: Literal['auto', 'yes', 'no'] = 'auto',
    num_steps: int = 0,
    num_epochs: float = 1.0,
    batch_size: int = 8,
    micro_batches: int = 1,
    max_length: int = 1024,
    learning_rate: float | None = None,
    schedule: Literal['constant', 'cosine', 'linear'] = 'cosine',
    warmup: int = 0,
    optimizer: Literal['adam', 'adamw', 'column', 'sgd'] = 'adam',
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
    shared_coin: whether one coin a link decides for all matrices, of bernoulli: links
      are then left or right as a whole, and run as fast as those.
    shared_frames: patterns of matrices that draw one left frame, of chains; those that
      read one activation are '(q|k|v)_proj' and '(gate|up)_proj'; their x L is one.
    alpha: the scale is alpha / rank; None for 1, with lora and cola 2.
    sketch: law of the frozen factors.
    sketched: whether weights move at each step, with no factors beside them: less
      memory, of rac_left, rac_right and bernoulli; auto is yes for the first two.
    num_steps: of the run; 0 for num_epochs.
    num_epochs: passes through the data.
    batch_size: rows of max_length tokens a step, of all devices.
    micro_batches: parts of a batch, one after another: less memory.
    max_length: tokens of a row, into which documents are packed.
    learning_rate: the peak; None for 4 / width of the model, with lora and cola 1.25,
      with full, train_others, train_tokens 0.5: found at widths to 512, a guess beyond.
    schedule: of the learning rate after its warm-up; cosine and linear end at 0.
    warmup: steps of linear warm-up.
    optimizer: of what trains; column is adam with half of its state, of the factors.
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
    has_others = bool(train_others or train_tokens)
    chosen = finetune_checks.exports(export, method, has_others)
    checks.integers(0, adapter_rank=adapter_rank)
    directory_lib.check(output)
    finetune_checks.check_output(directory)
    finetune_checks.check_rank(directory, chosen, adapter_rank)
    found = hf.open_folder(tuned.resolve(model))
    config = make_config(given, found)
    modes = finetune_modes.modes_of(mode, directory)
    finetune_checks.check_method(config, modes, chosen)
    width = found.config.hidden_size

    def check(settings):
      finetune_checks.check_exports(directory, chosen, settings)
      finetune_checks.check_served(
          config, width, chosen, adapter_rank, settings
      )

    program = finetune_modes.fitting(config, modes, directory, check)
  found_rate = default_rate(given, found.config.hidden_size)[1]
  rate_from = '' if learning_rate is not None else found_rate
  finetune_shown.show_start(config, program, directory, rate_from)
  try:
    summary = loop.train(*experiment.run_of(config, directory, program))
  except loop.DivergedError as e:
    raise loop.DivergedError(_with_checkpoint(str(e), directory)) from e
  task = program.task
  del program  # And what it has compiled.
  with directory_lib.hold(directory):
    _draw(directory)
    end = _finish(directory, chosen, adapter_rank, task, tokenizer, prompt)
  finetune_shown.show_end(directory, chosen, summary, end)


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
  checks.integers(1, rank=given['rank'])
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
  is_low = dtype in low.values() or not dtype and bool(stored)
  if rounding == 'auto':
    rounding = 'stochastic' if is_low else 'nearest'
  # A step is less than half the spacing of such weights.
  is_sketched = finetune_modes.is_sketched(
      given, loses_steps=is_low and rounding == 'nearest'
  )
  method_mode = 'sketched' if is_sketched else 'adapter'
  for flag in ('targets', 'train_others', 'train_tokens'):
    if is_full and given[flag]:
      raise ValueError(
          f"Expected {flag}='' with method=full, which trains all weights, got"
          f' {flag}={given[flag]!r}.'
      )
  for flag, methods in _METHODS_OF.items():
    if given[flag] and given['method'] not in methods:
      raise ValueError(
          f'Expected {flag} with method in {methods} alone, got'
          f" {flag}={given[flag]!r} with method={given['method']!r}."
      )
  checks.that(
      not is_full or given['optimizer'] != 'column',
      'optimizer of adam, adamw, sgd with method=full, which trains no factors',
      optimizer='column',
  )
  config = base_config.get_config()
  rate, alpha = given['learning_rate'], given['alpha']
  if rate is None:
    rate = default_rate(given, found.config.hidden_size)[0]
  if alpha is None and given['method'] in _SCALES:
    alpha = _SCALES[given['method']] * given['rank']
  others, other_rows = _others(given, found)
  values = {field: given[flag] for flag, field in _FIELDS.items()}
  values |= {
      'task.name': tuned.TASK,
      'method.mode': 'gradient' if is_full else method_mode,
      'method.learning_rate': rate,
      'method.alpha': alpha,
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


def default_rate(given: dict[str, Any], width: int) -> tuple[float, str]:
  """Returns the peak of the learning rate where none is given, and from what.

  A scale above that of `LEARNING_RATES` divides it. What trains at full size beside
  adapters has their rate, so both have that of full fine-tuning, the lowest.

  Args:
    given: arguments of `finetune`.
    width: of the model.
  """
  method = given['method']
  part = 1.0
  if method != 'full' and given['alpha'] is not None:
    scale = given['alpha'] / given['rank']
    part = max(part, scale / _SCALES.get(method, 1.0))
  if given['train_others'] or given['train_tokens']:
    method = 'full'
  constant = LEARNING_RATES[method]
  told = f'{constant:g} / width {width}' + (f' / {part:g}' if part > 1 else '')
  return float(f'{constant / width / part:.2g}'), told


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
  finetune_checks.compiled('train_tokens', given['train_tokens'])
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


def _with_checkpoint(text: str, directory: pathlib.Path) -> str:
  """Returns what has diverged, and where the last good checkpoint is."""
  step = tuned.last_checkpoint(directory)
  if step is None:
    return f'{text} None was saved yet in {directory}.'
  return (
      f'{text} It is that of step {step}, which blora merge {directory}'
      ' writes; another try needs another output.'
  )


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
  folders = dict(finetune_checks.EXPORTS[name] for name in chosen)
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
  if thin is None and folders and tuned.has_links(run):
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
