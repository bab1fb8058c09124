"""Text for decoders: files to tokenised documents, with what of them is trained.

    tokenizer = tokenizer_lib.load(folder)
    found = text.load('chats.jsonl', tokenizer, kind='instruction',
                      max_length=1024, eval_fraction=0.05)
    print(text.show(found['train'], tokenizer))

Files are read and tokenised once, into memory: what is bad or too long is known
before the first step.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import glob
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any, NamedTuple, Protocol
import warnings

import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.models import chat
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import packing

KINDS = ('instruction', 'language_model')
OVER_LIMIT = ('error', 'truncate', 'drop')
TURNS = ('all', 'last', 'each')
_SUFFIXES = ('.jsonl', '.md', '.txt')  # Of files that a folder is read for.
_NAMED = 3  # Bad lines that a message has in full.


class TextTokenizer(Protocol):
  """What plain text needs of a tokenizer."""

  @property
  def eos_id(self) -> int | None:
    ...

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    ...

  def decode(self, ids: Any) -> str:
    ...


class Bytes:
  """The bytes of UTF-8 as tokens, and an end token of id 256."""

  eos_id = 256
  vocab_size = 257

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    """Returns the bytes of a text, none beside them."""
    return list(text.encode())

  def decode(self, ids: Any) -> str:
    """Returns the text of ids, <end> for the end token."""
    runs = itertools.groupby(ids, lambda i: int(i) == self.eos_id)
    return ''.join(
        '<end>' * len(list(run))
        if is_end
        else bytes(int(i) for i in run).decode(errors='replace')
        for is_end, run in runs
    )


class Encoding(NamedTuple):
  """How a text or a line becomes documents.

  Attributes:
    tokenizer: of `tokenizer.load`, or `Bytes()`.
    max_length: most tokens of a document.
    template: whether a prompt and its completion are turns of a chat.
    turns: of a conversation that are trained: 'all' or the 'last' one of the
      assistant's; 'each' makes a document of each, for templates that write
      earlier turns anew.
  """

  tokenizer: TextTokenizer
  max_length: int
  template: bool = False
  turns: str = 'all'


class _BadLineError(ValueError):
  """A line that is not as it should be."""


def load(
    data: str | os.PathLike[str],
    tokenizer: TextTokenizer,
    *,
    kind: str,
    max_length: int,
    eval_fraction: float = 0.0,
    eval_data: str | os.PathLike[str] = '',
    separator: str = '',
    template: bool = False,
    turns: str = 'all',
    over_limit: str = 'error',
    skip_bad: bool = False,
) -> dict[str, packing.Documents]:
  """Reads and tokenises files.

  Args:
    data: a file, a folder (its .jsonl, .md and .txt files, at any depth) or a glob
      pattern. Lines of .json and .jsonl files are documents, see `kind`; any other
      file is one document of text, or several, see `separator`.
    tokenizer: of `tokenizer.load`, or `Bytes()`.
    kind: 'instruction': lines {"messages": [...]}, of which the assistant's turns
      are trained, see `chat.encode_chat` ("tools" may stand beside them), or
      {"prompt": ..., "completion": ...}, of which the completion and an end token
      are. 'language_model': text, or lines {"text": ...}, trained as a whole: an end
      token is added, and what is longer than max_length is cut into windows that
      share one token, so that each token but a document's first is predicted once.
    max_length: most tokens of a document, >= 2.
    eval_fraction: part of the documents that is held out, in [0, 1): by a hash of
      their content, whatever file, place or tokenizer; equal ones stay together.
    eval_data: files in place of it.
    separator: of the documents in files of text, such as '\\n\\n'; '' for none.
    template: see `Encoding`.
    turns: see `Encoding`.
    over_limit: what becomes of instructions longer than max_length: 'error',
      'truncate' (from their end) or 'drop', with a warning of how many.
    skip_bad: bad lines are left out, with a warning, in place of an error.

  Returns:
    'train', and where something is held out, 'validation'.

  Raises:
    FileNotFoundError: no such files.
    ValueError: bad lines, by file, line and reason; an argument outside its range;
      a part without documents.
  """
  checks.one_of(KINDS, kind=kind)
  checks.one_of(TURNS, turns=turns)
  checks.one_of(OVER_LIMIT, over_limit=over_limit)
  checks.integers(2, max_length=max_length)
  checks.within('[0, 1)', eval_fraction=eval_fraction)
  checks.that(
      not (eval_data and eval_fraction),
      'eval_data or eval_fraction',
      eval_data=eval_data,
      eval_fraction=eval_fraction,
  )
  encoding = Encoding(tokenizer, max_length, template, turns)
  encode = _encode_text if kind == 'language_model' else _encode_instruction
  read = functools.partial(
      _read,
      encode=functools.partial(encode, encoding=encoding),
      separator=separator,
      over_limit=over_limit,
      max_length=max_length,
      skip_bad=skip_bad,
  )
  train, held_out = read(data, eval_fraction=eval_fraction)
  found = {'train': train}
  if eval_data:
    found['validation'] = read(eval_data, eval_fraction=0.0)[0]
  elif eval_fraction:
    found['validation'] = held_out
  for part, documents in found.items():
    counts = {name: len(x) for name, x in found.items()}
    checks.that(
        len(documents) > 0,
        f'documents in the part {part!r} of {data}',
        **counts,
        eval_fraction=f'{eval_fraction}: change it, or name eval_data',
    )
  return found


def _read(
    data: str | os.PathLike[str],
    *,
    encode: Callable[[Any], list[packing.Document]],
    separator: str,
    over_limit: str,
    max_length: int,
    skip_bad: bool,
    eval_fraction: float,
) -> tuple[packing.Documents, packing.Documents]:
  """Returns the documents of files, and those that are held out."""
  parts: tuple[list[packing.Document], ...] = ([], [])
  bad, count, num_long, num_untrained = [], 0, 0, 0
  for where, content in _contents(data, separator):
    count += 1
    try:
      value = _parsed(content) if isinstance(content, bytes) else content
      pieces = encode(value)
      if not any(any(mask[1:]) for _, mask in pieces):
        raise _BadLineError('no token that could be trained')
    except _BadLineError as e:
      bad.append(f'{where} ({e})')
      continue
    part = parts[_hash(value) < eval_fraction]
    for ids, mask in pieces:
      if len(ids) > max_length:
        num_long += 1
        if over_limit == 'drop':
          continue
        ids, mask = ids[:max_length], mask[:max_length]
        num_untrained += not any(mask[1:])
      if any(mask[1:]):
        part.append(_compact(ids, mask))
  checks.that(count > 0, f'text in {data}', documents=0)
  if bad:
    _report_bad(data, bad, count, skip_bad)
  if num_long:
    _report_long(data, num_long, num_untrained, max_length, over_limit)
  return packing.Documents.of(parts[0]), packing.Documents.of(parts[1])


def _compact(ids: Sequence[int], mask: Sequence[bool]) -> packing.Document:
  return np.asarray(ids, np.int32), np.asarray(mask, bool)  # pyrefly: ignore


def _report_bad(data: Any, bad: list[str], count: int, skip_bad: bool) -> None:
  """Warns of bad lines, or raises where none is good or none may be skipped."""
  named = ', '.join(bad[:_NAMED])
  more = f', and {len(bad) - _NAMED} more' if len(bad) > _NAMED else ''
  what = f'{len(bad)} bad of {count}: {named}{more}'
  if skip_bad and len(bad) < count:
    warnings.warn(f'Left out of {data}: {what}.', stacklevel=4)
    return
  advice = 'none is left' if skip_bad else 'correct them, or skip_bad=True'
  raise ValueError(f'Expected good documents in {data}, got {what}: {advice}.')


def _report_long(
    data: Any, num: int, num_untrained: int, max_length: int, over_limit: str
) -> None:
  what = f'{num} longer than max_length={max_length}'
  if over_limit == 'error':
    raise ValueError(
        f'Expected documents of at most {max_length} tokens in {data}, got {what}:'
        " raise it, or over_limit='truncate' or 'drop'."
    )
  done = 'dropped' if over_limit == 'drop' else 'truncated'
  rest = f', {num_untrained} of them to nothing that is trained: dropped'
  warnings.warn(
      f'Documents of {data}: {what}, {done}{rest if num_untrained else ""}.',
      stacklevel=4,
  )


def _files(data: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Returns the files of a name, a folder or a pattern, in order."""
  path = pathlib.Path(data).expanduser()
  if path.is_file():
    return [path]
  if path.is_dir():
    found = [p for p in path.rglob('*') if p.suffix in _SUFFIXES]
    what = f'{", ".join(_SUFFIXES)} files in the folder {data}'
  else:
    found = map(pathlib.Path, glob.glob(str(path), recursive=True))
    what = f'a file, a folder or a pattern of files in {data}'
  found = sorted(p for p in found if p.is_file())
  if not found:
    raise FileNotFoundError(f'Expected {what}, got none.')
  return found


