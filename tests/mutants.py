"""Breaks the package line by line and demands that a test turns red each time.

  python tests/mutants.py --only=chain

`mutants.toml` holds the faults: a text that occurs once in a file of the package,
what takes its place, and the smallest quick test that must fail. First all of these
tests run on the package as it is and must pass. Then each fault is made in a copy
of the repository, its test is run, and the copy is mended. Red is a test that fails
or hangs; a test that cannot be collected is an error of this net.

Compiled programs are kept between runs: jax finds them by a hash of the program, so
that one of a faulty package is never taken for another.
"""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from typing import NamedTuple

import tabulate
import tqdm

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PACKAGE = 'bernoulli_lora_jax'
_DATA = _ROOT / 'tests' / 'mutants.toml'
_PYTEST = ('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist')
_TIMEOUT = 120.0  # Seconds of one test.
_BAD = ('survived', 'error')


class Mutant(NamedTuple):
  """One fault, and the test that must see it."""

  file: str  # Below the package.
  find: str  # Occurs once in it.
  replace: str
  test: str  # A node id, or 'file.py -k expression', from the root.
  fault: str


class Outcome(NamedTuple):
  """What the test of a mutant did."""

  mutant: Mutant
  kind: str  # 'red', 'timed out', 'survived' or 'error'.
  text: str  # What pytest printed, of an error.


def load() -> list[Mutant]:
  """Returns the mutants of `mutants.toml`."""
  tables = tomllib.loads(_DATA.read_text())['mutant']
  return [Mutant(**table) for table in tables]


def mutated(mutant: Mutant, root: pathlib.Path = _ROOT) -> str:
  """Returns the text of the mutant's file with the fault in it.

  Raises:
    ValueError: a text that does not occur once, a fault that is none, or one that
      does not compile.
  """
  path = root / _PACKAGE / mutant.file
  text = path.read_text() if path.exists() else ''
  where = f'{mutant.file} ({mutant.fault})'
  count = text.count(mutant.find)
  if count != 1:
    raise ValueError(
        f'Expected find once in {where}, got {count} times: {mutant.find!r}.'
    )
  if mutant.find == mutant.replace:
    raise ValueError(f'Expected a replace that differs in {where}.')
  result = text.replace(mutant.find, mutant.replace)
  try:
    compile(result, mutant.file, 'exec')
  except SyntaxError as e:
    raise ValueError(f'Expected a fault that compiles in {where}: {e}.') from e
  return result


def _sources() -> list[str]:
  """Returns the repository's files, those not yet committed too."""
  listed = subprocess.run(
      ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=True,
  )
  names = set(filter(None, listed.stdout.split('\0')))
  return sorted(name for name in names if (_ROOT / name).is_file())


def _copy(names: list[str], folder: pathlib.Path) -> pathlib.Path:
  """Copies the repository's files into a folder."""
  for name in names:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(_ROOT / name, target)
  return folder


def _pytest(
    root: pathlib.Path, args: list[str], shared: pathlib.Path, timeout: float
) -> tuple[int | None, str]:
  """Returns pytest's exit status, None for one that hung, and what it printed."""
  env = {
      **os.environ,
      'PYTHONPATH': str(root),
      # No bytecode: two texts of one second and size would be taken for one.
      'PYTHONDONTWRITEBYTECODE': '1',
      'BERNOULLI_LORA_TESTS': str(shared),
  }
  process = subprocess.Popen(
      [sys.executable, *_PYTEST, '-m', 'not slow', *args],
      cwd=root,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
  )
  try:
    text, _ = process.communicate(timeout=timeout)
  except BaseException as e:
    os.killpg(process.pid, signal.SIGKILL)  # Its children too.
    process.communicate()
    if isinstance(e, subprocess.TimeoutExpired):
      return None, ''
    raise
  return process.returncode, text


