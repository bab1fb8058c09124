"""Tests of run directories: locks, damage, sweeps called again, reports."""

import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import time
from unittest import mock

from absl.testing import parameterized
import jax
import numpy as np
import pytest

from bernoulli_lora_jax import cli
from bernoulli_lora_jax import files
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import directory
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import sweep

_ROOT = pathlib.Path(__file__).parent.parent


def quadratic_config(**overrides):
  config = base_config.get_config()
  config.task.name = 'quadratic'
  config.method.estimator = 'gd'
  config.method.learning_rate = 0.01
  config.method.rank = 1
  config.training.num_steps = 12
  config.training.num_evals = 3
  config.training.checkpoint_every = 4
  config.training.max_to_keep = 3
  config.training.progress = False
  names = {k.replace('__', '.'): v for k, v in overrides.items()}
  return experiment.apply_overrides(config, names)


@pytest.fixture(scope='module', name='trained')
def _trained(tmp_path_factory):
  """A finished run and its program: tests copy the directory."""
  config = quadratic_config()
  program = experiment.make_program(config)
  folder = tmp_path_factory.mktemp('runs') / 'run'
  experiment.train(config, folder, program)
  return folder, config, program


def _hold(folder, ready, end):
  with directory.hold(folder):
    ready.set()
    end.wait()


class LockTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path / 'run'

  def write(self, age, **record):
    self.tmp.mkdir()
    path = self.tmp / '.lock'
    path.write_text(
        json.dumps(
            {'process': 1, 'host': 'elsewhere', 'start': 'then', **record}
        )
    )
    then = time.time() - age
    os.utime(path, (then, then))

  @pytest.mark.slow
  def test_a_second_process_is_refused_and_a_killed_one_lets_go(self):
    context = multiprocessing.get_context('spawn')
    ready, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(self.tmp, ready, end))
    process.start()
    self.assertTrue(ready.wait(60))
    for refused in (directory.check, lambda d: directory.hold(d).__enter__()):
      with self.assertRaisesRegex(
          ValueError, f'no other process in .*process {process.pid} on .*remove'
      ):
        refused(self.tmp)
    process.kill()
    process.join()
    self.assertTrue((self.tmp / '.lock').exists())
    with directory.hold(self.tmp):
      record = json.loads((self.tmp / '.lock').read_text())
      self.assertEqual(record['process'], os.getpid())
    self.assertEqual(list(self.tmp.iterdir()), [])

  def test_threads_exclude_each_other_too(self):
    with directory.hold(self.tmp):
      with self.assertRaisesRegex(ValueError, 'no other process'):
        directory.check(self.tmp)
    directory.check(self.tmp)

  @parameterized.parameters(
      (dict(age=1), True),
      (dict(age=2 * directory.STALE), False),
      (dict(age=1, host=directory.socket.gethostname()), False),  # Killed.
  )
  def test_of_another_host_by_its_age(self, lock, is_held):
    self.write(**lock)
    if is_held:
      with self.assertRaisesRegex(ValueError, 'process 1 on elsewhere since'):
        directory.check(self.tmp)
    else:
      with directory.hold(self.tmp):
        pass

  @parameterized.parameters(
      (dict(age=1e6, process=os.getpid()), True),
      (dict(age=1, process=2**30), False),
      (dict(age=1, process='x'), False),
  )
  def test_without_locks_by_the_process(self, lock, is_held):
    self.write(host=directory.socket.gethostname(), **lock)

    def flock(*unused):
      raise OSError(37, 'No locks available')

    original, directory.fcntl.flock = directory.fcntl.flock, flock
    try:
      if is_held:
        with self.assertRaisesRegex(ValueError, 'no other process'):
          directory.check(self.tmp)
      else:
        with directory.hold(self.tmp):
          pass
    finally:
      directory.fcntl.flock = original

  @parameterized.parameters('', '{', '[1]', '"x"')
  def test_a_torn_lock_is_taken_over(self, text):
    self.tmp.mkdir()
    (self.tmp / '.lock').write_text(text)
    with directory.hold(self.tmp):
      pass

  def test_check_leaves_nothing(self):
    directory.check(self.tmp / 'a' / 'b')
    self.assertFalse(self.tmp.exists())

  def test_training_and_sweeps_are_refused(self):
    config = quadratic_config()
    with directory.hold(self.tmp):
      with self.assertRaisesRegex(ValueError, 'no other process'):
        experiment.check_workdir(config, self.tmp)
    with directory.hold(self.tmp / 'default' / 'seed=1'):
      with self.assertRaisesRegex(ValueError, 'no other process'):
        sweep.train(
            config, [{'seed': 0}, {'seed': 1}], self.tmp, progress=False
        )
    self.assertEqual(list(self.tmp.rglob('summary.json')), [])


