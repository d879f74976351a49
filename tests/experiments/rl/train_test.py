"""Training by PPO and the actor-critic: resumption, evaluation, refusals."""

import dataclasses
import json

import chex
import numpy as np
import pytest

from experiments import harness
from experiments.rl import evaluation, on_policy, train

SETTINGS = train.Settings(
  frames=512,
  records=4,
  record_episodes=2,
  evaluation=evaluation.Settings(episodes=3),
  learning=on_policy.Learning(environments=4, rollout=16),
)


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {'normalise_observations': True, 'normalise_rewards': True},
    {'recurrent_units': 4},
  ],
)
def test_a_resumed_run_is_equal_to_the_bit(
  options, tmp_path, monkeypatch, changes
):
  learning = dataclasses.replace(SETTINGS.learning, **changes)
  settings = dataclasses.replace(SETTINGS, learning=learning)
  given = options(settings, paper='rl', binary='train')
  full = train.train(given, 'ppo')
  other = given._replace(workdir=str(tmp_path / 'other'))
  original = harness.train

  def half(*arguments):
    *arguments, measure = arguments
    stop = lambda history: len(history['greedy_return']) >= 2
    return original(*arguments, measure._replace(stop_when=stop))

  with monkeypatch.context() as patch:
    patch.setattr(harness, 'train', half)
    assert train.train(other, 'ppo').step == 4
  resumed = train.train(other, 'ppo')
  assert resumed.step == full.step == 8
  chex.assert_trees_all_equal(resumed.params, full.params)
  for name in ('greedy_return', 'sampled_return', 'training_return'):
    np.testing.assert_array_equal(resumed.history[name], full.history[name])


@pytest.mark.slow
def test_results_of_both_algorithms(options, results, tmp_path):
  given = options(SETTINGS, paper='rl', binary='train')
  harness.execute(train.main, given)
  metrics = results()['metrics']
  for algorithm in train.ALGORITHMS:
    assert metrics[f'greedy_return/{algorithm}'] > 5
    assert metrics[f'frames_per_second/{algorithm}'] > 0
    assert metrics[f'solved_share/{algorithm}'] == 0
  assert len(results()['per_seed']['greedy_return/ppo']) == 2
  assert (tmp_path / 'return.png').exists()
  harness.execute(train.evaluate, given)
  path = tmp_path / 'evaluation' / 'greedy' / 'results.json'
  evaluated = json.loads(path.read_text())['metrics']
  assert evaluated['evaluation_return'] == metrics['greedy_return/ppo']


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
  ('env', 'bound'), [('CartPole-v1', 475), ('Acrobot-v1', -100)]
)
def test_settings_of_purejaxrl_learn(options, env, bound):
  """The published settings reach what their curves reach."""
  settings = dataclasses.replace(train.PRESETS['published'], env=env)
  given = options(settings, paper='rl', binary='train')
  history = train.train(given, 'ppo').history
  assert (history['training_return'][-1] >= bound).all()


def test_frames_to_solve():
  returns = np.array([[1, 9, 1], [9, 1, 2], [9, 9, 3]])
  np.testing.assert_array_equal(
    train.frames_to_solve([10, 20, 30], returns, 5), [20, 10, np.nan]
  )


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'recurrent_units': 4}, 'a recurrent policy needs --algorithm=ppo'),
    ({'environments': 3, 'rollout': 5}, 'does not divide the 15 steps'),
    (
      {'recurrent_units': 4, 'normalise_observations': True},
      'does not support --learning.normalise_observations: set that to False',
    ),
  ],
)
def test_settings_that_do_not_fit(changes, match):
  learning = dataclasses.replace(SETTINGS.learning, **changes)
  settings = dataclasses.replace(SETTINGS, learning=learning)
  if 'normalise_observations' in changes:
    settings = dataclasses.replace(settings, algorithm=('ppo',))
  with pytest.raises(harness.SettingsError, match=match):
    train.check(settings)


def test_too_few_frames_for_an_update():
  settings = dataclasses.replace(SETTINGS, frames=10)
  with pytest.raises(harness.SettingsError, match='frames=10 is less than one'):
    train.check(settings)
