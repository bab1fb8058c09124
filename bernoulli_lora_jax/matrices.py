"""Which leaves of a tree are matrices, and along which axes.

A *matrix* is a floating-point leaf seen as (batch..., m, n): some of its axes
form the left side, some the right side, the rest are batch axes (stacked
layers, experts) whose entries are matrices of their own. In Flax trees (a leaf
named `kernel` exists) the kernels are matrices, in plain trees the 2-D leaves;
`Matrices` selects others and tells the axes of leaves with three axes or more.

Every matrix has an identity made of its path without the layer index, and the
layer index: selecting a sibling, stacking layers for a scan or unrolling them
changes no draw (see `Matrix.path_hash` and `Matrix.entries`).

Two trees of one model are paired by path (`align`), never by position.
"""

import collections
from collections.abc import Sequence
import dataclasses
import hashlib
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import deprecated
from bernoulli_lora_jax import lowrank

# `layers_3/...` (unrolled Linen), `layer/3/...` (lists, Hugging Face).
LAYER = r'(?:^|/)(?:layers?|blocks?|h)([_/]\d+)(?=/|$)'
_VECTORS = ('bias', 'scale')  # Matrices only where a rule's pattern names them.


@dataclasses.dataclass(frozen=True)
class Rule:
  """The axes of the leaves whose path matches a regular expression.

  It is for the leaves that have as many axes as it names; those named `bias` or
  `scale` only where the pattern says so. Under `^layers/mlp/` the kernels of
  scanned layers are matrices, their biases are not.

  Attributes:
    pattern: regular expression, searched in the normalised path (`a/b/kernel`).
    left: axes of the left side (length m), in this order; negative ones count
      from the end.
    right: axes of the right side (length n).
    batch: axes whose entries are separate matrices, the layer axis first.
  """

  pattern: str
  left: tuple[int, ...]
  right: tuple[int, ...]
  batch: tuple[int, ...] = ()

  def __post_init__(self):
    check_pattern('pattern', self.pattern)
    if not self.left or not self.right:
      raise ValueError(
          'Expected at least one left and one right axis, got'
          f' left={self.left}, right={self.right}.'
      )

  @property
  def axes(self) -> tuple[int, ...]:
    """The axes in the order batch, left, right."""
    return self.batch + self.left + self.right


def conv(pattern: str) -> Rule:
  """Returns the rule of convolution kernels (window..., in, out), 2-D windows."""
  return Rule(pattern, left=(0, 1, 2), right=(3,))


def heads_out(pattern: str) -> Rule:
  """Returns the rule of query, key, value kernels (d, heads, head_dim)."""
  return Rule(pattern, left=(0,), right=(1, 2))


def heads_in(pattern: str) -> Rule:
  """Returns the rule of attention output kernels (heads, head_dim, d)."""
  return Rule(pattern, left=(0, 1), right=(2,))


def stacked(pattern: str) -> Rule:
  """Returns the rule of stacked layers or experts (layers, in, out)."""
  return Rule(pattern, left=(1,), right=(2,), batch=(0,))


@dataclasses.dataclass(frozen=True)
class Matrices:
  """What is a matrix: passed as `matrices=` wherever a tree is walked.

  Attributes:
    select: regular expression searched in the normalised path; None selects
      the kernels of a Flax tree, the 2-D leaves of a plain tree, and whatever a
      rule matches. An expression selects among all leaves of two axes or more
      that are not named `bias` or `scale`.
    rules: axes of leaves that are not simply (m, n).
    layer: regular expression whose one group is the layer index in a path.
  """

  select: str | None = None
  rules: tuple[Rule, ...] = ()
  layer: str = LAYER

  def __post_init__(self):
    for name in ('select', 'layer'):
      check_pattern(name, getattr(self, name) or '')


