"""Environments of gymnax: ends, names, actions, padding."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.utils import load_mnist

import bilevel_jax as bj
from experiments import harness
from experiments.rl import environments


def test_a_time_limit_truncates_and_a_fall_terminates():
  """A CartPole one step before its limit, upright or about to fall."""
  env = environments.make('CartPole-v1').environment
  _, state = env.reset(jax.random.key(0))
  upright = state.replace(time=499)
  falling = state.replace(theta=jnp.float32(0.2), theta_dot=jnp.float32(3.0))
  for start, ends in (
    (upright, (False, True)),
    (falling, (True, False)),
    (falling.replace(time=499), (True, True)),
    (state, (False, False)),
  ):
    step = env.step(jax.random.key(1), start, 1)
    assert (bool(step.terminated), bool(step.truncated)) == ends
    # The final observation is the one before the reset.
    gym, settings = gymnax.make('CartPole-v1')
    moved, *_ = gym.step_env(jax.random.key(2), start, 1, settings)
    np.testing.assert_array_equal(step.final_observation, moved)
    was_reset = int(step.state.time) == 0
    assert was_reset == any(ends)
    assert (step.observation == moved).all() != was_reset
  assert abs(float(step.reward) - 1) < 1e-6


def test_continuous_actions_are_mapped_to_their_range():
  known = environments.make('Pendulum-v1')
  gym, settings = gymnax.make('Pendulum-v1')
  assert known.environment.actions == (1,)
  _, state = known.environment.reset(jax.random.key(0))
  key = jax.random.key(1)
  for action, torque in ((0.5, 1.0), (-3.0, -2.0), (0.0, 0.0)):
    step = known.environment.step(key, state, jnp.array([action]))
    expected = gym.step(key, state, jnp.array([torque]), settings)[0]
    np.testing.assert_allclose(step.final_observation, expected, rtol=1e-6)


def test_padding_adds_empty_channels():
  known = environments.make('Breakout-MinAtar')
  env = environments.padded(known.environment, 6)
  observation, state = env.reset(jax.random.key(0))
  assert known.shape == (10, 10, 4) and observation.shape == (10, 10, 6)
  step = bj.rl.Timestep(*env.step(jax.random.key(0), state, 0))
  for padded in (step.observation, step.final_observation):
    assert padded.shape == (10, 10, 6)
    assert (padded[..., 4:] == 0).all() and (padded[..., :4] != 0).any()


def test_mnist_is_not_downloaded(tmp_path, monkeypatch):
  """Without its files there is a short error, with them an environment."""

  def download(*args):
    raise AssertionError('nothing is downloaded')

  monkeypatch.setattr(load_mnist, 'urlretrieve', download)
  monkeypatch.setattr(environments, '_MNIST_FOLDER', tmp_path)
  with pytest.raises(harness.MissingDataError) as caught:
    environments.make('MNISTBandit-bsuite')
  assert '\n' not in str(caught.value)
  assert 'train-images-idx3-ubyte.gz, train-labels' in str(caught.value)
  for name in environments._MNIST_FILES:
    (tmp_path / name).touch()
  pictures = np.zeros((5, 28, 28), np.int8), np.arange(5, dtype=np.uint8)
  monkeypatch.setattr(load_mnist, 'load_mnist', lambda: (pictures, pictures))
  known = environments.make('MNISTBandit-bsuite')
  assert known.shape == (28, 28) and known.environment.actions == 10
  assert known.limit == 1


def test_environments_are_made_within_a_trace():
  """Environments that store arrays, in two programs."""
  for name in ('FourRooms-misc', 'MetaMaze-misc'):

    def first(key, name=name):
      known = environments.make(name)
      _, state = known.environment.reset(key)
      return bj.rl.Timestep(*known.environment.step(key, state, 0))

    expected = first(jax.random.key(0))
    for _ in range(2):
      step = jax.jit(lambda key, fn=first: fn(key))(jax.random.key(0))
      np.testing.assert_allclose(step.observation, expected.observation)


def test_errors():
  with pytest.raises(
    harness.SettingsError, match="no environment 'CartPole-v0'; did"
  ):
    environments.make('CartPole-v0')
  with pytest.raises(harness.SettingsError, match='did you mean Breakout-Min'):
    environments.make('breakout-minatar')
  with pytest.raises(harness.SettingsError, match="'zzzz'; known: CartPole"):
    environments.make('zzzz')
  with pytest.raises(harness.SettingsError, match='continuous actions'):
    environments.make('Pendulum-v1', discrete=True)
