"""Gradients of the parts of a batch, combined into the gradient of the batch.

Parts follow one another (micro-batches) or lie on devices. A loss
is a mean over the examples of its batch, or over another weight (tokens, examples
that are no padding), which it then returns:

    def loss(params, batch):
      tokens = jnp.sum(batch['mask'])
      value = jnp.sum(losses * batch['mask']) / tokens
      return value, bl.Weighted(tokens, {'logits': logits, 'tokens': tokens})

Values and gradients are averaged by that weight; without one the parts are taken
to weigh the same. What a loss returns beside its value must not depend on the
number of parts, see `accumulate`.
"""

from collections.abc import Callable, Mapping
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import deprecated
from bernoulli_lora_jax import devices as devices_lib
from bernoulli_lora_jax import matrices as matrices_lib

REDUCTIONS = ('mean', 'sum', 'max', 'min', 'any', 'all')


class Weighted(NamedTuple):
  """What a loss returns beside its value, with the weight of its batch."""

  weight: Any  # shape=(), >= 0: what the value is a mean over.
  aux: Any = None


def accumulate(
    grad_fn: Callable[..., Any],
    num_micro_batches: int,
    reductions: Mapping[str, str] | None = None,
    axis_name: str | None = None,
    *,
    average: Callable[[Any], Any] | None = None,
) -> Callable[..., Any]:
  """Averages a gradient over micro-batches, one after another.

  Args:
    grad_fn: (params, batch, *args) -> gradient, or what `jax.value_and_grad` makes
      of a loss: ((value, aux), gradient). It is a mean over the examples of the
      batch, or over the weight that it returns as `Weighted` in place of aux.
    num_micro_batches: n >= 1; divides the leading axis of every array of the
      batch. Scalars and single keys in the batch go to all parts as they are.
    reductions: {regular expression searched in a path of aux: 'mean', 'sum',
      'max', 'min', 'any' or 'all'} for what follows no example. Where none is
      given, integers are summed, floats averaged, booleans and keys refused: a
      sum in floating point must be declared.
    axis_name: deprecated: average=devices.Mapped(axis_name).
    average: where devices hold parts of the batch, the mean over them. Of
      `devices.Mapped` they are combined likewise; of another function see
      `averaged`.

  Returns:
    (params, batch, *args) -> what grad_fn returns for the whole batch: floats are
    means over the parts by weight (without `Weighted`, over equal parts), summed
    in promote_types(dtype, float32) and returned in their dtype; arrays of which
    one axis follows the batch, whatever its length, are concatenated in order.
    Pass it to estimators in place of `grad_fn`: both points then see the same
    accumulated batch. A typed key in args is folded with the part's number, so
    that noise differs by part; noise keyed by the index of an example, which no
    part changes, takes its key from the batch. One part is grad_fn itself.

  Raises:
    ValueError: num_micro_batches < 1, a batch that it does not divide, arrays of
      the batch with other leading axes, an output whose reduction is not known;
      by path.
    TypeError: a raw key (uint32) in args, whose noise would repeat.
  """
  checks.at_least(1, num_micro_batches=num_micro_batches)
  if axis_name is not None:
    deprecated.warn('axis_name=name', 'average=devices.Mapped(name)')
    average = devices_lib.Mapped(axis_name)
  is_mapped = isinstance(average, devices_lib.Mapped)
  combined = functools.partial(
      _accumulated,
      grad_fn,
      num_micro_batches,
      check_reductions(reductions),
      average if is_mapped else None,
  )
  if average is None or is_mapped:
    return combined
  return averaged(combined, average)


