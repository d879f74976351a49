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
import pathlib
import time
from collections.abc import Sequence
from typing import Annotated

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness import comparison
from experiments.pbrl import stackelberg, zero_sum

_TUNING = 1_000_000  # Seeds from here on are tuned on.
_FIRST = 100  # Seeds from here on are reported: those below were looked at.
# Pairs of policies evaluated in an update: each player against the other's best
# response. A response moves by the values that the penalty is made of.
PBRL_EVALUATIONS = 2
BY_HAND = 'control/by_hand'


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Shen, Yang and Chen, section 6.

  Attributes:
    states: ours.
    actions: of each player, ours.
    discount: ours.
    temperature: of the players' entropies, ours.
    steps: updates of PBRL, and of the row at equal updates.
    chunk: of those.
    penalty: the first and the last lambda of PBRL, ours.
    inner_steps: K, of the meta-gradient.
    equal_updates: whether the largest K is also run for as many updates as
      PBRL: K / 2 times the evaluations.
    rates: of Adam, for the designer.
    inner_rates: of the players, tried with each of the rates: of Adam in PBRL,
      a share of the way to the other's answer where they learn.
    tuning_seeds: games that rates are chosen on, none of them reported.
    seeds: games that are reported.
  """

  states: int = 10
  actions: int = 4
  discount: Annotated[float, harness.Allowed(high=0.999)] = 0.9
  temperature: float = 0.1
  steps: int = 3_000
  chunk: int = 200
  penalty: tuple[float, ...] = (0.1, 100.0)
  inner_steps: tuple[int, ...] = (5, 20)
  equal_updates: bool = True
  rates: tuple[float, ...] = (0.02, 0.06, 0.2, 0.6)
  inner_rates: tuple[float, ...] = (0.02, 0.06, 0.2, 0.6)
  tuning_seeds: int = 3
  seeds: int = 10


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    states=4,
    actions=3,
    steps=200,
    inner_steps=(5,),
    rates=(0.06, 0.2),
    inner_rates=(0.06, 0.2),
    tuning_seeds=1,
    seeds=3,
  ),
  'paper': Settings(steps=12_000, chunk=800, tuning_seeds=5),
}


def problem_of(game: bj.rl.MarkovGame, tau: float) -> bj.BilevelProblem:
  """The designer's loss, and the payoff between the players."""

  def loss(x, y, batch):
    del x, batch
    a, b = zero_sum.policies_of(y)
    mdp = bj.rl.faced_by(game, a, game.rewards[0], player=1)
    return -bj.rl.expected_return(mdp, b)

  def payoff(x, y, batch):
    del batch
    return zero_sum.payoff(game, jax.nn.sigmoid(x), y, tau)

  return bj.BilevelProblem(loss, payoff)


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
  settings: Settings, seeds: Sequence[int]
) -> dict[str, np.ndarray]:
  """Measures `payoff_by_hand` at its equilibrium, one value per seed."""
  tau = settings.temperature

  def one(game):
    costs = payoff_by_hand(game)
    nash = zero_sum.nash(game, costs, temperature=tau)
    loss = problem_of(game, tau).upper
    return {
      # The designer's reward depends on the players alone.
      'upper_return_at_nash': -loss(None, nash, None),
      'nash_error': zero_sum.nash_gap(game, costs, nash, tau),
    }

  measure_all = jax.jit(lambda games: jax.lax.map(one, games))
  return jax.device_get(measure_all(games_of(settings, seeds)))


def games_of(settings: Settings, seeds: Sequence[int]) -> bj.rl.MarkovGame:
  """Random games, leaves with a leading axis of seeds."""
  games = [
    bj.rl.random_game(
      seed,
      states=settings.states,
      actions=(settings.actions, settings.actions),
      rewards=1,
      discount=settings.discount,
    )
    for seed in seeds
  ]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *games)


def make_pbrl(settings: Settings, context: harness.Context):
  """Penalty descent with the function of Nikaido and Isoda."""
  game, tau = context.own, settings.temperature
  inner = context.hyper['inner_rate']

  def faced(at):
    x, y = at
    return bj.rl.zero_sum_responses(
      game, jax.nn.sigmoid(x), zero_sum.policies_of(y), temperature=tau
    )

  return bj.descend(
    at_one_point(
      bj.oracles.nikaido_isoda(
        problem_of(game, tau),
        penalty=stackelberg.rising(*settings.penalty, settings.steps),
      ),
      bj.rl.policy_mirror_descent(
        faced, temperature=tau, at=lambda p: (p.upper, p.lower)
      ),
    ),
    upper=designer(context, settings.steps),
    lower=optax.adam(inner),
    value=bj.Sequence(optax.sgd(1.0), start=lambda params: params.lower),
  )


