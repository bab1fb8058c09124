"""A fine-tuned decoder from its run directory: merged weights, adapters, text.

    run = tuned.load('runs/mine')
    tuned.save_merged(run, 'merged')
    rows = tuned.save_adapter(run, 'adapter', style='peft')

A run that goes on, or was killed, is read at its newest checkpoint; its data are not
needed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
from ml_collections import config_dict
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import export
from bernoulli_lora_jax import files
from bernoulli_lora_jax import recipes
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import peft_format
from bernoulli_lora_jax.tasks import language_model
from bernoulli_lora_jax.training import directory as directory_lib
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import programs

TASK = 'bernoulli_lora_jax.tasks.language_model:make_task'
MARK = directory_lib.MARK


class Tuned(NamedTuple):
  """A run, read at a checkpoint."""

  directory: pathlib.Path
  program: programs.Program  # Of a task without data.
  checkpoint: hf.Checkpoint  # Of the base, without weights.
  state: Any  # Of the method; of the best evaluation where the run kept it.
  step: int  # After which it was.


def resolve(model: str) -> str:
  """Returns the folder of a model: of a run its merged weights.

  Raises:
    ValueError: a run that has none.
  """
  folder = pathlib.Path(model).expanduser()
  checks.that(bool(model), 'a model', model=repr(model))
  if (folder / 'merged' / 'config.json').is_file():
    return str((folder / 'merged').absolute())
  if is_run(folder):
    raise ValueError(
        f'Expected merged weights in {folder}, got a run without them: blora merge'
        f' {folder} {folder / "merged"}.'
    )
  return str(folder.absolute()) if folder.is_dir() else model


def is_run(folder: str | os.PathLike[str]) -> bool:
  """Returns whether a folder is that of a run, and not of a checkpoint."""
  return pathlib.Path(folder, 'checkpoints').is_dir()


def read_config(directory: str | os.PathLike[str]) -> config_dict.ConfigDict:
  """Returns the config of a run that has a checkpoint.

  Raises:
    ValueError: no such run.
  """
  directory = pathlib.Path(directory)
  if not is_run(directory):
    raise ValueError(f'Expected the directory of a run, got {directory}.')
  config = experiment.read_config(directory)
  if config.task.name != TASK:
    raise ValueError(
        f'Expected a run of a language model in {directory}, got'
        f' task.name={config.task.name!r}.'
    )
  if last_checkpoint(directory) is None:
    raise ValueError(f'Expected a checkpoint in {directory}, got none yet.')
  return config


def last_checkpoint(directory: str | os.PathLike[str]) -> int | None:
  """Returns the step of the newest checkpoint of a run."""
  names = [path.name for path in pathlib.Path(directory).glob('checkpoints/*')]
  return max((int(name) for name in names if name.isdigit()), default=None)


def load(directory: str | os.PathLike[str]) -> Tuned:
  """Reads a run of `blora finetune`, or of its task in a config.

  Args:
    directory: of the run.

  Raises:
    FileNotFoundError: a base model that is not where it was.
    ValueError: no such run, or one without checkpoints.
  """
  directory = pathlib.Path(directory)
  config = read_config(directory)
  kwargs = config.task.kwargs.to_dict()
  names = ('model', 'loss_chunk', *language_model.RUN_FIELDS)
  bare = language_model.without_data(
      batch_size=config.task.batch_size,
      **{name: kwargs[name] for name in names if name in kwargs},
  )
  method = experiment.make_method(config, bare.task)
  settings = experiment.make_settings(config, bare.task)
  program = programs.Program(bare.task, method, settings)
  state = program.start(jax.random.key(config.seed))
  with loop.open_checkpoints(program, directory, state) as saver:
    state, best, progress = loop.restore(saver, program, state)
  step = progress.step
  if best is not None:
    state, step = program.filled(best, state), progress.best_step
  return Tuned(directory, program, bare.checkpoint, state, step)


def why_no_adapter(run: Tuned) -> str:
  """Returns what of a run no adapter holds, '' for nothing."""
  chain = run.program.method.chain
  if chain is None:
    return 'of full fine-tuning'
  if chain.others:
    return f'that trained {", ".join(chain.others)} at full size'
  return ''


def has_links(run: Tuned) -> bool:
  """Returns whether the change is known as a sum of products."""
  chain = run.program.method.chain
  if why_no_adapter(run) or chain is None:
    return False
  return bool(not chain.sketched or chain.keeps)


def merged(run: Tuned) -> Any:
  """Returns the weights with all links merged, in the memory of the state.

  The run cannot be asked for anything that needs its state any more: for `change`,
  `save_adapter`.
  """
  params = run.program.method.params_of_large(run.state, in_place=True)
  kept = {id(leaf) for leaf in jax.tree.leaves(params)}
  for leaf in jax.tree.leaves(run.state):  # What has no place in weights.
    if id(leaf) not in kept and not leaf.is_deleted():
      leaf.delete()
  return params


def on_host(params: Any) -> Any:
  """Returns weights as NumPy arrays; they are deleted on the device."""

  def move(leaf):
    host = np.array(leaf)  # No view of what is deleted.
    leaf.delete()
    return host

  return jax.tree.map(move, params)


def save_merged(
    run: Tuned,
    folder: str | os.PathLike[str],
    dtype: str | None = None,
    params: Any = None,
) -> Any:
  """Writes the weights with all links merged, as a folder of `transformers`.

  Args:
    run: see `load`.
    folder: that is not there yet.
    dtype: see `hf.save`.
    params: of `merged`; None for the run's, which are made in its memory.

  Returns:
    The params.
  """
  files.check_new(folder)
  params = merged(run) if params is None else params
  with _marked(run, folder) as scratch:
    hf.save(scratch, params, run.checkpoint, dtype=dtype)
    _copy_tokenizer(run, scratch)
  return params


def _copy_tokenizer(run: Tuned, folder: pathlib.Path) -> None:
  """Puts the tokenizer of the run, where it has its own, in place of the base's."""
  name = experiment.read_config(run.directory).task.kwargs.get('tokenizer', '')
  if not name:
    return
  for file in hf.TOKENIZER:
    (folder / file).unlink(missing_ok=True)
    own = pathlib.Path(name, file)
    if name != 'bytes' and own.is_file():
      shutil.copyfile(own, folder / file)


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
    rank: most of a layer; 0 for the exact sum of all links (of a run without them,
      for the rank that they have), for vLLM up to the largest rank that it takes.
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
  asked = rank
  if style == 'vllm':
    rank = min(rank or peft_format.VLLM_RANKS[-1], peft_format.VLLM_RANKS[-1])
  thin = change(run, rank)
  with _marked(run, folder, rank=asked) as scratch:
    peft_format.save(scratch, thin, run.checkpoint, style=style, dtype=dtype)
  return thin


