"""The task side of the narrow waist, and how minibatches are drawn.

A task of one's own is a function that returns a `Task`, most easily from arrays:

    def make_task(*, batch_size, width=32):
      return task_lib.from_arrays(
          'mine', loss, init=init, train={'x': x, 'y': y}, batch_size=batch_size)

with config.task.name = 'my_module:make_task' and config.task.kwargs.width = 64.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import parts

Batch = dict[str, jax.Array]
# How minibatches of the training split are drawn: 'replacement', independently and
# with replacement (what T2-T4 assume); 'epochs', by passes through shuffles; 'full',
# all examples each time; 'stream', by an iterator.
SAMPLINGS = ('replacement', 'epochs', 'full', 'stream')

_ROUNDS = 12  # Four are enough for thousands, not for ten elements.


class Stream(Protocol):
  """Batches from an iterator whose place can be stored, as Grain's can."""

  def __next__(self) -> Batch:
    """Returns the next batch, host arrays of one shape from batch to batch."""
    ...

  def get_state(self) -> Any:
    """Returns the place before the next batch: bytes, or JSON values."""
    ...

  def set_state(self, state: Any) -> None:
    """Goes to a place."""
    ...


class Task(NamedTuple):
  """Data, model and loss; any task runs under any method.

  `data` maps a split ('train', and where they exist 'validation', 'test') to a
  batch of all its examples, so `data['train']` is the batch of the full
  gradient; the entry 'clients' of a federated task is no split, see `partition`.
  Data and weights are always arguments of what is compiled, never captured.
  """

  name: str
  init: Callable[[jax.Array], Any]  # (key) -> params to fine-tune.
  data: dict[str, Batch]  # Arrays with a leading axis; 'index' is (N,) int32.
  # (params, batch, key) -> (scalar mean, metrics), or `parts.Weighted` of the
  # metrics where it is a mean over another weight than the examples. Noise comes
  # from fold_in(key, index of the example); key None is the loss without noise.
  loss: Callable[[Any, Batch, jax.Array | None], tuple[jax.Array, Any]]
  num_samples: int  # Examples of the training split.
  batch_size: int
  sampling: str  # One of `SAMPLINGS`.
  # (data, key, step) -> batch. None: a stream has them.
  batch: Callable[[dict[str, Batch], jax.Array, jax.Array], Batch] | None = None
  stream: Callable[[int], Stream] | None = None  # (seed) -> batches from disk.
  # Pre-trained weights, which `init` returns too. None: init makes them.
  weights: Any = None
  # () -> weights read from disk for one run, which owns them: its steps move them
  # in place. `init` tells their shapes alone.
  load: Callable[[], Any] | None = None
  # (key, weights) -> what a run begins from, as weights with a fresh head, for
  # tasks with weights, or load. None: the weights; `init` returns the same.
  begin: Callable[[jax.Array, Any], Any] | None = None
  # (regular expression, '' for all) -> what it selects, where a tree does not tell
  # the axes of its kernels; None: by paths.
  matrices: Callable[[str], matrices_lib.Matrices] | None = None
  # Of a batch in the mean, padding left out, where speed is told in tokens; 0: in
  # steps.
  num_tokens: int = 0
  preview: str = ''  # What a user looks at before training, as examples.
  # (params, data, split) -> metrics, where they are not those of the loss without
  # noise; see `evaluate`.
  metrics: (
      Callable[[Any, dict[str, Batch], str], dict[str, jax.Array]] | None
  ) = None
  chunk: int = (
      0  # Most examples at a time in evaluations, full gradients; 0: all.
  )
  optimum: float | None = None  # f* where it is known.
  lower_bound: float | None = None  # Of f, where one is known.
  # (params, batch) -> (b, K) float, without noise, where the loss is the mean of
  # a convex function `criterion` of each row: 'cross_entropy' (batch['y'] are
  # classes), 'squared' (half of the square) or 'absolute' (batch['y'] are numbers).
  outputs: Callable[[Any, Batch], jax.Array] | None = None
  criterion: str | None = None
  smoothness: float | None = None  # L where it is known.

  def evaluate(
      self, params: Any, data: dict[str, Batch], split: str
  ) -> dict[str, jax.Array]:
    """Returns the metrics of a split, see `evaluate`."""
    return evaluate(self, params, data, split)


