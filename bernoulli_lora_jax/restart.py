"""What of an optimiser's state restarts with a link, and what goes on.

A link that ends replaces the factors, so what an optimiser knows about the old
ones is void: moments, copies of the params, and the counts that correct those
moments. What it knows about the run is not: counts of schedules, failures seen,
plateaus, keys of noise. The rule tells them apart by structure and not by class:

  A *node* of the state is a NamedTuple (or another class), without the states
  nested in it: what lies below another class, or below a field whose name ends
  with `state` or `states`, is a node of its own. A node that holds a leaf of a
  factor restarts whole, its own count included; all other nodes go on.

What is about factors and is yet true of the next link says so: all that lies below a
`Lasting` goes on, whatever its paths and shapes are.

A leaf is a factor's if its path ends with the factor's (moments, copies, rows
and columns of Adafactor), if its last axes are the factor's (memories, leaves in
a list), or if it is one axis as long as factors laid end to end
(`optax.flatten`). Copies of the params restart at the new factors, since the
fresh state is made from them.

Some nodes have one count for moments and schedule: either choice would be
wrong, so `check` refuses them and names the way out.
"""

from collections.abc import Callable, Iterator
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# A function (fresh, old) -> state that replaces the rule.
Restart = Callable[[Any, Any], Any]

# Nodes of optax whose count serves moments and, if these arguments are
# callables, a schedule; with the factory that the user has called.
_SHARED_COUNTS = {
    'DAdaptAdamWState': ('optax.contrib.dadapt_adamw', ('learning_rate',)),
    'MadgradState': ('optax.contrib.madgrad', ('learning_rate',)),
    'MomoAdamState': ('optax.contrib.momo_adam', ('learning_rate',)),
    'MomoState': ('optax.contrib.momo', ('learning_rate',)),
    'ProdigyState': ('optax.contrib.prodigy', ('learning_rate',)),
    'ScaleByAdemamixState': ('optax.contrib.ademamix', ('b3', 'alpha')),
    'ScaleBySimplifiedAdEMAMixState': (
        'optax.contrib.simplified_ademamix',
        ('alpha',),
    ),
    'ScheduleFreeState': ('optax.contrib.schedule_free', ('learning_rate',)),
}

_Keys = tuple[Any, ...]  # Of a path, as of jax.tree_util.


class Lasting(NamedTuple):
  """What of an optimiser's state goes on when a link ends, though it has factors."""

  state: Any


def restart(fresh: Any, old: Any, trained: Any) -> Any:
  """Returns an optimiser's state at the start of a link.

  Args:
    fresh: what the optimiser's init returns for `trained`.
    old: its state so far.
    trained: tree of the new factors, as the optimiser sees them.

  Returns:
    The fresh leaves of every node that holds a leaf of a factor, the old ones
    of all others.
  """
  places = _places(old, trained)
  restarted = {node for node, is_factor in places if is_factor}
  new = dict(jax.tree_util.tree_flatten_with_path(fresh)[0])
  kept, treedef = jax.tree_util.tree_flatten_with_path(old)
  chosen = []
  for (keys, leaf), (node, _) in zip(kept, places, strict=True):
    if node in restarted and keys not in new:
      raise ValueError(
          'Expected an optimiser whose init makes all of its state, got'
          f' {jax.tree_util.keystr(keys)} from its update alone: pass restart=.'
      )
    chosen.append(new[keys] if node in restarted else leaf)
  return treedef.unflatten(chosen)