def _contents(
    data: str | os.PathLike[str], separator: str
) -> Iterator[tuple[str, str | bytes]]:
  """Yields documents with their places: text, or bytes of a line of JSON."""
  files = _files(data)
  for path in files:
    name = f'{path.name} ' if len(files) > 1 else ''
    raw = path.read_bytes()
    if not raw.strip():
      raise ValueError(f'Expected text in {path}, got an empty file.')
    if path.suffix in ('.json', '.jsonl'):
      for number, line in enumerate(raw.split(b'\n'), start=1):
        if line.strip():
          yield f'{name}line {number}', line
      continue
    try:
      text = raw.decode('utf-8-sig')
    except UnicodeDecodeError as e:
      raise ValueError(f'Expected {path} in UTF-8, got: {e}.') from e
    for i, part in enumerate(text.split(separator) if separator else [text]):
      if part.strip():
        yield f'{name}document {i + 1}', part


def _parsed(line: bytes) -> dict[str, Any]:
  try:
    value = json.loads(line.decode('utf-8-sig'))
  except ValueError as e:  # UnicodeDecodeError is one, too.
    raise _BadLineError(f'no JSON: {e}') from e
  if not isinstance(value, dict):
    raise _BadLineError(f'no JSON object: {value!r:.40}')
  return value


