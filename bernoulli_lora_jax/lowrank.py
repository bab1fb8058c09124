"""W + L R as one value that is not formed: what stands in a kernel's place.

A `LowRank` is base + L R. Each of its axes belongs to the left side ('l'), to the
right side ('r') or to neither ('b': stacked layers, experts). L has the axes b and
l in the order of the base, R those b and r, both with the rank behind them. What
only moves or cuts axes is done to the three arrays; a product contracts its other
operand with the side that it sums over, then with the other side (`product`);
whatever else happens to a value happens to the array (`dense`).

Of a `LowRank` with `trained` sides L R is zero, and those sides alone have a
derivative: its products are those of the base, with the derivative of x W + (x L) R
(`sketched_product`, A4). A frozen factor of a coordinate sketch is one-hot: the
places of its ones are kept in place of it, along the flattened axes of its side, and
a product with it is a gather.

A `LowRank` without factors is a probe: labels name the axes of the leaf, and what
reaches a product tells over which of them it sums.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import string
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from bernoulli_lora_jax import fused
from bernoulli_lora_jax import sharded

Labels = tuple[Any, ...]

# Name of what a sketched product keeps of its operand, for policies of remat.
SKETCH = 'sketch_of_an_operand'

_LETTERS = string.ascii_letters
_RANK = 'Z'
_BATCH = 'b'  # Label of an axis of length one that a reshape adds.
# Labels of the axes that the parts have beside the rank, see `LowRank.factors`.
_KINDS = {'left': 'bl', 'right': 'br', 'left_rows': 'b', 'right_rows': 'b'}


class Axes(NamedTuple):
  """Axes of a leaf as it is stored, as in a `matrices.Rule`."""

  batch: tuple[int, ...]
  left: tuple[int, ...]
  right: tuple[int, ...]

  @property
  def labels(self) -> Labels:
    """'b', 'l' or 'r' for each axis of the leaf."""
    sides = zip(self, 'blr', strict=True)
    side = {axis: label for axes, label in sides for axis in axes}
    return tuple(side[axis] for axis in range(len(side)))


class Product(NamedTuple):
  """`lax.dot_general` of a value with another operand, as its parameters."""

  is_left: bool  # Whether the value is the first operand.
  contracted: tuple[int, ...]  # Axes of the value.
  batch: tuple[int, ...]
  other_contracted: tuple[int, ...]  # Axes of the other operand.
  other_batch: tuple[int, ...]
  precision: Any
  dtype: Any  # Of the result.
  out_sharding: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """base + L R, not formed."""

  base: jax.Array
  # {'left': L, 'right': R}; {} of a probe. L + frame(left_rows) stands for L where
  # there are such, frame(left_rows) where there is no L; on the right likewise.
  factors: dict[str, jax.Array]
  labels: Labels = dataclasses.field(metadata={'static': True})
  path: str = dataclasses.field(metadata={'static': True})
  # Of a probe: axes of which one entry was taken.
  entries: tuple[int, ...] = dataclasses.field(
      default=(), metadata={'static': True}
  )
  # Sides that have a derivative where L R = 0; () for any L R.
  trained: tuple[str, ...] = dataclasses.field(
      default=(), metadata={'static': True}
  )

  def parts(self) -> Iterator[tuple[jax.Array, list[int]]]:
    """Yields base and factors, each with the value's axes that it has."""
    every = list(range(len(self.labels)))
    yield self.base, every
    for name, factor in self.factors.items():
      yield factor, [i for i in every if self.labels[i] in _KINDS[name]]

  def map(
      self,
      change: Callable[[jax.Array, list[int]], jax.Array],
      labels: Labels,
      entries: Sequence[int] = (),
  ) -> 'LowRank':
    """Returns the value with change(array, its axes) in place of each part."""
    base, *factors = (change(array, own) for array, own in self.parts())
    entries = (*self.entries, *entries)
    return dataclasses.replace(
        self,
        base=base,
        factors=dict(zip(self.factors, factors, strict=True)),
        labels=labels,
        entries=entries,
    )

  def spec(self, side: str) -> str:
    """Returns the indices of a factor in an einsum, letter i for axis i."""
    own = _KINDS[side]
    letters = zip(_LETTERS, self.labels, strict=False)
    return ''.join(c for c, label in letters if label in own) + _RANK

  def framed(self, axes: Sequence[int]) -> 'LowRank':
    """Returns the value with L and R alone, if some axes are of a side."""
    factors = dict(self.factors)
    for side in ('left', 'right'):
      rows = factors.get(f'{side}_rows')
      if rows is None or {self.labels[i] for i in axes} <= {'b'}:
        continue
      own = [i for i, v in enumerate(self.labels) if v in _KINDS[side]]
      own.sort(key=lambda i: self.labels[i])  # Of the batch, then of the side.
      sizes = [self.base.shape[i] for i in own]
      ones = frame(rows, math.prod(sizes[rows.ndim - 1 :]))
      order = sorted(range(len(own)), key=lambda i: own[i])
      ones = ones.reshape(*sizes, -1).transpose(*order, len(own))
      factors[side] = factors.get(side, 0) + ones
      del factors[f'{side}_rows']
    return dataclasses.replace(self, factors=factors)

  def dense(self) -> jax.Array:
    """Returns base + L R, summed in the wider dtype and rounded once."""
    if not self.factors:
      return self.base
    names = _LETTERS[: len(self.labels)]
    factors = self.framed(range(len(names))).factors
    change = jnp.einsum(
        f'{self.spec("left")},{self.spec("right")}->{names}',
        factors['left'],
        factors['right'],
        out_sharding=sharded.explicit(self.base),
    )
    wide = max(self.base.dtype, change.dtype, key=lambda dtype: dtype.itemsize)
    total = self.base.astype(wide) + change.astype(wide)
    return total.astype(self.base.dtype)


