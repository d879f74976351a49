"""A user's own environment, named as `module:Name`.

`Name` is a `bj.rl.Environment`, an `environments.Known`, an environment of
gymnax, or a class or function without arguments that returns one of these:

    --env=my_package.maze:Maze

An environment of gymnax has `default_params`, with `max_steps_in_episode`, and
the methods `reset`, `step`, `step_env` and `action_space` of gymnax 1.x;
`gymnax.environments.environment.Environment` has the first two methods.
"""

import difflib
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import bilevel_jax as bj
from experiments import harness

LIMIT = 10_000  # Steps of an episode whose environment states no limit.

_GYMNAX = ('reset', 'step_env', 'default_params')  # Members of an environment.

_KINDS = (
  'a bj.rl.Environment, an experiments.rl.environments.Known, an environment '
  'of gymnax, or a function without arguments that returns one'
)


def load(name: str) -> Any:
  """Imports the object of a name, and calls it if it is a class or function.

  Args:
    name: `module:Name`.

  Returns:
    The object.

  Raises:
    SettingsError: if the module or the name is missing, or if the import or the
      call fails.
  """
  module_name, _, attribute = name.partition(':')
  where = f'--env={name}'
  if not module_name or not attribute:
    raise harness.SettingsError(
      f'{where} lacks a part: write module:Name, such as my_package.maze:Maze.'
    )
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    if error.name and module_name.startswith(error.name):
      raise harness.SettingsError(
        f'{where}: there is no module {error.name!r}; start in its folder, or '
        'add that to PYTHONPATH.'
      ) from error
    raise harness.SettingsError(
      f'{where}: the module {module_name} imports {error.name!r}, which is '
      'not installed.'
    ) from error
  except Exception as error:
    raise harness.SettingsError(
      f'{where}: the import of {module_name} fails: {_first_line(error)}'
    ) from error
  if not hasattr(module, attribute):
    public = [each for each in vars(module) if not each.startswith('_')]
    near = difflib.get_close_matches(attribute, public, cutoff=0.5)
    advice = f'did you mean {", ".join(near)}?' if near else 'check its name.'
    raise harness.SettingsError(
      f'{where}: {module_name} has no {attribute!r}; {advice}'
    )
  thing = getattr(module, attribute)
  if isinstance(thing, type) or not (
    is_gymnax(thing) or hasattr(thing, 'step')
  ):
    if not callable(thing):
      return thing
    try:
      return thing()
    except Exception as error:
      raise harness.SettingsError(
        f'{where}: {attribute}() fails: {_first_line(error)}'
      ) from error
  return thing


def is_gymnax(thing: Any) -> bool:
  """Whether an object has the methods of an environment of gymnax."""
  return all(hasattr(thing, n) for n in _GYMNAX)


def check_gymnax(name: str, thing: Any) -> None:
  """Checks the members of an environment of gymnax.

  Args:
    name: for messages.
    thing: the environment.

  Raises:
    SettingsError: if a method or the limit of an episode is missing.
  """
  missing = [n for n in ('step', 'action_space') if not hasattr(thing, n)]
  if missing:
    raise harness.SettingsError(
      f'--env={name} lacks {" and ".join(missing)}: inherit from '
      'gymnax.environments.environment.Environment, and define it.'
    )
  if not hasattr(thing.default_params, 'max_steps_in_episode'):
    raise harness.SettingsError(
      f'--env={name}: default_params has no max_steps_in_episode: return an '
      'EnvParams of gymnax.environments.environment.'
    )


def refuse(name: str, thing: Any) -> harness.SettingsError:
  """Makes the error for an object of another kind."""
  missing = [n for n in _GYMNAX if not hasattr(thing, n)]
  lacks = ''
  if len(missing) < len(_GYMNAX):
    lacks = f' (for one of gymnax, it lacks {" and ".join(missing)})'
  return harness.SettingsError(
    f'--env={name} is {type(thing).__name__}, not an environment{lacks}: make '
    f'it {_KINDS}.'
  )


def check(name: str, environment: bj.rl.Environment) -> tuple[int, ...]:
  """Checks the shapes of an environment without running it.

  Args:
    name: for messages.
    environment: the environment.

  Returns:
    The shape of an observation.

  Raises:
    SettingsError: if reset or step fail, or return other shapes than a
      `bj.rl.Environment` has to.
  """
  where, key = f'--env={name}', jax.random.key(0)
  actions = environment.actions
  if not (isinstance(actions, int) and actions > 0) and not (
    isinstance(actions, tuple) and len(actions) == 1
  ):
    raise harness.SettingsError(
      f'{where}: actions is {actions!r}; give a number of discrete actions, or '
      'the shape (n,) of continuous ones.'
    )
  observation, state = trace_reset(name, environment.reset)
  action = jnp.zeros(actions) if isinstance(actions, tuple) else jnp.int32(0)
  after = bj.rl.Timestep(
    *_call(
      f'{where}: step(key, state, action)',
      environment.step,
      (key, state, action),
      len(bj.rl.Timestep._fields),
    )
  )
  if not hasattr(observation, 'shape'):
    raise harness.SettingsError(
      f'{where}: an observation is one array, got {type(observation).__name__}.'
    )
  like = {
    'observation': observation,
    'final_observation': observation,
    'state': state,
    'reward': jax.ShapeDtypeStruct((), jnp.float32),
    'terminated': jax.ShapeDtypeStruct((), bool),
    'truncated': jax.ShapeDtypeStruct((), bool),
  }
  for field, wanted in like.items():
    shapes = [_shapes(x) for x in (wanted, getattr(after, field))]
    if shapes[0] != shapes[1]:
      raise harness.SettingsError(
        f'{where}: step returns {field} of shape {shapes[1]}, expected '
        f'{shapes[0]}, as reset does.'
        if field in ('observation', 'final_observation', 'state')
        else f'{where}: step returns {field} of shape {shapes[1]}, expected a '
        'scalar.'
      )
  for field in ('terminated', 'truncated'):
    if getattr(after, field).dtype != bool:
      raise harness.SettingsError(
        f'{where}: step returns {field} as {getattr(after, field).dtype}, '
        'expected bool: compare, or use jnp.array(False).'
      )
  return tuple(observation.shape)


def trace_reset(name: str, reset: Callable[[jax.Array], Any]) -> Any:
  """Traces a reset.

  Args:
    name: for messages.
    reset: key -> (observation, state).

  Returns:
    The shapes of the observation and the state.

  Raises:
    SettingsError: if the call fails, or does not return two values.
  """
  what = f'--env={name}: reset(key)'
  return _call(what, reset, (jax.random.key(0),), 2)


def _call(what, function, arguments, length):
  """Traces a function that has to return a tuple of some length."""
  try:
    returned = jax.eval_shape(function, *arguments)
  except Exception as error:
    raise harness.SettingsError(
      f'{what} fails: {_first_line(error)}'
    ) from error
  if not isinstance(returned, tuple) or len(returned) != length:
    size = f'{len(returned)} values' if isinstance(returned, tuple) else 'one'
    raise harness.SettingsError(f'{what} returns {size}, expected {length}.')
  return returned


def _shapes(tree):
  shapes = jax.tree.map(lambda x: tuple(x.shape), tree)
  leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
  if jax.tree.structure(tree) == jax.tree.structure(0):
    return leaves[0] if leaves else ()
  return str(jax.tree.structure(tree)), str(shapes)


def _first_line(error: BaseException) -> str:
  lines = str(error).splitlines() or ['']
  return f'{type(error).__name__}: {lines[0]}'.rstrip(': ')
