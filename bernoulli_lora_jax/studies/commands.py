"""The subcommands of `blora theory`: each shows a study.

Signatures are the interface: parameters are flags, docstrings and the comments of
fields their help. A `list` is written with commas, a whole number also as 1e4.
"""

from collections.abc import Callable, Mapping
import sys
from typing import Any, Literal, NamedTuple

import jax

from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.studies import audit_run
from bernoulli_lora_jax.studies import expressive as expressive_lib
from bernoulli_lora_jax.studies import gap as gap_lib
from bernoulli_lora_jax.studies import nonsmooth as nonsmooth_lib
from bernoulli_lora_jax.studies import ntk_generalisation
from bernoulli_lora_jax.studies import ntk_linearisation
from bernoulli_lora_jax.studies import ntk_ranks
from bernoulli_lora_jax.studies import predict
from bernoulli_lora_jax.studies import rates as rates_lib
from bernoulli_lora_jax.studies import study as study_lib
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import config_files

Shapes = list[tuple[int, int]]


class Output(NamedTuple):
  """Where a study goes."""

  figures: str = 'figures'  # Directory of the files; '' for none.
  style: Literal['simple', 'github', 'tsv'] = 'simple'  # Of the tables.

  def show(self, name: str, run: Callable[[], study_lib.Study]) -> None:
    """Prints what run() returns and writes its files, NAME before theirs."""
    if self.figures:
      study_lib.check_directory(self.figures)
    study_lib.show(run(), self.figures, name, self.style)


class Chain(NamedTuple):
  """The trained matrices and their subspaces; one of shapes and config."""

  rank: int  # r.
  shapes: Shapes | None = None  # As stored, m x n: 64x64,128x32*12.
  config: str | None = None  # NAME[:VARIANT]: those of the model of a config.
  sketch: str = 'gaussian'  # Law of the subspaces.
  others_trained: bool = False  # Whether other leaves are trained in full.

  def arguments(self) -> dict[str, Any]:
    """Returns the arguments of a prediction."""
    if (self.shapes is None) == (self.config is None):
      raise ValueError(
          f'Expected one of --shapes and --config, got shapes={self.shapes},'
          f' config={self.config}.'
      )
    return {
        'shapes': self.shapes or _shapes_of(str(self.config)),
        'rank': self.rank,
        'sketch': self.sketch,
        'all_trained': not self.others_trained,
    }


class Constants(NamedTuple):
  """Constants of the problem; each method asks for its own."""

  initial_gap: float | None = None  # D0 = f(W_0) - f_inf.
  smoothness: float | None = None  # L of f.
  # Lbar: of examples (page), of minibatches (mvr).
  mean_smoothness: float | None = None
  pl: float | None = None  # mu; bounds the gap in place of the gradient.
  noise: float | None = (
      None  # C of E||g||^2 <= 2 A gap + B ||grad||^2 + C (sgd).
  )
  growth: float | None = None  # B (sgd); None: 1.
  slope: float | None = None  # A (sgd); None: 0.
  variance: float | None = None  # sigma^2 of a minibatch gradient (mvr).
  initial_error: float | None = None  # V0 of the first estimate; None: 0.
  q: float | None = None  # Probability of a full gradient (page, marina).
  momentum: float | None = None  # 1 - b (mvr).
  batch_size: int | None = None  # b' (page).
  num_samples: int | None = None  # N, minibatches without replacement (page).
  omega: float | None = None  # Of the compressor (qgd, marina).
  beta: float | None = None  # Of the compressor (ef21).
  client_gap: float | None = None  # f_inf - sum_l w_l f_l_inf (qgd).
  distance: float | None = None  # R0 (nonsmooth, polyak).
  lipschitz: float | None = None  # L0 (nonsmooth, polyak).
  client_smoothness: list[float] | None = None  # L_l (qgd, marina, ef21).
  # w_l of each client; None: equal (qgd, marina, ef21).
  weights: list[float] | None = None
  # A, B - 1 and C bound E||g - grad||^2, which allows longer steps (sgd).
  bounded_variance: bool = False
  least: bool = False  # Bound min_t in place of the mean (sgd, qgd).

  def given(self) -> dict[str, Any]:
    """Returns those that are given; a flag that is off is not."""
    values = self._asdict().items()
    return {k: v for k, v in values if v is not None and v is not False}


class Examples(NamedTuple):
  """The classification task of a study."""

  task: Literal['digits', 'mnist'] = 'digits'  # What is learned.
  data_dir: str = ''  # Folder of MNIST; '': $BERNOULLI_LORA_DATA.


