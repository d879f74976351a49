"""Scores and measures against direct counts and closed forms."""

import collections
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.seal import controls, measures


def auroc_by_pairs(scores, unsafe):
  """Area under the ROC curve over all pairs of rows."""
  pairs = [
    (a > b) + (a == b) / 2
    for a, bad_a in zip(scores, unsafe)
    for b, bad_b in zip(scores, unsafe)
    if bad_b and not bad_a
  ]
  return np.mean(pairs)


def precision_by_threshold(scores, unsafe):
  """Average precision over all thresholds."""
  total, before = 0.0, 0
  for bound in np.unique(scores):
    low = scores <= bound
    now = unsafe[low].sum()
    total += (now - before) * now / low.sum()
    before = now
  return total / unsafe.sum()


def test_measures_are_their_definitions():
  rng = np.random.default_rng(0)
  for ties in (1, 1000):
    scores = np.round(rng.normal(size=60) * ties) / ties
    unsafe = rng.uniform(size=60) < 0.3
    np.testing.assert_allclose(
      measures.auroc(scores, unsafe), auroc_by_pairs(scores, unsafe)
    )
    np.testing.assert_allclose(
      measures.auprc(scores, unsafe), precision_by_threshold(scores, unsafe)
    )
  assert np.isnan(measures.auroc(scores, np.zeros(60, bool)))
  assert measures.auroc(-unsafe.astype(float), unsafe) == 1
  assert measures.auprc(-unsafe.astype(float), unsafe) == 1
  np.testing.assert_allclose(
    measures.auprc(np.zeros(60), unsafe), unsafe.mean()
  )


def test_the_highest_scores_are_kept_and_nan_is_dropped():
  scores = np.array([3.0, np.nan, 1.0, 1.0, 2.0])
  mask = measures.keep_highest(scores, 0.75)
  np.testing.assert_array_equal(mask, [1, 0, 1, 0, 1])
  rates = measures.drop_rates(scores, np.array([0, 0, 0, 1, 0], bool), 0.75)
  assert rates == {'unsafe_drop': 1.0, 'clean_drop': 0.25}
  spread = measures.resampled(
    measures.auroc, np.arange(40.0), np.arange(40) % 4 == 0
  )
  low, high = spread.ends
  assert low < spread.mean < high
  assert spread.metrics('a').keys() == {'a', 'a/low', 'a/high'}


def test_hashed_ngrams_are_ratios_of_counts():
  texts, target = ['a b, a', 'c d'], ['a b', 'a']

  def bag(text):
    words = re.findall(r'\w+|[^\w\s]', text)
    return collections.Counter(words + list(itertools.pairwise(words)))

  here = sum(map(bag, texts), collections.Counter())
  there = sum(map(bag, target), collections.Counter())
  buckets = 1_000_003  # No two of these n-grams share a bucket.
  share = lambda total, g: (total[g] + 1) / (sum(total.values()) + buckets)
  expected = [
    sum(n * np.log(share(there, g) / share(here, g)) for g, n in bag(t).items())
    for t in texts
  ]
  scores = controls.hashed_ngrams(texts, target, buckets=buckets)
  np.testing.assert_allclose(scores, expected)
  assert scores[0] > scores[1]


def test_losses_and_their_excess_are_means_over_answers():
  first = np.array([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
  tuned = first + np.array([[1.0, 0.0, 7.0], [-1.0, 7.0, 7.0], [3.0, 3.0, 0.0]])
  mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
  np.testing.assert_allclose(controls.by_loss(first, mask), [-1.5, -4.0, -1.0])
  np.testing.assert_allclose(
    controls.by_excess(tuned, first, mask), [-0.5, 1.0, -2.0]
  )
  # The two largest of six excess losses are in the last row.
  scores = controls.by_excess_tokens(tuned, first, mask, discard=2 / 6)
  np.testing.assert_allclose(scores, [0, 0, -2 / 3])
  # Masked tokens do not count.
  wild = np.where(mask > 0, tuned, np.inf)
  np.testing.assert_allclose(controls.by_loss(wild, mask)[0], -2.0)


def test_length_counts_the_tokens_of_answers():
  mask = np.array([[0, 1, 1], [1, 0, 0], [1, 1, 1]])
  np.testing.assert_array_equal(controls.by_length(mask), [2, 1, 3])


def test_distances_do_not_depend_on_the_scale_of_a_direction():
  rng = np.random.default_rng(1)
  rows, safe, unsafe = (rng.normal(size=(n, 3)) for n in (50, 8, 8))
  shift = np.array([0.0, 1.0, 0.0])
  safe, unsafe = safe + shift, unsafe - shift
  scale = np.diag([1.0, 100.0, 0.01])
  turned = [points @ scale for points in (rows, safe, unsafe)]
  one = controls.by_distance(rows, safe, unsafe, ridge=0.0)
  two = controls.by_distance(*turned, ridge=0.0)
  np.testing.assert_allclose(one, two, atol=1e-6)
  assert np.corrcoef(one, rows[:, 1])[0, 1] > 0.8
  # Whitened by Cholesky: distances do not depend on the root.
  root = np.linalg.inv(np.linalg.cholesky(np.cov(rows.T, bias=True)))
  white = lambda points: (points - rows.mean(0)) @ root.T
  expected = -np.linalg.norm(white(rows) - white(safe).mean(0), axis=1)
  np.testing.assert_allclose(
    controls.by_distance(rows, safe, ridge=0.0), expected, rtol=1e-6
  )
  # A direction without variance.
  flat = np.c_[rows, np.ones(50)]
  scores = controls.by_distance(flat, flat[:4])
  assert np.all(np.isfinite(scores))


def test_the_similarity_of_gradients_is_an_inner_product():
  data = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))
  losses = lambda w: jnp.tanh(data @ w['a']) + w['b'] ** 2
  params = {'a': jnp.array([0.3, -0.2, 0.5]), 'b': jnp.float32(0.4)}
  direction = controls.unit(jax.grad(lambda w: losses(w)[:2].sum())(params))
  rows = jax.jacobian(losses)(params)
  expected = rows['a'] @ direction['a'] + rows['b'] * direction['b']
  scores = controls.by_gradient(losses, params, direction)
  np.testing.assert_allclose(scores, expected, rtol=1e-5)
  squares = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(direction))
  assert squares == pytest.approx(1, rel=1e-5)
  assert np.array_equal(controls.random(4, 1), controls.random(4, 1))
