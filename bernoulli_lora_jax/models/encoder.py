"""The BERT family of encoders: BERT, RoBERTa, MiniLM.

    checkpoint = hf.load(folder, pooling='mean')  # or an EncoderConfig of one's own
    config, params = checkpoint.config, checkpoint.params
    pooled = encoder.apply(config, params, tokens, mask).pooled    # (b, d)
    config, params = encoder.add_head(config, params, num_labels, key)
    loss = encoder.make_classification_loss(config)  # (params, batch, key) -> scalar

Layers are post-normalised (LayerNorm), every position sees every other that is no
padding, the feed-forward part is gelu. Modules and kernels have the names of the
published checkpoints, and layers those of `decoder`: what selects `query|value`
elsewhere does here, `layers_3/attention/self/query/kernel`, or, layers scanned, a stack
at `layers/attention/self/query/kernel`. Both draw the same frames of a chain.

Every weight that can be adapted enters products alone: the law of `inject` holds and
forms nothing. A head trains beside a chain: `others={'^classifier': tx}`.

Nothing is dropped: results are those of the published code in evaluation.

Reference: Devlin et al., BERT, arXiv 1810.04805; Liu et al., RoBERTa, arXiv 1907.11692;
Wang et al., MiniLM, arXiv 2002.10957; Reimers & Gurevych, Sentence-BERT, arXiv
1908.10084, for the pooling.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import parts
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import stacks

POOLINGS = ('cls', 'mean', 'pooler')
HEADS = ('linear', 'dense')
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Sizes and kinds of an encoder, and how its layers are run.

  Attributes:
    vocab_size: rows of the embedding of words.
    hidden_size: d, width between layers.
    intermediate_size: width of the feed-forward part.
    num_layers: >= 1.
    num_heads: divides hidden_size.
    num_positions: rows of the embedding of positions.
    num_types: rows of the embedding of token types.
    norm_eps: added to the variance in LayerNorm.
    pad_token: None where positions are 0, 1, ... (BERT). Else those of RoBERTa:
      tokens other than this one count from pad_token + 1, it has position pad_token.
    pooler: whether there are weights of a pooler.
    pooling: what a row becomes: 'cls', its first hidden state; 'mean', that of its
      tokens that are no padding; 'pooler', tanh of a linear map of the first.
    num_labels: outputs of the classification head; 0 for none.
    head: 'linear' (BERT), or 'dense', tanh of a linear map before it (RoBERTa).
    scan_layers: whether layers are stacked and scanned: compiles once for any
      number of them.
    remat: what the forward pass of a layer keeps for the backward pass: 'none' is
      dropped, 'dots' keeps the products, 'full' keeps its input alone.
    dtype: of the computation; None for that of the weights.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_positions: int = 512
  num_types: int = 2
  norm_eps: float = 1e-12
  pad_token: int | None = None
  pooler: bool = False
  pooling: str = 'cls'
  num_labels: int = 0
  head: str = 'linear'
  scan_layers: bool = True
  remat: str = 'none'
  dtype: Any = None

  def __post_init__(self):
    sizes = 'vocab_size hidden_size intermediate_size num_layers num_heads'
    for name in (*sizes.split(), 'num_positions', 'num_types'):
      checks.integers(1, **{name: getattr(self, name)})
    checks.integers(0, num_labels=self.num_labels)
    if self.pad_token is not None:
      checks.integers(0, pad_token=self.pad_token)
    checks.that(
        self.max_length > 0, 'a position', num_positions=self.num_positions
    )
    checks.at_least(0, norm_eps=self.norm_eps)
    if self.dtype is not None:
      is_float = jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)
      checks.that(is_float, 'dtype of floating point', dtype=self.dtype)
    if self.hidden_size % self.num_heads:
      raise ValueError(
          'Expected num_heads to divide hidden_size, got'
          f' num_heads={self.num_heads}, hidden_size={self.hidden_size}.'
      )
    checks.one_of(POOLINGS, pooling=self.pooling)
    checks.one_of(HEADS, head=self.head)
    checks.one_of(decoder.REMATS, remat=self.remat)
    if self.pooling == 'pooler' and not self.pooler:
      raise ValueError(
          "Expected pooling 'cls' or 'mean' without a pooler, got 'pooler'."
      )

  @property
  def max_length(self) -> int:
    """Returns the most tokens of a row."""
    first = 0 if self.pad_token is None else self.pad_token + 1
    return self.num_positions - first


class Output(NamedTuple):
  """What an encoder returns."""

  hidden: jax.Array  # (b, s, d)
  pooled: jax.Array  # (b, d)
  logits: jax.Array | None  # (b, num_labels); None without a head.


class Embeddings(nn.Module):
  """Words, positions and types of tokens, summed and normalised."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
    c = self.config
    table = lambda name, rows: nn.Embed(
        rows,
        c.hidden_size,
        dtype=c.dtype,
        embedding_init=nn.initializers.normal(0.02),
        name=name,
    )
    # Unknown ones are NaN; a negative one would be counted from the end.
    known = lambda ids, rows: jnp.where(ids < 0, rows, ids)
    x = table('word_embeddings', c.vocab_size)(known(tokens, c.vocab_size))
    x += table('token_type_embeddings', c.num_types)(known(types, c.num_types))
    positions = positions_of(c, tokens)
    x += table('position_embeddings', c.num_positions)(positions)
    return _norm(c)(x)


