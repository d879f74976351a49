"""Incentive design: a payoff table for two players who play its equilibrium.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024.

    python -m experiments.pbrl.incentive_design --preset=quick

Expected: PBRL above K = 5 on 8 of 10 games and above K = 20 on 7, not on 9; a
payoff written by hand is above all of them.
Time: 7 minutes on 2 cores.

The designer sets the payoff of a zero-sum Markov game and collects a reward of
its own where the players are at the equilibrium. The penalty is the function of
Nikaido and Isoda, at best responses that are tables of their own, one step of
policy iteration an update. The other method differentiates K steps of players
who learn from each other. Both are judged by the designer's return at the exact
equilibrium of their payoff, at equal numbers of evaluated pairs of policies.
The control is a payoff written by hand, without any learning: it makes the
designer's best pair of actions dominant in each state.
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

_FIRST = 100  # Seeds from here on are reported: those below were looked at.
BY_HAND = 'control/by_hand'


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Shen, Yang and Chen, section 6.

  Attributes:
    game: sizes, ours.
    steps: updates of PBRL, and of the row at equal updates.
    chunk: of those.
    penalty: the first and the last lambda of PBRL, ours.
    inner_steps: K, of the meta-gradient. The largest is also run for as many
      updates as PBRL: K / 2 times the evaluations.
    rates: of Adam, for the designer.
    inner_rates: of the players, tried with each of the rates: of Adam in PBRL,
      a share of the way to the other's answer where they learn.
    tuning_seeds: games that rates are chosen on, none of them reported.
    seeds: games that are reported.
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
  """Makes the designer's best pair of actions dominant, without any learning.

  In each state the first player pays 1/2 for another action than the designer's
  best one, and the second player is paid 1/2 for the designer's best one. These
  are the largest equal margins within 0 and 1, and as all states have the same
  value, no player has a reason to prefer one state to another.

  Args:
    game: of both players; its first reward is the designer's.

  Returns:
    Costs of the first player, (states, actions, actions).
  """
  states, one, two, _ = game.transitions.shape
  together = bj.rl.MDP(
    game.transitions.reshape(states, one * two, states),
    game.rewards[0].reshape(states, one * two),
    game.discount,
    game.initial,
  )
  pairs = bj.rl.optimal(together).policy.reshape(states, one, two)
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
    loss = incentive_methods.problem_of(game, tau).upper
    return {
      # The designer's reward depends on the players alone.
      'upper_return_at_nash': -loss(None, nash, None),
      'nash_error': zero_sum.nash_gap(game, costs, nash, tau),
    }

  measure_all = jax.jit(lambda games: jax.lax.map(one, games))
  return jax.device_get(measure_all(draw_games(sizes, seeds)))


def draw_games(
  sizes: markov_games.Game, seeds: Sequence[int]
) -> bj.rl.MarkovGame:
  """Random games, whose reward is the designer's."""
  return markov_games.draw_games(sizes, seeds, rewards=1)


def measure(settings: Settings, context: harness.Context, params, state):
  """The designer's return at the exact equilibrium, and the players' gap."""
  del state
  game, tau = context.own, settings.game.temperature
  costs = jax.nn.sigmoid(params.upper)
  loss = incentive_methods.problem_of(game, tau).upper
  best = zero_sum.nash(game, costs, temperature=tau)
  return {
    'upper_return_at_nash': -loss(params.upper, best, None),
    'upper_return': -loss(params.upper, params.lower, None),
    'nash_gap': zero_sum.nash_gap(game, costs, params.lower, tau),
    'nash_error': zero_sum.nash_gap(game, costs, best, tau),
  }


def train(settings: Settings, job: comparison.Job) -> harness.Trained:
  """Runs one job; the method's name says K and the number of updates."""
  sizes = settings.game
  steps = incentive_methods.updates_of(job.method, settings)
  make = functools.partial(incentive_methods.make_pbrl, settings)
  if job.method != 'pbrl':
    make = functools.partial(incentive_methods.make_meta, settings, job.method)

  def init(context):
    table = jnp.zeros((sizes.states, sizes.actions[0]))
    x = jax.random.normal(context.seed_key, (sizes.states, *sizes.actions))
    return bj.BilevelParams(upper=x, lower=(table, table + 0))

  # What is tuned by is the end; a record finds an equilibrium.
  chunk = steps
  if not job.tuning:
    chunk = max(1, round(settings.chunk * steps / settings.steps))
  return harness.train(
    make,
    harness.Task(init, own=draw_games(sizes, job.seeds), hyper=job.hyper),
    job.training(steps, chunk),
    harness.Measure(
      functools.partial(measure, settings),
      record_start=not job.tuning,  # To record is a program of its own.
    ),
  )


def titles_of(settings: Settings) -> dict[str, str]:
  """Names of the runs, with what the table calls them."""
  largest = max(settings.inner_steps)
  return {
    'pbrl': 'PBRL',
    **{
      f'meta_gradient/k{k}': f'meta-gradient, K = {k}'
      for k in settings.inner_steps
    },
    f'meta_gradient/k{largest}/equal_updates': (
      f'the same, K = {largest}, equal updates'
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
  """Tunes and runs all methods."""
  settings = options.settings
  options = options._replace(seeds=tuple(_FIRST + s for s in options.seeds))
  titles = titles_of(settings)
  rules = comparison.Rules(
    options,
    settings=harness.settings_of(settings, 'rates', 'inner_rates'),
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

  def measure_of(outcome):
    gap = outcome.values('nash_gap')
    updates = int(outcome.trained.steps[-1])
    return {
      'upper_return_at_nash': outcome.last('upper_return_at_nash'),
      'upper_return': outcome.last('upper_return'),
      'gap_ratio': gap[-1] / gap[0],
      'lower_evaluations': updates
      * incentive_methods.evaluations_of(outcome.method),
    }

  results = harness.Results()
  comparison.add_outcomes(results, outcomes, measure_of)
  fine = {m: o for m, o in outcomes.items() if not o.failure}
  by_hand = measure_by_hand(settings.game, options.seeds)
  returns = {m: o.last('upper_return_at_nash') for m, o in fine.items()}
  returns[BY_HAND] = by_hand['upper_return_at_nash']
  results.add({'method': BY_HAND}, upper_return_at_nash=returns[BY_HAND])
  _add_wins(results, returns, measure_of(outcomes['pbrl'])['gap_ratio'])
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
  """Games on which PBRL, its players at an equilibrium, is above a method."""
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
        incentive_methods.evaluations_of(m) * o.trained.steps,
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
