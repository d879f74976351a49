"""Incentive design: independent references of equilibria and gradients."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import bilevel_jax as bj
from experiments import harness
from experiments.pbrl import (
  incentive_design,
  incentive_methods,
  incentive_search,
  incentives,
  markov_games,
  zero_sum,
)
from tests.tiers import first

TAU, BOUND, COST, DISCOUNT = 0.1, 0.3, 1.0, 0.9
SMALL = markov_games.Game(states=3, actions=(3, 2))
SOLVED = {}  # Equilibria of this file by game and incentives.
SETTINGS = incentive_design.Settings(game=SMALL, evaluations=60)


def make_incentives(seed: int, sizes=SMALL) -> incentives.Incentives:
  """A problem in float64."""
  game = bj.rl.random_game(
    seed, states=sizes.states, actions=sizes.actions, dtype=jnp.float64
  )
  return incentives.Incentives(game, BOUND, COST, TAU)


def draw_logits(sizes=SMALL, seed=0):
  """Random logits of incentives and of both players."""
  draw = np.random.default_rng(seed).normal
  x = draw(size=(sizes.states, *sizes.actions))
  y = tuple(draw(size=(sizes.states, count)) for count in sizes.actions)
  return jnp.asarray(x), jax.tree.map(jnp.asarray, y)


def softmax(z):
  weights = np.exp(z - z.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def entropy(p):
  return -np.sum(p * np.log(p), axis=-1)


def plain_costs(problem, x):
  given = np.asarray(problem.game.rewards[1], np.float64)
  return (1 - BOUND) * given + BOUND / (1 + np.exp(-np.asarray(x, np.float64)))


def plain_matrix_game(q):
  """The regularised equilibrium and value of a matrix game, by MINPACK."""
  reply = lambda y: softmax(-q @ softmax(y) / TAU)
  solution = scipy.optimize.root(
    lambda y: q.T @ reply(y) / TAU - y, q.mean(0) / TAU, tol=1e-13
  )
  assert np.abs(solution.fun).max() < 1e-9
  a, b = reply(solution.x), softmax(solution.x)
  return a, b, a @ q @ b - TAU * entropy(a) + TAU * entropy(b)


def plain_equilibrium(problem, x):
  """Shapley's value iteration; both policies, and their values."""
  key = np.asarray(problem.game.transitions).tobytes(), np.asarray(x).tobytes()
  if key not in SOLVED:
    SOLVED[key] = shapley_iteration(problem, x)
  return SOLVED[key]


def shapley_iteration(problem, x):
  moves = np.asarray(problem.game.transitions, np.float64)
  costs, values = plain_costs(problem, x), np.zeros(moves.shape[0])
  for _ in range(400):
    solved = [
      plain_matrix_game(c + DISCOUNT * m @ values)
      for c, m in zip(costs, moves, strict=True)
    ]
    after = np.array([value for _, _, value in solved])
    done = np.abs(after - values).max() < 1e-12
    values = after
    if done:
      break
  a, b = (np.stack([s[i] for s in solved]) for i in (0, 1))
  return a, b, values


def plain_value(problem, rewards, a, b):
  """The return of a pair of policies by a dense solve."""
  moves = np.asarray(problem.game.transitions, np.float64)
  both = np.einsum('sa,sb->sab', a, b)
  chain = np.einsum('sab,sabt->st', both, moves)
  gains = np.einsum('sab,sab->s', both, rewards)
  return np.linalg.solve(np.eye(len(chain)) - DISCOUNT * chain, gains).mean()


def plain_designer(problem, x, a, b):
  x = np.asarray(x, np.float64)
  paid = COST * (BOUND * (1 / (1 + np.exp(-x)) - 0.5)) ** 2
  return plain_value(problem, np.asarray(problem.game.rewards[0]) - paid, a, b)


