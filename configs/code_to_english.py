r"""A decoder that knows code learns English: what it learns, what it forgets.

A decoder of random weights, pre-trained on the sources of Python's standard library
(`experiments/code_to_english.py`), is fine-tuned to its documentation. Methods train
the same numbers a step: a chain of rank r as many as LoRA and COLA of rank r / 2.
validation_loss is of the English, watched_loss of code that was not pre-trained on;
both in nats a token.

  python experiments/code_to_english.py corpora --output=runs/code_to_english/corpora
  python experiments/code_to_english.py pretrain --size=small \
      --corpora=runs/code_to_english/corpora --output=runs/code_to_english/small
  python launch/sweep.py --config=configs/code_to_english.py:small \
      --workdir=runs/code_to_english/sweep
  python launch/report.py runs/code_to_english/sweep --metric=validation_loss
  python launch/report.py runs/code_to_english/sweep --metric=watched_loss

Variants: small (full fine-tuning, LoRA and Bernoulli-LoRA, one seed, two CPU cores),
medium (one GPU; the corpora with --tests: all methods, two ranks, three rates or
four, three seeds; docs/evidence.md has 99 of these 120 runs, which took 15 minutes of
an H100, compilation included); smoke (a few steps). Other folders:
--config.task.kwargs.model, .data, .eval_data and .watch_data.
"""

from ml_collections import config_dict

from bernoulli_lora_jax.training import base_config

FOLDER = 'runs/code_to_english'
# Of the trained rank of a chain. All layers together, a chain trains r n numbers a
# matrix on the left and r m on the right: 10.5 and 8.75 r d a layer here, where
# Bernoulli-LoRA trains 9.625 r d in the mean, and LoRA r (m + n).
PARTS = {
    'lora': 1 / 2,
    'cola': 1 / 2,
    'rac_left': 9.625 / 10.5,
    'rac_right': 9.625 / 8.75,
    'bernoulli': 1.0,
}
LORAS = ('lora', 'cola')
# The last of full fine-tuning and of chains are newer than the study in
# docs/evidence.md, where the third was their best.
FULL_RATES = (3e-4, 1e-3, 3e-3, 8e-3)
# {rank of a chain: rates of LoRA and COLA, whose product is scaled by 2, and of
# chains}.
RATES = {
    16: ((2e-3, 5e-3, 1.2e-2), (4e-3, 1e-2, 2.5e-2, 6e-2)),
    128: ((1e-3, 2.5e-3, 6e-3), (1e-3, 3e-3, 8e-3, 2e-2)),
}
VARIANTS = (('small', 'medium'), ('', 'smoke'))


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  size, length = base_config.choose_variants(variant, *VARIANTS)
  config = base_config.get_config()
  config.task.name = 'bernoulli_lora_jax.tasks.language_model:make_task'
  config.task.batch_size = 8  # Rows.
  config.task.kwargs = config_dict.ConfigDict(
      {
          'kind': 'language_model',
          'model': f'{FOLDER}/{size}',
          'data': f'{FOLDER}/corpora/english_train.jsonl',
          'eval_data': f'{FOLDER}/corpora/english_validation.jsonl',
          'watch_data': f'{FOLDER}/corpora/code_validation.jsonl',
          'max_length': 128,
          'in_memory': True,  # So that runs of a sweep train together.
          'compute_dtype': 'float32',
      }
  )
  config.method.optimizer = 'adam'
  config.method.period = 100
  config.method.schedule = 'cosine'
  config.method.warmup_steps = 10
  config.update_from_flattened_dict(adapter('bernoulli', 16))
  config.training.num_steps = 600
  config.training.num_evals = 3
  if size == 'medium':
    config.task.batch_size = 16
    config.task.kwargs.max_length = 512
    config.task.kwargs.compute_dtype = 'bfloat16'
    config.training.num_steps = 300
  if length == 'smoke':
    config.task.batch_size = 2
    config.task.kwargs.max_length = 64
    config.method.period = 2
    config.method.warmup_steps = 0
    config.training.num_steps = 4
    config.training.num_evals = 2
  return config


def full() -> dict[str, object]:
  """Returns the overrides of full fine-tuning, embedding and norms included."""
  return {
      'method.mode': 'gradient',
      'method.name': 'full',
      'method.train_others': True,
      'method.learning_rate': FULL_RATES[1],
  }


def adapter(name: str, rank: int) -> dict[str, object]:
  """Returns the overrides of a method at the cost of a chain of some rank."""
  own_rank = round(PARTS[name] * rank)
  overrides: dict[str, object] = {
      'method.mode': 'adapter',
      'method.name': name,
      'method.rank': own_rank,
      'method.learning_rate': RATES[rank][0 if name in LORAS else 1][1],
  }
  if name in LORAS:
    overrides['method.alpha'] = 2.0 * own_rank
  return overrides


def sweep(variant: str = ''):
  """Returns each method at each rate with each seed."""
  size, _ = base_config.choose_variants(variant, *VARIANTS)
  if size == 'small':
    # Of the rates below and, of LoRA, 3e-2, the best after 200 steps on the English
    # held out.
    best = {'lora': RATES[16][0][2], 'bernoulli': RATES[16][1][2]}
    runs = [
        {**adapter(name, 16), 'method.learning_rate': rate}
        for name, rate in best.items()
    ]
    return [full(), *runs]
  runs = [{**full(), 'method.learning_rate': rate} for rate in FULL_RATES]
  for rank, (lora_rates, chain_rates) in RATES.items():
    for name in PARTS:
      rates = lora_rates if name in LORAS else chain_rates
      runs += [
          {**adapter(name, rank), 'method.learning_rate': rate}
          for rate in rates
      ]
  return [{**run, 'seed': seed} for run in runs for seed in range(3)]
