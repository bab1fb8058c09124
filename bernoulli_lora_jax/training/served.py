"""`blora merge`, `export` and `generate`: what is made of runs and checkpoints.

A run of `blora finetune` is read at its newest checkpoint, finished or not, while no
other process trains in it.
"""

import dataclasses
import pathlib
import sys
from typing import Any, Literal

import jax
import optax

from bernoulli_lora_jax import adapters as adapters_lib
from bernoulli_lora_jax import checks
from bernoulli_lora_jax import files
from bernoulli_lora_jax import merging
from bernoulli_lora_jax.models import chat as chat_lib
from bernoulli_lora_jax.models import generate as generate_lib
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import peft_import
from bernoulli_lora_jax.tasks import language_model
from bernoulli_lora_jax.tasks import text
from bernoulli_lora_jax.training import directory
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import tuned

FOLDERS = {'merged': 'merged', 'peft': 'adapter', 'vllm': 'adapter_vllm'}


def merge(
    source: str,
    output: str = '',
    /,
    adapters: list[str] | None = None,
    weights: list[float] | None = None,
    dtype: Literal['', 'float32', 'bfloat16', 'float16'] = '',
) -> None:
  """Writes merged weights, of a run or of a checkpoint and adapters of PEFT.

  The folder is one that transformers, vLLM and --model of blora finetune load.

  Args:
    source: directory of a run; with adapters a folder or owner/name on the hub.
    output: a folder that is not there yet; RUN/merged where it is left out.
    adapters: folders of PEFT adapters that are added to a checkpoint.
    weights: of each adapter in the sum; 1 for each where they are left out.
    dtype: of what is written; '' for that of the files.
  """
  if not adapters:
    if weights:
      raise ValueError(f'Expected adapters with weights={weights}, got none.')
    return export(source, output, format='merged', dtype=dtype)
  if not output:
    raise ValueError('Expected an output for the sum with adapters, got none.')
  files.check_new(output)
  checkpoint = hf.load(tuned.resolve(source), scan_layers=True)
  params, rows = _with_adapters(checkpoint, adapters, weights)
  hf.save(output, params, checkpoint, dtype=dtype or None)
  print('Rounding of the sums, the largest of the layers:\n')
  print(reporting.table(rows))
  print(f'\nmerged: {output}')


def export(
    run: str,
    output: str = '',
    /,
    format: Literal['peft', 'vllm', 'merged'] = 'peft',
    rank: int = 0,
    dtype: Literal['', 'float32', 'bfloat16', 'float16'] = '',
) -> None:
  """Writes what a run has changed as an adapter, or its merged weights.

  Prints how far merged weights are from base and adapter: `lost` is the part of the
  change that the adapter's rank leaves out, `distance` that of the rounding of merges.

  Args:
    run: directory of a run, finished or not.
    output: a folder that is not there yet; RUN/adapter, RUN/adapter_vllm or RUN/merged
      where it is left out.
    format: peft keeps a rank a matrix, vllm has one for all.
    rank: most of the adapter; 0 for the exact sum of all links.
    dtype: of what is written; '' for float32 adapters, and weights as in the files of
      the base.
  """
  checks.integers(0, rank=rank)
  if format != 'merged' and dtype == 'float16':
    raise ValueError(
        f"Expected dtype 'float32' or 'bfloat16' for format={format}, got"
        f' dtype={dtype!r}.'
    )
  if format == 'merged' and rank:
    raise ValueError(f'Expected a rank of an adapter alone, got rank={rank}.')
  folder = pathlib.Path(output or pathlib.Path(run, FOLDERS[format]))
  files.check_new(folder)
  tuned.read_config(run)  # Before a lock is left in another folder.
  with directory.hold(run):
    found = tuned.load(run)
    if format == 'merged':
      tuned.save_merged(found, folder, dtype or None)
    else:
      thin = tuned.save_adapter(
          found, folder, style=format, rank=rank, dtype=dtype or 'float32'
      )
      params = tuned.on_host(tuned.merged(found))  # Before another base.
      base = found.program.task.load()  # pyrefly: ignore
      rows = tuned.what_merges_lost(found, thin, base, params)
      print(reporting.table(rows) + '\n')
  print(f'{format} of step {found.step}: {folder}')


