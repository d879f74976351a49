"""Rules by which `select` chooses the next objective."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import _checks, _keys, types

# 2^32 / golden ratio: its multiples modulo 2^32 are evenly spread.
_STRIDE = np.uint32(2654435769)


class Rule(NamedTuple):
  """How `select` chooses the next objective, as pure functions of a state.

  Attributes:
    init: makes the state from the number of objectives and a float dtype.
    choose: `choose(state, count, taken) -> (index, state)`, where `count` is
      the number of updates so far and `taken` the number of evaluations of each
      objective; None if the batch names its objective.
    record: `record(state, losses, evaluated, fresh, count) -> state` updates
      the state by losses (objectives,), valid where the mask `evaluated` is
      true; `fresh` is true if all losses were evaluated, without gradients.
    refresh_every: how many evaluations pass between evaluations of all losses,
      which precede the choice; None for no such evaluations.
  """

  init: Callable[[int, Any], Any]
  choose: Callable[..., tuple[chex.Array, Any]] | None
  record: Callable[..., Any]
  refresh_every: int | None = None


def _ignore_losses(state, losses, evaluated, fresh, count):
  del losses, evaluated, fresh, count
  return state


def checked_weights(caller: str, weights: Any, positive: bool = False) -> Any:
  """Checks constant weights; returns a schedule unchanged."""
  if callable(weights):
    return weights
  if np.ndim(weights) != 1 or not len(weights):
    raise ValueError(
      f'{caller} takes one weight for each objective, or a schedule of these, '
      f'got {weights!r}.'
    )
  _checks.within(caller, 'a weight', weights, 0)
  traced = isinstance(weights, jax.core.Tracer)
  if positive and not traced and not np.sum(weights) > 0:
    raise ValueError(f'{caller}: no weight is above zero: {weights!r}.')
  return weights


def at_count(weights: Any, count: Any, number: int, dtype: Any) -> chex.Array:
  """The current weights, (objectives,); ValueError for another shape."""
  current = weights(count) if callable(weights) else weights
  current = jnp.asarray(current, dtype)
  if current.shape != (number,):
    raise ValueError(
      f'there are {number} objectives, but the weights have shape '
      f'{current.shape}: pass one for each, (1 - share, share) for instance.'
    )
  return current


def at_random(
  weights: Sequence[float] | chex.Array | Callable[[Any], Any],
  *,
  key: Any,
  even: bool = False,
) -> Rule:
  r"""Draws each objective with a probability proportional to its weight.

  .. math::
    \Pr(m_k = m) = w_m / \textstyle\sum_j w_j

  The expected gradient is that of the weighted sum. With `even`, the draws are
  a low-discrepancy sequence from a random start: in any window of evaluations
  each objective has its share to within a few, which removes most of the
  variance of independent draws.

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
    # Raises an error for a wrong shape already at init.
    jax.eval_shape(lambda: at_count(weights, jnp.int32(0), number, dtype))
    return _keys.as_key(key)

  def choose(state, count, taken):
    number, dtype = taken.shape[0], jnp.float32
    share = at_count(weights, count, number, dtype)
    edges = jnp.cumsum(share)
    if even:
      first = jax.random.bits(state, (), jnp.uint32)
      # Exact, since integers wrap around.
      bits = first + taken.sum().astype(jnp.uint32) * _STRIDE
      # The upper 24 bits are exact in float32 and keep the point below 1.
      point = (bits >> 8).astype(dtype) / np.float32(2**24)
      after = state
    else:
      after, draw = jax.random.split(state)
      point = jax.random.uniform(draw, (), dtype)
    # If rounding moves the point onto the last edge, take the last objective
    # with a positive weight.
    index = jnp.searchsorted(edges, point * edges[-1], side='right')
    last = number - 1 - jnp.argmax(share[::-1] > 0)
    return jnp.minimum(index, last).astype(jnp.int32), after

  return Rule(init, choose, _ignore_losses)


