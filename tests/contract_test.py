"""What every solver, oracle, aggregator and wrapper promises, row by row.

`pytest tests/contract_test.py -m '' -k '[v_pbgd]'` checks all promises of one
row; without `-m ''` those that are quick. All checks share one compiled step
and the run of three updates made with it; a report names each promise that is
broken, what differs, and which flag of the row may be why.
"""

import functools
import inspect
import itertools
import re
import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bilevel_jax as bj
from bilevel_jax.oracles import base
from tests import contract

P = jax.sharding.PartitionSpec
STEPS = 3
# Of float32 sums in another order.
RTOL, ATOL = 2e-5, 2e-6
FOUND = contract.collect()


class Broken(AssertionError):
  """A promise that a method does not keep."""


def require(condition: Any, message: str) -> None:
  if not condition:
    raise Broken(message)


# Comparisons that say what differs.


def is_key(leaf):
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def data(tree):
  """A tree as numpy arrays, keys as their numbers."""
  return jax.tree.map(
    lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree
  )


def differences(ours, theirs, *, exact=False):
  """One line for each leaf of two trees that is not the same."""
  one, two = (jax.tree_util.tree_leaves_with_path(t) for t in (ours, theirs))
  if jax.tree.structure(ours) != jax.tree.structure(theirs):
    names = lambda leaves: {jax.tree_util.keystr(path) for path, _ in leaves}
    apart = names(one) ^ names(two)
    return [f'the structures differ: {sorted(apart) or "types of nodes"}']
  lines = []
  for (path, a), (_, b) in zip(one, two, strict=True):
    a, b = data(a), data(b)
    if a.shape != b.shape or a.dtype != b.dtype:
      what = f'{a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}'
    elif exact or not jnp.issubdtype(a.dtype, jnp.floating):
      if np.array_equal(a, b, equal_nan=a.dtype.kind == 'f'):
        continue
      what = f'{a} against {b}'
    elif np.allclose(a, b, RTOL, ATOL, equal_nan=True):
      continue
    else:
      at = np.unravel_index(np.argmax(np.abs(a - b)), a.shape)
      what = f'{a[at]} against {b[at]} at {[int(i) for i in at]}'
    lines.append(f'{jax.tree_util.keystr(path) or "it"}: {what}')
  return lines


def require_same(what, ours, theirs, hint='', *, exact=False):
  lines = differences(ours, theirs, exact=exact)
  shown = '\n    '.join(lines[:6] + ['...'] * (len(lines) > 6))
  require(not lines, f'{what}:\n    {shown}\n  {hint}')


def without_losses(tree):
  """A point without what a state holds of losses."""

  def forget(node):
    if isinstance(node, bj.types.Numbers):
      return node.counts
    return (
      node._replace(values=None) if bj.states.is_oracle_state(node) else node
    )

  is_leaf = lambda node: (
    bj.states.is_oracle_state(node) or isinstance(node, bj.types.Numbers)
  )
  return jax.tree.map(forget, tree, is_leaf=is_leaf)


def sequences_of(point):
  """The parameters, and the sequences that the state keeps."""
  params, state = point
  named = params._asdict() if hasattr(params, '_asdict') else {'it': params}
  return named | bj.auxiliaries(state)


