"""T8 on l1 regression: measured gaps beside the bounds, and Polyak's damping.

A run is deterministic but for its coins and subspaces, which the seeds draw; the
bounds are of expectations, so the mean over seeds is held against them. Symbols:
avg the uniform mean of W_0, ..., W_(T-1), gamma the stepsize, kappa = lmax / lmin
of E[H], p = P(left).

`gaps` also shows where the damping by 1/kappa that T8 asks of Polyak's step is
needed. Where H and E[H] are diagonal, as for coordinate sketches, it is not: with
distances in the norm of E[H]^-1 the noise term is E[H E[H]^-1 H] = I, so undamped
Polyak keeps R0 L0 / sqrt(lmin T). Random signs times square roots of the same
probabilities have the same E[H], but a noise of dim E[H], and may diverge.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import tqdm

from bernoulli_lora_jax import chain
from bernoulli_lora_jax import checks
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax import stepsizes
from bernoulli_lora_jax.studies import study
from bernoulli_lora_jax.tasks import l1_regression
from bernoulli_lora_jax.theory import bounds
from bernoulli_lora_jax.training import figures

_ROUNDING = 1e-9  # By which a mean may exceed a bound, relative.
_DAMPED, _UNDAMPED = 'Polyak / kappa', 'Polyak, undamped'
# The case against undamped Polyak: f = ||D w||_1 in R^16, D = (1, 0.1, ..., 0.1),
# and E[H] = diag(pi), pi geometric from 100 to 1, so that 16 pi_1 > 2.
_CASE = {'dim': 16, 'small': 0.1, 'ratio': 100.0}


class Cell(NamedTuple):
  """One method with one sketch and one step rule, all seeds."""

  method: str
  sketch: str
  rule: str
  lmin: float
  kappa: float
  step: float  # gamma; of Polyak the factor in front.
  averages: np.ndarray  # (seeds, T), f(avg of W_0..W_t) - f* at column t.
  values: np.ndarray  # (seeds, T), f(W_t) - f*.
  bound: np.ndarray | None  # (T,), of E f(avg) - f*; None: none is known.


def gaps(
    *,
    shape: tuple[int, int] = (8, 6),
    num_samples: int = 200,
    rank: int = 2,
    prob: float = 0.5,
    ratio: float = 8.0,
    num_steps: int = 2000,
    num_seeds: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> study.Study:
  """Returns f(avg) - f* of T8's methods against T, beside T8's bounds.

  Args:
    shape: (m, n) of W.
    num_samples: N of the regression.
    rank: dimension of the subspaces, in [1, max(m, n)].
    prob: P(left) of Bernoulli-LoRA, in (0, 1).
    ratio: of the weights of the coordinate sketch, > 0; 1 is uniform.
    num_steps: T, >= 2.
    num_seeds: of coins and subspaces, >= 2.
    seed: of the data and of the others.
    progress: whether to show a bar.

  Returns:
    Tables of T8 and of the case against undamped Polyak, a figure of each, and
    what they say.

  Raises:
    ValueError: an argument outside its range.
  """
  checks.at_least(2, num_steps=num_steps, num_seeds=num_seeds)
  checks.within('(0, 1)', prob=prob)
  methods = {
      'RAC left': 1.0,
      'RAC right': 0.0,
      f'Bernoulli p={prob:g}': prob,
  }
  kinds = {
      'gaussian': sketches.gaussian(),
      'weighted coordinate': sketches.weighted_coordinate(ratio),
  }
  with jax.enable_x64(True):
    problem = l1_regression.make_problem(
        shape=shape, num_samples=num_samples, seed=seed
    )
    polyak = (_DAMPED, _UNDAMPED)
    jobs = [
        (problem, methods, kind, sketch, rank, rules)
        for kind, sketch in kinds.items()
        for rules in (('constant',), polyak)
    ]
    case, left = _case(), {'RAC left': 1.0}
    of_case = {
        'weighted coordinate': sketches.weighted_coordinate(_CASE['ratio']),
        'weighted signs': weighted_signs(_CASE['ratio']),
    }
    jobs += [
        (case, left, k, sketch, 1, polyak) for k, sketch in of_case.items()
    ]
    keys = jax.random.split(jax.random.key(seed), num_seeds)
    done = [
        _cells(*job, keys, num_steps)
        for job in tqdm.tqdm(jobs, disable=not progress)
    ]
  cells = [cell for found in done[:4] for cell in found]
  against = [cell for found in done[4:] for cell in found]
  return study.Study(
      {
          'T8 on l1 regression': [_row(cell) for cell in cells],
          'Polyak without damping': [_case_row(cell) for cell in against],
      },
      {'gaps': _plot(cells), 'undamped': _plot_case(against)},
      _notes(cells, against),
  )


def weighted_signs(ratio: float) -> sketches.Sketch:
  """Returns the sketch of rank 1 whose frame is (s_i sqrt(pi_i)), s_i = +-1.

  Args:
    ratio: pi_1 / pi_dim > 0, geometric in between, of sum 1.

  Returns:
    A sketch with E[H] = diag(pi) and E[H E[H]^-1 H] = dim diag(pi).
  """

  def probabilities(dim):
    return sketches.inclusion_probabilities(ratio, dim, 1)

  def sampler(key, dim, rank, dtype):
    if rank != 1:
      raise ValueError(f'Expected rank=1 with weighted signs, got {rank=}.')
    roots = jnp.asarray(np.sqrt(probabilities(dim)), dtype)[:, None]
    return roots * jax.random.rademacher(key, (dim, 1), dtype)

  def spectrum(dim, rank):
    del rank
    pi = probabilities(dim)
    return float(pi.min()), float(pi.max())

  return sketches.Sketch(
      'weighted_signs',
      sampler,
      spectrum=spectrum,
      is_orthonormal=lambda dim: True,
  )


def descend(
    problem: l1_regression.Problem,
    make: Callable[[jax.Array, Any], optax.GradientTransformation],
    settings: Any,
    keys: jax.Array,
    num_steps: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Runs every key under every setting in one compiled loop.

  Args:
    problem: what is minimised, from W_0 = 0.
    make: (key, setting) -> transformation of the subgradient; Polyak's step is
      given value = f(W) - f*.
    settings: tree of arrays (K, ...), of which `make` is given one entry.
    keys: (S,) typed PRNG keys.
    num_steps: T.

  Returns:
    f(mean of W_0..W_t) - f* and f(W_t) - f*, each (K, S, T).
  """
  task = l1_regression.make_task(problem, batch_size=1)

  def run(key, setting, data):
    tx = optax.with_extra_args_support(make(key, setting))
    gap = lambda params: task.loss(params, data, None)[1]['gap']

    def step(carry, t):
      params, state, mean = carry
      value, grads = jax.value_and_grad(gap)(params)
      mean = jax.tree.map(lambda a, w: a + (w - a) / (t + 1), mean, params)
      updates, state = tx.update(grads, state, params, value=value)
      moved = optax.apply_updates(params, updates)
      return (moved, state, mean), (gap(mean), value)

    start = task.init(key)
    carry = (start, tx.init(start), start)
    return jax.lax.scan(step, carry, jnp.arange(num_steps))[1]

  over_seeds = jax.vmap(run, (0, None, None))
  both = jax.jit(jax.vmap(over_seeds, (None, 0, None)))
  averages, values = both(keys, settings, task.data['train'])
  return np.asarray(averages), np.asarray(values)


