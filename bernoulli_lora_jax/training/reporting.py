"""Tables and figures from finished runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import csv
import json
import math
import pathlib
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
import scipy.stats
import tabulate

# Told apart in greyscale by line style and marker, not by colour alone.
_STYLES = ['-', '--', '-.', ':', (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]
_MARKERS = ['o', 's', '^', 'v', 'D', 'P', 'X', '<', '>', '*']
_COLOURS = [
    '#000000',
    '#0072B2',
    '#D55E00',
    '#009E73',
    '#CC79A7',
    '#56B4E9',
    '#E69F00',
]


_MOST_PROBS = 3  # Curves of Bernoulli-LoRA a panel; `plot_prob` has all.
_FLOOR = 1e-16  # Of a logarithmic axis, relative to where a curve starts.


class Run(NamedTuple):
  """One run directory."""

  path: pathlib.Path
  config: dict[str, Any]
  summary: dict[str, Any]
  metrics: list[dict[str, float]]  # One mapping a line of metrics.jsonl.


def load_runs(directories: Iterable[str | pathlib.Path]) -> list[Run]:
  """Returns the finished runs below directories, sorted by path.

  Raises:
    FileNotFoundError: a directory that does not exist or holds no finished run.
  """
  runs = []
  for directory in map(pathlib.Path, directories):
    summaries = sorted(directory.rglob('summary.json'))
    if not summaries:
      raise FileNotFoundError(
          f'Expected a finished run (summary.json) below {directory}, found'
          ' none.'
      )
    for path in summaries:
      lines = (path.parent / 'metrics.jsonl').read_text().splitlines()
      runs.append(
          Run(
              path.parent,
              json.loads((path.parent / 'config.json').read_text()),
              json.loads(path.read_text()),
              [json.loads(line) for line in lines],
          )
      )
  return runs


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


def label(run: Run) -> str:
  """Returns the method's name in tables and legends.

  Left and right name the frozen side; (L) and (R) of LoRA and COLA the factor
  that starts at random; p is P(left), K the steps of a link.
  """
  method = run.config['method']
  name = _NAMES[method['name']]
  if method['name'] == 'bernoulli':
    name += f' p={method["prob"]:g}'
  if method['mode'] == 'gradient':
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


def rank(run: Run) -> str:
  """Returns the rank, '-' where nothing is sketched."""
  method = run.config['method']
  return '-' if method['name'] == 'full' else str(method['rank'])


def groups(runs: Iterable[Run]) -> dict[tuple[str, str, str], list[Run]]:
  """Returns runs by (task, method, rank), in the order of the family.

  Where runs of a group differ in the learning rate, those with the lowest mean
  validation loss are kept (a diverged run counts as infinite). Where they differ
  in other fields of the method or the task, each variant is a group of its own
  and these fields follow the name.
  """
  labelled: dict[tuple[str, str, str], list[Run]] = {}
  for run in runs:
    key = (run.config['task']['name'], label(run), rank(run))
    labelled.setdefault(key, []).append(run)
  grouped: dict[tuple[str, str, str], list[Run]] = {}
  for (task, name, rank_text), members in labelled.items():
    varied = _varied_fields(members)
    for run in members:
      extra = ''.join(f', {f}={run.config[s][f]}' for s, f in varied)
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


_IGNORED = {'learning_rate', 'stepsize_factor', 'data_dir'}  # No variants.


def _varied_fields(runs: Sequence[Run]) -> list[tuple[str, str]]:
  """Returns the fields of task and method that differ beside the rate."""
  first, varied = runs[0].config, []
  for section in ('task', 'method'):
    for field in sorted(first[section].keys() - _IGNORED):
      values = [run.config[section].get(field) for run in runs]
      if field == 'prob' and first['method']['name'] != 'bernoulli':
        continue
      if any(value != values[0] for value in values):
        varied.append((section, field))
  return varied


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
            if run.config['task']['name'] == task
            and 'diverged' not in run.summary
        ]
    )
    scale = 100 if metric == 'test_accuracy' else 1
    good = [run for run in members if 'diverged' not in run.summary]
    values = scale * np.asarray([run.summary[metric] for run in good])
    mean = float(values.mean()) if len(values) else math.nan
    std = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    row: dict[str, Any] = {
        'task': task,
        'method': method,
        'rank': rank_text,
        'learning_rate': learning_rate(members[0]),
        'trained': members[0].summary['trained_parameters'],
        'metric': metric,
        'mean': mean,
        'std': std,
        'runs': len(members),
        'diverged': len(members) - len(good),
        'steps': float(np.mean([r.summary.get('step', 0) for r in members])),
        'step_flops': members[0].summary.get('step_flops'),
        'seconds': float(np.mean([run.summary['seconds'] for run in members])),
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
    return (
        f'{value:,.0f}'
        if value == int(value) and abs(value) >= 1000
        else (f'{value:g}')
    )
  return f'{value:,}' if isinstance(value, int) else str(value)


class Curve(NamedTuple):
  """A metric against data passes over the seeds of one group."""

  passes: np.ndarray  # (points,)
  mean: np.ndarray
  half: np.ndarray  # Half of the 95% confidence interval; zero for one seed.


def curve(runs: Sequence[Run], metric: str, log: bool = False) -> Curve | None:
  """Returns the mean of a metric at its evaluations, with its confidence.

  Args:
    runs: the seeds of one method.
    metric: as in metrics.jsonl.
    log: average logarithms (a geometric mean), for positive metrics.

  Returns:
    The curve on the passes of the first run that all runs reached; other runs
    are interpolated. None where no run has the metric.
  """
  series = []
  for run in runs:
    points = [
        (line.get('data_passes', 0.0), line[metric])
        for line in run.metrics
        if metric in line
    ]
    if points:
      series.append(np.asarray(points))
  if not series:
    return None
  passes = series[0][:, 0]
  # Up to where the shortest run ends, early stop or divergence; costs of PAGE
  # differ a little between seeds.
  end = min(s[-1, 0] for s in series)
  passes = passes[passes <= 1.05 * end]
  values = np.stack([np.interp(passes, s[:, 0], s[:, 1]) for s in series])
  if log:
    # What is rounding to zero has no logarithm.
    values = np.log(np.maximum(values, _FLOOR * abs(values[:, :1])))
  half = 0 * values[0]
  if len(values) > 1:
    half = values.std(0, ddof=1) / math.sqrt(len(values))
    half *= scipy.stats.t.ppf(0.975, len(values) - 1)
  return Curve(passes, values.mean(0), half)


def plot(
    runs: Sequence[Run],
    metric: str,
    ylabel: str,
    *,
    log: bool = False,
    title: str = '',
) -> matplotlib.figure.Figure | None:
  """Returns a figure of a metric against data passes, one panel a rank.

  Bands are 95% confidence intervals of the mean over seeds, by Student's t (of
  the mean logarithm where the axis is logarithmic).
  """
  grouped = _fewer_probs(groups(runs))
  ranks = sorted({key[2] for key in grouped} - {'-'}, key=int) or ['-']
  names = list(dict.fromkeys(key[1] for key in grouped))
  figure = matplotlib.figure.Figure(
      figsize=(5.2 * len(ranks) + 2.6, max(4.2, 0.25 * len(names) + 1)),
      layout='constrained',
  )
  panels = figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0]
  transform: Callable = np.exp if log else (lambda x: x)
  if metric.endswith('accuracy'):
    transform = lambda x: np.clip(x, 0, 1)  # An interval may reach beyond.
  elif not log and min(run.metrics[-1].get(metric, 0) for run in runs) >= 0:
    transform = lambda x: np.maximum(x, 0)
  drawn, lost = {}, {}
  for panel, shown in zip(panels, ranks, strict=True):
    for (_, name, found), members in grouped.items():
      values = curve(members, metric, log)
      if found not in (shown, '-') or values is None:
        continue
      i = names.index(name)
      drawn[name] = panel.plot(
          values.passes,
          transform(values.mean),
          label=name,
          color=_COLOURS[i % len(_COLOURS)],
          linestyle=_STYLES[(i + i // len(_COLOURS)) % len(_STYLES)],
          marker=_MARKERS[i % len(_MARKERS)],
          markersize=4,
          markevery=0.1 if len(values.passes) > 40 else (i % 4, 4),
      )[0]
      bad = sum('diverged' in run.summary for run in members)
      if bad:
        lost[name] = f'{name} ({bad} of {len(members)} diverged)'
      panel.fill_between(
          values.passes,
          transform(values.mean - values.half),
          transform(values.mean + values.half),
          alpha=0.15,
          linewidth=0,
          color=_COLOURS[i % len(_COLOURS)],
      )
    if shown != '-':
      panel.set_title(f'rank {shown}')
    panel.set_xlabel('data passes (a full gradient is 1)')
    panel.grid(True, which='major', linewidth=0.4, alpha=0.6)
    if log:
      panel.set_yscale('log')
      starts = [np.asarray(line.get_ydata())[0] for line in panel.get_lines()]
      if starts:  # Divergence is cut off.
        panel.set_ylim(top=min(panel.get_ylim()[1], 1e6 * max(starts)))
    if panel.dataLim.x1 > 1000:  # What happens early stays visible.
      panel.set_xscale('symlog', linthresh=10)
      panel.set_xlim(left=0)
  if not drawn:
    return None
  panels[0].set_ylabel(ylabel)
  figure.legend(
      drawn.values(),
      [lost.get(name, name) for name in drawn],
      loc='outside right center',
      fontsize=9,
      title='mean, band: 95% interval',
      title_fontsize=9,
  )
  if title:
    figure.suptitle(title)
  return figure


FIGURES = (
    ('validation_accuracy', 'validation accuracy', False),
    ('train_gap', 'f - f*', True),
    ('grad_norm_sq', 'squared gradient norm, trained leaves', True),
    ('train_loss', 'training loss', False),
)


def write_figures(
    runs: Sequence[Run], directory: str | pathlib.Path
) -> list[pathlib.Path]:
  """Writes one PNG a task and metric; returns their paths."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  written = []
  for task in dict.fromkeys(run.config['task']['name'] for run in runs):
    members = [run for run in runs if run.config['task']['name'] == task]
    for metric, ylabel, log in FIGURES:
      figure = plot(members, metric, ylabel, log=log, title=task)
      if figure is not None:
        path = directory / f'{task}_{metric}.png'
        figure.savefig(path, dpi=130)
        written.append(path)
    figure = plot_prob(members)
    if figure is not None:
      path = directory / f'{task}_prob.png'
      figure.savefig(path, dpi=130)
      written.append(path)
  return written


