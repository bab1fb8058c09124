"""Tests of federated runs: methods, traffic, drivers, parties, reports."""

import json
import pathlib
import runpy

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import federated as federated_lib
from bernoulli_lora_jax.tasks import partition
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import federated_methods
from bernoulli_lora_jax.training import figures
from bernoulli_lora_jax.training import parties as parties_lib
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import sweep

_ROOT = pathlib.Path(__file__).parent.parent
_CONFIG = runpy.run_path(str(_ROOT / 'configs' / 'federated.py'))


def small_config(variant, **overrides):
  """A small network on digits, four clients, six rounds of two local steps."""
  config = _CONFIG['get_config'](variant)
  names = {
      'task.hidden': (16,),
      'task.pretrain_epochs': 1,
      'method.sketch': 'coordinate',  # A QR takes long to compile.
      'federated.num_clients': 4,
      'training.num_steps': 6,
      'training.num_evals': 3,
      'training.progress': False,
  }
  if config.method.optimizer == 'adam':
    names['method.period'] = 2
  names |= {k.replace('__', '.'): v for k, v in overrides.items()}
  return experiment.apply_overrides(config, names)


_RUNS = {}  # By config.


def run(config):
  """Returns params and metrics of each round of a run."""
  name = config.to_json_best_effort()
  if name not in _RUNS:
    _RUNS[name] = run_anew(config)
  return _RUNS[name]


def run_anew(config):
  program = experiment.make_program(config)
  key = jax.random.key(config.seed)
  state = program.put(program.start(key))
  steps = program.jit(config.training.num_steps, state)
  state, metrics = steps(program.data, state, key, 0, ())
  return program.params(state), jax.tree.map(np.asarray, metrics), program


