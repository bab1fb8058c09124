"""Tests of the bounds of T1-T8 against plain Python, and of T1 and T2 as laws."""

import functools
import math

from absl.testing import parameterized
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax import stepsizes
from bernoulli_lora_jax.theory import bounds

STEPS = (1, 2, 7, 40)
COMMON = dict(initial_gap=3.0, smoothness=2.0, lmin=0.25)
BOTH = dict(**COMMON, lmax=0.5)
CLIENTS = dict(**BOTH, client_smoothness=(4.0, 8.0), omega=3.0)
SGD = dict(**BOTH, noise=4.0, growth=1.5, slope=0.2)
PAGE = dict(
    **BOTH, mean_smoothness=3.0, prob=0.2, batch_size=4, initial_error=1.5
)
MVR = dict(
    **BOTH, mean_smoothness=3.0, momentum=0.7, variance=2.0, initial_error=1.5
)
QGD = dict(**CLIENTS, client_gap=0.3)
MARINA = dict(**CLIENTS, prob=0.2, initial_error=1.5)
EF21 = dict(**BOTH, client_smoothness=(4.0, 8.0), beta=0.75, initial_error=1.5)
MU = 0.5
# name: bound, constants, stepsize limit without and with PL, worked out by hand;
# kappa = 2, mu lmin = 1/8. EF21: theta = 1/2, beta' = 1/2, Lt^2 = 40.
# QGD: A = omega Lmax/M = 12; limits for T = 40.
METHODS = {
    'T1': (bounds.gd, COMMON, 1 / 2, 1 / 2),
    'T2': (bounds.sgd, SGD, 1 / 6, 1 / 6),
    'T2 bounded': (
        bounds.sgd,
        dict(SGD, bounded_variance=True),
        1 / 4,
        1 / 4,
    ),
    'T2 steep': (bounds.sgd, dict(SGD, slope=3.0), 1 / 6, 0.125 / 6),
    'T3': (
        bounds.page,
        PAGE,
        1 / (2 + 3 * math.sqrt(0.5)),
        min(1 / 5, 0.2 / 0.25),
    ),
    'T4': (
        bounds.mvr,
        MVR,
        1 / (2 + 3 * math.sqrt(0.49 / 0.51)),
        1 / (2 + 3 * math.sqrt(2 * 0.49 / 0.51)),
    ),
    'T5': (bounds.qgd, QGD, 1 / math.sqrt(2 * 12 * 0.5 * 40), 0.125 / 24),
    # sum w^2 L^2 = 20: root sqrt(0.5 * 0.8 * 3 * 20 / 0.2).
    'T6': (
        bounds.marina,
        MARINA,
        1 / (2 + math.sqrt(120)),
        1 / (2 + math.sqrt(240)),
    ),
    'T7': (
        bounds.ef21,
        EF21,
        1 / (2 + math.sqrt(40 * 0.5)),
        1 / (2 + math.sqrt(80 * 0.5)),
    ),
}

NAMES = tuple(METHODS)


def plain(name, steps, gamma, mu, c, least=False):
  """T1-T7 for one T, as loops over its recursion where it has one."""
  gap, smoothness, lmin = c['initial_gap'], c['smoothness'], c['lmin']
  lmax = c.get('lmax', 1.0)
  error = c.get('initial_error', 0.0)
  phi, phi_pl, floor = gap, gap, 0.0
  if name.startswith('T2') or name == 'T5':
    slope, noise = c.get('slope'), c.get('noise')
    if name == 'T5':
      slope = c['omega'] * max(c['client_smoothness']) / 2
      noise = 2 * slope * c['client_gap']
    a = smoothness * gamma**2 * lmax * slope
    added = smoothness * gamma**2 * lmax * noise / 2
    if mu is not None:
      rho = gamma * mu * lmin - a
      for _ in range(steps):
        gap *= 1 - rho
      return gap + added / rho
    first = gap
    for _ in range(steps):
      gap, first = (1 + a) * gap + added, (1 + a) * first
    if least:
      rest = smoothness * gamma * noise * lmax / lmin
      return 2 * first / (gamma * lmin * steps) + rest
    return 2 * gap / (gamma * lmin * steps)
  if name in ('T3', 'T6'):
    phi = gap + gamma * lmax * error / (2 * c['prob'])
    phi_pl = gap + gamma * lmax * error / c['prob']
  if name == 'T4':
    b = 1 - c['momentum']
    phi = gap + gamma * lmax * error / (2 * b * (2 - b))
    phi_pl = gap + gamma * lmax * error / (b * (2 - b))
    floor = 2 * b * c['variance'] * (lmax / lmin) / (2 - b)
    floor = floor if mu is None else floor / mu
  if name == 'T7':
    theta = 1 - math.sqrt(1 - c['beta'])
    phi = gap + gamma * lmax / (2 * theta) * error
    phi_pl = gap + gamma * lmax / theta * error
  if mu is None:
    return 2 * phi / (gamma * lmin * steps) + floor
  for _ in range(steps):
    phi_pl *= 1 - gamma * mu * lmin
  return phi_pl + floor


