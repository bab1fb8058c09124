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
import math
import re
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from bernoulli_lora_jax import matrices as matrices_lib

Factors = Mapping[str, Mapping[str, jax.Array]]
Loss = Callable[..., Any]

_NAME = 'adapter'  # Beside `kernel`; a pair, so no parameter of its module.
_PROJECTIONS = (nn.Dense, nn.DenseGeneral, nn.Einsum)
# Axes of a projection: those of x that are contracted, those of x that are
# batch axes of the kernel, and the kernel's batch, left and right axes.


def by_product(loss: Loss) -> Loss:
  """Returns the loss of a Linen model with adapters at its projections.

  Args:
    loss: (params, *args) -> anything; calls `module.apply` with params, or with
      parts of them.

  Returns:
    (params, factors, *args) -> the same. Differentiate it by `factors`.

  Raises:
    ValueError: when traced, a path that params do not have, a matrix that the
      forward pass never met as a projection, or one whose rule disagrees with
      the axes that its projection contracts.
  """
  loss = _unjitted(loss)

  def adapted(params, factors, *args, **kwargs):
    calls: dict[str, int] = {}
    lookups: dict[str, set[str]] = {}

    def interceptor(next_fun, args, kwargs, context):
      module, path = context.module, '/'.join(context.module.path)
      if isinstance(module, nn.Embed):
        lookups.setdefault(path, set()).add(context.method_name)
      is_projection = (
          isinstance(module, _PROJECTIONS) and context.method_name == '__call__'
      )
      if not is_projection or not module.has_variable('params', _NAME):
        return next_fun(*args, **kwargs)
      before = calls.get(path, 0)
      y = next_fun(*args, **kwargs)
      if calls.get(path, 0) > before:
        return y  # A subclass called its parent's method, met here already.
      calls[path] = before + 1
      pair = module.get_variable('params', _NAME)
      return y + _product(module, path, y.dtype, pair, *args, **kwargs)

    with nn.intercept_methods(interceptor):
      result = loss(insert(params, factors), *args, **kwargs)
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
  found: dict[str, tuple[int, tuple[tuple[int, ...], ...]]] = {}

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    y = next_fun(*args, **kwargs)
    if isinstance(module, _PROJECTIONS) and context.method_name == '__call__':
      axes = _axes(module, *args, **kwargs)
      ndim = sum(map(len, axes[2:]))
      found['/'.join(module.path)] = (ndim, axes[2:])
    return y

  with nn.intercept_methods(interceptor):
    # A new function: one that was traced before would not be traced again.
    jax.eval_shape(lambda *a: _unjitted(loss)(*a), params, *args)
  rules = []
  leaves = jax.tree_util.tree_flatten_with_path(
      logical(params), is_leaf=_is_shape
  )[0]
  paths = matrices_lib.path_names([path for path, _ in leaves])
  for path, (_, leaf) in zip(paths, leaves, strict=True):
    owner, _, name = path.rpartition('/')
    met = [p for p in found if owner == p or owner.endswith(f'/{p}')]
    if name == 'kernel' and met:
      ndim, (batch, left, right) = found[max(met, key=len)]
      extra = len(leaf.shape) - ndim  # Axes of nn.scan and nn.vmap, in front.
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
        f' kernels of params, met {sorted(found) or "none"}.'
    )
  select = '|'.join(rule.pattern for rule in rules)
  return matrices_lib.Matrices(select=select, rules=tuple(rules))


def insert(params: Any, factors: Factors) -> Any:
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
    names = [
        key.key for key in where[path] if isinstance(key, jax.tree_util.DictKey)
    ]
    params = _insert(params, names[:-1], (pair['left'], pair['right']))
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
  return getattr(loss, '__wrapped__', loss) if is_jitted else loss


def _insert(tree: Any, names: Sequence[Any], pair: Any) -> Any:
  copy = dict(tree)
  if names:
    copy[names[0]] = _insert(copy[names[0]], names[1:], pair)
  else:
    copy[_NAME] = pair
  return copy


def _axes(module: nn.Module, x: jax.Array, einsum_str: str | None = None):
  """Returns axes: x contracted, x batch, kernel batch, left, right."""
  if isinstance(module, nn.Einsum):
    labels, kernel, out = _einsum_labels(module, x, einsum_str)
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
  positive = lambda axes: tuple(a % x.ndim for a in axes)
  return positive(axis), positive(batch), *ranges


def _einsum_labels(
    module: nn.Einsum, x: jax.Array, einsum_str: str | None = None
) -> tuple[str, str, str]:
  """Returns one letter an axis for x, kernel and output, without ellipses."""
  text = (module.einsum_str or einsum_str or '').replace(' ', '')
  inputs, out = text.split('->')
  labels, kernel = inputs.split(',')
  unused = [c for c in map(chr, range(ord('A'), ord('z') + 1)) if c.isalpha()]
  unused = [c for c in unused if c not in text]
  dots = ''.join(unused[: x.ndim - len(labels.replace('...', ''))])
  fill = lambda part: part.replace('...', dots)
  return fill(labels), fill(kernel), fill(out)


def _product(
    module: Any, path: str, dtype: Any, pair: Any, x: jax.Array, *args, **kwargs
) -> jax.Array:
  """Returns (x L) R in the layout of the module's output."""
  left, right = (factor.astype(dtype) for factor in pair)
  x = x.astype(dtype)
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
        f'Expected the left factor of {path}/kernel to have shape {expected},'
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
  owns = lambda path, owner: path == owner or path.endswith(f'/{owner}')
  for path in factors:
    owner = path.rpartition('/')[0]
    if any(owns(owner, met) for met in calls):
      continue
    why = 'no nn.Dense, nn.DenseGeneral or nn.Einsum was called with it'
    for lookup, used in lookups.items():
      if owns(owner, lookup):
        why = 'it is the table of an nn.Embed'
        if 'attend' in used:
          why += ', tied to the output by its method attend'
    raise ValueError(
        f'Expected the forward pass to meet {path} as a projection, but {why}:'
        ' select others, or adapt it by inject.by_addition.'
    )
