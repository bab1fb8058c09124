"""Finished runs: how they are grouped, and their tables."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
import csv
import decimal
import itertools
import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
import tabulate

from bernoulli_lora_jax.training import directory as directory_lib
from bernoulli_lora_jax.training import labels
from bernoulli_lora_jax.training import methods


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


def unfinished(directories: Iterable[str | pathlib.Path]) -> list[pathlib.Path]:
  """Returns the directories of runs below others that have no summary."""
  found = {}
  for directory in map(pathlib.Path, directories):
    for path in sorted(_found(directory, 'config.json')):
      is_export = (path.parent / directory_lib.MARK).exists()
      if not is_export and not (path.parent / 'summary.json').exists():
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
  log = path / 'metrics.jsonl'
  lines = enumerate(_text(log).splitlines(), 1)
  run = Run(
      path,
      _mapping(path / 'config.json'),
      _mapping(path / 'summary.json'),
      [_parsed(log, line, number) for number, line in lines],
  )
  for section in ('task', 'method'):
    if not isinstance(run.config.get(section), dict):
      raise ValueError(
          f'Expected a section {section} in {path / "config.json"}, got'
          f' {sorted(run.config)}.'
      )
  for number, line in enumerate(run.metrics, 1):
    step = line.get('step') if isinstance(line, dict) else None
    if not isinstance(step, (int, float)):
      raise ValueError(
          f'Expected metrics with a step in {log}, line {number}, got {line!r}.'
      )
  steps = [line['step'] for line in run.metrics]
  if any(a >= b for a, b in itertools.pairwise(steps)):
    raise ValueError(f'Expected steps that grow in {log}, got {steps}.')
  end = run.summary.get('step', 0)
  last = steps[-1] if steps else None
  if last is None or last < end:
    raise ValueError(
        f'Expected metrics up to step {end} of the summary in {log}, got'
        f' step={last} in its last line.'
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


def megabytes(run: Run, line: Mapping[str, float]) -> float:
  """Returns what a client has sent and received so far, in megabytes."""
  bits = line.get('bits_up', 0.0) + line.get('bits_down', 0.0)
  return bits / run.config['federated']['num_clients'] / 8e6


class Group(NamedTuple):
  """Runs that are averaged: one row, one curve."""

  task: str  # With how its examples are dealt among clients.
  caption: str  # What all groups of the task share.
  name: str  # What is this group's own.
  runs: list[Run]


def groups(
    runs: Iterable[Run],
    by: Collection[str] | None = None,
    *,
    apart: Collection[str] = (),
) -> list[Group]:
  """Returns runs that are averaged, in the order of the family.

  Where runs of a group differ in the learning rate, those with the lowest mean
  validation loss are kept (a diverged run counts as infinite).

  Args:
    runs: finished ones.
    by: fields ('method.rank') that tell the groups of a task apart. None: all
      but the seed, the learning rate and `labels.IGNORED`.
    apart: fields that names do not tell, shown beside them.

  Raises:
    ValueError: a field of `by` that no run has.
  """
  found: dict[str, dict[str, list[Run]]] = {}
  known = set()
  for run in runs:
    flat = labels.flat(run.config)
    known |= flat.keys()
    kept = flat.keys() - labels.IGNORED - set(labels.RATES)
    if by is not None:
      kept = flat.keys() & {*by, *labels.TASK}
    key = {field: flat[field] for field in sorted(kept)}
    if by is None:  # Rates of two kinds are not compared.
      key['is_factor'] = flat['method.stepsize_factor'] is not None
    same_task = found.setdefault(labels.task_name(run.config), {})
    same_task.setdefault(json.dumps(key), []).append(run)
  if unknown := set(by or ()) - known:
    raise ValueError(
        f'Expected fields of the runs to group by, got {sorted(unknown)}.'
    )
  hidden = {*labels.TASK, *apart}
  hidden |= set(labels.RATES) if by is None else known - set(by)
  result: list[Group] = []
  for task, members in sorted(found.items()):
    kept_runs = [_best_learning_rate(group) for group in members.values()]
    names, shared = labels.names([m[0].config for m in kept_runs], hidden)
    # A path of a task of one's own keeps its underscores.
    title = ', '.join(map(labels.spaced, task.split(', ')))
    caption = f'{title}: {shared}'.removesuffix(': ')
    pairs = zip(names, kept_runs, strict=True)
    result += sorted((Group(task, caption, *p) for p in pairs), key=_place)
  return result


def _place(group: Group) -> tuple[Any, ...]:
  """Returns the place in the order of the family; numbers in names count."""
  flat = labels.flat(group.runs[0].config)
  family = [*labels.METHODS, flat['method.name']]
  return (
      (flat['method.mode'] != 'gradient', flat['method.mode'] == 'sketched'),
      family.index(flat['method.name']),
      flat.get('method.prob', 0.0),
      [
          (float(part), '') if part[:1].isdigit() else (math.inf, part)
          for part in re.split(r'(\d+\.?\d*)', group.name)
      ],
  )


def learning_rate(run: Run) -> float:
  """Returns the learning rate, or the factor of 1/L that stands for it."""
  rate, factor = (labels.flat(run.config)[field] for field in labels.RATES)
  return rate if factor is None else factor


def _best_learning_rate(runs: list[Run]) -> list[Run]:
  rates: dict[float, list[Run]] = {}
  for run in runs:
    rates.setdefault(learning_rate(run), []).append(run)

  def loss(run):
    train_loss = run.summary.get('train_loss', math.inf)
    return run.summary.get('validation_loss', train_loss)

  mean = lambda members: sum(map(loss, members)) / len(members)
  return min(rates.values(), key=mean)


def final_metric(runs: Sequence[Run]) -> str:
  """Returns what tables compare: test accuracy, else f - f*, else the loss."""
  ended = [run for run in runs if 'diverged' not in run.summary]
  for name in ('test_accuracy', 'train_gap'):
    if ended and all(name in run.summary for run in ended):
      return name
  return 'train_loss'


# (fields, (mean, standard deviation or None, runs)) of each published figure, in
# the units of the table; it stands beside the runs that have these fields.
Published = Sequence[tuple[Mapping[str, Any], tuple[float, float | None, int]]]


def statistics(
    runs: Sequence[Run],
    published: Published | None = None,
    *,
    metric: str | None = None,
    by: Collection[str] | None = None,
) -> list[dict[str, Any]]:
  """Returns one row of numbers a method and rank.

  Args:
    runs: finished ones.
    published: rows then say by how many standard errors ours differ. Where theirs
      has no deviation it counts as one run with ours.
    metric: of the summaries; None: `final_metric` of the task.
    by: see `groups`.

  Returns:
    Rows with mean and standard deviation over the seeds; accuracies in percent.
  """
  found = groups(runs, by, apart=('method.rank',))
  return [
      _statistics(group, name, published)
      for group, name in _measured(found, metric)
  ]


def _measured(
    found: Sequence[Group], metric: str | None
) -> Iterator[tuple[Group, str]]:
  """Yields groups with the metric of their task."""
  for group in found:
    same = [g.runs for g in found if g.task == group.task]
    yield group, metric or final_metric([run for runs in same for run in runs])


def _statistics(
    group: Group, metric: str, published: Published | None
) -> dict[str, Any]:
  first = group.runs[0]
  flat = labels.flat(first.config)
  is_full = flat['method.name'] in methods.WHOLE
  good = [run for run in group.runs if 'diverged' not in run.summary]
  values = labels.metric(metric).scale * np.asarray(
      [_number(run, metric) for run in good]
  )
  row: dict[str, Any] = {
      'task': group.task,
      'method': group.name,
      'rank': '-' if is_full else str(flat['method.rank']),
      'learning_rate': learning_rate(first),
      'trained': first.summary.get('trained_parameters', math.nan),
      'metric': metric,
      'mean': float(values.mean()) if len(values) else math.nan,
      'std': float(values.std(ddof=1)) if len(values) > 1 else math.nan,
      'runs': len(group.runs),
      'diverged': len(group.runs) - len(good),
      'steps': float(np.mean([r.summary.get('step', 0) for r in group.runs])),
      'step_flops': first.summary.get('step_flops'),
      'seconds': float(np.mean([_number(r, 'seconds') for r in group.runs])),
  }
  if published is not None:
    theirs = _published(group, published)
    spread = row['std'] if theirs[1] is None else theirs[1]
    squares = row['std'] ** 2 / max(1, len(values))
    squares += spread**2 / max(1, theirs[2])
    row['published'] = theirs[0]
    row['published_std'] = math.nan if theirs[1] is None else theirs[1]
    row['standard_errors'] = (row['mean'] - theirs[0]) / math.sqrt(
        squares or math.nan
    )
  return row


def _published(
    group: Group, published: Published
) -> tuple[float, float | None, int]:
  flat = labels.flat(group.runs[0].config)
  same = (found for key, found in published if key.items() <= flat.items())
  return next(same, (math.nan, None, 0))


def _number(run: Run, name: str) -> float:
  value = run.summary.get(name)
  if not isinstance(value, (int, float)):
    raise ValueError(
        f'Expected a number {name} in {run.path / "summary.json"}, got {value!r}.'
    )
  return value


def comparison(
    runs: Sequence[Run],
    published: Published | None = None,
    *,
    metric: str | None = None,
    by: Collection[str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
  """Returns `statistics` for people: {caption: rows of a table}, one a task."""
  measured = list(_measured(groups(runs, by), metric))
  tables: dict[str, list[dict[str, Any]]] = {}
  for group, name in measured:
    same = [g for g, _ in measured if g.task == group.task]
    tables.setdefault(group.caption, []).append(
        _shown(_statistics(group, name, published), group, same, published)
    )
  return tables


def _shown(
    row: Mapping[str, Any],
    group: Group,
    same: Sequence[Group],
    published: Published | None,
) -> dict[str, Any]:
  """Returns the row of a group among those of its task."""
  lost = any('diverged' in run.summary for g in same for run in g.runs)
  counts = {len(g.runs) for g in same}
  over = count_runs(same)
  over = over if counts == {1} else f'mean ± s.d., {over}'
  count = row['runs'] - row['diverged']
  text: dict[str, Any] = {
      'method': group.name,
      _rate_header(same): row['learning_rate'],
      'trained a step': row['trained'],
      f'{labels.metric(row["metric"]).label} ({over})': Mean(
          row['mean'], row['std'], count
      ),
  }
  if published is not None:
    num = _published(group, published)[2]
    text['published'] = Mean(row['published'], row['published_std'], num)
    text['ours - theirs, s.e.'] = round(row['standard_errors'], 1)
  if lost or len(counts) > 1:
    diverged = f' ({row["diverged"]} diverged)' if row['diverged'] else ''
    text['runs'] = f'{row["runs"]}{diverged}'
  return {**text, 'seconds': round(row['seconds'], 2)}


def count_runs(found: Sequence[Group]) -> str:
  """Returns what means are over: '3 seeds', or 'runs' that differ in more."""
  counts = {len(group.runs) for group in found}
  seeds = lambda group: {run.config.get('seed') for run in group.runs}
  is_seeds = all(len(seeds(group)) == len(group.runs) for group in found)
  noun = 'seeds' if is_seeds else 'runs'
  if len(counts) > 1:
    return noun
  return f'{max(counts)} {noun if counts != {1} else noun[:-1]}'


def _rate_header(same: Sequence[Group]) -> str:
  configs = [group.runs[0].config['method'] for group in same]
  is_factor = all(c.get('stepsize_factor') is not None for c in configs)
  return 'rate, 1/L' if is_factor else 'rate'


def traffic(
    runs: Sequence[Run], target: float, by: Collection[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
  """Returns what federated methods send until they reach an accuracy.

  Args:
    runs: finished ones; those without clients are left out.
    target: validation accuracy in (0, 1).
    by: see `groups`.

  Returns:
    {caption: rows}. One row a method: rounds and megabytes a client, up and down,
    at the first evaluation that reached the target, means over the runs that did;
    and the kilobytes of a round, the mean over all rounds of all runs.
  """
  tables: dict[str, list[dict[str, Any]]] = {}
  for group in groups((r for r in runs if labels.is_federated(r.config)), by):
    is_there = lambda line: line.get('validation_accuracy', 0.0) >= target
    firsts = [next(filter(is_there, run.metrics), None) for run in group.runs]
    reached = [line for line in firsts if line is not None]
    last = [run.metrics[-1] for run in group.runs]
    total = lambda lines, name: sum(line.get(name, 0.0) for line in lines)
    count = group.runs[0].config['federated']['num_clients']
    rounds = max(1, total(last, 'step')) * count
    # None where no run reached the target.
    mean = lambda name, unit, lines=reached, total=total: (
        total(lines, name) / len(lines) / unit if lines else None
    )
    steps = mean('step', 1)
    row = {
        'method': group.name,
        'rate': learning_rate(group.runs[0]),
        'kB up a round': total(last, 'bits_up') / rounds / 8e3,
        'kB down a round': total(last, 'bits_down') / rounds / 8e3,
        f'reached {100 * target:g}%': f'{len(reached)} of {len(group.runs)}',
        'rounds': steps and round(steps),
        'MB up': mean('bits_up', count * 8e6),
        'MB down': mean('bits_down', count * 8e6),
    }
    tables.setdefault(group.caption, []).append(row)
  return tables


def write_csv(path: str | pathlib.Path, rows: Sequence[Mapping[str, Any]]):
  """Writes rows of numbers as CSV."""
  with open(path, 'w', newline='') as f:
    writer = csv.DictWriter(f, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


class Mean(NamedTuple):
  """A cell of a table: a mean over runs."""

  mean: float  # NaN: there is none.
  std: float  # NaN: unknown.
  count: int = 1  # Of runs.


def table(
    rows: Sequence[Mapping[str, Any]],
    style: str = 'simple',
    *,
    is_even: bool = False,
) -> str:
  """Returns rows as an aligned table.

  Args:
    rows: {header: cell}; None and what is missing are '-'.
    style: 'simple', 'github' or 'tsv'.
    is_even: whether the numbers of a column have equal decimals.
  """
  headers = list(dict.fromkeys(name for row in rows for name in row))
  columns = [[row.get(name) for row in rows] for name in headers]
  cells = [
      _column(column) if is_even else map(_cell, column) for column in columns
  ]
  is_number = lambda value: isinstance(value, (int, float, Mean))
  return tabulate.tabulate(
      list(zip(*cells, strict=True)),
      headers=headers,
      tablefmt={'github': 'pipe'}.get(style, style),
      disable_numparse=True,
      colalign=[
          'right' if any(map(is_number, column)) else 'left'
          for column in columns
      ]
      or None,
  )


def _cell(value: Any) -> str:
  if value is None:
    return '-'
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, float):
    is_count = value.is_integer() and 1000 <= abs(value) < 1e12
    return f'{value:,.0f}' if is_count else f'{value:.4g}'
  return f'{value:,}' if isinstance(value, int) else str(value)


def _column(values: Sequence[Any]) -> list[str]:
  """Returns the cells of a column with equal decimals."""
  as_mean = lambda v: Mean(v, math.nan) if isinstance(v, float) else v
  means = [as_mean(v) for v in values if isinstance(v, (float, Mean))]
  decimals = _decimals([m for m in means if math.isfinite(m.mean)])

  def number(x: float, digits: int) -> str:
    return f'{x:.{digits}e}' if decimals is None else f'{x:,.{decimals}f}'

  def cell(value: Any) -> str:
    if not isinstance(value, (float, Mean)):
      whole = isinstance(value, int) and not isinstance(value, bool)
      return number(value, 2) if whole and means else _cell(value)
    mean, std, _ = as_mean(value)
    if math.isnan(mean):
      return '-'
    return number(mean, 2) + ('' if math.isnan(std) else f' ± {number(std, 1)}')

  return [cell(value) for value in values]


def _decimals(means: Sequence[Mean]) -> int | None:
  """Returns the decimals of a column; None: of different magnitudes.

  The smallest standard error has one digit, where there is one. Else the spread of
  the column has three and the smallest number two, and none has more than four.
  """
  errors = [
      m.std / math.sqrt(m.count)
      for m in means
      if m.count > 1 and m.std / math.sqrt(m.count) > 1e-9 * abs(m.mean)
  ]  # Else rounding.
  values = [m.mean for m in means]
  sizes = [abs(value) for value in values if value]
  if not sizes:
    return 0
  place = lambda x: math.floor(math.log10(x))
  if errors:
    decimals = max(0, -place(min(errors)))
  else:
    needed = max(
        -int(decimal.Decimal(f'{x:.4g}').as_tuple().exponent) for x in sizes
    )
    spread = max(values) - min(values) or max(sizes)
    decimals = max(1, 2 - place(spread), min(4, 1 - place(min(sizes))))
    decimals = max(0, min(needed, decimals))
    if min(sizes) < 0.5 * 10.0**-decimals:
      return None
  is_long = decimals > 2 and decimals + place(max(sizes)) + 1 > 7
  return None if is_long or max(sizes) >= 1e12 else decimals
