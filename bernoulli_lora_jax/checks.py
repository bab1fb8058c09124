"""Checks of arguments, all with errors 'Expected ..., got name=value.'"""

from collections.abc import Collection, Mapping
import math
import operator
from typing import Any

import jax
import numpy as np


def that(condition: bool, expected: str, **values: Any) -> None:
  """Raises ValueError('Expected ..., got name=value.') unless it holds."""
  if not condition:
    got = ', '.join(f'{name}={value}' for name, value in values.items())
    raise ValueError(f'Expected {expected}, got {got}.')


def at_least(low: float, **values: float) -> None:
  """Raises ValueError for a value below `low` or infinite, by its name."""
  for name, value in values.items():
    that(value >= low, f'{name} >= {low}', **{name: value})
    that(value < math.inf, f'{name} finite', **{name: value})


def integers(low: int, **values: Any) -> None:
  """Raises for what is no int of Python or NumPy, or below `low`, by its name."""
  for name, value in values.items():
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
      raise TypeError(f'Expected {name} to be an int, got {value!r}.')
    at_least(low, **{name: int(value)})


def positive(**values: float) -> None:
  """Raises ValueError for a value not above zero or infinite, by its name."""
  for name, value in values.items():
    that(value > 0, f'{name} > 0', **{name: value})
    that(value < math.inf, f'{name} finite', **{name: value})


def within(interval: str, **values: Any) -> None:
  """Raises ValueError for a number outside '(0, 1]'; one that is traced passes."""
  low, high = map(float, interval[1:-1].split(','))
  from_low, to_high = (
      operator.le if end in '[]' else operator.lt
      for end in (interval[0], interval[-1])
  )
  for name, value in values.items():
    if not isinstance(value, jax.core.Tracer):
      is_inside = from_low(low, value) and to_high(value, high)
      that(bool(is_inside), f'{name} in {interval}', **{name: value})


def one_of(known: Collection[Any], **values: Any) -> None:
  """Raises ValueError for a value that is not known, by its name."""
  for name, value in values.items():
    if value not in known:
      listed = tuple(known)
      raise ValueError(f'Expected {name} in {listed}, got {name}={value!r}.')


def types(
    known: Mapping[str, tuple[Any, Collection[str]]],
    raw: Mapping[str, Any],
    where: str,
) -> None:
  """Raises ValueError for a field of another type than it must have, by its name.

  Args:
    known: {what is expected, in words: (its type, names of fields)}.
    raw: fields, of which any may be absent.
    where: they come from.
  """
  for expected, (kind, keys) in known.items():
    for key in keys:
      if key not in raw:
        continue
      value = raw[key]
      is_right = isinstance(value, kind)
      if isinstance(value, bool):  # Which is an int of Python.
        is_right = kind == bool | None
      that(is_right, f'{key} in {where} to be {expected}', **{key: repr(value)})


def static_int(name: str, value: Any) -> int:
  """Returns a number that gives shapes: of an int, or of an array of known value.

  Raises:
    TypeError: no integer, or one that is traced.
  """
  if isinstance(value, jax.core.Tracer):
    raise TypeError(
        f'Expected {name} to be an int, got {value}, which is traced: it gives'
        f" shapes. Under optax.inject_hyperparams write static_args=('{name}',)."
    )
  try:
    number = None if isinstance(value, bool) else operator.index(value)
  except TypeError:
    number = None
  if number is None:
    raise TypeError(f'Expected {name} to be an int, got {value!r}.')
  return number
