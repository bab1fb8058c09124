"""Tests of E3 (PAGE) and E4 (MVR) against loops in NumPy."""

import functools

from absl.testing import parameterized
import chex
import jax
from jax.experimental import io_callback
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import estimators
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices

NUM_SAMPLES, BATCH, STEPS = 40, 5, 200


class LeastSquares:
  """f(w, b) = 1/2 mean_i ||x_i w + b - y_i||^2, in JAX and in NumPy."""

  def __init__(self, seed=0):
    rng = np.random.default_rng(seed)
    self.x = rng.normal(size=(NUM_SAMPLES, 4))
    self.y = rng.normal(size=(NUM_SAMPLES, 6))
    self.params = {'b': rng.normal(size=6), 'w': rng.normal(size=(4, 6))}
    self.indices = rng.integers(0, NUM_SAMPLES, size=(STEPS, BATCH))

  def loss(self, params, batch):
    x, y = batch
    rest = x @ params['w'] + params['b'][None] - y
    return 0.5 * jnp.mean(jnp.sum(rest**2, axis=1))

  def batch(self, index):
    return jnp.asarray(self.x)[index], jnp.asarray(self.y)[index]

  def grad(self, params, index):
    return jax.grad(self.loss)(params, self.batch(index))

  def full_grad(self, params):
    return self.grad(params, jnp.arange(NUM_SAMPLES))

  def numpy_grad(self, params, index):
    x, y = self.x[index], self.y[index]
    rest = (x @ params['w'] + params['b'] - y) / len(x)
    return {'b': rest.sum(0), 'w': x.T @ rest}

  def numpy_full_grad(self, params):
    return self.numpy_grad(params, np.arange(NUM_SAMPLES))

  def run(self, tx, num_steps=STEPS):
    """Returns the params after each step and the last state."""

    def step(carry, index):
      params, state = carry
      grad_fn = lambda params: self.grad(params, index)
      updates, state = tx.update(
          grad_fn(params),
          state,
          params,
          grad_fn=grad_fn,
          full_grad_fn=self.full_grad,
      )
      params = optax.apply_updates(params, updates)
      return (params, state), params

    @jax.jit
    def scan(params):
      carry = params, tx.init(params)
      return jax.lax.scan(step, carry, self.indices[:num_steps])

    (_, state), path = scan(jax.tree.map(jnp.asarray, self.params))
    return path, state


def combine(fn, *trees):
  return {name: fn(*(tree[name] for tree in trees)) for name in trees[0]}


class NumpyChain:
  """A1 in NumPy, with the draws of the chain."""

  def __init__(self, key, rank):
    found = matrices.find({'w': jnp.zeros((4, 6)), 'b': jnp.zeros(6)})

    def draw(step):
      (link,) = links_lib.draw_links(
          jax.random.fold_in(key, step),
          found,
          ranks=[rank],
          probs=[0.5],
          sketch=bl.sketches.gaussian(),
      )
      return link.coin, link.left, link.right

    draws = jax.jit(jax.vmap(draw))(jnp.arange(STEPS))
    self.coins, self.left, self.right = map(np.asarray, draws)

  def __call__(self, estimate, step):
    if self.coins[step]:
      q = self.left[step]
      return {**estimate, 'w': q @ q.T @ estimate['w']}
    q = self.right[step]
    return {**estimate, 'w': estimate['w'] @ q @ q.T}


