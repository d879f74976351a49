"""Several games of MinAtar for one policy: a shared trunk, a head a game."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.rl import environments, networks

# Of an action that a game does not have: as good as never.
_NEVER = -1e9


class Games(NamedTuple):
  """Games with what all of them fit into.

  Attributes:
    names: of the games.
    environments: of each, with channels of zeros for those it lacks.
    shape: of an observation of any of them.
    actions: the largest number.
    allowed: which of them each game has, bool (games, actions).
  """

  names: tuple[str, ...]
  environments: tuple[bj.rl.Environment, ...]
  shape: tuple[int, ...]
  actions: int
  allowed: np.ndarray


def make_games(names: Sequence[str]) -> Games:
  """Makes games that look alike.

  Args:
    names: such as Breakout.

  Returns:
    The games.

  Raises:
    SettingsError: if a game is not there.
  """
  known = [environments.make(f'{n}-MinAtar', discrete=True) for n in names]
  if not known:
    raise harness.SettingsError('there is no game: name at least one.')
  channels = max(one.shape[-1] for one in known)
  counts = np.array([one.environment.actions for one in known])
  return Games(
    tuple(names),
    tuple(environments.padded(one.environment, channels) for one in known),
    (*known[0].shape[:2], channels),
    int(counts.max()),
    np.arange(counts.max()) < counts[:, None],
  )


class Model(NamedTuple):
  """One network for all games.

  Attributes:
    games: the games.
    trunk: from an observation to features.
  """

  games: Games
  trunk: networks.Network

  def init(self, key: chex.PRNGKey) -> Any:
    """Sequences `trunk`, and `heads` with an axis of games."""
    one, two = jax.random.split(key)
    units, count = self._units(), len(self.games.names)

    def head(key, outputs, scale):
      start = jax.nn.initializers.orthogonal(scale)
      keys = jax.random.split(key, count)
      weights = jax.vmap(lambda k: start(k, (units, outputs)))(keys)
      return {'w': weights, 'b': jnp.zeros([count, outputs])}

    actor, critic = jax.random.split(two)
    heads = {
      'actor': head(actor, self.games.actions, 0.01),
      'critic': head(critic, 1, 1.0),
    }
    return bj.sequences(trunk=self.trunk.init(one), heads=heads)

  def outputs(self, params: Any, observations: chex.Array, game: Any) -> Any:
    """Logits (n, actions) and values (n,) of observations of one game."""
    features = jax.vmap(self.trunk.apply, (None, 0))(params.trunk, observations)
    of = lambda head: features @ head['w'][game] + head['b'][game]
    allowed = jnp.asarray(self.games.allowed)[game]
    logits = jnp.where(allowed, of(params.heads['actor']), _NEVER)
    return logits, of(params.heads['critic'])[:, 0]

  def _units(self):
    like = jax.eval_shape(self.trunk.init, jax.random.key(0))
    picture = jnp.zeros(self.games.shape)
    return jax.eval_shape(self.trunk.apply, like, picture).shape[0]


def make_model(games: Games) -> Model:
  """The network of one game, without its last layer, for several."""
  body = networks.body(games.shape)
  return Model(games, networks.network(games.shape, 0, **body))


class Learning(NamedTuple):
  """What is the same for all methods.

  Attributes:
    environments: of each game.
    rollout: steps of each in an update.
    discount: of rewards.
    decay: of generalised advantages.
    entropy: weight of the policy's entropy.
    critic: weight of the critic's loss.
    window: episodes of each game that are remembered.
  """

  environments: int
  rollout: int
  discount: float = 0.99
  decay: float = 0.95
  entropy: float = 0.01
  critic: float = 0.5
  window: int = 100


def make_oracle(
  model: Model,
  aggregator: Any,
  learning: Learning,
  *,
  key: Any,
  games: Sequence[int] | None = None,
) -> bj.oracles.Oracle:
  """The aggregated gradient of the games' losses, each on its own rollout.

  Args:
    model: of all games.
    aggregator: of as many objectives as there are games.
    learning: what is the same for all methods.
    key: of environments and actions.
    games: indices of those that are played; None for all.

  Returns:
    An oracle whose `bj.outputs` has the episodes of each game.
  """
  played = tuple(range(len(model.games.names)) if games is None else games)
  family = bj.rl.categorical()

  def collector_of(game):
    def act(params, key, observations):
      logits, _ = model.outputs(params, observations, game)
      return family.sample(key, logits)

    return bj.rl.rollouts(
      model.games.environments[game],
      act,
      environments=learning.environments,
      steps=learning.rollout,
      window=learning.window,
    )

  collectors = [collector_of(game) for game in played]

  def collect(params, states):
    found = [c.collect(params, s) for c, s in zip(collectors, states)]
    rollouts = [rollout for rollout, _ in found]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rollouts)
    return batch, tuple(state for _, state in found)

  together = bj.rl.Collector(
    init=lambda key: tuple(
      c.init(k) for c, k in zip(collectors, jax.random.split(key, len(played)))
    ),
    collect=collect,
    episodes=lambda states: tuple(state.episodes for state in states),
    steps=sum(c.steps for c in collectors),
  )

  def loss(params, rollout, index):
    game, lead = jnp.asarray(played)[index], rollout.rewards.shape
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    logits, values = model.outputs(params, flat(rollout.observations), game)
    _, ahead = model.outputs(params, flat(rollout.next_observations), game)
    actor, critic, entropy = bj.rl.actor_critic_losses(
      logits.reshape(*lead, -1),
      values.reshape(lead),
      ahead.reshape(lead),
      rollout,
      distribution=family,
      advantages=bj.rl.Advantages(
        learning.discount, learning.decay, normalise=True
      ),
    )
    return actor + learning.critic * critic - learning.entropy * entropy

  names = [model.games.names[game] for game in played]
  rows = bj.multi_objective(loss, names, rest=('heads',), per_task=True)
  return bj.rl.on_policy(
    bj.oracles.aggregated(rows, aggregator), together, key=key
  )
