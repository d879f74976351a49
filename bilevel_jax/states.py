"""Changes to states: update counts, measured losses, counted evaluations.

A solver's state is a pytree of the states of its parts. Wrappers of oracles and
inner loops evaluate an oracle several times in one update. They then change
fields at any depth: update counts, measured losses and counted evaluations. All
such changes are in this module.

Schedules read a count of the solver's updates, not of evaluations.
`counts_updates` marks a state that has such a `count`; `UpdateCount` is the
smallest one. `hold_updates`, `next_update` and `at_update` change marked counts
and those of optax's own schedules, and leave all other counts alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _trees, types

# For your own states and links; the other functions are for wrappers.
__all__ = ['OracleState', 'UpdateCount', 'counts_updates', 'hold_updates']


def counts_updates(kind: type) -> type:
  """Marks a state whose `count` counts updates of the solver.

  Such a count changes only in the last evaluation of an update, so that a
  schedule has the same value in all inner steps and micro-batches.

  Args:
    kind: a NamedTuple with a field `count`, an int32 scalar.

  Returns:
    The same type.

  Example:
    >>> from typing import Any, NamedTuple
    >>> import bilevel_jax as bj
    >>> @bj.states.counts_updates
    ... class DecayState(NamedTuple):
    ...   count: Any
    ...   mean: Any
    >>> before, after = DecayState(3, 0.0), DecayState(4, 0.5)
    >>> bj.states.hold_updates(after, before)
    DecayState(count=3, mean=0.5)
  """
  kind.counts_updates = True  # type: ignore[attr-defined]
  return kind


@counts_updates
class UpdateCount(NamedTuple):
  """The number of updates so far, for an oracle that evaluates a schedule.

  Attributes:
    count: an int32 scalar.
  """

  count: chex.Array

  def next(self) -> 'UpdateCount':
    """The count after one more update."""
    return UpdateCount(optax.safe_increment(self.count))


def no_updates(params: Any = None) -> UpdateCount:
  """The count before the first update; the argument is not used."""
  del params
  return UpdateCount(_trees.zeros([], jnp.int32))


class OracleState(NamedTuple):
  """State of an oracle.

  Attributes:
    values: the losses of the last evaluation, by name, float32 or wider; None
      without losses.
    counts: evaluations so far, by `kind/loss`, int32; None without counts.
    inner: what the oracle needs in its next evaluation.
    outputs: the requested auxiliary outputs, by loss.
  """

  values: types.Named | None
  counts: types.Named | None
  inner: Any = ()
  outputs: Any = ()


def is_oracle_state(node: Any) -> bool:
  """Whether a node of a solver's state is an oracle's."""
  return isinstance(node, OracleState)


# States of optax that hold a schedule's count. The last one, for schedules
# under `inject_hyperparams`, has no public name.
_SCHEDULED: tuple[type, ...] = (
  optax.ScaleByScheduleState,
  optax.schedules.InjectStatefulHyperparamsState,
  type(jax.eval_shape(optax.schedules.WrappedSchedule(lambda k: k).init)),
)


def _is_scheduled(node: Any) -> bool:
  kind = type(node)
  return kind in _SCHEDULED or getattr(kind, 'counts_updates', False)


def _map_nodes(fn: Callable[..., Any], is_kind: Any, *states: Any) -> Any:
  """Maps the nodes of one kind in one or more states."""
  return jax.tree.map(
    lambda node, *others: fn(node, *others) if is_kind(node) else node,
    *states,
    is_leaf=is_kind,
  )


def hold_updates(after: Any, before: Any) -> Any:
  """Resets update counts after an evaluation that does not end an update.

  A schedule counts updates of the solver, not evaluations or inner steps. Call
  this after each evaluation in an update except the last.

  Args:
    after: a state of an oracle or of an optimiser.
    before: the same state before the evaluation.

  Returns:
    `after` with the update counts of `before`: those of states marked by
    `counts_updates`, of `optax.scale_by_schedule` (in every optimiser of optax
    whose step size is a schedule) and of `optax.inject_hyperparams`. Adam's
    count, the age of its moments, does not change.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> Count = bj.states.UpdateCount
    >>> bj.states.hold_updates({'a': Count(2)}, {'a': Count(1)})
    {'a': UpdateCount(count=1)}
  """

  def turn_back(now, then):
    fields = {
      name: hold_updates(getattr(now, name), getattr(then, name))
      for name in now._fields
      if name != 'count'
    }
    return now._replace(count=then.count, **fields)

  return _map_nodes(turn_back, _is_scheduled, after, before)


def at_update(state: Any, count: chex.Array) -> Any:
  """Sets the update counts of a state."""
  return _map_nodes(lambda now: now._replace(count=count), _is_scheduled, state)


def next_update(state: Any) -> Any:
  """Increments the update counts of a state, at any depth."""

  def move_on(now):
    fields = {n: next_update(getattr(now, n)) for n in now._fields}
    return now._replace(**fields)._replace(
      count=optax.safe_increment(now.count)
    )

  return _map_nodes(move_on, _is_scheduled, state)


def measured(state: Any) -> list[tuple[types.Named, Any]]:
  """Losses and outputs of all oracle states in a state, in order."""
  nodes = jax.tree.leaves(state, is_leaf=is_oracle_state)
  return [(n.values, n.outputs) for n in nodes if is_oracle_state(n)]


def replace_measured(state: Any, losses: list[tuple[types.Named, Any]]) -> Any:
  """Replaces the losses and outputs of the oracle states in a state."""
  remaining = iter(losses)

  def replace(node):
    values, outputs = next(remaining)
    return node._replace(values=values, outputs=outputs)

  return _map_nodes(replace, is_oracle_state, state)


def hold_measured(after: Any, before: Any) -> Any:
  """Restores the losses and outputs of an earlier state.

  Then nothing in a loop reads the new ones, and the compiler omits them.
  """
  return replace_measured(after, measured(before))


def map_inner(fn: Callable[[Any], Any], state: Any) -> Any:
  """Maps the field `inner` of each oracle state."""
  replace = lambda node: node._replace(inner=fn(node.inner))
  return _map_nodes(replace, is_oracle_state, state)


def nodes_with(state: Any, field: str, *, nested: bool = True) -> list[Any]:
  """Finds all nodes of a state that have a mapping in a field.

  Nodes are found by field, not by type, so that user-defined states can have
  the field too.

  Args:
    state: a solver's state.
    field: the name of the field, for instance `values`.
    nested: whether to search within such nodes as well.

  Returns:
    The nodes, outer before inner.
  """
  has = lambda node: isinstance(getattr(node, field, None), Mapping)
  nodes = []
  for node in jax.tree.leaves(state, is_leaf=has):
    if has(node):
      nodes.append(node)
      if nested and isinstance(node, tuple):
        nodes += nodes_with(tuple(node), field)
  return nodes


def add_counts(
  counts: types.Named | None, spent: Mapping[str, chex.Numeric]
) -> types.Named | None:
  """Adds evaluations to int32 counters that saturate at their maximum."""
  if counts is None:
    return None
  new = [spent.get(name, 0) for name in counts.names]
  fixed = all(isinstance(n, int) for n in new)
  more = (
    np.array(new, np.int32)
    if fixed
    else jnp.stack([jnp.asarray(n, jnp.int32) for n in new])
  )
  largest = np.int32(np.iinfo(np.int32).max)
  before = counts.array
  total = jnp.where(before > largest - more, largest, before + more)
  return types.Named(counts.names, total)


def also_spent(after: Any, before: Any, other: Any) -> Any:
  """Adds the evaluations of a second call from the same state.

  Args:
    after: the state after the first call.
    before: the state before both calls.
    other: the state after the second call, which is discarded.

  Returns:
    `after` with the evaluations of both calls, at any depth.
  """
  is_counted = lambda node: 'counts' in getattr(node, '_fields', ())

  def add(last, start, dropped):
    before = start.counts or {}
    spent = {n: dropped.counts[n] - before[n] for n in before}
    fields = {
      name: also_spent(*(getattr(x, name) for x in (last, start, dropped)))
      for name in last._fields
      if name != 'counts'
    }
    return last._replace(counts=add_counts(last.counts, spent), **fields)

  return _map_nodes(add, is_counted, after, before, other)


def _is_number(node: Any) -> bool:
  return isinstance(node, types.Named | types.Numbers)


def drop_numbers(state: Any) -> Any:
  """Replaces losses and counts in a state by None."""
  return _map_nodes(lambda node: None, _is_number, state)


def fill_numbers(state: Any, template: Any) -> Any:
  """Undoes `drop_numbers` with zeros in the shapes of a template."""
  leaves = iter(jax.tree.leaves(state))

  def fill(node):
    if _is_number(node):
      return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), node)
    return next(leaves)

  return jax.tree.map(fill, template, is_leaf=_is_number)
