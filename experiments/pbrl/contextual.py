"""Leaders of a follower who acts in several contexts: methods, and their study.

A context is a goal or a taste, drawn for each update; the leader does not see
it. All methods are judged by the leader's return, the mean over contexts, at
the follower's exact optimum. Binaries differ in the process alone: `Study`.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness import comparison
from experiments.pbrl import contexts, stackelberg

TITLES = {
  'value_penalty': 'value penalty',
  'hpgd': 'HPGD, its mean',
  'amd': 'AMD',
  'zero_order': 'zero order',
}
_TUNING = 1_000_000  # Seeds from here on are tuned on.


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Thoma et al., 2024.

  Attributes:
    temperatures: of the follower's entropy, the paper's.
    steps: updates; the paper's are 10,000.
    chunk: updates between two records.
    penalty: the first and the last lambda times the temperature: the logits of
      the follower are led by about its inverse.
    share: of the way to its answer that the follower goes in an update; 1 is a
      step of policy iteration.
    backups: of adaptive model design in an update; the paper's are 100.
    radius: of the zero order, over the number of the update; of the paper's.
    rates: of the leader, along gradients clipped to length one.
    tuning_seeds: that rates are chosen on, one for all cells of the table.
    seeds: of the start and of the contexts that are drawn.
  """

  temperatures: tuple[float, ...] = (0.001, 0.003, 0.005)
  steps: int = 150
  chunk: int = 50
  penalty: tuple[float, ...] = (0.3, 10.0)
  share: float = 1.0
  backups: int = 5
  radius: float = 1.0
  rates: tuple[float, ...] = (0.1, 0.5, 2.5)
  tuning_seeds: int = 1
  seeds: int = 10


class Study(NamedTuple):
  """What a binary compares methods on.

  Attributes:
    process: from the leader's weights (weights,), the number of a context and
      the numbers of a cell, by name, to a `contexts.Process`.
    contexts: how many.
    start: from a key to the leader's first weights.
    shape: of the follower's logits, (states, actions).
    cells: numbers by name for each row of the table; `temperature` is one.
    published: for each cell, what a paper has, as a text; () if nothing.
  """

  process: Callable[[Any, Any, Any], contexts.Process]
  contexts: int
  start: Callable[[Any], Any]
  shape: tuple[int, int]
  cells: Sequence[dict[str, float]]
  published: Sequence[str] = ()

  def over(self, function: Callable[..., Any], *tables: Any) -> Any:
    """A function of (a row of each table, context), for all of these."""
    return jnp.stack(
      [function(*(t[k] for t in tables), k) for k in range(self.contexts)]
    )


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  if len(settings.penalty) != 2:
    raise harness.SettingsError(
      '--penalty: the first and the last penalty, got '
      f'{len(settings.penalty)} numbers.'
    )


