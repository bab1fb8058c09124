"""Trees as what travels: {path: array}, checked by path where it arrives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import matrices as matrices_lib

Arrays = dict[str, np.ndarray]
_BITS = 8


def flatten(
    tree: Any, convert: Callable[[Any], Any] = np.asarray
) -> dict[str, Any]:
  """Returns {path: array} of the leaves that are not None."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  names = matrices_lib.path_names([path for path, _ in leaves])
  return {n: convert(x) for n, (_, x) in zip(names, leaves, strict=True)}


def unflatten(arrays: Arrays, like: Any) -> Any:
  """Returns the tree of which `flatten` made the arrays, in the shapes of `like`."""
  leaves = [
      jnp.asarray(arrays[path]).reshape(leaf.shape)
      for path, leaf in flatten(like, lambda x: x).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


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


def bits(arrays: Arrays) -> int:
  """Returns the size of arrays in bits."""
  return sum(_BITS * x.nbytes for x in arrays.values())
