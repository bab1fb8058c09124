r"""Trains one run.

  python launch/train.py --config=configs/digits.py:page --workdir=runs/page
  python launch/train.py --config=configs/mnist.py --workdir=runs/mnist \
      --config.method.rank=8

The same as `blora train`; --help lists the flags.
"""

import sys

from bernoulli_lora_jax import cli

if __name__ == '__main__':
  cli.main(['train', *sys.argv[1:]])
