r"""Search in training: a beam of hypotheses, and the truth.

Each step extends every hypothesis by the detections nearest to its prediction
and by the null candidate; the K extensions of the best total score stay. The
truth advances in a branch of its own; a window may have another history there,
for instance a tracker's. So the network is trained on histories of
its own choices, and whole tracklets are compared:

    margin = mean_k [alpha (1 - q_k) + S(T_k) - S(T_truth)]_+
    rank   = mean_{q_i > q_j} [beta (q_i - q_j) + S(T_j) - S(T_i)]_+,

where q is the purity of a hypothesis, the share of its correct choices so far,
and S its mean score so far; both losses are averaged over the steps. The cross
entropy of the correct candidate is also averaged over the steps, on two kinds
of histories: the truth's, and those of the hypotheses with a purity of at least
0.5, averaged over these, 0 if there are none. If the target is out of a
hypothesis' reach, null is the candidate to learn, but not a correct choice.
Without hypotheses this is teacher forcing.

Cross entropy trains scores as logits of a step: a constant added to all
candidates of a step, null included, leaves the loss unchanged but changes a sum
over steps. `normalised` sums log-probabilities instead, which are comparable.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from experiments.tracking import motion, network
from experiments.tracklet import windows

EMPTY_SLOT = -1e9  # Score of an empty beam slot.


class Beam(NamedTuple):
  """Limits of a search.

  Attributes:
    hypotheses: that stay, K; 0 for the truth only.
    candidates: nearest detections of each hypothesis, without null.
    gate: largest squared Mahalanobis distance of a candidate.
    reset: whether the truth replaces all hypotheses when none is all correct.
    normalised: whether a step counts by log-probability instead of score.
  """

  hypotheses: int
  candidates: int = 8
  gate: float = 100.0
  reset: bool = True
  normalised: bool = False


class Tracklets(NamedTuple):
  """The hypotheses, and in the last row the truth.

  Attributes:
    motion: leading axis (rows,).
    state: h of the LSTM, (rows, hidden).
    cell: c of the LSTM, (rows, hidden).
    total: sum of the scores of the steps, (rows,).
    correct: number of correct choices, (rows,).
    all_correct: whether all choices were correct, bool (rows,).
  """

  motion: motion.Motion
  state: chex.Array
  cell: chex.Array
  total: chex.Array
  correct: chex.Array
  all_correct: chex.Array


class SearchResult(NamedTuple):
  """Losses and purities of a search; each a scalar or (hypotheses,).

  Attributes:
    truth_loss: mean cross entropy on the truth's history.
    rollout_loss: mean cross entropy on histories with a purity of at least 0.5.
    margin: margin loss.
    rank: rank loss.
    purity: of the best hypothesis; without hypotheses, the share of steps whose
      best-scored candidate of the truth is correct.
    purities: of each hypothesis, (hypotheses,).
    scores: S of each hypothesis, (hypotheses,); `EMPTY_SLOT` for empty ones.
  """

  truth_loss: chex.Array
  rollout_loss: chex.Array
  margin: chex.Array
  rank: chex.Array
  purity: chex.Array
  purities: chex.Array
  scores: chex.Array


def margin_loss(scores, purities, truth, alive, alpha):
  """Margin loss of hypotheses against the truth, a scalar; see the module."""
  excess = alpha * (1 - purities) + scores - truth
  # A hypothesis that equals the truth is no negative.
  counted = alive & (purities < 1)
  excess = jnp.where(counted, jnp.maximum(excess, 0), 0)
  return excess.sum() / jnp.maximum(alive.sum(), 1)


def rank_loss(scores, purities, alive, beta):
  """Rank loss among hypotheses, a scalar; see the module."""
  lead = purities[:, None] - purities[None]
  pairs = (lead > 1e-6) & alive[:, None] & alive[None]
  excess = beta * lead + scores[None] - scores[:, None]
  excess = jnp.where(pairs, jnp.maximum(excess, 0), 0)
  return excess.sum() / jnp.maximum(pairs.sum(), 1)


def _take(tree: Any, rows: Any) -> Any:
  return jax.tree.map(lambda x: x[rows], tree)


def _where(mask, one: Tracklets, two: Tracklets) -> Tracklets:
  return jax.tree.map(lambda a, b: jnp.where(mask, a, b), one, two)


def begin(
  weights: Any, window: windows.Window, noise: motion.Noise, beam: Beam
) -> Tracklets:
  """Starts the first hypothesis and the truth at a window's first detection."""
  index = jnp.argmax(window.is_target[0])
  count = beam.hypotheses + 1
  every = lambda x: jnp.broadcast_to(x[0, index], (count, *x.shape[2:]))
  embedding = every(window.embedding)
  initial = motion.begin(every(window.boxes), embedding, noise)
  state, cell = network.first_state(
    weights, every(window.confidence), embedding, noise
  )
  total = jnp.full(count, EMPTY_SLOT).at[0].set(0.0).at[-1].set(0.0)
  return Tracklets(
    initial, state, cell, total, jnp.zeros(count), jnp.ones(count, bool)
  )


