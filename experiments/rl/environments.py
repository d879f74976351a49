"""Environments of gymnax as environments of the library.

gymnax 1.x separates termination from truncation, and gives the observation
before a reset as `info['final_observation']`. Continuous actions are clipped to
[-1, 1] and mapped to the environment's range. The import of gymnax starts XLA,
so functions here import it.
"""

import difflib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import bilevel_jax as bj
from experiments import harness
from experiments.rl import own_environment

# Folder where gymnax expects MNIST before a download.
_MNIST_FOLDER = pathlib.Path('/tmp/mnist')
_MNIST_FILES = (
  'train-images-idx3-ubyte.gz',
  'train-labels-idx1-ubyte.gz',
  't10k-images-idx3-ubyte.gz',
  't10k-labels-idx1-ubyte.gz',
)


class Known(NamedTuple):
  """An environment with the sizes of its observations and episodes.

  Attributes:
    name: of the environment.
    environment: for the library.
    shape: of one observation.
    limit: number of steps after which an episode is truncated.
  """

  name: str
  environment: bj.rl.Environment
  shape: tuple[int, ...]
  limit: int


def registered() -> Sequence[str]:
  """Names of the environments of gymnax."""
  import gymnax

  return gymnax.registered_envs


def make(name: str, *, discrete: bool = False) -> Known:
  """Makes a gymnax environment by its name.

  Args:
    name: such as CartPole-v1 or Breakout-MinAtar, or `module:Name` for a user's
      own environment, see `own_environment`.
    discrete: whether actions have to be discrete.

  Returns:
    A `Known`.

  Raises:
    SettingsError: if the name is unknown, if actions or observations are of an
      unsupported kind, or if actions are continuous instead of discrete.
    MissingDataError: if files of the environment are missing.
  """
  if ':' in name:
    known = _make_own(name)
  elif name in registered():
    known = _from_gymnax(name, *_construct(name))
  else:
    raise unknown(name, registered())
  actions = known.environment.actions
  if discrete and not isinstance(actions, int):
    raise harness.SettingsError(
      f'{name} has continuous actions of shape {actions}, but this method '
      'needs discrete ones: take CartPole-v1 for instance.'
    )
  return known


def is_compiled(name: str) -> bool:
  """Whether `make` knows an environment; the others are games in Python."""
  return ':' in name or name in registered()


def _make_own(name: str) -> Known:
  """Makes a user's own environment."""
  thing = own_environment.load(name)
  if own_environment.is_gymnax(thing):
    own_environment.check_gymnax(name, thing)
    known = _from_gymnax(name, thing, thing.default_params)
    own_environment.check(name, known.environment)
    return known
  if isinstance(thing, bj.rl.Environment):
    thing = Known(name, thing, (), own_environment.LIMIT)
  if not isinstance(thing, Known):
    raise own_environment.refuse(name, thing)
  shape = own_environment.check(name, thing.environment)
  return thing._replace(name=name, shape=shape)


def _from_gymnax(name: str, gym: Any, settings: Any) -> Known:
  """Converts an environment of gymnax with its parameters."""
  from gymnax.environments import spaces

  space = gym.action_space(settings)
  if isinstance(space, spaces.Discrete):
    actions: int | tuple[int, ...] = int(space.n)
  elif isinstance(space, spaces.Box) and len(space.shape) == 1:
    actions = tuple(space.shape)
  else:
    raise harness.SettingsError(
      f'{name} has actions of {type(space).__name__}: action_space has to '
      'return Discrete(n), or a Box of shape (n,), of '
      'gymnax.environments.spaces.'
    )
  reset = lambda key: gym.reset(key, settings)
  observation, _ = own_environment.trace_reset(name, reset)
  if not hasattr(observation, 'shape'):
    raise harness.SettingsError(f'{name} has observations of several arrays.')

  def within(action):
    if isinstance(actions, int):
      return action
    low, high = (jnp.asarray(x) for x in (space.low, space.high))
    return low + (jnp.clip(action, -1, 1) + 1) / 2 * (high - low)

  def step(key, state, action):
    after, state, reward, terminated, truncated, info = gym.step(
      key, state, within(action), settings
    )
    last = info['final_observation']
    return bj.rl.Timestep(after, state, reward, terminated, truncated, last)

  environment = bj.rl.Environment(reset, step, actions)
  limit = int(settings.max_steps_in_episode)
  return Known(name, environment, tuple(observation.shape), limit)


def _construct(name: str) -> tuple[Any, Any]:
  """Makes a gymnax environment and its parameters without a download."""
  import gymnax

  missing = [f for f in _MNIST_FILES if not (_MNIST_FOLDER / f).is_file()]
  if name == 'MNISTBandit-bsuite' and missing:
    raise harness.MissingDataError(
      f'{name} needs MNIST, which is not downloaded here: put '
      f'{", ".join(missing)} into {_MNIST_FOLDER}, or take another --env.'
    )
  # Some environments store arrays, which must not be tracers.
  with jax.ensure_compile_time_eval():
    return gymnax.make(name)


def unknown(name: str, known: Sequence[str]) -> harness.SettingsError:
  """Makes the error for an unknown name; it suggests similar names."""
  folded = {each.casefold(): each for each in known}
  near = difflib.get_close_matches(name.casefold(), folded, cutoff=0.5)
  similar = ', '.join(folded[n] for n in near)
  advice = f'did you mean {similar}?' if near else f'known: {", ".join(known)}.'
  return harness.SettingsError(f'there is no environment {name!r}; {advice}')


def padded(one: bj.rl.Environment, channels: int) -> bj.rl.Environment:
  """Pads the observations of an environment with channels of zeros."""

  def pad(observation: Any) -> Any:
    more = channels - observation.shape[-1]
    width = [(0, 0)] * (observation.ndim - 1) + [(0, more)]
    return jnp.pad(observation, width)

  def reset(key):
    observation, state = one.reset(key)
    return pad(observation), state

  def step(key, state, action):
    after = bj.rl.Timestep(*one.step(key, state, action))
    return after._replace(
      observation=pad(after.observation),
      final_observation=pad(after.final_observation),
    )

  return bj.rl.Environment(reset, step, one.actions)
