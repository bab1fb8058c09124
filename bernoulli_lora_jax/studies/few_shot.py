"""What the studies of the NTK regime share: few examples, linearised, and N1."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import ntk
from bernoulli_lora_jax.theory import nuclear


class Few(NamedTuple):
  """A few examples, linearised, and the optimum of N1."""

  problem: ntk.Problem
  lam: float
  solution: nuclear.Solution
  rank: int  # Of the solution, the largest of its matrices.


def few_shot(
    task: task_lib.Task, num_samples: int, seed: int
) -> task_lib.Batch:
  """Returns training examples, as many of each class up to one.

  Args:
    task: of classes batch['y'], shape (N,) int.
    num_samples: N, in [1, examples of the training split].
    seed: of the draw.

  Returns:
    A batch of N distinct examples.

  Raises:
    ValueError: more examples than there are, or no classes.
  """
  labels = np.asarray(task.data['train']['y'])
  checks.that(
      np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1,
      "a task whose data['train']['y'] are classes",
      name=task.name,
  )
  checks.that(
      1 <= num_samples <= len(labels),
      f'num_samples in [1, {len(labels)}], the training examples',
      num_samples=num_samples,
  )
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(labels))
  # Sorted by how many of its class came before: round after round of classes.
  place = np.zeros(len(labels), int)
  for k in np.unique(labels):
    place[labels[order] == k] = np.arange(np.sum(labels == k))
  rows = np.sort(order[np.argsort(place, kind='stable')[:num_samples]])
  return task_lib.take(task.data['train'], jnp.asarray(rows))


def few_problem(
    task: task_lib.Task,
    num_samples: int,
    select: str | None,
    relative_lam: float,
    seed: int,
) -> Few:
  """Returns few examples of a task around its pre-trained weights.

  Args:
    task: classification, with `outputs`.
    num_samples: N of the examples.
    select: regular expression of the matrices; None for all kernels.
    relative_lam: lam over ||grad F||_2 at zero, in (0, 1).
    seed: of the weights and the examples.
  """
  params = task.init(jax.random.key(seed))
  batch = few_shot(task, num_samples, seed)
  problem = ntk.linearize(task, params, batch, selection(select))
  lam = relative_lam * float(nuclear.largest_lam(problem))
  solution = nuclear.solve(problem, lam)
  return Few(problem, lam, solution, numerical_rank(solution.delta))


def selection(select: str | None) -> matrices_lib.Matrices | None:
  """Returns the matrices whose paths match, None for the default."""
  return None if select is None else matrices_lib.Matrices(select=select)


def numerical_rank(delta: ntk.Delta) -> int:
  """Returns the largest number of singular values above rounding."""
  spectra = [np.linalg.svd(x, compute_uv=False) for x in delta.values()]
  top = max(s[0] for s in spectra)
  return max(int(np.sum(s > 1e-6 * top)) for s in spectra)


def check_sizes(relative_lam: float, **sizes: int) -> None:
  """Raises ValueError unless 0 < relative_lam < 1 and all sizes are >= 1."""
  checks.within('(0, 1)', relative_lam=relative_lam)
  checks.at_least(1, **sizes)
