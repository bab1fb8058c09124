"""Federated averaging in which the average is exact.

Clients that hold the same key train the same side in the same subspace. With L
frozen and shared, the mean of the trained factors is the mean of the products:

    sum_l w_l (W + s L R_l) = W + s L (sum_l w_l R_l)

With both factors trained it is not (mean(L_l) mean(R_l) != mean(L_l R_l)), which
is what federated averaging of ordinary LoRA gets wrong. `federated_adapters` runs
any member of the family in rounds: K local steps of every client from the same
start, the average of what they trained, merge, next link. Up travel the trained
factors, r n or m r numbers a matrix; down travels their mean, since everyone who
has the seed draws the frozen factor. Who missed rounds `catch_up`s with the
missed means, or with W and the number of the round (`join`).

    rounds = bl.federated_adapters(policy, optax.sgd(0.1), num_clients=M)
    adapted = bl.inject.by_product(loss)   # loss(params, client, key)
    state = rounds.init(init_key, params)
    state, values = jax.jit(rounds.step, static_argnums=1)(
        state, adapted, clients, key)  # clients: arrays with a leading axis M
    params = rounds.params(state)

`federated_weights` is the same with the whole weights trained (FedAvg). Clients
on several devices are an axis of their arrays, sharded under `jit` on a mesh whose
axes are `jax.sharding.AxisType.Auto`:

    split = jax.NamedSharding(mesh, jax.P('clients'))
    state, values = step(state, adapted, jax.device_put(clients, split), key)

Reference: McMahan et al., FedAvg, arXiv 1602.05629; Malinovsky et al., RAC-LoRA
(Fed-RAC-LoRA), arXiv 2410.08305; Sokolov et al., arXiv 2508.03820.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import clients as clients_lib
from bernoulli_lora_jax import count
from bernoulli_lora_jax import factors as factors_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import parts
from bernoulli_lora_jax import restart as restart_lib
from bernoulli_lora_jax import wire

_LOCAL, _ROUND = range(2)  # Purposes folded into the key of `step`.

Loss = Callable[..., tuple[jax.Array, Any]]
check_wire, bits = wire.check, wire.bits  # Of what `to_wire` returns.


class WeightsState(NamedTuple):
  """State of `federated_weights`."""

  params: Any  # The server's weights.
  opt_state: Any  # As a client's at the start of a round.
  count: jax.Array  # shape=(), int32; local steps done.


def _run_round(
    self: 'Rounds',
    state: Any,
    loss: Loss,
    stack: Any,
    key: jax.Array,
    participants: jax.Array | None = None,
) -> tuple[Any, Any]:
  """Returns (state, (value, aux)) after a round of all parties in one process.

  Args:
    state: of the rounds.
    loss: see `federated_adapters`.
    stack: all clients, arrays with a leading axis M.
    key: typed PRNG key of the round, or of the run.
    participants: mask of shape (M,), who takes part; None: all, or a cohort.

  Raises:
    ValueError: another number of clients, a mask beside a cohort.
  """
  clients = self.clients
  _check_stack(stack, clients)
  state = self.begin(state)
  # With the count, so that the key of a run draws another cohort each round.
  round_key = jax.random.fold_in(jax.random.fold_in(key, _ROUND), state.count)
  present = clients_lib.present(clients, round_key, participants)
  weights = clients_lib.effective_weights(clients, present, True)

  def run(number, client):
    return self.local(state, loss, client, client_key(key, number))

  numbers = jnp.arange(clients.num_clients)
  mean, values = _combined(*jax.vmap(run)(numbers, stack), weights)
  is_empty = ~jnp.any(weights > 0)
  mean = jax.tree.map(
      lambda new, old: jnp.where(is_empty, old, new), mean, self.trained(state)
  )
  return self.finish(state, mean), values


@dataclasses.dataclass(frozen=True)
class AdapterRounds:
  """Rounds of adapters, one link a round; see `federated_adapters`.

  Their state is an `adapters.AdapterState`. Over a network every party keeps one:
  `begin`, then clients call `local` and send what it returns, the server averages,
  and all call `finish` with the mean. `step` is all of them in one process.
  """

  chain: adapters.Chain
  clients: clients_lib.Clients
  num_local_steps: int

  def init(self, key: jax.Array, params: Any, copy: bool = True) -> Any:
    """Returns the state before the first round.

    Args:
      key: typed PRNG key of all links, the same for all parties.
      params: base weights.
      copy: whether they are copied; else they become the state's, and a donation
        deletes them. What is returned elsewhere is never deleted by one.
    """
    state = self.chain.init(key, params, copy)
    _check_optimizer(state.opt_state)
    return state

  def begin(self, state: Any) -> Any:
    """Merges the last link, if it merges, and draws the next."""
    return adapters.begin_link(self.chain, state)

  def local(
      self,
      state: Any,
      loss: Loss,
      client: Any,
      key: jax.Array,
  ) -> tuple[Any, Any]:
    """Returns what a client sends after K steps, and (value, aux) over them.

    Args:
      state: that has begun.
      loss: see `federated_adapters`.
      client: one client's entry.
      key: of this client and round, see `client_key`.
    """

    def one(state, _):
      step_key = jax.random.fold_in(key, state.count)
      return adapters.move_factors(self.chain, state, loss, client, step_key)

    fresh = _fresh(self.chain.tx, self.trained(state), state.opt_state)
    state, values = jax.lax.scan(
        one, state._replace(opt_state=fresh), length=self.num_local_steps
    )
    return self.trained(state), _mean_values(values)

  def finish(self, state: Any, mean: Any) -> Any:
    """Returns the state after a round, from the mean of what clients sent."""
    start = self.trained(state)
    # The frozen stay to the bit.
    moves = factors_lib.moving(start, state.coins)
    factors = factors_lib.joined(
        state.factors, factors_lib.where(moves, mean, start)
    )
    num = self.num_local_steps
    state = state._replace(
        factors=factors,
        opt_state=_advanced(self.chain.tx, start, state.opt_state, num),
        count=state.count + num,
    )
    return adapters.owned(state)

  step = _run_round

  def params(self, state: Any) -> Any:
    """Returns the merged weights."""
    return self.chain.params(state)

  def trained(self, state: Any) -> Any:
    """Returns the trained factors as they are in the state."""
    found = self.chain.adapted(state.params)
    return adapters.owned(factors_lib.trained_pairs(state.factors, found))

  def sent_numbers(self, state: Any) -> jax.Array:
    """Returns the numbers that a client sends up, and gets down; state: begun."""
    rows = [
        (
            one.matrix.entries.size,
            _numbers(one),
            state.coins.get(one.matrix.path),
            one.trained,
        )
        for one in self.chain.adapted(state.params)
    ]
    return count.sent(rows)


@dataclasses.dataclass(frozen=True)
class WeightRounds:
  """Rounds of whole weights (FedAvg); see `federated_weights`.

  Their state is a `WeightsState`; the methods are those of `AdapterRounds`.
  """

  tx: optax.GradientTransformationExtraArgs
  clients: clients_lib.Clients
  num_local_steps: int
  select: Callable[[Any], Any] | None = None  # params -> tree of bool.
  chain: ClassVar[None] = None

  def init(self, key: Any, params: Any, copy: bool = True) -> Any:
    """Returns the state before the first round; key: not used."""
    del key
    base = jax.tree.map(jnp.array if copy else jnp.asarray, params)
    ours = trained_part(base, self.select)
    opt_state = adapters.owned(self.tx.init(ours))
    _check_optimizer(opt_state)
    restart_lib.check(self.tx, opt_state, ours)
    return WeightsState(base, opt_state, jnp.zeros([], jnp.int32))

  def begin(self, state: Any) -> Any:
    """Returns the state: nothing is drawn."""
    return adapters.owned(state)

  def local(
      self, state: Any, loss: Loss, client: Any, key: jax.Array
  ) -> tuple[Any, Any]:
    """Returns what a client sends after K steps, and (value, aux) over them."""

    def one(carry, step):
      moved, opt_state = carry
      step_key = jax.random.fold_in(key, state.count + step)
      value_of = lambda moved: loss(
          joined(state.params, moved), client, step_key
      )
      value, grads = jax.value_and_grad(value_of, has_aux=True)(moved)
      updates, opt_state = self.tx.update(grads, opt_state, moved)
      return (optax.apply_updates(moved, updates), opt_state), value

    start = self.trained(state)
    (moved, _), values = jax.lax.scan(
        one,
        (start, _fresh(self.tx, start, state.opt_state)),
        jnp.arange(self.num_local_steps),
    )
    return adapters.owned((moved, _mean_values(values)))

  def finish(self, state: Any, mean: Any) -> Any:
    """Returns the state after a round, from the mean of what clients sent."""
    num, start = self.num_local_steps, self.trained(state)
    opt_state = _advanced(self.tx, start, state.opt_state, num)
    params = joined(state.params, mean)
    return adapters.owned(WeightsState(params, opt_state, state.count + num))

  step = _run_round

  def params(self, state: Any) -> Any:
    """Returns the weights."""
    return adapters.owned(state.params)

  def trained(self, state: Any) -> Any:
    """Returns the leaves that move as they are in the state, else None."""
    return adapters.owned(trained_part(state.params, self.select))

  def sent_numbers(self, state: Any) -> jax.Array:
    """Returns the numbers that a client sends up, and gets down."""
    ours = trained_part(state.params, self.select)
    size = sum(x.size for x in jax.tree.leaves(ours))
    return jnp.asarray(size, jnp.result_type(float))


Rounds = AdapterRounds | WeightRounds


def federated_adapters(
    policy: adapters.ChainPolicy,
    tx: optax.GradientTransformation,
    matrices: matrices_lib.Matrices | None = None,
    *,
    num_clients: int,
    num_local_steps: int | None = None,
    weights: Sequence[float] | None = None,
    cohort: int | None = None,
) -> Rounds:
  """Returns federated rounds of adapters, one link a round.

  Args:
    policy: which member of the family. Chains merge after every round, so their
      period is K; LoRA and asymmetric LoRA (period None) keep averaging the same
      factors.
    tx: optimiser of a client's trained factors, learning rate included. Clients
      begin each round with fresh moments; schedules go on with the local steps.
    matrices: what is a matrix.
    num_clients: M >= 1.
    num_local_steps: K >= 1; None for the policy's period.
    weights: w_l >= 0, normalised to sum 1; None for 1/M.
    cohort: c, clients drawn a round without replacement; None for all. The
      average is then the weighted mean over the cohort.

  Returns:
    `AdapterRounds`. loss(params, factors, client, key) -> (scalar, aux), or
    `parts.Weighted` in place of aux, whose weight multiplies the client's; counts
    (integers) beside the value are summed over steps and clients. It sees one
    client's entry of `clients` and a key for its step and number, with which it
    may draw a minibatch. A round without any participant changes no weight.

  Raises:
    ValueError: an argument outside its range, a period other than K, an optimiser
      that looks at the loss (`reduce_on_plateau`).

  Guarantees:
    With one factor trained, the merged weights are the weighted mean of the
      clients' merged weights, up to rounding.
    All clients, and the server, draw the same coins and frozen factors.
    One client with weight 1 is the chain itself (one that merges: the moments of
      LoRA and asymmetric LoRA begin anew with each round here).

  References:
    Malinovsky et al., RAC-LoRA, arXiv 2410.08305, algorithm of Fed-RAC-LoRA.
  """
  num_steps = _checked_steps(
      policy.period if num_local_steps is None else num_local_steps
  )
  if policy.period not in (None, num_steps):
    raise ValueError(
        f'Expected policy.period={num_steps}, the local steps of a round, got'
        f' period={policy.period}.'
    )
  if not policy.reset_optimizer:
    raise ValueError('Expected policy.reset_optimizer=True, got False.')
  clients = clients_lib.make_clients(num_clients, weights, cohort)
  chain = adapters.make_chain(policy, tx, matrices)
  return AdapterRounds(chain, clients, num_steps)


def federated_weights(
    tx: optax.GradientTransformation,
    *,
    num_clients: int,
    num_local_steps: int,
    trained: Callable[[Any], Any] | None = None,
    weights: Sequence[float] | None = None,
    cohort: int | None = None,
) -> Rounds:
  """Returns federated averaging of whole weights (FedAvg).

  Args:
    tx: optimiser of a client's weights, learning rate included.
    num_clients: M >= 1.
    num_local_steps: K >= 1.
    trained: params -> tree of bool: which leaves move and travel; None for all.
    weights: as for `federated_adapters`.
    cohort: as for `federated_adapters`.

  Returns:
    `WeightRounds`, the trained tree being the leaves that move, None for the others;
    loss(params, client, key) -> (scalar, aux).

  Raises:
    ValueError: as for `federated_adapters`.

  References:
    McMahan et al., FedAvg, arXiv 1602.05629, algorithm 1.
  """
  num_steps = _checked_steps(num_local_steps)
  clients = clients_lib.make_clients(num_clients, weights, cohort)
  tx = optax.with_extra_args_support(tx)
  return WeightRounds(tx, clients, num_steps, trained)


def trained_part(params: Any, trained: Callable[[Any], Any] | None) -> Any:
  """Returns params with None for the leaves that do not move.

  Args:
    params: tree of arrays.
    trained: params -> tree of bool; None: all move.
  """
  if trained is None:
    return params
  return jax.tree.map(lambda p, t: p if t else None, params, trained(params))


def joined(params: Any, moved: Any) -> Any:
  """Returns params with the leaves of `moved` that are not None."""
  none = lambda x: x is None
  return jax.tree.map(
      lambda m, p: p if m is None else m, moved, params, is_leaf=none
  )


def client_key(key: jax.Array, client: Any) -> jax.Array:
  """Returns the key of a client's local steps, from the round's or the run's."""
  return jax.random.fold_in(jax.random.fold_in(key, _LOCAL), client)


