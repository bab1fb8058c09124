"""Federated methods: estimators of client gradients, and rounds of local steps.

Their tasks are federated ones (`tasks.partition.federate`): a minibatch is the
data of all clients. Each counts what travels, to float32 (float64 under x64): up,
what clients send; down, what the server sends to each of the M clients, which is
the trained factor where a chain follows, since all know the seed.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import clients as clients_lib
from bernoulli_lora_jax import compressors
from bernoulli_lora_jax import federated
from bernoulli_lora_jax import inject
from bernoulli_lora_jax.tasks import partition
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import parallel

ESTIMATORS = ('qgd', 'marina', 'ef21')

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Total(NamedTuple):
  """A sum over rounds, with the part that rounding has lost."""

  total: jax.Array  # shape=(), float.
  rest: jax.Array  # shape=(), float.


class FederatedState(NamedTuple):
  """State of the federated methods."""

  inner: Any  # (params, state of the optimiser), or the state of the rounds.
  up: Total  # Bits.
  down: Total  # Bits.
  passes: Total  # Gradients of one example / N.
  lr_scale: jax.Array  # shape=(), float32; multiplies the updates.

  @property
  def data_passes(self) -> jax.Array:
    return self.passes.total


class Cohort(NamedTuple):
  """Who takes part; see `federated.qgd`."""

  num_clients: int
  weights: Sequence[float]
  size: int | None = None  # Clients drawn a round; None for all.

  @property
  def share(self) -> float:
    return (self.size or self.num_clients) / self.num_clients


class _Small:
  """What is asked of methods whose weights may be loaded; here they never are."""

  def params_of_large(
      self, state: FederatedState, in_place: bool = False
  ) -> Any:
    """Returns the weights."""
    del in_place
    return self.params(state)  # pyrefly: ignore

  def at(self, f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns (state, *args) -> f(params, *args)."""
    return lambda state, *args: f(self.params(state), *args)  # pyrefly: ignore


@dataclasses.dataclass(frozen=True)
class EstimatorMethod(_Small):
  """Moves params along an estimate of gradients; see `estimator_method`."""

  loss: Loss
  make_tx: Callable[[jax.Array], optax.GradientTransformation]
  update_numbers: Callable[[Any, Any], jax.Array]
  estimator: str
  compressor: compressors.Compressor
  cohort: Cohort
  marina_prob: float | None
  start: str
  concatenate: bool
  select: Callable[[Any], Any] | None  # params -> tree of bool; None: all.
  driver: parallel.Driver
  chain: None = None

  @property
  def passes_per_step(self) -> float:
    """Returns the data passes of a step in the mean."""
    # But for the rounds of whole gradients.
    return self.cohort.share * (2 if self._has_differences else 1)

  @property
  def _has_differences(self) -> bool:
    """Returns whether a cohort takes gradients at two points in most rounds."""
    return self.estimator == 'marina' and self.cohort.size is not None

  def init(self, key: jax.Array, params: Any) -> FederatedState:
    """Returns the state at step 0."""
    copy = jax.tree.map(jnp.copy, params)  # The loop donates the state.
    ours = averaging.trained_part(copy, self.select)
    return _start((copy, self._tx(key, ours).init(ours)))

  def step(
      self, state: FederatedState, batch: Any, key: jax.Array, full: Any
  ) -> tuple[FederatedState, dict[str, jax.Array]]:
    """Returns the next state and the metrics before it; full: not used."""
    del full
    params, opt_state = state.inner
    ours = averaging.trained_part(params, self.select)
    (value, metrics), grads = self._gradients(params, batch, key)
    tx: Any = self._tx(jax.random.key(0), ours)
    updates, new = tx.update(grads, opt_state, ours)
    updates = methods.scaled(updates, state.lr_scale)
    params = averaging.joined(params, optax.apply_updates(ours, updates))
    state, traffic = _finish(
        state,
        (params, new),
        self._bits_up(opt_state[0], new[0], ours),
        _bits(self.update_numbers(opt_state[1], ours), ours, self.cohort),
        self._passes(new[0]),
    )
    return state, {'loss': value, **metrics, **traffic}

  def params(self, state: FederatedState) -> Any:
    """Returns the weights."""
    return state.inner[0]

  def snapshot(self, state: FederatedState) -> FederatedState:
    """Returns the state without that of the optimiser."""
    return state._replace(inner=(state.inner[0], ()))

  def trained(self, params: Any) -> Any:
    """Returns a tree of bool: the leaves that move."""
    return (self.select or methods.all_true)(params)

  def per_client(self, state: FederatedState) -> Any:
    """Returns a tree of bool: the leaves with a leading axis of clients."""
    flags, (_, opt_state) = methods.none_marked(state), state.inner
    marks = federated.per_client(opt_state)
    return flags._replace(inner=(flags.inner[0], marks))

  def frozen(self, state: FederatedState) -> Any:
    """Returns a tree of bool: no leaf counts as one that stays as it is."""
    return methods.none_marked(state)

  def _tx(self, key: jax.Array, ours: Any) -> optax.GradientTransformation:
    keys = [jax.random.fold_in(key, i) for i in range(2)]
    return optax.chain(self._first(keys[0], ours), self.make_tx(keys[1]))

  def _first(self, key: jax.Array, ours: Any) -> optax.GradientTransformation:
    common: dict[str, Any] = {
        'compressor': self.compressor,
        'num_clients': self.cohort.num_clients,
        'weights': self.cohort.weights,
        'cohort': self.cohort.size,
        'concatenate': self.concatenate,
    }
    if self.estimator == 'qgd':
      return federated.qgd(key, **common)
    if self.estimator == 'ef21':
      return federated.ef21(key, start=self.start, **common)
    prob = self.marina_prob
    if prob is None:
      small, whole = federated.message_bits(
          self.compressor, ours, concatenate=self.concatenate
      )
      prob = min(1.0, small / whole)
    return federated.marina(key, prob=prob, **common)

  def _gradients(self, params: Any, batch: Any, key: jax.Array) -> Any:
    """Returns the mean (value, metrics) over clients, and all their gradients."""
    ours = averaging.trained_part(params, self.select)
    of_client = jax.value_and_grad(
        partition.client_loss(self.loss), has_aux=True
    )

    def one(client):
      value, grads = of_client(params, client, key)
      return value, _pick(grads, ours)

    values, grads = jax.vmap(one)(self.driver.shard(batch))
    return clients_lib.weighted_sum(values, self.cohort.weights), grads

  def _bits_up(self, old: Any, new: Any, ours: Any) -> jax.Array:
    """Returns the bits that clients sent between two states of the estimator."""
    return federated.bits_up(
        new._replace(sent=new.sent - old.sent),
        self.compressor,
        ours,
        concatenate=self.concatenate,
    )

  def _passes(self, new: Any) -> jax.Array:
    """Returns the data passes of a step that led to a state of the estimator."""
    cost = jnp.asarray(self.passes_per_step)
    return jnp.where(new.is_full, 1.0, cost) if self._has_differences else cost


