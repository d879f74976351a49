"""Grids: products and solutions against full tables."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pbrl import contexts, grids

ROWS, COLUMNS, ACTIONS, DISCOUNT = 4, 3, 2, 0.9
_RNG = np.random.default_rng(0)


def make_grid():
  """A grid with a wall and a cell that ends the episode."""
  walls = np.zeros((ROWS, COLUMNS), bool)
  walls[1, 1] = True
  free = np.zeros((4, ROWS, COLUMNS))
  for direction, (down, right) in enumerate(((-1, 0), (0, 1), (1, 0), (0, -1))):
    for r in range(ROWS):
      for c in range(COLUMNS):
        row, column = r + down, c + right
        inside = 0 <= row < ROWS and 0 <= column < COLUMNS
        free[direction, r, c] = inside and not walls[row, column]
  active = 1.0 - walls
  active[3, 2] = 0
  slip = _RNG.dirichlet(np.ones(4), size=ACTIONS)
  return grids.Grid(jnp.asarray(slip), jnp.asarray(free), jnp.asarray(active))


def full_table(grid):
  """Transitions by loops, (states, actions, states)."""
  moves = np.zeros((ROWS * COLUMNS, ACTIONS, ROWS * COLUMNS))
  offsets = (-COLUMNS, 1, COLUMNS, -1)
  for state in range(ROWS * COLUMNS):
    r, c = divmod(state, COLUMNS)
    for action in range(ACTIONS):
      for direction, offset in enumerate(offsets):
        after = state + int(grid.free[direction, r, c]) * offset
        chance = grid.slip[action, direction] * grid.active[r, c]
        moves[state, action, after] += chance
  return moves


def test_products_solutions_and_derivatives_are_those_of_the_table(x64):
  grid = make_grid()
  table = full_table(grid)
  states = ROWS * COLUMNS
  policy = _RNG.dirichlet(np.ones(ACTIONS), size=states)
  right, columns = _RNG.normal(size=states), _RNG.normal(size=(states, 5))
  start = np.full(states, 1 / states)

  def make(transitions):
    rewards = jnp.zeros((states, 1))
    return contexts.Process(transitions, rewards, rewards, start, DISCOUNT)

  @jax.jit
  def numbers(grid, policy):
    def loss(policy):
      x = contexts.invert(make(grid), policy)(right)
      return jnp.sum(jnp.sin(x)), x

    (_, x), slope = jax.value_and_grad(loss, has_aux=True)(policy)
    return {
      'expected': contexts.backup(make(grid), right),
      'product': contexts.chain(make(grid), policy) @ columns,
      'solution': x,
      'slope': slope,
      'visits': contexts.visits(make(grid), policy),
    }

  by_grid, by_table = numbers(grid, policy), numbers(jnp.asarray(table), policy)
  for name, value in by_grid.items():
    np.testing.assert_allclose(
      value, by_table[name], rtol=1e-10, atol=1e-12, err_msg=name
    )
  # The table's solution is that of NumPy.
  matrix = np.eye(states) - DISCOUNT * np.einsum('sa,sat->st', policy, table)
  np.testing.assert_allclose(
    by_grid['solution'], np.linalg.solve(matrix, right), rtol=1e-10
  )
