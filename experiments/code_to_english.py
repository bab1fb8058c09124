r"""A decoder that knows code learns English: its material.

  python experiments/code_to_english.py corpora --output=runs/code_to_english/corpora
  python experiments/code_to_english.py pretrain --output=runs/code_to_english/model \
      --corpora=runs/code_to_english/corpora --size=small

The running interpreter's standard library is parted in two domains that share no
prose: code, its sources without docstrings and comments; English, its docstrings and
the language reference that `help` shows. What strings of the code say stays in it.
`pretrain` makes a decoder of the Llama family that knows the code, in the format of
the Hugging Face hub. configs/code_to_english.py fine-tunes it to the English.

The small decoder takes about six minutes on two idle cores. The medium one is for a GPU
and wants more code, that of the test suites: `corpora --tests`.
"""

import ast
from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from pydoc_data import topics
import sys
import sysconfig
import tempfile
import time
from typing import Any, Literal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tqdm
import tyro

from bernoulli_lora_jax import cli
from bernoulli_lora_jax import files
from bernoulli_lora_jax import parts
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import generate
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import packing as packing_lib
from bernoulli_lora_jax.tasks import text
from bernoulli_lora_jax.training import reporting

DOMAINS = ('code', 'english')
HELD_OUT = 0.05  # Part of the documents of each domain.
PROMPTS = {
    'code': 'class Stack:\n\n    def __init__(self',
    'english': 'Return the number of',
}
_END = '<|endoftext|>'
# Tables of characters, and topics that are read otherwise.
_LEFT_OUT = {'site-packages', 'dist-packages', 'encodings', 'pydoc_data'}
_TESTS = {'test', 'tests', 'idle_test'}


