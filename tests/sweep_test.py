"""Tests of runs that train together, of sweeps, and of recipes of runs."""

import dataclasses
import json
import math
import pathlib
import re
from unittest import mock
import warnings

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bernoulli_lora_jax import recipes
from bernoulli_lora_jax.tasks import quadratic
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import sweep
from bernoulli_lora_jax.training import together


def small_config(**overrides):
  """Bernoulli-LoRA adapters on digits: 24 steps, links of 5, dropout on."""
  config = base_config.get_config()
  config.training.eval_gradient = True
  config.task.hidden = (16,)
  config.task.pretrain_epochs = 1
  config.task.dropout = 0.2
  config.method.sketch = 'coordinate'  # A QR takes long to compile.
  config.method.mode = 'adapter'
  config.method.rank = 2
  config.method.period = 5
  config.method.optimizer = 'adam'
  config.method.learning_rate = 0.02
  config.training.num_steps = 24
  config.training.num_evals = 6
  config.training.progress = False
  names = {k.replace('__', '.'): v for k, v in overrides.items()}
  return experiment.apply_overrides(config, names)


def lines_of(directory):
  text = (pathlib.Path(directory) / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def assert_lines_close(ours, theirs, rtol=2e-4):
  """Asserts equal metrics; batched products round otherwise than single ones."""
  assert [line['step'] for line in ours] == [line['step'] for line in theirs]
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol, 1e-5, err_msg=name)


class TogetherTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  def together(self, config, runs, **kwargs):
    """Returns the results of runs [(seed, prob, learning rate)], in order."""
    task = arguments.make_task(config)
    results = together.train_together(
        task,
        lambda hyper: experiment.make_method(config, task, **hyper),
        experiment.make_settings(config, task),
        [seed for seed, _, _ in runs],
        {
            'prob': [prob for _, prob, _ in runs],
            'learning_rate': [rate for _, _, rate in runs],
        },
        **kwargs,
    )
    return [result for _, result in sorted(results, key=lambda r: r[0])]

  def alone(self, config, run):
    seed, prob, rate = run
    names = {'seed': seed, 'method.prob': prob, 'method.learning_rate': rate}
    directory = self.tmp / f'{seed}-{prob}-{rate}'
    summary = experiment.train(
        experiment.apply_overrides(config, names), directory
    )
    return summary, lines_of(directory)

  def test_equals_runs_one_after_another(self):
    # The last, of a group that is filled up.
    self.assert_equal_to_runs_alone(small_config(), [2])

  @parameterized.parameters(
      ({}, [1]),
      (dict(method__mode='gradient', method__estimator='mvr'), [1]),
      (dict(method__name='cola', method__reset_optimizer=False), [2]),
      (dict(method__mode='sketched', training__patience=2), [1, 2]),
  )
  @pytest.mark.slow
  def test_other_methods_equal_runs_alone(self, overrides, checked):
    self.assert_equal_to_runs_alone(small_config(**overrides), checked)

  @pytest.mark.slow
  def test_runs_one_by_one_in_a_program_equal_runs_alone(self):
    self.assert_equal_to_runs_alone(small_config(), [1], one_by_one=True)

  def assert_equal_to_runs_alone(self, config, checked, **kwargs):
    runs = [(0, 0.0, 0.02), (1, 0.5, 0.02), (2, 1.0, 0.01)]
    results = self.together(config, runs, group_size=2, **kwargs)
    self.assertLen(results, 3)
    for i in checked:
      run, result = runs[i], results[i]
      summary, lines = self.alone(config, run)
      assert_lines_close(result.lines, lines)
      for name in ('step', 'stopped', 'best_step'):
        self.assertEqual(result.summary[name], summary[name])
      for name in ('test_loss', 'test_accuracy', 'grad_norm_sq'):
        np.testing.assert_allclose(
            result.summary[name], summary[name], rtol=2e-4
        )

  @pytest.mark.slow
  def test_early_stopping_and_plateaus_are_kept_for_each_run(self):
    config = small_config(
        training__num_steps=120,
        training__num_evals=60,
        training__patience=4,
        training__plateau_patience=2,
        training__plateau_factor=0.5,
    )
    runs = [(0, 0.5, 0.3), (1, 0.5, 1e-4), (2, 0.5, 0.6)]
    results = self.together(config, runs)
    ends = set()
    for run, result in zip(runs, results, strict=True):
      summary, lines = self.alone(config, run)
      self.assertEqual(result.summary['step'], summary['step'])
      self.assertEqual(result.summary['best_step'], summary['best_step'])
      assert_lines_close(result.lines, lines, rtol=5e-3)  # Rates of 0.6.
      np.testing.assert_allclose(
          result.summary['test_loss'], summary['test_loss'], rtol=5e-3
      )
      ends.add(summary['step'])
    self.assertGreater(len(ends), 1)  # They did stop at different steps.

  def test_a_diverging_run_ends_alone(self):
    config = small_config(
        method__mode='gradient', method__name='full', method__optimizer='sgd'
    )
    runs = [(0, 0.5, 0.01), (1, 0.5, 1e30)]
    good, bad = self.together(config, runs)
    self.assertEqual(good.summary['step'], 24)
    self.assertTrue(math.isfinite(good.summary['test_loss']))
    self.assertIn('at step', bad.summary['diverged'])
    self.assertEqual([line['step'] for line in bad.lines], [0])

  @pytest.mark.slow
  def test_one_program_whatever_the_number_of_groups(self):
    config = small_config()
    compiled = []
    original = together._compile

    def counting(*args):
      compiled.append(len(args[1]))
      return original(*args)

    together._compile = counting
    try:
      runs = [(seed, seed / 6, 0.02) for seed in range(7)]
      results = self.together(config, runs, group_size=3)
    finally:
      together._compile = original
    self.assertEqual(compiled, [3])
    self.assertLen(results, 7)
    # The last group is filled up; what fills it is dropped.
    losses = [result.summary['train_loss'] for result in results]
    self.assertEqual(len(set(losses)), 7)

  def test_each_run_is_tested_at_its_best_weights(self):
    task = quadratic.make_task()

    def make_method(hyper):
      return methods.gradient_method(
          task.loss,
          methods.make_transformation('full', hyper['learning_rate']),
          estimator='gd',
          num_samples=1,
          batch_size=1,
      )

    settings = programs.Settings(6, 1, patience=2, progress=False)
    rates = {'learning_rate': [0.3, 1 / quadratic.SMOOTHNESS]}
    results = dict(
        together.train_together(task, make_method, settings, [0, 0], rates)
    )
    # The first climbs from its first step on, the other one descends.
    for i, (best, end) in enumerate([(1, 3), (6, 6)]):
      lines, summary = results[i][:2]
      self.assertEqual((summary['best_step'], summary['step']), (best, end))
      np.testing.assert_allclose(
          summary['train_loss'], lines[best]['train_loss'], rtol=1e-5
      )

  def test_the_end_of_a_link_is_no_work_of_every_step(self):
    config = small_config()
    task = arguments.make_task(config)
    parts = together._Parts(
        task,
        lambda hyper: experiment.make_method(config, task, **hyper),
        experiment.make_settings(config, task),
        False,
    )
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    hyper = {'prob': jnp.array([0.5, 0.5])}
    start = jax.vmap(lambda *args: parts.start(*args, None))
    params = jax.eval_shape(jax.vmap(task.init), keys)

    def num_together(shared):
      """Returns how many loops go on while any of the runs is not done."""
      states, axes = jax.eval_shape(start, keys, hyper), 0
      if shared:
        share = lambda states: together._shared_count(states, False)
        states = jax.eval_shape(share, states)
        axes = together._axes(states)
      f = parts.mapped(
          parts.steps, (axes, 0, 0, 0, 0, None, None), (axes, 0, 0)
      )
      lowered = jax.jit(f).lower(
          states, params, keys, hyper, jnp.ones(2, bool), task.data, 0
      )
      conditions = re.findall(r'cond \{(.*?)\} do', lowered.as_text(), re.S)
      return sum('reduce' in condition for condition in conditions)

    self.assertEqual(num_together(shared=True), num_together(shared=False) - 1)

  def test_page_computes_full_gradients_only_when_asked_for(self):
    size, count = 12, [0]

    def loss(params, batch, key):
      del key
      if batch['x'].shape[0] == size:
        jax.debug.callback(lambda: count.__setitem__(0, count[0] + 1))
      return jnp.mean((batch['x'] @ params['w'] - 1) ** 2), {}

    x = jax.random.normal(jax.random.key(0), (size, 4))
    task = task_lib.Task(
        name='toy',
        init=lambda key: {'w': jnp.zeros((4, 3))},
        data={'train': {'x': x, 'index': jnp.arange(size)}},
        loss=loss,
        batch=task_lib.uniform_batch(2),
        metrics=lambda params, data, split: {'loss': jnp.zeros([])},
        sampling='replacement',
        num_samples=size,
        batch_size=2,
    )
    make = lambda hyper: methods.gradient_method(
        loss,
        methods.make_transformation(
            'bernoulli', hyper['learning_rate'], rank=1
        ),
        estimator='page',
        num_samples=size,
        batch_size=2,
        page_prob=0.1,
    )
    settings = programs.Settings(40, 40, eval_gradient=False, progress=False)
    results = together.train_together(
        task,
        make,
        settings,
        [0, 1, 2],
        {'learning_rate': [0.1, 0.1, 0.1]},
        one_by_one=True,
    )
    passes = [result.lines[-1]['data_passes'] for _, result in results]
    jax.effects_barrier()
    # Each run: 1 a full gradient, 1/3 a small step; 40 steps.
    full = [(total - 40 / 3) / (2 / 3) for total in passes]
    self.assertEqual(count[0], round(sum(full)))
    self.assertLess(count[0], 40)  # A select would make 120.


