"""The law of injection: the adapted loss is the loss at W + s L R.

One case a way in which a loss can use its weights. Each is compared, value and
derivatives by the factors, with the loss at weights that NumPy merged.
"""

import collections
import dataclasses
import functools
from typing import Any, NamedTuple
import warnings

from absl.testing import parameterized
import chex
from flax import linen as nn
from flax import nnx
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import optax

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import lowrank

RANK = 2


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape) / 2


X = normal(6, 4, seed=1)
KEY = jax.random.key(0)


class Case(NamedTuple):
  """A loss with its params, and the uses for which W + L R has to be formed."""

  loss: Any  # (params, x) -> pytree of arrays.
  params: Any  # Of float64.
  formed: tuple[str, ...] = ()  # Parts of the warnings, in any order.
  selection: bl.Matrices | None = None  # None: all_linear.
  x: Any = X


def linen(model, loss=None, x=X, seed=2, **kwargs):
  """Returns the case of a Linen model: loss(apply, params, x)."""
  shapes = jax.eval_shape(model.init, KEY, x)['params']
  leaves, treedef = jax.tree.flatten(shapes)
  params = treedef.unflatten(
      [normal(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
  )
  apply = lambda params, x: model.apply({'params': params}, x)
  whole = apply if loss is None else functools.partial(loss, apply)
  return Case(whole, params, x=x, **kwargs)


def plain(loss, *shapes, **kwargs):
  """Returns the case of a loss over {'a': ..., 'b': ...}."""
  params = {
      name: normal(*shape, seed=3 + i)
      for i, (name, shape) in enumerate(zip('abcd', shapes, strict=False))
  }
  return Case(loss, params, **kwargs)


class Net(nn.Module):
  width: int = 5

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name='two')(nn.tanh(nn.Dense(self.width, name='one')(x)))


class Tied(nn.Module):
  """A kernel that is a projection, and read again as the tied head."""

  @nn.compact
  def __call__(self, x):
    proj = nn.Dense(5, use_bias=False, name='proj')
    return nn.tanh(proj(x)) @ proj.variables['params']['kernel'].T


class TiedTable(nn.Module):
  """A table that is looked up in, and multiplied by."""

  @nn.compact
  def __call__(self, x):
    embed = nn.Embed(7, 4, name='embed', param_dtype=jnp.float64)
    return embed.attend(nn.Dense(4, name='linear')(embed(x)))


class Normed(nn.Module):
  norm: Any

  @nn.compact
  def __call__(self, x):
    if self.norm is nn.SpectralNorm:
      inner = nn.SpectralNorm(
          nn.Dense(5, name='inner'), collection_name='params'
      )
      return inner(x, update_stats=False)
    return self.norm(nn.Dense(5, name='inner'))(x)


class Standardised(nn.Module):
  """Kernels transformed by nn.map_variables before the product."""

  @nn.compact
  def __call__(self, x):
    change = lambda tree: jax.tree.map(
        lambda w: w - w.mean(0, keepdims=True), tree
    )
    layer = nn.map_variables(
        nn.Dense, 'params', change, init=self.is_initializing()
    )
    return layer(5, name='inner')(x)


class Block(nn.Module):
  width: int = 4

  @nn.compact
  def __call__(self, h, _):
    return nn.tanh(nn.Dense(self.width)(h)), None


def scanned(axis, length=3, wrap=lambda layer: layer):
  class Scanned(nn.Module):

    @nn.compact
    def __call__(self, x):
      layer = nn.scan(
          wrap(Block),
          variable_axes={'params': axis},
          split_rngs={'params': True},
          length=length,
      )
      return layer(name='layers')(x, None)[0]

  return Scanned()


class Nested(nn.Module):
  """A scan within a scan, on different axes."""

  @nn.compact
  def __call__(self, x):

    class Inner(nn.Module):

      @nn.compact
      def __call__(self, h, _):
        layer = nn.scan(
            nn.remat(Block),
            variable_axes={'params': 1},
            split_rngs={'params': True},
            length=2,
        )
        return layer(name='inner')(h, None)[0], None

    layer = nn.scan(
        Inner,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=3,
    )
    return layer(name='outer')(x, None)[0]


def penalty(apply, params, x):
  squares = [jnp.sum(w**2) for w in jax.tree.leaves(params) if w.ndim > 1]
  return apply(params, x), sum(squares)


def inner_step(apply, params, x):
  """A step of gradient descent inside of the loss."""
  value = lambda params: jnp.mean(apply(params, x) ** 2)
  moved = jax.tree.map(
      lambda w, g: w - 0.3 * g, params, jax.grad(value)(params)
  )
  return apply(moved, x)


START = linen(Net(), seed=50).params


def distance(apply, params, x):
  """A tree map against another tree: the distance from where training began."""
  gaps = jax.tree.map(lambda w, s: jnp.sum((w - s) ** 2), params, START)
  return apply(params, x), sum(jax.tree.leaves(gaps))


@jax.custom_vjp
def own_product(x, w):
  return x @ w


own_product.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda r, dy: (dy @ r[1].T, r[0].T @ dy)
)


