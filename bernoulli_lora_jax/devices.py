"""Devices that share a batch: the one file that speaks of a mapped axis.

The library averages by functions. Who maps a step over devices (pmap, vmap,
shard_map) knows the name of the axis and gives `Mapped(name)` for the function.
"""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Mapped:
  """The mean over the devices of a mapped axis, and how else parts are joined.

  Attributes:
    axis_name: what the step is mapped over.
  """

  axis_name: str

  def __call__(self, tree: Any) -> Any:
    """Returns the mean over the devices, each of the same weight."""
    return jax.lax.pmean(tree, self.axis_name)

  def count(self) -> int:
    """Returns the number of devices."""
    return jax.lax.axis_size(self.axis_name)

  def index(self) -> jax.Array:
    """Returns the number of this device."""
    return jax.lax.axis_index(self.axis_name)

  def joined(self, kind: str | int, x: jax.Array) -> jax.Array:
    """Returns what all devices hold as one array.

    Args:
      kind: 'sum', 'max', 'min', 'any', 'all', or the axis along which parts follow
        one another.
      x: of this device.
    """
    if isinstance(kind, int):
      return jax.lax.all_gather(x, self.axis_name, axis=kind, tiled=True)
    if kind in ('any', 'all'):
      x = x.astype('i4')
    reduce = {'sum': jax.lax.psum, 'max': jax.lax.pmax, 'any': jax.lax.pmax}
    return reduce.get(kind, jax.lax.pmin)(x, self.axis_name)
