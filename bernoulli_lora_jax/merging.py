"""What a merge does to weights: products, their inverse, reports, extraction.

`factors` is {path: {'left': (*batch, m, r), 'right': (*batch, r, n)}} with the
scale s in the right one (`adapters.scaled`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sharded

Matrices = matrices_lib.Matrices
Pairs = dict[str, dict[str, jax.Array]]
Factors = Mapping[str, Mapping[str, Any]]  # On the host or a device.


def unmerge(params: Any, factors: Pairs, matrices: Matrices | None = None):
  """Returns W - L R, the inverse of a merge up to one rounding of W.

  Args:
    params: merged weights.
    factors: {path: {'left', 'right'}}, the scale in the right one (`scaled`).
    matrices: what is a matrix.

  Raises:
    ValueError: factors of no matrix of params, or of other shapes.
  """
  return _add_products(params, factors, matrices, -1.0)


class Extracted(NamedTuple):
  """The change of one matrix as thin factors."""

  left: np.ndarray  # (*batch, m, r)
  right: np.ndarray  # (*batch, r, n)
  error: float  # ||change - left right||_F / ||change||_F, the largest entry's.


def extract(
    base: Any,
    tuned: Any,
    rank: int,
    matrices: Matrices | None = None,
) -> dict[str, Extracted]:
  """Returns the change between two trees as factors of a rank, by SVD.

  A chain of T links of rank r changes a matrix by rank at most T r: rank =
  min(T r, cap) loses nothing beyond the cap and the rounding of the weights.

  Args:
    base: params before.
    tuned: params after, of the same paths and shapes; the order and the kind of
      its containers do not matter.
    rank: of the factors, clipped to the sides of each matrix.
    matrices: what is a matrix.

  Returns:
    {path: Extracted} with left right the best approximation of its rank.

  Raises:
    ValueError: paths or shapes that differ, with the path and both.
  """
  checks.integers(1, rank=rank)
  check_shapes(base, tuned)
  tuned = matrices_lib.align(base, tuned, ('base', 'tuned'))
  old, new = jax.tree.leaves(base), jax.tree.leaves(tuned)
  result = {}
  for matrix in matrices_lib.find(base, matrices):
    wide = matrices_lib.wide(matrix.dtype)
    # From the host: nothing of an SVD is sharded.
    view = lambda leaf, m=matrix, t=wide: m.view(
        jnp.asarray(jax.device_get(leaf))
    ).astype(t)
    change = view(new[matrix.index]) - view(old[matrix.index])
    u, s, vt = jnp.linalg.svd(change, full_matrices=False)
    r = min(rank, matrix.m, matrix.n)
    total = jnp.sqrt(jnp.sum(s**2, -1))
    lost = jnp.sqrt(jnp.sum(s[..., r:] ** 2, -1))
    error = jnp.where(total > 0, lost / jnp.where(total > 0, total, 1), 0)
    root = jnp.sqrt(s[..., :r])
    result[matrix.path] = Extracted(
        np.asarray(u[..., :r] * root[..., None, :]),
        np.asarray(root[..., None] * vt[..., :r, :]),
        float(jnp.max(error)),
    )
  return result


def merge_report(
    params: Any,
    factors: Pairs,
    matrices: Matrices | None = None,
) -> list[dict[str, Any]]:
  """Returns how inexact merging these factors to nearest is, a row a layer.

  Args:
    params: base weights.
    factors: {path: {'left', 'right'}}, the scale in the right one (`scaled`).
    matrices: what is a matrix.

  Returns:
    Rows {'matrix', 'layer', 'largest error', 'relative error', 'update lost'}:
    the largest |error| of an entry, the largest |error| / |W + L R|, and
    ||error||_F / ||L R||_F, the part of the update that the rounding replaces.

  Raises:
    ValueError: a factor that is not finite, of no matrix of params or of another
      shape, by path.
  """
  check_factors(factors)
  leaves = jax.tree.leaves(params)
  rows = []
  for matrix in _matrices_of(params, factors, matrices):
    if matrix.path not in factors:
      continue
    left, right = (
        np.asarray(factors[matrix.path][side], np.float64)
        for side in ('left', 'right')
    )
    update = left @ right
    weight = matrix.view(jnp.asarray(leaves[matrix.index]))
    exact = np.asarray(weight, np.float64) + update
    total = weight.astype(product(factors[matrix.path]).dtype)
    total = total + product(factors[matrix.path])
    error = np.abs(np.asarray(total.astype(matrix.dtype), np.float64) - exact)
    size = np.abs(exact)
    norm = np.linalg.norm(update, axis=(-2, -1))
    lost = np.linalg.norm(error, axis=(-2, -1))
    for place in np.ndindex(*matrix.batch):
      ratio = np.divide(
          error[place],
          size[place],
          where=size[place] > 0,
          out=np.zeros_like(error[place]),
      )
      rows.append(
          {
              'matrix': matrix.path,
              'layer': int(matrix.entries[place]),
              'largest error': float(error[place].max()),
              'relative error': float(ratio.max()),
              'update lost': float(lost[place] / norm[place])
              if norm[place] > 0
              else 0.0,
          }
      )
  return rows


def check_factors(factors: Factors) -> None:
  """Raises ValueError for a factor that is not finite, by path and side."""
  finite = {
      p: {s: all_finite(x) for s, x in f.items()} for p, f in factors.items()
  }
  for path, pair in jax.device_get(finite).items():  # All at once.
    for side, is_finite in pair.items():
      if not is_finite:
        raise ValueError(
            f'Expected finite factors, got NaN or infinity in the {side} factor'
            f' of {path}: nothing was merged.'
        )


@jax.jit
def all_finite(leaf: jax.Array) -> jax.Array:
  """Returns whether all numbers of a leaf are finite, shape ()."""
  return jnp.all(jnp.isfinite(leaf))


def check_shapes(expected: Any, given: Any) -> None:
  """Raises ValueError unless two trees have the same paths and shapes."""
  flat = lambda tree: {
      path: tuple(np.shape(leaf))
      for path, leaf in matrices_lib.named_leaves(tree).items()
  }
  old, new = flat(expected), flat(given)
  for path in sorted(old.keys() | new.keys()):
    if old.get(path) != new.get(path):
      raise ValueError(
          f'Expected {path} of shape {old.get(path)}, got'
          f' {new.get(path, "none")}: another model.'
      )


def product(pair: Mapping[str, jax.Array]) -> jax.Array:
  """Returns L R in the factors' dtype, at full precision."""
  return jnp.matmul(
      pair['left'], pair['right'], precision=jax.lax.Precision.HIGHEST
  )


