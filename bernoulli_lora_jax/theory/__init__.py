"""Guarantees as numbers: what is proved, and whether a run keeps to it."""

from bernoulli_lora_jax import deprecated
from bernoulli_lora_jax.theory import bounds
from bernoulli_lora_jax.theory import estimates
from bernoulli_lora_jax.theory import exponents
from bernoulli_lora_jax.theory import expressive
from bernoulli_lora_jax.theory import generalization
from bernoulli_lora_jax.theory import lanczos
from bernoulli_lora_jax.theory import lora
from bernoulli_lora_jax.theory import ntk
from bernoulli_lora_jax.theory import nuclear
from bernoulli_lora_jax.theory import problems
from bernoulli_lora_jax.theory import recommendation

__getattr__ = deprecated.modules(__name__, {'audit': 'estimates'})
