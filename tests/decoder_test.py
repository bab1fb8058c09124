"""The decoder against stored results of the reference, and its own laws."""

import dataclasses
import functools
import pathlib
import tempfile
from unittest import mock
import warnings

from absl.testing import absltest
from absl.testing import parameterized
import chex
import decoders
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import fused
from bernoulli_lora_jax import inject
from bernoulli_lora_jax.models import attention
from bernoulli_lora_jax.models import cross_entropy
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import generate
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import rms_norm
from bernoulli_lora_jax.models import rotary

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'decoders.npz'
FAMILIES = tuple(decoders.CONFIGS)
# Of float32 in another order of sums; logits are of order one.
TOLERANCE = 2e-5


@functools.cache
def loaded(name, folder=None, **run):
  with tempfile.TemporaryDirectory() as scratch:
    folder = decoders.write(pathlib.Path(scratch) / name, name)
    return hf.load(folder, **run)


def results(config, params, tokens):
  """Returns logits, loss and the gradient of one kernel, as stored."""
  out = jax.jit(decoder.apply, static_argnums=0)(config, params, tokens)
  loss = decoder.make_loss(config, chunk=64)
  (value, _), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      params, {'tokens': jnp.asarray(tokens)}, None
  )
  if config.scan_layers:
    kernel = grad['layers']['self_attn']['q_proj']['kernel'][1]
  else:
    kernel = grad['layers_1']['self_attn']['q_proj']['kernel']
  return {'logits': decoder.logits(out), 'loss': value, 'grad': kernel}


def distance(ours, theirs):
  """Returns the largest difference, in terms of the largest entry."""
  return max(
      float(np.max(np.abs(ours[k] - theirs[k])) / np.max(np.abs(theirs[k])))
      for k in ('logits', 'loss', 'grad')
  )


@functools.cache
def golden(name):
  with np.load(GOLDEN) as stored:
    return {k: stored[f'{name}/{k}'] for k in ('logits', 'loss', 'grad')}


def unrolled(params, num):
  """Returns stacked layers one by one."""
  rest = {k: v for k, v in params.items() if k != 'layers'}
  layer = lambda i: jax.tree.map(lambda x: x[i], params['layers'])
  return {**rest, **{f'layers_{i}': layer(i) for i in range(num)}}


class GoldenTest(parameterized.TestCase):

  @parameterized.product(name=FAMILIES, scan_layers=(True, False))
  def test_equals_the_reference(self, name, scan_layers):
    model = loaded(name, scan_layers=scan_layers)
    ours = results(model.config, model.params, decoders.tokens(24))
    self.assertLess(distance(ours, golden(name)), TOLERANCE)

  @parameterized.parameters(
      ('llama2', 'rotary', rotary.Rotary(theta=20000.0)),
      ('llama2', 'norm_eps', 1e-3),
      ('llama3', 'rotary', rotary.Rotary(theta=500.0)),
      ('llama_linear', 'rotary', rotary.Rotary()),
      ('mistral', 'window', None),
      ('mistral', 'window', 8),
      ('mistral', 'window', 6),
      ('qwen2', 'windowed', ()),
      ('qwen2', 'windowed', (True, False, False)),
  )
  def test_a_feature_that_is_off_shows(self, name, field, value):
    model = loaded(name)
    config = dataclasses.replace(model.config, **{field: value})
    ours = results(config, model.params, decoders.tokens(24))
    self.assertGreater(distance(ours, golden(name)), 50 * TOLERANCE)

  @parameterized.parameters(
      ('llama_linear', 'layers/self_attn/o_proj/bias'),
      ('llama_linear', 'layers/mlp/gate_proj/bias'),
      ('qwen2', 'layers/self_attn/k_proj/bias'),
      ('qwen2', 'layers/self_attn/v_proj/bias'),
      ('qwen3', 'layers/self_attn/q_norm/scale'),
      ('qwen3', 'layers/self_attn/k_norm/scale'),
      ('llama2', 'lm_head/kernel'),
      ('llama3', 'embed_tokens/embedding'),
  )
  def test_a_weight_that_is_lost_shows(self, name, path):
    model = loaded(name)
    leaves = bl.matrices.named_leaves(model.params)
    leaves[path] = jnp.ones_like(leaves[path])
    params = jax.tree.structure(model.params).unflatten(leaves.values())
    ours = results(model.config, params, decoders.tokens(24))
    self.assertGreater(distance(ours, golden(name)), 50 * TOLERANCE)


