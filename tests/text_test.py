"""Text of one's own: masks, packing, places, errors, and a decoder trained on it."""

import dataclasses
import gzip
import json
import pathlib
import sys
from unittest import mock
import warnings

from absl.testing import parameterized
import chat_templates
import chex
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_folders
from tokenizers import processors

from bernoulli_lora_jax import parts
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import language_model
from bernoulli_lora_jax.tasks import packing
from bernoulli_lora_jax.tasks import records as records_lib
from bernoulli_lora_jax.tasks import text
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop

BYTES = text.Bytes()
TURNS = [
    {'role': 'user', 'content': 'Hello'},
    {'role': 'assistant', 'content': 'the answer'},
    {'role': 'user', 'content': 'how are you'},
    {'role': 'assistant', 'content': 'fine'},
]


def make_documents(count=23, longest=11, seed=0):
  """Returns documents of tokens that occur once each: 100 d + place."""
  sizes = np.random.default_rng(seed).integers(2, longest + 1, count)
  ids = [100 * d + np.arange(size) for d, size in enumerate(sizes)]
  return packing.Documents.of([(x, x % 3 != 1) for x in ids])


def trained(batches):
  """Returns the sorted trained tokens of rows."""
  found = [row['tokens'][row['weights'] > 0] for row in batches]
  return np.sort(np.concatenate(found)).tolist()


def all_trained(documents):
  return sorted(documents.tokens[documents.mask].tolist())


def make_model(vocab_size=257, **more):
  """Returns a tiny decoder that came from no folder."""
  sizes = dict(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2)
  config = decoder.DecoderConfig(
      vocab_size=vocab_size, num_kv_heads=1, head_dim=8, **sizes, **more
  )
  shapes = hf.param_shapes(config)
  flat = {
      path: jax.random.normal(jax.random.key(i), x.shape) / 4
      for i, (path, x) in enumerate(shapes.items())
  }
  params = traverse_util.unflatten_dict(flat, sep='/')
  return hf.describe(config, params)


class TextTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _folder(self, tmp_path):
    self.tmp = tmp_path

  def write(self, *lines, name='data.jsonl'):
    path = self.tmp / name
    as_text = [x if isinstance(x, str) else json.dumps(x) for x in lines]
    path.write_text('\n'.join(as_text) + '\n')
    return path

  def tokenizer(self, template=None, backend=None, **config):
    folder = tokenizer_folders.write(
        self.tmp / 'tokenizer',
        backend or tokenizer_folders.byte_level(),
        template,
        **config,
    )
    return tokenizer_lib.load(folder)

  def load(self, data, tokenizer=BYTES, **options):
    options = {'kind': 'instruction', 'max_length': 200, **options}
    return text.load(data, tokenizer, **options)

  def marked(self, documents, tokenizer):
    """Returns [(text that is trained, text that is not)] of documents."""
    return [
        tuple(
            tokenizer.decode(row['tokens'][row['weights'] == on])
            for on in (1, 0)
        )
        for row in (documents[i] for i in range(len(documents)))
    ]