class SelfAttention(nn.Module):
  """Attention of all heads, up to its output's product."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    c = self.config
    shape = (*x.shape[:2], c.num_heads, c.hidden_size // c.num_heads)
    q, k, v = (
        _dense(name, c.hidden_size, c)(x).reshape(shape)
        for name in ('query', 'key', 'value')
    )
    return attend(q, k, v, mask).reshape(x.shape)


class Residual(nn.Module):
  """Returns the norm of x beside a product of what was made of it."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, made: jax.Array, x: jax.Array) -> jax.Array:
    c = self.config
    return _norm(c)(_dense('dense', c.hidden_size, c)(made) + x)


class Attention(nn.Module):
  """Attention beside its input."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    made = SelfAttention(self.config, name='self')(x, mask)
    return Residual(self.config, name='output')(made, x)


class Intermediate(nn.Module):
  """gelu(x W + b)."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    return nn.gelu(
        _dense('dense', c.intermediate_size, c)(x), approximate=False
    )


class Layer(nn.Module):
  """Attention, then the feed-forward part, each beside its input."""

  config: EncoderConfig

  @nn.compact
  def __call__(
      self, x: jax.Array, mask: jax.Array | None
  ) -> tuple[jax.Array, None]:
    c = self.config
    x = Attention(c, name='attention')(x, mask)
    made = Intermediate(c, name='intermediate')(x)
    return Residual(c, name='output')(made, x), None


class Pooler(nn.Module):
  """Returns tanh of a linear map of the first hidden state."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    c = self.config
    return nn.tanh(_dense('dense', c.hidden_size, c)(hidden[:, 0]))


class DenseHead(nn.Module):
  """RoBERTa's classification head."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, pooled: jax.Array) -> jax.Array:
    c = self.config
    inner = nn.tanh(_dense('dense', c.hidden_size, c)(pooled))
    return _dense('out_proj', c.num_labels, c)(inner)


