"""Adam with one second moment a column: its steps, its law, what links leave of it."""

import functools
import json
import math
import os
import tempfile
from unittest import mock

from absl.testing import parameterized
import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import column_moments
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import restart
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import labels
from bernoulli_lora_jax.training import loop

B1, B2, EPS, RATE, PERIOD = 0.8, 0.9, 1e-3, 0.05, 3
KEY = jax.random.key(3)
# Square, of one column, stacked; a stack of as many layers as the rank.
SHAPES = {'a': (5, 4), 'b': (4, 4), 'c': (6, 1), 'stack': (2, 4, 6)}
MATRICES = bl.Matrices(rules=(bl.matrices.stacked('stack'),))
TX = bl.column_adam(RATE, B1, B2, EPS)


def problem(dtype=np.float64):
  """Returns params and batches (x, y) by path."""
  rng = np.random.default_rng(0)
  params = {path: rng.normal(size=s) for path, s in SHAPES.items()}
  data = {}
  for path, (*batch, m, n) in SHAPES.items():
    data[path] = rng.normal(size=(*batch, 7, m)), rng.normal(
        size=(*batch, 7, n)
    )
  cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
  return cast(params), cast(data)


def loss(params, data):
  return (
      sum(
          0.5 * jnp.sum((x @ params[path] - y) ** 2)
          for path, (x, y) in data.items()
      ),
      None,
  )


ADAPTED = inject.by_product(loss)


def make_chain(side='bernoulli', rank=2, tx=TX, sketched=False, **fields):
  policy = bl.ChainPolicy(rank=rank, side=side, period=PERIOD, **fields)
  return adapters.make_chain(policy, tx, MATRICES, sketched=sketched)


def states_of(chain, params, data, num_steps):
  """Returns the states at the start and after each step."""
  step = jax.jit(lambda state: chain.step(state, ADAPTED, data)[0])
  states = [chain.init(KEY, params)]
  for _ in range(num_steps):
    states.append(step(states[-1]))
  return states


def moments_of(state):
  """Returns the first moments with their count, and the second ones with theirs."""
  ours = state.opt_state[0]
  lasting = ours.lasting.state
  return (ours.mu, ours.count), (lasting.nu, lasting.count)


class Loop:
  """One matrix of the chain, in plain NumPy."""

  def __init__(self, weight, x, y, rank):
    self.weight, self.x, self.y = weight.copy(), x, y
    m, n = weight.shape
    self.nu = {'left': np.zeros(m), 'right': np.zeros(n)}
    self.seen = {'left': 0, 'right': 0}
    self.pair = {'left': np.zeros((m, rank)), 'right': np.zeros((rank, n))}
    self.begin('right', self.pair['left'])

  def begin(self, side, frozen):
    """Merges and begins a link that trains a side."""
    self.weight += self.pair['left'] @ self.pair['right']
    other = {'left': 'right', 'right': 'left'}[side]
    self.pair = {
        other: frozen,
        side: np.zeros_like(self.pair[side]),
    }
    self.side, self.steps = side, 0
    self.mu = {name: np.zeros_like(x) for name, x in self.pair.items()}

  def step(self):
    left, right = self.pair['left'], self.pair['right']
    residual = self.x @ (self.weight + left @ right) - self.y
    gradient = self.x.T @ residual
    side = self.side
    s = left.T @ gradient if side == 'right' else gradient @ right.T
    self.steps += 1
    self.seen[side] += 1
    columns = s if side == 'right' else s.T
    for j in range(columns.shape[1]):
      square = sum(float(z) ** 2 for z in columns[:, j]) / columns.shape[0]
      self.nu[side][j] = B2 * self.nu[side][j] + (1 - B2) * square
    self.mu[side] = B1 * self.mu[side] + (1 - B1) * s
    v = self.nu[side] / (1 - B2 ** self.seen[side])
    v = v[None, :] if side == 'right' else v[:, None]
    m = self.mu[side] / (1 - B1**self.steps)
    self.pair[side] = self.pair[side] - RATE * m / (np.sqrt(v) + EPS)


