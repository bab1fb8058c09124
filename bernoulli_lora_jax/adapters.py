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

A *sketched* chain (A4) moves W at each step by the increment of its trained factor,
W <- W + s L dR: L R is zero at every evaluation, so the loss has no adapter, and
its derivative is formed by the trained factor alone. In exact arithmetic it takes
the steps of the chain of adapters; it rounds W at each step, not at each link.

Reference: Hu et al., LoRA, arXiv 2106.09685; Xia et al., Chain of LoRA, arXiv
2401.04151; Zhu et al., Asymmetry in low-rank adapters, arXiv 2402.16842;
Malinovsky et al., RAC-LoRA, arXiv 2410.08305; Sokolov et al., Bernoulli-LoRA,
arXiv 2508.03820.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import deprecated
from bernoulli_lora_jax import devices
from bernoulli_lora_jax import factors as factors_lib
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import merging
from bernoulli_lora_jax import parts
from bernoulli_lora_jax import policies
from bernoulli_lora_jax import restart as restart_lib
from bernoulli_lora_jax import rounding as rounding_lib
from bernoulli_lora_jax import sharded
from bernoulli_lora_jax import sketched as sketched_lib
from bernoulli_lora_jax import ties

Adapted = policies.Adapted
ChainPolicy = policies.ChainPolicy
Matrices = matrices_lib.Matrices
Matrix = matrices_lib.Matrix
Pairs = merging.Pairs  # {path: {'left' and/or 'right': array}}

KEPT = ('link', 'step')  # What a sketched chain keeps for a recipe.
# Purposes folded into a matrix's key; 0, 1: links.py, 2: factors.py.
_ROUND, _ROUND_OTHERS = 3, 4


class AdapterState(NamedTuple):
  """State of a chain of adapters."""

  params: Any  # Base weights with all finished links (sketched: steps) merged.
  factors: Pairs  # {path: {'left': (*batch, m, r), 'right': (*batch, r, n)}},
  # float32 or wider; sketched: the frozen ones, both where coins are traced, of
  # coordinates {'left_rows', 'right_rows': (*batch, r) int32}, see `draw_link`.
  coins: dict[str, jax.Array]  # {path: shape=batch, bool}; of traced coins.
  opt_state: Any  # Of the trained factors.
  remainders: dict[str, jax.Array]  # {path: (*batch, m, n)}; 'compensated'.
  count: Any  # shape=(), dtype=int32; steps done.
  key: jax.Array  # shape=(), typed PRNG key; folded with the link.
  other_states: Any = ()  # {pattern: optimiser's state} of `others`.
  masters: Pairs = {}  # Sketched coordinates: see `sketched.masters`.
  # {path: {side: as the factor}}, see `keeps`; without the scale.
  trained: Any = ()


