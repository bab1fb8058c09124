"""Tests of recipes: what is written down rebuilds the run's last bit."""

import collections
import dataclasses
import json
import os
import pathlib
import stat
import tempfile
from unittest import mock
import warnings
import zipfile

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import policies
from bernoulli_lora_jax import recipes

SKETCHES = {
    'gaussian': bl.sketches.gaussian(),
    'rademacher': bl.sketches.rademacher(),
    'coordinate': bl.sketches.coordinate(),
}
SMALL = {'a': (6, 9), 'bias': (9,)}
SHAPES = {'b': (9, 6), **SMALL}
STACKED = {'layers': (3, 6, 9), **SHAPES}
STACK = bl.Matrices(rules=(bl.matrices.stacked('^layers$'),))
CHUNK = 2  # Steps of one compiled scan; links end between scans.


def make_base(shapes, dtype='float32'):
  rng = np.random.default_rng(0)
  return {
      path: jnp.asarray(rng.normal(size=shape), dtype)
      for path, shape in shapes.items()
  }


def record(policy, base, num_steps, matrices=None, key=None, init=jax.jit):
  """Runs a chain by a jitted scan; returns its recipe and final weights."""
  key = jax.random.key(3) if key is None else key
  chain = adapters.make_chain(policy, optax.sgd(0.02, momentum=0.9), matrices)
  target = make_base({path: leaf.shape for path, leaf in base.items()})

  def loss(params, batch):
    rest = jax.tree.map(
        lambda w, t: w.astype(jnp.float32) - t - batch, params, target
    )
    return 0.5 * optax.tree.norm(rest, squared=True), {}

  loss = inject.by_addition(loss, matrices)

  @jax.jit
  def scan(state, batches):
    step = lambda state, batch: (chain.step(state, loss, batch)[0], None)
    return jax.lax.scan(step, state, batches)[0]

  state, links = init(chain.init)(key, base), []
  batches = np.random.default_rng(1).normal(size=num_steps).astype(np.float32)
  for step in range(CHUNK, num_steps + 1, CHUNK):
    state = scan(state, batches[step - CHUNK : step])
    is_end = policy.period is not None and step % policy.period == 0
    if is_end or step == num_steps:
      links.append(recipes.trained_factors(state, chain))
  recipe = recipes.make_recipe(base, chain, key, links, state)
  return recipe, jax.jit(chain.params)(state)


def replay_strictly(base, recipe):
  """Replays with the warning of another checksum turned into an error."""
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    return recipes.replay(base, recipe)


def make_recipe(policy, base, num_links, matrices=None):
  """Returns a recipe with random factors, of a chain that never ran."""
  rng = np.random.default_rng(2)
  chain = adapters.make_chain(policy, optax.identity(), matrices)
  key = jax.random.key(0)
  state = jax.eval_shape(chain.init, key, base)
  draw = lambda: {
      f'{side}:{one.matrix.path}': rng.normal(
          size=state.factors[one.matrix.path][side].shape
      ).astype(np.float32)
      for one in chain.adapted(base)
      for side in one.trained
  }
  num_steps = num_links * (policy.period or 1)
  links = tuple(draw() for _ in range(num_links))
  return recipes.Recipe(
      recipes.checksum(base), '', policy, matrices, key, num_steps, links
  )


def policy_of(side, **fields):
  """Returns the policy of a side, without the fields that it does not have."""
  unused = policies.ignored(side)
  used = {name: x for name, x in fields.items() if name not in unused}
  return bl.ChainPolicy(side=side, **used)


class TemporaryTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
        self.enter_context(tempfile.TemporaryDirectory())
    )

  def through_disk(self, recipe, sketch=None):
    recipes.save_recipe(self.directory, recipe)
    return recipes.load_recipe(self.directory, sketch)


