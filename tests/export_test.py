"""Changes as thin factors, and adapters in the format of PEFT, out and in."""

import dataclasses
import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import parameterized
import chex
import decoders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors import numpy as safetensors

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import export
from bernoulli_lora_jax import recipes
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import peft_format
from bernoulli_lora_jax.models import peft_import

STACK = bl.Matrices(rules=(bl.matrices.stacked('^layers/'),))


def draw_links(shapes, ranks, seed=0):
  """Returns links of random factors; shapes: {path: (*batch, m, n)}."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return [
      {
          path: {
              'left': draw(*batch, m, rank),
              'right': draw(*batch, rank, n),
          }
          for path, (*batch, m, n) in shapes.items()
      }
      for rank in ranks
  ]


def total(links, path):
  """Returns the sum of products in float64."""
  wide = lambda x: np.asarray(x, np.float64)
  return sum(
      wide(link[path]['left']) @ wide(link[path]['right'])
      for link in links
      if path in link
  )


def product(one):
  return one.left.astype(np.float64) @ one.right.astype(np.float64)


def assert_near(got, exact, tol=3e-7):
  """Compares in the Frobenius norm: L and R are rounded to float32."""
  apart = np.linalg.norm(got - exact, axis=(-2, -1))
  np.testing.assert_array_less(apart, tol * np.linalg.norm(exact))


class LinksTest(parameterized.TestCase):

  @parameterized.parameters(
      ((3, 4), 7),  # T r.
      ((9, 9, 9), 12),  # Beyond the shorter side.
      ((9,) * 9, 12),  # Reduced on the way.
  )
  def test_the_sum_is_exact(self, ranks, expected):
    shapes = {'a': (12, 20), 'layers/b': (3, 20, 12)}
    links = draw_links(shapes, ranks)
    thin = export.of_links(links)
    for path, (*batch, m, n) in shapes.items():
      one = thin[path]
      chex.assert_shape(one.left, (*batch, m, expected))
      chex.assert_shape(one.right, (*batch, expected, n))
      self.assertEqual(one.left.dtype, np.float32)
      np.testing.assert_array_equal(one.ranks, np.full(batch, expected))
      self.assertLess(np.max(one.lost), 1e-14)
      assert_near(product(one), total(links, path))

  def test_ranks_of_layers(self):
    """Layers have ranks of their own; what is shared or zero counts once."""
    links = draw_links({'b': (4, 10, 12)}, (2, 2, 2))
    for link in links:
      link['b']['right'][0] = 0
      link['b']['left'][1] = links[0]['b']['left'][1]  # Frozen and kept.
    links[1]['b']['right'][2] = 0
    del links[2]['b']
    links[2]['c'] = links[0]['b']
    one = export.of_links(links)['b']
    np.testing.assert_array_equal(one.ranks, [0, 2, 2, 4])
    assert_near(product(one)[1:], total(links, 'b')[1:])
    for i, rank in enumerate(one.ranks):
      self.assertFalse(np.any(one.left[i, :, rank:]))
      self.assertFalse(np.any(one.right[i, rank:]))
    self.assertEqual(one.lost[0], 0)

  @parameterized.parameters(1, 4)
  def test_a_lower_rank_is_the_best_and_says_what_it_lacks(self, rank):
    links = draw_links({'a': (2, 30, 20)}, (4, 4))
    exact = total(links, 'a')
    one = export.of_links(links, rank)['a']
    s = np.linalg.svd(exact, compute_uv=False)
    tail = np.linalg.norm(s[:, rank:], axis=1) / np.linalg.norm(s, axis=1)
    np.testing.assert_allclose(one.lost, tail, rtol=1e-9)
    apart = np.linalg.norm(product(one) - exact, axis=(1, 2))
    np.testing.assert_allclose(
        apart / np.linalg.norm(exact, axis=(1, 2)), tail, rtol=1e-5
    )
    again = export.truncate(export.of_links(links), rank)['a']
    np.testing.assert_allclose(product(again), product(one), atol=1e-4)

  def test_nothing_of_full_size_is_factorised(self):
    links = draw_links({'a': (90, 80)}, (2, 3))
    with mock.patch.object(
        np.linalg, 'svd', side_effect=np.linalg.svd
    ) as svd, mock.patch.object(
        np.linalg, 'qr', side_effect=np.linalg.qr
    ) as qr:
      export.of_links(links)
    self.assertEqual([c.args[0].shape for c in svd.call_args_list], [(5, 5)])
    self.assertEqual(
        [c.args[0].shape for c in qr.call_args_list], [(90, 5), (80, 5)]
    )

  @parameterized.parameters('left', 'bernoulli', None)
  def test_links_of_a_recipe(self, side):
    """Their sum is what a replay adds to weights of float32."""
    rng = np.random.default_rng(3)
    shapes = {'a': (6, 9), 'layers': {'b': (3, 9, 6)}}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    base = jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
    policy = bl.ChainPolicy(rank=2, period=4, side=side, alpha=3.0)
    chain = adapters.make_chain(policy, optax.identity(), STACK)
    key = jax.random.key(1)
    state = chain.init(key, base)
    trained = lambda: {
        f'{name}:{one.matrix.path}': np.asarray(
            draw(state.factors[one.matrix.path][name].shape)
        )
        for one in chain.adapted(base)
        for name in one.trained
    }
    links = tuple(trained() for _ in range(3))
    recipe = recipes.Recipe(
        recipes.checksum(base), '', policy, STACK, key, 10, links
    )
    tuned = recipes.replay(base, recipe)
    found = recipes.link_factors(recipe, jax.eval_shape(lambda: base))
    self.assertLen(found, 3)
    thin = export.of_links(found)
    for path, leaf in bl.matrices.named_leaves(tuned).items():
      change = np.asarray(leaf - bl.matrices.named_leaves(base)[path])
      # Three roundings of weights of size 10 in float32.
      np.testing.assert_allclose(product(thin[path]), change, atol=2e-5)
    rows = export.report(thin, base, tuned, STACK)
    self.assertEqual([row['layer'] for row in rows], [0, 0, 1, 2])
    self.assertLess(max(row['distance'] for row in rows), 1e-5)
    with self.assertRaisesRegex(ValueError, 'Expected 3 links'):
      recipes.link_factors(recipe._replace(links=links[:2]), base)

  def test_rejects(self):
    links = draw_links({'a': (4, 5)}, (2, 2))
    with self.assertRaisesRegex(ValueError, 'at least one link'):
      export.of_links([])
    with self.assertRaisesRegex(ValueError, 'rank >= 1'):
      export.of_links(links, 0)
    other = draw_links({'a': (4, 6)}, (2,))
    with self.assertRaisesRegex(ValueError, 'the same m and n in every link'):
      export.of_links(links + other)
    links[1]['a']['left'][0, 0] = np.nan
    with self.assertRaisesRegex(ValueError, 'finite factors.*left factor of a'):
      export.of_links(links)


class ChangeTest(parameterized.TestCase):

  def trees(self, falling=True, dtype=jnp.float32):
    """Returns weights before and after, and the change, of a known spectrum."""
    rng = np.random.default_rng(0)
    s = 0.7 ** np.arange(30) if falling else 1.0 * (np.arange(30) < 4)
    basis = lambda n: np.linalg.qr(rng.normal(size=(n, 30)))[0]
    change = np.stack([(basis(50) * s) @ basis(40).T for _ in range(2)])
    old = rng.normal(size=change.shape)
    # The bits of float32 below these are zero: a difference is exact.
    round_ = lambda x: np.round(x * 2**18) / 2**18
    old, change = round_(old), round_(change)
    cast = lambda x: {'layers': {'b': jnp.asarray(x, dtype)}, 'c': jnp.ones(3)}
    return cast(old), cast(old + change), change

  def test_a_change_of_low_rank_is_found(self):
    base, tuned, change = self.trees(falling=False)
    one = export.of_change(base, tuned, 4, STACK)['layers/b']
    # The change was rounded to 2^-18: 2e-5 of its norm.
    assert_near(product(one), change, 5e-5)
    self.assertLess(np.max(one.lost), 1e-4)
    chex.assert_shape(one.left, (2, 50, 4))

  def test_what_is_lost_is_measured_and_near_the_best(self):
    base, tuned, change = self.trees()
    one = export.of_change(base, tuned, 6, STACK)['layers/b']
    norm = np.linalg.norm(change, axis=(1, 2))
    apart = np.linalg.norm(product(one) - change, axis=(1, 2)) / norm
    np.testing.assert_allclose(one.lost, apart, rtol=1e-4)
    s = np.linalg.svd(change, compute_uv=False)
    best = np.linalg.norm(s[:, 6:], axis=1) / norm
    np.testing.assert_array_less(one.lost, 1.001 * best)
    rough = export.of_change(base, tuned, 6, STACK, oversample=0, iterations=0)[
        'layers/b'
    ]
    np.testing.assert_array_less(1.05 * best, rough.lost)

  def test_draws(self):
    """The same of equal seeds, of layers stacked or not; others of others."""
    base, tuned, _ = self.trees()
    options = dict(oversample=0, iterations=0)
    one = export.of_change(base, tuned, 3, STACK, **options)
    again = export.of_change(base, tuned, 3, STACK, **options)
    chex.assert_trees_all_equal(one, again)
    other = export.of_change(
        base, tuned, 3, STACK, key=jax.random.key(1), **options
    )
    self.assertFalse(
        np.array_equal(one['layers/b'].lost, other['layers/b'].lost)
    )
    split = lambda tree: {
        f'layers_{i}': {'b': tree['layers']['b'][i]} for i in range(2)
    }
    single = export.of_change(split(base), split(tuned), 3, **options)
    for i in range(2):
      np.testing.assert_array_equal(
          single[f'layers_{i}/b'].left, one['layers/b'].left[i]
      )

  def test_nothing_of_full_size_is_factorised(self):
    made = jax.make_jaxpr(
        lambda x, key: export._range_svd(
            x, key, rank=3, oversample=2, iterations=1
        )
    )(jnp.ones((50, 40)), jax.random.key(0))
    shapes = []

    def walk(jaxpr):
      for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'svd':
          shapes.append(eqn.invars[0].aval.shape)
        for sub in eqn.params.values():
          if hasattr(sub, 'jaxpr'):
            walk(sub.jaxpr)

    walk(made.jaxpr)
    self.assertEqual(shapes, [(5, 5)])

  def test_the_distance_of_rounded_weights(self):
    """Base + adapter is as far from merged weights as their rounding."""
    links = draw_links({'layers/b': (2, 20, 30)}, (2, 2))
    for link in links:
      link['layers/b']['left'] *= 0.1
    rng = np.random.default_rng(1)
    old = jnp.asarray(rng.normal(size=(2, 20, 30)), jnp.bfloat16)
    exact = np.asarray(old, np.float64) + total(links, 'layers/b')
    base = {'layers': {'b': old}}
    tuned = {'layers': {'b': jnp.asarray(exact, jnp.bfloat16)}}
    rows = export.report(export.of_links(links), base, tuned, STACK)
    rounded = np.asarray(tuned['layers']['b'], np.float64)
    change = rounded - np.asarray(old, np.float64)
    norm = lambda x: np.linalg.norm(x, axis=(1, 2))
    np.testing.assert_allclose(
        [row['distance'] for row in rows],
        norm(exact - rounded) / norm(change),
        rtol=1e-4,
    )
    self.assertEqual([row['rank'] for row in rows], [4, 4])

  def test_no_change(self):
    base, _, _ = self.trees()
    one = export.of_change(base, base, 3, STACK)
    np.testing.assert_array_equal(one['layers/b'].ranks, 0)
    self.assertEqual(
        [r['distance'] for r in export.report(one, base, base, STACK)], [0, 0]
    )

  def test_rejects(self):
    base, tuned, _ = self.trees()
    with self.assertRaisesRegex(ValueError, 'Expected c to be the same'):
      export.of_change(base, {**tuned, 'c': 2 * tuned['c']}, 3, STACK)
    bad = {
        **tuned,
        'layers': {'b': tuned['layers']['b'].at[1, 0, 0].set(np.inf)},
    }
    with self.assertRaisesRegex(ValueError, 'finite weights.*layers/b'):
      export.of_change(base, bad, 3, STACK)
    with self.assertRaisesRegex(ValueError, 'Expected c of shape'):
      export.of_change(base, {**tuned, 'c': jnp.ones(4)}, 3, STACK)


class StateTest(parameterized.TestCase):

  def chain(self, policy, **options):
    params = {'a': jnp.ones((6, 4)), 'b': jnp.ones((5, 6)), 'c': jnp.ones(2)}
    chain = adapters.make_chain(policy, optax.adam(0.1), **options)
    return chain, chain.init(jax.random.key(0), params)

  def factors(self, state):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), state.factors
    )

  def test_factors_of_ones_own(self):
    chain, state = self.chain(bl.ChainPolicy.lora(2, alpha=3.0))
    given = self.factors(state)
    state = state._replace(
        opt_state=jax.tree.map(jnp.ones_like, state.opt_state)
    )
    state = adapters.with_factors(chain, state, given)
    chex.assert_trees_all_equal(state.factors, given)
    # Moments of other factors mean nothing for these.
    fresh = chain.tx.init(given)
    chex.assert_trees_all_equal(state.opt_state, fresh)
    thin = export.of_state(chain, state)
    np.testing.assert_array_equal(thin['a'].left, given['a']['left'])
    np.testing.assert_array_equal(
        thin['a'].right, np.float32(1.5) * given['a']['right']
    )
    added = jax.tree.map(jnp.subtract, chain.params(state), state.params)
    np.testing.assert_allclose(product(thin['b']), added['b'], atol=1e-6)

  def test_rejects(self):
    chain, state = self.chain(bl.ChainPolicy.lora(2))
    given = self.factors(state)
    with self.assertRaisesRegex(ValueError, 'Expected b/left of shape'):
      adapters.with_factors(chain, state, {'a': given['a']})
    given['a']['left'][0] = np.nan
    with self.assertRaisesRegex(ValueError, 'left factor of a'):
      adapters.with_factors(chain, state, given)
    one_sided, state = self.chain(bl.ChainPolicy.rac(2, 3, 'left'))
    with self.assertRaisesRegex(ValueError, "side=None, got side='left'"):
      adapters.with_factors(one_sided, state, state.factors)
    export.of_state(one_sided, state._replace(count=jnp.int32(3)))
    with self.assertRaisesRegex(ValueError, 'of the first link, count <= 3'):
      export.of_state(one_sided, state._replace(count=jnp.int32(4)))
    chain, state = self.chain(
        bl.ChainPolicy.lora(2), others={'^c$': optax.sgd(0.1)}
    )
    with self.assertRaisesRegex(ValueError, r"without others.*\['\^c\$'\]"):
      export.of_state(chain, state)


class FormatTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(scratch)

  def model(self, name='llama2', scan_layers=True, **changes):
    base = decoders.write(self.folder / 'base', name, **changes)
    return hf.load(base, scan_layers=scan_layers)

  def thin(self, model, select='q_proj|down_proj', ranks=(2, 2), seed=0):
    spec = decoder.matrices(model.config, select)
    found = bl.matrices.find(model.params, spec)
    shapes = {m.path: (*m.batch, m.m, m.n) for m in found}
    return export.of_links(draw_links(shapes, ranks, seed))

  def stored(self, folder):
    config = json.loads((folder / peft_format.CONFIG).read_text())
    return config, safetensors.load_file(folder / peft_format.TENSORS)

  def change(self, folder, module):
    """Returns s B A of a module in (in, out), the scale as PEFT reads it."""
    config, tensors = self.stored(folder)
    a, b = (
        tensors[f'base_model.model.{module}.lora_{x}.weight'].astype(np.float64)
        for x in 'AB'
    )
    self.assertEqual(config['lora_alpha'], config['r'])
    self.assertEqual(config['alpha_pattern'], config['rank_pattern'])
    return (b @ a).T

  def write(self, config=None, tensors=None, name='adapter'):
    """Writes an adapter of two modules of layer 1, as PEFT does."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    own = {}
    for module, size_out in (('q_proj', 32), ('k_proj', 32)):
      start = f'base_model.model.model.layers.1.self_attn.{module}.lora_'
      own[f'{start}A.weight'] = draw(3, 32)
      own[f'{start}B.weight'] = draw(size_out, 3)
    own = {k: v for k, v in {**own, **(tensors or {})}.items() if v is not ...}
    raw = {
        'peft_type': 'LORA',
        'r': 3,
        'lora_alpha': 6,
        'target_modules': ['q_proj', 'k_proj'],
        'layers_to_transform': [1],
        'bias': 'none',
        **(config or {}),
    }
    folder = self.folder / name
    folder.mkdir(exist_ok=True)
    (folder / peft_format.CONFIG).write_text(json.dumps(raw))
    safetensors.save_file(own, folder / peft_format.TENSORS)
    return folder, own


