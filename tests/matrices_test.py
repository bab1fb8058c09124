"""Tests of which leaves are matrices, their views, and their identities."""

import collections
import dataclasses
import hashlib
import itertools
import re
from typing import Any

from absl.testing import parameterized
import chex
import flax
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import matrices

Matrices = matrices.Matrices
Rule = matrices.Rule


def spec(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def paths(tree, selection=None):
  return [matrix.path for matrix in matrices.find(tree, selection)]


class LinenModel(nn.Module):
  """One dense layer, optionally boxed in partitioning metadata."""

  partitioned: bool = False

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.lecun_normal()
    if self.partitioned:
      init = nn.with_partitioning(init, (None, 'model'))
    return nn.Dense(3, name='linear', kernel_init=init)(x)


class NnxModel(nnx.Module):

  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 3, rngs=rngs)


class NnxStack(nnx.Module):

  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(3)])


class Block(nn.Module):
  """One layer of a residual stack, in the form that nn.scan wants."""

  @nn.compact
  def __call__(self, x, _):
    return nn.Dense(3, name='linear')(x), None


class ScannedModel(nn.Module):

  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
        Block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=3,
    )
    return scan(name='layers')(x, None)[0]


class UnrolledModel(nn.Module):

  @nn.compact
  def __call__(self, x):
    for i in range(3):
      x, _ = Block(name=f'layers_{i}')(x, None)
    return x


class SelectionTest(parameterized.TestCase):
  """Which leaves are matrices."""

  def test_flax_trees_select_kernels(self):
    tree = {
        'embed': {'embedding': spec(9, 4)},
        'dense': {'kernel': spec(4, 3), 'bias': spec(3)},
        'out': {'kernel': spec(3, 2), 'lora': spec(3, 2)},
    }
    self.assertEqual(paths(tree), ['dense/kernel', 'out/kernel'])

  def test_plain_trees_select_two_axes(self):
    tree = {'w': spec(4, 3), 'b': spec(3), 't': spec(2, 3, 4), 's': spec()}
    self.assertEqual(paths(tree), ['w'])

  def test_a_bare_array_is_a_matrix(self):
    (matrix,) = matrices.find(spec(4, 3))
    self.assertEqual((matrix.m, matrix.n, matrix.batch), (4, 3, ()))

  @parameterized.parameters(None, 'layers')
  def test_stacked_bias_is_not_selected(self, select):
    tree = {'layers': {'kernel': spec(5, 4, 3), 'bias': spec(5, 3)}}
    rules = (matrices.stacked('layers/kernel'),)
    found = paths(tree, Matrices(select=select, rules=rules))
    self.assertEqual(found, ['layers/kernel'])

  def test_expression_selects_all_but_vectors_biases_and_scales(self):
    tree = {
        'embedding': spec(9, 4),
        'norm': {'scale': spec(2, 4), 'bias': spec(2, 4)},
        'kernel': spec(4, 3),
        'vector': spec(4),
    }
    self.assertEqual(paths(tree, Matrices('.')), ['embedding', 'kernel'])

  def test_expression_narrows_the_kernels(self):
    tree = {'a': {'kernel': spec(4, 3)}, 'b': {'kernel': spec(4, 3)}}
    self.assertEqual(paths(tree, Matrices('^b/')), ['b/kernel'])

  def test_a_rule_selects_but_not_against_the_expression(self):
    tree = {'a': {'kernel': spec(4, 3)}, 'b': {'tensor': spec(2, 3, 4)}}
    rules = (matrices.heads_out('tensor'),)
    self.assertEqual(
        paths(tree, Matrices(rules=rules)), ['a/kernel', 'b/tensor']
    )
    self.assertEqual(
        paths(tree, Matrices(select='a', rules=rules)), ['a/kernel']
    )

  @parameterized.parameters(jnp.int32, jnp.uint8, jnp.bool_)
  def test_leaves_that_are_not_floating_are_ignored(self, dtype):
    tree = {'codes': spec(4, 3, dtype=dtype), 'w': spec(4, 3)}
    self.assertEqual(paths(tree), ['w'])
    self.assertEqual(paths(tree, Matrices('.')), ['w'])

  def test_mask_marks_the_matrices(self):
    tree = {'a': {'kernel': spec(4, 3), 'bias': spec(3)}, 'b': [spec(2, 2)]}
    expected = {'a': {'kernel': True, 'bias': False}, 'b': [False]}
    self.assertEqual(matrices.mask(tree), expected)

  def test_mask_drives_optax_masked(self):
    tree = {'a': {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones(3)}}
    tx = optax.masked(optax.scale(2.0), matrices.mask)
    updates, _ = tx.update(tree, tx.init(tree))
    expected = {'a': {'kernel': 2 * jnp.ones((4, 3)), 'bias': jnp.ones(3)}}
    chex.assert_trees_all_equal(updates, expected)


