"""Tokenizers of checkpoint folders in the format of Hugging Face.

`tokenizer.json` says how text is cut and which special tokens are put around it;
the library tokenizers runs it as it stands. `tokenizer_config.json` and its older
companions name the special tokens, may add tokens, and bring the chat template.
All is read in the order of precedence of transformers 5, but for one thing: that
library rebuilds the normaliser and pre-tokeniser of some classes from the class and
ignores those of tokenizer.json; here the file decides, as in transformers 4 and
`PreTrainedTokenizerFast`. Where this is known to matter (`LlamaTokenizer`, and so
the files of Llama 2) `load` warns.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any
import warnings

import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import files

try:
  import tokenizers
except ImportError as e:
  raise ImportError(
      'Expected the library tokenizers, got none: pip install'
      " 'bernoulli_lora_jax[hf]'."
  ) from e

_NAMES = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')
_NAMED = tuple(f'{name}_token' for name in _NAMES)
# What `clean_up_tokenization_spaces` takes away from decoded text, in this order.
_CLEANED = (' .', ' ?', ' !', ' ,', " ' ", " n't", " 'm", " 's", " 've", " 're")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Text to ids and back, with what a chat template needs; made by `load`."""

  backend: tokenizers.Tokenizer
  special_tokens: Mapping[str, str]  # {'bos_token': '<s>', ...}
  chat_template: str | None = None
  tool_template: str | None = None  # Takes its place where there are tools.
  cleans_up: bool = False  # Decoded text loses spaces before punctuation.
  conflict: str = ''  # Why it is not known which special tokens to add.

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    """Returns ids.

    Args:
      text: whatever length; nothing is truncated or padded. Special tokens that
        are written out in it become their ids.
      add_special_tokens: adds what tokenizer.json puts around a text.

    Raises:
      ValueError: special tokens asked for where the files contradict each other.
    """
    if add_special_tokens and self.conflict:
      raise ValueError(self.conflict)
    encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
    return encoding.ids

  def decode(
      self, ids: Iterable[int], skip_special_tokens: bool = False
  ) -> str:
    """Returns the text of ids."""
    text = self.backend.decode(
        [int(i) for i in ids], skip_special_tokens=skip_special_tokens
    )
    if self.cleans_up:
      for written in _CLEANED:
        text = text.replace(written, written.strip())
    return text

  @property
  def vocab_size(self) -> int:
    """The number of tokens, those that were added included."""
    return self.backend.get_vocab_size(with_added_tokens=True)

  @property
  def bos_token(self) -> str | None:
    return self.special_tokens.get('bos_token')

  @property
  def eos_token(self) -> str | None:
    return self.special_tokens.get('eos_token')

  @property
  def pad_token(self) -> str | None:
    return self.special_tokens.get('pad_token')

  @property
  def bos_id(self) -> int | None:
    return self._id(self.bos_token)

  @property
  def eos_id(self) -> int | None:
    return self._id(self.eos_token)

  @property
  def pad_id(self) -> int | None:
    return self._id(self.pad_token)

  def _id(self, token):
    return None if token is None else self.backend.token_to_id(token)


def load(folder: files.Path) -> Tokenizer:
  """Reads the tokenizer of a checkpoint folder.

  Args:
    folder: has tokenizer.json; beside it may be tokenizer_config.json,
      special_tokens_map.json, added_tokens.json, chat_template.jinja and
      additional_chat_templates/.

  Returns:
    A tokenizer of which special tokens and added tokens are in the vocabulary.
    `add_bos_token` and `add_eos_token` of a config do nothing beside a
    tokenizer.json, as in transformers 5 (version 4 honoured them for some
    classes): where they say otherwise than it, encoding with special tokens is
    refused. Chats write their own and are not concerned.

  Raises:
    FileNotFoundError: no folder, or one without tokenizer.json.
    ValueError: a file that is broken or contradicts another one, by name.
  """
  folder = pathlib.Path(folder)
  backend = _backend(folder)
  config = _read(folder / 'tokenizer_config.json')
  try:
    special_tokens = _add_tokens(backend, config, folder)
  except (TypeError, KeyError, AttributeError) as e:
    raise ValueError(
        f'Expected tokens in the JSON files of {folder} as text or'
        f' {{"content": ...}}, got: {e}.'
    ) from e
  _warn_of_class(backend, config, folder)
  templates = _chat_templates(folder, config)
  # As transformers 5: spaces of a BPE are text, and stay.
  is_bpe = isinstance(backend.model, tokenizers.models.BPE)
  forced = (
      'clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output'
  )
  cleans_up = bool(config.get('clean_up_tokenization_spaces')) and (
      not is_bpe or bool(config.get(forced))
  )
  backend.encode_special_tokens = bool(config.get('split_special_tokens'))
  found = Tokenizer(
      backend=backend,
      special_tokens=special_tokens,
      chat_template=templates.get('default'),
      tool_template=templates.get('tool_use'),
      cleans_up=cleans_up,
  )
  return dataclasses.replace(found, conflict=_conflict(found, config))