@dataclasses.dataclass(frozen=True)
class Chain:
  """A policy with its optimiser: what the functions below do to a state.

  Attributes: see `make_chain`, which makes one.
  """

  policy: ChainPolicy
  tx: optax.GradientTransformationExtraArgs
  matrices: Matrices | None = None
  num_micro_batches: int = 1
  average: Callable[[Any], Any] | None = None
  reductions: tuple[tuple[str, str], ...] = ()
  # (pattern, optimiser) of what trains at full size.
  other_txs: tuple[tuple[str, optax.GradientTransformationExtraArgs], ...] = ()
  restart: restart_lib.Restart | None = None
  sketched: bool = False
  side: str | None = None  # See `of_side`.
  keeps: str = ''

  @property
  def others(self) -> dict[str, optax.GradientTransformation]:
    """Returns {pattern: optimiser} of what trains at full size."""
    return dict(self.other_txs)

  def adapted(self, params: Any) -> list[Adapted]:
    """Returns what is adapted of params."""
    return policies.resolve(params, self.policy, self.matrices)

  def of_side(self, side: str | None) -> 'Chain':
    """Returns the chain whose steps are those of links of one side.

    With `shared_coin` all matrices have one side at a link, which the host may know,
    see `sides_of_links`. A step that is compiled for it has the derivative, the
    update and the moments of one factor alone; states are those of the chain itself.

    Args:
      side: 'left' or 'right'; None for the chain whose coins are traced.

    Raises:
      ValueError: a policy without `shared_coin`, or without one prob in (0, 1).

    Guarantees:
      A step of the link's side is that of the chain itself. On any other side its
        value is NaN.
    """
    if side is not None:
      checks.one_of(('left', 'right'), side=side)
      _one_coin(self)
    return dataclasses.replace(self, side=side)

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
    sketched: bool = False,
    keeps: str = '',
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
    average: mean over data-parallel devices, each of which has a part of the
      batch: `devices.Mapped`, by which parts are combined likewise, or another
      function of ((value, aux), gradients), where aux holds nothing but means.
      The name of a mapped axis is deprecated.
    reductions: {pattern of a path in aux: 'mean', 'sum', 'max', 'min', 'any' or
      'all'}, how the parts of what a loss returns are combined.
    others: {regular expression searched in a path: transformation} of leaves that
      are trained at full size beside the factors (a new head, norms, biases),
      learning rate included. Each sees {path: leaf} of its own leaves alone, so
      norms for clipping are separate; links never restart them, and the policy's
      warmup is not theirs. Where merges are rounded at random so are their steps,
      else to nearest. None: all that is not adapted is frozen.
    restart: (fresh, old) -> the optimiser's state at the start of a link, where
      `policy.reset_optimizer`. None: what holds leaves of factors is fresh,
      schedules and the like go on, see `restart.restart`.
    sketched: whether each step moves W itself, by chains that train one factor
      a link and merge. The optimiser then sees gradients alone: there is no
      factor that it could decay, and one that asks for params fails. `inject`
      says what a loss computes.
    keeps: what the state of a sketched chain holds for a recipe, in float32 and of
      the trained factors' size: 'link', the sum of the link's increments; 'step',
      the last increment; '', nothing.

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
  if isinstance(average, str):
    deprecated.warn('average=name', 'average=devices.Mapped(name)')
    average = devices.Mapped(average)
  if sketched and (policy.side is None or policy.period is None):
    raise ValueError(
        'Expected a sketched chain to train one factor and to end its links, got'
        f' side={policy.side!r}, period={policy.period}: leave sketched out.'
    )
  checks.one_of(('', *(KEPT if sketched else ())), keeps=keeps)
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
      sketched,
      keeps=keeps,
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
  _check_not_quantized(params, found, policy)
  moves = [one.matrix.index for one in found]
  moves += [i for places in chosen.values() for i in places.values()]
  ties.check(params, moves)
  # Copies: a caller may donate the state.
  base = jax.tree.map(jnp.array if copy else jnp.asarray, params)
  leaves = _other_leaves(base, chosen)
  other_states = {p: owned(tx.init(leaves[p])) for p, tx in chain.other_txs}
  first = functools.partial(_first_state, chain=chain, found=found)
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
    trained = _trained(state.factors, found)
    restart_lib.check(chain.tx, state.opt_state, trained)
  return state


