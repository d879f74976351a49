"""Tests stored arrays: loaded for equal inputs, computed otherwise."""

import numpy as np
import pytest

from experiments.lm import array_cache


def ask(folder, tree, value, text='', count=3):
  return array_cache.load_or_compute(
    folder,
    'trunk',
    text,
    tree,
    lambda: {'x': np.float32(value)},
    names=['x'],
    count=count,
  )


def test_arrays_are_made_once_for_what_they_depend_on(tmp_path):
  folder = tmp_path / 'arrays'
  tree = {'weights': np.arange(4.0), 'tokens': np.arange(6).reshape(3, 2)}
  ask(folder, tree, [1, 2, 3])
  # What is read is what the file holds: nothing is made.
  np.testing.assert_array_equal(ask(folder, tree, [0, 0, 0])['x'], [1, 2, 3])
  # One weight, one token, the order, the dtype, or the text: other files.
  weight = tree | {'weights': np.array([0, 1, 2.5, 3])}
  token = tree | {'tokens': np.array([[0, 1], [2, 3], [4, 6]])}
  order = tree | {'tokens': tree['tokens'][::-1]}
  dtype = tree | {'tokens': tree['tokens'].astype(np.int16)}
  for i, other in enumerate((weight, token, order, dtype)):
    arrays = ask(folder, other, [i, i, i])
    np.testing.assert_array_equal(arrays['x'], [i, i, i])
  np.testing.assert_array_equal(ask(folder, tree, [9, 9, 9], 'b')['x'], 3 * [9])
  assert len(list(folder.iterdir())) == 6
  np.testing.assert_array_equal(ask(folder, tree, [0, 0, 0])['x'], [1, 2, 3])
  np.testing.assert_array_equal(ask(None, tree, [0, 5, 0])['x'], [0, 5, 0])


@pytest.mark.parametrize('how', ['cut', 'changed', 'empty', 'other'])
def test_a_damaged_file_is_made_anew(tmp_path, how):
  tree, full = {'tokens': np.arange(3)}, np.float32([-3, -4, -5])
  ask(tmp_path, tree, full)
  (path,) = tmp_path.iterdir()
  raw = path.read_bytes()
  at = raw.index(full.tobytes())
  bad = {
    'cut': raw[: len(raw) // 2],
    'changed': raw[:at] + b'\x01' + raw[at + 1 :],
    'empty': b'',
  }
  if how == 'other':
    np.savez(path, x=np.float32([1]))
  else:
    path.write_bytes(bad[how])
  with pytest.warns(RuntimeWarning, match=r'is damaged; .* moved to'):
    arrays = ask(tmp_path, tree, full)
  np.testing.assert_array_equal(arrays['x'], full)
  assert (tmp_path / 'damaged' / path.name).exists()
  np.testing.assert_array_equal(ask(tmp_path, tree, [0, 0, 0])['x'], full)
