"""Executes the snippets of README.md and docs/guide.md as they are written.

A snippet starts from the names that `common` gives: a model with attention, its
params, a loss, data. It sees what the snippets before it in its section have
defined. A section whose snippets want more has an entry in `PREPARED`; a new
snippet that does with these names needs none.
"""

import contextlib
import functools
import io
import json
import pathlib
import re
import shlex
from typing import NamedTuple

import chat_templates
import decoders
import encoders
import flax
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizer_folders

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import cli
from bernoulli_lora_jax import flags_of_configs
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import tokenizer
from bernoulli_lora_jax.tasks import partition
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import reporting

_ROOT = pathlib.Path(__file__).parent.parent
_DOCUMENTS = ('README.md', 'docs/guide.md')
_SLOW = (  # More than two seconds.
    'A few lines',
    'NNX models',
    'Checkpoints of the Hugging Face hub',
    'Encoders',
    'Adapters of PEFT',
    'Serve the result',
    'Federated: which method when',
    'Recipes',
    'Variance reduction',
    'Federated',
    "Polyak's step (T8)",
    'A task of your own',
)
KEY = jax.random.key(0)
WIDTH = 32  # A tile of quantised weights.


class Snippet(NamedTuple):
  """A fenced block of a document."""

  document: str
  section: str
  line: int
  language: str
  code: str


def snippets():
  found = []
  for document in _DOCUMENTS:
    section, fence, lines = '', None, []
    for i, line in enumerate((_ROOT / document).read_text().splitlines(), 1):
      if line.startswith('```') and fence is None:
        fence, lines = (i, line[3:].strip()), []
      elif line.startswith('```'):
        found.append(Snippet(document, section, *fence, '\n'.join(lines)))
        fence = None
      elif fence is not None:
        lines.append(line)
      elif line.startswith('#'):
        section = line.lstrip('# ')
  return found


SNIPPETS = snippets()
SECTIONS = [
    pytest.param(*names, marks=[pytest.mark.slow] if names[1] in _SLOW else [])
    for names in dict.fromkeys(
        one[:2] for one in SNIPPETS if one.language == 'python'
    )
]


class Block(nn.Module):
  """Attention and an MLP."""

  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(2, name='attention')(x)
    return x + nn.Dense(WIDTH, name='mlp')(nn.gelu(nn.LayerNorm()(x)))


class Transformer(nn.Module):

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(WIDTH, name='embed')(x)
    x = Block(name='layers_0')(x)
    return nn.Dense(10, name='head')(x.mean(axis=-2))


class Mlp(nn.Module):

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.Dense(WIDTH, name='up')(x.reshape(x.shape[0], -1)))
    return nn.Dense(10, name='down')(x)


def cross_entropy(logits, labels):
  values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return values.mean()


def make_batch(size):
  rng = np.random.default_rng(size)
  return {
      'x': jnp.asarray(rng.normal(size=(size, 4, WIDTH)), jnp.float32),
      'y': jnp.asarray(rng.integers(10, size=size)),
      'index': jnp.arange(size),
  }


@functools.cache
def init(model):
  return jax.jit(model.init)(KEY, make_batch(2)['x'])['params']


def common(model):
  """Returns the names that snippets take as given."""

  def loss(params, batch, key=None):
    del key
    logits = model.apply({'params': params}, batch['x'])
    return cross_entropy(logits, batch['y']), {'logits': logits}

  params, batch = init(model), make_batch(6)
  return {
      'bl': bl,
      'flax': flax,
      'jax': jax,
      'jnp': jnp,
      'nnx': nnx,
      'optax': optax,
      'partition': partition,
      'loop': loop,
      'programs': programs,
      'methods': methods,
      'model': model,
      'params': jax.tree.map(jnp.copy, params),
      'batch': batch,
      'x': batch['x'],
      'loss': loss,
      'matrices': bl.inject.all_linear(loss, params, batch),
      'cross_entropy': cross_entropy,
      'key': jax.random.key(1),
      'chain_key': jax.random.key(2),
      'init_key': jax.random.key(3),
      'page_key': jax.random.key(4),
      'schedule': optax.constant_schedule(1e-3),
      'optimiser': optax.sgd(0.1),
      'gamma': 0.1,
      'policy': bl.ChainPolicy.bernoulli(8, 2),
      'path': pathlib.Path('run'),
      'rngs': nnx.Rngs(0),
  }


def scalar_loss(names):
  """Where a loss is differentiated without what it returns beside."""
  loss = names['loss']
  everything = make_batch(12)
  return {
      'loss': lambda params, batch: loss(params, batch)[0],
      'everything': everything,
      'b': 6,
      'n': 12,
  }


