"""The counterexample in R^(3 x 3) that motivates the chain, in float64.

Step 1/L = 1/20, rank 1: every chain reaches f - f* < 1e-12 in 6000 steps, where
ordinary LoRA diverges.

  python launch/train.py --config=configs/quadratic.py --workdir=runs/quadratic
  python launch/sweep.py --config=configs/quadratic.py --workdir=runs/quadratics

Variants: full, rac_left, rac_right, bernoulli (the default), smoke.
"""

from bernoulli_lora_jax.training import base_config

METHODS = ('full', 'rac_left', 'rac_right', 'bernoulli')


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  config = base_config.get_config()
  config.x64 = True
  config.task.name = 'quadratic'
  config.task.batch_size = 1
  config.method.estimator = 'gd'
  config.method.rank = 1
  config.method.stepsize_factor = 1.0
  config.training.num_steps = 6000
  config.training.num_evals = 60
  for name in filter(None, variant.split(',')):
    if name in METHODS:
      config.method.name = name
    elif name == 'smoke':
      config.training.num_steps = 20
      config.training.num_evals = 2
    else:
      raise ValueError(
          f'Expected variants of {METHODS} or smoke, got {name!r}.'
      )
  return config


def sweep():
  """Returns every method with three seeds."""
  return [
      {'method.name': name, 'seed': seed}
      for name in METHODS
      for seed in range(3)
  ]
