"""Solvers: oracles evaluated in order, and a record for each sequence."""

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
  """The sequences and their states within an update."""

  z: Any
  optimisers: dict[str, Any]
  sets: dict[str, Any]

  def part(self, fields: set[str], names: tuple[str, ...]) -> Any:
    """The fields and states that an inner loop carries."""
    pick = lambda tree, names: {n: tree[n] for n in names if n in tree}
    fields_of_z = pick(self.z._asdict(), fields)
    return fields_of_z, pick(self.optimisers, names), pick(self.sets, names)

  def with_part(self, part: Any) -> '_Point':
    """Replaces the fields and states that a loop has carried."""
    fields, optimisers, sets = part
    z = self.z._replace(**fields)
    return _Point(z, self.optimisers | optimisers, self.sets | sets)


@_checks.removed(wrap='bj.evaluation.wrapped(solver, wrapper)')
def descend(
  *oracles: optax.GradientTransformation,
  **sequences: types.SequenceLike,
) -> Solver:
  r"""Makes a solver from oracles in order and a record for each sequence.

  .. math::
    z \leftarrow \Pi [ z + u(d_i(z; batch)) ] \quad
    \text{for each oracle } d_1, \dots, d_n \text{ in turn}

  Each oracle sees the sequences as the previous oracles have moved them. All
  sequences for which one oracle gives gradients move at once, each by its own
  optimiser, set and number of steps. Thus one oracle of several sequences moves
  them from one point, and several oracles move them in turn.

  Args:
    *oracles: oracles in the order of evaluation, or oracles with aggregators,
      by `bj.oracles.aggregated`. Each gets the same batch.
    **sequences: by name, a `Sequence` or a bare optax optimiser. A record with
      a `start` adds a sequence that is in the solver's state only;
      `bj.auxiliaries` returns it.

  Returns:
    A solver for parameters with named sequences; `bj.evaluation.wrapped` wraps
    its oracles. Its updates are None for sequences that no oracle moves. Losses
    and outputs are those of an oracle's last evaluation in the update.

  Raises:
    TypeError: if a record is neither a `Sequence` nor an optimiser; at the
      call, if an oracle's gradients are a `Jacobian`, or if the batch has the
      type of the parameters.
    ValueError: without oracles; at init, if a sequence is missing or a set is
      empty; at the call, if a sequence has a gradient but no record, or if the
      sequences of one oracle have incompatible loops.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.descend(  # V-PBGD with a box and five inner steps.
    ...   bj.lower_gradient(toy.problem, of='value'),
    ...   bj.value_gap(toy.problem, penalty=10.0),
    ...   upper=bj.Sequence(optax.sgd(0.1), set=lambda x: jnp.clip(x, 0, 0.5)),
    ...   lower=optax.sgd(0.1),
    ...   value=bj.Sequence(optax.sgd(0.1), steps=5, start=lambda p: p.lower),
    ... )
    >>> params, state = bj.testing.run(solver, toy.params, 100)
    >>> print(params.upper)
    [0.5 0.5]
  """
  if not oracles:
    raise ValueError('descend takes at least one oracle.')
  order = tuple(base.as_oracle(one) for one in oracles)
  records = {n: types.as_sequence(s, n) for n, s in sequences.items()}
  for one in order:
    _records.require_records(one.moves or (), records)
  links = {
    n: optax.with_extra_args_support(s.optimiser) for n, s in records.items()
  }
  sets = {n: _set_handlers.make_handler(n, s.set) for n, s in records.items()}
  uses = {u: 0 for s in sets.values() for u in s.uses}

  def init_parts(z):
    """The initial states of all parts."""
    return _packing.Parts(
      tuple(oracle.init(z) for oracle in order),
      {n: links[n].init(getattr(z, n)) for n in records},
      {n: sets[n].init(z) for n in records},
    )

  def init_fn(params):
    starts = _records.starts(records, params)
    _trees.require_real(params)
    # Copies, because buffers that params and state share cannot be donated.
    copied = lambda tree: jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
    added = {n: copied(start(params)) for n, start in starts.items()}
    z = _joint(params, added)
    dtype = _trees.widest_dtype(z)
    return _packing.packed_at_start(init_parts(z), added, dtype, uses)

  def update_fn(batch, state, params=None, **extra_args):
    base.require_batch(batch, params)
    _packing.require_state(state)
    added = _records.starts(records, params)
    z = _joint(params, state.sequences)
    unpacked = _packing.unpacked(state, jax.eval_shape(init_parts, z))
    first = point = restarted(z, unpacked, params)
    inner_states, spent, moves = [], dict(uses), {}
    for index, inner in enumerate(unpacked.oracles):
      before = point.z
      loop = _records.make_loop(order[index], records, batch, inner, before)
      point, inner = run(index, loop, point, first, inner, extra_args)
      last = loop.batch(loop.steps - 1)
      point, inner, raw = one_step(
        index, None, point, first, inner, last, extra_args
      )
      point = settle(point, first, before, raw, 'finish')
      inner_states.append(inner)
      for name, update in raw.items():
        # The update of a single step is exact; a difference would be rounded.
        exact = name not in moves and loop.steps == 1
        free = records[name].set is None and not records[name].restart
        moves[name] = update if exact and free else None
        moves |= dict.fromkeys(sets[name].others)
        each = sets[name].each is not None and name in loop.looping
        for use, number in sets[name].uses.items():
          spent[use] += number * (loop.steps if each else 1)
    end = point.z
    updates = {
      n: optax.tree.sub(getattr(end, n), getattr(params, n)) if u is None else u
      for n, u in moves.items()
      if n in params._fields
    }
    after = _packing.Parts(tuple(inner_states), point.optimisers, point.sets)
    added = {n: getattr(end, n) for n in added}
    dtype = _trees.widest_dtype(end)
    return _sequences.only(params, **updates), _packing.packed(
      after, added, dtype, spent, state
    )

  def restarted(z, unpacked, params):
    """The sequences at the start of an update."""
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
    """Makes all evaluations but the last, as a loop."""
    if loop.steps == 1:
      return point, inner
    fields = {o for n in loop.looping for o in (n, *sets[n].others)}

    def body(carry, t):
      part, before = carry
      here, batch = point.with_part(part), loop.batch(t)
      here, after, _ = one_step(
        index, loop.looping, here, first, before, batch, extra_args
      )
      # Schedules and losses change in the last evaluation only.
      after = states.hold_updates(after, before)
      after = states.hold_measured(after, before)
      return (here.part(fields, loop.looping), after), None

    times = jnp.arange(loop.steps - 1, dtype=jnp.int32)
    carry = (point.part(fields, loop.looping), inner)
    (part, inner), _ = jax.lax.scan(body, carry, times)
    return point.with_part(part), inner

  def one_step(index, only, point, first, inner, batch, extra_args):
    """Evaluates an oracle and moves the sequences with gradients, or `only`.

    All steps of a sequence in one update use the same values of schedules.
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
    """Enforces the sets, after the sets that they depend on."""
    z, set_states = point.z, dict(point.sets)
    for name in sorted(names, key=lambda n: sets[n].order):
      if (enforce := getattr(sets[name], stage)) is not None:
        now = states.hold_updates(set_states[name], first.sets[name])
        fields, set_states[name] = enforce(z, before, now)
        z = z._replace(**fields)
    return point._replace(z=z, sets=set_states)

  again = lambda *others: descend(*others, **sequences)
  return Solver(init_fn, update_fn, order, records, again)


def _joint(params: Any, added: dict[str, Any]) -> Any:
  """Joins the parameters and the added sequences in one NamedTuple."""
  if not added:
    return params
  return types.sequences(**params._asdict(), **added)