def _accumulated(
    grad_fn: Callable[..., Any],
    num: int,
    reductions: Mapping[str, str],
    devices: devices_lib.Mapped | None,
    params: Any,
    batch: Any,
    *args: Any,
) -> Any:
  count = num if devices is None else num * devices.count()
  if count == 1:
    return grad_fn(params, batch, *args)
  size = batch_size(batch)
  if size % num:
    raise ValueError(
        f'Expected num_micro_batches={num} to divide the batch, got a leading'
        f' axis of {size}.'
    )
  part, arrays = size // num, _arrays(batch)
  of_part = functools.partial(_of_part, grad_fn, batch, args)
  sizes = part, part * count
  shapes, kinds = _kinds(of_part, params, arrays, sizes, reductions)
  flat, treedef = jax.tree.flatten(shapes)
  place = _weight_place(shapes)
  dtype = jnp.float32 if place is None else flat[place].dtype
  start = [_start(k, s) for k, s in zip(kinds, flat, strict=True)]
  zero = jnp.zeros([], jnp.promote_types(dtype, jnp.float32))
  first = 0 if devices is None else devices.index() * num
  split = [x.reshape(num, part, *x.shape[1:]) for x in arrays]
  (sums, weights), rows = jax.lax.scan(
      functools.partial(_add_part, of_part, params, kinds, place),
      (start, zero),
      (first + jnp.arange(num), split),
  )
  if devices is not None:
    weights = devices.joined('sum', weights)
  outs = [
      _total(kind, s, row, weights, devices, shape.dtype)
      for kind, shape, s, row in zip(kinds, flat, sums, rows, strict=True)
  ]
  return treedef.unflatten(outs)


def _of_part(
    grad_fn: Callable[..., Any],
    batch: Any,
    args: Any,
    params: Any,
    number: Any,
    arrays: list[Any],
) -> Any:
  """Returns grad_fn of a part of the batch, of its own noise."""
  return grad_fn(params, _with_arrays(batch, arrays), *folded(args, number))


def _add_part(
    of_part: Callable[..., Any],
    params: Any,
    kinds: list[Any],
    place: int | None,
    carry: Any,
    inputs: Any,
) -> Any:
  """Adds a part to the sums and weights; returns its rows beside them."""
  sums, weights = carry
  outs = jax.tree.leaves(of_part(params, *inputs))
  weight = None if place is None else _wide(outs[place])
  is_row = [isinstance(kind, int) for kind in kinds]
  sums = [
      None if row else _add(kind, s, x, weight)
      for row, kind, s, x in zip(is_row, kinds, sums, outs, strict=True)
  ]
  rows = [x if row else None for row, x in zip(is_row, outs, strict=True)]
  return (sums, weights + (1 if weight is None else weight)), rows


def _total(
    kind: Any,
    total: Any,
    rows: Any,
    weights: jax.Array,
    devices: devices_lib.Mapped | None,
    dtype: Any,
) -> jax.Array:
  """Returns an output of the whole batch, from its sum or its rows."""
  if isinstance(kind, int):
    out = _concatenated(rows, kind)
    return out if devices is None else devices.joined(kind, out)
  if devices is not None:
    total = devices.joined('sum' if kind == 'mean' else kind, total)
  if kind == 'mean':
    total = total / jnp.where(weights > 0, weights, 1).astype(total.dtype)
  return total.astype(dtype)


def _arrays(batch: Any) -> list[jax.Array]:
  """Returns what of a batch has an axis of examples."""
  return [jnp.asarray(x) for x in jax.tree.leaves(batch) if jnp.ndim(x)]


def _with_arrays(batch: Any, arrays: list[Any]) -> Any:
  """Returns a batch with other arrays in place of `_arrays(batch)`."""
  rest = iter(arrays)
  return jax.tree.map(lambda x: next(rest) if jnp.ndim(x) else x, batch)


def chunked(grad_fn: Callable[..., Any], size: int) -> Callable[..., Any]:
  """Evaluates a mean over a batch of any length in chunks, one after another.

  Args:
    grad_fn: (params, batch, *args) -> as for `accumulate`, a loss's (value, aux)
      or its gradient, nothing of which follows the examples.
    size: most examples at a time; 0 for all.

  Returns:
    (params, batch, *args) -> what grad_fn returns for the whole batch, the last
    chunk as short as need be.
  """
  if size < 0:
    raise ValueError(f'Expected a chunk of size >= 0, got size={size}.')

  def in_chunks(params, batch, *args):
    length = batch_size(batch)
    if not size or size >= length:
      return grad_fn(params, batch, *args)
    count = length // size
    row = lambda low, high: jax.tree.map(
        lambda x: x[low:high] if jnp.ndim(x) else x, batch
    )
    main = accumulate(grad_fn, count)(params, row(0, count * size), *args)
    if count * size == length:
      return main
    rest = grad_fn(params, row(count * size, length), *args)
    return combined([main, rest], [count * size, length - count * size])

  return in_chunks


