"""Tests of the tasks and of how minibatches are drawn."""

import gzip
import os
import pathlib
import struct

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets

from bernoulli_lora_jax.models import mlp
from bernoulli_lora_jax.tasks import cache
from bernoulli_lora_jax.tasks import classification
from bernoulli_lora_jax.tasks import digits
from bernoulli_lora_jax.tasks import linear_regression
from bernoulli_lora_jax.tasks import mnist
from bernoulli_lora_jax.tasks import quadratic
from bernoulli_lora_jax.tasks import task as task_lib


class SamplingTest(parameterized.TestCase):

  @parameterized.parameters(1, 2, 5, 16, 549)
  def test_shuffled_is_a_permutation(self, size):
    self.check_shuffled_is_a_permutation(size)

  @parameterized.parameters(3, 17, 1000)
  @pytest.mark.slow
  def test_shuffled_is_a_permutation_otherwise(self, size):
    self.check_shuffled_is_a_permutation(size)

  def check_shuffled_is_a_permutation(self, size):
    positions = jnp.arange(size)
    for seed in range(3):
      got = task_lib.shuffled(jax.random.key(seed), positions, size)
      np.testing.assert_array_equal(np.sort(got), np.arange(size))

  def test_shuffled_is_uniform(self):
    size, draws = 10, 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    shuffle = jax.vmap(task_lib.shuffled, (0, None, None))
    values = np.asarray(shuffle(keys, jnp.arange(size), size))
    expected = draws / size
    chi_square = sum(
        np.sum((np.bincount(column, minlength=size) - expected) ** 2 / expected)
        for column in values.T
    )
    # 81 degrees of freedom (rows and columns are both fixed), 5 deviations.
    self.assertLess(abs(chi_square - 81), 5 * np.sqrt(2 * 81))

  def test_epoch_visits_each_example_once(self):
    data = {'train': {'index': jnp.arange(12)}}
    batch = jax.jit(task_lib.epoch_batch(4))
    key = jax.random.key(1)
    epochs = [
        np.concatenate([batch(data, key, 3 * e + i)['index'] for i in range(3)])
        for e in range(2)
    ]
    for epoch in epochs:
      np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    self.assertFalse(np.array_equal(epochs[0], epochs[1]))

  def test_uniform_is_with_replacement(self):
    data = {'train': {'index': jnp.arange(4)}}
    rows = task_lib.uniform_batch(4000)(data, jax.random.key(0), 0)['index']
    counts = np.bincount(rows, minlength=4)
    # Binomial(4000, 1/4): sd 27.4.
    self.assertLess(np.abs(counts - 1000).max(), 5 * 27.4)
    again = task_lib.uniform_batch(4000)(data, jax.random.key(0), 1)['index']
    self.assertFalse(np.array_equal(rows, again))

  def test_batch_larger_than_data_is_refused(self):
    data = {'train': {'index': jnp.arange(4)}}
    with self.assertRaisesRegex(ValueError, 'batch_size <= 4.*batch_size=5'):
      task_lib.epoch_batch(5)(data, jax.random.key(0), 0)


class DropoutTest(parameterized.TestCase):

  def test_mask_follows_the_example(self):
    keys = jax.random.split(jax.random.key(0), 6)
    x = jnp.ones((6, 50))
    whole = mlp.example_dropout(x, 0.3, keys)
    order = jnp.array([3, 1, 5])
    chex.assert_trees_all_equal(
        mlp.example_dropout(x[order], 0.3, keys[order]), whole[order]
    )

  def test_mean_and_frequency(self):
    keys = jax.random.split(jax.random.key(0), 400)
    y = np.asarray(mlp.example_dropout(jnp.ones((400, 50)), 0.3, keys))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-6)
    frequency = (y == 0).mean()  # sd of 20,000 coins: 0.0032.
    self.assertLess(abs(frequency - 0.3), 5 * 0.0033)


