"""One policy for several tasks: a shared trunk, a head a task."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.rl import networks

# Of an action that a task does not have: as good as never.
_NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class Learning:
  """What is the same for all methods.

  Attributes:
    environments: of each task, side by side.
    rollout: steps of each environment in an update; for mt10, the first ones of
      an episode, which has 500: returns and successes are of these steps only.
    discount: of rewards.
    decay: of generalised advantages.
    entropy: weight of the policy's entropy.
    critic: weight of the critic's loss.
    reward_scale: factor of rewards in the losses.
    window: last episodes of each task whose returns count.
  """

  environments: int = 32
  rollout: int = 16
  discount: Annotated[float, harness.Allowed(high=1)] = 0.99
  decay: Annotated[float, harness.Allowed(0, 1)] = 0.95
  entropy: Annotated[float, harness.Allowed(0)] = 0.01
  critic: float = 0.5
  reward_scale: float = 1.0
  window: int = 100


class Tasks(NamedTuple):
  """Tasks with observations and actions that all of them fit into.

  Attributes:
    names: of the tasks.
    shape: of an observation of any of them.
    actions: the largest number of them, or the shape of a continuous one.
    allowed: which of them each task has, bool (tasks, actions); None for all.
    collector: (model, indices of the tasks that are played, learning) -> what
      makes rollouts with a leading axis of these tasks; its episodes are one
      item a task.
    measure: of one such item, metrics by name; `return` is one of them.
  """

  names: tuple[str, ...]
  shape: tuple[int, ...]
  actions: int | tuple[int, ...]
  allowed: np.ndarray | None
  collector: Callable[['Model', Sequence[int], Learning], bj.rl.Collector]
  measure: Callable[[Any], dict[str, chex.Array]]


class Model(NamedTuple):
  """One network for all tasks.

  Attributes:
    tasks: the tasks.
    trunk: from an observation to features.
  """

  tasks: Tasks
  trunk: harness.Network

  @property
  def family(self) -> Any:
    """The distribution of actions."""
    return bj.rl.action_distribution(self.tasks.actions)

  def init(self, key: chex.PRNGKey) -> Any:
    """Sequences `trunk`, and `heads` with an axis of tasks."""
    one, two = jax.random.split(key)
    units, count = self._units(), len(self.tasks.names)
    actions = self.tasks.actions
    outputs = actions[0] if isinstance(actions, tuple) else actions

    def head(key, outputs, scale):
      start = jax.nn.initializers.orthogonal(scale)
      keys = jax.random.split(key, count)
      weights = jax.vmap(lambda k: start(k, (units, outputs)))(keys)
      return {'w': weights, 'b': jnp.zeros([count, outputs])}

    actor, critic = jax.random.split(two)
    heads = {
      'actor': head(actor, outputs, 0.01),
      'critic': head(critic, 1, 1.0),
    }
    if isinstance(actions, tuple):
      heads['log_deviation'] = jnp.full([count, outputs], -0.5)
    return bj.sequences(trunk=self.trunk.init(one), heads=heads)

  def outputs(self, params: Any, observations: chex.Array, task: Any) -> Any:
    """The policy's outputs, for n observations of one task, and values (n,)."""
    features = jax.vmap(self.trunk.apply, (None, 0))(params.trunk, observations)
    of = lambda head: features @ head['w'][task] + head['b'][task]
    found, values = of(params.heads['actor']), of(params.heads['critic'])[:, 0]
    if 'log_deviation' in params.heads:
      spread = params.heads['log_deviation'][task]
      return (found, jnp.broadcast_to(spread, found.shape)), values
    if self.tasks.allowed is not None:
      allowed = jnp.asarray(self.tasks.allowed)[task]
      found = jnp.where(allowed, found, _NEVER)
    return found, values

  def _units(self):
    like = jax.eval_shape(self.trunk.init, jax.random.key(0))
    seen = jnp.zeros(self.tasks.shape)
    return jax.eval_shape(self.trunk.apply, like, seen).shape[0]


def make_model(tasks: Tasks) -> Model:
  """The network of one task, without its last layer, for several."""
  body = networks.body(tasks.shape)
  return Model(tasks, networks.network(tasks.shape, 0, **body))


def make_oracle(
  model: Model,
  aggregator: Any,
  learning: Learning,
  *,
  key: Any,
  played: Sequence[int] | None = None,
) -> bj.oracles.Oracle:
  """The aggregated gradient of the tasks' losses, each on its own rollout.

  Args:
    model: of all tasks.
    aggregator: of as many objectives as tasks are played.
    learning: what is the same for all methods.
    key: of environments and actions.
    played: indices of tasks; None for all.

  Returns:
    An oracle whose `bj.outputs` has the episodes of each task.
  """
  if played is None:
    played = range(len(model.tasks.names))

  def loss(params, rollout, index):
    task, lead = jnp.asarray(played)[index], rollout.rewards.shape
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    outputs, values = model.outputs(params, flat(rollout.observations), task)
    _, ahead = model.outputs(params, flat(rollout.next_observations), task)
    actor, critic, entropy = bj.rl.actor_critic_losses(
      jax.tree.map(lambda x: x.reshape(*lead, -1), outputs),
      values.reshape(lead),
      ahead.reshape(lead),
      rollout,
      distribution=model.family,
      advantages=bj.rl.Advantages(
        learning.discount, learning.decay, learning.reward_scale, normalise=True
      ),
    )
    return actor + learning.critic * critic - learning.entropy * entropy

  names = [model.tasks.names[task] for task in played]
  rows = bj.multi_objective(loss, names, rest=('heads',), per_task=True)
  return bj.rl.on_policy(
    bj.oracles.aggregated(rows, aggregator),
    model.tasks.collector(model, played, learning),
    key=key,
  )
