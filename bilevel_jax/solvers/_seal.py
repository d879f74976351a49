"""SEAL: data selection by a score for each row, learnt with the model."""

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

# From a row's score to its weight, and to the direction of the score.
WEIGHTS = ('softmax', 'mirror', 'sigmoid')


@states.counts_updates
class SealState(NamedTuple):
  """State of `seal`.

  Attributes:
    count: updates so far, an int32 scalar.
    sequences: the sequence `selector`: a score for each row, (rows,), float32
      or wider; rows of low score are to be left out.
    level: the normaliser of the softmax of all rows, (2,): the largest score,
      and the logarithm of the mean of the scores' exponentials minus that.
    sums: a tree of partial sums of these exponentials, level by level.
    inner: the state of the model's steps and of the scores' optimiser, whose
      leaves have a leading axis of rows.
  """

  count: chex.Array
  sequences: dict[str, Any]
  level: chex.Array
  sums: tuple[chex.Array, ...]
  inner: Any


class RowScores(NamedTuple):
  """The rows of `seal`, and how their scores move.

  Attributes:
    optimiser: any optax optimiser. It moves one score at a time: clipping by a
      global norm, for instance, acts on each row. Its schedules count updates
      of the solver; the ages of its moments count the visits of a row.
    rows: the number of rows :math:`N`.
    at: from a batch to the numbers of its rows, (batch,), in [0, rows).
      Other numbers make the losses NaN. A row that occurs twice takes one step,
      along both gradients.
    weights: 'softmax', 'mirror' or 'sigmoid'.
  """

  optimiser: Any
  rows: int
  at: Callable[[Any], Any]
  weights: str = 'softmax'


class _WeightedBatch(NamedTuple):
  """A batch with the weights of its rows.

  Attributes:
    batch: the batch of the solver.
    index: the numbers of its rows, (batch,).
    weights: the weights of its rows, (batch,).
    slopes: the derivative of each weight in its score, (batch,).
    shares: the weights of the upper and of the lower loss, two scalars.
  """

  batch: Any
  index: chex.Array
  weights: chex.Array
  slopes: chex.Array
  shares: tuple[chex.Array, chex.Array]


def _each_row(optimiser: Any) -> optax.GradientTransformation:
  """Maps an optimiser over rows, each with its own moments and age."""

  def update_fn(gradients, state, params=None, **extra_args):
    del extra_args
    return jax.vmap(optimiser.update)(gradients, state, params)

  return optax.GradientTransformationExtraArgs(
    jax.vmap(optimiser.init), update_fn
  )


def _take(tree: Any, index: chex.Array) -> Any:
  """Looks up table rows; missing rows are NaN."""
  return jax.tree.map(lambda a: a.at[index].get(mode='fill'), tree)


def _put(tree: Any, index: chex.Array, new: Any) -> Any:
  """Replaces table rows; rows outside of the table are dropped."""
  return jax.tree.map(
    lambda a, b: a.at[index].set(b.astype(a.dtype), mode='drop'), tree, new
  )


def _sum_repeated(index: chex.Array, numbers: chex.Array) -> chex.Array:
  """Replaces each number by the sum over equal indices."""
  _, place = jnp.unique(index, return_inverse=True, size=len(index))
  summed = jax.ops.segment_sum(numbers, place, len(index))
  return summed[place]


def _main(upper, row_losses, full: bool) -> base.Oracle:
  """Gradients of the model and of the scores of the rows, at one point."""
  above = base.Loss(upper, 'upper')

  def fn(z, rows, inner):
    def loss(y):
      f = above(y, rows.batch)
      losses = _checked_row_losses(row_losses, y, rows)
      g = jnp.mean(rows.weights * losses)
      return rows.shares[0] * f + rows.shares[1] * g, (f, g, losses)

    slope, (f, g, losses) = jax.grad(loss, has_aux=True)(z.lower)
    values: tuple[Any, ...] = (f, g)
    height = losses
    if full:
      height = losses - _checked_row_losses(row_losses, z.value, rows)
      values = (f, g, jnp.mean(rows.weights * height))
    scores = _sum_repeated(rows.index, rows.slopes * height / len(rows.index))
    scores = scores.astype(z.upper.dtype)
    return values, base.gradients(z, upper=scores, lower=slope), inner

  counts = {'gradients/upper': 1, 'gradients/lower': 1}
  return base.oracle(
    fn,
    ('upper', 'lower', *(['gap'] if full else [])),
    counts=counts | ({'losses/lower': 1} if full else {}),
    moves=('upper', 'lower'),
  )


