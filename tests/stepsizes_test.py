"""Tests of the stepsizes of T1-T8 against numbers worked out by hand."""

import math

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import stepsizes

PAGE = dict(
    smoothness=2.0, mean_smoothness=3.0, lmax=0.5, prob=0.2, batch_size=4
)
MVR = dict(smoothness=2.0, mean_smoothness=3.0, lmax=0.5, momentum=0.9)
SGD = dict(smoothness=2.0, lmin=0.1, lmax=0.4)
# Two clients: Lmax = 8, Lt^2 = (16 + 64)/2 = 40.
QGD = dict(
    smoothness=2.0,
    client_smoothness=(4.0, 8.0),
    omega=3.0,
    lmin=0.1,
    lmax=0.4,
    num_steps=10_000,
)
MARINA = dict(
    smoothness=2.0,
    client_smoothness=(4.0, 8.0),
    omega=3.0,
    prob=0.2,
    lmax=0.5,
)
EF21 = dict(smoothness=2.0, client_smoothness=(4.0, 8.0), beta=0.75, lmax=0.5)
NONSMOOTH = dict(
    distance=3.0, lipschitz=2.0, lmin=0.25, lmax=0.25, num_steps=100
)
FUNCTIONS = {
    'gd': (stepsizes.gd, dict(smoothness=2.0)),
    'sgd': (stepsizes.sgd, SGD),
    'page': (stepsizes.page, PAGE),
    'mvr': (stepsizes.mvr, MVR),
    'qgd': (stepsizes.qgd, QGD),
    'marina': (stepsizes.marina, MARINA),
    'ef21': (stepsizes.ef21, EF21),
    'nonsmooth': (stepsizes.nonsmooth, NONSMOOTH),
    'polyak_damping': (stepsizes.polyak_damping, dict(lmin=0.1, lmax=0.4)),
    'chain_eigenvalues': (
        lambda **kwargs: stepsizes.chain_eigenvalues(**kwargs)[0],
        dict(shapes=[(4, 8)], rank=2, prob=0.5),
    ),
}


