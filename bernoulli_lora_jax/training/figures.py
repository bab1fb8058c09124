"""Figures from finished runs, told apart in greyscale by style and marker."""

from collections.abc import Callable, Collection, Sequence
import math
import pathlib
import re
from typing import Any, NamedTuple

import matplotlib.figure
import matplotlib.lines
import numpy as np
import scipy.stats

from bernoulli_lora_jax.training import labels
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import reporting

Run = reporting.Run

_STYLES = ['-', '--', '-.', ':', (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]
_MARKERS = ['o', 's', '^', 'v', 'D', 'P', 'X', '<', '>', '*']
_COLOURS = '#000000 #0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00'.split()


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
    *,
    axis: Axis = PASSES,
    by: Collection[str] | None = None,
) -> matplotlib.figure.Figure | None:
  """Returns a figure of a metric of one task, one panel a rank.

  Bands are 95% confidence intervals of the mean over seeds, by Student's t (of
  the mean logarithm where the axis is logarithmic). None where nothing has the
  metric.

  Args:
    runs: finished ones of one task.
    metric: as in metrics.jsonl; `labels.metric` has its label and axis.
    axis: what is horizontal.
    by: see `reporting.groups`.
  """
  shown = labels.metric(metric)
  ranks = sorted({_rank(run) for run in runs} - {0}) or [0]
  apart = ('method.rank',) if len(ranks) > 1 else ()
  curves = {}
  for group in _fewer_probs(reporting.groups(runs, by, apart=apart)):
    values = curve(group.runs, metric, shown.is_log, axis)
    if values is not None:
      rank = _rank(group.runs[0]) if apart else 0
      curves[group.name, rank] = (group, values)
  if not curves:
    return None
  names = list(dict.fromkeys(name for name, _ in curves))
  figure = matplotlib.figure.Figure(
      figsize=(5.2 * len(ranks) + 2.6, max(4.2, 0.25 * len(names) + 1)),
      layout='constrained',
  )
  panels = figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0]
  transform = _transform(metric, runs)
  lines = {}
  for panel, rank in zip(panels, ranks, strict=True):
    for (name, found), (_, values) in curves.items():
      if found in (rank, 0):
        lines[name] = _draw(panel, values, transform, names.index(name))
    if apart:
      panel.set_title(f'r = {rank}')
    _set_axes(panel, axis, shown.is_log)
  panels[0].set_ylabel(shown.label)
  groups = [group for group, _ in curves.values()]
  figure.legend(
      [lines[name] for name in names],
      [_with_lost(name, groups) for name in names],
      loc='outside right center',
      fontsize=9,
      handlelength=3.5,
      title=_meaning(groups, shown.is_log),
      title_fontsize=9,
  )
  figure.suptitle(groups[0].caption, fontsize=11)
  return figure


def _rank(run: Run) -> int:
  """Returns the rank; 0 where nothing is sketched: it is in all panels."""
  method = run.config['method']
  return 0 if method['name'] in methods.WHOLE else method['rank']


def _transform(metric: str, runs: Sequence[Run]) -> Callable:
  """Returns what turns means and ends of intervals into what is drawn."""
  shown = labels.metric(metric)
  if shown.is_log:
    return np.exp
  if metric.endswith('accuracy'):  # An interval may reach beyond.
    return lambda x: shown.scale * np.clip(x, 0, 1)
  if min(run.metrics[-1].get(metric, 0) for run in runs) >= 0:
    return lambda x: np.maximum(x, 0)
  return lambda x: x


def _draw(
    panel: Any, values: Curve, transform: Callable, i: int
) -> matplotlib.lines.Line2D:
  """Draws the i-th curve with its band."""
  ends = (transform(values.mean + s * values.half) for s in (-1, 1))
  color = style(i)['color']
  panel.fill_between(values.x, *ends, alpha=0.12, linewidth=0, color=color)
  return panel.plot(
      values.x,
      transform(values.mean),
      markersize=4,
      markevery=(0.025 * (i % 4), 0.1) if len(values.x) > 40 else (i % 4, 4),
      **style(i),
  )[0]


def grid(panel: Any) -> None:
  """Draws the lines of major ticks."""
  panel.grid(True, which='major', linewidth=0.4, alpha=0.6)


def _set_axes(panel: Any, axis: Axis, is_log: bool) -> None:
  panel.set_xlabel(axis.label)
  grid(panel)
  if is_log:
    panel.set_yscale('log')
    starts = [np.asarray(line.get_ydata())[0] for line in panel.get_lines()]
    if starts:  # Divergence is cut off.
      panel.set_ylim(top=min(panel.get_ylim()[1], 1e6 * max(starts)))
  if axis.log and panel.dataLim.x1 > 10 * panel.dataLim.x0:
    panel.set_xscale('log')
  elif panel.dataLim.x1 > 1000:  # What happens early stays visible.
    panel.set_xscale('symlog', linthresh=10)
    panel.set_xlim(left=0)