def looped(params, x):
  def body(carry):
    i, h = carry
    return i + 1, jnp.tanh(h @ params['a'])

  return jax.lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1]


def counted(params, x):
  """The number of turns depends on the weights, and so does a carry."""
  keep = lambda c: jnp.sum(c[0] ** 2) > 0.1 * jnp.sum(params['a'] ** 2)
  return jax.lax.while_loop(
      keep, lambda c: (0.5 * c[0], c[1] + 1), (params['a'], 0)
  )


def branches(params, x):
  on = lambda w: jnp.tanh(x @ w)
  return [
      jax.lax.switch(i, [on, lambda w: x @ w, lambda w: x + 1.0], params['a'])
      for i in range(3)
  ]


def kernel_of_pallas(params, x):
  def add(x_ref, w_ref, out_ref):
    out_ref[...] = x_ref[...] @ w_ref[...]

  shape = jax.ShapeDtypeStruct((6, 4), jnp.float64)
  return pl.pallas_call(add, out_shape=shape, interpret=True)(x, params['a'])


def callback(params, x):
  shape = jax.ShapeDtypeStruct((), jnp.float64)
  norm = jax.pure_callback(
      lambda w: np.asarray(np.linalg.norm(w)),
      shape,
      jax.lax.stop_gradient(params['a']),
  )
  return x @ params['a'] / norm


def experts(params, x):
  """vmap over a stack, each entry with its own input and with one for all."""
  h = jax.vmap(lambda w, x: jnp.tanh(x @ w))(params['a'], x.reshape(2, 3, 4))
  return jnp.einsum('ebd,edf->bf', h, params['b']), jax.vmap(lambda w: x @ w)(
      params['a']
  )


def unrolled(params, x):
  for i in range(3):
    layer = jax.tree.map(lambda w, i=i: w[i], params)
    x = jnp.tanh(x @ layer['a'])
  return x


def indexed(params, x):
  step = lambda i, x: jnp.tanh(x @ params['a'][i])
  return jax.lax.fori_loop(0, 3, step, x)


def fused(params, x):
  parts = jnp.split(params['a'], [1, 3], axis=1)
  return [x @ w for w in parts]


def heads(params, x):
  """Kernels in other shapes: split and merged axes, axes of length one."""
  q = x @ params['a'].reshape(4, 3, 2).transpose(1, 0, 2).reshape(3, 4, 2)[1]
  k = jnp.einsum('bd,dhk->bhk', x, params['b'])
  v = x @ params['b'].reshape(4, 6)[:, None].squeeze(1)
  return q, k, v, x @ jnp.expand_dims(params['a'], 0)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
  w: Any
  rest: list[Any]


