"""Figures from finished runs, told apart in greyscale by style and marker."""

from collections.abc import Callable, Sequence
import math
import pathlib
import re
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
import scipy.stats

from bernoulli_lora_jax.training import reporting

Run = reporting.Run

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


def style(i: int) -> dict[str, Any]:
  """Returns colour, line style and marker of the i-th curve of a figure."""
  return {
      'color': _COLOURS[i % len(_COLOURS)],
      'linestyle': _STYLES[(i + i // len(_COLOURS)) % len(_STYLES)],
      'marker': _MARKERS[i % len(_MARKERS)],
  }


_MOST_PROBS = 3  # Curves of Bernoulli-LoRA a panel; `plot_prob` has all.
_FLOOR = 1e-16  # Of a logarithmic axis, relative to where a curve starts.


class Axis(NamedTuple):
  """What a figure's horizontal axis counts."""

  name: str
  label: str
  of: Callable[[Run, dict[str, float]], float]  # (run, line) -> place.
  log: bool = False


PASSES = Axis(
    'data_passes',
    'data passes (a full gradient is 1)',
    lambda run, line: line.get('data_passes', 0.0),
)
MEGABYTES = Axis(
    'megabytes', 'megabytes a client, up and down', reporting.megabytes, True
)


class Curve(NamedTuple):
  """A metric over the seeds of one group."""

  x: np.ndarray  # (points,), on the axis.
  mean: np.ndarray
  half: np.ndarray  # Half of the 95% confidence interval; zero for one seed.


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean over axis 0 and half of its 95% interval, by Student's t.

  The half is zero where there is one value.
  """
  half = 0 * values[0]
  if len(values) > 1:
    half = values.std(0, ddof=1) / math.sqrt(len(values))
    half = half * scipy.stats.t.ppf(0.975, len(values) - 1)
  return values.mean(0), half


def curve(
    runs: Sequence[Run], metric: str, log: bool = False, axis: Axis = PASSES
) -> Curve | None:
  """Returns the mean of a metric at its evaluations, with its confidence.

  Args:
    runs: the seeds of one method.
    metric: as in metrics.jsonl.
    log: average logarithms (a geometric mean), for positive metrics.
    axis: what is horizontal.

  Returns:
    The curve at the places of the first run that all runs reached; other runs
    are interpolated. None where no run has the metric.
  """
  series = []
  for run in runs:
    points = [
        (axis.of(run, line), line[metric])
        for line in run.metrics
        if metric in line and (axis.of(run, line) > 0 or not axis.log)
    ]
    if points:
      series.append(np.asarray(points))
  if not series:
    return None
  x = series[0][:, 0]
  # Up to where the shortest run ends, early stop or divergence; costs of PAGE
  # differ a little between seeds.
  end = min(s[-1, 0] for s in series)
  x = x[x <= 1.05 * end]
  values = np.stack([np.interp(x, s[:, 0], s[:, 1]) for s in series])
  if log:
    # What is rounding to zero has no logarithm.
    values = np.log(np.maximum(values, _FLOOR * abs(values[:, :1])))
  return Curve(x, *mean_interval(values))


def plot(
    runs: Sequence[Run],
    metric: str,
    ylabel: str,
    *,
    log: bool = False,
    title: str = '',
    axis: Axis = PASSES,
) -> matplotlib.figure.Figure | None:
  """Returns a figure of a metric against data passes, one panel a rank.

  Bands are 95% confidence intervals of the mean over seeds, by Student's t (of
  the mean logarithm where the axis is logarithmic).
  """
  grouped = _fewer_probs(reporting.groups(runs))
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
      values = curve(members, metric, log, axis)
      if found not in (shown, '-') or values is None:
        continue
      i = names.index(name)
      drawn[name] = panel.plot(
          values.x,
          transform(values.mean),
          label=name,
          markersize=4,
          markevery=0.1 if len(values.x) > 40 else (i % 4, 4),
          **style(i),
      )[0]
      bad = sum('diverged' in run.summary for run in members)
      if bad:
        lost[name] = f'{name} ({bad} of {len(members)} diverged)'
      panel.fill_between(
          values.x,
          transform(values.mean - values.half),
          transform(values.mean + values.half),
          alpha=0.15,
          linewidth=0,
          color=style(i)['color'],
      )
    if shown != '-':
      panel.set_title(f'rank {shown}')
    panel.set_xlabel(axis.label)
    panel.grid(True, which='major', linewidth=0.4, alpha=0.6)
    if log:
      panel.set_yscale('log')
      starts = [np.asarray(line.get_ydata())[0] for line in panel.get_lines()]
      if starts:  # Divergence is cut off.
        panel.set_ylim(top=min(panel.get_ylim()[1], 1e6 * max(starts)))
    if axis.log:
      panel.set_xscale('log')
    elif panel.dataLim.x1 > 1000:  # What happens early stays visible.
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
  for task in dict.fromkeys(reporting.task_name(run) for run in runs):
    members = [run for run in runs if reporting.task_name(run) == task]
    name = re.sub(r'[^a-z0-9]+', '_', task.lower()).strip('_')
    drawn = {}
    for metric, ylabel, log in FIGURES:
      drawn[metric] = plot(members, metric, ylabel, log=log, title=task)
      sent = [run for run in members if reporting.is_federated(run)]
      if sent:
        drawn[f'{metric}_megabytes'] = plot(
            sent, metric, ylabel, log=log, title=task, axis=MEGABYTES
        )
    drawn['prob'] = plot_prob(members)
    for what, figure in drawn.items():
      if figure is not None:
        path = directory / f'{name}_{what}.png'
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
  metric = reporting.final_metric(chains)
  scale = 100 if metric == 'test_accuracy' else 1
  lines: dict[tuple[str, str], dict[float, np.ndarray]] = {}
  for (_, name, rank_text), members in reporting.groups(chains).items():
    prob = members[0].config['method']['prob']
    values = [r.summary[metric] for r in members if metric in r.summary]
    key = (name.replace(f' p={prob:g}', ''), rank_text)
    lines.setdefault(key, {})[prob] = scale * np.asarray(values)
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout='constrained')
  panel = figure.subplots()
  for i, ((name, rank_text), points) in enumerate(lines.items()):
    x = sorted(p for p in points if len(points[p]) > 1)
    error = [mean_interval(points[p])[1] for p in x]
    panel.errorbar(
        x,
        [points[p].mean() for p in x],
        error,
        label=f'{name}, rank {rank_text}',
        capsize=3,
        **style(i),
    )
  names = {'test_accuracy': 'test accuracy, %', 'train_gap': 'f - f*'}
  panel.set_xlabel('p = P(left): the left factor is frozen, the right trained')
  panel.set_ylabel(names.get(metric, 'training loss') + ' (mean, 95% interval)')
  panel.grid(True, linewidth=0.4, alpha=0.6)
  panel.legend(fontsize=9)
  return figure