def _cells(
    problem: l1_regression.Problem,
    methods: Mapping[str, float],
    kind: str,
    sketch: sketches.Sketch,
    rank: int,
    rules: Sequence[str],
    keys: jax.Array,
    num_steps: int,
) -> list[Cell]:
  """Returns every method, {name: P(left)}, under Polyak's rules or not."""
  steps = np.arange(1, num_steps + 1)
  is_polyak = 'constant' not in rules
  nothing = np.zeros((0, 0))
  planned: list[Cell] = []
  probs: list[float] = []
  for method, prob in methods.items():
    lmin, lmax = stepsizes.chain_eigenvalues(
        [problem.shape], rank=rank, prob=prob, sketch=sketch
    )
    for rule in rules:
      if rule == _UNDAMPED and lmin == lmax:
        continue  # Damping by 1 is none.
      scale, bound = _step(problem, rule, lmin, lmax, steps, sketch)
      kappa = lmax / lmin
      cell = Cell(
          method, kind, rule, lmin, kappa, scale, nothing, nothing, bound
      )
      planned.append(cell)
      probs.append(prob)

  def make(key, setting):
    # With prob traced 0 and 1 are RAC-LoRA still, at the cost of both sides.
    parts = [
        chain.scale_by_bernoulli_chain(
            key, rank=rank, prob=setting['prob'], sketch=sketch
        ),
        optax.scale(-setting['scale']),
    ]
    if is_polyak:  # Of values that are f - f* already.
      polyak = optax.scale_by_polyak(f_min=0.0, max_learning_rate=jnp.inf)
      parts.insert(0, polyak)
    return optax.chain(*parts)

  settings = {
      'prob': jnp.asarray(probs),
      'scale': jnp.asarray([cell.step for cell in planned]),
  }
  averages, values = descend(problem, make, settings, keys, num_steps)
  return [
      cell._replace(averages=avg, values=value)
      for cell, avg, value in zip(planned, averages, values, strict=True)
  ]


