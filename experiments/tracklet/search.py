r"""Search inside of training: a beam of hypotheses beside the truth.

At each step every hypothesis is extended by the detections nearest to where it
should be, and by the null candidate; of all extensions the K of the best total
score stay. The truth advances in a branch of its own. So the history that the
network sees is that of its own choices, and whole tracklets are compared:

    margin = mean_k [alpha (1 - q_k) + S(T_k) - S(T_truth)]_+
    rank   = mean_{q_i > q_j} [beta (q_i - q_j) + S(T_j) - S(T_i)]_+,

q the share of right choices of a hypothesis so far, S its mean score so far;
both losses are taken after each step, and averaged over the steps. The cross
entropy of the right candidate, on the truth's history and on those of the
hypotheses of which at least half is right, is measured beside: a mean over the
hypotheses of a step, 0 if there are none, and over the steps. Where the target
is out of a hypothesis' reach, null is the candidate to learn; as a choice it is
not right. With no hypotheses, what is left of it is teacher forcing.

Scores that are learnt by a cross entropy are logits of a step: what is added to
all candidates of a step, null too, changes no loss, but it does change a sum
over steps. `normalised` takes log-probabilities in their place, whose sums may
be compared.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from experiments.tracking import motion, network
from experiments.tracklet import windows

NONE = -1e9  # The total of a hypothesis that there is not.


class Beam(NamedTuple):
  """What a search looks at.

  Attributes:
    hypotheses: that stay, K; 0 for the truth alone.
    candidates: detections of each, the nearest, beside the null candidate.
    gate: no further than this, in squared innovations.
    reset: whether the truth replaces all hypotheses where none is without
      fault.
    normalised: whether a step counts by its log-probability, not by its score.
  """

  hypotheses: int
  candidates: int = 8
  gate: float = 100.0
  reset: bool = True
  normalised: bool = False


class Rows(NamedTuple):
  """Tracklets under way: the hypotheses, and the truth behind them.

  Attributes:
    motion: of each, leading axis (rows,).
    state: h of the LSTM, (rows, hidden).
    cell: its c.
    total: the sum of the scores of the steps, (rows,).
    right: steps whose choice was right, (rows,).
    faultless: whether all were, bool (rows,).
  """

  motion: motion.Motion
  state: chex.Array
  cell: chex.Array
  total: chex.Array
  right: chex.Array
  faultless: chex.Array


class Found(NamedTuple):
  """What a search came to; each a scalar, or (hypotheses,).

  Attributes:
    truth_loss: cross entropy on the truth's history, a mean over the steps.
    own_loss: that on the histories of hypotheses that are at least half right.
    margin: loss of the margin.
    rank: loss of the ranks.
    purity: share of right choices of the best hypothesis; of the truth's
      candidates if there are no hypotheses, of the best-scored one.
    purities: of each hypothesis, (hypotheses,).
    scores: S of each, likewise; below `NONE / 2` if there is no such one.
  """

  truth_loss: chex.Array
  own_loss: chex.Array
  margin: chex.Array
  rank: chex.Array
  purity: chex.Array
  purities: chex.Array
  scores: chex.Array


def margin_loss(scores, purities, truth, alive, alpha):
  """The margin of hypotheses to the truth, see the module; a scalar."""
  over = alpha * (1 - purities) + scores - truth
  # What is the truth itself is no negative.
  counted = alive & (purities < 1)
  over = jnp.where(counted, jnp.maximum(over, 0), 0)
  return over.sum() / jnp.maximum(alive.sum(), 1)


def rank_loss(scores, purities, alive, beta):
  """The ranks among hypotheses, see the module; a scalar."""
  ahead = purities[:, None] - purities[None]
  pairs = (ahead > 1e-6) & alive[:, None] & alive[None]
  over = beta * ahead + scores[None] - scores[:, None]
  over = jnp.where(pairs, jnp.maximum(over, 0), 0)
  return over.sum() / jnp.maximum(pairs.sum(), 1)


def _take(rows: Rows, which: Any) -> Rows:
  return jax.tree.map(lambda x: x[which], rows)


def _where(which, one: Rows, two: Rows) -> Rows:
  def pick(a, b):
    return jnp.where(which.reshape(which.shape + (1,) * (a.ndim - 1)), a, b)

  return jax.tree.map(pick, one, two)


def begin(
  weights: Any, window: windows.Window, noise: motion.Noise, beam: Beam
) -> Rows:
  """The first detection of a window, as the first hypothesis and the truth."""
  place = jnp.argmax(window.same[0])
  count = beam.hypotheses + 1
  every = lambda x: jnp.broadcast_to(x[0, place], (count, *x.shape[2:]))
  looks = every(window.looks)
  begun = motion.begin(every(window.places), looks, noise)
  state, cell = network.first(weights, every(window.sure), looks, noise)
  total = jnp.full(count, NONE).at[0].set(0.0).at[-1].set(0.0)
  return Rows(
    begun, state, cell, total, jnp.zeros(count), jnp.ones(count, bool)
  )


class Extended(NamedTuple):
  """Candidates of all rows at a step; the last candidate is the null one.

  Attributes:
    moved: motion of the rows, predicted.
    index: of the candidates among the detections, (rows, candidates).
    scores: e, (rows, candidates + 1); `NONE` for what is no candidate.
    found: embeddings, (rows, candidates, hidden).
    target: the right candidate, or null where it is out of reach, (rows,); it
      is never out of the truth's own reach, the last row's.
    right: which candidates are right, bool (rows, candidates + 1).
  """

  moved: motion.Motion
  index: chex.Array
  scores: chex.Array
  found: chex.Array
  target: chex.Array
  right: chex.Array


def extend(
  weights: Any,
  rows: Rows,
  step: windows.Window,
  noise: motion.Noise,
  beam: Beam,
) -> Extended:
  """Scores the candidates of all rows at one step of a window."""
  moved = motion.predict(rows.motion, step.frames, noise)
  far = motion.distance(moved, step.places[None], noise)
  fine = step.there & (far <= beam.gate)
  # The truth's branch always has the truth among its candidates.
  truth = (jnp.arange(len(far)) == len(far) - 1)[:, None] & step.same
  fine = fine | truth
  order = jnp.where(truth, -1.0, jnp.where(fine, far, 1e12))
  count = min(beam.candidates, order.shape[1])
  index = jax.lax.top_k(-order, count)[1]
  fine = jnp.take_along_axis(fine, index, axis=1)
  seen = motion.features(
    moved, step.places[index], step.sure[index], step.looks[index], noise
  )
  scores, found = network.score(weights, rows.state, seen)
  scores = jnp.where(fine, scores, NONE)
  scores = jnp.pad(scores, ((0, 0), (0, 1)))
  if beam.normalised:
    scores = jnp.maximum(jax.nn.log_softmax(scores, axis=1), NONE)
  same = step.same[index] & fine
  unseen = jnp.broadcast_to(~step.same.any(), (len(far), 1))
  target = jnp.where(same.any(axis=1), jnp.argmax(same, axis=1), count)
  return Extended(
    moved,
    index,
    scores,
    found,
    target,
    jnp.concatenate([same, unseen], axis=1),
  )


def advance(
  weights: Any,
  rows: Rows,
  given: Extended,
  parents: chex.Array,
  choices: chex.Array,
  step: windows.Window,
  noise: motion.Noise,
) -> Rows:
  """Tracklets after a choice each.

  Args:
    weights: of the network.
    rows: before.
    given: their candidates.
    parents: which row each new one extends, (rows,).
    choices: by which candidate, (rows,); the last is null.
    step: of the window.
    noise: of the filter.

  Returns:
    `Rows`.
  """
  before = _take(rows, parents)
  moved = jax.tree.map(lambda x: x[parents], given.moved)
  count = given.index.shape[1]
  null = choices == count
  at = jnp.minimum(choices, count - 1)
  chosen = given.index[parents, at]
  updated = motion.update(moved, step.places[chosen], step.looks[chosen], noise)
  state, cell = network.remember(
    weights, before.state, before.cell, given.found[parents, at]
  )
  right = given.right[parents, choices]
  return Rows(
    motion=motion.choose(moved, updated, null),
    state=jnp.where(null[:, None], before.state, state),
    cell=jnp.where(null[:, None], before.cell, cell),
    total=before.total + given.scores[parents, choices],
    right=before.right + right,
    faultless=before.faultless & right,
  )


def prune(rows: Rows, given: Extended) -> tuple[chex.Array, chex.Array]:
  """The K best extensions by total score: parents and choices, (K,)."""
  totals = rows.total[:-1, None] + given.scores[:-1]
  totals = jnp.maximum(totals, 2 * NONE)
  count = len(totals)
  best = jax.lax.top_k(totals.ravel(), count)[1]
  return best // totals.shape[1], best % totals.shape[1]


def search(
  weights: Any,
  window: windows.Window,
  noise: motion.Noise,
  beam: Beam,
  *,
  alpha: float = 2.0,
  beta: float = 1.0,
) -> Found:
  """Searches a window.

  Args:
    weights: of the network.
    window: what is detected.
    noise: of the filter.
    beam: what the search looks at.
    alpha: margin to the truth of a hypothesis without a right choice.
    beta: margin between hypotheses, by the difference of purities.

  Returns:
    `Found`.
  """
  window = jax.tree.map(jnp.asarray, window)
  many = beam.hypotheses
  last = jnp.array([many])

  def body(carry, step):
    rows, steps = carry
    given = extend(weights, rows, step, noise, beam)
    logs = jax.nn.log_softmax(given.scores, axis=1)
    losses = -jnp.take_along_axis(logs, given.target[:, None], axis=1)[:, 0]
    # A beam's own losses are of what there is.
    alive = rows.total[:-1] > NONE / 2
    best = jnp.argmax(given.scores[-1]) == given.target[-1]
    # One that is mostly of others is no longer the target's tracklet: to go
    # back to the target would be a switch.
    own = alive & (2 * rows.right[:-1] >= steps)
    own = jnp.where(own, losses[:-1], 0).sum() / jnp.maximum(own.sum(), 1)
    parents, choices = last, given.target[-1:]
    if many:
      kept = prune(rows, given)
      parents, choices = (
        jnp.concatenate(pair) for pair in zip(kept, (parents, choices))
      )
    new = advance(weights, rows, given, parents, choices, step, noise)
    new = new._replace(total=jnp.maximum(new.total, 2 * NONE))
    steps = steps + step.inside
    rows = _where(jnp.broadcast_to(step.inside, (many + 1,)), new, rows)
    count = jnp.maximum(steps, 1)
    score, purity = rows.total / count, rows.right / count
    alive = rows.total[:-1] > NONE / 2
    measured = {
      'truth_loss': losses[-1],
      'own_loss': own,
      'margin': margin_loss(score[:-1], purity[:-1], score[-1], alive, alpha),
      'rank': rank_loss(score[:-1], purity[:-1], alive, beta),
      'best': best.astype(jnp.float32),
    }
    if beam.reset and many:
      lost = ~jnp.any(rows.faultless[:-1] & alive)
      anew = _take(rows, jnp.full(many + 1, many))
      first = jnp.full(many + 1, NONE).at[0].set(rows.total[-1])
      anew = anew._replace(total=first.at[-1].set(rows.total[-1]))
      rows = _where(jnp.broadcast_to(lost, (many + 1,)), anew, rows)
    return (rows, steps), (measured, step.inside)

  start = begin(weights, window, noise, beam)
  rest = jax.tree.map(lambda x: x[1:], window)
  (rows, steps), (measured, inside) = jax.lax.scan(
    body, (start, jnp.zeros(())), rest
  )
  count = jnp.maximum(steps, 1)
  means = {
    name: jnp.where(inside, values, 0).sum() / count
    for name, values in measured.items()
  }
  purities, scores = rows.right[:-1] / count, rows.total[:-1] / count
  scores = jnp.where(rows.total[:-1] > NONE / 2, scores, NONE)
  purity = purities[jnp.argmax(scores)] if many else means['best']
  return Found(
    means['truth_loss'],
    means['own_loss'],
    means['margin'],
    means['rank'],
    purity,
    purities,
    scores,
  )
