"""Which leaves of a tree are matrices, and along which axes.

A *matrix* is a floating-point leaf seen as (batch..., m, n): some of its axes
form the left side, some the right side, the rest are batch axes (stacked
layers, experts) whose entries are matrices of their own. In Flax trees (a leaf
named `kernel` exists) the kernels are matrices, in plain trees the 2-D leaves;
`Matrices` selects others and tells the axes of leaves with three axes or more.

Every matrix has an identity made of its path without the layer index, and the
layer index: selecting a sibling, stacking layers for a scan or unrolling them
changes no draw (see `Matrix.words` and `Matrix.entries`).
"""

import collections
from collections.abc import Sequence
import dataclasses
import hashlib
import math
import operator
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# `layers_3/...` (unrolled Linen), `layer/3/...` (lists, Hugging Face).
LAYER = r'(?:^|/)(?:layers?|blocks?|h)([_/]\d+)(?=/|$)'


@dataclasses.dataclass(frozen=True)
class Rule:
  """The axes of the leaves whose path matches a regular expression.

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
  words: tuple[int, int]  # 64 bits of identity, from the path without layer.
  layer: int  # Layer index found in the path; 0 when there is none.
  perm: tuple[int, ...]  # Axes in the order batch, left, right.
  shape: tuple[int, ...]  # Shape of the leaf as stored.
  batch: tuple[int, ...]  # Sizes of the batch axes.
  m: int  # Length of the left side.
  n: int  # Length of the right side.
  dtype: Any

  @property
  def entries(self) -> np.ndarray:
    """Layer-and-batch number of every entry; shape=batch, dtype=uint32.

    Entry (l, e) of a stack (layers, experts) and entry e of the unrolled layer
    l get the same number.
    """
    size = math.prod(self.batch)
    flat = np.arange(size, dtype=np.uint32) + np.uint32(self.layer * size)
    return flat.reshape(self.batch)

  def view(self, leaf: jax.Array) -> jax.Array:
    """Returns the leaf as (*batch, m, n)."""
    return leaf.transpose(self.perm).reshape(*self.batch, self.m, self.n)

  def unview(self, matrix: jax.Array) -> jax.Array:
    """Returns (*batch, m, n) in the leaf's own layout; inverse of `view`."""
    transposed = matrix.reshape([self.shape[axis] for axis in self.perm])
    return transposed.transpose(np.argsort(self.perm))


def check_pattern(name: str, pattern: str) -> None:
  """Raises ValueError unless a pattern is a regular expression."""
  try:
    re.compile(pattern)
  except re.error as e:
    raise ValueError(
        f'Expected {name} to be a regular expression, got {pattern!r}: {e}.'
    ) from e


def static_int(name: str, value: Any) -> int:
  """Returns a number that gives shapes: of an int, or of an array of known value.

  Raises:
    TypeError: no integer, or one that is traced.
  """
  if isinstance(value, jax.core.Tracer):
    raise TypeError(
        f'Expected {name} to be an int, got {value}, which is traced: it gives'
        f" shapes. Under optax.inject_hyperparams write static_args=('{name}',)."
    )
  try:
    number = None if isinstance(value, bool) else operator.index(value)
  except TypeError:
    number = None
  if number is None:
    raise TypeError(f'Expected {name} to be an int, got {value!r}.')
  return number


