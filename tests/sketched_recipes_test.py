"""Tests of recipes of sketched chains: increments to the bit, links to a bound."""

import tempfile
import warnings

from absl.testing import parameterized
import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import export
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import recipes
from bernoulli_lora_jax.models import decoder

KEY = jax.random.key(3)
STACK = bl.Matrices(rules=(bl.matrices.stacked('^layers$'),))
ROUNDINGS = ('nearest', 'stochastic', 'compensated')


def make_base(dtype='float32', scanned=True):
  shapes = {'a': (8, 12), 'b': (8, 5), 'bias': (5,)}
  if scanned:
    shapes['layers'] = (3, 8, 8)
  else:
    shapes |= {f'layers_{i}': (8, 8) for i in range(3)}
  rng = np.random.default_rng(0)
  return {
      name: jnp.asarray(0.5 * rng.normal(size=shape), dtype)
      for name, shape in shapes.items()
  }


def model(params, x):
  """Three layers, scanned where they are stacked, and two products beside them."""
  if 'layers' in params:
    x, _ = jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w), None), x, params['layers']
    )
  else:
    for i in range(3):
      x = jnp.tanh(x @ params[f'layers_{i}'])
  y = jnp.sum(jnp.sin(x @ params['a'])) + jnp.sum(jnp.sin(x @ params['b']))
  return y.astype(jnp.float32), {}


def make_policy(side, rank=2, period=3, sketch=None, **fields):
  # Coordinates where it does not matter: no QR to compile.
  sketch = sketch or bl.sketches.coordinate()
  return bl.ChainPolicy(
      rank=rank, period=period, side=side, sketch=sketch, **fields
  )


def run(chain, base, num_steps, through=lambda state: state):
  """Returns the final state and the links, of steps that are jitted."""
  loss = inject.by_product(model)
  step = jax.jit(lambda s, x: chain.step(s, loss, x)[0], donate_argnums=0)
  dtype = base['a'].dtype
  data = np.random.default_rng(1).normal(size=(num_steps, 4, 8))
  state, links = jax.jit(chain.init)(KEY, base), []
  for i, x in enumerate(data):
    state = through(step(state, jnp.asarray(x, dtype)))
    is_end = (i + 1) % chain.policy.period == 0 or i + 1 == num_steps
    if chain.keeps == 'step' or is_end:
      links.append(recipes.trained_factors(state, chain))
  return state, links


def made(policy, keeps, base, num_steps=7, **kwargs):
  """Returns the recipe of a run and its weights."""
  chain = adapters.make_chain(
      policy,
      optax.adam(0.02),
      STACK if 'layers' in base else None,
      sketched=True,
      keeps=keeps,
  )
  state, links = run(chain, base, num_steps, **kwargs)
  return recipes.make_recipe(base, chain, KEY, links, state), state.params


def through_disk(recipe):
  with tempfile.TemporaryDirectory() as folder:
    recipes.save_recipe(folder, recipe)
    return recipes.load_recipe(folder)


def replay_strictly(base, recipe):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    return recipes.replay(base, recipe)


def ulps(weights):
  """Returns the spacing of a dtype's numbers at given ones, in float64."""
  info = jnp.finfo(weights.dtype)
  size = np.abs(np.asarray(weights, np.float64))
  return 2.0 ** np.floor(np.log2(size)) * float(info.eps)