def catch_up(rounds: Rounds, state: Any, means: Iterable[Any]) -> Any:
  """Returns the state of a client after rounds that it missed.

  Args:
    rounds: as the server's.
    state: after the last round that the client saw, or from `init`.
    means: the mean of each missed round, the oldest first.

  Returns:
    The state that it would have, bit for bit if it computes as the others do.
  """
  for mean in means:
    state = rounds.finish(rounds.begin(state), mean)
  return adapters.owned(state)  # Where nothing was missed too.


def join(rounds: Rounds, key: jax.Array, params: Any, num_rounds: int) -> Any:
  """Returns the state of a client that joins late with W in place of the means.

  Args:
    rounds: as the server's, of a chain that merges after every round.
    key: the key of the server's `init`.
    params: the server's merged weights.
    num_rounds: rounds done so far.

  Raises:
    ValueError: rounds of factors that are never merged, or of compensated
      rounding: `catch_up` works.
  """
  if rounds.chain is not None and rounds.chain.policy.period is None:
    raise ValueError(
        'Expected rounds that merge, got policy.period=None: the factors are'
        ' part of the state; use catch_up.'
    )
  if rounds.chain is not None and rounds.chain.policy.rounding == 'compensated':
    raise ValueError(
        "Expected rounding other than 'compensated': what it has cut off is part"
        ' of the state; use catch_up.'
    )
  state = rounds.init(key, params)
  if num_rounds == 0:
    return state

  def advance(_, state):  # Schedules and counts; no factor has moved.
    return rounds.finish(state, rounds.trained(state))

  state = jax.jit(
      lambda state: jax.lax.fori_loop(0, num_rounds, advance, state)
  )(state)
  return state._replace(params=jax.tree.map(jnp.copy, params))


