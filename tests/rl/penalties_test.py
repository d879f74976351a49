"""Penalties of decision processes against finite differences in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

STATES, ACTIONS, DISCOUNT, TAU = 6, 3, 0.9, 0.1
SIZE = 4  # Coordinates of the leader's variable.
_DRAW = np.random.default_rng(0)
_MIX = {
  'rewards': _DRAW.normal(size=(STATES, ACTIONS, SIZE)),
  'moves': _DRAW.normal(size=(STATES, ACTIONS, STATES, SIZE)),
}
RHO = _DRAW.dirichlet(np.ones(STATES))
X = _DRAW.normal(size=SIZE)
Y = _DRAW.normal(size=(STATES, ACTIONS))


def process(where):
  """A process with the leader's variable in rewards, transitions or both."""

  def at(x):
    rewards, moves = (
      jnp.asarray(_MIX[name]) @ (x if name in where else jnp.asarray(X) + 0 * x)
      for name in ('rewards', 'moves')
    )
    return bj.rl.make_mdp(
      jax.nn.softmax(moves), jnp.tanh(rewards), discount=DISCOUNT, initial=RHO
    )

  return at


def upper(x, y, batch):
  """An upper loss that couples all entries of both variables."""
  return jnp.sin(x.sum()) + jnp.sum(jax.nn.softmax(y) ** 2 * x[0])


# Plain NumPy, without the library.


def plain_process(mdp):
  return tuple(
    np.asarray(z, np.float64) for z in (mdp.transitions, mdp.rewards)
  )


def plain_log_softmax(z):
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def plain_values(moves, rewards, log_policy, tau):
  policy = np.exp(log_policy)
  chain = np.einsum('sa,sat->st', policy, moves)
  gains = np.sum(policy * (rewards - tau * log_policy), axis=1)
  return np.linalg.solve(np.eye(len(gains)) - DISCOUNT * chain, gains)


def plain_optimum(moves, rewards, tau):
  """Values, action values and log policy by soft policy iteration."""
  log = plain_log_softmax(np.zeros_like(rewards))
  for _ in range(12):
    v = plain_values(moves, rewards, log, tau)
    q = rewards + DISCOUNT * moves @ v
    log = plain_log_softmax(q / tau)
  backup = tau * np.log(np.exp(q / tau).sum(1))
  np.testing.assert_allclose(backup, v, rtol=1e-13, atol=1e-13)
  return v, q, log


def plain_value_gap(moves, rewards, y):
  best = plain_optimum(moves, rewards, TAU)[0]
  return RHO @ (best - plain_values(moves, rewards, plain_log_softmax(y), TAU))


def plain_bellman_gap(moves, rewards, y):
  v, q, _ = plain_optimum(moves, rewards, TAU)
  log = plain_log_softmax(y)
  g = np.sum(np.exp(log) * (TAU * log - q), axis=1)
  return RHO @ (g + v)  # min over y' of g is -v.


def differences(fn, point, step=1e-5):
  """Fourth-order central differences."""
  slope = np.zeros(point.size)
  for i in range(point.size):
    away = np.zeros(point.size)
    away[i] = step
    at = [fn(point + k * away.reshape(point.shape)) for k in (-2, -1, 1, 2)]
    slope[i] = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step)
  return slope.reshape(point.shape)


PLAIN = {'value': plain_value_gap, 'bellman': plain_bellman_gap}


def make_oracle(kind, where, **kwargs):
  make_process = process(where)
  if kind == 'bellman':
    problem = bj.BilevelProblem(upper, None)
    return bj.rl.bellman_gap(problem, make_process, temperature=TAU, **kwargs)
  loss = bj.rl.follower_loss(make_process, temperature=TAU)
  return bj.value_gap(bj.BilevelProblem(upper, loss), **kwargs)


def at_optimum(where):
  mdp = process(where)(jnp.asarray(X))
  best = plain_optimum(*plain_process(mdp), TAU)[2]
  return bj.sequences(
    upper=jnp.asarray(X), lower=jnp.asarray(Y), value=jnp.asarray(best)
  )


