r"""GLUE with RoBERTa (X3): rank 2, ten links, AdamW.

A task of GLUE by the variant, from the Hub: its training split (a tenth of it for
validation) and, as the labels of its test split are not public, its validation split
for the test. RoBERTa-base with its own kind of head, fresh for each seed, which trains
beside the query and value matrices. The papers' averages over tasks: full fine-tuning
80.9, LoRA 78.5, COLA 77.6, RAC-LoRA 77.0, asymmetric LoRA 76.8; accuracy is told here,
and macro-F1 (of CoLA they have Matthews' correlation). Needs the extras hf and datasets.

  python launch/sweep.py --config=configs/glue.py:rte --workdir=runs/glue/rte
  python launch/report.py runs/glue/rte

Without the Hub: --config.task.kwargs.model=FOLDER and, of a dataset that
`save_to_disk` wrote, --config.task.kwargs.data=FOLDER:train and
--config.task.kwargs.test_data=FOLDER:validation. Not run yet at full size.

Variants: rte, cola, mrpc, sst2, qnli, qqp, mnli; smoke.
"""

from ml_collections import config_dict

from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import methods as methods_lib

# First and second texts of a task, by the names of their columns.
TASKS = {
    'rte': ('sentence1', 'sentence2'),
    'cola': ('sentence',),
    'mrpc': ('sentence1', 'sentence2'),
    'sst2': ('sentence',),
    'qnli': ('question', 'sentence'),
    'qqp': ('question1', 'question2'),
    'mnli': ('premise', 'hypothesis'),
}
VARIANTS = (TASKS, ('', 'smoke'))
NUM_LINKS = 10  # T.
NUM_SEEDS = 3
RATES = {'full': 2e-5, 'lora': 5e-4, 'cola': 5e-4}  # Of others, 1e-3.


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  task, size = base_config.choose_variants(variant, *VARIANTS)
  config = base_config.get_config()
  config.task.name = 'bernoulli_lora_jax.tasks.text_classification:make_task'
  config.task.batch_size = 32
  held_out = 'validation_matched' if task == 'mnli' else 'validation'
  columns = dict(zip(TASKS[task], ('text', 'pair'), strict=False))
  config.task.kwargs = config_dict.ConfigDict(
      {
          'model': 'FacebookAI/roberta-base',
          'data': f'nyu-mll/glue/{task}:train',
          'test_data': f'nyu-mll/glue/{task}:{held_out}',
          'columns': columns,
          'pooling': 'cls',
          'head': 'dense',
          'max_length': 128,
      }
  )
  config.update_from_flattened_dict(adapter('bernoulli'))
  config.method.rank = 2
  config.method.select = 'query|value'
  config.method.others = '^classifier'
  config.method.optimizer = 'adamw'
  config.method.period_passes = 1.0
  config.training.num_passes = 1.0 * NUM_LINKS
  config.training.num_evals = NUM_LINKS
  config.training.patience = NUM_LINKS  # Never stops; keeps the best.
  if size == 'smoke':
    config.training.num_steps = 4
    config.training.num_evals = 2
  return config


def adapter(name: str) -> dict[str, object]:
  """Returns the overrides of a method with factors."""
  return {
      'method.mode': 'adapter',
      'method.name': name,
      'method.learning_rate': RATES.get(name, 1e-3),
  }


def sweep():
  """Returns the family with three seeds."""
  methods: list[dict[str, object]] = [
      {
          'method.mode': 'gradient',
          'method.name': 'full',
          'method.train_others': True,
          'method.learning_rate': RATES['full'],
      }
  ]
  methods += [adapter(name) for name in methods_lib.ADAPTERS]
  return [
      {**method, 'seed': seed}
      for method in methods
      for seed in range(NUM_SEEDS)
  ]
