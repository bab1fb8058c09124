"""From a config to a run: the border where user input is checked."""

from collections.abc import Mapping
import json
import math
import pathlib
from typing import Any

import jax
from ml_collections import config_dict
import optax

from bernoulli_lora_jax import chain
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax.tasks import classification
from bernoulli_lora_jax.tasks import digits
from bernoulli_lora_jax.tasks import linear_regression
from bernoulli_lora_jax.tasks import mnist
from bernoulli_lora_jax.tasks import quadratic
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import parallel

SKETCHES = {
    'gaussian': sketches.gaussian,
    'rademacher': sketches.rademacher,
    'coordinate': sketches.coordinate,
    'srht': sketches.srht,
}


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
  """Returns the task that `config.task` describes; pre-trains if need be."""
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
  c, t = config.method, config.training
  driver = parallel.make_driver(t.parallel, t.num_devices)
  matrices = _matrices(config)
  estimate: dict[str, Any] = {
      'estimator': c.estimator,
      'num_samples': task.num_samples,
      'batch_size': task.batch_size,
      'page_prob': c.page_prob,
      'momentum': c.mvr_momentum,
      'num_micro_batches': t.num_micro_batches,
      'trained': None if c.train_others else methods.matrices_only(matrices),
      'driver': driver,
  }
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
  cost = methods.gradient_method(
      task.loss, lambda key: optax.identity(), **estimate
  ).passes_per_step
  # Whole evaluation intervals: one length of dispatch, compiled once.
  every = max(1, (t.num_steps or round(t.num_passes / cost)) // t.num_evals)
  num_steps = t.num_steps or every * max(1, round(t.num_passes / cost / every))
  make_tx = methods.make_transformation(
      c.name,
      _schedule(config, _learning_rate(config, task), num_steps),
      rank=c.rank,
      prob=c.prob,
      inner=_inner(config),
      clip_norm=c.clip_norm,
      **{}
      if c.name == 'full'
      else {
          'sketch': _sketch(c.sketch),
          'period': c.period,
          'shared_coin': c.shared_coin,
          'matrices': matrices,
      },
  )
  method = methods.gradient_method(task.loss, make_tx, **estimate)
  jax.eval_shape(method.init, jax.random.key(0), task.init(jax.random.key(0)))
  settings = loop.Settings(
      num_steps=num_steps,
      eval_every=every,
      checkpoint_every=t.checkpoint_every,
      steps_per_dispatch=t.steps_per_dispatch,
      patience=t.patience,
      progress=t.progress,
      max_to_keep=t.max_to_keep,
  )
  return loop.make_program(task, method, settings, driver)


def train(
    config: config_dict.ConfigDict,
    workdir: str | pathlib.Path,
    program: loop.Program | None = None,
) -> dict[str, Any]:
  """Trains the run of a config in a directory; see `loop.train`."""
  program = make_program(config) if program is None else program
  record = json.loads(config.to_json_best_effort())
  facts = {'trained_parameters': trained_parameters(config, program.task)}
  return loop.train(program, config.seed, pathlib.Path(workdir), record, facts)


def selection(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> list[dict[str, Any]]:
  """Returns the table of what the config selects, a row a matrix."""
  params = task.init(jax.random.key(0))
  c = config.method
  found = matrices_lib.find(params, _matrices(config))
  if c.name == 'full':
    return [
        {'matrix': m.path, 'shape': f'{m.m} x {m.n}', 'trained': m.m * m.n}
        for m in found
    ]
  prob = {'rac_left': 1.0, 'rac_right': 0.0}.get(c.name, c.prob)
  return chain.describe(
      params, rank=c.rank, prob=prob, matrices=_matrices(config)
  )


def trained_parameters(
    config: config_dict.ConfigDict, task: task_lib.Task
) -> float:
  """Returns the mean number of trained parameters a step."""
  rows = selection(config, task)
  total = float(sum(row['trained'] for row in rows))
  if config.method.train_others:
    params = task.init(jax.random.key(0))
    chosen = matrices_lib.mask(params, _matrices(config))
    sizes = jax.tree.map(lambda p, m: 0 if m else p.size, params, chosen)
    total += sum(jax.tree.leaves(sizes))
  return total


def _matrices(config: config_dict.ConfigDict) -> matrices_lib.Matrices:
  return matrices_lib.Matrices(select=config.method.select or None)


def _sketch(name: str) -> sketches.Sketch:
  if name not in SKETCHES:
    raise ValueError(
        f'Expected method.sketch in {tuple(SKETCHES)}, got {name!r}.'
    )
  return SKETCHES[name]()


def _inner(config: config_dict.ConfigDict) -> Any:
  c = config.method
  if c.optimizer == 'sgd':
    return None
  if c.optimizer == 'momentum':
    return optax.trace(c.optimizer_momentum)
  if c.optimizer == 'adam':
    return optax.scale_by_adam()
  raise ValueError(
      "Expected method.optimizer to be 'sgd', 'momentum' or 'adam', got"
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


def _schedule(
    config: config_dict.ConfigDict, peak: float, num_steps: int
) -> float | optax.Schedule:
  c = config.method
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
