"""Federated fine-tuning: ten clients, accuracy against megabytes.

  python launch/train.py --config=configs/federated.py:ef21 --workdir=runs/ef21
  python launch/sweep.py --config=configs/federated.py --workdir=runs/federated
  python launch/report.py runs/federated --figures=figures

Ten clients hold the training examples of the digits 5-9 (pre-trained on 0-4), dealt
at random (iid) or label by label in proportions from Dirichlet(0.1) (dirichlet). A
step is a round. Methods, all of rank 2 where they have one:

  qgd, marina, ef21  Bernoulli-LoRA in gradient mode: clients send a compressed
                     gradient, the server sends the trained factor. QGD quantises
                     (dithering, 4 levels), MARINA sends RandK 5% of differences,
                     EF21 TopK 5% of errors. Full gradients, no local steps.
  bernoulli, rac_left, rac_right
                     federated adapters: K local steps of Adam on the trained
                     factor; its mean is exact.
  lora               federated averaging of both LoRA factors, which is not.
  fedavg             federated averaging of the whole weights.

Variants, joined by commas: one method; digits (default) or mnist; iid (default) or
dirichlet; smoke. The sweep of a variant is all methods on its task, over
both partitions, five seeds and a grid of six learning rates, of which the report
takes the one with the lowest validation loss: 480 runs, digits four minutes on 16 cores,
MNIST four minutes on an H100. Expected: docs/evidence.md.
"""

from bernoulli_lora_jax.training import base_config

ESTIMATORS = {
    'qgd': ('dithering', 4.0),
    'marina': ('randk', 0.05),
    'ef21': ('topk', 0.05),
}
ADAPTERS = ('bernoulli', 'rac_left', 'rac_right', 'lora')
METHODS = (*ESTIMATORS, *ADAPTERS, 'fedavg')
RATES = {
    'qgd': (0.04, 0.08, 0.16, 0.32, 0.64, 1.28),
    'marina': (0.01, 0.02, 0.04, 0.08, 0.16, 0.32),
    'ef21': (0.04, 0.08, 0.16, 0.32, 0.64, 1.28),
    'local': (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
}
LOCAL_STEPS = {'digits': 5, 'mnist': 20}
PARTITIONS = ('iid', 'dirichlet')
NUM_SEEDS = 5
VARIANTS = (('bernoulli', *METHODS), LOCAL_STEPS, PARTITIONS, ('', 'smoke'))


def overrides(name: str, task: str) -> dict[str, object]:
  """Returns the overrides of a method."""
  if name in ESTIMATORS:
    compressor, argument = ESTIMATORS[name]
    return {
        'method.mode': 'gradient',
        'method.name': 'bernoulli',
        'method.estimator': name,
        'method.optimizer': 'sgd',
        'method.period': 1,
        'method.learning_rate': 0.16,
        'federated.compressor': compressor,
        'federated.argument': argument,
    }
  is_full = name == 'fedavg'
  return {
      'method.mode': 'gradient' if is_full else 'adapter',
      'method.name': 'full' if is_full else name,
      'method.estimator': 'fedavg' if is_full else 'sgd',
      'method.optimizer': 'adam',
      'method.period': LOCAL_STEPS[task],
      'method.learning_rate': 0.003 if is_full else 0.01,
      'federated.compressor': 'identity',
  }


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  method, task, partition, size = base_config.choose_variants(
      variant, *VARIANTS
  )
  config = base_config.get_config()
  config.task.name = task
  config.method.rank = 2
  config.federated.num_clients = 10
  config.federated.partition = partition
  config.training.num_steps = 200
  config.training.num_evals = 20
  config.training.eval_gradient = True
  if task == 'mnist':
    config.task.batch_size = 128
    config.task.dropout = 0.1
    config.task.pretrain_epochs = 10
  if size == 'smoke':
    config.training.num_steps = 4
    config.training.num_evals = 2
    config.task.pretrain_epochs = 1
  config.update_from_flattened_dict(overrides(method, task))
  return config


def sweep(variant: str = ''):
  """Returns all methods on both partitions."""
  _, task, *_ = base_config.choose_variants(variant, *VARIANTS)
  runs: list[dict[str, object]] = []
  for method in METHODS:
    kind = method if method in ESTIMATORS else 'local'
    for partition in PARTITIONS:
      for rate in RATES[kind]:
        for seed in range(NUM_SEEDS):
          runs.append(
              {
                  **overrides(method, task),
                  'method.learning_rate': rate,
                  'federated.partition': partition,
                  'seed': seed,
              }
          )
  return runs
