"""Tests of where factors enter a model, and of what that costs."""

import functools
import re
from typing import NamedTuple
from unittest import mock

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

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import fused
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import matrices

RANK = 2
LAYERS = 3


class Layer(nn.Module):
  """Attention and two dense layers, in the form that nn.scan wants."""

  qkv: int = 6
  hidden: int = 7

  @nn.compact
  def __call__(self, x, _):
    x = x + nn.MultiHeadDotProductAttention(
        num_heads=2, qkv_features=self.qkv, name='attention'
    )(x)
    h = nn.tanh(nn.Dense(self.hidden, name='up')(x))
    return x + nn.Dense(x.shape[-1], name='down')(h), None


class LinearLayer(nn.Module):
  """A residual layer without nonlinearity: its rounding is easily bounded."""

  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(x.shape[-1], name='linear', dtype=self.dtype)(x), None


def scanned(layer, **kwargs):
  kwargs = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}} | (
      kwargs
  )
  return nn.scan(layer, length=LAYERS, **kwargs)


class Stack(nn.Module):
  """A stack of layers under a transformation of Flax."""

  kind: str
  layer: type[nn.Module] = Layer
  arguments: tuple = ()

  @nn.compact
  def __call__(self, x):
    make = functools.partial(self.layer, *self.arguments)
    if self.kind == 'unrolled':
      for i in range(LAYERS):
        x, _ = make(name=f'layers_{i}')(x, None)
      return x
    transforms = {
        'scan': scanned,
        'remat in scan': lambda layer: scanned(nn.remat(layer)),
        'one layer scanned': lambda layer: scanned(
            layer,
            variable_axes={},
            variable_broadcast='params',
            split_rngs={'params': False},
        ),
    }
    layer = transforms[self.kind](self.layer)
    return layer(*self.arguments, name='layers')(x, None)[0]


class Called(nn.Module):
  """A model of one function of a module."""

  make: object
  call: object

  @nn.compact
  def __call__(self, x):
    return self.call(self.make(name='inner'), x)


class Doubled(nn.Dense):
  """A subclass that calls its parent's method."""

  @nn.compact
  def __call__(self, x):
    return nn.relu(super().__call__(2 * x)) - x.mean()


class Axes(NamedTuple):
  """Axes of a kernel, as a rule should give them."""

  left: tuple[int, ...] = (0,)
  right: tuple[int, ...] = (1,)
  batch: tuple[int, ...] = ()


class Case(NamedTuple):
  """A model, the shape of its input, and the axes of its kernels."""

  model: nn.Module
  shape: tuple[int, ...]
  axes: dict[str, Axes]


def layer_axes(prefix, extra=0):
  """Axes of the kernels of a `Layer` with stacked axes in front."""
  inside = {
      'attention/query': Axes((0,), (1, 2)),
      'attention/key': Axes((0,), (1, 2)),
      'attention/value': Axes((0,), (1, 2)),
      'attention/out': Axes((0, 1), (2,)),
      'up': Axes(),
      'down': Axes(),
  }
  shift = lambda axes: tuple(axis + extra for axis in axes)
  return {
      f'{prefix}{name}/kernel': Axes(
          shift(a.left), shift(a.right), tuple(range(extra)) + shift(a.batch)
      )
      for name, a in inside.items()
  }


def bare(model, shape, *axes):
  """Returns the case of a model that is one projection."""
  return Case(model, shape, {'kernel': Axes(*axes)})


CASES = {
    'dense': bare(nn.Dense(5), (3, 4)),
    'dense_without_bias': bare(nn.Dense(5, use_bias=False), (2, 3, 4)),
    'dense_vector': bare(nn.Dense(5), (4,)),
    'general': bare(nn.DenseGeneral(5), (3, 4)),
    'general_features': bare(nn.DenseGeneral((2, 5)), (3, 4), (0,), (1, 2)),
    'general_axes': bare(
        nn.DenseGeneral(5, axis=(-2, -1)), (2, 3, 4), (0, 1), (2,)
    ),
    'general_outer_axes': bare(
        nn.DenseGeneral((5, 2), axis=(0, 2)), (2, 3, 4), (0, 1), (2, 3)
    ),
    'general_batch': bare(
        nn.DenseGeneral(5, axis=-1, batch_dims=0), (3, 2, 4), (1,), (2,), (0,)
    ),
    'general_all': bare(
        nn.DenseGeneral((5, 2), axis=(2, 4), batch_dims=(0, 1)),
        (2, 3, 4, 2, 3),
        (2, 3),
        (4, 5),
        (0, 1),
    ),
    'einsum': bare(
        nn.Einsum((4, 5, 6), 'abc,cde->abde'), (2, 3, 4), (0,), (1, 2)
    ),
    'einsum_spaces': bare(nn.Einsum((4, 5), 'b d, d f -> b f'), (3, 4)),
    'einsum_at_call': Case(
        Called(
            functools.partial(nn.Einsum, (3, 4, 5)),
            lambda module, x: module(x, 'bhd,hdf->bf'),
        ),
        (2, 3, 4),
        {'inner/kernel': Axes((0, 1), (2,))},
    ),
    'einsum_by_name_at_call': Case(
        Called(
            functools.partial(nn.Einsum, (4, 5)),
            lambda module, x: module(x, einsum_str='...d,df->...f'),
        ),
        (2, 3, 4),
        {'inner/kernel': Axes()},
    ),
    # Letters that are free for the ellipsis and for the rank must not clash.
    'einsum_ellipsis': bare(nn.Einsum((4, 5), '...A,AB->...B'), (2, 3, 4)),
    'einsum_letters': bare(nn.Einsum((4, 5), 'srt,tu->sru'), (2, 3, 4)),
    'einsum_ellipsis_batch': bare(
        nn.Einsum((3, 4, 5), '...d,...df->...f'), (3, 4), (1,), (2,), (0,)
    ),
    'einsum_batch': bare(
        nn.Einsum((3, 4, 5), 'bed,edf->bef'), (2, 3, 4), (1,), (2,), (0,)
    ),
    'einsum_batch_last': bare(
        nn.Einsum((5, 4, 3), 'ebd,fde->fbe'), (3, 2, 4), (1,), (0,), (2,)
    ),
    'einsum_transposed': bare(
        nn.Einsum((5, 4), 'bd,fd->fb', use_bias=False), (3, 4), (1,), (0,)
    ),
    'einsum_interleaved': bare(
        nn.Einsum((4, 5, 3, 2), 'bhd,dfhg->bgf'), (2, 3, 4), (0, 2), (1, 3)
    ),
    'attention': Case(
        nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6),
        (2, 3, 4),
        {
            path.removeprefix('attention/'): axes
            for path, axes in layer_axes('').items()
            if path.startswith('attention')
        },
    ),
    'unrolled': Case(
        Stack('unrolled'),
        (2, 3, 4),
        {
            path: axes
            for i in range(LAYERS)
            for path, axes in layer_axes(f'layers_{i}/').items()
        },
    ),
    'scan': Case(Stack('scan'), (2, 3, 4), layer_axes('layers/', 1)),
    'remat_in_scan': Case(
        Stack('remat in scan'), (2, 3, 4), layer_axes('layers/', 1)
    ),
    'one_layer_scanned': Case(
        Stack('one layer scanned'), (2, 3, 4), layer_axes('layers/')
    ),
    'vmap': bare(
        nn.vmap(
            nn.Dense,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=None,
            axis_size=3,
        )(5),
        (2, 4),
        (1,),
        (2,),
        (0,),
    ),
    'remat': bare(nn.remat(nn.Dense)(5), (3, 4)),
    'subclass': bare(Doubled(5), (3, 4)),
    'remat_of_subclass': bare(nn.remat(Doubled)(5), (3, 4)),
    'called_twice': Case(
        Called(
            functools.partial(nn.Dense, 4),
            lambda module, x: module(nn.tanh(module(x))),
        ),
        (3, 4),
        {'inner/kernel': Axes()},
    ),
}
NAMES = tuple((name, name) for name in CASES)


