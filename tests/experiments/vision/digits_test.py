"""Digits: idx files made here and the real ones, parts, wrong labels."""

import gzip
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness, vision

DATA_DIR = os.environ.get('BILEVEL_JAX_DATA')
SIZES = {'train': 2_000, 'validation': 1_000, 'selection': 500, 'test': 1_500}
NAMES = ('train-images', 'train-labels', 't10k-images', 't10k-labels')


def content(array):
  header = struct.pack(f'>I{array.ndim}I', 0x0800 + array.ndim, *array.shape)
  return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  image = lambda n: rng.integers(0, 256, (n, 28, 28), np.uint8)
  label = lambda n: rng.integers(0, 10, n, np.uint8)
  return [image(7), label(7), image(3), label(3)]


def write(folder, arrays, *, end='', separator='-'):
  folder.mkdir(parents=True, exist_ok=True)
  for name, array in zip(NAMES, arrays, strict=True):
    path = folder / f'{name}{separator}idx{array.ndim}-ubyte{end}'
    with (gzip.open if end else open)(path, 'wb') as file:
      file.write(content(array))


def load(folder, **changes):
  return vision.load_digits(
    folder, {'train': None, 'test': 1}, own_test=True, **changes
  )


class TestFiles:
  @pytest.mark.parametrize('end', ['', '.gz'])
  @pytest.mark.parametrize('separator', ['-', '.'])
  @pytest.mark.parametrize(
    'folder', ['', 'mnist', 'MNIST/raw', 'fashion-mnist']
  )
  def test_all_names_and_places(self, tmp_path, arrays, end, separator, folder):
    write(tmp_path / folder, arrays, end=end, separator=separator)
    parts, source = load(tmp_path)
    for one, other in zip(parts['test'], arrays[2:], strict=True):
      np.testing.assert_array_equal(one, other)
    found = sorted(map(bytes, parts['train'].images))
    assert found == sorted(map(bytes, arrays[0]))
    assert parts['train'].labels.dtype == np.int32
    assert source.name == 'unknown images'
    assert f'7 images in {tmp_path}, and its test file of 3' in source.words

  def test_the_digest_is_of_the_content(self, tmp_path, arrays):
    write(tmp_path / 'one', arrays)
    write(tmp_path / 'two', arrays, end='.gz')
    one, two = (load(tmp_path / name)[1].digest for name in ('one', 'two'))
    assert one == two
    arrays[1] = (arrays[1] + 1) % 10
    write(tmp_path / 'one', arrays)
    assert load(tmp_path / 'one')[1].digest != two

  @pytest.mark.parametrize(
    ('index', 'array', 'said'),
    [
      (0, lambda a: a[:, :14, :14], r'train-images.*7 x 14 x 14, not n x 28'),
      (0, lambda a: a[:, 0, 0], r'3 axes: its magic number is 0x801'),
      (1, lambda a: a[:3], r'7 images, .* 3 labels'),
      (3, lambda a: a + 10 * (np.arange(3) == 1), r't10k-labels.*, label 2: 1'),
    ],
  )
  def test_what_does_not_fit_is_named(
    self, tmp_path, arrays, index, array, said
  ):
    write(tmp_path, arrays)
    changed = array(arrays[index])
    kind = (3, 1)[index % 2]
    path = tmp_path / f'{NAMES[index]}-idx{kind}-ubyte'
    path.write_bytes(content(changed))
    with pytest.raises(harness.DamagedDataError, match=said):
      load(tmp_path)

  @pytest.mark.parametrize('given', [True, False])
  def test_missing_says_where_to_get_it(self, tmp_path, given):
    if not given:
      with pytest.raises(harness.MissingDataError, match='no --data_dir'):
        harness.find(None, ('a',), advice='nowhere')
      return
    with pytest.raises(FileNotFoundError) as error:
      load(tmp_path)
    message = str(error.value)
    for part in ('yann.lecun.com', 'dataset-fashion-mnist', str(tmp_path)):
      assert part in message

  def test_the_real_files(self):
    if not DATA_DIR:
      pytest.skip('BILEVEL_JAX_DATA names no folder with MNIST.')
    parts, source = load(DATA_DIR)
    assert parts['train'].images.shape == (60_000, 28, 28)
    assert parts['test'].labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert source.name == 'MNIST'
    assert vision.load_digits(DATA_DIR, SIZES)[1].name == 'MNIST'


class TestParts:
  def test_packaged_parts_are_disjoint_and_use_every_digit(self):
    parts, source = vision.load_digits(None, SIZES)
    assert {name: len(p.labels) for name, p in parts.items()} == SIZES
    assert source.name == 'packaged digits' and '5,000' in source.words
    images = np.concatenate([p.images for p in parts.values()])
    labels = np.concatenate([p.labels for p in parts.values()])
    assert (images.shape, images.dtype) == ((5_000, 28, 28), np.uint8)
    assert np.bincount(labels).tolist() == [500] * 10
    assert len(np.unique(images.reshape(5_000, -1), axis=0)) == 5_000
    assert not images[:, 0, 0].any()  # Rows and columns are not mixed up.
    for part in parts.values():
      assert np.bincount(part.labels, minlength=10).min() > 20
    pixels = parts['test'].pixels().images
    assert pixels.shape == (1_500, 784)
    assert (pixels.min(), pixels.max()) == (0, 1)

  def test_one_part_is_what_the_others_leave(self):
    parts, _ = vision.load_digits(None, {'train': None, 'test': 1_500})
    assert len(parts['train'].labels) == 3_500
    again, _ = vision.load_digits(None, {'train': 3_500, 'test': None})
    np.testing.assert_array_equal(parts['test'].images, again['test'].images)
    other, _ = vision.load_digits(None, {'test': None}, seed=1)
    assert (other['test'].labels[:1_500] != parts['test'].labels).any()

  def test_too_many_digits_says_how_many_there_are(self):
    with pytest.raises(ValueError, match='5,001 images, but there are only'):
      vision.load_digits(None, {'train': 5_000, 'rest': None, 'test': 1})


class TestPollute:
  labels = jnp.arange(10_000) % 10

  def test_redraw_leaves_a_tenth_right(self):
    labels, dirty = vision.pollute_labels(
      jax.random.key(0), self.labels, fraction=0.5
    )
    assert int(dirty.sum()) == 5_000
    wrong = np.asarray(labels != self.labels)
    assert not wrong[~np.asarray(dirty)].any()
    # 4,500 expected, standard deviation 21.
    assert 4_400 < wrong.sum() < 4_600

  def test_exclude_leaves_none_right(self):
    labels, dirty = vision.pollute_labels(
      jax.random.key(0), self.labels, fraction=0.5, rule='exclude'
    )
    np.testing.assert_array_equal(labels != self.labels, dirty)
    assert set(np.unique(labels)) == set(range(10))

  def test_rate_thins_the_exposed(self):
    _, dirty = vision.pollute_labels(
      jax.random.key(0), self.labels, fraction=0.8, rate=0.25
    )
    # 2,000 expected, standard deviation 39.
    assert 1_850 < int(dirty.sum()) < 2_150

  def test_key_decides(self):
    one = vision.pollute_labels(jax.random.key(0), self.labels, fraction=0.5)
    two = vision.pollute_labels(jax.random.key(0), self.labels, fraction=0.5)
    other = vision.pollute_labels(jax.random.key(1), self.labels, fraction=0.5)
    np.testing.assert_array_equal(one[0], two[0])
    assert (one[0] != other[0]).any()
