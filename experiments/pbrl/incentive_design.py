"""Incentive design: payoffs of a game whose players reach its equilibrium.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024.

    python -m experiments.pbrl.incentive_design --preset=quick

Expected: PBRL is above K = 5 on 8 of 10 games and above K = 20 on 7, not on 9;
a payoff written by hand is above all of them. Time: 7 minutes on 2 cores.

The designer sets the payoff of a zero-sum Markov game and earns its own reward
at the equilibrium of the players. The penalty is the Nikaido-Isoda function at
best responses, which take one step of policy iteration per update. The rival
differentiates K steps of learning players. Both are judged by the designer's
return at the exact equilibrium, after equal numbers of evaluated policy pairs.
The control is a payoff written by hand, which makes the designer's best pair of
actions dominant in each state.
"""

import dataclasses
import functools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import comparison
from experiments.pbrl import incentive_methods, markov_games, zero_sum

_FIRST = 100  # First reported seed; lower ones were used in development.
BY_HAND = 'control/by_hand'


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Shen, Yang and Chen, section 6.

  Attributes:
    game: our sizes.
    steps: updates of PBRL, and of the row at equal updates.
    chunk: updates between two records.
    penalty: our first and last lambda of PBRL.
    inner_steps: numbers K of the meta-gradient. The largest also runs for as
      many updates as PBRL, with K / 2 times the evaluations.
    rates: step sizes of Adam for the designer.
    inner_rates: step sizes of the players, tried with each rate: of Adam in
      PBRL, of the natural step in the meta-gradient.
    tuning_seeds: number of games for tuning, which are not reported.
    seeds: number of reported games.
  """

  game: markov_games.Game = dataclasses.field(
    default_factory=lambda: markov_games.Game(states=10, actions=(4, 4))
  )
  steps: int = 3_000
  chunk: int = 200
  penalty: tuple[float, float] = (0.1, 100.0)
  inner_steps: tuple[int, ...] = (5, 20)
  rates: tuple[float, ...] = (0.02, 0.06, 0.2, 0.6)
  inner_rates: tuple[float, ...] = (0.02, 0.06, 0.2, 0.6)
  tuning_seeds: int = 3
  seeds: int = 10


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    game=markov_games.Game(states=4, actions=(3, 3)),
    steps=200,
    inner_steps=(5,),
    rates=(0.06, 0.2),
    inner_rates=(0.06, 0.2),
    tuning_seeds=1,
    seeds=3,
  ),
  'paper': Settings(steps=12_000, chunk=800, tuning_seeds=5),
}


def payoff_by_hand(game: bj.rl.MarkovGame) -> chex.Array:
  """Makes the designer's best pair of actions dominant, without learning.

  In each state the first player pays 1/2 unless it takes the designer's best
  action, and the second player receives 1/2 if it does. These are the largest
  equal margins between 0 and 1. All states have the same value, so no player
  prefers a state.

  Args:
    game: of both players; its first reward is that of the designer.

  Returns:
    Costs of the first player, (states, actions, actions).
  """
  states, one, two, _ = game.transitions.shape
  joint = bj.rl.MDP(
    game.transitions.reshape(states, one * two, states),
    game.rewards[0].reshape(states, one * two),
    game.discount,
    game.initial,
  )
  pairs = bj.rl.optimal(joint).policy.reshape(states, one, two)
  best_a, best_b = pairs.sum(axis=2), pairs.sum(axis=1)
  return (1 - best_a[:, :, None] + best_b[:, None, :]) / 2


def measure_by_hand(
  sizes: markov_games.Game, seeds: Sequence[int]
) -> dict[str, np.ndarray]:
  """Measures `payoff_by_hand` at its equilibrium, one value per seed."""
  tau = sizes.temperature

  def one(game):
    costs = payoff_by_hand(game)
    nash = zero_sum.nash(game, costs, temperature=tau)
    loss = incentive_methods.make_problem(game, tau).upper
    return {
      # The designer's reward does not depend on the payoff.
      'upper_return_at_nash': -loss(None, nash, None),
      'nash_error': zero_sum.nash_gap(game, costs, nash, tau),
    }

  measure_all = jax.jit(lambda games: jax.lax.map(one, games))
  return jax.device_get(measure_all(draw_games(sizes, seeds)))


def draw_games(
  sizes: markov_games.Game, seeds: Sequence[int]
) -> bj.rl.MarkovGame:
  """Draws random games with the designer's reward."""
  return markov_games.draw_games(sizes, seeds, rewards=1)


def measure(settings: Settings, context: harness.Context, params, state):
  """Measures the designer's return at the equilibrium, and players' gaps."""
  del state
  game, tau = context.own, settings.game.temperature
  costs = jax.nn.sigmoid(params.upper)
  loss = incentive_methods.make_problem(game, tau).upper
  nash = zero_sum.nash(game, costs, temperature=tau)
  return {
    'upper_return_at_nash': -loss(params.upper, nash, None),
    'upper_return': -loss(params.upper, params.lower, None),
    'nash_gap': zero_sum.nash_gap(game, costs, params.lower, tau),
    'nash_error': zero_sum.nash_gap(game, costs, nash, tau),
  }


