"""Runs of the papers' linear regression (X1), many as one program.

Runs of one method that differ in stepsize and seed are one compiled program:
seeds are mapped (of GD vmapped), stepsizes vmapped with the seed's draws shared, so
that PAGE's coin stays a branch, and a minibatch is gathered once for all stepsizes.
The same work as a plain NumPy loop is what its wall time stands beside.
"""

from collections.abc import Sequence
import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.studies import numpy_chain
from bernoulli_lora_jax.tasks import linear_regression
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import programs

ESTIMATORS = ('gd', 'sgd', 'page', 'mvr')
NAMES = {
    'rac_left': 'RAC-LoRA left',
    'rac_right': 'RAC-LoRA right',
    'bernoulli': 'Bernoulli-LoRA',
}
MOMENTUM = 0.9  # 1 - b of MVR.


class Size(NamedTuple):
  """How large X1 is."""

  dim: int  # d, a square.
  num_pretraining: int
  num_samples: int  # N
  batch_size: int
  wide: tuple[int, int]  # (m, n) of the rectangular variant, m n = d.


SIZES = {
    'paper': Size(4096, 90_000, 10_000, 100, (32, 128)),
    'small': Size(256, 9_000, 1_000, 10, (8, 32)),
    'smoke': Size(16, 50, 40, 4, (2, 8)),
}


class Curves(NamedTuple):
  """Runs of one method over seeds and stepsizes."""

  passes: np.ndarray  # (seeds, evaluations), data passes so far.
  norms: np.ndarray  # (seeds, factors, evaluations), ||grad f||^2.
  compile_seconds: float
  seconds: float  # Without compilation.
  numpy_seconds: float | None = None  # Of the same runs as a NumPy loop.


class Timing(NamedTuple):
  """Wall times of some programs; sums of those of `Curves`."""

  seconds: float
  compile_seconds: float
  numpy_seconds: float | None
  part: float  # Of the runs that the NumPy loop did, the others by proportion.

  def __str__(self) -> str:
    text = f'library {self.seconds:.1f} s + {self.compile_seconds:.0f} s compilation'
    if self.numpy_seconds is None:
      return text
    text += f', NumPy loop {self.numpy_seconds:.0f} s'
    if self.part < 1:
      text += f' (from {100 * self.part:.0f}% of the runs)'
    return text


def timing(all_curves: Sequence[Curves], numpy_runs: int) -> Timing:
  """Returns the wall times of programs of which `numpy_runs` runs were timed."""
  theirs = [c.numpy_seconds for c in all_curves if c.numpy_seconds is not None]
  counts = [c.norms.shape[0] * c.norms.shape[1] for c in all_curves]
  return Timing(
      sum(c.seconds for c in all_curves),
      sum(c.compile_seconds for c in all_curves),
      sum(theirs) if len(theirs) == len(all_curves) else None,
      sum(min(numpy_runs, count) for count in counts) / sum(counts),
  )


def make_tasks(
    size: str,
) -> tuple[linear_regression.Problem, task_lib.Task, task_lib.Task]:
  """Returns the problem of X1 at a size, its square task and its wide one."""
  checks.one_of(SIZES, size=size)
  s = SIZES[size]
  problem = linear_regression.make_problem(
      dim=s.dim, num_pretraining=s.num_pretraining, num_samples=s.num_samples
  )
  make = lambda shape: linear_regression.make_task(
      problem, batch_size=s.batch_size, shape=shape
  )
  return problem, make(None), make(s.wide)


def num_steps_of(
    task: task_lib.Task, estimator: str, num_passes: float, num_evals: int
) -> int:
  """Returns the steps that a budget of data passes takes, whole evaluations."""
  part = task.batch_size / task.num_samples
  prob = _page_prob(task)
  cost = {
      'gd': 1.0,
      'sgd': part,
      'page': prob + (1 - prob) * 2 * part,
      'mvr': 2 * part,
  }[estimator]
  return max(1, round(num_passes / cost / num_evals)) * num_evals


def run(
    problem: linear_regression.Problem,
    task: task_lib.Task,
    estimator: str,
    name: str,
    *,
    numpy_runs: int = 0,
    **arguments: Any,
) -> Curves:
  """Returns `train`, with `train_numpy`'s seconds where numpy_runs > 0."""
  found = train(task, estimator, name, **arguments)
  if not numpy_runs:
    return found
  seconds = train_numpy(
      problem, task, estimator, name, num_runs=numpy_runs, **arguments
  )
  return found._replace(numpy_seconds=seconds)


