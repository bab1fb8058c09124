"""Tests of LoRA in the linear regime (N1-N7) against closed forms."""

import functools
import math

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bernoulli_lora_jax import matrices
from bernoulli_lora_jax.studies import few_shot
from bernoulli_lora_jax.studies import ntk_generalisation
from bernoulli_lora_jax.studies import ntk_linearisation
from bernoulli_lora_jax.studies import ntk_ranks
from bernoulli_lora_jax.tasks import classification
from bernoulli_lora_jax.tasks import digits
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import lora
from bernoulli_lora_jax.theory import ntk
from bernoulli_lora_jax.theory import nuclear

HIDDEN = matrices.Matrices(select='Dense_1/kernel')
LAM = 0.1


class X64TestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))


def unit(i, j):
  return np.eye(2)[:, [i]] @ np.eye(2)[[j]]


def known():
  """Three samples whose optimum diag(1.7, 0.7) has rank two."""
  gradients = [unit(0, 0), unit(1, 1), 2 * (unit(0, 1) + unit(1, 0))]
  return ntk.from_gradients(
      {'w': np.stack(gradients)[:, None]}, np.array([[2.0], [1.0], [0.0]])
  )


def random_gradients(shapes, num_samples, num_outputs, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda shape: rng.normal(size=(num_samples, num_outputs, *shape))
  return {path: draw(shape) for path, shape in shapes.items()}


def random_problem(criterion, shapes=None, num_samples=4, num_outputs=3):
  shapes = {'a': (5, 6), 'b': (4, 3)} if shapes is None else shapes
  gradients = random_gradients(shapes, num_samples, num_outputs)
  rng = np.random.default_rng(1)
  start = rng.normal(size=(num_samples, num_outputs))
  targets = (
      rng.integers(0, num_outputs, num_samples)
      if criterion == 'cross_entropy'
      else rng.normal(size=(num_samples, num_outputs))
  )
  return ntk.from_gradients(
      gradients, targets, start=start, criterion=criterion
  )


def random_delta(problem, rank, seed=2, scale=1.0):
  rng = np.random.default_rng(seed)
  draw = lambda m, n: rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))
  return {
      path: jnp.asarray(scale * draw(*x.shape))
      for path, x in problem.zeros.items()
  }


@functools.cache
def small_digits():
  """Digits with 12 hidden units; the pre-trained weights take seconds."""
  return classification.make_task(
      'digits',
      digits.load(0),
      hidden=(12, 12),
      dropout=0.0,
      batch_size=32,
      pretraining=classification.Pretraining(3, 3e-3, 32, 0),
  )


def linearized(num_samples=10, selection=HIDDEN):
  task = small_digits()
  params = task.init(jax.random.key(0))
  batch = few_shot.few_shot(task, num_samples, 0)
  return task, params, batch, ntk.linearize(task, params, batch, selection)


class LossTest(X64TestCase):

  @parameterized.parameters('squared', 'cross_entropy')
  def test_conjugate_is_fenchels(self, criterion):
    """F + F* >= <theta, z>, with equality at theta = F'(z) only."""
    problem = random_problem(criterion)
    loss, y = problem.loss, problem.targets
    z = jnp.asarray(np.random.default_rng(3).normal(size=(4, 3)))
    theta = ntk.residual(problem, z)
    value = lambda z: loss.value(z, y) + loss.conjugate(theta, y)
    self.assertAlmostEqual(
        float(value(z)), float(jnp.vdot(theta, z)), delta=1e-13
    )
    other = z + jnp.asarray(np.random.default_rng(4).normal(size=(4, 3)))
    self.assertGreater(float(value(other)), float(jnp.vdot(theta, other)))

  def test_conjugate_of_cross_entropy_is_infinite_outside(self):
    problem = random_problem('cross_entropy')
    theta = ntk.residual(problem, problem.start)
    for wrong in (-theta, 1.5 * theta, theta + 1e-3):
      value = problem.loss.conjugate(wrong, problem.targets)
      self.assertEqual(float(value), math.inf)

  @parameterized.parameters(['cross_entropy'])
  @pytest.mark.slow
  def test_constants_bound_the_derivatives(self, criterion):
    self.check_constants_bound_the_derivatives(criterion)

  @parameterized.parameters(['squared'])
  @pytest.mark.slow
  def test_constants_bound_the_derivatives_otherwise(self, criterion):
    self.check_constants_bound_the_derivatives(criterion)

  def check_constants_bound_the_derivatives(self, criterion):
    problem = random_problem(criterion, num_samples=1, num_outputs=2)
    value = lambda z: problem.loss.value(z, problem.targets)
    grads, curvatures = [], []
    for scale in (0.0, 1.0, 3.0, 30.0):
      z = scale * jnp.array([[-1.0, 1.0]])
      for point in (z, -z):
        grads.append(float(jnp.linalg.norm(jax.grad(value)(point))))
        hessian = jax.hessian(value)(point).reshape(2, 2)
        curvatures.append(float(jnp.linalg.norm(hessian, ord=2)))
    # Both are attained, at z = 0 and far away.
    self.assertAlmostEqual(max(curvatures), problem.loss.curvature, delta=1e-9)
    if criterion == 'cross_entropy':
      self.assertAlmostEqual(max(grads), problem.loss.lipschitz, delta=1e-9)
    else:
      self.assertEqual(problem.loss.lipschitz, math.inf)


