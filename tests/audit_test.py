"""Tests of the estimated constants, of the guarantee's choice, and of audits."""

import json
import math
import pathlib
import shutil
import subprocess
import sys
import unittest.mock

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bernoulli_lora_jax import cli
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax.studies import audit_run
from bernoulli_lora_jax.studies import constants as constants_lib
from bernoulli_lora_jax.studies import guarantee
from bernoulli_lora_jax.studies import runs
from bernoulli_lora_jax.theory import bounds
from bernoulli_lora_jax.theory import estimates
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import reporting

_ROOT = pathlib.Path(__file__).parent.parent


class X64TestCase(parameterized.TestCase):
  """Float64; what an audit sets for the process is put back."""

  @pytest.fixture(autouse=True)
  def _x64(self, tmp_path):
    self.tmp = tmp_path
    old = jax.config.jax_enable_x64
    jax.config.update('jax_enable_x64', True)
    yield
    jax.config.update('jax_enable_x64', old)


class EstimatorsTest(X64TestCase):

  def test_smoothness_of_a_quadratic(self):
    # An indefinite one: 7 is the norm, -7 the least eigenvalue.
    curvature = {'a': jnp.array([[3.0, -7.0], [0.5, 0.1]]), 'b': jnp.ones(2)}
    f = lambda p: sum(jnp.sum(curvature[k] * p[k] ** 2) / 2 for k in p)
    params = jax.tree.map(jnp.ones_like, curvature)
    find = jax.jit(lambda p, key: estimates.smoothness(f, p, key, num_steps=6))
    norm, low = find(params, jax.random.key(0))
    np.testing.assert_allclose(norm, 7.0, rtol=1e-10)
    np.testing.assert_allclose(low, -7.0, rtol=1e-10)
    few = jax.jit(lambda p, key: estimates.smoothness(f, p, key, num_steps=2))
    norm, low = few(params, jax.random.key(0))
    self.assertLess(norm, 7.0)
    self.assertGreater(low, -7.0)
    with self.assertRaisesRegex(ValueError, 'num_steps >= 1'):
      estimates.smoothness(f, params, jax.random.key(0), num_steps=0)

  def test_local_smoothness(self):
    curvature = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([1.0])}
    grad = lambda p: jax.tree.map(jnp.multiply, curvature, p)
    zero = jax.tree.map(jnp.zeros_like, curvature)
    along = {'a': jnp.array([0.0, 2.0]), 'b': jnp.array([0.0])}
    self.assertAlmostEqual(
        float(estimates.local_smoothness(grad, zero, along)), 4
    )
    slant = {'a': jnp.array([1.0, 1.0]), 'b': jnp.array([1.0])}
    np.testing.assert_allclose(
        estimates.local_smoothness(grad, along, slant),
        math.sqrt((9 + 16 + 1) / 3),
        rtol=1e-12,
    )
    self.assertEqual(estimates.local_smoothness(grad, slant, slant), 0)

  def test_mean_smoothness_of_least_squares(self):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=9)
    grad = (
        lambda w, batch: batch['x'].T
        @ (batch['x'] @ w - batch['y'])
        / len(batch['y'])
    )
    batches = {'x': jnp.asarray(x)[:, None], 'y': jnp.asarray(y)[:, None]}
    # mean ||x_i x_i^T d||^2 = d^T (mean ||x_i||^2 x_i x_i^T) d.
    second = (x * (x**2).sum(1, keepdims=True)).T @ x / 9
    values, vectors = np.linalg.eigh(second)
    a = rng.normal(size=4)
    find = lambda b: float(
        estimates.mean_smoothness(grad, jnp.asarray(a), jnp.asarray(b), batches)
    )
    for i in (0, 3):
      np.testing.assert_allclose(
          find(a + 3 * vectors[:, i]), values[i] ** 0.5, rtol=1e-10
      )
    b = rng.normal(size=4)
    d = b - a
    np.testing.assert_allclose(
        find(b), math.sqrt(d @ second @ d / (d @ d)), rtol=1e-10
    )
    self.assertEqual(find(a), 0)

  def test_moments(self):
    sigma, full = 2.0, {'w': jnp.array([1.0, -2.0, 2.0])}
    noise = (
        sigma / math.sqrt(3) * jax.random.normal(jax.random.key(0), (2000, 3))
    )
    grad = lambda params, batch: {'w': full['w'] + batch}
    found = estimates.moments(grad, full, full, noise)
    squares = np.sum(np.asarray(noise) ** 2, axis=1)
    np.testing.assert_allclose(found.variance, squares.mean(), rtol=1e-10)
    np.testing.assert_allclose(
        found.error, squares.std(ddof=1) / math.sqrt(2000), rtol=1e-10
    )
    self.assertLess(abs(found.variance - sigma**2), 5 * found.error)
    np.testing.assert_allclose(
        found.second,
        np.mean(np.sum((np.asarray(noise) + [1, -2, 2]) ** 2, axis=1)),
        rtol=1e-10,
    )

  @parameterized.parameters(
      (0.5, 1.3, 2.0), (0.0, 1.0, 0.0), (0.0, 0.0, 3.0), (2.0, 0.0, 0.0)
  )
  def test_fit_recovers(self, slope, growth, noise):
    rng = np.random.default_rng(0)
    gaps, norms = rng.uniform(0.1, 5, (2, 12))
    seconds = 2 * slope * gaps + growth * norms + noise
    found = estimates.fit_second_moment(gaps, norms, seconds)
    np.testing.assert_allclose(found, (slope, growth, noise), atol=1e-7)

  def test_fit_lies_above_and_touches(self):
    rng = np.random.default_rng(1)
    for scale in (1e-6, 1.0, 1e6):
      gaps, norms, seconds = scale * rng.uniform(0.1, 5, (3, 15))
      found = estimates.fit_second_moment(gaps, norms, seconds)
      self.assertGreaterEqual(min(found), 0)
      above = 2 * found.slope * gaps + found.growth * norms + found.noise
      ratio = above / seconds
      self.assertGreaterEqual(ratio.min(), 1 - 1e-6)
      self.assertLess(ratio.min(), 1 + 1e-6)
      # No other constants do with less, each point scaled by its moment.
      columns = np.stack([2 * gaps, norms, np.full(15, scale)], axis=1)
      for mix in rng.dirichlet([0.5] * 3, 2000):
        other = columns @ mix / seconds
        other /= other.min()
        self.assertLessEqual(ratio.sum(), other.sum() * (1 + 1e-6))

  def test_fit_of_nothing(self):
    self.assertEqual(
        estimates.fit_second_moment([1.0, 2.0], [1.0, 0.0], [0.0, 0.0]),
        (0.0, 0.0, 0.0),
    )

  def test_fit_with_a_point_without_noise(self):
    found = estimates.fit_second_moment(
        [1.0, 2.0, 0.5], [1.0, 3, 1], [2.0, 3, 0]
    )
    self.assertGreaterEqual(2 * found.slope + found.growth + found.noise, 2)

  @parameterized.parameters(
      ([-1.0], [1.0], [1.0]),
      ([1.0], [math.nan], [1.0]),
      ([1.0], [1.0], [math.inf]),
      ([1.0], [1.0], [-1.0]),
  )
  def test_fit_rejects(self, *values):
    with self.assertRaisesRegex(ValueError, '>= 0 and finite, got gaps='):
      estimates.fit_second_moment(*values)

  def test_pl_constant(self):
    # f = (w_1^2 + 4 w_2^2) / 2, mu = 1: attained on the first axis.
    w = np.array([[3.0, 1.0], [2.0, 0.5], [2.0, 0.0], [0.0, 0.0]])
    gaps = (w[:, 0] ** 2 + 4 * w[:, 1] ** 2) / 2
    norms = w[:, 0] ** 2 + 16 * w[:, 1] ** 2
    self.assertAlmostEqual(estimates.pl_constant(gaps, norms), 1.0)
    self.assertAlmostEqual(
        estimates.pl_constant(gaps[:2], norms[:2]), min(25 / 13, 8 / 5)
    )
    self.assertEqual(estimates.pl_constant([0.0], [1.0]), math.inf)
    # A gap within rounding says nothing.
    found = estimates.pl_constant([13.0, 1e-7], [25.0, 0.0], floor=1e-6)
    self.assertAlmostEqual(found, 25 / 26)
    with self.assertRaises(ValueError):
      estimates.pl_constant([1.0, 2.0], [1.0])