def _cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(bytes(content))


def _largest(folder):
  return max(
      (p for p in folder.rglob('*') if p.is_file()),
      key=lambda p: p.stat().st_size,
  )


def _each(damage):
  def all_files(folder):
    for path in folder.rglob('*'):
      if path.is_file() and path.name != 'digest.json':
        damage(path)

  return all_files


def _empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def _as_file(folder):
  shutil.rmtree(folder)
  folder.write_text('')


DAMAGE = {
    'one bit': lambda folder: _flip(_largest(folder)),
    'one file cut': lambda folder: _cut(_largest(folder)),
    'one file lost': lambda folder: _largest(folder).unlink(),
    'all cut': _each(_cut),
    'all garbage': _each(lambda path: path.write_bytes(b'garbage')),
    'all lost': _each(pathlib.Path.unlink),
    'arrays lost': lambda folder: shutil.rmtree(folder / 'default'),
    'empty': _empty,
    'a file': _as_file,
    'digest cut': lambda folder: _cut(folder / 'digest.json'),
    'older, all cut': lambda folder: (
        (folder / 'digest.json').unlink(),
        _each(_cut)(folder),
    ),
}


class DamageTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _run(self, tmp_path, trained):
    self.source, self.config, self.program = trained
    self.folder = tmp_path / 'run'
    shutil.copytree(self.source, self.folder)
    (self.folder / 'summary.json').unlink()

  def train(self):
    return experiment.train(self.config, self.folder, self.program)

  @parameterized.parameters(*DAMAGE)
  def test_the_one_before_is_taken(self, kind):
    folder = self.folder / 'checkpoints'
    DAMAGE[kind](folder / '12')
    with self.assertLogs(level='WARNING') as logs:
      self.train()
    (line,) = [line for line in logs.output if 'whole checkpoint' in line]
    self.assertRegex(line, 'whole checkpoint in .* at step 12, got .*step 8')
    summary = lambda run: {
        name: value
        for name, value in json.loads(
            (run / 'summary.json').read_text()
        ).items()
        if name != 'seconds'
    }
    self.assertEqual(summary(self.folder), summary(self.source))
    lines = lambda run: (run / 'metrics.jsonl').read_text()
    self.assertEqual(lines(self.folder), lines(self.source))
    self.assertFalse(list(folder.glob('*damaged*')))
    with checkpoint.Checkpointer(self.folder) as saver:
      self.assertEqual(saver.latest(), 12)

  @parameterized.parameters('one bit', 'empty', 'older, all cut')
  def test_none_is_whole(self, kind):
    for step in (4, 8, 12):
      DAMAGE[kind](self.folder / 'checkpoints' / str(step))
    before = (self.folder / 'metrics.jsonl').read_text()
    with self.assertRaisesRegex(ValueError, 'step 4, got .*start anew'):
      self.train()
    self.assertEqual((self.folder / 'metrics.jsonl').read_text(), before)
    self.assertFalse((self.folder / 'summary.json').exists())

  @parameterized.parameters('', '{', '[]', '{}', '\x00', '{"step": ')
  def test_a_damaged_summary_is_named(self, text):
    (self.folder / 'summary.json').write_text(text)
    with self.assertRaisesRegex(ValueError, 'summary.json'):
      self.train()

  @parameterized.parameters('', '{', '[]', '{"seed"')
  def test_a_damaged_config_is_named(self, text):
    (self.folder / 'config.json').write_text(text)
    with self.assertRaisesRegex(ValueError, 'config.json'):
      self.train()


class LengthTest(parameterized.TestCase):
  """More and fewer steps than a directory has."""

  @pytest.fixture(autouse=True)
  def _run(self, tmp_path, trained):
    self.folder = tmp_path / 'run'
    shutil.copytree(trained[0], self.folder)

  @parameterized.parameters(
      dict(method__schedule='cosine'),
      dict(training__patience=2),
      dict(training__plateau_patience=2),
  )
  def test_more_steps_are_refused_where_something_depends_on_them(
      self, **bound
  ):
    record = lambda **more: quadratic_config(**bound, **more).to_dict()
    files.write_json(self.folder / 'config.json', record())
    for longer in (
        dict(training__num_steps=16),
        dict(training__num_steps=0, training__num_passes=16.0),
    ):
      with self.assertRaisesRegex(
          ValueError, f'training.num_.*{next(iter(bound)).split("__")[1]}'
      ):
        checkpoint.compare_config(self.folder, record(**longer))
    # Not read beside num_steps.
    checkpoint.compare_config(self.folder, record(training__num_passes=3.0))

  def test_fewer_steps_are_refused(self):
    config = quadratic_config(training__num_steps=8)
    program = experiment.make_program(config)
    for _ in range(2):  # By the summary, by the checkpoint.
      with self.assertRaisesRegex(ValueError, 'training.num_steps >= 12'):
        experiment.train(config, self.folder, program)
      (self.folder / 'summary.json').unlink(missing_ok=True)


