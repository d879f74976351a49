"""Values of softmax policies whose entropy is a part of the reward."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks
from bilevel_jax.rl import _discounted, _mdp

# From the upper variable to the lower level's process.
Process = Callable[[Any], _mdp.MDP]


def require_temperature(who: str, temperature: Any) -> None:
  """Raises ValueError unless it is above zero, as far as it is known."""
  _checks.within(who, 'the temperature', temperature, 0, open_low=True)


def chain_of(
  mdp: _mdp.MDP, log_policy: chex.Array, temperature: chex.Numeric = 0.0
) -> tuple[chex.Array, chex.Array]:
  """Transitions (states, states) and mean rewards (states,) of a policy.

  Args:
    mdp: the process.
    log_policy: logarithms of probabilities, (states, actions).
    temperature: weight of the entropy, nats, in the reward.

  Returns:
    The policy's Markov chain, and its rewards with the entropy's.
  """
  policy = jnp.exp(log_policy)
  moves = jnp.einsum('sa,sat->st', policy, mdp.transitions)
  gains = jnp.sum(policy * (mdp.rewards - temperature * log_policy), axis=-1)
  return moves, gains


def soft_values(
  mdp: _mdp.MDP, log_policy: chex.Array, temperature: chex.Numeric = 0.0
) -> chex.Array:
  r"""Values of the states under a policy, with its entropy, (states,).

  .. math::
    V = (I - \gamma P_\pi)^{-1} (r_\pi + \tau H(\pi))

  Args:
    mdp: the process.
    log_policy: logarithms of probabilities, (states, actions).
    temperature: :math:`\tau`; 0 for plain values.

  Returns:
    V, (states,); differentiable in all three arguments.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> mdp = bj.rl.make_mdp([[[1.0], [1.0]]], [[0.0, 2.0]], discount=0.5)
    >>> uniform = jnp.log(jnp.full((1, 2), 0.5))
    >>> print(bj.rl.soft_values(mdp, uniform))
    [2.]
  """
  moves, gains = chain_of(mdp, log_policy, temperature)
  return _discounted.discounted_solve(moves, gains, mdp.discount)


def soft_action_values(
  mdp: _mdp.MDP, log_policy: chex.Array, temperature: chex.Numeric = 0.0
) -> chex.Array:
  r"""Values of an action, then of the policy, :math:`r + \gamma P V`.

  Args:
    mdp: the process.
    log_policy: logarithms of probabilities, (states, actions).
    temperature: :math:`\tau`; 0 for plain values.

  Returns:
    Q, (states, actions), without the entropy of the first action.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> mdp = bj.rl.make_mdp([[[1.0], [1.0]]], [[0.0, 2.0]], discount=0.5)
    >>> uniform = jnp.log(jnp.full((1, 2), 0.5))
    >>> print(bj.rl.soft_action_values(mdp, uniform))
    [[1. 3.]]
  """
  values = soft_values(mdp, log_policy, temperature)
  return mdp.rewards + mdp.discount * mdp.transitions @ values


def soft_return(
  mdp: _mdp.MDP, log_policy: chex.Array, temperature: chex.Numeric = 0.0
) -> chex.Array:
  """The value at the first state, a scalar; see `soft_values`."""
  return mdp.initial @ soft_values(mdp, log_policy, temperature)


def visits(mdp: _mdp.MDP, log_policy: chex.Array) -> chex.Array:
  r"""Discounted numbers of visits, :math:`\sum_t \gamma^t P(s_t = s)`.

  Args:
    mdp: the process.
    log_policy: logarithms of probabilities, (states, actions).

  Returns:
    (states,), with the sum :math:`1 / (1 - \gamma)`.
  """
  moves, _ = chain_of(mdp, log_policy)
  return _discounted.discounted_solve(
    moves, mdp.initial, mdp.discount, transposed=True
  )


def optimal_log_policy(
  mdp: _mdp.MDP, temperature: chex.Numeric, *, steps: int = 20
) -> chex.Array:
  r"""The best policy with entropy, exact and differentiable.

  By soft policy iteration, which converges quadratically; its derivative is
  that of the fixed point :math:`V = \tau \log \sum_a \exp(Q / \tau)`, by the
  theorem of the implicit function.

  Args:
    mdp: the process.
    temperature: :math:`\tau > 0`.
    steps: of policy iteration.

  Returns:
    Logarithms of probabilities, (states, actions).

  Raises:
    ValueError: if the temperature is not above zero.
  """
  require_temperature('optimal_log_policy', temperature)

  def improve(_, log_policy):
    held = jax.lax.stop_gradient(mdp)
    q = soft_action_values(held, log_policy, temperature)
    return jax.nn.log_softmax(q / temperature)

  start = jax.nn.log_softmax(jnp.zeros_like(mdp.rewards))
  best = jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, improve, start))
  held = jax.lax.stop_gradient(mdp)
  values = soft_values(held, best, jax.lax.stop_gradient(temperature))
  # One step of Newton from the fixed point, along which it is differentiated.
  q = mdp.rewards + mdp.discount * mdp.transitions @ values
  residual = temperature * jax.nn.logsumexp(q / temperature, axis=-1) - values
  moves, _ = chain_of(held, best)
  values = values + _discounted.discounted_solve(
    moves, residual, held.discount
  )
  q = mdp.rewards + mdp.discount * mdp.transitions @ values
  return jax.nn.log_softmax(q / temperature)
