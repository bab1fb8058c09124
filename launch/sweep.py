"""Trains every run of a config's sweep().

  python launch/sweep.py --config=configs/digits.py --workdir=runs/digits

The same as `blora sweep`; --help lists the flags.
"""

import sys

from bernoulli_lora_jax import cli

if __name__ == '__main__':
  cli.main(['sweep', *sys.argv[1:]])
