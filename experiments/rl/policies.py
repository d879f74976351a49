"""Stores policies in files, plays them and draws episodes as GIFs."""

import io
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import bilevel_jax as bj
from experiments import harness
from experiments.harness.data import json_values, reading
from experiments.harness.store import files
from experiments.harness.study import films
from experiments.rl import drawing, environments, games, networks


class Policy(NamedTuple):
  """A trained policy.

  Attributes:
    env: name of the environment.
    actor: weights.
    about: plain values, such as the return of its training.
  """

  env: str
  actor: Any
  about: dict[str, Any]


def save(path: files.Path, policy: Policy) -> pathlib.Path:
  """Writes a policy to a file.

  Args:
    path: of the file, ends in .npz.
    policy: the policy.

  Returns:
    The path.
  """
  leaves = {
    f'{i:03}': np.asarray(x)
    for i, x in enumerate(jax.tree.leaves(policy.actor))
  }
  about = json.dumps({'env': policy.env, **policy.about})
  content = io.BytesIO()
  np.savez_compressed(content, about=np.array(about), **leaves)
  files.write_bytes(path, content.getvalue())
  return pathlib.Path(path)


def save_best(
  path: files.Path, env: str, actors: Any, returns: Any, **about: Any
) -> pathlib.Path:
  """Writes the policy of the seed with the best return.

  Args:
    path: of the file, ends in .npz.
    env: name of the environment.
    actors: weights with a leading axis of seeds.
    returns: (seeds,), NaN for a seed that stopped.
    **about: plain values, stored with the return.
  """
  returns = np.asarray(returns)
  best = int(np.nanargmax(returns)) if np.isfinite(returns).any() else 0
  actor = jax.tree.map(lambda x: np.asarray(x[best]), actors)
  about = {'return': float(returns[best]), **about}
  return save(path, Policy(env, actor, about))


def load(path: files.Path) -> Policy:
  """Reads a policy that `save` has written.

  Args:
    path: of the file.

  Returns:
    The policy.

  Raises:
    MissingDataError: if the file is missing.
    DamagedDataError: if it has no policy.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise harness.MissingDataError(
      f'there is no policy in {path}: train one first.'
    )
  arrays = harness.read_npz(path, 'policy')
  again = 'train it again'
  if 'about' not in arrays:
    raise reading.damaged(f'{path}, about', 'the array is missing', again)
  try:
    about = json_values.parse_json(str(arrays.pop('about')))
  except ValueError as error:
    raise reading.damaged(f'{path}, about', error, again) from error
  env = about.pop('env', None) if isinstance(about, dict) else None
  if not isinstance(env, str):
    raise reading.damaged(f'{path}, about', 'it names no environment', again)
  try:
    like = _weights(env)
  except harness.SettingsError as error:
    raise reading.damaged(
      f'{path}, about',
      f'its environment cannot be made ({error})',
      'make it available, or train it again',
    ) from error
  leaves = [arrays[name] for name in sorted(arrays)]
  describe = lambda x: (x.shape, x.dtype)
  if [describe(x) for x in leaves] != [
    describe(x) for x in jax.tree.leaves(like)
  ]:
    raise reading.damaged(
      path, f'it has no weights for {reading.shorten(env)}', again
    )
  return Policy(
    env, jax.tree.unflatten(jax.tree.structure(like), leaves), about
  )


def _weights(env: str) -> Any:
  """Shapes of the weights of an environment's policy."""
  if environments.is_compiled(env):
    known = environments.make(env)
    spaces = known.shape, known.environment.actions
  else:
    game = games.make(env, np.random.default_rng(0))
    spaces = game.shape, game.actions
  agent = networks.agent(*spaces)
  return jax.eval_shape(agent.init, jax.random.key(0)).actor


