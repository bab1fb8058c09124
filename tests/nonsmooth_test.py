"""Tests of l1 regression, its optimum and constants, and of T8 on it."""

import pathlib
import runpy

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from bernoulli_lora_jax import stepsizes
from bernoulli_lora_jax.studies import nonsmooth
from bernoulli_lora_jax.studies import study
from bernoulli_lora_jax.tasks import l1_regression
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import bounds
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import experiment

_CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'l1_regression.py'


@pytest.fixture(scope='module', autouse=True)
def _cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('BERNOULLI_LORA_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield


def value(problem, w):
  return np.mean(np.abs(problem.x @ w.reshape(-1) - problem.y))


class ProblemTest(parameterized.TestCase):

  @parameterized.parameters(((4, 3), 40), ((1, 5), 12), ((2, 3), 4))
  def test_optimum_by_the_dual_program(self, shape, size):
    problem = l1_regression.make_problem(shape=shape, num_samples=size, seed=1)
    x, y = problem.x, problem.y
    # f* = max y^T z over X^T z = 0, |z_i| <= 1/N: any such z is a lower bound.
    dual = scipy.optimize.linprog(
        -y,
        A_eq=x.T,
        b_eq=np.zeros(x.shape[1]),
        bounds=(-1 / size, 1 / size),
        method='highs',
    )
    # HiGHS is feasible to 1e-7.
    np.testing.assert_allclose(problem.optimum, -dual.fun, atol=1e-6)
    chex.assert_shape(problem.minimiser, shape)
    np.testing.assert_allclose(
        value(problem, problem.minimiser), problem.optimum, rtol=1e-12
    )

  def test_optimum_of_a_constant_is_at_the_median(self):
    y = np.array([3.0, -1.0, 100.0, 4.0, 3.5])
    w = l1_regression.minimise(np.ones((5, 1)), y)
    np.testing.assert_allclose(w, [3.5], atol=1e-8)

  def test_zero_is_a_subgradient_at_the_optimum(self):
    problem = l1_regression.make_problem(shape=(4, 3), num_samples=40)
    residual = problem.x @ problem.minimiser.ravel() - problem.y
    is_zero = np.abs(residual) < 1e-8  # A vertex interpolates 12 targets.
    self.assertEqual(is_zero.sum(), 12)
    # The multipliers of the interpolated rows that make the sum zero.
    rest = problem.x[~is_zero].T @ np.sign(residual[~is_zero])
    z = np.linalg.solve(problem.x[is_zero].T, -rest)
    self.assertLessEqual(np.abs(z).max(), 1 + 1e-9)

  def test_subgradients_never_exceed_the_lipschitz_constant(self):
    problem = l1_regression.make_problem(shape=(4, 3), num_samples=40)
    with jax.enable_x64(True):
      task = l1_regression.make_task(problem, batch_size=40)
      grad = jax.jit(
          jax.vmap(
              jax.grad(
                  lambda w: task.loss({'w': w}, task.data['train'], None)[0]
              )
          )
      )
      rng = np.random.default_rng(0)
      size = 10.0 ** rng.uniform(-3, 3, size=(3000, 1, 1))
      points = problem.minimiser + size * rng.normal(size=(3000, 4, 3))
      # Along the first right singular vector signs agree the most.
      top = np.linalg.svd(problem.x)[2][0].reshape(1, 4, 3)
      norms = np.linalg.norm(
          grad(jnp.asarray(np.concatenate([points, 1e3 * top]))), axis=(1, 2)
      )
    self.assertLessEqual(norms.max(), problem.lipschitz)
    self.assertGreater(norms.max(), 0.7 * problem.lipschitz)  # sqrt(2/pi).
    np.testing.assert_allclose(
        problem.lipschitz**2,
        np.linalg.eigvalsh(problem.x.T @ problem.x / 40)[-1],
    )

  def test_distance_is_from_zero(self):
    problem = l1_regression.make_problem(shape=(4, 3), num_samples=40)
    np.testing.assert_allclose(
        problem.distance, np.sqrt(np.sum(problem.minimiser**2))
    )
    with jax.enable_x64(True):
      start = l1_regression.make_task(problem, batch_size=1).init(
          jax.random.key(0)
      )
    np.testing.assert_array_equal(start['w'], np.zeros((4, 3)))

  @parameterized.parameters(0.0, 0.2, 1.0)
  def test_outliers_are_a_share_of_the_targets(self, share):
    problem = l1_regression.make_problem(
        shape=(2, 2), num_samples=500, outliers=share
    )
    clean = l1_regression.make_problem(
        shape=(2, 2), num_samples=500, outliers=0.0
    )
    np.testing.assert_array_equal(problem.x, clean.x)
    moved = problem.y != clean.y
    self.assertEqual(moved.sum(), 500 * share)
    if share == 0.2:
      self.assertGreater(np.std((problem.y - clean.y)[moved]), 5)
      # Robust: a fifth of errors of size 10 moves W* by less than the noise.
      self.assertLess(np.abs(problem.minimiser - clean.minimiser).max(), 0.1)

  def test_seeds_differ_and_the_cache_knows(self):
    first, second = (
        l1_regression.make_problem(shape=(2, 2), num_samples=9, seed=seed)
        for seed in (0, 1)
    )
    again = l1_regression.make_problem(shape=(2, 2), num_samples=9, seed=0)
    self.assertNotEqual(first.optimum, second.optimum)
    self.assertEqual(first.optimum, again.optimum)

  @parameterized.parameters(
      (dict(shape=(0, 3)), r'Expected shape .*shape=\(0, 3\)'),
      (dict(num_samples=0), 'Expected num_samples >= 1, got num_samples=0'),
      (dict(outliers=1.5), r'Expected outliers in \[0, 1\], got outliers=1.5'),
      (dict(outliers=-0.1), 'outliers=-0.1'),
  )
  def test_rejects(self, bad, message):
    with self.assertRaisesRegex(ValueError, message):
      l1_regression.make_problem(**{'shape': (2, 3), 'num_samples': 9} | bad)


class TaskTest(parameterized.TestCase):

  def test_loss_outputs_and_gap(self):
    problem = l1_regression.make_problem(shape=(3, 4), num_samples=30)
    with jax.enable_x64(True):
      task = l1_regression.make_task(problem, batch_size=7)
      w = np.random.default_rng(0).normal(size=(3, 4))
      params, data = {'w': jnp.asarray(w)}, task.data
      loss, metrics = task.loss(params, data['train'], None)
      np.testing.assert_allclose(loss, value(problem, w), rtol=1e-12)
      np.testing.assert_allclose(
          metrics['gap'], value(problem, w) - problem.optimum, rtol=1e-12
      )
      found = task_lib.evaluate(task, params, data, 'train')
      self.assertEqual(set(found), {'loss', 'gap'})
      self.assertEqual(found['loss'], loss)
      outputs = task.outputs(params, data['train'])
      chex.assert_shape(outputs, (30, 1))
      criterion = jnp.abs(outputs[:, 0] - data['train']['y'])
      np.testing.assert_allclose(jnp.mean(criterion), loss, rtol=1e-12)
      batch = task.batch(data, jax.random.key(0), jnp.int32(0))
      chex.assert_shape(batch['x'], (7, 12))
      best = {'w': jnp.asarray(problem.minimiser)}
      gap = task_lib.evaluate(task, best, data, 'train')['gap']
    self.assertLess(abs(gap), 1e-12)
    self.assertEqual(task.criterion, 'absolute')
    self.assertEqual(task.optimum, problem.optimum)
    self.assertEqual(task.lower_bound, problem.optimum)
    self.assertIsNone(task.smoothness)
    self.assertEqual((task.num_samples, task.batch_size), (30, 7))

  @parameterized.parameters(0, 31)
  def test_rejects_batches(self, size):
    problem = l1_regression.make_problem(shape=(3, 4), num_samples=30)
    with self.assertRaisesRegex(ValueError, rf'\[1, 30\].*batch_size={size}'):
      l1_regression.make_task(problem, batch_size=size)


class StudyTest(parameterized.TestCase):

  def test_descent_against_numpy(self):
    problem = l1_regression.make_problem(shape=(2, 3), num_samples=11)
    scales, num_steps = (0.05, 0.5), 25
    with jax.enable_x64(True):
      averages, values = nonsmooth.descend(
          problem,
          lambda key, scale: optax.scale(-scale),
          jnp.asarray(scales),
          jax.random.split(jax.random.key(0), 2),
          num_steps,
      )
    chex.assert_shape([averages, values], (2, 2, num_steps))
    for i, scale in enumerate(scales):
      path = [np.zeros(6)]
      for _ in range(num_steps - 1):
        signs = np.sign(problem.x @ path[-1] - problem.y)
        path.append(path[-1] - scale * problem.x.T @ signs / 11)
      for t in (0, 1, 7, num_steps - 1):
        expected = (value(problem, path[t]) - problem.optimum,)
        expected += (
            value(problem, np.mean(path[: t + 1], axis=0)) - problem.optimum,
        )
        for seed in range(2):
          np.testing.assert_allclose(
              (values[i, seed, t], averages[i, seed, t]), expected, atol=1e-12
          )

  @pytest.mark.slow
  def test_bounds_hold_and_undamped_signs_diverge(self):
    found = nonsmooth.gaps(
        shape=(4, 3), num_samples=40, rank=1, num_steps=1200, num_seeds=8
    )
    self.assertIsInstance(found, study.Study)
    rows = found.tables['T8 on l1 regression']
    # Three methods: two rules with gaussian sketches, three with coordinates.
    self.assertLen(rows, 15)
    for row in rows:
      with self.subTest(str(row)):
        self.assertEqual(row['held at all T'], 'yes')
        self.assertBetween(float(row['ratio']), 0, 1)
    lmins = {(r['method'], r['sketch']): float(r['lmin']) for r in rows}
    np.testing.assert_allclose(
        [
            lmins[name, 'gaussian']
            for name in ('RAC left', 'RAC right', 'Bernoulli p=0.5')
        ],
        [1 / 4, 1 / 3, 7 / 24],
        atol=1e-4,
    )
    kappas = {r['kappa'] for r in rows if r['sketch'] != 'gaussian'}
    np.testing.assert_allclose(
        list(kappas), 8, rtol=1e-6
    )  # Rank 1: no clipping.
    # Both rules of an isotropic sketch have R0 L0 / sqrt(lmin T), 1200 / 4.
    with jax.enable_x64(True):
      problem = l1_regression.make_problem(shape=(4, 3), num_samples=40)
    for row in rows:
      if row['sketch'] == 'gaussian' and row['method'] == 'RAC left':
        expected = problem.distance * problem.lipschitz / np.sqrt(300)
        np.testing.assert_allclose(float(row['bound']), expected, atol=1e-4)
    case = {
        (r['sketch'], r['step']): r
        for r in found.tables['Polyak without damping']
    }
    ends = {name: float(r['f(W_T-1) - f*']) for name, r in case.items()}
    start = float(case['weighted signs', 'Polyak / kappa']['f(W_0) - f*'])
    self.assertEqual(start, 2.5)  # 1 + 15 / 10.
    self.assertGreater(ends['weighted signs', 'Polyak, undamped'], 2 * start)
    self.assertLess(ends['weighted signs', 'Polyak / kappa'], 0.7 * start)
    self.assertLess(
        ends['weighted coordinate', 'Polyak, undamped'], 0.35 * start
    )
    for name, row in case.items():
      is_open = name == ('weighted signs', 'Polyak, undamped')
      self.assertEqual(row['held at all T'], '-' if is_open else 'yes')
    self.assertEqual(set(found.figures), {'gaps', 'undamped'})
    self.assertLen(found.figures['gaps'].axes, 6)
    self.assertStartsWith(found.notes[0], 'T8 held at all T in 14 of 14 cells')

  def test_held_means_within_two_standard_errors(self):
    values = np.array([[1.0, 2.0], [1.0, 4.0], [1.0, 3.0], [1.0, 3.0]])
    error = np.std(values[:, 1], ddof=1) / 2
    held = lambda a, b: nonsmooth.is_held(values, np.array([a, b]))
    self.assertTrue(held(1.0, 3 - 1.99 * error))
    self.assertFalse(held(1.0, 3 - 2.01 * error))
    self.assertFalse(held(1 - 1e-6, 5.0))  # At every T, not the last alone.

  def test_law_of_weighted_signs(self):
    sketch = nonsmooth.weighted_signs(8.0)
    keys = jax.random.split(jax.random.key(0), 20_000)
    q = np.asarray(
        jax.jit(lambda keys: sketch.bases(keys, 4, 1, jnp.float32))(keys),
        np.float64,
    )
    h = q @ q.swapaxes(1, 2)
    # A projection: the trace is one in each draw.
    np.testing.assert_allclose(np.trace(h, axis1=1, axis2=2), 1, rtol=1e-6)
    pi = np.array([8, 4, 2, 1]) / 15
    error = h.std(0, ddof=1) / np.sqrt(len(h))
    excess = np.abs(h.mean(0) - np.diag(pi)) - 5 * error
    self.assertLess(excess.max(), 1e-6)
    np.testing.assert_allclose(
        sketch.mean_eigenvalues(4, 1), (1 / 15, 8 / 15), atol=1e-8
    )
    with self.assertRaisesRegex(ValueError, 'Expected rank=1.*rank=2'):
      sketch.sample(keys[0], 4, 2)

  @parameterized.parameters(
      (dict(num_steps=1), 'Expected num_steps >= 2, got num_steps=1'),
      (dict(num_seeds=1), 'Expected num_seeds >= 2, got num_seeds=1'),
      (dict(prob=0.0), r'Expected prob in \(0, 1\), got prob=0.0'),
      (dict(prob=1.0), 'prob=1.0'),
      (dict(ratio=0.0), 'weights=0.0'),
      (dict(rank=0), 'rank=0'),
      (dict(shape=(4, 0)), 'shape'),
  )
  def test_rejects(self, bad, message):
    with self.assertRaisesRegex(ValueError, message):
      nonsmooth.gaps(**bad)


class ConfigTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  @parameterized.parameters('full', 'rac_left', 'rac_right', 'bernoulli')
  def test_stepsizes_are_the_best_of_t8(self, variant):
    config = runpy.run_path(str(_CONFIG))['get_config'](variant)
    c = config.task
    problem = l1_regression.make_problem(
        shape=(c.num_rows, c.dim // c.num_rows), num_samples=c.num_samples
    )
    name = config.method.name
    self.assertEqual(name, variant)
    lmin, lmax = (1.0, 1.0)
    if name != 'full':
      probs = {'rac_left': 1.0, 'rac_right': 0.0, 'bernoulli': 0.5}
      lmin, lmax = stepsizes.chain_eigenvalues(
          [problem.shape], rank=config.method.rank, prob=probs[name]
      )
    constants = {
        'distance': problem.distance,
        'lipschitz': problem.lipschitz,
        'lmin': lmin,
        'lmax': lmax,
    }
    steps = config.training.num_steps
    best = stepsizes.nonsmooth(**constants, num_steps=steps)
    np.testing.assert_allclose(config.method.learning_rate, best, rtol=5e-3)
    bound = bounds.nonsmooth(steps, **constants, stepsize=best)
    self.assertLess(bound, 0.4)  # As the header says.

  @parameterized.parameters('bernoulli', 'full')
  def test_smoke(self, variant):
    module = runpy.run_path(str(_CONFIG))
    config = module['get_config'](f'{variant},smoke')
    config.training.progress = False
    config.x64 = False
    summary = experiment.train(config, self.tmp)
    # From 2.0 in 20 steps; f* is 0.3, the steps those of a larger problem.
    task = arguments.make_task(config)
    start = task_lib.evaluate(task, task.init(None), task.data, 'train')['loss']
    self.assertLess(summary['train_loss'], start)
    np.testing.assert_allclose(
        summary['train_gap'],
        summary['train_loss'] - task.optimum,
        atol=1e-5,
    )
    self.assertEqual(task.init(None)['w'].shape, (3, 2))
    for overrides in module['sweep']():
      experiment.apply_overrides(config, overrides)
    with self.assertRaisesRegex(ValueError, "'nonsense'"):
      module['get_config']('nonsense')

  def test_weighted_sketch_by_name(self):
    config = runpy.run_path(str(_CONFIG))['get_config']('smoke')
    config.method.sketch = 'weighted_coordinate:4'
    sketch = arguments.make_sketch(config)
    np.testing.assert_allclose(
        sketch.mean_eigenvalues(3, 1), (1 / 7, 4 / 7), atol=1e-8
    )

  @parameterized.parameters(
      (16, None, (4, 4)),
      (15, 3, (3, 5)),
      (15, None, None),
      (15, 4, None),
      (15, 0, None),
      (15, 30, None),
  )
  def test_shape_of_the_matrix(self, dim, num_rows, shape):
    config = runpy.run_path(str(_CONFIG))['get_config']('smoke')
    config.task.dim = dim
    with config.ignore_type():
      config.task.num_rows = num_rows
    if shape is None:
      message = f'task.dim.*dim={dim}, num_rows={num_rows}|num_rows >= 1'
      with self.assertRaisesRegex(ValueError, message):
        arguments.make_task(config)
    else:
      task = arguments.make_task(config)
      self.assertEqual(task.init(None)['w'].shape, shape)
