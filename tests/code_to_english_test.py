"""Tests of the study in which a decoder that knows code learns English."""

import ast
import functools
import json
import math
import pathlib
import runpy
import sysconfig
from unittest import mock

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import pytest

from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import sweep as sweep_lib

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = _ROOT / 'configs' / 'code_to_english.py'
_SOURCE = '''"""Doc of the module."""
import os  # A comment.


class A:
  """Doc of the class.

  More of it.
  """


async def f(x):
  """Doc of f."""
  "a string that is a comment"
  if x:
    "a comment alone"
  return "text", x  # Another.
'''
_CODE = """import os

class A:
    pass

async def f(x):
    if x:
        pass
    return ('text', x)"""


@functools.cache
def _study():
  path = _ROOT / 'experiments' / 'code_to_english.py'
  return runpy.run_path(str(path))


def _texts(path):
  return [json.loads(line)['text'] for line in path.read_text().splitlines()]


class CorporaTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _folder(self, tmp_path):
    self.tmp = tmp_path

  def _write(self, name, **flags):
    """Writes the corpora of a small standard library; returns all texts."""
    root = self.tmp / 'lib'
    for number in range(60):
      sources = {
          f'a/module_{number:02}.py': f'"""Doc {number % 50}."""\nx = {number}',
          f'test/module_{number:02}.py': f'"""Test {number}."""\ny = {number}',
          'site-packages/other.py': '"""Doc of another."""\nz = 1',
          'a/broken.py': 'print "of old"',
      }
      for path, source in sources.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source)
    output = self.tmp / name
    with mock.patch.object(
        sysconfig, 'get_paths', return_value={'stdlib': str(root)}
    ):
      _study()['write_corpora'](str(output), **flags)
    return {path.stem: _texts(path) for path in output.iterdir()}

  def test_split_source(self):
    code, docstrings = _study()['split_source'](_SOURCE.encode())
    self.assertEqual(code, _CODE)
    self.assertEqual(
        [x for x in docstrings if x],
        [
            'Doc of the module.',
            'Doc of the class.\n\nMore of it.',
            'Doc of f.',
        ],
    )
    ast.parse(code)

  @parameterized.parameters(b'print "of old"', b'\0', b'# coding: none\n')
  def test_what_is_no_python_is_left_out(self, source):
    self.assertEqual(_study()['split_source'](source), ('', []))

  def test_parts_are_by_content(self):
    part_of = _study()['part_of']
    drawn = [part_of(f'document {i}') for i in range(4000)]
    held_out = drawn.count('validation') / len(drawn)
    error = math.sqrt(0.05 * 0.95 / len(drawn))
    self.assertAlmostEqual(held_out, 0.05, delta=5 * error)
    # Forever: a model knows what it was trained on.
    held_out = [i for i, part in enumerate(drawn) if part == 'validation']
    self.assertEqual(held_out[:4], [21, 22, 55, 59])

  def test_corpora(self):
    found = self._write('corpora')
    self.assertCountEqual(
        found,
        [
            f'{d}_{p}'
            for d in ('code', 'english')
            for p in ('train', 'validation')
        ],
    )
    for domain in ('code', 'english'):
      train, held_out = (
          found[f'{domain}_{part}'] for part in ('train', 'validation')
      )
      self.assertNotEmpty(held_out)
      self.assertEmpty(set(train) & set(held_out))
    code = found['code_train'] + found['code_validation']
    self.assertCountEqual(code, [f'x = {i}' for i in range(60)])
    in_order = sorted(found['code_train'], key=lambda x: int(x[4:]))
    self.assertEqual(found['code_train'], in_order)
    english = found['english_train'] + found['english_validation']
    docs = [x for x in english if x.startswith('Doc')]
    self.assertCountEqual(docs, [f'Doc {i}.' for i in range(50)])
    self.assertTrue(any('"with" statement' in x for x in english))
    self.assertEqual(self._write('again'), found)
    with self.assertRaisesRegex(FileExistsError, 'not there yet'):
      self._write('again')

  def test_test_suites_where_asked(self):
    found = self._write('corpora', tests=True)
    self.assertIn('y = 1', found['code_train'] + found['code_validation'])
    english = found['english_train'] + found['english_validation']
    self.assertIn('Test 1.', english)
    self.assertNotIn('Doc of another.', english)


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters('small', 'medium')
  def test_methods_train_as_many_numbers(self, variant):
    module = runpy.run_path(str(_CONFIG))
    size = _study()['SIZES'][variant].config()
    tokens = jnp.zeros((1, 2), jnp.int32)
    task = task_lib.Task(
        name='decoder',
        init=lambda key: decoder.Decoder(size).init(key, tokens)['params'],
        data={},
        loss=decoder.make_loss(size),
        num_samples=64,
        batch_size=8,
        sampling='stream',
    )
    config = module['get_config'](variant)
    numbers = {}
    for overrides in module['sweep'](variant):
      run = experiment.apply_overrides(config, overrides)
      name, rank = run.method.name, run.method.rank
      numbers[name, rank] = experiment.trained_parameters(run, task)
    shapes = jax.tree.leaves(task_lib.shapes(task))
    # All of them, the embedding too.
    full = [n for (name, _), n in numbers.items() if name == 'full']
    self.assertEqual(full, [sum(x.size for x in shapes)])
    chains = {rank: n for (x, rank), n in numbers.items() if x == 'bernoulli'}
    self.assertContainsSubset(chains, (16, 128))
    for (name, rank), number in numbers.items():
      if name != 'full':
        # Ranks are whole: half of one in 15 is 3.3%.
        nearest = min(abs(number / n - 1) for n in chains.values())
        self.assertLess(nearest, 0.034, (name, rank))
      if name in ('lora', 'cola'):
        self.assertIn(number, chains.values())
    if variant == 'medium':
      self.assertGreater(sum(x.size for x in shapes), 25e6)
      self.assertLen(numbers, 11)

  def test_runs_have_names_of_their_own(self):
    module = runpy.run_path(str(_CONFIG))
    for variant in ('small', 'medium', 'small,smoke'):
      runs = module['sweep'](variant)
      self.assertLen({sweep_lib.run_name(x) for x in runs}, len(runs))
    rates = {
        run['method.name']: run['method.learning_rate']
        for run in module['sweep']('small')
    }
    # As in the README.
    self.assertEqual(rates, {'full': 1e-3, 'lora': 1.2e-2, 'bernoulli': 2.5e-2})
    with self.assertRaisesRegex(ValueError, "'large'"):
      module['get_config']('large')


class PretrainingTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _folder(self, tmp_path, capsys):
    self.tmp, self.capsys = tmp_path, capsys

  def _corpora(self):
    """Returns the folder of small corpora."""
    folder = self.tmp / 'corpora'
    folder.mkdir()
    for domain, line in (('code', 'x[{0}] = f({0})\n'), ('english', 'Is {0}.')):
      for part, numbers in (('train', range(40)), ('validation', range(4))):
        lines = [
            json.dumps({'text': line.format(i) * 40}) + '\n' for i in numbers
        ]
        (folder / f'{domain}_{part}.jsonl').write_text(''.join(lines))
    return folder

  def test_tokenizer(self):
    study, model = _study(), self.tmp / 'model'
    model.mkdir()
    study['write_tokenizer'](model, self._corpora(), study['SIZES']['smoke'])
    tokenizer = tokenizer_lib.load(model)
    sample = _SOURCE + " don't . \u00fc \u4f60\t\n\n"
    ids = tokenizer.encode(sample)
    self.assertEqual(tokenizer.decode(ids), sample)
    self.assertNotIn(tokenizer.eos_id, ids)
    self.assertEqual(tokenizer.encode('<|endoftext|>'), [tokenizer.eos_id])
    # It has seen the words of both.
    for words in (' f', 'Is'):
      self.assertLen(tokenizer.encode(words), 1)

  @pytest.mark.slow
  def test_pretrain(self):
    transformers = pytest.importorskip('transformers')
    model, corpora = self.tmp / 'model', self._corpora()
    _study()['pretrain'](str(model), str(corpora), 'smoke')
    shown = self.capsys.readouterr().out
    rows = {
        words[0]: [float(x) for x in words[1:]]
        for words in map(str.split, shown.splitlines())
        if words[:1] in (['code'], ['english'])
    }
    before, after, perplexity = rows['code']
    self.assertAlmostEqual(before, math.log(320), delta=0.1)  # Of 320 tokens.
    self.assertLess(after, before - 0.1)
    # Four digits are shown.
    self.assertAlmostEqual(perplexity / math.exp(after), 1, delta=2e-3)
    tokenizer = tokenizer_lib.load(model)
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer.encode(_SOURCE)
    self.assertEqual(theirs.encode(_SOURCE), ids)
    self.assertEqual(theirs.decode(ids), _SOURCE)
    self.assertEqual(theirs.eos_token_id, tokenizer.eos_id)
    raw = hf.load(model).raw
    self.assertEqual(raw['eos_token_id'], tokenizer.eos_id)
    self.assertLessEqual(tokenizer.vocab_size, raw['vocab_size'])
    with self.assertRaises(FileExistsError):
      _study()['pretrain'](str(model), str(corpora), 'smoke')
