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

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import deprecated
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import merging
from bernoulli_lora_jax import parts
from bernoulli_lora_jax import policies
from bernoulli_lora_jax import restart as restart_lib
from bernoulli_lora_jax import rounding as rounding_lib
from bernoulli_lora_jax import sharded
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
  other_states: Any = ()  # {pattern: optimiser's state} of `others`.


@dataclasses.dataclass(frozen=True)
class Chain:
  """A policy with its optimiser: what the functions below do to a state.

  Attributes: see `make_chain`, which makes one.
  """

  policy: ChainPolicy
  tx: optax.GradientTransformationExtraArgs
  matrices: Matrices | None = None
  num_micro_batches: int = 1
  average: Callable[[Any], Any] | str | None = None
  reductions: tuple[tuple[str, str], ...] = ()
  # (pattern, optimiser) of what trains at full size.
  other_txs: tuple[tuple[str, optax.GradientTransformationExtraArgs], ...] = ()
  restart: restart_lib.Restart | None = None

  @property
  def others(self) -> dict[str, optax.GradientTransformation]:
    """Returns {pattern: optimiser} of what trains at full size."""
    return dict(self.other_txs)

  def adapted(self, params: Any) -> list[Adapted]:
    """Returns what is adapted of params."""
    return policies.resolve(params, self.policy, self.matrices)

  def init(self, key: jax.Array, params: Any, copy: bool = True):
    """Returns the state at step 0, see `init`."""
    return init(self, key, params, copy)

  def step(self, state: AdapterState, loss, batch, *args, scale: Any = 1.0):
    """Returns (state, (value, aux)) after a step, see `step`."""
    return step(self, state, loss, batch, *args, scale=scale)

  def begin(self, state: AdapterState) -> AdapterState:
    """Deprecated: `begin_link`."""
    deprecated.warn('Chain.begin(state)', 'adapters.begin_link(chain, state)')
    return begin_link(self, state)

  def move(self, state: AdapterState, loss, batch, *args, scale: Any = 1.0):
    """Deprecated: `move_factors`."""
    deprecated.warn(
        'Chain.move(state, ...)', 'adapters.move_factors(chain, state, ...)'
    )
    return move_factors(self, state, loss, batch, *args, scale=scale)

  def params(self, state: AdapterState) -> Any:
    """Returns the merged weights, see `merged_params`."""
    return merged_params(self, state)

  def merge(self, state: AdapterState) -> AdapterState:
    """Returns the state with its products in the base, see `merge`."""
    return merge(self, state)


