"""Tests of random subspaces: exactness of frames and the laws of E[H]."""

import itertools

from absl.testing import parameterized
import chex
import few_threads
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bernoulli_lora_jax import chain
from bernoulli_lora_jax import sketches

SKETCHES = {
    'gaussian': sketches.gaussian(),
    'rademacher': sketches.rademacher(),
    'coordinate': sketches.coordinate(),
    'srht': sketches.srht(),
    'weighted_coordinate': sketches.weighted_coordinate(5.0),
}
NAMES = tuple(SKETCHES)
ISOTROPIC = NAMES[:4]


def draw(name, seed, num, dim, rank, dtype=jnp.float32):
  """Returns raw factors and frames, (num, dim, rank) in NumPy float64."""
  sketch = SKETCHES[name]
  keys = jax.random.split(jax.random.key(seed), num)

  @jax.jit
  def both(keys):
    sample = jax.vmap(lambda key: sketch.sample(key, dim, rank, dtype))
    return sample(keys), sketch.bases(keys, dim, rank, dtype)

  b, q = map(np.asarray, both(keys))
  if sketch.rows is not None:
    q = np.eye(dim)[q].swapaxes(1, 2)
  return b.astype(np.float64), q.astype(np.float64)


def orthonormality(q):
  """Returns the largest entry of |QᵀQ - I|; NaN where a frame has one."""
  return np.abs(q.swapaxes(-1, -2) @ q - np.eye(q.shape[-1])).max()


def outside(q, b):
  """Returns the part of each B outside of range(Q), relative, shape (num,)."""
  rest = b - q @ (q.swapaxes(-1, -2) @ b)
  return np.linalg.norm(rest, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))


def assert_mean(samples, expected, floor=1e-6):
  """Mean over axis 0 within 5 computed standard errors, entrywise.

  The floor is for entries that do not vary: float32 rounding of numbers of
  size one.
  """
  mean = samples.mean(0)
  error = samples.std(0, ddof=1) / np.sqrt(len(samples))
  excess = np.abs(mean - expected) - 5 * error
  np.testing.assert_array_less(excess, floor)


SHAPES = (
    (4096, 256),  # Cholesky-QR.
    (300, 76),  # 4 r > dim: Householder.
    (7, 7),
    (5, 1),
    (1, 1),
)
SHAPES_QUICK = [
    *((name, (300, 76)) for name in NAMES),
    ('gaussian', (4096, 256)),
    ('rademacher', (7, 7)),
    ('srht', (5, 1)),
    ('srht', (1, 1)),
]


