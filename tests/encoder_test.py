"""The encoder against stored results of the reference, and its own laws."""

import dataclasses
import functools
import pathlib
import tempfile
import warnings

from absl.testing import absltest
from absl.testing import parameterized
import chex
import encoders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import parts
from bernoulli_lora_jax.models import encoder
from bernoulli_lora_jax.models import hf

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'encoders.npz'
NAMES = tuple(encoders.CONFIGS)
# Of float32 in another order of sums; hidden states are of order one.
TOLERANCE = 2e-5


@functools.cache
def loaded(name, **run):
  if name == 'roberta':  # Whose class has a pooler that no classifier reads.
    run = {'pooling': 'pooler', **run}
  with tempfile.TemporaryDirectory() as scratch:
    return hf.load(encoders.write(scratch, name), **run)


def batch_of(name, seed=0):
  return encoders.batch(encoders.CONFIGS[name], seed)


def value(config, params, batch):
  """Returns the loss of the reference, with what an encoder returns beside it."""
  out = encoder.apply(
      config, params, batch['tokens'], batch['mask'], batch['types']
  )
  if config.num_labels:
    loss, _ = encoder.make_classification_loss(config)(params, batch)
  else:
    loss = jnp.sum(out.hidden * encoders.slope(out.hidden.shape))
  return loss, out


@functools.partial(jax.jit, static_argnums=0)
def results(config, params, batch):
  """Returns values and all gradients, as `encoder_reference.results`."""
  both = jax.value_and_grad(value, argnums=1, has_aux=True)
  (loss, out), grads = both(config, params, batch)
  found = {'hidden': out.hidden, 'pooled': out.pooled, 'loss': loss}
  return found | ({'logits': out.logits} if config.num_labels else {}), grads


def stored_results(config, params, batch):
  found, grads = results(config, params, batch)
  if config.scan_layers:
    kernel = grads['layers']['attention']['self']['query']['kernel'][1]
  else:
    kernel = grads['layers_1']['attention']['self']['query']['kernel']
  return {**found, 'grad': kernel}


def distance(ours, theirs):
  """Returns the largest difference, in terms of the largest entry."""
  assert ours.keys() == theirs.keys()
  return max(
      float(np.max(np.abs(ours[k] - theirs[k])) / np.max(np.abs(theirs[k])))
      for k in theirs
  )


@functools.cache
def golden(name):
  with np.load(GOLDEN) as stored:
    return {
        path.removeprefix(f'{name}/'): x
        for path, x in stored.items()
        if path.startswith(f'{name}/')
    }


class GoldenTest(parameterized.TestCase):

  @parameterized.product(name=NAMES, scan_layers=(True, False))
  def test_equals_the_reference(self, name, scan_layers):
    model = loaded(name, scan_layers=scan_layers)
    ours = stored_results(model.config, model.params, batch_of(name))
    self.assertLess(distance(ours, golden(name)), TOLERANCE)

  @parameterized.parameters(
      ('bert', 'norm_eps', 1e-3),
      ('bert', 'num_heads', 8),
      ('bert', 'pooling', 'cls'),
      ('bert_classifier', 'pooling', 'cls'),
      ('bert_classifier', 'pooling', 'mean'),
      ('roberta', 'pad_token', None),
      ('roberta', 'pad_token', 2),
      ('roberta_classifier', 'pooling', 'mean'),
  )
  def test_a_feature_that_is_off_shows(self, name, field, other):
    model = loaded(name)
    config = dataclasses.replace(model.config, **{field: other})
    ours = stored_results(config, model.params, batch_of(name))
    self.assertGreater(distance(ours, golden(name)), 50 * TOLERANCE)

  @parameterized.parameters('mask', 'types')
  def test_what_is_not_given_shows(self, what):
    model = loaded('bert')
    batch = {**batch_of('bert')}
    batch[what] = np.ones_like(batch[what])
    ours = stored_results(model.config, model.params, batch)
    self.assertGreater(distance(ours, golden('bert')), 50 * TOLERANCE)

  @parameterized.product(name=NAMES)
  def test_a_weight_that_is_lost_shows(self, name):
    model = loaded(name)
    batch = batch_of(name)
    exact = value(model.config, model.params, batch)
    leaves = bl.matrices.named_leaves(model.params)
    run = jax.jit(value, static_argnums=0)
    for path, leaf in leaves.items():
      if path.endswith('key/bias'):  # Softmax takes no notice of it.
        continue
      lost = {**leaves, path: jnp.zeros_like(leaf)}
      params = jax.tree.structure(model.params).unflatten(lost.values())
      ours = run(model.config, params, batch)
      moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), ours, exact)
      self.assertGreater(max(jax.tree.leaves(moved)), 50 * TOLERANCE, path)


