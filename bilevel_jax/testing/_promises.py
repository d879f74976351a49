"""Promises of every method: each takes a case, and raises if broken."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import diagnostics, evaluation
from bilevel_jax.oracles import base
from bilevel_jax.testing import _case, _compare, _problem


def compiles_once_and_keeps_types(case):
  """The step above: buffers donated, and arguments given that are unknown."""
  _compare.require_types(
    'the first step changes types', case.start, case.points[0]
  )
  last_types = _compare.types_of(case.end)
  differing = [
    f'{n}: {t} became {last_types.get(n)}'
    for n, t in case.types.items()
    if last_types.get(n) != t
  ]
  _compare.require(
    case.step._cache_size() == 1 and not differing,
    f'{_case.STEPS} steps were compiled {case.step._cache_size()} times. '
    f'{differing}\n'
    '  What init makes and what update returns differ in a type: make numbers '
    'arrays of a dtype, jnp.zeros([], jnp.int32) for instance.',
  )


def moves(case):
  _compare.require(
    _compare.moved(case.start[0], case.points[0][0]),
    'no parameter moves in one update',
  )


def counts_what_it_evaluates(case):
  row = case.row
  names = {*row.counts, *row.random_counts}
  first = diagnostics.counts(case.start[1])
  _compare.require(
    first == dict.fromkeys(names, 0),
    f'bj.counts begins with {first}; the row has counts={dict(row.counts)} and '
    f'random_counts={row.random_counts}.',
  )
  for t, (_, state) in enumerate(case.points, 1):
    counted = diagnostics.counts(state)
    drawn = {name: counted.pop(name) for name in row.random_counts}
    wanted = {name: t * n for name, n in row.counts.items()}
    _compare.require(
      counted == wanted,
      f'after {t} updates bj.counts has {counted}, the row {wanted}: count '
      'where the evaluation happens, or mend `counts` of the row.',
    )
    _compare.require(min(drawn.values(), default=0) >= 0, f'counts {drawn}')


def resumes_from_a_checkpoint(case):
  """Saved after two updates by `restore`, and continued by the third."""
  now = case.begin()
  for t in range(2):
    now = case.step(*now, _case.batch_of(t))
  restored = case.restore(now, case.begin(1))
  _compare.require_same(
    'what is restored', restored, case.points[1], exact=True
  )
  _compare.require_same(
    'the update after a checkpoint is not the one without, bit for bit',
    case.step(*through_numpy(restored, restored), _case.batch_of(2)),
    case.points[2],
    'A key, a count or a warm start is not in the state.',
    exact=True,
  )


def through_numpy(state, like):
  """A state as numbers on the host and back, in the structure of another."""

  def back(leaf, kind):
    # Not committed to a device: the step would be compiled once more.
    array = jnp.asarray(_compare.data(leaf))
    return jax.random.wrap_key_data(array) if _compare.is_key(kind) else array

  return jax.tree.map(back, state, like)


def keeps_bfloat16(case):
  """Traced only: nothing is compiled."""
  _require_kept_types(case, (False, 'bfloat16'))


def keeps_types_of_parameters(case):
  """Under x64 too."""
  _require_kept_types(
    case, (False, 'bfloat16'), (True, 'float32'), (True, 'float64')
  )


def _require_kept_types(case, *widths):
  for x64, dtype in widths:
    with jax.enable_x64(x64):
      dtype = jnp.dtype(dtype)
      solver = _case.build(case.row)

      def both(params, batch, solver=solver):
        state = solver.init(params)
        after = _case.step_of(solver)(params, state, batch)
        return (params, state), after, diagnostics.values(after[1])

      before, after, values = jax.eval_shape(
        both, case.row.params(0, dtype), _problem.random_batch(0, dtype)
      )
      _compare.require_types(
        f'{dtype}, x64 {x64}: a step changes types', before, after
      )
      measured = jnp.promote_types(dtype, jnp.float32)
      for name, value in values.items():
        _compare.require(
          value.dtype == measured,
          f'{dtype}: the loss {name} is {value.dtype}, not {measured}',
        )


class _Seen(NamedTuple):
  oracle: Any
  updates: list


def hands_its_oracles_to_wrap(case):
  watched = []

  def watch(oracle):
    calls = []

    def update_fn(batch, state, params=None, **extra_args):
      calls.append(1)
      update = optax.with_extra_args_support(oracle).update
      return update(batch, state, params, **extra_args)

    watched.append(_Seen(oracle, calls))
    linear = base.is_linear(oracle)
    return base.Oracle(oracle.init, update_fn, oracle.moves, linear=linear)

  if not case.row.wraps:
    return
  solver = _case.build(case.row, watch)
  params = case.row.params(0)
  jax.eval_shape(
    lambda p, b: _case.step_of(solver)(p, solver.init(p), b),
    params,
    _case.batch_of(0),
  )
  _compare.require(
    watched and all(one.updates for one in watched),
    f'wrap was given {len(watched)} oracles, and what it returned is '
    f'evaluated in {sum(bool(one.updates) for one in watched)}: hand each '
    'oracle to wrap, or set wraps=False.',
  )


def takes_injected_numbers(case):
  row = case.row
  if not row.hyper:
    return
  factory: Any = lambda **hyper: _case.build(row, **hyper)
  # inject_hyperparams reads the names off the signature, and takes the type of
  # numbers from the batch's first leaf, an integer, if it is not told one.
  kind = inspect.Parameter.KEYWORD_ONLY
  factory.__signature__ = inspect.Signature(
    [inspect.Parameter(name, kind) for name in row.hyper]
  )
  inject = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)
  solver = inject(**row.hyper)
  step: Any = jax.jit(_case.step_of(solver))
  params = row.params(0)
  now = step(params, solver.init(params), _case.batch_of(0))
  second = step(*now, _case.batch_of(1))
  for t, point in enumerate((now, second)):
    hint = 'A number under inject_hyperparams is an array that is traced.'
    _compare.require_same(f'update {t}', point[0], case.points[t][0], hint)
  expected = case.points[1][1]
  _compare.require_same(
    'the losses', diagnostics.values(second[1]), diagnostics.values(expected)
  )
  _compare.require(
    diagnostics.counts(second[1]) == diagnostics.counts(expected),
    'the counts differ',
  )
  for name, number in row.hyper.items():
    half = {name: jnp.float32(number / 2)}
    state = now[1]._replace(hyperparams=now[1].hyperparams | half)
    point = _compare.data(step(now[0], state, _case.batch_of(1)))
    _compare.require(
      _compare.moved(
        _compare.sequences_of(point), _compare.sequences_of(case.points[1])
      ),
      f'half the {name} changes nothing in the second update: use the number '
      'in the update that reads it, not only in what the next one remembers, '
      'or leave it out of `hyper`',
    )
    case.halved[name] = _compare.sequences_of(point)
  _compare.require(
    step._cache_size() == 1, 'other numbers are compiled once more'
  )


def in_halves(oracle):
  return evaluation.accumulate(oracle, 2)


def scan_vmap_schedules_and_accumulate(case):
  """All of them at once, in one program; if that fails, one after another."""
  row = case.row
  split = row.wraps and not row.keys and row.parts != 'none'
  try:
    _compare_lanes(case, in_halves if split else _case.same, scheduled=True)
  except Exception as first:
    for what, scheduled in (('scan and vmap', False), ('schedules', True)):
      try:
        _compare_lanes(case, _case.same, scheduled=scheduled)
      except Exception as error:
        broken = _compare.described(error)
        raise _compare.Broken(f'{what}: {broken}') from error
    raise _compare.Broken(
      f'accumulate: {_compare.described(first)}\n  If the method is not linear '
      "in its samples, set parts='none'; if its losses alone are no means, "
      "parts='gradients'; if an evaluation sees what the one before it left, "
      'keys=True.'
    ) from first


def _compare_lanes(case, wrap, *, scheduled):
  """Runs of several seeds and schedules, vmapped, against steps of jit."""
  row = case.row
  names = tuple(row.hyper) if row.schedules is None else row.schedules
  names = [name for name in names if scheduled]
  _compare.require(
    set(names) <= set(row.hyper), 'schedules that are not in hyper'
  )
  seeds = (0, 1, *[0] * len(names))
  # Each number is multiplied by this from the second update on.
  after = {name: np.ones(len(seeds), np.float32) for name in names}
  for lane, name in enumerate(names, 2):
    after[name][lane] = 0.5

  def one(params, after, batches):
    def schedule(name):
      share = lambda count: jnp.where(jnp.asarray(count) < 1, 1.0, after[name])
      return lambda count: row.hyper[name] * share(count)

    solver = _case.build(row, wrap, **{name: schedule(name) for name in names})
    step = _case.step_of(solver)

    def body(carry, batch):
      carry = step(*carry, batch)
      state = carry[1]
      return carry, (
        _compare.sequences_of(carry),
        diagnostics.values(state),
        diagnostics.counts(state),
      )

    return jax.lax.scan(body, (params, solver.init(params)), batches)[1]

  together = jax.jit(jax.vmap(one, (0, 0, None)))
  batches = _case.stacked([_case.batch_of(t) for t in range(_case.STEPS)])
  lanes = _compare.data(
    together(_case.stacked(map(row.params, seeds)), after, batches)
  )
  at = lambda lane, t: jax.tree.map(lambda x: x[lane, t], lanes)
  now = case.begin(1)
  for t in range(_case.STEPS):
    actual, losses, counts = at(0, t)
    expected = case.points[t]
    what = f'update {t} of three in one program is not that of jit'
    _compare.require_same(what, actual, _compare.sequences_of(expected))
    if wrap is _case.same or row.parts == 'exact':
      _compare.require_same(
        f'the losses of {what}', losses, diagnostics.values(expected[1])
      )
    # What is projected, or is drawn, is so once an update.
    once = lambda name: (
      wrap is _case.same or name.startswith(('projec', 'rounds'))
    )
    wanted = {n: (t + 1) * c * (2 - once(n)) for n, c in row.counts.items()}
    counted = {n: int(counts[n]) for n in wanted}
    _compare.require(counted == wanted, f'counts {counted}, not {wanted}')
    now = case.step(*now, _case.batch_of(t))
    _compare.require_same(
      f'the other seed: {what}',
      at(1, t)[0],
      _compare.sequences_of(_compare.data(now)),
    )
  _compare.require(
    case.step._cache_size() == 1, 'another seed is compiled once more'
  )
  for lane, name in enumerate(names, 2):
    what = f'with a schedule of {name}, half from the second update on'
    _compare.require_same(
      f'{what}, the first one differs',
      at(lane, 0)[0],
      _compare.sequences_of(case.points[0]),
      'Some step sees another count than 0: bj.states.hold_updates goes round '
      'inner steps.',
    )
    if name in case.halved:
      _compare.require_same(
        f'{what}, that is not the one with half of it injected',
        at(lane, 1)[0],
        case.halved[name],
        f'Some step does not see the count 1, or {name} is no schedule: leave '
        'it out of `schedules`.',
      )


def gives_the_updates_of_another_row(case):
  if case.row.same_as is None:
    return
  other = case.others[case.row.same_as]
  _compare.require(
    dict(case.row.hyper) == dict(other.hyper), 'the numbers differ'
  )
  other_case = _case.Case(other)
  for one, two in zip(case.points, other_case.points):
    actual, named = _compare.sequences_of(one), _compare.sequences_of(two)
    # A bare oracle has in its parameters what a solver keeps in its state.
    shared = actual.keys() & named.keys()
    _compare.require(shared, 'no sequence of one name')
    _compare.require_same(
      f'the updates of {case.row.same_as}',
      {name: actual[name] for name in shared},
      {name: named[name] for name in shared},
      'Mend same_as, or one of the two forms.',
    )
    actual, other_values = (
      diagnostics.values(one[1]),
      diagnostics.values(two[1]),
    )
    _compare.require_same(
      'losses', actual, {n: other_values[n] for n in actual}
    )


def stays_in_its_sets(case):
  row = case.row
  if not row.sets:
    return
  params = jax.tree.map(lambda x: x + 3, row.params(0))  # Outside.
  now = (params, case.solver.init(params))
  before = _compare.sequences_of(_compare.data(now))
  _compare.require(
    set(row.sets) <= set(before), f'there are {sorted(before)} only'
  )
  for t in range(10):
    now = case.step(*now, _case.batch_of(t % _case.STEPS))
    after = _compare.sequences_of(_compare.data(now))
    for name, projection in row.sets.items():
      inside = projection(jax.tree.map(jnp.asarray, after[name]))
      for old, new, nearest in zip(
        *map(jax.tree.leaves, (before[name], after[name], inside))
      ):
        largest = np.maximum(np.abs(old), np.abs(new)).astype(np.float32)
        off = np.abs(new - nearest) / np.spacing(largest)
        _compare.require(
          np.all(off <= row.spacings),
          f'update {t}: {name} is {off.max():.1f} spacings of floats outside '
          f'its set; the row allows spacings={row.spacings}.',
        )
    before = after
