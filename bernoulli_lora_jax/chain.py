"""A1, the Bernoulli chain of random low-rank updates, as optax transformations.

One link moves W in R^(m x n) by -gamma H_L G with probability p and by
-gamma G H_R otherwise, where H_L = Q_L Q_L^T and H_R = Q_R Q_R^T project onto
fresh random subspaces of dimension min(rank, m) and min(rank, n). Symbols: G
the incoming update, p = prob = P(left); *left* and *right* name the sketched
side, so a left link trains the right factor Q_L^T G, of r x n numbers.

What a matrix draws and how its update is made of two thin factors is in
`links.py`; nothing of shape m x m or n x n is ever formed.

Reference: Sokolov et al., Bernoulli-LoRA, arXiv 2508.03820; Malinovsky et al.,
RAC-LoRA, arXiv 2410.08305 (prob 0 or 1).
"""

from collections.abc import Sequence
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import count
from bernoulli_lora_jax import deprecated
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import restart as restart_lib
from bernoulli_lora_jax import sharded
from bernoulli_lora_jax import sketches

Matrices = matrices_lib.Matrices
Matrix = matrices_lib.Matrix
Sketch = sketches.Sketch
Others = optax.GradientTransformation | Literal['freeze'] | None
ScalarOrSchedule = float | jax.Array | optax.Schedule


class ScaleByBernoulliChainState(NamedTuple):
  """State of `scale_by_bernoulli_chain`."""

  count: jax.typing.ArrayLike  # shape=(), int32; updates applied so far.
  key: jax.Array  # shape=(), typed PRNG key; folded with the link.
  inner_state: Any  # State of `inner` over {left: (r, n), right: (m, r)}.
  others_state: Any = ()  # State of `others` over the other leaves.


def project(
    g: jax.Array,
    key: jax.Array,
    *,
    rank: int,
    prob: float | jax.Array = 0.5,
    sketch: Sketch | None = None,
) -> jax.Array:
  """Returns H_L G with probability `prob`, otherwise G H_R (A1).

  Args:
    g: (m, n), floating point.
    key: typed PRNG key.
    rank: dimension of the subspace, in [1, max(m, n)], clipped to each side.
    prob: P(left), in [0, 1].
    sketch: law of the subspaces, default `sketches.gaussian()`.

  Returns:
    (m, n) in the dtype of g.

  Raises:
    ValueError: an argument outside its range, or g not a matrix.

  Guarantees:
    The result is an orthogonal projection of G: <G, HG> = ||HG||^2, and its
      rank is at most min(rank, m) (left) or min(rank, n) (right).
    E[HG] = lmin G for isotropic sketches, with
      lmin = prob min(rank, m)/m + (1 - prob) min(rank, n)/n.
  """
  rank = _checked_rank(rank)
  checks.within('[0, 1]', prob=prob)
  if g.ndim != 2:
    raise ValueError(f'Expected g to have shape (m, n), got {g.shape}.')
  found = matrices_lib.find({'g': g})
  _check_ranks(found, rank)
  (link,) = links_lib.draw_links(
      key,
      found,
      ranks=[rank],
      probs=[prob],
      sketch=sketch or sketches.gaussian(),
  )
  return links_lib.expand(link, links_lib.compress(link, g), *g.shape).astype(
      g.dtype
  )