def change(run: Tuned, rank: int = 0) -> dict[str, export.Thin]:
  """Returns what a run has changed as thin factors, from its links.

  Of a sketched run without a recipe, which keeps none, by an SVD of its weights less
  those of the base, see `export.of_change`.

  Args:
    run: see `load`.
    rank: most of a layer; 0 for all that links can have.

  Raises:
    FileNotFoundError: a link that the directory lacks.
    ValueError: see `save_adapter`.
  """
  if why := why_no_adapter(run):
    raise ValueError(
        f'Expected a run in {run.directory} that an adapter holds, got one {why}:'
        ' export merged weights.'
    )
  chain = run.program.method.chain
  assert chain is not None
  state, period = run.state.chain, chain.policy.period
  if not has_links(run):
    found = chain.adapted(state.params)
    assert period is not None
    num_links = max(1, -(-run.step // period))
    most = num_links * max(one.inner for one in found)
    return export.of_change(
        _base_on_host(run),
        state.params,
        min(rank or most, most),
        chain.matrices,
    )
  if period is None:
    thin = export.of_state(chain, state)
    return export.truncate(thin, rank) if rank else thin
  steps = max(1, run.step)  # At step 0 there is a link, too: of zeros.
  every = recipes.steps_of_link(chain) or steps
  kept = [
      recipes.load_link(run.directory / 'recipe', i)
      for i in range((steps - 1) // every)
  ]
  recipe = recipes.Recipe(
      '',
      '',
      chain.policy,
      chain.matrices,
      state.key,
      steps,
      (*kept, recipes.trained_factors(state, chain)),
      chain.keeps,
  )
  links = recipes.link_factors(recipe, state.params)
  return export.of_links(links, rank or None)


def _base_on_host(run: Tuned) -> Any:
  """Returns the weights before, kept off the device where a CPU is one, too."""
  try:
    place = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out.
    place = None
  with jax.default_device(place):
    return on_host(run.program.task.load())  # pyrefly: ignore


def what_merges_lost(
    run: Tuned, thin: dict[str, export.Thin], base: Any, params: Any
) -> list[dict[str, Any]]:
  """Returns how far merged weights are from base plus change, a row a kind.

  Args:
    run: see `load`.
    thin: of `change`, or truncated.
    base: weights before, as the run's task loads them.
    params: of `merged`; `on_host`, where two sets do not fit on the device.

  Returns:
    Rows {'matrix', 'layers', 'rank', 'lost', 'distance'}, see `export.report`: the
    largest of the layers.
  """
  matrices = run.program.method.chain.matrices  # pyrefly: ignore
  # As they are written, in the dtypes of the files.
  stored = hf.weight_shapes(run.checkpoint)
  cast = lambda x, s: x.astype(s.dtype, copy=False)
  params = jax.tree.map(cast, params, stored)
  return by_kind(
      export.report(thin, base, params, matrices), ('rank', 'lost', 'distance')
  )


def by_kind(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str]
) -> list[dict[str, Any]]:
  """Returns rows of layers as rows of kinds of matrices: the largest of each.

  Args:
    rows: with 'matrix', a path, and the columns.
    columns: of numbers.
  """
  kinds: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    kinds.setdefault(kind(row['matrix']), []).append(row)
  return [
      {
          'matrix': name,
          'layers': len(own),
          **{column: max(row[column] for row in own) for column in columns},
      }
      for name, own in kinds.items()
  ]


def kind(path: str) -> str:
  """Returns the path of a decoder's matrix without its layer and its leaf."""
  return '/'.join(
      part for part in path.split('/')[:-1] if not part.startswith('layers')
  )


def rank_of(folder: str | os.PathLike[str]) -> int | None:
  """Returns the most rank that an exported adapter was asked for; None for none."""
  path = pathlib.Path(folder, MARK)
  return files.read_json(path).get('rank') if path.is_file() else None


def step_of(folder: str | os.PathLike[str]) -> int | None:
  """Returns the step that an exported folder is of; None for none of ours."""
  path = pathlib.Path(folder, MARK)
  return files.read_json(path)['step'] if path.is_file() else None


def last_step(directory: str | os.PathLike[str]) -> int | None:
  """Returns the step that `load` would read of a finished run, else None."""
  path = pathlib.Path(directory, 'summary.json')
  summary = loop.read_summary(path) if path.is_file() else {}
  is_best = experiment.read_config(str(directory)).training.patience
  return summary.get('best_step' if is_best else 'step')


@contextlib.contextmanager
def _marked(
    run: Tuned, folder: str | os.PathLike[str], **more: Any
) -> Iterator[pathlib.Path]:
  """Yields where to write what appears as a folder with its mark, or not at all."""
  record = {'run': str(run.directory.absolute()), 'step': run.step, **more}
  with files.new_folder(folder) as scratch:
    scratch.rmdir()  # What writes into it wants to make it.
    yield scratch
    files.write_json(scratch / MARK, record)
