"""Games in Python: the cart-pole against gymnax, the Atari if it is there."""

import sys

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.rl import games


def test_cart_pole_moves_as_gymnax_s():
  game = games.CartPole(np.random.default_rng(0))
  made, settings = gymnax.make('CartPole-v1')
  seen, step = game.reset(), jax.jit(made.step_env)
  _, state = made.reset(jax.random.key(0), settings)
  fields = ('x', 'x_dot', 'theta', 'theta_dot')
  state = state.replace(**dict(zip(fields, jnp.asarray(seen))))
  for t in range(200):
    found = game.step(t % 3 > 0)
    theirs, state, _, ended, _ = step(
      jax.random.key(0), state, int(t % 3 > 0), settings
    )
    np.testing.assert_allclose(found.observation, theirs, rtol=1e-3, atol=1e-4)
    assert found.terminated == bool(ended)
    if ended:
      break
  assert 5 < t < 199 and found.reward == 1


def test_cart_pole_is_cut_after_500_steps():
  game = games.CartPole(np.random.default_rng(0))
  seen = game.reset()
  for t in range(500):
    # Linear feedback holds it up.
    found = game.step(bool(seen @ np.array([0.1, 0.3, 3.0, 1.0]) > 0))
    seen = found.observation
    assert not found.terminated
    assert found.truncated == (t == 499)


def test_missing_extra_and_unknown_games(monkeypatch):
  monkeypatch.setitem(sys.modules, 'ale_py.roms', None)
  with pytest.raises(
    harness.SettingsError, match=r'extra `atari`: pip install'
  ):
    games.rom('Seaquest')
  monkeypatch.undo()
  pytest.importorskip('ale_py')
  with pytest.raises(harness.SettingsError, match=r'did you mean .*Seaquest'):
    games.rom('Seaqest')


def test_atari_pictures_rewards_and_ends():
  """Against the emulator itself, frame by frame."""
  pytest.importorskip('ale_py')
  game = games.make('Seaquest', np.random.default_rng(0))
  first = game.reset()
  assert first.shape == game.shape == (84, 84, 4) and first.dtype == np.uint8
  assert (first[..., :1] == first).all()
  rng, before = np.random.default_rng(1), first
  score = length = 0
  while True:
    found = game.step(int(rng.integers(game.actions)))
    np.testing.assert_array_equal(found.observation[..., :3], before[..., 1:])
    assert found.reward == np.clip(found.score, -1, 1)
    score, length, before = score + found.score, length + 1, found.observation
    if found.terminated or found.truncated:
      break
  assert found.terminated and score % 20 == 0
  assert 50 < length < 5_000
  short = games.Atari('Seaquest', np.random.default_rng(0), limit=200)
  short.reset()
  steps = 0
  while not (found := short.step(0)).truncated:
    steps += 1
    assert not found.terminated and steps < 60
