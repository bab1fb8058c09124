"""A multilayer perceptron whose dropout is keyed by example.

Noise keyed by the global example index is the same however the batch is split
over devices, gathered from micro-batches or evaluated again at other params.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp


def example_dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
  """Zeroes features with probability `rate`, rescaling the others.

  Args:
    x: (b, features).
    rate: in [0, 1).
    keys: (b,) typed PRNG keys, one an example.

  Returns:
    (b, features), equal to x in the mean.
  """
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))
  return jnp.where(keep(keys), x / (1 - rate), jnp.zeros((), x.dtype))


class MLP(nn.Module):
  """Dense layers with ReLU and dropout between them."""

  features: tuple[int, ...]  # Widths of the layers, the last one the outputs.
  dropout: float = 0.0  # Rate after each hidden layer.

  @nn.compact
  def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """Returns the outputs; without `keys` (b,) nothing is dropped."""
    for i, width in enumerate(self.features[:-1]):
      x = nn.relu(nn.Dense(width)(x))
      if keys is not None and self.dropout > 0:
        layer_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        x = example_dropout(x, self.dropout, layer_keys)
    return nn.Dense(self.features[-1])(x)
