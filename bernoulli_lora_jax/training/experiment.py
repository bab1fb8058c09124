"""From a config to a run: the border where user input is checked."""

from collections.abc import Callable, Mapping
import json
import math
import pathlib
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
import optax

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import chain
from bernoulli_lora_jax import compressors
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax.tasks import classification
from bernoulli_lora_jax.tasks import digits
from bernoulli_lora_jax.tasks import linear_regression
from bernoulli_lora_jax.tasks import mnist
from bernoulli_lora_jax.tasks import partition
from bernoulli_lora_jax.tasks import quadratic
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import federated
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import parallel


def apply_overrides(
    config: config_dict.ConfigDict, overrides: Mapping[str, Any]
) -> config_dict.ConfigDict:
  """Returns a copy of the config with flat overrides {'method.rank': 4}.

  Raises:
    KeyError: a field that does not exist.
    TypeError: a value of another type than the field's.
  """
  config = config.copy_and_resolve_references().lock()
  config.update_from_flattened_dict(dict(overrides))
  return config


def check_config(config: config_dict.ConfigDict) -> None:
  """Raises ValueError unless the config has just the fields of base_config."""
  known = checkpoint.flatten(base_config.get_config().to_dict())
  given = checkpoint.flatten(config.to_dict())
  for field in sorted(given.keys() - known.keys()):
    raise ValueError(
        f'Expected a field of base_config, got config.{field}={given[field]!r}.'
    )
  for field in sorted(known.keys() - given.keys()):
    raise ValueError(f'Expected config.{field}, which is missing.')


def make_task(config: config_dict.ConfigDict) -> task_lib.Task:
  """Returns the task of a config; pre-trains if need be.

  With `config.federated.num_clients` its minibatches are the data of all clients.
  """
  task = _make_task(config)
  parts = make_parts(config, task)
  return task if parts is None else partition.federate(task, parts)


