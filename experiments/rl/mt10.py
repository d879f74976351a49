"""MT10 of Meta-World: ten tasks of a robot's arm, simulated on the host.

A rollout is the first `rollout` steps of episodes from fresh resets, so that it
is a function of the parameters and of a key: the simulator keeps nothing
between two of them, and a run resumes like any other. An episode of Meta-World
has 500 steps. With fewer the episode is cut, the critic stands for the rest,
and returns and successes are of the first steps only: they do not compare with
published ones. The preset `mt10` takes 150. Needs the extra `mt10`.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.rl import environments, multi_task

OBSERVATION, ACTION, LONGEST, VARIANTS = 39, 4, 500, 50


class Finished(NamedTuple):
  """Episodes of one task, the last ones, cut after the rollout's steps.

  Attributes:
    returns: undiscounted, float32 (window,).
    success: whether each succeeded within these steps, 0 or 1, float32
      (window,).
    count: episodes so far.
  """

  returns: chex.Array
  success: chex.Array
  count: chex.Array


def _metaworld() -> Any:
  return harness.load_extra('metaworld', 'mt10', 'MT10')


class Simulators:
  """One simulator a task, and the variants of each task.

  Args:
    names: of tasks.
  """

  def __init__(self, names: Sequence[str]):
    """Compiles the models of the arm, a quarter of a second each."""
    benchmark = _metaworld().MT10(seed=0)
    self._variants = [
      [task for task in benchmark.train_tasks if task.env_name == name]
      for name in names
    ]
    self._simulators = [benchmark.train_classes[name]() for name in names]
    # Programs on several devices may ask at once.
    self._lock = threading.Lock()

  def play(
    self, params: Any, played: Sequence[int], variants: Any, noise: Any
  ) -> tuple[np.ndarray, ...]:
    """Plays the first steps of episodes of all tasks, side by side.

    Args:
      params: of the model, arrays.
      played: indices of tasks.
      variants: of each task and episode, int (tasks, episodes).
      noise: standard normal, (tasks, steps, episodes, action).

    Returns:
      Observations (tasks, steps + 1, episodes, observation), actions, rewards
      and success (tasks, steps, episodes).
    """
    params = jax.tree.map(np.asarray, params)
    variants, noise = np.asarray(variants), np.asarray(noise)
    tasks, steps, episodes, _ = noise.shape
    seen = np.zeros((tasks, steps + 1, episodes, OBSERVATION), np.float32)
    actions = np.zeros(noise.shape, np.float32)
    rewards = np.zeros((tasks, steps, episodes), np.float32)
    success = np.zeros_like(rewards)
    with self._lock:
      for at, task in enumerate(played):
        simulator = self._simulators[task]
        for episode in range(episodes):
          variant = self._variants[task][variants[at, episode]]
          simulator.set_task(variant)
          seen[at, 0, episode], _ = simulator.reset()
          for step in range(steps):
            found = policy(params, seen[at, step, episode], task)
            mean, deviation = found
            action = mean + deviation * noise[at, step, episode]
            after, reward, _, _, info = simulator.step(np.clip(action, -1, 1))
            actions[at, step, episode] = action
            seen[at, step + 1, episode] = after
            rewards[at, step, episode] = reward
            success[at, step, episode] = info['success']
    return seen, actions, rewards, success


def policy(params: Any, observation: np.ndarray, task: int) -> tuple[Any, Any]:
  """The model's mean action and deviation, in NumPy.

  A compiled function would be called from within another one here, for which
  it can wait forever.

  Args:
    params: of `multi_task.Model`, arrays of NumPy.
    observation: (observation,).
    task: its index.

  Returns:
    Two arrays (action,).
  """
  features = observation
  for layer in params.trunk['layers'].values():
    features = np.tanh(features @ layer['kernel'] + layer['bias'])
  heads = params.heads
  mean = features @ heads['actor']['w'][task] + heads['actor']['b'][task]
  return mean, np.exp(heads['log_deviation'][task])


# Of a process: a simulator is slow to make, and forgets at each reset.
_simulators = functools.cache(Simulators)


def names() -> tuple[str, ...]:
  """The ten tasks.

  Raises:
    SettingsError: without the extra.
  """
  return tuple(_metaworld().env_dict.MT10_V3)


def make_tasks(chosen: Sequence[str] = ()) -> multi_task.Tasks:
  """Makes tasks of MT10.

  Args:
    chosen: such as reach-v3; all ten without any.

  Returns:
    The tasks.

  Raises:
    SettingsError: if a task is not there, or without the extra.
  """
  known = names()
  for name in chosen:
    if name not in known:
      raise environments.unknown(name, known)
  chosen = tuple(chosen) or known

  def collector(model, played, learning):
    del model
    steps, episodes = learning.rollout, learning.environments
    if steps > LONGEST:
      raise harness.SettingsError(
        f'an episode of MT10 has at most {LONGEST} steps, so that a rollout '
        f'has no more: got {steps}.'
      )
    each = (len(played), steps, episodes)
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = (
      like(len(played), steps + 1, episodes, OBSERVATION),
      like(*each, ACTION),
      like(*each),
      like(*each),
    )

    def init(key):
      empty = lambda: jnp.full([len(played), learning.window], jnp.nan)
      return key, Finished(empty(), empty(), jnp.zeros([], jnp.int32))

    def play(params, variants, noise):
      return _simulators(chosen).play(params, played, variants, noise)

    def collect(params, state):
      key, finished = state
      key, one, two = jax.random.split(key, 3)
      variants = jax.random.randint(one, (len(played), episodes), 0, VARIANTS)
      noise = jax.random.normal(two, (*each, ACTION), jnp.float32)
      seen, actions, rewards, success = jax.pure_callback(
        play, shapes, params, variants, noise, vmap_method='sequential'
      )
      last = jnp.arange(steps)[:, None] == steps - 1
      cut = jnp.broadcast_to(last, each)
      rollout = bj.rl.Rollout(
        seen[:, :-1], actions, rewards, jnp.zeros_like(cut), cut, seen[:, 1:]
      )
      push = lambda ring, new: jnp.concatenate([ring, new], axis=1)[
        :, -learning.window :
      ]
      after = Finished(
        push(finished.returns, rewards.sum(axis=1)),
        push(finished.success, success.max(axis=1)),
        finished.count + episodes,
      )
      return rollout, (key, after)

    def shown(state):
      finished = state[1]
      return tuple(
        Finished(finished.returns[i], finished.success[i], finished.count)
        for i in range(len(played))
      )

    return bj.rl.Collector(init, collect, shown, len(played) * steps * episodes)

  return multi_task.Tasks(
    chosen,
    (OBSERVATION,),
    (ACTION,),
    None,
    collector,
    measure=lambda finished: {
      'return': jnp.nanmean(finished.returns),
      'success': jnp.nanmean(finished.success),
    },
  )
