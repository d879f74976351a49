"""The synthetic experiment, small: claim, results and variants."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import harness
from experiments.aipod import synthetic, synthetic_report

SETTINGS = synthetic.Settings(
  size=20,
  probabilities=(0.3,),
  relaxations=(),
  steps=400,
  cap=800,
  uniform_steps=0,
  chunk=20,
)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('synthetic')
  options = harness.Options(
    paper='aipod',
    binary='synthetic',
    preset='quick',
    settings=SETTINGS,
    workdir=str(workdir),
    data_dir=None,
    seeds=(0, 1, 2),
  )
  report = harness.execute(synthetic.main, options)
  return workdir, report.results.metrics()


@pytest.mark.slow
def test_saves_projections_and_stays_in_the_upper_set(finished):
  _, metrics = finished
  assert metrics['projections_ratio/e_aipod/p0.3/t1'] < 0.8
  assert metrics['projections_ratio/e_aipod/p0.3/t2'] < 0.5
  assert metrics['outside/aipod'] < 1e-5
  assert metrics['outside/e_aipod/p0.3/t2'] < 1e-5
  assert metrics['released_gradient_error/uniform'] > 0.3


def test_stores_ratios_by_seed_where_all_seeds_reach_the_target(finished):
  workdir, metrics = finished
  name = 'projections_ratio/e_aipod/p0.3/t2'
  content = json.loads((workdir / 'results.json').read_text())
  assert content['metrics']['seeds_reaching/e_aipod/p0.3/t2'] == 3
  values = content['per_seed'][name]
  np.testing.assert_allclose(np.mean(values), metrics[name], rtol=1e-6)
  assert metrics[f'{name}/half_width'] > 0


@pytest.mark.slow
def test_writes_results_and_plots(finished):
  workdir, metrics = finished
  results = json.loads((workdir / 'results.json').read_text())['metrics']
  assert set(results) == set(metrics)
  for name in ('projections', 'upper_steps'):
    assert (workdir / f'{name}.png').stat().st_size > 5000
  assert 'e_aipod/p0.3/t2' in (workdir / 'table.md').read_text()


def test_cost_to_a_target_by_hand():
  history = {
    'average': np.array([[3.0, 3.0], [1.0, 2.5], [0.5, 2.1]]),
    'count/projections/lower': np.array([[1, 1], [2, 2], [3, 3]]),
    'count/projections/upper': np.array([[10, 10], [20, 20], [30, 30]]),
  }
  trained = harness.Trained(
    None, None, (), 30, np.array([10, 20, 30]), history, (), 0.0, 0.0
  )
  reached = synthetic_report.reach(trained, np.array([1.0, 2.0]), 2)
  assert reached.projections.tolist() == [22.0, np.inf]
  assert reached.upper_steps.tolist() == [40.0, np.inf]


def test_every_variant_has_its_own_name():
  names = [v.name for v in synthetic.variants(synthetic.PRESETS['paper'])]
  assert len(names) == len(set(names))
  fields = {f.name for f in dataclasses.fields(SETTINGS)}
  assert set(synthetic.SWEEP_SETTINGS) < fields