class RejectsTest(parameterized.TestCase):
  """Every bad selection, with its message."""

  def test_kernel_without_rule_shows_a_rule_that_works(self):
    tree = {'conv': {'kernel': spec(3, 3, 4, 5)}}
    with self.assertRaisesRegex(ValueError, 'a rule for conv/kernel') as caught:
      matrices.find(tree)
    message = str(caught.exception)
    self.assertIn('(3, 3, 4, 5)', message)
    shown = re.search(r'Rule\(.*?right=\(\d+,\)\)', message).group()
    rule = eval(shown, {'Rule': Rule})  # As a user would paste it.
    (matrix,) = matrices.find(tree, Matrices(rules=(rule,)))
    self.assertEqual((matrix.m, matrix.n), (36, 5))

  def test_selected_tensor_of_a_plain_tree_needs_a_rule(self):
    with self.assertRaisesRegex(ValueError, 'a rule for t of shape'):
      matrices.find({'t': spec(2, 3, 4)}, Matrices('t'))

  @parameterized.named_parameters(
      ('rule', Matrices(rules=(Rule('nowhere', (0,), (1,)),)), 'nowhere'),
      ('select', Matrices('nowhere'), 'nowhere'),
  )
  def test_no_match_lists_the_paths(self, selection, pattern):
    tree = {'params': {'a': {'kernel': spec(4, 3), 'bias': spec(3)}}}
    with self.assertRaisesRegex(ValueError, pattern) as caught:
      matrices.find(tree, selection)
    self.assertIn('a/kernel (4, 3)', str(caught.exception))
    self.assertIn('a/bias (3,)', str(caught.exception))

  def test_no_default_match_lists_the_paths(self):
    with self.assertRaisesRegex(
        ValueError, r'default selection(.|\n)*v \(3,\)'
    ):
      matrices.find({'v': spec(3)})

  def test_two_rules_with_different_axes(self):
    tree = {'a': {'kernel': spec(2, 3, 4)}}
    rules = (matrices.heads_out('kernel'), matrices.heads_in('a/'))
    with self.assertRaisesRegex(ValueError, 'one rule for a/kernel.*different'):
      matrices.find(tree, Matrices(rules=rules))

  def test_two_rules_with_the_same_axes_agree(self):
    tree = {'a': {'kernel': spec(2, 3, 4)}}
    rules = (matrices.heads_out('kernel'), matrices.heads_out('a/'))
    self.assertEqual(paths(tree, Matrices(rules=rules)), ['a/kernel'])

  @parameterized.named_parameters(
      ('repeated', (0,), (0,), (1,)),
      ('missing', (0,), (1,), ()),
      ('too_large', (0,), (1,), (3,)),
      ('too_small', (0,), (1,), (-4,)),
      ('same_axis_twice', (0, 2), (-1,), (1,)),
  )
  def test_axes_that_do_not_fit(self, left, right, batch):
    rule = Rule('t', left, right, batch)
    with self.assertRaisesRegex(ValueError, 'name each axis of t once'):
      matrices.find({'t': spec(2, 3, 4)}, Matrices(rules=(rule,)))

  @parameterized.parameters(((), (0,)), ((0,), ()))
  def test_rule_without_a_side(self, left, right):
    with self.assertRaisesRegex(ValueError, 'one left and one right axis'):
      Rule('t', left, right)

  def test_pattern_that_is_no_expression(self):
    with self.assertRaisesRegex(ValueError, r'regular expression, got .\(a'):
      Rule('(a', (0,), (1,))

  @parameterized.named_parameters(
      (
          'one_name',
          {'params': {'w': spec(4, 3)}, 'w': spec(4, 3)},
          (),
      ),
      (
          'one_name_and_layer',
          {'layers_0': {'w': spec(4, 3)}, 'layers': [{'w': spec(4, 3)}]},
          (),
      ),
      (
          'an_entry_of_a_stack',
          {'layers_1': {'w': spec(4, 3)}, 'layers': {'w': spec(5, 4, 3)}},
          (matrices.stacked('layers/w'),),
      ),
  )
  def test_leaves_that_would_share_their_draws(self, tree, rules):
    with self.assertRaisesRegex(ValueError, 'w.* with the same name'):
      matrices.find(tree, Matrices(rules=rules))

  def test_layers_beyond_a_stack_have_draws_of_their_own(self):
    tree = {'layers_5': {'w': spec(4, 3)}, 'layers': {'w': spec(5, 4, 3)}}
    rules = (matrices.stacked('layers/w'),)
    self.assertLen(matrices.find(tree, Matrices(rules=rules)), 2)


