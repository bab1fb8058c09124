"""Encoders against transformers on PyTorch: values and all gradients.

Errors are the largest difference in terms of the largest entry of a value, and of a
gradient in terms of the largest entry of all gradients. Measured, the worst of all
models and layouts:

            values    gradients    bar
  float32   1.4e-6    1.2e-6       2e-5
  float64   2.2e-15   1.8e-15      1e-13
"""

import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import encoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import encoder_reference  # noqa: E402  (what may be missing comes first)
import encoder_test  # noqa: E402

from bernoulli_lora_jax.models import encoder  # noqa: E402
from bernoulli_lora_jax.models import hf  # noqa: E402
from bernoulli_lora_jax.models import hf_encoders  # noqa: E402

NAMES = tuple(encoders.CONFIGS)

torch.set_num_threads(1)  # Workers share the cores.


class FolderTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(scratch)

  def write(self, name, **more):
    return encoders.write(self.folder / 'base', name, **more)


class ResultsTest(FolderTest):

  @parameterized.product(
      name=NAMES, scan_layers=(True, False), is_wide=(False, True)
  )
  def test_values_and_gradients(self, name, scan_layers, is_wide):
    """float64: both do everything in it. float32: sums in another order."""
    folder = self.write(name)
    batch = encoders.batch(encoders.CONFIGS[name], seed=1)
    dtype = torch.float64 if is_wide else torch.float32
    theirs, their_grads = encoder_reference.results(folder, batch, dtype)
    with jax.enable_x64(is_wide):
      width = jnp.float64 if is_wide else jnp.float32
      pooling = 'pooler' if name == 'roberta' else None
      model = hf.load(
          folder, dtype=width, scan_layers=scan_layers, pooling=pooling
      )
      found, grads = jax.tree.map(
          np.asarray, encoder_test.results(model.config, model.params, batch)
      )
    bar = 1e-13 if is_wide else encoder_test.TOLERANCE
    error = encoder_test.distance(found, theirs)
    self.assertEqual(found['hidden'].dtype, np.dtype(width))
    self.assertLess(error, bar)
    plain = {
        hf_encoders.plain_name(model.family, k): x
        for k, x in their_grads.items()
    }
    ours = _by_tensor(model, grads)
    # PyTorch's embeddings give none to the row of padding.
    pad = model.raw['pad_token_id']
    ours['embeddings.word_embeddings.weight'][pad] = 0
    if model.family == 'roberta':
      ours['embeddings.position_embeddings.weight'][pad] = 0
    largest = max(np.max(np.abs(x)) for x in plain.values())
    self.assertContainsSubset(ours, plain)
    errors = {k: np.max(np.abs(ours[k] - plain[k])) / largest for k in ours}
    print(f'{name} {width.dtype}: {error:.1e}, {max(errors.values()):.1e}')
    self.assertLess(max(errors.values()), bar)


def _by_tensor(model, grads):
  """Returns {name of a tensor: gradient, as PyTorch has it}."""
  found = {}
  for path, x in encoder_test.bl.matrices.named_leaves(grads).items():
    names = hf.tensor_names(model.family, model.config, path)
    layers = x if path.startswith('layers/') else [x]
    for name, one in zip(names, layers, strict=True):
      found[name] = np.array(one.T if path.endswith('/kernel') else one)
  return found


class SavedTest(FolderTest):
  """What is saved is what transformers reads."""

  @parameterized.parameters(*NAMES)
  def test_of_changed_weights(self, name):
    model = hf.load(self.write(name))
    params = jax.tree.map(lambda x: 1.1 * x, model.params)
    self.check(model, model.config, params, encoders.CONFIGS[name])

  @parameterized.parameters('bert', 'roberta')
  def test_of_a_new_head(self, name):
    model = hf.load(self.write(name))
    self.assertEqual(model.config.num_labels, 0)
    config, params = encoder.add_head(
        model.config, model.params, 4, jax.random.key(0)
    )
    self.check(model, config, params, encoders.CONFIGS[name])

  @parameterized.parameters('bert_classifier', 'roberta_classifier', 'bert')
  def test_of_a_model_of_ones_own(self, name):
    model = hf.load(self.write(name))
    params = jax.tree.map(lambda x: 1.1 * x, model.params)
    own = hf.describe(model.config, params)
    self.check(own, model.config, params, encoders.CONFIGS[name])

  def check(self, model, config, params, raw):
    changed = hf.dataclasses.replace(model, config=config)
    out = hf.save(self.folder / 'out', params, changed)
    batch = encoders.batch(raw)
    theirs, _ = encoder_reference.results(out, batch)
    ours, _ = encoder_test.results(config, params, batch)
    if not config.num_labels:  # Of another pooling.
      theirs.pop('pooled')
      ours.pop('pooled')
    self.assertLess(encoder_test.distance(ours, theirs), encoder_test.TOLERANCE)
    again = hf.load(out)
    self.assertEqual(again.config, config)
    encoder_test.chex.assert_trees_all_equal(again.params, params)


if __name__ == '__main__':
  absltest.main()
