"""Adam with one second moment a column, which the frames of new links leave as it is.

A chain that trains one thin factor has its gradient alone: S = Q_L^T G, (r, n), where
the right factor trains, S = G Q_R, (m, r), where the left one does. Adam's second
moment is as large as S, and void as soon as the frame is another one. The mean over
the r entries of a column j of the trained side, that of W, is not:

    mean_i S_ij^2 = ||Q_L^T g_j||^2 / r,   E = ||g_j||^2 / m

for frames with E[Q_L Q_L^T] = (r / m) I, g_j being the column of G; a right link has
the rows of G and n in place of m. So v_j has n numbers (m where the left factor
trains) and lives as long as the run, beside a first moment that a link restarts:

    u <- b1 u + (1 - b1) S                      r n numbers
    v_j <- b2 v_j + (1 - b2) mean_i S_ij^2        n
    step: u / (1 - b1^t) / (sqrt(v_j / (1 - b2^T)) + eps)

with t the steps of the link and T those of the run in which the side of this matrix
trained.

How far the mean square of one frame is from what it estimates depends on the law of
the frame. With k = sum_i g_ij^4 / ||g_j||^4, in [1/m, 1],

    rotations     Var = ||g_j||^4 2 (m - r) / (r m^2 (m + 2))
    coordinates   Var = ||g_j||^4 (m - r) (k m - 1) / (r m^2 (m - 1))

(Gaussian frames; coordinates drawn without replacement), so coordinates vary more
where k > 3 / (m + 2): where few features carry a column, up to (m + 2) / 2 times. A
link of K steps has one frame: the variance of v_j for a constant G is the above times
(1 - b2^K) / (1 + b2^K), in the long run.

Reference: Kingma & Ba, Adam, arXiv 1412.6980, for the moments and their corrections.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import restart

_RANK_AXIS = {'left': -1, 'right': -2}  # Of factors (m, r) and (r, n).


class ColumnMoments(NamedTuple):
  """What of `scale_by_column_moments` outlives links."""

  count: Any  # {path: {side: shape=batch, int32}}; steps in which it trained.
  nu: Any  # {path: {'left': (*batch, m), 'right': (*batch, n)}}, as mu in dtype.


class ScaleByColumnMomentsState(NamedTuple):
  """State of `scale_by_column_moments`."""

  count: (
      jax.typing.ArrayLike
  )  # shape=(), dtype=int32; steps of the link so far.
  mu: Any  # Of the factors' shapes, float32 or wider.
  lasting: restart.Lasting  # Of `ColumnMoments`.


def mean_squares(s: jax.Array, side: str) -> jax.Array:
  """Returns the mean square of a factor's entries by column of its own side.

  Args:
    s: (*batch, m, r) of the 'left' factor, (*batch, r, n) of the 'right' one.
    side: which of them.

  Returns:
    (*batch, m) or (*batch, n), in the dtype of s.
  """
  return jnp.mean(jnp.square(s), axis=_RANK_AXIS[side])


def scale_by_column_moments(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
) -> optax.GradientTransformation:
  """Scales gradients of thin factors by one second moment a column.

  For chains of adapters, sketched ones too (`adapters.make_chain`). It keeps r n + n
  numbers of a factor of r n, where Adam keeps 2 r n.

  Args:
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: added to its root, >= 0.

  Returns:
    An `optax.GradientTransformation` of trees {path: {'left': (*batch, m, r),
    'right': (*batch, r, n)}}, or of one of the two. Zeros with which a factor is
    padded, where the rank is above a side, count as entries.

  Raises:
    ValueError: an argument outside its range; at init, leaves that are no factors.

  Guarantees:
    The first moment restarts with a link, the second one and its count go on.
    In a chain, moments of a frozen factor and the count of its second one do not
      move, in an entry of a stack by itself.
    With isotropic orthonormal frames the second moment of a constant gradient has
      the mean ||g_j||^2 / m, g_j the column of G (right: its row, and n).
  """
  checks.within('[0, 1)', b1=b1, b2=b2)
  checks.within('[0, inf)', eps=eps)
  return optax.GradientTransformation(
      _init, functools.partial(_update, b1, b2, eps)
  )


def column_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
) -> optax.GradientTransformation:
  """Returns Adam with one second moment a column, an optimiser of thin factors.

  Args:
    learning_rate: a scalar or a schedule, of the order of Adam's.
    b1: as for `scale_by_column_moments`, like the arguments below.
    b2: decay of the second moment.
    eps: added to its root.

  Returns:
    An `optax.GradientTransformation`.

  Raises:
    ValueError: see `scale_by_column_moments`.
  """
  return optax.chain(
      scale_by_column_moments(b1, b2, eps),
      optax.scale_by_learning_rate(learning_rate),
  )


def _init(params: Any) -> ScaleByColumnMomentsState:
  over = jax.tree_util.tree_map_with_path
  zeros = lambda p, shape: jnp.zeros(shape, matrices_lib.wide(p.dtype))
  seen = jax.tree.map(lambda p: jnp.zeros(p.shape[:-2], jnp.int32), params)
  nu = over(
      lambda path, p: zeros(p, _without(p.shape, _RANK_AXIS[_side(path, p)])),
      params,
  )
  mu = jax.tree.map(lambda p: zeros(p, p.shape), params)
  lasting = restart.Lasting(ColumnMoments(seen, nu))
  return ScaleByColumnMomentsState(jnp.zeros([], jnp.int32), mu, lasting)


def _update(
    b1: Any,
    b2: Any,
    eps: Any,
    updates: Any,
    state: ScaleByColumnMomentsState,
    params: Any = None,
) -> tuple[Any, ScaleByColumnMomentsState]:
  del params
  over = jax.tree_util.tree_map_with_path
  old: ColumnMoments = state.lasting.state
  mu = jax.tree.map(
      lambda s, m: b1 * m + (1 - b1) * s.astype(m.dtype), updates, state.mu
  )
  nu = over(
      lambda path, s, v: b2 * v
      + (1 - b2) * mean_squares(s.astype(v.dtype), _side(path, s)),
      updates,
      old.nu,
  )
  count = optax.safe_increment(state.count)
  seen = jax.tree.map(optax.safe_increment, old.count)

  def scaled(path, s, m, v, steps):
    root = jnp.sqrt(v / _bias(b2, steps, v.dtype)[..., None])
    root = jnp.expand_dims(root, _RANK_AXIS[_side(path, s)])
    return (m / _bias(b1, count, m.dtype) / (root + eps)).astype(s.dtype)

  updates = over(scaled, updates, mu, nu, seen)
  lasting = restart.Lasting(ColumnMoments(seen, nu))
  return updates, ScaleByColumnMomentsState(count, mu, lasting)


def _bias(decay: Any, count: Any, dtype: Any) -> jax.Array:
  """Returns the weight of what a mean that began at zero has seen."""
  return 1 - decay ** count.astype(dtype)


def _side(path: Any, leaf: Any) -> str:
  """Returns which factor a leaf is.

  Raises:
    ValueError: none.
  """
  side = getattr(path[-1], 'key', None) if path else None
  if side not in _RANK_AXIS or jnp.ndim(leaf) < 2:
    raise ValueError(
        'Expected thin factors, leaves left (..., m, r) and right (..., r, n),'
        f' got path={jax.tree_util.keystr(path)!r}, shape={jnp.shape(leaf)}.'
    )
  return side


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
  axis += len(shape)
  return shape[:axis] + shape[axis + 1 :]
