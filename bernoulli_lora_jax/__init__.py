"""Low-rank adaptation that provably converges, in JAX.

The public surface; see the README for what each name is for.
"""

import importlib as _importlib
import types as _types

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import compressors
from bernoulli_lora_jax import devices
from bernoulli_lora_jax import federated
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import matrices
from bernoulli_lora_jax import merging
from bernoulli_lora_jax import parts
from bernoulli_lora_jax import policies
from bernoulli_lora_jax import recipes
from bernoulli_lora_jax import rounding
from bernoulli_lora_jax import sketches
from bernoulli_lora_jax import stepsizes
from bernoulli_lora_jax.adapters import ChainPolicy
from bernoulli_lora_jax.adapters import Target
from bernoulli_lora_jax.averaging import federated_adapters
from bernoulli_lora_jax.averaging import federated_weights
from bernoulli_lora_jax.chain import bernoulli_lora
from bernoulli_lora_jax.chain import project
from bernoulli_lora_jax.chain import rac_lora
from bernoulli_lora_jax.chain import scale_by_bernoulli_chain
from bernoulli_lora_jax.chain import ScaleByBernoulliChainState
from bernoulli_lora_jax.chain import trained_parameters
from bernoulli_lora_jax.column_moments import column_adam
from bernoulli_lora_jax.column_moments import scale_by_column_moments
from bernoulli_lora_jax.column_moments import ScaleByColumnMomentsState
from bernoulli_lora_jax.estimators import mvr
from bernoulli_lora_jax.estimators import MvrState
from bernoulli_lora_jax.estimators import page
from bernoulli_lora_jax.estimators import PageState
from bernoulli_lora_jax.federated import ef21
from bernoulli_lora_jax.federated import Ef21State
from bernoulli_lora_jax.federated import marina
from bernoulli_lora_jax.federated import MarinaState
from bernoulli_lora_jax.federated import qgd
from bernoulli_lora_jax.federated import QgdState
from bernoulli_lora_jax.matrices import Matrices
from bernoulli_lora_jax.matrices import Rule
from bernoulli_lora_jax.parts import accumulate
from bernoulli_lora_jax.parts import Weighted
from bernoulli_lora_jax.sketches import Sketch

__version__ = '0.1.0'


def __getattr__(name: str) -> _types.ModuleType:
  if (
      name == 'theory'
  ):  # When asked for: its SciPy doubles the time of an import.
    return _importlib.import_module(f'{__name__}.theory')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
