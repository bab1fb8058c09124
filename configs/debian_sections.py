r"""What Debian's packages are, told from one line: MiniLM by every method.

16 unbalanced sections, 8,760 lines to train on (a tenth of them for validation) and
1,500 to test; the largest section is 17%. all-MiniLM-L6-v2 (22.7M numbers), its mean
over tokens before a fresh linear head, which trains beside the query and value
matrices of all layers. The files are $BERNOULLI_LORA_DATA/debian_sections/*.jsonl,
the model's folder is $BERNOULLI_LORA_MINILM (docs/guide.md#classify-text has it).

Three tables, as in configs/equal.py: the same number of trained parameters a step
(matrices are square: rank 2r of one factor is rank r of both), the same total rank (8
links of rank 1 against one LoRA of rank 8), the same floating-point operations as 4
passes of full fine-tuning (XLA's count, in which a scan of layers is one layer). Full
fine-tuning is the same in all and stands in the first, as the head alone does. Each
method with Adam at four learning rates and five seeds, of which a seed has its own
head; the report shows the rate with the lowest mean validation loss. The weights of
the lowest validation loss are kept, the test split is looked at once.

  python launch/sweep.py --config=configs/debian_sections.py:parameters \
      --workdir=runs/debian_sections/parameters
  python launch/report.py runs/debian_sections/parameters
  python launch/report.py runs/debian_sections/parameters --metric=test_macro_f1
  python launch/report.py runs/debian_sections/flops \
      runs/debian_sections/parameters/*name=full*

Variants: parameters, rank, flops; on an accelerator the twenty runs of a method take
each step at once. small (the head, LoRA and RAC-LoRA, one seed and one rate, one pass:
minutes on two CPU cores); audit (of `blora train`: 200 plain steps of Bernoulli-LoRA on
512 texts, for `blora audit`); smoke. Weights to evaluate on other files (`blora evaluate`) are kept with
--config.training.keep_weights=True.
"""

from ml_collections import config_dict

from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import methods as methods_lib

AUDIT = {  # Plain steps: what T2 speaks of.
    'method.mode': 'gradient',
    'method.optimizer': 'sgd',
    'method.learning_rate': 0.03,
    'method.period': 1,
    'training.num_steps': 200,
    'training.num_evals': 20,
    'training.patience': 0,
    'training.eval_gradient': True,
}
NUM_SEEDS = 5
NUM_LINKS = 8  # T.
NUM_PASSES = 4.0
FULL_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
# Of both factors, and of one, or the head.
RATES = {2: (3e-4, 1e-3, 3e-3, 1e-2), 1: (1e-3, 3e-3, 1e-2, 3e-2)}
CHAINS = ('cola', 'rac_left', 'rac_right', 'bernoulli')
VARIANTS = (('parameters', 'rank', 'flops'), ('', 'small', 'audit', 'smoke'))


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  equal, size = base_config.choose_variants(variant, *VARIANTS)
  config = base_config.get_config()
  config.task.name = 'bernoulli_lora_jax.tasks.text_classification:make_task'
  config.task.batch_size = 32
  config.task.kwargs = config_dict.ConfigDict(
      {
          'model': '$BERNOULLI_LORA_MINILM',
          'data': '$BERNOULLI_LORA_DATA/debian_sections/train.jsonl',
          'test_data': '$BERNOULLI_LORA_DATA/debian_sections/test.jsonl',
          'pooling': 'mean',
          'max_length': 32,
          'num_lengths': 2,  # 16 and 32: a third is padding, half of one length's.
      }
  )
  config.update_from_flattened_dict(adapter('bernoulli', equal))
  config.method.select = 'query|value'
  config.method.others = '^classifier'
  config.method.optimizer = 'adam'
  if size != 'audit':
    config.method.period_passes = NUM_PASSES / NUM_LINKS
  config.training.num_passes = NUM_PASSES
  config.training.num_evals = 4
  config.training.patience = 4  # Never stops; keeps the best.
  config.training.step_together = True
  if equal == 'flops':
    config.training.num_full_passes = NUM_PASSES
  if size == 'small':
    config.training.num_passes = 1.0
    config.training.num_evals = 2
    config.method.period_passes = 1 / NUM_LINKS
  if size == 'audit':
    config.task.kwargs.num_texts = 512
    config.task.kwargs.eval_fraction = 0.0
    config.task.kwargs.train_rows = 0
    config.task.kwargs.sampling = 'replacement'
    config.update_from_flattened_dict(AUDIT)
  if size == 'smoke':
    config.training.num_steps = 4
    config.training.num_evals = 2
  return config


def full() -> dict[str, object]:
  """Returns the overrides of full fine-tuning: of all weights."""
  return {
      'method.mode': 'gradient',
      'method.name': 'full',
      'method.train_others': True,
  }


def probe() -> dict[str, object]:
  """Returns the overrides of the head alone."""
  return {'method.mode': 'gradient', 'method.name': 'probe'}


def adapter(name: str, equal: str, mode: str = 'adapter') -> dict[str, object]:
  """Returns the overrides of a method with factors."""
  if equal == 'rank':
    rank = 1 if name in CHAINS else NUM_LINKS
  elif equal == 'parameters':
    rank = 4 if name in ('lora', 'cola') else 8
  else:
    rank = 8
  return {'method.mode': mode, 'method.name': name, 'method.rank': rank}


def sweep(variant: str = ''):
  """Returns each method at each rate with each seed."""
  equal, size = base_config.choose_variants(variant, *VARIANTS)
  if size == 'small':
    runs = [(probe(), 1e-2)]
    runs += [(adapter(name, equal), 3e-3) for name in ('lora', 'rac_left')]
    return [{**run, 'method.learning_rate': rate} for run, rate in runs]
  runs = []
  if equal == 'parameters':  # In all tables the same.
    runs.append((full(), FULL_RATES))
  if equal != 'rank':
    runs.append((probe(), RATES[1]))
  for name in methods_lib.ADAPTERS:
    rates = RATES[2 if name in ('lora', 'cola') else 1]
    runs.append((adapter(name, equal), rates))
  runs.append((adapter('bernoulli', equal, 'sketched'), RATES[1]))
  return [
      {**run, 'method.learning_rate': rate, 'seed': seed}
      for run, rates in runs
      for rate in rates
      for seed in range(NUM_SEEDS)
  ]
