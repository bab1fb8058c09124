"""Tables and figures from finished runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import pathlib
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
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


def label(run: Run) -> str:
  """Returns the method's name in tables and legends."""
  method = run.config['method']
  names = {
      'full': 'full fine-tuning',
      'rac_left': 'RAC-LoRA left',
      'rac_right': 'RAC-LoRA right',
      'bernoulli': 'Bernoulli-LoRA',
  }
  name = f'{names[method["name"]]}, {method["estimator"].upper()}'
  return (
      name
      if method['optimizer'] == 'sgd'
      else (f'{name}, {method["optimizer"]}')
  )


def rank(run: Run) -> str:
  """Returns the rank, '-' where nothing is sketched."""
  method = run.config['method']
  return '-' if method['name'] == 'full' else str(method['rank'])


def groups(runs: Iterable[Run]) -> dict[tuple[str, str, str], list[Run]]:
  """Returns runs by (task, method, rank), in the order of their first."""
  grouped: dict[tuple[str, str, str], list[Run]] = {}
  for run in runs:
    key = (run.config['task']['name'], label(run), rank(run))
    grouped.setdefault(key, []).append(run)
  order = {'full': 0, 'rac_left': 1, 'rac_right': 2, 'bernoulli': 3}
  place = lambda item: (
      order[item[1][0].config['method']['name']],
      item[0],
  )
  return dict(sorted(grouped.items(), key=place))


def final_metric(runs: Sequence[Run]) -> str:
  """Returns what tables compare: test accuracy, else the training loss."""
  has_accuracy = all('test_accuracy' in run.summary for run in runs)
  return 'test_accuracy' if has_accuracy else 'train_loss'


def comparison(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Returns one row a method and rank: mean and deviation over the seeds."""
  rows = []
  done = [run for run in runs if 'diverged' not in run.summary]
  metric = final_metric(done)
  for (task, method, rank_text), members in groups(runs).items():
    good = [run for run in members if 'diverged' not in run.summary]
    values = [run.summary[metric] for run in good]
    scale = 100 if metric == 'test_accuracy' else 1
    name = 'test accuracy, %' if metric == 'test_accuracy' else 'training loss'
    rows.append(
        {
            'task': task,
            'method': method,
            'rank': rank_text,
            'trained a step': members[0].summary['trained_parameters'],
            name: _mean_std(np.asarray(values) * scale),
            'seeds': len(members)
            if len(good) == len(members)
            else (f'{len(members)} ({len(members) - len(good)} diverged)'),
            'seconds': round(
                float(np.mean([run.summary['seconds'] for run in members])), 2
            ),
        }
    )
  return rows


def _mean_std(values: np.ndarray) -> str:
  if values.size == 0:
    return '-'
  spread = f' +- {values.std(ddof=1):.3g}' if values.size > 1 else ''
  return f'{values.mean():.4g}{spread}'


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
  std: np.ndarray  # Zero for one seed.


def curve(runs: Sequence[Run], metric: str, log: bool = False) -> Curve | None:
  """Returns mean and standard deviation of a metric at its evaluations.

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
    values = np.log(np.maximum(values, np.finfo(float).tiny))
  spread = values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
  return Curve(passes, values.mean(0), spread)


def plot(
    runs: Sequence[Run],
    metric: str,
    ylabel: str,
    *,
    log: bool = False,
    title: str = '',
) -> matplotlib.figure.Figure | None:
  """Returns a figure of a metric against data passes, one panel a rank.

  Bands are one standard deviation over seeds to either side (of the logarithm
  where the axis is logarithmic).
  """
  grouped = groups(runs)
  ranks = sorted({key[2] for key in grouped} - {'-'}, key=int) or ['-']
  figure = matplotlib.figure.Figure(
      figsize=(5.2 * len(ranks) + 2.2, 4.2), layout='constrained'
  )
  panels = figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0]
  names = list(dict.fromkeys(key[1] for key in grouped))
  transform: Callable = np.exp if log else (lambda x: x)
  drawn = {}
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
          linestyle=_STYLES[i % len(_STYLES)],
          marker=_MARKERS[i % len(_MARKERS)],
          markersize=4,
          markevery=(i % 4, 4),
      )[0]
      panel.fill_between(
          values.passes,
          transform(values.mean - values.std),
          transform(values.mean + values.std),
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
  if not drawn:
    return None
  panels[0].set_ylabel(ylabel)
  figure.legend(
      drawn.values(),
      drawn.keys(),
      loc='outside right center',
      fontsize=9,
      title='mean, band: 1 std',
      title_fontsize=9,
  )
  if title:
    figure.suptitle(title)
  return figure


FIGURES = (
    ('validation_accuracy', 'validation accuracy', False),
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
  return written
