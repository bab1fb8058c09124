"""Handwritten digits bundled with scikit-learn: 1,797 images of 8 x 8 pixels.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI.
"""

import numpy as np

from bernoulli_lora_jax.tasks import classification


def load(seed: int) -> classification.Images:
  """Returns the digits in three parts: 60%, 20%, 20%.

  Args:
    seed: of the random split.

  Returns:
    `Images`, standardised by the mean and deviation of the training pixels.
  """
  from sklearn import datasets  # Takes seconds.

  x, y = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(seed).permutation(len(y))
  bounds = np.array([0, 60, 80, 100]) * len(y) // 100
  train = x[order[: bounds[1]]]
  x = ((x - train.mean()) / train.std()).astype(np.float32)
  splits = {}
  for i, split in enumerate(('train', 'validation', 'test')):
    rows = order[bounds[i] : bounds[i + 1]]
    splits[split] = (x[rows], y[rows])
  return classification.Images(splits=splits, num_classes=10)