class ReplayTest(TemporaryTest):
  """A replay equals the run bit for bit, from memory and from disk."""

  def check(self, policy, base, num_steps, **kwargs):
    recipe, final = record(policy, base, num_steps, **kwargs)
    loaded = self.through_disk(recipe)
    replayed = replay_strictly(base, loaded)
    chex.assert_trees_all_equal_shapes_and_dtypes(replayed, base)
    chex.assert_trees_all_equal(replayed, final)
    self.assertEqual(recipes.checksum(replayed), recipe.final)
    self.assertEqual(loaded.final, recipe.final)
    for path in base:  # The run did something.
      if path != 'bias':
        self.assertTrue(np.any(final[path] != base[path]))
    return recipe, final

  # Every side, dtype and rounding; six steps of links of four end in an
  # unfinished one.
  @parameterized.parameters(
      ('bernoulli', 'bfloat16', 'stochastic', 'gaussian', 2),
      ('left', 'bfloat16', 'stochastic', 'rademacher', 4),
      (None, 'float32', 'nearest', 'gaussian', 4),
  )
  def test_side_dtype_rounding_and_sketch(
      self, side, dtype, rounding, sketch, period
  ):
    self.check_side_dtype_rounding_and_sketch(
        side, dtype, rounding, sketch, period
    )

  @parameterized.parameters(
      ('right', 'float32', 'compensated', 'gaussian', 2),
      ('bernoulli', 'float32', 'nearest', 'gaussian', 4),
      ('bernoulli', 'bfloat16', 'compensated', 'coordinate', 4),
      ('right', 'bfloat16', 'nearest', 'coordinate', 4),
      (None, 'bfloat16', 'compensated', 'gaussian', 2),
  )
  @pytest.mark.slow
  def test_side_dtype_rounding_and_sketch_otherwise(
      self, side, dtype, rounding, sketch, period
  ):
    self.check_side_dtype_rounding_and_sketch(
        side, dtype, rounding, sketch, period
    )

  def check_side_dtype_rounding_and_sketch(
      self, side, dtype, rounding, sketch, period
  ):
    policy = policy_of(
        side,
        rank=2,
        period=period,
        alpha=3.0,
        rounding=rounding,
        sketch=SKETCHES[sketch],
    )
    base = make_base(SMALL, dtype)
    recipe, _ = self.check(policy, base, num_steps=6)
    self.assertLen(recipe.links, {2: 3, 4: 2}[period])
    self.assertEqual(recipe.num_steps, 6)

  @pytest.mark.slow
  def test_targets_and_rules(self):
    policy = adapters.ChainPolicy.bernoulli(
        2,
        4,
        prob=0.4,
        warmup=1,
        shared_coin=True,
        reset_optimizer=False,
        targets=(
            bl.Target('layers', alpha=4.0),
            bl.Target('^a$', rank=7, prob=1.0),  # Clipped on the left.
        ),
    )
    base = make_base(STACKED, 'bfloat16')
    recipe, final = record(policy, base, 6, STACK)
    self.assertEqual(recipe.matrices, STACK)
    replayed = replay_strictly(base, self.through_disk(recipe))
    chex.assert_trees_all_equal(replayed, final)
    is_moved = {path: bool(np.any(final[path] != base[path])) for path in base}
    expected = {'layers': True, 'a': True, 'b': False, 'bias': False}
    self.assertEqual(is_moved, expected)
    names = {'left:layers', 'right:layers', 'right:a'}
    self.assertEqual(set(recipe.links[0]), names)

  @parameterized.parameters(['left'])
  def test_without_a_period(self, side):
    self.check_without_a_period(side)

  @parameterized.parameters([None])
  @pytest.mark.slow
  def test_without_a_period_otherwise(self, side):
    self.check_without_a_period(side)

  def check_without_a_period(self, side):
    policy = policy_of(side, rank=2, period=None, sketch=SKETCHES['coordinate'])
    recipe, _ = self.check(policy, make_base(SMALL), num_steps=4)
    self.assertLen(recipe.links, 1)

  @parameterized.parameters(['bernoulli'])
  def test_without_resampling(self, side):
    self.check_without_resampling(side)

  @parameterized.parameters([None])
  @pytest.mark.slow
  def test_without_resampling_otherwise(self, side):
    self.check_without_resampling(side)

  def check_without_resampling(self, side):
    policy = policy_of(
        side,
        rank=2,
        period=2,
        resample=False,
        sketch=SKETCHES['coordinate'],
    )
    recipe, _ = self.check(policy, make_base(SMALL), num_steps=4)
    self.assertLen(recipe.links, 2)

  def test_keys_of_another_kind(self):
    key = jax.random.key(5, impl='rbg')
    policy = adapters.ChainPolicy.bernoulli(2, 2, sketch=SKETCHES['coordinate'])
    self.check(policy, make_base(SMALL), num_steps=4, key=key)

  def test_a_chain_that_began_eagerly(self):
    policy = adapters.ChainPolicy.bernoulli(4, 2)
    base = make_base({'a': (40, 40), 'b': (40, 40)})
    self.check(policy, base, num_steps=2, init=lambda init: init)

  def test_prob_given_as_an_array(self):
    policy = adapters.ChainPolicy.bernoulli(
        2, 2, prob=jnp.float32(0.3), sketch=SKETCHES['coordinate']
    )
    self.check(policy, make_base(SMALL), num_steps=4)

  def test_prob_given_as_an_array_that_is_one(self):
    # With a coin both factors have the rank of the longer side.
    policy = adapters.ChainPolicy.bernoulli(
        8, 2, prob=jnp.float32(1.0), sketch=SKETCHES['coordinate']
    )
    self.check(policy, make_base(SMALL), num_steps=2)

  @pytest.mark.slow
  def test_each_part_of_a_recipe_counts(self):
    base = make_base(SMALL, 'bfloat16')
    policy = adapters.ChainPolicy.bernoulli(
        2, 2, rounding='stochastic', sketch=SKETCHES['coordinate']
    )
    recipe, final = record(policy, base, 4)
    replace = lambda **kwargs: recipe._replace(
        policy=dataclasses.replace(policy, **kwargs)
    )
    others = (
        replace(rounding='nearest'),
        replace(alpha=3.0),
        recipe._replace(key=jax.random.key(4)),
        recipe._replace(links=recipe.links[::-1]),
    )
    for other in others:
      with self.assertWarnsRegex(UserWarning, 'Replayed weights of checksum'):
        replayed = recipes.replay(base, other)
      self.assertTrue(np.any(replayed['a'] != final['a']))

  def test_merges_are_those_of_the_links(self):
    # In NumPy: W + sum of s L R, the frozen factor as drawn.
    base = make_base(STACKED)
    policy = adapters.ChainPolicy.rac(2, 3, 'left', alpha=3.0)
    recipe = make_recipe(policy, base, 3, STACK)
    chain = adapters.make_chain(policy, optax.identity(), STACK)
    found = chain.adapted(base)
    draw = jax.jit(
        lambda link: adapters.draw_link(recipe.key, link, found, policy).factors
    )
    drawn = [draw(link) for link in range(3)]
    replayed = recipes.replay(base, recipe)
    for path in ('layers', 'a', 'b'):
      expected = np.asarray(base[path], np.float64)
      for link, factors in zip(recipe.links, drawn, strict=True):
        left = np.asarray(factors[path]['left'], np.float64)
        expected = expected + 1.5 * left @ link[f'right:{path}']
      # Three float32 roundings of numbers below 16.
      np.testing.assert_allclose(replayed[path], expected, atol=1e-5)
    np.testing.assert_array_equal(replayed['bias'], base['bias'])


