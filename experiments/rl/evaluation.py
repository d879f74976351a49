"""Evaluates trained policies on whole episodes with fixed parameters.

Each episode starts at a reset, is played to its end and counts once. Taking the
first episodes that end would prefer short ones.
"""

import dataclasses
import itertools
import math
import pathlib
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

import bilevel_jax as bj
from experiments import harness
from experiments.harness.store import files, loading
from experiments.rl import games, networks

Policy = Literal['greedy', 'sampled']
Act = Callable[[Any, Any, Any], chex.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
  """How trained policies are evaluated.

  Attributes:
    episodes: number of whole episodes per seed.
    policy: whether actions are the likeliest ones (greedy) or sampled.
  """

  episodes: int = 100
  policy: Policy = 'greedy'


class Episodes(NamedTuple):
  """Returns and lengths of episodes.

  Attributes:
    returns: undiscounted sums of rewards, (..., episodes); NaN for episodes
      that did not end within the limit of steps.
    lengths: numbers of steps, (..., episodes).
  """

  returns: Any
  lengths: Any


def make_act(
  agent: networks.Agent, actions: int | tuple[int, ...], policy: Policy
) -> Act:
  """Makes the function that chooses actions.

  Args:
    agent: the networks.
    actions: those of a `bj.rl.Environment`.
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
  """Plays one episode in each of several environments in parallel.

  Args:
    environment: the environment.
    act: made by `make_act`.
    actor: weights of the policy.
    key: of environments and actions.
    episodes: number of episodes.
    limit: maximum number of steps.

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
  # The dtypes of a step may differ from those of a reset.
  cast = lambda x, like: jax.lax.convert_element_type(x, like.dtype)
  carry = jax.tree.map(cast, carry, jax.eval_shape(step, carry))
  _, _, _, going, returns, lengths = jax.lax.while_loop(unfinished, step, carry)
  return Episodes(jnp.where(going, jnp.nan, returns), lengths)


def separate_key(key: chex.PRNGKey) -> chex.PRNGKey:
  """Returns a key of evaluations that training does not use."""
  return jax.random.fold_in(key, zlib.crc32(b'evaluation'))


def play_checkpoint(
  workdir: Any,
  name: str,
  init: Callable[[chex.PRNGKey], Any],
  play_seed: Callable[[Any, chex.PRNGKey], Episodes],
) -> tuple[Episodes, tuple[int, ...], loading.Loaded]:
  """Plays episodes with the newest checkpoint of compiled training.

  Args:
    workdir: of the run.
    name: of the checkpoint.
    init: from a key to the params of a seed.
    play_seed: from these params and a key to their episodes.

  Returns:
    `Episodes`, (seeds, episodes), the seeds, and the checkpoint.
  """
  like = jax.eval_shape(init, jax.random.key(0))
  loaded = harness.load(workdir, name=name, like=like)
  count = len(jax.tree.leaves(loaded.params)[0])
  seeds = tuple(loaded.settings.get('train.seeds', range(count)))
  return play_seeds(loaded.params, seeds, play_seed), seeds, loaded


def play_seeds(
  params: Any,
  seeds: Sequence[int],
  play_seed: Callable[[Any, chex.PRNGKey], Episodes],
) -> Episodes:
  """Plays episodes with the params of each seed, in one compiled program.

  Args:
    params: with a leading axis of seeds.
    seeds: seeds of the keys.
    play_seed: from the params of a seed and a key to its episodes.

  Returns:
    `Episodes`, (seeds, episodes).
  """

  def run(params, seed):
    return play_seed(params, separate_key(jax.random.key(seed)))

  episodes = jax.jit(jax.vmap(run))(params, jnp.asarray(seeds, jnp.uint32))
  unfinished = np.isnan(np.asarray(episodes.returns))
  if unfinished.any():
    warnings.warn(
      f'{unfinished.sum()} of {unfinished.size} episodes did not end within '
      f'{np.asarray(episodes.lengths).max()} steps: they have no return, and '
      'neither has the mean over episodes of their seeds. Let the environment '
      'truncate episodes, see docs/recipes/reinforcement_learning.md.',
      RuntimeWarning,
      stacklevel=2,
    )
  return episodes


def chooser(act: Act, actor: Any, key: chex.PRNGKey) -> Callable[[Any], int]:
  """Makes a function observation -> action with a new key per call."""

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
  """Plays a game in Python until it is over, with all its lives.

  Args:
    game: the game.
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
  """Mean return with an interval over episodes, for these policies only.

  Use `mean_interval` of the seeds' means for an interval over training runs.

  Args:
    returns: (seeds, episodes).

  Returns:
    A Student t `Interval` from the variance within seeds.
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
  """Reports an evaluation in a folder of its own.

  Args:
    options: of the binary.
    settings: of the evaluation.
    episodes: (seeds, episodes), written to `episodes.csv`.
    seeds: seeds of the policies.
    updates: number of updates before the checkpoint.
    about: first cells of the row of the table.
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
