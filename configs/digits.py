"""Handwritten digits: pre-trained on 0-4, fine-tuned on 5-9.

Real data bundled with scikit-learn, an MLP 64-64-64-5, biases frozen.

  python launch/train.py --config=configs/digits.py:page --workdir=runs/page
  python launch/sweep.py --config=configs/digits.py --workdir=runs/digits

Variants, joined by commas: full, rac_left, rac_right, bernoulli (all SGD), gd,
page, mvr (Bernoulli-LoRA with that estimator), smoke (a few steps).
"""

from bernoulli_lora_jax.training import base_config

# The largest of 0.005 * 2^k, k <= 6, at which no method of this file with that
# estimator diverged (60 data passes; the grid with seed 0, the chosen one with
# seeds 0-2; one run each: launch/train.py --config.method.learning_rate=...).
LEARNING_RATES = {'gd': 0.32, 'sgd': 0.16, 'page': 0.08, 'mvr': 0.16}
METHODS = ('full', 'rac_left', 'rac_right', 'bernoulli')


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  config = base_config.get_config()
  config.training.num_passes = 60.0
  config.method.learning_rate = LEARNING_RATES['sgd']
  for name in filter(None, variant.split(',')):
    if name in METHODS:
      config.method.name = name
    elif name in LEARNING_RATES:
      config.method.estimator = name
      config.method.learning_rate = LEARNING_RATES[name]
    elif name == 'smoke':
      config.training.num_steps = 6
      config.training.num_evals = 2
      config.task.pretrain_epochs = 2
    else:
      raise ValueError(
          f'Expected variants of {METHODS + tuple(LEARNING_RATES)} or smoke,'
          f' got {name!r}.'
      )
  return config


def sweep():
  """Returns every method at rank 1 and 4 with three seeds."""
  runs = [('full', 'sgd', 1)]
  for rank in (1, 4):
    runs += [(name, 'sgd', rank) for name in METHODS[1:]]
    runs += [('bernoulli', name, rank) for name in ('gd', 'page', 'mvr')]
  return [
      {
          'method.name': name,
          'method.estimator': estimator,
          'method.rank': rank,
          'method.learning_rate': LEARNING_RATES[estimator],
          'seed': seed,
      }
      for name, estimator, rank in runs
      for seed in range(3)
  ]
