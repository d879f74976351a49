"""Regularised zero-sum Markov games: equilibria, gaps, learning players."""

import chex
import jax
import jax.numpy as jnp

import bilevel_jax as bj

Pair = tuple[chex.Array, chex.Array]  # Logits of both players.


def as_policies(y: Pair) -> Pair:
  """Converts logits to probabilities."""
  return jax.nn.softmax(y[0]), jax.nn.softmax(y[1])


def payoff(
  game: bj.rl.MarkovGame, costs: chex.Array, y: Pair, temperature: float
) -> chex.Array:
  """The payoff J(a, b) from logits; the first player minimises it."""
  both = as_policies(y)
  _, second = bj.rl.zero_sum_responses(
    game, costs, both, temperature=temperature
  )
  return bj.rl.expected_return(second, both[1], temperature)


def pair_values(
  game: bj.rl.MarkovGame, costs: chex.Array, both: Pair, temperature: float
) -> chex.Array:
  """Action values of pairs of actions, (states, a, b)."""
  _, second = bj.rl.zero_sum_responses(
    game, costs, both, temperature=temperature
  )
  values = bj.rl.state_values(second, both[1], temperature)
  return costs + game.discount * game.transitions @ values


def learn(
  game: bj.rl.MarkovGame,
  costs: chex.Array,
  y: Pair,
  *,
  temperature: float,
  rate: chex.Numeric,
) -> Pair:
  """Takes a simultaneous natural step of both players.

  Args:
    game: of both players.
    costs: of the first player, (states, a, b).
    y: logits of both players.
    temperature: of their entropies.
    rate: step towards the best response to the other's policy, in (0, 1].
  """
  both = as_policies(y)
  values = pair_values(game, costs, both, temperature)
  answer_a = -jnp.einsum('sab,sb->sa', values, both[1]) / temperature
  answer_b = jnp.einsum('sab,sa->sb', values, both[0]) / temperature
  log_a, log_b = jax.nn.log_softmax(y[0]), jax.nn.log_softmax(y[1])
  return (
    log_a + rate * (answer_a - log_a),
    log_b + rate * (answer_b - log_b),
  )


def nash(
  game: bj.rl.MarkovGame,
  costs: chex.Array,
  *,
  temperature: float,
  sweeps: int = 12,
  steps: int = 200,
) -> Pair:
  """Logits of the unique equilibrium.

  Alternates extragradient steps on the matrix game of each state with an
  evaluation of the resulting pair. `nash_gap` measures the error.

  Args:
    game: of both players.
    costs: of the first player, (states, a, b).
    temperature: of their entropies, above zero.
    sweeps: number of evaluations.
    steps: extragradient steps per sweep.

  References:
    Cen, Wei and Chi, `Fast Policy Extragradient Methods for Competitive Games
    with Entropy Regularization <https://arxiv.org/abs/2105.15186>`_, 2021.
  """
  states, one, two = costs.shape

  def sweep(_, y):
    values = pair_values(game, costs, as_policies(y), temperature)
    values = values - values.mean(axis=(1, 2), keepdims=True)
    size = jnp.max(jnp.abs(values), axis=(1, 2))[:, None]
    rate = 1 / (2 * (temperature + size))

    def answer(y, other):
      a, b = as_policies(other)
      keep = 1 - rate * temperature
      return (
        keep * y[0] - rate * jnp.einsum('sab,sb->sa', values, b),
        keep * y[1] + rate * jnp.einsum('sab,sa->sb', values, a),
      )

    extragradient = lambda _, y: answer(y, answer(y, y))
    return jax.lax.fori_loop(0, steps, extragradient, y)

  start = (jnp.zeros((states, one)), jnp.zeros((states, two)))
  return jax.lax.fori_loop(0, sweeps, sweep, start)


def nash_gap(
  game: bj.rl.MarkovGame, costs: chex.Array, y: Pair, temperature: float
) -> chex.Array:
  """Sum of both players' gains by exact best responses."""
  both = as_policies(y)
  faced = bj.rl.zero_sum_responses(game, costs, both, temperature=temperature)
  best = [
    bj.rl.optimal(mdp, temperature, tolerance=1e-4, max_iterations=12)
    for mdp in faced
  ]
  return sum(
    mdp.initial @ optimum.values
    for mdp, optimum in zip(faced, best, strict=True)
  )
