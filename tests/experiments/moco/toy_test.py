"""MoCo's toy problem: losses by hand, front, and a short run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.moco import toy


@pytest.mark.parametrize(
  ('point', 'values'),
  [
    # Logarithms above the axis, bowls below it.
    ((1.0, 0.0), (0.0, 0.0)),
    (
      (7.0, -8.0),
      (-40 * np.tanh(4.0), np.tanh(4.0) * (14.0**2 / 10 - 20)),
    ),
    (
      (3.0, 2.0),
      (
        2 * np.tanh(1.0) * (np.log(5 - np.tanh(2.0)) + 6),
        np.tanh(1.0) * (np.log(2 - np.tanh(2.0)) + 6),
      ),
    ),
  ],
)
def test_losses_by_hand(point, values):
  losses = toy.toy_losses(jnp.array(point))
  np.testing.assert_allclose(losses, values, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_front_is_below_and_between_the_centres():
  below = jnp.array([[x, -8.35] for x in (-6.0, 0.0, 6.0)])
  assert all(bool(toy.on_front(point)) for point in below)
  others = jnp.array([[9.0, -8.35], [0.0, -4.0], [5.0, 9.0], [-5.0, 7.0]])
  assert not any(bool(toy.on_front(point)) for point in others)


def test_noise_is_added_to_gradients():
  point, noise = jnp.array([1.0, -3.0]), jnp.arange(12.0).reshape(3, 2, 2)
  rows = jax.jacobian(toy.noisy_losses)(point, noise)
  truth = jax.jacobian(toy.toy_losses)(point)
  np.testing.assert_allclose(rows - truth, noise[0], atol=1e-5)


@pytest.mark.slow
def test_runs_and_writes_its_results(options, results, tmp_path, capsys):
  settings = toy.Settings(
    steps=4, chunk=2, learning_rates=(1e-3,), methods=('moco_exact', 'modo')
  )
  harness.execute(toy.main, options(settings))
  metrics = results()['metrics']
  for method in settings.methods:
    assert metrics[f'seeds_on_front/{method}/learning_rate=0.001/start=1'] == 0
    for start, below in ((1, 0), (2, 2), (3, 0)):
      name = f'seeds_below_axis/{method}/learning_rate=0.001/start={start}'
      assert metrics[name] == below
  for plot in ('paths', 'stationarity', 'weight'):
    assert (tmp_path / f'{plot}.png').stat().st_size > 5_000
  assert 'moco_exact' in capsys.readouterr().out


def test_unknown_methods():
  with pytest.raises(harness.SettingsError, match=r'=guess: .*knows .*smg'):
    settings_lib.check(toy.Settings(methods=('guess',)))
