"""What every solver, link, aggregator, oracle and wrapper promises.

The rows are in `contract.py`. Most tests compare with one reference run of
three steps, made once a row.
"""

import functools
import inspect
import itertools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bilevel_jax as bj
from bilevel_jax import aggregators, combinators, evaluation, oracles, solvers
from tests import contract

P = jax.sharding.PartitionSpec
STEPS = 3
# Of float32 sums in another order.
CLOSE = {'rtol': 2e-5, 'atol': 2e-6}

every_row = pytest.mark.parametrize('row', contract.ROWS, ids=lambda r: r.name)


def rows_where(condition, *, devices=False):
  """The rows for which a condition holds.

  Args:
    condition: of a row.
    devices: whether the test compiles for several devices. There, rows that
      are made from the same parts as another one run with `-m slow`.
  """
  slow = lambda row: [pytest.mark.slow] if devices and row.alike else []
  return pytest.mark.parametrize(
    'row',
    [
      pytest.param(row, marks=slow(row))
      for row in contract.ROWS
      if condition(row)
    ],
    ids=lambda r: r.name,
  )


on_devices = rows_where(lambda row: True, devices=True)


def same(wrapped):
  return wrapped


def mean_over_data(oracle):
  return bj.evaluation.mean_over(oracle, 'data')


def build(row, wrap=same, **hyper):
  return row.make(wrap, **(dict(row.hyper) | hyper))


def step_of(solver):
  def step(params, state, batch):
    updates, state = solver.update(batch, state, params)
    return bj.apply_updates(params, updates), state

  return step


def batch_of(step):
  return contract.random_batch(step)


def run(step, params, state, first=0, last=STEPS):
  """Steps of a compiled step, each waited for."""
  points = []
  for t in range(first, last):
    params, state = jax.block_until_ready(step(params, state, batch_of(t)))
    points.append((params, state))
  return points


class Reference(NamedTuple):
  solver: Any
  step: Any  # Compiled.
  start: Any  # Parameters and state.
  points: Any  # The same after each step.


@functools.cache
def reference_of(name):
  row = contract.NAMED[name]
  solver = build(row)
  params = row.params(0)
  start = (params, solver.init(params))
  step = jax.jit(step_of(solver))
  return Reference(solver, step, start, run(step, *start))


def reference(row):
  return reference_of(row.name)


