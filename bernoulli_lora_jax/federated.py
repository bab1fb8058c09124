"""Federated gradient estimators E5 (QGD), E6 (MARINA) and E7 (EF21) for optax.

They stand outermost in a chain, take the gradients of M clients stacked, leaves
(M, *shape), and return the server's estimate G, leaves (*shape):

    tx = optax.chain(
        bl.ef21(key, compressor=bl.compressors.topk(fraction=0.01), num_clients=M),
        bl.scale_by_bernoulli_chain(chain_key, rank=r),
        optax.scale_by_learning_rate(gamma))
    grads = jax.vmap(jax.grad(client_loss), (None, 0))(params, clients)
    updates, state = tx.update(grads, state, params)

What a client sends passes through its compressor's encoding, so a run is what a
network would give, and `bits_up` counts real payloads.

Symbols: f = sum_l w_l f_l, w_l the weights (1/M by default), G_l the estimate of
client l, Q an unbiased and C a contractive compressor, q = prob of MARINA.

*Devices.* Clients are an axis of the arrays: shard it, under `jit` on a mesh whose
axes are `jax.sharding.AxisType.Auto`, and the state of `marina` and `ef21` with it
(`per_client` marks the leaves). Gradients stay where their clients are; sums over
clients are all that devices exchange.

    split, whole = (jax.NamedSharding(mesh, s) for s in (jax.P('clients'), jax.P()))
    place = lambda x, is_client: jax.device_put(x, split if is_client else whole)
    state = jax.tree.map(place, state, bl.federated.per_client(state))

*Leaves.* Gradients are paired with the params by path. Leaves that are no floats
(counters, masks) are not sent; their estimate is zero.

*Partial participation.* `cohort=c` draws c clients a round; `participants`, a mask
of shape (M,) passed to `update`, names them. Which theory is left stands in each
docstring.

Reference: Khirirat et al., QGD, arXiv 1806.06573; Gorbunov et al., MARINA, arXiv
2102.07845; Richtarik et al., EF21, arXiv 2106.05203; Sokolov et al.,
Bernoulli-LoRA, arXiv 2508.03820.
"""

from collections.abc import Iterator, Sequence
import contextlib
from typing import Any, NamedTuple
import zlib

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import clients as clients_lib
from bernoulli_lora_jax import compressors
from bernoulli_lora_jax import estimators
from bernoulli_lora_jax import matrices
from bernoulli_lora_jax import sketches

# Purposes folded into a round's key; 2: clients.py.
_COIN, _COMPRESSOR = range(2)


class QgdState(NamedTuple):
  """State of `qgd`."""

  count: jax.typing.ArrayLike  # shape=(), int32; updates applied so far.
  key: jax.Array  # shape=(), typed PRNG key; folded with count.
  sent: jax.Array  # shape=(2,), int32; compressed and whole gradients so far,
  # at most 2^31 - 1 of each: none is counted beyond.


class MarinaState(NamedTuple):
  """State of `marina`."""

  count: jax.typing.ArrayLike  # shape=(), int32; updates applied so far.
  key: jax.Array  # shape=(), typed PRNG key; folded with count.
  sent: jax.Array  # shape=(2,), int32; compressed and whole gradients so far,
  # at most 2^31 - 1 of each: none is counted beyond.
  is_full: jax.Array  # shape=(), bool; the last round sent whole gradients.
  gradients: Any  # grad f_l when l last took part, leaves (M, *shape).
  estimate: Any  # G of the last update, shaped like the params.


class Ef21State(NamedTuple):
  """State of `ef21`."""

  count: jax.typing.ArrayLike  # shape=(), int32; updates applied so far.
  key: jax.Array  # shape=(), typed PRNG key; folded with count.
  sent: jax.Array  # shape=(2,), int32; compressed and whole gradients so far,
  # at most 2^31 - 1 of each: none is counted beyond.
  estimates: Any  # G_l, leaves (M, *shape).
  memory: Any  # State of the compressors, leaves (M, ...); () without.


