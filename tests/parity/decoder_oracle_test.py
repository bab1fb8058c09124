"""Decoders against transformers on PyTorch: logits, loss, a gradient.

Errors are the largest difference in terms of the largest entry. Measured, the worst
of all families, layouts and lengths up to 1,024:

  float32                                     2.3e-6, bar 2e-5
  float64, both as they stand                 1.1e-6, bar 3e-6
  float64, what they do in float32 as well    3.5e-15, bar 1e-13
  packed documents, float32                   9.3e-7, bar 2e-5
  the least of what is off on purpose         1.7e-3, at least 1e-3

In a float64 model the published code still makes the tables of rotary positions, the
squares of RMSNorm and the softmax of attention in float32, and jax's attention makes
its scores and softmax in float32: hence the second row. For the third both have the
same tables and all formulas in float64.

Beyond 1,024 positions the frequencies decide: what one unit in the last place of them
does to the reference itself (all moved down, all up, the larger), and our error, for
one head:

  128 positions from     4,096              16,384             100,000
  llama2            1.6e-4   1.7e-6    6.3e-4   3.0e-6    1.5e-3   1.8e-6
  llama3            1.6e-4   1.6e-6    6.3e-4   1.6e-6    5.3e-3   1.5e-6
  llama_linear      4.6e-6   4.2e-7    1.8e-5   4.6e-7    1.1e-4   4.2e-7
  mistral           6.2e-5   1.3e-6    2.5e-4   1.0e-6    3.5e-4   8.1e-7
  qwen2             5.1e-5   1.1e-6    2.0e-4   8.6e-7    2.5e-4   9.8e-7
  qwen3             1.8e-4   8.8e-7    7.1e-4   9.0e-7    1.6e-3   1.0e-6

  a row of               4,096               8,192
  llama3            2.3e-4   3.0e-6    2.5e-4   6.2e-6
  mistral           8.4e-5   2.1e-6
  qwen3             1.6e-4   2.8e-6

The bar is half of the unit: ours are the reference's frequencies, not neighbours.
"""

import dataclasses
import functools
import pathlib
import tempfile
from unittest import mock

from absl.testing import parameterized
import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

import decoder_test  # noqa: E402  (what may be missing comes first)
import reference  # noqa: E402

import bernoulli_lora_jax as bl  # noqa: E402
from bernoulli_lora_jax.models import decoder  # noqa: E402
from bernoulli_lora_jax.models import hf  # noqa: E402
from bernoulli_lora_jax.models import hf_config  # noqa: E402
from bernoulli_lora_jax.models import rotary  # noqa: E402

FAMILIES = tuple(decoders.CONFIGS)
BAR = decoder_test.TOLERANCE
LENGTHS = (24, 257, 1024)  # Windows are 5 and 7, the scaled length is 256.
ONE_HEAD = dict(num_attention_heads=1, num_key_value_heads=1, head_dim=8)

torch.set_num_threads(1)  # Workers share the cores.


@functools.cache
def written(name, **changes):
  """Returns the folder of a checkpoint, once a process."""
  folder = tempfile.TemporaryDirectory()
  _KEPT.append(folder)
  return decoders.write(pathlib.Path(folder.name) / name, name, **changes)


_KEPT = []  # Until the process ends.


@functools.cache
def expected(name, length):
  return reference.results(written(name), decoders.tokens(length))


def logits(config, params, tokens, *args):
  apply = jax.jit(decoder.apply, static_argnums=0)
  return np.asarray(decoder.logits(apply(config, params, tokens, *args)))


def distance(ours, theirs):
  return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