class Extensions(NamedTuple):
  """Candidates of all tracklets at a step; the last candidate is null.

  Attributes:
    predicted: motion of the tracklets.
    index: of the candidates among the detections, (rows, candidates).
    scores: e, (rows, candidates + 1); `EMPTY_SLOT` for no candidate.
    x: embedded features, (rows, candidates, hidden).
    target: the candidate to learn, (rows,): the target, or null where it is out
      of reach. The truth's row always reaches it.
    chosen: the candidate that the window's history takes, (rows,).
    correct: which choices are correct, bool (rows, candidates + 1).
  """

  predicted: motion.Motion
  index: chex.Array
  scores: chex.Array
  x: chex.Array
  target: chex.Array
  chosen: chex.Array
  correct: chex.Array


def extend(
  weights: Any,
  rows: Tracklets,
  step: windows.Window,
  noise: motion.Noise,
  beam: Beam,
) -> Extensions:
  """Scores the candidates of all tracklets at one step of a window."""
  predicted = motion.predict(rows.motion, step.gaps, noise)
  distance = motion.distance(predicted, step.boxes[None], noise)
  allowed = step.valid & (distance <= beam.gate)
  # The truth's row always has the target among its candidates.
  is_truth = (jnp.arange(len(distance)) == len(distance) - 1)[:, None]
  forced = is_truth & (step.is_target | step.is_chosen)
  allowed = allowed | forced
  order = jnp.where(forced, -1.0, jnp.where(allowed, distance, 1e12))
  count = min(beam.candidates, order.shape[1])
  index = jax.lax.top_k(-order, count)[1]
  allowed = jnp.take_along_axis(allowed, index, axis=1)
  features = motion.features(
    predicted,
    step.boxes[index],
    step.confidence[index],
    step.embedding[index],
    noise,
  )
  scores, x = network.score(weights, rows.state, features)
  scores = jnp.where(allowed, scores, EMPTY_SLOT)
  scores = jnp.pad(scores, ((0, 0), (0, 1)))
  if beam.normalised:
    scores = jnp.maximum(jax.nn.log_softmax(scores, axis=1), EMPTY_SLOT)
  hits, taken = (
    mask[index] & allowed for mask in (step.is_target, step.is_chosen)
  )
  first = lambda mask: jnp.where(mask.any(axis=1), jnp.argmax(mask, 1), count)
  missed = jnp.broadcast_to(~step.is_target.any(), (len(distance), 1))
  return Extensions(
    predicted,
    index,
    scores,
    x,
    target=first(hits),
    chosen=first(taken),
    correct=jnp.concatenate([hits, missed], axis=1),
  )


def advance(
  weights: Any,
  rows: Tracklets,
  extensions: Extensions,
  parents: chex.Array,
  choices: chex.Array,
  step: windows.Window,
  noise: motion.Noise,
) -> Tracklets:
  """Extends tracklets by one choice each.

  Args:
    weights: of the network.
    rows: tracklets before the step.
    extensions: their candidates.
    parents: row that each new tracklet extends, (rows,).
    choices: candidate of each, (rows,); the last one is null.
    step: of the window.
    noise: of the filter.

  Returns:
    `Tracklets`.
  """
  before = _take(rows, parents)
  predicted = _take(extensions.predicted, parents)
  count = extensions.index.shape[1]
  null = choices == count
  at = parents, jnp.minimum(choices, count - 1)
  chosen = extensions.index[at]
  updated = motion.update(
    predicted, step.boxes[chosen], step.embedding[chosen], noise
  )
  state, cell = network.remember(
    weights, before.state, before.cell, extensions.x[at]
  )
  correct = extensions.correct[parents, choices]
  return Tracklets(
    motion=motion.where(null, predicted, updated),
    state=jnp.where(null[:, None], before.state, state),
    cell=jnp.where(null[:, None], before.cell, cell),
    total=before.total + extensions.scores[parents, choices],
    correct=before.correct + correct,
    all_correct=before.all_correct & correct,
  )


