"""Tests of Lanczos against dense eigenvalues."""

import collections
import functools
import math

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bernoulli_lora_jax.theory import lanczos

SIZE = 12


def matrix(kind):
  """Returns a symmetric (12, 12) matrix."""
  rng = np.random.default_rng(0)
  q = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
  values = {
      'indefinite': np.linspace(-3, 2, SIZE),
      'positive': np.geomspace(1e-3, 5, SIZE),
      'negative': -np.linspace(1, 2, SIZE),
      'repeated': np.repeat([-1.0, 0.5, 4.0], 4),
      'identity': np.ones(SIZE),
      'low rank': np.array([7.0, 2.0] + [0.0] * 10),
      'zero': np.zeros(SIZE),
  }[kind]
  return (q * values) @ q.T


KINDS = (
    'indefinite',
    'positive',
    'negative',
    'repeated',
    'identity',
    'low rank',
    'zero',
)


@functools.partial(jax.jit, static_argnums=2)
def _find(a, key, num_steps):
  return lanczos.extremes(lambda v: a @ v, a[0], key, num_steps=num_steps)


class ExtremesTest(parameterized.TestCase):

  def find(self, a, num_steps, seed=0):
    found = _find(jnp.asarray(a), jax.random.key(seed), num_steps)
    return jax.tree.map(np.asarray, found)

  @parameterized.product(
      kind=KINDS, dtype=['float32', 'float64'], num_steps=[SIZE, 40]
  )
  def test_exact_at_the_dimension(self, kind, dtype, num_steps):
    with jax.enable_x64(dtype == 'float64'):
      a = matrix(kind).astype(dtype)
      found = self.find(a, num_steps)
      # Rounding of 12 products and of eigh, of the largest eigenvalue.
      tiny = 1e3 * np.finfo(dtype).eps * max(1.0, np.abs(a).max())
      values = np.linalg.eigvalsh(matrix(kind))
      np.testing.assert_allclose(found.low, values[0], atol=tiny)
      np.testing.assert_allclose(found.high, values[-1], atol=tiny)
      self.assertEqual(found.low.dtype, dtype)
      for value, vector, residual in (
          (found.low, found.low_vector, found.low_residual),
          (found.high, found.high_vector, found.high_residual),
      ):
        np.testing.assert_allclose(np.linalg.norm(vector), 1.0, rtol=1e-5)
        np.testing.assert_allclose(a @ vector, value * vector, atol=10 * tiny)
        self.assertLessEqual(residual, 10 * tiny)

  @parameterized.parameters(1, 3, 6)
  def test_few_steps_stay_inside(self, num_steps):
    with jax.enable_x64(True):
      for seed in range(5):
        a = matrix('indefinite')
        found = self.find(a, num_steps, seed)
        self.assertGreaterEqual(found.low, -3 - 1e-12)
        self.assertLessEqual(found.high, 2 + 1e-12)
        for value, vector, residual in (
            (found.low, found.low_vector, found.low_residual),
            (found.high, found.high_vector, found.high_residual),
        ):
          np.testing.assert_allclose(np.linalg.norm(vector), 1.0, rtol=1e-12)
          true = np.linalg.norm(a @ vector - value * vector)
          np.testing.assert_allclose(residual, true, atol=1e-10)
          nearest = np.abs(np.linspace(-3, 2, SIZE) - value).min()
          self.assertLessEqual(nearest, true + 1e-10)  # An eigenvalue.

  def test_one_step_is_the_rayleigh_quotient(self):
    with jax.enable_x64(True):
      found = self.find(matrix('indefinite'), 1)
      self.assertEqual(found.low, found.high)
      v = found.low_vector
      np.testing.assert_allclose(
          v @ matrix('indefinite') @ v, found.low, rtol=1e-10
      )

  def test_more_steps_are_nearer(self):
    with jax.enable_x64(True):
      highs = [self.find(matrix('indefinite'), k).high for k in (1, 3, 6, 9)]
      self.assertTrue(np.all(np.diff(highs) >= -1e-12), highs)
      self.assertGreater(highs[-1], 1.99)

  def test_tree(self):
    """Eigenvectors come back in the tree's shapes."""
    with jax.enable_x64(True):
      like = {'a': jnp.zeros((2, 3)), 'b': (jnp.zeros(5), jnp.zeros(()))}
      flat = lambda tree: jnp.concatenate(
          [x.ravel() for x in jax.tree.leaves(tree)]
      )
      a = jnp.asarray(matrix('indefinite'))

      def product(v):
        w = a @ flat(v)
        return {'a': w[:6].reshape(2, 3), 'b': (w[6:11], w[11])}

      find = jax.jit(
          lambda key: lanczos.extremes(product, like, key, num_steps=SIZE)
      )
      found = find(jax.random.key(0))
      chex.assert_trees_all_equal_shapes(found.high_vector, like)
      np.testing.assert_allclose(found.high, 2.0, rtol=1e-10)
      v = flat(found.high_vector)
      np.testing.assert_allclose(a @ v, 2 * v, atol=1e-8)
      # Shapes are enough.
      shapes = jax.eval_shape(lambda: like)
      again = jax.eval_shape(
          lambda key: lanczos.extremes(product, shapes, key), jax.random.key(0)
      )
      chex.assert_trees_all_equal_shapes(again, found)

  def test_rejects(self):
    with self.assertRaisesRegex(ValueError, 'num_steps >= 1, got num_steps=0'):
      self.find(matrix('zero'), 0)


