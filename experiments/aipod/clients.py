"""Maps a solver over clients, and says who talks to whom.

A solver is written for one client, with means over a named axis where clients
communicate. `over_clients` maps it over clients, on one device or on many.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj

# The axis of clients on one device, and of devices.
LOCAL, DEVICES = 'local_clients', 'clients'


def mean_client(params: Any) -> Any:
  """The mean over clients; evaluating it is no communication."""
  return jax.tree.map(lambda z: z.mean(axis=0), params)


def _shared(leaf: Any) -> bool:
  # Keys, coins and counts are the same for all clients.
  return not jnp.issubdtype(leaf.dtype, jnp.inexact)


def _is_measured(node: Any) -> bool:
  return bj.states.is_oracle_state(node) or isinstance(node, bj.types.Numbers)


def _pack(state: Any, axis_name: Any) -> Any:
  """One copy of what clients share, the mean of the losses they measured."""

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

  return jax.tree.map(one, state, is_leaf=_is_measured)


def _own_axes(state: Any, own: Any, shared: Any) -> Any:
  """`own` for each leaf that clients have copies of, `shared` for the rest."""

  def one(node):
    if isinstance(node, bj.types.Numbers):
      return dataclasses.replace(node, value_array=shared, count_array=shared)
    if bj.states.is_oracle_state(node):
      values = jax.tree.map(lambda _: shared, node.values)
      counts, inner = _own_axes((node.counts, node.inner), own, shared)
      return bj.states.OracleState(values, counts, inner)
    return shared if _shared(node) else own

  return jax.tree.map(one, state, is_leaf=_is_measured)


def over_clients(
  make_solver: Callable[[Any], optax.GradientTransformationExtraArgs],
  mesh: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Maps a solver of one client over all, by `vmap` and over devices.

  Keys and counts are kept once, so that a coin is one for all clients and a
  tail does not communicate.

  Args:
    make_solver: makes it from the name or names of the clients' axis.
    mesh: devices along the axis `DEVICES`, which divide the clients; None for
      one device.

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
    whole = jax.sharding.PartitionSpec()
    specs = _own_axes(state, split, whole)
    # jax cannot check means over a mapped axis within.
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
    inner: of the mapped solver, for all clients.
    key: draws who takes part.
    counts: the mean of the lower variable that ends each update.
  """

  inner: Any
  key: chex.PRNGKey
  counts: dict[str, chex.Array]


def sampled_clients(
  solver: optax.GradientTransformationExtraArgs, taking_part: int, seed: Any
) -> optax.GradientTransformationExtraArgs:
  """Lets a random few of the clients take part in each update.

  They end it with a mean of their lower variables, one more communication, and
  all clients go on from the result. Who does not take part keeps its control
  variate and its warm start.

  Args:
    solver: of `over_clients`, on one device.
    taking_part: how many clients.
    seed: of the draws.

  Returns:
    A solver for params and batches of all clients.
  """

  def init_fn(params):
    count = {'rounds/lower': jnp.zeros([], jnp.int32)}
    return PartialState(solver.init(params), jax.random.key(seed), count)

  def update_fn(batch, state, params=None, **extra_args):
    clients = jax.tree.leaves(params)[0].shape[0]
    key, now = jax.random.split(state.key)
    rows = jax.random.permutation(now, clients)[:taking_part]
    few = lambda tree: jax.tree.map(lambda z: z[rows], tree)
    own = _own_axes(state.inner, True, False)
    inner = jax.tree.map(
      lambda z, mine: z[rows] if mine else z, state.inner, own
    )
    updates, inner = solver.update(few(batch), inner, few(params), **extra_args)
    after = mean_client(bj.apply_updates(few(params), updates))
    inner = jax.tree.map(
      lambda old, new, mine: old.at[rows].set(new) if mine else new,
      state.inner,
      inner,
      own,
    )
    moved = jax.tree.map(lambda z, old: z - old, after, params)
    counts = {'rounds/lower': state.counts['rounds/lower'] + 1}
    return moved, PartialState(inner, key, counts)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
