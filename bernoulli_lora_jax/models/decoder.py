"""The Llama family of decoders: Llama 2 and 3, Mistral, Qwen2, Qwen3.

    checkpoint = hf.load(folder)                  # or a DecoderConfig of one's own
    config, params = checkpoint.config, checkpoint.params
    hidden = decoder.apply(config, params, tokens).hidden     # (b, s, d)
    loss = decoder.make_loss(config)              # (params, batch, key) -> scalar

Layers are pre-normalised (RMSNorm), attention has grouped keys and values and rotary
positions, the feed-forward part is gated (SwiGLU). Modules and kernels have the
names of the published checkpoints, so that what selects `q_proj|v_proj` elsewhere does
here: `layers_3/self_attn/q_proj/kernel`, or, layers scanned, a stack at
`layers/self_attn/q_proj/kernel`. Both draw the same frames of a chain.

Every weight that can be adapted enters products alone, a tied head included, but for
its lookup as an embedding: the law of `inject` holds and forms nothing.

Reference: Touvron et al., Llama 2, arXiv 2307.09288; Llama 3, arXiv 2407.21783; Jiang
et al., Mistral 7B, arXiv 2310.06825; Qwen2, arXiv 2407.10671; Qwen3, arXiv 2505.09388.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import parts
from bernoulli_lora_jax.models import attention
from bernoulli_lora_jax.models import cross_entropy
from bernoulli_lora_jax.models import rms_norm
from bernoulli_lora_jax.models import rotary as rotary_lib

REMATS = ('none', 'dots', 'full')
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and kinds of a decoder, and how its layers are run.

  Attributes:
    vocab_size: rows of the embedding.
    hidden_size: d, width between layers.
    intermediate_size: width of the feed-forward part.
    num_layers: >= 1.
    num_heads: of queries.
    num_kv_heads: of keys and values; divides num_heads.
    head_dim: width of a head, even.
    rotary: of the positions.
    norm_eps: added to the mean square in RMSNorm.
    qkv_bias: whether queries, keys and values have biases.
    output_bias: whether the output of attention has one.
    mlp_bias: whether the feed-forward part has them.
    qk_norm: whether heads of queries and keys are normalised (Qwen3).
    tied: whether the head is the embedding, transposed.
    window: positions that a windowed layer sees, itself included.
    windowed: of each layer, whether it is; () for all where there is a window.
    scan_layers: whether layers are stacked and scanned: compiles once for any
      number of them. Unrolled ones run faster without remat.
    remat: what the forward pass of a layer keeps for the backward pass: 'none' is
      dropped, 'dots' keeps the products, 'full' keeps its input alone.
    dtype: of the computation; None for that of the weights.
    max_segments: most packed documents in a row, see `attention.attend`.
    max_length: positions that the model was made for; information.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rotary: rotary_lib.Rotary = rotary_lib.Rotary()
  norm_eps: float = 1e-6
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  tied: bool = False
  window: int | None = None
  windowed: tuple[bool, ...] = ()
  scan_layers: bool = True
  remat: str = 'none'
  dtype: Any = None
  max_segments: int = 64
  max_length: int = 2048

  def __post_init__(self):
    sizes = 'vocab_size hidden_size intermediate_size num_layers num_heads'
    for name in (*sizes.split(), 'num_kv_heads', 'head_dim', 'max_segments'):
      checks.integers(1, **{name: getattr(self, name)})
    checks.at_least(0, norm_eps=self.norm_eps)
    if self.dtype is not None:
      is_float = jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)
      checks.that(is_float, 'dtype of floating point', dtype=self.dtype)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
          'Expected num_kv_heads to divide num_heads, got'
          f' num_kv_heads={self.num_kv_heads}, num_heads={self.num_heads}.'
      )
    if self.head_dim % 2:
      raise ValueError(f'Expected an even head_dim, got {self.head_dim}.')
    if self.window is not None:
      checks.integers(1, window=self.window)
    # A list could not be hashed, as jit must.
    object.__setattr__(self, 'windowed', tuple(self.windowed))
    if len(self.windowed) not in (0, self.num_layers):
      raise ValueError(
          f'Expected windowed of each of {self.num_layers} layers, got'
          f' {len(self.windowed)}.'
      )
    if self.window is None and any(self.windowed):
      raise ValueError('Expected a window where layers are windowed, got None.')
    if self.remat not in REMATS:
      raise ValueError(f'Expected remat in {REMATS}, got {self.remat!r}.')

  @property
  def windows(self) -> tuple[int | None, ...]:
    """Returns the window of each layer."""
    windowed = self.windowed or (True,) * self.num_layers
    return tuple(self.window if w else None for w in windowed)


class Cache(NamedTuple):
  """Keys and values of the positions so far."""

  keys: jax.Array  # (layers, b, t, kv_heads, head_dim)
  values: jax.Array  # (layers, b, t, kv_heads, head_dim)


class Output(NamedTuple):
  """What a decoder returns."""

  hidden: jax.Array  # (b, s, d), after the last norm.
  head: jax.Array  # (d, vocab_size): the embedding, transposed, where tied.
  cache: Cache | None


class _Given(NamedTuple):
  """What all layers share."""

  cos: jax.Array  # (b, s, 1, head_dim / 2)
  sin: jax.Array  # (b, s, 1, head_dim / 2)
  positions: jax.Array  # (b, s)
  segments: jax.Array | None  # (b, s)
  packed: attention.Packed | None  # Of them, where cuDNN takes it.


class RMSNorm(nn.Module):
  """Returns x / sqrt(mean of squares + eps), scaled, see `rms_norm`."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return rms_norm.rms_norm(x, _scale_of(self, x), self.eps)


