"""Tests of how merges are rounded: their law, their errors, what they lose."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import matrices
from bernoulli_lora_jax import rounding

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float8_e5m2)
KEYS = 4096

# Many small merges: bfloat16 weights +-1.5 stay within [1, 2), where numbers
# are an ulp apart, so a stochastic merge is one coin with P(up) = update / ulp.
MERGES = 1000
ULP = 2.0**-7
START = 1.5
UPDATE = float(np.float32(0.97 * ULP / 32))  # Far below half an ulp.


def numbers(dtype):
  """Returns all finite numbers of a dtype of 8 or 16 bits, in NumPy float64."""
  bits = {1: np.uint8, 2: np.uint16}[np.dtype(dtype).itemsize]
  every = np.arange(np.iinfo(bits).max + 1).astype(bits).view(dtype)
  with np.errstate(invalid='ignore'):  # NaNs, dropped below.
    every = every.astype(np.float64)
  return np.unique(every[np.isfinite(every)])


def between(dtype, seed, size):
  """Returns float32 numbers of all magnitudes with their two neighbours.

  Half of the neighbours are any two of the dtype (of both signs, subnormal
  ones too), half are in [-4, 4], where weights are.
  """
  rng = np.random.default_rng(seed)
  every = numbers(dtype)
  if dtype == jnp.bfloat16:
    # Parts of the smallest gaps are subnormal in float32, zero to XLA on the
    # CPU: below 2^-95 or so draws are coarser, below 2^-118 they are nearest.
    every = every[np.abs(every) > 2.0**-95]
  central = np.flatnonzero(np.abs(every) < 4)
  place = np.concatenate(
      [
          rng.integers(0, len(every) - 1, size // 2),
          rng.choice(central, size - size // 2),
      ]
  )
  below, above = every[place], every[place + 1]
  share = rng.uniform(size=size)
  x = (below + share * (above - below)).astype(np.float32)
  inside = (below < x) & (x < above)
  return x[inside], below[inside], above[inside]


def half_ulp(x, dtype):
  """Returns half the spacing of a dtype's numbers at x, in NumPy float64."""
  info = jnp.finfo(dtype)
  exponent = np.floor(np.log2(np.maximum(np.abs(x), float(info.tiny))))
  return 2.0**exponent * float(info.eps) / 2


