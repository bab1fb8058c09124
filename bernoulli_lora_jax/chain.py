"""A1, the Bernoulli chain of random low-rank updates, as optax transformations.

One link moves W in R^(m x n) by -gamma H_L G with probability p and by
-gamma G H_R otherwise, where H_L = Q_L Q_L^T and H_R = Q_R Q_R^T project onto
fresh random subspaces of dimension min(rank, m) and min(rank, n). Symbols: G
the incoming update, p = prob = P(left); *left* and *right* name the sketched
side, so a left link trains the right factor Q_L^T G, of r x n numbers.

Both kinds of update are a product of two thin factors, (Q_L)(Q_L^T G) or
(G Q_R)(Q_R^T). The coin chooses among factors, the one product outside of the
choice fuses with the learning rate and the addition to W, and nothing of shape
m x m or n x n exists.

Reference: Sokolov et al., Bernoulli-LoRA, arXiv 2508.03820; Malinovsky et al.,
RAC-LoRA, arXiv 2410.08305 (prob 0 or 1).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sketches

Matrices = matrices_lib.Matrices
Matrix = matrices_lib.Matrix
Sketch = sketches.Sketch
ScalarOrSchedule = float | jax.Array | optax.Schedule

_COIN = 0  # Purposes folded into a matrix's key of the link.
_FRAME = 1


class Link(NamedTuple):
  """What one matrix draws at one link."""

  coin: jax.Array | None  # shape=batch, bool, True: left. None: known at trace.
  left: sketches.Basis  # Basis of the left sketch; None when it is all of R^m.
  right: sketches.Basis  # Basis of the right sketch; None when all of R^n.
  is_left: bool | None  # The side where `prob` is 0 or 1, else None.


class ScaleByBernoulliChainState(NamedTuple):
  """State of `scale_by_bernoulli_chain`."""

  count: jax.typing.ArrayLike  # shape=(), int32; updates applied so far.
  key: (
      jax.Array
  )  # shape=(), typed PRNG key; folded with the link, not advanced.
  inner_state: Any  # State of `inner` over {left: (r, n), right: (m, r)}.


def draw_links(
    key: jax.Array,
    found: Sequence[Matrix],
    *,
    rank: int,
    prob: float | jax.Array,
    sketch: Sketch,
    shared_coin: bool = False,
) -> list[Link]:
  """Draws coin and bases for every matrix of a tree.

  Keys are folded from the link's key, the path and the layer of each matrix, so
  a draw depends on nothing else. Bases of one length are drawn together: the
  compiled program grows with the number of different lengths.

  Args:
    key: typed PRNG key of the link.
    found: the matrices, see `matrices.find`.
    rank: dimension of the subspaces, clipped to each side.
    prob: P(left); a Python 0 or 1 draws only the side it needs.
    sketch: law of the subspaces.
    shared_coin: one coin for the whole tree.

  Returns:
    One `Link` for each matrix.
  """
  is_left = _known_side(prob)
  keys = _matrix_keys(key, found)
  coins = None
  if is_left is None:
    toss = lambda key: jax.random.bernoulli(
        jax.random.fold_in(key, _COIN), prob
    )
    coins = (
        jnp.full(keys.shape, toss(key))
        if shared_coin
        else (jax.vmap(toss)(keys))
    )
  sizes = [matrix.entries.size for matrix in found]
  starts = np.cumsum([0] + sizes)
  bases = _draw_bases(keys, starts, found, rank, sketch, is_left)

  def link(i: int) -> Link:
    reshape = lambda x: x.reshape(found[i].batch + x.shape[1:])
    get = lambda side: (reshape(bases[i, side]) if (i, side) in bases else None)
    coin = None if coins is None else reshape(coins[starts[i] : starts[i + 1]])
    return Link(coin, get('left'), get('right'), is_left)

  return [link(i) for i in range(len(found))]


def _matrix_keys(key: jax.Array, found: Sequence[Matrix]) -> jax.Array:
  """Returns the link's key of every entry of every matrix, concatenated."""
  words = np.concatenate(
      [
          np.stack(
              np.broadcast_arrays(*map(np.uint32, m.words), m.entries.ravel()),
              -1,
          )
          for m in found
      ]
  )

  def fold(words):
    folded = key
    for i in range(3):
      folded = jax.random.fold_in(folded, words[i])
    return folded

  return jax.vmap(fold)(jnp.asarray(words))