class HessianProductTest(parameterized.TestCase):

  def test_equals_the_hessian(self):
    with jax.enable_x64(True):
      f = lambda p: jnp.sum(jnp.sin(p['a'] @ p['b']) ** 2) + jnp.prod(p['b'])
      keys = jax.random.split(jax.random.key(0), 4)
      params, v = (
          {
              'a': jax.random.normal(k, (3, 4)),
              'b': jax.random.normal(q, (4,)),
          }
          for k, q in (keys[:2], keys[2:])
      )
      hessian = jax.jit(jax.hessian(f))(params)
      expected = {
          i: sum(jnp.tensordot(hessian[i][j], v[j], v[j].ndim) for j in params)
          for i in params
      }
      found = jax.jit(lambda p, v: lanczos.hessian_product(f, p)(v))(params, v)
      chex.assert_trees_all_close(found, expected, rtol=1e-10)

  def test_extremes_of_a_hessian(self):
    with jax.enable_x64(True):
      # Indefinite: eigenvalues -2 sin(1), 6 and 0.
      f = lambda p: 3 * p[0] ** 2 + 2 * jnp.sin(p[1]) + p[2]
      params = jnp.array([1.0, 1.0, 1.0])
      found = jax.jit(
          lambda p, key: lanczos.extremes(lanczos.hessian_product(f, p), p, key)
      )(params, jax.random.key(0))
      np.testing.assert_allclose(found.high, 6, rtol=1e-12)
      np.testing.assert_allclose(found.low, -2 * math.sin(1), rtol=1e-12)


def test_a_product_in_another_container():
  """An OrderedDict lists its leaves in another order."""
  like = {'a': jnp.zeros(2), 'b': jnp.zeros(3)}
  scale = {'a': jnp.array([1.0, 2.0]), 'b': jnp.array([3.0, 4.0, 7.0])}
  product = lambda v: collections.OrderedDict(
      (name, scale[name] * v[name]) for name in ('b', 'a')
  )
  found = lanczos.extremes(product, like, jax.random.key(0))
  np.testing.assert_allclose((found.low, found.high), (1, 7), rtol=1e-5)
  with pytest.raises(ValueError, match="got 'b' in like alone"):
    lanczos.extremes(lambda v: {'a': v['a']}, like, jax.random.key(0))
