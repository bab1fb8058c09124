"""Tests of what owns a buffer, and of leaves trained beside adapters."""

import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import averaging

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
POLICIES = {
    'lora': bl.ChainPolicy.lora(2),
    'cola': bl.ChainPolicy.cola(2, 2),
    'asymmetric': bl.ChainPolicy.asymmetric(2, 'left'),
}


def params():
  draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  return {
      'w': draw(0, 4, 6),
      'rest': {'bias': draw(1, 6), 'list': [draw(2, 6), (jnp.zeros([0]), 3)]},
  }


def loss(params, x, *_):
  out = x @ params['w'] + params['rest']['bias'][None, :]
  return jnp.mean((out * params['rest']['list'][0][None, :] - 1) ** 2), None


def donate(state):
  """Deletes the buffers of a state as a step that is given it does."""
  for leaf in jax.tree.leaves(state):
    leaf.delete()


def calls(kind, policy):
  """Returns {name: (state) -> result} of all that returns arrays, and a state."""
  adapted = bl.inject.by_addition(loss)
  if kind == 'chain':
    chain = bl.adapters.make_chain(
        policy, optax.sgd(0.1), others={'bias': optax.adam(0.1)}
    )
    return chain.init(KEY, params()), {
        'begin': functools.partial(bl.adapters.begin_link, chain),
        'move': lambda state: bl.adapters.move_factors(
            chain, state, adapted, X
        ),
        'step': lambda state: chain.step(state, adapted, X),
        'params': chain.params,
        'merge': chain.merge,
    }
  if kind == 'adapters':
    rounds = bl.federated_adapters(
        policy, optax.sgd(0.1), num_clients=2, num_local_steps=2
    )
    local_loss = adapted
  else:
    trained = lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 0, p)
    rounds = bl.federated_weights(
        optax.sgd(0.1), num_clients=2, num_local_steps=2, trained=trained
    )
    local_loss = loss
  return rounds.init(KEY, params()), {
      'begin': rounds.begin,
      'local': lambda state: rounds.local(state, local_loss, X, KEY),
      'finish': lambda state: rounds.finish(state, rounds.trained(state)),
      'params': rounds.params,
      'trained': rounds.trained,
      'catch_up': lambda state: averaging.catch_up(rounds, state, []),
  }


