"""The LoRA family at equal cost (X4): parameters, total rank, FLOPs.

What reviewers of these papers asked for: three tables in which the methods have
the same number of trained parameters a step, the same total rank (T links of
rank r against one LoRA of rank T r), or the same floating-point operations. Each
method is run with Adam over a grid of learning rates and ten seeds; the report
shows the rate with the lowest mean validation loss. The weights of the lowest
validation loss are kept, the test split is looked at once.

  python launch/sweep.py --config=configs/equal.py:digits,parameters \
      --workdir=runs/equal/digits_parameters
  python launch/report.py runs/equal/digits_parameters

Variants: one of digits, mnist, and one of parameters, rank, flops; smoke.
docs/evidence.md has the tables, the hardware and the time.
"""

from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import methods as methods_lib

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
NUM_SEEDS = 10
NUM_LINKS = 8  # T, at equal total rank.
# Ranks that train about as many numbers a step: LoRA's r (m + n), r n on the
# left, r m on the right, the mean of both for Bernoulli-LoRA at p = 1/2.
RANKS = {
    'digits': {'lora': 2, 'left': 5, 'right': 3, 'bernoulli': 4},  # 650
    'mnist': {'lora': 1, 'left': 8, 'right': 1, 'bernoulli': 2},  # 1,045
}
VARIANTS = (RANKS, ('parameters', 'rank', 'flops'), ('', 'smoke'))


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  task, equal, size = base_config.choose_variants(variant, *VARIANTS)
  config = base_config.get_config()
  config.task.name = task
  config.method.mode = 'adapter'
  config.method.optimizer = 'adam'
  config.method.period_passes = 1.0
  if task == 'mnist':
    config.task.batch_size = 128
    config.task.dropout = 0.1
    config.task.pretrain_epochs = 10
  passes = {'digits': 64.0, 'mnist': 16.0}[task]
  config.training.num_passes = passes
  config.training.num_evals = 16
  config.training.patience = 16  # Never stops; keeps the best.
  if equal == 'rank':
    config.method.period_passes = passes / NUM_LINKS
  if equal == 'flops':
    config.training.num_full_passes = passes
  if size == 'smoke':
    config.training.num_steps = 4
    config.training.num_evals = 2
    config.task.pretrain_epochs = 1
  return config


def rank(name: str, task: str, equal: str) -> int:
  """Returns the rank of a method in a table."""
  is_chain = name in ('cola', 'rac_left', 'rac_right', 'bernoulli')
  if equal == 'rank':
    return 1 if is_chain else NUM_LINKS
  if equal == 'flops':
    return 4
  kind = name.rpartition('_')[2]
  return RANKS[task]['lora' if kind == 'cola' else kind]


def sweep(variant: str = ''):
  """Returns each method at each rate with ten seeds."""
  task, equal, _ = base_config.choose_variants(variant, *VARIANTS)
  methods: list[dict[str, object]] = [
      {'method.mode': 'gradient', 'method.name': 'full'}
  ]
  for name in methods_lib.ADAPTERS:
    methods.append(
        {
            'method.mode': 'adapter',
            'method.name': name,
            'method.rank': rank(name, task, equal),
        }
    )
  return [
      {**method, 'method.learning_rate': rate, 'seed': seed}
      for method in methods
      for rate in RATES
      for seed in range(NUM_SEEDS)
  ]
