"""Tasks from outside of the package: arrays, streams, weights, chunks, checkpoints."""

import functools
import json
import pathlib
import shutil
import sys
from unittest import mock

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax.studies import runs
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import sweep

GUIDE = pathlib.Path(__file__).parent.parent / 'docs' / 'guide.md'
X = np.asarray(jax.random.normal(jax.random.key(0), (22, 6)))
Y = X @ np.asarray(jax.random.normal(jax.random.key(1), (6, 4)))


def loss(params, batch, key):
  """A mean over examples, of which some weigh nothing."""
  del key
  hidden = batch['x'] @ params['one']['kernel']
  squares = jnp.mean((hidden @ params['two']['kernel'] - batch['y']) ** 2, -1)
  weight = batch['index'] % 3 != 1
  total = jnp.sum(weight)
  value = jnp.sum(squares * weight) / jnp.where(total > 0, total, 1)
  return value, bl.Weighted(total, {'half': value / 2})


def init(key):
  keys = jax.random.split(key)
  shapes = (6, 5), (5, 4)
  one, two = (
      jax.random.normal(k, s) / 3 for k, s in zip(keys, shapes, strict=True)
  )
  return {'one': {'kernel': one}, 'two': {'kernel': two, 'bias': jnp.ones(4)}}


class Rows:
  """A stream of the examples in order, with a place that can be stored."""

  def __init__(self, seed, size, as_bytes=False):
    self.place, self.size, self.as_bytes = seed, size, as_bytes

  def __next__(self):
    rows = (self.place + np.arange(self.size)) % len(X)
    self.place += self.size
    return {'x': X[rows], 'y': Y[rows], 'index': rows.astype(np.int32)}

  def get_state(self):
    return str(self.place).encode() if self.as_bytes else {'at': self.place}

  def set_state(self, state):
    self.place = int(state) if self.as_bytes else state['at']


def make_task(*, batch_size, kind='arrays', **more):
  if kind == 'arrays':
    arrays = {'x': X, 'y': Y}
    return task_lib.from_arrays(
        'rows', loss, init=init, train=arrays, test=arrays,
        batch_size=batch_size, **more,
    )  # fmt: skip
  return task_lib.Task(
      name='rows',
      init=init,
      data={},
      loss=loss,
      num_samples=len(X),
      batch_size=batch_size,
      sampling='stream',
      stream=lambda seed: Rows(seed, batch_size, kind == 'bytes'),
  )


def make_config(mode='adapter', name='lora', kind='arrays', **overrides):
  config = base_config.get_config()
  config.task.name = f'{pathlib.Path(__file__)}:make_task'
  config.task.kwargs.kind = kind
  config.task.batch_size = 6
  config.method.mode, config.method.name = mode, name
  config.method.rank = 2
  config.method.period = 4
  config.method.sketch = 'coordinate'
  config.training.num_steps, config.training.num_evals = 12, 3
  config.training.progress = False
  flat = {k.replace('__', '.'): v for k, v in overrides.items()}
  return experiment.apply_overrides(config, flat)


class TaskTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _folder(self, tmp_path, monkeypatch):
    self.tmp = tmp_path
    monkeypatch.chdir(tmp_path)

  def train(self, name, config, program=None):
    return experiment.train(config, self.tmp / name, program)

  def end(self, name, config):
    """Returns the params at the end of a run."""
    program = experiment.make_program(config)
    start = program.start(jax.random.key(config.seed))
    with loop.open_checkpoints(program, self.tmp / name, start) as saver:
      state, _, _ = loop.restore(saver, program, start)
    return program.params(state)

  def test_guide(self):
    """The page's files, as they stand: data, loss, config, sweep, report."""
    section = GUIDE.read_text().split('## A task of your own')[1]
    section = section.split('\n## ')[0]
    blocks = section.split('```python\n')[1:]
    code = {}
    for block in blocks:
      text = block.split('```')[0]
      if text.startswith('# '):  # Names its file.
        code[text.splitlines()[0].strip('# ')] = text
    self.assertEqual(code.keys(), {'spirals.py', 'spirals_config.py'})
    self.assertLess(sum(len(t.splitlines()) for t in code.values()), 60)
    for name, text in code.items():
      (self.tmp / name).write_text(text)
    grid = sweep.load('spirals_config.py')
    namespace = {}
    exec(code['spirals_config.py'], namespace)
    config = namespace['get_config']()
    with config.unlocked():
      config.training.num_steps = 20
    grid = [dict(run, **{'training.num_steps': 20}) for run in grid]
    sweep.train(config, grid, self.tmp / 'runs', progress=False)
    found = reporting.load_runs([self.tmp / 'runs'])
    self.assertLen(found, len(grid))
    for run in found:
      self.assertIn('test_accuracy', run.summary)
      self.assertEqual(run.summary['step'], 20)
    sys.modules.pop('spirals', None)

  def test_chunks(self):
    self.check_chunks(5)

  @parameterized.parameters(3, 21)
  @pytest.mark.slow
  def test_chunks_otherwise(self, chunk):
    self.check_chunks(chunk)

  def check_chunks(self, chunk):
    """The mean of a split and its gradient, whatever the size of the chunks."""
    whole = make_task(batch_size=6)
    params = init(jax.random.key(0))
    expected = task_lib.evaluate(whole, params, whole.data, 'test')
    task = whole._replace(chunk=chunk)
    found = jax.jit(lambda p, d: task_lib.evaluate(task, p, d, 'test'))
    chex.assert_trees_all_close(found(params, task.data), expected, rtol=1e-6)
    self.assertEqual(found(params, task.data).keys(), {'loss', 'half'})
    method = experiment.make_method(make_config('gradient', 'full'), whole)
    settings = programs.Settings(1, 1, eval_gradient=True)
    gradient = lambda task: jax.jit(
        functools.partial(programs.evaluate, task, method, settings)
    )(params, task.data)['grad_norm_sq']
    np.testing.assert_allclose(gradient(task), gradient(whole), rtol=1e-5)

  def test_micro_batches_weigh_what_the_loss_says(self):
    self.check_micro_batches('gradient', 'full', 'gd')

  @parameterized.parameters(
      ('gradient', 'bernoulli', 'sgd'),
      ('adapter', 'bernoulli', 'sgd'),
      ('sketched', 'rac_left', 'sgd'),
  )
  @pytest.mark.slow
  def test_micro_batches_weigh_so_elsewhere(self, mode, name, estimator):
    self.check_micro_batches(mode, name, estimator)

  def check_micro_batches(self, mode, name, estimator):
    steps = {'method__estimator': estimator, 'training__num_steps': 3}
    ends = []
    for parts in (1, 3):
      config = make_config(
          mode,
          name,
          task__chunk=0 if parts == 1 else 4,
          training__num_micro_batches=parts,
          **steps,
      )
      self.train(f'run{parts}', config)
      ends.append(self.end(f'run{parts}', config))
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)
    start = init(jax.random.key(0))
    moved = ends[0]['one']['kernel'] - start['one']['kernel']
    self.assertGreater(float(jnp.max(jnp.abs(moved))), 1e-3)

  def test_a_stream_goes_on(self):
    self.check_a_stream_goes_on('stream')

  @pytest.mark.slow
  def test_a_place_is_bytes(self):
    self.check_a_stream_goes_on('bytes')

  def check_a_stream_goes_on(self, kind):
    """A run that is cut trains on the batches of the unbroken one, once each."""
    config = make_config('gradient', 'full', kind, training__checkpoint_every=4)
    self.train('whole', config)
    program, num_next = experiment.make_program(config), loop._num_next

    def interrupted(program, progress):
      if progress.step >= 8:
        raise KeyboardInterrupt
      return num_next(program, progress)

    with mock.patch.object(loop, '_num_next', interrupted):
      with self.assertRaises(KeyboardInterrupt):
        self.train('cut', config)
    self.train('cut', config)
    ends = [self.end(name, config) for name in ('whole', 'cut')]
    chex.assert_trees_all_equal(*ends)
    # By hand: plain steps along the stream.
    rows, params = Rows(0, 6), programs.init_params(
        program.task, jax.random.key(0)
    )
    rate = config.method.learning_rate
    for _ in range(12):
      batch = next(rows)
      grads = jax.grad(lambda p, b: loss(p, b, None)[0])(params, batch)
      grads['two']['bias'] = 0.0
      params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    chex.assert_trees_all_close(ends[0], params, rtol=1e-5)

  def test_validation_of_a_stream_decides(self):
    """A stream has no training split: its validation steers, alone."""
    config = make_config('gradient', 'full', 'stream', training__patience=1)
    data = {'validation': {'x': X, 'y': Y, 'index': np.arange(len(X))}}
    task = arguments.make_task(config)._replace(data=data)
    config.method.learning_rate = 1e-6  # Falls, by little.
    program = experiment.make_program(config, task)
    summary = self.train('run', config, program)
    self.assertEqual((summary['step'], summary['best_step']), (12, 12))
    self.assertIn('validation_loss', summary)
    self.assertNotIn('train_loss', summary)
    # Where it does not, the run stops at the first evaluation.
    worse = task._replace(metrics=lambda p, d, s: {'loss': jnp.array(jnp.inf)})
    program = experiment.make_program(config, worse)
    summary = self.train('worse', config, program)
    self.assertEqual((summary['step'], summary['stopped']), (4, True))

  def test_a_stream_has_a_place(self):
    config = make_config('gradient', 'full', 'stream')
    task = arguments.make_task(config)
    plain = lambda seed: iter([next(Rows(seed, 6))] * 20)
    program = experiment.make_program(config, task._replace(stream=plain))
    with self.assertRaisesRegex(TypeError, 'get_state'):
      self.train('run', config, program)

  @parameterized.parameters(
      ({'method__estimator': 'page'}, 'method.estimator'),
      ({'training__eval_gradient': True}, 'training.eval_gradient'),
  )
  def test_a_stream_has_no_full_gradient(self, overrides, field):
    config = make_config('gradient', 'full', 'stream', **overrides)
    with self.assertRaisesRegex(ValueError, f'train.*stream.*{field}'):
      experiment.make_program(config)

  def test_checkpoints_hold_what_changes(self):
    self.check_checkpoints('adapter', 'bernoulli', {'two/bias'})

  @parameterized.parameters(
      ('gradient', 'bernoulli', {'two/bias'}),
      ('gradient', 'full', {'two/bias'}),
      ('adapter', 'lora', {'two/bias', 'one/kernel', 'two/kernel'}),
      ('sketched', 'rac_right', {'two/bias'}),
  )
  @pytest.mark.slow
  def test_checkpoints_hold_so_elsewhere(self, mode, name, frozen):
    self.check_checkpoints(mode, name, frozen)

  def check_checkpoints(self, mode, name, frozen):
    config = make_config(mode, name, training__checkpoint_every=4)
    self.train('run', config)
    folder = self.tmp / 'run' / 'checkpoints' / '12'
    stored = json.loads((folder / 'frozen.json').read_text())
    self.assertEqual({p.split('params/')[1] for p in stored}, frozen)
    # Resumed from the middle: the same end.
    expected = self.end('run', config)
    shutil.rmtree(folder)
    (self.tmp / 'run' / 'summary.json').unlink()
    self.train('run', config)
    chex.assert_trees_all_equal(self.end('run', config), expected)

  def test_another_base_is_refused(self):
    config = make_config(training__checkpoint_every=4)
    self.train('run', config)
    (self.tmp / 'run' / 'summary.json').unlink()
    task = arguments.make_task(config)
    other = lambda key: jax.tree.map(lambda x: x * 1.5, init(key))
    program = experiment.make_program(config, task._replace(init=other))
    with self.assertRaisesRegex(ValueError, 'kernel.*began with.*changed'):
      self.train('run', config, program)

  @pytest.mark.slow
  def test_runs_together_keep_their_end(self):
    self.check_ends('adapter', 'bernoulli')

  @parameterized.parameters(
      ('adapter', 'lora', {'training__patience': 1}),
      ('sketched', 'bernoulli', {'training__patience': 1}),
      ('gradient', 'bernoulli', {}),
  )
  @pytest.mark.slow
  def test_runs_together_keep_so_elsewhere(self, mode, name, more):
    self.check_ends(mode, name, **more)

  def check_ends(self, mode, name, **more):
    config = make_config(
        mode, name, training__keep_weights=True, training__num_steps=9, **more
    )
    sweep.train(config, [{'seed': 0}, {'seed': 1}], self.tmp, progress=False)
    for seed in (0, 1):
      folder = f'default/seed={seed}'
      summary = json.loads((self.tmp / folder / 'summary.json').read_text())
      self.assertEqual(summary['runs_together'], 2)
      one = experiment.apply_overrides(config, {'seed': seed})
      finished = runs.load(self.tmp / folder)
      path = runs.replay(finished, experiment.make_program(one), 2)
      self.assertLess(path.error, 1e-5)

  @parameterized.parameters(
      (lambda task: None, 'return a Task'),
      (lambda task: task._replace(sampling='random'), "sampling='random'"),
      (lambda task: task._replace(batch=None), 'else batch'),
      (lambda task: task._replace(batch_size=5), 'task.batch_size=6'),
      (lambda task: task._replace(data={'test': task.data['test']}), "'train'"),
      (
          lambda task: task._replace(loss=lambda p, b, k: jnp.zeros(())),
          r'return \(scalar',
      ),
      (
          lambda task: task._replace(
              loss=lambda p, b, k: (jnp.zeros(()), {'a': jnp.zeros(3)})
          ),
          r'a of shape \(3,\)',
      ),
  )
  def test_what_a_task_is(self, broken, message):
    name = 'broken_task'
    module = type(sys)(name)
    module.make = lambda **kw: broken(make_task(**kw))
    sys.modules[name] = module
    try:
      config = make_config(task__name=f'{name}:make')
      with self.assertRaisesRegex(ValueError, message):
        arguments.make_task(config)
    finally:
      del sys.modules[name]

  @parameterized.parameters(
      ('nowhere:make', 'nowhere'),
      ('nowhere.py:make', 'nowhere.py'),
      (f'{__file__}:nothing', 'a function nothing'),
  )
  def test_where_a_task_is(self, name, message):
    with self.assertRaisesRegex(ValueError, message):
      arguments.make_task(make_config(task__name=name))

  def test_arguments_of_a_task(self):
    config = make_config()
    with config.unlocked():
      config.task.kwargs.sampling = 'never'
    with self.assertRaisesRegex(ValueError, "run, got.*sampling='never'.*line"):
      arguments.make_task(config)
    with self.assertRaisesRegex(ValueError, 'task.kwargs for a task'):
      arguments.make_task(make_config(task__name='digits'))

  def test_from_arrays(self):
    task = make_task(batch_size=6)
    self.assertEqual(task.num_samples, 22)
    np.testing.assert_array_equal(task.data['train']['index'], np.arange(22))
    with self.assertRaisesRegex(ValueError, 'init or weights'):
      task_lib.from_arrays('t', loss, train={'x': X}, batch_size=1)
    with self.assertRaisesRegex(ValueError, 'batch_size=23'):
      make_task(batch_size=23)
    with self.assertRaisesRegex(ValueError, 'leading axis'):
      task_lib.from_arrays(
          't', loss, init=init, train={'x': X, 'y': Y[:3]}, batch_size=1
      )


def test_weights_are_no_constants():
  """The compiled start of a run takes the weights as an argument."""
  weights = init(jax.random.key(0))
  task = task_lib.from_arrays(
      'rows', loss, weights=weights, train={'x': X, 'y': Y}, batch_size=6
  )
  config = make_config('gradient', 'full')
  method = experiment.make_method(config, task)
  lowered = jax.jit(functools.partial(programs.start, task, method)).lower(
      jax.random.key(0), task.weights
  )
  assert 'dense<"0x' not in lowered.as_text()
