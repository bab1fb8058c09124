"""Documents of files, folders and datasets, as text or one form of records.

`contents` yields them with their places, `instruction` brings the spellings that are
common in the field to {"messages"} or {"prompt", "completion"}.
"""

from collections.abc import Iterator, Mapping, Sequence
import glob
import gzip
import itertools
import json
import os
import pathlib
import re
from typing import Any
import warnings

from bernoulli_lora_jax import checks

Content = str | bytes | dict[str, Any]  # A text, a line of JSON, or a row.
Path = str | os.PathLike[str]

FIELDS = (
    'messages', 'conversations', 'prompt', 'completion', 'instruction', 'output',
    'text',
)  # fmt: skip
_BESIDE = ('tools', 'input', 'system', 'history')  # Read with one of them.
_KNOWN = (
    "known are 'messages', 'conversations', 'prompt' and 'completion',"
    " 'instruction' and 'output', or 'text': rename yours with columns"
)
# Of files that a folder is read for.
_SUFFIXES = ('.jsonl', '.md', '.txt', '.jsonl.gz', '.txt.gz')
_BUILDERS = {'.arrow': 'arrow', '.csv': 'csv', '.parquet': 'parquet'}
_ROLES = {
    'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant',
    'system': 'system', 'tool': 'tool',
}  # fmt: skip
_HUB_NAME = re.compile(r'\w[\w.-]*/\w[\w.-]*(/\w[\w.-]*)?')
_SHOWN = 300  # Characters of a message about a record.
_NAMED = 3  # Bad lines that a message has in full.


class BadRecordError(ValueError):
  """A record that is not as it should be."""


def one_line(error: object) -> str:
  """Returns a message as one line without its full stop, cut where it is long."""
  line = ' '.join(str(error).split()).removesuffix('.')
  return line if len(line) <= _SHOWN else f'{line[:_SHOWN]}...'


def report_bad(data: Path, bad: list[str], count: int, skip_bad: bool) -> None:
  """Warns of bad lines, or raises where none is good or none may be skipped.

  Args:
    data: where they are.
    bad: each with its place and the reason, at least one.
    count: of all lines.
    skip_bad: whether they may be left out.
  """
  what = f'{len(bad)} bad of {count}: {some(bad)}'
  if skip_bad and len(bad) < count:
    warnings.warn(f'Left out of {data}: {what}.', stacklevel=5)
    return
  advice = 'none is left' if skip_bad else 'correct them, or skip_bad=True'
  raise ValueError(f'Expected good documents in {data}, got {what}: {advice}.')


def some(bad: Sequence[str]) -> str:
  """Returns the first of what is bad, and how many more there are."""
  more = f', and {len(bad) - _NAMED} more' if len(bad) > _NAMED else ''
  return ', '.join(bad[:_NAMED]) + more


def contents(
    data: Path, separator: str = '', columns: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Content]]:
  """Yields the documents of data with their places, see `text.load`.

  Raises:
    FileNotFoundError: no such files, and no dataset that could be had.
    ValueError: an empty or broken file; a dataset without that split, or without
      a column that is known.
    ImportError: a dataset, but no library datasets.
  """
  wanted = set(columns or ()) | set(FIELDS) | set(_BESIDE)
  dataset = _dataset(data)
  if dataset is not None:
    yield from _rows(dataset, data, '', wanted)
    return
  paths = _files(data)
  for path in paths:
    name = f'{path.name} ' if len(paths) > 1 else ''
    suffix = pathlib.Path(path.name.removesuffix('.gz')).suffix
    if path.suffix in _BUILDERS:
      builder = _BUILDERS[path.suffix]
      dataset = _load(str(path), builder, data_files=glob.escape(str(path)),
                      split='train', streaming=True)  # fmt: skip
      found = _rows(dataset, path, name, wanted)
    elif suffix == '.json':
      found = _records(path, name)
    elif suffix == '.jsonl':
      found = _lines(path, name)
    else:
      found = _texts(path, name, separator)
    first = next(found, None)
    if first is None:
      raise ValueError(f'Expected text in {path}, got an empty file.')
    yield from itertools.chain([first], found)


