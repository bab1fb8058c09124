"""Tests of A2 and A3: links, merges and policies of adapter mode."""

import dataclasses
import functools
import math
import re

from absl.testing import parameterized
import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.tasks import quadratic

SKETCHES = {
    'gaussian': bl.sketches.gaussian(),
    'coordinate': bl.sketches.coordinate(),
}
STACK = bl.Matrices(rules=(bl.matrices.stacked('stack'),))
SHAPES = {'a': (4, 6), 'b': (6, 4), 'stack': (2, 4, 6)}
PATHS = tuple(SHAPES)
NUM_SAMPLES = 5


class Regression:
  """f(W) = sum_k 1/(2N) ||X_k W_k - Y_k||^2 over two matrices and a stack."""

  def __init__(self, num_steps, paths=PATHS, dtype=np.float64):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    self.params = {path: draw(*SHAPES[path]) for path in paths}
    self.batches = {}  # {path: (x, y)}, one of each a step.
    for path in paths:
      *batch, m, n = SHAPES[path]
      lead = (num_steps, *batch, NUM_SAMPLES)
      self.batches[path] = draw(*lead, m), draw(*lead, n)

  def loss(self, params, batch):
    total = 0.0
    for path, w in params.items():
      x, y = batch[path]
      rest = jnp.matmul(x, w.astype(x.dtype)) - y
      total += 0.5 * jnp.sum(rest**2) / NUM_SAMPLES
    return total, {}

  def adapted(self):
    return inject.by_addition(self.loss, self.selection())

  def selection(self):
    return STACK if 'stack' in self.params else None

  def grad(self, w, path, step, entry=()):
    """In NumPy: X^T (X W - Y) / N of a matrix, of a stack or an entry of it."""
    x, y = (part[step][entry] for part in self.batches[path])
    return np.swapaxes(x, -1, -2) @ (x @ w - y) / NUM_SAMPLES

  def inputs(self):
    """Returns params and batches in JAX; in float64 where that is on."""
    return jax.tree.map(jnp.asarray, (self.params, self.batches))


def run(chain, loss, key, params, batches):
  """Returns the first state and, stacked, the state after each step."""

  def step(state, batch):
    state, _ = chain.step(state, loss, batch)
    return state, state

  @jax.jit
  def scan(key, params):
    state = chain.init(key, params)
    return state, jax.lax.scan(step, state, batches)[1]

  return scan(key, params)


def merge_each(chain, states):
  """Returns the merged weights of stacked states, one after another."""
  return jax.jit(lambda states: jax.lax.map(chain.params, states))(states)


def draws(chain, key, params, num_links):
  """Returns (factors, coins) of each link in NumPy, stacked over links."""
  found = chain.adapted(params)
  draw = lambda link: adapters.draw_link(key, link, found, chain.policy)
  drawn = jax.jit(jax.vmap(draw))(jnp.arange(num_links))
  return jax.tree.map(np.asarray, tuple(drawn))


def assert_mean(samples, expected):
  """Mean over axis 0 within 5 computed standard errors, entrywise."""
  mean = samples.mean(0)
  error = samples.std(0, ddof=1) / np.sqrt(len(samples))
  np.testing.assert_array_less(np.abs(mean - expected), 5 * error)


class Mlp(nn.Module):

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(5)(x))
    return nn.Dense(3)(x)


class GradientModeTest(parameterized.TestCase):
  """K = 1, SGD, frames: a link is the step A1 with gamma = s^2 eta."""

  num_steps = 100

  def gamma(self, count):
    """A schedule, which must not restart at links."""
    return 0.1 / (1 + 0.02 * count)

  def mlp(self):
    """Returns loss, adapted loss, params, batches and what is a matrix."""
    model = Mlp()

    def loss(params, batch):
      x, y = batch
      return jnp.mean((model.apply({'params': params}, x) - y) ** 2), {}

    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {
        'Dense_0': {'kernel': draw(4, 5), 'bias': draw(5)},
        'Dense_1': {'kernel': draw(5, 3), 'bias': draw(3)},
    }
    batches = draw(self.num_steps, 6, 4), draw(self.num_steps, 6, 3)
    return loss, inject.by_product(loss), params, batches, None

  def plain(self):
    problem = Regression(self.num_steps)
    return problem.loss, problem.adapted(), *problem.inputs(), STACK

  def gradient_mode(self, tx, loss, params, batches, selection):
    """Returns the params after each step; what is no matrix is frozen."""
    labels = jax.tree.map(
        lambda is_matrix: 'tuned' if is_matrix else 'frozen',
        matrices_lib.mask(params, selection),
    )
    tx = optax.partition({'tuned': tx, 'frozen': optax.set_to_zero()}, labels)

    def step(carry, batch):
      params, state = carry
      grads = jax.grad(lambda p: loss(p, batch)[0])(params)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), params

    scan = lambda params: jax.lax.scan(step, (params, tx.init(params)), batches)
    return jax.jit(scan)(params)[1]

  # By name: problem, side, rank, alpha, scaling, sketch. Rank 5 is above one
  # side of every matrix, 4 above one of the MLP's last kernel.
  @parameterized.parameters(
      ('mlp', 'bernoulli', 4, 0.5, 'sqrt', 'gaussian'),
      ('plain', 'right', 1, 3.0, 'sqrt', 'gaussian'),
  )
  def test_both_modes_take_the_same_steps(
      self, problem, side, rank, alpha, scaling, sketch
  ):
    self.check_both_modes_take_the_same_steps(
        problem, side, rank, alpha, scaling, sketch
    )

  @parameterized.parameters(
      ('mlp', 'left', 2, None, 'rank', 'gaussian'),
      ('plain', 'bernoulli', 5, None, 'rank', 'coordinate'),
      ('mlp', 'right', 4, 6.0, 'rank', 'gaussian'),
      ('mlp', 'bernoulli', 2, 5.0, 'rank', 'coordinate'),
      ('plain', 'left', 5, 0.7, 'sqrt', 'coordinate'),
      ('plain', 'bernoulli', 2, 3.0, 'rank', 'gaussian'),
  )
  @pytest.mark.slow
  def test_both_modes_take_the_same_steps_otherwise(
      self, problem, side, rank, alpha, scaling, sketch
  ):
    self.check_both_modes_take_the_same_steps(
        problem, side, rank, alpha, scaling, sketch
    )

  def check_both_modes_take_the_same_steps(
      self, problem, side, rank, alpha, scaling, sketch
  ):
    with jax.enable_x64(True):
      loss, adapted, params, batches, selection = getattr(self, problem)()
      key = jax.random.key(7)
      kwargs = dict(sketch=SKETCHES[sketch])
      policy = bl.ChainPolicy(
          rank=rank,
          period=1,
          side=side,
          prob=0.4 if side == 'bernoulli' else 0.5,
          alpha=alpha,
          scaling=scaling,
          **kwargs,
      )
      s = 1.0
      if alpha is not None:
        s = alpha / (rank if scaling == 'rank' else math.sqrt(rank))
      tx = optax.sgd(lambda count: self.gamma(count) / s**2)
      chain = adapters.make_chain(policy, tx, selection)
      _, states = run(chain, adapted, key, params, batches)
      merged = merge_each(chain, states)

      kwargs |= dict(rank=rank, matrices=selection)
      if side == 'bernoulli':
        tx = bl.bernoulli_lora(self.gamma, key, prob=0.4, **kwargs)
      else:
        tx = bl.rac_lora(self.gamma, key, side=side, **kwargs)
      expected = self.gradient_mode(tx, loss, params, batches, selection)
    # 100 steps of float64 rounding on sums of at most 6 terms.
    chex.assert_trees_all_close(merged, expected, rtol=1e-11, atol=1e-11)
    # The paths go somewhere: equal constants would say nothing.
    for matrix in matrices_lib.find(params, selection):
      path = jax.tree.leaves(expected)[matrix.index]
      start = jax.tree.leaves(params)[matrix.index]
      self.assertGreater(np.abs(path[-1] - start).max(), 0.1)
      if side == 'bernoulli':
        self.assertLen(np.unique(states.coins[matrix.path]), 2)


class NumpyChain:
  """A2 with Adam in NumPy, from algorithms.md, with the draws of the chain."""

  b1, b2, eps, learning_rate, decay = 0.8, 0.95, 1e-6, 0.05, 0.1
  period = 3

  def __init__(self, problem, s, drawn, trains):
    self.problem, self.s, self.trains = problem, s, trains
    self.factors, self.coins = drawn

  def train(self, path, entry, num_steps, reset, warmup):
    """Returns W + s L R after each step, for one matrix or entry of a stack."""
    w = self.problem.params[path][entry].copy()
    merged, count, moments = [], 0, {}
    for step in range(num_steps):
      link, place = divmod(step, self.period)
      if place == 0:
        pair = {
            side: factor[link][entry].copy()
            for side, factor in self.factors[path].items()
        }
        coin = self.coins[path][link][entry] if path in self.coins else None
        trained = self.trains(coin)
        if reset or not link:
          count = 0
          moments = {side: (0.0, 0.0) for side in pair}
      left, right = pair['left'], pair['right']
      g = self.problem.grad(w + self.s * left @ right, path, step, entry)
      grads = {'left': self.s * g @ right.T, 'right': self.s * left.T @ g}
      count += 1
      size = min(1, (place + 1) / warmup) if warmup else 1
      for side in trained:
        first, second = moments[side]
        first = self.b1 * first + (1 - self.b1) * grads[side]
        second = self.b2 * second + (1 - self.b2) * grads[side] ** 2
        moments[side] = first, second
        move = (first / (1 - self.b1**count)) / (
            np.sqrt(second / (1 - self.b2**count)) + self.eps
        )
        move += self.decay * pair[side]
        pair[side] = pair[side] - size * self.learning_rate * move
      merged.append(w + self.s * pair['left'] @ pair['right'])
      if place == self.period - 1:
        w = merged[-1]
    return np.stack(merged)


