"""Tests of what a merge does: trees of any container, factors by path."""

import collections

from absl.testing import parameterized
import chex
import flax
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import matrices
from bernoulli_lora_jax import merging

CONTAINERS = (
    ('ordered', lambda tree: collections.OrderedDict(reversed(tree.items()))),
    ('frozen', flax.core.freeze),
    ('collection', lambda tree: {'params': tree}),
    ('nnx', lambda tree: nnx.State(jax.tree.map(nnx.Param, tree))),
)


def base(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
  return {name: draw().astype(dtype) for name in 'bac'}


class PairsTest(parameterized.TestCase):

  @parameterized.named_parameters(*CONTAINERS)
  def test_extract_pairs_by_path(self, wrap):
    old = base()
    new = {name: leaf + i for i, (name, leaf) in enumerate(old.items())}
    for first, second in ((old, wrap(new)), (wrap(old), new)):
      found = merging.extract(first, second, 4)
      self.assertEqual(set(found), set('abc'))
      for path, one in found.items():
        change = np.asarray(new[path] - old[path])
        # An SVD in float32 of entries up to 3.
        np.testing.assert_allclose(one.left @ one.right, change, atol=1e-5)

  @parameterized.named_parameters(*CONTAINERS)
  def test_the_structure_and_the_values_of_unmerge(self, wrap):
    tree = base()
    ones = {'left': jnp.ones((4, 1)), 'right': jnp.ones((1, 4))}
    back = merging.unmerge(wrap(tree), {'a': ones})
    self.assertEqual(jax.tree.structure(back), jax.tree.structure(wrap(tree)))
    expected = {**tree, 'a': tree['a'] - 1}
    chex.assert_trees_all_equal(matrices.named_leaves(back), expected)

  @parameterized.parameters(merging.unmerge, merging.merge_report)
  def test_factors_that_belong_to_nothing(self, function):
    ones = {'left': jnp.ones((4, 1)), 'right': jnp.ones((1, 4))}
    with self.assertRaisesRegex(ValueError, r"of d to belong.*\['a', 'b', 'c'"):
      function(base(), {'a': ones, 'd': ones})
    with self.assertRaisesRegex(ValueError, r'for a, got \(\(4, 1\), \(4, 1\)'):
      function(base(), {'a': {'left': ones['left'], 'right': ones['left']}})

  def test_eight_bits(self):
    tree = base(jnp.float8_e4m3fn)
    ones = {'left': jnp.ones((4, 1)), 'right': jnp.ones((1, 4))}
    back = merging.unmerge(tree, {'a': ones})
    expected = (tree['a'].astype(jnp.float32) - 1).astype(tree['a'].dtype)
    np.testing.assert_array_equal(
        *(np.asarray(x, np.float32) for x in (back['a'], expected))
    )
    found = merging.extract(tree, back, 4)
    change = np.asarray(back['a'], np.float32) - np.asarray(
        tree['a'], np.float32
    )
    one = found['a']
    np.testing.assert_allclose(one.left @ one.right, change, atol=1e-5)
    merging.merge_report(tree, {'a': ones})

  def test_recipes_know_a_tree_by_its_paths(self):
    for _, wrap in CONTAINERS:
      self.assertEqual(
          bl.recipes.checksum(wrap(base())), bl.recipes.checksum(base())
      )