@dataclasses.dataclass(frozen=True)
class Size:
  """A decoder, and how long it is trained."""

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_steps: int
  batch_size: int  # Rows.
  length: int  # Tokens of a row.
  learning_rate: float  # Of AdamW, the peak of a cosine.
  dtype: str = 'float32'  # Of the computation.

  def config(self) -> decoder.DecoderConfig:
    """Returns the decoder; its head is its embedding."""
    head_dim = min(64, self.hidden_size // 4)
    return decoder.DecoderConfig(
        vocab_size=self.vocab_size,
        hidden_size=self.hidden_size,
        intermediate_size=self.hidden_size * 11 // 4,
        num_layers=self.num_layers,
        num_heads=self.hidden_size // head_dim,
        num_kv_heads=self.hidden_size // head_dim,
        head_dim=head_dim,
        tied=True,
        scan_layers=False,
        dtype=jnp.dtype(self.dtype),
        max_length=self.length,
    )


SIZES = {
    'small': Size(2048, 192, 3, 2700, 8, 128, 4e-3),
    'medium': Size(8192, 512, 8, 900, 32, 512, 2e-3, 'bfloat16'),
    'smoke': Size(320, 16, 2, 6, 4, 64, 4e-3),
}


def write_corpora(output: str, tests: bool = False) -> None:
  """Writes both domains as JSON lines, each parted in train and validation.

  Args:
    output: new folder for code_train.jsonl, code_validation.jsonl and the same of
      english.
    tests: whether the test suites are read, too, where they are installed.
  """
  found: dict[str, dict[str, None]] = {domain: {} for domain in DOMAINS}
  for source in _sources(tests):
    code, docstrings = split_source(source)
    found['code'][code] = None
    found['english'].update(dict.fromkeys(docstrings))
  found['english'].update(
      {text.strip('\n'): None for text in topics.topics.values()}
  )
  rows = []
  with files.new_folder(output) as scratch:
    for domain, texts in found.items():
      split: dict[str, list[str]] = {'train': [], 'validation': []}
      for document in filter(str.strip, texts):
        # Half a surrogate is no text.
        document = document.encode(errors='replace').decode()
        split[part_of(document)].append(document)
      for part, documents in split.items():
        lines = [json.dumps({'text': x}) + '\n' for x in documents]
        content = ''.join(lines).encode()
        files.write(scratch / f'{domain}_{part}.jsonl', content)
        rows.append(
            {
                'file': f'{domain}_{part}.jsonl',
                'documents': len(documents),
                'MB': sum(len(x.encode()) for x in documents) / 1e6,
                'sha256': hashlib.sha256(content).hexdigest()[:16],
            }
        )
  print(reporting.table(rows))
  print(f'Python {sys.version.split()[0]}, written to {output}')


def _sources(tests: bool) -> Iterator[bytes]:
  """Yields the files of the standard library, in order of their names."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  left_out = _LEFT_OUT if tests else _LEFT_OUT | _TESTS
  for path in sorted(root.rglob('*.py')):
    if left_out.isdisjoint(path.relative_to(root).parts):
      yield path.read_bytes()


def split_source(source: bytes) -> tuple[str, list[str]]:
  """Returns a module without docstrings and comments, and its docstrings.

  Both are empty for what is no Python of today, as some data of test suites.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Of escapes in strings.
      tree = ast.parse(source)
  except (SyntaxError, ValueError):
    return '', []
  docstrings = []
  documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
  nodes: Iterator[Any] = ast.walk(tree)
  for node in nodes:
    if isinstance(node, documented):
      docstrings.append(ast.get_docstring(node) or '')
    body = getattr(node, 'body', None)
    if isinstance(body, list):
      kept = [x for x in body if not _is_bare_string(x)]
      is_module = isinstance(node, ast.Module)
      node.body = kept if kept or is_module else [ast.Pass()]
  return ast.unparse(tree), docstrings


def _is_bare_string(node: ast.AST) -> bool:
  """Tells whether a statement is a string: a docstring or a comment."""
  return (
      isinstance(node, ast.Expr)
      and isinstance(node.value, ast.Constant)
      and isinstance(node.value.value, str)
  )


def part_of(document: str) -> str:
  """Returns 'train' or 'validation', by the content of a document alone."""
  digest = hashlib.sha256(document.encode()).digest()
  is_held_out = int.from_bytes(digest[:6], 'big') / 2**48 < HELD_OUT
  return 'validation' if is_held_out else 'train'


def pretrain(
    output: str,
    corpora: str,
    size: Literal['small', 'medium', 'smoke'] = 'small',
    seed: int = 0,
) -> None:
  """Trains a tokenizer and a decoder on the code.

  Args:
    output: new folder of the model, as on the Hugging Face hub.
    corpora: folder that `corpora` wrote.
    size: of the decoder.
    seed: of its weights and of the order of the documents.
  """
  files.check_new(output)
  sizes, started = SIZES[size], time.monotonic()
  config = sizes.config()
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    write_tokenizer(folder, pathlib.Path(corpora), sizes)
    tokenizer = tokenizer_lib.load(folder)
    assert tokenizer.eos_id is not None
    documents = {
        domain: text.load(
            pathlib.Path(corpora) / f'{domain}_train.jsonl',
            tokenizer,
            kind='language_model',
            max_length=sizes.length,
            eval_data=pathlib.Path(corpora) / f'{domain}_validation.jsonl',
        )
        for domain in DOMAINS
    }
    init_key, sample_key = jax.random.split(jax.random.key(seed))
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = decoder.Decoder(config).init(init_key, tokens)['params']
    num_params = sum(x.size for x in jax.tree.leaves(params))
    num_tokens = sizes.num_steps * sizes.batch_size * sizes.length
    print(
        f'{num_params / 1e6:.1f}M numbers, {num_tokens / 1e6:.1f}M tokens;'
        f' the code has {len(documents["code"]["train"].tokens) / 1e6:.1f}M'
    )
    held_out = {k: found['validation'] for k, found in documents.items()}
    before = evaluate(sizes, params, held_out)
    params = train(sizes, params, documents['code']['train'], seed)
    after = evaluate(sizes, params, held_out)
    checkpoint = hf.describe(config, params)
    # transformers would end a text with token 2 otherwise.
    ends = {'bos_token_id': None, 'eos_token_id': tokenizer.eos_id}
    checkpoint = dataclasses.replace(
        checkpoint, folder=folder, raw={**checkpoint.raw, **ends}
    )
    hf.save(output, params, checkpoint)
  rows = [
      {
          'validation': domain,
          'loss before': before[domain],
          'loss': after[domain],
          'perplexity': math.exp(after[domain]),
      }
      for domain in DOMAINS
  ]
  print(reporting.table(rows))
  sampled = generate.generate(
      config,
      params,
      [tokenizer.encode(prompt) for prompt in PROMPTS.values()],
      max_new_tokens=sizes.length // 2,
      temperature=0.7,
      top_p=0.9,
      key=sample_key,
      end_tokens=[tokenizer.eos_id],
  )
  for prompt, ids in zip(PROMPTS.values(), sampled, strict=True):
    print(f'--- sample\n{prompt}{tokenizer.decode(ids)}')
  minutes = (time.monotonic() - started) / 60
  print(f'--- {minutes:.1f} minutes, written to {output}')


def write_tokenizer(
    folder: pathlib.Path, corpora: pathlib.Path, size: Size
) -> None:
  """Writes a byte-level BPE tokenizer of both domains."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=size.vocab_size,
      special_tokens=[_END],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
  )
  backend.train_from_iterator(
      (
          json.loads(line)['text']
          for domain in DOMAINS
          for line in (corpora / f'{domain}_train.jsonl').open()
      ),
      trainer,
  )
  backend.save(str(folder / 'tokenizer.json'))
  files.write_json(
      folder / 'tokenizer_config.json',
      {
          'tokenizer_class': 'PreTrainedTokenizerFast',
          'eos_token': _END,
          'pad_token': _END,
          'clean_up_tokenization_spaces': False,
          'model_max_length': size.length,
      },
  )


def train(
    size: Size,
    params: Any,
    documents: packing_lib.Documents,
    seed: int,
    steps_per_call: int = 10,
) -> Any:
  """Returns params, trained by AdamW on packed documents."""
  loss_fn = decoder.make_loss(size.config())
  schedule = optax.warmup_cosine_decay_schedule(
      0.0, size.learning_rate, size.num_steps // 20, size.num_steps
  )
  tx = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(schedule, b2=0.95, weight_decay=0.1),
  )

  def step(state, batch):
    params, opt_state = state
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, _), grads = value_and_grad(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  run = jax.jit(functools.partial(jax.lax.scan, step), donate_argnums=0)
  packing = packing_lib.Packing(size.length)
  stream = packing_lib.Stream(documents, packing, size.batch_size, seed=seed)
  state = params, tx.init(params)
  losses: Any = None
  started = time.monotonic()
  with tqdm.tqdm(total=size.num_steps, unit='step') as bar:

    def show(losses: jax.Array) -> None:
      loss = float(losses[-1])  # Waits for the device.
      bar.update(len(losses))
      rate = bar.n * size.batch_size * size.length
      rate /= time.monotonic() - started
      bar.set_postfix_str(f'loss {loss:.3f}, {rate:,.0f} tokens/s')

    for first in range(0, size.num_steps, steps_per_call):
      count = min(steps_per_call, size.num_steps - first)
      # Rows are packed while the device computes the steps before.
      batches = [next(stream) for _ in range(count)]
      if losses is not None:
        show(losses)
      state, losses = run(state, jax.tree.map(lambda *x: np.stack(x), *batches))
    show(losses)
  return state[0]


def evaluate(
    size: Size, params: Any, documents: dict[str, packing_lib.Documents]
) -> dict[str, float]:
  """Returns the loss of each domain, in nats a token."""
  loss_fn = decoder.make_loss(size.config())
  loss = jax.jit(parts.chunked(loss_fn, size.batch_size))
  packing = packing_lib.Packing(size.length)
  return {
      domain: float(loss(params, packing_lib.arrays(found, packing))[0])
      for domain, found in documents.items()
  }


if __name__ == '__main__':
  with cli.guarded(sys.argv[1:]) as words:
    tyro.extras.subcommand_cli_from_dict(
        {'corpora': write_corpora, 'pretrain': pretrain},
        args=words,
        description=__doc__,
    )