class RealisedTest(parameterized.TestCase):

  TREE = {
      'a': jnp.zeros((3, 5)),
      'b': jnp.zeros((2, 4, 3)),
      'c': jnp.zeros((2, 3)),
  }
  MATRICES = matrices_lib.Matrices(
      select='.*', rules=(matrices_lib.stacked('b'),)
  )

  @parameterized.parameters(
      ('coordinate', [0.3, 0.5, 0.8], True),
      ('gaussian', [1.0, 0.0, 0.5], False),
  )
  def test_equals_plain_loop(self, name, probs, shared):
    self.check_equals_plain_loop(name, probs, shared)

  @parameterized.parameters(
      ('gaussian', [0.3, 0.5, 0.8], False),
      ('weighted_coordinate:4', [0.0, 1.0, 1.0], False),
  )
  @pytest.mark.slow
  def test_equals_plain_loop_otherwise(self, name, probs, shared):
    self.check_equals_plain_loop(name, probs, shared)

  def check_equals_plain_loop(self, name, probs, shared):
    sketch = sketches.by_name(name)
    found = matrices_lib.find(self.TREE, self.MATRICES)
    ranks, num, key = [1, 2, 3], 6, jax.random.key(5)
    arguments = dict(
        ranks=ranks, probs=probs, sketch=sketch, shared_coin=shared
    )
    rows = estimates.realised_eigenvalues(key, num, found, **arguments)
    draw = jax.jit(
        jax.vmap(
            lambda t: [
                tuple(link[:3])
                for link in links_lib.draw_links(
                    jax.random.fold_in(key, t), found, **arguments
                )
            ]
        )
    )
    drawn = jax.tree.map(np.asarray, draw(jnp.arange(num)))
    for i, (m, row) in enumerate(zip(found, rows, strict=True)):
      coins, *sides = drawn[i]
      size = int(np.prod(m.batch))
      lows, highs, means, lefts = [], [], [], 0
      for entry in range(size):
        total = np.zeros((m.m * m.n, m.m * m.n))
        for t in range(num):
          is_left = bool(probs[i])
          if coins is not None:
            is_left = bool(coins[t].reshape(-1)[entry])
          lefts += is_left
          dim = m.m if is_left else m.n
          basis = sides[0 if is_left else 1]
          if basis is None:
            h = np.eye(dim)
          else:
            q = basis[t].reshape(size, -1)[entry]
            if np.issubdtype(q.dtype, np.integer):
              q = np.eye(dim)[:, q]
            q = q.reshape(dim, -1)
            h = q @ q.T
          whole = (h, np.eye(m.n)) if is_left else (np.eye(m.m), h)
          total += np.kron(*whole) / num  # On the row-major entries.
        values = np.linalg.eigvalsh(total)
        lows.append(values[0])
        highs.append(values[-1])
        means.append(values.mean())
      self.assertEqual(row.path, m.path)
      np.testing.assert_allclose(row.left, lefts / num / size, rtol=1e-5)
      # Frames and sums are float32.
      np.testing.assert_allclose(row.low, np.mean(lows), atol=2e-6)
      np.testing.assert_allclose(row.high, np.mean(highs), atol=2e-6)
      np.testing.assert_allclose(row.mean, np.mean(means), atol=2e-6)
      ends = bounds.spectrum(
          [(m.m, m.n)], rank=ranks[i], prob=probs[i], sketch=sketch
      )
      self.assertEqual(row.exact, (ends.lmin, ends.lmax))

  def test_full_rank(self):
    found = matrices_lib.find({'w': jnp.zeros((3, 3))})
    (row,) = estimates.realised_eigenvalues(
        jax.random.key(0),
        4,
        found,
        ranks=[3],
        probs=[0.5],
        sketch=sketches.gaussian(),
    )
    np.testing.assert_allclose((row.low, row.mean, row.high), 1, rtol=1e-6)
    self.assertEqual(row.exact, (1.0, 1.0))

  def test_approaches_the_exact_one(self):
    found = matrices_lib.find({'w': jnp.zeros((3, 4))})
    (row,) = estimates.realised_eigenvalues(
        jax.random.key(0),
        3000,
        found,
        ranks=[1],
        probs=[0.25],
        sketch=sketches.gaussian(),
    )
    # The mean has traces r/m or r/n: exact given the coins.
    np.testing.assert_allclose(
        row.mean, row.left / 3 + (1 - row.left) / 4, rtol=1e-5
    )
    error = math.sqrt(0.25 * 0.75 / 3000)
    self.assertLess(abs(row.left - 0.25), 5 * error)
    self.assertBetween(row.low, 0.9 * row.exact[0], row.exact[0])
    self.assertBetween(row.high, row.exact[1], 1.1 * row.exact[1])


