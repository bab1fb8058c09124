"""Flags of a command from the signature of its function, by tyro.

Parameters are flags, docstrings their help. Lists are written with commas, shapes
as 64x32*2, whole numbers also as 1e4. What is wrong is a ValueError of one line.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import io
import re
import typing
from typing import Any, Literal

from bernoulli_lora_jax.studies import predict


def call(
    name: str,
    functions: Callable[..., None] | dict[str, Callable[..., None]],
    argv: Sequence[str],
    description: str | None = None,
    dashes: bool = False,
) -> None:
  """Calls a function, or the one that argv begins with, with the flags of argv.

  A flag is read with - or _ between its words; `dashes` says how a help writes it.

  Raises:
    ValueError: flags that are missing, unknown or wrong.
    SystemExit: after a help; that of subcommands begins with the description.
  """
  import tyro  # Where the library is imported it is not needed.

  options: dict[str, Any] = {
      'prog': f'blora {name}',
      'use_underscores': not dashes,
      'registry': _registry(),
      'config': (
          tyro.conf.OmitArgPrefixes,
          tyro.conf.FlagCreatePairsOff,
          tyro.conf.PositionalMetavarFromFieldName,
      ),
  }
  if isinstance(functions, dict):
    known = ', '.join(functions)
    if argv and not argv[0].startswith('-') and argv[0] not in functions:
      raise ValueError(f'Expected a subcommand of {known}, got {argv[0]!r}.')
    parse = functools.partial(
        tyro.extras.subcommand_cli_from_dict,
        {name: _later(f) for name, f in functions.items()},
        description=description,
    )
  else:
    parse = functools.partial(tyro.cli, _later(functions))
  is_bare = isinstance(functions, dict) and not argv
  errors = io.StringIO()
  with contextlib.redirect_stderr(errors):
    try:
      run = parse(args=['--help'] if is_bare else argv, **options)
    except SystemExit as e:
      if e.code:
        raise ValueError(_plain(errors.getvalue())) from None
      raise SystemExit(2 if is_bare else 0) from None
  run()


def _later(f: Callable[..., None]) -> Callable[..., Any]:
  """Returns f as a function that is called without arguments, to parse first."""
  return functools.wraps(f)(lambda *args, **kwargs: lambda: f(*args, **kwargs))


def _plain(box: str) -> str:
  """Returns what a box of tyro says first, after its title, in a line."""
  text = re.sub('[\u2502\u2570\u256f|+]', ' ', box.partition('\n')[2])
  parts = re.split(r'\n\s*\n|[\u2500-]{3,}', text)
  return next(filter(None, (' '.join(part.split()) for part in parts)), box)


def _whole(text: str) -> int:
  """Returns a whole number, also where it is written as 1e4."""
  with contextlib.suppress(ValueError):
    return int(text)
  with contextlib.suppress(ValueError, OverflowError):
    if float(text).is_integer():
      return int(float(text))
  raise ValueError(f'Expected a whole number, got {text!r}.')


# {type: (its name in a help, how it is read, how a default is shown)}.
_SCALARS: dict[Any, tuple[str, Callable, Callable]] = {
    int: ('INT', _whole, str),
    float: ('FLOAT', float, '{:g}'.format),
    str: ('STR', str, str),
}


def _registry() -> Any:
  """Returns how tyro reads the types of signatures."""
  from tyro import constructors

  registry = constructors.ConstructorRegistry()

  @registry.primitive_rule
  def rule(info: Any) -> Any:
    kind, args = info.type, typing.get_args(info.type)
    if type(None) in args:  # A flag that may be left out.
      (kind,) = (t for t in args if t is not type(None))
      args = typing.get_args(kind)
    if kind in _SCALARS:
      return spec(*_SCALARS[kind])
    if kind == int | Literal['all']:  # The number may be left out.
      read = lambda text: text if text == 'all' else _whole(text)
      return spec('INT', read, str, alone='all')
    if kind == list[tuple[int, int]]:
      told = lambda x: ','.join(f'{m}x{n}' for m, n in x)
      return spec('MxN,..', predict.parse_shapes, told)
    if typing.get_origin(kind) is not list:
      return None
    name, read, told = _SCALARS[args[0]]
    return spec(
        f'{name},..',
        lambda text: [read(part) for part in text.split(',') if part],
        lambda x: ','.join(map(told, x)),
    )

  def spec(metavar: str, read: Any, told: Any, alone: str | None = None) -> Any:
    return constructors.PrimitiveConstructorSpec(
        nargs=1 if alone is None else (0, 1),
        metavar=metavar,
        instance_from_str=lambda args: read(args[0] if args else alone),
        is_instance=lambda x: x is None
        or isinstance(x, (int, float, str, list)),
        str_from_instance=lambda x: ['None' if x is None else told(x)],
    )

  return registry
