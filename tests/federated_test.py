"""Tests of E5 (QGD), E6 (MARINA) and E7 (EF21) against loops in NumPy."""

import collections
import functools
import itertools
import math
import zlib

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import chain
from bernoulli_lora_jax import compressors
from bernoulli_lora_jax import federated
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices
from bernoulli_lora_jax import stepsizes

NUM_CLIENTS, STEPS, PROB = 5, 100, 0.3
SHAPES = {'b': (6,), 'w': (4, 6)}
COIN, COHORT = 0, 2  # Purposes folded into a round's key.
WEIGHTS = (3.0, 1.0, 2.0, 0.5, 1.5)
METHODS = ('qgd', 'marina', 'ef21')
KEY, CHAIN_KEY = jax.random.split(jax.random.key(0))
# Who takes part in each round, from outside; in the first not everybody.
MASK = np.random.default_rng(5).uniform(size=(STEPS, NUM_CLIENTS)) < 0.6


class Regression:
  """f_l(w, b) = 1/2 mean_i ||x_i w + b - y_i||^2, in JAX and in NumPy."""

  def __init__(self, num_clients=NUM_CLIENTS):
    rng = np.random.default_rng(0)
    self.x = rng.normal(size=(num_clients, 10, 4))
    # Clients disagree: their optima are far from that of f.
    self.y = rng.normal(size=(num_clients, 10, 6))
    self.y += 2 * rng.normal(size=(num_clients, 1, 6))
    self.params = {k: rng.normal(size=s) for k, s in SHAPES.items()}

  def loss(self, params, x, y):
    rest = x @ params['w'] + params['b'][None] - y
    return 0.5 * jnp.mean(jnp.sum(rest**2, axis=1))

  def grads(self, params, x, y):
    return jax.vmap(jax.grad(self.loss), (None, 0, 0))(params, x, y)

  def numpy_grad(self, params, client):
    x, y = self.x[client], self.y[client]
    rest = (x @ params['w'] + params['b'] - y) / len(x)
    return {'b': rest.sum(0), 'w': x.T @ rest}

  def numpy_grads(self, params):
    return [self.numpy_grad(params, client) for client in range(len(self.x))]

  def run(self, tx, mask=None):
    """Returns the params after each step and the last state."""

    def step(carry, present):
      params, state = carry
      extra = {} if mask is None else {'participants': present}
      grads = self.grads(params, jnp.asarray(self.x), jnp.asarray(self.y))
      updates, state = tx.update(grads, state, params, **extra)
      params = optax.apply_updates(params, updates)
      return (params, state), params

    @jax.jit
    def scan(params, mask):
      return jax.lax.scan(step, (params, tx.init(params)), mask)

    params = jax.tree.map(jnp.asarray, self.params)
    (_, state), path = scan(params, MASK if mask is None else mask)
    return path, state


def combine(fn, *trees):
  return {name: fn(*(tree[name] for tree in trees)) for name in trees[0]}


def add(*trees):
  return combine(lambda *x: sum(x), *trees)


def subtract(one, other):
  return combine(lambda x, y: x - y, one, other)


def scale(factor, tree):
  return combine(lambda x: factor * x, tree)


def concatenated(tree):
  return {'': np.concatenate([tree[name].ravel() for name in sorted(tree)])}


def split(tree):
  b = math.prod(SHAPES['b'])
  return {'b': tree[''][:b], 'w': tree[''][b:].reshape(SHAPES['w'])}


@functools.cache
def randk_factors(k, is_concatenated):
  """RandK multiplies by 0 or d/K: which, by path, leaves (STEPS, M, *shape)."""
  shapes = {'': (30,)} if is_concatenated else SHAPES
  compressor = compressors.randk(k)

  def draw(step, client):
    key = federated.client_key(KEY, step, client)
    factors = {}
    for path, shape in shapes.items():
      leaf_key = jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
      payload = compressor.encode(leaf_key, jnp.ones(shape))
      factors[path] = compressor.decode(payload, shape, jnp.ones([]).dtype)
    return factors

  rounds = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))
  factors = jax.jit(rounds)(jnp.arange(STEPS), jnp.arange(NUM_CLIENTS))
  return jax.tree.map(np.asarray, factors)


def numpy_compressor(name, is_concatenated=False):
  """Returns (tree, step, client, memory) -> (tree that arrives, memory)."""

  def one(path, x, step, client, memory):
    if name == 'randk':
      return x * randk_factors(6, is_concatenated)[path][step, client], memory
    if name == 'scaled':  # RandK that keeps elements as they are.
      keeps = randk_factors(6, is_concatenated)[path][step, client] > 0
      return np.where(keeps, x, 0), memory
    if name == 'topk':
      kept = np.argsort(-np.abs(x.ravel()), kind='stable')[:3]
      out = np.zeros(x.size)
      out[kept] = x.ravel()[kept]
      return out.reshape(x.shape), memory
    if name == 'warm' and path == 'w':
      basis = np.linalg.qr(x @ memory)[0]
      right = basis.T @ x
      return basis @ right, right.T
    return x, memory  # The identity; vectors pass powersgd whole.

  def compress(tree, step, client, memory):
    sent = concatenated(tree) if is_concatenated else tree
    arrived = {}
    for path, x in sent.items():
      arrived[path], memory = one(path, x, step, client, memory)
    return split(arrived) if is_concatenated else arrived, memory

  return compress


COMPRESSORS = {
    'identity': compressors.identity(),
    'randk': compressors.randk(6),
    'scaled': compressors.contractive(compressors.randk(6)),
    'topk': compressors.topk(3),
    'warm': compressors.powersgd(1, start='warm'),
}


@functools.cache
def round_draws():
  """Coins of MARINA, and cohorts of 2, of each round."""

  def draw(step):
    key = jax.random.fold_in(KEY, step)
    coin = jax.random.bernoulli(jax.random.fold_in(key, COIN), PROB)
    order = jax.random.permutation(jax.random.fold_in(key, COHORT), NUM_CLIENTS)
    return coin, order < 2

  return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(jnp.arange(STEPS)))


class Loop:
  """E5, E6 or E7 in NumPy: (step, client gradients) -> G."""

  def __init__(
      self,
      compress,
      weights=None,
      cohort=None,
      mask=None,
      prob=PROB,
      start='full',
      memory=None,
  ):
    weights = np.ones(NUM_CLIENTS) if weights is None else np.array(weights)
    self.weights = weights / weights.sum()
    self.compress, self.cohort, self.mask = compress, cohort, mask
    self.prob, self.start = prob, start
    self.memories = [memory] * NUM_CLIENTS

  def present(self, step):
    if self.mask is not None:
      return np.flatnonzero(self.mask[step])
    if self.cohort is not None:
      return np.flatnonzero(round_draws()[1][step])
    return np.arange(NUM_CLIENTS)

  def average(self, messages):
    """Sums {client: message}, unbiased, or over a mask the weighted mean."""
    if self.mask is not None:
      factor = 1 / sum(self.weights[client] for client in messages)
    else:
      factor = NUM_CLIENTS / len(messages)
    return add(
        *(scale(factor * self.weights[who], x) for who, x in messages.items())
    )

  def qgd(self, step, grads):
    messages = {
        who: self.compress(grads[who], step, who, None)[0]
        for who in self.present(step)
    }
    return self.average(messages)

  def marina(self, step, grads):
    present = self.present(step)
    if step == 0 or self.prob == 1 or round_draws()[0][step]:
      if self.mask is None:
        present = range(NUM_CLIENTS)
      self.estimate = self.average({who: grads[who] for who in present})
    else:
      moved = [subtract(*pair) for pair in zip(grads, self.old, strict=True)]
      messages = {
          who: self.compress(moved[who], step, who, None)[0] for who in present
      }
      self.estimate = add(self.estimate, self.average(messages))
    if self.mask is None or step == 0:
      self.old = [scale(0, g) for g in grads]
      present = range(NUM_CLIENTS) if self.mask is None else present
    for who in present:  # The others keep what they sent last.
      self.old[who] = grads[who]
    return self.estimate

  def ef21(self, step, grads):
    if step == 0:
      self.estimates = [scale(0, g) for g in grads]
    for who in self.present(step):
      if step == 0 and self.start == 'full':
        self.estimates[who] = grads[who]
      if step > 0 or self.start == 'compressed':
        arrived, self.memories[who] = self.compress(
            subtract(grads[who], self.estimates[who]),
            step,
            who,
            self.memories[who],
        )
        self.estimates[who] = add(self.estimates[who], arrived)
    pairs = zip(self.weights, self.estimates, strict=True)
    return add(*(scale(w, g) for w, g in pairs))


class NumpyChain:
  """A1 in NumPy, with the draws of the chain."""

  def __init__(self):
    found = matrices.find({k: jnp.zeros(s) for k, s in SHAPES.items()})

    def draw(step):
      (link,) = links_lib.draw_links(
          jax.random.fold_in(CHAIN_KEY, step),
          found,
          ranks=[2],
          probs=[0.5],
          sketch=bl.sketches.gaussian(),
      )
      return link.coin, link.left, link.right

    draws = jax.jit(jax.vmap(draw))(jnp.arange(STEPS))
    self.coins, self.left, self.right = map(np.asarray, draws)

  def __call__(self, step, estimate):
    if self.coins[step]:
      q = self.left[step]
      return {**estimate, 'w': q @ q.T @ estimate['w']}
    q = self.right[step]
    return {**estimate, 'w': estimate['w'] @ q @ q.T}


