"""Tests of A1: every update is a projection, and the draws follow their law."""

import re
import time
import warnings

from absl.testing import parameterized
import chex
import jax
from jax.extend import core as jex_core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import chain
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices

SKETCHES = {
    'gaussian': bl.sketches.gaussian(),
    'rademacher': bl.sketches.rademacher(),
    'coordinate': bl.sketches.coordinate(),
    'srht': bl.sketches.srht(),
}
NAMES = tuple(SKETCHES)


def link_drawer(tree, selection=None, **kwargs):
  """Returns (key, link) -> the links that the chain draws, jitted."""
  found = matrices.find(tree, selection)
  kwargs = {'prob': 0.5, 'sketch': SKETCHES['gaussian'], **kwargs}
  kwargs['ranks'] = [kwargs.pop('rank')] * len(found)
  kwargs['probs'] = [kwargs.pop('prob')] * len(found)

  def draw(key, number=0):
    key = jax.random.fold_in(key, number)
    links = links_lib.draw_links(key, found, **kwargs)
    # A known side is static and no output of jit: the test gives the coin.
    return [link._replace(is_left=None) for link in links]

  return jax.jit(draw)


def dense(basis, dim):
  """Returns a basis as a frame in NumPy float64."""
  if basis is None:
    return np.eye(dim)
  if np.issubdtype(basis.dtype, np.integer):
    return np.eye(dim)[np.asarray(basis)].T
  return np.asarray(basis, np.float64)


def apply_link(link, g):
  """A1 in NumPy: H_L G where the coin fell left, else G H_R."""
  g = np.asarray(g, np.float64)
  if g.ndim > 2:
    entry = lambda i: jax.tree.map(lambda x: x[i], link)
    return np.stack([apply_link(entry(i), g[i]) for i in range(len(g))])
  if link.coin:
    q = dense(link.left, g.shape[0])
    return q @ q.T @ g
  q = dense(link.right, g.shape[1])
  return g @ q @ q.T


def assert_mean(samples, expected, floor=1e-6):
  """Mean over axis 0 within 5 computed standard errors, entrywise.

  The floor is float32 rounding, for entries that do not vary.
  """
  mean = samples.mean(0)
  error = samples.std(0, ddof=1) / np.sqrt(len(samples))
  np.testing.assert_array_less(np.abs(mean - expected) - 5 * error, floor)


def make_tree(seed, dtype=jnp.float32):
  """Two plain matrices, a stack, and what is no matrix.

  Of two lengths only, for the compiler's sake: at rank 2 one takes Householder
  QR and one Cholesky-QR.
  """
  rng = np.random.default_rng(seed)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {
      'a': {'kernel': make(6, 9), 'bias': make(9)},
      'b': {'kernel': make(9, 6), 'scale': make(6)},
      'stack': {'kernel': make(3, 6, 9)},
  }


LEAVES = ('a', 'b', 'stack')
STACK = matrices.Matrices(rules=(matrices.stacked('stack/kernel'),))