class SaveTest(FormatTest):

  @parameterized.parameters(True, False)
  def test_the_files(self, scan_layers):
    model = self.model('mistral', scan_layers)
    thin = self.thin(model, 'q_proj|down_proj|lm_head')
    out = self.folder / 'out'
    rows = peft_format.save(out, thin, model, base_name='owner/name')
    self.assertEqual(
        sorted(p.name for p in out.iterdir()),
        ['adapter_config.json', 'adapter_model.safetensors'],
    )
    config, tensors = self.stored(out)
    self.assertEqual(config['peft_type'], 'LORA')
    self.assertEqual(config['task_type'], 'CAUSAL_LM')
    self.assertEqual(config['base_model_name_or_path'], 'owner/name')
    self.assertEqual(config['bias'], 'none')
    self.assertEqual(config['r'], 4)
    self.assertEqual(config['rank_pattern'], {})
    self.assertEqual(
        config['target_modules'], ['down_proj', 'lm_head', 'q_proj']
    )
    self.assertLen(tensors, 2 * 7)
    start = 'base_model.model.model.layers.2.self_attn.q_proj.lora_'
    self.assertEqual(tensors[f'{start}A.weight'].shape, (4, 32))
    self.assertEqual(tensors[f'{start}B.weight'].shape, (64, 4))
    self.assertEqual(tensors[f'{start}B.weight'].dtype, np.float32)
    self.assertEqual({row['rank'] for row in rows}, {4})
    self.assertEqual({row['rounding'] for row in rows}, {0})
    for i in range(3):
      key = f'layers_{i}/mlp/down_proj/kernel'
      exact = (
          product(thin[key])
          if not scan_layers
          else (product(thin['layers/mlp/down_proj/kernel'])[i])
      )
      got = self.change(out, f'model.layers.{i}.mlp.down_proj')
      np.testing.assert_array_equal(got, exact)
    np.testing.assert_array_equal(
        self.change(out, 'lm_head'), product(thin['lm_head/kernel'])
    )
    self.assertEqual((out.stat().st_mode & 0o777), 0o755)

  def test_ranks_of_modules(self):
    """Patterns name a module by its end, and no other: layers.1, not layers.11."""
    model = self.model(num_hidden_layers=12)
    links = []
    for seed in (0, 1):
      one = self.thin(model, 'q_proj', (2,), seed)
      links.append(export.as_pairs(one))
    path = 'layers/self_attn/q_proj/kernel'
    links[1][path]['right'] = links[1][path]['right'].at[1].set(0)
    for link in links:
      link[path]['right'] = link[path]['right'].at[3].set(0)
    out = self.folder / 'out'
    rows = peft_format.save(out, export.of_links(links), model)
    # No change has rank 1: PEFT knows no other.
    self.assertEqual([row['rank'] for row in rows], [4, 2, 4, 1] + [4] * 8)
    config, tensors = self.stored(out)
    self.assertEqual(
        config['rank_pattern'],
        {
            r'layers\.1\.self_attn\.q_proj': 2,
            r'layers\.3\.self_attn\.q_proj': 1,
        },
    )
    name = 'base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight'
    self.assertEqual(tensors[name.format(1)].shape, (2, 32))
    self.assertEqual(tensors[name.format(11)].shape, (4, 32))
    again = peft_import.load(out, model)
    got = again.factors[path]['left'] @ again.factors[path]['right']
    self.assertFalse(np.any(got[3]))
    assert_near(got, total(links, path), 1e-6)

  def test_some_layers_are_named_in_full(self):
    model = self.model(scan_layers=False)
    out = self.folder / 'out'
    peft_format.save(out, self.thin(model, '^layers_1/.*q_proj'), model)
    config, tensors = self.stored(out)
    self.assertEqual(
        config['target_modules'], ['model.layers.1.self_attn.q_proj']
    )
    self.assertLen(tensors, 2)

  def test_bfloat16_says_what_it_rounds(self):
    model = self.model()
    thin = self.thin(model)
    out = self.folder / 'out'
    rows = peft_format.save(out, thin, model, dtype='bfloat16')
    _, tensors = self.stored(out)
    self.assertEqual(
        {x.dtype for x in tensors.values()}, {np.dtype(ml_dtypes.bfloat16)}
    )
    for row in rows:
      layer = int(row['module'].split('.')[2])
      path = '/'.join(['layers', *row['module'].split('.')[3:], 'kernel'])
      exact = product(thin[path])[layer]
      apart = np.linalg.norm(self.change(out, row['module']) - exact)
      np.testing.assert_allclose(
          row['rounding'], apart / np.linalg.norm(exact), rtol=1e-6
      )
      self.assertBetween(row['rounding'], 1e-4, 1e-2)
    again = peft_import.load(out, model)
    for path, pair in again.factors.items():
      self.assertEqual(pair['left'].dtype, np.float32)
      np.testing.assert_array_equal(
          pair['left'], thin[path].left.astype(ml_dtypes.bfloat16)
      )

  @parameterized.parameters((2, 8), (8, 8), (9, 16), (30, 32))
  def test_one_rank_for_vllm(self, rank, stored):
    model = self.model(num_hidden_layers=2)
    thin = self.thin(model, 'q_proj', (rank,))
    out = self.folder / 'out'
    rows = peft_format.save(out, thin, model, style='vllm')
    self.assertEqual({row['rank'] for row in rows}, {stored})
    config, tensors = self.stored(out)
    self.assertEqual((config['r'], config['lora_alpha']), (stored, stored))
    self.assertEqual(
        (config['rank_pattern'], config['alpha_pattern']), ({}, {})
    )
    self.assertFalse(config['use_rslora'])
    for name, x in tensors.items():
      self.assertEqual(x.shape, (stored, 32) if '_A' in name else (32, stored))
    np.testing.assert_allclose(
        self.change(out, 'model.layers.1.self_attn.q_proj'),
        product(thin['layers/self_attn/q_proj/kernel'])[1],
        atol=1e-12,
    )

  def test_rejects(self):
    model = self.model('mistral')
    thin = self.thin(model, 'q_proj|lm_head')
    out = self.folder / 'out'
    save = lambda thin=thin, model=model, **options: peft_format.save(
        out, thin, model, **options
    )
    with self.assertRaisesRegex(ValueError, "style in .*got style='x'"):
      save(style='x')
    with self.assertRaisesRegex(ValueError, "dtype in .*got dtype='float16'"):
      save(dtype='float16')
    with self.assertRaisesRegex(ValueError, "'vllm', got lm_head"):
      save(style='vllm')
    path = 'layers/self_attn/q_proj/kernel'
    wide = {
        path: export.Thin(
            np.ones((3, 32, 600)),
            np.ones((3, 600, 64)),
            np.full(3, 600),
            np.zeros(3),
        )
    }
    with self.assertRaisesRegex(ValueError, 'ranks <= 512 .*got 600.*truncate'):
      save(wide, style='vllm')
    with self.assertRaisesRegex(ValueError, 'at least one matrix'):
      save({})
    tied = self.model('qwen2')
    head = {'lm_head/kernel': thin['lm_head/kernel']}
    with self.assertRaisesRegex(ValueError, 'got lm_head/kernel'):
      save(head, model=tied)
    table = {'embed_tokens/embedding': thin['lm_head/kernel']}
    with self.assertRaisesRegex(ValueError, 'got embed_tokens/embedding'):
      save(table)
    with self.assertRaisesRegex(ValueError, rf'for {path}, got \(3, 32, 4\)'):
      save({path: thin[path]}, model=self.model('qwen3'))
    thin[path].right[2, 0, 0] = np.inf
    with self.assertRaisesRegex(ValueError, f'finite factors.*{path}'):
      save()
    self.assertEqual([p.name for p in self.folder.iterdir()], ['base'])
    out.mkdir()
    with self.assertRaisesRegex(FileExistsError, 'nothing is overwritten'):
      save()

  def test_nothing_is_left_of_a_failure(self):
    model = self.model()
    failing = mock.patch.object(
        safetensors, 'save_file', side_effect=OSError('full')
    )
    with failing, self.assertRaisesRegex(OSError, 'full'):
      peft_format.save(self.folder / 'out', self.thin(model), model)
    self.assertEqual([p.name for p in self.folder.iterdir()], ['base'])