def fill(tree, seed, dtype=jnp.float32):
  """Returns a tree of shapes as arrays of normal numbers over 2."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, dtype), tree
  )


def params_of(model, x, seed=0, dtype=jnp.float32):
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  return fill(shapes, seed, dtype)


def factors_of(params, axes, seed=1, dtype=jnp.float32):
  """Returns random factors of the shapes that the axes ask for."""
  flat = flax.traverse_util.flatten_dict(nn.meta.unbox(params), sep='/')
  shapes = {}
  for path, a in axes.items():
    sizes = lambda of, path=path: tuple(flat[path].shape[i] for i in of)
    batch, m, n = (
        sizes(a.batch),
        np.prod(sizes(a.left)),
        np.prod(sizes(a.right)),
    )
    shapes[path] = {
        'left': jax.ShapeDtypeStruct((*batch, m, RANK), dtype),
        'right': jax.ShapeDtypeStruct((*batch, RANK, n), dtype),
    }
  return fill(shapes, seed, dtype)


def merge(params, factors, axes, sign=lambda x: x):
  """Returns params with W + L R, formed by NumPy in float64."""
  flat = flax.traverse_util.flatten_dict(nn.meta.unbox(params), sep='/')
  flat = {
      path: sign(np.asarray(leaf, np.float64)) for path, leaf in flat.items()
  }
  for path, pair in factors.items():
    a = axes[path]
    order = a.batch + a.left + a.right
    left, right = (np.asarray(pair[s], np.float64) for s in ('left', 'right'))
    product = sign(left) @ sign(right)
    shape = [flat[path].shape[axis] for axis in order]
    product = product.reshape(shape).transpose(np.argsort(order))
    flat[path] = flat[path] + product
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def as_matrix(leaf, a):
  """Returns a kernel as (*batch, m, n) in NumPy float64."""
  moved = np.asarray(leaf, np.float64).transpose(a.batch + a.left + a.right)
  shape = moved.shape
  split = len(a.batch) + len(a.left)
  m = int(np.prod(shape[len(a.batch) : split]))
  return moved.reshape(*shape[: len(a.batch)], m, -1)


def apply_of(model):
  return lambda params, x: model.apply({'params': params}, x)


def normal(*shape, seed=2, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def two_dense():
  """Returns a model of two dense layers, its loss, params and input."""
  model = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])
  x = normal(2, 4)
  params = params_of(model, x)
  return apply_of(model), params, x


TWO_DENSE_AXES = {
    'layers_0/kernel': Axes(),
    'layers_2/kernel': Axes(),
}


class ByProductTest(parameterized.TestCase):
  """The adapted model is the model at W + L R."""

  def check(self, loss, params, factors, axes, *args):
    """The outputs agree to the rounding of float64, and depend on the factors.

    Sums of some ten products of size one, through a few layers: 1e-12.
    """
    plain = jax.jit(loss)
    out = jax.jit(inject.by_product(loss))(params, factors, *args)
    expected = plain(merge(params, factors, axes), *args)
    chex.assert_trees_all_close(out, expected, rtol=1e-11, atol=1e-12)
    before = plain(params, *args)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, before)
    for one, two in zip(
        jax.tree.leaves(out), jax.tree.leaves(before), strict=True
    ):
      self.assertGreater(np.max(np.abs(one - two)), 0.1)

  @parameterized.named_parameters(*NAMES)
  def test_equals_the_model_at_merged_weights(self, name):
    model, shape, axes = CASES[name]
    with jax.enable_x64(True):
      x = normal(*shape, dtype=jnp.float64)
      params = params_of(model, x, dtype=jnp.float64)
      factors = factors_of(params, axes, dtype=jnp.float64)
      self.check(apply_of(model), params, factors, axes, x)

  def test_axes_of_dense_general_in_any_order(self):
    model = nn.DenseGeneral(5, axis=(-1, -2))
    axes = {'kernel': Axes((0, 1), (2,))}
    with jax.enable_x64(True):
      x = normal(2, 3, 3, dtype=jnp.float64)
      params = params_of(model, x, dtype=jnp.float64)
      factors = factors_of(params, axes, dtype=jnp.float64)
      self.check(apply_of(model), params, factors, axes, x)

  @parameterized.parameters('by_product', 'all_linear')
  def test_input_by_name(self, function):
    model = Called(
        functools.partial(nn.Dense, 5), lambda module, x: module(inputs=x)
    )
    axes = {'inner/kernel': Axes()}
    with jax.enable_x64(True):
      x = normal(3, 4, dtype=jnp.float64)
      params = params_of(model, x, dtype=jnp.float64)
      factors = factors_of(params, axes, dtype=jnp.float64)
      if function == 'by_product':
        self.check(apply_of(model), params, factors, axes, x)
      else:
        inject.all_linear(apply_of(model), params, x)

  def test_some_of_the_matrices(self):
    model, shape, axes = CASES['scan']
    some = {path: a for path, a in axes.items() if 'query' in path}
    with jax.enable_x64(True):
      x = normal(*shape, dtype=jnp.float64)
      params = params_of(model, x, dtype=jnp.float64)
      factors = factors_of(params, some, dtype=jnp.float64)
      self.check(apply_of(model), params, factors, some, x)

  def test_equals_the_merged_weights_of_a_chain(self):
    model = Stack('scan', LinearLayer)
    axes = {'layers/linear/kernel': Axes((1,), (2,), (0,))}
    with jax.enable_x64(True):
      x = normal(3, 4, dtype=jnp.float64)
      params = params_of(model, x, dtype=jnp.float64)
      loss = apply_of(model)
      policy = adapters.ChainPolicy.lora(RANK, alpha=3.0)
      selection = inject.all_linear(loss, params, x)
      chain = adapters.make_chain(policy, optax.sgd(1.0), selection)
      state = jax.jit(chain.init)(jax.random.key(3), params)
      state = state._replace(factors=fill(state.factors, 4, jnp.float64))
      factors = adapters.scaled(state.factors, chain.adapted(params))
      out = jax.jit(inject.by_product(loss))(params, factors, x)
      tuned = chain.params(state)
      expected = jax.jit(loss)(tuned, x)
      np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-12)
      # alpha / rank = 1.5 is in the factors that the loss sees.
      scaled = {
          path: {**pair, 'right': 1.5 * np.asarray(pair['right'])}
          for path, pair in state.factors.items()
      }
      by_hand = merge(params, scaled, axes)
    chex.assert_trees_all_close(tuned, by_hand, rtol=1e-14, atol=1e-14)

  def test_sub_models_with_prefixes(self):
    encoder = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])
    decoder = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
    axes = {
        f'{name}/{path}': a
        for name in ('encoder', 'decoder/inside')
        for path, a in TWO_DENSE_AXES.items()
    }

    def loss(params, x):
      code = encoder.apply({'params': params['encoder']}, x)
      return decoder.apply({'params': params['decoder']['inside']}, code), code

    with jax.enable_x64(True):
      x = normal(2, 4, dtype=jnp.float64)
      params = {'encoder': params_of(encoder, x, 5, jnp.float64)}
      code = jnp.zeros((2, 3), jnp.float64)
      params['decoder'] = {'inside': params_of(decoder, code, 6, jnp.float64)}
      factors = factors_of(params, axes, dtype=jnp.float64)
      self.check(loss, params, factors, axes, x)
      # Those of one sub-model do not enter the other.
      one = {path: f for path, f in factors.items() if 'decoder' in path}
      _, code = inject.by_product(loss)(params, one, x)
      np.testing.assert_array_equal(code, loss(params, x)[1])
      found = matrices.find(params, inject.all_linear(loss, params, x))
      self.assertEqual({matrix.path for matrix in found}, set(axes))

  @parameterized.parameters('by_product', 'all_linear')
  def test_sub_model_that_is_one_projection(self, function):
    head = nn.Dense(5)
    loss = lambda params, x: head.apply({'params': params['head']}, x)
    axes = {'head/kernel': Axes()}
    with jax.enable_x64(True):
      x = normal(3, 4, dtype=jnp.float64)
      params = {'head': params_of(head, x, dtype=jnp.float64)}
      factors = factors_of(params, axes, dtype=jnp.float64)
      if function == 'by_product':
        self.check(loss, params, factors, axes, x)
      else:
        found = matrices.find(params, inject.all_linear(loss, params, x))
        self.assertEqual([matrix.path for matrix in found], ['head/kernel'])

  def boxed(self, is_scanned):
    """Returns a model with kernels boxed in partitioning metadata, and axes."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'model'))

    class Boxed(nn.Module):

      @nn.compact
      def __call__(self, x, _=None):
        return x + nn.Dense(4, name='linear', kernel_init=init)(x), None

    class Whole(nn.Module):

      @nn.compact
      def __call__(self, x):
        layer = Boxed
        if is_scanned:
          layer = scanned(Boxed, metadata_params={nn.PARTITION_NAME: 'layers'})
        return layer(name='layers')(x, None)[0]

    extra = int(is_scanned)
    path = 'layers/linear/kernel'
    return Whole(), {path: Axes((extra,), (1 + extra,), tuple(range(extra)))}

  @parameterized.parameters(False, True)
  def test_partitioned_kernels(self, is_scanned):
    model, axes = self.boxed(is_scanned)
    loss = apply_of(model)
    with jax.enable_x64(True):
      x = normal(3, 4, dtype=jnp.float64)
      params = params_of(model, x, dtype=jnp.float64)
      kernel = params['layers']['linear']['kernel']
      self.assertIsInstance(kernel, nn.Partitioned)
      factors = factors_of(params, axes, dtype=jnp.float64)
      self.check(loss, params, factors, axes, x)
      selection = inject.all_linear(loss, params, x)
      chain = adapters.make_chain(
          adapters.ChainPolicy.lora(RANK), optax.sgd(1.0), selection
      )
      state = jax.jit(chain.init)(jax.random.key(0), params)
      tuned = jax.jit(chain.params)(state._replace(factors=factors))
    kernel = tuned['layers']['linear']['kernel']
    self.assertIsInstance(kernel, nn.Partitioned)
    by_hand = merge(params, factors, axes)
    chex.assert_trees_all_close(
        nn.meta.unbox(tuned), by_hand, rtol=1e-14, atol=1e-14
    )

  def test_frozen_dicts(self):
    model = Stack('scan', LinearLayer)
    axes = {'layers/linear/kernel': Axes((1,), (2,), (0,))}
    with jax.enable_x64(True):
      x = normal(3, 4, dtype=jnp.float64)
      params = params_of(model, x, dtype=jnp.float64)
      frozen = flax.core.freeze(params)
      factors = factors_of(params, axes, dtype=jnp.float64)
      adapted = jax.jit(inject.by_product(apply_of(model)))
      out = adapted(frozen, factors, x)
      np.testing.assert_array_equal(out, adapted(params, factors, x))
      selection = inject.all_linear(apply_of(model), frozen, x)
      self.assertLen(matrices.find(frozen, selection), len(axes))

  def test_params_are_not_changed(self):
    loss, params, x = two_dense()
    factors = factors_of(params, TWO_DENSE_AXES)
    before = jax.tree.structure(params)
    inject.by_product(loss)(params, factors, x)
    self.assertEqual(jax.tree.structure(params), before)

  def test_other_outputs_and_keywords_pass(self):
    loss, params, x = two_dense()
    factors = factors_of(params, TWO_DENSE_AXES)

    def with_aux(params, x, *, scale):
      return scale * loss(params, x).sum(), {'aux': x}

    plain = inject.by_product(loss)(params, factors, x).sum()
    out, aux = inject.by_product(with_aux)(params, factors, x, scale=2.0)
    np.testing.assert_allclose(out, 2 * plain, rtol=1e-6)
    self.assertIs(aux['aux'], x)