def _run(tx, grads):
  """Returns the updates of the last gradient, and what is kept of each factor."""
  state = tx.init(grads[0])
  updates = None
  for g in grads:
    updates, state = jax.jit(tx.update)(g, state)
  return updates, state.mu, state.lasting


class StepsTest(parameterized.TestCase):

  @parameterized.parameters('bernoulli', 'left', 'right')
  def test_equals_a_plain_loop(self, side):
    """Factors, moments and counts, over links, an entry of a stack by itself."""
    with jax.enable_x64(True):
      params, data = problem()
      states = states_of(make_chain(side), params, data, 4 * PERIOD)
      states = jax.device_get([s._replace(key=()) for s in states])
    trained = set()
    for path, (*batch, _, _) in SHAPES.items():
      for entry in np.ndindex(*batch):
        rank = states[0].factors[path]['left'].shape[-1]
        x, y = (np.asarray(z)[entry] for z in data[path])
        loop = Loop(np.asarray(params[path])[entry], x, y, rank)
        for step, state in enumerate(states[1:]):
          if step % PERIOD == 0:
            is_left = side == 'left'
            if side == 'bernoulli':
              is_left = bool(state.coins[path][entry])
            ours, other = ('right', 'left') if is_left else ('left', 'right')
            loop.begin(ours, state.factors[path][other][entry])
            trained.add((path, entry, ours))
          loop.step()
          (mu, count), (nu, seen) = moments_of(state)
          for name in mu[path]:
            found = (
                state.factors[path][name][entry],
                mu[path][name][entry],
                nu[path][name][entry],
            )
            wanted = loop.pair[name], loop.mu[name], loop.nu[name]
            for got, want in zip(found, wanted, strict=True):
              # Sums in another order, through 12 steps of float64.
              np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
            self.assertEqual(seen[path][name][entry], loop.seen[name])
            self.assertEqual(count, loop.steps)
    if side == 'bernoulli':  # Both sides of most, or nothing was told apart.
      self.assertGreater(len(trained), 7)

  @parameterized.parameters(
      (np.float32, False), (jnp.bfloat16, False), (jnp.bfloat16, True)
  )
  def test_frozen_is_untouched(self, dtype, sketched):
    """Its moments, second ones too, are the same to the bit."""
    params, data = problem(dtype)
    chain = make_chain(sketched=sketched, rounding='stochastic')
    states = states_of(chain, params, data, 4 * PERIOD)
    for leaf in jax.tree.leaves(moments_of(states[-1])):
      self.assertIn(leaf.dtype, (jnp.float32, jnp.int32))  # Of any base.
    stayed = 0
    for step in range(1, len(states)):
      before, after = (
          moments_of(states[step - 1])[1],
          moments_of(states[step])[1],
      )
      for path, coin in states[step].coins.items():
        for name, frozen in (('left', coin), ('right', ~coin)):
          for old, new in zip(before, after, strict=True):
            old, new = (np.asarray(x[path][name]) for x in (old, new))
            is_same = (old == new).reshape(*coin.shape, -1).all(-1)
            np.testing.assert_array_equal(is_same, frozen)
          stayed += np.sum(frozen)
    self.assertEqual(stayed, 4 * PERIOD * 5)  # One side of five matrices.

  @parameterized.parameters('begin_link', 'merge', 'next_link')
  def test_a_link_restarts_the_first_moment_alone(self, name):
    params, data = problem(np.float32)
    chain = make_chain()
    state = states_of(chain, params, data, PERIOD)[-1]
    (mu, count), lasting = jax.device_get(moments_of(state))
    self.assertGreater(max(np.max(x) for x in jax.tree.leaves(mu)), 0)
    self.assertEqual(count, PERIOD)
    after = getattr(adapters, name)(chain, state)
    fresh, kept = jax.device_get(moments_of(after))
    chex.assert_trees_all_equal(kept, lasting)
    chex.assert_trees_all_equal(fresh, jax.tree.map(np.zeros_like, (mu, count)))

  def test_without_restarts_all_go_on(self):
    params, data = problem(np.float32)
    chain = make_chain('left', reset_optimizer=False)
    state = states_of(chain, params, data, PERIOD + 1)[-1]
    for _, count in moments_of(state):
      for steps in jax.tree.leaves(count):
        np.testing.assert_array_equal(steps, PERIOD + 1)

  @parameterized.parameters('left', 'right', 'bernoulli')
  def test_sketched_takes_the_same_steps(self, side):
    with jax.enable_x64(True):
      params, data = problem()
      merged, nus = [], []
      for sketched in (False, True):
        chain = make_chain(side, sketched=sketched)
        state = states_of(chain, params, data, 50)[-1]
        merged.append(chain.params(state))
        nus.append(moments_of(state)[1])
      # Sums in another order, through fifty steps; weights are of order one.
      chex.assert_trees_all_close(*merged, rtol=0, atol=1e-9)
      chex.assert_trees_all_close(*nus, rtol=1e-7)
      for path, weight in params.items():
        self.assertGreater(float(jnp.abs(merged[0][path] - weight).max()), 0.1)

  @parameterized.parameters('left', 'right', 'bernoulli')
  @pytest.mark.slow
  def test_modes_and_layouts_of_a_decoder(self, side):
    """Fifty steps in float64: sketched or not, layers scanned or unrolled."""
    tokens = jax.random.randint(jax.random.key(1), (50, 2, 6), 0, 13)
    shapes = dict(vocab_size=13, hidden_size=8, intermediate_size=12)
    shapes |= dict(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
    policy = bl.ChainPolicy(rank=3, side=side, period=5)
    with jax.enable_x64(True):
      for scan_layers in (True, False):
        config = decoder.DecoderConfig(**shapes, scan_layers=scan_layers)
        params = decoder.Decoder(config).init(KEY, tokens[0])['params']
        params = jax.tree.map(lambda x: x.astype(jnp.float64), nn.unbox(params))
        adapted = inject.by_product(decoder.make_loss(config, 4))
        found = []
        for sketched in (False, True):
          chain = adapters.make_chain(
              policy,
              bl.column_adam(0.005),
              decoder.matrices(config),
              sketched=sketched,
          )
          step = jax.jit(
              lambda s, x, c=chain, a=adapted: c.step(s, a, {'tokens': x})
          )
          state, values = chain.init(KEY, params), []
          for x in tokens:
            state, (value, _) = step(state, x)
            values.append(float(value))
          found.append((values, chain.params(state)))
        # Sums in another order, through fifty steps.
        chex.assert_trees_all_close(*found, rtol=0, atol=1e-9)
        layers = 'layers' if scan_layers else 'layers_0'
        moved = optax.tree.sub(found[0][1][layers], params[layers])
        self.assertGreater(optax.tree.max(jax.tree.map(jnp.abs, moved)), 1e-2)

  def test_scanned_is_unrolled(self):
    """An entry of a stack has the moments that it has by itself."""
    tx = bl.scale_by_column_moments()
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    grads = [{'left': draw(2, 5, 3), 'right': draw(2, 3, 4)} for _ in range(3)]
    run = functools.partial(_run, tx)
    stacked = run([{'a': g} for g in grads])
    entry_of = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    for i in range(2):
      alone = run([{'a': entry_of(g, i)} for g in grads])
      # Fused otherwise.
      chex.assert_trees_all_close(alone, entry_of(stacked, i), rtol=1e-6)

  def test_jit_equals_eager_and_dtypes_stay(self):
    tx = bl.scale_by_column_moments()
    for dtype in (jnp.float32, jnp.bfloat16):
      grads = {
          'a': {
              'left': jnp.ones((3, 2), dtype),
              'right': jnp.ones((2, 4), dtype),
          }
      }
      state = tx.init(grads)
      eager, after = tx.update(grads, state)
      chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
      chex.assert_trees_all_equal_shapes_and_dtypes(eager, grads)
      self.assertEqual(after.mu['a']['left'].dtype, jnp.float32)
      compiled, _ = jax.jit(tx.update)(grads, state)
      chex.assert_trees_all_close(compiled, eager, rtol=1e-6)  # Fused.
      # The first step of Adam is the gradient's sign.
      chex.assert_trees_all_close(eager, grads, rtol=1e-4)


class StateTest(parameterized.TestCase):
  """What the rule of restarts sees of it, what it takes, where it lies."""

  @parameterized.parameters(
      ({'left': (1, 1), 'right': (1, 1)},),
      ({'left': (3, 3), 'right': (3, 3)},),
      ({'right': (1, 4)},),  # As many numbers as its moments.
      ({'left': (4, 1)},),
      # The second moments of two layers are as a factor of rank 2.
      ({'right': (2, 2, 4)}, {'right': (2, 4)}),
      ({'left': (2, 5, 2)}, {'left': (2, 5)}),
      ({'left': (3, 2), 'right': (2, 3)}, {'left': (2, 2, 3, 2)}),
  )
  def test_shapes_that_coincide(self, *shapes):
    pairs = {
        f'p{i}': {side: jnp.ones(shape) for side, shape in pair.items()}
        for i, pair in enumerate(shapes)
    }
    mask = jax.tree.map(lambda _: True, pairs)
    is_ours = lambda x: isinstance(x, bl.ScaleByColumnMomentsState)
    nodes = lambda tree: jax.tree.leaves(tree, is_leaf=is_ours)
    by_side = {
        path: {side: side for side in pair} for path, pair in pairs.items()
    }
    ours = bl.scale_by_column_moments()
    for tx in (
        ours,
        bl.column_adam(lambda count: 0.1),
        optax.masked(ours, mask),
        optax.partition(dict.fromkeys(pairs['p0'], ours), by_side),
        optax.apply_if_finite(bl.column_adam(0.1), 3),
        optax.inject_hyperparams(bl.scale_by_column_moments)(eps=1e-3),
    ):
      fresh = tx.init(pairs)
      restart.check(tx, fresh, pairs)
      old = jax.tree.map(lambda x: x + 7, fresh)
      new = restart.restart(fresh, old, pairs)
      for got, at_first, before in zip(
          *map(nodes, (new, fresh, old)), strict=True
      ):
        if is_ours(got):
          chex.assert_trees_all_equal(
              got, at_first._replace(lasting=before.lasting)
          )
        else:  # Schedules, failures.
          chex.assert_trees_all_equal(got, before)

  def test_memory(self):
    """Of a left link r n + n numbers and a count, where Adam has 2 r n."""
    m, n, r, layers = 40, 24, 8, 3
    params = {'stack': jnp.zeros((layers, m, n))}

    def size(tx, side):
      policy = bl.ChainPolicy(rank=r, side=side, period=PERIOD)
      chain = adapters.make_chain(policy, tx, MATRICES, sketched=True)
      state = jax.eval_shape(chain.init, KEY, params).opt_state
      return sum(math.prod(x.shape) for x in jax.tree.leaves(state))

    ours = bl.column_adam(0.1)
    self.assertEqual(size(ours, 'left'), layers * (r * n + n + 1) + 1)
    self.assertEqual(size(ours, 'right'), layers * (m * r + m + 1) + 1)
    both = layers * (r * n + n + m * r + m + 2) + 1
    self.assertEqual(size(ours, 'bernoulli'), both)
    self.assertEqual(size(optax.adam(0.1), 'left'), 2 * layers * r * n + 1)

  @parameterized.parameters(False, True)
  def test_resumes_to_the_bit(self, sketched):
    params, data = problem(np.float32)
    chain = make_chain(sketched=sketched)
    step = jax.jit(lambda state: chain.step(state, ADAPTED, data)[0])
    cut = 2 * PERIOD + 1  # Within a link.
    states = states_of(chain, params, data, 4 * PERIOD)
    raw = lambda s: s._replace(key=jax.random.key_data(s.key))
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, 'state')
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, raw(states[cut]))
        checkpointer.wait_until_finished()
        state = checkpointer.restore(path, raw(states[0]))
    state = state._replace(key=jax.random.wrap_key_data(state.key))
    for _ in range(cut, 4 * PERIOD):
      state = step(state)
    chex.assert_trees_all_equal(raw(state), raw(states[-1]))

  def test_explicit_mesh(self):
    """Weights split over devices: the steps of one device."""
    params, data = problem(np.float32)
    mesh = jax.make_mesh((2,), ('x',))  # Its axes are explicit.
    spec = {'a': (None, 'x'), 'b': ('x', None), 'c': ('x', None)}
    spec['stack'] = (None, 'x', None)
    placed = {
        path: jax.device_put(w, jax.NamedSharding(mesh, jax.P(*spec[path])))
        for path, w in params.items()
    }
    chain = make_chain()
    wanted = chain.params(states_of(chain, params, data, PERIOD + 2)[-1])
    # What the model itself does is its own: W is whole where it is multiplied.
    whole = lambda w: jax.sharding.reshard(
        w, jax.NamedSharding(mesh, jax.P(*[None] * w.ndim))
    )
    spread = inject.by_addition(lambda p, d: loss(jax.tree.map(whole, p), d))
    data = jax.device_put(data, jax.NamedSharding(mesh, jax.P()))
    state = chain.init(KEY, placed)
    step = jax.jit(lambda state: chain.step(state, spread, data)[0])
    for _ in range(PERIOD + 2):
      state = step(state)
    found = chain.params(state)
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(wanted), rtol=1e-4, atol=1e-5
    )
    for path in placed:
      self.assertEqual(jax.typeof(found[path]), jax.typeof(placed[path]))
    for leaf in jax.tree.leaves(state.opt_state):
      self.assertTrue(leaf.sharding.is_fully_replicated)


