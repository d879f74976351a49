"""The filter against matrices; numpy against jax."""

import jax
import numpy as np
import pytest

from experiments.tracking import motion

NOISE = motion.Noise(0.05, 0.02, 0.006, 0.1, 0.01)


def matrices(boxes, gaps):
  """The textbook filter by matrices, one coordinate at a time."""
  means, variances, innovations = [], [], []
  for i in range(4):
    size = np.exp(boxes[0, 2 + i]) if i < 2 else 1.0
    drift, speed = (
      (NOISE.position, NOISE.speed) if i < 2 else (NOISE.size, NOISE.growth)
    )
    mean = np.array([boxes[0, i], 0.0])
    cov = np.diag([(NOISE.measured * size) ** 2, (speed * size) ** 2])
    means.append(mean)
    variances.append(cov)
  for box, d in zip(boxes[1:], gaps[1:]):
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
      off = box[i] - means[i][0]
      row.append(off / np.sqrt(total))
      means[i] = means[i] + gain * off
      variances[i] = variances[i] - np.outer(gain, variances[i][0])
    innovations.append(row)
  return np.array(means), np.array(variances), np.array(innovations)


def walk(rng):
  boxes = np.array([300.0, 200, 3.4, 4.2]) + np.cumsum(
    rng.normal(size=(6, 4)) * (4, 1, 0.02, 0.02), axis=0
  )
  return boxes, np.array([0, 1, 1, 3, 1, 20.0])


def follow(boxes, gaps):
  none = boxes[0, :0]
  moved = motion.begin(boxes[0], none, NOISE)
  innovations = []
  for i in range(1, len(gaps)):
    moved = motion.predict(moved, gaps[i], NOISE)
    innovations.append(motion.innovations(moved, boxes[None, i], NOISE)[0][0])
    moved = motion.update(moved, boxes[i], none, NOISE)
  return moved, motion.namespace(boxes).stack(innovations)


@pytest.mark.parametrize('dtype', [np.float64, np.float32])
def test_the_filter_is_the_textbook_s(dtype):
  boxes, gaps = walk(np.random.default_rng(0))
  wanted = matrices(boxes, gaps)
  tolerance = {'rtol': 1e-9} if dtype == np.float64 else {'rtol': 2e-3}
  with jax.enable_x64(dtype == np.float64):
    compiled = jax.jit(follow)(boxes.astype(dtype), gaps.astype(dtype))
  for filtered, innovations in (
    follow(boxes.astype(dtype), gaps.astype(dtype)),
    jax.device_get(compiled),
  ):
    assert filtered.mean.dtype == dtype
    np.testing.assert_allclose(
      filtered.mean[:, 0], wanted[0][:, 0], **tolerance
    )
    np.testing.assert_allclose(
      filtered.variance, wanted[1].reshape(4, 4)[:, [0, 1, 3]], **tolerance
    )
    np.testing.assert_allclose(innovations, wanted[2], atol=2e-3, **tolerance)
    assert (filtered.gap, filtered.measurements) == (0, 6)


def test_float32_is_accurate_after_a_long_gap():
  """The variance shrinks by a factor of a million."""
  boxes = np.array([[300.0, 200, 3.4, 4.2], [320.0, 205, 3.5, 4.1]])
  exact, _ = follow(boxes, np.array([0.0, 90.0]))
  short, _ = follow(boxes.astype(np.float32), np.array([0, 90], np.float32))
  np.testing.assert_allclose(short.variance, exact.variance, rtol=1e-4)
  np.testing.assert_allclose(short.mean[:, 1], exact.mean[:, 1], rtol=1e-4)


def test_features_in_numpy_and_jax():
  rng = np.random.default_rng(1)
  initial = motion.begin(
    rng.normal(size=(3, 4)) + np.array([100, 100, 3, 4]),
    rng.normal(size=(3, 5)).astype(np.float32),
    NOISE,
  )
  initial = motion.Motion(*(np.asarray(x, np.float32) for x in initial))
  boxes = rng.normal(size=(3, 2, 4)) * (5, 5, 0.1, 0.1)
  boxes += initial.last_box[:, None]
  confidence, embedding = rng.random((3, 2)), rng.normal(size=(3, 2, 5))
  inputs = [x.astype(np.float32) for x in (boxes, confidence, embedding)]

  def both(initial, boxes, confidence, embedding):
    moved = motion.predict(initial, np.float32(4), NOISE)
    return motion.features(moved, boxes, confidence, embedding, NOISE)

  one = both(initial, *inputs)
  two = jax.jit(both)(initial, *inputs)
  assert one.shape == (3, 2, motion.FEATURES + 6)
  np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
  # At the prediction: no innovation, full overlap, and a cosine of 1.
  moved = motion.predict(initial, np.float32(4), NOISE)
  exact = motion.features(
    moved,
    moved.mean[:, None, :, 0],
    inputs[1][:, :1],
    initial.embedding_sum[:, None],
    NOISE,
  )
  np.testing.assert_allclose(exact[:, 0, :4], 0, atol=1e-6)
  np.testing.assert_allclose(exact[:, 0, 9], 1, rtol=1e-4)
  np.testing.assert_allclose(
    exact[:, 0, 15], np.linalg.norm(initial.embedding_sum, axis=1), rtol=1e-4
  )


def test_noise_is_fitted_by_likelihood():
  rng = np.random.default_rng(2)
  steps = 15
  true = motion.Noise(0.04, 0.03, 0.005, 0.1, 0.01)
  speed = rng.normal(size=(120, 1, 2)) * true.speed * 40
  drift = np.cumsum(rng.normal(size=(120, steps, 2)) * true.position * 40, 1)
  at = 300 + np.cumsum(speed + drift, axis=1)
  at += rng.normal(size=at.shape) * true.measured * 40
  size = np.log(40) + rng.normal(size=at.shape) * true.measured
  boxes = np.concatenate([at, size], axis=-1)
  gaps = np.ones((120, steps))
  gaps[:, 0] = 0
  gaps[::2, 10:] = 0  # Steps after the end do not count.
  boxes[::2, 10:] = 0
  fitted = motion.fit(boxes, gaps)
  assert fitted.measured == pytest.approx(0.04, rel=0.1)
  assert fitted.position == pytest.approx(0.03, rel=0.25)
  assert fitted.speed == pytest.approx(0.1, rel=0.25)


def test_columns_of_several_types_lose_nothing():
  """Confidences may be integers, or less precise than boxes."""
  none = np.zeros((2, 0))
  wanted = motion.first_features(np.ones(2), none, NOISE)
  for kind in (np.int64, np.float32):
    features = motion.first_features(np.ones(2, kind), none, NOISE)
    np.testing.assert_allclose(features, wanted, rtol=1e-6)
  initial = motion.begin(np.full((2, 4), 1.5), none, NOISE)
  initial = initial._replace(
    gap=np.zeros(2, np.int64), measurements=np.full(2, 1.5)
  )
  rows = motion.tracklet_features(initial, np.ones((2, 4)))
  np.testing.assert_allclose(rows[:, 3], np.log(2.5))
