"""Tests of section 6: closed forms, a plain loop, frozen factors, exponents."""

import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.studies import gap
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import exponents
from bernoulli_lora_jax.theory import generalization
from bernoulli_lora_jax.theory import problems

METHODS = generalization.methods(0.4)
LEFT, RIGHT, LORA, RAC_LEFT, RAC_RIGHT, BERNOULLI = METHODS
_M, _H, _N = 5, 4, 3  # Of the two-layer net.
_ALPHA, _LR, _MOMENTUM, _LINKS, _PERIOD = 1.5, 0.05, 0.8, 3, 4
# It moves what has no gradient.
_DECAYED = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(_LR))
_NORMALISED = optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.5))
_SGD = optax.sgd(_LR, momentum=_MOMENTUM)


def small_teacher(**kwargs):
  kwargs = {'shift': 1.0, 'noise': 0.5, **kwargs}
  return problems.make_teacher(jax.random.key(0), 6, 3, **kwargs)


def make_row(method, rank, size, seed=0):
  return generalization.Row(
      METHODS[method],
      rank,
      size,
      jax.random.key(seed),
      jax.random.key(seed + 9),
  )


@functools.cache
def teacher_grid():
  """Returns a teacher, and asymmetric LoRA on it nearly to the optimum."""
  teacher = small_teacher(noise=0.4)
  problem = problems.teacher_problem(teacher)
  grid = generalization.make_grid(
      problem, optax.sgd(0.4), max_rank=4, max_size=40, num_links=1, period=250
  )
  return teacher, functools.partial(
      generalization.measure, grid, teacher, jax.random.key(1), chunk=400
  )


def net_problem():
  """A linear net of two layers; examples from data['end'] on are spoilt."""
  keys = jax.random.split(jax.random.key(5), 3)
  params = {
      'a': jax.random.normal(keys[0], (_M, _H)) / 2,
      'b': jax.random.normal(keys[1], (_H, _N)) / 2,
  }

  def draw(data, key, num):
    x = jax.random.normal(key, (num, _M))
    x = jnp.where(jnp.arange(num)[:, None] < data['end'], x, data['spoilt'])
    return {'x': x, 'y': jnp.tanh(x[:, :_N]) + 1}

  def losses(params, batch):
    error = batch['x'] @ params['a'] @ params['b'] - batch['y']
    return 0.5 * jnp.sum(error**2, -1)

  return problems.Problem(
      name='net',
      params=params,
      data={
          'x': jnp.ones((7, _M)),
          'y': jnp.zeros((7, _N)),
          'end': jnp.asarray(99),
          'spoilt': jnp.zeros([]),
      },
      losses=losses,
      draw=draw,
      population=lambda params, data: jnp.mean(losses(params, data)),
  )


def run_net(row, data=None, *, tx=_SGD, problem_of=net_problem, **kwargs):
  """Returns (params, factors) of one run, compiled once for its settings."""
  finetune, usual = _compiled(problem_of, tx, **kwargs)
  return finetune(row, usual if data is None else data)


@functools.cache
def _compiled(problem_of, tx, **kwargs):
  problem = problem_of()
  settings = {
      'max_rank': 4,
      'max_size': 9,
      'num_links': _LINKS,
      'period': _PERIOD,
      'alpha': _ALPHA,
      **kwargs,
  }
  finetune = generalization.make_finetune(problem, tx, **settings)
  return jax.jit(finetune), problem.data


def plain_run(problem, row, frames):
  """One run in NumPy, factors and sample cut to their sizes, no mask.

  Args:
    problem: of `net_problem`.
    row: the run.
    frames: (link) -> {path: {'left', 'right'}}, as drawn, to be cut.
  """
  w = {path: np.array(value) for path, value in problem.params.items()}
  sample = problem.draw(problem.data, row.data_key, 9)
  x, y = (np.asarray(sample[name])[: row.size] for name in ('x', 'y'))
  scale = _ALPHA / row.rank
  product = lambda f, path: scale * f[path]['left'] @ f[path]['right']
  factors = None
  for link in range(_LINKS):
    if factors is None or row.method.is_chain:
      if factors is not None:
        w = {path: w[path] + product(factors, path) for path in w}
      factors = {
          path: {
              'left': np.array(pair['left'])[:, : row.rank],
              'right': np.array(pair['right'])[: row.rank],
          }
          for path, pair in frames(link).items()
      }
      # Zero is the one that trains.
      trained = [
          (path, side)
          for path, pair in factors.items()
          for side in pair
          if row.method.trains_both or not pair[side].any()
      ]
      speed = {key: 0.0 for key in trained}
    for _ in range(_PERIOD):
      a, b = (w[path] + product(factors, path) for path in ('a', 'b'))
      error = (x @ a @ b - y) / len(x)
      grads = {'a': x.T @ error @ b.T, 'b': (x @ a).T @ error}
      steps = {}
      for path, side in trained:
        pair = factors[path]
        steps[path, side] = scale * (
            grads[path] @ pair['right'].T
            if side == 'left'
            else pair['left'].T @ grads[path]
        )
      for path, side in trained:
        speed[path, side] = _MOMENTUM * speed[path, side] + steps[path, side]
        factors[path][side] = factors[path][side] - _LR * speed[path, side]
  return {path: w[path] + product(factors, path) for path in w}