class FrameTest(parameterized.TestCase):
  """Frames are exact, whatever the draw."""

  @parameterized.parameters(*SHAPES_QUICK)
  def test_orthonormal_in_float32(self, name, shape):
    self.check_orthonormal_in_float32(name, shape)

  @parameterized.parameters(
      *(
          case
          for case in itertools.product(NAMES, SHAPES)
          if case not in SHAPES_QUICK
      )
  )
  @pytest.mark.slow
  def test_orthonormal_in_float32_otherwise(self, name, shape):
    self.check_orthonormal_in_float32(name, shape)

  def check_orthonormal_in_float32(self, name, shape):
    dim, rank = shape
    frame = jax.jit(lambda key: SKETCHES[name].frame(key, dim, rank))
    q = frame(jax.random.key(dim))
    chex.assert_shape(q, shape)
    chex.assert_type(q, jnp.float32)
    self.assertLess(orthonormality(np.asarray(q, np.float64)), 1e-5)

  @parameterized.product(name=NAMES, shape=[(200, 40), (30, 20)])
  def test_orthonormal_in_float64(self, name, shape):
    with jax.enable_x64(True):
      dim, rank = shape
      frame = jax.jit(
          lambda key: SKETCHES[name].frame(key, dim, rank, jnp.float64)
      )
      q = frame(jax.random.key(dim))
      chex.assert_type(q, jnp.float64)
      # dim * eps is 4e-14; float32 anywhere on the way leaves 1e-8 at best.
      self.assertLess(orthonormality(np.asarray(q)), 1e-13)

  @parameterized.parameters(*NAMES)
  def test_frames_are_float32_or_better(self, name):
    frame = lambda dtype: jax.eval_shape(
        lambda key: SKETCHES[name].frame(key, 8, 2, dtype), jax.random.key(0)
    )
    self.assertEqual(frame(jnp.bfloat16).dtype, jnp.float32)
    self.assertEqual(frame(jnp.float16).dtype, jnp.float32)

  @parameterized.parameters(('gaussian', 4), ('rademacher', 16))
  def test_ten_thousand_square_draws_without_nan(self, name, dim):
    self.check_ten_thousand_square_draws_without_nan(name, dim)

  @parameterized.parameters(('rademacher', 4), ('gaussian', 64))
  @pytest.mark.slow
  def test_ten_thousand_square_draws_without_nan_otherwise(self, name, dim):
    self.check_ten_thousand_square_draws_without_nan(name, dim)

  def check_ten_thousand_square_draws_without_nan(self, name, dim):
    sketch = SKETCHES[name]

    @jax.jit
    def worst(keys):
      q = sketch.bases(keys, dim, dim, jnp.float32)
      return jnp.max(jnp.abs(q.mT @ q - jnp.eye(dim)[None]))

    keys = jax.random.split(jax.random.key(1), 10_000)
    self.assertLess(worst(keys), 1e-5)  # Not so when one is NaN.

  @parameterized.parameters(
      *((name, (40, 8)) for name in NAMES), ('gaussian', (37, 30))
  )
  def test_range_of_the_sample_is_kept(self, name, shape):
    self.check_range_of_the_sample_is_kept(name, shape)

  @parameterized.parameters(
      *((name, (37, 30)) for name in NAMES if name != 'gaussian')
  )
  @pytest.mark.slow
  def test_range_of_the_sample_is_kept_otherwise(self, name, shape):
    self.check_range_of_the_sample_is_kept(name, shape)

  def check_range_of_the_sample_is_kept(self, name, shape):
    b, q = draw(name, 2, 64, *shape)
    # Float32 rounding times the condition number of b, at most some hundreds.
    self.assertLess(outside(q, b).max(), 1e-4)

  @parameterized.parameters((8, 2), (4, 3))
  def test_dependent_rademacher_draws_are_completed(self, dim, rank):
    self.check_dependent_rademacher_draws_are_completed(dim, rank)

  @parameterized.parameters((2, 2), (8, 5))
  @pytest.mark.slow
  def test_dependent_rademacher_draws_are_completed_otherwise(self, dim, rank):
    self.check_dependent_rademacher_draws_are_completed(dim, rank)

  def check_dependent_rademacher_draws_are_completed(self, dim, rank):
    num = 20_000
    b, q = draw('rademacher', 3, num, dim, rank)
    dependent = np.linalg.det(b.swapaxes(1, 2) @ b) < 0.5  # An integer.
    # Two columns are parallel with probability 2^(1 - dim): some must be here.
    self.assertGreater(dependent.sum(), 100)
    self.assertLess(orthonormality(q), 1e-5)
    # Completion adds to range(B) and takes nothing away.
    self.assertLess(outside(q, b).max(), 1e-4)

  @parameterized.parameters((12, 3))
  def test_any_dependent_factor_is_completed(self, dim, rank):
    self.check_any_dependent_factor_is_completed(dim, rank)

  @parameterized.parameters((6, 5), (4, 4))
  @pytest.mark.slow
  def test_any_dependent_factor_is_completed_otherwise(self, dim, rank):
    self.check_any_dependent_factor_is_completed(dim, rank)

  def check_any_dependent_factor_is_completed(self, dim, rank):
    ones = lambda key, dim, rank, dtype: jnp.ones((dim, rank), dtype)
    nothing = lambda key, dim, rank, dtype: jnp.zeros((dim, rank), dtype)
    for sampler in (ones, nothing):
      sketch = sketches.Sketch('constant', sampler)
      frame = jax.jit(lambda key, s=sketch: s.frame(key, dim, rank))
      first, second = frame(jax.random.key(0)), frame(jax.random.key(1))
      self.assertLess(orthonormality(np.asarray(first, np.float64)), 1e-5)
      # The completion is random.
      self.assertGreater(np.abs(first - second).max(), 1e-2)

  @parameterized.parameters(1e-2, 1e-5)
  def test_badly_conditioned_factors_are_orthonormalised(self, least):
    self.check_badly_conditioned_factors_are_orthonormalised(least)

  @parameterized.parameters(1e-1, 1e-3)
  @pytest.mark.slow
  def test_badly_conditioned_factors_are_orthonormalised_otherwise(self, least):
    self.check_badly_conditioned_factors_are_orthonormalised(least)

  def check_badly_conditioned_factors_are_orthonormalised(self, least):
    # Cholesky-QR squares the condition: one pass leaves 1e-3 at 1e-2, and two
    # do not suffice at 1e-5.
    def sampler(key, dim, rank, dtype):
      left, right = jax.random.split(key)
      scales = jnp.geomspace(1.0, least, rank, dtype=dtype)
      mixed = jax.random.orthogonal(right, rank, dtype=dtype)
      return jax.random.normal(left, (dim, rank), dtype) * scales[None] @ mixed

    sketch = sketches.Sketch('skewed', sampler)
    keys = jax.random.split(jax.random.key(7), 20)
    q = jax.jit(lambda keys: sketch.bases(keys, 60, 10, jnp.float32))(keys)
    self.assertLess(orthonormality(np.asarray(q, np.float64)), 1e-5)

  @parameterized.parameters(
      ('gaussian', (8, 2)), ('srht', (8, 2)), ('rademacher', (6, 4))
  )
  def test_entry_depends_on_its_key_alone(self, name, shape):
    self.check_entry_depends_on_its_key_alone(name, shape)

  @parameterized.parameters(
      *((name, (8, 2)) for name in NAMES if name not in ('gaussian', 'srht'))
  )
  @pytest.mark.slow
  def test_entry_depends_on_its_key_alone_otherwise(self, name, shape):
    self.check_entry_depends_on_its_key_alone(name, shape)

  def check_entry_depends_on_its_key_alone(self, name, shape):
    sketch = SKETCHES[name]
    bases = jax.jit(lambda keys: sketch.bases(keys, *shape, jnp.float32))
    keys = jax.random.split(jax.random.key(4), 400)
    others = jax.random.split(jax.random.key(5), 400)  # Some dependent.
    mixed = jnp.where(jnp.arange(400) < 200, keys, others)
    chex.assert_trees_all_equal(bases(keys)[:200], bases(mixed)[:200])
    # A batch of one may be compiled to another order of sums: rounding.
    one = jax.jit(lambda key: sketch.bases(key[None], *shape, jnp.float32)[0])
    for i in (0, 7, 399):
      chex.assert_trees_all_close(bases(keys)[i], one(keys[i]), atol=1e-5)

  @parameterized.parameters(*NAMES)
  def test_frame_is_the_basis_of_its_key(self, name):
    sketch, key = SKETCHES[name], jax.random.key(6)
    q = np.asarray(jax.jit(lambda key: sketch.frame(key, 9, 3))(key))
    (basis,) = np.asarray(
        jax.jit(lambda key: sketch.bases(key[None], 9, 3, jnp.float32))(key)
    )
    if sketch.rows is not None:
      basis = np.eye(9)[basis].T
    np.testing.assert_allclose(q, basis, atol=1e-6)


