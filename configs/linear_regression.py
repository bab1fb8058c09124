"""Linear regression with a non-convex regulariser (X1), in float64.

Rank 2, p = 0.5, batch N/100, gamma = factor / L (X1), PAGE's q = b / (b + N). The
default size, d = 256 seen as 16 x 16, takes seconds on a CPU; `paper` is X1's
d = 4096 with 90,000 and 10,000 samples (several GB, for an accelerator).

  python launch/sweep.py --config=configs/linear_regression.py --workdir=runs/linear
  python launch/report.py runs/linear

Variants, joined by commas: full, rac_left, rac_right, bernoulli; gd, sgd, page,
mvr; paper; smoke.
"""

from bernoulli_lora_jax.training import base_config

METHODS = ('full', 'rac_left', 'rac_right', 'bernoulli')
ESTIMATORS = ('gd', 'sgd', 'page', 'mvr')
# Multiples of 1/L: of 2^-7, ..., 4 the one with the smallest squared gradient
# norm after 60 data passes (default size, seed 0; one run each: launch/train.py
# --config.method.stepsize_factor=...).
FACTORS = {'gd': 1.0, 'sgd': 2**-7, 'page': 0.5, 'mvr': 2**-6}


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  config = base_config.get_config()
  config.x64 = True
  config.task.name = 'linear_regression'
  config.task.batch_size = 10
  config.method.rank = 2
  config.method.estimator = 'gd'
  config.training.num_passes = 60.0
  config.training.num_evals = 60
  config.training.eval_gradient = True  # For audits.
  for name in filter(None, variant.split(',')):
    if name in METHODS:
      config.method.name = name
    elif name in ESTIMATORS:
      config.method.estimator = name
    elif name == 'paper':
      config.task.dim = 4096
      config.task.num_pretraining = 90_000
      config.task.num_samples = 10_000
      config.task.batch_size = 100
    elif name == 'smoke':
      config.task.dim = 16
      config.task.num_pretraining = 50
      config.task.num_samples = 40
      config.training.num_steps = 10
      config.training.num_evals = 2
    else:
      raise ValueError(
          f'Expected variants of {METHODS + ESTIMATORS}, paper or smoke, got'
          f' {name!r}.'
      )
  config.method.stepsize_factor = FACTORS[config.method.estimator]
  return config


def sweep():
  """Returns Bernoulli-LoRA with every estimator and three seeds."""
  return [
      {
          'method.estimator': name,
          'method.stepsize_factor': FACTORS[name],
          'seed': seed,
      }
      for name in ESTIMATORS
      for seed in range(3)
  ]