@jax.jit
def _draw(key, method, rank):
  found = matrices_lib.find(net_problem().params)
  return generalization.draw_link(key, found, method, rank, 4)[0]


def frames_of(row):
  """Returns (link) -> the draws of a chain; others keep the first."""
  return lambda link: _draw(
      jax.random.fold_in(row.frame_key, link), row.method, row.rank
  )


class TeacherTest(parameterized.TestCase):

  @parameterized.parameters(None, 1)
  def test_population_loss_is_the_mean_of_fresh_examples(self, shift_rank):
    teacher = small_teacher(shift_rank=shift_rank)
    problem = problems.teacher_problem(teacher)
    delta = np.asarray(teacher.target - teacher.start, np.float64)
    self.assertAlmostEqual(np.linalg.norm(delta), 1.0, places=5)
    self.assertEqual(np.linalg.matrix_rank(delta, 1e-5), shift_rank or 3)
    batch = problem.draw(teacher, jax.random.key(1), 50_000)
    for weight in (teacher.start, teacher.start + 0.5, teacher.target):
      params = {'w': weight}
      losses = np.asarray(problem.losses(params, batch), np.float64)
      error = losses.std() / np.sqrt(len(losses))
      value = float(problem.population(params, teacher))
      self.assertLess(abs(losses.mean() - value), 5 * error)
      # It is no more than a few hundredths of the loss, so it can fail.
      self.assertLess(5 * error, 0.04 * value)

  @parameterized.parameters((LEFT, 'left', 4), (RIGHT, 'right', 1))
  def test_mean_gap_of_asymmetric_lora_has_its_closed_form(
      self, method, side, rank
  ):
    self.check_mean_gap_of_asymmetric_lora_has_its_closed_form(
        method, side, rank
    )

  @parameterized.parameters((LEFT, 'left', 1), (RIGHT, 'right', 3))
  @pytest.mark.slow
  def test_mean_gap_of_asymmetric_lora_has_its_closed_form_otherwise(
      self, method, side, rank
  ):
    self.check_mean_gap_of_asymmetric_lora_has_its_closed_form(
        method, side, rank
    )

  def check_mean_gap_of_asymmetric_lora_has_its_closed_form(
      self, method, side, rank
  ):
    teacher, measure = teacher_grid()
    size = 30
    gaps = measure(
        methods={method: METHODS[method]},
        ranks=[rank],
        sizes=[size],
        num_draws=400,
    )
    value = problems.expected_gap(teacher, side, rank, size)
    for values in (gaps.gap, gaps.controlled):
      error = values.std(ddof=1) / np.sqrt(values.size)
      self.assertLess(abs(values.mean() - value), 5 * error)
    # The twin has mean zero and takes noise away.
    self.assertLess(5 * error, 0.4 * value)
    if rank == 1:
      self.assertLess(gaps.controlled.std(), 0.8 * gaps.gap.std())

  def test_frozen_side_longer_than_the_rank_clips_it(self):
    teacher = small_teacher()
    values = [
        problems.expected_gap(teacher, 'right', rank, 30) for rank in (3, 5)
    ]
    self.assertEqual(*values)


