"""Federated methods: estimators of client gradients, and rounds of local steps.

Their tasks are federated ones (`tasks.partition.federate`): a minibatch is the
data of all clients. Each counts what travels, to float32 (float64 under x64): up,
what clients send; down, what the server sends to each of the M clients, which is
the trained factor where a chain follows, since all know the seed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import compressors
from bernoulli_lora_jax import federated
from bernoulli_lora_jax import inject
from bernoulli_lora_jax.tasks import partition
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import parallel

ESTIMATORS = ('qgd', 'marina', 'ef21')


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


class _Method(NamedTuple):
  init: Any
  step: Any
  params: Any
  trained: Any
  passes_per_step: Any
  chain: Any = None
  per_client: Any = methods.none_marked
  frozen: Any = methods.none_marked


class Cohort(NamedTuple):
  """Who takes part; see `federated.qgd`."""

  num_clients: int
  weights: Sequence[float]
  size: int | None = None  # Clients drawn a round; None for all.

  @property
  def share(self) -> float:
    return (self.size or self.num_clients) / self.num_clients


def estimator_method(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
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
) -> Any:
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
    A `Method`; its metrics are the mean loss before the step, those of `loss`,
    data_passes, and bits: bits_up, bits_down in total, round_bits_up,
    round_bits_down of the round.

  Raises:
    ValueError: an unknown estimator or an argument outside its range.
  """
  if estimator not in ESTIMATORS:
    raise ValueError(
        f'Expected method.estimator in {ESTIMATORS}, got {estimator!r}.'
    )
  driver = parallel.make_driver('none') if driver is None else driver
  value_and_grad = jax.value_and_grad(partition.client_loss(loss), has_aux=True)

  moving = lambda params: averaging.trained_part(params, trained)

  def first(key, params):
    common: dict[str, Any] = {
        'compressor': compressor,
        'num_clients': cohort.num_clients,
        'weights': cohort.weights,
        'cohort': cohort.size,
        'concatenate': concatenate,
        'axis_name': driver.axis_name,
    }
    if estimator == 'qgd':
      return federated.qgd(key, **common)
    if estimator == 'ef21':
      return federated.ef21(key, start=start, **common)
    prob = marina_prob
    if prob is None:
      small, whole = federated.message_bits(
          compressor, params, concatenate=concatenate
      )
      prob = min(1.0, small / whole)
    return federated.marina(key, prob=prob, **common)

  def tx(key, params):
    keys = [jax.random.fold_in(key, i) for i in range(2)]
    return optax.chain(first(keys[0], params), make_tx(keys[1]))

  def init(key, params):
    copy = jax.tree.map(jnp.copy, params)  # The loop donates the state.
    opt_state = tx(key, moving(copy)).init(moving(copy))
    return _start((copy, opt_state))

  def step(state, batch, key, full):
    del full
    clients = driver.shard(batch)
    params, opt_state = state.inner
    old_sent = opt_state[0].sent

    def of_client(client):
      (value, metrics), grads = value_and_grad(params, client, key)
      return (value, metrics), _pick(grads, moving(params))

    values, grads = jax.vmap(of_client)(clients)
    ours = moving(params)
    numbers = update_numbers(opt_state[1], ours)
    updated: Any = tx(jax.random.key(0), ours).update(grads, opt_state, ours)
    updates, new = updated
    updates = jax.tree.map(
        lambda u: state.lr_scale.astype(u.dtype) * u, updates
    )
    who = _who(cohort, driver)
    value, metrics = federated.clients_lib.weighted_sum(
        values, who.weights, who
    )
    measure = lambda s: federated.bits_up(
        s, compressor, ours, concatenate=concatenate
    )
    sent = measure(new[0]._replace(sent=new[0].sent - old_sent))
    cost = jnp.asarray(cohort.share)
    if estimator == 'marina' and cohort.size is not None:
      cost = jnp.where(new[0].is_full, 1.0, 2 * cohort.share)
    params = averaging.joined(params, optax.apply_updates(ours, updates))
    down = _bits(numbers, ours, cohort)
    state, traffic = _finish(state, (params, new), sent, down, cost)
    return state, {'loss': value, **metrics, **traffic}

  passes = cohort.share
  if estimator == 'marina' and cohort.size is not None:
    passes *= 2  # But for the rounds of whole gradients.

  def per_client(state):
    flags = jax.tree.map(lambda _: False, state)
    params, opt_state = state.inner
    marks = federated.per_client(opt_state)
    return flags._replace(inner=(flags.inner[0], marks))

  return _Method(
      init,
      step,
      lambda state: state.inner[0],
      methods.all_true if trained is None else trained,
      passes,
      per_client=per_client,
  )


def rounds_method(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    make_rounds: Callable[..., averaging.Rounds],
    *,
    cohort: Cohort,
    num_samples: int,
    batch_size: int,
    is_adapter: bool,
    additive: bool = False,
    driver: parallel.Driver | None = None,
) -> Any:
  """Returns the method of federated rounds of local steps.

  Args:
    loss: (params, batch, key) -> (scalar mean over the batch, metrics).
    make_rounds: (num_clients=, weights=, cohort=, axis_name=) -> `Rounds`, of
      `averaging.federated_adapters` or `federated_weights`.
    cohort: who takes part.
    num_samples: N, examples of all clients.
    batch_size: b, examples of a local minibatch, drawn with replacement.
    is_adapter: whether the rounds train factors.
    additive: whether factors enter by W + s L R.
    driver: None for one device.

  Returns:
    A `Method`; a step is a round; metrics as of `estimator_method`.
  """
  driver = parallel.make_driver('none') if driver is None else driver
  rounds = make_rounds(
      num_clients=cohort.num_clients,
      weights=cohort.weights,
      cohort=cohort.size,
      axis_name=driver.axis_name,
  )
  local_loss = minibatch_loss(loss, batch_size)
  if is_adapter:
    enter = inject.by_addition if additive else inject.by_product
    local_loss = enter(local_loss)
  local_examples = rounds.num_local_steps * batch_size * cohort.num_clients
  passes = cohort.share * local_examples / num_samples

  def init(key, params):
    # The key of a chain in `adapter_method`: both draw the same.
    return _start(rounds.init(jax.random.fold_in(key, 1), params))

  def step(state, batch, key, full):
    del full
    inner, (value, metrics) = rounds.step(
        state.inner, local_loss, driver.shard(batch), key
    )
    numbers = rounds.sent_numbers(rounds.begin(state.inner))
    bits = _bits(numbers, rounds.trained(inner), cohort)
    new, traffic = _finish(state, inner, cohort.share * bits, bits, passes)
    metrics = task_lib.metrics_of(metrics)
    return new, {'loss': value, **metrics, **traffic}

  def trained(params):
    if rounds.chain is None:
      moved = rounds.trained(averaging.WeightsState(params, (), jnp.zeros([])))
      none = lambda x: x is None
      return jax.tree.map(lambda x: x is not None, moved, is_leaf=none)
    return methods.adapted_leaves(rounds.chain, params)

  return _Method(
      init, step, lambda state: rounds.params(state.inner), trained, passes
  )


def minibatch_loss(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]], batch_size: int
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Returns (params, client, key) -> the loss of a minibatch drawn by the key."""

  def sampled(params, client, key):
    batch = partition.sample(client, jax.random.fold_in(key, 0), batch_size)
    return loss(params, batch, jax.random.fold_in(key, 1))

  return sampled


def _who(cohort: Cohort, driver: parallel.Driver):
  return federated.clients_lib.make_clients(
      cohort.num_clients, cohort.weights, cohort.size, driver.axis_name
  )


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