def make(method, compressor, num_clients=NUM_CLIENTS, key=KEY, **kwargs):
  if method == 'marina':
    kwargs.setdefault('prob', PROB)
  return getattr(bl, method)(
      key, compressor=compressor, num_clients=num_clients, **kwargs
  )


MASKED = dict(mask=MASK)
EVERYWHERE = [
    (method, 'randk', variant)
    for method in ('qgd', 'marina')
    for variant in (
        {'weights': WEIGHTS, 'with_chain': True},
        {'weights': WEIGHTS, 'cohort': 2, 'concatenate': True},
        {'weights': WEIGHTS, **MASKED},
    )
] + [
    ('ef21', 'topk', {'with_chain': True}),
    ('ef21', 'topk', {'weights': WEIGHTS, 'start': 'compressed', **MASKED}),
    ('ef21', 'topk', {'cohort': 2, 'concatenate': True}),
    ('ef21', 'scaled', {'weights': WEIGHTS, 'start': 'zero', **MASKED}),
    ('ef21', 'warm', {'weights': WEIGHTS, **MASKED}),
]
QUICK = [EVERYWHERE[i] for i in (0, 2, 4, 5, 7, 10)]


class ReferenceTest(parameterized.TestCase):
  """Equality with NumPy for 100 rounds in float64, fed the same draws."""

  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))
    self.problem = Regression()

  def assert_equal_to_loop(
      self, method, name, learning_rate, with_chain=False, mask=None, **kwargs
  ):
    memory = jax.random.normal(jax.random.key(0), (6, 1), jnp.float64)
    is_concatenated = kwargs.get('concatenate', False)
    numpy_kwargs = {k: v for k, v in kwargs.items() if k != 'concatenate'}
    loop = Loop(
        numpy_compressor(name, is_concatenated),
        mask=mask,
        memory=np.asarray(memory),
        **numpy_kwargs,
    )
    project = NumpyChain() if with_chain else lambda step, estimate: estimate
    params, path = self.problem.params, []
    for step in range(STEPS):
      grads = self.problem.numpy_grads(params)
      moved = project(step, getattr(loop, method)(step, grads))
      params = combine(lambda w, g: w - learning_rate * g, params, moved)
      path.append(params)
    parts = [make(method, COMPRESSORS[name], **kwargs)]
    if with_chain:
      parts.append(bl.scale_by_bernoulli_chain(CHAIN_KEY, rank=2))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    ours, state = self.problem.run(optax.chain(*parts), mask)
    expected = combine(lambda *leaves: np.stack(leaves), *path)
    # 100 rounds of float64 rounding; the runs are stable, but the basis of a
    # warm start is that of a small error, whose rounding it amplifies.
    tolerance = 1e-8 if name == 'warm' else 1e-11
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, ours), expected, rtol=tolerance, atol=tolerance
    )
    # The path goes somewhere, and stays near: else the numbers mean little.
    travel = np.abs(expected['w'][-1] - self.problem.params['w']).max()
    self.assertBetween(travel, 0.1, 10)
    self.assertEqual(state[0].count, STEPS)
    return loop, state[0]

  @parameterized.parameters(*QUICK)
  def test_equals_numpy(self, method, name, variant):
    self.check_equals_numpy(method, name, variant)

  @parameterized.parameters(*(v for v in EVERYWHERE if v not in QUICK))
  @pytest.mark.slow
  def test_equals_numpy_otherwise(self, method, name, variant):
    self.check_equals_numpy(method, name, variant)

  def check_equals_numpy(self, method, name, variant):
    loop, state = self.assert_equal_to_loop(method, name, 0.05, **variant)
    if method == 'marina':
      stack = combine(lambda *leaves: np.stack(leaves), *loop.old)
      chex.assert_trees_all_close(state.gradients, stack, rtol=1e-9, atol=1e-9)
      chex.assert_trees_all_close(
          state.estimate, loop.estimate, rtol=1e-9, atol=1e-9
      )
      self.assertEqual(state.is_full, round_draws()[0][-1])
    if method == 'ef21':
      stack = combine(lambda *leaves: np.stack(leaves), *loop.estimates)
      tolerance = 1e-7 if name == 'warm' else 1e-9
      chex.assert_trees_all_close(
          state.estimates, stack, rtol=tolerance, atol=tolerance
      )
    if name == 'warm':
      self.assertEqual(state.memory['b'], ())
      # Signs of the columns are those of either QR.
      chex.assert_trees_all_close(
          np.abs(state.memory['w']),
          np.abs(np.stack(loop.memories)),
          rtol=1e-7,
          atol=1e-7,
      )

  @parameterized.parameters(
      ('qgd', {}),
      ('marina', {'weights': WEIGHTS}),
      ('ef21', {'weights': WEIGHTS}),
  )
  def test_identity_is_gradient_descent(self, method, kwargs):
    self.check_identity_is_gradient_descent(method, kwargs)

  @parameterized.parameters(
      ('qgd', {'concatenate': True}), ('marina', {}), ('ef21', {})
  )
  @pytest.mark.slow
  def test_identity_is_gradient_descent_otherwise(self, method, kwargs):
    self.check_identity_is_gradient_descent(method, kwargs)

  def check_identity_is_gradient_descent(self, method, kwargs):
    # E1: NumPy's loop with the identity and whole rounds only.
    weights = np.array(kwargs.get('weights', np.ones(NUM_CLIENTS)))
    weights = weights / weights.sum()
    params = self.problem.params
    for _ in range(STEPS):
      grads = self.problem.numpy_grads(params)
      mean = add(*(scale(w, g) for w, g in zip(weights, grads, strict=True)))
      params = subtract(params, scale(0.1, mean))
    tx = optax.chain(
        make(method, COMPRESSORS['identity'], **kwargs),
        optax.scale_by_learning_rate(0.1),
    )
    path, _ = self.problem.run(tx)
    last = jax.tree.map(lambda x: np.asarray(x[-1]), path)
    chex.assert_trees_all_close(last, params, rtol=1e-12, atol=1e-12)

  def test_marina_with_prob_one_is_gradient_descent(self):
    loop, state = self.assert_equal_to_loop('marina', 'randk', 0.1, prob=1.0)
    self.assertTrue(state.is_full)
    np.testing.assert_array_equal(state.sent, (0, STEPS * NUM_CLIENTS))


def gaussian_stack(num_clients, shape=(4, 3), seed=1):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(num_clients, *shape)), jnp.float32)


def norms(x):
  """Squared norm of each, over all axes but the first."""
  return np.sum(np.asarray(x, np.float64) ** 2, tuple(range(1, x.ndim)))