def train(settings: Settings, job: comparison.Job) -> harness.Trained:
  """Runs one job; the method's name has K and the number of updates."""
  sizes = settings.game
  steps = incentive_methods.count_updates(job.method, settings)
  make = functools.partial(incentive_methods.make_pbrl, settings)
  if job.method != 'pbrl':
    make = functools.partial(incentive_methods.make_meta, settings, job.method)

  def init(context):
    table = jnp.zeros((sizes.states, sizes.actions[0]))
    x = jax.random.normal(context.seed_key, (sizes.states, *sizes.actions))
    return bj.BilevelParams(upper=x, lower=(table, table + 0))

  # Tuning needs the end only, and each record solves for an equilibrium.
  chunk = steps
  if not job.tuning:
    chunk = max(1, round(settings.chunk * steps / settings.steps))
  return harness.train(
    make,
    harness.Task(init, own=draw_games(sizes, job.seeds), hyper=job.hyper),
    job.training(steps, chunk),
    harness.Measure(
      functools.partial(measure, settings),
      record_start=not job.tuning,  # A record compiles another program.
    ),
  )


def make_titles(settings: Settings) -> dict[str, str]:
  """Titles of the methods by name."""
  largest = max(settings.inner_steps)
  return {
    'pbrl': 'PBRL',
    **{
      f'meta_gradient/k{k}': f'meta-gradient, K = {k}'
      for k in settings.inner_steps
    },
    f'meta_gradient/k{largest}/equal_updates': (
      f'meta-gradient, K = {largest}, equal updates'
    ),
  }


COLUMNS = (
  'upper_return_at_nash',
  'upper_return',
  'gap_ratio',
  'rate',
  'inner_rate',
  'falls',
  harness.Column('lower_evaluations', 'lower evaluations'),
  harness.Column('wins_over', 'PBRL wins'),
  'trials',
  'seconds',
)


def main(options: harness.Options) -> harness.Report:
  """Tunes, runs and compares all methods."""
  settings = options.settings
  options = options._replace(seeds=tuple(_FIRST + s for s in options.seeds))
  titles = make_titles(settings)
  rules = comparison.Rules(
    options,
    settings=harness.run_settings(settings, 'rates', 'inner_rates'),
    score=lambda trained: trained.history['upper_return_at_nash'][-1],
    tuning_seeds=comparison.tuning_seeds(settings.tuning_seeds),
    widenings=1,
  )
  outcomes = comparison.compare(
    rules,
    tuple(titles),
    functools.partial(train, settings),
    {
      'rate': settings.rates,
      'inner_rate': settings.inner_rates,
      'falls': comparison.among((0.0, 1.0)),
    },
  )

  def measure_outcome(outcome):
    gap = outcome.values('nash_gap')
    updates = int(outcome.trained.steps[-1])
    return {
      'upper_return_at_nash': outcome.last('upper_return_at_nash'),
      'upper_return': outcome.last('upper_return'),
      'gap_ratio': gap[-1] / gap[0],
      'lower_evaluations': updates
      * incentive_methods.count_evaluations(outcome.method),
    }

  results = harness.Results()
  comparison.add_outcomes(results, outcomes, measure_outcome)
  fine = {m: o for m, o in outcomes.items() if not o.failure}
  by_hand = measure_by_hand(settings.game, options.seeds)
  returns = {m: o.last('upper_return_at_nash') for m, o in fine.items()}
  returns[BY_HAND] = by_hand['upper_return_at_nash']
  results.add({'method': BY_HAND}, upper_return_at_nash=returns[BY_HAND])
  _add_wins(results, returns, measure_outcome(outcomes['pbrl'])['gap_ratio'])
  worst = [o.values('nash_error').max() for o in fine.values()]
  worst.append(by_hand['nash_error'].max())
  results.add(nash_error=harness.reduced(worst, 'max'))
  return harness.Report(
    results,
    columns=COLUMNS,
    titles=titles | {BY_HAND: 'payoff by hand, no learning'},
    curves={
      titles[m]: o.values('upper_return_at_nash') for m, o in fine.items()
    },
    plots={'curves.png': _draw(fine, titles)},
    more={'seeds': options.seeds},
  )


def _add_wins(results, returns, gap_ratio):
  """Adds the games on which PBRL wins with its players at an equilibrium."""
  close = gap_ratio <= markov_games.NEAR
  for method, others in returns.items():
    at = {'method': method}
    if method == 'pbrl':
      results.note(at, {'wins_over': '-'})
      continue
    wins = int(np.sum((returns['pbrl'] > others) & close))
    results.add(at, wins_over=wins)
    results.note(at, {'wins_over': f'{wins} of {len(others)}'})


def _draw(outcomes, titles):
  def curves(metric, lowest=-np.inf):
    return {
      titles[m]: (
        incentive_methods.count_evaluations(m) * o.trained.steps,
        np.maximum(o.values(metric), lowest),
      )
      for m, o in outcomes.items()
    }

  label = 'evaluated pairs of policies'
  return harness.draw_panels(
    [
      harness.Panel(
        curves('upper_return_at_nash'), label, 'return at the equilibrium'
      ),
      harness.Panel(
        curves('nash_gap', 1e-6), label, 'gap of the current pair', logy=True
      ),
    ]
  )


STUDY = harness.Study(main, PRESETS, paper='pbrl', binary='incentive_design')


if __name__ == '__main__':
  harness.run(STUDY)
