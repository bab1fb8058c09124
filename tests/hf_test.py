"""Checkpoint folders in and out."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import chex
import decoders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import hf_config

FAMILIES = tuple(decoders.CONFIGS)


class FolderTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(scratch)

  def write(self, name='llama2', **more):
    return decoders.write(self.folder / 'base', name, **more)

  def tensors(self, folder):
    found = {}
    for file in sorted(pathlib.Path(folder).glob('*.safetensors')):
      found |= safetensors.load_file(file)
    return found


class RoundTripTest(FolderTest):

  @parameterized.product(name=FAMILIES, scan_layers=(True, False))
  def test_saves_what_it_loads(self, name, scan_layers):
    base = self.write(name)
    model = hf.load(base, scan_layers=scan_layers)
    out = hf.save(self.folder / 'out', model.params, model)
    chex.assert_trees_all_equal(self.tensors(out), self.tensors(base))
    stored = json.loads((out / 'config.json').read_text())
    self.assertEqual(stored, json.loads((base / 'config.json').read_text()))

  @parameterized.parameters(ml_dtypes.bfloat16, np.float16)
  def test_the_dtype_of_the_base_is_kept(self, dtype):
    base = self.write('qwen3', dtype=dtype)
    model = hf.load(base, dtype=jnp.float32)
    self.assertEqual(model.params['norm']['scale'].dtype, jnp.float32)
    out = hf.save(self.folder / 'out', model.params, model)
    chex.assert_trees_all_equal(self.tensors(out), self.tensors(base))
    self.assertEqual(
        {x.dtype for x in self.tensors(out).values()}, {np.dtype(dtype)}
    )
    kept = hf.load(base)
    self.assertEqual(kept.params['norm']['scale'].dtype, dtype)

  def test_another_dtype_where_asked(self):
    model = hf.load(self.write())
    out = hf.save(self.folder / 'out', model.params, model, dtype='bfloat16')
    stored = self.tensors(out)['model.norm.weight']
    np.testing.assert_array_equal(
        stored,
        decoders.weights(model.raw)['model.norm.weight'].astype(stored.dtype),
    )
    self.assertEqual(stored.dtype, ml_dtypes.bfloat16)
    config = json.loads((out / 'config.json').read_text())
    self.assertEqual(config['dtype'], 'bfloat16')
    self.assertNotIn('torch_dtype', config)

  def test_shards(self):
    model = hf.load(self.write())
    out = hf.save(
        self.folder / 'out', model.params, model, max_shard_bytes=20_000
    )
    index = json.loads((out / hf.INDEX).read_text())
    files = sorted(p.name for p in out.glob('*.safetensors'))
    self.assertGreater(len(files), 4)
    self.assertEqual(files[0], f'model-00001-of-{len(files):05d}.safetensors')
    self.assertEqual(sorted(set(index['weight_map'].values())), files)
    total = 0
    for file in files:
      held = safetensors.load_file(out / file)
      total += sum(x.nbytes for x in held.values())
      self.assertTrue(
          all(index['weight_map'][name] == file for name in held), file
      )
      if len(held) > 1:
        self.assertLessEqual(sum(x.nbytes for x in held.values()), 20_000)
    self.assertEqual(index['metadata']['total_size'], total)
    again = hf.load(out)
    chex.assert_trees_all_equal(again.params, model.params)

  def test_tables_and_other_files(self):
    """Old files store the rotary tables; what stands beside weights comes along."""
    base = self.write('llama3')
    file = base / 'model.safetensors'
    tensors = safetensors.load_file(file)
    name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    tensors[name] = np.ones(4, np.float32)
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    safetensors.save_file(tensors, file)
    (base / 'tokenizer.json').write_text('{"a": 1}')
    (base / 'generation_config.json').write_text('{"top_p": 0.9}')
    (base / 'chat_template.jinja').write_text('{{ messages }}')
    (base / 'notes.txt').write_text('mine')
    model = hf.load(base)
    out = hf.save(self.folder / 'out', model.params, model)
    self.assertCountEqual(
        [p.name for p in out.iterdir()],
        [
            *('config.json', 'model.safetensors', 'tokenizer.json'),
            *('generation_config.json', 'chat_template.jinja'),
        ],
    )
    self.assertEqual((out / 'tokenizer.json').read_text(), '{"a": 1}')

  def test_layers_of_the_other_layout(self):
    model = hf.load(self.write())
    single = hf.load(self.folder / 'base', scan_layers=False)
    out = hf.save(self.folder / 'out', single.params, model)
    chex.assert_trees_all_equal(
        self.tensors(out), self.tensors(self.folder / 'base')
    )

  @parameterized.parameters(*FAMILIES)
  def test_a_model_of_ones_own(self, name):
    """Config and weights that came from no folder become one."""
    config = hf_config.from_dict(decoders.CONFIGS[name])
    given = hf.load(self.write(name))
    params = jax.tree.map(lambda x: x + 1, given.params)
    own = hf.describe(config, params)
    out = hf.save(self.folder / 'own', params, own)
    again = hf.load(out)
    self.assertEqual(again.config, config)
    chex.assert_trees_all_equal(again.params, params)


class PathsTest(FolderTest):
  """Folders as people name them."""

  def test_the_home_of_the_user(self):
    model = hf.load(self.write())
    with mock.patch.dict(os.environ, HOME=str(self.folder)):
      out = hf.save('~/out', model.params, model)
      self.assertEqual(out, self.folder / 'out')
      chex.assert_trees_all_equal(hf.load('~/out').params, model.params)

  def test_another_working_folder_on_the_way(self):
    base = self.write()
    (base / 'tokenizer.json').write_text('{}')
    before = os.getcwd()
    self.addCleanup(os.chdir, before)
    os.chdir(self.folder)
    model = hf.load('base')
    os.chdir(before)
    out = hf.save(self.folder / 'out', model.params, model)
    self.assertTrue((out / 'tokenizer.json').is_file())

  def test_a_link_to_nowhere_is_no_place(self):
    model = hf.load(self.write())
    out = self.folder / 'out'
    out.symlink_to(self.folder / 'gone')
    with self.assertRaisesRegex(FileExistsError, 'not there yet'):
      hf.save(out, model.params, model)

  def test_one_file_goes_before_an_index(self):
    """As for transformers: the index may be of an earlier save."""
    base = self.write()
    expected = hf.load(base).params
    (base / hf.INDEX).write_text('{"weight_map": {"a": "b"}}')
    chex.assert_trees_all_equal(hf.load(base).params, expected)


class RefusalsTest(FolderTest):
  """What does not fit is named."""

  def test_an_output_that_is_there(self):
    model = hf.load(self.write())
    out = self.folder / 'out'
    out.mkdir()
    (out / 'mine.txt').write_text('precious')
    with self.assertRaisesRegex(FileExistsError, 'nothing is overwritten'):
      hf.save(out, model.params, model)
    self.assertEqual((out / 'mine.txt').read_text(), 'precious')

  def test_nothing_is_left_of_a_failure(self):
    model = hf.load(self.write())
    params = dict(model.params)
    params['norm'] = {'scale': jnp.full(32, jnp.nan)}
    with self.assertRaisesRegex(
        ValueError, 'finite weights.*model.norm.weight'
    ):
      hf.save(self.folder / 'out', params, model)
    params['norm'] = {'scale': jnp.full(32, 1e6)}
    with self.assertRaisesRegex(
        ValueError, 'finite weights.*model.norm.weight'
    ):
      hf.save(self.folder / 'out', params, model, dtype='float16')
    self.assertEqual([p.name for p in self.folder.iterdir()], ['base'])

  @parameterized.parameters(
      (dict(dtype='int8'), "dtype in .*'int8'"),
      (dict(max_shard_bytes=0), 'max_shard_bytes >= 1'),
  )
  def test_options_of_save(self, options, message):
    model = hf.load(self.write())
    with self.assertRaisesRegex(ValueError, message):
      hf.save(self.folder / 'out', model.params, model, **options)

  @parameterized.parameters('int32', bool, 'complex64')
  def test_weights_that_are_no_floats(self, dtype):
    with self.assertRaisesRegex(ValueError, 'dtype of floating point'):
      hf.load(self.write(), dtype=dtype)

  def test_a_mesh_is_no_sharding(self):
    mesh = jax.make_mesh((8,), ('data',))
    with self.assertRaisesRegex(ValueError, 'placer'):
      hf.load(self.write(), sharding=mesh)

  @parameterized.parameters('lose', 'add', 'shape', 'dtype')
  def test_tensors(self, fault):
    base = self.write('qwen2')
    file = base / 'model.safetensors'
    tensors = safetensors.load_file(file)
    name = 'model.layers.1.self_attn.k_proj.bias'
    message = name
    if fault == 'lose':
      del tensors[name]
      message = f'{name} in .*; 1 of 38 tensors are missing'
    elif fault == 'add':
      tensors['model.layers.3.mlp.up_proj.weight'] = np.ones((2, 2), np.float32)
      message = r'no tensor model\.layers\.3.*1 are superfluous'
    elif fault == 'shape':
      tensors[name] = tensors[name][:-1]
      message = rf'{name} of shape \(16,\).*got \(15,\)'
    else:
      tensors[name] = tensors[name].astype(np.int8)
      message = f'{name} of a dtype in .*got I8'
    safetensors.save_file(tensors, file)
    with self.assertRaisesRegex(ValueError, message):
      hf.load(base)

  def test_a_tied_head_of_no_float(self):
    base = self.write('llama3')
    file = base / 'model.safetensors'
    tensors = safetensors.load_file(file)
    tensors['lm_head.weight'] = np.zeros((96, 32), np.int8)
    safetensors.save_file(tensors, file)
    with self.assertRaisesRegex(ValueError, 'lm_head.weight of a dtype'):
      hf.load(base)

  def test_a_tied_head_that_differs(self):
    base = self.write('llama3')
    file = base / 'model.safetensors'
    tensors = safetensors.load_file(file)
    tensors['lm_head.weight'] = 2 * tensors['model.embed_tokens.weight']
    safetensors.save_file(tensors, file)
    with self.assertRaisesRegex(ValueError, 'tie_word_embeddings: they differ'):
      hf.load(base)

  def test_a_shard_that_is_missing_or_damaged(self):
    model = hf.load(self.write())
    out = hf.save(
        self.folder / 'out', model.params, model, max_shard_bytes=20_000
    )
    first = sorted(out.glob('model-*'))[0]
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    with self.assertRaisesRegex(ValueError, 'whole safetensors file'):
      hf.load(out)
    first.unlink()
    with self.assertRaisesRegex(FileNotFoundError, f'{first.name}, named in'):
      hf.load(out)

  def test_an_index_that_lies(self):
    model = hf.load(self.write())
    out = hf.save(
        self.folder / 'out', model.params, model, max_shard_bytes=20_000
    )
    index = json.loads((out / hf.INDEX).read_text())
    (out / hf.INDEX).write_text('{"weight_map": {"model.norm.weight": 3}}')
    with self.assertRaisesRegex(ValueError, 'a weight_map, names of files'):
      hf.load(out)
    files = sorted(set(index['weight_map'].values()))
    index['weight_map']['model.norm.weight'] = files[0]
    (out / hf.INDEX).write_text(json.dumps(index))
    with self.assertRaisesRegex(ValueError, 'Expected model.norm.weight in'):
      hf.load(out)
    index['weight_map']['model.norm.weight'] = '../base/model.safetensors'
    (out / hf.INDEX).write_text(json.dumps(index))
    with self.assertRaisesRegex(FileNotFoundError, 'named in'):
      hf.load(out)

  def test_a_tensor_in_two_files(self):
    model = hf.load(self.write())
    out = hf.save(
        self.folder / 'out', model.params, model, max_shard_bytes=20_000
    )
    last = sorted(out.glob('model-*'))[-1]
    tensors = safetensors.load_file(last)
    tensors['model.embed_tokens.weight'] = np.zeros((96, 32), np.float32)
    safetensors.save_file(tensors, last)
    with self.assertRaisesRegex(ValueError, 'embed_tokens.weight in one file'):
      hf.load(out)

  def test_pickled_weights_are_not_opened(self):
    base = self.write()
    (base / 'model.safetensors').rename(base / 'pytorch_model.bin')
    with self.assertRaisesRegex(FileNotFoundError, 'pickled, which runs code'):
      hf.load(base)

  def test_no_folder(self):
    with self.assertRaisesRegex(FileNotFoundError, 'Expected a folder'):
      hf.load(self.folder / 'none')
    (self.folder / 'empty').mkdir()
    with self.assertRaisesRegex(FileNotFoundError, 'Expected config.json in'):
      hf.load(self.folder / 'empty')

  def test_weights_of_another_shape(self):
    model = hf.load(self.write())
    params = {**model.params, 'norm': {'scale': jnp.ones(31)}}
    with self.assertRaisesRegex(ValueError, r'norm/scale of shape \(32,\)'):
      hf.save(self.folder / 'out', params, model)
    params = {k: v for k, v in model.params.items() if k != 'norm'}
    with self.assertRaisesRegex(ValueError, 'norm/scale .*got None'):
      hf.save(self.folder / 'out', params, model)

  @parameterized.parameters(
      (dict(model_type='gemma2'), 'model_type in .*gemma2'),
      (dict(model_type=...), 'model_type in .*None'),
      (dict(architectures=['LlamaForTokenClassification']), 'architectures'),
      (dict(hidden_act='gelu'), 'hidden_act'),
      (dict(quantization_config={'quant_method': 'gptq'}), 'gptq'),
      (dict(partial_rotary_factor=0.5), 'partial_rotary_factor'),
      (dict(rope_scaling={'type': 'dynamic', 'factor': 2.0}), 'dynamic'),
      (dict(rope_scaling={'rope_type': 'yarn', 'factor': 2.0}), 'yarn'),
      (dict(rope_scaling={'rope_type': 'linear'}), 'Expected factor'),
      (dict(num_hidden_layers=...), 'num_hidden_layers'),
      (dict(num_key_value_heads=3), 'num_kv_heads to divide'),
      (dict(hidden_size=33), 'head_dim'),
      (dict(model_type='qwen3', architectures=None, head_dim=None), 'head_dim'),
      (dict(rope_parameters={'full_attention': {}}), 'one rotary embedding'),
  )
  def test_configs(self, change, message):
    base = self.write()
    raw = {**decoders.CONFIGS['llama2'], **change}
    raw = {k: v for k, v in raw.items() if v is not ...}
    (base / 'config.json').write_text(json.dumps(raw))
    with self.assertRaisesRegex(ValueError, message):
      hf.load(base)

  @parameterized.parameters(
      ('vocab_size', True),
      ('vocab_size', 96.0),
      ('num_key_value_heads', '2'),
      ('head_dim', 8.0),
      ('num_attention_heads', 0),
      ('sliding_window', 5.0),
      ('rms_norm_eps', '1e-5'),
      ('rms_norm_eps', None),
      ('rope_theta', '500'),
      ('rope_scaling', 'linear'),
      ('tie_word_embeddings', 'false'),
      ('use_sliding_window', 'false'),
      ('attention_bias', 1),
      ('quantization_config', 'gptq'),
      ('architectures', 'LlamaForCausalLM'),
      ('model_type', ['llama']),
      ('layer_types', 'full_attention'),
  )
  def test_types(self, key, value):
    raw = {**decoders.CONFIGS['llama2'], key: value}
    with self.assertRaisesRegex(ValueError, f'config.json.*{key}='):
      hf_config.from_dict(raw)

  def test_types_of_rotary_embeddings(self):
    raw = {**decoders.CONFIGS['llama2'], 'rope_scaling': None}
    for key, value in (('factor', '4'), ('factor', True), ('rope_theta', '1')):
      said = {'rope_type': 'linear', 'factor': 4.0, key: value}
      with self.assertRaisesRegex(ValueError, f'{key} in .* a number'):
        hf_config.from_dict({**raw, 'rope_parameters': said})

  @parameterized.parameters(
      dict(layer_types=[['full_attention']] * 3),
      dict(layer_types=['full_attention'] * 2),
      dict(layer_types=['full_attention'] * 2 + ['chunked_attention']),
  )
  def test_layer_types(self, layer_types):
    raw = {**decoders.CONFIGS['qwen2'], 'layer_types': layer_types}
    with self.assertRaisesRegex(ValueError, 'layer_types'):
      hf_config.from_dict(raw)

  def test_broken_json(self):
    base = self.write()
    (base / 'config.json').write_text('{"model_type": ')
    with self.assertRaisesRegex(ValueError, 'Expected JSON in .*config.json'):
      hf.load(base)
    (base / 'config.json').write_text('[]')
    with self.assertRaisesRegex(ValueError, 'Expected an object'):
      hf.load(base)

  def test_a_decoder_of_no_family(self):
    config = dataclasses.replace(
        hf_config.from_dict(decoders.CONFIGS['qwen3']), mlp_bias=True
    )
    with self.assertRaisesRegex(ValueError, 'no family has'):
      hf.describe(config, None)


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      ({}, 4096), ({'sliding_window': None}, None), ({'sliding_window': 9}, 9)
  )
  def test_what_mistral_leaves_out(self, said, expected):
    raw = {**decoders.CONFIGS['mistral']}
    del raw['sliding_window']
    self.assertEqual(hf_config.from_dict({**raw, **said}).window, expected)

  def test_what_qwen3_leaves_out(self):
    raw = {**decoders.CONFIGS['qwen3']}
    del raw['head_dim']
    self.assertEqual(hf_config.from_dict(raw).head_dim, 128)

  def test_windows_of_qwen2(self):
    raw = decoders.CONFIGS['qwen2']
    self.assertEqual(hf_config.from_dict(raw).windows, (None, 5, 5))
    left_out = {k: v for k, v in raw.items() if k != 'sliding_window'}
    self.assertEqual(hf_config.from_dict(left_out).windows, (None, 4096, 4096))
    off = {**raw, 'use_sliding_window': False}
    self.assertEqual(hf_config.from_dict(off).windows, (None,) * 3)
    kinds = ['sliding_attention', 'full_attention', 'sliding_attention']
    own = {**raw, 'layer_types': kinds}
    self.assertEqual(hf_config.from_dict(own).windows, (5, None, 5))

  def test_rotary_before_and_since_5(self):
    old = decoders.CONFIGS['llama3']
    new = {
        k: v for k, v in old.items() if k not in ('rope_theta', 'rope_scaling')
    }
    new['rope_parameters'] = {**old['rope_scaling'], 'rope_theta': 500.0}
    expected = hf_config.from_dict(old).rotary
    self.assertEqual(hf_config.from_dict(new).rotary, expected)
    other = {'rope_parameters': {'rope_type': 'default', 'rope_theta': 9.0}}
    self.assertEqual(hf_config.from_dict({**old, **other}).rotary, expected)
    length = {'original_max_position_embeddings': 77}
    outside = hf_config.from_dict({**old, **length}).rotary
    self.assertEqual(outside.original_length, 77)

  def test_layer_types_of_mistral(self):
    raw = decoders.CONFIGS['mistral']
    kinds = ['sliding_attention', 'full_attention', 'sliding_attention']
    config = hf_config.from_dict({**raw, 'layer_types': kinds})
    self.assertEqual(config.windows, (7, None, 7))
    self.assertEqual(hf_config.to_dict(config)['layer_types'], kinds)
    self.assertNotIn('layer_types', hf_config.to_dict(hf_config.from_dict(raw)))

  def test_heads_that_are_no_part_of_the_width(self):
    """The code of Llama refuses them, that of Mistral does not."""
    raw = {**decoders.CONFIGS['llama2'], 'hidden_size': 30, 'head_dim': 12}
    config = hf_config.from_dict(raw)
    self.assertEqual(hf_config.to_dict(config)['model_type'], 'mistral')


@pytest.mark.slow
class MemoryTest(FolderTest):

  @parameterized.parameters(True, False)
  def test_the_host_holds_one_leaf_beside_the_model(self, scan_layers):
    """Peak memory of loading the shapes of 1B parameters, two layers of them."""
    raw = {
        **decoders.CONFIGS['llama2'],
        **dict(vocab_size=32000, hidden_size=2048, intermediate_size=8192),
        **dict(num_attention_heads=32, num_key_value_heads=8),
        **dict(num_hidden_layers=2),
    }
    tensors = {
        name: np.ones(shape, ml_dtypes.bfloat16)
        for name, shape in decoders.shapes(raw).items()
    }
    safetensors.save_file(tensors, self.folder / 'model.safetensors')
    (self.folder / 'config.json').write_text(json.dumps(raw))
    code = f"""
        import jax
        from bernoulli_lora_jax.models import hf, hf_config

        def memory(name):
          with open('/proc/self/status') as f:
            line = next(line for line in f if line.startswith(name))
          return int(line.split()[1]) * 1024

        folder = {str(self.folder)!r}
        hf.param_shapes(hf_config.from_dict(hf.read_object(folder, 'config.json')))
        jax.device_put(1.0)
        before = memory('VmRSS')
        model = hf.load(folder, scan_layers={scan_layers})
        leaves = [x.nbytes for x in jax.tree.leaves(model.params)]
        print((memory('VmHWM') - before - sum(leaves)) / max(leaves))
    """
    found = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        check=False,
    )
    self.assertEqual(found.returncode, 0, found.stderr)
    self.assertLess(float(found.stdout.split()[-1]), 1.2)


if __name__ == '__main__':
  absltest.main()
