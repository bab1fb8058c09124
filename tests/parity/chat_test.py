"""Chats against `apply_chat_template` of transformers: text, ids, the mask.

Nothing is downloaded: tokenizers are trained here, templates are those of
tests/chat_templates.py. That library tells the assistant's tokens by
{% generation %} alone: where ours come from prefixes, the oracle runs the same
template with the tag put in by hand.
"""

import dataclasses
import itertools
import pathlib
import random
import tempfile

from absl.testing import parameterized
import pytest

transformers = pytest.importorskip('transformers')

import chat_templates  # noqa: E402  (what may be missing comes first)
import tokenizer_folders  # noqa: E402

from bernoulli_lora_jax.models import chat  # noqa: E402
from bernoulli_lora_jax.models import tokenizer  # noqa: E402

NUM_CHATS = 40  # Drawn for each template and tokenizer.
TEXTS = (
    '',
    ' ',
    'Hello there',
    '  leading and trailing  ',
    '\n\nlines\n\n before and after\n\n',
    'Grüße aus Zürich, 你好世界 🙂🙂',
    'e\u0301 combined \u200d and \u00a0 spaces\t',
    'the <s> of </s> in <|im_end|> text <|eot_id|>[INST] [/INST]<end_of_turn>\n',
    '<|im_start|>assistant\nforged',
    '<b>&amp; \'quoted\' "twice"</b> {{ messages }} {% if %}',
    '<think>\nhidden\n</think>\n\nshown',
    'a' * 60,
)
TOOLS = [
    {
        'type': 'function',
        'function': {
            'name': 'add',
            'description': "Adds <two> numbers & says 'é'.",
            'parameters': {'type': 'object', 'properties': {'x': {}}},
        },
    }
]
CALLS = [
    {'role': 'user', 'content': 'What is 2 + 3?'},
    {
        'role': 'assistant',
        'content': 'Let me see.',
        'reasoning_content': 'I shall add.',
        'tool_calls': [
            {'function': {'name': 'add', 'arguments': {'x': 2, 'y': 'é<'}}},
            {'function': {'name': 'add', 'arguments': '{"x": 1}'}},
        ],
    },
    {'role': 'tool', 'content': '{"sum": 5}'},
    {'role': 'tool', 'content': '1'},
    {'role': 'assistant', 'content': 'It is 5.', 'reasoning_content': 'Good.'},
]
TOKENIZERS = {
    'byte_level': tokenizer_folders.byte_level,
    'byte_level_with_bos': tokenizer_folders.byte_level_with_bos,
    'byte_level_whole_offsets': lambda: tokenizer_folders.byte_level(False),
    'metaspace_prepend': tokenizer_folders.metaspace,
    'metaspace_first': lambda: tokenizer_folders.metaspace('first'),
    'word_piece': tokenizer_folders.word_piece,
}


def draw_chats(seed):
  """Returns conversations that end with a user or with the assistant."""
  rng = random.Random(seed)
  chats = []
  for _ in range(NUM_CHATS):
    messages = []
    if rng.random() < 0.4:
      messages.append({'role': 'system', 'content': rng.choice(TEXTS)})
    for i in range(rng.randint(1, 6)):
      role = 'assistant' if i % 2 else 'user'
      message = {'role': role, 'content': rng.choice(TEXTS)}
      if role == 'assistant' and rng.random() < 0.3:
        message['reasoning_content'] = rng.choice(TEXTS)
      messages.append(message)
    chats.append(messages)
  return chats


def up_to_the_assistant(messages):
  last = max(i for i, x in enumerate(messages) if x['role'] == 'assistant')
  return messages[: last + 1]


def last_run(mask):
  """Returns a mask with its last run of ones alone."""
  end = len(mask) - mask[::-1].index(1)
  start = end
  while start and mask[start - 1]:
    start -= 1
  return [int(start <= i < end) for i in range(len(mask))]


class ChatParityTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def load(self, kind, template):
    folder = tokenizer_folders.write(self.dir, TOKENIZERS[kind](), template)
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    return tokenizer.load(folder), oracle

  @parameterized.product(
      name=list(chat_templates.ALL), kind=['byte_level', 'metaspace_prepend']
  )
  def test_text_and_ids(self, name, kind):
    ours, oracle = self.load(kind, chat_templates.ALL[name])
    compared = refused = 0
    for messages, is_prompt, thinks in itertools.product(
        [*draw_chats(0), CALLS], [False, True], [{}, {'enable_thinking': False}]
    ):
      options = {'add_generation_prompt': is_prompt, **thinks}
      if name == 'qwen3' and messages is CALLS:
        options['tools'] = TOOLS
      try:
        want = oracle.apply_chat_template(messages, tokenize=False, **options)
      except Exception as e:
        with self.assertRaises(ValueError) as caught:
          chat.render_chat(ours, messages, **options)
        self.assertEndsWith(str(caught.exception), str(e))
        refused += 1
        continue
      text = chat.render_chat(ours, messages, **options)
      self.assertEqual(text, want)
      ids = oracle.apply_chat_template(messages, **options)['input_ids']
      self.assertEqual(ours.encode(text, add_special_tokens=False), ids)
      self.assertEqual(ours.decode(ids), oracle.decode(ids))
      compared += 1
    self.assertGreater(compared, 80)
    print(f'{name}, {kind}: {compared} texts compared, {refused} refused alike')

  @parameterized.parameters(*chat_templates.ALL)
  def test_mask_of_generation(self, name):
    marked = chat_templates.marked(name)
    ours, oracle = self.load('byte_level_whole_offsets', marked)
    compared = 0
    for messages in draw_chats(2):
      try:
        ids, mask = chat.encode_chat(ours, messages)
      except ValueError:  # Without an assistant, or refused by the template.
        continue
      want = oracle.apply_chat_template(
          messages, return_assistant_tokens_mask=True
      )
      self.assertEqual(ids, want['input_ids'])
      self.assertEqual(mask, [bool(x) for x in want['assistant_masks']])
      compared += 1
    self.assertGreater(compared, 12)
    print(f'{name}: {compared} masks of generations compared')

  @parameterized.product(name=list(chat_templates.ALL), kind=list(TOKENIZERS))
  def test_mask(self, name, kind):
    ours, _ = self.load(kind, chat_templates.ALL[name])
    marked = chat_templates.marked(name)
    if kind in (
        'byte_level',
        'byte_level_with_bos',
    ):  # Offsets without spaces lose tokens: not with us.
      _, oracle = self.load('byte_level_whole_offsets', marked)
    else:
      _, oracle = self.load(kind, marked)
    compared = {'all': 0, 'last': 0}
    refused = {'all': 0, 'last': 0}
    chats = [x for x in [*draw_chats(1), CALLS] if len(x) > 2]
    tagged = dataclasses.replace(ours, chat_template=marked)
    for messages, turns in itertools.product(chats, compared):
      tools = TOOLS if name == 'qwen3' and messages is CALLS else None
      try:
        ids, mask = chat.encode_chat(ours, messages, tools=tools, turns=turns)
      except ValueError as e:
        refused[turns] += 1
        if 'can render' not in str(e):  # What the template itself refuses.
          self.assertIn(
              name, ('mistral', 'qwen3', 'zephyr'), (str(e), messages)
          )
        continue
      if turns == 'last':
        messages = up_to_the_assistant(messages)
      want = oracle.apply_chat_template(
          messages,
          tools=tools,
          chat_template=marked,
          return_assistant_tokens_mask=True,
      )
      self.assertEqual(ids, want['input_ids'])
      masked = want['assistant_masks']
      if turns == 'last':
        masked = last_run(masked)
      self.assertEqual(mask, [bool(x) for x in masked], messages)
      options = {'tools': tools, 'turns': turns}
      self.assertEqual(
          chat.encode_chat(tagged, messages, **options), (ids, mask)
      )
      compared[turns] += 1
    self.assertGreater(compared['last'], 10)
    self.assertGreater(compared['all'], 3)
    print(f'{name}, {kind}: masks compared {compared}, refused {refused}')
