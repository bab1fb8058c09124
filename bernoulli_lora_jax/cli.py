"""The command `blora`: train, sweep, report, finetune, merge, export, and more.

Without an installation `python -m bernoulli_lora_jax` and `launch/*.py` are the
same. A user's error is one line on stderr and the exit status 1.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import logging as python_logging
import sys
import traceback
from typing import Any, Literal
import warnings

from absl import flags
from absl import logging
import jax

import bernoulli_lora_jax
from bernoulli_lora_jax import flags_of_configs
from bernoulli_lora_jax import flags_of_functions
from bernoulli_lora_jax.training import config_files
from bernoulli_lora_jax.training import directory
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import figures as figures_lib
from bernoulli_lora_jax.training import labels
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import sweep as sweep_lib

_HELP = ('-h', '-help', '--help')


def main(argv: Sequence[str] | None = None) -> None:
  """Runs a command line.

  Args:
    argv: the words after `blora`; None for those of the process.

  Raises:
    SystemExit: where it ends otherwise than well, or with a help.
  """
  with guarded(list(sys.argv[1:] if argv is None else argv)) as words:
    if words[:1] == ['--version']:
      print(f'blora {bernoulli_lora_jax.__version__}')
    elif not words or words[0] in _HELP:
      print(_overview())
      raise SystemExit(0 if words else 2)
    elif words[0] not in _COMMANDS:
      raise ValueError(
          f'Expected a command of {", ".join(_COMMANDS)}, got {words[0]!r}.'
      )
    else:
      _COMMANDS[words[0]](words[1:])


@contextlib.contextmanager
def guarded(argv: list[str]) -> Iterator[list[str]]:
  """Yields argv without --verbosity; exits 1 with one line on a user's error."""
  verbosity = logging.WARNING  # Orbax speaks at INFO.
  try:
    given, argv = flags_of_configs.take(argv, {'verbosity': verbosity})
    verbosity = given.verbosity
    logging.set_verbosity(verbosity)
    if verbosity > logging.WARNING:
      logging.use_absl_handler()
    if verbosity < logging.DEBUG:  # Of tasks whose errors orbax raises, too.
      python_logging.getLogger('asyncio').setLevel(python_logging.CRITICAL)
    with warnings.catch_warnings():
      warnings.showwarning = _show_warning
      yield argv
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


def _show_warning(message: Any, *unused: Any, **also_unused: Any) -> None:
  """Prints a warning in one line, without the place in the code."""
  print(f'Warning: {config_files.one_line(message)}', file=sys.stderr)


def train(argv: list[str]) -> None:
  """Trains one run of a config.

  A second call with the same workdir resumes, or prints the summary of a finished
  run. One process trains in a workdir at a time. SIGTERM and SIGINT (Ctrl-C) end a
  run after its next dispatch with a checkpoint.
  """
  if not set(argv).isdisjoint(_HELP):
    return flags_of_configs.print_help(train, argv)
  config, _, workdir, _ = flags_of_configs.parse(argv)
  experiment.check_workdir(config, workdir)
  jax.config.update('jax_enable_x64', config.x64)
  program = experiment.make_program(config)
  if program.task.preview:
    print(program.task.preview)
  print(reporting.table(experiment.selection(config, program.task)))
  print(
      f'{labels.name(config.to_dict())} on {config.task.name}:'
      f' {program.settings.num_steps} steps on {jax.devices()[0].device_kind}'
  )
  summary = loop.train(*experiment.run_of(config, workdir, program))
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
  if not set(argv).isdisjoint(_HELP):
    return flags_of_configs.print_help(sweep, argv)
  config, name, workdir, overrides = flags_of_configs.parse(argv)
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


def evaluate(
    run_dirs: tuple[str, ...],
    /,
    data: str,
    name: str = '',
    unseen: Literal['', 'error', 'count'] = '',
    style: Literal['simple', 'github', 'tsv'] = 'simple',
) -> None:
  """Evaluates finished runs of text_classification on other data.

  The weights are those of the lowest validation loss, labels those of training. With
  --name=held_out the metrics join the summaries: `blora report
  --metric=held_out_accuracy` has their means. Runs of a sweep have weights with
  --config.training.keep_weights=True.

  Args:
    run_dirs: directories of runs, at any depth.
    data: a file, a folder or a dataset, read as the test data were.
    name: of the metrics in summaries; '' to print them alone.
    unseen: what becomes of labels that training has not; '' as in training.
    style: format of the table.
  """
  from bernoulli_lora_jax.training import evaluated

  if not run_dirs:
    raise ValueError('Expected run directories, got none.')
  kwargs = {'unseen': unseen} if unseen else {}
  rows = evaluated.evaluate(run_dirs, data, name=name, **kwargs)
  print(reporting.table(rows, style, is_even=True))


def finetune(argv: list[str]) -> None:
  """Fine-tunes a checkpoint on a file: one command to merged weights, an adapter."""
  from bernoulli_lora_jax.training import finetune as finetune_lib

  flags_of_functions.call('finetune', finetune_lib.finetune, argv, dashes=True)


def merge(argv: list[str]) -> None:
  """Writes merged weights, of a run or of a checkpoint and adapters of PEFT."""
  _served('merge', argv)


def export(argv: list[str]) -> None:
  """Writes what a run has changed as an adapter, or its merged weights."""
  _served('export', argv)


def generate(argv: list[str]) -> None:
  """Prints what a model, or a run, says."""
  _served('generate', argv)


def _served(name: str, argv: list[str]) -> None:
  from bernoulli_lora_jax.training import served

  flags_of_functions.call(name, getattr(served, name), argv, dashes=True)


def audit(argv: list[str]) -> None:
  """Audits a finished run: its constants, its assumptions, its bound."""
  from bernoulli_lora_jax.studies import commands

  flags_of_functions.call('audit', commands.audit, argv)


def theory(argv: list[str]) -> None:
  """Predicts, measures, compares: what is proved, for your shapes and runs.

  Each prints its tables and what they say, and writes figures and CSV files to
  --figures.
  """
  from bernoulli_lora_jax.studies import commands

  jax.config.update('jax_enable_x64', True)  # Studies are in float64.
  names = 'bounds recommend audit rates nonsmooth ntk gap expressive'.split()
  functions = {name: getattr(commands, name) for name in names}
  flags_of_functions.call('theory', functions, argv, theory.__doc__)


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    'train': train,
    'sweep': sweep,
    'report': lambda argv: flags_of_functions.call('report', report, argv),
    'evaluate': lambda argv: flags_of_functions.call(
        'evaluate', evaluate, argv
    ),
    'audit': audit,
    'finetune': finetune,
    'merge': merge,
    'export': export,
    'generate': generate,
    'theory': theory,
}


def _overview() -> str:
  """Returns the help of the command itself."""
  told = {**_COMMANDS, 'report': report, 'evaluate': evaluate}
  first_line = lambda f: (f.__doc__ or '').partition('\n')[0]
  rows = [(name, first_line(f)) for name, f in told.items()]
  columns = flags_of_configs.columns
  return f"""usage: blora COMMAND [FLAGS]

Low-rank adaptation that provably converges, in JAX.

{columns(rows)}

blora COMMAND --help lists the flags of a command.

{columns([flags_of_configs.VERBOSITY, ('--version', 'the version')])}"""
