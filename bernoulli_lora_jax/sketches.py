"""Random subspaces: raw factors, orthonormal frames, spectra of E[H].

Symbols: B in R^(dim x rank) is a raw random factor, Q an orthonormal basis of
range(B), H = Q Q^T = B (B^T B)^+ B^T the orthogonal projection onto it. H
depends on range(B) alone, so a frame is all that a chain needs.

A *basis* is how a sketch stores Q compactly: the dense (dim, rank) frame, or
for `coordinate` the integer indices (rank,) of the chosen rows, whose products
are a gather and a scatter. `compress` and `expand` multiply by either kind, at
JAX's matmul precision: on GPUs and TPUs float32 products are rounded like those
of the model (TF32, bfloat16) unless `jax_default_matmul_precision` says
'highest'. Frames are always orthonormalised in full precision.

Reference: Sokolov et al., Bernoulli-LoRA, arXiv 2508.03820 (H_A, H_B);
Ailon and Chazelle, The fast Johnson-Lindenstrauss transform (SRHT);
Fukaya et al., CholeskyQR2 (orthonormalisation); Madow, On the theory of
systematic sampling II, 1949 (weighted_coordinate).
"""

from collections.abc import Callable
import dataclasses
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import matrices

HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 256  # Rows whose products are summed at once.

Sampler = Callable[[jax.Array, int, int, Any], jax.Array]
Weights = Callable[[int], np.typing.ArrayLike] | float
Basis = jax.Array | None  # None: the whole space, Q = I, never stored.


def _isotropic(dim: int, rank: int) -> tuple[float, float]:
  return rank / dim, rank / dim


def _never(dim: int) -> bool:
  del dim
  return False


@dataclasses.dataclass(frozen=True)
class Sketch:
  """A law of random subspaces.

  Attributes:
    name: as in configs and tables.
    sampler: (key, dim, rank, dtype) -> (dim, rank), the raw factor.
    rows: (key, dim, rank) -> (rank,) int32, for sketches whose frame is a
      subset of the unit vectors; None otherwise.
    spectrum: (dim, rank) -> extreme eigenvalues of E[H].
    is_orthonormal: dim -> whether the raw factor is a frame already.
    is_full_rank: whether the raw factor has full rank with probability one and
      4 rank <= dim leaves Cholesky-QR no chance to break down.
  """

  name: str
  sampler: Sampler
  rows: Callable[[jax.Array, int, int], jax.Array] | None = None
  spectrum: Callable[[int, int], tuple[float, float]] = _isotropic
  is_orthonormal: Callable[[int], bool] = _never
  is_full_rank: bool = False

  def sample(
      self, key: jax.Array, dim: int, rank: int, dtype: Any = jnp.float32
  ) -> jax.Array:
    """Returns the raw factor.

    Args:
      key: typed PRNG key.
      dim: number of rows, >= 1.
      rank: number of columns, in [1, dim].
      dtype: floating-point dtype of the result.

    Returns:
      Array of shape (dim, rank).

    Raises:
      ValueError: rank outside [1, dim].
    """
    _check_rank(rank, dim)
    return self.sampler(key, dim, rank, dtype)

  def frame(
      self, key: jax.Array, dim: int, rank: int, dtype: Any = jnp.float32
  ) -> jax.Array:
    """Returns an orthonormal basis of range(sample(key, dim, rank)).

    Cholesky-QR twice when 4 rank <= dim, Householder QR above. Columns that
    depend on earlier ones are replaced by fresh Gaussian ones.

    Args:
      key: typed PRNG key.
      dim: number of rows, >= 1.
      rank: number of columns, in [1, dim].
      dtype: the result has promote_types(dtype, float32).

    Returns:
      Array of shape (dim, rank) with Q^T Q = I to 1e-5 in float32.

    Raises:
      ValueError: rank outside [1, dim].

    Guarantees:
      Q Q^T is an orthogonal projection of rank `rank`, never NaN.
      E[Q Q^T] has the eigenvalues `mean_eigenvalues` states.
    """
    dtype = matrices.wide(dtype)
    basis = self.bases(key[None], dim, rank, dtype)[0]
    if self.rows is not None:
      return _one_hot_columns(basis, dim, dtype)
    return basis

  def mean_eigenvalues(self, dim: int, rank: int) -> tuple[float, float]:
    """Returns the least and largest eigenvalue of E[H] for frames.

    (rank/dim, rank/dim) for the sketches of this file but weighted_coordinate:
    exact for gaussian, rademacher and coordinate (their laws are invariant
    under signed permutations of the rows, completions included) and for srht
    when dim is a power of two; for other dims srht is isotropic only in the
    limit of large dim. Raises ValueError for rank outside [1, dim].
    """
    _check_rank(rank, dim)
    return self.spectrum(dim, rank)

  def bases(
      self, keys: jax.Array, dim: int, rank: int, dtype: Any
  ) -> jax.Array:
    """Returns the bases of many keys at once.

    Args:
      keys: (b,) typed PRNG keys.
      dim: number of rows.
      rank: number of columns, in [1, dim].
      dtype: frames have promote_types(dtype, float32).

    Returns:
      (b, dim, rank) frames, or (b, rank) int32 indices for a sketch with
      `rows`. Entry i depends on keys[i] alone.
    """
    _check_rank(rank, dim)
    if self.rows is not None:
      return jax.vmap(lambda key: self.rows(key, dim, rank))(keys)
    dtype = matrices.wide(dtype)
    raw = jax.vmap(lambda key: self.sampler(key, dim, rank, dtype))(keys)
    if self.is_orthonormal(dim):
      return raw
    return orthonormalize(raw, None if self.is_full_rank else keys)

  def samples(
      self, keys: jax.Array, dim: int, rank: int, dtype: Any
  ) -> jax.Array:
    """Returns the raw factors of many keys at once, shape (b, dim, rank)."""
    _check_rank(rank, dim)
    return jax.vmap(lambda key: self.sampler(key, dim, rank, dtype))(keys)