class ClosedFormTest(parameterized.TestCase):
  """Numbers are exact but for the last places of float64: 12 places."""

  def assert_close(self, value, expected):
    self.assertAlmostEqual(value / expected, 1.0, places=12)

  @parameterized.parameters(
      ([(4, 8)], 2, 0.5, 0.375, 0.375),  # (2/4 + 2/8) / 2.
      ([(4, 8)], 2, 1.0, 0.5, 0.5),  # P(left): the side of length 4.
      ([(4, 8)], 2, 0.0, 0.25, 0.25),
      ([(4, 8)], 6, 0.5, 0.875, 0.875),  # Clipped on the left.
      ([(4, 8), (16, 16)], 2, 0.5, 0.125, 0.375),
      ([(4, 8)], 100, 0.3, 1.0, 1.0),
  )
  def test_chain_eigenvalues(self, shapes, rank, prob, lmin, lmax):
    values = stepsizes.chain_eigenvalues(shapes, rank=rank, prob=prob)
    np.testing.assert_allclose(values, (lmin, lmax), rtol=1e-12)
    values = stepsizes.chain_eigenvalues(
        shapes, rank=rank, prob=prob, all_trained=False
    )
    np.testing.assert_allclose(values, (lmin, 1.0), rtol=1e-12)

  def test_gd(self):
    self.assertEqual(stepsizes.gd(smoothness=20.0), 0.05)

  @parameterized.parameters(
      (dict(), 0.1 / (2 * 0.4)),
      (dict(growth=5.0), 0.1 / (2 * 5 * 0.4)),
      # 1 / (L (1 + (B - 1) kappa)), kappa = 4.
      (dict(growth=5.0, bounded_variance=True), 1 / (2 * 17)),
      (dict(bounded_variance=True), 1 / 2),
      # 1 / sqrt(L lmax A T) = 1 / sqrt(2 * 0.4 * 5 * 10^4) = 1 / 200.
      (dict(slope=5.0, num_steps=10_000), 1 / 200),
      (dict(slope=5.0, num_steps=1), 0.125),  # The first condition binds.
      # mu lmin / (2 L A lmax) = 0.03 * 0.1 / (2 * 2 * 5 * 0.4).
      (dict(slope=5.0, pl=0.03), 0.000375),
      (dict(slope=0.0, pl=0.03), 0.125),
      (dict(slope=5.0, pl=0.03, num_steps=10_000), 0.000375),
  )
  def test_sgd(self, kwargs, expected):
    self.assert_close(stepsizes.sgd(**SGD, **kwargs), expected)

  @parameterized.parameters(
      # 1 / (2 + 3 sqrt(0.5 * 0.8 / (0.2 * 4))) = 1 / (2 + 3 sqrt(0.5)).
      (dict(), 1 / (2 + 3 * math.sqrt(0.5))),
      # Without replacement 1 / b' becomes (N - b') / (b' (N - 1)).
      (
          dict(num_samples=13),
          1 / (2 + 3 * math.sqrt(0.5 * 0.8 * 9 / (0.2 * 4 * 12))),
      ),
      (dict(num_samples=4), 0.5),  # The minibatch is everything.
      (dict(num_samples=1, batch_size=1), 1 / (2 + 3 * math.sqrt(2.0))),
      (dict(prob=1.0), 0.5),
      (dict(mean_smoothness=0.0), 0.5),
      # PL: the root of 1.0, and q / (2 mu lmin) = 0.2 / (2 * 0.5 * 0.25).
      (dict(pl=0.5, lmin=0.25), 1 / 5),
      (dict(pl=50.0, lmin=0.25), 0.2 / 25),
      (
          dict(pl=0.5, lmin=0.25, num_samples=13),
          1 / (2 + 3 * math.sqrt(0.75)),
      ),
  )
  def test_page(self, kwargs, expected):
    self.assert_close(stepsizes.page(**{**PAGE, **kwargs}), expected)

  @parameterized.parameters(
      # b = 0.1: 1 / (2 + 3 sqrt(2 * 0.5 * 0.81 / 0.19)).
      (dict(), 1 / (2 + 3 * math.sqrt(0.81 / 0.19))),
      # b = 0.5: 2 * 0.5 * 0.25 / 0.75.
      (dict(momentum=0.5), 1 / (2 + 3 * math.sqrt(1 / 3))),
      (dict(momentum=0.0), 0.5),
      (dict(mean_smoothness=0.0), 0.5),
      # PL: 4 in place of 2, and b (2 - b) / (2 mu lmin) = 0.19 / (0.5 mu).
      (dict(pl=0.1, lmin=0.25), 1 / (2 + 3 * math.sqrt(2 * 0.81 / 0.19))),
      (dict(pl=10.0, lmin=0.25), 0.19 / 5),
  )
  def test_mvr(self, kwargs, expected):
    self.assert_close(stepsizes.mvr(**{**MVR, **kwargs}), expected)

  @parameterized.parameters(
      # A = omega Lmax/M = 12: 1/sqrt(L A lmax T) = 1/sqrt(2 * 12 * 0.4 * 10^4).
      (dict(), 1 / math.sqrt(96_000)),
      (dict(num_steps=1), 1 / math.sqrt(9.6)),
      # 1/L binds.
      (dict(num_steps=1, omega=0.5), 0.5),
      (dict(omega=0.0), 0.5),
      (dict(omega=0.0, pl=1e-9), 0.5),
      # max w_l L_l = 1/4 * 8 and 3/4 * 4, 0 and 4.
      (dict(weights=(3, 1)), 1 / math.sqrt(2 * 9 * 0.4 * 10_000)),
      (dict(weights=(2.0, 0.0)), 1 / math.sqrt(96_000)),
      (dict(weights=(0.0, 5.0)), 1 / math.sqrt(2 * 24 * 0.4 * 10_000)),
      # PL: mu lmin / (2 L A lmax) = 0.1 mu / 19.2.
      (dict(pl=0.3), 0.03 / 19.2),
      # T does not matter then.
      (dict(pl=10.0), 1 / 19.2),
      (dict(pl=10.0, num_steps=1), 1 / 19.2),
      (dict(pl=1000.0), 0.5),
      # kappa does not enter without PL: B = 1.
      (dict(lmin=0.4), 1 / math.sqrt(96_000)),
  )
  def test_qgd(self, kwargs, expected):
    self.assert_close(stepsizes.qgd(**{**QGD, **kwargs}), expected)

  @parameterized.parameters(
      # Lt^2/M = 20: 1/(2 + sqrt(0.5 * 0.8 * 3 * 20 / 0.2)).
      (dict(), 1 / (2 + math.sqrt(120))),
      (dict(prob=1.0), 0.5),
      (dict(omega=0.0), 0.5),
      # sum w_l^2 L_l^2 = (3/4)^2 16 + (1/4)^2 64 = 13; 16; 64.
      (dict(weights=(3, 1)), 1 / (2 + math.sqrt(6 * 13))),
      (dict(weights=(2.0, 0.0)), 1 / (2 + math.sqrt(6 * 16))),
      (dict(weights=(0, 1)), 1 / (2 + math.sqrt(6 * 64))),
      (dict(client_smoothness=(5.0,)), 1 / (2 + math.sqrt(150))),
      # PL: 2 inside the root, and q/(2 mu lmin) = 0.2/(0.5 mu).
      (dict(pl=0.01, lmin=0.25), 1 / (2 + math.sqrt(240))),
      (dict(pl=50.0, lmin=0.25), 0.2 / 25),
      (dict(pl=0.01, lmin=0.25, weights=(3, 1)), 1 / (2 + math.sqrt(12 * 13))),
      # Two opposed clients: L = 1, Lt = sqrt 401, 4 x 3, RandK with K = 1.
      (
          dict(
              smoothness=1.0,
              client_smoothness=(21.0, 19.0),
              omega=11.0,
              lmax=7 / 24,
          ),
          1 / (1 + math.sqrt(401) * math.sqrt(7 / 24 * 0.8 * 11 / (0.2 * 2))),
      ),
  )
  def test_marina(self, kwargs, expected):
    self.assert_close(stepsizes.marina(**{**MARINA, **kwargs}), expected)

  @parameterized.parameters(
      # theta = 1 - sqrt(0.25) = 1/2, beta' = 0.25/theta = 1/2, Lt^2 = 40:
      # 1/(2 + sqrt(40 * 0.5 * 0.5/0.5)).
      (dict(), 1 / (2 + math.sqrt(20))),
      (dict(beta=1.0), 0.5),
      # theta = 1 - 0.8, beta' = 0.64/0.2.
      (dict(beta=0.36), 1 / (2 + math.sqrt(40 * 0.5 * 16))),
      # sum w_l L_l^2 = (3/4) 16 + (1/4) 64 = 28.
      (dict(weights=(3, 1)), 1 / (2 + math.sqrt(14))),
      (dict(weights=(0.0, 2.0)), 1 / (2 + math.sqrt(32))),
      # PL: 2 inside the root, and theta/(2 mu lmin) = 1/mu.
      (dict(pl=0.01, lmin=0.25), 1 / (2 + math.sqrt(40))),
      (dict(pl=50.0, lmin=0.25), 1 / 50),
      (dict(beta=0.36, pl=50.0, lmin=0.25), 0.2 / 25),
      (dict(pl=0.01, lmin=0.25, weights=(3, 1)), 1 / (2 + math.sqrt(28))),
  )
  def test_ef21(self, kwargs, expected):
    self.assert_close(stepsizes.ef21(**{**EF21, **kwargs}), expected)

  def test_ef21_of_a_tiny_beta(self):
    # 1 - sqrt(1 - beta) = beta/2 + ...: no cancellation. Here theta is 5e-13
    # and the root sqrt(lmax Lt^2)/theta.
    gamma = stepsizes.ef21(**{**EF21, 'beta': 1e-12})
    self.assertAlmostEqual(gamma * math.sqrt(20) / 5e-13, 1.0, places=10)

  @parameterized.parameters('qgd', 'marina', 'ef21')
  def test_equal_weights_are_the_default(self, name):
    function, kwargs = FUNCTIONS[name]
    self.assert_close(function(**kwargs, weights=(7, 7)), function(**kwargs))
    arrays = {'client_smoothness': np.array([4.0, 8.0]), 'weights': np.ones(2)}
    self.assert_close(function(**{**kwargs, **arrays}), function(**kwargs))

  @parameterized.parameters(
      (dict(), 3 / (2 * math.sqrt(25))),  # R0 / (L0 sqrt(alpha T)).
      (dict(lmax=1.0), 3 / (2 * 10)),
      (dict(lmax=1.0, lmin=1.0, num_steps=1), 1.5),
  )
  def test_nonsmooth(self, kwargs, expected):
    self.assert_close(stepsizes.nonsmooth(**{**NONSMOOTH, **kwargs}), expected)

  def test_nonsmooth_minimises_the_bound(self):
    r, l0, lmin, lmax, t = 3.0, 2.0, 0.1, 0.4, 50
    bound = lambda gamma: (
        r**2 / (2 * gamma * lmin * t) + gamma * l0**2 * (lmax / lmin) / 2
    )
    best = stepsizes.nonsmooth(
        distance=r, lipschitz=l0, lmin=lmin, lmax=lmax, num_steps=t
    )
    grid = best * np.geomspace(0.5, 2, 101)
    self.assertEqual(np.argmin(bound(grid)), 50)

  def test_polyak_damping(self):
    self.assert_close(stepsizes.polyak_damping(lmin=0.1, lmax=0.4), 0.25)
    self.assertEqual(stepsizes.polyak_damping(lmin=0.3, lmax=0.3), 1.0)

  @parameterized.parameters(
      ('sgd', 'smoothness', -1),
      ('sgd', 'lmax', -1),
      ('sgd', 'lmin', 1),
      ('page', 'smoothness', -1),
      ('page', 'mean_smoothness', -1),
      ('page', 'lmax', -1),
      ('page', 'prob', 1),
      ('page', 'batch_size', 1),
      ('mvr', 'smoothness', -1),
      ('mvr', 'mean_smoothness', -1),
      ('mvr', 'lmax', -1),
      ('mvr', 'momentum', -1),
      ('qgd', 'omega', -1),
      ('qgd', 'lmax', -1),
      ('qgd', 'smoothness', -1),
      ('qgd', 'num_steps', -1),
      ('marina', 'smoothness', -1),
      ('marina', 'omega', -1),
      ('marina', 'lmax', -1),
      ('marina', 'prob', 1),
      ('ef21', 'smoothness', -1),
      ('ef21', 'lmax', -1),
      ('ef21', 'beta', 1),
      ('nonsmooth', 'distance', 1),
      ('nonsmooth', 'lipschitz', -1),
      ('nonsmooth', 'num_steps', -1),
  )
  def test_monotone(self, name, field, sign):
    function, kwargs = FUNCTIONS[name]
    scale = 1.1 if field != 'batch_size' else 2
    grown = function(**{**kwargs, field: kwargs[field] * scale})
    self.assertGreater(sign * (grown - function(**kwargs)), 0)

  def test_num_samples_allows_longer_steps(self):
    plain = stepsizes.page(**PAGE)
    few, many = (stepsizes.page(**PAGE, num_samples=n) for n in (8, 10**9))
    self.assertGreater(few, plain)
    self.assertAlmostEqual(many / plain, 1.0, places=7)


