"""The promises of every method: each takes a case and raises if broken."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import diagnostics, evaluation
from bilevel_jax.oracles import base
from bilevel_jax.testing import _case, _compare, _problem


def compiles_once_and_keeps_types(case):
  """The step donates its buffers and gets unknown extra arguments."""
  _compare.require_types(
    'the first step changes types', case.start, case.points[0]
  )
  last_types = _compare.leaf_types(case.end)
  differing = [
    f'{n}: {t} became {last_types.get(n)}'
    for n, t in case.types.items()
    if last_types.get(n) != t
  ]
  _compare.require(
    case.step._cache_size() == 1 and not differing,
    f'{_case.STEPS} steps compiled {case.step._cache_size()} programs. '
    f'{differing}\n'
    '  init and update return different types: make numbers arrays with a '
    'dtype, jnp.zeros([], jnp.int32) for instance.',
  )


def moves(case):
  _compare.require(
    _compare.moved(case.start[0], case.points[0][0]),
    'no parameter moves in one update',
  )


def counts_evaluations(case):
  row = case.row
  names = {*row.counts, *row.random_counts}
  first = diagnostics.counts(case.start[1])
  _compare.require(
    first == dict.fromkeys(names, 0),
    f'bj.counts starts as {first}; the row has counts={dict(row.counts)} and '
    f'random_counts={row.random_counts}.',
  )
  for t, (_, state) in enumerate(case.points, 1):
    counted = diagnostics.counts(state)
    drawn = {name: counted.pop(name) for name in row.random_counts}
    wanted = {name: t * n for name, n in row.counts.items()}
    _compare.require(
      counted == wanted,
      f'after {t} updates bj.counts is {counted}, expected {wanted}: count '
      'where the evaluation happens, or correct `counts` of the row.',
    )
    _compare.require(min(drawn.values(), default=0) >= 0, f'counts {drawn}')


def resumes_from_a_checkpoint(case):
  """Restores the state after two updates and makes the third."""
  now = case.begin()
  for t in range(2):
    now = case.step(*now, _case.cached_batch(t))
  restored = case.restore(now, case.begin(1))
  _compare.require_same(
    'the restored state', restored, case.points[1], exact=True
  )
  _compare.require_same(
    'the update after a checkpoint differs from that of the uninterrupted run',
    case.step(*through_numpy(restored, restored), _case.cached_batch(2)),
    case.points[2],
    'A key, a count or a warm start is missing in the state.',
    exact=True,
  )


def through_numpy(state, like):
  """Copies a state to the host and back, in the structure of `like`."""

  def back(leaf, kind):
    # Uncommitted: on a committed device the step would compile again.
    array = jnp.asarray(_compare.data(leaf))
    return jax.random.wrap_key_data(array) if _compare.is_key(kind) else array

  return jax.tree.map(back, state, like)


def keeps_bfloat16(case):
  """Traces a step with bfloat16 parameters, without compiling it."""
  _require_kept_types(case, (False, 'bfloat16'))


def keeps_types_of_parameters(case):
  """Traces steps with several dtypes, also under x64."""
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
        after = _case.make_step(solver)(params, state, batch)
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


def passes_oracles_to_wrap(case):
  calls_per_oracle = []

  def watch(oracle):
    calls = []

    def update_fn(batch, state, params=None, **extra_args):
      calls.append(1)
      update = optax.with_extra_args_support(oracle).update
      return update(batch, state, params, **extra_args)

    calls_per_oracle.append(calls)
    linear = base.is_linear(oracle)
    return base.Oracle(oracle.init, update_fn, oracle.moves, linear=linear)

  if not case.row.wraps:
    return
  solver = _case.build(case.row, watch)
  params = case.row.params(0)
  jax.eval_shape(
    lambda p, b: _case.make_step(solver)(p, solver.init(p), b),
    params,
    _case.cached_batch(0),
  )
  _compare.require(
    calls_per_oracle and all(calls_per_oracle),
    f'wrap got {len(calls_per_oracle)} oracles, and '
    f'{sum(map(bool, calls_per_oracle))} of the wrapped ones are evaluated: '
    'pass each oracle through wrap, or set wraps=False.',
  )


def accepts_injected_hyperparameters(case):
  row = case.row
  if not row.hyper:
    return
  factory: Any = lambda **hyper: _case.build(row, **hyper)
  # inject_hyperparams reads the names from the signature. Without an explicit
  # dtype it takes that of the batch's first leaf, an integer.
  kind = inspect.Parameter.KEYWORD_ONLY
  factory.__signature__ = inspect.Signature(
    [inspect.Parameter(name, kind) for name in row.hyper]
  )
  inject = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)
  solver = inject(**row.hyper)
  step: Any = jax.jit(_case.make_step(solver))
  params = row.params(0)
  now = step(params, solver.init(params), _case.cached_batch(0))
  second = step(*now, _case.cached_batch(1))
  for t, point in enumerate((now, second)):
    hint = 'Under inject_hyperparams, a hyperparameter is a traced array.'
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
    point = _compare.data(step(now[0], state, _case.cached_batch(1)))
    _compare.require(
      _compare.moved(
        _compare.all_sequences(point), _compare.all_sequences(case.points[1])
      ),
      f'halving {name} does not change the second update: use it in the update '
      'that reads it, not only in the state for the next one, or leave it out '
      'of `hyper`',
    )
    case.halved[name] = _compare.all_sequences(point)
  _compare.require(
    step._cache_size() == 1, 'other hyperparameter values compile again'
  )


def in_halves(oracle):
  return evaluation.accumulate(oracle, 2)


def scan_vmap_schedules_and_accumulate(case):
  """Checks all of them in one program; if that fails, each separately."""
  row = case.row
  split = row.wraps and not row.keys and row.parts != 'none'
  try:
    _compare_lanes(case, in_halves if split else _case.identity, scheduled=True)
  except Exception as first:
    for what, scheduled in (('scan and vmap', False), ('schedules', True)):
      try:
        _compare_lanes(case, _case.identity, scheduled=scheduled)
      except Exception as error:
        broken = _compare.describe(error)
        raise _compare.Broken(f'{what}: {broken}') from error
    raise _compare.Broken(
      f'accumulate: {_compare.describe(first)}\n  If the method is not linear '
      "in its samples, set parts='none'; if only its losses are not means over "
      "samples, parts='gradients'; if an evaluation depends on earlier ones, "
      'keys=True.'
    ) from first


def _compare_lanes(case, wrap, *, scheduled):
  """Compares vmapped runs of several seeds and schedules with jitted steps."""
  row = case.row
  names = tuple(row.hyper) if row.schedules is None else row.schedules
  names = [name for name in names if scheduled]
  _compare.require(
    set(names) <= set(row.hyper), 'some schedules are not in hyper'
  )
  seeds = (0, 1, *[0] * len(names))
  # Factor on each hyperparameter from the second update on.
  after = {name: np.ones(len(seeds), np.float32) for name in names}
  for lane, name in enumerate(names, 2):
    after[name][lane] = 0.5

  def one(params, after, batches):
    def schedule(name):
      share = lambda count: jnp.where(jnp.asarray(count) < 1, 1.0, after[name])
      return lambda count: row.hyper[name] * share(count)

    solver = _case.build(row, wrap, **{name: schedule(name) for name in names})
    step = _case.make_step(solver)

    def body(carry, batch):
      carry = step(*carry, batch)
      state = carry[1]
      return carry, (
        _compare.all_sequences(carry),
        diagnostics.values(state),
        diagnostics.counts(state),
      )

    return jax.lax.scan(body, (params, solver.init(params)), batches)[1]

  together = jax.jit(jax.vmap(one, (0, 0, None)))
  batches = _case.stacked([_case.cached_batch(t) for t in range(_case.STEPS)])
  lanes = _compare.data(
    together(_case.stacked(map(row.params, seeds)), after, batches)
  )
  at = lambda lane, t: jax.tree.map(lambda x: x[lane, t], lanes)
  now = case.begin(1)
  for t in range(_case.STEPS):
    actual, losses, counts = at(0, t)
    expected = case.points[t]
    what = f'update {t} of the scanned program differs from the jitted step'
    _compare.require_same(what, actual, _compare.all_sequences(expected))
    if wrap is _case.identity or row.parts == 'exact':
      _compare.require_same(
        f'losses: {what}', losses, diagnostics.values(expected[1])
      )
    # Projections and random draws happen once per update, not once per part.
    once = lambda name: (
      wrap is _case.identity or name.startswith(('projec', 'rounds'))
    )
    wanted = {n: (t + 1) * c * (2 - once(n)) for n, c in row.counts.items()}
    counted = {n: int(counts[n]) for n in wanted}
    _compare.require(
      counted == wanted, f'counts are {counted}, expected {wanted}'
    )
    now = case.step(*now, _case.cached_batch(t))
    _compare.require_same(
      f'second seed: {what}',
      at(1, t)[0],
      _compare.all_sequences(_compare.data(now)),
    )
  _compare.require(case.step._cache_size() == 1, 'another seed compiles again')
  for lane, name in enumerate(names, 2):
    what = f'with a schedule that halves {name} from the second update on'
    _compare.require_same(
      f'{what}, the first update differs',
      at(lane, 0)[0],
      _compare.all_sequences(case.points[0]),
      'Some step gets a count other than 0: put bj.states.hold_updates around '
      'inner steps.',
    )
    if name in case.halved:
      _compare.require_same(
        f'{what}, the second update differs from that with the injected half',
        at(lane, 1)[0],
        case.halved[name],
        f'Some step does not get the count 1, or {name} cannot be a schedule: '
        'then leave it out of `schedules`.',
      )


def matches_another_row(case):
  if case.row.same_as is None:
    return
  other = case.others[case.row.same_as]
  _compare.require(
    dict(case.row.hyper) == dict(other.hyper), 'the hyperparameters differ'
  )
  other_case = _case.Case(other)
  for one, two in zip(case.points, other_case.points):
    actual, named = _compare.all_sequences(one), _compare.all_sequences(two)
    # Some sequences are parameters of a bare oracle but state of a solver.
    shared = actual.keys() & named.keys()
    _compare.require(shared, 'the rows have no sequence name in common')
    _compare.require_same(
      f'the updates of {case.row.same_as}',
      {name: actual[name] for name in shared},
      {name: named[name] for name in shared},
      'Correct same_as, or one of the two methods.',
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
  before = _compare.all_sequences(_compare.data(now))
  _compare.require(
    set(row.sets) <= set(before), f'the only sequences are {sorted(before)}'
  )
  for t in range(10):
    now = case.step(*now, _case.cached_batch(t % _case.STEPS))
    after = _compare.all_sequences(_compare.data(now))
    for name, projection in row.sets.items():
      inside = projection(jax.tree.map(jnp.asarray, after[name]))
      for old, new, nearest in zip(
        *map(jax.tree.leaves, (before[name], after[name], inside))
      ):
        largest = np.maximum(np.abs(old), np.abs(new)).astype(np.float32)
        off = np.abs(new - nearest) / np.spacing(largest)
        _compare.require(
          np.all(off <= row.spacings),
          f'update {t}: {name} is {off.max():.1f} float spacings outside its '
          f'set; the row allows spacings={row.spacings}.',
        )
    before = after