def moved(one, two):
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
  return any(not np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


def types_of(tree):
  """Shape, dtype and weakness of each leaf."""

  def kind(leaf):
    aval = leaf if hasattr(leaf, 'weak_type') else jax.typeof(leaf)
    weak = ' weak' if getattr(aval, 'weak_type', False) else ''
    return f'{aval.dtype}{list(aval.shape)}{weak}'

  return {
    jax.tree_util.keystr(path): kind(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def require_types(what, ours, theirs):
  one, two = types_of(ours), types_of(theirs)
  apart = [
    f'{name}: {one.get(name)} became {two.get(name)}'
    for name in one | two
    if one.get(name) != two.get(name)
  ]
  require(not apart, f'{what}:\n    ' + '\n    '.join(apart[:6]))


# A row, built and run once.


def same(oracle):
  return oracle


def mean_over_data(oracle):
  return bj.evaluation.mean_over(oracle, 'data')


def build(row, wrap=same, **hyper):
  return row.make(wrap, **(dict(row.hyper) | hyper))


def step_of(solver, **extra_args):
  def step(params, state, batch):
    updates, state = solver.update(batch, state, params, **extra_args)
    return bj.apply_updates(params, updates), state

  return step


@functools.cache
def batch_of(step):
  return contract.random_batch(step)


def stacked(trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def shares_no_buffer(case):
  """Before the step below takes them."""
  params, state = case.begin()
  places = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path((params, state)):
    name = jax.tree_util.keystr(path)
    require(
      isinstance(leaf, jax.Array),
      f'{name} is {type(leaf).__name__} {leaf}, no array: make it one of a '
      'dtype, jnp.zeros([], jnp.int32) for instance.',
    )
    if is_key(leaf) or not leaf.size:
      continue
    where = leaf.unsafe_buffer_pointer()
    require(
      where not in places,
      f'{places.get(where)} and {name} are one buffer, so that neither can be '
      'donated: copy it in init, jnp.array(x, copy=True).',
    )
    places[where] = name


class Case:
  """A row with its compiled step and a run of it."""

  def __init__(self, row, folder=None):
    """Compiles the step and makes three updates."""
    self.row, self.folder, self.halved = row, folder, {}
    self.solver = build(row)
    shares_no_buffer(self)
    # Extra arguments, of which no method but those that name them may know.
    extra = {'never_heard_of': jnp.ones(3), 'names': 'any'}
    step = step_of(self.solver, **extra)
    self.step = jax.jit(step, donate_argnums=(0, 1))
    now = self.begin()
    self.start, self.types = data(now), types_of(now)
    self.points = []
    for t in range(STEPS):
      now = self.step(*now, batch_of(t))
      self.points.append(data(jax.block_until_ready(now)))
    self.end = now

  def begin(self, seed=0):
    """Parameters and state of their own buffers: the step takes them."""
    params = self.row.params(seed)
    return params, self.solver.init(params)

  def run(self, step, start, last):
    """Updates of another step than the one here, as numpy arrays."""
    now, points = start, []
    for t in range(last):
      now = jax.block_until_ready(step(*now, batch_of(t)))
      points.append(data(now))
    return points

  def make(self, wrap=same, **hyper):
    """Another build of the row, its step, and its start."""
    solver = build(self.row, wrap, **hyper)
    params = self.row.params(0)
    return step_of(solver), (params, solver.init(params))


# Promises: each takes a case, and raises where it is broken.


def compiles_once_and_keeps_types(case):
  """The step above: buffers donated, and arguments given that are unknown."""
  require_types('the first step changes types', case.start, case.points[0])
  kept = types_of(case.end)
  apart = [
    f'{n}: {t} became {kept.get(n)}'
    for n, t in case.types.items()
    if kept.get(n) != t
  ]
  require(
    case.step._cache_size() == 1 and not apart,
    f'{STEPS} steps were compiled {case.step._cache_size()} times. {apart}\n'
    '  What init makes and what update returns differ in a type: make numbers '
    'arrays of a dtype, jnp.zeros([], jnp.int32) for instance.',
  )


def moves(case):
  require(
    moved(case.start[0], case.points[0][0]), 'no parameter moves in one update'
  )


def counts_what_it_evaluates(case):
  row = case.row
  names = {*row.counts, *row.random_counts}
  first = bj.counts(case.start[1])
  require(
    first == dict.fromkeys(names, 0),
    f'bj.counts begins with {first}; the row has counts={dict(row.counts)} and '
    f'random_counts={row.random_counts}.',
  )
  for t, (_, state) in enumerate(case.points, 1):
    counted = bj.counts(state)
    drawn = {name: counted.pop(name) for name in row.random_counts}
    wanted = {name: t * n for name, n in row.counts.items()}
    require(
      counted == wanted,
      f'after {t} updates bj.counts has {counted}, the row {wanted}: count '
      'where the evaluation happens, or mend `counts` of the row.',
    )
    require(min(drawn.values(), default=0) >= 0, f'counts {drawn}')


def resumes_from_a_checkpoint(case):
  now = case.begin()
  for t in range(2):
    now = case.step(*now, batch_of(t))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(case.folder / 'step', now)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(case.folder / 'step', case.begin(1))
  require_same('what is restored', restored, case.points[1], exact=True)
  # Not committed to a device: the step would be compiled once more.
  free = lambda x: (
    jax.random.wrap_key_data(free(jax.random.key_data(x)))
    if is_key(x)
    else jnp.asarray(np.asarray(x))
  )
  require_same(
    'the update after a checkpoint is not the one without, bit for bit',
    case.step(*jax.tree.map(free, restored), batch_of(2)),
    case.points[2],
    'A key, a count or a warm start is not in the state.',
    exact=True,
  )


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
      solver = build(case.row)

      def both(params, batch, solver=solver):
        state = solver.init(params)
        after = step_of(solver)(params, state, batch)
        return (params, state), after, bj.values(after[1])

      before, after, values = jax.eval_shape(
        both, case.row.params(0, dtype), contract.random_batch(0, dtype)
      )
      require_types(f'{dtype}, x64 {x64}: a step changes types', before, after)
      measured = jnp.promote_types(dtype, jnp.float32)
      for name, value in values.items():
        require(
          value.dtype == measured,
          f'{dtype}: the loss {name} is {value.dtype}, not {measured}',
        )


class _Seen(NamedTuple):
  oracle: Any
  updates: list


def hands_its_oracles_to_wrap(case):
  seen = []

  def watch(oracle):
    calls = []

    def update_fn(batch, state, params=None, **extra_args):
      calls.append(1)
      update = optax.with_extra_args_support(oracle).update
      return update(batch, state, params, **extra_args)

    seen.append(_Seen(oracle, calls))
    linear = base.is_linear(oracle)
    return base.Oracle(oracle.init, update_fn, oracle.moves, linear=linear)

  if not case.row.wraps:
    return
  solver = build(case.row, watch)
  params = case.row.params(0)
  jax.eval_shape(
    lambda p, b: step_of(solver)(p, solver.init(p), b), params, batch_of(0)
  )
  require(
    seen and all(one.updates for one in seen),
    f'wrap was given {len(seen)} oracles, and what it returned is evaluated in '
    f'{sum(bool(one.updates) for one in seen)}: hand each oracle to wrap, or '
    'set wraps=False.',
  )


def takes_injected_numbers(case):
  row = case.row
  if not row.hyper:
    return
  factory = lambda **hyper: build(row, **hyper)
  # inject_hyperparams reads the names off the signature, and takes the type of
  # numbers from the batch's first leaf, an integer, if it is not told one.
  kind = inspect.Parameter.KEYWORD_ONLY
  factory.__signature__ = inspect.Signature(
    [inspect.Parameter(name, kind) for name in row.hyper]
  )
  inject = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)
  solver = inject(**row.hyper)
  step = jax.jit(step_of(solver))
  params = row.params(0)
  now = step(params, solver.init(params), batch_of(0))
  second = step(*now, batch_of(1))
  for t, point in enumerate((now, second)):
    hint = 'A number under inject_hyperparams is an array that is traced.'
    require_same(f'update {t}', point[0], case.points[t][0], hint)
  expected = case.points[1][1]
  require_same('the losses', bj.values(second[1]), bj.values(expected))
  require(bj.counts(second[1]) == bj.counts(expected), 'the counts differ')
  for name, number in row.hyper.items():
    half = {name: jnp.float32(number / 2)}
    state = now[1]._replace(hyperparams=now[1].hyperparams | half)
    point = data(step(now[0], state, batch_of(1)))
    require(
      moved(sequences_of(point), sequences_of(case.points[1])),
      f'half the {name} changes nothing in the second update',
    )
    case.halved[name] = sequences_of(point)
  require(step._cache_size() == 1, 'other numbers are compiled once more')


def in_halves(oracle):
  return bj.evaluation.accumulate(oracle, 2)


def scan_vmap_schedules_and_accumulate(case):
  """All of them at once, in one program; if that fails, one after another."""
  row = case.row
  split = row.wraps and not row.keys and row.parts != 'none'
  try:
    _compare_lanes(case, in_halves if split else same, scheduled=True)
  except Exception as first:
    for what, scheduled in (('scan and vmap', False), ('schedules', True)):
      try:
        _compare_lanes(case, same, scheduled=scheduled)
      except Exception as error:
        raise Broken(f'{what}: {_said(error)}') from error
    raise Broken(
      f'accumulate: {_said(first)}\n  If the method is not linear in its '
      "samples, set parts='none'; if its losses alone are no means, "
      "parts='gradients'; if an evaluation sees what the one before it left, "
      'keys=True.'
    ) from first


def _compare_lanes(case, wrap, *, scheduled):
  """Runs of several seeds and schedules, vmapped, against steps of jit."""
  row = case.row
  names = tuple(row.hyper) if row.schedules is None else row.schedules
  names = [name for name in names if scheduled]
  require(set(names) <= set(row.hyper), 'schedules that are not in hyper')
  seeds = (0, 1, *[0] * len(names))
  # Each number is multiplied by this from the second update on.
  after = {name: np.ones(len(seeds), np.float32) for name in names}
  for lane, name in enumerate(names, 2):
    after[name][lane] = 0.5

  def one(params, after, batches):
    def schedule(name):
      share = lambda count: jnp.where(jnp.asarray(count) < 1, 1.0, after[name])
      return lambda count: row.hyper[name] * share(count)

    solver = build(row, wrap, **{name: schedule(name) for name in names})
    step = step_of(solver)

    def body(carry, batch):
      carry = step(*carry, batch)
      state = carry[1]
      return carry, (sequences_of(carry), bj.values(state), bj.counts(state))

    return jax.lax.scan(body, (params, solver.init(params)), batches)[1]

  together = jax.jit(jax.vmap(one, (0, 0, None)))
  batches = stacked([batch_of(t) for t in range(STEPS)])
  found = data(together(stacked(map(row.params, seeds)), after, batches))
  at = lambda lane, t: jax.tree.map(lambda x: x[lane, t], found)
  now = case.begin(1)
  for t in range(STEPS):
    ours, losses, counts = at(0, t)
    expected = case.points[t]
    what = f'update {t} of three in one program is not that of jit'
    require_same(what, ours, sequences_of(expected))
    if wrap is same or row.parts == 'exact':
      require_same(f'the losses of {what}', losses, bj.values(expected[1]))
    # What is projected, or is drawn, is so once an update.
    once = lambda name: wrap is same or name.startswith(('projec', 'rounds'))
    wanted = {n: (t + 1) * c * (2 - once(n)) for n, c in row.counts.items()}
    counted = {n: int(counts[n]) for n in wanted}
    require(counted == wanted, f'counts {counted}, not {wanted}')
    now = case.step(*now, batch_of(t))
    require_same(
      f'the other seed: {what}', at(1, t)[0], sequences_of(data(now))
    )
  require(case.step._cache_size() == 1, 'another seed is compiled once more')
  for lane, name in enumerate(names, 2):
    what = f'with a schedule of {name}, half from the second update on'
    require_same(
      f'{what}, the first one differs',
      at(lane, 0)[0],
      sequences_of(case.points[0]),
      'Some step sees another count than 0: bj.states.hold_updates goes round '
      'inner steps.',
    )
    if name in case.halved:
      require_same(
        f'{what}, that is not the one with half of it injected',
        at(lane, 1)[0],
        case.halved[name],
        f'Some step does not see the count 1, or {name} is no schedule: leave '
        'it out of `schedules`.',
      )


def gives_the_updates_of_another_row(case):
  if case.row.same_as is None:
    return
  other = FOUND.rows[case.row.same_as]
  require(dict(case.row.hyper) == dict(other.hyper), 'the numbers differ')
  theirs = Case(other)
  for one, two in zip(case.points, theirs.points):
    ours, named = sequences_of(one), sequences_of(two)
    # A bare oracle has in its parameters what a solver keeps in its state.
    shared = ours.keys() & named.keys()
    require(shared, 'no sequence of one name')
    require_same(
      f'the updates of {case.row.same_as}',
      {name: ours[name] for name in shared},
      {name: named[name] for name in shared},
      'Mend same_as, or one of the two forms.',
    )
    ours, theirs_values = bj.values(one[1]), bj.values(two[1])
    require_same('losses', ours, {n: theirs_values[n] for n in ours})


def stays_in_its_sets(case):
  row = case.row
  if not row.sets:
    return
  params = jax.tree.map(lambda x: x + 3, row.params(0))  # Outside.
  now = (params, case.solver.init(params))
  before = sequences_of(data(now))
  require(set(row.sets) <= set(before), f'there are {sorted(before)} only')
  for t in range(10):
    now = case.step(*now, batch_of(t % STEPS))
    after = sequences_of(data(now))
    for name, projection in row.sets.items():
      inside = projection(jax.tree.map(jnp.asarray, after[name]))
      for old, new, nearest in zip(
        *map(jax.tree.leaves, (before[name], after[name], inside))
      ):
        largest = np.maximum(np.abs(old), np.abs(new)).astype(np.float32)
        off = np.abs(new - nearest) / np.spacing(largest)
        require(
          np.all(off <= row.spacings),
          f'update {t}: {name} is {off.max():.1f} spacings of floats outside '
          f'its set; the row allows spacings={row.spacings}.',
        )
    before = after


# Many devices.


def mesh_of(shape, names):
  kinds = (jax.sharding.AxisType.Auto,) * len(names)
  return jax.make_mesh(shape, names, axis_types=kinds)


def of_coordinates(leaf):
  """Whether a leaf is sharded like parameters: by its last axis."""
  return leaf.shape[-1:] == (contract.COORDINATES,)


def sharded_parameters_and_batch(case):
  """Parameters over two devices, batches over four: jit alone does it."""
  mesh = mesh_of((4, 2), ('data', 'model'))
  place = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))
  where = lambda leaf: (
    place(*[None] * (leaf.ndim - 1), 'model')
    if of_coordinates(leaf)
    else place()
  )
  put = lambda tree: jax.tree.map(lambda x: jax.device_put(x, where(x)), tree)

  def require_places(tree, when):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      require(
        leaf.sharding.is_equivalent_to(where(leaf), leaf.ndim),
        f'{when}, {jax.tree_util.keystr(path)} of shape {leaf.shape} has the '
        f'sharding {leaf.sharding}, not {where(leaf)}. A last axis of '
        f'{contract.COORDINATES} is taken for coordinates: give arrays of '
        'another kind another length, and make state by zeros_like.',
      )

  params = put(case.row.params(0))
  state = case.solver.init(params)
  require_places(
    [leaf for leaf in jax.tree.leaves(state) if of_coordinates(leaf)], 'init'
  )
  now = params, put(state)
  step = jax.jit(step_of(case.solver), donate_argnums=(0, 1))
  for t in range(2):
    batch = jax.device_put(batch_of(t), place('data'))
    now = jax.block_until_ready(step(*now, batch))
    require_same(f'sharded, update {t}', now, case.points[t])
    require_places(now, f'after update {t}')
  require(step._cache_size() == 1, 'the second sharded step is compiled anew')


def mapped_devices(case):
  """The mean by hand, in a shard_map and in a pmap."""
  row = case.row
  if not row.wraps or row.parts == 'none':
    return
  _, start = case.make(mean_over_data)
  step = step_of(build(row, mean_over_data))
  forget = same if row.parts == 'exact' else without_losses
  hint = "If the method is not linear in its samples, set parts='none'."

  def compare(what, points):
    for t, point in enumerate(points):
      ours, theirs = forget(point), forget(case.points[t])
      require_same(f'{what}, update {t}', ours, theirs, hint)

  over = jax.shard_map(
    step,
    mesh=mesh_of((8,), ('data',)),
    in_specs=(P(), P(), P('data')),
    out_specs=(P(), P()),
  )
  compare('shard_map', case.run(jax.jit(over), start, 2))
  # One that does not check which values vary over devices.
  over = jax.pmap(step, 'data', in_axes=(None, None, 0), out_axes=None)
  by_device = bj.evaluation.split_batch(batch_of(0), 8)
  compare('pmap', [jax.block_until_ready(over(*start, by_device))])


# By default: what most faults break, in two compiled programs a row.
LIGHT = (
  compiles_once_and_keeps_types,
  moves,
  counts_what_it_evaluates,
  hands_its_oracles_to_wrap,
  gives_the_updates_of_another_row,
  stays_in_its_sets,
)
QUICK = (*LIGHT, keeps_bfloat16, scan_vmap_schedules_and_accumulate)
WHOLE = (
  *LIGHT,
  keeps_types_of_parameters,
  resumes_from_a_checkpoint,
  takes_injected_numbers,
  scan_vmap_schedules_and_accumulate,
)
DEVICES = (sharded_parameters_and_batch, mapped_devices)
# Rows of which all promises are checked by default: a penalty method, one with
# a hypergradient, an aggregator with a state, a wrapper with a key.
REPRESENTATIVES = ('v_pbgd', 'stocbio', 'moco', 'delayed, at random')


def broken_promises(row, checks, folder=None):
  """By promise, what is wrong; no check hides another."""
  unknown = [
    name
    for name in (row.method, *row.covers)
    if not any(name in names for names in contract.public_names().values())
  ]
  if unknown:
    return {'is public': f'{unknown} is no public name'}
  found = {}
  try:
    case = Case(row, folder)
  except Exception as error:
    return {'runs three updates': _said(error)}
  for check in checks:
    try:
      check(case)
    except Exception as error:
      found[check.__name__.replace('_', ' ')] = _said(error)
  return found


def _said(error):
  if isinstance(error, Broken):
    return str(error)
  return ''.join(traceback.format_exception(error, limit=-6))


def report(row, checks, folder):
  found = broken_promises(row, checks, folder)
  if found:
    parts = [f'* {promise}\n  {text}' for promise, text in found.items()]
    pytest.fail('\n'.join([f'{row.name}:', *parts]), pytrace=False)


each = lambda rows: pytest.mark.parametrize('name', [row.name for row in rows])


def quick_checks(row):
  """Of the first row of a method more than of its others."""
  if row.name in REPRESENTATIVES:
    return WHOLE + DEVICES
  same_method = [r for r in FOUND.rows.values() if r.method == row.method]
  return LIGHT if row.light or row is not same_method[0] else QUICK


@each(FOUND.rows.values())
def test_contract(name, tmp_path):
  row = FOUND.rows[name]
  report(row, quick_checks(row), tmp_path)


@pytest.mark.slow
@each(row for row in FOUND.rows.values() if row.name not in REPRESENTATIVES)
def test_contract_in_full(name, tmp_path):
  row = FOUND.rows[name]
  checks = LIGHT if row.light else WHOLE
  report(row, checks + DEVICES * row.devices, tmp_path)


_PVARY = 'jax refuses to make a value vary over an axis over which it varies'
_ONE = 'a state of the size of a batch or of coordinates is on one device'
# Known faults, of rows whose devices no other test looks at.
NOT_ON_DEVICES = {
  **dict.fromkeys(('pbrl', 'pbrl, Bellman penalty'), _PVARY),
  **dict.fromkeys(('nikaido_isoda', 'mean_over'), _PVARY),
  **dict.fromkeys(('lv_hba', 'stable'), _ONE),
}


@pytest.mark.slow
@each(row for row in FOUND.rows.values() if not row.devices)
def test_contract_on_devices(name):
  """The other rows, which treat devices as one of those above does."""
  if name in NOT_ON_DEVICES:
    pytest.xfail(NOT_ON_DEVICES[name])
  report(FOUND.rows[name], DEVICES, None)


@each(map(FOUND.rows.get, ('v_pbgd', 'moco')))
def test_without_jit(name):
  case = Case(FOUND.rows[name])
  step, start = case.make()
  require_same('without jit', step(*start, batch_of(0)), case.points[0])


# Methods with one fault each: what the contract says of them.


def _flat(link=None, wrap=same, loss=contract.flat_loss):
  oracle = wrap(bj.gradient(loss))
  return optax.chain(oracle, link or optax.identity(), optax.sgd(0.1))


def _link(init, update=lambda updates, state, params: (updates, state)):
  """A link with a state of its own."""
  return optax.GradientTransformationExtraArgs(
    init,
    lambda updates, state, params=None, **_: update(updates, state, params),
  )


def _row(make, counts=None, **flags):
  flags = {'params': contract.flat_params, 'hyper': {}} | flags
  cost = {'gradients/loss': 1} if counts is None else counts
  return contract.Row('gradient, with a fault', make, cost, **flags)


def _counts_steps(wrap, rate):
  """A schedule whose count no mark holds in inner steps."""
  steps = _link(
    lambda params: {'steps': jnp.zeros([], jnp.int32)},
    lambda updates, state, params: (
      optax.tree.scale(rate(state['steps']), updates)
      if callable(rate)
      else optax.tree.scale(rate, updates),
      {'steps': state['steps'] + 1},
    ),
  )
  record = bj.Sequence(optax.chain(steps, optax.scale(-1.0)), steps=2)
  return bj.descend(wrap(bj.lower_gradient(contract.PROBLEM)), lower=record)


def _square(params, batch):
  return contract.flat_loss(params, batch) ** 2


_OUTSIDE = np.random.default_rng(0)


def _noise():
  return _link(
    lambda params: (),
    lambda updates, state, params: (
      jax.tree.map(lambda u: u * _OUTSIDE.uniform(), updates),
      state,
    ),
  )


TYPES, ONCE = keeps_types_of_parameters, compiles_once_and_keeps_types
LANES = scan_vmap_schedules_and_accumulate
FAULTS = {
  'a missing method': (
    lambda: _row(lambda wrap: bj.solvers.unheard_of()),
    ONCE,
    "has no attribute 'unheard_of'",
  ),
  'a count that is a plain number': (
    lambda: _row(lambda wrap: _flat(_link(lambda params: 0))),
    ONCE,
    'is int 0, no array',
  ),
  'a number without a dtype': (
    lambda: _row(
      lambda wrap: _flat(
        _link(
          lambda params: jnp.asarray(0.0),
          lambda updates, state, params: (updates, state + jnp.float32(1)),
        )
      )
    ),
    ONCE,
    'were compiled 2 times. .*float32.* weak became float32',
  ),
  'a state that is the parameters': (
    lambda: _row(lambda wrap: _flat(_link(lambda params: params))),
    ONCE,
    'are one buffer',
  ),
  'a state as wide as floats are': (
    lambda: _row(
      lambda wrap: _flat(
        _link(
          lambda p: jnp.zeros(3, jnp.float32),
          lambda u, s, p: (u, s + np.ones(3)),
        )
      )
    ),
    TYPES,
    'float32[3] became float64[3]',
  ),
  'numbers from outside': (
    lambda: _row(lambda wrap: _flat(_noise())),
    LANES,
    'scan and vmap: update 0',
  ),
  'another count than it says': (
    lambda: _row(lambda wrap: _flat(), {'gradients/loss': 2}),
    counts_what_it_evaluates,
    "bj.counts has {'gradients/loss': 1}, the row {'gradients/loss': 2}",
  ),
  'no wrapper': (
    lambda: _row(lambda wrap: _flat()),
    hands_its_oracles_to_wrap,
    'wrap was given 0 oracles',
  ),
  'not linear in its samples': (
    lambda: _row(lambda wrap: _flat(wrap=wrap, loss=_square)),
    LANES,
    "set parts='none'",
  ),
  'a schedule that counts steps': (
    lambda: _row(
      _counts_steps,
      {'gradients/lower': 2},
      params=contract.nested_params,
      hyper={'rate': 0.1},
    ),
    LANES,
    'schedules: with a schedule of rate, .* sees another count than 0',
  ),
  'a number of no effect': (
    lambda: _row(lambda wrap, rate: _flat(), hyper={'rate': 0.1}),
    takes_injected_numbers,
    'half the rate changes nothing',
  ),
  'outside of its set': (
    lambda: _row(
      lambda wrap: bj.descend(
        bj.lower_gradient(contract.PROBLEM), lower=optax.sgd(0.1)
      ),
      {'gradients/lower': 1},
      params=contract.nested_params,
      sets={'lower': contract.Y_SET},
    ),
    stays_in_its_sets,
    'lower is .* spacings of floats outside its set',
  ),
  'the updates of another row': (
    lambda: _row(
      lambda wrap: optax.chain(bj.gradient(contract.flat_loss), optax.sgd(0.2)),
      same_as='gradient, sgd',
    ),
    gives_the_updates_of_another_row,
    r"\['it'\]\['z'\]: .* against .* at \[",
  ),
  'a state on one device': (
    lambda: _row(
      lambda wrap: _flat(_link(lambda params: jnp.zeros(contract.COORDINATES)))
    ),
    sharded_parameters_and_batch,
    'init, .* of shape .* A last axis of 10 is taken for coordinates',
  ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_found_and_said(fault):
  make, check, words = FAULTS[fault]
  said = '\n'.join(broken_promises(make(), (check,)).values())
  if '.*' not in words:
    words = re.escape(words)
  assert re.search(words, said, re.DOTALL), said


def test_one_module_that_cannot_be_read_hides_no_other(tmp_path, monkeypatch):
  folder = tmp_path / 'some_tests'
  folder.mkdir()
  head = 'from tests.contract import Row\n'
  for name, text in {
    'good': "ROWS = (Row('a', None, {}),)",
    'bad': 'import bilevel_jax as bj\nROWS = (bj.solvers.unheard_of,)',
    'twice': "ROWS = (Row('a', None, {}),)",
    'none': 'rows = 1',
  }.items():
    (folder / f'{name}_test.py').write_text(head + text)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(contract, 'TESTS', folder)
  found = contract.collect()
  assert list(found.rows) == ['a']
  assert 'unheard_of' in found.broken['some_tests.bad_test']
  assert "two rows have the name 'a'" in found.broken['some_tests.twice_test']
  assert len(found.broken) == 2


# The table.


def test_every_module_of_rows_is_read():
  assert not FOUND.broken, FOUND.broken


def test_every_public_method_has_a_row():
  lacking = contract.missing(contract.public_names(), FOUND.rows.values())
  assert not lacking, (
    f'public, but without a row beside its test: {lacking}. Add a Row to ROWS '
    'there, or the name to contract.HELPERS if it solves nothing.'
  )
  public = set(itertools.chain.from_iterable(contract.public_names().values()))
  assert public >= contract.HELPERS, contract.HELPERS - public


def test_a_method_without_a_row_is_found():
  public = {'solvers': ('v_pbgd', 'unheard_of'), 'evaluation': ('split_batch',)}
  rows = FOUND.rows.values()
  assert contract.missing(public, rows) == ['solvers.unheard_of']


def test_rows_that_are_the_same_exist():
  for row in FOUND.rows.values():
    assert row.same_as is None or row.same_as in FOUND.rows, row.name
    assert row.parts in ('exact', 'gradients', 'none'), row.name