def from_arrays(
    name: str,
    loss: Callable[[Any, Batch, jax.Array | None], tuple[jax.Array, Any]],
    *,
    train: Mapping[str, Any],
    batch_size: int,
    init: Callable[[jax.Array], Any] | None = None,
    weights: Any = None,
    validation: Mapping[str, Any] | None = None,
    test: Mapping[str, Any] | None = None,
    sampling: str = 'epochs',
    **more: Any,
) -> Task:
  """Returns a task whose examples are arrays in memory.

  Args:
    name: of the task, in reports.
    loss: (params, batch, key) -> (mean over the batch, {metric: scalar}).
    train: {name: (N, ...)}; 'index', (N,), is added to each split.
    batch_size: examples a minibatch, in [1, N].
    init: (key) -> params; or
    weights: the params, of any key: pre-trained ones.
    validation: what early stopping and plateaus look at.
    test: looked at once, at the end.
    sampling: 'epochs', 'replacement' or 'full'.
    **more: further fields of `Task`.

  Raises:
    ValueError: an argument outside its range, splits whose arrays have other
      leading axes.
  """
  splits = {'train': train, 'validation': validation, 'test': test}
  data = {}
  for split, arrays in splits.items():
    if arrays is not None:
      size = parts.batch_size(dict(arrays))
      index = jnp.arange(size, dtype=jnp.int32)
      data[split] = {
          **{k: jnp.asarray(v) for k, v in arrays.items()},
          'index': index,
      }
  if (init is None) == (weights is None):
    raise ValueError(f'Expected init or weights of task {name!r}, one of them.')
  kinds = {
      'epochs': epoch_batch,
      'replacement': uniform_batch,
      'full': lambda _: lambda data, key, step: data['train'],
  }
  checks.one_of(kinds, sampling=sampling)
  size = len(data['train']['index'])
  check_batch_size(batch_size, size, name)
  weights = jax.tree.map(jnp.asarray, weights)
  return Task(
      name=name,
      init=(lambda key: weights) if init is None else init,
      data=data,
      loss=loss,
      num_samples=size,
      batch_size=batch_size,
      sampling=sampling,
      batch=kinds[sampling](batch_size),
      weights=weights,
      **more,
  )


def check_batch_size(batch_size: int, size: int, name: str) -> None:
  """Raises ValueError for a batch larger than a task's training split, or none."""
  if not 1 <= batch_size <= size:
    raise ValueError(
        f'Expected task.batch_size in [1, {size}], the training examples of'
        f' {name}, got batch_size={batch_size}.'
    )


def check(task: Any, where: str) -> Task:
  """Returns the task; raises where its parts do not fit together.

  Args:
    task: what a user's function returned.
    where: its name.

  Raises:
    ValueError: no `Task`, or a field that is not as `Task` says, by name.
  """
  if not isinstance(task, Task):
    raise ValueError(f'Expected {where} to return a Task, got {task!r:.80}.')
  if task.sampling not in SAMPLINGS:
    raise ValueError(
        f'Expected sampling of {where} in {SAMPLINGS}, got'
        f' sampling={task.sampling!r}.'
    )
  is_stream = task.sampling == 'stream'
  if is_stream != (task.stream is not None) or is_stream == bool(task.batch):
    raise ValueError(
        f"Expected {where} to have stream with sampling='stream', else batch, got"
        f' sampling={task.sampling!r}, stream={task.stream}, batch={task.batch}.'
    )
  if not is_stream and 'train' not in task.data:
    raise ValueError(
        f"Expected data['train'] of {where}, got {sorted(task.data)}."
    )
  split = next(iter(task.data.values()), None)
  if split is None:
    return task
  one = jax.eval_shape(lambda split: take(split, jnp.arange(1)), split)
  with_key = lambda params, batch: task.loss(params, batch, None)
  result = jax.eval_shape(with_key, shapes(task), one)
  is_pair = isinstance(result, tuple) and len(result) == 2
  value, aux = result if is_pair else (None, None)
  metrics = metrics_of(aux)
  if getattr(value, 'shape', None) != () or not isinstance(metrics, dict):
    raise ValueError(
        f'Expected the loss of {where} to return (scalar, {{metric: scalar}}), got'
        f' {result}.'
    )
  for metric, x in metrics.items():
    if x.shape != ():
      raise ValueError(
          f'Expected scalars beside the loss of {where}, got {metric} of shape'
          f' {x.shape}.'
      )
  return task


