"""Folders that transformers writes are read here, and the other way around.

Folders are written by `save_pretrained` from weights of unit gain; the config is
then rewritten as other versions of the library wrote theirs. transformers and
`hf.load` read it, and logits are compared, in terms of the largest: 1.3e-6 at most in
either direction, bar 2e-5. Computed in bfloat16 both are 1 to 3 per cent off float32.
"""

import json
import pathlib
import tempfile

from absl.testing import parameterized
import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import decoder_test  # noqa: E402  (what may be missing comes first)
from huggingface_hub import errors  # noqa: E402
import reference  # noqa: E402
from safetensors import torch as safetensors  # noqa: E402

from bernoulli_lora_jax.models import decoder  # noqa: E402
from bernoulli_lora_jax.models import hf  # noqa: E402

BAR = decoder_test.TOLERANCE
TOKENS = decoders.tokens(40)
_BASE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
)
_ABSENT = ...
_LLAMA3 = dict(
    rope_type='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
    rope_theta=500.0,
)
_LINEAR = dict(rope_type='linear', factor=4.0, rope_theta=700.0)
_MIXED = ['sliding_attention', 'full_attention', 'sliding_attention']
_OLD = dict(  # Of the same meaning as _LLAMA3.
    rope_parameters=_ABSENT,
    rope_theta=500.0,
    rope_scaling={k: v for k, v in _LLAMA3.items() if k != 'rope_theta'},
)

# What it is about: family, arguments of its config, and what the file says instead.
SHAPES = {
    'llama as written': ('llama', {}, {}),
    'llama of old': (
        'llama',
        dict(rope_parameters=_LLAMA3),
        {
            **_OLD,
            'dtype': _ABSENT,
            'torch_dtype': 'float32',
            'head_dim': _ABSENT,
        },
    ),
    'rope_scaling of type': (
        'llama',
        dict(rope_parameters=_LINEAR),
        dict(
            rope_parameters=_ABSENT,
            rope_theta=700.0,
            rope_scaling=dict(type='linear', factor=4.0),
        ),
    ),
    'rope_scaling null': (
        'llama',
        dict(rope_parameters=dict(rope_type='default', rope_theta=700.0)),
        dict(rope_parameters=_ABSENT, rope_theta=700.0, rope_scaling=None),
    ),
    'no word of rotary': ('llama', {}, dict(rope_parameters=_ABSENT)),
    'rope_theta outside of rope_parameters': (
        'llama',
        {},
        dict(rope_parameters=dict(rope_type='default'), rope_theta=700.0),
    ),
    'rope_theta inside and outside': (
        'llama',
        {},
        dict(
            rope_parameters=dict(rope_type='default', rope_theta=700.0),
            rope_theta=500.0,
        ),
    ),
    'rope_scaling beside rope_parameters': (
        'llama',
        {},
        dict(
            rope_parameters=dict(rope_type='default', rope_theta=700.0),
            rope_scaling=dict(rope_type='linear', factor=4.0),
            rope_theta=500.0,
        ),
    ),
    'no original length': (
        'llama',
        {},
        dict(
            rope_parameters={
                k: v for k, v in _LLAMA3.items() if not k.startswith('orig')
            },
            max_position_embeddings=64,
        ),
    ),
    'original length outside': (
        'llama',
        {},
        dict(rope_parameters=_LLAMA3, original_max_position_embeddings=32),
    ),
    'a key of another kind': (
        'llama',
        {},
        dict(rope_parameters={**_LINEAR, 'attention_factor': 2.0}),
    ),
    'no num_key_value_heads': (
        'llama',
        dict(num_key_value_heads=None),
        dict(num_key_value_heads=_ABSENT),
    ),
    'num_key_value_heads null': (
        'llama',
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=None),
    ),
    'head_dim null': ('llama', {}, dict(head_dim=None)),
    'a head_dim of its own': ('llama', dict(head_dim=12), {}),
    'biases of llama': ('llama', dict(attention_bias=True, mlp_bias=True), {}),
    'llama that mentions windows': (
        'llama',
        {},
        dict(sliding_window=3, layer_types=['sliding_attention'] * 3),
    ),
    'fields that are left out': (
        'llama',
        {},
        dict.fromkeys(
            (
                *('rms_norm_eps', 'hidden_act', 'attention_bias', 'mlp_bias'),
                *('tie_word_embeddings', 'architectures', 'dtype'),
            ),
            _ABSENT,
        ),
    ),
    'swish': ('llama', {}, dict(hidden_act='swish')),
    'mistral as written': ('mistral', dict(sliding_window=7), {}),
    'sliding_window null': ('mistral', dict(sliding_window=None), {}),
    'no sliding_window': (
        'mistral',
        dict(sliding_window=4096),
        dict(sliding_window=_ABSENT),
    ),
    'mistral of old': (
        'mistral',
        dict(sliding_window=7),
        dict(rope_parameters=_ABSENT, rope_theta=1e6, head_dim=_ABSENT),
    ),
    'layer_types of mistral': (
        'mistral',
        dict(sliding_window=7),
        dict(layer_types=_MIXED),
    ),
    'layer_types of mistral, all full': (
        'mistral',
        dict(sliding_window=7),
        dict(layer_types=['full_attention'] * 3),
    ),
    'mistral that mentions biases': (
        'mistral',
        {},
        dict(attention_bias=True, mlp_bias=True),
    ),
    'mistral of a head_dim of its own': (
        'mistral',
        dict(hidden_size=30, head_dim=12),
        {},
    ),
    'mistral of another head_dim, no window': (
        'mistral',
        dict(hidden_size=30, head_dim=12, sliding_window=None),
        {},
    ),
    'mistral tied': ('mistral', dict(tie_word_embeddings=True), {}),
    'qwen2 as written': ('qwen2', {}, {}),
    'qwen2 with windows off': (
        'qwen2',
        {},
        dict(use_sliding_window=False, sliding_window=5, max_window_layers=1),
    ),
    'qwen2 with no word of windows': (
        'qwen2',
        {},
        dict(
            use_sliding_window=_ABSENT,
            sliding_window=5,
            max_window_layers=_ABSENT,
            layer_types=_ABSENT,
        ),
    ),
    'qwen2 of old, windowed': (
        'qwen2',
        {},
        dict(
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=2,
            layer_types=_ABSENT,
        ),
    ),
    'qwen2 of no max_window_layers': (
        'qwen2',
        {},
        dict(
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=_ABSENT,
            layer_types=_ABSENT,
        ),
    ),
    'layer_types of qwen2': (
        'qwen2',
        {},
        dict(use_sliding_window=True, sliding_window=5, layer_types=_MIXED),
    ),
    'layer_types beside max_window_layers': (
        'qwen2',
        {},
        dict(
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=3,
            layer_types=_MIXED,
        ),
    ),
    'qwen2 of a head_dim of its own': ('qwen2', dict(head_dim=12), {}),
    'qwen2 that mentions biases': ('qwen2', {}, dict(attention_bias=False)),
    'qwen2 with rope_scaling': (
        'qwen2',
        dict(rope_parameters=_LINEAR),
        dict(
            rope_parameters=_ABSENT,
            rope_theta=700.0,
            rope_scaling=dict(type='linear', factor=4.0),
        ),
    ),
    'qwen3 as written': ('qwen3', dict(head_dim=12), {}),
    'qwen3 without head_dim': ('qwen3', dict(), dict(head_dim=_ABSENT)),
    'biases of qwen3': ('qwen3', dict(head_dim=12, attention_bias=True), {}),
    'layer_types of qwen3': (
        'qwen3',
        dict(head_dim=12),
        dict(use_sliding_window=True, sliding_window=5, layer_types=_MIXED),
    ),
    'qwen3 windowed': (
        'qwen3',
        dict(head_dim=12),
        dict(
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=0,
            layer_types=_ABSENT,
        ),
    ),
    'qwen3 tied': (
        'qwen3',
        dict(head_dim=12, tie_word_embeddings=True),
        {},
    ),
}

