"""Games of MinAtar that look alike, stepped on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.rl import environments, multi_task


def make_tasks(names: Sequence[str]) -> multi_task.Tasks:
  """Makes games with as many channels each.

  Args:
    names: such as Breakout.

  Returns:
    The games; actions that one lacks are not allowed there.

  Raises:
    SettingsError: if a game is not there.
  """
  known = [environments.make(f'{n}-MinAtar', discrete=True) for n in names]
  if not known:
    raise harness.SettingsError('there is no game: name at least one.')
  channels = max(one.shape[-1] for one in known)
  games = [environments.padded(one.environment, channels) for one in known]
  counts = np.array([one.environment.actions for one in known])

  def collector(model, played, learning):
    def of(game):
      def act(params, key, observations):
        logits, _ = model.outputs(params, observations, game)
        return model.family.sample(key, logits)

      return bj.rl.rollouts(
        games[game],
        act,
        environments=learning.environments,
        steps=learning.rollout,
        window=learning.window,
      )

    collectors = [of(game) for game in played]

    def init(key):
      keys = jax.random.split(key, len(collectors))
      return tuple(c.init(k) for c, k in zip(collectors, keys))

    def collect(params, states):
      found = [c.collect(params, s) for c, s in zip(collectors, states)]
      rollouts = [rollout for rollout, _ in found]
      batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rollouts)
      return batch, tuple(state for _, state in found)

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
    measure=lambda episodes: {
      'return': bj.rl.mean_return(episodes, len(episodes.returns))
    },
  )