class RejectsTest(parameterized.TestCase):
  """Every bad argument raises and names the field and the value."""

  @parameterized.parameters(
      ('gd', 'smoothness', 0.0),
      ('gd', 'smoothness', -1.0),
      ('gd', 'smoothness', math.nan),
      ('sgd', 'smoothness', 0.0),
      ('sgd', 'lmin', 0.0),
      ('sgd', 'lmin', 0.5),  # Above lmax.
      ('sgd', 'lmax', 1.1),
      ('sgd', 'growth', 0.0),
      ('sgd', 'slope', -1.0),
      ('page', 'smoothness', 0.0),
      ('page', 'mean_smoothness', -1.0),
      ('page', 'lmax', 0.0),
      ('page', 'lmax', 1.5),
      ('page', 'prob', 0.0),
      ('page', 'prob', 1.1),
      ('page', 'batch_size', 0),
      ('page', 'num_samples', 3),  # Below batch_size.
      ('mvr', 'smoothness', -2.0),
      ('mvr', 'mean_smoothness', -1.0),
      ('mvr', 'lmax', 0.0),
      ('mvr', 'momentum', 1.0),
      ('mvr', 'momentum', -0.1),
      ('qgd', 'smoothness', 0.0),
      ('qgd', 'omega', -0.1),
      ('qgd', 'omega', math.nan),
      ('qgd', 'lmin', 0.0),
      ('qgd', 'lmin', 0.5),  # Above lmax.
      ('qgd', 'lmax', 1.1),
      ('qgd', 'num_steps', 0),
      ('qgd', 'pl', -1.0),
      ('marina', 'smoothness', -1.0),
      ('marina', 'omega', -0.1),
      ('marina', 'prob', 0.0),
      ('marina', 'prob', 1.1),
      ('marina', 'lmax', 0.0),
      ('marina', 'lmax', 1.5),
      ('ef21', 'smoothness', math.nan),
      ('ef21', 'beta', 0.0),
      ('ef21', 'beta', 1.1),
      ('ef21', 'beta', math.nan),
      ('ef21', 'lmax', 0.0),
      ('ef21', 'lmax', 1.5),
      *(
          (name, *case)
          for name in ('qgd', 'marina', 'ef21')
          for case in (
              ('client_smoothness', ()),
              ('client_smoothness', (4.0, 0.0)),
              ('client_smoothness', (-4.0, 8.0)),
              ('weights', (1.0,)),
              ('weights', (1.0, 2.0, 3.0)),
              ('weights', (1.0, -1.0)),
              ('weights', (0.0, 0.0)),
              ('weights', (1.0, math.nan)),
          )
      ),
      ('nonsmooth', 'distance', 0.0),
      ('nonsmooth', 'lipschitz', 0.0),
      ('nonsmooth', 'num_steps', 0),
      ('nonsmooth', 'lmin', 0.0),
      ('nonsmooth', 'lmax', 2.0),
      ('polyak_damping', 'lmin', 0.0),
      ('polyak_damping', 'lmin', 0.5),
      ('polyak_damping', 'lmax', 1.5),
      ('chain_eigenvalues', 'shapes', []),
      ('chain_eigenvalues', 'rank', 0),
      ('chain_eigenvalues', 'prob', 1.5),
      ('chain_eigenvalues', 'prob', -0.5),
  )
  def test_argument(self, name, field, value):
    function, kwargs = FUNCTIONS[name]
    function(**kwargs)  # The rest is fine.
    with self.assertRaises(ValueError) as caught:
      function(**{**kwargs, field: value})
    message = str(caught.exception)
    self.assertStartsWith(message, 'Expected ')
    self.assertIn(f'{field}={value}', message)

  @parameterized.product(
      name=('qgd', 'marina', 'ef21'),
      case=(
          # min() sees a NaN only where it stands first.
          ('client_smoothness', (4.0, math.nan)),
          ('client_smoothness', (4.0, math.inf)),
          ('weights', (1.0, math.inf)),
      ),
  )
  def test_constants_of_clients_are_finite(self, name, case):
    field, value = case
    function, kwargs = FUNCTIONS[name]
    with self.assertRaisesRegex(ValueError, field):
      function(**{**kwargs, field: value})

  @parameterized.parameters(
      ('sgd', dict(bounded_variance=True, growth=0.5), 'growth=0.5'),
      ('sgd', dict(slope=1.0, num_steps=0), 'num_steps=0'),
      ('sgd', dict(slope=1.0, pl=0.0), 'pl=0.0'),
      ('page', dict(pl=0.1), 'lmin with pl, got lmin=None'),
      ('page', dict(pl=0.0, lmin=0.1), 'pl=0.0'),
      ('page', dict(pl=0.1, lmin=0.0), 'lmin=0.0'),
      ('mvr', dict(pl=0.1), 'lmin with pl, got lmin=None'),
      ('mvr', dict(pl=-1.0, lmin=0.1), 'pl=-1.0'),
      ('mvr', dict(pl=0.1, lmin=-0.1), 'lmin=-0.1'),
      ('marina', dict(pl=0.1), 'lmin with pl, got lmin=None'),
      ('marina', dict(pl=-1.0, lmin=0.1), 'pl=-1.0'),
      ('marina', dict(pl=0.1, lmin=0.0), 'lmin=0.0'),
      ('ef21', dict(pl=0.1), 'lmin with pl, got lmin=None'),
      ('ef21', dict(pl=0.0, lmin=0.1), 'pl=0.0'),
      ('ef21', dict(pl=0.1, lmin=-0.1), 'lmin=-0.1'),
  )
  def test_arguments_together(self, name, extra, shown):
    function, kwargs = FUNCTIONS[name]
    with self.assertRaisesRegex(ValueError, shown):
      function(**{**kwargs, **extra})


