"""How far the linearisation of a network holds along a run of LoRA.

Few examples, balanced over the classes, in float64; symbols as in `theory.ntk`.

References:
  Jang, Lee and Ryu, LoRA training in the NTK regime has no spurious local minima,
  2024, arXiv 2402.11867.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import tqdm

from bernoulli_lora_jax.studies import few_shot
from bernoulli_lora_jax.studies import study as study_lib
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import lora
from bernoulli_lora_jax.theory import ntk
from bernoulli_lora_jax.training import figures


def linearisation(
    task: task_lib.Task,
    *,
    num_samples: int = 32,
    select: str | None = 'Dense_1/kernel',
    ranks: Sequence[int] = (1, 4, 16),
    num_seeds: int = 5,
    relative_lam: float = 0.01,
    learning_rate: float = 0.02,
    num_steps: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> study_lib.Study:
  """Trains the network itself by LoRA and asks how linear it has stayed.

  Args:
    task: classification, with `outputs`.
    num_samples: N of the few examples.
    select: regular expression of the matrices; None for all kernels.
    ranks: in [1, shortest side].
    num_seeds: random starts a rank, >= 1.
    relative_lam: as in `ranks`.
    learning_rate: of gradient descent.
    num_steps: of it, >= 1.
    seed: of the examples and of the starts.
    progress: whether to show a bar.

  Returns:
    Table 'linearisation', figure 'linearisation', notes.

  Raises:
    ValueError: an argument outside its range.
  """
  few_shot.check_sizes(relative_lam, num_seeds=num_seeds, num_steps=num_steps)
  with jax.enable_x64(True):
    few = few_shot.few_problem(task, num_samples, select, relative_lam, seed)
    keys = jax.random.split(jax.random.key(seed), num_seeds)
    tx = optax.sgd(learning_rate)
    seen = {}
    for r in tqdm.tqdm(ranks, desc='linearisation', disable=not progress):
      start = jax.vmap(lambda key, r=r: lora.init_factors(few.problem, r, key))(
          keys
      )
      seen[r] = jax.tree.map(
          np.asarray,
          _real_runs(few.problem, few.lam, start, tx, num_steps),
      )
  rows = [_linearisation_row(r, one) for r, one in seen.items()]
  title = f'{task.name}, N = {num_samples}, lam = {few.lam:.3g}'
  return study_lib.Study(
      tables={'linearisation': rows},
      figures={'linearisation': _plot_linearisation(seen, title)},
      notes=_linearisation_notes(rows),
  )


class _Seen(NamedTuple):
  """Along runs of the network itself; shape=(seeds, steps)."""

  step: Any
  norm: Any  # ||delta||_F
  error: Any  # ||f_0 + G delta - f|| / ||f - f_0||, over the few examples.
  loss: Any  # N2's objective of the network.
  linear_loss: Any  # The linearised one at the same factors.
  linear_run: Any  # The linearised one along its own run from the same start.


def _real_runs(problem, lam, start, tx, num_steps) -> _Seen:
  @jax.jit
  def run(problem, lam, factors):
    real = lora.make_objective(problem, lam, is_linear=False)
    linear = lora.make_objective(problem, lam)
    forward = ntk.operators(problem)[0]

    def step(carry, i):
      factors, state = carry
      updates, state = tx.update(jax.grad(real)(factors), state, factors)
      factors: Any = optax.apply_updates(factors, updates)
      delta = lora.product(factors)
      change = problem.model(delta) - problem.start
      error = jnp.linalg.norm(forward(delta) - change)
      seen = _Seen(
          step=i + 1,
          norm=optax.tree.norm(delta),
          error=error / jnp.linalg.norm(change),
          loss=real(factors),
          linear_loss=linear(factors),
          linear_run=0.0,
      )
      return (factors, state), seen

    carry = (factors, tx.init(factors))
    seen = jax.lax.scan(step, carry, jnp.arange(num_steps))[1]
    alone = lora.train_lora(problem, lam, factors, tx, num_steps=num_steps)
    return seen._replace(linear_run=alone.values[1:])

  return jax.vmap(run, (None, None, 0))(problem, lam, start)


def _linearisation_row(rank: int, seen: _Seen) -> dict[str, Any]:
  above = np.median(seen.error, 0) > 0.1
  norms = np.median(seen.norm, 0)
  return {
      'rank': rank,
      'norm of delta, end': float(norms[-1]),
      'relative error, end': float(np.median(seen.error[:, -1])),
      'norm of delta at error 0.1': (
          float(norms[above.argmax()]) if above.any() else math.inf
      ),
      'step at error 0.1': (
          int(seen.step[0][above.argmax()]) if above.any() else math.inf
      ),
      'loss, end': float(np.median(seen.loss[:, -1])),
      'linearised loss there': float(np.median(seen.linear_loss[:, -1])),
      'linearised run, end': float(np.median(seen.linear_run[:, -1])),
  }


def _linearisation_notes(rows: list[dict[str, Any]]) -> list[str]:
  passed = lambda row: (
      '10% was passed at ||delta||_F ='
      f' {row["norm of delta at error 0.1"]:.3g}, step {row["step at error 0.1"]}'
      if math.isfinite(row['step at error 0.1'])
      else '10% was not passed'
  )
  return [
      f'Rank {row["rank"]}: at the end ||delta||_F ='
      f' {row["norm of delta, end"]:.3g}, the linearised outputs are off by'
      f' {100 * row["relative error, end"]:.0f}% of the change ({passed(row)});'
      f' objective {row["loss, end"]:.4g}, the'
      f' linearised one at the same factors {row["linearised loss there"]:.4g},'
      f' along its own run {row["linearised run, end"]:.4g}.'
      for row in rows
  ]


def _plot_linearisation(seen, title) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(12, 4.4), layout='constrained')
  left, right = figure.subplots(1, 2)
  size = next(iter(seen.values())).step.shape[1]
  shown = np.unique(np.geomspace(1, size, 100).astype(int)) - 1
  seen = {
      r: jax.tree.map(lambda x: x[:, shown], one) for r, one in seen.items()
  }
  for i, (rank, one) in enumerate(seen.items()):
    _band(left, np.median(one.norm, 0), one.error, f'rank {rank}', i)
  left.axhline(0.1, color='0.4', linestyle=':', linewidth=1)
  left.set(
      xlabel='||delta||_F, median along the run',
      ylabel='||f_lin - f|| / ||f - f_0||',
      # Before a ReLU flips a network of them is linear in one matrix: rounding.
      ylim=(1e-4, None),
      yscale='log',
  )
  left.legend(fontsize=8, title='median, band: all starts', title_fontsize=8)
  names = ('loss', 'linear_loss', 'linear_run')
  labels = ('network', 'linearised, same factors', 'linearised, own run')
  count = 0
  for rank in (min(seen), max(seen)) if len(seen) > 1 else seen:
    for name, label in zip(names, labels, strict=True):
      values = getattr(seen[rank], name)
      _band(right, seen[rank].step[0], values, f'rank {rank}: {label}', count)
      count += 1
  right.set(xlabel='step (a full gradient each)', ylabel='objective')
  right.legend(fontsize=8)
  for panel in (left, right):
    panel.set(xscale='log', yscale='log')
    figures.grid(panel)
  figure.suptitle(title)
  return figure


def _band(panel, x, values, label, i):
  """Draws the median and the range of values, shape (seeds, points)."""
  panel.plot(
      x,
      np.median(values, 0),
      label=label,
      markersize=5,
      markevery=0.1,
      linewidth=1.2,
      **figures.style(i),
  )
  panel.fill_between(
      x,
      values.min(0),
      values.max(0),
      alpha=0.15,
      linewidth=0,
      color=figures.style(i)['color'],
  )