class NamedTupleTest(parameterized.TestCase):

  def test_value_beside_others_is_a_name(self):
    heads = collections.namedtuple('Heads', 'query key value')
    tree = {'attention': heads(*[jnp.ones((4, 3))] * 3)}
    paths = [matrix.path for matrix in matrices.find(tree)]
    self.assertEqual(
        paths, ['attention/query', 'attention/key', 'attention/value']
    )


class ViewTest(parameterized.TestCase):
  """Views against index arithmetic written out."""

  @parameterized.named_parameters(
      ('conv', matrices.conv('t'), (3, 2, 4, 5), 'abcd->(abc)(d)'),
      ('heads_out', matrices.heads_out('t'), (6, 2, 3), 'abc->(a)(bc)'),
      ('heads_in', matrices.heads_in('t'), (2, 3, 6), 'abc->(ab)(c)'),
      ('stacked', matrices.stacked('t'), (4, 3, 5), 'abc->a(b)(c)'),
      (
          'experts',
          Rule('t', (2,), (3,), batch=(0, 1)),
          (2, 3, 4, 5),
          'abcd->ab(c)(d)',
      ),
      (
          'negative',
          Rule('t', (-2,), (-1,), batch=(-4, -3)),
          (2, 3, 4, 5),
          'abcd->ab(c)(d)',
      ),
      (
          'experts_before_layers',
          Rule('t', (2,), (3,), batch=(1, 0)),
          (2, 3, 4, 5),
          'abcd->ba(c)(d)',
      ),
      ('transposed', Rule('t', (2,), (0,), (1,)), (2, 3, 4), 'abc->b(c)(a)'),
      ('order', Rule('t', (1, 0), (2,)), (2, 3, 4), 'abc->(ba)(c)'),
      ('split', Rule('t', (0, 2), (1,)), (2, 3, 4), 'abc->(ac)(b)'),
      ('two_axes', Rule('t', (0,), (1,)), (4, 3), 'ab->(a)(b)'),
  )
  def test_view_and_round_trip(self, rule, shape, formula):
    # 'abc->b(c)(a)': source axes, then batch, (left), (right).
    source, target = formula.split('->')
    batch, left, right = re.fullmatch(
        r'(\w*)\((\w+)\)\((\w+)\)', target
    ).groups()
    sizes = dict(zip(source, shape, strict=True))
    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    (matrix,) = matrices.find({'t': leaf}, Matrices(rules=(rule,)))
    view = np.asarray(matrix.view(jnp.asarray(leaf)))

    expected = np.empty(view.shape, np.float32)
    for index in np.ndindex(*shape):
      at = dict(zip(source, index, strict=True))
      flat = lambda axes, at=at: np.ravel_multi_index(
          [at[a] for a in axes], [sizes[a] for a in axes]
      )
      place = (*(at[a] for a in batch), flat(left), flat(right))
      expected[place] = leaf[index]
    np.testing.assert_array_equal(view, expected)
    self.assertEqual(
        view.shape, (*(sizes[a] for a in batch), matrix.m, matrix.n)
    )
    self.assertEqual(matrix.batch, tuple(sizes[a] for a in batch))
    np.testing.assert_array_equal(matrix.unview(matrix.view(leaf)), leaf)

  @parameterized.product(
      case=(
          ((6, 5), (0,), (1,), ()),
          ((6, 5), (1,), (0,), ()),
          ((2, 3, 5), (0, 1), (2,), ()),
          ((5, 2, 3), (2, 1), (0,), ()),
          ((2, 5, 3), (0, 2), (1,), ()),
          ((2, 6, 5), (1,), (2,), (0,)),
          ((6, 2, 5), (0,), (2,), (1,)),
          ((3, 2, 5, 4, 2), (3,), (2, 0), (4, 1)),
      ),
      side=('left', 'right'),
  )
  def test_lines_of_any_layout(self, case, side):
    shape, left, right, batch = case
    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
    rule = matrices.Rule('w', left=left, right=right, batch=batch)
    (m,) = matrices.find({'w': leaf}, matrices.Matrices(rules=(rule,)))
    dim = m.m if side == 'left' else m.n
    rng = np.random.default_rng(0)
    rows = np.stack(
        [[*rng.permutation(dim)[:2], dim] for _ in range(m.entries.size)]
    ).reshape(*m.batch, 3)
    found = np.asarray(m.lines(jnp.asarray(leaf), side, jnp.asarray(rows)))
    view, expected = np.array(m.view(jnp.asarray(leaf))), np.zeros_like(found)
    new = -np.arange(found.size, dtype=np.float32).reshape(found.shape)
    moved = m.with_lines(
        jnp.asarray(leaf), side, jnp.asarray(rows), jnp.asarray(new)
    )
    for place in np.ndindex(*m.batch):
      for i, row in enumerate(rows[place][:2]):  # The third is beyond.
        if side == 'left':
          expected[place][i] = view[place][row]
          view[place][row] = new[place][i]
        else:
          expected[place][:, i] = view[place][:, row]
          view[place][:, row] = new[place][:, i]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(m.view(moved), view)

  def test_conv_is_for_two_window_axes(self):
    selection = Matrices(rules=(matrices.conv('t'),))
    with self.assertRaisesRegex(ValueError, 'name each axis of t once'):
      matrices.find({'t': spec(3, 4, 5)}, selection)