class LawTest(parameterized.TestCase):
  """The laws of raw factors and projections."""

  @parameterized.parameters(
      ('gaussian', (8, 2)), ('rademacher', (3, 2)), ('coordinate', (8, 2))
  )
  def test_mean_projection_is_isotropic(self, name, shape):
    self.check_mean_projection_is_isotropic(name, shape)

  @parameterized.parameters(
      ('gaussian', (3, 2)), ('rademacher', (8, 2)), ('coordinate', (3, 2))
  )
  @pytest.mark.slow
  def test_mean_projection_is_isotropic_otherwise(self, name, shape):
    self.check_mean_projection_is_isotropic(name, shape)

  def check_mean_projection_is_isotropic(self, name, shape):
    dim, rank = shape
    _, q = draw(name, 10, 20_000, dim, rank)
    assert_mean(q @ q.swapaxes(1, 2), rank / dim * np.eye(dim))

  @parameterized.parameters((8, 2), (4, 3))
  def test_mean_projection_is_isotropic_for_srht_of_powers_of_two(
      self, dim, rank
  ):
    _, q = draw('srht', 11, 20_000, dim, rank)
    assert_mean(q @ q.swapaxes(1, 2), rank / dim * np.eye(dim))

  @parameterized.parameters((4, 3))
  def test_completions_are_isotropic(self, dim, rank):
    self.check_completions_are_isotropic(dim, rank)

  @parameterized.parameters((3, 2))
  @pytest.mark.slow
  def test_completions_are_isotropic_otherwise(self, dim, rank):
    self.check_completions_are_isotropic(dim, rank)

  def check_completions_are_isotropic(self, dim, rank):
    # Conditioned on a dependent draw the law is invariant still.
    b, q = draw('rademacher', 12, 100_000, dim, rank)
    q = q[np.linalg.det(b.swapaxes(1, 2) @ b) < 0.5]  # An integer.
    self.assertGreater(len(q), 1000)
    assert_mean(q @ q.swapaxes(1, 2), rank / dim * np.eye(dim))

  @parameterized.parameters((6, 1), (5, 3))
  def test_range_of_gaussian_is_haar(self, dim, rank):
    # H_ii of a Haar subspace follows Beta(rank / 2, (dim - rank) / 2).
    _, q = draw('gaussian', 13, 20_000, dim, rank)
    diagonal = np.sum(q**2, axis=2)
    second = rank * (rank + 2) / (dim * (dim + 2))
    assert_mean(diagonal**2, np.full(dim, second))

  def test_coordinate_rows_are_a_uniform_subset(self):
    sketch = SKETCHES['coordinate']
    keys = jax.random.split(jax.random.key(14), 20_000)
    rows = np.asarray(
        jax.jit(lambda keys: sketch.bases(keys, 5, 2, jnp.float32))(keys)
    )
    chex.assert_shape(rows, (20_000, 2))
    self.assertEqual(rows.dtype, np.int32)
    self.assertTrue(np.all(rows[:, 0] != rows[:, 1]))
    self.assertTrue(np.all((rows >= 0) & (rows < 5)))
    chosen = np.eye(5)[rows].sum(1)
    assert_mean(chosen, np.full(5, 2 / 5))
    pairs = chosen[:, :, None] * chosen[:, None, :]  # P(both) = 1 / 10.
    assert_mean(pairs, np.where(np.eye(5, dtype=bool), 2 / 5, 1 / 10))

  def test_coordinate_with_all_rows_is_a_permutation(self):
    sketch = SKETCHES['coordinate']
    keys = jax.random.split(jax.random.key(15), 50)
    rows = jax.jit(lambda keys: sketch.bases(keys, 9, 9, jnp.float32))(keys)
    np.testing.assert_array_equal(
        np.sort(rows, axis=1), np.broadcast_to(np.arange(9), (50, 9))
    )

  def test_raw_gaussian_entries_are_standard(self):
    b, _ = draw('gaussian', 16, 20_000, 3, 2)
    assert_mean(b, np.zeros((3, 2)))
    assert_mean(b**2, np.ones((3, 2)))

  def test_raw_rademacher_entries_are_fair_signs(self):
    b, _ = draw('rademacher', 17, 20_000, 3, 2)
    np.testing.assert_array_equal(np.abs(b), 1)
    assert_mean(b, np.zeros((3, 2)))
    assert_mean(b[:, :, 0] * b[:, :, 1], np.zeros(3))

  @parameterized.parameters((8, 5), (6, 3))
  def test_raw_srht_is_signs_times_hadamard_columns(self, dim, rank):
    b = draw('srht', 18, 30, dim, rank)[0] * np.sqrt(dim)
    np.testing.assert_allclose(np.abs(b), 1, atol=1e-6)
    hadamard = np.array([[1]])
    for _ in range(3):
      hadamard = np.kron([[1, 1], [1, -1]], hadamard)
    for columns in b:
      # The ratio of two columns has no signs: it is a column, and not of ones.
      ratios = (columns[:, :1] * columns[:, 1:]).round()
      for ratio in ratios.T:
        agree = np.all(hadamard[:dim].T == ratio, axis=1)
        self.assertEqual(agree.sum(), 1)
        self.assertFalse(agree[0])

  def test_srht_draws_columns_uniformly_and_signs_fairly(self):
    b = draw('srht', 19, 20_000, 4, 2)[0] * 2
    assert_mean(b, np.zeros((4, 2)))
    ratio = b[:, :, 0] * b[:, :, 1]  # One of three columns, each 1/3.
    assert_mean(ratio, np.array([1, -1 / 3, -1 / 3, -1 / 3]))

  @parameterized.product(name=ISOTROPIC, shape=[(8, 2), (8, 8), (4096, 16)])
  def test_mean_eigenvalues(self, name, shape):
    dim, rank = shape
    least, largest = SKETCHES[name].mean_eigenvalues(dim, rank)
    self.assertEqual(least, rank / dim)
    self.assertEqual(largest, rank / dim)

  @parameterized.parameters(*NAMES)
  def test_draws_differ_by_key(self, name):
    _, frames = draw(name, 20, 2, 64, 8)
    self.assertGreater(np.abs(frames[0] - frames[1]).max(), 0.1)


