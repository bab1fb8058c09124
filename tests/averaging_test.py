"""Tests of federated averaging: what is exact, what travels, who is absent."""

import dataclasses
import functools
import itertools
import types

from absl.testing import parameterized
import chex
from flax import linen as nn
import jax
from jax.extend import core as jex_core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import clients as clients_lib
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import parts

NUM_CLIENTS, NUM_ROWS, BATCH = 4, 6, 3
NUM_STEPS, NUM_ROUNDS = 3, 5  # Local steps; rounds of a run.
STACK = bl.Matrices(rules=(bl.matrices.stacked('stack'),))
SHAPES = {'a': (4, 6), 'stack': (2, 6, 4)}
WEIGHTS = (3.0, 1.0, 2.0, 0.5)
NORMALISED = np.array(WEIGHTS) / sum(WEIGHTS)
ALL = np.ones(NUM_CLIENTS, bool)
MOMENTUM = 0.7
INIT_KEY, KEY = jax.random.key(3), jax.random.key(4)
LOCAL = 0  # Purpose folded into the key of a round.
# The stack's rank is above one side, so that a factor holds columns of padding.
TARGETS = (
    bl.Target('^a$', rank=2, alpha=1.5),
    bl.Target('^stack$', rank=5, alpha=3.0),
)


def rate(count):
  """A schedule, which must go on from round to round."""
  return 0.1 / (1 + 0.1 * count)


class Problem:
  """f_l(W) = sum_k 1/(2b) ||X_k W_k - Y_k||^2 over a minibatch of client l."""

  def __init__(self, num_clients=NUM_CLIENTS):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    self.params = {path: draw(*shape) for path, shape in SHAPES.items()}
    self.clients = {}
    for path, (*batch, m, n) in SHAPES.items():
      lead = (num_clients, *batch, NUM_ROWS)
      # Clients disagree: their optima are far from that of f.
      shift = 2 * draw(num_clients, *(1 for _ in batch), 1, n)
      self.clients[path] = draw(*lead, m), draw(*lead, n) + shift
    self.adapted = inject.by_addition(self.loss, STACK)

  def loss(self, params, client, key):
    rows = jax.random.randint(key, (BATCH,), 0, NUM_ROWS)
    total = 0.0
    for path, w in params.items():
      x, y = (jnp.take(part, rows, axis=-2) for part in client[path])
      rest = jnp.matmul(x, w.astype(x.dtype)) - y
      total += 0.5 * jnp.sum(rest**2) / BATCH
    return total, {'first': rows[0].astype(total.dtype)}

  def inputs(self):
    return jax.tree.map(jnp.asarray, (self.params, self.clients))


PROBLEM = Problem()
POLICIES = {
    'left': bl.ChainPolicy(
        rank=2, period=NUM_STEPS, side='left', targets=TARGETS
    ),
    'right': bl.ChainPolicy(
        rank=2,
        period=NUM_STEPS,
        side='right',
        sketch=bl.sketches.coordinate(),
        targets=TARGETS,
    ),
    'bernoulli': bl.ChainPolicy(
        rank=2,
        period=NUM_STEPS,
        prob=0.5,
        sketch=bl.sketches.coordinate(),
        targets=TARGETS,
    ),
    'asymmetric': adapters.ChainPolicy.asymmetric(2, 'right', targets=TARGETS),
    'lora': adapters.ChainPolicy.lora(2, targets=TARGETS),
    'cola': adapters.ChainPolicy.cola(2, NUM_STEPS, targets=TARGETS),
}


def make(name, tx=None, **kwargs):
  """Returns rounds of one of `POLICIES`, or of FedAvg with a frozen stack."""
  kwargs = dict(num_clients=NUM_CLIENTS, weights=WEIGHTS) | kwargs
  kwargs['num_local_steps'] = NUM_STEPS
  tx = optax.sgd(rate, momentum=MOMENTUM) if tx is None else tx
  if name == 'weights':
    trained = lambda params: {path: path == 'a' for path in params}
    return averaging.federated_weights(tx, trained=trained, **kwargs)
  return averaging.federated_adapters(POLICIES[name], tx, STACK, **kwargs)


def loss_of(name):
  return PROBLEM.loss if name == 'weights' else PROBLEM.adapted


@functools.cache
def compiled(name, **kwargs):
  """Returns rounds with jitted functions; `run` is a whole round in one."""
  rounds = make(name, **kwargs)
  loss = loss_of(name)

  def run(state, clients, key, mask=None):
    state, values = rounds.step(state, loss, clients, key, mask)
    return state, rounds.params(state), values

  jitted = types.SimpleNamespace(
      chain=rounds.chain,
      trained=rounds.trained,
      init=jax.jit(rounds.init),
      begin=jax.jit(rounds.begin),
      local=jax.jit(
          lambda state, client, key: rounds.local(state, loss, client, key)
      ),
      finish=jax.jit(rounds.finish),
      params=jax.jit(rounds.params),
  )
  return types.SimpleNamespace(rounds=jitted, run=jax.jit(run))


def start(name, **kwargs):
  """Returns compiled rounds, the first state and the clients."""
  fns = compiled(name, **kwargs)
  params, clients = PROBLEM.inputs()
  return fns, fns.rounds.init(INIT_KEY, params), clients


def round_key(number):
  return jax.random.fold_in(KEY, number)