def estimator_method(
    loss: Loss,
    make_tx: Callable[[jax.Array], optax.GradientTransformation],
    update_numbers: Callable[[Any, Any], jax.Array],
    *,
    estimator: str,
    compressor: compressors.Compressor,
    cohort: Cohort,
    marina_prob: float | None = None,
    start: str = 'full',
    concatenate: bool = False,
    trained: Callable[[Any], Any] | None = None,
    driver: parallel.Driver | None = None,
) -> EstimatorMethod:
  """Returns the method that moves params along an estimate of client gradients.

  Args:
    loss: (params, batch, key) -> (scalar mean over the batch, metrics).
    make_tx: key -> transformation of the estimate, as for `gradient_method`.
    update_numbers: (state of the transformation, trained params) -> numbers that
      its update takes to send.
    estimator: 'qgd' (E5), 'marina' (E6) or 'ef21' (E7).
    compressor: of what clients send.
    cohort: who takes part.
    marina_prob: q of MARINA; None for the compressed over the whole size.
    start: of EF21.
    concatenate: whether a client sends its leaves as one vector.
    trained: params -> tree of bool: which leaves move and travel. None: all.
    driver: None for one device.

  Returns:
    A method (see `methods`); its metrics are the mean loss before the step, those
    of `loss`, data_passes, and bits: bits_up, bits_down in total, round_bits_up,
    round_bits_down of the round.

  Raises:
    ValueError: an unknown estimator or an argument outside its range.
  """
  if estimator not in ESTIMATORS:
    raise ValueError(
        f'Expected method.estimator in {ESTIMATORS}, got {estimator!r}.'
    )
  return EstimatorMethod(
      loss,
      make_tx,
      update_numbers,
      estimator,
      compressor,
      cohort,
      marina_prob,
      start,
      concatenate,
      trained,
      parallel.make_driver('none') if driver is None else driver,
  )


