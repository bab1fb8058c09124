"""What models of stacked layers share: remat, selection of maps, shapes of rows."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib


def rematted(layer: Any, remat: str, scan_layers: bool) -> Any:
  """Returns a layer's class, under remat 'none', 'dots' or 'full'."""
  if remat == 'none':
    return layer
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  # Outside of a scan XLA would undo it.
  return nn.remat(
      layer,
      prevent_cse=not scan_layers,
      policy=policy if remat == 'dots' else None,
  )


def matrices(scan_layers: bool, select: str) -> matrices_lib.Matrices:
  """Returns what selects linear maps, stacked below `layers` or not.

  Args:
    scan_layers: whether layers are stacked.
    select: regular expression searched in paths of kernels.
  """
  stacked = matrices_lib.stacked(r'^layers/.*kernel$')
  return matrices_lib.Matrices(
      select=rf'^(?=.*kernel$)(?=.*?(?:{select}))',
      rules=(stacked,) if scan_layers else (),
  )


def check_rows(given: Mapping[str, Any], shape: tuple[int, ...]) -> None:
  """Raises ValueError unless what is given is (b, s), as of the tokens."""
  for name, x in given.items():
    is_right = x is None or x.ndim == 2 and 0 not in x.shape
    is_right &= x is None or x.shape == shape
    expected = f'{name} of shape (b, s), as of the tokens'
    checks.that(is_right, expected, shape=getattr(x, 'shape', None))
