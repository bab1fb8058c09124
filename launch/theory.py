r"""The theory console: predict, measure, compare.

  python launch/theory.py bounds --shapes=64x64 --rank=2 --smoothness=3 \
      --initial_gap=1 --steps=100,1000,10000
  python launch/theory.py rates --size=small     # X1: the papers' regression

The same as `blora theory`; --help lists the flags.
"""

import sys

from bernoulli_lora_jax import cli

if __name__ == '__main__':
  cli.main(['theory', *sys.argv[1:]])