def to_wire(rounds: Rounds, state: Any, trained: Any) -> dict[str, np.ndarray]:
  """Returns what travels of a trained tree: {path: numbers, one dimension}.

  Of adapters the factor that the coin trains, without the columns of a clipped
  rank; the entries of a stack one after another. Of weights the leaves that move.

  Args:
    rounds: as made.
    state: that has begun.
    trained: as `local` returns, or their mean.
  """
  if rounds.chain is None:
    # No view of a donated buffer.
    return wire.flatten(trained, lambda x: np.array(x).reshape(-1))
  return {
      one.matrix.path: wire.packed(
          trained[one.matrix.path], _places(one, state)
      )
      for one in rounds.chain.adapted(state.params)
  }


def from_wire(rounds: Rounds, state: Any, arrays: dict[str, np.ndarray]) -> Any:
  """Returns the trained tree restored from `to_wire`; frozen factors as they are.

  Args:
    rounds: as made.
    state: of the receiver, that has begun the same round.
    arrays: as `to_wire` returns.

  Raises:
    ValueError: a path, shape, dtype or number that is not as expected, by path.
  """
  like = to_wire(rounds, state, rounds.trained(state))
  wire.check(like, arrays)
  if rounds.chain is None:
    return wire.unflatten(arrays, rounds.trained(state))
  trained = dict(rounds.trained(state))
  for one in rounds.chain.adapted(state.params):
    path = one.matrix.path
    places = _places(one, state)
    trained[path] = wire.unpacked(arrays[path], trained[path], places)
  return trained


