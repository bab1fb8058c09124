"""Conversations as ids, and which of them the assistant wrote.

The text of a conversation is tokenised once, as a whole; tokens are told by the
characters that they stand for. Pieces tokenised apart and joined are other tokens.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import os
from typing import Any

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.models import chat_template
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib

Message = Mapping[str, Any]  # {'role': ..., 'content': ..., ...}
_TURNS = ('all', 'last')


def render_chat(
    tokenizer: tokenizer_lib.Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
  """Returns the text of messages, see `chat_template.render`.

  It has its special tokens: encode it with `add_special_tokens=False`.
  """
  template, options = _template(tokenizer, tools, variables)
  return chat_template.render(
      template,
      messages,
      add_generation_prompt=add_generation_prompt,
      **options,
  )


def encode_chat(
    tokenizer: tokenizer_lib.Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    turns: str = 'all',
    **variables: Any,
) -> tuple[list[int], list[bool]]:
  """Returns the ids of a conversation and where the loss is on.

  What the assistant wrote is what the template puts inside of {% generation %}.
  A template without that tag is asked for prefixes: a turn is what
  `messages[: k + 1]` has beyond `messages[:k]` with the prompt for generation,
  its end-of-turn token included and spaces after that one left out. Where a turn
  has no such token (GLM-4, whose next role ends it), nothing teaches to stop.
  Prefixes that do not begin the text of the whole conversation (a template that
  strips thoughts from earlier turns, moves the system prompt, closes the text)
  tell nothing of it and are refused: with `turns='last'`,
  `encode_chat(messages[: k + 1])` for every assistant's turn k is what the model
  sees when it writes that turn.

  A token is the assistant's if any of its characters is: one that straddles the
  border (a space of the prompt that begins the first word) counts.

  Args:
    tokenizer: of `tokenizer.load`.
    messages: content is text; it may lack beside tool_calls. The text of a special
      token inside of content becomes that token, as everywhere with templates.
    tools: JSON schemas of functions.
    turns: 'all' of the assistant's, or the 'last' one, after which messages are
      left out.
    **variables: of the template, such as enable_thinking.

  Returns:
    ids, and a mask as long: True for tokens of the assistant.

  Raises:
    ValueError: messages without role, content or an assistant's turn, or which the
      template refuses or leaves out; a template whose turns cannot be told apart.
    TypeError: messages, tools or variables that are no JSON.
  """
  checks.one_of(_TURNS, turns=turns)
  _check_messages(messages)
  asked = [i for i, x in enumerate(messages) if x['role'] == 'assistant']
  if turns == 'last':
    asked = asked[-1:]
    messages = messages[: asked[0] + 1]
  template, options = _template(tokenizer, tools, variables)
  write = functools.partial(chat_template.render, template, **options)
  _check_kept(write, messages)
  if chat_template.has_generation(template):
    text, spans = chat_template.render_spans(template, messages, **options)
    if turns == 'last':
      ((start, _),) = _by_prefixes(write, messages, text, asked)
      spans = [span for span in spans if span[1] > start]
  else:
    text = write(messages)
    for k in asked:
      _check_opening(write, messages[:k])
    ends = _special_tokens(tokenizer)
    spans = [
        _without_space_after(ends, text, span)
        for span in _by_prefixes(write, messages, text, asked)
    ]
  encoding = tokenizer.backend.encode(text, add_special_tokens=False)
  mask = _mask(encoding.offsets, spans, len(text))
  checks.that(any(mask), 'a token of the assistant', text=repr(text[-80:]))
  return encoding.ids, mask


def _special_tokens(tokenizer: tokenizer_lib.Tokenizer) -> tuple[str, ...]:
  added = tokenizer.backend.get_added_tokens_decoder().values()
  return tuple(token.content for token in added if token.special)


def _template(
    tokenizer: tokenizer_lib.Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
  """Returns the template, and all that it sees beside messages."""
  template = tokenizer.chat_template
  if tools is not None and tokenizer.tool_template is not None:
    template = tokenizer.tool_template
  if template is None:
    raise ValueError(
        'Expected a tokenizer with a chat template, got none: put its'
        ' chat_template.jinja into the folder.'
    )
  return template, {**tokenizer.special_tokens, **variables, 'tools': tools}


def _check_messages(messages: Sequence[Message]) -> None:
  roles = []
  for i, message in enumerate(messages):
    has_role = isinstance(message, Mapping) and isinstance(
        message.get('role'), str
    )
    checks.that(has_role, f'messages[{i}] to have a role', message=message)
    content = message.get('content')
    is_call = content is None and bool(message.get('tool_calls'))
    checks.that(
        isinstance(content, str) or is_call,
        f'messages[{i}] to have content that is text',
        message=message,
    )
    roles.append(message['role'])
  checks.that('assistant' in roles, "a turn of the 'assistant'", roles=roles)


def _check_kept(write: Callable[..., str], messages: Sequence[Message]) -> None:
  """Refuses messages whose content the template leaves out, for their role say."""
  marks = {
      i: f'xqzj{i}jzqx'  # Plain letters, which no filter escapes.
      for i, message in enumerate(messages)
      if not message.get('tool_calls')  # Which some templates write alone.
  }
  text = write(
      [
          {**message, 'content': message['content'] + marks[i]}
          if i in marks
          else message
          for i, message in enumerate(messages)
      ]
  )
  for i, mark in marks.items():
    checks.that(
        mark in text,
        f'a template that writes messages[{i}], which it leaves out',
        role=repr(messages[i]['role']),
    )


def _check_opening(
    write: Callable[..., str], before: Sequence[Message]
) -> None:
  """Refuses a template that opens a turn but has no prompt for generation."""
  prompt = write(before, add_generation_prompt=True)
  if prompt != write(before):
    return
  texts = [
      write([*before, {'role': 'assistant', 'content': content}])
      for content in ('A', 'B')
  ]
  opening = os.path.commonprefix(texts)[len(prompt) :]
  checks.that(
      not opening.strip(),
      'a template that opens a turn with add_generation_prompt, or one with'
      ' {% generation %}',
      opening=repr(opening),
  )


def _by_prefixes(
    write: Callable[..., str],
    messages: Sequence[Message],
    text: str,
    asked: Sequence[int],
) -> list[chat_template.Span]:
  """Returns what the turns that are asked for add to the text before them."""
  spans = []
  for k in asked:
    before = write(messages[:k], add_generation_prompt=True)
    after = write(messages[: k + 1])
    if not (text.startswith(after) and after.startswith(before)):
      advice = (
          "call encode_chat(messages[: k + 1], turns='last') for each of them"
      )
      raise ValueError(
          f'Expected a template that continues its text of messages[:{k}] with'
          " the assistant's turn, got one that writes them anew:"
          f' {advice + ", or " if k + 1 < len(messages) else ""}mark'
          ' {% generation %} in the template.'
      )
    spans.append((len(before), len(after)))
  return spans


def _without_space_after(
    ends: tuple[str, ...], text: str, span: chat_template.Span
) -> chat_template.Span:
  """Returns a span that stops at its end-of-turn token, if it has one."""
  start, end = span
  turn = text[start:end].rstrip()
  return (start, start + len(turn)) if turn.endswith(ends) else span


def _mask(
    offsets: Sequence[chat_template.Span],
    spans: Sequence[chat_template.Span],
    length: int,
) -> list[bool]:
  """Tells which tokens have a character in a span."""
  inside = bytearray(length)
  for start, end in spans:
    inside[start:end] = b'\1' * (end - start)
  return [1 in inside[start:end] for start, end in offsets]