class AgainTest(parameterized.TestCase):
  """A sweep called a second time."""

  @pytest.fixture(autouse=True)
  def _run(self, tmp_path, trained):
    self.tmp = tmp_path
    self.folder = tmp_path / 'default' / 'seed=0'
    shutil.copytree(trained[0], self.folder)

  @parameterized.parameters(
      dict(method__rank=2),
      dict(training__num_steps=24),
      dict(training__num_micro_batches=2),
      dict(x64=True),
  )
  def test_another_config_is_refused(self, **overrides):
    before = (self.folder / 'config.json').read_text()
    with self.assertRaisesRegex(
        ValueError, f'{next(iter(overrides)).split("__")[-1]}.*seed=0'
    ):
      sweep.train(
          quadratic_config(**overrides), [{'seed': 0}], self.tmp, progress=False
      )
    self.assertEqual((self.folder / 'config.json').read_text(), before)

  def test_the_same_is_skipped(self):
    sweep.train(quadratic_config(), [{'seed': 0}], self.tmp, progress=False)

  @parameterized.parameters('a/b', '../x', '/tmp/x', '..', 'a\nb', 'a\0')
  def test_names_stay_in_the_folder(self, value):
    if value == '..':  # A part of a name only: `data_dir=..`.
      self.assertEqual(sweep.run_name({'task.data_dir': value}), 'data_dir=..')
      return
    with self.assertRaisesRegex(ValueError, 'task.data_dir='):
      sweep.run_name({'task.data_dir': value})

  def test_flags_that_would_be_overwritten_are_refused(self):
    grid = [{'method.rank': 2}, {'method.rank': 2, 'seed': 1}]
    sweep.check_flags(grid, ['method.prob'])
    for field in ('seed', 'method.rank'):
      with self.assertRaisesRegex(ValueError, f'no flag --config.{field},'):
        sweep.check_flags(grid, ['method.prob', field])


# A value that differs from the default, for each field of a config.
def _other(value):
  if isinstance(value, bool):
    return not value
  if isinstance(value, tuple):
    return (*value, 3)
  if isinstance(value, str):
    return value + 'x'
  return (value or 0) + 1


_FIELDS = [
    field
    for field in checkpoint.flatten(base_config.get_config().to_dict())
    if not field.startswith('federated.')
]
_SAME = (
    'seed',
    'task.data_dir',
    'method.prob',  # Not read by full fine-tuning.
    'method.learning_rate',  # Chosen by validation.
    'training.progress',
    'training.keep_weights',
    'training.max_to_keep',
    'training.group_size',
    'training.step_together',
)


class ReportTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  def write(self, name, fields=None, last=2, **summary):
    path = self.tmp / name
    path.mkdir(parents=True)
    record = base_config.get_config().to_dict()
    record['method']['name'] = 'full'
    for field, value in (fields or {}).items():
      section, _, leaf = field.rpartition('.')
      (record[section] if section else record)[leaf] = value
    files.write_json(path / 'config.json', record)
    files.write_json(
        path / 'summary.json',
        {
            'step': 2,
            'train_loss': 1.0,
            'trained_parameters': 4.0,
            'seconds': 1.0,
            **summary,
        },
    )
    lines = [
        json.dumps({'step': s, 'train_loss': 1.0}) for s in range(last + 1)
    ]
    (path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
    return path

  @parameterized.parameters(*_FIELDS)
  def test_what_differs_is_a_row_of_its_own(self, field):
    default = checkpoint.flatten(base_config.get_config().to_dict())[field]
    self.write('a', {field: default if field != 'method.name' else 'full'})
    other = {
        'method.name': 'rac_left',
        'method.optimizer': 'adam',
        'method.mode': 'adapter',
    }.get(field, _other(default))
    self.write('b', {field: other})
    rows = reporting.statistics(reporting.load_runs([self.tmp]))
    self.assertLen(rows, 1 if field in _SAME else 2)
    if field == 'method.learning_rate':
      return
    count = sum(int(row['runs']) for row in rows)
    self.assertEqual(count, 2)

  def test_a_field_that_an_older_run_lacks_is_its_default(self):
    path = self.write('a') / 'config.json'
    record = json.loads(path.read_text())
    del record['task']['param_dtype'], record['x64']
    path.write_text(json.dumps(record))
    self.write('b', {'seed': 1})
    self.assertLen(reporting.statistics(reporting.load_runs([self.tmp])), 1)

  def test_a_run_counts_once(self):
    self.write('in/a')
    link = self.tmp / 'link'
    link.symlink_to(self.tmp / 'in', target_is_directory=True)
    (self.tmp / 'in' / 'loop').symlink_to(self.tmp, target_is_directory=True)
    names = ('', 'in', 'in/a', 'in/../in', 'in/a/../a', 'link', 'link/a')
    runs = reporting.load_runs([self.tmp / name for name in names])
    self.assertLen(runs, 1)
    self.assertLen(reporting.load_runs([link]), 1)

  def test_footer(self):
    self.write('a')
    path = self.write('b') / 'summary.json'
    path.write_text('{"diverged": "at step 1", "seconds": 1.0}')
    (self.write('c') / 'summary.json').unlink()
    runs = reporting.load_runs([self.tmp])
    left = reporting.unfinished([self.tmp, self.tmp / 'c'])
    self.assertEqual(
        reporting.footer(runs, left),
        f'2 finished runs, 1 of them diverged; 1 unfinished, as {self.tmp}/c.',
    )

  @parameterized.parameters(
      ('metrics.jsonl', '{"step": 0}\n', 'up to step 2 .*got step=0'),
      ('metrics.jsonl', '', 'up to step 2 .*got step=None'),
      ('metrics.jsonl', '{"step": 0}\n{"st', 'metrics.jsonl, line 2'),
      ('metrics.jsonl', '[1]\n', 'metrics.jsonl, line 1'),
      ('metrics.jsonl', '{"step": 2}\n{"step": 2}\n', 'steps that grow'),
      ('metrics.jsonl', None, 'metrics.jsonl beside summary.json'),
      ('summary.json', '', 'JSON in .*summary.json'),
      ('summary.json', '{"step": 2}', 'train_loss in .*summary.json'),
      ('summary.json', '[]', 'mapping in .*summary.json'),
      ('config.json', '{', 'JSON in .*config.json'),
      ('config.json', '{}', 'section task in .*config.json'),
      ('config.json', None, 'config.json beside summary.json'),
      ('config.json', b'\xff\xfe', 'config.json'),
  )
  def test_damaged_files_are_named(self, name, content, message):
    path = self.write('a') / name
    path.unlink()
    if isinstance(content, bytes):
      path.write_bytes(content)
    elif content is not None:
      path.write_text(content)
    with self.assertRaisesRegex(ValueError, message):
      reporting.statistics(reporting.load_runs([self.tmp]))


class ResumeTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  @pytest.mark.slow
  def test_seconds_hold_no_compilation(self):
    """A resumed run has compiled its evaluation before the clock starts."""
    config = quadratic_config()
    num_next, evaluate = loop._num_next, programs.Program.evaluate
    cut = lambda program, progress: (
        num_next(program, progress) if progress.step < 8 else self.fail('cut')
    )
    with mock.patch.object(loop, '_num_next', cut):
      with self.assertRaisesRegex(AssertionError, 'cut'):
        experiment.train(config, self.tmp)
    calls = []

    def slow(program, params):
      time.sleep(0.0 if calls else 1.0)  # As the first one compiles.
      calls.append(1)
      return evaluate(program, params)

    with mock.patch.object(programs.Program, 'evaluate', slow):
      summary = experiment.train(config, self.tmp)
    self.assertLess(summary['seconds'], 1.0)
    self.assertEqual(summary['step'], 12)

  def test_keys_of_a_run_have_one_purpose_each(self):
    seen = []
    key = jax.random.key(0)
    task = experiment.make_program(quadratic_config()).task
    init = lambda key: seen.append(key) or task.init(key)
    programs.init_params(task._replace(init=init), key)
    keys = [*seen, programs.method_key(key), programs.noise_key(key, 0)]
    keys += [jax.random.fold_in(key, purpose) for purpose in (1, 2)]
    data = {tuple(np.asarray(jax.random.key_data(k))) for k in keys}
    self.assertLen(data, len(keys))

  @pytest.mark.slow
  def test_kills(self):
    result = subprocess.run(
        [sys.executable, _ROOT / 'tests' / 'kill_runs.py', '--kills=6'],
        capture_output=True,
        text=True,
        timeout=600,
    )
    self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
    self.assertIn('0 faults', result.stdout)


class InterruptTest(parameterized.TestCase):

  def test_from_within_a_compilation(self):
    """jax turns an interrupt of its callbacks into an error of its own."""
    message = (
        'Exception raised in callback: Traceback\n  ...\nKeyboardInterrupt: '
    )
    with self.assertRaises(SystemExit) as caught, cli.guarded(['']):
      raise RuntimeError(message)
    self.assertEqual(caught.exception.code, 130)
    with self.assertRaisesRegex(RuntimeError, 'something else'):
      with cli.guarded(['']):
        raise RuntimeError('something else')
