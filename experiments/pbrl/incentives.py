"""Incentive design: a designer who changes a part of given payoffs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.pbrl import markov_games, zero_sum

METRIC = 'designer_return'  # The criterion of all methods.


class Condition(NamedTuple):
  """A condition of the comparison.

  Attributes:
    reward: of the designer: 'dense' for a random table, 'sparse' for 1 in the
      first state.
    bound: b, the part of the payoffs that the designer sets, in [0, 1].
  """

  reward: str
  bound: float

  @property
  def name(self) -> str:
    """The name of its folders."""
    return f'{self.reward}_{self.bound:g}'

  def draw_games(
    self, sizes: markov_games.Game, seeds: Sequence[int]
  ) -> bj.rl.MarkovGame:
    """Draws games whose rewards are the designer's, and the given payoffs."""
    games = markov_games.draw_games(sizes, seeds, rewards=2)
    if self.reward == 'dense':
      return games
    rewards = np.array(games.rewards)
    rewards[:, 0] = 0
    rewards[:, 0, 0] = 1
    return games._replace(rewards=rewards)


class Incentives(NamedTuple):
  r"""The problem of a designer on one game.

  The players' payoff and the designer's reward are

  .. math::
    c_x = (1 - b) \, c + b \, \sigma(x), \qquad
    r_x = r - \kappa [b (\sigma(x) - 1/2)]^2

  Attributes:
    game: its rewards are r, of the designer, and c, the given payoffs.
    bound: b, a scalar.
    cost: :math:`\kappa`.
    temperature: of the players' entropies.
  """

  game: bj.rl.MarkovGame
  bound: chex.Numeric
  cost: float
  temperature: float

  @classmethod
  def from_context(
    cls, settings: Any, context: harness.Context
  ) -> 'Incentives':
    """The problem of a member of a run."""
    return cls(
      context.own,
      context.hyper['bound'],
      settings.cost,
      settings.game.temperature,
    )

  def costs(self, x: chex.Array) -> chex.Array:
    """Payoffs that the first player pays to the second."""
    base = self.game.rewards[1]
    return (1 - self.bound) * base + self.bound * jax.nn.sigmoid(x)

  def payments(self, x: chex.Array) -> chex.Array:
    """Costs of the designer by state and actions."""
    return self.cost * (self.bound * (jax.nn.sigmoid(x) - 0.5)) ** 2

  def loss(self, x: chex.Array, y: zero_sum.Pair, batch: Any = None) -> Any:
    """Minus the designer's return."""
    del batch
    return -self._value(y, self.game.rewards[0] - self.payments(x))

  def paid(self, x: chex.Array, y: zero_sum.Pair) -> Any:
    """The sum of discounted payments."""
    return self._value(y, self.payments(x))

  def _value(self, y, rewards):
    a, b = zero_sum.as_policies(y)
    mdp = bj.rl.induced_mdp(self.game, a, rewards, player=1)
    return bj.rl.expected_return(mdp, b)

  def payoff(self, x: chex.Array, y: zero_sum.Pair, batch: Any = None) -> Any:
    """The payoff of the players with their entropies."""
    del batch
    return zero_sum.payoff(self.game, self.costs(x), y, self.temperature)

  def nash(self, x: chex.Array) -> zero_sum.Pair:
    """Logits of the players' equilibrium."""
    return zero_sum.nash(self.game, self.costs(x), temperature=self.temperature)

  def equilibrium_error(self, x: chex.Array, y: zero_sum.Pair) -> Any:
    """The distance of the players to their equilibrium, in probability."""
    return zero_sum.equilibrium_error(
      self.game, self.costs(x), y, self.temperature
    )

  def measure(self, x: chex.Array) -> dict[str, Any]:
    """Measures incentives at the players' exact equilibrium."""
    nash = self.nash(x)
    return {
      METRIC: -self.loss(x, nash),
      'paid': self.paid(x, nash),
      'equilibrium_error': self.equilibrium_error(x, nash),
    }