def send(
    compressor: compressors.Compressor,
    key: jax.Array,
    tree: Any,
    memory: Any = (),
    *,
    concatenate: bool = False,
) -> tuple[Any, Any]:
  """Returns what one client sends: (payloads by leaf, its compressor's state).

  Args:
    compressor: of each leaf, or of all of them.
    key: typed PRNG key of client and round, see `client_key`.
    tree: arrays.
    memory: states as of `init_memory`; () for compressors without.
    concatenate: whether the leaves are sent as one vector, in the order of their
      paths, whatever the containers.

  Returns:
    ({path: payload}, {path: state}).
  """
  payloads, states, last = {}, {}, {}
  for path, leaf in _leaves(tree, concatenate).items():
    leaf_key = jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
    if 'basis' in last:  # One factorisation after another.
      leaf = sketches.behind(leaf, last['basis'])
    with _naming(path):
      if compressor.init is None:
        payloads[path] = compressor.encode(leaf_key, leaf)
      else:
        payloads[path], states[path] = compressor.encode(
            leaf_key, leaf, memory[path]
        )
    last = payloads[path]
  return payloads, states or ()


def receive(
    compressor: compressors.Compressor,
    payloads: Any,
    like: Any,
    *,
    concatenate: bool = False,
) -> Any:
  """Returns the tree restored from what `send` returned.

  Args:
    compressor: as for `send`.
    payloads: as for `send`.
    like: tree of arrays or shapes that was sent.
    concatenate: as for `send`.
  """
  shapes = _floats(like)
  if concatenate:
    zeros = {path: jnp.zeros(x.shape, x.dtype) for path, x in shapes.items()}
    flat, unravel = _ravel(zeros)
    arrived = unravel(compressor.decode(payloads[''], flat.shape, flat.dtype))
  else:
    arrived = [
        compressor.decode(payloads[path], x.shape, x.dtype)
        for path, x in shapes.items()
    ]
  arrived = dict(zip(shapes, arrived, strict=True))
  leaves = [
      arrived[path] if path in arrived else jnp.zeros(np.shape(x), jnp.int32)
      for path, x in matrices.named_leaves(like).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def client_key(key: jax.Array, count: Any, client: Any) -> jax.Array:
  """Returns the key with which a client compresses in a round.

  Args:
    key: typed PRNG key of the estimator.
    count: number of the round, from 0.
    client: number of the client, from 0.
  """
  round_key = jax.random.fold_in(key, count)
  purpose = jax.random.fold_in(round_key, _COMPRESSOR)
  return jax.random.fold_in(purpose, client)


def init_memory(
    compressor: compressors.Compressor,
    params: Any,
    *,
    concatenate: bool = False,
) -> Any:
  """Returns the compressor's state of one client; () for those without."""
  if compressor.init is None:
    return ()
  return {
      path: compressor.init(leaf.shape, leaf.dtype)
      for path, leaf in _leaves(params, concatenate).items()
  }


def message_bits(
    compressor: compressors.Compressor,
    params: Any,
    *,
    concatenate: bool = False,
) -> tuple[int, int]:
  """Returns the size of a client's message in bits: (compressed, whole).

  Args:
    compressor: of each leaf, or of all of them.
    params: tree of arrays or shapes.
    concatenate: whether the leaves are sent as one vector.
  """
  sizes = [0, 0]
  for path, x in _leaves(params, concatenate).items():
    for i, one in enumerate((compressor, compressors.identity())):
      with _naming(path):
        sizes[i] += one.payload_bits(x.shape, x.dtype)
  return sizes[0], sizes[1]


def bits_up(
    state: Any,
    compressor: compressors.Compressor,
    params: Any,
    *,
    concatenate: bool = False,
) -> jax.Array:
  """Returns the bits that all clients have sent so far, shape ().

  Counted in whole messages. Exact but for one rounding, to float32 (float64 under
  x64); under `jit` each count, size, product and the sum are rounded.

  Args:
    state: of `qgd`, `marina` or `ef21`, or of a chain that has one.
    compressor: the estimator's.
    params: tree of arrays or shapes.
    concatenate: the estimator's.
  """
  sent = optax.tree.get(state, 'sent')
  sizes = message_bits(compressor, params, concatenate=concatenate)
  dtype = jnp.result_type(float)
  if isinstance(sent, jax.core.Tracer):
    wide = sent.astype(dtype)  # Sizes may be beyond 32 bits.
    return wide[0] * float(sizes[0]) + wide[1] * float(sizes[1])
  total = sum(int(n) * size for n, size in zip(sent, sizes, strict=True))
  return jnp.asarray(float(total), dtype)


def per_client(state: Any) -> Any:
  """Returns a tree of bool: the leaves with a leading axis of clients.

  Args:
    state: any optimiser state, that of an estimator somewhere in it.
  """
  kinds = (MarinaState, Ef21State)

  def mark(node):
    flags = jax.tree.map(lambda _: False, node)
    if not isinstance(node, kinds):
      return flags
    ours = ('gradients', 'estimates', 'memory')
    return flags._replace(
        **{
            name: jax.tree.map(lambda _: True, getattr(node, name))
            for name in ours
            if name in node._fields
        }
    )

  is_leaf = lambda node: isinstance(node, kinds)
  return jax.tree.map(mark, state, is_leaf=is_leaf)


def cohort_omega(omega: float, num_clients: int, cohort: int) -> float:
  """Returns the omega of a uniform cohort of c out of M clients.

  E||(1/c) sum_S Q(x_l) - mean_l x_l||^2 <= omega'/M mean_l ||x_l||^2 with
  omega' = (M/c) (omega + (M - c)/(M - 1)): T5 and, where whole gradients come
  from all clients, T6 hold with omega' in place of omega.

  Args:
    omega: of the compressor.
    num_clients: M.
    cohort: c in [1, M], drawn without replacement, weights 1/M.
  """
  if cohort == num_clients:
    return omega
  rest = (num_clients - cohort) / (num_clients - 1)
  return num_clients / cohort * (omega + rest)


def qgd(
    key: jax.Array,
    *,
    compressor: compressors.Compressor,
    num_clients: int,
    weights: Sequence[float] | None = None,
    cohort: int | None = None,
    concatenate: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Averages quantised client gradients (E5): G = sum_l w_l Q(grad f_l(W)).

  Args:
    key: typed PRNG key of the compressors, independent over clients and rounds.
    compressor: unbiased, with `omega`.
    num_clients: M >= 1.
    weights: w_l >= 0, normalised to sum 1; None for 1/M.
    cohort: c, clients drawn a round without replacement; None for all. G is then
      (M/c) sum over the cohort, unbiased.
    concatenate: whether each client sends its leaves as one vector; by default
      every leaf has a payload of its own.

  Returns:
    A transformation whose `update(updates, state, params, *, participants=None)`
    takes client gradients, leaves (M, *shape), and returns leaves (*shape).

  Raises:
    ValueError: a biased compressor, an argument outside its range; at init, a
      masked tree or `MultiSteps`; at update, leaves without the client axis.

  Guarantees:
    E G = grad f(W), and E||G - grad f||^2 <= omega sum_l w_l^2 ||grad f_l||^2.
    The identity gives the weighted mean: gradient descent.
    T5 holds; with a cohort and equal weights with `cohort_omega`. For a mask from
      elsewhere G is the weighted mean over those named, zero where nobody is, and
      nothing is claimed.

  References:
    Khirirat et al., arXiv 1806.06573; Sokolov et al., arXiv 2508.03820.
  """
  _check_unbiased('qgd', compressor)
  clients = clients_lib.make_clients(num_clients, weights, cohort)

  def init(params):
    estimators.check_outermost(params, 'qgd')
    sent = jnp.zeros(2, jnp.int32)
    return QgdState(jnp.zeros([], jnp.int32), jnp.copy(key), sent)

  def update(updates, state, params=None, *, participants=None, **extra):
    del extra
    updates = _prepared('qgd', updates, params, clients)
    present = clients_lib.present(
        clients, jax.random.fold_in(state.key, state.count), participants
    )
    arrived, _ = _transmit(compressor, clients, state, updates, (), concatenate)
    scale = clients_lib.effective_weights(
        clients, present, participants is not None
    )
    estimate = clients_lib.weighted_sum(arrived, scale)
    sent = _count_sent(state.sent, present, False)
    count = optax.safe_increment(state.count)
    return estimate, QgdState(count, state.key, sent)

  return optax.GradientTransformationExtraArgs(init, update)


def marina(
    key: jax.Array,
    *,
    compressor: compressors.Compressor,
    prob: float | jax.Array,
    num_clients: int,
    weights: Sequence[float] | None = None,
    cohort: int | None = None,
    concatenate: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Compresses differences of client gradients (MARINA, E6).

  With probability `prob`, one coin for all clients, and at the first step all
  send their gradients whole; otherwise G + sum_l w_l Q(grad f_l(W+) - grad
  f_l(W)).

  Args:
    key: typed PRNG key of coins and compressors.
    compressor: unbiased, with `omega`.
    prob: q in (0, 1]; customary is (K/d) for RandK.
    num_clients: M >= 1.
    weights: w_l >= 0, normalised to sum 1; None for 1/M.
    cohort: c, clients drawn without replacement in rounds of differences; in
      rounds of whole gradients all take part (PP-MARINA).
    concatenate: as for `qgd`.

  Returns:
    As for `qgd`. State: the last gradients of all clients and G.

  Raises:
    ValueError: as for `qgd`; prob outside (0, 1].

  Guarantees:
    prob=1 and the identity are gradient descent.
    Off the whole rounds E[G+ - G] = grad f(W+) - grad f(W).
    T6 holds, with weights for sum_l w_l^2 L_l^2 in place of Lt^2/M; with a
      cohort and equal weights with `cohort_omega`. For a mask from elsewhere the
      averages are over those named, differences to the last round of each, and
      nothing is claimed.

  References:
    Gorbunov et al., MARINA, arXiv 2102.07845, algorithms 1 and 4.
  """
  _check_unbiased('marina', compressor)
  if not isinstance(prob, jax.Array) and not 0 < prob <= 1:
    raise ValueError(f'Expected prob in (0, 1], got prob={prob}.')
  clients = clients_lib.make_clients(num_clients, weights, cohort)

  def init(params):
    estimators.check_outermost(params, 'marina')
    return MarinaState(
        jnp.zeros([], jnp.int32),
        jnp.copy(key),  # Copies, so that a caller may donate the state.
        jnp.zeros(2, jnp.int32),
        jnp.zeros([], bool),
        _zeros(params, num_clients),
        _zeros(params),
    )

  def update(updates, state, params=None, *, participants=None, **extra):
    del params, extra
    given, updates = updates, _prepared(
        'marina', updates, state.estimate, clients
    )
    is_masked = participants is not None
    round_key = jax.random.fold_in(state.key, state.count)
    coin = jax.random.bernoulli(jax.random.fold_in(round_key, _COIN), prob)
    is_full = coin | (state.count == 0)
    present = clients_lib.present(clients, round_key, participants)
    present = present | (is_full & (not is_masked))

    def whole():
      scale = clients_lib.effective_weights(clients, present, True)
      mean = clients_lib.weighted_sum(updates, scale)
      is_any = jnp.any(scale > 0)
      return jax.tree.map(
          lambda new, old: jnp.where(is_any, new, old), mean, state.estimate
      )

    def difference():
      moved = jax.tree.map(jnp.subtract, updates, state.gradients)
      arrived, _ = _transmit(compressor, clients, state, moved, (), concatenate)
      scale = clients_lib.effective_weights(clients, present, is_masked)
      step = clients_lib.weighted_sum(arrived, scale)
      return jax.tree.map(jnp.add, state.estimate, step)

    estimate = jax.lax.cond(is_full, whole, difference)
    gradients = updates
    if is_masked:  # Nothing is kept of those who are absent.
      gradients = clients_lib.where(present, updates, state.gradients)
    sent = _count_sent(state.sent, present, is_full)
    count = optax.safe_increment(state.count)
    return _like_given(estimate, given), MarinaState(
        count, state.key, sent, is_full, gradients, estimate
    )

  return optax.GradientTransformationExtraArgs(init, update)


def ef21(
    key: jax.Array,
    *,
    compressor: compressors.Compressor,
    num_clients: int,
    start: str = 'full',
    weights: Sequence[float] | None = None,
    cohort: int | None = None,
    concatenate: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Compresses the error of each client's estimate (EF21, E7).

  G_l+ = G_l + C(grad f_l(W+) - G_l), G = sum_l w_l G_l.

  Args:
    key: typed PRNG key of the compressors; deterministic ones do not use it.
    compressor: contractive, with `beta`, or with state (warm-started powersgd,
      outside of T7); `compressors.contractive` makes one of an unbiased one.
    num_clients: M >= 1.
    start: G_l at the first step: 'full' (the whole gradient), 'compressed' (C of
      it) or 'zero' (the first step then does not move).
    weights: w_l >= 0, normalised to sum 1; None for 1/M.
    cohort: c, clients drawn a round without replacement; others keep their G_l.
    concatenate: as for `qgd`.

  Returns:
    As for `qgd`. State: the estimates of all clients.

  Raises:
    ValueError: as for `qgd`; another start.

  Guarantees:
    The identity is gradient descent.
    ||G_l+ - grad f_l(W+)||^2 <= (1 - beta) ||G_l - grad f_l(W+)||^2, in the mean.
    T7 holds when all take part, with weights for sum_l w_l L_l^2 in place of
      Lt^2. With a cohort or a mask it does not (Fatkhullin et al., EF21 with
      bells and whistles, arXiv 2110.03294, have constants for independent
      participation).

  References:
    Richtarik et al., EF21, arXiv 2106.05203, algorithm 2.
  """
  if compressor.beta is None and compressor.init is None:
    raise ValueError(
        'Expected a contractive compressor for ef21, got'
        f' {compressor.name}: wrap it with compressors.contractive.'
    )
  if start not in ('full', 'compressed', 'zero'):
    raise ValueError(
        "Expected start to be 'full', 'compressed' or 'zero', got"
        f' {start!r}.'
    )
  clients = clients_lib.make_clients(num_clients, weights, cohort)

  def init(params):
    estimators.check_outermost(params, 'ef21')
    one = init_memory(compressor, params, concatenate=concatenate)
    stack = lambda x: jnp.repeat(x[None], num_clients, 0)
    return Ef21State(
        jnp.zeros([], jnp.int32),
        jnp.copy(key),
        jnp.zeros(2, jnp.int32),
        _zeros(params, num_clients),
        jax.tree.map(stack, one),
    )

  def update(updates, state, params=None, *, participants=None, **extra):
    del params, extra
    given, updates = updates, _prepared(
        'ef21', updates, state.estimates, clients
    )
    present = clients_lib.present(
        clients, jax.random.fold_in(state.key, state.count), participants
    )
    is_first = (state.count == 0) & (start != 'compressed')

    def begin():  # A client that misses the first round starts from zero.
      if start == 'zero':
        return state.estimates, state.memory
      return clients_lib.where(present, updates, state.estimates), state.memory

    def correct():
      error = jax.tree.map(jnp.subtract, updates, state.estimates)
      arrived, memory = _transmit(
          compressor, clients, state, error, state.memory, concatenate
      )
      moved = jax.tree.map(jnp.add, state.estimates, arrived)
      return (
          clients_lib.where(present, moved, state.estimates),
          clients_lib.where(present, memory, state.memory),
      )

    estimates, memory = jax.lax.cond(is_first, begin, correct)
    estimate = clients_lib.weighted_sum(estimates, clients.weights)
    sent = _count_sent(
        state.sent, present & ~(is_first & (start == 'zero')), is_first
    )
    count = optax.safe_increment(state.count)
    estimate = _like_given(estimate, given)
    return estimate, Ef21State(count, state.key, sent, estimates, memory)

  return optax.GradientTransformationExtraArgs(init, update)


def _floats(tree: Any) -> dict[str, Any]:
  """Returns {path: leaf} of the leaves that are sent."""
  leaves = {
      path: matrices.shape_of(x, path)
      for path, x in matrices.named_leaves(tree).items()
  }
  is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
  # One order for all containers: concatenated leaves are told by their place.
  parts = lambda path: [
      (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
      for part in path.split('/')
  ]
  ordered = sorted(leaves, key=parts)
  return {path: leaves[path] for path in ordered if is_float(leaves[path])}


def _ravel(leaves: dict[str, Any]) -> tuple[jax.Array, Any]:
  return jax.flatten_util.ravel_pytree(list(leaves.values()))


def _leaves(tree: Any, concatenate: bool) -> dict[str, Any]:
  """Returns what is sent: {path: leaf}, or {'': all of them as one vector}."""
  leaves = _floats(tree)
  if not concatenate:
    return leaves
  is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  if any(map(is_shape, leaves.values())):
    return {'': jax.eval_shape(lambda tree: _ravel(tree)[0], leaves)}
  return {'': _ravel(leaves)[0]}


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
  """Puts the path in front of what a compressor raises."""
  try:
    yield
  except (TypeError, ValueError) as e:
    if type(e) not in (
        TypeError,
        ValueError,
    ):  # Of JAX, with a text of its own.
      raise
    raise type(e)(f'{path or "All leaves"}: {e}') from e


def _transmit(
    compressor: compressors.Compressor,
    clients: clients_lib.Clients,
    state: Any,
    stack: Any,
    memory: Any,
    concatenate: bool,
) -> tuple[Any, Any]:
  """Returns what arrives from each client, stacked, and the new memories."""

  def one(client, tree, memory):
    key = client_key(state.key, state.count, client)
    payloads, memory = send(
        compressor, key, tree, memory, concatenate=concatenate
    )
    arrived = receive(compressor, payloads, tree, concatenate=concatenate)
    return arrived, memory

  return jax.vmap(one)(jnp.arange(clients.num_clients), stack, memory)


def _count_sent(
    sent: jax.Array, present: jax.Array, is_whole: bool | jax.Array
) -> jax.Array:
  kind = jnp.asarray(is_whole, jnp.int32)
  added = jnp.zeros_like(sent).at[kind].add(jnp.sum(present, dtype=jnp.int32))
  largest = jnp.iinfo(sent.dtype).max
  return jnp.where(sent > largest - added, largest, sent + added)


def _zeros(params: Any, *lead: int) -> Any:
  """Returns zeros for an estimate, shaped like the params behind `lead`."""
  sent = _floats(params)
  leaves = [
      jnp.zeros(
          (*lead, *np.shape(x)), sent[path].dtype if path in sent else jnp.int32
      )
      for path, x in matrices.named_leaves(params).items()
  ]
  return jax.tree.structure(params).unflatten(leaves)


def _prepared(
    name: str, updates: Any, like: Any, clients: clients_lib.Clients
) -> Any:
  """Returns client gradients in the structure and the dtypes of a tree.

  Leaves that are no floats become zeros. `like` None leaves all as it is.
  """
  _check_stack(name, updates, clients)
  if like is not None:
    updates = matrices.align(like, updates, ('params', 'client gradients'))
  sent = _floats(updates)
  leaves = [
      sent.get(path, jnp.zeros(np.shape(x), jnp.int32))
      for path, x in matrices.named_leaves(updates).items()
  ]
  updates = jax.tree.structure(updates).unflatten(leaves)
  if (
      like is None or name == 'qgd'
  ):  # It keeps nothing whose dtype could change.
    return updates
  return jax.tree.map(lambda u, s: u.astype(s.dtype), updates, like)


def _like_given(estimate: Any, given: Any) -> Any:
  """Returns an estimate in the dtypes of the gradients that were given."""
  given = _floats(given)
  leaves = [
      x.astype(given[path].dtype) if path in given else x
      for path, x in matrices.named_leaves(estimate).items()
  ]
  return jax.tree.structure(estimate).unflatten(leaves)


def _check_unbiased(name: str, compressor: compressors.Compressor) -> None:
  if compressor.omega is None:
    raise ValueError(
        f'Expected an unbiased compressor for {name}, got {compressor.name}:'
        ' ef21 takes biased ones.'
    )


def _check_stack(name: str, updates: Any, clients: clients_lib.Clients) -> None:
  """Raises unless all leaves have the leading axis of clients."""
  for path, x in matrices.named_leaves(updates).items():
    if x.ndim == 0 or x.shape[0] != clients.num_clients:
      raise ValueError(
          f'Expected client gradients of shape ({clients.num_clients}, ...) for'
          f' {name}, got {x.shape} in {path}.'
      )