class RunTest(parameterized.TestCase):

  @parameterized.product(method=list(METHODS), rank=(1, 3), size=(5, 9))
  def test_masked_run_equals_a_plain_loop(self, method, rank, size):
    with jax.enable_x64(True):
      problem = net_problem()
      row = make_row(method, rank, size)
      params, _ = run_net(row)
      expected = plain_run(problem, row, frames_of(row))
      # Rounding of 12 steps in float64.
      chex.assert_trees_all_close(params, expected, rtol=1e-9, atol=1e-10)

  @pytest.mark.slow
  def test_grid_is_its_runs_and_compiles_once(self):
    with jax.enable_x64(True):
      problem = net_problem()
      traces = []

      def losses(params, batch):
        traces.append(batch['x'].shape)
        return problem.losses(params, batch)

      grid = generalization.make_grid(
          problem._replace(losses=losses),
          optax.sgd(_LR, momentum=_MOMENTUM),
          max_rank=4,
          max_size=9,
          num_links=_LINKS,
          period=_PERIOD,
          alpha=_ALPHA,
      )
      run = lambda **kwargs: generalization.measure(
          grid,
          problem.data,
          jax.random.key(3),
          **{
              'methods': METHODS,
              'ranks': (1, 2, 4),
              'sizes': (4, 9),
              'num_draws': 2,
              'chunk': 11,
              **kwargs,
          },
      )
      gaps = run()
      self.assertEqual(grid.run._cache_size(), 1)
      first = len(traces)
      fewer = run(methods={LORA: METHODS[LORA]}, ranks=(2,), sizes=(7, 9))
      self.assertEqual(grid.run._cache_size(), 1)
      self.assertLen(traces, first)
      chex.assert_trees_all_equal(fewer.train[0, 0, 1], gaps.train[2, 1, 1])
      # Cells hold what their names say, whatever the chunk.
      frames, samples = jax.random.split(jax.random.key(3))
      for place in ((0, 1, 1, 0), (4, 0, 0, 1), (5, 2, 1, 1)):
        i, j, k, d = place
        row = generalization.Row(
            list(METHODS.values())[i],
            gaps.ranks[j],
            gaps.sizes[k],
            jax.random.fold_in(samples, d),
            jax.random.fold_in(frames, d),
        )
        params = plain_run(problem, row, frames_of(row))
        sample = problem.draw(problem.data, row.data_key, 9)
        cut = jax.tree.map(lambda x, n=row.size: x[:n], sample)
        train = np.mean(problem.losses(params, cut))
        population = np.mean(problem.losses(params, problem.data))
        np.testing.assert_allclose(gaps.train[place], train, rtol=1e-9)
        np.testing.assert_allclose(
            gaps.population[place], population, rtol=1e-9
        )
        np.testing.assert_allclose(
            gaps.gap[place], population - train, rtol=1e-8
        )
      self.assertEqual(np.abs(gaps.twin).max(), 0)

  @parameterized.parameters([3])
  def test_examples_beyond_the_size_have_no_effect(self, batch_size):
    self.check_examples_beyond_the_size_have_no_effect(batch_size)

  @parameterized.parameters([None])
  @pytest.mark.slow
  def test_examples_beyond_the_size_have_no_effect_otherwise(self, batch_size):
    self.check_examples_beyond_the_size_have_no_effect(batch_size)

  def check_examples_beyond_the_size_have_no_effect(self, batch_size):
    row = make_row(BERNOULLI, 2, 4)
    # Huge but finite: a full batch multiplies them by zero. A minibatch that
    # drew one would show it.
    spoilt = jnp.asarray(jnp.inf if batch_size else 1e4)
    data = net_problem().data
    run = lambda end: run_net(
        row,
        {**data, 'end': jnp.asarray(end), 'spoilt': spoilt},
        batch_size=batch_size,
    )[0]
    chex.assert_trees_all_equal(run(99), run(4))
    with self.assertRaises(AssertionError):  # The last one has an effect.
      chex.assert_trees_all_equal(run(99), run(3))

  def test_minibatches_draw_every_example_alike(self):
    x = jnp.arange(6.0)
    problem = problems.Problem(
        name='counts',
        params={'w': jnp.zeros((6, 1))},
        data=x,
        # The gradient by row i is the share of draws of example i.
        losses=lambda params, batch: -params['w'][batch.astype(int), 0],
        draw=lambda data, key, num: data[:num],
        population=lambda params, data: jnp.zeros([]),
    )
    steps, size, batch_size = 500, 4, 2
    params, _ = run_net(
        make_row(RIGHT, 1, size),
        problem_of=lambda: problem,
        tx=optax.sgd(1.0),
        max_rank=1,
        max_size=6,
        num_links=1,
        period=steps,
        batch_size=batch_size,
        alpha=None,
    )
    counts = np.asarray(params['w'][:, 0]) * batch_size
    # Binomial counts: 5 standard deviations.
    error = 5 * np.sqrt(steps * batch_size * 3 / 16)
    np.testing.assert_allclose(counts[:4], steps * batch_size / 4, atol=error)
    np.testing.assert_array_equal(counts[4:], 0)

  @parameterized.parameters(LEFT, RIGHT, RAC_LEFT, RAC_RIGHT)
  def test_frozen_factor_keeps_what_it_drew(self, method):
    row = make_row(method, 2, 9)
    _, factors = run_net(row, tx=_DECAYED)
    frames = frames_of(row)
    last = _LINKS - 1 if row.method.is_chain else 0
    side = 'left' if row.method.prob == 1 else 'right'
    other = 'right' if side == 'left' else 'left'
    for path, pair in frames(last).items():
      np.testing.assert_array_equal(factors[path][side], pair[side])
      self.assertTrue(np.all(np.asarray(pair[other]) == 0))
      moved = np.asarray(factors[path][other])
      moved = moved if other == 'right' else moved.T
      self.assertGreater(np.abs(moved[:2]).min(), 0)
      self.assertEqual(np.abs(moved[2:]).max(), 0)

  @parameterized.parameters([RIGHT])
  def test_optimiser_does_not_see_the_frozen_gradient(self, method):
    self.check_optimiser_does_not_see_the_frozen_gradient(method)

  @parameterized.parameters([LEFT])
  @pytest.mark.slow
  def test_optimiser_does_not_see_the_frozen_gradient_otherwise(self, method):
    self.check_optimiser_does_not_see_the_frozen_gradient(method)

  def check_optimiser_does_not_see_the_frozen_gradient(self, method):
    row = make_row(method, 2, 9)
    first, second = (
        run_net(row, tx=_NORMALISED, num_links=1, period=period)[1]
        for period in (1, 2)
    )
    # The length of a step is known where the norm is of what trains.
    step = jax.tree.map(lambda x, y: x - y, second, first)
    self.assertAlmostEqual(float(optax.tree.norm(step)), 0.5, places=5)

  def test_chains_draw_anew_and_add_ranks(self):
    for method, rank in ((LEFT, 1), (RIGHT, 1), (RAC_LEFT, 3), (RAC_RIGHT, 3)):
      with jax.enable_x64(True):
        problem = net_problem()
        row = make_row(method, 1, 9)
        params, _ = run_net(row)
        change = np.asarray(params['a'] - problem.params['a'])
        self.assertEqual(np.linalg.matrix_rank(change, 1e-9), rank)

  def test_lora_draws_uniform_and_trains_both(self):
    found = matrices_lib.find({'w': jnp.zeros((50, 7))})
    factors, moves = generalization.draw_link(
        jax.random.key(0), found, METHODS[LORA], 30, 40
    )
    left = np.asarray(factors['w']['left'])
    self.assertEqual(np.abs(factors['w']['right']).sum(), 0)
    self.assertLessEqual(np.abs(left).max(), 1 / np.sqrt(50))
    # Variance of 1,500 uniforms: 1 / (3 m) within 5 of its own errors, 11%.
    np.testing.assert_allclose(left[:, :30].var(), 1 / 150, rtol=0.12)
    self.assertEqual(np.abs(left[:, 30:]).sum(), 0)
    self.assertEqual(int(moves['w']['left'].sum()), 50 * 30)
    self.assertEqual(int(moves['w']['right'].sum()), 30 * 7)

  def test_first_columns_are_a_uniform_frame(self):
    found = matrices_lib.find({'w': jnp.zeros((6, 4))})
    draw = lambda key, prob: generalization.draw_link(
        key, found, generalization.Method(prob, True, False), 2, 5
    )
    num = 4000
    keys = jax.random.split(jax.random.key(0), num)
    factors, moves = jax.jit(jax.vmap(draw, (0, None)))(keys, 0.3)
    left, right = (
        np.asarray(factors['w'][side], np.float64) for side in ('left', 'right')
    )
    is_left = np.asarray(moves['w']['right']).any((1, 2))
    np.testing.assert_array_equal(
        is_left, ~np.asarray(moves['w']['left']).any((1, 2))
    )
    # Coins: 5 standard errors are 0.036.
    self.assertAlmostEqual(is_left.mean(), 0.3, delta=5 * np.sqrt(0.21 / num))
    for q, dim in ((left[is_left], 6), (right[~is_left].swapaxes(1, 2), 4)):
      gram = q.swapaxes(1, 2) @ q
      expected = np.diag([1.0, 1, 0, 0, 0])
      np.testing.assert_allclose(
          gram, np.broadcast_to(expected, gram.shape), atol=1e-5
      )
      h = q @ q.swapaxes(1, 2)
      error = h.std(0, ddof=1) / np.sqrt(len(h))
      self.assertLess(
          np.max(np.abs(h.mean(0) - 2 / dim * np.eye(dim)) / error), 5
      )
    self.assertEqual(np.abs(left[~is_left]).sum(), 0)
    self.assertEqual(np.abs(right[is_left]).sum(), 0)

  def test_ranks_beyond_a_side_are_clipped_and_stacks_draw_apart(self):
    rule = matrices_lib.Matrices(
        rules=(matrices_lib.Rule('w', (1,), (2,), (0,)),)
    )
    found = matrices_lib.find({'w': jnp.zeros((3, 4, 2))}, rule)
    for prob, side in ((1.0, 'left'), (0.0, 'right')):
      method = generalization.Method(prob, True, False)
      factors, _ = generalization.draw_link(
          jax.random.key(0), found, method, 5, 6
      )
      frozen = np.asarray(factors['w'][side])
      norms = np.sum(frozen**2, (1, 2))
      np.testing.assert_allclose(norms, 4 if side == 'left' else 2, rtol=1e-5)
      self.assertFalse(np.allclose(frozen[0], frozen[1]))

  def test_bernoulli_coins_differ_between_matrices_and_links(self):
    frames = frames_of(make_row(BERNOULLI, 1, 9))
    sides = np.array(
        [
            [bool(np.any(frames(i)[path]['left'])) for path in ('a', 'b')]
            for i in range(20)
        ]
    )
    self.assertGreater(len(np.unique(sides, axis=0)), 2)

  def test_fixed_sample_leaves_the_frames_alone_to_vary(self):
    _, measure = teacher_grid()
    run = lambda resample_data: measure(
        methods={RIGHT: METHODS[RIGHT]},
        ranks=(1, 3),
        sizes=(20,),
        num_draws=5,
        resample_data=resample_data,
    )
    fixed, fresh = run(False), run(True)
    chex.assert_trees_all_close(fixed.gap[..., 0], fresh.gap[..., 0])
    # All directions of the outputs: the frame does not matter.
    self.assertLess(fixed.gap[0, 1].std(), 1e-4)
    self.assertGreater(fresh.gap[0, 1].std(), 1e-2)
    self.assertGreater(fixed.gap[0, 0].std(), 1e-2)


