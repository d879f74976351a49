"""One policy for several tasks: a shared trunk with a head per task."""

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

_INVALID_LOGIT = -1e9  # Of actions that a task does not have.


@dataclasses.dataclass(frozen=True)
class Learning:
  """Learning, the same for all methods.

  Attributes:
    environments: number of parallel environments per task.
    rollout: steps of each environment in an update.
    discount: discount of rewards.
    decay: lambda of generalised advantage estimates.
    entropy: weight of the policy's entropy.
    critic: weight of the critic's loss.
    reward_scale: factor of rewards in the losses.
    window: number of last episodes per task in the reported mean return.
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
  """Tasks with observations and actions of the same shapes.

  Attributes:
    names: of the tasks.
    shape: of an observation.
    actions: the largest number of actions.
    allowed: actions that each task has, bool (tasks, actions).
    collector: (model, indices of played tasks, learning) -> collector of
      rollouts with a leading axis of these tasks; its `episodes` has one entry
      per task.
  """

  names: tuple[str, ...]
  shape: tuple[int, ...]
  actions: int
  allowed: np.ndarray
  collector: Callable[['Model', Sequence[int], Learning], bj.rl.Collector]


class Model(NamedTuple):
  """One network for all tasks.

  Attributes:
    tasks: the tasks.
    trunk: from an observation to features.
  """

  tasks: Tasks
  trunk: harness.Network

  def init(self, key: chex.PRNGKey) -> Any:
    """Sequences `trunk`, and `heads` with an axis of tasks."""
    one, two = jax.random.split(key)
    units, count = self._units(), len(self.tasks.names)

    def head(key, outputs, scale):
      start = jax.nn.initializers.orthogonal(scale)
      keys = jax.random.split(key, count)
      weights = jax.vmap(lambda k: start(k, (units, outputs)))(keys)
      return {'w': weights, 'b': jnp.zeros([count, outputs])}

    actor, critic = jax.random.split(two)
    heads = {
      'actor': head(actor, self.tasks.actions, 0.01),
      'critic': head(critic, 1, 1.0),
    }
    return bj.sequences(trunk=self.trunk.init(one), heads=heads)

  def outputs(self, params: Any, observations: chex.Array, task: Any) -> Any:
    """Logits for n observations of a task, (n, actions), and values (n,)."""
    features = jax.vmap(self.trunk.apply, (None, 0))(params.trunk, observations)
    apply = lambda head: features @ head['w'][task] + head['b'][task]
    logits = apply(params.heads['actor'])
    values = apply(params.heads['critic'])[:, 0]
    allowed = jnp.asarray(self.tasks.allowed)[task]
    return jnp.where(allowed, logits, _INVALID_LOGIT), values

  def _units(self):
    like = jax.eval_shape(self.trunk.init, jax.random.key(0))
    observation = jnp.zeros(self.tasks.shape)
    return jax.eval_shape(self.trunk.apply, like, observation).shape[0]


def make_model(tasks: Tasks) -> Model:
  """Makes a model whose trunk is a network without its last layer."""
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
  """Makes the aggregated gradient of the tasks' losses on their rollouts.

  Args:
    model: of all tasks.
    aggregator: of as many objectives as played tasks.
    learning: parameters of learning.
    key: of environments and actions.
    played: indices of the played tasks; None for all.

  Returns:
    An oracle whose `bj.outputs` has the episodes of each task.
  """
  if played is None:
    played = range(len(model.tasks.names))

  def loss(params, rollout, index):
    task, lead = jnp.asarray(played)[index], rollout.rewards.shape
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    logits, values = model.outputs(params, flat(rollout.observations), task)
    _, ahead = model.outputs(params, flat(rollout.next_observations), task)
    actor, critic, entropy = bj.rl.actor_critic_losses(
      logits.reshape(*lead, -1),
      values.reshape(lead),
      ahead.reshape(lead),
      rollout,
      distribution=bj.rl.categorical(),
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
