"""Tests of checkpoint folders' tokenizers, chat templates and chats' masks.

What is expected is written out by hand from the published rules of each family.
"""

import importlib
import json
import pathlib
import pickle
import sys
import tempfile
from unittest import mock
import warnings

from absl.testing import parameterized
import numpy as np
import pytest

tokenizers = pytest.importorskip('tokenizers')
pytest.importorskip('jinja2')

import chat_templates  # noqa: E402 (what may be missing comes first)
import tokenizer_folders  # noqa: E402

from bernoulli_lora_jax.models import chat  # noqa: E402
from bernoulli_lora_jax.models import chat_template  # noqa: E402
from bernoulli_lora_jax.models import tokenizer  # noqa: E402

USER = {'role': 'user', 'content': ' Hi <b>"é"</b>\n'}
ANSWER = {'role': 'assistant', 'content': 'Yes \n'}
SYSTEM = {'role': 'system', 'content': 'Be brief.'}
CHAT = [USER, ANSWER, {'role': 'user', 'content': 'Why?'}]
DONE = [*CHAT, {'role': 'assistant', 'content': 'So.'}]
VARIABLES = {'bos_token': '<s>', 'eos_token': '</s>'}
TOOL = {'type': 'function', 'function': {'name': 'add', 'description': '<é>'}}

# {template: what it writes of SYSTEM (where there may be one) + CHAT and a prompt}
TEXTS = {
    'llama2': (
        '<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi <b>"é"</b> [/INST] Yes </s>'
        '<s>[INST] Why? [/INST]'
    ),
    'llama3': (
        '<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nHi <b>"é"</b><|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n'
    ),
    'mistral': (
        '<s>[INST]  Hi <b>"é"</b>\n[/INST] Yes</s>[INST] Be brief.\n\nWhy?[/INST]'
    ),
    'qwen2': (
        '<|im_start|>system\nBe brief.<|im_end|>\n'
        '<|im_start|>user\n Hi <b>"é"</b>\n<|im_end|>\n'
        '<|im_start|>assistant\nYes \n<|im_end|>\n'
        '<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n'
    ),
    'qwen3': (
        '<|im_start|>system\nBe brief.<|im_end|>\n'
        '<|im_start|>user\n Hi <b>"é"</b>\n<|im_end|>\n'
        '<|im_start|>assistant\nYes \n<|im_end|>\n'
        '<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n'
    ),
    'zephyr': (
        '<|system|>\nBe brief.</s>\n<|user|>\n Hi <b>"é"</b>\n</s>\n'
        '<|assistant|>\nYes \n</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n'
    ),
    'gemma': (
        '<s><start_of_turn>user\nHi <b>"é"</b><end_of_turn>\n'
        '<start_of_turn>model\nYes<end_of_turn>\n'
        '<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n'
    ),
    'generation': (
        '<|im_start|>system\nBe brief.<|im_end|>\n'
        '<|im_start|>user\n Hi <b>"é"</b>\n<|im_end|>\n'
        '<|im_start|>assistant\nYes \n<|im_end|>\n'
        '<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n'
    ),
}
# {template: what of DONE is the assistant's}
WRITTEN = {
    'llama2': [' Yes </s>', ' So. </s>'],
    'llama3': ['Yes<|eot_id|>', 'So.<|eot_id|>'],
    'mistral': [' Yes</s>', ' So.</s>'],
    'qwen2': ['Yes \n<|im_end|>', 'So.<|im_end|>'],
    'zephyr': ['Yes \n</s>', 'So.</s>'],
    'gemma': ['Yes<end_of_turn>', 'So.<end_of_turn>'],
    'generation': ['Yes \n<|im_end|>', 'So.<|im_end|>'],
}


def render(template, messages=CHAT, **options):
  return chat_template.render(template, messages, **VARIABLES, **options)


def pieces(found, ids, mask):
  """Returns the texts of the runs of a mask."""
  runs, before = [], False
  for i, inside in zip(ids, mask, strict=True):
    if inside and not before:
      runs.append([])
    if inside:
      runs[-1].append(i)
    before = inside
  return [found.decode(run) for run in runs]