class ClosedFormTest(parameterized.TestCase):
  """Numbers are exact but for the last places of float64."""

  @parameterized.product(name=NAMES, mu=[None, MU], part=[1.0, 0.3])
  def test_equals_plain_python(self, name, mu, part):
    bound, constants, limit, limit_pl = METHODS[name]
    gamma = part * (limit if mu is None else limit_pl)
    expected = [plain(name, t, gamma, mu, constants) for t in STEPS]
    values = bound(STEPS, stepsize=gamma, pl=mu, **constants)
    np.testing.assert_allclose(values, expected, rtol=1e-10)
    for t, value in zip(STEPS, expected, strict=True):
      alone = bound(t, stepsize=gamma, pl=mu, **constants)
      self.assertEqual(np.shape(alone), ())
      np.testing.assert_allclose(alone, value, rtol=1e-10)
    square = bound(
        np.reshape(STEPS, (2, 2)), stepsize=gamma, pl=mu, **constants
    )
    np.testing.assert_array_equal(square, np.reshape(values, (2, 2)))

  @parameterized.parameters('T2', 'T2 bounded', 'T5')
  def test_least(self, name):
    bound, constants, limit, _ = METHODS[name]
    values = bound(STEPS, stepsize=limit, least=True, **constants)
    expected = [
        plain(name, t, limit, None, constants, least=True) for t in STEPS
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-10)

  def test_weighted_is_gd_at_lmin_one(self):
    constants = dict(initial_gap=3.0, stepsize=0.4, smoothness=2.0)
    np.testing.assert_allclose(
        bounds.gd_weighted(STEPS, **constants),
        [2 * 3 / (0.4 * t) for t in STEPS],
        rtol=1e-12,
    )

  def test_nonsmooth(self):
    constants = dict(distance=3.0, lipschitz=2.0, lmin=0.1, lmax=0.4)
    np.testing.assert_allclose(
        bounds.nonsmooth([1, 10], stepsize=0.5, **constants),
        [9 / (2 * 0.5 * 0.1 * t) + 0.5 * 4 * 4 / 2 for t in (1, 10)],
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        bounds.polyak([1, 10], **constants),
        [math.sqrt(4 * 9 * 4 / (0.1 * t)) for t in (1, 10)],
        rtol=1e-12,
    )

  @parameterized.parameters((0.25, 0.25), (0.1, 0.4))
  def test_nonsmooth_best_step_is_best(self, lmin, lmax):
    constants = dict(distance=3.0, lipschitz=2.0, lmin=lmin, lmax=lmax)
    best = stepsizes.nonsmooth(num_steps=50, **constants)
    value = lambda gamma: bounds.nonsmooth(50, stepsize=gamma, **constants)
    for part in (0.8, 0.99, 1.01, 1.3):
      self.assertLess(value(best), value(part * best))
    # R0 L0 sqrt(kappa / (lmin T)), Polyak's.
    np.testing.assert_allclose(
        value(best), bounds.polyak(50, **constants), rtol=1e-12
    )