class ReferenceTest(parameterized.TestCase):
  """Equality with NumPy for 200 steps in float64, fed the same draws."""

  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))
    self.problem = LeastSquares()
    self.key, self.chain_key = jax.random.split(jax.random.key(0))

  def transformation(self, estimator, with_chain, learning_rate):
    parts = [estimator]
    if with_chain:
      parts.append(bl.scale_by_bernoulli_chain(self.chain_key, rank=2))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))

  def numpy_path(self, estimate_fn, with_chain, learning_rate):
    """Runs W <- W - gamma H G, G from (W, W of the last step, G, step)."""
    project = NumpyChain(self.chain_key, 2) if with_chain else lambda g, step: g
    params, previous, estimate = self.problem.params, None, None
    path = []
    for step in range(STEPS):
      estimate = estimate_fn(params, previous, estimate, step)
      moved = project(estimate, step)
      previous = params
      params = combine(lambda w, g: w - learning_rate * g, params, moved)
      path.append(params)
    return combine(lambda *leaves: np.stack(leaves), *path)

  def assert_paths_equal(self, path, expected):
    # 200 steps of float64 rounding, contracted by the problem.
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, path), expected, rtol=1e-11, atol=1e-11
    )
    # The path goes somewhere: a comparison of constants would be empty.
    travel = np.abs(expected['w'][-1] - self.problem.params['w']).max()
    self.assertGreater(travel, 0.1)

  @parameterized.parameters(
      (False, 1.0),
      (True, 0.2),
  )
  def test_page_equals_numpy(self, with_chain, prob):
    self.check_page_equals_numpy(with_chain, prob)

  @parameterized.parameters(
      (False, 0.2),
      (True, 1.0),
  )
  @pytest.mark.slow
  def test_page_equals_numpy_otherwise(self, with_chain, prob):
    self.check_page_equals_numpy(with_chain, prob)

  def check_page_equals_numpy(self, with_chain, prob):
    problem = self.problem
    coins = np.asarray(
        jax.vmap(
            lambda step: jax.random.bernoulli(
                jax.random.fold_in(self.key, step), prob
            )
        )(jnp.arange(STEPS))
    )

    def estimate_fn(params, previous, estimate, step):
      if step == 0 or coins[step]:
        return problem.numpy_full_grad(params)
      index = problem.indices[step]
      new = problem.numpy_grad(params, index)
      old = problem.numpy_grad(previous, index)
      return combine(lambda g, new, old: g + new - old, estimate, new, old)

    tx = self.transformation(bl.page(self.key, prob=prob), with_chain, 0.1)
    path, state = problem.run(tx)
    self.assert_paths_equal(path, self.numpy_path(estimate_fn, with_chain, 0.1))
    self.assertEqual(state[0].count, STEPS)

  @parameterized.parameters(
      (False, 0.0),
      (True, 0.9),
  )
  def test_mvr_equals_numpy(self, with_chain, momentum):
    self.check_mvr_equals_numpy(with_chain, momentum)

  @parameterized.parameters(
      (False, 0.9),
      (True, 0.0),
  )
  @pytest.mark.slow
  def test_mvr_equals_numpy_otherwise(self, with_chain, momentum):
    self.check_mvr_equals_numpy(with_chain, momentum)

  def check_mvr_equals_numpy(self, with_chain, momentum):
    problem = self.problem

    def estimate_fn(params, previous, estimate, step):
      index = problem.indices[step]
      new = problem.numpy_grad(params, index)
      if step == 0:
        return new
      old = problem.numpy_grad(previous, index)
      return combine(
          lambda g, new, old: new + momentum * (g - old), estimate, new, old
      )

    tx = self.transformation(bl.mvr(momentum=momentum), with_chain, 0.05)
    path, state = problem.run(tx)
    expected = self.numpy_path(estimate_fn, with_chain, 0.05)
    self.assert_paths_equal(path, expected)
    self.assertEqual(state[0].count, STEPS)

  def test_small_page_steps_are_unbiased_differences(self):
    # In the mean over minibatches G+ - G = grad f(W+) - grad f(W); single
    # samples, each once, make the mean exact.
    problem = self.problem
    params = jax.tree.map(jnp.asarray, problem.params)
    moved = jax.tree.map(lambda x: 1.5 * x - 0.3, params)
    estimate = jax.tree.map(jnp.ones_like, params)

    def small(index):
      return estimators.page_estimate(
          problem.grad(moved, index[None]),
          problem.grad(params, index[None]),
          estimate,
      )

    mean = jax.tree.map(
        lambda x: x.mean(0), jax.jit(jax.vmap(small))(jnp.arange(NUM_SAMPLES))
    )
    expected = jax.tree.map(
        lambda g, new, old: g + new - old,
        estimate,
        problem.full_grad(moved),
        problem.full_grad(params),
    )
    chex.assert_trees_all_close(mean, expected, rtol=1e-12)