class ProjectionTest(parameterized.TestCase):
  """Each update is H G or G H, H an orthogonal projection of the right rank."""

  @parameterized.parameters(
      ('srht', (4, 7, 5)),
      ('gaussian', (6, 9, 2)),
      ('coordinate', (5, 5, 3)),
  )
  def test_update_is_an_orthogonal_projection(self, name, case):
    self.check_update_is_an_orthogonal_projection(name, case)

  @parameterized.parameters(
      *((name, (4, 7, 5)) for name in NAMES if name != 'srht'),
      *((name, (6, 9, 2)) for name in NAMES if name != 'gaussian'),
      *((name, (5, 5, 3)) for name in NAMES if name != 'coordinate'),
  )
  @pytest.mark.slow
  def test_update_is_an_orthogonal_projection_otherwise(self, name, case):
    self.check_update_is_an_orthogonal_projection(name, case)

  def check_update_is_an_orthogonal_projection(self, name, case):
    m, n, rank = case
    with jax.enable_x64(True):
      project = lambda g, key: bl.project(
          g, key, rank=rank, sketch=SKETCHES[name]
      )
      # The linear map itself: its image of every unit matrix, for 12 keys.
      keys = jax.random.split(jax.random.key(m * n), 12)
      units = jnp.eye(m * n).reshape(m * n, m, n)
      images = jax.jit(jax.vmap(jax.vmap(project, (0, None)), (None, 0)))(
          units, keys
      )
    sides = []
    for image in np.asarray(images):
      image = image.reshape(m, n, m, n).transpose(2, 3, 0, 1)  # Out, in.
      left = image[:, 0, :, 0]
      right = image[0, :, 0, :].T
      is_left = np.allclose(
          image, np.einsum('ik,jl->ijkl', left, np.eye(n)), atol=1e-12
      )
      is_right = np.allclose(
          image, np.einsum('ik,jl->ijkl', np.eye(m), right.T), atol=1e-12
      )
      self.assertTrue(is_left or is_right)
      sides.append(is_left)
      h, side = (left, m) if is_left else (right, n)
      # A product of float64 matrices of size one: 1e-12 is rounding.
      np.testing.assert_allclose(h, h.T, atol=1e-12)
      np.testing.assert_allclose(h @ h, h, atol=1e-12)
      np.testing.assert_allclose(np.trace(h), min(rank, side), atol=1e-12)
    self.assertIn(True, sides)
    self.assertIn(False, sides)

  @parameterized.parameters('gaussian', 'coordinate')
  def test_guarantees_of_project(self, name):
    g = jnp.asarray(np.random.default_rng(0).normal(size=(12, 20)), jnp.float32)
    project = jax.jit(
        lambda g, key: bl.project(g, key, rank=3, sketch=SKETCHES[name])
    )
    for seed in range(6):
      hg = project(g, jax.random.key(seed))
      # Float32 sums of 240 products of size one.
      self.assertAlmostEqual(jnp.vdot(g, hg), jnp.vdot(hg, hg), delta=1e-3)
      chex.assert_trees_all_close(
          project(hg, jax.random.key(seed)), hg, atol=1e-5
      )
      spectrum = np.linalg.svd(np.asarray(hg), compute_uv=False)
      self.assertGreater(spectrum[2], 0.1)
      self.assertLess(spectrum[3], 1e-5)

  @parameterized.parameters(
      ('gaussian', 0.5, 2), ('coordinate', 0.5, 7), ('gaussian', 1.0, 7)
  )
  def test_chain_equals_numpy(self, name, prob, rank):
    self.check_chain_equals_numpy(name, prob, rank)

  @parameterized.parameters(
      ('coordinate', 0.5, 2), ('gaussian', 0.5, 7), ('gaussian', 0.0, 2)
  )
  @pytest.mark.slow
  def test_chain_equals_numpy_otherwise(self, name, prob, rank):
    self.check_chain_equals_numpy(name, prob, rank)

  def check_chain_equals_numpy(self, name, prob, rank):
    tree, key = make_tree(0), jax.random.key(3)
    kwargs = dict(rank=rank, prob=prob, sketch=SKETCHES[name])
    tx = bl.scale_by_bernoulli_chain(key, matrices=STACK, **kwargs)
    state = tx.init(tree)._replace(count=jnp.int32(4))
    updates, state = jax.jit(tx.update)(tree, state)
    self.assertEqual(state.count, 5)
    links = link_drawer(tree, STACK, **kwargs)(key, 4)
    for leaf, link in zip(LEAVES, links, strict=True):
      g = tree[leaf]['kernel']
      if prob != 0.5:
        link = link._replace(coin=np.full(g.shape[:-2], prob == 1))
      # Float32 sums of at most 9 products of size one.
      np.testing.assert_allclose(
          updates[leaf]['kernel'], apply_link(link, g), rtol=1e-5, atol=1e-5
      )

  def test_stack_draws_for_each_entry(self):
    tree = {'stack': {'kernel': jnp.ones((40, 6, 9))}}
    (link,) = link_drawer(tree, STACK, rank=2)(jax.random.key(0))
    chex.assert_shape(link.coin, (40,))
    chex.assert_shape(link.left, (40, 6, 2))
    chex.assert_shape(link.right, (40, 9, 2))
    self.assertLen(np.unique(np.round(link.left[:, 0, 0], 5)), 40)
    self.assertLen(np.unique(link.coin), 2)

  @parameterized.parameters(0.0, 'traced')
  def test_full_rank_is_the_identity(self, prob):
    self.check_full_rank_is_the_identity(prob)

  @parameterized.parameters(0.5, 1.0)
  @pytest.mark.slow
  def test_full_rank_is_the_identity_otherwise(self, prob):
    self.check_full_rank_is_the_identity(prob)

  def check_full_rank_is_the_identity(self, prob):
    tree = make_tree(1)
    tree = {
        'float32': tree,
        'bfloat16': jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree),
    }
    prob = jnp.float32(0.3) if prob == 'traced' else prob
    tx = bl.scale_by_bernoulli_chain(
        jax.random.key(0), rank=9, prob=prob, matrices=STACK
    )
    updates, _ = jax.jit(tx.update)(tree, tx.init(tree))
    chex.assert_trees_all_equal(updates, tree)

  def test_leaves_that_are_no_matrices_pass_unchanged(self):
    tree = make_tree(0)
    tree['b']['scale'] = jnp.array([jnp.nan, jnp.inf, -0.0, 1e-40, 0, 1])
    tree['codes'] = jnp.arange(6).reshape(2, 3)
    tx = bl.scale_by_bernoulli_chain(jax.random.key(0), rank=2, matrices=STACK)
    updates, _ = jax.jit(tx.update)(tree, tx.init(tree))
    for path in (('a', 'bias'), ('b', 'scale'), ('codes',)):
      before, after = tree, updates
      for part in path:
        before, after = before[part], after[part]
      chex.assert_trees_all_equal(before, after)
    self.assertFalse(np.allclose(updates['a']['kernel'], tree['a']['kernel']))

  def test_the_side_not_chosen_cannot_spoil_the_update(self):
    # A coin applied by arithmetic instead of a choice makes nan of inf.
    link = links_lib.Link(
        coin=jnp.array([True, False]),
        left=jnp.stack([jnp.eye(4, 1), jnp.full((4, 1), jnp.inf)]),
        right=jnp.stack([jnp.full((4, 1), jnp.inf), jnp.eye(4, 1)]),
        is_left=None,
    )
    g = jnp.broadcast_to(jnp.arange(1.0, 17).reshape(4, 4), (2, 4, 4))
    factors = links_lib.compress(link, g)
    np.testing.assert_array_equal(factors['left'][1], 0)
    np.testing.assert_array_equal(factors['right'][0], 0)
    moved = links_lib.expand(link, factors, 4, 4)
    expected = np.zeros((2, 4, 4))
    expected[0, 0], expected[1, :, 0] = g[0, 0], g[1, :, 0]
    np.testing.assert_array_equal(moved, expected)


