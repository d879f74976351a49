"""Promises on eight devices: sharded jit, shard_map and pmap."""

from typing import Any

import jax

from bilevel_jax import evaluation
from bilevel_jax.testing import _case, _compare, _problem

P = jax.sharding.PartitionSpec


def make_mesh(shape, names):
  kinds = (jax.sharding.AxisType.Auto,) * len(names)
  return jax.make_mesh(shape, names, axis_types=kinds)


def has_coordinates(leaf):
  """Whether the last axis of a leaf is sharded like parameters."""
  return leaf.shape[-1:] == (_problem.COORDINATES,)


def sharded_parameters_and_batch(case):
  """Sharded parameters (2 devices) and batches (4) give the same updates."""
  mesh = make_mesh((4, 2), ('data', 'model'))
  place = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))
  where = lambda leaf: (
    place(*[None] * (leaf.ndim - 1), 'model')
    if has_coordinates(leaf)
    else place()
  )
  put = lambda tree: jax.tree.map(lambda x: jax.device_put(x, where(x)), tree)

  def require_places(tree, when):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      _compare.require(
        leaf.sharding.is_equivalent_to(where(leaf), leaf.ndim),
        f'{when}, {jax.tree_util.keystr(path)} of shape {leaf.shape} has the '
        f'sharding {leaf.sharding}, not {where(leaf)}. A last axis of length '
        f'{_problem.COORDINATES} counts as coordinates: give other arrays '
        'another length, and create state by zeros_like.',
      )

  params = put(case.row.params(0))
  state = case.solver.init(params)
  require_places(
    [leaf for leaf in jax.tree.leaves(state) if has_coordinates(leaf)], 'init'
  )
  now = params, put(state)
  step: Any = jax.jit(_case.make_step(case.solver), donate_argnums=(0, 1))
  for t in range(2):
    batch = jax.device_put(_case.cached_batch(t), place('data'))
    now = jax.block_until_ready(step(*now, batch))
    _compare.require_same(f'sharded, update {t}', now, case.points[t])
    require_places(now, f'after update {t}')
  _compare.require(
    step._cache_size() == 1, 'the second sharded step compiles again'
  )


def mapped_devices(case):
  """`mean_over` in a shard_map and in a pmap gives the same updates."""
  row = case.row
  if not row.wraps or row.parts == 'none':
    return
  _, start = case.make(_case.mean_over_data)
  step = _case.make_step(_case.build(row, _case.mean_over_data))
  compared = _case.identity if row.parts == 'exact' else _compare.without_losses
  hint = "If the method is not linear in its samples, set parts='none'."

  def compare(what, points):
    for t, point in enumerate(points):
      actual, expected = compared(point), compared(case.points[t])
      _compare.require_same(f'{what}, update {t}', actual, expected, hint)

  over = jax.shard_map(
    step,
    mesh=make_mesh((8,), ('data',)),
    in_specs=(P(), P(), P('data')),
    out_specs=(P(), P()),
  )
  compare('shard_map', case.run(jax.jit(over), start, 2))
  # Unlike shard_map, pmap does not check which values vary over devices.
  over = jax.pmap(step, 'data', in_axes=(None, None, 0), out_axes=None)
  by_device = evaluation.split_batch(_case.cached_batch(0), 8)
  compare('pmap', [jax.block_until_ready(over(*start, by_device))])
