"""Chat templates: Jinja programs of a checkpoint that write messages as text.

A template comes with somebody's weights: it runs in Jinja's sandbox and sees JSON
values alone. What it may use beside Jinja is what `apply_chat_template` of the
library transformers gives it: loop controls, `raise_exception`, `strftime_now`,
`tojson` without HTML's escapes, and `{% generation %}` around what the assistant
wrote. Its time and memory are not limited.
"""

from collections.abc import Mapping, Sequence
import contextvars
import datetime
import functools
import importlib.metadata
import json
import re
from typing import Any

from bernoulli_lora_jax import checks

try:
  import jinja2
  from jinja2 import ext
  from jinja2 import nodes
  from jinja2 import sandbox
except ImportError as e:
  raise ImportError(
      'Expected jinja2 for chat templates, got none: pip install'
      " 'bernoulli_lora_jax[hf]'."
  ) from e

Span = tuple[int, int]  # Characters [start, end) of a text.

# Names under which messages bring the thoughts of a model, the first one first.
_THOUGHTS = ('reasoning_content', 'thinking', 'reasoning')
# What is written around a generation: nothing, but for `render_spans`.
_MARKS = contextvars.ContextVar('marks', default=('', ''))


class _Generation(ext.Extension):
  """{% generation %} ... {% endgeneration %}."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    call = self.call_method('_mark')
    return nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, caller):
    start, end = _MARKS.get()
    return start + caller() + end


class _Namespace(jinja2.utils.Namespace):
  """Names of a template; none of Python's own, which would pose as an object."""

  def __init__(*args, **kwargs):  # `self` may be one of the names.
    self, *values = args
    names = dict(*values, **kwargs)
    _check_names(names)
    jinja2.utils.Namespace.__init__(self, names)

  def __setitem__(self, name, value):
    _check_names([name])
    jinja2.utils.Namespace.__setitem__(self, name, value)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
  """Returns the text that a chat template makes of messages.

  Args:
    template: in Jinja's language.
    messages: {'role': ..., 'content': ..., ...}; what is None is left out.
    add_generation_prompt: ends where the assistant begins to write, if the
      template knows how.
    tools: JSON schemas of functions.
    **variables: of the template: bos_token, enable_thinking, ...; JSON values.

  Raises:
    ValueError: a template that is none, that leaves the sandbox or raises; with
      its message.
    TypeError: messages, tools or variables that are no JSON.
  """
  values = {
      'tools': tools,
      'documents': None,
      'add_generation_prompt': add_generation_prompt,
      **variables,
      'messages': [_with_thoughts(message) for message in messages],
  }
  try:  # A copy of plain values: the template finds no method of the caller's.
    plain = json.loads(json.dumps(values))
  except (TypeError, ValueError) as e:
    raise TypeError(
        f'Expected messages, tools and variables to be JSON, got: {e}.'
    ) from e
  return _render(template, plain)


def render_spans(
    template: str, messages: Sequence[Mapping[str, Any]], **options: Any
) -> tuple[str, list[Span]]:
  """Returns `render`'s text and the characters inside of {% generation %}.

  Raises:
    ValueError: as `render`; a template that works on what it generated (it trims,
      measures or splits it), for which no characters can be told.
  """
  text = render(template, messages, **options)
  start, end = _marks_not_in(text)
  token = _MARKS.set((start, end))
  try:
    marked = render(template, messages, **options)
  finally:
    _MARKS.reset(token)
  spans, length, depth, opened = [], 0, 0, 0
  for char in marked:
    if char == start:
      opened = opened if depth else length
      depth += 1
    elif char == end:
      depth -= 1
      if not depth:
        spans.append((opened, length))
    else:
      length += 1
  if marked.replace(start, '').replace(end, '') != text or depth:
    raise ValueError(
        'Expected a chat template that writes its {% generation %} as it is, got'
        ' one that works on the text: move the tag outwards.'
    )
  return text, spans


@functools.lru_cache
def has_generation(template: str) -> bool:
  """Tells whether a template marks what the assistant wrote."""
  tree = _compiled(template).environment.parse(template)
  return any(
      node.identifier == _Generation.identifier
      for node in tree.find_all(nodes.ExtensionAttribute)
  )


def _render(template: str, values: Mapping[str, Any]) -> str:
  compiled = _compiled(template)
  try:
    return compiled.render(values)
  except Exception as e:  # Of the template, with what it chose to raise.
    raise ValueError(
        f'Expected messages that the chat template can render, got: {e}'
    ) from e


@functools.lru_cache
def _compiled(template: str) -> jinja2.Template:
  try:
    return _environment().from_string(template)
  except jinja2.TemplateError as e:
    raise ValueError(f'Expected a chat template in Jinja, got: {e}') from e


@functools.cache
def _environment() -> jinja2.Environment:
  version = importlib.metadata.version('jinja2')
  if [int(part) for part in re.findall(r'\d+', version)[:3]] < [3, 1, 6]:
    raise ImportError(  # The sandbox of earlier ones has known holes.
        f'Expected jinja2 >= 3.1.6 for chat templates, got {version}: pip'
        " install 'bernoulli_lora_jax[hf]'."
    )
  environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[_Generation, ext.loopcontrols],
  )
  environment.filters['tojson'] = _to_json
  known: dict[str, Any] = environment.globals
  known['raise_exception'] = _raise_exception
  known['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  known['dict'] = lambda *args, **kwargs: dict(*args, **kwargs)
  known['namespace'] = _Namespace
  return environment


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _to_json(
    value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
):
  return json.dumps(
      value,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=separators,
      sort_keys=sort_keys,
  )


def _check_names(names):
  for name in names:
    if str(name).startswith('_'):
      raise jinja2.exceptions.SecurityError(f'namespace() takes no {name!r}')


def _with_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a message without what is None; its thoughts under both names."""
  checks.that(
      isinstance(message, Mapping),
      'each message to be {"role": ..., "content": ...}',
      message=message,
  )
  message = {key: x for key, x in message.items() if x is not None}
  found = [message[name] for name in _THOUGHTS if name in message]
  if not found:
    return message
  return {'thinking': found[0], **message, 'reasoning_content': found[0]}


def _marks_not_in(text: str) -> tuple[str, str]:
  """Returns two characters for private use that a text does not have."""
  free = (chr(i) for i in range(0xE000, 0xF900) if chr(i) not in text)
  return next(free), next(free)
