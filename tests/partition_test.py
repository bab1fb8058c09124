"""Tests of who has which examples, and of the losses and samples of clients."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bernoulli_lora_jax import clients as clients_lib
from bernoulli_lora_jax.tasks import partition
from bernoulli_lora_jax.tasks import task as task_lib

NUM_LABELS = 4
LABELS = np.random.default_rng(0).integers(NUM_LABELS, size=200)


def sizes(parts):
  return np.array([len(part) for part in parts])


class RowsTest(parameterized.TestCase):
  """Each row has one client, and each client a row."""

  def assert_dealt(self, parts, num_samples, num_clients):
    self.assertLen(parts, num_clients)
    self.assertGreater(sizes(parts).min(), 0)
    for part in parts:
      np.testing.assert_array_equal(part, np.sort(part))
    np.testing.assert_array_equal(
        np.sort(np.concatenate(parts)), np.arange(num_samples)
    )

  @parameterized.product(
      case=[(1, 1), (5, 1), (7, 7), (20, 6), (21, 6), (25, 10), (1000, 37)],
      unequal=(False, True),
  )
  def test_iid(self, case, unequal):
    num_samples, num_clients = case
    for seed in range(20):
      parts = partition.iid(
          num_samples, num_clients, seed=seed, unequal=unequal
      )
      self.assert_dealt(parts, num_samples, num_clients)
      if not unequal:
        self.assertLessEqual(np.ptp(sizes(parts)), 1)

  @parameterized.product(
      num_clients=(1, 3, 50, 200), alpha=(1e-300, 1e-3, 0.1, 1.0, 1e6)
  )
  def test_dirichlet(self, num_clients, alpha):
    for seed in range(5):
      parts = partition.dirichlet(LABELS, num_clients, alpha=alpha, seed=seed)
      self.assert_dealt(parts, len(LABELS), num_clients)

  def test_by_group(self):
    groups = np.array(['b', 'c', 'a', 'b', 'b', 'c'])
    parts = partition.by_group(groups)
    self.assert_dealt(parts, 6, 3)
    expected = [[2], [0, 3, 4], [1, 5]]  # In sorted order.
    for part, rows in zip(parts, expected, strict=True):
      np.testing.assert_array_equal(part, rows)
    chex.assert_trees_all_equal(partition.by_group(list(groups)), parts)

  @parameterized.named_parameters(
      ('iid', lambda seed: partition.iid(60, 7, seed=seed)),
      ('unequal', lambda seed: partition.iid(60, 7, seed=seed, unequal=True)),
      (
          'dirichlet',
          lambda seed: partition.dirichlet(LABELS, 7, alpha=0.5, seed=seed),
      ),
  )
  def test_seed(self, deal):
    chex.assert_trees_all_equal(deal(3), deal(3))
    same = lambda x, y: len(x) == len(y) and np.all(x == y)
    pairs = zip(deal(3), deal(4), strict=True)
    self.assertFalse(any(same(x, y) for x, y in pairs))

  def test_weights(self):
    parts = [np.arange(1), np.arange(1, 4), np.arange(4, 10)]
    self.assertEqual(partition.weights(parts, 'size'), [0.1, 0.3, 0.6])
    self.assertEqual(partition.weights(parts, 'uniform'), [1 / 3] * 3)
    with self.assertRaisesRegex(ValueError, "'size' or 'uniform', got 'sizes'"):
      partition.weights(parts, 'sizes')

  def test_describe(self):
    parts = [np.array([0, 2]), np.array([1, 3, 4])]
    labels = np.array([7, 9, 7, 9, 7])
    rows = partition.client_table(parts, labels)
    self.assertEqual(
        rows,
        [
            {'client': 0, 'examples': 2, 'label 7': 2, 'label 9': 0},
            {'client': 1, 'examples': 3, 'label 7': 1, 'label 9': 2},
        ],
    )
    self.assertEqual(
        partition.client_table(parts),
        [{'client': 0, 'examples': 2}, {'client': 1, 'examples': 3}],
    )

  @parameterized.parameters((0, 'iid'), (6, 'iid'), (0, 'dir'), (6, 'dir'))
  def test_rejects_number_of_clients(self, num_clients, name):
    with self.assertRaisesRegex(
        ValueError, rf'num_clients in \[1, 5\].* got num_clients={num_clients}'
    ):
      if name == 'iid':
        partition.iid(5, num_clients, seed=0)
      else:
        partition.dirichlet(np.zeros(5), num_clients, alpha=1.0, seed=0)

  @parameterized.parameters(0.0, -1.0, np.nan)
  def test_rejects_alpha(self, alpha):
    with self.assertRaisesRegex(ValueError, f'alpha > 0.* got alpha={alpha}'):
      partition.dirichlet(LABELS, 2, alpha=alpha, seed=0)

  def test_rejects_infinite_alpha(self):
    with self.assertRaisesRegex(ValueError, 'got alpha=inf'):
      partition.dirichlet(LABELS, 2, alpha=np.inf, seed=0)


class LawTest(parameterized.TestCase):
  """Proportions against their law over many seeds."""

  num_seeds = 4000

  def assert_mean(self, samples, expected, bias=0.0):
    """Mean over axis 0 within 5 computed standard errors, and a bias."""
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    np.testing.assert_array_less(
        np.abs(samples.mean(0) - expected), 5 * error + bias
    )

  @parameterized.parameters(0.3, 2.0)
  def test_dirichlet_proportions(self, alpha):
    num_clients, each = 3, 1000
    labels = np.repeat(np.arange(2), each)
    counts = np.zeros((self.num_seeds, num_clients, 2))
    for seed in range(self.num_seeds):
      parts = partition.dirichlet(labels, num_clients, alpha=alpha, seed=seed)
      for client, part in enumerate(parts):
        counts[seed, client] = np.bincount(labels[part], minlength=2)
    shares = counts / each
    mean = 1 / num_clients
    variance = mean * (1 - mean) / (num_clients * alpha + 1)
    # A cut is rounded to 1/1000: half of it at either end. A filled client is as
    # little.
    rounding = 1 / each
    self.assert_mean(shares, mean, rounding)
    centred = shares - mean
    products = centred[:, :, None, :] * centred[:, None, :, :]
    covariance = np.full((num_clients, num_clients), -variance / 2)
    np.fill_diagonal(covariance, variance)
    expected = np.repeat(covariance[..., None], 2, axis=2)
    self.assert_mean(products, expected, rounding / 4)
    # Over clients and labels at once, which is sharper.
    total = np.mean(np.sum(centred**2, axis=1), axis=1)
    self.assert_mean(total, num_clients * variance, rounding / 4)
    # Labels are dealt independently.
    self.assert_mean(centred[..., 0] * centred[..., 1], 0.0, rounding / 4)

  def test_small_alpha_separates_labels(self):
    def labels_of_a_client(alpha):
      numbers = []
      for seed in range(20):
        parts = partition.dirichlet(LABELS, 4, alpha=alpha, seed=seed)
        numbers += [len(np.unique(LABELS[part])) for part in parts]
      return np.mean(numbers)

    self.assertLess(labels_of_a_client(0.01), 2)
    self.assertEqual(labels_of_a_client(1e6), NUM_LABELS)
    parts = partition.dirichlet(LABELS, 4, alpha=1e6, seed=0)
    np.testing.assert_allclose(sizes(parts), 50, atol=3)

  def test_which_examples_of_a_label_is_random(self):
    """The first of a label goes to each client as often as the last."""
    labels = np.zeros(30, int)
    owner = lambda parts, row: [row in part for part in parts].index(True)
    for row in (0, 29):
      owners = [
          owner(partition.dirichlet(labels, 3, alpha=1e6, seed=seed), row)
          for seed in range(600)
      ]
      counts = np.bincount(owners, minlength=3)
      self.assertLess(np.sum((counts - 200) ** 2 / 200), 27.6)  # P = 1e-6.

  def test_iid_is_uniform(self):
    owner = np.zeros((600, 30), int)
    for seed in range(len(owner)):
      for client, part in enumerate(partition.iid(30, 3, seed=seed)):
        owner[seed, part] = client
    for row in (0, 29):
      counts = np.bincount(owner[:, row], minlength=3)
      self.assertLess(np.sum((counts - 200) ** 2 / 200), 27.6)  # P = 1e-6.

  @pytest.mark.slow
  def test_unequal_sizes_are_log_normal(self):
    """log n_1 - log n_0 ~ N(0, 2)."""
    ratios = []
    for seed in range(self.num_seeds):
      first, second = sizes(partition.iid(20_000, 2, seed=seed, unequal=True))
      ratios.append(np.log(first / second))
    ratios = np.array(ratios)
    self.assert_mean(ratios, 0.0)
    self.assert_mean(ratios**2, 2.0, 0.01)  # Cuts are rounded to 1/20,000.


def least_squares(rate=0.0):
  """Returns the loss of a task: a mean over examples, with dropout noise."""

  def loss(params, batch, key):
    x = batch['x']
    if key is not None and rate:
      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch['index'])
      draw = lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:])
      x = jnp.where(jax.vmap(draw)(keys), x / (1 - rate), 0)
    rest = jnp.matmul(x, params['w']) + params['b'][None] - batch['y']
    value = 0.5 * jnp.mean(jnp.sum(rest**2, axis=1))
    metrics = {'error': jnp.mean(jnp.abs(rest)), 'first': rest[:, 0].mean()}
    return value, metrics

  return loss


class ClientsTest(parameterized.TestCase):
  """Losses and samples of padded clients."""

  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))
    rng = np.random.default_rng(1)
    num = 12
    self.split = {
        'x': jnp.asarray(rng.normal(size=(num, 3))),
        'y': jnp.asarray(rng.normal(size=(num, 2))),
        'index': jnp.arange(num, dtype=jnp.int32),
    }
    self.params = {
        'w': jnp.asarray(rng.normal(size=(3, 2))),
        'b': jnp.asarray(rng.normal(size=2)),
    }
    self.parts = [
        np.array([1, 4, 5, 9, 10]),
        np.array([7]),
        np.array([0, 2, 3, 6, 8, 11]),
    ]
    self.clients = partition.client_data(self.split, self.parts)

  def value_and_grad(self, loss):
    return jax.value_and_grad(loss, has_aux=True)

  def test_client_data(self):
    chex.assert_shape(self.clients['x'], (3, 6, 3))
    chex.assert_shape(self.clients['mask'], (3, 6))
    self.assertEqual(self.clients['mask'].dtype, jnp.float32)
    for i, part in enumerate(self.parts):
      mask = np.arange(6) < len(part)
      np.testing.assert_array_equal(self.clients['mask'][i], mask)
      for name, x in self.split.items():
        np.testing.assert_array_equal(
            self.clients[name][i, : len(part)], x[part]
        )

  def each(self, loss, key):
    """Returns (value, metrics), gradients of all clients, stacked."""
    one = self.value_and_grad(partition.client_loss(loss))
    mapped = jax.jit(jax.vmap(one, (None, 0, None)))
    return mapped(self.params, self.clients, key)

  @parameterized.parameters((None, 0.0), (5, 0.4))
  def test_loss_is_that_of_the_examples_without_padding(self, seed, rate):
    key = None if seed is None else jax.random.key(seed)
    self.assert_losses(key, least_squares(rate), 1e-6)
    if rate:  # The noise is there.
      loss = least_squares(rate)
      values = [loss(self.params, self.split, k)[0] for k in (key, None)]
      self.assertGreater(abs(values[0] - values[1]), 1e-3)

  @pytest.mark.slow
  def test_loss_in_float64(self):
    self.assert_losses(None, least_squares(), 1e-14)

  def assert_losses(self, key, loss, atol):
    got = self.each(loss, key)
    exact = self.value_and_grad(loss)
    for i, part in enumerate(self.parts):
      expected = exact(self.params, task_lib.take(self.split, part), key)
      mine = jax.tree.map(lambda x: x[i], got)  # noqa: B023 (used now)
      chex.assert_trees_all_close(mine, expected, rtol=0, atol=atol)
    # Weighted by size, f is the mean over all examples.
    clients = clients_lib.make_clients(
        3, partition.weights(self.parts, 'size'), None
    )
    total = clients_lib.weighted_sum(got, clients.weights)
    expected = exact(self.params, self.split, key)
    chex.assert_trees_all_close(total, expected, rtol=0, atol=atol)

  def spoilt(self):
    """Returns the clients with NaN as padding."""
    spoil = lambda x: jnp.where(
        jnp.expand_dims(self.clients['mask'], range(2, x.ndim)) > 0, x, np.nan
    )
    return {
        name: spoil(x) if name in 'xy' else x
        for name, x in self.clients.items()
    }

  def test_nan_in_padding_is_no_part_of_the_value(self):
    loss = least_squares()
    expected, _ = self.each(loss, None)
    self.clients = self.spoilt()
    got, _ = self.each(loss, None)
    chex.assert_trees_all_equal(got, expected)

  def test_nan_in_padding_is_no_part_of_the_gradient(self):
    loss = least_squares()
    _, expected = self.each(loss, None)
    self.clients = self.spoilt()
    _, got = self.each(loss, None)
    chex.assert_trees_all_equal(got, expected)

  def test_a_broken_example_is_its_client_s_alone(self):
    """Row 0, of the last client."""
    self.split['x'] = self.split['x'].at[0].set(np.inf)
    self.clients = partition.client_data(self.split, self.parts)
    values, grads = self.each(least_squares(), None)
    is_finite = lambda x: np.isfinite(np.asarray(x)).reshape(3, -1).all(1)
    for leaf in jax.tree.leaves((values[0], grads)):
      np.testing.assert_array_equal(is_finite(leaf), [True, True, False])

  def test_sample_is_uniform_over_the_examples(self):
    num = 3000
    draw = jax.jit(
        jax.vmap(lambda client, key: partition.sample(client, key, num), (0, 0))
    )
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = draw(self.spoilt(), keys)
    self.assertEqual(set(drawn), {'x', 'y', 'index'})
    chex.assert_shape(drawn['x'], (3, num, 3))
    for i, part in enumerate(self.parts):
      index = np.asarray(drawn['index'][i])
      for name in ('x', 'y'):  # Rows of one example belong together.
        np.testing.assert_array_equal(drawn[name][i], self.split[name][index])
      counts = np.bincount(index, minlength=12)
      self.assertEqual(counts.sum(), counts[part].sum())
      expected = num / len(part)
      chi_square = np.sum((counts[part] - expected) ** 2 / expected)
      # 5 degrees of freedom at most: exceeded with probability 1e-6.
      self.assertLess(chi_square, 35.9)
    other = draw(self.spoilt(), jax.random.split(jax.random.key(1), 3))
    self.assertFalse(np.array_equal(other['index'], drawn['index']))

  def test_federate(self):
    task = task_lib.Task(
        name='least squares',
        init=lambda key: self.params,
        data={'train': self.split, 'test': self.split},
        loss=least_squares(),
        batch=task_lib.uniform_batch(2),
        sampling='replacement',
        num_samples=12,
        batch_size=2,
    )
    got = partition.federate(task, self.parts)
    key = jax.random.key(0)
    chex.assert_trees_all_equal(got.batch(got.data, key, 3), self.clients)
    self.assertEqual(set(got.data), {'train', 'test', 'clients'})
    self.assertNotIn('clients', task.data)
    kept = got._replace(
        data=task.data, batch=task.batch, sampling='replacement'
    )
    self.assertEqual(kept, task)