class ReferenceTest(parameterized.TestCase):
  """Equality with NumPy for 10 links of 3 steps of AdamW in float64."""

  @parameterized.parameters(
      ('left', True, 2),
      ('bernoulli', False, 2),
  )
  def test_chain_equals_numpy(self, side, reset, warmup):
    self.check_chain_equals_numpy(side, reset, warmup)

  @parameterized.parameters(
      ('bernoulli', True, 0),
      ('right', False, 0),
      (None, True, 0),
      (None, False, 2),
  )
  @pytest.mark.slow
  def test_chain_equals_numpy_otherwise(self, side, reset, warmup):
    self.check_chain_equals_numpy(side, reset, warmup)

  def check_chain_equals_numpy(self, side, reset, warmup):
    num_steps, reference = 30, NumpyChain
    problem = Regression(num_steps, ('b', 'stack'))
    s = 1.5 / 2
    policy = bl.ChainPolicy(
        rank=2,
        period=reference.period,
        side=side,
        alpha=1.5,
        reset_optimizer=reset,
        warmup=warmup,
    )
    with jax.enable_x64(True):
      tx = optax.adamw(
          reference.learning_rate,
          b1=reference.b1,
          b2=reference.b2,
          eps=reference.eps,
          weight_decay=reference.decay,
      )
      chain = adapters.make_chain(policy, tx, STACK)
      key = jax.random.key(3)
      params, batches = problem.inputs()
      _, states = run(chain, problem.adapted(), key, params, batches)
      merged = merge_each(chain, states)
      drawn = draws(chain, key, params, num_steps // reference.period)
    trains = {
        'left': lambda coin: ('right',),
        'right': lambda coin: ('left',),
        'bernoulli': lambda coin: ('right',) if coin else ('left',),
        None: lambda coin: ('left', 'right'),
    }[side]
    numpy_chain = reference(problem, s, drawn, trains)
    np.testing.assert_array_equal(states.count, np.arange(1, num_steps + 1))
    for path in problem.params:
      for entry in np.ndindex(*SHAPES[path][:-2]):
        expected = numpy_chain.train(path, entry, num_steps, reset, warmup)
        # 30 steps of float64 rounding; Adam divides by roots of moments that
        # are 1e-6 at least.
        np.testing.assert_allclose(
            np.asarray(merged[path])[(slice(None), *entry)],
            expected,
            rtol=1e-9,
            atol=1e-9,
        )
        travel = np.abs(expected[-1] - problem.params[path][entry]).max()
        self.assertGreater(travel, 0.1)
      if side == 'bernoulli':
        self.assertLen(np.unique(drawn[1][path]), 2)


class CounterexampleTest(parameterized.TestCase):
  """The quadratic of section 4, 20 seeds: LoRA fails, the chain does not."""

  num_seeds, num_steps = 20, 6000

  def runs(self, policy):
    """Returns W of each seed at half time and at the end, in float64."""
    with jax.enable_x64(True):
      task = quadratic.make_task()
      loss = inject.by_addition(
          lambda params, batch: task.loss(params, batch, None)
      )
      tx = optax.sgd(1 / task.smoothness)
      chain = adapters.make_chain(policy, tx)

      def step(state, _):
        return chain.step(state, loss, None)[0], None

      def half(state, _):
        state, _ = jax.lax.scan(step, state, length=self.num_steps // 2)
        return state, chain.params(state)['w']

      def one(key):
        state = chain.init(key, task.init(key))
        return jax.lax.scan(half, state, length=2)[1]

      keys = jax.random.split(jax.random.key(0), self.num_seeds)
      return np.asarray(jax.jit(jax.vmap(one))(keys))

  def gaps(self, runs):
    """Returns f - f* without cancellation; (num_seeds, 2)."""
    x = runs.reshape(*runs.shape[:2], -1)
    return np.sum(quadratic.CURVATURE * (x - quadratic.MINIMISER) ** 2, axis=-1)

  @parameterized.named_parameters(
      ('lora', adapters.ChainPolicy.lora(1)),
      ('cola_10', adapters.ChainPolicy.cola(1, 10)),
  )
  def test_training_both_factors_overflows(self, policy):
    self.check_training_both_factors_overflows(policy)

  @parameterized.named_parameters(
      ('cola_5', adapters.ChainPolicy.cola(1, 5)),
      ('cola_50', adapters.ChainPolicy.cola(1, 50)),
  )
  @pytest.mark.slow
  def test_training_both_factors_overflows_otherwise(self, policy):
    self.check_training_both_factors_overflows(policy)

  def check_training_both_factors_overflows(self, policy):
    is_finite = np.isfinite(self.runs(policy)).all(axis=(1, 2, 3))
    self.assertEqual(is_finite.sum(), 0)

  @parameterized.parameters(['left'])
  def test_a_kept_factor_stalls_at_a_wrong_point(self, side):
    self.check_a_kept_factor_stalls_at_a_wrong_point(side)

  @parameterized.parameters(['right'])
  @pytest.mark.slow
  def test_a_kept_factor_stalls_at_a_wrong_point_otherwise(self, side):
    self.check_a_kept_factor_stalls_at_a_wrong_point(side)

  def check_a_kept_factor_stalls_at_a_wrong_point(self, side):
    runs = self.runs(adapters.ChainPolicy.asymmetric(1, side))
    gaps = self.gaps(runs)
    # A subspace of 3 dimensions of 9 holds x* with probability zero, and at
    # step 1/L its own minimiser is reached to rounding in 3000 steps.
    self.assertGreater(gaps.min(), 1)
    np.testing.assert_allclose(runs[:, 0], runs[:, 1], rtol=1e-12, atol=1e-12)

  @parameterized.named_parameters(
      ('rac_right', adapters.ChainPolicy.rac(1, 1, 'right')),
      ('bernoulli', adapters.ChainPolicy.bernoulli(1, 1)),
  )
  def test_a_resampled_factor_converges(self, policy):
    self.check_a_resampled_factor_converges(policy)

  @parameterized.named_parameters(
      ('rac_left', adapters.ChainPolicy.rac(1, 1, 'left'))
  )
  @pytest.mark.slow
  def test_a_resampled_factor_converges_otherwise(self, policy):
    self.check_a_resampled_factor_converges(policy)

  def check_a_resampled_factor_converges(self, policy):
    gaps = self.gaps(self.runs(policy))
    self.assertLess(gaps[:, 1].max(), 1e-12)
    self.assertGreater(gaps[:, 0].min(), 1e-12)  # Steps did it, no accident.


def leaves_by_path(tree):
  """Returns {names of the path: leaf}."""
  names = lambda path: tuple(
      jax.tree_util.keystr((key,), simple=True) for key in path
  )
  return {
      names(path): leaf
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def steps_of(tree, step):
  return jax.tree.map(lambda x: np.asarray(x[step]), tree)


class FrozenTest(parameterized.TestCase):
  """The frozen factor gets no update and its moments do not move."""

  num_steps, period = 24, 3

  def setUp(self):
    super().setUp()
    self.problem = Regression(self.num_steps, ('a', 'stack'), np.float32)
    self.key = jax.random.key(4)

  def states(self, policy, tx):
    policy = dataclasses.replace(policy, sketch=SKETCHES['coordinate'])
    chain = adapters.make_chain(policy, tx, STACK)
    loss = self.problem.adapted()
    first, states = run(
        chain, loss, self.key, self.problem.params, self.problem.batches
    )
    factors, coins = draws(
        chain, self.key, self.problem.params, self.num_steps // self.period
    )
    return first, states, factors, coins

  @parameterized.parameters([False])
  def test_traced_coin(self, reset):
    self.check_traced_coin(reset)

  @parameterized.parameters([True])
  @pytest.mark.slow
  def test_traced_coin_otherwise(self, reset):
    self.check_traced_coin(reset)

  def check_traced_coin(self, reset):
    policy = adapters.ChainPolicy.bernoulli(
        2, self.period, reset_optimizer=reset
    )
    tx = optax.adamw(0.1, weight_decay=0.3)
    first, states, factors, coins = self.states(policy, tx)
    adam = lambda state: state.opt_state[0]
    before = jax.tree.map(np.asarray, adam(first)._asdict())
    num_frozen = 0
    for step in range(self.num_steps):
      link, place = divmod(step, self.period)
      if place == 0 and reset:
        before = jax.tree.map(np.zeros_like, before)
      after = steps_of(adam(states)._asdict(), step)
      for path, drawn in factors.items():
        coin = coins[path][link]
        np.testing.assert_array_equal(states.coins[path][step], coin)
        for entry in np.ndindex(*coin.shape):
          frozen, trained = 'left', 'right'
          if not coin[entry]:
            frozen, trained = trained, frozen

          def get(tree, side, path=path, entry=entry):
            return tree[path][side][entry]

          state = steps_of(states.factors, step)
          np.testing.assert_array_equal(
              get(state, frozen), drawn[frozen][link][entry]
          )
          self.assertTrue(np.any(get(state, trained)))
          for moment in ('mu', 'nu'):
            old, new = before[moment], after[moment]
            np.testing.assert_array_equal(get(new, frozen), get(old, frozen))
            self.assertTrue(np.any(get(new, trained) != get(old, trained)))
            num_frozen += int(np.any(get(new, frozen)))
      before = after
    # Without restarts frozen moments of earlier links are there to be kept.
    self.assertEqual(num_frozen > 0, not reset)

  @parameterized.parameters(('right', False))
  def test_known_side(self, side, reset):
    self.check_known_side(side, reset)

  @parameterized.parameters(('left', True))
  @pytest.mark.slow
  def test_known_side_otherwise(self, side, reset):
    self.check_known_side(side, reset)

  def check_known_side(self, side, reset):
    policy = adapters.ChainPolicy.rac(
        2, self.period, side, reset_optimizer=reset
    )
    tx = optax.adamw(0.1, weight_decay=0.3)
    first, states, factors, coins = self.states(policy, tx)
    other = {'left': 'right', 'right': 'left'}[side]
    self.assertEmpty(coins)
    self.assertEmpty(states.coins)
    for step in range(self.num_steps):
      for path, drawn in factors.items():
        np.testing.assert_array_equal(
            states.factors[path][side][step], drawn[side][step // self.period]
        )
        self.assertTrue(np.any(states.factors[path][other][step]))
    # What is frozen is not even in the optimiser's state.
    names = leaves_by_path(first.opt_state)
    sides = {part for name in names for part in name} & {'left', 'right'}
    self.assertEqual(sides, {other})

  def test_moments_of_a_partitioned_optimiser(self):
    # LoRA+: a learning rate a factor.
    labels = lambda trained: {
        path: {side: side for side in pair} for path, pair in trained.items()
    }
    rates = {'left': optax.adam(0.1), 'right': optax.adam(0.01)}
    tx = optax.partition(rates, labels)
    policy = adapters.ChainPolicy.bernoulli(
        2, self.period, reset_optimizer=False
    )
    first, states, _, coins = self.states(policy, tx)

    def mu(state, side):
      adam, _ = state.opt_state.inner_states[side].inner_state
      return adam.mu['a'][side]

    for side, frozen in (('left', coins['a']), ('right', ~coins['a'])):
      path = np.concatenate([mu(first, side)[None], mu(states, side)])
      for step in range(self.num_steps):
        if frozen[step // self.period]:
          np.testing.assert_array_equal(path[step + 1], path[step])

  def test_state_of_other_shapes_keeps_them(self):
    # Adafactor holds vectors, or one number, where Adam holds a factor.
    policy = adapters.ChainPolicy.bernoulli(2, self.period)
    chain = adapters.make_chain(policy, optax.adafactor(0.1), STACK)
    params, batch = self.problem.params, steps_of(self.problem.batches, 0)
    state = jax.eval_shape(chain.init, self.key, params)
    loss = self.problem.adapted()
    step = lambda state, batch: chain.step(state, loss, batch)[0]
    after = jax.eval_shape(step, state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def spacing(x, dtype):
  """Returns the distance of numbers of a dtype around x (an ulp), in NumPy."""
  bits = {'float32': 23, 'bfloat16': 7}[dtype]
  return 2.0 ** (np.floor(np.log2(np.abs(x))) - bits)


class MergeTest(parameterized.TestCase):
  """Links end by a merge that changes nothing but the last bit."""

  def problem(self, num_steps, dtype):
    problem = Regression(num_steps, ('a', 'stack'), np.float32)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), problem.params)
    return problem, params

  @parameterized.parameters(('float32', 'bernoulli'))
  def test_base_changes_at_links_only(self, dtype, side):
    self.check_base_changes_at_links_only(dtype, side)

  @parameterized.parameters(('bfloat16', None))
  @pytest.mark.slow
  def test_base_changes_at_links_only_otherwise(self, dtype, side):
    self.check_base_changes_at_links_only(dtype, side)

  def check_base_changes_at_links_only(self, dtype, side):
    period, num_steps = 3, 8
    problem, params = self.problem(num_steps, dtype)
    law = {} if side is None else {'sketch': SKETCHES['coordinate']}
    policy = bl.ChainPolicy(rank=2, period=period, side=side, alpha=3.0, **law)
    chain = adapters.make_chain(policy, optax.adam(0.1), STACK)
    first, states = run(
        chain, problem.adapted(), jax.random.key(0), params, problem.batches
    )
    merged = merge_each(chain, states)
    chex.assert_trees_all_equal(first.params, params)
    for step in range(num_steps):
      old = first.params if step == 0 else steps_of(states.params, step - 1)
      new = steps_of(states.params, step)
      if step and step % period == 0:
        for path in params:
          self.assertTrue(np.any(old[path] != new[path]))
        # What a step merges is what `chain.params` would have returned.
        chex.assert_trees_all_equal(new, steps_of(merged, step - 1))
      else:
        chex.assert_trees_all_equal(new, old)

  @parameterized.parameters(
      adapters.ChainPolicy.lora(2, warmup=4),
      adapters.ChainPolicy.asymmetric(2, 'left', warmup=4),
  )
  def test_without_a_period_the_base_stays(self, policy):
    problem, params = self.problem(5, 'float32')
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    first, states = run(
        chain, problem.adapted(), jax.random.key(0), params, problem.batches
    )
    merged = merge_each(chain, states)
    for step in range(5):
      chex.assert_trees_all_equal(steps_of(states.params, step), params)
    self.assertTrue(np.any(steps_of(merged, -1)['a'] != params['a']))
    # From R = 0 its first step, of four to full size, is a quarter of one.
    left = np.asarray(first.factors['a']['left'], np.float64)
    g = problem.grad(np.asarray(params['a'], np.float64), 'a', 0)
    # Float32 sums of five products of size ten.
    np.testing.assert_allclose(
        states.factors['a']['right'][0],
        -0.1 / 4 * left.T @ g,
        rtol=1e-4,
        atol=1e-5,
    )

  @parameterized.parameters(
      ('float32', 'nearest'),
      ('bfloat16', 'stochastic'),
      ('bfloat16', 'compensated'),
  )
  def test_merge_moves_a_weight_by_one_rounding(self, dtype, rounding):
    self.check_merge_moves_a_weight_by_one_rounding(dtype, rounding)

  @parameterized.parameters(('bfloat16', 'nearest'))
  @pytest.mark.slow
  def test_merge_moves_a_weight_by_one_rounding_otherwise(
      self, dtype, rounding
  ):
    self.check_merge_moves_a_weight_by_one_rounding(dtype, rounding)

  def check_merge_moves_a_weight_by_one_rounding(self, dtype, rounding):
    chain, state = self.trained(dtype, alpha=3.0, rounding=rounding)
    after = jax.jit(chain.merge)(state)
    for one in chain.adapted(state.params):
      path = one.matrix.path
      pair = jax.tree.map(
          lambda x: np.asarray(x, np.float64), state.factors[path]
      )
      base = np.asarray(state.params[path], np.float64)
      exact = base + one.scale * pair['left'] @ pair['right']
      # Half an ulp to nearest, one if the side is drawn; and the float32 sum
      # of three terms in which it is computed. Near zero that of 1e-3 will do.
      ulps = 1 if rounding == 'stochastic' else 0.5
      size = np.abs(base) + one.scale * np.abs(pair['left']) @ np.abs(
          pair['right']
      )
      bound = ulps * spacing(np.maximum(np.abs(exact), 1e-3), dtype)
      error = np.abs(np.asarray(after.params[path], np.float64) - exact)
      np.testing.assert_array_less(error, bound + 4 * 2.0**-24 * size)
      self.assertGreater(np.abs(exact - base).max(), 0.1)
      # The product left the factors: what stays has L R = 0 exactly.
      left, right = (after.factors[path][side] for side in ('left', 'right'))
      np.testing.assert_array_equal(left @ right, 0)

  def trained(self, dtype, **kwargs):
    """Returns a chain and a state with factors as after some training."""
    rng = np.random.default_rng(5)
    draw = lambda shape, dtype: jnp.asarray(rng.normal(size=shape), dtype)
    params = {'w': draw((64, 48), dtype), 'v': draw((48, 64), dtype)}
    sketch = SKETCHES['coordinate']  # Without QR, which takes long to compile.
    if kwargs.get('side', 'left') is not None:
      kwargs['sketch'] = sketch
    policy = bl.ChainPolicy(rank=2, period=3, **kwargs)
    chain = adapters.make_chain(policy, optax.sgd(0.1))
    state = jax.jit(chain.init)(jax.random.key(6), params)
    fill = lambda x: draw(x.shape, x.dtype)
    return chain, state._replace(factors=jax.tree.map(fill, state.factors))

  @parameterized.parameters(
      ('bfloat16', 'nearest', 'bernoulli'), ('float32', 'stochastic', None)
  )
  def test_merge_cannot_be_applied_twice(self, dtype, rounding, side):
    self.check_merge_cannot_be_applied_twice(dtype, rounding, side)

  @parameterized.parameters(
      ('float32', 'nearest', 'left'), ('bfloat16', 'stochastic', 'bernoulli')
  )
  @pytest.mark.slow
  def test_merge_cannot_be_applied_twice_otherwise(self, dtype, rounding, side):
    self.check_merge_cannot_be_applied_twice(dtype, rounding, side)

  def check_merge_cannot_be_applied_twice(self, dtype, rounding, side):
    self.check_twice(dtype, rounding=rounding, side=side)

  def test_compensated_merge_cannot_be_applied_twice(self):
    self.check_twice('bfloat16', rounding='compensated')

  def check_twice(self, dtype, **kwargs):
    chain, state = self.trained(dtype, **kwargs)
    merge = jax.jit(chain.merge)
    once = merge(state)
    self.assertTrue(np.any(once.params['w'] != state.params['w']))
    chex.assert_trees_all_equal(
        merge(once)._replace(key=0), once._replace(key=0)
    )

  @parameterized.parameters('nearest', 'compensated')
  def test_what_becomes_of_small_updates(self, rounding):
    # Fifty merges of a twentieth of an ulp of 1.5, 2.5 ulps in all.
    ulp, num_merges = 2.0**-7, 50
    params = {'w': jnp.full((4, 6), 1.5, jnp.bfloat16)}
    chain = adapters.make_chain(
        adapters.ChainPolicy.lora(1, rounding=rounding), optax.sgd(0.1)
    )
    state = jax.jit(chain.init)(jax.random.key(0), params)
    update = {'left': jnp.ones((4, 1)), 'right': jnp.full((1, 6), ulp / 20)}

    def merge(state, _):
      return chain.merge(state._replace(factors={'w': update})), None

    scan = jax.jit(lambda state: jax.lax.scan(merge, state, length=num_merges))
    moved = np.asarray(scan(state)[0].params['w'], np.float64) - 1.5
    if rounding == 'nearest':
      np.testing.assert_array_equal(moved, 0)
    else:
      # Half an ulp, and fifty roundings of a remainder of 8 bits.
      bound = (0.5 + num_merges * 2.0**-9) * ulp
      np.testing.assert_allclose(moved, 2.5 * ulp, rtol=0, atol=bound)

  def test_merges_stand_between_barriers(self):
    # A compiler could fuse the sums of run and replay otherwise.
    chain, state = self.trained('bfloat16')
    jaxpr = str(jax.make_jaxpr(chain.merge)(state))
    # Weight, both factors and the sum of each of two matrices.
    self.assertEqual(jaxpr.count('optimization_barrier'), 2 * 4)

  @parameterized.product(
      mode=('nearest', 'stochastic', 'compensated'), batch=((3,), (2, 3))
  )
  def test_entries_of_a_stack_are_merged_as_alone(self, mode, batch):
    """Bit for bit, with the keys and remainders of each."""
    keys = jax.random.split(jax.random.key(0), 5)
    draw = lambda key, *shape: jax.random.normal(key, (*batch, *shape))
    weight = draw(keys[0], 8, 6).astype(jnp.bfloat16)
    pair = {'left': draw(keys[1], 8, 2), 'right': 0.1 * draw(keys[2], 2, 6)}
    rest = (1e-3 * draw(keys[3], 8, 6)).astype(jnp.bfloat16)
    rest = rest if mode == 'compensated' else None
    merge = jax.jit(adapters._with_product, static_argnums=4)
    given = (weight, pair, rest, jax.random.split(keys[4], batch))
    made = merge(*given, mode)
    for i in np.ndindex(batch):
      alone = merge(*jax.tree.map(lambda x, i=i: x[i], given), mode)
      chex.assert_trees_all_equal(
          jax.tree.map(lambda x, i=i: x[i], made), alone
      )

  def test_stochastic_rounding_draws_for_each_link_and_entry(self):
    # Equal layers and updates: nothing but the draws differs.
    params = {'stack': jnp.ones((2, 30, 20), jnp.bfloat16)}
    policy = adapters.ChainPolicy.lora(1, rounding='stochastic')
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    state = jax.jit(chain.init)(jax.random.key(0), params)
    factors = {
        'left': jnp.ones((2, 30, 1)),
        'right': jnp.full((2, 1, 20), 2.0**-8),  # Half an ulp of one.
    }
    state = state._replace(factors={'stack': factors})
    merge = jax.jit(lambda count: chain.params(state._replace(count=count)))
    first, second = (
        np.asarray(merge(count)['stack'], np.float64) for count in (3, 6)
    )
    flips = np.stack([*first, *second]).reshape(4, -1) > 1
    # Independent fair coins: each pair agrees in half of the 600 places, give
    # or take 5 standard errors of 0.5 / sqrt(600).
    for i in range(4):
      self.assertBetween(flips[i].mean(), 0.4, 0.6)
      for j in range(i):
        self.assertBetween((flips[i] == flips[j]).mean(), 0.4, 0.6)

  @parameterized.parameters(['bfloat16'])
  def test_output_of_the_model_is_kept(self, dtype):
    self.check_output_of_the_model_is_kept(dtype)

  @parameterized.parameters(['float32'])
  @pytest.mark.slow
  def test_output_of_the_model_is_kept_otherwise(self, dtype):
    self.check_output_of_the_model_is_kept(dtype)

  def check_output_of_the_model_is_kept(self, dtype):
    model = nn.Dense(5, param_dtype=jnp.dtype(dtype), dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (7, 6))
    params = model.init(jax.random.key(1), x)['params']
    target = jax.random.normal(jax.random.key(2), (7, 5))

    def output(params, batch):
      del batch
      return model.apply({'params': params}, x)

    loss = inject.by_product(
        lambda params, batch: (jnp.mean((output(params, 0) - target) ** 2), {})
    )
    chain = adapters.make_chain(
        adapters.ChainPolicy.bernoulli(
            2, 4, alpha=4.0, sketch=SKETCHES['coordinate']
        ),
        optax.adam(0.1),
    )
    _, states = run(chain, loss, jax.random.key(3), params, jnp.arange(4))
    merged = merge_each(chain, states)
    state = jax.tree.map(lambda leaf: leaf[-1], states)
    factors = adapters.scaled(state.factors, chain.adapted(params))
    before = inject.by_product(output)(state.params, factors, 0)
    after = output(jax.tree.map(lambda leaf: leaf[-1], merged), 0)
    # One rounding of each weight, and float32 sums of six products.
    weights = np.asarray(merged['kernel'][-1], np.float64)
    bound = np.abs(x) @ (0.5 * spacing(weights, dtype))
    bound += 20 * 2.0**-24 * (np.abs(x) @ np.abs(weights) + 1)
    np.testing.assert_array_less(np.abs(after - before), bound)
    start = output(params, 0)
    self.assertGreater(np.abs(before - start).max(), 0.1)


class RestartTest(parameterized.TestCase):
  """Schedules go on over links; moments and their own counts restart."""

  period, num_steps = 3, 8

  def final(self, tx, reset=True):
    """Returns the optimiser's state after 2 steps of the third link."""
    problem = Regression(self.num_steps, ('a',), np.float32)
    policy = adapters.ChainPolicy.bernoulli(
        2, self.period, reset_optimizer=reset, sketch=SKETCHES['coordinate']
    )
    chain = adapters.make_chain(policy, tx)
    key, params = jax.random.key(0), problem.params
    _, states = run(chain, problem.adapted(), key, params, problem.batches)
    return steps_of(states.opt_state, -1), states

  @parameterized.parameters((True, 2), (False, 8))
  def test_adamw_with_a_schedule(self, reset, expected):
    tx = optax.adamw(optax.linear_schedule(0.1, 0.0, 100))
    (adam, _, schedule), states = self.final(tx, reset)
    self.assertEqual(adam.count, expected)
    self.assertEqual(schedule.count, self.num_steps)
    # Nu is at a link's first step (1 - b2) g^2 with g of this step alone.
    mu, nu = states.opt_state[0].mu, states.opt_state[0].nu
    for side in ('left', 'right'):
      first, second = (np.asarray(x['a'][side][6]) for x in (mu, nu))
      is_fresh = np.allclose(
          (first / 0.1) ** 2, second / 0.001, rtol=1e-4, atol=1e-7
      )
      self.assertEqual(is_fresh, reset)

  def test_injected_hyperparams(self):
    tx = optax.inject_hyperparams(optax.adamw)(
        learning_rate=lambda count: 0.1 / (1 + count), weight_decay=0.1
    )
    state, _ = self.final(tx)
    self.assertEqual(state.count, self.num_steps)
    # Of the last step, numbered 7.
    np.testing.assert_allclose(
        state.hyperparams['learning_rate'], 0.1 / self.num_steps, rtol=1e-6
    )
    self.assertEqual(state.inner_state[0].count, 2)

  def test_reduce_on_plateau(self):
    plateau = optax.contrib.reduce_on_plateau(patience=2, factor=0.5)
    # It asks for a value: here always the same one, a plateau.
    given = optax.GradientTransformation(
        plateau.init,
        lambda updates, state, params: plateau.update(
            updates, state, params, value=1.0
        ),
    )
    (adam, state), _ = self.final(optax.chain(optax.adam(0.1), given))
    self.assertEqual(adam[0].count, 2)
    # The first value is the best; each second one without progress halves.
    self.assertEqual(state.scale, 0.5 ** ((self.num_steps - 1) // 2))

  def test_reduce_on_plateau_is_given_the_value(self):
    tx = optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau())
    (_, state), _ = self.final(tx)
    self.assertLess(state.best_value, np.inf)
    self.assertGreater(state.best_value, 0)


class CoinTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    chex.clear_trace_counter()

  def coins(self, num_links, policy):
    """Returns (num_links, 4) coins: two matrices, a stack of two."""
    params = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in SHAPES.items()
    }
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    found = chain.adapted(params)

    def draw(link):
      coins = adapters.draw_link(jax.random.key(5), link, found, policy).coins
      return jnp.concatenate([coins[one.matrix.path].ravel() for one in found])

    drawn = jax.jit(jax.vmap(draw))(jnp.arange(num_links))
    return np.asarray(drawn, np.float64)

  def test_coins_follow_prob_and_are_independent(self):
    # Rank 6 is the whole space: nothing but coins is drawn.
    coins = self.coins(20_000, adapters.ChainPolicy.bernoulli(6, 1, prob=0.3))
    chex.assert_shape(coins, (20_000, 4))
    assert_mean(coins, np.full(4, 0.3))
    centred = coins - 0.3
    products = centred[:, :, None] * centred[:, None, :]
    assert_mean(products, 0.21 * np.eye(4))  # Over matrices and layers.
    assert_mean(centred[1:] * centred[:-1], np.zeros(4))  # Over links.

  def test_shared_coin_is_one_coin(self):
    policy = adapters.ChainPolicy.bernoulli(6, 1, prob=0.3, shared_coin=True)
    coins = self.coins(20_000, policy)
    np.testing.assert_array_equal(coins, coins[:, :1] * np.ones(4))
    assert_mean(coins[:, 0], 0.3)

  def test_a_flip_does_not_recompile(self):
    problem = Regression(12, ('a',), np.float32)
    loss = problem.adapted()
    chain = adapters.make_chain(
        adapters.ChainPolicy.bernoulli(2, 2), optax.adamw(0.1)
    )
    step = jax.jit(
        chex.assert_max_traces(
            lambda state, batch: chain.step(state, loss, batch)[0], n=1
        )
    )
    state = jax.jit(chain.init)(jax.random.key(0), problem.params)
    coins = set()
    for i in range(12):
      state = step(state, steps_of(problem.batches, i))
      coins.add(bool(state.coins['a']))
    self.assertLen(coins, 2)
    self.assertEqual(step._cache_size(), 1)

  def test_a_traced_prob_gives_the_runs_of_each_prob(self):
    problem = Regression(9, ('a',))
    loss = problem.adapted()

    def final(prob, params, batches):
      policy = adapters.ChainPolicy.bernoulli(
          2, 2, prob=prob, alpha=3.0, sketch=SKETCHES['coordinate']
      )
      chain = adapters.make_chain(policy, optax.sgd(0.1))
      state = chain.init(jax.random.key(0), params)
      step = lambda state, batch: (chain.step(state, loss, batch)[0], None)
      return chain.params(jax.lax.scan(step, state, batches)[0])

    with jax.enable_x64(True):
      params, batches = problem.inputs()
      probs = (0.0, 0.4, 1.0)
      together = jax.jit(jax.vmap(final, (0, None, None)))(
          jnp.asarray(probs), params, batches
      )
      alone = [
          jax.jit(functools.partial(final, prob))(params, batches)
          for prob in probs
      ]
    for i in range(len(probs)):
      # Nine steps of float64; batches of another size round differently.
      chex.assert_trees_all_close(
          steps_of(together, i), alone[i], rtol=1e-12, atol=1e-12
      )
    for i in range(2):
      apart = np.abs(alone[i]['a'] - alone[i + 1]['a']).max()
      self.assertGreater(apart, 1e-3)

  @parameterized.parameters(['bernoulli'])
  def test_without_resampling_coin_and_frozen_factor_stay(self, side):
    self.check_without_resampling_coin_and_frozen_factor_stay(side)

  @parameterized.parameters('left', None)
  @pytest.mark.slow
  def test_without_resampling_coin_and_frozen_factor_stay_otherwise(self, side):
    self.check_without_resampling_coin_and_frozen_factor_stay(side)

  def check_without_resampling_coin_and_frozen_factor_stay(self, side):
    problem = Regression(8, ('stack',), np.float32)
    policy = bl.ChainPolicy(rank=2, period=2, side=side, resample=False)
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    key, params = jax.random.key(1), problem.params
    first, states = run(chain, problem.adapted(), key, params, problem.batches)
    is_left = np.asarray(first.coins.get('stack', [True, True]))
    for step in range(8):
      chex.assert_trees_all_equal(steps_of(states.coins, step), first.coins)
      for name, is_kept in (('left', is_left), ('right', ~is_left)):
        before, after = (
            np.asarray(factors['stack'][name])
            for factors in (first.factors, steps_of(states.factors, step))
        )
        if side is not None:
          np.testing.assert_array_equal(after[is_kept], before[is_kept])
    # Links do end, and COLA starts each of them from the first L.
    self.assertTrue(
        np.any(states.params['stack'][2] != states.params['stack'][1])
    )
    if side is None:
      # R = 0 gives L no gradient: after a link's first step it is the draw.
      left = np.asarray(states.factors['stack']['left'])
      np.testing.assert_array_equal(left[2], first.factors['stack']['left'])
      self.assertTrue(np.any(left[1] != left[2]))
    if side == 'bernoulli':  # Links would have drawn other coins.
      _, coins = draws(chain, key, params, 4)
      self.assertGreater(len(np.unique(coins['stack'], axis=0)), 1)


class TargetTest(parameterized.TestCase):

  def params(self):
    return {
        'attn': {'kernel': jnp.ones((6, 9)), 'bias': jnp.ones(9)},
        'head': {'kernel': jnp.ones((9, 6))},
        'mlp': {'kernel': jnp.ones((6, 9))},
        'stack': {'kernel': jnp.ones((3, 6, 9))},
    }

  def test_rank_alpha_and_prob_of_a_target(self):
    policy = adapters.ChainPolicy.bernoulli(
        2,
        4,
        prob=0.25,
        alpha=4.0,
        targets=(
            bl.Target('attn', rank=3, alpha=6.0, prob=1.0),
            bl.Target('stack|attn', alpha=6.0),
            bl.Target('head', prob=0.0),
        ),
    )
    params = self.params()
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    attn, head, stack = chain.adapted(params)
    self.assertEqual(
        [one.matrix.path for one in (attn, head, stack)],
        ['attn/kernel', 'head/kernel', 'stack/kernel'],
    )
    self.assertEqual([attn.rank, head.rank, stack.rank], [3, 2, 2])
    self.assertEqual([attn.prob, head.prob, stack.prob], [1.0, 0.0, 0.25])
    self.assertEqual([attn.scale, head.scale, stack.scale], [2.0, 2.0, 3.0])
    state = jax.jit(chain.init)(jax.random.key(0), params)
    self.assertEqual(list(state.coins), ['stack/kernel'])
    shapes = jax.tree.map(jnp.shape, state.factors)
    self.assertEqual(
        shapes,
        {
            'attn/kernel': {'left': (6, 3), 'right': (3, 9)},
            'head/kernel': {'left': (9, 2), 'right': (2, 6)},
            'stack/kernel': {'left': (3, 6, 2), 'right': (3, 2, 9)},
        },
    )
    # Frozen are the left factor of attn and the right one of head.
    np.testing.assert_array_equal(state.factors['attn/kernel']['right'], 0)
    np.testing.assert_array_equal(state.factors['head/kernel']['left'], 0)
    q = np.asarray(state.factors['attn/kernel']['left'])
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-5)
    # A merge adds s L R with the scale of each.
    ones = jax.tree.map(jnp.ones_like, state.factors)
    merged = jax.jit(chain.params)(state._replace(factors=ones))
    for name, total in (
        ('attn', 2.0 * 3),
        ('head', 2.0 * 2),
        ('stack', 3.0 * 2),
    ):
      np.testing.assert_array_equal(merged[name]['kernel'], 1 + total)
    np.testing.assert_array_equal(merged['mlp']['kernel'], 1)
    np.testing.assert_array_equal(merged['attn']['bias'], 1)

  def test_draws_depend_on_no_other_target(self):
    key, params = jax.random.key(0), self.params()
    factors = []
    for targets in (('attn',), ('attn', 'head', 'mlp')):
      policy = adapters.ChainPolicy.bernoulli(
          2,
          4,
          sketch=SKETCHES['coordinate'],
          targets=tuple(map(bl.Target, targets)),
      )
      chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
      factors.append(jax.jit(chain.init)(key, params).factors['attn/kernel'])
    chex.assert_trees_all_equal(*factors)

  def test_pattern_with_a_flag(self):
    targets = (bl.Target('(?i)ATTN'), bl.Target('(?i)HEAD'))
    policy = adapters.ChainPolicy.bernoulli(2, 4, targets=targets)
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    found = chain.adapted(self.params())
    self.assertEqual(
        [one.matrix.path for one in found], ['attn/kernel', 'head/kernel']
    )


class OptimizerTest(parameterized.TestCase):
  """What the optimiser sees are trained factors and nothing else."""

  @parameterized.parameters(['bernoulli'])
  def test_clipping_and_decay_see_trained_factors_only(self, side):
    self.check_clipping_and_decay_see_trained_factors_only(side)

  @parameterized.parameters('left', 'right')
  @pytest.mark.slow
  def test_clipping_and_decay_see_trained_factors_only_otherwise(self, side):
    self.check_clipping_and_decay_see_trained_factors_only(side)

  def check_clipping_and_decay_see_trained_factors_only(self, side):
    num_steps, lr, clip, decay = 3, 0.5, 0.1, 0.2
    problem = Regression(num_steps)
    policy = bl.ChainPolicy(rank=2, period=num_steps, side=side)
    tx = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.add_decayed_weights(decay),
        optax.scale(-lr),
    )
    with jax.enable_x64(True):
      chain = adapters.make_chain(policy, tx, STACK)
      params, batches = problem.inputs()
      first, states = run(
          chain, problem.adapted(), jax.random.key(1), params, batches
      )
    factors = jax.tree.map(np.array, first.factors)
    lefts = {  # Where R trains, as a factor of one or zero.
        path: np.asarray(
            first.coins[path] if side == 'bernoulli' else side == 'left',
            np.float64,
        )[..., None, None]
        for path in SHAPES
    }
    if side == 'bernoulli':  # Both coins are met.
      flat = np.concatenate([coin.ravel() for coin in lefts.values()])
      self.assertLen(np.unique(flat), 2)
    for step in range(num_steps):
      grads = {}
      for path, is_left in lefts.items():
        left, right = factors[path]['left'], factors[path]['right']
        g = problem.grad(problem.params[path] + left @ right, path, step)
        grads[path] = {
            'left': (1 - is_left) * (g @ np.swapaxes(right, -1, -2)),
            'right': is_left * (np.swapaxes(left, -1, -2) @ g),
        }
      norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
      self.assertGreater(norm, clip)
      for path, is_left in lefts.items():
        for name, moves in (('left', 1 - is_left), ('right', is_left)):
          move = grads[path][name] * clip / norm + decay * factors[path][name]
          factors[path][name] = factors[path][name] - lr * moves * move
    # Three steps in float64.
    chex.assert_trees_all_close(
        steps_of(states.factors, -1), factors, rtol=1e-12, atol=1e-12
    )

  def test_micro_batches_are_the_whole_batch(self):
    with jax.enable_x64(True):
      rng = np.random.default_rng(0)
      params = {'w': jnp.asarray(rng.normal(size=(4, 6)))}
      batch = jnp.asarray(rng.normal(size=(10, 4)))
      target = jnp.asarray(rng.normal(size=(10, 6)))

      def loss(params, batch, bias):
        x, y = batch
        rest = x @ params['w'] + bias - y
        return jnp.mean(rest**2), {'rest': jnp.mean(rest)}

      @functools.partial(jax.jit, static_argnums=0)
      def final(num):
        chain = adapters.make_chain(
            adapters.ChainPolicy.rac(
                2, 2, 'left', sketch=SKETCHES['coordinate']
            ),
            optax.sgd(0.5),
            num_micro_batches=num,
        )
        state = chain.init(jax.random.key(0), params)
        for _ in range(3):
          state, value = chain.step(
              state, inject.by_addition(loss), (batch, target), 0.5
          )
        return chain.params(state), value

      whole = final(1)
      # Sums of ten terms in float64, three times.
      chex.assert_trees_all_close(final(5), whole, rtol=1e-12, atol=1e-13)
      self.assertGreater(np.abs(whole[0]['w'] - params['w']).max(), 0.01)

  def test_micro_batches_are_summed_in_float32(self):
    # In bfloat16 sums of ones stop at 256: the means would be 0.25.
    num = 1024
    params = {'w': jnp.ones((2, 3), jnp.bfloat16)}

    def loss(params, factors, batch):
      del params
      linear = jnp.sum(factors['w']['right'].astype(jnp.bfloat16))
      value = linear * 0 + batch.mean().astype(jnp.bfloat16)
      return value + linear - jax.lax.stop_gradient(linear), {'aux': value}

    chain = adapters.make_chain(
        adapters.ChainPolicy.rac(1, 2, 'left'),
        optax.sgd(1.0),
        num_micro_batches=num,
    )

    @jax.jit
    def step(params):
      state = chain.init(jax.random.key(0), params)
      return chain.step(state, loss, jnp.ones(num))

    state, (value, aux) = step(params)
    self.assertEqual(value.dtype, jnp.bfloat16)
    self.assertEqual((value, aux['aux']), (1.0, 1.0))
    np.testing.assert_array_equal(state.factors['w']['right'], -1.0)

  def test_average_sees_values_and_gradients(self):
    # Two devices that hold halves of a batch take the steps of one.
    problem = Regression(1)
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), 'float32')
    params = {'w': jnp.asarray(problem.params['a'], 'float32')}
    loss = inject.by_addition(
        lambda params, x: (jnp.mean(jnp.sum((x @ params['w']) ** 2, -1)), {})
    )
    policy = adapters.ChainPolicy.bernoulli(2, 2)

    def step(average, batch):
      chain = adapters.make_chain(policy, optax.sgd(0.1), average=average)
      state = chain.init(jax.random.key(0), params)
      state, (value, _) = chain.step(state, loss, batch)
      return state.factors, value

    mean = lambda out: jax.lax.pmean(out, 'device')
    halves = jax.jit(
        jax.vmap(functools.partial(step, mean), axis_name='device')
    )(batch.reshape(2, 4, 4))
    whole = jax.jit(functools.partial(step, None))(batch)
    for i in range(2):
      # Float32 means of eight terms of size ten.
      chex.assert_trees_all_close(
          steps_of(halves, i), whole, rtol=1e-5, atol=1e-5
      )