def encode_rows(
    words: Tokenizer,
    texts: Sequence[str],
    length: int,
    pairs: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
  """Returns texts as rows for an encoder, special tokens around each.

  Args:
    words: of the checkpoint; tokenizer.json puts special tokens around a text.
    texts: to be told apart; as they are, of any length.
    length: of all rows. Longer texts are cut at their end, within their special
      tokens; of a pair the longer text first.
    pairs: second texts, one for each; None for none.

  Returns:
    {'tokens': (b, length) int32, padded at the end; 'mask': (b, length) bool, False
    of padding; 'types': (b, length) int32, of pairs}.

  Raises:
    ValueError: no texts, pairs of another number, a tokenizer without a token for
      padding or whose tokenizer.json puts no special tokens around a text, a length
      that these fill, files that contradict each other.
  """
  if words.conflict:
    raise ValueError(words.conflict)
  texts, pairs = list(texts), None if pairs is None else list(pairs)
  checks.that(len(texts) > 0, 'at least one text', texts=texts)
  if pairs is not None and len(pairs) != len(texts):
    raise ValueError(
        f'Expected {len(texts)} pairs, one for each text, got {len(pairs)}.'
    )
  around = words.backend.num_special_tokens_to_add(pairs is not None)
  if not around or words.pad_id is None:
    raise ValueError(
        'Expected a tokenizer that pads, and puts special tokens around a text, got'
        f' pad_token={words.pad_token!r} and {around} of these.'
    )
  checks.integers(around + 1, length=length)
  given = texts if pairs is None else list(zip(texts, pairs, strict=True))
  found = _cutting(words, int(length)).encode_batch(given)
  tokens = np.full((len(found), length), words.pad_id, np.int32)
  mask, types = np.zeros(tokens.shape, bool), np.zeros_like(tokens)
  for i, row in enumerate(found):
    size = len(row.ids)
    tokens[i, :size], types[i, :size] = row.ids, row.type_ids
    mask[i, :size] = True
  return {'tokens': tokens, 'mask': mask, 'types': types}


@functools.lru_cache(maxsize=16)
def _cutting(words: Tokenizer, length: int) -> tokenizers.Tokenizer:
  """Returns a copy of the backend that cuts at a length."""
  backend = tokenizers.Tokenizer.from_str(words.backend.to_str())
  backend.encode_special_tokens = words.backend.encode_special_tokens
  backend.enable_truncation(length, strategy='longest_first')
  return backend


def _backend(folder: pathlib.Path) -> tokenizers.Tokenizer:
  path = folder / 'tokenizer.json'
  if not path.is_file():
    others = 'tokenizer.model', 'tekken.json', 'vocab.json', 'vocab.txt'
    found = [name for name in others if (folder / name).is_file()]
    got = f'{" and ".join(found)} alone' if found else 'none'
    raise FileNotFoundError(
        f'Expected tokenizer.json in {folder}, got {got}: save_pretrained of a'
        ' fast tokenizer of transformers writes it.'
    )
  content = _read(path)
  # Else the first space of a word has no character: chat.py tells tokens by them.
  _keep_offsets(content.get('post_processor'))
  try:
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
  except Exception as e:  # The library raises no narrower one.
    raise ValueError(
        f'Expected {path} to be a file of the library tokenizers, got: {e}.'
    ) from e
  backend.no_truncation()
  backend.no_padding()
  return backend


def _keep_offsets(part: Any) -> None:
  """Switches `trim_offsets` off, in place; ids are the same."""
  if isinstance(part, dict):
    if 'trim_offsets' in part:
      part['trim_offsets'] = False
    part = list(part.values())
  if isinstance(part, list):
    for x in part:
      _keep_offsets(x)


def _warn_of_class(
    backend: tokenizers.Tokenizer,
    config: dict[str, Any],
    folder: pathlib.Path,
) -> None:
  """Warns of a file that `LlamaTokenizer` of transformers 5 would not follow."""
  name = str(config.get('tokenizer_class')).removesuffix('Fast')
  before = backend.pre_tokenizer
  if name != 'LlamaTokenizer' or 'ByteLevel' in repr(before):
    return
  scheme = 'always' if config.get('legacy') else 'first'
  if config.get('add_prefix_space') is False:
    scheme = 'never'
  is_metaspace = isinstance(before, tokenizers.pre_tokenizers.Metaspace)
  if backend.normalizer or not is_metaspace or before.prepend_scheme != scheme:
    warnings.warn(
        f'{folder / "tokenizer.json"} is followed as it stands; {name} of'
        ' transformers 5 does not and writes other spaces beside special tokens.',
        stacklevel=3,
    )


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object of a JSON file, empty where there is no file."""
  try:
    value = json.loads(_text(path)) if path.is_file() else {}
  except json.JSONDecodeError as e:
    raise ValueError(f'Expected JSON in {path}, got {e}.') from e
  checks.that(isinstance(value, dict), f'{path} to be a JSON object', got=value)
  return value


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding='utf-8')
  except UnicodeDecodeError as e:
    raise ValueError(f'Expected {path} in UTF-8, got: {e}.') from e


def _add_tokens(
    backend: tokenizers.Tokenizer,
    config: dict[str, Any],
    folder: pathlib.Path,
) -> dict[str, str]:
  """Adds what the vocabulary lacks; returns the special tokens by their names."""
  listed = config.get('added_tokens_decoder', {})
  checks.that(
      all(i.isdigit() for i in listed),
      f'ids as the keys of added_tokens_decoder in {folder}',
      got=list(listed),
  )
  declared = {int(i): _token(x) for i, x in listed.items()}
  if 'added_tokens_decoder' not in config:  # Files of before 2023.
    config |= _read(folder / 'special_tokens_map.json')
  extra = config.get('extra_special_tokens')
  extra = extra or config.get('additional_special_tokens') or []
  named = {
      key: _token(x, special=True)
      for key, x in config.items()
      if key in _NAMED or key.endswith('_token') and isinstance(x, str)
      if x is not None
  }
  if isinstance(extra, dict):
    named |= {key: _token(x, special=True) for key, x in extra.items()}
    extra = []
  special = [*named.values(), *(_token(x, special=True) for x in extra)]
  if 'added_tokens_decoder' not in config:
    names = {token.content for token in special}
    for text, i in _read(folder / 'added_tokens.json').items():
      is_special = text in names
      declared[i] = tokenizers.AddedToken(
          text, normalized=not is_special, special=is_special
      )

  known = backend.get_added_tokens_decoder()
  wanted = declared
  if 'added_tokens_decoder' not in config:
    wanted = declared | known  # The file itself knows better what they are.
  new = [
      token
      for _, token in sorted(wanted.items())
      if repr(token) not in map(repr, known.values())
  ]
  texts = {token.content for token in (*known.values(), *new)}
  for token in special:
    if token.content not in texts:
      new.append(token)
      texts.add(token.content)
  backend.add_tokens(new)
  for i, token in declared.items():
    got = backend.token_to_id(token.content)
    checks.that(
        got == i,
        f'the ids of added tokens in {folder} to agree with tokenizer.json',
        **{'token': repr(token.content), 'declared': i, 'id': got},
    )
  return {key: token.content for key, token in named.items()}


def _token(x: Any, special: bool = False) -> tokenizers.AddedToken:
  if isinstance(x, str):
    return tokenizers.AddedToken(x, special=special)
  options: dict[str, Any] = {k: v for k, v in x.items() if k != '__type'}
  if special:
    options['special'] = True
  return tokenizers.AddedToken(**options)


def _chat_templates(
    folder: pathlib.Path, config: dict[str, Any]
) -> dict[str, str]:
  """Returns {name: template}; files take the place of all in the config."""
  found = {
      path.stem: _text(path)
      for path in (folder / 'additional_chat_templates').glob('*.jinja')
  }
  if (folder / 'chat_template.jinja').is_file():
    found['default'] = _text(folder / 'chat_template.jinja')
  template = config.get('chat_template')
  if found or template is None:
    return found
  if isinstance(template, str):
    return {'default': template}
  try:
    found = {entry['name']: entry['template'] for entry in template}
  except (TypeError, KeyError):
    found = {}
  if 'default' not in found:
    raise ValueError(
        f'Expected chat_template in {folder / "tokenizer_config.json"} as text or'
        ' a list of {"name", "template"} with one named default, got'
        f' {sorted(found) or template}.'
    )
  return found


def _conflict(found: Tokenizer, config: dict[str, Any]) -> str:
  """Tells in which special tokens the config contradicts tokenizer.json."""
  if {config.get('add_bos_token'), config.get('add_eos_token')} == {None}:
    return ''
  bare = found.backend.encode('a', add_special_tokens=False).ids
  ids = found.backend.encode('a', add_special_tokens=True).ids
  starts = [i for i in range(len(ids)) if ids[i : i + len(bare)] == bare]
  start = starts[0] if bare and starts else 0
  # What is put around a text; around nothing, which side it is cannot be told.
  around = {
      'bos': ids[:start] if bare else ids,
      'eos': ids[start + len(bare) :],
  }
  for name, added in around.items():
    key, token_id = f'add_{name}_token', getattr(found, f'{name}_id')
    said, does = config.get(key), token_id in added
    if said is not None and bool(said) != does:
      return (
          f'Expected {key}={said} of tokenizer_config.json to be what'
          f' tokenizer.json does, got one that adds {"it" if does else "none"}:'
          ' correct either file, or encode with add_special_tokens=False.'
      )
  return ''
