"""Sharding in types: how the library's own steps run on meshes of explicit axes.

Under `jax.make_mesh` axes are explicit by default: shardings belong to the types of
arrays, and an operation whose result could be placed in several ways is an error.
What the library does to weights and factors (draws, products, merges) says how its
results are placed, as the weights are, and leaves the way there to the compiler
(`automatic`); what a user's loss does stays as the user typed it.
"""

from collections.abc import Callable
from typing import Any

import jax

Spec = jax.sharding.PartitionSpec


def mesh_of(tree: Any) -> Any:
  """Returns the mesh with explicit axes that some leaf is placed on, or None."""
  for leaf in jax.tree.leaves(tree):
    if isinstance(leaf, jax.Array):
      mesh = jax.typeof(leaf).sharding.mesh
      if jax.sharding.AxisType.Explicit in mesh.axis_types:
        return getattr(mesh, 'abstract_mesh', mesh)
  return None


def specs(tree: Any) -> Any:
  """Returns how each leaf is placed on its mesh."""
  spec = lambda x: jax.typeof(x).sharding.spec
  return jax.tree.map(
      lambda x: spec(x) if isinstance(x, jax.Array) else Spec(), tree
  )


def explicit(array: jax.Array) -> Any:
  """Returns the sharding that belongs to an array's type, None where none does."""
  return None if mesh_of(array) is None else jax.typeof(array).sharding


def automatic(
    function: Callable[..., Any], *args: Any, out: Callable[[], Any]
) -> Any:
  """Returns function(*args), its results placed as `out()` says.

  Args:
    function: of arrays, without collectives.
    *args: trees of arrays; where none has explicit axes the function is called as
      it is.
    out: () -> `Spec`s, a prefix of the result's tree.
  """
  mesh = mesh_of(args)
  if mesh is None:
    return function(*args)
  placed = out()

  def run(*args):
    with jax.sharding.use_abstract_mesh(mesh):
      return jax.sharding.auto_axes(
          function, axes=tuple(mesh.axis_names), out_sharding=placed
      )(*args)

  leaves = jax.tree.leaves(args)
  if any(isinstance(x, jax.core.Tracer) for x in leaves):
    return run(*args)
  concrete = next(x.sharding.mesh for x in leaves if mesh_of(x) is not None)
  with jax.set_mesh(concrete):
    return jax.jit(run)(*args)
