"""Metrics under the names of TRL, and runs of Weights & Biases."""

import json
import sys
import types

import numpy as np
import pytest

from experiments import harness
from experiments.lm import trackers

METRICS = {
  'loss/sft': [2.0, 4.0],
  'loss/dpo': [np.nan, np.nan],
  'held_out/sft': [1.0, 3.0],
  'held_out/dpo': [0.5, 0.7],
  'held_out/accuracy': [0.25, 0.75],
  'held_out/rewards/margins': [-1.0, 0.0],
  'count/gradients/sft': [3, 3],
}


def test_names_are_those_of_trl():
  weights = {'sft': 0.75, 'dpo': 0.25}
  renamed = trackers.rename(30, METRICS, weights, lambda step: step / 10)
  assert renamed == pytest.approx(
    {
      'train/global_step': 30,
      'train/learning_rate': 3.0,
      # Comparisons were not evaluated.
      'train/loss': 3.0,
      'train/loss/sft': 3.0,
      'eval/loss': 0.75 * 2.0 + 0.25 * 0.6,
      'eval/loss/sft': 2.0,
      'eval/loss/dpo': 0.6,
      'eval/rewards/accuracies': 0.5,
      'eval/rewards/margins': -0.5,
    }
  )
  one = trackers.rename(0, METRICS, {'dpo': 1.0}, lambda step: 0.5)
  assert 'train/loss' not in one and 'eval/loss/dpo' not in one
  assert one['eval/loss'] == pytest.approx(0.6)


def test_records_are_lines(tmp_path):
  history = {'held_out/sft': np.array([[1.0], [np.nan]])}
  rename = lambda step, metrics: trackers.rename(
    step, metrics, {'sft': 1.0}, lambda step: 0.1
  )
  trackers.write(tmp_path / 'a.jsonl', np.array([0, 5]), history, rename)
  first, second = (tmp_path / 'a.jsonl').read_text().splitlines()
  rate = {'train/learning_rate': 0.1}
  assert json.loads(first) == {'train/global_step': 0, 'eval/loss': 1.0} | rate
  assert json.loads(second) == {'train/global_step': 5} | rate


class _Run:
  def __init__(self, **options):
    self.options, self.logged, self.steps = options, [], {}
    self.is_finished = False

  def define_metric(self, name, step_metric=None):
    self.steps[name] = step_metric

  def log(self, metrics):
    self.logged.append(metrics)

  def finish(self):
    self.is_finished = True


def test_wandb_gets_one_run_per_folder(tmp_path, monkeypatch):
  runs = []

  def init(**options):
    runs.append(_Run(**options))
    return runs[-1]

  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
  for folder in ('a', 'a', 'b'):
    with (
      pytest.raises(ZeroDivisionError),
      trackers.open_wandb('p', tmp_path / folder, 'mix', {'steps': 4}) as log,
    ):
      log({'train/loss': 1.0})
      1 / 0  # noqa: B018
  first, again, other = runs
  assert first.options['id'] == again.options['id'] != other.options['id']
  assert first.options['project'] == 'p' and first.options['config']
  assert first.options['resume'] == 'allow'
  assert first.steps['*'] == 'train/global_step'
  assert first.logged == [{'train/loss': 1.0}] and first.is_finished
  with trackers.open_wandb('', tmp_path, 'mix', {}) as log:
    assert log is None
  assert len(runs) == 3


def test_wandb_is_needed_on_request_only(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with (
    pytest.raises(
      harness.SettingsError, match=r'--wandb=p needs .*pip install'
    ),
    trackers.open_wandb('p', tmp_path, 'mix', {}),
  ):
    pass
