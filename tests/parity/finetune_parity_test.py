"""What `blora finetune` writes, as transformers and peft load it."""

import contextlib
import functools
import io
import pathlib
import tempfile

from absl.testing import parameterized
import numpy as np
import pytest

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')
transformers = pytest.importorskip('transformers')

import decoders  # noqa: E402  (what may be missing comes first)
import finetune_runs  # noqa: E402
import reference  # noqa: E402

from bernoulli_lora_jax import cli  # noqa: E402
from bernoulli_lora_jax.models import decoder  # noqa: E402
from bernoulli_lora_jax.models import hf  # noqa: E402

# Two programs in float32, logits of size 1 to 10: see `peft_oracle_test`.
TOL = 5e-5


@functools.cache
def run(method):
  """Returns the scratch folder, and the output of a run in it."""
  scratch = tempfile.TemporaryDirectory()
  folder = pathlib.Path(scratch.name)
  finetune_runs.write_model(folder / 'model')
  finetune_runs.write_data(folder / 'data.jsonl')
  output = folder / 'output'
  with contextlib.redirect_stdout(io.StringIO()):
    cli.main(finetune_runs.command(folder, output, method=method))
    cli.main(['export', str(output), '--format=vllm'])
  return scratch, folder / 'model', output


def ours(folder, tokens):
  found = hf.load(folder)
  out = decoder.apply(found.config, found.params, tokens)
  return np.asarray(decoder.logits(out))


class FinetuneTest(parameterized.TestCase):

  @parameterized.parameters('bernoulli', 'lora')
  def test_transformers_and_peft_load_it(self, method):
    _, model, output = run(method)
    tokens = decoders.tokens(24, vocab=512)
    expected = ours(output / 'merged', tokens)
    merged = reference.logits(reference.load(output / 'merged'), tokens)
    np.testing.assert_allclose(merged, expected, rtol=TOL, atol=TOL)
    before = reference.logits(reference.load(model), tokens)
    self.assertGreater(np.abs(before - expected).max(), 0.01)
    for name in ('adapter', 'adapter_vllm'):
      with self.subTest(name):
        tuned = peft.PeftModel.from_pretrained(
            reference.load(model), output / name
        )
        found = reference.logits(tuned, tokens)
        # Merges round each link to float32: some ulps of the weights.
        np.testing.assert_allclose(found, expected, rtol=4 * TOL, atol=4 * TOL)

  def test_transformers_says_the_same(self):
    """The tokenizer is there, and greedy answers are ours."""
    _, _, output = run('bernoulli')
    words = transformers.AutoTokenizer.from_pretrained(output / 'merged')
    prompt = 'Question 3: how are you?'
    asked = words(prompt, return_tensors='pt')['input_ids']
    made = reference.load(output / 'merged').generate(
        asked,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=words.pad_token_id,
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
      cli.main(
          ['generate', str(output), '--prompt', prompt, '--max-new-tokens=8']
      )
    said = words.decode(made[0, asked.shape[1] :])
    self.assertEqual(out.getvalue().removesuffix('\n'), said)
