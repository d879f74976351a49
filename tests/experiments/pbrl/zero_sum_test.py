"""Equilibria of small games, and methods for incentive design."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.pbrl import (
  incentive_design,
  incentive_methods,
  markov_games,
  zero_sum,
)

TAU = 0.1
SMALL = markov_games.Game(states=3, actions=(2, 2))


def plain_gap(moves, costs, a, b, discount, tau):
  """The gap by value iteration of each player against the other."""
  entropy = lambda p: -np.sum(p * np.log(p), axis=1)

  def best(chain, gains):
    v = np.zeros(len(gains))
    for _ in range(400):
      q = (gains + discount * chain @ v) / tau
      top = q.max(1)
      v = tau * (top + np.log(np.exp(q - top[:, None]).sum(1)))
    return v.mean()

  gain_a = best(
    np.einsum('sb,sabt->sat', b, moves),
    -np.einsum('sb,sab->sa', b, costs) - tau * entropy(b)[:, None],
  )
  gain_b = best(
    np.einsum('sa,sabt->sbt', a, moves),
    np.einsum('sa,sab->sb', a, costs) - tau * entropy(a)[:, None],
  )
  return gain_a + gain_b


def test_the_gap_is_zero_at_the_equilibrium_and_right_elsewhere():
  game = bj.rl.random_game(1, states=4, actions=(3, 2), rewards=1)
  costs = game.rewards[0]
  nash = jax.jit(lambda c: zero_sum.nash(game, c, temperature=TAU))(costs)
  gap = jax.jit(lambda y: zero_sum.nash_gap(game, costs, y, TAU))
  assert abs(gap(nash)) < 1e-4
  draw = np.random.default_rng(0).normal
  y = (jnp.asarray(draw(size=(4, 3))), jnp.asarray(draw(size=(4, 2))))
  a, b = (np.asarray(jax.nn.softmax(z), np.float64) for z in y)
  parts = (np.asarray(z, np.float64) for z in (game.transitions, costs))
  expected = plain_gap(*parts, a, b, 0.9, TAU)
  np.testing.assert_allclose(gap(y), expected, rtol=1e-4)
  # Learning players reach the equilibrium too.
  learn = lambda _, y: zero_sum.learn(
    game, costs, y, temperature=TAU, rate=0.03
  )
  far = jax.jit(lambda y: jax.lax.fori_loop(0, 2_000, learn, y))(y)
  for one, two in zip(far, nash, strict=True):
    np.testing.assert_allclose(
      jax.nn.softmax(one), jax.nn.softmax(two), atol=2e-3
    )


def test_matching_pennies():
  """Uniform policies in a single state."""
  costs = jnp.array([[[1.0, -1.0], [-1.0, 1.0]]])
  game = bj.rl.make_game(jnp.ones((1, 2, 2, 1)), costs[None], discount=0.0)
  for policy in zero_sum.nash(game, costs, temperature=TAU):
    np.testing.assert_allclose(jax.nn.softmax(policy), 0.5, atol=1e-6)


def test_the_meta_gradient_by_differences(x64):
  settings = incentive_design.Settings(game=SMALL)
  game = bj.rl.random_game(
    2, states=3, actions=(2, 2), rewards=1, dtype=jnp.float64
  )
  hyper = {'rate': 0.1, 'inner_rate': 0.05, 'falls': 0.0}
  context = harness.Context((), game, hyper, None, None, 0)
  x = np.random.default_rng(0).normal(size=(3, 2, 2))
  table = jnp.zeros((3, 2), jnp.float64)
  loss = incentive_methods.make_problem(game, settings.game.temperature).upper

  @jax.jit
  def after(x):
    y = (table, table)
    for _ in range(3):
      y = zero_sum.learn(
        game,
        jax.nn.sigmoid(x),
        y,
        temperature=settings.game.temperature,
        rate=0.05,
      )
    return loss(x, y, None)

  solver = incentive_methods.make_meta(settings, 'meta_gradient/k3', context)
  params = bj.BilevelParams(jnp.asarray(x), (table, table + 0))
  updates, state = jax.jit(solver.update)(None, solver.init(params), params)
  assert bj.counts(state)['gradients/lower'] == 3
  slope = np.zeros_like(x)
  for at in np.ndindex(x.shape):
    away = np.zeros_like(x)
    away[at] = 1e-5
    slope[at] = (after(x + away) - after(x - away)) / 2e-5
  # The first step of Adam is the sign of the gradient.
  clear = np.abs(slope) > 1e-6
  assert clear.sum() > 6
  np.testing.assert_array_equal(
    np.sign(-updates.upper)[clear], np.sign(slope)[clear]
  )


def test_pbrl_moves_all_from_one_point(x64):
  """The responses answer the pair before the update; two pairs are counted."""
  settings = incentive_design.Settings(game=SMALL, steps=10)
  game = bj.rl.random_game(
    2, states=3, actions=(2, 2), rewards=1, dtype=jnp.float64
  )
  hyper = {'rate': 0.1, 'inner_rate': 0.3, 'falls': 1.0}
  context = harness.Context((), game, hyper, None, None, 0)
  solver = incentive_methods.make_pbrl(settings, context)
  draw = np.random.default_rng(0).normal
  table = jnp.zeros((3, 2), jnp.float64)
  params = bj.BilevelParams(jnp.asarray(draw(size=(3, 2, 2))), (table, table))
  state, update = solver.init(params), jax.jit(solver.update)
  for _ in range(2):
    before, responses = params, bj.auxiliaries(state)['value']
    updates, state = update(None, state, params)
    params = optax.apply_updates(params, updates)
  assert bj.counts(state)['gradients/lower'] == 4
  a, b = (np.asarray(jax.nn.softmax(z)) for z in before.lower)
  answer = np.asarray(jax.nn.softmax(responses[1]))
  assert np.abs(answer - b).max() > 1e-3
  costs = np.asarray(jax.nn.sigmoid(before.upper))
  entropy = lambda p: -np.sum(p * np.log(p), axis=1)
  gains = np.einsum('sa,sab->sb', a, costs)
  gains -= settings.game.temperature * entropy(a)[:, None]
  chain = np.einsum('sa,sabt->sbt', a, game.transitions)
  values = np.linalg.solve(
    np.eye(3) - 0.9 * np.einsum('sb,sbt->st', answer, chain),
    (answer * gains).sum(1) + settings.game.temperature * entropy(answer),
  )
  logits = (gains + 0.9 * chain @ values) / settings.game.temperature
  np.testing.assert_allclose(
    jax.nn.softmax(bj.auxiliaries(state)['value'][1]),
    jax.nn.softmax(logits),
    rtol=1e-6,
  )


def test_updates_at_equal_evaluations():
  settings = incentive_design.Settings(steps=100)
  count = lambda name: incentive_methods.count_updates(name, settings)
  assert count('pbrl') == count('meta_gradient/k20/equal_updates') == 100
  assert count('meta_gradient/k20') * 20 == count('meta_gradient/k5') * 5 == 200


def test_a_payoff_by_hand_makes_the_best_pair_dominant():
  """Against all pure policies and a closed form."""
  sizes = markov_games.Game(states=2, actions=(2, 2))
  measures = incentive_design.measure_by_hand(sizes, (100, 101))
  assert np.abs(measures['nash_error']).max() < 1e-4
  games = incentive_design.draw_games(sizes, (100, 101))
  # Each player prefers its action by 1/2 in all states.
  follows = 1 / (1 + np.exp(-0.5 / sizes.temperature))
  for at, measured in enumerate(measures['upper_return_at_nash']):
    game = jax.tree.map(lambda x, at=at: np.asarray(x[at], np.float64), games)

    def value(a, b, game=game):
      both = np.einsum('sa,sb->sab', a, b)
      chain = np.einsum('sab,sabt->st', both, game.transitions)
      gains = np.einsum('sab,sab->s', both, game.rewards[0])
      return np.linalg.solve(np.eye(2) - game.discount * chain, gains).mean()

    pure = [np.eye(2)[list(p)] for p in np.ndindex(2, 2)]
    a, b = max(itertools.product(pure, pure), key=lambda pair: value(*pair))
    costs = incentive_design.payoff_by_hand(jax.tree.map(jnp.asarray, game))
    np.testing.assert_array_equal(
      costs, (1 - a[:, :, None] + b[:, None, :]) / 2
    )
    mixed = lambda p: follows * p + (1 - follows) * (1 - p)
    expected = value(mixed(a), mixed(b))
    np.testing.assert_allclose(measured, expected, rtol=1e-4)


@pytest.mark.slow
def test_the_payoff_by_hand_is_a_row(options, results, tmp_path):
  settings = dataclasses.replace(
    incentive_design.PRESETS['smoke'],
    steps=10,
    chunk=10,
    rates=(0.06,),
    inner_rates=(0.06,),
  )
  harness.execute(
    incentive_design.main,
    options(settings, paper='pbrl', binary='incentive_design'),
  )
  metrics = results()['metrics']
  value = lambda name: metrics[f'upper_return_at_nash/{name}']
  assert value('pbrl') < value('control/by_hand')  # Ten steps are not enough.
  last = (tmp_path / 'table.md').read_text().splitlines()[-1]
  assert 'payoff by hand' in last and '0 of 2' in last