class DigitsTest(parameterized.TestCase):

  def test_pretrained_on_the_lower_half(self):
    images = digits.load(0)
    task = classification.make_task(
        'digits',
        images,
        hidden=(32,),
        dropout=0.0,
        batch_size=32,
        pretraining=classification.Pretraining(20, 3e-3, 32, 0),
    )
    params = task.init(jax.random.key(0))
    lower = classification.select_classes(images, 0, 5)
    old = task_lib.evaluate(task, params, lower, 'test')['accuracy']
    new = task_lib.evaluate(task, params, task.data, 'test')['accuracy']
    self.assertGreater(old, 0.95)
    self.assertLess(new, 0.4)
    self.assertEqual(set(np.unique(task.data['train']['y'])), set(range(5)))
    sizes = [len(images.splits[s][1]) for s in ('train', 'validation', 'test')]
    self.assertEqual(sum(sizes), 1797)

  def test_noise_follows_the_example(self):
    task = classification.make_task(
        'digits',
        digits.load(0),
        hidden=(16,),
        dropout=0.5,
        batch_size=8,
        pretraining=classification.Pretraining(0, 1e-3, 8, 0),
    )
    params, key = task.init(jax.random.key(0)), jax.random.key(1)
    batch = lambda rows: task_lib.take(task.data['train'], jnp.asarray(rows))
    loss = lambda *rows: task.loss(params, batch(rows), key)[0]
    alone = [loss(row) for row in (3, 4, 5, 6)]
    np.testing.assert_allclose(loss(3, 4, 5, 6), np.mean(alone), rtol=1e-5)

  def test_parts_in_their_order_by_the_training_pixels(self):
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(3).permutation(len(y))
    splits = digits.load(3).splits
    self.assertEqual(list(splits), ['train', 'validation', 'test'])
    ends = [0, 1078, 1437, 1797]
    for (images, labels), a, b in zip(
        splits.values(), ends, ends[1:], strict=False
    ):
      rows = order[a:b]
      np.testing.assert_array_equal(labels, y[rows])
      train = x[order[:1078]]
      expected = (x[rows] - train.mean()) / train.std()
      np.testing.assert_allclose(images, expected, atol=1e-6)

  def test_pretraining_is_cached_by_settings(self):
    calls = []

    def compute():
      calls.append(1)
      return {'a': np.arange(3)}

    for settings in ({'x': 1}, {'x': 1}, {'x': 2}):
      got = cache.cached('test', settings, compute)
      np.testing.assert_array_equal(got['a'], np.arange(3))
    self.assertLen(calls, 2)
    for path in cache.directory().glob('test-*.npz'):
      path.write_bytes(path.read_bytes()[:40])  # Truncated: computed anew.
    cache.cached('test', {'x': 1}, compute)
    self.assertLen(calls, 3)


class MnistTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _tmp(self, tmp_path):
    self.tmp = tmp_path

  def _write(self, name, array, compress=False, cut=0):
    header = b'\0\0\x08' + bytes([array.ndim])
    header += struct.pack(f'>{array.ndim}I', *array.shape)
    raw = header + array.astype(np.uint8).tobytes()
    raw = raw[: len(raw) - cut]
    path = self.tmp / (name + ('.gz' if compress else ''))
    path.write_bytes(gzip.compress(raw) if compress else raw)
    return path

  @parameterized.parameters(False, True)
  def test_reads_idx(self, compress):
    array = np.arange(24).reshape(2, 3, 4)
    path = self._write('x-idx3-ubyte', array, compress)
    np.testing.assert_array_equal(mnist.read_idx(path), array)

  @parameterized.parameters(1, 20, 30)
  def test_truncated_file_is_named(self, cut):
    path = self._write('x-idx3-ubyte', np.zeros((2, 3, 4)), cut=cut)
    with self.assertRaisesRegex(ValueError, 'x-idx3-ubyte'):
      mnist.read_idx(path)

  def test_truncated_gzip_is_named(self):
    path = self._write('x-idx3-ubyte', np.zeros((2, 3, 4)), compress=True)
    path.write_bytes(path.read_bytes()[:-9])
    with self.assertRaisesRegex(ValueError, 'x-idx3-ubyte.gz.*whole gzip'):
      mnist.read_idx(path)

  def test_foreign_file_is_named(self):
    path = self.tmp / 'images'
    path.write_bytes(b'PNG and so on')
    with self.assertRaisesRegex(ValueError, 'images.*IDX header'):
      mnist.read_idx(path)

  def test_missing_folder_says_what_is_expected(self):
    with self.assertRaisesRegex(
        FileNotFoundError, 'task.data_dir=.*idx3-ubyte'
    ):
      mnist.load(str(self.tmp), 0)

  def test_missing_file_is_named(self):
    self._write('train-images-idx3-ubyte', np.zeros((2, 3, 4)))
    with self.assertRaisesRegex(FileNotFoundError, 'train-labels-idx1-ubyte'):
      mnist.load(str(self.tmp), 0)

  def test_parts_of_the_files(self):
    for name, size in (('train', 8), ('t10k', 3)):
      labels = np.arange(size)
      pixels = np.broadcast_to(labels[:, None, None], (size, 2, 3))
      self._write(f'{name}-images-idx3-ubyte', pixels)
      self._write(f'{name}-labels-idx1-ubyte', labels)
    splits = mnist.load(str(self.tmp), 5, num_validation=2).splits
    order = np.random.default_rng(5).permutation(8)
    for split, expected in (
        ('train', order[2:]),
        ('validation', order[:2]),
        ('test', np.arange(3)),
    ):
      x, y = splits[split]
      np.testing.assert_array_equal(y, expected)
      pixels = np.broadcast_to(y[:, None], (len(y), 6))
      np.testing.assert_allclose(255 * (x * 0.3081 + 0.1307), pixels, atol=1e-4)

  def test_real_files(self):
    folder = os.environ.get('BERNOULLI_LORA_DATA')
    if not folder:
      self.skipTest('BERNOULLI_LORA_DATA is not set: no MNIST files.')
    self.assertTrue(pathlib.Path(folder, 'mnist').is_dir(), folder)
    images = mnist.load(None, 0)
    self.assertEqual(images.splits['train'][0].shape, (55000, 784))
    self.assertEqual(images.splits['validation'][0].shape, (5000, 784))
    self.assertEqual(images.splits['test'][0].shape, (10000, 784))
    self.assertEqual(images.splits['train'][0].dtype, np.float32)
    # The published constants normalise the 60,000 training images.
    x = np.concatenate([images.splits[s][0] for s in ('train', 'validation')])
    self.assertLess(abs(x.mean(dtype=np.float64)), 1e-3)
    self.assertLess(abs(x.std(dtype=np.float64) - 1), 1e-3)
    self.assertEqual(np.bincount(images.splits['test'][1])[5], 892)


class LinearRegressionTest(parameterized.TestCase):

  def test_start_and_smoothness(self):
    problem = linear_regression.make_problem(
        dim=16, num_pretraining=200, num_samples=50
    )
    np.testing.assert_allclose(
        problem.regularisation,
        np.linalg.norm(problem.x.T @ problem.x / 50, 2),
        rtol=1e-10,
    )
    self.assertEqual(problem.smoothness, 3 * problem.regularisation)
    for array in (problem.x, problem.y):
      np.testing.assert_allclose([array.mean(), array.std()], [1, 2])

  def test_smoothness_bounds_the_hessian(self):
    with jax.enable_x64(True):
      problem = linear_regression.make_problem(
          dim=16, num_pretraining=200, num_samples=50
      )
      task = linear_regression.make_task(problem, batch_size=5)
      value = lambda w: task.loss({'w': w}, task.data['train'], None)[0]
      at = task.init(jax.random.key(0))['w']
      hessian = jax.hessian(value)(at).reshape(16, 16)
      largest = np.linalg.eigvalsh(hessian)[-1]
    self.assertLessEqual(largest, problem.smoothness * (1 + 1e-12))
    self.assertGreater(largest, problem.smoothness / 3)

  def test_dim_must_be_a_square(self):
    problem = linear_regression.make_problem(
        dim=15, num_pretraining=50, num_samples=20
    )
    with self.assertRaisesRegex(ValueError, 'task.dim.*square.*dim=15'):
      linear_regression.make_task(problem, batch_size=5)


class QuadraticTest(parameterized.TestCase):

  def test_optimum(self):
    task = quadratic.make_task()
    at = {'w': jnp.asarray(quadratic.MINIMISER.reshape(3, 3))}
    np.testing.assert_allclose(quadratic.OPTIMUM, -166.1, rtol=1e-12)
    np.testing.assert_allclose(
        task.loss(at, task.data['train'], None)[0], -166.1, rtol=1e-6
    )