class LinearizeTest(X64TestCase):

  @pytest.mark.slow
  def test_operators_are_the_derivative_and_its_transpose(self):
    _, params, batch, problem = linearized(selection=None)
    self.assertEqual(
        set(problem.zeros), {f'Dense_{i}/kernel' for i in range(3)}
    )
    forward, transpose = ntk.operators(problem)
    delta = random_delta(problem, 2)
    theta = jnp.asarray(np.random.default_rng(5).normal(size=(10, 5)))
    image = forward(delta)
    np.testing.assert_allclose(
        jnp.vdot(theta, image),
        optax.tree.vdot(transpose(theta), delta),
        rtol=1e-12,
    )
    step = 1e-6  # Central differences are good to step^2.
    outputs = small_digits().outputs

    def moved(t):
      tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
      for path, change in delta.items():
        name = path.split('/')[0]
        tree[name]['kernel'] = tree[name]['kernel'] + t * change
      x = {**batch, 'x': jnp.asarray(batch['x'], jnp.float64)}
      return outputs(tree, x)

    np.testing.assert_allclose(problem.start, moved(0.0), atol=1e-12)
    difference = (moved(step) - moved(-step)) / (2 * step)
    np.testing.assert_allclose(image, difference, atol=1e-6)
    np.testing.assert_allclose(problem.model(delta), moved(1.0), atol=1e-12)

  def test_explicit_gradients_are_what_they_say(self):
    problem = random_problem('squared')
    gradients = random_gradients({'a': (5, 6), 'b': (4, 3)}, 4, 3)
    delta = random_delta(problem, 2)
    expected = sum(
        np.tensordot(gradients[path], delta[path], 2) for path in delta
    )
    forward, transpose = ntk.operators(problem)
    np.testing.assert_allclose(forward(delta), expected, rtol=1e-12)
    theta = np.random.default_rng(6).normal(size=(4, 3))
    for path, got in transpose(jnp.asarray(theta)).items():
      expected = np.tensordot(theta, gradients[path], 2)
      np.testing.assert_allclose(got, expected, rtol=1e-12)

  @pytest.mark.slow
  def test_draws_of_one_size_share_a_program(self):
    task, params, _, first = linearized()
    second = ntk.linearize(task, params, few_shot.few_shot(task, 10, 1), HIDDEN)
    self.assertEqual(jax.tree.structure(first), jax.tree.structure(second))

  def test_refuses_by_name(self):
    task, params, batch, _ = linearized()
    with self.assertRaisesRegex(ValueError, 'outputs.*criterion.*name=digits'):
      ntk.linearize(task._replace(outputs=None), params, batch)
    with self.assertRaisesRegex(ValueError, 'criterion=absolute'):
      ntk.linearize(task._replace(criterion='absolute'), params, batch)
    wrong = {**batch, 'y': batch['y'][:-1]}
    with self.assertRaisesRegex(ValueError, r'targets: \(10,\) integers'):
      ntk.linearize(task, params, wrong)
    wrong = {**batch, 'y': batch['y'] + 1}
    with self.assertRaisesRegex(ValueError, r'classes in \[0, 5\).*5'):
      ntk.linearize(task, params, wrong)
    stack = {'w': jnp.zeros((2, 3, 4))}
    spec = matrices.Matrices(rules=(matrices.stacked('w'),))
    with self.assertRaisesRegex(ValueError, r'no stacks.*path=w, batch=\(2,\)'):
      ntk.linearize(task, stack, batch, spec)
    ok = np.zeros((3, 1, 2, 2))
    with self.assertRaisesRegex(ValueError, 'one N and K'):
      ntk.from_gradients({'a': ok, 'b': ok[:2]}, np.zeros((3, 1)))
    with self.assertRaisesRegex(ValueError, r'targets of shape \(3, 1\)'):
      ntk.from_gradients({'a': ok}, np.zeros((2, 1)))
    with self.assertRaisesRegex(ValueError, 'start of shape'):
      ntk.from_gradients({'a': ok}, np.zeros((3, 1)), start=np.zeros((3, 2)))
    with self.assertRaisesRegex(ValueError, 'criterion=hinge'):
      ntk.from_gradients({'a': ok}, np.zeros((3, 1)), criterion='hinge')