def _mean_values(values: Any) -> Any:
  """Returns values of steps over them: means by weight, sums of counts."""
  _, aux = values
  weights = None
  if isinstance(aux, parts.Weighted):
    weights = aux.weight.astype(jnp.promote_types(aux.weight.dtype, 'f4'))
    total = jnp.sum(weights)
    shares = weights / jnp.where(total > 0, total, 1)

  def mean(x):
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      _check_counts(x)
      return jnp.sum(x, 0, dtype=x.dtype)
    if weights is None:
      return jnp.mean(x, 0)
    spread = shares.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.sum(jnp.where(spread == 0, 0, spread * x), 0)

  means = jax.tree.map(mean, values)
  if weights is None:
    return means
  return means[0], means[1]._replace(weight=jnp.sum(aux.weight, 0))


def _combined(trained: Any, values: Any, weights: jax.Array) -> tuple[Any, Any]:
  """Returns the clients' means by weight, and sums of counts.

  The weight that a loss returns multiplies the client's own.
  """
  present = (weights > 0).astype(weights.dtype)
  sums = lambda x: clients_lib.weighted_sum(x, present)
  _, aux = values
  weight = aux.weight if isinstance(aux, parts.Weighted) else None
  if weight is not None:
    weights = weights * weight
    total = jnp.sum(weights)
    weights = weights / jnp.where(total > 0, total, 1)
  is_count = lambda x: not jnp.issubdtype(x.dtype, jnp.inexact)
  mean, means = clients_lib.weighted_sum((trained, values), weights)
  means = jax.tree.map(
      lambda x, m: sums(_check_counts(x)) if is_count(x) else m, values, means
  )
  if weight is not None:
    means = means[0], means[1]._replace(weight=sums(weight))
  return mean, means