class Nnx(nnx.Module):

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.up = nnx.Linear(4, 5, rngs=rngs, param_dtype=jnp.float64)
    self.down = nnx.Linear(5, 4, rngs=rngs, param_dtype=jnp.float64)

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)))


def nnx_case():
  with jax.enable_x64(True):
    graph, state = nnx.split(Nnx())
  params = jax.tree.map(np.asarray, nnx.to_pure_dict(state))

  def loss(params, x):
    return nnx.merge(graph, nnx.State(params))(x)

  return Case(loss, params)


WHOLE = bl.Matrices('.')


def cases():
  """Yields (name, a function that returns the case)."""
  two = functools.partial(linen, Net())
  low = lambda params: jax.tree.map(lambda w: w.astype(jnp.float32), params)
  yield 'model', two
  yield 'penalty', lambda: two(penalty, formed=('integer_pow',))
  yield 'inner_step', lambda: two(inner_step, formed=('sub',))
  yield 'another_tree', lambda: two(distance, formed=('sub',))
  yield 'cast', lambda: two(
      lambda apply, p, x: apply(low(p), x.astype(jnp.float32))
  )
  yield 'stopped', lambda: two(
      lambda apply, p, x: apply(
          {**p, 'one': jax.lax.stop_gradient(p['one'])}, x
      ),
      selection=bl.Matrices('kernel'),
      formed=('stop_gradient',),
  )
  yield 'remat', lambda: two(
      lambda apply, p, x: jax.checkpoint(
          apply, policy=jax.checkpoint_policies.dots_saveable
      )(p, x)
  )
  yield 'jit_inside', lambda: two(lambda apply, p, x: jax.jit(apply)(p, x))
  yield 'returned', lambda: two(
      lambda apply, p, x: (apply(p, x), p['one']['kernel']),
      formed=('the result',),
  )
  yield 'tied', lambda: linen(Tied())
  yield 'tied_table', lambda: linen(
      TiedTable(),
      x=np.arange(6).reshape(2, 3),
      selection=bl.Matrices('embedding|kernel'),
      formed=('gather',),
  )
  yield 'weight_norm', lambda: linen(
      Normed(nn.WeightNorm), selection=bl.Matrices('kernel'), formed=('mul',)
  )
  yield 'spectral_norm', lambda: linen(
      Normed(nn.SpectralNorm),
      selection=bl.Matrices('inner/kernel$'),
      formed=('div',),
  )
  yield 'standardised', lambda: linen(
      Standardised(), selection=bl.Matrices('kernel'), formed=('sub',)
  )
  yield 'convolution', lambda: linen(
      nn.Conv(3, (2,)),
      x=X.reshape(2, 3, 4),
      selection=bl.Matrices(rules=(bl.Rule('kernel', (0, 1), (2,)),)),
      formed=('conv_general_dilated',),
  )
  for axis in (0, 1, -1):
    yield f'scan_axis_{axis}', lambda axis=axis: linen(scanned(axis, length=4))
  yield 'scan_of_remat', lambda: linen(scanned(1, wrap=nn.remat))
  yield 'scan_in_scan', lambda: linen(Nested())
  yield 'custom_vjp', lambda: plain(
      lambda p, x: own_product(x, p['a']),
      (4, 4),
      formed=('custom_vjp_call',),
      selection=WHOLE,
  )
  yield 'pallas', lambda: plain(
      kernel_of_pallas, (4, 4), formed=('pallas_call',), selection=WHOLE
  )
  yield 'callback', lambda: plain(
      callback, (4, 4), formed=('stop_gradient',), selection=WHOLE
  )
  yield 'while', lambda: plain(looped, (4, 4))
  yield 'while_over_weights', lambda: plain(
      counted,
      (4, 4),
      formed=('integer_pow', 'the carry of a while loop'),
      selection=WHOLE,
  )
  yield 'branches', lambda: plain(branches, (4, 4))
  yield 'experts', lambda: plain(
      experts,
      (2, 4, 5),
      (2, 5, 3),
      selection=bl.Matrices(rules=(bl.matrices.stacked('.'),)),
  )
  yield 'unrolled_stack', lambda: plain(unrolled, (3, 4, 4))
  yield 'dynamic_index', lambda: plain(indexed, (3, 4, 4))
  yield 'split_kernel', lambda: plain(fused, (4, 6))
  yield 'joined_kernel', lambda: plain(
      lambda p, x: x @ jnp.concatenate([p['a'], p['b']], 1),
      (4, 3),
      (4, 2),
      formed=('concatenate',),
      selection=WHOLE,
  )
  yield 'shapes', lambda: plain(
      heads,
      (4, 6),
      (4, 3, 2),
      selection=bl.Matrices(rules=(bl.matrices.heads_out('b'),)),
  )
  yield 'product_of_two', lambda: plain(
      lambda p, x: x @ (p['a'] @ p['b']),
      (4, 3),
      (3, 5),
      formed=('a product with another',),
      selection=WHOLE,
  )
  yield 'quadratic_form', lambda: plain(
      lambda p, x: jnp.einsum('bi,ij,bj->b', x, p['a'], x), (4, 4)
  )
  yield 'inner_product', lambda: plain(
      lambda p, x: jnp.vdot(x[:4], p['a']),
      (4, 4),
      selection=WHOLE,
      formed=('reshape',),
  )
  yield 'equalised_rate', lambda: plain(
      lambda p, x: x @ (0.5 * p['a']), (4, 3), formed=('mul',), selection=WHOLE
  )
  yield 'rule_along_other_axes', lambda: plain(
      lambda p, x: x @ p['a'],
      (4, 4),
      selection=bl.Matrices(rules=(bl.Rule('a', (1,), (0,)),)),
  )
  yield 'rule_across_sides', lambda: plain(
      lambda p, x: jnp.einsum('bd,dhk->bhk', x, p['a']),
      (4, 3, 2),
      selection=bl.Matrices(rules=(bl.Rule('a', (0, 1), (2,)),)),
      formed=('dot_general',),
  )
  yield 'scan_over_a_side', lambda: plain(
      lambda p, x: jax.lax.scan(
          lambda h, w: (h + x @ w, None), 0 * x[:, 0], p['a']
      )[0],
      (3, 4),
      selection=WHOLE,
  )
  yield 'associative_scan', lambda: plain(
      lambda p, x: x @ jax.lax.associative_scan(jnp.matmul, p['a'])[-1],
      (3, 4, 4),
      selection=bl.Matrices(rules=(bl.matrices.stacked('a'),)),
      formed=('',),
  )
  yield 'list_and_dataclass', lambda: Case(
      lambda p, x: [x @ p[0].w, x @ p[0].rest[1], p[1]],
      [Weights(normal(4, 3, seed=8), [1, normal(4, 2, seed=9)]), 2.5],
  )
  yield 'ordered_dict', lambda: Case(
      lambda p, x: jnp.tanh(x @ p['b']) @ p['a'],
      collections.OrderedDict(b=normal(4, 4, seed=8), a=normal(4, 4, seed=9)),
  )
  yield 'nnx', nnx_case


