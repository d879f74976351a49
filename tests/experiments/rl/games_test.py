"""Games in Python: the cart-pole against gymnax, and the Atari."""

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
  gym, settings = gymnax.make('CartPole-v1')
  observation, gym_step = game.reset(), jax.jit(gym.step_env)
  _, state = gym.reset(jax.random.key(0), settings)
  fields = ('x', 'x_dot', 'theta', 'theta_dot')
  state = state.replace(**dict(zip(fields, jnp.asarray(observation))))
  for t in range(200):
    step = game.step(t % 3 > 0)
    expected, state, _, ended, _ = gym_step(
      jax.random.key(0), state, int(t % 3 > 0), settings
    )
    np.testing.assert_allclose(step.observation, expected, rtol=1e-3, atol=1e-4)
    assert step.terminated == bool(ended)
    if ended:
      break
  assert 5 < t < 199 and step.reward == 1


def test_cart_pole_is_cut_after_500_steps():
  game = games.CartPole(np.random.default_rng(0))
  observation = game.reset()
  for t in range(500):
    # Linear feedback balances the pole.
    step = game.step(bool(observation @ np.array([0.1, 0.3, 3.0, 1.0]) > 0))
    observation = step.observation
    assert not step.terminated
    assert step.truncated == (t == 499)


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


def emulator(name, seed, sticky=0.0):
  """The emulator with the seed that a game draws first."""
  ale_py = pytest.importorskip('ale_py')
  rng = np.random.default_rng(seed)
  ale = ale_py.ALEInterface()
  ale.setInt('random_seed', int(rng.integers(2**31)))
  ale.setFloat('repeat_action_probability', sticky)
  ale.loadROM(games.rom(name))
  return ale, rng


def idle(ale, rng):
  """Begins a game as `games.Atari` does."""
  ale.reset_game()
  for _ in range(rng.integers(games.IDLE + 1)):
    ale.act(0)


def make(name, seed=0, **conventions):
  pytest.importorskip('ale_py')
  conventions = games.Conventions(**conventions)
  return games.make(name, np.random.default_rng(seed), conventions)


def hold(ale, action):
  return sum(ale.act(action) for _ in range(games.SKIP))


def test_sticky_actions_are_those_of_the_emulator():
  """The same screens with the same probability and seed only."""
  game, plain = make('Seaquest', sticky_actions=0.25), make('Seaquest')
  assert game._ale.getFloat('repeat_action_probability') == 0.25
  assert plain._ale.getFloat('repeat_action_probability') == 0
  ale, rng = emulator('Seaquest', 0, 0.25)
  idle(ale, rng)
  game.reset(), plain.reset()
  np.testing.assert_array_equal(game.screen(), ale.getScreenRGB())
  actions, same = np.random.default_rng(1), []
  for _ in range(60):
    action = int(actions.integers(game.actions))
    after, other = game.step(action), plain.step(action)
    score = hold(ale, ale.getMinimalActionSet()[action])
    assert after.score == score and not after.terminated
    np.testing.assert_array_equal(game.screen(), ale.getScreenRGB())
    same.append(np.array_equal(after.observation, other.observation))
  assert not all(same)


def test_a_lost_life_ends_the_episode_and_the_game_goes_on():
  """Five lives of Breakout: the emulator's frames and score go on."""
  game, full = make('Breakout', end_on_life_loss=True), make('Breakout')
  ale, rng = emulator('Breakout', 0)
  idle(ale, rng)
  game.reset(), full.reset()
  fire = [action.name for action in ale.getMinimalActionSet()].index('FIRE')
  frames, ended, over = game._ale.getEpisodeFrameNumber(), [], False
  while not over:
    after, same = game.step(fire), full.step(fire)
    before = ale.lives()
    assert after.score == hold(ale, 1) == same.score
    over = ale.game_over()
    # An episode of a life, or of a game.
    assert after.terminated == (over or ale.lives() < before)
    assert same.terminated == over == after.game_over == same.game_over
    assert game._ale.getEpisodeFrameNumber() > frames
    frames = game._ale.getEpisodeFrameNumber()
    if after.terminated and not over:
      ended.append(ale.lives())
      observation = game.reset()
      assert game._ale.getEpisodeFrameNumber() == frames
      assert (observation == observation[..., :1]).all()
      np.testing.assert_array_equal(game.screen(), ale.getScreenRGB())
  assert ended == [4, 3, 2, 1]
  game.reset()  # A new game.
  assert game._ale.lives() == 5
  assert game._ale.getEpisodeFrameNumber() <= games.IDLE


def test_fire_starts_games_that_wait_for_it():
  """FIRE is held for a step after the idle actions, if the game has it."""
  game, waits = make('Breakout', fire_on_reset=True), make('Breakout')
  ale, rng = emulator('Breakout', 0)
  idle(ale, rng)
  game.reset(), waits.reset()
  hold(ale, 1)
  np.testing.assert_array_equal(game.screen(), ale.getScreenRGB())
  # Without FIRE there is no ball, and nothing moves.
  start = waits.screen()
  for _ in range(30):
    game.step(0), waits.step(0)
  np.testing.assert_array_equal(waits.screen(), start)
  assert not np.array_equal(game.screen(), start)
  # MsPacman has no FIRE in its minimal action set.
  names = [a.name for a in make('MsPacman')._legal]
  assert 'FIRE' not in names
  pressed, plain = make('MsPacman', fire_on_reset=True), make('MsPacman')
  np.testing.assert_array_equal(pressed.reset(), plain.reset())


def test_fire_after_a_lost_life():
  """With both settings a policy that never fires still plays all lives."""
  game = make('Breakout', fire_on_reset=True, end_on_life_loss=True)
  game.reset()
  lives = []
  for _ in range(3_000):
    after = game.step(0)
    if after.terminated:
      lives.append(game._ale.lives())
      if after.game_over:
        break
      game.reset()
  assert lives == [4, 3, 2, 1, 0]


def test_atari_pictures_rewards_and_ends():
  """Against the emulator, frame by frame."""
  pytest.importorskip('ale_py')
  game = games.make('Seaquest', np.random.default_rng(0))
  first = game.reset()
  assert first.shape == game.shape == (84, 84, 4) and first.dtype == np.uint8
  assert (first[..., :1] == first).all()
  rng, before = np.random.default_rng(1), first
  score = length = 0
  while True:
    after = game.step(int(rng.integers(game.actions)))
    np.testing.assert_array_equal(after.observation[..., :3], before[..., 1:])
    assert after.reward == np.clip(after.score, -1, 1)
    score, length, before = score + after.score, length + 1, after.observation
    if after.terminated or after.truncated:
      break
  assert after.terminated and score % 20 == 0
  assert 50 < length < 5_000
  short = games.Atari('Seaquest', np.random.default_rng(0), limit=200)
  short.reset()
  steps = 0
  while not (after := short.step(0)).truncated:
    steps += 1
    assert not after.terminated and steps < 60
