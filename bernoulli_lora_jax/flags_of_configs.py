"""Flags of `blora train` and `blora sweep`: a config and its fields.

ml_collections reads --config.FIELD; here are --config, which is a name or a path,
and a help with the comments of base_config.
"""

from collections.abc import Callable, Sequence
import inspect
import shutil
import textwrap
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_dict
from ml_collections import config_flags

from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import config_files
from bernoulli_lora_jax.training import fields

_WORDS = {'config': None, 'workdir': None}
VERBOSITY = (
    '--verbosity',
    '-1: warnings; 0: what the libraries log; 1: errors with their traceback.',
)


class Experiment(NamedTuple):
  """What the flags of train and sweep say."""

  config: config_dict.ConfigDict  # Locked, with what flags have set.
  name: str  # NAME[:VARIANT], as it was given.
  workdir: str
  overrides: dict[str, Any]  # {field: value} of the flags.


def parse(argv: Sequence[str]) -> Experiment:
  """Reads --config, --workdir and --config.FIELD.

  Raises:
    ValueError: a flag that is missing or unknown, a config that fails, by name.
  """
  given, rest = take(argv, _WORDS)
  for flag in _WORDS:
    if given[flag].value is None:
      raise ValueError(f'Expected --{flag}, got none; --help lists all flags.')
  config = config_files.load(given.config)
  values = flags.FlagValues()
  argv = ['blora', *rest]
  try:
    config_flags.DEFINE_config_dict(
        'config', config, flag_values=values, sys_argv=argv
    )
    _, *more = values(argv)
  except AttributeError as e:  # A field that does not exist.
    text = str(e.args[0]).replace('\\n', ' ').replace("\\'", '')
    raise ValueError(f'Unknown config field: {text.strip(chr(39))}') from e
  except flags.Error:
    raise
  except Exception as e:  # Of a parser of ml_collections.
    raise ValueError(f'{type(e).__name__}: {e}') from e
  if more:
    raise ValueError(f'Expected flags only, got {more}.')
  overrides = config_flags.get_override_values(values['config'])
  return Experiment(config, given.config, given.workdir, overrides)


def take(
    argv: Sequence[str], defaults: dict[str, int | str | None]
) -> tuple[flags.FlagValues, list[str]]:
  """Returns the flags of some names, of their defaults' types, and the rest."""
  values = flags.FlagValues()
  for name, default in defaults.items():
    if isinstance(default, int):
      flags.DEFINE_integer(name, default, '', flag_values=values)
    else:
      flags.DEFINE_string(name, default, '', flag_values=values)
  _, *rest = values(['blora', *argv], known_only=True)
  return values, rest


def print_help(command: Callable[..., None], argv: Sequence[str]) -> None:
  """Prints every flag of train or sweep; with --config that file's text, too."""
  name = command.__name__
  config, path = base_config.get_config(), None
  chosen = take(argv, _WORDS)[0].config
  if chosen is not None:
    config = config_files.load(chosen)
    path = config_files.find(chosen.partition(':')[0])
  print(
      f'usage: blora {name} --config=NAME[:VARIANT] --workdir=DIR'
      ' [--config.FIELD=VALUE ...]\n'
  )
  print(inspect.getdoc(command))
  print(f'`python launch/{name}.py` is the same.\n')
  text = (
      'a config that comes with the package, or a file of yours; after a colon its'
      ' variant, several with commas'
  )
  workdir = ('--workdir', 'directory of the run, made if need be')
  print(columns([('--config', text), workdir, VERBOSITY]))
  if path is None:
    print(f'\nConfigs (blora {name} --config=NAME --help lists the variants):')
    shipped = config_files.shipped().items()
    first = lambda path: config_files.docstring(path).partition('\n')[0]
    print(columns([(name, first(path)) for name, path in shipped]))
  else:
    print(f'\n{path}:\n')
    print(textwrap.indent(config_files.docstring(path), '  '))
  print('\nFields, their values and what they are:')
  values = checkpoint.flatten(config.to_dict())
  told: list[tuple[str, ...]] = []
  for field in fields.documented():
    if field.heading:
      told.append((f'\n  # {field.heading}',))
    if field.name in values:
      shown = str(values[field.name]) or "''"
      told.append((f'--config.{field.name}', shown, field.comment))
  print(columns(told))


def columns(rows: Sequence[tuple[str, ...]]) -> str:
  """Returns rows, their cells aligned, the last wrapped, an only one as it is."""
  cells = [row for row in rows if len(row) > 1]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  room = max(100, shutil.get_terminal_size().columns)
  lines = []
  for *first, last in rows:
    pairs = zip(first, widths, strict=False)
    begin = '  ' + ''.join(f'{cell:<{width}}  ' for cell, width in pairs)
    wrapped = flags.text_wrap(last, room, ' ' * len(begin), begin) or begin
    lines.append(wrapped if first else last)
  return '\n'.join(lines)
