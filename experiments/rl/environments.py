"""gymnax environments as those of the library, truncation apart.

gymnax 1.x tells termination from truncation, and gives the observation before
its reset as `info['final_observation']`. Continuous actions are mapped from
[-1, 1] to the environment's range, beyond which they are clipped. gymnax
starts XLA when it is imported, so that functions here import it.
"""

import difflib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import bilevel_jax as bj
from experiments import harness

# Where gymnax looks for MNIST before it downloads it.
_MNIST_FOLDER = pathlib.Path('/tmp/mnist')
_MNIST_FILES = (
  'train-images-idx3-ubyte.gz',
  'train-labels-idx1-ubyte.gz',
  't10k-images-idx3-ubyte.gz',
  't10k-labels-idx1-ubyte.gz',
)


class Known(NamedTuple):
  """An environment with what a network has to know of it.

  Attributes:
    name: of the environment.
    environment: as the library takes it.
    shape: of one observation.
    limit: steps after which an episode is truncated.
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
    name: such as CartPole-v1 or Breakout-MinAtar.
    discrete: whether the method that asks needs discrete actions.

  Returns:
    A `Known`.

  Raises:
    SettingsError: if there is none of that name, if its actions or
      observations are of an unknown kind, or if they are continuous where they
      are to be discrete.
    MissingDataError: if the environment reads files that are not there.
  """
  from gymnax.environments import spaces

  known = registered()
  if name not in known:
    raise unknown(name, known)
  gym, settings = _construct(name)
  space = gym.action_space(settings)
  if isinstance(space, spaces.Discrete):
    actions: int | tuple[int, ...] = int(space.n)
  elif isinstance(space, spaces.Box) and len(space.shape) == 1:
    actions = tuple(space.shape)
  else:
    raise harness.SettingsError(f'{name} has actions of the kind {space}.')
  if discrete and not isinstance(actions, int):
    raise harness.SettingsError(
      f'{name} has continuous actions of shape {actions}, and this method '
      'needs discrete ones: take CartPole-v1 for instance.'
    )
  observation, _ = jax.eval_shape(
    lambda key: gym.reset(key, settings), jax.random.key(0)
  )
  if not hasattr(observation, 'shape'):
    raise harness.SettingsError(f'{name} has observations of several parts.')

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

  reset = lambda key: gym.reset(key, settings)
  environment = bj.rl.Environment(reset, step, actions)
  limit = int(settings.max_steps_in_episode)
  return Known(name, environment, tuple(observation.shape), limit)


def _construct(name: str) -> tuple[Any, Any]:
  """Makes a gymnax environment and its parameters, without a download."""
  import gymnax

  missing = [f for f in _MNIST_FILES if not (_MNIST_FOLDER / f).is_file()]
  if name == 'MNISTBandit-bsuite' and missing:
    raise harness.MissingDataError(
      f'{name} needs a download of MNIST, which is not done here: put '
      f'{", ".join(missing)} into {_MNIST_FOLDER}, or take another --env.'
    )
  # Some keep arrays of their own: as tracers they could not leave the trace.
  with jax.ensure_compile_time_eval():
    return gymnax.make(name)


def unknown(name: str, known: Sequence[str]) -> harness.SettingsError:
  """The error for a name that is none of those known, with the nearest."""
  folded = {each.casefold(): each for each in known}
  near = difflib.get_close_matches(name.casefold(), folded, cutoff=0.5)
  found = ', '.join(folded[n] for n in near)
  said = f'did you mean {found}?' if near else f'known: {", ".join(known)}.'
  return harness.SettingsError(f'there is no environment {name!r}; {said}')


def padded(one: bj.rl.Environment, channels: int) -> bj.rl.Environment:
  """The environment with zeros for further channels of its observations."""

  def pad(observation: Any) -> Any:
    more = channels - observation.shape[-1]
    width = [(0, 0)] * (observation.ndim - 1) + [(0, more)]
    return jnp.pad(observation, width)

  def reset(key):
    observation, state = one.reset(key)
    return pad(observation), state

  def step(key, state, action):
    found = bj.rl.Timestep(*one.step(key, state, action))
    return found._replace(
      observation=pad(found.observation),
      final_observation=pad(found.final_observation),
    )

  return bj.rl.Environment(reset, step, one.actions)
