"""Decoders of random weights, and a step of a chain on them, for benchmarks."""

from collections.abc import Callable
import functools
import json
import math
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors import numpy as safetensors

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import inject
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import hf_config

_LLAMA = dict(
    model_type='llama',
    architectures=['LlamaForCausalLM'],
    hidden_act='silu',
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_theta=500000.0,
    max_position_embeddings=8192,
)


def _shape(vocab, hidden, ffn, layers, heads, kv_heads, rows, length):
  raw = dict(
      _LLAMA,
      vocab_size=vocab,
      hidden_size=hidden,
      intermediate_size=ffn,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      num_key_value_heads=kv_heads,
  )
  return raw, rows, length


# {name: (config.json, rows of a batch, tokens of a row)}
CONFIGS = {
    'tiny': _shape(512, 128, 256, 4, 4, 2, 2, 64),
    '1b': _shape(32000, 2048, 8192, 16, 32, 8, 8, 1024),
    '8b': _shape(128256, 4096, 14336, 32, 32, 8, 4, 2048),
}


def policy(
    method: str, rank: int, period: int, **fields: Any
) -> bl.ChainPolicy:
  """Returns the policy of 'lora', 'rac_left', 'rac_right' or 'bernoulli'."""
  if method == 'lora':
    return bl.ChainPolicy.lora(rank, **fields)
  if method in ('rac_left', 'rac_right'):
    return bl.ChainPolicy.rac(rank, period, method[4:], **fields)
  if method == 'bernoulli':
    return bl.ChainPolicy.bernoulli(rank, period, **fields)
  raise ValueError(
      "Expected method in ('lora', 'rac_left', 'rac_right', 'bernoulli'), got"
      f' {method!r}.'
  )


def write(folder: pathlib.Path, raw: dict[str, Any]) -> None:
  """Writes a checkpoint of random weights, a file a layer."""
  folder.mkdir(parents=True)
  config = hf_config.from_dict(raw, scan_layers=False)
  noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
  noise = (0.02 * noise).astype(ml_dtypes.bfloat16)
  groups, index = {}, {}
  for path, leaf in hf.param_shapes(config).items():
    (name,) = hf.tensor_names('llama', config, path)
    shape = leaf.shape[::-1] if path.endswith('kernel') else leaf.shape
    groups.setdefault(path.split('/')[0], {})[name] = shape
  for i, (room, tensors) in enumerate(groups.items()):
    file = f'model-{i + 1:05d}-of-{len(groups):05d}.safetensors'
    made = {n: np.resize(noise, shape) for n, shape in tensors.items()}
    safetensors.save_file(made, folder / file, metadata={'format': 'pt'})
    index |= dict.fromkeys(made, file)
    del made, room
  text = json.dumps({'metadata': {}, 'weight_map': index})
  (folder / hf.INDEX).write_text(text)
  (folder / 'config.json').write_text(json.dumps({**raw, 'dtype': 'bfloat16'}))


def drawn(
    raw: dict[str, Any], **run: Any
) -> tuple[decoder.DecoderConfig, dict[str, Any]]:
  """Returns a config and random weights, drawn on the device; norms are 1."""
  config = hf_config.from_dict(raw, **run)
  leaves = {
      path: jnp.ones(x.shape, jnp.bfloat16)
      if 'norm' in path
      else _normal(jax.random.key(i), x.shape)
      for i, (path, x) in enumerate(hf.param_shapes(config).items())
  }
  return config, traverse_util.unflatten_dict(leaves, sep='/')


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns a leaf, drawn in parts: beside it there is a part, no second leaf."""
  rows = math.prod(shape[:-1])
  part = math.gcd(rows, 256)
  draw = lambda key: 0.02 * jax.random.normal(
      key, (part, shape[-1]), jnp.bfloat16
  )
  drawn = jax.lax.map(draw, jax.random.split(key, rows // part))
  return drawn.reshape(shape)


def start(
    config: decoder.DecoderConfig,
    params: Any,
    policy: bl.ChainPolicy,
    tx: optax.GradientTransformation,
    *,
    chunk: int,
    **kwargs: Any,
) -> tuple[bl.adapters.Chain, bl.adapters.AdapterState, Callable[..., Any]]:
  """Returns a chain on all linear maps, its state and its compiled step.

  Args:
    config: of the decoder.
    params: its weights, which the state takes over.
    policy: of the chain.
    tx: optimiser of the factors.
    chunk: positions whose logits exist at once.
    **kwargs: of `adapters.make_chain`.

  Returns:
    The chain; its state; (state, batch) -> (state, (value, aux)), which takes the
    state's buffers.
  """
  chain = bl.adapters.make_chain(policy, tx, decoder.matrices(config), **kwargs)
  state = chain.init(jax.random.key(0), params, copy=False)
  loss = inject.by_product(decoder.make_loss(config, chunk))
  step = jax.jit(lambda s, b: chain.step(s, loss, b), donate_argnums=0)
  return chain, state, step


def peak() -> float:
  """Returns the most GiB that were in use so far, 0 where no device tells."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use', 0) / 2**30