def combined(results: list[Any], sizes: list[int]) -> Any:
  """Returns the means over parts of a batch as those over the batch.

  Args:
    results: what a loss or its gradient returned for each part.
    sizes: their examples: the weights where none are returned (`Weighted`).

  Returns:
    Means by weight in the dtypes of the parts; integers are summed.
  """
  place = _weight_place(results[0])
  flat = [jax.tree.leaves(result) for result in results]
  weights = [jnp.asarray(size, jnp.float32) for size in sizes]
  if place is not None:
    weights = [_wide(leaves[place]) for leaves in flat]
  total = jnp.where(sum(weights) > 0, sum(weights), 1)

  def mean(i, xs):
    if i == place or jnp.issubdtype(xs[0].dtype, jnp.integer):
      return sum(xs[1:], xs[0])
    terms = [_term(x, w) for x, w in zip(xs, weights, strict=True)]
    scale = total.astype(terms[0].dtype)
    return (sum(terms[1:], terms[0]) / scale).astype(xs[0].dtype)

  leaves = [
      mean(i, [jnp.asarray(x) for x in xs])
      for i, xs in enumerate(zip(*flat, strict=True))
  ]
  return jax.tree.unflatten(jax.tree.structure(results[0]), leaves)


def averaged(
    grad_fn: Callable[..., Any], average: Callable[[Any], Any]
) -> Callable[..., Any]:
  """Returns grad_fn with its result averaged over devices by a function.

  Args:
    grad_fn: (params, batch, *args) -> ((value, aux), gradient).
    average: mean over the devices of a tree, each of the same weight for it.

  Returns:
    (params, batch, *args) -> the mean by weight where aux is `Weighted`.

  Raises:
    ValueError: an output that a mean would spoil: counts, booleans, what follows
      the examples; by path.
  """

  def mean(params, batch, *args):
    out = grad_fn(params, batch, *args)
    names, leaves = _named(out)
    place = _weight_place(out)
    plain = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.ndim == 0
    beside = [(i, leaves[i]) for i, name in enumerate(names) if name]
    if all(i == place or plain(jnp.asarray(x)) for i, x in beside):
      kinds = ['mean'] * len(leaves)
    else:
      size = batch_size(batch)
      one = lambda params, number, arrays: grad_fn(
          params, _with_arrays(batch, arrays), *args
      )
      arrays = _arrays(batch)
      _, kinds = _kinds(one, params, arrays, (size, 2 * size), {})
    for i, kind in enumerate(kinds):
      if kind != 'mean' and i != place:
        raise ValueError(
            f'Expected average to be a devices.Mapped for {names[i]}, which is'
            f' no mean over the examples, got average={average!r}.'
        )
    if place is None:
      return average(out)
    weight = _wide(leaves[place])
    total = average(weight)
    terms = average([_term(x, weight) for x in leaves])
    scale = jnp.where(total > 0, total, 1)
    result = [
        (t / scale.astype(t.dtype)).astype(x.dtype)
        for t, x in zip(terms, leaves, strict=True)
    ]
    result[place] = total.astype(jnp.promote_types(leaves[place].dtype, 'f4'))
    return jax.tree.unflatten(jax.tree.structure(out), result)

  return mean