def make_chain(
    policy: ChainPolicy,
    tx: optax.GradientTransformation,
    matrices: Matrices | None = None,
    *,
    num_micro_batches: int = 1,
    average: Callable[[Any], Any] | str | None = None,
    reductions: Mapping[str, str] | None = None,
    others: Mapping[str, optax.GradientTransformation] | None = None,
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
      one after another, by the weight that a loss returns (`parts.Weighted` in
      place of aux), else as equal parts; see `parts.accumulate`.
    average: name of the mapped axis of data-parallel devices, whose parts are
      combined likewise, or a function, the mean over them of ((value, aux),
      gradients), where aux holds nothing but means.
    reductions: {pattern of a path in aux: 'mean', 'sum', 'max', 'min', 'any' or
      'all'}, how the parts of what a loss returns are combined.
    others: {regular expression searched in a path: transformation} of leaves that
      are trained at full size beside the factors (a new head, norms, biases),
      learning rate included. Each sees {path: leaf} of its own leaves alone, so
      norms for clipping are separate; links never restart them, and the policy's
      warmup is not theirs. None: all that is not adapted is frozen.
    restart: (fresh, old) -> the optimiser's state at the start of a link, where
      `policy.reset_optimizer`. None: what holds leaves of factors is fresh,
      schedules and the like go on, see `restart.restart`.

  Returns:
    A `Chain`. step(state, loss, batch, *args, scale=1.0) ends a link that is
    over, then moves the trained factors by scale times the optimiser's updates.
    loss: (params, factors, batch, *args) -> (scalar, aux), see `inject`.
    init(key, params, copy=False) takes params over instead of copying them: once
    a state is donated they are deleted. All that is returned else is a copy of
    its own, which no later donation deletes (free in a jitted step whose state is
    donated). merge is the end of a link for the optimiser too.

  Raises:
    ValueError: at init, a pattern that matches nothing, targets that disagree
      about a matrix, a rank above both sides, one array in two places (tied
      weights) of which one is selected (under `jit`, where the first call of the
      compiled function has them among its arguments), a chain that merges into
      quantised weights, an optimiser that links cannot restart (see
      `restart.check`), a pattern of others that selects nothing, an adapted leaf
      or one of another pattern.

  Guarantees:
    The base weights are not differentiated and change at links only.
    W + s L R before a link ends and W after it are equal up to the rounding of
      W; the new link starts from L R = 0.
    The frozen factor gets no update, and its moments do not move.
    Coins are independent over links, matrices and layers, P(left) = prob; a flip
      compiles nothing.
  """
  checks.at_least(1, num_micro_batches=num_micro_batches)
  reductions = parts.check_reductions(reductions)
  for pattern in others or {}:
    matrices_lib.check_pattern('a pattern of others', pattern)
  other_txs = tuple(
      (pattern, optax.with_extra_args_support(one))
      for pattern, one in (others or {}).items()
  )
  return Chain(
      policy,
      optax.with_extra_args_support(tx),
      matrices,
      num_micro_batches,
      average,
      tuple(reductions.items()),
      other_txs,
      restart,
  )


def init(
    chain: Chain, key: jax.Array, params: Any, copy: bool = True
) -> AdapterState:
  """Returns the state of a chain at step 0, its first link drawn.

  Args:
    chain: see `make_chain`.
    key: typed PRNG key of all links.
    params: base weights.
    copy: whether they are copied; else the state takes them over.

  Raises:
    TypeError: a raw key.
    ValueError: see `make_chain`.
  """
  if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
    raise TypeError(
        'Expected a typed key, jax.random.key(seed), got an array of dtype'
        f' {key.dtype}: wrap it with jax.random.wrap_key_data.'
    )
  policy, found = chain.policy, chain.adapted(params)
  chosen = _places_of_others(chain, params, found)
  _check_base(params, found, chosen, policy)
  # Copies: a caller may donate the state.
  base = jax.tree.map(jnp.array if copy else jnp.asarray, params)
  leaves = _other_leaves(base, chosen)
  other_states = {p: owned(tx.init(leaves[p])) for p, tx in chain.other_txs}
  first = functools.partial(
      _first_state, tx=chain.tx, found=found, policy=policy
  )
  state = sharded.automatic(
      first, key, base, out=lambda: _start_specs(base, found, policy)
  )
  # Copies: some optimisers keep what they are given (Prodigy, L-BFGS), and a
  # buffer cannot be donated twice.
  state = state._replace(
      params=base,
      opt_state=owned(state.opt_state),
      other_states=other_states or (),
  )
  if policy.period and policy.reset_optimizer and chain.restart is None:
    trained = trained_pairs(state.factors, found)
    restart_lib.check(chain.tx, state.opt_state, trained)
  return state


def _first_state(
    key: jax.Array,
    unused_base: Any,
    *,
    tx: optax.GradientTransformation,
    found: Sequence[Adapted],
    policy: ChainPolicy,
) -> AdapterState:
  """Returns the state at step 0 but for the base weights."""
  # Compiled: op by op, frames would round otherwise than in later links.
  drawn = jax.jit(lambda key: draw_link(key, 0, found, policy))(key)
  remainders = {}
  if policy.rounding == 'compensated':
    for one in found:
      m = one.matrix
      remainders[m.path] = jnp.zeros((*m.batch, m.m, m.n), m.dtype)
  return AdapterState(
      params=(),
      factors=drawn.factors,
      coins=drawn.coins,
      opt_state=tx.init(trained_pairs(drawn.factors, found)),
      remainders=remainders,
      count=jnp.zeros([], jnp.int32),
      key=jnp.copy(key),
  )


def step(
    chain: Chain,
    state: AdapterState,
    loss: Callable[..., Any],
    batch: Any,
    *args: Any,
    scale: Any = 1.0,
) -> tuple[AdapterState, Any]:
  """Ends the link that is over, then moves the factors; see `make_chain`.

  Args:
    chain: see `make_chain`.
    state: of the chain.
    loss: (params, factors, batch, *args) -> (scalar, aux), see `inject`.
    batch: what the loss takes.
    *args: further arguments of the loss.
    scale: of the optimiser's updates.

  Returns:
    The next state and (value, aux) before it.
  """
  state, value = _moved_factors(
      chain, _begun(chain, state), loss, batch, *args, scale=scale
  )
  return owned((state, value))


def begin_link(chain: Chain, state: AdapterState) -> AdapterState:
  """Ends the link that is over, if one is: the first half of a step."""
  return owned(_begun(chain, state))


def move_factors(
    chain: Chain,
    state: AdapterState,
    loss: Callable[..., Any],
    batch: Any,
    *args: Any,
    scale: Any = 1.0,
) -> tuple[AdapterState, Any]:
  """Moves the factors within a link: the second half of a step."""
  return owned(_moved_factors(chain, state, loss, batch, *args, scale=scale))


def merged_params(chain: Chain, state: AdapterState) -> Any:
  """Returns the weights with the products of the link merged."""
  return owned(_placed(_merge, chain, state).params)


def merge(chain: Chain, state: AdapterState) -> AdapterState:
  """Returns the state with its products in the base weights and L R = 0.

  It is the end of a link for the optimiser too.
  """
  end = lambda chain, state: _restarted(chain, _merge(chain, state))
  return owned(_placed(end, chain, state))


def _placed(
    function: Callable[..., AdapterState], chain: Chain, state: AdapterState
) -> AdapterState:
  """Returns function(chain, state), its leaves placed as they were."""
  return sharded.automatic(
      functools.partial(function, chain),
      state,
      out=lambda: sharded.specs(state),
  )


def _begun(chain: Chain, state: AdapterState) -> AdapterState:
  period = chain.policy.period
  if period is None:
    return state
  is_due = (state.count > 0) & (state.count % period == 0)
  next_link = functools.partial(_placed, _next_link, chain)
  return jax.lax.cond(is_due, next_link, lambda s: s, state)


def _next_link(chain: Chain, state: AdapterState) -> AdapterState:
  """Merges, flips, resamples and restarts."""
  policy, found = chain.policy, chain.adapted(state.params)
  state = _merge(chain, state)
  link = state.count // policy.period if policy.resample else 0
  drawn = draw_link(state.key, link, found, policy)
  return _restarted(
      chain, state._replace(factors=drawn.factors, coins=drawn.coins)
  )


def _restarted(chain: Chain, state: AdapterState) -> AdapterState:
  if not chain.policy.reset_optimizer:
    return state
  trained = trained_pairs(state.factors, chain.adapted(state.params))
  rule = functools.partial(restart_lib.restart, trained=trained)
  rule = chain.restart or rule
  return state._replace(opt_state=rule(chain.tx.init(trained), state.opt_state))


def _moved_factors(
    chain: Chain,
    state: AdapterState,
    loss: Callable[..., Any],
    batch: Any,
    *args: Any,
    scale: Any,
) -> tuple[AdapterState, Any]:
  """Returns the state a step along the gradients, and (value, aux) before it."""
  found = chain.adapted(state.params)
  trained = trained_pairs(state.factors, found)
  chosen = _places_of_others(chain, state.params, found)
  rest = _other_leaves(state.params, chosen)

  def value_of(moved, batch, *args):
    factors = joined(state.factors, moved[0])
    params = _with_others(state.params, chosen, moved[1])
    result = loss(params, scaled(factors, found), batch, *args)
    if type(result) is not tuple or len(result) != 2:
      raise TypeError(
          'Expected a loss that returns (scalar, aux), got'
          f' {type(result).__name__}: return None for aux if there is none.'
      )
    return result

  value_and_grad = _combined_over_parts(
      chain, jax.value_and_grad(value_of, has_aux=True)
  )
  value, grads = value_and_grad((trained, rest), batch, *args)
  state = sharded.automatic(
      functools.partial(_moved_by, chain),
      state,
      *grads,
      value[0],
      jnp.asarray(scale),
      out=lambda: sharded.specs(state),
  )
  return state, value


def _combined_over_parts(
    chain: Chain, value_and_grad: Callable[..., Any]
) -> Callable[..., Any]:
  """Returns the gradient of a batch from those of micro-batches and devices."""
  average = chain.average
  value_and_grad = parts.accumulate(
      value_and_grad,
      chain.num_micro_batches,
      dict(chain.reductions),
      average if isinstance(average, str) else None,
  )
  if callable(average):
    value_and_grad = parts.averaged(value_and_grad, average)
  return value_and_grad


def _moved_by(
    chain: Chain,
    state: AdapterState,
    grads: Pairs,
    rest_grads: Any,
    value: jax.Array,
    scale: jax.Array,
) -> AdapterState:
  """Returns the state one step along the gradients."""
  policy, found = chain.policy, chain.adapted(state.params)
  trained = trained_pairs(state.factors, found)
  chosen = _places_of_others(chain, state.params, found)
  rest = _other_leaves(state.params, chosen)
  moves = moving(trained, state.coins)
  grads = where(moves, grads, jax.tree.map(jnp.zeros_like, grads))
  updates, opt_state = chain.tx.update(
      grads, state.opt_state, trained, value=value
  )
  moved_rest, other_states = {}, {}
  for pattern, one in chain.other_txs:
    changes, other_states[pattern] = one.update(
        rest_grads[pattern],
        state.other_states[pattern],
        rest[pattern],
        value=value,
    )
    moved_rest[pattern] = _moved(rest[pattern], changes, scale)
  if policy.warmup:
    place = state.count % policy.period if policy.period else state.count
    scale = scale * jnp.minimum(1.0, (place + 1) / policy.warmup)
  moved = _moved(trained, updates, scale)
  return state._replace(
      params=_with_others(state.params, chosen, moved_rest),
      other_states=other_states or (),
      factors=joined(state.factors, where(moves, moved, trained)),
      opt_state=_keep_frozen(moves, opt_state, state.opt_state),
      count=optax.safe_increment(state.count),
  )


def _places_of_others(
    chain: Chain, params: Any, found: Sequence[Adapted]
) -> dict[str, dict[str, int]]:
  patterns = tuple(pattern for pattern, _ in chain.other_txs)
  return policies.resolve_others(params, found, patterns)


def _start_specs(
    params: Any, found: Sequence[Adapted], policy: ChainPolicy
) -> AdapterState:
  """Returns how a new state is placed: remainders as their weights, else whole."""
  leaves = jax.tree.leaves(params, is_leaf=inject.is_quantized)
  remainders: dict[str, Any] = {}
  if policy.rounding == 'compensated':
    for one in found:
      m = one.matrix
      spec = [*jax.typeof(leaves[m.index]).sharding.spec]
      spec += [None] * (len(m.shape) - len(spec))
      ends = (*m.axes.batch, m.axes.left[0], m.axes.right[0])
      remainders[m.path] = sharded.Spec(*(spec[axis] for axis in ends))
  same: Any = sharded.Spec()
  return AdapterState((), same, same, same, remainders, same, same)


def owned(tree: Any) -> Any:
  """Returns a tree in buffers of its own; `jit` would hand on its arguments."""
  return jax.tree.map(jnp.copy, tree)


def _moved(leaves: Any, updates: Any, scale: Any) -> Any:
  return jax.tree.map(
      lambda w, u: w + (scale * u).astype(w.dtype), leaves, updates
  )


def _other_leaves(params: Any, chosen: Mapping[str, Any]) -> Any:
  """Returns {pattern: {path: leaf}} of the leaves trained at full size."""
  leaves = jax.tree.leaves(params, is_leaf=inject.is_quantized)
  return {
      pattern: {path: leaves[index] for path, index in places.items()}
      for pattern, places in chosen.items()
  }


def _with_others(params: Any, chosen: Mapping[str, Any], moved: Any) -> Any:
  """Returns params with the leaves of `_other_leaves` replaced."""
  leaves, treedef = jax.tree.flatten(params, is_leaf=inject.is_quantized)
  for pattern, places in chosen.items():
    for path, index in places.items():
      leaves[index] = moved[pattern][path]
  return treedef.unflatten(leaves)


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
  # Of the factors' dtype: float8 promotes to nothing by itself.
  matrices = [
      one.matrix._replace(dtype=matrices_lib.wide(one.matrix.dtype))
      for one in found
  ]
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


def scaled(factors: Pairs, found: Sequence[Adapted]) -> dict[str, inject.Pair]:
  """Returns the factors as losses see them: the scale s in the right one."""
  return {
      one.matrix.path: inject.Pair(
          factors[one.matrix.path]['left'],
          one.scale * factors[one.matrix.path]['right'],
          one.matrix.axes,
      )
      for one in found
  }


def _check_base(
    params: Any,
    found: Sequence[Adapted],
    others: Mapping[str, Mapping[str, int]],
    policy: ChainPolicy,
) -> None:
  """Raises for tied weights, and for merges into quantised ones."""
  flat = jax.tree_util.tree_flatten_with_path(
      params, is_leaf=inject.is_quantized
  )[0]
  leaves = [leaf for _, leaf in flat]
  paths = matrices_lib.path_names([path for path, _ in flat])
  moves = [one.matrix.index for one in found]
  for i in moves:
    if inject.is_quantized(leaves[i]) and policy.period is not None:
      raise ValueError(
          f'Expected period=None over the quantised {paths[i]}, got'
          f' period={policy.period}: a merge would quantise it again.'
      )
  moves += [i for places in others.values() for i in places.values()]
  for given in (leaves, *_arguments_like(params)):
    owners = [_buffer(leaf) for leaf in given]
    for i in moves:
      for j, owner in enumerate(owners):
        if i != j and owner is not None and owner == owners[i]:
          raise ValueError(
              f'Expected {paths[i]} to be an array of its own, but it is tied'
              f' to {paths[j]}: adapting one of them would untie them.'
          )


def _buffer(leaf: Any) -> Any:
  """Returns what two leaves have in common if they are one array, or None."""
  if isinstance(leaf, jax.core.Tracer):
    return id(leaf)
  if isinstance(leaf, np.ndarray):
    return (leaf.ctypes.data, leaf.nbytes) if leaf.size else None
  if not isinstance(leaf, jax.Array) or not leaf.size:
    return id(leaf) if inject.is_quantized(leaf) else None
  try:
    shard = leaf.addressable_shards[0].data
    return (shard.unsafe_buffer_pointer(), leaf.nbytes)
  except (AttributeError, IndexError, NotImplementedError, RuntimeError):
    return id(leaf)


def _arguments_like(params: Any) -> list[list[Any]]:
  """Returns the leaves of what enclosing `jax.jit`s got in place of params.

  A trace sees one array in two places as two tracers, and only the frames of the
  call that traces hold the arrays. Where they do not (another version of JAX,
  weights from within the program) nothing is returned.
  """
  leaves, treedef = jax.tree.flatten(params)
  if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
    return []
  shapes = list(map(jnp.shape, leaves))
  result = []
  frame = sys._getframe()
  while frame is not None:
    if frame.f_globals.get('__name__', '').startswith('jax.'):
      given = frame.f_locals.get('args'), frame.f_locals.get('kwargs')
      for value in [*_nodes(given, treedef)]:
        arrays, _ = jax.tree.flatten(value, is_leaf=inject.is_quantized)
        is_concrete = not any(
            isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value)
        )
        if is_concrete and shapes == [
            jnp.shape(x) for x in jax.tree.leaves(value)
        ]:
          result.append(arrays)
    frame = frame.f_back
  return result


def _nodes(tree: Any, treedef: Any) -> list[Any]:
  """Returns the subtrees of a structure."""
  found = []

  def visit(node):
    is_it = jax.tree.structure(node) == treedef
    if is_it:
      found.append(node)
    return is_it

  try:
    jax.tree.leaves(tree, is_leaf=visit)
  except (TypeError, ValueError):  # Arguments that are no trees.
    return []
  return found


def _both(key: jax.Array, one: Adapted, policy: ChainPolicy) -> dict[str, Any]:
  """Returns the start of a pair that is trained on both sides."""
  m = one.matrix
  dtype = matrices_lib.wide(m.dtype)
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
  dtype = matrices_lib.wide(m.dtype)
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


def _merge(chain: Chain, state: AdapterState) -> AdapterState:
  """Returns the state with the products in the weights and L R = 0.

  The barriers keep a compiler from fusing the merge with its surroundings, so
  that a replay rounds as the run did.
  """
  policy, found = chain.policy, chain.adapted(state.params)
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
    factors[m.path] = _without_product(
        one, factors[m.path], state.coins, policy.zero
    )
  return state._replace(
      params=treedef.unflatten(leaves), factors=factors, remainders=remainders
  )


def _round_keys(link_key: jax.Array, matrix: Matrix) -> jax.Array:
  keys = links_lib.matrix_keys(link_key, [matrix])
  fold = lambda key: jax.random.fold_in(key, _ROUND)
  return jax.vmap(fold)(keys).reshape(matrix.batch)


def _without_product(
    one: Adapted,
    pair: dict[str, jax.Array],
    coins: dict[str, jax.Array],
    zero: str,
) -> dict[str, jax.Array]:
  """Returns a pair with L R = 0: what started from zero is zero again."""
  zeros = jax.tree.map(jnp.zeros_like, pair)
  if one.prob is None:
    return {**pair, zero: zeros[zero]}
  moves = moving({one.matrix.path: {s: pair[s] for s in one.trained}}, coins)
  moves = moves[one.matrix.path]
  return {**pair, **{s: jnp.where(moves[s], zeros[s], pair[s]) for s in moves}}


# The family, and what a merge does, under one name for users.
Target = policies.Target
adapter_table = policies.adapter_table
describe = policies.describe
trained_numbers = policies.trained_numbers
unmerge = merging.unmerge
extract = merging.extract
merge_report = merging.merge_report
check_factors = merging.check_factors
check_shapes = merging.check_shapes


def _renamed(old: str, new: str) -> Callable[..., ChainPolicy]:
  """Returns a member of the family under the name that it had."""

  def named(*args: Any, **kwargs: Any) -> ChainPolicy:
    deprecated.warn(f'adapters.{old}', f'ChainPolicy.{new}')
    return getattr(ChainPolicy, new)(*args, **kwargs)

  named.__doc__ = f'Deprecated: `ChainPolicy.{new}`.'
  return named


lora = _renamed('lora', 'lora')
cola = _renamed('cola', 'cola')
asymmetric_lora = _renamed('asymmetric_lora', 'asymmetric')
rac_lora = _renamed('rac_lora', 'rac')
bernoulli_lora = _renamed('bernoulli_lora', 'bernoulli')