def trees_of_all_kinds(_):
  shapes = {
      'Conv_0': {'kernel': (3, 3, 4, 8), 'bias': (8,)},
      'attention': {
          'query': {'kernel': (16, 2, 8), 'bias': (2, 8)},
          'out': {'kernel': (2, 8, 16), 'bias': (16,)},
      },
      'layers': {'mlp': {'kernel': (2, 16, 32), 'bias': (2, 32)}},
      'experts': {'kernel': (2, 3, 16, 16), 'scale': (2, 3)},
  }
  is_shape = lambda node: isinstance(node, tuple)
  return {'params': jax.tree.map(jnp.ones, shapes, is_leaf=is_shape)}


def finished_link(names):
  chain = bl.adapters.make_chain(
      names['policy'], optax.sgd(0.1), names['matrices']
  )
  base = names['params']
  state = chain.init(names['key'], base)
  loss = bl.inject.by_product(names['loss'])
  step = jax.jit(chain.step, static_argnums=1)
  for _ in range(2):
    state, _ = step(state, loss, names['batch'])
  return {'chain': chain, 'base': base, 'state': state}


def federation(names):
  rows, model = make_batch(40), names['model']

  def loss(params, batch, key):
    del key
    logits = model.apply({'params': params}, batch['x'])
    return cross_entropy(logits, batch['y']), {}

  return {
      'labels': np.asarray(rows['y']),
      'task': task_lib.from_arrays(
          'rows', loss, weights=names['params'], train=rows, batch_size=4
      ),
      # A client's data are a batch: all have as many examples.
      'clients': partition.client_data(rows, partition.iid(40, 10, seed=0)),
      'loss': loss,
  }


def subgradients(names):
  loss, batch = scalar_loss(names)['loss'], names['batch']
  value, grads = jax.value_and_grad(loss)(names['params'], batch)
  return {'subgradient': grads, 'loss_value': value, 'f_star': 0.0}


def quantised(_):
  return {'qwix': pytest.importorskip('qwix')}


def checkpoint(_):
  """A folder of the hub, small, with a tokenizer and a chat template."""
  folder, words = pathlib.Path('base'), tokenizer_folders.byte_level()
  decoders.write(folder, 'llama3', vocab_size=words.get_vocab_size())
  tokenizer_folders.write(folder, words, chat_templates.LLAMA3)
  return {'folder': folder, 'tokens': jnp.asarray(decoders.tokens(16, rows=8))}


def encoder_folder(_):
  """A folder of an encoder, small, with a tokenizer."""
  folder, words = pathlib.Path('base'), tokenizer_folders.bert()
  encoders.write(folder, 'bert', vocab_size=words.get_vocab_size())
  tokenizer_folders.write(folder, words)
  return {'folder': folder}


def tuned(_):
  """A decoder and a chain that has moved it."""
  given = checkpoint(_)
  base = hf.load(given['folder'])
  matrices = decoder.matrices(base.config)
  policy = bl.ChainPolicy(rank=2, period=1, side='bernoulli')
  chain = bl.adapters.make_chain(policy, optax.sgd(0.1), matrices)
  loss = bl.inject.by_product(decoder.make_loss(base.config))
  state = chain.init(KEY, base.params)
  for _ in range(2):
    state, _ = chain.step(state, loss, {'tokens': given['tokens']})
  return {
      **given,
      'hf': hf,
      'reporting': reporting,
      'matrices': matrices,
      'chain': chain,
      'state': state,
  }


def chats(_):
  """A folder of the hub and conversations."""
  turns = lambda i: [
      {'role': 'user', 'content': f'add {i} and {i}'},
      {'role': 'assistant', 'content': str(2 * i)},
  ]
  lines = [json.dumps({'messages': turns(i)}) for i in range(40)]
  pathlib.Path('chats.jsonl').write_text('\n'.join(lines))
  return {**checkpoint(_), 'tokenizer': tokenizer}


def served(_):
  """A run of the command on chats."""
  pytest.importorskip('transformers')
  pytest.importorskip('peft')
  given = chats(_)
  words = '--data=chats.jsonl --output=runs/mine --rank=2 --period=1'
  words += ' --num-steps=2 --max-length=64 --no-progress'
  cli.main(['finetune', f'--model={given["folder"]}', *words.split()])
  return given


PREPARED = {
    'Which leaves are matrices': trees_of_all_kinds,
    'Recipes': finished_link,
    'Variance reduction': scalar_loss,
    'Federated': federation,
    'Federated: which method when': federation,
    "Polyak's step (T8)": subgradients,
    'Quantised bases': quantised,
    'NNX models': lambda _: {'nnx': nnx, 'batch': make_batch(6)},
    'Checkpoints of the Hugging Face hub': checkpoint,
    'Encoders': encoder_folder,
    'Adapters of PEFT': tuned,
    'Serve the result': served,
    'Data': chats,
    'A task of your own': federation,
}