def gradient(m, n, seed=0):
  """Returns columns with few large features, Gaussian ones, and a flat one."""
  g = np.random.default_rng(seed).normal(size=(m, n))
  g[1, 0] *= 30
  g[[2, 5], 1] *= 10
  g[:, -1] = 0.7
  return g


def variances(g, r):
  """Returns the variances of the mean square, by column: of rotations, coordinates.

  The formulas of the module.
  """
  m = g.shape[0]
  norm = np.sum(g**2, 0)
  k = np.sum(g**4, 0) / norm**2
  rotations = norm**2 * 2 * (m - r) / (r * m**2 * (m + 2))
  coordinates = norm**2 * (m - r) * (k * m - 1) / (r * m**2 * (m - 1))
  return rotations, coordinates


class LawTest(parameterized.TestCase):
  """The second moment over random frames, within five standard errors."""

  M, R, NUM = 16, 4, 20_000

  def draws(self, name, g, side):
    """Returns the mean squares of many frames, (NUM, columns), in float64."""
    sketch, m = sketches.by_name(name), g.shape[0]
    keys = jax.random.split(jax.random.key(5), self.NUM)
    draw = lambda key: sketch.frame(key, m, self.R)
    frames = np.asarray(jax.jit(jax.vmap(draw))(keys), np.float64)
    with jax.enable_x64(True):
      s = jnp.einsum('kmr,mn->krn', frames, g)
      s = s if side == 'right' else s.mT  # (G^T Q) of the other side.
      return np.asarray(column_moments.mean_squares(s, side))

  def assert_mean(self, x, wanted):
    error = x.std(0) / math.sqrt(len(x))
    # A flat column varies by the frames' rounding alone.
    np.testing.assert_array_less(
        np.abs(x.mean(0) - wanted), 5 * error + 1e-5 * wanted
    )

  def assert_variance(self, x, wanted):
    c = x - x.mean(0)
    var, fourth = np.mean(c**2, 0), np.mean(c**4, 0)
    error = np.sqrt(np.maximum(fourth - var**2, 0) / len(x))
    np.testing.assert_array_less(
        np.abs(var - wanted), 5 * error + 1e-9 * np.mean(x, 0) ** 2
    )
    # Errors by which the formulas of another law would be seen.
    np.testing.assert_array_less(error[:-1], 0.06 * wanted[:-1])

  @parameterized.product(
      name=('gaussian', 'rademacher', 'coordinate', 'srht'),
      side=('left', 'right'),
  )
  def test_isotropic_frames_do_not_disturb_it(self, name, side):
    g = gradient(self.M, 5)
    x = self.draws(name, g, side)
    self.assert_mean(x, np.sum(g**2, 0) / self.M)

  @parameterized.parameters('gaussian', 'coordinate')
  def test_variance(self, name):
    """Of coordinates larger where few features carry a column, and only there."""
    g = gradient(self.M, 5)
    rotations, coordinates = variances(g, self.R)
    k = np.sum(g**4, 0) / np.sum(g**2, 0) ** 2
    np.testing.assert_array_equal(coordinates > rotations, k > 3 / (self.M + 2))
    self.assertGreater(coordinates[0], 7 * rotations[0])
    self.assertLess(coordinates[-1], 1e-9 * rotations[-1])
    # One feature alone.
    alone = np.zeros((self.M, 1))
    alone[3] = 2.0
    ratio = np.divide(*variances(alone, self.R)[::-1])
    np.testing.assert_allclose(ratio, (self.M + 2) / 2)
    wanted = {'gaussian': rotations, 'coordinate': coordinates}[name]
    self.assert_variance(self.draws(name, g, 'right'), wanted)

  def test_over_the_links_of_a_run(self):
    """Of a chain whose gradient is constant, vmapped over its keys."""
    m, r, period, num_links, num_keys = 6, 2, 4, 10, 4_000
    g = gradient(m, 4)
    policy = bl.ChainPolicy(
        rank=r, side='left', period=period, sketch=sketches.coordinate()
    )
    chain = adapters.make_chain(
        policy, bl.column_adam(1e-3, B1, B2), sketched=True
    )
    slope = inject.by_product(lambda p, x: (jnp.sum((x @ p['kernel']) * g), 0))

    def run(key):
      state = chain.init(key, {'kernel': jnp.zeros((m, 4))})
      one = lambda s, _: (chain.step(s, slope, jnp.eye(m))[0], None)
      state, _ = jax.lax.scan(one, state, length=period * num_links)
      (second,) = moments_of(state)[1][0].values()
      return second['right']

    keys = jax.random.split(jax.random.key(6), num_keys)
    x = np.asarray(jax.jit(jax.vmap(run))(keys), np.float64)
    steps = period * num_links
    whole = 1 - B2**steps
    self.assert_mean(x / whole, np.sum(g**2, 0) / m)
    decay = B2**period
    spread = (1 - decay) / (1 + decay) * (1 - B2 ** (2 * steps))
    self.assert_variance(x, spread * variances(g, r)[1])