class Folder(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def load(self, template=None, make=tokenizer_folders.byte_level, **config):
    return tokenizer.load(
        tokenizer_folders.write(self.dir, make(), template, **config)
    )


class RenderTest(parameterized.TestCase):

  @parameterized.parameters(*TEXTS)
  def test_families(self, name):
    messages = CHAT if name == 'gemma' else [SYSTEM, *CHAT]
    text = render(
        chat_templates.ALL[name], messages, add_generation_prompt=True
    )
    self.assertEqual(text, TEXTS[name])

  def test_qwen2_has_a_system_prompt_of_its_own(self):
    self.assertStartsWith(
        render(chat_templates.QWEN2),
        '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>',
    )

  def test_qwen3_thinks(self):
    thought = {**ANSWER, 'content': 'Yes.', 'reasoning_content': 'Hm.'}
    text = render(
        chat_templates.QWEN3,
        [USER, thought, CHAT[2], {**thought, 'content': 'So.'}],
    )
    self.assertEndsWith(
        text,
        '<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n'
        '<|im_start|>assistant\n<think>\nHm.\n</think>\n\nSo.<|im_end|>\n',
    )
    prompt = render(
        chat_templates.QWEN3, add_generation_prompt=True, enable_thinking=False
    )
    self.assertEndsWith(prompt, 'assistant\n<think>\n\n</think>\n\n')

  def test_qwen3_calls_tools(self):
    call = {'function': {'name': 'add', 'arguments': {'x': '<é>'}}}
    text = render(
        chat_templates.QWEN3,
        [
            USER,
            {'role': 'assistant', 'content': None, 'tool_calls': [call]},
            {'role': 'tool', 'content': '5'},
        ],
        tools=[TOOL],
    )
    self.assertIn(
        '<tools>\n{"type": "function", "function": {"name": "add", "description":'
        ' "<é>"}}\n</tools>',
        text,
    )
    self.assertEndsWith(
        text,
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"x":'
        ' "<é>"}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n',
    )

  def test_blocks_leave_neither_indent_nor_newline(self):
    template = '  {% if true %}\n  a\n  {% endif %}\nb\n'
    self.assertEqual(render(template), '  a\nb')

  def test_what_templates_may_use(self):
    cases = {
        "{{ {'a': \"<'é&>\"} | tojson }}": '{"a": "<\'é&>"}',
        "{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}": (
            '{\n "a": [\n  2\n ],\n "b": 1\n}'
        ),
        '{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}'
        '{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}': '02',
        '{{ missing }}{{ documents is none }}{{ tools is none }}': 'TrueTrue',
        '{% set ns = namespace(a=1, self=2) %}{% set ns.a = 3 %}{{ ns.a }}': '3',
        "{{ dict(a=1)['a'] }}": '1',
        '{{ messages[0].content }}': USER['content'],
        '{{ "" | length }}{{ bos_token }}': '0<s>',
    }
    for template, want in cases.items():
      self.assertEqual(render(template), want, template)
    self.assertRegex(render("{{ strftime_now('%Y-%m') }}"), r'^\d{4}-\d\d$')

  def test_nothing_is_left_of_none_and_thoughts_have_two_names(self):
    message = {'role': 'user', 'content': 'x', 'thinking': 't', 'call': None}
    self.assertEqual(
        json.loads(render('{{ messages[0] | tojson }}', [message])),
        {
            'role': 'user',
            'content': 'x',
            'thinking': 't',
            'reasoning_content': 't',
        },
    )

  @parameterized.parameters(
      ("{{ raise_exception('No such role!') }}", 'No such role!'),
      ('{% for %}', 'chat template in Jinja'),
      ("{{ ''.__class__.__mro__ }}", 'unsafe'),
      ("{{ ('x' | attr('__class__')).mro() }}", 'unsafe'),
      ("{{ '{0.__class__.__mro__}'.format(1) }}", 'unsafe'),
      ('{{ raise_exception.__globals__.x }}', 'unsafe'),
      ('{{ messages.append(1) }}', 'unsafe'),
      ('{{ messages[0].update(role=1) }}', 'unsafe'),
      ('{% set ns = namespace() %}{% set ns.__class__ = 1 %}', '__class__'),
      ("{{ namespace({'__call__': 1}) }}", '__call__'),
      ('{{ dict.fromkeys([1]) }}', 'no attribute'),
      ('{{ range(10**9) }}', 'Range too big'),
      ("{{ 'x' + 1 }}", 'concatenate'),
      ('{{ missing.name }}', 'undefined'),
      ('{{ 1 / 0 }}', 'zero'),
  )
  def test_refuses(self, template, message):
    with self.assertRaisesRegex(ValueError, message):
      render(template)

  def test_refuses_what_is_no_json(self):
    with self.assertRaisesRegex(TypeError, 'to be JSON, got'):
      render('x', [{'role': 'user', 'content': object()}])
    with self.assertRaisesRegex(TypeError, 'to be JSON, got'):
      render('x', key=open)
    with self.assertRaisesRegex(ValueError, 'each message to be'):
      render('x', ['Hi'])

  def test_spans_of_a_generation(self):
    cases = {
        'ab{% generation %}cd{% endgeneration %}e': [(2, 4)],
        '{%- for m in messages %}{% generation %}{{ loop.index }}'
        '{% endgeneration %}-{% endfor %}': [(0, 1), (2, 3), (4, 5)],
        '{% macro f() %}x{% generation %}y{% endgeneration %}{% endmacro %}'
        '.{{ f() }}{{ f() }}': [(2, 3), (4, 5)],
        '{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}': [
            (0, 2)
        ],
        'a{% generation %}{% endgeneration %}': [(1, 1)],
        '\ue000{% generation %}\ue001{% endgeneration %}': [(1, 2)],
        'none': [],
    }
    for template, want in cases.items():
      text, spans = chat_template.render_spans(template, CHAT)
      self.assertEqual(spans, want, template)
      self.assertEqual(text, render(template))
      self.assertEqual(chat_template.has_generation(template), bool(want))

  def test_a_generation_that_is_worked_on_is_refused(self):
    for template in (
        '{% filter trim %}{% generation %} a {% endgeneration %}{% endfilter %}',
        '{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x[0] }}',
        '{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x|length }}',
    ):
      with self.assertRaisesRegex(ValueError, 'move the tag outwards'):
        chat_template.render_spans(template, CHAT)


class LoadTest(Folder):

  def test_byte_level(self):
    found = self.load()
    text = 'Grüße 你好 🙂 \n\n x</s> y'
    ids = found.encode(text)
    self.assertEqual(found.decode(ids), text)
    self.assertEqual(
        found.decode(ids, skip_special_tokens=True), text.replace('</s>', '')
    )
    self.assertIn(found.eos_id, ids)
    self.assertEqual((found.bos_id, found.eos_id, found.pad_id), (0, 1, 2))
    self.assertEqual(found.bos_token, '<s>')
    self.assertEqual((found.eos_token, found.pad_token), ('</s>', '<pad>'))
    self.assertEqual(found.vocab_size, found.backend.get_vocab_size())
    self.assertIsNone(found.chat_template)
    again = pickle.loads(pickle.dumps(found))  # For workers that load data.
    self.assertEqual(again.encode(text), ids)

  def test_metaspace_writes_its_first_token(self):
    found = self.load(make=tokenizer_folders.metaspace)
    ids = found.encode('Hello é🙂')
    self.assertEqual(ids[0], found.bos_id)
    self.assertEqual(
        found.encode('Hello é🙂', add_special_tokens=False), ids[1:]
    )
    self.assertEqual(found.decode(ids[1:]), 'Hello é🙂')
    self.assertNotIn(0, ids)  # Nothing is unknown: bytes stand in.

  def test_nothing_is_truncated_or_padded(self):
    def make():
      backend = tokenizer_folders.byte_level()
      backend.enable_truncation(3)
      backend.enable_padding(length=64)
      return backend

    ids = self.load(make=make).encode('Once upon a time, there.')
    self.assertEqual(ids, self.load().encode('Once upon a time, there.'))

  def test_a_token_of_the_config_joins_the_vocabulary(self):
    before = self.load().vocab_size
    found = self.load(pad_token='<pad2>')
    self.assertEqual(found.vocab_size, before + 1)
    self.assertEqual(found.pad_id, before)
    self.assertEqual(found.encode('<pad2>'), [before])
    self.assertIsNone(self.load(bos_token=None).bos_id)

  def test_spaces_are_cleaned_up_after_word_piece_alone(self):
    make = tokenizer_folders.word_piece
    for cleans, want in ((True, 'hello, you.'), (False, 'hello , you .')):
      found = self.load(make=make, clean_up_tokenization_spaces=cleans)
      self.assertEqual(found.decode(found.encode('Hello, you.')), want)
    found = self.load(clean_up_tokenization_spaces=True)
    self.assertEqual(found.decode(found.encode('a . b')), 'a . b')

  def test_templates(self):
    named = [
        {'name': 'default', 'template': 'a'},
        {'name': 'tool_use', 'template': 'b'},
    ]
    self.assertEqual(self.load('a').chat_template, 'a')
    found = self.load(named)
    self.assertEqual((found.chat_template, found.tool_template), ('a', 'b'))
    self.assertEqual(chat.render_chat(found, CHAT), 'a')
    self.assertEqual(chat.render_chat(found, CHAT, tools=[TOOL]), 'b')
    (self.dir / 'chat_template.jinja').write_text('file')
    found = self.load(named)
    self.assertEqual((found.chat_template, found.tool_template), ('file', None))
    (self.dir / 'additional_chat_templates').mkdir()
    path = self.dir / 'additional_chat_templates' / 'tool_use.jinja'
    path.write_text('tool')
    found = self.load(named)
    self.assertEqual(
        (found.chat_template, found.tool_template), ('file', 'tool')
    )

  def test_special_tokens_reach_the_template(self):
    found = self.load('{{ bos_token }}{{ image_token }}', image_token='<img>')
    self.assertEqual(chat.render_chat(found, CHAT), '<s><img>')
    self.assertEqual(chat.render_chat(found, CHAT, bos_token='B'), 'B<img>')

  @parameterized.parameters(
      ('add_bos_token', True, 'byte_level'),
      ('add_eos_token', True, 'byte_level'),
      ('add_bos_token', False, 'metaspace'),
      ('add_eos_token', True, 'metaspace'),
  )
  def test_a_flag_that_contradicts_the_file_is_refused(self, flag, value, kind):
    found = self.load(make=getattr(tokenizer_folders, kind), **{flag: value})
    found.encode('x', add_special_tokens=False)
    with self.assertRaisesRegex(ValueError, f'Expected {flag}={value}'):
      found.encode('x')

  def test_flags_that_say_what_the_file_does(self):
    self.load(add_bos_token=False, add_eos_token=False).encode('x')
    make = tokenizer_folders.metaspace
    self.load(make=make, add_bos_token=True, add_eos_token=False).encode('x')

  def test_a_class_that_would_cut_otherwise_is_told(self):
    cases = (('prepend', 1), ('first', 0))
    for kind, want in cases:
      with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        self.load(
            make=lambda kind=kind: tokenizer_folders.metaspace(kind),
            tokenizer_class='LlamaTokenizerFast',
        )
      self.assertLen(found, want)

  @parameterized.parameters(
      ('tokenizer.json', '{}', 'of the library tokenizers'),
      ('tokenizer.json', '{"a', 'JSON in .*tokenizer.json'),
      ('tokenizer.json', '[]', 'tokenizer.json to be a JSON object'),
      ('tokenizer_config.json', '{"a', 'JSON in .*tokenizer_config.json'),
      (
          'tokenizer_config.json',
          '{"added_tokens_decoder": {"x": {}}}',
          'ids as the keys',
      ),
      ('tokenizer_config.json', '[]', 'tokenizer_config.json to be a JSON'),
      ('tokenizer_config.json', '{"bos_token": 1}', 'tokens in the JSON'),
      (
          'tokenizer_config.json',
          '{"added_tokens_decoder": {"3": {"content": "<new>"}}}',
          'to agree with tokenizer.json',
      ),
      (
          'tokenizer_config.json',
          '{"chat_template": [{"name": "rag", "template": "x"}]}',
          r"one named default, got \['rag'\]",
      ),
      ('tokenizer_config.json', '{"chat_template": 3}', 'one named default'),
      ('special_tokens_map.json', 'x', 'special_tokens_map.json'),
      ('added_tokens.json', '{"<new>": 7}', 'to agree with tokenizer.json'),
  )
  def test_refuses_a_broken_file(self, name, content, message):
    self.load()
    (self.dir / name).write_text(content)
    with self.assertRaisesRegex(ValueError, message):
      tokenizer.load(self.dir)

  def test_refuses_what_is_no_utf8(self):
    self.load()
    for name in ('chat_template.jinja', 'tokenizer_config.json'):
      (self.dir / name).write_bytes(b'\xff')
      with self.assertRaisesRegex(ValueError, f'{name} in UTF-8'):
        tokenizer.load(self.dir)

  def test_refuses_a_folder_without_the_file(self):
    with self.assertRaisesRegex(FileNotFoundError, 'got none: save_pretrained'):
      tokenizer.load(self.dir)
    (self.dir / 'tokenizer.model').write_bytes(b'')
    with self.assertRaisesRegex(FileNotFoundError, 'got tokenizer.model alone'):
      tokenizer.load(self.dir)

  @parameterized.parameters(
      ('tokenizers', 'tokenizer'), ('jinja2', 'chat_template')
  )
  def test_what_to_install(self, needed, module):
    name = f'bernoulli_lora_jax.models.{module}'
    with mock.patch.dict(sys.modules, {needed: None}):
      del sys.modules[name]
      with self.assertRaisesRegex(ImportError, r'bernoulli_lora_jax\[hf\]'):
        importlib.import_module(name)


class ChatTest(Folder):

  @parameterized.product(name=list(WRITTEN), kind=['byte_level', 'metaspace'])
  def test_mask(self, name, kind):
    make = getattr(tokenizer_folders, kind)
    found = self.load(chat_templates.ALL[name], make)
    ids, mask = chat.encode_chat(found, DONE)
    text = chat.render_chat(found, DONE)
    self.assertEqual(ids, found.encode(text, add_special_tokens=False))
    got = pieces(found, ids, mask)
    want = WRITTEN[name]
    if kind == 'metaspace':  # Whose decoder takes the first space away.
      got, want = [x.strip() for x in got], [x.strip() for x in want]
    self.assertEqual(got, want)
    ids_of_last, mask = chat.encode_chat(found, DONE, turns='last')
    self.assertEqual(ids_of_last, ids)
    self.assertEqual(
        [x.strip() for x in pieces(found, ids, mask)], [want[-1].strip()]
    )

  def test_what_follows_the_last_turn(self):
    found = self.load(chat_templates.QWEN2)
    ids, mask = chat.encode_chat(found, CHAT)
    self.assertEqual(pieces(found, ids, mask), ['Yes \n<|im_end|>'])
    self.assertEndsWith(found.decode(ids), 'Why?<|im_end|>\n')
    ids, mask = chat.encode_chat(found, CHAT, turns='last')
    self.assertEqual(pieces(found, ids, mask), ['Yes \n<|im_end|>'])
    self.assertEndsWith(found.decode(ids), 'Yes \n<|im_end|>\n')

  def test_a_turn_without_an_end_keeps_its_newline(self):
    template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    found = self.load(template)
    ids, mask = chat.encode_chat(found, CHAT)
    self.assertEqual(pieces(found, ids, mask), ['Yes \n\n'])

  def test_a_token_over_the_border_is_the_assistants(self):
    tokens = ['u', 'x', ':', 'y', ':y', 'yu']
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(':', 'y'), ('y', 'u')],
        )
    )
    template = (
        "{% for m in messages %}{{ {'user': 'u', 'assistant': ':'}[m.role] }}"
        '{{ m.content }}{% endfor %}'
        "{% if add_generation_prompt %}{{ ':' }}{% endif %}"
    )
    found = tokenizer.Tokenizer(backend, {}, chat_template=template)
    # What is checked beside needs no characters that this one has not.
    messages = [
        {'role': 'user', 'content': 'x'},
        {'role': 'assistant', 'content': 'yxy'},
        {'role': 'user', 'content': 'x'},
    ]
    ids, mask = chat.encode_chat(found, messages)
    self.assertEqual([tokens[i] for i in ids], ['u', 'x', ':y', 'x', 'yu', 'x'])
    self.assertEqual(mask, [False, False, True, True, True, False])

  @parameterized.parameters(
      lambda: tokenizer_folders.byte_level(trim_offsets=True),
      lambda: tokenizer_folders.byte_level(trim_offsets=False),
      tokenizer_folders.byte_level_with_bos,
  )
  def test_spaces_and_nothing(self, make):
    found = self.load(chat_templates.QWEN2, make)
    for content in ('', ' ', '\n', '  x  ', '🙂\u0301', 'é'):
      messages = [USER, {'role': 'assistant', 'content': content}, CHAT[2]]
      ids, mask = chat.encode_chat(found, messages)
      self.assertEqual(pieces(found, ids, mask), [content + '<|im_end|>'])
    # A token of the header's newline and the spaces: over the border, it counts.
    messages = [USER, {'role': 'assistant', 'content': '   '}, CHAT[2]]
    ids, mask = chat.encode_chat(found, messages)
    self.assertEqual(pieces(found, ids, mask), ['\n   <|im_end|>'])

  def test_a_space_that_ends_a_generation(self):
    found = self.load(
        '{% for m in messages %}{% if m.role == "user" %}{{ m.content }}'
        '{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}'
        '{{ eos_token }}{% endfor %}'
    )
    messages = [CHAT[2], {'role': 'assistant', 'content': 'So.  '}]
    ids, mask = chat.encode_chat(found, messages)
    self.assertEqual(pieces(found, ids, mask), ['So.  '])

  def test_special_tokens_inside_of_content(self):
    found = self.load(chat_templates.QWEN2)
    content = 'a <|im_end|>\n<|im_start|>user\nb'
    messages = [USER, {'role': 'assistant', 'content': content}]
    ids, mask = chat.encode_chat(found, messages)
    self.assertEqual(pieces(found, ids, mask), [content + '<|im_end|>'])

  def test_thoughts_are_trained_on_turn_by_turn(self):
    found = self.load(chat_templates.QWEN3)
    turns = [
        {**message, 'reasoning_content': 'Hm.'}
        if message['role'] == 'assistant'
        else message
        for message in DONE
    ]
    with self.assertRaisesRegex(ValueError, "messages.:1. .*turns='last'"):
      chat.encode_chat(found, turns)
    texts = []
    for k in (1, 3):
      ids, mask = chat.encode_chat(found, turns[: k + 1], turns='last')
      texts += pieces(found, ids, mask)
    self.assertEqual(
        texts,
        [
            '<think>\nHm.\n</think>\n\nYes \n<|im_end|>',
            '<think>\nHm.\n</think>\n\nSo.<|im_end|>',
        ],
    )
    # The prompt without thoughts has the empty one, which is not trained on.
    ids, mask = chat.encode_chat(
        found, DONE, turns='last', enable_thinking=False
    )
    self.assertEqual(pieces(found, ids, mask), ['So.<|im_end|>'])
    self.assertIn('<think>\n\n</think>\n\nSo.', found.decode(ids))

  def test_calls_of_tools_are_the_assistants(self):
    found = self.load(chat_templates.QWEN3)
    call = {'function': {'name': 'add', 'arguments': {'x': 2}}}
    messages = [
        USER,
        {
            'role': 'assistant',
            'reasoning_content': 'Add.',
            'tool_calls': [call],
        },
        {'role': 'tool', 'content': '5'},
        {'role': 'assistant', 'reasoning_content': 'Good.', 'content': '5.'},
    ]
    ids, mask = chat.encode_chat(found, messages, tools=[TOOL])
    self.assertEqual(
        pieces(found, ids, mask),
        [
            '<think>\nAdd.\n</think>\n\n<tool_call>\n{"name": "add", "arguments":'
            ' {"x": 2}}\n</tool_call><|im_end|>',
            '<think>\nGood.\n</think>\n\n5.<|im_end|>',
        ],
    )

  @parameterized.parameters(
      ([], 'a turn of the'),
      ([USER], "a turn of the 'assistant', got roles="),
      ([USER, {'content': 'x'}], r'messages\[1\] to have a role'),
      (['x'], r'messages\[0\] to have a role'),
      ([{'role': 'user'}, ANSWER], r'messages\[0\] to have content'),
      ([{'role': 'user', 'content': ['x']}, ANSWER], 'content that is text'),
      ([USER, {'role': 'assistant', 'content': None}], 'content that is text'),
  )
  def test_refuses_messages(self, messages, error):
    found = self.load(chat_templates.QWEN2)
    with self.assertRaisesRegex(ValueError, error):
      chat.encode_chat(found, messages)

  def test_refuses_what_the_template_leaves_out(self):
    found = self.load(chat_templates.ZEPHYR)
    tool = {'role': 'tool', 'content': '5'}
    with self.assertRaisesRegex(ValueError, r"messages\[1\].* role='tool'"):
      chat.encode_chat(found, [USER, tool, ANSWER])
    # Published so: the system prompt is written where a user's turn is last.
    found = self.load(chat_templates.MISTRAL)
    with self.assertRaisesRegex(ValueError, r"messages\[0\].* role='system'"):
      chat.encode_chat(found, [SYSTEM, USER, ANSWER])

  def test_refuses_what_the_template_refuses(self):
    found = self.load(chat_templates.GEMMA)
    with self.assertRaisesRegex(ValueError, 'System role not supported'):
      chat.encode_chat(found, [SYSTEM, USER, ANSWER])
    with self.assertRaisesRegex(ValueError, 'roles must alternate'):
      chat.encode_chat(found, [USER, USER, ANSWER])

  def test_thoughts_that_the_prompt_excludes_are_refused(self):
    found = self.load(chat_templates.QWEN3)
    answer = {**ANSWER, 'reasoning_content': 'Hm.'}
    with self.assertRaisesRegex(ValueError, 'anew: mark {% generation %}'):
      chat.encode_chat(
          found, [USER, answer], turns='last', enable_thinking=False
      )

  def test_refuses_templates_that_tell_nothing(self):
    cases = {
        # No prompt for generation: the header would be trained on.
        chat_templates.QWEN2.split('{% if add_generation_prompt')[0]: (
            r"opening='<\|im_start\|>assistant\\n'"
        ),
        # A prompt after a user alone: the second of two answers has a header.
        chat_templates.QWEN2.replace(
            'if add_generation_prompt',
            'if add_generation_prompt and messages[-1].role == "user"',
        ): r"opening='<\|im_start\|>assistant\\n'",
        # A text that is closed after its last turn.
        '{% for m in messages %}{{ m.content }}{% endfor %}</s>': (
            'writes them anew: call'
        ),
        # Newest first.
        '{% for m in messages | reverse %}{{ m.content }}{% endfor %}': (
            'writes them anew: call'
        ),
        '{% generation %}{% endgeneration %}{% for m in messages %}'
        '{{ m.content }}{% endfor %}': 'a token of the assistant',
    }
    for template, message in cases.items():
      found = self.load(template)
      with self.assertRaisesRegex(ValueError, message):
        chat.encode_chat(found, [*DONE, ANSWER])
    with self.assertRaisesRegex(ValueError, 'with a chat template, got none'):
      chat.encode_chat(self.load(), DONE)
    with self.assertRaisesRegex(ValueError, 'Expected turns in'):
      chat.encode_chat(self.load('x'), DONE, turns='first')