class FullProblemTest(X64TestCase):

  @parameterized.parameters(
      (0.7, unit(1, 1), 0.751667, 6.67), (1.7, unit(0, 0), 0.351667, 3.33)
  )
  def test_certificate_rejects_spurious_minima(self, scale, matrix, value, top):
    delta = {'w': jnp.asarray(scale * matrix)}
    found = nuclear.certify(known(), LAM, delta)
    self.assertAlmostEqual(float(found.value), value, delta=1e-6)
    self.assertAlmostEqual(float(found.spectral_norm) / LAM, top, delta=0.01)
    # Stationary, so aligned: only the norm and the gap tell.
    self.assertAlmostEqual(float(found.misalignment), 0, delta=1e-14)
    # No bound may exceed the optimum 0.27.
    self.assertGreaterEqual(float(found.gap), value - 0.27)

  def test_solution_of_the_known_instance(self):
    found = nuclear.solve(known(), LAM, tolerance=1e-12)
    np.testing.assert_allclose(found.delta['w'], np.diag([1.7, 0.7]), atol=1e-9)
    self.assertAlmostEqual(float(found.certificate.value), 0.27, delta=1e-12)
    self.assertLess(float(found.certificate.gap), 1e-12)
    self.assertAlmostEqual(
        float(found.certificate.nuclear_norm), 2.4, delta=1e-9
    )
    self.assertLess(float(found.certificate.spectral_norm), LAM + 1e-9)
    self.assertLess(int(found.num_steps), 500)

  @parameterized.parameters('squared', 'cross_entropy')
  def test_gap_bounds_the_distance_at_any_point(self, criterion):
    problem = random_problem(criterion)
    lam = 0.1 * float(nuclear.largest_lam(problem))
    best = nuclear.solve(problem, lam, tolerance=1e-11)
    low = float(best.certificate.value - best.certificate.gap)
    for rank, scale in ((0, 1), (1, 0.1), (3, 0.3), (3, 10.0)):
      delta = random_delta(problem, rank, scale=scale)
      found = nuclear.certify(problem, lam, delta)
      self.assertLessEqual(float(found.bound), low + 2e-11)
      self.assertLess(float(found.gap), math.inf)
      np.testing.assert_allclose(found.value - found.bound, found.gap)
      norms = [np.linalg.svd(x, compute_uv=False).sum() for x in delta.values()]
      np.testing.assert_allclose(found.nuclear_norm, sum(norms), rtol=1e-9)

  @parameterized.parameters(['cross_entropy'])
  def test_zero_is_optimal_from_the_largest_lam_on(self, criterion):
    self.check_zero_is_optimal_from_the_largest_lam_on(criterion)

  @parameterized.parameters(['squared'])
  @pytest.mark.slow
  def test_zero_is_optimal_from_the_largest_lam_on_otherwise(self, criterion):
    self.check_zero_is_optimal_from_the_largest_lam_on(criterion)

  def check_zero_is_optimal_from_the_largest_lam_on(self, criterion):
    problem = random_problem(criterion)
    top = float(nuclear.largest_lam(problem))
    z = nuclear.certify(problem, top, problem.zeros)
    # Where the residual is feasible, the bound is tight.
    self.assertLess(abs(float(z.gap)), 1e-13)
    below = nuclear.solve(problem, 0.95 * top)
    self.assertGreater(float(below.certificate.nuclear_norm), 1e-4)
    above = nuclear.solve(problem, 1.01 * top)
    self.assertEqual(float(above.certificate.nuclear_norm), 0)

  @parameterized.parameters([3])
  def test_few_digits_to_a_gap_of_1e_10(self, sketch_rank):
    self.check_few_digits_to_a_gap_of_1e_10(sketch_rank)

  @parameterized.parameters([None])
  @pytest.mark.slow
  def test_few_digits_to_a_gap_of_1e_10_otherwise(self, sketch_rank):
    self.check_few_digits_to_a_gap_of_1e_10(sketch_rank)

  def check_few_digits_to_a_gap_of_1e_10(self, sketch_rank):
    problem = linearized()[-1]
    lam = 0.05 * float(nuclear.largest_lam(problem))
    found = nuclear.solve(problem, lam, sketch_rank=sketch_rank)
    certificate = found.certificate
    self.assertLess(float(certificate.gap), 1e-10)
    self.assertLess(float(certificate.spectral_norm), lam * (1 + 1e-4))
    self.assertLess(abs(float(certificate.misalignment)), 1e-6)
    # Restarts and Lanczos' step: without either thousands more.
    self.assertLess(int(found.num_steps), 3000)

  def test_many_matrices(self):
    problem = random_problem('cross_entropy')
    lam = 0.2 * float(nuclear.largest_lam(problem))
    found = nuclear.solve(problem, lam)
    self.assertLess(float(found.certificate.gap), 1e-10)
    # Started there, it is over at once.
    again = nuclear.solve(problem, lam, start=found.delta, tolerance=2e-10)
    self.assertEqual(int(again.num_steps), 0)

  @parameterized.parameters(((30, 20),))
  def test_sketched_threshold_is_exact(self, shape):
    self.check_sketched_threshold_is_exact(shape)

  @parameterized.parameters(((20, 30),))
  @pytest.mark.slow
  def test_sketched_threshold_is_exact_otherwise(self, shape):
    self.check_sketched_threshold_is_exact(shape)

  def check_sketched_threshold_is_exact(self, shape):
    rng = np.random.default_rng(7)
    u = np.linalg.qr(rng.normal(size=(shape[0], 20)))[0]
    v = np.linalg.qr(rng.normal(size=(shape[1], 20)))[0]
    steep = 10 * 0.05 ** np.arange(20.0)
    flat = np.linspace(1, 2, 20)
    for spectrum, threshold in ((steep, 0.3), (flat, 1.05)):
      x = jnp.asarray((u * spectrum) @ v.T)
      expected = (u * np.maximum(spectrum - threshold, 0)) @ v.T
      exact = nuclear.soft_threshold(x, threshold)
      np.testing.assert_allclose(exact, expected, atol=1e-13)
      got = nuclear.sketched_threshold(x, threshold, jax.random.key(0), 2)
      # The flat one has more above the threshold than the sketch: it falls back.
      np.testing.assert_allclose(got, expected, atol=1e-10)

  def test_refuses_by_name(self):
    problem = known()
    for lam in (0.0, -1.0, math.inf):
      message = f'lam > 0 and finite, got lam={lam}'
      with self.assertRaisesRegex(ValueError, message):
        nuclear.solve(problem, lam)
    for name, value in (
        ('tolerance', 0.0),
        ('max_steps', 0),
        ('check_every', 0),
        ('sketch_rank', 0),
    ):
      with self.assertRaisesRegex(ValueError, f'{name}={value}'):
        nuclear.solve(problem, LAM, **{name: value})
    with self.assertRaisesRegex(ValueError, 'delta of shapes'):
      nuclear.certify(problem, LAM, {'w': jnp.zeros((2, 3))})
    with self.assertRaisesRegex(ValueError, 'delta of shapes'):
      nuclear.reduce_rank(problem, {'v': jnp.zeros((2, 2))})


