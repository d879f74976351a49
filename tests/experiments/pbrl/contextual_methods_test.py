"""Gradients of the methods of four rooms against NumPy's, by differences."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.pbrl import contextual_methods, four_rooms, rooms

TAU, PRICE, PENALTY, STATES = 0.005, 3.0, 500.0, 121
_DRAW = np.random.default_rng(5).normal
WEIGHTS, DIRECTION = _DRAW(size=105), _DRAW(size=105)


class Params(NamedTuple):
  """The sequences of the penalties."""

  upper: Any
  lower: Any
  value: Any


class NumpyRooms:
  """Four rooms of one goal, from the map, with full tables of moves."""

  def __init__(self, goal):
    lines = rooms.MAP.strip().splitlines()
    index = lambda r, c: 11 * (r - 1) + c - 1
    self.goal, self.target = index(*rooms.GOALS[goal]), index(*rooms.TARGET)
    self.cells = []
    self.moves = np.zeros((STATES, 4, STATES))
    for r in range(1, 12):
      for c in range(1, 12):
        if lines[r][c] == '#':
          continue
        self.cells.append(index(r, c))
        for other, (down, right) in enumerate(
          ((-1, 0), (0, 1), (1, 0), (0, -1))
        ):
          is_open = lines[r + down][c + right] == '.'
          after = index(r + down, c + right) if is_open else index(r, c)
          for action in range(4):
            # The rounding of the layout, times the penalty, would be visible.
            chance = np.float32(0.56 if other == action else 0.44 / 3)
            self.moves[index(r, c), action, after] += chance
    self.moves[self.goal] = 0
    self.start = index(*rooms.START)

  def rewards(self, w):
    """Rewards of follower and leader, both (states,)."""
    tax = 0.2 * np.exp(w) / np.exp(w).sum()
    follower, leader = np.zeros(STATES), np.zeros(STATES)
    follower[self.cells] = -tax[:-1]
    follower[self.goal] = 1
    leader[self.target] += 1
    leader[self.goal] -= PRICE * tax[:-1].sum()
    return follower, leader

  def solve(self, policy, rewards):
    """Values of a policy, from rewards (states,)."""
    chain = np.einsum('sa,sat->st', policy, self.moves)
    return np.linalg.solve(np.eye(STATES) - 0.99 * chain, rewards)

  def visits(self, policy):
    """Discounted visits of a policy."""
    chain = np.einsum('sa,sat->st', policy, self.moves)
    start = np.eye(STATES)[self.start]
    return np.linalg.solve((np.eye(STATES) - 0.99 * chain).T, start)

  def backup(self, w, values):
    """Action values of the follower."""
    return self.rewards(w)[0][:, None] + 0.99 * self.moves @ values

  def optimum(self, w):
    """Soft values, by value iteration."""
    values = np.zeros(STATES)
    for _ in range(3000):
      q = self.backup(w, values)
      values = TAU * np.logaddexp.reduce(q / TAU, axis=1)
    return values

  def policy(self, w):
    """The follower's optimal policy."""
    return softmax(self.backup(w, self.optimum(w)) / TAU)

  def leader_return(self, w, policy):
    """The leader's return."""
    return self.solve(policy, self.rewards(w)[1])[self.start]


GOALS = [NumpyRooms(goal) for goal in range(2)]


def softmax(z):
  """Probabilities of each state."""
  weights = np.exp(z - z.max(axis=1, keepdims=True))
  return weights / weights.sum(axis=1, keepdims=True)


def bellman_objective(w, policies, visits):
  """The leader's loss with the Bellman penalty, of both goals."""
  total = 0.0
  for room, policy, weights in zip(GOALS, policies, visits, strict=True):
    values = room.optimum(w)
    q = room.backup(w, values)
    height = np.sum(policy * (TAU * np.log(policy) - q), axis=1) + values
    total += PENALTY * weights @ height - room.leader_return(w, policy)
  return total / 2


def value_objective(w, policies):
  """The leader's loss with the value penalty, of both goals."""
  total = 0.0
  for room, policy in zip(GOALS, policies, strict=True):
    entropy = -np.sum(policy * np.log(policy), axis=1)
    values = room.solve(policy, room.rewards(w)[0] + TAU * entropy)
    gap = (room.optimum(w) - values)[room.start]
    total += PENALTY * gap - room.leader_return(w, policy)
  return total / 2


def slope(function, step=1e-5):
  """The derivative at 0, by central differences of fourth order."""
  near = (function(step) - function(-step)) / (2 * step)
  far = (function(2 * step) - function(-2 * step)) / (4 * step)
  return (4 * near - far) / 3


@pytest.fixture
def start(x64):
  """A cell, and params: optima of both goals, and policies near them."""
  study = four_rooms.make_study(four_rooms.Settings())
  cell = contextual_methods.Cell(
    study, {'temperature': TAU, 'price': PRICE, 'rate': 0.1}
  )
  best = np.log([room.policy(WEIGHTS) for room in GOALS])
  lower = np.log([softmax(z) for z in best + 0.1 * _DRAW(size=best.shape)])
  return cell, Params(*map(jnp.asarray, (WEIGHTS, lower, best)))


def directions(oracle, params, batch=None):
  """Directions of an oracle, compiled."""
  update = lambda params: oracle.update(batch, oracle.init(params), params)[0]
  return jax.jit(update)(params)


@pytest.mark.slow
def test_the_exact_gradient_is_that_of_the_leaders_return(start):
  cell, params = start
  gradient = jax.jit(
    jax.grad(
      lambda x: contextual_methods.at_optima(
        cell, params._replace(upper=x), None
      )
    )
  )(params.upper)

  def loss(t):
    w = WEIGHTS + t * DIRECTION
    returns = [room.leader_return(w, room.policy(w)) for room in GOALS]
    return -np.mean(returns)

  np.testing.assert_allclose(gradient @ DIRECTION, slope(loss), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['bellman_penalty', 'value_penalty'])
def test_the_penalties_are_those_of_their_objectives(start, method):
  cell, params = start
  lower, upper = getattr(contextual_methods, method)(
    cell, lambda count: PENALTY
  )
  policies = np.exp(params.lower)
  visits = [
    room.visits(policy)
    for room, policy in zip(GOALS, np.exp(params.value), strict=True)
  ]
  if method == 'bellman_penalty':
    # The visits are those of the optimum, which does not move here.
    objective = lambda w, policies: bellman_objective(w, policies, visits)
    weights = np.array(visits)
  else:
    objective = value_objective
    weights = np.array(
      [room.visits(p) for room, p in zip(GOALS, policies, strict=True)]
    )
  gradient = directions(upper, params).upper
  np.testing.assert_allclose(
    gradient @ DIRECTION,
    slope(lambda t: objective(WEIGHTS + t * DIRECTION, policies)),
    rtol=1e-6,
  )
  # Natural gradients: of probabilities, divided by the visits.
  natural = directions(lower, params).lower
  change = policies * _DRAW(size=policies.shape)
  change -= policies * change.sum(axis=2, keepdims=True)
  np.testing.assert_allclose(
    np.sum(natural * (weights / 2)[:, :, None] * change),
    slope(lambda t: objective(WEIGHTS, policies + t * change)),
    rtol=1e-6,
  )
