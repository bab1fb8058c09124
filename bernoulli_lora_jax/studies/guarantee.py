"""Which guarantee speaks of a run, and its bound with estimated constants."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from ml_collections import config_dict
import numpy as np

from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import federated as federated_lib
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import stepsizes
from bernoulli_lora_jax.studies import constants as constants_lib
from bernoulli_lora_jax.studies import runs
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.theory import bounds
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import methods

ROUNDING = 1e-5  # By which a float32 stepsize, or L, may miss a limit.


class Bound(NamedTuple):
  """The guarantee beside a run, and whether it speaks of it."""

  theorem: str  # 'T1', ..., or '' for none.
  # (steps) -> bound of the mean squared gradient norm; None for no chain.
  curve: Callable[[np.ndarray], np.ndarray] | None
  limit: float | None  # Largest stepsize that the theorem allows.
  reason: str  # Why it does not speak of the run, '' if it does.
  label: str  # Of the curve.
  period: int = 1  # It speaks of the mean over every so many steps.
  limit_is_known: bool = False  # From constants that are known, not estimated.


def spectrum_of(
    finished: runs.Finished, task: task_lib.Task, method: methods.Method
) -> bounds.Spectrum:
  """Returns lmin, lmax of a run; both 1 for full fine-tuning."""
  c = finished.config.method
  if c.name in methods.WHOLE:
    return bounds.Spectrum((), 1.0, 1.0)
  found, ranks, probs = drawn(finished, task, method)
  return bounds.spectrum(
      [(m.m, m.n) for m in found],
      rank=ranks,
      prob=probs,
      sketch=arguments.make_sketch(finished.config),
      all_trained=not (c.train_others or c.others),
  )


def drawn(
    finished: runs.Finished, task: task_lib.Task, method: methods.Method
) -> tuple[list[matrices_lib.Matrix], list[int], list[float]]:
  """Returns what a chain draws for: matrices, ranks, probs."""
  params = task.init(jax.random.key(0))
  c = finished.config.method
  if method.chain is not None:
    adapted = method.chain.adapted(params)
    return (
        [one.matrix for one in adapted],
        [one.rank for one in adapted],
        [float(one.prob) for one in adapted if one.prob is not None],
    )
  found = matrices_lib.find(
      params, arguments.make_matrices(finished.config, task)
  )
  prob = float(methods.chain_prob(c.name, c.prob))
  return found, [c.rank] * len(found), [prob] * len(found)


def is_chain(config: config_dict.ConfigDict) -> bool:
  """Returns whether the links of a run are the chain's (A1)."""
  return config.method.name in ('rac_left', 'rac_right', 'bernoulli')


def why_uncovered(config: config_dict.ConfigDict, task: task_lib.Task) -> str:
  """Returns the reason why no guarantee speaks of a run, '' if one does."""
  c = config.method
  if not is_chain(config) and c.name not in methods.WHOLE:
    return f'{c.name} is no chain of projections'
  if c.optimizer != 'sgd':
    return f'{c.optimizer} in place of plain steps'
  is_adapter = c.mode != 'gradient'
  if c.schedule != 'constant' or c.warmup_steps:
    return 'a stepsize that changes'
  if is_adapter and c.link_warmup:
    return 'a stepsize that changes'
  if c.clip_norm is not None:
    return 'clipped gradients'
  if c.estimator == 'fedavg':
    return 'several local steps'
  if config.federated.num_clients and c.mode == 'adapter':
    return 'federated rounds of adapters'
  if config.federated.num_clients:
    sizes = np.asarray(task.data['clients']['mask']).sum(1)
    is_equal = bool(np.all(sizes == sizes[0]))
    f = config.federated
    if f.weights == 'uniform' and not is_equal:
      return 'it minimises another mean of the clients than f'
    if f.cohort is not None and c.estimator == 'ef21':
      return 'EF21 with cohorts'
    if f.cohort not in (None, f.num_clients) and not is_equal:
      return 'cohorts of clients of unequal weights'
  if task.criterion == 'absolute':
    return (
        'f is not smooth, and T8 bounds f - f* of the mean iterate: see'
        ' launch/theory.py nonsmooth'
    )
  if is_adapter and c.frame == 'raw':
    return 'raw factors: the step is no projection'
  if is_adapter and not c.resample:
    return 'one subspace kept'
  is_gd = is_plain_gd(config, task)
  is_whole = is_gd or c.estimator not in ('sgd', 'mvr')
  if is_whole and config.task.dropout > 0 and task.criterion is not None:
    return 'full gradients with dropout are noisy'
  if arguments.period_of(config, task) > 1 and is_chain(config):
    if not is_gd:
      return 'links of several minibatch steps'
  if config.training.plateau_patience:
    return 'a stepsize that drops on plateaus'
  return ''