def _first_state(
    key: jax.Array,
    base: Any,
    *,
    chain: Chain,
    found: Sequence[Adapted],
) -> AdapterState:
  """Returns the state at step 0 but for the base weights."""
  policy = chain.policy
  # Compiled: op by op, frames would round otherwise than in later links.
  draw = functools.partial(factors_lib.draw_link, sketched=chain.sketched)
  drawn = jax.jit(lambda key: draw(key, 0, found, policy))(key)
  factors = _stored(chain, drawn.factors, found)
  remainders = {}
  if policy.rounding == 'compensated':
    for one in found:
      m = one.matrix
      remainders[m.path] = jnp.zeros((*m.batch, m.m, m.n), m.dtype)
  return AdapterState(
      params=(),
      factors=factors,
      coins=drawn.coins,
      opt_state=chain.tx.init(_trained(factors, found)),
      remainders=remainders,
      count=jnp.zeros([], jnp.int32),
      key=jnp.copy(key),
      masters=_masters(base, factors, remainders, found),
      trained=_nothing(chain, drawn.factors, found),
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


def sides_of_links(
    chain: Chain, key: jax.Array, num: int, first: int = 0
) -> list[str]:
  """Returns the sides of links, 'left' or 'right', before they are drawn.

  Step t, counted from 0, is of link t // period.

  Args:
    chain: one with `shared_coin`.
    key: of the chain, that of its states.
    num: of links.
    first: number of the first of them.

  Raises:
    ValueError: a chain that has no one coin, see `Chain.of_side`.
  """
  prob, resample = _one_coin(chain), chain.policy.resample
  links = jnp.arange(first, first + num) if resample else jnp.zeros(num, int)
  coins = np.asarray(_coins_of_links(key, links, prob))
  return ['left' if is_left else 'right' for is_left in coins]


@functools.partial(jax.jit, static_argnums=2)
def _coins_of_links(key: jax.Array, links: jax.Array, prob: float) -> jax.Array:
  """Returns the coin of each link; one by one, as some keys draw in batches anew."""
  fold = functools.partial(jax.random.fold_in, key)
  toss = lambda link: links_lib.draw_shared_coin(fold(link), prob)
  return jax.lax.map(toss, links)


def _one_coin(chain: Chain) -> float:
  """Returns P(left) of the coin of all matrices; raises where there is none."""
  prob = policies.one_coin(chain.policy)
  if prob is None:
    raise ValueError(
        'Expected shared_coin=True and one prob in (0, 1), a Python number, for'
        f' links of one side, got {chain.policy}.'
    )
  return prob


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
  if chain.sketched:
    return owned(state.params)
  return owned(_placed(_merge, chain, state).params)


def merge(chain: Chain, state: AdapterState) -> AdapterState:
  """Returns the state with its products in the base weights and L R = 0.

  It is the end of a link for the optimiser too.
  """
  merged = (lambda _, state: state) if chain.sketched else _merge
  end = lambda chain, state: _restarted(chain, merged(chain, state))
  return owned(_placed(end, chain, state))


def next_link(chain: Chain, state: AdapterState) -> AdapterState:
  """Returns the state with its link ended and the next one begun, outside of steps.

  What `begin_link` does once a link is over, a matrix at a time: each shape is
  compiled once, whatever the number of layers, and weights move in place. The state
  is consumed: its arrays are deleted.

  Args:
    chain: one whose links end.
    state: of arrays, on one device or replicated, with `period` steps done.
  """
  if not chain.sketched:
    keys = _round_keys_of(chain, state)
    params, remainders = _merge_each(_merged_in_place, chain, state, keys)
    state = state._replace(params=params, remainders=remainders)
  return state._replace(**_begun_anew(chain, state))


def merged_each(
    chain: Chain, state: AdapterState, in_place: bool = False
) -> Any:
  """Returns `merged_params` a matrix at a time, as `next_link` compiles it.

  Leaves that are not adapted are the state's own; in_place the others are deleted.
  """
  if chain.sketched:
    return state.params if in_place else owned(state.params)
  keys = _round_keys_of(chain, state)
  merge_one = _merged_in_place if in_place else _merged_apart
  return _merge_each(merge_one, chain, state, keys)[0]


def _merge_each(
    merge_one: Callable[..., Any],
    chain: Chain,
    state: AdapterState,
    keys: Mapping[str, jax.Array],
) -> tuple[Any, dict[str, jax.Array]]:
  """Returns merged params and remainders."""
  leaves, treedef = jax.tree.flatten(state.params)
  remainders = dict(state.remainders)
  for one in chain.adapted(state.params):
    m = one.matrix
    # Matrices of one shape share a program.
    kind = m._replace(index=0, path='', path_hash=(0, 0), layer=0)
    leaves[m.index], rest = merge_one(
        leaves[m.index],
        state.factors[m.path],
        remainders.get(m.path),
        keys[m.path],
        kind,
        one.scale,
        chain.policy.rounding,
    )
    if rest is not None:
      remainders[m.path] = rest
  return treedef.unflatten(leaves), remainders


def _merge_one(
    leaf: jax.Array,
    pair: Any,
    remainder: jax.Array | None,
    keys: jax.Array,
    matrix: Matrix,
    scale: float,
    mode: str,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns a leaf with its product, as `_merge` rounds it, and the remainder."""
  pair = {'left': pair['left'], 'right': scale * pair['right']}
  weight, pair = _apart((matrix.view(leaf), pair))
  total, rest = _apart(_with_product(weight, pair, remainder, keys, mode))
  return matrix.unview(total), rest


_STATIC = (4, 5, 6)
_merged_in_place = jax.jit(
    _merge_one, static_argnums=_STATIC, donate_argnums=(0, 2)
)
_merged_apart = jax.jit(_merge_one, static_argnums=_STATIC)


@functools.partial(jax.jit, static_argnums=0)
def _round_keys_of(chain: Chain, state: AdapterState) -> dict[str, jax.Array]:
  return _round_keys(state, chain.adapted(state.params))


@functools.partial(jax.jit, static_argnums=0)
def _begun_anew(chain: Chain, state: AdapterState) -> dict[str, Any]:
  """Returns what is new in the state of the link that begins."""
  state = _drawn_anew(chain, state)
  new = ('factors', 'coins', 'opt_state', 'masters', 'trained')
  return owned({name: getattr(state, name) for name in new})


def with_factors(
    chain: Chain, state: AdapterState, factors: merging.Factors
) -> AdapterState:
  """Returns the state with other factors, the optimiser at its start.

  Args:
    chain: one of which both factors train, as `ChainPolicy.lora`.
    state: of the chain.
    factors: {path: {'left', 'right'}} of all that is adapted, without the scale
      s, which is the policy's.

  Raises:
    ValueError: a chain whose frozen factors are drawn; factors of other paths or
      shapes, or that are not finite.
  """
  if chain.policy.side is not None:
    raise ValueError(
        'Expected a chain of which both factors train, side=None, got'
        f' side={chain.policy.side!r}, which draws its frozen ones.'
    )
  merging.check_shapes(state.factors, factors)
  merging.check_factors(factors)
  # In the state's own types, places and order; copies, since states are donated.
  put = lambda old, path, side: jax.device_put(
      jnp.array(factors[path][side], old.dtype), old.sharding
  )
  moved = {
      path: {side: put(old, path, side) for side, old in pair.items()}
      for path, pair in state.factors.items()
  }
  trained = factors_lib.trained_pairs(moved, chain.adapted(state.params))
  return state._replace(factors=moved, opt_state=owned(chain.tx.init(trained)))


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
  return _if_due(next_link, is_due, state)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _if_due(change: Callable[[Any], Any], is_due: jax.Array, state: Any) -> Any:
  """Returns change(state) if it is due.

  A loop of one turn or none: it moves the weights in place, where the branches of a
  cond would have a copy of them.
  """
  turns = is_due.astype(jnp.int32)
  return jax.lax.fori_loop(0, turns, lambda _, s: change(s), state)


@_if_due.defjvp
def _if_due_jvp(change, primals, tangents):
  """Of a cond: a loop of a traced number of turns has no transpose."""
  cond = lambda is_due, state: jax.lax.cond(is_due, change, lambda s: s, state)
  return jax.jvp(cond, primals, tangents)


def _next_link(chain: Chain, state: AdapterState) -> AdapterState:
  """Merges, flips, resamples and restarts."""
  return _drawn_anew(chain, state if chain.sketched else _merge(chain, state))


def _drawn_anew(chain: Chain, state: AdapterState) -> AdapterState:
  """Returns the state with the factors and coins of the link that begins."""
  policy, found = chain.policy, chain.adapted(state.params)
  link = state.count // policy.period if policy.resample else 0
  drawn = factors_lib.draw_link(state.key, link, found, policy, chain.sketched)
  factors = _stored(chain, drawn.factors, found)
  masters = _masters(state.params, factors, state.remainders, found)
  state = state._replace(
      factors=factors,
      coins=drawn.coins,
      masters=masters,
      trained=_nothing(chain, drawn.factors, found),
  )
  return _restarted(chain, state)


def _masters(
    params: Any, factors: Pairs, remainders: Any, found: Sequence[Adapted]
) -> Pairs:
  leaves = jax.tree.leaves(params, is_leaf=inject.is_quantized)
  return sketched_lib.masters(leaves, factors, remainders, found)


def _restarted(chain: Chain, state: AdapterState) -> AdapterState:
  if not chain.policy.reset_optimizer:
    return state
  trained = _trained(state.factors, chain.adapted(state.params))
  rule = functools.partial(restart_lib.restart, trained=trained)
  rule = chain.restart or rule
  return state._replace(opt_state=rule(chain.tx.init(trained), state.opt_state))


def _stored(chain: Chain, factors: Pairs, found: Sequence[Adapted]) -> Pairs:
  """Returns the factors that a state keeps: sketched, those that are not zero."""
  if not chain.sketched:
    return factors
  is_kept = lambda one, side: len(one.trained) == 2 or side not in one.trained
  return {
      one.matrix.path: {
          side: factor
          for side, factor in factors[one.matrix.path].items()
          if is_kept(one, side)
      }
      for one in found
  }


def _nothing(chain: Chain, factors: Pairs, found: Sequence[Adapted]) -> Any:
  """Returns what a link that begins has trained, where the state keeps it."""
  if not chain.keeps:
    return ()
  return jax.tree.map(jnp.zeros_like, _trained(factors, found))


def _trained(factors: Pairs, found: Sequence[Adapted]) -> Pairs:
  """Returns the trained factors of those that a state keeps."""
  return factors_lib.trained_pairs(factors_lib.completed(factors, found), found)


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
  start = factors_lib.completed(state.factors, found)
  chosen = _places_of_others(chain, state.params, found)
  rest = _other_leaves(state.params, chosen)
  found = policies.of_side(found, chain.side)
  start = factors_lib.shared(start, found)
  trained = factors_lib.trained_pairs(start, found)

  def value_of(moved, batch, *args):
    factors = factors_lib.joined(start, moved[0])
    params = _with_others(state.params, chosen, moved[1])
    pairs = factors_lib.scaled(factors, found, chain.sketched)
    result = loss(params, pairs, batch, *args)
    if type(result) is not tuple or len(result) != 2:
      raise TypeError(
          'Expected a loss that returns (scalar, aux), got'
          f' {type(result).__name__}: return None for aux if there is none.'
      )
    return result

  value_and_grad = parts.accumulate(
      jax.value_and_grad(value_of, has_aux=True),
      chain.num_micro_batches,
      dict(chain.reductions),
      average=chain.average,
  )
  (value, aux), grads = value_and_grad((trained, rest), batch, *args)
  value = _of_its_side(chain, state, value)
  if chain.sketched:
    # W moves in place: all that reads it comes first.
    grads = jax.lax.optimization_barrier(grads)
  state = sharded.automatic(
      functools.partial(_moved_by, chain),
      state,
      *grads,
      value,
      jnp.asarray(scale),
      out=lambda: sharded.specs(state),
  )
  return state, (value, aux)


def _of_its_side(chain: Chain, state: AdapterState, value: Any) -> Any:
  """Returns a loss, NaN where the link is not of the side that is compiled."""
  if chain.side is None or not state.coins:
    return value
  coin = next(iter(state.coins.values()))  # Of all.
  return jnp.where(jnp.all(coin == (chain.side == 'left')), value, jnp.nan)


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
  start = factors_lib.completed(state.factors, found)
  trained = factors_lib.trained_pairs(start, found)
  chosen = _places_of_others(chain, state.params, found)
  rest = _other_leaves(state.params, chosen)
  moves = factors_lib.moving(trained, state.coins, chain.side)
  # A step of one side has the gradients of that side.
  zeros = jax.tree.map(jnp.zeros_like, trained)
  grads = factors_lib.joined(zeros, grads)
  grads = factors_lib.where(moves, grads, jax.tree.map(jnp.zeros_like, grads))
  updates, opt_state = chain.tx.update(
      grads, state.opt_state, None if chain.sketched else trained, value=value
  )
  moved_rest, other_states = {}, {}
  for pattern, one in chain.other_txs:
    changes, other_states[pattern] = one.update(
        rest_grads[pattern],
        state.other_states[pattern],
        rest[pattern],
        value=value,
    )
    key = jax.random.fold_in(state.key, state.count)
    moved_rest[pattern] = _moved_others(
        rest[pattern], changes, scale, key, policy.rounding
    )
  if policy.warmup:
    place = state.count % policy.period if policy.period else state.count
    scale = scale * jnp.minimum(1.0, (place + 1) / policy.warmup)
  moved = factors_lib.where(moves, _moved(trained, updates, scale), trained)
  if chain.sketched:
    state = add_increments(chain, state, moved)
  else:
    state = state._replace(factors=factors_lib.joined(start, moved))
  return state._replace(
      params=_with_others(state.params, chosen, moved_rest),
      other_states=other_states or (),
      opt_state=_keep_frozen(moves, opt_state, state.opt_state),
      count=optax.safe_increment(state.count),
  )


def add_increments(
    chain: Chain, state: AdapterState, increments: merging.Factors
) -> AdapterState:
  """Returns the state of a sketched chain with its weights moved by a step.

  Of chains that keep each step barriers keep a compiler from fusing the move with its
  surroundings, so that a replay rounds as the run did.

  Args:
    chain: sketched.
    state: whose count tells the step.
    increments: {path: {side: as the factor}} of the trained factors, without the
      scale s. Where a coin decides, that of the frozen side is not read.
  """
  policy, found = chain.policy, chain.adapted(state.params)
  apart = _apart if chain.keeps == 'step' else lambda tree: tree
  start = factors_lib.completed(state.factors, found)
  trained = factors_lib.trained_pairs(start, found)
  moves = factors_lib.moving(trained, state.coins, chain.side)
  zeros = jax.tree.map(jnp.zeros_like, trained)
  own = apart(factors_lib.where(moves, increments, zeros))
  moved = factors_lib.where(moves, own, trained)
  leaves, treedef = jax.tree.flatten(state.params, is_leaf=inject.is_quantized)
  leaves, pairs = apart(
      (leaves, factors_lib.scaled(factors_lib.joined(start, moved), found))
  )
  leaves, masters, remainders = apart(
      sketched_lib.moved(
          leaves,
          pairs,
          state.masters,
          state.remainders,
          _round_keys(state, found),
          found,
          policy.rounding,
      )
  )
  if chain.keeps == 'link':
    own = jax.tree.map(jnp.add, state.trained, own)
  return state._replace(
      params=treedef.unflatten(leaves),
      masters=masters,
      remainders=remainders,
      trained=own if chain.keeps else (),
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
  return AdapterState(
      (), same, same, same, remainders, same, same, (), same, same
  )


def _check_not_quantized(
    params: Any, found: Sequence[Adapted], policy: ChainPolicy
) -> None:
  """Raises for a chain that merges into quantised weights."""
  leaves = jax.tree.leaves(params, is_leaf=inject.is_quantized)
  for one in found:
    is_quantized = inject.is_quantized(leaves[one.matrix.index])
    if is_quantized and policy.period is not None:
      raise ValueError(
          f'Expected period=None over the quantised {one.matrix.path}, got'
          f' period={policy.period}: a merge would quantise it again.'
      )


def owned(tree: Any) -> Any:
  """Returns a tree in buffers of its own; `jit` would hand on its arguments."""
  return jax.tree.map(jnp.copy, tree)


def _moved(leaves: Any, updates: Any, scale: Any) -> Any:
  return jax.tree.map(
      lambda w, u: w + (scale * u).astype(w.dtype), leaves, updates
  )


def _moved_others(
    leaves: Mapping[str, jax.Array],
    updates: Any,  # Of the same paths.
    scale: Any,
    key: jax.Array,
    mode: str,
) -> dict[str, jax.Array]:
  """Returns {path: leaf} moved, rounded at random where merges are."""
  if mode != 'stochastic':
    return _moved(leaves, updates, scale)
  moved = {}
  for path, leaf in leaves.items():
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    own = jax.random.fold_in(own, _ROUND_OTHERS)
    wide = matrices_lib.wide(leaf.dtype)
    total = leaf.astype(wide) + scale * updates[path].astype(wide)
    moved[path] = rounding_lib.stochastic(total, own, leaf.dtype)
  return moved


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
    return factors_lib.where(
        move.reshape(batch + (1,) * (n.ndim - len(batch))), n, o
    )

  return jax.tree_util.tree_map_with_path(keep, new, old)


def _merge(chain: Chain, state: AdapterState) -> AdapterState:
  """Returns the state with the products in the weights and L R = 0.

  The barriers keep a compiler from fusing the merge with its surroundings, so
  that a replay rounds as the run did.
  """
  policy, found = chain.policy, chain.adapted(state.params)
  leaves, treedef = jax.tree.flatten(state.params, is_leaf=inject.is_quantized)
  factors, remainders = dict(state.factors), dict(state.remainders)
  products = factors_lib.scaled(state.factors, found)
  keys = _round_keys(state, found)
  for one in found:
    m = one.matrix
    if inject.is_quantized(leaves[m.index]):
      raise ValueError(
          'Expected weights of floating point to merge into, got the quantised'
          f' {m.path}: keep its factors beside it.'
      )
    weight, pair = _apart((m.view(leaves[m.index]), products[m.path]))
    total, rest = _with_product(
        weight,
        pair,
        remainders.get(m.path),
        keys[m.path],
        policy.rounding,
    )
    total, rest = _apart((total, rest))
    leaves[m.index] = m.unview(total)
    if rest is not None:
      remainders[m.path] = rest
    factors[m.path] = factors_lib.without_product(
        one, factors[m.path], state.coins, policy.zero
    )
  return state._replace(
      params=treedef.unflatten(leaves), factors=factors, remainders=remainders
  )


def _apart(tree: Any) -> Any:
  """Returns arrays that are computed before what follows is begun.

  One by one: jax 0.11 has no transpose of a barrier some of whose arrays are
  differentiated.
  """
  return jax.tree.map(jax.lax.optimization_barrier, tree)


def _with_product(
    weight: jax.Array,
    pair: inject.Pair,
    remainder: jax.Array | None,
    keys: jax.Array,
    mode: str,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns W + L R and its remainder, see `rounding.add`."""

  def add(weight, pair, remainder, key):
    change = merging.product(pair)
    return rounding_lib.add(weight, change, remainder, key, mode)

  return merging.entry_by_entry(add, weight, pair, remainder, keys)


def _round_keys(
    state: AdapterState, found: Sequence[Adapted]
) -> dict[str, jax.Array]:
  """Returns {path: keys of its entries}, shape=batch, in one operation for all."""
  link_key = jax.random.fold_in(state.key, state.count)
  matrices = [one.matrix for one in found]
  keys = links_lib.matrix_keys(link_key, matrices)
  fold = lambda key: jax.random.fold_in(key, _ROUND)
  ends = np.cumsum([m.entries.size for m in matrices])[:-1]
  own = jnp.split(jax.vmap(fold)(keys), ends)
  return {
      m.path: part.reshape(m.batch)
      for m, part in zip(matrices, own, strict=True)
  }


# The family, and what a merge does, under one name for users.
Target = policies.Target
draw_link = factors_lib.draw_link
scaled = factors_lib.scaled
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