class NonsmoothTest(parameterized.TestCase):
  """T8 on l1 regression with optimum 0: optax's Polyak step, then the chain."""

  m, n, rank, num_samples = 6, 4, 2, 30

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.x = jnp.asarray(
        rng.normal(size=(self.num_samples, self.m)), jnp.float32
    )
    self.optimum = jnp.asarray(rng.normal(size=(self.m, self.n)), jnp.float32)
    # f is Lipschitz: ||s||_F <= ||X||_2 ||sign||_F / N, sign of N n entries.
    norm = np.linalg.norm(self.x, 2)
    self.lipschitz = norm * math.sqrt(self.num_samples * self.n)
    self.lipschitz /= self.num_samples
    self.distance = float(jnp.linalg.norm(self.optimum))
    self.alpha, _ = stepsizes.chain_eigenvalues(
        [(self.m, self.n)], rank=self.rank, prob=0.5
    )

  def loss(self, params):
    rest = self.x @ (params['w'] - self.optimum)
    return jnp.sum(jnp.abs(rest)) / self.num_samples

  def polyak(self, key):
    return optax.chain(
        optax.scale_by_polyak(f_min=0.0, max_learning_rate=jnp.inf),
        bl.scale_by_bernoulli_chain(key, rank=self.rank),
        optax.scale(-1.0),
    )

  def descend(self, make, num_steps, num_seeds):
    """Returns f(W_0), ..., f(W_(T-1)) and f(mean W), for each seed."""

    def run_one(key):
      tx = make(key)

      def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(self.loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), (value, params)

      params = {'w': jnp.zeros((self.m, self.n))}
      _, (values, path) = jax.lax.scan(
          step, (params, tx.init(params)), length=num_steps
      )
      return values, self.loss(jax.tree.map(lambda w: w.mean(0), path))

    keys = jax.random.split(jax.random.key(0), num_seeds)
    return jax.jit(jax.vmap(run_one))(keys)

  def test_first_polyak_step_uses_the_unprojected_norm(self):
    params = {'w': jnp.zeros((self.m, self.n))}
    value, grads = jax.value_and_grad(self.loss)(params)
    key = jax.random.key(3)
    tx = self.polyak(key)
    updates, _ = tx.update(grads, tx.init(params), params, value=value)
    projected, _ = bl.scale_by_bernoulli_chain(key, rank=self.rank).update(
        grads, bl.scale_by_bernoulli_chain(key, rank=self.rank).init(params)
    )
    s, hs = np.asarray(grads['w']), np.asarray(projected['w'])
    gamma = float(value) / np.sum(s**2)
    self.assertGreater(gamma, 1.5)  # optax's default cap of 1 would show.
    # The projected norm would give a longer step.
    self.assertLess(np.sum(hs**2), 0.9 * np.sum(s**2))
    np.testing.assert_allclose(updates['w'], -gamma * hs, rtol=1e-5)
    # Of norm gamma ||H s||, float32.
    self.assertAlmostEqual(
        np.linalg.norm(updates['w']) / (gamma * np.linalg.norm(hs)), 1, places=5
    )

  def test_polyak_bound(self):
    num_steps = 400
    values, average = self.descend(self.polyak, num_steps, 16)
    bound = (self.distance * self.lipschitz) ** 2 / (self.alpha * num_steps)
    # An expectation, here less than half of the bound: 16 seeds are enough.
    # Without progress the mean would stay at f(W_0)^2, above it.
    self.assertLess(np.mean(values**2), bound)
    self.assertGreater(values[0, 0] ** 2, bound)
    self.assertLess(np.mean(average), math.sqrt(bound))
    # Polyak steps decrease the distance in each step: f goes to f*.
    self.assertLess(np.mean(values[:, -1]), 1e-3 * values[0, 0])

  def test_constant_step_bound(self):
    num_steps = 400
    gamma = stepsizes.nonsmooth(
        distance=self.distance,
        lipschitz=self.lipschitz,
        lmin=self.alpha,
        lmax=self.alpha,
        num_steps=num_steps,
    )
    make = lambda key: optax.with_extra_args_support(
        bl.bernoulli_lora(gamma, key, rank=self.rank)
    )
    values, average = self.descend(make, num_steps, 16)
    bound = self.distance * self.lipschitz / math.sqrt(self.alpha * num_steps)
    self.assertLess(np.mean(average), bound)
    self.assertGreater(values[0, 0], bound)
