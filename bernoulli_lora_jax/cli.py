"""The command `blora`: train, sweep, report, audit, theory.

Without an installation `python -m bernoulli_lora_jax` and `launch/*.py` are the
same. A user's error is one line on stderr and the exit status 1.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import inspect
import io
import itertools
import shutil
import sys
import textwrap
import traceback
import typing
from typing import Any, Literal, NamedTuple

from absl import flags
from absl import logging
import jax
from ml_collections import config_dict
from ml_collections import config_flags

import bernoulli_lora_jax
from bernoulli_lora_jax.studies import predict
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import config_files
from bernoulli_lora_jax.training import directory
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import fields
from bernoulli_lora_jax.training import figures as figures_lib
from bernoulli_lora_jax.training import labels
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import sweep as sweep_lib

_HELP = ('-h', '-help', '--help')
_VERBOSITY = (
    '--verbosity',
    '-1: warnings; 0: what the libraries log; 1: errors with their traceback.',
)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs a command line.

  Args:
    argv: the words after `blora`; None for those of the process.

  Raises:
    SystemExit: where it ends otherwise than well, or with a help.
  """
  guarded(_run, list(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
  if argv[:1] == ['--version']:
    print(f'blora {bernoulli_lora_jax.__version__}')
  elif not argv or argv[0] in _HELP:
    print(_overview())
    raise SystemExit(0 if argv else 2)
  elif argv[0] not in _COMMANDS:
    raise ValueError(
        f'Expected a command of {", ".join(_COMMANDS)}, got {argv[0]!r}.'
    )
  else:
    _COMMANDS[argv[0]](argv[1:])


def guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
  """Runs main(argv) without --verbosity; exits 1 with one line on a user's error."""
  verbosity = logging.WARNING  # Orbax speaks at INFO.
  try:
    argv, verbosity = _take_verbosity(argv)
    logging.set_verbosity(verbosity)
    if verbosity > logging.WARNING:
      logging.use_absl_handler()
    main(argv)
  except (
      ValueError,
      TypeError,
      OSError,
      loop.DivergedError,
      flags.Error,
  ) as e:
    if verbosity >= logging.DEBUG:
      traceback.print_exc()
    kind = '' if isinstance(e, flags.Error) else f'{type(e).__name__}: '
    raise SystemExit(f'{kind}{config_files.one_line(e)}') from e
  except BaseException as e:
    # Where nothing has begun that could be saved; from within a compilation it
    # comes as an error of jax's own, with the traceback in its message.
    is_interrupt = isinstance(e, KeyboardInterrupt)
    if not (is_interrupt or str(e).rstrip().endswith('KeyboardInterrupt:')):
      raise
    print('Ended by SIGINT.', file=sys.stderr)
    raise SystemExit(130) from None


def _take_verbosity(argv: list[str]) -> tuple[list[str], int]:
  found = flags.FlagValues()
  flags.DEFINE_integer(
      _VERBOSITY[0][2:], logging.WARNING, '', flag_values=found
  )
  _, *rest = found(['blora', *argv], known_only=True)
  return rest, found.verbosity


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
  name, workdir, rest = _given(argv)
  if name is None or workdir is None:
    flag = 'config' if name is None else 'workdir'
    raise ValueError(f'Expected --{flag}, got none; --help lists all flags.')
  config = config_files.load(name)
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
        'config', config, flag_values=values, sys_argv=rest
    )
    _, *more = values(rest)
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
  return Experiment(config, name, workdir, overrides)


def _given(argv: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
  """Returns --config, --workdir and the other words, 'blora' before them."""
  found = flags.FlagValues()
  for name in ('config', 'workdir'):
    flags.DEFINE_string(name, None, '', flag_values=found)
  rest = found(['blora', *argv], known_only=True)
  return found.config, found.workdir, rest


def train(argv: list[str]) -> None:
  """Trains one run of a config.

  A second call with the same workdir resumes, or prints the summary of a finished
  run. One process trains in a workdir at a time. SIGTERM and SIGINT (Ctrl-C) end a
  run after its next dispatch with a checkpoint.
  """
  if _is_help(argv):
    return _print_help('train', train, argv)
  config, _, workdir, _ = parse(argv)
  experiment.check_workdir(config, workdir)
  jax.config.update('jax_enable_x64', config.x64)
  program = experiment.make_program(config)
  print(reporting.table(experiment.selection(config, program.task)))
  print(
      f'{labels.name(config.to_dict())} on {config.task.name}:'
      f' {program.settings.num_steps} steps on {jax.devices()[0].device_kind}'
  )
  summary = experiment.train(config, workdir, program)
  print(
      reporting.table([{'result': k, 'value': v} for k, v in summary.items()])
  )


def sweep(argv: list[str]) -> None:
  """Trains every run of a config's sweep().

  Each run has a directory of its own below --workdir, named by its overrides; a
  second call skips the finished ones. Runs of a small task that differ in the
  seed, in prob or in the learning rate alone are trained in one compiled program,
  as many at a time as the device holds (--config.training.group_size=1: one after
  another). `blora report` makes the tables and figures.
  """
  if _is_help(argv):
    return _print_help('sweep', sweep, argv)
  config, name, workdir, overrides = parse(argv)
  directory.check(workdir)
  jax.config.update('jax_enable_x64', config.x64)
  name, _, variant = name.partition(':')
  grid = sweep_lib.load(str(config_files.find(name)), variant)
  sweep_lib.check_flags(grid, overrides)
  sweep_lib.train(config, grid, workdir, progress=config.training.progress)


def report(
    run_dirs: tuple[str, ...],
    /,
    figures: str = 'figures',
    style: Literal['simple', 'github', 'tsv'] = 'simple',
    csv: str = '',
    published: str = '',
    target: float = 0.9,
    metric: str = '',
    by: str = '',
) -> None:
  """Prints a table of finished runs and writes figures.

  Run directories may be given in any number, at any depth; a run given twice
  counts once. Runs that differ in the seed alone are one row and one curve, named by
  what varies among them; of several learning rates the one with the lowest mean
  validation loss is shown. A line below the tables counts diverged and unfinished
  runs. Runs with clients get a second table, what they sent until they reached
  --target, and figures against megabytes. `python launch/report.py` is the same.

  Args:
    run_dirs: directories of runs.
    figures: directory of the figures; '' for none.
    style: format of the table.
    csv: file for the numbers of the table.
    published: config with PUBLISHED figures to compare with, as mnist.
    target: validation accuracy that federated runs are to reach.
    metric: of the table; '' for what the task ends with.
    by: fields that tell rows apart, as method.name,method.rank; '' for all.
  """
  if not run_dirs:
    raise ValueError('Expected run directories, got none.')
  runs = reporting.load_runs(run_dirs)
  known = None
  if published:
    path = config_files.find(published)
    known = config_files.run_file(path).get('PUBLISHED')
    if known is None:
      raise ValueError(f'Expected PUBLISHED in {path}.')
  fields_by = by.split(',') if by else None
  chosen: dict[str, Any] = {'metric': metric or None, 'by': fields_by}
  shown = reporting.comparison(runs, known, **chosen)
  sent = reporting.traffic(runs, target, fields_by)
  for caption, rows in (*shown.items(), *sent.items()):
    print(f'{caption}\n')
    print(reporting.table(rows, style, is_even=True) + '\n')
  print(reporting.footer(runs, reporting.unfinished(run_dirs)))
  if csv:
    reporting.write_csv(csv, reporting.statistics(runs, known, **chosen))
  if figures:
    metrics = dict.fromkeys((*figures_lib.METRICS, metric or 'train_loss'))
    for written in figures_lib.write_figures(
        runs, figures, metrics=list(metrics), by=fields_by
    ):
      print(written)


def audit(argv: list[str]) -> None:
  """Audits a finished run: its constants, its assumptions, its bound."""
  from bernoulli_lora_jax.studies import commands

  _call('audit', commands.audit, argv)


def theory(argv: list[str]) -> None:
  """Predicts, measures, compares: what is proved, for your shapes and runs.

  Each prints its tables and what they say, and writes figures and CSV files to
  --figures.
  """
  from bernoulli_lora_jax.studies import commands

  jax.config.update('jax_enable_x64', True)  # Studies are in float64.
  names = 'bounds recommend audit rates nonsmooth ntk gap expressive'.split()
  # The number of runs may be left out.
  argv = [
      '--numpy=all' if word == '--numpy' and not _is_number(after) else word
      for word, after in zip(argv, [*argv[1:], ''], strict=False)
  ]
  if argv and not argv[0].startswith('-') and argv[0] not in names:
    raise ValueError(
        f'Expected a subcommand of {", ".join(names)}, got {argv[0]!r}.'
    )
  _call('theory', {name: getattr(commands, name) for name in names}, argv)


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    'train': train,
    'sweep': sweep,
    'report': lambda argv: _call('report', report, argv),
    'audit': audit,
    'theory': theory,
}


def _call(
    name: str,
    functions: Callable[..., None] | dict[str, Callable[..., None]],
    argv: list[str],
) -> None:
  """Calls a function, or the one that argv begins with, with flags by name."""
  import tyro  # Where the library is imported it is not needed.

  options: dict[str, Any] = {
      'prog': f'blora {name}',
      'use_underscores': True,
      'registry': _registry(),
      'config': (
          tyro.conf.OmitArgPrefixes,
          tyro.conf.FlagCreatePairsOff,
          tyro.conf.PositionalMetavarFromFieldName,
      ),
  }
  is_bare = isinstance(functions, dict) and not argv
  errors = io.StringIO()
  with contextlib.redirect_stderr(errors):
    try:
      if isinstance(functions, dict):
        run = tyro.extras.subcommand_cli_from_dict(
            {name: _later(f) for name, f in functions.items()},
            description=theory.__doc__,
            args=argv or ['--help'],
            **options,
        )
      else:
        run = tyro.cli(_later(functions), args=argv, **options)
    except SystemExit as e:
      if is_bare:
        raise SystemExit(2) from None
      if e.code:
        raise ValueError(_plain(errors.getvalue())) from None
      raise
  run()


def _later(f: Callable[..., None]) -> Callable[..., Any]:
  """Returns f as a function that is called without arguments, to parse first."""
  return functools.wraps(f)(lambda *args, **kwargs: lambda: f(*args, **kwargs))


def _plain(box: str) -> str:
  """Returns what a box of tyro says first, in a line."""
  lines = [line.strip('\u2502| ') for line in box.splitlines()[1:]]
  is_rule = lambda line: not line.strip('\u2500- ')
  said = itertools.dropwhile(is_rule, lines)  # After the title.
  said = itertools.takewhile(lambda line: not is_rule(line), said)
  return ' '.join(' '.join(said).split())


def _registry() -> Any:
  """Returns how tyro reads lists (with commas), shapes and whole numbers."""
  from tyro import constructors

  registry = constructors.ConstructorRegistry()

  @registry.primitive_rule
  def rule(info: Any) -> Any:
    if info.type is int:
      return spec('INT', _whole, str)
    kind = info.type
    if type(None) in typing.get_args(kind):  # Left out, or a list.
      (kind,) = (t for t in typing.get_args(kind) if t is not type(None))
    if kind in (int, float, str) and kind is not info.type:
      return spec(kind.__name__.upper(), _whole if kind is int else kind, str)
    if kind == list[tuple[int, int]]:
      told = lambda x: ','.join(f'{m}x{n}' for m, n in x)
      return spec('MxN,..', predict.parse_shapes, told)
    if typing.get_origin(kind) is not list:
      return None
    (kind,) = typing.get_args(kind)
    read = {int: _whole}.get(kind, kind)
    return spec(
        f'{kind.__name__.upper()},..',
        lambda text: [read(part) for part in text.split(',') if part],
        lambda x: ','.join(f'{y:g}' if kind is float else str(y) for y in x),
    )

  def spec(metavar: str, read: Any, told: Any) -> Any:
    return constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda args: read(args[0]),
        is_instance=lambda x: x is None
        or isinstance(x, (int, float, str, list)),
        str_from_instance=lambda x: ['None' if x is None else told(x)],
    )

  return registry