class JudgeTest(parameterized.TestCase):

  def test_counts_and_drops(self):
    settings = programs.Settings(1, 1, plateau_patience=2)
    best, stale, flat = np.inf, 0, 0
    seen = []
    for loss in (3.0, 2.0, 2.5, 2.0, 2.1, 1.0):
      is_best, stale, flat, drops = loop.judge(
          loss, best, stale, flat, settings
      )
      best = min(best, loss)
      seen.append((bool(is_best), int(stale), int(flat), bool(drops)))
    self.assertEqual(
        seen,
        [
            (True, 0, 0, False),
            (True, 0, 0, False),
            (False, 1, 1, False),
            (False, 2, 0, True),
            (False, 3, 1, False),
            (True, 0, 0, False),
        ],
    )


class SweepTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  GRID = [
      {'method.name': name, 'method.prob': prob, 'seed': seed}
      for name, prob in (('bernoulli', 0.2), ('bernoulli', 0.7), ('lora', 0.5))
      for seed in (0, 1)
  ]

  def test_directories_and_second_call(self):
    config = small_config()
    sweep.train(config, self.GRID, self.tmp, progress=False)
    found = sorted(self.tmp.rglob('summary.json'))
    self.assertLen(found, 6)
    summaries = [json.loads(path.read_text()) for path in found]
    self.assertLen({s['test_loss'] for s in summaries}, 6)
    # Runs of both p are one program; LoRA is another.
    self.assertEqual([s['runs_together'] for s in summaries], [4] * 4 + [2] * 2)
    record = json.loads((found[0].parent / 'config.json').read_text())
    self.assertEqual(record['method']['prob'], 0.2)
    # r (m + n) of 64 x 16 and 16 x 5 at rank 2, weighted by p.
    self.assertEqual(
        summaries[0]['trained_parameters'],
        0.2 * 2 * (16 + 5) + 0.8 * 2 * (64 + 16),
    )
    # A second call trains what is missing, and only that.
    found[0].unlink()
    times = [path.stat().st_mtime_ns for path in found[1:]]
    sweep.train(config, self.GRID, self.tmp, progress=False)
    self.assertEqual([path.stat().st_mtime_ns for path in found[1:]], times)
    again = json.loads(found[0].read_text())
    np.testing.assert_allclose(
        again['test_loss'], summaries[0]['test_loss'], rtol=2e-4
    )

  OTHERS = (
      dict(training__recipe=True),
      dict(training__num_steps=25),
      dict(training__group_size=1),
      dict(training__checkpoint_every=12),
  )

  @parameterized.parameters(*OTHERS)
  def test_other_runs_are_trained_in_turn(self, **overrides):
    grid = [{'seed': 0}, {'seed': 1}]
    with mock.patch.object(experiment, 'train') as train:
      sweep.train(small_config(**overrides), grid, self.tmp, progress=False)
    (one, one_folder, program), (two, two_folder, other) = (
        call.args for call in train.call_args_list
    )
    self.assertEqual((one.seed, two.seed), (0, 1))
    self.assertEqual(one_folder, self.tmp / 'default' / 'seed=0')
    self.assertEqual(two_folder, self.tmp / 'default' / 'seed=1')
    self.assertIs(program, other)

  @parameterized.parameters(*OTHERS)
  @pytest.mark.slow
  def test_other_runs_are_trained(self, **overrides):
    grid = [{'seed': 0}, {'seed': 1}]
    sweep.train(small_config(**overrides), grid, self.tmp, progress=False)
    for seed in (0, 1):
      folder = self.tmp / 'default' / f'seed={seed}'
      summary = json.loads((folder / 'summary.json').read_text())
      self.assertNotIn('runs_together', summary)
      self.assertTrue((folder / 'checkpoints').is_dir())

  @parameterized.parameters(
      (2**20, 2**20, [False]),
      (1, 2**20, [True]),  # Larger ones share a program, one after another.
      (1, 1, []),
      (1, 2**20, [False], True),
      (2**20, 2**20, [True], False),
  )
  def test_sizes_that_share_a_program(
      self, small, medium, expected, step_together=None
  ):
    config = small_config(training__step_together=step_together)
    with (
        mock.patch.object(sweep, '_SMALL', small),
        mock.patch.object(sweep, '_MEDIUM', {'cpu': medium}),
        mock.patch.object(together, 'train_together', return_value=[]) as share,
        mock.patch.object(experiment, 'train') as train,
    ):
      grid = [{'seed': 0}, {'seed': 1}]
      sweep.train(config, grid, self.tmp, progress=False)
    found = [call.kwargs['one_by_one'] for call in share.call_args_list]
    self.assertEqual(found, expected)
    self.assertEqual(train.call_count, 0 if expected else 2)

  def test_names_must_differ(self):
    with self.assertRaisesRegex(ValueError, 'runs of different names'):
      sweep.train(small_config(), [{'seed': 1}] * 2, self.tmp)
    # All are checked before the first is trained.
    for bad in ({'method.rank': 65}, {'method.prob': 1.5}):
      with self.assertRaisesRegex(ValueError, 'Expected'):
        sweep.train(small_config(), [{'seed': 1}, bad], self.tmp)
    self.assertEqual(list(self.tmp.rglob('summary.json')), [])
    with self.assertRaisesRegex(ValueError, 'rnak'):
      sweep.train(small_config(), [{'method.rnak': 1}], self.tmp)


