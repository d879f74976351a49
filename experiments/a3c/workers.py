"""Asynchronous workers in round robin, as one compiled program.

Worker i computes a gradient at the parameters after its own last update, while
the others update in turn: each gradient has a delay of N - 1 updates. The
gradients of a round do not depend on each other, so one `vmap` computes all N
and one scan applies them.
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

CLIP = 0.5  # Maximum gradient norm of the actor and of the critic.


@dataclasses.dataclass(frozen=True)
class Losses:
  """Losses of actor and critic.

  Attributes:
    discount: discount of rewards; 0.99 in the paper.
    decay: lambda of generalised advantages; 0 for the paper's TD(0).
    entropy: weight of the policy's entropy; 0.01 in the paper.
    reward_scale: factor of the rewards.
    normalise: whether advantages are normalised for the actor.
  """

  discount: Annotated[float, harness.Allowed(0, 1)] = 0.99
  decay: Annotated[float, harness.Allowed(0, 1)] = 0.95
  entropy: Annotated[float, harness.Allowed(0)] = 0.01
  reward_scale: float = 1.0
  normalise: bool = False


@dataclasses.dataclass(frozen=True)
class Tuning:
  """Grid of step sizes.

  Attributes:
    rates: constant step sizes of the actor's Adam.
    seeds: number of seeds of the tuning, which are not reported.
  """

  rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
  seeds: int = 3


class RoundRobinState(NamedTuple):
  """State of `round_robin`.

  Attributes:
    snapshots: parameters of each worker, (workers, ...).
    versions: version of each snapshot, int32 (workers,).
    version: number of updates so far, int32.
    oracles: leaves of the oracle states, (workers, ...). Leaves only, because
      `bj.values` would read a state with an axis of workers as a single one.
    mover: state of the solver that applies gradients.
    delays: number of gradients by delay, int32 (workers,).
    measured: losses averaged over workers, counts summed, outputs with an axis
      of workers.
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


def adams(rate: Any, critic_factor: float) -> dict[str, Any]:
  """Makes the optimisers of actor and critic with constant step sizes.

  Args:
    rate: step size of the actor.
    critic_factor: step size of the critic over that of the actor.
  """
  return {
    'actor': adam(rate, eps=1e-5),
    'critic': adam(critic_factor * rate, eps=1e-5),
  }


def mover(**sequences: Any) -> optax.GradientTransformationExtraArgs:
  """Makes a solver that applies the gradient in its batch.

  Args:
    **sequences: a `bj.Sequence` or an optimiser by name.

  Returns:
    A solver for batches `{'gradient': ...}`.
  """
  from_batch = bj.oracle(
    lambda params, batch, inner: ((), batch['gradient'], inner),
    (),
    moves=tuple(sequences),
  )
  return bj.descend(from_batch, **sequences)


def round_robin(
  make_oracle: Callable[[chex.PRNGKey], Any],
  move: optax.GradientTransformationExtraArgs,
  *,
  workers: int,
  key: chex.PRNGKey,
  devices: int = 1,
) -> optax.GradientTransformationExtraArgs:
  """Workers with stale parameters and separate oracles.

  One update of the solver is a round of N gradients and N successive updates.

  Args:
    make_oracle: makes the oracle of a worker from its key; oracles differ in
      their state only.
    move: applies one gradient, see `mover`.
    workers: number of workers N.
    key: PRNG key of the workers' keys.
    devices: number of devices to split workers over, by `jax.shard_map`.

  Returns:
    A solver whose batch is None.

  Raises:
    SettingsError: if there are too few devices, or the workers do not divide
      over them.
  """
  if workers % devices or devices > len(jax.devices()):
    raise harness.SettingsError(
      f'{workers} workers cannot be split over {devices} devices: there are '
      f'{len(jax.devices())}, and each needs the same number of workers.'
    )
  oracle = make_oracle(key)
  keys = jax.random.split(key, workers)

  def structure(params):
    return jax.tree.structure(jax.eval_shape(oracle.init, params))

  compute_gradients = jax.vmap(lambda *args: oracle.update(None, *args))
  if devices > 1:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ('workers',))
    spec = jax.sharding.PartitionSpec('workers')
    compute_gradients = jax.shard_map(
      compute_gradients,
      mesh=mesh,
      in_specs=spec,
      out_specs=spec,
      check_vma=False,
    )

  def merge(state):
    values = {n: jnp.mean(x) for n, x in bj.values(state).items()}
    counts = {n: jnp.sum(x) for n, x in bj.counts(state).items()}
    return bj.oracles.OracleState(
      _named(values),
      _named(counts),
      outputs=bj.outputs(state),
    )

  def init_fn(params):
    state = jax.vmap(lambda k: make_oracle(k).init(params))(keys)
    copies = lambda x: jnp.broadcast_to(x, (workers, *jnp.shape(x)))
    zeros = jnp.zeros(workers, jnp.int32)
    return RoundRobinState(
      snapshots=jax.tree.map(copies, params),
      versions=zeros,
      version=jnp.zeros([], jnp.int32),
      oracles=jax.tree.leaves(state),
      mover=move.init(params),
      delays=zeros,
      # Copies, because a donated buffer must be unique in the state.
      measured=jax.tree.map(lambda x: jnp.array(x, copy=True), merge(state)),
    )

  def update_fn(batch, state, params=None, **extra_args):
    del batch, extra_args
    before = jax.tree.unflatten(structure(params), state.oracles)
    gradients, after = compute_gradients(before, state.snapshots)

    def apply(carry, worker):
      now, moving, version, delays = carry
      gradient, snapshot_version = worker
      updates, moving = move.update({'gradient': gradient}, moving, now)
      now = bj.apply_updates(now, updates)
      delays = delays.at[version - snapshot_version].add(1)
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
      merge(after),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _named(numbers):
  if not numbers:
    return None
  return bj.types.named(tuple(numbers), jnp.stack(list(numbers.values())))