class RowsTest(Folder):
  """Texts as rows for an encoder."""

  @parameterized.parameters(tokenizer_folders.bert, tokenizer_folders.roberta)
  def test_special_tokens_and_the_cut(self, make):
    words = self.load(make=make)
    texts = ['hello there', '', 'once upon a time there was a tokenizer']
    bare = [words.encode(x, add_special_tokens=False) for x in texts]
    first, last = words.bos_id, words.eos_id
    rows = tokenizer.encode_rows(words, texts, 7)
    self.assertGreater(len(bare[2]), 5)
    for ids, row, mask in zip(bare, rows['tokens'], rows['mask'], strict=True):
      expected = [first, *ids[:5], last]
      size = len(expected)
      padding = [words.pad_id] * (7 - size)
      self.assertEqual(row.tolist(), expected + padding)
      self.assertEqual(mask.tolist(), [True] * size + [False] * (7 - size))
    self.assertEqual(
        {k: (x.dtype, x.shape) for k, x in rows.items()},
        {
            'tokens': (np.int32, (3, 7)),
            'mask': (bool, (3, 7)),
            'types': (np.int32, (3, 7)),
        },
    )
    self.assertEqual(rows['types'].max(), 0)
    # Nothing is left behind in the tokenizer.
    self.assertEqual(words.encode(texts[2]), [first, *bare[2], last])

  def test_pairs(self):
    words = self.load(make=tokenizer_folders.bert)
    long, short = 'once upon a time there was a world', 'a'
    ids = {x: words.encode(x, add_special_tokens=False) for x in (long, short)}
    self.assertGreater(len(ids[long]), 6)
    (one,) = ids[short]
    rows = tokenizer.encode_rows(words, [long, short], 10, [short, long])
    first, last = words.bos_id, words.eos_id
    room = 10 - 3 - 1  # The longer one is cut.
    self.assertEqual(
        rows['tokens'].tolist(),
        [
            [first, *ids[long][:room], last, one, last],
            [first, one, last, *ids[long][:room], last],
        ],
    )
    self.assertEqual(
        rows['types'].tolist(),
        [[0] * (room + 2) + [1] * 2, [0] * 3 + [1] * (room + 1)],
    )

  @parameterized.parameters(
      (dict(texts=[]), ValueError, 'at least one text'),
      (dict(length=2), ValueError, 'length >= 3'),
      (dict(length=7.0), TypeError, 'length to be an int'),
      (dict(pairs=['a', 'b']), ValueError, 'Expected 1 pairs'),
      (dict(pairs=['a'], length=3), ValueError, 'length >= 4'),
  )
  def test_rejects(self, change, kind, message):
    given = dict(texts=['a'], length=8) | change
    words = self.load(make=tokenizer_folders.bert)
    with self.assertRaisesRegex(kind, message):
      tokenizer.encode_rows(words, **given)

  def test_rejects_tokenizers(self):
    bare = self.load(make=tokenizer_folders.word_piece)
    with self.assertRaisesRegex(ValueError, 'special tokens around.*and 0 of'):
      tokenizer.encode_rows(bare, ['a'], 8)
    make = tokenizer_folders.bert
    unpadded = self.load(make=make, pad_token=None)
    with self.assertRaisesRegex(ValueError, 'that pads.*pad_token=None'):
      tokenizer.encode_rows(unpadded, ['a'], 8)
    contradicted = self.load(make=make, add_eos_token=False)
    with self.assertRaisesRegex(ValueError, 'add_eos_token'):
      tokenizer.encode_rows(contradicted, ['a'], 8)