class LawTest(parameterized.TestCase):
  """Coins and means against their laws."""

  def coins(self, tree, num, selection=None, *, prob, **kwargs):
    """Returns (num, entries) coins of consecutive links."""
    found = matrices.find(tree, selection)
    full = max(max(matrix.m, matrix.n) for matrix in found)

    def draw(step):
      links = links_lib.draw_links(
          jax.random.fold_in(jax.random.key(5), step),
          found,
          # The whole space: nothing but coins is drawn.
          ranks=[full] * len(found),
          probs=[prob] * len(found),
          sketch=SKETCHES['gaussian'],
          **kwargs,
      )
      return jnp.concatenate([link.coin.ravel() for link in links])

    coins = jax.jit(jax.vmap(draw))(jnp.arange(num))
    return np.asarray(coins, np.float64)

  def test_coins_are_fair_to_prob_and_independent(self):
    coins = self.coins(make_tree(0), 20_000, STACK, prob=0.3)
    chex.assert_shape(coins, (20_000, 5))  # Two matrices, a stack of three.
    assert_mean(coins, np.full(5, 0.3))
    centred = coins - 0.3
    products = centred[:, :, None] * centred[:, None, :]
    assert_mean(products, 0.21 * np.eye(5))
    assert_mean(centred[1:] * centred[:-1], np.zeros(5))  # Over links.

  def test_shared_coin_is_one_coin(self):
    coins = self.coins(make_tree(0), 20_000, STACK, prob=0.3, shared_coin=True)
    np.testing.assert_array_equal(coins, coins[:, :1] * np.ones(5))
    assert_mean(coins[:, :1], np.full(1, 0.3))
    centred = coins[:, :1] - 0.3
    assert_mean(centred[1:] * centred[:-1], np.zeros(1))

  @parameterized.parameters((False, False), (True, True))
  def test_draw_coins_equals_the_coins_of_draw_links(self, shared_coin, known):
    self.check_draw_coins_equals_the_coins_of_draw_links(shared_coin, known)

  @parameterized.parameters((False, True), (True, False))
  @pytest.mark.slow
  def test_draw_coins_equals_the_coins_of_draw_links_otherwise(
      self, shared_coin, known
  ):
    self.check_draw_coins_equals_the_coins_of_draw_links(shared_coin, known)

  def check_draw_coins_equals_the_coins_of_draw_links(self, shared_coin, known):
    """And both equal one uniform number a matrix, or one for all of them."""
    found = matrices.find(make_tree(0), STACK)
    num_links = 40

    def draw(key, prob):
      kwargs = dict(
          probs=[1 if known else prob, prob, 0.7], shared_coin=shared_coin
      )
      coins = links_lib.draw_coins(key, found, **kwargs)
      links = links_lib.draw_links(
          key, found, ranks=[1] * 3, sketch=SKETCHES['coordinate'], **kwargs
      )
      return coins, [link.coin for link in links]

    def toss(key, matrix, entry, prob):
      if not shared_coin:
        for word in (*matrix.path_hash, matrix.entries[entry]):
          key = jax.random.fold_in(key, np.uint32(word))
      return jax.random.bernoulli(jax.random.fold_in(key, 0), prob)

    def expected(key):
      tosses = []
      for matrix, prob in zip(found, (0.3, 0.3, 0.7), strict=True):
        flat = [toss(key, matrix, i, prob) for i in np.ndindex(matrix.batch)]
        tosses.append(jnp.stack(flat).reshape(matrix.batch))
      return tosses

    keys = jax.random.split(jax.random.key(0), num_links)
    prob = jnp.asarray(0.3)  # Traced: a coin is tossed whatever it is.
    coins, of_links = jax.jit(jax.vmap(draw, (0, None)))(keys, prob)
    tosses = jax.jit(jax.vmap(expected))(keys)
    self.assertEqual(coins[0] is None, known)
    if known:
      tosses[0] = None
    chex.assert_trees_all_equal(coins, of_links)
    chex.assert_trees_all_equal(coins, tosses)
    self.assertLen(np.unique(coins[1]), 2)

  def test_draw_coins_draws_no_basis(self):
    found = matrices.find(make_tree(0), STACK)
    draw = lambda key: links_lib.draw_coins(key, found, probs=[0.5] * 3)
    jaxpr = jax.make_jaxpr(draw)(jax.random.key(0))
    self.assertEqual([v.shape for v in jaxpr.out_avals], [(), (), (3,)])
    # Of the whole tree five numbers: no frame of length 6 or 9.
    sizes = {
        size for eqn in jaxpr.eqns for v in eqn.outvars for size in v.aval.shape
    }
    self.assertLessEqual(max(sizes), 5)
    for known in (0, 1.0):
      coins = links_lib.draw_coins(None, found, probs=[known] * 3)
      self.assertEqual(coins, [None] * 3)

  def test_shared_coin_reaches_the_updates(self):
    tree = {str(i): jnp.ones((3, 5)) for i in range(6)}
    sides = lambda updates: {
        bool(jnp.allclose(u, u[:1])) for u in updates.values()
    }  # G H_R has equal rows here, H_L G has not.
    for shared, expected in ((True, 1), (False, 2)):
      tx = bl.scale_by_bernoulli_chain(
          jax.random.key(0),
          rank=1,
          shared_coin=shared,
          sketch=SKETCHES['coordinate'],
      )
      updates, _ = jax.jit(tx.update)(tree, tx.init(tree))
      self.assertLen(sides(updates), expected)

  @parameterized.parameters(
      ('gaussian', 4, 8, 2), ('coordinate', 4, 8, 5), ('rademacher', 4, 4, 1)
  )
  def test_mean_update_is_lmin_times_g(self, name, m, n, rank):
    self.check_mean_update_is_lmin_times_g(name, m, n, rank)

  @parameterized.parameters(
      *((name, 4, 8, 2) for name in NAMES if name != 'gaussian'),
      ('gaussian', 4, 8, 5),
  )
  @pytest.mark.slow
  def test_mean_update_is_lmin_times_g_otherwise(self, name, m, n, rank):
    self.check_mean_update_is_lmin_times_g(name, m, n, rank)

  def check_mean_update_is_lmin_times_g(self, name, m, n, rank):
    g = jnp.asarray(np.random.default_rng(1).normal(size=(m, n)), jnp.float32)
    keys = jax.random.split(jax.random.key(6), 20_000)
    project = lambda key: bl.project(
        g, key, rank=rank, prob=0.3, sketch=SKETCHES[name]
    )
    lmin = 0.3 * min(rank, m) / m + 0.7 * min(rank, n) / n
    draws = np.asarray(jax.jit(jax.vmap(project))(keys), np.float64)
    assert_mean(draws, lmin * np.asarray(g))

  @parameterized.parameters((6, 10, 2), (6, 10, 8), (10, 6, 8), (4, 4, 9))
  def test_trained_parameters_is_the_mean_size_of_the_trained_factor(
      self, m, n, rank
  ):
    left, right = min(rank, m) * n, m * min(rank, n)
    count = lambda prob: chain.trained_parameters(m, n, rank=rank, prob=prob)
    self.assertEqual(count(1), left)
    self.assertEqual(count(0), right)
    self.assertAlmostEqual(count(0.25), 0.25 * left + 0.75 * right)


