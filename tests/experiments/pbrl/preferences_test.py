"""Fragments, labels and their model against loops."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments.pbrl import preferences

STEPS, COUNT, LENGTH = 11, 3, 4


def _rollout(seed, ends=0.15):
  """Observations number the steps and environments."""
  rng = np.random.default_rng(seed)
  shape = (STEPS, COUNT)
  terminated, truncated = rng.random(shape) < ends, rng.random(shape) < ends
  number = np.arange(STEPS * COUNT, dtype=np.float32).reshape(*shape, 1)
  return bj.rl.Rollout(
    number,
    rng.integers(0, 2, shape),  # Unused.
    rng.normal(size=shape).astype(np.float32),
    terminated,
    truncated & ~terminated,
    number,
  )


def _fragment(rollout, start, one):
  """Validity, mask and sum of a fragment."""
  mask, total = [], 0.0
  for t in range(start, start + LENGTH):
    mask.append(True)
    total += rollout.rewards[t, one]
    if rollout.truncated[t, one]:
      return False, mask, total
    if rollout.terminated[t, one]:
      break
  return True, mask + [False] * (LENGTH - len(mask)), total


def test_fragments_end_at_a_termination_and_hold_no_truncation():
  cut = jax.jit(lambda rollout: preferences.cut(rollout, LENGTH))
  count = 0
  for seed in range(20):
    rollout = _rollout(seed)
    allowed, mask, sums = map(np.asarray, cut(rollout))
    for start in range(STEPS - LENGTH + 1):
      for one in range(COUNT):
        valid, steps, total = _fragment(rollout, start, one)
        assert allowed[start, one] == valid
        if valid:
          assert mask[start, :, one].tolist() == steps
          np.testing.assert_allclose(sums[start, one], total, rtol=1e-5)
          count += not all(steps)
  assert count > 50


def test_draws_are_of_allowed_fragments_and_of_all_of_them():
  rollout = _rollout(1)
  draw = jax.jit(
    lambda key, rollout: preferences.draw(key, rollout, (400, 2), LENGTH)
  )
  fragments = jax.tree.map(np.asarray, draw(jax.random.key(0), rollout))
  numbers = fragments.observations[..., 0].reshape(-1, LENGTH).astype(int)
  drawn = set()
  for row, mask, total in zip(
    numbers,
    fragments.mask.reshape(-1, LENGTH),
    fragments.returns.ravel(),
    strict=True,
  ):
    start, one = divmod(row[0], COUNT)
    assert (np.diff(row) == COUNT).all()
    valid, steps, expected = _fragment(rollout, start, one)
    assert valid and mask.tolist() == steps
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-6)
    drawn.add((start, one))
  allowed = np.asarray(preferences.cut(rollout, LENGTH)[0])
  assert drawn == set(zip(*map(list, np.nonzero(allowed)), strict=True))
  # Without valid fragments the result is empty.
  cut = rollout._replace(
    truncated=np.ones((STEPS, COUNT), bool),
    terminated=np.zeros((STEPS, COUNT), bool),
  )
  none = draw(jax.random.key(0), cut)
  assert not none.mask.any() and not none.returns.any()


def _pairs(rng, count):
  def fragments():
    return preferences.Fragments(
      jnp.asarray(rng.normal(size=(count, LENGTH, 2)), jnp.float32),
      jnp.asarray(rng.integers(0, 3, (count, LENGTH))),
      jnp.asarray(np.arange(LENGTH) < rng.integers(1, 5, (count, 1))),
      jnp.asarray(rng.integers(0, 3, count), jnp.float32),
    )

  labels = rng.choice([0, 0.5, 1], count)
  return preferences.Pairs(
    fragments(), fragments(), jnp.asarray(labels, jnp.float32)
  )


def _reward(weights, observation):
  return jnp.tanh(weights @ observation)


def test_loss_and_accuracy_against_loops():
  rng = np.random.default_rng(3)
  pairs = _pairs(rng, 12)
  weights = rng.normal(size=(3, 2)).astype(np.float32)

  def total(one, i):
    steps = int(one.mask[i].sum())
    return sum(
      np.tanh(weights[int(one.actions[i, t])] @ one.observations[i, t])
      for t in range(steps)
    )

  want, right, known = [], 0, 0
  for i, label in enumerate(np.asarray(pairs.labels, float)):
    p = 1 / (1 + np.exp(total(pairs.first, i) - total(pairs.second, i)))
    want.append(-label * np.log(p) - (1 - label) * np.log(1 - p))
    ahead = float(pairs.second.returns[i] - pairs.first.returns[i])
    known += ahead != 0
    right += (p - 0.5) * ahead > 0

  @jax.jit
  def run(weights, pairs):
    margin = preferences.margins(_reward, weights, pairs)
    buffer = preferences.empty(20, LENGTH, (2,), jnp.float32)
    none = preferences.accuracy(_reward, weights, buffer)
    buffer = preferences.push(buffer, pairs, preferences.untied(pairs))
    share = preferences.accuracy(_reward, weights, buffer)
    losses = preferences.bradley_terry(margin, pairs.labels)
    return losses, none, share, buffer

  losses, empty, share, buffer = run(weights, pairs)
  np.testing.assert_allclose(losses, want, rtol=1e-5)
  assert np.isnan(empty)
  np.testing.assert_allclose(share, right / known, rtol=1e-6)
  assert 0 < known < 12 and int(buffer.count) == known


def test_labels_are_of_boltzmann():
  rng = np.random.default_rng(4)
  pair = _pairs(rng, 6)
  both = jax.tree.map(
    lambda a, b: jnp.stack([a, b], axis=1), pair.first, pair.second
  )
  keys = jax.random.split(jax.random.key(0), 4_000)
  ahead = np.asarray(pair.second.returns - pair.first.returns)
  draw = jax.jit(
    jax.vmap(lambda key, t: preferences.label(key, both, t).labels, (0, None))
  )
  for temperature in (0.7, np.inf):
    labels = draw(keys, temperature)
    want = 1 / (1 + np.exp(-ahead / temperature))
    np.testing.assert_allclose(labels.mean(0), want, atol=0.035)


def test_the_buffer_keeps_the_last_pairs():
  rng = np.random.default_rng(5)
  ring = preferences.empty(5, LENGTH, (2,), jnp.float32)
  last, push = collections.deque(maxlen=5), jax.jit(preferences.push)
  for i in range(6):
    pairs = _pairs(rng, 3)._replace(labels=jnp.arange(3.0) + 10 * i)
    keep = rng.random(3) < 0.6
    ring = push(ring, pairs, jnp.asarray(keep))
    last.extend(float(x) for x in pairs.labels[keep])
    known = min(int(ring.count), 5)
    stored = np.asarray(ring.pairs.labels)[:known]
    assert sorted(stored.tolist()) == sorted(last)
  drawn = preferences.sample(jax.random.key(0), ring, (200,))
  assert set(np.asarray(drawn.labels).tolist()) == set(last)