class ExactTest(parameterized.TestCase):
  """The limits are GD and SGD bit for bit; the first steps as stated."""

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_page_with_prob_one_is_gd(self, dtype):
    problem = LeastSquares()
    problem.params = jax.tree.map(
        lambda x: jnp.asarray(x, dtype), problem.params
    )
    gd = optax.GradientTransformationExtraArgs(
        lambda params: (),
        lambda updates, state, params, **extra: (
            extra['full_grad_fn'](params),
            state,
        ),
    )
    page, _ = problem.run(
        optax.chain(bl.page(jax.random.key(0), prob=1.0), optax.scale(-0.1)), 50
    )
    plain, _ = problem.run(optax.chain(gd, optax.scale(-0.1)), 50)
    chex.assert_type(jax.tree.leaves(page), dtype)
    chex.assert_trees_all_equal(page, plain)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_mvr_with_momentum_zero_is_sgd(self, dtype):
    problem = LeastSquares()
    problem.params = jax.tree.map(
        lambda x: jnp.asarray(x, dtype), problem.params
    )
    mvr, _ = problem.run(
        optax.chain(bl.mvr(momentum=0.0), optax.scale(-0.1)), 50
    )
    sgd, _ = problem.run(
        optax.chain(
            optax.with_extra_args_support(optax.identity()), optax.scale(-0.1)
        ),
        50,
    )
    chex.assert_type(jax.tree.leaves(mvr), dtype)
    chex.assert_trees_all_equal(mvr, sgd)

  def test_first_page_step_is_the_full_gradient_without_its_coin(self):
    params = {'w': jnp.ones((2, 3))}
    for seed in range(5):
      tx = bl.page(jax.random.key(seed), prob=1e-6)
      state = tx.init(params)
      self.assertFalse(state.is_full)
      estimate, state = tx.update(
          {'w': jnp.zeros((2, 3))},
          state,
          params,
          grad_fn=lambda params: jax.tree.map(jnp.zeros_like, params),
          full_grad_fn=lambda params: jax.tree.map(lambda x: 7 * x, params),
      )
      self.assertTrue(state.is_full)
      chex.assert_trees_all_equal(estimate, {'w': 7 * jnp.ones((2, 3))})
      chex.assert_trees_all_equal(state.estimate, estimate)
      chex.assert_trees_all_equal(state.params, params)

  def test_first_mvr_step_is_the_incoming_gradient(self):
    params = {'w': jnp.ones((2, 3))}
    tx = bl.mvr(momentum=0.9)
    gradient = {'w': jnp.full((2, 3), 5.0)}
    estimate, state = tx.update(
        gradient,
        tx.init(params),
        params,
        grad_fn=lambda params: jax.tree.map(lambda x: x * jnp.nan, params),
    )
    chex.assert_trees_all_equal(estimate, gradient)
    chex.assert_trees_all_equal(state.estimate, gradient)

  def test_page_coins_follow_prob(self):
    num, prob = 4000, 0.3
    tx = bl.page(jax.random.key(3), prob=prob)
    params = jnp.zeros(())
    zero = lambda params: jnp.zeros(())

    def step(state, _):
      _, state = tx.update(
          params, state, params, grad_fn=zero, full_grad_fn=zero
      )
      return state, state.is_full

    _, fulls = jax.jit(
        lambda: jax.lax.scan(step, tx.init(params), length=num)
    )()
    fulls = np.asarray(fulls, np.float64)
    self.assertEqual(fulls[0], 1)
    error = np.sqrt(prob * (1 - prob) / (num - 1))
    self.assertLess(abs(fulls[1:].mean() - prob), 5 * error)
    # Coins of successive steps are independent.
    products = (fulls[2:] - prob) * (fulls[1:-1] - prob)
    error = prob * (1 - prob) / np.sqrt(num - 2)
    self.assertLess(abs(products.mean()), 5 * error)