class TableTest(parameterized.TestCase):

  def test_describe_lists_what_is_trained(self):
    tree = {
        'a': {'kernel': jnp.ones((6, 9)), 'bias': jnp.ones(9)},
        'stack': {'kernel': jnp.ones((3, 5, 4, 9))},
    }
    rule = matrices.Rule('stack', (2,), (3,), batch=(0, 1))
    rows = chain.selection_table(
        tree, rank=5, prob=0.25, matrices=matrices.Matrices(rules=(rule,))
    )
    self.assertEqual(
        rows,
        [
            {
                'matrix': 'a/kernel',
                'shape': '6 x 9',
                'rank': 5,
                'P(left)': 0.25,
                'trained': 0.25 * 5 * 9 + 0.75 * 6 * 5,
            },
            {
                'matrix': 'stack/kernel',
                'shape': '3 x 5 x 4 x 9',
                'rank': 'left 4, right 5 (clipped)',
                'P(left)': 0.25,
                'trained': 15 * (0.25 * 4 * 9 + 0.75 * 4 * 5),
            },
        ],
    )


class DeterministicTest(parameterized.TestCase):
  """prob 0 and 1 are RAC-LoRA right and left, traced or not."""

  @parameterized.parameters(('coordinate', 'right'))
  def test_rac_lora_is_the_chain_whose_coin_always_falls_the_same(
      self, name, side
  ):
    self.check_rac_lora_is_the_chain_whose_coin_always_falls_the_same(
        name, side
    )

  @parameterized.parameters(
      ('gaussian', 'left'),
      ('gaussian', 'right'),
      ('coordinate', 'left'),
  )
  @pytest.mark.slow
  def test_rac_lora_is_the_chain_whose_coin_always_falls_the_same_otherwise(
      self, name, side
  ):
    self.check_rac_lora_is_the_chain_whose_coin_always_falls_the_same(
        name, side
    )

  def check_rac_lora_is_the_chain_whose_coin_always_falls_the_same(
      self, name, side
  ):
    tree, key = make_tree(0), jax.random.key(1)
    prob = {'left': 1, 'right': 0}[side]
    kwargs = dict(rank=2, sketch=SKETCHES[name])
    rac = bl.rac_lora(0.1, key, side=side, matrices=STACK, **kwargs)
    state = rac.init(tree)
    program = str(jax.make_jaxpr(rac.update)(tree, state))
    for known in (prob, float(prob)):
      tx = bl.bernoulli_lora(0.1, key, prob=known, matrices=STACK, **kwargs)
      self.assertEqual(str(jax.make_jaxpr(tx.update)(tree, state)), program)
    traced = bl.bernoulli_lora(
        0.1, key, prob=jnp.float32(prob), matrices=STACK, **kwargs
    )
    updates = jax.jit(rac.update)(tree, state)[0]
    # The coin's program draws more frames at once, and a batch of another size
    # rounds differently: units in the last place of updates of size 0.1.
    chex.assert_trees_all_close(
        updates, jax.jit(traced.update)(tree, state)[0], rtol=0, atol=1e-7
    )
    link = link_drawer(tree, STACK, prob=prob, **kwargs)(key)[0]
    # Float32 sums of at most 9 products of size one; the learning rate is 0.1.
    np.testing.assert_allclose(
        updates['a']['kernel'],
        -0.1
        * apply_link(link._replace(coin=side == 'left'), tree['a']['kernel']),
        atol=1e-6,
    )

  @parameterized.parameters(('left', 6, 9), ('right', 9, 6))
  def test_a_known_side_draws_no_other_basis(self, side, wanted, unwanted):
    tree = {'w': jnp.ones((6, 9))}

    def lengths(tx):
      jaxpr = jax.make_jaxpr(tx.update)(tree, tx.init(tree)).jaxpr
      shapes = {aval.shape for aval in avals(jaxpr)}
      return {dim for dim in (6, 9) if (1, dim, 2) in shapes}  # Bases.

    rac = bl.rac_lora(0.1, jax.random.key(0), side=side, rank=2)
    self.assertEqual(lengths(rac), {wanted})
    chain_tx = bl.bernoulli_lora(0.1, jax.random.key(0), rank=2)
    self.assertEqual(lengths(chain_tx), {wanted, unwanted})


