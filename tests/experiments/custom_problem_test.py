"""The example to copy: it finds the wrong labels, resumes, and evaluates."""

import re

import pytest

from experiments import custom_problem, harness


@pytest.mark.slow
def test_finds_wrong_labels_and_goes_on(options, results, tmp_path, capsys):
  settings = custom_problem.Settings(steps=100)
  harness.execute(custom_problem.main, options(settings))
  assert '| v_pbgd |' in capsys.readouterr().out
  assert (tmp_path / 'accuracy.png').stat().st_size > 5_000
  first = results()
  harness.execute(custom_problem.main, options(settings))
  assert results()['metrics'] == first['metrics']
  assert results()['wall_seconds'] > first['wall_seconds']  # Of both.
  custom_problem.evaluate(options(settings))
  printed = capsys.readouterr().out.splitlines()[-1]
  share = re.match(r'step 100: (\d+)% of the 240 lowest weights', printed)
  # Made longer, it goes on.
  longer = options(custom_problem.Settings(steps=120))
  harness.execute(custom_problem.main, longer)
  custom_problem.evaluate(options(settings))
  assert 'step 120: ' in capsys.readouterr().out
  # By chance 40 %.
  assert int(share[1]) > 60
  assert first['metrics']['accuracy/v_pbgd'] > 0.8
  # A claim is shown by the whole interval.
  assert first['metrics']['accuracy/v_pbgd/half_width'] > 0


@pytest.mark.parametrize('steps', [5])
def test_any_number_of_steps(options, results, steps):
  few = options(custom_problem.Settings(steps=steps), seeds=(0,))
  harness.execute(custom_problem.main, few)
  assert 0 < results()['metrics']['accuracy/v_pbgd'] < 1


def test_a_study_has_the_names_of_its_module():
  study = custom_problem.STUDY
  assert (study.paper, study.binary) == ('experiments', 'custom_problem')
