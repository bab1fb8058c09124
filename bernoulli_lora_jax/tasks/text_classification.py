"""Telling the label of a text, with an encoder and a fresh head.

config.task.name = 'bernoulli_lora_jax.tasks.text_classification:make_task'
config.task.kwargs.model = 'folder/of/a/checkpoint'
config.task.kwargs.data = 'train.jsonl'          # {"text": ..., "label": ...} a line
config.task.kwargs.test_data = 'test.jsonl'
config.method.others = '^classifier'             # The head, beside a chain.

Batches have a few lengths (`buckets`). All are within one compiled step, as branches
of which each batch takes one: a text is never padded to the longest of all, and
nothing is compiled anew. In all runs lengths follow one another in the same order,
so that runs that step together take the same branch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import hashlib
import itertools
import os
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import parts
from bernoulli_lora_jax.models import encoder
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import records
from bernoulli_lora_jax.tasks import task as task_lib

UNSEEN = ('error', 'count')
SAMPLINGS = ('epochs', 'replacement')
_GRAIN = 8  # Lengths are multiples of it.
_SHOWN = 12  # Labels, and texts, in a preview.
_FIELDS = ('text', 'pair', 'label')


class Texts(NamedTuple):
  """Labelled texts, in the order of their file."""

  texts: list[str]
  pairs: list[str] | None  # Second texts, where there are any.
  labels: list[str]
  places: list[str]  # As 'line 7'.

  def take(self, rows: Iterable[int]) -> 'Texts':
    """Returns those at some places."""
    rows = list(rows)
    pick = lambda x: [x[i] for i in rows]
    pairs = None if self.pairs is None else pick(self.pairs)
    return Texts(pick(self.texts), pairs, pick(self.labels), pick(self.places))


def make_task(
    *,
    model: str | os.PathLike[str] | hf.Checkpoint,
    data: str | os.PathLike[str],
    batch_size: int,
    test_data: str | os.PathLike[str] = '',
    eval_data: str | os.PathLike[str] = '',
    eval_fraction: float = 0.1,
    split_seed: int = 0,
    num_texts: int = 0,
    columns: Mapping[str, str] | None = None,
    tokenizer: str | os.PathLike[str] | tokenizer_lib.Tokenizer = '',
    pooling: str = 'mean',
    head: str = 'linear',
    max_length: int = 128,
    num_lengths: int = 3,
    sampling: str = 'epochs',
    eval_batch_size: int = 256,
    train_rows: int = 1024,
    unseen: str = 'error',
    skip_bad: bool = False,
    **run: Any,
) -> task_lib.Task:
  """Returns the task of telling the label of a text.

  Variables of the environment in model and files are filled in: '$HOME/data'.

  Args:
    model: a folder, a name on the hub, or what `hf.load` made of it; a head that it
      has is left behind.
    data: see `read`. Its labels, sorted, are those of the head.
    batch_size: texts of a batch.
    test_data: looked at once, at the end; '' for none.
    eval_data: of the validation; with it eval_fraction is not looked at.
    eval_fraction: part of data that is held out, in [0, 1), by a hash of the text:
      equal texts stay together.
    split_seed: of the hash.
    num_texts: of data that are read, from its start; 0 for all.
    columns: {name of a field in data: 'text', 'pair' or 'label'}.
    tokenizer: a folder; '' for that of the model; or one that is loaded.
    pooling: what of a text the head reads: 'mean', 'cls' or 'pooler'.
    head: 'linear', or 'dense' as of RoBERTa. A fresh one for each seed.
    max_length: most tokens of a text, special ones included; longer ones are cut.
    num_lengths: most lengths of batches, see `lengths_of`.
    sampling: 'epochs', by `buckets`; or 'replacement', what T2-T4 assume.
    eval_batch_size: texts at a time in evaluations and full gradients. It takes the
      place of config.task.chunk.
    train_rows: most texts of training that evaluations look at, evenly spaced by
      length; 0 for all.
    unseen: what becomes of labels of other parts that data have not: 'error', or
      'count': their texts are told wrong, and the loss leaves them out.
    skip_bad: bad lines are left out, with a warning, in place of an error.
    **run: how a model is loaded, see `hf.load`: dtype, compute_dtype, remat,
      scan_layers.

  Returns:
    A task whose batches hold tokens, lengths, types (of pairs), y and bucket.
    Metrics are loss, in nats a text, accuracy and macro_f1 (the mean of F1 over the
    labels that are there or were told).

  Raises:
    FileNotFoundError: no such files.
    ValueError: an argument outside its range; bad lines, labels unseen in training,
      by place; fewer than two labels; a model that is no encoder.
    ImportError: a dataset, but no library datasets.
  """
  checks.one_of(UNSEEN, unseen=unseen)
  checks.one_of(SAMPLINGS, sampling=sampling)
  checks.within('[0, 1)', eval_fraction=eval_fraction)
  checks.integers(
      0, train_rows=train_rows, split_seed=split_seed, num_texts=num_texts
  )
  checks.integers(1, num_lengths=num_lengths, eval_batch_size=eval_batch_size)
  get = functools.partial(read, columns=columns, skip_bad=skip_bad)
  whole = get(data)
  if num_texts:
    whole = whole.take(range(min(num_texts, len(whole.texts))))
  names = sorted(set(whole.labels))
  checks.that(len(names) >= 2, f'two labels or more in {data}', labels=names)
  splits = _splits(whole, 0.0 if eval_data else eval_fraction, split_seed, data)
  for split, source in (('validation', eval_data), ('test', test_data)):
    if source:
      splits[split] = get(source)
      _check_labels(splits[split], names, source, unseen)
  task_lib.check_batch_size(batch_size, len(splits['train'].texts), str(data))

  config, weights, words = _model(model, tokenizer, run)
  checks.that(
      max_length <= config.max_length,
      f'max_length <= {config.max_length}, the positions of the model',
      max_length=max_length,
  )
  add_head = functools.partial(_add_head, config, len(names), pooling, head)
  config, _ = add_head(weights, jax.random.key(0))
  encoded = {
      split: _encoded(words, texts, names, max_length)
      for split, texts in splits.items()
  }
  largest = max(int(rows['tokens'].max()) for rows in encoded.values())
  checks.that(
      largest < config.vocab_size,
      f'ids of tokens below {config.vocab_size}, the vocab_size of the model',
      id=f'{largest}: take its own tokenizer',
  )
  lengths = lengths_of(encoded['train']['lengths'], num_lengths, max_length)
  arrays = {k: _sorted(rows, lengths) for k, rows in encoded.items()}
  bounds = buckets(np.asarray(arrays['train']['bucket']), batch_size)
  batch = task_lib.uniform_batch(batch_size)
  if sampling == 'epochs':
    batch = functools.partial(_batch, bounds, batch_size)
  begin = lambda key, weights: add_head(weights, key)[1]
  at_length = functools.partial(_at_length, lengths)
  counted = at_length(functools.partial(_counted, config))
  return task_lib.Task(
      name='text_classification',
      init=lambda key: begin(key, weights),
      begin=begin,
      weights=weights,
      data={k: jax.tree.map(jnp.asarray, rows) for k, rows in arrays.items()},
      loss=functools.partial(_loss, counted),
      num_samples=len(splits['train'].texts),
      batch_size=batch_size,
      sampling=sampling,
      batch=batch,
      matrices=functools.partial(_matrices, config),
      preview=_preview(splits, names, arrays['train'], lengths),
      metrics=functools.partial(_metrics, counted, eval_batch_size, train_rows),
      chunk=eval_batch_size,
      lower_bound=0.0,
      outputs=at_length(functools.partial(_logits, config)),
      criterion='cross_entropy',
  )


def read(
    data: str | os.PathLike[str],
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> Texts:
  """Returns labelled texts.

  Args:
    data: of `text.load`: records {"text", "label"} of .jsonl, .json, .csv, .parquet, a
      folder, or a dataset of the Hub ('nyu-mll/glue/sst2:train'). "pair" is a second
      text. Labels are text or whole numbers >= 0; variables of the environment are
      filled in.
    columns: see `make_task`.
    skip_bad: see `make_task`.

  Raises: as `make_task`.
  """
  data = _filled(data)
  columns = {**{name: name for name in _FIELDS}, **(columns or {})}
  found, bad, count = [], [], 0
  for where, content in records.contents(data, columns=columns):
    count += 1
    try:
      found.append((*_record(records.parsed(content, columns)), where))
    except records.BadRecordError as e:
      bad.append(f'{where} ({e})')
  if bad:
    records.report_bad(data, bad, count, skip_bad)
  texts, pairs, labels, places = map(list, zip(*found, strict=True))
  lacks = [p for p, pair in zip(places, pairs, strict=True) if pair is None]
  if lacks and len(lacks) < len(pairs):
    raise ValueError(
        f"Expected 'pair' in all or none of {data}, got none in {lacks[0]}."
    )
  return Texts(texts, None if lacks else pairs, labels, places)


def _filled(path: Any) -> Any:
  """Returns a path with its variables of the environment filled in."""
  if not isinstance(path, str):
    return path
  filled = os.path.expandvars(path)
  checks.that('$' not in filled, f'variables of {path} that are set', path=path)
  return filled


def _record(value: Any) -> tuple[str, str | None, str]:
  """Returns text, second text and label of a record."""
  if not isinstance(value, dict):
    raise records.BadRecordError('no record but text')
  text = records.string(value, 'text')
  if not text.strip():
    raise records.BadRecordError("'text' is empty")
  has_pair = value.get('pair') is not None
  label = value.get('label')
  is_whole = isinstance(label, int) and not isinstance(label, bool)
  if not (is_whole and label >= 0 or isinstance(label, str) and label):
    raise records.BadRecordError(
        f"'label' is no text and no whole number >= 0 but {label!r:.40}"
    )
  pair = records.string(value, 'pair') if has_pair else None
  return text, pair, str(label)


def _splits(
    whole: Texts, fraction: float, seed: int, data: Any
) -> dict[str, Texts]:
  """Returns the training texts, and those that are held out."""
  is_out = [_hash(whole, i, seed) < fraction for i in range(len(whole.texts))]
  if not any(is_out):
    checks.that(
        not fraction, f'texts held out of {data}', eval_fraction=fraction
    )
    return {'train': whole}
  rows = np.flatnonzero(is_out), np.flatnonzero(np.logical_not(is_out))
  checks.that(len(rows[1]) > 0, f'texts of {data} left', eval_fraction=fraction)
  splits = {'train': whole.take(rows[1]), 'validation': whole.take(rows[0])}
  if missing := sorted(set(whole.labels) - set(splits['train'].labels)):
    warnings.warn(
        f'All texts of {data} with the labels {missing} are held out: no model'
        ' will learn them.',
        stacklevel=3,
    )
  return splits


def _hash(whole: Texts, i: int, seed: int) -> float:
  """Returns a number in [0, 1) by a text and a seed."""
  pair = '' if whole.pairs is None else whole.pairs[i]
  content = f'{seed}\0{whole.texts[i]}\0{pair}'
  return int.from_bytes(hashlib.sha256(content.encode()).digest()[:6]) / 2**48


def _check_labels(
    found: Texts, names: Sequence[str], data: Any, unseen: str
) -> None:
  """Names the labels that training does not have: an error, or a warning."""
  pairs = zip(found.labels, found.places, strict=True)
  bad = [f'{where} ({x!r})' for x, where in pairs if x not in names]
  if not bad:
    return
  what = f'{len(bad)} of {len(found.labels)}: {records.some(bad)}'
  if unseen == 'error':
    raise ValueError(
        f'Expected labels of the training data in {data}, got others in {what}:'
        " correct them, or unseen='count'."
    )
  warnings.warn(
      f'Labels of {data} unseen in training, told wrong: {what}.', stacklevel=3
  )


def _model(
    model: Any, tokenizer: Any, run: dict[str, Any]
) -> tuple[encoder.EncoderConfig, Any, tokenizer_lib.Tokenizer]:
  """Returns an encoder's config and weights, without a head, and a tokenizer."""
  if not isinstance(model, hf.Checkpoint):
    is_dtype = lambda name: name.endswith('dtype')
    given = {k: v for k, v in run.items() if v != ''}
    run = {k: jnp.dtype(v) if is_dtype(k) else v for k, v in given.items()}
    model = hf.load(_filled(model), **run)
    run = {}
  checks.that(not run, 'a folder beside how a model is loaded', got=run)
  config = model.config
  checks.that(
      isinstance(config, encoder.EncoderConfig),
      'an encoder of the BERT family',
      model=model.family,
  )
  if isinstance(tokenizer, str | os.PathLike):
    folder = _filled(tokenizer) or model.folder
    if folder is None:
      raise ValueError(
          'Expected tokenizer to be a folder for a model that came from none, got'
          ' nothing.'
      )
    tokenizer = tokenizer_lib.load(folder)
  weights = {k: v for k, v in model.params.items() if k != 'classifier'}
  return config, weights, tokenizer