class LawTest(parameterized.TestCase):
  """The Guarantees of the docstrings, over many draws; d = 12, omega = 3."""

  num_keys = 8000
  compressor = compressors.randk(3)
  weights = (0.5, 0.2, 0.3, 0.0)

  def estimates(self, tx, stacks, num_keys=None, state_fn=lambda state: state):
    """The last G of a few rounds for each of many keys."""

    def one(key):
      state = tx.init(stacks[0][0])._replace(key=key)
      for stack in stacks:
        estimate, state = tx.update(stack, state_fn(state))
      return estimate

    keys = jax.random.split(jax.random.key(7), num_keys or self.num_keys)
    return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)

  def assert_mean(self, samples, expected):
    """Within 5 standard errors, each entry."""
    error = samples.std(0) / np.sqrt(len(samples))
    self.assertGreater(np.max(error), 0)
    # And float32's rounding of numbers of size one.
    deviation = np.abs(samples.mean(0) - expected)
    self.assertTrue(np.all(deviation <= 5 * error + 1e-5), deviation / error)

  @parameterized.parameters({}, {'cohort': 3})
  def test_qgd_is_unbiased(self, **kwargs):
    stack = gaussian_stack(4)
    tx = make('qgd', self.compressor, 4, weights=self.weights, **kwargs)
    mean = np.einsum('l,l...->...', self.weights, stack)
    self.assert_mean(self.estimates(tx, [stack]), mean)

  @parameterized.parameters((weights,))
  def test_qgd_variance(self, weights):
    self.check_qgd_variance(weights)

  @parameterized.parameters([None])
  @pytest.mark.slow
  def test_qgd_variance_otherwise(self, weights):
    self.check_qgd_variance(weights)

  def check_qgd_variance(self, weights):
    stack = gaussian_stack(4)
    tx = make('qgd', self.compressor, 4, weights=weights)
    w = np.array(weights or [0.25] * 4)
    mean = np.einsum('l,l...->...', w, stack)
    samples = norms(self.estimates(tx, [stack]) - mean)
    # RandK: equality.
    self.assert_mean(samples, 3 * np.sum(w**2 * norms(stack)))

  def test_qgd_variance_of_an_inequality(self):
    stack = gaussian_stack(4)
    tx = make('qgd', compressors.natural(), 4)
    mean = np.mean(np.asarray(stack), 0)
    samples = norms(self.estimates(tx, [stack]) - mean)
    bound = np.sum(norms(stack)) / 16 / 8
    self.assertBetween(samples.mean(), bound / 4, bound)

  @parameterized.parameters((6, 2))
  def test_cohort_omega(self, num_clients, cohort):
    self.check_cohort_omega(num_clients, cohort)

  @parameterized.parameters((2, 1), (6, 6))
  @pytest.mark.slow
  def test_cohort_omega_otherwise(self, num_clients, cohort):
    self.check_cohort_omega(num_clients, cohort)

  def check_cohort_omega(self, num_clients, cohort):
    # Tight where the mean gradient is zero.
    stack = gaussian_stack(num_clients)
    stack = stack - jnp.mean(stack, 0, keepdims=True)
    tx = make('qgd', self.compressor, num_clients, cohort=cohort)
    samples = norms(self.estimates(tx, [stack]))
    omega = federated.cohort_omega(3.0, num_clients, cohort)
    self.assert_mean(samples, omega / num_clients * norms(stack).mean())
    if cohort == num_clients:
      self.assertEqual(omega, 3.0)

  def test_cohort_omega_of_one_client(self):
    self.assertEqual(federated.cohort_omega(3.0, 1, 1), 3.0)
    # (M/c) (omega + (M - c)/(M - 1)) = 2.5 (3 + 3/4).
    self.assertAlmostEqual(federated.cohort_omega(3.0, 5, 2), 9.375, places=12)

  @parameterized.parameters({})
  def test_marina_differences_are_unbiased(self, **kwargs):
    self.check_marina_differences_are_unbiased(**kwargs)

  @parameterized.parameters({'cohort': 3})
  @pytest.mark.slow
  def test_marina_differences_are_unbiased_otherwise(self, **kwargs):
    self.check_marina_differences_are_unbiased(**kwargs)

  def check_marina_differences_are_unbiased(self, **kwargs):
    before, after = gaussian_stack(4), gaussian_stack(4, seed=2)
    w = np.array(self.weights)
    tx = make('marina', self.compressor, 4, weights=w, prob=1e-7, **kwargs)
    samples = self.estimates(tx, [before, after])
    # G = grad f(W) at first: whatever cohort.
    start = np.einsum('l,l...->...', w, before)
    moved = np.einsum('l,l...->...', w, after - before)
    self.assert_mean(samples - start, moved)
    if not kwargs:
      variance = 3 * np.sum(w**2 * norms(after - before))
      self.assert_mean(norms(samples - start - moved), variance)

  def test_marina_coins_follow_prob(self):
    num, prob = 4000, 0.3
    tx = make('marina', self.compressor, 2, prob=prob)

    def step(state, _):
      _, state = tx.update(jnp.zeros((2, 4)), state)
      return state, state.is_full

    init = tx.init(jnp.zeros(4))
    self.assertFalse(init.is_full)
    _, fulls = jax.jit(lambda: jax.lax.scan(step, init, length=num))()
    fulls = np.asarray(fulls, np.float64)
    self.assertEqual(fulls[0], 1)
    error = np.sqrt(prob * (1 - prob) / (num - 1))
    self.assertLess(abs(fulls[1:].mean() - prob), 5 * error)
    # Coins of successive rounds are independent.
    products = (fulls[2:] - prob) * (fulls[1:-1] - prob)
    error = prob * (1 - prob) / np.sqrt(num - 2)
    self.assertLess(abs(products.mean()), 5 * error)

  def test_cohorts_are_uniform_and_independent_of_the_round(self):
    # Whole messages, each client its own unit vector: G shows the cohort.
    tx = make('qgd', compressors.identity(), 5, cohort=2)

    def step(state, _):
      estimate, state = tx.update(jnp.eye(5), state)
      return state, estimate > 0

    init = tx.init(jnp.zeros(5))
    _, chosen = jax.jit(lambda: jax.lax.scan(step, init, length=4000))()
    chosen = np.asarray(chosen, np.float64)
    np.testing.assert_array_equal(chosen.sum(1), 2)
    self.assert_mean(chosen, 0.4)
    # Pairs without replacement: c (c - 1) / (M (M - 1)).
    self.assert_mean(chosen[:, 0] * chosen[:, 3], 0.1)
    self.assert_mean(chosen[1:, 0] * chosen[:-1, 0], 0.16)

  @parameterized.parameters('topk', 'sign', 'svd')
  def test_ef21_contracts_surely(self, name):
    compressor = {
        'topk': compressors.topk(3),
        'sign': compressors.sign(),
        'svd': compressors.powersgd(1, start='svd'),
    }[name]
    tx = make('ef21', compressor, 4)
    state = tx.init(jnp.zeros((4, 3)))
    stack, goal = gaussian_stack(4), gaussian_stack(4, seed=2)
    update = jax.jit(tx.update)
    _, before = update(stack, state)
    chex.assert_trees_all_equal(before.estimates, stack)
    factor = 1 - compressor.beta((4, 3))
    for _ in range(3):
      _, after = update(goal, before)
      ratio = norms(after.estimates - goal) / norms(before.estimates - goal)
      self.assertTrue(np.all((0 < ratio) & (ratio <= factor)), ratio)
      before = after

  def test_ef21_contracts_in_the_mean(self):
    tx = make('ef21', compressors.contractive(self.compressor), 4)
    stack, goal = gaussian_stack(4), gaussian_stack(4, seed=2)

    def one(key):
      state = tx.init(stack[0])._replace(key=key)
      _, state = tx.update(stack, state)
      return tx.update(goal, state)[1].estimates

    keys = jax.random.split(jax.random.key(7), 4000)
    estimates = jax.jit(jax.vmap(one))(keys) - goal[None]
    samples = np.sum(np.asarray(estimates, np.float64) ** 2, (2, 3))
    # RandK over 1 + omega keeps K of d: equality, client by client.
    self.assert_mean(samples, 0.75 * norms(stack - goal))

  def test_draws_differ_over_client_leaf_round_and_key(self):
    # Of equal gradients, so that differences are draws.
    stack = {'a': jnp.ones((3, 64)), 'b': jnp.ones((3, 64))}
    tx = make('ef21', compressors.contractive(compressors.randk(16)), 3)
    init = tx.init({'a': jnp.zeros(64), 'b': jnp.zeros(64)})
    update = jax.jit(tx.update)
    at = lambda count, key: init._replace(count=jnp.int32(count), key=key)
    states = [at(1, KEY), at(2, KEY), at(1, CHAIN_KEY), at(1, KEY)]
    draws = [update(stack, state)[1].estimates for state in states]
    seen = {
        np.asarray(draw[leaf][client]).tobytes()
        for draw in draws
        for leaf in ('a', 'b')
        for client in range(3)
    }
    self.assertLen(seen, 3 * 2 * 3)  # The last is the first again.
    chex.assert_trees_all_equal(draws[3], draws[0])

  def test_bfloat16_is_averaged_in_float32(self):
    stack = gaussian_stack(7).astype(jnp.bfloat16)
    mean = np.mean(np.asarray(stack, np.float32), 0).astype(jnp.bfloat16)
    for method in METHODS:
      tx = make(method, compressors.identity(), 7)
      estimate, _ = jax.jit(tx.update)(stack, tx.init(stack[0]))
      # One rounding, of the result.
      np.testing.assert_array_equal(estimate, mean)
      self.assertEqual(estimate.dtype, jnp.bfloat16)


