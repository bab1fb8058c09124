"""Trains one run.

  python launch/train.py --config=configs/digits.py:page --workdir=runs/page
  python launch/train.py --config=configs/mnist.py --workdir=runs/mnist \
      --config.method.rank=8

The part of --config after the colon is a variant (several with commas); the
config's header lists them. Every field of the config can be set by a flag. A
second call with the same workdir resumes, or prints the summary of a finished
run. One process trains in a workdir at a time. SIGTERM and SIGINT (Ctrl-C) end a
run after its next dispatch with a checkpoint.
"""

from absl import flags
import jax
from ml_collections import config_flags

from bernoulli_lora_jax.training import cli
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import labels
from bernoulli_lora_jax.training import reporting

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, with :variant.', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the run.', required=True
)
flags.mark_flag_as_required('config')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise ValueError(f'Expected flags only, got {argv[1:]}.')
  config = _CONFIG.value
  experiment.check_workdir(config, _WORKDIR.value)
  jax.config.update('jax_enable_x64', config.x64)
  program = experiment.make_program(config)
  print(reporting.table(experiment.selection(config, program.task)))
  print(
      f'{labels.name(config.to_dict())} on {config.task.name}:'
      f' {program.settings.num_steps} steps on {jax.devices()[0].device_kind}'
  )
  summary = experiment.train(config, _WORKDIR.value, program)
  print(
      reporting.table([{'result': k, 'value': v} for k, v in summary.items()])
  )


if __name__ == '__main__':
  cli.run(main)
