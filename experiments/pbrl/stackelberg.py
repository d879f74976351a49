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
import pathlib
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness import comparison

METHODS = ('value_penalty', 'bellman_penalty', 'hypergradient')
INDEPENDENT = ('independent', 'independent_natural')
TITLES = {
  'value_penalty': 'value penalty',
  'bellman_penalty': 'Bellman penalty',
  'hypergradient': 'hypergradient through the optimum',
  'independent': 'independent, best rate of each game',
  'independent_natural': 'the same, natural gradients',
}
_TUNING = 1_000_000  # Seeds from here on are tuned on.
NEAR = 1e-2  # Of the gap at uniform policies: the follower is at its optimum.


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Shen, Yang and Chen, section 6.

  Attributes:
    states: the paper's 100.
    leader_actions: the paper's 5.
    follower_actions: the paper's 5.
    discount: ours.
    temperature: tau, ours.
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

  states: int = 100
  leader_actions: int = 5
  follower_actions: int = 5
  discount: Annotated[float, harness.Allowed(high=0.999)] = 0.9
  temperature: float = 0.1
  steps: int = 300
  chunk: int = 10
  value_penalty: tuple[float, ...] = (3.0, 100.0)
  bellman_penalty: tuple[float, ...] = (20.0, 300.0)
  rates: tuple[float, ...] = (4.0, 16.0, 64.0, 256.0)
  follower_rate: float = 3.0
  tuning_seeds: int = 3
  seeds: int = 10


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    states=10, leader_actions=3, follower_actions=3, steps=100, seeds=3,
    tuning_seeds=2, rates=(4.0, 16.0, 64.0),
  ),
  'paper': Settings(steps=2_000, chunk=50, tuning_seeds=10),
}  # fmt: skip


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  for name in ('value_penalty', 'bellman_penalty'):
    given = getattr(settings, name)
    if len(given) != 2:
      raise harness.SettingsError(
        f'--{name}: the first and the last penalty, got {len(given)} numbers.'
      )


def games_of(settings: Settings, seeds: tuple[int, ...]) -> bj.rl.MarkovGame:
  """A random game for each seed, with a leading axis of seeds."""
  games = [
    bj.rl.random_game(
      seed,
      states=settings.states,
      actions=(settings.leader_actions, settings.follower_actions),
      discount=settings.discount,
    )
    for seed in seeds
  ]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *games)


def process_of(game: bj.rl.MarkovGame, x: Any) -> bj.rl.MDP:
  """What the follower faces: the leader's logits in rewards and transitions."""
  return bj.rl.faced_by(game, jax.nn.softmax(x), game.rewards[1], player=1)


def optimum_of(mdp: bj.rl.MDP, temperature: float) -> bj.rl.Optimum:
  """The follower's best policy; a few of Newton's steps reach rounding."""
  return bj.rl.optimal(mdp, temperature, tolerance=1e-4, max_iterations=12)


def leader_return(game: bj.rl.MarkovGame, x: Any, policy: Any) -> Any:
  """What a pair is worth to the leader, from its logits and a policy."""
  mdp = bj.rl.faced_by(game, jax.nn.softmax(x), game.rewards[0], player=1)
  return bj.rl.expected_return(mdp, policy)


def rising(first: float, last: float, steps: int):
  """A penalty that rises geometrically, over four fifths of the steps."""

  def schedule(count):
    share = jnp.minimum(1.0, count / (0.8 * steps))
    return first * (last / first) ** share

  return schedule