def make_solver(
  study: Study, method: str, settings: Settings, context: harness.Context
):
  """The solver of a method in one cell."""
  hyper = context.hyper
  heat, rate = hyper['temperature'], hyper['rate']
  process = lambda x, k: study.process(x, k, hyper)
  upper = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))
  drawn = lambda key: jax.random.randint(key, (), 0, study.contexts)
  if method == 'amd':
    design = adaptive_design(study, process, heat, settings.backups, drawn)
    return bj.descend(design, upper=upper)

  def follow(params, batch, inner):
    del batch
    after = study.over(
      lambda z, k: contexts.improve(process(params.upper, k), z, heat),
      params.value,
    )
    return (
      (),
      params._replace(upper=None, lower=None, value=params.value - after),
      inner,
    )

  following = bj.oracle(
    follow, (), counts={'gradients/lower': study.contexts}, moves=('value',)
  )
  value = bj.Sequence(optax.sgd(1.0), start=lambda params: params.lower)
  if method == 'value_penalty':
    scale = stackelberg.rising(*settings.penalty, settings.steps)
    penalty = lambda count: scale(count) / heat

    def mean_loss(of_context):
      return lambda x, y, batch: (
        -study.over(lambda z, k: of_context(process(x, k), z), y).mean()
      )

    loss = mean_loss(
      lambda process, z: contexts.leader_return(process, contexts.straight(z))
    )
    below = mean_loss(
      lambda process, z: process.start @ contexts.soft_values(process, z, heat)
    )
    problem = bj.BilevelProblem(loss, below)
    seen = lambda params: study.over(
      lambda z, k: contexts.visits(process(params.upper, k), jax.nn.softmax(z)),
      params.lower,
    ) / study.contexts  # fmt: skip
    # The follower first: times a large penalty, an answer to the weights of the
    # update before would be a wrong slope for the leader.
    return bj.descend(
      following,
      over_visits(
        bj.oracles.penalised_lower_gradient(
          problem, penalty=penalty, rescale=False
        ),
        seen,
      ),
      without_lower(bj.value_gap(problem, penalty=penalty, rescale=False)),
      upper=upper,
      # Along worths, not advantages, each step adds a value over the
      # temperature to all logits of a state, in which floats would drown.
      lower=bj.Sequence(
        optax.sgd(lambda k: settings.share / (heat * penalty(k))),
        set=jax.nn.log_softmax,
      ),
      value=value,
    )

  def at_optimum(w, z, k):
    here = process(w, k)
    best = contexts.optimum(here, z, heat)
    return -contexts.leader_return(here, jax.nn.softmax(best))

  def of_drawn(params, batch):
    k = drawn(batch)
    return at_optimum(params.upper, params.value[k], k)

  def by_differences(params, batch, count):
    one, key = jax.random.split(batch)
    k = drawn(one)
    away = jax.random.normal(key, params.upper.shape)
    radius = settings.radius / (count + 1)
    f, g = (
      at_optimum(w, params.value[k], k)
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


def adaptive_design(study: Study, process, heat, backups: int, drawn):
  """The leader's slope, by tables that take some backups an update."""

  def advance(x, tables, steps):
    def one(of_context, k):
      step = lambda _, t: contexts.design_step(
        lambda x: process(x, k), x, t, heat
      )
      return jax.lax.fori_loop(0, steps, step, of_context)

    found = [
      one(jax.tree.map(lambda leaf: leaf[k], tables), k)  # noqa: B023
      for k in range(study.contexts)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

  def fn(params, batch, tables):
    k = drawn(batch)
    tables = advance(params.upper, tables, backups)
    start = process(params.upper, k).start
    return (
      (-(start @ tables.gains[k]),),
      params._replace(upper=-(start @ tables.gain_slopes[k]), lower=None),
      tables,
    )

  def begin(params):
    x = params.upper
    empty = contexts.zero_tables(study.shape[0], x.size, x.dtype)
    tables = jax.tree.map(lambda z: jnp.stack([z] * study.contexts), empty)
    # Like its authors' runs, it begins with tables of the first weights.
    return advance(x, tables, 300)

  return bj.oracle(
    fn,
    ('upper',),
    begin,
    counts={'gradients/lower': backups * study.contexts},
    moves=('upper',),
  )


def over_visits(oracle, weights):
  """Derivatives in probabilities, divided by the visits: natural ones."""

  def update(batch, state, params=None, **extra_args):
    found, state = oracle.update(batch, state, params, **extra_args)
    least = jnp.maximum(weights(params), 1e-12)
    return found._replace(lower=found.lower / least[:, :, None]), state

  return bj.oracles.Oracle(oracle.init, update, oracle.moves, linear=True)


def without_lower(oracle):
  """The same, for the leader alone."""

  def update(batch, state, params=None, **extra_args):
    found, state = oracle.update(batch, state, params, **extra_args)
    return found._replace(lower=None), state

  return bj.oracles.Oracle(oracle.init, update, ('upper',), linear=True)


def measure(study: Study, context: harness.Context, params, state):
  """The leader's return at the exact optimum, and how exact that is."""
  del state
  heat = context.hyper['temperature']
  of = lambda k: study.process(params.upper, k, context.hyper)
  improve = lambda z, k: contexts.improve(of(k), z, heat)

  def best(z, k):
    return jax.lax.fori_loop(0, 20, lambda _, z: improve(z, k), z)

  at = study.over(best, jnp.zeros_like(params.lower))
  gained = lambda z, k: contexts.leader_return(of(k), jax.nn.softmax(z))
  value = lambda z, k: of(k).start @ contexts.soft_values(of(k), z, heat)
  again = study.over(improve, at)
  gap = study.over(value, at) - study.over(value, params.lower)
  return {
    'F': study.over(gained, at).mean(),
    'pair': study.over(gained, params.lower).mean(),
    'follower_gap': gap.mean(),
    'error': jnp.max(jnp.abs(jax.nn.softmax(again) - jax.nn.softmax(at))),
  }


def train(
  study: Study, settings: Settings, job: comparison.Job
) -> harness.Trained:
  """Runs one job in all cells: a member for each cell and seed."""
  members = len(job.seeds)
  hyper = {k: np.tile(v, len(study.cells)) for k, v in job.hyper.items()}
  for name in study.cells[0]:
    values = np.array([cell[name] for cell in study.cells], np.float32)
    hyper[name] = np.repeat(values, members)
  keywords = job.keywords | {
    'seeds': job.seeds * len(study.cells),
    'hyper': hyper,
  }

  def init(context):
    w = study.start(context.key)
    return bj.BilevelParams(w, jnp.zeros((study.contexts, *study.shape)))

  trained = harness.train(
    lambda context: make_solver(study, job.method, settings, context),
    init,
    lambda context: context.key,
    steps=settings.steps,
    chunk=settings.chunk,
    evaluate=functools.partial(measure, study),
    record_start=not job.tuning,  # To record is a program of its own.
    **keywords,
  )
  # The comparison knows one member for each seed and point.
  shape = (-1, len(study.cells), members)
  history = {k: v.reshape(shape) for k, v in trained.history.items()}
  return trained._replace(history=history)


def run(options: harness.Options, study: Study) -> dict[str, float]:
  """Tunes and runs all methods, and writes table, plots and results."""
  begin = time.monotonic()
  settings = options.settings
  rules = comparison.Rules(
    options,
    settings=harness.settings_of(settings, 'rates'),
    # One rate for all cells, by the mean of their returns.
    score=lambda trained: trained.history['F'][-1].mean(axis=0),
    tuning_seeds=tuple(range(_TUNING, _TUNING + settings.tuning_seeds)),
    widenings=1,
  )
  outcomes = comparison.compare(
    rules,
    tuple(TITLES),
    functools.partial(train, study, settings),
    {'rate': settings.rates},
  )
  fine = {m: o for m, o in outcomes.items() if not o.failure}
  metrics: dict[str, float] = {}
  rows = []
  for number, cell in enumerate(study.cells):
    row: dict[str, Any] = dict(cell)
    finals = {m: o.trained.history['F'][-1, number] for m, o in fine.items()}
    for method, final in finals.items():
      row[TITLES[method]] = harness.mean_interval(final)
      name = f'{method}/{name_of(cell)}/F'
      metrics |= row[TITLES[method]].metrics(name)
    rest = [f for m, f in finals.items() if m != 'value_penalty']
    row['ours is'] = verdict(finals['value_penalty'], rest)
    if study.published:
      row['published'] = study.published[number]
    rows.append(row)
  for said in ('above', 'level', 'below'):
    count = sum(row['ours is'] == said for row in rows)
    metrics[f'value_penalty/cells_{said}'] = count
  metrics['value_penalty/cells_not_below'] = sum(
    row['ours is'] != 'below' for row in rows
  )
  for method, outcome in fine.items():
    history = outcome.trained.history
    # Over cells, of each seed.
    mean = harness.mean_interval(history['F'][-1].mean(axis=0))
    metrics |= mean.metrics(f'{method}/mean_F') | {
      f'{method}/rate': outcome.point['rate'],
      f'{method}/edges': len(outcome.edges),
      f'{method}/start_F': float(history['F'][0].mean()),
      f'{method}/optimum_error': harness.reduced(
        history['error'].ravel(), 'max'
      ),
    }
  gap = fine['value_penalty'].trained.history['follower_gap'][-1]
  metrics['value_penalty/follower_gap'] = harness.reduced(gap.ravel(), 'max')
  harness.write_table(options.workdir, rows)
  _plot(pathlib.Path(options.workdir), study, fine)
  harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - begin
  )
  return metrics


def product(**values: Sequence[float]) -> list[dict[str, float]]:
  """All cells of a table, by the values of their numbers."""
  return [
    dict(zip(values, numbers, strict=True))
    for numbers in itertools.product(*values.values())
  ]


def name_of(cell: dict[str, float]) -> str:
  """A cell in the names of metrics."""
  return '/'.join(f'{name}{value:g}' for name, value in cell.items())


def verdict(ours: np.ndarray, others: list[np.ndarray]) -> str:
  """Of the best other method's mean: above, level or below, by intervals."""
  if not others:
    return '-'
  best = max(others, key=np.mean)
  lead = harness.mean_interval(ours - best)
  if abs(lead.mean) <= max(lead.half_width, 0.005):
    return 'level'
  return 'above' if lead.mean > 0 else 'below'


def _plot(folder, study, outcomes):
  panels = []
  for number, cell in enumerate(study.cells):
    curves = {
      TITLES[m]: (o.trained.steps, o.trained.history['F'][:, number])
      for m, o in outcomes.items()
    }
    title = ', '.join(f'{name} {value:g}' for name, value in cell.items())
    panels.append(harness.Panel(curves, 'updates', 'leader return', title))
  harness.plot_panels(folder / 'curves.png', panels, columns=3)