def parsed(content: Content, columns: Mapping[str, str] | None = None) -> Any:
  """Returns a text as it is, or a record with its columns renamed.

  Args:
    content: of `contents`.
    columns: {name of a field there: name here}.

  Raises:
    BadRecordError: no JSON object.
  """
  if isinstance(content, str):
    return content
  value: Any = content
  if isinstance(content, bytes):
    try:
      value = json.loads(content.decode('utf-8-sig'))
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is one, too.
      raise BadRecordError(f'no JSON: {one_line(e)}') from e
  if not isinstance(value, dict):
    raise BadRecordError(f'no JSON object: {value!r:.40}')
  renamed = {
      ours: value[theirs]
      for theirs, ours in (columns or {}).items()
      if theirs in value
  }
  return {**value, **renamed}


def kind_of(
    data: Path, *, separator: str = '', columns: Mapping[str, str] | None = None
) -> str:
  """Returns the kind of documents in data, by the first that is of any.

  Args:
    data: see `text.load`.
    separator: see `text.load`.
    columns: see `text.load`.

  Returns:
    'language_model' for text and records with "text" alone, else 'instruction'.

  Raises:
    FileNotFoundError: no such files.
    ValueError: no text, and no record with a field that is known.
  """
  first = None
  for where, content in contents(data, separator, columns):
    try:
      value = parsed(content, columns)
      if isinstance(value, str):
        return 'language_model'
      known = [name for name in FIELDS if value.get(name) is not None]
      if known:
        return 'language_model' if known == ['text'] else 'instruction'
      raise BadRecordError(_unknown(value))
    except BadRecordError as e:
      first = first or f'{where} ({e})'
  raise ValueError(f'Expected text or records in {data}, got {first}.')