def over_devices(tree: Any, devices: devices_lib.Mapped | str) -> Any:
  """Returns what devices hold combined: means by weight, sums of counts.

  Args:
    tree: floats and integers; none of them follows the examples.
    devices: that hold them; the name of their axis is deprecated.

  Raises:
    ValueError: a boolean.
  """
  if isinstance(devices, str):
    deprecated.warn(
        'over_devices(tree, name)', 'over_devices(tree, devices.Mapped(name))'
    )
    devices = devices_lib.Mapped(devices)
  place = _weight_place(tree)
  leaves, treedef = jax.tree.flatten(tree)
  weight = jnp.ones([]) if place is None else _wide(leaves[place])
  total = devices.joined('sum', weight)

  def combine(i, x):
    x = jnp.asarray(x)
    if i == place or jnp.issubdtype(x.dtype, jnp.integer):
      return devices.joined('sum', x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      raise ValueError(
          'Expected numbers to average over devices, got an array of dtype'
          f' {x.dtype}: count with jnp.sum(..., dtype=int).'
      )
    if place is None:
      return devices(x)
    terms = devices.joined('sum', _term(x, weight))
    scale = jnp.where(total > 0, total, 1).astype(terms.dtype)
    return (terms / scale).astype(x.dtype)

  return treedef.unflatten([combine(i, x) for i, x in enumerate(leaves)])


def batch_size(batch: Any) -> int:
  """Returns the number of examples, the one leading axis of a batch.

  Raises:
    ValueError: arrays with other leading axes, by path; none with any.
  """
  flat = jax.tree_util.tree_flatten_with_path(batch)[0]
  sizes = {
      jax.tree_util.keystr(path): jnp.shape(leaf)[0]
      for path, leaf in flat
      if jnp.ndim(leaf)
  }
  if not sizes:
    raise ValueError(
        'Expected a batch with a leading axis of examples, got scalars alone.'
    )
  (first, size), *others = sizes.items()
  for path, other in others:
    if other != size:
      raise ValueError(
          f'Expected batch{path} to have the leading axis {size} of'
          f' batch{first}, got {other}: what is the same for all examples is'
          ' passed as a further argument.'
      )
  return size


def folded(args: Any, number: Any) -> Any:
  """Returns arguments with their typed keys folded with the part's number.

  Raises:
    TypeError: a raw key.
  """

  def fold(x):
    dtype = getattr(x, 'dtype', None)
    if dtype is None:
      return x
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
      one = lambda key: jax.random.fold_in(key, number)
      return jax.vmap(one)(x.reshape(-1)).reshape(x.shape) if x.ndim else one(x)
    if dtype == jnp.uint32 and x.shape == (2,):
      raise TypeError(
          'Expected a typed key, jax.random.key(seed), among the arguments of a'
          ' loss in parts, got uint32 of shape (2,): wrap it with'
          ' jax.random.wrap_key_data, its noise would repeat from part to part.'
      )
    return x

  return jax.tree.map(fold, args)


def check_reductions(reductions: Mapping[str, str] | None) -> dict[str, str]:
  """Returns reductions as a dict; raises unless each is known."""
  reductions = dict(reductions or {})
  for pattern, how in reductions.items():
    matrices_lib.check_pattern('a pattern of reductions', pattern)
    if how not in REDUCTIONS:
      raise ValueError(
          f'Expected reductions[{pattern!r}] in {REDUCTIONS}, got {how!r}.'
      )
  return reductions


def _is_weighted(node: Any) -> bool:
  return isinstance(node, Weighted)


def _weight_place(out: Any) -> int | None:
  """Returns the position of the weight among the leaves, or None."""
  place, count = None, 0
  for node in jax.tree.leaves(out, is_leaf=_is_weighted):
    if _is_weighted(node):
      if place is not None or jnp.shape(node.weight) != ():
        raise ValueError(
            'Expected one scalar weight of a loss, got a second or one of shape'
            f' {jnp.shape(node.weight)}.'
        )
      place = count
      count += len(jax.tree.leaves(node))
    else:
      count += 1
  return place


def _named(out: Any) -> tuple[list[str], list[Any]]:
  """Returns paths within aux ('' outside of it), and the leaves."""
  has_aux = (
      type(out) is tuple
      and len(out) == 2
      and type(out[0]) is tuple
      and len(out[0]) == 2
  )
  names = []
  for path, _ in jax.tree_util.tree_flatten_with_path(out)[0]:
    index = [getattr(key, 'idx', None) for key in path[:2]]
    inside = has_aux and index == [0, 1]
    below = path[2:]
    if inside and _is_weighted(out[0][1]):
      below = below[1:] if below[0].name == 'aux' else below
    keys = [jax.tree_util.keystr((key,), simple=True) for key in below]
    names.append(('/'.join(keys) or 'aux') if inside else '')
  return names, jax.tree.leaves(out)


def _kinds(
    one: Callable[..., Any],
    params: Any,
    split: list[Any],
    sizes: tuple[int, int],
    reductions: Mapping[str, str],
) -> tuple[Any, list[Any]]:
  """Returns shapes of a part's outputs; axes to concatenate, or reductions."""

  def shapes_of(size):
    rows = [jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for x in split]
    number = jax.ShapeDtypeStruct((), jnp.int32)
    call = lambda number, rows: one(params, number, rows)
    return jax.eval_shape(call, number, rows)

  part, whole = shapes_of(sizes[0]), shapes_of(sizes[1])
  names, leaves = _named(part)
  place = _weight_place(part)
  unused = [p for p in reductions if not any(re.search(p, n) for n in names)]
  if unused:
    raise ValueError(
        f'Expected the pattern {unused[0]!r} of reductions to match what the'
        f' loss returns beside its value, got {[n for n in names if n]}.'
    )
  kinds: list[Any] = []
  others = jax.tree.leaves(whole)
  for i, (name, a, b) in enumerate(zip(names, leaves, others, strict=True)):
    where = name or f'output {i}'
    declared = {
        how for p, how in reductions.items() if name and re.search(p, name)
    }
    axes = [k for k, s in enumerate(a.shape) if s != b.shape[k]]
    if len(declared) > 1 or len(axes) > 1 or (declared and axes):
      raise ValueError(
          f'Expected one way to combine the parts of {where}, got reductions'
          f' {sorted(declared)} for shape {a.shape} in a batch of {sizes[0]},'
          f' {b.shape} of {sizes[1]}.'
      )
    if i == place:
      kinds.append('sum')
    elif axes:
      kinds.append(axes[0])
    elif declared:
      kinds.append(declared.pop())
    elif jnp.issubdtype(a.dtype, jnp.integer):
      kinds.append('sum')
    elif jnp.issubdtype(a.dtype, jnp.inexact):
      kinds.append('mean')
    else:
      raise ValueError(
          f'Expected reductions to say how the parts of {where} are combined,'
          f" for example {{{where!r}: 'any'}}, got dtype {a.dtype}."
      )
  return part, kinds


def _wide(x: Any) -> jax.Array:
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _term(x: Any, weight: jax.Array | None) -> jax.Array:
  """Returns w x; a part of weight zero adds nothing, not NaN times zero."""
  x = _wide(x)
  if weight is None:
    return x
  return jnp.where(weight == 0, 0, weight.astype(x.dtype) * x)


def _start(kind: Any, shape: Any) -> Any:
  if isinstance(kind, int):
    return None
  dtype = shape.dtype
  if kind == 'mean' or (kind == 'sum' and jnp.issubdtype(dtype, jnp.inexact)):
    return jnp.zeros(shape.shape, jnp.promote_types(dtype, jnp.float32))
  if kind in ('any', 'all'):
    return jnp.full(shape.shape, kind == 'all')
  if kind == 'sum':
    return jnp.zeros(shape.shape, dtype)
  if jnp.issubdtype(dtype, jnp.inexact):
    return jnp.full(shape.shape, jnp.inf if kind == 'min' else -jnp.inf, dtype)
  info = jnp.iinfo(dtype)
  return jnp.full(shape.shape, info.max if kind == 'min' else info.min, dtype)


def _add(kind: str, total: jax.Array, x: Any, weight: Any) -> jax.Array:
  x = jnp.asarray(x)
  if kind == 'mean':
    return total + _term(x, weight).astype(total.dtype)
  if kind == 'sum':
    return total + x.astype(total.dtype)
  if kind == 'any':
    return total | (x != 0)
  if kind == 'all':
    return total & (x != 0)
  return {'max': jnp.maximum, 'min': jnp.minimum}[kind](total, x)


def _concatenated(rows: jax.Array, axis: int) -> jax.Array:
  """Returns (n, ...) joined along an axis of the rest."""
  rows = jnp.moveaxis(rows, 0, axis)
  shape = rows.shape
  return rows.reshape(*shape[:axis], -1, *shape[axis + 2 :])