@pytest.mark.parametrize('kind', ['value', 'bellman'])
@pytest.mark.parametrize(
  'where',
  [
    ('rewards', 'moves'),
    pytest.param(('rewards',), marks=pytest.mark.slow),
    pytest.param(('moves',), marks=pytest.mark.slow),
  ],
)
def test_penalty_gradients_match_differences(x64, kind, where):
  oracle, params = make_oracle(kind, where), at_optimum(where)
  jacobian, state = jax.jit(oracle.update)(None, oracle.init(params), params)
  mdp_at = jax.jit(process(where))

  def height(x, y):
    return PLAIN[kind](*plain_process(mdp_at(jnp.asarray(x))), y)

  in_x = differences(lambda x: height(x, Y), X)
  in_y = differences(lambda y: height(X, y), Y)
  assert np.abs(in_x).max() > 1e-2 and np.abs(in_y).max() > 1e-3
  np.testing.assert_allclose(jacobian.rows.upper[1], in_x, atol=1e-8)
  np.testing.assert_allclose(jacobian.rows.lower[1], in_y, atol=1e-8)
  np.testing.assert_allclose(bj.values(state)['gap'], height(X, Y), rtol=1e-11)


def test_the_gradient_in_probabilities_matches_the_paper(x64):
  params = at_optimum(('moves',))
  policy = jax.nn.softmax(params.lower)
  oracle = make_oracle('bellman', ('moves',), direct=True)
  direct = params._replace(lower=policy)
  evaluate = lambda o, p: jax.jit(o.update)(None, o.init(p), p)[0].rows
  rows = evaluate(oracle, direct)
  mdp = process(('moves',))(params.upper)
  _, q, _ = plain_optimum(*plain_process(mdp), TAU)
  expected = RHO[:, None] * (-q + TAU * (np.log(policy) + 1))
  np.testing.assert_allclose(rows.lower[1], expected, rtol=1e-10)
  logits = make_oracle('bellman', ('moves',))
  other = evaluate(logits, params)
  np.testing.assert_allclose(other.upper[1], rows.upper[1], rtol=1e-11)


def test_the_value_sequence_is_constant_in_the_penalty(x64):
  params = at_optimum(('rewards', 'moves'))
  oracle = make_oracle('bellman', ('rewards', 'moves'))
  gap = lambda w: bj.values(
    oracle.update(None, oracle.init(params), params._replace(value=w))[1]
  )['gap']
  assert not np.any(jax.jit(jax.grad(gap))(params.value))


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_mirror_descent_and_value_iteration_find_the_optimum(dtype):
  with jax.enable_x64(dtype == 'float64'):
    make_process = process(('rewards', 'moves'))
    params = bj.sequences(
      upper=jnp.asarray(X, dtype), value=jnp.asarray(Y, dtype)
    )
    both = {}
    for name, make, steps in (
      ('mirror', bj.rl.policy_mirror_descent, 8),
      ('sweeps', bj.rl.soft_value_iteration_step, 400),
    ):
      solver = bj.descend(
        make(make_process, temperature=TAU),
        value=bj.Sequence(optax.sgd(1.0), steps=steps),
      )
      updates, state = jax.jit(solver.update)(None, solver.init(params), params)
      both[name] = jax.nn.log_softmax(params.value + updates.value)
      assert bj.counts(state)['gradients/lower'] == steps
    _, _, best = plain_optimum(*plain_process(make_process(params.upper)), TAU)
  for actual in both.values():
    np.testing.assert_allclose(
      np.exp(actual), np.exp(best), atol=1e-9 if dtype == 'float64' else 2e-4
    )