class ReduceRankTest(X64TestCase):

  @parameterized.parameters(
      ({'a': (9, 8)}, 2, 3), ({'a': (5, 6), 'b': (4, 3)}, 3, 2)
  )
  def test_outputs_stay_and_the_norm_does_not_grow(self, shapes, n, k):
    problem = random_problem('squared', shapes, n, k)
    delta = random_delta(problem, 9)
    found = nuclear.reduce_rank(problem, delta)
    ranks = found.ranks
    self.assertLessEqual(sum(r * (r + 1) // 2 for r in ranks.values()), n * k)
    for path, x in found.delta.items():
      s = np.linalg.svd(x, compute_uv=False)
      # What is dropped was zero up to rounding.
      self.assertEqual(int(np.sum(s > 1e-9 * s[0])), ranks[path])
    forward = ntk.operators(problem)[0]
    np.testing.assert_allclose(forward(found.delta), forward(delta), atol=1e-10)
    self.assertLessEqual(
        float(ntk.nuclear_norm(found.delta)),
        float(ntk.nuclear_norm(delta)) + 1e-10,
    )

  def test_a_minimiser_stays_one(self):
    # Gradients c I and diag(c): every PSD diagonal of one trace is a minimiser.
    gradients = np.eye(6)[None, None]
    problem = ntk.from_gradients({'w': gradients}, np.array([[3.0]]))
    delta = {'w': jnp.eye(6) * (3 - LAM) / 6}
    before = nuclear.certify(problem, LAM, delta)
    self.assertLess(abs(float(before.gap)), 1e-12)
    found = nuclear.reduce_rank(problem, delta)
    self.assertEqual(found.ranks, {'w': 1})
    after = nuclear.certify(problem, LAM, found.delta)
    self.assertLess(abs(float(after.gap)), 1e-10)


class LoraTest(X64TestCase):

  def test_objective_is_that_of_n2(self):
    problem = random_problem('squared')
    factors = lora.init_factors(problem, 2, jax.random.key(0))
    factors = jax.tree.map(lambda x: x + 0.3, factors)
    change = sum(
        np.tensordot(g, np.asarray(factors[p]['u'] @ factors[p]['v'].T), 2)
        for p, g in random_gradients({'a': (5, 6), 'b': (4, 3)}, 4, 3).items()
    )
    error = problem.start + change - problem.targets
    norm = sum(np.sum(x**2) for x in jax.tree.leaves(factors))
    expected = np.sum(error**2) / 8 + LAM / 2 * norm
    got = lora.make_objective(problem, LAM)(factors)
    np.testing.assert_allclose(got, expected, rtol=1e-12)

  @pytest.mark.slow
  def test_rank_one_has_a_spurious_minimum(self):
    problem = known()
    root = math.sqrt(0.7)
    factors = {
        'w': {'u': root * jnp.eye(2)[:, 1:], 'v': root * jnp.eye(2)[:, 1:]}
    }
    start = jax.tree.map(lambda x: x + 0.01, factors)
    run = lora.train_lora(problem, LAM, start, num_steps=100)
    self.assertAlmostEqual(float(run.values[-1]), 0.751667, delta=1e-6)
    np.testing.assert_allclose(
        lora.product(run.factors)['w'], 0.7 * unit(1, 1), atol=1e-6
    )
    low = lora.least_curvature(problem, LAM, factors, jax.random.key(0)).low
    # Strict: the one flat direction of rank one, u c and v / c, is curved by lam.
    self.assertGreater(float(low), 1e-2)
    # A further column finds the way out, of curvature lam - ||grad||.
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), factors)
    out = lora.escape(problem, LAM, wide, jax.random.key(0))
    self.assertAlmostEqual(float(out.curvature), LAM - 2 / 3, delta=1e-9)
    self.assertGreater(float(out.decrease), 0.1)
    run = lora.train_lora(problem, LAM, out.factors, num_steps=100)
    self.assertAlmostEqual(float(run.values[-1]), 0.27, delta=1e-10)

  @pytest.mark.slow
  def test_escape_from_zero(self):
    problem = random_problem('cross_entropy')
    top = float(nuclear.largest_lam(problem))
    zeros = jax.tree.map(
        jnp.zeros_like, lora.init_factors(problem, 1, jax.random.key(0))
    )
    out = lora.escape(problem, 0.3 * top, zeros, jax.random.key(1))
    self.assertAlmostEqual(float(out.curvature), -0.7 * top, delta=1e-9)
    f = lora.make_objective(problem, 0.3 * top)
    np.testing.assert_allclose(
        f(zeros) - f(out.factors), out.decrease, rtol=1e-12
    )
    self.assertGreater(float(out.decrease), 1e-3)
    # Beside the saddle it goes on downhill and does not turn back.
    found = lora.least_curvature(problem, 0.3 * top, zeros, jax.random.key(1))
    for side in (-0.01, 0.01):
      beside = jax.tree.map(lambda d, t=side: t * d, found.low_vector)
      out = lora.escape(problem, 0.3 * top, beside, jax.random.key(2))
      move = jax.tree.map(jnp.subtract, out.factors, beside)
      self.assertLess(float(optax.tree.vdot(jax.grad(f)(beside), move)), -1e-3)
    still = lora.escape(problem, 1.1 * top, zeros, jax.random.key(1))
    self.assertGreater(float(still.curvature), 0)

  @parameterized.parameters(['lbfgs'])
  @pytest.mark.slow
  def test_reaches_the_optimum_where_the_rank_allows(self, name):
    self.check_reaches_the_optimum_where_the_rank_allows(name)

  @parameterized.parameters(['adam'])
  @pytest.mark.slow
  def test_reaches_the_optimum_where_the_rank_allows_otherwise(self, name):
    self.check_reaches_the_optimum_where_the_rank_allows(name)

  def check_reaches_the_optimum_where_the_rank_allows(self, name):
    problem = random_problem('cross_entropy')  # KN = 12: r >= 5; sides 3 to 6.
    lam = 0.1 * float(nuclear.largest_lam(problem))
    best = nuclear.solve(problem, lam).certificate.value
    optimizer, steps = (
        ('lbfgs', 150) if name == 'lbfgs' else (optax.adam(0.02), 3000)
    )
    train = lambda key: lora.train_lora(
        problem,
        lam,
        lora.init_factors(problem, {'a': 5, 'b': 3}, key),
        optimizer,
        num_steps=steps,
    )
    runs = jax.vmap(train)(jax.random.split(jax.random.key(0), 2))
    self.assertEqual(runs.values.shape, (2, steps + 1))
    gaps = np.asarray(runs.values[:, -1] - best)
    # N1's value is itself known to 1e-10.
    np.testing.assert_array_less(
        np.abs(gaps), 1e-6 if name == 'adam' else 2e-10
    )
    delta = lora.product(jax.tree.map(lambda x: x[0], runs.factors))
    found = nuclear.certify(problem, lam, delta)
    self.assertLess(float(found.spectral_norm), lam * (1 + 1e-2))
    self.assertLess(float(found.gap), 1e-3)

  def test_padded_columns_stay_zero(self):
    problem = random_problem('squared')
    key = jax.random.key(0)
    train = lambda **width: lora.train_lora(
        problem,
        LAM,
        lora.init_factors(problem, 2, key, **width),
        optax.adam(0.1),
        num_steps=20,
    )
    narrow, wide = train(), train(width=4)
    np.testing.assert_allclose(narrow.values, wide.values, rtol=1e-12)
    for pair in wide.factors.values():
      np.testing.assert_array_equal(pair['u'][:, 2:], 0)
      np.testing.assert_array_equal(pair['v'][:, 2:], 0)
      self.assertGreater(float(jnp.abs(pair['v'][:, :2]).min()), 0)

  def test_network_itself(self):
    problem = linearized()[-1]
    factors = lora.init_factors(problem, 2, jax.random.key(0))
    factors = jax.tree.map(lambda x: x + 0.3, factors)
    real = lora.make_objective(problem, LAM, is_linear=False)(factors)
    outputs = problem.model(lora.product(factors))
    expected = problem.loss.value(outputs, problem.targets)
    norm = optax.tree.norm(factors, squared=True)
    np.testing.assert_allclose(real, expected + LAM / 2 * norm, rtol=1e-12)
    linear = lora.make_objective(problem, LAM)(factors)
    self.assertGreater(abs(float(linear - real)), 1e-3)

  def test_init_has_its_law(self):
    shapes = {'a': (400, 300)}
    zeros = {'a': jnp.zeros(shapes['a'])}
    problem = known()._replace(zeros=zeros)
    factors = lora.init_factors(problem, 250, jax.random.key(0))['a']
    # 10^5 normal entries: the variance is known to sqrt(2 / 10^5) of itself.
    ratio = float(jnp.var(factors['u'])) * 400
    self.assertLess(abs(ratio - 1), 5 * math.sqrt(2e-5))
    np.testing.assert_array_equal(factors['v'], 0)

  def test_refuses_by_name(self):
    problem, key = known(), jax.random.key(0)
    for rank in (0, 3):
      with self.assertRaisesRegex(
          ValueError, rf'\[1, 2\].*of w, got rank={rank}'
      ):
        lora.init_factors(problem, rank, key)
    with self.assertRaisesRegex(ValueError, 'width=1, rank=2'):
      lora.init_factors(problem, 2, key, width=1)
    factors = lora.init_factors(problem, 1, key)
    train = lambda **kwargs: lora.train_lora(
        problem,
        **{'lam': LAM, 'factors': factors, 'num_steps': 1, **kwargs},
    )
    with self.assertRaisesRegex(ValueError, 'lam=0.0'):
      train(lam=0.0)
    with self.assertRaisesRegex(ValueError, 'num_steps=0'):
      train(num_steps=0)
    with self.assertRaisesRegex(ValueError, "'lbfgs'.*optimizer=adam"):
      train(optimizer='adam')
    wrong = {'w': {'u': jnp.zeros((3, 1)), 'v': jnp.zeros((2, 1))}}
    with self.assertRaisesRegex(ValueError, r"factors\['w'\] of shapes"):
      train(factors=wrong)


