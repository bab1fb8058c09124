"""Projections of Linen models: their axes, and factors beside quantised kernels.

A weight quantised by Qwix is several arrays, of none of which `inject` could say
what W + L R is. There an interceptor adds (x L) R to the output of the `nn.Dense`,
`nn.DenseGeneral` or `nn.Einsum` that has it as its kernel. The factors travel beside
their kernel, under `kernel_adapter`, so that `nn.scan` and `nn.remat` carry them.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import string
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import lowrank
from bernoulli_lora_jax import matrices as matrices_lib

Loss = Callable[..., Any]
Factors = Mapping[str, Mapping[str, Any]]

_SUFFIX = '_adapter'  # `kernel_adapter` stands beside `kernel`.
_PROJECTIONS = (nn.Dense, nn.DenseGeneral, nn.Einsum)


@dataclasses.dataclass(frozen=True)
class Calls:
  """How often a loss has met each matrix, and whose factors those are.

  Kept from call to call: a jit inside of the loss is traced only once.
  """

  count: dict[str, int] = dataclasses.field(default_factory=dict)

  __hash__ = object.__hash__
  __eq__ = object.__eq__


def enter(loss: Loss, factors: Factors, calls: Calls) -> Loss:
  """Returns (params, *args) -> the loss with factors at its quantised kernels.

  Raises:
    ValueError: when traced, a matrix that is the kernel of no projection, or one
      whose factors do not fit it.
  """

  def entered(params, *args, **kwargs):
    interceptor = _interceptor(calls, _product)
    with nn.intercept_methods(interceptor):
      result = _unjitted(loss)(
          _insert_all(params, factors, calls), *args, **kwargs
      )
    for path in factors:
      if path not in calls.count:
        raise ValueError(
            f'Expected the quantised {path} to be the kernel of an nn.Dense,'
            ' nn.DenseGeneral or nn.Einsum that the loss calls: select others.'
        )
    return result

  return entered


def leave_out(loss: Loss, factors: Factors) -> Loss:
  """Returns a loss whose products with quantised kernels depend on x alone.

  It computes something else: what still depends on these kernels there uses them
  outside of their products.
  """
  owner = Calls()

  def stand_in(module, pair, y, *args, **kwargs):
    del module, pair
    arrays = jax.tree.leaves((args, kwargs))
    total = sum(jnp.sum(x) for x in arrays if isinstance(x, jax.Array))
    return jnp.full(y.shape, total).astype(y.dtype)

  def left(params, *args, **kwargs):
    with nn.intercept_methods(_interceptor(owner, stand_in)):
      params = _insert_all(params, factors, owner)
      return _unjitted(loss)(params, *args, **kwargs)

  return left


def watch(
    loss: Loss,
    params: Any,
    paths: Sequence[str],
    found: dict[str, lowrank.Axes],
) -> Loss:
  """Returns a loss that notes the axes of kernels with which it calls projections.

  Axes that nn.scan and nn.vmap add to a kernel are taken to stand in front.
  """
  shapes, owner = _shapes(params), Calls()
  none = dict.fromkeys(paths, {'left': None, 'right': None})

  def note(module, pair, y, *args, **kwargs):
    inner = _axes(module, *args, **kwargs)[2:]
    extra = len(shapes[pair.path]) - sum(map(len, inner))
    batch, left, right = (tuple(a + extra for a in own) for own in inner)
    found[pair.path] = lowrank.Axes((*range(extra), *batch), left, right)
    return y

  def watched(params, *args, **kwargs):
    with nn.intercept_methods(_interceptor(owner, note)):
      params = _insert_all(params, none, owner)
      return _unjitted(loss)(params, *args, **kwargs)

  return watched


def _interceptor(calls: Calls, act: Callable[..., jax.Array]) -> Any:
  """Returns an interceptor that calls act(module, pair, y, *args) once a call."""

  def intercept(next_fun, args, kwargs, context):
    pair = _beside(context, calls)
    if pair is None:
      return next_fun(*args, **kwargs)
    before = calls.count.get(pair.path, 0)
    y = next_fun(*args, **kwargs)
    if calls.count.get(pair.path, 0) > before:
      return y  # A subclass called its parent's method, met here already.
    calls.count[pair.path] = before + 1
    return act(context.module, pair, y, *args, **kwargs)

  return intercept


def _product(
    module: Any, pair: Any, y: jax.Array, inputs: jax.Array, *args, **kwargs
) -> jax.Array:
  """Returns y + (x L) R, in the layout and dtype of the module's output."""
  x = inputs.astype(y.dtype)
  contracted, batch, *own = _axes(module, x, *args, **kwargs)
  kernel = module.get_variable('params', 'kernel')
  shape = tuple(jax.tree.leaves(kernel, is_leaf=is_quantized)[0].shape)
  sizes = lambda axes: tuple(shape[axis] for axis in axes)
  own, rank = lowrank.Axes(*own), pair.left.shape[-1]
  expected = (*sizes(own.batch), math.prod(sizes(own.left)), rank)
  if pair.left.shape != expected:
    raise ValueError(
        f'Expected the left factor of {pair.path} to have shape {expected},'
        f' got {pair.left.shape}: its rule should say left={own.left},'
        f' right={own.right}, batch={own.batch}, after the axes that nn.scan puts'
        ' in front.'
    )
  if not isinstance(module, nn.Einsum):
    shaped: Any = jax.ShapeDtypeStruct(shape, y.dtype)
    value = lowrank.low_rank(shaped, pair.left, pair.right, own, pair.path)
    p = lowrank.Product(
        is_left=False,
        contracted=own.left,
        batch=own.batch,
        other_contracted=contracted,
        other_batch=batch,
        precision=module.precision,
        dtype=y.dtype,
        out_sharding=None,
    )
    change = lowrank.product(value, x, p)
    assert change is not None  # It sums over the left side.
    return y + change
  labels, names, out = _einsum_labels(module, x, *args, **kwargs)
  pick = lambda axes: ''.join(names[a] for a in axes)
  left = pair.left.reshape(*sizes(own.batch + own.left), rank)
  right = pair.right.reshape(*sizes(own.batch), rank, *sizes(own.right))
  r = next(c for c in string.ascii_letters if c not in labels + names)
  kept = ''.join(c for c in labels if c not in pick(own.left))
  thin = f'{labels},{pick(own.batch + own.left)}{r}->{kept}{r}'
  wide = f'{kept}{r},{pick(own.batch)}{r}{pick(own.right)}->{out}'
  cast = lambda factor: factor.astype(y.dtype)
  h = jnp.einsum(thin, x, cast(left), precision=module.precision)
  return y + jnp.einsum(wide, h, cast(right), precision=module.precision)


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


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
  flat = jax.tree_util.tree_flatten_with_path(logical(params))[0]
  names = matrices_lib.path_names([keys for keys, _ in flat])
  return {
      name: np.shape(leaf) for name, (_, leaf) in zip(names, flat, strict=True)
  }