class RelationsTest(parameterized.TestCase):

  @parameterized.parameters(0.0, 4.0)
  def test_slope_to_zero_is_continuous(self, noise):
    arguments = dict(SGD, noise=noise, stepsize=0.1)
    values = [
        bounds.sgd(STEPS, **dict(arguments, slope=slope))
        for slope in (0.0, 1e-14, 1e-9)
    ]
    # (1 + a)^T - 1 is of the order of T a = 1e-9.
    np.testing.assert_allclose(values[1], values[0], rtol=1e-12)
    np.testing.assert_allclose(values[2], values[0], rtol=1e-7)

  def test_least_and_mean(self):
    # Without A both are D0's term and the same floor.
    flat = dict(SGD, slope=0.0, stepsize=0.1)
    np.testing.assert_allclose(
        bounds.sgd(STEPS, least=True, **flat),
        bounds.sgd(STEPS, **flat),
        rtol=1e-12,
    )
    # With A the mean's noise has grown, by ((1 + a)^T - 1) / (a T) >= 1.
    steep = dict(SGD, stepsize=0.1)
    least = bounds.sgd(STEPS, least=True, **steep)
    mean = bounds.sgd(STEPS, **steep)
    self.assertTrue(np.all(least[1:] < mean[1:]))
    np.testing.assert_allclose(least[0], mean[0], rtol=1e-12)

  @parameterized.parameters(None, MU)
  def test_no_noise_is_gd(self, mu):
    gamma = 0.05
    gd = bounds.gd(STEPS, stepsize=gamma, pl=mu, **COMMON)
    others = {
        'sgd': bounds.sgd(STEPS, stepsize=gamma, pl=mu, noise=0.0, **BOTH),
        'page': bounds.page(
            STEPS,
            stepsize=gamma,
            pl=mu,
            **dict(PAGE, prob=1.0, initial_error=0.0),
        ),
        'marina': bounds.marina(
            STEPS,
            stepsize=gamma,
            pl=mu,
            **dict(MARINA, omega=0.0, initial_error=0.0),
        ),
        'ef21': bounds.ef21(
            STEPS,
            stepsize=gamma,
            pl=mu,
            **dict(EF21, beta=1.0, initial_error=0.0),
        ),
        'qgd': bounds.qgd(STEPS, stepsize=gamma, pl=mu, **dict(QGD, omega=0.0)),
    }
    for name, values in others.items():
      np.testing.assert_allclose(values, gd, rtol=1e-12, err_msg=name)

  def test_exact_estimators_allow_one_over_l(self):
    for bound, constants in (
        (bounds.page, dict(PAGE, prob=1.0)),
        (bounds.mvr, dict(MVR, momentum=0.0)),
        (bounds.marina, dict(MARINA, omega=0.0)),
        (bounds.ef21, dict(EF21, beta=1.0)),
    ):
      bound(1, stepsize=0.5, **constants)
      with self.assertRaisesRegex(ValueError, 'stepsize <= 0.5 '):
        bound(1, stepsize=0.51, **constants)

  def test_mvr_without_momentum(self):
    """b = 1: the floor is 2 sigma^2 kappa, T2's L gamma sigma^2 kappa less."""
    constants = dict(MVR, momentum=0.0, initial_error=0.0)
    for gamma in (0.1, 0.5):
      mvr = bounds.mvr(STEPS, stepsize=gamma, **constants)
      sgd = bounds.sgd(
          STEPS, stepsize=gamma, noise=2.0, bounded_variance=True, **BOTH
      )
      np.testing.assert_allclose(
          mvr - sgd, (2 - 2 * gamma) * 2.0 * 2.0, rtol=1e-10
      )

  @parameterized.parameters((None, False), (None, True), (MU, False))
  def test_qgd_is_sgd_with_its_constants(self, mu, least):
    gamma = 0.005
    sgd = bounds.sgd(
        STEPS,
        stepsize=gamma,
        slope=12.0,  # omega Lmax / M
        noise=2 * 12.0 * 0.3,
        bounded_variance=True,
        pl=mu,
        least=least,
        **BOTH,
    )
    qgd = bounds.qgd(STEPS, stepsize=gamma, pl=mu, least=least, **QGD)
    np.testing.assert_allclose(qgd, sgd, rtol=1e-12)

  def test_weights_are_normalised(self):
    for bound, constants in (
        (bounds.qgd, QGD),
        (bounds.marina, MARINA),
        (bounds.ef21, EF21),
    ):
      values = [
          bound(STEPS, stepsize=0.03, weights=weights, **constants)
          for weights in (None, (0.5, 0.5), (3, 3))
      ]
      np.testing.assert_allclose(values[1], values[0], rtol=1e-12)
      np.testing.assert_allclose(values[2], values[0], rtol=1e-12)
    # A = omega max w_l L_l: all weight on the smoother client.
    light = bounds.qgd(STEPS, stepsize=0.03, weights=(1, 0), **QGD)
    np.testing.assert_allclose(
        light,
        bounds.sgd(
            STEPS,
            stepsize=0.03,
            slope=12.0,
            noise=24 * 0.3,
            bounded_variance=True,
            **BOTH,
        ),
        rtol=1e-12,
    )

  @parameterized.product(name=NAMES, mu=[None, MU])
  def test_falls_with_lmin(self, name, mu):
    bound, constants, limit, limit_pl = METHODS[name]
    gamma = 0.05 * (limit if mu is None else limit_pl)
    values = np.stack(
        [
            bound(STEPS, stepsize=gamma, pl=mu, **dict(constants, lmin=lmin))
            for lmin in (0.1, 0.2, 0.3, 0.5)
        ]
    )
    self.assertTrue(np.all(np.diff(values, axis=0) < 0), values)

  def test_infinity_where_it_overflows(self):
    value = bounds.sgd(
        10**7,
        stepsize=0.5,
        noise=1.0,
        slope=1.0,
        initial_gap=1.0,
        smoothness=1.0,
        lmin=1.0,
        lmax=1.0,
    )
    self.assertEqual(value, math.inf)

  @parameterized.parameters(dict(noise=0.0), dict(initial_gap=0.0))
  def test_infinity_where_it_overflows_without(self, **zero):
    constants = dict(
        noise=1.0, slope=1.0, initial_gap=1.0, smoothness=1.0, lmin=1.0
    )
    value = bounds.sgd(10**7, stepsize=0.5, lmax=1.0, **dict(constants, **zero))
    self.assertFalse(np.isnan(value))