class DtypeTest(parameterized.TestCase):

  @parameterized.product(
      side=('bernoulli', 'right', None),
      rounding=('nearest', 'compensated'),
  )
  def test_factors_and_moments_are_float32(self, side, rounding):
    problem = Regression(1, dtype=np.float32)
    params = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.bfloat16), problem.params
    )
    params['codes'] = jnp.arange(3)  # No matrix, and of another dtype.
    policy = bl.ChainPolicy(rank=2, period=1, side=side, rounding=rounding)
    chain = adapters.make_chain(policy, optax.adamw(0.1), STACK)

    def loss(params, batch):
      half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch)
      weights = {path: params[path] for path in SHAPES}
      return problem.loss(weights, half)

    loss = inject.by_addition(loss, STACK)

    def advance(params, batch):
      states = [chain.init(jax.random.key(0), params)]
      for _ in range(2):
        states.append(chain.step(states[-1], loss, batch)[0])
      return states, chain.params(states[-1])

    states, merged = jax.eval_shape(
        advance, params, steps_of(problem.batches, 0)
    )
    for state in states:
      chex.assert_trees_all_equal_shapes_and_dtypes(state, states[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    state = states[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, params)
    for leaf in jax.tree.leaves((state.factors, state.opt_state[0].mu)):
      self.assertEqual(leaf.dtype, jnp.float32)
    for leaf in jax.tree.leaves(state.opt_state[0].nu):
      self.assertEqual(leaf.dtype, jnp.float32)
    expected = dict(params) if rounding == 'compensated' else {}
    expected.pop('codes', None)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.remainders, expected)


class TableTest(parameterized.TestCase):

  params = {
      'a': jax.ShapeDtypeStruct((6, 9), jnp.float32),
      'narrow': jax.ShapeDtypeStruct((3, 9), jnp.float32),
      'stack': jax.ShapeDtypeStruct((2, 9, 4), jnp.float32),
  }

  @parameterized.named_parameters(
      (
          'bernoulli',
          adapters.ChainPolicy.bernoulli(5, 1, prob=0.25, alpha=10.0),
          [
              (5, 0.25, 5 * 15, 0.25 * 5 * 9 + 0.75 * 6 * 5),
              (
                  'left 3, right 5 (clipped)',
                  0.25,
                  5 * 12,
                  0.25 * 3 * 9 + 0.75 * 3 * 5,
              ),
              (
                  'left 5, right 4 (clipped)',
                  0.25,
                  2 * 5 * 13,
                  2 * (0.25 * 5 * 4 + 0.75 * 9 * 4),
              ),
          ],
      ),
      (
          'left',
          adapters.ChainPolicy.rac(5, 1, 'left', alpha=10.0),
          [
              (5, 1.0, 5 * 15, 5 * 9),
              ('3 (clipped)', 1.0, 3 * 12, 3 * 9),
              (5, 1.0, 2 * 5 * 13, 2 * 5 * 4),
          ],
      ),
      (
          'right',
          adapters.ChainPolicy.rac(5, 1, 'right', alpha=10.0),
          [
              (5, 0.0, 5 * 15, 6 * 5),
              (5, 0.0, 5 * 12, 3 * 5),
              ('4 (clipped)', 0.0, 2 * 4 * 13, 2 * 9 * 4),
          ],
      ),
      (
          'both',
          adapters.ChainPolicy.lora(5, alpha=10.0),
          [
              (5, '-', 5 * 15, 5 * 15),
              ('3 (clipped)', '-', 3 * 12, 3 * 12),
              ('4 (clipped)', '-', 2 * 4 * 13, 2 * 4 * 13),
          ],
      ),
  )
  def test_describe(self, policy, expected):
    rows = adapters.adapter_table(self.params, policy, STACK)
    shapes = {'a': '6 x 9', 'narrow': '3 x 9', 'stack': '2 x 9 x 4'}
    names = ('rank', 'P(left)', 'stored', 'trained')
    self.assertEqual(
        rows,
        [
            {
                'matrix': path,
                'shape': shapes[path],
                'scale': 2.0,  # Of the rank that was asked for.
                **dict(zip(names, row, strict=True)),
            }
            for path, row in zip(shapes, expected, strict=True)
        ],
    )
    # The table counts what a state holds.
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    state = jax.eval_shape(chain.init, jax.random.key(0), self.params)
    for row in rows:
      pair = state.factors[row['matrix']]
      self.assertEqual(row['stored'], sum(x.size for x in pair.values()))
    if policy.side != 'bernoulli':
      for row, one in zip(rows, chain.adapted(self.params), strict=True):
        entries = one.matrix.entries.size
        pair = state.factors[row['matrix']]
        trained = sum(pair[side].size for side in one.trained)
        self.assertEqual(row['trained'], trained)
        self.assertEqual(adapters.trained_numbers(one) * entries, trained)

  def test_scaling_and_no_alpha(self):
    scale = lambda **kwargs: adapters.adapter_table(
        self.params, adapters.ChainPolicy.lora(4, **kwargs), STACK
    )[0]['scale']
    self.assertEqual(scale(), 1.0)
    self.assertEqual(scale(alpha=6.0), 1.5)
    self.assertEqual(scale(alpha=6.0, scaling='sqrt'), 3.0)


class FactorsTest(parameterized.TestCase):
  """Changes of weights as factors: unmerge, extract, merge_report."""

  def pairs(self, rank, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        path: {'left': draw(*batch, m, rank), 'right': draw(*batch, rank, n)}
        for path, (*batch, m, n) in SHAPES.items()
    }

  def base(self, dtype):
    rng = np.random.default_rng(9)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {'bias': draw((5,)), **{k: draw(s) for k, s in SHAPES.items()}}

  def merged(self, base, factors):
    """Returns W + L R, each rounded once, in NumPy."""
    wide = lambda x: np.asarray(x, np.float64)
    product = lambda pair: wide(pair['left']) @ wide(pair['right'])
    tuned = {path: wide(base[path]) + product(factors[path]) for path in SHAPES}
    cast = lambda path: jnp.asarray(tuned[path]).astype(base[path].dtype)
    return {'bias': base['bias'], **{path: cast(path) for path in SHAPES}}

  @parameterized.parameters('float32', 'bfloat16')
  def test_unmerge_is_the_inverse_of_a_merge(self, dtype):
    base, factors = self.base(dtype), self.pairs(2)
    tuned = self.merged(base, factors)
    back = adapters.unmerge(tuned, factors, STACK)
    chex.assert_trees_all_equal(back['bias'], base['bias'])
    for path in SHAPES:
      wide = lambda tree, path=path: np.asarray(tree[path], np.float64)
      largest = np.maximum(np.abs(wide(base)), np.abs(wide(tuned)))
      # Half an ulp of W + L R, half of the difference, and float32 sums.
      size = largest + np.abs(wide(tuned) - wide(base))
      bound = spacing(largest, dtype) + 4 * 2.0**-24 * size
      self.assertEqual(back[path].dtype, dtype)
      np.testing.assert_array_less(np.abs(wide(back) - wide(base)), bound)
      self.assertGreater(np.abs(wide(tuned) - wide(base)).max(), 0.5)

  def test_unmerge_inverts_the_merge_of_a_chain(self):
    policy = adapters.ChainPolicy.bernoulli(2, 3, alpha=3.0)
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    base = self.base('float32')
    state = jax.jit(chain.init)(jax.random.key(0), base)
    state = state._replace(factors=self.pairs(2))
    factors = adapters.scaled(state.factors, chain.adapted(base))
    merged = jax.jit(chain.params)(state)
    back = adapters.unmerge(merged, factors, STACK)
    # Three float32 roundings of numbers up to 20.
    chex.assert_trees_all_close(back, base, rtol=0, atol=1e-5)

  def test_extract_is_exact_from_the_total_rank_on(self):
    # Three links of rank 1 through the chain itself, in float64.
    num_links = 3
    problem = Regression(num_links, ('a', 'stack'))
    policy = adapters.ChainPolicy.bernoulli(1, 1)
    with jax.enable_x64(True):
      params, batches = problem.inputs()
      chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
      key, loss = jax.random.key(0), problem.adapted()
      _, states = run(chain, loss, key, params, batches)
      tuned = steps_of(merge_each(chain, states), -1)
      for rank in (num_links, 9):
        found = adapters.extract(params, tuned, rank, STACK)
        self.assertEqual(list(found), ['a', 'stack'])
        for path, one in found.items():
          # Float64 rounding of weights of size one, of changes of 0.1.
          self.assertLess(one.error, 1e-13)
          self.assertEqual(one.left.shape[-1], min(rank, 4))
          change = tuned[path] - problem.params[path]
          np.testing.assert_allclose(one.left @ one.right, change, atol=1e-13)
          self.assertGreater(np.abs(change).max(), 0.01)

  @parameterized.parameters([2])
  def test_error_of_extract_is_the_tail_of_the_spectrum(self, rank):
    self.check_error_of_extract_is_the_tail_of_the_spectrum(rank)

  @parameterized.parameters(1, 3)
  @pytest.mark.slow
  def test_error_of_extract_is_the_tail_of_the_spectrum_otherwise(self, rank):
    self.check_error_of_extract_is_the_tail_of_the_spectrum(rank)

  def check_error_of_extract_is_the_tail_of_the_spectrum(self, rank):
    base = self.base('float32')
    rng = np.random.default_rng(1)
    tuned = {
        path: leaf + rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in base.items()
    }
    found = adapters.extract(base, tuned, rank, STACK)
    self.assertEqual(list(found), list(SHAPES))
    for path, one in found.items():
      change = np.asarray(tuned[path], np.float64) - base[path]
      s = np.linalg.svd(change, compute_uv=False)
      errors = np.sqrt(np.sum(s[..., rank:] ** 2, -1) / np.sum(s**2, -1))
      # Float32 SVD of 24 entries.
      np.testing.assert_allclose(one.error, np.max(errors), rtol=1e-5)
      lost = np.linalg.norm(change - one.left @ one.right, axis=(-2, -1))
      norm = np.linalg.norm(change, axis=(-2, -1))
      np.testing.assert_allclose(lost / norm, errors, rtol=1e-4)
      *batch, m, n = SHAPES[path]
      chex.assert_shape(one.left, (*batch, m, rank))
      chex.assert_shape(one.right, (*batch, rank, n))

  def test_extract_of_no_change(self):
    base = self.base('bfloat16')
    for one in adapters.extract(base, base, 2, STACK).values():
      self.assertEqual(one.error, 0.0)
      np.testing.assert_array_equal(one.left @ one.right, 0)

  def test_extract_from_other_shapes(self):
    base = self.base('float32')
    other = {**base, 'b': jnp.ones((6, 5))}
    message = r'Expected b of shape \(6, 4\), got \(6, 5\)'
    with self.assertRaisesRegex(ValueError, message):
      adapters.extract(base, other, 2, STACK)
    fewer = {path: leaf for path, leaf in base.items() if path != 'bias'}
    with self.assertRaisesRegex(ValueError, r'bias of shape \(5,\), got none'):
      adapters.extract(base, fewer, 2, STACK)
    with self.assertRaisesRegex(ValueError, r'bias of shape None, got \(5,\)'):
      adapters.extract(fewer, base, 2, STACK)

  def check_report(self, dtype, base, factors):
    rows = adapters.merge_report(base, factors, STACK)
    expected = []
    for path, (*batch, _, _) in SHAPES.items():
      if path not in factors:
        continue
      for layer, entry in enumerate(np.ndindex(*batch)):
        wide = lambda x, entry=entry: np.asarray(x, np.float64)[entry]
        pair = factors[path]
        update = wide(pair['left']) @ wide(pair['right'])
        exact = wide(base[path]) + update
        rounded = np.asarray(
            jnp.asarray(exact, jnp.float32).astype(dtype), np.float64
        )
        error = np.abs(rounded - exact)
        expected.append(
            {
                'matrix': path,
                'layer': layer,
                'largest error': error.max(),
                'relative error': (error / np.abs(exact)).max(),
                'update lost': np.linalg.norm(error) / np.linalg.norm(update),
            }
        )
    self.assertEqual(
        [(row['matrix'], row['layer']) for row in rows],
        [(row['matrix'], row['layer']) for row in expected],
    )
    for row, wanted in zip(rows, expected, strict=True):
      for name in ('largest error', 'relative error', 'update lost'):
        # Errors of 2^-9 of a sum that float32 knows to 2^-23.
        np.testing.assert_allclose(row[name], wanted[name], rtol=1e-3)

  def test_report_equals_numpy(self):
    base, factors = self.base('bfloat16'), self.pairs(2)
    del factors['b']
    self.check_report('bfloat16', base, factors)

  def test_report_of_float32_weights(self):
    base = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    # Below half an ulp of one: all of the update is lost.
    factors = jax.tree.map(lambda x: jnp.full(x.shape, 1e-5), self.pairs(2))
    self.check_report('float32', base, factors)

  def test_report_of_an_update_that_is_lost(self):
    base = {'a': jnp.ones(SHAPES['a'], jnp.bfloat16)}
    small = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), self.pairs(2)['a'])
    (row,) = adapters.merge_report(base, {'a': small})
    # 2e-6 is far below half an ulp of 1 (2^-8): all of it is lost.
    np.testing.assert_allclose(row['update lost'], 1, rtol=0.05)
    np.testing.assert_allclose(row['largest error'], 2e-6, rtol=0.05)
    zero = jax.tree.map(jnp.zeros_like, small)
    (row,) = adapters.merge_report(base, {'a': zero})
    self.assertEqual(row['update lost'], 0)

  @parameterized.parameters(np.nan, np.inf)
  def test_factors_that_are_not_finite(self, value):
    factors = self.pairs(2)
    factors['stack']['right'] = factors['stack']['right'].at[1, 0, 2].set(value)
    message = 'NaN or infinity in the right factor of stack: nothing was merged'
    with self.assertRaisesRegex(ValueError, message):
      adapters.check_factors(factors)
    with self.assertRaisesRegex(ValueError, message):
      adapters.merge_report(self.base('bfloat16'), factors, STACK)
    adapters.check_factors(self.pairs(2))


class RejectsTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(rank=0), 'rank >= 1, got rank=0'),
      (dict(period=0), 'period >= 1, got period=0'),
      (dict(alpha=0.0), 'alpha > 0, got alpha=0.0'),
      (dict(alpha=-1), 'alpha > 0, got alpha=-1'),
      (dict(alpha=float('nan')), 'alpha > 0, got alpha=nan'),
      (dict(alpha=float('inf')), 'alpha finite, got alpha=inf'),
      (dict(prob=1.5), r'prob in \[0, 1\], got prob=1.5'),
      (dict(prob=-0.1), r'prob in \[0, 1\], got prob=-0.1'),
      (dict(prob=float('nan')), r'prob in \[0, 1\], got prob=nan'),
      (dict(side='up'), r"side in \('left', .*, None\), got side='up'"),
      (dict(frame='thin'), r"\('orthonormal', 'raw'\), got frame='thin'"),
      (dict(init='ones'), r"init in \('uniform', 'normal'\), got init='ones'"),
      (dict(zero='both'), r"zero in \('left', 'right'\), got zero='both'"),
      (dict(rounding='up'), r"rounding in \('nearest', .*got rounding='up'"),
      (dict(scaling=''), r"scaling in \('rank', 'sqrt'\), got scaling=''"),
      (dict(warmup=3), r'warmup in \[0, period=3\), got warmup=3'),
      (dict(warmup=-1), r'warmup in \[0, period=3\), got warmup=-1'),
  )
  def test_value_in_a_policy(self, kwargs, message):
    with self.assertRaisesRegex(ValueError, f'Expected .*{message}'):
      bl.ChainPolicy(**{'rank': 1, 'period': 3, **kwargs})

  @parameterized.parameters(
      (dict(rank=1.5), 'rank to be an int, got 1.5'),
      (dict(rank=True), 'rank to be an int, got True'),
      (dict(period=2.0), 'period to be an int, got 2.0'),
  )
  def test_type_in_a_policy(self, kwargs, message):
    with self.assertRaisesRegex(TypeError, f'Expected {message}'):
      bl.ChainPolicy(**{'rank': 1, 'period': 3, **kwargs})

  @parameterized.parameters(
      (dict(rank=0), ValueError, "rank >= 1, got Target('a').rank=0"),
      (dict(rank=2.0), TypeError, "Target('a').rank to be an int, got 2.0"),
      (dict(alpha=-1.0), ValueError, "alpha > 0, got Target('a').alpha=-1.0"),
      (dict(prob=2), ValueError, "prob in [0, 1], got Target('a').prob=2"),
  )
  def test_target(self, kwargs, error, message):
    with self.assertRaisesRegex(error, re.escape(message)):
      bl.Target('a', **kwargs)

  def test_pattern_that_is_no_regular_expression(self):
    message = r"pattern to be a regular expression, got 'a\(': missing \)"
    with self.assertRaisesRegex(ValueError, message):
      bl.Target('a(')

  def check_init(self, message, params, policy, matrices=None):
    chain = adapters.make_chain(policy, optax.sgd(0.1), matrices)
    with self.assertRaisesRegex(ValueError, message):
      chain.init(jax.random.key(0), params)
    with self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(chain.init, jax.random.key(0), params)

  def test_rank_above_both_sides(self):
    params = {'a': jnp.ones((3, 9)), 'b': jnp.ones((3, 4))}
    message = r'rank <= 4, the longer side of b \(3 x 4\), got rank=5'
    for policy in (
        adapters.ChainPolicy.bernoulli(5, 1),
        adapters.ChainPolicy.lora(5),
    ):
      self.check_init(message, params, policy)
    target = bl.Target('b', rank=5)
    policy = adapters.ChainPolicy.bernoulli(
        1, 1, targets=(bl.Target('a'), target)
    )
    self.check_init(message, params, policy)
    with self.assertRaisesRegex(ValueError, message):
      adapters.adapter_table(params, policy)

  def test_targets_that_match_nothing(self):
    params = {'a': jnp.ones((3, 9)), 'b': jnp.ones((3, 4))}
    targets = bl.Target('a'), bl.Target('nowhere')
    policy = adapters.ChainPolicy.bernoulli(1, 1, targets=targets)
    self.check_init(
        r"target 'nowhere' to match a matrix; the \w+ are \['a', 'b'\]",
        params,
        policy,
    )
    policy = adapters.ChainPolicy.bernoulli(1, 1, targets=targets[1:])
    self.check_init(r'nowhere(.|\n)* are\W+a\b(.|\n)*\bb\b', params, policy)

  def test_a_target_that_matches_nothing_beside_a_stack(self):
    params = {'a': {'kernel': jnp.ones((3, 9))}}
    params['stack'] = {'kernel': jnp.ones((2, 3, 9))}
    targets = bl.Target('a'), bl.Target('nowhere')
    policy = adapters.ChainPolicy.bernoulli(1, 1, targets=targets)
    self.check_init("target 'nowhere' to match a matrix", params, policy, STACK)

  @parameterized.parameters(
      (dict(rank=1), dict(rank=2), r'rank in \[1, 2\]'),
      (dict(alpha=2.0), dict(alpha=1.0), r'alpha in \[1.0, 2.0\]'),
      (dict(prob=0.0), dict(prob=1.0), r'prob in \[0.0, 1.0\]'),
  )
  def test_targets_that_disagree(self, first, second, message):
    params = {'attn': jnp.ones((3, 9)), 'mlp': jnp.ones((9, 3))}
    targets = bl.Target('attn', **first), bl.Target('a.t|mlp', **second)
    policy = adapters.ChainPolicy.bernoulli(1, 1, targets=targets)
    message = (
        r"targets that agree about attn, got \['attn', 'a.t\|mlp'\] with "
        + message
    )
    self.check_init(message, params, policy)

  def test_targets_beside_a_selection(self):
    policy = adapters.ChainPolicy.bernoulli(1, 1, targets=(bl.Target('a'),))
    message = "select to be None where the policy has targets, got select='b'"
    params = {'a': jnp.ones((3, 9)), 'b': jnp.ones((3, 9))}
    self.check_init(message, params, policy, bl.Matrices(select='b'))

  @parameterized.parameters((), ('b',))
  def test_tied_arrays(self, *targets):
    w = jnp.ones((3, 4))
    params = {'a': w, 'b': w, 'c': jnp.ones((3, 4))}
    policy = adapters.ChainPolicy.bernoulli(
        1, 1, targets=tuple(map(bl.Target, targets))
    )
    chain = adapters.make_chain(policy, optax.sgd(0.1))
    message = {
        0: 'Expected a to be an array of its own, but it is tied to b',
        1: 'Expected b to be an array of its own, but it is tied to a',
    }[len(targets)]
    with self.assertRaisesRegex(ValueError, message):
      chain.init(jax.random.key(0), params)
    policy = adapters.ChainPolicy.bernoulli(1, 1, targets=(bl.Target('c'),))
    chain = adapters.make_chain(policy, optax.sgd(0.1))
    jax.eval_shape(lambda: chain.init(jax.random.key(0), params))

  def test_number_of_micro_batches(self):
    policy, tx = adapters.ChainPolicy.bernoulli(1, 1), optax.sgd(0.1)
    problem = Regression(1, ('a',), np.float32)

    def step(num):
      chain = adapters.make_chain(policy, tx, num_micro_batches=num)
      state = chain.init(jax.random.key(0), problem.params)
      batch = steps_of(problem.batches, 0)
      return chain.step(state, problem.adapted(), batch)

    message = 'num_micro_batches >= 1, got num_micro_batches=0'
    with self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(functools.partial(step, 0))


