"""A3, the LoRA family as one policy: who trains, what is frozen, when to merge.

A selected matrix acts as W + s L R with L in R^(m x r) and R in R^(r x n). *Side*
names the frozen factor: a left link freezes L and trains R; prob = P(left).
`ChainPolicy` says it for all matrices, `Target` for some of them, `resolve` for
each matrix of a tree.

Reference: Hu et al., LoRA, arXiv 2106.09685; Xia et al., Chain of LoRA, arXiv
2401.04151; Zhu et al., Asymmetry in low-rank adapters, arXiv 2402.16842;
Malinovsky et al., RAC-LoRA, arXiv 2410.08305; Sokolov et al., Bernoulli-LoRA,
arXiv 2508.03820.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import count
from bernoulli_lora_jax import deprecated
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import rounding as rounding_lib
from bernoulli_lora_jax import sketches

Matrices = matrices_lib.Matrices
Matrix = matrices_lib.Matrix

SIDES = ('left', 'right', 'bernoulli', None)
# The sides of the members that have a field; others have none of it.
_SIDES_OF = {
    'prob': ('bernoulli',),
    'shared_coin': ('bernoulli',),
    'shared_frames': ('left', 'bernoulli'),
    'init': (None,),
    'zero': (None,),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """Which matrices are adapted, and what differs from the policy for them.

  Attributes:
    pattern: regular expression searched in the normalised path.
    rank: None for the policy's, like the others.
    alpha: see `ChainPolicy`.
    prob: see `ChainPolicy`.
  """

  pattern: str
  rank: int | None = None
  alpha: float | None = None
  prob: float | None = None

  def __post_init__(self):
    matrices_lib.check_pattern('pattern', self.pattern)
    checks.integers(1, **self._given('rank'))
    checks.positive(**self._given('alpha'))
    checks.within('[0, 1]', **self._given('prob'))

  def _given(self, name: str) -> dict[str, Any]:
    value = getattr(self, name)
    return {} if value is None else {f'Target({self.pattern!r}).{name}': value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainPolicy:
  """One member of the LoRA family (A3).

  The members have names: `lora`, `cola`, `asymmetric`, `rac`, `bernoulli`. A field
  that a member does not have (prob where no coin falls) keeps its default; sketch
  and frame may be given to all, for sweeps: they are laws of what is frozen.

  Attributes:
    rank: r >= 1, clipped to the sides of a matrix and at most the longer one.
    period: steps of a link, >= 1; None never merges.
    side: the frozen factor: 'left', 'right', 'bernoulli' (a coin a matrix, a
      layer and a link) or None (both factors are trained).
    prob: P(left) in [0, 1], for 'bernoulli'. A Python 0 or 1 compiles as 'right'
      or 'left'.
    alpha: numerator of the scale s, > 0; None for s = 1.
    scaling: 'rank' for s = alpha / rank, 'sqrt' for s = alpha / sqrt(rank).
    resample: whether each link draws anew; False keeps coin and frozen factor
      of the first link.
    sketch: law of the frozen factor.
    frame: 'orthonormal' (what the theorems assume) or 'raw' (as sampled).
    init: law of the random factor where both are trained: 'uniform', U(+-1/
      sqrt(m)) on the left and U(+-1/sqrt(n)) on the right, or 'normal', N(0, 1).
    zero: which factor starts from zero where both are trained.
    warmup: steps at the start of each link over which the updates grow linearly
      to their full size; 0 for none, less than the period.
    reset_optimizer: whether a link begins with fresh moments. The counts of
      schedules go on.
    rounding: 'nearest', 'stochastic' or 'compensated', see `rounding`.
    shared_coin: one coin for all matrices. Where they have one prob, a link has one
      side, which the host may know, see `one_coin`.
    shared_frames: regular expressions, each searched in the normalised path. Matrices
      whose paths are the same but for what one of them finds draw one left frame, as
      those that read one activation may: 'self_attn/(q|k|v)_proj'. Then x L is
      computed once for those whose coin is left. Coins stay separate; each frame has
      its law, which is all that the rates ask for (T1), but they are not independent.
    targets: what is adapted; () for what `Matrices` selects.
  """

  rank: int
  period: int | None
  side: str | None = 'bernoulli'
  prob: float | jax.Array = 0.5
  alpha: float | None = None
  scaling: str = 'rank'
  resample: bool = True
  sketch: sketches.Sketch = sketches.gaussian()
  frame: str = 'orthonormal'
  init: str = 'uniform'
  zero: str = 'right'
  warmup: int = 0
  reset_optimizer: bool = True
  rounding: str = 'nearest'
  shared_coin: bool = False
  shared_frames: tuple[str, ...] = ()
  targets: tuple[Target, ...] = ()

  @classmethod
  def lora(cls, rank: int, **fields: Any) -> 'ChainPolicy':
    """Returns LoRA: both factors are trained and never merged."""
    return cls(rank=rank, side=None, period=None, **fields)

  @classmethod
  def cola(cls, rank: int, period: int, **fields: Any) -> 'ChainPolicy':
    """Returns COLA: both factors are trained, merged and drawn anew."""
    return cls(rank=rank, side=None, period=period, **fields)

  @classmethod
  def asymmetric(cls, rank: int, side: str, **fields: Any) -> 'ChainPolicy':
    """Returns asymmetric LoRA: one factor is frozen and kept."""
    return cls(rank=rank, side=side, period=None, **fields)

  @classmethod
  def rac(
      cls, rank: int, period: int, side: str, **fields: Any
  ) -> 'ChainPolicy':
    """Returns RAC-LoRA: the same side is frozen in each link."""
    return cls(rank=rank, side=side, period=period, **fields)

  @classmethod
  def bernoulli(
      cls,
      rank: int,
      period: int,
      prob: float | jax.Array = 0.5,
      **fields: Any,
  ) -> 'ChainPolicy':
    """Returns Bernoulli-LoRA: a coin chooses the frozen side of each link."""
    return cls(rank=rank, period=period, prob=prob, **fields)

  def __post_init__(self):
    checks.integers(1, rank=self.rank)
    checks.within('[0, 1]', prob=self.prob)
    if self.period is not None:
      checks.integers(1, period=self.period)
    if self.alpha is not None:
      checks.positive(alpha=self.alpha)
    choices = {
        'side': SIDES,
        'scaling': ('rank', 'sqrt'),
        'frame': ('orthonormal', 'raw'),
        'init': ('uniform', 'normal'),
        'zero': ('left', 'right'),
        'rounding': rounding_lib.MODES,
    }
    for name, values in choices.items():
      checks.one_of(values, **{name: getattr(self, name)})
    if not all(isinstance(target, Target) for target in self.targets):
      raise TypeError(
          f'Expected targets to be a tuple of Target, got {self.targets!r}.'
      )
    if isinstance(self.shared_frames, str):
      raise TypeError(
          'Expected shared_frames to be a tuple of patterns, got'
          f' {self.shared_frames!r}.'
      )
    for pattern in self.shared_frames:
      matrices_lib.check_pattern('a pattern of shared_frames', pattern)
    for target in self.targets:
      if target.prob is not None and self.side != 'bernoulli':
        raise ValueError(
            f'Expected prob of target {target.pattern!r} with'
            f" side='bernoulli', got side={self.side!r}."
        )
    for name in ignored(self.side):
      default = self.__dataclass_fields__[name].default
      value = getattr(self, name)
      if isinstance(value, jax.Array) or value != default:
        raise ValueError(
            f'Expected {name} with side in {_SIDES_OF[name]} alone, got {name}='
            f'{getattr(value, "name", value)!r} with side={self.side!r}.'
        )
    longest = math.inf if self.period is None else self.period
    if not 0 <= self.warmup < longest:
      raise ValueError(
          f'Expected warmup in [0, period={self.period}), got'
          f' warmup={self.warmup}.'
      )


def one_coin(policy: ChainPolicy) -> float | None:
  """Returns P(left) where one coin decides for all matrices, else None.

  It is a Python number in (0, 1). A prob of 0 or 1 needs no coin.
  """
  if policy.side != 'bernoulli' or not policy.shared_coin:
    return None
  given: list[Any] = [
      policy.prob if t.prob is None else t.prob for t in policy.targets
  ]
  probs = given or [policy.prob]
  if any(isinstance(prob, jax.Array) for prob in probs):
    return None
  coins = {prob for prob in probs if links_lib.known_side(prob) is None}
  return coins.pop() if len(coins) == 1 else None


def ignored(side: str | None) -> list[str]:
  """Returns the fields that members of a side do not have."""
  return [name for name, sides in _SIDES_OF.items() if side not in sides]


class Adapted(NamedTuple):
  """One adapted matrix with what the policy says about it."""

  matrix: Matrix
  rank: int  # As asked for.
  scale: float  # s
  prob: float | jax.Array | None  # P(left); None: both are trained.
  frame: Matrix  # Whose left frame it has: its own, or the first of its group.

  @property
  def trained(self) -> tuple[str, ...]:
    """The factors that an optimiser sees."""
    if self.prob is None:
      return ('left', 'right')
    is_left = links_lib.known_side(self.prob)
    return {True: ('right',), False: ('left',), None: ('left', 'right')}[
        is_left
    ]

  @property
  def inner(self) -> int:
    """The common dimension of the stored factors."""
    m, n = self.matrix.m, self.matrix.n
    if self.prob is None:
      return min(self.rank, m, n)
    is_left = links_lib.known_side(self.prob)
    return min(self.rank, {True: m, False: n, None: max(m, n)}[is_left])


def resolve(
    params: Any, policy: ChainPolicy, matrices: Matrices | None
) -> list[Adapted]:
  """Returns what is adapted, in the order of the leaves."""
  spec = Matrices() if matrices is None else matrices
  # Python numbers count as arrays.
  params = jax.tree.map(
      lambda x: x if hasattr(x, 'dtype') else np.asarray(x), params
  )
  if policy.targets:
    if spec.select is not None:
      raise ValueError(
          'Expected matrices.select to be None where the policy has targets,'
          f' got select={spec.select!r}.'
      )
    leaves = jax.tree_util.tree_flatten_with_path(inject.logical(params))[0]
    paths = matrices_lib.path_names([path for path, _ in leaves])
    chosen = [
        path
        for path in paths
        if any(re.search(t.pattern, path) for t in policy.targets)
    ]
    # Path by path: patterns joined into one may not begin with flags.
    select = '|'.join(f'^{re.escape(path)}$' for path in chosen or ['nothing'])
    spec = dataclasses.replace(spec, select=select)
    _check_targets(policy.targets, chosen, paths)
  found = matrices_lib.find(inject.logical(params), spec)
  found_paths = [matrix.path for matrix in found]
  _check_targets(policy.targets, found_paths, found_paths)
  adapted = [_adapted(matrix, policy) for matrix in found]
  return _grouped(adapted, policy.shared_frames)


def resolve_others(
    params: Any, found: Sequence[Adapted], patterns: Sequence[str]
) -> dict[str, dict[str, int]]:
  """Returns {pattern: {path: index of the leaf}} of what trains at full size.

  Args:
    params: tree of arrays or shapes.
    found: what is adapted.
    patterns: regular expressions, searched in the normalised path.

  Raises:
    ValueError: a pattern that selects nothing, an adapted leaf, one of another
      pattern, or one that is not of floating point; by path.
  """
  if not patterns:
    return {}
  flat = jax.tree_util.tree_flatten_with_path(
      params, is_leaf=inject.is_quantized
  )[0]
  paths = matrices_lib.path_names([path for path, _ in flat])
  adapted = {one.matrix.index for one in found}
  chosen: dict[str, dict[str, int]] = {}
  owner: dict[int, str] = {}
  for pattern in patterns:
    places = {p: i for i, p in enumerate(paths) if re.search(pattern, p)}
    if not places:
      raise ValueError(
          f'Expected the pattern {pattern!r} of others to match a leaf; the'
          f' paths are {paths}.'
      )
    for path, i in places.items():
      leaf = flat[i][1]
      dtype = getattr(leaf, 'dtype', None)
      if i in adapted:
        raise ValueError(
            f'Expected others to select what is not adapted, got {pattern!r},'
            f' which selects {path}.'
        )
      if i in owner:
        raise ValueError(
            f'Expected one pattern of others for {path}, got {owner[i]!r} and'
            f' {pattern!r}.'
        )
      if (
          inject.is_quantized(leaf)
          or dtype is None
          or not np.issubdtype(dtype, np.inexact)
          and not jax.dtypes.issubdtype(dtype, np.inexact)
      ):
        raise ValueError(
            f'Expected others to select arrays of floating point, got'
            f' {pattern!r}, which selects {path} of dtype {dtype}.'
        )
      owner[i] = pattern
    chosen[pattern] = places
  return chosen


def adapter_table(
    params: Any,
    policy: ChainPolicy,
    matrices: Matrices | None = None,
    others: Iterable[str] = (),
) -> list[dict[str, Any]]:
  """Returns a table of what a policy adapts, one row a matrix.

  Args:
    params: tree of arrays or shapes.
    policy: see `ChainPolicy`.
    matrices: what is a matrix.
    others: patterns of what trains at full size, see `adapters.make_chain`.

  Returns:
    Rows {'matrix', 'shape', 'rank', 'P(left)', 'scale', 'stored', 'trained'}:
    numbers stored in factors, and trained at a step in the mean over the coin,
    over all entries of a stack. A rank above a side says '(clipped)'.
  """
  rows = []
  found = resolve(params, policy, matrices)
  for one in found:
    m = one.matrix
    entries = ''.join(f'{size} x ' for size in m.batch)
    rows.append(
        {
            'matrix': m.path,
            'shape': f'{entries}{m.m} x {m.n}',
            'rank': _rank_text(one),
            'P(left)': '-' if one.prob is None else one.prob,
            'scale': one.scale,
            'stored': m.entries.size * one.inner * (m.m + m.n),
            'trained': m.entries.size * trained_numbers(one),
        }
    )
  leaves = jax.tree.leaves(params, is_leaf=inject.is_quantized)
  for places in resolve_others(params, found, tuple(others)).values():
    for path, index in places.items():
      shape = leaves[index].shape
      size = math.prod(shape)
      rows.append(
          {
              'matrix': path,
              'shape': ' x '.join(map(str, shape)),
              'rank': 'full',
              'P(left)': '-',
              'scale': '-',
              'stored': size,
              'trained': size,
          }
      )
  return rows


describe = deprecated.alias(
    'adapters.describe', 'adapters.adapter_table', adapter_table
)


def trained_numbers(one: Adapted) -> Any:
  """Returns the mean number of trained parameters a step of one entry."""
  m, n = one.matrix.m, one.matrix.n
  if one.prob is None:
    return one.inner * (m + n)
  return count.mean_trained(m, n, rank=one.rank, prob=one.prob)


def of_side(found: Sequence[Adapted], side: str | None) -> list[Adapted]:
  """Returns what is adapted as links of a side train it.

  Args:
    found: what is adapted; factors keep the shapes that they have of it.
    side: where coins fall, 'left' or 'right'; None for where they may fall.
  """
  if side is None:
    return list(found)
  prob = {'left': 1.0, 'right': 0.0}[side]
  has_coin = lambda one: len(one.trained) == 2 and one.prob is not None
  return [one._replace(prob=prob) if has_coin(one) else one for one in found]


def _check_targets(
    targets: Sequence[Target], matched: Sequence[str], listed: Sequence[str]
) -> None:
  for target in targets:
    if not any(re.search(target.pattern, path) for path in matched):
      raise ValueError(
          f'Expected target {target.pattern!r} to match a matrix; the paths are'
          f' {list(listed)}.'
      )


def _adapted(matrix: Matrix, policy: ChainPolicy) -> Adapted:
  matching = [t for t in policy.targets if re.search(t.pattern, matrix.path)]
  values = {}
  for name in ('rank', 'alpha', 'prob'):
    given = {getattr(t, name) for t in matching if getattr(t, name) is not None}
    if len(given) > 1:
      raise ValueError(
          f'Expected targets that agree about {matrix.path}, got'
          f' {[t.pattern for t in matching]} with {name} in {sorted(given)}.'
      )
    values[name] = given.pop() if given else getattr(policy, name)
  rank, alpha = values['rank'], values['alpha']
  matrices_lib.check_rank(matrix, rank)
  root = rank if policy.scaling == 'rank' else math.sqrt(rank)
  prob = {'left': 1.0, 'right': 0.0, None: None}.get(
      policy.side, values['prob']
  )
  scale = 1.0 if alpha is None else alpha / root
  return Adapted(matrix, rank, scale, prob, matrix)


def _grouped(
    found: Sequence[Adapted], patterns: Sequence[str]
) -> list[Adapted]:
  """Returns what is adapted, each group with the frame of its first."""
  grouped: list[Adapted] = []
  first: dict[str, Adapted] = {}
  for one in found:
    matching = [p for p in patterns if re.search(p, one.matrix.path)]
    if len(matching) > 1:
      raise ValueError(
          f'Expected one pattern of shared_frames for {one.matrix.path}, got'
          f' {matching}.'
      )
    for pattern in matching:
      name = re.sub(pattern, '*', one.matrix.path, count=1)
      other = first.setdefault(name, one)
      one = one._replace(frame=other.matrix)
      shapes = [(x.matrix.batch, x.matrix.m, x.rank) for x in (other, one)]
      if shapes[0] != shapes[1]:
        raise ValueError(
            'Expected matrices that share a frame to have one batch, number of'
            f' rows and rank, got {shapes[0]} of {other.matrix.path} and'
            f' {shapes[1]} of {one.matrix.path}.'
        )
    grouped.append(one)
  for pattern in patterns:
    if not any(re.search(pattern, one.matrix.path) for one in found):
      raise ValueError(
          f'Expected the pattern {pattern!r} of shared_frames to match a matrix;'
          f' the paths are {[one.matrix.path for one in found]}.'
      )
  return grouped


def _rank_text(one: Adapted) -> Any:
  m, n = one.matrix.m, one.matrix.n
  left, right = min(one.rank, m), min(one.rank, n)
  if left == right == one.rank:
    return one.rank
  if one.prob is None:
    return f'{min(left, right)} (clipped)'
  is_left = links_lib.known_side(one.prob)
  if is_left is None:
    return f'left {left}, right {right} (clipped)'
  used = left if is_left else right
  return used if used == one.rank else f'{used} (clipped)'
