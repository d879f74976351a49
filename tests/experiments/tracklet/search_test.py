"""Search against enumeration, losses against loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tracking import detections, motion, network, scenes
from experiments.tracklet import search, windows
from tests.tiers import first

NOISE = motion.NOISE
STEPS, WIDTH, EMBEDDING = 3, 4, 2
BEAM = search.Beam(0, candidates=2, gate=60.0, reset=False)


@pytest.fixture(scope='module')
def weights():
  drawn = network.init(jax.random.key(1), hidden=5, embedding_size=EMBEDDING)
  # No weight is zero, so each is tested.
  keys = jax.random.split(jax.random.key(2), len(drawn))
  return {
    name: x + 0.1 * jax.random.normal(k, x.shape)
    for k, (name, x) in zip(keys, drawn.items())
  }


@pytest.fixture(scope='module')
def window():
  """A person who walks, is missed in step 2, and has two neighbours."""
  rng = np.random.default_rng(0)
  boxes = np.zeros((STEPS + 1, WIDTH, 4))
  for step in range(STEPS + 1):
    for i in range(WIDTH):
      boxes[step, i] = (100 + 9 * i + 3 * step, 100, 3.0, 3.8)
  boxes += rng.normal(size=boxes.shape) * (1, 1, 0.03, 0.03)
  valid = np.ones((STEPS + 1, WIDTH), bool)
  valid[:, 3] = False
  is_target = np.zeros((STEPS + 1, WIDTH), bool)
  is_target[[0, 1, 3], [1, 0, 2]] = True
  embedding = rng.normal(size=(STEPS + 1, WIDTH, EMBEDDING))
  return windows.Window(
    boxes.astype(np.float32),
    rng.random((STEPS + 1, WIDTH)).astype(np.float32),
    embedding.astype(np.float32),
    valid,
    is_target,
    is_target,
    np.array([0, 1, 2, 1], np.float32),
    np.ones(STEPS + 1, bool),
  )


def follow(weights, window, choices, forced=False):
  """Follows the choices of a tracklet in numpy.

  Args:
    weights: of the network.
    window: as above.
    choices: a detection per step, or None for null.
    forced: whether the target is always a candidate.

  Returns:
    Scores of the steps, None if a choice is no candidate; and for each step the
    scores of the candidates, from near to far.
  """
  weights = {k: np.asarray(v) for k, v in weights.items()}
  start = int(np.argmax(window.is_target[0]))
  moved = motion.begin(
    window.boxes[0, start], window.embedding[0, start], NOISE
  )
  state = network.first_state(
    weights, window.confidence[0, start], window.embedding[0, start], NOISE
  )
  scores, every = [], []
  for step, choice in enumerate(choices, 1):
    moved = motion.predict(moved, window.gaps[step], NOISE)
    far = motion.distance(moved, window.boxes[step], NOISE)
    order = np.where(window.valid[step] & (far <= BEAM.gate), far, np.inf)
    if forced:
      order[window.is_target[step]] = -1
    fine = np.argsort(order)[: BEAM.candidates]
    fine = fine[order[fine] < np.inf].tolist()
    features = motion.features(
      moved,
      window.boxes[step],
      window.confidence[step],
      window.embedding[step],
      NOISE,
    )
    e, x = network.score(weights, state[0], features)
    every.append({i: float(e[i]) for i in fine} | {None: 0.0})
    if choice not in every[-1]:
      return None, every
    scores.append(every[-1][choice])
    if choice is not None:
      moved = motion.update(
        moved, window.boxes[step, choice], window.embedding[step, choice], NOISE
      )
      state = network.remember(weights, *state, x[choice])
  return scores, every


def purity(window, choices):
  right = [
    window.is_target[step, c]
    if c is not None
    else not window.is_target[step].any()
    for step, c in enumerate(choices, 1)
  ]
  return float(np.mean(right))


def all_tracklets(weights, window, length=STEPS):
  """The totals of all possible tracklets, by their choices."""
  found = {}
  for choices in itertools.product((None, *range(WIDTH)), repeat=length):
    scores, _ = follow(weights, window, choices)
    if scores is not None:
      found[choices] = sum(scores)
  return found


def beam_by_hand(weights, window, count):
  """The tracklets that stay, and the cross entropy on those of purity 0.5."""
  kept, losses = {(): 0.0}, []
  for length in range(1, STEPS + 1):
    (hits,) = np.nonzero(window.is_target[length])
    step_losses = []
    for c in kept:
      if c and purity(window, c) < 0.5:
        continue
      scores = follow(weights, window, (*c, None))[1][-1]
      # Null is the candidate to learn where the target is out of reach.
      target = hits[0] if len(hits) and hits[0] in scores else None
      logits = np.array(list(scores.values()))
      step_losses.append(np.log(np.exp(logits).sum()) - scores[target])
    losses.append(np.mean(step_losses) if step_losses else 0.0)
    grown = {
      c: total
      for c, total in all_tracklets(weights, window, length).items()
      if c[:-1] in kept
    }
    best = sorted(grown, key=lambda c: -grown[c])[:count]
    kept = {c: grown[c] for c in best}
  return kept, np.mean(losses)


@pytest.mark.parametrize('count', first([2, 30]))
def test_the_beam_is_the_best_of_all_tracklets(weights, window, count):
  beam = BEAM._replace(hypotheses=count)
  found = jax.jit(lambda w: search.search(w, window, NOISE, beam))(weights)
  kept, rollout = beam_by_hand(weights, window, count)
  if count == 30:  # The number of tracklets: the search is exhaustive.
    assert kept.keys() == all_tracklets(weights, window).keys()
  best = sorted(kept, key=lambda c: -kept[c])
  alive = np.asarray(found.scores) > search.EMPTY_SLOT / 2
  assert alive.sum() == len(best)
  np.testing.assert_allclose(
    np.sort(found.scores[alive])[::-1],
    [kept[c] / STEPS for c in best],
    rtol=1e-4,
    atol=1e-5,
  )
  order = np.argsort(-np.asarray(found.scores))[: len(best)]
  np.testing.assert_allclose(
    found.purities[order], [purity(window, c) for c in best], atol=1e-6
  )
  np.testing.assert_allclose(found.purity, purity(window, best[0]), atol=1e-6)
  np.testing.assert_allclose(found.rollout_loss, rollout, rtol=1e-4)


@pytest.mark.slow
def test_log_probabilities_of_all_tracklets_sum_to_one(weights, window):
  beam = BEAM._replace(hypotheses=30, normalised=True)

  @jax.jit
  def found(weights, window):
    plain = search.search(weights, window, NOISE, beam._replace(normalised=0))
    return plain, search.search(weights, window, NOISE, beam)

  # All detections are within reach.
  apart = window._replace(valid=window.valid & (np.arange(WIDTH) < 2))
  plain, logs = found(weights, apart)
  alive = np.asarray(logs.scores) > search.EMPTY_SLOT / 2
  total = np.exp(STEPS * np.asarray(logs.scores, np.float64)[alive]).sum()
  assert total == pytest.approx(1.0, rel=1e-4)
  # The cross entropies are equal.
  for name in ('truth_loss', 'rollout_loss'):
    assert float(getattr(logs, name)) == pytest.approx(
      float(getattr(plain, name)), rel=1e-5
    )


@pytest.mark.slow
def test_teacher_forcing_is_the_cross_entropy_of_the_truth(weights, window):
  truth = (0, None, 2)
  every = follow(weights, window, truth, forced=True)[1]
  # The target is a candidate even if it is not among the nearest.
  assert follow(weights, window, truth)[0] is None
  wanted = -np.mean(
    [
      step[choice] - np.log(np.sum(np.exp(list(step.values()))))
      for step, choice in zip(every, truth)
    ]
  )
  loss = lambda w: search.search(w, window, NOISE, BEAM).truth_loss
  value, slope = jax.jit(jax.value_and_grad(loss))(weights)
  np.testing.assert_allclose(value, wanted, rtol=1e-4)
  # A step along the slope changes the loss by its square.
  size = sum(float((g**2).sum()) for g in jax.tree.leaves(slope))
  eps = 1e-3 / size**0.5
  moved = [
    jax.tree.map(lambda w, g, s=s: w + s * eps * g, weights, slope)
    for s in (1, -1)
  ]
  rise = [float(jax.jit(loss)(w)) for w in moved]
  assert (rise[0] - rise[1]) / (2 * eps) == pytest.approx(size, rel=0.02)


def test_margin_and_rank_by_loops():
  rng = np.random.default_rng(3)
  alpha, beta = 2.0, 1.5
  for _ in range(20):
    count = 5
    scores, purities = rng.normal(size=count), rng.integers(0, 4, count) / 3
    truth, alive = rng.normal(), rng.random(count) < 0.7
    over = [
      max(alpha * (1 - q) + s - truth, 0) if q < 1 else 0.0
      for s, q, fine in zip(scores, purities, alive)
      if fine
    ]
    np.testing.assert_allclose(
      search.margin_loss(scores, purities, truth, alive, alpha),
      np.mean(over) if over else 0,
      rtol=1e-5,
    )
    pairs = [
      max(beta * (purities[i] - purities[j]) + scores[j] - scores[i], 0)
      for i in range(count)
      for j in range(count)
      if alive[i] and alive[j] and purities[i] > purities[j]
    ]
    np.testing.assert_allclose(
      search.rank_loss(scores, purities, alive, beta),
      np.mean(pairs) if pairs else 0,
      rtol=1e-5,
    )


@pytest.mark.slow
def test_the_truth_replaces_hypotheses_if_none_is_correct(weights, window):
  """A network that always chooses wrongly is reset at each step."""
  beam = search.Beam(1, candidates=2, gate=60.0, reset=True)
  # The null candidate always wins, which is wrong at steps 1 and 3.
  low = weights | {'last_bias': weights['last_bias'] - 100}

  def both(w):
    return [
      search.search(w, window, NOISE, beam._replace(reset=r)) for r in (0, 1)
    ]

  alone, helped = jax.jit(both)(low)
  np.testing.assert_allclose(alone.purity, 1 / 3, atol=1e-6)
  np.testing.assert_allclose(helped.purity, 1, atol=1e-6)


def test_steps_after_the_end_change_nothing(weights, window):
  beam = BEAM._replace(hypotheses=2)
  search_it = jax.jit(lambda w, x: search.search(w, x, NOISE, beam))
  inside = np.array([True, True, True, False])
  junk = window.boxes.copy()
  junk[3] += 7
  one = search_it(weights, window._replace(inside=inside))
  two = search_it(weights, window._replace(inside=inside, boxes=junk))
  for a, b in zip(one, two):
    np.testing.assert_array_equal(a, b)
  assert not np.array_equal(search_it(weights, window).scores, one.scores)
  nothing = window._replace(valid=window.valid & False)
  assert all(np.isfinite(x).all() for x in search_it(weights, nothing)[:5])


def test_windows_are_of_one_person_of_one_sequence():
  made = [scenes.make_up(i, length=40, people=5) for i in (1, 2)]
  several = [
    detections.simulate(s.truth, s.info, np.random.default_rng(i))
    for i, s in enumerate(made)
  ]
  frames = detections.pad(several)
  data = jax.tree.map(jnp.asarray, frames)
  drawn = jax.device_get(
    jax.jit(
      lambda key: windows.batch(key, data, 40, steps=5, jumps=0.5, max_gap=9)
    )(jax.random.key(0))
  )
  assert (drawn.is_target[:, 0].sum(axis=1) == 1).all()
  assert (drawn.is_target.sum(axis=2) <= 1).all()
  assert (drawn.gaps[:, 1:] >= 1).all() and (drawn.gaps <= 9).all()
  assert (drawn.gaps[:, 1:] == 1).mean() == pytest.approx(0.55, abs=0.15)
  # A sequence ends once.
  assert (np.diff(drawn.inside.astype(int), axis=1) <= 0).all()
  assert 0 < drawn.inside[:, -1].mean() < 1
  assert drawn.is_target[:, 1:][drawn.inside[:, 1:]].any(axis=1).mean() > 0.5