CASES = dict(cases())


def adapted_params(params, found, factors):
  """Returns params with W + s L R, formed by NumPy."""
  leaves, treedef = jax.tree.flatten(params)
  for one in found:
    pair = factors[one.matrix.path]
    left, right = (np.asarray(pair[s], np.float64) for s in ('left', 'right'))
    change = one.matrix.unview(one.scale * left @ right)
    leaves[one.matrix.index] = leaves[one.matrix.index] + np.asarray(change)
  return treedef.unflatten(leaves)


def floats(tree):
  kept = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
  return [x for x in kept if jnp.issubdtype(x.dtype, jnp.floating)]


def weigh(tree):
  """Returns a scalar that depends on all floating-point leaves."""
  parts = [
      jnp.sum(
          x.astype(jnp.float64) * np.cos(np.arange(x.size)).reshape(x.shape)
      )
      for x in floats(tree)
  ]
  return sum(parts)


class LawTest(parameterized.TestCase):

  @parameterized.named_parameters(*((name, name) for name in CASES))
  def test_equals_the_loss_at_merged_weights(self, name):
    with jax.enable_x64(True):
      self.check(name, CASES[name]())

  def check(self, name, case):
    policy = bl.ChainPolicy(rank=RANK, period=None, side=None, alpha=3.0)
    selection = case.selection
    if selection is None:
      selection = inject.all_linear(case.loss, case.params, case.x)
    chain = bl.adapters.make_chain(policy, optax.sgd(0.1), selection)
    found = chain.adapted(case.params)
    factors = {
        one.matrix.path: {
            'left': normal(*one.matrix.batch, one.matrix.m, RANK, seed=70 + i),
            'right': normal(*one.matrix.batch, RANK, one.matrix.n, seed=90 + i),
        }
        for i, one in enumerate(found)
    }
    adapted = inject.by_product(case.loss)

    def of_factors(factors):
      out = adapted(case.params, bl.adapters.scaled(factors, found), case.x)
      return weigh(out), floats(out)

    def of_weights(factors):
      leaves, treedef = jax.tree.flatten(case.params)
      for one in found:
        pair = factors[one.matrix.path]
        change = one.matrix.unview(one.scale * pair['left'] @ pair['right'])
        leaves[one.matrix.index] = leaves[one.matrix.index] + change
      return weigh(case.loss(treedef.unflatten(leaves), case.x))

    is_loop = 'while' in name or name == 'pallas'  # No reverse mode.
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always', inject.FormedWarning)
      if is_loop:
        out = jax.jit(of_factors)(factors)[1]
      else:
        differentiate = jax.value_and_grad(of_factors, has_aux=True)
        (_, out), grads = jax.jit(differentiate)(factors)
        by_hand = jax.jit(jax.grad(of_weights))(factors)
    merged = adapted_params(case.params, found, factors)
    expected = floats(jax.jit(case.loss)(merged, case.x))
    # Products of some ten numbers of size one, in float64 or float32.
    tol = 1e-4 if name == 'cast' else 1e-10
    chex.assert_trees_all_close(out, expected, rtol=tol, atol=tol)
    if not is_loop:
      chex.assert_trees_all_close(grads, by_hand, rtol=tol, atol=tol)
    plain = floats(jax.jit(case.loss)(case.params, case.x))
    gaps = [
        float(jnp.max(jnp.abs(a - b))) for a, b in zip(out, plain, strict=True)
    ]
    self.assertGreater(max(gaps), 1e-2)  # The factors do matter.
    texts = [
        str(w.message)
        for w in caught
        if issubclass(w.category, inject.FormedWarning)
    ]
    for part in case.formed:
      self.assertTrue(any(part in text for text in texts), (part, texts))
    if not case.formed:
      self.assertEqual(texts, [])


