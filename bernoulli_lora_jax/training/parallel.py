"""Where a step runs: one device, a mesh under jit, or pmap.

All three give the same run to rounding. A step is written once for the whole
batch; `shard` hands each device its part, `average` joins what the parts gave.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_P = jax.sharding.PartitionSpec
_AXIS = 'data'


class Driver(NamedTuple):
  """How arrays are placed and steps compiled."""

  num_devices: int
  shard: Callable[[Any], Any]  # Inside a step: batch -> this device's part.
  average: Callable[[Any], Any]  # Inside a step: mean over the devices' parts.
  put: Callable[[Any], Any]  # Host or one-device tree -> as `compile` wants it.
  get: Callable[[Any], Any]  # What a step returned -> a tree as without driver.
  # (run, args) -> run compiled for args = (state, data, key, start); it returns
  # (state, metrics) and donates the state.
  compile: Callable[[Callable[..., Any], tuple], Callable[..., Any]]


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
  return Driver(1, _identity, _identity, jax.device_put, _identity, _compile)


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

  return Driver(
      num_devices=len(devices),
      shard=shard,
      average=_identity,  # A mean over the sharded batch is the whole mean.
      put=lambda tree: jax.device_put(tree, replicated),
      get=_identity,
      compile=_compile,
  )


def _pmap(devices: list[Any]) -> Driver:
  count = len(devices)
  split = jax.sharding.NamedSharding(_make_mesh(devices), _P(_AXIS))

  def shard(batch):
    _check_divisible(batch, count)
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: x[jax.lax.axis_index(_AXIS)], parts)

  def put(tree):
    stack = lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x)))
    return jax.device_put(jax.tree.map(stack, tree), split)

  def compile_(run, args):
    mapped = jax.pmap(
        run,
        axis_name=_AXIS,
        in_axes=(0, 0, None, None),
        donate_argnums=0,
        devices=devices,
    )
    mapped = mapped.lower(*args).compile()

    def first_metrics(state, data, key, start):
      state, metrics = mapped(state, data, key, start)
      return state, jax.tree.map(lambda x: x[0], metrics)

    return first_metrics

  return Driver(
      num_devices=count,
      shard=shard,
      average=lambda tree: jax.lax.pmean(tree, _AXIS),
      put=put,
      get=lambda tree: jax.device_put(
          jax.tree.map(lambda x: x[0], tree), devices[0]
      ),
      compile=compile_,
  )


def _check_divisible(batch: Any, count: int) -> None:
  size = jax.tree.leaves(batch)[0].shape[0]
  if size % count:
    raise ValueError(
        f'Expected task.batch_size to be a multiple of the {count} devices, got'
        f' batch_size={size}.'
    )
