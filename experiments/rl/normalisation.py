"""Running moments of observations and of discounted returns.

Moments are weights of a policy, so that a stored policy has them. Their
gradient is 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

import bilevel_jax as bj
from experiments.rl import networks

LIMIT = 10.0  # Largest absolute value of a normalised number.
EPS = 1e-8


class Moments(NamedTuple):
  """Moments of all values so far.

  Attributes:
    count: number of values, float32.
    mean: mean, of the shape of a value.
    variance: mean squared deviation, of the same shape.
  """

  count: chex.Array
  mean: chex.Array
  variance: chex.Array


def start(shape: tuple[int, ...] = ()) -> Moments:
  """Moments without values: they normalise to the identity."""
  return Moments(jnp.zeros([]), jnp.zeros(shape), jnp.ones(shape))


def merge(moments: Moments, values: chex.Array) -> Moments:
  """Adds values, whose leading axes are merged.

  Args:
    moments: moments so far.
    values: new values, (..., *shape).

  Returns:
    The moments of all values, by the formula of Chan et al., 1979.
  """
  shape = moments.mean.shape
  flat = values.reshape(-1, *shape).astype(moments.mean.dtype)
  count = jnp.asarray(len(flat), moments.count.dtype)
  total = moments.count + count
  shift = flat.mean(axis=0) - moments.mean
  share = count / total
  within = (1 - share) * moments.variance + share * flat.var(axis=0)
  return Moments(
    total,
    moments.mean + share * shift,
    within + share * (1 - share) * shift**2,
  )


def standardise(moments: Moments, values: chex.Array) -> chex.Array:
  """Subtracts the mean, divides by the deviation, and clips."""
  moments = jax.lax.stop_gradient(moments)
  scale = jax.lax.rsqrt(moments.variance + EPS)
  return jnp.clip((values - moments.mean) * scale, -LIMIT, LIMIT)


def normalised(agent: networks.Agent, shape: tuple[int, ...]) -> networks.Agent:
  """Normalises the observations of an agent.

  Args:
    agent: the networks.
    shape: of one observation.

  Returns:
    An agent whose actor and critic are dicts of `network` and `moments`; see
    `observe`.
  """

  def init(key):
    return bj.rl.ActorCriticParams(
      *({'network': each, 'moments': start(shape)} for each in agent.init(key))
    )

  def through(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def normalise_and_apply(weights, observation):
      x = standardise(weights['moments'], observation)
      return apply(weights['network'], x)

    return normalise_and_apply

  return networks.Agent(init, through(agent.policy), through(agent.value))


def observe(
  params: bj.rl.ActorCriticParams, observations: chex.Array
) -> bj.rl.ActorCriticParams:
  """Adds observations to the moments of a normalised agent."""
  moments = merge(params.actor['moments'], observations)
  return bj.rl.ActorCriticParams(*(x | {'moments': moments} for x in params))


class RewardScale(NamedTuple):
  """The scale of rewards.

  Attributes:
    returns: discounted returns of the current episodes, (environments,).
    moments: of the discounted returns after all steps.
  """

  returns: chex.Array
  moments: Moments


def start_scale(environments: int) -> RewardScale:
  """The scale before any reward."""
  return RewardScale(jnp.zeros(environments), start())


def scale_rewards(
  scale: RewardScale, rollout: bj.rl.Rollout, discount: chex.Numeric
) -> tuple[bj.rl.Rollout, RewardScale]:
  r"""Divides rewards by the running deviation of discounted returns.

  .. math:: R_t = r_t + \gamma R_{t-1}, \quad R = 0 \text{ after an episode}

  Args:
    scale: before the rollout.
    rollout: the transitions, (steps, environments).
    discount: the discount.

  Returns:
    The rollout with scaled rewards, by a deviation that includes its own
    returns; and the scale after it.
  """

  def step(returns, step):
    reward, ends = step
    returns = discount * returns + reward
    return jnp.where(ends, 0, returns), returns

  ends = rollout.terminated | rollout.truncated
  rewards = rollout.rewards.astype(scale.returns.dtype)
  last, returns = jax.lax.scan(step, scale.returns, (rewards, ends))
  moments = merge(scale.moments, returns)
  unit = jax.lax.rsqrt(moments.variance + EPS)
  scaled = jnp.clip(rewards * unit, -LIMIT, LIMIT)
  return rollout._replace(rewards=scaled), RewardScale(last, moments)