def to_numpy(tree):
  """Returns a tree in NumPy, keys as their words."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  get = lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x)
  return jax.tree.map(get, tree)


def assert_same_bits(one, other):
  """Also of NaN, and dtypes."""
  chex.assert_trees_all_equal_structs(one, other)
  leaves = (jax.tree.leaves(to_numpy(tree)) for tree in (one, other))
  for x, y in zip(*leaves, strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def product(pair):
  return np.asarray(pair['left']) @ np.asarray(pair['right'])


class X64Test(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))


class ExactTest(X64Test):
  """The mean of trained factors against the mean of merged weights."""

  num_rounds = 3
  masks = np.array([ALL, [True, False, True, True], [False, True, False, True]])

  def round(self, name, fns, state, clients, number):
    """Returns what follows with a mask, and with each client of it alone."""
    mask = self.masks[number]
    key = round_key(number)
    together = fns.run(state, clients, key, jnp.asarray(mask))
    alone = {
        client: fns.run(state, clients, key, jnp.arange(NUM_CLIENTS) == client)
        for client in np.flatnonzero(mask)
    }
    total = NORMALISED[mask].sum()
    mean = lambda *trees: sum(
        NORMALISED[client] / total * np.asarray(x)
        for client, x in zip(alone, trees, strict=True)
    )
    return together, alone, mean

  @parameterized.parameters(['bernoulli'])
  def test_merged_weights_are_the_mean_of_merged_weights(self, name):
    self.check_merged_weights_are_the_mean_of_merged_weights(name)

  @parameterized.parameters('left', 'right', 'asymmetric')
  @pytest.mark.slow
  def test_merged_weights_are_the_mean_of_merged_weights_otherwise(self, name):
    self.check_merged_weights_are_the_mean_of_merged_weights(name)

  def check_merged_weights_are_the_mean_of_merged_weights(self, name):
    fns, state, clients = start(name)
    for number in range(self.num_rounds):
      together, alone, mean = self.round(name, fns, state, clients, number)
      state = together[0]
      expected = jax.tree.map(
          mean, *(params for _, params, _ in alone.values())
      )
      # One rounding a term, of weights below 8.
      chex.assert_trees_all_close(together[1], expected, rtol=0, atol=1e-14)
      each = [np.asarray(params['a']) for _, params, _ in alone.values()]
      self.assertGreater(np.abs(each[0] - each[1]).max(), 0.1)

  @parameterized.parameters(['lora'])
  def test_averaging_both_factors_has_an_error(self, name):
    self.check_averaging_both_factors_has_an_error(name)

  @parameterized.parameters(['cola'])
  @pytest.mark.slow
  def test_averaging_both_factors_has_an_error_otherwise(self, name):
    self.check_averaging_both_factors_has_an_error(name)

  def check_averaging_both_factors_has_an_error(self, name):
    fns, state, clients = start(name)
    found = fns.rounds.chain.adapted(state.params)
    for number in range(self.num_rounds):
      before = state.params if name == 'lora' else fns.rounds.params(state)
      together, alone, mean = self.round(name, fns, state, clients, number)
      state = together[0]
      expected = jax.tree.map(
          mean, *(params for _, params, _ in alone.values())
      )
      factors = [other.factors for other, _, _ in alone.values()]
      chex.assert_trees_all_close(
          state.factors, jax.tree.map(mean, *factors), rtol=0, atol=1e-14
      )
      for one in found:
        path = one.matrix.path
        pairs = [of[path] for of in factors]
        averaged = product(jax.tree.map(mean, *pairs))
        change = one.scale * mean(*map(product, pairs))
        error = one.scale * averaged - change
        measured = np.asarray(together[1][path]) - expected[path]
        np.testing.assert_allclose(measured, error, rtol=0, atol=1e-13)
        # Not rounding: a part of what the round changed.
        size = np.linalg.norm(expected[path] - before[path])
        self.assertGreater(np.linalg.norm(error), 0.02 * size)

  def test_nan_of_an_absent_client_reaches_nobody(self):
    fns, state, clients = start('bernoulli')
    mask = jnp.asarray(self.masks[1])
    expected = fns.run(state, clients, KEY, mask)
    spoilt = jax.tree.map(lambda x: x.at[1].set(np.nan), clients)
    assert_same_bits(fns.run(state, spoilt, KEY, mask), expected)

  def test_cohort_is_a_drawn_mask(self):
    fns, state, clients = start('weights')
    of_cohort = compiled('weights', cohort=2)
    pairs = list(itertools.combinations(range(NUM_CLIENTS), 2))
    masks = [np.isin(np.arange(NUM_CLIENTS), pair) for pair in pairs]
    drawn = set()
    for number in range(self.num_rounds):
      key = round_key(number)
      got = of_cohort.run(state, clients, key)
      each = [fns.run(state, clients, key, jnp.asarray(m)) for m in masks]
      # The weights of a mask and of a cohort are summed alike, to rounding.
      is_same = [np.isclose(one[2][0], got[2][0], rtol=1e-12) for one in each]
      self.assertEqual(sum(is_same), 1)
      drawn.add(is_same.index(True))
      expected = each[is_same.index(True)]
      chex.assert_trees_all_close(got, expected, rtol=0, atol=1e-14)
      state = got[0]
    self.assertGreater(len(drawn), 1)

  def test_cohorts_differ_under_the_key_of_a_run(self):
    rounds = averaging.federated_weights(
        optax.sgd(0.0), num_clients=8, num_local_steps=1, cohort=2
    )
    loss = lambda params, client, key: (params['w'] * client, None)

    def one(state, _):
      state, values = rounds.step(state, loss, jnp.arange(8.0), KEY)
      return state, values[0]

    state = rounds.init(None, {'w': jnp.ones([])})
    scan = jax.jit(lambda state: jax.lax.scan(one, state, length=8)[1])
    self.assertGreater(len(np.unique(scan(state))), 1)


def one_sided(w, s, frozen, is_left):
  """Returns the weights of a trained factor, and its gradient from theirs."""
  if is_left:
    return lambda right: w + s * frozen @ right, lambda g: s * frozen.T @ g
  return lambda left: w + s * left @ frozen, lambda g: s * g @ frozen.T


class Reference:
  """Rounds in NumPy: K steps of SGD with momentum of each client, the mean."""

  def __init__(self, num_rounds):
    self.num_rounds = num_rounds

    def rows(number, client, step):
      key = jax.random.fold_in(round_key(number), LOCAL)
      key = jax.random.fold_in(jax.random.fold_in(key, client), step)
      return jax.random.randint(key, (BATCH,), 0, NUM_ROWS)

    each = jax.vmap(rows, (None, None, 0))
    each = jax.vmap(jax.vmap(each, (None, 0, None)), (0, None, 0))
    steps = jnp.arange(num_rounds * NUM_STEPS).reshape(num_rounds, NUM_STEPS)
    self.rows = np.asarray(
        jax.jit(each)(jnp.arange(num_rounds), jnp.arange(NUM_CLIENTS), steps)
    )  # (rounds, clients, local steps, BATCH)
    self.values = np.zeros(num_rounds)

  def local(self, path, entry, number, client, factor, weight_of, pull):
    """Returns a client's factor and the mean of its loss over the steps."""
    x, y = (part[client][entry] for part in PROBLEM.clients[path])
    trace, values = 0.0, []
    for step, rows in enumerate(self.rows[number, client]):
      rest = x[rows] @ weight_of(factor) - y[rows]
      values.append(0.5 * np.sum(rest**2) / BATCH)
      trace = pull(x[rows].T @ rest / BATCH) + MOMENTUM * trace
      factor = factor - rate(number * NUM_STEPS + step) * trace
    return factor, np.mean(values)

  def mean(self, path, entry, number, *args):
    total = 0.0
    for client, weight in enumerate(NORMALISED):
      factor, value = self.local(path, entry, number, client, *args)
      total = total + weight * factor
      self.values[number] += weight * value
    return total

  def adapters(self, path, entry, s, drawn):
    """Returns W merged after each round, of one matrix or entry of a stack."""
    factors, coins = drawn
    w, merged = PROBLEM.params[path][entry], []
    for number in range(self.num_rounds):
      left, right = (factors[path][side][number][entry] for side in SIDES)
      if coins[path][number][entry]:
        link = one_sided(w, s, left, is_left=True)
        right = self.mean(path, entry, number, right, *link)
      else:
        link = one_sided(w, s, right, is_left=False)
        left = self.mean(path, entry, number, left, *link)
      w = w + s * left @ right
      merged.append(w)
    return np.stack(merged)

  def weights(self, path):
    w, path_of = PROBLEM.params[path], []
    for number in range(self.num_rounds):
      w = self.mean(path, (), number, w, lambda w: w, lambda g: g)
      path_of.append(w)
    return np.stack(path_of)


