"""Fine-tuning of decoders on text of one's own.

config.task.name = 'bernoulli_lora_jax.tasks.language_model:make_task'
config.task.kwargs.model = 'folder/of/a/checkpoint'
config.task.kwargs.data = 'chats.jsonl'
config.training.eval_gradient = False  # A stream has no full gradient.
"""

from collections.abc import Callable
import functools
import os
from typing import Any
import warnings

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import parts
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import packing as packing_lib
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.tasks import text


def make_task(
    *,
    model: str | os.PathLike[str] | hf.Checkpoint,
    data: str | os.PathLike[str],
    batch_size: int,
    kind: str = 'instruction',
    tokenizer: str | os.PathLike[str] | text.TextTokenizer = '',
    max_length: int = 1024,
    eval_fraction: float = 0.05,
    eval_data: str | os.PathLike[str] = '',
    eval_batch_size: int = 0,
    packing: bool = True,
    window: int = 64,
    separator: str = '',
    template: bool = False,
    turns: str = 'all',
    over_limit: str = 'error',
    skip_bad: bool = False,
    loss_chunk: int = 1024,
    process_index: int = 0,
    process_count: int = 1,
    **run: Any,
) -> task_lib.Task:
  """Returns the task of training a decoder on text.

  Args:
    model: a folder, a name on the hub, or what `hf.load` made of it.
    data: see `text.load`.
    batch_size: rows of max_length tokens in a batch, of all processes.
    kind: 'instruction' or 'language_model', see `text.load`.
    tokenizer: a folder; '' for that of the model; 'bytes'; or one that is loaded.
    max_length: tokens of a row, and most of a document.
    eval_fraction: see `text.load`; 0 for no validation.
    eval_data: see `text.load`; with it eval_fraction is not looked at.
    eval_batch_size: rows at a time in evaluations; 0 for batch_size. It takes the
      place of config.task.chunk.
    packing: whether a row has many documents.
    window: see `packing.Packing`.
    separator: see `text.load`.
    template: see `text.load`.
    turns: see `text.load`.
    over_limit: see `text.load`.
    skip_bad: see `text.load`.
    loss_chunk: positions whose logits exist at once, see `decoder.make_loss`.
    process_index: of `jax.process_index()`, where processes share a batch.
    process_count: of `jax.process_count()`; divides batch_size.
    **run: how a model is loaded, see `hf.load`: dtype, compute_dtype, remat,
      max_segments, scan_layers (False by default here: a config's
      method.select takes matrices, no stacks of them).

  Returns:
    A task of batches from a stream; num_samples is the rows of its first epoch.
    Metrics of validation are loss, in nats a token, and perplexity.

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
  checkpoint = _checkpoint(model, run)
  config, params = checkpoint.config, checkpoint.params
  found_tokenizer = _tokenizer(tokenizer, checkpoint)
  documents = text.load(
      data,
      found_tokenizer,
      kind=kind,
      max_length=max_length,
      eval_fraction=0.0 if eval_data else eval_fraction,
      eval_data=eval_data,
      separator=separator,
      template=template,
      turns=turns,
      over_limit=over_limit,
      skip_bad=skip_bad,
  )
  for part in documents.values():
    text.check_vocabulary(part, found_tokenizer, config.vocab_size)
  logging.info('%s', text.show(documents['train'], found_tokenizer))
  if max_length > config.max_length:
    warnings.warn(
        f'max_length={max_length} is more than the {config.max_length} positions'
        ' that the model was made for.',
        stacklevel=2,
    )
  rows = packing_lib.Packing(max_length, config.max_segments, window, packing)
  loss = decoder.make_loss(config, loss_chunk)
  splits = {}
  if 'validation' in documents:
    held_out = packing_lib.arrays(documents['validation'], rows)
    index = np.arange(len(held_out['tokens']), dtype=np.int32)
    splits['validation'] = jax.tree.map(
        jnp.asarray, {**held_out, 'index': index}
    )
  stream = functools.partial(
      _stream,
      documents['train'],
      rows,
      batch_size // process_count,
      process_index,
      process_count,
  )
  chunk = eval_batch_size or batch_size
  num_samples = sum(
      1 for _ in packing_lib.rows(documents['train'], rows, seed=0)
  )
  return task_lib.Task(
      name=kind,
      init=lambda key: params,
      data=splits,
      loss=loss,
      num_samples=num_samples,
      batch_size=batch_size,
      sampling='stream',
      stream=stream,
      weights=params,
      metrics=functools.partial(_metrics, loss, chunk),
      chunk=chunk,
  )


def _checkpoint(model: Any, run: dict[str, Any]) -> hf.Checkpoint:
  if not isinstance(model, hf.Checkpoint):
    run = {'scan_layers': False, **run}
    run = {
        k: jnp.dtype(v) if k.endswith('dtype') and v else v
        for k, v in run.items()
    }
    return hf.load(model, **run)
  checks.that(not run, 'a folder beside how a model is loaded', got=run)
  checks.that(
      model.params is not None, 'a checkpoint with its params', params=None
  )
  return model


def _tokenizer(tokenizer: Any, checkpoint: hf.Checkpoint) -> text.TextTokenizer:
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
  value, _ = parts.chunked(loss, chunk)(params, data[split])
  return {'loss': value, 'perplexity': jnp.exp(value)}
