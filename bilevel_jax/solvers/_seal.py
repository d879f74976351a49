"""SEAL: which rows of a data set are kept, learnt beside the model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import (
  _checks,
  _log_sums,
  _sequences,
  _trees,
  descent,
  oracles,
  states,
  types,
)
from bilevel_jax.aggregators import _penalty
from bilevel_jax.oracles import base

# How weights are made of a row's score, and along what the score moves.
WEIGHTS = ('softmax', 'mirror', 'sigmoid')


@states.counts_updates
class SealState(NamedTuple):
  """State of `seal`.

  Attributes:
    count: updates so far, an int32 scalar.
    sequences: the one sequence `selector`: a score for each row, (rows,),
      float32 or wider; what is low is to be left out.
    level: the largest score, and the logarithm of the mean of the scores'
      exponentials less that, (2,): what the softmax of all rows is divided by.
    sums: a tree of partial sums of these exponentials, level by level.
    inner: the state of the model's steps, and of the scores' optimiser, whose
      leaves have a leading axis of rows.
  """

  count: chex.Array
  sequences: dict[str, Any]
  level: chex.Array
  sums: tuple[chex.Array, ...]
  inner: Any


class _Given(NamedTuple):
  """What the losses of an update are evaluated on.

  Attributes:
    batch: of the solver.
    index: which rows are in it, (batch,).
    weights: theirs, (batch,).
    slopes: the derivative of each weight in its score, (batch,).
    shares: the weights of the upper and of the lower loss, two scalars.
  """

  batch: Any
  index: chex.Array
  weights: chex.Array
  slopes: chex.Array
  shares: tuple[chex.Array, chex.Array]


def _each_row(optimiser: Any) -> optax.GradientTransformation:
  """An optimiser that sees one row alone, its age for instance."""

  def update_fn(gradients, state, params=None, **extra_args):
    del extra_args
    return jax.vmap(optimiser.update)(gradients, state, params)

  return optax.GradientTransformationExtraArgs(
    jax.vmap(optimiser.init), update_fn
  )


def _take(tree: Any, index: chex.Array) -> Any:
  """Rows of a table; of a row that there is none, NaN."""
  return jax.tree.map(lambda a: a.at[index].get(mode='fill'), tree)


def _put(tree: Any, index: chex.Array, new: Any) -> Any:
  """A table with other rows, what is outside of it dropped."""
  return jax.tree.map(
    lambda a, b: a.at[index].set(b.astype(a.dtype), mode='drop'), tree, new
  )


def _as_one(index: chex.Array, numbers: chex.Array) -> chex.Array:
  """Sums over equal indices, at each place where these stand."""
  _, place = jnp.unique(index, return_inverse=True, size=len(index))
  summed = jax.ops.segment_sum(numbers, place, len(index))
  return summed[place]


def _main(upper, row_losses, full: bool) -> base.Oracle:
  """Gradients of the model and of the scores of the rows, at one point."""
  above = base.Loss(upper, 'upper')

  def fn(z, given, inner):
    def loss(y):
      f = above(y, given.batch)
      losses = _rows_of(row_losses, y, given)
      g = jnp.mean(given.weights * losses)
      return given.shares[0] * f + given.shares[1] * g, (f, g, losses)

    slope, (f, g, losses) = jax.grad(loss, has_aux=True)(z.lower)
    values: tuple[Any, ...] = (f, g)
    height = losses
    if full:
      height = losses - _rows_of(row_losses, z.value, given)
      values = (f, g, jnp.mean(given.weights * height))
    # Several places of one row are one row.
    scores = _as_one(given.index, given.slopes * height / len(given.index))
    found = base.gradients(z, upper=scores.astype(z.upper.dtype), lower=slope)
    return values, found, inner

  counts = {'gradients/upper': 1, 'gradients/lower': 1}
  return base.oracle(
    fn,
    ('upper', 'lower', *(['gap'] if full else [])),
    counts=counts | ({'losses/lower': 1} if full else {}),
    moves=('upper', 'lower'),
  )


def _rows_of(row_losses, y, given):
  """The losses of the rows of a batch, in float32 or wider; checked."""
  losses = jnp.asarray(row_losses(y, given.batch))
  if losses.shape != given.index.shape or not jnp.issubdtype(
    losses.dtype, jnp.floating
  ):
    raise TypeError(
      f'seal: row_losses gives {losses.dtype}{list(losses.shape)} for the '
      f'{given.index.shape[0]} rows of a batch, expected one float for each: '
      'do not take their mean.'
    )
  return losses.astype(given.weights.dtype)


def seal(
  upper: Callable[[Any, Any], Any],
  row_losses: Callable[[Any, Any], Any],
  *,
  rows: int,
  index: Callable[[Any], Any],
  penalty: types.ScalarOrSchedule,
  selector: optax.GradientTransformation,
  lower: types.SequenceLike,
  value: types.SequenceLike | None = None,
  weights: str = 'softmax',
) -> descent.Solver:
  r"""SEAL: a score for each row, by what a model that stays safe loses on it.

  .. math::
    \min_{\omega} f(\theta^*(\omega)) \quad \text{where} \quad
    \theta^*(\omega) \in \arg\min_\theta
    g(\omega, \theta) = \frac{1}{N} \sum_i p_i(\omega) \, \ell_i(\theta)

  by the penalty method. With the batch :math:`B` of rows, all at one point,

  .. math::
    \theta_{k+1} &= \theta_k - \alpha \, c_k \nabla_\theta \left[
      f(\theta_k) + \frac{\gamma_k}{|B|} \sum_{i \in B} p_i \ell_i(\theta_k)
      \right], \qquad c_k = \frac{1}{1 + \gamma_k} \\
    \omega_i &\leftarrow \omega_i - \beta \, \frac{s_i}{|B|}
      \left[ \ell_i(\theta_k) \; - \; \ell_i(\hat\theta_{k+1}) \right],
      \qquad i \in B

  What stands in the second bracket after the minus is in the full form only,
  where a sequence `value` follows the minimiser of the lower loss alone. The
  form without it, which is the published program's, holds one copy of the model
  less. As there, the scores' step has no factor :math:`\gamma`: scores move
  also while the penalty is zero.

  | `weights` | p of a row | s | by plain descent |
  |---|---|---|---|
  | 'softmax' | N softmax(score) | p | as published |
  | 'mirror' | N softmax(score) | 1 | exponentiated gradient on the simplex |
  | 'sigmoid' | sigmoid(score) | p (1 - p) | each row on its own |

  Scores of rows that are not in a batch do not move, and an update costs a
  batch, also under `jax.vmap` over seeds: with the number of rows, only the
  depth of a tree of partial sums grows, its logarithm. Three things follow. A
  softmax's derivative also moves all other scores, by nearly the same number;
  it is left out, and where rows are seen equally often, in whole epochs, the
  ranking is the same. Under Adam, that number becomes a step as large as any:
  it would lift each score by about its step size an update, and rows that
  happen to be seen less would look safe. Here an optimiser sees each row alone,
  with moments and an age of its own. (So Adam divides what a row loses by
  itself: it sees changes, not how large it is. Rank by plain descent.) And the
  softmax's divisor is the root of that tree: an update sums again the ancestors
  of its rows.

  By plain descent, a score is minus the sum of a row's losses at its visits:
  give whole epochs, without replacement, or divide by the number of visits.

  Args:
    upper: the loss of what is to stay, from (parameters, batch) to a scalar.
    row_losses: the losses of the rows to choose from, from (parameters, batch)
      to (batch,); `bj.losses` of each row, for instance.
    rows: :math:`N`, how many there are.
    index: which of them are in a batch, from the batch: (batch,), whole numbers
      in [0, rows). Any other makes the losses NaN. A row that is there twice
      takes one step, along both.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule from the number of
      updates so far: `seal_penalty` is the published one.
    selector: how scores move: any optax optimiser. It is of one score: what it
      does across scores, clipping by a global norm, it does for each row. Its
      schedules count updates of the solver, its moments' ages a row's visits.
    lower: how the model moves, an optax optimiser or a `Sequence`.
    value: how the third sequence moves, with its `steps`; None for the form
      without it.
    weights: 'softmax', 'mirror' or 'sigmoid'.

  Returns:
    A solver for the model's parameters, any pytree. The scores, zero at first,
    are `bj.auxiliaries(state)['selector']`; `bj.values` gives `upper`, `lower`,
    and in the full form `gap` and `value`.

  Raises:
    ValueError: if `rows` is below 1, the penalty is negative, `weights` is
      unknown, or a record has a `batch_at` (a batch is one set of rows).
    TypeError: at the call, if a loss is no scalar, `row_losses` gives something
      else than one number for each row, or `index` no whole numbers.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> data = jnp.array([1.0, 1.2, -3.0, 0.8])  # The third is another kind.
    >>> solver = bj.solvers.seal(
    ...   lambda y, batch: (y - 1) ** 2,
    ...   lambda y, batch: (y - data[batch]) ** 2,
    ...   rows=4, index=lambda batch: batch,
    ...   penalty=bj.solvers.seal_penalty(1.0, decay=0.1, epoch=2),
    ...   selector=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )
    >>> params = jnp.float32(0.0)
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for k in range(20):
    ...   batch = jnp.array([[0, 1], [2, 3]])[k % 2]
    ...   updates, state = step(batch, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(jnp.argmin(bj.auxiliaries(state)['selector']))
    2

  References:
    Shen, Chen, Das and Chen, `SEAL: Safety-enhanced Aligned LLM Fine-tuning via
    Bilevel Data Selection <https://arxiv.org/abs/2410.07471>`_, 2024; without
    the third sequence, Jiang, Xiao, Chen and Chen, `Beyond Value Functions
    <https://arxiv.org/abs/2507.20400>`_, 2025.
  """
  _checks.whole('seal', 'rows', rows)
  if weights not in WEIGHTS:
    raise ValueError(f'seal: weights is one of {WEIGHTS}, got {weights!r}.')
  schedule = _penalty.checked_schedule(penalty)
  chosen = types.as_sequence(selector, 'selector')
  if chosen != types.as_sequence(chosen.optimiser, 'selector'):
    raise ValueError(
      'seal: the selector takes a bare optimiser: only rows of a batch move, '
      'once an update, so that it has neither a set nor steps nor a start.'
    )
  records = {
    'upper': _each_row(optax.with_extra_args_support(chosen.optimiser)),
    'lower': types.as_sequence(lower, 'lower'),
  }
  order = [_main(upper, row_losses, value is not None)]
  if value is not None:
    follow = lambda z, given: jnp.mean(
      given.weights * _rows_of(row_losses, z.value, given)
    )
    order.insert(
      0, oracles.gradient(follow, name='value', of='value', counts_as='lower')
    )
    records['value'] = types.as_sequence(
      value, 'value', start=lambda z: z.lower
    )
  _sequences.refuse_batches(
    'seal', 'all steps of an update see the rows of one batch', **records
  )
  inner = descent.descend(*order, **records)

  def init_fn(params):
    scores = jnp.zeros(rows, _trees.dtype_of(params))
    return SealState(
      jnp.zeros([], jnp.int32),
      {'selector': scores},
      jnp.zeros(2, scores.dtype),
      () if weights == 'sigmoid' else _log_sums.init(scores)[0],
      inner.init(_joint(jnp.zeros_like(scores), params)),
    )

  def update_fn(batch, state, params=None, **extra_args):
    base.require_batch(batch, params)
    at = jnp.asarray(index(batch))
    if at.ndim != 1 or not jnp.issubdtype(at.dtype, jnp.integer):
      raise TypeError(
        f'seal: index gives {at.dtype}{list(at.shape)}, expected whole numbers '
        'of the shape (batch,).'
      )
    # A negative one would be counted from the end.
    at = jnp.where((at >= 0) & (at < rows), at, rows)
    table = state.sequences['selector']
    before = _take(table, at)
    if weights == 'sigmoid':
      share = jax.nn.sigmoid(before)
      slopes = share * (1 - share)
    else:
      largest, rest = state.level
      # In this order: scores may be large and close to each other.
      share = jnp.exp(before - largest - rest)
      slopes = jnp.ones_like(share) if weights == 'mirror' else share
    gamma = jnp.asarray(schedule(state.count), table.dtype)
    # Also where the penalty is infinite.
    first = 1 / (1 + gamma)
    given = _Given(batch, at, share, slopes, (first, 1 - first))
    optimisers = dict(state.inner.optimisers)
    if 'upper' in optimisers:
      mine = _take(optimisers['upper'], at)
      count = jnp.broadcast_to(state.count, at.shape)
      optimisers['upper'] = states.at_update(mine, count)
    updates, after = inner.update(
      given,
      state.inner._replace(optimisers=optimisers),
      _joint(before, params),
      **extra_args,
    )
    scores = before + updates.upper
    if 'upper' in optimisers:
      kept = _put(
        state.inner.optimisers['upper'], at, after.optimisers['upper']
      )
      after = after._replace(optimisers=after.optimisers | {'upper': kept})
    table = _put(table, at, scores)
    level, sums = state.level, state.sums
    if weights != 'sigmoid':
      sums, level = _log_sums.update(sums, table, at)
      level = level.at[1].add(-jnp.log(jnp.asarray(rows, table.dtype)))
    return updates.lower, SealState(
      optax.safe_increment(state.count), {'selector': table}, level, sums, after
    )

  own = {n: s for n, s in inner.sequences.items() if n != 'upper'}
  # No `again`: its oracles see weights of the rows of a whole batch.
  return descent.Solver(
    init_fn, update_fn, inner.oracles, {'selector': chosen} | own
  )


def _joint(scores: chex.Array, params: Any) -> Any:
  return types.sequences(upper=scores, lower=params)


def seal_penalty(
  start: float = 1.0, *, decay: float, epoch: int, least: float = 0.01
) -> Callable[[chex.Numeric], chex.Numeric]:
  r"""The penalty of `seal` whose upper share falls by a number an epoch.

  .. math::
    w_e = \max(w_0 - e \, \delta, w_{min}), \qquad
    \gamma_k = \frac{1 - w_e}{w_e}, \qquad e = \lfloor k / K \rfloor

  Args:
    start: the share :math:`w_0` of the upper loss in the first epoch, in
      (0, 1]; with 1, the lower loss does not move the model there.
    decay: :math:`\delta \ge 0`, by which it falls each epoch.
    epoch: :math:`K`, updates in an epoch.
    least: the share at which it stays, in (0, 1].

  Returns:
    A schedule.

  Raises:
    ValueError: if a number is outside these bounds.

  Example:
    >>> import bilevel_jax as bj
    >>> schedule = bj.solvers.seal_penalty(1.0, decay=0.2, epoch=10)
    >>> print(f'{schedule(9):.2f} {schedule(10):.2f} {schedule(20):.2f}')
    0.00 0.25 0.67
  """
  _checks.whole('seal_penalty', 'updates in an epoch', epoch)
  for what, number in (('start', start), ('least', least)):
    _checks.within('seal_penalty', what, number, 0, 1, open_low=True)
  _checks.within('seal_penalty', 'the decay', decay, 0)

  def schedule(count: chex.Numeric) -> chex.Numeric:
    epochs = jnp.asarray(count) // epoch
    share = jnp.maximum(start - epochs * float(decay), min(least, start))
    return (1 - share) / share

  return schedule
