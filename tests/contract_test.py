"""One contract for every transformation of the core."""

import functools
import itertools
import pathlib
import tempfile

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bernoulli_lora_jax as bl

LEARNING_RATE = 0.1


def scaled(*parts):
  return optax.chain(*parts, optax.scale(-LEARNING_RATE))


def chain_of(sketch='gaussian', **kwargs):
  sketch = getattr(bl.sketches, sketch)()
  return lambda key: scaled(
      bl.scale_by_bernoulli_chain(key, rank=2, sketch=sketch, **kwargs)
  )


def estimator_of(make, with_chain):
  def transformation(key):
    key, chain_key = jax.random.split(key)
    chain = bl.scale_by_bernoulli_chain(chain_key, rank=2)
    return scaled(make(key), chain) if with_chain else scaled(make(key))

  return transformation


page = functools.partial(bl.page, prob=0.4)
mvr = lambda key: bl.mvr(momentum=0.9)
IDENTITY = bl.compressors.identity()


def stacked(make, compressor, **kwargs):
  """An estimator of three clients, made from the one gradient that comes in."""

  def transformation(key):
    inner = make(key, compressor=compressor, num_clients=3, **kwargs)
    # Neither client's gradient is the mean, which is 2/3 of the whole.
    spread = lambda g: jnp.stack([g, 2 * g, -g])

    def update(updates, state, params=None, **extra):
      return inner.update(jax.tree.map(spread, updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)

  return transformation


qgd = stacked(bl.qgd, bl.compressors.randk(fraction=0.5))
marina = stacked(
    bl.marina, bl.compressors.randk(fraction=0.5), prob=0.4, cohort=2
)
ef21 = stacked(
    bl.ef21, bl.compressors.powersgd(2, start='warm'), start='compressed'
)

# Optimisers as functions of a key.
CHAINS = {
    'gaussian': chain_of(),
    'rademacher': chain_of('rademacher'),
    'coordinate': chain_of('coordinate'),
    'srht': chain_of('srht'),
    'shared_coin': chain_of('coordinate', shared_coin=True),
    'traced_prob': lambda key: chain_of('coordinate', prob=jnp.float32(0.3))(
        key
    ),
    'period': chain_of('coordinate', period=3),
    'momentum': chain_of('coordinate', period=3, inner=optax.trace(0.9)),
    'adam': chain_of(period=2, inner=optax.scale_by_adam()),
    'bernoulli_lora': lambda key: bl.bernoulli_lora(
        optax.linear_schedule(LEARNING_RATE, 0.0, 10), key, rank=2
    ),
    'rac_left': lambda key: bl.rac_lora(
        LEARNING_RATE, key, rank=2, side='left'
    ),
    'rac_right': lambda key: bl.rac_lora(
        LEARNING_RATE, key, rank=2, side='right'
    ),
}
ESTIMATORS = {
    'page': estimator_of(page, False),
    'mvr': estimator_of(mvr, False),
    'page_chain': estimator_of(page, True),
    'mvr_chain': estimator_of(mvr, True),
    'qgd': estimator_of(qgd, False),
    'marina_chain': estimator_of(marina, True),
    'ef21_chain': estimator_of(ef21, True),
}
ALL = {**CHAINS, **ESTIMATORS}
# Near others of which each is compiled in the quick tests.
SIBLINGS = (
    'rademacher',
    'shared_coin',
    'traced_prob',
    'period',
    'rac_right',
    'mvr_chain',
)
# In bfloat16 too: an inner state, and states of estimators.
HALF = ('momentum', 'page_chain', 'ef21_chain')


def make_params(dtype=jnp.float32, seed=0):
  """A linear net of two lengths, with a bias that is no matrix."""
  rng = np.random.default_rng(seed)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape) / 3, dtype)
  return {
      'dense': {'kernel': make(6, 9), 'bias': make(9)},
      'out': {'kernel': make(9, 6)},
      'twin': {'kernel': make(9, 6)},
  }