def linear_config(**overrides):
  """Linear regression of 4 x 4, 40 examples, in float64; 10 steps."""
  config = base_config.get_config()
  config.training.eval_gradient = True
  config.x64 = True
  config.task.name = 'linear_regression'
  config.task.dim = 16
  config.task.num_pretraining = 50
  config.task.num_samples = 40
  config.task.batch_size = 10
  config.method.rank = 2
  config.method.estimator = 'gd'
  config.method.stepsize_factor = 1.0
  config.training.num_steps = 10
  config.training.num_evals = 10
  config.training.progress = False
  names = {k.replace('__', '.'): v for k, v in overrides.items()}
  return experiment.apply_overrides(config, names)


def digits_config(**overrides):
  """Digits with a small network, 8 steps."""
  config = base_config.get_config()
  config.training.eval_gradient = True
  config.task.hidden = (8,)
  config.task.pretrain_epochs = 1
  config.method.sketch = 'coordinate'  # A QR takes long to compile.
  config.method.learning_rate = 0.02
  config.method.rank = 2
  config.training.num_steps = 8
  config.training.num_evals = 4
  config.training.progress = False
  names = {k.replace('__', '.'): v for k, v in overrides.items()}
  return experiment.apply_overrides(config, names)


CLIENTS = {
    'federated__num_clients': 4,
    'federated__compressor': 'randk',
    'federated__argument': 0.25,
}
FOUND = constants_lib.Constants(
    smoothness=4.0,
    least_curvature=-1.0,
    local_smoothness=3.0,
    mean_smoothness=6.0,
    batch_smoothness=5.0,
    variance=2.0,
    variance_error=0.1,
    slope=0.1,
    growth=1.2,
    noise=2.0,
    pl=0.5,
    initial_gap=7.0,
    lower_bound=1.0,
    best=1.5,
    client_smoothness=(4.0, 5.0, 6.0, 8.0),
    client_error=9.0,
)


def finished(config, num_steps=10):
  record = json.loads(config.to_json_best_effort())
  run = reporting.Run(pathlib.Path('x'), record, {'step': num_steps}, [])
  return runs.Finished(run, config)


