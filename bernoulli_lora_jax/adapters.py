"""A2 and A3: the LoRA family as one policy over pairs of thin factors.

A selected matrix acts as W + s L R with L in R^(m x r), R in R^(r x n) and the
base weight W never differentiated. A *link* is `period` steps of any optimiser
on the trained factors; at its end the product is merged, W <- W + s L R, coin
and frozen factor are drawn anew and the trained one restarts from zero. Which
factors train, how the frozen one is drawn and when links end tells LoRA,
asymmetric LoRA, COLA, RAC-LoRA and Bernoulli-LoRA apart (`ChainPolicy`).

*Side* names the sketched, frozen factor: a left link freezes L = Q_L and trains
R. prob = P(left). With period=1, plain SGD of rate eta and orthonormal frames a
link is the step A1 with gamma = s^2 eta, and draws what `scale_by_bernoulli_chain`
draws from the same key.

    chain = bl.adapters.make_chain(policy, optax.adamw(1e-3))
    state = chain.init(key, params)
    loss = bl.inject.by_product(loss)     # (params, factors, batch) -> scalar, aux
    state, (value, aux) = jax.jit(chain.step, static_argnums=1)(state, loss, batch)
    tuned = chain.params(state)

Reference: Hu et al., LoRA, arXiv 2106.09685; Xia et al., Chain of LoRA, arXiv
2401.04151; Zhu et al., Asymmetry in low-rank adapters, arXiv 2402.16842;
Malinovsky et al., RAC-LoRA, arXiv 2410.08305; Sokolov et al., Bernoulli-LoRA,
arXiv 2508.03820.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import estimators
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import rounding as rounding_lib
from bernoulli_lora_jax import sketches

Matrices = matrices_lib.Matrices
Matrix = matrices_lib.Matrix
Pairs = dict[
    str, dict[str, jax.Array]
]  # {path: {'left' and/or 'right': array}}

SIDES = ('left', 'right', 'bernoulli', None)
_FACTOR, _ROUND = 2, 3  # Purposes folded into a matrix's key; 0, 1: links.py.


@dataclasses.dataclass(frozen=True)
class Target:
  """Which matrices are adapted, and what differs from the policy for them.

  Attributes:
    pattern: regular expression searched in the normalised path.
    rank: None for the policy's, like the others.
    alpha: see `ChainPolicy`.
    prob: see `ChainPolicy`.
  """

  pattern: str
  rank: int | None = None
  alpha: float | None = None
  prob: float | None = None

  def __post_init__(self):
    try:
      re.compile(self.pattern)
    except re.error as e:
      raise ValueError(
          f'Expected pattern to be a regular expression, got {self.pattern!r}:'
          f' {e}.'
      ) from e
    for name in ('rank', 'alpha', 'prob'):
      if getattr(self, name) is not None:
        _check_field(name, getattr(self, name), f' of target {self.pattern!r}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainPolicy:
  """One member of the LoRA family (A3).

  Attributes:
    rank: r >= 1, clipped to the sides of a matrix and at most the longer one.
    period: steps of a link, >= 1; None never merges.
    side: the frozen factor: 'left', 'right', 'bernoulli' (a coin a matrix, a
      layer and a link) or None (both factors are trained).
    prob: P(left) in [0, 1], for 'bernoulli'. A Python 0 or 1 compiles as 'right'
      or 'left'.
    alpha: numerator of the scale s, > 0; None for s = 1.
    scaling: 'rank' for s = alpha / rank, 'sqrt' for s = alpha / sqrt(rank).
    resample: whether each link draws anew; False keeps coin and frozen factor
      of the first link.
    sketch: law of the frozen factor.
    frame: 'orthonormal' (what the theorems assume) or 'raw' (as sampled).
    init: law of the random factor where both are trained: 'uniform', U(+-1/
      sqrt(m)) on the left and U(+-1/sqrt(n)) on the right, or 'normal', N(0, 1).
    zero: which factor starts from zero where both are trained.
    warmup: steps at the start of each link over which the updates grow linearly
      to their full size; 0 for none, less than the period.
    reset_optimizer: whether a link begins with fresh moments. The counts of
      schedules go on.
    rounding: 'nearest', 'stochastic' or 'compensated', see `rounding`.
    shared_coin: one coin for all matrices.
    targets: what is adapted; () for what `Matrices` selects.
  """

  rank: int
  period: int | None
  side: str | None = 'bernoulli'
  prob: float | jax.Array = 0.5
  alpha: float | None = None
  scaling: str = 'rank'
  resample: bool = True
  sketch: sketches.Sketch = sketches.gaussian()
  frame: str = 'orthonormal'
  init: str = 'uniform'
  zero: str = 'right'
  warmup: int = 0
  reset_optimizer: bool = True
  rounding: str = 'nearest'
  shared_coin: bool = False
  targets: tuple[Target, ...] = ()

  def __post_init__(self):
    _check_field('rank', self.rank)
    _check_field('prob', self.prob)
    if self.period is not None:
      _check_field('period', self.period)
    if self.alpha is not None:
      _check_field('alpha', self.alpha)
    choices = {
        'side': SIDES,
        'scaling': ('rank', 'sqrt'),
        'frame': ('orthonormal', 'raw'),
        'init': ('uniform', 'normal'),
        'zero': ('left', 'right'),
        'rounding': rounding_lib.MODES,
    }
    for name, values in choices.items():
      if getattr(self, name) not in values:
        raise ValueError(
            f'Expected {name} in {values}, got {name}={getattr(self, name)!r}.'
        )
    longest = math.inf if self.period is None else self.period
    if not 0 <= self.warmup < longest:
      raise ValueError(
          f'Expected warmup in [0, period={self.period}), got'
          f' warmup={self.warmup}.'
      )


def lora(rank: int, **kwargs: Any) -> ChainPolicy:
  """Returns LoRA: both factors are trained and never merged."""
  return ChainPolicy(rank=rank, side=None, period=None, **kwargs)


def cola(rank: int, period: int, **kwargs: Any) -> ChainPolicy:
  """Returns COLA: both factors are trained, merged and drawn anew."""
  return ChainPolicy(rank=rank, side=None, period=period, **kwargs)


def asymmetric_lora(rank: int, side: str, **kwargs: Any) -> ChainPolicy:
  """Returns asymmetric LoRA: one factor is frozen and kept."""
  return ChainPolicy(rank=rank, side=side, period=None, **kwargs)


def rac_lora(rank: int, period: int, side: str, **kwargs: Any) -> ChainPolicy:
  """Returns RAC-LoRA: the same side is frozen in each link."""
  return ChainPolicy(rank=rank, side=side, period=period, **kwargs)


def bernoulli_lora(
    rank: int, period: int, prob: float | jax.Array = 0.5, **kwargs: Any
) -> ChainPolicy:
  """Returns Bernoulli-LoRA: a coin chooses the frozen side of each link."""
  return ChainPolicy(rank=rank, period=period, prob=prob, **kwargs)


class Adapted(NamedTuple):
  """One adapted matrix with what the policy says about it."""

  matrix: Matrix
  rank: int  # As asked for.
  scale: float  # s
  prob: float | jax.Array | None  # P(left); None: both are trained.

  @property
  def trained(self) -> tuple[str, ...]:
    """The factors that an optimiser sees."""
    if self.prob is None:
      return ('left', 'right')
    is_left = links_lib.known_side(self.prob)
    return {True: ('right',), False: ('left',), None: ('left', 'right')}[
        is_left
    ]

  @property
  def inner(self) -> int:
    """The common dimension of the stored factors."""
    m, n = self.matrix.m, self.matrix.n
    if self.prob is None:
      return min(self.rank, m, n)
    is_left = links_lib.known_side(self.prob)
    return min(self.rank, {True: m, False: n, None: max(m, n)}[is_left])


class Link(NamedTuple):
  """What is drawn at a link."""

  factors: Pairs  # Frozen and trained, at their start.
  coins: dict[str, jax.Array]  # {path: shape=batch, True: left}; traced ones.


class AdapterState(NamedTuple):
  """State of a chain of adapters."""

  params: Any  # Base weights with all finished links merged.
  factors: Pairs  # {path: {'left': (*batch, m, r), 'right': (*batch, r, n)}},
  # float32 or wider.
  coins: dict[str, jax.Array]  # {path: shape=batch, bool}; of traced coins.
  opt_state: Any  # Of the trained factors.
  remainders: dict[str, jax.Array]  # {path: (*batch, m, n)}; 'compensated'.
  count: Any  # shape=(), dtype=int32; steps done.
  key: jax.Array  # shape=(), typed PRNG key; folded with the link.


class Chain(NamedTuple):
  """A policy with its optimiser, as pure functions."""

  policy: ChainPolicy
  matrices: Matrices | None
  adapted: Callable[[Any], list[Adapted]]  # (params) -> what is adapted.
  init: Callable[[jax.Array, Any], AdapterState]  # (key, params) -> state.
  # (state, loss, batch, *args, scale=1) -> (state, (value, aux)); see `make_chain`.
  step: Callable[..., tuple[AdapterState, Any]]
  params: Callable[[AdapterState], Any]  # (state) -> merged weights.
  merge: Callable[[AdapterState], AdapterState]  # The same, kept as the base.


def make_chain(
    policy: ChainPolicy,
    tx: optax.GradientTransformation,
    matrices: Matrices | None = None,
    *,
    num_micro_batches: int = 1,
    average: Callable[[Any], Any] | None = None,
) -> Chain:
  """Returns a chain of adapters as pure functions.

  Args:
    policy: which factors train, how frozen ones are drawn, when links end.
    tx: optimiser of the trained factors, learning rate included. It sees trees
      {path: {'left': (*batch, m, r), 'right': (*batch, r, n)}} with only the
      trained factors; where a coin decides, both, the frozen one with gradient
      zero, and what the optimiser makes of it is dropped.
    matrices: what is a matrix, see `Matrices`; its `select` must be None where
      the policy has targets.
    num_micro_batches: parts of a batch whose gradients are averaged in float32,
      one after another.
    average: mean over data-parallel devices of ((value, aux), gradients).

  Returns:
    A `Chain`. step(state, loss, batch, *args, scale=1.0) ends a link that is
    over, then moves the trained factors by scale times the optimiser's updates.
    loss: (params, factors, batch, *args) -> (scalar, aux), see `inject`.

  Raises:
    ValueError: at init, a pattern that matches nothing, targets that disagree
      about a matrix, a rank above both sides, one array in two places (tied
      weights) of which one is selected, a chain that merges into quantised
      weights.

  Guarantees:
    The base weights are not differentiated and change at links only.
    W + s L R before a link ends and W after it are equal up to the rounding of
      W; the new link starts from L R = 0.
    The frozen factor gets no update, and its moments do not move.
    Coins are independent over links, matrices and layers, P(left) = prob; a flip
      compiles nothing.
  """

  if num_micro_batches < 1:
    raise ValueError(
        'Expected num_micro_batches >= 1, got'
        f' num_micro_batches={num_micro_batches}.'
    )
  tx = optax.with_extra_args_support(tx)
  resolve = functools.partial(_resolve, policy=policy, matrices=matrices)

  def init(key, params):
    found = resolve(params)
    _check_base(params, found, policy)
    base = jax.tree.map(jnp.copy, params)  # A caller may donate the state.
    # Compiled: op by op, frames would round otherwise than in later links.
    drawn = jax.jit(lambda key: draw_link(key, 0, found, policy))(key)
    trained = _trained(drawn.factors, found)
    remainders = {}
    if policy.rounding == 'compensated':
      for one in found:
        m = one.matrix
        remainders[m.path] = jnp.zeros((*m.batch, m.m, m.n), m.dtype)
    return AdapterState(
        params=base,
        factors=drawn.factors,
        coins=drawn.coins,
        opt_state=tx.init(trained),
        remainders=remainders,
        count=jnp.zeros([], jnp.int32),
        key=jnp.copy(key),
    )

  def begin_link(state):
    """Merges, flips, resamples and restarts."""
    found = resolve(state.params)
    state = _merge(state, found, policy)
    link = state.count // policy.period if policy.resample else 0
    drawn = draw_link(state.key, link, found, policy)
    opt_state = state.opt_state
    if policy.reset_optimizer:
      fresh = tx.init(_trained(drawn.factors, found))
      opt_state = restart(fresh, opt_state)
    return state._replace(
        factors=drawn.factors, coins=drawn.coins, opt_state=opt_state
    )

  def step(state, loss, batch, *args, scale=1.0):
    if policy.period is not None:
      is_due = (state.count > 0) & (state.count % policy.period == 0)
      state = jax.lax.cond(is_due, begin_link, lambda s: s, state)
    found = resolve(state.params)
    trained = _trained(state.factors, found)

    def value_of(trained, batch, *args):
      factors = _joined(state.factors, trained)
      return loss(state.params, scaled(factors, found), batch, *args)

    value_and_grad = jax.value_and_grad(value_of, has_aux=True)
    if num_micro_batches > 1:
      value_and_grad = estimators.accumulate(value_and_grad, num_micro_batches)
    out = value_and_grad(trained, batch, *args)
    value, grads = out if average is None else average(out)
    moves = _moving(trained, state.coins)
    grads = _where(moves, grads, jax.tree.map(jnp.zeros_like, grads))
    updates, opt_state = tx.update(
        grads, state.opt_state, trained, value=value[0]
    )
    if policy.warmup:
      place = state.count % policy.period if policy.period else state.count
      scale = scale * jnp.minimum(1.0, (place + 1) / policy.warmup)
    moved = jax.tree.map(
        lambda w, u: w + (scale * u).astype(w.dtype), trained, updates
    )
    state = state._replace(
        factors=_joined(state.factors, _where(moves, moved, trained)),
        opt_state=_keep_frozen(moves, opt_state, state.opt_state),
        count=optax.safe_increment(state.count),
    )
    return state, value

  def merged(state):
    return _merge(state, resolve(state.params), policy)

  return Chain(
      policy,
      matrices,
      resolve,
      init,
      step,
      lambda state: merged(state).params,
      merged,
  )


def draw_link(
    key: jax.Array,
    link: int | jax.Array,
    found: Sequence[Adapted],
    policy: ChainPolicy,
) -> Link:
  """Returns the factors and coins with which a link begins.

  Args:
    key: typed PRNG key of the chain.
    link: number of the link, from 0.
    found: what is adapted.
    policy: how it is drawn.

  Returns:
    A `Link`. The product of each pair is zero.
  """
  link_key = jax.random.fold_in(key, link)
  matrices = [one.matrix for one in found]
  if policy.side is None:
    factors = [_both(link_key, one, policy) for one in found]
    return Link(dict(zip([m.path for m in matrices], factors, strict=True)), {})
  drawn = links_lib.draw_links(
      link_key,
      matrices,
      ranks=[one.rank for one in found],
      probs=[one.prob for one in found if one.prob is not None],
      sketch=policy.sketch,
      shared_coin=policy.shared_coin,
      frame=policy.frame,
  )
  coins = {
      m.path: link.coin
      for m, link in zip(matrices, drawn, strict=True)
      if link.coin is not None
  }
  return Link(
      {
          one.matrix.path: _one_sided(one, link)
          for one, link in zip(found, drawn, strict=True)
      },
      coins,
  )


def scaled(factors: Pairs, found: Sequence[Adapted]) -> Pairs:
  """Returns the factors with the scale s in the right one, as losses see them."""
  return {
      one.matrix.path: {
          'left': factors[one.matrix.path]['left'],
          'right': one.scale * factors[one.matrix.path]['right'],
      }
      for one in found
  }


def restart(fresh: Any, old: Any) -> Any:
  """Returns an optimiser's fresh state with the learning rate's state kept.

  Kept are the counts of schedules, of `optax.inject_hyperparams` and of
  `optax.contrib.reduce_on_plateau`; moments and their own counts restart.

  Args:
    fresh: what the optimiser's init returns.
    old: its state so far.
  """
  kept = (
      optax.ScaleByScheduleState,
      optax.contrib.ReduceLROnPlateauState,
  )
  is_injected = lambda node: hasattr(node, 'hyperparams')

  def choose(new, old):
    if is_injected(old):
      return old._replace(inner_state=restart(new.inner_state, old.inner_state))
    return old if isinstance(old, kept) else new

  return jax.tree.map(
      choose,
      fresh,
      old,
      is_leaf=lambda node: isinstance(node, kept) or is_injected(node),
  )


def describe(
    params: Any,
    policy: ChainPolicy,
    matrices: Matrices | None = None,
) -> list[dict[str, Any]]:
  """Returns a table of what a policy adapts, one row a matrix.

  Args:
    params: tree of arrays or shapes.
    policy: see `ChainPolicy`.
    matrices: what is a matrix.

  Returns:
    Rows {'matrix', 'shape', 'rank', 'P(left)', 'scale', 'stored', 'trained'}:
    numbers stored in factors, and trained at a step in the mean over the coin,
    over all entries of a stack. A rank above a side says '(clipped)'.
  """
  rows = []
  for one in _resolve(params, policy, matrices):
    m = one.matrix
    entries = ''.join(f'{size} x ' for size in m.batch)
    rows.append(
        {
            'matrix': m.path,
            'shape': f'{entries}{m.m} x {m.n}',
            'rank': _rank_text(one),
            'P(left)': '-' if one.prob is None else one.prob,
            'scale': one.scale,
            'stored': m.entries.size * one.inner * (m.m + m.n),
            'trained': m.entries.size * trained_numbers(one),
        }
    )
  return rows


def trained_numbers(one: Adapted) -> Any:
  """Returns the mean number of trained parameters a step of one entry."""
  m, n = one.matrix.m, one.matrix.n
  if one.prob is None:
    return one.inner * (m + n)
  left, right = min(one.rank, m) * n, m * min(one.rank, n)
  return one.prob * left + (1 - one.prob) * right


def unmerge(params: Any, factors: Pairs, matrices: Matrices | None = None):
  """Returns W - L R, the inverse of a merge up to one rounding of W.

  Args:
    params: merged weights.
    factors: {path: {'left', 'right'}}, the scale in the right one (`scaled`).
    matrices: what is a matrix.
  """
  return _add_products(params, factors, matrices, -1.0)


class Extracted(NamedTuple):
  """The change of one matrix as thin factors."""

  left: np.ndarray  # (*batch, m, r)
  right: np.ndarray  # (*batch, r, n)
  error: float  # ||change - left right||_F / ||change||_F, the largest entry's.


def extract(
    base: Any,
    tuned: Any,
    rank: int,
    matrices: Matrices | None = None,
) -> dict[str, Extracted]:
  """Returns the change between two trees as factors of a rank, by SVD.

  A chain of T links of rank r changes a matrix by rank at most T r: rank =
  min(T r, cap) loses nothing beyond the cap and the rounding of the weights.

  Args:
    base: params before.
    tuned: params after, of the same shapes.
    rank: of the factors, clipped to the sides of each matrix.
    matrices: what is a matrix.

  Returns:
    {path: Extracted} with left right the best approximation of its rank.

  Raises:
    ValueError: shapes that differ, with the path and both.
  """
  _check_field('rank', rank)
  check_shapes(base, tuned)
  old, new = jax.tree.leaves(base), jax.tree.leaves(tuned)
  result = {}
  for matrix in matrices_lib.find(base, matrices):
    wide = jnp.promote_types(matrix.dtype, jnp.float32)
    view = lambda leaf, m=matrix, t=wide: m.view(jnp.asarray(leaf)).astype(t)
    change = view(new[matrix.index]) - view(old[matrix.index])
    u, s, vt = jnp.linalg.svd(change, full_matrices=False)
    r = min(rank, matrix.m, matrix.n)
    total = jnp.sqrt(jnp.sum(s**2, -1))
    lost = jnp.sqrt(jnp.sum(s[..., r:] ** 2, -1))
    error = jnp.where(total > 0, lost / jnp.where(total > 0, total, 1), 0)
    root = jnp.sqrt(s[..., :r])
    result[matrix.path] = Extracted(
        np.asarray(u[..., :r] * root[..., None, :]),
        np.asarray(root[..., None] * vt[..., :r, :]),
        float(jnp.max(error)),
    )
  return result


def merge_report(
    params: Any,
    factors: Pairs,
    matrices: Matrices | None = None,
) -> list[dict[str, Any]]:
  """Returns how inexact merging these factors to nearest is, a row a layer.

  Args:
    params: base weights.
    factors: {path: {'left', 'right'}}, the scale in the right one (`scaled`).
    matrices: what is a matrix.

  Returns:
    Rows {'matrix', 'layer', 'largest error', 'relative error', 'update lost'}:
    the largest |error| of an entry, the largest |error| / |W + L R|, and
    ||error||_F / ||L R||_F, the part of the update that the rounding replaces.

  Raises:
    ValueError: a factor that is not finite, by path.
  """
  check_factors(factors)
  leaves = jax.tree.leaves(params)
  rows = []
  for matrix in matrices_lib.find(params, matrices):
    if matrix.path not in factors:
      continue
    left, right = (
        np.asarray(factors[matrix.path][side], np.float64)
        for side in ('left', 'right')
    )
    update = left @ right
    weight = matrix.view(jnp.asarray(leaves[matrix.index]))
    exact = np.asarray(weight, np.float64) + update
    total = weight.astype(_product(factors[matrix.path]).dtype)
    total = total + _product(factors[matrix.path])
    error = np.abs(np.asarray(total.astype(matrix.dtype), np.float64) - exact)
    size = np.abs(exact)
    norm = np.linalg.norm(update, axis=(-2, -1))
    lost = np.linalg.norm(error, axis=(-2, -1))
    for place in np.ndindex(*matrix.batch):
      ratio = np.divide(
          error[place],
          size[place],
          where=size[place] > 0,
          out=np.zeros_like(error[place]),
      )
      rows.append(
          {
              'matrix': matrix.path,
              'layer': int(matrix.entries[place]),
              'largest error': float(error[place].max()),
              'relative error': float(ratio.max()),
              'update lost': float(lost[place] / norm[place])
              if norm[place] > 0
              else 0.0,
          }
      )
  return rows


def check_factors(factors: Pairs) -> None:
  """Raises ValueError for a factor that is not finite, by path and side."""
  for path, pair in factors.items():
    for side, factor in pair.items():
      if not bool(jnp.all(jnp.isfinite(factor))):
        raise ValueError(
            f'Expected finite factors, got NaN or infinity in the {side} factor'
            f' of {path}: nothing was merged.'
        )


def check_shapes(expected: Any, given: Any) -> None:
  """Raises ValueError unless two trees have the same paths and shapes."""
  flat = lambda tree: dict(
      zip(
          matrices_lib.path_names(
              [p for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
          ),
          [tuple(np.shape(leaf)) for leaf in jax.tree.leaves(tree)],
          strict=True,
      )
  )
  old, new = flat(expected), flat(given)
  for path in sorted(old.keys() | new.keys()):
    if old.get(path) != new.get(path):
      raise ValueError(
          f'Expected {path} of shape {old.get(path)}, got'
          f' {new.get(path, "none")}: another model.'
      )


def _resolve(
    params: Any, policy: ChainPolicy, matrices: Matrices | None
) -> list[Adapted]:
  """Returns what is adapted, in the order of the leaves."""
  spec = Matrices() if matrices is None else matrices
  if policy.targets:
    if spec.select is not None:
      raise ValueError(
          'Expected matrices.select to be None where the policy has targets,'
          f' got select={spec.select!r}.'
      )
    leaves = jax.tree_util.tree_flatten_with_path(inject.logical(params))[0]
    paths = matrices_lib.path_names([path for path, _ in leaves])
    chosen = [
        path
        for path in paths
        if any(re.search(t.pattern, path) for t in policy.targets)
    ]
    # Path by path: patterns joined into one may not begin with flags.
    select = '|'.join(f'^{re.escape(path)}$' for path in chosen or ['nothing'])
    spec = dataclasses.replace(spec, select=select)
    _check_targets(policy.targets, chosen, paths)
  found = matrices_lib.find(inject.logical(params), spec)
  found_paths = [matrix.path for matrix in found]
  _check_targets(policy.targets, found_paths, found_paths)
  return [_adapted(matrix, policy) for matrix in found]


def _check_targets(
    targets: Sequence[Target], matched: Sequence[str], listed: Sequence[str]
) -> None:
  for target in targets:
    if not any(re.search(target.pattern, path) for path in matched):
      raise ValueError(
          f'Expected target {target.pattern!r} to match a matrix; the paths are'
          f' {list(listed)}.'
      )


def _adapted(matrix: Matrix, policy: ChainPolicy) -> Adapted:
  matching = [t for t in policy.targets if re.search(t.pattern, matrix.path)]
  values = {}
  for name in ('rank', 'alpha', 'prob'):
    given = {getattr(t, name) for t in matching if getattr(t, name) is not None}
    if len(given) > 1:
      raise ValueError(
          f'Expected targets that agree about {matrix.path}, got'
          f' {[t.pattern for t in matching]} with {name} in {sorted(given)}.'
      )
    values[name] = given.pop() if given else getattr(policy, name)
  rank, alpha = values['rank'], values['alpha']
  if rank > max(matrix.m, matrix.n):
    raise ValueError(
        f'Expected rank <= {max(matrix.m, matrix.n)}, the longer side of'
        f' {matrix.path} ({matrix.m} x {matrix.n}), got rank={rank}.'
    )
  root = rank if policy.scaling == 'rank' else math.sqrt(rank)
  prob = {'left': 1.0, 'right': 0.0, None: None}.get(
      policy.side, values['prob']
  )
  return Adapted(matrix, rank, 1.0 if alpha is None else alpha / root, prob)


def _rank_text(one: Adapted) -> Any:
  m, n = one.matrix.m, one.matrix.n
  left, right = min(one.rank, m), min(one.rank, n)
  if left == right == one.rank:
    return one.rank
  if one.prob is None:
    return f'{min(left, right)} (clipped)'
  is_left = links_lib.known_side(one.prob)
  if is_left is None:
    return f'left {left}, right {right} (clipped)'
  used = left if is_left else right
  return used if used == one.rank else f'{used} (clipped)'


def _check_base(
    params: Any, found: Sequence[Adapted], policy: ChainPolicy
) -> None:
  """Raises for tied weights, and for merges into quantised ones."""
  leaves, _ = jax.tree.flatten(params, is_leaf=inject.is_quantized)
  flat = jax.tree_util.tree_flatten_with_path(
      params, is_leaf=inject.is_quantized
  )[0]
  paths = matrices_lib.path_names([path for path, _ in flat])
  for one in found:
    leaf = leaves[one.matrix.index]
    if inject.is_quantized(leaf) and policy.period is not None:
      raise ValueError(
          f'Expected period=None over the quantised {one.matrix.path}, got'
          f' period={policy.period}: a merge would quantise it again.'
      )
    for i, other in enumerate(leaves):
      if i != one.matrix.index and other is leaf:
        raise ValueError(
            f'Expected {one.matrix.path} to be an array of its own, but it is'
            f' tied to {paths[i]}: adapting one of them would untie them.'
        )


def _both(key: jax.Array, one: Adapted, policy: ChainPolicy) -> dict[str, Any]:
  """Returns the start of a pair that is trained on both sides."""
  m = one.matrix
  dtype = jnp.promote_types(m.dtype, jnp.float32)
  side = 'left' if policy.zero == 'right' else 'right'
  length = m.m if side == 'left' else m.n
  keys = jax.vmap(lambda k: jax.random.fold_in(k, _FACTOR))(
      links_lib.matrix_keys(key, [m])
  )

  def draw(key):
    shape = (length, one.inner)
    if policy.init == 'normal':
      return jax.random.normal(key, shape, dtype)
    bound = 1 / math.sqrt(length)
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  random = jax.vmap(draw)(keys).reshape(*m.batch, length, one.inner)
  if side == 'left':
    zero = jnp.zeros((*m.batch, one.inner, m.n), dtype)
    return {'left': random, 'right': zero}
  zero = jnp.zeros((*m.batch, m.m, one.inner), dtype)
  return {'left': zero, 'right': random.mT}


def _one_sided(one: Adapted, link: links_lib.Link) -> dict[str, jax.Array]:
  """Returns the start of a pair of which one factor is frozen."""
  m = one.matrix
  dtype = jnp.promote_types(m.dtype, jnp.float32)
  left = jnp.zeros((*m.batch, m.m, one.inner), dtype)
  right = jnp.zeros((*m.batch, one.inner, m.n), dtype)
  if link.is_left is not False:
    left = _frozen(link.left, m.m, one, dtype)
  if link.is_left is not True:
    right = _frozen(link.right, m.n, one, dtype).mT
  if link.coin is not None:
    coin = link.coin[..., None, None]
    left = jnp.where(coin, left, jnp.zeros((), dtype))
    right = jnp.where(coin, jnp.zeros((), dtype), right)
  return {'left': left, 'right': right}


def _frozen(
    basis: sketches.Basis, dim: int, one: Adapted, dtype: Any
) -> jax.Array:
  """Returns a basis as (*batch, dim, inner), with zero columns to the right."""
  if basis is None:
    basis = jnp.broadcast_to(
        jnp.eye(dim, dtype=dtype), (*one.matrix.batch, dim, dim)
    )
  elif not sketches.is_frame(basis):
    basis = jax.nn.one_hot(basis, dim, dtype=dtype).mT
  missing = one.inner - basis.shape[-1]
  widths = [(0, 0)] * (basis.ndim - 1) + [(0, missing)]
  return jnp.pad(basis.astype(dtype), widths)


def _trained(factors: Pairs, found: Sequence[Adapted]) -> Pairs:
  """Returns the factors that an optimiser sees."""
  return {
      one.matrix.path: {
          side: factors[one.matrix.path][side] for side in one.trained
      }
      for one in found
  }


def _joined(factors: Pairs, trained: Pairs) -> Pairs:
  return {path: {**factors[path], **trained[path]} for path in factors}


def _moving(trained: Pairs, coins: dict[str, jax.Array]) -> Pairs:
  """Returns {path: {side: does it train?}}, broadcastable to the factors."""
  always = jnp.ones((), bool)
  moves = {}
  for path, pair in trained.items():
    moves[path] = {side: always for side in pair}
    if path in coins:
      is_left = coins[path][..., None, None]
      moves[path] = {'left': ~is_left, 'right': is_left}
  return moves


def _where(condition: Any, new: Any, old: Any) -> Any:
  return jax.tree.map(jnp.where, condition, new, old)


def _keep_frozen(moves: Pairs, new: Any, old: Any) -> Any:
  """Returns a new optimiser state with the moments of frozen factors kept.

  What belongs to a factor is told by the end of its path, so copies below
  `optax.masked` or `optax.partition` and reduced ones (Adafactor) count too.
  """

  def keep(path, n, o):
    names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    move = moves.get(names[-2], {}).get(names[-1]) if names[1:] else None
    if move is None:
      return n
    batch = move.shape[:-2]
    if n.shape[: len(batch)] != batch:
      return n
    return jnp.where(move.reshape(batch + (1,) * (n.ndim - len(batch))), n, o)

  return jax.tree_util.tree_map_with_path(keep, new, old)


def _product(pair: dict[str, jax.Array]) -> jax.Array:
  """Returns L R in the factors' dtype, at full precision."""
  return jnp.matmul(
      pair['left'], pair['right'], precision=jax.lax.Precision.HIGHEST
  )


