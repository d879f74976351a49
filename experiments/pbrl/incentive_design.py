"""Incentive design: a designer who changes a part of the payoffs of a game.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024.

    python -m experiments.pbrl.incentive_design --preset=quick

Expected: the best penalty above incentives by hand and random search, and level
with the meta-gradient of K = 20, near the attainable bound. Time: 7 minutes on
2 cores.

Two players of a zero-sum Markov game reach its equilibrium. The designer sets a
share of their payoffs, pays a quadratic cost per expected incentive, and earns
its own reward. All methods start without incentives, evaluate equally many
pairs of policies, and are judged by the designer's return at the exact
equilibrium. The best of several runs of the exact gradient from random
incentives is the attainable bound.
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import comparison
from experiments.pbrl import incentive_methods, incentive_search, markov_games
from experiments.pbrl.incentives import METRIC, Condition, Incentives

_FIRST = 1_000  # First reported game; the first ones are for tuning.
_PART = 30  # Members of a compiled program.
CONTROLS = {
  'no_intervention': 'no intervention',
  'by_hand': 'by hand, best strength',
  'exact': 'exact gradient, best of restarts',
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Shen, Yang and Chen, section 6.

  Attributes:
    game: our sizes.
    bounds: shares b of the payoffs that the designer sets, dense reward.
    sparse_bounds: the same for a designer who earns 1 in the first state.
    cost: price that the designer pays per squared incentive.
    evaluations: evaluated pairs of policies of each method.
    records: number of measurements.
    penalty: first and last lambda.
    inner_steps: numbers K of the meta-gradient.
    rates: step sizes of Adam for the designer; its rate falls to zero.
    inner_rates: fractions of the way to their responses that the players move
      in an update of a penalty, and in a step of the meta-gradient.
    restarts: runs of the exact gradient per game.
    exact_steps: updates of the exact gradient.
    exact_rate: step size of Adam for the exact gradient.
    tuning_games: number of games for tuning, which are not reported.
    seeds: number of reported games.
  """

  game: markov_games.Game = dataclasses.field(
    default_factory=lambda: markov_games.Game(states=10, actions=(4, 4))
  )
  bounds: tuple[float, ...] = (0.1, 0.3)
  sparse_bounds: tuple[float, ...] = (0.3,)
  cost: Annotated[float, harness.Allowed(0)] = 1.0
  evaluations: int = 3_000
  records: int = 5
  penalty: tuple[float, float] = (3.0, 30.0)
  inner_steps: tuple[int, ...] = (1, 5, 20)
  rates: tuple[float, ...] = (0.1, 0.3, 1.0)
  inner_rates: tuple[float, ...] = (0.1, 0.2, 0.4)
  restarts: int = 20
  exact_steps: int = 300
  exact_rate: float = 0.3
  tuning_games: int = 10
  seeds: int = 20

  @property
  def conditions(self) -> tuple[Condition, ...]:
    """The conditions of the comparison."""
    return (
      *(Condition('dense', bound) for bound in self.bounds),
      *(Condition('sparse', bound) for bound in self.sparse_bounds),
    )

  @property
  def methods(self) -> tuple[str, ...]:
    """The methods of the comparison."""
    return (
      *incentive_methods.PENALTIES,
      *incentive_methods.meta_gradients(self.inner_steps),
      'hpgd',
      'random_search',
    )


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    game=markov_games.Game(states=4, actions=(3, 3)),
    bounds=(0.3,),
    evaluations=240,
    records=2,
    inner_steps=(5,),
    rates=(0.1, 0.3),
    inner_rates=(0.1, 0.3),
    restarts=2,
    exact_steps=60,
    tuning_games=2,
    seeds=3,
  ),
  'paper': Settings(evaluations=30_000, records=10),
}


@functools.cache
def _functions(settings: Settings, method: str):
  """The functions of a method; equal ones share a compiled program."""
  sizes = settings.game

  def init(context):
    table = jnp.zeros((sizes.states, sizes.actions[0]))
    other = jnp.zeros((sizes.states, sizes.actions[1]))
    x = jnp.zeros((sizes.states, *sizes.actions))
    if method == 'exact':
      # The first restart begins without incentives.
      restart = context.hyper['restart']
      key = jax.random.fold_in(context.seed_key, restart)
      x = jnp.where(restart > 0, jax.random.normal(key, x.shape), x)
    return bj.BilevelParams(upper=x, lower=(table, other))

  def measure(context, params, state):
    del state
    incentives = Incentives.from_context(settings, context)
    distance = incentives.equilibrium_error(params.upper, params.lower)
    return incentives.measure(params.upper) | {'players_error': distance}

  make = functools.partial(incentive_methods.make_solver, method, settings)
  return make, init, lambda context: context.key, measure


