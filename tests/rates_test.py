"""Tests of the X1 study: the chain against NumPy, shared programs, the files."""

import csv
import functools
import itertools
import math
import unittest.mock

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest

from bernoulli_lora_jax import chain
from bernoulli_lora_jax import links as links_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax.studies import numpy_chain
from bernoulli_lora_jax.studies import rates
from bernoulli_lora_jax.studies import regression
from bernoulli_lora_jax.studies import study
from bernoulli_lora_jax.tasks import linear_regression
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import programs

PROBS = {'rac_left': 1.0, 'rac_right': 0.0, 'bernoulli': 0.5}


class X64TestCase(parameterized.TestCase):
  """Float64; what a study sets for the process is put back."""

  @pytest.fixture(autouse=True)
  def _x64(self, tmp_path):
    self.tmp = tmp_path
    old = jax.config.jax_enable_x64
    jax.config.update('jax_enable_x64', True)
    yield
    jax.config.update('jax_enable_x64', old)

  def make(self, shape=(4, 6), batch_size=5):
    problem = linear_regression.make_problem(
        dim=shape[0] * shape[1], num_pretraining=60, num_samples=30
    )
    return problem, linear_regression.make_task(
        problem, batch_size=batch_size, shape=shape
    )


def make_method(task, estimator, name, factor, rank=2):
  return methods.gradient_method(
      task.loss,
      methods.make_transformation(name, factor / task.smoothness, rank=rank),
      estimator=estimator,
      num_samples=task.num_samples,
      batch_size=task.batch_size,
      momentum=regression.MOMENTUM,
  )


NAMES_QUICK = [
    ('gd', 'rac_left'),
    ('sgd', 'rac_right'),
    ('page', 'bernoulli'),
    ('mvr', 'bernoulli'),
]


class ChainTest(X64TestCase):
  """The library in float64 equals the plain loop fed with its draws."""

  NUM_STEPS = 20

  def draws(self, start, task, name):
    """Yields coin and frame of each link from the chain's key."""
    (found,) = chain.states(start.opt_state)
    params = task.init(jax.random.key(0))

    def draw(t):
      (link,) = links_lib.draw_links(
          jax.random.fold_in(found.key, t),
          matrices_lib.find(params),
          ranks=[2],
          probs=[PROBS[name]],
          sketch=sketches.gaussian(),
      )
      return link.coin, link.left, link.right

    coins, lefts, rights = jax.jit(jax.vmap(draw))(jnp.arange(self.NUM_STEPS))
    for t in range(self.NUM_STEPS):
      is_left = name == 'rac_left' if coins is None else bool(coins[t])
      yield is_left, np.asarray(lefts[t] if is_left else rights[t])

  def batches(self, task, key):
    """Yields the rows of each minibatch from the run's key."""
    batch_key = jax.random.fold_in(key, 1)
    for t in range(self.NUM_STEPS):
      yield np.asarray(task.batch(task.data, batch_key, t)['index'])

  def coins(self, start, task):
    """Yields PAGE's coins after the first step, from its key."""
    prob = task.batch_size / (task.batch_size + task.num_samples)
    for t in range(1, self.NUM_STEPS):
      key = jax.random.fold_in(start.opt_state[0].key, t)
      yield bool(jax.random.bernoulli(key, prob))

  @parameterized.parameters(*NAMES_QUICK)
  def test_equals_numpy(self, estimator, name):
    self.check_equals_numpy(estimator, name)

  @parameterized.parameters(
      *(
          case
          for case in itertools.product(regression.ESTIMATORS, regression.NAMES)
          if case not in NAMES_QUICK
      )
  )
  @pytest.mark.slow
  def test_equals_numpy_otherwise(self, estimator, name):
    self.check_equals_numpy(estimator, name)

  def check_equals_numpy(self, estimator, name):
    problem, task = self.make()
    method = make_method(task, estimator, name, 0.25)
    key = jax.random.key(7)
    start = programs.start(task, method, key)
    steps = functools.partial(programs.steps, task, method, 1, task.data)

    def body(state, t):
      return steps(state, key, t)[0], state.params['w']

    last, path = jax.jit(
        lambda start: jax.lax.scan(body, start, jnp.arange(self.NUM_STEPS))
    )(start)
    seen = []
    coins = list(self.coins(start, task)) if estimator == 'page' else []
    expected = numpy_chain.run(
        problem.x,
        problem.y,
        problem.regularisation,
        np.asarray(task.init(key)['w']),
        estimator=estimator,
        stepsize=0.25 / problem.smoothness,
        steps=self.draws(start, task, name),
        batches=self.batches(task, key),
        coins=iter(coins),
        num_steps=self.NUM_STEPS,
        momentum=regression.MOMENTUM,
        each=lambda step, w: seen.append((step, w.copy())),
    )
    if estimator == 'page':  # Both branches are taken.
      self.assertLess(0, sum(coins))
      self.assertLess(sum(coins), len(coins))
    self.assertEqual([step for step, _ in seen], list(range(self.NUM_STEPS)))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        path, [w for _, w in seen], rtol=1e-10, atol=1e-10 * scale
    )
    np.testing.assert_allclose(
        last.params['w'], expected, rtol=1e-10, atol=1e-10 * scale
    )
    moved = np.abs(expected - np.asarray(path[0])).max()
    self.assertGreater(moved, 1e-3 * scale)

  def test_gradient(self):
    problem, task = self.make()
    w = jnp.linspace(-2, 2, 24).reshape(4, 6)
    grad = jax.grad(lambda p: task.loss(p, task.data['train'], None)[0])(
        {'w': w}
    )
    found = numpy_chain.gradient(
        np.asarray(w).ravel(), problem.x, problem.y, problem.regularisation
    )
    np.testing.assert_allclose(found, grad['w'].ravel(), rtol=1e-10)

  @parameterized.parameters((0.3, 2), (1.0, 2), (0.0, 5))
  def test_draws(self, prob, rank):
    found = list(
        itertools.islice(
            numpy_chain.draws(np.random.default_rng(0), (3, 7), rank, prob), 400
        )
    )
    part = np.mean([is_left for is_left, _ in found])
    error = math.sqrt(prob * (1 - prob) / 400)
    self.assertLessEqual(abs(part - prob), 5 * error)
    for is_left, q in found[:20]:
      side = 3 if is_left else 7
      self.assertEqual(q.shape, (side, min(rank, side)))
      np.testing.assert_allclose(q.T @ q, np.eye(q.shape[1]), atol=1e-12)


