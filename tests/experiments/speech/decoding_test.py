"""Searches against all paths there are, and alignments against all of them."""

import itertools
import math

import numpy as np
import pytest

from experiments import harness
from experiments.speech import alignment, decoding, fusion, units
from tests.experiments.speech import counted

FRAMES, LABELS = 5, 4


def outputs(seed, frames=FRAMES, labels=LABELS):
  """Logarithms of probabilities that are drawn."""
  logits = 2 * np.random.default_rng(seed).normal(size=(frames, labels))
  return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def says(path):
  """What a path says, letter by letter."""
  hypothesis = [label for label, _ in itertools.groupby(path)]
  return tuple(label for label in hypothesis if label != 0)


def enumerated(log_probs):
  """The logarithm of each text's probability, over all paths."""
  totals = {}
  frames, labels = log_probs.shape
  for path in itertools.product(range(labels), repeat=frames):
    result = math.exp(sum(log_probs[t, k] for t, k in enumerate(path)))
    totals[says(path)] = totals.get(says(path), 0.0) + result
  return {text: math.log(total) for text, total in totals.items()}


@pytest.mark.parametrize('seed', range(3))
def test_a_wide_beam_finds_all_texts(seed):
  log_probs = outputs(seed)
  expected = enumerated(log_probs)
  result = decoding.prefix_beam(log_probs, width=10_000, max_texts=10_000)
  assert {tuple(s.labels.tolist()) for s in result} == set(expected)
  for hypothesis in result:
    text = tuple(hypothesis.labels.tolist())
    assert hypothesis.log_prob == pytest.approx(expected[text], abs=1e-12)
    assert hypothesis.score == hypothesis.log_prob
  scores = [hypothesis.score for hypothesis in result]
  assert scores == sorted(scores, reverse=True)
  assert sum(map(math.exp, scores)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize('seed', range(3))
def test_a_wide_beam_finds_the_best_with_a_model(seed):
  known = units.characters(['ab'])
  model = counted.OfLabels(['ab', 'ab b', 'a'], known, order=2)
  log_probs = outputs(seed, 4, known.size)
  settings = {'weight': 0.7, 'bonus': 0.3}
  expected = {}
  for text, log_prob in enumerated(log_probs).items():
    state, total = model.start, 0.0
    for label in text:
      total += model.log_probs(state)[label]
      state = model.follow(state, label)
    total += model.end(state)
    expected[text] = log_prob + 0.7 * total + 0.3 * len(text)
  result = decoding.prefix_beam(
    log_probs, width=10_000, max_texts=10_000, model=model, **settings
  )
  assert len(result) == len(expected)
  for hypothesis in result:
    text = tuple(hypothesis.labels.tolist())
    assert hypothesis.score == pytest.approx(expected[text], abs=1e-12)
  # Without a weight, the model is not asked.
  none = decoding.prefix_beam(log_probs, width=10_000, model=model, weight=0)
  without_model = decoding.prefix_beam(log_probs, width=10_000)
  assert none[0].score == without_model[0].score


def test_a_model_of_words_decides_what_is_spelt():
  known = units.characters(['ab ba'])
  a, b, space = (int(known.encode(c)[0]) if c != ' ' else 2 for c in 'ab ')
  assert known.symbols[space] == ' '
  # The audio leaves open whether ab or bb is said, then it says ba.
  frames = []
  for row in ({a: 0.49, b: 0.5}, {0: 1.0}, {b: 1}, {space: 1}, {b: 1}, {a: 1}):
    frame = np.full(known.size, 1e-6)
    for label, probability in row.items():
      frame[label] = probability
    frames.append(np.log(frame / frame.sum()))
  best = lambda **how: known.decode(decoding.decode([frames], **how)[0])
  assert best() == 'bb ba'
  model = counted.learn([['ab', 'ba']], order=2, vocabulary=['ab', 'ba'])
  model = fusion.WordModel(model, known)
  assert best(model=model, weight=1.0) == 'ab ba'
  # Of two, only the frames that count.
  batch = np.stack([np.stack(frames)] * 2)
  result = decoding.decode(batch, np.array([3, 6]))
  assert [known.decode(labels) for labels in result] == ['bb', 'bb ba']


def test_a_narrow_beam_is_a_lower_bound():
  log_probs = outputs(7, 6, 4)
  expected = enumerated(log_probs)
  for width in (1, 2, 8):
    for hypothesis in decoding.prefix_beam(
      log_probs, width=width, max_texts=width
    ):
      text = tuple(hypothesis.labels.tolist())
      assert hypothesis.log_prob <= expected[text] + 1e-12
  best = max(expected, key=expected.get)
  result = decoding.prefix_beam(log_probs, width=8)[0]
  assert tuple(result.labels.tolist()) == best
  assert len(decoding.prefix_beam(log_probs, width=2, max_texts=9)) == 2
  # Of texts that are equally likely, as many as fit, and always the same.
  even = np.full((1, 9), -math.log(9))
  result = decoding.prefix_beam(even, width=3, max_texts=9)
  assert [hypothesis.labels.tolist() for hypothesis in result] == [[], [1], [2]]


def test_paths_that_are_impossible():
  never = np.full((3, 3), -np.inf)
  assert decoding.prefix_beam(never) == []
  assert decoding.decode([never])[0].shape == (0,)
  only = np.where(np.eye(3)[[1, 0, 1]] > 0, 0.0, -np.inf)
  result = decoding.prefix_beam(only, width=4, max_texts=4)
  assert [s.labels.tolist() for s in result] == [[1, 1]]
  assert result[0].log_prob == 0
  # Long and sure of nothing: far below what a float holds as a probability.
  even = np.full((4_000, 2), -40.0)
  assert decoding.prefix_beam(even, width=2)[0].log_prob < -150_000
  with pytest.raises(ValueError, match='NaN'):
    decoding.prefix_beam(np.full((2, 3), np.nan))
  with pytest.raises(harness.SettingsError, match='at least 1, got 0'):
    decoding.prefix_beam(only, width=0)


def test_greedy_takes_the_best_path_of_the_frames_that_count():
  paths = np.array([[1, 1, 0, 1, 2], [0, 2, 2, 3, 3], [0, 0, 0, 0, 0]])
  logits = np.eye(4)[paths]
  result = decoding.greedy(logits)
  assert [f.tolist() for f in result] == [[1, 1, 2], [2, 3], []]
  result = decoding.greedy(logits, np.array([3, 2, 0]))
  assert [f.tolist() for f in result] == [[1], [2], []]
  for seed in range(5):
    log_probs = outputs(seed)
    expected = says(log_probs.argmax(axis=1))
    assert decoding.greedy(log_probs[None])[0].tolist() == list(expected)


@pytest.mark.parametrize('labels', [(), (2,), (1, 1), (3, 1, 2), (2, 2, 1)])
def test_an_alignment_is_the_best_of_all_paths(labels):
  for seed in range(3):
    log_probs = outputs(seed)
    expected = max(
      (sum(log_probs[t, k] for t, k in enumerate(path)), path)
      for path in itertools.product(range(LABELS), repeat=FRAMES)
      if says(path) == labels
    )
    result = alignment.align(log_probs, np.array(labels, int))
    assert result.log_prob == pytest.approx(expected[0], abs=1e-12)
    assert tuple(result.path.tolist()) == expected[1]
    # Each label is where its frames are, in order.
    assert len(result.starts) == len(result.stops) == len(labels)
    rebuilt = np.zeros(FRAMES, int)
    for label, start, stop in zip(labels, result.starts, result.stops):
      assert start < stop
      rebuilt[start:stop] = label
    np.testing.assert_array_equal(rebuilt, result.path)
    assert (result.starts[1:] >= result.stops[:-1]).all()


def test_an_alignment_of_one_frame_too_few():
  log_probs = outputs(0, 3, 3)
  assert alignment.align(log_probs, [1, 1]).path.tolist() == [1, 0, 1]
  with pytest.raises(harness.DamagedDataError, match='2 labels need 3 frames'):
    alignment.align(log_probs[:2], [1, 1])
  with pytest.raises(harness.DamagedDataError, match='0 labels need 1 frames'):
    alignment.align(log_probs[:0], [])
  log_probs[1, 0] = -np.inf
  with pytest.raises(harness.DamagedDataError, match='no probability to any'):
    alignment.align(log_probs, [1, 1])
