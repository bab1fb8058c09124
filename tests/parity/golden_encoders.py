"""Writes golden/encoders.npz: what PyTorch's own models compute.

  python tests/parity/golden_encoders.py

with the extra `parity` installed. `encoder_test` compares ours with it.
"""

import pathlib
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import encoder_reference
import encoders


def main():
  stored = {}
  for name, raw in encoders.CONFIGS.items():
    with tempfile.TemporaryDirectory() as scratch:
      folder = encoders.write(scratch, name)
      found, grads = encoder_reference.results(folder, encoders.batch(raw))
    end = 'encoder.layer.1.attention.self.query.weight'
    (kernel,) = (grad for k, grad in grads.items() if k.endswith(end))
    for key, value in {**found, 'grad': kernel.T}.items():
      stored[f'{name}/{key}'] = value
  path = pathlib.Path(__file__).parents[1] / 'golden' / 'encoders.npz'
  np.savez_compressed(path, **stored)


if __name__ == '__main__':
  main()
