"""Experiments that check the theory, each with its tables and figures."""

from bernoulli_lora_jax import deprecated

__getattr__ = deprecated.modules(__name__, {'audit': 'audit_run'})
