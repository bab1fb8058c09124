"""Tokenizers of folders against AutoTokenizer: what is read, and what wins."""

import json
import pathlib
import tempfile
import warnings

from absl.testing import parameterized
import pytest

transformers = pytest.importorskip('transformers')

import tokenizer_folders  # noqa: E402  (what may be missing comes first)

from bernoulli_lora_jax.models import chat  # noqa: E402
from bernoulli_lora_jax.models import tokenizer  # noqa: E402

TEXT = 'Hello Zürich 🙂 <s> x\n\n y</s>[INST] <new>a <img> <pad2>b . , !</s>'
NEW = {'content': '<new>', 'normalized': False, 'special': False}
DECODER = {'448': {'content': '<img>', 'special': True}, '449': NEW}
CHAT = [{'role': 'user', 'content': 'x'}]


class TokenizerParityTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def assert_same(self, make=tokenizer_folders.byte_level, files=(), **config):
    """Compares a folder's tokenizer with AutoTokenizer's; returns both."""
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', **config}
    tokenizer_folders.write(self.dir, make(), **config)
    for name, content in dict(files).items():
      path = self.dir / name
      path.parent.mkdir(exist_ok=True)
      is_text = isinstance(content, str)
      path.write_text(content if is_text else json.dumps(content))
    oracle = transformers.AutoTokenizer.from_pretrained(str(self.dir))
    ours = tokenizer.load(self.dir)
    for add_special_tokens in (False, True):
      options = {'add_special_tokens': add_special_tokens}
      ids = oracle.encode(TEXT, **options)
      self.assertEqual(ours.backend.encode(TEXT, **options).ids, ids)
      for skip in (False, True):
        options = {'skip_special_tokens': skip}
        want = oracle.decode(ids, **options)
        self.assertEqual(ours.decode(ids, **options), want)
    self.assertLen(oracle, ours.vocab_size)
    for name in ('bos', 'eos', 'pad'):
      token, token_id = f'{name}_token', f'{name}_token_id'
      self.assertEqual(getattr(ours, token), getattr(oracle, token))
      self.assertEqual(getattr(ours, f'{name}_id'), getattr(oracle, token_id))
    self.assertEqual(dict(ours.special_tokens), oracle.special_tokens_map)
    return ours, oracle

  @parameterized.product(
      cls=['PreTrainedTokenizerFast', 'LlamaTokenizerFast'],
      kind=['byte_level', 'byte_level_with_bos', 'metaspace'],
      bos=[None, False, True],
      eos=[None, False, True],
  )
  def test_flags_of_old_configs(self, cls, kind, bos, eos):
    config = {'add_bos_token': bos, 'add_eos_token': eos}
    config = {key: x for key, x in config.items() if x is not None}
    make = {
        'byte_level': tokenizer_folders.byte_level,
        'byte_level_with_bos': tokenizer_folders.byte_level_with_bos,
        'metaspace': lambda: tokenizer_folders.metaspace('first'),
    }[kind]
    ours, _ = self.assert_same(
        make,
        tokenizer_class=cls,
        **config,
        **({'unk_token': '<unk>'} if kind == 'metaspace' else {}),
    )
    adds_bos = kind != 'byte_level'
    agrees = bos in (None, adds_bos) and eos in (None, False)
    self.assertEqual(not ours.conflict, agrees)

  @parameterized.parameters(
      {'bos_token': {'__type': 'AddedToken', 'content': '<s>'}},
      {'bos_token': None},
      {'pad_token': '<pad2>'},
      {'pad_token': '<pad2>', 'unk_token': '<pad2>'},
      {'image_token': '<img>'},
      {'additional_special_tokens': ['<img>', '<|im_end|>']},
      {'extra_special_tokens': {'image_token': '<img>'}},
      {'added_tokens_decoder': DECODER},
      {'added_tokens_decoder': DECODER, 'eos_token': '<|im_end|>'},
      {
          'added_tokens_decoder': DECODER,
          'files': {'special_tokens_map.json': {'eos_token': '<|eot_id|>'}},
      },
      {'files': {'special_tokens_map.json': {'eos_token': '<|eot_id|>'}}},
      {
          'files': {
              'special_tokens_map.json': {
                  'pad_token': {
                      'content': '<pad2>',
                      'lstrip': False,
                      'normalized': False,
                      'rstrip': True,
                      'single_word': False,
                  }
              }
          }
      },
      {'files': {'added_tokens.json': {'<new>': 448, '<img>': 449}}},
      {
          'files': {'added_tokens.json': {'<new>': 448, '<img>': 449}},
          'additional_special_tokens': ['<img>'],
      },
      {'split_special_tokens': True},
      {'clean_up_tokenization_spaces': True},
      {'make': tokenizer_folders.word_piece},
      {
          'make': tokenizer_folders.word_piece,
          'clean_up_tokenization_spaces': True,
      },
      {'make': tokenizer_folders.metaspace, 'unk_token': '<unk>'},
  )
  def test_special_and_added_tokens(self, **settings):
    self.assert_same(**settings)

  def test_truncation_and_padding_of_the_file_are_switched_off(self):
    def make():
      found = tokenizer_folders.byte_level()
      found.enable_truncation(3)
      found.enable_padding(length=64)
      return found

    self.assert_same(make)

  @parameterized.parameters(
      ({}, 'config'),
      ({'chat_template.jinja': 'file'}, 'file'),
      ({'additional_chat_templates/tool_use.jinja': 'tool'}, None),
      (
          {
              'chat_template.jinja': 'file',
              'additional_chat_templates/tool_use.jinja': 'tool',
              'additional_chat_templates/rag.jinja': 'rag',
          },
          'file',
      ),
  )
  def test_where_the_template_is_from(self, files, want):
    named = [{'name': 'default', 'template': 'config'}]
    named.append({'name': 'tool_use', 'template': 'config tool'})
    for template in ('config', named):
      ours, oracle = self.assert_same(files=files, chat_template=template)
      self.assertEqual(ours.chat_template, want)
      for tools in (None, [], [{'name': 'add'}]):
        try:
          text = oracle.apply_chat_template(CHAT, tools, tokenize=False)
        except ValueError:
          self.assertIsNone(want)
          with self.assertRaisesRegex(ValueError, 'with a chat template'):
            chat.render_chat(ours, CHAT, tools=tools)
          continue
        self.assertEqual(chat.render_chat(ours, CHAT, tools=tools), text)

  @parameterized.product(
      kind=['prepend', 'first'],
      legacy=[None, False, True],
      prefix=[None, False, True],
  )
  def test_the_warning_of_a_class_is_given_where_ids_differ(
      self, kind, legacy, prefix
  ):
    config = {'legacy': legacy, 'add_prefix_space': prefix}
    config = {key: x for key, x in config.items() if x is not None}
    tokenizer_folders.write(
        self.dir,
        tokenizer_folders.metaspace(kind),
        tokenizer_class='LlamaTokenizer',
        unk_token='<unk>',
        **config,
    )
    oracle = transformers.AutoTokenizer.from_pretrained(str(self.dir))
    with warnings.catch_warnings(record=True) as found:
      warnings.simplefilter('always')
      ours = tokenizer.load(self.dir)
    texts = [TEXT, 'Hello', '<s>Hello', '<s> Hello </s>x', ' Hello']
    same = all(
        oracle.encode(text, add_special_tokens=False)
        == ours.encode(text, add_special_tokens=False)
        for text in texts
    )
    self.assertEqual(not found, same)


class RowsParityTest(parameterized.TestCase):

  @parameterized.product(
      make=[tokenizer_folders.bert, tokenizer_folders.roberta],
      length=[5, 9, 40],
      has_pairs=[False, True],
  )
  def test_rows(self, make, length, has_pairs):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    tokenizer_folders.write(folder, make())
    texts = ['hello there', '', TEXT, 'once upon a time there was a model']
    pairs = texts[::-1] if has_pairs else None
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))(
        texts,
        pairs,
        max_length=length,
        truncation=True,
        padding='max_length',
        return_token_type_ids=True,
    )
    ours = tokenizer.encode_rows(tokenizer.load(folder), texts, length, pairs)
    self.assertEqual(ours['tokens'].tolist(), theirs['input_ids'])
    self.assertEqual(
        ours['mask'].astype(int).tolist(), theirs['attention_mask']
    )
    self.assertEqual(ours['types'].tolist(), theirs['token_type_ids'])
