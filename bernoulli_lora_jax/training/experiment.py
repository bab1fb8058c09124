"""From a config to a run: the border where user input is checked."""

from collections.abc import Mapping
import json
import math
import pathlib
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import chain
from bernoulli_lora_jax import files
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import policies
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import directory
from bernoulli_lora_jax.training import federated_methods as federated
from bernoulli_lora_jax.training import fields
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import parallel
from bernoulli_lora_jax.training import programs


def apply_overrides(
    config: config_dict.ConfigDict, overrides: Mapping[str, Any]
) -> config_dict.ConfigDict:
  """Returns a copy of the config with flat overrides {'method.rank': 4}.

  Raises:
    ValueError: a field that does not exist.
    TypeError: a value of another type than the field's.
  """
  config = config.copy_and_resolve_references().lock()
  known = checkpoint.flatten(config.to_dict())
  for field, value in overrides.items():
    if field not in known:
      raise ValueError(
          f'Expected a field of base_config, got config.{field}={value!r}.'
      )
    try:
      config.update_from_flattened_dict({field: value})
    except TypeError as e:
      raise TypeError(
          f'Expected {field} of type {type(known[field]).__name__}, got'
          f' {field}={value!r}: {e}'
      ) from e
  return config


check_config = fields.check
# Of the last task, by config.
_COUNTED: dict[str, Any] = {'task': None, 'flops': {}}


def read_config(directory: str | pathlib.Path) -> config_dict.ConfigDict:
  """Returns the config of a run, from its config.json.

  Raises:
    ValueError: a file that is missing or damaged, a field that is unknown or of
      another type, by name.
  """
  path = pathlib.Path(directory, 'config.json')
  if not path.is_file():
    raise ValueError(f'Expected the directory of a run with {path}, got none.')
  record = files.read_json(path)
  if not isinstance(record, dict):
    raise ValueError(f'Expected a mapping in {path}, got {record!r:.40}.')
  config = base_config.get_config()
  known = checkpoint.flatten(config.to_dict())
  for field, value in checkpoint.flatten(record).items():
    value = tuple(value) if isinstance(value, list) else value
    if field.startswith('task.kwargs.'):
      *folders, name = field.split('.')[2:]
      with config.unlocked():
        place = config.task.kwargs
        for folder in folders:  # A mapping in a mapping, as `columns`.
          if folder not in place:
            place[folder] = config_dict.ConfigDict()
          place = place[folder]
        place[name] = value
      continue
    if field not in known:
      raise ValueError(
          f'Expected a field of base_config, got {field}={value!r} in {path}.'
      )
    try:
      config.update_from_flattened_dict({field: value})
    except TypeError as e:
      raise ValueError(f'Expected another {field} in {path}, got {e}') from e
  with config.unlocked():
    config.training.progress = False
  return config


def check_workdir(
    config: config_dict.ConfigDict, workdir: str | pathlib.Path
) -> None:
  """Raises unless the run of a config can begin or go on in a directory.

  What it asks takes no time and writes nothing.

  Raises:
    ValueError: a field outside its range, a directory that cannot be written, is
      of another configuration or has another process in it.
  """
  fields.check(config)
  directory.check(workdir)
  checkpoint.compare_config(
      pathlib.Path(workdir), json.loads(config.to_json_best_effort())
  )
  if (path := pathlib.Path(workdir, 'summary.json')).exists():
    loop.read_summary(path)