class GuaranteeTest(X64TestCase):

  def find(self, config, is_known=True):
    """Returns the bound with the constants FOUND; L may be known besides."""
    task = arguments.make_task(config)
    method = experiment.make_method(config, task)
    if not is_known:
      task = task._replace(smoothness=None)
    return guarantee.find_bound(finished(config), task, method, FOUND), task

  @parameterized.parameters(
      (dict(), ''),
      (dict(method__name='full'), ''),
      (dict(method__estimator='sgd'), ''),
      (dict(method__mode='adapter', method__estimator='sgd'), ''),
      (dict(method__name='lora', method__mode='adapter'), 'lora is no chain'),
      (dict(method__name='cola', method__mode='adapter'), 'cola is no chain'),
      (dict(method__optimizer='adamw'), 'adamw in place of plain'),
      (dict(method__optimizer='momentum'), 'momentum in place of plain'),
      (dict(method__schedule='cosine'), 'stepsize that changes'),
      (dict(method__warmup_steps=3), 'stepsize that changes'),
      (dict(method__link_warmup=3), ''),  # Adapters alone know it.
      (
          dict(method__mode='adapter', method__link_warmup=3),
          'stepsize that changes',
      ),
      (dict(training__plateau_patience=3), 'drops on plateaus'),
      (dict(method__clip_norm=1.0), 'clipped'),
      (dict(method__name='full', method__estimator='fedavg'), 'local steps'),
      (
          dict(CLIENTS, method__mode='adapter', method__estimator='sgd'),
          'federated rounds of adapters',
      ),
      (
          dict(CLIENTS, method__estimator='ef21', federated__cohort=2),
          'EF21 with cohorts',
      ),
      (dict(method__mode='adapter', method__frame='raw'), 'raw factors'),
      (dict(method__mode='sketched', method__frame='raw'), 'raw factors'),
      (dict(method__resample=False), ''),
      (
          dict(method__mode='adapter', method__resample=False),
          'one subspace kept',
      ),
      (dict(method__period=5), ''),  # Plain GD in a kept subspace.
      (
          dict(method__period=5, method__estimator='sgd'),
          'several minibatch steps',
      ),
      (
          dict(
              method__period=5,
              method__estimator='sgd',
              method__mode='adapter',
          ),
          'several minibatch steps',
      ),
      (
          dict(
              task__name='quadratic',
              method__period=5,
              method__estimator='sgd',
              method__mode='adapter',
          ),
          '',
      ),
  )
  def test_why_uncovered(self, overrides, reason):
    config = linear_config(**overrides)
    task = arguments.make_task(config)
    found = guarantee.why_uncovered(config, task)
    self.assertIn(reason, found)
    self.assertEqual(bool(found), bool(reason))

  def test_all_rows_with_replacement_are_a_minibatch(self):
    config = linear_config(
        task__batch_size=40,
        method__mode='adapter',
        method__estimator='sgd',
        method__period=5,
    )
    task = arguments.make_task(config)
    self.assertIn('minibatch', guarantee.why_uncovered(config, task))

  def test_all_rows_with_replacement_are_no_t1(self):
    bound, _ = self.find(
        linear_config(
            task__batch_size=40,
            method__mode='adapter',
            method__estimator='sgd',
        )
    )
    self.assertEqual(bound.theorem, 'T2')

  def test_dropout_is_no_gd(self):
    config = digits_config(task__dropout=0.2, method__estimator='gd')
    task = arguments.make_task(config)
    self.assertNotEqual(guarantee.why_uncovered(config, task), '')

  def test_l1_is_not_smooth(self):
    config = linear_config(
        task__name='l1_regression',
        method__stepsize_factor=None,
        method__learning_rate=0.01,
    )
    found, _ = self.find(config)
    self.assertIn('T8 bounds f - f* of the mean iterate', found.reason)
    self.assertIsNone(found.curve)  # No reference of smooth losses.

  def test_uniform_weights_of_unequal_clients(self):
    config = linear_config(
        **CLIENTS,
        method__estimator='qgd',
        federated__weights='uniform',
        federated__unequal=True,
    )
    task = arguments.make_task(config)
    self.assertNotEqual(guarantee.why_uncovered(config, task), '')

  @parameterized.parameters('qgd', 'marina')
  def test_cohorts_enlarge_omega(self, estimator):
    given = dict(CLIENTS, method__estimator=estimator)
    if estimator == 'marina':
      given['federated__marina_prob'] = 0.25
    whole, _ = self.find(linear_config(**given))
    part, _ = self.find(linear_config(**given, federated__cohort=1))
    if not part.reason.startswith('its'):
      self.assertTrue(part.reason or part.limit < whole.limit)
    self.assertLess(part.limit, whole.limit)

  @parameterized.parameters(0.01, 1.0)
  def test_each_estimator(self, gamma):
    """Theorem, limit and curve against bounds with the constants by hand."""
    known = dict(initial_gap=7.0, smoothness=4.0, lmin=0.5)
    both = dict(known, lmax=0.5)
    clients = dict(
        both, client_smoothness=(4.0, 5.0, 6.0, 8.0), weights=[0.25] * 4
    )
    q = 10 / 50
    cases = {
        'gd': ('T1', known),
        'sgd': ('T2', dict(both, noise=2.0, bounded_variance=True)),
        'page': (
            'T3',
            dict(both, mean_smoothness=6.0, prob=q, batch_size=10),
        ),
        'mvr': (
            'T4',
            dict(
                both,
                mean_smoothness=5.0,
                momentum=0.9,
                variance=2.0,
                initial_error=2.0,
            ),
        ),
        # RandK of 4 in 16: omega 3; its optimum gap is at most 1.5 - 1.
        'qgd': ('T5', dict(clients, omega=3.0, client_gap=0.5)),
        'marina': ('T6', dict(clients, omega=3.0, prob=0.2)),
        # Contractive: beta = 1 / (1 + omega).
        'ef21': ('T7', dict(clients, beta=0.25)),
    }
    for name, (theorem, constants) in cases.items():
      given = dict(method__estimator=name, method__learning_rate=gamma)
      given |= {'method__stepsize_factor': None}
      if theorem >= 'T5':
        given |= CLIENTS
      if name == 'marina':
        given['federated__marina_prob'] = 0.2
      found, _ = self.find(linear_config(**given), is_known=False)
      self.assertEqual(found.theorem, theorem)
      self.assertFalse(found.limit_is_known)
      limit_of, bound = bounds.METHODS[name]
      limit = bounds.call(limit_of, dict(constants, num_steps=10))
      np.testing.assert_allclose(found.limit, limit, rtol=1e-12)
      self.assertEqual(bool(found.reason), gamma > limit, name)
      if found.reason:
        self.assertRegex(found.reason, 'its stepsize 1 is .* times the limit')
      self.assertIn(theorem, found.label)
      np.testing.assert_allclose(
          found.curve(np.array([1.0, 10.0])),
          bound([1, 10], stepsize=min(gamma, limit), **constants),
          rtol=1e-12,
      )

  @parameterized.parameters(('full', 0.0), ('compressed', 0.75), ('zero', 1.0))
  def test_ef21_start(self, start, share):
    found, _ = self.find(
        linear_config(
            **CLIENTS,
            method__estimator='ef21',
            federated__start=start,
            method__stepsize_factor=None,
            method__learning_rate=0.01,
        ),
        is_known=False,
    )
    expected = bounds.ef21(
        5,
        stepsize=0.01,
        initial_gap=7.0,
        smoothness=4.0,
        lmin=0.5,
        lmax=0.5,
        client_smoothness=(4.0, 5.0, 6.0, 8.0),
        beta=0.25,
        initial_error=share * 9.0,
    )
    np.testing.assert_allclose(found.curve(5), expected, rtol=1e-12)

  def test_links_of_plain_steps_are_counted(self):
    config = linear_config(
        task__name='quadratic',
        method__rank=1,
        method__period=5,
        method__estimator='sgd',
        method__mode='adapter',
    )
    found, _ = self.find(config)
    self.assertEqual(found.theorem, 'T1')
    np.testing.assert_allclose(
        found.curve(np.array([1, 5, 10, 14])),
        bounds.gd(
            [1, 1, 2, 2],
            stepsize=1 / 20,
            initial_gap=7.0,
            smoothness=20.0,
            lmin=1 / 3,
        ),
    )
    self.assertEqual(found.period, 5)
    self.assertIn('starts of links', found.label)

  @parameterized.parameters('adapter', 'gradient')
  def test_a_known_smoothness_is_taken(self, mode):
    """At exactly 1/L, and by the same theorem in either mode."""
    config = linear_config(
        task__name='quadratic',
        method__rank=1,
        method__estimator='sgd',
        method__mode=mode,
    )
    found, task = self.find(config)
    self.assertEqual((found.theorem, found.reason), ('T1', ''))
    self.assertTrue(found.limit_is_known)
    self.assertEqual(found.limit, 1 / 20)
    # An estimate may miss it by its rounding.
    estimated = FOUND._replace(smoothness=20 * (1 + 1e-6))
    method = experiment.make_method(config, task)
    found = guarantee.find_bound(finished(config), task, method, estimated)
    self.assertEqual(found.reason, '')
    given = dict(method__stepsize_factor=None, method__learning_rate=1 / 20)
    config = linear_config(
        task__name='quadratic',
        method__rank=1,
        method__estimator='sgd',
        method__mode=mode,
        **given,
    )
    unknown = task._replace(smoothness=None)
    found = guarantee.find_bound(finished(config), unknown, method, estimated)
    self.assertEqual((found.reason, found.limit_is_known), ('', False))
    longer = FOUND._replace(smoothness=20 * (1 + 1e-3))
    found = guarantee.find_bound(finished(config), unknown, method, longer)
    self.assertIn('1.001 times the limit', found.reason)

  def test_fitted_moments_are_taken_where_they_are_better(self):
    config = linear_config(
        method__estimator='sgd',
        method__stepsize_factor=None,
        method__learning_rate=0.01,
    )
    task = arguments.make_task(config)._replace(smoothness=None)
    method = experiment.make_method(config, task)
    known = dict(initial_gap=7.0, stepsize=0.01, smoothness=4.0, lmin=0.5)
    known |= dict(lmax=0.5, bounded_variance=True)
    fitted = FOUND._replace(noise=0.01, slope=1e-3, growth=1.01)
    expected = bounds.sgd([3, 10], slope=1e-3, growth=1.01, noise=0.01, **known)
    found = guarantee.find_bound(finished(config), task, method, fitted)
    np.testing.assert_allclose(found.curve(np.array([3, 10])), expected)
    self.assertIn('A, B, C', found.label)
    for worse in (dict(slope=1e3), dict(growth=1e3), dict(noise=1e3)):
      found = guarantee.find_bound(
          finished(config), task, method, fitted._replace(**worse)
      )
      np.testing.assert_allclose(
          found.curve(np.array([10])), bounds.sgd([10], noise=2.0, **known)
      )
      self.assertNotIn('A, B, C', found.label)

  def test_reference_of_what_is_uncovered(self):
    config = linear_config(method__optimizer='adam')
    found, _ = self.find(config, is_known=False)
    self.assertEqual((found.theorem, found.limit), ('', None))
    self.assertIn('adam', found.reason)
    self.assertIn('not of this run', found.label)
    np.testing.assert_allclose(
        found.curve(np.array([0, 4])),
        bounds.gd(
            [1, 4], stepsize=0.25, initial_gap=7.0, smoothness=4.0, lmin=0.5
        ),
    )
    config = linear_config(
        method__mode='adapter', method__name='lora', method__estimator='sgd'
    )
    found, _ = self.find(config)
    self.assertIsNone(found.curve)

  @parameterized.parameters(
      (dict(), 0.02),
      (dict(method__alpha=3.0), 0.02),  # Only adapters have a scale.
      (dict(method__mode='adapter'), 0.02),
      (dict(method__mode='adapter', method__alpha=3.0), 0.02 * 2.25),
      (
          dict(
              method__mode='adapter',
              method__alpha=3.0,
              method__scaling='sqrt',
          ),
          0.02 * 4.5,
      ),
  )
  def test_stepsize_of(self, overrides, gamma):
    config = digits_config(**overrides)
    task = arguments.make_task(linear_config())
    np.testing.assert_allclose(
        guarantee.stepsize_of(finished(config), task), gamma, rtol=1e-12
    )

  @parameterized.parameters(
      # 64 x 8 and 8 x 5 at rank 2, p = 1/4.
      (dict(method__prob=0.25), 0.25 / 32 + 0.75 / 4, 0.25 / 4 + 0.75 * 0.4),
      (dict(method__prob=0.25, method__train_others=True), 0.1953125, 1.0),
      (dict(method__name='rac_left'), 1 / 32, 1 / 4),
      (dict(method__name='rac_right'), 1 / 4, 2 / 5),
      (dict(method__name='full'), 1.0, 1.0),
      (
          dict(method__name='rac_right', method__mode='adapter'),
          1 / 4,
          2 / 5,
      ),
  )
  def test_spectrum_of(self, overrides, lmin, lmax):
    config = digits_config(**overrides)
    task = arguments.make_task(config)
    method = experiment.make_method(config, task)
    found = guarantee.spectrum_of(finished(config), task, method)
    np.testing.assert_allclose((found.lmin, found.lmax), (lmin, lmax))