def data(tree):
  """A tree with keys as their numbers: numpy cannot compare keys."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(
    lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree
  )


def assert_equal(ours, theirs):
  chex.assert_trees_all_equal(data(ours), data(theirs))


def assert_close(ours, theirs, row=None):
  """Equal up to the order of sums, and to losses that are no means."""
  if row is not None and not row.linear:
    forget = lambda tree: jax.tree.map(
      lambda node: (
        node._replace(values=()) if isinstance(node, bj.oracles.OracleState) else node
      ),
      tree,
      is_leaf=lambda node: isinstance(node, bj.oracles.OracleState),
    )
    ours, theirs = forget(ours), forget(theirs)
  chex.assert_trees_all_close(data(ours), data(theirs), **CLOSE)


def sequences_of(point):
  """The parameters, and the sequences that the state keeps."""
  return point[0], bj.auxiliaries(point[1])


def sharded(tree, sharding):
  return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), tree)


def mesh_of(shape, names):
  kinds = (jax.sharding.AxisType.Auto,) * len(names)
  return jax.make_mesh(shape, names, axis_types=kinds)


# The table.


def test_every_public_method_has_a_row():
  order = [
    name
    for name in bj.__all__
    if getattr(getattr(bj, name), '__module__', '') == combinators.__name__
    and not isinstance(getattr(bj, name), type)
  ]
  assert 'alternate' in order
  public = {
    'combinators': tuple(order),
    'projections': ('project', 'lazy_projection'),
  }
  for package in (oracles, aggregators, evaluation, solvers):
    public[package.__name__.split('.')[-1]] = tuple(
      name
      for name in package.__all__
      if not isinstance(getattr(package, name), type)
    )
  lacking = contract.missing(public)
  assert not lacking, (
    f'public, but without a row in tests/contract.py: {lacking}. Add a Row, or '
    'the name to HELPERS if it is no method.'
  )


def test_a_method_without_a_row_is_found():
  public = {'solvers': ('v_pbgd', 'unheard_of'), 'evaluation': ('split_batch',)}
  assert contract.missing(public) == ['solvers.unheard_of']


def test_rows_are_well_formed():
  assert len(contract.NAMED) == len(contract.ROWS)
  kinds = {'solver', 'link', 'aggregator', 'oracle', 'wrapper'}
  for row in contract.ROWS:
    assert row.kind in kinds, row.name
    assert all(hasattr(bj, name) for name in row.covers), row.name
    assert set(row.schedules) <= set(row.hyper), row.name
    assert row.same_as is None or row.same_as in contract.NAMED, row.name


# Compilation.


@every_row
def test_jit_changes_nothing(row):
  ref = reference(row)
  eager = step_of(ref.solver)(*ref.start, batch_of(0))
  assert_close(eager, ref.points[0])


@every_row
def test_moves(row):
  ref = reference(row)
  before, after = ref.start[0], ref.points[0][0]
  moved = [
    bool(jnp.any(a != b))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after))
  ]
  assert any(moved)


@every_row
def test_compiles_once(row):
  ref = reference(row)
  assert len(ref.points) == STEPS
  assert ref.step._cache_size() == 1


@on_devices
def test_scan(row):
  ref = reference(row)
  batches = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *map(batch_of, range(STEPS))
  )
  step = step_of(ref.solver)
  scan = lambda carry: jax.lax.scan(
    lambda carry, batch: (step(*carry, batch), None), carry, batches
  )
  assert_close(jax.jit(scan)(ref.start)[0], ref.points[-1])


@on_devices
def test_vmap_over_seeds_equals_one_by_one(row):
  ref = reference(row)
  starts = [row.params(seed) for seed in range(3)]
  one_by_one = [
    ref.step(params, ref.solver.init(params), batch_of(0)) for params in starts
  ]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)

  @jax.jit
  def together(params, batch):
    state = jax.vmap(ref.solver.init)(params)
    return jax.vmap(step_of(ref.solver), (0, 0, None))(params, state, batch)

  found = together(stacked, batch_of(0))
  for seed, expected in enumerate(one_by_one):
    assert_close(jax.tree.map(lambda x, s=seed: x[s], found), expected)


@every_row
def test_init_while_parameters_are_traced_or_closed_over(row):
  ref = reference(row)
  assert_equal(jax.jit(ref.solver.init)(ref.start[0]), ref.start[1])
  assert_equal(jax.jit(lambda: ref.solver.init(ref.start[0]))(), ref.start[1])


# Many devices.


@on_devices
def test_jit_with_a_sharded_batch(row):
  ref = reference(row)
  mesh = mesh_of((8,), ('data',))
  everywhere = jax.sharding.NamedSharding(mesh, P())
  params, state = sharded(ref.start, everywhere)
  step = jax.jit(step_of(ref.solver))
  split = jax.sharding.NamedSharding(mesh, P('data'))
  for t in range(2):
    batch = sharded(batch_of(t), split)
    params, state = jax.block_until_ready(step(params, state, batch))
    assert_close((params, state), ref.points[t])
    for leaf in jax.tree.leaves((params, state)):
      assert leaf.sharding.is_equivalent_to(everywhere, leaf.ndim)
  assert step._cache_size() == 1


@on_devices
def test_jit_with_sharded_parameters_keeps_their_sharding(row):
  ref = reference(row)
  mesh = mesh_of((4, 2), ('data', 'model'))
  place = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))
  # Coordinates are last: a table of them has other axes before.
  where = lambda leaf: (
    place(*[None] * (leaf.ndim - 1), 'model')
    if leaf.shape[-1:] == (2,)
    else place()
  )
  put = lambda leaf: jax.device_put(leaf, where(leaf))
  # A key's one number has no axis of coordinates.
  params, state = jax.tree.map(put, ref.start)
  step = jax.jit(step_of(ref.solver))
  for t in range(2):
    batch = sharded(batch_of(t), place('data'))
    params, state = jax.block_until_ready(step(params, state, batch))
    assert_close((params, state), ref.points[t])
    for leaf in jax.tree.leaves((params, state)):
      assert leaf.sharding.is_equivalent_to(where(leaf), leaf.ndim)
  assert step._cache_size() == 1


@every_row
def test_state_of_sharded_parameters_is_sharded_like_them(row):
  ref = reference(row)
  mesh = mesh_of((2,), ('model',))
  split = jax.sharding.NamedSharding(mesh, P('model'))
  params = sharded(ref.start[0], split)
  for leaf in jax.tree.leaves(ref.solver.init(params)):
    if leaf.shape == (2,):
      assert leaf.sharding.is_equivalent_to(split, leaf.ndim)


@pytest.mark.parametrize('checked', [True, False])
@rows_where(lambda row: row.wraps, devices=True)
def test_shard_map_with_mean_over(row, checked):
  if checked and row.maps:
    pytest.skip('jax has no mean over a vmapped axis in a checked shard_map')
  ref = reference(row)
  solver = build(row, mean_over_data)
  step = jax.jit(
    jax.shard_map(
      step_of(solver),
      mesh=mesh_of((8,), ('data',)),
      in_specs=(P(), P(), P('data')),
      out_specs=(P(), P()),
      check_vma=checked,
    )
  )
  params, state = ref.start[0], solver.init(ref.start[0])
  for t, point in enumerate(run(step, params, state, last=2)):
    assert_close(point, ref.points[t], row)


@rows_where(lambda row: row.wraps, devices=True)
def test_pmap_with_mean_over(row):
  ref = reference(row)
  solver = build(row, mean_over_data)
  params, state = ref.start[0], solver.init(ref.start[0])
  step = jax.pmap(
    step_of(solver), 'data', in_axes=(None, None, 0), out_axes=None
  )
  by_device = bj.evaluation.split_batch(batch_of(0), 8)
  point = jax.block_until_ready(step(params, state, by_device))
  assert_close(point, ref.points[0], row)


# Types and memory.


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32', 'float64'])
@every_row
def test_keeps_types(row, dtype):
  with jax.enable_x64(dtype == 'float64'):
    dtype = jnp.dtype(dtype)
    solver = build(row)
    params = row.params(0, dtype)
    state = solver.init(params)
    batch = contract.random_batch(0, dtype)
    after = jax.eval_shape(step_of(solver), params, state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes((params, state), after)
    weak = lambda tree: [
      getattr(jax.typeof(leaf), 'weak_type', False)
      for leaf in jax.tree.leaves(tree)
    ]
    assert weak((params, state)) == [
      getattr(leaf, 'weak_type', False) for leaf in jax.tree.leaves(after)
    ]
    measured = jnp.promote_types(dtype, jnp.float32)
    for name, value in bj.values(state).items():
      assert value.dtype == measured, name


@every_row
def test_buffers_can_be_donated(row):
  ref = reference(row)
  # Of this test alone: donation deletes them.
  params = jax.tree.map(lambda x: jnp.array(x, copy=True), ref.start[0])
  state = ref.solver.init(params)
  places = [
    leaf.unsafe_buffer_pointer()
    for leaf in jax.tree.leaves((params, state))
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  ]
  assert len(set(places)) == len(places), 'two leaves share one buffer'
  step = jax.jit(step_of(ref.solver), donate_argnums=(0, 1))
  points = run(step, params, state)
  assert_close(points[-1], ref.points[-1])
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


# Arguments.


@every_row
def test_accepts_unknown_extra_arguments(row):
  ref = reference(row)
  params, state = ref.start
  ones = jnp.ones(3)
  plain = lambda: ref.solver.update(batch_of(0), state, params)
  extra = lambda: ref.solver.update(
    batch_of(0), state, params, never_heard_of=ones, names='any'
  )
  assert str(jax.make_jaxpr(extra)()) == str(jax.make_jaxpr(plain)())


@pytest.mark.parametrize(
  ('row', 'name'),
  [(row, name) for row in contract.ROWS for name in row.schedules],
  ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_schedule_sees_the_number_of_updates_before(row, name):
  ref = reference(row)
  number = row.hyper[name]
  schedule = lambda count: jnp.where(count < 1, number, number / 2)
  solver = build(row, **{name: schedule})
  step = jax.jit(step_of(solver))
  points = run(step, ref.start[0], solver.init(ref.start[0]), last=2)
  if name == 'penalty':
    assert_close(points[0][0], ref.points[0][0])
  differs = [
    not np.allclose(a, b, rtol=1e-4)
    for a, b in zip(
      jax.tree.leaves(sequences_of(points[1])),
      jax.tree.leaves(sequences_of(ref.points[1])),
    )
  ]
  assert any(differs)


@every_row
def test_inject_hyperparams(row):
  ref = reference(row)

  def factory(**hyper):
    return build(row, **hyper)

  # inject_hyperparams reads the names off the signature.
  named = inspect.Parameter.KEYWORD_ONLY
  factory.__signature__ = inspect.Signature(
    [inspect.Parameter(name, named) for name in row.hyper]
  )
  # Else the numbers are cast to the type of the batch's first leaf, an integer.
  inject = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)
  solver = inject(**row.hyper)
  params, state = ref.start[0], solver.init(ref.start[0])
  step = jax.jit(step_of(solver))
  points = run(step, params, state, last=2)
  for t in range(2):
    assert_close(points[t][0], ref.points[t][0])
  assert bj.counts(points[1][1]) == bj.counts(ref.points[1][1])
  chex.assert_trees_all_close(
    bj.values(points[1][1]), bj.values(ref.points[1][1]), **CLOSE
  )
  for name, number in row.hyper.items():
    state = points[0][1]
    changed = state._replace(
      hyperparams=state.hyperparams | {name: jnp.float32(number / 2)}
    )
    other = step(points[0][0], changed, batch_of(1))
    gap = optax.tree.norm(
      optax.tree.sub(sequences_of(other), sequences_of(points[1]))
    )
    assert gap > 1e-4, f'{name} has no effect'
  assert step._cache_size() == 1


@rows_where(lambda row: row.wraps and not row.keys)
def test_accumulate_equals_the_whole_batch(row):
  ref = reference(row)
  solver = build(row, lambda oracle: bj.evaluation.accumulate(oracle, 2))
  step = jax.jit(step_of(solver))
  points = run(step, ref.start[0], solver.init(ref.start[0]), last=2)
  for t in range(2):
    assert_close(points[t][0], ref.points[t][0])
    if row.linear:
      chex.assert_trees_all_close(
        bj.values(points[t][1]), bj.values(ref.points[t][1]), **CLOSE
      )
  scale = lambda name: 1 if name.startswith('projections') else 2
  expected = {name: 2 * scale(name) * n for name, n in row.counts.items()}
  assert bj.counts(points[1][1]) == expected


@rows_where(lambda row: row.same_as)
def test_gives_the_updates_of_another_row(row):
  theirs = contract.NAMED[row.same_as]
  assert dict(row.hyper) == dict(theirs.hyper)
  for one, two in zip(reference(row).points, reference(theirs).points):
    assert_close(*_shared(one[0], two[0]))
    ours = bj.values(one[1])
    chex.assert_trees_all_close(
      ours, {name: bj.values(two[1])[name] for name in ours}, **CLOSE
    )


# What it computes.


def _shared(one, two):
  """The sequences of both; a bare oracle has what a solver keeps in state."""
  if not hasattr(one, '_fields'):
    return one, two
  names = set(one._fields) & set(two._fields)
  assert names
  return [{name: getattr(p, name) for name in names} for p in (one, two)]


@every_row
def test_solves_its_closed_form_problem(row):
  with jax.enable_x64(True):
    solver = build(row)
    params = row.params(0, jnp.float64)
    state = solver.init(params)
    batch = contract.solved_batch(jnp.float64)
    step = step_of(solver)

    @jax.jit
    def solve(params, state):
      return jax.lax.fori_loop(
        0, row.steps, lambda _, carry: step(*carry, batch), (params, state)
      )

    end, _ = solve(params, state)
    found = end._asdict() if hasattr(end, '_asdict') else end
    solution = row.solution()
    assert solution
    chex.assert_trees_all_close(
      {name: found[name] for name in solution}, solution, atol=row.tolerance
    )
    gap = jax.tree.map(
      lambda a, b: np.max(np.abs(a - b)),
      {name: found[name] for name in solution},
      solution,
    )
    start = params._asdict() if hasattr(params, '_asdict') else params
    far = jax.tree.map(
      lambda a, b: np.max(np.abs(a - b)),
      {name: start[name] for name in solution},
      solution,
    )
    assert max(jax.tree.leaves(gap)) < 1e-3 * max(jax.tree.leaves(far))


@rows_where(lambda row: row.sets)
def test_stays_in_its_sets_up_to_some_spacings_of_floats(row):
  ref = reference(row)
  everything = lambda point: point[0]._asdict() | bj.auxiliaries(point[1])
  outside = row.params(0)
  points = [(outside, ref.solver.init(outside))]
  params = jax.tree.map(lambda x: x + 3, outside)  # Starts outside.
  points += run(ref.step, params, ref.solver.init(params), last=20)
  assert set(row.sets) <= set(everything(points[0]))
  for before, after in itertools.pairwise(points):
    for name, projection in row.sets.items():
      old, new = everything(before)[name], everything(after)[name]
      for z0, z, inside in zip(
        jax.tree.leaves(old),
        jax.tree.leaves(new),
        jax.tree.leaves(projection(new)),
      ):
        largest = np.maximum(np.abs(z0), np.abs(z)).astype(np.float32)
        room = row.spacings * np.spacing(largest)
        assert np.all(np.abs(z - inside) <= room), name


@every_row
def test_counts_what_it_evaluates(row):
  ref = reference(row)
  names = (*row.counts, *row.random_counts)
  assert bj.counts(ref.start[1]) == dict.fromkeys(names, 0)
  for t, (_, state) in enumerate(ref.points, 1):
    counted = bj.counts(state)
    drawn = {name: counted.pop(name) for name in row.random_counts}
    assert all(0 <= n <= 8 * t for n in drawn.values())
    assert counted == {name: t * n for name, n in row.counts.items()}


@every_row
def test_resumes_bit_for_bit_from_a_checkpoint(row, tmp_path):
  ref = reference(row)
  saved = ref.points[1]
  empty = jax.tree.map(jnp.zeros_like, ref.start) if not row.keys else ref.start
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'step', saved)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'step', empty)
  chex.assert_trees_all_equal_structs(restored, saved)
  assert_equal(restored, saved)
  assert_equal(ref.step(*restored, batch_of(2)), ref.points[2])
