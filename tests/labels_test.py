"""Tests of names in people's words, and of the tables that show them."""

import json
import math

from absl.testing import parameterized
import pytest

from bernoulli_lora_jax import files
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import figures
from bernoulli_lora_jax.training import labels
from bernoulli_lora_jax.training import reporting


def make_config(fields=None):
  config = base_config.get_config().to_dict()
  for field, value in (fields or {}).items():
    section, _, leaf = field.rpartition('.')
    (config[section] if section else config)[leaf] = value
  return config


_ADAM = {'method.mode': 'adapter', 'method.optimizer': 'adam', 'method.rank': 1}
_EF21 = {
    'method.estimator': 'ef21',
    'federated.num_clients': 10,
    'federated.compressor': 'topk',
    'federated.argument': 0.1,
}
# Pairs that once could share a name, or nearly do.
_CLOSE = (
    {'method.learning_rate': 0.1},
    {'method.learning_rate': 0.1 + 1e-12},
    {'method.stepsize_factor': 0.1},
    {'method.prob': 0.5 + 1e-9},
    {'method.period_passes': 1.0},
    {'method.alpha': 1.0},
    {'method.select': 'a'},
    {'method.page_prob': 0.5},  # Not read by SGD.
    {'federated.num_clients': 10},
    {'federated.num_clients': 10, 'federated.partition': 'dirichlet'},
    {'federated.num_clients': 10, 'federated.cohort': 2},
    _EF21,
    {**_EF21, 'federated.argument': 0.1 + 1e-17 * 4},
    {**_EF21, 'federated.argument': 10.0},
    {'task.name': 'mnist'},
    {'task.name': 'a/x_y.py:make_task'},
    {'task.own': 3},
    {'task.hidden': (64,)},
    {'training.num_steps': 60},
    {'training.num_passes': 60.0},
    {'training.num_full_passes': 60.0},
    {'method.mode': 'adapter'},
    {'method.mode': 'sketched'},
    {'method.name': 'rac_left', **_ADAM},
    {'method.name': 'rac_left'},
    {'method.name': 'full'},
    {'method.name': 'full', 'method.rank': 7},
    {'method.name': 'of_my_own'},
)


