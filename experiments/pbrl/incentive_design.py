"""Incentive design: a payoff table for two players who play its equilibrium.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024.

    python -m experiments.pbrl.incentive_design --preset=quick

Expected: TODO. Time: TODO.

The designer sets the payoff of a zero-sum Markov game and collects a reward of
its own where the players are at the equilibrium. The penalty is the function of
Nikaido and Isoda, at best responses that are tables of their own, one step of
policy iteration an update. The other method differentiates K steps of players
who learn from each other. Both are judged by the designer's return at the exact
equilibrium of their payoff, at equal numbers of evaluated pairs of policies.
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
from experiments.pbrl import stackelberg, zero_sum

_TUNING = 1_000_000  # Seeds from here on are tuned on.
# Pairs of policies evaluated in an update: two best responses that move, and
# the two payoffs of the penalty.
PBRL_EVALUATIONS = 4


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
    rates: of Adam, of the designer and, in PBRL, the players.
    inner_rates: of the players who learn, tried with each of the rates; one of
      them a share of the penalty's own rate for PBRL, whose players take Adam.
    tuning_seeds: games that rates are chosen on, none of them reported.
    seeds: games that are reported.
  """

  states: int = 10
  actions: int = 4
  discount: Annotated[float, harness.Allowed(high=0.999)] = 0.9
  temperature: float = 0.1
  steps: int = 1_500
  chunk: int = 100
  penalty: tuple[float, ...] = (1.0, 100.0)
  inner_steps: tuple[int, ...] = (5, 20)
  rates: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08)
  inner_rates: tuple[float, ...] = (0.02, 0.1)
  tuning_seeds: int = 3
  seeds: int = 10


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


def make_pbrl(settings: Settings, context: harness.Context):
  """Penalty descent with the function of Nikaido and Isoda."""
  game, tau = context.own, settings.temperature
  rate = context.hyper['rate']
  inner = context.hyper['inner_rate']

  def faced(at):
    x, y = at
    return bj.rl.zero_sum_responses(
      game, jax.nn.sigmoid(x), zero_sum.policies_of(y), temperature=tau
    )

  return bj.descend(
    bj.rl.policy_mirror_descent(
      faced, temperature=tau, at=lambda p: (p.upper, p.lower)
    ),
    bj.oracles.nikaido_isoda(
      problem_of(game, tau),
      penalty=stackelberg.rising(*settings.penalty, settings.steps),
    ),
    upper=optax.adam(rate),
    lower=optax.adam(inner),
    value=bj.Sequence(optax.sgd(1.0), start=lambda params: params.lower),
  )


def make_meta(settings: Settings, steps: int, context: harness.Context):
  """The gradient through K steps of players who learn."""
  game, tau = context.own, settings.temperature
  rate, inner = context.hyper['rate'], context.hyper['inner_rate']
  loss = problem_of(game, tau).upper

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
  return bj.descend(oracle, upper=optax.adam(rate), lower=optax.sgd(1.0))


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
  games = [
    bj.rl.random_game(
      seed,
      states=settings.states,
      actions=(settings.actions, settings.actions),
      rewards=1,
      discount=settings.discount,
    )
    for seed in job.seeds
  ]
  steps = updates_of(job.method, settings)
  make = functools.partial(make_pbrl, settings)
  if job.method != 'pbrl':
    make = functools.partial(make_meta, settings, inner_steps_of(job.method))

  def init(context):
    table = jnp.zeros((settings.states, settings.actions))
    x = jax.random.normal(context.seed_key, shape)
    return bj.BilevelParams(upper=x, lower=(table, table + 0))

  return harness.train(
    make,
    init,
    steps=steps,
    chunk=max(1, round(settings.chunk * steps / settings.steps)),
    own=jax.tree.map(lambda *leaves: np.stack(leaves), *games),
    evaluate=functools.partial(measure, settings),
    record_start=True,
    **job.keywords,
  )


def inner_steps_of(method: str) -> int:
  """K, from a method's name."""
  return int(method.split('/')[1].removeprefix('k'))


def updates_of(method: str, settings: Settings) -> int:
  """As many as PBRL's, or as its evaluations allow."""
  if method == 'pbrl' or method.endswith('/equal_updates'):
    return settings.steps
  return max(1, settings.steps * PBRL_EVALUATIONS // inner_steps_of(method))


if __name__ == '__main__':
  import sys
  settings = Settings()
  m = sys.argv[1]
  rates = [float(r) for r in sys.argv[2].split(',')]
  inner = [float(r) for r in sys.argv[3].split(',')]
  for kv in sys.argv[4:]:
    k, v = kv.split('=')
    v = tuple(map(float, v.split(','))) if ',' in v else (int(v) if v.isdigit() else float(v))
    settings = dataclasses.replace(settings, **{k: v})
  seeds = tuple(range(1_000_000, 1_000_000 + settings.tuning_seeds))
  pts = [(a, b) for a in rates for b in inner]
  t = time.process_time()
  job = comparison.Job(m, True, {}, seeds * len(pts), {
    'name': m, 'seeds': seeds * len(pts), 'workdir': None,
    'hyper': {'rate': np.repeat(np.float32([p[0] for p in pts]), len(seeds)), 'inner_rate': np.repeat(np.float32([p[1] for p in pts]), len(seeds))}})
  got = train(settings, job)
  for i, r in enumerate(pts):
    sl = slice(i * len(seeds), (i + 1) * len(seeds))
    h = got.history
    print(m, r, 'F', h['upper_return_at_nash'][-1, sl].round(3), h['upper_return_at_nash'][0, sl].round(2), 'max', h['upper_return_at_nash'][:, sl].max(0).round(3), 'cur', h['upper_return'][-1, sl].round(3), 'gap', h['nash_gap'][-1, sl].round(4), h['nash_gap'][0, sl].round(3), 'err', h['nash_error'][:, sl].max().round(5))
  print('cpu', time.process_time() - t, got.compile_seconds)