class StartTest(parameterized.TestCase):
  """The first rounds, by their literal definition."""

  def setUp(self):
    super().setUp()
    self.stack = {'b': gaussian_stack(3, (6,)), 'w': gaussian_stack(3, (4, 6))}
    self.params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), self.stack)
    self.mean = jax.tree.map(lambda x: np.mean(x, 0), self.stack)

  def first(self, method, compressor, participants=None, **kwargs):
    tx = make(method, compressor, 3, **kwargs)
    extra = {} if participants is None else {'participants': participants}
    return jax.jit(tx.update)(self.stack, tx.init(self.params), **extra)

  def test_ef21_full(self):
    estimate, state = self.first('ef21', compressors.topk(1))
    chex.assert_trees_all_close(estimate, self.mean, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(state.estimates, self.stack)
    np.testing.assert_array_equal(state.sent, (0, 3))

  def test_ef21_compressed(self):
    estimate, state = self.first(
        'ef21', compressors.topk(1), start='compressed'
    )

    def top(x):
      rows = np.asarray(x).reshape(3, -1)
      kept = np.abs(rows) == np.abs(rows).max(1, keepdims=True)
      return np.where(kept, rows, 0).reshape(x.shape)

    expected = jax.tree.map(top, self.stack)
    chex.assert_trees_all_equal(state.estimates, expected)
    chex.assert_trees_all_close(
        estimate,
        jax.tree.map(lambda x: x.mean(0), expected),
        rtol=1e-6,
        atol=1e-6,
    )
    np.testing.assert_array_equal(state.sent, (3, 0))

  def test_ef21_zero(self):
    estimate, state = self.first('ef21', compressors.topk(1), start='zero')
    chex.assert_trees_all_equal(estimate, self.params)
    chex.assert_trees_all_equal(
        state.estimates, jax.tree.map(jnp.zeros_like, self.stack)
    )
    np.testing.assert_array_equal(state.sent, (0, 0))
    self.assertEqual(state.count, 1)

  def test_marina_starts_whole_without_its_coin(self):
    # All clients, whatever cohort.
    estimate, state = self.first(
        'marina', compressors.randk(1), prob=1e-7, cohort=1
    )
    self.assertTrue(state.is_full)
    chex.assert_trees_all_close(estimate, self.mean, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(state.gradients, self.stack)
    chex.assert_trees_all_equal(state.estimate, estimate)
    np.testing.assert_array_equal(state.sent, (0, 3))

  @parameterized.parameters('qgd', 'marina', 'ef21')
  def test_shapes_of_the_state(self, method):
    tx = make(method, compressors.identity(), 3)
    state = tx.init(self.params)
    _, after = tx.update(self.stack, state)
    words = jax.random.key_data(state.key)
    np.testing.assert_array_equal(jax.random.key_data(after.key), words)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        state._replace(key=words), after._replace(key=words)
    )
    num_bytes = lambda tree: sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
    # A count, a key, two counters; a coin, G and the clients' gradients.
    expected = (
        4
        + 8
        + 8
        + {
            'qgd': 0,
            'marina': 1 + 4 * num_bytes(self.params),
            'ef21': 3 * num_bytes(self.params),
        }[method]
    )
    self.assertEqual(num_bytes(state), expected)

  @parameterized.parameters(*METHODS)
  def test_state_may_be_donated(self, method):
    key = jax.random.key(3)
    tx = make(method, COMPRESSORS['identity'], 3, key=key)
    update = jax.jit(tx.update, donate_argnums=1)
    results = []
    for _ in range(2):  # The second time nothing may have been deleted.
      estimate, state = update(self.stack, tx.init(self.params))
      results.append((estimate, update(self.stack, state)[0]))
    chex.assert_trees_all_equal(*results)
    self.assertFalse(key.is_deleted())


class ParticipationTest(parameterized.TestCase):
  """Who is absent, or of weight zero, neither sends nor harms."""

  def setUp(self):
    super().setUp()
    rounds = [gaussian_stack(4, (4, 6), seed) for seed in range(4)]
    self.rounds = jnp.stack(rounds)

  def runner(self, tx, mask=None):
    """Returns rounds -> (G of each round, the states)."""

    def step(state, inputs):
      stack, present = inputs
      extra = {} if mask is None else {'participants': present}
      estimate, state = tx.update(stack, state, **extra)
      return state, (estimate, state._replace(key=0))

    masks = np.ones((4, 4), bool) if mask is None else mask
    state = tx.init(self.rounds[0, 0])
    return jax.jit(lambda xs: jax.lax.scan(step, state, (xs, masks))[1])

  @parameterized.parameters(
      ('qgd', {'concatenate': True}), ('marina', {'cohort': 3}), ('ef21', {})
  )
  def test_nan_of_a_client_of_weight_zero(self, method, kwargs):
    compressor = COMPRESSORS['topk' if method == 'ef21' else 'randk']
    tx = make(method, compressor, 4, weights=(1, 2, 0, 1), **kwargs)
    poisoned = self.rounds.at[:, 2].set(jnp.nan)
    run = self.runner(tx)
    (clean, _), (estimates, _) = run(self.rounds), run(poisoned)
    chex.assert_trees_all_equal(estimates, clean)
    chex.assert_tree_all_finite(estimates)

  @parameterized.parameters(('qgd', False), ('marina', True), ('ef21', False))
  def test_nan_of_an_absent_client(self, method, concatenate):
    compressor = COMPRESSORS['topk' if method == 'ef21' else 'randk']
    tx = make(method, compressor, 4, concatenate=concatenate)
    mask = np.array([[1, 1, 0, 1]] * 4, bool)
    poisoned = self.rounds.at[:, 2].set(jnp.nan)
    run = self.runner(tx, mask)
    (clean, _), (estimates, _) = run(self.rounds), run(poisoned)
    chex.assert_trees_all_equal(estimates, clean)
    chex.assert_tree_all_finite(estimates)

  def assert_absence_does_no_harm(self, method):
    """Client 2 misses the second round; what it then holds is not read."""
    compressor = COMPRESSORS['topk' if method == 'ef21' else 'randk']
    kwargs = {'prob': 1e-7} if method == 'marina' else {}
    tx = make(method, compressor, 4, **kwargs)
    mask = np.ones((4, 4), bool)
    mask[1, 2] = False
    poisoned = self.rounds.at[1, 2].set(jnp.nan)
    run = self.runner(tx, mask)
    (clean, _), (estimates, _) = run(self.rounds), run(poisoned)
    chex.assert_tree_all_finite(estimates)
    chex.assert_trees_all_equal(estimates, clean)

  @parameterized.parameters('qgd', 'ef21')
  def test_a_client_returns_after_an_absence(self, method):
    self.assert_absence_does_no_harm(method)

  def test_a_client_of_marina_returns_after_an_absence(self):
    self.assert_absence_does_no_harm('marina')

  def test_absent_clients_keep_estimate_and_memory(self):
    tx = make('ef21', COMPRESSORS['warm'], 4, start='compressed')
    mask = np.array(
        [[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 0]], bool
    )
    _, states = self.runner(tx, mask)(self.rounds)
    first = tx.init(self.rounds[0, 0])
    for field in ('estimates', 'memory'):
      (after,) = jax.tree.leaves(getattr(states, field))
      (start,) = jax.tree.leaves(getattr(first, field))
      before = np.concatenate([start[None], after[:-1]])
      same = np.all(before == np.asarray(after), axis=(2, 3))
      np.testing.assert_array_equal(same, ~mask)
    # Clients draw the same first Q, as a fresh client would.
    one = federated.init_memory(COMPRESSORS['warm'], self.rounds[0, 0])
    (start,) = jax.tree.leaves(first.memory)
    self.assertEqual(start.shape, (4, 6, 1))
    np.testing.assert_array_equal(start, np.stack([one['']] * 4))

  @parameterized.parameters(*METHODS)
  def test_a_round_of_nobody(self, method):
    compressor = COMPRESSORS['topk' if method == 'ef21' else 'randk']
    kwargs = {'prob': 1e-7} if method == 'marina' else {}
    tx = make(method, compressor, 4, **kwargs)
    mask = np.array([[1] * 4, [1] * 4, [0] * 4, [1] * 4], bool)
    estimates, states = self.runner(tx, mask)(self.rounds)
    chex.assert_tree_all_finite(estimates)
    expected = np.zeros((4, 6)) if method == 'qgd' else estimates[1]
    # G of ef21 is summed anew.
    np.testing.assert_allclose(estimates[2], expected, rtol=1e-6)
    np.testing.assert_array_equal(states.sent[2], states.sent[1])


class BitsTest(parameterized.TestCase):
  """Payloads counted by hand; float32, leaves of 6 and 24 elements."""

  # Compressed by leaf and concatenated; whole is 30 * 32 = 960.
  SIZES = {
      # K values, and indices of 3 and 5 bits in whole bytes.
      'topk': (2 * 32 + 8 + 2 * 32 + 16, 2 * 32 + 16),
      # K values and a seed a message.
      'randk': (2 * (2 * 32 + 64), 2 * 32 + 64),
      # 9 bits a number in whole bytes: 54 and 216; 270.
      'natural': (56 + 216, 272),
      'identity': (960, 960),
      # The bias whole, and a rank-one matrix; a vector is sent whole.
      'warm': (6 * 32 + (4 + 6) * 32, 960),
  }
  COMPRESSORS = {
      **COMPRESSORS,
      'topk': compressors.topk(2),
      'randk': compressors.randk(2),
      'natural': compressors.natural(),
  }

  def setUp(self):
    super().setUp()
    self.params = {k: jnp.zeros(s) for k, s in SHAPES.items()}

  @parameterized.product(name=tuple(SIZES), concatenate=(False, True))
  def test_message_bits(self, name, concatenate):
    compressor = self.COMPRESSORS[name]
    expected = self.SIZES[name][int(concatenate)], 960
    shapes = jax.eval_shape(lambda: self.params)
    for like in (self.params, shapes):
      sizes = federated.message_bits(compressor, like, concatenate=concatenate)
      self.assertEqual(sizes, expected)

  def test_message_bits_of_other_dtypes(self):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.params)
    sizes = federated.message_bits(self.COMPRESSORS['topk'], params)
    self.assertEqual(sizes, (2 * 16 + 8 + 2 * 16 + 16, 480))

  @parameterized.product(name=tuple(SIZES), concatenate=(False, True))
  def test_round_trip_of_real_payloads(self, name, concatenate):
    compressor = self.COMPRESSORS[name]
    rng = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
        self.params,
    )
    memory = federated.init_memory(compressor, tree, concatenate=concatenate)
    key = federated.client_key(KEY, 3, 1)

    @jax.jit
    def both(tree):
      payloads, after = federated.send(
          compressor, key, tree, memory, concatenate=concatenate
      )
      restored = federated.receive(
          compressor,
          payloads,
          jax.eval_shape(lambda: self.params),
          concatenate=concatenate,
      )
      return payloads, after, restored

    payloads, after, restored = both(tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, memory)
    self.assertEqual(set(payloads), {''} if concatenate else {'b', 'w'})
    num_bytes = sum(np.asarray(x).nbytes for x in jax.tree.leaves(payloads))
    self.assertEqual(8 * num_bytes, self.SIZES[name][int(concatenate)])
    numpy_tree = jax.tree.map(np.asarray, tree)
    parts = concatenated(numpy_tree) if concatenate else numpy_tree
    back = jax.tree.map(np.asarray, restored)
    back = concatenated(back) if concatenate else back
    for path, x in parts.items():
      if name == 'topk':
        kept = np.argsort(-np.abs(x.ravel()), kind='stable')[:2]
        expected = np.zeros(x.size)
        expected[kept] = x.ravel()[kept]
        np.testing.assert_array_equal(back[path].ravel(), expected)
      elif name == 'randk':
        ratio = back[path] / x
        self.assertEqual(np.count_nonzero(ratio), 2)
        np.testing.assert_allclose(ratio[ratio != 0], x.size / 2, rtol=1e-6)
      elif name == 'natural':
        ratio = back[path] / x
        self.assertTrue(np.all((ratio > 0.5) & (ratio <= 2)))
        np.testing.assert_array_equal(np.frexp(np.abs(back[path]))[0], 0.5)
      elif name == 'warm' and path == 'w':
        self.assertEqual(np.linalg.matrix_rank(back[path], tol=1e-5), 1)
        left = np.linalg.qr(x @ np.asarray(memory['w']))[0]
        # Float32 products of numbers of size one.
        np.testing.assert_allclose(back[path], left @ left.T @ x, atol=1e-5)
      else:
        np.testing.assert_array_equal(back[path], x)

  def sent_bits(self, tx, compressor, num_rounds, mask=None, **kwargs):
    """Returns bits after some rounds of a chain, and rounds whole."""
    chained = optax.chain(tx, optax.scale(-1.0))
    stack = jax.tree.map(lambda x: jnp.ones((5, *x.shape)), self.params)

    def step(state, present):
      extra = {} if mask is None else {'participants': present}
      _, state = chained.update(stack, state, self.params, **extra)
      return state, getattr(state[0], 'is_full', False)

    masks = np.ones((num_rounds, 5), bool) if mask is None else mask
    state, full = jax.jit(
        lambda: jax.lax.scan(step, chained.init(self.params), masks)
    )()
    bits = federated.bits_up(state, compressor, self.params, **kwargs)
    self.assertEqual(bits.shape, ())
    self.assertEqual(bits.dtype, jnp.float32)
    return int(bits), np.asarray(full)

  mask = np.random.default_rng(2).uniform(size=(7, 5)) < 0.5

  @parameterized.parameters(
      ({'concatenate': True}, 128 * 7 * 5),
      ({'cohort': 2}, 256 * 7 * 2),
      ({'mask': mask}, 256 * int(mask.sum())),
  )
  def test_qgd(self, kwargs, expected):
    kwargs = dict(kwargs)
    mask = kwargs.pop('mask', None)
    compressor = self.COMPRESSORS['randk']
    tx = make('qgd', compressor, **kwargs)
    kwargs.pop('cohort', None)
    bits, _ = self.sent_bits(tx, compressor, 7, mask, **kwargs)
    self.assertEqual(bits, expected)

  def test_marina(self):
    compressor = self.COMPRESSORS['randk']
    tx = make('marina', compressor, cohort=2)
    bits, full = self.sent_bits(tx, compressor, 12)
    num_full = int(full.sum())
    self.assertBetween(num_full, 2, 10)
    expected = 960 * 5 * num_full + 256 * 2 * (12 - num_full)
    self.assertEqual(bits, expected)

  def test_marina_with_a_mask(self):
    compressor = self.COMPRESSORS['randk']
    tx = make('marina', compressor)
    bits, full = self.sent_bits(tx, compressor, 7, self.mask)
    sent = self.mask.sum(1)
    self.assertEqual(bits, np.sum(np.where(full, 960, 256) * sent))

  @parameterized.parameters(
      ({}, 960 * 5 + 152 * 6 * 5),
      ({'start': 'compressed'}, 152 * 7 * 5),
      ({'cohort': 2, 'start': 'zero'}, 152 * 6 * 2),
      (
          {'mask': mask},
          960 * int(mask[0].sum()) + 152 * int(mask[1:].sum()),
      ),
      (
          {'mask': mask, 'start': 'compressed', 'concatenate': True},
          80 * int(mask.sum()),
      ),
  )
  def test_ef21(self, kwargs, expected):
    kwargs = dict(kwargs)
    mask = kwargs.pop('mask', None)
    compressor = self.COMPRESSORS['topk']
    tx = make('ef21', compressor, **kwargs)
    kwargs.pop('cohort', None)
    kwargs.pop('start', None)
    bits, _ = self.sent_bits(tx, compressor, 7, mask, **kwargs)
    self.assertEqual(bits, expected)

  def test_many_bits_do_not_overflow(self):
    compressor = self.COMPRESSORS['randk']
    state = make('qgd', compressor).init(self.params)
    state = state._replace(sent=jnp.array([2**31 - 1, 2**30], jnp.int32))
    bits = federated.bits_up(state, compressor, self.params)
    expected = 256 * (2**31 - 1) + 960 * 2**30
    self.assertAlmostEqual(float(bits) / expected, 1, places=6)
    with jax.enable_x64(True):
      bits = federated.bits_up(state, compressor, self.params)
      self.assertEqual(int(bits), expected)


