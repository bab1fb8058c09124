"""Trains every run of a config's sweep().

  python launch/sweep.py --config=configs/digits.py --workdir=runs/digits

Each run has a directory of its own below --workdir, named by its overrides; a
second call skips the finished ones. Runs of a small task that differ in the
seed, in prob or in the learning rate alone are trained in one compiled program,
as many at a time as the device holds (--config.training.group_size=1: one after
another). `launch/report.py` makes the tables and figures.
"""

from absl import flags
import jax
from ml_collections import config_flags

from bernoulli_lora_jax.training import cli
from bernoulli_lora_jax.training import directory
from bernoulli_lora_jax.training import sweep

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file with a function sweep().', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the runs.', required=True
)
flags.mark_flag_as_required('config')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise ValueError(f'Expected flags only, got {argv[1:]}.')
  config = _CONFIG.value
  directory.check(_WORKDIR.value)
  jax.config.update('jax_enable_x64', config.x64)
  filename = config_flags.get_config_filename(flags.FLAGS['config'])
  path, _, variant = filename.partition(':')
  grid = sweep.load(path, variant)
  given = config_flags.get_override_values(flags.FLAGS['config'])
  sweep.check_flags(grid, given)
  sweep.train(config, grid, _WORKDIR.value, progress=config.training.progress)


if __name__ == '__main__':
  cli.run(main)
