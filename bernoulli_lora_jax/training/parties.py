"""A federated run as its parties: what the server does, what a client does.

No transport: payloads are dicts of NumPy arrays, which a network carries, and every
function is deterministic, so that all parties keep the same view of the server.
`launch/federated_flower` runs them over Flower; one process runs the same by
`training.federated`, with the same result up to rounding.

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
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
import optax

from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import chain as chain_lib
from bernoulli_lora_jax import federated as federated_lib
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.tasks import partition
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import federated
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import methods

Payload = dict[str, np.ndarray]


class Parties(NamedTuple):
  """A federated run as functions of its parties."""

  num_rounds: int
  num_clients: int
  init: Callable[[], Any]  # () -> view.
  init_client: Callable[[], Any]  # () -> memory of a client.
  init_server: Callable[[], Any]  # () -> memory of the server.
  begin: Callable[[Any], Any]  # (view) -> view.
  # (view, memory, number of the client) -> (payload, memory).
  reply: Callable[[Any, Any, int], tuple[Payload, Any]]
  check: Callable[[Any, Payload], None]  # (view, payload); raises ValueError.
  # (view, server, {client: payload}) -> (broadcast, server).
  combine: Callable[[Any, Any, Mapping[int, Payload]], tuple[Payload, Any]]
  apply: Callable[[Any, Payload], Any]  # (view, broadcast) -> view.
  params: Callable[[Any], Any]  # (view) -> merged weights.
  evaluate: Callable[[Any], dict[str, float]]  # (params) -> all metrics.


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
    return _local_rounds(config, task)
  if c.estimator == 'ef21':
    return _ef21(config, task)
  raise ValueError(
      "Expected method.mode='adapter' or method.estimator 'ef21' or 'fedavg' over a"
      f' network, got {c.estimator!r}.'
  )


def size(payload: Payload) -> int:
  """Returns the size of a payload in bits."""
  return averaging.bits(payload)


def _local_rounds(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> Parties:
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
  loss = federated.minibatch_loss(task.loss, config.task.batch_size)
  if rounds.chain is not None:
    is_flax = arguments.is_flax(task)
    enter = inject.by_product if is_flax else inject.by_addition
    loss = enter(loss)
  run_key = jax.random.key(config.seed)
  clients = task.data['clients']

  @jax.jit
  def local(state, clients, number):
    key = loop.noise_key(run_key, state.count // rounds.num_local_steps)
    client = jax.tree.map(lambda x: x[number], clients)
    return rounds.local(state, loss, client, averaging.client_key(key, number))

  def init():
    key = jax.random.fold_in(loop.method_key(run_key), 1)
    return rounds.init(key, loop.init_params(task, run_key, task.weights))

  begin = jax.jit(rounds.begin)
  finish = jax.jit(rounds.finish)

  def reply(view, memory, client):
    trained, _ = local(view, clients, client)
    return averaging.to_wire(rounds, view, trained), memory

  def like(view):
    return averaging.to_wire(rounds, view, rounds.trained(view))

  def combine(view, server, payloads):
    if not payloads:
      return like(view), server
    total = sum(cohort.weights[client] for client in payloads)
    shares = {i: cohort.weights[i] / total for i in sorted(payloads)}
    mean = {}
    for path, x in like(view).items():
      terms = [w * payloads[i][path] for i, w in shares.items()]
      mean[path] = np.sum(terms, axis=0).astype(x.dtype)
    return mean, server

  def apply(view, broadcast):
    return finish(view, averaging.from_wire(rounds, view, broadcast))

  return Parties(
      settings.num_steps,
      cohort.num_clients,
      init,
      lambda: (),
      lambda: (),
      begin,
      reply,
      lambda view, payload: averaging.check_wire(like(view), payload),
      combine,
      apply,
      jax.jit(rounds.params),
      _evaluator(task),
  )


class Ef21View(NamedTuple):
  """What all parties know of an EF21 run."""

  params: Any
  opt_state: Any  # Of the chain with its learning rate.
  count: int  # Rounds done.


def _ef21(config: config_dict.ConfigDict, task: task_lib.Task) -> Parties:
  settings = experiment.make_settings(config, task)
  cohort = arguments.make_cohort(config, task)
  compressor = arguments.make_compressor(config)
  concatenate = config.federated.concatenate
  start = config.federated.start
  run_key = jax.random.key(config.seed)
  method_key = loop.method_key(run_key)
  make_tx = arguments.make_transformation(
      config,
      task,
      arguments.make_schedule(config, task, settings.num_steps),
      config.method.prob,
  )
  tx = make_tx(jax.random.fold_in(method_key, 1))
  key = jax.random.fold_in(method_key, 0)
  trained = arguments.trained_leaves(config, task)
  clients = task.data['clients']
  client_loss = partition.client_loss(task.loss)
  wire = _UpdateWire(config, task)

  moving = lambda params: averaging.trained_part(params, trained)

  @jax.jit
  def gradient(params, clients, number, count):
    client = jax.tree.map(lambda x: x[number], clients)

    def value(ours):
      noise = loop.noise_key(run_key, count)
      return client_loss(averaging.joined(params, ours), client, noise)[0]

    return jax.grad(value)(moving(params))

  @jax.jit
  def compress(grads, memory, number, count):
    estimate, states = memory
    error = jax.tree.map(jnp.subtract, grads, estimate)
    payloads, states = federated_lib.send(
        compressor,
        federated_lib.client_key(key, count, number),
        error,
        states,
        concatenate=concatenate,
    )
    arrived = federated_lib.receive(
        compressor, payloads, error, concatenate=concatenate
    )
    return payloads, (jax.tree.map(jnp.add, estimate, arrived), states)

  def zeros():
    params = loop.init_params(task, run_key, task.weights)
    return jax.tree.map(jnp.zeros_like, moving(params))

  def init():
    params = loop.init_params(task, run_key, task.weights)
    return Ef21View(params, tx.init(moving(params)), 0)

  def init_client():
    states = federated_lib.init_memory(
        compressor, zeros(), concatenate=concatenate
    )
    return zeros(), states

  def kind(view):
    """Returns what is sent: the whole gradient, a compressed one or nothing."""
    if view.count or start == 'compressed':
      return 'compressed'
    return {'full': 'whole', 'zero': 'nothing'}[start]

  def reply(view, memory, client):
    if kind(view) == 'nothing':
      return {}, memory
    grads = gradient(view.params, clients, client, view.count)
    if kind(view) == 'whole':
      return _flat({'': grads}), (grads, memory[1])
    payloads, memory = compress(grads, memory, client, view.count)
    return _flat(payloads), memory

  def like(view):
    if kind(view) == 'nothing':
      return {}
    shapes = jax.eval_shape(zeros)
    if kind(view) == 'compressed':
      shapes = jax.eval_shape(
          compress, shapes, jax.eval_shape(init_client), 0, 0
      )[0]
    else:
      shapes = {'': shapes}
    return _flat(shapes, lambda x: np.zeros(x.shape, x.dtype))

  @jax.jit
  def add(server, payloads, weight):
    arrived = federated_lib.receive(
        compressor, payloads, server, concatenate=concatenate
    )
    return jax.tree.map(lambda g, x: g + weight * x, server, arrived)

  @jax.jit
  def update(server, opt_state, params):
    return tx.update(server, opt_state, moving(params))[0]

  def combine(view, server, payloads):
    for i in sorted(payloads):
      weight = cohort.weights[i]
      if kind(view) == 'whole':
        grads = _unflat(payloads[i], {'': server})['']
        server = jax.tree.map(lambda g, x, w=weight: g + w * x, server, grads)
      elif kind(view) == 'compressed':
        shapes = jax.eval_shape(
            compress, server, jax.eval_shape(init_client), 0, 0
        )[0]
        server = add(server, _unflat(payloads[i], shapes), weight)
    updates = update(server, view.opt_state, view.params)
    return wire.pack(view.opt_state, updates), server

  @jax.jit
  def move(params, opt_state, updates):
    ours = moving(params)
    # The state of a chain without `inner` does not depend on the gradient.
    _, opt_state = tx.update(updates, opt_state, ours)
    params = averaging.joined(params, optax.apply_updates(ours, updates))
    return params, opt_state

  def apply(view, broadcast):
    like_ = wire.pack(view.opt_state, jax.tree.map(np.zeros_like, zeros()))
    averaging.check_wire(like_, broadcast)
    updates = wire.unpack(view.opt_state, broadcast, zeros())
    params, opt_state = move(view.params, view.opt_state, updates)
    return Ef21View(params, opt_state, view.count + 1)

  return Parties(
      settings.num_steps,
      cohort.num_clients,
      init,
      init_client,
      zeros,
      lambda view: view,
      reply,
      lambda view, payload: averaging.check_wire(like(view), payload),
      combine,
      apply,
      lambda view: view.params,
      _evaluator(task),
  )


class _UpdateWire:
  """The update of a chain as what the server sends: thin factors, by the seed."""

  def __init__(self, config: config_dict.ConfigDict, task: task_lib.Task):
    c = config.method
    if c.optimizer != 'sgd' or c.clip_norm is not None:
      raise ValueError(
          "Expected method.optimizer='sgd' and no clip_norm for EF21 over a network,"
          f' got {c.optimizer!r}, clip_norm={c.clip_norm}.'
      )
    self.is_chain = c.name != 'full'
    self.rank = c.rank
    self.prob = methods.chain_prob(c.name, c.prob)
    self.matrices = arguments.make_matrices(config, task)
    self.draw = jax.jit(
        lambda key, tree: links_lib.draw_links(
            key,
            matrices_lib.find(tree, self.matrices),
            ranks=[c.rank] * len(matrices_lib.find(tree, self.matrices)),
            probs=[self.prob] * len(matrices_lib.find(tree, self.matrices)),
            sketch=arguments.make_sketch(config),
            shared_coin=c.shared_coin,
        )
    )
    self.period = arguments.period_of(config, task)

  def _links(self, opt_state, tree):
    (state,) = chain_lib.states(opt_state)
    key = jax.random.fold_in(state.key, jnp.asarray(state.count) // self.period)
    return matrices_lib.find(tree, self.matrices), self.draw(key, tree)

  def pack(self, opt_state: Any, updates: Any) -> Payload:
    flat = _flat({'': updates})
    if not self.is_chain:
      return flat
    leaves = jax.tree.leaves(updates)
    found, links = self._links(opt_state, updates)
    for m, link in zip(found, links, strict=True):
      thin = links_lib.compress(link, m.view(leaves[m.index]))
      flat['/' + m.path] = links_lib.to_wire(link, thin, m.batch)
    return flat

  def unpack(self, opt_state: Any, arrays: Payload, like: Any) -> Any:
    if not self.is_chain:
      return _unflat(arrays, {'': like})['']
    found, links = self._links(opt_state, like)
    leaves, treedef = jax.tree.flatten(like)
    paths = list(_flat({'': like}))
    chosen = {m.index for m in found}
    for i, path in enumerate(paths):
      if i not in chosen:
        leaves[i] = jnp.asarray(arrays[path].reshape(leaves[i].shape))
    zeros = links_lib.zero_factors(found, self.rank, self.prob)
    for m, link in zip(found, links, strict=True):
      thin = links_lib.from_wire(
          link, arrays['/' + m.path], zeros[m.path], m.batch
      )
      thin = jax.tree.map(jnp.asarray, thin)
      update = m.unview(links_lib.expand(link, thin, m.m, m.n))
      leaves[m.index] = update.astype(leaves[m.index].dtype)
    return treedef.unflatten(leaves)


def _evaluator(task: task_lib.Task) -> Callable[[Any], dict[str, float]]:
  evaluate = jax.jit(
      functools.partial(task_lib.evaluate, task), static_argnums=2
  )

  def run(params):
    return {
        f'{split}_{name}': float(value)
        for split in sorted(task.data.keys() - {'clients'})
        for name, value in evaluate(params, task.data, split).items()
    }

  return run


def _flat(tree: Any, convert: Callable[[Any], Any] = np.asarray) -> Payload:
  """Returns {path: array}; a key '' of the tree gives paths that begin with /."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  names = matrices_lib.path_names([path for path, _ in leaves])
  return {n: convert(x) for n, (_, x) in zip(names, leaves, strict=True)}


def _unflat(arrays: Payload, like: Any) -> Any:
  """Returns the tree of which `_flat` made the arrays."""
  names = list(_flat(like, lambda x: x))
  leaves = [jnp.asarray(arrays[name]) for name in names]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)
