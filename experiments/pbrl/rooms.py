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

from experiments.pbrl import contexts, grids

MAP = """
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
  """The layout; states are all squares within the border, row by row.

  Attributes:
    slip: probabilities of the directions by action, (4, 4).
    free: where a direction leads to a cell, (4, rows, columns).
    cells: states that are no walls, (cells,).
    start: probabilities of the first state, (states,).
    target: indicator of the leader's cell, (states,).
    goals: indicators of the goals, (goals, states).
  """

  slip: chex.Array
  free: chex.Array
  cells: chex.Array
  start: chex.Array
  target: chex.Array
  goals: chex.Array

  @property
  def shape(self) -> tuple[int, int]:
    """Shape of a table of logits, (states, actions)."""
    return len(self.start), len(self.slip)

  @property
  def weights(self) -> int:
    """Number of the leader's weights."""
    return len(self.cells) + 1


def make_rooms() -> Rooms:
  """Makes the published layout of 104 cells."""
  rows = MAP.strip().splitlines()
  open_ = np.array([[square == '.' for square in row] for row in rows])
  inner = open_[1:-1, 1:-1]
  # In the order of the directions of a grid.
  free = np.stack(
    [
      np.roll(open_, shift, axis)[1:-1, 1:-1] & inner
      for shift, axis in ((1, 0), (-1, 1), (-1, 0), (1, 1))
    ]
  )
  slip = np.full((4, 4), (1 - CHOSEN) / 3)
  np.fill_diagonal(slip, CHOSEN)

  def at(cell):
    indicator = np.zeros(inner.shape)
    indicator[cell[0] - 1, cell[1] - 1] = 1
    return indicator.ravel()

  return Rooms(
    slip.astype(np.float32),
    free.astype(np.float32),
    np.flatnonzero(inner),
    at(START).astype(np.float32),
    at(TARGET).astype(np.float32),
    np.stack([at(goal) for goal in GOALS]).astype(np.float32),
  )


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
  tax = TOTAL_TAX * jax.nn.softmax(w)[:-1]
  at_goal = jnp.take(rooms.goals, goal, axis=0)
  # Walls have no tax.
  numbers = np.full(len(rooms.start), len(rooms.cells))
  numbers[rooms.cells] = np.arange(len(rooms.cells))
  taxes = jnp.append(tax, 0.0)[numbers]
  inside = numbers < len(rooms.cells)
  active = (inside * (1 - at_goal)).reshape(rooms.free.shape[1:])
  return contexts.Process(
    grids.Grid(rooms.slip, rooms.free, active),
    (at_goal - taxes * (1 - at_goal))[:, None],
    (rooms.target - price * jnp.sum(tax) * at_goal)[:, None],
    rooms.start,
    DISCOUNT,
  )
