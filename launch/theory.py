r"""The theory console: predict, measure, compare.

  python launch/theory.py bounds --shapes=64x64 --rank=2 --smoothness=3 \
      --initial_gap=1 --steps=100,1000,10000
  python launch/theory.py recommend --shapes=64x128,128x32 --rank=2 \
      --smoothness=3 --initial_gap=1 --target=1e-3
  python launch/theory.py audit runs/gd
  python launch/theory.py rates --size=small     # X1: the papers' regression
  python launch/theory.py nonsmooth              # T8 on l1 regression
  python launch/theory.py ntk --task=digits
  python launch/theory.py gap --task=teacher
  python launch/theory.py expressive

Each prints its tables and what they say, and writes figures and CSV files to
--figures. `python launch/theory.py SUBCOMMAND --help` lists the options.
"""

import argparse
from collections.abc import Callable, Sequence
import runpy
import sys
from typing import Any

import jax

from bernoulli_lora_jax import matrices
from bernoulli_lora_jax.studies import audit
from bernoulli_lora_jax.studies import expressive
from bernoulli_lora_jax.studies import gap
from bernoulli_lora_jax.studies import nonsmooth
from bernoulli_lora_jax.studies import ntk_generalisation
from bernoulli_lora_jax.studies import ntk_linearisation
from bernoulli_lora_jax.studies import ntk_ranks
from bernoulli_lora_jax.studies import predict
from bernoulli_lora_jax.studies import rates
from bernoulli_lora_jax.studies import regression
from bernoulli_lora_jax.studies import study
from bernoulli_lora_jax.theory import bounds
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import cli

# name: (type, help); of bounds and recommend.
_CONSTANTS: dict[str, tuple[Any, str]] = {
    'initial_gap': (float, 'D0 = f(W_0) - f_inf'),
    'smoothness': (float, 'L of f'),
    'mean_smoothness': (
        float,
        'Lbar: of examples (page), of minibatches (mvr)',
    ),
    'pl': (float, 'mu; gives the bound of the gap in place of the gradient'),
    'noise': (float, 'C of E||g||^2 <= 2 A gap + B ||grad||^2 + C (sgd)'),
    'growth': (float, 'B (sgd); None: 1'),
    'slope': (float, 'A (sgd); None: 0'),
    'variance': (float, 'sigma^2 of a minibatch gradient (mvr)'),
    'initial_error': (float, 'V0 of the first estimate; None: 0'),
    'q': (float, 'probability of a full gradient (page, marina)'),
    'momentum': (float, '1 - b (mvr)'),
    'batch_size': (int, "b' (page)"),
    'num_samples': (int, 'N, for minibatches without replacement (page)'),
    'omega': (float, 'of the compressor (qgd, marina)'),
    'beta': (float, 'of the compressor (ef21)'),
    'client_gap': (float, 'f_inf - sum_l w_l f_l_inf (qgd)'),
    'distance': (float, 'R0 (nonsmooth, polyak)'),
    'lipschitz': (float, 'L0 (nonsmooth, polyak)'),
}


def _whole(text: str) -> int:
  """Returns a whole number, also where it is written as 1e4."""
  value = float(text)
  if not value.is_integer():
    raise ValueError(text)
  return int(value)


_whole.__name__ = 'whole number'  # In argparse's messages.


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
  def parse(text: str) -> list[Any]:
    return [kind(part) for part in text.split(',')]

  parse.__name__ = f'list with commas, each a {kind.__name__}'  # In messages.
  return parse


def _shapes(text: str) -> list[tuple[int, int]]:
  try:
    return predict.parse_shapes(text)
  except ValueError as e:
    raise argparse.ArgumentTypeError(str(e)) from e


def _shapes_of_config(text: str) -> list[tuple[int, int]]:
  """Returns the shapes of the matrices that a config's method adapts."""
  file, _, variant = text.partition(':')
  try:
    config = runpy.run_path(file)['get_config'](variant)
    task = arguments.make_task(config)
    params = jax.eval_shape(task.init, jax.random.key(0))
    found = matrices.find(params, arguments.make_matrices(config, task))
  except (OSError, KeyError, ValueError) as e:
    raise argparse.ArgumentTypeError(f'{type(e).__name__}: {e}') from e
  return [(one.m, one.n) for one in found for _ in range(one.entries.size)]


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
  )
  commands = parser.add_subparsers(
      dest='command', metavar='SUBCOMMAND', required=True
  )
  add_bounds(commands)
  add_recommend(commands)
  add_audit(commands)
  add_rates(commands)
  add_nonsmooth(commands)
  add_ntk(commands)
  add_gap(commands)
  add_expressive(commands)
  return parser


