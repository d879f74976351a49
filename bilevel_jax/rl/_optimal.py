"""The optimal policy, by Newton's method for the optimality equation."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks
from bilevel_jax.rl import _discounted, _mdp, _values


class Optimum(NamedTuple):
  """An optimal policy and its values.

  Attributes:
    policy: probabilities, (states, actions).
    values: state values, (states,).
    action_values: (states, actions), without the entropy of the action itself.
    residual: the largest error of the optimality equation after the last
      iteration, in units of a reward.
    iterations: the number of evaluated policies, an int32 scalar.
  """

  policy: chex.Array
  values: chex.Array
  action_values: chex.Array
  residual: chex.Array
  iterations: chex.Array


def best_response(
  action_values: chex.Array, temperature: chex.Numeric = 0
) -> tuple[chex.Array, chex.Array]:
  r"""The best policy for one step, and its value.

  .. math::
    \pi = \operatorname{softmax}(Q / \tau), \qquad
    V = \tau \log \sum_a \exp(Q(\cdot, a) / \tau)

  and, for :math:`\tau = 0`, a best action and its Q.

  Args:
    action_values: Q, (states, actions).
    temperature: :math:`\tau \ge 0`; if it is traced, above zero.

  Returns:
    The policy, (states, actions), and V, (states,).

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> policy, values = bj.rl.best_response(jnp.array([[1.0, 3.0]]))
    >>> print(policy, values)
    [[0. 1.]] [3.]
  """
  if _values._is_zero(temperature):
    best = jnp.argmax(action_values, axis=-1)
    policy = jax.nn.one_hot(
      best, action_values.shape[-1], dtype=action_values.dtype
    )
    return policy, jnp.max(action_values, axis=-1)
  scaled = action_values / temperature
  values = temperature * jax.nn.logsumexp(scaled, axis=-1)
  return jax.nn.softmax(scaled), values


def optimal(
  mdp: _mdp.MDP,
  temperature: chex.Numeric = 0,
  *,
  start: Any = None,
  tolerance: float | None = None,
  max_iterations: int = 1000,
) -> Optimum:
  r"""The policy with the largest return, including entropy.

  .. math::
    V(s) = \max_\pi \sum_a \pi(a) \Big[ r(s, a)
    + \gamma \sum_{s'} P(s' | s, a) V(s') \Big] + \tau H(\pi)

  Policy iteration evaluates each policy exactly and takes its best response as
  the next one. This is Newton's method for the equation; it converges from any
  start in a handful of iterations. Derivatives of all orders, of values and
  policy in the process and in a positive temperature, are implicit derivatives
  of the equation; at temperature zero the policy is piecewise constant.

  Args:
    mdp: the process.
    temperature: :math:`\tau \ge 0`; if it is traced, above zero.
    start: initial state values, those of a similar process for instance; by
      default zero.
    tolerance: the iterations end if the equation's largest error is below it,
      in units of a reward; by default, the rounding of the values, or twice the
      error of the policy's evaluation.
    max_iterations: maximal number of iterations. Without entropy, a goal at the
      end of a long chain takes one iteration per state.

  Returns:
    An `Optimum`; its `residual` shows whether the iterations have converged.

  Raises:
    ValueError: if the temperature is negative, the tolerance is not above zero
      or `max_iterations` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> stay_or_go = [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]
    >>> mdp = bj.rl.make_mdp(stay_or_go, [[0, 1], [2, 0]], discount=0.5)
    >>> best = bj.rl.optimal(mdp)
    >>> print(best.values, best.policy.argmax(-1))
    [3. 4.] [1 0]

  References:
    Puterman and Brumelle, On the Convergence of Policy Iteration in Stationary
    Dynamic Programming, 1979.
  """
  _checks.within('optimal', 'the temperature', temperature, 0)
  _checks.whole_number('optimal', 'max_iterations', max_iterations)
  if tolerance is not None:
    _checks.within('optimal', 'the tolerance', tolerance, 0, open_low=True)

  constant, tau = jax.lax.stop_gradient((mdp, temperature))
  if _values._is_zero(temperature):
    tau = temperature
  dtype = mdp.rewards.dtype
  states = mdp.rewards.shape[0]
  first = jnp.zeros(states, dtype) if start is None else start
  first = jax.lax.stop_gradient(jnp.asarray(first, dtype))
  if first.shape != (states,):
    raise ValueError(
      f'optimal: start has the shape {(states,)}, a value for each state, got '
      f'{first.shape}.'
    )

  def errors(values, policy):
    """Errors of the optimality equation and of the policy's own equation."""
    q = _values.backup(constant, values)
    _, best = best_response(q, tau)
    own = jnp.sum(policy * q, axis=-1) + tau * _values.entropy(policy)
    return jnp.max(jnp.abs(best - values)), jnp.max(jnp.abs(own - values))

  def step(values):
    policy, _ = best_response(_values.backup(constant, values), tau)
    return _values.state_values(constant, policy, tau), policy

  def unfinished(carry):
    values, residual, evaluation, iterations = carry
    size = jnp.max(jnp.abs(values)) + jnp.max(jnp.abs(constant.rewards))
    rounding = jnp.maximum(8 * jnp.finfo(dtype).eps * size, 2 * evaluation)
    bound = rounding if tolerance is None else tolerance
    return (residual > bound) & (iterations < max_iterations)

  def body(carry):
    values, policy = step(carry[0])
    return values, *errors(values, policy), carry[3] + 1

  policy, _ = best_response(_values.backup(constant, first), tau)
  residual, _ = errors(first, policy)
  carry = first, residual, jnp.zeros([], dtype), jnp.zeros([], jnp.int32)
  values, residual, _, iterations = jax.lax.while_loop(unfinished, body, carry)
  # One more Newton step squares the remaining error.
  values = _solution(mdp, temperature, step(values)[0])
  action_values = _values.backup(mdp, values)
  policy, _ = best_response(action_values, temperature)
  return Optimum(policy, values, action_values, residual, iterations)


def _solution(mdp, temperature, values):
  """Attaches implicit derivatives to values of the optimality equation.

  Differentiating a Newton step would lose digits: sums over actions that are
  zero at the optimal policy would be divided by one minus the discount, twice.
  """
  zero = _values._is_zero(temperature)

  @jax.custom_jvp
  def solution(mdp, tau, values):
    del mdp, tau
    return values

  @solution.defjvp
  def tangent(primals, tangents):
    mdp, tau, values = primals
    values = solution(mdp, tau, values)
    q, q_tangent = jax.jvp(
      lambda mdp: _values.backup(mdp, values), (mdp,), (tangents[0],)
    )
    policy, _ = best_response(q, 0 if zero else tau)
    right = jnp.sum(policy * q_tangent, axis=-1)
    if not zero:
      right += tangents[1] * _values.entropy(policy)
    chain = jnp.einsum('sa,sat->st', policy, mdp.transitions)
    return values, _discounted.discounted_solve(chain, right, mdp.discount)

  tau = jnp.asarray(temperature, values.dtype)
  return solution(mdp, tau, jax.lax.stop_gradient(values))