class IncrementsTest(parameterized.TestCase):
  """Of every step: the run's last bit."""

  def check(self, policy, dtype, scanned):
    base = make_base(dtype, scanned)
    recipe, final = made(policy, 'step', base)
    self.assertLen(recipe.links, 7)
    replayed = replay_strictly(base, through_disk(recipe))
    chex.assert_trees_all_equal_shapes_and_dtypes(replayed, base)
    chex.assert_trees_all_equal(replayed, final)
    for path, leaf in base.items():
      moved = float(jnp.mean(final[path] != leaf))
      self.assertBetween(moved, *((0, 0) if path == 'bias' else (0.1, 1)))

  @parameterized.parameters(
      ('left', 'bfloat16', 'stochastic', True),
      ('right', 'bfloat16', 'compensated', False),
      ('bernoulli', 'float32', 'nearest', True),
  )
  def test_to_the_bit(self, side, dtype, rounding, scanned):
    # Seven steps of links of three end in an unfinished one.
    sketch = bl.sketches.gaussian() if side == 'left' else None
    policy = make_policy(
        side, sketch=sketch, rounding=rounding, alpha=3.0, warmup=2
    )
    self.check(policy, dtype, scanned)

  def test_apart_from_what_is_around_a_step(self):
    """Here a compiler would fuse Adam with the product, in a run alone."""
    self.check(make_policy('left', alpha=3.0), 'float32', True)

  @parameterized.product(
      side=('left', 'right', 'bernoulli'),
      dtype=('float32', 'bfloat16'),
      rounding=ROUNDINGS,
      scanned=(True, False),
  )
  @pytest.mark.slow
  def test_to_the_bit_otherwise(self, side, dtype, rounding, scanned):
    policy = make_policy(
        side, sketch=bl.sketches.gaussian(), rounding=rounding, alpha=3.0
    )
    self.check(policy, dtype, scanned)

  @parameterized.parameters(
      dict(sketch=bl.sketches.rademacher()),
      dict(shared_coin=True, prob=0.3),
      dict(resample=False, reset_optimizer=False),
      dict(rank=8),  # Above some sides.
      dict(period=1),
  )
  @pytest.mark.slow
  def test_other_policies(self, **fields):
    policy = make_policy('bernoulli', rounding='stochastic', **fields)
    self.check(policy, 'bfloat16', True)

  def test_wider(self):
    with jax.enable_x64(True):
      self.check(make_policy('left'), 'float64', False)

  def test_frames_that_are_shared(self):
    key, params = jax.random.key(3), {}
    for name, shape in {'q': (6, 8), 'k': (6, 4)}.items():
      params[name] = {'kernel': jax.random.normal(key, shape)}
    policy = bl.ChainPolicy.rac(2, 2, 'left', shared_frames=('^(q|k)/',))
    chain = adapters.make_chain(
        policy, optax.sgd(0.1), sketched=True, keeps='step'
    )
    loss = inject.by_product(
        lambda p, x: (
            sum(jnp.sum(jnp.sin(x @ p[k]['kernel'])) for k in p),
            None,
        )
    )
    state, links = chain.init(KEY, params), []
    for i in range(3):
      x = jax.random.normal(jax.random.key(i), (4, 6))
      state, _ = jax.jit(lambda s, x: chain.step(s, loss, x))(state, x)
      links.append(recipes.trained_factors(state, chain))
    frames = state.factors
    np.testing.assert_array_equal(
        frames['q/kernel']['left'], frames['k/kernel']['left']
    )
    recipe = recipes.make_recipe(params, chain, KEY, links, state)
    again = through_disk(recipe)
    self.assertEqual(hash(again.policy), hash(policy))
    chex.assert_trees_all_equal(replay_strictly(params, again), state.params)

  @pytest.mark.slow
  def test_links_that_end_between_steps(self):
    """As in runs of large weights: each by `next_link`."""
    policy = make_policy(
        'bernoulli', sketch=bl.sketches.gaussian(), rounding='stochastic'
    )
    chain = adapters.make_chain(
        policy, optax.adam(0.02), STACK, sketched=True, keeps='step'
    )
    base, loss, links = make_base('bfloat16'), inject.by_product(model), []
    step = jax.jit(lambda s: adapters.move_factors(chain, s, loss, x)[0])
    x, state = jnp.ones((4, 8), jnp.bfloat16), chain.init(KEY, base)
    for i in range(7):
      if i and i % 3 == 0:
        state = adapters.next_link(chain, state)
      state = step(state)
      links.append(recipes.trained_factors(state, chain))
    recipe = recipes.make_recipe(base, chain, KEY, links, state)
    chex.assert_trees_all_equal(replay_strictly(base, recipe), state.params)

  @parameterized.parameters(True, False)
  @pytest.mark.slow
  def test_of_a_decoder(self, scan_layers):
    config = decoder.DecoderConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        scan_layers=scan_layers,
    )
    tokens = jax.random.randint(jax.random.key(1), (7, 2, 6), 0, 13)
    params = decoder.Decoder(config).init(KEY, tokens[0])['params']
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nn.unbox(params))
    chain = adapters.make_chain(
        make_policy(
            'bernoulli', sketch=bl.sketches.gaussian(), rounding='stochastic'
        ),
        bl.column_adam(0.02),
        decoder.matrices(config),
        sketched=True,
        keeps='step',
    )
    loss = inject.by_product(decoder.make_loss(config, 4))
    step = jax.jit(lambda s, x: chain.step(s, loss, {'tokens': x})[0])
    state, links = chain.init(KEY, params), []
    for batch in tokens:
      state = step(state, batch)
      links.append(recipes.trained_factors(state, chain))
    recipe = recipes.make_recipe(params, chain, KEY, links, state)
    chex.assert_trees_all_equal(replay_strictly(params, recipe), state.params)

  def test_another_step_is_seen(self):
    base = make_base('bfloat16')
    policy = make_policy(
        'left', sketch=bl.sketches.gaussian(), rounding='stochastic'
    )
    recipe, final = made(policy, 'step', base)
    first, second, *rest = recipe.links
    other = recipe._replace(links=(second, first, *rest))
    with self.assertWarnsRegex(UserWarning, 'Replayed weights of checksum'):
      replayed = recipes.replay(base, other)
    self.assertTrue(np.any(replayed['a'] != final['a']))


