"""Multi-task reinforcement learning: settings, and a small run."""

import dataclasses
import sys

import pytest

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.moco import compare, multi_task_rl
from experiments.rl import mt10, multi_task

GAMES = ('Breakout', 'Asterix')


def test_invalid_tasks_of_mt10():
  pytest.importorskip('metaworld', reason='needs the extra mt10: metaworld')
  check, make = multi_task_rl.check, multi_task_rl.Settings
  for settings, message in (
    (make(suite='mt10', games=('reach',)), 'did you mean reach-v3'),
    (
      make(suite='mt10', games=(), learning=multi_task.Learning(rollout=501)),
      'at most 500 steps',
    ),
  ):
    with pytest.raises(harness.SettingsError, match=message):
      check(settings)


def test_cut_episodes_are_reported():
  """Results, and so the captions of tables, name the cut."""
  preset = multi_task_rl.PRESETS['mt10']
  assert '150 of 500 steps' in multi_task_rl.substitution(preset)
  full = dataclasses.replace(
    preset, learning=multi_task.Learning(rollout=mt10.LONGEST)
  )
  assert 'steps' not in multi_task_rl.substitution(full)


def test_mt10_needs_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'metaworld', None)
  with pytest.raises(harness.SettingsError, match='needs the extra `mt10`'):
    multi_task_rl.check(multi_task_rl.PRESETS['mt10'])


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
