"""Text for decoders: files to tokenised documents, with what of them is trained.

    tokenizer = tokenizer_lib.load(folder)
    found = text.load('chats.jsonl', tokenizer, max_length=1024,
                      eval_fraction=0.05)
    print(text.show(found['train'], tokenizer))

Files are read and tokenised once, into memory: what is bad or too long is known
before the first step.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import hashlib
import itertools
import json
import os
import re
from typing import Any, NamedTuple, Protocol
import warnings

import numpy as np

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.models import chat
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import packing
from bernoulli_lora_jax.tasks import records

KINDS = ('auto', 'instruction', 'language_model')
OVER_LIMIT = ('error', 'truncate', 'drop')
TURNS = ('all', 'last', 'each')
_PIECE = 1 << 16  # Characters: the library takes 500 bytes a token of one text.
_PIECES = 16
_BREAK = re.compile(r'\n(?=\n?\S)')  # Indents are often a token with the break.
_ALPACA = '### Instruction:\n{}\n\n### Response:\n'

kind_of = records.kind_of


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
    """Returns the text of ids: <end> for the end token, <i> for others that it lacks."""
    runs = itertools.groupby(map(int, ids), lambda i: i < 256)
    names = lambda run: ('<end>' if i == self.eos_id else f'<{i}>' for i in run)
    return ''.join(
        bytes(run).decode(errors='replace') if is_text else ''.join(names(run))
        for is_text, run in runs
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


def load(
    data: str | os.PathLike[str],
    tokenizer: TextTokenizer,
    *,
    kind: str = 'auto',
    max_length: int,
    eval_fraction: float = 0.0,
    eval_data: str | os.PathLike[str] = '',
    separator: str = '',
    template: bool = False,
    turns: str = 'all',
    over_limit: str = 'error',
    skip_bad: bool = False,
    columns: Mapping[str, str] | None = None,
) -> dict[str, packing.Documents]:
  """Reads and tokenises documents.

  Args:
    data: a file, a folder or a glob pattern; or a dataset, 'owner/name' of the Hub,
      'owner/name/config', each with ':split' after it or of 'train'. Lines of
      .jsonl, records of .json (an array or lines), rows of .parquet, .arrow and
      .csv are documents, see `kind`; any other file is one of text, or several,
      see `separator`. .jsonl.gz, .json.gz and .txt.gz are read, too. A folder is
      one of `datasets.save_to_disk`; or has .parquet files, and is read as on the
      Hub; or its .jsonl, .md and .txt files are, at any depth.
    tokenizer: of `tokenizer.load`, or `Bytes()`.
    kind: 'instruction': records {"messages": [...]}, of which the assistant's turns
      are trained, see `chat.encode_chat` ("tools" may stand beside them), or
      {"prompt": ..., "completion": ...}, of which the completion and an end token
      are; ShareGPT's {"conversations": [{"from", "value"}]} are messages, and so
      are prompt and completion that are lists of turns, of which but the
      completion is trained; Alpaca's {"instruction", "input", "output"} become
      turns where the tokenizer has a template, else the '### Instruction:' text.
      'language_model': text, or records {"text": ...}, trained as a whole: an end
      token is added, and what is longer than max_length is cut into windows that
      share one token, so that each token but a document's first is predicted once.
      'auto': as `kind_of` data says.
    max_length: most tokens of a document, >= 2.
    eval_fraction: part of the documents that is held out, in [0, 1): by a hash of
      their content, whatever file, place or tokenizer; equal ones stay together.
    eval_data: data in place of it.
    separator: of the documents in files of text, such as '\\n\\n'; '' for none.
    template: see `Encoding`.
    turns: see `Encoding`.
    over_limit: what becomes of instructions longer than max_length: 'error',
      'truncate' (from their end) or 'drop', with a warning of how many.
    skip_bad: bad lines are left out, with a warning, in place of an error.
    columns: {name of a field in data: name here}, such as {'question': 'prompt',
      'answer': 'completion'}.

  Returns:
    'train', and where something is held out, 'validation'.

  Raises:
    FileNotFoundError: no such files, and no dataset that could be had.
    ValueError: bad lines, by file, line and reason; an argument outside its range;
      a dataset without that split or known columns; a part without documents.
    ImportError: a dataset, but no library datasets.
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
  if kind == 'auto':
    kind = kind_of(data, separator=separator, columns=columns)
  encode = _encode_text if kind == 'language_model' else _encode_instruction
  read = functools.partial(
      _read,
      encode=functools.partial(encode, encoding=encoding),
      is_instruction=kind == 'instruction',
      separator=separator,
      over_limit=over_limit,
      max_length=max_length,
      skip_bad=skip_bad,
      columns=columns,
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
    is_instruction: bool,
    separator: str,
    over_limit: str,
    max_length: int,
    skip_bad: bool,
    columns: Mapping[str, str] | None,
    eval_fraction: float,
) -> tuple[packing.Documents, packing.Documents]:
  """Returns the documents of files, and those that are held out."""
  parts: tuple[list[packing.Document], ...] = ([], [])
  bad, count, num_long, num_untrained = [], 0, 0, 0
  for where, content in records.contents(data, separator, columns):
    count += 1
    try:
      value = records.parsed(content, columns)
      if is_instruction:
        value = _instruction(value)
      pieces = encode(value)
      if not any(any(mask[1:]) for _, mask in pieces):
        raise records.BadRecordError('no token that could be trained')
    except records.BadRecordError as e:
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
    records.report_bad(data, bad, count, skip_bad)
  if num_long:
    _report_long(data, num_long, num_untrained, max_length, over_limit)
  return packing.Documents.of(parts[0]), packing.Documents.of(parts[1])


