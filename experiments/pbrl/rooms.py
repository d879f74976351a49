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
    rewards: of the follower without the leader, (goals, cells).
    taxed: which cells the follower pays for, all but the goal, (goals, cells).
    start: probabilities of the first cell, (cells,).
    target: the leader's cell, one there and else zero, (cells,).
    goals: likewise, (goals, cells).
  """

  transitions: chex.Array
  rewards: chex.Array
  taxed: chex.Array
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
  return Rooms(
    *(
      np.float32(z)
      for z in (
        moves * (1 - goals)[:, :, None, None],
        goals,
        1 - goals,
        eye[number[START]],
        eye[number[TARGET]],
        goals,
      )
    )
  )


def _of(table: chex.Array, goal: chex.Numeric) -> chex.Array:
  """What belongs to a goal, which may be drawn in a compiled program."""
  return jnp.take(table, goal, axis=0)


def straight(z: chex.Array) -> chex.Array:
  """Softmax probabilities whose derivative in the logits is one.

  What is differentiated through it is a derivative in probabilities. Divided by
  visits that is a natural gradient, also of actions whose probability is below
  what a float can hold: with a temperature of .001 most are.
  """
  return z + jax.lax.stop_gradient(jax.nn.softmax(z) - z)


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


def system(moves: chex.Array, policy: chex.Array) -> chex.Array:
  """I - gamma P of a policy, (cells, cells)."""
  chain = jnp.einsum('sa,sat->st', policy, moves)
  return jnp.eye(chain.shape[-1], dtype=chain.dtype) - DISCOUNT * chain


def invert(moves: chex.Array, policy: chex.Array):
  """Solves with I - gamma P of a policy: a function of the right-hand side."""
  matrix = system(moves, policy)
  table = inverse(jax.lax.stop_gradient(matrix))

  def solve(table):
    def refined(product, right):
      x = table @ right
      return x + table @ (right - product(x))

    return refined

  return lambda right: jax.lax.custom_linear_solve(
    lambda x: matrix @ x, right, solve(table), solve(table.T)
  )


def visits(moves: chex.Array, policy: chex.Array, start: chex.Array):
  """Discounted numbers of visits to each cell, (cells,)."""
  return inverse(system(moves, policy)).T @ start


def follower_rewards(
  rooms: Rooms, w: chex.Array, goal: chex.Numeric
) -> chex.Array:
  """What a step from each cell earns, (cells,), from 105 weights."""
  tax = LARGEST * jax.nn.softmax(w)[:-1]
  return _of(rooms.rewards, goal) - tax * _of(rooms.taxed, goal)


def soft_values(
  rooms: Rooms,
  w: chex.Array,
  z: chex.Array,
  goal: chex.Numeric,
  temperature: chex.Numeric,
) -> chex.Array:
  """Values of logits (cells, 4) with their entropy, (cells,)."""
  policy = straight(z)
  log = jax.lax.stop_gradient(jax.nn.log_softmax(z))
  gains = follower_rewards(rooms, w, goal)
  gains = jnp.sum(policy * (gains[:, None] - temperature * log), axis=1)
  return invert(_of(rooms.transitions, goal), policy)(gains)


def leader_return(
  rooms: Rooms,
  w: chex.Array,
  policy: chex.Array,
  goal: chex.Numeric,
  price: chex.Numeric,
) -> chex.Array:
  """Visits of the target, less the price of all penalties at the goal."""
  bill = price * LARGEST * jnp.sum(jax.nn.softmax(w)[:-1])
  gains = rooms.target - bill * _of(rooms.goals, goal)
  return rooms.start @ invert(_of(rooms.transitions, goal), policy)(gains)


def improve(
  rooms: Rooms,
  w: chex.Array,
  z: chex.Array,
  goal: chex.Numeric,
  temperature: chex.Numeric,
) -> chex.Array:
  """Logits of the best answer to the values of logits: Newton's step."""
  values = soft_values(rooms, w, z, goal, temperature)
  gains = follower_rewards(rooms, w, goal)[:, None]
  worth = gains + DISCOUNT * _of(rooms.transitions, goal) @ values
  return jax.nn.log_softmax(worth / temperature)


def optimum(
  rooms: Rooms,
  w: chex.Array,
  z: chex.Array,
  goal: chex.Numeric,
  temperature: chex.Numeric,
) -> chex.Array:
  """Logits of the optimum, differentiable in w, from logits near to it.

  The derivative is that of the fixed point of the optimality equation.
  """
  held = jax.lax.stop_gradient((w, z))
  values = soft_values(rooms, *held, goal, temperature)
  worth = lambda v: (
    follower_rewards(rooms, w, goal)[:, None]
    + DISCOUNT * _of(rooms.transitions, goal) @ v
  )
  scaled = worth(values) / temperature
  residual = temperature * jax.nn.logsumexp(scaled, axis=1) - values
  best = jax.lax.stop_gradient(jax.nn.softmax(scaled))
  values = values + invert(_of(rooms.transitions, goal), best)(residual)
  return jax.nn.log_softmax(worth(values) / temperature)