@pytest.mark.parametrize('seed', first([3, 4]))
def test_values_agree_with_value_iteration_in_numpy(seed, x64):
  problem, (x, _) = make_incentives(seed), draw_logits(seed=seed)
  measures = jax.jit(problem.measure)(x)
  a, b, values = plain_equilibrium(problem, x)
  np.testing.assert_allclose(
    measures['designer_return'], plain_designer(problem, x, a, b), rtol=1e-6
  )
  nash = problem.nash(x)
  for logits, policy in zip(nash, (a, b), strict=True):
    np.testing.assert_allclose(softmax(np.asarray(logits)), policy, atol=1e-6)
  assert measures['equilibrium_error'] < 1e-6
  payoff = problem.payoff(x, nash)
  np.testing.assert_allclose(payoff, values.mean(), rtol=1e-9)


def test_incentives_and_payments_by_hand_calculation():
  game = bj.rl.make_game(
    jnp.ones((1, 1, 2, 1)),
    jnp.array([[[[1.0, 2.0]]], [[[0.5, 0.25]]]]),
    discount=0.5,
  )
  problem = incentives.Incentives(game, 0.2, 3.0, TAU)
  x = jnp.array([[[0.0, 100.0]]])
  np.testing.assert_allclose(problem.costs(x), [[[0.5, 0.4]]], rtol=1e-6)
  np.testing.assert_allclose(problem.payments(x), [[[0.0, 0.03]]], rtol=1e-6)
  first = (jnp.zeros((1, 1)), jnp.array([[-50.0, 50.0]]))
  np.testing.assert_allclose(problem.loss(x, first), -2 * 1.97, rtol=1e-6)
  np.testing.assert_allclose(problem.paid(x, first), 0.06, rtol=1e-5)


def differences(function, x, size=1e-4):
  """The gradient by central differences."""
  slope = np.zeros(x.shape)
  for at in np.ndindex(x.shape):
    away = np.zeros(x.shape)
    away[at] = size
    slope[at] = (function(x + away) - function(x - away)) / (2 * size)
  return slope


def require_slopes(slope, function, x, tolerance):
  """Compares with central differences along random directions."""
  draw = np.random.default_rng(0).normal
  for _ in range(3):
    direction, size = draw(size=np.shape(x)), 1e-4
    high, low = (function(x + sign * size * direction) for sign in (1, -1))
    np.testing.assert_allclose(
      np.sum(slope * direction), (high - low) / (2 * size), atol=tolerance
    )


def plain_return(problem, x):
  a, b, _ = plain_equilibrium(problem, x)
  return plain_designer(problem, x, a, b)


@pytest.mark.slow
def test_the_exact_gradient_by_differences_of_the_reference(x64):
  problem, (x, _) = make_incentives(5), draw_logits(seed=5)
  params = bj.BilevelParams(x, problem.nash(x))

  @jax.jit
  def slopes(params):
    return [
      oracle.update(None, oracle.init(params), params)[0].upper
      for oracle in (
        incentive_methods.implicit_gradient(problem, reactions=reactions)
        for reactions in (True, False)
      )
    ]

  exact, hpgd = slopes(params)
  require_slopes(-exact, lambda x: plain_return(problem, x), x, 1e-5)
  # Reactions matter; the estimator without them is another one.
  assert np.abs(hpgd - exact).max() > 0.02


@pytest.mark.slow
def test_hpgd_is_exact_if_one_player_has_no_choice(x64):
  sizes = markov_games.Game(states=3, actions=(1, 3))
  problem, (x, _) = make_incentives(6, sizes), draw_logits(sizes, 6)
  params = bj.BilevelParams(x, problem.nash(x))
  oracle = incentive_methods.implicit_gradient(problem, reactions=False)
  slope = jax.jit(oracle.update)(None, oracle.init(params), params)[0].upper
  nash_return = lambda x: problem.loss(x, problem.nash(x))
  expected = differences(jax.jit(nash_return), np.asarray(x))
  np.testing.assert_allclose(slope, expected, atol=1e-5)


