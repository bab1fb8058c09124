"""Handwritten digits: pre-trained on 0-4, fine-tuned on 5-9.

Real data bundled with scikit-learn, an MLP 64-64-64-5, biases frozen.

  python launch/train.py --config=configs/digits.py:lora --workdir=runs/lora
  python launch/sweep.py --config=configs/digits.py --workdir=runs/digits
  python launch/report.py runs/digits --figures=figures

The sweep is the whole family: full fine-tuning, LoRA, asymmetric LoRA, COLA,
RAC-LoRA and Bernoulli-LoRA as adapters (Adam, a link an epoch), and
Bernoulli-LoRA of rank 4 in gradient mode with SGD, PAGE and MVR. It takes about a
minute on two cores; the README has the table.

Variants, joined by commas: in adapter mode lora, asymmetric_left,
asymmetric_right, cola, rac_left, rac_right, bernoulli; in gradient mode full, and
with `gradient` the last three; gd, sgd, page, mvr (Bernoulli-LoRA in gradient
mode with that estimator); smoke (a few steps).
"""

from bernoulli_lora_jax.training import base_config

# Gradient mode: the largest of 0.005 * 2^k, k <= 6, at which no method of this
# file with that estimator diverged (60 data passes, seeds 0-2).
GRADIENT_RATES = {'gd': 0.32, 'sgd': 0.16, 'page': 0.08, 'mvr': 0.16}
# Adapter mode, Adam: of 0.003, 0.01, 0.03, 0.1, 0.3 the one with the lowest mean
# validation loss at rank 1 (seeds 0-2).
ADAPTER_RATES = {
    'lora': 0.03,
    'asymmetric_left': 0.3,
    'asymmetric_right': 0.03,
    'cola': 0.01,
    'rac_left': 0.03,
    'rac_right': 0.01,
    'bernoulli': 0.01,
}
CHAINS = ('rac_left', 'rac_right', 'bernoulli')  # In both modes.
SMOKE = {
    'training.num_steps': 6,
    'training.num_evals': 2,
    'task.pretrain_epochs': 2,
}


def adapter(name: str, rank: int = 1) -> dict[str, object]:
  """Returns the overrides of an adapter-mode method."""
  return {
      'method.mode': 'adapter',
      'method.name': name,
      'method.rank': rank,
      'method.optimizer': 'adam',
      'method.period': 17,  # Steps of an epoch.
      'method.estimator': 'sgd',
      'method.learning_rate': ADAPTER_RATES[name],
  }


def gradient(name: str, estimator: str = 'sgd', rank: int = 4):
  """Returns the overrides of a gradient-mode method."""
  return {
      'method.mode': 'gradient',
      'method.name': name,
      'method.rank': rank,
      'method.optimizer': 'sgd',
      'method.period': 1,
      'method.estimator': estimator,
      'method.learning_rate': GRADIENT_RATES[estimator],
  }


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  config = base_config.get_config()
  config.training.num_passes = 60.0
  config.training.eval_gradient = True  # For audits.
  config.update_from_flattened_dict(adapter('bernoulli'))
  if 'gradient' in variant.split(','):
    table = {name: gradient(name) for name in CHAINS}
  else:
    table = {name: adapter(name) for name in ADAPTER_RATES}
  table |= {name: gradient('bernoulli', name) for name in GRADIENT_RATES}
  table |= {'full': gradient('full'), 'gradient': {}, 'smoke': SMOKE}
  base_config.set_variants(config, variant, table)
  return config


def sweep():
  """Returns the family with three seeds."""
  methods = [gradient('full')]
  methods += [adapter(name) for name in ADAPTER_RATES]
  methods += [adapter(name, 4) for name in ('lora', 'cola', 'bernoulli')]
  methods += [gradient('bernoulli', name) for name in ('sgd', 'page', 'mvr')]
  return [{**method, 'seed': seed} for method in methods for seed in range(3)]
