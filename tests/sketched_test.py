"""Tests of A4: chains that move W at each step and have no adapter in the loss."""

import dataclasses
from unittest import mock
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
from bernoulli_lora_jax import factors
from bernoulli_lora_jax import fused
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import links
from bernoulli_lora_jax import lowrank
from bernoulli_lora_jax import policies
from bernoulli_lora_jax import rounding
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import programs

_COORDINATE = bl.sketches.coordinate()
_SGD, _ADAM = optax.sgd(0.3), optax.adam(0.02)
_SHAPES = dict(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)


def _config(**fields):
  return decoder.DecoderConfig(**{**_SHAPES, **fields})


def _params(config, dtype=jnp.float64):
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = decoder.Decoder(config).init(jax.random.key(0), tokens)['params']
  return jax.tree.map(lambda x: x.astype(dtype), nn.unbox(params))


def _batches(count, shape=(2, 6)):
  tokens = jax.random.randint(jax.random.key(1), (count, *shape), 0, 13)
  return [{'tokens': x} for x in tokens]


def _policy(side, rank=3, period=1, **fields):
  return bl.ChainPolicy(rank=rank, period=period, side=side, **fields)


def _chain(config, policy, tx, **kwargs):
  select = decoder.matrices(config)
  return adapters.make_chain(policy, tx, select, **kwargs)


def _trained(chain, config, params, batches):
  """Returns the state after the batches, and the losses."""
  loss = inject.by_product(decoder.make_loss(config, 4))
  step = jax.jit(lambda s, b: chain.step(s, loss, b))
  state, values = chain.init(jax.random.key(2), params), []
  for batch in batches:
    state, (value, _) = step(state, batch)
    values.append(float(value))
  return state, values