def check(
    tx: optax.GradientTransformation, opt_state: Any, trained: Any
) -> None:
  """Raises for an optimiser that no link can restart rightly.

  Args:
    tx: the optimiser.
    opt_state: what its init returns for `trained`.
    trained: tree of factors.

  Raises:
    ValueError: gradients or params of several steps in one state
      (`optax.MultiSteps`, `optax.apply_every`, `optax.contrib.sam`); one that
      wants gradients of single examples; one count of moments and schedule;
      states that cannot be told apart.
  """
  nodes = _nodes(opt_state)
  for node in nodes:
    if isinstance(node, optax.MultiStepsState):
      raise ValueError(
          'Expected num_micro_batches in place of optax.MultiSteps in a chain'
          ' that merges: a link that ends drops the gradients accumulated so'
          ' far.'
      )
    if isinstance(node, optax.ApplyEvery):
      raise ValueError(
          'Expected num_micro_batches in place of optax.apply_every in a chain'
          ' that merges: a link that ends drops the gradients accumulated so'
          ' far.'
      )
    if isinstance(node, optax.contrib.SAMState) and node.cache is not None:
      raise ValueError(
          'Expected an optimiser whose every step is one of descent in a chain'
          ' that merges, got optax.contrib.sam: a link that ends between its'
          ' two steps would merge the perturbed factors.'
      )
    if isinstance(node, optax.contrib.DifferentiallyPrivateAggregateState):
      raise ValueError(
          'Expected an optimiser of mean gradients, got'
          ' optax.contrib.differentially_private_aggregate, which wants those of'
          ' single examples.'
      )
  injected = {
      (id(inner), name)
      for node in nodes
      for name in getattr(node, 'hyperparams', None) or ()
      for inner in _nodes(node.inner_state)
  }
  for node in nodes:
    factory, names = _SHARED_COUNTS.get(type(node).__name__, ('', ()))
    module = type(node).__module__
    if not module.startswith('optax.'):
      continue
    for name in names:
      if (id(node), name) not in injected:
        _check_constant(tx, module, factory, name)
  _check_apart(opt_state, trained)


def has_lasting(state: Any) -> bool:
  """Returns whether some of an optimiser's state goes on by its own word."""
  return any(map(_is_lasting, jax.tree.leaves(state, is_leaf=_is_lasting)))


def _is_lasting(node: Any) -> bool:
  return isinstance(node, Lasting)


def _check_constant(tx: Any, module: str, factory: str, name: str) -> None:
  """Raises unless the functions of a module see a constant by this name."""
  values = list(_bound(tx, module, name))
  if values and not any(map(callable, values)):
    return
  got = 'a schedule' if values else 'one that cannot be seen'
  raise ValueError(
      f'Expected a constant {name} of {factory} in a chain whose links restart'
      f' the optimiser, got {got}: its count is that of the moments too, which'
      f' restart. Write optax.inject_hyperparams({factory})({name}=...), whose'
      ' count goes on, or pass reset_optimizer=False or restart=.'
  )


def _check_apart(opt_state: Any, trained: Any) -> None:
  """Raises where a tuple holds factors and other leaves without a class."""
  places = _places(opt_state, trained)
  paths = [
      keys for keys, _ in jax.tree_util.tree_flatten_with_path(opt_state)[0]
  ]
  bare: dict[_Keys, set[bool]] = {}
  for keys, (node, is_factor) in zip(paths, places, strict=True):
    below = keys[len(node) :]
    if below and isinstance(below[0], jax.tree_util.SequenceKey):
      bare.setdefault(node, set()).add(is_factor)
  for node, kinds in bare.items():
    if len(kinds) > 1:
      where = jax.tree_util.keystr(node) or 'the whole state'
      raise ValueError(
          'Expected an optimiser whose states are NamedTuples or dicts, got at'
          f' {where} a tuple of leaves with the shapes of factors and others:'
          ' whether these go on when a link ends cannot be told. Name the'
          ' fields, or pass restart=.'
      )