SIDES = ('left', 'right')


@functools.cache
def in_one_process(name):
  """Returns (state, merged weights, values) after each round, and before."""
  fns, state, clients = start(name)
  results = [(state, fns.rounds.params(state), None)]
  # One with a mask: compiled already, for other tests.
  mask = [] if name == 'weights' else [jnp.asarray(ALL)]
  for number in range(NUM_ROUNDS):
    results.append(fns.run(results[-1][0], clients, round_key(number), *mask))
  return results


@functools.cache
def over_a_network(name):
  """Returns what each party holds: rounds, server's states, means, clients."""
  fns, server, clients = start(name)
  rounds = fns.rounds
  params, _ = PROBLEM.inputs()
  parties = [rounds.init(INIT_KEY, params) for _ in range(NUM_CLIENTS)]
  states, means = [server], []
  for number in range(NUM_ROUNDS):
    sent = []
    for client in range(NUM_CLIENTS):
      parties[client] = rounds.begin(parties[client])
      trained, _ = rounds.local(
          parties[client],
          jax.tree.map(lambda x: x[client], clients),  # noqa: B023 (used now)
          averaging.client_key(round_key(number), client),
      )
      sent.append(averaging.to_wire(rounds, parties[client], trained))
    server = rounds.begin(server)
    received = [averaging.from_wire(rounds, server, one) for one in sent]
    average = lambda *x: sum(w * y for w, y in zip(NORMALISED, x, strict=True))
    mean = averaging.to_wire(rounds, server, jax.tree.map(average, *received))
    arrived = lambda state: averaging.from_wire(rounds, state, mean)  # noqa: B023
    parties = [rounds.finish(party, arrived(party)) for party in parties]
    means.append(arrived(server))
    server = rounds.finish(server, means[-1])
    states.append(server)
  return rounds, states, means, parties


class ReferenceTest(X64Test):
  """Equality with NumPy for whole runs in float64."""

  def test_adapters_equal_numpy(self):
    results = in_one_process('bernoulli')
    found = make('bernoulli').chain.adapted(PROBLEM.params)
    drawn = jax.tree.map(
        np.asarray,
        tuple(
            jax.jit(
                jax.vmap(
                    lambda link: adapters.draw_link(
                        INIT_KEY, link, found, POLICIES['bernoulli']
                    )
                )
            )(jnp.arange(NUM_ROUNDS))
        ),
    )
    reference = Reference(NUM_ROUNDS)
    for one in found:
      path = one.matrix.path
      merged = np.stack([params[path] for _, params, _ in results[1:]])
      self.assertLen(np.unique(drawn[1][path]), 2)
      for entry in np.ndindex(*one.matrix.batch):
        expected = reference.adapters(path, entry, one.scale, drawn)
        # 15 steps of float64 rounding on sums of at most 6 terms.
        np.testing.assert_allclose(
            merged[(slice(None), *entry)], expected, rtol=0, atol=1e-12
        )
        travel = np.abs(expected[-1] - PROBLEM.params[path][entry]).max()
        self.assertGreater(travel, 0.1)
    self.assert_values(results, reference)

  def test_weights_equal_numpy(self):
    results = in_one_process('weights')
    reference = Reference(NUM_ROUNDS)
    expected = reference.weights('a')
    path = np.stack([params['a'] for _, params, _ in results[1:]])
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-12)
    self.assertGreater(np.abs(expected[-1] - PROBLEM.params['a']).max(), 0.1)
    for state, _, _ in results:
      np.testing.assert_array_equal(
          state.params['stack'], PROBLEM.params['stack']
      )
    # Of the frozen stack the value alone counts.
    for entry in np.ndindex(2):
      w = PROBLEM.params['stack'][entry]
      for number in range(NUM_ROUNDS):
        reference.mean(
            'stack', entry, number, w, lambda _, w=w: w, np.zeros_like
        )
    self.assert_values(results, reference)

  def assert_values(self, results, reference):
    """Means over the local steps, weighted over clients; of aux too."""
    values = np.stack([values for _, _, (values, _) in results[1:]])
    np.testing.assert_allclose(values, reference.values, rtol=1e-12)
    first = [aux['first'] for _, _, (_, aux) in results[1:]]
    expected = reference.rows[..., 0].mean(-1) @ NORMALISED
    np.testing.assert_allclose(first, expected, rtol=1e-12)

  def test_minibatches_differ_over_client_step_and_round(self):
    rows = Reference(NUM_ROUNDS).rows.reshape(-1, BATCH)
    # Of 60 draws from 216, far from 60 different ones are repeats.
    self.assertGreater(len(np.unique(rows, axis=0)), 40)

  @parameterized.parameters('bernoulli', 'weights')
  def test_parties_equal_one_process(self, name):
    _, states, _, parties = over_a_network(name)
    for party in parties:
      assert_same_bits(party, states[-1])
    for state, (expected, _, _) in zip(
        states, in_one_process(name), strict=True
    ):
      # Sums of clients in another order.
      chex.assert_trees_all_close(
          to_numpy(state), to_numpy(expected), rtol=0, atol=1e-12
      )