class StochasticTest(parameterized.TestCase):
  """Guarantees of `rounding.stochastic`."""

  @parameterized.parameters(*DTYPES)
  def test_mean_and_neighbours(self, dtype):
    x, below, above = between(dtype, 0, 96)
    keys = jax.random.split(jax.random.key(1), KEYS)
    draw = lambda key: rounding.stochastic(jnp.asarray(x), key, dtype)
    out = jax.jit(jax.vmap(draw))(keys)
    self.assertEqual(out.dtype, dtype)
    out = np.asarray(out, np.float64)
    is_above = out == above
    self.assertTrue(np.all(is_above | (out == below)))
    prob = (x.astype(np.float64) - below) / (above - below)
    # 5 standard errors, and the grid of the uniform draws.
    error = 5 * np.sqrt(prob * (1 - prob) / KEYS) + 2.0**-23
    np.testing.assert_array_less(np.abs(is_above.mean(0) - prob), error)
    self.assertGreater(min((x > 0).mean(), (x < 0).mean()), 0.2)

  @parameterized.parameters(
      (jnp.bfloat16, 1.0, 2.0**-8),  # Below a power of two the gap is halved.
      (jnp.bfloat16, 2.0**-60, 2.0**-68),
      (jnp.float16, -1.0, 2.0**-11),
      (jnp.float16, 2.0**-24, 2.0**-24),  # The smallest subnormal, and zero.
      (jnp.float16, -(2.0**-20), 2.0**-24),  # Two subnormals.
      (jnp.float16, 2.0**-14, 2.0**-24),  # Normal and subnormal.
  )
  def test_mean_where_the_gap_changes(self, dtype, number, gap):
    x = jnp.float32(number - np.sign(number) * 0.3 * gap)
    keys = jax.random.split(jax.random.key(2), KEYS)
    out = jax.vmap(lambda key: rounding.stochastic(x, key, dtype))(keys)
    out = np.asarray(out, np.float64)
    towards_zero = number - np.sign(number) * gap
    self.assertEqual(set(np.unique(out)), {number, towards_zero})
    share = np.mean(out == towards_zero)
    error = 5 * np.sqrt(0.3 * 0.7 / KEYS)
    self.assertAlmostEqual(share, 0.3, delta=error)

  def test_mean_from_float64_to_float32(self):
    with jax.enable_x64(True):
      x = jnp.float64(1 + 0.3 * 2.0**-23)
      keys = jax.random.split(jax.random.key(3), KEYS)
      out = jax.vmap(lambda k: rounding.stochastic(x, k, jnp.float32))(keys)
    self.assertEqual(out.dtype, jnp.float32)
    share = np.mean(np.asarray(out, np.float64) == 1 + 2.0**-23)
    self.assertAlmostEqual(share, 0.3, delta=5 * np.sqrt(0.3 * 0.7 / KEYS))
    self.assertLen(np.unique(out), 2)

  @parameterized.parameters(*DTYPES)
  def test_numbers_of_the_dtype_are_returned_as_they_are(self, dtype):
    x = numbers(dtype)
    out = rounding.stochastic(jnp.float32(x), jax.random.key(4), dtype)
    np.testing.assert_array_equal(np.asarray(out, np.float64), x)

  @parameterized.parameters(*DTYPES)
  def test_beyond_the_range_as_nearest(self, dtype):
    top = float(jnp.finfo(dtype).max)
    gap = top - numbers(dtype)[-2]
    ends = [top + 0.3 * gap, top + 0.7 * gap, 3.4e38, np.inf]
    x = jnp.float32([*ends, *(-end for end in ends), np.nan])
    keys = jax.random.split(jax.random.key(5), 64)
    out = jax.vmap(lambda key: rounding.stochastic(x, key, dtype))(keys)
    expected = np.broadcast_to(np.asarray(x.astype(dtype)), out.shape)
    np.testing.assert_array_equal(
        np.float32(np.asarray(out)), np.float32(expected)
    )
    # Not all of them are infinite: what rounds to the largest number is kept.
    self.assertEqual(float(out[0, 0]), top)
    self.assertTrue(np.isposinf(np.float32(out[0, 3])))

  def test_mean_and_neighbours_without_infinities(self):
    dtype = jnp.float8_e4m3fn
    x, below, above = between(dtype, 6, 96)
    keys = jax.random.split(jax.random.key(7), KEYS)
    draw = lambda key: rounding.stochastic(jnp.asarray(x), key, dtype)
    out = np.asarray(jax.jit(jax.vmap(draw))(keys), np.float64)
    is_above = out == above
    self.assertTrue(np.all(is_above | (out == below)))
    prob = (x.astype(np.float64) - below) / (above - below)
    error = 5 * np.sqrt(prob * (1 - prob) / KEYS) + 2.0**-23
    np.testing.assert_array_less(np.abs(is_above.mean(0) - prob), error)

  def test_one_key_one_draw(self):
    x, *_ = between(jnp.bfloat16, 8, 256)
    draw = lambda key: rounding.stochastic(jnp.asarray(x), key, jnp.bfloat16)
    one, two = jax.random.key(9), jax.random.key(10)
    first = np.asarray(draw(one), np.float32)
    np.testing.assert_array_equal(first, np.float32(draw(one)))
    np.testing.assert_array_equal(first, np.float32(jax.jit(draw)(one)))
    self.assertGreater(np.mean(first != np.float32(draw(two))), 0.1)

  def test_entries_draw_on_their_own(self):
    x = jnp.full((KEYS,), 1 + 0.3 * ULP, jnp.float32)
    out = rounding.stochastic(x, jax.random.key(11), jnp.bfloat16)
    share = np.mean(np.float32(out) == 1 + ULP)
    self.assertAlmostEqual(share, 0.3, delta=5 * np.sqrt(0.3 * 0.7 / KEYS))