def designer(context: harness.Context, steps: int):
  """Adam, whose rate falls to zero by a cosine where `falls` is one."""
  rate, falls = context.hyper['rate'], context.hyper['falls']
  cosine = optax.cosine_decay_schedule(1.0, steps)
  return optax.adam(lambda count: rate * (1 - falls * (1 - cosine(count))))


def at_one_point(penalty: bj.oracles.Oracle, respond: bj.oracles.Oracle):
  """The penalty and the best responses' moves, before either has moved.

  Both are made of the values of (a, b') and (a', b), so these two pairs are all
  that an update evaluates.
  """

  def fn(params, batch, inner):
    slopes, inner = penalty.update(batch, inner, params)
    moves, _ = respond.update(batch, respond.init(params), params)
    return (), slopes._replace(value=moves.value), inner

  # The penalty's own state counts what is evaluated.
  return bj.oracle(fn, (), penalty.init, moves=('upper', 'lower', 'value'))


def make_meta(settings: Settings, method: str, context: harness.Context):
  """The gradient through K steps of players who learn."""
  game, tau = context.own, settings.temperature
  inner = context.hyper['inner_rate']
  loss = problem_of(game, tau).upper
  steps = inner_steps_of(method)

  def learned(x, y):
    def step(y, _):
      return zero_sum.learn(
        game, jax.nn.sigmoid(x), y, temperature=tau, rate=inner
      ), None

    return jax.lax.scan(step, y, length=steps)[0]

  def fn(params, batch, inner):
    def through(x):
      y = learned(x, params.lower)
      return loss(x, y, batch), y

    (value, after), slope = jax.value_and_grad(through, has_aux=True)(
      params.upper
    )
    # The players go on from where they have come to: a step of length one.
    moves = jax.tree.map(jnp.subtract, params.lower, after)
    return (value,), params._replace(upper=slope, lower=moves), inner

  oracle = bj.oracle(
    fn,
    ('upper',),
    counts={
      'gradients/upper': 1,
      'gradients/lower': steps,
      'hessian_vector_products/lower': steps,
    },
    moves=('upper', 'lower'),
  )
  upper = designer(context, updates_of(method, settings))
  return bj.descend(oracle, upper=upper, lower=optax.sgd(1.0))


def measure(settings: Settings, context: harness.Context, params, state):
  """The designer's return at the exact equilibrium, and the players' gap."""
  del state
  game, tau = context.own, settings.temperature
  costs = jax.nn.sigmoid(params.upper)
  loss = problem_of(game, tau).upper
  best = zero_sum.nash(game, costs, temperature=tau)
  return {
    'upper_return_at_nash': -loss(params.upper, best, None),
    'upper_return': -loss(params.upper, params.lower, None),
    'nash_gap': zero_sum.nash_gap(game, costs, params.lower, tau),
    'nash_error': zero_sum.nash_gap(game, costs, best, tau),
  }


def train(settings: Settings, job: comparison.Job) -> harness.Trained:
  """Runs one job; the method's name says K and the number of updates."""
  shape = (settings.states, settings.actions, settings.actions)
  steps = updates_of(job.method, settings)
  make = functools.partial(make_pbrl, settings)
  if job.method != 'pbrl':
    make = functools.partial(make_meta, settings, job.method)

  def init(context):
    table = jnp.zeros((settings.states, settings.actions))
    x = jax.random.normal(context.seed_key, shape)
    return bj.BilevelParams(upper=x, lower=(table, table + 0))

  return harness.train(
    make,
    init,
    steps=steps,
    # What is tuned by is the end; a record finds an equilibrium.
    chunk=steps
    if job.tuning
    else max(1, round(settings.chunk * steps / settings.steps)),
    own=games_of(settings, job.seeds),
    evaluate=functools.partial(measure, settings),
    record_start=not job.tuning,  # To record is a program of its own.
    **job.keywords,
  )


def inner_steps_of(method: str) -> int:
  """K, from a method's name."""
  return int(method.split('/')[1].removeprefix('k'))


