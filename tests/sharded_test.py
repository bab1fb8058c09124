"""Weights with shardings in their types: the run of one device, and nothing moves."""

import functools
import re

from absl.testing import parameterized
import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl

P = jax.sharding.PartitionSpec
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 8))


def mesh_of(kind):
  types = (getattr(jax.sharding.AxisType, kind),) * 2
  return jax.make_mesh((4, 2), ('x', 'y'), axis_types=types)


LAYOUTS = {
    'rows': {'kernel': P('x', None), 'bias': P(None)},
    'columns': {'kernel': P(None, 'x'), 'bias': P('x')},
    'both': {'kernel': P('y', 'x'), 'bias': P('x')},
    'replicated': {'kernel': P(None, None), 'bias': P(None)},
}
SKETCHES = ('gaussian', 'rademacher', 'coordinate', 'srht')


@functools.cache
def dense():
  model = nn.Dense(16)
  params = model.init(jax.random.key(2), X)['params']
  loss = lambda p, x: (jnp.mean(model.apply({'params': p}, x) ** 2), None)
  return params, loss


def adapter_run(policy):
  """Returns params -> (merged weights, states)."""
  _, loss = dense()
  chain = bl.adapters.make_chain(policy, optax.adam(0.1))
  adapted = bl.inject.by_product(loss)

  def run(params):
    @jax.jit
    def step(state):
      return chain.step(state, adapted, X)

    state = chain.init(KEY, params)
    states = [state]
    for _ in range(5):
      state, _ = step(state)
      states.append(state)
    return chain.params(state), states

  return run


def gradient_run(**kwargs):
  params, loss = dense()
  tx = bl.bernoulli_lora(0.1, KEY, rank=2, **kwargs)

  def run(params):
    @jax.jit
    def step(params, state):
      grads = jax.grad(lambda p: loss(p, X)[0])(params)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    state = tx.init(params)
    states = [(params, state)]
    for _ in range(5):
      params, state = step(params, state)
      states.append((params, state))
    return params, states

  return run


def runs():
  """Yields (name, whether it is quick, run)."""
  for side in ('left', 'right', 'bernoulli', None):
    for name in SKETCHES:
      policy = bl.ChainPolicy(
          rank=2, period=2, side=side, sketch=bl.sketches.by_name(name)
      )
      is_quick = (side, name) in [
          ('bernoulli', 'gaussian'),
          ('left', 'coordinate'),
      ]
      if side is not None or name == 'gaussian':
        yield f'adapters_{side}_{name}', is_quick, adapter_run(policy)
  for rounding in ('stochastic', 'compensated'):
    policy = bl.ChainPolicy(rank=2, period=2, rounding=rounding)
    yield f'adapters_{rounding}', False, adapter_run(policy)
  for name in SKETCHES:
    run = gradient_run(sketch=bl.sketches.by_name(name))
    yield f'gradient_{name}', name == 'gaussian', run
  adam = gradient_run(inner=optax.scale_by_adam(), period=2)
  yield 'gradient_adam', False, adam


RUNS = {name: (is_quick, run) for name, is_quick, run in runs()}
CASES = [
    (f'{name}_{layout}_{kind}', name, layout, kind)
    for name in RUNS
    for layout in LAYOUTS
    for kind in ('Explicit', 'Auto')
]
QUICK = [
    case
    for case in CASES
    if RUNS[case[1]][0]
    and case[2] in ('rows', 'columns')
    and case[3] == 'Explicit'
]


