"""Fine-tuning of decoders on text of one's own.

config.task.name = 'bernoulli_lora_jax.tasks.language_model:make_task'
config.task.kwargs.model = 'folder/of/a/checkpoint'
config.task.kwargs.data = 'chats.jsonl'
config.training.eval_gradient = False  # A stream has no full gradient.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
import math
import os
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import parts
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import packing as packing_lib
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.tasks import text

# How a model is loaded, see `hf.load`.
RUN_FIELDS = ('dtype', 'compute_dtype', 'remat', 'scan_layers')
_TRAIN_CHUNKS = 4  # Of the training rows that evaluations look at.


def make_task(
    *,
    model: str | os.PathLike[str] | hf.Checkpoint,
    data: str | os.PathLike[str],
    batch_size: int,
    kind: str = 'auto',
    columns: Mapping[str, str] | None = None,
    tokenizer: str | os.PathLike[str] | text.TextTokenizer = '',
    max_length: int = 1024,
    eval_fraction: float = 0.05,
    eval_data: str | os.PathLike[str] = '',
    eval_batch_size: int = 0,
    watch_data: str | os.PathLike[str] = '',
    in_memory: bool = False,
    packing: bool = True,
    window: int = 64,
    separator: str = '',
    template: bool = False,
    turns: str = 'all',
    over_limit: str = 'error',
    skip_bad: bool = False,
    loss_chunk: int = 2048,
    max_segments: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    **run: Any,
) -> task_lib.Task:
  """Returns the task of training a decoder on text.

  Args:
    model: a folder, a name on the hub, or what `hf.load` made of it.
    data: see `text.load`.
    batch_size: rows of max_length tokens in a batch, of all processes.
    kind: 'auto', 'instruction' or 'language_model', see `text.load`.
    columns: see `text.load`.
    tokenizer: a folder; '' for that of the model; 'bytes'; or one that is loaded.
    max_length: tokens of a row, and most of a document.
    eval_fraction: see `text.load`; 0 for no validation.
    eval_data: see `text.load`; with it eval_fraction is not looked at.
    eval_batch_size: rows at a time in evaluations; 0 for batch_size. It takes the
      place of config.task.chunk.
    watch_data: files whose loss is evaluated, too: what the model should not forget.
      Their kind is told by their first document.
    in_memory: whether weights and rows are kept on the device, as of small tasks,
      whose runs may train together (a sweep). Each epoch then passes through the
      same rows in another order, and train_loss is that of the first rows. Otherwise
      rows are packed anew each epoch, and weights are loaded for a run that owns
      them.
    packing: whether a row has many documents.
    window: see `packing.Packing`.
    separator: see `text.load`.
    template: see `text.load`.
    turns: see `text.load`.
    over_limit: see `text.load`.
    skip_bad: see `text.load`.
    loss_chunk: positions whose logits exist at once, see `decoder.make_loss`.
    max_segments: most documents of a row, padding counted; 0 for what their mean
      length asks for. The fewer, the faster is packed attention.
    process_index: of `jax.process_index()`, where processes share a batch.
    process_count: of `jax.process_count()`; divides batch_size.
    **run: how a model is loaded, see `hf.load`: dtype, compute_dtype, remat,
      scan_layers.

  Returns:
    A task; num_samples is the rows of its first epoch, num_tokens the tokens of a
    batch in their mean, padding left out. Metrics of validation and of what is
    watched are loss, in nats a token, and perplexity.

  Raises:
    FileNotFoundError: no such files.
    ValueError: an argument outside its range, data that are not as they should be,
      see `text.load`; ids without rows in the model.
  """
  checks.integers(1, batch_size=batch_size, process_count=process_count)
  checks.integers(0, eval_batch_size=eval_batch_size)
  checks.that(
      batch_size % process_count == 0,
      f'batch_size to be a multiple of process_count={process_count}',
      batch_size=batch_size,
  )
  bare = without_data(model, batch_size, loss_chunk, in_memory, **run)
  checkpoint = bare.checkpoint
  config = checkpoint.config
  found_tokenizer = load_tokenizer(tokenizer, checkpoint)
  read = functools.partial(
      text.load,
      tokenizer=found_tokenizer,
      max_length=max_length,
      separator=separator,
      template=template,
      turns=turns,
      over_limit=over_limit,
      skip_bad=skip_bad,
  )
  documents = read(
      data,
      kind=kind,
      columns=columns,
      eval_fraction=0.0 if eval_data else eval_fraction,
      eval_data=eval_data,
  )
  if watch_data:
    documents['watched'] = read(watch_data, kind='auto')['train']
  for part in documents.values():
    text.check_vocabulary(part, found_tokenizer, config.vocab_size)
  if max_length > config.max_length:
    warnings.warn(
        f'max_length={max_length} is more than the {config.max_length} positions'
        ' that the model was made for.',
        stacklevel=2,
    )
  most = max_segments or _segments(documents.values(), max_length)
  rows = packing_lib.Packing(max_length, most, window, packing)
  splits = {
      name: _with_index(packing_lib.arrays(part, rows))
      for name, part in documents.items()
      if in_memory or name != 'train'
  }
  drawn: dict[str, Any]
  if in_memory:
    num_samples = len(splits['train']['index'])
    task_lib.check_batch_size(batch_size, num_samples, str(data))
    drawn = {'sampling': 'epochs', 'batch': task_lib.epoch_batch(batch_size)}
  else:
    counted = packing_lib.rows(documents['train'], rows, seed=0)
    num_samples = sum(1 for _ in counted)
    stream = functools.partial(
        _stream,
        documents['train'],
        rows,
        batch_size // process_count,
        process_index,
        process_count,
    )
    drawn = {'sampling': 'stream', 'stream': stream}
  task = bare.task._replace(
      data=splits,
      num_samples=num_samples,
      num_tokens=round(
          batch_size * len(documents['train'].tokens) / num_samples
      ),
      preview=text.show(documents['train'], found_tokenizer),
      chunk=eval_batch_size or batch_size,
      **drawn,
  )
  return _with_loss(task, config, loss_chunk, most)


def with_run(
    task: task_lib.Task,
    model: str | os.PathLike[str],
    **run: Any,
) -> task_lib.Task:
  """Returns a task whose model is run otherwise, its data as they are.

  Args:
    task: of `make_task`, not in memory.
    model: its folder.
    **run: how the model is loaded, see `make_task`.
  """
  old, loss_chunk = task.loss.args  # pyrefly: ignore
  bare = without_data(model, task.batch_size, loss_chunk, **run)
  names = 'init', 'load', 'matrices'
  task = task._replace(**{name: getattr(bare.task, name) for name in names})
  config = bare.checkpoint.config
  return _with_loss(task, config, loss_chunk, old.max_segments)


def _with_loss(
    task: task_lib.Task,
    config: decoder.DecoderConfig,
    loss_chunk: int,
    max_segments: int,
) -> task_lib.Task:
  """Returns a task with the loss of a decoder."""
  config = dataclasses.replace(config, max_segments=max_segments)
  loss = functools.partial(_loss, config, loss_chunk)
  metrics = functools.partial(_metrics, loss, task.chunk)
  return task._replace(loss=loss, metrics=metrics)


def _loss(
    config: decoder.DecoderConfig,
    chunk: int,
    params: Any,
    batch: task_lib.Batch,
    key: Any = None,
) -> tuple[jax.Array, parts.Weighted]:
  return decoder.make_loss(config, chunk)(params, batch, key)


def _segments(parts_of: Iterable[packing_lib.Documents], length: int) -> int:
  """Returns room for half again as many documents in a row as fit in the mean."""
  mean = min(len(part.tokens) / len(part) for part in parts_of)
  return int(np.clip(2 ** math.ceil(math.log2(1.5 * length / mean + 1)), 4, 64))


class Bare(NamedTuple):
  """A task without data, and the checkpoint that its model is of."""

  task: task_lib.Task
  checkpoint: hf.Checkpoint


def without_data(
    model: str | os.PathLike[str] | hf.Checkpoint,
    batch_size: int = 1,
    loss_chunk: int = 1024,
    in_memory: bool = False,
    **run: Any,
) -> Bare:
  """Returns the task of a model with nothing to train on, see `make_task`.

  Args:
    model: see `make_task`, like the others.
    batch_size: rows of a batch.
    loss_chunk: positions whose logits exist at once.
    in_memory: whether weights are kept.
    **run: how a model is loaded.
  """
  checkpoint, weights, load = _weights(model, in_memory, run)
  task = task_lib.Task(
      name='language_model',
      init=lambda key: weights(),
      data={},
      loss=decoder.make_loss(checkpoint.config, loss_chunk),
      num_samples=batch_size,
      batch_size=batch_size,
      sampling='stream',
      weights=None if load else weights(),
      load=load,
      matrices=functools.partial(_matrices, checkpoint.config),
  )
  return Bare(task, checkpoint)


def _weights(
    model: Any, in_memory: bool, run: dict[str, Any]
) -> tuple[hf.Checkpoint, Callable[[], Any], Callable[[], Any] | None]:
  """Returns a checkpoint, what `init` returns, and what loads the weights."""
  if isinstance(model, hf.Checkpoint):
    checks.that(not run, 'a folder beside how a model is loaded', got=run)
    params = model.params
    checks.that(params is not None, 'a checkpoint with its params', params=None)
    return model, lambda: params, None
  run = {
      k: jnp.dtype(v) if k.endswith('dtype') else v
      for k, v in run.items()
      if v != ''
  }
  if in_memory:
    return _weights(hf.load(model, **run), in_memory, {})
  dtype = run.pop('dtype', None)
  found = hf.open_folder(model, **run)
  shapes = hf.weight_shapes(found, dtype)
  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  folder = str(found.folder)
  return found, zeros, lambda: hf.load(folder, dtype=dtype, **run).params


def _matrices(
    config: decoder.DecoderConfig, select: str
) -> matrices_lib.Matrices:
  """Returns the linear maps of a decoder, all of its layers' for ''."""
  return decoder.matrices(config, *([select] if select else []))


