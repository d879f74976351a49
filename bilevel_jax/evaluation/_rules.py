"""Which of several objectives the next evaluation is of."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import _checks, _keys, types

# 2^32 over the golden ratio: multiples of it fill the circle evenly.
_STRIDE = np.uint32(2654435769)


class Rule(NamedTuple):
  """How `select` chooses, as pure functions of a state.

  Attributes:
    init: makes the state from the number of objectives and a float dtype.
    choose: `choose(state, count, taken) -> (index, state)`: the objective of
      this evaluation, from the number of updates and of evaluations so far;
      None where the batch says it.
    record: `record(state, losses, seen, fresh, count) -> state`: what is learnt
      of losses (objectives,), of which only those in the mask `seen` were
      evaluated; `fresh` says that all were, without a gradient.
    refresh_every: every how many evaluations all losses are evaluated before
      the choice; None for never.
  """

  init: Callable[[int, Any], Any]
  choose: Callable[..., tuple[chex.Array, Any]] | None
  record: Callable[..., Any]
  refresh_every: int | None = None


def _forget(state, losses, seen, fresh, count):
  del losses, seen, fresh, count
  return state


def checked_weights(who: str, weights: Any, positive: bool = False) -> Any:
  """Weights, checked if they are constant; a schedule stays as it is."""
  if callable(weights):
    return weights
  if np.ndim(weights) != 1 or not len(weights):
    raise ValueError(
      f'{who} takes one weight for each objective, or a schedule to that, got '
      f'{weights!r}.'
    )
  _checks.within(who, 'a weight', weights, 0)
  traced = isinstance(weights, jax.core.Tracer)
  if positive and not traced and not np.sum(weights) > 0:
    raise ValueError(f'{who}: no weight is above zero: {weights!r}.')
  return weights


def at_count(weights: Any, count: Any, number: int, dtype: Any) -> chex.Array:
  """Weights now, (objectives,), or an error where there are others."""
  found = weights(count) if callable(weights) else weights
  found = jnp.asarray(found, dtype)
  if found.shape != (number,):
    raise ValueError(
      f'there are {number} objectives, but the weights have shape '
      f'{found.shape}: one weight for each, (1 - share, share) for instance.'
    )
  return found


def at_random(
  weights: Sequence[float] | chex.Array | Callable[[Any], Any],
  *,
  key: Any,
  even: bool = False,
) -> Rule:
  r"""Draws the objective: m with a probability in proportion to its weight.

  .. math::
    \Pr(m_k = m) = w_m / \textstyle\sum_j w_j

  In expectation, the gradient of the objective drawn is that of the weighted
  sum. With `even`, the draws are a sequence of low discrepancy from a random
  start: of any stretch of evaluations, each objective has its share to within
  a few, which removes most of the noise of the coin.

  Args:
    weights: (objectives,), at least zero; or a schedule from the number of
      updates so far to that.
    key: PRNG key, or a whole number.
    even: whether draws are evenly spread rather than independent.

  Returns:
    A rule for `select`.

  Raises:
    ValueError: if constant weights are negative, not finite or all zero.
    TypeError: if the key is missing.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> one, two = (
    ...   bj.gradient(lambda x, b: (x - b) ** 2, name=name) for name in 'ab'
    ... )
    >>> rule = bj.evaluation.at_random([0.75, 0.25], key=0, even=True)
    >>> oracle = bj.evaluation.select([one, two], rule)
    >>> params = jnp.float32(0.0)
    >>> state = oracle.init(params)
    >>> for _ in range(8):
    ...   _, state = oracle.update((1.0, -1.0), state, params)
    >>> print(bj.counts(state))
    {'gradients/a': 6, 'gradients/b': 2}

  References:
    Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, `Understanding
    Forgetting in LLM Supervised Fine-Tuning and Preference Learning - A Convex
    Optimization Perspective <https://arxiv.org/abs/2410.15483>`_, 2024.
  """
  weights = checked_weights('at_random', weights, positive=True)
  _keys.as_key(key, 'at_random')

  def init(number, dtype):
    # The shape is known before the first update, and the error with it.
    jax.eval_shape(lambda: at_count(weights, jnp.int32(0), number, dtype))
    return _keys.as_key(key)

  def choose(state, count, taken):
    number, dtype = taken.shape[0], jnp.float32
    share = at_count(weights, count, number, dtype)
    edges = jnp.cumsum(share)
    if even:
      first = jax.random.bits(state, (), jnp.uint32)
      # Exact, since whole numbers wrap around.
      place = first + taken.sum().astype(jnp.uint32) * _STRIDE
      # The upper 24 bits: float32 has no more, and 1 itself is out.
      point = (place >> 8).astype(dtype) / np.float32(2**24)
      after = state
    else:
      after, draw = jax.random.split(state)
      point = jax.random.uniform(draw, (), dtype)
    # Where rounding puts the point on the last edge, it is of the last
    # objective that has a share.
    below = point * edges[-1]
    index = jnp.searchsorted(edges, below, side='right')
    last = number - 1 - jnp.argmax(share[::-1] > 0)
    return jnp.minimum(index, last).astype(jnp.int32), after

  return Rule(init, choose, _forget)


class GapState(NamedTuple):
  """State of `largest_gap`.

  Attributes:
    memo: what is known of each loss, (objectives,).
    optima: the estimates of the least losses, (objectives,).
  """

  memo: chex.Array
  optima: chex.Array


def largest_gap(
  weights: Sequence[float] | chex.Array | Callable[[Any], Any],
  *,
  optima: Sequence[float] | chex.Array | str,
  refresh_every: int | None = 10,
  share: types.ScalarOrSchedule = 1.0,
) -> Rule:
  r"""Takes the objective that is furthest from its optimum, by what it knows.

  .. math::
    m_k = \arg\max_m \; w_m (\hat f_m - f_m^*)

  The memo :math:`\hat f_m` of a loss is moved by its own training evaluations,
  :math:`\hat f_m \leftarrow \hat f_m + a (f_m - \hat f_m)`, and set anew, with
  all others, by an evaluation without gradients every so often. Of equal gaps,
  the first objective is taken. The weights are of the gaps, and not of the
  gradients: the step is along the gradient of the loss itself.

  What decides is a difference of noisy losses. Where the noise of a batch is
  larger than the gaps, give `select` rows of its own for the refresh
  (`refresh_at`), and a share below one.

  Args:
    weights: (objectives,), or a schedule from the number of updates to that.
    optima: the least value of each loss, (objectives,), from a run of each on
      its own for instance; or 'running', for the least memo so far. Zeros
      starve an objective whose optimum is far below those of the others.
    refresh_every: every how many evaluations all losses are evaluated, the
      first time before the first choice; None for that time only.
    share: :math:`a` in [0, 1], how far a memo moves; or a schedule from the
      number of updates so far.

  Returns:
    A rule for `select`.

  Raises:
    ValueError: if weights are negative or not finite, if optima are neither
      finite numbers nor 'running', or if the other numbers are out of range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> near = bj.gradient(lambda x, b: (x - 1) ** 2, name='near')
    >>> far = bj.gradient(lambda x, b: (x - 3) ** 2, name='far')
    >>> rule = bj.evaluation.largest_gap([0.5, 0.5], optima=[0.0, 0.0])
    >>> oracle = bj.evaluation.select([near, far], rule)
    >>> params = jnp.float32(0.0)
    >>> found, state = oracle.update((None, None), oracle.init(params), params)
    >>> print(found, state.rule.memo)
    -6.0 [1. 9.]

  References:
    Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, `Understanding
    Forgetting in LLM Supervised Fine-Tuning and Preference Learning - A Convex
    Optimization Perspective <https://arxiv.org/abs/2410.15483>`_, 2024.
  """
  who = 'largest_gap'
  weights = checked_weights(who, weights)
  running = isinstance(optima, str)
  if running and optima != 'running':
    raise ValueError(
      f"{who}: optima are one number for each loss, or 'running', got "
      f'{optima!r}.'
    )
  if not running:
    _checks.within(who, 'an optimum', optima, -float('inf'))
  if refresh_every is not None:
    _checks.whole_number(who, 'evaluations as `refresh_every`', refresh_every)
  _checks.within(who, 'the share', share, 0, 1)

  def init(number, dtype):
    jax.eval_shape(lambda: at_count(weights, jnp.int32(0), number, dtype))
    if running:
      best = jnp.full([number], jnp.inf, dtype)
    else:
      best = jnp.array(optima, dtype)
      if best.shape != (number,):
        raise ValueError(
          f'{who}: there are {number} objectives, but the optima have shape '
          f'{best.shape}.'
        )
    return GapState(jnp.zeros([number], dtype), best)

  def choose(state, count, taken):
    number, dtype = taken.shape[0], state.memo.dtype
    now = at_count(weights, count, number, dtype)
    gaps = now * (state.memo - state.optima)
    # A loss that is not a number decides nothing.
    gaps = jnp.where(jnp.isnan(gaps), -jnp.inf, gaps)
    return jnp.argmax(gaps).astype(jnp.int32), state

  def record(state, losses, seen, fresh, count):
    dtype = state.memo.dtype
    rate = share(count) if callable(share) else share
    rate = jnp.asarray(1.0 if fresh else rate, dtype)
    losses = losses.astype(dtype)
    moved = state.memo + rate * (losses - state.memo)
    # A difference would lose what is small beside a first loss that is huge.
    moved = jnp.where(rate == 1.0, losses, moved)
    memo = jnp.where(seen, moved, state.memo)
    best = state.optima
    if running:
      best = jnp.where(seen, jnp.fmin(best, memo), best)
    return GapState(memo, best)

  # None is a time that never comes again.
  every = np.iinfo(np.int32).max if refresh_every is None else refresh_every
  return Rule(init, choose, record, every)


def in_sequence(steps: Sequence[int]) -> Rule:
  """One objective after the other, each for so many updates.

  The baseline of training in stages. The last objective goes on for as long as
  the run does.

  Args:
    steps: the number of updates with each objective but the last; whole
      numbers, or int32 scalars that may be traced.

  Returns:
    A rule for `select`.

  Raises:
    ValueError: if a number of steps is no whole number above zero.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> one, two = (
    ...   bj.gradient(lambda x, b: (x - b) ** 2, name=name) for name in 'ab'
    ... )
    >>> rule = bj.evaluation.in_sequence([2])
    >>> oracle = bj.evaluation.select([one, two], rule)
    >>> params = jnp.float32(0.0)
    >>> state = oracle.init(params)
    >>> for _ in range(5):
    ...   _, state = oracle.update((1.0, -1.0), state, params)
    >>> print(bj.counts(state))
    {'gradients/a': 2, 'gradients/b': 3}
  """
  lengths = [
    n
    if isinstance(n, jax.Array)
    else np.int32(_checks.whole_number('in_sequence', 'updates', n))
    for n in steps
  ]

  def init(number, dtype):
    del dtype
    if number != len(lengths) + 1:
      raise ValueError(
        f'in_sequence: {len(lengths)} numbers of updates are for '
        f'{len(lengths) + 1} objectives, the last of which has no end; there '
        f'are {number}.'
      )
    return ()

  def choose(state, count, taken):
    del taken
    index, edge = jnp.int32(0), jnp.int32(0)
    for length in lengths:
      edge = edge + jnp.asarray(length, jnp.int32)
      index = index + (count >= edge)
    return index, state

  return Rule(init, choose, _forget)


def as_given() -> Rule:
  """The objective of which the batch is: a dict of one batch, by its name.

  For data that a host reads: it draws the objective, and reads and sends the
  batch of that one alone. There is no branch, but a program for each objective,
  and the choice is one for all seeds under `jax.vmap`.

  Returns:
    A rule for `select`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> fit = lambda x, rows: jnp.mean((x - rows) ** 2)
    >>> given = {name: bj.gradient(fit, name=name) for name in ('old', 'new')}
    >>> oracle = bj.evaluation.select(given, bj.evaluation.as_given())
    >>> params = jnp.float32(0.0)
    >>> state = oracle.init(params)
    >>> for batch in ({'old': jnp.ones(2)}, {'new': jnp.zeros(5)}):
    ...   found, state = oracle.update(batch, state, params)
    >>> print(found, bj.counts(state))
    0.0 {'gradients/old': 1, 'gradients/new': 1}
  """
  return Rule(lambda number, dtype: (), None, _forget)
