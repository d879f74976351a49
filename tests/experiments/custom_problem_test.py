"""The example of one's own problem: it converges, and leaves its results."""

import json

import pytest

from experiments import custom_problem, harness


@pytest.fixture
def options(tmp_path):
  return harness.Options(
    paper='custom',
    binary='problem',
    preset='quick',
    settings=custom_problem.Settings(steps=500),
    workdir=str(tmp_path),
    data_dir=None,
    seeds=(0, 1),
  )


def test_converges_and_writes_its_results(options, tmp_path, capsys):
  trained = custom_problem.main(options)
  assert trained.history['distance'][0].min() > 0.1
  assert trained.history['distance'][-1].max() < 0.1
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['metrics']['distance'] < 0.1
  assert (tmp_path / 'distance.png').stat().st_size > 5000
  assert 'V-PBGD' in capsys.readouterr().out
  again = custom_problem.main(options)  # Resumes: there is nothing left to do.
  assert (again.step, again.seconds) == (500, trained.seconds)