def low_rank(
    leaf: jax.Array,
    left: jax.Array,
    right: jax.Array,
    axes: Axes,
    path: str,
    trained: tuple[str, ...] = (),
    rows: Mapping[str, jax.Array] | None = None,
) -> LowRank:
  """Returns the value of a leaf with factors (*batch, m, r) and (*batch, r, n).

  Args:
    leaf: W.
    left: L, without the ones of rows.
    right: R, likewise.
    axes: of the leaf.
    path: of the leaf.
    trained: sides that have a derivative, L R being zero.
    rows: {side: (*batch, r) int32}, see `frame`; the sides that are not trained
      are nothing else.
  """
  sizes = lambda axes: tuple(leaf.shape[axis] for axis in axes)
  rank = left.shape[-1]

  def in_order(factor, side):
    own = (*axes.batch, *side)
    factor = factor.reshape(*sizes(own), rank)
    order = sorted(range(len(own)), key=lambda i: own[i])
    return factor.transpose(*order, len(own))

  factors = {}
  for side, factor in (('left', left), ('right', right.mT)):
    places, own = (rows or {}).get(side), getattr(axes, side)
    if places is not None and own == tuple(sorted(own)):
      factors[f'{side}_rows'] = in_order(places, ())
      if side not in trained:
        continue
    elif places is not None:
      factor = factor + frame(places, factor.shape[-2])
    factors[side] = in_order(factor, own)
  return LowRank(leaf, factors, axes.labels, path, trained=trained)


def frame(rows: jax.Array, dim: int) -> jax.Array:
  """Returns the one-hot columns of places (*batch, r), (*batch, dim, r).

  A place beyond dim is a column of zeros.
  """
  return jax.nn.one_hot(rows, dim, dtype=jnp.float32).mT


def probe(leaf: jax.Array, path: str) -> LowRank:
  """Returns the probe of a leaf."""
  return LowRank(leaf, {}, tuple((i,) for i in range(leaf.ndim)), path)