class FanOut(nn.Module):
  """Returns x, and its norm for `num` products, see `rms_norm.fan_out`."""

  eps: float
  num: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
    return rms_norm.fan_out(x, _scale_of(self, x), self.eps, self.num)


def _scale_of(norm: nn.Module, x: jax.Array) -> jax.Array:
  return norm.param('scale', nn.initializers.ones, (x.shape[-1],))


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: DecoderConfig

  @nn.compact
  def __call__(
      self,
      normed: Sequence[jax.Array],  # For queries, keys and values.
      given: _Given,
      is_windowed: bool | jax.Array,
      cache: Cache | None,
  ) -> tuple[jax.Array, Cache | None]:
    c = self.config
    heads = lambda name, x, num: _dense(
        name, num * c.head_dim, c.qkv_bias, c.dtype
    )(x).reshape(*x.shape[:2], num, c.head_dim)
    q = heads('q_proj', normed[0], c.num_heads)
    k = heads('k_proj', normed[1], c.num_kv_heads)
    v = heads('v_proj', normed[2], c.num_kv_heads)
    if c.qk_norm:
      q = RMSNorm(c.norm_eps, name='q_norm')(q)
      k = RMSNorm(c.norm_eps, name='k_norm')(k)
    q, k = (rotary_lib.rotate(y, given.cos, given.sin) for y in (q, k))
    if cache is not None:
      rows = jnp.arange(q.shape[0])[:, None]
      write = lambda old, new: old.at[rows, given.positions].set(
          new.astype(old.dtype)
      )
      cache = Cache(write(cache.keys, k), write(cache.values, v))
      k, v = (y.astype(q.dtype) for y in cache)

    def attend(window):
      if cache is not None:
        return attention.attend_cache(q, k, v, given.positions, window)
      return attention.attend(
          q,
          k,
          v,
          window=window,
          segments=given.segments,
          max_segments=c.max_segments,
          packed=given.packed,
      )

    if isinstance(is_windowed, jax.Array):  # Layers of two kinds, scanned.
      out = jax.lax.cond(
          is_windowed, lambda: attend(c.window), lambda: attend(None)
      )
    else:
      out = attend(c.window if is_windowed else None)
    out = out.reshape(*out.shape[:2], -1)
    return _dense('o_proj', c.hidden_size, c.output_bias, c.dtype)(out), cache


