"""Asynchronous workers in round robin, exactly, in one compiled program.

Worker i computes a gradient at the parameters that it saw after its own last
update, while the others update in turn: each gradient is N - 1 updates old when
it is applied. As nothing a worker computes depends on what the others do in the
meantime, all N gradients of a round are one `vmap`, and their N updates one
scan.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness

CLIP = 0.5  # Largest norm of a gradient, of the actor and of the critic.


@dataclasses.dataclass(frozen=True)
class Losses:
  """What the actor and the critic descend.

  Attributes:
    discount: discount of rewards; 0.99 in the paper.
    decay: lambda of generalised advantages; 0 is the paper's TD(0).
    entropy: weight of the policy's entropy; 0.01 in the paper.
    reward_scale: what rewards are multiplied by.
    normalise: whether advantages are normalised for the actor.
  """

  discount: Annotated[float, harness.Allowed(0, 1)] = 0.99
  decay: Annotated[float, harness.Allowed(0, 1)] = 0.95
  entropy: Annotated[float, harness.Allowed(0)] = 0.01
  reward_scale: float = 1.0
  normalise: bool = False


class RoundRobinState(NamedTuple):
  """State of `round_robin`.

  Attributes:
    snapshots: parameters that each worker holds, (workers, ...).
    versions: updates before each of them, int32 (workers,).
    version: updates so far, int32.
    oracles: the leaves of each worker's oracle state, (workers, ...): without
      its structure, or the losses of all would be taken for one's.
    mover: of what applies the gradients.
    delays: how many gradients were so many updates old, int32 (workers,).
    measured: losses as means over the workers, counts as sums, outputs with an
      axis of workers.
  """

  snapshots: Any
  versions: chex.Array
  version: chex.Array
  oracles: list[Any]
  mover: Any
  delays: chex.Array
  measured: Any


def adam(rate: Any, eps: float = 1e-8) -> optax.GradientTransformation:
  """Adam on clipped gradients."""
  return optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(rate, eps=eps))


def mover(**sequences: Any) -> optax.GradientTransformationExtraArgs:
  """What applies a gradient that is given as `{'gradient': ...}`.

  Args:
    **sequences: a record or an optimiser for each.

  Returns:
    A solver.
  """
  given = bj.oracle(
    lambda params, batch, inner: ((), batch['gradient'], inner),
    (),
    moves=tuple(sequences),
  )
  return bj.descend(given, **sequences)


def round_robin(
  make_oracle: Callable[[chex.PRNGKey], Any],
  move: optax.GradientTransformationExtraArgs,
  *,
  workers: int,
  key: chex.PRNGKey,
  devices: int = 1,
) -> optax.GradientTransformationExtraArgs:
  """Workers with stale parameters, each with an oracle of its own.

  One update of it is a round: N gradients, and N updates one after another.

  Args:
    make_oracle: from a worker's key to its oracle; they differ by state only.
    move: applies one gradient, see `mover`.
    workers: N.
    key: of their keys.
    devices: over which workers are split by `jax.shard_map`.

  Returns:
    A solver whose batch is None.

  Raises:
    SettingsError: if the workers do not divide over the devices, or there are
      not so many.
  """
  if workers % devices or devices > len(jax.devices()):
    raise harness.SettingsError(
      f'{workers} workers on {devices} devices: there are '
      f'{len(jax.devices())}, and each takes equally many workers.'
    )
  oracle = make_oracle(key)
  keys = jax.random.split(key, workers)
  own = lambda params: jax.vmap(lambda k: make_oracle(k).init(params))(keys)

  def structure(params):
    return jax.tree.structure(jax.eval_shape(oracle.init, params))

  def one(state, snapshot):
    return oracle.update(None, state, snapshot)

  gradients_of = jax.vmap(one)
  if devices > 1:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ('workers',))
    spec = jax.sharding.PartitionSpec('workers')
    gradients_of = jax.shard_map(
      gradients_of, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )

  def measured(state):
    values = {n: jnp.mean(x) for n, x in bj.values(state).items()}
    counts = {n: jnp.sum(x) for n, x in bj.counts(state).items()}
    return bj.oracles.OracleState(
      _named(values),
      _named(counts),
      outputs=bj.outputs(state),
    )

  def init_fn(params):
    state = own(params)
    copies = lambda x: jnp.broadcast_to(x, (workers, *jnp.shape(x)))
    none = jnp.zeros(workers, jnp.int32)
    return RoundRobinState(
      snapshots=jax.tree.map(copies, params),
      versions=none,
      version=jnp.zeros([], jnp.int32),
      oracles=jax.tree.leaves(state),
      mover=move.init(params),
      delays=none,
      # A copy: a buffer may be in the state once only.
      measured=jax.tree.map(lambda x: jnp.array(x, copy=True), measured(state)),
    )

  def update_fn(batch, state, params=None, **extra_args):
    del batch, extra_args
    before = jax.tree.unflatten(structure(params), state.oracles)
    gradients, after = gradients_of(before, state.snapshots)

    def apply(carry, worker):
      now, moving, version, delays = carry
      gradient, seen = worker
      updates, moving = move.update({'gradient': gradient}, moving, now)
      now = bj.apply_updates(now, updates)
      delays = delays.at[version - seen].add(1)
      version = version + 1
      return (now, moving, version, delays), (now, version)

    carry = (params, state.mover, state.version, state.delays)
    carry, (snapshots, versions) = jax.lax.scan(
      apply, carry, (gradients, state.versions)
    )
    now, moving, version, delays = carry
    updates = jax.tree.map(jnp.subtract, now, params)
    return updates, RoundRobinState(
      snapshots,
      versions,
      version,
      jax.tree.leaves(after),
      moving,
      delays,
      measured(after),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _named(numbers):
  if not numbers:
    return None
  return bj.types.named(tuple(numbers), jnp.stack(list(numbers.values())))
