"""What a study returns: tables, figures and plain statements."""

from collections.abc import Mapping, Sequence
import csv
import pathlib
from typing import Any, NamedTuple

import matplotlib.figure

from bernoulli_lora_jax.training import reporting


class Study(NamedTuple):
  """The result of a study, ready to be shown."""

  tables: Mapping[str, Sequence[Mapping[str, Any]]]  # {title: rows}
  figures: Mapping[str, matplotlib.figure.Figure]  # {file stem: figure}
  notes: Sequence[str] = ()  # What the numbers say, a sentence each.


def write(
    study: Study, directory: str | pathlib.Path, prefix: str
) -> list[pathlib.Path]:
  """Writes PREFIX_NAME.png and PREFIX_TITLE.csv; returns the paths.

  Args:
    study: the result.
    directory: made if it does not exist.
    prefix: begins every file's name.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  written = []
  for name, figure in study.figures.items():
    path = directory / f'{prefix}_{name}.png'
    figure.savefig(path, dpi=130)
    written.append(path)
  for title, rows in study.tables.items():
    stem = '_'.join(''.join(c if c.isalnum() else ' ' for c in title).split())
    path = directory / f'{prefix}_{stem.lower()}.csv'
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, 'w', newline='') as f:
      writer = csv.DictWriter(f, fields)
      writer.writeheader()
      writer.writerows(rows)
    written.append(path)
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