class TaskShapeTest(X64TestCase):

  def test_shape_is_a_view(self):
    problem, wide = self.make((4, 6))
    _, flat = self.make((24, 1))
    tall = linear_regression.make_task(problem, batch_size=5, shape=(6, 4))
    for task, shape in ((wide, (4, 6)), (flat, (24, 1)), (tall, (6, 4))):
      w = task.init(jax.random.key(0))
      self.assertEqual(w['w'].shape, shape)
      np.testing.assert_array_equal(w['w'].ravel(), problem.start)
      self.assertEqual(
          float(task.loss(w, task.data['train'], None)[0]),
          float(
              wide.loss(wide.init(jax.random.key(0)), wide.data['train'], None)[
                  0
              ]
          ),
      )

  @parameterized.parameters(((5, 5),), ((4, 4),), (None,))
  def test_rejects(self, shape):
    problem, _ = self.make()
    with self.assertRaisesRegex(ValueError, 'Expected .*(24|got dim=24)'):
      linear_regression.make_task(problem, batch_size=5, shape=shape)


class TrainTest(X64TestCase):
  ARGUMENTS = dict(num_seeds=2, num_steps=12, num_evals=4, rank=2)

  @parameterized.parameters(['page'])
  def test_equals_single_runs(self, estimator):
    self.check_equals_single_runs(estimator)

  @parameterized.parameters(['mvr'])
  @pytest.mark.slow
  def test_equals_single_runs_otherwise(self, estimator):
    self.check_equals_single_runs(estimator)

  def check_equals_single_runs(self, estimator):
    _, task = self.make()
    factors = (0.125, 0.5)
    found = regression.train(
        task, estimator, 'bernoulli', factors=factors, **self.ARGUMENTS
    )
    self.assertEqual(found.passes.shape, (2, 5))
    self.assertEqual(found.norms.shape, (2, 2, 5))
    self.assertGreater(found.compile_seconds, 0)

    @jax.jit
    def single(key, factor):
      method = make_method(task, estimator, 'bernoulli', factor)
      steps = functools.partial(programs.steps, task, method, 1, task.data)

      def body(state, t):
        grad = jax.grad(lambda p: task.loss(p, task.data['train'], None)[0])
        measured = jnp.sum(grad(state.params)['w'] ** 2), state.data_passes
        return steps(state, key, t)[0], measured

      start = programs.start(task, method, key)
      norms, passes = jax.lax.scan(body, start, jnp.arange(13))[1]
      return norms[::3], passes[::3]

    for j, factor in enumerate(factors):
      for seed in range(2):
        norms, passes = single(jax.random.key(seed), factor)
        np.testing.assert_allclose(found.norms[seed, j], norms, rtol=1e-9)
        np.testing.assert_allclose(found.passes[seed], passes, rtol=1e-6)

  def test_probs_are_zipped_with_factors(self):
    _, task = self.make()
    found = regression.train(
        task,
        'gd',
        'bernoulli',
        factors=(1.0, 1.0),
        prob=[0.0, 1.0],
        **self.ARGUMENTS,
    )
    for j, name in enumerate(('rac_right', 'rac_left')):
      alone = regression.train(
          task, 'gd', name, factors=(1.0,), **self.ARGUMENTS
      )
      np.testing.assert_allclose(
          found.norms[:, j], alone.norms[:, 0], rtol=1e-9
      )

  @parameterized.parameters([3])
  def test_page_takes_full_gradients_when_asked(self, num_factors):
    self.check_page_takes_full_gradients_when_asked(num_factors)

  @parameterized.parameters([1])
  @pytest.mark.slow
  def test_page_takes_full_gradients_when_asked_otherwise(self, num_factors):
    self.check_page_takes_full_gradients_when_asked(num_factors)

  def check_page_takes_full_gradients_when_asked(self, num_factors):
    """The coin stays a branch: full gradients are those that passes count."""
    _, task = self.make()
    size, count = task.num_samples, [0, 0]

    def add(which):
      count[which] += 1

    def loss(params, batch, key):
      which = int(batch['x'].shape[0] != size)
      # With an operand of the stepsize's axis it would be called for each.
      jax.debug.callback(lambda: add(which))
      return task.loss(params, batch, key)

    counted = task._replace(loss=loss)
    found = regression.train(
        counted,
        'page',
        'bernoulli',
        factors=np.geomspace(0.1, 0.5, num_factors).tolist(),
        num_seeds=1,
        num_steps=24,
        num_evals=2,
        rank=2,
    )
    jax.effects_barrier()
    # passes = full + (T - full) 2 b / N, b / N = 1 / 6.
    full = (found.passes[0, -1] - 24 / 3) / (1 - 1 / 3)
    self.assertAlmostEqual(full, round(full), places=4)
    self.assertBetween(round(full), 1, 12)
    # And three for the evaluations; once or once a stepsize.
    self.assertIn(count[0], {k * (round(full) + 3) for k in (1, num_factors)})
    self.assertGreaterEqual(count[1], 24)

  def test_rejects(self):
    _, task = self.make()
    with self.assertRaisesRegex(ValueError, 'num_evals=5 to divide .*=12'):
      regression.train(
          task,
          'gd',
          'bernoulli',
          factors=(1.0,),
          **dict(self.ARGUMENTS, num_evals=5),
      )
    with self.assertRaisesRegex(ValueError, 'a task that knows L'):
      regression.train(
          task._replace(smoothness=None),
          'gd',
          'bernoulli',
          factors=(1.0,),
          **self.ARGUMENTS,
      )