class EvaluationsTest(parameterized.TestCase):
  """Gradients are evaluated only where the coin asks for them."""

  @parameterized.parameters(False, True)
  def test_page_evaluates_the_full_gradient_only_when_asked(self, jitted):
    calls = {'full': 0, 'mini': 0}
    # Eager steps compile op by op: few of them.
    num_steps = 60 if jitted else 6

    def count(name, params):
      def record():
        calls[name] += 1
        return np.float32(0)

      zero = io_callback(record, jax.ShapeDtypeStruct((), jnp.float32))
      return jax.tree.map(lambda x: x + zero, params)

    tx = bl.page(jax.random.key(1), prob=0.3)
    params = {'w': jnp.ones((2, 2))}

    def update(updates, state, params):
      return tx.update(
          updates,
          state,
          params,
          grad_fn=functools.partial(count, 'mini'),
          full_grad_fn=functools.partial(count, 'full'),
      )

    update = jax.jit(update) if jitted else update
    state, fulls = tx.init(params), 0
    for _ in range(num_steps):
      _, state = update(params, state, params)
      fulls += int(state.is_full)
    jax.effects_barrier()
    self.assertEqual(calls['full'], fulls)
    self.assertEqual(calls['mini'], num_steps - fulls)
    self.assertBetween(fulls, 1, num_steps - 1)

  def test_mvr_evaluates_one_more_gradient_a_step_but_not_at_first(self):
    calls = []

    def grad_fn(params):
      zero = io_callback(
          lambda: calls.append(1) or np.float32(0),
          jax.ShapeDtypeStruct((), jnp.float32),
      )
      return jax.tree.map(lambda x: x + zero, params)

    tx = bl.mvr(momentum=0.5)
    params = {'w': jnp.ones((2, 2))}
    update = jax.jit(
        lambda state: tx.update(params, state, params, grad_fn=grad_fn)
    )
    state = tx.init(params)
    for _ in range(5):
      _, state = update(state)
    jax.effects_barrier()
    self.assertLen(calls, 4)


class RejectsTest(parameterized.TestCase):
  """What estimators cannot honour they refuse, with a reason."""

  def setUp(self):
    super().setUp()
    self.params = {'a': jnp.ones((3, 2)), 'b': jnp.ones((3, 2))}
    self.estimators = {
        'page': bl.page(jax.random.key(0), prob=0.5),
        'mvr': bl.mvr(momentum=0.9),
    }

  def nested(self, name):
    """The estimator alone, inside of a chain, and inside of two."""
    tx = self.estimators[name]
    chained = optax.chain(
        tx, bl.scale_by_bernoulli_chain(jax.random.key(1), rank=1)
    )
    return tx, chained, optax.chain(chained, optax.scale(-1.0))

  @parameterized.parameters('page', 'mvr')
  def test_masked(self, name):
    for tx in self.nested(name):
      masked = optax.masked(tx, {'a': True, 'b': False})
      with self.assertRaisesRegex(ValueError, f'{name} to stand outermost'):
        masked.init(self.params)

  @parameterized.parameters('page', 'mvr')
  def test_partition(self, name):
    for tx in self.nested(name):
      partition = optax.partition(
          {'fine': tx, 'frozen': optax.set_to_zero()},
          {'a': 'fine', 'b': 'frozen'},
      )
      with self.assertRaisesRegex(ValueError, f'{name} to stand outermost'):
        partition.init(self.params)

  @parameterized.parameters('page', 'mvr')
  def test_multi_steps(self, name):
    message = f'{name} outside of optax.MultiSteps.*bl.accumulate'
    for tx in self.nested(name):
      multi = optax.MultiSteps(tx, every_k_schedule=2)
      with self.assertRaisesRegex(ValueError, message):
        multi.init(self.params)
      with self.assertRaisesRegex(ValueError, message):
        multi.gradient_transformation().init(self.params)
      with self.assertRaisesRegex(ValueError, message):
        jax.jit(multi.init)(self.params)

  @parameterized.parameters('page', 'mvr')
  def test_what_stands_behind_may_be_masked_or_accumulated(self, name):
    behind = optax.MultiSteps(
        optax.masked(optax.scale(-1.0), {'a': True, 'b': False}), 2
    ).gradient_transformation()
    optax.chain(self.estimators[name], behind).init(self.params)

  @parameterized.parameters(
      ('page', 'params', 'params'),
      ('page', 'grad_fn', 'grad_fn'),
      ('page', 'full_grad_fn', 'full_grad_fn'),
      ('mvr', 'params', 'params'),
      ('mvr', 'grad_fn', 'grad_fn'),
  )
  def test_missing_argument(self, name, missing, shown):
    tx = optax.chain(self.estimators[name], optax.scale(-1.0))
    given = {
        'params': self.params,
        'grad_fn': lambda params: params,
        'full_grad_fn': lambda params: params,
    }
    del given[missing]
    message = rf'{name}.update to be given {shown}, got None'
    with self.assertRaisesRegex(ValueError, message):
      tx.update(self.params, tx.init(self.params), **given)

  @parameterized.parameters(0, 0.0, -0.1, 1.5, float('nan'))
  def test_page_prob(self, prob):
    with self.assertRaisesRegex(
        ValueError, rf'prob in \(0, 1\], got prob={prob}'
    ):
      bl.page(jax.random.key(0), prob=prob)

  @parameterized.parameters(-0.1, 1.0, 1, 2.0, float('nan'))
  def test_mvr_momentum(self, momentum):
    with self.assertRaisesRegex(
        ValueError, rf'momentum in \[0, 1\), got momentum={momentum}'
    ):
      bl.mvr(momentum=momentum)