def _hash(value: str | dict[str, Any]) -> float:
  """Returns a number in [0, 1) by the content of a document."""
  if isinstance(value, dict):
    fields = 'messages', 'tools', 'prompt', 'completion', 'text'
    value = json.dumps([value.get(k) for k in fields], sort_keys=True)
  digest = hashlib.sha256(value.encode('utf-8', 'surrogatepass')).digest()
  return int.from_bytes(digest[:6]) / 2**48


def _string(record: dict[str, Any], name: str) -> str:
  """Returns a field that is text."""
  if name not in record:
    raise _BadLineError(f'no field {name!r} among {sorted(record)}')
  value = record[name]
  if not isinstance(value, str):
    raise _BadLineError(f'{name!r} is no text but {value!r:.40}')
  return value


def _end(tokenizer: TextTokenizer) -> int:
  if tokenizer.eos_id is None:
    raise ValueError(
        'Expected a tokenizer with an end token, got none: name eos_token in its'
        ' tokenizer_config.json.'
    )
  return tokenizer.eos_id


def _encode_text(
    value: str | dict[str, Any], *, encoding: Encoding
) -> list[packing.Document]:
  """Returns the windows of a text."""
  text = value if isinstance(value, str) else _string(value, 'text')
  if not text.strip():
    raise _BadLineError("'text' is empty")
  end = _end(encoding.tokenizer)
  ids = encoding.tokenizer.encode(text)
  ids = ids if ids[-1:] == [end] else [*ids, end]
  length = encoding.max_length
  starts = range(0, max(1, len(ids) - 1), length - 1)
  windows = [ids[start : start + length] for start in starts]
  return [(x, [False] + [True] * (len(x) - 1)) for x in windows]