class PeriodTest(parameterized.TestCase):
  """A link keeps coin and subspace, and what `inner` does in it."""

  def run_chain(self, tx, gradients):
    state = tx.init(gradients[0])
    update = jax.jit(tx.update)
    updates = []
    for g in gradients:
      u, state = update(g, state)
      updates.append(u)
    return updates, state

  @parameterized.parameters(['coordinate'])
  def test_period_keeps_the_draws_of_a_link(self, name):
    self.check_period_keeps_the_draws_of_a_link(name)

  @parameterized.parameters(['gaussian'])
  @pytest.mark.slow
  def test_period_keeps_the_draws_of_a_link_otherwise(self, name):
    self.check_period_keeps_the_draws_of_a_link(name)

  def check_period_keeps_the_draws_of_a_link(self, name):
    tree, key, period = make_tree(0), jax.random.key(2), 3
    kwargs = dict(rank=2, sketch=SKETCHES[name])
    tx = bl.scale_by_bernoulli_chain(
        key, period=period, matrices=STACK, **kwargs
    )
    updates, _ = self.run_chain(tx, [tree] * 7)
    for step in range(7):
      chex.assert_trees_all_equal(
          updates[step], updates[step // period * period]
      )
    draw = link_drawer(tree, STACK, **kwargs)
    for step in (0, 3, 6):
      links = draw(key, step // period)
      g = tree['stack']['kernel']
      np.testing.assert_allclose(
          updates[step]['stack']['kernel'],
          apply_link(links[2], g),
          rtol=1e-5,
          atol=1e-5,
      )
    for leaf in LEAVES:
      for one, other in ((0, 3), (3, 6)):
        change = updates[one][leaf]['kernel'] - updates[other][leaf]['kernel']
        self.assertGreater(np.abs(change).max(), 1e-2)

  def test_period_without_inner_is_the_chain_of_that_link(self):
    tree, key = make_tree(0), jax.random.key(2)
    slow = bl.scale_by_bernoulli_chain(key, rank=2, period=4, matrices=STACK)
    fast = bl.scale_by_bernoulli_chain(key, rank=2, matrices=STACK)
    slow_updates, _ = self.run_chain(slow, [tree] * 8)
    fast_updates, _ = self.run_chain(fast, [tree] * 2)
    chex.assert_trees_all_equal(slow_updates[0], fast_updates[0])
    chex.assert_trees_all_equal(slow_updates[7], fast_updates[1])

  @parameterized.parameters(('adam', 0.5, 'coordinate'))
  def test_inner_equals_a_numpy_loop_in_the_subspace(self, inner, prob, name):
    self.check_inner_equals_a_numpy_loop_in_the_subspace(inner, prob, name)

  @parameterized.parameters(
      ('momentum', 1.0, 'gaussian'),
      ('momentum', 0.5, 'gaussian'),
      ('adam', 0.5, 'gaussian'),
  )
  @pytest.mark.slow
  def test_inner_equals_a_numpy_loop_in_the_subspace_otherwise(
      self, inner, prob, name
  ):
    self.check_inner_equals_a_numpy_loop_in_the_subspace(inner, prob, name)

  def check_inner_equals_a_numpy_loop_in_the_subspace(self, inner, prob, name):
    period, num_links = 4, 4
    inner_tx = {
        'momentum': optax.trace(0.9),
        'adam': optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-8),
    }[inner]
    key = jax.random.key(4)
    kwargs = dict(rank=2, prob=prob, sketch=SKETCHES[name])
    with jax.enable_x64(True):
      gradients = [
          make_tree(10 + i, jnp.float64) for i in range(period * num_links)
      ]
      tx = bl.scale_by_bernoulli_chain(
          key, period=period, inner=inner_tx, matrices=STACK, **kwargs
      )
      updates, _ = self.run_chain(tx, gradients)
      draw = link_drawer(gradients[0], STACK, **kwargs)
      links = [draw(key, number) for number in range(num_links)]
    if prob == 0.5:  # Both outcomes of the coin are met.
      coins = np.concatenate([np.ravel(x.coin) for link in links for x in link])
      self.assertLen(np.unique(coins), 2)

    leaves = [('a', ()), ('b', ()), ('stack', (0,)), ('stack', (2,))]
    for leaf, entry in leaves:
      for number, link in enumerate(links):
        one = link[LEAVES.index(leaf)]
        one = jax.tree.map(lambda x, entry=entry: x[entry], one)
        is_left = bool(one.coin) if prob == 0.5 else True
        first = second = 0.0
        for i in range(period):
          step = number * period + i
          g = np.asarray(gradients[step][leaf]['kernel'])[entry]
          q = (
              dense(one.left, g.shape[0])
              if is_left
              else dense(one.right, g.shape[1])
          )
          s = q.T @ g if is_left else g @ q
          if inner == 'momentum':
            first = s + 0.9 * first
            moved = first
          else:
            first = 0.8 * first + 0.2 * s
            second = 0.9 * second + 0.1 * s**2
            moved = (first / (1 - 0.8 ** (i + 1))) / (
                np.sqrt(second / (1 - 0.9 ** (i + 1))) + 1e-8
            )
          expected = q @ moved if is_left else moved @ q.T
          # Four steps in float64.
          np.testing.assert_allclose(
              np.asarray(updates[step][leaf]['kernel'])[entry],
              expected,
              rtol=1e-10,
              atol=1e-10,
          )

  def test_state_of_inner_is_thin(self):
    tree = {
        'w': jax.ShapeDtypeStruct((96, 160), jnp.bfloat16),
        'narrow': jax.ShapeDtypeStruct((3, 50), jnp.float32),
        'stack': {'kernel': jax.ShapeDtypeStruct((7, 32, 16), jnp.float32)},
        'bias': jax.ShapeDtypeStruct((160,), jnp.float32),
    }
    selection = matrices.Matrices('w|narrow|kernel', STACK.rules)
    rank = 4
    right = rank * 160 + 3 * 50 + 7 * rank * 16  # Trained on a left link.
    left = 96 * rank + 3 * rank + 7 * 32 * rank
    for prob, thin in ((0.5, right + left), (1.0, right), (0.0, left)):
      for inner, copies in ((optax.trace(0.9), 1), (optax.scale_by_adam(), 2)):
        tx = bl.scale_by_bernoulli_chain(
            jax.random.key(0),
            rank=rank,
            prob=prob,
            inner=inner,
            matrices=selection,
        )
        state = jax.eval_shape(tx.init, tree).inner_state
        sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
        self.assertEqual(sum(sizes), copies * thin)
        self.assertTrue(
            all(
                leaf.dtype == jnp.float32
                for leaf in jax.tree.leaves(state)
                if leaf.ndim
            )
        )
    plain = bl.scale_by_bernoulli_chain(
        jax.random.key(0), rank=rank, matrices=selection
    )
    self.assertEmpty(jax.tree.leaves(jax.eval_shape(plain.init, tree)[2]))

  @parameterized.parameters(['coordinate'])
  def test_inner_identity_is_no_inner(self, name):
    self.check_inner_identity_is_no_inner(name)

  @parameterized.parameters(['gaussian'])
  @pytest.mark.slow
  def test_inner_identity_is_no_inner_otherwise(self, name):
    self.check_inner_identity_is_no_inner(name)

  def check_inner_identity_is_no_inner(self, name):
    tree = make_tree(0)
    kwargs = dict(rank=2, sketch=SKETCHES[name], matrices=STACK)
    updates = []
    for inner in (None, optax.identity()):
      tx = bl.scale_by_bernoulli_chain(jax.random.key(0), inner=inner, **kwargs)
      updates.append(jax.jit(tx.update)(tree, tx.init(tree))[0])
    chex.assert_trees_all_equal(*updates)

  @parameterized.parameters([2])
  def test_a_schedule_in_inner_goes_on(self, period):
    self.check_a_schedule_in_inner_goes_on(period)

  @parameterized.parameters([1])
  @pytest.mark.slow
  def test_a_schedule_in_inner_goes_on_otherwise(self, period):
    self.check_a_schedule_in_inner_goes_on(period)

  def check_a_schedule_in_inner_goes_on(self, period):
    """Moments restart at each link; the rate is that of the step of the run."""
    grads = {'w': jnp.ones((4, 3))}
    make = lambda inner: bl.scale_by_bernoulli_chain(
        jax.random.key(0), rank=2, period=period, inner=inner
    )
    rate = lambda count: 1.0 / (1.0 + count)
    plain = make(optax.trace(0.9))
    tx = make(optax.chain(optax.trace(0.9), optax.scale_by_schedule(rate)))
    state, other = tx.init(grads), plain.init(grads)
    update, plain_update = jax.jit(tx.update), jax.jit(plain.update)
    for step in range(5):
      updates, state = update(grads, state)
      wanted, other = plain_update(grads, other)
      scaled = jax.tree.map(lambda u, s=step: u * rate(s), wanted)
      # Products of float32 that cancel.
      chex.assert_trees_all_close(updates, scaled, rtol=1e-6, atol=1e-7)

  def test_restart_of_inner_is_the_users(self):
    grads = {'w': jnp.ones((4, 3))}
    tx = bl.scale_by_bernoulli_chain(
        jax.random.key(0),
        rank=2,
        inner=optax.scale_by_adam(),
        restart=lambda fresh, old: fresh._replace(count=old.count),
    )
    state, update = tx.init(grads), jax.jit(tx.update)
    for _ in range(3):
      _, state = update(grads, state)
    self.assertEqual(state.inner_state.count, 3)
    with self.assertRaisesRegex(ValueError, 'in place of optax.apply_every'):
      bl.scale_by_bernoulli_chain(
          jax.random.key(0), rank=2, inner=optax.apply_every(2)
      ).init(grads)

  def test_inner_sees_the_unchosen_factor_as_zero(self):
    seen = []

    def update(updates, state, params=None):
      del params
      seen.append(updates)
      return updates, state

    spy = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    tree = {str(i): jnp.ones((3, 5)) for i in range(8)}
    tx = bl.scale_by_bernoulli_chain(jax.random.key(0), rank=2, inner=spy)

    @jax.jit
    def run(tree):
      tx.update(tree, tx.init(tree))
      return seen.pop()

    factors = run(tree)
    links = link_drawer(tree, rank=2)(jax.random.key(0))
    self.assertLen({bool(link.coin) for link in links}, 2)
    for name, link in zip(sorted(tree), links, strict=True):
      factor = factors[name]
      chex.assert_shape(factor['left'], (2, 5))
      chex.assert_shape(factor['right'], (3, 2))
      self.assertEqual(bool(jnp.any(factor['left'])), bool(link.coin))
      self.assertEqual(bool(jnp.any(factor['right'])), not link.coin)


class OthersTest(parameterized.TestCase):
  """What moves the leaves that are no matrices."""

  def setUp(self):
    super().setUp()
    self.params = {
        'a': {'kernel': jnp.ones((4, 3)), 'bias': jnp.zeros(3)},
        'scale': jnp.ones(2),
        'step': 2.0,
    }
    rng = np.random.default_rng(0)
    self.grads = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=jnp.shape(p)), jnp.float32),
        self.params,
    )
    self.matrix = {'a': {'kernel': self.params['a']['kernel']}}
    self.rest = self.without_matrix(self.params)

  def without_matrix(self, tree):
    return {'a': {'bias': tree['a']['bias']}} | {
        name: tree[name] for name in ('scale', 'step')
    }

  def run_chain(self, params, grads, num_steps=4, **kwargs):
    tx = bl.scale_by_bernoulli_chain(jax.random.key(0), rank=2, **kwargs)
    state = tx.init(params)
    for _ in range(num_steps):
      updates, state = tx.update(grads, state, params, value=1.0)
    return updates, state

  @parameterized.named_parameters(
      ('none', None, None, optax.identity()),
      ('inner', None, optax.scale_by_adam(), optax.scale_by_adam()),
      ('own', optax.scale_by_adam(), None, optax.scale_by_adam()),
      ('both', optax.trace(0.9), optax.scale_by_adam(), optax.trace(0.9)),
      (
          'schedule',
          None,
          optax.scale_by_schedule(lambda count: 1.0 + count),
          optax.scale_by_schedule(lambda count: 1.0 + count),
      ),
      (
          'params',
          optax.add_decayed_weights(0.1),
          None,
          optax.add_decayed_weights(0.1),
      ),
      ('value', optax.scale_by_polyak(), None, optax.scale_by_polyak()),
      ('freeze', 'freeze', optax.scale_by_adam(), optax.set_to_zero()),
  )
  def test_others_are_moved_as_alone(self, others, inner, reference):
    """Four steps over four links: no link restarts what moves the others."""
    updates, state = self.run_chain(
        self.params, self.grads, others=others, inner=inner
    )
    update = optax.with_extra_args_support(reference).update
    grads, alone = self.without_matrix(self.grads), reference.init(self.rest)
    for _ in range(4):
      wanted, alone = update(grads, alone, self.rest, value=1.0)
    chex.assert_trees_all_close(self.without_matrix(updates), wanted, rtol=1e-6)
    chex.assert_trees_all_equal_shapes(
        jax.tree.leaves(state.others_state), jax.tree.leaves(alone)
    )
    # The matrix moves as without the others.
    only, _ = self.run_chain(
        self.matrix, {'a': {'kernel': self.grads['a']['kernel']}}, inner=inner
    )
    chex.assert_trees_all_equal(updates['a']['kernel'], only['a']['kernel'])

  def test_the_rate_is_that_of_the_matrices(self):
    tx = bl.bernoulli_lora(
        0.1, jax.random.key(0), rank=2, inner=optax.scale_by_adam()
    )
    updates, _ = tx.update(self.grads, tx.init(self.params), self.params)
    np.testing.assert_allclose(
        updates['scale'], -0.1 * np.sign(self.grads['scale']), rtol=1e-4
    )

  @parameterized.parameters('inner', 'others')
  def test_an_optimiser_that_would_climb_is_refused(self, name):
    with self.assertRaisesRegex(ValueError, f'{name} without a learning rate'):
      bl.bernoulli_lora(
          0.1, jax.random.key(0), rank=2, **{name: optax.adam(0.1)}
      )

  def test_others_is_checked(self):
    with self.assertRaisesRegex(TypeError, "others to be None, 'freeze' or"):
      bl.scale_by_bernoulli_chain(jax.random.key(0), rank=2, others='frozen')


