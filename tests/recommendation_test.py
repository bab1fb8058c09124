"""Tests of recommendations: p by hand and over grids, least steps, refusals."""

import math

from absl.testing import parameterized
import numpy as np
import pytest

from bernoulli_lora_jax.theory import bounds
from bernoulli_lora_jax.theory import recommendation


class RecommendTest(parameterized.TestCase):

  KNOWN = dict(initial_gap=3.0, smoothness=2.0)

  @parameterized.parameters(((4, 16), 1.0), ((16, 4), 0.0))
  def test_one_matrix_has_an_end(self, shape, prob):
    found = recommendation.recommend([shape], rank=2, target=0.1, **self.KNOWN)
    self.assertEqual(found.prob, prob)
    self.assertEqual(found.lmin, 0.5)
    self.assertEqual(found.trained, 2 * 16)
    self.assertEqual(found.stepsize, 0.5)
    self.assertEqual(found.num_steps, 240)  # 2 * 3 / (0.5 * 0.5 * 0.1)
    for p in (0.0, 0.3, 1.0):  # On either side, and between.
      one = recommendation.recommend(
          [shape], rank=2, target=0.1, chain_prob=p, **self.KNOWN
      )
      self.assertEqual(one.prob, p)
      np.testing.assert_allclose(one.lmin_per_number, 1 / 64, rtol=1e-12)

  def test_square_matrix_is_indifferent(self):
    found = recommendation.recommend([(8, 8)], rank=2, target=0.1, **self.KNOWN)
    self.assertIn(found.prob, (0.0, 1.0))
    self.assertEqual(found.lmin, 0.25)

  @pytest.mark.slow
  def test_two_matrices_meet_between(self):
    shapes, rank = [(4, 64), (40, 8)], [1, 3]
    found = recommendation.recommend(
        shapes, rank=rank, target=1e-3, **self.KNOWN
    )
    self.assertBetween(found.prob, 0.01, 0.99)
    grid = np.linspace(0, 1, 20_001)
    lmins = [
        grid * r / m + (1 - grid) * r / n
        for (m, n), r in zip(shapes, rank, strict=True)
    ]
    best = np.minimum(*lmins).max()
    np.testing.assert_allclose(found.lmin, best, rtol=1e-3)
    self.assertGreaterEqual(found.lmin, best)
    # 2 D0 / (gamma lmin target), least over the grid.
    steps = math.ceil(2 * 3 / (0.5 * best * 1e-3))
    self.assertLessEqual(found.num_steps, steps)
    self.assertAlmostEqual(found.num_steps / steps, 1, delta=1e-3)
    trained = sum(
        found.prob * r * n + (1 - found.prob) * r * m
        for (m, n), r in zip(shapes, rank, strict=True)
    )
    np.testing.assert_allclose(found.trained, trained, rtol=1e-12)
    for p in (0.0, found.prob - 0.05, found.prob + 0.05):
      other = recommendation.recommend(
          shapes, rank=rank, target=1e-3, chain_prob=p, **self.KNOWN
      )
      self.assertGreater(other.num_steps, found.num_steps)

  @parameterized.parameters(
      ('gd', {}),
      ('gd', dict(pl=0.5)),
      ('sgd', dict(noise=1.0)),
      ('sgd', dict(noise=1.0, pl=0.5)),
      ('sgd', dict(noise=1.0, slope=0.1, bounded_variance=True)),
      ('page', dict(mean_smoothness=3.0, prob=0.2, batch_size=4)),
      ('mvr', dict(mean_smoothness=3.0, momentum=0.99, variance=1.0)),
      ('marina', dict(client_smoothness=(2.0, 4.0), omega=3.0, prob=0.2)),
      ('ef21', dict(client_smoothness=(2.0, 4.0), beta=0.3)),
      ('qgd', dict(client_smoothness=(2.0, 4.0), omega=3.0, client_gap=0.1)),
  )
  def test_steps_are_least(self, estimator, constants):
    target = 0.3
    found = recommendation.recommend(
        [(4, 16)],
        rank=2,
        target=target,
        estimator=estimator,
        **self.KNOWN,
        **constants,
    )
    limit_of, bound = bounds.METHODS[estimator]
    given = dict(
        self.KNOWN,
        **constants,
        lmin=found.lmin,
        lmax=found.lmax,
        stepsize=found.stepsize,
    )
    at = lambda steps: bounds.call(bound, dict(given, num_steps=steps))
    self.assertGreater(found.num_steps, 1)
    self.assertLessEqual(at(found.num_steps), target)
    self.assertGreater(at(found.num_steps - 1), target)
    # No stepsize of a fine grid reaches it much sooner: 2^(1/8) at most.
    earlier = int(found.num_steps / 2**0.125) - 1
    limit = bounds.call(limit_of, dict(given, num_steps=earlier))
    for part in np.geomspace(1e-3, 1, 200):
      given['stepsize'] = part * limit
      self.assertGreater(at(earlier), target)

  @parameterized.parameters(
      (dict(estimator='adam'), 'estimator in .*got estimator=adam'),
      (dict(target=0.0), 'target > 0, got target=0.0'),
      (dict(target=math.nan), 'target > 0, got target=nan'),
      (dict(noise=1.0), 'constants of gd among .*got noise=1.0'),
      (dict(stepsize=1.0), 'constants of gd among .*got stepsize=1.0'),
      (dict(lmin=1.0), 'constants of gd among .*got lmin=1.0'),
      (dict(estimator='sgd'), 'Expected noise for sgd, got none'),
      (
          dict(estimator='qgd', omega=1.0),
          'client_smoothness, client_gap for qgd, got none',
      ),
      (dict(target=1e-17), 'gd reaches within 5e.15 steps, got target=1e-17'),
      (dict(smoothness=-1.0), 'smoothness > 0, got smoothness=-1.0'),
      (dict(initial_gap=-1.0), 'got initial_gap=-1.0'),
      (dict(pl=5.0), r'pl in \(0, smoothness=2.0\], got pl=5.0'),
      (dict(chain_prob=1.5), r'prob in \[0, 1\], got prob=1.5'),
      (dict(prob=0.5), 'constants of gd among .*got prob=0.5'),
      (dict(rank=20), 'rank <= 16, the longer side, got rank=20'),
      (
          dict(
              estimator='mvr',
              mean_smoothness=1.0,
              momentum=0.5,
              variance=1.0,
              target=0.5,
          ),
          'target above the floor of the bound of mvr, got target=0.5',
      ),
  )
  def test_rejects(self, changed, message):
    arguments = {'rank': 2, 'target': 0.1, **self.KNOWN, **changed}
    with self.assertRaisesRegex(ValueError, message):
      recommendation.recommend([(4, 16)], **arguments)