class MLP(nn.Module):
  """silu(x gate) * (x up), then down."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, normed: Sequence[jax.Array]) -> jax.Array:
    c, (for_gate, for_up) = self.config, normed
    wide = lambda name, x: rms_norm.formed(
        _dense(name, c.intermediate_size, c.mlp_bias, c.dtype)(x)
    )
    inner = nn.silu(wide('gate_proj', for_gate)) * wide('up_proj', for_up)
    return _dense('down_proj', c.hidden_size, c.mlp_bias, c.dtype)(inner)


class Layer(nn.Module):
  """Attention, then the feed-forward part, each beside its input."""

  config: DecoderConfig
  is_windowed: bool | None  # None: it is given with each call.

  @nn.compact
  def __call__(
      self, x: jax.Array, own: tuple[Any, Any], given: _Given
  ) -> tuple[jax.Array, Any]:
    c, (is_windowed, cache) = self.config, own
    if self.is_windowed is not None:
      is_windowed = self.is_windowed
    x, *normed = FanOut(c.norm_eps, 3, name='input_layernorm')(x)
    attended, cache = Attention(c, name='self_attn')(
        normed, given, is_windowed, cache
    )
    x = x + attended
    x, *normed = FanOut(c.norm_eps, 2, name='post_attention_layernorm')(x)
    return x + MLP(c, name='mlp')(normed), cache


class Decoder(nn.Module):
  """A decoder up to its last norm; the head is a product of its own."""

  config: DecoderConfig

  @nn.compact
  def __call__(
      self,
      tokens: jax.Array,
      positions: jax.Array | None = None,
      segments: jax.Array | None = None,
      cache: Cache | None = None,
  ) -> Output:
    """Returns hidden states.

    Args:
      tokens: (b, s) int, in [0, vocab_size); others make their row NaN.
      positions: (b, s) int; None for 0, 1, ..., from 0 in every document where
        there are segments. With a cache they are the places that are written.
      segments: (b, s) int, of packed documents, see `attention.attend`.
      cache: of the positions before, see `make_cache`; not with segments.

    Raises:
      ValueError: segments with a cache; tokens that are none, others of another
        shape than theirs.
    """
    c = self.config
    given = {'tokens': tokens, 'positions': positions, 'segments': segments}
    for name, x in given.items():
      is_right = x is None or x.ndim == 2 and 0 not in x.shape
      is_right &= x is None or x.shape == tokens.shape
      expected = f'{name} of shape (b, s), as of the tokens'
      checks.that(is_right, expected, shape=getattr(x, 'shape', None))
    if cache is not None and segments is not None:
      raise ValueError('Expected a cache or segments, got both.')
    if positions is None:
      positions = positions_of(tokens, segments)
    embedding = (c.vocab_size, c.hidden_size), 'embedding'
    table = _Table(*embedding, name='embed_tokens')()
    # Unknown tokens are NaN; a negative one would be counted from the end.
    tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.int32))
    x = jnp.take(table, jnp.where(tokens < 0, c.vocab_size, tokens), axis=0)
    x = x if c.dtype is None else x.astype(c.dtype)
    head = table.T
    if not c.tied:
      head = _Table((c.hidden_size, c.vocab_size), 'kernel', name='lm_head')()
    cos, sin = rotary_lib.tables(c.rotary, c.head_dim, positions)
    packed = attention.pack_if_fused(x, c.head_dim, segments, c.max_segments)
    x = x if packed is None else attention.guard(x, packed)
    given = _Given(cos, sin, positions, segments, packed)
    x, cache = _run_layers(c, x, given, cache)
    return Output(RMSNorm(c.norm_eps, name='norm')(x), head, cache)


class _Table(nn.Module):
  """One array of parameters, of its own name."""

  shape: tuple[int, ...]
  leaf: str

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param(self.leaf, nn.initializers.normal(0.02), self.shape)


def _dense(name: str, width: int, bias: bool, dtype: Any) -> nn.Dense:
  init = nn.initializers.normal(0.02)
  return nn.Dense(width, bias, dtype=dtype, kernel_init=init, name=name)


def _run_layers(
    c: DecoderConfig, x: jax.Array, given: _Given, cache: Cache | None
) -> tuple[jax.Array, Cache | None]:
  """Returns what all layers make of x, and their cache."""
  windowed = [window is not None for window in c.windows]
  kind = windowed[0] if len(set(windowed)) == 1 else None
  layer: Any = Layer
  if c.remat != 'none':
    # Outside of a scan XLA would undo it.
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    layer = nn.remat(
        Layer,
        prevent_cse=not c.scan_layers,
        policy=policy if c.remat == 'dots' else None,
    )
  if c.scan_layers:
    scanned = nn.scan(
        layer,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=(0, nn.broadcast),
        length=c.num_layers,
    )
    own = (None if kind is not None else jnp.array(windowed), cache)
    return scanned(c, kind, name='layers')(x, own, given)
  made = []
  for i, is_windowed in enumerate(windowed):
    own = (
        None,
        None if cache is None else Cache(cache.keys[i], cache.values[i]),
    )
    x, new = layer(c, is_windowed, name=f'layers_{i}')(x, own, given)
    made.append(new)
  return x, cache and jax.tree.map(lambda *xs: jnp.stack(xs), *made)


def _check_kind(config: Any) -> None:
  """Raises for the config of an encoder, which `hf.load` returns as well."""
  if not isinstance(config, DecoderConfig):
    kind = type(config).__name__
    raise ValueError(f'Expected a decoder, as of Llama, got an {kind}.')


def positions_of(
    tokens: jax.Array, segments: jax.Array | None = None
) -> jax.Array:
  """Returns the positions of tokens (b, s), from 0 in every segment; int32."""
  places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
  places = jnp.broadcast_to(places, tokens.shape)
  if segments is None:
    return places
  starts = jnp.where(attention.is_start(segments), places, 0)
  return places - jax.lax.cummax(starts, axis=1)


def make_cache(
    config: DecoderConfig, rows: int, length: int, dtype: Any = jnp.float32
) -> Cache:
  """Returns an empty cache of some rows and positions."""
  _check_kind(config)
  c = config
  shape = (c.num_layers, rows, length, c.num_kv_heads, c.head_dim)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def matrices(
    config: DecoderConfig, select: str = r'^layers'
) -> matrices_lib.Matrices:
  """Returns what selects linear maps of a decoder, stacked or not.

  Args:
    config: of the decoder.
    select: regular expression searched in paths, as 'q_proj|v_proj'; by default
      all linear maps of all layers. The head is selected by its name, lm_head.
  """
  _check_kind(config)
  stacked = matrices_lib.stacked(r'^layers/.*kernel$')
  rules = (stacked,) if config.scan_layers else ()
  return matrices_lib.Matrices(
      select=rf'^(?=.*kernel$)(?=.*?(?:{select}))', rules=rules
  )


def make_loss(
    config: DecoderConfig, chunk: int = 1024
) -> Callable[[Any, Batch, Any], tuple[jax.Array, parts.Weighted]]:
  """Returns the loss of predicting each token from those before it.

  Args:
    config: of the decoder.
    chunk: positions whose logits exist at once, see `cross_entropy`.

  Returns:
    (params, batch, key) -> (mean in nats a token, `Weighted` by its weight). The
    batch holds tokens (b, s) int and, where wanted, weights (b, s), of predicting
    each token, 1 where there are none; segments (b, s), of packed documents, whose
    first tokens are not predicted; positions (b, s).

  Raises:
    ValueError: a config of another kind of model, as `hf.load` returns it.
  """
  _check_kind(config)

  def loss(params, batch, key=None):
    del key
    tokens, segments = batch['tokens'], batch.get('segments')
    out = apply(config, params, tokens, batch.get('positions'), segments)
    weights = target_weights(tokens, batch.get('weights'), segments)
    targets = jnp.roll(tokens, -1, axis=1)
    total = cross_entropy.cross_entropy(
        out.hidden, out.head, targets, weights, chunk=chunk
    )
    weight = jnp.sum(weights)
    return total / jnp.where(weight > 0, weight, 1), parts.Weighted(weight, {})

  return loss


def target_weights(
    tokens: jax.Array,
    weights: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
  """Returns the weight with which each position predicts the next; (b, s) float32.

  Args:
    tokens: (b, s).
    weights: (b, s) of each token as a target; None for 1.
    segments: (b, s); across their borders nothing is predicted.
  """
  if weights is None:
    weights = jnp.ones(tokens.shape, jnp.float32)
  weights = jnp.roll(weights.astype(jnp.float32), -1, axis=1).at[:, -1].set(0)
  if segments is None:
    return weights
  return weights * (segments == jnp.roll(segments, -1, axis=1))


def apply(
    config: DecoderConfig,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    cache: Cache | None = None,
) -> Output:
  """Returns the hidden states of tokens, see `Decoder`."""
  variables = {'params': params}
  made = Decoder(config).apply(variables, tokens, positions, segments, cache)
  assert isinstance(made, Output)
  return made


def logits(output: Output) -> jax.Array:
  """Returns the logits of the next tokens; (b, s, vocab_size), float32 or wider."""
  wide = jnp.promote_types(output.hidden.dtype, jnp.float32)
  head = output.head.astype(output.hidden.dtype)
  return jnp.matmul(output.hidden, head, preferred_element_type=wide)
