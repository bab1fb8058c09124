"""Greedy and sampled generation with a cache: to look at what a model says.

Prompts of several lengths share a batch. Each row writes its own places of the cache,
so a row's tokens are those that it would get alone.
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.models import decoder


class _State(NamedTuple):
  """Between two tokens."""

  cache: decoder.Cache | None
  token: jax.Array  # (b,), the last one, not yet in the cache.
  position: jax.Array  # (b,), of that token.
  done: jax.Array  # (b,), whether a row has ended.


def generate(
    config: decoder.DecoderConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    end_tokens: Sequence[int] = (),
) -> list[list[int]]:
  """Returns what follows each prompt.

  Args:
    config: of the decoder.
    params: its weights.
    prompts: tokens of each row, at least one, of any lengths.
    max_new_tokens: most tokens a row, >= 1.
    temperature: 0 takes the likeliest token, else logits are divided by it.
    top_k: only the k likeliest tokens are drawn; 0 for all.
    top_p: only the likeliest tokens that together have this probability are
      drawn, in (0, 1].
    key: typed PRNG key, of sampling. Each row draws by its number and position.
    end_tokens: a row ends with one of them; it is not returned.

  Returns:
    The new tokens of each row.

  Raises:
    ValueError: an argument outside its range, tokens that the model lacks, sampling
      without a key.
  """
  checks.integers(1, max_new_tokens=max_new_tokens)
  checks.that(temperature >= 0, 'temperature >= 0', temperature=temperature)
  checks.integers(0, top_k=top_k)
  vocab_size = config.vocab_size
  checks.that(top_k <= vocab_size, f'top_k <= {vocab_size}', top_k=top_k)
  checks.within('(0, 1]', top_p=top_p)
  if temperature > 0 and key is None:
    raise ValueError(f'Expected a key to sample at temperature={temperature}.')
  rows = [np.asarray(prompt) for prompt in prompts]
  if not rows or not all(row.ndim == 1 and row.size for row in rows):
    raise ValueError('Expected prompts of at least one token each.')
  for row in rows:
    is_whole = np.issubdtype(row.dtype, np.integer)
    checks.that(is_whole, 'tokens that are whole numbers', dtype=row.dtype)
  is_list = np.ndim(end_tokens) == 1
  checks.that(is_list, 'a list of end_tokens', end_tokens=end_tokens)
  lengths = np.array([len(row) for row in rows], np.int32)
  tokens = np.zeros((len(rows), lengths.max()), np.int64)
  for place, row in zip(tokens, rows, strict=True):
    place[: len(row)] = row
  if tokens.min() < 0 or tokens.max() >= config.vocab_size:
    raise ValueError(
        f'Expected tokens in [0, {config.vocab_size}), got'
        f' {tokens.min()} to {tokens.max()}.'
    )
  made = _run(
      config,
      max_new_tokens,
      (temperature, top_k, top_p),
      params,
      jnp.asarray(tokens, jnp.int32),
      jnp.asarray(lengths),
      jax.random.key(0) if key is None else key,
      jnp.asarray(end_tokens, jnp.int32),
  )
  ends = set(map(int, end_tokens))
  return [_until(row, ends) for row in np.asarray(made).tolist()]


def _until(row: list[int], ends: set[int]) -> list[int]:
  """Returns a row up to the first token that ends it."""
  first = next((i for i, token in enumerate(row) if token in ends), len(row))
  return row[:first]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    config: decoder.DecoderConfig,
    num: int,
    how: tuple[float, int, float],
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    ends: jax.Array,
) -> jax.Array:
  """Returns (b, num) tokens."""
  rows, longest = tokens.shape
  # Entries after a row's prompt are garbage until the row writes them.
  dtype = jax.tree.leaves(params)[0].dtype
  dtype = dtype if config.dtype is None else config.dtype
  cache = decoder.make_cache(config, rows, longest + num, dtype)
  out = decoder.apply(config, params, tokens, cache=cache)
  last = lengths - 1
  hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)
  pick = functools.partial(_pick, how, key)
  first = pick(decoder.logits(out._replace(hidden=hidden))[:, 0], lengths)

  def is_unfinished(carry):
    step, state, _ = carry
    return (step < num) & ~jnp.all(state.done)

  def advance(carry):
    step, state, made = carry
    made = made.at[:, step].set(state.token)
    token, place = state.token[:, None], state.position[:, None]
    out = decoder.apply(config, params, token, place, cache=state.cache)
    position = state.position + 1
    token = pick(decoder.logits(out)[:, 0], position)
    done = state.done | jnp.isin(token, ends)
    return step + 1, _State(out.cache, token, position, done), made

  state = _State(out.cache, first, lengths, jnp.isin(first, ends))
  # Once all rows have ended the rest stays an end.
  made = jnp.full((rows, num), ends[0] if ends.size else 0, jnp.int32)
  _, state, made = jax.lax.while_loop(is_unfinished, advance, (0, state, made))
  return made


def _pick(
    how: tuple[float, int, float],
    key: jax.Array,
    logits: jax.Array,
    positions: jax.Array,
) -> jax.Array:
  """Returns a token of each row of logits (b, vocabulary)."""
  temperature, top_k, top_p = how
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # What is below the least float, or makes logits infinite, is greedy too.
  temperature = max(temperature, float(jnp.finfo(jnp.float32).tiny))
  logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
  if top_k:
    least = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p < 1:
    order = jnp.sort(logits, axis=-1)[:, ::-1]
    before = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1)
    before -= jax.nn.softmax(order, axis=-1)
    kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    least = jnp.take_along_axis(order, kept - 1, axis=-1)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  rows = jnp.arange(logits.shape[0])
  fold = lambda row, place: jax.random.fold_in(
      jax.random.fold_in(key, row), place
  )
  keys = jax.vmap(fold)(rows, positions)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