def bounds(
    output: Output,
    chain: Chain,
    constants: Constants,
    estimator: Literal[
        'gd',
        'sgd',
        'page',
        'mvr',
        'qgd',
        'marina',
        'ef21',
        'nonsmooth',
        'polyak',
    ] = 'gd',
    prob: float = 0.5,
    steps: list[int] = [10, 100, 1000, 10000, 100000],  # noqa: B006 (read only)
    stepsize: float | None = None,
) -> None:
  """Bounds what a method reaches over T.

  Args:
    estimator: of the gradient, or the rule of the steps.
    prob: p = P(left).
    steps: T.
    stepsize: gamma; None: the largest allowed for the most steps.
  """
  output.show(
      'bounds',
      lambda: predict.predict(
          **chain.arguments(),
          estimator=estimator,
          prob=prob,
          num_steps=steps,
          stepsize=stepsize,
          **constants.given(),
      ),
  )


def recommend(
    output: Output,
    chain: Chain,
    constants: Constants,
    target: float,
    estimator: Literal[
        'gd', 'sgd', 'page', 'mvr', 'qgd', 'marina', 'ef21'
    ] = 'gd',
) -> None:
  """Recommends p, stepsize and steps that reach a target.

  Args:
    target: mean squared gradient norm; the gap with --pl.
    estimator: of the gradient.
  """
  output.show(
      'recommend',
      lambda: predict.recommend(
          **chain.arguments(),
          estimator=estimator,
          target=target,
          **constants.given(),
      ),
  )


def audit(
    run_dir: str,
    /,
    output: Output,
    points: int = 8,
    products: int = 12,
    batches: int = 32,
) -> None:
  """Audits a finished run: its constants, its assumptions, its bound.

  Replays the run (as long as it took), prints the constants seen along its path,
  the realised lambda, which assumptions held, and the bound with estimated
  constants beside the measured mean squared gradient norm; draws both curves.

  Args:
    run_dir: --workdir of a `blora train`.
    points: of the path, at which constants are estimated.
    products: Hessian-vector products a point.
    batches: minibatches a point.
  """
  output.show(
      f'audit_{audit_run.name_of(run_dir)}',
      lambda: audit_run.audit(
          run_dir,
          num_points=points,
          num_products=products,
          num_batches=batches,
      ),
  )


def rates(
    output: Output,
    size: Literal['paper', 'small', 'smoke'] = 'small',
    passes: float = 60.0,
    seeds: int = 5,
    rank: int = 2,
    claims: list[str] = list(rates_lib.CLAIMS),  # noqa: B006, B008 (read only)
    factors: list[float] = list(rates_lib.FACTORS),  # noqa: B006, B008
    numpy: int | Literal['all'] = 0,
) -> None:
  """Checks the papers' linear regression (X1), claim by claim.

  Args:
    size: paper: d = 4096; small: d = 256.
    passes: data passes.
    seeds: of each method and stepsize.
    rank: r.
    claims: figures of GD alone; '' for none.
    factors: stepsizes times L.
    numpy: time the same work as a plain NumPy loop: all runs, or that many of
      each program and the others by proportion. --numpy alone is all.
  """
  output.show(
      'rates',
      lambda: rates_lib.rates(
          size,
          num_passes=passes,
          num_seeds=seeds,
          rank=rank,
          claims=claims,
          numpy_runs=sys.maxsize if numpy == 'all' else numpy,
          factors=factors,
      ),
  )


def nonsmooth(
    output: Output,
    seeds: int = 16,
    shape: Shapes = [(8, 6)],  # noqa: B006 (read only)
    num_samples: int = 200,
    rank: int = 2,
    prob: float = 0.5,
    ratio: float = 8.0,
    steps: int = 2000,
) -> None:
  """Compares gaps with bounds on l1 regression (T8).

  Args:
    seeds: runs of each method.
    shape: of W, m x n.
    num_samples: N of the regression.
    rank: r.
    prob: p = P(left) of Bernoulli-LoRA.
    ratio: of the weights of the coordinate sketch, its kappa if unclipped.
    steps: T.
  """
  output.show(
      'nonsmooth',
      lambda: nonsmooth_lib.gaps(
          shape=shape[0],
          num_samples=num_samples,
          rank=rank,
          prob=prob,
          ratio=ratio,
          num_steps=steps,
          num_seeds=seeds,
          progress=True,
      ),
  )


