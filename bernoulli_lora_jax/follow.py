"""Runs a traced program with values W + L R that are not formed in some places.

Equations that meet no such value run as they are. Those that move, cut or cast one
do so to its parts; a product with it is x W + (x L) R; a program within the program
is run the same way. In front of whatever else the value is formed (`Uses.formed`),
so that the result is right whether or not an equation is known here: one that is
not, or that a later version of jax renames, costs memory.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import lowrank
from bernoulli_lora_jax import sharded
from bernoulli_lora_jax.lowrank import LowRank

# Name of a jitted function that a `jax.custom_vjp` of its own derivative, written by
# hand, consists of: adapted matrices are followed into it.
EXACT = 'derivative_by_hand'


@dataclasses.dataclass
class Uses:
  """What a program does with the leaves that are followed, by path."""

  met: set[str] = dataclasses.field(default_factory=set)
  axes: dict[str, lowrank.Axes] = dataclasses.field(default_factory=dict)
  formed: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def form(self, value: LowRank, primitive: str) -> jax.Array:
    self.met.add(value.path)
    names = self.formed.setdefault(value.path, [])
    if primitive not in names:
      names.append(primitive)
    return value.dense()

  def multiply(self, value: LowRank, p: lowrank.Product) -> None:
    """Notes a product; a probe's first one tells the axes of its leaf."""
    self.met.add(value.path)
    if value.factors or value.path in self.axes:
      return
    flat = lambda axes: sorted(i for axis in axes for i in value.labels[axis])
    left, batch = flat(p.contracted), [*value.entries, *flat(p.batch)]
    every = flat(range(len(value.labels)))
    right = [i for i in every if i not in (*left, *batch)]
    if left and right:
      self.axes[value.path] = lowrank.Axes(
          tuple(batch), tuple(left), tuple(right)
      )


def evaluate(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Any],
    uses: Uses,
) -> list[jax.Array]:
  """Evaluates a program some of whose inputs are `LowRank`.

  Equations that meet none are evaluated together, as they are.
  """
  env: dict[core.Var, Any] = {}
  bind = lambda names, given: env.update(zip(names, given, strict=True))
  bind(jaxpr.constvars, consts)
  bind(jaxpr.invars, inputs)
  read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
  waiting: list[core.JaxprEqn] = []

  def flush():
    if waiting:
      _evaluate_plainly(waiting, env)
      waiting.clear()

  low = {v for v in env if isinstance(env[v], LowRank)}
  for eqn in _live(jaxpr):
    if not any(v in low for v in eqn.invars if isinstance(v, core.Var)):
      waiting.append(eqn)
      continue
    flush()
    outputs = _follow(eqn, [read(v) for v in eqn.invars], uses)
    bind(eqn.outvars, outputs)
    low |= {v for v in eqn.outvars if isinstance(env[v], LowRank)}
  flush()
  return [
      uses.form(x, 'the result') if isinstance(x, LowRank) else x
      for x in map(read, jaxpr.outvars)
  ]


def _live(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
  """Returns the equations that results or effects depend on."""
  needed = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
  live = []
  for eqn in reversed(jaxpr.eqns):
    if eqn.effects or any(v in needed for v in eqn.outvars):
      live.append(eqn)
      needed |= {v for v in eqn.invars if isinstance(v, core.Var)}
  return live[::-1]


def _evaluate_plainly(
    eqns: Sequence[core.JaxprEqn], env: dict[core.Var, Any]
) -> None:
  """Evaluates equations on arrays."""
  made = [v for e in eqns for v in e.outvars if not isinstance(v, core.DropVar)]
  read = [v for e in eqns for v in e.invars if isinstance(v, core.Var)]
  free = [v for v in dict.fromkeys(read) if v not in set(made)]
  jaxpr = core.Jaxpr([], free, made, list(eqns))
  function = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, []))
  env.update(zip(made, function(*(env[v] for v in free)), strict=True))


def _follow(
    eqn: core.JaxprEqn, operands: Sequence[Any], uses: Uses
) -> Sequence[Any]:
  """Evaluates an equation that meets a `LowRank`: followed, or formed."""
  rule, *needed = _RULES.get(eqn.primitive.name, (None,))
  outputs = None
  if rule is not None and all(name in eqn.params for name in needed):
    outputs = rule(eqn, operands, uses)
  if outputs is None:
    outputs = _plain(eqn, _arrays(operands, eqn.primitive.name, uses))
  return outputs


