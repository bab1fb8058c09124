"""Where the factors of an adapter enter a model.

Two ways, both from a loss (params, *args) to one (params, factors, *args) in
which every adapted matrix acts as W + L R:

  by_product   for Flax Linen models: an interceptor adds (x L) R to the output
               of `nn.Dense`, `nn.DenseGeneral` and `nn.Einsum`, so that neither
               pass forms anything of W's shape. It works under `nn.scan` and
               `nn.remat`, and over weights quantised by Qwix.
  by_addition  for losses that are no product with W: W + L R is formed.

`factors` is {path: {'left': L, 'right': R}} with L (*batch, m, r) and R (*batch,
r, n), the scale s already in R. They keep their dtype (float32) outside and are
cast to the compute dtype where they are multiplied. In the params that a model
sees they stand beside their kernel, under `adapter`: in a collection of their
own a model's `nn.scan(variable_axes={'params': 0})` would drop them silently.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from bernoulli_lora_jax import matrices as matrices_lib

Factors = Mapping[str, Mapping[str, jax.Array]]
Loss = Callable[..., Any]

_SUFFIX = '_adapter'  # `kernel_adapter` stands beside `kernel`.
_PROJECTIONS = (nn.Dense, nn.DenseGeneral, nn.Einsum)
# Axes of a projection: those of x that are contracted, those of x that are
# batch axes of the kernel, and the kernel's batch, left and right axes.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Pair:
  """Factors beside their leaf. The module that meets them learns which it is.

  Path and owner are no leaves but part of the tree's structure: they pass
  nn.scan and nn.remat, and a jit inside of the loss that remembers a trace
  remembers it for this owner alone.
  """

  left: Any  # Array, or None while a model is only looked at.
  right: Any
  path: str = dataclasses.field(metadata={'static': True})
  owner: Any = dataclasses.field(metadata={'static': True})


def by_product(loss: Loss) -> Loss:
  """Returns the loss of a Linen model with adapters at its projections.

  Args:
    loss: (params, *args) -> anything; calls `module.apply` with params, or with
      parts of them.

  Returns:
    (params, factors, *args) -> the same. Differentiate it by `factors`. Call
    `by_product` once: each call returns a new function, which jit compiles anew.
    A loss whose forward pass changes from trace to trace (by a Python flag) needs
    one for each, since a matrix that was met once counts as met.

  Raises:
    ValueError: when traced, a path that params do not have, a matrix that the
      forward pass never met as a projection, or one whose rule disagrees with
      the axes that its projection contracts.
  """
  loss = _unjitted(loss)
  owner = object()
  # Kept from call to call: a jit inside of the loss is traced only once.
  calls: dict[str, int] = {}
  lookups: dict[str, set[str]] = {}

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if isinstance(module, nn.Embed):
      pair = _beside(module, 'embedding', owner)
      if pair is not None:
        lookups.setdefault(pair.path, set()).add(context.method_name)
    pair = _beside(module, 'kernel', owner) if _is_call(context) else None
    if pair is None:
      return next_fun(*args, **kwargs)
    before = calls.get(pair.path, 0)
    y = next_fun(*args, **kwargs)
    if calls.get(pair.path, 0) > before:
      return y  # A subclass called its parent's method, met here already.
    calls[pair.path] = before + 1
    return y + _product(module, pair, y.dtype, *args, **kwargs)

  def adapted(params, factors, *args, **kwargs):
    with nn.intercept_methods(interceptor):
      result = loss(insert(params, factors, owner), *args, **kwargs)
    _check_met(factors, calls, lookups)
    return result

  return adapted


def by_addition(
    loss: Loss, matrices: matrices_lib.Matrices | None = None
) -> Loss:
  """Returns the loss at W + L R, for losses that are no product with W.

  Args:
    loss: (params, *args) -> anything.
    matrices: what is a matrix, see `Matrices`.

  Returns:
    (params, factors, *args) -> the same. Its gradient by the factors goes
    through that by W, of full size.
  """

  def adapted(params, factors, *args, **kwargs):
    leaves, treedef = jax.tree.flatten(params)
    for matrix in matrices_lib.find(params, matrices):
      if matrix.path in factors:
        pair = factors[matrix.path]
        change = matrix.unview(jnp.matmul(pair['left'], pair['right']))
        leaf = leaves[matrix.index]
        leaves[matrix.index] = leaf + change.astype(leaf.dtype)
    return loss(treedef.unflatten(leaves), *args, **kwargs)

  return adapted


def all_linear(loss: Loss, params: Any, *args: Any) -> matrices_lib.Matrices:
  """Returns what selects every projection that the forward pass meets.

  The loss is traced once, without computing anything, so the axes of kernels
  with three axes or more (attention heads, `nn.Einsum`) and of stacked layers
  are read from the model: no rules need to be written.

  Args:
    loss: (params, *args) -> anything.
    params: tree of arrays or shapes.
    *args: what the loss takes besides, arrays or shapes.

  Returns:
    `Matrices` with a rule for each kernel.

  Raises:
    ValueError: no projection was met.
  """
  owner = object()
  found: dict[str, tuple[tuple[int, ...], ...]] = {}
  calls: dict[str, int] = {}
  others = set()

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    pair = _beside(module, 'kernel', owner) if _is_call(context) else None
    if pair is None:
      if _is_call(context):
        others.add('/'.join(module.path))
      return next_fun(*args, **kwargs)
    before = calls.get(pair.path, 0)
    y = next_fun(*args, **kwargs)
    if calls.get(pair.path, 0) == before:  # As in `by_product`.
      calls[pair.path] = before + 1
      found[pair.path] = _axes(module, *args, **kwargs)[2:]
    return y

  leaves = jax.tree_util.tree_flatten_with_path(
      logical(params), is_leaf=_is_shape
  )[0]
  paths = matrices_lib.path_names([path for path, _ in leaves])
  shapes = {p: leaf.shape for p, (_, leaf) in zip(paths, leaves, strict=True)}
  kernels = [path for path in paths if path.rpartition('/')[2] == 'kernel']
  none = {'left': None, 'right': None}
  with nn.intercept_methods(interceptor):
    # A new function: one that was traced before would not be traced again.
    jax.eval_shape(
        lambda params, *a: _unjitted(loss)(
            insert(params, dict.fromkeys(kernels, none), owner), *a
        ),
        params,
        *args,
    )
  rules = []
  for path in kernels:
    if path in found:
      batch, left, right = found[path]
      # Axes of nn.scan and nn.vmap, in front.
      extra = len(shapes[path]) - len(batch + left + right)
      shift = lambda axes, extra=extra: tuple(a + extra for a in axes)
      rules.append(
          matrices_lib.Rule(
              f'^{re.escape(path)}$',
              left=shift(left),
              right=shift(right),
              batch=(*range(extra), *shift(batch)),
          )
      )
  if not rules:
    raise ValueError(
        'Expected a loss that calls nn.Dense, nn.DenseGeneral or nn.Einsum with'
        f' kernels of params, met {sorted(others) or "none"}.'
    )
  select = '|'.join(rule.pattern for rule in rules)
  return matrices_lib.Matrices(select=select, rules=tuple(rules))


def insert(
    params: Any,
    factors: Mapping[str, Mapping[str, Any]],
    owner: Any = None,
) -> Any:
  """Returns params with each pair of factors beside its kernel.

  Raises:
    ValueError: a path that is not a leaf below mappings.
  """
  leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]
  keys = [path for path, _ in leaves]
  where = dict(zip(matrices_lib.path_names(keys), keys, strict=True))
  for path, pair in factors.items():
    if path not in where:
      raise ValueError(
          f'Expected the factors of {path} to belong to a leaf of params; the'
          f' paths are {sorted(where)}.'
      )
    keys = where[path]
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey):
      keys = keys[:-1]  # A box around the leaf.
    is_key = lambda key: isinstance(key, jax.tree_util.DictKey)
    if not keys or not all(map(is_key, keys)):
      raise ValueError(
          f'Expected {path} to be a leaf below mappings, got keys {keys}.'
      )
    params = _insert(
        params, keys, _Pair(pair['left'], pair['right'], path, owner)
    )
  return params


def is_quantized(node: Any) -> bool:
  """Returns whether a node of a tree is one quantised array (Qwix)."""
  inner = getattr(node, 'array', node)
  return hasattr(inner, 'qvalue') and hasattr(inner, 'scale')


def logical(params: Any) -> Any:
  """Returns params with each quantised array as the shape it stands for."""

  def shape_of(node):
    if not is_quantized(node):
      return node
    array = getattr(node, 'array', node)
    return jax.ShapeDtypeStruct(tuple(node.shape), array.scale.dtype)

  return jax.tree.map(shape_of, params, is_leaf=is_quantized)


def _is_shape(node: Any) -> bool:
  return isinstance(node, jax.ShapeDtypeStruct)


def _unjitted(loss: Loss) -> Loss:
  """Returns the function below `jax.jit`, whose trace would be remembered."""
  is_jitted = isinstance(loss, jax.stages.Wrapped)
  if not is_jitted:
    return loss
  return _unjitted(loss.__wrapped__)  # pyrefly: ignore  (set by functools)


def _insert(tree: Any, keys: Sequence[Any], pair: _Pair) -> Any:
  name = keys[0].key
  if len(keys) == 1:
    return {**tree, f'{name}{_SUFFIX}': pair}
  return {**tree, name: _insert(tree[name], keys[1:], pair)}


def _is_call(context: Any) -> bool:
  is_projection = isinstance(context.module, _PROJECTIONS)
  return is_projection and context.method_name == '__call__'


def _beside(module: nn.Module, name: str, owner: Any) -> _Pair | None:
  """Returns the factors beside a parameter of a module, if there are some."""
  if not module.has_variable('params', name + _SUFFIX):
    return None
  pair = module.get_variable('params', name + _SUFFIX)
  return pair if pair.owner is owner else None


def _axes(module: nn.Module, inputs: jax.Array, einsum_str: str | None = None):
  """Returns axes: x contracted, x batch, kernel batch, left, right."""
  if isinstance(module, nn.Einsum):
    labels, kernel, out = _einsum_labels(module, inputs, einsum_str)
    batch = [a for a in kernel if a in labels and a in out]
    left = [a for a in kernel if a in labels and a not in out]
    right = [a for a in kernel if a not in labels]
    place = lambda chosen, among: tuple(among.index(a) for a in chosen)
    return (
        place(left, labels),
        place(batch, labels),
        place(batch, kernel),
        place(left, kernel),
        place(right, kernel),
    )
  one = lambda value: (value,) if isinstance(value, int) else tuple(value)
  axis: tuple[int, ...] = (-1,)
  batch, num_features = (), 1
  if isinstance(module, nn.DenseGeneral):
    axis, batch = one(module.axis), one(module.batch_dims)
    num_features = len(one(module.features))
  bounds = [0, len(batch), len(batch) + len(axis)]
  bounds.append(bounds[-1] + num_features)
  ranges = [
      tuple(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)
  ]
  positive = lambda axes: tuple(sorted(a % inputs.ndim for a in axes))
  return positive(axis), positive(batch), *ranges


def _einsum_labels(
    module: nn.Einsum, inputs: jax.Array, einsum_str: str | None = None
) -> tuple[str, str, str]:
  """Returns one letter an axis for x, kernel and output, without ellipses."""
  text = (module.einsum_str or einsum_str or '').replace(' ', '')
  operands, out = text.split('->')
  labels, kernel = operands.split(',')
  unused = [c for c in map(chr, range(ord('A'), ord('z') + 1)) if c.isalpha()]
  unused = [c for c in unused if c not in text]
  dots = ''.join(unused[: inputs.ndim - len(labels.replace('...', ''))])
  fill = lambda part: part.replace('...', dots)
  return fill(labels), fill(kernel), fill(out)


def _product(
    module: Any, pair: _Pair, dtype: Any, inputs: jax.Array, *args, **kwargs
) -> jax.Array:
  """Returns (x L) R in the layout of the module's output."""
  left, right = (f.astype(dtype) for f in (pair.left, pair.right))
  x = inputs.astype(dtype)
  contracted, batch, kernel_batch, kernel_left, kernel_right = _axes(
      module, x, *args, **kwargs
  )
  kernel = module.get_variable('params', 'kernel')
  shape = tuple(jax.tree.leaves(kernel, is_leaf=is_quantized)[0].shape)
  sizes = lambda axes: tuple(shape[axis] for axis in axes)
  rank = left.shape[-1]
  expected = (*sizes(kernel_batch), math.prod(sizes(kernel_left)), rank)
  if left.shape != expected:
    raise ValueError(
        f'Expected the left factor of {pair.path} to have shape {expected},'
        f' got {left.shape}: its rule should say left={kernel_left},'
        f' right={kernel_right}, batch={kernel_batch}, after the axes that'
        ' nn.scan puts in front.'
    )
  left = left.reshape(*sizes(kernel_batch), *sizes(kernel_left), rank)
  right = right.reshape(*sizes(kernel_batch), rank, *sizes(kernel_right))
  if isinstance(module, nn.Einsum):
    labels, names, out = _einsum_labels(module, x, *args, **kwargs)
    pick = lambda axes: ''.join(names[a] for a in axes)
    r = next(c for c in 'rstuvwxyzabcdefghijklmnopq' if c not in labels + names)
    kept = ''.join(c for c in labels if c not in pick(kernel_left))
    thin = f'{labels},{pick(kernel_batch)}{pick(kernel_left)}{r}->{kept}{r}'
    wide = f'{kept}{r},{pick(kernel_batch)}{r}{pick(kernel_right)}->{out}'
    h = jnp.einsum(thin, x, left, precision=module.precision)
    return jnp.einsum(wide, h, right, precision=module.precision)
  count = len(batch)
  first = tuple(range(count))
  places = tuple(range(count, count + len(contracted)))
  h = jax.lax.dot_general(
      x,
      left,
      ((contracted, places), (batch, first)),
      precision=module.precision,
  )
  return jax.lax.dot_general(
      h,
      right,
      (((h.ndim - 1,), (count,)), (first, first)),
      precision=module.precision,
  )


def _check_met(
    factors: Factors,
    calls: Mapping[str, int],
    lookups: Mapping[str, set[str]],
) -> None:
  """Raises for a selected matrix that the forward pass never met."""
  for path in factors:
    if path in calls:
      continue
    why = 'no nn.Dense, nn.DenseGeneral or nn.Einsum was called with it'
    if path in lookups:
      why = 'it is the table of an nn.Embed'
      if 'attend' in lookups[path]:
        why += ', tied to the output by its method attend'
    raise ValueError(
        f'Expected the forward pass to meet {path} as a projection, but {why}:'
        ' select others, or adapt it by inject.by_addition.'
    )