class RejectsTest(parameterized.TestCase):

  @parameterized.product(name=NAMES, mu=[None, MU])
  def test_stepsize_limit(self, name, mu):
    bound, constants, limit, limit_pl = METHODS[name]
    limit = limit if mu is None else limit_pl
    bound(40, stepsize=limit, pl=mu, **constants)
    theorem = name[:2]
    for part in (1 + 1e-6, 1.5):
      with self.assertRaisesRegex(
          ValueError,
          rf'stepsize <= {limit:.10g} \({theorem}\), got'
          rf' stepsize={part * limit:.10g}, {part:.7g}\d* times as much',
      ):
        bound(40, stepsize=part * limit, pl=mu, **constants)

  def test_qgd_limit_is_of_the_largest_step(self):
    limit = METHODS['T5'][2]
    bounds.qgd([1, 40], stepsize=limit, **QGD)
    with self.assertRaisesRegex(ValueError, 'stepsize <='):
      bounds.qgd([41, 1], stepsize=limit, **QGD)

  @parameterized.product(
      name=NAMES,
      bad=[
          ('initial_gap', -1.0),
          ('initial_gap', math.nan),
          ('initial_gap', math.inf),
          ('stepsize', 0.0),
          ('stepsize', -0.1),
          ('stepsize', math.nan),
          ('smoothness', 0.0),
          ('smoothness', -2.0),
          ('smoothness', math.nan),
          ('lmin', 0.0),
          ('lmin', 1.1),
          ('lmin', math.nan),
          ('num_steps', 0),
          ('num_steps', [3, 0]),
          ('num_steps', []),
          ('num_steps', math.nan),
          ('num_steps', math.inf),
          ('num_steps', 1.5),
          ('smoothness', math.inf),
          ('stepsize', math.inf),
          ('pl', 0.0),
          ('pl', -1.0),
          ('pl', 2.1),
          ('pl', math.nan),
      ],
  )
  def test_common(self, name, bad):
    bound, constants, _, _ = METHODS[name]
    given = dict(constants, num_steps=3, stepsize=0.001)
    given[bad[0]] = bad[1]
    with self.assertRaisesRegex(ValueError, f'Expected .*got .*{bad[0]}='):
      bound(**given)

  @parameterized.parameters(
      (bounds.page, dict(PAGE, mean_smoothness=math.inf, prob=1.0)),
      (bounds.page, dict(PAGE, num_samples=math.inf)),
      (bounds.page, dict(PAGE, batch_size=math.inf)),
      (bounds.page, dict(PAGE, batch_size=1.5)),
      (bounds.page, dict(PAGE, initial_error=math.inf)),
      (bounds.mvr, dict(MVR, mean_smoothness=math.inf, momentum=0.0)),
      (bounds.mvr, dict(MVR, variance=math.inf)),
      (bounds.marina, dict(MARINA, omega=math.inf, prob=1.0)),
      (bounds.sgd, dict(SGD, slope=math.inf)),
      (bounds.sgd, dict(SGD, noise=math.inf)),
      (bounds.qgd, dict(QGD, client_smoothness=2.0)),
      (bounds.sgd, dict(SGD, least=True, pl=MU)),
  )
  def test_infinite_and_odd(self, bound, constants):
    """No stepsize is allowed by a limit that is NaN."""
    with self.assertRaisesRegex(ValueError, 'Expected .*got '):
      bound(40, stepsize=1e6, **constants)

  def test_the_largest_stepsize_of_sgd_knows_its_horizon(self):
    """1/sqrt(L A lmax T): (1 + a)^T stays below e, at any T."""
    constants = dict(initial_gap=1.0, smoothness=3.0, slope=0.1, noise=0.0)
    both = dict(lmin=0.03, lmax=0.03)
    for steps in (10**3, 10**6):
      gamma = bounds.largest_stepsize(
          'sgd', dict(constants, **both, num_steps=steps)
      )
      longest = 1 / math.sqrt(3 * 0.1 * 0.03 * steps)
      self.assertLessEqual(gamma, longest * (1 + 1e-12))
      found = bounds.sgd(steps, stepsize=gamma, **constants, **both)
      self.assertLessEqual(found, 2 * math.e / (gamma * 0.03 * steps))

  def test_growth_below_rounding_counts(self):
    """(1 + a)^T with a = 1e-18: e^1 after 1e18 steps."""
    found = bounds.sgd(
        10**18,
        stepsize=1e-9,
        noise=0.0,
        slope=1.0,
        initial_gap=1.0,
        smoothness=1.0,
        lmin=1.0,
        lmax=1.0,
    )
    np.testing.assert_allclose(found, 2 * math.e / 1e9, rtol=1e-9)

  @parameterized.parameters(
      ('T2', 'lmax', 0.2),
      ('T3', 'lmax', 1.1),
      ('T4', 'lmax', 0.2),
      ('T5', 'lmax', 0.2),
      ('T6', 'lmax', 0.2),
      ('T7', 'lmax', math.nan),
      ('T2', 'noise', -1.0),
      ('T2', 'noise', math.nan),
      ('T2', 'growth', 0.0),
      ('T2', 'growth', math.nan),
      ('T2 bounded', 'growth', 0.9),
      ('T2', 'slope', -1.0),
      ('T2', 'slope', math.nan),
      ('T3', 'mean_smoothness', -1.0),
      ('T3', 'prob', 0.0),
      ('T3', 'prob', 1.1),
      ('T3', 'prob', math.nan),
      ('T3', 'batch_size', 0),
      ('T3', 'num_samples', 3),
      ('T3', 'initial_error', -1.0),
      ('T3', 'initial_error', math.nan),
      ('T4', 'mean_smoothness', math.nan),
      ('T4', 'momentum', 1.0),
      ('T4', 'momentum', -0.1),
      ('T4', 'momentum', math.nan),
      ('T4', 'variance', -1.0),
      ('T4', 'variance', math.nan),
      ('T4', 'initial_error', -1.0),
      ('T5', 'client_gap', -1.0),
      ('T5', 'client_gap', math.nan),
      ('T5', 'omega', -1.0),
      ('T5', 'client_smoothness', ()),
      ('T5', 'client_smoothness', (4.0, -1.0)),
      ('T5', 'weights', (1.0,)),
      ('T6', 'omega', math.nan),
      ('T6', 'prob', 0.0),
      ('T6', 'weights', (0.0, 0.0)),
      ('T6', 'initial_error', -1.0),
      ('T7', 'beta', 0.0),
      ('T7', 'beta', 1.1),
      ('T7', 'beta', math.nan),
      ('T7', 'weights', (1.0, -1.0)),
      ('T7', 'initial_error', -1.0),
  )
  def test_own(self, theorem, name, value):
    bound, constants, _, _ = METHODS[theorem]
    with self.assertRaisesRegex(ValueError, f'Expected .*got .*{name}='):
      bound(3, stepsize=0.001, **dict(constants, **{name: value}))

  @parameterized.parameters(
      ('distance', 0.0),
      ('distance', math.nan),
      ('lipschitz', -1.0),
      ('lmin', 0.0),
      ('lmax', 0.2),
      ('num_steps', 0),
      ('stepsize', 0.0),
  )
  def test_nonsmooth(self, name, value):
    constants = dict(
        num_steps=3, distance=1.0, lipschitz=1.0, lmin=0.3, lmax=0.4
    )
    constants |= {name: value}
    if name != 'stepsize':
      with self.assertRaisesRegex(ValueError, f'got .*{name}='):
        bounds.polyak(**constants)
    with self.assertRaisesRegex(ValueError, f'got .*{name}='):
      bounds.nonsmooth(**{'stepsize': 0.1, **constants})

  @parameterized.parameters('smoothness', 'mean_smoothness')
  def test_infinite_constant(self, name):
    with self.assertRaisesRegex(ValueError, f'{name}|stepsize <= 0'):
      bounds.page(3, stepsize=0.001, **dict(PAGE, **{name: math.inf}))

  def test_infinite_slope(self):
    with self.assertRaisesRegex(ValueError, 'slope'):
      bounds.sgd(3, stepsize=0.001, **dict(SGD, slope=math.inf))

  def test_bound_of_a_gap_is_not_negative(self):
    # B < 1 lets gamma mu lmin exceed 1, where unrolling T2's recursion fails.
    constants = dict(BOTH, noise=1.0, growth=0.01, stepsize=20.0, pl=2.0)
    self.assertGreaterEqual(bounds.sgd([1, 2, 3], **constants).min(), 0)


