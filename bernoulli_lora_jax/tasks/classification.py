"""Image classification: pre-train on half of the classes, fine-tune on the rest.

Both halves have the same number of classes and share the output layer: class
`num_classes / 2 + k` of the fine-tuning half is its output k (X2).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.models import mlp
from bernoulli_lora_jax.tasks import cache
from bernoulli_lora_jax.tasks import task as task_lib

# Raised when the same settings begin to give other weights.
_RECIPE = 1


class Images(NamedTuple):
  """Labelled images of all classes, split before classes are selected."""

  # {'train' | 'validation' | 'test': ((N, d) float32, (N,) int labels)}
  splits: dict[str, tuple[np.ndarray, np.ndarray]]
  num_classes: int


class Pretraining(NamedTuple):
  """How the weights to fine-tune were trained, by AdamW."""

  epochs: int
  learning_rate: float
  batch_size: int
  seed: int


def make_task(
    name: str,
    images: Images,
    *,
    hidden: tuple[int, ...],
    dropout: float,
    batch_size: int,
    pretraining: Pretraining,
) -> task_lib.Task:
  """Returns the task of fine-tuning an MLP on the upper half of the classes.

  Args:
    name: the task's name, also of its cache file.
    images: all classes and splits.
    hidden: widths of the hidden layers.
    dropout: rate in [0, 1).
    batch_size: examples a minibatch.
    pretraining: settings of the lower half's training; its result is cached by
      a hash of them and of the data.

  Returns:
    A `Task` whose init returns the pre-trained weights, whatever the key.
  """
  checks.within('[0, 1)', dropout=dropout)
  half = images.num_classes // 2
  model = mlp.MLP(features=(*hidden, half), dropout=dropout)

  def logits(params, x, keys=None):
    return jnp.asarray(model.apply({'params': params}, x, keys))

  def loss(params, batch, key):
    keys = None
    if key is not None and dropout > 0:
      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch['index'])
    outputs = logits(params, batch['x'], keys)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        outputs, batch['y']
    )
    accuracy = jnp.mean(jnp.argmax(outputs, -1) == batch['y'])
    return jnp.mean(losses), {'accuracy': accuracy}

  data = select_classes(images, half, 2 * half)
  size = data['train']['index'].shape[0]
  task_lib.check_batch_size(batch_size, size, name)
  task = task_lib.Task(
      name=name,
      init=lambda key: model.init(key, data['train']['x'][:1])['params'],
      data=data,
      loss=loss,
      num_samples=size,
      batch_size=batch_size,
      sampling='epochs',
      batch=task_lib.epoch_batch(batch_size),
      lower_bound=0.0,
      outputs=lambda params, batch: logits(params, batch['x']),
      criterion='cross_entropy',
  )
  settings = {
      'recipe': _RECIPE,
      'features': [*hidden, half],
      'dropout': dropout,
      **pretraining._asdict(),
      'data': cache.fingerprint(*images.splits['train']),
  }
  flat = cache.cached(
      f'{name}-pretrained',
      settings,
      lambda: _flatten(_pretrain(task, images, half, pretraining)),
  )
  weights = _unflatten(flat)
  return task._replace(init=lambda key: weights, weights=weights)


def select_classes(
    images: Images, low: int, high: int
) -> dict[str, task_lib.Batch]:
  """Returns the batches of classes low..high - 1, labels counted from `low`."""
  data = {}
  for split, (x, y) in images.splits.items():
    rows = np.flatnonzero((y >= low) & (y < high))
    data[split] = {
        'x': jnp.asarray(x[rows]),
        'y': jnp.asarray(y[rows] - low, jnp.int32),
        'index': jnp.arange(len(rows), dtype=jnp.int32),
    }
  return data


def _pretrain(
    task: task_lib.Task,
    images: Images,
    half: int,
    settings: Pretraining,
) -> Any:
  """Trains on the lower half; returns the params of the last step."""
  data = select_classes(images, 0, half)
  batch = task_lib.epoch_batch(settings.batch_size)
  num_steps = settings.epochs * (
      data['train']['index'].shape[0] // settings.batch_size
  )
  tx = optax.adamw(settings.learning_rate)

  @jax.jit
  def train(data, key):
    init_key, batch_key, noise_key = jax.random.split(key, 3)
    params = task.init(init_key)

    def step(carry, i):
      params, state = carry
      grad = jax.grad(task.loss, has_aux=True)(
          params, batch(data, batch_key, i), jax.random.fold_in(noise_key, i)
      )[0]
      updates, state = tx.update(grad, state, params)
      return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    return jax.lax.scan(step, carry, jnp.arange(num_steps))[0][0]

  return train(data, jax.random.key(settings.seed))


def _flatten(params: Any) -> dict[str, np.ndarray]:
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  return {path: np.asarray(leaf) for path, leaf in flat.items()}


def _unflatten(flat: Mapping[str, np.ndarray]) -> Any:
  arrays = {path: jnp.asarray(leaf) for path, leaf in flat.items()}
  return flax.traverse_util.unflatten_dict(arrays, sep='/')
