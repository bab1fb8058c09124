"""Bad input to the launch scripts: one line, no traceback, nothing written."""

import contextlib
import gzip
import io
import pathlib
import re
import shutil
import struct
import sys

from absl.testing import parameterized
import pytest

from bernoulli_lora_jax import cli
from bernoulli_lora_jax.tasks import mnist
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import fields

_ROOT = pathlib.Path(__file__).parent.parent
_PLAIN = """
from bernoulli_lora_jax.training import base_config

def get_config(variant=''):
  config = base_config.get_config()
  config.task.name = 'quadratic'
  config.task.pretrain_epochs = 1
  config.method.estimator = 'gd'
  config.method.rank = 1
  config.training.num_steps = 4
  config.training.num_evals = 2
  return config
"""


def launch(script, *args):
  """Returns (exit status, stderr) of a command, run in this process."""
  errors = io.StringIO()
  status = 0
  with contextlib.redirect_stderr(errors):
    with contextlib.redirect_stdout(io.StringIO()):
      try:
        cli.main([script, *map(str, args)])
      except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
        if not isinstance(e.code, int):
          print(e.code, file=sys.stderr)
  return status, errors.getvalue()


def contents(folder):
  """Returns {path: bytes} of all that is below a folder, links and all."""
  return {
      path: path.read_bytes() if path.is_file() else None
      for path in sorted(folder.rglob('*'))
  }


class InputsTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path
    self.config = tmp_path / 'config.py'
    self.config.write_text(_PLAIN)

  def check(self, script, *args):
    before = contents(self.tmp)
    status, errors = launch(script, *args)
    self.assertEqual(status, 1, errors)
    self.assertNotIn('Traceback', errors)
    self.assertLen(errors.splitlines(), 1, errors)
    self.assertEqual(contents(self.tmp).keys(), before.keys())
    self.assertEqual(contents(self.tmp), before)
    return errors

  def train(self, *args, config=None, workdir=None):
    config = self.config if config is None else config
    workdir = self.tmp / 'run' if workdir is None else workdir
    return self.check(
        'train', f'--config={config}', f'--workdir={workdir}', *args
    )

  # (field, value of the flag): of each field of base_config at least one.
  FIELDS = (
      ('seed', '-1'),
      ('seed', str(2**32)),
      ('seed', '1.5'),
      ('seed', 'one'),
      ('x64', 'maybe'),
      ('task.name', 'cifar'),
      ('task.batch_size', '0'),
      ('task.batch_size', '-3'),
      ('task.batch_size', '1e2'),
      ('task.param_dtype', 'float33'),
      ('task.hidden', '(0,)'),
      ('task.hidden', '(8,-1)'),
      ('task.hidden', '(8.5,)'),
      ('task.hidden', '(True,)'),
      ('task.hidden', "('a',)"),
      ('task.hidden', '(8'),
      ('task.dropout', '1.5'),
      ('task.dropout', '-0.1'),
      ('task.dropout', 'nan'),
      ('task.split_seed', '-1'),
      ('task.pretrain_epochs', '-1'),
      ('task.pretrain_learning_rate', '0'),
      ('task.pretrain_learning_rate', 'inf'),
      ('task.dim', '0'),
      ('task.num_rows', '0'),
      ('task.num_pretraining', '0'),
      ('task.num_samples', '-5'),
      ('method.mode', 'both'),
      ('method.name', 'dora'),
      ('method.estimator', 'svrg'),
      ('method.rank', '0'),
      ('method.rank', '4'),
      ('method.rank', str(2**40)),
      ('method.rank', 'four'),
      ('method.prob', '1.5'),
      ('method.prob', 'nan'),
      ('method.sketch', 'fourier'),
      ('method.sketch', 'weighted_coordinate:'),
      ('method.sketch', 'weighted_coordinate:x'),
      ('method.sketch', 'weighted_coordinate:-1'),
      ('method.period', '-1'),
      ('method.period', '0'),
      ('method.period_passes', '0'),
      ('method.period_passes', 'inf'),
      ('method.shared_coin', '2'),
      ('method.shared_frames', "('(',)"),
      ('method.select', '('),
      ('method.select', '*'),
      ('method.select', 'nothing'),
      ('method.train_others', 'perhaps'),
      ('method.others', '('),
      ('method.other_rows', '(-1,)'),
      ('method.optimizer', 'lion'),
      ('method.weight_decay', '-1'),
      ('method.optimizer_momentum', '1'),
      ('method.page_prob', '0'),
      ('method.mvr_momentum', '1'),
      ('method.learning_rate', '0'),
      ('method.learning_rate', '-0.1'),
      ('method.learning_rate', 'nan'),
      ('method.learning_rate', 'inf'),
      ('method.stepsize_factor', '-1'),
      ('method.schedule', 'step'),
      ('method.warmup_steps', '-1'),
      ('method.warmup_steps', '5'),
      ('method.clip_norm', '0'),
      ('method.alpha', '-1'),
      ('method.scaling', 'cube'),
      ('method.frame', 'skew'),
      ('method.init', 'zeros'),
      ('method.zero', 'both'),
      ('method.resample', 'sometimes'),
      ('method.reset_optimizer', 'x'),
      ('method.link_warmup', '-1'),
      ('method.rounding', 'up'),
      ('federated.num_clients', '-1'),
      ('federated.num_clients', '2'),
      ('federated.partition', 'all'),
      ('federated.dirichlet_alpha', '0'),
      ('federated.unequal', 'x'),
      ('federated.partition_seed', '-1'),
      ('federated.weights', 'equal'),
      ('federated.cohort', '0'),
      ('federated.compressor', 'zip'),
      ('federated.argument', '-1'),
      ('federated.concatenate', 'x'),
      ('federated.marina_prob', '2'),
      ('federated.start', 'warm'),
      ('training.num_steps', '-1'),
      ('training.num_steps', str(2**31)),
      ('training.num_passes', '-1'),
      ('training.num_full_passes', '0'),
      ('training.num_evals', '0'),
      ('training.eval_every', '-1'),
      ('training.checkpoint_every', '-1'),
      ('training.steps_per_dispatch', '0'),
      ('training.num_micro_batches', '0'),
      ('training.num_micro_batches', '2'),
      ('training.patience', '-1'),
      ('training.plateau_patience', '-1'),
      ('training.plateau_factor', '1'),
      ('training.eval_gradient', 'x'),
      ('training.recipe', 'x'),
      ('training.recipe', 'true'),
      ('training.recipe_of_steps', 'true'),
      ('training.keep_weights', 'x'),
      ('training.group_size', '-1'),
      ('training.step_together', 'maybe'),
      ('training.parallel', 'tpu'),
      ('training.num_devices', '0'),
      ('training.progress', 'x'),
      ('training.max_to_keep', '0'),
      ('task.chunk', '-1'),
      ('task.name', 'module:no function'),
      ('task.rnak', '1'),
      ('tsak.name', 'mnist'),
  )

  @parameterized.parameters(*FIELDS)
  def test_field(self, field, value):
    more = []
    if field == 'method.select' and value == 'nothing':
      more = ['--config.task.name=digits', '--config.task.hidden=(4,)']
    if field == 'training.num_micro_batches':
      more = ['--config.method.estimator=sgd', '--config.task.batch_size=3']
    if field == 'federated.num_clients' and value == '2':
      more = ['--config.task.batch_size=1']
    if field == 'federated.compressor':
      more = [
          '--config.federated.num_clients=1',
          '--config.method.estimator=qgd',
      ]
    if field == 'method.period' and value == '0':
      more = ['--config.method.name=bernoulli']
    errors = self.train(f'--config.{field}={value}', *more)
    section, _, name = field.rpartition('.')
    # An unknown section is named as such.
    self.assertIn(section if section == 'tsak' else name, errors)
    if 'Expected' in errors and name != 'rnak':
      self.assertRegex(errors, rf'Expected (config\.)?{section}\.?{name}\b')
      self.assertRegex(errors, rf"{name}=|got .*'{re.escape(value)}'")

  def test_every_field_is_there(self):
    known = checkpoint.flatten(base_config.get_config().to_dict())
    self.assertEqual(fields._RULES.keys(), known.keys())
    tried = {field for field, _ in self.FIELDS}
    self.assertEqual(known.keys() - tried, {'task.data_dir'})

  @parameterized.parameters(
      '',
      'def get_config(:\n',
      'x = 1\n',
      'import nowhere_at_all\n',
      'def get_config():\n  return 1 / 0\n',
      'def get_config():\n  return {}["a"]\n',
      'def get_config():\n  return [][1]\n',
      'def get_config():\n  return None\n',
      'def get_config():\n  return 3\n',
      _PLAIN + '\nraise RuntimeError("two\\nlines")\n',
      _PLAIN.replace("'gd'", '3'),
      _PLAIN.replace('.rank', '.rnak'),
      _PLAIN.replace(
          'return config', 'del config.method["rank"]\n  return config'
      ),
      'from ml_collections import config_dict\n'
      'def get_config():\n  return config_dict.ConfigDict()\n',
  )
  def test_config_file(self, text):
    self.config.write_text(text)
    self.train()

  @parameterized.parameters(
      '/nowhere/config.py',
      '',
      '.',
      'configs/digits.py:smokey',
      'configs/linear_regression.py:bernouli',
      'configs/mnist.py:smoke,nothing',
      'configs/equal.py:digits,mnist',
      'configs/federated.py:ef22',
  )
  def test_config_name(self, name):
    self.train(config=_ROOT / name if name.startswith('configs') else name)

  @parameterized.parameters(
      'file', 'file/below', '', 'a\0b', '/proc/here', 'x' * 300
  )
  def test_workdir(self, name):
    (self.tmp / 'file').write_text('mine')
    workdir = self.tmp / name if name and name[0] not in '/' else name
    self.train(workdir=workdir)

  @parameterized.parameters(
      ('config.json', '{'),
      ('config.json', '[]'),
      ('summary.json', ''),
      ('summary.json', '{}'),
  )
  def test_damaged_directory(self, name, text):
    (self.tmp / 'run').mkdir()
    (self.tmp / 'run' / name).write_text(text)
    self.assertIn(name, self.train())

  def test_argument_that_is_no_flag(self):
    self.train('extra')

  @parameterized.parameters(
      'missing', 'empty', 'cut', 'gz', 'gzip', 'crc', 'lengths', 'shape'
  )
  def test_data(self, kind):
    folder = self.tmp / 'data'
    folder.mkdir()
    shapes = ((6, 2, 2), (6,), (4, 2, 2), (4,))
    for name, shape in zip(mnist._FILES.values(), shapes, strict=True):
      self.write(folder / name, shape)
    first = folder / mnist._FILES['train_x']
    labels = folder / mnist._FILES['train_y']
    if kind == 'missing':
      shutil.rmtree(folder)
    elif kind == 'empty':
      first.write_bytes(b'')
    elif kind == 'cut':
      first.write_bytes(first.read_bytes()[:-1])
    elif kind == 'gz':
      first.with_name(first.name + '.gz').write_bytes(b'\x1f\x8bgarbage')
    elif kind == 'gzip':
      content = gzip.compress(first.read_bytes())
      first.with_name(first.name + '.gz').write_bytes(content[:-12])
    elif kind == 'crc':
      content = bytearray(gzip.compress(first.read_bytes()))
      content[12] ^= 255
      first.with_name(first.name + '.gz').write_bytes(bytes(content))
    elif kind == 'lengths':
      self.write(labels, (5,))
    elif kind == 'shape':
      self.write(first, (6,))
    errors = self.train(
        '--config.task.name=mnist', f'--config.task.data_dir={folder}'
    )
    self.assertIn(str(folder), errors)

  def write(self, path, shape):
    head = b'\0\0\x08' + bytes([len(shape)])
    size = 1
    for side in shape:
      head += struct.pack('>I', side)
      size *= side
    path.write_bytes(head + bytes(size))

  @parameterized.parameters(
      ('', 'sweep()'),
      ('def sweep():\n  return []\n', 'overrides'),
      ('def sweep():\n  return 3\n', 'overrides'),
      ('def sweep():\n  return [3]\n', 'overrides'),
      ('def sweep():\n  return 1 / 0\n', 'ZeroDivisionError'),
      ('def sweep(a, b):\n  return []\n', 'sweep'),
      ('def sweep():\n  return [{"seed": 1}, {"seed": 1}]\n', 'names'),
      ('def sweep():\n  return [{"method.rnak": 1}]\n', 'method.rnak'),
      ('def sweep():\n  return [{"method.rank": "x"}]\n', 'method.rank'),
      ('def sweep():\n  return [{"method.rank": 0}]\n', 'method.rank'),
      ('def sweep():\n  return [{"seed": 1}, {"seed": -1}]\n', 'seed'),
      ('def sweep():\n  return [{"task.data_dir": "/x"}]\n', 'data_dir'),
      ('def sweep():\n  return [{"task.data_dir": "../x"}]\n', 'data_dir'),
      ('def sweep():\n  return [{1: 2}]\n', '1'),
  )
  def test_sweep(self, text, message):
    self.config.write_text(_PLAIN + text)
    errors = self.check(
        'sweep', f'--config={self.config}', f'--workdir={self.tmp / "runs"}'
    )
    self.assertIn(message, errors)

  def test_flag_that_the_sweep_sets(self):
    self.config.write_text(_PLAIN + 'def sweep():\n  return [{"seed": 1}]\n')
    errors = self.check(
        'sweep',
        f'--config={self.config}',
        f'--workdir={self.tmp / "runs"}',
        '--config.seed=7',
    )
    self.assertIn('--config.seed', errors)

  @parameterized.parameters(
      ([], 'run directories'),
      (['nowhere'], 'nowhere'),
      (['.'], 'summary.json'),
      (['.', '--style=html'], 'style'),
      (['.', '--target=x'], 'target'),
  )
  def test_report(self, args, message):
    args = [a if a.startswith('-') else self.tmp / a for a in args]
    self.assertIn(message, self.check('report', *args))
