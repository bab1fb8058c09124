"""Files that appear whole or not at all, and are read with their name in the error."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import io
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any, IO
import zipfile

import numpy as np

Path = str | os.PathLike[str]


def write(path: Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
  """Writes a file that appears whole or not at all.

  Args:
    path: in a folder that is there.
    content: bytes, or what writes them to an open file.
  """
  path = pathlib.Path(path)
  scratch = tempfile.NamedTemporaryFile(
      dir=path.parent, prefix=f'.{path.name}.', delete=False
  )
  try:
    with scratch as f:  # A full disk is told of at its end.
      content(f) if callable(content) else f.write(content)
    os.chmod(scratch.name, 0o644)  # A temporary file is its owner's alone.
    os.replace(scratch.name, path)
  except BaseException as e:
    os.unlink(scratch.name)
    if isinstance(e, OSError) and e.errno and e.filename is None:
      e.filename = str(path)
    raise


def check_new(folder: Path) -> None:
  """Raises FileExistsError for what is there: nothing is ever overwritten."""
  folder = pathlib.Path(folder)
  if folder.exists() or folder.is_symlink():
    raise FileExistsError(
        f'Expected a folder that is not there yet, got {folder}: nothing is'
        ' overwritten.'
    )


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[pathlib.Path]:
  """Yields where to write what appears as a folder, whole or not at all.

  Args:
    folder: that is not there yet.

  Raises:
    FileExistsError: it is there.
  """
  folder = pathlib.Path(folder)
  check_new(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(
      tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent)
  )
  try:
    yield scratch
    os.chmod(scratch, 0o755)
    os.rename(scratch, folder)  # Fails where something has appeared there.
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise


def write_json(path: Path, value: Any) -> None:
  """Writes JSON, see `write`."""
  write(path, json.dumps(value, indent=2).encode() + b'\n')


def read_json(path: Path) -> Any:
  """Returns the value of a JSON file.

  Raises:
    ValueError: a file that is none, by name.
  """
  try:
    return json.loads(pathlib.Path(path).read_text())
  except ValueError as e:  # UnicodeDecodeError is one, too.
    raise ValueError(f'Expected JSON in {path}, got {e}.') from e


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes {name: array} as an npz file, see `write`; what is all zero takes no room.

  Numbers that are trained hardly get smaller, and slowly.
  """

  def save(file):
    with zipfile.ZipFile(file, 'w') as archive:
      for name, array in arrays.items():
        entry = zipfile.ZipInfo(f'{name}.npy')
        if not np.any(array):
          entry.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(entry, 'w', force_zip64=True) as f:
          np.lib.format.write_array(f, np.asanyarray(array), allow_pickle=False)

  write(path, save)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
  """Returns {name: array} of an npz file.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a damaged one, by name.
  """
  content = pathlib.Path(path).read_bytes()
  try:
    with np.load(io.BytesIO(content)) as stored:
      return dict(stored)
  except Exception as e:  # zipfile, zlib and NumPy each have their own.
    raise ValueError(f'Expected {path} to be a whole npz file: {e}.') from e
