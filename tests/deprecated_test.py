"""Old names work, and say what the new ones are."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import chain
from bernoulli_lora_jax import matrices
from bernoulli_lora_jax import studies
from bernoulli_lora_jax import theory
from bernoulli_lora_jax.tasks import partition

_PARAMS = {'a': {'kernel': jnp.zeros((4, 3))}}
_POLICY = bl.ChainPolicy.bernoulli(rank=1, period=2)
_MAPPED = bl.devices.Mapped('data')
_TX = optax.sgd(0.1)


def _over_two(function):
  """Returns what a function makes of the halves of [0, 1] on two devices."""
  halves = jnp.arange(2.0)[:, None]
  return jax.vmap(function, axis_name='data')(halves).tolist()


def _same(params, batch):
  del params
  return batch


@pytest.mark.parametrize(
    'old, new, name',
    [
        (
            lambda: chain.describe(_PARAMS, rank=1, prob=0.5),
            lambda: chain.selection_table(_PARAMS, rank=1, prob=0.5),
            'chain.selection_table',
        ),
        (
            lambda: bl.adapters.describe(_PARAMS, _POLICY),
            lambda: bl.adapters.adapter_table(_PARAMS, _POLICY),
            'adapters.adapter_table',
        ),
        (
            lambda: partition.describe([[0], [1, 2]]),
            lambda: partition.client_table([[0], [1, 2]]),
            'partition.client_table',
        ),
        (
            lambda: matrices.find(_PARAMS)[0].words,
            lambda: matrices.find(_PARAMS)[0].path_hash,
            'Matrix.path_hash',
        ),
        (
            lambda: bl.adapters.make_chain(
                _POLICY, _TX, average='data'
            ).average,
            lambda: _MAPPED,
            'average=devices.Mapped(name)',
        ),
        (
            lambda: _over_two(
                lambda x: bl.accumulate(_same, 1, None, 'data')(0, x)
            ),
            lambda: _over_two(
                lambda x: bl.accumulate(_same, 1, average=_MAPPED)(0, x)
            ),
            'average=devices.Mapped(name)',
        ),
        (
            lambda: _over_two(lambda x: bl.parts.over_devices(x, 'data')),
            lambda: _over_two(lambda x: bl.parts.over_devices(x, _MAPPED)),
            'over_devices(tree, devices.Mapped(name))',
        ),
        (lambda: theory.audit, lambda: theory.estimates, 'theory.estimates'),
        (
            lambda: studies.audit.measured,
            lambda: studies.audit_run.measured,
            'studies.audit_run',
        ),
    ],
)
def test_old_name(old, new, name):
  with pytest.warns(DeprecationWarning, match=rf'is .*{re.escape(name)} now'):
    value = old()
  assert value == new()


def test_other_names_are_unknown():
  with pytest.raises(AttributeError, match="no attribute 'audits'"):
    _ = theory.audits
