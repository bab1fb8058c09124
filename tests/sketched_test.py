"""Tests of A4: chains that move W at each step and have no adapter in the loss."""

from unittest import mock

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
from bernoulli_lora_jax import export
from bernoulli_lora_jax import fused
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import rounding
from bernoulli_lora_jax.models import decoder

_SGD, _ADAM = optax.sgd(0.3), optax.adam(0.02)
_SHAPES = dict(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)


def _config(**fields):
  return decoder.DecoderConfig(**{**_SHAPES, **fields})


def _params(config, dtype=jnp.float64):
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = decoder.Decoder(config).init(jax.random.key(0), tokens)['params']
  return jax.tree.map(lambda x: x.astype(dtype), nn.unbox(params))


def _batches(count, shape=(2, 6)):
  tokens = jax.random.randint(jax.random.key(1), (count, *shape), 0, 13)
  return [{'tokens': x} for x in tokens]


def _policy(side, rank=3, period=1, **fields):
  return bl.ChainPolicy(rank=rank, period=period, side=side, **fields)


def _chain(config, policy, tx, **kwargs):
  select = decoder.matrices(config)
  return adapters.make_chain(policy, tx, select, **kwargs)


def _trained(chain, config, params, batches):
  """Returns the state after the batches, and the losses."""
  loss = inject.by_product(decoder.make_loss(config, 4))
  step = jax.jit(lambda s, b: chain.step(s, loss, b))
  state, values = chain.init(jax.random.key(2), params), []
  for batch in batches:
    state, (value, _) = step(state, batch)
    values.append(float(value))
  return state, values