class ChainTest(X64Test):
  """One client with weight 1 is the chain itself."""

  @parameterized.named_parameters(
      ('bernoulli', 'bernoulli', optax.adamw(rate, eps=1e-3), {'warmup': 2}),
      ('cola', 'cola', optax.sgd(rate, momentum=MOMENTUM), {}),
  )
  def test_one_client_is_the_chain(self, name, tx, changes):
    policy = dataclasses.replace(
        POLICIES[name],
        targets=TARGETS[:1],
        sketch=bl.sketches.coordinate(),
        **changes,
    )
    rounds = averaging.federated_adapters(
        policy, tx, num_clients=1, num_local_steps=NUM_STEPS
    )
    chain = adapters.make_chain(policy, tx)
    loss = inject.by_addition(PROBLEM.loss)
    num_rounds = 4
    params, clients = ({'a': x['a']} for x in PROBLEM.inputs())
    client = jax.tree.map(lambda x: x[0], clients)

    def one_round(state, _):
      stack = jax.tree.map(lambda x: x[None], client)
      return rounds.step(state, loss, stack, KEY)

    def one_step(state, _):
      key = jax.random.fold_in(averaging.client_key(KEY, 0), state.count)
      return chain.step(state, loss, client, key)

    def scan(one, length):
      run = lambda state: jax.lax.scan(one, state, length=length)
      return jax.jit(run)(chain.init(INIT_KEY, params))

    got, values = scan(one_round, num_rounds)
    expected, each = scan(one_step, num_rounds * NUM_STEPS)
    mean = lambda x: x.reshape(num_rounds, NUM_STEPS).mean(1)
    chex.assert_trees_all_close(
        values, jax.tree.map(mean, each), rtol=1e-11, atol=1e-11
    )
    # The chain's moments are those of the last link; a round's are fresh.
    strip = lambda state: to_numpy(state._replace(opt_state=None))
    # 12 steps of float64 rounding.
    chex.assert_trees_all_close(strip(got), strip(expected), rtol=0, atol=1e-11)
    self.assertGreater(np.abs(product(got.factors['a'])).max(), 0.01)


class OptimizerTest(X64Test):

  def test_moments_are_fresh_and_schedules_go_on(self):
    for name in ('bernoulli', 'weights'):
      for number, (state, _, _) in enumerate(in_one_process(name)):
        trace, schedule = state.opt_state
        self.assertEqual(schedule.count, number * NUM_STEPS)
        self.assertEqual(state.count, number * NUM_STEPS)
        for leaf in jax.tree.leaves(trace):
          np.testing.assert_array_equal(leaf, np.zeros_like(leaf))

  def test_finish_restarts_adam(self):
    """Its own count too, while the schedule's goes on."""
    rounds = averaging.federated_weights(
        optax.adam(rate), num_clients=2, num_local_steps=NUM_STEPS
    )
    state = rounds.init(None, {'w': jnp.ones(2)})
    for number in (1, 2):
      state = rounds.finish(state, {'w': jnp.zeros(2)})
      adam, schedule = state.opt_state
      self.assertEqual(adam.count, 0)
      self.assertEqual(schedule.count, number * NUM_STEPS)
    np.testing.assert_array_equal(state.params['w'], np.zeros(2))

  def test_a_round_without_anybody_changes_no_weight(self):
    for name in ('bernoulli', 'lora', 'weights'):
      fns = compiled(name)
      params, clients = PROBLEM.inputs()
      state = in_one_process(name)[2][0] if name != 'lora' else None
      if state is None:
        state = fns.rounds.init(INIT_KEY, params)
        state, _, _ = fns.run(state, clients, KEY, jnp.asarray(ALL))
      before = fns.rounds.params(state)
      spoilt = jax.tree.map(lambda x: x * np.nan, clients)
      for stack in (clients, spoilt):
        after, merged, (value, _) = fns.run(
            state, stack, KEY, jnp.zeros(NUM_CLIENTS, bool)
        )
        chex.assert_trees_all_equal(merged, before)
        self.assertEqual(value, 0)
        self.assertEqual(after.count, state.count + NUM_STEPS)
        if name == 'lora':
          chex.assert_trees_all_equal(after.factors, state.factors)
        if name == 'bernoulli':  # Merged, and the next link begun.
          chex.assert_trees_all_equal(after.params, before)
          drawn = fns.rounds.begin(state)
          chex.assert_trees_all_equal(after.factors, drawn.factors)

  def test_the_frozen_factor_stays_to_the_bit(self):
    """A mean of equal numbers may round: it is not what remains."""
    for number, (state, _, _) in enumerate(in_one_process('bernoulli')[1:]):
      begun = compiled('bernoulli').rounds.begin(
          in_one_process('bernoulli')[number][0]
      )
      assert_same_bits(state.coins, begun.coins)
      for path, coin in state.coins.items():
        for entry in np.ndindex(*coin.shape):
          frozen, moved = SIDES if coin[entry] else SIDES[::-1]
          pair = jax.tree.map(lambda x: x[entry], state.factors[path])  # noqa: B023
          old = jax.tree.map(lambda x: x[entry], begun.factors[path])  # noqa: B023
          np.testing.assert_array_equal(pair[frozen], old[frozen])
          self.assertGreater(np.abs(pair[moved]).max(), 0.01)


