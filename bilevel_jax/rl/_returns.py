"""Returns and advantages of rollouts, with termination and truncation.

After termination of an episode the value is zero. After truncation by a time
limit the remaining return is estimated by the value of the last observation,
before any reset. Rewards of the next episode never count.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks


def generalised_advantages(
  rewards: chex.Array,
  values: chex.Array,
  next_values: chex.Array,
  terminated: chex.Array,
  truncated: chex.Array,
  *,
  discount: chex.Numeric,
  decay: chex.Numeric,
) -> chex.Array:
  r"""Computes generalised advantage estimates.

  .. math::
    \delta_t = r_t + \gamma (1 - d_t) V(s'_t) - V(s_t), \qquad
    A_t = \delta_t + \gamma \lambda (1 - d_t) (1 - c_t) A_{t+1}

  with :math:`d_t` for termination, :math:`c_t` for truncation, and
  :math:`s'_t` the state after the step, before any reset. At the last step of
  the rollout, :math:`A_{t+1} = 0`. For :math:`\lambda = 0` they are temporal
  differences, for :math:`\lambda = 1` discounted returns minus values.

  Args:
    rewards: (steps, ...), for instance (steps, environments).
    values: values of the states, (steps, ...).
    next_values: values of the states after each step, (steps, ...).
    terminated: whether the step reached a terminal state, bool, (steps, ...).
    truncated: whether a time limit ended the episode, bool, (steps, ...).
    discount: :math:`\gamma` in [0, 1].
    decay: :math:`\lambda` in [0, 1].

  Returns:
    Advantages, (steps, ...), float32 or wider.

  Raises:
    ValueError: if shapes differ, or a number is out of range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> never, last = jnp.zeros(3, bool), jnp.array([False, False, True])
    >>> estimate = lambda terminated, truncated: bj.rl.generalised_advantages(
    ...   jnp.ones(3), jnp.zeros(3), jnp.full(3, 8.0), terminated, truncated,
    ...   discount=0.5, decay=1.0)
    >>> print(estimate(last, never)[-1], estimate(never, last)[-1])
    1.0 5.0

  References:
    Schulman, Moritz, Levine, Jordan and Abbeel, `High-Dimensional Continuous
    Control Using Generalized Advantage Estimation
    <https://arxiv.org/abs/1506.02438>`_, 2015.
  """
  name = 'generalised_advantages'
  _checks.within(name, 'discount', discount, 0, 1)
  _checks.within(name, 'decay', decay, 0, 1)
  _require_shapes(
    name,
    rewards=rewards,
    values=values,
    next_values=next_values,
    terminated=terminated,
    truncated=truncated,
  )
  rewards, values, next_values = _wide(rewards, values, next_values)
  errors = rewards + discount * jnp.where(terminated, 0, next_values) - values
  ends = jnp.logical_or(terminated, truncated)
  factors = jnp.where(ends, 0, discount * decay)

  def back(after, step):
    error, factor = step
    advantage = error + factor.astype(error.dtype) * after
    return advantage, advantage

  start = jnp.zeros_like(errors[0])
  return jax.lax.scan(back, start, (errors, factors), reverse=True)[1]


def n_step_returns(
  rewards: chex.Array,
  next_values: chex.Array,
  terminated: chex.Array,
  truncated: chex.Array,
  *,
  discount: chex.Numeric,
  steps: int,
) -> chex.Array:
  r"""Computes n-step returns: n discounted rewards plus a discounted value.

  .. math::
    G_t = \sum_{i < m} \gamma^i r_{t+i} + \gamma^m V(s'_{t+m-1})

  where m is n, or less if the episode or the rollout ends earlier. After
  termination the last term is zero.

  Args:
    rewards: (steps of the rollout, ...).
    next_values: values of the states after each step, before any reset, with
      the shape of the rewards.
    terminated: whether the step reached a terminal state, bool, with the shape
      of the rewards.
    truncated: whether a time limit ended the episode, bool, with the shape of
      the rewards.
    discount: :math:`\gamma` in [0, 1].
    steps: n; the rollout's length or more for all its rewards.

  Returns:
    Returns, (steps of the rollout, ...), float32 or wider.

  Raises:
    ValueError: if shapes differ, or a number is out of range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> never = jnp.zeros(3, bool)
    >>> print(bj.rl.n_step_returns(
    ...   jnp.ones(3), jnp.full(3, 8.0), never, never, discount=0.5, steps=2))
    [3.5 3.5 5. ]

  References:
    Mnih, Badia, Mirza, Graves, Lillicrap, Harley, Silver and Kavukcuoglu,
    `Asynchronous Methods for Deep Reinforcement Learning
    <https://arxiv.org/abs/1602.01783>`_, 2016.
  """
  name = 'n_step_returns'
  _checks.whole_number(name, 'steps', steps)
  _checks.within(name, 'discount', discount, 0, 1)
  _require_shapes(
    name,
    rewards=rewards,
    next_values=next_values,
    terminated=terminated,
    truncated=truncated,
  )
  rewards, next_values = _wide(rewards, next_values)
  one = rewards + discount * jnp.where(terminated, 0, next_values)
  ends = jnp.logical_or(terminated, truncated).at[-1].set(True)

  def longer(_, returns):
    after = jnp.concatenate([returns[1:], returns[-1:]])
    return jnp.where(ends, one, rewards + discount * after).astype(one.dtype)

  count = min(steps, len(rewards)) - 1
  return jax.lax.fori_loop(0, count, longer, one)


def _wide(*arrays: Any) -> list[Any]:
  """Converts arrays to the widest of their dtypes, at least float32."""
  dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
  return [jnp.asarray(array, dtype) for array in arrays]


def _require_shapes(function: str, **arrays: Any) -> None:
  shapes = {name: jnp.shape(array) for name, array in arrays.items()}
  if len(set(shapes.values())) > 1 or not shapes['rewards']:
    listed = ', '.join(f'{name} {shape}' for name, shape in shapes.items())
    raise ValueError(
      f'{function} takes arrays of one shape with a leading axis of steps, got '
      f'{listed}.'
    )