def gaussian() -> Sketch:
  """Returns the sketch of independent N(0, 1) entries; its range is Haar."""
  return Sketch('gaussian', _gaussian, is_full_rank=True)


def rademacher() -> Sketch:
  """Returns the sketch of independent entries +-1, each with probability 1/2."""
  return Sketch('rademacher', _rademacher)


def coordinate() -> Sketch:
  """Returns the sketch of a uniform subset of rows, without replacement.

  H keeps `rank` rows of G (columns, on the right) and zeroes the others: no
  matrix product is needed.
  """
  return Sketch('coordinate', _coordinate, rows=_subset)


def weighted_coordinate(weights: Weights) -> Sketch:
  """Returns the sketch of a subset of rows, some likelier than others.

  Row i is among the `rank` chosen with probability min(1, c w_i), the c that
  makes these sum to rank: Madow's systematic sampling of the rows in random
  order, in integers. With equal weights it has the law of `coordinate`, to
  the rounding of probabilities (`inclusion_probabilities`).

  Args:
    weights: dim -> (dim,) positive weights, of any scale; or their ratio
      w_1 / w_dim > 0, geometric in between.

  Returns:
    A `Sketch`, with a name that `by_name` reads where weights is a ratio.

  Raises:
    TypeError: weights neither a function nor a number.
    ValueError: a ratio that is not positive and finite; where dim and rank are
      known, weights of another shape, not positive and finite, or so unequal
      that a probability rounds to zero.

  Guarantees:
    Always `rank` distinct rows.
    E[H] is diagonal with `inclusion_probabilities` on it, and `mean_eigenvalues`
      are their extremes, exactly.

  References:
    Madow, On the theory of systematic sampling, II, 1949.
  """
  name = 'weighted_coordinate'
  if not callable(weights):
    if isinstance(weights, bool) or not isinstance(weights, (int, float)):
      raise TypeError(
          f'Expected weights to be a function or a number, got {weights!r}.'
      )
    if not 0 < weights < np.inf:
      raise ValueError(
          f'Expected weights > 0 and finite, got weights={weights}.'
      )
    name = f'{name}:{weights!r}'

  return Sketch(
      name,
      _WeightedSample(weights),
      rows=_WeightedRows(weights),
      spectrum=_WeightedSpectrum(weights),
  )


def inclusion_probabilities(
    weights: Weights, dim: int, rank: int
) -> np.ndarray:
  """Returns the diagonal of E[H] of `weighted_coordinate`, in float64.

  min(1, c w_i) rounded up or down to a multiple of 1 / _unit(rank), which is
  less than rank 2^-29.

  Args:
    weights: see `weighted_coordinate`.
    dim: number of rows.
    rank: number of chosen rows, in [1, dim].

  Returns:
    (dim,) in (0, 1], of sum rank.

  Raises:
    ValueError: see `weighted_coordinate`; rank outside [1, dim].
  """
  _check_rank(rank, dim)
  return _shares(weights, dim, rank) / _unit(rank)


