"""What a row of `llm_step` is called and measured at, its timing, its FLOPs."""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import re
import time
from typing import Any

import numpy as np

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
  """What a row is measured at.

  Attributes:
    raw: config.json of the model.
    rank: of the factors.
    period: steps of a link of a chain.
    rows: of a micro-batch.
    length: tokens of a row.
    micro_batches: one after another in a step, their gradients averaged.
    chunk: positions with logits at a time, in JAX.
    learning_rate: of Adam and AdamW.
    steps: timed together.
    synchronised: timed one by one.
    compile_mode: of torch.compile.
    trace: where a trace of three steps is written, in JAX; '' for none.
  """

  raw: dict[str, Any]
  rank: int
  period: int
  rows: int
  length: int
  micro_batches: int
  chunk: int
  learning_rate: float
  steps: int
  synchronised: int
  compile_mode: str
  trace: str

  @property
  def batch(self) -> int:
    """Rows of a step."""
    return self.micro_batches * self.rows


_ENDS = re.compile(r'_(r|len)(\d+)(?=_|$)')


def parsed(name: str) -> tuple[str, dict[str, int]]:
  """Returns a row's name without its rank 'r' and length 'len', and these."""
  given = {key: int(value) for key, value in _ENDS.findall(name)}
  return _ENDS.sub('', name), given


def has_rank(kind: str) -> bool:
  """Returns whether a row depends on the rank."""
  return not kind.startswith(('matmul', 'floor', 'hf'))


def expanded(
    names: Sequence[str], lengths: Sequence[str], ranks: Sequence[str]
) -> list[str]:
  """Returns the rows at each length and rank, where they have none of their own."""
  found = []
  for name, length, rank in itertools.product(
      names, lengths or [''], ranks or ['']
  ):
    kind, given = parsed(name)
    if length and 'len' not in given and kind != 'matmul':
      name += f'_len{length}'
    if rank and 'r' not in given and has_rank(kind):
      name += f'_r{rank}'
    found.append(name)
  return list(dict.fromkeys(found))


def timed(
    setting: Setting, step: Callable[[], Any], wait: Callable[[], Any]
) -> dict[str, float]:
  """Returns the rates of a step; `wait` returns when all are done."""

  def seconds(count):
    start = time.perf_counter()
    for _ in range(count):
      step()
    wait()
    return time.perf_counter() - start

  first = seconds(1)
  seconds(3)
  alone = float(np.median([seconds(1) for _ in range(setting.synchronised)]))
  together = seconds(setting.steps) / setting.steps
  tokens = setting.batch * setting.length
  return {
      'tokens_per_second': tokens / together,
      'synchronised': tokens / alone,
      'compile_seconds': first - alone,
  }


def flops(
    setting: Setting,
    thin: Callable[[int, int], int] = lambda m, n: 0,
    is_full: bool = False,
) -> float:
  """Returns the FLOPs a token of a step.

  Linear maps and head: forward and by the input, 4 m n; in full also by the weight,
  6 m n. Attention: two products over half of the positions forward, twice that
  backward. What is computed twice and the update of W are not counted.

  Args:
    setting: sizes.
    thin: (m, n) -> those of the factors of a linear map, see `thin_flops`.
    is_full: whether all weights train.
  """
  raw, each = setting.raw, 6 if is_full else 4
  d, f = raw['hidden_size'], raw['intermediate_size']
  kv = d // raw['num_attention_heads'] * raw['num_key_value_heads']
  maps = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
  layer = sum(each * m * n + thin(m, n) for m, n in maps)
  layer += 6 * setting.length * d
  return float(each * d * raw['vocab_size'] + raw['num_hidden_layers'] * layer)


def thin_flops(
    rank: int, side: str | None = None, is_sketched: bool = False
) -> Callable[[int, int], int]:
  """Returns (m, n) -> FLOPs a token of the factors of a linear map.

  Adapters: forward and by the input, 4 r (m + n), and 2 r m or 2 r n for each factor
  that trains. Sketched: 2 r (m + n) for each.

  Args:
    rank: r.
    side: of the chain: 'left' and 'right' train one factor, others both.
    is_sketched: whether W itself moves.
  """
  trained = {'left': ('n',), 'right': ('m',)}.get(side or '', ('m', 'n'))

  def thin(m, n):
    r = min(rank, m, n)
    if is_sketched:
      return 2 * r * (m + n) * len(trained)
    return 4 * r * (m + n) + 2 * r * sum({'m': m, 'n': n}[x] for x in trained)

  return thin


def speed(found: Row, per_token: float) -> Row:
  """Returns a timed row with its FLOPs."""
  rate = found['tokens_per_second'] * per_token / 1e12
  return {**found, 'gflops_per_token': per_token / 1e9, 'tflops': rate}
