"""The federated experiment, small: results, devices, errors."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.aipod import client_digits, federated

SETTINGS = federated.PRESETS['smoke']


@pytest.mark.parametrize(
  'task',
  [
    'hyper_representation',
    pytest.param('loss_tuning', marks=pytest.mark.slow),
  ],
)
def test_runs_and_writes_its_results(options, results, tmp_path, task):
  ratio = 10.0 if task == 'loss_tuning' else 1.0
  settings = dataclasses.replace(SETTINGS, task=task, ratio=ratio)
  metrics = federated.main(options(settings))
  written = results()['metrics']
  assert set(written) == set(metrics)
  assert 'rounds_to_40_ratio' in written
  assert metrics['e_aipod/best_accuracy'] > 0.3
  assert metrics['fednest/best_tau'] == 5
  assert (tmp_path / 'rounds.png').stat().st_size > 5000


@pytest.mark.slow  # A quadratic does it in clients_test.py.
def test_devices_give_the_same_iterates():
  digits, _ = client_digits.load_digits(
    None, clients=8, shards=2, pooling=4, selection=50, test=50, ratio=1.0
  )
  task = federated.make_task(SETTINGS, digits)
  hyper = {'upper': 0.4, 'lower': 0.1, 'coin': 0}
  one = task.init(jax.random.key(0), 49)
  params = jax.tree.map(lambda z: np.stack([z] * 8), one)
  batch = client_digits.draw_batch(jax.random.key(1), digits, 32, 5)
  ends = []
  for devices in (1, 8):
    settings = dataclasses.replace(SETTINGS, devices=devices)
    method = federated.methods(settings)[0]
    solver = federated.make_solver(method, settings, task, hyper)
    step, state, now = jax.jit(solver.update), solver.init(params), params
    for _ in range(3):
      updates, state = jax.block_until_ready(step(batch, state, now))
      now = jax.tree.map(lambda a, b: np.asarray(a + b), now, updates)
    ends.append(now)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)


def test_rounds_until_an_accuracy_by_hand():
  history = {
    'rounds': np.array([[9, 9], [18, 20], [27, 30]]),
    'test_accuracy': np.array([[0.1, 0.1], [0.8, 0.2], [0.7, 0.3]]),
  }
  trained = harness.Trained(
    None, None, (), 3, np.arange(3), history, (), 0.0, 0.0
  )
  assert federated.rounds_to(trained, 0.75).tolist() == [18.0, np.inf]


def test_a_ratio_where_somebody_does_not_get_there():
  assert federated.quotient(4.0, 5.0) == 0.8
  assert federated.quotient(4.0, np.inf) == 0
  assert federated.quotient(np.inf, np.inf) == np.inf


def test_rounds_of_an_update():
  settings = dataclasses.replace(
    federated.PRESETS['paper'], lower_steps=(20, 60)
  )
  assert [
    federated.rounds_an_update(m, settings) for m in federated.methods(settings)
  ] == [9, 13, 10, 10, 10, 18, 18, 18]


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'taking_part': 9}, 'from 0'),
    ({'devices': 3}, 'do not divide'),
    ({'devices': 2, 'taking_part': 2}, 'one device'),
  ],
)
def test_settings_that_no_run_can_have(changes, match):
  with pytest.raises(ValueError, match=match):
    federated.check(dataclasses.replace(SETTINGS, **changes))
