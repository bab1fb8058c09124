"""Tests of the adapters that make a frozen ReLU net equal to another."""

import functools
import itertools
import math
from unittest import mock

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bernoulli_lora_jax import merging
from bernoulli_lora_jax.models import mlp
from bernoulli_lora_jax.studies import expressive as expressive_study
from bernoulli_lora_jax.theory import expressive

Layer = expressive.Layer


def make_kernel(rng, width, kind='gaussian'):
  """Entries of variance 1 / D, or an orthogonal matrix."""
  kernel = rng.normal(size=(width, width)) / math.sqrt(width)
  return np.linalg.qr(kernel)[0] if kind == 'orthogonal' else kernel


def make_nets(seed, width, depth, target_depth, kind='orthogonal'):
  rng = np.random.default_rng(seed)
  make = lambda kind: Layer(
      make_kernel(rng, width, kind), rng.normal(size=width)
  )
  frozen = [make(kind) for _ in range(depth)]
  return frozen, [make('gaussian') for _ in range(target_depth)]


def corners(width, bound=1.0):
  """All vertices of the box |x_j| <= bound."""
  return bound * np.array(list(itertools.product((-1.0, 1.0), repeat=width)))


def forward(layers, x):
  """A net in plain NumPy, with what goes into each ReLU."""
  before = []
  for i, layer in enumerate(layers):
    x = np.asarray(layer.kernel).T @ x + np.asarray(layer.bias)
    before.append(x)
    if i < len(layers) - 1:
      x = np.where(x > 0, x, 0)
  return x, before


def product(layers):
  return functools.reduce(np.matmul, [layer.kernel for layer in layers])


class FormulaTest(parameterized.TestCase):

  @parameterized.parameters(
      (16, 8, 2, 4),
      (16, 7, 2, 6),  # floor(7 / 2) = 3 layers a part.
      (5, 4, 2, 3),
      (8, 3, 3, 8),
      (8, 5, 3, 8),
      (3, 100, 1, 1),
  )
  def test_rank_threshold(self, width, depth, target_depth, expected):
    self.assertEqual(
        expressive.rank_threshold(width, depth, target_depth), expected
    )

  @parameterized.parameters((1, 1), (7, 4), (8, 4))
  def test_transformer_rank(self, size, expected):
    self.assertEqual(expressive.transformer_rank(size), expected)

  @parameterized.parameters(
      (0, 3, math.sqrt(30)), (1, 2, math.sqrt(5)), (3, 1, 1.0), (2, 2, 0.0)
  )
  def test_linear_error(self, rank, num_layers, expected):
    matrix = np.zeros((4, 6))
    matrix[[2, 0, 3, 1], [5, 1, 0, 2]] = [
        -4,
        3,
        2,
        -1,
    ]  # Singular values 4 to 1.
    found = expressive.linear_error(matrix, rank, num_layers)
    self.assertAlmostEqual(found, expected, places=12)

  @parameterized.parameters(
      ('width >= 1', lambda: expressive.rank_threshold(0, 2, 1)),
      ('target_depth=3, depth=2', lambda: expressive.rank_threshold(4, 2, 3)),
      ('target_depth=0', lambda: expressive.rank_threshold(4, 2, 0)),
      ('embedding_size >= 1', lambda: expressive.transformer_rank(0)),
      ('rank >= 0', lambda: expressive.linear_error(np.eye(2), -1, 1)),
      ('num_layers >= 1', lambda: expressive.linear_error(np.eye(2), 1, 0)),
      ('two dimensions', lambda: expressive.linear_error(np.ones(2), 1, 1)),
      (
          'finite discrepancy',
          lambda: expressive.linear_error(np.full((2, 2), np.nan), 1, 1),
      ),
  )
  def test_rejects(self, message, call):
    with self.assertRaisesRegex(ValueError, message):
      call()