class MeasuredTest(parameterized.TestCase):

  def run_of(self, lines):
    return reporting.Run(pathlib.Path('x'), {}, {}, lines)

  def test_every_step(self):
    norms = [4.0, 2.0, 6.0, 1.0]
    lines = [
        {'step': i, 'grad_norm_sq': n, 'loss': 0.0} for i, n in enumerate(norms)
    ]
    lines.insert(2, {'step': 2, 'loss': 1.0})  # No evaluation.
    found = audit_run.measured(self.run_of(lines))
    np.testing.assert_array_equal(found.steps, [0, 1, 2, 3])
    np.testing.assert_array_equal(found.norms, norms)
    # Over t = 0 .. T - 1.
    np.testing.assert_allclose(found.means, [4, 4, 3, 4])
    self.assertTrue(found.is_exact)

  def test_between_evaluations(self):
    lines = [
        {'step': s, 'grad_norm_sq': n} for s, n in ((0, 8.0), (4, 4.0), (5, 1))
    ]
    found = audit_run.measured(self.run_of(lines))
    np.testing.assert_allclose(found.means, [8, 6, (4 * 6 + 4) / 5])
    self.assertFalse(found.is_exact)

  def test_starts_of_links(self):
    """W_0, W_4 and W_8 of links of four steps, whatever lies between."""
    lines = [{'step': s, 'grad_norm_sq': 10.0 - s} for s in range(0, 10, 2)]
    found = audit_run.measured(self.run_of(lines), period=4)
    np.testing.assert_array_equal(found.steps, [0, 4, 8])
    np.testing.assert_allclose(found.means, [10, 10, (10 + 6) / 2])
    self.assertTrue(found.is_exact)
    with self.assertRaisesRegex(ValueError, 'training.num_evals=1'):
      audit_run.measured(self.run_of(lines), period=7)

  def test_rejects(self):
    with self.assertRaisesRegex(ValueError, 'eval_gradient.*got 1 in'):
      audit_run.measured(self.run_of([{'step': 0, 'grad_norm_sq': 1.0}]))


