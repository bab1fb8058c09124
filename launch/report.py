"""Prints a table of finished runs and writes figures.

  python launch/report.py runs/digits --figures=figures
  python launch/report.py runs/mnist --published=configs/mnist.py --csv=mnist.csv

The same as `blora report`; --help lists the flags.
"""

import sys

from bernoulli_lora_jax import cli

if __name__ == '__main__':
  cli.main(['report', *sys.argv[1:]])
