"""gymnax environments: the two ends apart, names, actions, padding."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
