"""A fine-tuned decoder from its run directory: merged weights, adapters, text.

    run = tuned.load('runs/mine')
    tuned.save_merged(run, 'merged')
    rows = tuned.save_adapter(run, 'adapter', style='peft')

A run that goes on, or was killed, is read at its newest checkpoint; its data are not
needed.
"""

import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import checks
from bernoulli_lora_jax import export
from bernoulli_lora_jax import files
from bernoulli_lora_jax import recipes
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import peft_format
from bernoulli_lora_jax.tasks import language_model
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import programs

TASK = 'bernoulli_lora_jax.tasks.language_model:make_task'
MARK = 'blora.json'  # In an exported folder: which run it is of, at which step.


class Tuned(NamedTuple):
  """A run, read at a checkpoint."""

  directory: pathlib.Path
  program: programs.Program  # Of a task without data.
  checkpoint: hf.Checkpoint  # Of the base, without weights.
  state: Any  # Of the method; of the best evaluation where the run kept it.
  step: int  # After which it was.


def load(directory: str | os.PathLike[str]) -> Tuned:
  """Reads a run of `blora finetune`, or of its task in a config.

  Args:
    directory: of the run.

  Raises:
    FileNotFoundError: a base model that is not where it was.
    ValueError: no such run, or one without checkpoints.
  """
  directory = pathlib.Path(directory)
  config = experiment.read_config(directory)
  if config.task.name != TASK:
    raise ValueError(
        f'Expected a run of a language model in {directory}, got'
        f' task.name={config.task.name!r}.'
    )
  kwargs = config.task.kwargs.to_dict()
  names = ('model', 'loss_chunk', 'in_memory', *language_model.RUN_FIELDS)
  bare = language_model.without_data(
      batch_size=config.task.batch_size,
      **{name: kwargs[name] for name in names if name in kwargs},
  )
  method = experiment.make_method(config, bare.task)
  settings = experiment.make_settings(config, bare.task)
  program = programs.Program(bare.task, method, settings)
  checkpoints = directory / 'checkpoints'
  if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
    raise ValueError(f'Expected a checkpoint in {checkpoints}, got none yet.')
  state = program.start(jax.random.key(config.seed))
  with loop.open_checkpoints(program, directory, state) as saver:
    state, best, progress = loop.restore(saver, program, state)
  step = progress.step
  if best is not None:
    state, step = program.filled(best, state), progress.best_step
  return Tuned(directory, program, bare.checkpoint, state, step)


def save_merged(
    run: Tuned, folder: str | os.PathLike[str], dtype: str | None = None
) -> Any:
  """Writes the weights with all links merged, as a folder of `transformers`.

  Args:
    run: see `load`.
    folder: that is not there yet.
    dtype: see `hf.save`.

  Returns:
    The params.
  """
  params = run.program.params(run.state)
  hf.save(folder, params, run.checkpoint, dtype=dtype)
  _mark(run, folder)
  return params


def save_adapter(
    run: Tuned,
    folder: str | os.PathLike[str],
    *,
    style: str = 'peft',
    rank: int = 0,
    dtype: str = 'float32',
) -> dict[str, export.Thin]:
  """Writes what the run has changed as an adapter, see `peft_format.save`.

  Args:
    run: see `load`.
    folder: that is not there yet.
    style: 'peft' or 'vllm'.
    rank: most of a layer; 0 for the exact sum of all links, for vLLM up to the
      largest rank that it takes.
    dtype: 'float32' or 'bfloat16'.

  Returns:
    The factors that were written.

  Raises:
    ValueError: a run whose change is no adapter: of all weights, of others beside
      the factors.
  """
  checks.one_of(peft_format.STYLES, style=style)
  checks.integers(0, rank=rank)
  files.check_new(folder)
  if style == 'vllm':
    rank = min(rank or peft_format.VLLM_RANKS[-1], peft_format.VLLM_RANKS[-1])
  thin = change(run, rank)
  peft_format.save(folder, thin, run.checkpoint, style=style, dtype=dtype)
  _mark(run, folder)
  return thin


def change(run: Tuned, rank: int = 0) -> dict[str, export.Thin]:
  """Returns what a run has changed as thin factors, from its links.

  Args:
    run: see `load`.
    rank: most of a layer; 0 for all.

  Raises:
    FileNotFoundError: a link that the directory lacks.
    ValueError: see `save_adapter`.
  """
  chain = run.program.method.chain
  if chain is None:
    raise ValueError(
        f'Expected a run of adapters in {run.directory}, got one of full'
        ' fine-tuning, whose change is no adapter: export merged weights.'
    )
  if chain.others:
    raise ValueError(
        f'Expected a run without others in {run.directory}, got one that trained'
        f' {list(chain.others)} at full size, which no adapter holds: export merged'
        ' weights.'
    )
  state, period = run.state.chain, chain.policy.period
  if period is None:
    thin = export.of_state(chain, state)
    return export.truncate(thin, rank) if rank else thin
  done = max(0, (run.step - 1) // period)  # Links that are merged.
  recipe = recipes.Recipe(
      '',
      '',
      chain.policy,
      chain.matrices,
      state.key,
      done * period,
      tuple(
          recipes.load_link(run.directory / 'recipe', i) for i in range(done)
      ),
  )
  links = recipes.link_factors(recipe, state.params) if done else []
  found = chain.adapted(state.params)
  last = adapters.scaled(state.factors, found)
  host = lambda pair: {s: np.asarray(pair[s]) for s in ('left', 'right')}
  links.append({path: host(pair) for path, pair in last.items()})
  return export.of_links(links, rank or None)


def what_merges_lost(
    run: Tuned, thin: dict[str, export.Thin], params: Any
) -> list[dict[str, Any]]:
  """Returns how far merged weights are from base plus change, a row a kind.

  Args:
    run: see `load`.
    thin: of `change`, or truncated.
    params: merged, as `save_merged` returns them.

  Returns:
    Rows {'matrix', 'layers', 'rank', 'lost', 'distance'}, see `export.report`: the
    largest of the layers.
  """
  assert run.program.task.load is not None
  base = run.program.task.load()
  matrices = run.program.method.chain.matrices  # pyrefly: ignore
  kinds: dict[str, list[dict[str, Any]]] = {}
  for row in export.report(thin, base, params, matrices):
    kinds.setdefault(kind(row['matrix']), []).append(row)
  largest = lambda rows, name: max(row[name] for row in rows)
  return [
      {
          'matrix': name,
          'layers': len(rows),
          **{k: largest(rows, k) for k in ('rank', 'lost', 'distance')},
      }
      for name, rows in kinds.items()
  ]


def kind(path: str) -> str:
  """Returns the path of a decoder's matrix without its layer and its leaf."""
  return '/'.join(
      part for part in path.split('/')[:-1] if not part.startswith('layers')
  )


def step_of(folder: str | os.PathLike[str]) -> int | None:
  """Returns the step that an exported folder is of; None for none of ours."""
  path = pathlib.Path(folder, MARK)
  return files.read_json(path)['step'] if path.is_file() else None


def _mark(run: Tuned, folder: str | os.PathLike[str]) -> None:
  record = {'run': str(run.directory.absolute()), 'step': run.step}
  files.write_json(pathlib.Path(folder, MARK), record)
