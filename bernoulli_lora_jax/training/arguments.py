"""From a config to the arguments of the library, checked field by field.

`experiment` puts them together. The library never sees a ConfigDict.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import importlib
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
import optax

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import column_moments
from bernoulli_lora_jax import compressors
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax.tasks import classification
from bernoulli_lora_jax.tasks import digits
from bernoulli_lora_jax.tasks import l1_regression
from bernoulli_lora_jax.tasks import linear_regression
from bernoulli_lora_jax.tasks import mnist
from bernoulli_lora_jax.tasks import partition
from bernoulli_lora_jax.tasks import quadratic
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import config_files
from bernoulli_lora_jax.training import federated_methods as federated
from bernoulli_lora_jax.training import fields
from bernoulli_lora_jax.training import methods


def make_task(config: config_dict.ConfigDict) -> task_lib.Task:
  """Returns the task of a config; pre-trains if need be.

  With `config.federated.num_clients` its minibatches are the data of all clients.

  Raises:
    ValueError: a field outside its range, before anything is trained.
  """
  fields.check(config)
  task = _cast(_make_task(config), config.task.param_dtype)
  task = task._replace(chunk=config.task.chunk or task.chunk)
  parts = make_parts(config, task)
  return task if parts is None else partition.federate(task, parts)


def task_key(config: config_dict.ConfigDict) -> str:
  """Returns a name of all that `make_task` reads: equal names, one task."""
  f = config.federated
  deal = (
      f.num_clients,
      f.partition,
      f.dirichlet_alpha,
      f.unequal,
      f.partition_seed,
  )
  return f'{config.task.to_json_best_effort()} {deal}'


def make_parts(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> list[np.ndarray] | None:
  """Returns the rows of each client, None where the run is not federated.

  Raises:
    ValueError: a field of `config.federated` outside its range.
  """
  c = config.federated
  if c.num_clients == 0:
    return None
  if not 1 <= c.num_clients <= task.num_samples:
    raise ValueError(
        f'Expected federated.num_clients in [0, {task.num_samples}], the'
        f' examples of {task.name}, got num_clients={c.num_clients}.'
    )
  data = task.data['train']
  needed = {'dirichlet': 'y', 'group': 'group'}.get(c.partition, 'index')
  if c.partition not in ('iid', 'dirichlet', 'group'):
    raise ValueError(
        "Expected federated.partition to be 'iid', 'dirichlet' or 'group', got"
        f' {c.partition!r}.'
    )
  if needed not in data:
    raise ValueError(
        f"Expected data['train'][{needed!r}] of {task.name} for"
        f' federated.partition={c.partition!r}, got {sorted(data)}.'
    )
  if c.partition == 'iid':
    return partition.iid(
        task.num_samples,
        c.num_clients,
        seed=c.partition_seed,
        unequal=c.unequal,
    )
  if c.partition == 'dirichlet':
    labels = np.asarray(data['y'])
    return partition.dirichlet(
        labels, c.num_clients, alpha=c.dirichlet_alpha, seed=c.partition_seed
    )
  parts = partition.by_group(np.asarray(data['group']))
  if len(parts) != c.num_clients:
    raise ValueError(
        f'Expected federated.num_clients={len(parts)}, the groups of {task.name},'
        f' got num_clients={c.num_clients}.'
    )
  return parts


def _make_task(config: config_dict.ConfigDict) -> task_lib.Task:
  c = config.task
  if c.name == 'quadratic':
    return quadratic.make_task()
  if c.name == 'linear_regression':
    problem = linear_regression.make_problem(
        dim=c.dim, num_pretraining=c.num_pretraining, num_samples=c.num_samples
    )
    return linear_regression.make_task(problem, batch_size=c.batch_size)
  if c.name == 'l1_regression':
    problem = l1_regression.make_problem(
        shape=_shape(c.dim, c.num_rows), num_samples=c.num_samples
    )
    return l1_regression.make_task(problem, batch_size=c.batch_size)
  if ':' in c.name:
    return _own_task(c)
  if c.name == 'digits':
    images = digits.load(c.split_seed)
  else:
    images = mnist.load(c.data_dir or None, c.split_seed)
  return classification.make_task(
      c.name,
      images,
      hidden=tuple(c.hidden),
      dropout=c.dropout,
      batch_size=c.batch_size,
      pretraining=classification.Pretraining(
          epochs=c.pretrain_epochs,
          learning_rate=c.pretrain_learning_rate,
          batch_size=c.batch_size,
          seed=c.split_seed,
      ),
  )


def _own_task(c: config_dict.ConfigDict) -> task_lib.Task:
  """Returns make_task(batch_size=..., **kwargs) of task.name 'module:make_task'.

  Raises:
    ValueError: no such module or function, one that raises, with file and line,
      or that returns no task, see `task.check`.
  """
  module, _, function = c.name.rpartition(':')
  with config_files.running(c.name):
    if module.endswith('.py'):
      make = config_files.run_file(module).get(function)
    else:
      with _importing_from(os.getcwd()):
        make = getattr(importlib.import_module(module), function, None)
  if not callable(make):
    raise ValueError(f'Expected a function {function} in {module}, got {make}.')
  with config_files.running(c.name):
    task = make(batch_size=c.batch_size, **c.kwargs.to_dict())
  task = task_lib.check(task, c.name)
  if task.batch_size != c.batch_size:
    raise ValueError(
        f'Expected {c.name} to return a task of task.batch_size={c.batch_size},'
        f' got batch_size={task.batch_size}.'
    )
  return task


@contextlib.contextmanager
def _importing_from(folder: str) -> Iterator[None]:
  """Makes modules of a folder importable, as `python -m` does."""
  added = folder not in sys.path and '' not in sys.path
  if added:
    sys.path.insert(0, folder)
  try:
    yield
  finally:
    if added:
      sys.path.remove(folder)


def _cast(task: task_lib.Task, dtype: str) -> task_lib.Task:
  """Returns the task with float weights of a dtype; '' leaves them."""
  if not dtype:
    return task

  def cast(params):
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, params)

  load = task.load
  return task._replace(
      init=lambda key: cast(task.init(key)),
      weights=cast(task.weights),
      load=load and (lambda: cast(load())),
  )


def _shape(dim: int, num_rows: int | None) -> tuple[int, int]:
  """Returns (num_rows, dim / num_rows), square where num_rows is None."""
  rows = round(dim**0.5) if num_rows is None else num_rows
  if (
      rows < 1
      or rows * (dim // rows) != dim
      or (num_rows is None and rows**2 != dim)
  ):
    raise ValueError(
        'Expected task.dim to be a square, or a multiple of task.num_rows, got'
        f' dim={dim}, num_rows={num_rows}.'
    )
  return rows, dim // rows


def make_schedule(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    num_steps: int,
    peak: float | jax.Array | None = None,
) -> float | jax.Array | optax.Schedule:
  """Returns the learning rate of the optimiser's steps, as optax takes it.

  Args:
    config: see `base_config`.
    task: see `make_task`.
    num_steps: of the run; rounds where it is federated.
    peak: in place of the config's.

  Raises:
    ValueError: a field outside its range.
  """
  c = config.method
  peak = learning_rate_of(config, task) if peak is None else peak
  num_steps *= local_steps(config, task)
  if not 0 <= c.warmup_steps <= num_steps:
    raise ValueError(
        f'Expected method.warmup_steps in [0, {num_steps}], got'
        f' warmup_steps={c.warmup_steps}.'
    )
  if c.schedule == 'constant' and c.warmup_steps == 0:
    return peak
  steps = max(1, num_steps - c.warmup_steps)
  rest: optax.Schedule = {
      'constant': lambda: optax.constant_schedule(peak),
      'cosine': lambda: optax.cosine_decay_schedule(peak, steps),
      'linear': lambda: optax.linear_schedule(peak, 0.0, steps),
  }[c.schedule]()
  warmup = optax.linear_schedule(0.0, peak, max(1, c.warmup_steps))
  return optax.join_schedules([warmup, rest], [c.warmup_steps])


def learning_rate_of(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> float:
  """Returns gamma, from the field that is set."""
  c = config.method
  if c.stepsize_factor is None:
    result = c.learning_rate
  elif task.smoothness is None:
    raise ValueError(
        'Expected method.stepsize_factor with a task that knows L (quadratic,'
        f' linear_regression), got stepsize_factor={c.stepsize_factor} with'
        f' {task.name}.'
    )
  else:
    result = c.stepsize_factor / task.smoothness
  return result


def period_of(config: config_dict.ConfigDict, task: task_lib.Task) -> int:
  """Returns the steps of a link."""
  c = config.method
  if c.period_passes is None:
    return c.period
  steps_per_pass = task.num_samples // task.batch_size  # Of an epoch.
  return max(1, round(c.period_passes * steps_per_pass))


def local_steps(config: config_dict.ConfigDict, task: task_lib.Task) -> int:
  """Returns the steps of the optimiser in a step of the method."""
  c = config.method
  is_local = c.mode == 'adapter' or c.estimator == 'fedavg'
  if config.federated.num_clients and is_local:
    return period_of(config, task)
  return 1


def make_matrices(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> matrices_lib.Matrices:
  """Returns what is a matrix, by method.select."""
  select = config.method.select
  if task.matrices is not None and select != 'all-linear':
    return task.matrices(select)
  if select == 'all-linear':
    key = jax.random.key(0)
    batch = task_lib.example(task)
    return inject.all_linear(task.loss, task_lib.shapes(task), batch, key)
  return matrices_lib.Matrices(select=select or None)


def is_flax(task: task_lib.Task) -> bool:
  """Returns whether params are those of a Flax model (a leaf `kernel`)."""
  leaves = jax.tree_util.tree_flatten_with_path(task_lib.shapes(task))[0]
  paths = matrices_lib.path_names([path for path, _ in leaves])
  return any(path.rpartition('/')[2] == 'kernel' for path in paths)


def make_sketch(config: config_dict.ConfigDict) -> sketches.Sketch:
  """Returns the law of the subspaces."""
  try:
    return sketches.by_name(config.method.sketch)
  except ValueError as e:
    message = str(e).replace('Expected sketch', 'Expected method.sketch')
    raise ValueError(message) from e


def make_policy(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    prob: float | jax.Array,
) -> adapters.ChainPolicy:
  """Returns the policy of a chain of factors; `prob` may be traced."""
  c = config.method
  names = [f.name for f in dataclasses.fields(adapters.ChainPolicy)]
  special: dict[str, Any] = {
      'period': period_of(config, task) or None,
      'prob': prob,
      'sketch': make_sketch(config),
      'warmup': c.link_warmup,
  }
  same = {name: c[name] for name in names if name in c}
  return methods.make_policy(c.name, **{**same, **special})


def trained_leaves(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> Callable[[Any], Any] | None:
  """Returns params -> tree of bool in gradient mode; None where all move."""
  c = config.method
  if c.train_others:
    return None
  matrices = None if c.name == 'probe' else make_matrices(config, task)
  return functools.partial(methods.trained_mask, c.name, matrices, c.others)


def make_transformation(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    schedule: Any,
    prob: float | jax.Array,
) -> Callable[[jax.Array], optax.GradientTransformation]:
  """Returns key -> transformation of the gradient, in gradient mode."""
  c = config.method
  if c.optimizer == 'column':
    raise ValueError(
        "Expected method.mode 'adapter' or 'sketched' with"
        " method.optimizer='column', whose moments are of trained factors, got"
        f' mode={c.mode!r}.'
    )
  chain_args = {}
  if c.name != 'full':
    chain_args = {
        'sketch': make_sketch(config),
        'period': period_of(config, task),
        'shared_coin': c.shared_coin,
    }
  return methods.make_transformation(
      c.name,
      schedule,
      rank=c.rank,
      prob=prob,
      inner=_inner(config),
      clip_norm=c.clip_norm,
      weight_decay=c.weight_decay if c.optimizer == 'adamw' else 0.0,
      matrices=make_matrices(config, task),
      **chain_args,
  )


def make_optimizer(
    config: config_dict.ConfigDict, learning_rate: Any
) -> optax.GradientTransformation:
  """Returns the optimiser of factors, or of the weights of local steps."""
  if config.method.optimizer == 'column':
    scaled = column_moments.scale_by_column_moments()
    return _descending(config, scaled, learning_rate)
  return _descending(config, _inner(config), learning_rate)


def _descending(
    config: config_dict.ConfigDict,
    inner: optax.GradientTransformation | None,
    learning_rate: Any,
) -> optax.GradientTransformation:
  c = config.method
  parts = []
  if c.clip_norm is not None:
    parts.append(optax.clip_by_global_norm(c.clip_norm))
  parts.append(inner or optax.identity())
  if c.optimizer == 'adamw':
    parts.append(optax.add_decayed_weights(c.weight_decay))
  return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def make_others(
    config: config_dict.ConfigDict, learning_rate: Any
) -> dict[str, optax.GradientTransformation]:
  """Returns {pattern: optimiser} of what trains at full size beside factors.

  Raises:
    ValueError: rows of no leaf.
  """
  c = config.method
  if not c.others:
    if c.other_rows:
      raise ValueError(
          'Expected method.others with method.other_rows, got'
          f' other_rows={tuple(c.other_rows)}.'
      )
    return {}
  tx = _descending(config, _inner(config), learning_rate)
  if c.other_rows:
    keep = functools.partial(_rows_alone, np.asarray(c.other_rows))
    tx = optax.chain(optax.stateless(keep), tx, optax.stateless(keep))
  return {c.others: tx}


def axis_of_rows(path: str, leaf: Any) -> int:
  """Returns the axis of an embedding, or of a head, that counts tokens."""
  return 0 if path.endswith('embedding') else leaf.ndim - 1


def _rows_alone(rows: np.ndarray, updates: Any, params: Any = None) -> Any:
  """Returns {path: update} of tokens' rows of embeddings and heads, zero else."""
  del params

  def keep(path, update):
    axis = axis_of_rows(path, update)
    if not rows.max() < update.shape[axis]:
      raise ValueError(
          f'Expected method.other_rows below {update.shape[axis]}, the rows of'
          f' {path}, got {rows.max()}.'
      )
    chosen = jnp.zeros(update.shape[axis], bool).at[rows].set(True)
    shape = [1] * update.ndim
    shape[axis] = -1
    return jnp.where(chosen.reshape(shape), update, 0)

  return {path: keep(path, update) for path, update in updates.items()}


