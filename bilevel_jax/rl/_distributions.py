"""Distributions of actions, parametrised by a policy's outputs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp


class Distribution(NamedTuple):
  """A family of action distributions; outputs may have any leading axes.

  Attributes:
    sample: (key, outputs of a policy) -> actions.
    log_prob: (outputs, actions) -> log-probabilities or log-densities.
    entropy: outputs -> entropy, in nats.
  """

  sample: Callable[[chex.PRNGKey, Any], chex.Array]
  log_prob: Callable[[Any, chex.Array], chex.Array]
  entropy: Callable[[Any], chex.Array]


def categorical() -> Distribution:
  """Discrete actions with logits (..., actions).

  Returns:
    A `Distribution`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.rl.categorical().entropy(jnp.zeros(4)).round(3))  # log 4
    1.386
  """

  def log_prob(logits, action):
    logs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logs, action[..., None], axis=-1)[..., 0]

  def entropy(logits):
    logs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(logs) * logs, axis=-1)

  return Distribution(jax.random.categorical, log_prob, entropy)


def gaussian() -> Distribution:
  """Independent normal coordinates with (means, log deviations), (..., size).

  Returns:
    A `Distribution`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> outputs = (jnp.zeros(2), jnp.zeros(2))
    >>> print(bj.rl.gaussian().log_prob(outputs, jnp.zeros(2)))  # -log(2 pi)
    -1.837877
  """

  def sample(key, outputs):
    mean, log_deviation = outputs
    noise = jax.random.normal(key, mean.shape, mean.dtype)
    return mean + jnp.exp(log_deviation) * noise

  def log_prob(outputs, action):
    mean, log_deviation = outputs
    unit = (action - mean) * jnp.exp(-log_deviation)
    each = unit**2 / 2 + log_deviation + math.log(2 * math.pi) / 2
    return -jnp.sum(each, axis=-1)

  def entropy(outputs):
    mean, log_deviation = outputs
    each = jnp.broadcast_to(log_deviation, mean.shape)
    return jnp.sum(each + math.log(2 * math.pi * math.e) / 2, axis=-1)

  return Distribution(sample, log_prob, entropy)


def action_distribution(actions: int | tuple[int, ...]) -> Distribution:
  """The default distribution for an environment's actions.

  Args:
    actions: `actions` of an `Environment`: the number of discrete actions, or
      the shape of a continuous action.

  Returns:
    `categorical()` or `gaussian()`.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> family = bj.rl.action_distribution(3)
    >>> print(family.sample(jax.random.key(0), jnp.array([0.0, 99.0, 0.0])))
    1
  """
  return gaussian() if isinstance(actions, tuple) else categorical()


def require_outputs(outputs: Any, actions: int | tuple[int, ...]) -> None:
  """Raises TypeError unless a policy's outputs fit an environment's actions.

  Args:
    outputs: shapes and dtypes of the policy's outputs for one observation.
    actions: `actions` of an `Environment`.
  """
  shapes = jax.tree.map(lambda leaf: leaf.shape, outputs)
  if isinstance(actions, tuple):
    fits = isinstance(outputs, tuple) and len(outputs) == 2
    if fits and all(hasattr(x, 'shape') for x in outputs):
      mean, log_deviation = outputs
      fits = mean.shape == actions and log_deviation.shape in ((), actions)
    if not fits or len(actions) != 1:
      raise TypeError(
        f'the environment has continuous actions of shape {actions}: the '
        'policy of one observation returns (mean, log_deviation), both of that '
        f'shape, which has one axis, got shapes {shapes}. A method for '
        'discrete actions needs an environment with discrete actions.'
      )
  elif shapes != (actions,):
    raise TypeError(
      f'the environment has {actions} discrete actions: the policy of one '
      f'observation returns logits of shape ({actions},), got shapes {shapes}.'
    )
