"""Order and movement: oracles in turn, and one record a sequence."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _sequences, _trees, types
from bilevel_jax.oracles import base
from bilevel_jax.projections import _kept


class DescendState(NamedTuple):
  """State of `descend`: what there is to keep of each part, and no more.

  Attributes:
    sequences: those that only the solver has, by name.
    optimisers: the states of the sequences' optimisers, by name; those that
      hold nothing are left out.
    oracles: the state of each oracle, in order; () if it holds nothing.
    sets: the states of the sequences' sets, by name, as `optimisers`.
    numbers: the losses of all oracles, and evaluations and projections so far.
  """

  sequences: dict[str, Any]
  optimisers: dict[str, Any]
  oracles: tuple[Any, ...]
  sets: dict[str, Any]
  numbers: types.Numbers | None


class _Parts(NamedTuple):
  """The states of all parts, whole: what an update works on."""

  oracles: tuple[Any, ...]
  optimisers: dict[str, Any]
  sets: dict[str, Any]


def _is_named(node):
  return isinstance(node, types.Named)


def _stripped(parts: _Parts) -> tuple[Any, list[Any], list[Any]]:
  """The states without numbers and empty nodes; losses; evaluations.

  Every array and every node of a state costs a microsecond a call of a compiled
  step: at rest, losses and evaluations are held in one array each.
  """
  values: list[Any] = []
  counts: list[Any] = []

  def take(path, node):
    if not _is_named(node):
      return node
    (counts if path[-1].name == 'counts' else values).append(node)
    return ()

  bare = jax.tree_util.tree_map_with_path(take, parts, is_leaf=_is_named)
  full = lambda held: {n: s for n, s in held.items() if jax.tree.leaves(s)}
  oracles = tuple(s if jax.tree.leaves(s) else () for s in bare.oracles)
  return (full(bare.optimisers), oracles, full(bare.sets)), values, counts


def _at_start(
  parts: _Parts, dtype: Any, uses: dict[str, int]
) -> tuple[tuple[Any, Any, Any], types.Numbers | None]:
  """As `_at_rest` before the first update, when all numbers are zero."""
  held, measured, evaluated = _stripped(parts)
  values = tuple(dict.fromkeys(n for node in measured for n in node))
  counts = tuple(dict.fromkeys([*uses, *(n for m in evaluated for n in m)]))
  if not values and not counts:
    return held, None
  zeros = lambda names, kind: _trees.zeros(len(names), kind) if names else None
  return held, types.Numbers(
    values, zeros(values, dtype), counts, zeros(counts, jnp.int32)
  )


def _at_rest(
  parts: _Parts, dtype: Any, spent: dict[str, Any]
) -> tuple[tuple[Any, Any, Any], types.Numbers | None]:
  """The states without numbers and empty nodes, and these numbers."""
  held, measured, evaluated = _stripped(parts)
  values: dict[str, Any] = {}
  counts: dict[str, Any] = dict(spent)
  for node in measured:
    values.update(node)
  for node in evaluated:
    counts.update({n: counts.get(n, 0) + node[n] for n in node})
  if not values and not counts:
    return held, None
  losses = [jnp.asarray(x, dtype) for x in values.values()]
  return held, types.Numbers(
    tuple(values), jnp.stack(losses) if losses else None, *_counted(counts)
  )


def _counted(counts):
  if not counts:
    return (), None
  if all(isinstance(n, int) for n in counts.values()):
    return tuple(counts), np.array(list(counts.values()), np.int32)
  cast = [jnp.asarray(n, jnp.int32) for n in counts.values()]
  return tuple(counts), jnp.stack(cast)


def _whole(state, template):
  """The states of all parts; evaluations are zero and are added up later.

  Losses are those last measured, which an oracle may leave as they are.
  """
  left = iter(jax.tree.leaves((state.oracles, state.optimisers, state.sets)))

  def fill(path, node):
    if not _is_named(node):
      return next(left)
    shape, dtype = node.array.shape, node.array.dtype
    if path[-1].name == 'counts':
      return types.Named(node.names, jnp.zeros(shape, dtype))
    known = state.numbers.value_names
    places = np.array([known.index(name) for name in node.names])
    last = state.numbers.value_array[places].astype(dtype)
    return types.Named(node.names, last)

  return jax.tree_util.tree_map_with_path(fill, template, is_leaf=_is_named)


class _Point(NamedTuple):
  """Where an update has come to: what an inner loop carries."""

  z: Any
  optimisers: dict[str, Any]
  sets: dict[str, Any]


def descend(
  *oracles: optax.GradientTransformation,
  wrap: types.Wrapper | None = None,
  **sequences: types.Sequence | optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
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
    wrap: wraps each oracle, `lambda o: bj.evaluation.accumulate(o, 4)` for
      instance. A chain with an aggregator is wrapped as a whole: where that is
      not linear in its rows, wrap the oracle inside the chain instead.
    **sequences: by name, a `Sequence` or a bare optax optimiser. With a
      `start`, the sequence is one that only the solver has: it is kept in
      state, and `bj.auxiliaries` gives it.

  Returns:
    A solver for parameters with named sequences. Its updates are None for
    sequences that no oracle moves. Losses and their outputs are those of an
    oracle's last evaluation in the update.

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
  wrap = wrap or (lambda oracle: oracle)
  parts = tuple(wrap(one) for one in oracles)
  updates_of = [optax.with_extra_args_support(part).update for part in parts]
  records = {n: types.as_sequence(s, n) for n, s in sequences.items()}
  links = {
    n: optax.with_extra_args_support(s.optimiser) for n, s in records.items()
  }
  kept = {n: _kept.kept(n, s.set) for n, s in records.items()}
  uses = {u: 0 for k in kept.values() for u in k.uses}

  def added(params):
    """Starts of the sequences that only the solver has."""
    _sequences.refuse_state(params, 'the parameters are')
    _sequences.require_sequences(params, (), 'descend')
    own = params._fields
    for name, record in records.items():
      if name in own and record.start is not None and not record.restart:
        raise ValueError(
          f'the parameters already have the sequence {name}: give the added '
          'one another name, leave out its start, or set restart=True to go '
          'back to it in each update.'
        )
      if record.start is None and (record.restart or name not in own):
        raise ValueError(
          f'the sequence {name} is not among the parameters {own}: give its '
          'record a start, from the parameters to its first value.'
          if name not in own
          else f'the sequence {name} restarts: give its record a start.'
        )
    return {n: s.start for n, s in records.items() if s.start and n not in own}

  def init_fn(params):
    # Copies: a buffer that params and state share could not be donated.
    extra = {
      n: jax.tree.map(lambda x: jnp.array(x, copy=True), start(params))
      for n, start in added(params).items()
    }
    z = _joint(params, extra)
    held, numbers = _at_start(parts_of(z), _trees.dtype_of(z), uses)
    return DescendState(extra, *held, numbers=numbers)

  def parts_of(z):
    """The states of all parts at their start."""
    return _Parts(
      tuple(part.init(z) for part in parts),
      {n: links[n].init(getattr(z, n)) for n in records},
      {n: kept[n].init(z) for n in records},
    )

  def settle(point, first, before, names, stage):
    """The sets of these sequences, those that depend on others last."""
    z, sets = point.z, dict(point.sets)
    for name in sorted(names, key=lambda n: kept[n].last):
      if (enforce := getattr(kept[name], stage)) is not None:
        held = base.hold_updates(sets[name], first.sets[name])
        fields, sets[name] = enforce(z, before, held)
        z = z._replace(**fields)
    return point._replace(z=z, sets=sets)

  def one_step(index, only, point, first, inner, batch, extra_args):
    """Evaluates an oracle, and moves what has a gradient, or only some.

    However often a sequence moves in an update, by one oracle or by several,
    its schedules are where they were at first.
    """
    z, optimisers = point.z, dict(point.optimisers)
    gradients, inner = updates_of[index](batch, inner, z, **extra_args)
    _sequences.require_gradients(gradients, z, 'descend')
    raw, moved = {}, {}
    for name in z._fields:
      gradient, param = getattr(gradients, name), getattr(z, name)
      if gradient is None or (only is not None and name not in only):
        continue
      _require_records((name,), records)
      held = base.hold_updates(optimisers[name], first.optimisers[name])
      raw[name], optimisers[name] = _move(
        links[name], name, gradient, held, param, extra_args
      )
      moved[name] = optax.apply_updates(param, raw[name])
    loose = _Point(z._replace(**moved), optimisers, point.sets)
    return settle(loose, first, z, moved, 'each'), inner, raw

  def run(index, loop, point, first, inner, extra_args):
    """All evaluations but the last, as a loop that looks at no loss."""
    if loop.steps == 1:
      return point, inner
    others = {o for n in loop.looping for o in kept[n].others}
    carried = {*loop.looping, *others}
    pick = lambda held, names: {n: held[n] for n in names if n in held}

    def pack(point):
      fields = pick(point.z._asdict(), carried)
      mine = (point.optimisers, point.sets)
      return fields, [pick(held, loop.looping) for held in mine]

    def unpack(packed):
      fields, (optimisers, sets) = packed
      z = point.z._replace(**fields)
      return _Point(z, point.optimisers | optimisers, point.sets | sets)

    def body(carry, t):
      packed, held = carry
      here, batch = unpack(packed), loop.batch(t)
      now, after, _ = one_step(
        index, loop.looping, here, first, held, batch, extra_args
      )
      # No schedule moves on, and no loss is looked at, before the last step.
      after = base.hold_measured(base.hold_updates(after, held), held)
      return (pack(now), after), None

    times = jnp.arange(loop.steps - 1, dtype=jnp.int32)
    (packed, inner), _ = jax.lax.scan(body, (pack(point), inner), times)
    return unpack(packed), inner

  def update_fn(batch, state, params=None, **extra_args):
    base.require_batch(batch, params)
    starts = added(params)
    z = _joint(params, state.sequences)
    whole = _whole(state, jax.eval_shape(parts_of, z))
    first = point = restarted(z, whole, params)
    states, spent, moves = [], dict(uses), {}
    for index, inner in enumerate(whole.oracles):
      before = point.z
      loop = _loop(parts[index], records, batch, inner, before)
      point, inner = run(index, loop, point, first, inner, extra_args)
      last = loop.batch(loop.steps - 1)
      point, inner, raw = one_step(
        index, None, point, first, inner, last, extra_args
      )
      point = settle(point, first, before, raw, 'finish')
      states.append(inner)
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
    ours = {
      n: optax.tree.sub(getattr(end, n), getattr(params, n)) if u is None else u
      for n, u in moves.items()
      if n in params._fields
    }
    whole = _Parts(tuple(states), point.optimisers, point.sets)
    held, numbers = _at_rest(whole, _trees.dtype_of(end), spent)
    if numbers is not None and numbers.counts is not None:
      counts = _sequences.add_counts(state.numbers.counts, numbers.counts)
      numbers = numbers._replace(count_array=counts and counts.array)
    extra = {n: getattr(end, n) for n in starts}
    return _sequences.only(params, **ours), DescendState(
      extra, *held, numbers=numbers
    )

  def restarted(z, whole, params):
    """Where an update begins."""
    optimisers = dict(whole.optimisers)
    for name, record in records.items():
      if record.restart:
        start: Any = record.start
        first = jax.tree.map(jnp.asarray, start(params))
        z = z._replace(**{name: first})
        fresh = links[name].init(first)
        optimisers[name] = base.hold_updates(fresh, optimisers[name])
    return _Point(z, optimisers, dict(whole.sets))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Loop(NamedTuple):
  """How often one oracle is evaluated in an update, and on which batches.

  Attributes:
    steps: evaluations.
    looping: names of the sequences that move in each of them.
    batch: the batch of evaluation t.
  """

  steps: int
  looping: tuple[str, ...]
  batch: Callable[[Any], Any]


def _loop(oracle, records, batch, state, z) -> _Loop:
  """Reads the loop of an oracle off the records of what it moves."""
  ats = {s.batch_at for s in records.values()}
  if ats == {None} and all(s.steps == 1 for s in records.values()):
    return _Loop(1, (), lambda t: batch)
  seen = batch
  if len(given := ats - {None}) == 1:
    # What an inner step sees may differ in shape, and in nothing else.
    (pick,) = given
    seen = jax.eval_shape(pick, batch, jnp.int32(0))
  names = base.moved_by(oracle, seen, state, z)
  _require_records(names, records)
  mine = {n: records[n] for n in names}
  steps = max(s.steps for s in mine.values())
  looping = tuple(n for n, s in mine.items() if s.steps == steps)
  ats = {mine[n].batch_at for n in looping}
  if any(s.steps not in (1, steps) for s in mine.values()):
    raise ValueError(
      f'the sequences {", ".join(names)} move by one oracle, but take '
      f'{", ".join(str(s.steps) for s in mine.values())} steps: give all of '
      'them the same number of steps, or 1.'
    )
  batches = {s.batch_at for s in mine.values()} - {None}
  if len(ats) > 1 or batches - ats:
    raise ValueError(
      f'the sequences {", ".join(names)} move by one oracle, whose evaluations '
      'see one batch each, but their batch_at differ: define one function and '
      f'give it to {", ".join(looping)}. Sequences that take fewer than '
      f'{steps} steps may leave it out.'
    )
  (at,) = ats
  pick_or_all = at or (lambda batch, t: batch)
  return _Loop(steps, looping, lambda t: pick_or_all(batch, jnp.int32(t)))


def _joint(params: Any, added: dict[str, Any]) -> Any:
  """The parameters and the added sequences, as one NamedTuple."""
  if not added:
    return params
  return types.sequences(**params._asdict(), **added)


def _require_records(names: Any, records: dict[str, Any]) -> None:
  for name in names:
    if name not in records:
      raise ValueError(
        f'the sequence {name} has a gradient but no optimiser: give '
        f'{name}=..., optax.set_to_zero() to hold it.'
      )


def _move(link, name, gradient, state, param, extra_args):
  """An optimiser's step; where it wants a loss, the error says the mend."""
  try:
    return link.update(gradient, state, param, **extra_args)
  except TypeError as error:
    if 'value_fn' not in str(error) and 'argument' not in str(error):
      raise
    raise TypeError(
      f'the optimiser of {name} asks for more than gradients ({error}): line '
      'searches, optax.lbfgs for instance, need the loss itself. Take one that '
      'steps along gradients alone, optax.adam for instance.'
    ) from error