class NamesTest(parameterized.TestCase):

  @parameterized.parameters(
      ({}, 'Bernoulli-LoRA, SGD, r = 4'),
      ({'method.name': 'full'}, 'full fine-tuning, SGD'),
      (
          {'method.estimator': 'page', 'method.prob': 0.25},
          'Bernoulli-LoRA, PAGE, r = 4, p = 0.25',
      ),
      ({**_ADAM, 'method.name': 'lora'}, 'LoRA, Adam, r = 1'),
      (
          {**_ADAM, 'method.name': 'rac_left', 'method.period': 17},
          'RAC-LoRA (left frozen), Adam, r = 1, adapters, K = 17',
      ),
      (
          {'method.mode': 'sketched', 'method.name': 'rac_right'},
          'RAC-LoRA (right frozen), SGD, r = 4, sketched gradients',
      ),
      (_EF21, 'Bernoulli-LoRA, EF21, TopK 10%, r = 4, 10 clients, IID'),
  )
  def test_a_run_by_itself(self, fields, expected):
    self.assertEqual(labels.name(make_config(fields)), expected)
    self.assertEqual(labels.names([make_config(fields)])[0], [expected])

  def test_only_what_varies_is_named(self):
    configs = [
        make_config({'method.estimator': estimator, 'method.rank': rank})
        for estimator, rank in (('sgd', 1), ('page', 1), ('page', 4))
    ]
    names, shared = labels.names(configs, labels.RATES)
    self.assertEqual(names, ['SGD, r = 1', 'PAGE, r = 1', 'PAGE, r = 4'])
    self.assertEqual(
        shared,
        'Bernoulli-LoRA, p = 0.5, projected gradients, K = 1, on digits,'
        ' 20 passes',
    )

  def test_what_a_name_tells_already_is_in_the_caption(self):
    configs = [
        make_config(),
        make_config({**_ADAM, 'method.name': 'lora'}),
        make_config({**_ADAM, 'method.period': 17}),
    ]
    names, shared = labels.names(configs, labels.RATES)
    self.assertEqual(
        names,
        [
            'Bernoulli-LoRA, SGD, r = 4',
            'LoRA, Adam, r = 1',
            'Bernoulli-LoRA, Adam, r = 1',
        ],
    )
    self.assertIn('K = 1 or 17', shared)

  def test_configs_that_differ_never_share_a_name(self):
    configs = [make_config(fields) for fields in _CLOSE]
    self.assertLen(set(labels.names(configs)[0]), len(configs))
    for config in configs[1:]:
      pair = labels.names([make_config(), config])[0]
      self.assertLen(set(pair), 2, pair)

  @parameterized.parameters(
      *checkpoint.flatten(base_config.get_config().to_dict())
  )
  def test_any_field_tells_configs_apart(self, field):
    base = make_config(_EF21)
    value = checkpoint.flatten(base)[field]
    value = len(value) if isinstance(value, tuple) else value
    other = f'{value}x' if isinstance(value, str) else (value or 0) + 1
    other = make_config({**_EF21, field: other})
    names, _ = labels.names([base, other])
    self.assertLen(set(names), 1 if field in labels.IGNORED else 2, names)
    self.assertNotIn('', names)

  def test_old_runs_have_defaults(self):
    old = make_config()
    del old['federated'], old['x64']
    self.assertLen(set(labels.names([old, make_config()])[0]), 1)

  def test_words(self):
    self.assertEqual(labels.spaced('linear_regression'), 'linear regression')
    self.assertEqual(labels.spaced('a/x_y.py:f'), 'a/x_y.py:f')

  def test_metrics(self):
    self.assertEqual(labels.metric('my_own_score').label, 'my own score')
    self.assertEqual(labels.metric('test_accuracy').label, 'test accuracy, %')
    self.assertTrue(labels.metric('train_gap').is_log)


class TableTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  def write(self, name, fields=None, **summary):
    path = self.tmp / name
    path.mkdir()
    files.write_json(path / 'config.json', make_config(fields))
    summary = {'step': 1, 'seconds': 0.5, 'trained_parameters': 9.0, **summary}
    files.write_json(path / 'summary.json', summary)
    lines = [{'step': s, 'data_passes': s, **summary} for s in (0, 1)]
    text = '\n'.join(
        json.dumps(line | {'step': s}) for s, line in enumerate(lines)
    )
    (path / 'metrics.jsonl').write_text(text + '\n')

  @parameterized.parameters(
      ([0.1234, 12.0, None], ['0.12', '12.00', '-']),
      ([0.16, 0.3], ['0.16', '0.30']),
      ([8512.0, 162.5], ['8,512.0', '162.5']),
      ([0.0184, 12.24], ['0.018', '12.240']),
      ([101.0, 1e-14], ['1.01e+02', '1.00e-14']),
      ([3.0, 4.0, math.nan], ['3', '4', '-']),
      ([1000, 2], ['1,000', '2']),
  )
  def test_numbers_of_a_column_have_equal_decimals(self, values, expected):
    text = reporting.table([{'x': v} for v in values], 'tsv', is_even=True)
    self.assertEqual([x.strip() for x in text.splitlines()[1:]], expected)

  @parameterized.parameters(
      # Standard errors 0.2 and 5: one decimal.
      ([(97.04, 0.35, 3), (74.45, 10.0, 3)], ['97.0 ± 0.3', '74.5 ± 10.0']),
      ([(97.04, 0.0, 3), (74.45, 0.09, 9)], ['97.04 ± 0.00', '74.45 ± 0.09']),
      ([(97.0, math.nan, 1), (96.5, math.nan, 1)], ['97.0', '96.5']),
      ([(math.nan, math.nan, 0), (1.0, 0.5, 2)], ['-', '1.0 ± 0.5']),
      (
          [(88.8, 38.0, 20), (1.1e-14, 3e-14, 20)],
          ['8.88e+01 ± 3.8e+01', '1.10e-14 ± 3.0e-14'],
      ),
  )
  def test_the_standard_error_decides_the_decimals(self, means, expected):
    rows = [{'x': reporting.Mean(*mean)} for mean in means]
    text = reporting.table(rows, 'tsv', is_even=True)
    self.assertEqual([x.strip() for x in text.splitlines()[1:]], expected)

  def test_markdown_is_aligned(self):
    rows = [{'name': 'a', 'x': 1.0}, {'name': 'b', 'x': None}]
    lines = reporting.table(rows, 'github', is_even=True).splitlines()
    self.assertRegex(lines[1], r'^\|:-+\|-+:\|$')
    self.assertRegex(lines[3], r'^\| b +\| +- \|$')

  def test_headers_say_what_follows_the_sign(self):
    for seed, accuracy in enumerate((0.5, 0.7, 0.9)):
      self.write(f'{seed}', {'seed': seed}, test_accuracy=accuracy)
    runs = reporting.load_runs([self.tmp])
    ((caption, (row,)),) = reporting.comparison(runs).items()
    self.assertStartsWith(caption, 'digits: ')
    self.assertEqual(
        row['test accuracy, % (mean ± s.d., 3 seeds)'].std,
        reporting.statistics(runs)[0]['std'],
    )
    self.assertNotIn('runs', row)
    ((_, (row,)),) = reporting.comparison(runs[:1]).items()
    self.assertIn('test accuracy, % (1 seed)', row)
    self.write('x', {'method.rank': 1}, diverged='at step 1')
    runs = reporting.load_runs([self.tmp])
    ((_, rows),) = reporting.comparison(runs).items()
    self.assertEqual([r['method'] for r in rows], ['r = 1', 'r = 4'])
    self.assertEqual([r['runs'] for r in rows], ['1 (1 diverged)', '3'])
    self.assertIn('test accuracy, % (mean ± s.d., seeds)', rows[0])

  def test_metric_and_groups_are_arguments(self):
    for rank in (1, 4):
      for sketch in ('gaussian', 'srht'):
        fields = {'method.rank': rank, 'method.sketch': sketch}
        self.write(f'{rank}{sketch}', fields, my_score=rank, test_accuracy=0.5)
    runs = reporting.load_runs([self.tmp])
    ((_, rows),) = reporting.comparison(
        runs, metric='my_score', by=['method.rank']
    ).items()
    self.assertEqual([row['method'] for row in rows], ['r = 1', 'r = 4'])
    self.assertEqual(
        [row['my score (mean ± s.d., 2 runs)'].mean for row in rows], [1, 4]
    )
    figure = figures.plot(runs, 'my_score', by=['method.sketch'])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    self.assertEqual(texts, ['sketch = gaussian', 'sketch = srht'])
    self.assertEqual(figure.axes[0].get_ylabel(), 'my score')
    with self.assertRaisesRegex(ValueError, "group by, got .'method.rang'"):
      reporting.groups(runs, ['method.rang'])

  def test_published_stand_beside_the_runs_with_their_fields(self):
    self.write('a', {'method.rank': 1}, test_accuracy=0.5)
    self.write('b', {'method.rank': 4}, test_accuracy=0.5)
    published = [({'method.rank': 4}, (40.0, 5.0, 4))]
    rows = reporting.statistics(reporting.load_runs([self.tmp]), published)
    self.assertEqual([r['published'] for r in rows][1], 40.0)
    self.assertTrue(math.isnan(rows[0]['published']))

  def test_a_figure_of_p_has_names_without_it(self):
    for prob in (0.1, 0.5, 0.9):
      for seed in (0, 1):
        fields = {'seed': seed, 'method.prob': prob}
        self.write(f'{prob}{seed}', fields, test_accuracy=prob - seed / 100)
    figure = figures.plot_prob(reporting.load_runs([self.tmp]))
    (name,) = [t.get_text() for t in figure.legends[0].get_texts()]
    self.assertEqual(name, 'Bernoulli-LoRA, SGD, r = 4')
    self.assertEqual(figure.axes[0].get_ylabel(), 'test accuracy, %')