# What transformers refuses as well.
REFUSED = {
    'head_dim of qwen3 null': ('qwen3', dict(head_dim=None), 'head_dim'),
    'sliding layers of no window': (
        'qwen2',
        dict(use_sliding_window=False, sliding_window=5, layer_types=_MIXED),
        'sliding_window',
    ),
    'layer_types of other layers': (
        'qwen2',
        dict(layer_types=_MIXED[:2]),
        'layer_types',
    ),
    'rotary embeddings by layer_types': (
        'qwen2',
        dict(
            layer_types=['full_attention'] * 3,
            rope_parameters={'full_attention': _LINEAR},
        ),
        'one rotary embedding',
    ),
    'no factor': (
        'llama',
        dict(rope_parameters=dict(rope_type='linear', rope_theta=700.0)),
        'factor',
    ),
}


def build(family, **arguments):
  """Returns a model of transformers with weights of unit gain."""
  config = transformers.AutoConfig.for_model(family, **{**_BASE, **arguments})
  model = transformers.AutoModelForCausalLM.from_config(
      config, attn_implementation='eager'
  )
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.copy_(torch.tensor(decoders.tensor(name, tuple(x.shape))))
  return model.eval()


def distance(ours, theirs):
  ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
  return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def logits(config, params, tokens=TOKENS):
  apply = jax.jit(decoder.apply, static_argnums=0)
  return decoder.logits(apply(config, params, tokens))


def rewrite(folder, changes):
  path = folder / 'config.json'
  raw = {**json.loads(path.read_text()), **changes}
  raw = {k: v for k, v in raw.items() if v is not _ABSENT}
  path.write_text(json.dumps(raw))


