"""Training of a policy on its own rollouts, as a solver without a batch.

An update collects a rollout, normalises its rewards, takes the steps of PPO or
of the library's actor-critic, and adds the observations to the moments.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.rl import environments, networks, normalisation, recurrent
from experiments.rl import ppo as ppo_lib

Algorithm = Literal['ppo', 'actor_critic']
GRADIENT_NORM = 0.5  # Largest norm of a gradient.


@dataclasses.dataclass(frozen=True)
class Learning:
  """How a policy learns.

  Attributes:
    environments: number of parallel environments.
    rollout: steps of each environment per update.
    rate: initial step size of Adam.
    final_rate: step size at the end; between, it changes linearly.
    critic_rate_factor: step size of the critic / that of the actor, for the
      actor-critic; PPO has one step size.
    entropy: initial weight of the policy's entropy.
    final_entropy: weight at the end; between, it changes linearly.
    reward_scale: factor of rewards in the losses.
    normalise_observations: whether to subtract the running mean of observations
      and divide by their running deviation.
    normalise_rewards: whether to divide rewards by the running deviation of
      discounted returns.
    recurrent_units: size of the memory; 0 for a policy without one.
    ppo: settings of PPO; its discount, decay and `normalise` are also those of
      the actor-critic.
  """

  environments: Annotated[int, harness.Allowed(1)] = 16
  rollout: Annotated[int, harness.Allowed(1)] = 64
  rate: Annotated[float, harness.Allowed(0)] = 1e-3
  final_rate: Annotated[float, harness.Allowed(0)] = 0.0
  critic_rate_factor: Annotated[float, harness.Allowed(0)] = 3.0
  entropy: Annotated[float, harness.Allowed(0)] = 0.01
  final_entropy: Annotated[float, harness.Allowed(0)] = 0.01
  reward_scale: float = 0.1
  normalise_observations: bool = False
  normalise_rewards: bool = False
  recurrent_units: Annotated[int, harness.Allowed(0)] = 0
  ppo: ppo_lib.Settings = dataclasses.field(default_factory=ppo_lib.Settings)

  @property
  def frames(self) -> int:
    """Environment steps of an update."""
    return self.environments * self.rollout


class State(NamedTuple):
  """State of the solver.

  Attributes:
    updates: number of updates so far, int32.
    learner: state of PPO or of the actor-critic.
    worlds: state of the environments.
    scale: scale of rewards, or ().
  """

  updates: chex.Array
  learner: Any
  worlds: Any
  scale: Any


class Parts(NamedTuple):
  """The parts of a run.

  Attributes:
    known: the environment by its name.
    environment: with the memory of a recurrent policy in its observations.
    agent: networks of one observation.
    act: (params, key, observation) -> action, by policy.
    learned: the agent for the learner: a `recurrent.Recurrent`, or `agent`.
  """

  known: environments.Known
  environment: bj.rl.Environment
  agent: networks.Agent
  act: Callable[..., Any]
  learned: Any


def check(env: str, algorithm: str, learning: Learning) -> None:
  """Raises SettingsError for settings that do not fit together."""
  environments.make(env)
  if learning.recurrent_units:
    if algorithm == 'actor_critic':
      raise harness.SettingsError(
        'a recurrent policy needs --algorithm=ppo; with --ppo.epochs=1 and '
        '--ppo.minibatches=1 that is the actor-critic.'
      )
    if learning.normalise_observations:
      raise harness.SettingsError(
        '--learning.recurrent_units does not support '
        '--learning.normalise_observations: set that to False, and scale '
        'observations in the environment.'
      )
  rows = learning.environments
  if not learning.recurrent_units:
    rows *= learning.rollout
  if algorithm == 'ppo' and rows % learning.ppo.minibatches:
    unit = 'environments' if learning.recurrent_units else 'steps'
    raise harness.SettingsError(
      f'--learning.ppo.minibatches={learning.ppo.minibatches} does not divide '
      f'the {rows} {unit} of a rollout: take a divisor.'
    )


def make_parts(env: str, learning: Learning) -> Parts:
  """Makes the environment and the networks."""
  known = environments.make(env)
  environment, actions = known.environment, known.environment.actions
  family = bj.rl.action_distribution(actions)
  learned: Any
  if learning.recurrent_units:
    learned = recurrent.agent(known.shape, actions, learning.recurrent_units)
    agent = learned.agent
    environment = recurrent.remembering(environment, learned.units)
  else:
    learned = agent = networks.agent(known.shape, actions)
  if learning.normalise_observations:
    learned = agent = normalisation.normalised(agent, known.shape)

  def act(params, key, observation, policy='sampled'):
    outputs = agent.policy(params.actor, observation)
    if policy == 'sampled':
      action = family.sample(key, outputs)
    else:
      action = outputs[0] if isinstance(actions, tuple) else outputs.argmax()
    if not learning.recurrent_units:
      return action
    return recurrent.Chosen(action, learned.advance(params, observation))

  return Parts(known, environment, agent, act, learned)


def make_solver(
  parts: Parts,
  algorithm: Algorithm,
  learning: Learning,
  *,
  updates: int,
  key: Any,
  window: int = 100,
) -> optax.GradientTransformationExtraArgs:
  """Makes the solver of a run.

  Args:
    parts: made by `make_parts`.
    algorithm: the algorithm.
    learning: its settings.
    updates: length of the schedules.
    key: PRNG key of environments, actions and minibatches.
    window: number of last training episodes in the state.

  Returns:
    A solver for `bj.rl.ActorCriticParams` whose batch is None. `bj.outputs` is
    empty; see `episodes`.
  """
  worlds_key, learner_key = jax.random.split(key)
  learner = _make_learner(parts, algorithm, learning, updates, learner_key)
  collector = bj.rl.rollouts(
    parts.environment,
    lambda params, key, observations: jax.vmap(parts.act, (None, 0, 0))(
      params,
      jax.random.split(key, learning.environments),
      observations,
    ),
    environments=learning.environments,
    steps=learning.rollout,
    window=window,
  )

  def init_fn(params):
    scale = ()
    if learning.normalise_rewards:
      scale = normalisation.start_scale(learning.environments)
    return State(
      jnp.int32(0),
      learner(jnp.float32(0)).init(params),
      collector.init(worlds_key),
      scale,
    )

  def update_fn(batch, state, params=None, **extra_args):
    del batch, extra_args
    rollout, worlds = collector.collect(params, state.worlds)
    if learning.recurrent_units:
      rollout = rollout._replace(actions=rollout.actions.action)
    scale, scaled = state.scale, rollout
    if learning.normalise_rewards:
      scaled, scale = normalisation.scale_rewards(
        scale, rollout, learning.ppo.discount
      )
    rewards = learning.reward_scale * scaled.rewards.astype(jnp.float32)
    share = state.updates / updates
    entropy = learning.entropy + share * (
      learning.final_entropy - learning.entropy
    )
    moved, after = learner(entropy).update(
      scaled._replace(rewards=rewards), state.learner, params
    )
    if learning.normalise_observations:
      now = bj.apply_updates(params, moved)
      now = normalisation.observe(now, rollout.observations)
      moved = jax.tree.map(jnp.subtract, now, params)
    return moved, State(state.updates + 1, after, worlds, scale)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _make_learner(parts, algorithm, learning, updates, key):
  """Makes the function from a weight of the entropy to a solver."""
  actions, settings = parts.environment.actions, learning.ppo

  def adam(factor, steps):
    rate = optax.linear_schedule(
      factor * learning.rate, factor * learning.final_rate, steps
    )
    return optax.chain(
      optax.clip_by_global_norm(GRADIENT_NORM), optax.adam(rate, eps=1e-5)
    )

  if algorithm == 'ppo':
    steps = updates * settings.epochs * settings.minibatches
    return lambda entropy: ppo_lib.solver(
      parts.learned,
      actions,
      adam(1.0, steps),
      settings,
      key=key,
      entropy=entropy,
    )
  advantages = bj.rl.Advantages(
    settings.discount, settings.decay, normalise=settings.normalise
  )
  return lambda entropy: bj.descend(
    bj.rl.actor_critic_gradient(
      parts.agent.policy,
      parts.agent.value,
      distribution=bj.rl.action_distribution(actions),
      advantages=advantages,
      entropy_bonus=entropy,
    ),
    actor=adam(1.0, updates),
    critic=adam(learning.critic_rate_factor, updates),
  )
