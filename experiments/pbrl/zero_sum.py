"""Regularised zero-sum Markov games: equilibria, gaps, players who learn."""

import chex
import jax
import jax.numpy as jnp

import bilevel_jax as bj

Pair = tuple[chex.Array, chex.Array]  # Logits of both players.


def policies_of(y: Pair) -> Pair:
  """Probabilities from logits."""
  return jax.nn.softmax(y[0]), jax.nn.softmax(y[1])


def payoff(
  game: bj.rl.MarkovGame, costs: chex.Array, y: Pair, temperature: float
) -> chex.Array:
  """J(a, b), which the first player minimises, from both players' logits."""
  both = policies_of(y)
  _, second = bj.rl.zero_sum_responses(
    game, costs, both, temperature=temperature
  )
  return bj.rl.expected_return(second, both[1], temperature)


def pair_values(
  game: bj.rl.MarkovGame, costs: chex.Array, both: Pair, temperature: float
) -> chex.Array:
  """What each pair of actions is worth in each state, (states, a, b)."""
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
  """One natural step of both players at once, against each other.

  Args:
    game: of both players.
    costs: of the first, (states, a, b).
    y: logits of both.
    temperature: of their entropies.
    rate: share of the way to the answer to the other's present policy, at most
      1.
  """
  both = policies_of(y)
  worth = pair_values(game, costs, both, temperature)
  answer_a = -jnp.einsum('sab,sb->sa', worth, both[1]) / temperature
  answer_b = jnp.einsum('sab,sa->sb', worth, both[0]) / temperature
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
  """Logits of the equilibrium, which is unique.

  The matrix game of each state is solved by steps that look ahead, the values
  are those of the pair found, and again: `nash_gap` says how good it is.

  Args:
    game: of both players.
    costs: of the first, (states, a, b).
    temperature: of their entropies, above zero.
    sweeps: how often values are taken anew.
    steps: of the matrix games, between them.

  References:
    Cen, Wei and Chi, `Fast Policy Extragradient Methods for Competitive Games
    with Entropy Regularization <https://arxiv.org/abs/2105.15186>`_, 2021.
  """
  states, one, two = costs.shape

  def sweep(_, y):
    worth = pair_values(game, costs, policies_of(y), temperature)
    worth = worth - worth.mean(axis=(1, 2), keepdims=True)
    size = jnp.max(jnp.abs(worth), axis=(1, 2))[:, None]
    rate = 1 / (2 * (temperature + size))

    def answer(y, other):
      a, b = policies_of(other)
      keep = 1 - rate * temperature
      return (
        keep * y[0] - rate * jnp.einsum('sab,sb->sa', worth, b),
        keep * y[1] + rate * jnp.einsum('sab,sa->sb', worth, a),
      )

    ahead = lambda _, y: answer(y, answer(y, y))
    return jax.lax.fori_loop(0, steps, ahead, y)

  start = (jnp.zeros((states, one)), jnp.zeros((states, two)))
  return jax.lax.fori_loop(0, sweeps, sweep, start)


def nash_gap(
  game: bj.rl.MarkovGame, costs: chex.Array, y: Pair, temperature: float
) -> chex.Array:
  """What both players together could gain by their best responses, exactly."""
  both = policies_of(y)
  faced = bj.rl.zero_sum_responses(game, costs, both, temperature=temperature)
  best = [
    bj.rl.optimal(mdp, temperature, tolerance=1e-4, max_iterations=12)
    for mdp in faced
  ]
  return sum(
    mdp.initial @ found.values for mdp, found in zip(faced, best, strict=True)
  )