def synthetic(
    rng, a, b, num_draws, noise, ranks=(1, 2, 4, 8), sizes=(32, 64, 128)
):
  """Power-law means; noise shared by the cells of a draw and their own."""
  r, n = np.meshgrid(ranks, sizes, indexing='ij')
  mean = 3.0 * r**a * n**b
  spread = noise * n**-0.5
  shared = rng.normal(size=num_draws)
  own = rng.normal(size=(len(ranks), len(sizes), num_draws))
  return mean[..., None] + spread[..., None] * (0.8 * shared + 0.6 * own)


class FitTest(parameterized.TestCase):
  ranks, sizes = (1, 2, 4, 8), (32, 64, 128)

  @parameterized.parameters((0.5, -0.5), (1.0, -1.2), (-0.3, -2.0))
  def test_power_laws_are_recovered(self, a, b):
    gaps = synthetic(np.random.default_rng(0), a, b, 4, 1e-9)
    fit = exponents.fit_exponents(gaps, self.ranks, self.sizes)
    self.assertAlmostEqual(fit.rank.value, a, places=6)
    self.assertAlmostEqual(fit.size.value, b, places=6)
    centre = 3 * 8 ** (a / 2) * 64**b
    self.assertAlmostEqual(fit.centre.value / centre, 1, places=6)
    scaled = exponents.fit_exponents(1e4 * gaps, self.ranks, self.sizes)
    self.assertAlmostEqual(scaled.rank.value, a, places=6)
    self.assertAlmostEqual(scaled.centre.value / centre, 1e4, places=1)

  def test_intervals_cover_and_errors_are_those_of_repetition(self):
    rng, truth = np.random.default_rng(1), (0.5, -0.9)
    fits, negative = [], 0
    for _ in range(200):
      gaps = synthetic(rng, *truth, 12, 1.0)
      negative += np.any(gaps.mean(-1) < 0)
      fits.append(
          exponents.fit_exponents(
              gaps, self.ranks, self.sizes, num_bootstraps=60
          )
      )
    # Some means are negative by chance: they are fitted all the same.
    self.assertGreater(negative, 3)
    # The centre feels the noise that cells share: draws are resampled whole.
    truth = {
        'rank': truth[0],
        'size': truth[1],
        'centre': 3 * 8 ** (truth[0] / 2) * 64 ** truth[1],
    }
    for name, value in truth.items():
      found = [getattr(fit, name) for fit in fits]
      covered = np.mean([one.low <= value <= one.high for one in found])
      # 95% of 200 have a standard error of 1.5%.
      self.assertBetween(covered, 0.90, 0.995)
      values = np.array([one.value for one in found])
      spread = np.quantile(values, (0.16, 0.84))
      error = np.median([one.error for one in found])
      self.assertBetween(error / np.diff(spread)[0] * 2, 0.8, 1.25)
      # No bias beyond 5 standard errors of the median.
      self.assertLess(
          abs(np.median(values) - value),
          5 * 1.25 * np.diff(spread)[0] / 2 / np.sqrt(200),
      )

  def test_level_and_seed(self):
    gaps = synthetic(np.random.default_rng(2), 0.5, -0.5, 10, 0.5)
    fit = lambda **kwargs: exponents.fit_exponents(
        gaps, self.ranks, self.sizes, **kwargs
    )
    self.assertEqual(fit(), fit())
    self.assertNotEqual(fit(), fit(seed=1))
    # Student's t of 9 degrees of freedom.
    for level, t in ((0.95, 2.262157), (0.5, 0.702722)):
      rank = fit(level=level).rank
      self.assertAlmostEqual((rank.high - rank.value) / rank.error, t, places=5)
      self.assertAlmostEqual((rank.value - rank.low) / rank.error, t, places=5)

  def test_spread_has_its_own_exponents(self):
    gaps = synthetic(np.random.default_rng(3), 0.5, -1.0, 2000, 2.0)
    fit = exponents.fit_exponents(
        gaps, self.ranks, self.sizes, statistic='sd', num_bootstraps=50
    )
    for value, truth in ((fit.rank, 0.0), (fit.size, -0.5)):
      self.assertLess(abs(value.value - truth), 5 * value.error)
      self.assertLess(value.error, 0.02)
    np.testing.assert_allclose(fit.centre.value, 2 * 64**-0.5, rtol=0.06)

  def test_noisy_cells_weigh_less(self):
    rng = np.random.default_rng(4)
    # A noisy small size that is off the law by chance, the rest exact.
    gaps = synthetic(rng, 0.5, -1.0, 50, 0.0)
    gaps += rng.normal(size=gaps.shape) * np.array([1e-1, 1e-4, 1e-7])[:, None]
    gaps[:, 0] += 0.05
    fit = exponents.fit_exponents(
        gaps, self.ranks, self.sizes, num_bootstraps=5
    )
    self.assertAlmostEqual(fit.size.value, -1.0, places=2)


