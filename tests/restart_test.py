"""What of an optimiser's state restarts with a link, over all of optax."""

import functools
import inspect
from typing import NamedTuple

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import restart

SHAPE = (2, 3)
STEPS = 3  # Before the restart.
KEY = jax.random.key(0)


def make_pairs(seed):
  """One shape for both sides: eager operations compile once a shape."""
  rng = np.random.default_rng(seed)
  draw = lambda: jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
  return {'a/kernel': {'left': draw(), 'right': draw()}}


START, NEW = make_pairs(0), make_pairs(1)
GRADS = [make_pairs(seed) for seed in range(2, 4)]


def rate(count, shift=0):
  return 0.1 / (1.0 + count + shift)


# Arguments by their name: what a factory needs, and schedules where it takes
# them. A function of optax that needs another one fails `test_all_are_covered`.
REQUIRED = {
    'adv_optimizer': optax.sgd(0.1),
    'base_optimizer': optax.sgd(0.1),
    'clipping': 1.0,
    'decay': 0.9,
    'eta': 0.1,
    'f': lambda updates, params=None: updates,
    'fast_optimizer': optax.sgd(0.1),
    'freeze_mask': {'a/kernel': {'left': True, 'right': False}},
    'gamma': 0.5,
    'inner': optax.adam(0.1),
    'inner_factory': optax.adam,
    'l2_norm_clip': 1.0,
    'mask': {'a/kernel': {'left': True, 'right': False}},
    'max_backtracking_steps': 3,
    'max_consecutive_errors': 3,
    'max_delta': 1.0,
    'max_linesearch_steps': 3,
    'max_norm': 1.0,
    'measure': optax.global_norm,
    'measure_name': 'norm',
    'measures': {'norm': optax.global_norm},
    'noise_multiplier': 0.1,
    'optimism': 0.5,
    'optimizer': optax.adam(0.1),
    'param_labels': {'a/kernel': {'left': 'x', 'right': 'y'}},
    'seed': 0,
    'should_transform_fn': lambda step: step < 4,
    'slow_step_size': 0.5,
    'step_size': 0.1,
    'step_size_fn': rate,
    'sync_period': 2,
    'threshold': 1.0,
    'transforms': {'x': optax.adam(0.1), 'y': optax.trace(0.9)},
    'tx': optax.adam(0.1),
}
SCHEDULED = ('learning_rate', 'weight_decay', 'alpha', 'b3')
# They take a callable and fail later.
CONSTANT = ('fromage', 'rprop', 'scale_by_rprop')
# Refused by the restart, or by optax itself; the message says which.
REFUSED = {
    'apply_every': 'num_micro_batches in place of optax.apply_every',
    'dadapt_adamw': 'constant learning_rate of optax.contrib.dadapt_adamw',
    'ademamix': 'constant b3 of optax.contrib.ademamix',
    'differentially_private_aggregate': 'those of single examples',
    'dpsgd': 'those of single examples',
    'madgrad': 'constant learning_rate of optax.contrib.madgrad',
    'momo': 'constant learning_rate of optax.contrib.momo',
    'momo_adam': 'constant learning_rate of optax.contrib.momo_adam',
    'prodigy': 'constant learning_rate of optax.contrib.prodigy',
    'sam': 'got optax.contrib.sam',
    'scale_by_ademamix': 'constant b3 of optax.contrib.ademamix',
    'scale_by_madgrad': 'constant learning_rate of optax.contrib.madgrad',
    'scale_by_simplified_ademamix': (
        'constant alpha of optax.contrib.simplified_ademamix'
    ),
    'schedule_free': 'constant learning_rate of optax.contrib.schedule_free',
    'schedule_free_adamw': 'constant learning_rate of optax.contrib.schedule_',
    'schedule_free_sgd': 'constant learning_rate of optax.contrib.schedule_f',
    'simplified_ademamix': (
        'constant alpha of optax.contrib.simplified_ademamix'
    ),
}
# A member of every kind; the rest of the table is slow, all together.
QUICK = (
    'adamw',
    'add_decayed_weights',
    'ademamix',
    'apply_every',
    'chain',
    'dpsgd',
    'flatten',
    'inject_hyperparams',
    'masked',
    'momo',
    'partition',
    'prodigy',
    'sam',
    'schedule_free',
    'scale_by_sm3',
)
# What optax refuses under a chain of adapters, which gives params and value.
NOT_FOR_FACTORS = {
    'hutchinson_estimator_diag_hessian': 'obj_fn',
    'lookahead': 'LookaheadParams in place of params',
    'scale_by_backtracking_linesearch': 'value_fn and grad',
    'scale_by_zoom_linesearch': 'value_fn and grad',
    'lbfgs': 'value_fn and grad',
    'sophia': 'obj_fn',
}
# Parts of the state that know of the run go on, so the steps after a restart
# are not those of a fresh optimiser; what goes on is tested by itself below.
GOES_ON = {'add_noise', 'noisy_sgd', 'conditionally_transform'}
GOES_ON |= {'conditionally_mask', 'measure_with_ema'}