def _encode_instruction(
    value: str | dict[str, Any], *, encoding: Encoding
) -> list[packing.Document]:
  """Returns the documents of a conversation, or of a prompt and completion."""
  if isinstance(value, str):
    raise ValueError(
        'Expected JSON lines, files named .json or .jsonl, for'
        f" kind='instruction', got text: {value!r:.40}."
    )
  if 'messages' in value:
    if {'prompt', 'completion'} & value.keys():
      raise _BadLineError("both 'messages' and 'prompt' or 'completion'")
    return _encode_messages(value['messages'], value.get('tools'), encoding)
  if not {'prompt', 'completion'} & value.keys():
    raise _BadLineError(
        "neither 'messages' nor 'prompt' and 'completion' among"
        f' {sorted(value)}'
    )
  prompt, completion = (_string(value, k) for k in ('prompt', 'completion'))
  if not completion.strip():
    raise _BadLineError("'completion' is empty")
  if encoding.template:
    messages = [
        {'role': 'user', 'content': prompt},
        {'role': 'assistant', 'content': completion},
    ]
    return _encode_messages(messages, None, encoding)
  end = _end(encoding.tokenizer)
  ids, mask = _encode_pair(encoding.tokenizer, prompt, completion)
  if ids[-1] == end:  # The tokenizer adds it itself.
    return [(ids, [*mask[:-1], True])]
  return [([*ids, end], [*mask, True])]


def _encode_pair(
    tokenizer: TextTokenizer, prompt: str, completion: str
) -> packing.Document:
  """Returns a prompt with its completion, tokenised as one text.

  A token with any character of the completion is trained, as in `chat`.
  """
  if not isinstance(tokenizer, tokenizer_lib.Tokenizer):
    parts = [tokenizer.encode(x) for x in (prompt, completion)]
    return parts[0] + parts[1], [False] * len(parts[0]) + [True] * len(parts[1])
  if tokenizer.conflict:
    raise ValueError(tokenizer.conflict)
  found = tokenizer.backend.encode(prompt + completion)
  return found.ids, [
      end > max(start, len(prompt)) for start, end in found.offsets
  ]


def _encode_messages(
    messages: Any, tools: Any, encoding: Encoding
) -> list[packing.Document]:
  """Returns the documents of a conversation."""
  tokenizer = encoding.tokenizer
  if getattr(tokenizer, 'chat_template', None) is None:
    raise ValueError(
        'Expected a tokenizer with a chat template for messages, got none: put'
        ' its chat_template.jinja into the folder, or give prompt and completion.'
    )
  if not isinstance(messages, list) or not messages:
    raise _BadLineError(f"'messages' is no list of turns but {messages!r:.40}")
  assert isinstance(tokenizer, tokenizer_lib.Tokenizer)
  one = functools.partial(chat.encode_chat, tokenizer, tools=tools)
  try:
    if encoding.turns != 'each':
      return [one(messages, turns=encoding.turns)]
    asked = [
        k
        for k, message in enumerate(messages)
        if isinstance(message, dict) and message.get('role') == 'assistant'
    ]
    ends = asked or [len(messages) - 1]  # Which is refused, with the reason.
    return [one(messages[: k + 1], turns='last') for k in ends]
  except (TypeError, ValueError) as e:
    raise _BadLineError(str(e).removesuffix('.')) from e


def check_vocabulary(
    documents: packing.Documents, tokenizer: TextTokenizer, vocab_size: int
) -> None:
  """Raises ValueError where documents have ids that a model has no rows for."""
  largest = int(documents.tokens.max())
  checks.that(
      largest < vocab_size,
      f'ids of tokens below {vocab_size}, the vocab_size of the model',
      id=f'{largest} ({tokenizer.decode([largest])!r}): take its own tokenizer',
  )


def show(
    documents: packing.Documents, tokenizer: TextTokenizer, count: int = 2
) -> str:
  """Returns the first documents as text; what is trained stands in «».

  Args:
    documents: of `load`.
    tokenizer: theirs.
    count: of documents.
  """
  lines = []
  for i in range(min(count, len(documents))):
    document = documents[i]
    trained = document['weights'] > 0
    num, size = int(trained.sum()), len(trained)
    lines.append(f'--- document {i}: {num} of {size} tokens trained')
    borders = np.flatnonzero(np.diff(trained)) + 1
    runs = np.split(np.arange(size), borders)
    texts = [tokenizer.decode(document['tokens'][run]) for run in runs]
    lines.append(
        ''.join(
            f'«{text}»' if trained[run[0]] else text
            for run, text in zip(runs, texts, strict=True)
        )
    )
  return '\n'.join(lines)