def path_names(paths: Sequence[Sequence[Any]]) -> list[str]:
  """Returns key paths as `a/b/kernel`, without wrappers.

  A leading `params` collection and the one attribute `value` that NNX variables
  and partitioned metadata add are dropped: one model has one set of names.
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

  return [name(path) for path in paths]


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
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  paths = path_names([path for path, _ in leaves])
  # Python numbers among the leaves have no dtype.
  arrays = (x if hasattr(x, 'dtype') else np.asarray(x) for _, x in leaves)
  named = list(zip(paths, arrays, strict=True))
  for rule in spec.rules:
    if not any(re.search(rule.pattern, path) for path in paths):
      raise ValueError(_no_match(f'rule pattern {rule.pattern!r}', named))
  is_flax = any(_name(path) == 'kernel' for path in paths)
  found = []
  for index, (path, leaf) in enumerate(named):
    rule = _rule_for(path, spec.rules)
    if not _is_selected(path, leaf, rule, spec, is_flax):
      continue
    found.append(_matrix(index, path, leaf, rule, spec))
  if not found:
    what = (
        'the default selection'
        if spec.select is None
        else (f'select={spec.select!r}')
    )
    raise ValueError(_no_match(what, named))
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


def _check_distinct(found: Sequence[Matrix]) -> None:
  """Raises where two leaves would share their draws."""
  owner: dict[tuple[tuple[int, int], int], str] = {}
  for matrix in found:
    for entry in matrix.entries.flat:
      identity = (matrix.words, int(entry))
      if identity in owner:
        raise ValueError(
            f'Expected matrices with names of their own, got'
            f' {owner[identity]} and'
            f' {matrix.path} with the same name and layer.'
        )
      owner[identity] = matrix.path


def _name(path: str) -> str:
  return path.rsplit('/', 1)[-1]


def _no_match(what: str, named: Sequence[tuple[str, Any]]) -> str:
  listed = '\n  '.join(f'{path} {tuple(leaf.shape)}' for path, leaf in named)
  return f'Expected {what} to match a leaf; the paths are:\n  {listed}'


def _rule_for(path: str, rules: Sequence[Rule]) -> Rule | None:
  """Returns the rule of a path; raises when two disagree about its axes."""
  matching = [rule for rule in rules if re.search(rule.pattern, path)]
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
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    return False
  if spec.select is not None:
    is_vector = leaf.ndim < 2 or _name(path) in ('bias', 'scale')
    return re.search(spec.select, path) is not None and not is_vector
  if rule is not None:
    return True
  if is_flax:
    return _name(path) == 'kernel' and leaf.ndim >= 2
  return leaf.ndim == 2


def _matrix(
    index: int, path: str, leaf: Any, rule: Rule | None, spec: Matrices
) -> Matrix:
  """Resolves the axes and the identity of one selected leaf."""
  if rule is None and leaf.ndim != 2:
    raise ValueError(
        f'Expected a rule for {path} of shape {tuple(leaf.shape)}: write, for'
        f' example, Rule({_name(path)!r}, left={tuple(range(leaf.ndim - 1))},'
        f' right=({leaf.ndim - 1},)), with stacked layers or experts in batch=.'
    )
  rule = Rule(path, (0,), (1,)) if rule is None else rule
  perm = rule.batch + rule.left + rule.right
  if any(not -leaf.ndim <= axis < leaf.ndim for axis in perm) or sorted(
      axis % leaf.ndim for axis in perm
  ) != list(range(leaf.ndim)):
    raise ValueError(
        f'Expected batch, left and right of rule {rule.pattern!r} to name each'
        f' axis of {path} once, got batch={rule.batch}, left={rule.left},'
        f' right={rule.right} for shape {tuple(leaf.shape)}.'
    )
  size = lambda axes: math.prod(leaf.shape[axis] for axis in axes)
  layer = re.search(spec.layer, path)
  name = path
  if layer is not None:
    name = path[: layer.start(1)] + path[layer.end(1) :]
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  words = np.frombuffer(digest, dtype='<u4')
  return Matrix(
      index=index,
      path=path,
      words=(int(words[0]), int(words[1])),
      layer=0 if layer is None else int(re.sub(r'\D', '', layer.group(1))),
      perm=tuple(axis % leaf.ndim for axis in perm),
      shape=tuple(leaf.shape),
      batch=tuple(leaf.shape[axis] for axis in rule.batch),
      m=size(rule.left),
      n=size(rule.right),
      dtype=leaf.dtype,
  )