class SourcesTest(TextTest):

  def test_prompt_and_completion(self):
    """The completion and the end token, by hand."""
    path = self.write({'prompt': 'ab', 'completion': 'cé'}, '', '  ')
    documents = self.load(path)['train']
    self.assertEqual(documents.ends.tolist(), [6])
    self.assertEqual(documents.tokens.tolist(), [97, 98, 99, 0xC3, 0xA9, 256])
    self.assertEqual(documents.mask.tolist(), [False] * 2 + [True] * 4)

  @parameterized.parameters(False, True)
  def test_a_pair_is_tokenised_once(self, with_bos):
    kind = 'byte_level_with_bos' if with_bos else 'byte_level'
    tokenizer = self.tokenizer(backend=getattr(tokenizer_folders, kind)())
    path = self.write({'prompt': 'Hello there', 'completion': ', how are'})
    documents = self.load(path, tokenizer)['train']
    whole = tokenizer.encode('Hello there, how are')
    self.assertEqual(documents.tokens.tolist(), [*whole, tokenizer.eos_id])
    ((on, off),) = self.marked(documents, tokenizer)
    self.assertEqual(on, ', how are</s>')
    self.assertEqual(off, ('<s>' if with_bos else '') + 'Hello there')

  def test_an_end_token_is_not_doubled(self):
    backend = tokenizer_folders.byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)]
    )
    tokenizer = self.tokenizer(backend=backend)
    path = self.write({'prompt': 'Hello', 'completion': ' you'})
    documents = self.load(path, tokenizer)['train']
    self.assertEqual(
        self.marked(documents, tokenizer), [(' you</s>', '<s>Hello')]
    )
    lines = self.write({'text': 'Hello you'})
    ids = self.load(lines, tokenizer, kind='language_model')['train'].tokens
    self.assertEqual(tokenizer.decode(ids), '<s>Hello you</s>')

  def test_messages(self):
    """The assistant's turns, all, the last, or a document of each."""
    tokenizer = self.tokenizer(chat_templates.GENERATION)
    path = self.write({'messages': TURNS})
    both = self.load(path, tokenizer)['train']
    ((on, _),) = self.marked(both, tokenizer)
    self.assertEqual(on, 'the answer<|im_end|>fine<|im_end|>')
    last = self.load(path, tokenizer, turns='last')['train']
    self.assertEqual(self.marked(last, tokenizer)[0][0], 'fine<|im_end|>')
    each = self.load(path, tokenizer, turns='each')['train']
    found = [on for on, _ in self.marked(each, tokenizer)]
    self.assertEqual(found, ['the answer<|im_end|>', 'fine<|im_end|>'])

  def test_a_template_that_writes_turns_anew(self):
    tokenizer = self.tokenizer(chat_templates.QWEN3)
    turns = [dict(x) for x in TURNS]
    turns[1]['content'] = '<think>\nhm\n</think>\n\nthe answer'
    path = self.write({'messages': turns})
    with self.assertRaisesRegex(ValueError, 'line 1 .*writes them anew'):
      self.load(path, tokenizer)
    each = self.load(path, tokenizer, turns='each')['train']
    self.assertLen(each, 2)
    self.assertIn('hm', self.marked(each, tokenizer)[0][0])

  def test_a_template_where_it_is_asked_for(self):
    tokenizer = self.tokenizer(chat_templates.GENERATION)
    path = self.write({'prompt': 'Hello', 'completion': 'you'})
    documents = self.load(path, tokenizer, template=True)['train']
    ((on, off),) = self.marked(documents, tokenizer)
    self.assertEqual(on, 'you<|im_end|>')
    self.assertIn('<|im_start|>user\nHello<|im_end|>', off)

  def test_windows(self):
    """Every token but a document's first is predicted once."""
    (self.tmp / 'in' / 'deeper').mkdir(parents=True)
    one = self.write('abcdefgh', name='in/one.txt')
    self.write({'text': 'xy'}, name='in/deeper/two.jsonl')
    self.write('never', name='in/three.py')
    expected = ['abcd', 'defg', 'gh\n<end>']
    for data, texts in (
        (one, expected),
        (self.tmp / 'in', ['xy<end>', *expected]),
        (f'{self.tmp}/**/[ot][nw]*', ['xy<end>', *expected]),
    ):
      documents = self.load(data, kind='language_model', max_length=4)['train']
      rows = [documents[i] for i in range(len(documents))]
      self.assertEqual([BYTES.decode(row['tokens']) for row in rows], texts)
      for row in rows:
        ones = [1] * (len(row['weights']) - 1)
        self.assertEqual(row['weights'].tolist(), [0, *ones])

  def test_separator(self):
    path = self.write('ab', '', 'cd', name='a.txt')
    found = self.load(path, kind='language_model', separator='\n\n')['train']
    self.assertEqual(BYTES.decode(found.tokens), 'ab<end>cd\n<end>')

  def test_held_out(self):
    """By content: the order does not matter, equal documents stay together."""
    lines = [{'prompt': f'p{i % 60}', 'completion': 'c'} for i in range(120)]
    found = self.load(self.write(*lines), eval_fraction=0.25)
    turned = self.load(
        self.write(*({'id': 1, **x} for x in lines[::-1])), eval_fraction=0.25
    )
    texts = lambda documents: {
        bytes(documents[i]['tokens'].astype(np.uint8))
        for i in range(len(documents))
    }
    parts = [texts(found[part]) for part in ('train', 'validation')]
    self.assertEmpty(parts[0] & parts[1])
    self.assertLen(parts[0] | parts[1], 60)
    self.assertEqual(parts[1], texts(turned['validation']))
    self.assertEqual(sum(map(len, found.values())), 120)
    self.assertBetween(len(parts[1]), 5, 25)

  @parameterized.parameters(
      (lambda i: {'text': f'{i}'}, 'language_model'),
      (lambda i: {'instruction': f'{i}', 'output': 'a'}, 'instruction'),
  )
  def test_held_out_by_what_is_read(self, line, kind):
    """Fields beside it change nothing."""
    found = [
        self.load(path, kind=kind, eval_fraction=0.5)['validation'].digest
        for more in ({}, {'id': 1})
        for path in [self.write(*({**line(i), **more} for i in range(40)))]
    ]
    self.assertEqual(found[0], found[1])

  def test_fraction(self):
    """A fourth is held out; a larger fraction holds out those, and others."""
    path = self.write(
        *({'prompt': f'{i}', 'completion': 'c'} for i in range(400))
    )
    held_out = []
    for fraction in (0.25, 0.5):
      tokens = self.load(path, eval_fraction=fraction)['validation'].tokens
      held_out.append(set(BYTES.decode(tokens).split('<end>')) - {''})
    self.assertLess(abs(len(held_out[0]) - 100), 5 * (400 * 3 / 16) ** 0.5)
    self.assertLess(abs(len(held_out[1]) - 200), 5 * (400 / 4) ** 0.5)
    self.assertContainsSubset(held_out[0], held_out[1])

  def test_a_file_is_held_out(self):
    one = self.write({'prompt': 'a', 'completion': 'b'})
    two = self.write({'prompt': 'c', 'completion': 'd'}, name='two.jsonl')
    found = self.load(one, eval_data=two)
    self.assertEqual(BYTES.decode(found['train'].tokens), 'ab<end>')
    self.assertEqual(BYTES.decode(found['validation'].tokens), 'cd<end>')

  def texts(self, data, tokenizer=BYTES, **options):
    """Returns the texts of documents, what is trained in «»."""
    documents = self.load(data, tokenizer, kind='auto', **options)['train']
    shown = text.show(documents, tokenizer, count=9).split('--- document ')
    return [x.partition('\n')[2].rstrip('\n') for x in shown[1:]]

  def test_kinds(self):
    pair, chat = {'prompt': 'a', 'completion': 'b'}, {'messages': TURNS}
    for first, kind in (
        (pair, 'instruction'),
        ({**chat, 'text': 'x'}, 'instruction'),
        ({'messages': None, 'text': 'x'}, 'language_model'),
        ({'conversations': TURNS}, 'instruction'),
        ({'instruction': 'x', 'output': 'y'}, 'instruction'),
        ({'text': 'x'}, 'language_model'),
    ):
      self.assertEqual(text.kind_of(self.write(first, '{')), kind)
      self.assertEqual(text.kind_of(self.write('{', first)), kind)
    prose = self.write('prose', name='a.txt')
    self.assertEqual(text.kind_of(prose), 'language_model')
    path = self.write({'q': 'a'}, '{')
    with self.assertRaisesRegex(ValueError, r"got line 1 \(.*\['q'\]; known"):
      text.kind_of(path)
    self.assertEqual(
        text.kind_of(path, columns={'q': 'text'}), 'language_model'
    )
    mixed = self.write({'text': 'a'}, pair)
    with self.assertRaisesRegex(ValueError, "1 bad of 2: line 2 .*'text'"):
      self.texts(mixed)

  def test_columns(self):
    path = self.write({'question': 'a', 'answer': 'b', 'prompt': 'no'})
    columns = {'question': 'prompt', 'answer': 'completion'}
    self.assertEqual(self.texts(path, columns=columns), ['a«b<end>»'])

  def test_alpaca(self):
    path = self.write(
        {'instruction': 'add', 'input': '1 2', 'output': '3', 'text': 'x'},
        {'instruction': 'say', 'input': '', 'output': 'a'},
        {'instruction': 'say', 'input': None, 'output': 'b'},
    )
    plain = '### Instruction:\n{}\n\n### Response:\n«{}<end>»'
    self.assertEqual(
        self.texts(path),
        [
            plain.format(*x)
            for x in [('add\n1 2', '3'), ('say', 'a'), ('say', 'b')]
        ],
    )
    chat = (
        '<|im_start|>user\nadd\n1 2<|im_end|>\n<|im_start|>assistant\n'
        '«3<|im_end|>»'
    )
    tokenizer = self.tokenizer(chat_templates.GENERATION)
    self.assertEqual(self.texts(path, tokenizer)[0], chat)

  def test_spellings_of_chats(self):
    """ShareGPT, lists of parts, and turns before a completion."""
    tokenizer = self.tokenizer(chat_templates.GENERATION)
    roles = {'system': 'system', 'user': 'human', 'assistant': 'gpt'}
    turns = [{'role': 'system', 'content': 'model'}, *TURNS]
    parts = [{'type': 'text', 'text': 'mo'}, {'type': 'text', 'text': 'del'}]
    shared = [{'from': roles[x['role']], 'value': x['content']} for x in turns]
    expected = self.texts(self.write({'messages': turns}), tokenizer)
    self.assertIn('«fine<|im_end|>»', expected[0])
    path = self.write(
        {'conversations': shared},
        {'system': 'model', 'conversations': shared[1:]},
        {'conversations': turns, 'prompt': 'not read'},
        {'messages': [{'role': 'system', 'content': parts}, *TURNS]},
    )
    self.assertEqual(self.texts(path, tokenizer), expected * 4)
    path = self.write({'prompt': turns[:-1], 'completion': turns[-1:]})
    last = expected[0].replace('«the answer<|im_end|>»', 'the answer<|im_end|>')
    self.assertEqual(self.texts(path, tokenizer), [last])

  def test_tools_as_json(self):
    tokenizer = self.tokenizer(chat_templates.QWEN3)
    tools = [{'type': 'function', 'function': {'name': 'add'}}]
    path = self.write(
        {'messages': TURNS[:2], 'tools': tools},
        {'messages': TURNS[:2], 'tools': json.dumps(tools)},
    )
    found = self.texts(path, tokenizer, max_length=400)
    self.assertIn('<tools>', found[0])
    self.assertEqual(found[0], found[1])

  def test_forms_of_files(self):
    """Marks and ends of lines of other systems, arrays, gzip."""
    pair = {'prompt': 'a\u2028', 'completion': 'b'}
    line = json.dumps(pair, ensure_ascii=False)
    expected = ['a\\u2028«b<end>»'] * 2
    for name, content in (
        ('a.jsonl', f'\ufeff{line}\r\n\r\n{line}\r\n \n'),
        ('b.json', json.dumps([pair] * 2, indent=1)),
        ('c.json', f'{line}\n{line}'),
        ('d.jsonl.gz', f'{line}\n{line}\n'),
        ('e.json.gz', json.dumps([pair] * 2)),
    ):
      raw = content.encode()
      path = self.tmp / name
      path.write_bytes(gzip.compress(raw) if name.endswith('gz') else raw)
      self.assertEqual(self.texts(path), expected, name)
    path = self.tmp / 'f.txt.gz'
    path.write_bytes(gzip.compress(b'ab'))
    self.assertEqual(self.texts(path), ['a«b<end>»'])
    for name, content, message in (
        ('a.jsonl', '\ufeff\r\n', 'got an empty file'),
        ('a.jsonl.gz', line, 'in gzip, got: Not a gzipped file'),
        ('a.json', '[]', 'got an empty file'),
        ('a.json', '[3]', r'got record 1 \(no JSON object: 3\)'),
        ('a.json', '{"data": []}', r"record 1 \(no field .*\['data'\]"),
    ):
      path = self.tmp / name
      path.write_bytes(content.encode())
      with self.assertRaisesRegex(ValueError, message):
        self.texts(path)

  def test_a_long_text_in_pieces(self):
    """The ids are those of the whole, special tokens around it included."""
    words = 'def add(x, y):\n    return x + y\n\nHello there,\nhow are you?\n'
    for kind in ('byte_level_with_bos', 'metaspace'):
      tokenizer = self.tokenizer(backend=getattr(tokenizer_folders, kind)())
      whole = tokenizer.encode(words * 9)
      with mock.patch.object(text, '_PIECE', 50):
        found = text._encode_long(tokenizer, words * 9)
      self.assertEqual(found.tolist(), whole)
    tokenizer = self.tokenizer(backend=tokenizer_folders.byte_level())
    backend = mock.Mock(wraps=tokenizer.backend)
    with mock.patch.object(text, '_PIECE', 50):
      text._encode_long(
          dataclasses.replace(tokenizer, backend=backend), words * 9
      )
    pieces = backend.encode_batch_fast.call_args.args[0]
    self.assertEqual(''.join(pieces), words * 9)
    self.assertLess(max(map(len, pieces)), 120)

  def test_show_keeps_spaces(self):
    backend = tokenizer_folders.metaspace()
    tokenizer = self.tokenizer(chat_templates.LLAMA2, backend)
    (shown,) = self.texts(self.write({'messages': TURNS[:2]}), tokenizer)
    self.assertEqual(shown, '<s> [INST] Hello [/INST]« the answer </s>»')

  def test_show_of_long_and_odd_texts(self):
    """The middle is left out; what moves the cursor is escaped."""
    path = self.write({'text': 'a' * 500 + '\x1b[2J\r\n' + 'b' * 500})
    documents = self.load(path, kind='language_model', max_length=2000)['train']
    shown = text.show(documents, BYTES, longest=9).split('\n')
    self.assertEqual(
        shown[1:], ['a«aaaa»', '[... 998 tokens left out ...]', '«bbb<end>»']
    )
    shown = text.show(documents, BYTES, longest=2000)
    self.assertIn(r'a\x1b[2J\r' + '\n', shown)

  def test_show(self):
    path = self.write(*({'prompt': 'ab', 'completion': 'cd'} for _ in 'xyz'))
    shown = text.show(self.load(path)['train'], BYTES)
    one = '--- document {}: 3 of 5 tokens trained, those in «»\nab«cd<end>»'
    self.assertEqual(shown, f'{one.format(0)}\n{one.format(1)}')

  BAD = (
      ('{"prompt": ', 'line 2 (no JSON: '),
      ('[1]', 'line 2 (no JSON object: [1])'),
      ({'prompt': 'a'}, "line 2 (no field 'completion' among ['prompt'])"),
      ({'q': 'a'}, "line 2 (no field that is known among ['q']; known are 'mes"),
      ({'text': 'a'}, "line 2 ('text', which kind='language_model' reads)"),
      ({'prompt': 1, 'completion': 'b'}, "line 2 ('prompt' is no text but 1)"),
      ({'prompt': 'a', 'completion': ' '}, "line 2 ('completion' is empty)"),
      ({'messages': 'a'}, "line 2 ('messages' is no list of turns but 'a')"),
      ({'messages': TURNS, 'completion': 'a'}, "2 (both 'messages' and 'comp"),
      ({'prompt': 'a', 'completion': None}, "'completion' is no text but None"),
      ('{"prompt": "a", "completion": "\\ud83d"}', 'half a character'),
      ('[' * 99999, 'line 2 (no JSON: maximum recursion'),
      (
          {'messages': [{'role': 'user', 'content': None}, TURNS[1]]},
          'Expected messages[0] to have content that is text',
      ),
      (
          {'messages': [{'role': 'user', 'content': '\ud83d'}, TURNS[1]]},
          'line 2 (messages[0] has ',
      ),
      (
          {'messages': [{'role': 'user', 'content': [
              {'type': 'text', 'text': 'a'}, {'type': 'image_url'}]}]},
          "no text: parts of types ['text', 'image_url']",
      ),
      (
          {'messages': [TURNS[0], {**TURNS[1], 'weight': 0}]},
          'messages[1] has weight=0: turns count alike',
      ),
      (
          {'conversations': [{'from': 'function_call', 'value': 'a'}]},
          "conversations[0] is from 'function_call', known are human",
      ),
      ({'conversations': [{'from': 'gpt'}]}, 'content that is text'),
      ({'messages': TURNS, 'tools': '{'}, "'tools' is no JSON"),
      ({'instruction': 'a', 'output': ''}, "line 2 ('output' is empty)"),
      ({'instruction': 'a'}, "no field 'output' among ['instruction']"),
      (
          {'instruction': 'a', 'output': 'b', 'history': [['c', 'd']]},
          "'history' beside 'instruction': give messages",
      ),
      (
          {'prompt': TURNS[:1], 'completion': TURNS[1:]},
          "'completion' has more than one turn",
      ),
      ({'messages': TURNS[:1]}, "line 2 (Expected a turn of the 'assistant'"),
      ({'messages': [3]}, 'line 2 (Expected messages[0] to have a role'),
      ({'messages': [{'role': 'assistant'}]}, 'to have content that is text'),
      (
          {'messages': [{'role': 'system', 'content': 'x'}, *TURNS]},
          'System role not supported',
      ),
  )  # fmt: skip

  def test_bad_lines(self):
    """Each is named by line and reason; skipped, the others are what there is."""
    tokenizer = self.tokenizer(chat_templates.GEMMA)
    good = {'prompt': 'Hello', 'completion': 'you'}
    expected = self.load(self.write(good, good), tokenizer)['train']
    for bad, message in self.BAD:
      path = self.write(good, bad, good)
      with self.assertRaises(ValueError) as raised:
        self.load(path, tokenizer)
      self.assertIn('1 bad of 3: ', str(raised.exception))
      self.assertIn(message, str(raised.exception))
      self.assertNotIn('\n', str(raised.exception))
      with pytest.warns(UserWarning, match='1 bad of 3') as caught:
        found = self.load(path, tokenizer, skip_bad=True)['train']
      self.assertLen(caught, 1)
      self.assertEqual(found.digest, expected.digest)

  def test_many_bad_lines(self):
    path = self.write('', *['{ {'] * 9)
    with self.assertRaisesRegex(
        ValueError, '9 bad of 9: line 2 .*line 4 .*, and 6 more: correct'
    ):
      self.load(path)
    with self.assertRaisesRegex(ValueError, '9 bad of 9: .*: none is left'):
      self.load(path, skip_bad=True)

  def test_over_limit(self):
    lines = [
        {'prompt': 'ab', 'completion': 'c'},
        {'prompt': 'ab', 'completion': 'cdefg'},
        {'prompt': 'abcdef', 'completion': 'g'},
    ]
    path = self.write(*lines)
    options = dict(max_length=4)
    with self.assertRaisesRegex(ValueError, '2 longer than max_length=4'):
      self.load(path, **options)
    with pytest.warns(UserWarning, match='2 longer than .*=4, dropped.$'):
      found = self.load(path, over_limit='drop', **options)['train']
    self.assertEqual(BYTES.decode(found.tokens), 'abc<end>')
    with pytest.warns(UserWarning, match='truncated, 1 of them to nothing'):
      found = self.load(path, over_limit='truncate', **options)['train']
    self.assertEqual(BYTES.decode(found.tokens), 'abc<end>abcd')

  def test_rejects(self):
    good = self.write({'prompt': 'a', 'completion': 'b'})
    empty, blank = self.write(name='empty.jsonl'), self.tmp / 'b.txt'
    blank.write_text('')
    prose = self.write('prose', name='prose.txt')
    chats = self.write({'messages': TURNS}, name='chats.jsonl')
    no_roles = self.tokenizer("{{ messages[0]['content'] }}")
    no_end = self.tokenizer()
    no_end = tokenizer_lib.Tokenizer(no_end.backend, {})
    conflict = dataclasses.replace(self.tokenizer(), conflict='they disagree')
    for data, options, message in (
        (
            self.tmp / 'none.txt',
            {},
            'a pattern of files or a dataset in .*, got none',
        ),
        (self.tmp / 'tokenizer', {}, 'files in the folder .*, got none'),
        (empty, {}, 'got an empty file'),
        (blank, {'kind': 'language_model'}, 'got an empty file'),
        (prose, {}, "kind='instruction', got text: 'prose"),
        (chats, {}, 'chat template for messages, got none'),
        (chats, {'tokenizer': no_roles}, 'writes messages.1., which it leaves'),
        (good, {'tokenizer': no_end}, 'end token, got none: name eos_token'),
        (prose, {'tokenizer': no_end, 'kind': 'language_model'}, 'end token'),
        (good, {'tokenizer': conflict}, 'they disagree'),
        (good, {'kind': 'other'}, "kind='other'"),
        (good, {'turns': 'first'}, "turns='first'"),
        (good, {'over_limit': 'cut'}, "over_limit='cut'"),
        (good, {'max_length': 1}, 'max_length >= 2'),
        (good, {'eval_fraction': 1.0}, r'eval_fraction in \[0, 1\)'),
        (good, {'eval_fraction': 0.1, 'eval_data': good}, 'eval_data or'),
        (good, {'eval_fraction': 1e-9}, "documents in the part 'validation'"),
    ):
      with self.assertRaisesRegex((ValueError, FileNotFoundError), message):
        self.load(data, **options)
    with self.assertRaisesRegex(ValueError, 'below 100, .*got id=256'):
      text.check_vocabulary(self.load(good)['train'], BYTES, 100)
    text.check_vocabulary(self.load(good)['train'], BYTES, 257)


