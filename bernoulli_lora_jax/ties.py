"""Tied weights: one array in two places, of which adapters would move one."""

from collections.abc import Sequence
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import inject
from bernoulli_lora_jax import matrices as matrices_lib


def check(params: Any, places: Sequence[int]) -> None:
  """Raises unless some leaves are arrays of their own.

  Args:
    params: tree of arrays; under `jit` also the arrays of the call that traces.
    places: of the leaves that will move.

  Raises:
    ValueError: one array in two places, by path.
  """
  flat = jax.tree_util.tree_flatten_with_path(
      params, is_leaf=inject.is_quantized
  )[0]
  paths = matrices_lib.path_names([path for path, _ in flat])
  for given in ([leaf for _, leaf in flat], *_arguments_like(params)):
    owners = [_buffer(leaf) for leaf in given]
    for i in places:
      for j, owner in enumerate(owners):
        if i != j and owner is not None and owner == owners[i]:
          raise ValueError(
              f'Expected {paths[i]} to be an array of its own, but it is tied'
              f' to {paths[j]}: adapting one of them would untie them.'
          )


def _buffer(leaf: Any) -> Any:
  """Returns what two leaves have in common if they are one array, or None."""
  if isinstance(leaf, jax.core.Tracer):
    return id(leaf)
  if isinstance(leaf, np.ndarray):
    return (leaf.ctypes.data, leaf.nbytes) if leaf.size else None
  if not isinstance(leaf, jax.Array) or not leaf.size:
    return id(leaf) if inject.is_quantized(leaf) else None
  try:
    shard = leaf.addressable_shards[0].data
    return (shard.unsafe_buffer_pointer(), leaf.nbytes)
  except (AttributeError, IndexError, NotImplementedError, RuntimeError):
    return id(leaf)


def _arguments_like(params: Any) -> list[list[Any]]:
  """Returns the leaves of what enclosing `jax.jit`s got in place of params.

  A trace sees one array in two places as two tracers, and only the frames of the
  call that traces hold the arrays. Where they do not (another version of JAX,
  weights from within the program) nothing is returned.
  """
  leaves, treedef = jax.tree.flatten(params)
  if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
    return []
  shapes = list(map(jnp.shape, leaves))
  result = []
  frame = sys._getframe()
  while frame is not None:
    if frame.f_globals.get('__name__', '').startswith('jax.'):
      given = frame.f_locals.get('args'), frame.f_locals.get('kwargs')
      for value in [*_nodes(given, treedef)]:
        arrays, _ = jax.tree.flatten(value, is_leaf=inject.is_quantized)
        is_concrete = not any(
            isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value)
        )
        if is_concrete and shapes == [
            jnp.shape(x) for x in jax.tree.leaves(value)
        ]:
          result.append(arrays)
    frame = frame.f_back
  return result


def _nodes(tree: Any, treedef: Any) -> list[Any]:
  """Returns the subtrees of a structure."""
  found = []

  def visit(node):
    is_it = jax.tree.structure(node) == treedef
    if is_it:
      found.append(node)
    return is_it

  try:
    jax.tree.leaves(tree, is_leaf=visit)
  except (TypeError, ValueError):  # Arguments that are no trees.
    return []
  return found
