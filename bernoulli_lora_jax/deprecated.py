"""Old names, which work with a warning for one version."""

from collections.abc import Callable, Mapping
import functools
import importlib
from typing import Any
import warnings


def warn(old: str, new: str) -> None:
  """Warns the caller of the caller that a name has changed."""
  warnings.warn(
      f'{old} is {new} now; the old name goes with the next version.',
      DeprecationWarning,
      stacklevel=3,
  )


def alias(
    old: str, new: str, function: Callable[..., Any]
) -> Callable[..., Any]:
  """Returns a function under its old name."""

  @functools.wraps(function)
  def renamed(*args, **kwargs):
    warn(old, new)
    return function(*args, **kwargs)

  return renamed


def modules(package: str, renamed: Mapping[str, str]) -> Callable[[str], Any]:
  """Returns the __getattr__ of a package with {old: new} names of modules."""

  def __getattr__(name: str) -> Any:
    if name not in renamed:
      raise AttributeError(f'module {package!r} has no attribute {name!r}')
    warn(f'{package}.{name}', f'{package}.{renamed[name]}')
    return importlib.import_module(f'{package}.{renamed[name]}')

  return __getattr__