class LateTest(X64Test):
  """Clients that missed rounds, and those that were never there."""

  @parameterized.parameters('bernoulli', 'weights')
  def test_catch_up_is_bit_for_bit(self, name):
    rounds, states, means, _ = over_a_network(name)
    for first, last in ((0, NUM_ROUNDS), (2, 5), (3, 3)):
      got = averaging.catch_up(rounds, states[first], iter(means[first:last]))
      assert_same_bits(got, states[last])

  @parameterized.parameters('bernoulli', 'weights')
  def test_join_is_as_if_it_had_been_there(self, name):
    rounds, states, means, _ = over_a_network(name)
    for number in (0, 1, 4):
      merged = rounds.params(states[number])
      joined = averaging.join(rounds, INIT_KEY, merged, number)
      self.assertIsNot(joined.params['a'], merged['a'])  # One may be donated.
      self.assertEqual(joined.count, states[number].count)
      assert_same_bits(rounds.params(joined), merged)
      assert_same_bits(joined.opt_state, states[number].opt_state)
      for mean in means[number:]:
        joined, there = rounds.begin(joined), rounds.begin(states[number])
        assert_same_bits(joined, there)  # Weights, factors, coins, schedules.
        joined = rounds.finish(joined, mean)
        number += 1
      assert_same_bits(joined, states[-1])

  def test_join_refuses_factors_that_are_never_merged(self):
    for name in ('asymmetric', 'lora'):
      with self.assertRaisesRegex(
          ValueError, r'policy.period=None.*use catch_up'
      ):
        averaging.join(make(name), INIT_KEY, PROBLEM.params, 2)

  def test_join_with_compensated_rounding(self):
    params = {'w': jnp.ones((1, 4), jnp.bfloat16)}
    policy = adapters.ChainPolicy.rac(1, 1, 'left', rounding='compensated')
    rounds = averaging.federated_adapters(policy, optax.sgd(1.0), num_clients=1)
    state = rounds.init(INIT_KEY, params)
    # Below half an ulp, which is 2^-8; two of them are not.
    mean = {'w': {'right': jnp.full((1, 4), 3e-3)}}
    state = averaging.catch_up(rounds, state, [mean])
    try:
      joined = averaging.join(rounds, INIT_KEY, rounds.params(state), 1)
    except ValueError:
      return  # To refuse is right too.
    late = averaging.catch_up(rounds, joined, [mean])
    there = averaging.catch_up(rounds, state, [mean])
    assert_same_bits(rounds.params(late), rounds.params(there))