def generate(
    source: str,
    /,
    prompt: str = '',
    prompts: str = '',
    adapter: str = '',
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    num: int = 1,
    tokenizer: str = '',
) -> None:
  """Prints what a model says.

  Args:
    source: directory of a run, a folder of a checkpoint, or owner/name on the hub.
    prompt: what it goes on from; - reads it from standard input.
    prompts: file of prompts, one a line, in place of it; - is standard input.
    adapter: folder of a PEFT adapter that is merged first.
    chat: whether a prompt is a turn of the user, in the model's chat template.
    max_new_tokens: most tokens of an answer.
    temperature: 0 takes the likeliest token, else tokens are drawn.
    top_k: only the likeliest are drawn; 0 for all.
    top_p: only the likeliest that together have this probability are drawn.
    seed: of what is drawn.
    num: answers to each prompt.
    tokenizer: a folder, or bytes; '' for that of the model.
  """
  asked = _prompts(prompt, prompts)
  checks.integers(1, num=num)
  checks.integers(0, seed=seed)
  if num > 1 and temperature == 0:
    raise ValueError(
        f'Expected temperature > 0 for num={num} answers, got temperature=0: all'
        ' would be the same.'
    )
  checkpoint, own = open_model(source)
  words = language_model.load_tokenizer(tokenizer or own, checkpoint)
  if chat:
    if isinstance(words, text.Bytes):
      raise ValueError('Expected a tokenizer with a chat template, got bytes.')
    turn = lambda told: chat_lib.render_chat(
        words,  # pyrefly: ignore
        [{'role': 'user', 'content': told}],
        add_generation_prompt=True,
    )
    rows = [
        words.encode(turn(told), add_special_tokens=False) for told in asked
    ]
  else:
    rows = [words.encode(told) for told in asked]
  params = checkpoint.params
  if adapter:
    params = _with_adapters(checkpoint, [adapter], None)[0]
  made = generate_lib.generate(
      checkpoint.config,
      params,
      [row for row in rows for _ in range(num)],
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      key=jax.random.key(seed),
      end_tokens=end_tokens(checkpoint, words),
  )
  for i, answer in enumerate(made):
    if len(made) > 1:
      print(f'--- {asked[i // num]!r}')
    print(words.decode(answer))


def open_model(source: str) -> tuple[hf.Checkpoint, str]:
  """Returns a model with its weights, and the name of its tokenizer.

  Args:
    source: directory of a run, whose weights are its merged ones or those of its
      newest checkpoint; a folder of a checkpoint, or its name on the hub.
  """
  folder = pathlib.Path(source).expanduser()
  if not tuned.is_run(folder):
    return hf.load(source, scan_layers=True), ''
  words = tuned.read_config(folder).task.kwargs.get('tokenizer', '')
  if (folder / 'merged' / 'config.json').is_file():
    return hf.load(folder / 'merged', scan_layers=True), words
  with directory.hold(folder):
    run = tuned.load(folder)
    params = tuned.merged(run)
  return dataclasses.replace(run.checkpoint, params=params), words


def _with_adapters(
    checkpoint: hf.Checkpoint,
    folders: list[str],
    weights: list[float] | None,
) -> tuple[Any, list[dict[str, Any]]]:
  """Returns weights with adapters merged, in the memory of the weights.

  Returns:
    params, and what their rounding replaces, a row a kind of matrix.
  """
  found = peft_import.load(folders, checkpoint, weights or None)
  chain = adapters_lib.make_chain(
      found.policy, optax.identity(), found.matrices
  )
  state = adapters_lib.init(
      chain, jax.random.key(0), checkpoint.params, copy=False
  )
  state = adapters_lib.with_factors(chain, state, found.factors)
  factors = adapters_lib.scaled(state.factors, chain.adapted(state.params))
  rows = merging.merge_report(
      state.params, dict(factors), found.matrices  # pyrefly: ignore
  )
  columns = 'largest error', 'relative error', 'update lost'
  return adapters_lib.merged_each(chain, state, in_place=True), tuned.by_kind(
      rows, columns
  )


def _prompts(prompt: str, prompts: str) -> list[str]:
  """Returns what is asked."""
  if bool(prompt) == bool(prompts):
    raise ValueError(
        f'Expected prompt or prompts, got prompt={prompt!r}, prompts={prompts!r}.'
    )
  if prompt:
    asked = [sys.stdin.read().removesuffix('\n') if prompt == '-' else prompt]
  else:
    path = pathlib.Path(prompts).expanduser()
    content = sys.stdin.read() if prompts == '-' else path.read_text()
    asked = content.splitlines()
  asked = [told for told in asked if told.strip()]
  checks.that(bool(asked), 'at least one prompt', prompts=prompts or prompt)
  return asked


def end_tokens(
    checkpoint: hf.Checkpoint, words: text.TextTokenizer
) -> list[int]:
  """Returns the tokens that end an answer: the tokenizer's, and the model's own.

  Args:
    checkpoint: of the model, whose config.json and generation_config.json name some.
    words: its tokenizer.
  """
  found = set() if words.eos_id is None else {words.eos_id}
  if not isinstance(words, text.Bytes):
    folder = checkpoint.folder
    beside = {}
    if folder is not None and (folder / 'generation_config.json').is_file():
      beside = hf.read_object(folder, 'generation_config.json')
    for raw in (checkpoint.raw, beside):
      ids = raw.get('eos_token_id')
      ids = ids if isinstance(ids, list) else [ids]
      found |= {i for i in ids if i is not None}
  return sorted(i for i in found if i < checkpoint.config.vocab_size)