def _with_index(rows: dict[str, np.ndarray]) -> task_lib.Batch:
  index = np.arange(len(rows['tokens']), dtype=np.int32)
  return jax.tree.map(jnp.asarray, {**rows, 'index': index})


def load_tokenizer(
    tokenizer: Any, checkpoint: hf.Checkpoint
) -> text.TextTokenizer:
  if not isinstance(tokenizer, str | os.PathLike):
    return tokenizer
  if tokenizer == 'bytes':
    return text.Bytes()
  if not tokenizer and checkpoint.folder is None:
    raise ValueError(
        "Expected tokenizer to be a folder, or 'bytes', for a model that came"
        ' from none, got nothing.'
    )
  return tokenizer_lib.load(tokenizer or checkpoint.folder)  # pyrefly: ignore


def _stream(
    documents: packing_lib.Documents,
    rows: packing_lib.Packing,
    batch_size: int,
    process_index: int,
    process_count: int,
    seed: int,
) -> packing_lib.Stream:
  return packing_lib.Stream(
      documents,
      rows,
      batch_size,
      seed=seed,
      process_index=process_index,
      process_count=process_count,
  )


def _metrics(
    loss: Callable[..., Any],
    chunk: int,
    params: Any,
    data: dict[str, task_lib.Batch],
    split: str,
) -> dict[str, jax.Array]:
  """Returns the loss in nats a token over all tokens of a split, and exp of it."""
  rows = data[split]
  if split == 'train':  # All of it would cost an epoch.
    rows = jax.tree.map(lambda x: x[: _TRAIN_CHUNKS * chunk], rows)
  value, _ = parts.chunked(loss, chunk)(params, rows)
  return {'loss': value, 'perplexity': jnp.exp(value)}