def _equations(jaxpr):
  """Yields the equations of a program and of all programs within."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'jaxpr')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _equations(inner)


def _products(jaxpr):
  """Returns (lengths summed over, numbers of the result) of all products."""
  found = []
  for eqn in _equations(jaxpr):
    if eqn.primitive.name == 'dot_general':
      (summed, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      found.append(({shape[axis] for axis in summed}, eqn.outvars[0].aval.size))
  return found


class LeaveTest(parameterized.TestCase):

  @parameterized.parameters('left', 'bernoulli')
  def test_no_factors_leave(self, side):
    """They are zero: an adapter of them would be of nothing."""
    chain = adapters.make_chain(_policy(side), _SGD, sketched=True)
    state = chain.init(jax.random.key(0), {'kernel': jnp.ones((5, 4))})
    with self.assertRaisesRegex(ValueError, 'sketched=True.*of_change'):
      export.of_state(chain, state)


class SameStepsTest(parameterized.TestCase):

  def assert_same(self, policy, tx, num_steps, **fields):
    with jax.enable_x64(True):
      config = _config(**fields)
      params, batches = _params(config), _batches(num_steps)
      chain = _chain(config, policy, tx)
      adapter, ours = _trained(chain, config, params, batches)
      sketched = _chain(config, policy, tx, sketched=True)
      state, values = _trained(sketched, config, params, batches)
      np.testing.assert_allclose(values, ours, rtol=1e-9)
      merged = chain.params(adapter)
      # Sums in another order, through fifty steps.
      chex.assert_trees_all_close(
          sketched.params(state), merged, rtol=0, atol=1e-9
      )
      change = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), merged, params)
      moved = jax.tree.leaves(
          change['layers' if config.scan_layers else 'layers_0']
      )
      self.assertGreater(max(map(float, moved)), 1e-2)

  def test_left(self):
    self.assert_same(_policy('left', period=5), _ADAM, 12, scan_layers=True)

  def test_a_coin_a_matrix(self):
    policy = _policy('bernoulli', period=2)
    self.assert_same(policy, _ADAM, 8, scan_layers=False)

  @parameterized.product(
      side=('left', 'right', 'bernoulli'),
      scan_layers=(True, False),
      with_adam=(True, False),
      remat=('none', 'full'),
  )
  @pytest.mark.slow
  def test_fifty_steps(self, side, scan_layers, with_adam, remat):
    policy = _policy(side, period=5 if with_adam else 1)
    tx = _ADAM if with_adam else _SGD
    self.assert_same(policy, tx, 50, scan_layers=scan_layers, remat=remat)

  @parameterized.parameters(
      dict(sketch=bl.sketches.coordinate()),
      dict(shared_coin=True),
      dict(alpha=6.0),
      dict(frame='raw'),
      dict(warmup=2),
      dict(rank=7),  # Above some sides.
      dict(reset_optimizer=False, resample=False),
      dict(prob=1.0),
  )
  @pytest.mark.slow
  def test_other_policies(self, **fields):
    policy = _policy('bernoulli', period=4, **fields)
    self.assert_same(policy, _ADAM, 10, scan_layers=False)

  @pytest.mark.slow
  def test_gradient_mode(self):
    """With a period of one and SGD a step is that of A1."""
    with jax.enable_x64(True):
      config = _config(scan_layers=True)
      params, batches = _params(config), _batches(4)
      policy = _policy('bernoulli')
      chain = _chain(config, policy, _SGD, sketched=True)
      state, _ = _trained(chain, config, params, batches)
      tx = bl.scale_by_bernoulli_chain(
          jax.random.key(2), rank=3, matrices=decoder.matrices(config)
      )
      mask = bl.matrices.mask(params, decoder.matrices(config))
      tx = optax.chain(
          tx,
          optax.masked(
              optax.set_to_zero(), jax.tree.map(lambda x: not x, mask)
          ),
          optax.sgd(0.3),
      )
      loss = decoder.make_loss(config, 4)
      opt_state = tx.init(params)
      for batch in batches:
        grads = jax.grad(lambda p, b=batch: loss(p, b, None)[0])(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
      chex.assert_trees_all_close(chain.params(state), params, atol=1e-12)


class ProgramTest(parameterized.TestCase):
  """What a step computes and keeps: neither x^T dy nor, on the left, x."""

  TOKENS = 7, 11  # Rows and positions: lengths that nothing else has.

  def _step(self, sketched, side='left', **fields):
    config = _config(**fields)
    chain = _chain(config, _policy(side), _SGD, sketched=sketched)
    state = chain.init(jax.random.key(2), _params(config, jnp.float32))
    loss = inject.by_product(decoder.make_loss(config, 4))
    batch = {'tokens': jnp.zeros(self.TOKENS, jnp.int32)}
    return lambda s: chain.step(s, loss, batch), state

  @parameterized.product(side=('left', 'right'), scan_layers=(True, False))
  def test_no_gradient_of_full_size(self, side, scan_layers):
    step, state = self._step(True, side, scan_layers=scan_layers)
    found = _products(jax.make_jaxpr(step)(state).jaxpr)
    self.assertGreater(len(found), 10)
    # 8 x 4 is the smallest kernel that is selected.
    over_tokens = [size for summed, size in found if {7, 11} <= summed]
    self.assertNotEmpty(over_tokens)
    self.assertLessEqual(max(over_tokens), 3 * 12)  # r n, the thin gradients.
    # What gradient mode has is seen by this: 8 x 12.
    loss = decoder.make_loss(_config(scan_layers=scan_layers), 4)
    batch = {'tokens': jnp.zeros(self.TOKENS, jnp.int32)}
    grad = jax.grad(lambda params: loss(params, batch, None)[0])
    full = _products(jax.make_jaxpr(grad)(state.params).jaxpr)
    self.assertIn(8 * 12, [size for summed, size in full if {7, 11} <= summed])

  @parameterized.parameters(('left', 1), ('right', 2), ('bernoulli', 2))
  def test_what_is_kept(self, side, num_wide):
    """Of y = sin(h) W: cos(h), and x = sin(h) where the left side is trained."""
    policy, params = _policy(side, rank=2), {'w': jnp.ones((13, 5))}
    chain = adapters.make_chain(policy, _SGD, bl.Matrices('w'), sketched=True)
    state, kept = chain.init(jax.random.key(0), params), []

    def loss(params, factors, h):
      of = lambda params, h: jnp.sum(jnp.sin(h) @ params['w'])
      entered = inject.by_product(of)
      value, pull = jax.vjp(lambda f, h: entered(params, f, h), factors, h)
      kept.extend(x.shape for x in jax.tree.leaves(pull))
      return value, None

    jax.eval_shape(
        lambda s, h: chain.step(s, loss, h), state, jnp.ones((7, 13))
    )
    self.assertLen([shape for shape in kept if shape == (7, 13)], num_wide)

  def test_remat_keeps_what_is_thin(self):
    """x L is computed forward, once; the layers' own products again."""
    step, state = self._step(True, scan_layers=True, remat='full')
    jaxpr = jax.make_jaxpr(step)(state).jaxpr
    again = [
        size
        for eqn in _equations(jaxpr)
        if eqn.params.get('differentiated')
        for _, size in _products(eqn.params['jaxpr'])
    ]
    thin, wide = 7 * 11 * 3, 7 * 11 * 12
    self.assertIn(wide, again)
    self.assertNotIn(thin, again)
    found = [size for _, size in _products(jaxpr)]
    self.assertEqual(found.count(thin), 7)  # The matrices of a layer.


