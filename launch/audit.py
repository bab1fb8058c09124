"""Audits a finished run: estimates its constants and checks its guarantee.

  python launch/train.py --config=configs/linear_regression.py --workdir=runs/gd
  python launch/audit.py runs/gd --figures=figures

The same as `blora audit`; --help lists the flags.
"""

import sys

from bernoulli_lora_jax import cli

if __name__ == '__main__':
  cli.main(['audit', *sys.argv[1:]])
