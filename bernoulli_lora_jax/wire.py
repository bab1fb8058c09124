"""Trees as what travels: {path: array}, checked by path where it arrives."""

from collections.abc import Callable, Iterable
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import matrices as matrices_lib

Arrays = dict[str, np.ndarray]
_BITS = 8


def flatten(
    tree: Any, convert: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
  """Returns {path: array} of the leaves that are not None.

  Args:
    tree: of arrays, typed keys (whose data travel) and numbers.
    convert: what to make of a leaf; None for such an array.
  """
  convert = convert or _array
  return {n: convert(x) for n, x in matrices_lib.named_leaves(tree).items()}


def unflatten(arrays: Arrays, like: Any) -> Any:
  """Returns the tree of which `flatten` made the arrays.

  Args:
    arrays: as `flatten` returns, or each in one dimension; '0', '1', ... in the
      order of the leaves, as states were stored before they had paths.
    like: tree of arrays, `jax.ShapeDtypeStruct`s or numbers; numbers come back
      as Python numbers, NumPy's arrays as NumPy's.

  Raises:
    ValueError: arrays of another tree, by path.
  """
  leaves = matrices_lib.named_leaves(like)
  places = dict(zip(leaves, map(str, range(len(leaves))), strict=True))
  if arrays.keys() != leaves.keys():
    if arrays.keys() != set(places.values()):
      raise ValueError(f'Expected {sorted(leaves)}, got {sorted(arrays)}.')
    arrays = {path: arrays[place] for path, place in places.items()}
  restored = [_leaf(path, arrays[path], leaf) for path, leaf in leaves.items()]
  return jax.tree.unflatten(jax.tree.structure(like), restored)


def packed(pair: dict[str, Any], places: Iterable[Any]) -> np.ndarray:
  """Returns parts of a pair of factors one after another, in one dimension.

  Args:
    pair: {'left': array, 'right': array} or fewer.
    places: (side, index within its array) of each part.
  """
  parts = [np.asarray(pair[side])[index] for side, index in places]
  return np.concatenate([x.reshape(-1) for x in parts])


def unpacked(
    array: np.ndarray, like: dict[str, Any], places: Iterable[Any]
) -> dict[str, jax.Array]:
  """Returns a pair that is `like` but for the parts that `packed` sent."""
  pair = {side: np.array(x) for side, x in like.items()}
  offset = 0
  for side, index in places:
    shape = pair[side][index].shape
    size = math.prod(shape)
    pair[side][index] = array[offset : offset + size].reshape(shape)
    offset += size
  return jax.tree.map(jnp.asarray, pair)


def check(like: Arrays, arrays: Arrays) -> None:
  """Raises unless arrays have the paths, shapes and dtypes of `like`.

  Raises:
    ValueError: the first difference, or a number that is not finite, by path.
  """
  if arrays.keys() != like.keys():
    raise ValueError(f'Expected {sorted(like)}, got {sorted(arrays)}.')
  for path, expected in like.items():
    given = arrays[path]
    if given.shape != expected.shape or given.dtype != expected.dtype:
      raise ValueError(
          f'Expected {path} of {expected.shape} {expected.dtype}, got'
          f' {given.shape} {given.dtype}.'
      )
    # Of JAX: NumPy does not count bfloat16 as floating.
    if jnp.issubdtype(given.dtype, jnp.floating) and not (
        np.isfinite(given).all()
    ):
      raise ValueError(f'Expected finite numbers in {path}, got others.')


def _is_key(leaf: Any) -> bool:
  dtype = getattr(leaf, 'dtype', np.dtype(int))
  return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _array(leaf: Any) -> np.ndarray:
  return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _leaf(path: str, array: np.ndarray, like: Any) -> Any:
  """Returns a leaf of `like`'s kind and shape."""
  if isinstance(like, int | float):
    return type(like)(array)
  x = jax.random.wrap_key_data(jnp.asarray(array)) if _is_key(like) else array
  if x.shape not in (like.shape, (math.prod(like.shape),)):
    raise ValueError(f'Expected {path} of {like.shape}, got {x.shape}.')
  x = x.reshape(like.shape)
  return x if isinstance(like, np.ndarray) else jnp.asarray(x)


def bits(arrays: Arrays) -> int:
  """Returns the size of arrays in bits."""
  return sum(_BITS * x.nbytes for x in arrays.values())
