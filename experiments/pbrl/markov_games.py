"""Random Markov games of two players, and penalties that rise."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness

NEAR = 1e-2  # Of the gap at the start: the players are at their optimum.


@dataclasses.dataclass(frozen=True)
class Game:
  """Sizes of the random games; Shen, Yang and Chen, 2024, section 6.

  Attributes:
    states: number of states.
    actions: numbers of actions of the two players, the leader first.
    discount: discount of rewards.
    temperature: tau, the weight of the entropy of those below the leader.
  """

  states: int = 100
  actions: tuple[int, int] = (5, 5)
  discount: Annotated[float, harness.Allowed(high=0.999)] = 0.9
  temperature: float = 0.1


def draw_games(
  sizes: Game, seeds: Sequence[int], **more: Any
) -> bj.rl.MarkovGame:
  """A random game for each seed, leaves with a leading axis of seeds."""
  games = [
    bj.rl.random_game(
      seed,
      states=sizes.states,
      actions=sizes.actions,
      discount=sizes.discount,
      **more,
    )
    for seed in seeds
  ]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *games)


def rising(first: float, last: float, steps: int):
  """A penalty that rises geometrically, over four fifths of the steps."""

  def schedule(count):
    share = jnp.minimum(1.0, count / (0.8 * steps))
    return first * (last / first) ** share

  return schedule