class LoadTest(FormatTest):

  def merged(self, adapter, model):
    """Returns {path: change} as a chain merges it."""
    zeros = jax.tree.map(jnp.zeros_like, model.params)
    chain, state = peft_import.start(
        adapter, optax.sgd(0.1), jax.random.key(0), zeros
    )
    leaves = bl.matrices.named_leaves(chain.params(state))
    return {path: np.asarray(x) for path, x in leaves.items() if np.any(x)}

  def delta(self, tensors, name, scale):
    start = f'base_model.model.model.layers.1.self_attn.{name}.lora_'
    return (scale * tensors[f'{start}B.weight'] @ tensors[f'{start}A.weight']).T

  @parameterized.product(
      scan_layers=(True, False),
      config=(
          ({}, 2.0),
          ({'use_rslora': True}, 6 / 3**0.5),
          ({'alpha_pattern': {'k_proj': 6.0, 'q_proj': 12}}, 4.0),
          ({'r': 8, 'rank_pattern': {r'layers\.1\..*': 3}}, 2.0),
          ({'target_modules': r'.*\.(q|k)_proj'}, 2.0),
          (
              {
                  'target_modules': ['q_proj', 'k_proj', 'v_proj'],
                  'exclude_modules': ['v_proj'],
              },
              2.0,
          ),
          ({'init_lora_weights': 'eva', 'lora_dropout': 0.1}, 2.0),
          ({'layers_to_transform': 1, 'use_dora': False}, 2.0),
      ),
  )
  def test_factors_and_scale(self, scan_layers, config):
    config, scale = config
    folder, tensors = self.write(config)
    model = self.model(scan_layers=scan_layers)
    adapter = peft_import.load(folder, model)
    found = self.merged(adapter, model)
    self.assertLen(found, 2)
    expected = self.delta(tensors, 'q_proj', scale)
    start = 'base_model.model.model.layers.1.self_attn.q_proj.lora_'
    if scan_layers:
      got = found['layers/self_attn/q_proj/kernel']
      self.assertFalse(np.any(got[[0, 2]]))
      np.testing.assert_allclose(got[1], expected, atol=1e-5)
      one = adapter.factors['layers/self_attn/q_proj/kernel']
      one = {side: x[1] for side, x in one.items()}
    else:
      got = found['layers_1/self_attn/q_proj/kernel']
      np.testing.assert_allclose(got, expected, atol=1e-5)
      one = adapter.factors['layers_1/self_attn/q_proj/kernel']
    # A and B as they are: their gradients are PEFT's.
    np.testing.assert_array_equal(one['left'], tensors[f'{start}A.weight'].T)
    np.testing.assert_array_equal(one['right'], tensors[f'{start}B.weight'].T)

  def test_scales_that_differ_in_a_stack(self):
    rng = np.random.default_rng(1)
    start = 'base_model.model.model.layers.2.self_attn.q_proj.lora_'
    more = {
        f'{start}A.weight': rng.normal(size=(5, 32)).astype(np.float32),
        f'{start}B.weight': rng.normal(size=(32, 5)).astype(np.float32),
    }
    config = {
        'target_modules': r'.*(1.*(q|k)_proj|2.*q_proj)',
        'layers_to_transform': None,
        'rank_pattern': {'layers.2.self_attn.q_proj': 5},
    }
    folder, tensors = self.write(config, more)
    model = self.model()
    got = self.merged(peft_import.load(folder, model), model)
    got = got['layers/self_attn/q_proj/kernel']
    expected = self.delta(tensors, 'q_proj', 2.0)
    np.testing.assert_allclose(got[1], expected, atol=1e-5)
    expected = 1.2 * (more[f'{start}B.weight'] @ more[f'{start}A.weight']).T
    np.testing.assert_allclose(got[2], expected, atol=1e-5)

  def test_a_rank_above_both_sides(self):
    rng = np.random.default_rng(1)
    tensors = {
        f'base_model.model.model.layers.1.self_attn.{m}.lora_{x}.weight': (
            rng.normal(size=shape).astype(np.float32)
        )
        for m in ('q_proj', 'k_proj')
        for x, shape in (('A', (40, 32)), ('B', (32, 40)))
    }
    folder, tensors = self.write({'r': 40, 'lora_alpha': 40}, tensors)
    model = self.model()
    adapter = peft_import.load(folder, model)
    got = self.merged(adapter, model)['layers/self_attn/q_proj/kernel'][1]
    np.testing.assert_allclose(
        got, self.delta(tensors, 'q_proj', 1.0), atol=1e-4
    )
    one = adapter.factors['layers/self_attn/q_proj/kernel']
    chex.assert_shape(one['left'], (3, 32, 32))

  def test_a_weighted_sum(self):
    first, tensors = self.write()
    second, others = self.write({'use_rslora': True}, name='second')
    others = {k: v + 1 for k, v in others.items()}
    safetensors.save_file(others, second / peft_format.TENSORS)
    model = self.model()
    adapter = peft_import.load([first, second], model, weights=[0.5, -2.0])
    got = self.merged(adapter, model)['layers/self_attn/k_proj/kernel'][1]
    expected = 0.5 * self.delta(tensors, 'k_proj', 2.0)
    expected -= 2 * self.delta(others, 'k_proj', 6 / 3**0.5)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    rank = adapter.factors['layers/self_attn/k_proj/kernel']['left'].shape[-1]
    self.assertEqual(rank, 4)  # Of three directions and the ones.
    plain = self.merged(peft_import.load([first, second], model), model)
    scaled = peft_import.load([first, second], model, weights=[1.0, 1.0])
    chex.assert_trees_all_equal(plain, self.merged(scaled, model))
    with self.assertRaisesRegex(ValueError, '2 finite weights'):
      peft_import.load([first, second], model, weights=[1.0])
    half = peft_import.load(first, model, weights=[0.5])
    got = self.merged(half, model)['layers/self_attn/k_proj/kernel'][1]
    np.testing.assert_allclose(
        got, self.delta(tensors, 'k_proj', 1.0), atol=1e-5
    )

  @parameterized.parameters(True, False)
  @pytest.mark.slow
  def test_ours_comes_back(self, scan_layers):
    model = self.model('qwen3', scan_layers)
    adapter = None
    thin = self.thin(model, '^layers', (3,))
    for i in range(2):
      out = self.folder / f'out{i}'
      peft_format.save(out, thin, model)
      adapter = peft_import.load(out, model)
      chain, state = peft_import.start(
          adapter, optax.sgd(0.1), jax.random.key(i), model.params
      )
      again = export.of_state(chain, state)
      chex.assert_trees_all_equal(export.as_pairs(again), export.as_pairs(thin))
      thin = again

  @parameterized.parameters(
      dict(peft_type='IA3'),
      dict(peft_type='LOHA'),
      dict(peft_type='PROMPT_TUNING'),
      dict(peft_type=None),
      dict(use_dora=True),
      dict(modules_to_save=['lm_head']),
      dict(trainable_token_indices=[1]),
      dict(fan_in_fan_out=True),
      dict(bias='all'),
      dict(bias='lora_only'),
      dict(lora_bias=True),
      dict(target_parameters=['mlp.up_proj.weight']),
      dict(layer_replication=[[0, 2], [1, 3]]),
      dict(layers_pattern='h'),
      dict(r='8'),
      dict(lora_alpha='8'),
      dict(rank_pattern=[1]),
      dict(target_modules=None),
      dict(layers_to_transform='1'),
      dict(megatron_config={'a': 1}),
      dict(init_lora_weights='pissa'),
      dict(init_lora_weights='pissa_niter_4'),
      dict(init_lora_weights='olora'),
      dict(init_lora_weights='loftq'),
      dict(init_lora_weights='corda'),
      dict(init_lora_weights='lora_ga'),
      dict(init_lora_weights='mica'),
      dict(use_qalora=True),
      dict(alora_invocation_tokens=[1, 2]),
      dict(use_bdlora={'nblocks': 2}),
      dict(a_field_to_come=True),
  )
  def test_fields(self, **field):
    folder, _ = self.write(field)
    ((name, value),) = field.items()
    message = f'Expected {name} .*got {value!r}'.replace('[', r'\[')
    with self.assertRaisesRegex(ValueError, message):
      peft_import.load(folder, self.model())

  @parameterized.parameters(
      (dict(r=0), 'rank of model.layers.1.* >= 1'),
      (dict(r=4), r'lora_A.weight of shape \(4, 32\).*got \(3, 32\)'),
      (dict(lora_alpha=0), 'alpha of model.layers.1.* > 0'),
      (dict(target_modules='('), 'a regular expression in .*got'),
      (dict(rank_pattern={'(': 4}), 'a regular expression in .*got'),
      (dict(target_modules=['q_proj']), 'no factors of .*k_proj .*leave them'),
      (dict(layers_to_transform=[1, 2]), r'layers\.2\..*of shape .*got None'),
      (dict(target_modules='all-linear'), r'layers\.1\..*of shape .*got None'),
  )
  def test_configs(self, config, message):
    folder, _ = self.write(config)
    with self.assertRaisesRegex(ValueError, message):
      peft_import.load(folder, self.model())

  @parameterized.parameters(
      ('model.layers.1.self_attn.q_proj.lora_A.weight', ..., 'got None'),
      ('model.layers.1.self_attn.q_proj.lora_B.weight', (16, 3), r'\(16, 3\)'),
      ('model.layers.1.self_attn.q_proj.lora_B.weight', np.nan, 'finite'),
      ('model.layers.1.self_attn.q_proj.lora_B.weight', np.int8, 'got int8'),
      ('model.layers.9.self_attn.q_proj.lora_B.weight', (32, 3), 'no such lin'),
      ('model.embed_tokens.lora_embedding_A', (3, 96), 'not multiplied'),
      ('model.embed_tokens.weight', (96, 32), 'not that of the base'),
      (
          'model.embed_tokens.base_layer.weight',
          (97, 32),
          'not that of the base',
      ),
      ('lm_head.weight', (96, 32), 'a module saved whole'),
      ('lm_head.base_layer.weight', (96, 32), 'not that of the base'),
      (
          'model.layers.1.self_attn.q_proj.lora_magnitude_vector',
          (32,),
          'DoRA',
      ),
      ('model.layers.1.self_attn.q_proj.lora_B.bias', (32,), 'no factor'),
      ('model.norm.weight', (32,), 'a module saved whole'),
  )
  def test_tensors(self, name, value, message):
    if isinstance(value, tuple):
      value = np.ones(value, np.float32)
    elif value is np.int8:
      value = np.ones((32, 3), np.int8)
    elif value is not ...:
      value = np.full((32, 3), value, np.float32)
    name = f'base_model.model.{name}'
    folder, _ = self.write(tensors={name: value})
    with self.assertRaisesRegex(ValueError, message):
      peft_import.load(folder, self.model())

  def test_heads(self):
    """A head of its own is adapted; one that is the embedding is not."""
    more = {
        'base_model.model.lm_head.lora_A.weight': np.ones((3, 32), np.float32),
        'base_model.model.lm_head.lora_B.weight': np.ones((96, 3), np.float32),
    }
    config = {
        'target_modules': r'.*1\.self_attn\.(q|k)_proj|lm_head',
        'layers_to_transform': None,
    }
    folder, _ = self.write(config, more)
    model = self.model()
    got = self.merged(peft_import.load(folder, model), model)
    np.testing.assert_array_equal(got['lm_head/kernel'], np.full((32, 96), 6.0))
    # PEFT stores the base's own head and embedding beside it.
    own = decoders.weights(model.raw)
    copies = {
        'base_model.model.lm_head.base_layer.weight': own['lm_head.weight'],
        'base_model.model.model.embed_tokens.weight': own[
            'model.embed_tokens.weight'
        ].astype(ml_dtypes.bfloat16),
    }
    folder, _ = self.write(config, {**more, **copies})
    again = self.merged(peft_import.load(folder, model), model)
    chex.assert_trees_all_equal(again, got)
    without = dataclasses.replace(model, params=None)
    with self.assertRaisesRegex(ValueError, r'checkpoint\.params'):
      peft_import.load(folder, without)
    folder, _ = self.write(config, {**more, **dict.fromkeys(copies, ...)})
    tied = self.model(tie_word_embeddings=True)
    with self.assertRaisesRegex(ValueError, 'lm_head.*its head is tied'):
      peft_import.load(folder, tied)

  def test_another_base(self):
    folder, _ = self.write()
    with self.assertRaisesRegex(
        ValueError, r'k_proj.lora_B.*\(16, 3\) in .*got .32'
    ):
      peft_import.load(folder, self.model('qwen2'))

  def test_files(self):
    folder, _ = self.write()
    file = folder / peft_format.TENSORS
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with self.assertRaisesRegex(ValueError, 'a whole safetensors file'):
      peft_import.load(folder, self.model())
    file.rename(folder / 'adapter_model.bin')
    with self.assertRaisesRegex(FileNotFoundError, 'bin is pickled'):
      peft_import.load(folder, self.model())
    (folder / peft_format.CONFIG).unlink()
    with self.assertRaisesRegex(FileNotFoundError, peft_format.CONFIG):
      peft_import.load(folder, self.model())
    with self.assertRaisesRegex(ValueError, 'at least one adapter'):
      peft_import.load([], self.model())