def _command(
    commands: Any, name: str, run: Callable[..., study.Study], text: str
) -> argparse.ArgumentParser:
  """Adds a subcommand with what all have."""
  parser = commands.add_parser(
      name,
      help=text,
      description=text[0].upper() + text[1:] + '.',
      formatter_class=argparse.ArgumentDefaultsHelpFormatter,
      allow_abbrev=False,
  )
  parser.add_argument(
      '--figures', default='figures', help="directory of the files; '' for none"
  )
  parser.add_argument(
      '--style',
      default='simple',
      choices=['simple', 'github', 'tsv'],
      help='of the tables',
  )
  parser.set_defaults(run=run)
  return parser


def _add_matrices(parser: argparse.ArgumentParser) -> None:
  group = parser.add_mutually_exclusive_group(required=True)
  group.add_argument(
      '--shapes',
      type=_shapes,
      help='of the trained matrices as stored, m x n: 64x64,128x32*12',
  )
  group.add_argument(
      '--config',
      dest='shapes',
      type=_shapes_of_config,
      metavar='FILE[:VARIANT]',
      help='those of the model of a config, as configs/mnist.py',
  )
  parser.add_argument('--rank', type=_whole, required=True, help='r')
  parser.add_argument(
      '--sketch', default='gaussian', help='law of the subspaces'
  )
  parser.add_argument(
      '--others_trained',
      action='store_true',
      help='whether other leaves are trained in full (lambda = 1)',
  )
  for name, (kind, text) in _CONSTANTS.items():
    parser.add_argument(f'--{name}', type=kind, default=None, help=text)
  parser.add_argument(
      '--client_smoothness',
      type=_numbers(float),
      default=None,
      help='L_l of each client, with commas (qgd, marina, ef21)',
  )
  parser.add_argument(
      '--weights',
      type=_numbers(float),
      default=None,
      help='w_l of each client, with commas; None: equal (qgd, marina, ef21)',
  )
  parser.add_argument(
      '--bounded_variance',
      action='store_const',
      const=True,
      help='A, B - 1 and C bound E||g - grad||^2, which allows longer steps (sgd)',
  )
  parser.add_argument(
      '--least',
      action='store_const',
      const=True,
      help='bound min_t in place of the mean (sgd, qgd)',
  )


def _constants(args: argparse.Namespace) -> dict[str, Any]:
  names = [
      *_CONSTANTS,
      'client_smoothness',
      'weights',
      'bounded_variance',
      'least',
  ]
  given = {name: getattr(args, name) for name in names}
  return {name: value for name, value in given.items() if value is not None}


def add_bounds(commands: Any) -> None:
  def run(args):
    return predict.predict(
        args.shapes,
        estimator=args.estimator,
        rank=args.rank,
        prob=args.prob,
        num_steps=args.steps,
        stepsize=args.stepsize,
        sketch=args.sketch,
        all_trained=not args.others_trained,
        **_constants(args),
    )

  parser = _command(commands, 'bounds', run, 'the bound of a method over T')
  parser.add_argument('--estimator', default='gd', choices=predict.ESTIMATORS)
  parser.add_argument('--prob', type=float, default=0.5, help='p = P(left)')
  parser.add_argument(
      '--steps',
      type=_numbers(_whole),
      default=[10, 100, 1000, 10000, 100000],
      help='T, with commas',
  )
  parser.add_argument(
      '--stepsize',
      type=float,
      default=None,
      help='gamma; None: the largest allowed for the most steps',
  )
  _add_matrices(parser)


def add_recommend(commands: Any) -> None:
  def run(args):
    return predict.recommend(
        args.shapes,
        estimator=args.estimator,
        rank=args.rank,
        target=args.target,
        sketch=args.sketch,
        all_trained=not args.others_trained,
        **_constants(args),
    )

  parser = _command(
      commands, 'recommend', run, 'p, stepsize and steps that reach a target'
  )
  parser.add_argument(
      '--estimator', default='gd', choices=tuple(bounds.METHODS)
  )
  parser.add_argument(
      '--target',
      type=float,
      required=True,
      help='mean squared gradient norm; the gap with --pl',
  )
  _add_matrices(parser)