class DatasetsTest(TextTest):

  @pytest.fixture(autouse=True)
  def _library(self, monkeypatch, tmp_path):
    self.lib = pytest.importorskip('datasets')
    self.lib.disable_progress_bars()
    cache = str(tmp_path / 'cache')
    monkeypatch.setattr(self.lib.config, 'HF_DATASETS_CACHE', cache)

  def found(self, data, **options):
    documents = self.load(data, **options)['train']
    return BYTES.decode(documents.tokens).split('<end>')[:-1]

  def rows(self, *texts):
    return self.lib.Dataset.from_list(
        [{'prompt': x, 'completion': 'z', 'id': 1} for x in texts]
    )

  def test_files(self):
    """Rows of files, alone and of a pattern, and a folder by its splits."""
    folder = self.tmp / 'of'
    (folder / 'data').mkdir(parents=True)
    (folder / 'README.md').write_text('---\nlicense: mit\n---\nnot a text')
    one, two = (
        folder / 'data' / f'{x}-00000-of-00001.parquet'
        for x in ('train', 'test')
    )
    self.rows('a', 'b').to_parquet(one)
    self.rows('c').to_parquet(two)
    self.rows('d').to_csv(self.tmp / 'e.csv')
    self.assertEqual(self.found(one, kind='auto'), ['az', 'bz'])
    self.assertEqual(
        self.found(folder / 'data' / '*.parquet'), ['cz', 'az', 'bz']
    )
    self.assertEqual(self.found(self.tmp / 'e.csv'), ['dz'])
    self.assertEqual(self.found(folder), ['az', 'bz'])
    self.assertEqual(self.found(f'{folder}:test'), ['cz'])
    self.assertEqual(self.found(f'{folder}:train[:1]'), ['az'])
    with self.assertRaisesRegex(ValueError, 'Unknown split "val". .*test'):
      self.load(f'{folder}:val')

  def test_saved(self):
    one, two = self.tmp / 'one', self.tmp / 'two'
    self.rows('a').save_to_disk(one)
    parts = {'train': self.rows('b'), 'test': self.rows('c')}
    self.lib.DatasetDict(parts).save_to_disk(two)
    self.assertEqual(self.found(one), ['az'])
    self.assertEqual(self.found(two), ['bz'])
    self.assertEqual(self.found(f'{two}:test'), ['cz'])
    (arrow,) = (two / 'test').glob('*.arrow')
    self.assertEqual(self.found(arrow), ['cz'])
    for data, message in (
        (f'{one}:train', 'no split of .*, got split=train'),
        (f'{two}:val', r"split in \['test', 'train'\] of .*, got split=val"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        self.load(data)

  def test_rows_are_lines(self):
    """Fields that a column has for other rows' sake are not there."""
    call = {'type': 'function', 'function': {'name': 'add', 'arguments': '{}'}}
    records = [
        {'messages': TURNS[:2]},
        {'messages': [
            TURNS[0],
            {'role': 'assistant', 'content': None, 'tool_calls': [call]},
            {'role': 'tool', 'content': '2'},
            TURNS[1],
        ]},
    ]  # fmt: skip
    path = self.tmp / 'a.parquet'
    self.lib.Dataset.from_list(records).to_parquet(path)
    tokenizer = self.tokenizer(chat_templates.QWEN3)
    options = dict(turns='last', eval_fraction=0.0)
    rows = self.load(path, tokenizer, **options)['train']
    lines = self.load(self.write(*records), tokenizer, **options)['train']
    self.assertEqual(rows.digest, lines.digest)
    seen = dict(records_lib.contents(path))
    self.assertEqual(seen, {f'row {i + 1}': x for i, x in enumerate(records)})

  def test_rejects(self):

    def table(name, rows):
      self.lib.Dataset.from_dict(rows).to_parquet(self.tmp / name)
      return self.tmp / name

    broken = self.tmp / 'broken.parquet'
    broken.write_bytes(b'PAR1')
    for data, message in (
        (
            table('a.parquet', {'text': ['a', None]}),
            "1 bad of 2: row 2 .'text'",
        ),
        (table('b.parquet', {'q': ['a']}), r"columns=\['q'\]; known are"),
        (table('c.parquet', {'text': []}), 'got an empty file'),
        (broken, 'or a dataset, got: '),
    ):
      with self.assertRaisesRegex(ValueError, message) as raised:
        self.load(data, kind='auto')
      self.assertNotIn('\n', str(raised.exception))

  def test_hub(self):
    """A name, its config and split; what cannot be had, in one line."""
    with mock.patch.object(self.lib, 'load_dataset') as load:
      load.return_value = self.rows('a')
      for name, args, split in (
          ('owner/name', ('owner/name',), 'train'),
          ('owner/name:test[:9]', ('owner/name',), 'test[:9]'),
          ('owner/name/main:test', ('owner/name', 'main'), 'test'),
      ):
        self.assertEqual(self.found(name), ['az'])
        load.assert_called_with(*args, split=split)
      for error, kind in (
          (ConnectionError('No\n network.'), FileNotFoundError),
          (ValueError('Config name is\nmissing.'), ValueError),
      ):
        load.side_effect = error
        with self.assertRaisesRegex(kind, 'owner/name, or a data.*: [CN]') as e:
          self.load('owner/name')
        self.assertNotIn('\n', str(e.exception))
      load.reset_mock()
      for name in ('data/a.jsonl', './a/b', 'a/*', 'a', '/a/b', 'a/b/c/d'):
        with self.assertRaisesRegex(FileNotFoundError, 'got none'):
          self.load(name)
      load.assert_not_called()


def test_no_library():
  with mock.patch.dict(sys.modules, datasets=None):
    with pytest.raises(ImportError, match=r'pip install .*\[datasets\]'):
      text.load('owner/name', BYTES, max_length=9)


class PackingTest(TextTest):

  @parameterized.parameters(
      (packing.Packing(16, 5, 4),),
      (packing.Packing(11, 64, 1),),
      (packing.Packing(12, 2, 3),),
      (packing.Packing(16, 5, 4, packed=False),),
  )
  def test_rows(self, how):
    """Nothing lost or doubled, no document in two rows, positions restart."""
    documents = make_documents()
    for epoch in range(3):
      found = list(packing.rows(documents, how, seed=1, epoch=epoch))
      self.assertEqual(trained(found), all_trained(documents))
      seen = []
      for row in found:
        is_text = row['segments'] > 0
        num = row['segments'].max()
        self.assertLessEqual(num + 1, how.max_segments)
        self.assertTrue(how.packed or num == 1)
        for segment in range(1, num + 1):
          run = np.flatnonzero(row['segments'] == segment)
          np.testing.assert_array_equal(np.diff(run), 1)
          d = row['tokens'][run[0]] // 100
          seen.append(d)
          np.testing.assert_array_equal(
              row['tokens'][run], documents[d]['tokens']
          )
          np.testing.assert_array_equal(
              row['weights'][run], documents[d]['weights']
          )
          np.testing.assert_array_equal(
              row['positions'][run], np.arange(len(run))
          )
        self.assertFalse(row['weights'][~is_text].any())
      self.assertEqual(sorted(seen), list(range(len(documents))))
      kinds = {name: x.dtype.name for name, x in found[0].items()}
      self.assertEqual(
          kinds,
          dict(tokens='int32', weights='float32', segments='int32',
               positions='int32'),
      )  # fmt: skip

  def test_first_fit(self):
    documents = packing.Documents.of(
        [([d] * size, [True] * size) for d, size in enumerate((3, 4, 2, 1, 5))]
    )
    found = packing.arrays(documents, packing.Packing(6, window=2))
    expected = [[0, 0, 0, 2, 2, 3], [1, 1, 1, 1, 0, 0], [4] * 5 + [0]]
    self.assertEqual(found['tokens'].tolist(), expected)
    segments = [[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 0, 0], [1] * 5 + [0]]
    self.assertEqual(found['segments'].tolist(), segments)

  def test_the_decoder_agrees(self):
    """The weight of the loss is the number of trained tokens."""
    documents = make_documents()
    found = packing.arrays(documents, packing.Packing(16, 5, 4))
    weights = decoder.target_weights(
        *(jnp.asarray(found[k]) for k in ('tokens', 'weights', 'segments'))
    )
    self.assertEqual(int(weights.sum()), documents.mask.sum())
    np.testing.assert_array_equal(
        np.where(found['segments'] > 0, found['positions'], 0),
        np.where(
            found['segments'] > 0,
            decoder.positions_of(
                jnp.asarray(found['tokens']), jnp.asarray(found['segments'])
            ),
            0,
        ),
    )

  def test_batches_are_the_epochs(self):
    """Rows of a stream are those of epochs 0, 1, 2, ..., in their order."""
    documents, how = make_documents(), packing.Packing(16, 5, 4)
    epochs = [
        list(packing.rows(documents, how, seed=4, epoch=i)) for i in range(3)
    ]
    expected = [row for epoch in epochs for row in epoch]
    stream = packing.Stream(documents, how, 3, seed=4)
    for i in range(len(expected) // 3):
      batch = next(stream)
      for j in range(3):
        row = {name: x[j] for name, x in batch.items()}
        chex.assert_trees_all_equal(row, expected[3 * i + j])

  def test_epochs_differ_and_repeat(self):
    documents, how = make_documents(), packing.Packing(16, 5, 4)
    tokens = lambda seed, epoch: np.concatenate(
        [
            r['tokens']
            for r in packing.rows(documents, how, seed=seed, epoch=epoch)
        ]
    ).tolist()
    self.assertEqual(tokens(0, 1), tokens(0, 1))
    different = [tokens(0, 0), tokens(0, 1), tokens(1, 0), tokens(1, 1)]
    self.assertLen({tuple(x) for x in different}, 4)

  @parameterized.parameters(
      (packing.Packing(16, 5, 4), 3),
      (packing.Packing(16, 5, 64), 1),
      (packing.Packing(16, 5, 4, packed=False), 4),
  )
  def test_resumes_anywhere(self, how, size):
    """A stream cut before any batch, over some epochs, goes on bit for bit."""
    documents = make_documents()
    whole = packing.Stream(documents, how, size, seed=3)
    places, batches = [], []
    for _ in range(30):
      places.append(json.dumps(whole.get_state()))
      batches.append(next(whole))
    self.assertGreater(json.loads(places[-1])['epoch'], 1)
    used = packing.Stream(documents, how, size, seed=3)
    for i in range(0, 29):
      for stream in (packing.Stream(documents, how, size, seed=3), used):
        stream.set_state(json.loads(places[i]))
        self.assertEqual(json.dumps(stream.get_state()), places[i])
        chex.assert_trees_all_equal(next(stream), batches[i])
        chex.assert_trees_all_equal(next(stream), batches[i + 1])

  def test_a_place_is_of_its_data(self):
    documents, how = make_documents(), packing.Packing(16, 5, 4)
    place = packing.Stream(documents, how, 2, seed=0).get_state()
    for other, message in (
        (packing.Stream(make_documents(22), how, 2, seed=0), 'documents='),
        (packing.Stream(documents, how, 2, seed=1), 'seed=1, got seed=0'),
        (packing.Stream(documents, packing.Packing(16, 4, 4), 2, seed=0),
         'max_segments=4, got max_segments=5'),
    ):  # fmt: skip
      with self.assertRaisesRegex(ValueError, message):
        other.set_state(place)

  def test_processes_share_an_epoch(self):
    documents, how = make_documents(), packing.Packing(16, 5, 4)
    for epoch in range(2):
      parts = [
          trained(
              packing.rows(
                  documents,
                  how,
                  seed=2,
                  epoch=epoch,
                  process_index=i,
                  process_count=2,
              )
          )
          for i in range(2)
      ]
      self.assertEmpty(set(parts[0]) & set(parts[1]))
      self.assertEqual(sorted(parts[0] + parts[1]), all_trained(documents))
    streams = [
        packing.Stream(
            documents, how, 2, seed=2, process_index=i, process_count=2
        )
        for i in range(2)
    ]
    tokens = [trained([next(stream)]) for stream in streams]
    self.assertEmpty(set(tokens[0]) & set(tokens[1]))

  def test_rejects(self):
    documents, how = make_documents(3), packing.Packing(16)
    stream = lambda **more: packing.Stream(documents, how, **more)
    for make, message in (
        (lambda: packing.Packing(1), 'length >= 2'),
        (lambda: packing.Packing(4, 1), 'max_segments >= 2'),
        (lambda: packing.Packing(4, window=0), 'window >= 1'),
        (lambda: stream(batch_size=0, seed=0), 'batch_size >= 1'),
        (lambda: stream(batch_size=1, seed=-1), 'seed >= 0'),
        (
            lambda: stream(batch_size=1, seed=0, process_index=1),
            'process_index < process_count=1',
        ),
        (
            lambda: stream(batch_size=1, seed=0, process_count=4),
            'a document for each of 4 processes',
        ),
    ):
      with self.assertRaisesRegex(ValueError, message):
        make()


class TaskTest(TextTest):

  def lines(self, count=30):
    return self.write(
        *({'prompt': f'{i} ', 'completion': f'{i:b}'} for i in range(count))
    )

  def task(self, model=None, **options):
    options = {
        'data': options['data'] if 'data' in options else self.lines(),
        'batch_size': 2,
        'tokenizer': 'bytes',
        'max_length': 24,
        'eval_fraction': 0.3,
        **options,
    }
    model = make_model() if model is None else model
    return language_model.make_task(model=model, **options)

  def test_metrics_are_means_over_tokens(self):
    """Of chunks of unlike weight; exp of the mean, not a mean of exp."""
    task = self.task(eval_batch_size=2)
    self.assertEqual(task.metrics.args[1], 2)

    def loss(params, batch, key=None):
      weight = jnp.sum(batch['weights'])
      total = params * jnp.vdot(batch['weights'], batch['value'])
      return total / weight, parts.Weighted(weight, {})

    data = {
        'weights': jnp.array([1.0, 0.0, 3.0, 2.0, 7.0]),
        'value': jnp.array([3.0, 9.0, 2.0, 1.0, 0.5]),
    }
    found = language_model._metrics(
        loss, 2, 1.5, {'validation': data}, 'validation'
    )
    mean = 1.5 * (3 + 6 + 2 + 3.5) / 13
    np.testing.assert_allclose(found['loss'], mean, rtol=1e-6)
    np.testing.assert_allclose(found['perplexity'], np.exp(mean), rtol=1e-6)

  def test_rows_of_an_epoch(self):
    five = self.lines(5)
    task = self.task(packing=False, data=five, eval_data=five)
    self.assertEqual(task.num_samples, 5)
    self.assertLen(task.data['validation']['tokens'], 5)
    batch = next(task.stream(0))
    self.assertEqual(batch['tokens'].shape, (2, 24))
    self.assertEqual(set(batch['segments'].max(1)), {1})
    self.assertEqual(self.task(data=five, eval_fraction=0).data, {})

  def test_the_tokenizer_of_the_model(self):
    model = make_model(600)
    folder = hf.save(self.tmp / 'model', model.params, model)
    backend = tokenizer_folders.byte_level()
    tokenizer_folders.write(folder, backend, chat_templates.GENERATION)
    path = self.write(*[{'messages': TURNS}] * 4, name='chats.jsonl')
    task = self.task(
        folder, data=path, tokenizer='', max_length=64, eval_fraction=0.0,
        dtype='bfloat16', remat='full', max_segments=2,
    )  # fmt: skip
    self.assertEqual(task.num_samples, 4)
    chex.assert_trees_all_equal_dtypes(
        task.weights, jax.tree.map(jnp.bfloat16, task.weights)
    )
    batch = next(task.stream(0))
    tokenizer = tokenizer_lib.load(folder)
    found = tokenizer.decode(batch['tokens'][0][batch['weights'][0] > 0])
    self.assertEqual(found, 'the answer<|im_end|>fine<|im_end|>')

  def test_processes_share_a_batch(self):
    found = [
        next(self.task(process_index=i, process_count=2).stream(0))
        for i in range(2)
    ]
    self.assertEqual([len(x['tokens']) for x in found], [1, 1])
    self.assertFalse(np.array_equal(found[0]['tokens'], found[1]['tokens']))

  def test_rejects(self):
    for options, message in (
        ({'model': make_model(200)}, 'below 200, the vocab_size'),
        ({'tokenizer': ''}, "tokenizer to be a folder, or 'bytes'"),
        ({'batch_size': 3, 'process_count': 2}, 'multiple of process_count=2'),
        ({'remat': 'full'}, 'a folder beside how a model is loaded'),
        ({'max_segments': 1}, 'max_segments >= 2'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        self.task(**options)
    with pytest.warns(UserWarning, match='max_length=24 is more than the 20'):
      self.task(make_model(max_length=20))

  def make_config(self, mode, name):
    folder = hf.save(self.tmp / 'model', make_model().params, make_model())
    config = base_config.get_config()
    config.task.name = 'bernoulli_lora_jax.tasks.language_model:make_task'
    config.task.batch_size = 2
    kwargs = config.task.kwargs
    kwargs.model, kwargs.data = str(folder), str(self.lines())
    kwargs.tokenizer, kwargs.max_length = 'bytes', 24
    kwargs.eval_fraction, kwargs.window = 0.3, 4
    config.method.mode, config.method.name = mode, name
    config.method.rank, config.method.period = 4, 6
    config.method.select = 'layers|lm_head'
    config.method.learning_rate = 0.5
    t = config.training
    t.num_steps, t.num_evals, t.checkpoint_every = 24, 4, 4
    t.eval_gradient, t.progress = False, False
    return config

  @parameterized.parameters(
      ('gradient', 'full'), ('adapter', 'bernoulli'), ('sketched', 'rac_left')
  )
  @pytest.mark.slow
  def test_training_goes_on(self, mode, name):
    """A run that is cut ends where the unbroken one does; the loss falls."""
    config = self.make_config(mode, name)
    task = arguments.make_task(config)
    self.assertLess(task.num_samples, 24)  # More than one epoch.
    program = experiment.make_program(config, task)
    summary = experiment.train(config, self.tmp / 'whole', program)
    num_next = loop._num_next

    def interrupted(program, progress):
      if progress.step >= 14:
        raise KeyboardInterrupt
      return num_next(program, progress)

    with mock.patch.object(loop, '_num_next', interrupted):
      with self.assertRaises(KeyboardInterrupt):
        experiment.train(config, self.tmp / 'cut', program)
    experiment.train(config, self.tmp / 'cut', program)
    ends = []
    for name in ('whole', 'cut'):
      start = program.start(jax.random.key(config.seed))
      with loop.open_checkpoints(program, self.tmp / name, start) as saver:
        ends.append(loop.restore(saver, program, start)[0])
    chex.assert_trees_all_equal(*(program.params(x) for x in ends))
    log = (self.tmp / 'whole' / 'metrics.jsonl').read_text().splitlines()
    first = json.loads(log[0])
    self.assertLess(summary['validation_loss'], first['validation_loss'] - 0.5)
    self.assertAlmostEqual(
        summary['validation_perplexity'],
        np.exp(summary['validation_loss']),
        delta=1e-2 * summary['validation_perplexity'],
    )
    # Validation alone decides which step is the best.
    self.assertGreater(summary['best_step'], 0)
    # Other data are refused.
    (self.tmp / 'cut' / 'summary.json').unlink()
    self.write({'prompt': 'x', 'completion': 'y'}, *[
        {'prompt': f'{i} ', 'completion': 'other'} for i in range(30)
    ])  # fmt: skip
    with self.assertRaisesRegex(ValueError, 'the data have changed'):
      experiment.train(config, self.tmp / 'cut')


def test_no_warning_without_a_reason(tmp_path):
  path = pathlib.Path(tmp_path) / 'a.jsonl'
  path.write_text('{"prompt": "a", "completion": "b"}\n')
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    text.load(path, BYTES, kind='instruction', max_length=8)
