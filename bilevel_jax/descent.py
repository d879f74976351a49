"""Order and movement: oracles in turn, and one record a sequence."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import (
  _checks,
  _packing,
  _records,
  _sequences,
  _trees,
  states,
  types,
)
from bilevel_jax.oracles import base
from bilevel_jax.parts import Solver
from bilevel_jax.projections import _set_handlers


class _Point(NamedTuple):
  """Where an update has come to."""

  z: Any
  optimisers: dict[str, Any]
  sets: dict[str, Any]

  def part(self, fields: set[str], names: tuple[str, ...]) -> Any:
    """What an inner loop carries of it: fields, and states of sequences."""
    pick = lambda tree, names: {n: tree[n] for n in names if n in tree}
    fields_of_z = pick(self.z._asdict(), fields)
    return fields_of_z, pick(self.optimisers, names), pick(self.sets, names)

  def with_part(self, part: Any) -> '_Point':
    """The same point with what a loop has carried."""
    fields, optimisers, sets = part
    z = self.z._replace(**fields)
    return _Point(z, self.optimisers | optimisers, self.sets | sets)


@_checks.removed(wrap='bj.evaluation.wrapped(solver, wrapper)')
def descend(
  *oracles: optax.GradientTransformation,
  **sequences: types.SequenceLike,
) -> Solver:
  r"""A solver: oracles in order, and for each sequence how it moves.

  .. math::
    z \leftarrow \Pi [ z + u(d_i(z; batch)) ] \quad
    \text{for each oracle } d_1, \dots, d_n \text{ in turn}

  Each oracle sees the sequences where the ones before it have moved them. All
  sequences that one oracle has gradients for move at once, each by its own
  optimiser, set and number of steps. So one oracle of several sequences moves
  them from one point, and several oracles move them in turn.

  Args:
    *oracles: oracles, or chains of one with an aggregator by
      `bj.oracles.aggregated`, in the order in which they are evaluated; each
      gets the same batch.
    **sequences: by name, a `Sequence` or a bare optax optimiser. With a
      `start`, the sequence is one that only the solver has: it is kept in
      state, and `bj.auxiliaries` gives it.

  Returns:
    A solver for parameters with named sequences; `bj.evaluation.wrapped` wraps
    its oracles. Its updates are None for sequences that no oracle moves. Losses
    and their outputs are those of an oracle's last evaluation in the update.

  Raises:
    TypeError: if a record is none, with the mend; at the call, if an oracle's
      gradients are a `Jacobian`, or if the batch is of the parameters' type.
    ValueError: without oracles; at init, if a sequence is missing or a set has
      no point in it; at the call, if a sequence has a gradient but no record,
      or if the sequences of one oracle have loops that do not fit.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.descend(  # V-PBGD, with a box and five inner steps
    ...   bj.lower_gradient(problem, of='value'),
    ...   bj.value_gap(problem, penalty=10.0),
    ...   upper=bj.Sequence(optax.sgd(0.1), set=lambda x: jnp.clip(x, 0, 0.5)),
    ...   lower=optax.sgd(0.1),
    ...   value=bj.Sequence(optax.sgd(0.1), steps=5, start=lambda p: p.lower),
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(100):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.upper)
    [0.5 0.5]
  """
  if not oracles:
    raise ValueError('descend takes at least one oracle.')
  order = tuple(base.as_oracle(one) for one in oracles)
  records = {n: types.as_sequence(s, n) for n, s in sequences.items()}
  links = {
    n: optax.with_extra_args_support(s.optimiser) for n, s in records.items()
  }
  kept = {n: _set_handlers.make_handler(n, s.set) for n, s in records.items()}
  uses = {u: 0 for k in kept.values() for u in k.uses}

  def parts_of(z):
    """The states of all parts at their start."""
    return _packing.Parts(
      tuple(oracle.init(z) for oracle in order),
      {n: links[n].init(getattr(z, n)) for n in records},
      {n: kept[n].init(z) for n in records},
    )

  def init_fn(params):
    # Copies: a buffer that params and state share could not be donated.
    copied = lambda tree: jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
    starts = _records.starts(records, params)
    added = {n: copied(start(params)) for n, start in starts.items()}
    z = _joint(params, added)
    dtype = _trees.dtype_of(z)
    return _packing.packed_at_start(parts_of(z), added, dtype, uses)

  def update_fn(batch, state, params=None, **extra_args):
    base.require_batch(batch, params)
    added = _records.starts(records, params)
    z = _joint(params, state.sequences)
    unpacked = _packing.unpacked(state, jax.eval_shape(parts_of, z))
    first = point = restarted(z, unpacked, params)
    inner_states, spent, moves = [], dict(uses), {}
    for index, inner in enumerate(unpacked.oracles):
      before = point.z
      loop = _records.loop_of(order[index], records, batch, inner, before)
      point, inner = run(index, loop, point, first, inner, extra_args)
      last = loop.batch(loop.steps - 1)
      point, inner, raw = one_step(
        index, None, point, first, inner, last, extra_args
      )
      point = settle(point, first, before, raw, 'finish')
      inner_states.append(inner)
      for name, update in raw.items():
        # One step is its own displacement, without the rounding of a sum.
        exact = name not in moves and loop.steps == 1
        free = records[name].set is None and not records[name].restart
        moves[name] = update if exact and free else None
        moves |= dict.fromkeys(kept[name].others)
        each = kept[name].each is not None and name in loop.looping
        for use, number in kept[name].uses.items():
          spent[use] += number * (loop.steps if each else 1)
    end = point.z
    updates = {
      n: optax.tree.sub(getattr(end, n), getattr(params, n)) if u is None else u
      for n, u in moves.items()
      if n in params._fields
    }
    after = _packing.Parts(tuple(inner_states), point.optimisers, point.sets)
    added = {n: getattr(end, n) for n in added}
    dtype = _trees.dtype_of(end)
    return _sequences.only(params, **updates), _packing.packed(
      after, added, dtype, spent, state
    )

  def restarted(z, unpacked, params):
    """Where an update begins."""
    optimisers = dict(unpacked.optimisers)
    for name, record in records.items():
      if record.restart:
        start: Any = record.start
        first = jax.tree.map(jnp.asarray, start(params))
        z = z._replace(**{name: first})
        fresh = links[name].init(first)
        optimisers[name] = states.hold_updates(fresh, optimisers[name])
    return _Point(z, optimisers, dict(unpacked.sets))

  def run(index, loop, point, first, inner, extra_args):
    """All evaluations but the last, as a loop that looks at no loss."""
    if loop.steps == 1:
      return point, inner
    fields = {o for n in loop.looping for o in (n, *kept[n].others)}

    def body(carry, t):
      part, before = carry
      here, batch = point.with_part(part), loop.batch(t)
      here, after, _ = one_step(
        index, loop.looping, here, first, before, batch, extra_args
      )
      # No schedule moves on, and no loss is looked at, before the last step.
      after = states.hold_updates(after, before)
      after = states.hold_measured(after, before)
      return (here.part(fields, loop.looping), after), None

    times = jnp.arange(loop.steps - 1, dtype=jnp.int32)
    carry = (point.part(fields, loop.looping), inner)
    (part, inner), _ = jax.lax.scan(body, carry, times)
    return point.with_part(part), inner

  def one_step(index, only, point, first, inner, batch, extra_args):
    """Evaluates an oracle, and moves what has a gradient, or only some.

    However often a sequence moves in an update, by one oracle or by several,
    its schedules are where they were at first.
    """
    z, optimisers = point.z, dict(point.optimisers)
    gradients, inner = order[index].update(batch, inner, z, **extra_args)
    _sequences.require_gradients(gradients, z, 'descend')
    raw, moved = {}, {}
    for name in z._fields:
      gradient, param = getattr(gradients, name), getattr(z, name)
      if gradient is None or (only is not None and name not in only):
        continue
      _records.require_records((name,), records)
      now = states.hold_updates(optimisers[name], first.optimisers[name])
      raw[name], optimisers[name] = _records.move(
        links[name], name, gradient, now, param, extra_args
      )
      moved[name] = optax.apply_updates(param, raw[name])
    loose = _Point(z._replace(**moved), optimisers, point.sets)
    return settle(loose, first, z, moved, 'each'), inner, raw

  def settle(point, first, before, names, stage):
    """The sets of these sequences, those that depend on others last."""
    z, sets = point.z, dict(point.sets)
    for name in sorted(names, key=lambda n: kept[n].order):
      if (enforce := getattr(kept[name], stage)) is not None:
        now = states.hold_updates(sets[name], first.sets[name])
        fields, sets[name] = enforce(z, before, now)
        z = z._replace(**fields)
    return point._replace(z=z, sets=sets)

  again = lambda *others: descend(*others, **sequences)
  return Solver(init_fn, update_fn, order, records, again)


def _joint(params: Any, added: dict[str, Any]) -> Any:
  """The parameters and the added sequences, as one NamedTuple."""
  if not added:
    return params
  return types.sequences(**params._asdict(), **added)