def _equations(jaxpr):
  """Yields the equations of a program and of all programs within."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'jaxpr')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _equations(inner)


def _products(jaxpr):
  """Returns (lengths summed over, numbers of the result) of all products."""
  found = []
  for eqn in _equations(jaxpr):
    if eqn.primitive.name == 'dot_general':
      (summed, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      found.append(({shape[axis] for axis in summed}, eqn.outvars[0].aval.size))
  return found


class LeaveTest(parameterized.TestCase):

  @parameterized.parameters(
      ('left', 'gaussian'), ('bernoulli', 'gaussian'), ('left', 'coordinate')
  )
  def test_no_factors_leave(self, side, sketch):
    """They are zero: an adapter of them would be of nothing."""
    policy = _policy(side, sketch=bl.sketches.by_name(sketch))
    chain = adapters.make_chain(policy, _SGD, sketched=True)
    state = chain.init(jax.random.key(0), {'kernel': jnp.ones((5, 4))})
    with self.assertRaisesRegex(ValueError, 'sketched=True.*of_change'):
      export.of_state(chain, state)


class SameStepsTest(parameterized.TestCase):

  def assert_same(self, policy, tx, num_steps, micro=1, **fields):
    with jax.enable_x64(True):
      config = _config(**fields)
      params, batches = _params(config), _batches(num_steps)
      chain = _chain(config, policy, tx)
      adapter, ours = _trained(chain, config, params, batches)
      sketched = _chain(
          config, policy, tx, sketched=True, num_micro_batches=micro
      )
      state, values = _trained(sketched, config, params, batches)
      np.testing.assert_allclose(values, ours, rtol=1e-9)
      merged = chain.params(adapter)
      # Sums in another order, through fifty steps.
      chex.assert_trees_all_close(
          sketched.params(state), merged, rtol=0, atol=1e-9
      )
      change = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), merged, params)
      moved = jax.tree.leaves(
          change['layers' if config.scan_layers else 'layers_0']
      )
      self.assertGreater(max(map(float, moved)), 1e-2)

  def test_left(self):
    self.assert_same(_policy('left', period=5), _ADAM, 12, scan_layers=True)

  def test_a_coin_a_matrix(self):
    policy = _policy('bernoulli', period=2)
    self.assert_same(policy, _ADAM, 8, scan_layers=False)

  @pytest.mark.slow
  def test_clipped_and_in_micro_batches(self):
    """Clipped by the thin gradients; gradients of parts are added, W moves once."""
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.3))
    policy = _policy('left', period=3)
    self.assert_same(policy, tx, 6, micro=2, scan_layers=True)

  def test_coordinates_with_coins(self):
    policy = _policy('bernoulli', period=2, sketch=_COORDINATE, alpha=6.0)
    loss = inject.by_product(
        lambda p, x: (jnp.sum(jnp.sin(jnp.sin(x @ p['a']) @ p['b'])), None)
    )
    found = []
    with jax.enable_x64(True):
      params = {
          name: jax.random.normal(jax.random.key(i), shape, jnp.float64)
          for i, (name, shape) in enumerate({'a': (6, 8), 'b': (8, 5)}.items())
      }
      for sketched in (True, False):
        chain = adapters.make_chain(policy, _ADAM, sketched=sketched)
        state = chain.init(jax.random.key(2), params)
        step = jax.jit(lambda s, x, chain=chain: chain.step(s, loss, x)[0])
        for i in range(8):
          x = jax.random.normal(jax.random.key(i), (4, 6), jnp.float64)
          state = step(state, x)
        found.append(chain.params(state))
      # Sums in another order, through eight steps.
      chex.assert_trees_all_close(*found, rtol=0, atol=1e-12)
      self.assertGreater(float(jnp.abs(found[0]['a'] - params['a']).max()), 0.1)

  @parameterized.product(
      side=('left', 'right', 'bernoulli'),
      scan_layers=(True, False),
      with_adam=(True, False),
      remat=('none', 'full'),
      sketch=('gaussian', 'coordinate'),
  )
  @pytest.mark.slow
  def test_fifty_steps(self, side, scan_layers, with_adam, remat, sketch):
    sketch = bl.sketches.by_name(sketch)
    policy = _policy(side, period=5 if with_adam else 1, sketch=sketch)
    tx = _ADAM if with_adam else _SGD
    self.assert_same(policy, tx, 50, scan_layers=scan_layers, remat=remat)

  @parameterized.parameters(
      dict(sketch=_COORDINATE, frame='raw'),
      dict(sketch=_COORDINATE, rank=7, alpha=6.0),  # Above some sides.
      dict(sketch=_COORDINATE, reset_optimizer=False, resample=False),
      dict(sketch=bl.sketches.weighted_coordinate(0.1), shared_coin=True),
      dict(shared_coin=True),
      dict(alpha=6.0),
      dict(frame='raw'),
      dict(warmup=2),
      dict(rank=7),  # Above some sides.
      dict(reset_optimizer=False, resample=False),
      dict(prob=1.0),
  )
  @pytest.mark.slow
  def test_other_policies(self, **fields):
    policy = _policy('bernoulli', period=4, **fields)
    self.assert_same(policy, _ADAM, 10, scan_layers=False)

  @parameterized.parameters('gaussian', 'coordinate')
  @pytest.mark.slow
  def test_gradient_mode(self, sketch):
    """With a period of one and SGD a step is that of A1."""
    sketch = bl.sketches.by_name(sketch)
    with jax.enable_x64(True):
      config = _config(scan_layers=True)
      params, batches = _params(config), _batches(4)
      policy = _policy('bernoulli', sketch=sketch)
      chain = _chain(config, policy, _SGD, sketched=True)
      state, _ = _trained(chain, config, params, batches)
      tx = bl.scale_by_bernoulli_chain(
          jax.random.key(2),
          rank=3,
          matrices=decoder.matrices(config),
          sketch=sketch,
      )
      mask = bl.matrices.mask(params, decoder.matrices(config))
      tx = optax.chain(
          tx,
          optax.masked(
              optax.set_to_zero(), jax.tree.map(lambda x: not x, mask)
          ),
          optax.sgd(0.3),
      )
      loss = decoder.make_loss(config, 4)
      opt_state = tx.init(params)
      for batch in batches:
        grads = jax.grad(lambda p, b=batch: loss(p, b, None)[0])(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
      chex.assert_trees_all_close(chain.params(state), params, atol=1e-12)


class ProgramTest(parameterized.TestCase):
  """What a step computes and keeps: neither x^T dy nor, on the left, x."""

  TOKENS = 7, 11  # Rows and positions: lengths that nothing else has.

  def _step(self, sketched, side='left', sketch='gaussian', **fields):
    config = _config(**fields)
    policy = _policy(side, sketch=bl.sketches.by_name(sketch))
    chain = _chain(config, policy, _SGD, sketched=sketched)
    state = chain.init(jax.random.key(2), _params(config, jnp.float32))
    loss = inject.by_product(decoder.make_loss(config, 4))
    batch = {'tokens': jnp.zeros(self.TOKENS, jnp.int32)}
    return lambda s: chain.step(s, loss, batch), state

  @parameterized.product(side=('left', 'right'), scan_layers=(True, False))
  def test_no_gradient_of_full_size(self, side, scan_layers):
    step, state = self._step(True, side, scan_layers=scan_layers)
    found = _products(jax.make_jaxpr(step)(state).jaxpr)
    self.assertGreater(len(found), 10)
    # 8 x 4 is the smallest kernel that is selected.
    over_tokens = [size for summed, size in found if {7, 11} <= summed]
    self.assertNotEmpty(over_tokens)
    self.assertLessEqual(max(over_tokens), 3 * 12)  # r n, the thin gradients.
    # What gradient mode has is seen by this: 8 x 12.
    loss = decoder.make_loss(_config(scan_layers=scan_layers), 4)
    batch = {'tokens': jnp.zeros(self.TOKENS, jnp.int32)}
    grad = jax.grad(lambda params: loss(params, batch, None)[0])
    full = _products(jax.make_jaxpr(grad)(state.params).jaxpr)
    self.assertIn(8 * 12, [size for summed, size in full if {7, 11} <= summed])

  @parameterized.parameters(
      ('left', 1),
      ('right', 2),
      ('bernoulli', 2),
      ('bernoulli', 1, 'left'),
      ('bernoulli', 2, 'right'),
  )
  def test_what_is_kept(self, side, num_wide, of_side=None):
    """Of y = sin(h) W: cos(h), and x = sin(h) where the left side is trained."""
    policy, params = _policy(side, rank=2), {'w': jnp.ones((13, 5))}
    if of_side:
      policy = dataclasses.replace(policy, shared_coin=True)
    chain = adapters.make_chain(policy, _SGD, bl.Matrices('w'), sketched=True)
    chain = chain.of_side(of_side)
    state, kept = chain.init(jax.random.key(0), params), []

    def loss(params, factors, h):
      of = lambda params, h: jnp.sum(jnp.sin(h) @ params['w'])
      entered = inject.by_product(of)
      value, pull = jax.vjp(lambda f, h: entered(params, f, h), factors, h)
      kept.extend(x.shape for x in jax.tree.leaves(pull))
      return value, None

    jax.eval_shape(
        lambda s, h: chain.step(s, loss, h), state, jnp.ones((7, 13))
    )
    self.assertLen([shape for shape in kept if shape == (7, 13)], num_wide)

  def test_remat_keeps_what_is_thin(self):
    """x L is computed forward, once; the layers' own products again."""
    step, state = self._step(True, scan_layers=True, remat='full')
    jaxpr = jax.make_jaxpr(step)(state).jaxpr
    again = [
        size
        for eqn in _equations(jaxpr)
        if eqn.params.get('differentiated')
        for _, size in _products(eqn.params['jaxpr'])
    ]
    thin, wide = 7 * 11 * 3, 7 * 11 * 12
    self.assertIn(wide, again)
    self.assertNotIn(thin, again)
    found = [size for _, size in _products(jaxpr)]
    self.assertEqual(found.count(thin), 7)  # The matrices of a layer.

  @parameterized.parameters(True, False)
  def test_coordinates_are_gathered(self, scan_layers):
    step, state = self._step(
        True, sketch='coordinate', scan_layers=scan_layers, remat='full'
    )
    jaxpr = jax.make_jaxpr(step)(state).jaxpr
    thin = 7 * 11 * 3
    self.assertNotIn(thin, [size for _, size in _products(jaxpr)])
    select = decoder.matrices(_config(scan_layers=scan_layers))
    weights = [m.shape for m in bl.matrices.find(state.params, select)]
    gathers = taken = written = 0
    for eqn in _equations(jaxpr):
      if not eqn.outvars:
        continue
      name, made = eqn.primitive.name, eqn.outvars[0].aval
      size, shape = made.size, made.shape
      if name in ('add', 'add_any', 'sub'):
        self.assertNotIn(shape, weights)
      if name == 'gather':
        gathers += size == thin
        taken += eqn.invars[0].aval.shape in weights
      if name == 'scatter' and shape in weights:
        layers = 2 if scan_layers else 1
        self.assertEqual(eqn.invars[2].aval.size, layers * 3 * shape[-1])
        written += 1
    # Of the matrices of a layer, and of all; forward, and not again by remat.
    each = 7 if scan_layers else 14
    self.assertEqual((gathers, written), (each, each))
    self.assertGreaterEqual(taken, each)

  @parameterized.parameters('left', 'bernoulli')
  def test_lines_move_in_place(self, side):
    rule = bl.Rule('b', left=(1,), right=(0,))  # As (out, in).
    chain = adapters.make_chain(
        _policy(side, rank=8, period=3, sketch=_COORDINATE),
        _ADAM,
        bl.Matrices(rules=(rule,)),
        sketched=True,
    )
    params = {'a': jnp.ones((256, 512)), 'b': jnp.ones((128, 512))}
    loss = inject.by_product(
        lambda p, x: (jnp.sum(jnp.sin(jnp.sin(x @ p['a']) @ p['b'].T)), None)
    )
    state = chain.init(jax.random.key(0), params)
    step = jax.jit(lambda s, x: chain.step(s, loss, x)[0], donate_argnums=0)
    compiled = step.lower(state, jnp.ones((24, 256))).compile()
    used = compiled.memory_analysis()
    self.assertLess(used.temp_size_in_bytes, params['a'].nbytes)
    # All of the state is donated, and taken, but its key.
    total = sum(x.nbytes for x in jax.tree.leaves(state._replace(key=())))
    self.assertGreaterEqual(used.alias_size_in_bytes, total)
    made = [line for line in compiled.as_text().splitlines() if ' = ' in line]
    for shape in ('f32[256,512]', 'f32[128,512]'):
      own = [line for line in made if f' = {shape}' in line]
      self.assertNotEmpty(own)
      for name in ('add', 'dot', 'transpose', 'convert'):
        self.assertFalse(any(f' {name}(' in line for line in own), name)
    thin = [line for line in made if ' = f32[24,8]' in line]
    self.assertFalse(any(' dot(' in line for line in thin))


