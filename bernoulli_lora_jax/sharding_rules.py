"""Where the leaves of a tree lie on a mesh, by rules on their paths.

    mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(Auto, Auto))
    rules = sharding_rules.FSDP           # kernels split over 'fsdp', by rows
    checkpoint = hf.load(folder, sharding=sharding_rules.placer(mesh, rules))
    batch = jax.device_put(batch, NamedSharding(mesh, P(('data', 'fsdp'))))

What is computed from weights that lie so is sharded by the compiler: the chain's
state beside them, the products, the merges.
"""

from collections.abc import Callable, Sequence
import math
import re
from typing import Any

import jax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib

P = jax.sharding.PartitionSpec
Rules = Sequence[tuple[str, P]]

# Every table and kernel by rows; the axis of stacked layers stays whole.
FSDP: Rules = ((r'(kernel|embedding)$', P('fsdp', None)),)


def placer(mesh: jax.sharding.Mesh, rules: Rules) -> Callable[..., Any]:
  """Returns (path, shape) -> sharding of a leaf.

  Args:
    mesh: of devices.
    rules: (regular expression searched in a path, `PartitionSpec`); the first that
      is found holds, leaves without a rule are replicated. A spec shorter than
      the leaf's axes speaks of its last ones, so that stacked layers need no rule
      of their own.

  Raises:
    ValueError: a pattern that is none, an axis that the mesh lacks; when called, a
      spec longer than the leaf or a size that the devices do not divide.
  """
  for rule in rules:
    is_rule = isinstance(rule, tuple) and len(rule) == 2
    is_rule = is_rule and isinstance(rule[0], str) and isinstance(rule[1], P)
    checks.that(is_rule, 'rules (pattern, PartitionSpec)', rule=rule)
    pattern, spec = rule
    matrices_lib.check_pattern('pattern', pattern)
    for axis in _names(spec):
      if axis not in mesh.shape:
        raise ValueError(
            f'Expected axes of the mesh, {tuple(mesh.shape)}, in {spec} of'
            f' {pattern!r}, got {axis!r}.'
        )
  return lambda path, leaf: _sharding(mesh, rules, path, tuple(leaf.shape))


def shardings(tree: Any, mesh: jax.sharding.Mesh, rules: Rules) -> Any:
  """Returns a tree of shardings for `jax.device_put` or `jax.jit`.

  Args:
    tree: of arrays or shapes.
    mesh: see `placer`.
    rules: see `placer`.

  Raises:
    ValueError: see `placer`; a pattern that no leaf matches, with the paths.
  """
  place = placer(mesh, rules)
  named = matrices_lib.named_leaves(tree)
  for pattern, _ in rules:
    if not any(re.search(pattern, path) for path in named):
      raise ValueError(
          f'Expected a leaf that matches {pattern!r}; the paths are'
          f' {sorted(named)}.'
      )
  placed = [place(path, leaf) for path, leaf in named.items()]
  return jax.tree.structure(tree).unflatten(placed)


def _names(spec: P) -> list[Any]:
  """Returns the axes of a mesh that a spec names."""
  found = []
  for entry in spec:
    is_several = isinstance(entry, tuple | list)
    found += [] if entry is None else entry if is_several else [entry]
  return found


def _sharding(
    mesh: jax.sharding.Mesh, rules: Rules, path: str, shape: tuple[int, ...]
) -> jax.sharding.NamedSharding:
  """Returns the sharding of a leaf by the first rule for it."""
  spec = next((s for pattern, s in rules if re.search(pattern, path)), P())
  missing = len(shape) - len(spec)
  if missing < 0:
    raise ValueError(
        f'Expected at most {len(shape)} axes for {path} of shape {shape}, got'
        f' {spec}.'
    )
  spec = P(*[None] * missing, *spec)
  for size, entry in zip(shape, spec, strict=True):
    count = math.prod(mesh.shape[axis] for axis in _names(P(entry)))
    if size % count:
      raise ValueError(
          f'Expected {count} devices to divide the axes of {path} of shape'
          f' {shape}, split as {spec}.'
      )
  return jax.sharding.NamedSharding(mesh, spec)