def fake_task(
    criterion='cross_entropy', splits=('train', 'validation', 'test')
):
  rng = np.random.default_rng(0)
  sizes = {'train': 40, 'validation': 9, 'test': 12}
  data = {}
  for split in splits:
    x = rng.normal(size=(sizes[split], 4)).astype(np.float32)
    y = rng.integers(3, size=sizes[split]).astype(np.int32)
    if criterion != 'cross_entropy':
      y = y.astype(np.float32)
    data[split] = jax.tree.map(
        jnp.asarray,
        {'x': x, 'y': y, 'index': np.arange(sizes[split], dtype=np.int32)},
    )
  return task_lib.Task(
      name='fake',
      init=lambda key: {'w': jax.random.normal(key, (4, 3))},
      data=data,
      loss=lambda params, batch, key: (jnp.zeros([]), {}),
      batch=task_lib.uniform_batch(4),
      sampling='replacement',
      num_samples=40,
      batch_size=4,
      outputs=lambda params, batch: batch['x'] @ params['w'],
      criterion=criterion,
  )


class TaskProblemTest(parameterized.TestCase):

  @parameterized.parameters('cross_entropy', 'squared', 'absolute')
  def test_losses_and_population_are_the_tasks(self, criterion):
    task = fake_task(criterion)
    problem = problems.task_problem(task, jax.random.key(0))
    outputs = lambda split: np.asarray(
        task.data[split]['x'] @ problem.params['w'], np.float64
    )
    y = lambda split: np.asarray(task.data[split]['y'])

    def losses(split):
      o, t = outputs(split), y(split)
      if criterion == 'cross_entropy':
        return np.log(np.exp(o).sum(1)) - o[np.arange(len(t)), t]
      error = o[:, 0] - t
      return np.abs(error) if criterion == 'absolute' else error**2 / 2

    np.testing.assert_allclose(
        problem.losses(problem.params, task.data['train']),
        losses('train'),
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        problem.population(problem.params, problem.data),
        losses('test').mean(),
        rtol=1e-5,
    )

  def test_samples_are_distinct_and_the_test_part_is_one(self):
    task = fake_task()
    problem = problems.task_problem(task, jax.random.key(0), num_test=5)
    index = lambda key, num: np.asarray(
        problem.draw(problem.data, key, num)['index']
    )
    keys = jax.random.split(jax.random.key(1), 2)
    self.assertCountEqual(index(keys[0], 40), range(40))
    self.assertFalse(np.array_equal(index(keys[0], 40), index(keys[1], 40)))
    np.testing.assert_array_equal(index(keys[0], 7), index(keys[0], 40)[:7])
    self.assertLen(set(np.asarray(problem.data['test']['index'])), 5)
    without = fake_task(splits=('train', 'validation'))
    problem = problems.task_problem(without, jax.random.key(0))
    self.assertLen(problem.data['test']['index'], 9)


class StudyTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_tables_figures_and_notes(self):
    small = gap.Grid((1, 2), (24, 48), 4, 2, 4, optax.sgd(0.3), chunk=32)
    task = small._replace(sizes=(8, 16, 32), batch_size=4)
    study = gap.gap(
        fake_task(), teacher=small, on_task=task, prob=0.3, progress=False
    )
    cells = study.appendix['Gap of all cells']
    self.assertLen(cells, 6 * 2 * 2 + 6 * 2 * 3)
    self.assertLen(study.appendix['Fitted exponents'], 2 * 6 * 2)
    self.assertLen(study.appendix['Spread of single runs'], 2 * 6 * 2)
    self.assertLen({row['method'] for row in cells}, 6)
    self.assertLen(study.tables['Exponents of the gap'], 2 * 6)
    self.assertSameElements(
        study.figures,
        ['rank_teacher', 'size_teacher', 'rank_fake', 'size_fake', 'spread'],
    )
    for name in ('rank_teacher', 'size_fake'):
      self.assertLen(study.figures[name].axes, 6)
    teacher = [row for row in cells if row['problem'] == 'teacher']
    known = [row for row in teacher if 'closed form' in row]
    self.assertLen(known, 2 * 2 * 2)
    proportional = [r for r in known if r['method'] == RIGHT]
    for one, two in zip(proportional[:2], proportional[2:], strict=True):
      self.assertAlmostEqual(two['closed form'] / one['closed form'], 2)
    for row in cells:
      difference = row['population loss'] - row['training loss']
      # Where there is a twin, its gap is taken off.
      is_plain = abs(row['mean gap'] - difference) < 1e-5
      self.assertEqual(is_plain, row['problem'] == 'fake')
    for row in study.appendix['Spread of single runs']:
      frozen = row['sd over frozen factors, one sample']
      self.assertNotAlmostEqual(row['sd'], frozen, places=5)
    for row in study.appendix['Fitted exponents']:
      self.assertLess(row['size exponent low'], row['size exponent high'])
    notes = study.notes
    self.assertLen(notes, (6 + 4) + (6 + 2) + 2)
    self.assertIn('Bernoulli, p=0.3', notes[5])
    self.assertIn('for control variate', notes[6])
    self.assertNotIn('fitted', ' '.join(notes))  # No cell is.
    sd = [r for r in study.appendix['Fitted exponents'] if 'sd' in r['of']]
    for name, note in (('teacher', notes[8]), ('fake', notes[17])):
      ends = [
          (r['size exponent low'], r['size exponent high'])
          for r in sd
          if r['problem'] == name
      ]
      useful = [(low, high) for low, high in ends if high - low < 1]
      inside = sum(low <= -0.5 <= high for low, high in useful)
      self.assertIn('of 6 intervals of the exponent', note)
      self.assertIn(f'{len(useful)} are narrower than 1, and {inside} of', note)


