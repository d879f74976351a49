"""Exact values of a follower and its leader in a finite decision process.

Contextual problems have one process per context, such as a goal or a taste. The
module has values with entropy, derivatives through the follower's optimum, and
the tables of adaptive model design.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from experiments.pbrl import grids


class Groups(NamedTuple):
  """Transitions of actions that are products of a group and a bundle.

  Actions are numbered `group * bundles + bundle`. Bundles of one kind have the
  same transitions, so the table has a row per kind instead of one per action.

  Attributes:
    table: probabilities, (states, groups, kinds, states).
    member: 1 at the kind of a bundle, (kinds, bundles).
  """

  table: chex.Array
  member: chex.Array

  def expect(self, values: chex.Array) -> chex.Array:
    """Expected next values of (states,), (states, actions)."""
    after = self.table @ values @ self.member
    return after.reshape(len(after), -1)

  def chain(self, weights: chex.Array) -> chex.Array:
    """Sums the transitions with weights of (states, actions)."""
    states, groups, kinds, _ = self.table.shape
    split = weights.reshape(states, groups, -1) @ self.member.T
    table = self.table.reshape(states, groups * kinds, states)
    return jnp.einsum('sk,skt->st', split.reshape(states, -1), table)


class Process(NamedTuple):
  """The decision process of the follower in one context.

  Attributes:
    transitions: probabilities (states, actions, states), whose rows of zeros
      end the episode, `Groups`, or a `grids.Grid`.
    rewards: of the follower, (states, actions) or (states, 1).
    leader_rewards: of the leader, (states, actions) or (states, 1).
    start: probabilities of the first state, (states,).
    discount: of both players.
  """

  transitions: chex.Array | Groups | grids.Grid
  rewards: chex.Array
  leader_rewards: chex.Array
  start: chex.Array
  discount: float


def straight(z: chex.Array) -> chex.Array:
  """Softmax probabilities with a derivative of 1 in the logits.

  Derivatives through it are derivatives in probabilities. Divided by visits
  they are natural gradients, also for actions whose probability underflows,
  as most do at a temperature of 0.001.
  """
  zero = z - jax.lax.stop_gradient(z)
  return jax.lax.stop_gradient(jax.nn.softmax(z)) + zero


def chain(process: Process, weights: chex.Array) -> Any:
  """The transitions summed with weights (states, actions): takes `@`."""
  if isinstance(process.transitions, Groups | grids.Grid):
    return process.transitions.chain(weights)
  return jnp.einsum('sa,sat->st', weights, process.transitions)


def invert(process: Process, policy: chex.Array):
  """Makes a function that solves (I - gamma P) x = b for b.

  Fixed-point iteration would need thousands of sweeps here.
  """
  moves = chain(process, policy)
  product = lambda x: x - process.discount * (moves @ x)
  solve, transposed = _solvers(jax.lax.stop_gradient(moves), process.discount)

  def refined(solve):
    def once(product, right):
      x = solve(right)
      return x + solve(right - product(x))

    return once

  return lambda right: jax.lax.custom_linear_solve(
    product, right, refined(solve), refined(transposed)
  )


def _solvers(moves, discount):
  """Functions that solve with I - gamma P and with its transpose."""
  if isinstance(moves, grids.Chain):
    return grids.make_solvers(moves, discount)
  eye = jnp.eye(moves.shape[-1], dtype=moves.dtype)
  table = grids.invert(eye - discount * moves)
  return table.__matmul__, table.T.__matmul__


def visits(process: Process, policy: chex.Array) -> chex.Array:
  """Expected discounted visits of each state, (states,)."""
  _, transposed = _solvers(chain(process, policy), process.discount)
  return transposed(process.start)


def soft_values(
  process: Process, z: chex.Array, temperature: chex.Numeric
) -> chex.Array:
  """State values with entropy of logits (states, actions), (states,)."""
  policy = straight(z)
  log = jax.lax.stop_gradient(jax.nn.log_softmax(z))
  rewards = jnp.sum(policy * (process.rewards - temperature * log), axis=1)
  return invert(process, policy)(rewards)


def leader_return(process: Process, policy: chex.Array) -> chex.Array:
  """The leader's return under a policy of the follower."""
  rewards = jnp.sum(policy * process.leader_rewards, axis=1)
  return process.start @ invert(process, policy)(rewards)


def backup(process: Process, values: chex.Array) -> chex.Array:
  """Action values from state values, (states, actions)."""
  return process.rewards + process.discount * _expect(process, values)


def _expect(process, values):
  """Expected next values by state and action."""
  moves = process.transitions
  if isinstance(moves, Groups | grids.Grid):
    return moves.expect(values)
  return moves @ values