class Matrix(NamedTuple):
  """One selected leaf: its place in the tree, its axes, its identity."""

  index: int  # Position among the leaves of the flattened tree.
  path: str  # Normalised path.
  path_hash: tuple[
      int, int
  ]  # 64 bits of identity, from the path without layer.
  # Where layers of one path differ in their number of entries, of that, too.
  layer: int  # Layer index found in the path; 0 when there is none.
  perm: tuple[int, ...]  # Axes in the order batch, left, right.
  shape: tuple[int, ...]  # Shape of the leaf as stored.
  batch: tuple[int, ...]  # Sizes of the batch axes.
  m: int  # Length of the left side.
  n: int  # Length of the right side.
  dtype: Any

  @property
  def words(self) -> tuple[int, int]:
    """Deprecated: `path_hash`."""
    deprecated.warn('Matrix.words', 'Matrix.path_hash')
    return self.path_hash

  @property
  def axes(self) -> lowrank.Axes:
    """The axes of the leaf: batch, left, right."""
    start = len(self.batch)
    end = start + 1
    while math.prod(self.shape[axis] for axis in self.perm[start:end]) < self.m:
      end += 1
    return lowrank.Axes(
        self.perm[:start], self.perm[start:end], self.perm[end:]
    )

  @property
  def entries(self) -> np.ndarray:
    """Layer-and-batch number of every entry; shape=batch, dtype=uint32.

    Entry (l, e) of a stack (layers, experts) and entry e of the unrolled layer
    l get the same number. Unrolled layers of different numbers of experts have
    different `words`, since their numbers would collide.
    """
    size = math.prod(self.batch)
    flat = np.arange(size, dtype=np.uint32) + np.uint32(self.layer * size)
    return flat.reshape(self.batch)

  @property
  def viewed(self) -> 'Matrix':
    """The matrix of a leaf that is stored as `view` returns this one."""
    shape = (*self.batch, self.m, self.n)
    return self._replace(perm=tuple(range(len(shape))), shape=shape)

  def view(self, leaf: jax.Array) -> jax.Array:
    """Returns the leaf as (*batch, m, n)."""
    return leaf.transpose(self.perm).reshape(*self.batch, self.m, self.n)

  def unview(self, matrix: jax.Array) -> jax.Array:
    """Returns (*batch, m, n) in the leaf's own layout; inverse of `view`."""
    transposed = matrix.reshape([self.shape[axis] for axis in self.perm])
    return transposed.transpose(np.argsort(self.perm))

  def lines(self, leaf: jax.Array, side: str, rows: jax.Array) -> jax.Array:
    """Returns rows of the matrix (side 'left'), or columns.

    Args:
      leaf: as it is stored; nothing else of it is read.
      side: 'left' or 'right', of which `rows` are places.
      rows: (*batch, r) int32; lines beyond the side are zeros.

    Returns:
      (*batch, r, n), or (*batch, m, r).
    """
    index, order, sizes = self._places(side, rows)
    lines = leaf.at[index].get(mode='fill', fill_value=0).transpose(order)
    lines = lines.reshape(*sizes[: rows.ndim], -1)
    return lines if side == 'left' else lines.mT

  def with_lines(
      self, leaf: jax.Array, side: str, rows: jax.Array, lines: jax.Array
  ) -> jax.Array:
    """Returns the leaf with other lines, nothing else of it being written.

    Args:
      leaf: as it is stored.
      side: see `lines`.
      rows: distinct for an entry of the batch; lines beyond the side are dropped.
      lines: as `lines` returns them.
    """
    index, order, sizes = self._places(side, rows)
    lines = lines if side == 'left' else lines.mT
    lines = lines.reshape(sizes).transpose(np.argsort(order))
    return leaf.at[index].set(lines, mode='drop', unique_indices=True)

  def _places(
      self, side: str, rows: jax.Array
  ) -> tuple[tuple[Any, ...], list[int], list[int]]:
    """Returns the index of lines, and what makes them (*batch, r, other side)."""
    own, rest = self.axes.left, self.axes.right
    if side == 'right':
      own, rest = rest, own
    index: list[Any] = [slice(None)] * len(self.shape)
    grid = np.ogrid[tuple(map(slice, rows.shape))]
    for axis, numbers in zip(self.axes.batch, grid, strict=False):
      index[axis] = numbers
    place = rows
    for axis in reversed(own[1:]):
      place, index[axis] = jnp.divmod(place, self.shape[axis])
    index[own[0]] = place
    # Indexed axes come first unless they lie side by side.
    chosen = sorted((*self.axes.batch, *own))
    start = chosen[0] if chosen[-1] - chosen[0] < len(chosen) else 0
    front = list(range(-rows.ndim, 0))
    stored = sorted(rest)
    stored = [*stored[:start], *front, *stored[start:]]
    sizes = [*rows.shape, *(self.shape[axis] for axis in rest)]
    return tuple(index), [stored.index(i) for i in [*front, *rest]], sizes