def transpose(value: LowRank, permutation: Sequence[int]) -> LowRank:
  """Returns the value with its axes in another order."""
  by_label = lambda axes: sorted(axes, key=lambda i: value.labels[i])
  if by_label(permutation) != by_label(range(len(permutation))):
    value = value.framed(permutation)

  def change(array, own):
    order = [own.index(i) for i in permutation if i in own]
    return array.transpose(*order, *range(len(own), array.ndim))

  return value.map(change, tuple(value.labels[i] for i in permutation))


def cut(value: LowRank, parts: Sequence[slice]) -> LowRank:
  """Returns a part of each axis."""
  sizes = zip(parts, value.base.shape, strict=True)
  cuts = [len(range(*part.indices(size))) < size for part, size in sizes]
  value = value.framed([i for i, is_cut in enumerate(cuts) if is_cut])
  return value.map(
      lambda array, own: array[tuple(parts[i] for i in own)], value.labels
  )


def squeeze(value: LowRank, axes: Sequence[int]) -> LowRank:
  """Returns the value without some axes of length one."""
  kept = [i for i in range(len(value.labels)) if i not in axes]
  return value.map(
      lambda array, own: jax.lax.squeeze(
          array, [own.index(i) for i in axes if i in own]
      ),
      tuple(value.labels[i] for i in kept),
      _entries(value, axes),
  )


def reshape(value: LowRank, sizes: Sequence[int]) -> LowRank | None:
  """Returns the value in another shape; None where sides would be mixed."""
  labels = _reshaped(value, tuple(sizes))
  if labels is None:
    return None
  kinds = iter((None, *(_KINDS[name] for name in value.factors)))

  def change(array, own):
    kind = next(kinds)
    named = zip(sizes, labels, strict=True)
    new = [s for s, label in named if kind is None or label in kind]
    return array.reshape(*new, *array.shape[len(own) :])

  flat = lambda labels: [i for axes in labels for i in axes]
  gone = []
  if not value.factors:
    gone = [i for i in flat(value.labels) if i not in flat(labels)]
  return value.map(change, labels, gone)


def slices(value: LowRank) -> tuple[list[jax.Array], Callable[..., LowRank]]:
  """Returns what a scan over the first axis runs over, and what it does inside.

  Returns:
    The arrays that have the axis; a function from their slices to the value of
    one step, the other arrays being the same in each.
  """
  value = value.framed((0,))
  parts = [(array, 0 in own) for array, own in value.parts()]

  def inside(scanned):
    scanned = iter(scanned)
    base, *factors = (
        next(scanned) if has_axis else array for array, has_axis in parts
    )
    entries = (*value.entries, *_entries(value, (0,)))
    return dataclasses.replace(
        value,
        base=base,
        factors=dict(zip(value.factors, factors, strict=True)),
        labels=value.labels[1:],
        entries=entries,
    )

  return [array for array, has_axis in parts if has_axis], inside


class _Einsums(NamedTuple):
  """(x F) S, in two products: F is of the side that is summed over, S the other."""

  sides: tuple[str, str]  # Of F and S.
  other: str  # Indices of x,
  first: str  # of F,
  thin: str  # of x F,
  second: str  # of S,
  out: str  # of the product.


def _einsums(value: LowRank, other: jax.Array, p: Product) -> _Einsums | None:
  """Returns how L R is multiplied by; None where it sums over no whole side."""
  summed = {value.labels[i] for i in p.contracted}
  rest = {v for i, v in enumerate(value.labels) if i not in p.contracted}
  whole = sorted({'l', 'r'} - rest, key=lambda side: (side not in summed, side))
  if not whole:
    return None
  names = _LETTERS[: len(value.labels)]
  sides = ('left', 'right') if whole[0] == 'l' else ('right', 'left')
  first, second = map(value.spec, sides)
  ours = (*p.batch, *p.contracted)
  shared = dict(zip((*p.other_batch, *p.other_contracted), ours, strict=True))
  free = iter(_LETTERS[len(names) :])
  others = ''.join(
      names[shared[i]] if i in shared else next(free) for i in range(other.ndim)
  )
  ours_free = [names[i] for i in range(len(names)) if i not in ours]
  others_free = [c for i, c in enumerate(others) if i not in shared]
  ends = (ours_free, others_free) if p.is_left else (others_free, ours_free)
  out = ''.join([names[i] for i in p.batch] + ends[0] + ends[1])
  needed = set(out) | set(second)
  thin = ''.join(dict.fromkeys(c for c in others + first if c in needed))
  return _Einsums(sides, others, first, thin, second, out)