class ThresholdsTest(X64TestCase):

  def test_definitions(self):
    for k, n in ((1, 1), (1, 3), (2, 32), (3, 5), (5, 32), (2, 28)):
      for criterion, equations in (
          ('squared', k * n),
          ('cross_entropy', (k - 1) * n),
      ):
        if k == 1 and criterion == 'cross_entropy':
          continue
        found = ntk.rank_thresholds(k, n, criterion)
        fits = [r for r in range(99) if r * (r + 1) / 2 <= equations]
        above = [r for r in range(99) if r * (r + 1) / 2 > equations]
        self.assertEqual(found, (equations, max(fits), min(above)))

  def test_the_papers_case(self):
    self.assertEqual(ntk.rank_thresholds(2, 32).no_spurious, 11)
    found = ntk.rank_thresholds(2, 32, 'cross_entropy')
    self.assertEqual(found.no_spurious, 8)

  def test_refuses_by_name(self):
    with self.assertRaisesRegex(ValueError, 'num_outputs >= 2.*num_outputs=1'):
      ntk.rank_thresholds(1, 5, 'cross_entropy')
    with self.assertRaisesRegex(ValueError, 'num_samples=0'):
      ntk.rank_thresholds(1, 0)
    with self.assertRaisesRegex(ValueError, 'criterion=absolute'):
      ntk.rank_thresholds(1, 5, 'absolute')