class AddTest(parameterized.TestCase):
  """One merge."""

  def operands(self, dtype, seed, scale=1.0):
    """Returns weights, updates and remainders of 2 x (16, 32), and keys."""
    rng = np.random.default_rng(seed)
    shape = (2, 16, 32)
    weight = jnp.asarray(scale * rng.normal(size=shape), dtype)
    update = jnp.asarray(0.1 * scale * rng.normal(size=shape), jnp.float32)
    rest = half_ulp(np.asarray(weight, np.float64), dtype)
    rest = jnp.asarray(rest * rng.uniform(-1, 1, size=shape), dtype)
    return weight, update, rest, jax.random.split(jax.random.key(seed), 2)

  @parameterized.parameters(*DTYPES, jnp.float8_e4m3fn)
  def test_nearest_is_one_rounding_of_the_sum(self, dtype):
    weight, update, _, keys = self.operands(dtype, 0)
    out, rest = rounding.add(weight, update, None, keys, 'nearest')
    self.assertIsNone(rest)
    self.assertEqual(out.dtype, dtype)
    total = np.float32(weight) + np.asarray(update)
    every = numbers(dtype)
    place = np.searchsorted(every, total)
    down, up = every[place - 1], every[place]
    middle = (down + up) / 2
    self.assertFalse(np.any(total == middle))  # Ties have a test of their own.
    expected = np.where(total < middle, down, up)
    np.testing.assert_array_equal(np.asarray(out, np.float64), expected)

  @parameterized.parameters(*DTYPES, jnp.float8_e4m3fn)
  def test_nearest_breaks_ties_to_even(self, dtype):
    eps = float(jnp.finfo(dtype).eps)
    weight = jnp.asarray([[1, 1 + eps, -1, -1 - eps]], dtype)
    update = jnp.asarray([[eps, eps, -eps, eps]], jnp.float32) / 2
    key = jax.random.key(0)
    out, _ = rounding.add(weight, update, None, key, 'nearest')
    expected = [[1, 1 + 2 * eps, -1, -1]]
    np.testing.assert_array_equal(np.asarray(out, np.float64), expected)

  @parameterized.product(
      dtype=(*DTYPES, jnp.float8_e4m3fn), scale=(1.0, 2.0**-5)
  )
  def test_compensated_keeps_what_was_cut_off(self, dtype, scale):
    weight, update, old, keys = self.operands(dtype, 1, scale)
    out, rest = rounding.add(weight, update, old, keys, 'compensated')
    self.assertEqual((out.dtype, rest.dtype), (dtype, dtype))
    wide = lambda x: np.asarray(x, np.float64)
    exact = wide(weight) + wide(update) + wide(old)
    # Two float32 sums before the rounding, whose own rounding is not kept.
    sums = 2 * 2.0**-24 * 2 * np.max(np.abs(exact))
    # The remainder is rounded too: to eps / 2 of its size, which is half an
    # ulp at most, or to half its smallest subnormal number.
    half = half_ulp(exact, dtype)
    info = jnp.finfo(dtype)
    rounded = np.maximum(
        half * float(info.eps) / 2, float(info.smallest_subnormal) / 2
    )
    error = np.abs(wide(out) + wide(rest) - exact)
    np.testing.assert_array_less(error, rounded + sums)
    np.testing.assert_array_less(np.abs(wide(out) - exact), 1.01 * half + sums)
    # Without the remainder the error is of the size of the half ulp.
    self.assertGreater(np.max(np.abs(wide(out) - exact) / half), 0.9)

  def test_compensated_adds_the_old_remainder(self):
    weight = jnp.ones((1, 1), jnp.bfloat16)
    update = jnp.full((1, 1), 0.3 * ULP, jnp.float32)
    old = jnp.full((1, 1), 0.3 * ULP, jnp.bfloat16)
    key = jax.random.key(0)
    out, rest = rounding.add(weight, update, old, key, 'compensated')
    self.assertEqual(float(out[0, 0]), 1 + ULP)
    # 0.3 of an ulp in bfloat16, whose numbers there are 2^-10 ulp apart.
    self.assertAlmostEqual(float(rest[0, 0]) / ULP, -0.4, delta=2.0**-9)

  @parameterized.parameters('stochastic', 'compensated')
  def test_float32_weights_are_the_same_under_all(self, mode):
    weight, update, _, keys = self.operands(jnp.float32, 2)
    zero = jnp.zeros_like(weight)
    expected, _ = rounding.add(weight, update, None, keys, 'nearest')
    out, rest = rounding.add(weight, update, zero, keys, mode)
    np.testing.assert_array_equal(out, expected)
    if mode == 'compensated':
      np.testing.assert_array_equal(rest, zero)

  def test_float64_weights_are_summed_in_float64(self):
    with jax.enable_x64(True):
      weight = jnp.ones((2, 2), jnp.float64)
      update = jnp.full((2, 2), 2.0**-50, jnp.float64)
      for mode in rounding.MODES:
        zero = jnp.zeros_like(weight)
        key = jax.random.key(0)
        out, _ = rounding.add(weight, update, zero, key, mode)
        np.testing.assert_array_equal(out, 1 + 2.0**-50)

  @parameterized.parameters(*rounding.MODES)
  def test_entries_of_a_stack_as_one_by_one(self, mode):
    weight, update, rest, keys = self.operands(jnp.bfloat16, 3)
    rest = rest if mode == 'compensated' else None
    pick = lambda x, i: None if x is None else x[i]
    stack = rounding.add(weight, update, rest, keys, mode)
    for i in range(2):
      alone = rounding.add(weight[i], update[i], pick(rest, i), keys[i], mode)
      for part, whole in zip(alone, stack, strict=True):
        if part is not None:
          np.testing.assert_array_equal(np.float32(part), np.float32(whole[i]))

  def test_stochastic_entries_of_a_stack_differ(self):
    weight = jnp.ones((4, 32, 32), jnp.bfloat16)
    update = jnp.full(weight.shape, ULP / 2, jnp.float32)
    keys = jax.random.split(jax.random.key(12), 4)
    out, rest = rounding.add(weight, update, None, keys, 'stochastic')
    self.assertIsNone(rest)
    up = np.float32(out).reshape(4, -1) > 1
    error = 5 * np.sqrt(0.25 / up.shape[1])  # Of the mean of fair coins.
    for i in range(4):
      for j in range(i):
        self.assertAlmostEqual(np.mean(up[i] == up[j]), 0.5, delta=error)