def add_audit(commands: Any) -> None:
  def run(args):
    return audit.audit(
        args.run_dir,
        num_points=args.points,
        num_products=args.products,
        num_batches=args.batches,
    )

  parser = _command(
      commands,
      'audit',
      run,
      'constants, assumptions and bound of a finished run',
  )
  parser.add_argument('run_dir', help='--workdir of a launch/train.py')
  parser.add_argument(
      '--points', type=_whole, default=8, help='of the path, for the constants'
  )
  parser.add_argument(
      '--products', type=_whole, default=12, help='Hessian products a point'
  )
  parser.add_argument(
      '--batches', type=_whole, default=32, help='minibatches a point'
  )


def add_rates(commands: Any) -> None:
  def run(args):
    return rates.rates(
        args.size,
        num_passes=args.passes,
        num_seeds=args.seeds,
        rank=args.rank,
        claims=args.claims,
        numpy_runs=args.numpy,
        factors=args.factors,
    )

  parser = _command(
      commands,
      'rates',
      run,
      "X1, the papers' linear regression, claim by claim",
  )
  parser.add_argument(
      '--size',
      default='small',
      choices=tuple(regression.SIZES),
      help='paper: d = 4096; small: d = 256',
  )
  parser.add_argument('--passes', type=float, default=60.0, help='data passes')
  parser.add_argument('--seeds', type=_whole, default=5)
  parser.add_argument('--rank', type=_whole, default=2)
  parser.add_argument(
      '--claims',
      type=lambda text: [part for part in text.split(',') if part],
      default=list(rates.CLAIMS),
      help="figures of GD alone, with commas; '' for none",
  )
  parser.add_argument(
      '--factors',
      type=_numbers(float),
      default=list(rates.FACTORS),
      help='stepsizes times L, with commas',
  )
  parser.add_argument(
      '--numpy',
      type=int,
      nargs='?',
      const=sys.maxsize,
      default=0,
      metavar='RUNS',
      help='time the same work as a plain NumPy loop: all runs, or RUNS of each'
      ' program and the others by proportion',
  )


def add_nonsmooth(commands: Any) -> None:
  def run(args):
    return nonsmooth.gaps(
        shape=args.shape[0],
        num_samples=args.num_samples,
        rank=args.rank,
        prob=args.prob,
        ratio=args.ratio,
        num_steps=args.steps,
        num_seeds=args.seeds,
        progress=True,
    )

  parser = _command(
      commands, 'nonsmooth', run, 'T8 on l1 regression: gaps against bounds'
  )
  parser.add_argument('--seeds', type=_whole, default=16)
  parser.add_argument(
      '--shape', type=_shapes, default=[(8, 6)], help='of W, m x n'
  )
  parser.add_argument(
      '--num_samples', type=_whole, default=200, help='N of the regression'
  )
  parser.add_argument('--rank', type=_whole, default=2, help='r')
  parser.add_argument(
      '--prob', type=float, default=0.5, help='p = P(left) of Bernoulli-LoRA'
  )
  parser.add_argument(
      '--ratio',
      type=float,
      default=8.0,
      help='of the weights of the coordinate sketch, its kappa if unclipped',
  )
  parser.add_argument('--steps', type=_whole, default=2000, help='T')


def _make_task(name: str, data_dir: str) -> Any:
  config = base_config.get_config()
  config.task.name = name
  config.task.data_dir = data_dir
  return arguments.make_task(config)


def _add_task(
    parser: argparse.ArgumentParser, names: Sequence[str], default: str
) -> None:
  parser.add_argument('--task', default=default, choices=names)
  parser.add_argument(
      '--data_dir',
      default='',
      help="folder of MNIST; '': $BERNOULLI_LORA_DATA",
  )


def _single(args: argparse.Namespace, flag: str) -> Any:
  """Returns the one value of a flag that takes several, None for none."""
  values = getattr(args, flag)
  if values is not None and len(values) != 1:
    raise ValueError(
        f'Expected one --{flag} with --study={args.study}, got {values}.'
    )
  return values and values[0]