def curves(norms):
  norms = np.asarray(norms, float)
  return regression.Curves(np.zeros(norms.shape[::2]), norms, 0.0, 0.0)


class PartsTest(X64TestCase):

  def test_num_steps_of(self):
    _, task = self.make()  # b / N = 1 / 6, q = 1 / 7
    for estimator, cost in (
        ('gd', 1),
        ('sgd', 1 / 6),
        ('page', 1 / 7 + 6 / 7 / 3),
        ('mvr', 1 / 3),
    ):
      found = regression.num_steps_of(task, estimator, 12.0, 4)
      self.assertEqual(found % 4, 0)
      self.assertLessEqual(abs(found * cost - 12), 2 * cost)
      self.assertEqual(regression.num_steps_of(task, estimator, 1e-9, 4), 4)

  def test_best_is_of_the_geometric_mean(self):
    nan = math.nan
    norms = [
        [[9, 1e-6], [9, 1.0], [9, nan], [9, 20.0]],
        [[9, 1e3], [9, 1.0], [9, 1e-9], [9, 20.0]],
    ]
    self.assertEqual(rates._best(curves(norms)), 0)
    self.assertEqual(rates._diverged(curves(norms)), 3)

  def test_steps_to_target(self):
    # 10^-(t + 1/2) crosses 10^-3 of its start at t = 3.
    row = 10.0 ** -(np.arange(6) + 0.5)
    slow = 10.0 ** (-0.8 * np.arange(6))  # At 3.75.
    found = rates._steps_to_target(curves([[row, slow, np.ones(6)]]))
    np.testing.assert_allclose(found[0, :2], [3, 3.75], rtol=1e-10)
    self.assertTrue(np.isnan(found[0, 2]))

  def test_interval(self):
    values = np.array([1.0, 10.0, 100.0])
    mean, half = rates._log_interval(values)
    np.testing.assert_allclose(np.exp(mean), 10.0)
    # t_{0.975, 2} = 4.3027 times ln(10) / sqrt(3).
    np.testing.assert_allclose(
        half, 4.302653 * math.log(10) / math.sqrt(3), rtol=1e-6
    )

  def test_rank_note(self):
    ranks = [1, 2, 4, 8, 16]
    steps = 64.0 / np.asarray(ranks)[:, None] * np.array([1.0, 1.1, 0.9])
    text = rates._rank_note(ranks, steps, 16)
    self.assertIn('for ranks 1 to 4 of 16', text)  # A quarter of the side.
    self.assertIn('r^(-1.000 +- 0.000)', text)
    self.assertNotIn('missed', text)
    steps[1, 0] = math.nan
    text = rates._rank_note(ranks, steps, 16)
    self.assertIn('missed the target at ranks [2]. Steps', text)
    self.assertIn('r^(-1.000', text)
    steps[2, 1] = math.nan
    self.assertIn('fewer than two', rates._rank_note(ranks, steps, 16))

  def test_timing(self):
    one = regression.Curves(np.zeros((2, 1)), np.zeros((2, 3, 1)), 1.0, 2.0, 30)
    other = regression.Curves(
        np.zeros((2, 1)), np.zeros((2, 1, 1)), 1.0, 3.0, 5
    )
    found = regression.timing([one, other], 2)
    self.assertEqual(found[:3], (5.0, 2.0, 35))
    self.assertEqual(found.part, 4 / 8)
    self.assertIn('NumPy loop 35 s (from 50% of the runs)', str(found))
    plain = one._replace(numpy_seconds=None)
    self.assertNotIn('NumPy', str(regression.timing([plain], 0)))

  def test_numpy_loop_of_some_runs(self):
    """Of 12 runs the first, the last and some between, or all."""
    problem, task = self.make(shape=(3, 8))
    seen = []

    def run(x, y, lam, start, *, stepsize, steps, **kwargs):
      seen.append((stepsize * problem.smoothness, start.shape, next(steps)[0]))

    arguments = dict(
        factors=(0.25, 1.0),
        num_seeds=6,
        num_steps=4,
        num_evals=2,
        rank=2,
        prob=[0.0, 1.0],
    )
    with unittest.mock.patch.object(regression.numpy_chain, 'run', run):
      for num_runs, count in ((1, 1), (5, 5), (100, 12)):
        seen.clear()
        seconds = regression.train_numpy(
            problem, task, 'gd', 'bernoulli', num_runs=num_runs, **arguments
        )
        self.assertLen(seen, count)
        self.assertGreater(seconds, 0)
      clock = unittest.mock.patch.object(
          regression.time, 'perf_counter', side_effect=[1.0, 4.0]
      )
      with clock:  # Three seconds for five of twelve runs.
        seconds = regression.train_numpy(
            problem, task, 'gd', 'bernoulli', num_runs=5, **arguments
        )
      self.assertAlmostEqual(seconds, 3 * 12 / 5)
      seen.clear()
      regression.train_numpy(
          problem, task, 'gd', 'bernoulli', num_runs=12, **arguments
      )
      self.assertEqual({shape for _, shape, _ in seen}, {(3, 8)})
      # The probs are zipped with the factors: p = 1 falls left.
      self.assertEqual(
          {(round(factor, 9), left) for factor, _, left in seen},
          {(0.25, False), (1.0, True)},
      )
      with self.assertRaisesRegex(ValueError, 'num_runs >= 1'):
        regression.train_numpy(
            problem, task, 'gd', 'bernoulli', num_runs=0, **arguments
        )

  def test_sizes(self):
    problem, task, wide = regression.make_tasks('smoke')
    params = lambda task: task.init(jax.random.key(0))['w']
    self.assertEqual(params(task).shape, (4, 4))
    self.assertEqual(params(wide).shape, (2, 8))
    self.assertEqual(task.batch_size, 4)
    self.assertEqual(task.smoothness, problem.smoothness)
    for size in regression.SIZES.values():
      self.assertEqual(math.prod(size.wide), size.dim)
      self.assertEqual(round(size.dim**0.5) ** 2, size.dim)

  @parameterized.parameters(
      (dict(size='tiny'), "size in .*got size='tiny'"),
      (dict(size='smoke', num_seeds=1), 'seeds >= 2, got seeds=1'),
      (dict(size='smoke', num_passes=0.0), 'passes > 0, got passes=0.0'),
      (dict(size='smoke', numpy_runs=-1), 'numpy >= 0, got numpy=-1'),
      (dict(size='smoke', factors=(0.0,)), r'factors > 0, got factors=\[0.0\]'),
      (dict(size='smoke', claims=('x',)), r"claims among .*claims=\('x',\)"),
  )
  def test_rejects(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      rates.rates(**arguments, progress=False)

  def test_rejects_nan_passes(self):
    with self.assertRaisesRegex(ValueError, 'passes > 0'):
      rates.rates('smoke', num_passes=math.nan, progress=False)


class StudyTest(X64TestCase):

  @pytest.mark.slow
  def test_smoke(self):
    found = rates.rates(
        'smoke',
        num_passes=8.0,
        num_seeds=2,
        factors=(0.25, 1.0),
        numpy_runs=2,
        progress=False,
    )
    self.check_study(found, 12)
    rows = found.tables['best stepsize a method']
    self.assertTrue(all(row['NumPy loop, s'] > 0 for row in rows))
    self.assertIn('NumPy loop', found.notes[1])

  @pytest.mark.slow
  def test_one_name(self):
    names = {'bernoulli': 'Bernoulli-LoRA'}
    with unittest.mock.patch.object(regression, 'NAMES', names):
      found = rates.rates(
          'smoke',
          num_passes=8.0,
          num_seeds=2,
          factors=(0.25, 1.0),
          progress=False,
      )
    self.check_study(found, 4)

  @pytest.mark.slow
  def test_claims_at_the_size_of_a_cpu(self):
    """d = 256: every claim of X1, at stepsizes that are near the best."""
    found = rates.rates(
        'small',
        num_seeds=3,
        factors=(2**-7, 2**-6, 0.5, 1.0),
        progress=False,
    )
    ends = {
        (row['estimator'], row['method']): row['end']
        for row in found.tables['best stepsize a method']
    }
    for name in regression.NAMES.values():
      self.assertLess(ends['PAGE', name], 1e-20)
      self.assertLess(ends['MVR', name], 0.6 * ends['SGD', name])
    # Linear in r, for ranks far below the side, and in lmin(p) on 8 x 32.
    few = found.tables['rank'][:3]
    steps = [row['steps to 1e-3'] for row in few]
    slope = np.polyfit(np.log([row['rank'] for row in few]), np.log(steps), 1)[
        0
    ]
    self.assertBetween(slope, -1.2, -0.9)
    probs = found.tables['prob']
    ratio = probs[0]['steps to 1e-3'] / probs[-1]['steps to 1e-3']
    self.assertBetween(ratio, 3.2, 6.0)  # lmin rises four times.
    for row in found.tables['bound']:
      self.assertEqual(row['held at all steps'], 'yes')
      self.assertBetween(row['T1 / measured'], 5, 50)

  def check_study(self, found, num_methods):
    self.assertEqual(
        set(found.tables), {'best stepsize a method', 'rank', 'prob', 'bound'}
    )
    self.assertEqual(
        set(found.figures), {'estimators', 'variance', 'rank', 'prob', 'bound'}
    )
    rows = found.tables['best stepsize a method']
    self.assertLen(rows, num_methods)
    for row in rows:
      self.assertIn(row['best stepsize'], ('2^-2/L', '2^0/L'))
      self.assertIn(
          row['stepsizes that diverged'], ('0 of 2', '1 of 2', '2 of 2')
      )
    ranks = found.tables['rank']
    self.assertEqual([row['rank'] for row in ranks], [1, 2, 4])
    self.assertEqual([row['lmin'] for row in ranks], [0.25, 0.5, 1.0])
    # T1 with every constant known holds, and not by nothing.
    for row in found.tables['bound']:
      self.assertEqual(row['held at all steps'], 'yes')
      self.assertGreater(row['T1 / measured'], 1)
      self.assertLess(row['T1 / measured'], 1e4)
    probs = found.tables['prob']
    self.assertLen(probs, 9)
    # Rank 2 of 2 x 8: lambda from 1/4 at p = 0 to 1 at p = 1; rank 2 trains 4
    # numbers on the right and 16 on the left.
    self.assertEqual((probs[0]['lmin'], probs[-1]['lmin']), (0.25, 1.0))
    self.assertEqual(probs[0]['trained a step'], 4)
    self.assertEqual(probs[-1]['trained a step'], 16)
    written = study.write(found, self.tmp / 'out', 'rates')
    self.assertEqual(
        {path.name for path in written},
        {
            'rates_estimators.png',
            'rates_variance.png',
            'rates_rank.png',
            'rates_prob.png',
            'rates_bound.png',
            'rates_best_stepsize_a_method.csv',
            'rates_rank.csv',
            'rates_prob.csv',
            'rates_bound.csv',
        },
    )
    for path in written:
      self.assertGreater(path.stat().st_size, 100 if path.suffix else 0)
    with open(self.tmp / 'out' / 'rates_rank.csv', newline='') as f:
      self.assertEqual(
          [row['rank'] for row in csv.DictReader(f)], ['1', '2', '4']
      )


class WriteTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path, capsys):
    self.tmp, self.capsys = tmp_path, capsys

  def make(self):
    figure = matplotlib.figure.Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2], [3, 4])
    return study.Study(
        {
            'Bound and run (T1)': [{'a': 1}, {'a': 2, 'b, c': 'x "y", z'}],
            'plain': [{'a': 0.5}],
        },
        {'curve': figure},
        ['One sentence.'],
    )

  def test_write(self):
    folder = self.tmp / 'deep' / 'out'
    written = study.write(self.make(), folder, 'audit')
    self.assertEqual(
        [path.name for path in written],
        ['audit_curve.png', 'audit_bound_and_run_t1.csv', 'audit_plain.csv'],
    )
    self.assertTrue(written[0].read_bytes().startswith(b'\x89PNG'))
    with open(written[1], newline='') as f:
      rows = list(csv.DictReader(f))
    self.assertEqual(
        rows, [{'a': '1', 'b, c': ''}, {'a': '2', 'b, c': 'x "y", z'}]
    )
    self.assertEqual(study.write(self.make(), folder, 'audit'), written)

  def test_show(self):
    study.show(self.make(), self.tmp, 'x')
    text = self.capsys.readouterr().out
    for part in ('Bound and run (T1)', '- One sentence.', 'x_plain.csv'):
      self.assertIn(part, text)
    study.show(self.make(), '', 'x')  # No directory: nothing is written.
    self.assertNotIn('.csv', self.capsys.readouterr().out)

  def test_appendix_is_written_and_not_printed(self):
    found = self.make()._replace(appendix={'All rows': [{'secret': 7}]})
    study.show(found, self.tmp, 'x')
    text = self.capsys.readouterr().out
    self.assertNotIn('secret', text)
    self.assertIn('x_all_rows.csv', text)
    with open(self.tmp / 'x_all_rows.csv', newline='') as f:
      self.assertEqual(list(csv.DictReader(f)), [{'secret': '7'}])

  def test_check_directory(self):
    folder = self.tmp / 'a' / 'b'
    study.check_directory(folder)
    self.assertEqual(list(folder.iterdir()), [])
    file = self.tmp / 'file'
    file.write_text('')
    for bad in (file, file / 'below'):
      with self.assertRaisesRegex(ValueError, 'Expected --figures to be'):
        study.check_directory(bad)

  def test_a_file_that_fails_leaves_the_old_one(self):
    study.write(self.make(), self.tmp, 'x')
    before = (self.tmp / 'x_curve.png').read_bytes()
    found = self.make()
    with unittest.mock.patch.object(
        found.figures['curve'], 'savefig', side_effect=OSError
    ):
      with self.assertRaises(OSError):
        study.write(found, self.tmp, 'x')
    self.assertEqual((self.tmp / 'x_curve.png').read_bytes(), before)
    names = {path.name for path in self.tmp.iterdir()}
    self.assertFalse([name for name in names if name.startswith('.')])