class RejectsTest(parameterized.TestCase):

  @parameterized.parameters('unused', 'dead', 'shape', 'integer')
  def test_what_would_train_nothing(self, kind):
    def loss(params, x):
      if kind == 'dead':
        jnp.sum(params['b'] ** 2)  # Its result is used nowhere.
      return x @ params['a']

    params = {'a': normal(4, 4), 'b': normal(4, 4)}
    pair = lambda m, n: {'left': normal(m, RANK), 'right': normal(RANK, n)}
    factors = {'a': pair(4, 4), 'b': pair(4, 4)}
    message = 'Expected the loss to use b, which is adapted'
    if kind == 'shape':
      factors = {'a': pair(4, 5)}
      message = r'right factor of a to have shape \(2, 4\), got \(2, 5\)'
    if kind == 'integer':
      params['b'] = 3
      message = 'Expected b to be an array, got int'
    with self.assertRaisesRegex(ValueError, message):
      inject.by_product(loss)(params, factors, X)

  @parameterized.parameters('missing', 'other axes', 'other shape')
  def test_by_addition_drops_nothing(self, kind):
    params = {'a': normal(4, 4), 'stack': normal(4, 4, 4)}
    turned = bl.Matrices(rules=(bl.Rule('stack', (2,), (1,), (0,)),))
    straight = bl.Matrices(rules=(bl.matrices.stacked('stack'),))
    chain = bl.adapters.make_chain(
        bl.ChainPolicy.lora(RANK), optax.sgd(0.1), turned
    )
    found = chain.adapted(params)
    state = chain.init(KEY, params)
    factors = bl.adapters.scaled(state.factors, found)
    loss = lambda params: jnp.sum(params['a']) + jnp.sum(params['stack'])
    given = {'missing': None, 'other axes': straight, 'other shape': turned}[
        kind
    ]
    if kind == 'missing':
      factors = {'a': dict(factors['a']), 'stack': dict(factors['stack'])}
    if kind == 'other shape':
      pair = factors['stack']
      factors = {
          'stack': {'left': pair['left'][:2], 'right': pair['right'][:2]}
      }
    with self.assertRaisesRegex(ValueError, 'Expected .*stack'):
      inject.by_addition(loss, given)(params, factors)

  def test_by_addition_reads_the_axes_of_pairs(self):
    params = {'a': normal(4, 4)}
    turned = bl.Matrices(rules=(bl.Rule('a', (1,), (0,)),))
    chain = bl.adapters.make_chain(
        bl.ChainPolicy.lora(RANK), optax.sgd(0.1), turned
    )
    found = chain.adapted(params)
    factors = {'a': {'left': normal(4, RANK), 'right': normal(RANK, 4, seed=1)}}
    out = inject.by_addition(lambda params: params['a'])(
        params, bl.adapters.scaled(factors, found)
    )
    expected = params['a'] + (factors['a']['left'] @ factors['a']['right']).T
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