class Encoder(nn.Module):
  """An encoder, with its pooler and head where it has them."""

  config: EncoderConfig

  @nn.compact
  def __call__(
      self,
      tokens: jax.Array,
      mask: jax.Array | None = None,
      types: jax.Array | None = None,
  ) -> Output:
    """Returns hidden states, what rows become of them, and logits.

    Args:
      tokens: (b, s) int, in [0, vocab_size); others make their row NaN.
      mask: (b, s), 0 or False of padding, which no position sees; None for none.
      types: (b, s) int, in [0, num_types); None for 0.

    Raises:
      ValueError: tokens that are none or more than there are positions, a mask or
        types of another shape than theirs.
    """
    c = self.config
    given = {'tokens': tokens, 'mask': mask, 'types': types}
    stacks.check_rows(given, tokens.shape)
    checks.that(
        tokens.shape[1] <= c.max_length,
        f'rows of at most {c.max_length} tokens, as there are positions',
        length=tokens.shape[1],
    )
    tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.int32))
    types = jnp.zeros_like(tokens) if types is None else jnp.asarray(types)
    mask = None if mask is None else jnp.asarray(mask) != 0
    x = Embeddings(c, name='embeddings')(tokens, types)
    hidden = _run_layers(c, x, mask)
    pooled = mean(hidden, mask) if c.pooling == 'mean' else hidden[:, 0]
    if c.pooler:  # Its weights are there, whatever reads it.
      by_pooler = Pooler(c, name='pooler')(hidden)
      pooled = by_pooler if c.pooling == 'pooler' else pooled
    if not c.num_labels:
      return Output(hidden, pooled, None)
    if c.head == 'dense':
      logits = DenseHead(c, name='classifier')(pooled)
    else:
      logits = _dense('classifier', c.num_labels, c)(pooled)
    return Output(hidden, pooled, logits)


def _dense(name: str, width: int, c: EncoderConfig) -> nn.Dense:
  init = nn.initializers.normal(0.02)
  return nn.Dense(width, dtype=c.dtype, kernel_init=init, name=name)


def _norm(c: EncoderConfig) -> nn.LayerNorm:
  # The fast variance is a difference of squares.
  return nn.LayerNorm(
      c.norm_eps, dtype=c.dtype, use_fast_variance=False, name='LayerNorm'
  )


def _run_layers(
    c: EncoderConfig, x: jax.Array, mask: jax.Array | None
) -> jax.Array:
  """Returns what all layers make of x."""
  layer = stacks.rematted(Layer, c.remat, c.scan_layers)
  if c.scan_layers:
    scanned = nn.scan(
        layer,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        length=c.num_layers,
    )
    return scanned(c, name='layers')(x, mask)[0]
  for i in range(c.num_layers):
    x, _ = layer(c, name=f'layers_{i}')(x, mask)
  return x


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(dim)) v over what is no padding.

  Args:
    q: (b, s, heads, dim); k and v likewise.
    k: keys.
    v: values.
    mask: (b, s) bool, False of padding; None for none. A row of padding alone sees
      all of it alike.

  Returns:
    (b, s, heads, dim), of q's dtype. Scores and softmax are in float32 or wider.
  """
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum('bshd,bthd->bhst', q, k, preferred_element_type=wide)
  scores *= q.shape[-1] ** -0.5
  if mask is not None:
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
  probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  return jnp.einsum('bhst,bthd->bshd', probs, v)


def mean(hidden: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Returns the mean of the hidden states of each row that are no padding; (b, d).

  Args:
    hidden: (b, s, d).
    mask: (b, s), 0 or False of padding; None for none. A row of padding alone has
      mean 0.
  """
  wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
  if mask is None:
    return jnp.mean(wide, axis=1).astype(hidden.dtype)
  is_real = mask != 0
  total = jnp.sum(jnp.where(is_real[..., None], wide, 0), axis=1)
  count = jnp.maximum(jnp.sum(is_real, axis=1, dtype=total.dtype), 1)
  return (total / count[:, None]).astype(hidden.dtype)


def mask_of(lengths: jax.Array, size: int) -> jax.Array:
  """Returns the mask (b, size) of rows whose first `lengths` (b,) are no padding."""
  return jnp.arange(size)[None] < jnp.asarray(lengths)[:, None]


def positions_of(config: EncoderConfig, tokens: jax.Array) -> jax.Array:
  """Returns the rows of the embedding of positions of tokens (b, s); int32."""
  if config.pad_token is None:
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(places, tokens.shape)
  is_counted = tokens != config.pad_token
  counts = jnp.cumsum(is_counted, axis=1, dtype=jnp.int32)
  return jnp.where(is_counted, counts, 0) + config.pad_token


def matrices(
    config: EncoderConfig, select: str = r'^layers'
) -> matrices_lib.Matrices:
  """Returns what selects linear maps of an encoder, stacked or not.

  Args:
    config: of the encoder.
    select: regular expression searched in paths, as 'query|value'; by default all
      linear maps of all layers. Pooler and head are selected by their names.
  """
  return stacks.matrices(config.scan_layers, select)