class WireTest(parameterized.TestCase):
  """What travels, without the rounds."""

  shapes = {'a': (4, 7), 'b': (7, 4), 'stack': (3, 2, 4, 7)}
  matrices = bl.Matrices(
      rules=(bl.Rule('stack', left=(2,), right=(3,), batch=(0, 1)),)
  )

  @functools.cache  # noqa: B019 (one instance a test)
  def begun(self, dtype, side, rank):
    """Returns rounds, a state, and other numbers in its trained factors."""
    rng = np.random.default_rng(1)
    params = {
        path: jnp.asarray(rng.normal(size=shape), dtype)
        for path, shape in self.shapes.items()
    }
    policy = bl.ChainPolicy(
        rank=rank, period=1, side=side, sketch=bl.sketches.coordinate()
    )
    rounds = averaging.federated_adapters(
        policy, optax.sgd(1.0), self.matrices, num_clients=2
    )
    state = rounds.init(jax.random.key(5), params)
    noise = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return rounds, state, jax.tree.map(noise, rounds.trained(state))

  def numbers(self, path, side, rank):
    """Returns the columns of the left or rows of the right that are used."""
    m, n = self.shapes[path][-2:]
    return min(rank, n if side == 'left' else m)

  @parameterized.parameters(('bfloat16', 'bernoulli', 5), ('bfloat16', None, 5))
  def test_round_trip(self, dtype, side, rank):
    self.check_round_trip(dtype, side, rank)

  @parameterized.parameters(
      ('float32', 'bernoulli', 2),
      ('float32', 'left', 5),
      ('float32', 'right', 5),
  )
  @pytest.mark.slow
  def test_round_trip_otherwise(self, dtype, side, rank):
    self.check_round_trip(dtype, side, rank)

  def check_round_trip(self, dtype, side, rank):
    rounds, state, trained = self.begun(dtype, side, rank)
    arrays = averaging.to_wire(rounds, state, trained)
    expected, restored = {}, jax.tree.map(np.array, rounds.trained(state))
    for path, shape in self.shapes.items():
      parts = []
      for entry in np.ndindex(*shape[:-2]):
        sides = {'left': ['right'], 'right': ['left'], None: SIDES}.get(side)
        if sides is None:
          sides = ['right' if state.coins[path][entry] else 'left']
        for one in sides:
          size = self.numbers(path, one, rank)
          if side is None:  # Clipped to the shorter side.
            size = min(rank, *shape[-2:])
          box = np.s_[:, :size] if one == 'left' else np.s_[:size]
          part = np.asarray(trained[path][one])[entry][box]
          restored[path][one][entry][box] = part
          parts.append(part.ravel())
      expected[path] = np.concatenate(parts)
    if side == 'bernoulli':
      self.assertLen(np.unique(state.coins['stack']), 2)
    assert_same_bits(arrays, expected)
    size = sum(x.size for x in expected.values())
    self.assertEqual(rounds.sent_numbers(state), size)
    self.assertEqual(averaging.bits(arrays), 32 * size)
    received = averaging.from_wire(rounds, state, arrays)
    assert_same_bits(received, jax.tree.map(jnp.asarray, restored))
    assert_same_bits(averaging.to_wire(rounds, state, received), arrays)

  def test_sent_numbers_follow_the_coins(self):
    rounds, state, _ = self.begun('float32', 'bernoulli', 5)
    flip = lambda state: state._replace(
        coins={path: ~coin for path, coin in state.coins.items()}
    )
    # r n and m r numbers: 28 + 35 a matrix of 4 x 7, whichever the coins.
    both = rounds.sent_numbers(state) + rounds.sent_numbers(flip(state))
    left, right = 4 * 5, 4 * 7  # min(5, 7) columns of L, min(5, 4) rows of R.
    other_left, other_right = 7 * 4, 5 * 4
    self.assertEqual(both, 7 * (left + right) + other_left + other_right)
    traced = jax.jit(rounds.sent_numbers)
    self.assertEqual(traced(state), rounds.sent_numbers(state))

  @parameterized.parameters('float32', 'bfloat16')
  def test_weights(self, dtype):
    rounds, params = self.weights(dtype)
    state = rounds.init(None, params)
    trained = jax.tree.map(lambda x: 2 * x, rounds.trained(state))
    arrays = averaging.to_wire(rounds, state, trained)
    expected = {
        'a/kernel': 2 * np.asarray(params['params']['a']['kernel']).ravel(),
        'c': 2 * np.asarray(params['params']['c']),
    }
    assert_same_bits(arrays, expected)  # The frozen bias does not travel.
    self.assertEqual(rounds.sent_numbers(state), 8)
    itemsize = {'float32': 4, 'bfloat16': 2}[dtype]
    self.assertEqual(averaging.bits(arrays), 8 * 6 * itemsize + 8 * 2 * 4)
    received = averaging.from_wire(rounds, state, arrays)
    assert_same_bits(received, trained)

  def weights(self, dtype):
    kernel = jnp.arange(6.0, dtype=dtype).reshape(2, 3)
    params = {
        'params': {
            'a': {'kernel': kernel, 'bias': jnp.ones(3)},
            'c': jnp.arange(2.0),
        }
    }
    is_bias = lambda path, _: path[-1].key != 'bias'
    rounds = averaging.federated_weights(
        optax.sgd(1.0),
        num_clients=2,
        num_local_steps=1,
        trained=lambda tree: jax.tree_util.tree_map_with_path(is_bias, tree),
    )
    return rounds, params

  def broken(self, arrays):
    """Yields what may arrive, and the message for it."""
    stack = arrays['stack']
    nan, inf = stack.copy(), stack.copy()
    nan[-1], inf[0] = np.nan, -np.inf
    change = lambda x: {**arrays, 'stack': x}
    yield change(nan), 'finite numbers in stack'
    yield change(inf), 'finite numbers in stack'
    shape = rf'stack of \({stack.size},\) float32, got \({stack.size - 1},\)'
    yield change(stack[:-1]), shape
    yield change(stack[None]), rf'got \(1, {stack.size}\) float32'
    yield change(stack.astype(np.float64)), r'float32, got .* float64'
    missing = {path: x for path, x in arrays.items() if path != 'a'}
    yield missing, r"\['a', 'b', 'stack'\], got \['b', 'stack'\]"
    yield {**arrays, 'c': stack}, r"got \['a', 'b', 'c', 'stack'\]"

  def test_what_arrives_is_checked(self):
    rounds, state, trained = self.begun('float32', 'bernoulli', 5)
    arrays = averaging.to_wire(rounds, state, trained)
    averaging.check_wire(arrays, arrays)
    for wrong, message in self.broken(arrays):
      with self.assertRaisesRegex(ValueError, message):
        averaging.check_wire(arrays, wrong)
      with self.assertRaisesRegex(ValueError, message):
        averaging.from_wire(rounds, state, wrong)

  def test_nan_in_weights_is_refused(self):
    self.assert_nan_is_refused('float32')

  def test_nan_in_bfloat16_weights_is_refused(self):
    self.assert_nan_is_refused('bfloat16')

  def assert_nan_is_refused(self, dtype):
    rounds, params = self.weights(dtype)
    state = rounds.init(None, params)
    arrays = averaging.to_wire(rounds, state, rounds.trained(state))
    arrays['a/kernel'] = arrays['a/kernel'] * np.array(np.nan, dtype)
    with self.assertRaisesRegex(ValueError, 'finite numbers in a/kernel'):
      averaging.from_wire(rounds, state, arrays)


def subjaxprs(jaxpr):
  """Yields a jaxpr and all that its equations hold."""
  yield jaxpr
  for eqn in jaxpr.eqns:
    for value in jax.tree.leaves(
        list(eqn.params.values()),
        is_leaf=lambda x: isinstance(x, (jex_core.Jaxpr, jex_core.ClosedJaxpr)),
    ):
      if isinstance(value, jex_core.ClosedJaxpr):
        value = value.jaxpr
      if isinstance(value, jex_core.Jaxpr):
        yield from subjaxprs(value)


