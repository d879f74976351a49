"""A follower in a finite process with a leader's gains beside, exactly.

The process of contextual problems, one for each context: a goal, the taste of a
household. Values with entropy, their derivatives through the optimum, and the
tables of adaptive model design.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp


class Process(NamedTuple):
  """What the follower faces in one context.

  Attributes:
    moves: transitions, (states, actions, states); a row without probability is
      an end.
    rewards: of the follower, (states, actions) or (states, 1).
    gains: of the leader, likewise.
    start: probabilities of the first state, (states,).
    discount: of both.
  """

  moves: chex.Array
  rewards: chex.Array
  gains: chex.Array
  start: chex.Array
  discount: float


def straight(z: chex.Array) -> chex.Array:
  """Softmax probabilities whose derivative in the logits is one.

  What is differentiated through it is a derivative in probabilities. Divided by
  visits that is a natural gradient, also of actions whose probability is below
  what a float can hold: with a temperature of .001 most are.
  """
  return jax.lax.stop_gradient(jax.nn.softmax(z)) + (
    z - jax.lax.stop_gradient(z)  # Zero, with any logits.
  )


def inverse(matrix: chex.Array) -> chex.Array:
  """Of I - gamma P, by elimination.

  Its rows are dominated by their diagonal, so no pivots are looked for. By
  products alone: `jnp.linalg.solve` under `vmap` has hung on busy machines, and
  sweeps would be thousands, as walks from room to room mix slowly.
  """

  def eliminate(k, a):
    row, column = a[k] / a[k, k], a[:, k]
    a = a - jnp.outer(column, row)
    a = a.at[:, k].set(-column / column[k]).at[k].set(row)
    return a.at[k, k].set(1 / column[k])

  return jax.lax.fori_loop(0, matrix.shape[-1], eliminate, matrix)


def system(process: Process, policy: chex.Array) -> chex.Array:
  """I - gamma P of a policy, (states, states)."""
  chain = jnp.einsum('sa,sat->st', policy, process.moves)
  return jnp.eye(chain.shape[-1], dtype=chain.dtype) - process.discount * chain


def invert(process: Process, policy: chex.Array):
  """Solves with I - gamma P of a policy: a function of the right-hand side."""
  matrix = system(process, policy)
  table = inverse(jax.lax.stop_gradient(matrix))

  def solve(table):
    def refined(product, right):
      x = table @ right
      return x + table @ (right - product(x))

    return refined

  return lambda right: jax.lax.custom_linear_solve(
    lambda x: matrix @ x, right, solve(table), solve(table.T)
  )


def visits(process: Process, policy: chex.Array) -> chex.Array:
  """Discounted numbers of visits to each state, (states,)."""
  return inverse(system(process, policy)).T @ process.start


def soft_values(
  process: Process, z: chex.Array, temperature: chex.Numeric
) -> chex.Array:
  """Values of logits (states, actions) with their entropy, (states,)."""
  policy = straight(z)
  log = jax.lax.stop_gradient(jax.nn.log_softmax(z))
  earned = jnp.sum(policy * (process.rewards - temperature * log), axis=1)
  return invert(process, policy)(earned)


def leader_return(process: Process, policy: chex.Array) -> chex.Array:
  """What a policy of the follower is worth to the leader."""
  gained = jnp.sum(policy * process.gains, axis=1)
  return process.start @ invert(process, policy)(gained)


def backup(process: Process, values: chex.Array) -> chex.Array:
  """The worth of each action, (states, actions)."""
  return process.rewards + process.discount * process.moves @ values


def improve(
  process: Process, z: chex.Array, temperature: chex.Numeric
) -> chex.Array:
  """Logits of the best answer to the values of logits: Newton's step."""
  values = soft_values(process, z, temperature)
  return jax.nn.log_softmax(backup(process, values) / temperature)


def optimum(
  process: Process, z: chex.Array, temperature: chex.Numeric
) -> chex.Array:
  """Logits of the optimum, differentiable in the process, from logits near it.

  The derivative is that of the fixed point of the optimality equation.
  """
  held = jax.lax.stop_gradient(process)
  values = soft_values(held, jax.lax.stop_gradient(z), temperature)
  scaled = backup(process, values) / temperature
  residual = temperature * jax.nn.logsumexp(scaled, axis=1) - values
  best = jax.lax.stop_gradient(jax.nn.softmax(scaled))
  values = values + invert(held, best)(residual)
  return jax.nn.log_softmax(backup(process, values) / temperature)


class Tables(NamedTuple):
  """What adaptive model design carries from update to update.

  Attributes:
    values: of the follower, entropy included, (states,).
    gains: what the leader expects, (states,).
    slopes: of the follower's values in the leader's weights, (states, weights).
    gain_slopes: likewise, of what the leader expects.
  """

  values: chex.Array
  gains: chex.Array
  slopes: chex.Array
  gain_slopes: chex.Array


def zero_tables(states: int, weights: int, dtype: Any) -> Tables:
  """Tables of zeros."""
  one, two = jnp.zeros(states, dtype), jnp.zeros((states, weights), dtype)
  return Tables(one, one, two, two)


def design_step(
  of: Callable[[chex.Array], Process],
  x: chex.Array,
  tables: Tables,
  temperature: chex.Numeric,
) -> Tables:
  r"""One backup of all four tables of adaptive model design.

  The follower's values take a step of soft value iteration, what the leader
  expects one of evaluation at the policy :math:`\pi = \mathrm{softmax}(Q /
  \tau)`, and the slopes are the forward derivatives of just that,

  .. math::
    V' &= \sum_a \pi \, Q', \qquad
    Q' = \partial_x (r + \gamma P V) + \gamma P V' \\
    U' &= \sum_a \pi \, [ \partial_x (u + \gamma P U) + \gamma P U'
      + A_U Q' / \tau ]

  with :math:`A_U` the leader's advantage.

  Args:
    of: from the leader's weights to the process.
    x: those weights, (weights,).
    tables: as they are.
    temperature: :math:`\tau > 0`.

  Returns:
    Tables after the backup.

  References:
    Chen, Yang, Li, Wang, Yang and Wang, `Adaptive Model Design for Markov
    Decision Process <https://proceedings.mlr.press/v162/chen22ab.html>`_, 2022.
  """

  def backups(x):
    process = of(x)
    worth = process.gains + process.discount * process.moves @ tables.gains
    return backup(process, tables.values), worth

  process = of(x)
  q, worth = backups(x)
  q_slopes, worth_slopes = jax.jacfwd(backups)(x)
  policy = jax.nn.softmax(q / temperature)
  expected = jnp.sum(policy * worth, axis=1)
  pull = policy * (worth - expected[:, None]) / temperature
  through = lambda weights: (
    process.discount * jnp.einsum('sa,sat->st', weights, process.moves)
  )
  mean = lambda weights, table: jnp.einsum('sa,sai->si', weights, table)
  chain = through(policy)
  return Tables(
    temperature * jax.nn.logsumexp(q / temperature, axis=1),
    expected,
    mean(policy, q_slopes) + chain @ tables.slopes,
    mean(policy, worth_slopes)
    + chain @ tables.gain_slopes
    + mean(pull, q_slopes)
    + through(pull) @ tables.slopes,
  )
