"""Where a step runs: one device, a mesh under jit, or pmap.

All three give the same run to rounding. A step is written once for the whole
batch; `shard` hands each device its part, `average` joins what the parts gave.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bernoulli_lora_jax import parts

_P = jax.sharding.PartitionSpec
_AXIS = 'data'


class Driver(NamedTuple):
  """How arrays are placed and steps compiled."""

  num_devices: int
  shard: Callable[[Any], Any]  # Inside a step: batch -> this device's part.
  # Inside a step: mean over the devices' parts, by weight; counts are summed.
  average: Callable[[Any], Any]
  # (tree, marks=None): host or one-device tree -> as `compile` wants it. marks is
  # a tree of bool: leaves whose leading axis is split over the devices.
  put: Callable[..., Any]
  # (tree, marks=None): what a step returned -> a tree as without driver.
  get: Callable[..., Any]
  # (run, args) -> run compiled for args = (state, data, key, start, batches); it
  # returns (state, metrics) and donates the state.
  compile: Callable[[Callable[..., Any], tuple], Callable[..., Any]]
  axis_name: str | None = None  # Inside a step: the axis of devices, of pmap.


def make_driver(kind: str, num_devices: int | None = None) -> Driver:
  """Returns the driver of a kind.

  Args:
    kind: 'none' (the default device), 'jit' (the batch sharded over a mesh of
      all devices, the parameters replicated) or 'pmap'.
    num_devices: devices to use of those there are; None for all.

  Returns:
    A `Driver`.

  Raises:
    ValueError: another kind, or more devices than there are.
  """
  available = jax.devices()
  if num_devices is not None and not 1 <= num_devices <= len(available):
    raise ValueError(
        f'Expected training.num_devices in [1, {len(available)}], got'
        f' num_devices={num_devices}.'
    )
  devices = available[:num_devices]
  if kind == 'none':
    return _single()
  if kind == 'jit':
    return _mesh(devices)
  if kind == 'pmap':
    return _pmap(devices)
  raise ValueError(
      f"Expected training.parallel to be 'none', 'jit' or 'pmap', got {kind!r}."
  )


def _identity(tree: Any) -> Any:
  return tree


def _compile(run: Callable[..., Any], args: tuple) -> Callable[..., Any]:
  return jax.jit(run, donate_argnums=0).lower(*args).compile()


def _single() -> Driver:
  same = lambda tree, marks=None: tree
  put = lambda tree, marks=None: jax.device_put(tree)
  return Driver(1, _identity, _identity, put, same, _compile)


def _make_mesh(devices: list[Any]) -> jax.sharding.Mesh:
  return jax.make_mesh(
      (len(devices),),
      (_AXIS,),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=devices,
  )


def _mesh(devices: list[Any]) -> Driver:
  mesh = _make_mesh(devices)
  replicated = jax.sharding.NamedSharding(mesh, _P())
  split = jax.sharding.NamedSharding(mesh, _P(_AXIS))

  def shard(batch):
    _check_divisible(batch, len(devices))
    return jax.lax.with_sharding_constraint(batch, split)

  def put(tree, marks=None):
    if marks is None:
      return jax.device_put(tree, replicated)
    place = lambda x, mark: jax.device_put(x, split if mark else replicated)
    return jax.tree.map(place, tree, marks)

  def compile_(run, args):
    # The state leaves a step where it entered it, split leaves split.
    placed = jax.tree.map(lambda x: x.sharding, args[0])
    jitted = jax.jit(run, donate_argnums=0, out_shardings=(placed, replicated))
    return jitted.lower(*args).compile()

  return Driver(
      num_devices=len(devices),
      shard=shard,
      average=_identity,  # A mean over the sharded batch is the whole mean.
      put=put,
      get=lambda tree, marks=None: tree,
      compile=compile_,
  )


def _pmap(devices: list[Any]) -> Driver:
  count = len(devices)
  split = jax.sharding.NamedSharding(_make_mesh(devices), _P(_AXIS))

  def shard(batch):
    _check_divisible(batch, count)
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: x[jax.lax.axis_index(_AXIS)], parts)

  def put(tree, marks=None):
    stack = lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x)))
    parts = lambda x: x.reshape(count, -1, *x.shape[1:])
    place = lambda x, mark: parts(x) if mark else stack(x)
    marks = jax.tree.map(lambda _: False, tree) if marks is None else marks
    return jax.device_put(jax.tree.map(place, tree, marks), split)

  def get(tree, marks=None):
    whole = lambda x: x.reshape(-1, *x.shape[2:])
    take = lambda x, mark: whole(x) if mark else x[0]
    marks = jax.tree.map(lambda _: False, tree) if marks is None else marks
    return jax.device_put(jax.tree.map(take, tree, marks), devices[0])

  def compile_(run, args):
    mapped = jax.pmap(
        run,
        axis_name=_AXIS,
        in_axes=(0, 0, None, None, None),
        donate_argnums=0,
        devices=devices,
    )
    mapped = mapped.lower(*args).compile()

    def first_metrics(*args):
      state, metrics = mapped(*args)
      return state, jax.tree.map(lambda x: x[0], metrics)

    return first_metrics

  return Driver(
      num_devices=count,
      shard=shard,
      average=lambda tree: parts.over_devices(tree, _AXIS),
      put=put,
      get=get,
      compile=compile_,
      axis_name=_AXIS,
  )


def _check_divisible(batch: Any, count: int) -> None:
  size = jax.tree.leaves(batch)[0].shape[0]
  if size % count:
    raise ValueError(
        f'Expected task.batch_size to be a multiple of the {count} devices, got'
        f' batch_size={size}.'
    )