def _with_lost(name: str, groups: Sequence[reporting.Group]) -> str:
  """Returns a name with the number of its runs that diverged."""
  runs = [run for group in groups if group.name == name for run in group.runs]
  lost = sum('diverged' in run.summary for run in runs)
  return f'{name} ({lost} of {len(runs)} diverged)' if lost else name


def _meaning(
    groups: Sequence[reporting.Group], is_log: bool = False, what: str = 'band'
) -> str:
  """Returns what points and their intervals are."""
  over = reporting.count_runs(groups)
  if over.startswith('1 '):
    return over
  mean = 'geometric mean' if is_log else 'mean'
  return f'{mean} of {over}, {what}: 95% interval'


METRICS = ('validation_accuracy', 'train_gap', 'grad_norm_sq', 'train_loss')


def write_figures(
    runs: Sequence[Run],
    directory: str | pathlib.Path,
    *,
    metrics: Sequence[str] = METRICS,
    by: Collection[str] | None = None,
) -> list[pathlib.Path]:
  """Writes one PNG a task and metric; returns their paths."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tasks: dict[str, list[Run]] = {}
  for run in runs:
    tasks.setdefault(labels.task_name(run.config), []).append(run)
  written = []
  for task, members in tasks.items():
    name = re.sub(r'[^a-z0-9]+', '_', task.lower()).strip('_')
    drawn = {}
    for metric in metrics:
      drawn[metric] = plot(members, metric, by=by)
      if labels.is_federated(members[0].config):
        sent = plot(members, metric, axis=MEGABYTES, by=by)
        drawn[f'{metric}_megabytes'] = sent
    drawn['prob'] = plot_prob(members)
    for what, figure in drawn.items():
      if figure is not None:
        written.append(directory / f'{name}_{what}.png')
        figure.savefig(written[-1], dpi=130)
  return written


def _prob(group: reporting.Group) -> float | None:
  return labels.flat(group.runs[0].config).get('method.prob')


def _fewer_probs(groups: list[reporting.Group]) -> list[reporting.Group]:
  """Returns the groups without values of p between few that are kept."""
  probs = sorted({p for p in map(_prob, groups) if p is not None})
  if len(probs) <= _MOST_PROBS:
    return groups
  kept = (None, probs[0], probs[len(probs) // 2], probs[-1])
  return [group for group in groups if _prob(group) in kept]


def plot_prob(runs: Sequence[Run]) -> matplotlib.figure.Figure | None:
  """Returns a figure of the final metric against p, or None for few values.

  Error bars are 95% confidence intervals of the mean over seeds.
  """
  chains = [r for r in runs if r.config['method']['name'] == 'bernoulli']
  groups = reporting.groups(chains, apart=('method.prob',))
  if len({_prob(group) for group in groups}) < 3:
    return None
  metric = reporting.final_metric(chains)
  shown = labels.metric(metric)
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout='constrained')
  panel = figure.subplots()
  for i, name in enumerate(dict.fromkeys(group.name for group in groups)):
    points = []
    for group in groups:
      values = [r.summary[metric] for r in group.runs if metric in r.summary]
      if group.name == name and len(values) > 1:
        mean, half = mean_interval(shown.scale * np.asarray(values))
        points.append((_prob(group), mean, half))
    if points:
      x, means, halves = zip(*sorted(points), strict=True)
      panel.errorbar(x, means, halves, label=name, capsize=3, **style(i))
  panel.set_xlabel('p = P(left): the left factor is frozen, the right trained')
  panel.set_ylabel(shown.label)
  panel.set_title(groups[0].caption, fontsize=11)
  panel.grid(True, linewidth=0.4, alpha=0.6)
  figure.legend(
      loc='outside lower center',
      fontsize=9,
      title=_meaning(groups, what='bar'),
      title_fontsize=9,
  )
  return figure


def write_losses(run: Run, path: pathlib.Path) -> None:
  """Draws a run's losses in nats a token against its steps.

  Args:
    run: of a language model.
    path: of the PNG.
  """
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout='constrained')
  panel = figure.subplots()
  told = {
      'loss': 'training',
      'validation_loss': 'held out',
      'watched_loss': 'watched',
  }
  for i, (metric, name) in enumerate(told.items()):
    points = [(x['step'], x[metric]) for x in run.metrics if metric in x]
    if not points:
      continue
    look: Any = style(i)
    if metric == 'loss':  # One line of many noisy points.
      look = {'color': '0.6', 'linewidth': 1.0}
    elif i == 2:
      look['markerfacecolor'] = 'white'
    panel.plot(*zip(*points, strict=True), label=name, markersize=5, **look)
  panel.set_xlabel('steps')
  panel.set_ylabel('loss, nats a token')
  panel.set_title(labels.name(run.config), fontsize=11)
  panel.legend(fontsize=9)
  grid(panel)
  figure.savefig(path, dpi=130)
