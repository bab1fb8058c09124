"""The gap between population and training loss of adapted models (section 6).

A *run* draws a training sample and frozen factors, fine-tunes W + s L R by
one method of the family, and ends with its gap: population (or test) loss minus
training loss. Runs over methods, ranks r, sample sizes N and many draws are
rows of one compiled program: factors have the largest rank with the columns
beyond r held at zero, samples have the largest size with the examples beyond N
left out, and a method is three numbers of a row, so nothing compiles over the
grid.

Draw d uses the same frames and the same sample in every cell: rank r takes the
first r columns of a frame and size N the first N examples. Cells of one draw
are dependent, draws are not, so the bootstrap resamples draws.

Symbols: Q (dim, r) frozen frame, Delta = W* - W_0 the shift of a teacher,
sigma its label noise, D draws.

Reference: Kratsios et al., Sharp generalization bounds for foundation models
with asymmetric randomized low-rank adapters, arXiv 2506.14530; Zhu et al.,
Asymmetry in low-rank adapters, arXiv 2402.16842.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import exponents
from bernoulli_lora_jax.theory import problems

_COIN, _FRAME, _FACTOR, _BATCH = range(4)  # Purposes folded into a run's key.


class Method(NamedTuple):
  """One member of the family, as numbers: it may be traced."""

  prob: Any  # P(left) of each link, in [0, 1].
  is_chain: Any  # Does a link merge and draw anew?
  trains_both: Any  # LoRA; prob is not used then.


class Row(NamedTuple):
  """One run."""

  method: Method
  rank: Any  # In [1, max_rank].
  size: Any  # In [1, max_size].
  data_key: jax.Array  # Draws the sample.
  frame_key: jax.Array  # Draws coins, frozen factors and minibatches.


class Losses(NamedTuple):
  """The end of a run."""

  train: jax.Array  # Mean over the run's N examples.
  population: jax.Array
  twin: (
      jax.Array
  )  # The gap of the run's twin, mean zero; 0 where there is none.


class Program(NamedTuple):
  """Many runs, compiled, and what they may be asked for."""

  run: Callable[[Row, Any], Losses]  # Rows and losses with a leading axis.
  max_rank: int
  max_size: int


class Gaps(NamedTuple):
  """A grid of runs; arrays have shape (methods, ranks, sizes, draws)."""

  methods: tuple[str, ...]
  ranks: tuple[int, ...]
  sizes: tuple[int, ...]
  train: np.ndarray
  population: np.ndarray
  twin: np.ndarray

  @property
  def gap(self) -> np.ndarray:
    """Population minus train: what a single run shows."""
    return self.population - self.train

  @property
  def controlled(self) -> np.ndarray:
    """The gap minus the twin's: the same mean, much less noise.

    The twin has the run's frozen factors and steps, on the population loss: it
    knows nothing of the sample, so its training loss has its population loss
    for mean.
    """
    return self.gap - self.twin


def methods(prob: float = 0.5) -> dict[str, Method]:
  """Returns the six methods that are compared; `prob` is the chain's P(left).

  Raises:
    ValueError: prob outside [0, 1].
  """
  checks.within('[0, 1]', prob=prob)
  return {
      'asymmetric, left frozen': Method(1.0, False, False),
      'asymmetric, right frozen': Method(0.0, False, False),
      'LoRA': Method(1.0, False, True),
      'RAC, left frozen': Method(1.0, True, False),
      'RAC, right frozen': Method(0.0, True, False),
      f'Bernoulli, p={prob:g}': Method(prob, True, False),
  }


def make_finetune(
    problem: problems.Problem,
    tx: optax.GradientTransformation,
    *,
    max_rank: int,
    max_size: int,
    num_links: int,
    period: int,
    batch_size: int | None = None,
    alpha: float | None = None,
    matrices: matrices_lib.Matrices | None = None,
    on_population: bool = False,
) -> Callable[[Row, Any], tuple[Any, dict]]:
  """Returns one run as a pure function that may be jitted and vmapped.

  Args:
    problem: what is trained.
    tx: optimiser of the trained factors, restarted at each link of a chain.
    max_rank: columns of the factors, >= 1; a rank is clipped to the frozen
      side of each matrix.
    max_size: examples drawn, >= 1.
    num_links: links of a chain, >= 1; every method takes num_links * period
      steps.
    period: steps of a link, >= 1.
    batch_size: examples a step, drawn with replacement from the first N; None
      for all N, at the cost of max_size.
    alpha: numerator of s = alpha / r, > 0; None for s = 1.
    matrices: what is adapted, see `Matrices`.
    on_population: whether steps follow the gradient of the population loss, and
      no sample is used.

  Returns:
    (row, data) -> (params with everything merged, factors of the last link).

  Raises:
    ValueError: an argument outside its range.

  Guarantees:
    Columns beyond the rank and examples beyond the size have no effect.
    A frozen factor keeps its value from the start to the end of its link, and
      a method that is no chain has one link.
    Both frozen sides span a uniformly random subspace; coins have P(left) =
      prob, independent over links and matrices.
  """
  checks.positive(
      max_rank=max_rank,
      max_size=max_size,
      num_links=num_links,
      period=period,
      **({} if batch_size is None else {'batch_size': batch_size}),
      **({} if alpha is None else {'alpha': alpha}),
  )
  if problem.num_samples is not None and max_size > problem.num_samples:
    raise ValueError(
        f'Expected max_size <= {problem.num_samples}, the examples of'
        f' {problem.name}, got max_size={max_size}.'
    )
  found = matrices_lib.find(problem.params, matrices)
  adapted = inject.by_addition(lambda params: params, matrices)

  def finetune(row, data):
    scale = 1.0 if alpha is None else alpha / row.rank
    sample = problem.draw(data, row.data_key, max_size)

    def effective(params, factors):
      scaled = {
          path: {'left': pair['left'], 'right': scale * pair['right']}
          for path, pair in factors.items()
      }
      return adapted(params, scaled)

    def value(factors, params, step):
      if on_population:
        return problem.population(effective(params, factors), data)
      if batch_size is None:
        batch, size = sample, row.size
      else:
        key = jax.random.fold_in(row.frame_key, _BATCH)
        key = jax.random.fold_in(key, step)
        rows = jax.random.randint(key, (batch_size,), 0, row.size)
        batch, size = task_lib.take(sample, rows), batch_size
      return mean_of_first(
          problem.losses(effective(params, factors), batch), size
      )

    def link(carry, i):
      params, factors, opt_state = carry
      is_new = row.method.is_chain | (i == 0)
      number = jnp.where(row.method.is_chain, i, 0)
      key = jax.random.fold_in(row.frame_key, number)
      drawn, moves = draw_link(key, found, row.method, row.rank, max_rank)
      params = _where(is_new, effective(params, factors), params)
      factors = _where(is_new, drawn, factors)
      opt_state = _where(is_new, tx.init(drawn), opt_state)

      def step(carry, j):
        factors, opt_state = carry
        grads = jax.grad(value)(factors, params, i * period + j)
        grads = jax.tree.map(_masked, moves, grads)
        updates, opt_state = tx.update(grads, opt_state, factors)
        updates = jax.tree.map(_masked, moves, updates)
        return (optax.apply_updates(factors, updates), opt_state), None

      (factors, opt_state), _ = jax.lax.scan(
          step, (factors, opt_state), jnp.arange(period)
      )
      return (params, factors, opt_state), None

    # The first link merges nothing and draws.
    zeros = {
        matrix.path: {
            side: jnp.zeros(shape, matrices_lib.wide(matrix.dtype))
            for side, shape in _shapes(matrix, max_rank).items()
        }
        for matrix in found
    }
    carry = (problem.params, zeros, tx.init(zeros))
    (params, factors, _), _ = jax.lax.scan(link, carry, jnp.arange(num_links))
    return effective(params, factors), factors

  return finetune


def draw_link(
    key: jax.Array,
    found: Sequence[matrices_lib.Matrix],
    method: Method,
    rank: Any,
    max_rank: int,
) -> tuple[dict, dict]:
  """Returns the factors with which a link begins, and which entries train.

  The first r columns of a frame of more columns are a frame of rank r: they
  span what the first r Gaussian columns span.

  Args:
    key: typed PRNG key of the link.
    found: the matrices, see `matrices.find`.
    method: who trains; may be traced.
    rank: r in [1, max_rank]; may be traced.
    max_rank: columns of the factors.

  Returns:
    {path: {'left': (*batch, m, max_rank), 'right': (*batch, max_rank, n)}}, the
    trained side zero (of LoRA L ~ U(+-1/sqrt m) and R = 0), and a tree of
    booleans like it.
  """
  pairs = {
      matrix.path: _draw_matrix(
          links_lib.matrix_keys(key, [matrix]), matrix, method, rank, max_rank
      )
      for matrix in found
  }
  factors, moves = (
      {path: pair[i] for path, pair in pairs.items()} for i in range(2)
  )
  return factors, moves


def _draw_matrix(
    keys: jax.Array,
    matrix: matrices_lib.Matrix,
    method: Method,
    rank: Any,
    max_rank: int,
) -> tuple[dict, dict]:
  """Returns `draw_link` of one matrix; `keys` has one for each of its batch."""
  shapes = _shapes(matrix, max_rank)
  view = lambda x: x.reshape(*matrix.batch, *x.shape[1:])
  each = lambda function, purpose: view(
      jax.vmap(lambda key: function(jax.random.fold_in(key, purpose)))(keys)
  )

  def frame(key, dim):
    columns = min(dim, max_rank)
    basis = sketches.gaussian().frame(key, dim, columns, matrix.dtype)
    return jnp.pad(basis, ((0, 0), (0, max_rank - columns)))

  prob = jnp.asarray(method.prob, jnp.float32)  # One draw in any precision.
  coins = each(lambda key: jax.random.bernoulli(key, prob), _COIN)
  is_left = coins[..., None, None]
  frozen_left = each(lambda key: frame(key, matrix.m), _FRAME)
  frozen_right = each(lambda key: frame(key, matrix.n).T, _FRAME)
  bound = 1 / math.sqrt(matrix.m)
  uniform = each(
      lambda key: jax.random.uniform(
          key, (matrix.m, max_rank), frozen_left.dtype, -bound, bound
      ),
      _FACTOR,
  )
  both = jnp.asarray(method.trains_both)
  column = jnp.arange(max_rank) < rank
  kept = {
      'left': jnp.broadcast_to(column, shapes['left']),
      'right': jnp.broadcast_to(column[:, None], shapes['right']),
  }
  left = jnp.where(both, uniform, jnp.where(is_left, frozen_left, 0.0))
  right = jnp.where(is_left | both, 0.0, frozen_right)
  factors = {
      'left': jnp.where(kept['left'], left, 0.0),
      'right': jnp.where(kept['right'], right, 0.0),
  }
  moves = {
      'left': kept['left'] & (both | ~is_left),
      'right': kept['right'] & (both | is_left),
  }
  return factors, moves


def _shapes(matrix: matrices_lib.Matrix, max_rank: int) -> dict[str, tuple]:
  return {
      'left': (*matrix.batch, matrix.m, max_rank),
      'right': (*matrix.batch, max_rank, matrix.n),
  }


def make_grid(
    problem: problems.Problem, tx: optax.GradientTransformation, **settings: Any
) -> Program:
  """Returns the compiled program of many runs: (rows, data) -> `Losses`.

  Args:
    problem: what is trained.
    tx: see `make_finetune`, as the settings.
    **settings: of `make_finetune`.

  Returns:
    A `Program`. One length of rows compiles once, whatever they say.
  """
  finetune = make_finetune(problem, tx, **settings)
  find_twin = make_finetune(problem, tx, **settings, on_population=True)

  def run(row, data):
    params, _ = finetune(row, data)
    sample = problem.draw(data, row.data_key, settings['max_size'])
    train = lambda params: mean_of_first(
        problem.losses(params, sample), row.size
    )
    population = lambda params: problem.population(params, data)
    gap = lambda params: population(params) - train(params)
    twin = gap(find_twin(row, data)[0]) if problem.is_exact else jnp.zeros([])
    return Losses(train(params), population(params), twin)

  return Program(
      jax.jit(jax.vmap(run, (0, None))),
      settings['max_rank'],
      settings['max_size'],
  )


def measure(
    program: Program,
    data: Any,
    key: jax.Array,
    *,
    methods: Mapping[str, Method],
    ranks: Sequence[int],
    sizes: Sequence[int],
    num_draws: int,
    chunk: int = 64,
    resample_data: bool = True,
    progress: bool = False,
) -> Gaps:
  """Returns the gaps of all cells and draws.

  Args:
    program: as `make_grid` returns it.
    data: of the problem.
    key: typed PRNG key of the draws.
    methods: name to method, prob in [0, 1].
    ranks: rising, at most the program's max_rank.
    sizes: rising, at most the program's max_size.
    num_draws: draws of each cell, >= 1.
    chunk: rows that are computed at once, >= 1.
    resample_data: whether each draw has a sample of its own; False keeps the
      first draw's, so that draws differ in the frozen factors alone.
    progress: whether to show a bar.

  Returns:
    `Gaps` with float64 arrays.

  Raises:
    ValueError: no method, a prob outside [0, 1], ranks or sizes that do not rise
      from 1 or more or exceed the program's, or counts < 1.
  """
  checks.positive(num_draws=num_draws, chunk=chunk)
  if not methods:
    raise ValueError('Expected at least one method, got none.')
  for name, method in methods.items():
    if not 0 <= method.prob <= 1:
      raise ValueError(
          f'Expected prob in [0, 1], got prob={method.prob} of {name!r}.'
      )
  for name, values, most in (
      ('ranks', ranks, program.max_rank),
      ('sizes', sizes, program.max_size),
  ):
    exponents.check_rising(name, values)
    if values[-1] > most:
      raise ValueError(
          f'Expected {name} <= {most}, what the program was made for, got'
          f' {name}={tuple(values)}.'
      )
  frames, samples = jax.random.split(key)
  draws = jnp.arange(num_draws)
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  frame_keys = fold(frames, draws)
  data_keys = fold(samples, draws if resample_data else 0 * draws)
  axes = (len(methods), len(ranks), len(sizes), num_draws)
  num_rows = math.prod(axes)
  # The last chunk is filled up with rows of the first.
  places = np.arange(-(-num_rows // chunk) * chunk) % num_rows
  i, j, k, d = np.unravel_index(places, axes)
  columns = zip(*methods.values(), strict=True)
  specs = Method(*(jnp.asarray(np.asarray(c)[i]) for c in columns))
  rank_of, size_of = np.asarray(ranks)[j], np.asarray(sizes)[k]
  rows = Row(
      specs,
      jnp.asarray(rank_of),
      jnp.asarray(size_of),
      data_keys[d],
      frame_keys[d],
  )
  parts = []
  with tqdm.tqdm(
      total=num_rows, unit='run', disable=not progress, mininterval=0.5
  ) as bar:
    for start in range(0, len(places), chunk):
      part = jax.tree.map(lambda x, s=start: x[s : s + chunk], rows)
      parts.append(jax.tree.map(np.asarray, program.run(part, data)))
      bar.update(min(chunk, num_rows - start))
  join = lambda *xs: (
      np.concatenate(xs)[:num_rows].astype(np.float64).reshape(axes)
  )
  losses = jax.tree.map(join, *parts)
  return Gaps(tuple(methods), tuple(ranks), tuple(sizes), *losses)


def mean_of_first(losses: jax.Array, size: Any) -> jax.Array:
  """Returns the mean of the first `size` losses; the others count zero."""
  kept = jnp.where(jnp.arange(losses.shape[0]) < size, losses, 0.0)
  return jnp.sum(kept) / size


def _masked(is_kept: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.where(is_kept, x, 0.0)


def _where(condition: Any, new: Any, old: Any) -> Any:
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
