"""One policy for several tasks: shared and masked outputs, played tasks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments.rl import minatar, mt10, multi_task

GAMES = ('Breakout', 'Asterix')


@pytest.fixture(scope='module')
def model():
  return multi_task.make_model(minatar.make_tasks(GAMES))


def test_games_look_alike(model):
  games = minatar.make_tasks((*GAMES, 'SpaceInvaders'))
  assert games.shape == (10, 10, 6) and games.actions == 5
  assert games.allowed.sum(axis=1).tolist() == [3, 5, 4]
  params = model.init(jax.random.key(0))
  observations = jnp.ones([4, 10, 10, 4])
  logits, values = model.outputs(params, observations, 0)
  assert values.shape == (4,) and (logits[:, 3:] < -1e8).all()
  # The policy never draws actions that the game does not have.
  family = bj.rl.categorical()
  drawn = family.sample(jax.random.key(1), jnp.tile(logits[:1], (500, 1)))
  assert set(drawn.tolist()) == {0, 1, 2}
  np.testing.assert_allclose(
    family.entropy(logits), family.entropy(logits[:, :3]), rtol=1e-6
  )


@pytest.mark.slow
def test_gradients_of_both_games_are_those_of_each_game(model):
  """The trunk gets the mean over games, the heads the sum."""
  learning = multi_task.Learning(environments=2, rollout=3)
  params, key = model.init(jax.random.key(0)), jax.random.key(3)
  both = multi_task.make_oracle(
    model, bj.aggregators.mean(2), learning, key=key
  )
  state = both.init(params)
  gradients, after = jax.jit(both.update)(None, state, params)
  halves = []
  for game in (0, 1):
    one = multi_task.make_oracle(
      model, bj.aggregators.mean(1), learning, key=key, played=[game]
    )
    start = one.init(params)
    # The same environments give the same rollout.
    inner = ((state.inner[0][game],), start.inner[1])
    halves.append(
      jax.jit(one.update)(None, start._replace(inner=inner), params)[0]
    )
  half = lambda a, b: (a + b) / 2
  chex.assert_trees_all_close(
    gradients.trunk, jax.tree.map(half, *(h.trunk for h in halves)), atol=1e-5
  )
  heads = jax.tree.map(jnp.add, *(h.heads for h in halves))
  chex.assert_trees_all_close(gradients.heads, heads, atol=1e-5)
  assert bj.counts(after)['steps/environment'] == 2 * 2 * 3
  assert len(bj.outputs(after)['episodes']) == 2


@pytest.fixture(scope='module')
def robots():
  metaworld = pytest.importorskip(
    'metaworld', reason='needs the extra mt10: metaworld'
  )
  names = ('reach-v3', 'drawer-close-v3')
  return metaworld, multi_task.make_model(mt10.make_tasks(names))


def test_a_robots_policy_is_the_model(robots):
  _, model = robots
  params = model.init(jax.random.key(0))
  spread = jax.random.normal(jax.random.key(1), (2, 4))
  params.heads['log_deviation'] = spread
  params = jax.tree.map(lambda x: x + 0.1, params)
  observations = jax.random.normal(jax.random.key(2), (3, 39))
  for task in (0, 1):
    (means, spreads), _ = model.outputs(params, observations, task)
    for one, mean, log_deviation in zip(
      observations, means, spreads, strict=True
    ):
      plain = jax.tree.map(np.asarray, params)
      numpy_mean, deviation = mt10.policy(plain, np.asarray(one), task)
      np.testing.assert_allclose(numpy_mean, mean, rtol=2e-5, atol=2e-5)
      np.testing.assert_allclose(deviation, np.exp(log_deviation), rtol=1e-6)


@pytest.mark.slow
def test_rollouts_agree_with_a_new_simulator(robots):
  """A rollout depends on the parameters and the key only."""
  metaworld, model = robots
  learning = multi_task.Learning(environments=2, rollout=4, window=3)
  collector = model.tasks.collector(model, [0, 1], learning)
  params = model.init(jax.random.key(0))
  state = collector.init(jax.random.key(1))
  collect = jax.jit(collector.collect)
  rollout, after = collect(params, state)
  assert rollout.actions.shape == (2, 4, 2, 4)
  assert rollout.truncated[:, -1].all() and not rollout.truncated[:, :-1].any()
  assert not rollout.terminated.any()
  chex.assert_trees_all_equal(
    rollout.observations[:, 1:], rollout.next_observations[:, :-1]
  )
  later, _ = collect(params, after)
  assert (later.actions != rollout.actions).any()
  again, _ = collect(params, state)
  chex.assert_trees_all_equal(again, rollout)
  for i, each in enumerate(collector.episodes(after)):
    assert each.count == 2 and np.isnan(each.returns[0])
    total = rollout.rewards[i].sum(axis=0)
    np.testing.assert_allclose(each.returns[1:], total, rtol=1e-5)
    measures = model.tasks.measure(each)
    np.testing.assert_allclose(measures['return'], total.mean(), rtol=1e-5)
    assert 0 <= measures['success'] <= 1
  benchmark = metaworld.MT10(seed=0)
  for i, name in enumerate(model.tasks.names):
    simulator = benchmark.train_classes[name]()
    first = np.asarray(rollout.observations[i, 0, 0])
    for variant in benchmark.train_tasks:
      if variant.env_name != name:
        continue
      simulator.set_task(variant)
      start, _ = simulator.reset()
      if np.allclose(start, first, atol=1e-6):
        break
    else:
      pytest.fail(f'no variant of {name} has the first observation')
    for step in range(4):
      action = np.clip(rollout.actions[i, step, 0], -1, 1)
      observation, reward, *_ = simulator.step(action)
      expected = rollout.next_observations[i, step, 0]
      np.testing.assert_allclose(observation, expected, atol=1e-5)
      np.testing.assert_allclose(reward, rollout.rewards[i, step, 0], rtol=1e-4)