def _places(state: Any, trained: Any) -> list[tuple[_Keys, bool]]:
  """Returns (path of its node, whether it is a factor's) of every leaf."""
  flat = jax.tree_util.tree_flatten_with_path(trained)[0]
  names = {keys for keys, _ in flat}
  shapes = {jnp.shape(leaf) for _, leaf in flat}
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  tops = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_lasting)[0]
  lasting = [keys for keys, node in tops if _is_lasting(node)]
  heads = []
  for keys, leaf in leaves:
    if any(keys[: len(top)] == top for top in lasting):
      heads.append((keys, False))
      continue
    head = _above(keys, names)
    is_factor = head is not None or _has_shape(leaf, shapes, flat)
    heads.append((keys if head is None else head, is_factor))
  places = [(*_node(head), is_factor) for head, is_factor in heads]
  # A list of factors in a dict with a count belongs to the dict.
  mixed = {node for node, _, is_factor in places if not is_factor}
  found = []
  for node, base, is_factor in places:
    up = node
    while is_factor and up not in mixed and len(up) > base:
      up = up[:-1]
    found.append((up if up in mixed else node, is_factor))
  return found


def _node(head: _Keys) -> tuple[_Keys, int]:
  """Returns the path of the node of a leaf, and how far up it may be moved."""
  for i in range(len(head) - 1, -1, -1):
    if isinstance(
        head[i], (jax.tree_util.GetAttrKey, jax.tree_util.FlattenedIndexKey)
    ):
      name = getattr(head[i], 'name', '')
      if not name.endswith(('state', 'states')):
        return head[:i], i
      return max(head[: i + 1], head[:-1], key=len), i + 1
  return head[:-1], 0


def _above(keys: _Keys, names: set[_Keys]) -> _Keys | None:
  """Returns the part of a path above a factor's own, None if there is none."""
  depths = {len(name) for name in names if name}
  is_field = lambda key: isinstance(key, jax.tree_util.GetAttrKey)
  has_fields = any(is_field(key) for name in names for key in name)
  for start in range(len(keys) - 1, -1, -1):
    if any(keys[start : start + depth] in names for depth in depths):
      return keys[:start]
    if is_field(keys[start]) and not has_fields:
      return None
  return None


def _has_shape(leaf: Any, shapes: set[tuple[int, ...]], flat: Any) -> bool:
  """Returns whether a leaf holds as many numbers as factors, along their axes."""
  shape = jnp.shape(leaf)
  is_number = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
  if not is_number or not shape:
    return False
  if any(s and shape[-len(s) :] == s for s in shapes):
    return True
  if len(shape) > 1 or shape[0] < 2:
    return False
  sizes = [math.prod(jnp.shape(factor)) for _, factor in flat]
  if sum(sizes) == shape[0]:
    return True
  sums = 1  # Bit i: some of the factors have i numbers together.
  for size in sizes:
    if size <= shape[0]:
      sums |= sums << size
  return bool(sums >> shape[0] & 1)


def _nodes(tree: Any) -> list[Any]:
  """Returns all nodes of a tree, leaves included."""
  found: list[Any] = []
  # Told of every node, it takes none for a leaf.
  jax.tree.leaves(tree, is_leaf=lambda node: bool(found.append(node)))
  return found


def _bound(root: Any, module: str, name: str) -> Iterator[Any]:
  """Yields what functions of a module, reachable from `root`, see by a name."""
  seen, stack = set(), [root]
  while stack:
    one = stack.pop()
    if id(one) in seen or isinstance(one, (jax.Array, str, bytes, type)):
      continue
    seen.add(id(one))
    if isinstance(one, functools.partial):
      stack += [one.func, one.args, one.keywords]
    elif isinstance(one, dict):
      stack += one.values()
    elif isinstance(one, (tuple, list)):
      stack += one
    elif code := getattr(one, '__code__', None):
      cells = one.__closure__ or ()
      for variable, cell in zip(code.co_freevars, cells, strict=True):
        try:
          value = cell.cell_contents
        except ValueError:  # Not bound yet.
          continue
        if variable == name and one.__module__ == module:
          yield value
        stack.append(value)
    elif (wrapped := getattr(one, '__wrapped__', None)) is not None:
      stack.append(wrapped)
    elif hasattr(one, '__self__'):
      stack += [one.__self__, getattr(one, '__func__', None)]
    elif hasattr(one, '__dict__'):
      stack.append(vars(one))