class LowRankTest(parameterized.TestCase):
  """Each operation, against the same operation on W + L R."""

  def value(self, shape, axes):
    axes = lowrank.Axes(*axes)
    size = lambda own: int(np.prod([shape[i] for i in own]))
    batch = tuple(shape[i] for i in axes.batch)
    left = normal(*batch, size(axes.left), RANK, seed=4)
    right = normal(*batch, RANK, size(axes.right), seed=5)
    leaf = normal(*shape, seed=6)
    value = lowrank.low_rank(leaf, left, right, axes, 'w')
    order = axes.batch + axes.left + axes.right
    change = (left @ right).reshape([shape[i] for i in order])
    return value, leaf + change.transpose(np.argsort(order))

  @parameterized.parameters(
      ((4, 5), (20,)),
      ((4, 5), (1, 4, 1, 5)),
      ((2, 3, 4, 5), (2, 12, 5)),
      ((2, 3, 4, 5), (2, 3, 2, 2, 5)),
      ((2, 3, 1, 5), (2, 3, 5)),
      ((6, 5), (2, 3, 5)),
      ((6, 4), (3, 8)),
      ((1, 1), (1,)),
      ((0, 4), (4, 0)),
  )
  def test_reshape(self, shape, new):
    axes = {2: ((), (0,), (1,)), 4: ((0,), (1, 2), (3,))}[len(shape)]
    value, dense = self.value(shape, axes)
    with jax.enable_x64(True):
      result = lowrank.reshape(value, new)
      if result is None:  # Both sides in one axis.
        self.assertIn(
            (shape, new), [((4, 5), (20,)), ((6, 4), (3, 8)), ((0, 4), (4, 0))]
        )
        return
      np.testing.assert_allclose(result.dense(), dense.reshape(new), atol=1e-12)
