"""The change of weights as thin factors: what an adapter's file holds.

    links = recipes.link_factors(recipe, base)
    thin = export.of_links(links)                  # exact, of rank min(T r, m, n)
    thin = export.of_change(base, tuned, rank=64)  # near, of any two trees
    thin = export.of_state(chain, state)           # L R of plain LoRA, as it is
    rows = export.report(thin, base, tuned)
    peft_format.save('adapter', thin, checkpoint)  # see models/peft_format.py

A matrix of a stack at a time; of an exact sum nothing m x n is formed: the stacked
factors [L_1 ... L_T] = Q_L K_L and [R_1; ...; R_T] = K_R Q_R have thin QRs, and the
SVD is that of the small core K_L K_R.

*Exact* is equal to the sum of the links' products as they are in float32, s
included. Weights that links were merged into were rounded at each merge: how far
base + adapter is from them is what `report` calls distance.

Reference: Halko, Martinsson and Tropp, Finding structure with randomness, arXiv
0909.4061, algorithms 4.4 and 5.1.
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import checks
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import merging

Factors = merging.Factors
Matrix = matrices_lib.Matrix

# Singular values below this part of the largest are those of rounding in float64,
# as of links that share a frozen factor.
_NOISE = 1e-12


class Thin(NamedTuple):
  """The change of one matrix, or of each of a stack, as thin factors."""

  left: np.ndarray  # (*batch, m, r) float32
  right: np.ndarray  # (*batch, r, n) float32, the scale s included.
  ranks: np.ndarray  # shape=batch, int; what lies beyond in r is zero.
  lost: np.ndarray  # shape=batch; ||change - L R||_F / ||change||_F.

  def entry(self, place: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns L and R of one entry, of its own rank."""
    rank = self.ranks[place]
    return self.left[place][:, :rank], self.right[place][:rank]


def of_links(
    links: Sequence[Factors], rank: int | None = None
) -> dict[str, Thin]:
  """Returns the sum of the products of links, exactly or truncated.

  Args:
    links: {path: {'left': (*batch, m, r), 'right': (*batch, r, n)}} of each, the
      scale s in the right one: `recipes.link_factors`, or `adapters.scaled` at the
      end of each. A path that a link lacks did not change in it.
    rank: most of an entry; None for all.

  Returns:
    {path: Thin}. Without `rank` the products are the sums, up to the rounding of L
    and R to float32, and ranks are at most min(T r, m, n): directions below 1e-12
    of the largest singular value are rounding and are left out. With it they are
    the best approximations, and `lost` tells what they lack.

  Raises:
    ValueError: no links; a factor that is not finite, or of another shape than in
      other links, by path.
  """
  checks.that(len(links) > 0, 'at least one link', links=list(links))
  if rank is not None:
    checks.integers(1, rank=rank)
  for link in links:
    merging.check_factors(link)
  made = {}
  for path in dict.fromkeys(path for link in links for path in link):
    pairs = [link[path] for link in links if path in link]
    batch = _batch_of(path, pairs)
    made[path] = _stacked(
        [
            _compressed([_at(pair, place) for pair in pairs], rank)
            for place in np.ndindex(*batch)
        ],
        batch,
    )
  return made