class DtypeTest(parameterized.TestCase):
  """Factors are cast where they are multiplied, and nothing else is."""

  def bound(self, model, params, factors, axes, x, layers=1):
    """Returns a bound on the error of a linear model in bfloat16.

    Numbers on the longest way from x to the output of a layer are rounded at
    most 8 times to 2^-8 of their size (x, L, x L, R, (x L) R and three sums),
    and sizes are those of the same model with absolute values throughout.
    """
    sizes = merge(params, factors, axes, np.abs)
    size = np.asarray(apply_of(model)(sizes, np.abs(np.float64(x))))
    return ((1 + 2.0**-8) ** (8 * layers) - 1) * size

  @parameterized.parameters(
      'dense', 'general_all', 'einsum_batch_last', 'einsum_interleaved'
  )
  def test_bfloat16_to_rounding(self, name):
    model, shape, axes = CASES[name]
    x = normal(*shape)
    params = params_of(model, x)
    factors = factors_of(params, axes)
    low = model.copy(dtype=jnp.bfloat16)
    out = jax.jit(inject.by_product(apply_of(low)))(params, factors, x)
    self.assertEqual(out.dtype, jnp.bfloat16)
    with jax.enable_x64(True):
      evaluate = lambda params: np.asarray(
          apply_of(model)(params, np.float64(x))
      )
      exact = evaluate(merge(params, factors, axes))
      plain = evaluate(merge(params, {}, axes))
      bound = self.bound(model, params, factors, axes, x)
    error = np.abs(np.asarray(out, np.float64) - exact)
    np.testing.assert_array_less(error, bound)
    # The bound tells the adapted model from the plain one.
    self.assertGreater(np.max(np.abs(plain - exact) / bound), 5)

  def test_carry_of_a_scan_keeps_its_dtype(self):
    model = Stack('scan', LinearLayer, (jnp.bfloat16,))
    exactly = Stack('scan', LinearLayer)
    axes = {'layers/linear/kernel': Axes((1,), (2,), (0,))}
    x = normal(3, 4, dtype=jnp.bfloat16)
    params = params_of(model, x)
    factors = factors_of(params, axes)
    loss = inject.by_product(apply_of(model))
    out = jax.jit(loss)(params, factors, x)  # nn.scan refuses another carry.
    self.assertEqual(out.dtype, jnp.bfloat16)
    with jax.enable_x64(True):
      wide = np.asarray(x, np.float64)
      exact = np.asarray(apply_of(exactly)(merge(params, factors, axes), wide))
      bound = self.bound(exactly, params, factors, axes, wide, LAYERS)
    np.testing.assert_array_less(np.abs(np.float64(out) - exact), bound)

  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_weights_of_low_precision(self, dtype):
    model, shape, axes = CASES['dense']
    x = normal(*shape, dtype=dtype)
    params = params_of(model, x, dtype=dtype)
    factors = factors_of(params, axes)
    loss = inject.by_product(apply_of(model))
    value = lambda factors: jnp.sum(loss(params, factors, x), dtype='float32')
    self.assertEqual(jax.eval_shape(loss, params, factors, x).dtype, dtype)
    grads = jax.eval_shape(jax.grad(value), factors)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, factors)

  @parameterized.parameters('einsum', 'remat_in_scan')
  def test_float32_to_rounding(self, name):
    model, shape, axes = CASES[name]
    x = normal(*shape)
    params = params_of(model, x)
    factors = factors_of(params, axes)
    out = jax.jit(inject.by_product(apply_of(model)))(params, factors, x)
    with jax.enable_x64(True):
      exact = np.asarray(
          apply_of(model)(merge(params, factors, axes), np.float64(x))
      )
    # Some hundred roundings to 2^-24 of numbers of the size of the largest.
    atol = 100 * 2.0**-24 * np.max(np.abs(exact))
    np.testing.assert_allclose(out, exact, rtol=0, atol=atol)


