"""Four rooms with two goals, and a leader that taxes cells.

The process of Thoma, Pasztor, Krause, Ramponi and Hu, 2024: a follower walks
from a start to one of two goals. The leader taxes cells so that the path passes
its own cell, and pays for the taxes when the follower arrives.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.pbrl import contexts

_MAP = """
#############
#.....#.....#
#.....#.....#
#...........#
#.....#.....#
#.....#.....#
##.####.....#
#.....###.###
#.....#.....#
#.....#.....#
#...........#
#.....#.....#
#############
"""
START, TARGET, GOALS = (4, 1), (8, 4), ((1, 9), (11, 11))
CHOSEN = 0.56  # Probability of the chosen direction; the rest is uniform.
DISCOUNT = 0.99
TOTAL_TAX = 0.2  # Sum of all taxes.


class Rooms(NamedTuple):
  """The process for each goal.

  Attributes:
    transitions: (goals, cells, 4, cells); rows of a goal are zero.
    start: probabilities of the first cell, (cells,).
    target: indicator of the leader's cell, (cells,).
    goals: indicators of the goals, (goals, cells).
  """

  transitions: chex.Array
  start: chex.Array
  target: chex.Array
  goals: chex.Array


def make_rooms() -> Rooms:
  """Makes the published layout of 104 cells."""
  rows = _MAP.strip().splitlines()
  cells = [
    (r, c) for r, row in enumerate(rows) for c, x in enumerate(row) if x == '.'
  ]
  number = {cell: i for i, cell in enumerate(cells)}
  moves = np.zeros((len(cells), 4, len(cells)))
  directions = ((-1, 0), (0, 1), (1, 0), (0, -1))
  for i, (row, column) in enumerate(cells):
    for action in range(4):
      for other, (down, right) in enumerate(directions):
        after = number.get((row + down, column + right), i)
        chance = CHOSEN if other == action else (1 - CHOSEN) / 3
        moves[i, action, after] += chance
  eye = np.eye(len(cells))
  goals = np.stack([eye[number[goal]] for goal in GOALS])
  start, target = eye[number[START]], eye[number[TARGET]]
  moves = moves * (1 - goals)[:, :, None, None]
  return Rooms(*map(np.float32, (moves, start, target, goals)))


def process(
  rooms: Rooms, w: chex.Array, goal: chex.Numeric, price: chex.Numeric
) -> contexts.Process:
  """Makes the process of one goal.

  Args:
    rooms: the layout.
    w: 105 logits, of the taxes on the cells and of an unused tax.
    goal: index of the goal, which may be traced.
    price: that the leader pays for all taxes when the follower arrives.

  Returns:
    A `Process`.
  """
  select = lambda table: jnp.take(table, goal, axis=0)
  tax = TOTAL_TAX * jax.nn.softmax(w)[:-1]
  at_goal = select(rooms.goals)
  return contexts.Process(
    select(rooms.transitions),
    (at_goal - tax * (1 - at_goal))[:, None],
    (rooms.target - price * jnp.sum(tax) * at_goal)[:, None],
    rooms.start,
    DISCOUNT,
  )