def _whole(text: str) -> int:
  """Returns a whole number, also where it is written as 1e4."""
  with contextlib.suppress(ValueError):
    return int(text)
  with contextlib.suppress(ValueError, OverflowError):
    if float(text).is_integer():
      return int(float(text))
  raise ValueError(f'Expected a whole number, got {text!r}.')


def _is_number(text: str) -> bool:
  try:
    return _whole(text) is not None
  except ValueError:
    return False


def _is_help(argv: Sequence[str]) -> bool:
  return any(word in _HELP for word in argv)


def _overview() -> str:
  """Returns the help of the command itself."""
  told = {**_COMMANDS, 'report': report}
  rows = [(name, _first_line(f.__doc__)) for name, f in told.items()]
  flag, text = _VERBOSITY
  return '\n'.join(
      [
          'usage: blora COMMAND [FLAGS]',
          '',
          'Low-rank adaptation that provably converges, in JAX.',
          '',
          *_columns(rows),
          '',
          'blora COMMAND --help lists the flags of a command.',
          '',
          *_columns([(flag, text), ('--version', 'the version')]),
      ]
  )


def _print_help(
    name: str, command: Callable[..., None], argv: Sequence[str]
) -> None:
  """Prints every flag of train or sweep; with --config that file's text, too."""
  config, path = base_config.get_config(), None
  chosen, _, _ = _given(argv)
  if chosen is not None:
    config = config_files.load(chosen)
    path = config_files.find(chosen.partition(':')[0])
  print(
      f'usage: blora {name} --config=NAME[:VARIANT] --workdir=DIR'
      ' [--config.FIELD=VALUE ...]\n'
  )
  print(inspect.getdoc(command))
  print(f'`python launch/{name}.py` is the same.\n')
  rows = [
      ('--config', 'a config that comes with the package, or a file of yours;'),
      ('', 'after a colon its variant, several with commas'),
      ('--workdir', 'directory of the run, made if need be'),
      _VERBOSITY,
  ]
  print(*_columns(rows), sep='\n')
  if path is None:
    print(f'\nConfigs (blora {name} --config=NAME --help lists the variants):')
    shipped = config_files.shipped().items()
    rows = [(k, _first_line(config_files.docstring(v))) for k, v in shipped]
    print(*_columns(rows), sep='\n')
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
      value = values[field.name]
      shown = str(value) if value != '' else "''"
      told.append((f'--config.{field.name}', shown, field.comment))
  print(*_columns(told), sep='\n')


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
  """Returns lines with the cells of rows aligned, the last one wrapped."""
  cells = [row for row in rows if len(row) > 1]
  widths = [
      max(map(len, column)) for column in list(zip(*cells, strict=True))[:-1]
  ]
  width = max(100, shutil.get_terminal_size().columns)
  lines = []
  for *first, last in rows:
    pairs = zip(first, widths, strict=False)
    begin = '  ' + ''.join(f'{cell:<{width}}  ' for cell, width in pairs)
    room = textwrap.TextWrapper(
        width,
        initial_indent=begin,
        subsequent_indent=' ' * len(begin),
        break_on_hyphens=False,
    )
    lines += room.wrap(last) or [begin.rstrip()] if first else [last]
  return lines


def _first_line(text: str | None) -> str:
  return (text or '').partition('\n')[0]