def scale_by_bernoulli_chain(
    key: jax.Array,
    *,
    rank: int,
    prob: float | jax.Array = 0.5,
    sketch: Sketch | None = None,
    period: int | jax.Array = 1,
    inner: optax.GradientTransformation | None = None,
    others: Others = None,
    matrices: Matrices | None = None,
    shared_coin: bool = False,
    restart: restart_lib.Restart | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Projects each matrix of the updates on a random subspace (A1).

  Args:
    key: typed PRNG key; with it and the step all draws are determined.
    rank: dimension of the subspaces, clipped to each side, at least 1 and at
      most the longer side of every matrix. It gives shapes: under
      `optax.inject_hyperparams` and `jit`, static_args=('rank',) is needed.
    prob: P(left), in [0, 1]. A left link sketches R^m and trains the right
      factor. A Python 0 or 1 compiles without a coin.
    sketch: law of the subspaces, default `sketches.gaussian()`.
    period: updates for which coin and subspace are kept (a link), >= 1.
    inner: transformation of the r-dimensional gradients, for example
      `optax.scale_by_adam()` or `optax.trace(0.9)`, not one with moments that
      outlive links (`scale_by_column_moments`). It sees, for each matrix, a
      leaf {'left': (r, n), 'right': (m, r)} with the unchosen one zero, must
      not need params, and restarts at each link (what belongs to factors does:
      schedules in it go on, see `restart.restart`); its state is O(r(m + n)) a
      matrix.
    others: what moves the leaves that are no matrices. None: `inner` at their
      full size, or nothing where there is no `inner`; no link restarts it.
      'freeze': zero updates and no state. Or a transformation of its own; it
      sees the tree with `optax.MaskedNode` in place of the matrices.
    matrices: what is a matrix, see `Matrices`.
    shared_coin: one coin for all matrices; by default every matrix and every
      entry of a stack tosses its own.
    restart: (fresh, old) -> the state of `inner` at the start of a link, in
      place of the rule; static under `optax.inject_hyperparams`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; extra arguments of its update go
    to `inner` and `others`.

  Raises:
    ValueError: an argument outside its range; at init, a selection that matches
      nothing, a rank above both sides of a matrix, or an `inner` that links
      cannot restart (see `restart.check`).

  Guarantees:
    With inner=None each update is H_L G or G H_R with H an orthogonal
      projection of rank min(rank, side).
    Coins are independent over links, matrices and entries: P(left) = prob.
    prob=0 and prob=1 are exactly RAC right and RAC left.
    rank >= max(m, n) of a matrix passes its update through.
    Draws depend on key, link, path and layer: not on other leaves, on
      compilation, on restarts, or on whether layers are stacked (coins and raw
      samples to the bit, frames to rounding).

  References:
    Sokolov et al., Bernoulli-LoRA, arXiv 2508.03820, Algorithm 1.
  """
  rank = _checked_rank(rank)
  checks.within('[0, 1]', prob=prob)
  _check_period(period)
  spec = _Spec(
      rank,
      prob,
      sketches.gaussian() if sketch is None else sketch,
      period,
      None if inner is None else optax.with_extra_args_support(inner),
      _others(inner if others is None else others),
      matrices,
      shared_coin,
      restart,
  )
  return optax.GradientTransformationExtraArgs(
      functools.partial(_init, spec, key), functools.partial(_update, spec)
  )


class _Spec(NamedTuple):
  """The checked arguments of `scale_by_bernoulli_chain`."""

  rank: int
  prob: float | jax.Array
  sketch: Sketch
  period: int | jax.Array
  inner: optax.GradientTransformationExtraArgs | None
  others: optax.GradientTransformationExtraArgs
  matrices: Matrices | None
  shared_coin: bool
  restart: restart_lib.Restart | None


def _init(
    spec: _Spec, key: jax.Array, params: Any
) -> ScaleByBernoulliChainState:
  """Returns the state before the first link."""
  found = matrices_lib.find(params, spec.matrices)
  _check_ranks(found, spec.rank)
  # Copies: some keep what they are given, and a caller may donate the state.
  first = functools.partial(_first_state, spec, found)
  state = jax.tree.map(
      jnp.copy, sharded.automatic(first, key, params, out=sharded.Spec)
  )
  if restart_lib.has_lasting(state.inner_state):
    # Unchosen sides have gradients of zero, which would wear them out.
    raise ValueError(
        'Expected an inner whose moments restart, got some that outlive links'
        ' (scale_by_column_moments): use a chain of adapters, sketched or not.'
    )
  if spec.inner is not None and spec.restart is None:
    zeros = links_lib.zero_factors(found, spec.rank, spec.prob)
    restart_lib.check(spec.inner, state.inner_state, zeros)
  rest = _without_matrices(params, found)
  if not jax.tree.leaves(rest):
    return state
  others_state = jax.tree.map(jnp.copy, spec.others.init(rest))
  return state._replace(others_state=others_state)


def _first_state(
    spec: _Spec, found: Sequence[Matrix], key: jax.Array, unused_params: Any
) -> ScaleByBernoulliChainState:
  """Returns the state but for what is of the other leaves."""
  inner_state = ()
  if spec.inner is not None:
    zeros = links_lib.zero_factors(found, spec.rank, spec.prob)
    inner_state = spec.inner.init(zeros)
  return ScaleByBernoulliChainState(jnp.zeros([], jnp.int32), key, inner_state)


def _update(
    spec: _Spec, updates: Any, state: Any, params: Any = None, **extra: Any
) -> tuple[Any, ScaleByBernoulliChainState]:
  """Returns `_move`'s results, placed as the updates and the state are."""
  arrays = {name: x for name, x in extra.items() if _is_data(x)}
  functions = {name: x for name, x in extra.items() if name not in arrays}
  return sharded.automatic(
      functools.partial(_move, spec, functions),
      updates,
      state,
      params,
      arrays,
      out=lambda: (sharded.specs(updates), sharded.specs(state)),
  )


def _move(
    spec: _Spec,
    functions: Any,
    updates: Any,
    state: Any,
    params: Any,
    arrays: Any,
) -> tuple[Any, ScaleByBernoulliChainState]:
  """Projects the matrices of the updates; `inner` moves what was projected."""
  found = matrices_lib.find(updates, spec.matrices)
  links = links_lib.draw_links(
      jax.random.fold_in(state.key, state.count // spec.period),
      found,
      ranks=[spec.rank] * len(found),
      probs=[spec.prob] * len(found),
      sketch=spec.sketch,
      shared_coin=spec.shared_coin,
  )
  leaves, treedef = jax.tree.flatten(updates)
  factors: Any = {
      matrix.path: links_lib.compress(link, matrix.view(leaves[matrix.index]))
      for matrix, link in zip(found, links, strict=True)
  }
  inner_state, others_state = state.inner_state, state.others_state
  if spec.inner is not None:
    inner_state = _restarted(
        spec, inner_state, state.count % spec.period == 0, found
    )
    factors, inner_state = spec.inner.update(
        factors, inner_state, None, **arrays, **functions
    )
  rest = _without_matrices(updates, found)
  if jax.tree.leaves(rest):
    params = None if params is None else _without_matrices(params, found)
    rest, others_state = spec.others.update(
        rest, others_state, params, **arrays, **functions
    )
    chosen = {matrix.index for matrix in found}
    places = [i for i in range(len(leaves)) if i not in chosen]
    for i, leaf in zip(places, jax.tree.leaves(rest), strict=True):
      leaves[i] = leaf
  for matrix, link in zip(found, links, strict=True):
    moved = links_lib.expand(link, factors[matrix.path], matrix.m, matrix.n)
    leaves[matrix.index] = matrix.unview(moved).astype(matrix.dtype)
  return treedef.unflatten(leaves), ScaleByBernoulliChainState(
      optax.safe_increment(state.count), state.key, inner_state, others_state
  )


def _restarted(
    spec: _Spec, inner_state: Any, is_start: Any, found: Sequence[Matrix]
) -> Any:
  """Returns the state of `inner`, restarted where a link starts."""
  assert spec.inner is not None
  zeros = links_lib.zero_factors(found, spec.rank, spec.prob)
  rule = spec.restart or functools.partial(restart_lib.restart, trained=zeros)
  return jax.tree.map(
      lambda new, old: new if new is old else jnp.where(is_start, new, old),
      rule(spec.inner.init(zeros), inner_state),
      inner_state,
  )


def _is_data(value: Any) -> bool:
  kinds = (jax.Array, np.ndarray, np.generic, int, float)
  return all(isinstance(leaf, kinds) for leaf in jax.tree.leaves(value))


def bernoulli_lora(
    learning_rate: ScalarOrSchedule,
    key: jax.Array,
    *,
    rank: int,
    prob: float | jax.Array = 0.5,
    sketch: Sketch | None = None,
    period: int | jax.Array = 1,
    inner: optax.GradientTransformation | None = None,
    others: Others = None,
    matrices: Matrices | None = None,
    shared_coin: bool = False,
    restart: restart_lib.Restart | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Returns Bernoulli-LoRA as an optimiser: W <- W - gamma H_L G or G H_R.

  Args:
    learning_rate: gamma, a scalar or a schedule.
    key: typed PRNG key.
    rank: dimension of the subspaces.
    prob: P(left), in [0, 1].
    sketch: as for `scale_by_bernoulli_chain`, like the arguments below.
    period: updates of a link.
    inner: transformation of the r-dimensional gradients.
    others: what moves the leaves that are no matrices; gamma is theirs too, so
      `optax.scale_by_adam()` and not `optax.adam(...)`.
    matrices: what is a matrix.
    shared_coin: one coin for all matrices.
    restart: what of the state of `inner` restarts.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: as `scale_by_bernoulli_chain`, and an `inner` or `others` with a
      learning rate of its own, which would climb.

  References:
    Sokolov et al., Bernoulli-LoRA, arXiv 2508.03820, Algorithm 1.
  """
  for name, tx in (('inner', inner), ('others', others)):
    if isinstance(tx, optax.GradientTransformation):
      _check_sign(name, tx)
  return optax.chain(
      scale_by_bernoulli_chain(
          key,
          rank=rank,
          prob=prob,
          sketch=sketch,
          period=period,
          inner=inner,
          others=others,
          matrices=matrices,
          shared_coin=shared_coin,
          restart=restart,
      ),
      optax.scale_by_learning_rate(learning_rate),
  )


def rac_lora(
    learning_rate: ScalarOrSchedule,
    key: jax.Array,
    *,
    rank: int,
    side: str,
    sketch: Sketch | None = None,
    period: int | jax.Array = 1,
    inner: optax.GradientTransformation | None = None,
    others: Others = None,
    matrices: Matrices | None = None,
    restart: restart_lib.Restart | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Returns RAC-LoRA: the chain whose coin always falls the same way.

  Args:
    learning_rate: gamma, a scalar or a schedule.
    key: typed PRNG key.
    rank: dimension of the subspaces.
    side: the sketched side: 'left' (prob 1) or 'right' (prob 0).
    sketch: as for `scale_by_bernoulli_chain`, like the arguments below.
    period: updates of a link.
    inner: transformation of the r-dimensional gradients.
    others: what moves the leaves that are no matrices; gamma is theirs too.
    matrices: what is a matrix.
    restart: what of the state of `inner` restarts.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: another side.

  References:
    Malinovsky et al., RAC-LoRA, arXiv 2410.08305, Algorithm 1.
  """
  if side not in ('left', 'right'):
    raise ValueError(f"Expected side to be 'left' or 'right', got {side!r}.")
  prob = 1.0 if side == 'left' else 0.0
  return bernoulli_lora(
      learning_rate,
      key,
      rank=rank,
      prob=prob,
      sketch=sketch,
      period=period,
      inner=inner,
      others=others,
      matrices=matrices,
      restart=restart,
  )


def states(opt_state: Any) -> list[ScaleByBernoulliChainState]:
  """Returns the states of chains in an optimiser's state."""
  is_ours = lambda node: isinstance(node, ScaleByBernoulliChainState)
  leaves = jax.tree.leaves(opt_state, is_leaf=is_ours)
  return [node for node in leaves if is_ours(node)]


def sent_numbers(
    state: ScaleByBernoulliChainState,
    params: Any,
    *,
    rank: int,
    prob: float | jax.Array = 0.5,
    period: int = 1,
    matrices: Matrices | None = None,
    shared_coin: bool = False,
) -> jax.Array:
  """Returns how many numbers the next update takes to send, shape ().

  Who has the key draws the subspaces: r n or m r numbers a matrix are enough, by
  its coin. Leaves that are no matrices count whole.

  Args:
    state: before the update.
    params: tree of arrays or shapes.
    rank: as of `scale_by_bernoulli_chain`, like the arguments below.
    prob: P(left).
    period: updates of a link.
    matrices: what is a matrix.
    shared_coin: one coin for all matrices.
  """
  found = matrices_lib.find(params, matrices)
  coins = links_lib.draw_coins(
      jax.random.fold_in(state.key, jnp.asarray(state.count) // period),
      found,
      probs=[prob] * len(found),
      shared_coin=shared_coin,
  )
  chosen = {matrix.path for matrix in found}
  leaves = matrices_lib.named_leaves(params).items()
  # What is known is exact; sizes may be beyond 32 bits.
  known = sum(
      math.prod(np.shape(x)) for path, x in leaves if path not in chosen
  )
  sides = ['right' if links_lib.known_side(prob) else 'left']
  rows = [
      (m.entries.size, count.of_factors(m.m, m.n, rank), coin, sides)
      for m, coin in zip(found, coins, strict=True)
  ]
  return count.sent(rows, known)


trained_parameters = count.mean_trained


def selection_table(
    params: Any,
    *,
    rank: int,
    prob: float,
    matrices: Matrices | None = None,
) -> list[dict[str, Any]]:
  """Returns a table of what a chain trains, one row a matrix.

  Args:
    params: tree of arrays or shapes.
    rank: dimension of the subspaces.
    prob: P(left).
    matrices: what is a matrix.

  Returns:
    Rows {'matrix', 'shape', 'rank', 'P(left)', 'trained'}; the rank shows both
    sides where one is clipped, 'trained' is the mean number of trained
    parameters a step, over all entries of a stack.
  """
  rows = []
  for m in matrices_lib.find(params, matrices):
    entries = 'x '.join(f'{size} ' for size in m.batch)
    left, right = min(rank, m.m), min(rank, m.n)
    rows.append(
        {
            'matrix': m.path,
            'shape': f'{entries and entries + "x "}{m.m} x {m.n}',
            'rank': rank
            if left == right == rank
            else (f'left {left}, right {right} (clipped)'),
            'P(left)': prob,
            'trained': m.entries.size
            * trained_parameters(m.m, m.n, rank=rank, prob=prob),
        }
    )
  return rows


describe = deprecated.alias(
    'chain.describe', 'chain.selection_table', selection_table
)


def _others(others: Any) -> optax.GradientTransformationExtraArgs:
  """Returns the transformation of the leaves that are no matrices."""
  if others is None:
    return optax.with_extra_args_support(optax.identity())
  if isinstance(others, str) and others == 'freeze':
    return optax.with_extra_args_support(optax.set_to_zero())
  if isinstance(others, optax.GradientTransformation):
    return optax.with_extra_args_support(others)
  raise TypeError(
      "Expected others to be None, 'freeze' or a GradientTransformation, got"
      f' {others!r}.'
  )


def _check_sign(name: str, tx: optax.GradientTransformation) -> None:
  """Raises for an optimiser that descends, where gamma turns the sign again."""
  gradient = {'w': jnp.full((2, 2), 1e6)}  # Any noise is small beside it.
  with jax.ensure_compile_time_eval():
    try:
      update = optax.with_extra_args_support(tx).update
      moved: Any = update(gradient, tx.init(gradient), gradient)[0]
      descends = bool(jnp.sum(moved['w']) < 0)
    except Exception:  # It wants a tree, arguments or values not known here.
      return
  if descends:
    raise ValueError(
        f'Expected {name} without a learning rate, as optax.scale_by_adam(), got'
        ' an optimiser whose updates descend: multiplied by -learning_rate they'
        ' would climb.'
    )


def _without_matrices(tree: Any, found: Sequence[Matrix]) -> Any:
  """Returns the tree with `optax.MaskedNode` in place of its matrices."""
  leaves, treedef = jax.tree.flatten(tree)
  for matrix in found:
    leaves[matrix.index] = optax.MaskedNode()
  return treedef.unflatten(leaves)


def _checked_rank(rank: Any) -> int:
  rank = checks.static_int('rank', rank)
  checks.at_least(1, rank=rank)
  return rank


def _check_period(period: Any) -> None:
  is_number = isinstance(period, (int, np.integer))
  if isinstance(period, jax.Array):
    is_number = jnp.issubdtype(period.dtype, jnp.integer)
  if isinstance(period, bool) or not is_number:
    raise TypeError(f'Expected period to be an int, got {period!r}.')
  if not isinstance(period, jax.Array):
    checks.at_least(1, period=period)


def _check_ranks(found: Sequence[Matrix], rank: int) -> None:
  for matrix in found:
    matrices_lib.check_rank(matrix, rank)
