"""Metrics of the host: plain Python beside a compiled run."""

import json

import jax.numpy as jnp
import numpy as np
import pytest


def test_is_recorded_at_its_steps_and_selects(train, tmp_path):
  called = []

  def evaluate_host(params, step, state):
    called.append(step)
    assert params.upper.shape == (2, 3) and state
    return {'words': [step % 20, -step], 'calls': len(called)}

  arguments = {'evaluate_host': evaluate_host, 'select': 'words'}
  trained = train(**arguments)
  assert called == [10, 20, 30, 40]
  np.testing.assert_array_equal(
    trained.history['words'], [[10, -10], [0, -20], [10, -30], [0, -40]]
  )
  assert trained.history['calls'].tolist() == [[i, i] for i in range(1, 5)]
  assert trained.best.step.tolist() == [10, 10]
  assert trained.best.score.tolist() == [10, -10]
  np.testing.assert_array_equal(
    trained.best.params.upper, train(steps=10, workdir=None).params.upper
  )

  called.clear()
  some = train(**arguments, host_every=15, workdir=None, steps=50)
  assert called == [20, 30, 50]
  missing = np.isnan(some.history['words'][:, 0])
  assert missing.tolist() == [True, False, False, True, False]
  assert not np.isnan(some.history['score']).any()
  line = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[0]
  assert json.loads(line)['words'] == [10, -10]


def test_new_records_are_passed_on_once(train):
  """Not those that a resumed run has read."""
  passed = []
  on_record = lambda step, metrics: passed.append((step, metrics))
  train(steps=20, on_record=on_record)
  trained = train(steps=40, on_record=on_record)
  assert [step for step, _ in passed] == [10, 20, 30, 40]
  for i, (_, metrics) in enumerate(passed):
    assert {*metrics} == {*trained.history}
    for name, values in metrics.items():
      np.testing.assert_array_equal(values, trained.history[name][i])


@pytest.mark.parametrize(
  ('found', 'kind', 'message'),
  [
    ([1], TypeError, 'a dict'),
    ({'a': np.zeros(3)}, ValueError, r"'a' .* each of 2 seeds, .*\(3,\)"),
    ({'score': 1.0}, ValueError, 'score'),
  ],
)
def test_wrong_metrics(train, found, kind, message):
  with pytest.raises(kind, match=message):
    train(evaluate_host=lambda params, step, state: found, workdir=None)


def test_a_stopped_seed_has_no_metrics_of_the_host(train):
  poison = lambda context: jnp.where(context.own > 0, jnp.nan, 1.0)
  with pytest.warns(RuntimeWarning, match='seed 1'):
    trained = train(
      batch=poison,
      own=jnp.array([0.0, 1.0]),
      evaluate_host=lambda params, step, state: {'one': 1.0},
      select='one',
      workdir=None,
    )
  assert trained.history['one'][-1, 0] == 1
  assert np.isnan(trained.history['one'][:, 1]).all()
  assert trained.best.step.tolist() == [10, 0]


def test_unknown_select_names_the_metrics(train):
  with pytest.raises(ValueError, match=r"'w' is unknown.*words"):
    train(
      evaluate_host=lambda params, step, state: {'words': 1.0},
      select='w',
      workdir=None,
    )
