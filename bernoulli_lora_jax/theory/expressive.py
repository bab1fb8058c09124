"""Low-rank adapters that turn a frozen ReLU net into a given one.

Symbols: D width, L layers of the frozen net with kernels K_l, Lbar layers of
the target with kernels T_i, R rank, P layers of a part, A_l = K_l + Delta_l,
Delta_l = left_l right_l, E = T - K_1 ... K_P the discrepancy of a part and E_l
the l-th slice of R terms of one singular value decomposition of E. Kernels are
stored (fan_in, fan_out), the transposes of the reference's W, so a part maps x
to x K_1 ... K_P and

  Delta_l = (A_1 ... A_{l-1})^-1 E_l (K_{l+1} ... K_P)^-1,

for which A_1 ... A_P = K_1 ... K_P + E_1 + ... + E_P telescopes. Any Delta_l of
rank R change the product by a matrix of rank at most R P, so by Eckart and
Young no other adapters have a product nearer to T.

Everything is NumPy in float64 whatever jax's precision is.

Reference: Zeng and Lee, The expressive power of low-rank adaptation, arXiv
2310.17513.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from bernoulli_lora_jax import checks

Pair = dict[str, np.ndarray]  # 'left': (D, R), 'right': (R, D).

_EPS = float(np.finfo(np.float64).eps)


class Layer(NamedTuple):
  """A dense layer, h -> h kernel + bias."""

  kernel: Any  # shape=(D, D), (fan_in, fan_out); any real dtype.
  bias: Any  # shape=(D,).


class Adapted(NamedTuple):
  """What `adapt` builds for each frozen layer."""

  adapters: tuple[Pair, ...]  # Delta_l = left @ right.
  biases: tuple[
      np.ndarray, ...
  ]  # shape=(D,) each; they replace the frozen ones.
  parts: tuple[range, ...]  # Frozen layers of each target layer.
  condition: float  # Largest condition number of the products inverted.
  bound: float  # Of the inputs, |x_j| <= bound.


class Report(NamedTuple):
  """How near an adapted net is to its target."""

  condition: float  # Largest condition number of the products inverted.
  linear_errors: tuple[float, ...]  # ||A_1 ... A_P - T||_F of each part.
  expected_errors: tuple[float, ...]  # The same by `linear_error`.
  error: float  # Largest absolute difference of the nets on the inputs.


def rank_threshold(width: int, depth: int, target_depth: int) -> int:
  """Returns the rank from which a frozen net equals any target.

  Args:
    width: D >= 1 of both nets.
    depth: L, layers of the frozen net.
    target_depth: Lbar in [1, L], layers of the target.

  Returns:
    ceil(D / floor(L / Lbar)).

  Raises:
    ValueError: a number outside its range.

  References:
    Zeng and Lee, The expressive power of low-rank adaptation, arXiv 2310.17513,
    section 3.
  """
  checks.at_least(1, width=width)
  _check_depths(depth, target_depth)
  return math.ceil(width / (depth // target_depth))


def transformer_rank(embedding_size: int) -> int:
  """Returns ceil(d / 2), which suffices for transformers of embedding size d.

  A statement, with no construction here: a frozen transformer with adapters of
  this rank equals any target of the same size, its products non-singular. The
  scores and the values of a head depend on products of two matrices, parts of
  P = 2.

  Args:
    embedding_size: d >= 1.

  Returns:
    ceil(d / 2).

  Raises:
    ValueError: embedding_size < 1.

  References:
    Zeng and Lee, The expressive power of low-rank adaptation, arXiv 2310.17513,
    section 4.
  """
  checks.at_least(1, embedding_size=embedding_size)
  return math.ceil(embedding_size / 2)


def linear_error(discrepancy: Any, rank: int, num_layers: int) -> float:
  """Returns the least ||A_1 ... A_P - T||_F over adapters of rank R.

  Args:
    discrepancy: E = T - K_1 ... K_P, shape (m, n).
    rank: R >= 0 of each adapter.
    num_layers: P >= 1.

  Returns:
    sqrt(sum_{k > R P} sigma_k(E)^2); zero from R P >= min(m, n) on.

  Raises:
    ValueError: a number outside its range, or E is no finite matrix.
  """
  checks.at_least(0, rank=rank)
  checks.at_least(1, num_layers=num_layers)
  matrix = np.asarray(discrepancy, np.float64)
  if matrix.ndim != 2:
    raise ValueError(
        'Expected discrepancy of two dimensions, got'
        f' discrepancy.shape={matrix.shape}.'
    )
  _check_finite(discrepancy=matrix)
  values = np.linalg.svd(matrix, compute_uv=False)
  return float(np.linalg.norm(values[rank * num_layers :]))


def product_adapters(
    kernels: Sequence[Any], target: Any, *, rank: int
) -> tuple[tuple[Pair, ...], float]:
  """Returns the adapters of one part, whose product is nearest to the target.

  Args:
    kernels: K_1, ..., K_P, each (D, D), in the order in which they are applied.
    target: T, (D, D).
    rank: R in [1, D].

  Returns:
    (pairs, condition): a pair a layer, of shapes (D, R) and (R, D) with zeros
    where a slice has fewer terms, and the largest condition number of the
    products inverted, 1 if there are none. ||A_1 ... A_P - T||_F is
    `linear_error`, to rounding magnified by `condition`.

  Raises:
    ValueError: rank outside its range, shapes that differ, values that are not
      finite or a product to be inverted that is singular in float64.
  """
  target = np.asarray(target, np.float64)
  kernels = [np.asarray(kernel, np.float64) for kernel in kernels]
  if not kernels:
    raise ValueError('Expected at least one kernel, got kernels=[].')
  if target.ndim != 2 or target.shape[0] != target.shape[1]:
    raise ValueError(
        f'Expected target of shape (D, D), got target.shape={target.shape}.'
    )
  width = len(target)
  for i, kernel in enumerate(kernels):
    _check_shape(f'kernels[{i}]', kernel, (width, width))
  _check_finite(target=target, kernels=np.stack(kernels))
  _check_rank(rank, width)

  suffixes = [
      np.eye(width)
  ]  # K_{l+1} ... K_P of each layer, the last one first.
  for kernel in kernels[::-1]:
    suffixes.append(kernel @ suffixes[-1])
  product = suffixes.pop()
  suffixes.reverse()
  u, values, vt = np.linalg.svd(target - product)
  # Terms that are rounding are no terms: a product that only they would need
  # may be singular.
  scale = np.linalg.norm(product, 2) + np.linalg.norm(target, 2)
  num_terms = int(np.sum(values > width * _EPS * scale))
  prefix = np.eye(width)  # A_1 ... A_{l-1}, as rounded.
  pairs, condition = [], 1.0
  for i, (kernel, suffix) in enumerate(zip(kernels, suffixes, strict=True)):
    pair = {'left': np.zeros((width, rank)), 'right': np.zeros((rank, width))}
    terms = slice(i * rank, min((i + 1) * rank, num_terms))
    count = terms.stop - terms.start
    if count > 0:
      condition = max(
          condition,
          _condition(prefix, f'adapted kernels before layer {i}'),
          _condition(suffix, f'kernels after layer {i}'),
      )
      root = np.sqrt(values[terms])
      pair['left'][:, :count] = np.linalg.solve(prefix, u[:, terms] * root)
      pair['right'][:count] = np.linalg.solve(
          suffix.T, (root[:, None] * vt[terms]).T
      ).T
    prefix = prefix @ (kernel + pair['left'] @ pair['right'])
    pairs.append(pair)
  return tuple(pairs), condition


def adapt(
    frozen: Sequence[Layer],
    target: Sequence[Layer],
    *,
    rank: int,
    bound: float,
) -> Adapted:
  """Returns adapters and biases that turn a frozen net into the target.

  Part i of the frozen net stands for layer i of the target. Each part has
  floor(L / Lbar) layers, the last one also the L mod Lbar that remain; slices
  that come to an end leave the part's later layers as they are. The biases keep
  every ReLU inside a part active on the box |x_j| <= bound: with the inputs of
  the part in a box of centre c and radius s, entrywise |(x - c) B| <= s |B| for
  B = A_1 ... A_l, which needs no detour through the layers between. The box of
  the part's outputs, through the ReLU, is that of the next part's inputs.

  Args:
    frozen: L layers of width D.
    target: Lbar <= L layers of the same width.
    rank: R in [1, D].
    bound: of |x_j|, > 0 and finite; the ball of this radius is inside.

  Returns:
    `Adapted`. With rank >= `rank_threshold` the nets are equal on the box, to
    rounding magnified by the condition number, with or without a ReLU after the
    last layer; below it each part's product has the error `linear_error`.
    Rounding alone was 1e-10 or less for orthogonal frozen kernels in parts of 4
    layers; for Gaussian ones of width 32 in parts of 3 layers it has median
    2e-9, and 2 of 400 draws were above 1e-5, with condition numbers of 7e6 and
    3e7.

  Raises:
    ValueError: a number outside its range, a target deeper than the frozen net,
      shapes that differ, values that are not finite or a product to be inverted
      that is singular in float64.

  References:
    Zeng and Lee, The expressive power of low-rank adaptation, arXiv 2310.17513,
    section 3.
  """
  frozen, target, width = _nets(frozen, target)
  _check_rank(rank, width)
  checks.within('(0, inf)', bound=bound)
  parts = _parts(len(frozen), len(target))
  centre, radius = np.zeros(width), np.full(width, float(bound))
  adapters, biases, condition = [], [], 1.0
  for part, layer in zip(parts, target, strict=True):
    kernels = [frozen[i].kernel for i in part]
    pairs, worst = product_adapters(kernels, layer.kernel, rank=rank)
    adapters += pairs
    condition = max(condition, worst)
    product, shift = np.eye(width), np.zeros(width)  # h_l = x B + shift.
    for kernel, pair in zip(kernels, pairs, strict=True):
      adapted = kernel + pair['left'] @ pair['right']
      product, moved = product @ adapted, shift @ adapted
      # Least shift with x B + shift >= 0 on the box; where rounding breaks it,
      # the ReLU costs no more than that rounding.
      shift = radius @ np.abs(product) - centre @ product
      biases.append(shift - moved)
    biases[-1] = layer.bias - moved  # The part's last ReLU is the target's.
    middle, spread = centre @ product + layer.bias, radius @ np.abs(product)
    low, high = np.maximum(middle - spread, 0), np.maximum(middle + spread, 0)
    centre, radius = (low + high) / 2, (high - low) / 2
  return Adapted(tuple(adapters), tuple(biases), parts, condition, float(bound))


def merge(frozen: Sequence[Layer], adapted: Adapted) -> tuple[Layer, ...]:
  """Returns the layers K_l + left_l right_l with the new biases.

  Raises:
    ValueError: another number of layers than was adapted.
  """
  if len(frozen) != len(adapted.adapters):
    raise ValueError(
        f'Expected {len(adapted.adapters)} frozen layers, as adapted, got'
        f' {len(frozen)}.'
    )
  return tuple(
      Layer(
          np.asarray(layer.kernel, np.float64) + pair['left'] @ pair['right'],
          bias,
      )
      for layer, pair, bias in zip(
          frozen, adapted.adapters, adapted.biases, strict=True
      )
  )


def apply(
    layers: Sequence[Layer], inputs: Any, *, last_relu: bool = False
) -> np.ndarray:
  """Returns the outputs of a net, ReLU between its layers.

  Args:
    layers: the net.
    inputs: (..., D).
    last_relu: another ReLU after the last layer.

  Returns:
    (..., D) in float64.
  """
  x = np.asarray(inputs, np.float64)
  for i, (kernel, bias) in enumerate(layers):
    x = x @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    if last_relu or i < len(layers) - 1:
      x = np.maximum(x, 0)
  return x


def report(
    frozen: Sequence[Layer],
    target: Sequence[Layer],
    adapted: Adapted,
    inputs: Any,
    *,
    last_relu: bool = False,
) -> Report:
  """Returns how near the adapted net is to the target.

  Args:
    frozen: as given to `adapt`.
    target: as given to `adapt`.
    adapted: from `adapt`.
    inputs: (num_samples, D), each |x_j| <= adapted.bound.
    last_relu: as in `apply`.

  Returns:
    `Report`.

  Raises:
    ValueError: inputs of another shape or outside the bound.
  """
  frozen, target, width = _nets(frozen, target)
  inputs = np.asarray(inputs, np.float64)
  if inputs.ndim != 2 or inputs.shape[1] != width or not len(inputs):
    raise ValueError(
        f'Expected inputs of shape (num_samples, {width}), got'
        f' inputs.shape={inputs.shape}.'
    )
  largest = np.max(np.abs(inputs))
  if not largest <= adapted.bound:
    raise ValueError(
        f'Expected max |inputs| <= {adapted.bound}, got max |inputs|={largest}.'
    )
  merged = merge(frozen, adapted)
  rank = adapted.adapters[0]['left'].shape[1]
  errors, expected = [], []
  for part, layer in zip(adapted.parts, target, strict=True):
    gaps = [
        layer.kernel
        - functools.reduce(np.matmul, [net[i].kernel for i in part])
        for net in (merged, frozen)
    ]
    errors.append(float(np.linalg.norm(gaps[0])))
    expected.append(linear_error(gaps[1], rank, len(part)))
  outputs = [
      apply(net, inputs, last_relu=last_relu) for net in (merged, target)
  ]
  return Report(
      adapted.condition,
      tuple(errors),
      tuple(expected),
      float(np.max(np.abs(outputs[0] - outputs[1]))),
  )


def _parts(depth: int, target_depth: int) -> tuple[range, ...]:
  """Returns the frozen layers of each target layer."""
  length = depth // target_depth
  starts = [i * length for i in range(target_depth)] + [depth]
  return tuple(range(*pair) for pair in zip(starts, starts[1:], strict=False))


def _condition(matrix: np.ndarray, name: str) -> float:
  """Returns the condition number of a product, refused where it is singular."""
  condition = float(np.linalg.cond(matrix))
  if not condition < 1 / (len(matrix) * _EPS):
    raise ValueError(
        f'Expected a non-singular product of the {name}, got'
        f' condition={condition:.3g}.'
    )
  return condition


def _nets(
    frozen: Sequence[Layer], target: Sequence[Layer]
) -> tuple[list[Layer], list[Layer], int]:
  """Returns both nets in float64, checked, and their width."""
  _check_depths(len(frozen), len(target))
  width = np.shape(frozen[0].kernel)[0] if np.ndim(frozen[0].kernel) else 0
  nets = []
  for name, net in (('frozen', frozen), ('target', target)):
    layers = []
    for i, layer in enumerate(net):
      kernel = np.asarray(layer.kernel, np.float64)
      bias = np.asarray(layer.bias, np.float64)
      _check_shape(f'{name}[{i}].kernel', kernel, (width, width))
      _check_shape(f'{name}[{i}].bias', bias, (width,))
      _check_finite(
          **{f'{name}[{i}].kernel': kernel, f'{name}[{i}].bias': bias}
      )
      layers.append(Layer(kernel, bias))
    nets.append(layers)
  return nets[0], nets[1], width


def _check_depths(depth: int, target_depth: int) -> None:
  is_whole = all(
      isinstance(x, (int, np.integer)) for x in (depth, target_depth)
  )
  if not (is_whole and 1 <= target_depth <= depth):
    raise ValueError(
        'Expected 1 <= target_depth <= depth in whole numbers, got'
        f' target_depth={target_depth},'
        f' depth={depth}.'
    )


def _check_rank(rank: int, width: int) -> None:
  if not (isinstance(rank, (int, np.integer)) and 1 <= rank <= width):
    raise ValueError(f'Expected a whole rank in [1, {width}], got rank={rank}.')


def _check_shape(name: str, x: np.ndarray, shape: tuple[int, ...]) -> None:
  if x.shape != shape or not x.size:
    raise ValueError(f'Expected {name} of shape {shape}, got {x.shape}.')


def _check_finite(**arrays: np.ndarray) -> None:
  for name, x in arrays.items():
    if not np.all(np.isfinite(x)):
      raise ValueError(f'Expected finite {name}, got {name} with inf or NaN.')
