"""Tests of parts of a batch: what is combined must not depend on their number."""

import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import parts

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
MASK = np.arange(12) % 5 > np.arange(12) // 6  # Other counts in other parts.
PARAMS = {'w': np.ones((4, 12), np.float32)}  # As wide as the whole batch.


def outputs(params, batch):
  """Returns one output of each kind; square of the batch's size nowhere."""
  out = batch['x'] @ params['w'] * batch['scale']
  live = batch['mask'][:, None]
  return {
      'rows': out,
      'time_major': out.T,
      'flat': out.reshape(-1),
      'rank': jnp.sum(out, 0),  # (12,), by accident as long as the batch.
      'total': jnp.sum(out * live),
      'count': jnp.sum(batch['mask'], dtype=jnp.int32),
      'largest': jnp.max(out),
      'least': jnp.min(batch['number']),
      'is_any': jnp.any(out > 20),
      'is_all': jnp.all(out > -99),
      'mean': jnp.sum(out * live) / jnp.sum(live),
  }


REDUCTIONS = {
    'rank|total': 'sum',
    'largest': 'max',
    'least': 'min',
    'is_any': 'any',
    'is_all': 'all',
}


def loss(params, batch):
  aux = outputs(params, batch)
  value = aux['mean'] ** 1
  return value, parts.Weighted(aux['count'], aux)


def inputs():
  return {
      'x': jnp.asarray(X),
      'mask': jnp.asarray(MASK),
      'number': jnp.arange(12),
      'scale': 2.0,
      'key': KEY,
  }