def _draw_bases(
    keys: jax.Array,
    starts: np.ndarray,
    found: Sequence[Matrix],
    rank: int,
    sketch: Sketch,
    is_left: bool | None,
) -> dict[tuple[int, str], jax.Array]:
  """Returns {(matrix, side): (entries, ...) bases}, drawn once a length.

  Both sides of a square matrix use one draw: only one of them is applied.
  """
  wanted: dict[tuple[int, Any], list[int]] = {}
  for i, matrix in enumerate(found):
    dims = {True: {matrix.m}, False: {matrix.n}, None: {matrix.m, matrix.n}}
    for dim in dims[is_left]:
      if rank < dim:
        dtype = jnp.promote_types(matrix.dtype, jnp.float32)
        wanted.setdefault((dim, dtype), []).append(i)
  drawn = {}
  for (dim, dtype), members in wanted.items():
    places = np.concatenate(
        [np.arange(starts[i], starts[i + 1]) for i in members]
    )
    frame_keys = jax.vmap(lambda key: jax.random.fold_in(key, _FRAME))(
        keys[places]
    )
    stacked = sketch.bases(frame_keys, dim, rank, dtype)
    offset = 0
    for i in members:
      size = int(starts[i + 1] - starts[i])
      part = stacked[offset : offset + size]
      offset += size
      for side, length in (('left', found[i].m), ('right', found[i].n)):
        if length == dim:
          drawn[i, side] = part
  return drawn


def compress(link: Link, g: jax.Array) -> dict[str, jax.Array]:
  """Returns the trained factor's gradients, the unchosen one zero.

  Args:
    link: the draws of this matrix.
    g: (*batch, m, n).

  Returns:
    {'left': (*batch, r, n), 'right': (*batch, m, r)}; only one of them where
    `prob` is a Python 0 or 1.
  """
  sides = {}
  for side, is_left in (('left', True), ('right', False)):
    if link.is_left in (None, is_left):
      sides[side] = sketches.compress(getattr(link, side), g, side)
  return _zero_unchosen(link, sides)


def expand(link: Link, s: dict[str, jax.Array], m: int, n: int) -> jax.Array:
  """Returns Q_L S_left where the coin fell left, else S_right Q_R^T.

  Args:
    link: the draws of this matrix.
    s: as `compress` returns; the unchosen entry is not read.
    m: length of the left side.
    n: length of the right side.

  Returns:
    (*batch, m, n).
  """
  if link.is_left is True:
    return sketches.expand(link.left, s['left'], m, 'left')
  if link.is_left is False:
    return sketches.expand(link.right, s['right'], n, 'right')
  assert link.coin is not None
  coin = link.coin[..., None, None]
  left, right = link.left, link.right
  if sketches.is_frame(left) and sketches.is_frame(right):
    thin = jnp.where(coin, left, s['right'])
    wide = jnp.where(coin, s['left'], right.mT)
    return jnp.matmul(thin, wide)
  return jnp.where(
      coin,
      sketches.expand(left, s['left'], m, 'left'),
      sketches.expand(right, s['right'], n, 'right'),
  )