class StateTest(parameterized.TestCase):
  """The state is one tree of arrays that programs pass on."""

  num_steps, period = 7, 2

  def setUp(self):
    super().setUp()
    self.problem = Regression(self.num_steps, ('stack',), np.float32)
    self.loss = self.problem.adapted()

  def chain(self, **kwargs):
    kwargs = {'rank': 2, 'sketch': SKETCHES['coordinate'], **kwargs}
    if kwargs.get('side', 'left') is None:
      del kwargs['sketch']
    policy = bl.ChainPolicy(period=self.period, **kwargs)
    return adapters.make_chain(policy, optax.adamw(0.1), STACK)

  def step(self, chain):
    return lambda state, batch: chain.step(state, self.loss, batch)[0]

  def test_jit_equals_eager(self):
    # Eager steps compile op by op, QR most slowly: one small case.
    problem = Regression(2, ('a',), np.float32)
    policy = adapters.ChainPolicy.bernoulli(2, 1, sketch=SKETCHES['coordinate'])
    chain = adapters.make_chain(policy, optax.trace(0.9))
    eager = chain.init(jax.random.key(0), problem.params)
    jitted = jax.jit(chain.init)(jax.random.key(0), problem.params)
    loss = problem.adapted()
    step = lambda state, batch: chain.step(state, loss, batch)[0]
    for i in range(2):
      batch = steps_of(problem.batches, i)
      eager, jitted = step(eager, batch), jax.jit(step)(jitted, batch)
      chex.assert_trees_all_equal_shapes_and_dtypes(eager, jitted)
      # Float32 sums of five terms of size ten.
      chex.assert_trees_all_close(
          eager._replace(key=0), jitted._replace(key=0), rtol=1e-4, atol=1e-5
      )

  @parameterized.parameters(['bernoulli'])
  def test_scan_over_donated_states(self, side):
    self.check_scan_over_donated_states(side)

  @parameterized.parameters([None])
  @pytest.mark.slow
  def test_scan_over_donated_states_otherwise(self, side):
    self.check_scan_over_donated_states(side)

  def check_scan_over_donated_states(self, side):
    sketch = SKETCHES['coordinate']
    chain = self.chain(side=side, rounding='compensated', sketch=sketch)
    params = jax.tree.map(jnp.asarray, self.problem.params)
    key = jax.random.key(0)

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(state, batches):
      step = lambda state, batch: (self.step(chain)(state, batch), None)
      return jax.lax.scan(step, state, batches)[0]

    # Eager, where the state could share arrays with its arguments.
    first = chain.init(key, params)
    state = scan(first, self.problem.batches)
    self.assertTrue(first.factors['stack']['left'].is_deleted())
    again = scan(chain.init(key, params), self.problem.batches)
    chex.assert_trees_all_equal(state._replace(key=0), again._replace(key=0))
    chex.assert_trees_all_equal(params, self.problem.params)
    jax.random.key_data(key)

  @parameterized.parameters(['bernoulli'])
  def test_a_restored_run_goes_on_bit_for_bit(self, side):
    self.check_a_restored_run_goes_on_bit_for_bit(side)

  @parameterized.parameters('left', None)
  @pytest.mark.slow
  def test_a_restored_run_goes_on_bit_for_bit_otherwise(self, side):
    self.check_a_restored_run_goes_on_bit_for_bit(side)

  def check_a_restored_run_goes_on_bit_for_bit(self, side):
    chain = self.chain(side=side, rounding='compensated', warmup=1)
    step = jax.jit(self.step(chain))
    state = jax.jit(chain.init)(jax.random.key(0), self.problem.params)
    batches = [steps_of(self.problem.batches, i) for i in range(self.num_steps)]
    states = [state]
    for batch in batches:
      states.append(step(states[-1], batch))
    plain = lambda state: jax.tree.map(
        np.asarray, state._replace(key=jax.random.key_data(state.key))
    )
    for start in (1, 2, 3):  # Within a link and at its end.
      restored = jax.tree.map(jnp.asarray, plain(states[start]))
      restored = restored._replace(key=jax.random.wrap_key_data(restored.key))
      for batch in batches[start:]:
        restored = step(restored, batch)
      chex.assert_trees_all_equal(plain(restored), plain(states[-1]))
    self.assertEqual(step._cache_size(), 1)

  def test_vmap_over_keys(self):
    with jax.enable_x64(True):
      problem = Regression(self.num_steps, ('stack',))
      chain, loss = self.chain(), problem.adapted()
      params, batches = problem.inputs()
      keys = jax.random.split(jax.random.key(0), 3)
      one_step = lambda state, batch: chain.step(state, loss, batch)[0]
      many_steps = jax.vmap(one_step, (0, None))

      def scan(step, state):
        body = lambda state, batch: (step(state, batch), None)
        return jax.lax.scan(body, state, batches)[0]

      def one(key):
        return chain.params(scan(one_step, chain.init(key, params)))

      def many(keys):
        states = jax.vmap(chain.init, (0, None))(keys, params)
        states = scan(many_steps, states)
        return states.coins['stack'], jax.vmap(chain.params)(states)

      coins, together = jax.jit(many)(keys)
      one = jax.jit(one)
      for i in range(3):
        # Seven steps of Adam in float64, in batches of another size.
        chex.assert_trees_all_close(
            steps_of(together, i), one(keys[i]), rtol=1e-8, atol=1e-8
        )
    self.assertLen(np.unique(coins), 2)

  def test_gradient_through_steps(self):
    """Of what a run ends with, by its scale, over the ends of links."""
    with jax.enable_x64(True):
      problem = Regression(self.num_steps, ('stack',))
      chain, loss = self.chain(), problem.adapted()
      params, batches = problem.inputs()
      start = jax.jit(chain.init)(jax.random.key(0), params)
      step = jax.jit(
          lambda state, batch, scale: chain.step(
              state, loss, batch, scale=scale
          )[0]
      )

      def end(scale):
        state = start
        for i in range(5):
          state = step(state, steps_of(batches, i), scale)
        return jnp.sum(jnp.sin(chain.params(state)['stack']))

      slope = (end(1 + 1e-5) - end(1 - 1e-5)) / 2e-5
      self.assertGreater(abs(slope), 1e-3)
      self.assertGreater(5, chain.policy.period)
      chex.assert_trees_all_close(jax.grad(end)(1.0), slope, rtol=1e-6)
      chex.assert_trees_all_close(
          jax.jvp(end, (1.0,), (1.0,))[1], slope, rtol=1e-6
      )

  def test_vmap_of_links_out_of_phase(self):
    with jax.enable_x64(True):
      problem = Regression(self.num_steps, ('stack',))
      chain, loss = self.chain(), problem.adapted()
      params, batches = problem.inputs()
      step = jax.jit(lambda state, batch: chain.step(state, loss, batch)[0])
      apart = []
      for i in range(3):
        state = jax.jit(chain.init)(jax.random.key(i), params)
        for j in range(i):
          state = step(state, steps_of(batches, j))
        apart.append(state)
      together = jax.tree.map(lambda *xs: jnp.stack(xs), *apart)
      many = jax.jit(jax.vmap(step, (0, None)))
      for j in range(4):
        batch = steps_of(batches, j)
        apart = [step(state, batch) for state in apart]
        together = many(together, batch)
      np.testing.assert_array_equal(together.count, [4, 5, 6])
      for i, state in enumerate(apart):
        chex.assert_trees_all_close(
            steps_of(together.params, i), state.params, rtol=1e-9, atol=1e-9
        )
        np.testing.assert_array_equal(
            together.coins['stack'][i], state.coins['stack']
        )

  def test_scale_and_value_of_a_step(self):
    chain = adapters.make_chain(
        adapters.ChainPolicy.rac(2, 3, 'left'), optax.sgd(0.1), STACK
    )
    state = jax.jit(chain.init)(jax.random.key(0), self.problem.params)
    batch = steps_of(self.problem.batches, 0)
    step = jax.jit(
        lambda state, batch, scale: chain.step(
            state, self.loss, batch, scale=scale
        )
    )
    once, (value, _) = step(state, batch, 1.0)
    twice, _ = step(state, batch, 2.0)
    np.testing.assert_allclose(
        value, self.problem.loss(self.problem.params, batch)[0], rtol=1e-5
    )
    right = once.factors['stack']['right']
    self.assertTrue(np.any(right))
    np.testing.assert_allclose(
        twice.factors['stack']['right'], 2 * right, rtol=1e-6
    )