def srht() -> Sketch:
  """Returns the subsampled randomised Hadamard transform.

  Random signs times `rank` columns, drawn without replacement, of the Hadamard
  matrix of the next power of two, cut to `dim` rows and scaled by dim^(-1/2).
  For powers of two it is orthonormal as drawn.
  """
  return Sketch('srht', _srht, is_orthonormal=_is_power_of_two)


def by_name(name: str) -> Sketch:
  """Returns the sketch of this file with a name, as configs and files say it.

  Args:
    name: 'gaussian', 'rademacher', 'coordinate', 'srht' or
      'weighted_coordinate:RATIO'.

  Raises:
    ValueError: another name.
  """
  kind, _, ratio = name.partition(':')
  if kind == 'weighted_coordinate' and ratio:
    try:
      return weighted_coordinate(float(ratio))
    except ValueError as e:
      raise ValueError(
          'Expected sketch weighted_coordinate:RATIO with a ratio > 0, got'
          f' {name!r}.'
      ) from e
  known = {
      'gaussian': gaussian,
      'rademacher': rademacher,
      'coordinate': coordinate,
      'srht': srht,
  }
  if name not in known:
    raise ValueError(
        f"Expected sketch in {tuple(known)} or 'weighted_coordinate:RATIO', got"
        f' {name!r}.'
    )
  return known[name]()


def compress(basis: Basis, g: jax.Array, side: str) -> jax.Array:
  """Returns Q^T G (side 'left') or G Q (side 'right').

  Args:
    basis: (*batch, dim, rank) frame, (*batch, rank) indices, or None for Q = I.
    g: (*batch, m, n); dim is m on the left, n on the right.
    side: 'left' or 'right'.

  Returns:
    (*batch, rank, n) or (*batch, m, rank), in promote_types(g, basis).
  """
  if basis is None:
    return g
  if _is_rows(basis):
    return _take(g, basis, axis=0 if side == 'left' else 1)
  g = g.astype(jnp.promote_types(matrices.wide(g.dtype), basis.dtype))
  if side == 'left':
    return jnp.matmul(basis.mT, g)
  return jnp.matmul(g, basis)


def expand(basis: Basis, s: jax.Array, dim: int, side: str) -> jax.Array:
  """Returns Q S (side 'left') or S Q^T (side 'right'); see `compress`."""
  if basis is None:
    return s
  if not _is_rows(basis):
    if side == 'left':
      return jnp.matmul(basis, s)
    return jnp.matmul(s, basis.mT)
  # A scatter written as a gather through the inverse map, so that it fuses
  # with whatever is done to the result.
  rank = basis.shape[-1]
  place = lambda rows: (
      jnp.full((dim,), rank, jnp.int32)
      .at[rows]
      .set(jnp.arange(rank, dtype=jnp.int32))
  )
  places = jnp.vectorize(place, signature='(r)->(d)')(basis)
  axis = 0 if side == 'left' else 1
  chosen = (
      (places < rank)[..., :, None]
      if axis == 0
      else ((places < rank)[..., None, :])
  )
  spread = _take(s, jnp.minimum(places, rank - 1), axis)
  return jnp.where(chosen, spread, jnp.zeros((), s.dtype))


def is_frame(basis: Basis) -> TypeGuard[jax.Array]:
  """Returns whether a basis is a dense frame."""
  return basis is not None and not _is_rows(basis)


def _is_rows(basis: jax.Array) -> bool:
  return jnp.issubdtype(basis.dtype, jnp.integer)


