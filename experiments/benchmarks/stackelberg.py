"""Exact steps of Stackelberg Markov games, compared with NumPy.

An update of `bj.solvers.pbrl` with the value penalty has an inner step of
policy iteration, the gradients of the penalty and the leader, and the steps of
both players. One program maps over games by `vmap`; NumPy computes the same
formulas for one game at a time, and a test compares the numbers. NumPy uses one
thread: on products of this size, the threads of BLAS slow it down.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
import threadpoolctl

import bilevel_jax as bj
from experiments.benchmarks import measure

BOUND = 0.2

DISCOUNT, TEMPERATURE = 0.9, 0.1
PENALTY, LEADER, FOLLOWER = 10.0, 30.0, 3.0


def make_games(states: int, actions: tuple[int, int], seeds: int) -> Any:
  """Draws games with a leading axis of seeds."""
  games = [
    bj.rl.random_game(s, states=states, actions=actions, discount=DISCOUNT)
    for s in range(seeds)
  ]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *games)


def draw_logits(states: int, actions: tuple[int, int], seeds: int) -> Any:
  """Draws logits (seeds, states, actions) of both players."""
  draw = np.random.default_rng(0).normal
  leader, follower = (
    draw(size=(seeds, states, n)).astype(np.float32) for n in actions
  )
  return leader, follower


def library(games: Any, leader: Any, follower: Any) -> tuple[Any, Any]:
  """Makes a step of `pbrl` on all games, and its first carry.

  Args:
    games: see `make_games`.
    leader: logits (seeds, states, actions).
    follower: logits (seeds, states, actions).

  Returns:
    `step(carry, games) -> carry`; a carry has params and state.
  """

  def make_solver(game):
    process = lambda x: bj.rl.induced_mdp(
      game, jax.nn.softmax(x), game.rewards[1], player=1
    )

    def loss(x, y, batch):
      mdp = bj.rl.induced_mdp(
        game, jax.nn.softmax(x), game.rewards[0], player=1
      )
      return -bj.rl.expected_return(mdp, jax.nn.softmax(y))

    return bj.solvers.pbrl(
      loss,
      process,
      temperature=TEMPERATURE,
      penalty=PENALTY,
      upper=optax.sgd(LEADER),
      lower=optax.sgd(FOLLOWER),
    )

  def one(carry, game):
    params, state = carry
    updates, state = make_solver(game).update(None, state, params)
    return optax.apply_updates(params, updates), state

  def begin(game, x, y):
    params = bj.BilevelParams(x, y)
    return params, make_solver(game).init(params)

  carry = jax.jit(jax.vmap(begin))(games, leader, follower)
  return jax.vmap(one), carry


def by_hand(games: Any, leader: Any, follower: Any):
  """Makes the same step in NumPy, for one game at a time.

  It uses matrix products and `numpy.linalg.solve`, and computes each linear
  system and each product with the transitions once.

  Args:
    games: see `make_games`.
    leader: logits (seeds, states, actions).
    follower: logits (seeds, states, actions).

  Returns:
    `step(carry) -> carry`, and the first carry (leader, follower, optimum).
  """

  def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)

  def one(moves, rewards, initial, x, y, w):
    states, first, second, _ = moves.shape
    lead = softmax(x)
    flat = moves.reshape(states, first, second * states)
    # (states, follower's actions, states); both rewards without the last axis.
    faced = (lead[:, None] @ flat).reshape(states, second, states)
    gains = (lead[:, None] @ rewards[1])[:, 0]
    own = (lead[:, None] @ rewards[0])[:, 0]
    eye = np.eye(states, dtype=x.dtype)
    tau, gamma = x.dtype.type(TEMPERATURE), x.dtype.type(DISCOUNT)

    def system(policy):
      return eye - gamma * (policy[:, None] @ faced)[:, 0]

    def earned(policy):
      return np.sum(policy * (gains - tau * np.log(policy)), axis=1)

    # The optimum's logits take a step of policy iteration.
    policy = softmax(w)
    v = np.linalg.solve(system(policy), earned(policy))
    w = (gains + gamma * faced @ v) / tau
    best, pi = softmax(w), softmax(y)
    at_best, at_pi = system(best), system(pi)
    v_best = np.linalg.solve(at_best, earned(best))
    both = np.stack([earned(pi), np.sum(pi * own, axis=1)], axis=1)
    v_pi, v_lead = np.linalg.solve(at_pi, both).T
    best_counts = np.linalg.solve(at_best.T, initial)
    counts = np.linalg.solve(at_pi.T, initial)
    # In the follower's logits, along the natural gradient.
    advantage = lambda q: q - np.sum(pi * q, axis=1, keepdims=True)
    q_lead = own + gamma * faced @ v_lead
    q = gains + gamma * faced @ v_pi - tau * np.log(pi)
    d_y = -advantage(q_lead) / PENALTY - advantage(q)
    # In the leader's logits: weights and values of each pair of actions.
    ahead = moves.reshape(-1, states) @ np.stack([v_lead, v_pi, v_best], axis=1)
    value = gamma * ahead.reshape(states, first, second, 3)
    d_lead = np.zeros_like(lead)
    for mass, policy, player, column, scale in (
      (counts, pi, 0, 0, -1 / PENALTY),
      (counts, pi, 1, 1, -1.0),
      (best_counts, best, 1, 2, 1.0),
    ):
      joint = (mass[:, None] * policy)[:, None] * (
        rewards[player] + value[..., column]
      )
      d_lead += x.dtype.type(scale) * joint.sum(axis=2)
    d_x = lead * (d_lead - np.sum(lead * d_lead, axis=1, keepdims=True))
    return x - LEADER * d_x, y - FOLLOWER * d_y, w

  def step(carry):
    parts = (games.transitions, games.rewards, games.initial)
    result = [one(*each) for each in zip(*parts, *carry, strict=True)]
    return tuple(np.stack(z) for z in zip(*result, strict=True))

  return step, (leader, follower, follower)


def by_hand_runner(step, carry):
  """Makes a run of a step in NumPy, always from the first carry."""

  def run(steps):
    functools.reduce(lambda c, _: step(c), range(steps), carry)

  return run


def _numpy(states, seeds, context):
  actions = (5, 5)
  games = make_games(states, actions, seeds)
  start = draw_logits(states, actions, seeds)
  measured = measure.Program(*library(games, *start), games)
  peer = by_hand_runner(*by_hand(games, *start))
  with threadpoolctl.threadpool_limits(1, 'blas'):
    return measure.compare(measured.run, peer, context)


def rows(preset: str) -> Sequence[measure.Row]:
  """Returns the comparisons; the bound is for the published size."""
  cases = {
    'smoke': [(10, 2)],
    'quick': [(100, 10), (30, 1), (300, 1)],
    'paper': [(100, 10), (30, 1), (100, 1), (300, 1), (1_000, 1)],
  }[preset]
  return [
    measure.Row(
      f'stackelberg/{states}/{seeds}',
      f'pbrl, {states} states, {seeds} game{"s" * (seeds > 1)} / NumPy',
      functools.partial(_numpy, states, seeds),
      {'cpu': BOUND} if seeds == 10 else {},
    )
    for states, seeds in cases
  ]