def of_change(
    base: Any,
    tuned: Any,
    rank: int,
    matrices: matrices_lib.Matrices | None = None,
    *,
    key: jax.Array | None = None,
    oversample: int = 10,
    iterations: int = 2,
) -> dict[str, Thin]:
  """Returns the change between two trees, by a randomised SVD.

  Args:
    base: params before.
    tuned: params after.
    rank: of the factors, clipped to the sides of each matrix.
    matrices: what is a matrix.
    key: typed PRNG key of the range finder; None for jax.random.key(0).
    oversample: columns beyond the rank in the range finder.
    iterations: of the power method; 0 suits no slowly falling spectrum.

  Returns:
    {path: Thin}; `lost` is measured against the change itself.

  Raises:
    ValueError: paths or shapes that differ; a leaf that is no matrix and changed,
      which no adapter holds; weights that are not finite.

  Guarantees:
    Layers stacked or not draw the same.
    A change of rank at most `rank` is found, to float32 rounding.
  """
  checks.integers(1, rank=rank)
  checks.integers(0, oversample=oversample, iterations=iterations)
  key = jax.random.key(0) if key is None else key
  merging.check_shapes(base, tuned)
  tuned = matrices_lib.align(base, tuned, ('base', 'tuned'))
  old, new = jax.tree.leaves(base), jax.tree.leaves(tuned)
  found = matrices_lib.find(base, matrices)
  _check_rest(base, old, new, found)
  made = {}
  for m in found:
    keys = links_lib.matrix_keys(key, [m]).reshape(m.batch)
    entries = []
    for place in np.ndindex(*m.batch):
      change = _view(m, new[m.index], place) - _view(m, old[m.index], place)
      left, right, lost = _range_svd(
          change,
          keys[place],
          rank=min(rank, m.m, m.n),
          oversample=oversample,
          iterations=iterations,
      )
      if not np.isfinite(lost):
        raise ValueError(f'Expected finite weights, got others in {m.path}.')
      is_zero = not np.any(right)
      left, right = (np.asarray(x) for x in (left, right))
      kept = 0 if is_zero else left.shape[1]
      entries.append((left[:, :kept], right[:kept], float(lost)))
    made[m.path] = _stacked(entries, m.batch)
  return made


def of_state(
    chain: adapters.Chain, state: adapters.AdapterState
) -> dict[str, Thin]:
  """Returns the factors of a state whose base has nothing merged, as they are.

  Args:
    chain: as trained.
    state: of its first link; plain LoRA has no other.

  Raises:
    ValueError: a state with links in its base weights, a chain with others (which
      no adapter holds) or a sketched one (whose weights have moved), a factor that
      is not finite.
  """
  if chain.sketched:
    raise ValueError(
        'Expected a chain of adapters, got sketched=True, which moves its weights:'
        ' of_change takes them before and after.'
    )
  period = chain.policy.period
  if period is not None and int(state.count) > period:
    raise ValueError(
        f'Expected a state of the first link, count <= {period}, got'
        f' count={int(state.count)}: of_links adds up all links.'
    )
  if chain.others:
    raise ValueError(
        'Expected a chain without others, which train at full size, got'
        f' others={list(chain.others)}: an adapter holds factors alone.'
    )
  merging.check_factors(state.factors)
  made = {}
  found = chain.adapted(state.params)
  for path, pair in adapters.scaled(state.factors, found).items():
    left, right = (np.asarray(pair[s], np.float32) for s in ('left', 'right'))
    batch = left.shape[:-2]
    ranks = np.full(batch, left.shape[-1])
    made[path] = Thin(left, right, ranks, np.zeros(batch))
  return made


def truncate(thin: Mapping[str, Thin], rank: int) -> dict[str, Thin]:
  """Returns the best approximations of at most a rank.

  Args:
    thin: {path: Thin}.
    rank: >= 1.

  Returns:
    {path: Thin}; `lost` is relative to the change that `thin` is.
  """
  return of_links([as_pairs(thin)], rank)


def as_pairs(thin: Mapping[str, Thin]) -> merging.Pairs:
  """Returns {path: {'left', 'right'}} for `merging.unmerge` and the like."""
  return {
      path: {'left': jnp.asarray(t.left), 'right': jnp.asarray(t.right)}
      for path, t in thin.items()
  }