def _add_head(
    config: encoder.EncoderConfig,
    num: int,
    pooling: str,
    head: str,
    weights: Any,
    key: jax.Array,
) -> tuple[encoder.EncoderConfig, Any]:
  """Returns config and weights with a fresh head."""
  return encoder.add_head(config, weights, num, key, pooling=pooling, head=head)


def _encoded(
    words: tokenizer_lib.Tokenizer,
    found: Texts,
    names: Sequence[str],
    max_length: int,
) -> dict[str, np.ndarray]:
  """Returns texts as rows; a label that is unseen is the number of labels."""
  rows = tokenizer_lib.encode_rows(words, found.texts, max_length, found.pairs)
  number = {name: i for i, name in enumerate(names)}
  made = {
      'tokens': rows['tokens'],
      'lengths': rows['mask'].sum(1, dtype=np.int32),
      'y': np.array(
          [number.get(x, len(names)) for x in found.labels], np.int32
      ),
  }
  return made if found.pairs is None else {**made, 'types': rows['types']}


def lengths_of(sizes: np.ndarray, num: int, max_length: int) -> tuple[int, ...]:
  """Returns lengths for rows that take the fewest tokens with their padding.

  Args:
    sizes: tokens of the rows.
    num: most lengths, >= 1.
    max_length: what the last of them is at most.

  Returns:
    At most num lengths, rising: multiples of eight, and max_length where the
    longest row needs it. They hold all rows.
  """
  last = min(-(-int(sizes.max()) // _GRAIN) * _GRAIN, max_length)
  step = -(-last // (32 * _GRAIN)) * _GRAIN  # To look at 32 of them at most.
  inner = range(step, last, step)
  count = np.searchsorted(np.sort(sizes), [*inner, last], side='right')
  held = dict(zip([*inner, last], count.tolist(), strict=True))

  def cost(chosen):
    ends = [0, *(held[x] for x in chosen)]
    return sum(x * n for x, n in zip(chosen, np.diff(ends), strict=True))

  options = itertools.chain.from_iterable(
      itertools.combinations(inner, k) for k in range(min(num, 4))
  )
  return min(((*option, last) for option in options), key=cost)


def _sorted(
    rows: dict[str, np.ndarray], lengths: Sequence[int]
) -> dict[str, np.ndarray]:
  """Returns rows by length, the longest first, each with its place in `lengths`."""
  order = np.argsort(-rows['lengths'], kind='stable')
  made = {name: x[order] for name, x in rows.items()}
  for name in made.keys() & {'tokens', 'types'}:
    made[name] = made[name][:, : lengths[-1]]
  made['lengths'] = np.minimum(made['lengths'], lengths[-1])
  made['bucket'] = np.searchsorted(lengths, made['lengths']).astype(np.int32)
  return {**made, 'index': np.arange(len(order), dtype=np.int32)}


def buckets(bucket: np.ndarray, batch_size: int) -> list[tuple[int, int, int]]:
  """Returns the rows of which batches are made: (bucket, first row, end).

  Args:
    bucket: of each row, falling: see `_sorted`.
    batch_size: b, at most as many as there are rows.

  Returns:
    Whole batches each, filled up with the longest rows of the next bucket; what is
    left over at the end, less than a batch, is rows of the last.
  """
  found, first = [], 0
  for number in range(int(bucket[0]), -1, -1):
    held = int(np.sum(bucket >= number))
    end = first + -(-(held - first) // batch_size) * batch_size
    end = min(end, len(bucket))
    if end > first:
      found.append((number, first, end))
    first = max(first, end)
  if len(found) > 1 and found[-1][2] - found[-1][1] < batch_size:
    (number, start, _), (_, _, end) = found[-2:]
    found[-2:] = [(number, start, end)]
  return found


def _batch(
    bounds: Sequence[tuple[int, int, int]],
    batch_size: int,
    data: dict[str, task_lib.Batch],
    key: jax.Array,
    step: jax.Array,
) -> task_lib.Batch:
  """Returns the rows of a step, of one length, as `Task.batch`.

  An epoch passes through the batches of all buckets. Their order is by the step
  alone; rows are dealt by the key.
  """
  counts = np.array([(end - first) // batch_size for _, first, end in bounds])
  ends = np.cumsum(counts)
  epoch, place = step // ends[-1], step % ends[-1]
  order_key = jax.random.fold_in(jax.random.key(0), epoch)
  number = task_lib.shuffled(order_key, place, int(ends[-1]))
  which = jnp.searchsorted(jnp.asarray(ends), number, side='right')
  within = number - jnp.asarray(ends - counts)[which]
  epoch_key = jax.random.fold_in(key, epoch)
  spots = within * batch_size + jnp.arange(batch_size)

  def deal(first, end):
    return lambda: first + task_lib.shuffled(epoch_key, spots, end - first)

  rows = jax.lax.switch(which, [deal(a, b) for _, a, b in bounds])
  numbers = jnp.asarray([number for number, _, _ in bounds], jnp.int32)
  bucket = jnp.broadcast_to(numbers[which], (batch_size,))
  return {**task_lib.take(data['train'], rows), 'bucket': bucket}


def _at_length(
    lengths: Sequence[int], f: Callable[[Any, task_lib.Batch], Any]
) -> Callable[[Any, task_lib.Batch], Any]:
  """Returns f of a batch cut to the least of the lengths that holds its rows."""

  def cut(params, batch, length):
    short = batch.keys() & {'tokens', 'types'}
    return f(params, {**batch, **{k: batch[k][:, :length] for k in short}})

  def at_length(params, batch):
    branches = [functools.partial(cut, length=length) for length in lengths]
    return jax.lax.switch(jnp.max(batch['bucket']), branches, params, batch)

  return at_length


def _logits(
    config: encoder.EncoderConfig, params: Any, batch: task_lib.Batch
) -> jax.Array:
  """Returns (b, K)."""
  tokens = batch['tokens']
  mask = encoder.mask_of(batch['lengths'], tokens.shape[1])
  out = encoder.apply(config, params, tokens, mask, batch.get('types'))
  assert out.logits is not None
  return out.logits


def _counted(
    config: encoder.EncoderConfig, params: Any, batch: task_lib.Batch
) -> tuple[jax.Array, parts.Weighted]:
  """Returns the loss of labels that were seen, and counts of texts by label."""
  logits, y = _logits(config, params, batch), batch['y']
  told, num = jnp.argmax(logits, axis=1), config.num_labels
  value, weight = encoder.cross_entropy(logits, y, y < num)
  # One place more, for labels that are unseen and for misses.
  count = lambda x: jnp.zeros(num + 1, jnp.int32).at[x].add(1)[:num]
  aux = {
      'hits': count(jnp.where(told == y, y, num)),
      'told': count(told),
      'real': count(y),
  }
  return value, parts.Weighted(weight, aux)


def _loss(
    counted: Callable[..., Any],
    params: Any,
    batch: task_lib.Batch,
    key: Any = None,
) -> tuple[jax.Array, parts.Weighted]:
  """Returns the mean cross-entropy, and the accuracy."""
  del key  # Nothing is dropped.
  value, (weight, aux) = counted(params, batch)
  accuracy = jnp.sum(aux['hits']) / jnp.sum(aux['told'])
  return value, parts.Weighted(weight, {'accuracy': accuracy})


def _metrics(
    counted: Callable[..., Any],
    chunk: int,
    train_rows: int,
    params: Any,
    data: dict[str, task_lib.Batch],
    split: str,
) -> dict[str, jax.Array]:
  """Returns loss, accuracy and macro-F1 of a split."""
  rows = data[split]
  if split == 'train' and train_rows:
    step = -(-len(rows['y']) // train_rows)
    rows = jax.tree.map(lambda x: x[::step], rows)
  value, (_, aux) = parts.chunked(counted, chunk)(params, rows)
  return {
      'loss': value,
      'accuracy': jnp.sum(aux['hits']) / jnp.sum(aux['told']),
      'macro_f1': macro_f1(**aux),
  }


def macro_f1(hits: jax.Array, told: jax.Array, real: jax.Array) -> jax.Array:
  """Returns the mean of F1 over the labels that are there, or were told.

  Args:
    hits: (K,), texts of each label that were told so.
    told: (K,), texts that were told to have it.
    real: (K,), texts that have it.
  """
  both = told + real
  scores = 2 * hits / jnp.maximum(both, 1)
  return jnp.sum(scores) / jnp.maximum(jnp.sum(both > 0), 1)


def _matrices(
    config: encoder.EncoderConfig, select: str
) -> matrices_lib.Matrices:
  """Returns the linear maps of an encoder, all of its layers' for ''."""
  return encoder.matrices(config, *([select] if select else []))


def _preview(
    splits: Mapping[str, Texts],
    names: Sequence[str],
    rows: Mapping[str, np.ndarray],
    lengths: Sequence[int],
) -> str:
  """Returns the first texts, the labels with their numbers, and the lengths."""
  train = splits['train']
  pairs = list(zip(train.labels, train.texts, strict=True))[:3]
  lines = [f'--- {label}: {text:.100}' for label, text in pairs]
  found = {name: train.labels.count(name) for name in names}
  most = sorted(found.items(), key=lambda item: -item[1])
  shown = ', '.join(f'{name} {num}' for name, num in most[:_SHOWN])
  more = f', and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  sizes = ', '.join(f'{len(x.texts)} {split}' for split, x in splits.items())
  spent = np.sum(np.asarray(lengths)[rows['bucket']])
  padding = 100 * (1 - rows['lengths'].sum() / spent)
  in_each = np.bincount(rows['bucket'], minlength=len(lengths))
  each = zip(lengths, in_each, strict=True)
  return '\n'.join(
      [
          *lines,
          f'texts: {sizes}',
          f'{len(names)} labels: {shown}{more}',
          'texts by length of their rows: '
          + ', '.join(f'{n} of {length}' for length, n in each)
          + f'; {padding:.0f}% is padding',
      ]
  )