def _inner(config: config_dict.ConfigDict) -> Any:
  """Returns what scales gradients of whole leaves, None where nothing does."""
  c = config.method
  if c.optimizer == 'sgd':
    return None
  if c.optimizer == 'momentum':
    return optax.trace(c.optimizer_momentum)
  if c.optimizer in ('adam', 'adamw', 'column'):
    return optax.scale_by_adam()
  raise ValueError(
      "Expected method.optimizer to be 'sgd', 'momentum', 'adam', 'adamw' or"
      f" 'column', got {c.optimizer!r}."
  )


def check_federated(config: config_dict.ConfigDict) -> None:
  """Raises ValueError for a field that federated runs would ignore."""
  c = config.method
  if c.mode == 'sketched':
    raise ValueError(
        "Expected method.mode 'gradient' or 'adapter' in federated runs, got"
        " mode='sketched': clients average factors, or weights."
    )
  if c.optimizer == 'column':
    raise ValueError(
        "Expected method.optimizer 'sgd', 'momentum', 'adam' or 'adamw' in"
        " federated runs, got 'column', whose moments outlive rounds."
    )
  needed: dict[str, Any] = {
      'training.plateau_patience': 0,
      'training.num_micro_batches': 1,
      'training.num_full_passes': None,
      'training.recipe': False,
  }
  if c.mode == 'adapter':
    needed |= {'method.estimator': 'sgd', 'method.train_others': False}
    needed |= {'method.others': '', 'method.other_rows': ()}
  if c.mode == 'adapter' or c.estimator == 'fedavg':
    needed['federated.compressor'] = 'identity'
  for field, value in needed.items():
    section, name = field.split('.')
    if config[section][name] != value:
      raise ValueError(
          f'Expected {field}={value!r} in federated runs of this kind, got'
          f' {name}={config[section][name]!r}.'
      )


