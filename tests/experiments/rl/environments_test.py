"""gymnax environments: the two ends apart, names, actions, padding."""

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
    found = env.step(jax.random.key(1), start, 1)
    assert (bool(found.terminated), bool(found.truncated)) == ends
    # Before the reset: where the push led to, not where an episode begins.
    made, settings = gymnax.make('CartPole-v1')
    moved, *_ = made.step_env(jax.random.key(2), start, 1, settings)
    np.testing.assert_array_equal(found.final_observation, moved)
    began = int(found.state.time) == 0
    assert began == any(ends)
    assert (found.observation == moved).all() != began
  assert abs(float(found.reward) - 1) < 1e-6


def test_continuous_actions_are_mapped_to_their_range():
  known = environments.make('Pendulum-v1')
  made, settings = gymnax.make('Pendulum-v1')
  assert known.environment.actions == (1,)
  _, state = known.environment.reset(jax.random.key(0))
  for given, torque in ((0.5, 1.0), (-3.0, -2.0), (0.0, 0.0)):
    ours = known.environment.step(jax.random.key(1), state, jnp.array([given]))
    theirs = made.step(jax.random.key(1), state, jnp.array([torque]), settings)
    np.testing.assert_allclose(ours.final_observation, theirs[0], rtol=1e-6)


def test_padding_adds_empty_channels():
  known = environments.make('Breakout-MinAtar')
  env = environments.padded(known.environment, 6)
  observation, state = env.reset(jax.random.key(0))
  assert known.shape == (10, 10, 4) and observation.shape == (10, 10, 6)
  found = bj.rl.Timestep(*env.step(jax.random.key(0), state, 0))
  for padded in (found.observation, found.final_observation):
    assert padded.shape == (10, 10, 6)
    assert (padded[..., 4:] == 0).all() and (padded[..., :4] != 0).any()


def test_mnist_is_not_downloaded(tmp_path, monkeypatch):
  """One line without its files; with them the environment is made."""

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
  """Those that keep arrays, in one program and then in another."""
  for name in ('FourRooms-misc', 'MetaMaze-misc'):

    def first(key, name=name):
      known = environments.make(name)
      _, state = known.environment.reset(key)
      return bj.rl.Timestep(*known.environment.step(key, state, 0))

    expected = first(jax.random.key(0))
    for _ in range(2):
      found = jax.jit(lambda key, fn=first: fn(key))(jax.random.key(0))
      np.testing.assert_allclose(found.observation, expected.observation)


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