def is_plain_gd(config: config_dict.ConfigDict, task: task_lib.Task) -> bool:
  """Returns whether the gradient of a step is that of f."""
  c = config.method
  is_single = c.mode != 'gradient' or c.estimator in ('sgd', 'mvr')
  return c.estimator == 'gd' or (is_single and has_whole_batches(task))


def has_whole_batches(task: task_lib.Task) -> bool:
  """Returns whether a minibatch is all examples, each of them once."""
  return task.batch_size == task.num_samples and not draws_afresh(task)


def draws_afresh(task: task_lib.Task) -> bool:
  """Returns whether minibatches are drawn with replacement, independently."""
  return task.sampling == 'replacement'


def find_bound(
    finished: runs.Finished,
    task: task_lib.Task,
    method: methods.Method,
    found: constants_lib.Constants,
) -> Bound:
  """Returns the guarantee of a run with estimated constants.

  A known L is taken as it is.
  """
  config = finished.config
  reason = why_uncovered(config, task)
  c = config.method
  if not is_chain(config) and c.name not in methods.WHOLE:
    return Bound('', None, None, reason, '')
  if task.criterion == 'absolute':  # T1 is no reference for it.
    return Bound('', None, None, reason, '')
  if task.smoothness is not None:
    found = found._replace(smoothness=task.smoothness)
  spectrum = spectrum_of(finished, task, method)
  if reason:
    label = 'T1 of plain GD with gamma = 1/L, not of this run'
    return Bound('', _reference(found, spectrum), None, reason, label)
  estimator = 'gd' if is_plain_gd(config, task) else c.estimator
  theorem = bounds.THEOREMS[estimator]
  constants = {
      'initial_gap': found.initial_gap,
      'smoothness': found.smoothness,
      'lmin': spectrum.lmin,
  }
  if estimator != 'gd':
    constants['lmax'] = spectrum.lmax
    constants |= _noise_constants(estimator, finished, task, method, found)
  gamma, period = stepsize_of(finished, task), period_of(config, task)
  limit_of, bound = bounds.METHODS[estimator]
  num_steps = int(finished.run.summary['step'])
  limit = bounds.call(limit_of, {**constants, 'num_steps': num_steps})
  is_within = gamma <= limit * (1 + ROUNDING)
  stepsize = min(gamma, limit)
  if estimator == 'sgd' and is_within:
    constants = _better_noise(constants, found, stepsize, num_steps)

  def curve(steps):
    # With K plain GD steps a link, T1 counts links.
    links = np.maximum(1, np.asarray(steps) // period)
    return bound(links, stepsize=stepsize, **constants)

  label = f'{theorem}, estimated constants'
  if estimator == 'sgd' and 'slope' in constants:
    label += ' (A, B, C)'
  if period > 1:
    label += ', mean over starts of links'
  if not is_within:
    reason = f'its stepsize {gamma:.6g} is {gamma / limit:.6g} times the limit'
    label = f'{theorem} with gamma = {limit:.3g}, not of this run'
  is_known = estimator == 'gd' and task.smoothness is not None
  return Bound(theorem, curve, limit, reason, label, period, is_known)


def period_of(config: config_dict.ConfigDict, task: task_lib.Task) -> int:
  """Returns K where a guarantee speaks of starts of links, else 1."""
  if not is_chain(config) or why_uncovered(config, task):
    return 1
  return arguments.period_of(config, task)


def _reference(
    found: constants_lib.Constants, spectrum: bounds.Spectrum
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns T1 with gamma = 1/L, beside runs of which no theorem speaks."""

  def reference(steps):
    return bounds.gd(
        np.maximum(1, np.asarray(steps)),
        initial_gap=found.initial_gap,
        stepsize=1 / found.smoothness,
        smoothness=found.smoothness,
        lmin=spectrum.lmin,
    )

  return reference


def _noise_constants(
    estimator: str,
    finished: runs.Finished,
    task: task_lib.Task,
    method: methods.Method,
    found: constants_lib.Constants,
) -> dict[str, Any]:
  """Returns what T2 to T7 know of an estimator beside L and the lambdas."""
  c = finished.config.method
  if estimator == 'sgd':
    return {'bounded_variance': True, 'noise': found.variance}
  if estimator == 'page':
    b, prob = task.batch_size, c.page_prob
    return {
        'mean_smoothness': found.mean_smoothness,
        'prob': b / (b + task.num_samples) if prob is None else prob,
        'batch_size': b,
    }
  if estimator == 'mvr':
    return {
        'mean_smoothness': found.batch_smoothness,
        'momentum': c.mvr_momentum,
        'variance': found.variance,
        'initial_error': found.variance,
    }
  return _federated_constants(finished, task, method, found)


def _better_noise(
    constants: dict[str, Any],
    found: constants_lib.Constants,
    stepsize: float,
    num_steps: int,
) -> dict[str, Any]:
  """Returns T2's constants with A, B, C where these give the smaller bound."""
  fitted = constants | {
      'slope': found.slope,
      'growth': found.growth,
      'noise': found.noise,
  }
  if stepsize > bounds.call(stepsizes.sgd, fitted | {'num_steps': num_steps}):
    return constants
  of = lambda given: float(bounds.sgd(num_steps, stepsize=stepsize, **given))
  return fitted if of(fitted) < of(constants) else constants


def _federated_constants(
    finished: runs.Finished,
    task: task_lib.Task,
    method: methods.Method,
    found: constants_lib.Constants,
) -> dict[str, Any]:
  """Returns the constants of T5, T6 or T7."""
  c, f = finished.config.method, finished.config.federated
  compressor = arguments.make_compressor(finished.config)
  params = task.init(jax.random.key(0))
  part = averaging.trained_part(params, method.trained)
  shapes = [x.shape for x in jax.tree.leaves(part)]
  if f.concatenate:
    shapes = [(sum(math.prod(shape) for shape in shapes),)]
  weights = arguments.make_cohort(finished.config, task).weights
  result: dict[str, Any] = {
      'client_smoothness': found.client_smoothness,
      'weights': weights,
  }
  if c.estimator == 'ef21':
    assert compressor.beta is not None
    beta = min(compressor.beta(shape) for shape in shapes)
    share = {'full': 0.0, 'compressed': 1 - beta, 'zero': 1.0}[f.start]
    return result | {'beta': beta, 'initial_error': share * found.client_error}
  if compressor.omega is None:
    raise ValueError(
        f'Expected an unbiased compressor with {c.estimator}, got'
        f' {compressor.name}.'
    )
  omega = max(compressor.omega(shape) for shape in shapes)
  cohort = f.num_clients if f.cohort is None else f.cohort
  result['omega'] = federated_lib.cohort_omega(omega, f.num_clients, cohort)
  if c.estimator == 'qgd':  # f_l >= the lower bound, f_inf <= the best seen.
    gap = max(found.best - found.lower_bound, 0.0)
    return result | {'client_gap': gap}
  prob = f.marina_prob
  if prob is None:
    small, size = federated_lib.message_bits(
        compressor, part, concatenate=f.concatenate
    )
    prob = min(1.0, small / size)
  return result | {'prob': prob}


def stepsize_of(finished: runs.Finished, task: task_lib.Task) -> float:
  """Returns gamma of A1; with a scale s^2 times the learning rate."""
  gamma = arguments.learning_rate_of(finished.config, task)
  c = finished.config.method
  if c.mode != 'gradient' and c.alpha is not None:
    rank = c.rank if c.scaling == 'rank' else math.sqrt(c.rank)
    gamma *= (c.alpha / rank) ** 2
  return gamma