def make_config(**overrides):
  """Sketched Bernoulli-LoRA on digits: 24 steps, links of 5."""
  config = base_config.get_config()
  config.task.hidden = (16,)
  config.task.pretrain_epochs = 1
  config.method.sketch = 'coordinate'  # A QR takes long to compile.
  config.method.mode = 'sketched'
  config.method.rank = 2
  config.method.period = 5
  config.method.optimizer = 'column'
  config.method.learning_rate = 0.02
  config.training.num_steps = 24
  config.training.num_evals = 3
  config.training.checkpoint_every = 8
  config.training.progress = False
  names = {k.replace('__', '.'): v for k, v in overrides.items()}
  return experiment.apply_overrides(config, names)


class RunTest(parameterized.TestCase):
  """Chosen by a config."""

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  @pytest.mark.slow
  def test_resume_is_bit_identical(self):
    config = make_config()
    program, num_next = experiment.make_program(config), loop._num_next

    def train(name, *args):
      experiment.train(config, self.tmp / name, *args)
      text = (self.tmp / name / 'metrics.jsonl').read_text()
      return [json.loads(line) for line in text.splitlines()]

    whole = train('whole', program)

    def interrupted(program, progress):
      if progress.step >= 16:  # Within a link.
        raise KeyboardInterrupt
      return num_next(program, progress)

    with mock.patch.object(loop, '_num_next', interrupted):
      with self.assertRaises(KeyboardInterrupt):
        train('cut', program)
    self.assertEqual(train('cut'), whole)
    losses = [line['train_loss'] for line in whole]
    self.assertLess(losses[-1], losses[0])

  def test_others_have_moments_of_their_own_size(self):
    config = make_config(method__others='bias')
    others = arguments.make_others(config, 0.1)
    state = others['bias'].init({'bias': jnp.zeros(3)})
    adam = optax.tree.get(state, 'nu')
    self.assertEqual(adam['bias'].shape, (3,))
    state = arguments.make_optimizer(config, 0.1).init(
        {'a': {'left': jnp.zeros((3, 2))}}
    )
    self.assertEqual(optax.tree.get(state, 'nu')['a']['left'].shape, (3,))

  def test_its_name(self):
    self.assertIn('column Adam', labels.name(make_config().to_dict()))

  @parameterized.parameters(
      (
          dict(method__mode='gradient'),
          "mode 'adapter' or 'sketched'.*'column'.*got mode='gradient'",
      ),
      (
          dict(method__mode='adapter', federated__num_clients=2),
          "federated runs, got 'column'",
      ),
      (dict(method__optimizer='columns'), "'adamw', 'column'.*'columns'"),
  )
  def test_where_it_cannot_be(self, overrides, message):
    config = make_config(**overrides)
    with self.assertRaisesRegex(ValueError, message):
      experiment.make_method(config, arguments.make_task(config))


class RefusalTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(b1=1.0), r'Expected b1 in \[0, 1\), got b1=1.0'),
      (dict(b2=-0.1), r'Expected b2 in \[0, 1\), got b2=-0.1'),
      (dict(eps=-1.0), r'Expected eps in \[0, inf\), got eps=-1.0'),
  )
  def test_arguments(self, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      bl.scale_by_column_moments(**kwargs)

  @parameterized.parameters(
      ({'kernel': jnp.ones((3, 2))},),
      ({'a': {'left': jnp.ones(3)}},),
      (jnp.ones((3, 2)),),
  )
  def test_leaves_that_are_no_factors(self, tree):
    with self.assertRaisesRegex(ValueError, 'Expected thin factors.*shape='):
      bl.scale_by_column_moments().init(tree)

  def test_gradient_mode(self):
    tx = bl.scale_by_bernoulli_chain(
        KEY, rank=2, period=2, inner=bl.scale_by_column_moments()
    )
    with self.assertRaisesRegex(ValueError, 'inner whose moments restart'):
      tx.init({'kernel': jnp.ones((4, 4))})

  def test_clients(self):
    rounds = averaging.federated_adapters(
        bl.ChainPolicy.bernoulli(2, 3), TX, num_clients=2
    )
    with self.assertRaisesRegex(ValueError, 'those of clients are not sent'):
      rounds.init(KEY, {'kernel': jnp.ones((4, 4))})


if __name__ == '__main__':
  pytest.main([__file__])
