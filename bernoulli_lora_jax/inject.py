"""Where the factors of an adapter enter a loss, and the law that holds there.

From a loss (params, *args) to one (params, factors, *args) in which every adapted
matrix is W + L R:

  by_product   traces the loss and runs its program with W + L R in the place of W,
               not formed (`follow`): a product x W becomes x W + (x L) R.
  by_addition  forms W + L R and calls the loss.

The law: for every loss the result is the loss at W + L R, to rounding. `by_product`
keeps it whatever the loss does with W. Through `jit`, `scan`, `remat`, `cond`,
`while` and `vmap` it follows a weight to the products that it enters, and neither
pass forms anything of W's shape there. Any other use (a penalty on weights, weight
normalisation, a step of gradient descent inside of the loss, a function with a
derivative of its own) takes the array W + L R, formed for it: a warning names the
path and the use, since that costs memory of W's size.

`factors` is {path: {'left': L, 'right': R}} with L (*batch, m, r) and R (*batch,
r, n), the scale s already in R. They keep their dtype (float32) outside and are
cast to the compute dtype where they are multiplied. A `Pair` also says which axes
of its leaf are left and right ones; of a plain mapping they are read from the loss,
as `all_linear` does.

*Sketched products* (A4). Where a chain keeps its products merged, L R is zero at
every evaluation. A `Pair` with `trained` sides says so: by_product then computes x W
alone, with the derivative that x W + (x L) R has by the trained side. Neither the
adapter nor, where the left side is frozen, x is there any more. Frozen factors of a
coordinate sketch may be given by `rows`, the places of their ones: x L is a gather.

Weights quantised by Qwix are met in the projections of Linen models (`projections`);
any other use of them is an error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import re
from typing import Any
import warnings

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import follow
from bernoulli_lora_jax import lowrank
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import projections

Axes = lowrank.Axes
LowRank = lowrank.LowRank
Loss = Callable[..., Any]
is_quantized = projections.is_quantized
logical = projections.logical


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair(Mapping):
  """The factors of one leaf, and its axes: {'left': L, 'right': R}."""

  left: jax.Array  # (*batch, m, r)
  right: jax.Array  # (*batch, r, n)
  axes: Axes = dataclasses.field(metadata={'static': True})
  # Sides that are trained from L R = 0, which then is not multiplied by; () for
  # any L R.
  trained: tuple[str, ...] = dataclasses.field(
      default=(), metadata={'static': True}
  )
  # {side: (*batch, r) int32}: L is `lowrank.frame`(rows) + left, R likewise.
  rows: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

  def __getitem__(self, side: str) -> jax.Array:
    if side not in ('left', 'right'):
      raise KeyError(side)
    if side not in self.rows:
      return getattr(self, side)
    rows, factor = self.rows[side], getattr(self, side)
    if side == 'left':
      return factor + lowrank.frame(rows, factor.shape[-2])
    return factor + lowrank.frame(rows, factor.shape[-1]).mT

  def __iter__(self) -> Iterator[str]:
    return iter(('left', 'right'))

  def __len__(self) -> int:
    return 2


Factors = Mapping[str, Pair | Mapping[str, jax.Array]]


class FormedWarning(UserWarning):
  """An adapted loss forms W + L R of a matrix, of W's size."""