def _try(mutant: Mutant, root: pathlib.Path, compiled: pathlib.Path) -> Outcome:
  """Makes the fault, runs its test and mends the copy."""
  path = root / _PACKAGE / mutant.file
  whole = path.read_text()
  # Pre-trained weights are a folder's own: a fault may spoil them.
  with tempfile.TemporaryDirectory(dir=root.parent) as folder:
    shared = pathlib.Path(folder)
    (shared / 'compiled').symlink_to(compiled)
    try:
      path.write_text(mutated(mutant, root))
      status, text = _pytest(
          root, ['-x', *shlex.split(mutant.test)], shared, _TIMEOUT
      )
    finally:
      path.write_text(whole)
  kinds = {0: 'survived', 1: 'red', None: 'timed out'}
  return Outcome(mutant, kinds.get(status, 'error'), text)


def _expression(test: str) -> str:
  """Returns what chooses a mutant's test among those of all files."""
  name, *options = shlex.split(test)
  file, *parts = name.split('::')
  parts = [
      pathlib.PurePath(file).name,
      *parts,
      *(f'({x})' for x in options[1:]),
  ]
  return ' and '.join(parts)


def _check_green(
    mutants: list[Mutant], root: pathlib.Path, shared: pathlib.Path
) -> None:
  """Ends the process unless all named tests pass on the package as it is."""
  files = sorted({shlex.split(m.test)[0].split('::')[0] for m in mutants})
  chosen = sorted({f'({_expression(m.test)})' for m in mutants})
  timeout = _TIMEOUT * len(mutants)
  args = [*files, '-k', ' or '.join(chosen)]
  status, text = _pytest(root, args, shared, timeout)
  if status != 0:
    print(text)
    raise SystemExit('The tests do not pass on the package as it is.')


def _run(mutants: list[Mutant], num_jobs: int) -> list[Outcome]:
  """Returns what becomes of each mutant, `num_jobs` at a time."""
  names = _sources()
  with tempfile.TemporaryDirectory(prefix='mutants') as folder:
    base = pathlib.Path(folder)
    compiled = base / 'compiled'
    compiled.mkdir()
    copies: queue.Queue[pathlib.Path] = queue.Queue()
    roots = [
        _copy(names, base / f'{i}' / 'repository') for i in range(num_jobs)
    ]
    for root in roots:
      copies.put(root)
    _check_green(mutants, roots[0], base)

    def one(mutant):
      root = copies.get()
      try:
        return _try(mutant, root, compiled)
      finally:
        copies.put(root)

    with concurrent.futures.ThreadPoolExecutor(num_jobs) as pool:
      return list(
          tqdm.tqdm(pool.map(one, mutants), total=len(mutants), unit='mutant')
      )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--jobs', type=int, default=os.cpu_count() or 1)
  parser.add_argument(
      '--only', default='', help='part of the name of a file or a fault'
  )
  args = parser.parse_args()
  begun = time.perf_counter()
  mutants = [m for m in load() if args.only in m.file or args.only in m.fault]
  if not mutants:
    raise SystemExit(f'Expected a mutant with {args.only!r}, got none.')
  stale = []
  for mutant in mutants:
    try:
      mutated(mutant)
    except ValueError as e:
      stale.append(str(e))
  if stale:
    raise SystemExit('\n'.join(stale))
  outcomes = _run(mutants, max(1, args.jobs))
  for outcome in outcomes:
    if outcome.kind == 'error':
      print(outcome.text)
  rows = [
      (m.file, m.fault, m.test, kind)
      for m, kind, _ in outcomes
      if kind != 'red'
  ]
  if rows:
    print(tabulate.tabulate(rows, ('file', 'fault', 'test', 'outcome')))
  count = {k: 0 for k in ('red', 'timed out', *_BAD)}
  for outcome in outcomes:
    count[outcome.kind] += 1
  listed = ', '.join(f'{n} {kind}' for kind, n in count.items())
  seconds = time.perf_counter() - begun
  print(f'{len(outcomes)} mutants: {listed}; {seconds:.0f} s')
  raise SystemExit(any(count[kind] for kind in _BAD))


if __name__ == '__main__':
  main()