def _checked_row_losses(row_losses, y, rows):
  """The losses of the rows of a batch, checked, in float32 or wider."""
  losses = jnp.asarray(row_losses(y, rows.batch))
  if losses.shape != rows.index.shape or not jnp.issubdtype(
    losses.dtype, jnp.floating
  ):
    raise TypeError(
      f'seal: row_losses gives {losses.dtype}{list(losses.shape)} for the '
      f'{rows.index.shape[0]} rows of a batch, expected one float for each: '
      'do not take their mean.'
    )
  return losses.astype(rows.weights.dtype)


@_checks.regrouped(
  'scores',
  RowScores,
  selector='optimiser',
  rows='rows',
  index='at',
  weights='weights',
)
def seal(
  upper: Callable[[Any, Any], Any],
  row_losses: Callable[[Any, Any], Any],
  *,
  scores: RowScores,
  penalty: types.ScalarOrSchedule,
  lower: types.SequenceLike,
  value: types.SequenceLike | None = None,
) -> descent.Solver:
  r"""SEAL: scores each row by the loss of a model that remains safe.

  .. math::
    \min_{\omega} f(\theta^*(\omega)) \quad \text{where} \quad
    \theta^*(\omega) \in \arg\min_\theta
    g(\omega, \theta) = \frac{1}{N} \sum_i p_i(\omega) \, \ell_i(\theta)

  by the penalty method. For a batch :math:`B` of rows, at one point,

  .. math::
    \theta_{k+1} &= \theta_k - \alpha \, c_k \nabla_\theta \left[
      f(\theta_k) + \frac{\gamma_k}{|B|} \sum_{i \in B} p_i \ell_i(\theta_k)
      \right], \qquad c_k = \frac{1}{1 + \gamma_k} \\
    \omega_i &\leftarrow \omega_i - \beta \, \frac{s_i}{|B|}
      \left[ \ell_i(\theta_k) \; - \; \ell_i(\hat\theta_{k+1}) \right],
      \qquad i \in B

  The last term is in the full form only, where a sequence `value` follows the
  minimiser of the lower loss. The form without it, that of the published
  program, needs one copy of the model less. As in that program, the step of the
  scores has no factor :math:`\gamma`: scores also move while the penalty is
  zero.

  | `weights` | p of a row | s | by plain descent |
  |---|---|---|---|
  | 'softmax' | N softmax(score) | p | as published |
  | 'mirror' | N softmax(score) | 1 | exponentiated gradient on the simplex |
  | 'sigmoid' | sigmoid(score) | p (1 - p) | rows are independent |

  Only the scores of rows in the batch move. An update costs a batch, also under
  `jax.vmap` over seeds; the cost grows with the logarithm of the number of
  rows, the depth of a tree of partial sums. This has three consequences:

  - The derivative of the softmax in all other scores, nearly the same number
    for each, is left out. If rows are visited equally often, in complete
    epochs, the ranking is the same. With Adam, that number would become a step
    of full size, and rows with fewer visits would look safe.
  - The optimiser moves each row separately, with its own moments and age. So
    Adam normalises the loss of each row, and the size of the loss is lost. Use
    plain descent to rank rows.
  - The normaliser of the softmax is the root of the tree. An update sums the
    ancestors of its rows again.

  With plain descent, a score is minus the sum of a row's losses at its visits:
  use complete epochs without replacement, or divide by the number of visits.

  Args:
    upper: the loss that the model has to keep low, from (parameters, batch) to
      a scalar.
    row_losses: the losses of the rows, from (parameters, batch) to (batch,),
      for instance from `bj.losses`.
    scores: the rows, and how their scores move.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule from the number of
      updates so far; `seal_penalty` is the published schedule.
    lower: how the model moves, an optax optimiser or a `Sequence`.
    value: how the sequence `value` moves, with its `steps`; None for the form
      without it.

  Returns:
    A solver for the model's parameters, any pytree. The scores, which start at
    zero, are `bj.auxiliaries(state)['selector']`; `bj.values` gives `upper`,
    `lower`, and in the full form `gap` and `value`.

  Raises:
    ValueError: if the number of rows is below 1, the penalty is negative, the
      kind of weights is unknown, or a record has a `batch_at`.
    TypeError: at the call, if a loss is not a scalar, `row_losses` does not
      give one number for each row, or `at` does not give whole numbers.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> data = jnp.array([1.0, 1.2, -3.0, 0.8])  # The third is an outlier.
    >>> solver = bj.solvers.seal(
    ...   lambda y, batch: (y - 1) ** 2,
    ...   lambda y, batch: (y - data[batch]) ** 2,
    ...   scores=bj.solvers.RowScores(
    ...     optax.sgd(0.1), rows=4, at=lambda batch: batch
    ...   ),
    ...   penalty=bj.solvers.seal_penalty(1.0, decay=0.1, epoch=2),
    ...   lower=optax.sgd(0.1),
    ... )
    >>> params = jnp.float32(0.0)
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for k in range(20):
    ...   batch = jnp.array([[0, 1], [2, 3]])[k % 2]
    ...   updates, state = step(batch, state, params)
    ...   params = bj.apply_updates(params, updates)
    >>> print(jnp.argmin(bj.auxiliaries(state)['selector']))
    2

  References:
    Shen, Chen, Das and Chen, `SEAL: Safety-enhanced Aligned LLM Fine-tuning via
    Bilevel Data Selection <https://arxiv.org/abs/2410.07471>`_, 2024; without
    the third sequence, Jiang, Xiao, Chen and Chen, `Beyond Value Functions
    <https://arxiv.org/abs/2507.20400>`_, 2025.
  """
  optimiser, rows, find_rows, weights = scores
  _checks.whole_number('seal', 'rows', rows)
  if weights not in WEIGHTS:
    raise ValueError(f'seal: weights is one of {WEIGHTS}, got {weights!r}.')
  schedule = _penalty.checked_schedule(penalty)
  selector = types.as_sequence(optimiser, 'selector')
  if selector != types.as_sequence(selector.optimiser, 'selector'):
    raise ValueError(
      'seal: the selector takes a bare optimiser, without set, steps and '
      'start, because only the rows of a batch move, once per update.'
    )
  records = {
    'upper': _each_row(optax.with_extra_args_support(selector.optimiser)),
    'lower': types.as_sequence(lower, 'lower'),
  }
  order = [_main(upper, row_losses, value is not None)]
  if value is not None:
    follow = lambda z, rows: jnp.mean(
      rows.weights * _checked_row_losses(row_losses, z.value, rows)
    )
    order.insert(
      0, oracles.gradient(follow, name='value', of='value', counts_as='lower')
    )
    records['value'] = types.as_sequence(
      value, 'value', start=lambda z: z.lower
    )
  _sequences.refuse_batches(
    'seal', 'all steps of an update use the rows of one batch', **records
  )
  inner = descent.descend(*order, **records)

  def init_fn(params):
    scores = jnp.zeros(rows, _trees.widest_dtype(params))
    return SealState(
      jnp.zeros([], jnp.int32),
      {'selector': scores},
      jnp.zeros(2, scores.dtype),
      () if weights == 'sigmoid' else _log_sums.init(scores)[0],
      inner.init(_joint(jnp.zeros_like(scores), params)),
    )

  def update_fn(batch, state, params=None, **extra_args):
    base.require_batch(batch, params)
    at = jnp.asarray(find_rows(batch))
    if at.ndim != 1 or not jnp.issubdtype(at.dtype, jnp.integer):
      raise TypeError(
        f'seal: `at` gives {at.dtype}{list(at.shape)}, expected whole numbers '
        'of the shape (batch,).'
      )
    # Negative numbers would count from the end.
    at = jnp.where((at >= 0) & (at < rows), at, rows)
    table = state.sequences['selector']
    before = _take(table, at)
    if weights == 'sigmoid':
      share = jax.nn.sigmoid(before)
      slopes = share * (1 - share)
    else:
      largest, rest = state.level
      # In this order, because scores may be large and close to each other.
      share = jnp.exp(before - largest - rest)
      slopes = jnp.ones_like(share) if weights == 'mirror' else share
    gamma = jnp.asarray(schedule(state.count), table.dtype)
    # In this form, because the penalty may be infinite.
    first = 1 / (1 + gamma)
    weighted = _WeightedBatch(batch, at, share, slopes, (first, 1 - first))
    optimisers = dict(state.inner.optimisers)
    if 'upper' in optimisers:
      row_states = _take(optimisers['upper'], at)
      count = jnp.broadcast_to(state.count, at.shape)
      optimisers['upper'] = states.at_update(row_states, count)
    updates, after = inner.update(
      weighted,
      state.inner._replace(optimisers=optimisers),
      _joint(before, params),
      **extra_args,
    )
    scores = before + updates.upper
    if 'upper' in optimisers:
      row_states = _put(
        state.inner.optimisers['upper'], at, after.optimisers['upper']
      )
      optimisers = after.optimisers | {'upper': row_states}
      after = after._replace(optimisers=optimisers)
    table = _put(table, at, scores)
    level, sums = state.level, state.sums
    if weights != 'sigmoid':
      sums, level = _log_sums.update(sums, table, at)
      level = level.at[1].add(-jnp.log(jnp.asarray(rows, table.dtype)))
    return updates.lower, SealState(
      optax.safe_increment(state.count), {'selector': table}, level, sums, after
    )

  own = {n: s for n, s in inner.sequences.items() if n != 'upper'}
  # No `again`, because its oracles need the weights of all rows of a batch.
  return descent.Solver(
    init_fn, update_fn, inner.oracles, {'selector': selector} | own
  )


def _joint(scores: chex.Array, params: Any) -> Any:
  return types.sequences(upper=scores, lower=params)
