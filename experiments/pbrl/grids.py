"""Transitions between the cells of a grid, and their linear systems.

A move leads to a neighbour or stays, so I - gamma P couples a row of cells to
the rows above and below only. Elimination row by row then costs
rows * columns^3, instead of the (rows * columns)^3 of a full table.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

UP, RIGHT, DOWN, LEFT = range(4)


class Grid(NamedTuple):
  """Transitions of all actions in each cell.

  States are the cells of the grid, with walls, row by row.

  Attributes:
    slip: probabilities of the four directions (`UP`, ...), (actions, 4).
    free: 1 where a direction leads to a cell; the move stays where it is 0,
      (4, rows, columns).
    active: 0 at walls and at cells that end the episode, (rows, columns).
  """

  slip: chex.Array
  free: chex.Array
  active: chex.Array

  def expect(self, values: chex.Array) -> chex.Array:
    """Expected next values by state and action, (states, actions)."""
    table = values.reshape(self.active.shape)
    after = jnp.stack(
      [
        free * _neighbour(table, direction) + (1 - free) * table
        for direction, free in enumerate(self.free)
      ]
    )
    after = (self.active * after).reshape(len(self.free), -1)
    return jnp.einsum('ad,ds->sa', self.slip, after)

  def chain(self, weights: chex.Array) -> 'Chain':
    """Sums the transitions with weights of (states, actions)."""
    by_direction = jnp.einsum('sa,ad->ds', weights, self.slip)
    by_direction = self.active * by_direction.reshape(self.free.shape)
    stay = jnp.sum((1 - self.free) * by_direction, axis=0)
    return Chain(stay, self.free * by_direction)


class Chain(NamedTuple):
  """A matrix over states with an entry per neighbour.

  Attributes:
    stay: the diagonal, (rows, columns).
    moves: entries of the neighbours in the four directions, (4, rows, columns).
  """

  stay: chex.Array
  moves: chex.Array

  def __matmul__(self, table: chex.Array) -> chex.Array:
    """Multiplies a vector (states,) or a table (states, columns)."""
    grid = table.reshape(*self.stay.shape, *table.shape[1:])
    lift = lambda x: x.reshape(*x.shape, *[1] * (table.ndim - 1))
    total = lift(self.stay) * grid
    for direction, weights in enumerate(self.moves):
      total += lift(weights) * _neighbour(grid, direction)
    return total.reshape(table.shape)


def make_solvers(
  chain: Chain, discount: chex.Numeric
) -> tuple[Callable[[chex.Array], chex.Array], ...]:
  """Solves (I - discount * chain) x = b, and the transposed system.

  The matrix is diagonally dominant, so no pivoting is needed.

  Args:
    chain: of a policy.
    discount: below 1, or an episode ends from each state.

  Returns:
    Two functions from b to x, both (states,).
  """
  rows, columns = chain.stay.shape
  up, right, down, left = -discount * chain.moves
  before, after = (jnp.eye(columns, k=k) for k in (-1, 1))

  def eliminate(carry, row):
    inverse, below = carry
    diagonal, above, right, left, down = row
    block = jnp.diag(diagonal) + right[:, None] * after + left[:, None] * before
    inverse = invert(block - above[:, None] * inverse * below)
    return (inverse, down), inverse

  zeros = jnp.zeros((columns, columns), chain.stay.dtype)
  _, inverses = jax.lax.scan(
    eliminate,
    (zeros, zeros[0]),
    (1 - discount * chain.stay, up, right, left, down),
  )

  def solver(inverses, above, below):
    def forward(last, row):
      inverse, above, right = row
      return (inverse @ (right - above * last),) * 2

    def backward(following, row):
      inverse, below, here = row
      return (here - inverse @ (below * following),) * 2

    def solve(right):
      parts = inverses, above, right.reshape(rows, columns)
      _, here = jax.lax.scan(forward, zeros[0], parts)
      parts = inverses, below, here
      _, x = jax.lax.scan(backward, zeros[0], parts, reverse=True)
      return x.ravel()

    return solve

  return (
    solver(inverses, up, down),
    solver(
      jnp.swapaxes(inverses, 1, 2), _neighbour(down, UP), _neighbour(up, DOWN)
    ),
  )


def invert(matrix: chex.Array) -> chex.Array:
  """Inverts a diagonally dominant matrix by elimination.

  One expression per pivot compiles to one pass over the matrix.
  `jnp.linalg.solve` under `vmap` has hung on busy machines.
  """
  index = jnp.arange(len(matrix))

  def eliminate(k, a):
    pivot = a[k, k]
    row, column = a[k] / pivot, a[:, k]
    other = jnp.where(
      index == k, -column[:, None] / pivot, a - column[:, None] * row
    )
    own = jnp.where(index == k, 1 / pivot, row)
    return jnp.where((index == k)[:, None], own, other)

  return jax.lax.fori_loop(0, len(matrix), eliminate, matrix)


def _neighbour(table, direction):
  """Entries of the neighbours in a direction; zeros beyond the border."""
  axis = 0 if direction in (UP, DOWN) else 1
  size = table.shape[axis]
  zeros = jnp.zeros_like(jax.lax.slice_in_dim(table, 0, 1, axis=axis))
  if direction in (UP, LEFT):
    parts = zeros, jax.lax.slice_in_dim(table, 0, size - 1, axis=axis)
  else:
    parts = jax.lax.slice_in_dim(table, 1, size, axis=axis), zeros
  return jnp.concatenate(parts, axis=axis)