def anisotropic(seed, tree):
  """Returns curvatures in [0.5, 2] of each entry, ends included."""
  keys = jax.random.split(jax.random.key(seed), len(tree))
  draw = lambda key, x: jnp.clip(
      jax.random.uniform(key, x.shape, minval=0.0, maxval=2.5), 0.5, 2.0
  )
  return {n: draw(k, tree[n]) for k, n in zip(keys, sorted(tree), strict=True)}


NUM_SEEDS = 600
NUM_STEPS = 30


def single(key):
  return bl.scale_by_bernoulli_chain(key, rank=1, prob=0.3)


def two(key):
  """Two matrices of other shapes, ranks and probs."""
  keys = jax.random.split(key)
  return optax.chain(
      optax.masked(
          bl.scale_by_bernoulli_chain(keys[0], rank=1, prob=0.3),
          {'a': True, 'b': False},
      ),
      optax.masked(
          bl.scale_by_bernoulli_chain(keys[1], rank=2, prob=0.8),
          {'a': False, 'b': True},
      ),
  )


@functools.partial(jax.jit, static_argnums=1)
def _run_chain(curvature, links, gamma, sigma):
  names = sorted(curvature)
  start = {name: jnp.ones_like(curvature[name]) for name in names}
  size = sum(x.size for x in start.values())
  f = lambda w: sum(jnp.sum(curvature[n] * w[n] ** 2) / 2 for n in names)

  def run(key):
    chain_key, noise_key = jax.random.split(key)
    tx = optax.chain(links(chain_key), optax.scale(-1.0))

    def step(carry, t):
      w, state = carry
      grad = {n: curvature[n] * w[n] for n in names}
      drawn = jax.random.normal(jax.random.fold_in(noise_key, t), (size,))
      noise = ravel_pytree(start)[1](sigma / math.sqrt(size) * drawn)
      noisy = {n: gamma * (grad[n] + noise[n]) for n in names}
      updates, state = tx.update(noisy, state, w)
      norms = jnp.stack([jnp.vdot(grad[n], grad[n]) for n in names])
      return (optax.apply_updates(w, updates), state), (norms, f(w))

    (w, _), (norms, gaps) = jax.lax.scan(
        step, (start, tx.init(start)), jnp.arange(NUM_STEPS)
    )
    return norms, jnp.append(gaps, f(w))

  return jax.vmap(run)(jax.random.split(jax.random.key(3), NUM_SEEDS))