def add_head(
    config: EncoderConfig,
    params: Any,
    num_labels: int,
    key: jax.Array,
    **fields: Any,
) -> tuple[EncoderConfig, Any]:
  """Returns config and weights with a new classification head.

  Args:
    config: of the encoder; a head that it has is left behind.
    params: its weights, not copied.
    num_labels: outputs, >= 1.
    key: of the kernels, normal of standard deviation 0.02; biases are zero.
    **fields: further fields of the config that change: pooling, head.

  Returns:
    The config with a head, and params with `classifier`, of the dtype of the norms'.
  """
  checks.integers(1, num_labels=num_labels)
  config = dataclasses.replace(config, num_labels=num_labels, **fields)
  if config.head == 'dense':
    head: Any = DenseHead(config)
  else:
    head = nn.Dense(num_labels, kernel_init=nn.initializers.normal(0.02))
  like = params['embeddings']['LayerNorm']['scale']
  made = head.init(key, jnp.zeros((1, config.hidden_size)))['params']
  made = jax.tree.map(lambda x: x.astype(like.dtype), made)
  return config, {**params, 'classifier': made}


def make_classification_loss(
    config: EncoderConfig,
) -> Callable[[Any, Batch, Any], tuple[jax.Array, parts.Weighted]]:
  """Returns the loss of telling the label of each row.

  Args:
    config: of an encoder with a head of at least two labels.

  Returns:
    (params, batch, key) -> (mean cross-entropy in nats a row, `Weighted` by the sum
    of weights: {'accuracy': mean by weight, 'correct': rows of a weight that are
    told right, int32}). The batch holds tokens (b, s) and labels (b,) int and, where
    wanted, mask (b, s) or lengths (b,), types (b, s), weights (b,), 1 where there
    are none. A label outside of [0, num_labels) makes the value NaN, unless its
    weight is 0.

  Raises:
    ValueError: no head, or one of a single output; a batch with mask and lengths.
  """
  num = config.num_labels
  checks.that(num >= 2, 'a head of at least two labels', num_labels=num)

  def loss(params, batch, key=None):
    del key
    tokens, labels, mask = batch['tokens'], batch['labels'], batch.get('mask')
    if 'lengths' in batch:
      checks.that(mask is None, 'a mask or lengths', batch=sorted(batch))
      mask = mask_of(batch['lengths'], tokens.shape[1])
    out = apply(config, params, tokens, mask, batch.get('types'))
    assert out.logits is not None
    weights = batch.get('weights')
    weights = jnp.ones(labels.shape) if weights is None else weights
    weights = jax.lax.stop_gradient(weights)
    value, weight = cross_entropy(out.logits, labels, weights)
    is_right = jnp.argmax(out.logits, axis=1) == labels
    right = jnp.vdot(weights.astype(value.dtype), is_right.astype(value.dtype))
    aux = {
        'accuracy': right / jnp.where(weight > 0, weight, 1),
        'correct': jnp.sum(is_right & (weights > 0), dtype=jnp.int32),
    }
    return value, parts.Weighted(weight, aux)

  return loss


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the mean cross-entropy by weight, and the sum of the weights.

  Args:
    logits: (b, K).
    labels: (b,) int; one outside of [0, K) makes the value NaN, unless its weight
      is 0.
    weights: (b,).

  Returns:
    Scalars of float32 or wider; the mean is 0 where nothing weighs.
  """
  num = logits.shape[1]
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  weights = weights.astype(logits.dtype)
  # A negative one would be counted from the end.
  labels = jnp.where(labels < 0, num, labels)
  labels = jnp.where(weights == 0, 0, labels)
  log_probs = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
  weight = jnp.sum(weights)
  return -jnp.vdot(weights, chosen) / jnp.where(weight > 0, weight, 1), weight


def apply(
    config: EncoderConfig,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    types: jax.Array | None = None,
) -> Output:
  """Returns what an encoder makes of tokens, see `Encoder`."""
  made = Encoder(config).apply({'params': params}, tokens, mask, types)
  assert isinstance(made, Output)
  return made