class DevicesTest(parameterized.TestCase):
  """One device, and clients split over eight of them under jit: one run."""

  num_clients, num_rounds = 16, 8

  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))
    self.assertEqual(jax.device_count(), 8)
    self.problem = Regression(self.num_clients)
    rng = np.random.default_rng(3)
    self.mask = rng.uniform(size=(self.num_rounds, self.num_clients)) < 0.7
    self.weights = tuple(rng.uniform(0.5, 2, size=self.num_clients))
    self.mesh = jax.make_mesh(
        (8,), ('clients',), axis_types=(jax.sharding.AxisType.Auto,)
    )

  def transformation(self, name):
    method, compressor, with_mask, options = {
        'qgd': ('qgd', 'randk', False, {'cohort': 5}),
        'marina': ('marina', 'randk', True, {'prob': 0.4}),
        'ef21': ('ef21', 'warm', False, {'cohort': 11}),
    }[name]
    estimator = make(
        method,
        COMPRESSORS[compressor],
        self.num_clients,
        weights=self.weights,
        **options,
    )
    tx = optax.chain(estimator, optax.scale_by_learning_rate(0.05))

    def step(params, state, data, present):
      extra = {'participants': present} if with_mask else {}
      grads = self.problem.grads(params, *data)
      updates, state = tx.update(grads, state, params, **extra)
      return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, self.problem.params)
    data = jnp.asarray(self.problem.x), jnp.asarray(self.problem.y)
    return step, params, tx.init(params), data

  def run_rounds(self, step, params, state, data, check=lambda state: None):
    for present in self.mask:
      params, state = step(params, state, data, jnp.asarray(present))
      check(state)
    estimator = state[0]._replace(key=jax.random.key_data(state[0].key))
    return jax.device_get((params, estimator))

  def assert_same(self, one, other):
    # Sums of 16 clients in another order; warm starts amplify a little.
    chex.assert_trees_all_close(one, other, rtol=1e-12, atol=1e-12)
    travel = np.abs(one[0]['w'] - self.problem.params['w']).max()
    self.assertGreater(travel, 0.1)

  @parameterized.parameters(['ef21'])
  def test_same_run(self, name):
    self.check_same_run(name)

  @parameterized.parameters('qgd', 'marina')
  @pytest.mark.slow
  def test_same_run_otherwise(self, name):
    self.check_same_run(name)

  def check_same_run(self, name):
    step, params, state, data = self.transformation(name)
    alone = self.run_rounds(jax.jit(step), params, state, data)
    is_client = federated.per_client(state)
    split, whole = (
        jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (['clients'], [])
    )
    put = lambda x, flag: jax.device_put(x, split if flag else whole)

    def check(state):
      """Each device holds two clients, and no more."""
      leaves, flags = map(jax.tree.leaves, (state, is_client))
      for leaf, flag in zip(leaves, flags, strict=True):
        place = split if flag else whole
        self.assertTrue(leaf.sharding.is_equivalent_to(place, leaf.ndim))

    args = (
        jax.device_put(params, whole),
        jax.tree.map(put, state, is_client),
        jax.device_put(data, split),
    )
    compiled = jax.jit(step).lower(*args, jnp.asarray(self.mask[0])).compile()
    sharded = self.run_rounds(compiled, *args, check)
    self.assert_same(sharded, alone)
    # Devices exchange sums over clients, and nothing of a client's.
    text = compiled.as_text()
    self.assertIn(' all-reduce(', text)
    self.assertNotRegex(text, r' (all-gather|all-to-all|collective-permute)\(')

  def test_per_client(self):
    params = {'w': jnp.zeros((4, 6)), 'b': jnp.zeros(6)}
    every = {'b': True, 'w': True}
    none = {'b': False, 'w': False}
    flags = federated.per_client(
        optax.chain(
            make('marina', COMPRESSORS['randk']), optax.trace(0.9)
        ).init(params)
    )
    marina = federated.MarinaState(False, False, False, False, every, none)
    self.assertEqual(flags, (marina, optax.TraceState(none)))
    flags = federated.per_client(
        optax.chain(make('ef21', COMPRESSORS['warm'])).init(params)
    )
    memory = {'b': (), 'w': True}
    ef21 = federated.Ef21State(False, False, False, every, memory)
    self.assertEqual(flags, (ef21,))
    flags = federated.per_client(make('qgd', COMPRESSORS['randk']).init(params))
    self.assertEqual(flags, federated.QgdState(False, False, False))


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0))
def opposed_runs(gamma, key):
  key, chain_key = jax.random.split(key)
  tx = optax.chain(
      make('marina', compressors.randk(1), 2, key=key, prob=0.2),
      bl.scale_by_bernoulli_chain(chain_key, rank=1, prob=0.5),
      optax.scale_by_learning_rate(gamma),
  )

  def step(carry, _):
    params, state = carry
    stack = jnp.array([21.0, -19.0])[:, None, None] * params[None]
    updates, state = tx.update(stack, state, params)
    new = optax.apply_updates(params, updates)
    return (new, state), jnp.sum(params**2)

  params = jnp.ones((4, 3)) / jnp.sqrt(12.0)
  return jax.lax.scan(step, (params, tx.init(params)), length=800)[1]


