"""Adapters against peft, and generation against `generate` of transformers.

Measured in float32, in terms of the largest entry, the worst of families and layouts:
logits 2.1e-6, gradients of either factor 4.0e-6, bar 2e-5. Tokens are equal.
"""

import pathlib
import tempfile
import warnings

from absl.testing import parameterized
import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

import decoder_test  # noqa: E402  (what may be missing comes first)
import reference  # noqa: E402

from bernoulli_lora_jax import inject  # noqa: E402
from bernoulli_lora_jax.models import decoder  # noqa: E402
from bernoulli_lora_jax.models import generate  # noqa: E402
from bernoulli_lora_jax.models import hf  # noqa: E402

FAMILIES = tuple(decoders.CONFIGS)
BAR = decoder_test.TOLERANCE
RANK, ALPHA = 4, 8
TARGETS = {'q_proj': 'self_attn', 'v_proj': 'self_attn', 'down_proj': 'mlp'}


def distance(ours, theirs):
  return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


class PeftTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(scratch) / 'base'

  @parameterized.parameters(
      *((name, *run) for name in FAMILIES for run in ((True,), (False,))),
      ('llama2', True, True),
  )
  def test_logits_loss_and_gradients(self, name, scan_layers, use_rslora=False):
    """With factors {'left': Aᵀ, 'right': scale Bᵀ}: (m, r) and (r, n)."""
    decoders.write(self.folder, name)
    tokens = decoders.tokens(24)
    adapted = adapted_model(self.folder, use_rslora)
    given = reference.ids(tokens)
    out = adapted(given, labels=given)
    out.loss.backward()
    pairs = dict(adapted.named_parameters())
    model = hf.load(self.folder, scan_layers=scan_layers)
    scale = ALPHA / (RANK**0.5 if use_rslora else RANK)
    factors, expected = {}, {}
    for path, prefixes in places(scan_layers, model.config.num_layers).items():
      a, b = (
          [pairs[f'{prefix}.lora_{side}.default.weight'] for prefix in prefixes]
          for side in 'AB'
      )
      value = lambda xs: stacked(
          [x.detach().numpy().T for x in xs], scan_layers
      )
      slope = lambda xs: stacked([x.grad.numpy().T for x in xs], scan_layers)
      factors[path] = {'left': value(a), 'right': scale * value(b)}
      # The gradient by scale B is that by B, divided by the scale.
      expected[path] = {'left': slope(a), 'right': slope(b) / scale}

    def score(params, factors):
      run = lambda params: decoder.logits(
          decoder.apply(model.config, params, jnp.asarray(tokens))
      )
      return inject.by_product(run)(params, factors)

    ours = jax.jit(score)(model.params, factors)
    theirs = out.logits.detach().numpy()
    self.assertLess(distance(ours, theirs), BAR)
    plain = reference.logits(reference.load(self.folder), tokens)
    self.assertGreater(distance(plain, theirs), 1000 * BAR)
    loss = inject.by_product(decoder.make_loss(model.config))
    with warnings.catch_warnings():
      warnings.simplefilter('error', inject.FormedWarning)
      (value, _), slopes = jax.jit(
          jax.value_and_grad(loss, argnums=1, has_aux=True)
      )(model.params, factors, {'tokens': tokens}, None)
    self.assertLess(abs(float(value) / out.loss.item() - 1), BAR)
    for path, sides in expected.items():
      for side, slope in sides.items():
        error = distance(slopes[path][side], slope)
        self.assertLess(error, BAR, (path, side))


def adapted_model(folder, use_rslora=False):
  """Returns a model of peft, of which A and B are random."""
  config = peft.LoraConfig(
      r=RANK,
      lora_alpha=ALPHA,
      target_modules=list(TARGETS),
      use_rslora=use_rslora,
  )
  model = peft.get_peft_model(reference.load(folder), config)
  with torch.no_grad():
    for name, x in model.named_parameters():
      if '.lora_' in name:
        x.copy_(torch.tensor(0.5 * decoders.tensor(name, tuple(x.shape))))
  return model.eval()


def places(scan_layers, num_layers):
  """Returns {path of a kernel: prefixes of its modules in peft}."""
  found = {}
  for name, room in TARGETS.items():
    for i in range(num_layers):
      layers = 'layers' if scan_layers else f'layers_{i}'
      prefix = f'base_model.model.model.layers.{i}.{room}.{name}'
      found.setdefault(f'{layers}/{room}/{name}/kernel', []).append(prefix)
  return found


def stacked(xs, scan_layers):
  return np.stack(xs) if scan_layers else xs[0]


class GenerateTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(scratch) / 'base'

  @parameterized.product(name=FAMILIES, scan_layers=(True, False))
  def test_greedy(self, name, scan_layers):
    """One by one and padded on the left; some prompts are beyond the windows."""
    decoders.write(self.folder, name)
    lengths = (7, 1, 30, 12)
    prompts = [decoders.tokens(n, rows=1, seed=n)[0].tolist() for n in lengths]
    model = hf.load(self.folder, scan_layers=scan_layers)
    ours = generate.generate(
        model.config, model.params, prompts, max_new_tokens=16
    )
    theirs = reference.load(self.folder)
    alone = [greedy(theirs, [prompt])[0] for prompt in prompts]
    self.assertEqual(ours, alone)
    self.assertGreater(len({tuple(row) for row in ours}), 3)
    self.assertEqual(ours, greedy(theirs, prompts))
    ends = [ours[0][5], ours[2][3]]
    self.assertEqual(
        generate.generate(
            model.config,
            model.params,
            prompts,
            max_new_tokens=16,
            end_tokens=ends,
        ),
        [until(row, ends) for row in greedy(theirs, prompts, ends)],
    )


def greedy(model, prompts, ends=None):
  """Returns what the reference adds to prompts, padded on the left."""
  longest = max(map(len, prompts))
  pad = lambda x: [0] * (longest - len(x))
  out = model.generate(
      reference.ids([pad(x) + x for x in prompts]),
      attention_mask=reference.ids([pad(x) + [1] * len(x) for x in prompts]),
      do_sample=False,
      max_new_tokens=16,
      pad_token_id=0,
      eos_token_id=ends,
  )
  return out[:, longest:].tolist()


def until(row, ends):
  first = next((i for i, token in enumerate(row) if token in ends), len(row))
  return row[:first]
