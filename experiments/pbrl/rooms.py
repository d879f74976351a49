"""Four rooms with a goal that varies, and a leader who taxes its cells.

The process of Thoma, Pasztor, Krause, Ramponi and Hu, 2024: a follower walks
from one cell to a goal, which is one of two. The leader spreads penalties over
the cells, so that the way leads by a cell of its own; it pays for them where
the follower arrives.
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
CHOSEN = 0.56  # Of the direction chosen; the others share the rest.
DISCOUNT = 0.99
LARGEST = 0.2  # What all penalties together come to.


class Rooms(NamedTuple):
  """The process, for each goal.

  Attributes:
    transitions: (goals, cells, 4, cells); no row from a goal, where it ends.
    start: probabilities of the first cell, (cells,).
    target: the leader's cell, one there and else zero, (cells,).
    goals: likewise, (goals, cells): the follower is rewarded there, and pays
      for all other cells.
  """

  transitions: chex.Array
  start: chex.Array
  target: chex.Array
  goals: chex.Array


def make_rooms() -> Rooms:
  """The published layout, of 104 cells."""
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
        share = CHOSEN if other == action else (1 - CHOSEN) / 3
        moves[i, action, after] += share
  eye = np.eye(len(cells))
  goals = np.stack([eye[number[goal]] for goal in GOALS])
  start, target = eye[number[START]], eye[number[TARGET]]
  moves = moves * (1 - goals)[:, :, None, None]
  return Rooms(*map(np.float32, (moves, start, target, goals)))


def process(
  rooms: Rooms, w: chex.Array, goal: chex.Numeric, price: chex.Numeric
) -> contexts.Process:
  """The follower's process for one goal, and what the leader gains.

  Args:
    rooms: the layout.
    w: 105 weights, of the cells and of a penalty that nobody pays.
    goal: its number, which may be drawn in a compiled program.
    price: of all penalties, to the leader, where the follower arrives.

  Returns:
    A `Process`.
  """
  of = lambda table: jnp.take(table, goal, axis=0)
  tax = LARGEST * jax.nn.softmax(w)[:-1]
  there = of(rooms.goals)
  return contexts.Process(
    of(rooms.transitions),
    (there - tax * (1 - there))[:, None],
    (rooms.target - price * jnp.sum(tax) * there)[:, None],
    rooms.start,
    DISCOUNT,
  )
