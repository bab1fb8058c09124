"""What a study returns: tables, figures and plain statements."""

from collections.abc import Mapping, Sequence
import csv
import io
import pathlib
import tempfile
from typing import Any, NamedTuple

import matplotlib.figure

from bernoulli_lora_jax import files
from bernoulli_lora_jax.training import reporting

Table = Sequence[Mapping[str, Any]]


class Study(NamedTuple):
  """The result of a study, ready to be shown."""

  tables: Mapping[str, Table]  # {title: rows}
  figures: Mapping[str, matplotlib.figure.Figure]  # {file stem: figure}
  notes: Sequence[str] = ()  # What the numbers say, a sentence each.
  appendix: Mapping[str, Table] = {}  # Tables that are written, not printed.


def check_directory(directory: str | pathlib.Path) -> None:
  """Makes a directory, before the work whose results it is to hold.

  Raises:
    ValueError: it cannot be made, or not written to.
  """
  try:
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
      pass
  except OSError as e:
    raise ValueError(
        'Expected --figures to be a directory that can be written, got'
        f' {str(directory)!r}: {e.strerror}.'
    ) from e


def write(
    study: Study, directory: str | pathlib.Path, prefix: str
) -> list[pathlib.Path]:
  """Writes PREFIX_NAME.png and PREFIX_TITLE.csv, whole files; returns the paths.

  Args:
    study: the result.
    directory: made if it does not exist.
    prefix: begins every file's name.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  written = []
  for name, figure in study.figures.items():
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format='png')
    written.append(directory / f'{prefix}_{name}.png')
    files.write(written[-1], image.getvalue())
  for title, rows in {**study.tables, **study.appendix}.items():
    text = io.StringIO()
    fields = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    stem = '_'.join(''.join(c if c.isalnum() else ' ' for c in title).split())
    written.append(directory / f'{prefix}_{stem.lower()}.csv')
    files.write(written[-1], text.getvalue().encode())
  return written


def show(
    study: Study,
    directory: str | pathlib.Path,
    prefix: str,
    style: str = 'simple',
) -> None:
  """Prints tables and notes, writes the files and prints their paths."""
  for title, rows in study.tables.items():
    print(f'\n{title}\n{reporting.table(rows, style)}')
  print()
  for note in study.notes:
    print(f'- {note}')
  for path in write(study, directory, prefix) if directory else []:
    print(path)
