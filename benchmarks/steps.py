"""Rows of `llm_step` in JAX: a step alone, its batch on the device."""

import functools
import itertools
import time
from typing import Any

import decoders
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import measuring
import optax
import profiling

import bernoulli_lora_jax as bl
from bernoulli_lora_jax.models import decoder

# What may stand behind a method, in any order.
_SKETCHES = ('gaussian', 'rademacher', 'coordinate', 'srht')
_ROUNDINGS = ('nearest', 'stochastic', 'compensated')
_ENDS = {*_SKETCHES, *_ROUNDINGS, 'shared', 'grouped', 'unpacked', 'memory'}


def measure(name: str, setting: measuring.Setting) -> measuring.Row:
  """Measures bare_*, sketched_*, plain_lora, floor_dx or matmul."""
  room, *words = name.split('_')
  if room == 'matmul':
    return matmul()
  method = '_'.join(x for x in words if x not in _ENDS)
  ends = _ENDS.intersection(words)
  is_lean = 'memory' in ends
  config, params = decoders.drawn(
      setting.raw,
      scan_layers=is_lean,
      remat='full' if is_lean else 'none',
      max_segments=4,
  )
  start = {'floor': floor, 'plain': plain}.get(
      room, functools.partial(chain, is_sketched=room == 'sketched', ends=ends)
  )
  state, steps, thin, *link = start(setting, method, config, params)
  del params
  batch = batch_of(setting, config.vocab_size, 'unpacked' not in ends)
  begin = time.perf_counter()
  programs = {
      side: step.lower(state, batch).compile() for side, step in steps.items()
  }
  compiling = time.perf_counter() - begin
  end, sides = (link[0].lower(state).compile(), link[1]) if link else (None, [])
  carry: list[Any] = [state, None]
  count = itertools.count()
  del state

  def once():
    link, within = divmod(next(count), setting.period)
    if end and link and not within:
      carry[0] = end(carry[0])
    side = sides[link % len(sides)] if sides else None
    carry[:] = programs[side](carry[0], batch)

  if len(programs) > 1:  # Kernels are loaded and recorded by the first run.
    for program in programs.values():
      carry[:] = program(carry[0], batch)
    carry[0] = carry[0]._replace(count=jnp.zeros((), jnp.int32))
  wait = lambda: jax.block_until_ready(carry)
  found = measuring.timed(setting, once, wait)
  found['compile_seconds'] = compiling
  if setting.trace:
    found['kernels_ms'] = profiling.profile(
        once, wait, setting, next(iter(programs.values())).as_text()
    )
  return {
      **measuring.speed(found, measuring.flops(setting, thin)),
      'peak_gib': decoders.peak(),
      'loss': float(carry[1][0]),
      'device': jax.devices()[0].device_kind,
      'versions': f'jax {jax.__version__}',
  }


def batch_of(
    setting: measuring.Setting, vocabulary: int, is_packed: bool
) -> dict[str, jax.Array]:
  """Returns random tokens; packed: as batches of text are, a document a row."""
  shape = setting.batch, setting.length
  batch = {
      'tokens': jax.random.randint(jax.random.key(1), shape, 0, vocabulary)
  }
  if is_packed:
    places = jnp.arange(setting.length, dtype=jnp.int32)
    batch['positions'] = jnp.broadcast_to(places, shape)
    batch['segments'] = jnp.ones(shape, jnp.int32)
    batch['weights'] = jnp.ones(shape).at[:, 0].set(0)
  return batch


def chain(setting, method: str, config, params, *, is_sketched: bool, ends):
  """Starts a chain's own step, and what ends a link; sketched, it moves W."""
  fields: dict[str, Any] = {}
  for name in ends.intersection(_SKETCHES):
    fields['sketch'] = bl.sketches.by_name(name)
  for name in ends.intersection(_ROUNDINGS):
    fields['rounding'] = name
  if 'shared' in ends:
    fields['shared_coin'] = True
  if 'grouped' in ends:
    fields['shared_frames'] = ('(q|k|v)_proj', '(gate|up)_proj')
  policy = decoders.policy(method, setting.rank, setting.period, **fields)
  tx = (optax.adam if is_sketched else optax.adamw)(setting.learning_rate)
  made, state, _ = decoders.start(
      config,
      params,
      policy,
      tx,
      chunk=setting.chunk,
      sketched=is_sketched,
      num_micro_batches=setting.micro_batches,
  )
  thin = measuring.thin_flops(setting.rank, policy.side, is_sketched)
  loss = bl.inject.by_product(decoder.make_loss(config, setting.chunk))
  # Links end between steps, as those of the command: a device that looked at its
  # count in each step would wait for the host's. One coin has two programs.
  jit = functools.partial(jax.jit, donate_argnums=0)
  step_of = lambda made: jit(
      lambda s, b: bl.adapters.move_factors(made, s, loss, b)
  )
  sides: list[Any] = []
  if 'shared' in ends:
    sides = bl.adapters.sides_of_links(made, state.key, 1000)
  steps = {side: step_of(made.of_side(side)) for side in set(sides) or {None}}
  if not policy.period:
    return state, steps, thin
  end = jit(lambda s: bl.adapters.begin_link(made, s))
  return state, steps, thin, end, sides