class TheoryTest(parameterized.TestCase):
  """T5-T7 on problems on which lesser stepsizes or methods fail."""

  def opposed(self, gamma):
    """||W||^2 along MARINA, 64 runs on f_1 = 21||W||^2/2, f_2 = -19||W||^2/2."""
    keys = jax.random.split(jax.random.key(11), 64)
    return np.asarray(opposed_runs(jnp.float32(gamma), keys), np.float64)

  # lmin = lmax = (1/4 + 1/3)/2, omega = 12 - 1.
  OPPOSED = dict(smoothness=1.0, omega=11.0, prob=0.2, lmax=7 / 24)

  @pytest.mark.slow
  def test_marina_is_stable_with_the_stepsize_of_t6(self):
    gamma = stepsizes.marina(client_smoothness=(21.0, 19.0), **self.OPPOSED)
    # Lt = sqrt 401: 1/(1 + sqrt(401 (7/24) 0.8 11/(0.2 2))).
    expected = 1 / (1 + math.sqrt(401 * 7 / 24 * 0.8 * 11 / 0.4))
    self.assertAlmostEqual(gamma / expected, 1, places=12)
    squares = self.opposed(gamma)
    # ||grad f||^2 = ||W||^2; D0 = 1/2; G_0 is exact.
    self.assertLess(squares.mean(), 2 * 0.5 / (gamma * 7 / 24 * 800))
    self.assertLess(squares[:, -1].max(), 0.1)

  @pytest.mark.slow
  def test_marina_diverges_with_smoothness_of_f(self):
    gamma = stepsizes.marina(client_smoothness=(1.0, 1.0), **self.OPPOSED)
    squares = self.opposed(gamma)
    # All of 64 seeds, from ||W||^2 = 1; infinite ones too.
    last = np.nan_to_num(squares[:, 200], nan=np.inf)
    self.assertGreater(last.min(), 1e3)

  def test_marina_rate_of_t6_under_pl(self):
    gamma = stepsizes.marina(
        client_smoothness=(21.0, 19.0), lmin=7 / 24, pl=1.0, **self.OPPOSED
    )
    squares = self.opposed(gamma)[:, :400]
    rate = 1 - gamma * 7 / 24
    bound = rate ** np.arange(400)
    mean = squares.mean(0)
    error = squares.std(0) / 8
    self.assertTrue(np.all(mean <= bound * (1 + 1e-5) + 5 * error))
    # The bound itself is small at the end.
    self.assertLess(mean[-1] + 5 * error[-1], bound[-1])
    self.assertLess(bound[-1], 0.25)

  vectors = np.array([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]])

  def along(self, tx, num_steps):
    """f along x, for f_l = <a_l, x>^2 + ||x||^2/4 from (1, 1, 1)."""
    a = jnp.asarray(self.vectors)

    def step(carry, _):
      x, state = carry
      stack = 2 * (a @ x)[:, None] * a + x[None] / 2
      value = jnp.mean((a @ x) ** 2) + jnp.sum(x**2) / 4
      updates, state = tx.update(stack, state, x)
      return (optax.apply_updates(x, updates), state), (value, x)

    x = jnp.ones(3)
    return jax.lax.scan(step, (x, tx.init(x)), length=num_steps)[1]

  def constants(self):
    hessian = 2 / 3 * self.vectors.T @ self.vectors + np.eye(3) / 2
    values = np.linalg.eigvalsh(hessian)
    each = 2 * np.sum(self.vectors**2, 1) + 0.5
    return values[-1], values[0], each

  def test_ef21_converges_where_averaged_top1_does_not(self):
    self.enter_context(jax.enable_x64(True))
    smoothness, pl, each = self.constants()
    np.testing.assert_allclose(each, 34.5)
    kwargs = dict(
        smoothness=smoothness, client_smoothness=each, beta=1 / 3, lmax=1.0
    )
    hessian = 2 / 3 * self.vectors.T @ self.vectors + np.eye(3) / 2
    compressor, num_steps = compressors.topk(1), 3000
    for extra in ({}, {'lmin': 1.0, 'pl': pl}):
      gamma = stepsizes.ef21(**kwargs, **extra)
      tx = optax.chain(
          make('ef21', compressor, 3), optax.scale_by_learning_rate(gamma)
      )
      values, xs = jax.jit(lambda tx=tx: self.along(tx, num_steps))()
      squares = norms(np.asarray(xs) @ hessian)
      self.assertLess(squares.mean(), 2 * values[0] / (gamma * num_steps))
      if extra:
        bound = (1 - gamma * pl) ** np.arange(num_steps) * values[0]
        self.assertTrue(np.all(values <= bound * (1 + 1e-9)))
        self.assertLess(bound[-1], 0.1 * values[0])
      self.assertLess(values[-1], 1e-2 * values[0])

    # Averages of Top1, sent and received: x+ = (1 + 11 gamma/6) x.
    def average(x, _):
      a = jnp.asarray(self.vectors)
      total = jnp.zeros(3)
      for client in range(3):
        key = federated.client_key(KEY, 0, client)
        g = 2 * (a[client] @ x) * a[client] + x / 2
        payloads, _ = federated.send(compressor, key, g)
        total += federated.receive(compressor, payloads, x)
      return x - 0.01 * total / 3, x

    _, path = jax.jit(lambda: jax.lax.scan(average, jnp.ones(3), length=50))()
    growth = (1 + 11 * 0.01 / 6) ** np.arange(50)
    np.testing.assert_allclose(
        path, growth[:, None] * np.ones((1, 3)), rtol=1e-12
    )

  def test_qgd_rate_of_t5_under_pl(self):
    smoothness, pl, each = self.constants()
    # One seed keeps 1 of 3 elements: omega = 2; all f_l have their minimum
    # at 0, so that C = 0.
    num_steps, omega = 1000, 2.0
    gamma = stepsizes.qgd(
        smoothness=smoothness,
        client_smoothness=each,
        omega=omega,
        lmin=1.0,
        lmax=1.0,
        num_steps=num_steps,
        pl=pl,
    )
    slope = omega * each[0] / 3

    def one(key):
      tx = optax.chain(
          make('qgd', compressors.randk(1), 3, key=key),
          optax.scale_by_learning_rate(gamma),
      )
      return self.along(tx, num_steps)[0]

    keys = jax.random.split(jax.random.key(2), 64)
    values = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    rho = gamma * pl - smoothness * gamma**2 * slope
    self.assertGreater(rho, 0)
    bound = (1 - rho) ** np.arange(num_steps) * values[0, 0]
    mean, error = values.mean(0), values.std(0) / 8
    self.assertTrue(np.all(mean <= bound * (1 + 1e-5) + 5 * error))
    self.assertLess(mean[-1], 0.9 * values[0, 0])


