"""What a field of a config may be, checked before anything is computed.

What depends on the task (ranks, batch sizes, the kinds of a mode) is checked
where the task is known, see `arguments`.
"""

import ast
from collections.abc import Callable
import inspect
import io
import math
import re
import tokenize
from typing import Any, NamedTuple

from ml_collections import config_dict

from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint

_END = 2**31  # Of whole numbers: steps are counted in int32.


class _Rule(NamedTuple):
  holds: Callable[[Any], bool]
  text: str  # What holds, after the field's name.


def _at_least(low: int) -> _Rule:
  return _Rule(lambda x: x >= low, f'>= {low}')


def _one_of(*names: str) -> _Rule:
  return _Rule(lambda x: x in names, f'in {names}')


_SEED = _Rule(lambda x: 0 <= x < 2**32, 'in [0, 2^32)')
_POSITIVE = _Rule(lambda x: x > 0, '> 0')
_NOT_NEGATIVE = _Rule(lambda x: x >= 0, '>= 0')
_CLOSED = _Rule(lambda x: 0 <= x <= 1, 'in [0, 1]')
_OPEN = _Rule(lambda x: 0 < x < 1, 'in (0, 1)')
_NOT_ONE = _Rule(lambda x: 0 <= x < 1, 'in [0, 1)')
_NOT_ZERO = _Rule(lambda x: 0 < x <= 1, 'in (0, 1]')
_FREE = _Rule(lambda x: True, '')
_LATER = _FREE  # Names that are looked up where the mode is known.


def _is_pattern(text: str) -> bool:
  try:
    re.compile(text)
  except (re.error, OverflowError, RecursionError):
    return False
  return True


_TASKS = ('digits', 'mnist', 'linear_regression', 'l1_regression', 'quadratic')

# Every field; None is allowed where it is the default.
_RULES: dict[str, _Rule] = {
    'seed': _SEED,
    'x64': _FREE,
    'task.name': _Rule(
        lambda x: x in _TASKS or bool(re.fullmatch(r'[^:]+:[A-Za-z_]\w*', x)),
        f"in {_TASKS} or 'module:function'",
    ),
    'task.chunk': _at_least(0),
    'task.batch_size': _at_least(1),
    'task.data_dir': _Rule(lambda x: '\0' not in x, 'without zero bytes'),
    'task.param_dtype': _one_of('', 'float32', 'bfloat16', 'float16'),
    'task.hidden': _Rule(
        lambda x: all(_is_whole(width) and 1 <= width < _END for width in x),
        'of whole numbers >= 1',
    ),
    'task.dropout': _NOT_ONE,
    'task.split_seed': _SEED,
    'task.pretrain_epochs': _at_least(0),
    'task.pretrain_learning_rate': _POSITIVE,
    'task.dim': _at_least(1),
    'task.num_rows': _at_least(1),
    'task.num_pretraining': _at_least(1),
    'task.num_samples': _at_least(1),
    'method.mode': _one_of('gradient', 'adapter', 'sketched'),
    'method.name': _LATER,
    'method.estimator': _LATER,
    'method.rank': _at_least(1),
    'method.prob': _CLOSED,
    'method.sketch': _LATER,
    'method.period': _at_least(0),
    'method.period_passes': _POSITIVE,
    'method.shared_coin': _FREE,
    'method.shared_frames': _Rule(
        lambda x: all(map(_is_pattern, x)), 'of regular expressions'
    ),
    'method.select': _Rule(_is_pattern, 'to be a regular expression'),
    'method.train_others': _FREE,
    'method.others': _Rule(_is_pattern, 'to be a regular expression'),
    'method.other_rows': _Rule(
        lambda x: all(_is_whole(row) and 0 <= row < _END for row in x),
        'of whole numbers >= 0',
    ),
    'method.optimizer': _one_of('sgd', 'momentum', 'adam', 'adamw', 'column'),
    'method.weight_decay': _NOT_NEGATIVE,
    'method.optimizer_momentum': _NOT_ONE,
    'method.page_prob': _NOT_ZERO,
    'method.mvr_momentum': _NOT_ONE,
    'method.learning_rate': _POSITIVE,
    'method.stepsize_factor': _POSITIVE,
    'method.schedule': _one_of('constant', 'cosine', 'linear'),
    'method.warmup_steps': _FREE,  # The steps of the run bound it.
    'method.clip_norm': _POSITIVE,
    'method.alpha': _POSITIVE,
    'method.scaling': _one_of('rank', 'sqrt'),
    'method.frame': _one_of('orthonormal', 'raw'),
    'method.init': _one_of('uniform', 'normal'),
    'method.zero': _one_of('left', 'right'),
    'method.resample': _FREE,
    'method.reset_optimizer': _FREE,
    'method.link_warmup': _at_least(0),
    'method.rounding': _one_of('nearest', 'stochastic', 'compensated'),
    'federated.num_clients': _at_least(0),
    'federated.partition': _one_of('iid', 'dirichlet', 'group'),
    'federated.dirichlet_alpha': _POSITIVE,
    'federated.unequal': _FREE,
    'federated.partition_seed': _SEED,
    'federated.weights': _one_of('size', 'uniform'),
    'federated.cohort': _at_least(1),
    'federated.compressor': _LATER,
    'federated.argument': _NOT_NEGATIVE,
    'federated.concatenate': _FREE,
    'federated.marina_prob': _NOT_ZERO,
    'federated.start': _one_of('full', 'compressed', 'zero'),
    'training.num_steps': _at_least(0),
    'training.num_passes': _NOT_NEGATIVE,
    'training.num_full_passes': _POSITIVE,
    'training.num_evals': _at_least(1),
    'training.eval_every': _at_least(0),
    'training.checkpoint_every': _at_least(0),
    'training.steps_per_dispatch': _at_least(1),
    'training.num_micro_batches': _at_least(1),
    'training.patience': _at_least(0),
    'training.plateau_patience': _at_least(0),
    'training.plateau_factor': _OPEN,
    'training.eval_gradient': _FREE,
    'training.recipe': _FREE,
    'training.recipe_of_steps': _FREE,
    'training.keep_weights': _FREE,
    'training.group_size': _at_least(0),
    'training.step_together': _FREE,
    'training.parallel': _one_of('none', 'jit', 'pmap'),
    'training.num_devices': _at_least(1),
    'training.progress': _FREE,
    'training.max_to_keep': _at_least(1),
}