class RowsTest(parameterized.TestCase):
  """Frozen factors given by their rows, in every use of W."""

  def test_they_are_those_of_gradient_mode(self):
    params = {'a': jnp.zeros((3, 20, 30)), 'b': jnp.zeros((4, 30))}
    select = bl.Matrices(rules=(bl.matrices.stacked('a'),))
    policy = _policy('bernoulli', rank=5, sketch=_COORDINATE)
    chain = adapters.make_chain(policy, _SGD, select, sketched=True)
    key = jax.random.key(3)
    state, found = chain.init(key, params), chain.adapted(params)
    drawn = links.draw_links(
        jax.random.fold_in(key, 0),
        [one.matrix for one in found],
        ranks=[5, 5],
        probs=[0.5, 0.5],
        sketch=_COORDINATE,
    )
    fallen = set()
    for one, link in zip(found, drawn, strict=True):
      m, own = one.matrix, state.factors[one.matrix.path]
      for place in np.ndindex(*m.batch):
        is_left = bool(link.coin[place])
        fallen.add(is_left)
        for side, dim in (('left', m.m), ('right', m.n)):
          rows = np.asarray(own[f'{side}_rows'][place])
          np.testing.assert_array_equal(rows, np.unique(rows))
          chosen = rows[rows < dim].tolist()
          if is_left == (side == 'left'):
            basis = getattr(link, side)
            every = range(dim) if basis is None else basis[place].tolist()
            self.assertEqual(chosen, sorted(every))
          else:
            self.assertEmpty(chosen)
      self.assertEqual(own['left_rows'].dtype, jnp.int32)
    self.assertLen(fallen, 2)

  def test_the_state_keeps_no_frame(self):
    chain = adapters.make_chain(
        _policy('left', sketch=_COORDINATE), _SGD, sketched=True
    )
    state = chain.init(jax.random.key(0), {'kernel': jnp.ones((50, 40))})
    self.assertEqual(state.factors['kernel'].keys(), {'left_rows'})
    self.assertEqual(state.factors['kernel']['left_rows'].shape, (3,))
    self.assertEmpty(state.masters)  # W is not narrow.

  @parameterized.named_parameters(
      ('product', (6, 5), ((), (0,), (1,)), 'tm,mn->tn'),
      ('turned', (6, 5), ((), (1,), (0,)), 'tm,nm->tn'),
      ('heads', (2, 3, 5), ((), (0, 1), (2,)), 'thd,hdn->tn'),
      ('turned_heads', (2, 3, 5), ((), (1, 0), (2,)), 'thd,hdn->tn'),
      ('axes_apart', (2, 5, 3), ((), (0, 2), (1,)), 'thd,hnd->tn'),
      ('heads_out', (6, 2, 3), ((), (0,), (1, 2)), 'tm,mhd->thd'),
      ('experts', (3, 6, 5), ((0,), (1,), (2,)), 'tem,emn->ten'),
      ('one_input', (3, 6, 5), ((0,), (1,), (2,)), 'tm,emn->ten'),
      ('summed_experts', (3, 6, 5), ((0,), (1,), (2,)), 'tem,emn->tn'),
      ('other_batch', (6, 3, 5), ((1,), (0,), (2,)), 'tem,men->ten'),
      ('both_sides', (6, 5), ((), (0,), (1,)), 'tmn,mn->t'),
      ('a_side_kept', (6, 5), ((), (0,), (1,)), 'tmn,mn->tn'),
      ('part_of_a_side', (6, 2, 3), ((), (0,), (1, 2)), 'tmh,mhd->td'),
  )
  def test_products(self, shape, axes, spec):
    self.check(shape, axes, lambda w, x: jnp.einsum(spec, x, w), spec)

  @parameterized.named_parameters(
      ('cut', lambda w, x: jnp.einsum('tm,mn->tn', x[:, 1:4], w[1:4])),
      ('cut_right', lambda w, x: x @ w[:, ::2]),
      ('merged', lambda w, x: x @ w.reshape(3, 2, 5).reshape(6, 5)),
      (
          'turned_parts',
          lambda w, x: jnp.einsum(
              'tdh,dhn->tn',
              x.reshape(-1, 2, 3),
              w.reshape(3, 2, 5).transpose(1, 0, 2),
          ),
      ),
      (
          'a_scan_over_rows',
          lambda w, x: jax.lax.scan(
              lambda y, one: (y + one[0][:, None] * one[1][None], None),
              jnp.zeros((4, 5)),
              (x.T, w),
          )[0],
      ),
      (
          'a_dynamic_slice',
          lambda w, x: x[:, :2]
          @ jax.lax.dynamic_slice(w, (x.shape[0], 0), (2, 5)),
      ),
      ('no_product', lambda w, x: x @ jnp.sin(w)),
      ('half', lambda w, x: (x.astype('bfloat16') @ w.astype('bfloat16'))),
  )
  def test_other_uses(self, use):
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', inject.FormedWarning)
      self.check((6, 5), ((), (0,), (1,)), use, 'tm,mn')

  def check(self, shape, axes, use, spec):
    """Derivatives, against those of W + L R formed by hand."""
    axes = lowrank.Axes(*axes)
    rule = bl.Rule('w', left=axes.left, right=axes.right, batch=axes.batch)
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    (m,) = bl.matrices.find({'w': w}, bl.Matrices(rules=(rule,)))
    names = spec.split('->')[0].split(',')
    sizes = {'t': 4, **dict(zip(names[1], shape, strict=True))}
    x = jnp.asarray(rng.normal(size=[sizes[c] for c in names[0]]), jnp.float32)
    rows = {}
    for side, dim in (('left', m.m), ('right', m.n)):  # Some beyond.
      drawn = [rng.permutation(dim + 2)[:3] for _ in range(m.entries.size)]
      drawn = jnp.asarray(np.sort(drawn), jnp.int32)
      rows[side] = drawn.reshape(*m.batch, 3)
    left = jnp.zeros((*m.batch, m.m, 3))
    right = jnp.zeros((*m.batch, 3, m.n))

    def formed(params, factors, x):
      pair = factors['w']
      ones = lambda side, dim: jax.nn.one_hot(pair.rows[side], dim)
      change = 0
      if 'left' in pair.rows:
        change += jnp.matmul(ones('left', m.m).mT, pair.right)
      if 'right' in pair.rows:
        change += jnp.matmul(pair.left, ones('right', m.n))
      return loss({'w': params['w'] + m.unview(change)}, x)

    loss = lambda p, x: jnp.sum(jnp.sin(use(p['w'], x)).astype(jnp.float32))
    every = ('left', 'right')
    none = {side: places + 10 for side, places in rows.items()}
    for trained, own in (
        (('right',), {'left': rows['left']}),
        (('left',), {'right': rows['right']}),
        (every, {'left': rows['left'], 'right': none['right']}),
        (every, {'left': none['left'], 'right': rows['right']}),
    ):
      pair = inject.Pair(left, right, axes, trained, own)
      grads = [
          jax.grad(function, argnums=(1, 2), allow_int=True)(
              {'w': w}, {'w': pair}, x
          )
          for function in (inject.by_product(loss), formed)
      ]
      (found, by_x), (expected, by_x_expected) = grads
      for side in trained:
        # Sums of a few products, in float32 or to the 8 digits of bfloat16.
        np.testing.assert_allclose(
            getattr(found['w'], side),
            getattr(expected['w'], side),
            atol=2e-2 if use(w, x).dtype == jnp.bfloat16 else 1e-5,
        )
      largest = max(
          float(jnp.abs(getattr(found['w'], s)).max()) for s in trained
      )
      self.assertGreater(largest, 0.1)
      np.testing.assert_allclose(by_x, by_x_expected, rtol=1e-2, atol=1e-5)

  def test_a_pair_as_a_mapping_has_its_frame(self):
    rows = jnp.array([1, 3, 7], jnp.int32)
    axes = lowrank.Axes((), (0,), (1,))
    pair = inject.Pair(
        jnp.zeros((5, 3)), jnp.ones((3, 4)), axes, ('right',), {'left': rows}
    )
    expected = np.zeros((5, 3))
    expected[1, 0] = expected[3, 1] = 1
    np.testing.assert_array_equal(pair['left'], expected)
    np.testing.assert_array_equal(pair['right'], np.ones((3, 4)))