class PartsTest(parameterized.TestCase):

  @parameterized.parameters((2, 1), (3, 1), (12, 1), (1, 2), (2, 3))
  def test_nothing_depends_on_the_number_of_parts(self, num, devices):
    grad_fn = jax.value_and_grad(loss, has_aux=True)
    whole = jax.jit(grad_fn)(PARAMS, inputs())
    average = bl.devices.Mapped('device') if devices > 1 else None
    combined = bl.accumulate(grad_fn, num, REDUCTIONS, average=average)
    if average is None:
      found = jax.jit(combined)(PARAMS, inputs())
    else:
      shares = inputs()
      split = lambda x: x.reshape(devices, -1, *x.shape[1:])
      axes = {'x': 0, 'mask': 0, 'number': 0, 'scale': None, 'key': None}
      for name in ('x', 'mask', 'number'):
        shares[name] = split(shares[name])
      mapped = jax.vmap(
          functools.partial(combined, PARAMS),
          in_axes=(axes,),
          axis_name='device',
      )
      found = jax.tree.map(lambda x: x[-1], jax.jit(mapped)(shares))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, whole)
    # Sums of 144 terms of size ten in float32.
    chex.assert_trees_all_close(found, whole, rtol=1e-4, atol=1e-4)

  def test_a_part_of_weight_zero_adds_nothing(self):
    batch = {'x': jnp.asarray(X), 'mask': jnp.arange(12) < 4}

    def masked(params, batch):
      count = jnp.sum(batch['mask'])
      rows = jnp.sum((batch['x'] @ params['w']) ** 2, -1) * batch['mask']
      return jnp.sum(rows) / count, parts.Weighted(count)  # 0 / 0.

    grad_fn = jax.value_and_grad(masked, has_aux=True)
    found = bl.accumulate(grad_fn, 3)(PARAMS, batch)
    # The first part is all there is.
    chex.assert_trees_all_close(found, grad_fn(PARAMS, batch), rtol=1e-5)

  @parameterized.parameters('typed', 'array of keys', 'in the batch')
  def test_noise(self, kind):
    def noise(params, batch, key=None):
      key = batch['key'] if key is None else key
      key = key if key.ndim == 0 else key[0]
      draw = jax.random.uniform(key)
      return params['w'].sum(), {'noise': draw + 0 * batch['x'].sum(1)}

    batch = {'x': jnp.asarray(X), 'key': KEY}
    args = {'typed': (KEY,), 'array of keys': (KEY[None],)}.get(kind, ())
    found = bl.accumulate(jax.value_and_grad(noise, has_aux=True), 4)(
        PARAMS, batch, *args
    )
    rows = np.asarray(found[0][1]['noise'])[::3]
    # A key in the batch is the same for all parts, one in args for none.
    self.assertLen(np.unique(rows), 1 if kind == 'in the batch' else 4)

  def test_devices_differ_in_their_noise(self):
    noise = lambda params, batch, key: jax.random.normal(key)
    run = parts.accumulate(noise, 1, average=bl.devices.Mapped('devices'))
    key = jax.random.key(0)
    found = jax.vmap(run, (None, 0, None), axis_name='devices')(
        0.0, jnp.ones((4, 2)), key
    )
    each = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(4)]
    np.testing.assert_allclose(found, np.full(4, np.mean(each)), rtol=1e-5)

  def test_one_part_is_the_function_itself(self):
    grad_fn = lambda params, batch, key: jax.random.uniform(key) + batch.sum()
    found = bl.accumulate(grad_fn, 1)({}, jnp.ones(3), KEY)
    self.assertEqual(found, grad_fn({}, jnp.ones(3), KEY))

  @parameterized.parameters(
      (dict(num=5), ValueError, 'num_micro_batches=5 to divide.* axis of 12'),
      (dict(batch={'y': jnp.ones(8)}), ValueError, r"batch\['y'\].*got 8"),
      (dict(aux=lambda b: b['x'].sum() > 0), ValueError, "'any'"),
      (dict(aux=lambda b: b['x'] @ b['x'].T), ValueError, 'one way to combine'),
      (dict(reductions={'nothing': 'sum'}), ValueError, "'nothing'"),
      (dict(reductions={'a': 'count'}), ValueError, r"reductions\['a'\] in"),
      (dict(reductions={'(': 'sum'}), ValueError, 'regular expression'),
      (dict(args=(jax.random.PRNGKey(0),)), TypeError, 'typed key'),
  )
  def test_what_is_refused(self, given, error, message):
    aux = given.get('aux', lambda batch: batch['x'].sum())
    grad_fn = jax.value_and_grad(
        lambda params, batch, *_: (params['w'].sum(), {'a': aux(batch)}),
        has_aux=True,
    )
    batch = {'x': jnp.asarray(X), **given.get('batch', {})}
    with self.assertRaisesRegex(error, message):
      combined = bl.accumulate(
          grad_fn, given.get('num', 2), given.get('reductions')
      )
      combined(PARAMS, batch, *given.get('args', ()))

  def test_no_axis_of_examples(self):
    with self.assertRaisesRegex(ValueError, 'leading axis of examples'):
      bl.accumulate(lambda p, b: p, 2)(1.0, {'scale': 2.0})

  @parameterized.parameters(
      (lambda x: jnp.sum(x > 0),),
      (lambda x: x.sum(1),),
      (lambda x: x.sum() > 0,),
  )
  def test_a_function_that_averages_refuses_what_is_no_mean(self, aux):
    grad_fn = jax.value_and_grad(
        lambda params, x: ((x @ params['w']).mean(), {'out': aux(x)}),
        has_aux=True,
    )
    mean = lambda out: jax.lax.pmean(out, 'device')
    step = functools.partial(parts.averaged(grad_fn, mean), PARAMS)
    with self.assertRaisesRegex(ValueError, 'out'):
      jax.vmap(step, axis_name='device')(X.reshape(2, 6, 4))

  @parameterized.parameters('averaged', 'over_devices')
  def test_devices_are_averaged_by_weight(self, how):
    def masked(params, batch):
      x, mask = batch
      rows = (x @ params['w']).sum(1) * mask
      count = jnp.sum(mask, dtype=jnp.int32)
      return rows.sum() / count, parts.Weighted(count)

    grad_fn = jax.value_and_grad(masked, has_aux=True)
    batch = jnp.asarray(X), jnp.asarray(MASK)
    if how == 'averaged':
      step = parts.averaged(grad_fn, lambda out: jax.lax.pmean(out, 'device'))
    else:
      devices = bl.devices.Mapped('device')
      step = lambda *args: parts.over_devices(grad_fn(*args), devices)
    halves = jax.tree.map(lambda x: x.reshape(2, 6, *x.shape[1:]), batch)
    step = jax.vmap(functools.partial(step, PARAMS), axis_name='device')
    (value, _), grads = step(halves)
    (expected, _), whole = grad_fn(PARAMS, batch)
    np.testing.assert_allclose(value, [expected] * 2, rtol=1e-5)
    # Twelve terms of size one in float32.
    np.testing.assert_allclose(grads['w'][0], whole['w'], rtol=1e-4, atol=1e-5)

  def test_chain_of_adapters(self):
    found = []
    for num in (1, 3):
      chain = bl.adapters.make_chain(
          bl.ChainPolicy.lora(2),
          optax.sgd(0.01),
          num_micro_batches=num,
          reductions=REDUCTIONS,
      )
      state = chain.init(KEY, PARAMS)
      adapted = bl.inject.by_addition(loss)
      step = jax.jit(chain.step, static_argnums=1)
      state, value = step(state, adapted, inputs())
      found.append((state.factors, value))
    # Sums of 144 terms of size ten in float32.
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-4)