class LinksTest(parameterized.TestCase):
  """One factor a link: the run's weights to a bound."""

  def bound(self, steps, base):
    """Returns {path: what weights may differ by}, from the increments."""
    sizes = steps._replace(
        links=tuple(jax.tree.map(np.abs, link) for link in steps.links)
    )
    num_steps, num_links = 7, 3
    eps = float(jnp.finfo(base['a'].dtype).eps)
    rounding = steps.policy.rounding
    if base['a'].dtype == jnp.float32:  # Whose sums have no digits to spare.
      rounding = 'nearest'
    count = {
        'nearest': (num_steps + num_links) / 2,
        'stochastic': num_steps + num_links,
        'compensated': 1 + (num_steps + num_links) * eps / 2,
    }[rounding]
    links = recipes.link_factors(sizes, base)
    terms = steps.policy.period + 2 * steps.policy.rank + 2
    bounds = {}
    for path in links[0]:
      change = sum(
          np.abs(link[path]['left']) @ np.abs(link[path]['right'])
          for link in links
      )
      largest = np.abs(np.asarray(base[path], np.float64)) + change
      largest = largest.astype(base[path].dtype)
      bounds[path] = count * ulps(largest) + terms * 2.0**-24 * change
    return bounds

  @parameterized.parameters(
      ('left', 'bfloat16', 'nearest'),
      ('right', 'float32', 'nearest'),
  )
  def test_within_the_bound(self, side, dtype, rounding):
    self.check_within_the_bound(side, dtype, rounding)

  @parameterized.product(
      side=('left', 'right', 'bernoulli'),
      dtype=('float32', 'bfloat16'),
      rounding=ROUNDINGS,
  )
  @pytest.mark.slow
  def test_within_the_bound_otherwise(self, side, dtype, rounding):
    self.check_within_the_bound(side, dtype, rounding)

  def check_within_the_bound(self, side, dtype, rounding):
    base = make_base(dtype)
    # Coordinates are wide within a link: they lose nothing there.
    policy = make_policy(
        side, sketch=bl.sketches.gaussian(), rounding=rounding, alpha=3.0
    )
    recipe, final = made(policy, 'link', base)
    steps, same = made(policy, 'step', base)
    # What is kept moves nothing, but for what compilers fuse.
    chex.assert_trees_all_close(final, same, rtol=2**-20, atol=2**-20)
    self.assertLen(recipe.links, 3)
    replayed = replay_strictly(base, through_disk(recipe))
    largest = 0.0
    for path, bound in self.bound(steps, base).items():
      wide = lambda x: np.asarray(x, np.float64)
      error = np.abs(wide(replayed[path]) - wide(final[path])) / bound
      largest = max(largest, error.max())
    # Roundings hardly ever all fall to one side; remainders lose next to nothing.
    loses = rounding != 'compensated' or dtype == 'float32'
    least = 0.1 if loses else 0.0
    self.assertBetween(largest, least, 1.0)

  def steady(self, part, rounding, dtype, num_steps=15, size=64):
    """Returns weights of one and of a replay, moved by parts of an ulp each step.

    The frame is the identity: the rank is that of the side.
    """
    base = {'w': jnp.ones((size, size), dtype)}
    step = part * float(jnp.finfo(dtype).eps)
    chain = adapters.make_chain(
        make_policy(
            'left',
            rank=size,
            period=num_steps,
            rounding=rounding,
            sketch=bl.sketches.gaussian(),
        ),
        optax.sgd(step),
        sketched=True,
        keeps='link',
    )
    loss = inject.by_addition(
        lambda p, x: (-jnp.sum(p['w'].astype(jnp.float32)), None)
    )
    move = jax.jit(lambda s: chain.step(s, loss, None)[0])
    state = chain.init(KEY, base)
    for _ in range(num_steps):
      state = move(state)
    links = [recipes.trained_factors(state, chain)]
    recipe = recipes.make_recipe(base, chain, KEY, links, state)
    wide = lambda x: np.asarray(x['w'], np.float64)
    return wide(state.params), wide(recipes.replay(base, recipe))

  @parameterized.parameters('bfloat16', 'float32')
  def test_nearest_comes_near_the_bound(self, dtype):
    """Each step is just below half an ulp: the run loses all, a link keeps it."""
    final, replayed = self.steady(0.49, 'nearest', dtype)
    np.testing.assert_array_equal(final, 1)
    error = (replayed - final).max() / float(jnp.finfo(dtype).eps)
    # (15 + 1) / 2 is the bound; 15 times 0.49 is rounded to 7.
    self.assertEqual(error, 7)

  def test_stochastic_is_a_random_walk(self):
    """Steps of half an ulp have the most variance: 1 / 4 ulp^2 each."""
    final, replayed = self.steady(0.5, 'stochastic', 'bfloat16')
    error = (replayed - final) / float(jnp.finfo('bfloat16').eps)
    count = error.size
    deviation = np.sqrt(15 + 1) / 2
    # Of sixteen coins; five standard errors.
    self.assertLess(abs(error.mean()), 5 * deviation / np.sqrt(count))
    ratio = error.std() / deviation
    self.assertLess(abs(ratio - 1), 5 / np.sqrt(2 * count))
    self.assertLess(np.abs(error).max(), 16)

  def test_compensated_is_within_an_ulp(self):
    final, replayed = self.steady(0.3, 'compensated', 'bfloat16')
    error = (replayed - final) / float(jnp.finfo('bfloat16').eps)
    # 15 times 0.3 is a tie, which the remainders' rounding decides.
    np.testing.assert_array_equal(np.abs(error), 1)
    self.assertAlmostEqual(final.max(), 1 + 4.5 * 2.0**-7, delta=2.0**-8)

  def test_sums_of_increments_are_the_links(self):
    """Both recipes say the same: an adapter is made of either."""
    base = make_base()
    policy = make_policy('left')
    recipes_of = {
        keeps: made(policy, keeps, base)[0] for keeps in ('link', 'step')
    }
    links = [recipes.link_factors(x, base) for x in recipes_of.values()]
    chex.assert_trees_all_close(*links, rtol=1e-6, atol=1e-7)  # Sums of three.
    thin = export.of_links(links[0])
    final = made(policy, 'link', base)[1]
    for path, one in thin.items():
      change = np.asarray(final[path]) - np.asarray(base[path])
      # Ten roundings to float32 of weights below two.
      np.testing.assert_allclose(one.left @ one.right, change, atol=2e-6)

  @parameterized.parameters('left', 'bernoulli')
  def test_numbers_of_a_link(self, side):
    """r n or m r a matrix and link, those of the side that is frozen zero."""
    recipe, _ = made(make_policy(side), 'link', make_base())
    for link in recipe.links:
      sides = ('right',) if side == 'left' else ('left', 'right')
      paths = ('a', 'b', 'layers')
      self.assertEqual(set(link), {f'{s}:{p}' for s in sides for p in paths})
      if side == 'bernoulli':
        for path in paths:
          moved = [
              np.any(link[f'{s}:{path}'] != 0, axis=(-2, -1)) for s in sides
          ]
          np.testing.assert_array_equal(moved[0], ~moved[1])

  @parameterized.parameters('link', 'step')
  def test_resumed_within_a_link(self, keeps):
    """A state that was on the host goes on, and so does its recipe."""
    base = make_base('bfloat16')
    policy = make_policy('left', rounding='compensated')

    def through_host(state):
      if int(state.count) != 5:
        return state
      key = jax.random.key_data(state.key)
      state = jax.tree.map(np.array, state._replace(key=key))
      state = jax.tree.map(jnp.asarray, state)
      return state._replace(key=jax.random.wrap_key_data(state.key))

    whole = made(policy, keeps, base)
    parts = made(policy, keeps, base, through=through_host)
    chex.assert_trees_all_equal(parts[1], whole[1])
    chex.assert_trees_all_equal(parts[0].links, whole[0].links)
    self.assertEqual(parts[0].final, whole[0].final)


class RejectsTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(sketched=True, keeps='links'), "'links'"),
      (dict(keeps='link'), "in \\('',\\), got keeps='link'"),  # Of adapters.
  )
  def test_what_is_kept(self, fields, message):
    with self.assertRaisesRegex(ValueError, f'Expected keeps.*{message}'):
      adapters.make_chain(make_policy('left'), optax.sgd(1.0), **fields)

  def test_a_chain_that_keeps_none(self):
    chain = adapters.make_chain(
        make_policy('left'), optax.sgd(1.0), STACK, sketched=True
    )
    state = jax.eval_shape(chain.init, KEY, make_base())
    self.assertEqual(state.trained, ())
    with self.assertRaisesRegex(ValueError, "sketched chain.*got keeps=''"):
      recipes.trained_factors(state, chain)

  def test_a_step_that_is_missing(self):
    recipe, _ = made(make_policy('left'), 'step', make_base())
    recipe = recipe._replace(links=recipe.links[:3])  # As many as links.
    message = "Expected 7 links.*keeps='step', got 3"
    with self.assertRaisesRegex(ValueError, message):
      recipes.replay(make_base(), recipe)
    with self.assertRaisesRegex(ValueError, message):
      recipes.link_factors(recipe, make_base())

  def test_a_recipe_of_another_kind(self):
    recipe, _ = made(make_policy('left'), 'link', make_base())
    with self.assertRaisesRegex(ValueError, "keeps in .*got keeps='half'"):
      through_disk(recipe._replace(keeps='half'))