def check_loaded(test, folder, expected):
  """Compares with logits those that transformers makes of a folder."""
  transformers.utils.logging.disable_progress_bar()
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
      folder,
      dtype=torch.float32,
      attn_implementation='eager',
      output_loading_info=True,
  )
  for key, found in info.items():
    test.assertEmpty(found, key)
  theirs = reference.logits(model.eval(), TOKENS)
  test.assertLess(distance(expected, theirs), BAR)


class FolderTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(scratch)

  def check(self, folder, **options):
    """Compares logits of a folder; returns ours of it."""
    theirs = reference.logits(reference.load(folder), TOKENS)
    model = hf.load(folder, dtype=jnp.float32, **options)
    error = distance(logits(model.config, model.params), theirs)
    self.assertLess(error, BAR)
    return model


class WrittenByTransformersTest(FolderTest):

  @parameterized.parameters(*SHAPES)
  def test_config(self, what):
    """The same logits; and `describe` says in its own words all of a config."""
    family, arguments, changes = SHAPES[what]
    build(family, **arguments).save_pretrained(self.folder / 'base')
    rewrite(self.folder / 'base', changes)
    model = self.check(self.folder / 'base')
    own = hf.describe(model.config, model.params)
    out = hf.save(self.folder / 'own', model.params, own)
    check_loaded(self, out, logits(model.config, model.params))

  @parameterized.parameters(*REFUSED)
  def test_refused_alike(self, what):
    family, changes, message = REFUSED[what]
    build(family).save_pretrained(self.folder)
    rewrite(self.folder, changes)
    with self.assertRaisesRegex(ValueError, message):
      hf.load(self.folder)
    refusals = ValueError, TypeError, KeyError, errors.StrictDataclassError
    with self.assertRaises(refusals):
      reference.logits(reference.load(self.folder), TOKENS)

  @parameterized.product(
      name=tuple(decoders.CONFIGS), dtype=('bfloat16', 'float16')
  )
  def test_shards_and_dtypes(self, name, dtype):
    """Weights of half precision, in files of 20 kB: equal in float32.

    Computed in bfloat16 either is as far from float32 as the other. (In float16 jax
    has no products on CPUs.)
    """
    source = reference.load(decoders.write(self.folder / 'one', name))
    kind = getattr(torch, dtype)
    out = self.folder / 'many'
    source.to(kind).save_pretrained(out, max_shard_size='20KB')
    self.assertTrue((out / hf.INDEX).is_file())
    self.check(out)
    if dtype == 'float16':
      return
    wide = reference.logits(reference.load(out), TOKENS)
    theirs = distance(reference.logits(reference.load(out, kind), TOKENS), wide)
    model = hf.load(out)
    self.assertEqual(model.params['norm']['scale'].dtype, jnp.dtype(dtype))
    ours = distance(logits(model.config, model.params), wide)
    self.assertLess(ours, 2 * theirs)
    self.assertLess(theirs, 2 * ours)

  @parameterized.parameters(1, 2)
  def test_a_tied_head_in_the_file(self, times):
    """As old versions stored it; one that differs is refused here."""
    build('llama', tie_word_embeddings=True).save_pretrained(self.folder)
    file = self.folder / hf.SINGLE
    tensors = safetensors.load_file(file)
    self.assertNotIn('lm_head.weight', tensors)
    head = times * tensors['model.embed_tokens.weight']
    safetensors.save_file(
        {**tensors, 'lm_head.weight': head}, file, metadata={'format': 'pt'}
    )
    if times == 1:
      self.check(self.folder)
    else:
      with self.assertRaisesRegex(ValueError, 'they differ'):
        hf.load(self.folder)


class WrittenHereTest(FolderTest):

  @parameterized.product(
      name=tuple(decoders.CONFIGS),
      run=(
          dict(),
          dict(scan_layers=False, max_shard_bytes=20_000),
          dict(dtype='bfloat16'),
          dict(dtype='float16', max_shard_bytes=20_000),
      ),
  )
  def test_saved(self, name, run):
    base = decoders.write(self.folder / 'base', name)
    model = hf.load(base, scan_layers=run.get('scan_layers', True))
    options = {k: v for k, v in run.items() if k != 'scan_layers'}
    params = jax.tree.map(lambda x: 1.01 * x, model.params)  # Not the base's.
    out = hf.save(self.folder / 'out', params, model, **options)
    dtype = options.get('dtype')
    if dtype is not None:
      params = jax.tree.map(
          lambda x: x.astype(dtype).astype(jnp.float32), params
      )
      config = transformers.AutoConfig.from_pretrained(out)
      self.assertEqual(config.dtype, getattr(torch, dtype))
    check_loaded(self, out, logits(model.config, params))