def play(policy: Policy, *, key: Any, limit: int = 500) -> tuple[list, float]:
  """Plays one episode with the likeliest actions.

  Args:
    policy: for an environment of gymnax, or for a game.
    key: of the environment.
    limit: maximum number of steps.

  Returns:
    States, or screens of a game, with observations before each step; and the
    return.
  """
  if not environments.is_compiled(policy.env):
    return _play_game(policy, key, limit)
  known = environments.make(policy.env)
  environment = known.environment
  agent = networks.agent(known.shape, environment.actions)

  def advance(carry, key):
    observation, state, going, total = carry
    outputs = agent.policy(policy.actor, observation)
    continuous = isinstance(environment.actions, tuple)
    action = outputs[0] if continuous else jnp.argmax(outputs)
    step = bj.rl.Timestep(*environment.step(key, state, action))
    total = total + jnp.where(going, step.reward, 0)
    still = going & ~(step.terminated | step.truncated)
    after = (step.observation, step.state, still, total)
    cast = lambda x, like: jax.lax.convert_element_type(x, like.dtype)
    return jax.tree.map(cast, after, carry), (state, observation, going)

  def run(key):
    start, keys = jax.random.split(key)
    carry = (*environment.reset(start), jnp.array(True), jnp.float32(0))
    carry = jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), carry)
    # The dtypes of a step may be wider than those of a reset.
    wide = jax.eval_shape(advance, carry, start)[0]
    carry = jax.tree.map(lambda x, y: x.astype(y.dtype), carry, wide)
    carry, states = jax.lax.scan(advance, carry, jax.random.split(keys, limit))
    return carry[-1], states

  total, (states, observations, going) = jax.device_get(jax.jit(run)(key))
  count = int(going.sum())
  at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  frames = [(at(states, i), observations[i]) for i in range(count)]
  return frames, float(total)


def _play_game(policy, key, limit):
  rng = np.random.default_rng(int(jax.random.bits(key)))
  game = games.make(policy.env, rng)
  agent = networks.agent(game.shape, game.actions)
  act = jax.jit(lambda actor, x: jnp.argmax(agent.policy(actor, x)))
  frames, total, observation = [], 0.0, game.reset()
  for _ in range(limit):
    screen = game.screen() if isinstance(game, games.Atari) else None
    frames.append((screen, observation))
    step = game.step(int(act(policy.actor, observation)))
    observation, total = step.observation, total + step.score
    if step.terminated or step.truncated:
      break
  return frames, total


def render(
  policy: Policy,
  path: files.Path,
  *,
  key: Any,
  limit: int = 500,
  frames: int = 125,
) -> float:
  """Plays an episode and writes it as a small GIF.

  Args:
    policy: the policy.
    path: of the file, ends in .gif.
    key: of the environment.
    limit: maximum number of steps.
    frames: maximum number of drawn steps, evenly spaced.

  Returns:
    The return of the episode.

  Raises:
    SettingsError: if the environment cannot be drawn.
  """
  compiled = environments.is_compiled(policy.env)
  if compiled or policy.env == 'CartPole':
    draw = drawing.painter(policy.env)
  else:
    draw = lambda screen, observation: screen
  states, total = play(policy, key=key, limit=limit)
  every = -(-len(states) // frames)
  pictures = (Image.fromarray(draw(*each)) for each in states[::every])
  # 50 steps per second.
  films.write_film(path, pictures, milliseconds=20 * every, colours=16)
  return total


def show(policy_file: files.Path) -> None:
  """Draws an episode to `policy.gif` in the folder of a policy's file.

  If the environment cannot be drawn, this prints the reason. Of several
  processes, only the first one draws.

  Args:
    policy_file: made by `save`.
  """
  if not files.is_writer():
    return
  path = pathlib.Path(policy_file).with_name('policy.gif')
  try:
    total = render(load(policy_file), path, key=jax.random.key(0))
  except harness.SettingsError as error:
    print(error)
    return
  print(f'{path}: an episode of return {total:g}.')