class NumericsTest(parameterized.TestCase):
  """Dtypes, compilation, shapes and memory."""

  def setUp(self):
    super().setUp()
    chex.clear_trace_counter()

  @parameterized.parameters(
      ('coordinate', 'bfloat16', 0.5),
      ('gaussian', 'float64', 0.5),
  )
  def test_dtype_is_kept_and_the_update_rounded_once(self, name, dtype, prob):
    self.check_dtype_is_kept_and_the_update_rounded_once(name, dtype, prob)

  @parameterized.parameters(
      ('gaussian', 'bfloat16', 0.5),
      ('gaussian', 'float64', 1.0),
      ('coordinate', 'float64', 0.5),
      ('srht', 'float64', 0.5),
  )
  @pytest.mark.slow
  def test_dtype_is_kept_and_the_update_rounded_once_otherwise(
      self, name, dtype, prob
  ):
    self.check_dtype_is_kept_and_the_update_rounded_once(name, dtype, prob)

  def check_dtype_is_kept_and_the_update_rounded_once(self, name, dtype, prob):
    with jax.enable_x64(dtype == 'float64'), warnings.catch_warnings():
      warnings.simplefilter('error')  # Of mixed dtypes.
      tree, key = make_tree(0, jnp.dtype(dtype)), jax.random.key(8)
      kwargs = dict(rank=2, prob=prob, sketch=SKETCHES[name])
      tx = bl.scale_by_bernoulli_chain(key, matrices=STACK, **kwargs)
      updates, _ = jax.jit(tx.update)(tree, tx.init(tree))
      links = link_drawer(tree, STACK, **kwargs)(key)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
    # Half a unit in the last place of the result, relative, and the rounding
    # of sums of 10 products of size one in which it was computed.
    rtol, atol = {
        'bfloat16': (2**-8, 1e-6),
        'float32': (1e-6, 1e-6),
        'float64': (1e-14, 1e-14),
    }[dtype]
    for leaf, link in zip(LEAVES, links, strict=True):
      g = np.asarray(tree[leaf]['kernel'], np.float64)
      if prob == 1.0:
        link = link._replace(coin=np.full(g.shape[:-2], True))
      np.testing.assert_allclose(
          np.asarray(updates[leaf]['kernel'], np.float64),
          apply_link(link, g),
          rtol=rtol,
          atol=atol,
      )

  def test_mixed_dtypes_in_one_tree(self):
    tree = {
        'half': jnp.ones((6, 8), jnp.bfloat16),
        'single': jnp.ones((6, 8), jnp.float32),
    }
    tx = bl.scale_by_bernoulli_chain(
        jax.random.key(0), rank=2, period=2, inner=optax.trace(0.9)
    )
    state = tx.init(tree)
    updates, after = jax.jit(tx.update)(tree, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)

  @parameterized.parameters('gaussian', 'coordinate')
  def test_coins_do_not_recompile(self, name):
    tree = {'w': jnp.ones((6, 8))}
    tx = bl.bernoulli_lora(
        0.1, jax.random.key(0), rank=2, period=2, sketch=SKETCHES[name]
    )
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state, sides = tx.init(tree), set()
    for _ in range(12):
      updates, state = update(tree, state)
      rows = np.asarray(updates['w'])
      sides.add(bool(np.allclose(rows, rows[:1], atol=1e-5)))
    self.assertLen(sides, 2)  # Both outcomes were met by the one program.

  def test_a_traced_prob_does_not_recompile(self):
    tree = {'w': jnp.ones((6, 8))}

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(prob):
      tx = bl.scale_by_bernoulli_chain(jax.random.key(0), rank=2, prob=prob)
      return tx.update(tree, tx.init(tree))[0]['w']

    sides = [
        bool(jnp.allclose(u, u[:1], atol=1e-5))
        for u in (update(jnp.float32(0.0)), update(jnp.float32(1.0)))
    ]
    self.assertEqual(sides, [True, False])

  @parameterized.parameters(
      *((name, 0.5, 4, None) for name in NAMES),
      *((name, 0.5, 60, None) for name in NAMES),  # Householder on both sides.
      ('gaussian', 0.0, 4, None),
      ('gaussian', 1.0, 4, None),
      ('gaussian', 0.5, 4, 'adam'),
  )
  def test_nothing_is_square(self, name, prob, rank, inner):
    m, n = 96, 160
    tree = {'w': jax.ShapeDtypeStruct((m, n), jnp.float32)}
    tx = bl.scale_by_bernoulli_chain(
        jax.random.key(0),
        rank=rank,
        prob=prob,
        sketch=SKETCHES[name],
        inner=optax.scale_by_adam() if inner else None,
    )
    state = jax.eval_shape(tx.init, tree)
    jaxpr = jax.make_jaxpr(tx.update)(tree, state)
    shapes = {aval.shape for aval in avals(jaxpr.jaxpr)}
    self.assertIn((m, n), shapes)  # The walk does see arrays.
    for shape in shapes:
      self.assertNotIn(np.prod(shape), (m * m, n * n), msg=shape)
      self.assertLessEqual(np.prod(shape), m * n, msg=shape)

  def test_program_grows_with_shapes_not_with_leaves(self):
    def factorisations(num_layers):
      tree = transformer(num_layers, 256, 64, 1024)
      tx = bl.scale_by_bernoulli_chain(jax.random.key(0), rank=8)
      state = jax.eval_shape(tx.init, tree)
      jaxpr = jax.make_jaxpr(tx.update)(tree, state)
      names = [eqn.primitive.name for eqn in equations(jaxpr.jaxpr)]
      draws = [name for name in names if 'random' in name or name == 'erf_inv']
      return names.count('cholesky'), len(draws)

    few, many = factorisations(2), factorisations(16)
    self.assertEqual(few, many)
    self.assertEqual(few[0], 3 * 2)  # Three lengths, Cholesky-QR twice.

  @pytest.mark.slow
  def test_112_matrices_compile_fast_and_use_little_memory(self):
    tree = transformer(16, 2048, 512, 8192)
    leaves = jax.tree.leaves(tree)
    self.assertLen(leaves, 112)
    self.assertLessEqual(len({leaf.shape for leaf in leaves}), 5)
    tx = bl.scale_by_bernoulli_chain(jax.random.key(0), rank=16)
    state = jax.eval_shape(tx.init, tree)
    start = time.process_time()
    lowered = jax.jit(tx.update).lower(tree, state)
    # The level users have, not the one that conftest sets for speed.
    compiled = lowered.compile({'xla_backend_optimization_level': 3})
    seconds = time.process_time() - start
    gradients = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    self.assertGreater(temporaries, 0)
    self.assertLess(temporaries, 0.1 * gradients)
    # 20 s on two cores. The wall clock would time the neighbours as well.
    self.assertLess(seconds, 2 * 20)


class RejectsTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('rank_zero', dict(rank=0), ValueError, 'rank >= 1, got rank=0'),
      ('rank_negative', dict(rank=-2), ValueError, 'rank >= 1, got rank=-2'),
      ('rank_float', dict(rank=1.5), TypeError, 'rank to be an int, got 1.5'),
      ('rank_bool', dict(rank=True), TypeError, 'rank to be an int, got True'),
      (
          'prob_large',
          dict(rank=1, prob=1.5),
          ValueError,
          r'prob in \[0, 1\], got prob=1.5',
      ),
      (
          'prob_negative',
          dict(rank=1, prob=-0.1),
          ValueError,
          r'prob in \[0, 1\], got prob=-0.1',
      ),
      (
          'prob_nan',
          dict(rank=1, prob=float('nan')),
          ValueError,
          r'prob in \[0, 1\], got prob=nan',
      ),
      (
          'period_zero',
          dict(rank=1, period=0),
          ValueError,
          'period >= 1, got period=0',
      ),
      (
          'period_float',
          dict(rank=1, period=2.0),
          TypeError,
          'period to be an int, got 2.0',
      ),
  )
  def test_argument(self, kwargs, error, message):
    with self.assertRaisesRegex(error, message):
      bl.scale_by_bernoulli_chain(jax.random.key(0), **kwargs)
    with self.assertRaisesRegex(error, message):
      bl.bernoulli_lora(0.1, jax.random.key(0), **kwargs)
    if 'period' not in kwargs:
      with self.assertRaisesRegex(error, message):
        bl.project(jnp.ones((3, 4)), jax.random.key(0), **kwargs)

  def test_rank_above_both_sides(self):
    tree = {
        'a': {'kernel': jnp.ones((3, 9))},
        'b': {'kernel': jnp.ones((3, 4))},
    }
    tx = bl.scale_by_bernoulli_chain(jax.random.key(0), rank=5)
    message = r'rank <= 4, the longer side of b/kernel \(3 x 4\), got rank=5'
    with self.assertRaisesRegex(ValueError, message):
      tx.init(tree)
    with self.assertRaisesRegex(ValueError, 'rank <= 4.*got rank=5'):
      bl.project(jnp.ones((3, 4)), jax.random.key(0), rank=5)

  @parameterized.parameters((3,), (2, 3, 4))
  def test_project_wants_a_matrix(self, *shape):
    message = rf'shape \(m, n\), got {re.escape(str(shape))}'
    with self.assertRaisesRegex(ValueError, message):
      bl.project(jnp.ones(shape), jax.random.key(0), rank=1)

  @parameterized.parameters('up', 'Left', '')
  def test_side(self, side):
    message = f"side to be 'left' or 'right', got '{side}'"
    with self.assertRaisesRegex(ValueError, message):
      bl.rac_lora(0.1, jax.random.key(0), rank=1, side=side)

  def test_selection_is_checked_at_init(self):
    tx = bl.scale_by_bernoulli_chain(
        jax.random.key(0), rank=1, matrices=matrices.Matrices('nowhere')
    )
    with self.assertRaisesRegex(ValueError, r'nowhere(.|\n)*w \(3, 4\)'):
      tx.init({'w': jnp.ones((3, 4))})


