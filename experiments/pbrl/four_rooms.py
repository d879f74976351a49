"""Four rooms: penalties on cells that lead a follower by a cell of its leader.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024. The problem and its table are of Thoma,
Pasztor, Krause, Ramponi and Hu, Contextual Bilevel Reinforcement Learning for
Incentive Alignment, 2024.

    python -m experiments.pbrl.four_rooms --preset=quick

Expected: not run yet, but for its smallest size. Time: minutes, not measured.

Nine cells of a table: three temperatures of the follower's entropy, three
prices of the penalties to the leader. All methods are judged by the leader's
return, the mean over both goals, at the follower's exact optimum.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness import comparison
from experiments.pbrl import rooms as rooms_lib
from experiments.pbrl import stackelberg

ROOMS = rooms_lib.make_rooms()
GOALS = range(len(ROOMS.goals))
WEIGHTS = ROOMS.start.size + 1
TITLES = {
  'value_penalty': 'value penalty',
  'hpgd': 'HPGD, its mean',
  'zero_order': 'zero order',
}
# By temperature and price, means of 10 seeds: HPGD, adaptive mechanism design,
# zero order.
PUBLISHED = {
  (0.001, 1.0): (0.91, 0.58, 0.59),
  (0.001, 3.0): (0.51, 0.51, 0.50),
  (0.001, 5.0): (0.46, 0.46, 0.46),
  (0.003, 1.0): (0.95, 1.00, 0.91),
  (0.003, 3.0): (0.73, 0.39, 0.40),
  (0.003, 5.0): (0.29, 0.32, 0.32),
  (0.005, 1.0): (1.17, 1.28, 1.15),
  (0.005, 3.0): (1.01, 1.13, 1.02),
  (0.005, 5.0): (0.87, 0.97, 0.79),
}
_TUNING = 1_000_000  # Seeds from here on are tuned on.


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Thoma et al., 2024.

  Attributes:
    temperatures: of the follower's entropy, the paper's.
    prices: of the penalties to the leader, the paper's.
    steps: updates; the paper's are 10,000.
    chunk: updates between two records.
    penalty: the first and the last lambda times the temperature: the logits of
      the follower are led by about its inverse.
    share: of the way to its answer that the follower goes in an update.
    radius: of the zero order, over the number of the update; of the paper's.
    rates: of the leader, along gradients clipped to length one.
    tuning_seeds: that rates are chosen on, one for all nine cells.
    seeds: of the start and of the goals that are drawn.
  """

  temperatures: tuple[float, ...] = (0.001, 0.003, 0.005)
  prices: tuple[float, ...] = (1.0, 3.0, 5.0)
  steps: int = 200
  chunk: int = 50
  penalty: tuple[float, ...] = (0.3, 30.0)
  share: float = 0.5
  radius: float = 1.0
  rates: tuple[float, ...] = (0.1, 0.5, 2.5)
  tuning_seeds: int = 1
  seeds: int = 10


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    temperatures=(0.005,),
    prices=(1.0,),
    steps=40,
    chunk=20,
    rates=(0.5, 2.5),
    seeds=2,
  ),
  'paper': Settings(steps=10_000, chunk=500, rates=(0.01, 0.05, 0.1, 0.5)),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  if len(settings.penalty) != 2:
    raise harness.SettingsError(
      '--penalty: the first and the last penalty, got '
      f'{len(settings.penalty)} numbers.'
    )


def over_goals(function, *tables: Any) -> Any:
  """A function of (a row of each table, goal), for all goals at once."""
  return jnp.stack([function(*(t[g] for t in tables), g) for g in GOALS])


