"""The chain on linear regression as a plain NumPy loop.

Written from the mathematics (A1, E1-E4, X1) without the library: the reference
that tests hold the library to, and that its wall time stands beside.
"""

from collections.abc import Callable, Iterator

import numpy as np

# (left?, Q) of a step: Q is (m, r) on the left, (n, r) on the right.
Draw = tuple[bool, np.ndarray]


def draws(
    rng: np.random.Generator, shape: tuple[int, int], rank: int, prob: float
) -> Iterator[Draw]:
  """Yields coin and orthonormal basis of every step."""
  while True:
    is_left = bool(rng.random() < prob)
    side = shape[0] if is_left else shape[1]
    yield is_left, np.linalg.qr(rng.normal(size=(side, min(rank, side))))[0]


def gradient(
    w: np.ndarray, x: np.ndarray, y: np.ndarray, lam: float
) -> np.ndarray:
  """Returns grad of (1/2b)||X w - y||^2 + lam sum w^2/(1 + w^2), flat."""
  return x.T @ (x @ w - y) / len(y) + lam * 2 * w / (1 + w**2) ** 2


def run(
    x: np.ndarray,
    y: np.ndarray,
    lam: float,
    start: np.ndarray,
    *,
    estimator: str,
    stepsize: float,
    steps: Iterator[Draw],
    batches: Iterator[np.ndarray],
    coins: Iterator[bool],
    num_steps: int,
    momentum: float = 0.9,
    each: Callable[[int, np.ndarray], None] = lambda step, w: None,
) -> np.ndarray:
  """Returns W after num_steps links of one step each.

  Args:
    x: (N, d).
    y: (N,).
    lam: of the regulariser.
    start: W_0, (m, n).
    estimator: 'gd', 'sgd', 'page' or 'mvr'.
    stepsize: gamma.
    steps: coin and basis of each step, see `draws`.
    batches: rows of each step's minibatch.
    coins: of PAGE, True for a full gradient; one a step from the second on.
    num_steps: T.
    momentum: 1 - b of MVR.
    each: called before every step, with its number and W.
  """
  w, shape = start.ravel().copy(), start.shape
  full = lambda w: gradient(w, x, y, lam)
  part = lambda w, rows: gradient(w, x[rows], y[rows], lam)
  old, g = w, np.zeros_like(w)
  for step in range(num_steps):
    each(step, w.reshape(shape))
    rows = next(batches) if estimator != 'gd' else None
    if estimator == 'gd':
      g = full(w)
    elif estimator == 'sgd':
      g = part(w, rows)
    elif estimator == 'mvr':
      g = part(w, rows) + (step > 0) * momentum * (g - part(old, rows))
    elif step == 0 or next(coins):
      g = full(w)
    else:
      g = g + part(w, rows) - part(old, rows)
    old = w
    is_left, q = next(steps)
    matrix = g.reshape(shape)
    moved = q @ (q.T @ matrix) if is_left else (matrix @ q) @ q.T
    w = w - stepsize * moved.ravel()
  return w.reshape(shape)
