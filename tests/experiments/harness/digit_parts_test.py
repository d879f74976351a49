"""Parts of the digits are disjoint; wrong labels are as many as told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness

SIZES = {'train': 2_000, 'validation': 1_000, 'selection': 500, 'test': 1_500}


class TestParts:
  def test_parts_are_disjoint_and_use_every_packaged_digit(self):
    parts, source = harness.load_digit_parts(None, SIZES)
    assert {name: len(p.labels) for name, p in parts.items()} == SIZES
    assert 'packaged' in source
    rows = np.concatenate([np.asarray(p.images) for p in parts.values()])
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert rows.min() == 0 and rows.max() == 1

  def test_classes_are_mixed(self):
    parts, _ = harness.load_digit_parts(None, SIZES)
    for part in parts.values():
      assert np.bincount(part.labels, minlength=10).min() > 20

  def test_too_many_digits_says_how_many_there_are(self):
    with pytest.raises(ValueError, match='5,001 images, but there are only'):
      harness.load_digit_parts(None, {'train': 5_000, 'test': 1})


class TestPollute:
  labels = jnp.arange(10_000) % 10

  def test_redraw_leaves_a_tenth_right(self):
    labels, dirty = harness.pollute_labels(
      jax.random.key(0), self.labels, fraction=0.5
    )
    assert int(dirty.sum()) == 5_000
    wrong = np.asarray(labels != self.labels)
    assert not wrong[~np.asarray(dirty)].any()
    # 4,500 expected, standard deviation 21.
    assert 4_400 < wrong.sum() < 4_600

  def test_exclude_leaves_none_right(self):
    labels, dirty = harness.pollute_labels(
      jax.random.key(0), self.labels, fraction=0.5, rule='exclude'
    )
    np.testing.assert_array_equal(labels != self.labels, dirty)
    assert set(np.unique(labels)) == set(range(10))

  def test_rate_thins_the_exposed(self):
    _, dirty = harness.pollute_labels(
      jax.random.key(0), self.labels, fraction=0.8, rate=0.25
    )
    # 2,000 expected, standard deviation 39.
    assert 1_850 < int(dirty.sum()) < 2_150

  def test_key_decides(self):
    one = harness.pollute_labels(jax.random.key(0), self.labels, fraction=0.5)
    two = harness.pollute_labels(jax.random.key(0), self.labels, fraction=0.5)
    other = harness.pollute_labels(jax.random.key(1), self.labels, fraction=0.5)
    np.testing.assert_array_equal(one[0], two[0])
    assert (one[0] != other[0]).any()