class GapState(NamedTuple):
  """State of `largest_gap`.

  Attributes:
    memo: the running estimate of each loss, (objectives,).
    optima: the estimated minimum of each loss, (objectives,).
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
  r"""Takes the objective with the largest estimated distance to its optimum.

  .. math::
    m_k = \arg\max_m \; w_m (\hat f_m - f_m^*)

  Each training evaluation of a loss updates its estimate,
  :math:`\hat f_m \leftarrow \hat f_m + a (f_m - \hat f_m)`, and every
  `refresh_every` evaluations all losses are evaluated without gradients and
  replace the estimates. The first of equal gaps wins. Weights multiply gaps,
  not gradients: the step follows the gradient of the unweighted loss.

  The choice compares noisy losses. If the noise of a batch exceeds the gaps,
  give `select` other data for the refresh (`refresh_at`) and use a share below
  one.

  Args:
    weights: (objectives,), or a schedule from the number of updates to that.
    optima: the minimum of each loss, (objectives,), from single-objective runs
      for instance; or 'running' for the smallest estimate so far. With zeros,
      an objective whose optimum is far below the others is rarely chosen.
    refresh_every: evaluations between refreshes; the first refresh precedes the
      first choice. None for only that one.
    share: :math:`a` in [0, 1], the weight of a new loss in its estimate; or a
      schedule from the number of updates so far.

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
    >>> slope, state = oracle.update((None, None), oracle.init(params), params)
    >>> print(slope, state.rule.memo)
    -6.0 [1. 9.]

  References:
    Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, `Understanding
    Forgetting in LLM Supervised Fine-Tuning and Preference Learning - A Convex
    Optimization Perspective <https://arxiv.org/abs/2410.15483>`_, 2024.
  """
  name = 'largest_gap'
  weights = checked_weights(name, weights)
  running = isinstance(optima, str)
  if running and optima != 'running':
    raise ValueError(
      f"{name}: optima are one number for each loss, or 'running', got "
      f'{optima!r}.'
    )
  if not running:
    _checks.within(name, 'an optimum', optima, -float('inf'))
  if refresh_every is not None:
    _checks.whole_number(name, 'evaluations as `refresh_every`', refresh_every)
  _checks.within(name, 'the share', share, 0, 1)

  def init(number, dtype):
    jax.eval_shape(lambda: at_count(weights, jnp.int32(0), number, dtype))
    if running:
      best = jnp.full([number], jnp.inf, dtype)
    else:
      best = jnp.array(optima, dtype)
      if best.shape != (number,):
        raise ValueError(
          f'{name}: there are {number} objectives, but the optima have shape '
          f'{best.shape}.'
        )
    return GapState(jnp.zeros([number], dtype), best)

  def choose(state, count, taken):
    number, dtype = taken.shape[0], state.memo.dtype
    now = at_count(weights, count, number, dtype)
    gaps = now * (state.memo - state.optima)
    # Never choose an objective whose loss is NaN.
    gaps = jnp.where(jnp.isnan(gaps), -jnp.inf, gaps)
    return jnp.argmax(gaps).astype(jnp.int32), state

  def record(state, losses, evaluated, fresh, count):
    dtype = state.memo.dtype
    rate = share(count) if callable(share) else share
    rate = jnp.asarray(1.0 if fresh else rate, dtype)
    losses = losses.astype(dtype)
    moved = state.memo + rate * (losses - state.memo)
    # The difference would round away a loss much smaller than the memo.
    moved = jnp.where(rate == 1.0, losses, moved)
    memo = jnp.where(evaluated, moved, state.memo)
    best = state.optima
    if running:
      best = jnp.where(evaluated, jnp.fmin(best, memo), best)
    return GapState(memo, best)

  # For None, a period that no run completes.
  every = np.iinfo(np.int32).max if refresh_every is None else refresh_every
  return Rule(init, choose, record, every)


def in_sequence(steps: Sequence[int]) -> Rule:
  """Trains on one objective after another, each for a number of updates.

  The baseline of training in stages. The last stage has no end.

  Args:
    steps: the number of updates with each objective but the last; whole
      numbers, or int32 scalars that may be traced.

  Returns:
    A rule for `select`.

  Raises:
    ValueError: if a number of steps is not a whole number above zero.

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
        f'{len(lengths) + 1} objectives, since the last stage has no end, but '
        f'there are {number}.'
      )
    return ()

  def choose(state, count, taken):
    del taken
    index, edge = jnp.int32(0), jnp.int32(0)
    for length in lengths:
      edge = edge + jnp.asarray(length, jnp.int32)
      index = index + (count >= edge)
    return index, state

  return Rule(init, choose, _ignore_losses)


def as_given() -> Rule:
  """Takes the objective that names the batch, a dict with one entry.

  For a data loader on the host, which draws the objective and reads only its
  batch. The program has no branch; it compiles once per objective. Under
  `jax.vmap` all seeds share the choice.

  Returns:
    A rule for `select`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> fit = lambda x, rows: jnp.mean((x - rows) ** 2)
    >>> parts = {name: bj.gradient(fit, name=name) for name in ('old', 'new')}
    >>> oracle = bj.evaluation.select(parts, bj.evaluation.as_given())
    >>> params = jnp.float32(0.0)
    >>> state = oracle.init(params)
    >>> for batch in ({'old': jnp.ones(2)}, {'new': jnp.zeros(5)}):
    ...   gradient, state = oracle.update(batch, state, params)
    >>> print(gradient, bj.counts(state))
    0.0 {'gradients/old': 1, 'gradients/new': 1}
  """
  return Rule(lambda number, dtype: (), None, _ignore_losses)