_GROUPS = ('self_attn/(q|k|v)_proj', '(gate|up)_proj')


class SharedFramesTest(parameterized.TestCase):

  def _frames(self, side, scan_layers, shared=_GROUPS, **fields):
    """Returns {path without layer: {side: (layers, ...)}} of link 3."""
    config = _config(scan_layers=scan_layers)
    policy = _policy(side, shared_frames=shared, **fields)
    chain = _chain(config, policy, _SGD)
    found = chain.adapted(_params(config))
    drawn = factors.draw_link(jax.random.key(4), 3, found, policy).factors
    if scan_layers:
      return {path.replace('layers/', ''): p for path, p in drawn.items()}
    stacked = {}
    for path, pair in drawn.items():
      stacked.setdefault(path.partition('/')[2], []).append(pair)
    return {
        path: jax.tree.map(lambda *x: jnp.stack(x), *pairs)
        for path, pairs in stacked.items()
    }

  @parameterized.parameters(False, True)
  def test_who_shares(self, scan_layers):
    frames = self._frames('left', scan_layers)
    own = self._frames('left', scan_layers, shared=())
    left = lambda name, of=frames: of[name]['left']
    q, k, v, o = (f'self_attn/{x}_proj/kernel' for x in 'qkvo')
    gate, up, down = (f'mlp/{x}_proj/kernel' for x in ('gate', 'up', 'down'))
    for first, *others in ((k, q, v), (gate, up)):
      np.testing.assert_array_equal(left(first), left(first, own))
      for other in others:
        np.testing.assert_array_equal(left(first), left(other))
        self.assertGreater(jnp.abs(left(other) - left(other, own)).max(), 0.1)
    for name in (o, down):
      np.testing.assert_array_equal(left(name), left(name, own))
    self.assertGreater(jnp.abs(left(k) - left(gate)).max(), 0.1)
    for x in map(left, frames):
      self.assertGreater(jnp.abs(x[0] - x[1]).max(), 0.1)  # A layer each.
    other = self._frames('left', not scan_layers)
    # Factorisations of batches of another size.
    chex.assert_trees_all_close(frames, other, rtol=0, atol=1e-6)

  @parameterized.parameters('left', 'bernoulli')
  def test_coins_and_right_frames_stay_separate(self, side):
    frames = self._frames(side, True)
    config = _config(scan_layers=True)
    draw = lambda shared: factors.draw_link(
        jax.random.key(4),
        3,
        _chain(config, _policy(side), _SGD).adapted(_params(config)),
        _policy(side, shared_frames=shared),
    ).coins
    chex.assert_trees_all_equal(draw(_GROUPS), draw(()))
    if side == 'bernoulli':
      own = self._frames(side, True, shared=())
      for name in ('gate', 'up'):  # 8 x 12
        name = f'mlp/{name}_proj/kernel'
        is_right = jnp.any(frames[name]['right'] != 0, (1, 2))
        np.testing.assert_array_equal(frames[name]['right'], own[name]['right'])
        self.assertEqual(is_right.shape, (2,))

  @parameterized.product(
      scan_layers=(False, True), sketch=('gaussian', 'coordinate')
  )
  def test_steps_are_those_of_adapters(self, scan_layers, sketch):
    policy = _policy(
        'left',
        period=2,
        shared_frames=_GROUPS,
        sketch=bl.sketches.by_name(sketch),
    )
    same = SameStepsTest()
    same.assert_same(policy, _ADAM, 5, scan_layers=scan_layers)

  @pytest.mark.slow
  def test_steps_are_those_of_adapters_where_coins_fall(self):
    policy = _policy('bernoulli', period=2, shared_frames=_GROUPS)
    same = SameStepsTest()
    same.assert_same(policy, _ADAM, 8, scan_layers=False)

  @parameterized.parameters(('gaussian', 'dot'), ('coordinate', 'gather'))
  def test_x_is_read_once(self, sketch, operation):
    """x L of q, k and v is one operation, and of gate and up, in each layer."""
    config = _config(scan_layers=False)
    params, (batch,) = _params(config, jnp.float32), _batches(1)
    loss = inject.by_product(decoder.make_loss(config, 4))
    found = []
    for shared in ((), _GROUPS):
      policy = _policy(
          'left',
          period=2,
          shared_frames=shared,
          sketch=bl.sketches.by_name(sketch),
      )
      chain = _chain(config, policy, _SGD, sketched=True)
      state = chain.init(jax.random.key(2), params)
      step = jax.jit(lambda s, b, c=chain: adapters.move_factors(c, s, loss, b))
      text = step.lower(state, batch).compile().as_text()
      found.append(text.count(f' {operation}('))
    self.assertEqual(found[0] - found[1], 3 * config.num_layers)

  def test_refused(self):
    params = {
        'q': {'kernel': jnp.ones((6, 4))},
        'k': {'kernel': jnp.ones((6, 5))},
        'o': {'kernel': jnp.ones((5, 6))},
    }

    def adapted(*shared, **fields):
      policy = _policy('left', shared_frames=shared, **fields)
      return policies.resolve(params, policy, None)

    self.assertLen({x.frame.path for x in adapted('^(q|k)/')}, 2)
    for shared, message in (
        (('^(q|k|o)/',), r'share a frame.*\(\(\), 6, 3\) of .*\(\(\), 5, 3\)'),
        (
            ('q', '^(q|k)/'),
            r'Expected one pattern of shared_frames for q/kernel',
        ),
        (('nothing',), r"Expected the pattern 'nothing' of shared_frames to"),
        (('(',), 'a pattern of shared_frames'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        adapted(*shared)
    targets = bl.Target('^q/'), bl.Target('^k/', rank=2)
    with self.assertRaisesRegex(ValueError, 'share a frame.*6, 2.*6, 3'):
      adapted('^(q|k)/', targets=targets)
    with self.assertRaisesRegex(ValueError, 'Expected shared_frames with side'):
      _policy('right', shared_frames=_GROUPS)
    with self.assertRaisesRegex(TypeError, 'tuple of patterns'):
      _policy('left', shared_frames='(q|k)')


class OneCoinTest(parameterized.TestCase):
  """Links of one coin: a program for each side, picked by who calls."""

  def _policy(self, **fields):
    return bl.ChainPolicy.bernoulli(
        **{'rank': 3, 'period': 4, 'shared_coin': True, **fields}
    )

  def _run(self, chain, loss, params, batches, sides):
    """Returns states, losses and the number of compilations; sides may be None."""
    step = jax.jit(
        lambda c, s, x: adapters.step(c, s, loss, x), static_argnums=0
    )
    state, states, values = chain.init(jax.random.key(2), params), [], []
    for i, batch in enumerate(batches):
      side = sides and sides[i // chain.policy.period]
      state, (value, _) = step(chain.of_side(side), state, batch)
      states.append(state)
      values.append(float(value))
    return states, values, step._cache_size()

  def assert_same(self, chain, loss, params, batches):
    with jax.enable_x64(True):
      num = -(-len(batches) // chain.policy.period)
      sides = adapters.sides_of_links(chain, jax.random.key(2), num)
      traced, values, _ = self._run(chain, loss, params, batches, None)
      lean, ours, num = self._run(chain, loss, params, batches, sides)
    if chain.policy.resample:
      self.assertEqual(set(sides), {'left', 'right'})
      self.assertEqual(num, 2)
    np.testing.assert_allclose(ours, values, rtol=1e-11)
    raw = lambda state: state._replace(key=jax.random.key_data(state.key))
    for a, b in zip(lean, traced, strict=True):
      chex.assert_trees_all_equal_shapes_and_dtypes(raw(a), raw(b))
    # All of a state: weights, frames, coins, moments of both sides.
    for a, b in ((lean[4], traced[4]), (lean[-1], traced[-1])):
      chex.assert_trees_all_close(raw(a), raw(b), rtol=1e-9, atol=1e-11)
    # A state of one goes on in the other, from within a link.
    place = 2 * chain.policy.period + 1
    state = traced[place - 1]
    for i in range(place, min(len(batches), place + 3)):
      one = chain.of_side(sides[i // chain.policy.period])
      with jax.enable_x64(True):
        state, _ = adapters.step(one, state, loss, batches[i])
    chex.assert_trees_all_close(raw(state), raw(traced[i]), atol=1e-11)

  @parameterized.parameters(
      (True, dict(reset_optimizer=False)), (False, dict())
  )
  def test_steps_are_those_of_the_traced_program(self, sketched, fields):
    """With moments, clipping, and leaves that train at full size."""
    self.check_steps(sketched, **fields)

  @parameterized.product(
      sketched=(True, False),
      fields=(
          dict(),
          dict(reset_optimizer=False, warmup=2, prob=0.3),
          dict(resample=False),
          dict(rank=5),  # Above some sides.
          dict(targets=(bl.Target('w1'), bl.Target('w2', prob=0.0))),
      ),
  )
  @pytest.mark.slow
  def test_steps_of_other_policies(self, sketched, fields):
    self.check_steps(sketched, **fields)

  def check_steps(self, sketched, **fields):
    with jax.enable_x64(True):
      keys = jax.random.split(jax.random.key(0), 4)
      draw = lambda key, *shape: jax.random.normal(key, shape, jnp.float64)
      params = {
          'w1': draw(keys[0], 4, 5),
          'w2': draw(keys[1], 5, 4),
          'b': draw(keys[2], 1, 4),
      }
      batches = list(draw(keys[3], 30, 7, 4))
      policy = self._policy(sketch=bl.sketches.coordinate(), **fields)
      chain = adapters.make_chain(
          policy,
          optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.02)),
          None if policy.targets else bl.Matrices('w'),
          others={'^b$': optax.sgd(0.1)},
          sketched=sketched,
      )
      loss = inject.by_product(
          lambda p, x: (
              jnp.mean(jnp.sin(jnp.sin(x @ p['w1']) @ p['w2'] + p['b'])),
              None,
          )
      )
    self.assert_same(chain, loss, params, batches)

  @parameterized.product(scan_layers=(True, False), sketched=(True, False))
  @pytest.mark.slow
  def test_steps_of_a_decoder(self, scan_layers, sketched):
    with jax.enable_x64(True):
      config = _config(scan_layers=scan_layers)
      params, batches = _params(config), _batches(30)
      chain = _chain(config, self._policy(), _ADAM, sketched=sketched)
      loss = inject.by_product(decoder.make_loss(config, 4))
    self.assert_same(chain, loss, params, batches)

  @parameterized.parameters(0.5, 0.3)
  def test_sides_are_those_of_the_coins(self, prob):
    params = {
        'layers': {'kernel': jnp.ones((3, 6, 5))},
        'head': {'kernel': jnp.ones((6, 5))},
    }
    rule = bl.Rule('layers', left=(1,), right=(2,), batch=(0,))
    for resample in (True, False):
      policy = self._policy(
          rank=1, prob=prob, resample=resample, sketch=bl.sketches.coordinate()
      )
      matrices = bl.Matrices('kernel', rules=(rule,))
      chain = adapters.make_chain(policy, _SGD, matrices)
      found, key = chain.adapted(params), jax.random.key(3)
      links = jnp.arange(1000) if resample else jnp.zeros(1000, jnp.int32)
      draw = lambda link, f=found, p=policy: factors.draw_link(
          jax.random.key(3), link, f, p
      ).coins
      coins = jax.jit(jax.vmap(draw))(links)
      sides = adapters.sides_of_links(chain, key, 1000)
      expected = np.array(sides) == 'left'
      self.assertLen(coins, 2)
      for coin in coins.values():
        np.testing.assert_array_equal(
            coin.reshape(1000, -1).T,
            np.broadcast_to(expected, (coin[0].size, 1000)),
        )
      self.assertEqual(
          adapters.sides_of_links(chain, key, 7, first=90), sides[90:97]
      )

  @parameterized.parameters('left', 'right')
  def test_another_side_is_no_number(self, side):
    """Nor are the weights moved, whose frozen factor is zero."""
    chain = adapters.make_chain(self._policy(), _SGD, sketched=True)
    other = {'left': 'right', 'right': 'left'}[side]
    key = next(
        key
        for key in map(jax.random.key, range(99))
        if adapters.sides_of_links(chain, key, 1) == [side]
    )
    state = chain.init(key, {'kernel': jnp.ones((5, 4))})
    loss = inject.by_product(lambda p, x: (jnp.sum(x @ p['kernel']), None))
    for name in (side, other):
      after, (value, _) = chain.of_side(name).step(
          state, loss, jnp.ones((3, 5))
      )
      moved = jnp.abs(after.params['kernel'] - 1).max()
      self.assertEqual(bool(jnp.isnan(value)), name == other)
      self.assertEqual(float(moved) == 0, name == other)

  @parameterized.parameters(
      dict(shared_coin=False),
      dict(prob=1.0),
      dict(prob=jnp.float32(0.5)),
      dict(targets=(bl.Target('a'), bl.Target('b', prob=0.3))),
  )
  def test_policies_without_one_coin(self, **fields):
    chain = adapters.make_chain(self._policy(**fields), _SGD)
    with self.assertRaisesRegex(
        ValueError, 'Expected shared_coin=True and one'
    ):
      chain.of_side('left')
    with self.assertRaisesRegex(
        ValueError, 'Expected shared_coin=True and one'
    ):
      adapters.sides_of_links(chain, jax.random.key(0), 1)
    with self.assertRaisesRegex(ValueError, 'side'):
      adapters.make_chain(self._policy(), _SGD).of_side('both')

  @parameterized.parameters('left', 'right', None)
  def test_program(self, side):
    """One thin gradient a matrix; of a left step x is not kept."""
    config = _config(scan_layers=False)
    chain = _chain(config, self._policy(), _ADAM, sketched=True).of_side(side)
    state = chain.init(jax.random.key(2), _params(config, jnp.float32))
    loss = inject.by_product(decoder.make_loss(config, 4))
    batch = {'tokens': jnp.zeros(ProgramTest.TOKENS, jnp.int32)}
    step = lambda s: chain.step(s, loss, batch)
    found = _products(jax.make_jaxpr(step)(state).jaxpr)
    thin = sorted(size for summed, size in found if {7, 11} <= summed)
    ours = [one.matrix for one in chain.adapted(state.params)]
    of = {'left': [m.n for m in ours], 'right': [m.m for m in ours]}
    lengths = of[side] if side else of['left'] + of['right']
    self.assertEqual(thin, sorted(3 * length for length in lengths))

  @parameterized.parameters('left', 'right')
  @pytest.mark.slow
  def test_costs_those_of_the_chain_of_a_side(self, side):
    """Moments and frames of the other side are neither computed nor copied."""
    config = _config(scan_layers=False)
    params = _params(config, jnp.float32)
    loss = inject.by_product(decoder.make_loss(config, 4))
    batch = {'tokens': jnp.zeros(ProgramTest.TOKENS, jnp.int32)}

    def costs(policy, side):
      chain = _chain(config, policy, _ADAM, sketched=True).of_side(side)
      state = chain.init(jax.random.key(2), params)
      move = lambda s: adapters.move_factors(chain, s, loss, batch)
      compiled = jax.jit(move, donate_argnums=0).lower(state).compile()
      memory = compiled.memory_analysis()
      anew = memory.output_size_in_bytes - memory.alias_size_in_bytes
      flops = compiled.cost_analysis()['flops']
      return flops, memory.temp_size_in_bytes, anew

    one_coin, one_side = self._policy(), _policy(side, period=4)
    flops, temporary, anew = costs(one_coin, side)
    expected, most, _ = costs(one_side, None)
    np.testing.assert_allclose(flops, expected, rtol=1e-3)
    np.testing.assert_allclose(temporary, most, rtol=1e-2)
    self.assertLess(anew, 4096)  # Scalars: pointers of a tree of outputs.
    self.assertGreater(costs(one_coin, None)[0], 1.02 * flops)


class RunTest(parameterized.TestCase):
  """Runs of links of one coin, whose dispatches end with them."""

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  def _config(self, **fields):
    config = base_config.get_config()
    config.task.name = 'quadratic'
    config.task.hidden = (16,)
    config.task.pretrain_epochs = 1
    config.method.update(
        mode='adapter',
        rank=1,
        shared_coin=True,
        period=4,
        optimizer='adam',
        sketch='coordinate',
        learning_rate=0.02,
    )
    config.training.update(
        num_steps=24,
        num_evals=2,
        steps_per_dispatch=4,
        checkpoint_every=6,
        progress=False,
    )
    config.update_from_flattened_dict(fields)
    return config

  def _train(self, name, program, config):
    folder = self.tmp / name
    experiment.train(config, folder, program)
    state = program.start(jax.random.key(config.seed))
    with loop.open_checkpoints(program, folder, state) as saver:
      state = loop.restore(saver, program, state)[0]
    return jax.tree.map(
        np.asarray, state._replace(chain=state.chain._replace(key=0))
    )

  def test_resume_within_a_link_is_bit_identical(self):
    self.check_resume(self._config())

  @pytest.mark.slow
  def test_resume_of_a_sketched_run_is_bit_identical(self):
    fields = {'task.name': 'digits', 'method.mode': 'sketched'}
    self.check_resume(self._config(**fields))

  def check_resume(self, config):
    program, num_next = experiment.make_program(config), loop._num_next
    whole = self._train('whole', program, config)
    self._check_compiled(program)

    def interrupted(program, progress):
      if progress.step == 6:
        raise KeyboardInterrupt
      return num_next(program, progress)

    with mock.patch.object(loop, '_num_next', interrupted):
      with self.assertRaises(KeyboardInterrupt):
        self._train('cut', program, config)
    chex.assert_trees_all_equal(self._train('cut', program, config), whole)

  @pytest.mark.slow
  def test_run_of_the_traced_program(self):
    config = self._config()
    program = experiment.make_program(config)
    whole = self._train('whole', program, config)
    with mock.patch.object(programs.Program, 'sides', (None,)):
      program = experiment.make_program(config)
      traced = self._train('traced', program, config)
    self.assertEqual({side for _, side in program.compiled}, {None})
    chex.assert_trees_all_close(traced, whole, rtol=1e-3, atol=1e-5)

  def _check_compiled(self, program):
    """Both sides, of the two lengths into which checkpoints cut links."""
    lengths, sides = map(set, zip(*program.compiled, strict=True))
    self.assertEqual((lengths, sides), ({2, 4}, {'left', 'right'}))

  def test_coins_of_another_key(self):
    config = self._config()
    program = experiment.make_program(config)
    state = program.start(jax.random.key(0))
    sides = program.sides_of_links(state, 0)
    self.assertLen(sides, 6)
    chain = state.chain
    flipped = chain._replace(coins={k: ~c for k, c in chain.coins.items()})
    with self.assertRaisesRegex(ValueError, f'of step 0 to fall {sides[0]}'):
      program.sides_of_links(state._replace(chain=flipped), 0)

  @parameterized.parameters(
      {'training.steps_per_dispatch': 5},  # Longer than a link.
      {'method.shared_coin': False},
      {'method.prob': 1.0},
  )
  def test_other_runs_share_programs(self, **fields):
    program = experiment.make_program(self._config(**fields))
    self.assertEqual(program.sides, (None,))
    self.assertIsNone(program.sides_of_links(None, 0))

  @parameterized.parameters('jit', 'pmap')
  @pytest.mark.slow
  def test_several_devices(self, kind):
    fields = {
        'task.name': 'digits',
        'task.batch_size': 16,
        'method.mode': 'sketched',
    }
    alone = self._config(**fields)
    shared = self._config(**fields, **{'training.parallel': kind})
    one = self._train('one', experiment.make_program(alone), alone)
    program = experiment.make_program(shared)
    many = self._train(kind, program, shared)
    self._check_compiled(program)
    chex.assert_trees_all_close(many, one, rtol=1e-3, atol=1e-5)


class RefusalTest(parameterized.TestCase):

  @parameterized.parameters('lora', 'cola', 'asymmetric')
  def test_policies(self, name):
    make = getattr(bl.ChainPolicy, name)
    args = {'cola': (4,), 'asymmetric': ('left',)}.get(name, ())
    with self.assertRaisesRegex(ValueError, 'got side=.*period=.*sketched out'):
      adapters.make_chain(make(2, *args), _SGD, sketched=True)

  def test_decay_of_a_factor_that_is_not_there(self):
    chain = adapters.make_chain(
        _policy('left'), optax.adamw(0.1), sketched=True
    )
    state = chain.init(jax.random.key(0), {'kernel': jnp.ones((5, 4))})
    loss = inject.by_product(lambda p, x: (jnp.sum(x @ p['kernel']), None))
    with self.assertRaisesRegex(ValueError, 'params'):
      chain.step(state, loss, jnp.ones((3, 5)))

  def test_a_derivative_by_the_weights(self):
    chain = adapters.make_chain(_policy('left'), _SGD, sketched=True)
    state = chain.init(jax.random.key(0), {'kernel': jnp.ones((5, 4))})
    entered = inject.by_product(lambda p, x: jnp.sum(x @ p['kernel']))

    def loss(params, factors, x):
      grads = jax.grad(lambda p: entered(p, factors, x))(params)
      return entered(params, factors, x), grads

    with self.assertRaisesRegex(ValueError, 'one by kernel, which a sketched'):
      chain.step(state, loss, jnp.ones((3, 5)))


class OtherUsesTest(parameterized.TestCase):

  def test_a_use_that_is_no_product_has_its_derivative(self):
    """A penalty on W: formed, told of, and right."""
    chains = [
        adapters.make_chain(_policy('left'), _SGD, sketched=sketched)
        for sketched in (True, False)
    ]
    penalty = lambda p, x: (
        jnp.sum(jnp.sin(x @ p['kernel'])) + jnp.sum(p['kernel'] ** 3),
        None,
    )
    params, found = {'kernel': jnp.ones((5, 4))}, []
    for chain in chains:
      state = chain.init(jax.random.key(0), params)
      with self.assertWarnsRegex(inject.FormedWarning, 'kernel is used by'):
        state, _ = chain.step(
            state, inject.by_product(penalty), jnp.ones((3, 5))
        )
      found.append(chain.params(state))
    chex.assert_trees_all_close(*found, atol=1e-5)
    self.assertGreater(float(jnp.abs(found[0]['kernel'] - 1).max()), 0.1)

  @parameterized.parameters('gaussian', 'coordinate')
  @pytest.mark.slow
  def test_vmap(self, sketch):
    policy = _policy('bernoulli', sketch=bl.sketches.by_name(sketch))
    chain = adapters.make_chain(policy, _SGD, sketched=True)
    loss = inject.by_product(
        lambda p, x: (jnp.sum(jnp.sin(x @ p['kernel'])), 0)
    )

    def run(key):
      params = {'kernel': jax.random.normal(key, (5, 4))}
      state = chain.init(key, params)
      for _ in range(3):
        state, _ = chain.step(state, loss, jnp.ones((3, 5)))
      return state.params

    keys = jax.random.split(jax.random.key(0), 3)
    one = [run(key) for key in keys]
    many = jax.jit(jax.vmap(run))(keys)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *one)
    chex.assert_trees_all_close(many, stacked, atol=1e-6)


class FusedTest(parameterized.TestCase):
  """The kernel of the update, step by step where there is no GPU."""

  @parameterized.product(
      mode=('nearest', 'stochastic'), rank_batch=((5, ()), (20, (2, 3)))
  )
  def test_equals_xla(self, mode, rank_batch):
    rank, batch = rank_batch
    draw = lambda i, *shape: jax.random.normal(
        jax.random.key(i), (*batch, *shape)
    )
    weight = draw(0, 64, 256).astype(jnp.bfloat16)
    left, right = 0.01 * draw(1, 64, rank), draw(2, rank, 256)
    keys = jax.random.split(jax.random.key(3), batch)
    found = fused.add_product(
        weight, left, right, keys, mode, interpret=not fused.is_there()
    )
    total = weight.astype(jnp.float32) + jnp.matmul(left, right)
    expected = total.astype(jnp.bfloat16)
    if mode == 'stochastic':
      dithered = rounding.dithered
      for _ in batch:
        dithered = jax.vmap(dithered)
      expected = dithered(total, keys)
    # Sums in another order: a number may fall to the other side of a border.
    self.assertLess(float(jnp.mean(found != expected)), 1e-3)
    wide = lambda x: np.asarray(x, np.float32)
    np.testing.assert_allclose(wide(found), wide(expected), rtol=2**-7)

  @parameterized.parameters(
      ((64, 256), jnp.bfloat16, 32, 'stochastic', True),
      ((2, 64, 256), jnp.bfloat16, 4, 'nearest', True),
      ((64, 256), jnp.bfloat16, 33, 'nearest', False),
      ((64, 256), jnp.float32, 4, 'nearest', False),
      ((64, 192), jnp.bfloat16, 4, 'nearest', False),
      ((48, 256), jnp.bfloat16, 4, 'nearest', False),
      ((64, 256), jnp.bfloat16, 4, 'compensated', False),
  )
  def test_fits(self, shape, dtype, rank, mode, expected):
    weight = jnp.zeros(shape, dtype)
    self.assertEqual(fused.fits(weight, rank, mode), expected)
    is_taken = fused.takes(weight, rank, mode)
    self.assertEqual(is_taken, expected and fused.is_there())

  def test_a_step_takes_it(self):
    """The same step by the kernel and by XLA, where a matrix fits its tiles."""
    shapes = {'a': (32, 128), 'b': (128, 256), 'c': (256, 7)}
    params = {
        name: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }

    def loss(params, factors, x):
      def of(params, x):
        for name in shapes:
          x = jnp.tanh(x @ params[name])
        return jnp.sum(x.astype(jnp.float32))

      return inject.by_product(of)(params, factors, x), None

    chain = adapters.make_chain(
        _policy('left', period=5), optax.sgd(1.0), sketched=True
    )
    state, given = chain.init(jax.random.key(2), params), []
    x = jax.random.normal(jax.random.key(3), (16, 32), jnp.bfloat16)
    expected, _ = chain.step(state, loss, x)
    add = fused.add_product

    def kernel(weight, *args):
      given.append(weight.shape)
      return add(weight, *args, interpret=not fused.is_there())

    with mock.patch.multiple(fused, takes=fused.fits, add_product=kernel):
      found, _ = chain.step(state, loss, x)
    self.assertEqual(given, [shapes['a'], shapes['b']])
    for name, old in params.items():
      moved = expected.params[name] != old
      self.assertGreater(jnp.mean(moved), 0.1)
      # Sums in another order: a number may fall to the other side of a border.
      differs = found.params[name] != expected.params[name]
      self.assertLess(jnp.mean(differs), 1e-3)


class RoundingTest(parameterized.TestCase):

  def _moved(self, num_steps, dtype=jnp.bfloat16, **fields):
    """Returns the state after steps of 1e-4 down on the chosen lines of ones."""
    policy = _policy('left', rank=4, sketch=_COORDINATE, **fields)
    chain = adapters.make_chain(policy, optax.sgd(1e-4), sketched=True)
    state = chain.init(jax.random.key(0), {'w': jnp.ones((16, 8), dtype)})
    loss = inject.by_product(
        lambda p, x: (jnp.sum((x @ p['w']).astype(jnp.float32)), None)
    )
    step = jax.jit(lambda s, x: chain.step(s, loss, x)[0])
    for _ in range(num_steps):
      state = step(state, jnp.ones((1, 16), dtype))
    return state

  @parameterized.parameters('nearest', 'stochastic', 'compensated')
  def test_tiny_steps_of_a_link_arrive(self, rounding_mode):
    """1e-4 is a twentieth of half an ulp below one: nearest loses it."""
    state = self._moved(200, period=200, rounding=rounding_mode)
    rows = np.asarray(state.factors['w']['left_rows'])
    found = np.asarray(state.params['w'], np.float32)
    # Float32 sums of 200.
    lines = state.masters['w']['right']
    np.testing.assert_allclose(lines, 1 - 200e-4, atol=200 * 6e-8)
    ulp = 2.0**-8
    np.testing.assert_allclose(found[rows], 1 - 200e-4, atol=ulp)
    if rounding_mode != 'stochastic':
      np.testing.assert_array_equal(
          found[rows], lines.astype(jnp.bfloat16).astype(jnp.float32)
      )
    np.testing.assert_array_equal(np.delete(found, rows, 0), 1.0)
    # Rounded at each step:
    lost = self._moved(200, period=1, resample=False)
    np.testing.assert_array_equal(np.asarray(lost.params['w'], float), 1.0)

  def test_compensated_arrives_over_links(self):
    state = self._moved(200, period=5, resample=False, rounding='compensated')
    rows = np.asarray(state.factors['w']['left_rows'])
    total = state.params['w'].astype(jnp.float32)
    total = np.asarray(total + state.remainders['w'].astype(jnp.float32))
    # 40 links, each rounds a remainder below 2^-9 to 8 bits.
    np.testing.assert_allclose(total[rows], 1 - 200e-4, atol=40 * 2.0**-18)

  @parameterized.parameters('stochastic', 'compensated')
  def test_a_restored_run_goes_on_bit_for_bit(self, rounding_mode):
    policy = _policy(
        'bernoulli', period=3, sketch=_COORDINATE, rounding=rounding_mode
    )
    chain = adapters.make_chain(
        policy,
        _ADAM,
        bl.Matrices(rules=(bl.matrices.stacked('w'),)),
        sketched=True,
    )
    w = jax.random.normal(jax.random.key(1), (2, 8, 8), jnp.bfloat16)

    def value(params, x):
      h, _ = jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, params['w'])
      return jnp.sum(h.astype(jnp.float32)), None

    loss = inject.by_product(value)
    step = jax.jit(lambda s, x: chain.step(s, loss, x)[0])
    x = jax.random.normal(jax.random.key(2), (5, 8), jnp.bfloat16)
    plain = lambda s: jax.device_get(s._replace(key=jax.random.key_data(s.key)))
    states = [chain.init(jax.random.key(0), {'w': w})]
    for _ in range(8):
      states.append(step(states[-1], x))
    self.assertEqual(states[0].masters['w'].keys(), {'left', 'right'})
    for start in (2, 3, 5):
      state = jax.tree.map(jnp.asarray, plain(states[start]))
      state = state._replace(key=jax.random.wrap_key_data(state.key))
      for _ in range(start, 8):
        state = step(state, x)
      chex.assert_trees_all_equal(plain(state), plain(states[-1]))
    # A link ended outside of a step is the same.
    begun = adapters.begin_link(chain, states[3])
    ended = adapters.next_link(chain, jax.tree.map(jnp.copy, states[3]))
    chex.assert_trees_all_equal(plain(ended), plain(begun))
    lines, old = (s.masters['w']['right'] for s in (begun, states[3]))
    self.assertGreater(float(jnp.abs(lines - old).max()), 0)

  def test_dithered_is_right_in_the_mean(self):
    ulp = 2.0**-7
    x = jnp.full((400, 500), 1 + 0.3 * ulp)
    found = np.asarray(rounding.dithered(x, jax.random.key(0)), np.float32)
    self.assertEqual(set(np.unique(found)), {1.0, np.float32(1 + ulp)})
    error = np.sqrt(0.3 * 0.7 / x.size)
    self.assertAlmostEqual(np.mean(found > 1), 0.3, delta=5 * error)
    # Neither rows nor columns repeat.
    for axis in (0, 1):
      part = np.mean(found > 1, axis=axis)
      spread = np.sqrt(0.3 * 0.7 / x.shape[axis])
      self.assertAlmostEqual(part.std() / spread, 1, delta=0.2)
    other = np.asarray(rounding.dithered(x, jax.random.key(1)), np.float32)
    # 0.3^2 + 0.7^2 agree by chance.
    self.assertAlmostEqual(np.mean(found == other), 0.58, delta=0.01)
    kept = jnp.array([1.5, -2.0, np.inf, -np.inf, np.nan, 0.0])
    rounded = rounding.dithered(kept, jax.random.key(0)).astype(jnp.float32)
    np.testing.assert_array_equal(rounded, kept)
