"""Checkpoint folders of encoders in and out."""

import dataclasses
import json
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import chex
import encoders
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import encoder
from bernoulli_lora_jax.models import generate
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import hf_config

WHOLE = ('bert', 'bert_classifier', 'roberta', 'roberta_classifier')


class FolderTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(scratch)

  def write(self, name='bert', **more):
    return encoders.write(self.folder / 'base', name, **more)

  def rewrite(self, change):
    """Replaces the tensors of the base by what a function makes of them."""
    file = self.folder / 'base' / 'model.safetensors'
    safetensors.save_file(change(safetensors.load_file(file)), file)

  def save(self, params, model, **more):
    return hf.save(self.folder / 'out', params, model, **more)

  def tensors(self, folder):
    found = {}
    for file in sorted(pathlib.Path(folder).glob('*.safetensors')):
      found |= safetensors.load_file(file)
    return found


class RoundTripTest(FolderTest):

  @parameterized.product(name=WHOLE, scan_layers=(True, False))
  def test_saves_what_it_loads(self, name, scan_layers):
    base = self.write(name)
    (base / 'vocab.txt').write_text('[PAD]')
    model = hf.load(base, scan_layers=scan_layers)
    out = self.save(model.params, model)
    chex.assert_trees_all_equal(self.tensors(out), self.tensors(base))
    for file in ('config.json', 'vocab.txt'):
      stored = (out / file).read_text()
      read = json.loads if file.endswith('json') else str
      self.assertEqual(read(stored), read((base / file).read_text()))

  def test_in_shards_and_another_dtype(self):
    base = self.write('bert_classifier')
    model = hf.load(base)
    out = self.save(model.params, model, max_shard_bytes=9000, dtype='float16')
    index = json.loads((out / hf.INDEX).read_text())['weight_map']
    held = {
        name: file.name
        for file in out.glob('*.safetensors')
        for name in safetensors.load_file(file)
    }
    self.assertEqual(index, held)
    self.assertIn('bert.pooler.dense.weight', held)
    self.assertEqual(
        hf.load(out).params['classifier']['bias'].dtype, jnp.float16
    )

  def test_masked_words(self):
    """The encoder is taken, and is one of its own from then on."""
    base = self.write('bert_masked')
    exact = hf.load(base)

    def as_published(tensors):
      old = {
          'LayerNorm.weight': 'LayerNorm.gamma',
          'LayerNorm.bias': 'LayerNorm.beta',
      }
      for theirs, name in old.items():
        tensors = {k.replace(theirs, name): x for k, x in tensors.items()}
      return tensors | {
          'bert.embeddings.position_ids': np.arange(40)[None],
          'cls.predictions.bias': np.zeros(96, np.float32),
          'cls.predictions.transform.dense.weight': np.eye(3, dtype=np.float32),
      }

    self.rewrite(as_published)
    model = hf.load(base)
    chex.assert_trees_all_equal(model.params, exact.params)
    self.assertFalse(model.config.pooler)
    self.assertEqual(model.config.pooling, 'cls')
    out = self.save(model.params, model)
    config = json.loads((out / 'config.json').read_text())
    self.assertEqual(config['architectures'], ['BertModel'])
    plain = {
        k.removeprefix('bert.'): x
        for k, x in encoders.weights(encoders.CONFIGS['bert_masked']).items()
    }
    chex.assert_trees_all_equal(self.tensors(out), plain)

  @parameterized.parameters(
      ('bert', 'pooler', True), ('roberta', 'cls', True), ('bert', 'cls', False)
  )
  def test_what_a_row_becomes(self, name, expected, has_pooler):
    """What the family's classifier reads, unless another is asked for."""
    base = self.write(name)
    if not has_pooler:
      self.rewrite(lambda t: {k: x for k, x in t.items() if 'pooler' not in k})
    self.assertEqual(hf.load(base).config.pooling, expected)
    config = hf.load(base, pooling='mean').config
    self.assertEqual((config.pooling, config.pooler), ('mean', has_pooler))

  def test_labels(self):
    raw = encoders.CONFIGS['bert_classifier']
    count = lambda raw: hf_config.from_dict(raw).num_labels
    self.assertEqual(count(raw), 5)
    rest = {k: x for k, x in raw.items() if k != 'id2label'}
    self.assertEqual(count(rest), 2)
    self.assertEqual(count({**rest, 'num_labels': 3}), 3)
    self.assertEqual(count({**raw, 'architectures': ['BertModel']}), 0)

  def test_labels_of_a_new_head(self):
    model = hf.load(self.write())
    config, params = encoder.add_head(
        model.config, model.params, 3, jax.random.key(0)
    )
    changed = dataclasses.replace(model, config=config)
    out = self.save(params, changed)
    raw = json.loads((out / 'config.json').read_text())
    self.assertEqual(raw['architectures'], ['BertForSequenceClassification'])
    self.assertEqual(raw['id2label'], {str(i): f'LABEL_{i}' for i in range(3)})
    self.assertEqual(raw['label2id'], {f'LABEL_{i}': i for i in range(3)})
    again = hf.load(out)
    self.assertEqual(again.config, config)
    chex.assert_trees_all_equal(again.params, params)
    own = {**model.raw, 'id2label': {'0': 'a', '1': 'b', '2': 'c'}}
    own = dataclasses.replace(changed, raw=own)
    named = hf.load(hf.save(self.folder / 'named', params, own)).raw
    self.assertEqual(named['id2label'], own.raw['id2label'])

  def test_a_pooler_that_is_not_read(self):
    """Files of RoBERTa's classifiers may hold one; it comes along."""
    model = hf.load(self.write('roberta'))
    config, params = encoder.add_head(
        model.config, model.params, 3, jax.random.key(0)
    )
    changed = dataclasses.replace(model, config=config)
    out = self.save(params, changed)
    self.assertIn('roberta.pooler.dense.weight', self.tensors(out))
    again = hf.load(out)
    self.assertEqual(again.config, config)
    chex.assert_trees_all_equal(again.params, params)

  def test_labels_of_another_number(self):
    model = hf.load(self.write('bert_classifier'))
    config, params = encoder.add_head(
        model.config, model.params, 3, jax.random.key(0)
    )
    changed = dataclasses.replace(model, config=config)
    again = hf.load(self.save(params, changed))
    self.assertEqual(again.config, config)
    chex.assert_trees_all_equal(again.params, params)

  @parameterized.parameters(*WHOLE)
  def test_a_model_of_ones_own(self, name):
    model = hf.load(self.write(name))
    own = hf.describe(model.config, model.params)
    again = hf.load(self.save(model.params, own))
    self.assertEqual(again.config, model.config)
    chex.assert_trees_all_equal(again.params, model.params)