class AccumulateTest(parameterized.TestCase):

  @parameterized.parameters(1, 2, 5, 10)
  def test_mean_over_micro_batches_is_the_gradient_of_the_batch(self, num):
    with jax.enable_x64(True):
      problem = LeastSquares()
      grad_fn = jax.grad(problem.loss)
      batch = problem.batch(np.arange(20))
      accumulated = jax.jit(bl.accumulate(grad_fn, num))(problem.params, batch)
      # Twenty terms in float64.
      chex.assert_trees_all_close(
          accumulated, grad_fn(problem.params, batch), rtol=1e-12, atol=1e-13
      )

  def test_further_arguments_are_passed(self):
    grad_fn = lambda params, batch, scale: params * batch.mean() * scale
    accumulated = bl.accumulate(grad_fn, 2)(
        jnp.float32(2.0), jnp.arange(4.0), jnp.float32(3.0)
    )
    self.assertAlmostEqual(accumulated, 9.0, places=6)

  def test_bfloat16_is_summed_in_float32(self):
    # Sums of ones in bfloat16 stop at 256: 256 + 1 rounds to 256.
    num = 1024
    grad_fn = lambda params, batch: params * batch.mean().astype(jnp.bfloat16)
    one = jnp.bfloat16(1)
    naive, _ = jax.lax.scan(
        lambda total, _: (total + one, None), jnp.bfloat16(0), length=num
    )
    self.assertEqual(naive / num, 0.25)
    accumulated = bl.accumulate(grad_fn, num)(one, jnp.ones(num))
    self.assertEqual(accumulated.dtype, jnp.bfloat16)
    self.assertEqual(accumulated, 1.0)

  @parameterized.parameters(0, -1)
  def test_number_of_micro_batches(self, num):
    message = f'num_micro_batches >= 1, got num_micro_batches={num}'
    with self.assertRaisesRegex(ValueError, message):
      bl.accumulate(lambda params, batch: params, num)

  def test_page_on_accumulated_batches_is_page_on_the_whole(self):
    with jax.enable_x64(True):
      problem = LeastSquares()
      whole = jax.grad(problem.loss)
      tx = optax.chain(
          bl.page(jax.random.key(0), prob=0.2),
          bl.scale_by_bernoulli_chain(jax.random.key(1), rank=2),
          optax.scale(-0.1),
      )

      @functools.partial(jax.jit, static_argnums=0)
      def run(num):
        grad = whole if num == 1 else bl.accumulate(whole, num)

        def step(carry, index):
          params, state = carry
          grad_fn = lambda params: grad(params, problem.batch(index))
          updates, state = tx.update(
              grad_fn(params),
              state,
              params,
              grad_fn=grad_fn,
              full_grad_fn=lambda params: grad(
                  params, problem.batch(np.arange(NUM_SAMPLES))
              ),
          )
          return (optax.apply_updates(params, updates), state), None

        params = jax.tree.map(jnp.asarray, problem.params)
        carry = params, tx.init(params)
        return jax.lax.scan(step, carry, problem.indices)[0][0]

      chex.assert_trees_all_close(run(1), run(5), rtol=1e-11, atol=1e-11)