def shapes(task: Task) -> Any:
  """Returns the shapes of the params; nothing is computed."""
  return jax.eval_shape(task.init, jax.random.key(0))


def example(task: Task) -> Batch:
  """Returns the shapes of a minibatch."""
  if task.batch is None:
    assert task.stream is not None
    return jax.eval_shape(lambda: next(task.stream(0)))
  split = {name: x for name, x in task.data.items() if name != 'clients'}
  return jax.eval_shape(
      lambda data: take(data['train'], jnp.arange(task.batch_size)), split
  )


def metrics_of(aux: Any) -> Any:
  """Returns the metrics of what a loss returns beside its value."""
  if isinstance(aux, parts.Weighted):
    aux = aux.aux
  return {} if aux is None else aux


def evaluate(
    task: Task, params: Any, data: dict[str, Batch], split: str
) -> dict[str, jax.Array]:
  """Returns the metrics of a split: 'loss', without noise, and what is beside it.

  Means are over the whole split, by the weight of the loss, in chunks of
  `task.chunk`.
  """
  if task.metrics is not None:
    return task.metrics(params, data, split)
  plain = lambda params, batch: task.loss(params, batch, None)
  value, aux = parts.chunked(plain, task.chunk)(params, data[split])
  return {'loss': value, **metrics_of(aux)}


def take(split: Batch, rows: jax.Array) -> Batch:
  """Returns the examples at `rows`, shape (b,)."""
  return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), split)


def uniform_batch(batch_size: int):
  """Returns `Task.batch` that draws with replacement, as T2-T4 assume."""

  def batch(data: dict[str, Batch], key: jax.Array, step: jax.Array) -> Batch:
    size = parts.batch_size(data['train'])
    step_key = jax.random.fold_in(key, step)
    rows = jax.random.randint(step_key, (batch_size,), 0, size)
    return take(data['train'], rows)

  return batch


def epoch_batch(batch_size: int):
  """Returns `Task.batch` that passes through a fresh shuffle every epoch.

  An epoch is floor(N / batch_size) batches; what is left over, other examples
  every time, is skipped. The shuffle is evaluated where it is needed (see
  `shuffled`), so any step can be drawn without the steps before it.
  """

  def batch(data: dict[str, Batch], key: jax.Array, step: jax.Array) -> Batch:
    size = parts.batch_size(data['train'])
    steps_per_epoch = size // batch_size
    if steps_per_epoch == 0:
      raise ValueError(
          f'Expected batch_size <= {size}, the number of training examples, got'
          f' batch_size={batch_size}.'
      )
    epoch_key = jax.random.fold_in(key, step // steps_per_epoch)
    first = step % steps_per_epoch * batch_size
    rows = shuffled(epoch_key, first + jnp.arange(batch_size), size)
    return take(data['train'], rows)

  return batch


def shuffled(key: jax.Array, position: jax.Array, size: int) -> jax.Array:
  """Returns the entries of a pseudo-random permutation of range(size).

  A Feistel network on the next even power of two, walked along its
  cycles until it falls below `size`: no array of length `size` is formed, so it
  is cheap inside a training step and under `vmap`.

  Args:
    key: typed PRNG key; names the permutation.
    position: integers in [0, size), any shape.
    size: number of permuted elements, at most 2^30.

  Returns:
    Integers in [0, size), distinct for distinct positions.

  References:
    Black and Rogaway, Ciphers with arbitrary finite domains, 2002 (cycle
    walking).
  """
  half = max(1, ((size - 1).bit_length() + 1) // 2)
  low = jnp.uint32((1 << half) - 1)
  round_keys = jax.random.bits(key, (_ROUNDS,), jnp.uint32)

  def mix(x: jax.Array) -> jax.Array:  # The finaliser of MurmurHash3.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

  def permute(x: jax.Array) -> jax.Array:
    left, right = x >> half, x & low
    for i in range(_ROUNDS):
      left, right = right, left ^ (mix(right + round_keys[i]) & low)
    return (left << half) | right

  def walk(x: jax.Array) -> jax.Array:
    return jnp.where(x < size, x, permute(x))

  x = permute(position.astype(jnp.uint32))
  is_outside = lambda x: jnp.any(x >= size)
  return jax.lax.while_loop(is_outside, walk, x).astype(jnp.int32)