def _add_products(
    params: Any, factors: Pairs, matrices: Matrices | None, sign: float
) -> Any:
  """Returns W + sign L R, rounded to nearest."""
  leaves, treedef = jax.tree.flatten(params)
  for matrix in matrices_lib.find(params, matrices):
    if matrix.path in factors:
      update = sign * _product(factors[matrix.path])
      weight = matrix.view(leaves[matrix.index])
      leaves[matrix.index] = matrix.unview(
          (weight.astype(update.dtype) + update).astype(matrix.dtype)
      )
  return treedef.unflatten(leaves)


def _merge(
    state: AdapterState, found: Sequence[Adapted], policy: ChainPolicy
) -> AdapterState:
  """Returns the state with the products in the weights and L R = 0.

  The barriers keep a compiler from fusing the merge with its surroundings, so
  that a replay rounds as the run did.
  """
  leaves, treedef = jax.tree.flatten(state.params, is_leaf=inject.is_quantized)
  factors, remainders = dict(state.factors), dict(state.remainders)
  link_key = jax.random.fold_in(state.key, state.count)
  products = scaled(state.factors, found)
  for one in found:
    m = one.matrix
    if inject.is_quantized(leaves[m.index]):
      raise ValueError(
          'Expected weights of floating point to merge into, got the quantised'
          f' {m.path}: keep its factors beside it.'
      )
    weight, pair = jax.lax.optimization_barrier(
        (m.view(leaves[m.index]), products[m.path])
    )
    total, rest = rounding_lib.add(
        weight,
        _product(pair),
        remainders.get(m.path),
        _round_keys(link_key, m),
        policy.rounding,
    )
    total, rest = jax.lax.optimization_barrier((total, rest))
    leaves[m.index] = m.unview(total)
    if rest is not None:
      remainders[m.path] = rest
    factors[m.path] = _without_product(one, factors[m.path], state.coins)
  return state._replace(
      params=treedef.unflatten(leaves), factors=factors, remainders=remainders
  )


