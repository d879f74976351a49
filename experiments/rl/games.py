"""Environments in Python, one at a time: games of the Atari, and a cart-pole.

The Atari ones need the extra `atari`. What an agent sees of them is usual: each
action for 4 frames, the brighter of the last two in grey, 84 x 84, the last
four such pictures; up to 30 idle actions at first; rewards clipped to [-1, 1].
Where the literature differs, `Conventions` has the choice.
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
  """What an action led to; there is no reset.

  Attributes:
    observation: after it.
    reward: to learn from.
    terminated: whether the episode ended by itself.
    truncated: whether a limit cut it.
    score: what the episode counts, which may be other than the reward.
    game_over: whether the game has ended or was cut: where only a life was
      lost, the episode ends and the game goes on.
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
    actions: their number.
    frames: that one action takes.
  """

  shape: tuple[int, ...]
  actions: int
  frames: int

  def reset(self) -> np.ndarray:
    """Begins an episode, and gives its first observation."""

  def step(self, action: int) -> Step:
    """Acts."""


Transition = tuple[Any, ...]


def transition(observation: np.ndarray, action: int, after: Step) -> Transition:
  """What a `bj.rl.Rollout` holds of one step of one game."""
  return (
    observation,
    np.int32(action),
    np.float32(after.reward),
    after.terminated,
    after.truncated,
    after.observation,
  )


def as_rollout(rows: Sequence[Sequence[Transition]]) -> bj.rl.Rollout:
  """Stacks transitions, a row for each step, to arrays (steps, games, ...)."""
  stack = lambda rows: [np.stack(x) for x in zip(*rows, strict=True)]
  return bj.rl.Rollout(*stack([stack(row) for row in rows]))


@dataclasses.dataclass(frozen=True)
class Conventions:
  """What papers do differently in games of the Atari.

  Attributes:
    sticky_actions: the probability that the emulator repeats the action before
      for a frame; 0.25 in Machado et al., 2018, 0 in Mnih et al., 2015.
    end_on_life_loss: whether a lost life ends the episode that is learnt from,
      as in Mnih et al., 2015. The game goes on; its score is of all lives.
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
    rng: of the machine's seed and of idle actions.
    conventions: see `Conventions`.
    limit: frames of a game, at most: half an hour.

  Raises:
    SettingsError: without the extra, or if there is no such game.
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
    pressed = conventions.fire_on_reset and fire in self._legal
    self._first_actions = [fire] * SKIP if pressed else []
    self.actions = len(self._legal)

  def reset(self) -> np.ndarray:
    """Begins an episode: a game with some idle actions, or the next life."""
    if not self._life_lost:
      self._ale.reset_game()
      for _ in range(self._rng.integers(IDLE + 1)):
        self._act_or_reset(0)
    for action in self._first_actions:
      self._act_or_reset(action)
    self._lives, self._life_lost = self._ale.lives(), False
    screen = self._ale.getScreenGrayscale()
    self._seen = np.repeat(_small(screen)[..., None], STACK, axis=-1)
    return self._seen

  def _act_or_reset(self, action: Any) -> None:
    self._ale.act(action)
    if self._ale.game_over():
      self._ale.reset_game()

  def step(self, action: int) -> Step:
    """Holds an action for some frames."""
    score, screens = 0.0, []
    for frame in range(SKIP):
      score += self._ale.act(self._legal[action])
      if frame >= SKIP - 2:
        screens.append(self._ale.getScreenGrayscale())
      if self._ale.game_over():
        break
    # Sprites may be drawn in every other frame only.
    screens = screens or [self._ale.getScreenGrayscale()]
    new = _small(np.max(screens, axis=0))[..., None]
    self._seen = np.concatenate([self._seen[..., 1:], new], axis=-1)
    over = self._ale.game_over()
    cut = self._ale.getEpisodeFrameNumber() >= self._limit and not over
    lives, before = self._ale.lives(), self._lives
    self._lives = lives
    # Some games show 0 lives for some frames before they are over.
    lost = 0 < lives < before and not (over or cut)
    self._life_lost = lost and self._conventions.end_on_life_loss
    clipped = float(np.clip(score, -1, 1))
    terminated = over or self._life_lost
    return Step(self._seen, clipped, terminated, cut, score, over or cut)

  def screen(self) -> np.ndarray:
    """What a person sees, uint8 (height, width, 3)."""
    return self._ale.getScreenRGB()


def _small(screen: np.ndarray) -> np.ndarray:
  picture = Image.fromarray(screen)
  size = (SIDE, SIDE)
  return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))


def rom(name: str) -> str:
  """The file of an Atari game, or a SettingsError that says what is missing."""
  roms = harness.load_extra('ale_py.roms', 'atari', name)
  folded = {each.replace('_', ''): each for each in roms.get_all_rom_ids()}
  found = folded.get(name.casefold())
  if found is None:
    titles = [each.title().replace('_', '') for each in folded.values()]
    raise environments.unknown(name, [*titles, 'CartPole'])
  return str(roms.get_rom_path(found))


class CartPole:
  """A pole on a cart, to be held up for 500 steps; Barto, Sutton, Anderson.

  Args:
    rng: of the first states.
  """

  shape, actions, frames = (4,), 2, 1

  def __init__(self, rng: np.random.Generator):
    """Keeps the generator."""
    self._rng = rng

  def reset(self) -> np.ndarray:
    """Begins near upright."""
    self._state = self._rng.uniform(-0.05, 0.05, 4)
    self._time = 0
    return self._state.astype(np.float32)

  def step(self, action: int) -> Step:
    """Pushes the cart for a fiftieth of a second."""
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
  """A game by its name: CartPole, or one of the Atari with its conventions."""
  return CartPole(rng) if name == 'CartPole' else Atari(name, rng, conventions)
