"""Maps a solver over clients.

A solver is written for one client, with means over a named axis where clients
communicate. `over_clients` maps it over clients, on one or several devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj

# Names of the axes of clients on a device, and of devices.
LOCAL, DEVICES = 'local_clients', 'clients'


def mean_client(params: Any) -> Any:
  """Averages params over clients, for evaluation."""
  return jax.tree.map(lambda z: z.mean(axis=0), params)


def _shared(leaf: Any) -> bool:
  # Keys, projection draws and counts are the same for all clients.
  return not jnp.issubdtype(leaf.dtype, jnp.inexact)


def _has_losses(node: Any) -> bool:
  return bj.states.is_oracle_state(node) or isinstance(node, bj.types.Numbers)


def _pack(state: Any, axis_name: Any) -> Any:
  """Keeps one copy of shared leaves, and averages losses over clients."""

  def losses(leaf):
    mean = leaf.mean(axis=0)
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)

  def one(node):
    if isinstance(node, bj.types.Numbers):
      return dataclasses.replace(
        node,
        value_array=losses(node.value_array),
        count_array=node.count_array[0],
      )
    if bj.states.is_oracle_state(node):
      values = jax.tree.map(losses, node.values)
      counts, inner = _pack((node.counts, node.inner), axis_name)
      return bj.states.OracleState(values, counts, inner)
    return node[0] if _shared(node) else node

  return jax.tree.map(one, state, is_leaf=_has_losses)


def _own_axes(state: Any, own: Any, shared: Any) -> Any:
  """Labels each leaf of a state as `own` (per client) or `shared`."""

  def one(node):
    if isinstance(node, bj.types.Numbers):
      return dataclasses.replace(node, value_array=shared, count_array=shared)
    if bj.states.is_oracle_state(node):
      values = jax.tree.map(lambda _: shared, node.values)
      counts, inner = _own_axes((node.counts, node.inner), own, shared)
      return bj.states.OracleState(values, counts, inner)
    return shared if _shared(node) else own

  return jax.tree.map(one, state, is_leaf=_has_losses)


def over_clients(
  make_solver: Callable[[Any], optax.GradientTransformationExtraArgs],
  mesh: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Maps the solver of one client over all clients.

  Keys and counts are shared, so that all clients project, and communicate, in
  the same steps.

  Args:
    make_solver: makes the solver from the axis name(s) of the clients.
    mesh: mesh with the axis `DEVICES`, whose size divides the number of
      clients; None for one device.

  Returns:
    A solver for params and batches with a leading axis of clients.
  """
  names = LOCAL if mesh is None else (DEVICES, LOCAL)
  solver = make_solver(names)

  def init_fn(params):
    return _pack(jax.vmap(solver.init)(params), None)

  def local(batch, state, params):
    axes = _own_axes(state, 0, None)
    updates, state = jax.vmap(
      solver.update, in_axes=(0, axes, 0), axis_name=LOCAL
    )(batch, state, params)
    return updates, _pack(state, None if mesh is None else DEVICES)

  def update_fn(batch, state, params=None, **extra_args):
    del extra_args
    if mesh is None:
      return local(batch, state, params)
    split = jax.sharding.PartitionSpec(DEVICES)
    replicated = jax.sharding.PartitionSpec()
    specs = _own_axes(state, split, replicated)
    # jax cannot check means over the axis of the inner vmap.
    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(split, specs, split),
      out_specs=(split, specs),
      check_vma=False,
    )(batch, state, params)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class PartialState(NamedTuple):
  """State of `sampled_clients`.

  Attributes:
    inner: state of the mapped solver, for all clients.
    key: PRNG key of the draws of clients.
    counts: rounds of the final mean of the lower variable.
  """

  inner: Any
  key: chex.PRNGKey
  counts: dict[str, chex.Array]


def sampled_clients(
  solver: optax.GradientTransformationExtraArgs,
  taking_part: int,
  seed: Any,
  rounds: int = 1,
) -> optax.GradientTransformationExtraArgs:
  """Samples participating clients for each update.

  An update ends with a mean of the lower variables of these clients, one more
  round, from which all clients continue. The other clients keep their
  control variates and warm starts.

  Args:
    solver: solver of `over_clients`, on one device.
    taking_part: number of participating clients.
    seed: seed of the draws.
    rounds: rounds of the final mean; 0 if the solver ends with equal lower
      variables.

  Returns:
    A solver for params and batches of all clients.
  """

  def init_fn(params):
    count = {'rounds/lower': jnp.zeros([], jnp.int32)}
    return PartialState(solver.init(params), jax.random.key(seed), count)

  def update_fn(batch, state, params=None, **extra_args):
    clients = jax.tree.leaves(params)[0].shape[0]
    key, draw_key = jax.random.split(state.key)
    rows = jax.random.permutation(draw_key, clients)[:taking_part]
    select = lambda tree: jax.tree.map(lambda z: z[rows], tree)
    own = _own_axes(state.inner, True, False)
    inner = jax.tree.map(
      lambda z, is_own: z[rows] if is_own else z, state.inner, own
    )
    chosen = select(params)
    updates, inner = solver.update(select(batch), inner, chosen, **extra_args)
    after = mean_client(bj.apply_updates(chosen, updates))
    inner = jax.tree.map(
      lambda old, new, is_own: old.at[rows].set(new) if is_own else new,
      state.inner,
      inner,
      own,
    )
    moved = jax.tree.map(lambda z, old: z - old, after, params)
    counts = {'rounds/lower': state.counts['rounds/lower'] + rounds}
    return moved, PartialState(inner, key, counts)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