def check(config: config_dict.ConfigDict) -> None:
  """Raises unless a config has the fields of base_config, each in its range.

  Raises:
    ValueError: a field that is unknown, missing, of another type or outside its
      range, by name.
  """
  if not isinstance(config, config_dict.ConfigDict):
    raise ValueError(
        f'Expected a ConfigDict from get_config(), got {config!r}: begin with'
        ' base_config.get_config().'
    )
  defaults = base_config.get_config()
  known = checkpoint.flatten(defaults.to_dict())
  given = checkpoint.flatten(config.to_dict())
  own = {field for field in given if field.startswith('task.kwargs.')}
  if own and ':' not in config.task.name:
    raise ValueError(
        "Expected task.kwargs for a task of one's own, 'module:function', got"
        f' {min(own)} with task.name={config.task.name!r}.'
    )
  for field in sorted(given.keys() - known.keys() - own):
    raise ValueError(
        f'Expected a field of base_config, got config.{field}={given[field]!r}.'
    )
  for field in sorted(known.keys() - given.keys()):
    raise ValueError(f'Expected config.{field}, which is missing.')
  for field, value in given.items():
    if field in own:
      continue
    name = field.rpartition('.')[2]
    section = defaults[field.rpartition('.')[0]] if '.' in field else defaults
    kind = section.get_type(name)
    if value is None and known[field] is None:
      continue
    is_kind = isinstance(value, kind) or (kind is float and _is_whole(value))
    if not is_kind or (isinstance(value, bool) and kind is not bool):
      raise ValueError(
          f'Expected {field} of type {kind.__name__}, got {name}={value!r}.'
      )
    rule = _RULES[field]
    if kind is float and not math.isfinite(value):
      rule = _Rule(lambda x: False, 'to be finite')
    elif kind is int and rule is not _SEED and value >= _END:
      rule = _Rule(lambda x: False, '< 2^31')
    if not rule.holds(value):
      raise ValueError(f'Expected {field} {rule.text}, got {name}={value!r}.')
  parts, size = config.training.num_micro_batches, config.task.batch_size
  if size % parts and config.method.estimator != 'gd':
    raise ValueError(
        'Expected training.num_micro_batches to divide'
        f' task.batch_size={size}, got num_micro_batches={parts}.'
    )


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def named(error: ValueError) -> ValueError:
  """Returns an error of the library with the section before a field of it."""
  match = re.match(r'Expected (\w+)\b(?![.\w])', str(error))
  fields = [f for f in _RULES if match and f.endswith(f'.{match[1]}')]
  if match is None or len(fields) != 1:
    return error
  text = str(error)
  return ValueError(f'Expected {fields[0]}{text[match.end(1) :]}')


class Field(NamedTuple):
  """What the source of base_config says of a field, or of a section."""

  name: str
  comment: str
  heading: str  # Of the fields from here on.


def documented() -> list[Field]:
  """Returns the fields in order with the comments of base_config's source.

  A comment stands beside a field or, where nothing does, above it; above a
  section, or a field that has one beside it, it is a heading.
  """
  source = inspect.getsource(base_config.get_config)
  lines = source.splitlines()
  tokens = tokenize.generate_tokens(io.StringIO(source).readline)
  comments = {
      token.start[0]: token.string.lstrip('# ')
      for token in tokens
      if token.type == tokenize.COMMENT
  }
  known = checkpoint.flatten(base_config.get_config().to_dict())
  found = []
  (function,) = ast.parse(source).body
  for node in ast.walk(function):
    if not isinstance(node, ast.Assign):
      continue
    name = ast.unparse(node.targets[0]).partition('.')[2]
    extent = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    beside = ' '.join(comments[i] for i in extent if i in comments)
    first = node.lineno
    while lines[first - 2].lstrip().startswith('#'):
      first -= 1
    above = ' '.join(comments[i] for i in range(first, node.lineno))
    if name not in known:
      beside, above = '', above or name
    elif not beside:
      beside, above = above, ''
    found.append(Field(name, beside, above))
  return [field for field in found if field.name]