def by_product(loss: Loss) -> Loss:
  """Returns the loss at W + L R without forming it where W enters a product.

  Args:
    loss: (params, *args) -> anything, a function that `jax.jit` takes.

  Returns:
    (params, factors, *args) -> the same. Differentiate it by `factors`. Call
    `by_product` once: each call returns a new function, which jit compiles anew.

  Raises:
    ValueError: when traced, a path that params do not have, a matrix that the
      loss does not use, factors that do not fit its axes.

  Warns:
    FormedWarning: a use of W that is no product, by path; once a trace.

  Guarantees:
    The result is `loss` at W + L R to rounding, and so are its derivatives.
  """
  calls = projections.Calls()

  def adapted(params, factors, *args, **kwargs):
    paths = _paths(params)
    _check_paths(factors, paths)
    beside = {p: f for p, f in factors.items() if is_quantized(paths[p])}
    followed = {p: f for p, f in factors.items() if p not in beside}
    entered = loss
    if beside:
      entered = projections.enter(loss, beside, calls)
      rest = _trace(projections.leave_out(loss, beside), params, args, kwargs)
      _check_quantized(beside, rest)
    program = _trace(entered, params, args, kwargs)
    axes = _axes_of(
        followed, lambda: _read_axes(loss, params, args, kwargs), paths
    )
    values = {
        path: _low_rank(paths[path], pair, axes[path], path)
        for path, pair in followed.items()
    }
    return program.run(values)

  return adapted


def by_addition(
    loss: Loss, matrices: matrices_lib.Matrices | None = None
) -> Loss:
  """Returns the loss at W + L R, formed.

  Args:
    loss: (params, *args) -> anything.
    matrices: what is a matrix, see `Matrices`; of a `Pair` its own axes count.

  Returns:
    (params, factors, *args) -> the same. Its gradient by the factors goes
    through that by W, of full size.

  Raises:
    ValueError: a path that params do not have, or that `matrices` do not select
      or see along other axes; factors that do not fit.
  """

  def adapted(params, factors, *args, **kwargs):
    leaves, treedef = jax.tree.flatten(params)
    paths = _paths(params, whole=False)
    _check_paths(factors, paths)
    places = {path: i for i, path in enumerate(paths)}
    found = {}
    if matrices is not None or not all(
        isinstance(pair, Pair) for pair in factors.values()
    ):
      found = {m.path: m.axes for m in matrices_lib.find(params, matrices)}
    for path, pair in factors.items():
      axes = pair.axes if isinstance(pair, Pair) else found.get(path)
      if axes is None or (matrices is not None and found.get(path) != axes):
        raise ValueError(
            f'Expected matrices with {path} along the axes of its factors, got'
            f' {found.get(path, sorted(found))}: give by_addition the matrices'
            ' of the chain.'
        )
      i = places[path]
      leaves[i] = _low_rank(leaves[i], pair, axes, path).dense()
    return loss(treedef.unflatten(leaves), *args, **kwargs)

  return adapted


def all_linear(loss: Loss, params: Any, *args: Any) -> matrices_lib.Matrices:
  """Returns what selects every matrix that the loss multiplies by.

  The loss is traced, without computing anything, so the axes of kernels with
  three axes or more (attention heads, `nn.Einsum`, stacked layers along whatever
  axis) are read from its products: no rules need to be written. Left are the axes
  over which the first product with a leaf sums. In Flax trees (a leaf named
  `kernel` exists) kernels are selected, in others all leaves but those that are
  looked up in (tables of embeddings).

  Args:
    loss: (params, *args) -> anything.
    params: tree of arrays or shapes.
    *args: what the loss takes besides, arrays or shapes.

  Returns:
    `Matrices` with a rule for each.

  Raises:
    ValueError: the loss multiplies by none.
  """
  paths = _paths(params)
  found = _read_axes(loss, params, args, {})
  rules = [
      matrices_lib.Rule(
          f'^{re.escape(path)}$',
          left=found[path].left,
          right=found[path].right,
          batch=found[path].batch,
      )
      for path in paths
      if path in found
  ]
  if not rules:
    raise ValueError(
        'Expected a loss that multiplies by matrices of params, met none among'
        f' {sorted(paths)}.'
    )
  select = '|'.join(rule.pattern for rule in rules)
  return matrices_lib.Matrices(select=select, rules=tuple(rules))


