"""Multi-task reinforcement learning: settings, and a small run."""

import pytest

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.moco import compare, multi_task_rl

GAMES = ('Breakout', 'Asterix')


@pytest.mark.slow
def test_a_small_run(options, results):
  settings = multi_task_rl.PRESETS['smoke']
  harness.execute(multi_task_rl.main, options(settings))
  metrics = results()['metrics']
  for game in GAMES:
    assert metrics[f'return/single_task/{game}'] >= 0
    assert metrics[f'return/moco/{game}'] >= 0
  assert metrics['trials/mean'] == 1


def test_invalid_settings():
  check, make = multi_task_rl.check, multi_task_rl.Settings
  for settings, message in (
    (make(games=('Breakuot',)), 'did you mean Breakout-MinAtar'),
    (make(methods=('modo',)), 'methods knows mean, '),
    (
      make(grid=compare.Grid((0.1, 0.2), (0.1,))),
      'rates must be 3 times as many',
    ),
  ):
    with pytest.raises(harness.SettingsError, match=message):
      settings_lib.check(settings)
      check(settings)
  check(multi_task_rl.PRESETS['smoke'])
  check(multi_task_rl.PRESETS['paper'])
