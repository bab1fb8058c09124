"""Where a step runs: one device, a mesh under jit, or pmap.

All three give the same run to rounding. A step is written once for the whole
batch; `Driver.shard` hands each device its part, `Driver.average` joins what the
parts gave. The mapped axis of pmap has its name here.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bernoulli_lora_jax import devices as devices_lib
from bernoulli_lora_jax import parts

KINDS = ('none', 'jit', 'pmap')
_P = jax.sharding.PartitionSpec
_AXIS = 'data'
_MAPPED = devices_lib.Mapped(_AXIS)


@dataclasses.dataclass(frozen=True)
class Driver:
  """How arrays are placed and steps compiled.

  Attributes:
    kind: 'none' (the default device), 'jit' (the batch sharded over a mesh of
      the devices, the parameters replicated) or 'pmap'.
    devices: of 'jit' and 'pmap'.
  """

  kind: str = 'none'
  devices: tuple[Any, ...] = ()

  @property
  def num_devices(self) -> int:
    """Returns the number of devices that share a batch."""
    return 1 if self.kind == 'none' else len(self.devices)

  @property
  def mapped(self) -> devices_lib.Mapped | None:
    """Returns the mean over the devices inside a step, of pmap."""
    return _MAPPED if self.kind == 'pmap' else None

  def shard(self, batch: Any) -> Any:
    """Returns this device's part of a batch, inside a step.

    Raises:
      ValueError: a batch that the devices cannot share.
    """
    if self.kind == 'none':
      return batch
    count = self.num_devices
    self._check_rows(jax.tree.leaves(batch)[0].shape[0])
    if self.kind == 'jit':
      return jax.lax.with_sharding_constraint(batch, self._split())
    place = _MAPPED.index()
    return jax.tree.map(
        lambda x: x.reshape(count, -1, *x.shape[1:])[place], batch
    )

  def average(self, tree: Any) -> Any:
    """Returns the mean over the devices' parts by weight; counts are summed.

    Of a batch that is sharded under jit a mean is the whole mean.
    """
    if self.kind != 'pmap':
      return tree
    return parts.over_devices(tree, _MAPPED)

  def put(self, tree: Any, marks: Any = None) -> Any:
    """Returns a tree of the host or of one device as `compile` wants it.

    Args:
      tree: of arrays.
      marks: tree of bool: leaves whose leading axis is split over the devices.
    """
    if self.kind == 'none':
      return jax.device_put(tree)
    marks = jax.tree.map(lambda _: False, tree) if marks is None else marks
    if self.kind == 'jit':
      split, whole = self._split(), self._replicated()
      place = lambda x, mark: jax.device_put(x, split if mark else whole)
      return jax.tree.map(place, tree, marks)
    count = self.num_devices
    rows = lambda x: x.reshape(count, -1, *x.shape[1:])
    stack = lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x)))
    place = lambda x, mark: rows(x) if mark else stack(x)
    return jax.device_put(jax.tree.map(place, tree, marks), self._split())

  def placed(self, state: Any, batches: Any) -> tuple[Any, Any]:
    """Returns shapes where `put` and `put_batches` place arrays; not of pmap.

    Args:
      state: shapes of it, without clients.
      batches: shapes of them.
    """
    if self.kind == 'none':
      return state, batches

    def at(tree, place):
      make = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
      return jax.tree.map(make, tree)

    return at(state, self._replicated()), at(batches, self._rows())

  def put_batches(self, batches: Any) -> Any:
    """Returns batches of a stream, (num, b, ...), on their way to the devices.

    Under jit each process gives its rows of a batch.
    """
    if self.kind == 'none':
      return jax.device_put(batches)
    if self.kind == 'pmap':
      return batches
    self._check_rows(jax.tree.leaves(batches)[0].shape[1] * jax.process_count())
    make = jax.make_array_from_process_local_data
    place = functools.partial(make, self._rows())
    return jax.tree.map(place, batches)

  def get(self, tree: Any, marks: Any = None) -> Any:
    """Returns what a step returned as a tree without driver; see `put`."""
    if self.kind != 'pmap':
      return tree
    whole = lambda x: x.reshape(-1, *x.shape[2:])
    take = lambda x, mark: whole(x) if mark else x[0]
    marks = jax.tree.map(lambda _: False, tree) if marks is None else marks
    return jax.device_put(jax.tree.map(take, tree, marks), self.devices[0])

  def jit(self, run: Callable[..., Any], state: Any) -> Any:
    """Returns run as a jitted function that donates the state.

    Args:
      run: (data, state, key, first, batches) -> (state, metrics).
      state: as `put` placed it. It leaves a step where it entered it, split
        leaves split.
    """
    if self.kind == 'pmap':
      return jax.pmap(
          run,
          axis_name=_AXIS,
          in_axes=(0, 0, None, None, None),
          donate_argnums=1,
          devices=list(self.devices),
      )
    if self.kind == 'none':
      return jax.jit(run, donate_argnums=1)
    places = jax.tree.map(lambda x: x.sharding, state), self._replicated()
    return jax.jit(run, donate_argnums=1, out_shardings=places)

  def _check_rows(self, size: int) -> None:
    if size % self.num_devices:
      raise ValueError(
          f'Expected task.batch_size to be a multiple of the {self.num_devices}'
          f' devices, got batch_size={size}.'
      )

  def _replicated(self) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(_mesh(self.devices), _P())

  def _split(self) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(_mesh(self.devices), _P(_AXIS))

  def _rows(self) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(_mesh(self.devices), _P(None, _AXIS))


def make_driver(kind: str, num_devices: int | None = None) -> Driver:
  """Returns the driver of a kind.

  Args:
    kind: see `Driver`.
    num_devices: devices to use of those there are; None for all.

  Raises:
    ValueError: another kind, or more devices than there are.
  """
  available = jax.devices()
  if num_devices is not None and not 1 <= num_devices <= len(available):
    raise ValueError(
        f'Expected training.num_devices in [1, {len(available)}], got'
        f' num_devices={num_devices}.'
    )
  if kind not in KINDS:
    raise ValueError(
        f"Expected training.parallel to be 'none', 'jit' or 'pmap', got {kind!r}."
    )
  return Driver(kind, tuple(available[:num_devices]))


def _mesh(devices: tuple[Any, ...]) -> jax.sharding.Mesh:
  return jax.make_mesh(
      (len(devices),),
      (_AXIS,),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=list(devices),
  )