class LayoutTest(parameterized.TestCase):

  @parameterized.parameters((True, 'dots'), (True, 'full'), (False, 'full'))
  def test_remat_changes_nothing(self, scan_layers, remat):
    model = loaded('bert_classifier', scan_layers=scan_layers)
    config = dataclasses.replace(model.config, remat=remat)
    batch = batch_of('bert_classifier')
    ours = stored_results(config, model.params, batch)
    self.assertLess(distance(ours, golden('bert_classifier')), TOLERANCE)

  def test_remat_keeps_less(self):
    model = loaded('bert')

    def residuals(remat):
      config = dataclasses.replace(model.config, remat=remat)
      batch = batch_of('bert')
      _, vjp = jax.vjp(lambda p: value(config, p, batch)[0], model.params)
      return sum(x.size for x in jax.tree.leaves(vjp))

    kept = {remat: residuals(remat) for remat in ('none', 'dots', 'full')}
    self.assertLess(kept['full'], kept['dots'])
    self.assertLess(kept['dots'], kept['none'])

  def test_dtype_of_the_computation(self):
    model = loaded('bert_classifier')
    config = dataclasses.replace(model.config, dtype=jnp.bfloat16)
    batch = batch_of('bert_classifier')
    loss, out = value(config, model.params, batch)
    self.assertEqual({x.dtype for x in out}, {jnp.dtype(jnp.bfloat16)})
    self.assertEqual(loss.dtype, jnp.float32)
    exact = golden('bert_classifier')['hidden']
    # Three layers, each rounded to 2^-9 a few times; entries are of order one.
    ours = out.hidden.astype(jnp.float32)
    chex.assert_trees_all_close(ours, exact, atol=0.15)

  def test_layers_compile_once_whatever_their_number(self):
    def size(num):
      config = dataclasses.replace(loaded('bert').config, num_layers=num)
      tokens = jnp.zeros((1, 8), jnp.int32)
      model = encoder.Encoder(config)
      shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
      run = lambda p: jnp.sum(encoder.apply(config, p, tokens).hidden)
      program = jax.make_jaxpr(jax.grad(run))(shapes['params'])
      return len(str(program).splitlines())

    self.assertEqual(size(3), size(30))

  @parameterized.parameters(
      (dict(num_heads=5), 'num_heads to divide hidden_size'),
      (dict(remat='some'), 'remat in'),
      (dict(pooling='max'), 'pooling in'),
      (dict(head='wide'), 'head in'),
      (dict(pooler=False), "'cls' or 'mean' without a pooler"),
      (dict(num_layers=0), 'num_layers >= 1'),
      (dict(num_labels=-1), 'num_labels >= 0'),
      (dict(norm_eps=-1e-6), 'norm_eps >= 0'),
      (dict(pad_token=-1), 'pad_token >= 0'),
      (dict(pad_token=39), 'a position'),
      (dict(dtype='int8'), 'dtype of floating point'),
  )
  def test_rejects(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(loaded('bert').config, **change)

  @parameterized.parameters(
      (dict(tokens=np.zeros((0, 5), int)), r'tokens of shape .*\(0, 5\)'),
      (dict(mask=np.ones((2, 4))), 'mask of shape'),
      (dict(types=np.ones(5, int)), 'types of shape'),
      (dict(tokens=np.zeros((1, 41), int)), 'at most 40 tokens.*length=41'),
  )
  def test_rejects_inputs(self, change, message):
    model = loaded('bert')
    given = dict(tokens=np.zeros((2, 5), int)) | change
    with self.assertRaisesRegex(ValueError, message):
      encoder.apply(model.config, model.params, **given)

  def test_positions_that_roberta_does_not_use(self):
    self.assertEqual(loaded('bert').config.max_length, 40)
    self.assertEqual(loaded('roberta').config.max_length, 38)

  @parameterized.parameters(-1, 96)
  def test_an_unknown_token_is_nan(self, token):
    model = loaded('bert')
    tokens = batch_of('bert')['tokens'].copy()
    tokens[0, 2] = token
    out = jax.jit(encoder.apply, static_argnums=0)(
        model.config, model.params, tokens
    )
    is_nan = np.isnan(out.hidden).any(axis=(1, 2))
    np.testing.assert_array_equal(is_nan, [True, False, False])


class PaddingTest(parameterized.TestCase):

  @parameterized.parameters('bert_classifier', 'roberta_classifier')
  def test_is_not_seen(self, name):
    """A row is what it is alone, whatever stands in its padding."""
    for pooling in ('cls', 'mean'):
      model = loaded(name, pooling=pooling)
      batch = batch_of(name)
      tokens = np.where(batch['mask'], batch['tokens'], 7)
      run = jax.jit(encoder.apply, static_argnums=0)
      out = run(model.config, model.params, tokens, batch['mask'])
      alone = run(model.config, model.params, tokens[2:, :5])
      chex.assert_trees_all_close(
          (out.hidden[2, :5], out.pooled[2], out.logits[2]),
          (alone.hidden[0], alone.pooled[0], alone.logits[0]),
          atol=TOLERANCE,
      )

  def test_mean(self):
    hidden = np.random.RandomState(0).standard_normal((3, 4, 2))
    hidden = hidden.astype(np.float32)
    mask = encoder.mask_of(np.array([4, 2, 0]), 4)
    hidden[2] = np.nan  # Of padding alone.
    expected = [hidden[0].mean(0), hidden[1, :2].mean(0), [0, 0]]
    for kind in (bool, int):
      got = encoder.mean(hidden, mask.astype(kind))
      chex.assert_trees_all_close(got, np.array(expected), rtol=1e-6)
    got = encoder.mean(hidden[:2])
    chex.assert_trees_all_close(got, hidden[:2].mean(1), rtol=1e-6)

  def test_a_row_of_padding_alone_is_finite(self):
    model = loaded('bert', pooling='mean')
    batch = batch_of('bert')
    mask = batch['mask'] & (np.arange(3) != 1)[:, None]
    config, run = model.config, jax.jit(encoder.apply, static_argnums=0)
    out = run(config, model.params, batch['tokens'], mask)
    self.assertTrue(np.isfinite(out.hidden).all())
    chex.assert_trees_all_equal(out.pooled[1], jnp.zeros(32))


class LossTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.model = loaded('bert_classifier')
    self.batch = {
        k: jnp.asarray(x) for k, x in batch_of('bert_classifier').items()
    }
    self.loss = encoder.make_classification_loss(self.model.config)

  def run_loss(self, **change):
    batch = {k: x for k, x in {**self.batch, **change}.items() if x is not None}
    return jax.jit(self.loss)(self.model.params, batch)

  def test_weights_and_counts(self):
    logits = golden('bert_classifier')['logits']
    told = np.argmax(logits, axis=1)
    labels = np.array([told[0], told[1], (told[2] + 1) % 5])
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    each = -log_probs[np.arange(3), labels]
    got, weighted = self.run_loss(labels=labels)
    chex.assert_trees_all_close(got, each.mean(), rtol=1e-5)
    self.assertEqual(float(weighted.weight), 3)
    self.assertEqual(int(weighted.aux['correct']), 2)
    self.assertEqual(weighted.aux['correct'].dtype, jnp.int32)
    self.assertAlmostEqual(float(weighted.aux['accuracy']), 2 / 3, places=6)
    weights = np.array([3.0, 0.0, 1.0])
    got, weighted = self.run_loss(labels=labels, weights=weights)
    chex.assert_trees_all_close(got, (3 * each[0] + each[2]) / 4, rtol=1e-5)
    self.assertEqual(float(weighted.weight), 4)
    self.assertEqual(int(weighted.aux['correct']), 1)
    self.assertAlmostEqual(float(weighted.aux['accuracy']), 3 / 4, places=6)

  def test_lengths(self):
    lengths = self.batch['mask'].sum(axis=1)
    by_lengths = self.run_loss(mask=None, lengths=lengths)
    chex.assert_trees_all_equal(by_lengths, self.run_loss())
    with self.assertRaisesRegex(ValueError, 'a mask or lengths'):
      self.run_loss(lengths=lengths)

  def test_labels(self):
    weights = np.array([1.0, 0.0, 1.0])
    exact, _ = self.run_loss(weights=weights)
    for label in (-100, -1, 5):
      labels = self.batch['labels'].at[1].set(label)
      self.assertTrue(np.isnan(self.run_loss(labels=labels)[0]))
      ignored = self.run_loss(labels=labels, weights=weights)[0]
      chex.assert_trees_all_equal(ignored, exact)
    none = self.run_loss(weights=np.zeros(3))
    self.assertEqual(float(none[0]), 0)

  def test_micro_batches(self):
    """Parts combine by their weights into the batch."""
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]]), self.batch)
    batch['weights'] = jnp.array([1.0, 0.0, 2.0, 1.0, 1.0, 0.0])
    grad = jax.value_and_grad(self.loss, has_aux=True)
    whole = jax.jit(grad)(self.model.params, batch)
    apart = jax.jit(parts.accumulate(grad, 3))(self.model.params, batch)
    # Sums in another order.
    chex.assert_trees_all_close(apart, whole, rtol=1e-4, atol=1e-6)

  @parameterized.parameters('bert', 'one label')
  def test_rejects(self, name):
    config = loaded('bert').config
    if name == 'one label':
      config = dataclasses.replace(config, num_labels=1)
    with self.assertRaisesRegex(ValueError, 'at least two labels'):
      encoder.make_classification_loss(config)