def make_solver(method: str, settings: Settings, context: harness.Context):
  """The solver of a method at one temperature and price."""
  heat, price = context.hyper['temperature'], context.hyper['price']
  rate = context.hyper['rate']
  upper = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))

  def follow(params, batch, inner):
    del batch
    after = over_goals(
      lambda z, g: rooms_lib.improve(ROOMS, params.upper, z, g, heat),
      params.value,
    )
    return (
      (),
      params._replace(upper=None, lower=None, value=params.value - after),
      inner,
    )

  following = bj.oracle(
    follow, (), counts={'gradients/lower': len(GOALS)}, moves=('value',)
  )
  value = bj.Sequence(optax.sgd(1.0), start=lambda params: params.lower)

  def at_optimum(w, z, goal):
    best = rooms_lib.optimum(ROOMS, w, z, goal, heat)
    policy = jax.nn.softmax(best)
    return -rooms_lib.leader_return(ROOMS, w, policy, goal, price)

  if method == 'value_penalty':
    scale = stackelberg.rising(*settings.penalty, settings.steps)
    penalty = lambda count: scale(count) / heat

    def loss(x, y, batch):
      del batch
      of_goal = lambda z, g: rooms_lib.leader_return(
        ROOMS, x, rooms_lib.straight(z), g, price
      )
      return -over_goals(of_goal, y).mean()

    def below(x, y, batch):
      del batch
      of_goal = lambda z, g: (
        ROOMS.start @ rooms_lib.soft_values(ROOMS, x, z, g, heat)
      )
      return -over_goals(of_goal, y).mean()

    gap = bj.value_gap(
      bj.BilevelProblem(loss, below), penalty=penalty, rescale=False
    )
    return bj.descend(
      following,
      over_visits(gap),
      upper=upper,
      lower=optax.sgd(lambda k: settings.share / (heat * penalty(k))),
      value=value,
    )

  def of_drawn(params, batch):
    goal = jax.random.randint(batch, (), 0, len(GOALS))
    return at_optimum(params.upper, params.value[goal], goal)

  def by_differences(params, batch, count):
    goal_key, key = jax.random.split(batch)
    goal = jax.random.randint(goal_key, (), 0, len(GOALS))
    away = jax.random.normal(key, params.upper.shape)
    radius = settings.radius / (count + 1)
    f, g = (
      at_optimum(w, params.value[goal], goal)
      for w in (params.upper, params.upper + radius * away)
    )
    slope = (g - f) / radius * away
    return (f,), params._replace(upper=slope, lower=None, value=None), count + 1

  chosen = bj.gradient(of_drawn, name='upper', of='upper')
  if method == 'zero_order':
    chosen = bj.oracle(
      by_differences,
      ('upper',),
      lambda params: jnp.zeros([], jnp.float32),
      moves=('upper',),
    )
  return bj.descend(following, chosen, upper=upper, value=value)


def over_visits(oracle):
  """Derivatives in probabilities, divided by the visits: natural ones."""

  def update(batch, state, params=None, **extra_args):
    found, state = oracle.update(batch, state, params, **extra_args)

    def seen(z, goal):
      policy = jax.nn.softmax(z)
      return rooms_lib.visits(ROOMS.transitions[goal], policy, ROOMS.start)

    visits = over_goals(seen, params.lower) / len(GOALS)
    lower = found.lower / jnp.maximum(visits, 1e-12)[:, :, None]
    return found._replace(lower=lower), state

  return bj.oracles.Oracle(oracle.init, update, oracle.moves, linear=True)


def measure(context: harness.Context, params, state):
  """The leader's return at the exact optimum, and how exact that is."""
  del state
  heat, price = context.hyper['temperature'], context.hyper['price']
  w = params.upper

  def best(z, goal):
    better = lambda _, z: rooms_lib.improve(ROOMS, w, z, goal, heat)
    return jax.lax.fori_loop(0, 20, better, z)

  at = over_goals(best, jnp.zeros_like(params.lower))
  of_goal = lambda z, g: rooms_lib.leader_return(
    ROOMS, w, jax.nn.softmax(z), g, price
  )
  value = lambda z, g: ROOMS.start @ rooms_lib.soft_values(ROOMS, w, z, g, heat)
  again = over_goals(lambda z, g: rooms_lib.improve(ROOMS, w, z, g, heat), at)
  return {
    'F': over_goals(of_goal, at).mean(),
    'pair': over_goals(of_goal, params.lower).mean(),
    'follower_gap': (
      over_goals(value, at) - over_goals(value, params.lower)
    ).mean(),
    'error': jnp.max(jnp.abs(jax.nn.softmax(again) - jax.nn.softmax(at))),
  }


def cells_of(settings: Settings) -> list[tuple[float, float]]:
  """Temperatures and prices of the table."""
  return list(itertools.product(settings.temperatures, settings.prices))


