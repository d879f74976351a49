"""Recurrent policies: networks with a memory that an episode's end erases.

The memory is a part of the observation, and the next memory a part of the
action. So collectors, evaluation and episodes are those of policies without a
memory: `remembering` adds both to an environment.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

import bilevel_jax as bj
from experiments import harness
from experiments.rl import networks


class Memory(NamedTuple):
  """Hidden states of the two networks, each (units,).

  Attributes:
    actor: that of the policy.
    critic: that of the value.
  """

  actor: chex.Array
  critic: chex.Array


class Seen(NamedTuple):
  """An observation with the memory of the steps before it.

  Attributes:
    observation: that of the environment.
    memory: a `Memory`, zeros at the start of an episode.
  """

  observation: Any
  memory: Memory


class Chosen(NamedTuple):
  """An action with the memory of the steps up to its observation.

  Attributes:
    action: that of the environment.
    memory: the next `Memory`.
  """

  action: chex.Array
  memory: Memory


class Recurrent(NamedTuple):
  """A recurrent agent.

  Attributes:
    agent: functions of one `Seen`, as those of any agent.
    advance: (params, `Seen`) -> the next `Memory`.
    unroll: (params, observations, memory, ends) -> outputs of the policy and
      values of all steps, (steps, environments, ...), from the memory before
      the first step. `ends` says which steps end an episode.
    units: size of each hidden state.
  """

  agent: networks.Agent
  advance: Callable[[bj.rl.ActorCriticParams, Seen], Memory]
  unroll: Callable[..., tuple[Any, chex.Array]]
  units: int


class _Gated(nnx.Module):
  """A dense layer of tanh units, a gated recurrent unit, and a linear layer."""

  def __init__(self, shape, units, outputs, last, rngs):
    self.inputs = networks.Perceptron(shape, (), units, 2**0.5, rngs)
    self.cell = nnx.GRUCell(units, units, rngs=rngs)
    self.head = networks.Perceptron((units,), (), outputs, last, rngs)

  def __call__(self, hidden, x):
    hidden, _ = self.cell(hidden, jnp.tanh(self.inputs(x)))
    return hidden, self.head(hidden)


def agent(
  shape: tuple[int, ...], actions: int | tuple[int, ...], units: int = 64
) -> Recurrent:
  """Makes a recurrent agent; see `networks.agent`.

  Args:
    shape: of one observation.
    actions: of a `bj.rl.Environment`.
    units: size of each hidden state.

  Returns:
    A `Recurrent`, whose first actions are nearly uniform.
  """
  normal = isinstance(actions, tuple)
  outputs = actions[0] if isinstance(actions, tuple) else actions
  make = lambda size, last: harness.pure(
    lambda rngs: _Gated(shape, units, size, last, rngs)
  )
  actor, critic = make(outputs, 0.01), make(1, 1.0)

  def act(weights, hidden, observation):
    hidden, out = actor.apply(weights['network'], hidden, observation)
    return hidden, (out, weights['log_deviation']) if normal else out

  def policy(weights, inputs):
    return act(weights, inputs.memory.actor, inputs.observation)[1]

  def value(weights, inputs):
    return critic.apply(weights, inputs.memory.critic, inputs.observation)[1][0]

  def advance(params, inputs):
    observation, memory = inputs
    return Memory(
      act(params.actor, memory.actor, observation)[0],
      critic.apply(params.critic, memory.critic, observation)[0],
    )

  def unroll(params, observations, memory, ends):
    def one(memory, observation):
      first, outputs = act(params.actor, memory.actor, observation)
      second, value = critic.apply(params.critic, memory.critic, observation)
      return Memory(first, second), (outputs, value[0])

    def step(memory, inputs):
      observation, ended = inputs
      memory, outputs = jax.vmap(one)(memory, observation)
      return jax.tree.map(lambda x: jnp.where(ended[:, None], 0, x), memory), (
        outputs
      )

    return jax.lax.scan(step, memory, (observations, ends))[1]

  init = networks.make_init(actor, critic, actions)
  return Recurrent(networks.Agent(init, policy, value), advance, unroll, units)


def remembering(
  environment: bj.rl.Environment, units: int
) -> bj.rl.Environment:
  """Adds a memory to the observations and the actions of an environment.

  Args:
    environment: the environment.
    units: size of each hidden state.

  Returns:
    An environment with `Seen` as observations. Its step takes a `Chosen`; an
    action without a memory erases the memory.
  """
  empty = lambda: Memory(jnp.zeros(units), jnp.zeros(units))

  def reset(key):
    observation, state = environment.reset(key)
    return Seen(observation, empty()), state

  def step(key, state, action):
    if not isinstance(action, Chosen):
      action = Chosen(action, empty())
    after = bj.rl.Timestep(*environment.step(key, state, action.action))
    ends = jnp.logical_or(after.terminated, after.truncated)
    memory = jax.tree.map(lambda x: jnp.where(ends, 0, x), action.memory)
    return after._replace(
      observation=Seen(after.observation, memory),
      final_observation=Seen(after.final_observation, action.memory),
    )

  return bj.rl.Environment(reset, step, environment.actions)