def test_a_short_mirror_descent_step_satisfies_its_equation(x64):
  mdp = process(('rewards',))(jnp.asarray(X))
  moves, rewards = plain_process(mdp)
  log = plain_log_softmax(Y)
  v = plain_values(moves, rewards, log, TAU)
  q = rewards + DISCOUNT * moves @ v
  eta = 3.0  # pi' maximises <pi, q> + tau H(pi) - KL(pi, pi_k) / eta.
  expected = plain_log_softmax((log + eta * q) / (1 + eta * TAU))
  step = eta * TAU / (1 + eta * TAU)
  solver = bj.descend(
    bj.rl.policy_mirror_descent(process(('rewards',)), temperature=TAU),
    value=optax.sgd(step),
  )
  params = bj.sequences(upper=jnp.asarray(X), value=jnp.asarray(Y))
  updates, _ = solver.update(None, solver.init(params), params)
  actual = plain_log_softmax(np.asarray(params.value + updates.value))
  np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_the_hypergradient_through_the_optimum_matches_differences(x64):
  make_process = process(('rewards', 'moves'))

  def leader(x):
    policy = bj.rl.optimal(make_process(x), TAU).policy
    return upper(x, jnp.log(policy), None)

  compiled = jax.jit(make_process)

  def plainly(x):
    mdp = compiled(jnp.asarray(x))
    best = plain_optimum(*plain_process(mdp), TAU)[2]
    return np.sin(x.sum()) + np.sum(np.exp(best) ** 2 * x[0])

  np.testing.assert_allclose(
    jax.jit(jax.grad(leader))(jnp.asarray(X)),
    differences(plainly, X),
    atol=1e-8,
  )


def test_the_natural_gradient_is_minus_the_advantage(x64):
  make_process = process(('rewards',))
  loss = bj.rl.follower_loss(make_process, temperature=TAU)
  oracle = bj.gradient(lambda p, b: loss(p.upper, p.lower, b), of='lower')
  weights = lambda p: bj.rl.state_visits(
    make_process(p.upper), jax.nn.softmax(p.lower)
  )
  params = bj.BilevelParams(jnp.asarray(X), jnp.asarray(Y))
  oracle = bj.rl.natural(oracle, weights)
  actual = jax.jit(oracle.update)(None, oracle.init(params), params)[0].lower
  moves, rewards = plain_process(make_process(params.upper))
  log = plain_log_softmax(Y)
  v = plain_values(moves, rewards, log, TAU)
  q = rewards + DISCOUNT * moves @ v - TAU * log
  advantage = (1 - DISCOUNT) * (q - v[:, None])
  np.testing.assert_allclose(-actual, advantage / (1 - DISCOUNT) ** 2)


# Unreachable states.

OPEN, SHUT = 9, 4


def _partly_closed(seed, dtype, slow=1e-9):
  """A dense process whose last states are unreachable from the others.

  One of the reachable states is rarely visited.
  """
  draw = np.random.default_rng(seed)
  size = OPEN + SHUT
  moves = draw.dirichlet(np.ones(size), (size, 3))
  moves[:OPEN, :, OPEN:] = 0
  moves[:OPEN, :, 3] *= slow
  moves /= moves.sum(-1, keepdims=True)
  first = np.append(draw.dirichlet(np.ones(OPEN)), np.zeros(SHUT))
  first[3] = 0
  first /= first.sum()
  rewards, logits = draw.normal(size=(2, size, 3))
  cast = lambda x: jnp.asarray(x, dtype)
  mdp = bj.rl.MDP(cast(moves), cast(rewards), cast(0.95), cast(first))
  return mdp, cast(logits)


@functools.partial(jax.jit, static_argnames='dtype')
def _reordered_results(mdp, logits, order, scale, *, dtype):
  """Visits and natural gradients of one process, summed in another order.

  The loss has a gradient in each state, reachable or not.
  """
  mdp = bj.rl.MDP(
    mdp.transitions[order][:, :, order] * scale,
    mdp.rewards[order],
    mdp.discount,
    mdp.initial[order] * scale,
  )
  visits = lambda p: bj.rl.state_visits(mdp, jax.nn.softmax(p.lower))

  def loss(params, batch):
    del batch
    policy = jax.nn.softmax(params.lower)
    return bj.rl.expected_return(mdp, policy) + jnp.sum(policy[:, 0])

  params = bj.BilevelParams(jnp.zeros((), dtype), logits[order])
  oracle = bj.rl.natural(bj.gradient(loss, of='lower'), visits)
  step, _ = oracle.update(None, oracle.init(params), params)
  back = jnp.argsort(order)
  return visits(params)[back], step.lower[back]


