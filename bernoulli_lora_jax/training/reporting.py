"""Finished runs: how they are grouped and named, and their tables."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import csv
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tabulate

from bernoulli_lora_jax.training import base_config


class Run(NamedTuple):
  """One run directory."""

  path: pathlib.Path
  config: dict[str, Any]
  summary: dict[str, Any]
  metrics: list[dict[str, float]]  # One mapping a line of metrics.jsonl.


def load_runs(directories: Iterable[str | pathlib.Path]) -> list[Run]:
  """Returns the finished runs below directories, sorted by path.

  A run is there once, however often and by whatever names it is given.

  Raises:
    FileNotFoundError: a directory that does not exist or holds no finished run.
    ValueError: a file that is missing or damaged, by name; a log that is shorter
      than its summary says.
  """
  runs = {}
  for directory in map(pathlib.Path, directories):
    summaries = sorted(_found(directory, 'summary.json'))
    if not summaries:
      raise FileNotFoundError(
          f'Expected a finished run (summary.json) below {directory}, found'
          ' none.'
      )
    for path in summaries:
      if path.parent.resolve() not in runs:
        runs[path.parent.resolve()] = _load_run(path.parent)
  return list(runs.values())


def unfinished(
    directories: Iterable[str | pathlib.Path],
) -> list[pathlib.Path]:
  """Returns the directories of runs below others that have no summary."""
  found = {}
  for directory in map(pathlib.Path, directories):
    for path in sorted(_found(directory, 'config.json')):
      if not (path.parent / 'summary.json').exists():
        found.setdefault(path.parent.resolve(), path.parent)
  return list(found.values())


def footer(runs: Sequence[Run], left_out: Sequence[pathlib.Path] = ()) -> str:
  """Returns the line below a table: how many runs ended, and how."""
  diverged = sum('diverged' in run.summary for run in runs)
  text = f'{len(runs)} finished runs, {diverged} of them diverged'
  text += f'; {len(left_out)} unfinished'
  return text + (f', as {left_out[0]}.' if left_out else '.')


def _found(directory: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
  """Yields the files of a name below a directory, links to folders followed."""
  seen = set()
  for folder, inside, files in os.walk(directory, followlinks=True):
    place = os.path.realpath(folder)
    if place in seen:  # A link to a folder above itself.
      inside.clear()
      continue
    seen.add(place)
    if name in files:
      yield pathlib.Path(folder, name)


def _load_run(path: pathlib.Path) -> Run:
  """Returns the run of a directory, its files checked."""
  run = Run(
      path,
      _mapping(path / 'config.json'),
      _mapping(path / 'summary.json'),
      [
          _parsed(path / 'metrics.jsonl', line, number)
          for number, line in enumerate(
              _text(path / 'metrics.jsonl').splitlines(), 1
          )
      ],
  )
  for section in ('task', 'method'):
    if not isinstance(run.config.get(section), dict):
      raise ValueError(
          f'Expected a section {section} in {path / "config.json"}, got'
          f' {sorted(run.config)}.'
      )
  for number, line in enumerate(run.metrics, 1):
    if not isinstance(line, dict) or not isinstance(
        line.get('step'), (int, float)
    ):
      raise ValueError(
          f'Expected metrics with a step in {path / "metrics.jsonl"}, line'
          f' {number}, got {line!r}.'
      )
  steps = [line['step'] for line in run.metrics]
  if any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
    raise ValueError(
        f'Expected steps that grow in {path / "metrics.jsonl"}, got {steps}.'
    )
  end = run.summary.get('step', 0)
  last = steps[-1] if steps else None
  if last is None or last < end:
    raise ValueError(
        f'Expected metrics up to step {end} of the summary in'
        f' {path / "metrics.jsonl"}, got step={last} in its last line.'
    )
  return run


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except FileNotFoundError:
    raise ValueError(
        f'Expected {path.name} beside summary.json in {path.parent}, got none.'
    ) from None
  except UnicodeDecodeError as e:
    raise ValueError(f'Expected text in {path}, got {e}.') from e


def _mapping(path: pathlib.Path) -> dict[str, Any]:
  value = _parsed(path, _text(path))
  if not isinstance(value, dict):
    raise ValueError(f'Expected a mapping in {path}, got {value!r}.')
  return value


def _parsed(path: pathlib.Path, text: str, line: int | None = None) -> Any:
  """Returns the value of a JSON text; a fault names its file."""
  try:
    return json.loads(text)
  except ValueError as e:
    where = f'{path}' + ('' if line is None else f', line {line}')
    raise ValueError(f'Expected JSON in {where}, got {e}.') from e


_NAMES = {
    'full': 'full fine-tuning',
    'lora': 'LoRA',
    'asymmetric_left': 'asymmetric LoRA left',
    'asymmetric_right': 'asymmetric LoRA right',
    'cola': 'COLA',
    'rac_left': 'RAC-LoRA left',
    'rac_right': 'RAC-LoRA right',
    'bernoulli': 'Bernoulli-LoRA',
}
_OPTIMIZERS = {'momentum': 'momentum', 'adam': 'Adam', 'adamw': 'AdamW'}


def is_federated(run: Run) -> bool:
  """Returns whether a run has clients."""
  return run.config.get('federated', {}).get('num_clients', 0) > 0


def task_name(run: Run) -> str:
  """Returns the task, and how its examples are dealt among clients."""
  name = run.config['task']['name']
  if not is_federated(run):
    return name
  f = run.config['federated']
  law = {
      'iid': 'IID' + (', unequal' if f['unequal'] else ''),
      'dirichlet': f'Dirichlet({f["dirichlet_alpha"]:g})',
      'group': 'by group',
  }[f['partition']]
  return f'{name}, {f["num_clients"]} clients, {law}'


def megabytes(run: Run, line: Mapping[str, float]) -> float:
  """Returns what a client has sent and received so far, in megabytes."""
  bits = line.get('bits_up', 0.0) + line.get('bits_down', 0.0)
  return bits / run.config['federated']['num_clients'] / 8e6


def label(run: Run) -> str:
  """Returns the method's name in tables and legends.

  Left and right name the frozen side; (L) and (R) of LoRA and COLA the factor
  that starts at random; p is P(left), K the steps of a link.
  """
  method = run.config['method']
  name = _NAMES[method['name']]
  if method['name'] == 'bernoulli':
    name += f' p={method["prob"]:g}'
  if method['estimator'] == 'fedavg':
    optimizer = _OPTIMIZERS.get(method['optimizer'], 'SGD')
    return f'FedAvg of weights K={method["period"]}, {optimizer}'
  if is_federated(run) and method['mode'] == 'gradient':
    return f'{name}, {_estimator(run)}'
  if is_federated(run) and method['name'] == 'lora':
    name, method = 'FedAvg of LoRA', {**method, 'name': 'cola'}
  elif method['mode'] == 'gradient':
    parts = [method['estimator'].upper()]
    if method['optimizer'] != 'sgd':
      parts.append(_OPTIMIZERS[method['optimizer']])
    return ', '.join([name, *parts[-1 if parts[0] == 'SGD' else 0 :]])
  if method['name'] in ('lora', 'cola'):
    name += ' (R)' if method['zero'] == 'left' else ' (L)'
  if method['name'] not in ('lora', 'asymmetric_left', 'asymmetric_right'):
    passes = method['period_passes']
    name += (
        f' K={method["period"]}' if passes is None else f' K={passes:g} pass'
    )
  return f'{name}, {_OPTIMIZERS.get(method["optimizer"], "SGD")} adapters'


def _estimator(run: Run) -> str:
  """Returns the federated estimator with its compressor."""
  f, method = run.config['federated'], run.config['method']
  text = {'randk': 'RandK', 'topk': 'TopK'}.get(
      f['compressor'], f['compressor']
  )
  if f['argument']:
    is_part = f['compressor'] in ('randk', 'topk') and f['argument'] < 1
    text += f' {100 * f["argument"]:g}%' if is_part else f' {f["argument"]:g}'
  return f'{method["estimator"].upper()} {text}'


def rank(run: Run) -> str:
  """Returns the rank, '-' where nothing is sketched."""
  method = run.config['method']
  return '-' if method['name'] == 'full' else str(method['rank'])


def groups(runs: Iterable[Run]) -> dict[tuple[str, str, str], list[Run]]:
  """Returns runs by (task, method, rank), in the order of the family.

  Where runs of a group differ in the learning rate, those with the lowest mean
  validation loss are kept (a diverged run counts as infinite). Where they differ
  in any other field but the seed and those of `_IGNORED`, each variant is a group
  of its own and these fields follow the name.
  """
  labelled: dict[tuple[str, str, str], list[Run]] = {}
  for run in runs:
    key = (task_name(run), label(run), rank(run))
    labelled.setdefault(key, []).append(run)
  grouped: dict[tuple[str, str, str], list[Run]] = {}
  for (task, name, rank_text), members in labelled.items():
    varied = _varied_fields(members)
    for run in members:
      extra = ''.join(f', {f}={_value(run, s, f)}' for s, f in varied)
      grouped.setdefault((task, name + extra, rank_text), []).append(run)

  def place(item):
    method = item[1][0].config['method']
    return (
        item[0][0],
        method['mode'] == 'adapter',
        list(_NAMES).index(method['name']),
        method['prob'],
        item[0],
    )

  return {
      key: _best_learning_rate(members)
      for key, members in sorted(grouped.items(), key=place)
  }


_DEFAULTS = base_config.get_config().to_dict()
_IGNORED = {  # No variants, or in the names already.
    'task': {'data_dir'},
    '': {'seed'},
    'training': {'progress', 'max_to_keep', 'group_size'},
    'method': {'learning_rate', 'stepsize_factor'},
    'federated': {
        'num_clients',
        'partition',
        'dirichlet_alpha',
        'unequal',
        'compressor',
        'argument',
    },
}


def _varied_fields(runs: Sequence[Run]) -> list[tuple[str, str]]:
  """Returns (section, field) of what differs in a group beside the rate."""
  first, varied = runs[0].config, []
  is_rate = lambda run: run.config['method']['stepsize_factor'] is None
  for section, ignored in _IGNORED.items():
    if section == 'federated' and not is_federated(runs[0]):
      continue  # Its fields are not read.
    named = set().union(*(_section(run.config, section) for run in runs))
    for field in sorted(named - ignored):
      if field == 'prob' and first['method']['name'] != 'bernoulli':
        continue
      values = [_value(run, section, field) for run in runs]
      if any(value != values[0] for value in values):
        varied.append((section, field))
  if len({is_rate(run) for run in runs}) > 1:  # Rates of two kinds.
    varied.append(('method', 'stepsize_factor'))
  return varied


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  """Returns a section of a config; '' are the fields outside of sections."""
  if name:
    return config.get(name, {})
  return {k: v for k, v in config.items() if not isinstance(v, Mapping)}


def _value(run: Run, section: str, field: str) -> Any:
  """Returns a field of a run; one that an older run did not have: its default."""
  found = _section(run.config, section)
  if field in found:
    return found[field]
  default = _section(_DEFAULTS, section).get(field)
  return list(default) if isinstance(default, tuple) else default


def learning_rate(run: Run) -> float:
  """Returns the learning rate, or the factor of 1/L that stands for it."""
  method = run.config['method']
  factor = method['stepsize_factor']
  return method['learning_rate'] if factor is None else factor


def _best_learning_rate(runs: list[Run]) -> list[Run]:
  rates: dict[float, list[Run]] = {}
  for run in runs:
    rates.setdefault(learning_rate(run), []).append(run)

  def loss(members):
    values = [
        run.summary.get(
            'validation_loss', run.summary.get('train_loss', math.inf)
        )
        for run in members
    ]
    return sum(values) / len(values)

  return min(rates.values(), key=loss)


def final_metric(runs: Sequence[Run]) -> str:
  """Returns what tables compare: test accuracy, else f - f*, else the loss."""
  for name in ('test_accuracy', 'train_gap'):
    if runs and all(name in run.summary for run in runs):
      return name
  return 'train_loss'


def statistics(
    runs: Sequence[Run],
    published: Mapping[str, tuple[float, float | None, int]] | None = None,
) -> list[dict[str, Any]]:
  """Returns one row of numbers a method and rank.

  Args:
    runs: finished ones.
    published: {label: (mean, standard deviation or None, runs)}, in the units of
      the table; rows then say by how many standard errors ours differ. Where
      theirs has no deviation it counts as one run with ours.

  Returns:
    Rows with mean and standard deviation over the seeds; accuracies in percent.
  """
  rows = []
  for (task, method, rank_text), members in groups(runs).items():
    metric = final_metric(
        [
            run
            for run in runs
            if task_name(run) == task and 'diverged' not in run.summary
        ]
    )
    scale = 100 if metric == 'test_accuracy' else 1
    good = [run for run in members if 'diverged' not in run.summary]
    values = scale * np.asarray([_number(run, metric) for run in good])
    mean = float(values.mean()) if len(values) else math.nan
    std = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    row: dict[str, Any] = {
        'task': task,
        'method': method,
        'rank': rank_text,
        'learning_rate': learning_rate(members[0]),
        'trained': members[0].summary.get('trained_parameters', math.nan),
        'metric': metric,
        'mean': mean,
        'std': std,
        'runs': len(members),
        'diverged': len(members) - len(good),
        'steps': float(np.mean([r.summary.get('step', 0) for r in members])),
        'step_flops': members[0].summary.get('step_flops'),
        'seconds': float(np.mean([_number(run, 'seconds') for run in members])),
    }
    if published is not None:
      theirs = published.get(method, (math.nan, None, 0))
      spread = std if theirs[1] is None else theirs[1]
      squares = std**2 / max(1, len(values)) + spread**2 / max(1, theirs[2])
      row['published'] = theirs[0]
      row['published_std'] = math.nan if theirs[1] is None else theirs[1]
      row['standard_errors'] = (mean - theirs[0]) / math.sqrt(
          squares or math.nan
      )
    rows.append(row)
  return rows


def _number(run: Run, name: str) -> float:
  value = run.summary.get(name)
  if not isinstance(value, (int, float)):
    raise ValueError(
        f'Expected a number {name} in {run.path / "summary.json"}, got {value!r}.'
    )
  return value


def comparison(
    runs: Sequence[Run],
    published: Mapping[str, tuple[float, float | None, int]] | None = None,
) -> list[dict[str, Any]]:
  """Returns `statistics` as text for a table."""
  names = {
      'test_accuracy': 'test accuracy, %',
      'train_gap': 'f - f*',
      'train_loss': 'training loss',
  }
  rows = []
  for row in statistics(runs, published):
    count = str(row['runs'])
    if row['diverged']:
      count += f' ({row["diverged"]} diverged)'
    text = {
        'task': row['task'],
        'method': row['method'],
        'rank': row['rank'],
        'rate': f'{row["learning_rate"]:g}',
        'trained a step': row['trained'],
        names[row['metric']]: _mean_std(row['mean'], row['std']),
    }
    if published is not None:
      text['published'] = _mean_std(row['published'], row['published_std'])
      far = row['standard_errors']
      text['ours - theirs, s.e.'] = '-' if math.isnan(far) else f'{far:+.1f}'
    rows.append({**text, 'runs': count, 'seconds': round(row['seconds'], 2)})
  return rows


def traffic(runs: Sequence[Run], target: float) -> list[dict[str, Any]]:
  """Returns what federated methods send until they reach an accuracy.

  Args:
    runs: finished ones; those without clients are left out.
    target: validation accuracy in (0, 1).

  Returns:
    One row a method: rounds and megabytes a client, up and down, at the first
    evaluation that reached the target, means over the runs that did; and the
    kilobytes of a round, the mean over all rounds of all runs.
  """
  rows = []
  for (task, method, rank_text), members in groups(
      run for run in runs if is_federated(run)
  ).items():
    count = members[0].config['federated']['num_clients']
    reached = []
    for run in members:
      for line in run.metrics:
        if line.get('validation_accuracy', 0.0) >= target:
          reached.append(line)
          break
    last = [run.metrics[-1] for run in members]
    steps = sum(line['step'] for line in reached) / max(1, len(reached))
    row = {
        'task': task,
        'method': method,
        'rank': rank_text,
        'rate': f'{learning_rate(members[0]):g}',
        'kB up a round': _a_round(last, 'bits_up', count),
        'kB down a round': _a_round(last, 'bits_down', count),
        f'reached {100 * target:g}%': f'{len(reached)} of {len(members)}',
        'rounds': round(steps) if reached else '-',
    }
    for name, text in (('bits_up', 'MB up'), ('bits_down', 'MB down')):
      bits = sum(line.get(name, 0.0) for line in reached)
      value = bits / max(1, len(reached)) / count / 8e6
      row[text] = f'{value:.3g}' if reached else '-'
    rows.append(row)
  return rows


def _a_round(
    last: Sequence[Mapping[str, float]], name: str, num_clients: int
) -> float:
  """Returns the kilobytes a client and round, from the last lines of runs."""
  total = sum(line.get(name, 0.0) for line in last)
  rounds = sum(line['step'] for line in last)
  return round(total / max(1, rounds) / num_clients / 8e3, 2)


def write_csv(path: str | pathlib.Path, rows: Sequence[Mapping[str, Any]]):
  """Writes rows of numbers as CSV."""
  with open(path, 'w', newline='') as f:
    writer = csv.DictWriter(f, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


def _mean_std(mean: float, std: float) -> str:
  if math.isnan(mean):
    return '-'
  return f'{mean:.4g}' + ('' if math.isnan(std) else f' +- {std:.2g}')


def table(rows: Sequence[Mapping[str, Any]], style: str = 'simple') -> str:
  """Returns rows as an aligned table; style 'simple', 'github' or 'tsv'."""
  cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
  return tabulate.tabulate(
      cells,
      headers='keys',
      tablefmt=style,
      disable_numparse=True,
      colalign=[
          'right' if isinstance(value, (int, float)) else 'left'
          for value in rows[0].values()
      ]
      if rows
      else None,
  )


def _cell(value: Any) -> str:
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, float):
    is_count = value.is_integer() and 1000 <= abs(value) < 1e12
    return f'{value:,.0f}' if is_count else f'{value:.4g}'
  return f'{value:,}' if isinstance(value, int) else str(value)