def check_pattern(name: str, pattern: str) -> None:
  """Raises ValueError unless a pattern is a regular expression."""
  try:
    re.compile(pattern)
  except re.error as e:
    raise ValueError(
        f'Expected {name} to be a regular expression, got {pattern!r}: {e}.'
    ) from e


static_int = checks.static_int


def check_rank(matrix: Matrix, rank: int) -> None:
  """Raises ValueError for a rank above both sides of a matrix."""
  longest = max(matrix.m, matrix.n)
  if rank > longest:
    raise ValueError(
        f'Expected rank <= {longest}, the longer side of {matrix.path}'
        f' ({matrix.m} x {matrix.n}), got rank={rank}.'
    )


def path_names(paths: Sequence[Sequence[Any]]) -> list[str]:
  """Returns key paths as `a/b/kernel`, without wrappers.

  A leading `params` collection and the one attribute `value` that NNX variables
  and partitioned metadata add are dropped: one model has one set of names.

  Raises:
    ValueError: two paths of one name, as of {'a/b': x, 'a': {'b': y}}.
  """
  parents = collections.Counter(tuple(path[:-1]) for path in paths)

  def name(path):
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    is_attribute = path and isinstance(path[-1], jax.tree_util.GetAttrKey)
    if is_attribute and names[-1] in ('value', 'raw_value'):
      # A tuple (query, key, value) has other children: no wrapper.
      names = names[:-1] if parents[tuple(path[:-1])] == 1 else names
    if len(names) > 1 and names[0] == 'params':
      names = names[1:]
    return '/'.join(names)

  names = [name(path) for path in paths]
  owners = dict(zip(names, paths, strict=True))
  for path, own in zip(paths, names, strict=True):
    if owners[own] is not path:
      keys = [jax.tree_util.keystr(tuple(p)) for p in (path, owners[own])]
      raise ValueError(
          f'Expected leaves with names of their own, got {" and ".join(keys)}'
          f' with the same name, {own}.'
      )
  return names


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns {path: leaf} in the order of the leaves, see `path_names`."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  names = path_names([path for path, _ in flat])
  return dict(zip(names, [leaf for _, leaf in flat], strict=True))


def align(
    like: Any, tree: Any, names: tuple[str, str] = ('params', 'the other tree')
) -> Any:
  """Returns a tree in the structure of another, leaves paired by path.

  An OrderedDict, a FrozenDict, an NNX state and a dict of one model hold the same
  leaves in different orders and wrappers; zipping them would pair them wrongly.

  Args:
    like: the tree whose structure is returned.
    tree: the tree whose leaves are returned.
    names: what errors call the two.

  Raises:
    ValueError: a path that only one of them has.
  """
  if jax.tree.structure(like) == jax.tree.structure(tree):
    return tree
  expected, given = named_leaves(like), named_leaves(tree)
  first, second = names
  for owner, other, one, two in (
      (first, second, expected, given),
      (second, first, given, expected),
  ):
    alone = [path for path in one if path not in two]
    if alone:
      raise ValueError(
          f'Expected the same paths in {first} and {second}, got {alone[0]!r} in'
          f' {owner} alone; the paths of {other} are {sorted(two)}.'
      )
  return jax.tree.structure(like).unflatten([given[path] for path in expected])


def wide(dtype: Any) -> Any:
  """Returns promote_types(dtype, float32), for floats of 8 bits too."""
  is_float = jnp.issubdtype(dtype, jnp.floating)
  if is_float and jnp.finfo(dtype).bits < 16:  # These promote to nothing.
    return jnp.dtype(jnp.float32)
  return jnp.promote_types(dtype, jnp.float32)


def shape_of(leaf: Any, path: str) -> Any:
  """Returns a leaf, or the shape that stands for a Python number.

  Raises:
    TypeError: a leaf that is neither an array nor a number, by path.
  """
  if hasattr(leaf, 'shape') and hasattr(leaf, 'dtype'):
    return leaf
  if isinstance(leaf, (bool, int, float, complex)):
    return jax.ShapeDtypeStruct((), jnp.result_type(type(leaf)))
  raise TypeError(
      f'Expected arrays or numbers as leaves, got {path} of type'
      f' {type(leaf).__name__}: register a class of yours as a pytree'
      ' (jax.tree_util.register_dataclass).'
  )