TWO = np.zeros((2, 2, 4))


class RejectTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('prob', lambda: generalization.methods(1.1), r'prob in \[0, 1\]'),
      ('shift', lambda: small_teacher(shift=-1.0), 'shift >= 0'),
      ('noise', lambda: small_teacher(noise=float('nan')), 'noise >= 0'),
      (
          'shift_rank',
          lambda: small_teacher(shift_rank=4),
          r'shift_rank in \[1, 3\]',
      ),
      (
          'side',
          lambda: problems.expected_gap(small_teacher(), 'up', 1, 30),
          "side 'left' or 'right'",
      ),
      (
          'rank',
          lambda: problems.expected_gap(small_teacher(), 'left', 0, 30),
          'rank >= 1',
      ),
      (
          'size_left',
          lambda: problems.expected_gap(small_teacher(), 'left', 2, 3),
          'size > 3',
      ),
      (
          'size_right',
          lambda: problems.expected_gap(small_teacher(), 'right', 2, 7),
          'size > 7',
      ),
      ('period', lambda: run_net(None, period=0), 'period > 0'),
      ('alpha', lambda: run_net(None, alpha=0.0), 'alpha > 0'),
      (
          'batch_size',
          lambda: run_net(None, batch_size=0),
          'batch_size > 0',
      ),
      (
          'max_size',
          lambda: run_net(
              None, problem_of=lambda: net_problem()._replace(num_samples=8)
          ),
          'max_size <= 8',
      ),
      (
          'num_test',
          lambda: problems.task_problem(
              fake_task(), jax.random.key(0), num_test=13
          ),
          r'num_test in \[1, 12\]',
      ),
      (
          'held_out',
          lambda: problems.task_problem(
              fake_task(splits=('train',)), jax.random.key(0)
          ),
          "a split 'test' or 'validation'",
      ),
      (
          'criterion',
          lambda: problems.task_problem(fake_task('hinge'), jax.random.key(0)),
          "criterion='hinge'",
      ),
      (
          'outputs',
          lambda: problems.task_problem(
              fake_task()._replace(outputs=None), jax.random.key(0)
          ),
          'a task with outputs',
      ),
      (
          'one_rank',
          lambda: exponents.fit_exponents(TWO[:1], (1,), (2, 3)),
          'two ranks or more',
      ),
      (
          'falling',
          lambda: exponents.fit_exponents(TWO, (2, 1), (2, 3)),
          'ranks to rise',
      ),
      (
          'shape',
          lambda: exponents.fit_exponents(TWO, (1, 2), (2, 3, 4)),
          r'shape \(2, 3, draws',
      ),
      (
          'draws',
          lambda: exponents.fit_exponents(TWO[..., :2], (1, 2), (2, 3)),
          'draws >= 3',
      ),
      (
          'finite',
          lambda: exponents.fit_exponents(TWO + np.nan, (1, 2), (2, 3)),
          'finite gaps',
      ),
      (
          'statistic',
          lambda: exponents.fit_exponents(TWO, (1, 2), (2, 3), statistic='max'),
          "'mean' or 'sd'",
      ),
      (
          'level',
          lambda: exponents.fit_exponents(TWO, (1, 2), (2, 3), level=1.0),
          r'level in \(0, 1\)',
      ),
      (
          'bootstraps',
          lambda: exponents.fit_exponents(
              TWO, (1, 2), (2, 3), num_bootstraps=1
          ),
          'num_bootstraps >= 2',
      ),
  )
  def test_settings(self, call, message):
    with self.assertRaisesRegex(ValueError, message):
      call()

  @parameterized.parameters(
      ({'ranks': (0, 1)}, 'ranks to rise from 1'),
      ({'ranks': ()}, 'ranks to rise from 1'),
      ({'sizes': (4, 4)}, 'sizes to rise from 1'),
      ({'num_draws': 0}, 'num_draws > 0'),
      ({'chunk': 0}, 'chunk > 0'),
      ({'methods': {}}, 'at least one method'),
      ({'ranks': (1, 5)}, r'ranks <= 4, .*ranks=\(1, 5\)'),
      ({'sizes': (3, 10)}, r'sizes <= 9, .*sizes=\(3, 10\)'),
      ({'ranks': (1.5, 2)}, 'ranks to rise .* in whole numbers'),
      (
          {'methods': {'x': generalization.Method(2.0, True, False)}},
          r"prob in \[0, 1\], got prob=2.0 of 'x'",
      ),
  )
  def test_measure(self, change, message):
    kwargs = {
        'methods': METHODS,
        'ranks': (1, 2),
        'sizes': (3, 4),
        'num_draws': 2,
        **change,
    }
    with self.assertRaisesRegex(ValueError, message):
      generalization.measure(
          generalization.Program(lambda rows, data: None, 4, 9),
          None,
          jax.random.key(0),
          **kwargs,
      )