def entry_by_entry(
    add: Callable[..., tuple[jax.Array, jax.Array | None]],
    weight: jax.Array,
    pair: Mapping[str, jax.Array],
    remainder: jax.Array | None,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns what `add` makes of each matrix of a stack, in place.

  The product of a whole stack of layers would be a second W.

  Args:
    add: (W, {'left', 'right'}, remainder, key) of one matrix -> (W, remainder).
    weight: (*batch, m, n).
    pair: left (*batch, m, r), right (*batch, r, n).
    remainder: (*batch, m, n) or None.
    keys: shape=batch.
  """
  shape, pair = weight.shape, dict(pair)
  if len(shape) == 2:
    return add(weight, pair, remainder, keys)
  flat = lambda x: x.reshape(-1, *x.shape[-2:])
  pairs, keys = jax.tree.map(flat, pair), keys.reshape(-1)

  def turn(i, moved):
    weight, *rest = (x[i] for x in moved)
    one = jax.tree.map(lambda x: x[i], pairs)
    made = add(weight, one, rest[0] if rest else None, keys[i])
    made = [x for x in made if x is not None]
    return [x.at[i].set(y) for x, y in zip(moved, made, strict=True)]

  moved = [flat(x) for x in (weight, remainder) if x is not None]
  moved = jax.lax.fori_loop(0, len(keys), turn, moved)
  total, *rest = (x.reshape(shape) for x in moved)
  return total, rest[0] if rest else None


def _matrices_of(
    params: Any, factors: Pairs, matrices: Matrices | None
) -> list[matrices_lib.Matrix]:
  """Returns the matrices of params; raises for factors that belong to none."""
  found = matrices_lib.find(params, matrices)
  owners = {matrix.path: matrix for matrix in found}
  for path, pair in factors.items():
    if path not in owners:
      raise ValueError(
          f'Expected the factors of {path} to belong to a matrix of params; the'
          f' matrices are {sorted(owners)}.'
      )
    m = owners[path]
    rank = np.shape(pair['left'])[-1:]
    expected = (*m.batch, m.m, *rank), (*m.batch, *rank, m.n)
    given = np.shape(pair['left']), np.shape(pair['right'])
    if given != expected:
      raise ValueError(
          f'Expected factors of shapes {expected} for {path}, got {given}.'
      )
  return found


def _add_products(
    params: Any, factors: Pairs, matrices: Matrices | None, sign: float
) -> Any:
  """Returns W + sign L R, rounded to nearest."""
  add = lambda params, factors: _added(params, factors, matrices, sign)
  place = lambda: sharded.specs(params)
  return sharded.automatic(add, params, factors, out=place)


def _added(
    params: Any, factors: Pairs, matrices: Matrices | None, sign: float
) -> Any:
  leaves, treedef = jax.tree.flatten(params)
  for matrix in _matrices_of(params, factors, matrices):
    if matrix.path in factors:
      update = sign * product(factors[matrix.path])
      weight = matrix.view(leaves[matrix.index])
      leaves[matrix.index] = matrix.unview(
          (weight.astype(update.dtype) + update).astype(matrix.dtype)
      )
  return treedef.unflatten(leaves)