UNSORTED = np.array([1.0, 30.0, 2.0, 9.0, 2.0])
WEIGHTS = {
    'ratio': (6.0, 7, 3),
    'rising': (0.25, 6, 2),
    'unsorted': (lambda dim: UNSORTED[:dim], 5, 2),  # One row is certain.
    'almost_all': (lambda dim: UNSORTED[:dim], 5, 4),
    'one': (lambda dim: UNSORTED[:dim], 5, 1),
}


class WeightedCoordinateTest(parameterized.TestCase):
  """Subsets of exactly `rank` rows with given inclusion probabilities."""

  @parameterized.parameters('ratio', 'unsorted', 'almost_all')
  def test_mean_projection_is_the_diagonal_of_probabilities(self, name):
    self.check_mean_projection_is_the_diagonal_of_probabilities(name)

  @parameterized.parameters('rising', 'one')
  @pytest.mark.slow
  def test_mean_projection_is_the_diagonal_of_probabilities_otherwise(
      self, name
  ):
    self.check_mean_projection_is_the_diagonal_of_probabilities(name)

  def check_mean_projection_is_the_diagonal_of_probabilities(self, name):
    weights, dim, rank = WEIGHTS[name]
    sketch = sketches.weighted_coordinate(weights)
    keys = jax.random.split(jax.random.key(30), 20_000)
    rows = np.asarray(
        jax.jit(lambda keys: sketch.bases(keys, dim, rank, jnp.float32))(keys)
    )
    self.assertEqual(rows.dtype, np.int32)
    chosen = np.eye(dim)[rows].sum(1)
    # Distinct and in range, always.
    np.testing.assert_array_equal(chosen.sum(1), rank)
    self.assertLessEqual(chosen.max(), 1)
    expected = sketches.inclusion_probabilities(weights, dim, rank)
    assert_mean(chosen, expected)
    frame = jax.jit(lambda key: sketch.frame(key, dim, rank))(keys[0])
    np.testing.assert_array_equal(np.asarray(frame), np.eye(dim)[:, rows[0]])
    least, largest = sketch.mean_eigenvalues(dim, rank)
    self.assertEqual((least, largest), (expected.min(), expected.max()))

  @parameterized.parameters(
      ([8, 1, 1], 2, [1, 0.5, 0.5]),
      ([1, 100, 1, 10], 2, [1 / 12, 1, 1 / 12, 10 / 12]),
      ([3, 1, 2], 1, [1 / 2, 1 / 6, 1 / 3]),
      ([5, 5, 1, 1], 3, [1, 1, 0.5, 0.5]),
      ([1, 2, 3], 3, [1, 1, 1]),
      ([7, 7, 7, 7, 7], 2, [0.4] * 5),
      ([2e300, 1e300], 1, [2 / 3, 1 / 3]),
  )
  def test_inclusion_probabilities(self, weights, rank, expected):
    dim = len(weights)
    found = sketches.inclusion_probabilities(
        lambda dim: np.asarray(weights), dim, rank
    )
    # Multiples of less than rank 2^-29.
    np.testing.assert_allclose(found, expected, rtol=0, atol=rank * 2**-29)
    self.assertEqual(found.sum(), rank)  # Dyadic: exact.
    self.assertLessEqual(found.max(), 1)

  def test_a_ratio_is_of_the_first_to_the_last_row(self):
    found = sketches.inclusion_probabilities(16.0, 5, 1)
    np.testing.assert_allclose(
        found, np.array([16, 8, 4, 2, 1]) / 31, rtol=0, atol=2**-29
    )

  def test_probabilities_keep_their_sum_whatever_the_weights(self):
    rng = np.random.default_rng(0)
    for _ in range(200):
      dim = int(rng.integers(1, 40))
      rank = int(rng.integers(1, dim + 1))
      w = np.exp(rng.normal(scale=rng.choice([0, 1, 3]), size=dim))
      found = sketches.inclusion_probabilities(lambda dim, w=w: w, dim, rank)
      self.assertEqual(found.sum(), rank)
      self.assertGreater(found.min(), 0)
      self.assertLessEqual(found.max(), 1)
      free = found < 1 - 1e-6
      ratios = (found / w)[free]  # min(1, c w): one c where it is not 1.
      if free.any():
        np.testing.assert_allclose(ratios, ratios.mean(), rtol=1e-3)
        self.assertTrue(np.all(w[~free] * ratios.mean() > 1 - 1e-3))

  def test_equal_weights_have_the_law_of_coordinate(self):
    sketch = sketches.weighted_coordinate(1.0)
    keys = jax.random.split(jax.random.key(31), 20_000)
    rows = np.asarray(
        jax.jit(lambda keys: sketch.bases(keys, 5, 2, jnp.float32))(keys)
    )
    chosen = np.eye(5)[rows].sum(1)
    pairs = chosen[:, :, None] * chosen[:, None, :]
    assert_mean(pairs, np.where(np.eye(5, dtype=bool), 2 / 5, 1 / 10))
    np.testing.assert_allclose(
        sketch.mean_eigenvalues(5, 2), (0.4, 0.4), rtol=1e-8
    )

  @parameterized.parameters((300, 256, 1000.0), (64, 64, 3.0), (1, 1, 2.0))
  def test_rows_are_distinct_at_high_ranks(self, dim, rank, ratio):
    sketch = sketches.weighted_coordinate(ratio)
    keys = jax.random.split(jax.random.key(32), 300)
    rows = jax.jit(lambda keys: sketch.bases(keys, dim, rank, jnp.float32))(
        keys
    )
    rows = np.sort(np.asarray(rows), axis=1)
    self.assertTrue(np.all(np.diff(rows, axis=1) > 0))
    self.assertTrue(rows.min() >= 0 and rows.max() < dim)

  def test_draws_do_not_depend_on_the_float_dtype(self):
    sketch = sketches.weighted_coordinate(9.0)
    keys = jax.random.split(jax.random.key(33), 50)
    bases = jax.jit(sketch.bases, static_argnums=(1, 2, 3))
    rows = np.asarray(bases(keys, 20, 4, jnp.float32))
    with jax.enable_x64(True):
      again = np.asarray(bases(keys, 20, 4, jnp.float64))
    self.assertEqual(again.dtype, np.int32)
    np.testing.assert_array_equal(rows, again)

  @parameterized.parameters([0.3])
  def test_mean_step_of_a_chain(self, prob):
    self.check_mean_step_of_a_chain(prob)

  @parameterized.parameters(1.0, 0.0)
  @pytest.mark.slow
  def test_mean_step_of_a_chain_otherwise(self, prob):
    self.check_mean_step_of_a_chain(prob)

  def check_mean_step_of_a_chain(self, prob):
    m, n, rank = 5, 4, 2
    sketch = sketches.weighted_coordinate(4.0)
    g = np.random.default_rng(1).normal(size=(m, n)).astype(np.float32)
    keys = jax.random.split(jax.random.key(34), 20_000)
    step = lambda key: chain.project(
        jnp.asarray(g), key, rank=rank, prob=prob, sketch=sketch
    )
    steps = np.asarray(jax.jit(jax.vmap(step))(keys), np.float64)
    left = sketches.inclusion_probabilities(4.0, m, rank)[:, None]
    right = sketches.inclusion_probabilities(4.0, n, rank)[None]
    assert_mean(steps, (prob * left + (1 - prob) * right) * g)

  def test_names_of_ratios_are_read_back(self):
    for ratio in (4, 0.125, 3.7):
      sketch = sketches.weighted_coordinate(ratio)
      again = sketches.by_name(sketch.name)
      self.assertEqual(again.name.partition(':')[0], 'weighted_coordinate')
      self.assertEqual(
          again.mean_eigenvalues(9, 2), sketch.mean_eigenvalues(9, 2)
      )

  @parameterized.parameters(
      (0.0, ValueError, r'Expected weights > 0 and finite, got weights=0.0'),
      (-2.0, ValueError, r'weights=-2.0'),
      (np.inf, ValueError, r'weights=inf'),
      (np.nan, ValueError, r'weights=nan'),
      ('4', TypeError, r"Expected weights to be a function or a number.*'4'"),
      (True, TypeError, r'got True'),
  )
  def test_rejects_ratios(self, weights, error, message):
    with self.assertRaisesRegex(error, message):
      sketches.weighted_coordinate(weights)

  @parameterized.parameters(
      ([1.0, 2.0], r'Expected weights of shape \(3,\), got \(2,\)'),
      ([[1.0, 2.0, 3.0]], r'got \(1, 3\)'),
      ([1.0, 0.0, 2.0], r'Expected weights > 0 and finite'),
      ([1.0, np.nan, 2.0], r'Expected weights > 0 and finite'),
      ([1.0, np.inf, 2.0], r'Expected weights > 0 and finite'),
      ([1.0, 1e-12, 2.0], r'Expected weights of probabilities >= .*rank=2'),
  )
  def test_rejects_weights(self, weights, message):
    sketch = sketches.weighted_coordinate(lambda dim: np.asarray(weights))
    keys = jax.random.split(jax.random.key(0), 1)
    with self.assertRaisesRegex(ValueError, message):
      sketch.bases(keys, 3, 2, jnp.float32)
    with self.assertRaisesRegex(ValueError, message):
      sketch.mean_eigenvalues(3, 2)

  @parameterized.parameters(
      'weighted_coordinate:x',
      'weighted_coordinate:-1',
      'weighted_coordinate',
      'gauss',
  )
  def test_rejects_names(self, name):
    with self.assertRaisesRegex(ValueError, f"Expected sketch.*'{name}'"):
      sketches.by_name(name)

  def test_rejects_ranks(self):
    with self.assertRaisesRegex(ValueError, r'rank in \[1, dim=4\].*rank=5'):
      sketches.inclusion_probabilities(2.0, 4, 5)