@pytest.mark.parametrize('dtype', ['float64', 'float32'])
def test_unreachable_states_do_not_move_for_any_rounding(dtype):
  eps = float(np.finfo(dtype).eps)
  draw, size = np.random.default_rng(0), OPEN + SHUT
  with jax.enable_x64(dtype == 'float64'):
    run = jax.vmap(
      functools.partial(_reordered_results, dtype=dtype), (None, None, 0, 0)
    )
    for seed in range(5):
      mdp, logits = _partly_closed(seed, dtype)
      orders = jnp.asarray([draw.permutation(size) for _ in range(50)])
      scales = jnp.asarray(1 + draw.integers(-9, 10, 50) * eps, dtype)
      visits, steps = run(mdp, logits, orders, scales)
      assert not np.any(visits[:, OPEN:]) and not np.any(steps[:, OPEN:])
      policy = np.asarray(jax.nn.softmax(logits), np.float64)
      chain = np.einsum('sa,sat->st', policy, np.float64(mdp.transitions))
      true_visits = np.linalg.solve(
        np.eye(OPEN) - 0.95 * chain[:OPEN, :OPEN].T,
        0.05 * np.float64(mdp.initial)[:OPEN],
      )
      # The seldom seen state too, whose visits are less than the rounding of
      # the others': each sum of `size` products rounds as often, and the errors
      # of the times before, 1 / (1 - 0.95) in the mean, add up.
      room = 2 * size * eps / (1 - 0.95)
      np.testing.assert_allclose(visits[:, :OPEN] / true_visits, 1, atol=room)
      # Beside the largest, each step is the same in all orders.
      spread = np.ptp(np.asarray(steps[:, :OPEN]), axis=0)
      top = np.abs(steps[:, :OPEN]).max((0, 2))[:, None]
      assert np.all(spread <= 4 * room * top)


@pytest.mark.parametrize('dtype', ['float64', 'float32'])
def test_probabilities_that_underflow_reach_nothing(dtype):
  """A softmax has full support except for its rounding."""
  with jax.enable_x64(dtype == 'float64'):
    cast = lambda x: jnp.asarray(x, dtype)
    go_or_stay = [[[0, 1, 0], [1, 0, 0]], [[0, 0, 1]] * 2, [[0, 0, 1]] * 2]
    mdp = bj.rl.make_mdp(
      cast(go_or_stay), cast(np.ones((3, 2))), discount=cast(0.9),
      initial=cast([1, 0, 0]),
    )  # fmt: skip
    visits = jax.jit(
      lambda gap: bj.rl.state_visits(
        mdp, jax.nn.softmax(cast([[-gap, 0], [0, 0], [0, 0]]))
      )
    )
    exponents = -np.log(np.finfo(dtype).tiny)
    true_visits = np.asarray(visits(cast(0.9 * exponents)))
    rare = np.exp(-np.float64(cast(0.9 * exponents)))
    room = 40 * np.finfo(dtype).eps * exponents
    np.testing.assert_allclose(
      true_visits, [1, 0.9 * rare, 8.1 * rare], rtol=room
    )
    np.testing.assert_array_equal(visits(cast(2 * exponents)), [1, 0, 0])


# Two players.

GAME = {'states': 4, 'actions': (3, 2), 'rewards': 1}


def game_at(x):
  """A game with x[:2] in its costs and the other entries in transitions."""
  game = bj.rl.random_game(3, **GAME, dtype=jnp.float64)
  mix = jax.random.normal(jax.random.key(5), (*game.transitions.shape, 2))
  weights = game.transitions * jnp.exp(mix @ x[2:])
  costs = jnp.tanh(game.rewards[0] + mix[..., 0, :] @ x[:2])
  return bj.rl.make_game(
    weights / weights.sum(-1, keepdims=True),
    costs[None],
    discount=DISCOUNT,
  )