class ResultsTest(parameterized.TestCase):

  @parameterized.product(
      name=FAMILIES, scan_layers=(True, False), length=LENGTHS
  )
  def test_float32(self, name, scan_layers, length):
    model = hf.load(written(name), scan_layers=scan_layers)
    tokens = decoders.tokens(length)
    ours = decoder_test.results(model.config, model.params, tokens)
    theirs = expected(name, length)
    for key, value in theirs.items():
      self.assertLess(distance(ours[key], value), BAR, key)

  @parameterized.product(name=FAMILIES, is_exact=(False, True))
  def test_float64(self, name, is_exact):
    tokens = decoders.tokens(257)
    jax.clear_caches()  # Of programs with the other attention.
    with jax.enable_x64(True):
      model = hf.load(written(name), dtype=jnp.float64)
      tables = None
      if is_exact:
        tables = rotary.tables(
            model.config.rotary, model.config.head_dim, jnp.arange(257)[None]
        )
        tables = [np.concatenate([x, x], axis=-1)[:, :, 0] for x in tables]
        self.enterContext(
            mock.patch.object(jax.nn, 'dot_product_attention', attend)
        )
      ours = decoder_test.results(model.config, model.params, tokens)
      ours = jax.tree.map(np.asarray, ours)  # As it is, in float64.
    theirs = reference.results_in_float64(written(name), tokens, tables)
    for key, value in theirs.items():
      self.assertEqual(ours[key].dtype, np.float64)
      bar = 1e-13 if is_exact else 3e-6
      self.assertLess(distance(ours[key], value), bar, key)

  @parameterized.parameters(*FAMILIES)
  def test_packed_documents(self, name):
    """A row of documents is the reference's rows of one each."""
    lengths = (9, 1, 14, 40)
    tokens = decoders.tokens(sum(lengths), rows=1)
    segments = np.repeat([4, 0, 7, 2], lengths)[None]
    config, params = (m := hf.load(written(name))).config, m.params
    packed = logits(config, params, tokens, None, segments)[0]
    value, _ = jax.jit(decoder.make_loss(config))(
        params, {'tokens': tokens, 'segments': segments}
    )
    model = reference.load(written(name))
    total = 0.0
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
      given = reference.ids(tokens[:, start:end])
      with torch.no_grad():
        out = model(given, labels=given)
      theirs = out.logits[0].numpy()
      self.assertLess(distance(packed[start:end], theirs), BAR)
      if end - start > 1:
        total += float(out.loss) * (end - start - 1)
    mean = total / (sum(lengths) - len(lengths))
    self.assertLess(abs(float(value) / mean - 1), BAR)


def attend(
    q,
    k,
    v,
    mask=None,
    is_causal=False,
    local_window_size=None,
    implementation=None,
):
  """Returns what `jax.nn.dot_product_attention` does, in the dtype of q."""
  del implementation
  shape = q.shape
  q = q.reshape(*shape[:2], k.shape[2], -1, shape[3])
  scores = jnp.einsum('bskgd,btkd->bkgst', q, k) * shape[3] ** -0.5
  if mask is None:
    ahead = jnp.arange(k.shape[1])[None] - jnp.arange(shape[1])[:, None]
    mask = ahead <= 0 if is_causal else ahead <= k.shape[1]
    if local_window_size is not None:
      mask &= -ahead <= local_window_size[0]
    mask = mask[None, None]
  scores = jnp.where(mask[:, :, None], scores, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1)
  return jnp.einsum('bkgst,btkd->bskgd', probs, v).reshape(shape)