class ShardedTest(parameterized.TestCase):

  def check(self, name, layout, kind):
    params, _ = dense()
    _, run = RUNS[name]
    expected, _ = run(params)
    mesh = mesh_of(kind)
    placed = {
        leaf: jax.device_put(params[leaf], jax.NamedSharding(mesh, spec))
        for leaf, spec in LAYOUTS[layout].items()
    }
    # Compilations: jit's own cache also tells apart equal placements of a key.
    with jax.log_compiles(), self.assertLogs('jax') as logs:
      found, states = run(placed)
    programs = sum(
        'XLA compilation of jit(step)' in line for line in logs.output
    )
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(expected), rtol=1e-4, atol=1e-5
    )
    self.assertBetween(programs, 1, 2)
    # Placed as it was, from step to step.
    for leaf in placed:
      self.assertTrue(
          found[leaf].sharding.is_equivalent_to(
              placed[leaf].sharding, found[leaf].ndim
          )
      )
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    self.assertEqual(types(states[1]), types(states[-1]))

  @parameterized.named_parameters(*QUICK)
  def test_equals_one_device(self, name, layout, kind):
    self.check(name, layout, kind)

  @parameterized.named_parameters(*(c for c in CASES if c not in QUICK))
  @pytest.mark.slow
  def test_equals_one_device_everywhere(self, name, layout, kind):
    self.check(name, layout, kind)

  def check_sketched(self, side, sketch, layout, spec):
    """Activations are on the mesh too: what is by x is placed as x is."""
    params = {'kernel': dense()[0]['kernel']}
    mesh = mesh_of('Explicit')
    put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    placed = {'kernel': put(params['kernel'], LAYOUTS[layout]['kernel'])}
    policy = bl.ChainPolicy(
        rank=2, period=2, side=side, sketch=bl.sketches.by_name(sketch)
    )
    chain = bl.adapters.make_chain(policy, optax.adam(0.1), sketched=True)
    loss = bl.inject.by_product(
        lambda p, x: (jnp.mean((jnp.sin(x) @ p['kernel']) ** 2), None)
    )
    step = jax.jit(lambda s, x: chain.step(s, loss, x)[0])
    found = []
    for weights, x in ((params, X), (placed, put(X, spec))):
      state = chain.init(KEY, weights)
      for _ in range(3):
        state = step(state, x)
      found.append(jax.device_get(chain.params(state)))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)
    self.assertEqual(state.params['kernel'].sharding, placed['kernel'].sharding)

  @parameterized.parameters(
      ('left', 'columns', P('y', None)), ('bernoulli', 'rows', P(None, None))
  )
  def test_sketched(self, side, layout, spec):
    self.check_sketched(side, 'coordinate', layout, spec)

  @parameterized.product(
      side=('left', 'right', 'bernoulli'),
      sketch=('gaussian', 'coordinate'),
      layout=tuple(LAYOUTS),
      spec=(P(None, None), P('y', None)),
  )
  @pytest.mark.slow
  def test_sketched_everywhere(self, **fields):
    self.check_sketched(**fields)

  @parameterized.parameters('rows', 'columns')
  @pytest.mark.slow
  def test_what_else_takes_weights(self, layout):
    params, loss = dense()
    mesh = mesh_of('Explicit')
    placed = {
        leaf: jax.device_put(params[leaf], jax.NamedSharding(mesh, spec))
        for leaf, spec in LAYOUTS[layout].items()
    }
    policy = bl.ChainPolicy(rank=2, period=2)
    chain = bl.adapters.make_chain(policy, optax.sgd(0.1))
    state = chain.init(KEY, placed)
    step = jax.jit(chain.step, static_argnums=1)
    adapted = bl.inject.by_product(loss)
    for _ in range(2):
      state, _ = step(state, adapted, X)
    links = [bl.recipes.trained_factors(state, chain)]
    recipe = bl.recipes.make_recipe(placed, chain, KEY, links, state)
    tuned = chain.params(state)
    replayed = bl.recipes.replay(placed, recipe)
    chex.assert_trees_all_close(
        jax.device_get(replayed), jax.device_get(tuned), rtol=1e-6, atol=1e-6
    )
    factors = bl.adapters.scaled(state.factors, chain.adapted(placed))
    back = bl.adapters.unmerge(tuned, factors)
    chex.assert_trees_all_close(
        jax.device_get(back), jax.device_get(params), rtol=1e-5, atol=1e-5
    )
    self.assertEqual(back['kernel'].sharding, placed['kernel'].sharding)
    found = bl.adapters.extract(placed, tuned, 2)['kernel']
    self.assertLess(found.error, 1e-3)
    bl.adapters.merge_report(placed, factors)
    grad_fn = jax.grad(lambda p: loss(p, X)[0])
    for tx in (bl.page(KEY, prob=0.5), bl.mvr(momentum=0.9)):

      @jax.jit
      def step(params, state, tx=tx):
        return tx.update(
            grad_fn(params),
            state,
            params,
            grad_fn=grad_fn,
            full_grad_fn=grad_fn,
        )

      estimator = tx.init(placed)
      for _ in range(2):
        out, estimator = step(placed, estimator)
      self.assertEqual(out['kernel'].sharding, placed['kernel'].sharding)

  @parameterized.product(
      sketch=('coordinate', 'gaussian'), layout=('rows', 'columns')
  )
  def test_collectives_are_thin(self, sketch, layout):
    """No collective of a weight's size in an update of a sharded matrix."""
    m, n, rank = 64, 96, 2
    mesh = mesh_of('Explicit')
    w = jax.device_put(
        jnp.ones((m, n)), jax.NamedSharding(mesh, LAYOUTS[layout]['kernel'])
    )
    tx = bl.bernoulli_lora(
        0.1, KEY, rank=rank, sketch=bl.sketches.by_name(sketch)
    )
    state = tx.init({'w': w})
    text = (
        jax.jit(lambda g, s: tx.update(g, s))
        .lower({'w': w}, state)
        .compile()
        .as_text()
    )
    names = 'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
    for line in text.splitlines():
      found = re.search(
          rf'= \(?(\w+\[[\d,]*\]).* (?:{names})(?:-start)?\(', line
      )
      if found:
        sizes = [
            int(d) for d in re.findall(r'\d+', found.group(1).split('[')[1])
        ]
        self.assertLess(int(np.prod(sizes)), m * n / 8, line[:200])