class CounterexampleTest(parameterized.TestCase):
  """The quadratic of algorithms.md section 4, on which LoRA and COLA fail."""

  @parameterized.named_parameters(
      ('bernoulli', 0.5), ('rac_left', 1.0), ('rac_right', 0.0)
  )
  def test_chain_converges(self, prob):
    with jax.enable_x64(True):
      diagonal = np.array([10, 8, 6, 4, 2, 1, 0.5, 0.25, 0.1]).reshape(3, 3)
      linear = np.array([-60, 32, -12, -16, -12, 2, -1, -1, -0.8]).reshape(3, 3)
      optimum = -linear / (2 * diagonal)
      np.testing.assert_allclose(
          optimum.ravel(), [3, -2, 1, 2, 3, -1, 1, 2, 4], rtol=1e-14
      )
      self.assertAlmostEqual(
          np.sum(diagonal * optimum**2 + linear * optimum), -166.1, places=10
      )
      tx = bl.bernoulli_lora(
          1 / 20, jax.random.key(0), rank=1, prob=prob
      )  # L = 20.

      def step(carry, _):
        params, state = carry
        grads = {'w': 2 * diagonal * params['w'] + linear}
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

      @jax.jit
      def run(params):
        carry = params, tx.init(params)
        return jax.lax.scan(step, carry, length=6000)[0][0]

      w = np.asarray(run({'w': jnp.zeros((3, 3))})['w'])
    # f - f* in a form without cancellation.
    self.assertLess(np.sum(diagonal * (w - optimum) ** 2), 1e-12)


def transformer(num_layers, width, kv, hidden):
  """Returns the shapes of a transformer's kernels, seven a layer."""
  shapes = {
      'q': (width, width),
      'k': (width, kv),
      'v': (width, kv),
      'o': (width, width),
      'gate': (width, hidden),
      'up': (width, hidden),
      'down': (hidden, width),
  }
  layer = {
      name: {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}
      for name, shape in shapes.items()
  }
  return {f'layers_{i}': layer for i in range(num_layers)}


def equations(jaxpr):
  """Yields the equations of a jaxpr and of all that it calls."""
  for eqn in jaxpr.eqns:
    yield eqn
    for sub in jex_core.jaxprs_in_params(eqn.params):
      yield from equations(sub)


def avals(jaxpr):
  """Yields the shaped values that a jaxpr or what it calls computes."""
  for eqn in equations(jaxpr):
    for var in (*eqn.invars, *eqn.outvars):
      if hasattr(var.aval, 'shape'):
        yield var.aval