def report(
    thin: Mapping[str, Thin],
    base: Any = None,
    tuned: Any = None,
    matrices: matrices_lib.Matrices | None = None,
) -> list[dict[str, Any]]:
  """Returns what the factors hold, a row a layer.

  Args:
    thin: {path: Thin}.
    base: params before; None leaves the distance out.
    tuned: params after, merged and rounded.
    matrices: what is a matrix.

  Returns:
    Rows {'matrix', 'layer', 'rank', 'lost', 'distance'}: 'lost' is that of `Thin`,
    'distance' is ||W + L R - W'||_F / ||W' - W||_F with W' the tuned weights; 0
    where nothing changed and nothing was added.
  """
  found = {}
  if base is not None:
    merging.check_shapes(base, tuned)
    tuned = matrices_lib.align(base, tuned, ('base', 'tuned'))
    found = {m.path: m for m in matrices_lib.find(base, matrices)}
  old, new = jax.tree.leaves(base), jax.tree.leaves(tuned)
  rows = []
  for path, one in thin.items():
    m = found.get(path)
    if base is not None and m is None:
      raise ValueError(
          f'Expected factors of the matrices {sorted(found)}, got {path}.'
      )
    first = 0 if m is None else int(m.entries.flat[0])
    for number, place in enumerate(np.ndindex(*one.ranks.shape)):
      row = {
          'matrix': path,
          'layer': first + number,
          'rank': int(one.ranks[place]),
          'lost': float(one.lost[place]),
      }
      if m is not None:
        row['distance'] = _distance(
            _view(m, new[m.index], place) - _view(m, old[m.index], place),
            *one.entry(place),
        )
      rows.append(row)
  return rows