def updates_of(method: str, settings: Settings) -> int:
  """As many as PBRL's, or as its evaluations of pairs allow.

  What the backward pass of the K steps costs, as much again, is not counted, in
  the meta-gradient's favour.
  """
  if method == 'pbrl' or method.endswith('/equal_updates'):
    return settings.steps
  return max(1, settings.steps * PBRL_EVALUATIONS // inner_steps_of(method))


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  if len(settings.penalty) != 2:
    raise harness.SettingsError(
      '--penalty: the first and the last penalty, got '
      f'{len(settings.penalty)} numbers.'
    )


def methods_of(settings: Settings) -> dict[str, str]:
  """Names of the runs, with what the table calls them."""
  most = max(settings.inner_steps)
  found = {
    'pbrl': 'PBRL',
    **{
      f'meta_gradient/k{k}': f'meta-gradient, K = {k}'
      for k in settings.inner_steps
    },
  }
  if settings.equal_updates:
    name = f'meta_gradient/k{most}/equal_updates'
    found[name] = f'the same, K = {most}, equal updates'
  return found


def main(options: harness.Options) -> dict[str, float]:
  """Tunes and runs all methods, and writes table, plots and results."""
  begin = time.monotonic()
  settings = options.settings
  options = options._replace(seeds=tuple(_FIRST + s for s in options.seeds))
  titles = methods_of(settings)
  rules = comparison.Rules(
    options,
    settings=harness.settings_of(
      settings, 'rates', 'inner_rates', 'equal_updates'
    ),
    score=lambda trained: trained.history['upper_return_at_nash'][-1],
    tuning_seeds=tuple(range(_TUNING, _TUNING + settings.tuning_seeds)),
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
    return {
      'upper_return_at_nash': outcome.last('upper_return_at_nash'),
      'upper_return': outcome.last('upper_return'),
      'gap_ratio': gap[-1] / gap[0],
    }

  metrics, rows = comparison.report_outcomes(outcomes, measure_of)
  ours = outcomes['pbrl'].last('upper_return_at_nash')
  close = measure_of(outcomes['pbrl'])['gap_ratio'] <= stackelberg.NEAR

  def compared(method, returns):
    """Adds PBRL's paired lead over a method; returns its wins in words."""
    wins = int(np.sum((ours > returns) & close))
    metrics[f'pbrl/wins_over_{method}'] = wins
    lead = harness.mean_interval(ours - returns)
    metrics.update(lead.metrics(f'pbrl/lead_over_{method}'))
    return f'{wins} of {len(ours)}'

  for row in rows:
    method = row['method']
    outcome = outcomes[method]
    row['method'] = titles[method]
    if outcome.failure:
      continue
    evaluations = outcome.trained.steps[-1] * (
      PBRL_EVALUATIONS if method == 'pbrl' else inner_steps_of(method)
    )
    metrics[f'{method}/lower_evaluations'] = int(evaluations)
    row['lower evaluations'] = int(evaluations)
    row['PBRL wins'] = '-'
    if method != 'pbrl':
      row['PBRL wins'] = compared(method, outcome.last('upper_return_at_nash'))
  by_hand = measure_by_hand(settings, options.seeds)
  hand_return = by_hand['upper_return_at_nash']
  interval = harness.mean_interval(hand_return)
  metrics |= interval.metrics(f'{BY_HAND}/upper_return_at_nash')
  rows.append(
    dict.fromkeys(rows[0])
    | {'method': 'payoff by hand, no learning'}
    | {'upper_return_at_nash': interval}
    | {'PBRL wins': compared(BY_HAND, hand_return)}
  )
  harness.write_table(options.workdir, rows)
  worst = [o.values('nash_error').max() for o in outcomes.values()]
  worst.append(by_hand['nash_error'].max())
  metrics['nash_error'] = harness.reduced(worst, 'max')
  _plot(pathlib.Path(options.workdir), outcomes, titles)
  harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - begin,
    curves={
      titles[m]: o.values('upper_return_at_nash') for m, o in outcomes.items()
    },
  )
  return metrics


def _plot(folder, outcomes, titles):
  def curves(metric, least=None):
    found = {}
    for method, outcome in outcomes.items():
      each = PBRL_EVALUATIONS if method == 'pbrl' else inner_steps_of(method)
      values = outcome.values(metric)
      values = values if least is None else np.maximum(values, least)
      found[titles[method]] = (each * outcome.trained.steps, values)
    return found

  label = 'evaluated pairs of policies'
  harness.plot_panels(
    folder / 'curves.png',
    [
      harness.Panel(
        curves('upper_return_at_nash'), label, 'return at the equilibrium'
      ),
      harness.Panel(
        curves('nash_gap', 1e-6), label, 'gap of the current pair', logy=True
      ),
    ],
  )


STUDY = harness.Study(
  main, PRESETS, paper='pbrl', binary='incentive_design', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