def product(value: LowRank, other: jax.Array, p: Product) -> jax.Array | None:
  """Returns the product of L R with another array, without forming L R.

  Args:
    value: with factors.
    other: the other operand.
    p: the product.

  Returns:
    An array in `p.dtype`; None where the product sums over no whole side, so that
    L R would have to be formed.
  """
  e = _einsums(value, other, p)
  if e is None:
    return None
  first, second = (value.factors[side] for side in e.sides)
  # Factors are cast to what the product multiplies in.
  inner = jnp.einsum(
      f'{e.other},{e.first}->{e.thin}',
      other,
      first.astype(other.dtype),
      precision=p.precision,
  )
  return jnp.einsum(
      f'{e.thin},{e.second}->{e.out}',
      inner.astype(other.dtype),
      second.astype(other.dtype),
      precision=p.precision,
      preferred_element_type=p.dtype,
      out_sharding=p.out_sharding,
  )


def adapted_product(
    value: LowRank,
    other: jax.Array,
    p: Product,
    plain: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array | None:
  """Returns x W + (x L) R, where a kernel adds (x L) R to what x W has written.

  XLA writes (x L) R, of the size of the result, and reads both again; so does it
  backward, dy W^T + (dy R^T) L^T. The sum is rounded once, not twice. There is no
  derivative forward through it.

  Args:
    value: with factors.
    other: the other operand, x.
    p: the product.
    plain: (base, other) -> the product of arrays.

  Returns:
    An array in `p.dtype`; None where there is no kernel for it.
  """
  e = _einsums(value, other, p)
  rank = value.factors['left'].shape[-1]
  if e is None or not _is_rows(e.out, e.thin, e.second):
    return None
  if sharded.mesh_of((value.base, other)) is not None:
    return None  # Types say where results are placed.
  if not _takes(jax.eval_shape(plain, value.base, other), rank):
    return None
  of = functools.partial(_einsum, other.dtype, p.precision)
  like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (value.base, other)]

  def product_of(base, factors, other):
    first, second = (factors[side] for side in e.sides)
    thin = of(f'{e.other},{e.first}->{e.thin}', other, first)
    return _plus(plain(base, other), thin, second), thin

  @jax.custom_vjp
  def multiply(base, factors, other):
    return product_of(base, factors, other)[0]

  def forward(base, factors, other):
    # Told by the structure: numbers would be traced.
    moved = {'base': base, **factors}
    moved = {name: () for name, x in moved.items() if x.perturbed}
    base, other = base.value, other.value
    factors = {side: x.value for side, x in factors.items()}
    out, thin = product_of(base, factors, other)
    return out, (base, factors, other, thin, moved)

  def backward(kept, slope):
    base, factors, x, thin, moved = kept
    if isinstance(slope, jax.custom_derivatives.SymbolicZero):
      slope = jnp.zeros(slope.shape, slope.dtype)  # pyrefly: ignore
    first, second = (factors[side] for side in e.sides)
    of_thin = of(f'{e.out},{e.second}->{e.thin}', slope, second)
    grads: dict[str, jax.Array | None] = dict.fromkeys(('left', 'right'))
    if e.sides[0] in moved:
      spec = f'{e.other},{e.thin}->{e.first}'
      grads[e.sides[0]] = of(spec, x, of_thin, dtype=first.dtype)
    if e.sides[1] in moved:
      spec = f'{e.thin},{e.out}->{e.second}'
      grads[e.sides[1]] = of(spec, thin, slope, dtype=second.dtype)
    of_base = None
    if 'base' in moved:
      pull = jax.linear_transpose(lambda base: plain(base, x), like[0])
      (of_base,) = pull(slope)
    (of_x,) = jax.linear_transpose(lambda x: plain(base, x), like[1])(slope)
    if _is_rows(e.other, e.thin, e.first) and _takes(of_x, rank):
      of_x = _plus(of_x, of_thin, first)
    else:
      of_x += of(f'{e.thin},{e.first}->{e.other}', of_thin, first)
    return of_base, grads, of_x

  multiply.defvjp(forward, backward, symbolic_zeros=True)
  return multiply(value.base, value.factors, other)