def train(
  settings: Settings, condition: Condition, job: comparison.Job
) -> harness.Trained:
  """Runs one job, in parts of equal size that share a compiled program."""
  method = job.method.partition('/')[2]
  make, init, batch, measure = _functions(settings, method)
  updates = incentive_methods.count_updates(method, settings)
  chunk = -(-updates // settings.records)
  games = condition.draw_games(settings.game, job.seeds)
  bound = np.full(len(job.seeds), condition.bound, np.float32)
  hyper = job.hyper | {'bound': bound}
  parts = []
  for start in range(0, len(job.seeds), _PART):
    # The last part repeats members.
    members = np.arange(start, start + _PART) % len(job.seeds)
    take = lambda leaf, members=members: np.asarray(leaf)[members]
    trained = harness.train(
      make,
      harness.Task(
        init,
        batch,
        own=jax.tree.map(take, games),
        hyper=jax.tree.map(take, hyper),
      ),
      job.training(
        chunk * settings.records,
        chunk,
        seeds=tuple(job.seeds[i] for i in members),
        name=f'{job.name}/part{len(parts)}',
      ),
      harness.Measure(measure),
    )
    parts.append(trained)
  joined = {
    name: np.concatenate([p.history[name] for p in parts], axis=1)
    for name in parts[0].history
  }
  return parts[0]._replace(
    params=(),
    state=(),
    history={k: v[:, : len(job.seeds)] for k, v in joined.items()},
  )


def make_grid(settings: Settings, method: str) -> comparison.Grid:
  """Makes the grid of a method; all of them have equally many points."""
  rates, others = settings.rates, settings.inner_rates
  if method == 'random_search':
    return {'rate': rates, 'changed': others}
  if method == 'hpgd':
    # Without players' rates, the designer's are finer and reach further.
    ends = np.log10([rates[0] / 3, rates[-1] * 3])
    finer = np.logspace(*ends, len(rates) * len(others))
    return {'rate': tuple(float(f'{rate:.3g}') for rate in finer)}
  return {'rate': rates, 'inner_rate': others}


def measure_bound(
  settings: Settings, condition: Condition, options: harness.Options
) -> dict[str, np.ndarray]:
  """Runs the exact gradient from several starts per game.

  Args:
    settings: of the run.
    condition: of the comparison.
    options: of the binary.

  Returns:
    Metrics (seeds,) of the best restart of each game, and `spread`, the
    difference of the restarts' best and median returns.
  """
  count = len(options.seeds)
  members, hyper = harness.members(
    options.seeds,
    restart=tuple(range(settings.restarts)),
    rate=(settings.exact_rate,),
  )
  name = f'{condition.name}/exact'
  identity = harness.run_settings(settings)
  job = comparison.Job(name, True, hyper, members, name, identity, options)
  trained = train(settings, condition, job)
  last = {k: v[-1].reshape(-1, count) for k, v in trained.history.items()}
  best = np.argmax(last[METRIC], axis=0)
  picked = {k: v[best, np.arange(count)] for k, v in last.items()}
  spread = last[METRIC].max(axis=0) - np.median(last[METRIC], axis=0)
  return picked | {'spread': spread}


def main(options: harness.Options) -> harness.Report:
  """Tunes, runs and compares all methods."""
  settings = options.settings
  options = options._replace(seeds=tuple(_FIRST + s for s in options.seeds))
  conditions = {c.name: c for c in settings.conditions}
  rules = comparison.Rules(
    options,
    settings=harness.run_settings(settings, 'rates', 'inner_rates'),
    score=lambda trained: trained.history[METRIC][-1],
    tuning_seeds=tuple(range(settings.tuning_games)),
  )
  outcomes = comparison.compare(
    rules,
    # Conditions vary fastest and share the compiled program of a method.
    [f'{name}/{m}' for m in settings.methods for name in conditions],
    lambda job: train(settings, conditions[job.method.partition('/')[0]], job),
    lambda name: make_grid(settings, name.partition('/')[2]),
  )
  results, panels, curves, worst = harness.Results(), [], {}, []
  titles = CONTROLS | {m: incentive_methods.title(m) for m in settings.methods}
  for name, condition in conditions.items():
    compared = {m: outcomes[f'{name}/{m}'] for m in settings.methods}
    controls = incentive_search.measure_controls(
      settings, condition, options.seeds
    )
    controls['exact'] = measure_bound(settings, condition, options)
    _add_condition(results, condition, compared, controls)
    fine = {m: o for m, o in compared.items() if not o.failure}
    worst += [o.last('equilibrium_error').max() for o in fine.values()]
    worst += [values['equilibrium_error'].max() for values in controls.values()]
    panels.append(_panel(settings, condition, fine, controls, titles))
    for method, outcome in fine.items():
      cells = condition.reward, f'{condition.bound:g}', titles[method]
      curves['/'.join(cells)] = outcome.values(METRIC)
  results.add(equilibrium_error=harness.reduced(worst, 'max'))
  return harness.Report(
    results,
    rows=('reward', 'bound', 'method'),
    columns=COLUMNS,
    titles=titles,
    plots={'curves.png': harness.draw_panels(panels, columns=len(panels))},
    more={'seeds': options.seeds},
  )


COLUMNS = (
  harness.Column(METRIC, 'return'),
  harness.Column('lead_over', 'lead of ours'),
  harness.Column('room_share', 'share of room'),
  'paid',
  'players_error',
  'rate',
  'inner_rate',
  'changed',
  'trials',
)


def _add_condition(results, condition, outcomes, controls):
  """Adds the numbers of a condition."""
  at = {'reward': condition.reward, 'bound': condition.bound}
  place = lambda method: {'method': method} | at
  comparison.add_outcomes(
    results,
    outcomes,
    lambda outcome: {
      METRIC: outcome.last(METRIC),
      'paid': outcome.last('paid'),
      'players_error': outcome.last('players_error'),
    },
    at,
  )
  for method, values in controls.items():
    results.put(place(method), {n: values[n] for n in (METRIC, 'paid')})
  returns = {m: o.last(METRIC) for m, o in outcomes.items() if not o.failure}
  returns |= {m: values[METRIC] for m, values in controls.items()}
  penalty = choose_penalty(outcomes)
  results.note(place(penalty), {'lead_over': 'ours'})
  low, high = returns['by_hand'], returns['exact']
  results.add(at, room=(high - low) / low)
  results.add(at, restart_spread=controls['exact']['spread'])
  for method, values in returns.items():
    # A ratio of means: the room of a single game may be small.
    share = float(np.mean(values - low) / np.mean(high - low))
    results.add(place(method), room_share=share)
    if method != penalty:
      results.add(place(method), lead_over=returns[penalty] - values)
  meta = [m for m in returns if m.startswith('meta_gradient')]
  # The best K of the reported games, in favour of the rival.
  rival = max(meta, key=lambda m: returns[m].mean())
  results.add(
    {'rival': 'meta_gradient'} | at, lead_over=returns[penalty] - returns[rival]
  )


def choose_penalty(outcomes: dict[str, comparison.Outcome]) -> str:
  """Chooses the penalty with the best return on the tuning games."""
  return max(incentive_methods.PENALTIES, key=lambda m: outcomes[m].score)


def _panel(settings, condition, outcomes, controls, titles):
  """Draws the leads over incentives by hand over evaluated pairs."""
  by_hand = controls['by_hand'][METRIC]
  start = controls['no_intervention'][METRIC] - by_hand
  curves = {
    titles[m]: (
      np.append(0, incentive_methods.count_pairs(m) * o.trained.steps),
      np.vstack([start, o.values(METRIC) - by_hand]),
    )
    for m, o in outcomes.items()
  }
  bound = controls['exact'][METRIC] - by_hand
  ends = np.array([0, settings.evaluations])
  curves[titles['exact']] = (ends, np.stack([bound, bound]))
  return harness.Panel(
    curves,
    'evaluated pairs of policies',
    'return - return by hand',
    f'{condition.reward} reward, b = {condition.bound:g}',
  )


STUDY = harness.Study(main, PRESETS)


if __name__ == '__main__':
  harness.run(STUDY)