def _plain(eqn: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
  """Evaluates one equation on arrays."""
  env = {
      v: x
      for v, x in zip(eqn.invars, operands, strict=True)
      if isinstance(v, core.Var)
  }
  _evaluate_plainly([eqn], env)
  return [env.get(v) for v in eqn.outvars]


# What is done to a value when an equation only moves, cuts or casts it: a rule
# (eqn, operands, uses) -> outputs, or None where W + L R is to be formed.


def _convert(eqn, operands, uses):
  del uses
  dtype = eqn.params['new_dtype']
  if not jnp.issubdtype(dtype, jnp.floating):
    return None
  (value,) = operands
  cast = dataclasses.replace(value, base=value.base.astype(dtype))
  return [cast]


def _transpose(eqn, operands, uses):
  del uses
  return [lowrank.transpose(operands[0], eqn.params['permutation'])]


def _reshape(eqn, operands, uses):
  del uses
  if eqn.params.get('sharding') is not None or len(operands) > 1:
    return None
  value = lowrank.reshape(operands[0], eqn.outvars[0].aval.shape)
  return None if value is None else [value]


def _broadcast(eqn, operands, uses):
  """New axes of length one: a reshape."""
  value, shape = operands[0], eqn.params['shape']
  places = eqn.params['broadcast_dimensions']
  is_reshape = tuple(shape[i] for i in places) == value.base.shape
  is_reshape &= all(n == 1 for i, n in enumerate(shape) if i not in places)
  return _reshape(eqn, operands, uses) if is_reshape else None


def _squeeze(eqn, operands, uses):
  del uses
  return [lowrank.squeeze(operands[0], eqn.params['dimensions'])]


def _slice(eqn, operands, uses):
  del uses
  p = eqn.params
  strides = p['strides'] or (1,) * len(p['start_indices'])
  bounds = list(
      zip(p['start_indices'], p['limit_indices'], strides, strict=True)
  )
  return [lowrank.cut(operands[0], [slice(*b) for b in bounds])]


def _split(eqn, operands, uses):
  del uses
  (value,), axis = operands, eqn.params['axis']
  ends = np.cumsum([0, *eqn.params['sizes']]).tolist()
  whole = [slice(None)] * len(value.labels)
  return [
      lowrank.cut(value, [*whole[:axis], slice(a, b), *whole[axis + 1 :]])
      for a, b in zip(ends, ends[1:], strict=False)
  ]


def _dynamic_slice(eqn, operands, uses):
  del uses
  value, *starts = operands
  if not isinstance(value, LowRank) or len(starts) != len(value.labels):
    return None
  sizes = eqn.params['slice_sizes']
  whole = value.base.shape
  value = value.framed([i for i, size in enumerate(sizes) if size < whole[i]])

  def change(array, own):
    rank = array.shape[len(own) :]
    zero = jnp.zeros((), starts[0].dtype)
    start = [starts[i] for i in own] + [zero] * len(rank)
    return jax.lax.dynamic_slice(
        array, start, [*(sizes[i] for i in own), *rank]
    )

  return [value.map(change, value.labels)]


def _dot_general(eqn, operands, uses):
  """x W + (x L) R."""
  first, second = operands
  if isinstance(first, LowRank) and isinstance(second, LowRank):
    first = uses.form(first, 'a product with another adapted matrix')
  is_left = isinstance(first, LowRank)
  value, other = (first, second) if is_left else (second, first)
  contracted, batch = eqn.params['dimension_numbers']
  ours, theirs = (0, 1) if is_left else (1, 0)

  def plain(base, other):
    return _plain(eqn, (base, other) if is_left else (other, base))[0]

  p = lowrank.Product(
      is_left,
      contracted[ours],
      batch[ours],
      contracted[theirs],
      batch[theirs],
      eqn.params['precision'],
      eqn.outvars[0].aval.dtype,
      None,
  )
  if value.trained:
    product = lowrank.sketched_product(value, other, p, plain)
    if product is not None:
      uses.multiply(value, p)
    return None if product is None else [product]
  if value.factors:
    product = lowrank.adapted_product(value, other, p, plain)
    if product is not None:
      uses.multiply(value, p)
      return [product]
  product = plain(value.base, other)
  p = p._replace(out_sharding=sharded.explicit(product))
  change = lowrank.product(value, other, p) if value.factors else None
  if value.factors and change is None:
    return None
  uses.multiply(value, p)
  return [product if change is None else product + change]


def _run(program: Any, operands: Sequence[Any], uses: Uses) -> list[jax.Array]:
  """Runs a program within the program, closed or not."""
  jaxpr = getattr(program, 'jaxpr', program)
  return evaluate(jaxpr, getattr(program, 'consts', ()), operands, uses)


def _call(eqn, operands, uses):
  return _run(eqn.params['jaxpr'], operands, uses)


def _custom_vjp(eqn, operands, uses):
  """Runs a function whose own derivative is its derivative, see `EXACT`."""
  program = eqn.params['call_jaxpr']
  eqns = getattr(program, 'jaxpr', program).eqns
  is_exact = [e.params.get('name') for e in eqns] == [EXACT]
  # A probe does not enter: a head is adapted where it is named, not with the layers.
  is_probe = any(isinstance(x, LowRank) and not x.factors for x in operands)
  return _run(program, operands, uses) if is_exact and not is_probe else None


def _remat(eqn, operands, uses):
  p = eqn.params
  run = lambda *operands: _run(p['jaxpr'], operands, uses)
  policy = p['policy']
  if any(isinstance(x, LowRank) and x.trained for x in operands):
    # What a sketched product keeps is thin.
    thin = jax.checkpoint_policies.save_only_these_names(lowrank.SKETCH)
    both = jax.checkpoint_policies.save_from_both_policies
    policy = thin if policy is None else both(policy, thin)
  return jax.checkpoint(run, prevent_cse=p['prevent_cse'], policy=policy)(
      *operands
  )


def _scan(eqn, operands, uses):
  p, inner = eqn.params, eqn.params['jaxpr']
  jaxpr = getattr(inner, 'jaxpr', inner)
  # What is scanned over or stacked has one axis less within.
  is_sliced = lambda pair: pair[0].aval.ndim > pair[1].aval.ndim
  count = lambda *ends: sum(map(is_sliced, zip(*ends, strict=True)))
  num_carry = len(eqn.outvars) - count(eqn.outvars, jaxpr.outvars)
  end = len(operands) - count(eqn.invars, jaxpr.invars)
  consts, xs = operands[: end - num_carry], operands[end:]
  carry = operands[end - num_carry : end]
  carry = _arrays(carry, 'the carry of a scan', uses)
  sliced = [
      lowrank.slices(x) if isinstance(x, LowRank) else ([x], lambda y: y[0])
      for x in xs
  ]

  def body(carry, xs):
    values = [inside(x) for (_, inside), x in zip(sliced, xs, strict=True)]
    out = _run(inner, [*consts, *carry, *values], uses)
    return out[: len(carry)], out[len(carry) :]

  carry, ys = jax.lax.scan(
      body,
      carry,
      [arrays for arrays, _ in sliced],
      length=p['length'],
      reverse=p['reverse'],
      unroll=p['unroll'],
  )
  return [*carry, *ys]


def _cond(eqn, operands, uses):
  index, *rest = operands
  branches = [
      lambda *rest, inner=inner: _run(inner, rest, uses)
      for inner in eqn.params['branches']
  ]
  return jax.lax.switch(index, branches, *rest)


def _while(eqn, operands, uses):
  p = eqn.params
  ends = (p['cond_nconsts'], p['cond_nconsts'] + p['body_nconsts'])
  tests, consts = operands[: ends[0]], operands[ends[0] : ends[1]]
  return jax.lax.while_loop(
      lambda carry: _run(p['cond_jaxpr'], [*tests, *carry], uses)[0],
      lambda carry: _run(p['body_jaxpr'], [*consts, *carry], uses),
      _arrays(operands[ends[1] :], 'the carry of a while loop', uses),
  )


# By primitive, with the parameters that it must have: of one that is not here, or
# has others in a later version of jax, the operand is formed.
_REMAT = (_remat, 'jaxpr', 'prevent_cse', 'policy')
_RULES: dict[str, Any] = {
    'broadcast_in_dim': (_broadcast, 'shape', 'broadcast_dimensions'),
    'checkpoint': _REMAT,
    'cond': (_cond, 'branches'),
    'convert_element_type': (_convert, 'new_dtype'),
    'custom_vjp_call': (_custom_vjp, 'call_jaxpr'),
    'custom_vjp_call_jaxpr': (_custom_vjp, 'call_jaxpr'),
    'dot_general': (_dot_general, 'dimension_numbers', 'precision'),
    'dynamic_slice': (_dynamic_slice, 'slice_sizes'),
    'jit': (_call, 'jaxpr'),
    'pjit': (_call, 'jaxpr'),
    'remat': _REMAT,
    'remat2': _REMAT,
    'reshape': (_reshape,),
    'scan': (_scan, 'jaxpr', 'length', 'reverse', 'unroll'),
    'slice': (_slice, 'start_indices', 'limit_indices', 'strides'),
    'split': (_split, 'axis', 'sizes'),
    'squeeze': (_squeeze, 'dimensions'),
    'transpose': (_transpose, 'permutation'),
    'while': (
        _while,
        'cond_jaxpr',
        'body_jaxpr',
        'cond_nconsts',
        'body_nconsts',
    ),
}


def _arrays(values: Sequence[Any], what: str, uses: Uses) -> list[jax.Array]:
  return [uses.form(x, what) if isinstance(x, LowRank) else x for x in values]
