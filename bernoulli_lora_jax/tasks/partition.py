"""Clients of a federation: which examples each has, as arrays with a client axis.

`iid`, `dirichlet` and `by_group` return the rows of each client; `federate` turns
a task into the federated one: `data['clients']` holds the examples of all M
clients, leaves (M, n, ...) with n the size of the largest and a 'mask' (M, n), 1
for an example, 0 for padding. Its minibatch is all of them; `client_loss` is the
loss of one client, `sample` a minibatch of one.

The objective is f = sum_l w_l f_l with f_l the mean loss over the examples of
client l; weighted by size it is the mean over all examples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import deprecated
from bernoulli_lora_jax import parts as parts_lib
from bernoulli_lora_jax.tasks import task as task_lib

_SPREAD = 1.0  # Of the log-normal law of unequal sizes.


def iid(
    num_samples: int, num_clients: int, *, seed: int, unequal: bool = False
) -> list[np.ndarray]:
  """Returns rows dealt at random.

  Args:
    num_samples: N >= M.
    num_clients: M >= 1.
    seed: of the deal.
    unequal: whether sizes are proportional to log-normal numbers (sigma 1);
      otherwise they differ by one at most.

  Returns:
    M arrays of rows, sorted, that together are range(N); each has one at least.
  """
  _check_clients(num_samples, num_clients)
  rng = np.random.default_rng(seed)
  shares = np.ones(num_clients)
  if unequal:
    shares = rng.lognormal(sigma=_SPREAD, size=num_clients)
  parts = _cut(rng.permutation(num_samples), shares)
  return [np.sort(part) for part in _fill(parts)]


def dirichlet(
    labels: np.ndarray, num_clients: int, *, alpha: float, seed: int
) -> list[np.ndarray]:
  """Returns rows dealt label by label in proportions from Dirichlet(alpha).

  The smaller alpha, the fewer labels a client has; sizes are unequal. A client
  that gets nothing takes one example of the largest one.

  Args:
    labels: (N,).
    num_clients: M >= 1.
    alpha: concentration > 0.
    seed: of the deal.

  Returns:
    M arrays of rows, sorted, that together are range(N); each has one at least.

  Raises:
    ValueError: an argument outside its range.

  References:
    Hsu et al., Measuring the effects of non-identical data distribution, arXiv
    1909.06335; the label-wise form of Yurochkin et al., arXiv 1905.12022.
  """
  labels = np.asarray(labels)
  _check_clients(len(labels), num_clients)
  if not (alpha > 0 and np.isfinite(alpha)):
    raise ValueError(f'Expected alpha > 0 and finite, got alpha={alpha}.')
  rng = np.random.default_rng(seed)
  parts = [np.zeros(0, int)] * num_clients
  for label in np.unique(labels):
    rows = rng.permutation(np.flatnonzero(labels == label))
    shares = rng.dirichlet(np.full(num_clients, alpha))
    cuts = _cut(rows, shares)
    parts = [np.concatenate(pair) for pair in zip(parts, cuts, strict=True)]
  return [np.sort(part) for part in _fill(parts)]


def by_group(groups: np.ndarray) -> list[np.ndarray]:
  """Returns the rows of each natural group (a writer, a device, a section).

  Args:
    groups: (N,), any values; a client for each that occurs, in sorted order.
  """
  groups = np.asarray(groups)
  return [np.flatnonzero(groups == group) for group in np.unique(groups)]


def weights(parts: Sequence[np.ndarray], by: str) -> list[float]:
  """Returns w_l, of sum 1.

  Args:
    parts: rows of each client.
    by: 'size' (n_l / N: f is the mean over all examples) or 'uniform' (1/M).

  Raises:
    ValueError: another law.
  """
  if by not in ('size', 'uniform'):
    raise ValueError(f"Expected weights 'size' or 'uniform', got {by!r}.")
  sizes = [len(part) if by == 'size' else 1 for part in parts]
  return [size / sum(sizes) for size in sizes]


def client_data(
    split: task_lib.Batch, parts: Sequence[np.ndarray]
) -> task_lib.Batch:
  """Returns the examples of all clients, leaves (M, n, ...), and their 'mask'."""
  longest = max(len(part) for part in parts)
  rows = np.zeros((len(parts), longest), np.int32)
  mask = np.zeros((len(parts), longest), np.float32)
  for i, part in enumerate(parts):
    rows[i, : len(part)] = part
    mask[i, : len(part)] = 1
  return {**task_lib.take(split, jnp.asarray(rows)), 'mask': jnp.asarray(mask)}


def federate(task: task_lib.Task, parts: Sequence[np.ndarray]) -> task_lib.Task:
  """Returns the task whose minibatch is the data of all clients.

  Args:
    task: with `data['train']`.
    parts: rows of each client in it.
  """
  clients = client_data(task.data['train'], parts)
  return task._replace(
      data={**task.data, 'clients': clients},
      sampling='full',
      batch=lambda data, key, step: data['clients'],
  )


def client_loss(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Returns the loss of one client: the mean over examples that are no padding.

  Args:
    loss: (params, batch, key) -> (mean over the batch, metrics), as of a task.

  Returns:
    (params, client, key) -> the same, client with leaves (n, ...) and 'mask'.
  """

  def masked(params, client, key):
    is_real = client['mask'] > 0
    # Padding becomes the first example, an own one: zero times the gradient of
    # a broken one would be NaN.
    own = lambda x: jnp.where(
        is_real.reshape(-1, *[1] * (x.ndim - 1)), x, x[:1]
    )
    batch = {name: own(x) for name, x in client.items() if name != 'mask'}
    one = lambda x: jax.tree.map(lambda x: x[None], x)
    value, aux = jax.vmap(lambda x: loss(params, one(x), key))(batch)
    weight = is_real
    if isinstance(aux, parts_lib.Weighted):
      weight = jnp.where(is_real, aux.weight, 0)
    size = jnp.sum(weight)
    size = jnp.where(size > 0, size, 1)
    terms = lambda x: jnp.where(weight > 0, x * weight.astype(x.dtype), 0)
    mean = lambda x: jnp.sum(terms(x)) / size.astype(x.dtype)
    return jax.tree.map(mean, (value, task_lib.metrics_of(aux)))

  return masked


