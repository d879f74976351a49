"""Environments that Python steps: games of the Atari, and a cart-pole.

Atari games need the extra `atari`. Preprocessing is the usual one: an action is
held for 4 frames, an observation is a stack of four grey pictures of 84 x 84,
each the maximum of the last two frames; a game starts with up to 30 idle
actions, and rewards are clipped to [-1, 1]. `Conventions` has what differs in
the literature.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

import bilevel_jax as bj
from experiments import harness
from experiments.rl import environments

SKIP, SIDE, STACK, IDLE = 4, 84, 4, 30


class Step(NamedTuple):
  """Result of an action, before any reset.

  Attributes:
    observation: after the action.
    reward: for learning.
    terminated: whether the episode ended.
    truncated: whether a limit cut the episode.
    score: unclipped, for the report.
    game_over: whether the game has ended or was cut; after a lost life, the
      episode may end although the game continues.
  """

  observation: np.ndarray
  reward: float
  terminated: bool
  truncated: bool
  score: float
  game_over: bool


class Game(Protocol):
  """An environment that is stepped in Python.

  Attributes:
    shape: of an observation.
    actions: number of actions.
    frames: number of frames per action.
  """

  shape: tuple[int, ...]
  actions: int
  frames: int

  def reset(self) -> np.ndarray:
    """Begins an episode; gives its first observation."""

  def step(self, action: int) -> Step:
    """Takes an action."""


Transition = tuple[Any, ...]


def transition(observation: np.ndarray, action: int, after: Step) -> Transition:
  """One step of one game, as a `bj.rl.Rollout` stores it."""
  return (
    observation,
    np.int32(action),
    np.float32(after.reward),
    after.terminated,
    after.truncated,
    after.observation,
  )


def as_rollout(rows: Sequence[Sequence[Transition]]) -> bj.rl.Rollout:
  """Stacks transitions, one row per step, to arrays (steps, games, ...)."""
  stack = lambda rows: [np.stack(x) for x in zip(*rows, strict=True)]
  return bj.rl.Rollout(*stack([stack(row) for row in rows]))


@dataclasses.dataclass(frozen=True)
class Conventions:
  """Conventions for Atari games that differ between papers.

  Attributes:
    sticky_actions: probability per frame that the emulator repeats the previous
      action; 0.25 in Machado et al., 2018, 0 in Mnih et al., 2015.
    end_on_life_loss: whether a lost life ends a training episode, as in Mnih et
      al., 2015. The game continues; its score counts all lives.
    fire_on_reset: whether FIRE is held for one step at the start of an episode,
      in games whose minimal action set has it: some wait for it.
  """

  sticky_actions: Annotated[float, harness.Allowed(0, 1)] = 0.0
  end_on_life_loss: bool = False
  fire_on_reset: bool = False


DEFAULT = Conventions()


class Atari:
  """A game of the Arcade Learning Environment.

  Args:
    name: such as Seaquest.
    rng: of the emulator's seed and of idle actions.
    conventions: see `Conventions`.
    limit: maximum frames of a game, half an hour.

  Raises:
    SettingsError: if the extra is missing or the game is unknown.
  """

  shape, frames = (SIDE, SIDE, STACK), SKIP

  def __init__(
    self,
    name: str,
    rng: np.random.Generator,
    conventions: Conventions = DEFAULT,
    *,
    limit: int = 108_000,
  ):
    """Loads the game."""
    path = rom(name)
    ale_py = importlib.import_module('ale_py')
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    self._ale = ale_py.ALEInterface()
    self._ale.setInt('random_seed', int(rng.integers(2**31)))
    self._ale.setFloat('repeat_action_probability', conventions.sticky_actions)
    self._ale.loadROM(path)
    self._legal = self._ale.getMinimalActionSet()
    self._rng, self._limit = rng, limit
    self._conventions, self._life_lost = conventions, False
    fire = ale_py.Action.FIRE
    fires = conventions.fire_on_reset and fire in self._legal
    self._first_actions = [fire] * SKIP if fires else []
    self.actions = len(self._legal)

  def reset(self) -> np.ndarray:
    """Begins an episode: a new game with idle actions, or the next life."""
    if not self._life_lost:
      self._ale.reset_game()
      for _ in range(self._rng.integers(IDLE + 1)):
        self._act_or_reset(0)
    for action in self._first_actions:
      self._act_or_reset(action)
    self._lives, self._life_lost = self._ale.lives(), False
    screen = self._ale.getScreenGrayscale()
    self._stack = np.repeat(_small(screen)[..., None], STACK, axis=-1)
    return self._stack

  def _act_or_reset(self, action: Any) -> None:
    self._ale.act(action)
    if self._ale.game_over():
      self._ale.reset_game()

  def step(self, action: int) -> Step:
    """Holds an action for `SKIP` frames."""
    score, screens = 0.0, []
    for frame in range(SKIP):
      score += self._ale.act(self._legal[action])
      if frame >= SKIP - 2:
        screens.append(self._ale.getScreenGrayscale())
      if self._ale.game_over():
        break
    # Some sprites are drawn in every other frame only.
    screens = screens or [self._ale.getScreenGrayscale()]
    new = _small(np.max(screens, axis=0))[..., None]
    self._stack = np.concatenate([self._stack[..., 1:], new], axis=-1)
    over = self._ale.game_over()
    cut = self._ale.getEpisodeFrameNumber() >= self._limit and not over
    lives, before = self._ale.lives(), self._lives
    self._lives = lives
    # Some games show 0 lives for some frames before the end.
    lost = 0 < lives < before and not (over or cut)
    self._life_lost = lost and self._conventions.end_on_life_loss
    clipped = float(np.clip(score, -1, 1))
    terminated = over or self._life_lost
    return Step(self._stack, clipped, terminated, cut, score, over or cut)

  def screen(self) -> np.ndarray:
    """The screen in colour, uint8 (height, width, 3)."""
    return self._ale.getScreenRGB()


def _small(screen: np.ndarray) -> np.ndarray:
  picture = Image.fromarray(screen)
  size = (SIDE, SIDE)
  return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))


def rom(name: str) -> str:
  """Path of the file of an Atari game.

  Raises:
    SettingsError: if the extra is missing or the game is unknown.
  """
  roms = harness.load_extra('ale_py.roms', 'atari', name)
  folded = {each.replace('_', ''): each for each in roms.get_all_rom_ids()}
  rom_id = folded.get(name.casefold())
  if rom_id is None:
    titles = [each.title().replace('_', '') for each in folded.values()]
    raise environments.unknown(name, [*titles, 'CartPole'])
  return str(roms.get_rom_path(rom_id))


class CartPole:
  """A pole on a cart, to balance for 500 steps (Barto, Sutton and Anderson).

  Args:
    rng: of the initial states.
  """

  shape, actions, frames = (4,), 2, 1

  def __init__(self, rng: np.random.Generator):
    """Stores the generator."""
    self._rng = rng

  def reset(self) -> np.ndarray:
    """Begins with the pole nearly upright."""
    self._state = self._rng.uniform(-0.05, 0.05, 4)
    self._time = 0
    return self._state.astype(np.float32)

  def step(self, action: int) -> Step:
    """Pushes the cart for 0.02 seconds."""
    x, speed, angle, turn = self._state
    force = 10.0 if action else -10.0
    sine, cosine = np.sin(angle), np.cos(angle)
    push = (force + 0.05 * turn**2 * sine) / 1.1
    bend = (9.8 * sine - cosine * push) / (
      0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1)
    )
    pull = push - 0.05 * bend * cosine / 1.1
    self._state += 0.02 * np.array([speed, pull, turn, bend])
    self._time += 1
    x, _, angle, _ = self._state
    fell = bool(abs(x) > 2.4 or abs(angle) > 12 * np.pi / 180)
    cut = self._time >= 500 and not fell
    observation = self._state.astype(np.float32)
    return Step(observation, 1.0, fell, cut, 1.0, fell or cut)


def make(
  name: str,
  rng: np.random.Generator,
  conventions: Conventions = DEFAULT,
) -> Any:
  """Makes a game by its name: CartPole, or a game of the Atari."""
  return CartPole(rng) if name == 'CartPole' else Atari(name, rng, conventions)
