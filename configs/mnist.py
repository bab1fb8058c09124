"""MNIST of the papers (X2): MLP 784-64-64-5, pre-trained on 0-4, tuned on 5-9.

The IDX files are read from --config.task.data_dir or $BERNOULLI_LORA_DATA.
Dropout 0.1, batch 128, biases frozen, early stopping on the validation loss
(patience 10 evaluations, one an epoch). This file runs gradient mode: the whole
gradient, projected, one link a step or `period` steps. The adapter-mode table of
X2, with a merge every epoch, is another experiment.

  python launch/train.py --config=configs/mnist.py --workdir=runs/mnist

Variants, joined by commas: full, rac_left, rac_right, bernoulli (Adam in the
subspace, links of 100 steps), sgd, gd, page, mvr (Bernoulli-LoRA, plain steps),
smoke (a few steps).
"""

from bernoulli_lora_jax.training import base_config

METHODS = ('full', 'rac_left', 'rac_right', 'bernoulli')
# Plain steps, by estimator.
LEARNING_RATES = {'sgd': 0.05, 'gd': 0.05, 'page': 0.05, 'mvr': 0.05}


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  config = base_config.get_config()
  config.task.name = 'mnist'
  config.task.batch_size = 128
  config.task.dropout = 0.1
  config.task.pretrain_epochs = 10
  config.method.rank = 1
  config.method.optimizer = 'adam'
  config.method.period = 100
  config.method.learning_rate = 2e-3
  config.training.num_passes = 50.0
  config.training.num_evals = 50
  config.training.patience = 10
  for name in filter(None, variant.split(',')):
    if name in METHODS:
      config.method.name = name
      if name == 'full':
        config.method.learning_rate = 2e-4
    elif name in LEARNING_RATES:
      config.method.estimator = name
      config.method.optimizer = 'sgd'
      config.method.period = 1
      config.method.learning_rate = LEARNING_RATES[name]
    elif name == 'smoke':
      config.training.num_steps = 6
      config.training.num_evals = 2
      config.task.pretrain_epochs = 1
    else:
      raise ValueError(
          f'Expected variants of {METHODS + tuple(LEARNING_RATES)} or smoke,'
          f' got {name!r}.'
      )
  return config


def sweep():
  """Returns the four methods at rank 1 with three seeds."""
  return [
      {
          'method.name': name,
          'method.learning_rate': 2e-4 if name == 'full' else 2e-3,
          'seed': seed,
      }
      for name in METHODS
      for seed in range(3)
  ]