class HeadTest(parameterized.TestCase):

  @parameterized.parameters('bert', 'roberta', 'bert_masked')
  def test_a_new_head(self, name):
    model = loaded(name)
    key = jax.random.key(0)
    config, params = encoder.add_head(model.config, model.params, 7, key)
    batch = batch_of(name)
    out = encoder.apply(config, params, batch['tokens'])
    self.assertEqual(out.logits.shape, (3, 7))
    shapes = hf.param_shapes(config)
    got = bl.matrices.named_leaves(params)
    self.assertEqual(
        {k: (x.shape, x.dtype) for k, x in got.items()},
        {k: (x.shape, x.dtype) for k, x in shapes.items()},
    )
    kernels = [
        x for k, x in got.items() if k.startswith('classifier') and x.ndim == 2
    ]
    for kernel in kernels:  # Within 5 standard errors of a deviation.
      error = 0.02 / np.sqrt(2 * kernel.size)
      self.assertLess(abs(float(jnp.std(kernel)) - 0.02), 5 * error)

  def test_of_another_pooling_and_dtype(self):
    model = loaded('bert', dtype=jnp.bfloat16)
    key = jax.random.key(0)
    config, params = encoder.add_head(
        model.config, model.params, 3, key, pooling='mean'
    )
    self.assertEqual(config.pooling, 'mean')
    kernel = params['classifier']['kernel']
    self.assertEqual((kernel.dtype, kernel.shape), (jnp.bfloat16, (32, 3)))
    again, _ = encoder.add_head(config, params, 4, key)
    self.assertEqual(again.num_labels, 4)
    with self.assertRaisesRegex(ValueError, 'num_labels >= 1'):
      encoder.add_head(config, params, 0, key)