def train(settings: Settings, job: comparison.Job) -> harness.Trained:
  """Runs one job in all cells: a member for each cell and seed."""
  cells = np.array(cells_of(settings), np.float32)
  members = len(job.seeds)
  hyper = {k: np.tile(v, len(cells)) for k, v in job.hyper.items()}
  hyper |= {
    'temperature': np.repeat(cells[:, 0], members),
    'price': np.repeat(cells[:, 1], members),
  }
  keywords = job.keywords | {'seeds': job.seeds * len(cells), 'hyper': hyper}

  def init(context):
    w = 0.01 * jax.random.normal(context.key, (WEIGHTS,))
    return bj.BilevelParams(w, jnp.zeros((len(GOALS), ROOMS.start.size, 4)))

  trained = harness.train(
    lambda context: make_solver(job.method, settings, context),
    init,
    lambda context: context.key,
    steps=settings.steps,
    chunk=settings.chunk,
    evaluate=measure,
    record_start=not job.tuning,  # To record is a program of its own.
    **keywords,
  )
  # The comparison knows one member for each seed and point.
  shape = (-1, len(cells), members)
  history = {k: v.reshape(shape) for k, v in trained.history.items()}
  return trained._replace(history=history)


def main(options: harness.Options) -> dict[str, float]:
  """Tunes and runs all methods, and writes table, plots and results."""
  begin = time.monotonic()
  settings = options.settings
  rules = comparison.Rules(
    options,
    settings=harness.settings_of(settings, 'rates'),
    # One rate for the nine cells, by the mean of their returns.
    score=lambda trained: trained.history['F'][-1].mean(axis=0),
    tuning_seeds=tuple(range(_TUNING, _TUNING + settings.tuning_seeds)),
    widenings=1,
  )
  outcomes = comparison.compare(
    rules,
    tuple(TITLES),
    functools.partial(train, settings),
    {'rate': settings.rates},
  )
  metrics: dict[str, float] = {}
  rows = []
  for number, (heat, price) in enumerate(cells_of(settings)):
    row: dict[str, Any] = {'entropy': heat, 'price': price}
    finals = {}
    for method, outcome in outcomes.items():
      if outcome.failure:
        continue
      final = outcome.trained.history['F'][-1, number]
      finals[method] = final
      row[TITLES[method]] = harness.mean_interval(final)
      name = f'{method}/entropy{heat:g}/price{price:g}/F'
      metrics |= row[TITLES[method]].metrics(name)
    rest = [f for m, f in finals.items() if m != 'value_penalty']
    row['ours is'] = verdict(finals['value_penalty'], rest)
    known = PUBLISHED.get((heat, price), ())
    row['published'] = ' / '.join(f'{x:.2f}' for x in known)
    rows.append(row)
  for said in ('above', 'level', 'below'):
    count = sum(row['ours is'] == said for row in rows)
    metrics[f'value_penalty/cells_{said}'] = count
  for method, outcome in outcomes.items():
    if outcome.failure:
      continue
    history = outcome.trained.history
    metrics |= {
      f'{method}/rate': outcome.point['rate'],
      f'{method}/edges': len(outcome.edges),
      f'{method}/optimum_error': harness.reduced(
        history['error'].ravel(), 'max'
      ),
      f'{method}/mean_F': float(history['F'][-1].mean()),
    }
  gap = outcomes['value_penalty'].trained.history['follower_gap'][-1]
  metrics['value_penalty/follower_gap'] = harness.reduced(gap.ravel(), 'max')
  harness.write_table(options.workdir, rows)
  _plot(pathlib.Path(options.workdir), settings, outcomes)
  harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - begin
  )
  return metrics


def verdict(ours: np.ndarray, others: list[np.ndarray]) -> str:
  """Of the best other method's mean: above, level or below, by intervals."""
  if not others:
    return '-'
  best = max(others, key=np.mean)
  lead = harness.mean_interval(ours - best)
  if abs(lead.mean) <= max(lead.half_width, 0.005):
    return 'level'
  return 'above' if lead.mean > 0 else 'below'


def _plot(folder, settings, outcomes):
  panels = []
  for number, (heat, price) in enumerate(cells_of(settings)):
    curves = {
      TITLES[m]: (o.trained.steps, o.trained.history['F'][:, number])
      for m, o in outcomes.items()
      if not o.failure
    }
    title = f'entropy {heat:g}, price {price:g}'
    panels.append(harness.Panel(curves, 'updates', 'leader return', title))
  harness.plot_panels(folder / 'curves.png', panels, columns=3)


if __name__ == '__main__':
  harness.run(main, PRESETS, paper='pbrl', binary='four_rooms', check=check)
