"""T1-T8 as functions of named constants, vectorised over the steps T.

Each returns what its theorem bounds, after T steps: E of the mean of
||grad f(W_t)||^2 over t = 0..T-1, or with `pl` the expected gap
E f(W_T) - f*. The expectation is over coins, subspaces and minibatches. Each
raises where its stepsize condition fails.

Symbols, as in `stepsizes`: `stepsize` gamma, `smoothness` L, `mean_smoothness`
Lbar, `lmin` and `lmax` the extreme eigenvalues of E[H], kappa = lmax / lmin,
`initial_gap` D0 = f(W_0) - f_inf, `initial_error` V0, `pl` mu, `slope`, `growth`
and `noise` the A, B and C of E||g||^2 <= 2 A (f - f_inf) + B ||grad||^2 + C.

References: Sokolov et al., Bernoulli-LoRA, arXiv 2508.03820; Malinovsky et al.,
RAC-LoRA, arXiv 2410.08305, with the constants derived anew.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax import stepsizes

Steps = int | Sequence[int] | np.ndarray

_ROUNDING = 1e-9  # By which a stepsize may exceed its limit.


class Spectrum(NamedTuple):
  """Extreme eigenvalues of E[H] over the trained leaves of a tree."""

  each: tuple[tuple[float, float], ...]  # (least, largest) of each matrix.
  lmin: float
  lmax: float

  @property
  def kappa(self) -> float:
    """lmax / lmin; infinite where lmin is zero."""
    return self.lmax / self.lmin if self.lmin > 0 else math.inf


def spectrum(
    shapes: Sequence[tuple[int, int]],
    *,
    rank: int | Sequence[int],
    prob: float | Sequence[float],
    sketch: sketches.Sketch | None = None,
    all_trained: bool = True,
) -> Spectrum:
  """Returns lmin, lmax and kappa of matrices of any shapes, ranks and probs.

  Args:
    shapes: (m, n) of each matrix.
    rank: dimension of the subspaces, one for all or one for each matrix.
    prob: P(left) in [0, 1], one for all or one for each.
    sketch: law of the subspaces, default `sketches.gaussian()`.
    all_trained: False where other leaves are trained in full beside the chain
      (lambda = 1).

  Raises:
    ValueError: a rank above the matrix or a prob outside [0, 1].
  """
  arguments = {'rank': rank, 'prob': prob, 'sketch': sketch}
  each = stepsizes.matrix_eigenvalues(shapes, **arguments)
  ranks = stepsizes.one_each('rank', rank, len(shapes))
  for (m, n), r in zip(shapes, ranks, strict=True):
    checks.that(r <= max(m, n), f'rank <= {max(m, n)}, the longer side', rank=r)
  lmin, lmax = stepsizes.chain_eigenvalues(
      shapes, all_trained=all_trained, **arguments
  )
  return Spectrum(tuple(each), lmin, lmax)


def tree_spectrum(
    params: Any,
    *,
    rank: int | Mapping[str, int],
    prob: float | Mapping[str, float],
    matrices: matrices_lib.Matrices | None = None,
    sketch: sketches.Sketch | None = None,
    train_others: bool = False,
) -> Spectrum:
  """Returns `spectrum` of the matrices of a tree of parameters.

  Args:
    params: tree of arrays or of their shapes (`jax.eval_shape`).
    rank: dimension of the subspaces, or {path: rank} of every matrix; paths as
      `matrices.find` normalises them.
    prob: P(left) in [0, 1], or {path: prob}.
    matrices: what is adapted, default as everywhere. A stack counts once: its
      entries are alike.
    sketch: law of the subspaces, default `sketches.gaussian()`.
    train_others: whether the other floating-point leaves are trained in full
      (lambda = 1).

  Raises:
    ValueError: see `spectrum`; a mapping without one of the paths, or with
      another.
  """
  found = matrices_lib.find(params, matrices)
  floating = [
      path
      for path, x in matrices_lib.named_leaves(params).items()
      if jnp.issubdtype(matrices_lib.shape_of(x, path).dtype, jnp.floating)
  ]
  paths = [one.path for one in found]

  def each(name, value):
    if not isinstance(value, Mapping):
      return value
    checks.that(
        set(value) == set(paths), f'{name} of each of {paths}', **{name: value}
    )
    return [value[path] for path in paths]

  return spectrum(
      [(one.m, one.n) for one in found],
      rank=each('rank', rank),
      prob=each('prob', prob),
      sketch=sketch,
      all_trained=not (train_others and len(floating) > len(found)),
  )


def gd(
    num_steps: Steps,
    *,
    initial_gap: float,
    stepsize: float,
    smoothness: float,
    lmin: float,
    pl: float | None = None,
) -> np.ndarray:
  """Returns T1: 2 D0 / (gamma lmin T); under PL (1 - gamma mu lmin)^T D0.

  Args:
    num_steps: T >= 1, any shape.
    initial_gap: D0 >= 0.
    stepsize: gamma in (0, 1/L].
    smoothness: L > 0.
    lmin: least eigenvalue of E[H], in (0, 1].
    pl: mu in (0, L].

  Returns:
    Array of num_steps' shape.

  Raises:
    ValueError: a constant outside its range; a stepsize above 1/L.
  """
  steps = _steps(num_steps)
  _check_common(initial_gap, stepsize, smoothness, lmin, 1.0, pl)
  _check_stepsize('T1', stepsize, stepsizes.gd(smoothness=smoothness))
  return _rate(steps, stepsize, lmin, pl, initial_gap, initial_gap)


def gd_weighted(
    num_steps: Steps,
    *,
    initial_gap: float,
    stepsize: float,
    smoothness: float,
) -> np.ndarray:
  """Returns T1 for a tree, unweakened: 2 D0 / (gamma T).

  It bounds the mean of E sum_k lmin_k ||grad_k f||^2, lmin_k the least eigenvalue
  of E[H] of matrix k (`Spectrum.each`); `gd` has their least for all.

  Args:
    num_steps: T >= 1, any shape.
    initial_gap: D0 >= 0.
    stepsize: gamma in (0, 1/L].
    smoothness: L > 0, joint over the tree.

  Returns:
    Array of num_steps' shape.

  Raises:
    ValueError: see `gd`.
  """
  return gd(
      num_steps,
      initial_gap=initial_gap,
      stepsize=stepsize,
      smoothness=smoothness,
      lmin=1.0,
  )


def sgd(
    num_steps: Steps,
    *,
    initial_gap: float,
    stepsize: float,
    smoothness: float,
    lmin: float,
    lmax: float,
    noise: float,
    growth: float = 1.0,
    slope: float = 0.0,
    bounded_variance: bool = False,
    least: bool = False,
    pl: float | None = None,
) -> np.ndarray:
  """Returns T2, for gradients of E||g||^2 <= 2 A (f - f_inf) + B ||grad||^2 + C.

  With a = L gamma^2 lmax A and c = L gamma^2 lmax C / 2:
  (2 / (gamma lmin T)) [(1 + a)^T D0 + c ((1 + a)^T - 1) / a] for the mean,
  2 (1 + a)^T D0 / (gamma lmin T) + L gamma C kappa for the least, and under PL
  (1 - rho)^T D0 + c / rho, rho = gamma mu lmin - a.

  Args:
    num_steps: T >= 1, any shape.
    initial_gap: D0 >= 0.
    stepsize: gamma > 0, at most `stepsizes.sgd` of the same constants.
    smoothness: L > 0.
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].
    noise: C >= 0.
    growth: B > 0; with bounded_variance, B >= 1.
    slope: A >= 0.
    bounded_variance: the bound holds for E||g - grad||^2 with B - 1 in place of
      B, which allows a larger stepsize.
    least: bound min_t E||grad||^2 in place of the mean; not under PL.
    pl: mu in (0, L].

  Returns:
    Array of num_steps' shape.

  Raises:
    ValueError: a constant outside its range; a stepsize above its limit.
  """
  steps = _steps(num_steps)
  _check_common(initial_gap, stepsize, smoothness, lmin, lmax, pl)
  checks.at_least(0, noise=noise)
  if least and pl is not None:
    raise ValueError('Expected least without pl, got least=True.')
  limit = stepsizes.sgd(
      smoothness=smoothness,
      lmin=lmin,
      lmax=lmax,
      growth=growth,
      slope=slope,
      bounded_variance=bounded_variance,
      pl=pl,
  )
  _check_stepsize('T2', stepsize, limit)
  a = smoothness * stepsize**2 * lmax * slope
  c = smoothness * stepsize**2 * lmax * noise / 2
  if pl is not None:
    # E f+ - f* <= (1 - rho) (f - f*) + c can be unrolled for rho <= 1 alone.
    rho = min(1.0, stepsize * pl * lmin - a)
    return (1 - rho) ** steps * initial_gap + c / rho
  with np.errstate(over='ignore'):  # Infinity bounds everything.
    grown = np.exp(steps * np.log1p(a))
    repeated = steps if a == 0 else np.expm1(steps * np.log1p(a)) / a
    rate = 2 / (stepsize * lmin * steps)
    first = grown * initial_gap if initial_gap > 0 else 0.0  # Not 0 * inf.
    if least:
      return rate * first + smoothness * stepsize * noise * lmax / lmin
    return rate * (first + (c * repeated if c > 0 else 0.0))


def page(
    num_steps: Steps,
    *,
    initial_gap: float,
    stepsize: float,
    smoothness: float,
    mean_smoothness: float,
    lmin: float,
    lmax: float,
    prob: float,
    batch_size: int,
    num_samples: int | None = None,
    initial_error: float = 0.0,
    pl: float | None = None,
) -> np.ndarray:
  """Returns T3: 2 Phi0 / (gamma lmin T), Phi0 = D0 + gamma lmax V0 / (2 q).

  Under PL (1 - gamma mu lmin)^T (D0 + gamma lmax V0 / q).

  Args:
    num_steps: T >= 1, any shape.
    initial_gap: D0 >= 0.
    stepsize: gamma > 0, at most `stepsizes.page` of the same constants.
    smoothness: L > 0.
    mean_smoothness: Lbar >= 0, of single examples.
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].
    prob: q in (0, 1].
    batch_size: b' >= 1.
    num_samples: N where minibatches are drawn without replacement.
    initial_error: V0 >= 0; zero from a full gradient.
    pl: mu in (0, L].

  Returns:
    Array of num_steps' shape.

  Raises:
    ValueError: a constant outside its range; a stepsize above its limit.
  """
  steps = _steps(num_steps)
  _check_common(initial_gap, stepsize, smoothness, lmin, lmax, pl)
  checks.at_least(0, initial_error=initial_error)
  checks.that(
      float(batch_size).is_integer(),
      'batch_size to be a whole number',
      batch_size=batch_size,
  )
  limit = stepsizes.page(
      smoothness=smoothness,
      mean_smoothness=mean_smoothness,
      lmax=lmax,
      prob=prob,
      batch_size=batch_size,
      num_samples=num_samples,
      lmin=lmin,
      pl=pl,
  )
  _check_stepsize('T3', stepsize, limit)
  extra = stepsize * lmax * initial_error / (2 * prob)
  return _rate(
      steps, stepsize, lmin, pl, initial_gap + extra, initial_gap + 2 * extra
  )


def mvr(
    num_steps: Steps,
    *,
    initial_gap: float,
    stepsize: float,
    smoothness: float,
    mean_smoothness: float,
    lmin: float,
    lmax: float,
    momentum: float,
    variance: float,
    initial_error: float = 0.0,
    pl: float | None = None,
) -> np.ndarray:
  """Returns T4, with b = 1 - momentum and E||g - grad||^2 <= sigma^2.

  2 Phi0 / (gamma lmin T) + 2 b sigma^2 kappa / (2 - b),
  Phi0 = D0 + gamma lmax V0 / (2 b (2 - b)); under PL (1 - gamma mu lmin)^T
  (D0 + gamma lmax V0 / (b (2 - b))) + 2 b sigma^2 kappa / ((2 - b) mu).

  Args:
    num_steps: T >= 1, any shape.
    initial_gap: D0 >= 0.
    stepsize: gamma > 0, at most `stepsizes.mvr` of the same constants.
    smoothness: L > 0.
    mean_smoothness: Lbar >= 0, of minibatches as drawn.
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].
    momentum: 1 - b in [0, 1).
    variance: sigma^2 >= 0, of a minibatch's gradient.
    initial_error: V0 >= 0; sigma^2 where the first estimate is a minibatch's.
    pl: mu in (0, L].

  Returns:
    Array of num_steps' shape.

  Raises:
    ValueError: a constant outside its range; a stepsize above its limit.
  """
  steps = _steps(num_steps)
  _check_common(initial_gap, stepsize, smoothness, lmin, lmax, pl)
  checks.at_least(0, initial_error=initial_error)
  checks.at_least(0, variance=variance)
  limit = stepsizes.mvr(
      smoothness=smoothness,
      mean_smoothness=mean_smoothness,
      lmax=lmax,
      momentum=momentum,
      lmin=lmin,
      pl=pl,
  )
  _check_stepsize('T4', stepsize, limit)
  b = 1 - momentum
  extra = stepsize * lmax * initial_error / (2 * b * (2 - b))
  floor = 2 * b * variance * (lmax / lmin) / (2 - b)
  decay = _rate(
      steps, stepsize, lmin, pl, initial_gap + extra, initial_gap + 2 * extra
  )
  return decay + (floor if pl is None else floor / pl)


def qgd(
    num_steps: Steps,
    *,
    initial_gap: float,
    stepsize: float,
    smoothness: float,
    client_smoothness: Sequence[float],
    client_gap: float,
    omega: float,
    lmin: float,
    lmax: float,
    weights: Sequence[float] | None = None,
    least: bool = False,
    pl: float | None = None,
) -> np.ndarray:
  """Returns T5: T2 with A = omega max_l w_l L_l, B = 1 and C = 2 A client_gap.

  Args:
    num_steps: T >= 1, any shape.
    initial_gap: D0 >= 0.
    stepsize: gamma > 0, at most `stepsizes.qgd` at the largest T.
    smoothness: L > 0, of f.
    client_smoothness: L_l > 0 of each client.
    client_gap: f_inf - sum_l w_l f_l_inf >= 0; zero where one point minimises
      every f_l.
    omega: of the compressor, >= 0.
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].
    weights: w_l >= 0, normalised to sum 1; None for 1/M.
    least: as in `sgd`.
    pl: mu in (0, L].

  Returns:
    Array of num_steps' shape.

  Raises:
    ValueError: a constant outside its range; a stepsize above its limit.
  """
  _check_common(initial_gap, stepsize, smoothness, lmin, lmax, pl)
  checks.at_least(0, client_gap=client_gap)
  limit = stepsizes.qgd(
      smoothness=smoothness,
      client_smoothness=client_smoothness,
      omega=omega,
      lmin=lmin,
      lmax=lmax,
      num_steps=int(_steps(num_steps).max()),
      weights=weights,
      pl=pl,
  )
  _check_stepsize('T5', stepsize, limit)
  pairs = stepsizes.clients(client_smoothness, weights)
  slope = omega * max(w * each for w, each in pairs)
  return sgd(
      num_steps,
      initial_gap=initial_gap,
      stepsize=stepsize,
      smoothness=smoothness,
      lmin=lmin,
      lmax=lmax,
      noise=2 * slope * client_gap,
      slope=slope,
      bounded_variance=True,
      least=least,
      pl=pl,
  )


def marina(
    num_steps: Steps,
    *,
    initial_gap: float,
    stepsize: float,
    smoothness: float,
    client_smoothness: Sequence[float],
    omega: float,
    prob: float,
    lmin: float,
    lmax: float,
    weights: Sequence[float] | None = None,
    initial_error: float = 0.0,
    pl: float | None = None,
) -> np.ndarray:
  """Returns T6: T3's bound with its Phi0, under MARINA's stepsize.

  Args:
    num_steps: T >= 1, any shape.
    initial_gap: D0 >= 0.
    stepsize: gamma > 0, at most `stepsizes.marina` of the same constants.
    smoothness: L > 0, of f.
    client_smoothness: L_l > 0 of each client.
    omega: of the compressor, >= 0.
    prob: q in (0, 1].
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].
    weights: w_l >= 0, normalised to sum 1; None for 1/M.
    initial_error: V0 = E||G_0 - grad f(W_0)||^2 >= 0.
    pl: mu in (0, L].

  Returns:
    Array of num_steps' shape.

  Raises:
    ValueError: a constant outside its range; a stepsize above its limit.
  """
  steps = _steps(num_steps)
  _check_common(initial_gap, stepsize, smoothness, lmin, lmax, pl)
  checks.at_least(0, initial_error=initial_error)
  limit = stepsizes.marina(
      smoothness=smoothness,
      client_smoothness=client_smoothness,
      omega=omega,
      prob=prob,
      lmax=lmax,
      weights=weights,
      lmin=lmin,
      pl=pl,
  )
  _check_stepsize('T6', stepsize, limit)
  extra = stepsize * lmax * initial_error / (2 * prob)
  return _rate(
      steps, stepsize, lmin, pl, initial_gap + extra, initial_gap + 2 * extra
  )


def ef21(
    num_steps: Steps,
    *,
    initial_gap: float,
    stepsize: float,
    smoothness: float,
    client_smoothness: Sequence[float],
    beta: float,
    lmin: float,
    lmax: float,
    weights: Sequence[float] | None = None,
    initial_error: float = 0.0,
    pl: float | None = None,
) -> np.ndarray:
  """Returns T7: 2 Phi0 / (gamma lmin T), theta = 1 - sqrt(1 - beta).

  Phi0 = D0 + gamma lmax V0 / (2 theta); under PL (1 - gamma mu lmin)^T
  (D0 + gamma lmax V0 / theta).

  Args:
    num_steps: T >= 1, any shape.
    initial_gap: D0 >= 0.
    stepsize: gamma > 0, at most `stepsizes.ef21` of the same constants.
    smoothness: L > 0, of f.
    client_smoothness: L_l > 0 of each client.
    beta: of the compressor, in (0, 1].
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].
    weights: w_l >= 0, normalised to sum 1; None for 1/M.
    initial_error: V0 = sum_l w_l ||G_l^0 - grad f_l(W_0)||^2 >= 0.
    pl: mu in (0, L].

  Returns:
    Array of num_steps' shape.

  Raises:
    ValueError: a constant outside its range; a stepsize above its limit.
  """
  steps = _steps(num_steps)
  _check_common(initial_gap, stepsize, smoothness, lmin, lmax, pl)
  checks.at_least(0, initial_error=initial_error)
  limit = stepsizes.ef21(
      smoothness=smoothness,
      client_smoothness=client_smoothness,
      beta=beta,
      lmax=lmax,
      weights=weights,
      lmin=lmin,
      pl=pl,
  )
  _check_stepsize('T7', stepsize, limit)
  theta = beta / (1 + math.sqrt(1 - beta))
  extra = stepsize * lmax * initial_error / (2 * theta)
  return _rate(
      steps, stepsize, lmin, pl, initial_gap + extra, initial_gap + 2 * extra
  )


def nonsmooth(
    num_steps: Steps,
    *,
    distance: float,
    stepsize: float,
    lipschitz: float,
    lmin: float,
    lmax: float,
) -> np.ndarray:
  """Returns T8, constant step: R0^2 / (2 gamma lmin T) + gamma L0^2 kappa / 2.

  It bounds E f(avg) - f*, avg the uniform mean of W_0..W_(T-1), f convex.

  Args:
    num_steps: T >= 1, any shape.
    distance: R0 = ||W_0 - W*||_F > 0.
    stepsize: gamma > 0; every one is allowed, `stepsizes.nonsmooth` is best.
    lipschitz: L0 > 0, a bound of the subgradients' Frobenius norm.
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].

  Returns:
    Array of num_steps' shape.

  Raises:
    ValueError: a constant outside its range.
  """
  steps = _steps(num_steps)
  checks.positive(distance=distance, stepsize=stepsize, lipschitz=lipschitz)
  stepsizes.check_lambdas(lmin, lmax)
  floor = stepsize * lipschitz**2 * (lmax / lmin) / 2
  return distance**2 / (2 * stepsize * lmin * steps) + floor


def polyak(
    num_steps: Steps,
    *,
    distance: float,
    lipschitz: float,
    lmin: float,
    lmax: float,
) -> np.ndarray:
  """Returns T8, Polyak's step damped by 1/kappa: R0 L0 sqrt(kappa/(lmin T)).

  It bounds E f(avg) - f*, avg the uniform mean of W_0..W_(T-1), f convex; its
  square bounds the mean of E (f(W_t) - f*)^2.

  Args:
    num_steps: T >= 1, any shape.
    distance: R0 = ||W_0 - W*||_F > 0.
    lipschitz: L0 > 0, a bound of the subgradients' Frobenius norm.
    lmin: least eigenvalue of E[H], in (0, 1].
    lmax: largest eigenvalue of E[H], in [lmin, 1].

  Returns:
    Array of num_steps' shape.

  Raises:
    ValueError: a constant outside its range.
  """
  steps = _steps(num_steps)
  checks.positive(distance=distance, lipschitz=lipschitz)
  stepsizes.check_lambdas(lmin, lmax)
  return distance * lipschitz * np.sqrt(lmax / lmin / (lmin * steps))


# name: (largest stepsize, bound)
METHODS: dict[str, tuple[Callable[..., float], Callable[..., np.ndarray]]] = {
    'gd': (stepsizes.gd, gd),
    'sgd': (stepsizes.sgd, sgd),
    'page': (stepsizes.page, page),
    'mvr': (stepsizes.mvr, mvr),
    'qgd': (stepsizes.qgd, qgd),
    'marina': (stepsizes.marina, marina),
    'ef21': (stepsizes.ef21, ef21),
}


# name: of its bound.
THEOREMS = {
    'gd': 'T1',
    'sgd': 'T2',
    'page': 'T3',
    'mvr': 'T4',
    'qgd': 'T5',
    'marina': 'T6',
    'ef21': 'T7',
}


def largest_stepsize(estimator: str, constants: dict[str, Any]) -> float:
  """Returns the largest stepsize of an estimator of `METHODS`, or T8's best.

  Args:
    estimator: a name of `METHODS`, or 'nonsmooth'.
    constants: of its bound, lmin and lmax; num_steps where it depends on T. For
      sgd with a slope it is the largest with which the bound does not grow in T:
      1/sqrt(L A lmax T) is among its limits, as in T5.
  """
  if estimator == 'nonsmooth':
    return call(stepsizes.nonsmooth, constants)
  if estimator in ('sgd', 'qgd') and constants.get('pl') is None:
    # Growth of the gap, slope A > 0, is bounded for a horizon.
    return call(METHODS[estimator][0], constants)
  return call(METHODS[estimator][0], constants | {'num_steps': None})


def check_constants(
    bound: Callable[..., Any], name: str, constants: dict[str, Any]
) -> None:
  """Raises ValueError for a constant that a bound does not take, or lacks."""
  decided = {'num_steps', 'stepsize', 'lmin', 'lmax'}
  parameters = inspect.signature(bound).parameters
  known = {k: p for k, p in parameters.items() if k not in decided}
  for k in constants:
    checks.that(
        k in known,
        f'constants of {name} among {tuple(known)}',
        **{k: constants[k]},
    )
  missing = [
      k
      for k, parameter in known.items()
      if parameter.default is inspect.Parameter.empty and k not in constants
  ]
  if missing:
    raise ValueError(f'Expected {", ".join(missing)} for {name}, got none.')


@functools.cache
def _names(f: Callable[..., Any]) -> frozenset[str]:
  return frozenset(inspect.signature(f).parameters)


def call(f: Callable[..., Any], values: dict[str, Any]) -> Any:
  """Returns f called with those of the values that it names."""
  names = _names(f)
  return f(**{name: value for name, value in values.items() if name in names})


def _rate(
    steps: np.ndarray,
    stepsize: float,
    lmin: float,
    pl: float | None,
    phi: float,
    phi_pl: float,
) -> np.ndarray:
  """Returns 2 Phi0 / (gamma lmin T), or (1 - gamma mu lmin)^T Phi0 under PL."""
  if pl is None:
    return 2 * phi / (stepsize * lmin * steps)
  return max(0.0, 1 - stepsize * pl * lmin) ** steps * phi_pl


def _steps(num_steps: Steps) -> np.ndarray:
  steps = np.asarray(num_steps, float)
  is_whole = np.isfinite(steps) & (steps >= 1) & (steps == np.floor(steps))
  checks.that(
      bool(steps.size and np.all(is_whole)),
      'num_steps >= 1, whole numbers',
      num_steps=num_steps,
  )
  return steps


def _check_common(
    initial_gap: float,
    stepsize: float,
    smoothness: float,
    lmin: float,
    lmax: float,
    pl: float | None,
) -> None:
  checks.that(
      0 <= initial_gap < math.inf,
      'initial_gap >= 0 and finite',
      initial_gap=initial_gap,
  )
  checks.positive(stepsize=stepsize, smoothness=smoothness)
  stepsizes.check_lambdas(lmin, lmax)
  if pl is not None:
    checks.that(
        0 < pl <= smoothness * (1 + _ROUNDING),
        f'pl in (0, smoothness={smoothness}]',
        pl=pl,
    )


def _check_stepsize(theorem: str, stepsize: float, limit: float) -> None:
  if stepsize > limit * (1 + _ROUNDING):
    times = stepsize / limit if limit > 0 else math.inf
    raise ValueError(
        f'Expected stepsize <= {limit:.10g} ({theorem}), got'
        f' stepsize={stepsize:.10g}, {times:.10g} times as much.'
    )
