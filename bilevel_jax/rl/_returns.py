"""Returns and advantages of rollouts, truncation apart from termination.

Where an episode terminates, nothing comes after: its value is zero. Where a
time limit truncates it, it would have gone on: the value of the observation
there, before any reset, stands for the rest. Neither lets what belongs to the
next episode into this one.
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
  r"""Generalised advantage estimates: decaying sums of temporal differences.

  .. math::
    \delta_t = r_t + \gamma (1 - d_t) V(s'_t) - V(s_t), \qquad
    A_t = \delta_t + \gamma \lambda (1 - d_t) (1 - c_t) A_{t+1}

  with :math:`d_t` for termination, :math:`c_t` for truncation, and
  :math:`s'_t` the state after the step, before any reset. The last step of the
  rollout takes nothing from beyond it. For :math:`\lambda = 0` they are the
  temporal differences themselves, for :math:`\lambda = 1` discounted returns
  less the values.

  Args:
    rewards: (steps, ...), for instance (steps, environments).
    values: of the states, likewise.
    next_values: of the states after each step, likewise.
    terminated: whether the step ended the episode, bool, likewise.
    truncated: whether a time limit cut it there, bool, likewise.
    discount: :math:`\gamma` in [0, 1].
    decay: :math:`\lambda` in [0, 1].

  Returns:
    Advantages, (steps, ...), float32 or wider.

  Raises:
    ValueError: if shapes differ, or a number is out of range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> never, last = jnp.zeros(3, bool), jnp.array([False, False, True])
    >>> find = lambda terminated, truncated: bj.rl.generalised_advantages(
    ...   jnp.ones(3), jnp.zeros(3), jnp.full(3, 8.0), terminated, truncated,
    ...   discount=0.5, decay=1.0)
    >>> print(find(last, never)[-1], find(never, last)[-1])
    1.0 5.0

  References:
    Schulman, Moritz, Levine, Jordan and Abbeel, `High-Dimensional Continuous
    Control Using Generalized Advantage Estimation
    <https://arxiv.org/abs/1506.02438>`_, 2015.
  """
  who = 'generalised_advantages'
  _checks.within(who, 'discount', discount, 0, 1)
  _checks.within(who, 'decay', decay, 0, 1)
  _require_shapes(
    who,
    rewards=rewards,
    values=values,
    next_values=next_values,
    terminated=terminated,
    truncated=truncated,
  )
  rewards, values, next_values = _wide(rewards, values, next_values)
  errors = rewards + discount * jnp.where(terminated, 0, next_values) - values
  kept = jnp.where(jnp.logical_or(terminated, truncated), 0, discount * decay)

  def back(after, step):
    error, keep = step
    advantage = error + keep.astype(error.dtype) * after
    return advantage, advantage

  start = jnp.zeros_like(errors[0])
  return jax.lax.scan(back, start, (errors, kept), reverse=True)[1]


def n_step_returns(
  rewards: chex.Array,
  next_values: chex.Array,
  terminated: chex.Array,
  truncated: chex.Array,
  *,
  discount: chex.Numeric,
  steps: int,
) -> chex.Array:
  r"""Discounted sums of the next n rewards, and the value of what follows.

  .. math::
    G_t = \sum_{i < m} \gamma^i r_{t+i} + \gamma^m V(s'_{t+m-1})

  where m is n, or fewer where the episode or the rollout ends before; without
  the last term where it ends by termination.

  Args:
    rewards: (steps of the rollout, ...).
    next_values: of the states after each step, before any reset, likewise.
    terminated: whether the step ended the episode, bool, likewise.
    truncated: whether a time limit cut it there, bool, likewise.
    discount: :math:`\gamma` in [0, 1].
    steps: n; that of the rollout, or more, for all there are.

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
  who = 'n_step_returns'
  _checks.whole_number(who, 'steps', steps)
  _checks.within(who, 'discount', discount, 0, 1)
  _require_shapes(
    who,
    rewards=rewards,
    next_values=next_values,
    terminated=terminated,
    truncated=truncated,
  )
  rewards, next_values = _wide(rewards, next_values)
  one = rewards + discount * jnp.where(terminated, 0, next_values)
  ends = jnp.logical_or(terminated, truncated).at[-1].set(True)

  def longer(_, found):
    after = jnp.concatenate([found[1:], found[-1:]])
    return jnp.where(ends, one, rewards + discount * after).astype(one.dtype)

  count = min(steps, len(rewards)) - 1
  return jax.lax.fori_loop(0, count, longer, one)


def _wide(*arrays: Any) -> list[Any]:
  """Arrays in the widest of their dtypes, at least float32."""
  dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
  return [jnp.asarray(array, dtype) for array in arrays]


def _require_shapes(who: str, **arrays: Any) -> None:
  shapes = {name: jnp.shape(array) for name, array in arrays.items()}
  if len(set(shapes.values())) > 1 or not shapes['rewards']:
    said = ', '.join(f'{name} {shape}' for name, shape in shapes.items())
    raise ValueError(
      f'{who} takes arrays of one shape with a leading axis of steps, got '
      f'{said}.'
    )