class TrainedFactorsTest(parameterized.TestCase):

  def state(self, side):
    policy = policy_of(side, rank=2, period=2, sketch=SKETCHES['coordinate'])
    chain = adapters.make_chain(policy, optax.sgd(0.1), STACK)
    state = jax.jit(chain.init)(jax.random.key(4), make_base(STACKED))
    ones = jax.tree.map(jnp.ones_like, state.factors)
    return chain, state._replace(factors=ones)

  def test_the_unchosen_side_is_zero(self):
    chain, state = self.state('bernoulli')
    link = recipes.trained_factors(state, chain)
    self.assertLen(link, 6)
    coins = {path: np.asarray(coin) for path, coin in state.coins.items()}
    flat = np.concatenate([coin.ravel() for coin in coins.values()])
    self.assertLen(np.unique(flat), 2)
    for path, coin in coins.items():
      for entry in np.ndindex(*coin.shape):
        left, right = link[f'left:{path}'][entry], link[f'right:{path}'][entry]
        np.testing.assert_array_equal(left, 0.0 if coin[entry] else 1.0)
        np.testing.assert_array_equal(right, 1.0 if coin[entry] else 0.0)

  @parameterized.parameters((None, ('left', 'right')))
  def test_known_sides(self, side, trained):
    self.check_known_sides(side, trained)

  @parameterized.parameters(('left', ('right',)), ('right', ('left',)))
  @pytest.mark.slow
  def test_known_sides_otherwise(self, side, trained):
    self.check_known_sides(side, trained)

  def check_known_sides(self, side, trained):
    link = recipes.trained_factors(*self.state(side)[::-1])
    names = {f'{s}:{path}' for s in trained for path in ('a', 'b', 'layers')}
    self.assertEqual(set(link), names)
    for factor in link.values():
      self.assertIsInstance(factor, np.ndarray)
      np.testing.assert_array_equal(factor, 1.0)

  @parameterized.parameters(np.nan, -np.inf)
  def test_factors_that_are_not_finite(self, value):
    chain, state = self.state('left')
    factors = state.factors
    factors['b']['right'] = factors['b']['right'].at[1, 2].set(value)
    message = 'Expected finite factors, got NaN or infinity in the right.*of b'
    with self.assertRaisesRegex(ValueError, message):
      recipes.trained_factors(state, chain)


