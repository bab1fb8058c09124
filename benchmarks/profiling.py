"""Where a step on a GPU goes: milliseconds by kind of kernel.

Kernels in a graph have no name of an operation, but those that XLA makes are named
after their fusion, and the program's text says what was fused. A kind is that of most
of the operations of a fusion; kernels of libraries are told by their own names alone,
so thin products that cuBLAS computes are among its others.
"""

import collections
from collections.abc import Callable
import gzip
import json
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
import measuring

# {part of a kernel's name: its kind}, where the program's text has none.
_NAMES = {
    'cudnn': 'attention',
    'nvjet': 'products, cuBLAS',
    'cutlass': 'products, cuBLAS',
    'gemm_fusion': 'products, Triton',
    'memcpy': 'copies',
}
# {part of an operation's path: its kind}
_SCOPES = {
    'norm/': 'norms',
    '/mlp/': 'activation',
    '/self_attn/': 'around attention',
}
_THIN, _UPDATE, _REST = 'thin products', 'update of W', 'other elementwise'
KINDS = tuple(
    dict.fromkeys(
        (*_NAMES.values(), _THIN, *_SCOPES.values(), _UPDATE, _REST, 'all')
    )
)


def profile(
    step: Callable[[], Any],
    wait: Callable[[], Any],
    setting: measuring.Setting,
    program: str,
) -> dict[str, float]:
  """Returns milliseconds of a step by kind; writes a trace of three steps."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(3):
        step()
      wait()
    (trace,) = pathlib.Path(folder).rglob('*.trace.json.gz')
    target = pathlib.Path(setting.trace)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(trace, target)
  d, f = setting.raw['hidden_size'], setting.raw['intermediate_size']
  kv = d // setting.raw['num_attention_heads']
  kv *= setting.raw['num_key_value_heads']
  shapes = {(d, d), (d, kv), (d, f), (f, d)}
  return milliseconds(target, kinds_of(program, shapes, setting.rank))


def milliseconds(
    trace: pathlib.Path, kinds: dict[str, str]
) -> dict[str, float]:
  """Returns milliseconds a step by kind, of a trace of three steps."""
  events = json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
  names = {}
  for e in events:
    if e.get('ph') == 'M' and e['name'] in ('process_name', 'thread_name'):
      names[e['name'], e['pid'], e.get('tid')] = e['args']['name']
  on_gpu = {k[1] for k, x in names.items() if 'GPU' in x}
  streams = {k[1:] for k, x in names.items() if x.startswith('Stream')}
  found = dict.fromkeys(KINDS, 0.0)
  for e in events:
    if e.get('ph') != 'X' or e['pid'] not in on_gpu:
      continue
    if (e['pid'], e['tid']) not in streams:
      continue
    parts = (kind for x, kind in _NAMES.items() if x in e['name'].lower())
    for kind in (kinds.get(e['name']) or next(parts, _REST), 'all'):
      found[kind] += e['dur'] / 3e3
  return found


def kinds_of(
    program: str, shapes: set[tuple[int, int]], rank: int
) -> dict[str, str]:
  """Returns {kernel: kind} of the fusions of a compiled program.

  Args:
    program: its text.
    shapes: (m, n) of the matrices that are adapted.
    rank: of the factors: a product with such a side is thin.
  """
  heads, paths, inside = {}, collections.defaultdict(list), ''
  for line in program.splitlines():
    if line.endswith('{') and not line.startswith(' '):
      inside = line.split()[0].lstrip('%')
      heads[inside] = line
    paths[inside] += re.findall(r'op_name="([^"]*)"', line)
  fusions = re.findall(r'%(\S+) = .* fusion\(.*calls=%([\w.-]+)', program)
  return {
      re.sub(r'\W', '_', name): _kind(
          heads.get(called, ''), paths[called], shapes, rank, 'gemm' in name
      )
      for name, called in fusions
  }


def _kind(head, paths, shapes, rank, is_product) -> str | None:
  """Returns the kind of a fusion; None if its name must tell."""
  sides = lambda text: [
      tuple(map(int, x.split(','))) for x in re.findall(r'\[([\d,]+)\]', text)
  ]
  is_backprop = any('jvp' in x for x in paths)  # Or forward.
  if not is_backprop and any(
      x[-2:] in shapes for x in sides(head.rpartition('->')[2])
  ):
    return _UPDATE
  if is_product:
    return _THIN if any(rank in x for x in sides(head)) else None
  counts = collections.Counter(
      kind for x in paths for part, kind in _SCOPES.items() if part in x
  )
  return counts.most_common(1)[0][0] if counts else _REST