class RotaryTest(parameterized.TestCase):

  def test_frequencies_of_the_reference_to_the_last_bit(self):
    """Entries where a power or quotient of another rounding shows."""
    scaled = rotary.Rotary(1e4, 'llama3', 8.0, 1.0, 4.0, 8192)
    bits = rotary.frequencies(scaled, 64).view(np.int32)
    expected = [1047712803, 980257506, 971899952, 945624869]
    self.assertEqual(bits[[5, 22, 23, 27]].tolist(), expected)


class LayoutTest(parameterized.TestCase):

  @parameterized.product(scan_layers=(True, False), remat=('dots', 'full'))
  def test_remat_changes_nothing(self, scan_layers, remat):
    model = loaded('qwen2', scan_layers=scan_layers)
    config = dataclasses.replace(model.config, remat=remat)
    ours = results(config, model.params, decoders.tokens(24))
    self.assertLess(distance(ours, golden('qwen2')), TOLERANCE)

  @parameterized.parameters(True, False)
  def test_dtype_of_the_computation(self, scan_layers):
    model = loaded('llama2', scan_layers=scan_layers)
    config = dataclasses.replace(model.config, dtype=jnp.bfloat16)
    apply = jax.jit(decoder.apply, static_argnums=0)
    tokens = decoders.tokens(8)
    ours = apply(config, model.params, tokens)
    self.assertEqual(ours.hidden.dtype, jnp.bfloat16)
    self.assertEqual(decoder.logits(ours).dtype, jnp.float32)
    exact = apply(model.config, model.params, tokens)
    # Three layers, each rounded to 2^-9 a few times; entries are of order one.
    chex.assert_trees_all_close(
        ours.hidden.astype(jnp.float32), exact.hidden, atol=0.1
    )

  def test_norms_are_taken_in_float32(self):
    x = jax.random.normal(jax.random.key(0), (4, 64)).astype(jnp.bfloat16)
    norm = decoder.RMSNorm(1e-6)
    params = {'params': {'scale': jnp.ones(64, jnp.bfloat16)}}
    exact = norm.apply(params, x.astype(jnp.float32))
    chex.assert_trees_all_equal(
        norm.apply(params, x), exact.astype(jnp.bfloat16)
    )

  @parameterized.parameters(128, 96)
  def test_the_kernel_of_a_norm_is_its_derivative(self, width):
    """Step by step, of rows that fill a block of threads and of others."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    x, scale = draw(0, 3, 5, width), 1 + 0.1 * draw(1, width)
    slopes = [draw(i, 3, 5, width) for i in range(2, 6)]

    def value(x, scale):
      outs = rms_norm.fan_out(x, scale, 1e-5, 3)
      self.assertLen(outs, len(slopes))
      return sum(map(jnp.vdot, slopes[: self.read], outs))

    grad = lambda *args: jax.grad(value, args)(x, scale)
    step_by_step = functools.partial(
        fused.norm_slope, interpret=not fused.is_there()
    )
    # The stream alone; two of three products.
    for self.read in (1, 3):
      exact = grad(0, 1)
      with mock.patch.multiple(
          fused, takes_rows=lambda x: True, norm_slope=step_by_step
      ):
        # Sums over a row in another order, in float32.
        chex.assert_trees_all_close(grad(0, 1), exact, rtol=1e-5, atol=1e-5)
        if self.read == 3:
          one = grad(0) + grad(1)
          chex.assert_trees_all_close(one, exact, rtol=1e-5, atol=1e-5)

  def test_the_kernel_of_a_norm_keeps_a_step(self):
    """The derivative of a decoder, by the kernel and by XLA."""
    loss = decoder.make_loss(loaded('qwen3').config)
    batch = {'tokens': jnp.arange(24).reshape(2, 12)}
    # Anew each time: what is compiled would be the other's.
    grad = lambda p: jax.jit(jax.grad(lambda p: loss(p, batch, None)[0]))(p)
    exact, calls = grad(loaded('qwen3').params), []

    def step_by_step(*args):
      calls.append(len(args[3]))
      return slope(*args, interpret=not fused.is_there())

    slope = fused.norm_slope
    with mock.patch.multiple(
        fused, takes_rows=lambda x: True, norm_slope=step_by_step
    ):
      found = grad(loaded('qwen3').params)
    # In a scan: once for each norm of a layer, and what their products give.
    self.assertEqual(sorted(calls), [2, 3])
    chex.assert_trees_all_close(found, exact, rtol=2e-4, atol=1e-6)

  def test_remat_keeps_less(self):
    config = dataclasses.replace(loaded('qwen3').config, scan_layers=True)

    def residuals(remat):
      ours = dataclasses.replace(config, remat=remat)
      loss = decoder.make_loss(ours)
      batch = {'tokens': jnp.zeros((2, 64), jnp.int32)}
      _, vjp = jax.vjp(lambda p: loss(p, batch)[0], loaded('qwen3').params)
      return sum(x.size for x in jax.tree.leaves(vjp))

    kept = {remat: residuals(remat) for remat in decoder.REMATS}
    self.assertLess(kept['full'], kept['dots'])
    self.assertLess(kept['dots'], kept['none'])

  def test_layers_compile_once_whatever_their_number(self):
    def size(num):
      config = dataclasses.replace(loaded('llama2').config, num_layers=num)
      shapes = jax.eval_shape(
          decoder.Decoder(config).init,
          jax.random.key(0),
          jnp.zeros((1, 8), jnp.int32),
      )
      loss = decoder.make_loss(config)
      batch = {'tokens': jnp.zeros((1, 8), jnp.int32)}
      grad = jax.grad(lambda p: loss(p, batch)[0])
      return len(str(jax.make_jaxpr(grad)(shapes['params'])).splitlines())

    self.assertEqual(size(3), size(30))

  @parameterized.parameters(
      (dict(num_kv_heads=3), 'num_kv_heads to divide'),
      (dict(head_dim=7), 'even head_dim'),
      (dict(window=0), 'window >= 1'),
      (dict(windowed=(True,)), 'windowed of each'),
      (dict(remat='some'), 'remat in'),
      (dict(num_layers=0), 'num_layers >= 1'),
      (dict(norm_eps=-1e-6), 'norm_eps >= 0'),
      (dict(dtype='int8'), 'dtype of floating point'),
      (dict(windowed=(True, False, True)), 'a window where'),
  )
  def test_rejects(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(loaded('llama2').config, **change)

  @parameterized.parameters(
      dict(num_layers=3.0), dict(vocab_size=True), dict(window=3.5)
  )
  def test_rejects_sizes_that_are_no_int(self, **change):
    with self.assertRaisesRegex(TypeError, 'to be an int'):
      dataclasses.replace(loaded('llama2').config, **change)

  def test_a_list_of_windowed_layers_can_be_hashed(self):
    windowed = [True, False, True]
    change = dict(window=3, windowed=windowed)
    config = dataclasses.replace(loaded('llama2').config, **change)
    self.assertEqual(config.windows, (3, None, 3))
    hash(config)

  @parameterized.parameters(
      (dict(tokens=np.zeros((0, 5), int)), r'tokens of shape .*\(0, 5\)'),
      (dict(tokens=np.zeros(5, int)), r'tokens of shape .*\(5,\)'),
      (dict(segments=np.zeros((2, 4), int)), 'segments of shape'),
      (dict(positions=np.zeros(5, int)), 'positions of shape'),
  )
  def test_rejects_inputs(self, change, message):
    model = loaded('llama2')
    given = dict(tokens=decoders.tokens(5)) | change
    with self.assertRaisesRegex(ValueError, message):
      decoder.apply(model.config, model.params, **given)

  @parameterized.parameters(-1, 96)
  def test_an_unknown_token_is_nan(self, token):
    model = loaded('llama2')
    tokens = decoders.tokens(5)
    tokens[0, 2] = token
    out = jax.jit(decoder.apply, static_argnums=0)(
        model.config, model.params, tokens
    )
    is_nan = np.isnan(out.hidden).any(axis=(1, 2))
    np.testing.assert_array_equal(is_nan, [True, False])


class PackedTest(parameterized.TestCase):
  """Documents in one row are what they are in rows of their own."""

  @parameterized.parameters('llama3', 'qwen2')
  def test_hidden_states_and_loss(self, name):
    model = loaded(name)
    lengths = (9, 1, 14, 8)
    tokens = decoders.tokens(sum(lengths), rows=1)
    segments = np.repeat([4, 0, 7, 4], lengths)[None]
    apply = jax.jit(decoder.apply, static_argnums=0)
    packed = apply(model.config, model.params, tokens, None, segments)
    # One's number comes again. Each in a row of its own, with something behind it that it does not see.
    rows = np.ones((4, max(lengths)), np.int32)
    documents = np.split(tokens[0], np.cumsum(lengths)[:-1])
    for row, document in zip(rows, documents, strict=True):
      row[: len(document)] = document
    alone = apply(model.config, model.params, rows)
    is_real = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
    chex.assert_trees_all_close(
        packed.hidden[0], alone.hidden[is_real], atol=TOLERANCE
    )

    loss = jax.jit(decoder.make_loss(model.config))
    whole, weighted = loss(
        model.params, {'tokens': tokens, 'segments': segments}
    )
    apart, other = loss(
        model.params, {'tokens': rows, 'weights': is_real.astype(np.float32)}
    )
    self.assertEqual(float(weighted.weight), sum(n - 1 for n in lengths))
    self.assertEqual(float(other.weight), float(weighted.weight))
    chex.assert_trees_all_close(whole, apart, rtol=1e-5)

  def test_a_number_may_come_again(self):
    model = loaded('llama2')
    tokens = decoders.tokens(12, rows=1)
    apply = jax.jit(decoder.apply, static_argnums=0)
    run = lambda numbers: apply(
        model.config, model.params, tokens, None, np.repeat([numbers], 4, 1)
    )
    chex.assert_trees_all_equal(run([0, 1, 0]), run([0, 1, 2]))

  def test_weights_of_targets(self):
    model = loaded('llama2')
    tokens = decoders.tokens(6, rows=1)
    weights = np.array([[9.0, 0.0, 2.0, 0.0, 0.0, 1.0]])
    value, weighted = decoder.make_loss(model.config)(
        model.params, {'tokens': tokens, 'weights': weights}
    )
    out = jax.jit(decoder.apply, static_argnums=0)(
        model.config, model.params, tokens
    )
    log_probs = jax.nn.log_softmax(decoder.logits(out))[0]
    expected = -(2 * log_probs[1, tokens[0, 2]] + log_probs[4, tokens[0, 5]])
    self.assertEqual(float(weighted.weight), 3.0)  # None predicts the first.
    chex.assert_trees_all_close(value, expected / 3, rtol=1e-5)

  def test_no_weight_is_no_loss(self):
    model = loaded('llama2')
    batch = {'tokens': decoders.tokens(6), 'weights': np.zeros((2, 6))}
    value, weighted = decoder.make_loss(model.config)(model.params, batch)
    self.assertEqual((float(value), float(weighted.weight)), (0.0, 0.0))

  def test_bounds(self):
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [5, 5, 5, 5, 5, 5]])
    starts, lengths, count = attention.bounds(segments, 4)
    np.testing.assert_array_equal(
        starts, [[0, 3, 5, -1, -1], [0, -1, -1, -1, -1]]
    )
    np.testing.assert_array_equal(lengths, [[3, 2, 1, -1], [6, -1, -1, -1]])
    np.testing.assert_array_equal(count, [3, 1])
    starts, lengths, count = attention.bounds(segments, 3)
    np.testing.assert_array_equal(starts, [[0, 3, 5, -1], [0, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[3, 2, 1], [6, -1, -1]])
    starts, lengths, count = attention.bounds(segments, 2)  # One too many.
    np.testing.assert_array_equal(starts, [[0, 3, -1], [0, -1, -1]])
    np.testing.assert_array_equal(lengths, [[3, 2], [6, -1]])
    np.testing.assert_array_equal(count, [3, 1])

  def test_segments_with_a_cache(self):
    config = loaded('llama2').config
    with self.assertRaisesRegex(ValueError, 'a cache or segments'):
      decoder.apply(
          config,
          loaded('llama2').params,
          jnp.zeros((1, 2), jnp.int32),
          segments=jnp.zeros((1, 2), jnp.int32),
          cache=decoder.make_cache(config, 1, 2),
      )


def plain_cross_entropy(hidden, head, targets, weights):
  log_probs = jax.nn.log_softmax(hidden @ head)
  chosen = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
  return -jnp.sum(weights * chosen)


class CrossEntropyTest(parameterized.TestCase):

  def arguments(self, rows=2, length=11, d=8, vocab=23):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (rows, length, d))
    head = jax.random.normal(keys[1], (d, vocab))
    targets = jax.random.randint(keys[2], (rows, length), 0, vocab)
    weights = jax.random.uniform(keys[3], (rows, length)).at[0, 3].set(0)
    return hidden, head, targets, weights

  @parameterized.parameters(1, 4, 7, 22, 1000)
  def test_equals_the_plain_formula(self, chunk):
    hidden, head, targets, weights = self.arguments()
    ours = functools.partial(cross_entropy.cross_entropy, chunk=chunk)
    both = lambda f: jax.value_and_grad(f, argnums=(0, 1))(
        hidden, head, targets, weights
    )
    chex.assert_trees_all_close(
        both(ours), both(plain_cross_entropy), rtol=2e-5, atol=2e-6
    )

  def test_in_float64(self):
    with jax.enable_x64(True):
      arguments = [
          x.astype(jnp.float64) if x.dtype == jnp.float32 else x
          for x in self.arguments()
      ]
      both = lambda f: jax.value_and_grad(f, argnums=(0, 1))(*arguments)
      chex.assert_trees_all_close(
          both(functools.partial(cross_entropy.cross_entropy, chunk=6)),
          both(plain_cross_entropy),
          rtol=1e-12,
      )

  @parameterized.parameters(-100, -1, 23, 10**6, np.int32(-(2**31)))
  def test_targets_without_weight_are_anything(self, target):
    hidden, head, targets, weights = self.arguments()
    value = jax.value_and_grad(cross_entropy.cross_entropy, argnums=(0, 1))
    chex.assert_trees_all_equal(
        value(hidden, head, targets.at[0, 3].set(target), weights),
        value(hidden, head, targets, weights),
    )

  @parameterized.parameters(jnp.float32, jnp.float64)
  def test_log_sum_exp_in_one_reading(self, dtype):
    """As a GPU computes it; infinities and NaN are what they should be."""
    with jax.enable_x64(True):
      x = 30 * jax.random.normal(jax.random.key(0), (3, 5, 257), dtype)
      x = x.at[0, 0].set(-jnp.inf).at[0, 1, 3].set(-jnp.inf)
      x = x.at[0, 2, 4].set(jnp.inf).at[0, 3, 5].set(jnp.nan)
      ours = jax.jit(cross_entropy._read_once)(x)
      self.assertEqual(ours.dtype, dtype)
      # Sums of 257 numbers in another order.
      tol = 300 * jnp.finfo(dtype).eps
      plain = jax.nn.logsumexp(x, axis=-1)
      np.testing.assert_allclose(ours, plain, rtol=tol, atol=tol)

  @parameterized.parameters(-1, 23)
  def test_an_unknown_target_is_nan(self, target):
    hidden, head, targets, weights = self.arguments()
    targets = targets.at[0, 4].set(target)
    value = cross_entropy.cross_entropy(hidden, head, targets, weights)
    self.assertTrue(np.isnan(value))

  @parameterized.parameters(np.float64, np.int64, bool, jnp.bfloat16)
  def test_weights_of_another_dtype(self, dtype):
    hidden, head, targets, _ = self.arguments()
    with jax.enable_x64(True):
      weights = jnp.arange(22).reshape(2, 11) % 2
      value = jax.value_and_grad(cross_entropy.cross_entropy)
      got = value(hidden, head, targets, weights.astype(dtype))
      expected = value(hidden, head, targets, weights.astype(jnp.float32))
      chex.assert_trees_all_equal(got, expected)
      self.assertEqual(got[0].dtype, jnp.float32)

  def test_a_cotangent_scales(self):
    hidden, *rest = self.arguments()
    f = lambda x: 3 * cross_entropy.cross_entropy(x, *rest) + 1
    g = lambda x: 3 * plain_cross_entropy(x, *rest) + 1
    chex.assert_trees_all_close(
        jax.grad(f)(hidden), jax.grad(g)(hidden), rtol=2e-5, atol=2e-6
    )

  def widths(self, f, *args):
    """Returns the shapes of everything that a program makes."""
    found = set()

    def visit(jaxpr):
      for eqn in jaxpr.eqns:
        found.update(v.aval.shape for v in eqn.outvars)
        for inner in core.jaxprs_in_params(eqn.params):
          visit(inner)

    visit(jax.make_jaxpr(f)(*args).jaxpr)
    return found

  def test_a_frozen_head_costs_nothing(self):
    hidden, head, *rest = self.arguments()
    loss = lambda x, head: cross_entropy.cross_entropy(x, head, *rest, chunk=4)
    frozen = self.widths(jax.grad(loss), hidden, head)
    trained = self.widths(jax.grad(loss, argnums=(0, 1)), hidden, head)
    self.assertNotIn(head.shape, frozen)
    self.assertIn(head.shape, trained)
    self.assertNotIn((2, 11, 23), frozen)  # The logits of the batch.
    self.assertIn((2, 2, 23), frozen)  # Of a chunk.

  def test_an_adapted_head_is_followed(self):
    hidden, head, targets, weights = self.arguments()
    loss = lambda params, x: cross_entropy.cross_entropy(
        x, params['head'], targets, weights, chunk=4
    )
    left = jax.random.normal(jax.random.key(5), (8, 2))
    right = jax.random.normal(jax.random.key(6), (2, 23))
    factors = {'head': {'left': left, 'right': right}}
    params = {'head': head}
    with warnings.catch_warnings():
      warnings.simplefilter('error', inject.FormedWarning)
      adapted = inject.by_product(loss)
      ours = jax.grad(adapted, argnums=(1, 2))
      got = ours(params, factors, hidden)
    formed = lambda factors, x: plain_cross_entropy(
        x,
        head + factors['head']['left'] @ factors['head']['right'],
        targets,
        weights,
    )
    expected = jax.grad(formed, argnums=(0, 1))(factors, hidden)
    chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=2e-5)
    found = self.widths(ours, params, factors, hidden)
    self.assertNotIn(head.shape, found)
    self.assertNotIn((2, 11, 23), found)

  @parameterized.parameters(
      (dict(chunk=0), 'chunk >= 1'),
      (dict(targets=jnp.zeros((2, 4), int)), 'shape'),
      (
          dict(
              hidden=jnp.zeros((0, 5, 8)),
              targets=jnp.zeros((0, 5), int),
              weights=jnp.zeros((0, 5)),
          ),
          'at least one position',
      ),
  )
  def test_rejects(self, change, message):
    hidden, head, targets, weights = self.arguments()
    given = dict(hidden=hidden, targets=targets, weights=weights) | change
    with self.assertRaisesRegex(ValueError, message):
      cross_entropy.cross_entropy(head=head, **given)


def only(tree, matrices):
  """Returns a tree with zeros in the place of what is not selected."""
  return jax.tree.map(
      lambda x, is_one: x if is_one else jnp.zeros_like(x),
      tree,
      bl.matrices.mask(tree, matrices),
  )


class ChainTest(parameterized.TestCase):
  """Chains on a decoder."""

  def loss(self, config):
    return decoder.make_loss(config, chunk=16)

  @parameterized.parameters(
      ('llama3', True), ('llama3', False), ('qwen2', True), ('llama2', True)
  )
  def test_the_law(self, name, scan_layers):
    """The loss of adapters is the loss at W + L R, and nothing is formed."""
    model = loaded(name, scan_layers=scan_layers)
    batch = {'tokens': decoders.tokens(12)}
    loss = self.loss(model.config)
    value = lambda p, b: loss(p, b)[0]
    found = inject.all_linear(value, model.params, batch)
    by_name = decoder.matrices(model.config)
    paths = [m.path for m in bl.matrices.find(model.params, found)]
    self.assertEqual(
        paths,
        [m.path for m in bl.matrices.find(model.params, by_name)],
    )
    self.assertLen(paths, 7 if scan_layers else 21)
    policy = bl.ChainPolicy(rank=2, side=None, period=None)
    chain = bl.adapters.make_chain(policy, optax.sgd(0.1), by_name)
    state = jax.jit(chain.init)(jax.random.key(0), model.params)
    factors = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape),
        state.factors,
    )
    state = state._replace(factors=factors)
    given = bl.factors.scaled(factors, chain.adapted(model.params))
    with warnings.catch_warnings():
      warnings.simplefilter('error', inject.FormedWarning)
      ours = jax.jit(inject.by_product(value))(model.params, given, batch)
    compiled = jax.jit(value)
    plain = compiled(model.params, batch)
    merged = compiled(jax.jit(chain.params)(state), batch)
    chex.assert_trees_all_close(ours, merged, rtol=1e-5)
    self.assertGreater(abs(float(plain - merged)), 1e-3)

  def test_tables_say_what_is_held(self):
    """Stored and trained numbers, stacked as unrolled; a coin a layer."""
    totals = []
    for scan_layers in (True, False):
      model = loaded('qwen2', scan_layers=scan_layers)
      found = decoder.matrices(model.config, 'q_proj|down_proj')
      policy = bl.ChainPolicy(rank=3, side='bernoulli', prob=0.25, period=2)
      rows = bl.adapters.adapter_table(model.params, policy, found)
      chain = bl.adapters.make_chain(policy, optax.adam(0.1), found)
      state = jax.eval_shape(chain.init, jax.random.key(0), model.params)
      size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
      total = lambda name, rows=rows: sum(row[name] for row in rows)
      self.assertEqual(total('stored'), size(state.factors))
      self.assertEqual(2 * total('stored') + 1, size(state.opt_state))
      totals.append((total('stored'), total('trained'), size(state.coins)))
    self.assertEqual(totals[0], totals[1])
    trained = 3 * (0.25 * 3 * 32 + 0.75 * 32 * 3)  # q_proj of three layers
    trained += 3 * (0.25 * 3 * 32 + 0.75 * 48 * 3)
    self.assertEqual(totals[0], (3 * 3 * (64 + 80), trained, 6))

  @parameterized.parameters('nearest', 'stochastic')
  def test_no_second_copy_of_the_weights(self, rounding):
    """Beside state and batch a step holds less than half of the weights again."""
    config = decoder.DecoderConfig(64, 128, 512, 16, 4, 2, 32, remat='full')
    shapes = jax.eval_shape(
        decoder.Decoder(config).init,
        jax.random.key(0),
        jnp.zeros((1, 2), jnp.int32),
    )['params']
    policy = bl.ChainPolicy(rank=4, side='left', period=2, rounding=rounding)
    chain = bl.adapters.make_chain(
        policy, optax.sgd(0.1), decoder.matrices(config)
    )
    loss = inject.by_product(decoder.make_loss(config, chunk=16))
    step = jax.jit(lambda s, b: chain.step(s, loss, b), donate_argnums=0)
    state = jax.eval_shape(chain.init, jax.random.key(0), shapes)
    batch = {'tokens': jax.ShapeDtypeStruct((1, 16), jnp.int32)}
    used = step.lower(state, batch).compile().memory_analysis()
    weights = sum(4 * x.size for x in jax.tree.leaves(shapes))
    self.assertGreater(used.alias_size_in_bytes, weights)
    self.assertLess(used.temp_size_in_bytes, weights / 2)

  @pytest.mark.slow
  def test_modes_and_layouts_take_the_same_steps(self):
    """20 steps, float64: gradient and adapter mode, scanned and unrolled."""
    with jax.enable_x64(True):
      stacked = loaded('qwen2', dtype=jnp.float64)
      single = loaded('qwen2', scan_layers=False, dtype=jnp.float64)
      ends = [
          train(model)
          for model in (stacked, single)
          for train in (by_gradients, by_adapters)
      ]
      flat = [unrolled(end, 3) if 'layers' in end else end for end in ends]
      for end in flat[1:]:
        chex.assert_trees_all_close(
            flat[0], bl.matrices.align(flat[0], end), rtol=1e-9, atol=1e-12
        )
      moved = jax.tree.map(
          lambda a, b: float(jnp.abs(a - b).max()), flat[0], single.params
      )
      self.assertGreater(moved['layers_0']['mlp']['up_proj']['kernel'], 1e-3)
      self.assertEqual(moved['embed_tokens']['embedding'], 0)


KEY = 3


def batches():
  for i in range(20):
    yield {'tokens': jnp.asarray(decoders.tokens(10, seed=i))}


def by_gradients(model):
  """Returns weights after 20 steps of the chain on gradients."""
  found = decoder.matrices(model.config)
  loss = decoder.make_loss(model.config, chunk=16)
  tx = bl.bernoulli_lora(
      0.1, jax.random.key(KEY), rank=2, prob=0.5, matrices=found
  )

  @jax.jit
  def step(params, state, batch):
    grads, _ = jax.grad(loss, has_aux=True)(params, batch)
    updates, state = tx.update(only(grads, found), state, params)
    return optax.apply_updates(params, updates), state

  params, state = model.params, tx.init(model.params)
  for batch in batches():
    params, state = step(params, state, batch)
  return params


def by_adapters(model):
  """Returns the same of the chain of adapters."""
  found = decoder.matrices(model.config)
  policy = bl.ChainPolicy(
      rank=2, alpha=2.0, side='bernoulli', prob=0.5, period=1
  )
  chain = bl.adapters.make_chain(policy, optax.sgd(0.1), found)
  loss = inject.by_product(decoder.make_loss(model.config, chunk=16))
  step = jax.jit(lambda state, batch: chain.step(state, loss, batch)[0])
  state = chain.init(jax.random.key(KEY), model.params)
  for batch in batches():
    state = step(state, batch)
  return chain.params(state)


class GenerateTest(parameterized.TestCase):

  @parameterized.parameters(('llama3', True), ('qwen2', True), ('qwen2', False))
  def test_equals_no_cache(self, name, scan_layers):
    model = loaded(name, scan_layers=scan_layers)
    prompts = [[5, 9, 11, 3, 7, 8, 2], [1], [40, 41, 42]]
    got = generate.generate(
        model.config, model.params, prompts, max_new_tokens=8
    )
    rows = np.zeros((3, 15), np.int32)
    for row, prompt, new in zip(rows, prompts, got, strict=True):
      row[: len(prompt) + 8] = prompt + new
    out = jax.jit(decoder.apply, static_argnums=0)(
        model.config, model.params, rows
    )
    likeliest = np.argmax(decoder.logits(out), axis=-1)
    for row, prompt, new in zip(likeliest, prompts, got, strict=True):
      start = len(prompt) - 1
      self.assertEqual(row[start : start + 8].tolist(), new)

  def test_ends(self):
    model = loaded('llama2')
    prompts = [[5, 9], [1], [40, 41, 42]]
    run = functools.partial(
        generate.generate, model.config, model.params, prompts
    )
    free = run(max_new_tokens=9)
    end = free[0][2]
    expected = [row[: row.index(end)] if end in row else row for row in free]
    self.assertEqual(run(max_new_tokens=9, end_tokens=[end]), expected)
    ends = list({row[1] for row in free})  # All rows end early.
    cut = lambda row: next(i for i, t in enumerate(row) if t in ends)
    self.assertEqual(
        run(max_new_tokens=9, end_tokens=ends), [r[: cut(r)] for r in free]
    )

  def test_samples_have_the_law_of_the_logits(self):
    model = loaded('llama2')
    num = 4000
    rows = generate.generate(
        model.config,
        model.params,
        [[3, 4]] * num,
        max_new_tokens=1,
        temperature=0.7,
        key=jax.random.key(0),
    )
    counts = np.bincount([row[0] for row in rows], minlength=96)
    out = jax.jit(decoder.apply, static_argnums=0)(
        model.config, model.params, jnp.array([[3, 4]])
    )
    probs = np.asarray(jax.nn.softmax(decoder.logits(out)[0, -1] / 0.7))
    errors = np.sqrt(num * probs * (1 - probs)) + 1
    self.assertLess(np.max(np.abs(counts - num * probs) / errors), 5)

  @parameterized.parameters(1e-10, 1e-38, 1e-45)
  def test_a_small_temperature_is_greedy(self, temperature):
    model = loaded('llama2')
    scale = 100 * model.params['norm']['scale']  # So that logits are large.
    params = {**model.params, 'norm': {'scale': scale}}
    run = functools.partial(
        generate.generate, model.config, params, max_new_tokens=4
    )
    prompts = [[3, 4, 5], [7, 8, 9]]
    greedy = run(prompts)
    how = dict(temperature=temperature, key=jax.random.key(0))
    self.assertEqual(run(prompts, **how), greedy)
    self.assertEqual(run(np.array(prompts), top_p=0.9, **how), greedy)

  @parameterized.parameters(dict(top_k=3), dict(top_p=0.4))
  def test_only_likely_tokens(self, **how):
    model = loaded('llama2')
    rows = generate.generate(
        model.config,
        model.params,
        [[3, 4]] * 300,
        max_new_tokens=1,
        temperature=1.0,
        key=jax.random.key(0),
        **how,
    )
    out = jax.jit(decoder.apply, static_argnums=0)(
        model.config, model.params, jnp.array([[3, 4]])
    )
    probs = np.asarray(jax.nn.softmax(decoder.logits(out)[0, -1]))
    order = np.argsort(-probs)
    num = how.get('top_k') or int(np.sum(np.cumsum(probs[order]) < 0.4)) + 1
    self.assertEqual({row[0] for row in rows}, set(order[:num].tolist()))

  @parameterized.parameters(
      (dict(max_new_tokens=0), 'max_new_tokens'),
      (dict(temperature=-1.0), 'temperature >= 0'),
      (dict(temperature=1.0), 'Expected a key'),
      (dict(top_p=0.0), 'top_p in'),
      (dict(top_k=97), 'top_k'),
      (dict(prompts=[[]]), 'at least one token'),
      (dict(prompts=[[96]]), r'tokens in \[0, 96\)'),
      (dict(prompts=[[2**40]]), r'tokens in \[0, 96\)'),
      (dict(prompts=[[1.5]]), 'whole numbers'),
      (dict(prompts=[1, 2]), 'at least one token'),
      (dict(end_tokens=3), 'a list of end_tokens'),
  )
  def test_rejects(self, change, message):
    given = dict(prompts=[[1]], max_new_tokens=1) | change
    with self.assertRaisesRegex(ValueError, message):
      generate.generate(loaded('llama2').config, None, **given)


if __name__ == '__main__':
  absltest.main()
