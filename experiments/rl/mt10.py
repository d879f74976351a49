"""MT10 of Meta-World: ten tasks of a robot arm, simulated on the host.

A rollout is the first `rollout` steps of episodes from new resets. It depends
on the parameters and a key only: the simulator has no state between rollouts,
so runs resume as usual. An episode of Meta-World has 500 steps. Shorter ones
are truncated, the critic estimates the rest, and returns and successes count
the first steps only: they are not comparable with published ones. The preset
`mt10` takes 150 steps. Needs the extra `mt10`.
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
  """The last episodes of one task, truncated after the rollout's steps.

  Attributes:
    returns: undiscounted, float32 (window,).
    success: 1 for success within these steps, else 0, float32 (window,).
    count: number of episodes so far.
  """

  returns: chex.Array
  success: chex.Array
  count: chex.Array


def _metaworld() -> Any:
  return harness.load_extra('metaworld', 'mt10', 'MT10')


class Simulators:
  """One simulator per task, and the variants of each task.

  Args:
    names: of tasks.
  """

  def __init__(self, names: Sequence[str]):
    """Compiles the models of the arm, 0.25 seconds each."""
    benchmark = _metaworld().MT10(seed=0)
    self._variants = [
      [task for task in benchmark.train_tasks if task.env_name == name]
      for name in names
    ]
    self._simulators = [benchmark.train_classes[name]() for name in names]
    # Several devices may call at once.
    self._lock = threading.Lock()

  def play(
    self, params: Any, played: Sequence[int], variants: Any, noise: Any
  ) -> tuple[np.ndarray, ...]:
    """Plays the first steps of episodes of all tasks.

    Args:
      params: arrays of the model.
      played: indices of the tasks.
      variants: index of a variant per task and episode, int (tasks, episodes).
      noise: standard normal, (tasks, steps, episodes, action).

    Returns:
      Observations (tasks, steps + 1, episodes, observation), actions, rewards
      and success (tasks, steps, episodes).
    """
    params = jax.tree.map(np.asarray, params)
    variants, noise = np.asarray(variants), np.asarray(noise)
    tasks, steps, episodes, _ = noise.shape
    observations = np.zeros(
      (tasks, steps + 1, episodes, OBSERVATION), np.float32
    )
    actions = np.zeros(noise.shape, np.float32)
    rewards = np.zeros((tasks, steps, episodes), np.float32)
    success = np.zeros_like(rewards)
    with self._lock:
      for at, task in enumerate(played):
        simulator = self._simulators[task]
        for episode in range(episodes):
          variant = self._variants[task][variants[at, episode]]
          simulator.set_task(variant)
          observation, _ = simulator.reset()
          observations[at, 0, episode] = observation
          for step in range(steps):
            observation = observations[at, step, episode]
            mean, deviation = policy(params, observation, task)
            action = mean + deviation * noise[at, step, episode]
            after, reward, _, _, info = simulator.step(np.clip(action, -1, 1))
            actions[at, step, episode] = action
            observations[at, step + 1, episode] = after
            rewards[at, step, episode] = reward
            success[at, step, episode] = info['success']
    return observations, actions, rewards, success


def policy(params: Any, observation: np.ndarray, task: int) -> tuple[Any, Any]:
  """Mean and standard deviation of the model's actions, in NumPy.

  A compiled function called from within another one can deadlock.

  Args:
    params: of `multi_task.Model`, NumPy arrays.
    observation: (observation,).
    task: index of the task.

  Returns:
    Two arrays (action,).
  """
  features = observation
  for layer in params.trunk['layers'].values():
    features = np.tanh(features @ layer['kernel'] + layer['bias'])
  heads = params.heads
  mean = features @ heads['actor']['w'][task] + heads['actor']['b'][task]
  return mean, np.exp(heads['log_deviation'][task])


# Cached per process: simulators are slow to make, and a reset clears them.
_simulators = functools.cache(Simulators)


def names() -> tuple[str, ...]:
  """Names of the ten tasks.

  Raises:
    SettingsError: if the extra is missing.
  """
  return tuple(_metaworld().env_dict.MT10_V3)


def make_tasks(chosen: Sequence[str] = ()) -> multi_task.Tasks:
  """Makes tasks of MT10.

  Args:
    chosen: names such as reach-v3; all ten if empty.

  Returns:
    The tasks.

  Raises:
    SettingsError: if a task is unknown, or if the extra is missing.
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
        f'a rollout of MT10 has at most {LONGEST} steps, the length of an '
        f'episode: got {steps}.'
      )
    axes = (len(played), steps, episodes)
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = (
      like(len(played), steps + 1, episodes, OBSERVATION),
      like(*axes, ACTION),
      like(*axes),
      like(*axes),
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
      noise = jax.random.normal(two, (*axes, ACTION), jnp.float32)
      observations, actions, rewards, success = jax.pure_callback(
        play, shapes, params, variants, noise, vmap_method='sequential'
      )
      last = jnp.arange(steps)[:, None] == steps - 1
      cut = jnp.broadcast_to(last, axes)
      rollout = bj.rl.Rollout(
        observations[:, :-1],
        actions,
        rewards,
        jnp.zeros_like(cut),
        cut,
        observations[:, 1:],
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

    def last_episodes(state):
      finished = state[1]
      return tuple(
        Finished(finished.returns[i], finished.success[i], finished.count)
        for i in range(len(played))
      )

    return bj.rl.Collector(
      init, collect, last_episodes, len(played) * steps * episodes
    )

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