class RejectsTest(parameterized.TestCase):
  """Every bad argument raises and says what would be right."""

  def setUp(self):
    super().setUp()
    self.params = {'a': jnp.ones((3, 2)), 'b': jnp.ones((3, 2))}

  def make(self, method, **kwargs):
    name = 'topk' if method == 'ef21' else 'randk'
    return make(method, **{'compressor': COMPRESSORS[name], **kwargs})

  def nested(self, method):
    """The estimator alone, inside of a chain, and inside of two."""
    tx = self.make(method)
    chained = optax.chain(
        tx, bl.scale_by_bernoulli_chain(jax.random.key(1), rank=1)
    )
    return tx, chained, optax.chain(chained, optax.scale(-1.0))

  @parameterized.parameters(*METHODS)
  def test_masked(self, method):
    for tx in self.nested(method):
      masked = optax.masked(tx, {'a': True, 'b': False})
      with self.assertRaisesRegex(ValueError, f'{method} to stand outermost'):
        masked.init(self.params)
      partition = optax.partition(
          {'fine': tx, 'frozen': optax.set_to_zero()},
          {'a': 'fine', 'b': 'frozen'},
      )
      with self.assertRaisesRegex(ValueError, f'{method} to stand outermost'):
        partition.init(self.params)

  @parameterized.parameters(*METHODS)
  def test_multi_steps(self, method):
    message = f'{method} outside of optax.MultiSteps'
    for tx in self.nested(method):
      multi = optax.MultiSteps(tx, every_k_schedule=2)
      with self.assertRaisesRegex(ValueError, message):
        multi.init(self.params)

  @parameterized.parameters('qgd', 'marina')
  def test_biased_compressors(self, method):
    for biased in (
        compressors.topk(2),
        compressors.sign(),
        compressors.powersgd(1),
        compressors.powersgd(1, start='warm'),
        compressors.contractive(compressors.randk(2)),
    ):
      message = (
          f'Expected an unbiased compressor for {method}, got'
          rf' {biased.name.replace("(", "[(]").replace(")", "[)]")}: ef21 takes'
      )
      with self.assertRaisesRegex(ValueError, message):
        self.make(method, compressor=biased)

  @parameterized.parameters(
      compressors.randk(2), compressors.natural(), compressors.dithering(2)
  )
  def test_unbiased_compressors_of_ef21(self, *compressor):
    compressor = compressors.Compressor(*compressor)
    message = (
        f'contractive compressor for ef21, got {compressor.name}: wrap it with'
        ' compressors.contractive'
    )
    with self.assertRaisesRegex(ValueError, message):
      self.make('ef21', compressor=compressor)
    self.make('ef21', compressor=compressors.contractive(compressor))

  @parameterized.product(
      method=METHODS,
      case=(
          ({'num_clients': 0}, 'num_clients >= 1, got num_clients=0'),
          ({'num_clients': -2}, 'num_clients >= 1, got num_clients=-2'),
          ({'cohort': 0}, r'cohort in \[1, 5\], got cohort=0'),
          ({'cohort': 6}, r'cohort in \[1, 5\], got cohort=6'),
          ({'weights': (1, 1, 1, 1)}, r'weights: 5 .*got weights=\(1, 1, 1, 1'),
          ({'weights': (1, 1, 1, 1, -1)}, r'weights: 5 finite numbers >= 0'),
          ({'weights': (0, 0, 0, 0, 0)}, 'not all zero, got weights'),
          ({'weights': (1, 1, 1, 1, math.nan)}, 'finite.*nan'),
          ({'weights': (1, 1, 1, 1, math.inf)}, 'finite.*inf'),
          ({'weights': ((1,), (1,), (1,), (1,), (1,))}, 'weights: 5 finite'),
      ),
  )
  def test_argument(self, method, case):
    kwargs, message = case
    with self.assertRaisesRegex(ValueError, message):
      self.make(method, **kwargs)

  @parameterized.parameters(0, 0.0, -0.1, 1.5, float('nan'))
  def test_marina_prob(self, prob):
    with self.assertRaisesRegex(
        ValueError, rf'prob in \(0, 1\], got prob={prob}'
    ):
      self.make('marina', prob=prob)

  def test_marina_prob_may_be_traced(self):
    stack = jax.tree.map(lambda x: jnp.ones((5, *x.shape)), self.params)

    def is_full(prob):
      tx = self.make('marina', prob=prob)
      _, state = tx.update(stack, tx.init(self.params))
      return tx.update(stack, state)[1].is_full

    is_full = jax.jit(is_full)
    self.assertTrue(is_full(jnp.float32(1.0)))
    self.assertFalse(is_full(jnp.float32(0.0)))

  @parameterized.parameters('Full', '', None)
  def test_ef21_start(self, start):
    message = f"start to be 'full', 'compressed' or 'zero', got {start!r}"
    with self.assertRaisesRegex(ValueError, message):
      self.make('ef21', start=start)

  @parameterized.parameters(*METHODS)
  def test_updates_without_the_client_axis(self, method):
    tx = self.make(method)
    state = tx.init(self.params)
    update = lambda updates: jax.eval_shape(tx.update, updates, state)
    for shape in ((3, 2), (6, 3, 2), ()):
      updates = {**self.params, 'b': jnp.ones(shape)}
      updates['a'] = jnp.ones((5, 3, 2))
      message = rf'shape \(5, \.\.\.\) for {method}, got'
      with self.assertRaisesRegex(ValueError, message):
        update(updates)

  @parameterized.parameters(*METHODS)
  def test_participants(self, method):
    stack = jax.tree.map(lambda x: jnp.ones((5, *x.shape)), self.params)
    tx = self.make(method)
    state = tx.init(self.params)
    for shape in ((4,), (5, 1), ()):
      with self.assertRaisesRegex(
          ValueError, r'participants of shape \(5,\), got'
      ):
        tx.update(stack, state, participants=np.ones(shape, bool))
    tx = self.make(method, cohort=2)
    with self.assertRaisesRegex(
        ValueError, 'one of cohort and participants, got cohort=2 and a mask'
    ):
      tx.update(stack, state, participants=np.ones(5, bool))


LLAMA = {  # Shapes of an 8B model, layers stacked for a scan.
    'embed': (128256, 4096),
    'head': (4096, 128256),
    'layers': {
        'q': (32, 4096, 4096),
        'k': (32, 4096, 1024),
        'v': (32, 4096, 1024),
        'o': (32, 4096, 4096),
        'gate': (32, 4096, 14336),
        'up': (32, 4096, 14336),
        'down': (32, 14336, 4096),
        'norms': (32, 2, 4096),
    },
    'norm': (4096,),
}
NUM_LLAMA = 8_030_261_248


def llama(dtype=jnp.float32):
  is_shape = lambda node: isinstance(node, tuple)
  make = lambda shape: jax.ShapeDtypeStruct(shape, dtype)
  return jax.tree.map(make, LLAMA, is_leaf=is_shape)


class LargeTest(parameterized.TestCase):
  """Sizes beyond 32 bits, by shapes alone."""

  @parameterized.named_parameters(
      ('identity', compressors.identity(), 32 * NUM_LLAMA),
      ('natural', compressors.natural(), 9 * NUM_LLAMA),
      ('sign', compressors.sign(), NUM_LLAMA + 32 * 11),
      ('randk', compressors.randk(fraction=0.25), 8 * NUM_LLAMA + 64 * 11),
  )
  def test_message_bits(self, compressor, expected):
    small, whole = federated.message_bits(compressor, llama())
    self.assertEqual(small, expected)
    self.assertEqual(whole, 32 * NUM_LLAMA)
    self.assertIsInstance(small, int)

  def test_bits_up(self):
    tx = bl.qgd(KEY, compressor=compressors.natural(), num_clients=1000)
    state = tx.init({'w': jnp.zeros(1)})
    state = state._replace(sent=jnp.array([10**9, 2**31 - 1], jnp.int32))
    count = lambda s: federated.bits_up(s, compressors.sign(), llama())
    small, whole = NUM_LLAMA + 32 * 11, 32 * NUM_LLAMA
    exact = 10**9 * small + (2**31 - 1) * whole
    self.assertEqual(count(state), np.float32(exact))
    with jax.enable_x64(True):
      self.assertEqual(count(state), float(exact))
    # Counts, sizes, products and the sum rounded to 24 bits.
    ratio = float(jax.jit(count)(state)) / exact
    self.assertAlmostEqual(ratio, 1, delta=4 * 2.0**-24)

  def test_messages_are_counted_up_to_the_last(self):
    tx = bl.qgd(KEY, compressor=compressors.natural(), num_clients=3)
    params = {'w': jnp.zeros(2)}
    state = tx.init(params)._replace(sent=jnp.array([2**31 - 2, 5], jnp.int32))
    grads = {'w': jnp.ones((3, 2))}
    _, state = jax.jit(tx.update)(grads, state, params)
    np.testing.assert_array_equal(state.sent, (2**31 - 1, 5))

  @parameterized.named_parameters(
      ('randk', compressors.randk(fraction=0.1)),
      ('topk', compressors.topk(k=5)),
  )
  def test_more_elements_than_indices(self, compressor):
    stack = {'up': jax.ShapeDtypeStruct((80, 8192, 28672), jnp.float32)}
    with self.assertRaisesRegex(ValueError, 'up: Expected at most 2147483647'):
      federated.message_bits(compressor, stack)
    with self.assertRaisesRegex(ValueError, r'All leaves.*concatenate=False'):
      federated.message_bits(compressor, llama(), concatenate=True)


