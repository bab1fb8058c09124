"""The command `blora` as a user calls it, in this process."""

import contextlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import pytest

from bernoulli_lora_jax import cli
from bernoulli_lora_jax import flags_of_configs
from bernoulli_lora_jax.studies import predict
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import config_files
from bernoulli_lora_jax.training import reporting

_LAUNCH = pathlib.Path(__file__).parent.parent / 'launch'
_COMMANDS = (
    'bounds',
    'recommend',
    'audit',
    'rates',
    'nonsmooth',
    'ntk',
    'gap',
    'expressive',
)
_ONE = ['--shapes=4x8', '--rank=2', '--smoothness=2', '--initial_gap=3']


def call(*args):
  """Returns what `blora theory args` prints, errors and all."""
  return blora('theory', *args)


def blora(*args):
  """Returns what `blora args` prints, errors and all, and how it exits."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    x64 = jax.config.jax_enable_x64
    try:
      cli.main(args)
    except SystemExit as e:
      out.write(str(e))
    finally:
      jax.config.update('jax_enable_x64', x64)
  return out.getvalue()


class CommandTest(parameterized.TestCase):

  @parameterized.parameters('train', 'sweep')
  def test_help_lists_every_field_with_its_comment(self, command):
    text = blora(command, '--help')
    lines = text.splitlines()
    for name, value in checkpoint.flatten(
        base_config.get_config().to_dict()
    ).items():
      (line,) = [one for one in lines if f'--config.{name} ' in one]
      self.assertIn(str(value), line)
    self.assertRegex(text, r'method.rank +4 +Dimension of the subspaces')
    self.assertRegex(text, r'method.prob +0.5 +p = P\(left\)')
    self.assertIn('digits ', text)

  def test_help_of_a_config_shows_its_values(self):
    text = blora('train', '--config=digits:lora', '--help')
    self.assertRegex(text, r'method.name +lora ')
    self.assertIn('Variants, joined by commas', text)

  def test_overview(self):
    for args, status in (((), '2'), (('--help',), '0')):
      text = blora(*args)
      for command in ('train', 'sweep', 'report', 'audit', 'theory'):
        self.assertRegex(text, rf'(?m)^  {command} +\w')
      self.assertTrue(text.endswith(status))
    self.assertRegex(blora('--version'), r'^blora \d')
    self.assertIn("got 'tune'", blora('tune'))

  def test_a_command_alone_shows_its_help(self):
    text = blora('theory')
    self.assertRegex(text, '(?s)usage.*bounds.*expressive')
    self.assertTrue(text.endswith('2'))

  def test_an_unknown_field_is_named(self):
    text = blora(
        'train', '--config=quadratic', '--workdir=x', '--config.seeds=1'
    )
    self.assertRegex(text, r'^ValueError: Unknown config field: [^\\]*seeds')

  def test_a_config_is_a_name_or_a_path(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    mine = folder / 'mine.py'
    mine.write_text('raise RuntimeError("not\\n today")')
    for command in ('train', 'sweep'):
      text = blora(command, f'--config={mine}', f'--workdir={folder / "x"}')
      self.assertRegex(
          text, f'run, got RuntimeError: not today .*{mine}.*line 1'
      )
      text = blora(command, '--config=nothing', f'--workdir={folder / "x"}')
      self.assertRegex(
          text,
          'one of code_to_english, .*digits, .*quadratic, got'
          " config 'nothing'",
      )
    a, b = (
        flags_of_configs.parse([f'--config={name}:page', '--workdir=w']).config
        for name in ('digits', config_files.find('digits'))
    )
    self.assertEqual(a.to_dict(), b.to_dict())
    self.assertEqual(a.method.estimator, 'page')

  def test_verbosity_shows_the_traceback(self):
    wrong = ('report', '/nowhere')
    self.assertNotIn('Traceback', blora(*wrong))
    text = blora(*wrong, '--verbosity=1')
    self.assertIn('Traceback', text)
    self.assertIn('reporting.py', text)

  @pytest.mark.slow
  def test_a_wheel_is_enough(self):
    """Its command and its configs, from an empty folder."""
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    root, copy = _LAUNCH.parent, folder / 'source'
    shutil.copytree(
        root,
        copy,
        ignore=shutil.ignore_patterns('.*', 'build', '*.egg-info', 'runs'),
    )
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps']
    subprocess.run([*pip, f'--target={folder / "site"}', str(copy)], check=True)
    empty = folder / 'empty'
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, '-m', 'bernoulli_lora_jax', 'train']
        + ['--config=quadratic:smoke', '--workdir=run'],
        cwd=empty,
        env={**os.environ, 'PYTHONPATH': str(folder / 'site')},
        capture_output=True,
        text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertTrue((empty / 'run' / 'summary.json').exists())
    self.assertIn('Bernoulli-LoRA', done.stdout)


class ConsoleTest(parameterized.TestCase):

  @parameterized.parameters(*_COMMANDS)
  def test_help(self, command):
    text = call(command, '--help')
    self.assertIn('--figures', text)
    self.assertIn('usage:', text)
    self.assertTrue(text.endswith('0'), text[-80:])  # The exit status.

  def test_bounds(self):
    # T1: lambda = (2/4 + 2/8)/2 = 3/8, gamma = 1/2: 2 * 3 / (3/16 T) = 32/T.
    folder = self.enterContext(tempfile.TemporaryDirectory())
    text = call('bounds', *_ONE, '--steps=16,64', f'--figures={folder}')
    self.assertRegex(text, r'(?m)^ +16 +2$')
    self.assertRegex(text, r'(?m)^ +64 +0.5$')
    names = sorted(path.name for path in pathlib.Path(folder).iterdir())
    self.assertEqual(
        names,
        ['bounds_gd.png', 'bounds_spectrum_of_e_h.csv', 'bounds_t1.csv'],
    )

  def test_shapes_of_a_config(self):
    """The kernels of digits' network, 64 x 64, 64 x 64 and 64 x 5."""
    rest = ['--rank=2', '--smoothness=2', '--initial_gap=3', '--steps=10']
    file = _LAUNCH.parent / 'configs' / 'digits.py'
    texts = [
        call('bounds', shapes, *rest, '--figures=')
        for shapes in (
            f'--config={file}:bernoulli',
            '--shapes=64x64*2,64x5',
            '--shapes=64x64',
        )
    ]
    self.assertIn('T1', texts[0])
    self.assertEqual(texts[0], texts[1])
    self.assertNotEqual(texts[0], texts[2])

  def test_bounds_of_page_reads_q(self):
    args = ['--mean_smoothness=0', '--batch_size=1', '--initial_error=1']
    text = call(
        'bounds',
        '--estimator=page',
        *_ONE,
        *args,
        '--q=0.5',
        '--steps=16',
        '--figures=',
    )
    # Phi0 = 3 + gamma lmax V0 / (2 q) = 3 + 3/16.
    self.assertRegex(text, r'(?m)^ +16 +2.125$')

  def test_recommend(self):
    text = call('recommend', *_ONE, '--target=0.01', '--figures=')
    # p = 1: lambda = 1/2; 2 * 3 / (1/4 T) = 24/T.
    self.assertRegex(text, r'best +1 +0.5 +2,400 ')
    self.assertIn('the best p is an end', text)

  @parameterized.parameters(
      (['bounds', '--shapes=4x0', '--rank=1'], "Expected shapes .*'4x0'"),
      (
          [
              'bounds',
              '--shapes=4x4',
              '--rank=5',
              '--smoothness=1',
              '--initial_gap=1',
          ],
          'Expected rank <= 4.*rank=5',
      ),
      (['bounds', *_ONE, '--smoothness=-2'], 'smoothness > 0.*smoothness=-2'),
      (['bounds', *_ONE, '--steps=0,5'], r'steps >= 1, got steps=\[0, 5\]'),
      (['bounds', *_ONE, '--steps=1.5'], '--steps: Expected a whole number'),
      (['bounds', *_ONE, '--q=0.5'], 'q with page and marina alone, got q=0.5'),
      (
          ['bounds', '--estimator=page', *_ONE, '--q=2'],
          r'q in \(0, 1\], got q=2.0',
      ),
      (
          ['bounds', *_ONE, '--figures=/dev/null'],
          'Expected --figures to be a directory that can be written',
      ),
      (
          ['ntk', '--study=generalisation', '--ranks=1'],
          'no --ranks with --study=generalisation',
      ),
      (['ntk', '--lam=0.1,0.2'], 'Expected one --lam with --study=ranks'),
      (['bounds', *_ONE, '--stepsize=1'], 'stepsize <= 0.5.*2 times'),
      (['bounds', *_ONE, '--prob=1.5'], r'prob in \[0, 1\].*1.5'),
      (
          ['bounds', '--estimator=mvr', *_ONE],
          'Expected mean_smoothness, momentum, variance for mvr',
      ),
      (['bounds', *_ONE, '--noise=1'], 'constants of gd .*noise=1'),
      (['recommend', *_ONE, '--target=0'], 'target > 0'),
      (
          ['bounds', '--config=/nowhere.py', '--rank=2'],
          'Expected a Python file or one of.*nowhere',
      ),
      (['bounds', '--rank=2'], 'one of --shapes and --config'),
      (['audit', '/nowhere'], 'finished run with config.json'),
      (['rates', '--size=smoke', '--seeds=1'], 'seeds >= 2'),
      (['nothing'], "a subcommand of bounds, .*, got 'nothing'"),
      (['bounds', *_ONE, '--smoothness=x'], '--smoothness: could not convert'),
  )
  def test_refuses(self, args, message):
    self.assertRegex(call(*args), message)

  def test_shapes(self):
    self.assertEqual(
        predict.parse_shapes('64x32, 8x4*2'), [(64, 32), (8, 4), (8, 4)]
    )

  def test_tables_show_what_is_not_finite(self):
    rows = [{'a': float('inf'), 'b': float('nan'), 'c': 1234.0}]
    self.assertRegex(reporting.table(rows), r'inf +nan +1,234')


if __name__ == '__main__':
  absltest.main()
