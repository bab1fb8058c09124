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
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bernoulli_lora_jax import estimators
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import merging
from bernoulli_lora_jax import policies
from bernoulli_lora_jax import restart as restart_lib
from bernoulli_lora_jax import rounding as rounding_lib
from bernoulli_lora_jax import sketches

Adapted = policies.Adapted
ChainPolicy = policies.ChainPolicy
Matrices = matrices_lib.Matrices
Matrix = matrices_lib.Matrix
Pairs = merging.Pairs  # {path: {'left' and/or 'right': array}}

_FACTOR, _ROUND = 2, 3  # Purposes folded into a matrix's key; 0, 1: links.py.


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
  # A step's two halves: end the link that is over, if one is; move the factors.
  begin: Callable[[AdapterState], AdapterState]
  move: Callable[..., tuple[AdapterState, Any]]
  params: Callable[[AdapterState], Any]  # (state) -> merged weights.
  merge: Callable[[AdapterState], AdapterState]  # The same, kept as the base.


def make_chain(
    policy: ChainPolicy,
    tx: optax.GradientTransformation,
    matrices: Matrices | None = None,
    *,
    num_micro_batches: int = 1,
    average: Callable[[Any], Any] | None = None,
    restart: restart_lib.Restart | None = None,
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
    restart: (fresh, old) -> the optimiser's state at the start of a link, where
      `policy.reset_optimizer`. None: what holds leaves of factors is fresh,
      schedules and the like go on, see `restart.restart`.

  Returns:
    A `Chain`. step(state, loss, batch, *args, scale=1.0) ends a link that is
    over, then moves the trained factors by scale times the optimiser's updates.
    loss: (params, factors, batch, *args) -> (scalar, aux), see `inject`.

  Raises:
    ValueError: at init, a pattern that matches nothing, targets that disagree
      about a matrix, a rank above both sides, one array in two places (tied
      weights) of which one is selected, a chain that merges into quantised
      weights, an optimiser that links cannot restart (see `restart.check`).

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
  resolve = functools.partial(
      policies.resolve, policy=policy, matrices=matrices
  )

  def init(key, params):
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
      raise TypeError(
          'Expected a typed key, jax.random.key(seed), got an array of dtype'
          f' {key.dtype}: wrap it with jax.random.wrap_key_data.'
      )
    found = resolve(params)
    _check_base(params, found, policy)
    base = jax.tree.map(jnp.copy, params)  # A caller may donate the state.
    # Compiled: op by op, frames would round otherwise than in later links.
    drawn = jax.jit(lambda key: draw_link(key, 0, found, policy))(key)
    # Copies: some optimisers keep what they are given (Prodigy, L-BFGS), and a
    # buffer cannot be donated twice.
    trained = trained_pairs(drawn.factors, found)
    opt_state = jax.tree.map(jnp.copy, tx.init(trained))
    if policy.period and policy.reset_optimizer and restart is None:
      restart_lib.check(tx, opt_state, trained)
    remainders = {}
    if policy.rounding == 'compensated':
      for one in found:
        m = one.matrix
        remainders[m.path] = jnp.zeros((*m.batch, m.m, m.n), m.dtype)
    return AdapterState(
        params=base,
        factors=drawn.factors,
        coins=drawn.coins,
        opt_state=opt_state,
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
      trained = trained_pairs(drawn.factors, found)
      rule = restart or functools.partial(restart_lib.restart, trained=trained)
      opt_state = rule(tx.init(trained), opt_state)
    return state._replace(
        factors=drawn.factors, coins=drawn.coins, opt_state=opt_state
    )

  def begin(state):
    if policy.period is None:
      return state
    is_due = (state.count > 0) & (state.count % policy.period == 0)
    return jax.lax.cond(is_due, begin_link, lambda s: s, state)

  def move(state, loss, batch, *args, scale=1.0):
    found = resolve(state.params)
    trained = trained_pairs(state.factors, found)

    def value_of(trained, batch, *args):
      factors = joined(state.factors, trained)
      result = loss(state.params, scaled(factors, found), batch, *args)
      if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            'Expected a loss that returns (scalar, aux), got'
            f' {type(result).__name__}: return None for aux if there is none.'
        )
      return result

    value_and_grad = jax.value_and_grad(value_of, has_aux=True)
    if num_micro_batches > 1:
      value_and_grad = estimators.accumulate(value_and_grad, num_micro_batches)
    out = value_and_grad(trained, batch, *args)
    value, grads = out if average is None else average(out)
    moves = moving(trained, state.coins)
    grads = where(moves, grads, jax.tree.map(jnp.zeros_like, grads))
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
        factors=joined(state.factors, where(moves, moved, trained)),
        opt_state=_keep_frozen(moves, opt_state, state.opt_state),
        count=optax.safe_increment(state.count),
    )
    return state, value

  def step(state, loss, batch, *args, scale=1.0):
    return move(begin(state), loss, batch, *args, scale=scale)

  def merged(state):
    return _merge(state, resolve(state.params), policy)

  return Chain(
      policy,
      matrices,
      resolve,
      init,
      step,
      begin,
      move,
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


def trained_pairs(factors: Pairs, found: Sequence[Adapted]) -> Pairs:
  """Returns the factors that an optimiser sees."""
  return {
      one.matrix.path: {
          side: factors[one.matrix.path][side] for side in one.trained
      }
      for one in found
  }


def joined(factors: Pairs, trained: Pairs) -> Pairs:
  """Returns the factors with the trained ones replaced."""
  return {path: {**factors[path], **trained[path]} for path in factors}


def moving(trained: Pairs, coins: dict[str, jax.Array]) -> Pairs:
  """Returns {path: {side: does it train?}}, broadcastable to the factors."""
  always = jnp.ones((), bool)
  moves = {}
  for path, pair in trained.items():
    moves[path] = {side: always for side in pair}
    if path in coins:
      is_left = coins[path][..., None, None]
      moves[path] = {'left': ~is_left, 'right': is_left}
  return moves


def where(condition: Any, new: Any, old: Any) -> Any:
  """Returns `new` where the condition, a tree like them, holds, else `old`."""
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
        merging.product(pair),
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
  moves = moving({one.matrix.path: {s: pair[s] for s in one.trained}}, coins)
  moves = moves[one.matrix.path]
  return {**pair, **{s: jnp.where(moves[s], zeros[s], pair[s]) for s in moves}}


# The family, and what a merge does, under one name for users.
Target = policies.Target
lora = policies.lora
cola = policies.cola
asymmetric_lora = policies.asymmetric_lora
rac_lora = policies.rac_lora
bernoulli_lora = policies.bernoulli_lora
describe = policies.describe
trained_numbers = policies.trained_numbers
unmerge = merging.unmerge
extract = merging.extract
merge_report = merging.merge_report
check_factors = merging.check_factors
check_shapes = merging.check_shapes