class AdapterRunTest(parameterized.TestCase):
  """Adapter mode in the loop: resume, devices, recipes, settings."""

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  def params(self, program, directory):
    """Returns the merged params of a finished run, replayed from its recipe."""
    recipe = recipes.load_recipe(directory / 'recipe')
    base = program.task.init(jax.random.key(0))
    return recipe, recipes.replay(base, recipe)

  @parameterized.parameters(['bernoulli'])
  @pytest.mark.slow
  def test_recipe_rebuilds_the_run_also_after_a_resume(self, name):
    self.check_recipe_rebuilds_the_run_also_after_a_resume(name)

  @parameterized.parameters('lora', 'cola')
  @pytest.mark.slow
  def test_recipe_rebuilds_the_run_also_after_a_resume_otherwise(self, name):
    self.check_recipe_rebuilds_the_run_also_after_a_resume(name)

  def check_recipe_rebuilds_the_run_also_after_a_resume(self, name):
    config = small_config(
        method__name=name,
        training__recipe=True,
        training__checkpoint_every=8,
    )
    program, num_next = experiment.make_program(config), loop._num_next
    states, save = [], loop._save

    def watched(saver, state, best, progress):
      states[:] = [jax.tree.map(jnp.copy, state)]
      save(saver, state, best, progress)

    def interrupted(program, progress):
      if progress.step >= 16:
        raise KeyboardInterrupt
      return num_next(program, progress)

    with mock.patch.object(loop, '_save', watched):
      experiment.train(config, self.tmp / 'whole', program)
    recipe, replayed = self.params(program, self.tmp / 'whole')
    chex.assert_trees_all_equal(replayed, program.params(states[0]))
    self.assertLen(recipe.links, 1 if name == 'lora' else 5)  # 24 / 5.
    with mock.patch.object(loop, '_num_next', interrupted):
      with self.assertRaises(KeyboardInterrupt):
        experiment.train(config, self.tmp / 'cut', program)
    experiment.train(config, self.tmp / 'cut', program)
    chex.assert_trees_all_equal(
        self.params(program, self.tmp / 'cut')[1], replayed
    )
    self.assertEqual(lines_of(self.tmp / 'cut'), lines_of(self.tmp / 'whole'))

  @parameterized.parameters(False, True)
  @pytest.mark.slow
  def test_recipe_of_a_sketched_run(self, of_steps):
    """To the bit by its steps, else to the roundings; also resumed in a link."""
    config = small_config(
        method__mode='sketched',
        training__recipe=True,
        training__recipe_of_steps=of_steps,
        training__checkpoint_every=8,
    )
    program, num_next = experiment.make_program(config), loop._num_next

    def interrupted(program, progress):
      if progress.step >= 18:  # Of links of five steps; 16 is saved.
        raise KeyboardInterrupt
      return num_next(program, progress)

    states, save = [], loop._save

    def watched(saver, state, best, progress):
      states[:] = [jax.tree.map(jnp.copy, state)]
      save(saver, state, best, progress)

    with mock.patch.object(loop, '_num_next', interrupted):
      with self.assertRaises(KeyboardInterrupt):
        experiment.train(config, self.tmp / 'cut', program)
    for name in ('cut', 'whole'):
      with mock.patch.object(loop, '_save', watched):
        experiment.train(config, self.tmp / name, program)
    final = program.params(states[0])
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      recipe, replayed = self.params(program, self.tmp / 'whole')
      _, again = self.params(program, self.tmp / 'cut')
    chex.assert_trees_all_equal(again, replayed)
    self.assertLen(recipe.links, 24 if of_steps else 5)
    self.assertEqual(recipe.final, recipes.checksum(final))
    if of_steps:
      chex.assert_trees_all_equal(replayed, final)
    # (24 + 5) / 2 roundings of weights below one, and sums of links.
    chex.assert_trees_all_close(replayed, final, rtol=0, atol=20 * 2.0**-24)
    self.assertEqual(lines_of(self.tmp / 'cut'), lines_of(self.tmp / 'whole'))

  @parameterized.parameters('jit', 'pmap')
  @pytest.mark.slow
  def test_devices_give_the_same_run(self, kind):
    experiment.train(small_config(), self.tmp / 'one')
    experiment.train(small_config(training__parallel=kind), self.tmp / kind)
    # Sums in another order, over 24 steps of Adam.
    assert_lines_close(
        lines_of(self.tmp / kind), lines_of(self.tmp / 'one'), rtol=1e-3
    )

  @pytest.mark.slow
  def test_micro_batches_are_the_batch(self):
    config = small_config(task__dropout=0.0)
    experiment.train(config, self.tmp / 'whole')
    parts = experiment.apply_overrides(
        config, {'training.num_micro_batches': 4}
    )
    experiment.train(parts, self.tmp / 'parts')
    assert_lines_close(
        lines_of(self.tmp / 'parts'), lines_of(self.tmp / 'whole'), rtol=1e-3
    )

  def test_all_linear_is_the_default_selection_here(self):
    config = small_config(method__select='all-linear')
    task = arguments.make_task(config)
    self.assertEqual(
        experiment.selection(config, task),
        experiment.selection(small_config(), task),
    )

  def test_a_period_longer_than_the_run_is_warned_of(self):
    with self.assertWarnsRegex(UserWarning, 'period=25: no merge'):
      experiment.make_program(small_config(method__period=25))

  def test_period_in_passes(self):
    config = small_config(method__period_passes=2.0)
    program = experiment.make_program(
        experiment.apply_overrides(config, {'training.num_steps': 40})
    )
    self.assertEqual(program.method.chain.policy.period, 34)  # 2 x 17 steps.

  @pytest.mark.slow
  def test_equal_flops(self):
    config = small_config(
        training__num_steps=0, training__num_full_passes=3.0, task__dropout=0.0
    )
    task = arguments.make_task(config)
    settings = experiment.make_settings(config, task)
    full = experiment.apply_overrides(
        config, {'method.mode': 'gradient', 'method.name': 'full'}
    )
    spent = settings.num_steps * experiment.step_flops(config, task)
    budget = 3 * 549 / 32 * experiment.step_flops(full, task)
    # In whole evaluation intervals, six of them.
    np.testing.assert_allclose(spent, budget, rtol=1 / 6)
    # Forward and both backward products of 64 x 16 and 16 x 5, without dx of the
    # first: 2 b (2 m n + 3 m' n'), and the elementwise rest.
    products = 2 * 32 * (2 * 64 * 16 + 3 * 16 * 5)
    flops = experiment.step_flops(full, task)
    self.assertBetween(
        flops / products, 1.0, 1.3
    )  # One forward pass more: 1.5.

  @parameterized.parameters(
      ('method.mode', 'both', "method.mode .*'both'"),
      ('method.name', 'dora', 'method.name in .*dora'),
      ('method.estimator', 'page', "method.estimator='sgd'.*'page'"),
      ('method.train_others', True, 'method.train_others=False'),
      ('method.period', 0, 'method.period >= 1 for bernoulli'),
      ('method.period_passes', -1.0, 'method.period_passes > 0.*-1'),
      ('method.alpha', 0.0, 'alpha > 0, got alpha=0'),
      ('method.rank', 65, 'rank <= 64.*got rank=65'),
      ('method.frame', 'skew', "frame in .*'skew'"),
      ('method.rounding', 'up', "rounding in .*'up'"),
      ('method.link_warmup', 5, r'warmup in \[0, period=5\), got warmup=5'),
      ('method.sketch', 'fourier', "method.sketch in .*'fourier'"),
      ('training.plateau_factor', 1.0, 'training.plateau_factor in'),
      ('training.plateau_patience', -1, 'training.plateau_patience >= 0'),
  )
  def test_bad_values_are_named(self, field, value, message):
    config = experiment.apply_overrides(small_config(), {field: value})
    with self.assertRaisesRegex(ValueError, message):
      experiment.make_program(config)

  def test_gradient_mode_has_no_recipe(self):
    config = small_config(method__mode='gradient', training__recipe=True)
    message = 'training.recipe=False in gradient mode, got recipe=True'
    with self.assertRaisesRegex(ValueError, message):
      experiment.make_program(config)

  def test_each_step_of_a_recipe_of_steps_is_a_dispatch(self):
    config = small_config(
        method__mode='sketched',
        training__recipe=True,
        training__recipe_of_steps=True,
    )
    program = experiment.make_program(config)
    progress = loop.Progress(2, 0, math.inf, 0, 0, 0.0)
    self.assertEqual(loop._num_next(program, progress), 1)
    config.training.recipe_of_steps = False
    program = experiment.make_program(config)
    self.assertGreater(loop._num_next(program, progress), 1)

  @parameterized.parameters(('adapter', True), ('sketched', False))
  def test_steps_are_of_a_recipe_of_sketched_runs(self, mode, recipe):
    config = small_config(
        method__mode=mode,
        training__recipe=recipe,
        training__recipe_of_steps=True,
    )
    message = f'recipe_of_steps=True, recipe={recipe} in {mode} mode'
    with self.assertRaisesRegex(ValueError, message):
      experiment.make_program(config)

  def test_nan_in_factors_saves_nothing(self):
    config = small_config(
        method__learning_rate=1e38,
        method__optimizer='sgd',
        training__checkpoint_every=4,
        training__recipe=True,
    )
    with self.assertRaises((loop.DivergedError, ValueError)):
      experiment.train(config, self.tmp)
    for path in (self.tmp / 'recipe').glob('link_*.npz'):
      for array in np.load(path).values():
        self.assertTrue(np.isfinite(array).all())
    self.assertFalse((self.tmp / 'recipe' / 'recipe.json').exists())
    summary = json.loads((self.tmp / 'summary.json').read_text())
    self.assertIn('diverged', summary)