@dataclasses.dataclass(frozen=True)
class _Program:
  """A loss traced at its arguments."""

  jaxpr: core.ClosedJaxpr
  inputs: list[Any]  # The arrays among the arguments.
  params: dict[str, int]  # Position of each leaf of params among them.
  result: Callable[
      [Sequence[Any]], Any
  ]  # Outputs of the program -> of the loss.

  def run(self, values: Mapping[str, LowRank]) -> Any:
    """Returns the loss with values in the places of some leaves."""
    uses = follow.Uses()
    inputs = list(self.inputs)
    for path, value in values.items():
      inputs[self.params[path]] = value
    outputs = follow.evaluate(self.jaxpr.jaxpr, self.jaxpr.consts, inputs, uses)
    for path in values:
      if path not in uses.met:
        raise ValueError(
            f'Expected the loss to use {path}, which is adapted, but its result'
            ' does not depend on it: select others.'
        )
    for path, names in uses.formed.items():
      warnings.warn(
          f'{path} is used by {", ".join(names)}, where W + L R is formed: memory'
          ' of the size of W, and of its gradient. Select others, or leave that'
          ' use out of the loss.',
          FormedWarning,
          stacklevel=3,
      )
    return self.result(outputs)

  def probe(self, paths: Sequence[str]) -> follow.Uses:
    """Returns what the loss does with leaves, computing nothing."""
    uses = follow.Uses()

    def evaluate(inputs):
      for path in paths:
        i = self.params.get(path)
        if i is not None:
          inputs[i] = lowrank.probe(inputs[i], path)
      return follow.evaluate(self.jaxpr.jaxpr, self.jaxpr.consts, inputs, uses)

    jax.eval_shape(evaluate, list(self.inputs))
    return uses


