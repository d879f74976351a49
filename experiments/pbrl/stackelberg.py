"""Stackelberg Markov games: a leader against a follower at its optimum.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024.

    python -m experiments.pbrl.stackelberg --preset=quick

Expected: 10 wins of 10 for both penalties, F 7.56 and 7.64 against 7.28.
Time: some minutes on 2 cores, most of it compilation.

Both players' policies are tables, the follower's best one is unique by its
entropy. A method is judged by its leader: F is what the leader's policy is
worth where the follower plays its exact optimum, whatever the method believes
that the follower does. What the current pair of policies is worth is reported
beside: a penalty that is too small lets it run ahead of F.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import comparison
from experiments.pbrl import markov_games

METHODS = ('value_penalty', 'bellman_penalty', 'hypergradient')
INDEPENDENT = ('independent', 'independent_natural')
TITLES = {
  'value_penalty': 'value penalty',
  'bellman_penalty': 'Bellman penalty',
  'hypergradient': 'hypergradient through the optimum',
  'independent': 'independent, best rate of each game',
  'independent_natural': 'the same, natural gradients',
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Shen, Yang and Chen, section 6.

  Attributes:
    game: the paper's sizes; its discount and temperature are ours.
    steps: updates of each method.
    chunk: updates between two records.
    value_penalty: the first and the last lambda of the value penalty.
    bellman_penalty: the first and the last lambda of the Bellman penalty.
    rates: of the leader's steps, tried for each method; of a penalty times
      the root of lambda, of natural gradients times 0.01.
    follower_rate: of the follower's natural steps, times tau a share of the
      way to its optimum.
    tuning_seeds: games that rates are chosen on, none of them reported.
    seeds: games that are reported.
  """

  game: markov_games.Game = dataclasses.field(default_factory=markov_games.Game)
  steps: int = 300
  chunk: int = 10
  value_penalty: tuple[float, float] = (3.0, 100.0)
  bellman_penalty: tuple[float, float] = (20.0, 300.0)
  rates: tuple[float, ...] = (4.0, 16.0, 64.0, 256.0)
  follower_rate: float = 3.0
  tuning_seeds: int = 3
  seeds: int = 10


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    game=markov_games.Game(states=10, actions=(3, 3)),
    steps=100,
    rates=(4.0, 16.0, 64.0),
    tuning_seeds=2,
    seeds=3,
  ),
  'paper': Settings(steps=2_000, chunk=50, tuning_seeds=10),
}


def process_of(game: bj.rl.MarkovGame, x: Any) -> bj.rl.MDP:
  """What the follower faces: the leader's logits in rewards and transitions."""
  return bj.rl.induced_mdp(game, jax.nn.softmax(x), game.rewards[1], player=1)


def optimum_of(mdp: bj.rl.MDP, temperature: float) -> bj.rl.Optimum:
  """The follower's best policy; a few of Newton's steps reach rounding."""
  return bj.rl.optimal(mdp, temperature, tolerance=1e-4, max_iterations=12)


def leader_return(game: bj.rl.MarkovGame, x: Any, policy: Any) -> Any:
  """What a pair is worth to the leader, from its logits and a policy."""
  mdp = bj.rl.induced_mdp(game, jax.nn.softmax(x), game.rewards[0], player=1)
  return bj.rl.expected_return(mdp, policy)


def make_solver(method: str, settings: Settings, context: harness.Context):
  """The solver of a method on one game."""
  game, rate = context.own, context.hyper['rate']
  process = functools.partial(process_of, game)
  tau = settings.game.temperature
  below = bj.rl.follower_loss(process, temperature=tau)

  def loss(x, y, batch):
    return -leader_return(game, x, jax.nn.softmax(y))

  if method.endswith('_penalty'):
    penalty = markov_games.rising(*getattr(settings, method), settings.steps)
    return bj.solvers.pbrl(
      loss,
      process,
      temperature=tau,
      penalty=penalty,
      upper=optax.sgd(lambda count: rate * jnp.sqrt(penalty(count))),
      lower=optax.sgd(settings.follower_rate),
      gap=bj.solvers.PolicyGap(method.removesuffix('_penalty')),
    )
  if method in INDEPENDENT:
    # Each player descends its own loss, from one point.
    both = bj.oracle(
      lambda params, batch, inner: _independent(loss, below, params),
      ('upper', 'lower'),
      counts={'gradients/upper': 1, 'gradients/lower': 1},
      moves=('upper', 'lower'),
    )

    def seen(params):
      policy = jax.nn.softmax(params.lower)
      visits = bj.rl.state_visits(process(params.upper), policy)
      return visits / (1 - settings.game.discount)

    both = bj.rl.natural(both, seen)
    if method == 'independent_natural':
      # The states, and so their visits, are the same for both players.
      both, rate = bj.rl.natural(both, seen, of='upper'), 0.01 * rate
    return bj.descend(
      both,
      upper=optax.sgd(rate),
      lower=optax.sgd(settings.follower_rate),
    )

  def at_optimum(params, batch):
    best = optimum_of(process(params.upper), tau)
    return -leader_return(game, params.upper, best.policy)

  return bj.descend(
    bj.gradient(at_optimum, name='upper', of='upper'), upper=optax.sgd(rate)
  )


def _independent(loss, below, params):
  f, in_x = jax.value_and_grad(loss)(params.upper, params.lower, None)
  g, in_y = jax.value_and_grad(below, 1)(params.upper, params.lower, None)
  return (f, g), params._replace(upper=in_x, lower=in_y), ()