def instruction(value: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a record in one of two forms.

  Args:
    value: of `parsed`, in any spelling that `text.load` names.

  Returns:
    {'messages', 'tools', 'turns'}, the last one 'last' where but the completion is
    trained; or {'prompt', 'completion', 'is_alpaca'}.

  Raises:
    BadRecordError: a record in no such spelling, or with more than is read.
  """
  has = {name for name in FIELDS if value.get(name) is not None}
  tools = _tools(value.get('tools'))
  for name in ('messages', 'conversations'):
    if name in has:
      if 'completion' in has:
        raise BadRecordError(f"both {name!r} and 'completion'")
      turns = _turns(value[name], name)
      if isinstance(value.get('system'), str) and value['system'].strip():
        turns = [{'role': 'system', 'content': value['system']}, *turns]
      return {'messages': turns, 'tools': tools, 'turns': None}
  if {'prompt', 'completion'} & value.keys():
    prompt, completion = value.get('prompt'), value.get('completion')
    if isinstance(prompt, list) and isinstance(completion, list):
      answer = _turns(completion, 'completion')
      if len(answer) > 1:
        raise BadRecordError("'completion' has more than one turn")
      turns = [*_turns(prompt, 'prompt'), *answer]
      return {'messages': turns, 'tools': tools, 'turns': 'last'}
    return {
        'prompt': string(value, 'prompt'),
        'completion': _not_empty(value, 'completion'),
        'is_alpaca': False,
    }
  if {'instruction', 'output'} & has:
    for name in ('history', 'system'):
      if value.get(name):
        raise BadRecordError(f"{name!r} beside 'instruction': give messages")
    prompt = string(value, 'instruction')
    if value.get('input') is not None and string(value, 'input').strip():
      prompt = f'{prompt}\n{value["input"]}'
    completion = _not_empty(value, 'output')
    return {'prompt': prompt, 'completion': completion, 'is_alpaca': True}
  if 'text' in has:
    raise BadRecordError("'text', which kind='language_model' reads")
  raise BadRecordError(_unknown(value))


def string(value: Mapping[str, Any], name: str) -> str:
  """Returns a field that is text."""
  if name not in value:
    raise BadRecordError(f'no field {name!r} among {sorted(map(str, value))}')
  if not isinstance(value[name], str):
    raise BadRecordError(f'{name!r} is no text but {value[name]!r:.40}')
  return _whole(value[name], repr(name))


def _whole(text: str, place: str) -> str:
  """Refuses halves of surrogate pairs, which JSON can escape and UTF-8 not write."""
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise BadRecordError(
        f'{place} has {text[e.start]!a}, half a character'
    ) from e
  return text


def _not_empty(value: Mapping[str, Any], name: str) -> str:
  text = string(value, name)
  if not text.strip():
    raise BadRecordError(f'{name!r} is empty')
  return text


def _unknown(value: Mapping[str, Any]) -> str:
  return f'no field that is known among {sorted(map(str, value))}; {_KNOWN}'


def _tools(tools: Any) -> Any:
  """Returns schemas; columns of datasets have them as JSON."""
  if not isinstance(tools, str):
    return tools or None
  try:
    return json.loads(tools) or None
  except ValueError as e:
    raise BadRecordError(f"'tools' is no JSON: {one_line(e)}") from e


def _turns(turns: Any, name: str) -> list[Any]:
  if not isinstance(turns, list) or not turns:
    raise BadRecordError(f'{name!r} is no list of turns but {turns!r:.40}')
  return [_turn(turn, f'{name}[{i}]') for i, turn in enumerate(turns)]


def _turn(turn: Any, place: str) -> Any:
  """Returns a turn with "role", and content that is text if its parts are."""
  if not isinstance(turn, dict):
    return turn  # Refused with the reason where the template is asked.
  if 'from' in turn and 'role' not in turn:
    role = _ROLES.get(str(turn['from']))
    if role is None:
      raise BadRecordError(
          f'{place} is from {turn["from"]!r:.40}, known are {", ".join(_ROLES)}'
      )
    rest = {k: v for k, v in turn.items() if k not in ('from', 'value')}
    turn = {'role': role, 'content': turn.get('value'), **rest}
  if turn.get('weight', 1) not in (1, None):
    raise BadRecordError(
        f'{place} has weight={turn["weight"]!r:.20}: turns count alike'
    )
  content = turn.get('content')
  if isinstance(content, list):
    kinds = [x.get('type') if isinstance(x, dict) else None for x in content]
    texts = [x.get('text') if isinstance(x, dict) else None for x in content]
    if set(kinds) != {'text'} or not all(isinstance(x, str) for x in texts):
      raise BadRecordError(
          f'{place} has content that is no text: parts of types {kinds}'
      )
    turn = {**turn, 'content': ''.join(map(str, texts))}
  if isinstance(turn.get('content'), str):
    _whole(turn['content'], place)
  return turn


def _files(data: Path) -> list[pathlib.Path]:
  """Returns the files of a name, a folder or a pattern, in order."""
  path = pathlib.Path(data).expanduser()
  if path.is_file():
    return [path]
  if path.is_dir():
    found = [p for p in path.rglob('*') if p.name.endswith(_SUFFIXES)]
    what = f'{", ".join(_SUFFIXES)} or .parquet files in the folder {data}'
  else:
    found = map(pathlib.Path, glob.glob(str(path), recursive=True))
    what = f'a file, a folder, a pattern of files or a dataset in {data}'
  found = sorted(p for p in found if p.is_file())
  if not found:
    raise FileNotFoundError(f'Expected {what}, got none.')
  return found


def _bytes(path: pathlib.Path) -> Iterator[bytes]:
  """Yields the lines of a file; of JSON, they end at \\n alone."""
  try:
    with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
      yield from file
  except (EOFError, gzip.BadGzipFile) as e:
    raise ValueError(f'Expected {path} in gzip, got: {e}.') from e


def _lines(path: pathlib.Path, name: str) -> Iterator[tuple[str, Content]]:
  for number, line in enumerate(_bytes(path), start=1):
    if line.removeprefix(b'\xef\xbb\xbf').strip():
      yield f'{name}line {number}', line


def _records(path: pathlib.Path, name: str) -> Iterator[tuple[str, Content]]:
  """Yields the records of one JSON array or object, or of lines of JSON."""
  try:
    value = json.loads(b''.join(_bytes(path)).decode('utf-8-sig'))
  except json.JSONDecodeError:
    yield from _lines(path, name)
    return
  except UnicodeDecodeError as e:
    raise ValueError(f'Expected {path} in UTF-8, got: {e}.') from e
  for i, x in enumerate(value if isinstance(value, list) else [value], start=1):
    yield f'{name}record {i}', x


def _texts(
    path: pathlib.Path, name: str, separator: str
) -> Iterator[tuple[str, Content]]:
  try:
    text = b''.join(_bytes(path)).decode('utf-8-sig')
  except UnicodeDecodeError as e:
    raise ValueError(f'Expected {path} in UTF-8, got: {e}.') from e
  for i, part in enumerate(text.split(separator) if separator else [text]):
    if part.strip():
      yield f'{name}document {i + 1}', part


def _dataset(data: Path) -> Any:
  """Returns a dataset of a folder or the Hub; None where data are files."""
  name = os.fspath(data)
  path = pathlib.Path(name).expanduser()
  split = ''
  if not path.exists():
    name, _, split = name.partition(':')
    path = pathlib.Path(name).expanduser()
  if path.is_dir():
    if (path / 'dataset_dict.json').is_file():
      return _saved(path, split or 'train')
    if (path / 'state.json').is_file():
      checks.that(
          not split, f'no split of {path}, which was saved as one', split=split
      )
      return _saved(path, '')
    if next(path.rglob('*.parquet'), None):
      return _load(data, str(path), split=split or 'train')
  elif _HUB_NAME.fullmatch(name) and not name.endswith(
      (*_SUFFIXES, *_BUILDERS, '.json', '.gz')
  ):
    owner, repository, *config = name.split('/')
    return _load(data, f'{owner}/{repository}', *config, split=split or 'train')
  return None


def _library(data: Path) -> Any:
  try:
    import datasets  # Optional, and slow.
  except ImportError as e:
    raise ImportError(
        f'Expected a file, a folder or a pattern of files in {data}, or to read a'
        ' dataset the library datasets, got none: pip install'
        " 'bernoulli_lora_jax[datasets]'."
    ) from e
  return datasets


def _saved(path: pathlib.Path, split: str) -> Any:
  try:
    found = _library(path).load_from_disk(str(path))
  except ImportError:
    raise
  except Exception as e:  # The library raises many kinds.
    raise ValueError(
        f'Expected a dataset in {path}, got: {one_line(e)}.'
    ) from e
  if split:
    checks.that(
        split in found, f'split in {sorted(found)} of {path}', split=split
    )
  return found[split] if split else found


def _load(data: Path, *args: str, **options: Any) -> Any:
  datasets = _library(data)
  try:
    return datasets.load_dataset(*args, **options)
  except Exception as e:  # The library raises many kinds.
    kind = FileNotFoundError if isinstance(e, OSError) else ValueError
    raise kind(
        f'Expected files in {data}, or a dataset, got: {one_line(e)}.'
    ) from e


def _rows(
    dataset: Any, data: Path, name: str, wanted: set[str]
) -> Iterator[tuple[str, Content]]:
  """Yields rows of the columns that are wanted: others may be images."""
  columns = dataset.column_names
  if columns is not None:
    known = [column for column in columns if column in wanted]
    if not set(known) - set(_BESIDE):
      raise ValueError(
          f'Expected other columns in {data}, got columns={sorted(columns)};'
          f' {_KNOWN}.'
      )
    dataset = dataset.select_columns(known)
  for i, row in enumerate(dataset, start=1):
    value = {k: v if v is None else _without_nulls(v) for k, v in row.items()}
    yield f'{name}row {i}', value


def _without_nulls(value: Any) -> Any:
  """Leaves out fields that a column has for the sake of other rows alone."""
  if isinstance(value, list):
    return [_without_nulls(x) for x in value]
  if not isinstance(value, dict):
    return value
  return {
      k: _without_nulls(x)
      for k, x in value.items()
      if x is not None or k == 'content'
  }