class ChainTest(parameterized.TestCase):
  """Chains on an encoder."""

  @parameterized.product(name=encoders.CLASSIFIERS, scan_layers=(True, False))
  def test_the_law(self, name, scan_layers):
    """The loss of adapters is the loss at W + L R, and nothing is formed."""
    model = loaded(name, scan_layers=scan_layers)
    batch = batch_of(name)
    loss = encoder.make_classification_loss(model.config)
    value = lambda p, b: loss(p, b)[0]
    found = inject.all_linear(value, model.params, batch)
    by_name = encoder.matrices(model.config, r'^layers|^pooler|^classifier')
    paths = [m.path for m in bl.matrices.find(model.params, found)]
    self.assertCountEqual(
        paths, [m.path for m in bl.matrices.find(model.params, by_name)]
    )
    layers = encoder.matrices(model.config)
    self.assertLen(
        bl.matrices.find(model.params, layers), 6 if scan_layers else 18
    )
    policy = bl.ChainPolicy(rank=2, side=None, period=None)
    chain = bl.adapters.make_chain(policy, optax.sgd(0.1), by_name)
    state = jax.jit(chain.init)(jax.random.key(0), model.params)
    factors = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape),
        state.factors,
    )
    state = state._replace(factors=factors)
    given = bl.factors.scaled(factors, chain.adapted(model.params))
    with warnings.catch_warnings():
      warnings.simplefilter('error', inject.FormedWarning)
      ours = jax.jit(inject.by_product(value))(model.params, given, batch)
    compiled = jax.jit(value)
    merged = compiled(jax.jit(chain.params)(state), batch)
    chex.assert_trees_all_close(ours, merged, rtol=1e-5)
    plain = compiled(model.params, batch)
    self.assertGreater(abs(float(plain - merged)), 1e-3)

  def test_a_head_trains_beside_a_chain(self):
    """The loss falls; what is neither adapted nor the head stays."""
    model = loaded('bert_classifier')
    values, end = trained(model, jax.random.key(3))
    self.assertLess(values[-1], 0.7 * values[0])
    start = bl.matrices.named_leaves(model.params)
    moved = [
        path
        for path, x in bl.matrices.named_leaves(end).items()
        if not np.array_equal(x, start[path])
    ]
    self.assertCountEqual(
        moved,
        [
            'layers/attention/self/query/kernel',
            'layers/attention/self/value/kernel',
            'classifier/kernel',
            'classifier/bias',
        ],
    )

  @pytest.mark.slow
  def test_layouts_take_the_same_steps(self):
    model = functools.partial(loaded, 'roberta_classifier')
    one, _ = trained(model(), jax.random.key(3))
    other, _ = trained(model(scan_layers=False), jax.random.key(3))
    # Sums in another order, in float32.
    np.testing.assert_allclose(one, other, rtol=1e-4)


def trained(model, key):
  """Returns losses and weights of six steps of a chain with a head beside it."""
  found = encoder.matrices(model.config, 'query|value')
  policy = bl.ChainPolicy(rank=2, alpha=2.0, side='bernoulli', period=2)
  others = {'^classifier': optax.sgd(0.1)}
  chain = bl.adapters.make_chain(policy, optax.sgd(0.1), found, others=others)
  loss = inject.by_product(encoder.make_classification_loss(model.config))
  step = jax.jit(lambda state, batch: chain.step(state, loss, batch))
  state, values = chain.init(key, model.params), []
  for _ in range(6):
    state, (value, _) = step(state, encoders.batch(model.raw))
    values.append(float(value))
  return values, chain.params(state)


if __name__ == '__main__':
  absltest.main()
