"""Files of configs: those of the package by name, a user's own by path.

The repository keeps them in `configs/`; a wheel has them as
`bernoulli_lora_jax/configs`.
"""

import ast
from collections.abc import Iterator
import contextlib
import os
import pathlib
import runpy
import traceback
from typing import Any

from ml_collections import config_dict

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent


def shipped() -> dict[str, pathlib.Path]:
  """Returns {name: file} of the configs that come with the package."""
  folder = _PACKAGE / 'configs'
  if not folder.is_dir():  # A clone.
    folder = _PACKAGE.parent / 'configs'
  return {path.stem: path for path in sorted(folder.glob('[!_]*.py'))}


def find(name: str) -> pathlib.Path:
  """Returns the file of a config.

  Args:
    name: 'digits' of a shipped one, else the path of a file.

  Raises:
    ValueError: neither of them; the shipped ones are listed.
  """
  known = shipped()
  if name in known:
    return known[name]
  path = pathlib.Path(name)
  if not path.is_file():
    raise ValueError(
        f'Expected a Python file or one of {", ".join(known)}, got config'
        f' {name!r}.'
    )
  return path


def load(name: str) -> config_dict.ConfigDict:
  """Returns what get_config() of NAME[:VARIANT] returns.

  Raises:
    ValueError: no such file, or one that raises; the line is named.
  """
  name, *variant = name.split(':', 1)
  path = find(name)
  module = run_file(path)
  if 'get_config' not in module:
    raise ValueError(f'Expected a function get_config() in {path}.')
  with running(path):
    config = module['get_config'](*variant)
  if not isinstance(config, config_dict.ConfigDict):
    raise ValueError(
        f'Expected a ConfigDict from get_config() of {path}, got {config!r}:'
        ' begin with base_config.get_config().'
    )
  return config


def docstring(path: pathlib.Path) -> str:
  """Returns what a file says of itself; nothing in it is executed."""
  with running(path):
    return ast.get_docstring(ast.parse(path.read_text())) or ''


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
  """Turns whatever the code of a user's file raises into a ValueError.

  What a shipped config or task refuses is left as it says it.
  """
  try:
    yield
  except Exception as e:
    is_shipped = pathlib.Path(path).resolve() in shipped().values()
    is_shipped |= str(path).startswith('bernoulli_lora_jax.')
    if is_shipped and isinstance(e, ValueError | OSError):
      raise
    text = f'{type(e).__name__}: {one_line(e)}{_place(e, path)}'
    raise ValueError(f'Expected {path} to run, got {text}') from e


def one_line(error: BaseException) -> str:
  return ' '.join(str(error).split())


def _place(error: BaseException, path: str | os.PathLike[str]) -> str:
  """Returns the line that raised, of the user's file where it was in it."""
  if isinstance(error, SyntaxError):  # It says so itself.
    return ''
  frames = traceback.extract_tb(error.__traceback__)
  own = [frame for frame in frames if frame.filename == os.fspath(path)]
  frame = (own or frames)[-1]
  return f' ({frame.filename}, line {frame.lineno})'