class ProductTest(parameterized.TestCase):

  @parameterized.product(
      kind=('orthogonal', 'gaussian'),
      length_rank=((1, 3), (2, 2), (3, 1), (3, 2)),
  )
  def test_error_is_the_closed_form(self, kind, length_rank):
    length, rank = length_rank
    rng = np.random.default_rng(length)
    kernels = [make_kernel(rng, 7, kind) for _ in range(length)]
    target = make_kernel(rng, 7)
    pairs, _ = expressive.product_adapters(kernels, target, rank=rank)
    adapted = [
        k + p['left'] @ p['right'] for k, p in zip(kernels, pairs, strict=True)
    ]
    error = np.linalg.norm(functools.reduce(np.matmul, adapted) - target)
    frozen = functools.reduce(np.matmul, kernels)
    values = np.linalg.svd(target - frozen, compute_uv=False)
    # Rounding, magnified by condition numbers up to 1e3.
    np.testing.assert_allclose(
        error, np.sqrt(np.sum(values[rank * length :] ** 2)), rtol=1e-10
    )
    self.assertGreater(error, 0.01)

  def test_reference(self):
    """The reference's formula, for W = kernel^T, with explicit inverses."""
    rng = np.random.default_rng(0)
    kernels = [make_kernel(rng, 6) for _ in range(3)]
    target, rank = make_kernel(rng, 6), 2
    w = [k.T for k in kernels]
    u, s, vt = np.linalg.svd(target.T - w[2] @ w[1] @ w[0])
    new = []
    after = [w[2] @ w[1], w[2], np.eye(6)]
    for i in range(3):
      kept = slice(rank * i, rank * (i + 1))
      piece = u[:, kept] @ np.diag(s[kept]) @ vt[kept]
      before = functools.reduce(lambda a, b: b @ a, new, np.eye(6))
      new.append(w[i] + np.linalg.inv(after[i]) @ piece @ np.linalg.inv(before))
    pairs, condition = expressive.product_adapters(kernels, target, rank=rank)
    for pair, kernel, expected in zip(pairs, kernels, new, strict=True):
      found = kernel + pair['left'] @ pair['right']
      np.testing.assert_allclose(found, expected.T, rtol=1e-8, atol=1e-9)
    inverted = [after[0], after[1], new[0], new[1] @ new[0]]
    self.assertAlmostEqual(
        condition / max(np.linalg.cond(m) for m in inverted), 1, places=6
    )

  def test_shapes_and_idle_layers(self):
    """Five directions in slices of three: 3, 2 and none."""
    rng = np.random.default_rng(0)
    kernels = [make_kernel(rng, 5) for _ in range(3)]
    pairs, _ = expressive.product_adapters(kernels, make_kernel(rng, 5), rank=3)
    ranks = [np.linalg.matrix_rank(p['left'] @ p['right']) for p in pairs]
    self.assertEqual(ranks, [3, 2, 0])
    for pair in pairs:
      self.assertEqual(pair['left'].shape, (5, 3))
      self.assertEqual(pair['right'].shape, (3, 5))
      self.assertEqual(pair['left'].dtype, np.float64)
    self.assertFalse(pairs[1]['left'][:, 2].any())
    self.assertFalse(pairs[2]['left'].any() or pairs[2]['right'].any())

  @parameterized.parameters(1, 3)
  def test_equal_products_need_no_adapters(self, rank):
    rng = np.random.default_rng(0)
    kernels = [make_kernel(rng, 5), np.diag([1.0, 1, 1, 1, 0])]
    pairs, condition = expressive.product_adapters(
        kernels, kernels[0] @ kernels[1], rank=rank
    )
    self.assertFalse(any(pair['left'].any() for pair in pairs))
    self.assertEqual(condition, 1)

  def test_singular_where_nothing_is_inverted(self):
    """The first kernel is replaced, and a target need not be invertible."""
    rng = np.random.default_rng(0)
    kernels = [np.zeros((4, 4)), make_kernel(rng, 4)]
    target = np.diag([3.0, 2, 1, 0])
    pairs, _ = expressive.product_adapters(kernels, target, rank=4)
    adapted = kernels[0] + pairs[0]['left'] @ pairs[0]['right']
    np.testing.assert_allclose(adapted @ kernels[1], target, atol=1e-12)

  def test_terms_that_are_rounding_invert_nothing(self):
    """E has rank 1 but for rounding; the product after layer 0 is singular."""
    rng = np.random.default_rng(0)
    kernels = [make_kernel(rng, 5) for _ in range(3)]
    u, s, vt = np.linalg.svd(functools.reduce(np.matmul, kernels))
    target = u[:, 1:] @ np.diag(s[1:]) @ vt[1:]
    pairs, _ = expressive.product_adapters(kernels, target, rank=1)
    changed = [bool(pair['left'].any()) for pair in pairs]
    self.assertEqual(changed, [True, False, False])

  @parameterized.parameters(
      ([[1.0, 1], [1, 1]], 'kernels after layer 0.*condition='),
      ([[1.0, 0], [0, 1e-16]], 'kernels after layer 0.*condition=1e.16'),
  )
  def test_refuses_a_singular_product(self, second, message):
    kernels = [np.eye(2), np.array(second)]
    with self.assertRaisesRegex(ValueError, message):
      expressive.product_adapters(kernels, -np.eye(2), rank=1)

  def test_refuses_a_singular_prefix(self):
    """The first slice makes diag(0, 1) diag(3, 1), or else diag(0, 3)."""
    kernels = [np.diag([0.0, 1]), np.eye(2)]
    expressive.product_adapters(kernels, np.diag([3.0, 0]), rank=1)
    with self.assertRaisesRegex(
        ValueError, 'adapted kernels before layer 1.*condition=inf'
    ):
      expressive.product_adapters(kernels, np.diag([0.5, 3]), rank=1)

  @parameterized.parameters(
      (dict(kernels=[]), r'at least one kernel'),
      (dict(target=np.ones((3, 2))), r'\(D, D\), got target.shape=\(3, 2\)'),
      (dict(target=np.ones(3)), r'got target.shape=\(3,\)'),
      (
          dict(kernels=[np.eye(3), np.eye(2)]),
          r'kernels\[1\] of shape \(3, 3\), got \(2, 2\)',
      ),
      (dict(kernels=[np.full((3, 3), np.inf)]), 'finite kernels'),
      (dict(target=np.full((3, 3), np.nan)), 'finite target'),
      (dict(rank=1.5), r'a whole rank in \[1, 3\], got rank=1.5'),
      (dict(rank=0), r'rank in \[1, 3\], got rank=0'),
      (dict(rank=4), r'rank in \[1, 3\], got rank=4'),
  )
  def test_rejects(self, change, message):
    kwargs = dict(kernels=[np.eye(3)], target=2 * np.eye(3), rank=1) | change
    with self.assertRaisesRegex(ValueError, message):
      expressive.product_adapters(**kwargs)