def norm(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
  """Returns ||sum of L_i R_i||_F, forming nothing m x n."""
  return float(np.linalg.norm(_core(pairs)[1]))


def _core(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns Q_L, K and Q_R with Q_L K Q_R^T the sum of the products, in float64."""
  left = np.concatenate([np.asarray(x, np.float64) for x, _ in pairs], axis=1)
  right = np.concatenate([np.asarray(x, np.float64) for _, x in pairs])
  (q_left, k_left), (q_right, k_right) = map(np.linalg.qr, (left, right.T))
  return q_left, k_left @ k_right.T, q_right


def _compressed(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], rank: int | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
  """Returns the sum of products as L and R of few columns, and what is lost."""
  shorter = min(pairs[0][0].shape[0], pairs[0][1].shape[1])
  held: list[tuple[np.ndarray, np.ndarray]] = []
  for pair in pairs:
    held.append(pair)
    # More columns than a matrix has say nothing more: memory of one matrix.
    if sum(left.shape[1] for left, _ in held) > 2 * shorter:
      held = [_svd(held, shorter)[:2]]
  return _svd(held, rank)


def _svd(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], rank: int | None
) -> tuple[np.ndarray, np.ndarray, float]:
  q_left, core, q_right = _core(pairs)
  if not core.size:  # Of no columns: no change.
    return q_left, q_right.T, 0.0
  u, s, vt = np.linalg.svd(core, full_matrices=False)
  kept = int(np.sum(s > _NOISE * s[0]))
  kept = kept if rank is None else min(kept, rank)
  root = np.sqrt(s[:kept])
  total = np.linalg.norm(s)
  lost = float(np.linalg.norm(s[kept:]) / total) if total > 0 else 0.0
  return (q_left @ u[:, :kept]) * root, (q_right @ vt[:kept].T * root).T, lost


@functools.partial(
    jax.jit, static_argnames=('rank', 'oversample', 'iterations')
)
def _range_svd(
    change: jax.Array,
    key: jax.Array,
    *,
    rank: int,
    oversample: int,
    iterations: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns L and R of a rank with L R near a change, and the part that is lost."""
  m, n = change.shape
  columns = min(rank + oversample, m, n)
  multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  basis = lambda x: jnp.linalg.qr(x)[0]
  start = jax.random.normal(key, (n, columns), change.dtype)
  q = basis(multiply(change, start))
  for _ in range(iterations):
    q = basis(multiply(change, basis(multiply(change.T, q))))
  other, core = jnp.linalg.qr(multiply(change.T, q))
  u, s, vt = jnp.linalg.svd(core.T, full_matrices=False)
  root = jnp.sqrt(s[:rank])
  left = multiply(q, u[:, :rank]) * root[None]
  right = (multiply(other, vt[:rank].T) * root[None]).T
  total = jnp.linalg.norm(change)
  lost = jnp.linalg.norm(change - multiply(left, right))
  # NaN stays: it tells of weights that are not finite.
  return left, right, jnp.where(total == 0, 0, lost / total)


def _at(
    pair: Mapping[str, Any], place: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  return np.asarray(pair['left'][place]), np.asarray(pair['right'][place])


def _batch_of(path: str, pairs: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
  """Returns the batch of a matrix; raises where links disagree in shapes."""
  ends = {
      (*np.shape(pair['left'])[:-1], *np.shape(pair['right'])[-1:])
      for pair in pairs
  }
  fitting = all(
      np.shape(pair['left'])[-1:] == np.shape(pair['right'])[-2:-1]
      and np.shape(pair['left'])[:-2] == np.shape(pair['right'])[:-2]
      for pair in pairs
  )
  if len(ends) > 1 or not fitting:
    shapes = [(np.shape(p['left']), np.shape(p['right'])) for p in pairs]
    raise ValueError(
        f'Expected factors (*batch, m, r) and (*batch, r, n) of {path}, the same m'
        f' and n in every link, got {shapes}.'
    )
  return ends.pop()[:-2]


def _stacked(
    entries: Sequence[tuple[np.ndarray, np.ndarray, float]],
    batch: tuple[int, ...],
) -> Thin:
  """Returns entries of ranks of their own as one, padded by zeros."""
  ranks = [left.shape[1] for left, _, _ in entries]
  (m, _), (_, n) = entries[0][0].shape, entries[0][1].shape
  left = np.zeros((len(entries), m, max(ranks)), np.float32)
  right = np.zeros((len(entries), max(ranks), n), np.float32)
  for i, (own_left, own_right, _) in enumerate(entries):
    left[i, :, : ranks[i]] = own_left
    right[i, : ranks[i]] = own_right
  shaped = lambda x: x.reshape((*batch, *x.shape[1:]))
  ranks, lost = np.array(ranks), np.array([lost for *_, lost in entries])
  return Thin(*map(shaped, (left, right, ranks, lost)))


def _view(m: Matrix, leaf: Any, place: tuple[int, ...]) -> jax.Array:
  """Returns one entry of a leaf as (m, n), float32 or wider, nothing else moved."""
  chosen = dict(zip(m.perm, place, strict=False))  # Batch axes come first.
  part = leaf[tuple(chosen.get(axis, slice(None)) for axis in range(leaf.ndim))]
  rest = m.perm[len(place) :]
  part = part.transpose([sorted(rest).index(axis) for axis in rest])
  # From the host: nothing of an SVD is sharded.
  part = jnp.asarray(jax.device_get(part.reshape(m.m, m.n)))
  return part.astype(matrices_lib.wide(m.dtype))


def _distance(change: jax.Array, left: np.ndarray, right: np.ndarray) -> float:
  exact = np.asarray(change)
  apart = float(np.linalg.norm(left @ right - exact))
  total = float(np.linalg.norm(exact))
  if total == 0:
    return 0.0 if apart == 0 else math.inf
  return apart / total


def _check_rest(
    base: Any, old: Sequence[Any], new: Sequence[Any], found: Sequence[Matrix]
) -> None:
  """Raises for a leaf that changed and is no matrix."""
  chosen = {m.index for m in found}
  for index, path in enumerate(matrices_lib.named_leaves(base)):
    if index not in chosen and not np.array_equal(
        np.asarray(old[index]), np.asarray(new[index])
    ):
      raise ValueError(
          f'Expected {path} to be the same in base and tuned, since it is no'
          ' selected matrix and no adapter would hold its change: select it, or'
          ' keep all weights with hf.save.'
      )