class RiskTest(X64TestCase):

  def test_rademacher_is_the_mean_over_all_signs(self):
    shapes = {'a': (3, 2), 'b': (2, 2)}
    problem = random_problem('squared', shapes, 3, 2)
    gradients = random_gradients(shapes, 3, 2)
    norms = []
    for bits in range(2**6):
      signs = 1 - 2.0 * np.array([bits >> i & 1 for i in range(6)]).reshape(
          3, 2
      )
      norms.append(
          max(
              np.linalg.norm(np.tensordot(signs, g, 2) / 3, 2)
              for g in gradients.values()
          )
      )
    draws = 2000
    found = ntk.rademacher(problem, jax.random.key(0), num_draws=draws)
    error = np.std(norms) / math.sqrt(draws)
    self.assertLess(abs(float(found.mean) - np.mean(norms)), 5 * error)
    # A standard deviation of 2000 draws is known to a few percent.
    self.assertLess(abs(float(found.standard_error) / error - 1), 0.15)
    rows = ntk.gradient_norms(problem)
    expected = np.sqrt(
        sum(np.sum(g**2, axis=(2, 3)) for g in gradients.values())
    )
    np.testing.assert_allclose(rows, expected, rtol=1e-12)
    radius = math.sqrt(float(jnp.max(jnp.sum(rows**2, 1))))
    self.assertLess(float(found.mean), radius * math.sqrt(2 / 3))

  @parameterized.parameters((1, 2.0), (5, 2 * math.sqrt(2)))
  def test_bound_has_the_constants_of_n7(self, num_outputs, factor):
    got = ntk.risk_bound(
        0.3,
        radius=2.0,
        num_samples=50,
        num_outputs=num_outputs,
        lipschitz=1.5,
        loss_range=4.0,
        eta=0.1,
    )
    tail = 3 * 4.0 * math.sqrt(math.log(20) / 100)
    self.assertAlmostEqual(got, factor * 1.5 * 2 * 0.3 + tail, delta=1e-12)

  def test_refuses_by_name(self):
    good = dict(
        average=1.0,
        radius=1.0,
        num_samples=2,
        num_outputs=2,
        lipschitz=1.0,
        loss_range=1.0,
        eta=0.1,
    )
    for name, value in (
        ('average', -1.0),
        ('radius', 0.0),
        ('num_samples', 0),
        ('num_outputs', 0),
        ('lipschitz', math.inf),
        ('loss_range', -1.0),
        ('eta', 1.0),
    ):
      with self.assertRaisesRegex(ValueError, f'{name}={value}'):
        ntk.risk_bound(**{**good, name: value})
    with self.assertRaisesRegex(ValueError, 'num_draws=1'):
      ntk.rademacher(known(), jax.random.key(0), num_draws=1)


