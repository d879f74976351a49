"""Sweep over polluted fractions, on few digits and few steps."""

import dataclasses
import json

import pytest

from experiments import harness
from experiments.pbgd import hyper_cleaning, pollution


def options(workdir, **changes):
  settings = dataclasses.replace(
    pollution.PRESETS['quick'],
    methods=changes.pop('methods', ('v_pbgd', 'noisy_train')),
    steps=changes.pop('steps', 40),
    chunk=20,
    digits=hyper_cleaning.Digits(300, 200, 100, 200),
    **{
      'fractions': (0.2, 0.8),
      'seeds': 2,
      'grid': hyper_cleaning.Grid(scales=(3.0,), steps=20),
    }
    | changes,
  )
  return harness.Options(
    'pbgd', 'pollution', 'quick', settings, str(workdir), None, (0, 1)
  )


@pytest.mark.slow
def test_more_noise_is_harder(tmp_path):
  harness.execute(pollution.main, options(tmp_path))
  metrics = json.loads((tmp_path / 'results.json').read_text())['metrics']
  for metric in ('f1/v_pbgd', 'test_accuracy/noisy_train'):
    easy, hard = (metrics[f'{metric}/polluted={p}'] for p in (0.2, 0.8))
    assert easy > hard
  assert (tmp_path / 'polluted.png').exists()


def test_with_few_clean_digits_the_other_ones_do_not_count(tmp_path):
  changes = {'methods': ('val_only',), 'steps': 100, 'over': 'clean'}
  changes['clean'] = (20, 200)
  few = options(tmp_path / 'sweep', **changes)
  harness.execute(pollution.main, few)
  metrics = json.loads((tmp_path / 'sweep/results.json').read_text())['metrics']
  assert metrics['test_accuracy/val_only/clean=200'] > (
    metrics['test_accuracy/val_only/clean=20'] + 0.1
  )
  with pytest.raises(harness.SettingsError, match='201 clean digits'):
    pollution.check(dataclasses.replace(few.settings, clean=(20, 201)))


@pytest.mark.slow
def test_results_have_the_tuning_of_each_method(tmp_path):
  methods = ('v_pbgd', 'val_only', 'both', 'agreement')
  given = options(
    tmp_path,
    methods=methods,
    steps=20,
    grid=hyper_cleaning.Grid((3.0, 10.0), 20, max_grid_extensions=0),
  )
  harness.execute(pollution.main, given)
  metrics = json.loads((tmp_path / 'results.json').read_text())['metrics']
  for place in ('polluted=0.2', 'polluted=0.8'):
    number = lambda name, place=place: metrics[f'{name}/{place}']
    for method in ('v_pbgd', 'val_only'):
      assert number(f'scale/{method}') in (3, 10)
      assert number(f'trials/{method}') == 2
      assert number(f'edges/{method}') == 1  # Both values are at an edge.
    for method in ('v_pbgd', 'agreement'):
      assert number(f'retrained_scale/{method}') in (3, 10)
      assert number(f'retrained_trials/{method}') == 2
      assert number(f'retrained_edges/{method}') == 1
      assert 0 < number(f'f1/{method}') < 1
      assert 0 < number(f'retrained_accuracy/{method}') < 1
    assert number('trials/both') == 6  # Two step sizes times three weights.
    assert number('weight/both') in (0.1, 0.3, 1)
    assert 0 < number('test_accuracy/both') < 1
    assert 'test_accuracy/agreement/' + place not in metrics


def test_fractions_are_below_one(tmp_path):
  settings = dataclasses.replace(
    options(tmp_path).settings, fractions=(0.5, 1.0)
  )
  with pytest.raises(harness.SettingsError, match=r'between 0 and 1, got 1\.0'):
    pollution.check(settings)
