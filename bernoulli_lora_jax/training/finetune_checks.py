"""What `blora finetune` refuses before it reads data, loads or trains."""

import pathlib
import re

from ml_collections import config_dict

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import files
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.models import peft_format
from bernoulli_lora_jax.tasks import language_model
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import fields
from bernoulli_lora_jax.training import finetune_modes
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import tuned

# {what --export calls it: (its folder, style of `peft_format`, None for weights)}.
EXPORTS = {
    'merged': ('merged', None),
    'adapter': ('adapter', 'peft'),
    'adapter:peft': ('adapter', 'peft'),
    'adapter:vllm': ('adapter_vllm', 'vllm'),
}


def compiled(name: str, pattern: str) -> re.Pattern[str]:
  """Returns a regular expression; raises ValueError, by name, for what is none."""
  try:
    return re.compile(pattern)
  except re.error as e:
    raise ValueError(
        f'Expected {name} to be a regular expression, got {name}={pattern!r}: {e}.'
    ) from e


def exports(export: str, method: str, has_others: bool) -> list[str]:
  """Returns the names of what is written at the end, of `EXPORTS`.

  Args:
    export: as of the flag.
    method: likewise.
    has_others: whether weights train at full size beside the factors.

  Raises:
    ValueError: another name, or an adapter of what none holds.
  """
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


def check_output(directory: pathlib.Path) -> None:
  """Raises ValueError for a directory of other things than a run of this task."""
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


def check_method(
    config: config_dict.ConfigDict, modes: list[str], chosen: list[str]
) -> None:
  """Raises ValueError for what is wrong whatever the data are.

  Args:
    config: of the run.
    modes: that are tried.
    chosen: of `exports`.
  """
  fields.check(config)
  config = config.copy_and_resolve_references()
  kwargs, size = config.task.kwargs, config.task.batch_size
  for mode in modes:  # Of which each has paths of its own.
    run = finetune_modes.set_mode(config, mode)
    bare = language_model.without_data(kwargs.model, size, **run)
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
    if pattern and not any(map(compiled(flag, pattern).search, known)):
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


def check_exports(
    directory: pathlib.Path, chosen: list[str], settings: programs.Settings
) -> None:
  """Raises ValueError where what the run would write is there, of another step.

  Args:
    directory: of the run.
    chosen: of `exports`.
    settings: of the run.
  """
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


def check_served(
    config: config_dict.ConfigDict,
    width: int,
    chosen: list[str],
    adapter_rank: int,
    settings: programs.Settings,
) -> None:
  """Raises ValueError where vLLM would not take the rank of all links together.

  Args:
    config: of the run.
    width: of the model, above which no layer's change has a rank.
    chosen: of `exports`.
    adapter_rank: as of the flag.
    settings: of the run.
  """
  c, most = config.method, peft_format.VLLM_RANKS[-1]
  num = 1 if c.name == 'lora' else -(-settings.num_steps // c.period)
  rank = adapter_rank or min(width, num * c.rank)
  if 'adapter:vllm' in chosen and rank > most:
    raise ValueError(
        f'Expected adapter_rank in [1, {most}] with export=adapter:vllm, which takes'
        f' no higher one, got adapter_rank={adapter_rank} for {num} links of rank'
        f' {c.rank}.'
    )


def check_rank(
    directory: pathlib.Path, chosen: list[str], adapter_rank: int
) -> None:
  """Raises ValueError where an adapter is there that was asked for another rank."""
  for name in chosen:
    folder = directory / EXPORTS[name][0]
    there = tuned.rank_of(folder)
    if there is not None and there != adapter_rank:
      raise ValueError(
          f'Expected adapter_rank={there}, as of {folder}, got'
          f' adapter_rank={adapter_rank}: move it, or choose another output.'
      )