class BorderTest(parameterized.TestCase):

  def test_from_gradients(self):
    whole = ntk.from_gradients(
        {'w': np.ones((2, 1, 3, 3), int)}, np.ones((2, 1))
    )
    self.assertTrue(jnp.issubdtype(whole.zeros['w'].dtype, jnp.floating))
    self.assertGreater(nuclear.solve(whole, 0.1).certificate.nuclear_norm, 0)
    for bad in (np.full((2, 1, 3, 3), np.nan), np.ones((0, 1, 3, 3))):
      with self.assertRaisesRegex(ValueError, 'finite, of one sample or more'):
        ntk.from_gradients({'w': bad}, np.ones((len(bad), 1)))

  @parameterized.parameters(-1e-3, 1.0, math.nan)
  def test_reduce_rank(self, tolerance):
    delta = {'w': jnp.eye(2)}
    with self.assertRaisesRegex(ValueError, f'tolerance={tolerance}'):
      nuclear.reduce_rank(known(), delta, tolerance=tolerance)

  def test_few_steps_are_few(self):
    found = nuclear.solve(known(), 0.1, max_steps=3, tolerance=1e-30)
    self.assertEqual(found.num_steps, 3)

  @parameterized.parameters(
      ({'x': 1}, r"rank of each of \['w'\], got rank=.*'x'"),
      (1.5, 'a whole rank in .*got rank=1.5'),
  )
  def test_init_factors(self, rank, message):
    with self.assertRaisesRegex(ValueError, message):
      lora.init_factors(known(), rank, jax.random.key(0))

  def test_factors_of_another_matrix(self):
    factors = lora.init_factors(known(), 1, jax.random.key(0))
    factors['more'] = factors['w']
    with self.assertRaisesRegex(
        ValueError, r"factors of \['w'\], got .*'more'"
    ):
      lora.train_lora(known(), 0.1, factors, num_steps=1)


