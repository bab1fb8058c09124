"""launch/theory.py as a user calls it, in this process."""

import contextlib
import io
import pathlib
import runpy
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

from bernoulli_lora_jax.studies import predict
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
  """Returns what `launch/theory.py args` prints, errors and all."""
  script = runpy.run_path(str(_LAUNCH / 'theory.py'))
  out = io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    try:
      script['cli'].guarded(script['main'], ['theory.py', *args])
    except SystemExit as e:
      out.write(str(e))
  return out.getvalue()


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
      (['bounds', *_ONE, '--steps=1.5'], 'argument --steps: invalid list'),
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
          'argument --config: FileNotFoundError.*nowhere',
      ),
      (['bounds', '--rank=2'], 'one of the arguments --shapes --config'),
      (['audit', '/nowhere'], 'finished run with config.json'),
      (['rates', '--size=smoke', '--seeds=1'], 'seeds >= 2'),
      (['nothing'], 'invalid choice'),
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