class RealisedStudyTest(X64TestCase):

  @parameterized.parameters('gradient', 'adapter')
  @pytest.mark.slow
  def test_draws_are_those_of_the_run(self, mode):
    """The coin of the table is the side on which the first step projects."""
    config = linear_config(
        method__rank=1,
        method__mode=mode,
        method__estimator='gd' if mode == 'gradient' else 'sgd',
    )
    task = arguments.make_task(config)
    program = experiment.make_program(config, task)
    seen = set()
    for seed in range(6):
      key = jax.random.key(seed)
      start = program.start(key)
      old = np.asarray(program.params(start)['w'])
      path = runs.Path([], [], jax.tree.map(jnp.copy, start), 0.0)
      state, _ = program.jit(1, start)(program.data, start, key, 0)
      moved = np.asarray(program.params(state)['w']) - old
      u, _, vt = np.linalg.svd(moved)
      data = task.data['train']
      if mode == 'adapter':
        data = task.batch(task.data, jax.random.fold_in(key, 1), 0)
      grad = jax.grad(lambda p, data=data: task.loss(p, data, None)[0])
      g = -np.asarray(grad({'w': old})['w']) / task.smoothness
      left = np.linalg.norm(np.outer(u[:, 0], u[:, 0]) @ g - moved)
      right = np.linalg.norm(g @ np.outer(vt[0], vt[0]) - moved)
      scale = np.linalg.norm(moved)
      self.assertLess(min(left, right), 1e-5 * scale)
      self.assertGreater(max(left, right), 1e-3 * scale)
      (row,) = audit_run._realised(
          finished(config, 1), task, program.method, path
      )
      self.assertEqual(row['left, %'], 100.0 * (left < right))
      self.assertEqual(row['links'], 1)
      seen.add(bool(left < right))
    self.assertLen(seen, 2)


QUICK = dict(num_points=3, num_products=4, num_batches=4, progress=False)


def column(rows, key, value):
  return {row[key]: row[value] for row in rows}