class AllLinearTest(parameterized.TestCase):
  """The axes of kernels are read from the model."""

  @parameterized.named_parameters(*NAMES)
  def test_rules(self, name):
    model, shape, axes = CASES[name]
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)['params']
    found = inject.all_linear(apply_of(model), params, x)
    rules = {rule.pattern: rule for rule in found.rules}
    self.assertEqual(set(rules), {f'^{re.escape(path)}$' for path in axes})
    for path, a in axes.items():
      rule = rules[f'^{re.escape(path)}$']
      self.assertEqual((rule.left, rule.right, rule.batch), a)
    selected = [matrix.path for matrix in matrices.find(params, found)]
    self.assertEqual(set(selected), set(axes))

  def test_whole_variables_have_the_same_names(self):
    model = nn.Dense(5)
    variables = {'params': params_of(model, normal(3, 4))}
    loss = lambda variables, x: model.apply(variables, x)
    found = inject.all_linear(loss, variables, normal(3, 4))
    self.assertEqual([rule.pattern for rule in found.rules], ['^kernel$'])
    factors = factors_of(variables['params'], {'kernel': Axes()})
    out = inject.by_product(loss)(variables, factors, normal(3, 4))
    expected = merge(variables['params'], factors, {'kernel': Axes()})
    # One dense layer in float32.
    np.testing.assert_allclose(
        out, model.apply({'params': expected}, normal(3, 4)), rtol=1e-5
    )

  def test_paths_that_are_expressions(self):
    # A dot is any character in an expression: `a.b` is not `axb`.
    class Model(nn.Module):

      @nn.compact
      def __call__(self, x):
        return nn.DenseGeneral((2, 2), name='axb')(nn.Dense(4, name='a.b')(x))

    x = normal(3, 4)
    params = params_of(Model(), x)
    found = inject.all_linear(apply_of(Model()), params, x)
    # Rules that match more than their own kernel would have different axes.
    shapes = [(matrix.m, matrix.n) for matrix in matrices.find(params, found)]
    self.assertEqual(shapes, [(4, 4), (4, 4)])

  def test_leaves_out_what_is_no_projection(self):
    x = jnp.arange(6).reshape(2, 3)
    params = params_of(TiedModel(), x)
    self.assertIn('embedding', params['embed'])
    found = inject.all_linear(apply_of(TiedModel()), params, x)
    selected = [matrix.path for matrix in matrices.find(params, found)]
    self.assertEqual(selected, ['linear/kernel'])

  def test_tables_of_plain_trees_are_left_out(self):
    params = {'table': normal(5, 4), 'w': normal(4, 4)}

    def loss(params, rows):
      h = jnp.take(params['table'], rows, axis=0) @ params['w']
      return h @ params['table'].T  # Tied: looked up in, and multiplied by.

    found = inject.all_linear(loss, params, jnp.arange(3))
    self.assertEqual([rule.pattern for rule in found.rules], ['^w$'])

  def test_layers_that_are_not_called_are_left_out(self):
    loss, params, x = two_dense()
    params['unused'] = {'kernel': jnp.zeros((4, 4))}
    found = inject.all_linear(loss, params, x)
    self.assertLen(found.rules, 2)

  def test_computes_nothing_and_needs_shapes_only(self):
    calls = []

    def loss(params, x, size):
      calls.append(x)
      return nn.Dense(5).apply({'params': params}, x).sum() + size

    params = jax.eval_shape(nn.Dense(5).init, jax.random.key(0), normal(3, 4))[
        'params'
    ]
    inject.all_linear(
        loss, params, jax.ShapeDtypeStruct((3, 4), jnp.float32), 1
    )
    self.assertLen(calls, 2)  # With and without a look at its modules.
    for x in calls:
      self.assertIsInstance(x, jax.core.Tracer)

  def test_sub_models_with_other_kernels_of_the_same_name(self):
    one = Called(functools.partial(nn.DenseGeneral, (2, 3)), lambda m, x: m(x))
    two = Called(
        functools.partial(nn.DenseGeneral, 5, axis=(-2, -1)), lambda m, x: m(x)
    )
    loss = lambda params, x: apply_of(two)(
        params['two'], apply_of(one)(params['one'], x)
    )
    x = normal(2, 4)
    params = {
        'one': params_of(one, x),
        'two': params_of(two, normal(2, 2, 3)),
    }
    found = inject.all_linear(loss, params, x)
    rules = {rule.pattern: (rule.left, rule.right) for rule in found.rules}
    expected = {
        '^one/inner/kernel$': ((0,), (1, 2)),
        '^two/inner/kernel$': ((0, 1), (2,)),
    }
    self.assertEqual(rules, expected)

  def test_subclass_with_arguments_of_its_own(self):

    class Switched(nn.Dense):

      @nn.compact
      def __call__(self, x, *, train):
        return super().__call__(x if train else -x)

    model = Called(
        functools.partial(Switched, 5), lambda module, x: module(x, train=True)
    )
    x = normal(3, 4)
    found = inject.all_linear(apply_of(model), params_of(model, x), x)
    self.assertEqual([rule.pattern for rule in found.rules], ['^inner/kernel$'])