def ntk(
    output: Output,
    examples: Examples,
    study: Literal['ranks', 'linearisation', 'generalisation'] = 'ranks',
    num_samples: list[int] | None = None,
    ranks: list[int] | None = None,
    seeds: int | None = None,
    lam: list[float] | None = None,
    steps: int | None = None,
    select: str | None = None,
) -> None:
  """Studies LoRA in the NTK regime, few-shot (N1-N7).

  None is the study's own value.

  Args:
    study: loss against steps by rank; how far the linearisation holds; N7.
    num_samples: N, balanced over classes; several for generalisation.
    ranks: of the adapters.
    seeds: starts of a rank; draws of examples for generalisation.
    lam: weight decay over the one from which on zero is optimal, in (0, 1);
      several for generalisation.
    steps: of gradient descent.
    select: regular expression of the matrices, as 'Dense_[01]/kernel'.
  """
  if study == 'generalisation':
    for flag, value in (('ranks', ranks), ('steps', steps)):
      if value is not None:
        raise ValueError(
            f'Expected no --{flag} with --study=generalisation, got {value}.'
        )
    run: Callable[..., study_lib.Study] = ntk_generalisation.generalisation
    options = {'sizes': num_samples, 'relative_lams': lam, 'num_draws': seeds}
  else:
    run = ntk_ranks.ranks
    if study == 'linearisation':
      run = ntk_linearisation.linearisation
    options = {
        'num_samples': _single('num_samples', num_samples, study),
        'relative_lam': _single('lam', lam, study),
        'ranks': ranks,
        'num_seeds': seeds,
        'num_steps': steps,
    }
  options = _without_none({**options, 'select': select})
  output.show(
      f'ntk_{examples.task}_{study}',
      lambda: run(_make_task(examples.task, examples.data_dir), **options),
  )


def gap(
    output: Output,
    task: Literal['teacher', 'mnist', 'digits'] = 'teacher',
    data_dir: str = '',
    ranks: list[int] | None = None,
    sizes: list[int] | None = None,
    draws: int | None = None,
    prob: float = 0.5,
    seed: int = 0,
) -> None:
  """Measures the generalisation gap over ranks and sample sizes.

  None is as in studies/gap.py.

  Args:
    task: what is learned.
    data_dir: folder of MNIST; '': $BERNOULLI_LORA_DATA.
    ranks: r.
    sizes: N.
    draws: of frozen factors and samples.
    prob: p = P(left) of Bernoulli-LoRA.
    seed: of all draws.
  """
  changed: dict[str, Any] = _without_none(
      {
          'ranks': ranks and tuple(ranks),
          'sizes': sizes and tuple(sizes),
          'num_draws': draws,
      }
  )
  output.show(
      f'gap_{task}',
      lambda: gap_lib.gap(
          None if task == 'teacher' else _make_task(task, data_dir),
          teacher=gap_lib.TEACHER._replace(**changed),
          on_task=gap_lib.TASK._replace(**changed),
          prob=prob,
          seed=seed,
      ),
  )


def expressive(
    output: Output,
    width: int = 16,
    lengths: list[int] = [1, 2, 4],  # noqa: B006 (read only)
    target_depth: int = 2,
    seeds: int = 5,
) -> None:
  """Adapts one ReLU net to another, by construction and by descent.

  Args:
    width: D.
    lengths: P, frozen layers for each layer of the target.
    target_depth: Lbar, its layers.
    seeds: of each cell.
  """
  output.show(
      'expressive',
      lambda: expressive_lib.errors(
          width=width,
          lengths=lengths,
          target_depth=target_depth,
          num_seeds=seeds,
      ),
  )


def _shapes_of(name: str) -> Shapes:
  """Returns the shapes of the matrices that a config's method adapts."""
  config = config_files.load(name)
  task = arguments.make_task(config)
  params = jax.eval_shape(task.init, jax.random.key(0))
  found = matrices_lib.find(params, arguments.make_matrices(config, task))
  return [(one.m, one.n) for one in found for _ in range(one.entries.size)]


def _make_task(name: str, data_dir: str) -> task_lib.Task:
  config = base_config.get_config()
  config.task.name = name
  config.task.data_dir = data_dir
  return arguments.make_task(config)


def _single(flag: str, values: list[Any] | None, study: str) -> Any:
  """Returns the one value of a flag that takes several, None for none."""
  if values is not None and len(values) != 1:
    raise ValueError(
        f'Expected one --{flag} with --study={study}, got {values}.'
    )
  return values and values[0]


def _without_none(options: Mapping[str, Any]) -> dict[str, Any]:
  return {name: x for name, x in options.items() if x is not None}