def improve(
  process: Process, z: chex.Array, temperature: chex.Numeric
) -> chex.Array:
  """Logits of the improved policy: a step of soft policy iteration."""
  values = soft_values(process, z, temperature)
  return jax.nn.log_softmax(backup(process, values) / temperature)


def optimum(
  process: Process, z: chex.Array, temperature: chex.Numeric
) -> chex.Array:
  """Logits of the optimum, differentiable in the process.

  The derivative is that of the fixed point of the optimality equation.

  Args:
    process: of the follower.
    z: logits near the optimum.
    temperature: of the entropy.
  """
  constant = jax.lax.stop_gradient(process)
  values = soft_values(constant, jax.lax.stop_gradient(z), temperature)
  scaled = backup(process, values) / temperature
  residual = temperature * jax.nn.logsumexp(scaled, axis=1) - values
  best = jax.lax.stop_gradient(jax.nn.softmax(scaled))
  values = values + invert(constant, best)(residual)
  return jax.nn.log_softmax(backup(process, values) / temperature)


class Tables(NamedTuple):
  """Tables of adaptive model design, kept from update to update.

  Attributes:
    values: of the follower with entropy, (states,).
    leader_values: of the leader, (states,).
    slopes: derivatives of `values` in the leader's weights, (states, weights).
    leader_slopes: derivatives of `leader_values`, (states, weights).
  """

  values: chex.Array
  leader_values: chex.Array
  slopes: chex.Array
  leader_slopes: chex.Array


def zero_tables(states: int, weights: int, dtype: Any) -> Tables:
  """Makes tables of zeros."""
  values = jnp.zeros(states, dtype)
  slopes = jnp.zeros((states, weights), dtype)
  return Tables(values, values, slopes, slopes)


def design_step(
  make_process: Callable[[chex.Array], Process],
  x: chex.Array,
  tables: Tables,
  temperature: chex.Numeric,
) -> Tables:
  r"""Backs up the four tables of adaptive model design once.

  The follower's values take a step of soft value iteration, the leader's values
  a step of evaluation of the policy :math:`\pi = \mathrm{softmax}(Q / \tau)`,
  and the slopes are the forward derivatives of these steps,

  .. math::
    V' &= \sum_a \pi \, Q', \qquad
    Q' = \partial_x (r + \gamma P V) + \gamma P V' \\
    U' &= \sum_a \pi \, [ \partial_x (u + \gamma P U) + \gamma P U'
      + A_U Q' / \tau ]

  with :math:`A_U` the leader's advantage.

  Args:
    make_process: from the leader's weights to the process.
    x: the leader's weights, (weights,).
    tables: before the backup.
    temperature: :math:`\tau > 0`.

  Returns:
    The tables after the backup.

  References:
    Chen, Yang, Li, Wang, Yang and Wang, `Adaptive Model Design for Markov
    Decision Process <https://proceedings.mlr.press/v162/chen22ab.html>`_, 2022.
  """
  process = make_process(x)
  leader = process._replace(rewards=process.leader_rewards)
  q, leader_q = (
    backup(process, tables.values),
    backup(leader, tables.leader_values),
  )
  q_slopes, leader_q_slopes = _backup_slopes(make_process, x, tables)
  policy = jax.nn.softmax(q / temperature)
  leader_values = jnp.sum(policy * leader_q, axis=1)
  pull = policy * (leader_q - leader_values[:, None]) / temperature
  through = lambda weights, table: (
    process.discount * (chain(process, weights) @ table)
  )
  # The tables of slopes may have one column for all actions.
  mean = lambda weights, table: jnp.sum(weights[:, :, None] * table, axis=1)
  return Tables(
    temperature * jax.nn.logsumexp(q / temperature, axis=1),
    leader_values,
    mean(policy, q_slopes) + through(policy, tables.slopes),
    mean(policy, leader_q_slopes)
    + through(policy, tables.leader_slopes)
    + mean(pull, q_slopes)
    + through(pull, tables.slopes),
  )


def _backup_slopes(make_process, x, tables):
  """Derivatives of both backups in the weights, at constant values."""

  def rewards(x):
    process = make_process(x)
    return process.rewards, process.leader_rewards

  slopes = jax.jacfwd(rewards)(x)
  if isinstance(make_process(x).transitions, grids.Grid):
    return slopes  # Of a grid, the transitions do not depend on the weights.

  def after(x):
    process = make_process(x)
    both = tables.values, tables.leader_values
    return tuple(process.discount * _expect(process, x) for x in both)

  return jax.tree.map(jnp.add, slopes, jax.jacfwd(after)(x))
