"""What travels and what is stored comes back by path, in its kind and shape."""

from typing import Any, NamedTuple

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import wire


class State(NamedTuple):
  """A state of all kinds of leaves."""

  round: int
  seconds: float
  tickets: np.ndarray
  key: jax.Array
  params: Any


def make_state():
  params = {'b': jnp.arange(6.0).reshape(2, 3), 'a': None}
  key = jax.random.key(1)
  return State(7, 0.5, np.asarray([3, 2**60]), key, params)


class StateTest(parameterized.TestCase):

  @parameterized.parameters('by path', 'by place', 'in one dimension')
  def test_a_state_comes_back(self, kind):
    state = make_state()
    arrays = wire.flatten(state)
    self.assertEqual([*arrays], ['round', 'seconds', 'tickets', 'key', 'b'])
    if kind == 'by place':  # As it was stored before it had paths.
      arrays = {str(i): x for i, x in enumerate(arrays.values())}
    elif kind == 'in one dimension':
      arrays['b'] = arrays['b'].reshape(-1)
    found = wire.unflatten(arrays, state)
    for one, other in zip(found, state, strict=True):
      self.assertIs(type(one), type(other))
    data = jax.random.key_data
    chex.assert_trees_all_equal(
        found._replace(key=data(found.key)), state._replace(key=data(state.key))
    )

  @parameterized.parameters(
      (lambda x: x.pop('b'), r"Expected \['b', .*got \['key'"),
      (lambda x: x.update(c=np.ones(1)), "'c'"),
      (lambda x: x.update(b=np.ones((3, 2))), r'b of \(2, 3\), got \(3, 2\)'),
  )
  def test_another_tree_is_refused(self, change, message):
    arrays = wire.flatten(make_state())
    change(arrays)
    with self.assertRaisesRegex(ValueError, message):
      wire.unflatten(arrays, make_state())


class FactorsTest(parameterized.TestCase):

  def test_what_is_packed_comes_back_and_the_rest_stays(self):
    pair = {
        'left': jnp.arange(12.0).reshape(2, 3, 2),
        'right': jnp.ones((2, 2)),
    }
    left, right = (1, slice(None), slice(0, 1)), (0,)
    places = [('left', left), ('right', right)]
    array = wire.packed(pair, places)
    np.testing.assert_array_equal(array, [6, 8, 10, 1, 1])
    found = wire.unpacked(2 * array, pair, places)
    np.testing.assert_array_equal(found['left'][left].ravel(), [12, 16, 20])
    np.testing.assert_array_equal(found['left'][0], pair['left'][0])
    np.testing.assert_array_equal(found['right'], [[2, 2], [1, 1]])