def task_key(config: config_dict.ConfigDict) -> str:
  """Returns a name of all that `make_task` reads: equal names, one task."""
  f = config.federated
  deal = (f.num_clients, f.partition, f.alpha, f.unequal, f.seed)
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
        task.num_samples, c.num_clients, seed=c.seed, unequal=c.unequal
    )
  if c.partition == 'dirichlet':
    labels = np.asarray(data['y'])
    return partition.dirichlet(
        labels, c.num_clients, alpha=c.alpha, seed=c.seed
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
  if c.name not in ('digits', 'mnist'):
    raise ValueError(
        "Expected task.name to be 'digits', 'mnist', 'linear_regression' or"
        f" 'quadratic', got {c.name!r}."
    )
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


def make_program(
    config: config_dict.ConfigDict, task: task_lib.Task | None = None
) -> loop.Program:
  """Returns the compiled parts of the runs of a config, whatever the seed.

  Args:
    config: see `base_config`.
    task: what `make_task(config)` returns, if it is there already.

  Raises:
    ValueError: a field outside its range, by name.
  """
  check_config(config)
  task = make_task(config) if task is None else task
  t = config.training
  driver = parallel.make_driver(t.parallel, t.num_devices)
  settings = make_settings(config, task)
  method = make_method(config, task, driver=driver)
  if t.recipe and method.chain is None:
    raise ValueError(
        'Expected training.recipe=False in gradient mode, got recipe=True.'
    )
  jax.eval_shape(method.init, jax.random.key(0), task.init(jax.random.key(0)))
  return loop.make_program(task, method, settings, driver)


def make_settings(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> loop.Settings:
  """Returns how long a run is and what happens how often."""
  t = config.training
  if t.num_evals < 1:
    raise ValueError(
        f'Expected training.num_evals >= 1, got num_evals={t.num_evals}.'
    )
  if t.num_steps < 0 or (t.num_steps == 0 and t.num_passes <= 0):
    raise ValueError(
        'Expected training.num_steps > 0 or training.num_passes > 0, got'
        f' num_steps={t.num_steps}, num_passes={t.num_passes}.'
    )
  # The cost of a step decides the number of steps, which the schedule needs.
  wanted = float(t.num_steps)
  if not t.num_steps:
    wanted = t.num_passes / _make_method(config, task).passes_per_step
  if not t.num_steps and t.num_full_passes is not None:
    wanted = _equal_flops(config, task, t.num_full_passes)
  # Whole evaluation intervals: one length of dispatch, compiled once.
  every = max(1, (t.num_steps or round(wanted)) // t.num_evals)
  return loop.Settings(
      num_steps=t.num_steps or every * max(1, round(wanted / every)),
      eval_every=every,
      checkpoint_every=t.checkpoint_every,
      steps_per_dispatch=t.steps_per_dispatch,
      patience=t.patience,
      plateau_patience=t.plateau_patience,
      plateau_factor=t.plateau_factor,
      eval_gradient=t.eval_gradient,
      recipe=t.recipe,
      progress=t.progress,
      max_to_keep=t.max_to_keep,
  )


def make_method(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    *,
    driver: parallel.Driver | None = None,
    prob: float | jax.Array | None = None,
    learning_rate: float | jax.Array | None = None,
) -> methods.Method:
  """Returns the method of a config for its task.

  Args:
    config: see `base_config`.
    task: see `make_task`.
    driver: None for one device.
    prob: in place of the config's; may be traced.
    learning_rate: in place of the config's; may be traced.

  Raises:
    ValueError: a field outside its range, by name.
  """
  num_steps = make_settings(config, task).num_steps
  period = _period(config, task)
  is_chain = config.method.name in (
      'cola',
      'rac_left',
      'rac_right',
      'bernoulli',
  )
  is_local = config.federated.num_clients > 0
  if (
      config.method.mode == 'adapter'
      and is_chain
      and not is_local
      and period > num_steps
  ):
    warnings.warn(
        f'Expected method.period <= {num_steps}, the steps of the run, got'
        f' period={period}: no merge will happen.',
        stacklevel=2,
    )
  return _make_method(
      config, task, num_steps, driver, prob=prob, learning_rate=learning_rate
  )


def _make_method(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    num_steps: int | None = None,  # None: without a learning-rate schedule.
    driver: parallel.Driver | None = None,
    prob: float | jax.Array | None = None,
    learning_rate: float | jax.Array | None = None,
) -> methods.Method:
  c = config.method
  if c.mode not in ('gradient', 'adapter'):
    raise ValueError(
        f"Expected method.mode to be 'gradient' or 'adapter', got {c.mode!r}."
    )
  prob = c.prob if prob is None else prob
  if learning_rate is None:
    learning_rate = _learning_rate(config, task)
  schedule = learning_rate
  if num_steps is not None:
    schedule = make_schedule(config, task, num_steps, learning_rate)
  matrices = make_matrices(config, task)
  common: dict[str, Any] = {
      'num_samples': task.num_samples,
      'batch_size': task.batch_size,
      'num_micro_batches': config.training.num_micro_batches,
      'driver': driver,
  }
  if config.federated.num_clients:
    return _make_federated(config, task, schedule, prob, driver)
  if c.mode == 'adapter':
    if c.estimator != 'sgd':
      raise ValueError(
          "Expected method.estimator='sgd' in adapter mode, got"
          f' {c.estimator!r}: the others carry a full gradient (gradient mode).'
      )
    if c.train_others:
      raise ValueError(
          'Expected method.train_others=False in adapter mode, got True.'
      )
    return methods.adapter_method(
        task.loss,
        _policy(config, task, prob),
        _adapter_optimizer(config, schedule),
        matrices=matrices,
        additive=not is_flax(task),
        **common,
    )
  return methods.gradient_method(
      task.loss,
      make_transformation(config, task, schedule, prob),
      estimator=c.estimator,
      page_prob=c.page_prob,
      momentum=c.mvr_momentum,
      trained=trained_leaves(config, task),
      **common,
  )


def make_transformation(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    schedule: Any,
    prob: float | jax.Array,
) -> Callable[[jax.Array], optax.GradientTransformation]:
  """Returns key -> transformation of the gradient, in gradient mode."""
  c = config.method
  chain_args = {}
  if c.name != 'full':
    chain_args = {
        'sketch': make_sketch(config),
        'period': _period(config, task),
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


def _make_federated(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    schedule: Any,
    prob: float | jax.Array,
    driver: parallel.Driver | None,
) -> methods.Method:
  """Returns the federated method of a config, see `training.federated`."""
  c, f = config.method, config.federated
  cohort = make_cohort(
      config, task, 1 if driver is None else driver.num_devices
  )
  matrices = make_matrices(config, task)
  if c.mode == 'adapter' or c.estimator == 'fedavg':
    return _make_rounds_method(config, task, schedule, prob, driver, cohort)
  if c.estimator not in federated.ESTIMATORS:
    raise ValueError(
        f'Expected method.estimator in {federated.ESTIMATORS} or fedavg in'
        f' federated runs, got {c.estimator!r}.'
    )

  def update_numbers(state, params):
    if c.name == 'full':
      size = sum(x.size for x in jax.tree.leaves(params))
      return jnp.asarray(size, jnp.result_type(float))
    (found,) = chain.states(state)
    return chain.sent_numbers(
        found,
        params,
        rank=c.rank,
        prob={'rac_left': 1.0, 'rac_right': 0.0}.get(c.name, prob),
        period=_period(config, task),
        matrices=matrices,
        shared_coin=c.shared_coin,
    )

  return federated.estimator_method(
      task.loss,
      make_transformation(config, task, schedule, prob),
      update_numbers,
      estimator=c.estimator,
      compressor=make_compressor(config),
      cohort=cohort,
      marina_prob=f.marina_prob,
      start=f.start,
      concatenate=f.concatenate,
      trained=trained_leaves(config, task),
      driver=driver,
  )


def make_cohort(
    config: config_dict.ConfigDict, task: task_lib.Task, num_devices: int = 1
) -> federated.Cohort:
  """Returns who takes part in a federated run, with which weights.

  Raises:
    ValueError: a field outside its range.
  """
  f = config.federated
  if f.weights not in ('size', 'uniform'):
    raise ValueError(
        f"Expected federated.weights 'size' or 'uniform', got {f.weights!r}."
    )
  if config.training.plateau_patience:
    raise ValueError(
        'Expected training.plateau_patience=0 in federated runs, got'
        f' plateau_patience={config.training.plateau_patience}.'
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
    compressor = compressors.by_name(f.compressor, f.argument)
  except ValueError as e:
    raise ValueError(f'federated.compressor: {e}') from e
  if config.method.estimator == 'ef21' and compressor.beta is None:
    return compressors.contractive(compressor)
  return compressor


def _make_rounds_method(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    schedule: Any,
    prob: float | jax.Array,
    driver: parallel.Driver | None,
    cohort: federated.Cohort,
) -> methods.Method:
  """Returns the method of local steps: adapters, or whole weights (fedavg)."""
  c = config.method
  return federated.rounds_method(
      task.loss,
      lambda **kwargs: make_rounds(config, task, schedule, prob, **kwargs),
      cohort=cohort,
      num_samples=task.num_samples,
      batch_size=config.task.batch_size,
      is_adapter=c.mode == 'adapter',
      additive=not is_flax(task),
      driver=driver,
  )


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
    **kwargs: num_clients, weights, cohort, axis_name.

  Raises:
    ValueError: a field outside its range.
  """
  c = config.method
  steps = _period(config, task)
  optimizer = _adapter_optimizer(config, schedule)
  if c.mode == 'adapter':
    return averaging.federated_adapters(
        _policy(config, task, prob),
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


def step_flops(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> float | None:
  """Returns the floating-point operations of a step, as XLA counts them.

  Counted in the program before its optimisation, by XLA's CPU backend whatever
  the device; None where there is none.
  """
  method = _make_method(config, task)

  def one(key, data):
    state = loop.make_start(task, method)(key)
    return loop.make_steps(task, method)(state, data, key, 0, 1)

  try:
    cpu = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out.
    return None
  key, data = jax.eval_shape(lambda: (jax.random.key(0), task.data))

  def count(f):
    with jax.default_device(cpu):
      analysis = jax.jit(f).lower(key, data).cost_analysis()
    return analysis.get('flops', 0.0) if analysis else math.nan

  start = lambda key, data: loop.make_start(task, method)(key)
  flops = count(one) - count(start)
  return flops if math.isfinite(flops) and flops > 0 else None


def _equal_flops(
    config: config_dict.ConfigDict, task: task_lib.Task, passes: float
) -> float:
  """Returns the steps that cost `passes` data passes of full fine-tuning."""
  full = apply_overrides(
      config,
      {
          'method.mode': 'gradient',
          'method.name': 'full',
          'method.estimator': 'sgd',
      },
  )
  ours, theirs = step_flops(config, task), step_flops(full, task)
  if not ours or not theirs:
    raise ValueError(
        'Expected a backend that counts FLOPs for training.num_full_passes.'
    )
  return passes * task.num_samples / task.batch_size * theirs / ours


def train(
    config: config_dict.ConfigDict,
    workdir: str | pathlib.Path,
    program: loop.Program | None = None,
) -> dict[str, Any]:
  """Trains the run of a config in a directory; see `loop.train`."""
  program = make_program(config) if program is None else program
  record = json.loads(config.to_json_best_effort())
  return loop.train(
      program,
      config.seed,
      pathlib.Path(workdir),
      record,
      facts(config, program.task),
  )


def facts(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> dict[str, Any]:
  """Returns what a summary says of the config."""
  return {
      'trained_parameters': trained_parameters(config, task),
      'steps_per_link': _period(config, task) or None,
  }


def argument(
    config: config_dict.ConfigDict, task: task_lib.Task, name: str
) -> float:
  """Returns the value that a config gives to 'prob' or 'learning_rate'."""
  if name == 'prob':
    return config.method.prob
  return _learning_rate(config, task)


def selection(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> list[dict[str, Any]]:
  """Returns the table of what the config selects, a row a matrix."""
  params = task.init(jax.random.key(0))
  c = config.method
  matrices = make_matrices(config, task)
  if c.mode == 'adapter':
    policy = _policy(config, task, c.prob)
    return adapters.describe(params, policy, matrices)
  if c.name == 'full':
    return [
        {'matrix': m.path, 'shape': f'{m.m} x {m.n}', 'trained': m.m * m.n}
        for m in matrices_lib.find(params, matrices)
    ]
  prob = {'rac_left': 1.0, 'rac_right': 0.0}.get(c.name, c.prob)
  return chain.describe(params, rank=c.rank, prob=prob, matrices=matrices)


def trained_parameters(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> float:
  """Returns the mean number of trained parameters a step."""
  rows = selection(config, task)
  total = float(sum(row['trained'] for row in rows))
  if config.method.train_others:
    params = task.init(jax.random.key(0))
    chosen = matrices_lib.mask(params, make_matrices(config, task))
    sizes = jax.tree.map(lambda p, m: 0 if m else p.size, params, chosen)
    total += sum(jax.tree.leaves(sizes))
  return total


def trained_leaves(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> Callable[[Any], Any] | None:
  """Returns params -> tree of bool in gradient mode; None where all move."""
  if config.method.train_others:
    return None
  return methods.matrices_only(make_matrices(config, task))


def make_matrices(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> matrices_lib.Matrices:
  """Returns what is a matrix, by method.select."""
  select = config.method.select
  if select == 'all-linear':
    key = jax.random.key(0)
    batch = task_lib.take(task.data['train'], jnp.arange(task.batch_size))
    return inject.all_linear(task.loss, task.init(key), batch, key)
  return matrices_lib.Matrices(select=select or None)


def is_flax(task: task_lib.Task) -> bool:
  """Returns whether params are those of a Flax model (a leaf `kernel`)."""
  leaves = jax.tree_util.tree_flatten_with_path(task.init(jax.random.key(0)))[0]
  paths = matrices_lib.path_names([path for path, _ in leaves])
  return any(path.rpartition('/')[2] == 'kernel' for path in paths)


def _period(config: config_dict.ConfigDict, task: task_lib.Task) -> int:
  """Returns the steps of a link."""
  c = config.method
  if c.period_passes is None:
    return c.period
  if c.period_passes <= 0:
    raise ValueError(
        'Expected method.period_passes > 0, got'
        f' period_passes={c.period_passes}.'
    )
  steps_per_pass = task.num_samples // task.batch_size  # Of an epoch.
  return max(1, round(c.period_passes * steps_per_pass))


def _local_steps(config: config_dict.ConfigDict, task: task_lib.Task) -> int:
  """Returns the steps of the optimiser in a step of the method."""
  c = config.method
  is_local = c.mode == 'adapter' or c.estimator == 'fedavg'
  if config.federated.num_clients and is_local:
    return _period(config, task)
  return 1


def _policy(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    prob: float | jax.Array,
) -> adapters.ChainPolicy:
  c = config.method
  return methods.make_policy(
      c.name,
      c.rank,
      _period(config, task) or None,
      prob,
      alpha=c.alpha,
      scaling=c.scaling,
      resample=c.resample,
      sketch=make_sketch(config),
      frame=c.frame,
      init=c.init,
      zero=c.zero,
      warmup=c.link_warmup,
      reset_optimizer=c.reset_optimizer,
      rounding=c.rounding,
      shared_coin=c.shared_coin,
  )


def _adapter_optimizer(
    config: config_dict.ConfigDict, learning_rate: Any
) -> optax.GradientTransformation:
  c = config.method
  parts = []
  if c.clip_norm is not None:
    parts.append(optax.clip_by_global_norm(c.clip_norm))
  parts.append(_inner(config) or optax.identity())
  if c.optimizer == 'adamw':
    parts.append(optax.add_decayed_weights(c.weight_decay))
  return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def make_sketch(config: config_dict.ConfigDict) -> sketches.Sketch:
  """Returns the law of the subspaces."""
  try:
    return sketches.by_name(config.method.sketch)
  except ValueError as e:
    message = str(e).replace('Expected sketch', 'Expected method.sketch')
    raise ValueError(message) from e


def _inner(config: config_dict.ConfigDict) -> Any:
  c = config.method
  if c.optimizer == 'sgd':
    return None
  if c.optimizer == 'momentum':
    return optax.trace(c.optimizer_momentum)
  if c.optimizer in ('adam', 'adamw'):
    return optax.scale_by_adam()
  raise ValueError(
      "Expected method.optimizer to be 'sgd', 'momentum', 'adam' or 'adamw', got"
      f' {c.optimizer!r}.'
  )


def _learning_rate(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> float:
  """Returns gamma, from the field that is set."""
  c = config.method
  if c.stepsize_factor is None:
    field, value, result = 'learning_rate', c.learning_rate, c.learning_rate
  elif task.smoothness is None:
    raise ValueError(
        'Expected method.stepsize_factor with a task that knows L (quadratic,'
        f' linear_regression), got stepsize_factor={c.stepsize_factor} with'
        f' {task.name}.'
    )
  else:
    field, value = 'stepsize_factor', c.stepsize_factor
    result = value / task.smoothness
  if not (math.isfinite(value) and value > 0):
    raise ValueError(f'Expected method.{field} > 0, got {field}={value}.')
  return result


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
  peak = _learning_rate(config, task) if peak is None else peak
  num_steps *= _local_steps(config, task)
  if not 0 <= c.warmup_steps <= num_steps:
    raise ValueError(
        f'Expected method.warmup_steps in [0, {num_steps}], got'
        f' warmup_steps={c.warmup_steps}.'
    )
  if c.schedule not in ('constant', 'cosine'):
    raise ValueError(
        "Expected method.schedule to be 'constant' or 'cosine', got"
        f' {c.schedule!r}.'
    )
  if c.schedule == 'constant' and c.warmup_steps == 0:
    return peak
  rest: optax.Schedule = optax.constant_schedule(peak)
  if c.schedule == 'cosine':
    steps = max(1, num_steps - c.warmup_steps)
    rest = optax.cosine_decay_schedule(peak, steps)
  warmup = optax.linear_schedule(0.0, peak, max(1, c.warmup_steps))
  return optax.join_schedules([warmup, rest], [c.warmup_steps])