class PositionsTest(parameterized.TestCase):

  @parameterized.product(
      name=FAMILIES, theta=(1e4, 5e5, 1e6), dim=(64, 80, 128, 256)
  )
  def test_frequencies(self, name, theta, dim):
    """Those of sizes in use: equal, but for a few where powers are rounded twice."""
    changes = {'rope_theta': theta}
    if name == 'qwen3':
      said = dict(rope_type='default', rope_theta=theta)
      changes = {'rope_parameters': said}
    if name == 'llama3':
      said = decoders.CONFIGS[name]['rope_scaling']
      original = {'original_max_position_embeddings': 8192}
      changes['rope_scaling'] = {**said, **original}
    sizes = dict(ONE_HEAD, head_dim=dim, hidden_size=8, vocab_size=8)
    sizes |= dict(num_hidden_layers=1, max_position_embeddings=131072)
    raw = {**decoders.CONFIGS[name], **changes, **sizes}
    theirs = reference.frequencies(raw)
    ours = rotary.frequencies(hf_config.from_dict(raw).rotary, dim)
    ulps = np.abs(ours.view(np.int32) - theirs.view(np.int32))
    self.assertLessEqual(ulps.max(), 2)
    self.assertLessEqual(np.sum(ulps > 0), dim // 2 * 0.05)

  @parameterized.product(name=FAMILIES, start=(4096, 16384, 100_000))
  def test_far_positions(self, name, start):
    self.check(name, 128, start, 'eager')

  @parameterized.parameters(
      ('llama3', 4096), ('mistral', 4096), ('qwen3', 4096), ('llama3', 8192)
  )
  def test_long_rows(self, name, length):
    self.check(name, length, 0, 'sdpa')  # Without scores of all pairs.

  def check(self, name, length, start, attention):
    folder = written(name, **ONE_HEAD, max_position_embeddings=131072)
    tokens = decoders.tokens(length, rows=1)
    positions = start + np.arange(length, dtype=np.int32)[None]
    model = reference.load(folder, attention=attention)
    theirs = reference.logits(model, tokens, positions)
    table = model.model.rotary_emb.inv_freq
    own, moved = table.clone(), []
    for towards in (0.0, np.inf):
      table.copy_(torch.nextafter(own, torch.tensor(towards)))
      moved.append(reference.logits(model, tokens, positions))
    ulp = max(distance(x, theirs) for x in moved)
    model = hf.load(folder)
    ours = logits(model.config, model.params, tokens, positions)
    error = distance(ours, theirs)
    print(f'{name} {length} from {start}: an ulp {ulp:.1e}, ours {error:.1e}')
    self.assertGreater(ulp, 4e-6)  # The bar is above the order of sums.
    self.assertLess(error, ulp / 2)


# Of a feature that is off, name of the checkpoint: change of the config, or of a leaf.
OFF = {
    'theta': ('llama2', dict(rotary=rotary.Rotary(theta=10100.0))),
    'theta of another family': ('qwen3', dict(rotary=rotary.Rotary())),
    'eps': ('llama2', dict(norm_eps=1e-6)),
    'scaling': ('llama_linear', dict(rotary=rotary.Rotary())),
    'factor': ('llama_linear', dict(rotary=rotary.Rotary(1e4, 'linear', 4.1))),
    'kind': ('llama3', dict(rotary=rotary.Rotary(500.0, 'linear', 8.0))),
    'no kind': ('llama3', dict(rotary=rotary.Rotary(500.0))),
    'length': (
        'llama3',
        dict(rotary=rotary.Rotary(500.0, 'llama3', 8.0, 1.0, 4.0, 250)),
    ),
    'low': (
        'llama3',
        dict(rotary=rotary.Rotary(500.0, 'llama3', 8.0, 1.1, 4.0, 256)),
    ),
    'high': (
        'llama3',
        dict(rotary=rotary.Rotary(500.0, 'llama3', 8.0, 1.0, 4.4, 256)),
    ),
    'no window': ('mistral', dict(window=None)),
    'a window more': ('mistral', dict(window=8)),
    'a window less': ('mistral', dict(window=6)),
    'a window more, mixed': ('qwen2', dict(window=6)),
    'a window less, mixed': ('qwen2', dict(window=4)),
    'all windowed': ('qwen2', dict(windowed=())),
    'another windowed': ('qwen2', dict(windowed=(True, False, True))),
    'no norm of queries and keys': ('qwen3', dict(qk_norm=False)),
    'no biases of queries': ('qwen2', dict(qkv_bias=False)),
    'no bias of outputs': ('llama_linear', dict(output_bias=False)),
    'no biases of the mlp': ('llama_linear', dict(mlp_bias=False)),
    **{
        f'lost {path} of {name}': (name, path)
        for name, path in (
            ('llama_linear', 'layers/self_attn/q_proj/bias'),
            ('llama_linear', 'layers/self_attn/o_proj/bias'),
            ('llama_linear', 'layers/mlp/down_proj/bias'),
            ('qwen2', 'layers/self_attn/k_proj/bias'),
            ('qwen2', 'layers/self_attn/v_proj/bias'),
            ('qwen3', 'layers/self_attn/q_norm/scale'),
            ('qwen3', 'layers/self_attn/k_norm/scale'),
            ('mistral', 'layers/input_layernorm/scale'),
            ('mistral', 'layers/post_attention_layernorm/scale'),
            ('mistral', 'norm/scale'),
        )
    },
}


class OffTest(parameterized.TestCase):
  """What is off on purpose is at least fifty times as far as the bar."""

  @parameterized.parameters(*OFF)
  def test_shows(self, what):
    name, change = OFF[what]
    model = hf.load(written(name))
    config, params = model.config, model.params
    if isinstance(change, dict):
      config = dataclasses.replace(config, **change)
    else:
      leaves = bl.matrices.named_leaves(params)
      lost = jnp.ones_like if change.endswith('scale') else jnp.zeros_like
      leaves[change] = lost(leaves[change])
      params = jax.tree.structure(params).unflatten(leaves.values())
    self.check(name, config, params)

  def test_a_head_of_its_own(self):
    """A tied head is the embedding: one that is not, by a sign of one row, shows."""
    model = hf.load(written('llama3'))
    self.assertTrue(model.config.tied)
    config = dataclasses.replace(model.config, tied=False)
    head = model.params['embed_tokens']['embedding'].T
    params = {**model.params, 'lm_head': {'kernel': head}}
    tokens = decoders.tokens(257)
    theirs = expected('llama3', 257)['logits']
    self.assertLess(distance(logits(config, params, tokens), theirs), BAR)
    params['lm_head'] = {'kernel': head.at[:, 0].multiply(-1)}
    self.check('llama3', config, params)

  def check(self, name, config, params):
    ours = logits(config, params, decoders.tokens(257))
    error = distance(ours, expected(name, 257)['logits'])
    self.assertGreater(error, 50 * BAR)