def loss(params, index):
  """A smooth function of the params and of an example's number."""
  x = jnp.cos(jnp.arange(6.0) * (1.0 + index)).astype(jnp.float32)[None]
  params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
  hidden = x @ params['dense']['kernel'] + params['dense']['bias'][None]
  out = hidden @ (params['out']['kernel'] + params['twin']['kernel'])
  return 0.5 * jnp.sum((out - 1.0) ** 2)


def full_loss(params):
  return jnp.mean(jax.vmap(loss, (None, 0))(params, jnp.arange(4)))


def update_fn(tx, updates, state, params, index):
  return optax.with_extra_args_support(tx).update(
      updates,
      state,
      params,
      grad_fn=lambda params: jax.grad(loss)(params, index),
      full_grad_fn=jax.grad(full_loss),
  )


def step_fn(tx, params, state, grads, index):
  updates, state = update_fn(tx, grads, state, params, index)
  return optax.apply_updates(params, updates), state, updates


@jax.jit
def gradient(params, index):
  return jax.grad(loss)(params, index)


@functools.cache
def compiled(name):
  """Returns optimiser, jitted step, and a list with an entry for each trace.

  One program for all tests; params and state are donated.
  """
  tx = ALL[name](jax.random.key(0))
  traces = []

  def step(*args):
    traces.append(name)
    return step_fn(tx, *args)

  return tx, jax.jit(step, donate_argnums=(0, 1)), traces


def run(name, params, state, steps):
  """Runs steps with the numbers given; params and state are donated."""
  _, step, _ = compiled(name)
  for index in steps:
    grads = gradient(params, jnp.int32(index))
    params, state, _ = step(params, state, grads, jnp.int32(index))
  return params, state


def start(name):
  params = make_params()
  return params, compiled(name)[0].init(params)