def find(tree: Any, matrices: Matrices | None = None) -> list[Matrix]:
  """Returns the matrices of a tree, in the order of its leaves.

  Args:
    tree: pytree of arrays or `jax.ShapeDtypeStruct`s.
    matrices: selection and rules; None for the defaults.

  Returns:
    One `Matrix` for each selected leaf.

  Raises:
    ValueError: a rule or a selection that matches nothing (the paths that exist
      are listed), two rules with different axes for one leaf, axes that do not
      fit the leaf, a selected leaf of three axes or more without a rule, or two
      leaves with one name and layer.
  """
  spec = Matrices() if matrices is None else matrices
  named = [(p, shape_of(x, p)) for p, x in named_leaves(tree).items()]
  for rule in spec.rules:
    _check_rule(rule, named)
  is_flax = any(_name(path) == 'kernel' for path, _ in named)
  found, unselected = [], []
  for index, (path, leaf) in enumerate(named):
    rule = _rule_for(path, leaf, spec.rules)
    if _is_selected(path, leaf, rule, spec, is_flax):
      found.append(_matrix(index, path, leaf, rule, spec))
    elif rule is not None:
      unselected.append(_matrix(index, path, leaf, rule, spec))
  if not found:
    what = (
        'the default selection'
        if spec.select is None
        else (f'select={spec.select!r}')
    )
    raise ValueError(_no_match(what, named))
  found = _by_size(found, unselected, spec)
  _check_distinct(found)
  return found


def mask(tree: Any, matrices: Matrices | None = None) -> Any:
  """Returns a tree of booleans, True where the leaf is a matrix."""
  selected = {matrix.index for matrix in find(tree, matrices)}
  leaves, treedef = jax.tree.flatten(tree)
  return treedef.unflatten([i in selected for i in range(len(leaves))])


def check_unmasked(tree: Any, name: str) -> None:
  """Raises if leaves of the tree were hidden by `optax.masked`."""
  hidden = lambda leaf: isinstance(leaf, optax.MaskedNode)
  if any(map(hidden, jax.tree.leaves(tree, is_leaf=hidden))):
    raise ValueError(
        f'Expected {name} to stand outermost in the chain, got a tree masked by'
        ' optax.masked or optax.partition: its grad_fn returns the whole'
        f' gradient. Put {name} first and mask what follows it.'
    )


def _by_size(
    found: Sequence[Matrix], unselected: Sequence[Matrix], spec: Matrices
) -> list[Matrix]:
  """Returns matrices with the size in their words where layers disagree in it.

  Layers 1 of 3 experts and 2 of 2 would share the numbers 4 and 5. No number made
  of a leaf's own path, layer and size tells them apart and keeps the draws of
  equal layers, so the tree decides: all its leaves, not only the selected ones.
  """
  is_layer = lambda m: re.search(spec.layer, m.path) is not None
  sizes = collections.defaultdict(set)
  for m in filter(is_layer, (*found, *unselected)):
    sizes[m.path_hash].add(math.prod(m.batch))

  def told_apart(m):
    if not is_layer(m) or len(sizes[m.path_hash]) == 1:
      return m
    size = math.prod(m.batch)
    return m._replace(
        path_hash=_path_hash(f'{_without_layer(m.path, spec)}[{size}]')
    )

  return [told_apart(m) for m in found]


def _check_distinct(found: Sequence[Matrix]) -> None:
  """Raises where two leaves would share their draws."""
  owner: dict[tuple[tuple[int, int], int], str] = {}
  for matrix in found:
    for entry in matrix.entries.flat:
      identity = (matrix.path_hash, int(entry))
      if identity in owner:
        raise ValueError(
            f'Expected matrices with names of their own, got'
            f' {owner[identity]} and'
            f' {matrix.path} with the same name and layer.'
        )
      owner[identity] = matrix.path


def _name(path: str) -> str:
  return path.rsplit('/', 1)[-1]


