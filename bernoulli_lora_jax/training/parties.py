"""A federated run as its parties: what the server does, what a client does.

No transport: payloads are dicts of NumPy arrays, which a network carries, and every
function is deterministic, so that all parties keep the same view of the server.
`launch/federated_flower` runs them over Flower; one process runs the same by
`training.federated_methods`, with the same result up to rounding.

A round t, for each party with its `view` (from `init`, the same everywhere):

    view = parties.begin(view)
    payload, memory = parties.reply(view, memory, client)     # each client
    broadcast, server = parties.combine(view, server, {client: payload})
    view = parties.apply(view, broadcast)                     # everyone

Who missed rounds applies the broadcasts that it missed, the oldest first. A client
keeps the memory of the last round until it hears that its payload was accepted.

Two kinds: rounds of local steps (adapters, or whole weights: fedavg), and EF21 with
a chain, where the clients send compressed errors and the server the thin factor
of the projected update.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
import optax

from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import chain as chain_lib
from bernoulli_lora_jax import compressors
from bernoulli_lora_jax import federated as federated_lib
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax import wire
from bernoulli_lora_jax.tasks import partition
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import federated_methods
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import programs

Payload = wire.Arrays


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
  """What the parties of any run know of it."""

  task: task_lib.Task
  cohort: federated_methods.Cohort
  num_rounds: int
  run_key: jax.Array

  @property
  def num_clients(self) -> int:
    """Returns M."""
    return self.cohort.num_clients

  def initial(self) -> Any:
    """Returns the weights at step 0."""
    return programs.init_params(self.task, self.run_key, self.task.weights)

  def evaluate(self, params: Any) -> dict[str, float]:
    """Returns the metrics of all splits."""
    nothing: Any = ()  # Of a task what can be hashed.
    spec = self.task._replace(data=nothing, weights=nothing)
    return {
        f'{split}_{name}': float(value)
        for split in sorted(self.task.data.keys() - {'clients'})
        for name, value in _metrics(spec, params, self.task.data, split).items()
    }


@dataclasses.dataclass(frozen=True, eq=False)
class LocalRounds(_Run):
  """A federated run of local steps; a view is the state of the rounds."""

  rounds: averaging.Rounds
  loss: averaging.Loss  # Of a local step.

  def init(self) -> Any:
    """Returns the view before the first round, the same everywhere."""
    key = jax.random.fold_in(programs.method_key(self.run_key), 1)
    return self.rounds.init(key, self.initial())

  def init_client(self) -> Any:
    """Returns the memory of a client."""
    return ()

  def init_server(self) -> Any:
    """Returns the memory of the server."""
    return ()

  def begin(self, view: Any) -> Any:
    """Returns the view at the beginning of a round."""
    return _begin(self.rounds, view)

  def reply(self, view: Any, memory: Any, client: int) -> tuple[Payload, Any]:
    """Returns a client's payload, and its memory if the payload is accepted."""
    trained = _local(
        self.rounds,
        self.loss,
        view,
        self.run_key,
        self.task.data['clients'],
        client,
    )
    return averaging.to_wire(self.rounds, view, trained), memory

  def check(self, view: Any, payload: Payload) -> None:
    """Raises ValueError, by path, unless a payload is one of the round."""
    wire.check(self._like(view), payload)

  def combine(
      self, view: Any, server: Any, payloads: Mapping[int, Payload]
  ) -> tuple[Payload, Any]:
    """Returns the broadcast and the server's memory; payloads: by client."""
    if not payloads:
      return self._like(view), server
    weights = self.cohort.weights
    total = sum(weights[client] for client in payloads)
    shares = {i: weights[i] / total for i in sorted(payloads)}
    mean = {}
    for path, x in self._like(view).items():
      terms = [w * payloads[i][path] for i, w in shares.items()]
      mean[path] = np.sum(terms, axis=0).astype(x.dtype)
    return mean, server

  def apply(self, view: Any, broadcast: Payload) -> Any:
    """Returns the view after the round, from its broadcast."""
    mean = averaging.from_wire(self.rounds, view, broadcast)
    return _finish(self.rounds, view, mean)

  def params(self, view: Any) -> Any:
    """Returns the merged weights."""
    return _params(self.rounds, view)

  def _like(self, view: Any) -> Payload:
    trained = self.rounds.trained(view)
    return averaging.to_wire(self.rounds, view, trained)


