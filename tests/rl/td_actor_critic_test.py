"""The sampled actor-critic: mean increments, chains and visits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.rl import _td_actor_critic
from tests.rl import reference
from tests.tiers import first

GAMMA, SAMPLES = 0.8, 200_000


@functools.cache
def make_problem():
  """A process with rows that have zeros, features, parameters."""
  moves, rewards, _, _ = reference.process()
  first = [0.1, 0.9, 0, 0, 0]
  mdp = bj.rl.make_mdp(moves, rewards, discount=GAMMA, initial=first)
  draw = np.random.default_rng(1).normal
  features = jnp.asarray(draw(size=(5, 2)), jnp.float32)
  params = bj.sequences(
    actor=jnp.asarray(draw(size=(5, 3)), jnp.float32),
    critic=jnp.array([0.0, 3.0]),
  )
  return mdp, features, params


def exact(literal):
  """The mean increments, summed over all transitions."""
  mdp, features, params = (jax.tree.map(np.float64, x) for x in make_problem())
  policy = np.exp(params.actor)
  policy = policy / policy.sum(1, keepdims=True)
  state_weights = reference.visits(mdp.transitions, mdp.initial, policy, GAMMA)
  chances = mdp.transitions
  if literal:
    chances = GAMMA * chances + (1 - GAMMA) * mdp.initial
  actor, critic, reward = np.zeros((5, 3)), np.zeros(2), 0
  for s, a, t in np.ndindex(5, 3, 5):
    weight = state_weights[s] * policy[s, a] * chances[s, a, t]
    v = features @ params.critic
    delta = mdp.rewards[s, a] + GAMMA * v[t] - v[s]
    actor[s] += weight * delta * (np.eye(3)[a] - policy[s])
    critic += weight * delta * features[s]
    reward += weight * mdp.rewards[s, a]
  return actor, critic, reward, state_weights


@pytest.mark.parametrize('literal', first([False, True]))
@pytest.mark.parametrize('sampling', first(['markov', 'iid']))
def test_increments_have_the_exact_mean(sampling, literal):
  """For chains, over many of them after a burn-in."""
  mdp, features, params = make_problem()
  oracle = bj.rl.td_actor_critic(
    mdp, features, key=0, sampling=sampling, samples=SAMPLES,
    bootstrap_restarts=literal,
  )  # fmt: skip
  warm = 30 if sampling == 'markov' else 1

  @jax.jit
  def run(state):
    body = lambda _, s: oracle.update(None, s, params)[1]
    return oracle.update(None, jax.lax.fori_loop(0, warm, body, state), params)

  increments, state = run(oracle.init(params))
  actor, critic, reward, state_weights = exact(literal)
  # Five standard deviations of the mean of terms of order one.
  np.testing.assert_allclose(-increments.actor, actor, atol=0.02)
  np.testing.assert_allclose(-increments.critic, critic, atol=0.04)
  assert np.abs(critic).max() > 0.2
  values = bj.values(state)
  np.testing.assert_allclose(values['reward'], reward, atol=0.02)
  if sampling == 'markov':
    counts = np.bincount(state.inner.states[0], minlength=5) / SAMPLES
    np.testing.assert_allclose(counts, state_weights, atol=0.006)
  assert bj.counts(state) == {'samples/transitions': (warm + 1) * SAMPLES}


def test_biased_and_unbiased_targets_differ():
  """Otherwise the test above could not distinguish them."""
  assert np.abs(exact(True)[1] - exact(False)[1]).max() > 0.1


def test_visits_follow_the_policy():
  mdp, features, params = make_problem()
  oracle = bj.rl.td_actor_critic(mdp, features, key=0, sampling='iid')
  state, step = oracle.init(params), jax.jit(oracle.update)
  visits = lambda z: bj.rl.state_visits(mdp, jax.nn.softmax(z))
  np.testing.assert_allclose(
    state.inner.visits, visits(params.actor), rtol=1e-5
  )
  _, state = step(None, state, params)
  np.testing.assert_allclose(
    state.inner.visits, visits(params.actor), rtol=1e-5
  )
  moved = params._replace(actor=-params.actor)
  target = visits(moved.actor)
  before = np.abs(state.inner.visits - target).sum()
  for k in range(20):
    _, state = step(None, state, moved)
    error = np.abs(state.inner.visits - target).sum()
    assert error <= GAMMA ** (k + 1) * before + 1e-6
  assert before > 0.05


def test_each_worker_moves_its_own_chains():
  mdp, features, params = make_problem()
  oracle = bj.rl.td_actor_critic(mdp, features, key=0, workers=3, samples=40)
  state, step = oracle.init(params), jax.jit(oracle.update)
  assert state.inner.states.shape == (3, 40)
  for worker in (0, 2, 1, 4):  # The last worker uses the chains of worker 1.
    before = np.asarray(state.inner.states)
    _, state = step(None, state, params, worker=worker)
    changed = np.any(np.asarray(state.inner.states) != before, axis=1)
    np.testing.assert_array_equal(changed, np.arange(3) == worker % 3)
  first = oracle.init(params).inner.states
  assert set(np.unique(first)) == {
    0,
    1,
  }  # The other states have initial probability zero.


def test_draws_have_positive_probability():
  weights = jnp.array([0.0, 0.3, 0.0, 0.7, 0.0])
  draws = _td_actor_critic._draw(
    jax.random.key(0), jnp.cumsum(weights), (10_000,)
  )
  share = np.bincount(draws, minlength=5) / 10_000
  np.testing.assert_allclose(share, weights, atol=0.02)
  assert share[0] == share[2] == share[4] == 0
  one = _td_actor_critic._draw(jax.random.key(0), jnp.ones((1,)), (3,))
  np.testing.assert_array_equal(one, 0)


@pytest.mark.slow
def test_other_policies_use_the_chain_rule_of_logits():
  """A linear softmax against the direction of the table."""
  mdp, features, params = make_problem()
  weights = {
    'w': jnp.asarray(np.random.default_rng(2).normal(size=(2, 3)), jnp.float32)
  }
  linear = params._replace(actor=weights)
  table = params._replace(actor=features @ weights['w'])
  make = lambda **make_problem: bj.rl.td_actor_critic(
    mdp, features, key=0, samples=7, **make_problem
  )
  one, two = make(logits=lambda w: features @ w['w']), make()
  actual, _ = one.update(None, one.init(linear), linear)
  expected, _ = two.update(None, two.init(table), table)
  np.testing.assert_allclose(
    actual.actor['w'], features.T @ expected.actor, rtol=1e-5, atol=1e-6
  )


def test_errors():
  mdp, features, params = make_problem()
  make = functools.partial(bj.rl.td_actor_critic, mdp, key=0)
  for given_, message in (
    ({'sampling': 'offline'}, "iid, markov, got 'offline'"),
    ({'samples': 0}, 'samples >= 1'),
    ({'workers': 0}, 'workers >= 1'),
  ):
    with pytest.raises(ValueError, match=message):
      make(features, **given_)
  with pytest.raises(ValueError, match='row for each of 5 states'):
    make(features[:3])
  with pytest.raises(TypeError, match='draws random numbers'):
    bj.rl.td_actor_critic(mdp, features, key=None)
  oracle = make(features)
  with pytest.raises(ValueError, match='actor gives logits of shape'):
    oracle.init(params._replace(actor=jnp.zeros((5, 2))))
  with pytest.raises(ValueError, match='critic has a weight for each of 2'):
    oracle.init(params._replace(critic=jnp.zeros(3)))
  with pytest.raises(TypeError, match='sequences actor, critic'):
    oracle.init(bj.sequences(actor=params.actor))
