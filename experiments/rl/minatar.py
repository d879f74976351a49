"""Games of MinAtar with observations of the same shape, on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.rl import environments, multi_task


def make_tasks(names: Sequence[str]) -> multi_task.Tasks:
  """Makes games whose observations are padded to the same channels.

  Args:
    names: of games, such as Breakout.

  Returns:
    The tasks, with the actions that each game allows.

  Raises:
    SettingsError: if a game is unknown, or if there are no names.
  """
  known = [environments.make(f'{n}-MinAtar', discrete=True) for n in names]
  if not known:
    raise harness.SettingsError('no games are given: name at least one.')
  channels = max(one.shape[-1] for one in known)
  games = [environments.padded(one.environment, channels) for one in known]
  counts = np.array([one.environment.actions for one in known])

  def collector(model, played, learning):
    def make(game):
      def act(params, key, observations):
        logits, _ = model.outputs(params, observations, game)
        return bj.rl.categorical().sample(key, logits)

      return bj.rl.rollouts(
        games[game],
        act,
        environments=learning.environments,
        steps=learning.rollout,
        window=learning.window,
      )

    collectors = [make(game) for game in played]

    def init(key):
      keys = jax.random.split(key, len(collectors))
      return tuple(c.init(k) for c, k in zip(collectors, keys))

    def collect(params, states):
      pairs = [c.collect(params, s) for c, s in zip(collectors, states)]
      rollouts, states = zip(*pairs, strict=True)
      batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rollouts)
      return batch, states

    return bj.rl.Collector(
      init,
      collect,
      episodes=lambda states: tuple(state.episodes for state in states),
      steps=sum(c.steps for c in collectors),
    )

  return multi_task.Tasks(
    tuple(names),
    (*known[0].shape[:2], channels),
    int(counts.max()),
    np.arange(counts.max()) < counts[:, None],
    collector,
  )