class RefusalsTest(FolderTest):

  @parameterized.parameters(
      (dict(hidden_act='gelu_new'), "hidden_act 'gelu' in .*'gelu_new'"),
      (dict(hidden_act='relu'), 'hidden_act'),
      (
          dict(position_embedding_type='relative_key'),
          "position_embedding_type 'absolute' in .*'relative_key'",
      ),
      (dict(is_decoder=True), 'is_decoder False in .*True'),
      (dict(add_cross_attention=True), 'add_cross_attention False'),
      (dict(problem_type='regression'), 'problem_type.*regression'),
      (
          dict(quantization_config={'quant_method': 'gptq'}),
          'quantization_config',
      ),
      (dict(architectures=['BertForTokenClassification']), 'architectures'),
      (dict(architectures=['RobertaModel']), 'architectures'),
      (dict(architectures='BertModel'), 'architectures in .* a list'),
      (dict(model_type='deberta'), "'roberta'.*'deberta'"),
      (dict(vocab_size=96.0), 'vocab_size in .* a whole number'),
      (dict(num_hidden_layers=True), 'num_hidden_layers in .* a whole'),
      (dict(layer_norm_eps='1e-12'), 'layer_norm_eps in .* a number'),
      (dict(id2label=['a']), 'id2label in .* an object'),
      (dict(num_attention_heads=5), 'num_heads to divide hidden_size'),
  )
  def test_configs(self, change, message):
    base = self.write('bert')
    raw = {**encoders.CONFIGS['bert'], **change}
    (base / 'config.json').write_text(json.dumps(raw))
    with self.assertRaisesRegex(ValueError, message) as e:
      hf.load(base)
    self.assertNotIn('\n', str(e.exception))

  def test_padding_of_roberta(self):
    raw = {**encoders.CONFIGS['roberta'], 'pad_token_id': None}
    with self.assertRaisesRegex(ValueError, 'pad_token_id, a whole number'):
      hf_config.from_dict(raw)

  @parameterized.parameters(
      ('bert_classifier', 'bert.pooler.dense.bias', 'pooler.dense.bias in'),
      ('bert_classifier', 'classifier.weight', 'classifier.weight in'),
      (
          'bert',
          'encoder.layer.1.output.dense.bias',
          'layer.1.output.dense.bias',
      ),
  )
  def test_tensors_that_are_missing(self, name, lost, message):
    base = self.write(name)
    self.rewrite(lambda t: {k: x for k, x in t.items() if k != lost})
    with self.assertRaisesRegex(ValueError, f'{message}.*missing'):
      hf.load(base)

  def test_tensors_that_are_superfluous(self):
    base = self.write('bert')
    self.rewrite(lambda t: t | {'classifier.weight': np.zeros((2, 32))})
    with self.assertRaisesRegex(ValueError, 'no tensor classifier.weight'):
      hf.load(base)
    self.rewrite(
        lambda t: t | {'bert.pooler.dense.bias': t['pooler.dense.bias']}
    )
    with self.assertRaisesRegex(
        ValueError, 'one of bert.pooler.dense.bias and .*both'
    ):
      hf.load(base)

  @parameterized.parameters(
      ('bert', dict(pooling='mean')),
      ('bert', dict(pooling='cls')),
      ('bert', dict(head='dense')),
      ('roberta', dict(pooling='mean')),
      ('roberta', dict(head='linear')),
  )
  def test_heads_that_would_be_run_otherwise(self, name, change):
    model = hf.load(self.write(name))
    config, params = encoder.add_head(
        model.config, model.params, 3, jax.random.key(0), **change
    )
    changed = dataclasses.replace(model, config=config)
    with self.assertRaisesRegex(ValueError, 'would be run as the former'):
      self.save(params, changed)
    self.assertFalse((self.folder / 'out').exists())
    params.pop('classifier')
    hf.load(self.save(params, model))  # As it says.

  def test_how_it_is_run(self):
    with self.assertRaisesRegex(ValueError, 'run .*got max_segments'):
      hf.load(self.write(), max_segments=3)

  def test_where_decoders_are_needed(self):
    model = hf.load(self.write())
    for call in (
        lambda: decoder.make_loss(model.config),
        lambda: decoder.matrices(model.config),
        lambda: generate.generate(
            model.config, model.params, [[1]], max_new_tokens=1
        ),
    ):
      with self.assertRaisesRegex(
          ValueError, 'a decoder.*got an EncoderConfig'
      ):
        call()


if __name__ == '__main__':
  absltest.main()