def _is_rows(out: str, thin: str, factor: str) -> bool:
  """Returns whether a product is (rows, r) by a factor (columns, r), flattened."""
  return thin == out[:-1] + _RANK and factor == out[-1] + _RANK


def _takes(out: Any, rank: int) -> bool:
  """Returns whether there is a kernel that adds a product of a rank to a result."""
  rows = math.prod(out.shape[:-1]), out.shape[-1]
  like = jax.ShapeDtypeStruct(rows, out.dtype)
  return fused.takes(like, rank, 'nearest')


def _plus(out: jax.Array, thin: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns out + thin factor^T, rounded once."""
  flat = lambda x: x.reshape(-1, x.shape[-1])
  factor = factor.astype(thin.dtype).T
  return fused.add_product(flat(out), flat(thin), factor).reshape(out.shape)


def sketched_product(
    value: LowRank,
    other: jax.Array,
    p: Product,
    plain: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array | None:
  """Returns the product of the base with another array; L R = 0 has its derivative.

  With y = x W and a frozen L the derivative by R is (x L)^T dy, by a left factor
  of a frozen R it is x^T (dy R^T): W has none, x that of the base product. What is
  kept for it is x L, named `SKETCH`, where R alone is trained, else x.

  Args:
    value: with factors whose product is zero, and `trained` sides.
    other: the other operand, x.
    p: the product.
    plain: (base, other) -> the product of arrays.

  Returns:
    An array in `p.dtype`; None where `product` has none.
  """
  e = _einsums(value, other, p)
  if e is None:
    return None
  specs = dict(zip(e.sides, (e.first, e.second), strict=True))
  if set(e.thin) & set(e.second) - set(e.first):  # Not summed over: no gather.
    value = value.framed(range(len(value.labels)))
  is_kept_thin = e.sides[0] not in value.trained
  of = functools.partial(_einsum, other.dtype, p.precision)
  shape = jax.ShapeDtypeStruct(
      other.shape, other.dtype, sharding=sharded.explicit(other)
  )

  def thin_of(names, x, side, factors):
    spec, rows = specs[side], factors.get(f'{side}_rows')
    if rows is None:
      return of(f'{names},{spec}->{e.thin}', x, factors[side])
    return _taken(names, x, spec, rows, e.thin).astype(other.dtype)

  @jax.custom_vjp
  def multiply(base, factors, other):
    del factors
    return plain(base, other)

  def forward(base, factors, other):
    is_moved = base.perturbed
    base, other = base.value, other.value
    factors = jax.tree.map(lambda x: x.value, factors)
    if is_moved:
      raise ValueError(
          f'Expected a derivative by factors alone, got one by {value.path}, which'
          ' a sketched product does not have: use adapters, or gradient mode.'
      )
    kept = other
    if is_kept_thin:
      kept = thin_of(e.other, other, e.sides[0], factors)
      kept = checkpoint_name(kept, SKETCH)
    return plain(base, other), (base, factors, kept)

  def backward(kept, out_grad):
    base, factors, x = kept
    if isinstance(out_grad, jax.custom_derivatives.SymbolicZero):
      out_grad = jnp.zeros(out_grad.shape, out_grad.dtype)  # pyrefly: ignore
    first, second = e.sides
    grads: dict[str, jax.Array | None] = dict.fromkeys(factors)
    if second in value.trained:
      thin = x if is_kept_thin else thin_of(e.other, x, first, factors)
      spec, dtype = f'{e.thin},{e.out}->{e.second}', factors[second].dtype
      grads[second] = of(spec, thin, out_grad, dtype=dtype)
    if first in value.trained:
      thin = thin_of(e.out, out_grad, second, factors)
      spec, dtype = f'{e.other},{e.thin}->{e.first}', factors[first].dtype
      grads[first] = of(spec, x, thin, dtype=dtype)
    (by_other,) = jax.linear_transpose(lambda x: plain(base, x), shape)(
        out_grad
    )
    return None, grads, by_other

  multiply.defvjp(forward, backward, symbolic_zeros=True)
  return multiply(value.base, value.factors, other)


def _einsum(
    narrow: Any,
    precision: Any,
    spec: str,
    *operands: jax.Array,
    dtype: Any = None,
) -> jax.Array:
  """Returns a product of operands cast to a dtype, summed and kept in another."""
  if dtype is not None and jax.default_backend() == 'cpu':
    narrow = jnp.promote_types(narrow, dtype)  # XLA has no mixed ones there.
  mesh, whole = sharded.mesh_of(operands), None
  if dtype is not None and mesh is not None:
    whole = jax.NamedSharding(mesh, sharded.Spec())  # As the factors are.
  return jnp.einsum(
      spec,
      *(x.astype(narrow) for x in operands),
      precision=precision,
      preferred_element_type=dtype,
      out_sharding=whole,
  )


def _taken(
    names: str,
    x: jax.Array,
    spec: str,
    rows: jax.Array,
    result: str,
) -> jax.Array:
  """Returns einsum(names,spec->result) of x and the frame of rows: a gather."""
  chosen = lambda axes, test: ''.join(c for c in axes if test(c))
  side = chosen(spec, lambda c: c not in result)
  own = chosen(spec, lambda c: c in result)
  shared = chosen(own, lambda c: c in names)
  fresh = chosen(own, lambda c: c not in names)
  free = chosen(names, lambda c: c not in spec)

  def gathered(x, rows):
    x = jnp.einsum(f'{names}->{shared}{free}{side}', x)
    x = x.reshape(*x.shape[: -len(side)], -1)
    take = functools.partial(jnp.take, axis=-1, mode='fill', fill_value=0)
    for _ in shared:
      take = jax.vmap(take)
    taken = take(x, jnp.einsum(f'{own}->{shared}{fresh}', rows))
    return jnp.einsum(f'{shared}{free}{fresh}->{result}', taken)

  def placed():
    axes = dict(zip(names, jax.typeof(x).sharding.spec, strict=True))
    return sharded.Spec(*(axes.get(c) for c in result))

  return sharded.automatic(gathered, x, rows, out=placed)


def _entries(value: LowRank, axes: Sequence[int]) -> list[int]:
  if value.factors:
    return []
  return [i for axis in axes for i in value.labels[axis]]


def _reshaped(value: LowRank, new: tuple[int, ...]) -> Labels | None:
  """Returns the labels after a reshape, None where it mixes labels."""
  old, labels = value.base.shape, value.labels
  if 0 in old:
    return None
  unit = _BATCH if value.factors else ()
  result: list[Any] = []
  i = j = 0
  while i < len(old) or j < len(new):
    if i < len(old) and j < len(new) and old[i] == new[j]:
      result.append(labels[i])
      i, j = i + 1, j + 1
    elif i < len(old) and old[i] == 1:
      i += 1
    elif j < len(new) and new[j] == 1:
      result.append(unit)
      j += 1
    else:
      ends, sizes = [i, j], [1, 1]
      while sizes[0] != sizes[1] or sizes == [1, 1]:
        side = int(sizes[0] > sizes[1])  # The shorter product grows.
        sizes[side] *= (old, new)[side][ends[side]]
        ends[side] += 1
      group = labels[i : ends[0]]
      if value.factors:
        if len(set(group)) > 1:
          return None
        result += [group[0]] * (ends[1] - j)
      elif ends[1] - j > 1:
        return None  # One axis in two: a rule cannot say it.
      else:
        result.append(tuple(axis for label in group for axis in label))
      i, j = ends
  return tuple(result)