class ChecksumTest(parameterized.TestCase):

  def test_what_it_depends_on(self):
    base = {
        'a': np.arange(6, dtype=np.float32).reshape(2, 3),
        'b': {'c': np.zeros(4, np.int32)},
    }
    bits = base['a'].view(np.int32).copy()
    bits[1, 2] ^= 1
    others = {
        'path': {'z': base['a'], 'b': base['b']},
        'nesting': {'a': base['a'], 'c': base['b']['c']},
        'dtype': {'a': base['a'], 'b': {'c': np.zeros(4, np.float32)}},
        'shape': {'a': base['a'].reshape(3, 2), 'b': base['b']},
        'transposed': {'a': base['a'].reshape(3, 2).T, 'b': base['b']},
        'bit': {'a': bits.view(np.float32), 'b': base['b']},
        'sign': {'a': base['a'] * [[-1, 1, 1]], 'b': base['b']},  # Of a zero.
        'missing': {'a': base['a']},
        'more': {'a': base['a'], 'b': base['b'], 'd': np.zeros(0)},
    }
    others['sign']['a'] = others['sign']['a'].astype(np.float32)
    sums = {name: recipes.checksum(other) for name, other in others.items()}
    sums['base'] = recipes.checksum(base)
    self.assertLen(set(sums.values()), len(sums))
    for value in sums.values():
      self.assertRegex(value, '^[0-9a-f]{32}$')

  def test_what_it_does_not_depend_on(self):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32)
    expected = recipes.checksum({'a': a, 'b': b})
    same = (
        {'b': b, 'a': a},
        collections.OrderedDict(b=b, a=a),  # JAX keeps this one's order.
        {'params': {'b': b, 'a': a}},
        {'a': jnp.asarray(a), 'b': jnp.asarray(b)},
        {'a': np.asfortranarray(a), 'b': np.stack([b, b])[:, 0]},
    )
    for tree in same:
      self.assertEqual(recipes.checksum(tree), expected)

  def test_bfloat16(self):
    half = jnp.ones((2, 3), jnp.bfloat16)
    expected = recipes.checksum({'a': half})
    self.assertEqual(recipes.checksum({'a': np.asarray(half)}), expected)
    for other in (half.view(jnp.int16), half.astype('float32'), 1.01 * half):
      self.assertNotEqual(recipes.checksum({'a': other}), expected)


