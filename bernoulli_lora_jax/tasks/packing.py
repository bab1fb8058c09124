"""Tokenised documents as rows of one length: packed, shuffled, with a place.

Grain packs, by first fit, and knows the place within an epoch. Epochs follow one
another here: no row has documents of two. Grain's own shuffle walks cycles of 2^16
and takes milliseconds an index where there are few documents; NumPy's permutation
of an epoch takes its place.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

from bernoulli_lora_jax import checks

try:
  import grain
  from grain import experimental as grain_experimental
except ImportError as e:
  raise ImportError(
      "Expected the library grain, got none: pip install 'bernoulli_lora_jax[hf]'."
  ) from e

Row = dict[str, np.ndarray]
Document = tuple[
    Sequence[int], Sequence[bool]
]  # Ids, which of them are trained.


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
  """Documents one after another, a source of Grain; five bytes a token.

  Attributes:
    tokens: (n,) int32, of all.
    mask: (n,) bool: tokens that are predicted.
    ends: (d,) int64, where each document ends.
  """

  tokens: np.ndarray
  mask: np.ndarray
  ends: np.ndarray

  @classmethod
  def of(cls, documents: Sequence[Document]) -> 'Documents':
    """Returns documents; the first token of each has nothing to be predicted by."""
    ends = np.cumsum([len(ids) for ids, _ in documents], dtype=np.int64)
    size = int(ends[-1]) if len(ends) else 0
    tokens, mask = np.empty(size, np.int32), np.empty(size, bool)
    for end, (ids, trained) in zip(ends, documents, strict=True):
      place = slice(int(end) - len(ids), int(end))
      tokens[place], mask[place] = ids, trained
      mask[place.start] = False
    return cls(tokens, mask, ends)

  def __len__(self) -> int:
    return len(self.ends)

  def __getitem__(self, i: Any) -> Row:
    place = slice(self.ends[i - 1] if i else 0, self.ends[i])
    weights = self.mask[place].astype(np.float32)
    return {'tokens': self.tokens[place], 'weights': weights}

  @functools.cached_property
  def digest(self) -> str:
    """Returns a hash of all."""
    parts = (self.tokens, self.mask, self.ends)
    joined = hashlib.sha256()
    for part in parts:
      joined.update(np.ascontiguousarray(part).view(np.uint8).data)
    return joined.hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Packing:
  """How documents become rows.

  Attributes:
    length: of a row, >= 2; no document is longer.
    max_segments: most runs in a row as a decoder counts them: documents, and the
      padding behind them; >= 2.
    window: rows that are filled at once, >= 1. A document goes into the first of
      them with room for it; where none has, all of them are given out.
    packed: False for one document a row.
  """

  length: int
  max_segments: int = 64
  window: int = 64
  packed: bool = True

  def __post_init__(self):
    checks.integers(2, length=self.length, max_segments=self.max_segments)
    checks.integers(1, window=self.window)


def rows(
    documents: Documents,
    packing: Packing,
    *,
    seed: int | None,
    epoch: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[Row]:
  """Returns the rows of an epoch.

  Args:
    documents: none longer than a row.
    packing: how they become rows.
    seed: of the order, with the epoch; None for the order they have.
    epoch: >= 0.
    process_index: whose part of them, every process_count-th of the order.
    process_count: that share an epoch.

  Returns:
    Rows whose iterators have a place. Arrays (length,): tokens int32, 0 where
    padded; weights float32, 1 for tokens that are predicted; segments int32, from
    1 for every document, 0 where padded; positions int32, from 0 in each document.
  """
  order = np.arange(len(documents))
  if seed is not None:
    order = np.random.default_rng((seed, epoch)).permutation(order)
  mine: Any = order[process_index::process_count]
  dataset = grain.MapDataset.source(mine).map(documents.__getitem__)
  # Read in this thread: they are in memory.
  read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  packed = grain_experimental.FirstFitPackIterDataset(
      dataset.to_iter_dataset(read),
      length_struct={'tokens': packing.length, 'weights': packing.length},
      num_packing_bins=packing.window,
      seed=0,
      shuffle_bins=False,
      max_sequences_per_bin=packing.max_segments - 1 if packing.packed else 1,
  )
  return packed.map(_named)


def _named(row: Row) -> Row:
  return {
      'tokens': row['tokens'],
      'weights': row['weights'],
      'segments': row['tokens_segment_ids'],
      'positions': row['tokens_positions'],
  }


class Stream:
  """Batches of rows, epoch after epoch; see `tasks.task.Stream`.

  A place is JSON: it names the documents, too, so that a run is not resumed on
  others.
  """

  def __init__(
      self,
      documents: Documents,
      packing: Packing,
      batch_size: int,
      *,
      seed: int,
      process_index: int = 0,
      process_count: int = 1,
  ):
    """Starts at the first row.

    Args:
      documents: at least one for each process.
      packing: how they become rows.
      batch_size: rows of this process in a batch.
      seed: >= 0, of the orders of all epochs.
      process_index: whose part of every epoch, in [0, process_count).
      process_count: processes, which share the documents of every epoch.
    """
    checks.integers(1, batch_size=batch_size, process_count=process_count)
    checks.integers(0, seed=seed, process_index=process_index)
    checks.that(
        process_index < process_count,
        f'process_index < process_count={process_count}',
        process_index=process_index,
    )
    checks.that(
        len(documents) >= process_count,
        f'a document for each of {process_count} processes',
        documents=len(documents),
    )
    self._epoch_rows = functools.partial(
        rows,
        documents,
        packing,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )
    self._of = {
        'documents': documents.digest,
        'seed': seed,
        'process': [process_index, process_count],
        **dataclasses.asdict(packing),
    }
    self._size = batch_size
    self._go_to(0)

  def __iter__(self) -> Iterator[Row]:
    return self

  def __next__(self) -> dict[str, Any]:
    """Returns the next batch, NumPy arrays (batch_size, length)."""
    batch = [self._next_row() for _ in range(self._size)]
    return {name: np.stack([row[name] for row in batch]) for name in batch[0]}

  def get_state(self) -> dict[str, Any]:
    """Returns the place before the next batch."""
    return {
        'epoch': self._epoch,
        'place': self._rows.get_state(),
        'of': self._of,
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a place.

    Raises:
      ValueError: a place in other documents or rows, by what differs.
    """
    for name, value in self._of.items():
      checks.that(
          state['of'].get(name) == value,
          f'a place in a stream of {name}={value}',
          **{name: f'{state["of"].get(name)}: the data have changed'},
      )
    self._go_to(state['epoch'])
    self._rows.set_state(state['place'])

  def _go_to(self, epoch: int) -> None:
    self._epoch = epoch
    self._rows = iter(self._epoch_rows(epoch=epoch))

  def _next_row(self) -> Row:
    try:
      return next(self._rows)
    except StopIteration:
      self._go_to(self._epoch + 1)
      return next(self._rows)


def arrays(documents: Documents, packing: Packing) -> Row:
  """Returns all rows of documents in the order they have; (rows, length) each."""
  found = list(rows(documents, packing, seed=None))
  return {name: np.stack([row[name] for row in found]) for name in found[0]}
