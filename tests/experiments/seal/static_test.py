"""Rankings of rows with fixed losses, by optimiser."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.seal import static


def test_rates_are_shares_of_kinds():
  scores = jnp.array([0.0, 5.0, 1.0, 4.0, 3.0])
  losses = jnp.array([9.0, 8.0, 1.0, 2.0, 3.0])
  unsafe = jnp.array([True, True, False, False, False])
  rates = static.rates(scores, losses, unsafe, 0.4)
  assert rates['agreement'] == rates['unsafe_drop'] == 0.5
  np.testing.assert_allclose(rates['clean_drop'], 1 / 3, rtol=1e-6)


def test_batches_of_an_epoch_are_all_rows_once():
  settings = static.Settings(rows=24, batch_size=6)
  key = jax.random.key(3)

  def batches(name):
    return np.stack(
      [
        static.make_batch(
          settings,
          name,
          harness.Context((), (), (), key, jax.random.key(step), step),
        )
        for step in range(8)
      ]
    )

  epochs = batches('mirror').reshape(2, 24)
  assert np.all(np.sort(epochs) == np.arange(24))
  assert np.any(epochs[0] != epochs[1])
  assert len(set(batches('mirror/drawn')[:4].ravel().tolist())) < 24


@pytest.mark.slow
def test_a_small_run_ranks_right_and_adam_does_not(tmp_path):
  settings = static.Settings(
    rows=512,
    batch_size=32,
    epochs=(1, 3),
    methods=('descent', 'mirror/drawn', 'adam'),
  )
  options = harness.Options(
    'seal', 'static', 'test', settings, str(tmp_path), None, (0, 1)
  )
  static.check(settings)
  harness.execute(static.main, options)
  metrics = json.loads((tmp_path / 'results.json').read_text())['metrics']
  assert (
    metrics['agreement/descent/epochs=3']
    == metrics['agreement/exact/epochs=1']
    == 1
  )
  assert metrics['agreement/mirror/drawn/epochs=3'] < 0.7
  assert metrics['agreement/mirror/drawn/by_visits/epochs=3'] > 0.8
  assert (
    metrics['unsafe_drop/adam/epochs=3']
    < metrics['unsafe_drop/descent/epochs=3'] - 0.1
  )
  assert (
    metrics['clean_drop/descent/epochs=3']
    == metrics['clean_drop/exact/epochs=3']
  )


@pytest.mark.parametrize(
  ('wrong', 'match'),
  [
    ({'rows': 100}, 'no multiple of batch_size'),
    ({'methods': ('descent', 'sorting')}, '--methods=sorting'),
    ({'drop': 1.0}, 'below 1'),
  ],
)
def test_settings_that_do_not_go_together(wrong, match):
  with pytest.raises(harness.SettingsError, match=match):
    settings = static.Settings(**wrong)
    settings_lib.check(settings)
    static.check(settings)
