"""A run's directory: that it can be written, and one process in it at a time."""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import tempfile
import threading
from typing import Any

MARK = 'blora.json'  # In an exported folder: which run it is of, at which step.
_LOCK = '.lock'
_HEARTBEAT = 30.0  # Seconds between signs of life of the process that holds it.
STALE = 600.0  # Seconds without one after which another host's lock is void.


def check(workdir: str | pathlib.Path) -> None:
  """Raises unless a run can be written in a directory; leaves it as it was.

  Args:
    workdir: exists or can be made.

  Raises:
    ValueError: an empty name, no directory, one that cannot be written, or one
      in which another process trains.
  """
  if not str(workdir) or '\0' in str(workdir):
    raise ValueError(f'Expected the name of a directory, got {str(workdir)!r}.')
  workdir = pathlib.Path(workdir)
  made = []
  try:
    for folder in reversed((workdir, *workdir.parents)):
      if not folder.is_dir():
        folder.mkdir()
        made.append(folder)
    with tempfile.TemporaryFile(dir=workdir):
      pass
    path = workdir / _LOCK
    if path.exists():
      with path.open('r+') as file:
        _take(file, path)
  except OSError as e:
    raise ValueError(
        f'Expected a directory that can be written, got workdir={workdir}:'
        f' {e.strerror or e}.'
    ) from e
  finally:
    for folder in reversed(made):
      with contextlib.suppress(OSError):  # Another process uses it by now.
        folder.rmdir()


@contextlib.contextmanager
def hold(workdir: str | pathlib.Path) -> Iterator[None]:
  """Keeps other processes out of a directory, which is made if need be.

  The file `.lock` in it names process, host and start, and is locked by the
  kernel (`flock`), which lets go when the process ends, however it ends: a lock
  left by a killed process is taken over. Where file systems do not carry locks to
  other hosts, the age of the file tells: it is touched every half a minute, and
  another host's is void after `STALE` seconds.

  Args:
    workdir: the run's directory.

  Raises:
    ValueError: as `check`.
  """
  workdir = pathlib.Path(workdir)
  check(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / _LOCK
  with contextlib.ExitStack() as stack:
    while True:
      file = stack.enter_context(path.open('a+'))
      _take(file, path)
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
          break
      file.close()  # The one who held it has removed it since.
    file.truncate(0)
    file.write(json.dumps(_record()))
    file.flush()
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(file, ended), daemon=True)
    beat.start()
    try:
      yield
    finally:
      ended.set()
      beat.join()
      with contextlib.suppress(FileNotFoundError):
        path.unlink()  # While it is locked: who waits for it looks again.


def _record() -> dict[str, Any]:
  now = datetime.datetime.now().astimezone()
  return {
      'process': os.getpid(),
      'host': socket.gethostname(),
      'start': now.isoformat(timespec='seconds'),
  }


def _beat(file: Any, ended: threading.Event) -> None:
  while not ended.wait(_HEARTBEAT):
    with contextlib.suppress(OSError):
      os.utime(file.fileno())


def _take(file: Any, path: pathlib.Path) -> None:
  """Locks an open lock file; raises ValueError if another process lives."""
  locks = True
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise _held(file, path) from None
  except OSError:  # A file system without locks.
    locks = False
  record = _read(file)
  if record is None:
    return
  if record.get('host') == socket.gethostname():
    is_alive = not locks and _lives(record.get('process'))
  else:
    is_alive = _age(path) < STALE
  if is_alive:
    raise _held(file, path)


def _read(file: Any) -> dict[str, Any] | None:
  """Returns what a lock file says; None for an empty or a torn one."""
  file.seek(0)
  try:
    record = json.loads(file.read())
  except ValueError:
    return None
  return record if isinstance(record, dict) else None


def _held(file: Any, path: pathlib.Path) -> ValueError:
  record = _read(file) or {}
  unknown = 'unknown'
  return ValueError(
      f'Expected no other process in {path.parent}, got process'
      f' {record.get("process", unknown)} on {record.get("host", unknown)} since'
      f' {record.get("start", unknown)}: wait until it ends, or end it; if it is'
      f' dead, remove {path}.'
  )


def _lives(process: Any) -> bool:
  try:
    os.kill(int(process), 0)
  except (ProcessLookupError, TypeError, ValueError):
    return False
  except PermissionError:  # Another user's.
    return True
  return True


def _age(path: pathlib.Path) -> float:
  """Returns the seconds since a file was touched, by its file system's clock."""
  with tempfile.NamedTemporaryFile(dir=path.parent) as probe:
    now = os.fstat(probe.fileno()).st_mtime
  return now - path.stat().st_mtime
