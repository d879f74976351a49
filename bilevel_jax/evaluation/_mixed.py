"""A weighted sum of objectives, each evaluated on its own batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _trees, states
from bilevel_jax.evaluation import _rules, _select
from bilevel_jax.oracles import base


@states.counts_updates
class MixedState(NamedTuple):
  """State of `mixed`.

  Attributes:
    count: updates of the solver so far, an int32 scalar, for the schedule.
    taken: evaluations so far, an int32 scalar.
    inner: the states of the oracles.
  """

  count: chex.Array
  taken: chex.Array
  inner: Any


def mixed(
  oracles: _select.Oracles,
  weights: Sequence[float] | chex.Array | Callable[[Any], Any],
  *,
  batch_at: _select.BatchAt | None = None,
) -> base.Oracle:
  r"""The gradient of a weighted sum of objectives, each on its own batch.

  .. math::
    d_k = \sum_m w_m(k) \, \nabla f_m(z_k; \xi^m)

  The expectation of `select` with `at_random`, at the cost of all objectives.
  Gradients are added one after another, so memory holds at most two of them.
  For weights from an aggregator, use `bj.multi_objective` with `per_task`,
  which returns one row per objective.

  Args:
    oracles: one for each objective, in a sequence or by name. Their gradients
      have the same structure.
    weights: (objectives,), at least zero; or a schedule from the number of
      updates so far to that.
    batch_at: as in `select`.

  Returns:
    An oracle; `bj.values` has each loss without its weight.

  Raises:
    TypeError: as in `select`.
    ValueError: as in `select`, or if a constant weight is negative or not
      finite.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> fit = lambda x, rows: jnp.mean((x - rows) ** 2) / 2
    >>> oracle = bj.evaluation.mixed(
    ...   {name: bj.gradient(fit, name=name) for name in ('left', 'right')},
    ...   [0.75, 0.25],
    ... )
    >>> params = jnp.float32(0.0)
    >>> batch = {'left': jnp.ones(3), 'right': -jnp.ones(5)}
    >>> gradient, state = oracle.update(batch, oracle.init(params), params)
    >>> print(gradient, bj.values(state)['right'])
    -0.5 0.5
  """
  checked = _select.objectives('mixed', oracles)
  weights = _rules.checked_weights('mixed', weights)
  parts = checked.oracles
  number = len(parts)

  def init_fn(params):
    dtype = _trees.widest_dtype(params)
    start = jnp.zeros([], jnp.int32)
    jax.eval_shape(lambda: _rules.at_count(weights, start, number, dtype))
    inner = tuple(part.init(params) for part in parts)
    return MixedState(start, jnp.zeros([], jnp.int32), inner)

  def update_fn(batch, state, params=None, **extra_args):
    base.require_batch(batch, params)
    dtype = _trees.widest_dtype(params)
    current = _rules.at_count(weights, state.count, number, dtype)
    batches = checked.batches(batch, [state.taken] * number, batch_at)
    total, inner = None, []
    for i, part in enumerate(parts):
      gradients, after = part.update(
        batches(i), state.inner[i], params, **extra_args
      )
      inner.append(after)
      term = _trees.scaled(current[i], gradients)
      try:
        total = term if i == 0 else jax.tree.map(jnp.add, total, term)
      except (ValueError, TypeError) as error:
        forms: Any = [jax.tree.structure(t) for t in (total, term)]
        pair = (checked.names[0], checked.names[i])
        raise ValueError(_select.mismatch('mixed', pair, forms)) from error
    return total, MixedState(
      optax.safe_increment(state.count),
      optax.safe_increment(state.taken),
      tuple(inner),
    )

  again = lambda others: mixed(others, weights, batch_at=batch_at)
  return base.Oracle(
    init_fn,
    update_fn,
    checked.moves,
    averaged=_select.averaged(checked, again),
  )
