"""Small checkpoints of every family: configs, weights by name, folders.

Weights come from NumPy's frozen generator by the name of the tensor, at unit gain, so
that every part of a model shows in its logits, and the stored results of the
reference (`golden/decoders.npz`) need no stored weights.
"""

import json
import pathlib
import zlib

import numpy as np
from safetensors import numpy as safetensors

_SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_act='silu',
    rms_norm_eps=1e-5,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    torch_dtype='float32',
)


def _config(family, name, **more):
  return {
      'model_type': family,
      'architectures': [f'{name}ForCausalLM'],
      **_SIZES,
      **more,
  }


# As files have written them, before and since transformers 5.
CONFIGS = {
    'llama2': _config('llama', 'Llama', num_key_value_heads=4),
    'llama3': _config(
        'llama',
        'Llama',
        tie_word_embeddings=True,
        rope_theta=500.0,
        rope_scaling=dict(
            rope_type='llama3',
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=256,
        ),
    ),
    'llama_linear': _config(
        'llama',
        'Llama',
        attention_bias=True,
        mlp_bias=True,
        rope_theta=10000.0,
        rope_scaling=dict(type='linear', factor=4.0),
    ),
    'mistral': _config(
        'mistral', 'Mistral', head_dim=16, sliding_window=7, rope_theta=1e6
    ),
    'qwen2': _config(
        'qwen2',
        'Qwen2',
        tie_word_embeddings=True,
        rope_theta=1e6,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    'qwen3': _config(
        'qwen3',
        'Qwen3',
        head_dim=12,
        attention_bias=False,
        rope_parameters=dict(rope_type='default', rope_theta=5000.0),
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=3,
    ),
}


def shapes(raw):
  """Returns {name: shape} of the tensors of a config, from the published code."""
  d, ffn, vocab = (
      raw[k] for k in ('hidden_size', 'intermediate_size', 'vocab_size')
  )
  head = raw.get('head_dim') or d // raw['num_attention_heads']
  q = raw['num_attention_heads'] * head
  kv = raw['num_key_value_heads'] * head
  found = {'model.embed_tokens.weight': (vocab, d), 'model.norm.weight': (d,)}
  if not raw['tie_word_embeddings']:
    found['lm_head.weight'] = (vocab, d)
  is_biased = raw.get('attention_bias', raw['model_type'] == 'qwen2')
  for i in range(raw['num_hidden_layers']):
    own = {
        'input_layernorm': (d,),
        'post_attention_layernorm': (d,),
        'self_attn.q_proj': (q, d),
        'self_attn.k_proj': (kv, d),
        'self_attn.v_proj': (kv, d),
        'self_attn.o_proj': (d, q),
        'mlp.gate_proj': (ffn, d),
        'mlp.up_proj': (ffn, d),
        'mlp.down_proj': (d, ffn),
    }
    if raw['model_type'] == 'qwen3':
      own |= {'self_attn.q_norm': (head,), 'self_attn.k_norm': (head,)}
    for name, shape in own.items():
      found[f'model.layers.{i}.{name}.weight'] = shape
      has_bias = is_biased and name.startswith('self_attn')
      has_bias &= raw['model_type'] != 'qwen2' or 'o_proj' not in name
      has_bias |= raw.get('mlp_bias', False) and name.startswith('mlp')
      if has_bias and len(shape) == 2:
        found[f'model.layers.{i}.{name}.bias'] = shape[:1]
  return found


def weights(raw):
  """Returns {name: float32 array}, of unit gain."""
  return {name: tensor(name, shape) for name, shape in shapes(raw).items()}


def tensor(name, shape):
  normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(
      shape
  )
  if name.endswith('bias'):
    return (0.5 * normal).astype(np.float32)
  if len(shape) == 1:  # A norm.
    return (1 + 0.3 * normal).astype(np.float32)
  # A tied head would have logits of sqrt(d) times theirs.
  fan_in = shape[1]
  return (normal / np.sqrt(fan_in)).astype(np.float32)


def tokens(length, rows=2, vocab=96, seed=0):
  """Returns (rows, length) int32."""
  draw = np.random.RandomState(seed).randint
  return draw(0, vocab, (rows, length)).astype(np.int32)


def write(folder, name, dtype=np.float32, **changes):
  """Writes a checkpoint as a folder and returns it."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  raw = {**CONFIGS[name], **changes}
  raw = {k: v for k, v in raw.items() if v is not ...}
  (folder / 'config.json').write_text(json.dumps(raw))
  tensors = {k: v.astype(dtype) for k, v in weights(raw).items()}
  safetensors.save_file(tensors, folder / 'model.safetensors')
  return folder