def measure(settings: Settings, method: str, context: Any, params, state):
  """Returns of the leader, and how far the follower is from its optimum."""
  del state
  tau, mdp = settings.game.temperature, process_of(context.own, params.upper)
  best = optimum_of(mdp, tau)
  policy = jax.nn.softmax(params.lower)
  if method == 'hypergradient':
    policy = best.policy  # It has no policy of its own.
  worth = bj.rl.expected_return(mdp, policy, tau)
  return {
    'leader_return': leader_return(context.own, params.upper, best.policy),
    'pair_return': leader_return(context.own, params.upper, policy),
    'follower_gap': mdp.initial @ best.values - worth,
  }


def start_of(sizes: markov_games.Game) -> bj.BilevelParams:
  """Logits of uniform policies."""
  tables = (jnp.zeros((sizes.states, count)) for count in sizes.actions)
  return bj.BilevelParams(*tables)


def uniform_gap(settings: Settings, seeds: tuple[int, ...]) -> np.ndarray:
  """The follower's gap where both players' policies are uniform, (seeds,)."""
  start = start_of(settings.game)

  def gap(game):
    context = harness.Context((), game, (), None, None, 0)
    return measure(settings, '', context, start, ())['follower_gap']

  games = markov_games.draw_games(settings.game, seeds)
  return np.asarray(jax.jit(jax.vmap(gap))(games))


def train(settings: Settings, job: comparison.Job) -> harness.Trained:
  """Runs one job of the comparison."""
  return harness.train(
    lambda context: make_solver(job.method, settings, context),
    harness.Task(
      lambda context: start_of(settings.game),
      own=markov_games.draw_games(settings.game, job.seeds),
      hyper=job.hyper,
    ),
    job.training(settings.steps, settings.chunk),
    harness.Measure(
      functools.partial(measure, settings, job.method),
      record_start=not job.tuning,  # To record is a program of its own.
    ),
  )


def run_independent(
  options: harness.Options, method: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Independent gradients at all rates, and the best rate of each game.

  Args:
    options: what the flags say.
    method: one of `INDEPENDENT`.

  Returns:
    The steps of the records, and metrics (records, seeds) of the member with
    the best leader's return of each game.
  """
  settings, seeds = options.settings, options.seeds
  members, hyper = harness.members(seeds, rate=settings.rates)
  job = comparison.Job(
    method,
    tuning=False,
    hyper=hyper,
    seeds=members,
    name=method,
    settings=harness.settings_of(settings),
    options=options,
  )
  trained = train(settings, job)
  final = np.nan_to_num(trained.history['leader_return'][-1], nan=-np.inf)
  count = len(seeds)
  best = np.argmax(final.reshape(-1, count), axis=0) * count + np.arange(count)
  return trained.steps, {k: v[:, best] for k, v in trained.history.items()}


def main(options: harness.Options) -> harness.Report:
  """Tunes and runs all methods."""
  settings, seeds = options.settings, options.seeds
  tuning = comparison.tuning_seeds(settings.tuning_seeds)
  tuning_gap = uniform_gap(settings, tuning)

  def score(trained):
    # A leader whose follower is elsewhere has no return to speak of.
    gap = trained.history['follower_gap'][-1]
    off = gap / np.resize(tuning_gap, len(gap)) > markov_games.NEAR
    return trained.history['leader_return'][-1] - off

  outcomes = comparison.compare(
    comparison.Rules(
      options,
      settings=harness.settings_of(settings, 'rates'),
      score=score,
      tuning_seeds=tuning,
    ),
    METHODS,
    functools.partial(train, settings),
    {'rate': settings.rates},
  )
  histories = {
    m: {k: o.values(k) for k in o.trained.history}
    for m, o in outcomes.items()
    if not o.failure
  }
  others = {}
  for method in INDEPENDENT:
    steps, others[method] = run_independent(options, method)
  rival = np.max([h['leader_return'][-1] for h in others.values()], axis=0)
  at_start = uniform_gap(settings, seeds)
  results = harness.Results()
  comparison.add_outcomes(results, outcomes, lambda outcome: {})
  for method, history in (histories | others).items():
    at = {'method': method}
    final, gap = history['leader_return'][-1], history['follower_gap'][-1]
    results.add(
      at,
      leader_return=final,
      pair_return=history['pair_return'][-1],
      gap_ratio=gap / at_start,
    )
    if method in others:
      results.note(at, {'wins': '-', 'rate': 'best of each game'})
      continue
    wins = int(np.sum((gap / at_start <= markov_games.NEAR) & (final > rival)))
    results.add(at, wins=wins)
    results.note(at, {'wins': f'{wins} of {len(seeds)}'})
  results.add({'method': 'independent_best'}, leader_return=rival)
  return harness.Report(
    results,
    columns=('leader_return', 'pair_return', 'gap_ratio', 'wins', 'rate'),
    curves={m: h['leader_return'] for m, h in (histories | others).items()},
    plots={'curves.png': _draw(steps, histories | others, at_start)},
  )


def _draw(steps, histories, start):
  panel = lambda name, label, of=lambda x: x, logy=False: harness.Panel(
    {TITLES[m]: (steps, of(h[name])) for m, h in histories.items()},
    'updates',
    label,
    logy=logy,
  )
  return harness.draw_panels(
    [
      panel('leader_return', 'leader return at the exact optimum'),
      panel('pair_return', 'leader return of the current pair'),
      panel(
        'follower_gap',
        'follower gap, of that at uniform policies',
        lambda gap: np.maximum(gap / start, 1e-6),
        logy=True,
      ),
    ]
  )


STUDY = harness.Study(main, PRESETS, paper='pbrl', binary='stackelberg')


if __name__ == '__main__':
  harness.run(STUDY)