def _compact(ids: Sequence[int], mask: Sequence[bool]) -> packing.Document:
  return np.asarray(ids, np.int32), np.asarray(mask, bool)  # pyrefly: ignore


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


def _hash(value: str | dict[str, Any]) -> float:
  """Returns a number in [0, 1) by the content of a document."""
  if isinstance(value, dict):
    fields = 'messages', 'tools', 'prompt', 'completion', 'text'
    value = json.dumps(
        [value.get(k) for k in fields], sort_keys=True, default=str
    )
  digest = hashlib.sha256(value.encode('utf-8', 'surrogatepass')).digest()
  return int.from_bytes(digest[:6]) / 2**48


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
  text = value if isinstance(value, str) else records.string(value, 'text')
  if not text.strip():
    raise records.BadRecordError("'text' is empty")
  end = _end(encoding.tokenizer)
  ids = _encode_long(encoding.tokenizer, text)
  if ids[-1:].tolist() != [end]:
    ids = np.append(ids, np.int32(end))
  length = encoding.max_length
  starts = range(0, max(1, len(ids) - 1), length - 1)
  windows = [ids[start : start + length] for start in starts]
  return [(x, np.arange(len(x)) > 0) for x in windows]  # pyrefly: ignore


def _encode_long(tokenizer: TextTokenizer, text: str) -> np.ndarray:
  """Returns the ids of a text, of a long one from pieces in little memory.

  It is cut behind a line where the ids nearby are the same without the cut; where
  there is no such line, or the tokenizer puts spaces before a text, it stays whole.
  """
  if isinstance(tokenizer, Bytes):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
  if not isinstance(tokenizer, tokenizer_lib.Tokenizer) or len(text) <= _PIECE:
    return np.asarray(tokenizer.encode(text), np.int32)
  bare = functools.partial(tokenizer.encode, add_special_tokens=False)
  around, inside = tokenizer.encode('a'), bare('a')
  places = [
      i
      for i in range(len(around))
      if inside and around[i : i + len(inside)] == inside
  ]
  pieces, start = [], 0
  while places and len(text) - start > _PIECE:
    breaks = _BREAK.finditer(text, start + _PIECE)
    for found in itertools.islice(breaks, 16):
      cut = found.end()
      left, right = text[max(start, cut - 200) : cut], text[cut : cut + 200]
      if bare(left) + bare(right) == bare(left + right):
        break
    else:
      break
    pieces.append(text[start:cut])
    start = cut
  if not pieces:
    return np.asarray(tokenizer.encode(text), np.int32)
  pieces.append(text[start:])
  ids = [np.asarray(around[: places[0]], np.int32)]
  for i in range(0, len(pieces), _PIECES):
    batch = pieces[i : i + _PIECES]
    found = tokenizer.backend.encode_batch_fast(batch, add_special_tokens=False)
    ids.extend(np.asarray(x.ids, np.int32) for x in found)
  ids.append(np.asarray(around[places[0] + len(inside) :], np.int32))
  return np.concatenate(ids)


