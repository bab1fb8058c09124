"""MNIST of the papers (X2): MLP 784-64-64-5, pre-trained on 0-4, tuned on 5-9.

The IDX files are read from --config.task.data_dir or $BERNOULLI_LORA_DATA.
Dropout 0.1, biases frozen, AdamW with learning rate 2e-4 and weight decay 0.01,
batch 128, rank 1, alpha 1, Gaussian frozen factors of unit variance (raw), a
merge every epoch, at most 50 epochs, early stopping on the validation loss
(patience 10 epochs, the best weights are kept). The learning rate drops by 10
when the validation loss has not improved for 10 epochs; the stopping patience is
the same, so it never does. One pre-trained network for all seeds.

  python launch/sweep.py --config=configs/mnist.py --workdir=runs/mnist
  python launch/report.py runs/mnist --published=configs/mnist.py

The sweep is the papers' table, every method and both initialisations with 20
seeds, and Bernoulli-LoRA at 11 values of p: 400 runs; docs/evidence.md has the
result, the hardware and the time.

Variants, joined by commas: in adapter mode lora, cola (the left factor random;
with `flipped` the right one), asymmetric_left, asymmetric_right, rac_left,
rac_right, bernoulli; in gradient mode full (AdamW), and with `gradient`
rac_left, rac_right, bernoulli (Adam in the subspace, links of 100 steps); sgd,
gd, page, mvr (Bernoulli-LoRA in gradient mode, plain steps); smoke.
"""

from bernoulli_lora_jax.training import base_config

CHAINS = ('rac_left', 'rac_right', 'bernoulli')
ADAPTERS = ('lora', 'cola', 'asymmetric_left', 'asymmetric_right', *CHAINS)
ESTIMATORS = ('sgd', 'gd', 'page', 'mvr')
OTHERS = {
    'full': {'method.mode': 'gradient', 'method.name': 'full'},
    'gradient': {},
    'flipped': {'method.zero': 'left'},
    'smoke': {
        'training.num_steps': 6,
        'training.num_evals': 2,
        'task.pretrain_epochs': 1,
    },
}
PROBS = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)

_LINKS = {'method.mode': 'adapter', 'method.period_passes': 1.0}
# Test accuracy in %: mean, standard deviation, runs (RAC-LoRA, arXiv 2410.08305,
# and Bernoulli-LoRA, arXiv 2508.03820, with sides in our convention; the papers
# store the transpose), of runs that have these fields.
PUBLISHED = tuple(
    ({'method.optimizer': 'adamw', **fields}, figures)
    for fields, figures in (
        ({'method.name': 'full'}, (98.0, None, 1)),
        ({'method.name': 'lora', 'method.zero': 'right'}, (83.8, None, 1)),
        ({'method.name': 'lora', 'method.zero': 'left'}, (87.0, None, 1)),
        ({'method.name': 'asymmetric_left'}, (62.3, None, 1)),
        ({'method.name': 'asymmetric_right'}, (81.6, None, 1)),
        (
            {**_LINKS, 'method.name': 'cola', 'method.zero': 'right'},
            (92.6, None, 1),
        ),
        (
            {**_LINKS, 'method.name': 'cola', 'method.zero': 'left'},
            (96.2, None, 1),
        ),
        ({**_LINKS, 'method.name': 'rac_left'}, (92.0, None, 1)),
        ({**_LINKS, 'method.name': 'rac_right'}, (96.1, None, 1)),
        (
            {**_LINKS, 'method.name': 'bernoulli', 'method.prob': 0.01},
            (96.46, 0.17, 20),
        ),
    )
)


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  config = base_config.get_config()
  config.task.name = 'mnist'
  config.task.batch_size = 128
  config.task.dropout = 0.1
  config.task.pretrain_epochs = 10
  config.method.mode = 'adapter'
  config.method.rank = 1
  config.method.optimizer = 'adamw'
  config.method.learning_rate = 2e-4
  config.method.period_passes = 1.0
  config.method.frame = 'raw'
  config.method.init = 'normal'
  config.training.num_passes = 50.0
  config.training.num_evals = 50
  config.training.eval_gradient = True  # For audits.
  config.training.patience = 10
  config.training.plateau_patience = 10
  table = {name: {'method.name': name} for name in ADAPTERS}
  if 'gradient' in variant.split(','):
    rates = gradient('adam', 100, 2e-3)
    table |= {name: {**rates, 'method.name': name} for name in CHAINS}
  plain = gradient('sgd', 1, 0.05)
  table |= {name: {**plain, 'method.estimator': name} for name in ESTIMATORS}
  base_config.set_variants(config, variant, {**table, **OTHERS})
  return config


def gradient(optimizer: str, period: int, rate: float) -> dict[str, object]:
  """Returns gradient mode with its optimiser in the subspace."""
  return {
      'method.mode': 'gradient',
      'method.optimizer': optimizer,
      'method.period': period,
      'method.period_passes': None,
      'method.learning_rate': rate,
  }


def sweep():
  """Returns the papers' table and Bernoulli-LoRA over p, with 20 seeds."""
  methods: list[dict[str, object]] = [
      {'method.mode': 'gradient', 'method.name': 'full'}
  ]
  for name in ADAPTERS[:-1]:
    methods.append({'method.mode': 'adapter', 'method.name': name})
  for name in ('lora', 'cola'):
    methods.append(
        {
            'method.mode': 'adapter',
            'method.name': name,
            'method.zero': 'left',
        }
    )
  for prob in PROBS:
    methods.append(
        {
            'method.mode': 'adapter',
            'method.name': 'bernoulli',
            'method.prob': prob,
        }
    )
  return [{**method, 'seed': seed} for method in methods for seed in range(20)]
