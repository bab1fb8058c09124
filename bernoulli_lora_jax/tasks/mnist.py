"""MNIST from IDX files, gzipped or not, or from OpenML (X2).

Files are looked for in `data_dir`, else in `$BERNOULLI_LORA_DATA`, there or in
a folder `mnist` inside; where neither is set, OpenML is asked.
"""

import gzip
import math
import os
import pathlib
import struct
import zlib

import numpy as np

from bernoulli_lora_jax.tasks import classification

_FILES = {
    'train_x': 'train-images-idx3-ubyte',
    'train_y': 'train-labels-idx1-ubyte',
    'test_x': 't10k-images-idx3-ubyte',
    'test_y': 't10k-labels-idx1-ubyte',
}
_MEAN, _STD = 0.1307, 0.3081  # Of the training pixels, as X2 normalises.


def load(
    data_dir: str | None, seed: int, num_validation: int = 5000
) -> classification.Images:
  """Returns MNIST, the training part split at random before any selection.

  Args:
    data_dir: folder of the IDX files; None or '' for `$BERNOULLI_LORA_DATA`.
    seed: of the split.
    num_validation: examples taken from the 60,000 for validation.

  Returns:
    `Images` of 784 normalised pixels.

  Raises:
    FileNotFoundError: no files and no OpenML, with how to get them.
    ValueError: a truncated or foreign file, by name.
  """
  folder = _find_folder(data_dir)
  arrays = (
      _from_openml()
      if folder is None
      else {
          name: read_idx(_find_file(folder, file))
          for name, file in _FILES.items()
      }
  )
  _check_shapes(arrays, folder, num_validation)
  scale = lambda x: (
      (x.reshape(len(x), -1) / np.float32(255) - np.float32(_MEAN))
      / np.float32(_STD)
  )
  x, y = scale(arrays['train_x']), arrays['train_y'].astype(np.int64)
  order = np.random.default_rng(seed).permutation(len(y))
  train, validation = order[num_validation:], order[:num_validation]
  return classification.Images(
      splits={
          'train': (x[train], y[train]),
          'validation': (x[validation], y[validation]),
          'test': (
              scale(arrays['test_x']),
              arrays['test_y'].astype(np.int64),
          ),
      },
      num_classes=10,
  )


def _check_shapes(
    arrays: dict[str, np.ndarray],
    folder: pathlib.Path | None,
    num_validation: int,
) -> None:
  """Raises ValueError for files that do not fit each other."""
  shapes = {name: array.shape for name, array in arrays.items()}
  size = math.prod(shapes['train_x'][1:])
  for split, least in (('train', num_validation + 1), ('test', 1)):
    x, y = shapes[f'{split}_x'], shapes[f'{split}_y']
    if (
        len(x) < 2
        or math.prod(x[1:]) != size
        or y != x[:1]
        or len(arrays[f'{split}_y']) < least
        or arrays[f'{split}_y'].max() > 9
    ):
      raise ValueError(
          f'Expected {least} or more images of {size} pixels with one label in'
          f' 0..9 each in {_FILES[f"{split}_x"]} and {_FILES[f"{split}_y"]} of'
          f' {folder}, got shapes {x} and {y}.'
      )


def read_idx(path: pathlib.Path) -> np.ndarray:
  """Returns the array of an IDX file of unsigned bytes, gzipped or not.

  Args:
    path: the file.

  Returns:
    uint8 array of the shape that the header states.

  Raises:
    ValueError: not an IDX file of bytes, or fewer or more bytes than stated.
  """
  raw = path.read_bytes()
  if raw[:2] == b'\x1f\x8b':
    try:
      raw = gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as e:
      raise ValueError(f'Expected {path} to be a whole gzip file: {e}.') from e
  if len(raw) < 4 or raw[:3] != b'\x00\x00\x08':
    raise ValueError(
        f'Expected {path} to begin with the IDX header 00 00 08, got'
        f' {raw[:3].hex(" ") or "an empty file"}.'
    )
  start = 4 + 4 * raw[3]
  shape = struct.unpack(f'>{raw[3]}I', raw[4:start].ljust(start - 4, b'\0'))
  if len(raw) - start != math.prod(shape):
    raise ValueError(
        f'Expected {math.prod(shape)} bytes for shape {shape} in {path}, got'
        f' {max(0, len(raw) - start)}: the file is truncated or damaged.'
    )
  return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _find_folder(data_dir: str | None) -> pathlib.Path | None:
  base = data_dir or os.environ.get('BERNOULLI_LORA_DATA')
  if not base:
    return None
  for folder in (pathlib.Path(base), pathlib.Path(base, 'mnist')):
    if any(folder.glob(_FILES['train_x'] + '*')):
      return folder
  if data_dir:
    raise FileNotFoundError(
        f'Expected the MNIST files in task.data_dir={data_dir!r}, for example'
        f' {_FILES["train_x"]}.gz; found none there or in its folder mnist.'
    )
  return None


def _find_file(folder: pathlib.Path, name: str) -> pathlib.Path:
  for path in (folder / f'{name}.gz', folder / name):
    if path.exists():
      return path
  raise FileNotFoundError(f'Expected {name}.gz or {name} in {folder}.')


def _from_openml() -> dict[str, np.ndarray]:
  try:
    from sklearn import datasets  # Takes seconds.

    x, y = datasets.fetch_openml(
        'mnist_784', version=1, return_X_y=True, as_frame=False
    )
  except Exception as e:
    raise FileNotFoundError(
        'MNIST was not found: put the four IDX files (train-images-idx3-ubyte'
        '[.gz], train-labels-idx1-ubyte, t10k-images-idx3-ubyte,'
        ' t10k-labels-idx1-ubyte) in a folder and name it by task.data_dir or'
        f' $BERNOULLI_LORA_DATA. Asking OpenML failed: {e}'
    ) from e
  x, y = np.asarray(x, np.uint8), np.asarray(y).astype(np.uint8)
  return {
      'train_x': x[:60000],
      'train_y': y[:60000],
      'test_x': x[60000:],
      'test_y': y[60000:],
  }