class StateTest(parameterized.TestCase):

  @parameterized.product(
      name=('page', 'mvr'),
      params=('float32', 'bfloat16'),
      grads=('float32', 'bfloat16'),
      kept=(None, 'float32'),
      is_jitted=(False, True),
  )
  def test_state_keeps_its_dtypes_and_its_own_arrays(
      self, name, params, grads, kept, is_jitted
  ):
    """Over params of any dtype; a donated state deletes nothing else."""
    tx = {
        'page': bl.page(jax.random.key(0), prob=0.4, accumulator_dtype=kept),
        'mvr': bl.mvr(momentum=0.9, accumulator_dtype=kept),
    }[name]
    grad_fn = lambda tree: jax.tree.map(
        lambda x: jnp.asarray(0.37 * x, grads), tree
    )

    def step(state, tree):
      return tx.update(
          grad_fn(tree), state, tree, grad_fn=grad_fn, full_grad_fn=grad_fn
      )

    tree = {'w': jnp.ones((4, 3), params)}
    state = tx.init(tree)
    wanted = jax.tree.map(jax.typeof, state)
    step = jax.jit(step) if is_jitted else step
    for _ in range(2):
      updates, state = step(state, tree)
      self.assertEqual(updates['w'].dtype, grads)
      # The first step is the gradient itself, not rounded to the state's dtype.
      if state.count == 1:
        chex.assert_trees_all_equal(updates, grad_fn(tree))
      self.assertEqual(jax.tree.map(jax.typeof, state), wanted)
      for leaf in jax.tree.leaves((state.params, state.estimate)):
        mine = leaf.unsafe_buffer_pointer()
        for other in jax.tree.leaves((updates, tree)):
          self.assertNotEqual(mine, other.unsafe_buffer_pointer())
    self.assertEqual(state.estimate['w'].dtype, kept or params)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_bytes_of_state_are_two_copies_of_the_params(self, dtype):
    params = {
        'w': jax.ShapeDtypeStruct((30, 20), dtype),
        'b': jax.ShapeDtypeStruct((20,), dtype),
    }
    num_bytes = lambda tree: sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
    copies = 2 * num_bytes(params)
    mvr = jax.eval_shape(bl.mvr(momentum=0.9).init, params)
    self.assertEqual(num_bytes(mvr), copies + 4)  # And a count.
    page = jax.eval_shape(bl.page(jax.random.key(0), prob=0.5).init, params)
    self.assertEqual(num_bytes(page), copies + 4 + 8 + 1)  # Key and coin.

  def test_estimates_keep_the_dtype_of_the_updates(self):
    # A full gradient in float32 beside bfloat16 updates.
    params = {'w': jnp.ones((2, 3), jnp.bfloat16)}
    single = lambda params: jax.tree.map(
        lambda x: x.astype(jnp.float32), params
    )
    for tx in (bl.page(jax.random.key(0), prob=0.5), bl.mvr(momentum=0.9)):
      state = tx.init(params)
      update = jax.jit(
          lambda state, tx=tx: tx.update(
              params, state, params, grad_fn=single, full_grad_fn=single
          )
      )
      for _ in range(3):
        updates, after = update(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        state = after
