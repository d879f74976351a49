"""The federated experiment, small: results, devices, errors."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.aipod import (
  client_digits,
  federated,
  federated_compare,
  federated_run,
)
from experiments.harness.app import flags as flags_lib
from experiments.harness.study import comparison

SETTINGS = federated.PRESETS['smoke']


@pytest.mark.slow
@pytest.mark.parametrize(
  'task',
  [
    'hyper_representation',
    pytest.param('loss_tuning', marks=pytest.mark.nightly),
  ],
)
def test_runs_and_writes_its_results(options, results, tmp_path, task):
  ratio = 10.0 if task == 'loss_tuning' else 1.0
  split = dataclasses.replace(SETTINGS.digits, ratio=ratio)
  settings = dataclasses.replace(SETTINGS, task=task, digits=split)
  harness.execute(federated.main, options(settings))
  stored = results()
  metrics = stored['metrics']
  # The design of the grids and the tuning use other seeds.
  assert stored['seeds'] == [10, 11]
  assert not set(stored['tuning_seeds']) & {10, 11}
  selected = lambda measure, method: metrics[f'{measure}/{method}/selected']
  rounds = lambda method: selected('rounds_to_40', method)
  ratio = rounds('e_aipod') / rounds('fednest')
  assert metrics['rounds_to_40_ratio'] == pytest.approx(ratio)
  assert metrics['rounds_to_40_ratio/partial'] > 0
  assert selected('best_accuracy', 'e_aipod') > 0.3
  assert len(stored['per_seed']['best_accuracy/e_aipod/s5']) == 2
  assert selected('lower_steps', 'e_aipod') == 5
  assert selected('local_steps', 'fednest') == 5
  assert selected('looks', 'fednest') == 1
  assert (tmp_path / 'rounds.png').stat().st_size > 5000


@pytest.mark.slow  # clients_test.py has a quick one on quadratics.
def test_devices_give_the_same_iterates():
  digits, _ = client_digits.load_digits(
    None,
    client_digits.Split(clients=8, pooling=4, selection=50, test=50),
  )
  hyper = {'upper_rate': 0.4, 'lower_rate': 0.1, 'projection_key': 0}
  federation = federated_run.make_federation(SETTINGS, digits)
  one = federation.task.init(jax.random.key(0), 49)
  params = jax.tree.map(lambda z: np.stack([z] * 8), one)
  batch = client_digits.draw_batch(jax.random.key(1), digits, 32, 5)
  ends = []
  for devices in (1, 8):
    method = federated_compare.methods(SETTINGS)['e_aipod/s5']
    solver = federated_run.make_solver(
      method, federation._replace(devices=devices), hyper
    )
    step, state, now = jax.jit(solver.update), solver.init(params), params
    for _ in range(3):
      updates, state = jax.block_until_ready(step(batch, state, now))
      now = jax.tree.map(lambda a, b: np.asarray(a + b), now, updates)
    ends.append(now)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)


def history(rounds, accuracy):
  return {
    'rounds': np.array(rounds),
    'test_accuracy': np.array(accuracy),
    'selection_accuracy': np.array(accuracy),
  }


def test_rounds_until_an_accuracy_by_hand():
  found = history(
    [[9, 9, 9], [18, 20, 20], [27, 30, np.nan]],
    [[0.1, 0.1, 0.1], [0.8, 0.2, 0.9], [0.7, 0.3, np.nan]],
  )
  rounds = federated_run.rounds_to(found, 0.75)
  # The third seed stops after it reached the goal.
  assert rounds.tolist() == [18.0, np.inf, 20.0]
  # The second seed misses the goal: -40 (2 - 0.3).
  np.testing.assert_allclose(
    federated_run.scores(found, 0.75, 40), [-18, -68, -20], atol=2e-3
  )


@pytest.mark.parametrize(
  ('rounds', 'accuracy', 'known'),
  [
    # Two points with two seeds each; the last seed has spent as many rounds.
    ([20, 20, 20, 20], [0.8, 0.8, 0.8, 0.2], True),
    ([20, 24, 20, 23], [0.8, 0.8, 0.8, 0.2], False),
    ([20, 20, 20, 20], [0.8, 0.2, 0.8, 0.2], False),
    # A stopped seed never reaches the goal.
    ([20, 24, 20, np.nan], [0.8, 0.8, 0.8, np.nan], True),
  ],
)
def test_tuning_ends_when_the_best_point_is_known(rounds, accuracy, known):
  found = history([[9] * 4, rounds], [[0.1] * 4, accuracy])
  assert federated_run.decided(found, 0.75, 2) == known


def test_goals_reached_before_all_seeds_stop_count(monkeypatch):
  federation = federated_run.Federation(None, 8, 32, 5)
  history = {
    'rounds': np.array([[9.0], [np.nan]]),
    'test_accuracy': np.array([[0.8], [np.nan]]),
  }

  def stop(*unused_args, **unused_keywords):
    error = harness.AllStoppedError('all stopped')
    error.trained = harness.Trained(
      (), (), (), 2, np.arange(2), history, (), 0.0, 0.0
    )
    raise error

  monkeypatch.setattr(harness, 'train', stop)
  options = harness.Options('aipod', 'b', 'quick', None, None, None, (0,))
  job = comparison.Job('one', False, {}, (0,), 'one', {}, options)
  trained = federated_run.train(
    federated_run.Method(lower_steps=5, probability=0.4),
    federation,
    client_digits.Digits((), (), (), ()),
    job,
    rounds=60,
  )
  assert federated_run.rounds_to(trained.history, 0.75).tolist() == [9.0]


def test_ratio_if_a_method_misses_the_goal():
  assert federated_compare.rounds_ratio(4.0, 5.0, 40) == 0.8
  # The baseline needs at least the limit.
  assert federated_compare.rounds_ratio(4.0, np.inf, 40) == 0.1
  assert np.isnan(federated_compare.rounds_ratio(np.inf, 5.0, 40))
  assert np.isnan(federated_compare.rounds_ratio(np.inf, np.inf, 40))


def test_rounds_of_an_update():
  settings = dataclasses.replace(
    federated.PRESETS['paper'], lower_steps=(20, 60)
  )
  found = federated_compare.methods(settings)
  assert [
    federated_run.rounds_per_update(m, settings.products)
    for m in found.values()
  ] == [9, 13, 10, 10, 10, 18, 18, 18]
  part = found['e_aipod/s20']._replace(taking_part=10)
  assert federated_run.rounds_per_update(part, settings.products) == 10


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'taking_part': 9}, 'from 0'),
    ({'devices': 3, 'taking_part': 0}, 'do not divide'),
    ({'devices': 2, 'taking_part': 2}, 'several devices'),
  ],
)
def test_invalid_settings(changes, match):
  with pytest.raises(ValueError, match=match):
    federated.check(dataclasses.replace(SETTINGS, **changes))


def test_former_flags_work():
  of = lambda *texts: flags_lib.settings_by(
    federated.PRESETS, 'quick', texts, federated.RENAMED
  )
  old = '--tuning_rounds=9', '--fednest_rounds=1', '--grid.widen=1'
  new = '--grid.rounds=9', '--fednest.rounds=1', '--max_grid_extensions=1'
  assert of(*old) == of(*new) != of()