def make_program(
    config: config_dict.ConfigDict, task: task_lib.Task | None = None
) -> programs.Program:
  """Returns the compiled parts of the runs of a config, whatever the seed.

  Args:
    config: see `base_config`.
    task: what `arguments.make_task(config)` returns, if it is there already.

  Raises:
    ValueError: a field outside its range, by name.
  """
  fields.check(config)
  task = arguments.make_task(config) if task is None else task
  check_task(config, task)
  t = config.training
  kind = t.parallel
  if config.federated.num_clients and kind == 'pmap':
    warnings.warn(
        "Expected training.parallel 'none' or 'jit' in federated runs, got"
        " 'pmap': taking 'jit', which shards the axis of clients.",
        stacklevel=2,
    )
    kind = 'jit'
  driver = parallel.make_driver(kind, t.num_devices)
  try:
    settings = make_settings(config, task)
    method = make_method(config, task, driver=driver)
    if t.recipe and method.chain is None:
      raise ValueError(
          f'Expected training.recipe=False in {config.method.mode} mode, got'
          ' recipe=True: a recipe is made of the factors of a chain.'
      )
    is_kept = t.recipe and config.method.mode == 'sketched'
    if t.recipe_of_steps and not is_kept:
      raise ValueError(
          'Expected training.recipe_of_steps=False without training.recipe in'
          f' sketched mode, got recipe_of_steps=True, recipe={t.recipe} in'
          f' {config.method.mode} mode.'
      )
    key = jax.random.key(0)
    jax.eval_shape(method.init, key, task_lib.shapes(task))
  except ValueError as e:
    raise fields.named(e) from e
  return programs.Program(task, method, settings, driver)


def check_task(config: config_dict.ConfigDict, task: task_lib.Task) -> None:
  """Raises ValueError for what a task without a training split cannot do."""
  if task.sampling != 'stream' or 'train' in task.data:
    return
  asked = {
      'method.estimator': config.method.estimator in ('gd', 'page'),
      'training.eval_gradient': config.training.eval_gradient,
      'federated.num_clients': config.federated.num_clients > 0,
  }
  for field, needs_data in asked.items():
    if needs_data:
      raise ValueError(
          f"Expected data['train'] of {task.name}, which is a stream, for"
          f' {field}={config[field.split(".")[0]][field.split(".")[1]]!r}.'
      )