def signed_operands(shape=(4, 64)):
  """Returns weights +-1.5 and updates of both signs, all four combinations."""
  signs = np.random.default_rng(13).choice([-1.0, 1.0], size=(2, *shape))
  return (
      jnp.asarray(START * signs[0], jnp.bfloat16),
      jnp.asarray(UPDATE * signs[1], jnp.float32),
  )


def arrived(before, after, update):
  """Returns the change along the update, in ulps, in NumPy float64."""
  change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
  return change * np.sign(np.asarray(update)) / ULP


class ManyMergesTest(parameterized.TestCase):
  """1,000 updates of 0.03 ulp: lost under nearest, kept under the others."""

  def assert_lost(self, counts):
    np.testing.assert_array_equal(counts, 0)

  def assert_random_walk(self, counts):
    """Each count is a binomial number with P(up) = update / ulp."""
    np.testing.assert_array_equal(counts, np.round(counts))
    prob = UPDATE / ULP
    variance = MERGES * prob * (1 - prob)
    error = 5 * np.sqrt(variance / counts.size)
    self.assertLess(error, 0.06 * MERGES * prob)  # The bound says something.
    self.assertAlmostEqual(counts.mean(), MERGES * prob, delta=error)
    # Merges with one and the same draw would make it MERGES times as large.
    spread = 5 * np.sqrt(2 / (counts.size - 1))
    self.assertAlmostEqual(counts.var(ddof=1) / variance, 1, delta=spread)

  def assert_compensated(self, counts):
    """The errors of single merges and the part that is still a remainder."""
    # A merge rounds its remainder, half an ulp at most, to 2^-8 of its size,
    # and two float32 sums below 2 = 2^8 ulp to 2^-24.
    error = MERGES * (2.0**-9 + 2 * 2.0**-16)
    self.assertLess(error, 0.08 * MERGES * UPDATE / ULP)
    np.testing.assert_allclose(
        counts, MERGES * UPDATE / ULP, rtol=0, atol=error + 0.5
    )

  @parameterized.parameters(*rounding.MODES)
  def test_added_one_by_one(self, mode):
    weight, update = signed_operands()
    rest = jnp.zeros_like(weight) if mode == 'compensated' else None

    def merge(carry, key):
      return rounding.add(*carry[:1], update, carry[1], key, mode), None

    keys = jax.random.split(jax.random.key(14), MERGES)
    (after, rest), _ = jax.jit(lambda c: jax.lax.scan(merge, c, keys))(
        (weight, rest)
    )
    counts = arrived(weight, after, update)
    if mode == 'nearest':
      self.assert_lost(counts)
    elif mode == 'stochastic':
      self.assert_random_walk(counts)
    else:
      self.assert_compensated(counts)
      # With the remainder the last half ulp is there too.
      counts += arrived(0, rest, update)
      error = MERGES * (2.0**-9 + 2 * 2.0**-16)
      np.testing.assert_allclose(
          counts, MERGES * UPDATE / ULP, rtol=0, atol=error
      )

  @parameterized.parameters('stochastic', 'compensated')
  def test_merged_by_a_chain(self, mode):
    self.check_merged_by_a_chain(mode)

  @parameterized.parameters(['nearest'])
  @pytest.mark.slow
  def test_merged_by_a_chain_otherwise(self, mode):
    self.check_merged_by_a_chain(mode)

  def check_merged_by_a_chain(self, mode):
    # rank = m freezes L = I, and the gradient of a linear loss is constant: a
    # step of SGD makes the product the update itself, and a period of one
    # merges it. A plain matrix and a stack of two.
    weight, update = signed_operands((2, 4, 32))
    slope = jnp.sign(-update)
    params = {'stack': weight, 'w': weight[0]}
    batch = {'stack': slope, 'w': slope[0]}
    selection = matrices.Matrices(rules=(matrices.stacked('stack'),))

    def linear(params, slopes):
      terms = jax.tree.map(lambda w, c: jnp.sum(w * c), params, slopes)
      return sum(jax.tree.leaves(terms)).astype(jnp.float32), None

    policy = adapters.ChainPolicy.rac(4, period=1, side='left', rounding=mode)
    chain = adapters.make_chain(policy, optax.sgd(UPDATE), selection)
    loss = inject.by_addition(linear, selection)

    @jax.jit
    def run(state):
      step = lambda s, _: (chain.step(s, loss, batch)[0], None)
      state, _ = jax.lax.scan(step, state, length=MERGES)
      return state, chain.params(state)  # The last link is merged here.

    state, tuned = run(chain.init(jax.random.key(15), params))
    self.assertEqual(int(state.count), MERGES)
    counts = np.concatenate(
        [
            arrived(params[name], tuned[name], -batch[name]).ravel()
            for name in params
        ]
    )
    if mode == 'nearest':
      self.assert_lost(counts)
    elif mode == 'stochastic':
      self.assert_random_walk(counts)
    else:
      self.assert_compensated(counts)
      merged = chain.merge(state)
      for name, rest in merged.remainders.items():
        total = arrived(params[name], tuned[name], -batch[name])
        total += arrived(0, rest, -batch[name])
        error = MERGES * (2.0**-9 + 2 * 2.0**-16)
        np.testing.assert_allclose(
            total, MERGES * UPDATE / ULP, rtol=0, atol=error
        )