class TiedModel(nn.Module):
  """An embedding tied to the output, a convolution and a dense layer."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(7, 4, name='embed')
    x = nn.LayerNorm()(nn.Conv(4, (3,), name='conv')(embed(tokens)))
    return embed.attend(nn.Dense(4, name='linear')(x))


class JitTest(parameterized.TestCase):
  """Traces that jax remembers do not hide the adapters."""

  def test_a_jitted_loss_that_was_traced_before(self):
    plain, params, x = two_dense()
    factors = factors_of(params, TWO_DENSE_AXES)
    loss = jax.jit(plain)
    before = loss(params, x)
    for function in (
        inject.by_product(loss),
        jax.jit(inject.by_product(loss)),
    ):
      for _ in range(2):
        out = function(params, factors, x)
        expected = loss(merge(params, factors, TWO_DENSE_AXES), x)
        # Two layers in float32.
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    self.assertGreater(np.max(np.abs(out - before)), 0.1)
    # And the plain loss is as it was.
    np.testing.assert_array_equal(loss(params, x), before)
    self.assertLen(inject.all_linear(loss, params, x).rules, 2)

  def test_static_arguments_of_a_jitted_loss(self):
    plain, params, x = two_dense()
    factors = factors_of(params, TWO_DENSE_AXES)

    def power(params, x, exponent):
      return plain(params, x) ** (exponent if exponent > 1 else 1)

    loss = jax.jit(power, static_argnums=2)
    loss(params, x, 2)
    out = inject.by_product(loss)(params, factors, x, 2)
    expected = plain(merge(params, factors, TWO_DENSE_AXES), x) ** 2
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(
      'by_product', 'gradient', 'all_linear', 'jit twice', 'nn.jit'
  )
  def test_a_loss_with_a_jit_inside(self, function):
    plain, params, x = two_dense()
    factors = factors_of(params, TWO_DENSE_AXES)
    inner = jax.jit(plain)
    if function == 'nn.jit':
      inner = apply_of(
          nn.jit(nn.Sequential)([nn.Dense(5), nn.tanh, nn.Dense(3)])
      )
    loss = lambda params, x: inner(params, x).sum()
    if function == 'jit twice':
      loss = jax.jit(jax.jit(loss))
    before = loss(params, x)
    if function == 'all_linear':
      self.assertLen(inject.all_linear(loss, params, x).rules, 2)
      return
    adapted = inject.by_product(loss)
    first = adapted(params, factors, x)
    self.assertGreater(abs(first - before), 0.1)
    if function == 'gradient':
      jax.grad(adapted, 1)(params, factors, x)
      jax.jit(jax.grad(adapted, 1))(params, factors, x)
    np.testing.assert_array_equal(adapted(params, factors, x), first)


class GradientTest(parameterized.TestCase):
  """Gradients by the factors, and what forming them costs."""

  @parameterized.parameters(
      ('by_product', 'general_all'),
      ('by_product', 'einsum_interleaved'),
      ('by_product', 'remat_in_scan'),
      ('by_product', 'called_twice'),
      ('by_addition', 'einsum_batch_last'),
  )
  def test_chain_rule(self, function, name):
    self.check_chain_rule(function, name)

  @parameterized.parameters(
      ('by_product', 'dense'),
      ('by_product', 'einsum_batch_last'),
      ('by_product', 'subclass'),
      ('by_addition', 'dense'),
  )
  @pytest.mark.slow
  def test_chain_rule_otherwise(self, function, name):
    self.check_chain_rule(function, name)

  def check_chain_rule(self, function, name):
    # The loss sees L and s R, so by L it is s G R^T and by R it is s L^T G.
    model, shape, axes = CASES[name]
    scale = 1.7
    with jax.enable_x64(True):
      x = normal(*shape, dtype=jnp.float64)
      params = params_of(model, x, dtype=jnp.float64)
      factors = factors_of(params, axes, dtype=jnp.float64)
      loss = lambda params, x: jnp.sum(jnp.sin(apply_of(model)(params, x)))
      adapted = inject.by_product(loss)
      if function == 'by_addition':
        selection = inject.all_linear(loss, params, x)
        adapted = inject.by_addition(loss, selection)

      def scaled(factors):
        return {
            path: {'left': pair['left'], 'right': scale * pair['right']}
            for path, pair in factors.items()
        }

      value = lambda factors: adapted(params, scaled(factors), x)
      grads = jax.jit(jax.grad(value))(factors)
      full = jax.jit(jax.grad(loss))(merge(params, scaled(factors), axes), x)
    full = flax.traverse_util.flatten_dict(full, sep='/')
    for path, pair in factors.items():
      g = as_matrix(full[path], axes[path])
      left, right = np.asarray(pair['left']), np.asarray(pair['right'])
      expected = {'left': scale * g @ right.mT, 'right': scale * left.mT @ g}
      # Sums of some hundred products in float64.
      chex.assert_trees_all_close(grads[path], expected, rtol=1e-10, atol=1e-11)
      self.assertGreater(np.max(np.abs(g)), 1e-2)

  def before(self, lowered):
    """Returns the output shapes of all products of a program as traced."""
    pattern = r'stablehlo\.dot_general.*-> tensor<((?:\d+x)*)\w+>'
    return self.shapes(re.findall(pattern, lowered.as_text()))

  def after(self, lowered):
    """Returns the output shapes of all products that XLA leaves."""
    pattern = r'= \w+\[([\d,]*)\]\S* dot\('
    return self.shapes(re.findall(pattern, lowered.compile().as_text()))

  def shapes(self, texts):
    return [tuple(map(int, re.findall(r'\d+', text))) for text in texts]

  def test_backward_pass_forms_nothing_of_a_weight_s_size(self):
    # Products are told by their number of entries, whatever the order of axes
    # or their flattening: no other product has as many as a weight.
    class Model(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = Stack('remat in scan', Layer, (22, 26), name='stack')(x)
        x = nn.tanh(nn.Dense(14, name='dense')(x))
        x = nn.DenseGeneral((3, 6), name='split')(x)
        return nn.Einsum((3, 6, 46), 'bthd,hdf->btf', name='join')(x)

    model = Model()
    x = normal(3, 5, 14)
    params = params_of(model, x)
    loss = lambda params, x: jnp.sum(apply_of(model)(params, x) ** 2)
    selection = inject.all_linear(loss, params, x)
    found = matrices.find(params, selection)
    self.assertLen(found, 6 + 3)
    rng = np.random.default_rng(0)
    factors = {
        m.path: {
            'left': jnp.asarray(rng.normal(size=(*m.batch, m.m, RANK))),
            'right': jnp.asarray(rng.normal(size=(*m.batch, RANK, m.n))),
        }
        for m in found
    }
    sizes = {m.m * m.n for m in found}
    whole = sizes | {int(np.prod(m.batch)) * m.m * m.n for m in found}
    self.assertEqual(sizes, {14 * 22, 14 * 26, 14 * 14, 14 * 18, 18 * 46})
    count = lambda shapes: {int(np.prod(shape)) for shape in shapes}
    gradient = lambda loss, argnum: jax.jit(jax.grad(loss, argnum))

    lowered = gradient(inject.by_product(loss), 1).lower(params, factors, x)
    for shapes in (self.before(lowered), self.after(lowered)):
      # Derivatives by factors are there: 14 x 2, 2 x 22, 2 x 26, ..., 2 x 46.
      thin = {RANK * length for length in (14, 18, 22, 26, 46)}
      self.assertContainsSubset(thin, count(shapes))
      self.assertEmpty(count(shapes) & whole)

    # The same test does see the gradient by the weights,
    lowered = gradient(loss, 0).lower(params, x)
    for shapes in (self.before(lowered), self.after(lowered)):
      self.assertContainsSubset(sizes, count(shapes))
    # and what by_addition forms.
    added = inject.by_addition(loss, selection)
    lowered = gradient(added, 1).lower(params, factors, x)
    self.assertContainsSubset(sizes, count(self.before(lowered)))


class KernelTest(parameterized.TestCase):
  """Products whose adapter a kernel adds, step by step where there is no GPU."""

  def test_equals_the_plain_products(self):
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    params = {'a': 0.1 * draw(0, 128, 256), 'b': 0.1 * draw(1, 256, 128)}
    chain = adapters.make_chain(adapters.ChainPolicy.lora(6), optax.sgd(1.0))
    found = chain.adapted(params)
    factors = chain.init(jax.random.key(2), params).factors
    factors = jax.tree.map(lambda x: 0.1 * draw(3, *x.shape), factors)

    def value(factors, params, x):
      def loss(params, x):
        h = jnp.tanh(x @ params['a']) @ params['b']
        return jnp.mean(jnp.square(h.astype(jnp.float32)))

      pairs = adapters.scaled(factors, found)
      return inject.by_product(loss)(params, pairs, x)

    given, add = [], fused.add_product

    def kernel(weight, *args):
      given.append(weight.shape)
      return add(weight, *args, interpret=not fused.is_there())

    # By each what is asked for alone, as a step asks for the factors'.
    grads = (jax.value_and_grad(value, of) for of in ((0,), (0, 2), (0, 1, 2)))
    narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    args = factors, params, draw(4, 4, 8, 128)
    for grad in grads:
      exact = grad(*args)
      plain = grad(factors, *map(narrow, args[1:]))
      given.clear()
      with mock.patch.multiple(fused, takes=fused.fits, add_product=kernel):
        ours = grad(factors, *map(narrow, args[1:]))
      forward = [(32, 256), (32, 128)]
      self.assertEqual(given[:2], forward)
      self.assertIn((32, 256), given[2:])  # By what enters b.
      for e, p, o in zip(
          *map(jax.tree.leaves, (exact, plain, ours)), strict=True
      ):
        self.assertEqual(o.dtype, p.dtype)
        e, p, o = (np.asarray(x, np.float64) for x in (e, p, o))
        # Rounded once where the plain sum is rounded twice: eps of bfloat16.
        self.assertLess(np.linalg.norm(o - e), 2**-6 * np.linalg.norm(e))
        self.assertLess(np.linalg.norm(o - p), 2**-6 * np.linalg.norm(e))

  def test_a_matrix_that_is_not_a_row_of_columns_is_left_to_xla(self):
    params = {'w': jnp.ones((128, 128), jnp.bfloat16)}
    chain = adapters.make_chain(adapters.ChainPolicy.lora(4), optax.sgd(1.0))
    factors = jax.tree.map(
        jnp.ones_like, chain.init(jax.random.key(0), params).factors
    )
    pairs = adapters.scaled(factors, chain.adapted(params))
    left = inject.by_product(lambda params, x: params['w'] @ x)
    x = jnp.ones((128, 128), jnp.bfloat16)
    with mock.patch.multiple(fused, takes=fused.fits, add_product=None):
      found = left(params, pairs, x)
    # W + s L R has 1 + 4 s everywhere, s = 1 of alpha = r.
    self.assertTrue(bool(jnp.all(found == found[0, 0])))
    self.assertEqual(float(found[0, 0]), 128 * 5)


class ByAdditionTest(parameterized.TestCase):
  """W + L R is formed in the dtype of W."""

  def test_plain_trees_stacks_and_dtypes(self):
    params = {
        'w': normal(4, 5),
        'low': normal(4, 5, dtype=jnp.bfloat16),
        'stack': normal(3, 4, 5),
        'vector': normal(5),
    }
    rules = (matrices.stacked('stack'),)
    selection = matrices.Matrices(rules=rules)
    axes = {
        'w': Axes(),
        'low': Axes(),
        'stack': Axes((1,), (2,), (0,)),
    }
    factors = factors_of(params, axes)
    adapted = inject.by_addition(lambda params: params, selection)
    out = adapted(params, factors)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, params)
    expected = merge(params, factors, axes)
    for name in ('w', 'stack', 'vector'):
      # Sums of two products and one more, in float32.
      np.testing.assert_allclose(out[name], expected[name], atol=1e-6)
    # The change and the sum, below 2^3 each, are rounded to bfloat16.
    np.testing.assert_allclose(
        np.float64(out['low']), expected['low'], rtol=0, atol=2 * 2.0**-6
    )
    alone = adapted(params, {'w': factors['w']})
    np.testing.assert_array_equal(alone['stack'], params['stack'])
    np.testing.assert_array_equal(alone['w'], out['w'])


def quantized(model, x, qtype, seed=0, path='.*'):
  """Returns the loss of a model quantised by Qwix, and its params."""
  qwix = pytest.importorskip('qwix')
  rule = qwix.QuantizationRule(module_path=path, weight_qtype=qtype)
  low = qwix.quantize_model(model, qwix.PtqProvider([rule]))
  shapes = jax.eval_shape(low.init, jax.random.key(0), x)['params']
  params = qwix.quantize_params(params_of(model, x, seed), shapes)
  return apply_of(low), params


class QuantizedTest(parameterized.TestCase):
  """Adapters over weights quantised by Qwix."""

  @parameterized.parameters(
      ('nf4', 'dense'),
      ('int8', 'general_axes'),
      ('int4', 'einsum'),
  )
  def test_output_and_gradient(self, qtype, case):
    self.check_output_and_gradient(qtype, case)

  @parameterized.parameters(
      ('int8', 'dense'),
      ('int4', 'dense'),
  )
  @pytest.mark.slow
  def test_output_and_gradient_otherwise(self, qtype, case):
    self.check_output_and_gradient(qtype, case)

  def check_output_and_gradient(self, qtype, case):
    model, shape, axes = CASES[case]
    x = normal(*shape)
    loss, params = quantized(model, x, qtype)
    factors = factors_of(params_of(model, x), axes)
    selection = inject.all_linear(loss, params, x)
    (rule,) = selection.rules
    self.assertEqual((rule.left, rule.right, rule.batch), axes['kernel'])
    adapted = inject.by_product(loss)

    def value(factors):
      out = adapted(params, factors, x)
      return jnp.sum(jnp.cos(out)), out

    (_, out), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(factors)
    base = jax.jit(loss)(params, x)
    # Qwix did quantise: the exact model differs.
    exact = apply_of(model)(params_of(model, x), x)
    self.assertGreater(np.max(np.abs(base - exact)), 1e-3)

    left, right = (np.float64(factors['kernel'][s]) for s in ('left', 'right'))
    rows = np.float64(x).reshape(-1, left.shape[0])
    change = rows @ left @ right
    # Some ten products of numbers below 2^4, in float32.
    np.testing.assert_allclose(
        out, np.float64(base) + change.reshape(base.shape), rtol=0, atol=2e-5
    )
    slope = -np.sin(np.float64(out)).reshape(change.shape)
    expected = {
        'left': rows.T @ (slope @ right.T),
        'right': left.T @ rows.T @ slope,
    }
    chex.assert_trees_all_close(grads['kernel'], expected, atol=1e-4)

  def test_scanned_layers(self):
    qwix = pytest.importorskip('qwix')
    model = Stack('scan', LinearLayer)
    rule = qwix.QuantizationRule(module_path='.*', weight_qtype='int8')
    low = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    x = normal(3, 4)
    params = low.init(jax.random.key(0), x)['params']
    # What the model computes with: q * scale, a channel of each layer.
    linear = params['layers']['linear']
    array = linear['kernel'].array
    full = {'layers': {'linear': dict(linear)}}
    full['layers']['linear']['kernel'] = np.float64(array.qvalue) * np.float64(
        array.scale
    )
    axes = {'layers/linear/kernel': Axes((1,), (2,), (0,))}
    (rule,) = inject.all_linear(apply_of(low), params, x).rules
    self.assertEqual(
        (rule.left, rule.right, rule.batch), axes['layers/linear/kernel']
    )
    factors = factors_of(full, axes)
    out = jax.jit(inject.by_product(apply_of(low)))(params, factors, x)
    with jax.enable_x64(True):
      expected = np.asarray(
          apply_of(model)(merge(full, factors, axes), np.float64(x))
      )
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)

  @parameterized.parameters('penalty', 'direct', 'embedded')
  def test_uses_that_are_no_products_are_refused(self, kind):
    model = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])
    x = normal(2, 4)
    plain, params = quantized(model, x, 'int8')

    def loss(params, x):
      array = params['layers_0']['kernel'].array
      extra = {
          'penalty': lambda: sum(
              jnp.sum(jnp.asarray(w, 'float32') ** 2)
              for w in jax.tree.leaves(params)
          ),
          'direct': lambda: jnp.sum(x @ (array.qvalue * array.scale)),
          'embedded': lambda: jax.jit(lambda w: w[0, 0])(array.scale),
      }[kind]
      return jnp.sum(plain(params, x)) + extra()

    factors = {'layers_0/kernel': self.pair(4, 5)}
    message = 'quantised layers_0/kernel to enter products alone'
    with self.assertRaisesRegex(ValueError, message):
      inject.by_product(loss)(params, factors, x)

  def pair(self, m, n):
    return {'left': normal(m, RANK), 'right': normal(RANK, n)}

  def test_a_chain_without_merges_trains(self):
    model = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])
    x = normal(2, 4)
    loss, params = quantized(model, x, 'int4')
    adapted = inject.by_product(lambda p, x: (jnp.sum(loss(p, x) ** 2), None))
    selection = inject.all_linear(loss, params, x)
    policy = adapters.ChainPolicy.lora(RANK)
    chain = adapters.make_chain(policy, optax.sgd(0.05), selection)
    state = jax.jit(chain.init)(jax.random.key(1), params)
    self.assertEqual(set(state.factors), set(TWO_DENSE_AXES))
    step = jax.jit(chain.step, static_argnums=1)
    values = []
    for _ in range(5):
      state, (value, _) = step(state, adapted, x)
      values.append(float(value))
    self.assertLess(values[-1], 0.8 * values[0])
    chex.assert_trees_all_equal(state.params, params)

  @parameterized.parameters(1, 5)
  def test_merges_are_refused(self, period):
    model = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])
    loss, params = quantized(model, normal(2, 4), 'int8')
    selection = inject.all_linear(loss, params, normal(2, 4))
    chain = adapters.make_chain(
        adapters.ChainPolicy.bernoulli(RANK, period), optax.sgd(1.0), selection
    )
    message = (
        'Expected period=None over the quantised layers_0/kernel, got'
        f' period={period}: a merge would quantise it again.'
    )
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      chain.init(jax.random.key(0), params)

  def test_merged_params_are_refused(self):
    model = nn.Dense(5, use_bias=False)
    _, params = quantized(model, normal(2, 4), 'int8')
    chain = adapters.make_chain(adapters.ChainPolicy.lora(RANK), optax.sgd(1.0))
    state = chain.init(jax.random.key(0), params)
    with self.assertRaisesRegex(ValueError, 'quantised kernel'):
      chain.params(state)

  def test_merges_beside_quantised_weights(self):
    model = nn.Sequential([nn.Dense(4, use_bias=False) for _ in range(3)])
    _, params = quantized(model, normal(2, 4), 'int8', path='layers_[01]')
    selection = matrices.Matrices('layers_2/kernel')
    chain = adapters.make_chain(
        adapters.ChainPolicy.cola(RANK, period=1), optax.sgd(1.0), selection
    )
    state = chain.init(jax.random.key(0), params)
    factors = fill(state.factors, 1)
    tuned = chain.params(state._replace(factors=factors))
    pair = factors['layers_2/kernel']
    kernel = params['layers_2']['kernel']
    # Sums of two products and one more, in float32.
    np.testing.assert_allclose(
        tuned['layers_2']['kernel'],
        np.float64(kernel)
        + np.float64(pair['left']) @ np.float64(pair['right']),
        atol=1e-6,
    )
    for name in ('layers_0', 'layers_1'):
      chex.assert_trees_all_equal(tuned[name], params[name])

  def test_is_quantized_and_logical(self):
    model = nn.Dense(5)
    _, params = quantized(model, normal(2, 4), 'int4')
    self.assertTrue(inject.is_quantized(params['kernel']))
    self.assertFalse(inject.is_quantized(params['bias']))
    shapes = inject.logical(params)
    self.assertEqual(shapes['kernel'].shape, (4, 5))
    self.assertTrue(jnp.issubdtype(shapes['kernel'].dtype, jnp.floating))
    self.assertIs(shapes['bias'], params['bias'])


class NnxMlp(nnx.Module):

  def __init__(self, rngs):
    self.up = nnx.Linear(4, 3, rngs=rngs)
    self.down = nnx.Linear(3, 4, rngs=rngs)

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)))


class NnxTest(parameterized.TestCase):
  """NNX models by the factors that Qwix puts into them."""

  @pytest.mark.slow
  def test_two_links_equal_those_by_addition(self):
    qwix = pytest.importorskip('qwix')
    x, y = normal(6, 4), normal(6, 4, seed=3)
    provider = qwix.LoraProvider(module_path='.*', rank=RANK, alpha=RANK)
    model = qwix.apply_lora_to_model(
        NnxMlp(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1)
    )
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    params = nnx.to_pure_dict(rest)

    def by_qwix(params, factors, batch):
      inputs, targets = batch
      names = {'kernel_lora_a': 'left', 'kernel_lora_b': 'right'}
      pairs = {
          path.removesuffix('/kernel'): {
              name: pair[side] for name, side in names.items()
          }
          for path, pair in factors.items()
      }
      model = nnx.merge(graph, lora, rest, copy=True)
      nnx.update(model, params)
      nnx.update(model, pairs)
      return jnp.sum((model(inputs) - targets) ** 2), None

    def plain(params, batch):
      inputs, targets = batch
      up, down = params['up'], params['down']
      h = jnp.tanh(inputs @ up['kernel'] + up['bias'][None])
      out = h @ down['kernel'] + down['bias'][None]
      return jnp.sum((out - targets) ** 2), None

    def run(loss):
      policy = adapters.ChainPolicy.bernoulli(RANK, period=3)
      chain = adapters.make_chain(policy, optax.sgd(0.02))

      @jax.jit
      def steps(params):
        def step(state, _):
          state, (value, _) = chain.step(state, loss, (x, y))
          return state, (value, state.coins)

        state = chain.init(jax.random.key(5), params)
        state, (values, coins) = jax.lax.scan(step, state, length=6)
        return chain.params(state), coins, values

      return steps(params)

    tuned, coins, values = run(by_qwix)
    expected, expected_coins, expected_values = run(inject.by_addition(plain))
    # Six steps in float32 whose sums are taken in another order.
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    chex.assert_trees_all_close(tuned, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(coins, expected_coins)
    sides = np.stack([coins[f'{name}/kernel'] for name in ('up', 'down')])
    self.assertEqual(set(sides.ravel().tolist()), {False, True})
    np.testing.assert_array_equal(sides[:, 0], sides[:, 2])  # Links of three.
    self.assertLess(values[-1], 0.9 * values[0])
    for name in ('up', 'down'):
      change = tuned[name]['kernel'] - params[name]['kernel']
      self.assertGreater(np.max(np.abs(change)), 1e-2)


class RejectsTest(parameterized.TestCase):
  """What cannot be adapted, with its message."""

  def refuse(self, factors, *parts, x=None, model=None):
    x = jnp.arange(6).reshape(2, 3) if x is None else x
    model = TiedModel() if model is None else model
    params = params_of(model, x)
    with self.assertRaises(ValueError) as caught:
      jax.eval_shape(inject.by_product(apply_of(model)), params, factors, x)
    for part in parts:
      self.assertIn(part, str(caught.exception))
    return str(caught.exception)

  def pair(self, m, n):
    return {'left': normal(m, RANK), 'right': normal(RANK, n)}

  def test_convolution_whose_axes_are_unknown(self):
    self.refuse(
        {'conv/kernel': self.pair(12, 4), 'linear/kernel': self.pair(4, 4)},
        'conv/kernel to enter a product that tells its axes',
        'as adapters.scaled returns them, or select others',
    )

  def test_layer_that_is_not_called(self):
    loss, params, x = two_dense()
    params['unused'] = {'kernel': jnp.zeros((4, 4))}
    factors = {'unused/kernel': self.pair(4, 4)}
    with self.assertRaisesRegex(ValueError, 'the loss to use unused/kernel'):
      inject.by_product(loss)(params, factors, x)

  def test_sub_model_that_is_not_called(self):
    plain, params, x = two_dense()
    loss = lambda params, x: plain(params['one'], x)
    factors = factors_of(params, TWO_DENSE_AXES)
    both = {
        f'{name}/{path}': pair
        for name in ('one', 'two')
        for path, pair in factors.items()
    }
    params = {'one': params, 'two': params}
    with self.assertRaisesRegex(ValueError, 'two/layers_0/kernel'):
      inject.by_product(loss)(params, both, x)

  @parameterized.parameters('nowhere/kernel', 'linear', 'linear/kern')
  def test_path_that_does_not_exist(self, path):
    self.refuse(
        {path: self.pair(4, 4)},
        f'the factors of {path} to belong to a leaf of params',
        "'conv/kernel'",
        "'embed/embedding'",
        "'linear/kernel'",
    )

  def test_rule_with_the_wrong_sides(self):
    model, shape, axes = CASES['scan']
    x = normal(*shape)
    loss = apply_of(model)
    params = params_of(model, x)
    path = 'layers/attention/query/kernel'
    rules = (matrices.Rule(re.escape(path), (1, 2), (3,), batch=(0,)),)
    chain = adapters.make_chain(
        adapters.ChainPolicy.lora(RANK),
        optax.sgd(1.0),
        matrices.Matrices(path, rules=rules),
    )
    state = jax.eval_shape(chain.init, jax.random.key(0), params)
    self.assertEqual(axes[path], Axes((1,), (2, 3), (0,)))
    with self.assertRaises(ValueError) as caught:
      jax.eval_shape(inject.by_product(loss), params, state.factors, x)
    # Three layers, d = 4, two heads of 3.
    message = (
        'Expected the left factor of layers/attention/query/kernel to have'
        ' shape (3, 4, 2), got (3, 8, 2): its rule should say left=(1,),'
        ' right=(2, 3), batch=(0,).'
    )
    self.assertEqual(str(caught.exception), message)

  def test_stack_without_its_batch_axis(self):
    model, shape, _ = CASES['einsum_batch']
    rules = (matrices.Rule('kernel', (0, 1), (2,)),)
    x = normal(*shape)
    params = params_of(model, x)
    (matrix,) = matrices.find(params, matrices.Matrices(rules=rules))
    factors = {'kernel': self.pair(matrix.m, matrix.n)}
    self.refuse(
        factors,
        'kernel to have shape (3, 4, 2), got (12, 2)',
        'left=(1,), right=(2,), batch=(0,)',
        x=x,
        model=model,
    )

  @parameterized.parameters('embed', 'none')
  def test_all_linear_without_a_projection(self, kind):
    x = jnp.arange(6).reshape(2, 3)
    if kind == 'embed':
      model = nn.Embed(7, 4)
      loss, params = apply_of(model), params_of(model, x)
    else:
      loss, params = lambda params, x: params['w'][x], {'w': normal(7)}
    with self.assertRaisesRegex(ValueError, 'multiplies by matrices of params'):
      inject.all_linear(loss, params, x)

  def test_all_linear_of_other_params(self):
    loss, params, x = two_dense()
    wrapped = lambda p, x: loss(params, x)  # Not those that it is given.
    with self.assertRaisesRegex(ValueError, r"none among \['w'\]"):
      inject.all_linear(wrapped, {'w': x}, x)
