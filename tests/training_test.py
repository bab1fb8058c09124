"""Tests of methods, loop, checkpoints, drivers and reports on small tasks."""

import functools
import inspect
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time
import types
from unittest import mock

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import chain
from bernoulli_lora_jax import cli
from bernoulli_lora_jax import files
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import figures
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import parallel
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import sweep

_ROOT = pathlib.Path(__file__).parent.parent


def small_config(**overrides):
  """Digits with a small network; 24 steps, dropout on."""
  config = base_config.get_config()
  config.training.eval_gradient = True
  config.task.hidden = (16,)
  config.task.pretrain_epochs = 1
  config.task.dropout = 0.2
  config.method.sketch = 'coordinate'  # A QR takes long to compile.
  config.method.learning_rate = 0.02
  config.training.num_steps = 24
  config.training.num_evals = 4
  config.training.progress = False
  names = {k.replace('__', '.'): v for k, v in overrides.items()}
  return experiment.apply_overrides(config, names)


@functools.cache
def small_program():
  """Returns the program of `small_config`, which compiles once."""
  return experiment.make_program(small_config())


_PROGRAMS = {}  # By config: making one takes longer than restoring a state.


def first_state(config):
  """Returns the program of a config and its state at step 0."""
  name = str(config.to_dict())
  if name not in _PROGRAMS:
    program = experiment.make_program(config)
    _PROGRAMS[name] = program, program.start(jax.random.key(config.seed))
  return _PROGRAMS[name]


def final_params(directory, config):
  """Returns the params of the newest checkpoint as NumPy arrays."""
  program, state = first_state(config)
  with loop.open_checkpoints(program, directory, state) as saver:
    state, _, _ = loop.restore(saver, program, state)
  return jax.tree.map(np.asarray, state.params)


class GradientMethodTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _task(self):
    x = jax.random.normal(jax.random.key(0), (10, 6))
    y = jax.random.normal(jax.random.key(1), (10, 4))
    self.full = {'x': x, 'y': y, 'index': jnp.arange(10)}
    self.params = {'w': jnp.ones((6, 4)), 'bias': jnp.ones((4,))}
    self.batch = task_lib.take(self.full, jnp.array([1, 5]))

  @staticmethod
  def loss(params, batch, key):
    del key
    bias = jnp.broadcast_to(params['bias'], batch['y'].shape)
    return jnp.mean((batch['x'] @ params['w'] + bias - batch['y']) ** 2), {}

  def method(self, estimator, **kwargs):
    return methods.gradient_method(
        self.loss,
        methods.make_transformation('full', 0.1),
        estimator=estimator,
        num_samples=10,
        batch_size=2,
        **kwargs,
    )

  def step(self, method, state=None):
    if state is None:
      state = method.init(jax.random.key(0), self.params)
    return method.step(state, self.batch, jax.random.key(1), self.full)

  def test_gd_uses_all_and_sgd_the_batch(self):
    for estimator, data in (('gd', self.full), ('sgd', self.batch)):
      state, metrics = self.step(self.method(estimator))
      grad = jax.grad(lambda p, d=data: self.loss(p, d, None)[0])(self.params)
      expected = jax.tree.map(lambda p, g: p - 0.1 * g, self.params, grad)
      chex.assert_trees_all_close(state.params, expected, rtol=1e-6)
      np.testing.assert_allclose(
          metrics['data_passes'], 1.0 if estimator == 'gd' else 0.2, rtol=1e-6
      )

  def test_data_passes(self):
    state, metrics = self.step(self.method('mvr', momentum=0.5))
    np.testing.assert_allclose(metrics['data_passes'], 0.4, rtol=1e-6)
    method = self.method('page', page_prob=1e-9)
    state, metrics = self.step(method)
    np.testing.assert_allclose(metrics['data_passes'], 1.0)  # First: full.
    state, metrics = self.step(method, state)
    np.testing.assert_allclose(metrics['data_passes'], 1.4, rtol=1e-6)
    # q + (1 - q) 2 b / N with q = b / (b + N) = 1/6.
    np.testing.assert_allclose(
        self.method('page').passes_per_step, 1 / 6 + 5 / 6 * 0.4
    )

  def test_both_modes_draw_the_same(self):
    """With links of one plain step they take the same steps."""
    policy = methods.make_policy('bernoulli', period=1, rank=2)
    both = (
        methods.gradient_method(
            self.loss,
            methods.make_transformation(
                'bernoulli', 0.1, rank=2, others='freeze'
            ),
            estimator='sgd',
            num_samples=10,
            batch_size=2,
        ),
        methods.adapter_method(
            self.loss,
            policy,
            optax.sgd(0.1),
            num_samples=10,
            batch_size=2,
            additive=True,
        ),
    )
    found = []
    for method in both:
      state = None
      for _ in range(3):
        state, _ = self.step(method, state)
      found.append(method.params(state))
    chex.assert_trees_all_close(*found, rtol=1e-5)

  def test_frozen_leaves_stay(self):
    method = self.method('mvr', trained=lambda p: {'w': True, 'bias': False})
    state, _ = self.step(method)
    chex.assert_trees_all_equal(state.params['bias'], self.params['bias'])
    self.assertGreater(
        jnp.abs(state.params['w'] - self.params['w']).max(), 1e-3
    )

  @parameterized.parameters('gd', 'sgd', 'page', 'mvr')
  def test_frozen_leaves_get_no_gradient_and_no_copy(self, estimator):
    """An integer would refuse its gradient; the state has one leaf's shapes."""
    params = {'w': self.params['w'], 'bias': jnp.ones(4, jnp.int32)}
    method = self.method(
        estimator,
        trained=lambda p: {'w': True, 'bias': False},
        num_micro_batches=2,
    )
    state = method.init(jax.random.key(0), params)
    state, _ = self.step(method, state)
    chex.assert_trees_all_equal(state.params['bias'], params['bias'])
    shapes = {x.shape for x in jax.tree.leaves(state.opt_state)}
    self.assertLessEqual(shapes, {(), (6, 4)})

  def test_params_outlive_a_donated_state(self):
    method = self.method('mvr')
    state = method.init(jax.random.key(0), self.params)
    kept = method.params(state)
    step = jax.jit(self.step, static_argnums=0, donate_argnums=1)
    step(method, state)
    chex.assert_trees_all_equal(kept, self.params)

  def test_data_passes_do_not_stop_growing(self):
    method = self.method('sgd')
    state = method.init(jax.random.key(0), self.params)
    many = jnp.int32(2**30)
    state = state._replace(steps=methods.Steps(many, many))
    _, metrics = self.step(method, state)
    np.testing.assert_allclose(metrics['data_passes'], 1.2 * 2**30, rtol=1e-6)
    # A sum of costs in float32 would have stopped.
    later = state._replace(steps=methods.Steps(many, many + 2**20))
    _, grown = self.step(method, later)
    np.testing.assert_allclose(
        grown['data_passes'] - metrics['data_passes'], 0.2 * 2**20, rtol=1e-3
    )

  def test_micro_batches_are_the_batch(self):
    whole, _ = self.step(self.method('sgd'))
    parts, _ = self.step(self.method('sgd', num_micro_batches=2))
    # Sums in another order.
    chex.assert_trees_all_close(whole.params, parts.params, rtol=1e-6)

  def test_clipping_sees_trained_leaves_only(self):
    make_tx = methods.make_transformation('full', 1.0, clip_norm=0.5)
    method = methods.gradient_method(
        self.loss,
        make_tx,
        estimator='gd',
        num_samples=10,
        batch_size=2,
        trained=lambda p: {'w': True, 'bias': False},
    )
    state, _ = self.step(method)
    moved = state.params['w'] - self.params['w']
    np.testing.assert_allclose(jnp.linalg.norm(moved), 0.5, rtol=1e-5)

  def test_adam_lives_in_the_subspace(self):
    make_tx = methods.make_transformation(
        'rac_left', 0.1, rank=2, period=5, inner=optax.scale_by_adam()
    )
    method = methods.gradient_method(
        self.loss, make_tx, estimator='sgd', num_samples=10, batch_size=2
    )
    state = method.init(jax.random.key(0), {'w': self.params['w']})
    sizes = [x.size for x in jax.tree.leaves(state.opt_state)]
    self.assertLessEqual(max(sizes), 2 * 4)  # r x n, nothing of m x n.

  @parameterized.parameters(
      (dict(estimator='adam'), 'method.estimator in'),
      (dict(estimator='page', page_prob=0.0), 'prob in .0, 1.'),
      (dict(estimator='mvr', momentum=1.0), 'momentum in .0, 1.'),
  )
  def test_rejects(self, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      self.step(self.method(**kwargs))


class LoopTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  def test_run_directory(self):
    config = small_config()
    summary = experiment.train(config, self.tmp, small_program())
    lines = [
        json.loads(line)
        for line in (self.tmp / 'metrics.jsonl').read_text().splitlines()
    ]
    self.assertEqual([line['step'] for line in lines], [0, 6, 12, 18, 24])
    self.assertLess(lines[-1]['train_loss'], lines[0]['train_loss'])
    self.assertIn('grad_norm_sq', lines[-1])
    np.testing.assert_allclose(
        lines[-1]['data_passes'], 24 * 32 / 549, rtol=1e-5
    )
    self.assertEqual(
        json.loads((self.tmp / 'summary.json').read_text()), summary
    )
    self.assertIn('test_accuracy', summary)
    # r (n + m) / 2 of 64 x 16 and 16 x 5 at rank 4 and p = 1/2.
    self.assertEqual(summary['trained_parameters'], 4 * 40 + 4 * 10.5)
    self.assertTrue(list((self.tmp / 'events').iterdir()))
    self.assertTrue((self.tmp / 'checkpoints' / '24').is_dir())
    # A second call runs nothing.
    self.assertEqual(experiment.train(config, self.tmp), summary)

  @parameterized.parameters(
      ('gradient', chain, '_update'), ('adapter', adapters, 'step')
  )
  def test_few_frames_lie_between_the_command_and_the_engine(
      self, mode, module, name
  ):
    """Command, its function, loop, steps, one step, the method's step."""
    engine, package = getattr(module, name), pathlib.Path(bl.__file__).parent
    ways = []

    def watched(*args, **kwargs):
      files_ = [pathlib.Path(frame.filename) for frame in inspect.stack()]
      ways.append([f.name for f in files_ if f.is_relative_to(package)][::-1])
      return engine(*args, **kwargs)

    command = ['train', '--config=quadratic:smoke', f'--workdir={self.tmp}']
    command += [f'--config.method.mode={mode}', '--config.method.period=2']
    with mock.patch.object(module, name, watched):
      cli.main([*command, '--config.training.progress=False'])
    self.assertIn('cli.py', ways[-1])
    for way in ways:
      self.assertLessEqual(len(way), 6, way)

  def test_a_checkpoint_holds_state_best_weights_and_progress(self):
    state, best = {'w': jnp.arange(1.0, 3.0)}, {'w': jnp.arange(3.0, 6.0)}
    progress = loop.Progress(4, 2, 0.5, 1, 1, 3.0)
    like, like_best = jax.tree.map(jnp.zeros_like, (state, best))
    program = types.SimpleNamespace(
        settings=programs.Settings(8, 4, patience=1),
        snapshot=lambda state: like_best,
        task=types.SimpleNamespace(load=None),
        method=types.SimpleNamespace(params=lambda state: state),
    )
    with checkpoint.Checkpointer(self.tmp) as saver:
      loop._save(saver, state, best, progress)
      found = loop.restore(saver, program, like)
    chex.assert_trees_all_equal(found[:2], (state, best))
    self.assertEqual(found[2], progress)

  def test_each_step_draws_by_its_number(self):
    """In any dispatch, and its noise apart from its minibatch."""
    bits = jax.random.bits
    task = types.SimpleNamespace(
        batch=lambda data, key, step: bits(jax.random.fold_in(key, step))
    )
    method = types.SimpleNamespace(
        step=lambda state, batch, key, full: (
            state,
            {'batch': batch, 'noise': bits(key)},
        )
    )
    steps = functools.partial(programs.steps, task, method)
    run = lambda start, num: jax.tree.map(
        np.asarray, steps(num, {'train': ()}, (), jax.random.key(0), start)[1]
    )
    whole, first, second = run(0, 4), run(0, 2), run(2, 2)
    for name, draws in whole.items():
      np.testing.assert_array_equal(
          draws, np.concatenate([first[name], second[name]])
      )
    self.assertLen(np.unique(np.concatenate([*whole.values()])), 8)

  @parameterized.parameters(('page', 3))  # One length of dispatch is compiled.
  def test_resume_is_bit_identical(self, estimator, num_evals):
    self.check_resume_is_bit_identical(estimator, num_evals)

  @parameterized.parameters(('page', 4), ('mvr', 4))
  @pytest.mark.slow
  def test_resume_is_bit_identical_otherwise(self, estimator, num_evals):
    self.check_resume_is_bit_identical(estimator, num_evals)

  def check_resume_is_bit_identical(self, estimator, num_evals):
    config = small_config(
        method__estimator=estimator,
        method__optimizer='adam',
        method__period=5,
        training__num_evals=num_evals,
        training__checkpoint_every=8,
    )
    program, num_next = experiment.make_program(config), loop._num_next
    experiment.train(config, self.tmp / 'whole', program)

    def interrupted(program, progress):
      if progress.step >= 16:
        raise KeyboardInterrupt
      return num_next(program, progress)

    with mock.patch.object(loop, '_num_next', interrupted):
      with self.assertRaises(KeyboardInterrupt):
        experiment.train(config, self.tmp / 'cut', program)
    self.assertFalse((self.tmp / 'cut' / 'summary.json').exists())
    experiment.train(config, self.tmp / 'cut')
    chex.assert_trees_all_equal(
        final_params(self.tmp / 'whole', config),
        final_params(self.tmp / 'cut', config),
    )
    text = lambda name: [
        json.loads(line)
        for line in (self.tmp / name / 'metrics.jsonl').read_text().splitlines()
    ]
    self.assertEqual(text('whole'), text('cut'))

  def test_unfinished_checkpoint_is_not_taken(self):
    # Evaluations fall on checkpoints: one length of dispatch is compiled.
    config = small_config(training__checkpoint_every=8, training__num_evals=3)
    experiment.train(config, self.tmp)
    folder = self.tmp / 'checkpoints'
    whole = folder / '24'
    whole.rename(folder / '32.orbax-checkpoint-tmp')
    with checkpoint.Checkpointer(self.tmp) as saver:
      self.assertEqual(saver.latest(), 16)

  @pytest.mark.slow
  def test_checkpoint_of_other_shapes_is_named(self):
    experiment.train(small_config(), self.tmp, small_program())
    with self.assertRaisesRegex(
        ValueError, r'Dense_0/bias of shape \(16,\).*has \(8,\)'
    ):
      final_params(self.tmp, small_config(task__hidden=(8,)))

  def test_other_configuration_is_refused(self):
    experiment.train(small_config(), self.tmp, small_program())
    with self.assertRaisesRegex(
        ValueError, 'method.rank=4, as in .*got method.rank=2'
    ):
      experiment.train(small_config(method__rank=2), self.tmp)

  @pytest.mark.slow
  def test_longer_run_goes_on(self):
    experiment.train(small_config(), self.tmp, small_program())
    summary = experiment.train(small_config(training__num_steps=30), self.tmp)
    self.assertEqual(summary['step'], 30)

  def test_nan_stops_with_the_step(self):
    config = small_config(
        method__name='full',
        method__learning_rate=1e30,
        training__checkpoint_every=1,
    )
    with self.assertRaisesRegex(loop.DivergedError, 'at step'):
      experiment.train(config, self.tmp)
    for leaf in jax.tree.leaves(final_params(self.tmp, config)):
      self.assertTrue(np.isfinite(leaf).all())
    summary = json.loads((self.tmp / 'summary.json').read_text())
    self.assertIn('at step', summary['diverged'])
    self.assertEqual(summary['trained_parameters'], 1104)
    self.assertGreater(summary['seconds'], 0)
    # It does not diverge a second time: the run is over.
    with self.assertRaisesRegex(loop.DivergedError, 'at step'):
      experiment.train(config, self.tmp, experiment.make_program(config))

  def test_early_stopping_keeps_the_best(self):
    config = small_config(
        method__name='full',
        method__learning_rate=0.5,
        training__num_steps=600,
        training__num_evals=200,
        training__patience=3,
    )
    summary = experiment.train(config, self.tmp)
    self.assertTrue(summary['stopped'])
    losses = {}
    for line in (self.tmp / 'metrics.jsonl').read_text().splitlines():
      values = json.loads(line)
      losses[values['step']] = values['validation_loss']
    best = min((s for s in losses if s > 0), key=losses.get)
    self.assertEqual(summary['best_step'], best)
    self.assertEqual(summary['step'], best + 9)
    with checkpoint.Checkpointer(self.tmp) as saver:
      self.assertEqual(saver.latest(), summary['step'])
    np.testing.assert_allclose(summary['validation_loss'], losses[best])

  def test_seeds_share_a_program_and_differ(self):
    program = small_program()
    losses = [
        experiment.train(
            small_config(seed=seed), self.tmp / str(seed), program
        )['train_loss']
        for seed in (0, 1)
    ]
    self.assertNotEqual(*losses)
    with mock.patch.object(
        programs.Program, 'jit', autospec=True, side_effect=programs.Program.jit
    ) as jit:
      alone = experiment.train(small_config(seed=1), self.tmp / 'alone')
    self.assertEqual(alone['train_loss'], losses[1])
    jit.assert_called_once()  # One length of four dispatches.


class SignalTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
  @pytest.mark.slow
  def test_saves_before_it_ends(self, number):
    tmp = self.tmp
    command = [
        sys.executable,
        str(_ROOT / 'launch/train.py'),
        f'--config={_ROOT}/configs/digits.py',
        f'--workdir={tmp}',
        '--config.training.num_steps=2000000',
        '--config.task.hidden=(8,)',
        '--config.training.num_evals=1000000',
        '--config.task.pretrain_epochs=1',
        '--noconfig.training.progress',
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    metrics = tmp / 'metrics.jsonl'
    while time.time() < deadline and process.poll() is None:
      if metrics.exists() and metrics.read_text().count('\n') > 3:
        break
      time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    self.assertEqual(process.returncode, 128 + number, errors)
    self.assertRegex(
        errors.decode(), rf'^Ended by {number.name}: a checkpoint.*saved\.\n$'
    )
    with checkpoint.Checkpointer(tmp) as saver:
      last = json.loads(metrics.read_text().splitlines()[-1])['step']
      self.assertEqual(saver.latest(), last)


class ParallelTest(parameterized.TestCase):
  """On 8 virtual devices; conftest makes them."""

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  @parameterized.parameters(
      ('jit', 'sgd'),
      ('pmap', 'page'),
  )
  def test_equals_one_device(self, kind, estimator):
    self.check_equals_one_device(kind, estimator)

  @parameterized.parameters(
      ('jit', 'page'),
      ('jit', 'gd'),
      ('pmap', 'sgd'),
      ('pmap', 'gd'),
  )
  @pytest.mark.slow
  def test_equals_one_device_otherwise(self, kind, estimator):
    self.check_equals_one_device(kind, estimator)

  def check_equals_one_device(self, kind, estimator):
    self.assertEqual(jax.device_count(), 8)
    config = small_config(method__estimator=estimator)
    experiment.train(config, self.tmp / 'one')
    experiment.train(
        small_config(method__estimator=estimator, training__parallel=kind),
        self.tmp / kind,
    )
    # Dropout included; means in another order: float32 rounding over 24 steps.
    chex.assert_trees_all_close(
        final_params(self.tmp / 'one', config),
        final_params(self.tmp / kind, config),
        rtol=2e-5,
        atol=2e-6,
    )

  @parameterized.parameters(
      ('jit', 'none', 8), ('none', 'pmap', 4), ('pmap', 'jit', 2)
  )
  @pytest.mark.slow
  def test_checkpoint_moves_to_other_devices(self, first, second, count):
    half = small_config(training__num_steps=12, training__parallel=first)
    whole = small_config(
        training__parallel=second,
        **{} if second == 'none' else {'training__num_devices': count},
    )
    # The evaluations of both: every 6 steps.
    half.training.num_evals = 4
    whole.training.num_evals = 4
    experiment.train(half, self.tmp)
    experiment.train(whole, self.tmp)
    experiment.train(small_config(), self.tmp / 'one')
    chex.assert_trees_all_close(
        final_params(self.tmp, small_config()),
        final_params(self.tmp / 'one', small_config()),
        rtol=2e-5,
        atol=2e-6,
    )

  def test_batch_must_divide(self):
    config = small_config(training__parallel='jit', task__batch_size=30)
    with self.assertRaisesRegex(ValueError, 'batch_size.*8 devices.*=30'):
      experiment.train(config, self.tmp)


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      ('method.rank', 0, 'rank >= 1, got rank=0'),
      ('method.rank', 65, 'rank <= 64.*got rank=65'),
      ('method.prob', 1.5, 'prob in .0, 1.*prob=1.5'),
      ('method.period', 0, 'period >= 1, got period=0'),
      ('method.sketch', 'fourier', "method.sketch in .*'fourier'"),
      ('method.name', 'lora', "method.name in .*'lora'"),
      ('method.estimator', 'adam', "method.estimator in .*'adam'"),
      ('method.optimizer', 'lion', "method.optimizer .*'lion'"),
      ('method.schedule', 'step', "method.schedule .*'step'"),
      (
          'method.select',
          'Conv',
          "select='Conv' to match.*(?s:.)*Dense_0/kernel",
      ),
      ('method.learning_rate', -1.0, 'method.learning_rate > 0.*=-1'),
      ('method.stepsize_factor', 1.0, 'stepsize_factor.*knows L'),
      ('method.warmup_steps', 25, 'warmup_steps in .0, 24.*=25'),
      ('task.name', 'cifar', "task.name .*'cifar'"),
      ('task.batch_size', 0, 'task.batch_size >= 1.*=0'),
      ('task.batch_size', 550, 'task.batch_size in .1, 549.*=550'),
      ('task.dropout', 1.0, 'dropout in .0, 1.*dropout=1.0'),
      ('training.num_evals', 0, 'training.num_evals >= 1'),
      ('training.parallel', 'tpu', "training.parallel .*'tpu'"),
      ('training.num_devices', 9, 'num_devices in .1, 8.*=9'),
      ('training.steps_per_dispatch', 0, 'training.steps_per_dispatch >= 1'),
  )
  def test_bad_values_are_named(self, field, value, message):
    overrides = {field: value}
    if field == 'training.num_devices':
      overrides['training.parallel'] = 'jit'
    config = experiment.apply_overrides(small_config(), overrides)
    with self.assertRaisesRegex(ValueError, message):
      experiment.make_program(config)

  def test_unknown_field(self):
    with self.assertRaisesRegex(ValueError, 'rnak'):
      experiment.apply_overrides(small_config(), {'method.rnak': 2})
    config = base_config.get_config()
    config.method.rnak = 2
    with self.assertRaisesRegex(ValueError, 'config.method.rnak=2'):
      experiment.make_program(config)

  def test_wrong_type(self):
    with self.assertRaisesRegex(TypeError, 'rank'):
      experiment.apply_overrides(small_config(), {'method.rank': 'four'})

  def test_a_factor_of_the_stepsize_is_of_1_over_l(self):
    config = base_config.get_config()
    config.task.name = 'quadratic'
    config.method.stepsize_factor = 0.5
    task = arguments.make_task(config)
    self.assertEqual(arguments.learning_rate_of(config, task), 0.5 / 20)

  def test_selection_table_says_clipped(self):
    config = small_config(method__rank=8)
    rows = experiment.selection(config, arguments.make_task(config))
    self.assertEqual(rows[0]['rank'], 8)
    self.assertEqual(rows[1]['rank'], 'left 8, right 5 (clipped)')
    self.assertEqual(rows[1]['trained'], (8 * 5 + 16 * 5) / 2)


class ReportingTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  def _run(self, name, seed, accuracy):
    path = self.tmp / f'{name}-{seed}'
    path.mkdir()
    config = small_config(method__name=name, seed=seed)
    files.write_json(path / 'config.json', config.to_dict())
    files.write_json(
        path / 'summary.json',
        {
            'test_accuracy': accuracy,
            'trained_parameters': 1234.0,
            'seconds': 2.0,
        },
    )
    lines = [
        {
            'step': s,
            'data_passes': s,
            'validation_accuracy': accuracy * s,
            'grad_norm_sq': 10.0**-s,
            'train_loss': 1.0,
        }
        for s in range(3)
    ]
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (path / 'metrics.jsonl').write_text(text)

  def test_table_and_figures(self):
    self._run('bernoulli', 0, 0.5)
    self._run('bernoulli', 1, 0.7)
    self._run('full', 0, 0.9)
    runs = reporting.load_runs([self.tmp])
    ((_, rows),) = reporting.comparison(runs).items()
    self.assertEqual(
        [row['method'] for row in rows], ['full fine-tuning', 'Bernoulli-LoRA']
    )
    text = reporting.table(rows, is_even=True)
    # Deviation with n - 1: 14.1.
    self.assertRegex(text, r'60 ± 14 ')
    self.assertIn('1,234', text)
    curve = figures.curve(runs[:2], 'grad_norm_sq', log=True)
    np.testing.assert_allclose(curve.mean, np.log(10) * np.array([0, -1, -2]))
    for path in figures.write_figures(runs, self.tmp / 'figures'):
      self.assertGreater(path.stat().st_size, 10_000)

  def test_variants_are_rows_of_their_own(self):
    self._run('rac_left', 0, 0.5)
    self._run('rac_left', 1, 0.7)
    path = self.tmp / 'rac_left-1' / 'config.json'
    config = json.loads(path.read_text())
    config['method']['sketch'] = 'srht'
    path.write_text(json.dumps(config))
    ((_, rows),) = reporting.comparison(reporting.load_runs([self.tmp])).items()
    self.assertEqual(
        [row['method'] for row in rows],
        ['sketch = coordinate', 'sketch = srht'],
    )

  def test_best_rate_published_and_csv(self):
    for seed, (rate, loss) in enumerate([(0.1, 2.0), (0.1, 1.0), (0.3, 1.2)]):
      self._run('full', seed, 0.5 + seed / 10)
      path = self.tmp / f'full-{seed}'
      for name, section, field, value in (
          ('config', 'method', 'learning_rate', rate),
          ('summary', None, 'validation_loss', loss),
      ):
        record = json.loads((path / f'{name}.json').read_text())
        (record[section] if section else record)[field] = value
        (path / f'{name}.json').write_text(json.dumps(record))
    runs = reporting.load_runs([self.tmp])
    (row,) = reporting.statistics(runs)
    self.assertEqual(row['learning_rate'], 0.3)  # Mean 1.2 against 1.5.
    full = {'method.name': 'full'}
    published = [(full, (60.0, 3.0, 9))]
    (row,) = reporting.statistics(runs[:2], published)
    # Ours 50 and 60: s.e. 5; theirs 3 / 3 = 1.
    np.testing.assert_allclose(row['standard_errors'], -5 / 26**0.5)
    (row,) = reporting.statistics(runs[:2], [(full, (60.0, None, 1))])
    np.testing.assert_allclose(row['standard_errors'], -5 / (25 + 50) ** 0.5)
    reporting.write_csv(self.tmp / 'x.csv', [row])
    self.assertIn('standard_errors', (self.tmp / 'x.csv').read_text())

  def test_empty_directory_is_named(self):
    with self.assertRaisesRegex(FileNotFoundError, str(self.tmp)):
      reporting.load_runs([self.tmp])


def _launch(*args):
  environment = {**os.environ, 'PYTHONPATH': str(_ROOT)}
  return subprocess.run(
      [sys.executable, *args],
      capture_output=True,
      text=True,
      env=environment,
      cwd=_ROOT,
      timeout=300,
  )


class LaunchTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  @pytest.mark.slow
  def test_help_of_sweep_explains_itself(self):
    self.check_help('sweep')

  @parameterized.parameters('train', 'report')
  @pytest.mark.slow
  def test_help_explains_itself(self, script):
    self.check_help(script)

  def check_help(self, script):
    result = _launch(f'launch/{script}.py', '--help')
    self.assertIn(f'python launch/{script}.py', result.stdout)

  @pytest.mark.slow
  def test_an_unknown_variant_is_one_clear_message(self):
    result = _launch(
        'launch/train.py',
        '--config=configs/digits.py:smokey',
        f'--workdir={self.tmp}',
    )
    self.assertEqual(result.returncode, 1)
    self.assertRegex(
        result.stderr, r"^ValueError: Expected variants of .*'smokey'\.\n$"
    )

  @pytest.mark.slow
  def test_sweep_skips_finished_runs_and_report_reads_them(self):
    workdir = self.tmp
    command = [
        'launch/sweep.py',
        '--config=configs/quadratic.py:smoke',
        f'--workdir={workdir}/runs',
    ]
    self.assertEqual(_launch(*command).returncode, 0)
    summaries = sorted(pathlib.Path(workdir).rglob('summary.json'))
    self.assertEqual(len(summaries), 180)
    times = [path.stat().st_mtime_ns for path in summaries]
    self.assertEqual(_launch(*command).returncode, 0)
    self.assertEqual([path.stat().st_mtime_ns for path in summaries], times)
    result = _launch(
        'launch/report.py', f'{workdir}/runs', f'--figures={workdir}/figures'
    )
    self.assertIn('RAC-LoRA (left frozen), K = 1', result.stdout)
    self.assertTrue(list(pathlib.Path(workdir, 'figures').glob('*.png')))


class SmokeTest(parameterized.TestCase):
  """Every variant of every config trains a few steps."""

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  QUICK = (
      ('digits', 'page'),
      ('quadratic', 'rac_left'),
      ('linear_regression', 'mvr'),
  )
  VARIANTS = tuple(
      (name, variant)
      for name, variants in {
          'digits': 'full lora cola asymmetric_left rac_right bernoulli'
          ' gradient,rac_left gd page mvr',
          'quadratic': 'full asymmetric_left rac_left gradient,bernoulli',
          'linear_regression': 'full rac_left gd sgd page mvr',
          'mnist': 'full bernoulli cola,flipped page',
          'equal': 'digits,parameters digits,rank digits,flops',
      }.items()
      for variant in variants.split()
  )

  def load(self, name, variant):
    """Returns the config's path, its functions and the config of a variant."""
    path = _ROOT / 'configs' / f'{name}.py'
    module = runpy.run_path(str(path))
    return path, module, module['get_config'](f'{variant},smoke')

  def check_variant(self, name, variant):
    if name == 'mnist' and not os.environ.get('BERNOULLI_LORA_DATA'):
      self.skipTest('BERNOULLI_LORA_DATA is not set: no MNIST files.')
    _, _, config = self.load(name, variant)
    config.training.progress = False
    config.x64 = False
    summary = experiment.train(config, self.tmp)
    self.assertTrue(np.isfinite(summary['train_loss']))

  @parameterized.parameters(*QUICK)
  def test_variant(self, name, variant):
    self.check_variant(name, variant)

  @parameterized.parameters(*sorted(set(VARIANTS) - set(QUICK)))
  @pytest.mark.slow
  def test_other_variant(self, name, variant):
    self.check_variant(name, variant)

  @parameterized.parameters(*VARIANTS)
  def test_sweep_and_unknown_variant(self, name, variant):
    path, module, config = self.load(name, variant)
    experiment.check_config(config)
    with self.assertRaisesRegex(ValueError, 'nonsense'):
      module['get_config']('nonsense')
    for overrides in sweep.load(str(path), variant):
      experiment.apply_overrides(config, overrides)


def test_public_names():
  for name in ('bernoulli_lora', 'rac_lora', 'page', 'mvr', 'project'):
    assert callable(getattr(bl, name))
  assert parallel.make_driver('none').num_devices == 1


@pytest.mark.slow
class MnistTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  @parameterized.parameters(
      'gradient,bernoulli',
      'gradient,rac_left',
      'gradient,rac_right',
      'rac_right',
  )
  def test_chain_learns_the_other_digits(self, name):
    if not os.environ.get('BERNOULLI_LORA_DATA'):
      self.skipTest('BERNOULLI_LORA_DATA is not set: no MNIST files.')
    module = runpy.run_path(str(_ROOT / 'configs' / 'mnist.py'))
    config = experiment.apply_overrides(
        module['get_config'](name),
        {
            'training.num_passes': 10.0,
            'training.num_evals': 10,
            'training.progress': False,
        },
    )
    summary = experiment.train(config, self.tmp)
    lines = (self.tmp / 'metrics.jsonl').read_text().splitlines()
    before = json.loads(lines[0])['validation_accuracy']
    # Five classes: chance is 20%. Measured after 10 passes: 92% (Bernoulli in
    # gradient mode).
    self.assertLess(before, 0.5)
    self.assertGreater(summary['test_accuracy'], 0.8)