def _make_local_rounds(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> LocalRounds:
  settings = experiment.make_settings(config, task)
  cohort = arguments.make_cohort(config, task)
  rounds = arguments.make_rounds(
      config,
      task,
      arguments.make_schedule(config, task, settings.num_steps),
      config.method.prob,
      num_clients=cohort.num_clients,
      weights=cohort.weights,
  )
  loss = federated_methods.minibatch_loss(task.loss, config.task.batch_size)
  if rounds.chain is not None:
    is_flax = arguments.is_flax(task)
    loss = (inject.by_product if is_flax else inject.by_addition)(loss)
  key = jax.random.key(config.seed)
  return LocalRounds(task, cohort, settings.num_steps, key, rounds, loss)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _local(rounds, loss, state, run_key, clients, number):
  """Returns what one client trained in a round."""
  key = programs.noise_key(run_key, state.count // rounds.num_local_steps)
  client = jax.tree.map(lambda x: x[number], clients)
  key = averaging.client_key(key, number)
  return rounds.local(state, loss, client, key)[0]


_begin = jax.jit(lambda rounds, state: rounds.begin(state), static_argnums=0)
_params = jax.jit(lambda rounds, state: rounds.params(state), static_argnums=0)
_finish = jax.jit(
    lambda rounds, state, mean: rounds.finish(state, mean), static_argnums=0
)


class Ef21View(NamedTuple):
  """What all parties know of an EF21 run."""

  params: Any
  opt_state: Any  # Of the chain with its learning rate.
  count: int  # Rounds done.


@dataclasses.dataclass(frozen=True, eq=False)
class Ef21(_Run):
  """A federated run of EF21 with a chain; the methods of `LocalRounds`.

  A client remembers its estimate and its compressor's state, the server the
  estimate of all.
  """

  compressor: compressors.Compressor
  concatenate: bool
  start: str
  tx: optax.GradientTransformation  # The chain with its learning rate.
  trained: Callable[[Any], Any] | None  # params -> tree of bool.
  thin: 'Thin | None'

  def init(self) -> Ef21View:
    """Returns the view before the first round, the same everywhere."""
    params = self.initial()
    ours = averaging.trained_part(params, self.trained)
    return Ef21View(params, self.tx.init(ours), 0)

  def init_client(self) -> Any:
    """Returns the memory of a client."""
    zeros = self.init_server()
    states = federated_lib.init_memory(
        self.compressor, zeros, concatenate=self.concatenate
    )
    return zeros, states

  def init_server(self) -> Any:
    """Returns the memory of the server."""
    ours = averaging.trained_part(self.initial(), self.trained)
    return jax.tree.map(jnp.zeros_like, ours)

  def begin(self, view: Ef21View) -> Ef21View:
    """Returns the view at the beginning of a round."""
    return view

  def reply(
      self, view: Ef21View, memory: Any, client: int
  ) -> tuple[Payload, Any]:
    """Returns a client's payload, and its memory if the payload is accepted."""
    kind = self._kind(view)
    if kind == 'nothing':
      return {}, memory
    grads = _gradient(
        self.task.loss,
        self.trained,
        view.params,
        self.run_key,
        self.task.data['clients'],
        client,
        view.count,
    )
    if kind == 'whole':
      return wire.flatten({'': grads}), (grads, memory[1])
    payloads, memory = self._compress(grads, memory, client, view.count)
    return wire.flatten(payloads), memory

  def check(self, view: Ef21View, payload: Payload) -> None:
    """Raises ValueError, by path, unless a payload is one of the round."""
    zeros = lambda x: np.zeros(x.shape, x.dtype)
    wire.check(wire.flatten(self._shapes(view), zeros), payload)

  def combine(
      self, view: Ef21View, server: Any, payloads: Mapping[int, Payload]
  ) -> tuple[Payload, Any]:
    """Returns the broadcast and the server's memory; payloads: by client."""
    kind, shapes = self._kind(view), self._shapes(view)
    for i in sorted(payloads):
      weight = self.cohort.weights[i]
      payload = wire.unflatten(payloads[i], shapes)
      if kind == 'whole':
        server = _sum(server, payload[''], weight)
      elif kind == 'compressed':
        server = _added(
            self.compressor, self.concatenate, server, payload, weight
        )
    updates = _updates(
        self.tx, self.trained, server, view.opt_state, view.params
    )
    return _packed(self.thin, view.opt_state, updates), server

  def apply(self, view: Ef21View, broadcast: Payload) -> Ef21View:
    """Returns the view after the round, from its broadcast."""
    zeros = self.init_server()
    wire.check(_packed(self.thin, view.opt_state, zeros), broadcast)
    updates = _unpacked(self.thin, view.opt_state, broadcast, zeros)
    params, opt_state = _moved(
        self.tx, self.trained, view.params, view.opt_state, updates
    )
    return Ef21View(params, opt_state, view.count + 1)

  def params(self, view: Ef21View) -> Any:
    """Returns the weights."""
    return view.params

  def _kind(self, view: Ef21View) -> str:
    """Returns what is sent: the whole gradient, a compressed one or nothing."""
    if view.count or self.start == 'compressed':
      return 'compressed'
    return {'full': 'whole', 'zero': 'nothing'}[self.start]

  def _shapes(self, view: Ef21View) -> dict[str, Any]:
    """Returns the shapes of a payload of the round."""
    memory = jax.eval_shape(self.init_client)
    if self._kind(view) == 'nothing':
      return {}
    if self._kind(view) == 'whole':
      return {'': memory[0]}
    return jax.eval_shape(self._compress, memory[0], memory, 0, 0)[0]

  def _compress(self, grads, memory, client, count):
    key = jax.random.fold_in(programs.method_key(self.run_key), 0)
    return _compressed(
        self.compressor,
        self.concatenate,
        grads,
        memory,
        federated_lib.client_key(key, count, client),
    )


def _make_ef21(config: config_dict.ConfigDict, task: task_lib.Task) -> Ef21:
  settings = experiment.make_settings(config, task)
  key = jax.random.key(config.seed)
  make_tx = arguments.make_transformation(
      config,
      task,
      arguments.make_schedule(config, task, settings.num_steps),
      config.method.prob,
  )
  return Ef21(
      task,
      arguments.make_cohort(config, task),
      settings.num_steps,
      key,
      arguments.make_compressor(config),
      config.federated.concatenate,
      config.federated.start,
      make_tx(jax.random.fold_in(programs.method_key(key), 1)),
      arguments.trained_leaves(config, task),
      _make_thin(config, task),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(loss, trained, params, run_key, clients, number, count):
  """Returns the gradient of a client by the leaves that move."""
  client = jax.tree.map(lambda x: x[number], clients)
  noise = programs.noise_key(run_key, count)

  def value(ours):
    whole = averaging.joined(params, ours)
    return partition.client_loss(loss)(whole, client, noise)[0]

  return jax.grad(value)(averaging.trained_part(params, trained))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compressed(compressor, concatenate, grads, memory, key):
  """Returns what a client sends, and its memory after that."""
  estimate, states = memory
  error = jax.tree.map(jnp.subtract, grads, estimate)
  payloads, states = federated_lib.send(
      compressor, key, error, states, concatenate=concatenate
  )
  arrived = federated_lib.receive(
      compressor, payloads, error, concatenate=concatenate
  )
  return payloads, (jax.tree.map(jnp.add, estimate, arrived), states)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _added(compressor, concatenate, server, payloads, weight):
  arrived = federated_lib.receive(
      compressor, payloads, server, concatenate=concatenate
  )
  return _sum(server, arrived, weight)


def _sum(server, arrived, weight):
  return jax.tree.map(lambda g, x: g + weight * x, server, arrived)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _updates(tx, trained, server, opt_state, params):
  ours = averaging.trained_part(params, trained)
  return tx.update(server, opt_state, ours)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moved(tx, trained, params, opt_state, updates):
  """Returns params and the optimiser's state after an update."""
  ours = averaging.trained_part(params, trained)
  # The state of a chain without `inner` does not depend on the gradient.
  _, opt_state = tx.update(updates, opt_state, ours)
  params = averaging.joined(params, optax.apply_updates(ours, updates))
  return params, opt_state


@dataclasses.dataclass(frozen=True)
class Thin:
  """How the update of a chain travels: thin factors, the rest by the seed."""

  rank: int
  prob: Any  # P(left).
  period: int
  sketch: sketches.Sketch
  shared_coin: bool
  matrices: matrices_lib.Matrices | None


def _make_thin(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> Thin | None:
  """Returns how updates travel thin; None where they are whole.

  Raises:
    ValueError: an update that is more than a chain's.
  """
  c = config.method
  if c.optimizer != 'sgd' or c.clip_norm is not None:
    raise ValueError(
        "Expected method.optimizer='sgd' and no clip_norm for EF21 over a network,"
        f' got {c.optimizer!r}, clip_norm={c.clip_norm}.'
    )
  if c.name == 'full':
    return None
  return Thin(
      c.rank,
      methods.chain_prob(c.name, c.prob),
      arguments.period_of(config, task),
      arguments.make_sketch(config),
      c.shared_coin,
      arguments.make_matrices(config, task),
  )


@functools.partial(jax.jit, static_argnums=0)
def _drawn(thin, key, tree):
  found = matrices_lib.find(tree, thin.matrices)
  return links_lib.draw_links(
      key,
      found,
      ranks=[thin.rank] * len(found),
      probs=[thin.prob] * len(found),
      sketch=thin.sketch,
      shared_coin=thin.shared_coin,
  )


def _links(thin: Thin, opt_state: Any, tree: Any) -> list[tuple[Any, Any]]:
  """Returns (matrix, link) of the round that a chain's state has come to."""
  (state,) = chain_lib.states(opt_state)
  key = jax.random.fold_in(state.key, jnp.asarray(state.count) // thin.period)
  side = links_lib.known_side(thin.prob)  # `jit` makes an array of it.
  links = [x._replace(is_left=side) for x in _drawn(thin, key, tree)]
  return list(zip(matrices_lib.find(tree, thin.matrices), links, strict=True))


def _packed(thin: Thin | None, opt_state: Any, updates: Any) -> Payload:
  """Returns what the server sends of an update."""
  arrays = wire.flatten({'': updates})
  if thin is None:
    return arrays
  leaves = jax.tree.leaves(updates)
  for m, link in _links(thin, opt_state, updates):
    factors = links_lib.compress(link, m.view(leaves[m.index]))
    places = links_lib.chosen(link, m.batch)
    arrays['/' + m.path] = wire.packed(factors, places)
  return arrays


def _unpacked(
    thin: Thin | None, opt_state: Any, arrays: Payload, like: Any
) -> Any:
  """Returns the update of which `_packed` made the arrays."""
  if thin is None:
    return wire.unflatten(arrays, {'': like})['']
  links, whole = _links(thin, opt_state, like), dict(arrays)
  zeros = links_lib.zero_factors([m for m, _ in links], thin.rank, thin.prob)
  for m, link in links:
    path = '/' + m.path
    places = links_lib.chosen(link, m.batch)
    factors = wire.unpacked(arrays[path], zeros[m.path], places)
    update = m.unview(links_lib.expand(link, factors, m.m, m.n))
    whole[path] = update.astype(m.dtype)
  return wire.unflatten(whole, {'': like})['']


_metrics = jax.jit(task_lib.evaluate, static_argnums=(0, 3))

Parties = LocalRounds | Ef21


def make_parties(config: config_dict.ConfigDict) -> Parties:
  """Returns the parties of a federated config.

  Raises:
    ValueError: a config that is not federated, has a cohort, or is of another
      kind than local rounds or EF21.
  """
  experiment.check_config(config)
  if not config.federated.num_clients:
    raise ValueError('Expected federated.num_clients >= 1, got 0.')
  if config.federated.cohort is not None:
    raise ValueError(
        'Expected federated.cohort=None over a network, where those take part'
        f' who answer, got cohort={config.federated.cohort}.'
    )
  c = config.method
  task = arguments.make_task(config)
  if c.mode == 'adapter' or c.estimator == 'fedavg':
    return _make_local_rounds(config, task)
  if c.estimator == 'ef21':
    return _make_ef21(config, task)
  raise ValueError(
      "Expected method.mode='adapter' or method.estimator 'ef21' or 'fedavg' over a"
      f' network, got {c.estimator!r}.'
  )


def size(payload: Payload) -> int:
  """Returns the size of a payload in bits."""
  return wire.bits(payload)
