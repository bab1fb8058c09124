"""Robust (l1) regression, convex and not smooth, with constant steps (T8).

f(W) = ||X w - y||_1 / N, W in R^(8 x 6), N = 200, a tenth of the targets outliers,
subgradients of all data. The stepsize is R0 / (L0 sqrt(lmin T)), the best of T8
with T = 3000 and the lmin of rank 2 gaussian sketches. The sweep has three steps,
half, once and twice as long, and three seeds: 25 s on two cores. f(W_T) - f* falls
from 5.4 to 0.003-0.004 with the half step (0.016, 0.011 and 0.013 with T8's own: its
bound is of the average), less than a hundredth of T8's 0.32-0.37.

  python launch/sweep.py --config=configs/l1_regression.py --workdir=runs/l1
  python launch/report.py runs/l1 --figures=figures

Variants, joined by commas: full, rac_left, rac_right, bernoulli; smoke.
"""

from bernoulli_lora_jax.training import base_config

METHODS = ('full', 'rac_left', 'rac_right', 'bernoulli')
# R0 / (L0 sqrt(lmin T)): tasks/l1_regression's Problem has R0 = 7.124 and
# L0 = 1.429, and lmin is 2/8 on the left, 2/6 on the right.
STEPSIZES = {
    'full': 0.0910,
    'rac_left': 0.182,
    'rac_right': 0.158,
    'bernoulli': 0.168,
}
SMOKE = {
    'task.dim': 6,
    'task.num_rows': 3,
    'task.num_samples': 20,
    'task.batch_size': 20,
    'training.num_steps': 20,
    'training.num_evals': 2,
}


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  config = base_config.get_config()
  config.x64 = True
  config.task.name = 'l1_regression'
  config.task.dim = 48
  config.task.num_rows = 8
  config.task.num_samples = 200
  config.task.batch_size = 200  # All: an estimator of T8 has no minibatches.
  config.method.estimator = 'gd'
  config.method.rank = 2
  config.training.num_steps = 3000
  config.training.num_evals = 60
  config.training.eval_gradient = True  # For audits.
  methods = {name: {'method.name': name} for name in METHODS}
  base_config.set_variants(config, variant, {**methods, 'smoke': SMOKE})
  config.method.learning_rate = STEPSIZES[config.method.name]
  return config


def sweep():
  """Returns the chains with half, once and twice T8's step and three seeds."""
  return [
      {
          'method.name': name,
          'method.learning_rate': factor * STEPSIZES[name],
          'seed': seed,
      }
      for name in METHODS[1:]
      for factor in (0.5, 1.0, 2.0)
      for seed in range(3)
  ]