def make_solver(method: str, settings: Settings, context: harness.Context):
  """The solver of a method on one game."""
  game, rate = context.own, context.hyper['rate']
  process = functools.partial(process_of, game)
  tau = settings.temperature
  below = bj.rl.follower_loss(process, temperature=tau)

  def loss(x, y, batch):
    return -leader_return(game, x, jax.nn.softmax(y))

  if method.endswith('_penalty'):
    penalty = rising(*getattr(settings, method), settings.steps)
    return bj.solvers.pbrl(
      loss,
      process,
      temperature=tau,
      penalty=penalty,
      upper=optax.sgd(lambda count: rate * jnp.sqrt(penalty(count))),
      lower=optax.sgd(settings.follower_rate),
      form=method.removesuffix('_penalty'),
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
      return visits / (1 - settings.discount)

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
  """F, what the current pair is worth, and how far the follower is off."""
  del state
  game = context.own
  mdp = process_of(game, params.upper)
  best = optimum_of(mdp, settings.temperature)
  policy = jax.nn.softmax(params.lower)
  if method == 'hypergradient':
    policy = best.policy  # It has no policy of its own.
  worth = bj.rl.expected_return(mdp, policy, settings.temperature)
  return {
    'F': leader_return(game, params.upper, best.policy),
    'pair': leader_return(game, params.upper, policy),
    'follower_gap': mdp.initial @ best.values - worth,
  }


def uniform_gap(settings: Settings, seeds: tuple[int, ...]) -> np.ndarray:
  """The follower's gap where both players' policies are uniform, (seeds,)."""
  shape = (settings.states, settings.leader_actions)

  def gap(game):
    mdp = process_of(game, jnp.zeros(shape))
    policy = jnp.full(mdp.rewards.shape, 1 / settings.follower_actions)
    worth = bj.rl.expected_return(mdp, policy, settings.temperature)
    best = optimum_of(mdp, settings.temperature)
    return mdp.initial @ best.values - worth

  return np.asarray(jax.jit(jax.vmap(gap))(games_of(settings, seeds)))


def train(settings: Settings, job: comparison.Job) -> harness.Trained:
  """Runs one job of the comparison."""
  games = games_of(settings, job.seeds)
  states = settings.states

  def init(context):
    del context
    return bj.BilevelParams(
      upper=jnp.zeros((states, settings.leader_actions)),
      lower=jnp.zeros((states, settings.follower_actions)),
    )

  return harness.train(
    lambda context: make_solver(job.method, settings, context),
    init,
    steps=settings.steps,
    chunk=settings.chunk,
    own=games,
    evaluate=functools.partial(measure, settings, job.method),
    record_start=not job.tuning,  # To record is a program of its own.
    **job.keywords,
  )


def near(trained: harness.Trained, start: np.ndarray) -> np.ndarray:
  """The follower's gap at the end, of that at uniform policies, (members,)."""
  repeated = np.resize(start, trained.history['follower_gap'].shape[1])
  return trained.history['follower_gap'][-1] / repeated


def independents(options: harness.Options) -> dict[str, harness.Trained]:
  """Both forms of independent gradients, at all rates on the reported games."""
  settings, seeds = options.settings, options.seeds
  found = {}
  for method in INDEPENDENT:
    members, hyper = harness.members(seeds, rate=settings.rates)
    keywords = {
      'name': method,
      'seeds': members,
      'hyper': hyper,
      'workdir': options.workdir,
      'save_seconds': options.save_seconds,
      'settings': harness.settings_of(settings),
    }
    job = comparison.Job(method, False, hyper, members, keywords)
    found[method] = train(settings, job)
  return found


def best_of(trained: harness.Trained, seeds: int) -> np.ndarray:
  """The member with the best F of each seed, (seeds,)."""
  final = np.nan_to_num(trained.history['F'][-1], nan=-np.inf)
  return np.argmax(final.reshape(-1, seeds), axis=0) * seeds + np.arange(seeds)


def main(options: harness.Options) -> dict[str, float]:
  """Tunes and runs all methods, and writes table, plots and results."""
  begin = time.monotonic()
  settings, seeds = options.settings, options.seeds
  tuning = tuple(range(_TUNING, _TUNING + settings.tuning_seeds))
  at_start = {s: uniform_gap(settings, s) for s in (tuning, seeds)}

  def score(trained):
    # A leader whose follower is elsewhere has no return to speak of.
    off = near(trained, at_start[tuning]) > NEAR
    return trained.history['F'][-1] - off

  rules = comparison.Rules(
    options,
    settings=harness.settings_of(settings, 'rates'),
    score=score,
    tuning_seeds=tuning,
  )
  outcomes = comparison.compare(
    rules,
    METHODS,
    functools.partial(train, settings),
    {'rate': settings.rates},
  )
  others = independents(options)
  chosen = {m: best_of(t, len(seeds)) for m, t in others.items()}
  rival = np.max(
    [t.history['F'][-1, chosen[m]] for m, t in others.items()], axis=0
  )

  def measured(history):
    gap = history['follower_gap'][-1] / at_start[seeds]
    final = history['F'][-1]
    wins = (gap <= NEAR) & (final > rival)
    pair = history['pair'][-1]
    return {'F': final, 'pair': pair, 'gap_ratio': gap}, int(wins.sum())

  histories = {
    **{
      m: {k: v[:, o.members] for k, v in o.trained.history.items()}
      for m, o in outcomes.items()
      if not o.failure
    },
    **{
      m: {k: v[:, chosen[m]] for k, v in t.history.items()}
      for m, t in others.items()
    },
  }
  metrics, _ = comparison.report_outcomes(outcomes, lambda outcome: {})
  rows = []
  for method, history in histories.items():
    numbers, wins = measured(history)
    row: dict[str, Any] = {'method': method}
    for name, values in numbers.items():
      row[name] = harness.mean_interval(values)
      metrics |= row[name].metrics(f'{method}/{name}')
    if method in outcomes:
      metrics[f'{method}/wins'] = wins
      row['wins'] = f'{wins} of {len(seeds)}'
      row['rate'] = outcomes[method].describe('rate')
      lead = harness.mean_interval(history['F'][-1] - rival)
      metrics |= lead.metrics(f'{method}/lead')
    else:
      row |= {'wins': '-', 'rate': 'best of each game'}
    rows.append(row)
  metrics |= harness.mean_interval(rival).metrics('independent_best/F')
  harness.write_table(options.workdir, rows)
  first = next(iter(others.values())).steps
  _plot(pathlib.Path(options.workdir), first, histories, at_start[seeds])
  harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - begin,
    curves={m: h['F'] for m, h in histories.items()},
  )
  return metrics


def _plot(folder, steps, histories, start):
  def curves(name, of=lambda x: x):
    return {TITLES[m]: (steps, of(h[name])) for m, h in histories.items()}

  harness.plot_panels(
    folder / 'curves.png',
    [
      harness.Panel(
        curves('F'), 'updates', 'leader return at the exact optimum'
      ),
      harness.Panel(
        curves('pair'), 'updates', 'leader return of the current pair'
      ),
      harness.Panel(
        curves('follower_gap', lambda gap: np.maximum(gap / start, 1e-6)),
        'updates',
        'follower gap, of that at uniform policies',
        logy=True,
      ),
    ],
  )


STUDY = harness.Study(
  main, PRESETS, paper='pbrl', binary='stackelberg', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