class LeavesTest(parameterized.TestCase):
  """What people keep in their params, and gradients in other containers."""

  params = {'w': jnp.ones((4, 6)), 'b': jnp.ones(6)}

  def grads(self, params, num_clients=3):
    key = jax.random.key(4)

    def grad(x):
      shape = (num_clients, *np.shape(x))
      if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return jnp.zeros(shape, jnp.result_type(x))
      return jax.random.normal(key, shape)

    return jax.tree.map(grad, params)

  def make(self, method, **kwargs):
    compressor = compressors.randk(fraction=0.5)
    if method == 'ef21':
      compressor = compressors.contractive(compressor)
    kwargs |= {'prob': 0.5} if method == 'marina' else {}
    return getattr(bl, method)(
        KEY, compressor=compressor, num_clients=3, **kwargs
    )

  def two_steps(self, tx, grads, params):
    state = tx.init(params)
    step = jax.jit(tx.update)
    first, state = step(grads, state, params)
    again = jax.tree.map(lambda g: 2 * g, grads)
    second, after = step(again, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    return first, second

  @parameterized.parameters(('qgd', False), ('marina', True), ('ef21', False))
  def test_leaves_that_are_no_floats(self, method, concatenate):
    self.check_leaves_that_are_no_floats(method, concatenate)

  @parameterized.parameters(('qgd', True), ('marina', False), ('ef21', True))
  @pytest.mark.slow
  def test_leaves_that_are_no_floats_otherwise(self, method, concatenate):
    self.check_leaves_that_are_no_floats(method, concatenate)

  def check_leaves_that_are_no_floats(self, method, concatenate):
    tx = self.make(method, concatenate=concatenate)
    others = {
        'steps': jnp.asarray(2**24 + 1, jnp.int32),
        'mask': jnp.ones(3, bool),
        'count': 7,
        'flag': True,
    }
    params = {**self.params, **others}
    ours = self.two_steps(tx, self.grads(params), params)
    plain = self.two_steps(tx, self.grads(self.params), self.params)
    for one, two in zip(ours, plain, strict=True):
      chex.assert_trees_all_equal({k: one[k] for k in two}, two)
      moved = optax.apply_updates(params, one)
      chex.assert_trees_all_equal({k: moved[k] for k in others}, others)

  @parameterized.parameters(['ef21'])
  def test_python_numbers_and_empty_leaves(self, method):
    self.check_python_numbers_and_empty_leaves(method)

  @parameterized.parameters('qgd', 'marina')
  @pytest.mark.slow
  def test_python_numbers_and_empty_leaves_otherwise(self, method):
    self.check_python_numbers_and_empty_leaves(method)

  def check_python_numbers_and_empty_leaves(self, method):
    tx = self.make(method)
    params = {**self.params, 'temperature': 1.0, 'empty': jnp.zeros((0, 3))}
    updates = self.two_steps(tx, self.grads(params), params)[1]
    self.assertEqual(updates['temperature'].shape, ())
    self.assertNotEqual(updates['temperature'], 0)

  @parameterized.parameters(['marina'])
  def test_half_params_and_single_gradients(self, method):
    self.check_half_params_and_single_gradients(method)

  @parameterized.parameters('qgd', 'ef21')
  @pytest.mark.slow
  def test_half_params_and_single_gradients_otherwise(self, method):
    self.check_half_params_and_single_gradients(method)

  def check_half_params_and_single_gradients(self, method):
    tx = self.make(method)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.params)
    updates = self.two_steps(tx, self.grads(self.params), params)[1]
    self.assertEqual(updates['w'].dtype, jnp.float32)

  @parameterized.parameters(['marina'])
  def test_gradients_in_another_container(self, method):
    self.check_gradients_in_another_container(method)

  @parameterized.parameters('qgd', 'ef21')
  @pytest.mark.slow
  def test_gradients_in_another_container_otherwise(self, method):
    self.check_gradients_in_another_container(method)

  def check_gradients_in_another_container(self, method):
    tx, grads = self.make(method), self.grads(self.params)
    other = collections.OrderedDict((k, grads[k]) for k in ('w', 'b'))
    for one, two in zip(
        self.two_steps(tx, other, self.params),
        self.two_steps(tx, grads, self.params),
        strict=True,
    ):
      chex.assert_trees_all_equal(one, two)
    with self.assertRaisesRegex(
        ValueError, "in params and client gradients, got 'b' in params alone"
    ):
      tx.update({'w': grads['w']}, tx.init(self.params), self.params)

  @parameterized.named_parameters(
      ('sign', compressors.sign()),
      ('low_rank', compressors.powersgd(1)),
      ('topk', compressors.topk(2)),
  )
  def test_eight_bits(self, compressor):
    tx = bl.ef21(KEY, compressor=compressor, num_clients=3)
    params = {'w': jnp.ones((4, 6), jnp.float8_e5m2)}
    state = tx.init(params)
    ones = jnp.ones((3, 4, 6), jnp.float8_e5m2)
    for scale in (1, 2):  # The second error, all ones, is compressed.
      grads = {'w': (scale * ones.astype(jnp.float32)).astype(ones.dtype)}
      updates, state = tx.update(grads, state, params)
      self.assertEqual(updates['w'].dtype, jnp.float8_e5m2)
    exact = 2 if compressor.name != 'TopK 2' else (1, 2)
    found = np.unique(np.asarray(updates['w'], np.float32))
    np.testing.assert_array_equal(found, exact)

  @parameterized.named_parameters(
      ('sign', compressors.sign()), ('low_rank', compressors.powersgd(1))
  )
  def test_complex_numbers_are_refused(self, compressor):
    tx = bl.ef21(KEY, compressor=compressor, num_clients=3)
    params = {'w': jnp.ones((4, 6), jnp.complex64)}
    with self.assertRaisesRegex(TypeError, 'w: Expected real numbers'):
      tx.update(
          {'w': jnp.ones((3, 4, 6), jnp.complex64)}, tx.init(params), params
      )


class WireTest(parameterized.TestCase):

  @parameterized.parameters(False, True)
  def test_containers_of_the_two_sides(self, concatenate):
    layers = [jnp.full((2, i + 1), float(i)) for i in range(11)]
    names = {str(i): x for i, x in enumerate(layers)}
    for sent, like in ((layers, names), (names, layers)):
      other = collections.OrderedDict(
          b=jnp.ones(3), layers=sent, a=2 * jnp.ones(2)
      )
      payloads, _ = federated.send(
          compressors.identity(), KEY, other, concatenate=concatenate
      )
      got = federated.receive(
          compressors.identity(),
          payloads,
          {'a': jnp.zeros(2), 'b': jnp.zeros(3), 'layers': like},
          concatenate=concatenate,
      )
      chex.assert_trees_all_equal(
          matrices.named_leaves(got), matrices.named_leaves(other)
      )


# Method, whether its key is static, and its cohort.
INJECTED = [('qgd', True, None), ('marina', False, 2), ('ef21', False, None)]


class HyperparamsTest(parameterized.TestCase):
  """optax.inject_hyperparams keeps numbers in the optimiser's state."""

  @parameterized.parameters(*INJECTED)
  def test_injected(self, method, key_is_static, cohort):
    self.check_injected(method, key_is_static, cohort)

  @parameterized.parameters(
      *(
          c
          for c in itertools.product(METHODS, [False, True], [None, 2])
          if c not in INJECTED
      )
  )
  @pytest.mark.slow
  def test_injected_otherwise(self, method, key_is_static, cohort):
    self.check_injected(method, key_is_static, cohort)

  def check_injected(self, method, key_is_static, cohort):
    kwargs = {
        'compressor': compressors.natural(),
        'num_clients': 3,
        'cohort': cohort,
        'weights': np.array([1.0, 2.0, 3.0]),
    }
    if method == 'ef21':
      kwargs['compressor'] = compressors.sign()
    if method == 'marina':
      kwargs['prob'] = 0.5
    static = ('num_clients', 'cohort', *(('key',) if key_is_static else ()))
    factory = getattr(bl, method)
    ours = optax.inject_hyperparams(factory, static_args=static)(KEY, **kwargs)
    plain = factory(KEY, **kwargs)
    grads = jax.random.normal(jax.random.key(1), (4, 3, 5))
    params = {'w': jnp.ones(5)}
    found = []
    for tx in (ours, plain):
      state, step = tx.init(params), jax.jit(tx.update)
      found.append([])
      for g in grads:
        updates, state = step({'w': g}, state, params)
        found[-1].append(updates['w'])
    # Weights are normalised in float32 where they are traced.
    np.testing.assert_allclose(*map(np.stack, found), rtol=1e-5, atol=1e-6)

  def test_a_schedule_of_prob(self):
    tx = optax.inject_hyperparams(bl.marina, static_args='num_clients')(
        KEY,
        compressor=compressors.natural(),
        prob=lambda step: jnp.where(step < 2, 1.0, 1e-9),
        num_clients=3,
    )
    params = {'w': jnp.ones(5)}
    state, full, update = tx.init(params), [], jax.jit(tx.update)
    for _ in range(4):
      _, state = update({'w': jnp.ones((3, 5))}, state, params)
      full.append(bool(optax.tree.get(state, 'is_full')))
    self.assertEqual(full, [True, True, False, False])

  def test_a_traced_number_of_clients_is_named(self):
    tx = optax.inject_hyperparams(bl.qgd)(
        KEY, compressor=compressors.natural(), num_clients=3
    )
    params = {'w': jnp.ones(5)}
    state = tx.init(params)
    with self.assertRaisesRegex(TypeError, r"static_args=\('num_clients',\)"):
      jax.jit(tx.update)({'w': jnp.ones((3, 5))}, state, params)


class LargeModelTest(parameterized.TestCase):
  """Counts of an 8B model and of its experts, by shapes alone."""

  def sent(self, tree, rules, **kwargs):
    matrices = bl.Matrices(rules=rules)
    state = chain.ScaleByBernoulliChainState(
        jnp.zeros([], jnp.int32), jax.random.key(0), ()
    )
    return chain.sent_numbers(state, tree, matrices=matrices, **kwargs)

  @parameterized.parameters((16, 1.0), (16, 0.0), (3000, 1.0), (3000, 0.0))
  def test_sent_numbers_are_exact_without_coins(self, rank, prob):
    experts, m, n, rest = (32, 8), 4096, 14336, 2**31 + 5
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    tree = {'up': spec(*experts, m, n), 'rest': spec(rest), 'rate': 0.1}
    rule = bl.Rule('up', (2,), (3,), (0, 1))
    side = n if prob else m
    expected = 256 * rank * side + rest + 1
    found = self.sent(tree, (rule,), rank=rank, prob=prob)
    self.assertEqual(float(found), np.float32(expected))

  def test_sent_numbers_with_coins(self):
    spec = jax.ShapeDtypeStruct((32, 64, 4096, 14336), jnp.float32)
    rule = bl.Rule('up', (2,), (3,), (0, 1))
    found = float(self.sent({'up': spec}, (rule,), rank=3000, prob=0.5))
    left, right = 3000 * 14336, 3000 * 4096
    num_left = (found - 2048 * right) / (left - right)
    # Half of 2048 coins, within five standard deviations; float32 sums.
    self.assertAlmostEqual(num_left, 1024, delta=5 * 2048**0.5 / 2)
    self.assertAlmostEqual(num_left, round(num_left), delta=0.02)