class RejectsTest(parameterized.TestCase):

  @parameterized.product(name=NAMES, rank=(0, -1, 5))
  def test_rank_outside_of_the_dimension(self, name, rank):
    sketch, key = SKETCHES[name], jax.random.key(0)
    message = rf'Expected rank in \[1, dim=4\], got rank={rank}'
    with self.assertRaisesRegex(ValueError, message):
      sketch.sample(key, 4, rank)
    with self.assertRaisesRegex(ValueError, message):
      sketch.frame(key, 4, rank)
    with self.assertRaisesRegex(ValueError, message):
      sketch.bases(key[None], 4, rank, jnp.float32)
    with self.assertRaisesRegex(ValueError, message):
      sketch.mean_eigenvalues(4, rank)


class ProductTest(parameterized.TestCase):
  """compress and expand against dense products in NumPy."""

  @parameterized.parameters(
      *itertools.product(
          ('frame', 'rows', 'whole'), ('left', 'right'), ((2, 3),)
      )
  )
  def test_products(self, kind, side, batch):
    self.check_products(kind, side, batch)

  @parameterized.parameters(
      *itertools.product(
          ('frame', 'rows', 'whole'), ('left', 'right'), ((), (3,))
      )
  )
  @pytest.mark.slow
  def test_products_otherwise(self, kind, side, batch):
    self.check_products(kind, side, batch)

  def check_products(self, kind, side, batch):
    m, n, rank = 6, 9, 3
    dim = m if side == 'left' else n
    rng = np.random.default_rng(0)
    g = rng.normal(size=(*batch, m, n)).astype(np.float32)
    if kind == 'whole':
      basis, dense, rank = None, np.eye(dim), dim
    elif kind == 'rows':
      basis = np.stack(
          [
              rng.permutation(dim)[:rank]
              for _ in range(np.prod(batch, dtype=int))
          ]
      )
      basis = basis.reshape(*batch, rank).astype(np.int32)
      dense = np.eye(dim)[basis].swapaxes(-1, -2)
      basis = jnp.asarray(basis)
    else:
      dense = rng.normal(size=(*batch, dim, rank)).astype(np.float32)
      basis = jnp.asarray(dense)
    s = rng.normal(
        size=(*batch, rank, n) if side == 'left' else (*batch, m, rank)
    ).astype(np.float32)

    transposed = dense.swapaxes(-1, -2)
    if side == 'left':
      compressed, expanded = transposed @ g, dense @ s
    else:
      compressed, expanded = g @ dense, s @ transposed
    # Sums of at most 9 float32 products of size one.
    chex.assert_trees_all_close(
        sketches.compress(basis, jnp.asarray(g), side),
        compressed.astype(np.float32),
        rtol=1e-5,
        atol=1e-5,
    )
    chex.assert_trees_all_close(
        sketches.expand(basis, jnp.asarray(s), dim, side),
        expanded.astype(np.float32),
        rtol=1e-5,
        atol=1e-5,
    )

  def test_frames_multiply_low_precision_in_their_own(self):
    g = jnp.ones((4, 6), jnp.bfloat16)
    left = sketches.compress(jnp.ones((4, 2)), g, 'left')
    right = sketches.compress(jnp.ones((6, 2)), g, 'right')
    chex.assert_type([left, right], jnp.float32)

  def test_rows_that_are_not_chosen_are_zero_even_beside_infinity(self):
    rows = jnp.array([2, 0], jnp.int32)
    s = jnp.array([[jnp.inf, 1.0], [2.0, jnp.nan]])
    expected = jnp.array([[2.0, jnp.nan], [0, 0], [jnp.inf, 1.0], [0, 0]])
    np.testing.assert_array_equal(sketches.expand(rows, s, 4, 'left'), expected)


