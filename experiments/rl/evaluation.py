"""Evaluation of trained policies: whole episodes, with fixed parameters.

Every episode starts at a reset and is played to its end, and each counts once.
The first episodes to end of many under way would be the short ones.
"""

import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

import bilevel_jax as bj
from experiments import harness
from experiments.harness import files
from experiments.rl import games, networks

# How actions follow from a policy's outputs.
Policy = Literal['greedy', 'sampled']
Act = Callable[[Any, Any, Any], chex.Array]


class Episodes(NamedTuple):
  """Episodes of policies with fixed parameters.

  Attributes:
    returns: undiscounted sums of rewards, (..., episodes); NaN where the
      episode did not end within the limit of steps.
    lengths: in steps, (..., episodes).
  """

  returns: Any
  lengths: Any


def make_act(
  agent: networks.Agent, actions: int | tuple[int, ...], policy: Policy
) -> Act:
  """Makes the function that chooses actions.

  Args:
    agent: its networks.
    actions: of a `bj.rl.Environment`.
    policy: 'greedy' takes the likeliest action, which is the mean of a normal
      distribution; 'sampled' draws from the policy's distribution.

  Returns:
    (actor, key, observation) -> action.
  """
  distribution = bj.rl.distribution_of(actions)

  def act(actor, key, observation):
    outputs = agent.policy(actor, observation)
    if policy == 'sampled':
      return distribution.sample(key, outputs)
    return outputs[0] if isinstance(actions, tuple) else jnp.argmax(outputs)

  return act


def play(
  environment: bj.rl.Environment,
  act: Act,
  actor: Any,
  key: chex.PRNGKey,
  *,
  episodes: int,
  limit: int,
) -> Episodes:
  """Plays one episode in each of several environments, side by side.

  Args:
    environment: one of them.
    act: of `make_act`.
    actor: the policy's weights.
    key: of environments and actions.
    episodes: how many.
    limit: steps of an episode, at most.

  Returns:
    `Episodes`, (episodes,).
  """
  first, later = jax.random.split(key)

  def step(carry):
    number, observation, state, going, returns, lengths = carry
    keys = jax.random.split(jax.random.fold_in(later, number), (2, episodes))
    actions = jax.vmap(act, (None, 0, 0))(actor, keys[0], observation)
    after = bj.rl.Timestep(*jax.vmap(environment.step)(keys[1], state, actions))
    reward = after.reward.astype(returns.dtype)
    ends = jnp.logical_or(after.terminated, after.truncated)
    return (
      number + 1,
      after.observation,
      after.state,
      going & ~ends,
      returns + jnp.where(going, reward, 0),
      lengths + going,
    )

  def unfinished(carry):
    number, _, _, going, *_ = carry
    return (number < limit) & going.any()

  keys = jax.random.split(first, episodes)
  carry = (
    jnp.int32(0),
    *jax.vmap(environment.reset)(keys),
    jnp.ones(episodes, bool),
    jnp.zeros(episodes),
    jnp.zeros(episodes, jnp.int32),
  )
  # A step may give other dtypes than a reset, and never weak ones.
  cast = lambda x, like: jax.lax.convert_element_type(x, like.dtype)
  carry = jax.tree.map(cast, carry, jax.eval_shape(step, carry))
  _, _, _, going, returns, lengths = jax.lax.while_loop(unfinished, step, carry)
  return Episodes(jnp.where(going, jnp.nan, returns), lengths)


def play_game(
  game: games.Game, choose: Callable[[Any], int]
) -> tuple[float, int]:
  """Plays a game in Python until it is over, all lives included.

  Args:
    game: what is played.
    choose: observation -> action.

  Returns:
    The score and the number of actions.
  """
  observation, score, length = game.reset(), 0.0, 0
  while True:
    after = game.step(choose(observation))
    score, length = score + after.score, length + 1
    if after.game_over:
      return score, length
    observation = after.observation
    if after.terminated or after.truncated:
      observation = game.reset()


def over_episodes(returns: Any) -> harness.Interval:
  """The mean return of the seeds' policies, as far as episodes vary.

  The interval is for the mean of exactly these policies. `mean_interval` of
  the seeds' means is for what training gives on average.

  Args:
    returns: (seeds, episodes).

  Returns:
    An `Interval` of Student's t, with the variance within seeds.
  """
  returns = np.asarray(returns, np.float64)
  seeds, episodes = returns.shape
  half_width = math.nan
  if episodes > 1:
    variance = returns.var(axis=1, ddof=1).mean()
    quantile = scipy.special.stdtrit(seeds * (episodes - 1), 0.975)
    half_width = float(quantile * math.sqrt(variance / returns.size))
  count = int(np.isfinite(returns).sum())
  return harness.Interval(
    float(returns.mean()), half_width, count, returns.size
  )


def write(
  options: harness.Options,
  episodes: Episodes,
  *,
  about: Mapping[str, Any],
  updates: int,
  start: float,
) -> dict[str, float]:
  """Writes results and a table of an evaluation, apart from the training's.

  Args:
    options: what was evaluated; its settings have a `policy`.
    episodes: (seeds, episodes).
    about: the first cells of the table's row.
    updates: those before the checkpoint that was read.
    start: when the evaluation began, by `time.perf_counter`.

  Returns:
    The metrics.
  """
  policy = options.settings.policy
  folder = pathlib.Path(options.workdir) / 'evaluation' / policy
  files.make_folder(folder)
  returns = np.asarray(episodes.returns, np.float64)
  lengths = np.asarray(episodes.lengths)
  means = returns.mean(axis=1)
  seeds, within = harness.mean_interval(means), over_episodes(returns)
  metrics = {
    **seeds.metrics('evaluation_return'),
    **within.metrics('evaluation_return/episodes'),
    'worst_evaluation_return': harness.reduced(means, 'min'),
    'evaluation_length': float(lengths.mean()),
    'updates': updates,
  }
  rows = [
    f'{seed},{i},{returns[j, i]:.9g},{lengths[j, i]}\n'
    for j, seed in enumerate(options.seeds)
    for i in range(returns.shape[1])
  ]
  text = ''.join(['seed,episode,return,length\n', *rows])
  files.write_text(folder / 'episodes.csv', text)
  row = {
    **about,
    'policy': policy,
    'updates': updates,
    'seeds': len(returns),
    'episodes per seed': returns.shape[1],
    'evaluation return, interval over seeds': seeds,
    'interval over episodes': within,
    'worst seed': metrics['worst_evaluation_return'],
  }
  options = options._replace(workdir=str(folder))
  harness.write_table(folder, [row])
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=time.perf_counter() - start,
    mode='evaluate',
  )
  print(f'Results: {path}')
  return metrics