class DiskTest(TemporaryTest):

  def assert_same(self, given, expected):
    for name in ('base', 'final', 'policy', 'matrices', 'num_steps'):
      self.assertEqual(getattr(given, name), getattr(expected, name), name)
    self.assertEqual(
        jax.random.key_impl(given.key), jax.random.key_impl(expected.key)
    )
    np.testing.assert_array_equal(
        jax.random.key_data(given.key), jax.random.key_data(expected.key)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(given.links, expected.links)
    chex.assert_trees_all_equal(given.links, expected.links)

  @parameterized.parameters('threefry2x32', 'rbg', 'unsafe_rbg')
  def test_round_trip(self, impl):
    base = make_base(STACKED, 'bfloat16')
    policy = bl.ChainPolicy(
        rank=3,
        period=7,
        side='bernoulli',
        prob=0.1,
        alpha=0.7,
        scaling='sqrt',
        resample=False,
        sketch=SKETCHES['rademacher'],
        frame='raw',
        warmup=2,
        reset_optimizer=False,
        rounding='compensated',
        shared_coin=True,
        shared_frames=('layers',),
        targets=(
            bl.Target('layers', rank=2, prob=0.3),
            bl.Target(r'^a$|é\d', alpha=1 / 3),
        ),
    )
    matrices = bl.Matrices(
        rules=(
            bl.Rule('^layers$', left=(1,), right=(-1,), batch=(0,)),
            bl.Rule('^a$', left=(0,), right=(1,)),
        ),
        layer=r'(?:^|/)block([_/]\d+)',
    )
    # No field is left at its default: a lost one would show.
    plain = bl.ChainPolicy(rank=1, period=None)
    for field in dataclasses.fields(policy):
      if field.name not in ('side', *policies.ignored('bernoulli')):
        new, old = (getattr(p, field.name) for p in (policy, plain))
        self.assertNotEqual(new, old, field.name)
    recipe = make_recipe(policy, base, 2, matrices)._replace(
        final='f' * 32, num_steps=11, key=jax.random.key(2**40 + 3, impl=impl)
    )
    self.assert_same(self.through_disk(recipe), recipe)

  @parameterized.parameters('left', 'right', None)
  def test_round_trip_of_sides_and_defaults(self, side):
    policy = bl.ChainPolicy(rank=1, period=None, side=side)
    recipe = make_recipe(policy, make_base(SHAPES), 1)
    self.assert_same(self.through_disk(recipe), recipe)
    recipe = recipe._replace(matrices=bl.Matrices(select='a|b'))
    self.assert_same(self.through_disk(recipe), recipe)

  def test_a_sketch_of_the_users_own(self):
    mine = dataclasses.replace(bl.sketches.gaussian(), name='mine')
    policy = adapters.ChainPolicy.bernoulli(1, 2, sketch=mine)
    recipe = make_recipe(policy, make_base(SHAPES), 1)
    self.assert_same(self.through_disk(recipe, mine), recipe)
    with self.assertRaisesRegex(ValueError, r"sketch in \(.*\) .*, got 'mine'"):
      recipes.load_recipe(self.directory)

  def test_links_of_a_longer_recipe_are_removed(self):
    policy = adapters.ChainPolicy.rac(1, 2, 'left')
    long = make_recipe(policy, make_base(SHAPES), 4)
    short = long._replace(links=long.links[2:], num_steps=4)
    recipes.save_recipe(self.directory, long)
    self.assert_same(self.through_disk(short), short)
    self.assertEqual(
        sorted(path.name for path in self.directory.iterdir()),
        ['link_000000.npz', 'link_000001.npz', 'recipe.json'],
    )

  def test_links_are_saved_one_by_one(self):
    policy = adapters.ChainPolicy.rac(1, 2, 'left')
    recipe = make_recipe(policy, make_base(SHAPES), 2)
    directory = self.directory / 'not' / 'yet'
    for number, link in enumerate(recipe.links):
      recipes.save_link(directory, number, link)
      chex.assert_trees_all_equal(recipes.load_link(directory, number), link)
    recipes.save_recipe(directory, recipe)
    self.assert_same(recipes.load_recipe(directory), recipe)

  def interrupted(self, recipe):
    """Saves a recipe; the second link's file breaks off while it is written."""
    begin, numbers = zipfile.ZipFile, iter(range(2))

    def broken(file, mode):
      if next(numbers) == 1:
        file.write(b'PK half of a file')
        raise OSError('disk full')
      return begin(file, mode)

    with mock.patch.object(zipfile, 'ZipFile', broken):
      with self.assertRaisesRegex(OSError, 'disk full'):
        recipes.save_recipe(self.directory, recipe)

  def test_files_appear_whole(self):
    policy = adapters.ChainPolicy.rac(1, 2, 'left')
    recipe = make_recipe(policy, make_base(SHAPES), 2)
    self.interrupted(recipe)
    chex.assert_trees_all_equal(
        recipes.load_link(self.directory, 0), recipe.links[0]
    )
    self.assertFalse((self.directory / 'link_000001.npz').exists())
    self.assertFalse((self.directory / 'recipe.json').exists())
    # What was there before stays there until the new file is whole.
    recipes.save_recipe(self.directory, recipe)
    self.interrupted(recipe._replace(links=recipe.links[::-1]))
    chex.assert_trees_all_equal(
        recipes.load_link(self.directory, 1), recipe.links[1]
    )
    for path in self.directory.glob('*.*'):
      self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o644)

  def test_a_failed_write_leaves_nothing(self):
    policy = adapters.ChainPolicy.rac(1, 2, 'left')
    self.interrupted(make_recipe(policy, make_base(SHAPES), 2))
    names = [path.name for path in self.directory.iterdir()]
    self.assertEqual(names, ['link_000000.npz'])

  @parameterized.parameters('left', 'right', 'bernoulli', None)
  def test_size_is_that_of_the_factors(self, side):
    m, n, rank, num_links = 300, 200, 2, 3
    base = {'w': jnp.zeros((m, n))}
    policy = policy_of(side, rank=rank, period=1, sketch=SKETCHES['coordinate'])
    recipe = make_recipe(policy, base, num_links)
    numbers = {'left': n, 'right': m, None: m + n}.get(side, 0)
    numbers *= rank * num_links
    if side == 'bernoulli':
      chain = adapters.make_chain(policy, optax.identity())
      state = jax.jit(chain.init)(recipe.key, base)
      links = []
      for link, coin in zip(recipe.links, (True, False, True), strict=True):
        factors = {'w': {s: link[f'{s}:w'] for s in ('left', 'right')}}
        state = state._replace(factors=factors, coins={'w': jnp.array(coin)})
        links.append(recipes.trained_factors(state, chain))
        numbers += rank * (n if coin else m)
      recipe = recipe._replace(links=tuple(links))
    recipes.save_recipe(self.directory, recipe)
    size = sum(path.stat().st_size for path in self.directory.glob('*.npz'))
    # Zeros compress; an npz adds some hundred bytes an array.
    self.assertBetween(size, 4 * numbers, 4 * numbers + 6 * 500)
    self.assertLess(size, 0.12 * 4 * m * n)
    self.assertLess((self.directory / 'recipe.json').stat().st_size, 2000)