class StudiesTest(parameterized.TestCase):

  def test_few_shot_is_balanced_and_distinct(self):
    task = small_digits()
    batch = few_shot.few_shot(task, 32, 3)
    counts = np.bincount(batch['y'])
    self.assertEqual(counts.max() - counts.min(), 1)
    self.assertLen(set(np.asarray(batch['index']).tolist()), 32)
    again = few_shot.few_shot(task, 32, 4)
    self.assertFalse(np.array_equal(batch['index'], again['index']))
    with self.assertRaisesRegex(ValueError, r'\[1, 549\].*num_samples=550'):
      few_shot.few_shot(task, 550, 0)
    plain = task_lib.Batch(y=jnp.zeros(3), index=jnp.arange(3))
    with self.assertRaisesRegex(ValueError, 'are classes'):
      few_shot.few_shot(task._replace(data={'train': plain}), 2, 0)

  @pytest.mark.slow
  def test_ranks(self):
    found = ntk_ranks.ranks(
        small_digits(),
        num_samples=8,
        ranks=(1, 9),
        num_seeds=2,
        relative_lam=0.1,
        optimizer=optax.sgd(0.02, 0.9),
        num_steps=200,
        polish_steps=100,
        progress=False,
    )
    low, high = found.tables['ranks']
    self.assertEqual(low['certified'], '0 of 2')
    self.assertEqual(high['certified'], '2 of 2')
    # r (r + 1) / 2 = 45 > KN = 40 > (K - 1) N = 32.
    self.assertEqual(high['guarantee'], 'no spurious minima')
    self.assertEqual(low['guarantee'], 'none')
    # Relative gaps never fall below rounding, and rank one stays above.
    self.assertGreater(low['median'], 1e-3)
    self.assertLess(abs(high['largest']), 1e-8)
    self.assertEqual(set(found.figures), {'loss', 'thresholds'})
    notes = ' '.join(found.notes)
    self.assertIn('ranks 8 / 9 by KN = 40, 7 / 8 by (K-1)N = 32.', notes)
    self.assertIn('after L-BFGS, at ranks [9].', notes)
    self.assertIn('Rank 1: 2 of 2 starts miss it', notes)

  @pytest.mark.slow
  def test_spurious_minima_are_told(self):
    """The known instance at rank one: 0.351667 and 0.751667 against 0.27."""
    self.enterContext(jax.enable_x64(True))
    problem = known()
    few = few_shot.Few(problem, 0.1, nuclear.solve(problem, 0.1), 2)
    runs = ntk_ranks._run_ranks(few, (1, 2), 8, None, 300, 100, 0, lambda: None)
    ends = np.sort(runs[0].polished)
    np.testing.assert_allclose(
        ends[[0, -1]], [0.351667 - 0.27, 0.751667 - 0.27], atol=1e-6
    )
    np.testing.assert_allclose(runs[1].polished, 0, atol=1e-10)
    notes = ntk_ranks._rank_notes(few, runs)
    self.assertIn('ranks 2 / 3 by KN = 3.', notes[1])
    self.assertIn('at ranks [2].', notes[2])
    self.assertIn(
        'Rank 1: 8 of 8 starts miss it, at relative gaps 0.302 to 1.78, all'
        ' stationary',
        notes[3],
    )
    self.assertIn('spurious minima, as other starts end lower', notes[3])
    # Whoever ends alike may have found the best of the rank.
    alike = runs[0]._replace(polished=runs[0].polished * 0 + 0.08)
    self.assertIn('alike', ntk_ranks._other_note(few, alike))
    steep = runs[0]._replace(slope=runs[0].slope * 0 + 1e-3)
    self.assertIn('unfinished', ntk_ranks._other_note(few, steep))
    curved = runs[0]._replace(curvature=runs[0].curvature * 0 - 0.01)
    self.assertIn('unfinished', ntk_ranks._other_note(few, curved))

  def test_a_trend_is_claimed_where_it_is_seen(self):
    problem = known()
    few = few_shot.Few(problem, 0.1, nuclear.solve(problem, 0.1), 2)

    def note(steps):
      runs = []
      for rank, row in steps.items():
        gaps = np.ones((len(row), 100))
        for gap, step in zip(gaps, row, strict=True):
          gap[step:] = 0
        runs.append(ntk_ranks._Run(rank, gaps, *[None] * 4))
      return ntk_ranks._speed_notes(few, runs)[0]

    falling = {r: [80 - 9 * r + i for i in range(3)] for r in range(1, 6)}
    self.assertIn('smaller ranks were slower', note(falling))
    self.assertIn('rank 1: 72, ', note(falling))
    rising = {r: [9 * r + i for i in range(3)] for r in range(1, 6)}
    self.assertIn('smaller ranks were faster', note(rising))
    noisy = {1: [30, 50, 40], 2: [60, 20, 41], 3: [25, 45, 38]}
    self.assertIn('no trend is seen', note(noisy))

  @parameterized.parameters((1, 0.5), (2, 0.1))
  def test_default_optimizer_moves(self, rank, lam):
    """Also where the optimum is no half of the start."""
    problem = known()
    keys = jax.random.split(jax.random.key(0), 3)
    starts = jax.vmap(lambda key: lora.init_factors(problem, rank, key))(keys)
    tx = ntk_ranks._default_optimizer(problem, lam, starts)
    factors = jax.tree.map(lambda x: x[0], starts)
    values = lora.train_lora(problem, lam, factors, tx, num_steps=100).values
    self.assertLess(values[-1], 0.95 * values[0])
    self.assertLess(abs(values[-1] - values[-20]), 0.02 * values[0])

  @pytest.mark.slow
  def test_linearisation(self):
    found = ntk_linearisation.linearisation(
        small_digits(),
        num_samples=8,
        ranks=(2,),
        num_seeds=2,
        relative_lam=0.1,
        num_steps=30,
        progress=False,
    )
    (row,) = found.tables['linearisation']
    self.assertGreater(row['relative error, end'], 1e-3)
    self.assertLess(row['relative error, end'], 2)
    self.assertGreater(row['norm of delta, end'], 0)
    self.assertEqual(set(found.figures), {'linearisation'})

  @pytest.mark.slow
  def test_generalisation(self):
    found = ntk_generalisation.generalisation(
        small_digits(),
        sizes=(8, 16),
        relative_lams=(0.3,),
        num_draws=2,
        num_signs=5,
        reference_size=32,
        tolerance=1e-3,
        progress=False,
    )
    rows = found.appendix['generalisation in full']
    self.assertLen(found.tables['generalisation'], 2)
    self.assertLen(rows, 2)
    for row in rows:
      self.assertGreater(row['bound'], row['rademacher term'])
      self.assertGreater(row['bound'], row['gap'])
      np.testing.assert_allclose(
          row['gap'], row['test loss'] - row['train loss'], rtol=1e-9
      )
    self.assertEqual(set(found.figures), {'generalisation'})

  def test_refuses_by_name(self):
    task = small_digits()
    with self.assertRaisesRegex(ValueError, 'relative_lam=1.0'):
      ntk_ranks.ranks(task, relative_lam=1.0)
    with self.assertRaisesRegex(ValueError, 'num_steps=0'):
      ntk_linearisation.linearisation(task, num_steps=0)
    with self.assertRaisesRegex(ValueError, 'ranks to rise'):
      ntk_ranks.ranks(task, ranks=())
    with self.assertRaisesRegex(ValueError, 'sizes to rise'):
      ntk_generalisation.generalisation(task, sizes=())
    for name in ('num_draws', 'num_signs'):
      with self.assertRaisesRegex(ValueError, f'{name} >= 2, got {name}=1'):
        ntk_generalisation.generalisation(task, **{name: 1})
    data = {'train': task.data['train']}
    with self.assertRaisesRegex(ValueError, r"splits=\['train'\]"):
      ntk_generalisation.generalisation(task._replace(data=data))