def make_settings(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> programs.Settings:
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
  every = t.eval_every or every
  return programs.Settings(
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
  period = arguments.period_of(config, task)
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
  if c.mode not in methods.MODES:
    raise ValueError(
        f'Expected method.mode in {methods.MODES}, got {c.mode!r}.'
    )
  prob = c.prob if prob is None else prob
  if learning_rate is None:
    learning_rate = arguments.learning_rate_of(config, task)
  schedule = learning_rate
  if num_steps is not None:
    schedule = arguments.make_schedule(config, task, num_steps, learning_rate)
  matrices = arguments.make_matrices(config, task)
  common: dict[str, Any] = {
      'num_samples': task.num_samples,
      'batch_size': task.batch_size,
      'num_micro_batches': config.training.num_micro_batches,
      'driver': driver,
  }
  if config.federated.num_clients:
    return _make_federated(config, task, schedule, prob, driver)
  if c.mode != 'gradient':
    if c.estimator != 'sgd':
      raise ValueError(
          f"Expected method.estimator='sgd' in {c.mode} mode, got"
          f' {c.estimator!r}: the others carry a full gradient (gradient mode).'
      )
    if c.train_others:
      raise ValueError(
          f'Expected method.train_others=False in {c.mode} mode, got True.'
      )
    if config.training.recipe and c.others:
      raise ValueError(
          'Expected training.recipe=False with method.others, which no recipe'
          f' holds, got others={c.others!r}.'
      )
    if c.mode == 'sketched':
      _check_sketched(c)
    return methods.adapter_method(
        task.loss,
        arguments.make_policy(config, task, prob),
        arguments.make_optimizer(config, schedule),
        matrices=matrices,
        additive=not arguments.is_flax(task),
        others=arguments.make_others(config, schedule),
        sketched=c.mode == 'sketched',
        keeps=_kept(config),
        **common,
    )
  if c.other_rows:
    raise ValueError(
        'Expected no method.other_rows in gradient mode, got'
        f' other_rows={tuple(c.other_rows)}.'
    )
  return methods.gradient_method(
      task.loss,
      arguments.make_transformation(config, task, schedule, prob),
      estimator=c.estimator,
      page_prob=c.page_prob,
      momentum=c.mvr_momentum,
      chunk=task.chunk,
      trained=arguments.trained_leaves(config, task),
      **common,
  )


def _kept(config: config_dict.ConfigDict) -> str:
  """Returns what states keep for a recipe, see `adapters.make_chain`."""
  if config.method.mode != 'sketched' or not config.training.recipe:
    return ''
  return 'step' if config.training.recipe_of_steps else 'link'


def _check_sketched(c: config_dict.ConfigDict) -> None:
  """Raises ValueError for what only factors can do."""
  if c.name not in methods.SKETCHED:
    raise ValueError(
        f'Expected method.name in {methods.SKETCHED} in sketched mode, got'
        f' {c.name!r}.'
    )
  if c.optimizer == 'adamw':
    raise ValueError(
        "Expected method.optimizer 'sgd', 'momentum', 'adam' or 'column' in"
        " sketched mode, which has no factor to decay, got 'adamw'."
    )


def _make_federated(
    config: config_dict.ConfigDict,
    task: task_lib.Task,
    schedule: Any,
    prob: float | jax.Array,
    driver: parallel.Driver | None,
) -> methods.Method:
  """Returns the federated method of a config, see `federated_methods`."""
  c, f = config.method, config.federated
  cohort = arguments.make_cohort(
      config, task, 1 if driver is None else driver.num_devices
  )
  matrices = arguments.make_matrices(config, task)
  if c.mode == 'adapter' or c.estimator == 'fedavg':
    return _make_rounds_method(config, task, schedule, prob, driver, cohort)
  if c.estimator not in federated.ESTIMATORS:
    raise ValueError(
        f'Expected method.estimator in {federated.ESTIMATORS} or fedavg in'
        f' federated runs, got {c.estimator!r}.'
    )

  def update_numbers(state, params):
    if c.name in methods.WHOLE:
      size = sum(x.size for x in jax.tree.leaves(params))
      return jnp.asarray(size, jnp.result_type(float))
    (found,) = chain.states(state)
    return chain.sent_numbers(
        found,
        params,
        rank=c.rank,
        prob=methods.chain_prob(c.name, prob),
        period=arguments.period_of(config, task),
        matrices=matrices,
        shared_coin=c.shared_coin,
    )

  return federated.estimator_method(
      task.loss,
      arguments.make_transformation(config, task, schedule, prob),
      update_numbers,
      estimator=c.estimator,
      compressor=arguments.make_compressor(config),
      cohort=cohort,
      marina_prob=f.marina_prob,
      start=f.start,
      concatenate=f.concatenate,
      trained=arguments.trained_leaves(config, task),
      driver=driver,
  )


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
      lambda **kwargs: arguments.make_rounds(
          config, task, schedule, prob, **kwargs
      ),
      cohort=cohort,
      num_samples=task.num_samples,
      batch_size=config.task.batch_size,
      is_adapter=c.mode == 'adapter',
      additive=not arguments.is_flax(task),
      driver=driver,
  )


def step_flops(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> float | None:
  """Returns the floating-point operations of a step, as XLA counts them.

  Counted in the program before its optimisation, by XLA's CPU backend whatever
  the device; None where there is none. What is scanned, as layers, counts once.
  """
  # A sweep asks often, and a program is not traced in no time.
  like = apply_overrides(config, {'seed': 0, 'method.learning_rate': 1.0})
  name = like.to_json_best_effort()
  if _COUNTED['task'] is not task:
    _COUNTED.update(task=task, flops={})
  if name not in _COUNTED['flops']:
    _COUNTED['flops'][name] = _count_flops(config, task)
  return _COUNTED['flops'][name]


def _count_flops(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> float | None:
  method = _make_method(config, task)

  def start(key, data, weights):
    return programs.start(task, method, key, weights)

  def one(key, data, weights):
    state = start(key, data, weights)
    return programs.steps(task, method, 1, data, state, key, 0)

  try:
    cpu = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out.
    return None
  args = jax.eval_shape(lambda: (jax.random.key(0), task.data, task.weights))
  if task.load is not None:
    args = (*args[:2], task_lib.shapes(task))

  def count(f):
    with jax.default_device(cpu):
      analysis = jax.jit(f).lower(*args).cost_analysis()
    return analysis.get('flops', 0.0) if analysis else math.nan

  flops = count(one) - count(start)
  return flops if math.isfinite(flops) and flops > 0 else None


def _equal_flops(
    config: config_dict.ConfigDict, task: task_lib.Task, passes: float
) -> float:
  """Returns the steps that cost `passes` data passes of full fine-tuning."""
  c = config.method
  full = apply_overrides(
      config,
      {
          'method.mode': 'gradient',
          'method.name': 'full',
          'method.estimator': 'sgd',
          'method.train_others': c.train_others or bool(c.others),
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
    program: programs.Program | None = None,
) -> dict[str, Any]:
  """Trains the run of a config in a directory; see `loop.train`."""
  program = make_program(config) if program is None else program
  return loop.train(*run_of(config, workdir, program))


def run_of(
    config: config_dict.ConfigDict,
    workdir: str | pathlib.Path,
    program: programs.Program,
) -> tuple[programs.Program, int, pathlib.Path, dict[str, Any], dict[str, Any]]:
  """Returns the arguments of `loop.train` for the run of a config."""
  record = json.loads(config.to_json_best_effort())
  facts_of_run = facts(config, program.task)
  return program, config.seed, pathlib.Path(workdir), record, facts_of_run


def facts(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> dict[str, Any]:
  """Returns what a summary says of the config."""
  return {
      'trained_parameters': trained_parameters(config, task),
      'steps_per_link': arguments.period_of(config, task) or None,
  }


def argument(
    config: config_dict.ConfigDict, task: task_lib.Task, name: str
) -> float:
  """Returns the value that a config gives to 'prob' or 'learning_rate'."""
  if name == 'prob':
    return config.method.prob
  return arguments.learning_rate_of(config, task)


def selection(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> list[dict[str, Any]]:
  """Returns the table of what the config selects, a row a matrix."""
  params = task_lib.shapes(task)
  c = config.method
  matrices = arguments.make_matrices(config, task)
  if c.mode != 'gradient':
    policy = arguments.make_policy(config, task, c.prob)
    others = [c.others] if c.others else []
    rows = adapters.adapter_table(params, policy, matrices, others)
    for row in rows if c.other_rows else ():
      if row['rank'] == 'full':
        leaf = matrices_lib.named_leaves(params)[row['matrix']]
        axis = arguments.axis_of_rows(row['matrix'], leaf)
        row['trained'] = len(c.other_rows) * (leaf.size // leaf.shape[axis])
    return rows
  whole = lambda path, shape: {
      'matrix': path,
      'shape': ' x '.join(map(str, shape)),
      'trained': math.prod(shape),
  }
  if c.name == 'probe':
    rows = []
  elif c.name == 'full':
    found = matrices_lib.find(params, matrices)
    rows = [whole(m.path, (*m.batch, m.m, m.n)) for m in found]
  else:
    prob = float(methods.chain_prob(c.name, c.prob))
    rows = chain.selection_table(
        params, rank=c.rank, prob=prob, matrices=matrices
    )
  if c.others and not c.train_others:
    patterns = (c.others,)
    (places,) = policies.resolve_others(params, (), patterns).values()
    leaves = jax.tree.leaves(params)
    known = {row['matrix'] for row in rows}
    rows += [
        whole(path, leaves[i].shape)
        for path, i in places.items()
        if path not in known
    ]
  return rows


def trained_parameters(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> float:
  """Returns the mean number of trained parameters a step."""
  rows = selection(config, task)
  total = float(sum(row['trained'] for row in rows))
  if config.method.train_others:
    params = task_lib.shapes(task)
    chosen = matrices_lib.mask(params, arguments.make_matrices(config, task))
    sizes = jax.tree.map(lambda p, m: 0 if m else p.size, params, chosen)
    total += sum(jax.tree.leaves(sizes))
  return total