def _trace(
    loss: Loss, params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> _Program:
  """Traces a loss; what is no array among arguments and results stays as it is."""
  leaves, treedef = jax.tree.flatten((params, tuple(args), dict(kwargs)))
  places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
  returned = {}

  def traced(inputs):
    filled = list(leaves)
    for i, x in zip(places, inputs, strict=True):
      filled[i] = x
    params, args, kwargs = treedef.unflatten(filled)
    outputs, returned['tree'] = jax.tree.flatten(loss(params, *args, **kwargs))
    returned['leaves'] = [None if _is_array(x) else x for x in outputs]
    returned['places'] = [i for i, x in enumerate(outputs) if _is_array(x)]
    return [outputs[i] for i in returned['places']]

  inputs = [leaves[i] for i in places]
  jaxpr = jax.make_jaxpr(traced)(inputs)

  def result(outputs):
    filled = list(returned['leaves'])
    for i, x in zip(returned['places'], outputs, strict=True):
      filled[i] = x
    return returned['tree'].unflatten(filled)

  position = {place: i for i, place in enumerate(places)}
  names = enumerate(_paths(params, whole=False))
  found = {path: position[i] for i, path in names if i in position}
  return _Program(jaxpr, inputs, found, result)


def _is_array(leaf: Any) -> bool:
  kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
  return isinstance(leaf, kinds)


def _is_matrix(leaf: Any) -> bool:
  is_array = _is_array(leaf) and leaf.ndim >= 2
  return is_array and jnp.issubdtype(leaf.dtype, jnp.floating)


def _paths(params: Any, whole: bool = True) -> dict[str, Any]:
  """Returns {path: leaf}; quantised arrays are leaves where `whole`."""
  flat = jax.tree_util.tree_flatten_with_path(
      params, is_leaf=is_quantized if whole else None
  )[0]
  names = matrices_lib.path_names([keys for keys, _ in flat])
  return dict(zip(names, (leaf for _, leaf in flat), strict=True))


def _check_paths(factors: Factors, paths: Mapping[str, Any]) -> None:
  for path in factors:
    if path not in paths:
      raise ValueError(
          f'Expected the factors of {path} to belong to a leaf of params; the'
          f' paths are {sorted(paths)}.'
      )
    if not (_is_array(paths[path]) or is_quantized(paths[path])):
      raise ValueError(
          f'Expected {path} to be an array, got {type(paths[path]).__name__}.'
      )


def _check_quantized(factors: Factors, rest: _Program) -> None:
  """Raises for a quantised weight that the loss uses outside of its products."""
  for path in factors:
    uses = rest.probe([p for p in rest.params if p.startswith(f'{path}/')])
    for name, primitives in uses.formed.items():
      raise ValueError(
          f'Expected the quantised {path} to enter products alone, but {name} is'
          f' used by {", ".join(primitives)}, where there is no W + L R: select'
          ' others, or leave that use out of the loss.'
      )


def _read_axes(
    loss: Loss,
    params: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Axes]:
  """Returns the axes of what the loss multiplies by, see `all_linear`."""
  paths = _paths(params)
  kernels = [path for path in paths if path.rpartition('/')[2] == 'kernel']
  called = _called(loss, params, kernels, args, kwargs)
  found = {p: called[p] for p in called if is_quantized(paths[p])}
  program = _trace(loss, params, args, kwargs)
  arrays = [path for path in paths if path in program.params]
  uses = program.probe(
      [path for path in kernels or arrays if _is_matrix(paths[path])]
  )
  for path, axes in uses.axes.items():
    if 'gather' in uses.formed.get(path, ()):
      continue  # A table of embeddings.
    # Kernels that nn.vmap stacks over one input look like one wide kernel.
    num = len(axes.right) - len(called[path].right) if path in called else 0
    stacked, right = axes.right[: max(0, num)], axes.right[max(0, num) :]
    found[path] = Axes((*axes.batch, *stacked), axes.left, right)
  return found


def _called(
    loss: Loss,
    params: Any,
    kernels: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Axes]:
  """Returns what Linen's projections say of the axes of kernels, if anything."""
  found: dict[str, Axes] = {}
  watched = projections.watch(loss, params, kernels, found)
  try:
    _trace(watched, params, args, kwargs)
  except (
      Exception
  ):  # A loss that does not take params with factors beside them.
    if any(is_quantized(leaf) for leaf in _paths(params).values()):
      raise
  return found


def _axes_of(
    factors: Factors, read: Callable[[], dict[str, Axes]], paths: Any
) -> dict[str, Axes]:
  """Returns the axes of each leaf, from its pair or else from the loss."""
  found = {p: f.axes for p, f in factors.items() if isinstance(f, Pair)}
  rest = [path for path in factors if path not in found]
  seen = read() if rest else {}
  for path in rest:
    if path not in seen and paths[path].ndim != 2:
      raise ValueError(
          f'Expected {path} to enter a product that tells its axes: give its'
          ' factors as adapters.scaled returns them, or select others.'
      )
    found[path] = seen.get(path, Axes((), (0,), (1,)))
  return found


def _low_rank(leaf: Any, pair: Any, axes: Axes, path: str) -> LowRank:
  """Returns W + L R; raises ValueError where the factors do not fit."""
  leaf = jnp.asarray(leaf)
  size = lambda side: math.prod(leaf.shape[axis] for axis in side)
  batch = tuple(leaf.shape[axis] for axis in axes.batch)
  trained = pair.trained if isinstance(pair, Pair) else ()
  rows = pair.rows if trained else {}
  of = functools.partial(getattr, pair) if rows else pair.__getitem__
  factors = {side: of(side) for side in ('left', 'right')}
  rank = factors['left'].shape[-1]
  for side, expected in (
      ('left', (*batch, size(axes.left), rank)),
      ('right', (*batch, rank, size(axes.right))),
  ):
    if factors[side].shape != expected:
      raise ValueError(
          f'Expected the {side} factor of {path} to have shape {expected}, got'
          f' {factors[side].shape}: its rule should say left={axes.left},'
          f' right={axes.right}, batch={axes.batch}.'
      )
  return lowrank.low_rank(
      leaf, **factors, axes=axes, path=path, trained=trained, rows=rows
  )