class SketchedRunTest(parameterized.TestCase):
  """Sketched mode in the loop."""

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  def train(self, name, **overrides):
    """Returns the lines of a run, and the state that it has saved last."""
    states, save = [], loop._save

    def watched(saver, state, best, progress):
      states[:] = [jax.tree.map(jnp.copy, state)]
      save(saver, state, best, progress)

    with mock.patch.object(loop, '_save', watched):
      experiment.train(small_config(**overrides), self.tmp / name)
    return lines_of(self.tmp / name), states[0]

  def test_same_run_as_with_adapters(self):
    flags = dict(training__num_evals=1, task__hidden=())
    flags['method__sketch'] = 'gaussian'
    ours, end = self.train('ours', method__mode='sketched', **flags)
    theirs, _ = self.train('theirs', **flags)
    # The same steps in exact arithmetic: sums in another order.
    assert_lines_close(ours, theirs, rtol=2e-3)
    for pair in end.chain.factors.values():  # That which trains is zero.
      self.assertEqual(min(jnp.abs(x).max() for x in pair.values()), 0)

  @pytest.mark.slow
  def test_resume_is_bit_identical(self):
    flags = dict(training__checkpoint_every=8, training__num_evals=3)
    ours, end = self.train('whole', method__mode='sketched', **flags)
    num_next = loop._num_next

    def interrupted(program, progress):
      if progress.step >= 16:  # Within a link of 5 steps.
        raise KeyboardInterrupt
      return num_next(program, progress)

    with mock.patch.object(loop, '_num_next', interrupted):
      with self.assertRaises(KeyboardInterrupt):
        self.train('cut', method__mode='sketched', **flags)
    again, resumed = self.train('cut', method__mode='sketched', **flags)
    self.assertEqual(again, ours)
    chex.assert_trees_all_equal(resumed.chain.params, end.chain.params)
    chex.assert_trees_all_equal(resumed.chain.opt_state, end.chain.opt_state)

  @parameterized.parameters('jit', 'pmap')
  @pytest.mark.slow
  def test_devices_give_the_same_run(self, kind):
    one, _ = self.train('one', method__mode='sketched')
    both = dict(method__mode='sketched', training__parallel=kind)
    ours, _ = self.train(kind, **both)
    # Sums in another order, over 24 steps of Adam.
    assert_lines_close(ours, one, rtol=1e-3)

  @parameterized.parameters(
      dict(method__rounding='stochastic'),
      dict(method__rounding='compensated', training__patience=2),
      dict(method__name='rac_left', method__others='bias'),
      dict(method__name='rac_right', method__clip_norm=0.1),
      dict(training__num_micro_batches=4, task__dropout=0.0),
  )
  @pytest.mark.slow
  def test_other_runs_are_those_of_adapters(self, **overrides):
    ours, _ = self.train('ours', method__mode='sketched', **overrides)
    theirs, _ = self.train('theirs', **overrides)
    # Weights of float32 are rounded at each step, or at each link.
    assert_lines_close(ours, theirs, rtol=2e-3)

  @parameterized.parameters(
      ('method.name', 'lora', r"^Expected method.name in \(.*'lora'.$"),
      ('method.name', 'cola', r"^Expected method.name in \(.*'cola'.$"),
      ('method.optimizer', 'adamw', "^Expected method.optimizer .*'adamw'.$"),
      ('method.estimator', 'page', "estimator='sgd' in sketched .*'page'"),
      ('method.train_others', True, 'train_others=False in sketched'),
      ('method.period', 0, 'method.period >= 1 for bernoulli'),
      ('federated.num_clients', 2, "method.mode 'gradient' or .*='sketched'"),
      ('method.rounding', 'up', "rounding in .*'up'"),
  )
  def test_bad_values_are_named(self, field, value, message):
    config = small_config(method__mode='sketched')
    config = experiment.apply_overrides(config, {field: value})
    with self.assertRaisesRegex(ValueError, message):
      experiment.make_program(config)


def test_settings_are_what_the_config_says():
  config = small_config(
      training__patience=3,
      training__plateau_patience=2,
      training__plateau_factor=0.3,
      training__eval_gradient=False,
  )
  settings = experiment.make_settings(config, arguments.make_task(config))
  chosen = dataclasses.asdict(settings)
  assert chosen['patience'] == 3
  assert chosen['plateau_patience'] == 2
  assert chosen['plateau_factor'] == 0.3
  assert chosen['eval_gradient'] is False
