"""Evaluation of trained policies: whole episodes, with fixed parameters.

Every episode starts at a reset and is played to its end, and each counts once.
The first episodes to end of many under way would be the short ones.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

import bilevel_jax as bj
from experiments import harness
from experiments.harness.store import files
from experiments.rl import games, networks

# How actions follow from a policy's outputs.
Policy = Literal['greedy', 'sampled']
Act = Callable[[Any, Any, Any], chex.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
  """How trained policies are evaluated.

  Attributes:
    episodes: whole episodes that are played for each seed.
    policy: the actions: the likeliest ones (greedy) or sampled.
  """

  episodes: int = 100
  policy: Policy = 'greedy'


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
  distribution = bj.rl.action_distribution(actions)

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


def chooser(act: Act, actor: Any, key: chex.PRNGKey) -> Callable[[Any], int]:
  """Observation -> action; each call draws from a key of its own."""

  @jax.jit
  def compiled(actor, step, observation):
    return act(actor, jax.random.fold_in(key, step), observation)

  steps = itertools.count()

  def choose(observation):
    return int(compiled(actor, np.int32(next(steps)), observation))

  return choose


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


def report(
  options: harness.Options,
  settings: Settings,
  episodes: Episodes,
  *,
  seeds: Any,
  updates: int,
  about: Mapping[str, Any],
) -> harness.Report:
  """The report of an evaluation, whose folder is apart from the training's.

  Args:
    options: what the flags say.
    settings: of the evaluation.
    episodes: (seeds, episodes); kept in `episodes.csv`.
    seeds: those of the policies.
    updates: those before the checkpoint that was read.
    about: the first cells of the table's row.
  """
  folder = f'evaluation/{settings.policy}'
  returns = np.asarray(episodes.returns, np.float64)
  lengths = np.asarray(episodes.lengths)
  lines = [
    f'{seed},{i},{returns[j, i]:.9g},{lengths[j, i]}\n'
    for j, seed in enumerate(seeds)
    for i in range(returns.shape[1])
  ]
  path = files.make_folder(pathlib.Path(options.workdir) / folder)
  text = ''.join(['seed,episode,return,length\n', *lines])
  files.write_text(path / 'episodes.csv', text)
  cells = dict(about) | {'policy': settings.policy}
  over_all = {'interval': 'over_episodes'}
  results = harness.Results()
  results.note({}, cells)
  results.add(updates=updates)
  results.note({}, {'seeds': len(returns), 'episodes': returns.shape[1]})
  results.add(evaluation_return=returns.mean(axis=1))
  results.add(over_all, evaluation_return=over_episodes(returns))
  results.add(
    worst_evaluation_return=harness.reduced(returns.mean(axis=1), 'min'),
    evaluation_length=lengths.mean(),
  )
  column = harness.Column
  return harness.Report(
    results,
    rows=(),
    columns=(
      *cells,
      *('updates', 'seeds', column('episodes', 'episodes per seed')),
      column('evaluation_return', 'evaluation return, interval over seeds'),
      column('evaluation_return', 'interval over episodes', over_all),
      column('worst_evaluation_return', 'worst seed'),
    ),
    more={'mode': 'evaluate', 'seeds': seeds},
    folder=folder,
  )