class InitTest(parameterized.TestCase):
  """What a link begins with: laws of the random factor, and L R = 0."""

  params = {
      'w': jax.ShapeDtypeStruct((16, 9), jnp.float32),
      'stack': jax.ShapeDtypeStruct((200, 16, 9), jnp.float32),
  }

  def factors(self, **kwargs):
    policy = adapters.ChainPolicy.cola(3, 1, **kwargs)
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape), self.params)
    return jax.jit(chain.init)(jax.random.key(0), params).factors['stack']

  @parameterized.parameters('left', 'right')
  def test_uniform(self, zero):
    pair = self.factors(zero=zero)
    other, side = {'left': ('right', 9), 'right': ('left', 16)}[zero]
    np.testing.assert_array_equal(pair[zero], 0)
    draws = np.asarray(pair[other], np.float64).ravel()
    bound = 1 / np.sqrt(side)
    self.assertLessEqual(np.abs(draws).max(), bound)
    assert_mean(draws, 0)
    assert_mean(draws**2, bound**2 / 3)

  def test_normal(self):
    pair = self.factors(init='normal')
    np.testing.assert_array_equal(pair['right'], 0)
    draws = np.asarray(pair['left'], np.float64).ravel()
    assert_mean(draws, 0)
    assert_mean(draws**2, 1)
    assert_mean(draws**4, 3)

  @parameterized.parameters(['right'])
  def test_raw_factors_are_as_sampled(self, side):
    self.check_raw_factors_are_as_sampled(side)

  @parameterized.parameters(['left'])
  @pytest.mark.slow
  def test_raw_factors_are_as_sampled_otherwise(self, side):
    self.check_raw_factors_are_as_sampled(side)

  def check_raw_factors_are_as_sampled(self, side):
    policy = adapters.ChainPolicy.rac(12, 1, side, frame='raw')
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape), self.params)
    state = jax.jit(chain.init)(jax.random.key(0), params)
    pair = state.factors['stack']
    other = {'left': 'right', 'right': 'left'}[side]
    np.testing.assert_array_equal(pair[other], 0)
    # Above a side the sample is square, as many numbers as it spans.
    rank = {'left': 12, 'right': 9}[side]
    self.assertEqual(pair['left'].shape, (200, 16, rank))
    draws = np.asarray(pair[side], np.float64).ravel()
    assert_mean(draws, 0)
    assert_mean(draws**2, 1)

  @parameterized.parameters(2, 12)
  def test_bernoulli_freezes_a_frame_and_trains_from_zero(self, rank):
    policy = adapters.ChainPolicy.bernoulli(rank, 1)
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape), self.params)
    state = jax.jit(chain.init)(jax.random.key(0), params)
    pair = jax.tree.map(np.asarray, state.factors['stack'])
    is_left = np.asarray(state.coins['stack'])
    self.assertBetween(is_left.mean(), 0.3, 0.7)
    np.testing.assert_array_equal(pair['right'][is_left], 0)
    np.testing.assert_array_equal(pair['left'][~is_left], 0)
    for frozen, dim in (
        (pair['left'][is_left], 16),
        (np.swapaxes(pair['right'][~is_left], -1, -2), 9),
    ):
      gram = np.swapaxes(frozen, -1, -2) @ frozen
      # A rank above the side leaves columns of zeros.
      eye = np.diag((np.arange(rank) < dim).astype(np.float32))
      np.testing.assert_allclose(
          gram, np.broadcast_to(eye, gram.shape), atol=1e-5
      )


