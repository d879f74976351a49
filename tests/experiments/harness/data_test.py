"""Tests of the loader of idx files, on files made here and on the real ones."""

import gzip
import os
import struct

import numpy as np
import pytest

from experiments import harness

DATA_DIR = os.environ.get('BILEVEL_JAX_DATA')


def content(array):
  header = struct.pack(f'>I{array.ndim}I', 0x0800 + array.ndim, *array.shape)
  return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def digits():
  rng = np.random.default_rng(0)
  image = lambda n: rng.integers(0, 256, (n, 28, 28), np.uint8)
  label = lambda n: rng.integers(0, 10, n, np.int32)
  return harness.Digits(image(7), label(7), image(3), label(3))


def write(folder, digits, *, end='', separator='-'):
  folder.mkdir(parents=True, exist_ok=True)
  names = ('train-images', 'train-labels', 't10k-images', 't10k-labels')
  for name, array in zip(names, digits, strict=True):
    path = folder / f'{name}{separator}idx{array.ndim}-ubyte{end}'
    opener = gzip.open if end else open
    with opener(path, 'wb') as file:
      file.write(content(array))


class TestRead:
  @pytest.mark.parametrize('end', ['', '.gz'])
  @pytest.mark.parametrize('separator', ['-', '.'])
  @pytest.mark.parametrize(
    'folder', ['', 'mnist', 'MNIST/raw', 'fashion-mnist']
  )
  def test_all_names_and_places(self, tmp_path, digits, end, separator, folder):
    write(tmp_path / folder, digits, end=end, separator=separator)
    found = harness.load_idx_dataset(tmp_path)
    for one, other in zip(found, digits, strict=True):
      np.testing.assert_array_equal(one, other, strict=True)
    found.train_images[0] = 0  # Writable: not a view of the file.

  def test_a_gzipped_file_cut_short(self, tmp_path, digits):
    write(tmp_path, digits, end='.gz')
    path = tmp_path / 'train-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
      harness.DamagedDataError, match=f'{path} is damaged or cut'
    ):
      harness.load_idx_dataset(tmp_path)

  @pytest.mark.parametrize('junk', [b'', b'<html>not found</html>'])
  def test_a_file_that_is_not_gzipped(self, tmp_path, digits, junk):
    write(tmp_path, digits, end='.gz')
    path = tmp_path / 't10k-labels-idx1-ubyte.gz'
    path.write_bytes(junk)
    with pytest.raises(ValueError, match=str(path)):
      harness.load_idx_dataset(tmp_path)

  @pytest.mark.parametrize(
    'change', [slice(0, -1), slice(1, None), slice(0, 3)]
  )
  def test_a_plain_file_of_a_wrong_size_or_magic(
    self, tmp_path, digits, change
  ):
    write(tmp_path, digits)
    path = tmp_path / 'train-labels-idx1-ubyte'
    path.write_bytes(path.read_bytes()[change])
    with pytest.raises(ValueError, match=str(path)):
      harness.load_idx_dataset(tmp_path)

  def test_labels_in_the_place_of_images(self, tmp_path, digits):
    write(tmp_path, digits)
    (tmp_path / 'train-images-idx3-ubyte').write_bytes(
      content(digits.train_labels)
    )
    with pytest.raises(ValueError, match='3 axes: its magic number is 0x801'):
      harness.load_idx_dataset(tmp_path)

  def test_images_without_as_many_labels(self, tmp_path, digits):
    write(tmp_path, digits._replace(train_labels=digits.test_labels))
    with pytest.raises(ValueError, match=r'7 images, .* 3 labels'):
      harness.load_idx_dataset(tmp_path)

  @pytest.mark.parametrize('given', [True, False])
  def test_missing_says_where_to_get_it(self, tmp_path, given):
    with pytest.raises(FileNotFoundError) as error:
      harness.load_idx_dataset(tmp_path if given else None)
    message = str(error.value)
    for part in ('yann.lecun.com', 'dataset-fashion-mnist', '5,000 digits'):
      assert part in message
    assert (str(tmp_path) in message) == given

  def test_the_real_files(self):
    try:
      digits = harness.load_idx_dataset(DATA_DIR)
    except FileNotFoundError as error:
      pytest.skip(str(error))
    assert digits.train_images.shape == (60_000, 28, 28)
    assert digits.test_labels.shape == (10_000,)
    assert digits.train_labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_packaged_digits():
  images, labels = harness.packaged_digits()
  assert (images.shape, images.dtype) == ((5000, 28, 28), np.uint8)
  assert labels.dtype == np.int32
  assert np.bincount(labels).tolist() == [500] * 10
  assert images.max() == 255
  assert not images[:, 0, 0].any()  # Rows and columns are not mixed up.