def raw(tree):
  """Replaces typed keys by their words, for chex's comparisons."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(
      lambda x: jax.random.key_data(x) if is_key(x) else x, tree
  )


class EveryTransformationTest(parameterized.TestCase):

  @parameterized.parameters('coordinate', 'mvr')
  def test_jit_equals_eager(self, name):
    self.check_jit_equals_eager(name)

  @parameterized.parameters('adam', 'gaussian', 'page_chain', 'qgd')
  @pytest.mark.slow
  def test_jit_equals_eager_otherwise(self, name):
    self.check_jit_equals_eager(name)

  def check_jit_equals_eager(self, name):
    tx, step, _ = compiled(name)
    params, state = run(name, *start(name), range(3))
    grads = gradient(params, jnp.int32(3))
    copies = jax.tree.map(jnp.copy, (params, state))
    jitted = step(*copies, grads, jnp.int32(3))
    eager = step_fn(tx, params, state, grads, jnp.int32(3))
    # Float32 products fused in another order, on numbers of size one.
    chex.assert_trees_all_close(raw(jitted), raw(eager), rtol=1e-5, atol=1e-5)

  @parameterized.parameters(
      *((name, 'float32') for name in ALL if name not in SIBLINGS),
      *((name, 'bfloat16') for name in HALF),
  )
  def test_shapes_and_dtypes_are_stable_and_nothing_recompiles(
      self, name, dtype
  ):
    self.check_shapes_and_dtypes_are_stable_and_nothing_recompiles(name, dtype)

  @parameterized.parameters(
      *((name, 'float32') for name in SIBLINGS),
      *((name, 'bfloat16') for name in ALL if name not in HALF),
  )
  @pytest.mark.slow
  def test_shapes_and_dtypes_are_stable_and_nothing_recompiles_otherwise(
      self, name, dtype
  ):
    self.check_shapes_and_dtypes_are_stable_and_nothing_recompiles(name, dtype)

  def check_shapes_and_dtypes_are_stable_and_nothing_recompiles(
      self, name, dtype
  ):
    tx, step, traces = compiled(name)
    params = make_params(jnp.dtype(dtype))
    state = tx.init(params)
    kinds = lambda tree: jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), raw(tree)
    )
    params_kinds, state_kinds = kinds(params), kinds(state)
    for index in range(4):
      grads = gradient(params, jnp.int32(index))
      params, state, updates = step(params, state, grads, jnp.int32(index))
      if index == 0:
        num_traces = len(traces)
      self.assertEqual(kinds(updates), params_kinds)
      self.assertEqual(kinds(params), params_kinds)
      self.assertEqual(kinds(state), state_kinds)
    self.assertLen(traces, num_traces)
    chex.assert_tree_all_finite(params)

  @parameterized.parameters(
      'gaussian',
      'momentum',
      'adam',
      'bernoulli_lora',
      'page_chain',
      'marina_chain',
      'ef21_chain',
  )
  def test_restored_run_equals_the_unbroken_one_bit_for_bit(self, name):
    self.check_restored_run_equals_the_unbroken_one_bit_for_bit(name)

  @parameterized.parameters(
      'rademacher',
      'coordinate',
      'srht',
      'shared_coin',
      'period',
      'rac_left',
      'rac_right',
      'traced_prob',
      'page',
      'mvr',
      'mvr_chain',
      'qgd',
  )
  @pytest.mark.slow
  def test_restored_run_equals_the_unbroken_one_bit_for_bit_otherwise(
      self, name
  ):
    self.check_restored_run_equals_the_unbroken_one_bit_for_bit(name)

  def check_restored_run_equals_the_unbroken_one_bit_for_bit(self, name):
    unbroken = run(name, *start(name), range(7))
    # 4 of 7 steps: in the middle of a link of period 3.
    params, state = run(name, *start(name), range(4))
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'checkpoint'
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {'params': params, 'state': state})
        checkpointer.wait_until_finished()
        # A new process knows shapes only, from a transformation of its own.
        init = lambda: ALL[name](jax.random.key(0)).init(make_params())
        target = jax.eval_shape(
            lambda: {'params': make_params(), 'state': init()}
        )
        restored = checkpointer.restore(path, target)
    resumed = run(name, restored['params'], restored['state'], range(4, 7))
    chex.assert_trees_all_equal(raw(resumed), raw(unbroken))

  @parameterized.parameters(*(name for name in ALL if name not in SIBLINGS))
  def test_state_may_be_donated(self, name):
    self.check_state_may_be_donated(name)

  @parameterized.parameters(*SIBLINGS)
  @pytest.mark.slow
  def test_state_may_be_donated_otherwise(self, name):
    self.check_state_may_be_donated(name)

  def check_state_may_be_donated(self, name):
    tx, _, _ = compiled(name)
    params = make_params()
    results = []
    for _ in range(2):  # The second time nothing may have been deleted.
      copies = jax.tree.map(jnp.copy, params)
      results.append(run(name, copies, tx.init(params), range(2)))
    chex.assert_trees_all_equal(*map(raw, results))
    chex.assert_trees_all_equal(params, make_params())

  @parameterized.parameters(*ALL)
  def test_extra_arguments_of_others_pass(self, name):
    tx, _, _ = compiled(name)
    both = optax.chain(tx, optax.scale_by_polyak())
    params = make_params()
    state = both.init(params)
    update = lambda state: both.update(
        params,
        state,
        params,
        value=jnp.float32(1.0),
        grad_fn=lambda params: params,
        full_grad_fn=lambda params: params,
    )
    updates, _ = jax.eval_shape(update, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


class DrawsTest(parameterized.TestCase):
  """Draws differ over step, leaf and key, and depend on nothing else."""

  def updates(self, name, num_steps, key=None):
    """Updates of equal gradients, so that differences are draws."""
    _, step, _ = compiled(name)
    params, state = start(name)
    if key is not None:  # The key is state: nothing recompiles.
      is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      state = jax.tree.map(lambda x: jnp.copy(key) if is_key(x) else x, state)
    grads = jax.tree.map(jnp.ones_like, params)
    updates = []
    for _ in range(num_steps):
      params, state, u = step(params, state, grads, jnp.int32(0))
      updates.append(u)
    return updates

  def assert_differ(self, one, other):
    self.assertGreater(np.abs(one - other).max(), 1e-3)

  @parameterized.parameters(*(name for name in CHAINS if name not in SIBLINGS))
  def test_chain(self, name):
    self.check_chain(name)

  @parameterized.parameters(*(name for name in SIBLINGS if name in CHAINS))
  @pytest.mark.slow
  def test_chain_otherwise(self, name):
    self.check_chain(name)

  def check_chain(self, name):
    period = {'period': 3, 'momentum': 3, 'adam': 2}.get(name, 1)
    updates = self.updates(name, period + 1)
    others = self.updates(name, 1, jax.random.key(1))
    again = self.updates(name, 1, jax.random.key(0))
    rates = 1.0 if name != 'bernoulli_lora' else 0.9
    for leaf in ('dense', 'out'):
      kernels = [u[leaf]['kernel'] for u in updates]
      self.assert_differ(kernels[period] / rates, kernels[0])
      self.assert_differ(others[0][leaf]['kernel'], kernels[0])
    self.assert_differ(
        updates[0]['out']['kernel'], updates[0]['twin']['kernel']
    )
    chex.assert_trees_all_equal(again[0], updates[0])

  def test_qgd(self):
    updates, (other,) = self.updates('qgd', 2), self.updates(
        'qgd', 1, jax.random.key(1)
    )
    again = self.updates('qgd', 1)
    kernel = lambda tree: tree['out']['kernel']
    self.assert_differ(kernel(updates[0]), kernel(updates[1]))
    self.assert_differ(kernel(updates[0]), kernel(other))
    self.assert_differ(kernel(updates[0]), updates[0]['twin']['kernel'])
    chex.assert_trees_all_equal(again[0], updates[0])

  @parameterized.parameters('page', 'page_chain', 'marina_chain')
  def test_coins(self, name):
    def coins(key):
      _, step, _ = compiled(name)
      params, state = start(name)
      state = (state[0]._replace(key=key), *state[1:])
      fulls = []
      for _ in range(16):
        grads = jax.tree.map(jnp.ones_like, params)
        params, state, _ = step(params, state, grads, jnp.int32(0))
        fulls.append(bool(state[0].is_full))
      return fulls

    zero, one = coins(jax.random.key(0)), coins(jax.random.key(1))
    self.assertLen(set(zero[1:]), 2)  # Over steps.
    self.assertNotEqual(zero, one)  # Over keys.
    self.assertEqual(zero, coins(jax.random.key(0)))

  @parameterized.parameters(['page_chain'])
  def test_runs_of_a_sweep_are_the_runs_alone(self, name):
    self.check_runs_of_a_sweep_are_the_runs_alone(name)

  @parameterized.parameters('gaussian', 'marina_chain')
  @pytest.mark.slow
  def test_runs_of_a_sweep_are_the_runs_alone_otherwise(self, name):
    self.check_runs_of_a_sweep_are_the_runs_alone(name)

  def check_runs_of_a_sweep_are_the_runs_alone(self, name):
    def run_one(seed):
      tx = ALL[name](jax.random.key(seed))

      def body(carry, index):
        grads = jax.grad(loss)(carry[0], index)
        params, state, _ = step_fn(tx, *carry, grads, index)
        return (params, state), None

      params = make_params()
      carry = params, tx.init(params)
      return jax.lax.scan(body, carry, jnp.arange(4))[0][0]

    together = jax.jit(jax.vmap(run_one))(jnp.arange(3))
    alone = jax.jit(run_one)
    for seed in range(3):
      one = jax.tree.map(lambda x, seed=seed: x[seed], together)
      # Batched float32 products, four steps of a contraction.
      chex.assert_trees_all_close(one, alone(seed), rtol=1e-5, atol=1e-5)

  @parameterized.parameters(['coordinate'])
  def test_sharded_leaves_get_the_same_updates(self, name):
    self.check_sharded_leaves_get_the_same_updates(name)

  @parameterized.parameters(['gaussian'])
  @pytest.mark.slow
  def test_sharded_leaves_get_the_same_updates_otherwise(self, name):
    self.check_sharded_leaves_get_the_same_updates(name)

  def check_sharded_leaves_get_the_same_updates(self, name):
    rng = np.random.default_rng(0)
    params = {
        'w': {'kernel': jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)},
        'v': {'kernel': jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)},
    }
    tx = ALL[name](jax.random.key(0))
    mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, 'x')
    sharding = jax.sharding.NamedSharding(mesh, spec)
    self.assertLen(mesh.devices, 8)

    def updates(params):
      squares = lambda params: jax.tree.map(lambda x: 2 * x, params)
      state = tx.init(params)
      update = jax.jit(
          lambda params, state: optax.with_extra_args_support(tx).update(
              params, state, params, grad_fn=squares, full_grad_fn=squares
          )
      )
      first, state = update(params, state)
      return first, update(params, state)[0]

    whole = updates(params)
    sharded = updates(jax.device_put(params, sharding))
    # Sums of 24 products of size one, split over eight devices.
    chex.assert_trees_all_close(
        jax.device_get(sharded), jax.device_get(whole), rtol=1e-5, atol=1e-5
    )


class CompositionTest(parameterized.TestCase):
  """The chain is an optax transformation like any other."""

  def setUp(self):
    super().setUp()
    self.grads = [make_params(seed=seed) for seed in range(1, 5)]
    self.params = make_params()

  def trajectory(self, tx, grads=None):
    """Updates of the gradients given, one after another."""
    state, updates = tx.init(self.params), []
    update = jax.jit(lambda g, state, tx=tx: tx.update(g, state, self.params))
    for g in self.grads if grads is None else grads:
      u, state = update(g, state)
      updates.append(u)
    return updates

  def make(self, name, **kwargs):
    return CHAINS[name](jax.random.key(0), **kwargs)

  @parameterized.parameters(['momentum'])
  def test_chain_passes_through_optax_chain(self, name):
    self.check_chain_passes_through_optax_chain(name)

  @parameterized.parameters(['gaussian'])
  @pytest.mark.slow
  def test_chain_passes_through_optax_chain_otherwise(self, name):
    self.check_chain_passes_through_optax_chain(name)

  def check_chain_passes_through_optax_chain(self, name):
    inside = self.trajectory(
        optax.chain(optax.scale(2.0), self.make(name), optax.scale(-3.0))
    )
    doubled = [jax.tree.map(lambda x: 2 * x, g) for g in self.grads]
    outside = [
        jax.tree.map(lambda x: -3 * x, u)
        for u in self.trajectory(self.make(name), doubled)
    ]
    # Multiplications by constants, fused or not.
    chex.assert_trees_all_close(inside, outside, rtol=1e-6, atol=1e-6)

  @parameterized.parameters(['momentum'])
  def test_masked(self, name):
    self.check_masked(name)

  @parameterized.parameters(['gaussian'])
  @pytest.mark.slow
  def test_masked_otherwise(self, name):
    self.check_masked(name)

  def check_masked(self, name):
    mask = {
        'dense': {'kernel': True, 'bias': False},
        'out': {'kernel': False},
        'twin': {'kernel': True},
    }
    masked = self.trajectory(optax.masked(self.make(name), mask))
    whole = self.trajectory(self.make(name))
    for g, some, every in zip(self.grads, masked, whole, strict=True):
      expected = jax.tree.map(
          lambda is_in, u, g: u if is_in else g, mask, every, g
      )
      # Frames drawn in batches of another size: rounding.
      chex.assert_trees_all_close(some, expected, rtol=1e-6, atol=1e-6)

  @parameterized.parameters(['momentum'])
  def test_partition(self, name):
    self.check_partition(name)

  @parameterized.parameters(['gaussian'])
  @pytest.mark.slow
  def test_partition_otherwise(self, name):
    self.check_partition(name)

  def check_partition(self, name):
    labels = {
        'dense': {'kernel': 'chain', 'bias': 'full'},
        'out': {'kernel': 'chain'},
        'twin': {'kernel': 'frozen'},
    }
    tx = optax.partition(
        {
            'chain': self.make(name),
            'full': optax.sgd(0.5),
            'frozen': optax.set_to_zero(),
        },
        labels,
    )
    whole = self.trajectory(self.make(name))
    parts = self.trajectory(tx)
    for g, part, every in zip(self.grads, parts, whole, strict=True):
      expected = {
          'dense': {
              'kernel': every['dense']['kernel'],
              'bias': -0.5 * g['dense']['bias'],
          },
          'out': every['out'],
          'twin': jax.tree.map(jnp.zeros_like, g['twin']),
      }
      chex.assert_trees_all_close(part, expected, rtol=1e-6, atol=1e-6)

  @parameterized.parameters(['momentum'])
  def test_multi_steps(self, name):
    self.check_multi_steps(name)

  @parameterized.parameters(['gaussian'])
  @pytest.mark.slow
  def test_multi_steps_otherwise(self, name):
    self.check_multi_steps(name)

  def check_multi_steps(self, name):
    multi = optax.MultiSteps(self.make(name), every_k_schedule=2)
    updates = self.trajectory(multi)
    mean = lambda a, b: jax.tree.map(lambda a, b: (a + b) / 2, a, b)
    means = [mean(*self.grads[:2]), mean(*self.grads[2:])]
    expected = self.trajectory(self.make(name), means)
    zeros = jax.tree.map(jnp.zeros_like, self.params)
    chex.assert_trees_all_equal(updates[0], zeros)
    chex.assert_trees_all_equal(updates[2], zeros)
    # MultiSteps keeps a running mean, which rounds differently.
    chex.assert_trees_all_close(
        [updates[1], updates[3]], expected, rtol=1e-5, atol=1e-5
    )

  def test_schedule_multiplies_each_step(self):
    schedule = optax.piecewise_constant_schedule(0.5, {1: 0.5, 3: 0.1})
    key = jax.random.key(0)
    scheduled = self.trajectory(bl.bernoulli_lora(schedule, key, rank=2))
    plain = self.trajectory(bl.scale_by_bernoulli_chain(key, rank=2))
    for rate, one, other in zip(
        (0.5, 0.25, 0.25, 0.025), scheduled, plain, strict=True
    ):
      expected = jax.tree.map(lambda u, rate=rate: -rate * u, other)
      chex.assert_trees_all_close(one, expected, rtol=1e-6, atol=1e-6)

  def test_estimator_is_followed_by_anything(self):
    # Clipping sees the estimate of the whole gradient, before the projection.
    key = jax.random.key(0)
    params, grads = self.params, self.grads[0]
    tx = optax.chain(
        bl.mvr(momentum=0.9),
        optax.clip_by_global_norm(1e-3),
        bl.scale_by_bernoulli_chain(key, rank=9),  # The identity.
        optax.masked(optax.scale(-1.0), lambda p: jax.tree.map(jnp.ndim, p)),
    )
    updates, _ = jax.jit(
        lambda g: tx.update(g, tx.init(params), params, grad_fn=lambda p: p)
    )(grads)
    norm = optax.tree.norm(updates)
    self.assertAlmostEqual(norm / 1e-3, 1.0, places=4)


INJECTED = {
    'bernoulli_lora': (bl.bernoulli_lora, dict(learning_rate=0.1, rank=2)),
    'schedule': (
        bl.bernoulli_lora,
        dict(learning_rate=lambda count: 0.1 / (1 + count), rank=2, period=2),
    ),
    'rac_lora': (
        bl.rac_lora,
        dict(learning_rate=0.1, rank=2, side='left', inner=optax.trace(0.9)),
    ),
    'scale_by_bernoulli_chain': (
        bl.scale_by_bernoulli_chain,
        dict(rank=2, prob=0.3),
    ),
    'page': (bl.page, dict(prob=0.4)),
    'mvr': (bl.mvr, dict(momentum=0.9)),
    'qgd': (bl.qgd, dict(compressor=IDENTITY, num_clients=2)),
    'marina': (bl.marina, dict(compressor=IDENTITY, num_clients=2, prob=0.4)),
    'ef21': (bl.ef21, dict(compressor=IDENTITY, num_clients=2)),
}

# Name, whether the key is static, and whether init and update are jitted.
INJECTED_QUICK = [
    ('bernoulli_lora', False, True),
    ('schedule', True, False),
    ('rac_lora', True, True),
    ('scale_by_bernoulli_chain', False, False),
    ('page', False, True),
    ('mvr', False, False),
    ('qgd', True, False),
    ('marina', False, True),
    ('ef21', False, False),
]


class InputsTest(parameterized.TestCase):
  """What optax's own transformations take, ours do."""

  @parameterized.parameters(*INJECTED_QUICK)
  def test_inject_hyperparams(self, name, static_key, is_jitted):
    self.check_inject_hyperparams(name, static_key, is_jitted)

  @parameterized.parameters(
      *(
          case
          for case in itertools.product(INJECTED, (False, True), (False, True))
          if case not in INJECTED_QUICK
      )
  )
  @pytest.mark.slow
  def test_inject_hyperparams_otherwise(self, name, static_key, is_jitted):
    self.check_inject_hyperparams(name, static_key, is_jitted)

  def check_inject_hyperparams(self, name, static_key, is_jitted):
    factory, kwargs = INJECTED[name]
    if name != 'mvr':
      kwargs = {'key': jax.random.key(0), **kwargs}
    shapes = tuple({'rank', 'num_clients'} & set(kwargs)) if is_jitted else ()
    static = shapes + (('key',) if static_key and 'key' in kwargs else ())
    params = {'w': jnp.ones((4, 3)), 'b': jnp.zeros(3)}
    grad_fn = lambda p: jax.tree.map(lambda x: 1.0 + 0.1 * x, p)
    if 'num_clients' in kwargs:
      alone = grad_fn
      grad_fn = lambda p: jax.tree.map(
          lambda x: jnp.stack([x, 2 * x]), alone(p)
      )
    wrap = jax.jit if is_jitted else lambda f: f

    def updates_of(tx):
      update = optax.with_extra_args_support(tx).update
      step = wrap(
          lambda state: update(
              grad_fn(params),
              state,
              params,
              grad_fn=grad_fn,
              full_grad_fn=grad_fn,
          )
      )
      state = wrap(tx.init)(params)
      found = []
      for _ in range(2):
        updates, state = step(state)
        found.append(updates)
      return found

    injected = optax.inject_hyperparams(factory, static_args=static)
    chex.assert_trees_all_close(
        updates_of(injected(**kwargs)), updates_of(factory(**kwargs)), rtol=1e-6
    )

  @parameterized.parameters('bernoulli_lora', 'rac_lora', 'qgd')
  def test_what_gives_shapes_must_be_static(self, name):
    factory, kwargs = INJECTED[name]
    tx = optax.inject_hyperparams(factory)(key=jax.random.key(0), **kwargs)
    argument = 'rank' if 'rank' in kwargs else 'num_clients'
    with self.assertRaisesRegex(TypeError, rf"static_args=\('{argument}',\)"):
      jax.eval_shape(tx.init, {'w': jnp.ones((4, 3))})

  @parameterized.named_parameters(
      ('plain', lambda: bl.bernoulli_lora(0.1, jax.random.key(0), rank=2)),
      (
          'inner',
          lambda: bl.bernoulli_lora(
              0.1, jax.random.key(0), rank=2, inner=optax.scale_by_adam()
          ),
      ),
      ('page', lambda: optax.chain(page(jax.random.key(0)), optax.sgd(0.1))),
      ('mvr', lambda: optax.chain(mvr(None), optax.sgd(0.1))),
  )
  def test_numbers_and_empty_leaves_among_the_params(self, make):
    numbers = {
        'w': jnp.ones((4, 3)),
        'python': 1.0,
        'numpy': np.float32(2.0),
        'array': np.ones(2, np.float32),
        'empty': jnp.zeros((0,)),
        'flat': jnp.zeros((0, 5)),
    }
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), numbers)

    def run_steps(params):
      tx = optax.with_extra_args_support(make())
      state = tx.init(params)
      grad_fn = lambda p: jax.tree.map(lambda x: 0.5 * x, p)
      for _ in range(2):
        updates, state = tx.update(
            grad_fn(params),
            state,
            params,
            grad_fn=grad_fn,
            full_grad_fn=grad_fn,
        )
        params = optax.apply_updates(params, updates)
      return params

    chex.assert_trees_all_close(
        run_steps(numbers), run_steps(arrays), rtol=1e-6
    )