class OtherOptimizersTest(parameterized.TestCase):
  """Optimisers that keep more than moments, and losses of other kinds."""

  def chain(self, tx, **kwargs):
    kwargs = {'sketch': SKETCHES['coordinate'], **kwargs}
    policy = bl.ChainPolicy.bernoulli(2, period=2, **kwargs)
    return bl.adapters.make_chain(policy, tx)

  def params(self):
    return {'w': jax.random.normal(jax.random.key(0), (5, 4))}

  @staticmethod
  def loss(params, batch):
    del batch
    return jnp.sum((params['w'] - 1) ** 2), None

  def test_states_that_alias_the_factors_can_be_donated(self):
    chain = self.chain(optax.contrib.prodigy(1e-2))
    state = chain.init(jax.random.key(1), self.params())
    adapted = bl.inject.by_addition(self.loss)
    step = jax.jit(
        lambda state: chain.step(state, adapted, None)[0], donate_argnums=0
    )
    for _ in range(3):
      state = step(state)
    self.assertTrue(np.isfinite(chain.params(state)['w']).all())

  def test_noise_is_not_repeated_in_the_next_link(self):
    chain = self.chain(
        optax.chain(
            optax.add_noise(1.0, 0.0, jax.random.key(2)), optax.sgd(0.1)
        )
    )
    state = chain.init(jax.random.key(1), self.params())
    step = jax.jit(chain.step, static_argnums=1)
    adapted = bl.inject.by_addition(self.loss)
    for _ in range(3):
      state, _ = step(state, adapted, None)
    self.assertEqual(state.opt_state[0].count, 3)

  def test_multi_steps_is_refused_where_links_end(self):
    tx = optax.MultiSteps(optax.sgd(1.0), 3).gradient_transformation()
    with self.assertRaisesRegex(ValueError, 'num_micro_batches'):
      self.chain(tx).init(jax.random.key(1), self.params())
    bl.adapters.make_chain(bl.ChainPolicy.lora(2), tx).init(
        jax.random.key(1), self.params()
    )

  def test_a_legacy_key_is_refused(self):
    with self.assertRaisesRegex(TypeError, 'typed key'):
      self.chain(optax.sgd(0.1)).init(jax.random.PRNGKey(0), self.params())

  def test_a_loss_without_aux_is_named(self):
    chain = self.chain(optax.sgd(0.1))
    state = chain.init(jax.random.key(1), self.params())
    scalar = bl.inject.by_addition(lambda params, batch: params['w'].sum())
    with self.assertRaisesRegex(TypeError, 'returns .scalar, aux.'):
      chain.step(state, scalar, None)

  @parameterized.parameters(
      ('left', {'prob': 0.3}),
      ('right', {'prob': jnp.asarray(0.5)}),
      (None, {'prob': 0.3}),
      ('left', {'shared_coin': True}),
      ('bernoulli', {'init': 'normal'}),
      ('left', {'zero': 'left'}),
  )
  def test_no_field_is_ignored(self, side, field):
    (name,) = field
    with self.assertRaisesRegex(
        ValueError, f'Expected {name} with side.*{name}=.*side={side!r}'
    ):
      bl.ChainPolicy(rank=1, period=1, side=side, **field)

  @parameterized.parameters(
      ('lora', 'lora', {}),
      ('cola', 'cola', {'period': 3}),
      ('asymmetric_lora', 'asymmetric', {'side': 'left'}),
      ('rac_lora', 'rac', {'period': 3, 'side': 'right'}),
      ('bernoulli_lora', 'bernoulli', {'period': 3, 'prob': 0.2}),
  )
  def test_old_names_warn(self, old, new, fields):
    with self.assertWarnsRegex(DeprecationWarning, f'ChainPolicy.{new}'):
      policy = getattr(adapters, old)(2, **fields)
    self.assertEqual(policy, getattr(bl.ChainPolicy, new)(2, **fields))

  def test_targets_are_checked(self):
    with self.assertRaisesRegex(ValueError, "prob of target 'w'.*side='left'"):
      bl.ChainPolicy(
          rank=1, period=1, side='left', targets=(bl.Target('w', prob=0.2),)
      )
    with self.assertRaisesRegex(TypeError, 'tuple of Target'):
      bl.ChainPolicy(rank=1, period=1, targets=('w',))