class ValuesTest(parameterized.TestCase):
  """Sketches are values: equal policies share their compiled programs."""

  @parameterized.parameters(
      'gaussian', 'rademacher', 'coordinate', 'srht', 'weighted_coordinate:3.0'
  )
  def test_equal_laws_are_equal(self, name):
    one, two = sketches.by_name(name), sketches.by_name(name)
    self.assertEqual(one, two)
    self.assertEqual(hash(one), hash(two))
    self.assertNotEqual(one, sketches.weighted_coordinate(2.0))
    step = jax.jit(lambda x, sketch: x, static_argnums=1)
    for sketch in (one, two):
      step(1.0, sketch)
    self.assertEqual(step._cache_size(), 1)


class FewThreadsTest(parameterized.TestCase):
  """Factorisations of one program follow each other."""

  @parameterized.parameters(1, 2, 3)
  @pytest.mark.slow
  def test_many_chains_on_few_threads(self, threads):
    self.assertEqual(few_threads.run(threads, 60, 2000, timeout=300), 60)

  def test_order_changes_no_draw(self):
    tree = {'a': jnp.ones((300, 290)), 'b': jnp.ones((280, 270))}
    tx = chain.scale_by_bernoulli_chain(jax.random.key(0), rank=65, prob=1.0)
    state = tx.init(tree)
    apart = [
        chain.scale_by_bernoulli_chain(
            jax.random.key(0), rank=65, prob=1.0
        ).update({name: leaf}, state)[0][name]
        for name, leaf in tree.items()
    ]
    together = tx.update(tree, state)[0]
    chex.assert_trees_all_close(
        [together['a'], together['b']], apart, atol=1e-5
    )
