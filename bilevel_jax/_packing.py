"""The layout of a solver's state between updates: few arrays, no empty nodes.

Each array and each node of a state costs a microsecond per call of a compiled
step. So between updates, one array has the losses of all oracles and another
one their evaluations; empty parts are left out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import _trees, states, types


class DescendState(NamedTuple):
  """State of `bj.descend`.

  Attributes:
    sequences: the sequences that are in the state only, by name.
    optimisers: the states of the sequences' optimisers, by name; empty states
      are left out.
    oracles: the state of each oracle, in order; () if it is empty.
    sets: the states of the sequences' sets, by name; empty states are left out.
    numbers: the losses of all oracles, and evaluations and projections so far.
  """

  sequences: dict[str, Any]
  optimisers: dict[str, Any]
  oracles: tuple[Any, ...]
  sets: dict[str, Any]
  numbers: types.Numbers | None


class Parts(NamedTuple):
  """The complete states of all parts, as an update uses them."""

  oracles: tuple[Any, ...]
  optimisers: dict[str, Any]
  sets: dict[str, Any]


def _is_named(node):
  return isinstance(node, types.Named)


def _stripped(parts: Parts) -> tuple[dict[str, Any], list[Any], list[Any]]:
  """Separates states into nonempty nodes, losses and evaluations."""
  values: list[Any] = []
  counts: list[Any] = []

  def take(path, node):
    if not _is_named(node):
      return node
    (counts if path[-1].name == 'counts' else values).append(node)
    return ()

  bare = jax.tree_util.tree_map_with_path(take, parts, is_leaf=_is_named)
  full = lambda named: {n: s for n, s in named.items() if jax.tree.leaves(s)}
  oracles = tuple(s if jax.tree.leaves(s) else () for s in bare.oracles)
  fields = {
    'optimisers': full(bare.optimisers),
    'oracles': oracles,
    'sets': full(bare.sets),
  }
  return fields, values, counts


def packed_at_start(
  parts: Parts, added: dict[str, Any], dtype: Any, uses: dict[str, int]
) -> DescendState:
  """The state before the first update, with zero losses and counts.

  Args:
    parts: the states of all parts.
    added: the sequences that are in the state only.
    dtype: the dtype of losses.
    uses: by name, other counters, for instance of projections.
  """
  fields, measured, evaluated = _stripped(parts)
  values = tuple(dict.fromkeys(n for node in measured for n in node))
  counts = tuple(dict.fromkeys([*uses, *(n for m in evaluated for n in m)]))
  zeros = lambda names, kind: _trees.zeros(len(names), kind) if names else None
  numbers = None
  if values or counts:
    numbers = types.Numbers(
      values, zeros(values, dtype), counts, zeros(counts, jnp.int32)
    )
  return DescendState(added, numbers=numbers, **fields)


def packed(
  parts: Parts,
  added: dict[str, Any],
  dtype: Any,
  spent: dict[str, Any],
  before: DescendState,
) -> DescendState:
  """The state after an update.

  Args:
    parts: the states of all parts, with the evaluations of this update.
    added: the sequences that are in the state only.
    dtype: the dtype of losses.
    spent: by name, other counts of this update, for instance projections.
    before: the state before the update, whose evaluations are added.
  """
  fields, measured, evaluated = _stripped(parts)
  values: dict[str, Any] = {}
  counts: dict[str, Any] = dict(spent)
  for node in measured:
    values.update(node)
  for node in evaluated:
    counts.update({n: counts.get(n, 0) + node[n] for n in node})
  numbers = None
  if values or counts:
    losses = [jnp.asarray(x, dtype) for x in values.values()]
    so_far = before.numbers.counts if before.numbers is not None else None
    total = states.add_counts(so_far, counts)
    numbers = types.Numbers(
      tuple(values),
      jnp.stack(losses) if losses else None,
      tuple(counts),
      None if total is None else total.array,
    )
  return DescendState(added, numbers=numbers, **fields)


def require_state(state: Any) -> None:
  """Raises TypeError unless a value is the state of `bj.descend`."""
  if not isinstance(state, DescendState):
    raise TypeError(
      f'the state is {type(state).__name__}, expected that of this solver: '
      'call state = solver.init(params) before the first update, and '
      'solver.update(batch, state, params).'
    )


def unpacked(state: DescendState, template: Any) -> Parts:
  """The complete states of all parts, with zero evaluations.

  Losses are those of the last update, as an oracle may leave them unchanged.

  Args:
    state: the state of the solver.
    template: the shapes of the states of all parts.
  """
  remaining = iter(
    jax.tree.leaves((state.oracles, state.optimisers, state.sets))
  )

  def fill(path, node):
    if not _is_named(node):
      return next(remaining)
    shape, dtype = node.array.shape, node.array.dtype
    if path[-1].name == 'counts':
      return types.Named(node.names, jnp.zeros(shape, dtype))
    numbers: Any = state.numbers
    known = numbers.value_names
    index = np.array([known.index(name) for name in node.names])
    return types.Named(node.names, numbers.value_array[index].astype(dtype))

  return jax.tree_util.tree_map_with_path(fill, template, is_leaf=_is_named)