class AuditTest(X64TestCase):

  def train(self, config):
    jax.config.update('jax_enable_x64', config.x64)
    folder = self.tmp / 'run'
    experiment.train(config, folder)
    return folder

  def held(self, study):
    return column(study.tables['assumptions'], 'assumption', 'held')

  @pytest.mark.slow
  def test_gd_of_linear_regression(self):
    folder = self.train(linear_config())
    found = audit_run.audit(folder, **dict(QUICK, num_products=16))
    values = column(found.tables['constants'], 'constant', 'value')
    task = arguments.make_task(linear_config())
    params = task.init(jax.random.key(0))
    start = float(task.loss(params, task.data['train'], None)[0])
    np.testing.assert_allclose(values['D0'], start, rtol=1e-10)
    self.assertEqual(values['L known'], task.smoothness)
    self.assertLessEqual(values['L between points'], values['L'])
    hessian = jax.hessian(
        lambda w: task.loss({'w': w.reshape(4, 4)}, task.data['train'], None)[0]
    )(params['w'].ravel())
    # All 16 directions: exact at the start, which is one of the points.
    at_start = np.linalg.eigvalsh(hessian)
    self.assertGreaterEqual(values['L'], np.abs(at_start).max() * (1 - 1e-9))
    self.assertLessEqual(values['L'], task.smoothness * (1 + 1e-9))
    self.assertLessEqual(values['least curvature'], at_start[0] + 1e-9)
    for name in ('Lbar, examples', 'Lbar, minibatches'):  # By Jensen.
      self.assertGreaterEqual(values[name], values['L'])
    held = self.held(found)
    self.assertEqual(held['the replay is the run'], 'yes')
    self.assertEqual(held['a guarantee speaks of the method'], 'yes')
    self.assertEqual(held['stepsize within its limit'], 'yes')
    self.assertEqual(held['f bounded below'], 'yes')
    self.assertEqual(held['smooth: one L for the path'], 'yes')
    self.assertNotIn('minibatches independent', held)
    (row,) = found.tables['lambda']
    self.assertEqual((row['least, E[H]'], row['largest, E[H]']), (0.5, 0.5))
    self.assertEqual(row['links'], 10)
    # Square, rank 2: 1/2 on either side.
    np.testing.assert_allclose(row['mean eigenvalue'], 0.5, rtol=1e-5)
    lines = [
        json.loads(line)
        for line in (folder / 'metrics.jsonl').read_text().splitlines()
    ]
    norms = np.array([line['grad_norm_sq'] for line in lines])
    for row in found.tables['bound and run']:
      steps = row['steps']
      np.testing.assert_allclose(row['mean so far'], norms[:steps].mean())
      bound = 2 * start * task.smoothness / (0.5 * steps)
      np.testing.assert_allclose(row['bound (estimate)'], bound, rtol=1e-10)
      self.assertGreaterEqual(row['bound / mean'], 1)
    self.assertIn('T1 with estimated constants lies above', found.notes[0])
    self.assertEqual(set(found.figures), {'bound'})

  def test_a_converged_path_has_a_pl_constant(self):
    """Full GD on the quadratic in float32: mu = 0.2, whatever is rounding."""
    config = base_config.get_config()
    config.training.eval_gradient = True
    config.task.name = 'quadratic'
    config.method.name = 'full'
    config.method.estimator = 'gd'
    config.method.stepsize_factor = 1.0
    config.training.num_steps = 900
    config.training.num_evals = 30
    config.training.progress = False
    folder = self.train(config)
    found = audit_run.audit(folder, num_points=6, progress=False)
    values = column(found.tables['constants'], 'constant', 'value')
    self.assertBetween(values['mu'], 0.2 * (1 - 1e-3), 0.3)

  @pytest.mark.slow
  def test_sgd_of_digits(self):
    found = audit_run.audit(self.train(digits_config()), **QUICK)
    held = self.held(found)
    self.assertEqual(held['the replay is the run'], 'yes')
    self.assertEqual(held['minibatches independent'], 'no')
    self.assertEqual(held['minibatch gradients unbiased for f'], 'yes')
    values = column(found.tables['constants'], 'constant', 'value')
    self.assertGreater(values['sigma^2'], 0)
    self.assertGreaterEqual(values['B'], 1)
    shown = column(found.tables['assumptions'], 'assumption', 'found')
    self.assertEqual(shown['a guarantee speaks of the method'], 'T2')
    self.assertLen(found.tables['lambda'], 2)

  @pytest.mark.slow
  def test_adapters_of_plain_steps(self):
    config = digits_config(method__mode='adapter', task__dropout=0.3)
    found = audit_run.audit(self.train(config), **QUICK)
    held = self.held(found)
    self.assertEqual(held['the replay is the run'], 'yes')
    self.assertEqual(held['minibatch gradients unbiased for f'], 'no')
    shown = column(found.tables['assumptions'], 'assumption', 'found')
    self.assertEqual(shown['a guarantee speaks of the method'], 'T2')
    self.assertEqual(found.tables['lambda'][0]['links'], 8)

  @pytest.mark.slow
  def test_adapters_of_adamw(self):
    config = digits_config(
        method__mode='adapter', method__optimizer='adamw', method__period=4
    )
    found = audit_run.audit(self.train(config), **QUICK)
    held = self.held(found)
    self.assertEqual(held['the replay is the run'], 'yes')
    self.assertEqual(held['a guarantee speaks of the method'], 'no')
    self.assertNotIn('stepsize within its limit', held)
    self.assertIn('adamw in place of plain steps', found.notes[0])
    self.assertIn('reference', found.tables['bound and run'][0])
    self.assertEqual(found.tables['lambda'][0]['links'], 2)

  @parameterized.parameters(['ef21'])
  @pytest.mark.slow
  def test_federated(self, estimator):
    self.check_federated(estimator)

  @parameterized.parameters('qgd', 'marina')
  @pytest.mark.slow
  def test_federated_otherwise(self, estimator):
    self.check_federated(estimator)

  def check_federated(self, estimator):
    config = linear_config(
        **CLIENTS,
        method__estimator=estimator,
        method__stepsize_factor=0.05,
        training__num_evals=5,
    )
    folder = self.train(config)
    found = audit_run.audit(folder, **dict(QUICK, num_products=16))
    held = self.held(found)
    self.assertEqual(held['the replay is the run'], 'yes')
    shown = column(found.tables['assumptions'], 'assumption', 'found')
    theorem = {'qgd': 'T5', 'marina': 'T6', 'ef21': 'T7'}[estimator]
    self.assertEqual(shown['a guarantee speaks of the method'], theorem)
    values = column(found.tables['constants'], 'constant', 'value')
    clients = [values[f'L of client {i}'] for i in range(4)]
    # f is their mean: L <= mean of L_l, at the same points.
    self.assertGreaterEqual(np.mean(clients) * (1 + 1e-9), values['L'] * 0.5)
    task = arguments.make_task(config)
    x = np.asarray(task.data['clients']['x'])
    lam = task.smoothness / 3
    for i, value in enumerate(clients):
      gram = x[i].T @ x[i] / len(x[i])
      # lam w^2 / (1 + w^2) has a curvature in [-lam / 2, 2 lam].
      top = np.linalg.eigvalsh(gram)[-1]
      self.assertBetween(value, top - lam / 2 - 1e-9, top + 2 * lam + 1e-9)

  @pytest.mark.slow
  def test_another_path_is_seen(self):
    folder = self.train(linear_config())
    path = folder / 'config.json'
    record = json.loads(path.read_text())
    record['seed'] = 1
    path.write_text(json.dumps(record))
    with jax.enable_x64(False):  # Of the caller's own, for as long as it says.
      found = audit_run.audit(folder, **QUICK)
    self.assertEqual(self.held(found)['the replay is the run'], 'no')
    self.assertTrue(jax.config.jax_enable_x64)


@pytest.fixture(scope='session')
def trained_run(tmp_path_factory):
  """The directory of one run; tests take copies."""
  folder = tmp_path_factory.mktemp('trained') / 'run'
  with jax.enable_x64(True):
    experiment.train(linear_config(training__num_evals=5), folder)
  return folder


