"""Four rooms: the published layout, and derivatives through its optimum."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.pbrl import contexts, contextual, four_rooms, rooms

ROOMS = rooms.make_rooms()


def table(goal):
  """The transitions of a goal as (states, actions, states)."""
  grid = rooms.process(ROOMS, np.zeros(105, np.float32), goal, 1.0).transitions
  size = len(ROOMS.start)
  columns = jax.jit(jax.vmap(grid.expect, 1, -1))(jnp.eye(size))
  return np.asarray(columns)


def test_layout():
  assert len(ROOMS.cells) == 104 and ROOMS.weights == 105
  assert ROOMS.start.sum() == ROOMS.target.sum() == 1
  lines = rooms.MAP.strip().splitlines()
  for goal, (row, column) in enumerate(rooms.GOALS):
    moves = table(goal)
    for state in range(121):
      r, c = divmod(state, 11)
      r, c = r + 1, c + 1
      expected = np.zeros((4, 121))
      if lines[r][c] == '.' and (r, c) != (row, column):
        steps = ((-1, 0), (0, 1), (1, 0), (0, -1))
        for action in range(4):
          for other, (down, right) in enumerate(steps):
            is_open = lines[r + down][c + right] == '.'
            after = state + is_open * (11 * down + right)
            expected[action, after] += 0.56 if other == action else 0.44 / 3
      np.testing.assert_allclose(moves[state], expected, atol=1e-6)


# The leader's return at weights of zero, computed independently in NumPy.
AT_ZERO = {
  0.001: (0.2882, 0.0133, -0.2616),
  0.003: (0.2000, -0.0679, -0.3357),
  0.005: (0.1817, -0.0574, -0.2966),
}


@pytest.mark.slow
def test_the_return_without_a_leader_and_its_gradient(x64):
  zero = jnp.zeros(105, jnp.float64)

  @jax.jit
  def at(w, tau, price):
    def goal_return(goal):
      process = rooms.process(ROOMS, w, goal, price)
      better = lambda _, z: contexts.improve(process, z, tau)
      z = jax.lax.fori_loop(0, 20, better, jnp.zeros((121, 4)))
      z = contexts.optimum(process, z, tau)
      return contexts.leader_return(process, jax.nn.softmax(z))

    return (goal_return(0) + goal_return(1)) / 2

  for tau, expected in AT_ZERO.items():
    returns = [at(zero, tau, price) for price in (1.0, 3.0, 5.0)]
    np.testing.assert_allclose(returns, expected, atol=1e-3)
  draw = np.random.default_rng(0).normal
  w, direction = jnp.asarray(draw(size=105)), jnp.asarray(draw(size=105))
  slope = jax.jit(jax.grad(at))(w, 0.005, 1.0) @ direction
  step = 1e-5
  ahead, behind = (at(w + s * direction, 0.005, 1.0) for s in (step, -step))
  np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5)


def test_verdicts():
  values = np.array([1.0, 1.1, 0.9])
  verdict = lambda *leads: contextual.verdict(
    values, [values + lead for lead in leads]
  )
  assert verdict(-0.3, -0.5) == 'above'
  assert verdict(0.3, -0.5) == 'below'
  assert verdict(0.001) == 'level'


def test_penalties_are_two_numbers():
  with pytest.raises(harness.SettingsError, match='penalty takes 2 values'):
    settings_lib.override(four_rooms.Settings(), {'penalty': '1'})


@pytest.mark.parametrize('preset', ['long', 'paper'])
def test_long_presets_have_the_published_sizes(preset):
  settings = four_rooms.PRESETS[preset]
  settings_lib.check(settings)  # Grids without extensions are allowed.
  assert settings.steps == 10_000 and settings.seeds >= 5
  assert settings.temperatures == (0.001, 0.003, 0.005)
  assert settings.rates == (0.01, 0.05, 0.1, 0.5)
  cells = four_rooms.make_study(settings).cells
  prices = (1.0, 3.0) if preset == 'long' else (1.0, 3.0, 5.0)
  assert len(cells) == 3 * len(prices)
  assert {cell['price'] for cell in cells} == set(prices)


def test_the_best_rate_of_a_cell_is_that_of_its_reported_seeds():
  """Two cells, three rates, two reported seeds and a tuning seed."""
  returns = np.array(
    [
      [[1.0, 1.2, 9.0], [0.5, 0.5, 0.0]],
      [[2.0, 2.2, 0.0], [0.1, 0.3, 9.0]],
      [[np.nan, 9.0, 9.0], [0.2, 0.2, 0.0]],
    ]
  )
  trials = [
    types.SimpleNamespace(
      trained=types.SimpleNamespace(history={'leader_return': rate[None]}),
      members=np.arange(3),
    )
    for rate in returns
  ]
  outcome = types.SimpleNamespace(trials=trials)
  best = lambda cell: contextual.best_rate(outcome, cell, seeds=2).tolist()
  assert best(0) == [2.0, 2.2]
  assert best(1) == [0.5, 0.5]