def plain_best(problem, costs, a):
  """The largest payoff against the first player, by value iteration."""
  moves = np.asarray(problem.game.transitions, np.float64)
  gains = np.einsum('sa,sab->sb', a, costs) - TAU * entropy(a)[:, None]
  chain, values = np.einsum('sa,sabt->sbt', a, moves), np.zeros(len(a))
  for _ in range(400):
    q = gains + DISCOUNT * chain @ values
    values = TAU * np.log(np.exp((q - 5) / TAU).sum(1)) + 5
  return values.mean()


def plain_penalty(method, problem, x, y):
  """A penalty with exact responses and the exact equilibrium."""
  a, b = (softmax(np.asarray(z)) for z in y)
  costs = plain_costs(problem, x)
  _, _, values = plain_equilibrium(problem, x)
  if method == 'value_penalty':
    here = plain_value(
      problem, costs + TAU * (entropy(b) - entropy(a))[:, None, None], a, b
    )
    return 2 * plain_best(problem, costs, a) - values.mean() - here
  moves = np.asarray(problem.game.transitions, np.float64)
  q = costs + DISCOUNT * moves @ values
  soft = lambda u: TAU * np.log(np.exp(u / TAU).sum(-1))
  high = soft(np.einsum('sab,sa->sb', q, a)) - TAU * entropy(a)
  low = -soft(-np.einsum('sab,sb->sa', q, b)) + TAU * entropy(b)
  return (high - low).mean()


@pytest.mark.parametrize('method', first(['value_penalty', 'bellman_penalty']))
def test_penalties_and_their_gradients_by_the_reference(method, x64):
  problem, (x, y) = make_incentives(7), draw_logits(seed=7)
  make = getattr(incentive_methods, method)
  weight = 1e6  # The designer's own loss is negligible.
  oracle = make(problem, lambda count: weight)
  solver = bj.descend(
    oracle,
    upper=optax.sgd(0.0),
    lower=optax.sgd(0.0),
    value=bj.Sequence(optax.sgd(1.0), start=incentive_methods.STARTS[method]),
  )

  @jax.jit
  def settle(params):
    """Responses and equilibrium that have converged for fixed x and y."""

    def move(_, state):
      return solver.update(None, state, params)[1]

    return jax.lax.fori_loop(0, 60, move, solver.init(params))

  params = bj.BilevelParams(x, y)
  state = settle(params)
  value = bj.auxiliaries(state)['value']
  full = bj.sequences(upper=x, lower=y, value=value)
  slopes, inner = jax.jit(oracle.update)(None, oracle.init(full), full)
  expected = plain_penalty(method, problem, x, y)
  assert expected > 0.01
  np.testing.assert_allclose(bj.values(inner)['gap'], expected, rtol=1e-6)
  gap = lambda x, a, b: plain_penalty(method, problem, x, (a, b))
  require_slopes(slopes.upper, lambda x: gap(x, *y), x, 1e-4)
  a, b = y
  require_slopes(slopes.lower[0], lambda a: gap(x, a, b), a, 1e-4)
  require_slopes(slopes.lower[1], lambda b: gap(x, a, b), b, 1e-4)


@pytest.mark.slow
def test_penalties_vanish_at_the_equilibrium(x64):
  problem, (x, _) = make_incentives(8), draw_logits(seed=8)
  nash = problem.nash(x)
  for method in incentive_methods.PENALTIES:
    oracle = getattr(incentive_methods, method)(problem, lambda count: 1e9)
    value = incentive_methods.STARTS[method](bj.BilevelParams(x, nash))
    params = bj.sequences(upper=x, lower=nash, value=value)
    slopes, state = jax.jit(oracle.update)(None, oracle.init(params), params)
    assert abs(bj.values(state)['gap']) < 1e-8
    for leaf in jax.tree.leaves((slopes.upper, slopes.lower)):
      np.testing.assert_allclose(leaf, 0, atol=1e-6)


