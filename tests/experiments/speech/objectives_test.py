"""Tests losses against enumeration and plain NumPy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.speech import objectives

info_nce = jax.jit(
  objectives.info_nce, static_argnames=('negatives', 'temperature')
)


def _said(path):
  merged = [a for a, _ in itertools.groupby(path)]
  return [a for a in merged if a]


def _enumerated(logits, labels):
  """Minus the logarithm of the sum over all paths that say the labels."""
  scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  total = 0.0
  for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
    if _said(path) == list(labels):
      total += math.exp(sum(scores[t, a] for t, a in enumerate(path)))
  return -math.log(total)


@pytest.mark.parametrize('wide', [False, True])
def test_ctc_is_the_sum_over_paths(wide):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 5, 3))
  labels = np.array([[1, 1, 2], [2, 0, 0]])
  expected = (
    _enumerated(logits[0], [1, 1, 2]) / 3 + _enumerated(logits[1, :3], [2])
  ) / 2
  with jax.enable_x64(wide):
    loss = jax.jit(
      lambda x: objectives.ctc(x, np.array([5, 3]), labels, np.array([3, 1]))
    )
    result = loss(jnp.asarray(logits, float))
  np.testing.assert_allclose(result, expected, rtol=1e-9 if wide else 1e-5)


def test_a_coin_has_the_logarithm_of_the_choices():
  frames = jnp.ones((12, 4))
  every = jnp.ones((1, 12), bool)
  result = info_nce(
    jax.random.key(0),
    frames,
    frames,
    every[0],
    every,
    negatives=5,
    temperature=0.1,
  )
  np.testing.assert_allclose(result, math.log(6), rtol=1e-5)


def test_info_nce_is_the_plain_one():
  """With one other candidate, what is drawn is known."""
  rng = np.random.default_rng(0)
  predicted = rng.normal(size=(6, 4))
  targets = rng.normal(size=(6, 4))
  # Two groups of three frames, of which one does not count.
  groups = np.array([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]], bool)
  mask = groups.any(axis=0)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  cosine = unit(predicted) @ unit(targets).T
  total = []
  for one, other in ((0, 2), (2, 0), (4, 5), (5, 4)):
    right = math.exp(cosine[one, one] / 0.3)
    wrong = 3 * math.exp(cosine[one, other] / 0.3)
    total.append(-math.log(right / (right + wrong)))
  result = info_nce(
    jax.random.key(3),
    jnp.asarray(predicted),
    jnp.asarray(targets),
    jnp.asarray(mask),
    jnp.asarray(groups),
    negatives=3,
    temperature=0.3,
  )
  np.testing.assert_allclose(result, np.mean(total), rtol=1e-5)


def test_others_are_of_the_group_and_never_the_frame_itself():
  """Frame i is right by far: if it were drawn as an other, it would cost."""
  eye = jnp.eye(8)
  groups = jnp.arange(8) // 4 == jnp.arange(2)[:, None]
  right = info_nce(
    jax.random.key(0), eye, eye, groups.any(axis=0), groups,
    negatives=30, temperature=0.01,
  )  # fmt: skip
  assert right < 1e-6
  # Predictions that fit the other group alone are as wrong as all others.
  moved = info_nce(
    jax.random.key(0), jnp.roll(eye, 4, axis=0), eye, groups.any(axis=0),
    groups, negatives=30, temperature=0.01,
  )  # fmt: skip
  np.testing.assert_allclose(moved, math.log(31), rtol=1e-4)


def test_a_group_of_one_frame_has_no_other_and_stays_finite():
  frames = jnp.ones((4, 3))
  single = jnp.array([[True, False, False, False]])
  loss = lambda x: info_nce(
    jax.random.key(0), x, frames, single[0], single,
    negatives=2, temperature=0.1,
  )  # fmt: skip
  value, slope = jax.jit(jax.value_and_grad(loss))(frames)
  assert value == 0 and np.all(np.isfinite(slope))


def test_masked_frames_are_spans_within_utterances():
  ssl = objectives.Ssl(mask_prob=0.1, mask_length=3)
  lengths = np.array([20, 7, 1] * 40)
  hidden = np.asarray(objectives.draw_mask(ssl, jax.random.key(0), lengths, 20))
  assert hidden.any(axis=1).all()  # At least one in each.
  for row, length in zip(hidden, lengths):
    assert not row[length:].any()
    runs = [len(list(g)) for on, g in itertools.groupby(row[:length]) if on]
    # Only the last may be cut.
    assert all(n >= 3 for n in runs[:-1])
  # 1 - (1 - p)^3 of the frames, and the certain span.
  assert 0.25 < hidden[lengths == 20].mean() < 0.5


def test_codes_are_the_nearest_by_the_angle():
  ssl = objectives.Ssl(codebook_size=7)
  fixed = objectives.quantiser(ssl, jax.random.key(0), 6)
  stack = np.random.default_rng(0).normal(size=(2, 5, 6))
  result = objectives.nearest_codes(fixed, jnp.asarray(stack))
  codes = np.asarray(fixed['codes'], np.float64)
  projected = stack @ np.asarray(fixed['projection'], np.float64)
  unit = projected / np.linalg.norm(projected, axis=-1, keepdims=True)
  far = np.linalg.norm(unit[:, :, None] - codes, axis=-1)
  np.testing.assert_array_equal(result, far.argmin(axis=-1))


def test_stacked_frames_fill_up_with_zeros():
  features = np.arange(10.0).reshape(1, 5, 2)
  result = objectives.stacked(features, 4)
  expected = [[[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 0, 0, 0, 0, 0]]]
  np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize('kind', objectives.KINDS)
def test_only_what_is_hidden_or_to_come_is_learnt_from(kind):
  """Frames beyond the lengths change no loss; each loss has a slope."""
  ssl = objectives.Ssl(
    kind,
    mask_prob=0.9,
    mask_length=1,
    negatives=3,
    prediction_steps=2,
    codebook_size=5,
  )
  head = objectives.predictor(ssl, width=6, stack=4)
  weights = head.init(jax.random.key(0))
  fixed = objectives.quantiser(ssl, jax.random.key(1), 4)
  encode = lambda x, n, key: (
    jnp.tile(objectives.stacked(x, 2), (1, 1, 2))[..., :6],
    -(-n // 2),
  )

  def loss(weights, features):
    return objectives.loss(
      ssl,
      lambda *args: head.apply(weights, *args),
      encode,
      features,
      np.array([8, 5]),
      jax.random.key(2),
      fixed=fixed,
      shrink=2,
    )

  features = np.random.default_rng(0).normal(size=(2, 8, 2))
  value, slope = jax.jit(jax.value_and_grad(loss))(weights, features)
  beyond = features.copy()
  beyond[1, 6:] = 9.0  # The last frame that counts is half filled.
  np.testing.assert_allclose(jax.jit(loss)(weights, beyond), value, rtol=1e-6)
  assert np.isfinite(value) and np.abs(slope).max() > 1e-3


def _loss(ssl, predict, *, rows=2, size=6, fixed=None):
  """A loss of noise with two numbers a frame, and what the encoder saw."""
  features = np.random.default_rng(0).normal(size=(rows, size, 2))
  features = jnp.asarray(features, jnp.float32)

  @jax.jit
  def run(features):
    noisy = []

    def look(x, lengths, key):
      del key
      noisy.append(x)
      return x, lengths

    value = objectives.loss(
      ssl, predict, look, features, np.array([size, size - 2]),
      jax.random.key(2), fixed=fixed, shrink=1,
    )  # fmt: skip
    return value, noisy[0]

  value, noisy = run(features)
  return value, features, np.asarray(noisy)


def test_codes_are_of_frames_before_they_are_hidden_and_of_no_others():
  ssl = objectives.Ssl(codebook_size=5, mask_length=2, mask_prob=0.3)
  fixed = objectives.quantiser(ssl, jax.random.key(1), 2)
  logits = np.random.default_rng(1).normal(size=(2, 6, 5)).astype(np.float32)
  value, features, noisy = _loss(
    ssl, lambda encoded, stack: (jnp.asarray(logits), None), fixed=fixed
  )
  hidden = (noisy != features).any(axis=-1)
  codes = np.asarray(objectives.nearest_codes(fixed, features))
  scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  right = np.take_along_axis(scores, codes[..., None], axis=-1)[..., 0]
  assert 0 < hidden.sum() < 10 and not hidden[1, 4:].any()
  np.testing.assert_allclose(value, -right[hidden].mean(), rtol=1e-5)


def test_others_of_a_hidden_frame_are_of_its_utterance():
  """What points to the other utterance is as wrong as any."""
  ssl = objectives.Ssl('contrastive', mask_length=3, mask_prob=0.5)
  eye = jnp.eye(12).reshape(2, 6, 12)
  other = jnp.tile(eye.sum(axis=1)[::-1, None], (1, 6, 1))
  value, _, _ = _loss(ssl, lambda *_: (other, eye))
  np.testing.assert_allclose(value, math.log(21), rtol=1e-4)
  value, _, _ = _loss(ssl, lambda *_: (eye, eye))
  assert value < 2e-3


def test_what_comes_is_predicted_from_frames_before_among_the_batch():
  ssl = objectives.Ssl('cpc', prediction_steps=2)
  eye = jnp.eye(12).reshape(2, 6, 12)
  coming = jnp.stack([jnp.roll(eye, -step, axis=1) for step in (1, 2)], axis=2)
  value, _, noisy = _loss(ssl, lambda *_: (coming.reshape(2, 6, 24), eye))
  assert value < 2e-3 and np.isfinite(noisy).all()
  same = jnp.tile(eye, (1, 1, 2))
  value, _, _ = _loss(ssl, lambda *_: (same, eye))
  assert value > 2
  # Frames of the other utterance are among the others.
  other = jnp.tile(eye.sum(axis=1)[::-1, None], (1, 6, 2))
  value, _, _ = _loss(ssl, lambda *_: (other, eye))
  assert value > math.log(21) + 1


def test_an_unknown_loss_is_named():
  with pytest.raises(harness.SettingsError, match=r'apc.*best_rq'):
    objectives.predictor(objectives.Ssl('apc'), width=2, stack=2)