def find_factories():
  """Returns {name: function} of all that makes a transformation."""
  found = {}
  for module in (optax, optax.transforms, optax.contrib):
    for name, value in vars(module).items():
      if not name.startswith('_') and inspect.isfunction(value):
        found[name] = value
  return found


def make(name, factory, shift, scheduled=True):
  """Returns a factory's transformation, with shifted schedules inside."""
  signature = inspect.signature(factory).parameters
  arguments = {}
  for parameter in signature.values():
    key = parameter.name
    is_variadic = parameter.kind in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )
    schedule = functools.partial(rate, shift=shift) if scheduled else 0.1
    if key in SCHEDULED and 'schedul' in str(parameter.annotation).lower():
      arguments[key] = schedule
    elif key == 'step_size_fn':
      arguments[key] = functools.partial(rate, shift=shift)
    elif key == 'learning_rate' and name not in CONSTANT:
      arguments[key] = schedule
    elif key in ('b3', 'alpha') and 'ademamix' in name:
      arguments[key] = schedule
    elif parameter.default is parameter.empty and not is_variadic:
      if key == 'learning_rate':
        arguments[key] = 0.1
      elif key not in REQUIRED:
        return None
      else:
        arguments[key] = REQUIRED[key]
  if name in ('chain', 'named_chain'):
    parts = [optax.trace(0.9), optax.scale_by_schedule(arguments_of(shift))]
    return factory(
        *(parts if name == 'chain' else zip('ab', parts, strict=True))
    )
  if name.startswith('inject') and name.endswith('hyperparams'):
    return factory(optax.adam)(arguments_of(shift))
  if name == 'scale_by_muon':
    arguments['weight_dimension_numbers'] = lambda tree: jax.tree.map(
        lambda _: optax.contrib.MuonDimensionNumbers(), tree
    )
  if 'key' in signature:
    arguments['key'] = KEY
  try:
    made = factory(**arguments)
  except (TypeError, ValueError, AttributeError):  # Takes constants only.
    return make(name, factory, shift, False) if scheduled else None
  return made if isinstance(made, optax.GradientTransformation) else None


def arguments_of(shift):
  return functools.partial(rate, shift=shift)


FACTORIES = {
    name: factory
    for name, factory in find_factories().items()
    if make(name, factory, 0) is not None
}


def steps(tx, state, params, grads):
  """Returns the updates of some steps at fixed params, and the state."""
  update = optax.with_extra_args_support(tx).update
  found = []
  for i, grad in enumerate(grads):
    params = optax.tree.scale(1 + 0.1 * i, params)
    with jax.numpy_rank_promotion('allow'):
      updates, state = update(grad, state, params, value=jnp.float32(1 + i))
    found.append(updates)
  return found, state