class CompiledTest(parameterized.TestCase):

  @parameterized.parameters('bernoulli', 'weights')
  def test_equal_rounds_are_one_value(self, name):
    """`jit` then compiles one program for them."""
    tx = optax.sgd(0.1)
    trained = lambda params: {'w': True}
    if name == 'weights':
      one = lambda: averaging.federated_weights(
          tx, num_clients=2, num_local_steps=2, trained=trained
      )
    else:
      one = lambda: averaging.federated_adapters(
          POLICIES[name], tx, STACK, num_clients=2
      )
    self.assertEqual(one(), one())
    self.assertEqual(hash(one()), hash(one()))
    other = dataclasses.replace(one(), num_local_steps=7)
    self.assertNotEqual(one(), other)

  def test_traced_weights(self):
    loss = lambda params, client, key: (params['w'] * client, None)

    def run(weights):
      rounds = averaging.federated_weights(
          optax.sgd(1.0), num_clients=2, num_local_steps=1, weights=weights
      )
      state = rounds.init(None, {'w': jnp.zeros([])})
      return rounds.step(state, loss, jnp.array([1.0, 5.0]), KEY)[0].params['w']

    # The mean of the gradients 1 and 5: (3 * 1 + 1 * 5) / 4.
    np.testing.assert_allclose(jax.jit(run)(jnp.array([3.0, 1.0])), -2.0)

  def test_no_recompilation_and_no_copy(self):
    """Over rounds, coins and masks; the state may be donated."""
    traces = []

    def loss(params, client, key):
      traces.append(key)
      return jnp.sum((client @ params['w']) ** 2), None

    policy = adapters.ChainPolicy.bernoulli(
        1, 1, sketch=bl.sketches.coordinate()
    )
    kwargs = dict(num_clients=2, num_local_steps=1)
    for rounds, one in (
        (averaging.federated_weights(optax.adam(rate), **kwargs), loss),
        (
            averaging.federated_adapters(policy, optax.adam(rate), **kwargs),
            inject.by_addition(loss),
        ),
    ):
      params = {'w': jnp.ones((3, 4))}
      step = jax.jit(rounds.step, static_argnums=1, donate_argnums=0)
      state, coins = rounds.init(INIT_KEY, params), set()
      for number in range(6):
        mask = jnp.asarray([True, number % 2 == 0])
        stack = jnp.ones((2, 5, 3))
        state, _ = step(state, one, stack, round_key(number), mask)
        if number == 0:
          first = len(traces)
        if rounds.chain is not None:
          coins.add(bool(state.coins['w']))
      self.assertLen(traces, first)
      self.assertEqual(step._cache_size(), 1)
      # What init was given was not donated.
      np.testing.assert_array_equal(params['w'], np.ones((3, 4)))
      jax.random.key_data(INIT_KEY)
    self.assertEqual(coins, {True, False})

  def test_base_weights_are_not_copied_for_each_client(self):
    num_clients, m, n = 5, 37, 41
    model = nn.Dense(n)
    params = {
        'kernel': jnp.ones((m, n)),
        'bias': jnp.ones(n),
    }

    def loss(params, client, key):
      del key
      return jnp.mean(model.apply({'params': params}, client) ** 2), None

    rounds = averaging.federated_adapters(
        adapters.ChainPolicy.bernoulli(2, 2, sketch=bl.sketches.coordinate()),
        optax.adam(1e-3),
        num_clients=num_clients,
    )
    state = jax.eval_shape(rounds.init, KEY, params)
    adapted = inject.by_product(loss)
    step = lambda state, clients, key: rounds.step(state, adapted, clients, key)
    closed = jax.make_jaxpr(step)(state, jnp.ones((num_clients, 3, m)), KEY)
    shapes = {
        var.aval.shape
        for jaxpr in subjaxprs(closed.jaxpr)
        for eqn in jaxpr.eqns
        for var in eqn.outvars
    }
    self.assertIn((m, n), shapes)  # The merge.
    self.assertIn((num_clients, 2, n), shapes)  # A factor of each client.
    large = [shape for shape in shapes if np.prod(shape) >= 2 * m * n]
    self.assertEmpty(large)


class DevicesTest(X64Test):
  """One device, and clients split over eight of them under jit: one run."""

  num_clients, num_rounds = 16, 2
  runs = {}  # On one device, by name.

  def setUp(self):
    super().setUp()
    self.assertEqual(jax.device_count(), 8)
    self.mesh = jax.make_mesh(
        (8,), ('clients',), axis_types=(jax.sharding.AxisType.Auto,)
    )
    rng = np.random.default_rng(3)
    self.weights = tuple(rng.uniform(0.5, 2, size=self.num_clients))
    self.masks = rng.uniform(size=(self.num_rounds, self.num_clients)) < 0.7
    problem = Problem(self.num_clients)
    params, clients = problem.params, problem.clients
    one = lambda tree: jax.tree.map(jnp.asarray, {'a': tree['a']})
    self.params, self.clients = one(params), one(clients)

  def step(self, name, **kwargs):
    """Returns (state, clients, key, mask) -> state, values, and the start."""
    kwargs = dict(num_clients=self.num_clients, weights=self.weights) | kwargs
    tx = optax.sgd(0.05, momentum=MOMENTUM)
    if name == 'weights':
      rounds = averaging.federated_weights(
          tx, num_local_steps=NUM_STEPS, **kwargs
      )
      loss = PROBLEM.loss
    else:
      rounds = averaging.federated_adapters(
          adapters.ChainPolicy.bernoulli(
              2, NUM_STEPS, sketch=bl.sketches.coordinate()
          ),
          tx,
          **kwargs,
      )
      loss = inject.by_addition(PROBLEM.loss)
    step = lambda state, clients, key, mask: rounds.step(
        state, loss, clients, key, mask
    )
    return step, rounds.init(INIT_KEY, self.params)

  def run_rounds(self, step, state, clients):
    values = []
    for number, mask in enumerate(self.masks):
      state, value = step(state, clients, round_key(number), jnp.asarray(mask))
      values.append(value)
    return to_numpy(state), to_numpy(values)

  def assert_same(self, one, other):
    # Sums of 16 clients in another order.
    chex.assert_trees_all_close(one, other, rtol=1e-12, atol=1e-12)
    travel = np.abs(one[0].params['a'] - self.params['a']).max()
    self.assertGreater(travel, 0.05)

  def alone(self, name):
    if name not in self.runs:
      step, state = self.step(name)
      self.runs[name] = self.run_rounds(jax.jit(step), state, self.clients)
    return self.runs[name]

  def spread(self, state):
    """Returns the state on all devices, and the clients split among them."""
    sharding = lambda *names: jax.sharding.NamedSharding(
        self.mesh, jax.sharding.PartitionSpec(*names)
    )
    clients = jax.device_put(self.clients, sharding('clients'))
    return jax.device_put(state, sharding()), clients

  @parameterized.parameters(['adapters'])
  def test_same_run(self, name):
    self.check_same_run(name)

  @parameterized.parameters(['weights'])
  @pytest.mark.slow
  def test_same_run_otherwise(self, name):
    self.check_same_run(name)

  def check_same_run(self, name):
    step, state = self.step(name)
    state, clients = self.spread(state)
    args = state, clients, KEY, jnp.asarray(self.masks[0])
    compiled_step = jax.jit(step).lower(*args).compile()
    got = self.run_rounds(compiled_step, state, clients)
    self.assert_same(got, self.alone(name))
    # Devices exchange sums over clients, and nothing of a client's.
    text = compiled_step.as_text()
    self.assertIn(' all-reduce(', text)
    self.assertNotRegex(text, r' (all-gather|all-to-all|collective-permute)\(')


class RejectsTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(num_clients=0), 'num_clients >= 1, got num_clients=0'),
      (dict(cohort=0), r'cohort in \[1, 4\], got cohort=0'),
      (dict(cohort=5), r'cohort in \[1, 4\], got cohort=5'),
      (dict(weights=(1.0, 2.0)), 'weights: 4 finite numbers >= 0'),
      (dict(weights=(1, 1, 1, -1)), 'weights: 4 finite numbers >= 0'),
      (dict(weights=(1, 1, 1, np.nan)), 'weights: 4 finite numbers >= 0'),
      (dict(weights=(0, 0, 0, 0)), 'not all zero'),
      (dict(num_local_steps=0), 'num_local_steps >= 1, got num_local_steps=0'),
  )
  def test_argument(self, kwargs, message):
    kwargs = dict(num_clients=4, num_local_steps=2) | kwargs
    with self.assertRaisesRegex(ValueError, message):
      averaging.federated_adapters(
          adapters.ChainPolicy.lora(2), optax.sgd(1.0), **kwargs
      )
    with self.assertRaisesRegex(ValueError, message):
      averaging.federated_weights(optax.sgd(1.0), **kwargs)

  def test_policy(self):
    tx, kwargs = optax.sgd(1.0), dict(num_clients=2)
    with self.assertRaisesRegex(
        ValueError, 'policy.period=2, the local steps of a round, got period=3'
    ):
      averaging.federated_adapters(
          adapters.ChainPolicy.cola(2, 3), tx, num_local_steps=2, **kwargs
      )
    with self.assertRaisesRegex(ValueError, 'got num_local_steps=None'):
      averaging.federated_adapters(adapters.ChainPolicy.lora(2), tx, **kwargs)
    with self.assertRaisesRegex(ValueError, 'reset_optimizer=True, got False'):
      averaging.federated_adapters(
          adapters.ChainPolicy.cola(2, 3, reset_optimizer=False), tx, **kwargs
      )
    rounds = averaging.federated_adapters(
        adapters.ChainPolicy.cola(2, 3), tx, **kwargs
    )
    self.assertEqual(rounds.num_local_steps, 3)

  def test_reduce_on_plateau(self):
    """Also below other transformations."""
    plateau = optax.contrib.reduce_on_plateau()
    chained = optax.chain(optax.sgd(1.0), optax.masked(plateau, True))
    params = {'w': jnp.ones((2, 3))}
    for tx in (plateau, chained):
      for rounds in (
          averaging.federated_adapters(
              adapters.ChainPolicy.lora(1), tx, num_clients=2, num_local_steps=2
          ),
          averaging.federated_weights(tx, num_clients=2, num_local_steps=2),
      ):
        with self.assertRaisesRegex(
            ValueError, 'got reduce_on_plateau: clients would disagree'
        ):
          rounds.init(KEY, params)

  def rounds(self, num_clients, **kwargs):
    rounds = averaging.federated_weights(
        optax.sgd(1.0), num_clients=num_clients, num_local_steps=1, **kwargs
    )
    loss = lambda params, client, key: (params['w'] * client, None)
    state = rounds.init(None, {'w': jnp.ones([])})
    return functools.partial(rounds.step, state, loss)

  def test_participants(self):
    for shape in ((4,), (5, 1), ()):
      with self.assertRaisesRegex(
          ValueError, r'participants of shape \(5,\), got'
      ):
        self.rounds(5)(jnp.ones(5), KEY, np.ones(shape, bool))
    with self.assertRaisesRegex(
        ValueError, 'one of cohort and participants, got cohort=2 and a mask'
    ):
      self.rounds(5, cohort=2)(jnp.ones(5), KEY, np.ones(5, bool))

  def test_number_of_clients(self):
    for num_clients, given in ((5, 1), (1, 5), (5, 4)):
      with self.assertRaisesRegex(ValueError, f'{num_clients}.* got .*{given}'):
        jax.eval_shape(self.rounds(num_clients), jnp.ones(given), KEY)


class ClientsTest(parameterized.TestCase):
  """Weights of those who take part."""

  def test_effective_weights(self):
    clients = clients_lib.make_clients(4, WEIGHTS, None)
    mask = np.array([True, False, True, False])
    got = clients_lib.effective_weights(clients, jnp.asarray(mask), True)
    np.testing.assert_allclose(got, [0.6, 0, 0.4, 0], rtol=1e-6)
    nobody = clients_lib.effective_weights(clients, jnp.zeros(4, bool), True)
    np.testing.assert_array_equal(nobody, np.zeros(4))

  def test_sums_are_of_float32_and_keep_the_dtype(self):
    """Means of bfloat16 are rounded once."""
    clients = clients_lib.make_clients(4, WEIGHTS, None)
    x = np.random.default_rng(0).normal(size=(4, 50)).astype(jnp.bfloat16)
    got = clients_lib.weighted_sum(jnp.asarray(x), clients.weights)
    expected = (NORMALISED @ x.astype(float)).astype(jnp.bfloat16)
    self.assertEqual(got.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got), expected)

  def test_the_weight_of_a_loss_multiplies_the_client_s(self):
    loss = lambda params, client, key: (
        params['w'] * client['x'],
        parts.Weighted(client['weight']),
    )
    rounds = averaging.federated_weights(
        optax.sgd(1.0), num_clients=2, num_local_steps=1, weights=(1.0, 2.0)
    )
    clients = {'x': jnp.array([1.0, 3.0]), 'weight': jnp.array([4.0, 1.0])}
    state = rounds.init(None, {'w': jnp.ones([])})
    state, (value, aux) = rounds.step(state, loss, clients, KEY)
    # The weights of 4 : 2 of the gradients 1 and 3.
    np.testing.assert_allclose(state.params['w'], 1 - 5 / 3, rtol=1e-6)
    np.testing.assert_allclose(value, 5 / 3, rtol=1e-6)
    np.testing.assert_allclose(aux.weight, 5.0)

  def test_nan_of_weight_zero_adds_nothing(self):
    clients = clients_lib.make_clients(3, (1.0, 0.0, 1.0), None)
    x = jnp.asarray([[1.0, 2.0], [np.nan, np.inf], [3.0, 4.0]])
    got = clients_lib.weighted_sum(x, clients.weights)
    np.testing.assert_array_equal(got, [2.0, 3.0])