class AdaptTest(parameterized.TestCase):

  @parameterized.parameters(
      # The tolerances that the guarantee names; what is found is far below.
      *[
          ('orthogonal', width, p, 1e-8)
          for width in (5, 16, 32)
          for p in (1, 2, 3, 4)
      ],
      *[
          ('gaussian', width, p, 1e-5)
          for width in (5, 16, 32)
          for p in (1, 2, 3)
      ],
  )
  def test_exact_at_the_threshold(self, kind, width, length, tolerance):
    rank = expressive.rank_threshold(width, 2 * length, 2)
    for seed in range(3):
      frozen, target = make_nets(seed, width, 2 * length, 2, kind)
      adapted = expressive.adapt(frozen, target, rank=rank, bound=2.0)
      rng = np.random.default_rng(seed + 100)
      inputs = rng.uniform(-2, 2, (50, width))
      inputs[:25] = 2 * np.sign(inputs[:25])
      layers = expressive.merge(frozen, adapted)
      gap = [forward(layers, x)[0] - forward(target, x)[0] for x in inputs]
      self.assertLessEqual(np.max(np.abs(gap)), tolerance)
      found = expressive.report(frozen, target, adapted, inputs)
      self.assertLessEqual(found.error, tolerance)
      self.assertLessEqual(max(found.linear_errors), tolerance)
      for pair in adapted.adapters:
        self.assertEqual(pair['left'].shape, (width, rank))
        self.assertEqual(pair['right'].shape, (rank, width))

  def test_one_below_the_threshold_is_not_exact(self):
    frozen, target = make_nets(0, 8, 4, 2)
    inputs = np.random.default_rng(0).uniform(-1, 1, (50, 8))
    rank = expressive.rank_threshold(8, 4, 2) - 1
    adapted = expressive.adapt(frozen, target, rank=rank, bound=1.0)
    found = expressive.report(frozen, target, adapted, inputs)
    np.testing.assert_allclose(
        found.linear_errors, found.expected_errors, rtol=1e-10
    )
    for i, part in enumerate((frozen[:2], frozen[2:])):
      gap = target[i].kernel - product(part)
      self.assertAlmostEqual(
          found.expected_errors[i], expressive.linear_error(gap, rank, 2)
      )
    self.assertGreater(min(found.linear_errors), 0.01)
    self.assertGreater(found.error, 0.01)

  @parameterized.parameters(
      (7, 2, (3, 4)), (5, 3, (1, 1, 3)), (4, 4, (1, 1, 1, 1)), (3, 1, (3,))
  )
  def test_remaining_layers_are_in_the_last_part(self, depth, num, lengths):
    frozen, target = make_nets(0, 6, depth, num)
    rank = expressive.rank_threshold(6, depth, num)
    adapted = expressive.adapt(frozen, target, rank=rank, bound=1.0)
    self.assertEqual(tuple(map(len, adapted.parts)), lengths)
    self.assertEqual(
        [i for part in adapted.parts for i in part], list(range(depth))
    )
    self.assertLen(adapted.biases, depth)
    found = expressive.report(frozen, target, adapted, corners(6))
    self.assertLess(found.error, 1e-10)

  @parameterized.parameters(1, 2)
  def test_inner_relus_are_active_on_the_box(self, rank):
    """Tight in the first part: each unit reaches zero at a corner."""
    width, bound = 4, 3.0
    frozen, target = make_nets(3, width, 6, 2, 'gaussian')
    adapted = expressive.adapt(frozen, target, rank=rank, bound=bound)
    layers = expressive.merge(frozen, adapted)
    rng = np.random.default_rng(0)
    inside = rng.uniform(-bound, bound, (200, width))
    inputs = np.concatenate([corners(width, bound), inside])
    before = np.array([forward(layers, x)[1] for x in inputs])
    least = before.min(0)
    np.testing.assert_allclose(least[:2], 0, atol=1e-10)
    self.assertGreater(least[3:5].min(), -1e-10)
    # The last ReLU of the first part clips, as the target's does.
    self.assertLess(least[2].min(), 0)
    beyond = [forward(layers, 1.01 * x)[1][0] for x in inputs]
    self.assertLess(np.min(beyond), -1e-3)  # Beyond the box they clip.

  def test_biases_of_later_parts_are_the_least_on_their_box(self):
    """Part 1 reduced to a known box: relu(x) on |x_j| <= 2 is [0, 2]^D."""
    rng = np.random.default_rng(1)
    target = [
        Layer(np.eye(3), np.zeros(3)),
        Layer(make_kernel(rng, 3), rng.normal(size=3)),
    ]
    frozen = [Layer(make_kernel(rng, 3), np.zeros(3)) for _ in range(4)]
    adapted = expressive.adapt(frozen, target, rank=2, bound=2.0)
    layers = expressive.merge(frozen, adapted)
    before = np.array([forward(layers, x)[1][2] for x in corners(3, 2.0)])
    np.testing.assert_allclose(before.min(0), 0, atol=1e-10)

  def test_the_bound_shifts_the_biases(self):
    """Beyond the bound inner ReLUs clip and the nets differ."""
    frozen, target = make_nets(0, 6, 4, 2)
    inputs = corners(6, 3.0)
    wide = expressive.adapt(frozen, target, rank=3, bound=3.0)
    narrow = expressive.adapt(frozen, target, rank=3, bound=1.0)
    self.assertLess(
        expressive.report(frozen, target, wide, inputs).error, 1e-10
    )
    gap = expressive.apply(
        expressive.merge(frozen, narrow), inputs
    ) - expressive.apply(target, inputs)
    self.assertGreater(np.max(np.abs(gap)), 0.1)

  def test_report(self):
    frozen, target = make_nets(1, 4, 4, 2, 'gaussian')
    adapted = expressive.adapt(frozen, target, rank=1, bound=1.0)
    inputs = np.random.default_rng(0).uniform(-1, 1, (20, 4))
    layers = expressive.merge(frozen, adapted)
    outputs = [
        np.array([forward(net, x)[0] for x in inputs])
        for net in (layers, target)
    ]
    found = expressive.report(frozen, target, adapted, inputs)
    self.assertAlmostEqual(
        found.error, np.max(np.abs(outputs[0] - outputs[1])), places=10
    )
    self.assertLess(outputs[0].min(), -0.1)
    outputs = [np.maximum(y, 0) for y in outputs]
    np.testing.assert_allclose(
        expressive.apply(layers, inputs, last_relu=True), outputs[0], atol=1e-10
    )
    found = expressive.report(frozen, target, adapted, inputs, last_relu=True)
    self.assertAlmostEqual(
        found.error, np.max(np.abs(outputs[0] - outputs[1])), places=10
    )
    parts = [
        expressive.product_adapters(
            [layer.kernel for layer in part], goal.kernel, rank=1
        )[1]
        for part, goal in zip((frozen[:2], frozen[2:]), target, strict=True)
    ]
    self.assertEqual(found.condition, max(parts))
    self.assertGreater(max(parts), 1)

  def test_adapters_of_the_package(self):
    """float32 in, float64 out; `unmerge` and the MLP agree."""
    frozen, target = make_nets(0, 6, 4, 2)
    single = lambda net: [Layer(*map(jnp.float32, layer)) for layer in net]
    frozen, target = single(frozen), single(target)
    adapted = expressive.adapt(frozen, target, rank=3, bound=1.0)
    inputs = np.random.default_rng(0).uniform(-1, 1, (20, 6))
    found = expressive.report(frozen, target, adapted, inputs)
    self.assertLess(found.error, 1e-10)
    layers = expressive.merge(frozen, adapted)
    with jax.enable_x64(True):
      tree = lambda net: {
          f'Dense_{i}': {
              'kernel': jnp.asarray(layer.kernel, jnp.float64),
              'bias': jnp.asarray(layer.bias, jnp.float64),
          }
          for i, layer in enumerate(net)
      }
      factors = {
          f'Dense_{i}/kernel': jax.tree.map(jnp.asarray, pair)
          for i, pair in enumerate(adapted.adapters)
      }
      restored = merging.unmerge(tree(layers), factors)
      for i, layer in enumerate(frozen):
        np.testing.assert_allclose(
            restored[f'Dense_{i}']['kernel'], layer.kernel, atol=1e-12
        )
      outputs = mlp.MLP((6,) * 4).apply({'params': tree(layers)}, inputs)
      np.testing.assert_allclose(
          np.asarray(outputs), expressive.apply(layers, inputs), atol=1e-10
      )

  @parameterized.parameters(
      (dict(bound=0.0), r'bound in \(0, inf\), got bound=0.0'),
      (dict(bound=-1.0), 'got bound=-1.0'),
      (dict(bound=math.inf), 'got bound=inf'),
      (dict(bound=math.nan), 'got bound=nan'),
      (dict(rank=4), r'rank in \[1, 3\], got rank=4'),
      (dict(rank=0), 'got rank=0'),
      (
          dict(target=[Layer(np.eye(3), np.zeros(3))] * 3),
          'target_depth <= depth in whole numbers, got target_depth=3, depth=2',
      ),
      (dict(target=[]), 'got target_depth=0'),
      (
          dict(target=[Layer(np.eye(2), np.zeros(2))]),
          r'target\[0\].kernel of shape \(3, 3\), got \(2, 2\)',
      ),
      (
          dict(frozen=[Layer(np.ones((3, 4)), np.zeros(3))]),
          r'frozen\[0\].kernel of shape \(3, 3\), got \(3, 4\)',
      ),
      (
          dict(frozen=[Layer(np.eye(3), np.zeros(4))]),
          r'frozen\[0\].bias of shape \(3,\), got \(4,\)',
      ),
      (
          dict(frozen=[Layer(np.full((3, 3), np.nan), np.zeros(3))]),
          r'finite frozen\[0\].kernel',
      ),
      (
          dict(target=[Layer(np.eye(3), np.full(3, np.inf))]),
          r'finite target\[0\].bias',
      ),
      (
          dict(frozen=[Layer(np.ones((3, 3)), np.zeros(3))] * 2),
          'non-singular product of the kernels after layer 0.*condition=',
      ),
  )
  def test_rejects(self, change, message):
    frozen, target = make_nets(0, 3, 2, 1)
    kwargs = dict(frozen=frozen, target=target, rank=2, bound=1.0) | change
    with self.assertRaisesRegex(ValueError, message):
      expressive.adapt(**kwargs)

  @parameterized.parameters(
      (np.zeros(3), r'\(num_samples, 3\), got inputs.shape=\(3,\)'),
      (np.zeros((2, 4)), r'got inputs.shape=\(2, 4\)'),
      (np.zeros((0, 3)), r'got inputs.shape=\(0, 3\)'),
      (np.full((2, 3), -1.5), r'<= 1.0, got max \|inputs\|=1.5'),
      (np.full((2, 3), np.nan), r'got max \|inputs\|=nan'),
  )
  def test_report_rejects(self, inputs, message):
    frozen, target = make_nets(0, 3, 2, 1)
    adapted = expressive.adapt(frozen, target, rank=2, bound=1.0)
    with self.assertRaisesRegex(ValueError, message):
      expressive.report(frozen, target, adapted, inputs)


class StudyTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_errors(self):
    """One test, as the study takes most of this file's time."""
    found = expressive_study.errors(
        width=4,
        lengths=(1, 2),
        num_seeds=3,
        num_samples=64,
        linear_steps=60,
        net_steps=150,
    )
    (rows,) = found.tables.values()
    self.check_rows(rows)
    self.check_product(rows)
    self.check_net(rows)
    self.check_figures(found.figures, rows)
    text = ' '.join(found.notes)
    # 2 kinds, 3 seeds, ranks (1, 2, 3) and 1 below, 4 and 2 at the threshold.
    self.assertRegex(text, r'Below the threshold descent on the ReLU.* of 24 ')
    self.assertRegex(
        text, r'At the threshold descent.* in 0 of 12 cases, worse'
    )

  def check_rows(self, rows):
    found = [
        (r['frozen'], r['layers a part'], r['rank'], r['threshold'])
        for r in rows
    ]
    self.assertEqual(
        found,
        [
            (kind, length, rank, 4 // length)
            for length, ranks in ((1, (1, 2, 3, 4)), (2, (1, 2)))
            for kind in ('orthogonal', 'gaussian')
            for rank in ranks
        ],
    )
    for row in rows:
      self.assertGreaterEqual(
          row['condition, largest'], row['condition, median']
      )

  def check_product(self, rows):
    """Rows have three digits."""
    for row in rows:
      if row['rank'] == row['threshold']:
        self.assertEqual(row['closed form'], 0)
        self.assertLess(row['construction'], 1e-10)
      else:
        self.assertBetween(row['closed form'], 0.01, 0.99)
        self.assertEqual(row['construction'], row['closed form'])
        self.assertGreaterEqual(row['descent'], row['closed form'])
      if row['layers a part'] == 1:
        # Descent on the best approximation of one matrix has no bad minima.
        self.assertAlmostEqual(row['descent'], row['closed form'], delta=2e-3)

  def check_net(self, rows):
    for row in rows:
      learnt = row['net, descent, samples learnt']
      # The deviation of the target is what its mean alone would leave.
      self.assertBetween(learnt, 1e-4, 0.99)
      self.assertBetween(row['net, descent'], 0.8 * learnt, 3.0)
      if row['rank'] == row['threshold']:
        self.assertLess(row['net, construction'], 1e-10)
        self.assertLess(row['largest net error, construction'], 1e-10)
      else:
        self.assertGreater(row['net, construction'], 0.01)
    total = lambda name: sum(row[name] for row in rows)
    self.assertGreater(
        total('net, descent'), 1.05 * total('net, descent, samples learnt')
    )
    first = {
        r['rank']: r['net, descent, samples learnt']
        for r in rows
        if r['layers a part'] == 1 and r['frozen'] == 'orthogonal'
    }
    self.assertLess(first[4], 0.5 * first[1])

  def check_figures(self, figures, rows):
    self.assertEqual(set(figures), {'product', 'net'})
    for name, curves in (('product', 3), ('net', 2)):
      figure = figures[name]
      self.assertLen(figure.axes, 4)
      for panel in figure.axes:
        self.assertEqual(panel.get_yscale(), 'log')
        self.assertLen(panel.containers, curves)
        self.assertTrue(all(line.has_yerr for line in panel.containers))
      figure.canvas.draw()
    row = rows[0]
    line = figures['product'].axes[0].containers[0][0]
    np.testing.assert_allclose(
        line.get_ydata()[0], row['closed form'], rtol=6e-3
    )

  def test_delta_has_the_rank(self):
    kernels = jnp.zeros((2, 5, 5))
    start = expressive_study._start(kernels, jax.random.key(0))
    self.assertFalse(expressive_study._delta(start, jnp.int32(5)).any())
    start['left'] = 1 + start['right'].mT
    delta = expressive_study._delta(start, jnp.int32(2))
    expected = start['left'][..., :2] @ start['right'][:, :2]
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-6)

  def test_traced_net_is_the_net(self):
    frozen, _ = make_nets(0, 4, 3, 1)
    inputs = np.random.default_rng(0).normal(size=(9, 4))
    with jax.enable_x64(True):
      stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *frozen)
      outputs = expressive_study._apply(stacked, jnp.asarray(inputs))
    np.testing.assert_allclose(
        outputs, [forward(frozen, x)[0] for x in inputs], atol=1e-12
    )

  def test_errors_of_nets(self):
    """Relative to the target's deviation; descent stays where it starts."""
    stay = lambda loss, params, tx, num_steps: params
    with (
        jax.enable_x64(True),
        mock.patch.object(expressive_study, '_descend', stay),
    ):
      key = jax.random.key(0)
      draw = expressive_study._draw(key, 'gaussian', 4, 4, 2, 30)
      started = expressive_study._descend_net(draw, jnp.int32(2), key, 1)
      built = expressive_study._construct(draw, 1)
    draw = jax.tree.map(np.asarray, draw)
    frozen, target = (
        [Layer(*layer) for layer in zip(*draw[name], strict=True)]
        for name in ('frozen', 'target')
    )
    run = lambda net, name: np.array([forward(net, x)[0] for x in draw[name]])

    def relative(net, name):
      outputs = run(target, name)
      deviation = outputs - outputs.mean(0)
      return math.sqrt(
          np.sum((run(net, name) - outputs) ** 2) / np.sum(deviation**2)
      )

    expected = [relative(frozen, name) for name in ('fresh', 'inputs')]
    np.testing.assert_allclose(np.asarray(started), expected, rtol=1e-10)
    adapted = expressive.adapt(frozen, target, rank=1, bound=1.0)
    layers = expressive.merge(frozen, adapted)
    self.assertAlmostEqual(built['net construction'], relative(layers, 'fresh'))

  def test_draws(self):
    with jax.enable_x64(True):
      draw = expressive_study._draw(
          jax.random.key(0), 'orthogonal', 8, 3, 2, 500
      )
    draw = jax.tree.map(np.asarray, draw)
    for kernel in draw['frozen'].kernel:
      np.testing.assert_allclose(kernel.T @ kernel, np.eye(8), atol=1e-12)
    self.assertEqual(draw['target'].kernel.shape, (2, 8, 8))
    # 5 standard errors: of the mean square of 128 normals, of uniform inputs.
    self.assertAlmostEqual(
        8 * np.mean(draw['target'].kernel ** 2), 1, delta=5 / 8
    )
    self.assertBetween(np.max(np.abs(draw['inputs'])), 0.99, 1.0)
    self.assertFalse((draw['inputs'] == draw['fresh']).any())

  def test_log_mean(self):
    values = np.array([1.0, 4.0])
    self.assertAlmostEqual(expressive_study._log_mean(values), 2)
    self.assertAlmostEqual(expressive_study._log_mean(0 * values) / 1e-16, 1)

  @parameterized.parameters(
      (dict(width=1), 'width >= 2, got width=1'),
      (dict(lengths=()), r'min\(lengths\) >= 1'),
      (dict(lengths=(2, 0)), r'min\(lengths\) >= 1'),
      (dict(target_depth=0), 'target_depth >= 1'),
      (dict(num_seeds=0), 'num_seeds >= 1'),
      (dict(num_samples=0), 'num_samples >= 1'),
      (dict(linear_steps=0), 'linear_steps >= 1'),
      (dict(net_steps=0), 'net_steps >= 1'),
  )
  def test_rejects(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      expressive_study.errors(**change)