def _step(
    problem: l1_regression.Problem,
    rule: str,
    lmin: float,
    lmax: float,
    steps: np.ndarray,
    sketch: sketches.Sketch,
) -> tuple[float, np.ndarray | None]:
  """Returns gamma, or the factor of Polyak's step, and the bound at `steps`."""
  constants = {
      'distance': problem.distance,
      'lipschitz': problem.lipschitz,
      'lmin': lmin,
      'lmax': lmax,
  }
  if rule == 'constant':
    gamma = stepsizes.nonsmooth(**constants, num_steps=len(steps))
    return gamma, bounds.nonsmooth(steps, **constants, stepsize=gamma)
  if rule == _DAMPED:
    damping = stepsizes.polyak_damping(lmin=lmin, lmax=lmax)
    return damping, bounds.polyak(steps, **constants)
  if sketch.rows is None:
    return 1.0, None
  # Diagonal H and E[H]: the bound of kappa = 1.
  return 1.0, bounds.polyak(steps, **{**constants, 'lmax': lmin})


def _case() -> l1_regression.Problem:
  """Returns f = ||D (w - w*)||_1 with w* of ones: f* = 0, L0 = ||D||_F."""
  dim = _CASE['dim']
  scales = np.where(np.arange(dim) == 0, 1.0, _CASE['small'])
  x = dim * np.diag(scales)  # The loss is a mean over dim rows.
  ones = np.ones((dim, 1))
  return l1_regression.Problem(
      x=x,
      y=x @ ones[:, 0],
      shape=(dim, 1),
      optimum=0.0,
      minimiser=ones,
      lipschitz=float(np.linalg.norm(scales)),
      distance=math.sqrt(dim),
  )


def is_held(averages: np.ndarray, bound: np.ndarray) -> bool:
  """Returns whether no mean exceeds the bound by more than two standard errors.

  Args:
    averages: (seeds, T).
    bound: (T,).
  """
  error = averages.std(0, ddof=1) / math.sqrt(len(averages))
  low = averages.mean(0) - 2 * error
  return bool(np.all(low <= bound * (1 + _ROUNDING)))


def _row(cell: Cell) -> dict[str, Any]:
  gap, half = figures.mean_interval(cell.averages[:, -1:])
  row = {
      'method': cell.method,
      'sketch': cell.sketch,
      'step': cell.rule,
      'factor': cell.step,
      'lmin': cell.lmin,
      'kappa': cell.kappa,
      'f(avg) - f* at T': float(gap[0]),
      '+- 95%': float(half[0]),
  }
  assert cell.bound is not None  # No isotropic or coordinate sketch lacks one.
  return row | {
      'bound': float(cell.bound[-1]),
      'ratio': float(gap[0] / cell.bound[-1]),
      'held at all T': 'yes' if is_held(cell.averages, cell.bound) else 'no',
  }


def _case_row(cell: Cell) -> dict[str, Any]:
  gap, _ = figures.mean_interval(cell.averages[:, -1:])
  bound = cell.bound
  held = '-'
  if bound is not None:
    held = 'yes' if is_held(cell.averages, bound) else 'no'
  return {
      'sketch': cell.sketch,
      'step': cell.rule,
      'factor': cell.step,
      'lmin': f'{cell.lmin:.4f}',
      'kappa': f'{cell.kappa:.0f}',
      'f(W_0) - f*': f'{cell.values[0, 0]:.3g}',
      'f(W_T-1) - f*': f'{cell.values[:, -1].mean():.3g}',
      'f(avg) - f*': f'{gap[0]:.3g}',
      'bound': '-' if bound is None else f'{bound[-1]:.3g}',
      'held at all T': held,
  }