def payoff(x, y, batch):
  game = game_at(x)
  both = tuple(jax.nn.softmax(z) for z in y)
  _, two = bj.rl.zero_sum_responses(
    game, game.rewards[0], both, temperature=TAU
  )
  return bj.rl.expected_return(two, both[1], TAU)


def plain_responses(game, y):
  """Each player's process in NumPy."""
  moves, costs = np.asarray(game.transitions), np.asarray(game.rewards[0])
  a, b = (np.exp(plain_log_softmax(z)) for z in y)
  of_a = (
    -np.einsum('sb,sab->sa', b, costs)
    + TAU * (np.sum(b * np.log(b), 1)[:, None])
  )
  of_b = (
    np.einsum('sa,sab->sb', a, costs)
    + TAU * (np.sum(a * np.log(a), 1)[:, None])
  )
  return (
    (np.einsum('sb,sabt->sat', b, moves), of_a),
    (np.einsum('sa,sabt->sbt', a, moves), of_b),
  )


def plain_nash_gap(game, y):
  """max_b' J(a, b') - min_a' J(a', b)."""
  return sum(
    plain_optimum(*faced, TAU)[0].mean() for faced in plain_responses(game, y)
  )


@pytest.mark.slow
def test_nikaido_isoda_gradients_match_differences(x64):
  draw = np.random.default_rng(1).normal
  x, a, b = draw(size=4), draw(size=(4, 3)), draw(size=(4, 2))
  at = jax.jit(game_at)
  game = at(jnp.asarray(x))
  best = tuple(
    jnp.asarray(plain_optimum(*faced, TAU)[2])
    for faced in plain_responses(game, (a, b))
  )
  params = bj.sequences(
    upper=jnp.asarray(x), lower=(jnp.asarray(a), jnp.asarray(b)), value=best
  )
  problem = bj.BilevelProblem(
    lambda x, y, batch: x.sum() * jnp.sum(y[0]), payoff
  )
  oracle = bj.oracles.nikaido_isoda(problem)
  jacobian, state = jax.jit(oracle.update)(None, oracle.init(params), params)
  height = lambda x, y: plain_nash_gap(at(jnp.asarray(x)), y)
  np.testing.assert_allclose(
    bj.values(state)['gap'], height(x, (a, b)), rtol=1e-10
  )
  for actual, wanted in (
    (jacobian.rows.upper, differences(lambda x: height(x, (a, b)), x)),
    (jacobian.rows.lower[0], differences(lambda a: height(x, (a, b)), a)),
    (jacobian.rows.lower[1], differences(lambda b: height(x, (a, b)), b)),
  ):
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(actual[1], wanted, atol=1e-8)
  # The gradients vanish at the best responses.
  respond = bj.oracles.best_responses(problem)
  slopes, _ = jax.jit(respond.update)(None, respond.init(params), params)
  chex.assert_trees_all_close(
    slopes.value, jax.tree.map(jnp.zeros_like, slopes.value), atol=1e-11
  )


# Bad input.


@pytest.mark.parametrize('temperature', [0.0, -1.0, float('nan')])
def test_temperatures_must_be_positive(temperature):
  problem = bj.BilevelProblem(upper, None)
  for make in (
    lambda: bj.rl.follower_loss(process(()), temperature=temperature),
    lambda: bj.rl.policy_mirror_descent(process(()), temperature=temperature),
    lambda: bj.rl.soft_value_iteration_step(
      process(()), temperature=temperature
    ),
    lambda: bj.rl.bellman_gap(problem, process(()), temperature=temperature),
  ):
    with pytest.raises(
      ValueError, match='the temperature is a finite number > 0'
    ):
      make()


