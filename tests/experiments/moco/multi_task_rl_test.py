"""Several games, one policy: what is shared, what is masked, a small run."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.moco import minatar, multi_task_rl

GAMES = ('Breakout', 'Asterix')


@pytest.fixture(scope='module')
def model():
  return minatar.make_model(minatar.make_games(GAMES))


def test_games_look_alike(model):
  games = minatar.make_games((*GAMES, 'SpaceInvaders'))
  assert games.shape == (10, 10, 6) and games.actions == 5
  assert games.allowed.sum(axis=1).tolist() == [3, 5, 4]
  params = model.init(jax.random.key(0))
  observations = jnp.ones([4, 10, 10, 4])
  logits, values = model.outputs(params, observations, 0)
  assert values.shape == (4,) and (logits[:, 3:] < -1e8).all()
  # The policy never draws what the game does not have.
  family = bj.rl.categorical()
  drawn = family.sample(jax.random.key(1), jnp.tile(logits[:1], (500, 1)))
  assert set(drawn.tolist()) == {0, 1, 2}
  np.testing.assert_allclose(
    family.entropy(logits), family.entropy(logits[:, :3]), rtol=1e-6
  )


def test_rows_are_those_of_each_game_alone(model):
  """Of the mean of two games: the sum of halves; heads get their own sum."""
  learning = minatar.Learning(environments=2, rollout=3)
  params, key = model.init(jax.random.key(0)), jax.random.key(3)
  both = minatar.make_oracle(model, bj.aggregators.mean(2), learning, key=key)
  state = both.init(params)
  found, after = jax.jit(both.update)(None, state, params)
  halves = []
  for game in (0, 1):
    one = minatar.make_oracle(
      model, bj.aggregators.mean(1), learning, key=key, games=[game]
    )
    mine = one.init(params)
    # The same environments, so that the rollout is the same.
    inner = ((state.inner[0][game],), mine.inner[1])
    halves.append(
      jax.jit(one.update)(None, mine._replace(inner=inner), params)[0]
    )
  half = lambda a, b: (a + b) / 2
  chex.assert_trees_all_close(
    found.trunk, jax.tree.map(half, *(h.trunk for h in halves)), atol=1e-5
  )
  heads = jax.tree.map(jnp.add, *(h.heads for h in halves))
  chex.assert_trees_all_close(found.heads, heads, atol=1e-5)
  assert bj.counts(after)['steps/environment'] == 2 * 2 * 3
  assert len(bj.outputs(after)['episodes']) == 2


@pytest.mark.slow
def test_a_small_run(options, results):
  settings = multi_task_rl.PRESETS['smoke']
  multi_task_rl.main(options(settings))
  metrics = results()['metrics']
  for game in GAMES:
    assert metrics[f'single/{game}'] >= 0 and metrics[f'moco/{game}'] >= 0
  assert metrics['mean/trials'] == 1


def test_bad_settings():
  check, make = multi_task_rl.check, multi_task_rl.Settings
  for settings, message in (
    (make(games=('Breakuot',)), 'did you mean Breakout-MinAtar'),
    (make(methods=('modo',)), r"unknown methods \['modo'\]"),
    (make(rates=(0.1, 0.2)), 'rates are 3 times as many'),
  ):
    with pytest.raises(harness.SettingsError, match=message):
      check(settings)
  check(multi_task_rl.PRESETS['smoke'])
  check(multi_task_rl.PRESETS['paper'])