def make_cohort(
    config: config_dict.ConfigDict, task: task_lib.Task, num_devices: int = 1
) -> federated.Cohort:
  """Returns who takes part in a federated run, with which weights.

  Raises:
    ValueError: a field outside its range.
  """
  f = config.federated
  check_federated(config)
  if f.weights not in ('size', 'uniform'):
    raise ValueError(
        f"Expected federated.weights 'size' or 'uniform', got {f.weights!r}."
    )
  if f.num_clients % num_devices:
    raise ValueError(
        f'Expected federated.num_clients to be a multiple of the {num_devices}'
        f' devices, got num_clients={f.num_clients}.'
    )
  if f.cohort is not None and not 1 <= f.cohort <= f.num_clients:
    raise ValueError(
        f'Expected federated.cohort in [1, {f.num_clients}], got'
        f' cohort={f.cohort}.'
    )
  sizes = np.asarray(task.data['clients']['mask']).sum(1)
  shares = sizes if f.weights == 'size' else np.ones_like(sizes)
  weights = tuple((shares / shares.sum()).tolist())
  return federated.Cohort(f.num_clients, weights, f.cohort)


def make_compressor(
    config: config_dict.ConfigDict,
) -> compressors.Compressor:
  """Returns the compressor of a config; a contractive one for EF21.

  Raises:
    ValueError: an unknown one, or an argument outside its range.
  """
  f = config.federated
  try:
    compressor = compressors.by_name(f.compressor, f.argument or None)
  except ValueError as e:
    message = str(e).replace('Expected compressor', 'Expected')
    raise ValueError(
        message.replace('Expected', 'Expected federated.compressor', 1)
    ) from e
  if f.compressor == 'powersgd' and f.concatenate:
    raise ValueError(
        'Expected federated.concatenate=False with powersgd, which sends vectors'
        ' whole, got True.'
    )
  if config.method.estimator == 'ef21' and compressor.beta is None:
    return compressors.contractive(compressor)
  return compressor


def make_rounds(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    schedule: Any,
    prob: float | jax.Array,
    **kwargs: Any,
) -> averaging.Rounds:
  """Returns the rounds of local steps of a config.

  Args:
    config: see `base_config`.
    task: federated or not.
    schedule: learning rate of the local steps, see `make_schedule`.
    prob: P(left).
    **kwargs: num_clients, weights, cohort.

  Raises:
    ValueError: a field outside its range.
  """
  c = config.method
  steps = period_of(config, task)
  optimizer = make_optimizer(config, schedule)
  if c.mode == 'adapter':
    return averaging.federated_adapters(
        make_policy(config, task, prob),
        optimizer,
        make_matrices(config, task),
        num_local_steps=steps,
        **kwargs,
    )
  if c.name != 'full':
    raise ValueError(
        "Expected method.name='full' with fedavg, got"
        f' {c.name!r}: chains train adapters (method.mode).'
    )
  return averaging.federated_weights(
      optimizer,
      num_local_steps=steps,
      trained=trained_leaves(config, task),
      **kwargs,
  )