class ChainTest(parameterized.TestCase):
  """What a chain of adapters does with the modes."""

  def merged(self, params, selection, mode='stochastic', count=1, seed=16):
    """Returns the weights after a merge of half an ulp into ones."""
    policy = adapters.ChainPolicy.rac(8, period=4, side='left', rounding=mode)
    chain = adapters.make_chain(policy, optax.sgd(1.0), selection)
    state = chain.init(jax.random.key(seed), params)
    halves = {
        path: {**pair, 'right': jnp.full_like(pair['right'], ULP / 2)}
        for path, pair in state.factors.items()
    }
    state = state._replace(factors=halves, count=jnp.int32(count))
    return jax.tree.map(np.float32, jax.jit(chain.params)(state))

  def test_draws_differ_over_entries_matrices_and_merges(self):
    ones = lambda *shape: jnp.ones(shape, jnp.bfloat16)
    params = {'a': ones(8, 128), 'b': ones(8, 128), 'stack': ones(3, 8, 128)}
    selection = matrices.Matrices(rules=(matrices.stacked('stack'),))
    first = self.merged(params, selection)
    later = self.merged(params, selection, count=2)
    other = self.merged(params, selection, seed=17)
    draws = [first['a'], first['b'], *first['stack'], later['a'], other['a']]
    error = 5 * np.sqrt(0.25 / 1024)  # Of the mean of 1024 fair coins.
    for i, one in enumerate(draws):
      self.assertEqual(set(np.unique(one)), {1, np.float32(1 + ULP)})
      for two in draws[:i]:
        self.assertAlmostEqual(np.mean(one == two), 0.5, delta=error)

  def test_one_key_one_draw(self):
    params = {'a': jnp.ones((8, 128), jnp.bfloat16)}
    first, again = (self.merged(params, None) for _ in range(2))
    np.testing.assert_array_equal(first['a'], again['a'])

  def test_stacked_and_unrolled_layers_draw_the_same(self):
    ones = jnp.ones((3, 8, 128), jnp.bfloat16)
    stacked = self.merged(
        {'layers': {'w': ones}},
        matrices.Matrices(rules=(matrices.stacked('layers/w'),)),
    )
    unrolled = self.merged(
        {f'layers_{i}': {'w': ones[i]} for i in range(3)}, None
    )
    for i in range(3):
      np.testing.assert_array_equal(
          stacked['layers']['w'][i], unrolled[f'layers_{i}']['w']
      )

  def test_float32_weights_are_the_same_under_all(self):
    rng = np.random.default_rng(18)
    params = {'w': jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    loss = inject.by_addition(lambda p, x: (jnp.sum(jnp.sin(p['w'] * x)), None))

    def run(mode):
      policy = adapters.ChainPolicy.bernoulli(2, period=2, rounding=mode)
      chain = adapters.make_chain(policy, optax.sgd(0.1))

      @jax.jit
      def steps(state):
        step = lambda s, _: (chain.step(s, loss, jnp.float32(2))[0], None)
        return chain.params(jax.lax.scan(step, state, length=7)[0])

      return steps(chain.init(jax.random.key(19), params))

    expected = run('nearest')['w']
    for mode in ('stochastic', 'compensated'):
      np.testing.assert_array_equal(run(mode)['w'], expected)
    self.assertGreater(np.max(np.abs(expected - params['w'])), 0.1)

  def test_remainders_are_kept_under_compensated_alone(self):
    params = {'w': jnp.ones((4, 6), jnp.bfloat16)}
    for mode in rounding.MODES:
      policy = adapters.ChainPolicy.rac(2, period=1, side='left', rounding=mode)
      chain = adapters.make_chain(policy, optax.sgd(1.0))
      remainders = chain.init(jax.random.key(20), params).remainders
      if mode == 'compensated':
        self.assertEqual(remainders['w'].dtype, jnp.bfloat16)
        np.testing.assert_array_equal(np.float32(remainders['w']), 0)
      else:
        self.assertEqual(remainders, {})


class BeyondTheRangeTest(parameterized.TestCase):

  @parameterized.product(
      mode=rounding.MODES,
      dtype=('float8_e4m3fn', 'float8_e5m2', 'float16', 'bfloat16'),
  )
  def test_is_never_nan(self, mode, dtype):
    largest = float(jnp.finfo(dtype).max)
    weight = jnp.asarray([[largest, -largest, 1.0]], dtype)
    update = jnp.asarray([[largest, -largest, 1.0]], jnp.float32)
    rest = jnp.zeros_like(weight) if mode == 'compensated' else None
    for _ in range(2):
      weight, rest = rounding.add(weight, update, rest, jax.random.key(0), mode)
      self.assertFalse(np.isnan(np.float32(weight)).any())
    found = np.float32(weight)[0]
    end = largest if dtype == 'float8_e4m3fn' else np.inf
    # The largest number of bfloat16 and itself do not fit float32 either.
    np.testing.assert_array_equal(found, [end, -end, 3.0])