class RestartTest(parameterized.TestCase):

  def test_all_are_covered(self):
    for name, factory in find_factories().items():
      annotation = str(inspect.signature(factory).return_annotation)
      if 'GradientTransformation' in annotation:
        self.assertIn(name, FACTORIES, 'add its arguments to REQUIRED')
    self.assertLessEqual(
        set(REFUSED) | set(NOT_FOR_FACTORS) | GOES_ON, set(FACTORIES)
    )
    self.assertGreater(len(FACTORIES), 100)

  @parameterized.parameters(*QUICK)
  def test_restarted_is_fresh_with_schedules_gone_on(self, name):
    self.check_restarted(name)

  @parameterized.parameters(*sorted(set(FACTORIES) - set(QUICK)))
  @pytest.mark.slow
  def test_restarted_is_fresh_with_schedules_gone_on_otherwise(self, name):
    self.check_restarted(name)

  def check_restarted(self, name):
    tx = make(name, FACTORIES[name], 0)
    if name in NOT_FOR_FACTORS:
      with self.assertRaises((TypeError, ValueError, AttributeError)):
        steps(tx, tx.init(START), START, GRADS)
      return
    if name in REFUSED:
      with self.assertRaisesRegex(ValueError, REFUSED[name]):
        restart.check(tx, tx.init(START), START)
      if 'constant' not in REFUSED[name]:
        return
      tx = make(name, FACTORIES[name], 0, scheduled=False)
    restart.check(tx, tx.init(START), START)
    grads = [GRADS[i % 2] for i in range(STEPS)]
    _, old = steps(tx, tx.init(START), START, grads)
    got = restart.restart(tx.init(NEW), old, NEW)
    chex.assert_trees_all_equal_structs(got, old)
    if name in GOES_ON:
      return
    later = make(name, FACTORIES[name], STEPS, name not in REFUSED)
    updates, _ = steps(tx, got, NEW, GRADS)
    wanted, _ = steps(later, later.init(NEW), NEW, GRADS)
    chex.assert_trees_all_close(updates, wanted, rtol=1e-6, atol=1e-7)

  @parameterized.parameters('momo', 'momo_adam', 'prodigy', 'dadapt_adamw')
  def test_the_remedy_is_right(self, name):
    factory = getattr(optax.contrib, name)
    tx = optax.inject_hyperparams(factory)(learning_rate=rate)
    restart.check(tx, tx.init(START), START)
    _, old = steps(tx, tx.init(START), START, GRADS)
    got = restart.restart(tx.init(NEW), old, NEW)
    later = optax.inject_hyperparams(factory)(
        learning_rate=functools.partial(rate, shift=len(GRADS))
    )
    updates, _ = steps(tx, got, NEW, GRADS)
    wanted, _ = steps(later, later.init(NEW), NEW, GRADS)
    chex.assert_trees_all_close(updates, wanted, rtol=1e-6, atol=1e-7)

  def test_what_knows_of_the_run_goes_on(self):
    tx = optax.chain(
        optax.apply_if_finite(optax.adam(0.1), 3),
        optax.add_noise(0.1, 0.5, KEY),
        optax.add_decayed_weights(rate),
        optax.conditionally_transform(optax.trace(0.9), lambda step: step < 2),
        optax.conditionally_mask(optax.adam(0.1), lambda step: step < 2),
        optax.contrib.reduce_on_plateau(),
        optax.masked(
            optax.inject_hyperparams(optax.adam)(rate),
            {'a/kernel': {'left': True, 'right': False}},
        ),
    )
    _, old = steps(tx, tx.init(START), START, GRADS)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS[0])
    _, old = steps(tx, old, START, [bad])
    fresh = tx.init(NEW)
    got = restart.restart(fresh, old, NEW)
    same = chex.assert_trees_all_equal
    same(got[0].total_notfinite, jnp.int32(1))
    same(got[0].inner_state, fresh[0].inner_state)
    same(
        *(
            jax.tree.map(jax.random.key_data, x.rng_key)
            for x in (got[1], old[1])
        )
    )
    same(got[2].count, old[2].count)
    same((got[3].step, got[4].step), (old[3].step, old[4].step))
    same(got[3].inner_state, fresh[3].inner_state)
    same(got[5], old[5])
    inner = got[6].inner_state
    same(inner.hyperparams, old[6].inner_state.hyperparams)
    self.assertEqual(int(inner.count), 3)
    self.assertEqual(int(inner.inner_state[0].count), 0)

  @parameterized.parameters('named', 'dict', 'list', 'bare', 'wrapped', 'flat')
  def test_an_optimiser_of_ones_own(self, kind):
    """The count beside moments restarts, the one of another node goes on."""

    class Own(NamedTuple):
      count: jax.Array
      memory: list

    class Wrapper(NamedTuple):
      total: jax.Array
      inner_state: object

    zeros = lambda p: jax.tree.map(jnp.zeros_like, p)
    flat = lambda p: jnp.concatenate([x.ravel() for x in jax.tree.leaves(p)])
    state = {
        'named': lambda p, c: Own(c, [zeros(p), zeros(p)]),
        'dict': lambda p, c: {'count': c, 'history': [zeros(p), zeros(p)]},
        'list': lambda p, c: Own(c, jax.tree.leaves(p)),
        'bare': lambda p, c: zeros(p),
        'wrapped': lambda p, c: Wrapper(c + 1, {'count': c, 'mu': zeros(p)}),
        'flat': lambda p, c: Own(c, [flat(p)]),
    }[kind]
    tx = optax.GradientTransformation(
        lambda p: (
            state(p, jnp.int32(0)),
            optax.ScaleByScheduleState(jnp.int32(0)),
        ),
        None,
    )
    moved = lambda state: jax.tree.map(lambda x: x + 7, state)
    old = moved(tx.init(START))
    restart.check(tx, tx.init(START), START)
    got = restart.restart(tx.init(NEW), old, NEW)
    self.assertEqual(int(got[1].count), 7)
    wanted = tx.init(NEW)[0]
    if kind == 'wrapped':
      wanted = wanted._replace(total=jnp.int32(8))
    chex.assert_trees_all_equal(got[0], wanted)

  def test_leaves_that_cannot_be_told_apart_are_refused(self):
    state = (jnp.int32(0), START)
    tx = optax.GradientTransformation(lambda p: state, None)
    with self.assertRaisesRegex(
        ValueError, 'Name the fields, or pass restart='
    ):
      restart.check(tx, state, START)

  def test_restart_of_a_chain_is_the_users(self):
    """`restart=` replaces rule and check."""
    tx = optax.contrib.momo(rate)
    params = {'kernel': jnp.ones((4, 4))}
    loss = lambda p, f, b: (jnp.sum(f['kernel']['left'] ** 2), None)
    policy = bl.ChainPolicy(
        rank=2, period=2, side=None, sketch=bl.sketches.coordinate()
    )
    with self.assertRaisesRegex(ValueError, 'momo in a chain whose links'):
      bl.adapters.make_chain(policy, tx).init(KEY, params)
    keep = lambda fresh, old: fresh._replace(count=old.count)
    chain = bl.adapters.make_chain(policy, tx, restart=keep)
    state = chain.init(KEY, params)
    for _ in range(3):
      state, _ = chain.step(state, loss, None)
    self.assertEqual(int(state.opt_state.count), 3)


if __name__ == '__main__':
  pytest.main([__file__])