def test_rho_must_have_full_support():
  hole = lambda x: process(())(x)._replace(initial=jnp.eye(STATES)[2])
  problem = bj.BilevelProblem(upper, None)
  table = jnp.asarray(Y, jnp.float32)
  params = bj.sequences(
    upper=jnp.asarray(X, jnp.float32), lower=table, value=table
  )
  oracle = bj.rl.bellman_gap(problem, hole, temperature=TAU)
  with pytest.raises(ValueError, match=r'rho is zero in 5 states.*weights='):
    oracle.init(params)
  valid_oracle = bj.rl.bellman_gap(problem, hole, temperature=TAU, weights=RHO)
  valid_oracle.init(params)
  with pytest.raises(ValueError, match='rho is zero'):
    bj.rl.bellman_gap(
      problem, process(()), temperature=TAU, weights=RHO * (RHO > 0.1)
    ).init(params)

  with pytest.raises(ValueError, match=r'rho has a weight for each state'):
    bj.rl.bellman_gap(
      problem, process(()), temperature=TAU, weights=RHO[:2]
    ).init(params)


def test_transitions_must_be_stochastic():
  def leaky(x):
    mdp = process(())(x)
    return mdp._replace(transitions=0.9 * mdp.transitions)

  table = jnp.asarray(Y, jnp.float32)
  params = bj.sequences(
    upper=jnp.asarray(X, jnp.float32), lower=table, value=table
  )
  problem = bj.BilevelProblem(upper, None)
  for make in (
    lambda: bj.rl.policy_mirror_descent(leaky, temperature=TAU),
    lambda: bj.rl.bellman_gap(problem, leaky, temperature=TAU),
  ):
    with pytest.raises(ValueError, match='not a probability distribution'):
      make().init(params)


def test_logits_must_have_the_shape_of_the_rewards():
  x = jnp.asarray(X, jnp.float32)
  for table in (np.zeros((STATES, ACTIONS + 1)), np.zeros(STATES)):
    solver = bj.solvers.pbrl(
      upper,
      process(()),
      temperature=TAU,
      penalty=1.0,
      upper=optax.sgd(0.1),
      lower=optax.sgd(0.1),
    )
    with pytest.raises(ValueError, match=r'logits have the shape .* `lower`'):
      solver.init(bj.BilevelParams(x, jnp.asarray(table)))


def test_the_lower_variable_of_a_game_must_be_a_pair():
  # The error comes before the evaluation of the loss.
  problem = bj.BilevelProblem(lambda x, y, b: y[0], lambda x, y, b: y[1])
  one = jnp.float32(1.0)
  for penalty in (None, 1.0):
    oracle = bj.oracles.nikaido_isoda(problem, penalty=penalty)
    params = bj.sequences(upper=one, lower=one, value=one)
    with pytest.raises(TypeError, match='is a pair'):
      oracle.update(None, oracle.init(params), params)
  with pytest.raises(ValueError, match='the player is 0 or 1'):
    bj.rl.induced_mdp(None, None, None, player=2)
  with pytest.raises(ValueError, match='rewards, states, actions, actions'):
    bj.rl.make_game(np.ones((1, 1, 1, 1)), np.ones((1, 1, 1)), discount=0.5)


def test_policies_and_rewards_must_fit_the_game():
  game = bj.rl.random_game(0, states=3, actions=(2, 4))
  one, two = jnp.full((3, 2), 0.5), jnp.full((3, 4), 0.25)
  with pytest.raises(ValueError, match=r'player 0 faces .* shape \(3, 4\)'):
    bj.rl.induced_mdp(game, one, game.rewards[0], player=0)
  with pytest.raises(ValueError, match=r'player 1 faces .* shape \(3, 2\)'):
    bj.rl.induced_mdp(game, two, game.rewards[0], player=1)
  with pytest.raises(ValueError, match='one table of the game'):
    bj.rl.induced_mdp(game, two, game.rewards, player=0)
  with pytest.raises(ValueError, match='the temperature is a finite number'):
    bj.rl.zero_sum_responses(game, game.rewards[0], (one, two), temperature=-1)