class RefusalTest(parameterized.TestCase):

  @parameterized.parameters('lora', 'cola', 'asymmetric')
  def test_policies(self, name):
    make = getattr(bl.ChainPolicy, name)
    args = {'cola': (4,), 'asymmetric': ('left',)}.get(name, ())
    with self.assertRaisesRegex(ValueError, 'got side=.*period=.*sketched out'):
      adapters.make_chain(make(2, *args), _SGD, sketched=True)

  def test_decay_of_a_factor_that_is_not_there(self):
    chain = adapters.make_chain(
        _policy('left'), optax.adamw(0.1), sketched=True
    )
    state = chain.init(jax.random.key(0), {'kernel': jnp.ones((5, 4))})
    loss = inject.by_product(lambda p, x: (jnp.sum(x @ p['kernel']), None))
    with self.assertRaisesRegex(ValueError, 'params'):
      chain.step(state, loss, jnp.ones((3, 5)))

  def test_a_derivative_by_the_weights(self):
    chain = adapters.make_chain(_policy('left'), _SGD, sketched=True)
    state = chain.init(jax.random.key(0), {'kernel': jnp.ones((5, 4))})
    entered = inject.by_product(lambda p, x: jnp.sum(x @ p['kernel']))

    def loss(params, factors, x):
      grads = jax.grad(lambda p: entered(p, factors, x))(params)
      return entered(params, factors, x), grads

    with self.assertRaisesRegex(ValueError, 'one by kernel, which a sketched'):
      chain.step(state, loss, jnp.ones((3, 5)))


class OtherUsesTest(parameterized.TestCase):

  def test_a_use_that_is_no_product_has_its_derivative(self):
    """A penalty on W: formed, told of, and right."""
    chains = [
        adapters.make_chain(_policy('left'), _SGD, sketched=sketched)
        for sketched in (True, False)
    ]
    penalty = lambda p, x: (
        jnp.sum(jnp.sin(x @ p['kernel'])) + jnp.sum(p['kernel'] ** 3),
        None,
    )
    params, found = {'kernel': jnp.ones((5, 4))}, []
    for chain in chains:
      state = chain.init(jax.random.key(0), params)
      with self.assertWarnsRegex(inject.FormedWarning, 'kernel is used by'):
        state, _ = chain.step(
            state, inject.by_product(penalty), jnp.ones((3, 5))
        )
      found.append(chain.params(state))
    chex.assert_trees_all_close(*found, atol=1e-5)
    self.assertGreater(float(jnp.abs(found[0]['kernel'] - 1).max()), 0.1)

  @pytest.mark.slow
  def test_vmap(self):
    chain = adapters.make_chain(_policy('bernoulli'), _SGD, sketched=True)
    loss = inject.by_product(
        lambda p, x: (jnp.sum(jnp.sin(x @ p['kernel'])), 0)
    )

    def run(key):
      params = {'kernel': jax.random.normal(key, (5, 4))}
      state = chain.init(key, params)
      for _ in range(3):
        state, _ = chain.step(state, loss, jnp.ones((3, 5)))
      return state.params

    keys = jax.random.split(jax.random.key(0), 3)
    one = [run(key) for key in keys]
    many = jax.jit(jax.vmap(run))(keys)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *one)
    chex.assert_trees_all_close(many, stacked, atol=1e-6)


