"""Stackelberg Markov games: a leader and a follower at its optimum.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024.

    python -m experiments.pbrl.stackelberg --preset=quick

Expected: 10 wins of 10 for both penalties, F 7.56 and 7.64 against 7.28.
Time: some minutes on 2 cores, most of it compilation.

Methods: the value penalty, on the gap of the follower's value; the Bellman
penalty, on the gap of its soft Bellman equation; the hypergradient through the
optimum; independent gradients, each player on its own return. The policies of
both players are tables; entropy makes the follower's optimum
unique. A method is judged by F, the leader's return at the follower's exact
optimum. The return of the current pair of policies is also reported: it exceeds
F if the penalty is too small.
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
  'independent': 'independent gradients, best rate per game',
  'independent_natural': 'independent natural gradients, best rate per game',
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Shen, Yang and Chen, section 6.

  Attributes:
    game: sizes of the paper; discount and temperature are ours.
    steps: updates of each method.
    chunk: updates between two records.
    value_penalty: first and last lambda of the value penalty.
    bellman_penalty: first and last lambda of the Bellman penalty.
    rates: step sizes of the leader, tried for each method; penalties multiply
      them by the root of lambda, natural gradients by 0.01.
    follower_rate: step size of the follower's natural steps; times tau, the
      fraction of the way to its optimum.
    tuning_seeds: number of games for tuning, which are not reported.
    seeds: number of reported games.
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


def follower_process(game: bj.rl.MarkovGame, x: Any) -> bj.rl.MDP:
  """Makes the follower's process from the leader's logits."""
  return bj.rl.induced_mdp(game, jax.nn.softmax(x), game.rewards[1], player=1)


def follower_optimum(mdp: bj.rl.MDP, temperature: float) -> bj.rl.Optimum:
  """Solves for the follower's best policy by a few Newton steps."""
  return bj.rl.optimal(mdp, temperature, tolerance=1e-4, max_iterations=12)


def leader_return(game: bj.rl.MarkovGame, x: Any, policy: Any) -> Any:
  """The leader's return for its logits and the follower's policy."""
  mdp = bj.rl.induced_mdp(game, jax.nn.softmax(x), game.rewards[0], player=1)
  return bj.rl.expected_return(mdp, policy)


def make_solver(method: str, settings: Settings, context: harness.Context):
  """Makes the solver of a method on one game."""
  game, rate = context.own, context.hyper['rate']
  process = functools.partial(follower_process, game)
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
    # Both players descend their losses from the same point.
    both = bj.oracle(
      lambda params, batch, inner: _independent(loss, below, params),
      ('upper', 'lower'),
      counts={'gradients/upper': 1, 'gradients/lower': 1},
      moves=('upper', 'lower'),
    )

    def state_visits(params):
      policy = jax.nn.softmax(params.lower)
      visits = bj.rl.state_visits(process(params.upper), policy)
      return visits / (1 - settings.game.discount)

    both = bj.rl.natural(both, state_visits)
    if method == 'independent_natural':
      # Both players have the same visits of states.
      both = bj.rl.natural(both, state_visits, of='upper')
      rate = 0.01 * rate
    return bj.descend(
      both,
      upper=optax.sgd(rate),
      lower=optax.sgd(settings.follower_rate),
    )

  def at_optimum(params, batch):
    best = follower_optimum(process(params.upper), tau)
    return -leader_return(game, params.upper, best.policy)

  return bj.descend(
    bj.gradient(at_optimum, name='upper', of='upper'), upper=optax.sgd(rate)
  )


def _independent(loss, below, params):
  f, in_x = jax.value_and_grad(loss)(params.upper, params.lower, None)
  g, in_y = jax.value_and_grad(below, 1)(params.upper, params.lower, None)
  return (f, g), params._replace(upper=in_x, lower=in_y), ()


def measure(settings: Settings, method: str, context: Any, params, state):
  """Measures the leader's returns and the follower's gap."""
  del state
  tau, mdp = (
    settings.game.temperature,
    follower_process(context.own, params.upper),
  )
  best = follower_optimum(mdp, tau)
  policy = jax.nn.softmax(params.lower)
  if method == 'hypergradient':
    policy = best.policy  # This method has no policy of the follower.
  value = bj.rl.expected_return(mdp, policy, tau)
  return {
    'leader_return': leader_return(context.own, params.upper, best.policy),
    'pair_return': leader_return(context.own, params.upper, policy),
    'follower_gap': mdp.initial @ best.values - value,
  }


def make_start(sizes: markov_games.Game) -> bj.BilevelParams:
  """Makes the logits of uniform policies."""
  tables = (jnp.zeros((sizes.states, count)) for count in sizes.actions)
  return bj.BilevelParams(*tables)


def uniform_gap(settings: Settings, seeds: tuple[int, ...]) -> np.ndarray:
  """The follower's gap at uniform policies, (seeds,)."""
  start = make_start(settings.game)

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
      lambda context: make_start(settings.game),
      own=markov_games.draw_games(settings.game, job.seeds),
      hyper=job.hyper,
    ),
    job.training(settings.steps, settings.chunk),
    harness.Measure(
      functools.partial(measure, settings, job.method),
      record_start=not job.tuning,  # A record compiles another program.
    ),
  )


def run_independent(
  options: harness.Options, method: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Runs independent gradients and selects the best rate of each game.

  Args:
    options: of the binary.
    method: one of `INDEPENDENT`.

  Returns:
    Steps of the records, and metrics (records, seeds) of the member with the
    best leader's return of each game.
  """
  settings, seeds = options.settings, options.seeds
  members, hyper = harness.members(seeds, rate=settings.rates)
  job = comparison.Job(
    method,
    tuning=False,
    hyper=hyper,
    seeds=members,
    name=method,
    settings=harness.run_settings(settings),
    options=options,
  )
  trained = train(settings, job)
  final = np.nan_to_num(trained.history['leader_return'][-1], nan=-np.inf)
  count = len(seeds)
  best = np.argmax(final.reshape(-1, count), axis=0) * count + np.arange(count)
  return trained.steps, {k: v[:, best] for k, v in trained.history.items()}


def main(options: harness.Options) -> harness.Report:
  """Tunes, runs and compares all methods."""
  settings, seeds = options.settings, options.seeds
  tuning = comparison.tuning_seeds(settings.tuning_seeds)
  tuning_gap = uniform_gap(settings, tuning)

  def score(trained):
    # A follower off its optimum costs 1.
    gap = trained.history['follower_gap'][-1]
    off = gap / np.resize(tuning_gap, len(gap)) > markov_games.NEAR
    return trained.history['leader_return'][-1] - off

  outcomes = comparison.compare(
    comparison.Rules(
      options,
      settings=harness.run_settings(settings, 'rates'),
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
  panel = lambda name, label, scale=lambda x: x, logy=False: harness.Panel(
    {TITLES[m]: (steps, scale(h[name])) for m, h in histories.items()},
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
        'follower gap / gap at uniform policies',
        lambda gap: np.maximum(gap / start, 1e-6),
        logy=True,
      ),
    ]
  )


STUDY = harness.Study(main, PRESETS)


if __name__ == '__main__':
  harness.run(STUDY)