def floor(setting, method: str, config, params):
  """Starts forward and dx alone: the derivative by a norm of the first layer."""
  if method != 'dx':
    raise ValueError(f'Expected floor_dx, got floor_{method}.')
  loss = decoder.make_loss(config, setting.chunk)
  first = 'layers' if config.scan_layers else 'layers_0'

  def value(scale, batch, params):
    layer = {**params[first], 'input_layernorm': scale}
    return loss({**params, first: layer}, batch, None)

  grad = bl.accumulate(
      jax.value_and_grad(value, has_aux=True), setting.micro_batches
  )

  def step(state, batch):
    params = state[0]
    (value, _), grads = grad(params[first]['input_layernorm'], batch, params)
    return (params, grads), (value, None)

  state = params, jax.tree.map(jnp.zeros_like, params[first]['input_layernorm'])
  return state, {None: jax.jit(step, donate_argnums=0)}, lambda m, n: 0


def plain(setting, method: str, config, params):
  """Starts LoRA by hand: x W + (x L) R in every dense layer, on its own state."""
  if method != 'lora' or config.scan_layers:
    raise ValueError(f'Expected plain_lora, unrolled, got plain_{method}.')
  tx = optax.adamw(setting.learning_rate)
  loss = decoder.make_loss(config, setting.chunk)
  factors = {}
  for path, x in traverse_util.flatten_dict(params, sep='/').items():
    if path.startswith('layers') and path.endswith('kernel'):
      (m, n), key = x.shape, jax.random.key(len(factors))
      left = m**-0.5 * jax.random.normal(key, (m, setting.rank))
      factors[path] = {'left': left, 'right': jnp.zeros((setting.rank, n))}

  def value(factors, batch, params):
    def add(call, args, kwargs, context):
      out = call(*args, **kwargs)
      path = '/'.join((*context.module.path, 'kernel'))
      if not isinstance(context.module, nn.Dense) or path not in factors:
        return out
      left, right = (factors[path][x].astype(out.dtype) for x in factors[path])
      return out + (args[0] @ left) @ right

    with nn.intercept_methods(add):
      return loss(params, batch, None)

  grad = bl.accumulate(
      jax.value_and_grad(value, has_aux=True), setting.micro_batches
  )

  def step(state, batch):
    params, factors, moments = state
    (value, _), grads = grad(factors, batch, params)
    updates, moments = tx.update(grads, moments, factors)
    factors = optax.apply_updates(factors, updates)
    return (params, factors, moments), (value, None)

  state = params, factors, tx.init(factors)
  return (
      state,
      {None: jax.jit(step, donate_argnums=0)},
      measuring.thin_flops(setting.rank),
  )


def matmul() -> measuring.Row:
  """Measures a large product in bfloat16 and a copy, each for about a second."""
  is_cpu = jax.devices()[0].platform == 'cpu'
  n = 1024 if is_cpu else 8192
  draw = lambda seed: jax.random.normal(
      jax.random.key(seed), (n, n), 'bfloat16'
  )
  product = lambda x, w: (x @ w) * n**-0.5
  alone = _seconds(functools.partial(jax.jit(product), w=draw(1)), draw(0))
  large = jnp.ones((2**26 if is_cpu else 2**31,), 'bfloat16')
  size = large.nbytes
  copy = jax.jit(lambda x: x * 1.0078125, donate_argnums=0)
  return {
      'tflops': 2 * n**3 / alone / 1e12,
      'copy_gbs': 2 * size / _seconds(copy, large) / 1e9,
      'peak_gib': decoders.peak(),
      'loss': 0.0,
      'device': jax.devices()[0].device_kind,
      'versions': f'jax {jax.__version__}',
  }


def _seconds(function, x: jax.Array) -> float:
  """Returns the seconds a call, x <- function(x), over about a second."""
  seconds, count = 0.0, 1
  for _ in range(3):  # The first compiles, the second guesses.
    start = time.perf_counter()
    for _ in range(count):
      x = function(x)
    jax.block_until_ready(x)
    seconds = (time.perf_counter() - start) / count
    count = max(1, min(10_000, round(1 / seconds)))
  return seconds