def add_ntk(commands: Any) -> None:
  studies = {
      'ranks': ntk_ranks.ranks,
      'linearisation': ntk_linearisation.linearisation,
      'generalisation': ntk_generalisation.generalisation,
  }

  def run(args):
    if args.study == 'generalisation':
      for flag in ('ranks', 'steps'):
        value = getattr(args, flag)
        if value is not None:
          raise ValueError(
              f'Expected no --{flag} with --study=generalisation, got {value}.'
          )
      options = {
          'sizes': args.num_samples,
          'relative_lams': args.lam,
          'num_draws': args.seeds,
      }
    else:
      options = {
          'num_samples': _single(args, 'num_samples'),
          'relative_lam': _single(args, 'lam'),
          'ranks': args.ranks,
          'num_seeds': args.seeds,
          'num_steps': args.steps,
      }
    options['select'] = args.select
    given = {name: x for name, x in options.items() if x is not None}
    return studies[args.study](_make_task(args.task, args.data_dir), **given)

  parser = _command(
      commands, 'ntk', run, 'LoRA in the NTK regime, few-shot (N1-N7)'
  )
  parser.add_argument(
      '--study',
      default='ranks',
      choices=tuple(studies),
      help='loss against steps by rank; how far the linearisation holds; N7',
  )
  _add_task(parser, ('digits', 'mnist'), 'digits')
  parser.add_argument(
      '--num_samples',
      type=_numbers(_whole),
      default=None,
      help='N, balanced over classes; several, with commas, for generalisation.'
      " None: the study's own, like the others",
  )
  parser.add_argument(
      '--ranks', type=_numbers(_whole), default=None, help='with commas'
  )
  parser.add_argument(
      '--seeds',
      type=_whole,
      default=None,
      help='starts of a rank; draws of examples for generalisation',
  )
  parser.add_argument(
      '--lam',
      type=_numbers(float),
      default=None,
      help='weight decay over the one from which on zero is optimal, in (0, 1);'
      ' several for generalisation',
  )
  parser.add_argument(
      '--steps', type=_whole, default=None, help='of gradient descent'
  )
  parser.add_argument(
      '--select',
      default=None,
      help="regular expression of the matrices, as 'Dense_[01]/kernel'",
  )


def add_gap(commands: Any) -> None:
  def run(args):
    changed: dict[str, Any] = {
        'ranks': args.ranks and tuple(args.ranks),
        'sizes': args.sizes and tuple(args.sizes),
        'num_draws': args.draws,
    }
    changed = {name: x for name, x in changed.items() if x is not None}
    task = None
    if args.task != 'teacher':
      task = _make_task(args.task, args.data_dir)
    return gap.gap(
        task,
        teacher=gap.TEACHER._replace(**changed),
        on_task=gap.TASK._replace(**changed),
        prob=args.prob,
        seed=args.seed,
    )

  parser = _command(
      commands, 'gap', run, 'generalisation gap over ranks and sample sizes'
  )
  _add_task(parser, ('teacher', 'mnist', 'digits'), 'teacher')
  text = 'with commas; None: as in studies/gap.py'
  parser.add_argument(
      '--ranks', type=_numbers(_whole), default=None, help=f'r, {text}'
  )
  parser.add_argument(
      '--sizes', type=_numbers(_whole), default=None, help=f'N, {text}'
  )
  parser.add_argument(
      '--draws', type=_whole, default=None, help='of frozen factors and samples'
  )
  parser.add_argument(
      '--prob', type=float, default=0.5, help='p = P(left) of Bernoulli-LoRA'
  )
  parser.add_argument('--seed', type=_whole, default=0, help='of all draws')


def add_expressive(commands: Any) -> None:
  def run(args):
    return expressive.errors(
        width=args.width,
        lengths=args.lengths,
        target_depth=args.target_depth,
        num_seeds=args.seeds,
    )

  parser = _command(
      commands, 'expressive', run, 'adapters by construction and by descent'
  )
  parser.add_argument('--width', type=_whole, default=16, help='D')
  parser.add_argument(
      '--lengths',
      type=_numbers(_whole),
      default=[1, 2, 4],
      help='P, frozen layers for each layer of the target, with commas',
  )
  parser.add_argument(
      '--target_depth', type=_whole, default=2, help='Lbar, its layers'
  )
  parser.add_argument('--seeds', type=_whole, default=5)


def main(argv: list[str]) -> None:
  args = _parser().parse_args(argv[1:])
  if args.figures:
    study.check_directory(args.figures)
  result = args.run(args)
  name = args.command
  for option in ('task', 'study'):
    if hasattr(args, option):
      name += f'_{getattr(args, option)}'
  if args.command == 'audit':
    name += f'_{audit.name_of(args.run_dir)}'
  study.show(result, args.figures, name, args.style)


if __name__ == '__main__':
  jax.config.update('jax_enable_x64', True)  # Studies are in float64.
  cli.guarded(main, sys.argv)