def _round_keys(link_key: jax.Array, matrix: Matrix) -> jax.Array:
  keys = links_lib.matrix_keys(link_key, [matrix])
  fold = lambda key: jax.random.fold_in(key, _ROUND)
  return jax.vmap(fold)(keys).reshape(matrix.batch)


def _without_product(
    one: Adapted, pair: dict[str, jax.Array], coins: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns a pair with L R = 0: its trained factor, or the right one, zero."""
  zeros = jax.tree.map(jnp.zeros_like, pair)
  if one.prob is None:
    return {**pair, 'right': zeros['right']}
  moves = _moving({one.matrix.path: {s: pair[s] for s in one.trained}}, coins)
  moves = moves[one.matrix.path]
  return {**pair, **{s: jnp.where(moves[s], zeros[s], pair[s]) for s in moves}}


def _check_field(name: str, value: Any, where: str = '') -> None:
  if name in ('rank', 'period'):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
      raise TypeError(f'Expected {name}{where} to be an int, got {value!r}.')
    if value < 1:
      raise ValueError(f'Expected {name}{where} >= 1, got {name}={value}.')
  if (
      name == 'prob'
      and not isinstance(value, jax.Array)
      and not 0 <= value <= 1
  ):
    raise ValueError(f'Expected {name}{where} in [0, 1], got {name}={value}.')
  if name == 'alpha' and not (value > 0 and math.isfinite(value)):
    raise ValueError(f'Expected {name}{where} > 0, got {name}={value}.')
