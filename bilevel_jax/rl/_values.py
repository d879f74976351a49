"""Exact values, visits, returns and gradients of policies.

A policy is an array of probabilities (states, actions), `jax.nn.softmax` of
logits for instance. A temperature adds a reward per nat of the policy's entropy
to each step. All functions support `jax.vmap` and derivatives in the policy and
all fields of the process.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import _checks
from bilevel_jax.rl import _discounted, _mdp


class RewardProcess(NamedTuple):
  """The Markov reward process of a policy.

  Attributes:
    transitions: probabilities of the next state, (states, states).
    rewards: mean rewards per step, including entropy, (states,).
  """

  transitions: chex.Array
  rewards: chex.Array


def _is_zero(temperature: chex.Numeric) -> bool:
  """Whether the temperature is a concrete zero; False for traced ones."""
  return not isinstance(temperature, jax.core.Tracer) and not np.any(
    np.asarray(temperature)
  )


def entropy(policy: chex.Array) -> chex.Array:
  """The entropy of each state's actions, in nats.

  Args:
    policy: probabilities, (states, actions).

  Returns:
    An array (states,). Actions of probability zero contribute neither to the
    value nor to the derivative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.rl.entropy(jnp.array([[0.5, 0.5], [1.0, 0.0]])).round(3))
    [0.693 0.   ]
  """
  positive = policy > 0
  log = jnp.log(jnp.where(positive, policy, 1))
  return jnp.sum(jnp.where(positive, -policy * log, 0), axis=-1)


def reward_process(
  mdp: _mdp.MDP, policy: chex.Array, temperature: chex.Numeric = 0
) -> RewardProcess:
  r"""The transitions and rewards of states under a policy.

  .. math::
    P_\pi(s, s') = \sum_a \pi(a | s) P(s' | s, a), \qquad
    r_\pi(s) = \sum_a \pi(a | s) r(s, a) + \tau H(\pi(\cdot | s))

  Args:
    mdp: the process.
    policy: probabilities, (states, actions).
    temperature: :math:`\tau \ge 0`, in rewards per nat.

  Returns:
    A `RewardProcess`.

  Raises:
    ValueError: if the policy has another shape than the rewards, or the
      temperature is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> mdp = bj.rl.random_mdp(0, states=3, actions=2)
    >>> chain = bj.rl.reward_process(mdp, jnp.full((3, 2), 0.5))
    >>> print(chain.transitions.sum(-1).round(3), chain.rewards.shape)
    [1. 1. 1.] (3,)
  """
  if jnp.shape(policy) != jnp.shape(mdp.rewards):
    raise ValueError(
      'a policy has a probability for each state and action, the shape '
      f'{jnp.shape(mdp.rewards)}, got {jnp.shape(policy)}.'
    )
  _checks.within('reward_process', 'the temperature', temperature, 0)
  moves = jnp.einsum('sa,sat->st', policy, mdp.transitions)
  rewards = jnp.sum(policy * mdp.rewards, axis=-1)
  if not _is_zero(temperature):
    rewards = rewards + temperature * entropy(policy)
  return RewardProcess(moves, rewards)


def state_values(
  mdp: _mdp.MDP, policy: chex.Array, temperature: chex.Numeric = 0
) -> chex.Array:
  r"""The expected discounted return from each state.

  .. math::
    V = r_\pi + \gamma P_\pi V

  Args:
    mdp: the process.
    policy: probabilities, (states, actions).
    temperature: :math:`\tau \ge 0`.

  Returns:
    V, (states,).

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> mdp = bj.rl.make_mdp(jnp.ones((1, 2, 1)), [[0.0, 1.0]], discount=0.5)
    >>> print(bj.rl.state_values(mdp, jnp.array([[0.25, 0.75]])))
    [1.5]
  """
  moves, rewards = reward_process(mdp, policy, temperature)
  return _discounted.discounted_solve(moves, rewards, mdp.discount)


def backup(mdp: _mdp.MDP, values: chex.Array) -> chex.Array:
  r"""The Bellman backup: action values from state values.

  .. math::
    Q(s, a) = r(s, a) + \gamma \sum_{s'} P(s' | s, a) V(s')

  Args:
    mdp: the process.
    values: V, (states,).

  Returns:
    Q, (states, actions).

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> mdp = bj.rl.make_mdp(jnp.ones((1, 2, 1)), [[0.0, 1.0]], discount=0.5)
    >>> print(bj.rl.backup(mdp, jnp.array([2.0])))
    [[1. 2.]]
  """
  return mdp.rewards + mdp.discount * mdp.transitions @ values


def action_values(
  mdp: _mdp.MDP, policy: chex.Array, temperature: chex.Numeric = 0
) -> chex.Array:
  r"""The expected discounted return after each action.

  .. math::
    Q(s, a) = r(s, a) + \gamma \sum_{s'} P(s' | s, a) V(s'), \qquad
    V(s) = \sum_a \pi(a | s) Q(s, a) + \tau H(\pi(\cdot | s))

  Q includes the entropy of later actions, but not of the action itself.

  Args:
    mdp: the process.
    policy: probabilities, (states, actions).
    temperature: :math:`\tau \ge 0`.

  Returns:
    Q, (states, actions).

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> mdp = bj.rl.make_mdp(jnp.ones((1, 2, 1)), [[0.0, 1.0]], discount=0.5)
    >>> print(bj.rl.action_values(mdp, jnp.array([[0.25, 0.75]])))
    [[0.75 1.75]]
  """
  return backup(mdp, state_values(mdp, policy, temperature))


def state_visits(mdp: _mdp.MDP, policy: chex.Array) -> chex.Array:
  r"""The discounted state visits of a policy.

  .. math::
    \mu(s) = (1 - \gamma) \sum_{t \ge 0} \gamma^t \, \Pr(s_t = s), \qquad
    \mu = (1 - \gamma) \rho + \gamma P_\pi^\top \mu

  It is also the stationary distribution of the chain that restarts from the
  initial distribution with probability :math:`1 - \gamma` at each step.

  Args:
    mdp: the process.
    policy: probabilities, (states, actions).

  Returns:
    Probabilities, (states,), each with a small relative error; exactly 0 in
    states that cannot be reached.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> forth = jnp.array([[[0.0, 1.0]], [[0.0, 1.0]]])  # To state 1.
    >>> mdp = bj.rl.make_mdp(
    ...   forth, jnp.zeros((2, 1)), discount=0.75, initial=[1.0, 0.0]
    ... )
    >>> print(bj.rl.state_visits(mdp, jnp.ones((2, 1))))
    [0.25 0.75]
  """
  moves, _ = reward_process(mdp, policy)
  # Scales afterwards, so that `expected_return` shares the solve.
  return (1 - mdp.discount) * _discounted.discounted_solve(
    moves, mdp.initial, mdp.discount, transposed=True
  )


def visits(mdp: _mdp.MDP, policy: chex.Array) -> chex.Array:
  r"""The discounted state-action visits of a policy.

  .. math::
    \mu(s, a) = \mu(s) \, \pi(a | s)

  Args:
    mdp: the process.
    policy: probabilities, (states, actions).

  Returns:
    Probabilities, (states, actions).

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> mdp = bj.rl.random_mdp(0, states=3, actions=2)
    >>> policy = jnp.full((3, 2), 0.5)
    >>> print(bj.rl.visits(mdp, policy).sum().round(3))
    1.0
  """
  return state_visits(mdp, policy)[:, None] * policy


def expected_return(
  mdp: _mdp.MDP, policy: chex.Array, temperature: chex.Numeric = 0
) -> chex.Array:
  r"""The expected discounted return of a policy.

  .. math::
    J = \sum_s \rho(s) V(s)

  Args:
    mdp: the process.
    policy: probabilities, (states, actions).
    temperature: :math:`\tau \ge 0`.

  Returns:
    A scalar; :math:`(1 - \gamma) J` is the mean reward per step.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> mdp = bj.rl.make_mdp(jnp.ones((1, 2, 1)), [[0.0, 1.0]], discount=0.5)
    >>> print(bj.rl.expected_return(mdp, jnp.array([[0.25, 0.75]])))
    1.5
  """
  moves, rewards = reward_process(mdp, policy, temperature)
  return _discounted.discounted_total(moves, rewards, mdp.discount, mdp.initial)


def policy_gradient(
  mdp: _mdp.MDP, logits: chex.Array, temperature: chex.Numeric = 0
) -> chex.Array:
  r"""The gradient of the return in the logits of a tabular softmax policy.

  .. math::
    \frac{\partial J}{\partial \theta(s, a)} = \frac{1}{1 - \gamma} \mu(s)
    \pi(a | s) \, [Q(s, a) - \tau \log \pi(a | s) - V(s)]

  By the policy gradient theorem it equals `jax.grad` of `expected_return`.

  Args:
    mdp: the process.
    logits: :math:`\theta`, (states, actions).
    temperature: :math:`\tau \ge 0`.

  Returns:
    The gradient, (states, actions).

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> mdp = bj.rl.make_mdp(jnp.ones((1, 2, 1)), [[0.0, 1.0]], discount=0.5)
    >>> print(bj.rl.policy_gradient(mdp, jnp.zeros((1, 2))))
    [[-0.5  0.5]]
  """
  policy = jax.nn.softmax(logits)
  advantage = action_values(mdp, policy, temperature)
  if not _is_zero(temperature):
    advantage = advantage - temperature * jax.nn.log_softmax(logits)
  weights = visits(mdp, policy) / (1 - mdp.discount)
  mean = jnp.sum(policy * advantage, axis=-1, keepdims=True)
  return weights * (advantage - mean)