def run_chain(curvature, links, gamma, sigma=0.0):
  """Returns ||grad_k||^2 (seeds, T, matrices) and the gaps (seeds, T + 1).

  f = sum_k <c_k, W_k^2> / 2 from W = 1; the gradient has Gaussian noise of
  variance sigma^2 in all.
  """
  norms, gaps = _run_chain(curvature, links, gamma, sigma)
  return np.asarray(norms), np.asarray(gaps)


class LawTest(parameterized.TestCase):
  """Means over seeds against the bounds, within 5 standard errors."""

  @pytest.fixture(autouse=True)
  def _x64(self):
    with jax.enable_x64(True):
      yield

  def assert_below(self, values, bound, most=None):
    """The mean over axis 0 is at most the bound, at the end >= bound / most."""
    mean = values.mean(0)
    error = values.std(0, ddof=1) / math.sqrt(len(values))
    np.testing.assert_array_less(mean - 5 * error, bound + 1e-12)
    if most is not None:
      self.assertGreater(mean[-1] + 5 * error[-1], bound[-1] / most)

  @parameterized.parameters(1.0, 0.5)
  def test_t1_pl_isotropic(self, gamma):
    """f = ||W||^2 / 2: E f(W_T) = (1 - lambda (2 gamma - gamma^2))^T D0."""
    curvature = {'w': jnp.ones((3, 4))}
    (each,) = stepsizes.matrix_eigenvalues([(3, 4)], rank=1, prob=0.3)
    lam = each[0]
    _, gaps = run_chain(curvature, single, gamma)
    gaps = gaps[:, :7]  # Beyond, its spread exceeds its mean.
    steps = np.arange(1, 7)
    exact = (1 - lam * (2 * gamma - gamma**2)) ** steps * gaps[0, 0]
    error = gaps.std(0, ddof=1)[1:] / math.sqrt(len(gaps))
    np.testing.assert_array_less(
        np.abs(gaps.mean(0)[1:] - exact), 5 * error + 1e-12
    )
    bound = bounds.gd(
        steps,
        initial_gap=gaps[0, 0],
        stepsize=gamma,
        smoothness=1.0,
        lmin=lam,
        pl=1.0,
    )
    if gamma == 1.0:  # Attained at 1/L.
      np.testing.assert_allclose(bound, exact, rtol=1e-10)
    self.assertTrue(np.all(exact <= bound * (1 + 1e-12)))

  def test_t1_isotropic_is_an_identity(self):
    """At gamma = 1/L, lmin sum ||grad||^2 = (2 / gamma) (D0 - f(W_T)) in mean."""
    curvature = {'a': jnp.ones((3, 4)), 'b': jnp.ones((5, 2))}
    norms, gaps = run_chain(curvature, two, 1.0)
    each = bounds.spectrum([(3, 4), (5, 2)], rank=[1, 2], prob=[0.3, 0.8]).each
    lmins = np.asarray([low for low, _ in each])
    rest = (norms * lmins).sum(-1).cumsum(1) + 2 * gaps[:, 1:]
    rest = rest[:, :8]
    error = rest.std(0, ddof=1) / math.sqrt(len(rest))
    np.testing.assert_array_less(
        np.abs(rest.mean(0) - 2 * gaps[0, 0]), 5 * error
    )

  def test_t1_on_a_tree(self):
    tree = {'a': jnp.ones((3, 4)), 'b': jnp.ones((5, 2))}
    curvature = anisotropic(0, tree)
    found = bounds.spectrum([(3, 4), (5, 2)], rank=[1, 2], prob=[0.3, 0.8])
    gamma = 0.5
    norms, gaps = run_chain(curvature, two, gamma)
    steps = np.arange(1, NUM_STEPS + 1)
    known = dict(initial_gap=gaps[0, 0], stepsize=gamma, smoothness=2.0)
    lmins = np.asarray([low for low, _ in found.each])
    self.assertNotEqual(*lmins)
    mean = lambda x: x.cumsum(1) / steps
    # 1/L is the longest step, so the bound is not far.
    self.assert_below(
        mean((norms * lmins).sum(-1)),
        bounds.gd_weighted(steps, **known),
        most=3.5,
    )
    self.assert_below(
        mean(norms.sum(-1)), bounds.gd(steps, lmin=found.lmin, **known)
    )
    self.assert_below(
        gaps[:, 1:],
        bounds.gd(steps, lmin=found.lmin, pl=0.5, **known),
    )

  @parameterized.parameters(1.0, 0.4)
  def test_t2(self, gamma):
    curvature = anisotropic(1, {'w': jnp.ones((3, 4))})
    curvature = {'w': curvature['w'] / 2}  # L = 1, mu = 1/4
    low, high = stepsizes.chain_eigenvalues([(3, 4)], rank=1, prob=0.3)
    sigma = 3.0
    norms, gaps = run_chain(curvature, single, gamma, sigma)
    steps = np.arange(1, NUM_STEPS + 1)
    known = dict(
        initial_gap=gaps[0, 0],
        stepsize=gamma,
        smoothness=1.0,
        lmin=low,
        lmax=high,
        noise=sigma**2,
    )
    for bounded in (True, False):  # kappa = 1: one limit.
      form = dict(known, bounded_variance=bounded)
      norm = norms.sum(-1)
      self.assert_below(
          norm.cumsum(1) / steps, bounds.sgd(steps, **form), most=8
      )
      self.assert_below(
          np.minimum.accumulate(norm.mean(0)[None], axis=1).repeat(2, 0),
          bounds.sgd(steps, least=True, **form),
      )
      self.assert_below(gaps[:, 1:], bounds.sgd(steps, pl=0.25, **form), most=8)

  def test_t2_pl_isotropic_is_nearly_attained(self):
    """gamma = 1/L: E f(W_T) = (1-l)^T D0 + (1 - (1-l)^T) sigma^2 / 2."""
    curvature = {'w': jnp.ones((3, 4))}
    low, high = stepsizes.chain_eigenvalues([(3, 4)], rank=1, prob=0.3)
    _, gaps = run_chain(curvature, single, 1.0, sigma=2.0)
    decay = (1 - low) ** NUM_STEPS
    exact = decay * gaps[0, 0] + (1 - decay) * 2.0
    last = gaps[:, -1]
    error = last.std(ddof=1) / math.sqrt(len(last))
    self.assertLess(abs(last.mean() - exact), 5 * error)
    bound = bounds.sgd(
        NUM_STEPS,
        initial_gap=gaps[0, 0],
        stepsize=1.0,
        smoothness=1.0,
        lmin=low,
        lmax=high,
        noise=4.0,
        bounded_variance=True,
        pl=1.0,
    )
    np.testing.assert_allclose(bound, exact, rtol=1e-3)