def _plot(cells: Sequence[Cell]) -> matplotlib.figure.Figure:
  """Returns panels of a sketch (rows) and a step rule (columns)."""
  kinds = list(dict.fromkeys(cell.sketch for cell in cells))
  methods = list(dict.fromkeys(cell.method for cell in cells))
  rules = ['constant', _DAMPED, _UNDAMPED]
  rules = [rule for rule in rules if any(c.rule == rule for c in cells)]
  figure = matplotlib.figure.Figure(
      figsize=(3.6 * len(rules) + 0.6, 3.1 * len(kinds) + 0.7),
      layout='constrained',
  )
  panels = figure.subplots(
      len(kinds), len(rules), sharex=True, sharey=True, squeeze=False
  )
  for panel in panels.ravel():
    panel.set_visible(False)
  for cell in cells:
    panel = panels[kinds.index(cell.sketch), rules.index(cell.rule)]
    panel.set_visible(True)
    i = methods.index(cell.method)
    _draw(panel, cell.averages, cell.method, i)
    assert cell.bound is not None
    where = _places(len(cell.bound))
    panel.plot(
        where + 1,
        cell.bound[where],
        linewidth=0.9,
        label=f'bound, {cell.method}',
        **{**figures.style(i), 'marker': ''},
    )
    panel.set_title(f'{cell.sketch}, {cell.rule}', fontsize=10)
    panel.set_xlabel('T, steps')
    panel.set_ylabel('f(average) - f*')
    panel.tick_params(labelbottom=True, labelleft=True)
  drawn = panels[-1, 0].get_legend_handles_labels()
  figure.legend(
      *drawn,
      loc='outside lower center',
      ncols=3,
      fontsize=9,
      title='marked: mean over seeds with its 95% interval; plain: bound',
      title_fontsize=9,
  )
  return figure


def _plot_case(cells: Sequence[Cell]) -> matplotlib.figure.Figure:
  """Returns f(W_t) - f* of Polyak's step, damped or not."""
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.4), layout='constrained')
  panel = figure.subplots()
  for i, cell in enumerate(cells):
    _draw(panel, cell.values, f'{cell.sketch}, {cell.rule}', i)
  panel.set_xlabel('t + 1, steps')
  panel.set_ylabel('f(W_t) - f*, mean over seeds with its 95% interval')
  panel.set_title('Two sketches with one E[H]', fontsize=10)
  panel.legend(fontsize=9)
  return figure


def _draw(panel: Any, values: np.ndarray, label: str, i: int) -> None:
  """Draws a mean over seeds and its interval on logarithmic axes."""
  where = _places(values.shape[1])
  mean, half = figures.mean_interval(values[:, where])
  # An interval of positive numbers that reaches zero ends at the axis.
  low = np.maximum(mean - half, 1e-2 * mean)
  style = figures.style(i)
  panel.plot(
      where + 1,
      mean,
      label=label,
      markersize=4,
      markevery=(2 * i, 8),
      **style,
  )
  panel.fill_between(
      where + 1,
      low,
      mean + half,
      alpha=0.2,
      linewidth=0,
      color=style['color'],
  )
  panel.set_xscale('log')
  panel.set_yscale('log')
  figures.grid(panel)


def _places(num_steps: int) -> np.ndarray:
  """Returns columns that are even on a logarithmic axis, the last among them."""
  spread = np.geomspace(1, num_steps, 60).round().astype(int)
  return np.unique(spread) - 1


def _notes(cells: Sequence[Cell], against: Sequence[Cell]) -> list[str]:
  bounded = [c for c in [*cells, *against] if c.bound is not None]
  held = lambda free: [
      is_held(c.averages, c.bound)
      for c in bounded
      if c.bound is not None and (c.rule == _UNDAMPED and c.kappa > 1) == free
  ]
  stated, free = held(False), held(True)
  shares = [
      c.averages[:, -1].mean() / c.bound[-1]
      for c in cells
      if c.bound is not None
  ]
  notes = [
      f'T8 held at all T in {sum(stated)} of {len(stated)} cells (no mean over'
      ' seeds above it by more than two standard errors); the bound of undamped'
      f' Polyak with diagonal H, which T8 does not state, in {sum(free)} of'
      f' {len(free)}. At the last T the measured gaps are {min(shares):.1%} to'
      f' {max(shares):.1%} of the bounds.'
  ]
  final = lambda cell: cell.averages[:, -1].mean()
  find = lambda rule: [c for c in cells if c.rule == rule and c.kappa > 1]
  pairs = list(zip(find(_DAMPED), find(_UNDAMPED), strict=False))
  if pairs:
    ratios = [final(damped) / final(free) for damped, free in pairs]
    notes.append(
        'With weighted coordinates Polyak damped by 1/kappa ends at'
        f' {min(ratios):.3g} to {max(ratios):.3g} times the gap of undamped'
        ' Polyak, which diagonal H and E[H] allow.'
    )
  ends = {(c.sketch, c.rule): f'{c.values[:, -1].mean():.3g}' for c in against}
  notes.append(
      f'On ||D w||_1 from f - f* = {against[0].values[0, 0]:.3g}, one E[H]:'
      ' undamped Polyak ends at a mean f - f* of'
      f' {ends["weighted coordinate", _UNDAMPED]} with coordinates and of'
      f' {ends["weighted signs", _UNDAMPED]} with signs; damped, at'
      f' {ends["weighted coordinate", _DAMPED]} and'
      f' {ends["weighted signs", _DAMPED]}.'
  )
  return notes
