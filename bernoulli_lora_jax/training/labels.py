"""Configs and metrics in people's words.

A name is made of facts, each of some fields of a config. The name of a single run
says what it is and what is not as by default; names of several say what varies
among them, and what they share is said once.
"""

import collections
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import methods

METHODS = {  # In the order of tables.
    'full': 'full fine-tuning',
    'probe': 'linear probe',
    'lora': 'LoRA',
    'asymmetric_left': 'asymmetric LoRA (left frozen)',
    'asymmetric_right': 'asymmetric LoRA (right frozen)',
    'cola': 'COLA',
    'rac_left': 'RAC-LoRA (left frozen)',
    'rac_right': 'RAC-LoRA (right frozen)',
    'bernoulli': 'Bernoulli-LoRA',
}
_MODES = {
    'gradient': 'projected gradients',
    'adapter': 'adapters',
    'sketched': 'sketched gradients',
}
_OPTIMIZERS = {
    'sgd': 'SGD',
    'adam': 'Adam',
    'adamw': 'AdamW',
    'column': 'column Adam',
}
_COMPRESSORS = {
    'identity': 'uncompressed',
    'randk': 'RandK',
    'topk': 'TopK',
    'powersgd': 'PowerSGD',
}
_CHAINS = ('rac_left', 'rac_right', 'bernoulli')
# Fields that make no variants of a run.
IGNORED = frozenset(
    {
        'seed',
        'task.data_dir',
        'training.progress',
        'training.max_to_keep',
        'training.keep_weights',
        'training.group_size',
        'training.step_together',
    }
)
RATES = ('method.learning_rate', 'method.stepsize_factor')
# What `task_name` tells.
TASK = (
    'task.name',
    'federated.num_clients',
    'federated.partition',
    'federated.dirichlet_alpha',
    'federated.unequal',
)
_BUDGET = tuple(
    f'training.{x}' for x in ('num_steps', 'num_passes', 'num_full_passes')
)
_DEFAULTS = checkpoint.flatten(base_config.get_config().to_dict())

Flat = Mapping[str, Any]  # {'method.rank': 4}


class _Fact(NamedTuple):
  """What some fields of a config say together."""

  fields: tuple[str, ...]
  say: Callable[[Flat], str | None]  # None: not read by this run.
  # Said wherever it varies; others only where what stands before leaves it open.
  is_main: bool = False