def _instruction(value: str | dict[str, Any]) -> dict[str, Any]:
  if isinstance(value, str):
    raise ValueError(
        'Expected records, in files named .json or .jsonl or a dataset, for'
        f" kind='instruction', got text: {value!r:.40}."
    )
  return records.instruction(value)


def _encode_instruction(
    value: dict[str, Any], *, encoding: Encoding
) -> list[packing.Document]:
  """Returns the documents of a conversation, or of a prompt and completion."""
  if 'messages' in value:
    if value['turns']:
      encoding = encoding._replace(turns=value['turns'])
    return _encode_messages(value['messages'], value['tools'], encoding)
  prompt, completion = value['prompt'], value['completion']
  has_template = getattr(encoding.tokenizer, 'chat_template', None) is not None
  if encoding.template or value['is_alpaca'] and has_template:
    messages = [
        {'role': 'user', 'content': prompt},
        {'role': 'assistant', 'content': completion},
    ]
    return _encode_messages(messages, None, encoding)
  if value['is_alpaca']:
    prompt = _ALPACA.format(prompt)
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
    messages: list[Any], tools: Any, encoding: Encoding
) -> list[packing.Document]:
  """Returns the documents of a conversation."""
  tokenizer = encoding.tokenizer
  if getattr(tokenizer, 'chat_template', None) is None:
    raise ValueError(
        'Expected a tokenizer with a chat template for messages, got none: put'
        ' its chat_template.jinja into the folder, or give prompt and completion.'
    )
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
    raise records.BadRecordError(records.one_line(e)) from e


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
    documents: packing.Documents,
    tokenizer: TextTokenizer,
    count: int = 2,
    longest: int = 400,
) -> str:
  """Returns the first documents as text; what is trained stands in «».

  Args:
    documents: of `load`.
    tokenizer: theirs.
    count: of documents.
    longest: tokens of a document; of a longer one the middle is left out.
  """
  lines = []
  for i in range(min(count, len(documents))):
    document = documents[i]
    trained, ids = document['weights'] > 0, document['tokens']
    num, size = int(trained.sum()), len(trained)
    lines.append(
        f'--- document {i}: {num} of {size} tokens trained, those in «»'
    )
    write = functools.partial(_marked, tokenizer)
    if size <= longest:
      lines.append(write(ids, trained))
      continue
    head, tail = slice(longest - longest // 2), slice(size - longest // 2, size)
    lines.append(write(ids[head], trained[head]))
    lines.append(f'[... {size - longest} tokens left out ...]')
    lines.append(write(ids[tail], trained[tail]))
  return '\n'.join(lines)


def _marked(
    tokenizer: TextTokenizer, ids: np.ndarray, trained: np.ndarray
) -> str:
  """Returns the text of ids, runs that are trained in «»."""
  borders = np.flatnonzero(np.diff(trained)) + 1
  parts, before = [], ''
  for run in np.split(np.arange(len(ids)), borders):
    # Of all up to here: alone, a run may lose the space that it begins with.
    whole = tokenizer.decode(ids[: run[-1] + 1])
    text = whole.removeprefix(before)
    if not whole.startswith(before):
      text = tokenizer.decode(ids[run])
    before = whole
    parts.append(f'«{_visible(text)}»' if trained[run[0]] else _visible(text))
  return ''.join(parts)


def _visible(text: str) -> str:
  """Returns text with what moves a terminal's cursor escaped, but for \\n."""
  return ''.join(
      c if c == '\n' or c.isprintable() else ascii(c)[1:-1] for c in text
  )
