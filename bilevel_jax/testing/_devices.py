"""Promises on eight devices: sharded by jit, in a shard_map and in a pmap."""

from typing import Any

import jax

from bilevel_jax import evaluation
from bilevel_jax.testing import _case, _compare, _problem

P = jax.sharding.PartitionSpec


def mesh_of(shape, names):
  kinds = (jax.sharding.AxisType.Auto,) * len(names)
  return jax.make_mesh(shape, names, axis_types=kinds)


def of_coordinates(leaf):
  """Whether a leaf is sharded like parameters: by its last axis."""
  return leaf.shape[-1:] == (_problem.COORDINATES,)


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
      _compare.require(
        leaf.sharding.is_equivalent_to(where(leaf), leaf.ndim),
        f'{when}, {jax.tree_util.keystr(path)} of shape {leaf.shape} has the '
        f'sharding {leaf.sharding}, not {where(leaf)}. A last axis of '
        f'{_problem.COORDINATES} is taken for coordinates: give arrays of '
        'another kind another length, and make state by zeros_like.',
      )

  params = put(case.row.params(0))
  state = case.solver.init(params)
  require_places(
    [leaf for leaf in jax.tree.leaves(state) if of_coordinates(leaf)], 'init'
  )
  now = params, put(state)
  step: Any = jax.jit(_case.step_of(case.solver), donate_argnums=(0, 1))
  for t in range(2):
    batch = jax.device_put(_case.batch_of(t), place('data'))
    now = jax.block_until_ready(step(*now, batch))
    _compare.require_same(f'sharded, update {t}', now, case.points[t])
    require_places(now, f'after update {t}')
  _compare.require(
    step._cache_size() == 1, 'the second sharded step is compiled again'
  )


def mapped_devices(case):
  """The mean by hand, in a shard_map and in a pmap."""
  row = case.row
  if not row.wraps or row.parts == 'none':
    return
  _, start = case.make(_case.mean_over_data)
  step = _case.step_of(_case.build(row, _case.mean_over_data))
  forget = _case.same if row.parts == 'exact' else _compare.without_losses
  hint = "If the method is not linear in its samples, set parts='none'."

  def compare(what, points):
    for t, point in enumerate(points):
      actual, expected = forget(point), forget(case.points[t])
      _compare.require_same(f'{what}, update {t}', actual, expected, hint)

  over = jax.shard_map(
    step,
    mesh=mesh_of((8,), ('data',)),
    in_specs=(P(), P(), P('data')),
    out_specs=(P(), P()),
  )
  compare('shard_map', case.run(jax.jit(over), start, 2))
  # One that does not check which values vary over devices.
  over = jax.pmap(step, 'data', in_axes=(None, None, 0), out_axes=None)
  by_device = evaluation.split_batch(_case.batch_of(0), 8)
  compare('pmap', [jax.block_until_ready(over(*start, by_device))])
