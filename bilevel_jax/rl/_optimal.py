"""The best policy, by Newton's method for the optimality equation."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks
from bilevel_jax.rl import _discounted, _mdp, _values


class Optimum(NamedTuple):
  """A best policy and what it is worth.

  Attributes:
    policy: probabilities, (states, actions).
    values: of states, (states,).
    action_values: (states, actions), without the entropy of the action itself.
    residual: the largest error of the optimality equation at the end of the
      iterations, in units of a reward.
    iterations: policies that were evaluated, an int32 scalar.
  """

  policy: chex.Array
  values: chex.Array
  action_values: chex.Array
  residual: chex.Array
  iterations: chex.Array


def best_response(
  action_values: chex.Array, temperature: chex.Numeric = 0
) -> tuple[chex.Array, chex.Array]:
  r"""The best policy in the next step alone, and its worth.

  .. math::
    \pi = \operatorname{softmax}(Q / \tau), \qquad
    V = \tau \log \sum_a \exp(Q(\cdot, a) / \tau)

  and, for :math:`\tau = 0`, one of the best actions and its Q.

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
  r"""A policy of the largest return, entropy included.

  .. math::
    V(s) = \max_\pi \sum_a \pi(a) \Big[ r(s, a)
    + \gamma \sum_{s'} P(s' | s, a) V(s') \Big] + \tau H(\pi)

  By policy iteration: each policy is evaluated exactly, and the next one is
  its best response. That is Newton's method for this equation, from any start,
  and a handful of iterations. Derivatives of all orders, of values and policy
  in the process and in a positive temperature, are those of the equation,
  without one passing through the iterations; at temperature zero the policy is
  piecewise constant.

  Args:
    mdp: the process.
    temperature: :math:`\tau \ge 0`; if it is traced, above zero.
    start: state values to start from, those of a process nearby for instance;
      by default zero.
    tolerance: the iterations end where the equation's largest error is below
      it, in units of a reward; by default, rounding at the size of the values,
      or twice the error with which the policy was evaluated.
    max_iterations: or after so many. Without entropy, a goal at the end of a
      long chain takes an iteration a state.

  Returns:
    An `Optimum`; its `residual` says whether the iterations have converged.

  Raises:
    ValueError: for a negative temperature, a tolerance not above zero or fewer
      iterations than one.

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

  fixed, heat = jax.lax.stop_gradient((mdp, temperature))
  if _values._is_zero(temperature):
    heat = temperature
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
    """Of the optimality equation, and of the policy's own."""
    worth = _values.backup(fixed, values)
    _, best = best_response(worth, heat)
    own = jnp.sum(policy * worth, axis=-1) + heat * _values.entropy(policy)
    return jnp.max(jnp.abs(best - values)), jnp.max(jnp.abs(own - values))

  def step(values):
    policy, _ = best_response(_values.backup(fixed, values), heat)
    return _values.state_values(fixed, policy, heat), policy

  def unfinished(carry):
    values, residual, evaluation, iterations = carry
    size = jnp.max(jnp.abs(values)) + jnp.max(jnp.abs(fixed.rewards))
    rounding = jnp.maximum(8 * jnp.finfo(dtype).eps * size, 2 * evaluation)
    least = rounding if tolerance is None else tolerance
    return (residual > least) & (iterations < max_iterations)

  def body(carry):
    values, policy = step(carry[0])
    return values, *errors(values, policy), carry[3] + 1

  begun, _ = errors(first, best_response(_values.backup(fixed, first), heat)[0])
  begin = first, begun, jnp.zeros([], dtype), jnp.zeros([], jnp.int32)
  found, residual, _, iterations = jax.lax.while_loop(unfinished, body, begin)
  # One more step squares what error there is left.
  values = _solution(mdp, temperature, step(found)[0])
  action_values = _values.backup(mdp, values)
  policy, _ = best_response(action_values, temperature)
  return Optimum(policy, values, action_values, residual, iterations)


def _solution(mdp, temperature, found):
  """Values that solve the optimality equation, with its derivatives.

  By the implicit function theorem. To differentiate a step of Newton would be
  right as well but for rounding: sums over actions that are zero at the best
  policy would be divided by one minus the discount, twice.
  """
  zero = _values._is_zero(temperature)

  @jax.custom_jvp
  def solution(mdp, heat, found):
    del mdp, heat
    return found

  @solution.defjvp
  def tangent(primals, tangents):
    mdp, heat, found = primals
    values = solution(mdp, heat, found)
    worth, moved = jax.jvp(
      lambda mdp: _values.backup(mdp, values), (mdp,), (tangents[0],)
    )
    policy, _ = best_response(worth, 0 if zero else heat)
    right = jnp.sum(policy * moved, axis=-1)
    if not zero:
      right += tangents[1] * _values.entropy(policy)
    chain = jnp.einsum('sa,sat->st', policy, mdp.transitions)
    return values, _discounted.discounted_solve(chain, right, mdp.discount)

  heat = jnp.asarray(temperature, found.dtype)
  return solution(mdp, heat, jax.lax.stop_gradient(found))