def _unjitted(loss: Loss) -> Loss:
  """Returns the function below `jax.jit`, whose trace would be remembered."""
  if not isinstance(loss, jax.stages.Wrapped):
    return loss
  return _unjitted(loss.__wrapped__)  # pyrefly: ignore  (set by functools)


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


def _insert_all(params: Any, factors: Factors, owner: Any) -> Any:
  """Returns params with each pair of factors beside its kernel."""
  flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]
  keys = [path for path, _ in flat]
  where = dict(zip(matrices_lib.path_names(keys), keys, strict=True))
  for path, pair in factors.items():
    keys = where[path]
    if not all(isinstance(key, jax.tree_util.DictKey) for key in keys):
      raise ValueError(
          f'Expected the quantised {path} to be a leaf below mappings, got keys'
          f' {keys}.'
      )
    pair = _Pair(pair['left'], pair['right'], path, owner)
    params = _insert(params, keys, pair)
  return params


def _insert(tree: Any, keys: Sequence[Any], pair: _Pair) -> Any:
  name = keys[0].key
  if len(keys) == 1:
    return {**tree, f'{name}{_SUFFIX}': pair}
  return {**tree, name: _insert(tree[name], keys[1:], pair)}


def _is_projection(context: Any) -> bool:
  is_call = context.method_name == '__call__'
  return is_call and isinstance(context.module, _PROJECTIONS)


def _beside(context: Any, owner: Any) -> _Pair | None:
  """Returns the factors beside the kernel of a projection, if there are some."""
  module, name = context.module, 'kernel' + _SUFFIX
  if not (_is_projection(context) and module.has_variable('params', name)):
    return None
  pair = module.get_variable('params', name)
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