def _check_counts(x: jax.Array) -> jax.Array:
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(
        'Expected counts or numbers beside the value of a loss of clients, got'
        f' dtype {x.dtype}: count them, jnp.sum(..., dtype=int).'
    )
  return x


def _check_stack(stack: Any, clients: clients_lib.Clients) -> None:
  """Raises unless there are M clients."""
  size = jax.tree.leaves(stack)[0].shape[0]
  if size != clients.num_clients:
    raise ValueError(
        f'Expected {clients.num_clients} clients along the leading axis, got'
        f' {size}.'
    )


def _fresh(tx: Any, trained: Any, opt_state: Any) -> Any:
  """Returns an optimiser's state with fresh moments; schedules go on."""
  return restart_lib.restart(tx.init(trained), opt_state, trained)


def _advanced(tx: Any, trained: Any, opt_state: Any, num_steps: int) -> Any:
  """Returns a fresh optimiser state with its schedules K steps further on."""
  zeros = jax.tree.map(jnp.zeros_like, trained)
  value = jnp.zeros([], jnp.result_type(float))
  one = lambda _, state: tx.update(zeros, state, trained, value=value)[1]
  later = jax.lax.fori_loop(0, num_steps, one, opt_state)
  return _fresh(tx, trained, later)


def _numbers(one: adapters.Adapted) -> dict[str, int]:
  """Returns the numbers of each factor of a matrix that are not padding."""
  m, r = one.matrix, one.rank
  if one.prob is None:
    return {'left': m.m * one.inner, 'right': one.inner * m.n}
  return count.of_factors(m.m, m.n, r)


def _places(one: adapters.Adapted, state: Any) -> Iterator[tuple[str, Any]]:
  """Yields (side, index) of what trains, an entry of a stack at a time."""
  m = one.matrix
  coins = state.coins.get(m.path)
  sizes = _numbers(one)
  boxes = {
      'left': (slice(None), slice(0, sizes['left'] // m.m)),
      'right': (slice(0, sizes['right'] // m.n), slice(None)),
  }
  for entry in np.ndindex(*m.batch):
    for side in one.trained:
      if coins is None or bool(coins[entry]) == (side == 'right'):
        yield side, (*entry, *boxes[side])


def _checked_steps(num_steps: int | None) -> int:
  if num_steps is None or num_steps < 1:
    raise ValueError(
        f'Expected num_local_steps >= 1, got num_local_steps={num_steps}.'
    )
  return num_steps


def _check_optimizer(opt_state: Any) -> None:
  kind = optax.contrib.ReduceLROnPlateauState
  is_kind = lambda node: isinstance(node, kind)
  if any(map(is_kind, jax.tree.leaves(opt_state, is_leaf=is_kind))):
    raise ValueError(
        'Expected an optimiser that does not look at the loss, got'
        ' reduce_on_plateau: clients would disagree about the learning rate.'
    )
  if restart_lib.has_lasting(opt_state):
    raise ValueError(
        'Expected an optimiser whose moments restart, got some that outlive links'
        ' (scale_by_column_moments): those of clients are not sent.'
    )
