"""Tests of A4: chains that move W at each step and have no adapter in the loss."""

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
from bernoulli_lora_jax import recipes
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


def _inner_jaxprs(jaxpr):
  """Yields a program and all programs within."""
  yield jaxpr
  for eqn in jaxpr.eqns:
    for value in eqn.params.values():
      for one in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(one, 'jaxpr', one)
        if hasattr(inner, 'eqns'):
          yield from _inner_jaxprs(inner)


class LeaveTest(parameterized.TestCase):

  @parameterized.parameters('left', 'bernoulli')
  def test_no_factors_leave(self, side):
    """They are zero: an adapter, or a recipe, of them would be of nothing."""
    chain = adapters.make_chain(_policy(side), _SGD, sketched=True)
    state = chain.init(jax.random.key(0), {'kernel': jnp.ones((5, 4))})
    with self.assertRaisesRegex(ValueError, 'sketched=True.*of_change'):
      export.of_state(chain, state)
    with self.assertRaisesRegex(ValueError, 'sketched=True: keep a check'):
      recipes.trained_factors(state, chain)


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


class FusedTest(parameterized.TestCase):
  """The kernel of the update, step by step on whatever machine."""

  @parameterized.product(mode=('nearest', 'stochastic'), rank=(20, 48))
  def test_equals_xla(self, mode, rank):
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    weight = draw(0, 128, 256).astype(jnp.bfloat16)
    left, right, key = (
        0.01 * draw(1, 128, rank),
        draw(2, rank, 256),
        jax.random.key(3),
    )
    found = fused.add_product(weight, left, right, key, mode, interpret=True)
    total = weight.astype(jnp.float32) + jnp.matmul(left, right)
    expected = total.astype(jnp.bfloat16)
    if mode == 'stochastic':
      expected = rounding.dithered(total, key)
    # Sums in another order: a number may fall to the other side of a border.
    self.assertLess(float(jnp.mean(found != expected)), 1e-3)
    wide = lambda x: np.asarray(x, np.float32)
    np.testing.assert_allclose(wide(found), wide(expected), rtol=2**-7)

  @parameterized.parameters(
      ((128, 256), jnp.bfloat16, 'stochastic', True),
      ((128, 256), jnp.float32, 'nearest', False),
      ((128, 192), jnp.bfloat16, 'nearest', False),
      ((2, 128, 256), jnp.bfloat16, 'nearest', False),
      ((128, 256), jnp.bfloat16, 'compensated', False),
  )
  def test_fits(self, shape, dtype, mode, expected):
    weight = jnp.zeros(shape, dtype)
    self.assertEqual(fused.fits(weight, mode), expected)
    self.assertFalse(fused.takes(weight, mode))  # There is no GPU.

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