def _is_floating(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def _no_match(what: str, named: Sequence[tuple[str, Any]]) -> str:
  kind = lambda leaf: '' if _is_floating(leaf) else f' {leaf.dtype}'
  listed = '\n  '.join(
      f'{path} {tuple(leaf.shape)}{kind(leaf)}' for path, leaf in named
  )
  return f'Expected {what} to match a leaf; the paths are:\n  {listed}'


def _is_for(rule: Rule, path: str, leaf: Any) -> bool:
  """Returns whether a rule speaks of a leaf, its number of axes aside."""
  name = _name(path)
  is_named = name not in _VECTORS or name in rule.pattern
  return (
      is_named
      and _is_floating(leaf)
      and re.search(rule.pattern, path) is not None
  )


def _check_rule(rule: Rule, named: Sequence[tuple[str, Any]]) -> None:
  """Raises for a rule that is for no leaf, or whose axes do not fit."""
  ours = [(path, leaf) for path, leaf in named if _is_for(rule, path, leaf)]
  if not ours:
    raise ValueError(_no_match(f'rule pattern {rule.pattern!r}', named))
  fitting = [one for one in ours if len(one[1].shape) == len(rule.axes)]
  path, leaf = (fitting or ours)[0]
  ndim = len(leaf.shape)
  if any(not -ndim <= axis < ndim for axis in rule.axes) or sorted(
      axis % ndim for axis in rule.axes
  ) != list(range(ndim)):
    raise ValueError(
        f'Expected batch, left and right of rule {rule.pattern!r} to name each'
        f' axis of {path} once, got batch={rule.batch}, left={rule.left},'
        f' right={rule.right} for shape {tuple(leaf.shape)}.'
    )


def _rule_for(path: str, leaf: Any, rules: Sequence[Rule]) -> Rule | None:
  """Returns the rule of a leaf; raises when two disagree about its axes."""
  matching = [
      rule
      for rule in rules
      if len(leaf.shape) == len(rule.axes) and _is_for(rule, path, leaf)
  ]
  axes = {(rule.left, rule.right, rule.batch) for rule in matching}
  if len(axes) > 1:
    patterns = [rule.pattern for rule in matching]
    raise ValueError(
        f'Expected one rule for {path}, got {patterns} with different axes.'
    )
  return matching[0] if matching else None


def _is_selected(
    path: str, leaf: Any, rule: Rule | None, spec: Matrices, is_flax: bool
) -> bool:
  ndim = len(leaf.shape)
  if not _is_floating(leaf) or 0 in leaf.shape:
    return False
  if spec.select is not None:
    is_vector = ndim < 2 or (_name(path) in _VECTORS and rule is None)
    return re.search(spec.select, path) is not None and not is_vector
  if rule is not None:
    return True
  if is_flax:
    return _name(path) == 'kernel' and ndim >= 2
  return ndim == 2


def _without_layer(path: str, spec: Matrices) -> str:
  layer = re.search(spec.layer, path)
  if layer is None:
    return path
  return path[: layer.start(1)] + path[layer.end(1) :]


def _path_hash(name: str) -> tuple[int, int]:
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  first, second = np.frombuffer(digest, dtype='<u4')
  return int(first), int(second)


def _matrix(
    index: int, path: str, leaf: Any, rule: Rule | None, spec: Matrices
) -> Matrix:
  """Resolves the axes and the identity of one selected leaf."""
  ndim = len(leaf.shape)
  if rule is None and ndim != 2:
    raise ValueError(
        f'Expected a rule for {path} of shape {tuple(leaf.shape)}:'
        ' bl.inject.all_linear(loss, params, batch) reads all of them from a Flax'
        f' model; or write, for example, Rule({_name(path)!r},'
        f' left={tuple(range(ndim - 1))}, right=({ndim - 1},)), with stacked'
        ' layers or experts in batch=.'
    )
  rule = Rule(path, (0,), (1,)) if rule is None else rule
  size = lambda axes: math.prod(leaf.shape[axis] for axis in axes)
  layer = re.search(spec.layer, path)
  number = 0 if layer is None else int(re.sub(r'\D', '', layer.group(1)))
  if (number + 1) * size(rule.batch) > 2**32:
    raise ValueError(
        f'Expected a layer index below 2^32 in {path}, of {size(rule.batch)}'
        f' entries a layer, got {number}: set Matrices.layer.'
    )
  return Matrix(
      index=index,
      path=path,
      path_hash=_path_hash(_without_layer(path, spec)),
      layer=number,
      perm=tuple(axis % ndim for axis in rule.axes),
      shape=tuple(leaf.shape),
      batch=tuple(leaf.shape[axis] for axis in rule.batch),
      m=size(rule.left),
      n=size(rule.right),
      dtype=leaf.dtype,
  )