@dataclasses.dataclass(frozen=True)
class RoundsMethod(_Small):
  """Federated rounds of local steps; see `rounds_method`."""

  rounds: averaging.Rounds
  loss: Loss  # Of a local step.
  cohort: Cohort
  passes_per_step: float
  driver: parallel.Driver
  chain: None = None

  def init(self, key: jax.Array, params: Any) -> FederatedState:
    """Returns the state at step 0."""
    # The key of a chain in `adapter_method`: both draw the same.
    return _start(self.rounds.init(jax.random.fold_in(key, 1), params))

  def step(
      self, state: FederatedState, batch: Any, key: jax.Array, full: Any
  ) -> tuple[FederatedState, dict[str, jax.Array]]:
    """Returns the state after a round and its metrics; full: not used."""
    del full
    rounds, cohort = self.rounds, self.cohort
    inner, (value, metrics) = rounds.step(
        state.inner, self.loss, self.driver.shard(batch), key
    )
    numbers = rounds.sent_numbers(rounds.begin(state.inner))
    bits = _bits(numbers, rounds.trained(inner), cohort)
    new, traffic = _finish(
        state, inner, cohort.share * bits, bits, self.passes_per_step
    )
    metrics = task_lib.metrics_of(metrics)
    return new, {'loss': value, **metrics, **traffic}

  def params(self, state: FederatedState) -> Any:
    """Returns the merged weights."""
    return self.rounds.params(state.inner)

  def snapshot(self, state: FederatedState) -> FederatedState:
    """Returns the state, which is what the weights are made of."""
    return state

  def trained(self, params: Any) -> Any:
    """Returns a tree of bool: the leaves that move."""
    if self.rounds.chain is not None:
      return methods.adapted_leaves(self.rounds.chain, params)
    return (self.rounds.select or methods.all_true)(params)

  def per_client(self, state: FederatedState) -> Any:
    """Returns a tree of bool: no leaf has a leading axis of clients."""
    return methods.none_marked(state)

  frozen = per_client  # Nor is there one that counts as staying as it is.


def rounds_method(
    loss: Loss,
    make_rounds: Callable[..., averaging.Rounds],
    *,
    cohort: Cohort,
    num_samples: int,
    batch_size: int,
    is_adapter: bool,
    additive: bool = False,
    driver: parallel.Driver | None = None,
) -> RoundsMethod:
  """Returns the method of federated rounds of local steps.

  Args:
    loss: (params, batch, key) -> (scalar mean over the batch, metrics).
    make_rounds: (num_clients=, weights=, cohort=) -> `Rounds`, of
      `averaging.federated_adapters` or `federated_weights`.
    cohort: who takes part.
    num_samples: N, examples of all clients.
    batch_size: b, examples of a local minibatch, drawn with replacement.
    is_adapter: whether the rounds train factors.
    additive: whether factors enter by W + s L R.
    driver: None for one device.

  Returns:
    A method (see `methods`); a step is a round; metrics as of `estimator_method`.
  """
  rounds = make_rounds(
      num_clients=cohort.num_clients,
      weights=cohort.weights,
      cohort=cohort.size,
  )
  local_loss = minibatch_loss(loss, batch_size)
  if is_adapter:
    enter = inject.by_addition if additive else inject.by_product
    local_loss = enter(local_loss)
  local_examples = rounds.num_local_steps * batch_size * cohort.num_clients
  return RoundsMethod(
      rounds,
      local_loss,
      cohort,
      cohort.share * local_examples / num_samples,
      parallel.make_driver('none') if driver is None else driver,
  )


def minibatch_loss(loss: Loss, batch_size: int) -> Loss:
  """Returns (params, client, key) -> the loss of a minibatch drawn by the key."""

  def sampled(params, client, key):
    batch = partition.sample(client, jax.random.fold_in(key, 0), batch_size)
    return loss(params, batch, jax.random.fold_in(key, 1))

  return sampled


def _start(inner: Any) -> FederatedState:
  zero = lambda: jnp.zeros([], jnp.result_type(float))
  total = lambda: Total(zero(), zero())
  return FederatedState(inner, total(), total(), total(), jnp.ones([]))


def _finish(
    state: FederatedState, inner: Any, up: Any, down: Any, passes: Any
) -> tuple[FederatedState, dict[str, jax.Array]]:
  """Returns the state after a round and the metrics of what it took."""
  new = FederatedState(
      inner,
      _add(state.up, up),
      _add(state.down, down),
      _add(state.passes, passes),
      state.lr_scale,
  )
  dtype = new.up.total.dtype
  return new, {
      'data_passes': new.passes.total,
      'bits_up': new.up.total,
      'bits_down': new.down.total,
      # No differences of totals, which are rounded to more than a round.
      'round_bits_up': jnp.asarray(up, dtype),
      'round_bits_down': jnp.asarray(down, dtype),
  }


def _add(total: Total, x: Any) -> Total:
  """Adds as Kahan does: millions of rounds lose nothing."""
  x = jnp.asarray(x, total.total.dtype) - total.rest
  new = total.total + x
  return Total(new, (new - total.total) - x)


def _bits(numbers: jax.Array, like: Any, cohort: Cohort) -> jax.Array:
  """Returns the bits of some numbers sent to or by all clients."""
  width = 8 * jax.tree.leaves(like)[0].dtype.itemsize
  return numbers * float(width * cohort.num_clients)


def _pick(tree: Any, like: Any) -> Any:
  """Returns the tree without the leaves that are None in `like`."""
  none = lambda x: x is None
  return jax.tree.map(
      lambda k, x: None if k is None else x, like, tree, is_leaf=none
  )