def _take(x: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
  """Takes rows (axis 0) or columns (axis 1) of each matrix of a batch."""
  take = lambda x, rows: jnp.take(x, rows, axis=axis, mode='clip')
  for _ in range(rows.ndim - 1):
    take = jax.vmap(take)
  return take(x, rows)


def _check_rank(rank: int, dim: int) -> None:
  if not 1 <= rank <= dim:
    raise ValueError(f'Expected rank in [1, dim={dim}], got rank={rank}.')


def _gaussian(key, dim, rank, dtype):
  return jax.random.normal(key, (dim, rank), dtype)


def _rademacher(key, dim, rank, dtype):
  return jax.random.rademacher(key, (dim, rank), dtype)


def _subset(key, dim, rank):
  rows = jax.random.choice(key, dim, (rank,), replace=False)
  return rows.astype(jnp.int32)


def _one_hot_columns(rows, dim, dtype):
  return jax.nn.one_hot(rows, dim, dtype=dtype).T


def _coordinate(key, dim, rank, dtype):
  return _one_hot_columns(_subset(key, dim, rank), dim, dtype)


def _unit(rank: int) -> int:
  """Returns the integer that stands for probability 1: rank of them fit int32."""
  return 1 << (30 - (rank - 1).bit_length())


def _shares(weights: Weights, dim: int, rank: int) -> np.ndarray:
  """Returns the inclusion probabilities in units, (dim,) int64 of exact sum."""
  if callable(weights):
    w = np.asarray(weights(dim), np.float64)
  else:
    w = np.geomspace(weights, 1, dim)
  if w.shape != (dim,):
    raise ValueError(f'Expected weights of shape ({dim},), got {w.shape}.')
  if not (np.all(np.isfinite(w)) and np.all(w / np.abs(w).max() > 0)):
    raise ValueError(f'Expected weights > 0 and finite, got weights={w}.')
  unit = _unit(rank)
  # The k heaviest rows are certain, for the least k that leaves the others
  # probabilities of at most 1.
  order = np.argsort(-w, kind='stable')
  falling = w[order] / w.max()
  rest = np.cumsum(falling[::-1])[::-1]  # Sum of the weights from k on.
  k = int(np.argmax((rank - np.arange(dim)) * falling <= rest))
  exact = np.full(dim, float(unit))
  exact[k:] = (rank - k) * unit * falling[k:] / rest[k]
  # Sums are rounded, so each share is its floor or its ceiling.
  ends = np.round(np.cumsum(exact)).astype(np.int64)
  shares = np.diff(ends, prepend=0)
  assert ends[-1] == rank * unit
  if shares.min() < 1:
    raise ValueError(
        f'Expected weights of probabilities >= {1 / unit:.1e}, got'
        f' {exact.min() / unit:.1e} (dim={dim}, rank={rank}).'
    )
  result = np.empty_like(shares)
  result[order] = shares
  return result


def _systematic(key, shares, rank):
  """Returns (rank,) distinct int32 rows, row i with probability shares[i]/unit.

  The shares are laid end to end in random order and hit by `rank` points, one
  unit apart, behind a uniform start.
  """
  order_key, start_key = jax.random.split(key)
  unit = _unit(rank)
  order = jax.random.permutation(order_key, len(shares))
  ends = jnp.cumsum(jnp.asarray(shares, jnp.int32)[order], dtype=jnp.int32)
  start = jax.random.randint(start_key, (), 0, unit, jnp.int32)
  points = start + unit * jnp.arange(rank, dtype=jnp.int32)
  places = jnp.searchsorted(ends, points, side='right')
  return order[places].astype(jnp.int32)


def _is_power_of_two(dim: int) -> bool:
  return dim == _next_power_of_two(dim)


# The law of `weighted_coordinate` as values: equal weights, equal laws.


@dataclasses.dataclass(frozen=True)
class _WeightedRows:
  weights: Weights

  def __call__(self, key: jax.Array, dim: int, rank: int) -> jax.Array:
    return _systematic(key, _shares(self.weights, dim, rank), rank)


@dataclasses.dataclass(frozen=True)
class _WeightedSample:
  weights: Weights

  def __call__(
      self, key: jax.Array, dim: int, rank: int, dtype: Any
  ) -> jax.Array:
    rows = _WeightedRows(self.weights)(key, dim, rank)
    return _one_hot_columns(rows, dim, dtype)


@dataclasses.dataclass(frozen=True)
class _WeightedSpectrum:
  weights: Weights

  def __call__(self, dim: int, rank: int) -> tuple[float, float]:
    chances = inclusion_probabilities(self.weights, dim, rank)
    return float(chances.min()), float(chances.max())


def _next_power_of_two(dim: int) -> int:
  return 1 << (dim - 1).bit_length()


def _srht(key, dim, rank, dtype):
  sign_key, column_key = jax.random.split(key)
  signs = jax.random.rademacher(sign_key, (dim, 1), dtype)
  columns = _subset(column_key, _next_power_of_two(dim), rank)
  # Entry (i, j) of Hadamard's matrix is -1 to the number of common bits.
  common = jnp.arange(dim, dtype=jnp.int32)[:, None] & columns[None, :]
  parity = jax.lax.population_count(common) % 2
  return signs * (1 - 2 * parity).astype(dtype) / jnp.sqrt(dim).astype(dtype)


def orthonormalize(a: jax.Array, keys: jax.Array | None) -> jax.Array:
  """Returns frames of range(a), shape (b, dim, rank).

  On CPUs several batched calls of LAPACK at once wait for each other in the threads
  of jax's runtime, for ever where there are as many calls as threads (jax 0.10, two
  cores). So they are made one after another: here, and by `behind` wherever a
  program has several frames to make.

  Args:
    a: (b, dim, rank).
    keys: (b,) typed keys for the completion of rank-deficient entries; None
      when there are none.
  """
  _, dim, rank = a.shape
  if 4 * rank > dim:  # Cholesky-QR breaks down near square.
    return _householder_qr(a, keys)
  first, _ = _cholesky_qr(a)
  second, gram = _cholesky_qr(first)
  if keys is None:
    return second
  # The second pass reaches rounding when the first was within 0.1; NaN is not.
  is_good = jnp.all(jnp.abs(gram - _eyes(gram)) < 0.1, axis=(1, 2))
  return jax.lax.cond(
      jnp.all(is_good),
      lambda: second,
      lambda: jnp.where(
          is_good[:, None, None],
          second,
          _householder_qr(behind(a, second), keys),
      ),
  )


def behind(x: jax.Array, made: jax.Array) -> jax.Array:
  """Returns x, which a program cannot read before something else is made.

  Args:
    x: an array of floating point, or typed keys.
    made: an array; one that is not of floating point took no LAPACK.
  """
  if not (jnp.issubdtype(made.dtype, jnp.floating) and made.size):
    return x
  first = made.reshape(-1)[0]
  zero = jnp.where(jnp.isfinite(first), 0 * first, 0)  # No compiler drops it.
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = jax.random.key_data(x)
    impl = jax.random.key_impl(x)
    return jax.random.wrap_key_data(data + zero.astype(data.dtype), impl=impl)
  return x + zero.astype(x.dtype)


def _cholesky_qr(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns A R^-1 and the Gram matrix A^T A = R^T R."""
  gram = _gram(a)
  lower = jnp.linalg.cholesky(gram)
  inverse = jax.lax.linalg.triangular_solve(
      lower, _eyes(gram), left_side=True, lower=True
  )
  return jnp.matmul(a, inverse.mT, precision=HIGHEST), gram


def _gram(a: jax.Array) -> jax.Array:
  """Returns A^T A, summed by blocks of rows.

  Entries of one size, as random signs have them, round in one direction: a plain
  sum over 4096 rows may miss 1 by 1e-5 (seen on CPUs without AVX-512).
  """
  num, dim, rank = a.shape
  block = max(_BLOCK, rank)  # The blocks' products take no more than A does.
  if dim > block:
    padding = -dim % block
    a = jnp.pad(a, ((0, 0), (0, padding), (0, 0)))
    a = a.reshape(num, -1, block, rank)
    return jnp.sum(jnp.matmul(a.mT, a, precision=HIGHEST), axis=1)
  return jnp.matmul(a.mT, a, precision=HIGHEST)


def _eyes(gram: jax.Array) -> jax.Array:
  return jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)


def _householder_qr(a: jax.Array, keys: jax.Array | None) -> jax.Array:
  """Returns Q of A = Q R; deficient entries are completed at random."""
  q, r = jnp.linalg.qr(a)
  if keys is None:
    return q
  eps = a.shape[1] * jnp.finfo(a.dtype).eps
  residuals = jnp.abs(jnp.diagonal(r, axis1=1, axis2=2))
  norms = jnp.linalg.norm(a, axis=1)
  # Generous: `_complete` judges by singular values.
  is_good = jnp.all(residuals > 100 * eps * norms, axis=1)
  return jax.lax.cond(
      jnp.all(is_good),
      lambda: q,
      lambda: jnp.where(
          is_good[:, None, None], q, _complete(behind(a, q), keys)
      ),
  )


def _complete(a: jax.Array, keys: jax.Array) -> jax.Array:
  """Returns frames that contain range(A), the rest of them Gaussian."""
  _, dim, rank = a.shape
  u, s, _ = jnp.linalg.svd(a, full_matrices=False)  # Singular values fall.
  is_free = s > 10 * dim * jnp.finfo(a.dtype).eps * s[:, :1]
  draw = lambda key: _gaussian(jax.random.fold_in(key, 1), dim, rank, a.dtype)
  fresh = jax.vmap(draw)(keys)
  return jnp.linalg.qr(jnp.where(is_free[:, None, :], u, fresh))[0]
