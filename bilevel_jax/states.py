"""Changes to states: schedules held, losses replaced, evaluations added.

A solver's state is a pytree of the states of its parts. Wrappers of oracles and
inner loops evaluate an oracle several times in one update, and then change a
few fields at any depth: what counts updates, the losses measured and the
evaluations counted. All such changes are here.

A count that schedules read counts updates of the solver, not evaluations. State
that has such a `count` is marked by `counts_updates`; `UpdateCount` is the
smallest one. `hold_updates`, `next_update` and `at_update` move marked counts,
and those of optax's own schedules, and leave all other counts alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import types

# What a state and a link of one's own need; the rest is for wrappers.
__all__ = ['OracleState', 'UpdateCount', 'counts_updates', 'hold_updates']


def counts_updates(kind: type) -> type:
  """Marks a state whose `count` is of updates of the solver.

  Inner steps and micro-batches leave such a count alone until the update's last
  evaluation, so that what a schedule gives is the same in all of them.

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
  """How many updates an oracle has given, for what it schedules itself.

  Attributes:
    count: an int32 scalar.
  """

  count: chex.Array


class OracleState(NamedTuple):
  """State of an oracle.

  Attributes:
    values: the losses just measured, by name, float32 or wider; None if there
      are none.
    counts: evaluations so far, by `kind/loss`, int32; None if there
      are none.
    inner: what evaluating the losses needs from one step to the next.
    outputs: the auxiliary outputs of losses that are asked for, by loss.
  """

  values: types.Named | None
  counts: types.Named | None
  inner: Any = ()
  outputs: Any = ()


def is_oracle_state(node: Any) -> bool:
  """Whether a node of a solver's state is an oracle's."""
  return isinstance(node, OracleState)


# States of optax in which a schedule's count stands; the last one, of schedules
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
  """Maps the nodes of a kind of one or more states; all else stays."""
  return jax.tree.map(
    lambda node, *others: fn(node, *others) if is_kind(node) else node,
    *states,
    is_leaf=is_kind,
  )


def hold_updates(after: Any, before: Any) -> Any:
  """Turns back what counts updates, after an evaluation that ends none.

  A schedule counts updates of the solver, however many evaluations or inner
  steps one update takes. So all of them but the last are followed by this.

  Args:
    after: a state of an oracle or of an optimiser.
    before: the same state before the evaluation.

  Returns:
    `after`, with the counts of schedules from `before`: of states marked by
    `counts_updates`, of `optax.scale_by_schedule` and thus of every optimiser
    of optax with a schedule for a step size, and of `optax.inject_hyperparams`.
    Adam's count, the age of a moment, stays.

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
  """A state whose schedules are at this number of updates."""
  return _map_nodes(lambda now: now._replace(count=count), _is_scheduled, state)


def next_update(state: Any) -> Any:
  """Moves on what counts updates, by one, at any depth."""

  def move_on(now):
    fields = {n: next_update(getattr(now, n)) for n in now._fields}
    return now._replace(**fields)._replace(
      count=optax.safe_increment(now.count)
    )

  return _map_nodes(move_on, _is_scheduled, state)


def measured(state: Any) -> list[tuple[types.Named, Any]]:
  """Losses and their outputs in each oracle state of a state, in order."""
  nodes = jax.tree.leaves(state, is_leaf=is_oracle_state)
  return [(n.values, n.outputs) for n in nodes if is_oracle_state(n)]


def replace_measured(state: Any, losses: list[tuple[types.Named, Any]]) -> Any:
  """A solver's state with other losses and outputs in its oracle states."""
  left = iter(losses)

  def replace(node):
    values, outputs = next(left)
    return node._replace(values=values, outputs=outputs)

  return _map_nodes(replace, is_oracle_state, state)


def hold_measured(after: Any, before: Any) -> Any:
  """A state with the losses, and their outputs, of an earlier one.

  Nothing reads them within a loop, so that the compiler leaves them out.
  """
  return replace_measured(after, measured(before))


def map_inner(fn: Callable[[Any], Any], state: Any) -> Any:
  """Maps what each oracle keeps for its next evaluation."""
  replace = lambda node: node._replace(inner=fn(node.inner))
  return _map_nodes(replace, is_oracle_state, state)


def nodes_with(state: Any, field: str, *, nested: bool = True) -> list[Any]:
  """All nodes of a state that have a mapping in a field.

  By field and not by type, so that a link of a user's own can have it too.

  Args:
    state: a solver's state.
    field: the name of the field, `values` for instance.
    nested: whether to look for more of them within such a node.

  Returns:
    The nodes, outer ones before inner ones.
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
  """Adds evaluations to int32 counters, which stop at their largest value."""
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
  """Adds to a state what a second evaluation from the same state has spent.

  Args:
    after: the state after the evaluation that is kept.
    before: the state before both.
    other: the state after the evaluation that is dropped.

  Returns:
    `after`, its counts with those of `other` added, at any depth.
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
  """A state with None in place of losses and counts."""
  return _map_nodes(lambda node: None, _is_number, state)


def fill_numbers(state: Any, template: Any) -> Any:
  """Undoes `drop_numbers`, with zeros; the template has the shapes."""
  leaves = iter(jax.tree.leaves(state))

  def fill(node):
    if _is_number(node):
      return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), node)
    return next(leaves)

  return jax.tree.map(fill, template, is_leaf=_is_number)