class PathTest(parameterized.TestCase):
  """One model has one set of names."""

  def linen(self, partitioned):
    model = LinenModel(partitioned)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4)))

  @parameterized.named_parameters(
      ('linen_variables', lambda self: self.linen(False)),
      ('linen_params', lambda self: self.linen(False)['params']),
      ('partitioned_variables', lambda self: self.linen(True)),
      ('partitioned_params', lambda self: self.linen(True)['params']),
      ('unboxed', lambda self: nn.meta.unbox(self.linen(True))),
      (
          'nnx_state',
          lambda self: nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param),
      ),
      ('nnx_module', lambda self: NnxModel(nnx.Rngs(0))),
      (
          'nnx_pure_dict',
          lambda self: nnx.to_pure_dict(
              nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
          ),
      ),
      ('plain', lambda self: {'linear': {'kernel': spec(4, 3)}}),
  )
  def test_wrappers_leave_no_trace(self, make):
    (matrix,) = matrices.find(make(self))
    self.assertEqual(matrix.path, 'linear/kernel')
    self.assertEqual((matrix.m, matrix.n), (4, 3))
    # The identity that checkpoints and papers' seeds rest on.
    digest = hashlib.blake2b(b'linear/kernel', digest_size=8).digest()
    self.assertEqual(
        matrix.path_hash,
        (
            int.from_bytes(digest[:4], 'little'),
            int.from_bytes(digest[4:], 'little'),
        ),
    )

  def test_partitioned_leaves_are_projected_in_their_box(self):
    model = LinenModel(partitioned=True)
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))['params']
    tx = bl.scale_by_bernoulli_chain(jax.random.key(1), rank=1, prob=1.0)
    update = jax.jit(lambda tree: tx.update(tree, tx.init(tree))[0])
    boxed, plain = update(params), update(nn.meta.unbox(params))
    self.assertIsInstance(boxed['linear']['kernel'], nn.Partitioned)
    chex.assert_trees_all_equal(nn.meta.unbox(boxed), plain)

  def test_a_dictionary_may_have_a_key_value(self):
    self.assertEqual(
        paths({'query': spec(2, 2), 'value': spec(2, 2)}), ['query', 'value']
    )

  def test_only_a_leading_collection_is_dropped(self):
    self.assertEqual(
        paths({'a': {'params': {'w': spec(2, 2)}}}), ['a/params/w']
    )
    self.assertEqual(paths({'params': spec(2, 2)}), ['params'])


