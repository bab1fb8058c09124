"""What the launch scripts share: user errors are one line, not a traceback."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import runpy
import sys
import traceback
from typing import Any

from absl import app
from absl import flags
from absl import logging

from bernoulli_lora_jax.training import loop


def run(main: Callable[[list[str]], None]) -> None:
  """Runs main([program]) after parsing the flags; exits 1 on a user's error."""
  app.run(lambda argv: guarded(main, argv), flags_parser=parse)


def parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except AttributeError as e:  # ml_collections: a field that does not exist.
    raise SystemExit(f'Unknown config field: {_line(e)}') from e
  except flags.Error as e:
    # ml_collections puts the traceback of a config file into the message: its
    # last line is the error.
    text = str(e)
    is_traced = 'Traceback' in text
    raise SystemExit(
        text.strip().splitlines()[-1] if is_traced else _line(e)
    ) from e
  except Exception as e:  # The user's config file: whatever it raises is his.
    raise SystemExit(f'{type(e).__name__}: {_line(e)}{_place(e)}') from e


def guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
  """Runs main(argv); exits 1 with one line on a user's error."""
  logging.set_verbosity(logging.WARNING)  # Orbax speaks at INFO.
  try:
    main(argv)
  except (
      ValueError,
      TypeError,
      OSError,
      loop.DivergedError,
  ) as e:
    logging.debug('Traceback:', exc_info=True)
    raise SystemExit(f'{type(e).__name__}: {_line(e)}') from e
  except BaseException as e:
    # Where nothing has begun that could be saved; from within a compilation it
    # comes as an error of jax's own, with the traceback in its message.
    is_interrupt = isinstance(e, KeyboardInterrupt)
    if not (is_interrupt or str(e).rstrip().endswith('KeyboardInterrupt:')):
      raise
    print('Ended by SIGINT.', file=sys.stderr)
    raise SystemExit(130) from None


def run_file(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns what a user's Python file defines.

  Raises:
    ValueError: no such file, or one that raises; the line is named.
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(f'Expected a Python file, got {path}.')
  with running(path):
    return runpy.run_path(os.fspath(path))


@contextlib.contextmanager
def running(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns whatever the code of a user's file raises into a ValueError."""
  try:
    yield
  except Exception as e:
    text = f'{type(e).__name__}: {_line(e)}{_place(e)}'
    raise ValueError(f'Expected {path} to run, got {text}') from e


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split())


def _place(error: BaseException) -> str:
  """Returns the file and line that raised."""
  frames = traceback.extract_tb(error.__traceback__)
  return f' ({frames[-1].filename}, line {frames[-1].lineno})' if frames else ''
