"""Evaluation: known values, whole episodes, intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import bilevel_jax as bj
from experiments.rl import evaluation, games, networks

GOAL = 4


def _step(key, state, action):
  """A walk of four steps to the right at a cost of 1 each; 0 waits."""
  del key
  after = state + action
  ends = after >= GOAL
  begins = jnp.where(ends, 0, after)
  return begins, begins, -1.0, ends, jnp.array(False), after


WALK = bj.rl.Environment(lambda key: (0, 0), _step, actions=2)


def _agent(policy):
  return networks.Agent(None, policy, None)


def _play(policy, kind, episodes, limit):
  act = evaluation.make_act(_agent(policy), WALK.actions, kind)
  run = jax.jit(
    lambda key: evaluation.play(
      WALK, act, None, key, episodes=episodes, limit=limit
    )
  )
  return run(jax.random.key(0))


def test_greedy_actions_have_the_optimal_return_and_sampled_ones_less():
  """Right is likelier: -4 for greedy actions, -4 / p for sampled ones."""
  right = 0.6
  logits = jnp.log(jnp.array([1 - right, right]))
  policy = lambda actor, observation: logits
  greedy = _play(policy, 'greedy', 7, 100)
  np.testing.assert_array_equal(greedy.returns, np.full(7, -4.0))
  np.testing.assert_array_equal(greedy.lengths, np.full(7, 4))
  count = 4_000
  sampled = _play(policy, 'sampled', count, 1_000)
  np.testing.assert_array_equal(sampled.lengths, -sampled.returns)
  # The length is negative binomial.
  deviation = np.sqrt(GOAL * (1 - right)) / right
  error = sampled.returns.mean() + GOAL / right
  assert abs(error) < 5 * deviation / np.sqrt(count)
  assert abs(sampled.returns.std() / deviation - 1) < 0.1


def test_the_return_of_an_unfinished_episode_is_nan():
  stays = lambda actor, observation: jnp.array([1.0, 0.0])
  episodes = _play(stays, 'greedy', 3, 9)
  assert np.isnan(episodes.returns).all() and (episodes.lengths == 9).all()
  # The episode ends in the last allowed step.
  goes = lambda actor, observation: jnp.array([0.0, 1.0])
  assert (_play(goes, 'greedy', 3, GOAL).returns == -4).all()


def test_unfinished_episodes_are_warned_of():
  def play_seed(params, key):
    return evaluation.Episodes(params, jnp.full(2, 9))

  params = jnp.array([[1.0, jnp.nan], [1.0, 1.0]])
  match = '1 of 4 episodes did not end within 9 steps'
  with pytest.warns(RuntimeWarning, match=match):
    evaluation.play_seeds(params, (0, 1), play_seed)


def test_short_episodes_count_no_more_than_long_ones():
  """Lengths 1 and 9, equally often: rewards of 1, a mean return of 5."""

  def reset(key):
    state = jnp.where(jax.random.bernoulli(key), 1, 9)
    return state, state

  def step(key, state, action):
    left = state - 1
    ends = left == 0
    begins = jnp.where(ends, reset(key)[0], left)
    return begins, begins, 1.0, jnp.array(False), ends, left

  act = lambda actor, key, observation: 0
  environment = bj.rl.Environment(reset, step, actions=2)
  episodes = evaluation.play(
    environment, act, None, jax.random.key(3), episodes=2_000, limit=20
  )
  assert set(np.unique(episodes.returns)) == {1.0, 9.0}
  assert abs(episodes.returns.mean() - 5) < 5 * 4 / np.sqrt(2_000)


@pytest.mark.parametrize('kind', ['greedy', 'sampled'])
def test_normal_policies(kind):
  policy = lambda actor, x: (x + actor, jnp.log(jnp.array([0.5, 2.0])))
  act = evaluation.make_act(_agent(policy), (2,), kind)
  keys = jax.random.split(jax.random.key(0), 4_000)
  draw = lambda key: act(1.0, key, jnp.array([0.0, 2.0]))
  actions = np.asarray(jax.vmap(draw)(keys))
  deviation = np.array([0.5, 2.0]) * (kind == 'sampled')
  np.testing.assert_allclose(
    actions.mean(axis=0), [1.0, 3.0], atol=5 * 2 / np.sqrt(4_000)
  )
  np.testing.assert_allclose(
    actions.std(axis=0), deviation, rtol=0.1, atol=1e-6
  )


def test_interval_over_episodes():
  """Only the variance within seeds counts."""
  rng = np.random.default_rng(0)
  one = rng.normal(size=(1, 12))
  interval = evaluation.over_episodes(one)
  low, high = scipy.stats.t.interval(
    0.95, 11, loc=one.mean(), scale=scipy.stats.sem(one[0])
  )
  assert interval.mean == pytest.approx(one.mean())
  assert interval.half_width == pytest.approx((high - low) / 2)
  distant = np.array([[1.0, 3.0], [101.0, 103.0], [201.0, 203.0]])
  interval = evaluation.over_episodes(distant)
  # A variance of 2 in each seed, 6 episodes, 3 degrees of freedom.
  expected = scipy.stats.t.ppf(0.975, 3) * np.sqrt(2 / 6)
  assert interval.half_width == pytest.approx(expected)
  assert np.isnan(evaluation.over_episodes(np.ones((2, 1))).half_width)
  distant[0, 0] = np.nan
  interval = evaluation.over_episodes(distant)
  assert np.isnan(interval.mean) and (interval.count, interval.total) == (5, 6)


class Lives:
  """Three lives of two actions; each action scores 1, and 10 at the end."""

  def reset(self):
    self.left = getattr(self, 'left', 0) or 3
    self.time = 0
    return self.time

  def step(self, action):
    self.time += 1
    died = self.time == 2
    self.left -= died
    over = self.left == 0
    score = 1.0 + 10 * over
    return games.Step(self.time, 0.0, died, False, score, over)


def test_a_game_is_played_with_all_its_lives():
  game = Lives()
  for _ in range(2):
    assert evaluation.play_game(game, lambda x: 0) == (16.0, 6)


def test_a_known_policy_holds_the_pole_up():
  """Linear feedback balances for 500 steps; constant pushes do not."""
  game = games.make('CartPole', np.random.default_rng(0))
  weights = np.array([0.1, 0.3, 3.0, 1.0])
  feedback = lambda x: int(x @ weights > 0)
  assert evaluation.play_game(game, feedback) == (500.0, 500)
  score, length = evaluation.play_game(game, lambda x: 1)
  assert score == length < 15