class SpectrumTest(parameterized.TestCase):

  def test_mixed(self):
    found = bounds.spectrum(
        [(4, 8), (10, 5), (3, 3)], rank=[2, 1, 3], prob=[0.25, 1.0, 0.5]
    )
    expected = [0.25 * 2 / 4 + 0.75 * 2 / 8, 1 / 10, 1.0]
    np.testing.assert_allclose(
        found.each, [(x, x) for x in expected], rtol=1e-12
    )
    np.testing.assert_allclose(found.lmin, 0.1)
    np.testing.assert_allclose(found.lmax, 1.0)
    np.testing.assert_allclose(found.kappa, 10.0)

  def test_others_trained(self):
    arguments = dict(rank=2, prob=0.5)
    self.assertEqual(bounds.spectrum([(4, 8)], **arguments).kappa, 1.0)
    found = bounds.spectrum([(4, 8)], all_trained=False, **arguments)
    self.assertEqual((found.lmin, found.lmax), (0.375, 1.0))
    self.assertLen(found.each, 1)

  def test_sketch(self):
    sketch = sketches.weighted_coordinate(4.0)
    weights = sketches.inclusion_probabilities(4.0, 6, 2)
    found = bounds.spectrum([(6, 6)], rank=2, prob=0.5, sketch=sketch)
    np.testing.assert_allclose(
        found.each[0], (weights.min(), weights.max()), rtol=1e-12
    )
    self.assertGreater(found.kappa, 2)

  @parameterized.parameters(
      (dict(rank=9), r'rank <= 8, the longer side, got rank=9'),
      (dict(rank=0), 'rank >= 1, a whole number, got rank=0'),
      (dict(rank=2.5), 'rank >= 1, a whole number, got rank=2.5'),
      (dict(rank=True), 'rank >= 1, a whole number, got rank=True'),
      (dict(prob=1.1), r'prob in \[0, 1\], got prob=1.1'),
      (dict(prob=math.nan), r'prob in \[0, 1\], got prob=nan'),
      (dict(prob=[0.5, 0.5]), '1 values of prob'),
      (dict(shapes=[]), 'at least one shape'),
      (dict(shapes=[(0, 4)]), 'positive lengths'),
  )
  def test_rejects(self, bad, message):
    arguments = {'shapes': [(4, 8)], 'rank': 2, 'prob': 0.5, **bad}
    with self.assertRaisesRegex(ValueError, message):
      bounds.spectrum(**arguments)

  def test_rejects_another_number_of_ranks(self):
    with self.assertRaisesRegex(ValueError, '2 values of rank'):
      bounds.spectrum([(4, 8), (4, 4)], rank=[2], prob=0.5)