class IdentityTest(parameterized.TestCase):
  """Draws depend on path and layer, not on siblings or on the layout."""

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    self.stacks = {
        'attn': {'kernel': make(4, 6, 5)},
        'experts': {'kernel': make(4, 3, 5, 6)},
    }
    self.rules = {
        'scanned': (
            matrices.stacked('attn/kernel'),
            Rule('experts/kernel', (2,), (3,), (0, 1)),
        ),
        'unrolled': (matrices.stacked('experts/kernel'),),
    }

  def unroll(self, layout):
    layer = lambda i: jax.tree.map(lambda x: x[i], self.stacks)
    if layout == 'list':
      return {'layers': [layer(i) for i in range(4)]}
    if layout == 'keys':
      return {'layers': {str(i): layer(i) for i in range(4)}}
    return {f'layers_{i}': layer(i) for i in range(4)}

  @parameterized.parameters(
      ('layers_3/mlp/kernel', 'layers/mlp/kernel', 3),
      ('layers/3/mlp/kernel', 'layers/mlp/kernel', 3),
      ('encoder/layer/12/q/kernel', 'encoder/layer/q/kernel', 12),
      ('h_0/kernel', 'h/kernel', 0),
      ('blocks/7/kernel', 'blocks/kernel', 7),
      ('layers/kernel', 'layers/kernel', 0),
      ('Dense_3/kernel', 'Dense_3/kernel', 0),
      ('sublayers_3/kernel', 'sublayers_3/kernel', 0),
  )
  def test_layer_index_is_read_from_the_path(self, path, name, layer):
    tree = spec(4, 3)
    for part in reversed(path.split('/')):
      tree = {part: tree}
    (matrix,) = matrices.find(tree)
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    self.assertEqual(matrix.path_hash[0], int.from_bytes(digest[:4], 'little'))
    self.assertEqual(matrix.path_hash[1], int.from_bytes(digest[4:], 'little'))
    self.assertEqual(matrix.layer, layer)
    np.testing.assert_array_equal(matrix.entries, layer)

  def test_layer_expression_can_be_changed(self):
    tree = {f'stage{i}': {'kernel': spec(4, 3)} for i in range(3)}
    found = matrices.find(tree, Matrices(layer=r'stage(\d+)'))
    self.assertLen({matrix.path_hash for matrix in found}, 1)
    self.assertEqual([matrix.layer for matrix in found], [0, 1, 2])

  def test_paths_have_different_words(self):
    tree = {name: {'kernel': spec(4, 3)} for name in ('q', 'k', 'v', 'o')}
    self.assertLen({matrix.path_hash for matrix in matrices.find(tree)}, 4)

  @parameterized.parameters('suffix', 'keys', 'list')
  def test_scanned_and_unrolled_have_the_same_words_and_entries(self, layout):
    scanned = matrices.find(
        {'layers': self.stacks}, Matrices(rules=self.rules['scanned'])
    )
    unrolled = matrices.find(
        self.unroll(layout), Matrices(rules=self.rules['unrolled'])
    )
    for stack in scanned:
      layers = [m for m in unrolled if m.path_hash == stack.path_hash]
      self.assertEqual([m.layer for m in layers], [0, 1, 2, 3])
      np.testing.assert_array_equal(
          stack.entries, np.stack([m.entries for m in layers])
      )
    every = np.concatenate([m.entries.ravel() for m in scanned[1:]])
    self.assertLen(set(every.tolist()), 12)  # 4 layers of 3 experts.

  def test_real_flax_models_agree_scanned_unrolled_and_in_nnx(self):
    init = lambda model: jax.eval_shape(
        model.init, jax.random.key(0), jnp.ones((1, 3))
    )
    rules = (matrices.stacked('layers/linear/kernel'),)
    (scanned,) = matrices.find(init(ScannedModel()), Matrices(rules=rules))
    unrolled = matrices.find(init(UnrolledModel()))
    self.assertEqual(scanned.batch, (3,))
    self.assertEqual({m.path_hash for m in unrolled}, {scanned.path_hash})
    self.assertEqual([int(m.entries) for m in unrolled], [0, 1, 2])
    np.testing.assert_array_equal(scanned.entries, [0, 1, 2])
    state = nnx.state(NnxStack(nnx.Rngs(0)), nnx.Param)
    listed = matrices.find(state)
    self.assertLen({m.path_hash for m in listed}, 1)
    self.assertEqual([m.layer for m in listed], [0, 1, 2])

  def test_scanned_and_unrolled_get_the_very_same_updates(self):
    # Frames of 16 entries are one batched factorisation in both layouts, and
    # products of different batch shapes may round differently: 1e-6, a few
    # units in the last place of entries of size one.
    def updates(tree, rules):
      tx = bl.scale_by_bernoulli_chain(
          jax.random.key(7), rank=2, matrices=Matrices(rules=rules)
      )
      return jax.jit(lambda tree: tx.update(tree, tx.init(tree))[0])(tree)

    scanned = updates({'layers': self.stacks}, self.rules['scanned'])
    unrolled = updates(self.unroll('suffix'), self.rules['unrolled'])
    layers = [unrolled[f'layers_{i}'] for i in range(4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    chex.assert_trees_all_close(
        scanned['layers'], stacked, rtol=1e-6, atol=1e-6
    )

  def test_selecting_a_sibling_changes_nothing(self):
    tree = {
        'a': {'kernel': jnp.ones((6, 5))},
        'b': {'kernel': jnp.ones((6, 5))},
        'c': {'kernel': jnp.ones((5, 8))},
    }

    def update(select):
      tx = bl.scale_by_bernoulli_chain(
          jax.random.key(7), rank=2, matrices=Matrices(select)
      )
      return jax.jit(lambda tree: tx.update(tree, tx.init(tree))[0])(tree)

    alone, both, every = update('^b'), update('^b|^c'), update('.')
    # Batches of another size may round differently: units in the last place.
    for other in (both, every):
      chex.assert_trees_all_close(alone['b'], other['b'], rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(both['c'], every['c'], rtol=1e-6, atol=1e-6)
    self.assertGreater(
        jnp.max(jnp.abs(every['a']['kernel'] - every['b']['kernel'])), 0.1
    )


class UnmaskedTest(parameterized.TestCase):

  def test_hidden_leaves_are_found(self):
    tree = {'a': jnp.ones(2), 'b': optax.MaskedNode()}
    with self.assertRaisesRegex(ValueError, 'page to stand outermost'):
      matrices.check_unmasked(tree, 'page')
    matrices.check_unmasked({'a': jnp.ones(2)}, 'page')


Box = collections.namedtuple('Box', 'kernel')


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
  kernel: Any
  rate: Any


@dataclasses.dataclass
class Unregistered:
  kernel: Any


class LegitimateTest(parameterized.TestCase):
  """What people keep in their params is a matrix, passes, or is named."""

  @parameterized.named_parameters(
      ('float', 0.5),
      ('int', 3),
      ('bool', True),
      ('complex', 1j),
      ('numpy_scalar', np.float32(0.5)),
      ('numpy_array', np.ones((4, 3), np.int32)),
      ('integers', spec(4, 3, dtype=jnp.int32)),
      ('booleans', spec(4, 3, dtype=bool)),
      ('complex_matrix', spec(4, 3, dtype=jnp.complex64)),
      ('empty', spec(0, 3)),
      ('empty_other_side', spec(3, 0)),
      ('empty_stack', spec(0, 3, 4)),
      ('vector', spec(3)),
      ('none', None),
      ('key', jax.eval_shape(lambda: jax.random.key(0))),
  )
  def test_others_are_passed_over(self, other):
    tree = {'a': other, 'w': spec(4, 3)}
    self.assertEqual(paths(tree), ['w'])
    mask = [leaf for leaf in jax.tree.leaves(matrices.mask(tree)) if leaf]
    self.assertLen(mask, 1)

  @parameterized.named_parameters(
      ('list', [spec(4, 3)], '0'),
      ('tuple', (spec(4, 3),), '0'),
      ('named_tuple', Box(spec(4, 3)), 'kernel'),
      ('dataclass', Registered(spec(4, 3), 0.1), 'kernel'),
      ('whole_numbers', {7: spec(4, 3)}, '7'),
      ('nothing_around_it', spec(4, 3), ''),
      ('numpy', {'w': np.ones((4, 3), np.float64)}, 'w'),
      ('one_row', {'w': spec(1, 3)}, 'w'),
      ('one_column', {'w': spec(4, 1)}, 'w'),
      ('float8', {'w': spec(4, 3, dtype=jnp.float8_e4m3fn)}, 'w'),
      ('slash', {'a/b': spec(4, 3)}, 'a/b'),
  )
  def test_containers_and_leaves(self, tree, path):
    self.assertEqual(paths(tree), [path])

  @parameterized.named_parameters(
      ('array', lambda x: x),
      ('list', lambda x: [x, {'a': [x]}]),
      ('dataclass', lambda x: Registered(x, 0.5)),
      ('whole_numbers', lambda x: {1: x, 0: 2.0 * x}),
      ('numpy', lambda x: {'w': np.asarray(x), 'n': np.float32(2)}),
      ('empty', lambda x: {'w': x, 'e': jnp.zeros((0, 3))}),
      ('row', lambda x: {'w': x[:1], 'v': x[:, :1]}),
  )
  def test_the_chain_moves_them(self, make):
    tree = make(jnp.arange(12.0).reshape(4, 3))
    tx = bl.bernoulli_lora(1.0, jax.random.key(0), rank=1, prob=1.0)
    updates, _ = tx.update(tree, tx.init(tree), tree)
    self.assertEqual(jax.tree.structure(updates), jax.tree.structure(tree))
    moved = optax.apply_updates(tree, updates)
    for old, new in zip(
        jax.tree.leaves(tree), jax.tree.leaves(moved), strict=True
    ):
      self.assertEqual(np.shape(old), np.shape(new))
      if np.ndim(old) == 2 and min(np.shape(old)) > 1:
        self.assertEqual(np.linalg.matrix_rank(np.asarray(new - old)), 1)

  def test_a_class_that_is_no_pytree_is_named(self):
    tree = {'block': Unregistered(spec(4, 3)), 'w': spec(4, 3)}
    with self.assertRaisesRegex(TypeError, 'block of type Unreg.*dataclass'):
      matrices.find(tree)

  @parameterized.named_parameters(
      ('slash', {'a/b': spec(4, 3), 'a': {'b': spec(3)}}, 'a/b'),
      ('collection', {'params': {'w': spec(4, 3)}, 'w': spec(3)}, 'w'),
  )
  def test_two_leaves_of_one_path_are_refused(self, tree, path):
    with self.assertRaisesRegex(ValueError, f'with the same name, {path}'):
      matrices.find(tree)

  def test_a_layer_number_beyond_the_words(self):
    with self.assertRaisesRegex(ValueError, 'below 2.32 in layers_9'):
      matrices.find({'layers_99999999999': {'w': spec(4, 3)}})

  def test_a_kernel_of_three_axes_is_told_of_all_linear(self):
    with self.assertRaisesRegex(
        ValueError, r'bl\.inject\.all_linear\(loss, params, batch\)'
    ):
      matrices.find({'query': {'kernel': spec(4, 2, 3)}})


class RulesOfModulesTest(parameterized.TestCase):
  """A rule for a module is a rule for its kernels."""

  @parameterized.named_parameters(
      ('mlp', matrices.stacked('^layers/mlp/'), (2, 4, 3), (2, 3)),
      ('heads', matrices.heads_out('^layers/mlp/'), (4, 2, 3), (2, 3)),
      ('conv', matrices.conv('^layers/mlp/'), (3, 3, 4, 5), (5,)),
      # As many axes as the rule has: (layers, heads, head_dim).
      ('by_name', matrices.stacked('^layers/mlp/'), (2, 4, 3), (2, 4, 3)),
      ('any', matrices.stacked('.'), (2, 4, 3), (2, 4, 3)),
  )
  def test_biases_and_scales_are_left_alone(self, rule, kernel, bias):
    module = {'kernel': spec(*kernel), 'bias': spec(*bias)}
    tree = {'layers': {'mlp': {**module, 'scale': spec(*bias)}}}
    for select in (None, 'mlp', '.'):
      found = paths(tree, Matrices(select=select, rules=(rule,)))
      self.assertEqual(found, ['layers/mlp/kernel'])

  def test_a_bias_that_a_rule_names(self):
    tree = {'mlp': {'kernel': spec(4, 3), 'bias': spec(2, 4, 3)}}
    rule = matrices.stacked('mlp/bias')
    found = paths(tree, Matrices(rules=(rule,)))
    self.assertEqual(found, ['mlp/bias', 'mlp/kernel'])

  def test_a_rule_for_nothing_but_biases(self):
    tree = {'mlp': {'bias': spec(2, 4, 3)}, 'w': {'kernel': spec(4, 3)}}
    with self.assertRaisesRegex(ValueError, "rule pattern 'mlp'"):
      matrices.find(tree, Matrices(rules=(matrices.stacked('mlp'),)))

  def test_a_rule_for_no_floats(self):
    tree = {'w': spec(2, 4, 3, dtype=jnp.int8), 'v': spec(4, 3)}
    with self.assertRaisesRegex(ValueError, r"pattern 'w'(.|\n)*int8"):
      matrices.find(tree, Matrices(rules=(matrices.stacked('w'),)))


class LayersOfDifferentSizesTest(parameterized.TestCase):
  """Layers may differ in their number of experts."""

  rules = (matrices.stacked('kernel'),)

  def tree(self, sizes):
    return {
        f'layers_{i}': {'kernel': spec(size, 4, 5)}
        for i, size in enumerate(sizes)
    }

  def identities(self, tree, select=None):
    return {
        (matrix.path, place): (matrix.path_hash, int(number))
        for matrix in matrices.find(tree, Matrices(select, self.rules))
        for place, number in np.ndenumerate(matrix.entries)
    }

  @parameterized.parameters(*itertools.product((1, 2, 3), repeat=3))
  def test_no_two_draws_coincide(self, *sizes):
    found = self.identities(self.tree(sizes))
    self.assertLen(set(found.values()), sum(sizes))

  def test_layers_of_equal_sizes_are_numbered_as_ever(self):
    tree = self.tree((3, 3, 3))
    stack = {'layers': {'kernel': spec(3, 3, 4, 5)}}
    (matrix,) = matrices.find(
        stack, Matrices(rules=(Rule('kernel', (2,), (3,), (0, 1)),))
    )
    expected = [
        (matrix.path_hash, int(number)) for number in matrix.entries.flat
    ]
    self.assertEqual([*self.identities(tree).values()], expected)

  def test_selecting_a_sibling_changes_nothing(self):
    tree = self.tree((2, 3, 2))
    every = self.identities(tree)
    for layer in range(3):
      alone = self.identities(tree, f'layers_{layer}')
      self.assertEqual(alone, {key: every[key] for key in alone})
      self.assertLen(alone, (2, 3, 2)[layer])


class AlignTest(parameterized.TestCase):
  """Two trees are paired by path."""

  def setUp(self):
    super().setUp()
    self.tree = {
        'b': {'kernel': np.full((2, 3), 1.0)},
        'a': {'kernel': np.full((2, 3), 2.0), 'bias': np.full(3, 3.0)},
    }

  @parameterized.named_parameters(
      ('ordered', lambda tree: collections.OrderedDict(tree)),
      (
          'ordered_below',
          lambda tree: {
              name: collections.OrderedDict(reversed(part.items()))
              for name, part in tree.items()
          },
      ),
      ('frozen', flax.core.freeze),
      ('collection', lambda tree: {'params': tree}),
      (
          'boxed',
          lambda tree: jax.tree.map(lambda x: nn.Partitioned(x, ()), tree),
      ),
      ('nnx_variables', lambda tree: jax.tree.map(nnx.Param, tree)),
      ('nnx_state', lambda tree: nnx.State(jax.tree.map(nnx.Param, tree))),
  )
  def test_containers(self, wrap):
    other = wrap(self.tree)
    for first, second in ((self.tree, other), (other, self.tree)):
      got = matrices.align(first, second)
      self.assertEqual(jax.tree.structure(got), jax.tree.structure(first))
      chex.assert_trees_all_equal(
          matrices.named_leaves(got), matrices.named_leaves(self.tree)
      )

  @parameterized.parameters('base', 'tuned')
  def test_a_path_that_only_one_has(self, owner):
    more = {**self.tree, 'c': {'kernel': np.ones((2, 3))}}
    pair = (more, self.tree) if owner == 'base' else (self.tree, more)
    with self.assertRaisesRegex(
        ValueError, f"in base and tuned, got 'c/kernel' in {owner} alone"
    ):
      matrices.align(*pair, ('base', 'tuned'))


class EightBitsTest(parameterized.TestCase):
  """Weights of 8 bits: factors, frames and sums in float32."""

  @parameterized.parameters(
      ('float8_e5m2', 'gaussian', 0.5),
      ('float8_e4m3fn', 'coordinate', 0.5),
      ('float8_e4m3fn', 'coordinate', 1.0),
  )
  def test_chain(self, dtype, sketch, prob):
    self.check_chain(dtype, sketch, prob)

  @parameterized.parameters(
      *(
          case
          for case in itertools.product(
              ('float8_e4m3fn', 'float8_e5m2'),
              ('gaussian', 'coordinate', 'srht'),
              (0.5, 1.0),
          )
          if case
          not in (
              ('float8_e5m2', 'gaussian', 0.5),
              ('float8_e4m3fn', 'coordinate', 0.5),
              ('float8_e4m3fn', 'coordinate', 1.0),
          )
      )
  )
  @pytest.mark.slow
  def test_chain_otherwise(self, dtype, sketch, prob):
    self.check_chain(dtype, sketch, prob)

  def check_chain(self, dtype, sketch, prob):
    tree = {'w': jnp.ones((6, 4), dtype)}
    tx = bl.scale_by_bernoulli_chain(
        jax.random.key(0),
        rank=2,
        prob=prob,
        sketch=getattr(bl.sketches, sketch)(),
    )
    updates, _ = jax.jit(tx.update)(tree, tx.init(tree))
    wide = {'w': jnp.ones((6, 4))}
    expected, _ = jax.jit(tx.update)(wide, tx.init(wide))
    self.assertEqual(updates['w'].dtype, dtype)
    # Rounded once, to 2 or 3 bits of mantissa.
    np.testing.assert_allclose(
        updates['w'].astype(jnp.float32), expected['w'], rtol=0.13, atol=0.01
    )

  @parameterized.parameters(['compensated'])
  def test_adapters(self, rounding):
    self.check_adapters(rounding)

  @parameterized.parameters('nearest', 'stochastic')
  @pytest.mark.slow
  def test_adapters_otherwise(self, rounding):
    self.check_adapters(rounding)

  def check_adapters(self, rounding):
    policy = bl.ChainPolicy.bernoulli(
        2, 1, rounding=rounding, sketch=bl.sketches.coordinate()
    )
    chain = bl.adapters.make_chain(policy, optax.sgd(1.0))
    params = {'w': jnp.zeros((6, 4), 'float8_e5m2')}
    loss = lambda params, batch: (
        jnp.sum((params['w'].astype(jnp.float32) - 1) ** 2),
        None,
    )
    loss = bl.inject.by_addition(loss)
    state = jax.jit(chain.init)(jax.random.key(0), params)
    step = jax.jit(lambda state: chain.step(state, loss, None))
    for _ in range(2):
      state, _ = step(state)
    self.assertEqual(state.factors['w']['left'].dtype, jnp.float32)
    self.assertEqual(state.params['w'].dtype, 'float8_e5m2')
    self.assertGreater(float(jnp.abs(state.params['w'].astype('f4')).max()), 0)