def prune(
  rows: Tracklets, extensions: Extensions
) -> tuple[chex.Array, chex.Array]:
  """Parents and choices of the K extensions with the best totals, (K,)."""
  totals = rows.total[:-1, None] + extensions.scores[:-1]
  totals = jnp.maximum(totals, 2 * EMPTY_SLOT)
  count = len(totals)
  best = jax.lax.top_k(totals.ravel(), count)[1]
  return best // totals.shape[1], best % totals.shape[1]


def _reset(rows: Tracklets) -> Tracklets:
  """Replaces all hypotheses by the truth if none is all correct."""
  alive = rows.total[:-1] > EMPTY_SLOT / 2
  lost = ~jnp.any(rows.all_correct[:-1] & alive)
  count = len(rows.total)
  truth = _take(rows, jnp.full(count, count - 1))
  total = jnp.full(count, EMPTY_SLOT).at[0].set(rows.total[-1])
  truth = truth._replace(total=total.at[-1].set(rows.total[-1]))
  return _where(lost, truth, rows)


def search(
  weights: Any,
  window: windows.Window,
  noise: motion.Noise,
  beam: Beam,
  *,
  alpha: float = 2.0,
  beta: float = 1.0,
) -> SearchResult:
  """Searches a window.

  Args:
    weights: of the network.
    window: detections.
    noise: of the filter.
    beam: limits of the search.
    alpha: margin to the truth of a hypothesis without a correct choice.
    beta: margin between hypotheses per difference of purities.

  Returns:
    `SearchResult`.
  """
  window = jax.tree.map(jnp.asarray, window)
  many = beam.hypotheses
  last = jnp.array([many])

  def body(carry, step):
    rows, steps = carry
    extensions = extend(weights, rows, step, noise, beam)
    logs = jax.nn.log_softmax(extensions.scores, axis=1)
    target = extensions.target
    losses = -jnp.take_along_axis(logs, target[:, None], axis=1)[:, 0]
    best = jnp.argmax(extensions.scores[-1]) == target[-1]
    alive = rows.total[:-1] > EMPTY_SLOT / 2
    # With a purity below 0.5 the tracklet is no longer the target's: going back
    # to the target would be an identity switch.
    learnt = alive & (2 * rows.correct[:-1] >= steps)
    rollout_loss = jnp.where(learnt, losses[:-1], 0).sum()
    rollout_loss = rollout_loss / jnp.maximum(learnt.sum(), 1)
    parents, choices = last, extensions.chosen[-1:]
    if many:
      pruned = prune(rows, extensions)
      parents, choices = (
        jnp.concatenate(pair) for pair in zip(pruned, (parents, choices))
      )
    new = advance(weights, rows, extensions, parents, choices, step, noise)
    new = new._replace(total=jnp.maximum(new.total, 2 * EMPTY_SLOT))
    steps = steps + step.inside
    rows = _where(step.inside, new, rows)
    count = jnp.maximum(steps, 1)
    score, purity = rows.total / count, rows.correct / count
    alive = rows.total[:-1] > EMPTY_SLOT / 2
    values = {
      'truth_loss': losses[-1],
      'rollout_loss': rollout_loss,
      'margin': margin_loss(score[:-1], purity[:-1], score[-1], alive, alpha),
      'rank': rank_loss(score[:-1], purity[:-1], alive, beta),
      'best': best.astype(jnp.float32),
    }
    if beam.reset and many:
      rows = _reset(rows)
    return (rows, steps), (values, step.inside)

  start = begin(weights, window, noise, beam)
  rest = jax.tree.map(lambda x: x[1:], window)
  (rows, steps), (values, inside) = jax.lax.scan(
    body, (start, jnp.zeros(())), rest
  )
  count = jnp.maximum(steps, 1)
  means = {
    name: jnp.where(inside, x, 0).sum() / count for name, x in values.items()
  }
  purities, scores = rows.correct[:-1] / count, rows.total[:-1] / count
  scores = jnp.where(rows.total[:-1] > EMPTY_SLOT / 2, scores, EMPTY_SLOT)
  best = means.pop('best')
  purity = purities[jnp.argmax(scores)] if many else best
  return SearchResult(**means, purity=purity, purities=purities, scores=scores)