def check(names, defined, code):
  """What a snippet leaves unused must work: optimisers and chains."""
  if 'tx' in defined and 'tx.update' not in code:
    tx, params = names['tx'], names['params']
    state = jax.eval_shape(tx.init, params)
    grads = params
    if 'num_clients' in code:
      grads = jax.tree.map(lambda p: jnp.zeros((10, *p.shape)), params)
    updates, _ = jax.eval_shape(tx.update, grads, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
  if 'chain' in defined and 'chain.init' not in code:
    jax.eval_shape(names['chain'].init, names['key'], names['params'])
  if 'step' in defined:
    count = int(names['state'].count)
    names['state'], _ = names['step'](names['state'], names['batch'])
    assert int(names['state'].count) == count + 1


@pytest.mark.filterwarnings('error:Replayed weights')  # A recipe's promise.
@pytest.mark.parametrize(
    'document,section', SECTIONS, ids=lambda value: value.split('/')[-1]
)
def test_section(document, section, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  codes = [one for one in SNIPPETS if one[:2] == (document, section)]
  codes = [one for one in codes if one.language == 'python']
  # Sections that say nothing of matrices are about models that need no rules.
  is_plain = document != 'README.md' and not any(
      'matrices' in one.code for one in codes
  )
  names = common(Mlp() if is_plain else Transformer())
  names |= PREPARED.get(section, lambda names: {})(names)
  with jax.numpy_rank_promotion('allow'):  # As at a user's.
    for one in codes:
      # The lines of errors are those of the document.
      source = '\n' * one.line + one.code
      before = dict(names)
      exec(compile(source, _ROOT / document, 'exec'), names)  # noqa: S102
      defined = {k for k, v in names.items() if before.get(k) is not v}
      check(names, defined, one.code)


def commands():
  """Returns the words of what is typed into a shell."""
  found = []
  for one in SNIPPETS:
    if one.language in ('', 'sh', 'bash'):
      for line in one.code.replace('\\\n', ' ').splitlines():
        if line.split(' ')[0] in ('make', 'python', 'pip', 'blora'):
          found.append(shlex.split(line, comments=True))
  for document in _DOCUMENTS:
    text = re.sub(r'```.*?```', '', (_ROOT / document).read_text(), flags=re.S)
    for span in re.findall(r'`((?:python|make|blora) [^`]*)`', text):
      found.append(shlex.split(span))
  return found


@pytest.mark.parametrize(
    'words', commands(), ids=lambda words: ' '.join(words)[:60]
)
def test_command(words):
  if words[0] == 'make':
    makefile = (_ROOT / 'Makefile').read_text()
    assert re.search(rf'^{words[1]}:', makefile, re.M), words
  elif words[0] == 'pip':
    extras = re.findall(r'^\.\[(.*)\]$', '\n'.join(words), re.M)
    for extra in extras:
      assert extra in (_ROOT / 'setup.py').read_text(), words
  else:
    check_command(words)


def check_command(words):
  """Raises unless a command of ours takes the flags."""
  _, *rest = words
  name = pathlib.Path(words[0]).stem
  if words[:3] == ['python', '-m', 'bernoulli_lora_jax']:
    return
  if words[0] == 'python':
    name, rest = pathlib.Path(words[1]).stem, words[2:]
    assert (_ROOT / words[1]).exists(), words
    if not words[1].startswith('launch/'):
      text = (_ROOT / words[1]).read_text()
      flags = [w.partition('=')[0] for w in rest if w.startswith('--')]
      assert all(flag.lstrip('-') in text for flag in flags), words
      return
  elif words[0] == 'blora':
    name, *rest = rest
  if name in ('train', 'sweep'):
    config = next((w for w in rest if w.startswith('--config=')), None)
    if config is None:  # The command by name.
      return
    path = config.removeprefix('--config=').partition(':')[0]
    if any(one.code.startswith(f'# {path}\n') for one in SNIPPETS):
      return  # A file of the reader's own, which a snippet shows.
    flags_of_configs.parse(rest)
    return
  out = io.StringIO()
  sub = rest[:1] if name == 'theory' else []
  with contextlib.redirect_stdout(out):
    with pytest.raises(SystemExit) as caught:
      cli.main([name, *sub, '--help'])
  assert caught.value.code == 0, words
  for word in rest:
    if word.startswith('--'):
      assert word.partition('=')[0] in out.getvalue(), (words, word)


def test_flags_in_the_text():
  for document in _DOCUMENTS:
    text = (_ROOT / document).read_text()
    for name in re.findall(r'--(config\.[\w.]*\w)', text):
      value = base_config.get_config()
      for part in name.split('.')[1:]:
        value = value[part]


def test_prepared_sections_exist():
  sections = {one.section for one in SNIPPETS}
  assert sections >= {*PREPARED, *_SLOW}, 'Renamed? Rename them here, too.'
