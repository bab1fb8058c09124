"""Weights on several devices by rules: where they lie, and that they compute."""

import functools
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import chex
import decoders
import jax
import jax.numpy as jnp
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import sharding_rules
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import hf

P = jax.sharding.PartitionSpec
AUTO = jax.sharding.AxisType.Auto


def mesh_of(**sizes):
  return jax.make_mesh(
      tuple(sizes.values()), tuple(sizes), axis_types=(AUTO,) * len(sizes)
  )


class RulesTest(parameterized.TestCase):

  def test_the_first_rule_holds_for_the_last_axes(self):
    mesh = mesh_of(data=2, fsdp=4)
    rules = (
        ('o_proj', P(None, 'fsdp')),
        ('kernel$', P('fsdp', None)),
        ('embedding$', P(('data', 'fsdp'), None)),
    )
    tree = {
        'layers': {
            'o_proj': {'kernel': jnp.ones((3, 4, 8))},
            'q_proj': {'kernel': jnp.ones((3, 4, 6)), 'bias': jnp.ones((3, 6))},
        },
        'lm_head': {'kernel': jnp.ones((8, 5))},
        'embed': {'embedding': jnp.ones((16, 3))},
    }
    placed = sharding_rules.shardings(tree, mesh, rules)
    specs = jax.tree.map(lambda x: x.spec, placed)
    self.assertEqual(specs['layers']['o_proj']['kernel'], P(None, None, 'fsdp'))
    self.assertEqual(specs['layers']['q_proj']['kernel'], P(None, 'fsdp', None))
    self.assertEqual(specs['layers']['q_proj']['bias'], P(None, None))
    self.assertEqual(specs['lm_head']['kernel'], P('fsdp', None))
    self.assertEqual(specs['embed']['embedding'], P(('data', 'fsdp'), None))

  @parameterized.parameters(
      ((('(', P()),), 'regular expression'),
      ((('kernel', P('model')),), "got 'model'"),
      ((('kernel', P(None, 'fsdp')),), '4 devices to divide'),
      ((('kernel', P(None, None, None)),), 'at most 2 axes'),
      ((('weight', P('fsdp')),), "matches 'weight'"),
      ((('kernel', 'fsdp'),), 'rules .pattern, PartitionSpec.'),
      ({'kernel': P('fsdp')}, 'rules .pattern, PartitionSpec.'),
      ((('kernel', P(3)),), 'got 3'),
  )
  def test_rejects(self, rules, message):
    tree = {'kernel': jnp.ones((8, 6))}
    with self.assertRaisesRegex(ValueError, message):
      sharding_rules.shardings(tree, mesh_of(data=2, fsdp=4), rules)


@functools.cache
def steps(kind):
  """Returns losses and weights of five steps of a chain of two links."""
  placing, mesh = None, None
  if kind != 'one device':
    sizes = dict(data=8) if kind == 'data' else dict(data=2, fsdp=4)
    mesh = mesh_of(**sizes)
    rules = () if kind == 'data' else sharding_rules.FSDP
    placing = sharding_rules.placer(mesh, rules)
  with tempfile.TemporaryDirectory() as scratch:
    folder = decoders.write(pathlib.Path(scratch), 'llama3')
    model = hf.load(folder, sharding=placing, remat='full')
  policy = bl.ChainPolicy(rank=3, side='bernoulli', prob=0.5, period=3)
  found = decoder.matrices(model.config)
  chain = bl.adapters.make_chain(policy, optax.sgd(0.3), found)
  loss = inject.by_product(decoder.make_loss(model.config, chunk=64))
  step = jax.jit(lambda s, b: chain.step(s, loss, b), donate_argnums=0)
  state = chain.init(jax.random.key(0), model.params)
  values = []
  for i in range(5):
    batch = {'tokens': jnp.asarray(decoders.tokens(16, rows=8, seed=i))}
    if mesh is not None:
      rows = P(tuple(mesh.axis_names))
      batch = jax.device_put(batch, jax.sharding.NamedSharding(mesh, rows))
    state, (value, _) = step(state, batch)
    values.append(float(value))
  return values, chain.params(state)


class DecoderTest(parameterized.TestCase):
  """One device and eight agree to rounding."""

  def test_agrees(self):
    self.check_agrees('fsdp')

  @pytest.mark.slow
  def test_agrees_by_data_alone(self):
    self.check_agrees('data')

  def check_agrees(self, kind):
    values, params = steps('one device')
    ours, placed = steps(kind)
    chex.assert_trees_all_close(ours, values, rtol=2e-5)
    chex.assert_trees_all_close(
        jax.device_get(placed), jax.device_get(params), atol=2e-5
    )
    self.assertGreater(abs(values[0] - values[-1]), 1e-2)
    kernel = placed['layers']['mlp']['up_proj']['kernel']
    shard = kernel.addressable_shards[0].data.shape
    self.assertEqual(shard, (3, 8, 48) if kind == 'fsdp' else (3, 32, 48))


if __name__ == '__main__':
  absltest.main()