@pytest.mark.slow
def test_the_meta_gradient_by_differences(x64):
  problem, (x, y) = make_incentives(2), draw_logits(seed=2)

  @jax.jit
  def after(x):
    z = y
    for _ in range(3):
      z = zero_sum.learn(
        problem.game, problem.costs(x), z, temperature=TAU, rate=0.05
      )
    return problem.loss(x, z)

  oracle = incentive_methods.meta_gradient(problem, 3, 0.05)
  params = bj.BilevelParams(x, y)
  slopes, state = jax.jit(oracle.update)(None, oracle.init(params), params)
  assert bj.counts(state)['gradients/lower'] == 3
  np.testing.assert_allclose(
    slopes.upper, differences(after, np.asarray(x)), atol=1e-7
  )


def test_updates_at_equal_evaluations():
  settings = dataclasses.replace(SETTINGS, evaluations=420)
  for method in settings.methods:
    updates = incentive_methods.count_updates(method, settings)
    assert updates * incentive_methods.count_pairs(method) == 420, method


def test_grids_have_equally_many_points():
  grids = [
    incentive_design.make_grid(SETTINGS, method) for method in SETTINGS.methods
  ]
  points = [np.prod([len(axis) for axis in grid.values()]) for grid in grids]
  assert set(points) == {9}


def test_by_hand_favours_the_best_pair_by_enumeration():
  sizes = markov_games.Game(states=2, actions=(2, 2))
  game = bj.rl.random_game(9, states=2, actions=(2, 2))
  problem = incentives.Incentives(game, BOUND, COST, TAU)
  pure = [np.eye(2)[list(p)] for p in np.ndindex(*[sizes.states] * 2)]
  rewards = np.asarray(game.rewards[0], np.float64)
  a, b = max(
    itertools.product(pure, pure),
    key=lambda pair: plain_value(problem, rewards, *pair),
  )
  shares = jax.nn.sigmoid(incentive_search.by_hand(game))
  np.testing.assert_allclose(
    shares, (1 - a[:, :, None] + b[:, None, :]) / 2, atol=2e-3
  )


@pytest.mark.slow
def test_random_search_keeps_the_best_point():
  game = bj.rl.random_game(10, states=3, actions=(3, 2))
  problem = incentives.Incentives(game, BOUND, COST, TAU)
  solver = incentive_search.random_search(
    problem, {'rate': 0.5, 'changed': 0.3}
  )
  table = jnp.zeros((3, 3)), jnp.zeros((3, 2))
  params = bj.BilevelParams(jnp.zeros((3, 3, 2)), table)

  @jax.jit
  def run(params):
    def move(carry, key):
      params, state = carry
      updates, state = solver.update(key, state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), problem.loss(params.upper, params.lower)

    keys = jax.random.split(jax.random.key(0), 200)
    return jax.lax.scan(move, (params, solver.init(params)), keys)

  (params, _), losses = run(params)
  # Rounding of the updates changes kept values a little.
  assert np.diff(losses[1:]).max() < 1e-4
  assert losses[-1] < losses[1] - 0.02
  exact = problem.loss(params.upper, problem.nash(params.upper))
  np.testing.assert_allclose(losses[-1], exact, atol=5e-3)


@pytest.mark.slow
def test_the_report_has_all_rows_and_leads(options, results, tmp_path):
  settings = dataclasses.replace(
    incentive_design.PRESETS['smoke'],
    rates=(0.1,),
    inner_rates=(0.1,),
  )
  harness.execute(
    incentive_design.main,
    options(settings, paper='pbrl', binary='incentive_design'),
  )
  metrics = results()['metrics']
  for reward in ('dense', 'sparse'):
    at = f'{reward}/bound=0.3'
    value = lambda name, at=at: metrics[f'designer_return/{name}/{at}']
    assert value('no_intervention') <= value('by_hand') < value('exact')
    rivals = ('by_hand', 'no_intervention', 'random_search', 'meta_gradient')
    for rival in rivals:
      assert np.isfinite(metrics[f'lead_over/{rival}/{at}'])
    assert metrics[f'room/{at}'] > 0
  assert len((tmp_path / 'table.md').read_text().splitlines()) == 2 + 2 * 9