class TreeSpectrumTest(parameterized.TestCase):

  PARAMS = {
      'a': {'kernel': jnp.zeros((4, 8)), 'bias': jnp.zeros(8)},
      'b': {'kernel': jnp.zeros((8, 2)), 'bias': jnp.zeros(2)},
  }

  def test_equals_shapes(self):
    found = bounds.tree_spectrum(self.PARAMS, rank=1, prob=0.25)
    expected = bounds.spectrum([(4, 8), (8, 2)], rank=1, prob=0.25)
    self.assertEqual(found, expected)
    # 0.25/4 + 0.75/8 = 5/32 and 0.25/8 + 0.75/2 = 13/32.
    self.assertEqual((found.lmin, found.lmax), (5 / 32, 13 / 32))
    self.assertAlmostEqual(found.kappa, 13 / 5)
    shapes = jax.eval_shape(lambda: self.PARAMS)
    self.assertEqual(
        bl.theory.bounds.tree_spectrum(shapes, rank=1, prob=0.25), expected
    )

  def test_each_matrix_has_its_own(self):
    found = bounds.tree_spectrum(
        self.PARAMS,
        rank={'b/kernel': 2, 'a/kernel': 1},
        prob={'a/kernel': 1.0, 'b/kernel': 0.0},
    )
    self.assertEqual(found.each, ((1 / 4, 1 / 4), (1.0, 1.0)))

  def test_others(self):
    arguments = dict(rank=1, prob=0.25, train_others=True)
    self.assertEqual(bounds.tree_spectrum(self.PARAMS, **arguments).lmax, 1.0)
    alone = {'w': jnp.zeros((4, 8)), 'count': jnp.zeros(3, jnp.int32)}
    self.assertEqual(bounds.tree_spectrum(alone, **arguments).lmax, 5 / 32)

  def test_selection(self):
    only = bl.Matrices(select='b/kernel')
    found = bounds.tree_spectrum(self.PARAMS, rank=1, prob=0.25, matrices=only)
    self.assertEqual(found.lmin, 13 / 32)

  @parameterized.parameters(
      ({'a/kernel': 1},), ({'a/kernel': 1, 'b/kernel': 1, 'c': 1},)
  )
  def test_rejects(self, rank):
    with self.assertRaisesRegex(ValueError, "rank of each of .*'b/kernel'"):
      bounds.tree_spectrum(self.PARAMS, rank=rank, prob=0.5)