class RunsTest(X64TestCase):

  @pytest.fixture(autouse=True)
  def _run(self, _x64, trained_run):
    self.config = linear_config(training__num_evals=5)
    self.folder = self.tmp / 'run'
    shutil.copytree(trained_run, self.folder)

  def test_replay(self):
    finished = runs.load(self.folder)
    program = experiment.make_program(finished.config)
    told = []
    path = runs.replay(finished, program, 3, told.append)
    self.assertEqual(sum(told), 10)
    self.assertEqual(path.steps, [0, 4, 10])  # Of 0, 2, ..., 10; half to even.
    self.assertLess(path.error, 1e-12)
    chex.assert_trees_all_equal(
        path.points[0], program.task.init(jax.random.key(0))
    )
    # The points are not one array that the loop goes on to overwrite.
    norms = [
        float(jnp.linalg.norm(p['w'] - path.points[0]['w']))
        for p in path.points
    ]
    self.assertEqual(norms[0], 0)
    self.assertLess(norms[1], norms[2])
    chex.assert_trees_all_equal(path.start.params, path.points[0])
    # More points than evaluations: every evaluation once.
    many = runs.replay(finished, program, 50)
    self.assertEqual(many.steps, [0, 2, 4, 6, 8, 10])
    with self.assertRaisesRegex(ValueError, 'points >= 2, got points=1'):
      runs.replay(finished, program, 1)
    with self.assertRaisesRegex(ValueError, 'points >= 2, got points=1'):
      audit_run.audit(self.folder, **dict(QUICK, num_points=1))
    with self.assertRaisesRegex(ValueError, 'batches >= 2, got batches=1'):
      audit_run.audit(self.folder, **dict(QUICK, num_batches=1))
    self.tamper(program)
    path = runs.replay(finished, program, 2)
    # The checkpoint is moved by half of what the run moved it.
    self.assertBetween(path.error, 0.3, 0.7)

  def tamper(self, program):
    start = program.start(jax.random.key(0))
    with loop.open_checkpoints(program, self.folder, start) as saver:
      state, best, progress = loop.restore(saver, program, start)
    old, new = start.params['w'], state.params['w']
    state = state._replace(params={'w': new + 0.5 * (new - old)})
    shutil.rmtree(self.folder / 'checkpoints')
    with loop.open_checkpoints(program, self.folder, start) as saver:
      saver.save(10, loop.checkpoint_tree(state, best, progress))

  def change(self, section, name, value):
    path = self.folder / 'config.json'
    record = json.loads(path.read_text())
    record[section][name] = value
    path.write_text(json.dumps(record))

  def test_config_comes_back(self):
    found = runs.load(self.folder).config
    self.assertFalse(found.training.progress)
    self.assertEqual(found.to_dict(), self.config.to_dict())

  def test_a_field_of_later_versions_has_its_default(self):
    path = self.folder / 'config.json'
    record = json.loads(path.read_text())
    del record['method']['sketch'], record['federated']
    path.write_text(json.dumps(record))
    self.assertEqual(runs.load(self.folder).config.method.sketch, 'gaussian')

  def test_what_is_missing_is_said_before_the_replay(self):
    path = self.folder / 'metrics.jsonl'
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
      line.pop('grad_norm_sq', None)
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    replay = unittest.mock.patch.object(
        runs, 'replay', side_effect=RuntimeError
    )
    with replay, self.assertRaisesRegex(ValueError, 'eval_gradient'):
      audit_run.audit(self.folder, **QUICK)

  def test_unknown_field(self):
    self.change('method', 'rnak', 3)
    with self.assertRaisesRegex(
        ValueError, r'field of base_config, got method.rnak=3 in .*config.json'
    ):
      runs.load(self.folder)

  @parameterized.parameters('summary.json', 'config.json', 'metrics.jsonl')
  def test_missing_file(self, name):
    (self.folder / name).unlink()
    with self.assertRaisesRegex(ValueError, f'finished run with {name}, got'):
      audit_run.audit(self.folder, **QUICK)

  def test_missing_checkpoints(self):
    for path in (self.folder / 'checkpoints').iterdir():
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    for _ in range(2):
      with self.assertRaisesRegex(ValueError, 'Expected checkpoints in .*none'):
        audit_run.audit(self.folder, **QUICK)
      shutil.rmtree(self.folder / 'checkpoints', ignore_errors=True)

  def test_diverged(self):
    path = self.folder / 'summary.json'
    record = json.loads(path.read_text()) | {'diverged': 3}
    path.write_text(json.dumps(record))
    with self.assertRaisesRegex(ValueError, 'a run that ended'):
      runs.load(self.folder)

  def test_no_directory(self):
    with self.assertRaisesRegex(ValueError, 'Expected a finished run'):
      runs.load(self.tmp / 'nothing')

  def test_a_run_within_a_run(self):
    shutil.copytree(self.folder, self.folder / 'inner')
    with self.assertRaisesRegex(ValueError, 'Expected'):
      runs.load(self.folder)

  def test_a_directory_of_runs(self):
    outer = self.tmp / 'sweep'
    shutil.copytree(self.folder, outer / 'seed=0')
    with self.assertRaisesRegex(ValueError, 'with 1 runs in it: .*seed=0'):
      runs.load(outer)

  @parameterized.parameters(
      ('config.json', '{"a": ', 'Expected JSON in .*config.json, got'),
      ('metrics.jsonl', '{}\nx', 'Expected JSON in .*metrics.jsonl, line 2'),
      ('summary.json', '[]', 'Expected a mapping in .*summary.json, got'),
      ('summary.json', '{}', 'Expected a summary with step, got'),
  )
  def test_files_that_are_spoilt(self, name, text, message):
    (self.folder / name).write_text(text)
    with self.assertRaisesRegex(ValueError, message):
      runs.load(self.folder)

  def test_a_field_of_another_type(self):
    path = self.folder / 'config.json'
    record = json.loads(path.read_text())
    record['method']['rank'] = 'four'
    path.write_text(json.dumps(record))
    with self.assertRaisesRegex(ValueError, 'another method.rank in .*run'):
      runs.load(self.folder)

  @parameterized.parameters(
      ('points', 1, 2), ('products', 0, 1), ('batches', 1, 2)
  )
  def test_sizes_are_refused_by_name(self, name, value, least):
    message = f'Expected {name} >= {least}, got {name}={value}'
    with self.assertRaisesRegex(ValueError, message):
      audit_run.audit(self.folder, **{f'num_{name}': value})

  def test_launch_rejects(self):
    with self.assertRaises(SystemExit) as caught:
      cli.main(['audit'])
    self.assertRegex(str(caught.exception), 'DIRECTORY|directory|workdir')

  @pytest.mark.slow
  def test_launch(self):
    command = [
        sys.executable,
        str(_ROOT / 'launch' / 'audit.py'),
        str(self.folder),
        '--points=2',
        '--products=3',
        '--batches=2',
        f'--figures={self.tmp / "out"}',
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('the replay is the run', done.stdout)
    self.assertIn('lies above', done.stdout)
    self.assertEqual(
        {path.name for path in (self.tmp / 'out').iterdir()},
        {
            'audit_run_bound.png',
            'audit_run_constants.csv',
            'audit_run_assumptions.csv',
            'audit_run_bound_and_run.csv',
            'audit_run_lambda.csv',
        },
    )
    command[2] = str(self.tmp / 'nothing')
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    self.assertEqual(done.returncode, 1)
    self.assertIn('ValueError: Expected a finished run', done.stderr)
    self.assertNotIn('Traceback', done.stderr)
