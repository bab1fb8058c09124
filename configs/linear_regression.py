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
# Multiples of 1/L: of 2^-7, ..., 4 the one with the smallest squared gradient
# norm after 60 data passes (default size, seed 0; one run each: launch/train.py
# --config.method.stepsize_factor=...).
FACTORS = {'gd': 1.0, 'sgd': 2**-7, 'page': 0.5, 'mvr': 2**-6}
SIZES = {
    'paper': {
        'task.dim': 4096,
        'task.num_pretraining': 90_000,
        'task.num_samples': 10_000,
        'task.batch_size': 100,
    },
    'smoke': {
        'task.dim': 16,
        'task.num_pretraining': 50,
        'task.num_samples': 40,
        'training.num_steps': 10,
        'training.num_evals': 2,
    },
}


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
  methods = {name: {'method.name': name} for name in METHODS}
  estimators = {name: {'method.estimator': name} for name in FACTORS}
  base_config.set_variants(config, variant, {**methods, **estimators, **SIZES})
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
      for name in FACTORS
      for seed in range(3)
  ]