def train(
    task: task_lib.Task,
    estimator: str,
    name: str,
    *,
    factors: Sequence[float],
    num_seeds: int,
    num_steps: int,
    num_evals: int,
    rank: int,
    prob: float | Sequence[float] = 0.5,
) -> Curves:
  """Trains all seeds and stepsizes of a method in one program.

  Args:
    task: that knows its L.
    estimator: 'gd', 'sgd', 'page' or 'mvr'.
    name: 'rac_left', 'rac_right' or 'bernoulli'.
    factors: gamma L of the runs.
    num_seeds: of coins, subspaces and minibatches.
    num_steps: T, a multiple of num_evals.
    num_evals: evaluations after the first.
    rank: r.
    prob: P(left) of 'bernoulli'; a sequence is zipped with the factors.

  Returns:
    `Curves` with num_evals + 1 evaluations, the first at W_0.

  Raises:
    ValueError: evaluations that do not divide the steps, a task without L.
  """
  if num_steps % num_evals:
    raise ValueError(
        f'Expected num_evals={num_evals} to divide num_steps={num_steps}.'
    )
  if task.smoothness is None:
    raise ValueError(f'Expected a task that knows L, got {task.name}.')
  rates = jnp.asarray(factors) / task.smoothness
  probs = prob
  if not isinstance(prob, (int, float)):
    probs = jnp.asarray(prob)

  def one(key, rate, p, data):
    method = methods.gradient_method(
        task.loss,
        methods.make_transformation(name, rate, rank=rank, prob=p),
        estimator=estimator,
        num_samples=task.num_samples,
        batch_size=task.batch_size,
        momentum=MOMENTUM,
    )
    every = num_steps // num_evals

    def measure(state):
      grad = jax.grad(lambda p: task.loss(p, data['train'], None)[0])
      squares = jax.tree.map(lambda g: jnp.vdot(g, g), grad(state.params))
      return sum(jax.tree.leaves(squares)), state.data_passes

    def body(state, i):
      state, _ = programs.steps(
          task, method, every, data, state, key, i * every
      )
      return state, measure(state)

    start = programs.start(task, method, key, task.weights)
    _, rest = jax.lax.scan(body, start, jnp.arange(num_evals))
    return jax.tree.map(
        lambda a, b: jnp.concatenate([a[None], b]), measure(start), rest
    )

  axis = 0 if isinstance(probs, jax.Array) else None
  of_seed = lambda key, data: jax.vmap(one, (None, 0, axis, None), (0, 0))(
      key, rates, probs, data
  )
  # Seeds of GD share the reading of X; others would each gather a minibatch at
  # once, and PAGE's coin would become a select.
  if estimator == 'gd':
    whole = jax.jit(jax.vmap(of_seed, (0, None)))
  else:
    whole = jax.jit(
        lambda keys, data: jax.lax.map(lambda key: of_seed(key, data), keys)
    )
  keys = jnp.stack([jax.random.key(i) for i in range(num_seeds)])
  begun = time.perf_counter()
  compiled = whole.lower(keys, task.data).compile()
  middle = time.perf_counter()
  norms, passes = jax.block_until_ready(compiled(keys, task.data))
  ended = time.perf_counter()
  return Curves(
      np.asarray(passes)[:, 0],
      np.asarray(norms),
      middle - begun,
      ended - middle,
  )


def train_numpy(
    problem: linear_regression.Problem,
    task: task_lib.Task,
    estimator: str,
    name: str,
    *,
    num_runs: int,
    factors: Sequence[float],
    num_seeds: int,
    num_steps: int,
    num_evals: int,
    rank: int,
    prob: float | Sequence[float] = 0.5,
) -> float:
  """Does the work of `train` as a plain NumPy loop; returns its seconds.

  Args:
    problem: of the task.
    task: gives the shape of W and the minibatches' size.
    estimator: as for `train`, like the others.
    name: of `NAMES`.
    num_runs: runs that are done, >= 1, spread over seeds and stepsizes; where
      there are more, the seconds of all are those of these in proportion.
    factors: gamma L of the runs.
    num_seeds: of coins, subspaces and minibatches.
    num_steps: T.
    num_evals: evaluations after the first.
    rank: r.
    prob: P(left) of 'bernoulli'; a sequence is zipped with the factors.

  Raises:
    ValueError: num_runs < 1.
  """
  checks.at_least(1, num_runs=num_runs)
  x, y, b = problem.x, problem.y, task.batch_size
  (shape,) = [w.shape for w in jax.tree.leaves(task.init(jax.random.key(0)))]
  if name != 'bernoulli':
    prob = float(methods.chain_prob(name, 0.5))
  probs = [prob] * len(factors) if isinstance(prob, (int, float)) else prob
  q, every = _page_prob(task), num_steps // num_evals
  pairs = zip(factors, probs, strict=True)
  runs = list(itertools.product(range(num_seeds), pairs))
  chosen = np.linspace(0, len(runs) - 1, min(num_runs, len(runs)))
  begun = time.perf_counter()
  for seed, (factor, p) in [runs[i] for i in chosen.round().astype(int)]:
    rng = np.random.default_rng(seed)

    def each(step, w):
      if step % every == 0:
        grad = numpy_chain.gradient(w.ravel(), x, y, problem.regularisation)
        np.vdot(grad, grad)

    with np.errstate(all='ignore'):  # Long steps diverge.
      numpy_chain.run(
          x,
          y,
          problem.regularisation,
          problem.start.reshape(shape),
          estimator=estimator,
          stepsize=factor / problem.smoothness,
          steps=numpy_chain.draws(rng, shape, rank, p),
          batches=(rng.integers(0, len(y), b) for _ in itertools.count()),
          coins=(bool(rng.random() < q) for _ in itertools.count()),
          num_steps=num_steps,
          momentum=MOMENTUM,
          each=each,
      )
  return (time.perf_counter() - begun) * len(runs) / len(chosen)


def _page_prob(task: task_lib.Task) -> float:
  """Returns q = b / (b + N)."""
  return task.batch_size / (task.batch_size + task.num_samples)