class RejectsTest(TemporaryTest):

  def setUp(self):
    super().setUp()
    self.base = make_base(SHAPES)
    # Coordinates: no QR to compile.
    self.policy = adapters.ChainPolicy.rac(
        2, 2, 'left', sketch=SKETCHES['coordinate']
    )
    self.recipe = make_recipe(self.policy, self.base, 2)

  def check_replay(self, message, base=None, recipe=None):
    base = self.base if base is None else base
    with self.assertRaisesRegex(ValueError, message):
      recipes.replay(base, self.recipe if recipe is None else recipe)

  def test_another_base(self):
    other = {**self.base, 'bias': self.base['bias'].at[3].add(1e-6)}
    expected, given = map(recipes.checksum, (self.base, other))
    message = f'checksum {expected}, as in the recipe, got {given}: another'
    self.check_replay(message, other)
    self.check_replay(message.split(',')[0], {**self.base, 'c': np.ones(2)})

  def test_a_base_of_other_shapes(self):
    other = {**self.base, 'a': jnp.ones((5, 9))}
    expected = recipes.checksum(self.base)
    self.check_replay(f'Expected base weights of checksum {expected}', other)
    # With the checksum of the other base the factors tell.
    recipe = self.recipe._replace(base=recipes.checksum(other))
    moved = {**other, 'a': jnp.ones((6, 8))}
    recipe = recipe._replace(base=recipes.checksum(moved))
    message = r'right:a of shape \(2, 8\) in link 0, got \(2, 9\)'
    self.check_replay(message, moved, recipe)

  def links_with(self, number, name, factor):
    links = [dict(link) for link in self.recipe.links]
    if factor is None:
      del links[number][name]
    else:
      links[number][name] = factor
    return self.recipe._replace(links=tuple(links))

  def test_a_factor_that_is_missing(self):
    message = r'right:b of shape \(2, 6\) in link 1, got None'
    self.check_replay(message, recipe=self.links_with(1, 'right:b', None))

  def test_a_factor_of_no_matrix(self):
    factor = np.zeros((2, 6), np.float32)
    message = r"in link 1, got also \['right:z'\]"
    self.check_replay(message, recipe=self.links_with(1, 'right:z', factor))

  @parameterized.parameters(((2, 5),), ((6, 2),), ((1, 2, 6),), ((),))
  def test_a_factor_of_another_shape(self, shape):
    factor = np.zeros(shape, np.float32)
    message = r'right:b of shape \(2, 6\) in link 0, got \('
    self.check_replay(message, recipe=self.links_with(0, 'right:b', factor))

  @parameterized.parameters(np.nan, np.inf)
  def test_a_factor_that_is_not_finite(self, value):
    factor = self.recipe.links[1]['right:a'].copy()
    factor[1, 3] = value
    message = 'Expected finite factors, got others in right:a of link 1'
    self.check_replay(message, recipe=self.links_with(1, 'right:a', factor))

  def test_too_few_links(self):
    recipe = self.recipe._replace(links=self.recipe.links[:1])
    self.check_replay('Expected 2 links', recipe=recipe)

  def test_warning_of_another_result(self):
    replayed = replay_strictly(self.base, self.recipe)  # None was recorded.
    final = recipes.checksum(replayed)
    replay_strictly(self.base, self.recipe._replace(final=final))
    message = f'Replayed weights of checksum {final}, recorded was 0123'
    with self.assertWarnsRegex(UserWarning, message):
      again = recipes.replay(self.base, self.recipe._replace(final='0123'))
    chex.assert_trees_all_equal(again, replayed)

  def check_load(self, error, message):
    with self.assertRaisesRegex(error, message):
      recipes.load_recipe(self.directory)

  def test_no_recipe(self):
    self.check_load(FileNotFoundError, 'Expected a recipe in .*recipe.json')

  def test_a_link_file_that_is_missing(self):
    recipes.save_recipe(self.directory, self.recipe)
    os.remove(self.directory / 'link_000001.npz')
    message = 'Expected link 1 of the recipe in .*link_000001.npz'
    self.check_load(FileNotFoundError, message)

  @parameterized.parameters(0, 0.3, 0.7, 0.99, -1)
  def test_a_link_file_that_is_damaged(self, part):
    recipes.save_recipe(self.directory, self.recipe)
    path = self.directory / 'link_000001.npz'
    data = path.read_bytes()
    if part < 0:  # One bit among the compressed numbers.
      place = data.index(b'right:a.npy') + 150
      data = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
    else:
      data = data[: int(part * len(data))]
    path.write_bytes(data)
    message = 'Expected .*link_000001.npz to be a whole npz file'
    self.check_load(ValueError, message)

  @parameterized.parameters('', '{', '{"version": 1,', 'no json')
  def test_damaged_json(self, text):
    recipes.save_recipe(self.directory, self.recipe)
    (self.directory / 'recipe.json').write_text(text)
    self.check_load(ValueError, 'Expected .*recipe.json to be JSON: ')

  @parameterized.parameters('[]', '3', 'null', '"a"')
  def test_json_of_another_kind(self, text):
    recipes.save_recipe(self.directory, self.recipe)
    (self.directory / 'recipe.json').write_text(text)
    self.check_load(ValueError, 'recipe.json to hold the fields of a recipe')

  def test_no_text(self):
    recipes.save_recipe(self.directory, self.recipe)
    (self.directory / 'recipe.json').write_bytes(b'\xff\xfe\x00')
    self.check_load(ValueError, 'Expected .*recipe.json to be JSON: ')

  def changed(self, change):
    recipes.save_recipe(self.directory, self.recipe)
    path = self.directory / 'recipe.json'
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))

  def test_another_version(self):
    self.changed(lambda record: record.update(version=2))
    self.check_load(
        ValueError, 'Expected version 1 .*recipe.json, got version=2'
    )
    self.changed(lambda record: record.pop('version'))
    self.check_load(ValueError, 'got version=None')

  def test_an_unknown_sketch(self):
    self.changed(lambda record: record['policy'].update(sketch='fourier'))
    self.check_load(ValueError, r"sketch in \('gaussian', .*got 'fourier'")

  def test_values_outside_their_range(self):
    self.changed(lambda record: record['policy'].update(rank=0))
    self.check_load(ValueError, 'Expected rank >= 1, got rank=0')
    self.changed(lambda record: record['policy'].update(side='up'))
    self.check_load(ValueError, "got side='up'")

  @parameterized.parameters(
      ('policy',), ('key',), ('num_links',), ('policy', 'rank')
  )
  def test_a_field_that_is_missing(self, *names):
    def remove(record):
      for name in names[:-1]:
        record = record[name]
      del record[names[-1]]

    self.changed(remove)
    self.check_load(ValueError, f'{names[-1]}')