def sample(
    client: task_lib.Batch, key: jax.Array, batch_size: int
) -> task_lib.Batch:
  """Returns a minibatch of one client, drawn with replacement.

  Args:
    client: leaves (n, ...) and 'mask', the examples first.
    key: typed PRNG key.
    batch_size: b >= 1.

  Returns:
    A batch of leaves (b, ...), without 'mask'.
  """
  size = jnp.sum(client['mask'], dtype=jnp.int32)
  rows = jax.random.randint(key, (batch_size,), 0, size)
  rest = {name: x for name, x in client.items() if name != 'mask'}
  return task_lib.take(rest, rows)


def client_table(
    parts: Sequence[np.ndarray], labels: np.ndarray | None = None
) -> list[dict[str, Any]]:
  """Returns a table of the clients: size and, of each label, the examples."""
  rows = []
  for i, part in enumerate(parts):
    row: dict[str, Any] = {'client': i, 'examples': len(part)}
    for label in [] if labels is None else np.unique(labels):
      row[f'label {label}'] = int(np.sum(np.asarray(labels)[part] == label))
    rows.append(row)
  return rows


describe = deprecated.alias(
    'partition.describe', 'partition.client_table', client_table
)


def _cut(rows: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
  """Cuts rows into parts of sizes in proportion to shares."""
  ends = np.round(np.cumsum(shares) / np.sum(shares) * len(rows)).astype(int)
  return np.split(rows, ends[:-1])


def _fill(parts: list[np.ndarray]) -> list[np.ndarray]:
  """Gives each empty part one row of the largest."""
  parts = list(parts)
  for i, part in enumerate(parts):
    if not len(part):
      largest = max(range(len(parts)), key=lambda j: len(parts[j]))
      parts[i], parts[largest] = parts[largest][-1:], parts[largest][:-1]
  return parts


def _check_clients(num_samples: int, num_clients: int) -> None:
  if not 1 <= num_clients <= num_samples:
    raise ValueError(
        f'Expected num_clients in [1, {num_samples}], the examples, got'
        f' num_clients={num_clients}.'
    )