def _zero_unchosen(
    link: Link, sides: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  if link.coin is None:
    return sides
  coin = link.coin[..., None, None]
  zero = lambda x: jnp.zeros((), x.dtype)
  return {
      'left': jnp.where(coin, sides['left'], zero(sides['left'])),
      'right': jnp.where(coin, zero(sides['right']), sides['right']),
  }


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
  _check(rank, prob, 1)
  if g.ndim != 2:
    raise ValueError(f'Expected g to have shape (m, n), got {g.shape}.')
  found = matrices_lib.find({'g': g})
  _check_ranks(found, rank)
  (link,) = draw_links(
      key, found, rank=rank, prob=prob, sketch=sketch or sketches.gaussian()
  )
  return expand(link, compress(link, g), *g.shape).astype(g.dtype)


def scale_by_bernoulli_chain(
    key: jax.Array,
    *,
    rank: int,
    prob: float | jax.Array = 0.5,
    sketch: Sketch | None = None,
    period: int = 1,
    inner: optax.GradientTransformation | None = None,
    matrices: Matrices | None = None,
    shared_coin: bool = False,
) -> optax.GradientTransformation:
  """Projects each matrix of the updates on a random subspace (A1).

  Leaves that are not matrices pass through unchanged.

  Args:
    key: typed PRNG key; with it and the step all draws are determined.
    rank: dimension of the subspaces, clipped to each side, at least 1 and at
      most the longer side of every matrix.
    prob: P(left), in [0, 1]. A left link sketches R^m and trains the right
      factor. A Python 0 or 1 compiles without a coin.
    sketch: law of the subspaces, default `sketches.gaussian()`.
    period: updates for which coin and subspace are kept (a link), >= 1.
    inner: transformation of the r-dimensional gradients, for example
      `optax.scale_by_adam()` or `optax.trace(0.9)`. It sees, for each matrix, a
      leaf {'left': (r, n), 'right': (m, r)} with the unchosen one zero, must
      not need params, and restarts at each link; its state is O(r(m + n)) a
      matrix. Learning-rate schedules stay outside.
    matrices: what is a matrix, see `Matrices`.
    shared_coin: one coin for all matrices; by default every matrix and every
      entry of a stack tosses its own.

  Returns:
    An `optax.GradientTransformation`.

  Raises:
    ValueError: an argument outside its range; at init, a selection that matches
      nothing or a rank above both sides of a matrix.

  Guarantees:
    With inner=None each update is H_L G or G H_R with H an orthogonal
      projection of rank min(rank, side).
    Coins are independent over links, matrices and entries: P(left) = prob.
    prob=0 and prob=1 are exactly RAC right and RAC left.
    rank >= max(m, n) of a matrix passes its update through.
    Draws depend on key, link, path and layer: not on other leaves, on
      compilation, on restarts, or on whether layers are stacked.

  References:
    Sokolov et al., Bernoulli-LoRA, arXiv 2508.03820, Algorithm 1.
  """
  _check(rank, prob, period)
  sketch = sketches.gaussian() if sketch is None else sketch

  def init(params):
    found = matrices_lib.find(params, matrices)
    _check_ranks(found, rank)
    return ScaleByBernoulliChainState(
        count=jnp.zeros([], jnp.int32),
        key=jnp.copy(key),  # A caller may donate the state.
        inner_state=()
        if inner is None
        else inner.init(_zero_factors(found, rank, prob)),
    )

  def update(updates, state, params=None):
    del params
    found = matrices_lib.find(updates, matrices)
    links = draw_links(
        jax.random.fold_in(state.key, state.count // period),
        found,
        rank=rank,
        prob=prob,
        sketch=sketch,
        shared_coin=shared_coin,
    )  # pyformat: disable
    leaves, treedef = jax.tree.flatten(updates)
    factors: Any = {
        matrix.path: compress(link, matrix.view(leaves[matrix.index]))
        for matrix, link in zip(found, links, strict=True)
    }
    inner_state = state.inner_state
    if inner is not None:
      start = state.count % period == 0
      inner_state = jax.tree.map(
          lambda fresh, old: jnp.where(start, fresh, old),
          inner.init(_zero_factors(found, rank, prob)),
          inner_state,
      )  # pyformat: disable
      factors, inner_state = inner.update(factors, inner_state)
    for matrix, link in zip(found, links, strict=True):
      moved = expand(link, factors[matrix.path], matrix.m, matrix.n)
      leaves[matrix.index] = matrix.unview(moved).astype(matrix.dtype)
    count = optax.safe_increment(state.count)
    return treedef.unflatten(leaves), ScaleByBernoulliChainState(
        count, state.key, inner_state
    )

  return optax.GradientTransformation(init, update)


def bernoulli_lora(
    learning_rate: ScalarOrSchedule,
    key: jax.Array,
    *,
    rank: int,
    prob: float | jax.Array = 0.5,
    **kwargs: Any,
) -> optax.GradientTransformation:
  """Returns Bernoulli-LoRA as an optimiser: W <- W - gamma H_L G or G H_R.

  Args:
    learning_rate: gamma, a scalar or a schedule.
    key: typed PRNG key.
    rank: dimension of the subspaces.
    prob: P(left), in [0, 1].
    **kwargs: as for `scale_by_bernoulli_chain`.

  Returns:
    An `optax.GradientTransformation`.

  References:
    Sokolov et al., Bernoulli-LoRA, arXiv 2508.03820, Algorithm 1.
  """
  return optax.chain(
      scale_by_bernoulli_chain(key, rank=rank, prob=prob, **kwargs),
      optax.scale_by_learning_rate(learning_rate),
  )


def rac_lora(
    learning_rate: ScalarOrSchedule,
    key: jax.Array,
    *,
    rank: int,
    side: str,
    **kwargs: Any,
) -> optax.GradientTransformation:
  """Returns RAC-LoRA: the chain whose coin always falls the same way.

  Args:
    learning_rate: gamma, a scalar or a schedule.
    key: typed PRNG key.
    rank: dimension of the subspaces.
    side: the sketched side: 'left' (prob 1) or 'right' (prob 0).
    **kwargs: as for `scale_by_bernoulli_chain`.

  Returns:
    An `optax.GradientTransformation`.

  Raises:
    ValueError: another side.

  References:
    Malinovsky et al., RAC-LoRA, arXiv 2410.08305, Algorithm 1.
  """
  if side not in ('left', 'right'):
    raise ValueError(f"Expected side to be 'left' or 'right', got {side!r}.")
  prob = 1.0 if side == 'left' else 0.0
  return bernoulli_lora(learning_rate, key, rank=rank, prob=prob, **kwargs)


def trained_parameters(m: int, n: int, *, rank: int, prob: float) -> float:
  """Returns the mean number of trained parameters of one matrix a step.

  Args:
    m: length of the left side.
    n: length of the right side.
    rank: dimension of the subspaces.
    prob: P(left): a left link trains the right factor.

  Returns:
    prob min(rank, m) n + (1 - prob) m min(rank, n).
  """
  return prob * min(rank, m) * n + (1 - prob) * m * min(rank, n)


def describe(
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


def _zero_factors(
    found: Sequence[Matrix], rank: int, prob: float | jax.Array
) -> dict[str, dict[str, jax.Array]]:
  """Returns what `inner` is initialised with: the shapes of `compress`."""
  sides = {True: ('left',), False: ('right',), None: ('left', 'right')}[
      _known_side(prob)
  ]

  def zeros(matrix: Matrix, side: str) -> jax.Array:
    dtype = jnp.promote_types(matrix.dtype, jnp.float32)
    left = (min(rank, matrix.m), matrix.n)
    right = (matrix.m, min(rank, matrix.n))
    shape = left if side == 'left' else right
    return jnp.zeros((*matrix.batch, *shape), dtype)

  return {
      matrix.path: {side: zeros(matrix, side) for side in sides}
      for matrix in found
  }


def _check(rank: int, prob: float | jax.Array, period: int) -> None:
  for name, value in (('rank', rank), ('period', period)):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
      raise TypeError(f'Expected {name} to be an int, got {value!r}.')
    if value < 1:
      raise ValueError(f'Expected {name} >= 1, got {name}={value}.')
  if not _is_traced(prob) and not 0 <= prob <= 1:
    raise ValueError(f'Expected prob in [0, 1], got prob={prob}.')


def _check_ranks(found: Sequence[Matrix], rank: int) -> None:
  for matrix in found:
    if rank > max(matrix.m, matrix.n):
      raise ValueError(
          f'Expected rank <= {max(matrix.m, matrix.n)}, the longer side of'
          f' {matrix.path} ({matrix.m} x {matrix.n}), got rank={rank}.'
      )


def _is_traced(value: Any) -> bool:
  return isinstance(value, jax.Array)


def _known_side(prob: float | jax.Array) -> bool | None:
  """Returns whether links are left when `prob` is a Python 0 or 1, else None."""
  if _is_traced(prob) or prob not in (0, 1):
    return None
  return bool(prob)
