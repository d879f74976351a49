"""Random Markov games of two players, and schedules of penalties."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness

NEAR = 1e-2  # Largest gap at an optimum, as a fraction of the initial gap.


@dataclasses.dataclass(frozen=True)
class Game:
  """Sizes of the random games; Shen, Yang and Chen, 2024, section 6.

  Attributes:
    states: number of states.
    actions: numbers of actions of both players, the leader first.
    discount: discount of rewards.
    temperature: tau, weight of the entropy of the lower-level players.
  """

  states: int = 100
  actions: tuple[int, int] = (5, 5)
  discount: Annotated[float, harness.Allowed(high=0.999)] = 0.9
  temperature: float = 0.1


def draw_games(
  sizes: Game, seeds: Sequence[int], **more: Any
) -> bj.rl.MarkovGame:
  """Draws a random game per seed; leaves have a leading axis of seeds."""
  harness.require_memory(
    4 * len(seeds) * sizes.states**2 * math.prod(sizes.actions),
    'transitions of game.states and game.actions for each seed',
  )
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
  """Makes a penalty that rises geometrically over 80 % of the steps."""

  def schedule(count):
    progress = jnp.minimum(1.0, count / (0.8 * steps))
    return first * (last / first) ** progress

  return schedule
