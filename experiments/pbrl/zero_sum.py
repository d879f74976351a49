"""Regularised zero-sum Markov games: equilibria, gaps, learning players."""

import chex
import jax
import jax.numpy as jnp

import bilevel_jax as bj

Pair = tuple[chex.Array, chex.Array]  # Logits of both players.


def as_policies(y: Pair) -> Pair:
  """Converts logits to probabilities."""
  return jax.nn.softmax(y[0]), jax.nn.softmax(y[1])


def state_values(
  game: bj.rl.MarkovGame, costs: chex.Array, y: Pair, temperature: float
) -> chex.Array:
  """Values of the payoff under a pair of logits, (states,)."""
  both = as_policies(y)
  _, second = bj.rl.zero_sum_responses(
    game, costs, both, temperature=temperature
  )
  return bj.rl.state_values(second, both[1], temperature)


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
  game: bj.rl.MarkovGame, costs: chex.Array, values: chex.Array
) -> chex.Array:
  """Action values of pairs of actions, (states, a, b), from state values."""
  return costs + game.discount * game.transitions @ values


def answers(pairs: chex.Array, y: Pair, temperature: float) -> Pair:
  """Logits of the best responses in the matrix game of each state.

  Args:
    pairs: action values of pairs of actions, (states, a, b).
    y: logits of both players, which they respond to.
    temperature: of their entropies.
  """
  a, b = as_policies(y)
  return (
    -jnp.einsum('sab,sb->sa', pairs, b) / temperature,
    jnp.einsum('sab,sa->sb', pairs, a) / temperature,
  )


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
  values = state_values(game, costs, y, temperature)
  answer = answers(pair_values(game, costs, values), y, temperature)
  return jax.tree.map(
    lambda z, new: (1 - rate) * jax.nn.log_softmax(z) + rate * new, y, answer
  )


def solve_matrices(
  pairs: chex.Array, y: Pair, *, temperature: float, steps: int
) -> Pair:
  """Takes extragradient steps on the matrix game of each state.

  Args:
    pairs: action values of pairs of actions, (states, a, b).
    y: first logits of both players.
    temperature: of their entropies.
    steps: number of steps.

  References:
    Cen, Wei and Chi, `Fast Policy Extragradient Methods for Competitive Games
    with Entropy Regularization <https://arxiv.org/abs/2105.15186>`_, 2021.
  """
  pairs = pairs - pairs.mean(axis=(1, 2), keepdims=True)
  size = jnp.max(jnp.abs(pairs), axis=(1, 2))[:, None]
  decay = 1 - temperature / (2 * (temperature + size))

  def move(y, other):
    return jax.tree.map(
      lambda z, new: decay * z + (1 - decay) * new,
      y,
      answers(pairs, other, temperature),
    )

  return jax.lax.fori_loop(0, steps, lambda _, y: move(y, move(y, y)), y)


def follow(
  game: bj.rl.MarkovGame,
  costs: chex.Array,
  y: Pair,
  *,
  temperature: float,
  steps: int,
) -> Pair:
  """Evaluates a pair once and solves the matrix games of its values.

  If the matrix games are solved exactly this is Newton's method for the values
  of the equilibrium (Pollatschek and Avi-Itzhak, 1969).

  Args:
    game: of both players.
    costs: of the first player, (states, a, b).
    y: logits of both players.
    temperature: of their entropies.
    steps: extragradient steps on the matrix games.
  """
  pairs = pair_values(game, costs, state_values(game, costs, y, temperature))
  return solve_matrices(pairs, y, temperature=temperature, steps=steps)


def nash(
  game: bj.rl.MarkovGame,
  costs: chex.Array,
  *,
  temperature: float,
  sweeps: int = 8,
  steps: int = 80,
) -> Pair:
  """Logits of the unique equilibrium; `equilibrium_error` measures the error.

  Args:
    game: of both players.
    costs: of the first player, (states, a, b).
    temperature: of their entropies, above zero.
    sweeps: number of evaluated pairs; see `follow`.
    steps: extragradient steps per sweep.
  """
  states, one, two = costs.shape
  start = (
    jnp.zeros((states, one), costs.dtype),
    jnp.zeros((states, two), costs.dtype),
  )
  sweep = lambda _, y: follow(
    game, costs, y, temperature=temperature, steps=steps
  )
  return jax.lax.fori_loop(0, sweeps, sweep, start)


def equilibrium_error(
  game: bj.rl.MarkovGame, costs: chex.Array, y: Pair, temperature: float
) -> chex.Array:
  """The largest change of a probability by an answer to the other policy."""
  values = state_values(game, costs, y, temperature)
  answer = answers(pair_values(game, costs, values), y, temperature)
  changes = jax.tree.map(
    lambda new, old: jnp.max(jnp.abs(new - old)),
    as_policies(answer),
    as_policies(y),
  )
  return jnp.maximum(*changes)