class FusedTest(parameterized.TestCase):
  """The kernel of the update, step by step on whatever machine."""

  @parameterized.product(
      mode=('nearest', 'stochastic'), rank_batch=((5, ()), (20, (2, 3)))
  )
  def test_equals_xla(self, mode, rank_batch):
    rank, batch = rank_batch
    draw = lambda i, *shape: jax.random.normal(
        jax.random.key(i), (*batch, *shape)
    )
    weight = draw(0, 64, 256).astype(jnp.bfloat16)
    left, right = 0.01 * draw(1, 64, rank), draw(2, rank, 256)
    keys = jax.random.split(jax.random.key(3), batch)
    found = fused.add_product(weight, left, right, keys, mode, interpret=True)
    total = weight.astype(jnp.float32) + jnp.matmul(left, right)
    expected = total.astype(jnp.bfloat16)
    if mode == 'stochastic':
      dithered = rounding.dithered
      for _ in batch:
        dithered = jax.vmap(dithered)
      expected = dithered(total, keys)
    # Sums in another order: a number may fall to the other side of a border.
    self.assertLess(float(jnp.mean(found != expected)), 1e-3)
    wide = lambda x: np.asarray(x, np.float32)
    np.testing.assert_allclose(wide(found), wide(expected), rtol=2**-7)

  @parameterized.parameters(
      ((64, 256), jnp.bfloat16, 32, 'stochastic', True),
      ((2, 64, 256), jnp.bfloat16, 4, 'nearest', True),
      ((64, 256), jnp.bfloat16, 33, 'nearest', False),
      ((64, 256), jnp.float32, 4, 'nearest', False),
      ((64, 192), jnp.bfloat16, 4, 'nearest', False),
      ((48, 256), jnp.bfloat16, 4, 'nearest', False),
      ((64, 256), jnp.bfloat16, 4, 'compensated', False),
  )
  def test_fits(self, shape, dtype, rank, mode, expected):
    weight = jnp.zeros(shape, dtype)
    self.assertEqual(fused.fits(weight, rank, mode), expected)
    self.assertFalse(fused.takes(weight, rank, mode))  # There is no GPU.

  def test_a_step_takes_it(self):
    """The same step by the kernel and by XLA, where a matrix fits its tiles."""
    shapes = {'a': (32, 128), 'b': (128, 256), 'c': (256, 7)}
    params = {
        name: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }

    def loss(params, factors, x):
      def of(params, x):
        for name in shapes:
          x = jnp.tanh(x @ params[name])
        return jnp.sum(x.astype(jnp.float32))

      return inject.by_product(of)(params, factors, x), None

    chain = adapters.make_chain(
        _policy('left', period=5), optax.sgd(1.0), sketched=True
    )
    state, given = chain.init(jax.random.key(2), params), []
    x = jax.random.normal(jax.random.key(3), (16, 32), jnp.bfloat16)
    expected, _ = chain.step(state, loss, x)
    add = fused.add_product

    def kernel(weight, *args):
      given.append(weight.shape)
      return add(weight, *args, interpret=True)

    with mock.patch.multiple(fused, takes=fused.fits, add_product=kernel):
      found, _ = chain.step(state, loss, x)
    self.assertEqual(given, [shapes['a'], shapes['b']])
    for name, old in params.items():
      moved = expected.params[name] != old
      self.assertGreater(jnp.mean(moved), 0.1)
      # Sums in another order: a number may fall to the other side of a border.
      differs = found.params[name] != expected.params[name]
      self.assertLess(jnp.mean(differs), 1e-3)


class RoundingTest(parameterized.TestCase):

  def test_dithered_is_right_in_the_mean(self):
    ulp = 2.0**-7
    x = jnp.full((400, 500), 1 + 0.3 * ulp)
    found = np.asarray(rounding.dithered(x, jax.random.key(0)), np.float32)
    self.assertEqual(set(np.unique(found)), {1.0, np.float32(1 + ulp)})
    error = np.sqrt(0.3 * 0.7 / x.size)
    self.assertAlmostEqual(np.mean(found > 1), 0.3, delta=5 * error)
    # Neither rows nor columns repeat.
    for axis in (0, 1):
      part = np.mean(found > 1, axis=axis)
      spread = np.sqrt(0.3 * 0.7 / x.shape[axis])
      self.assertAlmostEqual(part.std() / spread, 1, delta=0.2)
    other = np.asarray(rounding.dithered(x, jax.random.key(1)), np.float32)
    # 0.3^2 + 0.7^2 agree by chance.
    self.assertAlmostEqual(np.mean(found == other), 0.58, delta=0.01)
    kept = jnp.array([1.5, -2.0, np.inf, -np.inf, np.nan, 0.0])
    rounded = rounding.dithered(kept, jax.random.key(0)).astype(jnp.float32)
    np.testing.assert_array_equal(rounded, kept)