def lines_of(directory):
  text = (pathlib.Path(directory) / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


class RunTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  @parameterized.parameters(
      ('ef21', 'jit'), ('marina', 'pmap'), ('bernoulli', 'pmap')
  )
  @pytest.mark.slow
  def test_devices_give_the_same_run(self, variant, driver):
    one, _, _ = run(small_config(variant))
    config = small_config(
        variant, training__parallel=driver, training__num_devices=4
    )
    many, _, program = run(config)
    self.assertEqual(program.driver.kind, 'jit')
    # Float32 sums in another order.
    chex.assert_trees_all_close(one, many, rtol=1e-4, atol=1e-5)
    state = program.put(program.start(jax.random.key(0)))
    if variant == 'ef21':  # Each device holds its own client's estimate.
      leaf, *_ = jax.tree.leaves(state.inner[1][0].estimates)
      self.assertEqual(leaf.addressable_shards[0].data.shape[0], 1)

  def test_pmap_becomes_jit(self):
    config = small_config('bernoulli', training__parallel='pmap')
    config.federated.num_clients = 8
    with self.assertWarnsRegex(UserWarning, "got 'pmap': taking 'jit'"):
      program = experiment.make_program(config)
    self.assertEqual(program.driver.kind, 'jit')

  @parameterized.parameters('ef21', 'bernoulli')
  @pytest.mark.slow
  def test_resumed_run_equals_the_unbroken_one(self, variant):
    config = small_config(
        variant,
        training__checkpoint_every=2,
        training__num_evals=1,
        training__parallel='jit',
        training__num_devices=4,
    )
    experiment.train(config, self.tmp / 'whole')
    half = experiment.apply_overrides(config, {'training.num_steps': 4})
    experiment.train(half, self.tmp / 'parts')
    experiment.train(config, self.tmp / 'parts')
    ours, theirs = lines_of(self.tmp / 'parts'), lines_of(self.tmp / 'whole')
    self.assertEqual(ours[-1], theirs[-1])

  def test_weights_by_size_give_the_gradient_of_all_examples(self):
    config = small_config(
        'ef21',
        federated__compressor='identity',
        federated__argument=None,
        federated__partition='dirichlet',
        method__name='full',
        method__learning_rate=0.1,
        training__num_steps=1,
        training__num_evals=1,
    )
    params, _, program = run(config)
    task = program.task
    start = task.init(jax.random.key(0))
    grads = jax.grad(lambda p: task.loss(p, task.data['train'], None)[0])(start)
    expected = jax.tree_util.tree_map_with_path(
        lambda path, p, g: p - 0.1 * g if path[-1].key == 'kernel' else p,
        start,
        grads,
    )
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    uniform = experiment.apply_overrides(
        config, {'federated.weights': 'uniform'}
    )
    with self.assertRaises(AssertionError):
      chex.assert_trees_all_close(run(uniform)[0], expected, atol=1e-5)

  def test_natural_groups(self):
    config = small_config('qgd')
    task = arguments.make_task(
        experiment.apply_overrides(config, {'federated.num_clients': 0})
    )
    group = np.arange(task.num_samples) % 3
    data = {**task.data['train'], 'group': group}
    task = task._replace(data={**task.data, 'train': data})
    by_group = experiment.apply_overrides(
        config, {'federated.partition': 'group', 'federated.num_clients': 3}
    )
    for i, part in enumerate(arguments.make_parts(by_group, task)):
      np.testing.assert_array_equal(group[part], i)
    with self.assertRaisesRegex(ValueError, 'num_clients=3, the groups'):
      arguments.make_parts(
          experiment.apply_overrides(by_group, {'federated.num_clients': 4}),
          task,
      )

  @pytest.mark.slow
  def test_sweep_deals_anew_for_each_partition(self):
    config = small_config('bernoulli')
    grid = [
        {'federated.partition': law, 'seed': seed}
        for law in ('iid', 'dirichlet')
        for seed in (0, 1)
    ]
    sweep.train(config, grid, self.tmp, progress=False)
    runs = reporting.load_runs([self.tmp])
    losses = {
        (r.config['federated']['partition'], r.config['seed']): r.summary[
            'train_loss'
        ]
        for r in runs
    }
    self.assertLen(set(losses.values()), 4)
    alone = experiment.apply_overrides(
        config, {'federated.partition': 'dirichlet', 'seed': 1}
    )
    summary = experiment.train(alone, self.tmp / 'alone')
    np.testing.assert_allclose(
        losses['dirichlet', 1], summary['train_loss'], rtol=1e-4
    )

  @parameterized.parameters(
      ('federated.partition', 'random', "'iid', 'dirichlet', 'group'"),
      ('federated.partition', 'group', r"\['group'\] of digits"),
      ('federated.weights', 'equal', "'size', 'uniform'"),
      ('federated.compressor', 'zip', 'federated.compressor in'),
      ('federated.argument', 0.5, 'federated.compressor a whole number'),
      ('federated.cohort', 5, r'federated.cohort in \[1, 4\]'),
      ('federated.num_clients', 10**6, r'federated.num_clients in \[0, 549\]'),
      ('federated.num_clients', -1, 'federated.num_clients >= 0'),
      ('method.estimator', 'sgd', 'fedavg in federated runs'),
      ('training.plateau_patience', 2, 'plateau_patience=0'),
      ('training.recipe', True, 'training.recipe=False in federated'),
      ('training.num_micro_batches', 2, 'num_micro_batches=1'),
      ('training.num_full_passes', 2.0, 'num_full_passes=None'),
  )
  def test_bad_fields_are_named(self, field, value, message):
    config = experiment.apply_overrides(small_config('qgd'), {field: value})
    with self.assertRaisesRegex(ValueError, message):
      experiment.make_program(config)

  @parameterized.parameters(
      ('method.train_others', True),
      ('method.estimator', 'ef21'),
      ('federated.compressor', 'topk'),
  )
  def test_fields_that_adapters_would_ignore_are_refused(self, field, value):
    config = small_config('bernoulli')
    config = experiment.apply_overrides(config, {field: value})
    with self.assertRaisesRegex(ValueError, f'Expected {field}'):
      experiment.make_program(config)

  def test_compressors_without_argument(self):
    sign = {'federated.compressor': 'sign', 'federated.argument': 0.0}
    config = experiment.apply_overrides(small_config('ef21'), sign)
    self.assertEqual(arguments.make_compressor(config).name, 'sign')
    low_rank = small_config(
        'ef21',
        federated__compressor='powersgd',
        federated__argument=2.0,
        federated__concatenate=True,
    )
    with self.assertRaisesRegex(ValueError, 'concatenate=False'):
      experiment.make_program(low_rank)

  def test_run_of_an_older_version_goes_on(self):
    config = base_config.get_config()
    record = json.loads(config.to_json_best_effort())
    checkpoint.check_config(self.tmp, record)
    path = self.tmp / 'config.json'
    old = {k: v for k, v in record.items() if k != 'federated'}
    path.write_text(json.dumps(old))
    checkpoint.check_config(self.tmp, record)
    record['federated']['num_clients'] = 3
    with self.assertRaisesRegex(ValueError, 'num_clients=0'):
      checkpoint.check_config(self.tmp, record)

  def test_clients_must_fit_the_devices(self):
    config = small_config(
        'qgd', training__parallel='jit', training__num_devices=3
    )
    with self.assertRaisesRegex(ValueError, 'multiple of the 3 devices'):
      experiment.make_program(config)

  @parameterized.parameters(['ef21'])
  def test_variants_of_the_config(self, variant):
    self.check_variants_of_the_config(variant)

  @parameterized.parameters('qgd', 'lora', 'fedavg')
  @pytest.mark.slow
  def test_variants_of_the_config_otherwise(self, variant):
    self.check_variants_of_the_config(variant)

  def check_variants_of_the_config(self, variant):
    config = _CONFIG['get_config'](f'{variant},dirichlet,smoke')
    config.training.progress = False
    summary = experiment.train(config, self.tmp)
    self.assertTrue(np.isfinite(summary['train_loss']))
    for name in ('bits_up', 'bits_down', 'grad_norm_sq'):
      self.assertIn(name, lines_of(self.tmp)[-1])

  def test_config_refuses_other_variants(self):
    for variant in ('nonsense', 'ef21,qgd'):
      with self.assertRaisesRegex(ValueError, 'variant'):
        _CONFIG['get_config'](variant)
    for overrides in _CONFIG['sweep']('mnist'):
      experiment.apply_overrides(_CONFIG['get_config']('mnist'), overrides)


class TrafficTest(parameterized.TestCase):
  """Counted bits are those of the payloads that parties exchange."""

  @parameterized.parameters(
      ('bernoulli', {}),
      ('lora', {}),
      ('ef21', {'method.period_passes': 0.1}),  # Links of two rounds.
      ('ef21', {'method.name': 'rac_left'}),
      ('ef21', {'federated.start': 'zero', 'federated.concatenate': True}),
  )
  @pytest.mark.slow
  def test_other_parties_are_the_run_in_one_process(self, variant, overrides):
    self.assert_parties_are_the_run_in_one_process(variant, overrides)

  @parameterized.parameters(
      ('bernoulli', {'method.rank': 6}),  # Clipped on the sides of 5.
      ('fedavg', {'method.optimizer': 'sgd', 'method.learning_rate': 0.01}),
      (
          'ef21',
          {
              'federated.start': 'compressed',
              'federated.compressor': 'powersgd',
              'federated.argument': 2.0,
              'method.train_others': True,
          },
      ),
  )
  def test_parties_are_the_run_in_one_process(self, variant, overrides):
    self.assert_parties_are_the_run_in_one_process(variant, overrides)

  def assert_parties_are_the_run_in_one_process(self, variant, overrides):
    config = experiment.apply_overrides(small_config(variant), overrides)
    parties = parties_lib.make_parties(config)
    params, metrics, _ = run(config)
    view, server = parties.init(), parties.init_server()
    memories = [parties.init_client() for _ in range(4)]
    late, missed = parties.init(), []
    for t in range(6):
      view = parties.begin(view)
      payloads = {}
      for i in range(4):
        payloads[i], memories[i] = parties.reply(view, memories[i], i)
        parties.check(view, payloads[i])
      broadcast, server = parties.combine(view, server, payloads)
      missed.append(broadcast)
      up = sum(map(parties_lib.size, payloads.values()))
      self.assertEqual(up, metrics['round_bits_up'][t])
      down = 4 * parties_lib.size(broadcast)
      self.assertEqual(down, metrics['round_bits_down'][t])
      view = parties.apply(view, broadcast)
    # Float32, sums in another order.
    ours = parties.params(view)
    chex.assert_trees_all_close(ours, params, rtol=1e-4, atol=2e-6)
    for broadcast in missed:  # A client that sleeps all along.
      late = parties.apply(parties.begin(late), broadcast)
    chex.assert_trees_all_equal(parties.params(late), ours)

  def test_totals_lose_nothing(self):
    """Of numbers below their resolution."""
    total = federated_methods.Total(jnp.float32(2**24), jnp.float32(0))
    for _ in range(10):
      total = federated_methods._add(total, 1.0)
    self.assertEqual(total.total, 2**24 + 10)

  def test_totals_are_the_sums(self):
    _, metrics, _ = run(small_config('bernoulli', method__rank=6))
    for way in ('up', 'down'):
      np.testing.assert_allclose(
          np.cumsum(metrics[f'round_bits_{way}'], dtype=np.float64),
          metrics[f'bits_{way}'],
          rtol=1e-7,
      )

  @pytest.mark.slow
  def test_a_cohort_sends_less(self):
    _, whole, _ = run(small_config('qgd'))
    _, part, program = run(small_config('qgd', federated__cohort=1))
    np.testing.assert_array_equal(
        4 * part['round_bits_up'], whole['round_bits_up']
    )
    np.testing.assert_array_equal(
        part['round_bits_down'], whole['round_bits_down']
    )
    np.testing.assert_allclose(part['data_passes'], np.arange(1, 7) / 4)
    self.assertEqual(program.method.passes_per_step, 0.25)

  def test_marina_by_hand(self):
    config = small_config('marina', training__num_steps=20)
    _, metrics, program = run(config)
    params = program.task.init(jax.random.key(0))
    kernels = [x for x in jax.tree.leaves(params) if x.ndim == 2]
    whole = 4 * 32 * sum(x.size for x in kernels)
    part = 4 * sum(
        32 * -(-x.size // 20) + 64 for x in kernels
    )  # 5% and a seed.
    found = set(metrics['round_bits_up'].tolist())
    self.assertEqual(found, {whole, part})
    self.assertEqual(metrics['round_bits_up'][0], whole)

  @parameterized.parameters('cohort', 'estimator')
  def test_networks_refuse_what_they_cannot_do(self, what):
    config = small_config('bernoulli', federated__cohort=2)
    if what == 'estimator':
      config = small_config('qgd')
    with self.assertRaisesRegex(ValueError, 'over a network'):
      parties_lib.make_parties(config)

  @parameterized.parameters(['ef21'])
  def test_a_bad_payload_is_named(self, variant):
    self.check_a_bad_payload_is_named(variant)

  @parameterized.parameters(['bernoulli'])
  @pytest.mark.slow
  def test_a_bad_payload_is_named_otherwise(self, variant):
    self.check_a_bad_payload_is_named(variant)

  def check_a_bad_payload_is_named(self, variant):
    parties = parties_lib.make_parties(small_config(variant))
    view = parties.begin(parties.init())
    good, _ = parties.reply(view, parties.init_client(), 0)
    name = next(iter(good))
    bad = {
        'NaN': {**good, name: np.full_like(good[name], np.nan)},
        'shape': {**good, name: good[name].ravel()[:-1]},
        'dtype': {**good, name: good[name].astype(np.float64)},
        'missing': {k: v for k, v in good.items() if k != name},
    }
    for kind, payload in bad.items():
      with self.subTest(kind), self.assertRaisesRegex(ValueError, name):
        parties.check(view, payload)

  def test_without_a_client_the_others_are_averaged(self):
    config = small_config('bernoulli', federated__partition='dirichlet')
    parties = parties_lib.make_parties(config)
    view = parties.begin(parties.init())
    payloads = {i: parties.reply(view, (), i)[0] for i in (0, 2)}
    broadcast, _ = parties.combine(view, (), payloads)
    task = arguments.make_task(config)
    sizes = np.asarray(task.data['clients']['mask']).sum(1)
    for name, mean in broadcast.items():
      expected = sizes[0] * payloads[0][name] + sizes[2] * payloads[2][name]
      np.testing.assert_allclose(
          mean, expected / (sizes[0] + sizes[2]), rtol=1e-5, atol=1e-7
      )
    # Nobody: nothing moves.
    nobody, _ = parties.combine(view, (), {})
    chex.assert_trees_all_equal(
        parties.params(parties.apply(view, nobody)), parties.params(view)
    )


class ReportTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  def write(self, name, variant, lines, **overrides):
    config = small_config(variant, **overrides)
    folder = self.tmp / name
    folder.mkdir()
    (folder / 'config.json').write_text(config.to_json_best_effort())
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (folder / 'metrics.jsonl').write_text(text)
    summary = {'trained_parameters': 3, 'seconds': 1.0, 'test_accuracy': 0.9}
    (folder / 'summary.json').write_text(json.dumps(summary))

  def test_labels_tables_and_figures(self):
    line = lambda step, accuracy: {
        'step': step,
        'data_passes': step,
        'validation_accuracy': accuracy,
        'bits_up': 32e6 * step,
        'bits_down': 64e6 * step,
    }
    lines = [line(0, 0.1), line(5, 0.85), line(10, 0.95)]
    for other in lines:  # The last dispatch is not the mean round.
      other['round_bits_up'] = 1.0
    self.write('a', 'ef21,dirichlet', lines)
    self.write('b', 'ef21,dirichlet', lines[:2], seed=1)
    self.write('c', 'lora', lines)
    self.write('d', 'fedavg', lines)
    self.write('e', 'marina', lines, federated__cohort=2)
    self.write('f', 'marina', lines)
    runs = reporting.load_runs([self.tmp])
    tables = reporting.traffic(runs, 0.9)
    caption, iid = tables.popitem()
    self.assertEqual(
        caption,
        'digits, 4 clients, IID: RandK 5%, r = 2, p = 0.5, projected gradients,'
        ' K = 1 or 2, L random, 6 rounds',
    )
    self.assertEqual(
        {row['method'] for row in iid},
        {
            'FedAvg of LoRA, Adam',
            'FedAvg of weights, Adam',
            'Bernoulli-LoRA, MARINA, cohort = 2',
            'Bernoulli-LoRA, MARINA, cohort = None',
        },
    )
    ((caption, (row,)),) = tables.items()
    self.assertStartsWith(caption, 'digits, 4 clients, Dirichlet(0.1): ')
    self.assertEqual(row['method'], 'Bernoulli-LoRA, EF21, TopK 5%, r = 2')
    self.assertEqual(row['reached 90%'], '1 of 2')
    # Bits of four clients in bytes of one: 32e6 * 10 / 4 / 8e6.
    self.assertEqual((row['MB up'], row['MB down']), (10, 20))
    self.assertEqual(row['kB up a round'], 1000)
    self.assertEqual(row['rounds'], 10)
    self.assertEqual(
        [
            figures.curve(
                runs[:1], 'validation_accuracy', axis=figures.MEGABYTES
            ).x.tolist()
        ],
        [[15.0, 30.0]],
    )
    names = {p.name for p in figures.write_figures(runs, self.tmp / 'figures')}
    self.assertIn(
        'digits_4_clients_dirichlet_0_1_validation_accuracy_megabytes.png',
        names,
    )
    self.assertIn('digits_4_clients_iid_validation_accuracy.png', names)

  def test_groups_tell_variants_apart_and_take_old_runs(self):
    lines = [{'step': 0, 'data_passes': 0}]
    for alpha in (1.0, 16.0):
      self.write(
          f'alpha{alpha:g}',
          'lora',
          lines,
          federated__num_clients=0,
          method__alpha=alpha,
      )
    path = self.tmp / 'alpha1' / 'config.json'
    old = json.loads(path.read_text())
    del old['federated']
    path.write_text(json.dumps(old))
    for order in (1, -1):
      runs = reporting.load_runs([self.tmp])[::order]
      names = {group.name for group in reporting.groups(runs)}
      self.assertLen(names, 2)
      self.assertTrue(any('alpha = 16' in name for name in names), names)
    self.assertEqual(reporting.traffic(runs, 0.9), {})


def test_bits_of_parties_count_bytes():
  payload = {'a': np.zeros(3, np.float32), 'b': np.zeros(5, np.uint8)}
  assert parties_lib.size(payload) == 8 * (12 + 5) == averaging.bits(payload)
  assert federated_lib.cohort_omega(2.0, 4, 4) == 2.0
  assert partition.weights([np.arange(3), np.arange(1)], 'size') == [0.75, 0.25]
  assert jnp.zeros(()).dtype == jnp.float32
