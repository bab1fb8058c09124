"""Writes golden/decoders.npz: what PyTorch's own models compute.

  python tests/parity/golden_decoders.py

with the extra `parity` installed. `decoder_test` compares ours with it.
"""

import pathlib
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import decoders
import reference


def main():
  stored = {}
  for name in decoders.CONFIGS:
    with tempfile.TemporaryDirectory() as scratch:
      folder = decoders.write(scratch, name)
      for key, value in reference.results(folder, decoders.tokens(24)).items():
        stored[f'{name}/{key}'] = value
  path = pathlib.Path(__file__).parents[1] / 'golden' / 'decoders.npz'
  path.parent.mkdir(exist_ok=True)
  np.savez_compressed(path, **stored)


if __name__ == '__main__':
  main()