class OwnershipTest(parameterized.TestCase):

  @parameterized.product(
      kind=('chain', 'adapters', 'weights'),
      name=(*POLICIES,),
      jit=(False, True),
  )
  def test_a_donated_state_deletes_nothing_that_was_returned(
      self, kind, name, jit
  ):
    if (kind == 'weights' and name != 'lora') or (not jit and name == 'cola'):
      self.skipTest('The same functions.')
    state, functions = calls(kind, POLICIES[name])
    copies = {}
    if jit:
      copies = jax.jit(lambda s: {n: f(s) for n, f in functions.items()})(state)
    else:
      copies = {n: f(state) for n, f in functions.items()}
    donate(state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(copies):
      self.assertFalse(leaf.is_deleted(), jax.tree_util.keystr(path))

  def test_init_copies_or_takes_over(self):
    chain = bl.adapters.make_chain(bl.ChainPolicy.lora(2), optax.sgd(0.1))
    rounds = bl.federated_weights(
        optax.sgd(0.1), num_clients=1, num_local_steps=1
    )
    for init in (chain.init, rounds.init):
      for copy in (True, False):
        given, key = params(), jax.random.key(1)
        donate(init(key, given, copy=copy))
        self.assertFalse(key.is_deleted())
        self.assertEqual(given['w'].is_deleted(), not copy)

  @parameterized.parameters('same', 'numpy', 'view')
  def test_tied_weights_are_refused_under_jit_too(self, kind):
    w = params()['w']
    tied = {
        'same': {'a': w, 'b': w},
        'numpy': {'a': np.asarray(w), 'b': np.asarray(w)},
        'view': {'a': np.asarray(w), 'b': np.asarray(w).T},
    }[kind]
    chain = bl.adapters.make_chain(bl.ChainPolicy.lora(2), optax.sgd(0.1))
    for init in (
        chain.init,
        jax.jit(chain.init),
        jax.jit(lambda key, params: {'state': chain.init(key, params)}),
    ):
      with self.assertRaisesRegex(ValueError, 'a to be .* tied to b'):
        init(KEY, tied)
    jax.jit(chain.init)(KEY, {'a': w, 'b': w + 0})


class MergeTest(parameterized.TestCase):

  @parameterized.product(zero=('left', 'right'), period=(None, 5))
  def test_a_merge_in_mid_link_starts_as_a_link(self, zero, period):
    policy = bl.ChainPolicy(
        rank=2,
        period=period,
        side=None,
        zero=zero,
        sketch=bl.sketches.coordinate(),
    )
    chain = bl.adapters.make_chain(policy, optax.adam(0.1))
    adapted = bl.inject.by_addition(loss)
    step = jax.jit(chain.step, static_argnums=1)
    state = chain.init(KEY, params())
    for _ in range(2):
      state, _ = step(state, adapted, X)
    merged = chain.merge(state)
    self.assertEqual(optax.tree.get(merged.opt_state, 'count'), 0)
    self.assertEqual(merged.count, 2)
    pair = merged.factors['w']
    np.testing.assert_array_equal(pair[zero], 0)
    after, _ = step(merged, adapted, X)
    # Adam's first step is the learning rate in every entry of a gradient.
    np.testing.assert_allclose(np.abs(after.factors['w'][zero]), 0.1, rtol=1e-3)

  @parameterized.product(
      dtype=(jnp.float8_e4m3fn, jnp.float8_e5m2),
      rounding=bl.rounding.MODES,
      side=('bernoulli', None),
  )
  def test_float8(self, dtype, rounding, side):
    policy = bl.ChainPolicy(
        rank=2,
        period=2,
        side=side,
        rounding=rounding,
        sketch=bl.sketches.coordinate(),
    )
    chain = bl.adapters.make_chain(policy, optax.sgd(0.1))
    base = {'w': params()['w'].astype(dtype)}
    shapes = jax.eval_shape(lambda: chain.params(chain.init(KEY, base)))
    self.assertEqual(shapes['w'].dtype, dtype)


class OthersTest(parameterized.TestCase):

  @parameterized.parameters(1, 4)
  def test_equals_plain_training_of_the_leaves(self, num):
    # Frozen factors: what remains is plain training of the rest.
    chain = bl.adapters.make_chain(
        bl.ChainPolicy.cola(2, 2),
        optax.set_to_zero(),
        num_micro_batches=num,
        others={
            'bias': optax.adam(0.1),
            'list/0': optax.chain(
                optax.clip_by_global_norm(0.1), optax.sgd(1.0)
            ),
        },
    )
    state = chain.init(KEY, params())
    step = jax.jit(chain.step, static_argnums=1, donate_argnums=0)
    adapted = bl.inject.by_addition(loss)
    expected = params()
    names = ('bias', 'scale')
    rest = {
        'bias': expected['rest']['bias'],
        'scale': expected['rest']['list'][0],
    }
    txs = dict(zip(names, chain.others.values(), strict=True))
    states = {n: txs[n].init(rest[n]) for n in names}

    def value(rest):
      inner = {'bias': rest['bias'], 'list': [rest['scale']]}
      return loss({'w': expected['w'], 'rest': inner}, X)[0]

    for _ in range(5):
      state, _ = step(state, adapted, X, scale=0.5)
      grads = jax.grad(value)(rest)
      for n in names:
        updates, states[n] = txs[n].update(grads[n], states[n], rest[n])
        rest[n] = rest[n] + 0.5 * updates
    found = chain.params(state)
    # Five steps in float32, summed in other orders.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(found['rest']['bias'], rest['bias'])
    close(found['rest']['list'][0], rest['scale'])
    chex.assert_trees_all_equal(found['w'], expected['w'])
    self.assertEqual(optax.tree.get(state.other_states['bias'], 'count'), 5)

  def test_describe(self):
    rows = bl.adapters.adapter_table(
        params(), bl.ChainPolicy.lora(2), others=['bias', 'list/0']
    )
    self.assertEqual(
        [r['matrix'] for r in rows], ['w', 'rest/bias', 'rest/list/0']
    )
    self.assertEqual([r['trained'] for r in rows], [20, 6, 6])

  @parameterized.parameters(
      (('nothing',), "'nothing' of others to match a leaf"),
      (('^w$',), "what is not adapted, got '\\^w\\$'"),
      (('bias', 'rest/b'), "one pattern of others for rest/bias, got 'bias'"),
      (('list/1/1',), 'floating point'),
      (('(',), 'regular expression'),
  )
  def test_patterns_that_are_refused(self, patterns, message):
    others = {pattern: optax.sgd(0.1) for pattern in patterns}
    with self.assertRaisesRegex(ValueError, message):
      chain = bl.adapters.make_chain(
          bl.ChainPolicy.lora(2), optax.sgd(0.1), others=others
      )
      chain.init(KEY, params())

  def test_recipes_refuse_others(self):
    chain = bl.adapters.make_chain(
        bl.ChainPolicy.cola(2, 2),
        optax.sgd(0.1),
        others={'bias': optax.sgd(0.1)},
    )
    state = chain.init(KEY, params())
    with self.assertRaisesRegex(ValueError, r"others=\['bias'\]"):
      bl.recipes.trained_factors(state, chain)
    with self.assertRaisesRegex(ValueError, r"others=\['bias'\]"):
      bl.recipes.make_recipe(params(), chain, KEY, [], state)
