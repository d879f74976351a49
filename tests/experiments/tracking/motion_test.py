"""The filter against matrices; numpy and jax alike."""

import jax
import numpy as np
import pytest

from experiments.tracking import motion

NOISE = motion.Noise(0.05, 0.02, 0.006, 0.1, 0.01)


def matrices(places, gaps):
  """One coordinate at a time, by the textbook's matrices."""
  means, variances, offs = [], [], []
  for i in range(4):
    size = np.exp(places[0, 2 + i]) if i < 2 else 1.0
    drift, speed = (
      (NOISE.position, NOISE.speed) if i < 2 else (NOISE.size, NOISE.growth)
    )
    mean = np.array([places[0, i], 0.0])
    cov = np.diag([(NOISE.measured * size) ** 2, (speed * size) ** 2])
    means.append(mean)
    variances.append(cov)
  for place, d in zip(places[1:], gaps[1:]):
    sizes = np.array([np.exp(means[2][0]), np.exp(means[3][0]), 1.0, 1.0])
    row = []
    step = np.array([[1, d], [0, 1]])
    for i in range(4):
      drift = (NOISE.position if i < 2 else NOISE.size) * sizes[i]
      noise = drift**2 * np.array([[d**3 / 3, d**2 / 2], [d**2 / 2, d]])
      means[i] = step @ means[i]
      variances[i] = step @ variances[i] @ step.T + noise
    sizes = np.array([np.exp(means[2][0]), np.exp(means[3][0]), 1.0, 1.0])
    for i in range(4):
      total = variances[i][0, 0] + (NOISE.measured * sizes[i]) ** 2
      gain = variances[i][:, 0] / total
      off = place[i] - means[i][0]
      row.append(off / np.sqrt(total))
      means[i] = means[i] + gain * off
      variances[i] = variances[i] - np.outer(gain, variances[i][0])
    offs.append(row)
  return np.array(means), np.array(variances), np.array(offs)


def walk(rng):
  places = np.array([300.0, 200, 3.4, 4.2]) + np.cumsum(
    rng.normal(size=(6, 4)) * (4, 1, 0.02, 0.02), axis=0
  )
  return places, np.array([0, 1, 1, 3, 1, 20.0])


def follow(places, gaps):
  none = places[0, :0]
  moved = motion.begin(places[0], none, NOISE)
  offs = []
  for i in range(1, len(gaps)):
    moved = motion.predict(moved, gaps[i], NOISE)
    offs.append(motion.innovations(moved, places[None, i], NOISE)[0][0])
    moved = motion.update(moved, places[i], none, NOISE)
  return moved, motion.namespace(places).stack(offs)


@pytest.mark.parametrize('dtype', [np.float64, np.float32])
def test_the_filter_is_the_textbook_s(dtype):
  places, gaps = walk(np.random.default_rng(0))
  wanted = matrices(places, gaps)
  tolerance = {'rtol': 1e-9} if dtype == np.float64 else {'rtol': 2e-3}
  with jax.enable_x64(dtype == np.float64):
    compiled = jax.jit(follow)(places.astype(dtype), gaps.astype(dtype))
  for found, offs in (
    follow(places.astype(dtype), gaps.astype(dtype)),
    jax.device_get(compiled),
  ):
    assert found.mean.dtype == dtype
    np.testing.assert_allclose(found.mean[:, 0], wanted[0][:, 0], **tolerance)
    np.testing.assert_allclose(
      found.variance, wanted[1].reshape(4, 4)[:, [0, 1, 3]], **tolerance
    )
    np.testing.assert_allclose(offs, wanted[2], atol=2e-3, **tolerance)
    assert (found.gap, found.seen) == (0, 6)


def test_what_is_seen_again_after_long_is_as_sure_in_float32():
  """A variance of before is a million times what is left."""
  places = np.array([[300.0, 200, 3.4, 4.2], [320.0, 205, 3.5, 4.1]])
  exact, _ = follow(places, np.array([0.0, 90.0]))
  short, _ = follow(places.astype(np.float32), np.array([0, 90], np.float32))
  np.testing.assert_allclose(short.variance, exact.variance, rtol=1e-4)
  np.testing.assert_allclose(short.mean[:, 1], exact.mean[:, 1], rtol=1e-4)


def test_features_in_numpy_and_jax():
  rng = np.random.default_rng(1)
  begun = motion.begin(
    rng.normal(size=(3, 4)) + np.array([100, 100, 3, 4]),
    rng.normal(size=(3, 5)).astype(np.float32),
    NOISE,
  )
  begun = motion.Motion(*(np.asarray(x, np.float32) for x in begun))
  places = begun.place[:, None] + rng.normal(size=(3, 2, 4)) * (5, 5, 0.1, 0.1)
  sure, looks = rng.random((3, 2)), rng.normal(size=(3, 2, 5))
  given = [x.astype(np.float32) for x in (places, sure, looks)]

  def both(begun, places, sure, looks):
    moved = motion.predict(begun, np.float32(4), NOISE)
    return motion.features(moved, places, sure, looks, NOISE)

  one = both(begun, *given)
  two = jax.jit(both)(begun, *given)
  assert one.shape == (3, 2, motion.FEATURES + 6)
  np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
  # Where it should be: no innovation, full overlap, and the cosine is one.
  moved = motion.predict(begun, np.float32(4), NOISE)
  exact = motion.features(
    moved,
    moved.mean[:, None, :, 0],
    given[1][:, :1],
    begun.look[:, None],
    NOISE,
  )
  np.testing.assert_allclose(exact[:, 0, :4], 0, atol=1e-6)
  np.testing.assert_allclose(exact[:, 0, 9], 1, rtol=1e-4)
  np.testing.assert_allclose(
    exact[:, 0, 15], np.linalg.norm(begun.look, axis=1), rtol=1e-4
  )


def test_noise_is_found_by_likelihood():
  rng = np.random.default_rng(2)
  steps = 15
  true = motion.Noise(0.04, 0.03, 0.005, 0.1, 0.01)
  speed = rng.normal(size=(120, 1, 2)) * true.speed * 40
  drift = np.cumsum(rng.normal(size=(120, steps, 2)) * true.position * 40, 1)
  at = 300 + np.cumsum(speed + drift, axis=1)
  at += rng.normal(size=at.shape) * true.measured * 40
  size = np.log(40) + rng.normal(size=at.shape) * true.measured
  places = np.concatenate([at, size], axis=-1)
  gaps = np.ones((120, steps))
  gaps[:, 0] = 0
  gaps[::2, 10:] = 0  # What is behind the end does not count.
  places[::2, 10:] = 0
  found = motion.fit(places, gaps)
  assert found.measured == pytest.approx(0.04, rel=0.1)
  assert found.position == pytest.approx(0.03, rel=0.25)
  assert found.speed == pytest.approx(0.1, rel=0.25)


def test_columns_of_several_types_lose_nothing():
  """A confidence may be a whole number, and less precise than the places."""
  none = np.zeros((2, 0))
  wanted = motion.at_first(np.ones(2), none, NOISE)
  for kind in (np.int64, np.float32):
    found = motion.at_first(np.ones(2, kind), none, NOISE)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
  begun = motion.begin(np.full((2, 4), 1.5), none, NOISE)
  begun = begun._replace(gap=np.zeros(2, np.int64), seen=np.full(2, 1.5))
  rows = motion.of_rows(begun, np.ones((2, 4)))
  np.testing.assert_allclose(rows[:, 3], np.log(2.5))