def _fewer_probs(
    grouped: dict[tuple[str, str, str], list[Run]],
) -> dict[tuple[str, str, str], list[Run]]:
  """Returns the groups without values of p between few that are kept."""
  prob = lambda members: (
      members[0].config['method']['prob']
      if members[0].config['method']['name'] == 'bernoulli'
      else None
  )
  found = {prob(members) for members in grouped.values()}
  probs = sorted(p for p in found if p is not None)
  if len(probs) <= _MOST_PROBS:
    return grouped
  kept = {None, probs[0], probs[len(probs) // 2], probs[-1]}
  return {key: m for key, m in grouped.items() if prob(m) in kept}


def plot_prob(runs: Sequence[Run]) -> matplotlib.figure.Figure | None:
  """Returns a figure of the final metric against p, or None for few values.

  Error bars are 95% confidence intervals of the mean over seeds.
  """
  chains = [r for r in runs if r.config['method']['name'] == 'bernoulli']
  probs = {run.config['method']['prob'] for run in chains}
  if len(probs) < 3:
    return None
  metric = final_metric(chains)
  scale = 100 if metric == 'test_accuracy' else 1
  lines: dict[tuple[str, str], dict[float, np.ndarray]] = {}
  for (_, name, rank_text), members in groups(chains).items():
    prob = members[0].config['method']['prob']
    values = [r.summary[metric] for r in members if metric in r.summary]
    key = (name.replace(f' p={prob:g}', ''), rank_text)
    lines.setdefault(key, {})[prob] = scale * np.asarray(values)
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout='constrained')
  panel = figure.subplots()
  for i, ((name, rank_text), points) in enumerate(lines.items()):
    x = sorted(p for p in points if len(points[p]) > 1)
    error = [
        points[p].std(ddof=1)
        / math.sqrt(len(points[p]))
        * scipy.stats.t.ppf(0.975, len(points[p]) - 1)
        for p in x
    ]
    panel.errorbar(
        x,
        [points[p].mean() for p in x],
        error,
        label=f'{name}, rank {rank_text}',
        color=_COLOURS[i % len(_COLOURS)],
        linestyle=_STYLES[i % len(_STYLES)],
        marker=_MARKERS[i % len(_MARKERS)],
        capsize=3,
    )
  names = {'test_accuracy': 'test accuracy, %', 'train_gap': 'f - f*'}
  panel.set_xlabel('p = P(left): the left factor is frozen, the right trained')
  panel.set_ylabel(names.get(metric, 'training loss') + ' (mean, 95% interval)')
  panel.grid(True, linewidth=0.4, alpha=0.6)
  panel.legend(fontsize=9)
  return figure