def is_federated(config: Mapping[str, Any]) -> bool:
  """Returns whether a run has clients."""
  return config.get('federated', {}).get('num_clients', 0) > 0


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {'a.b': value} of what a run reads, older runs' gaps by default."""
  found = {**_DEFAULTS, **checkpoint.flatten(config)}
  found = {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
  if found['method.name'] != 'bernoulli':
    del found['method.prob']
  if found['federated.num_clients'] == 0:
    found = {k: v for k, v in found.items() if not k.startswith('federated.')}
  return found


def name(config: Mapping[str, Any], without: Collection[str] = ()) -> str:
  """Returns what a run is called by itself: 'Bernoulli-LoRA, SGD, r = 4'.

  Args:
    config: nested, of one run.
    without: fields that are not told.
  """
  c = flat(config)
  parts = []
  for fact in _FACTS:
    if set(fact.fields) <= {*without, *RATES, 'task.name'}:
      continue
    usual = fact.say(c | {field: _DEFAULTS[field] for field in fact.fields})
    said = fact.say(c)
    is_method = fact.fields[0].startswith('method.')
    if said and (fact.is_main or (is_method and said != usual)):
      parts.append(said)
  return ', '.join(parts)


def names(
    configs: Sequence[Mapping[str, Any]], without: Collection[str] = ()
) -> tuple[list[str], str]:
  """Returns names that tell configs apart, and what they have in common.

  Args:
    configs: nested, each of one run.
    without: fields that are told elsewhere.

  Returns:
    Names that say what varies. Configs that differ in any field but those of
    `without` and `IGNORED` have different names, all others the same. And, for a
    caption, the facts that are not in the names.
  """
  flats = [flat(config) for config in configs]
  hidden = {*without, *IGNORED}
  told, shared = [''] * len(flats), []
  for fact in _FACTS:
    if set(fact.fields) <= hidden:
      continue
    said = [fact.say(c) for c in flats]
    values = list(dict.fromkeys(text for text in said if text is not None))
    if _is_open(told, said) or (fact.is_main and len(values) > 1):
      told = [_join(a, b) for a, b in zip(told, said, strict=True)]
    elif values:
      shared.append(_either(values))
  for field in sorted(set().union(*flats) - hidden):
    said = [_assigned(field, c) for c in flats]
    both = list(zip(told, said, strict=True))
    found = collections.Counter(a for a, _ in set(both))
    told = [_join(a, b) if found[a] > 1 else a for a, b in both]
  if not any(told):  # One config, or all the same.
    told = [name(config, without) for config in configs]
    shared = [text for text in shared if text not in told[0].split(', ')]
  told = [a or name(b, without) for a, b in zip(told, configs, strict=True)]
  return told, ', '.join(filter(None, shared))


def task_name(config: Mapping[str, Any]) -> str:
  """Returns the task, and how its examples are dealt among clients."""
  c = flat(config)
  return ', '.join(filter(None, (c['task.name'], _clients(c), _partition(c))))


class Metric(NamedTuple):
  """How a metric is shown."""

  label: str  # With its unit.
  scale: float  # Of the numbers that are shown.
  is_log: bool  # Whether its axis is logarithmic.


def metric(identifier: str) -> Metric:
  """Returns how a metric of any task is shown; accuracies in percent."""
  if identifier.endswith('accuracy'):
    return Metric(f'{spaced(identifier)}, %', 100.0, False)
  text = {
      'train_gap': 'f - f*',
      'grad_norm_sq': 'squared gradient norm, trained leaves',
      'train_loss': 'training loss',
  }.get(identifier, spaced(identifier))
  return Metric(text, 1.0, identifier in ('train_gap', 'grad_norm_sq'))


def _is_open(told: Sequence[str], said: Sequence[str | None]) -> bool:
  """Returns whether things told alike are said to differ."""
  return len(set(zip(told, said, strict=True))) > len(set(told))


def _join(a: str, b: str | None) -> str:
  return ', '.join(filter(None, (a, b)))


def _either(values: Sequence[str]) -> str:
  """Returns 'K = 1 or 17'; '' for several values that have no symbol."""
  symbols = {text.rpartition(' = ')[0] for text in values}
  if len(values) == 1:
    return values[0]
  if len(symbols) > 1 or symbols == {''}:
    return ''
  first, *rest = sorted(values, key=lambda text: (len(text), text))
  return ' or '.join([first, *(text.rpartition(' = ')[2] for text in rest)])


def _assigned(field: str, c: Flat) -> str | None:
  if field not in c:
    return None
  value = c[field]
  text = _number(value) if isinstance(value, float) else str(value)
  return f'{spaced(field.rpartition(".")[2])} = {text or "none"}'


def spaced(identifier: str) -> str:
  """Returns a name with spaces; what is no name, as a path, as it is."""
  is_name = identifier.isidentifier()
  return identifier.replace('_', ' ') if is_name else identifier


def _number(x: float) -> str:
  """Returns the short text of a number, all its digits where it has more."""
  text = f'{x:g}'
  return text if float(text) == x else repr(x)


def _method(c: Flat) -> str:
  if c['method.estimator'] == 'fedavg':
    return 'FedAvg of weights'
  if c['method.name'] == 'lora' and 'federated.num_clients' in c:
    return 'FedAvg of LoRA'
  return METHODS.get(c['method.name'], spaced(c['method.name']))


def _mode(c: Flat) -> str | None:
  if c['method.name'] not in _CHAINS:
    return None  # There is one.
  return _MODES.get(c['method.mode'], spaced(c['method.mode']))


def _zero(c: Flat) -> str | None:
  if c['method.name'] not in ('lora', 'cola'):
    return None
  return ('L' if c['method.zero'] == 'right' else 'R') + ' random'


def _moves(c: Flat) -> str:
  """Returns the estimator and the optimiser, the plain ones unsaid."""
  optimizer = c['method.optimizer']
  text = _OPTIMIZERS.get(optimizer, spaced(optimizer))
  estimator = c['method.estimator']
  if estimator in ('sgd', 'fedavg') or c['method.mode'] != 'gradient':
    return text
  return estimator.upper() + ('' if optimizer == 'sgd' else f', {text}')


def _compressor(c: Flat) -> str | None:
  """Returns 'TopK 5%'."""
  is_local = c['method.mode'] == 'adapter' or c['method.estimator'] == 'fedavg'
  if 'federated.num_clients' not in c or is_local:
    return None
  kind, argument = c['federated.compressor'], c['federated.argument']
  text = _COMPRESSORS.get(kind, spaced(kind))
  if not argument:
    return text
  percent = f'{100 * argument:.12g}'
  is_part = kind in ('randk', 'topk') and argument < 1
  if is_part and float(percent) / 100 == argument:
    return f'{text} {percent}%'
  return f'{text} {_number(argument)}'


def _period(c: Flat) -> str | None:
  """Returns the steps of a link, or the local ones of a round."""
  passes = c['method.period_passes']
  has_links = c['method.name'] in ('cola', *_CHAINS)
  is_local = c['method.mode'] == 'adapter' and 'federated.num_clients' in c
  if not (has_links or is_local or c['method.estimator'] == 'fedavg'):
    return None
  if passes is None:
    return f'K = {c["method.period"]}'
  return f'K = {_number(passes)} pass' + ('' if passes == 1 else 'es')


def _partition(c: Flat) -> str | None:
  if 'federated.partition' not in c:
    return None
  return {
      'iid': 'IID' + (', unequal' if c['federated.unequal'] else ''),
      'dirichlet': f'Dirichlet({_number(c["federated.dirichlet_alpha"])})',
      'group': 'by group',
  }.get(c['federated.partition'], spaced(c['federated.partition']))


def _rate(c: Flat) -> str:
  factor = c['method.stepsize_factor']
  if factor is None:
    return f'gamma = {_number(c["method.learning_rate"])}'
  return f'gamma = {_number(factor)}/L'


def _budget(c: Flat) -> str:
  if c['training.num_steps']:
    unit = 'rounds' if 'federated.num_clients' in c else 'steps'
    return f'{c["training.num_steps"]:,} {unit}'
  if c['training.num_full_passes'] is not None:
    return f'FLOPs of {_number(c["training.num_full_passes"])} full passes'
  return f'{_number(c["training.num_passes"])} passes'


def _rank(c: Flat) -> str | None:
  return (
      None if c['method.name'] in methods.WHOLE else f'r = {c["method.rank"]}'
  )


def _prob(c: Flat) -> str | None:
  return f'p = {_number(c["method.prob"])}' if 'method.prob' in c else None


def _clients(c: Flat) -> str | None:
  count = c.get('federated.num_clients')
  return None if count is None else f'{count} clients'


_FACTS = (  # As they follow one another in a name.
    _Fact(('method.name',), _method, True),
    _Fact(('method.estimator', 'method.optimizer'), _moves, True),
    _Fact(('federated.compressor', 'federated.argument'), _compressor, True),
    _Fact(('method.rank',), _rank, True),
    _Fact(('method.prob',), _prob),
    _Fact(('method.mode',), _mode),
    _Fact(('method.period', 'method.period_passes'), _period),
    _Fact(('method.zero',), _zero),
    _Fact(RATES, _rate),
    _Fact(('federated.num_clients',), _clients, True),
    _Fact(TASK[2:], _partition, True),
    _Fact(('task.name',), lambda c: f'on {spaced(c["task.name"])}', True),
    _Fact(_BUDGET, _budget),
)
