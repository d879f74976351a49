"""Toy problem: two losses in the plane with noisy gradients.

Paper: Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, Mitigating Gradient
Bias in Multi-objective Learning, 2023.

    python -m experiments.moco.toy --preset=quick

Expected: from the two hard starts, 9 and 5 seeds of 10 reach the Pareto front
for MoCo with a tuned share, 9 and 1 with the published one, none for SMG,
PCGrad and CAGrad. Time: 2 CPU minutes on 2 cores.

Seeds, starts, learning rates and methods run in one compiled program with the
same noise.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.moco import methods

STARTS = ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0))
OBJECTIVES = 2
PLOTTED = ('moco_exact', 'moco', 'smg', 'cagrad')
CONTROLS = ('mean', 'smg', 'pcgrad', 'cagrad')
MOCO = ('moco_exact', 'moco', 'moco_exact_published')
OTHERS = ('grad_drop', 'grad_vac', 'imtl_g', 'aligned_mtl', 'modo', 'sdmgrad')
DECAY = 0.05  # Learning rates fall as (k + 1) ** -DECAY.
PUBLISHED_TRACKING = 5.0  # Tracking share of `moco_exact_published`.
WEIGHT_STEP = 5.0  # Weight step of MoCo, divided by sqrt(k + 1).

Methods = Annotated[
  tuple[str, ...], harness.Among((*methods.METHODS, MOCO[-1]), methods.MEANINGS)
]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the defaults are the published sizes.

  Attributes:
    methods: methods to compare.
    steps: training steps; 70,000 in the paper.
    chunk: steps between two records.
    learning_rates: initial learning rates of Adam.
    tracking: tracking share c of MoCo, as c / sqrt(k + 1); the best of 1, 5 and
      10 on 40 other seeds.
    radius: radius of CAGrad; the best of 0.2, 0.4 and 0.8 on the same seeds.
    noise: standard deviation of each entry of a gradient.
    seeds: number of seeds of the noise.
  """

  methods: Methods = MOCO + CONTROLS + OTHERS
  steps: int = 70_000
  chunk: int = 500
  learning_rates: tuple[float, ...] = (1e-3, 5e-3)
  tracking: float = 1.0
  radius: float = 0.4
  noise: Annotated[float, harness.Allowed(0)] = 1.0
  seeds: int = 10


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    methods=('moco_exact', 'smg', 'pcgrad', 'cagrad'), learning_rates=(1e-3,)
  ),
  'paper': Settings(),
}


def toy_losses(point: Any) -> Any:
  """The two losses at a point of the plane."""
  x, y = point[0], point[1]
  log = lambda inside: jnp.log(jnp.maximum(jnp.abs(inside), 5e-6)) + 6
  upper = jnp.maximum(jnp.tanh(0.5 * y), 0)
  lower = jnp.maximum(jnp.tanh(-0.5 * y), 0)
  bowl = lambda centre: ((x - centre) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20
  first = log(0.5 * (-x - 7) + jnp.tanh(y)) * upper + bowl(7.0) * lower
  second = log(0.5 * (-x + 3) - jnp.tanh(y) + 2) * upper + bowl(-7.0) * lower
  return jnp.stack([2 * first, second])


def noisy_losses(point: Any, noise: Any) -> Any:
  """The losses with additive gradient noise, (samples, 2, 2)."""
  return toy_losses(point) + noise[0] @ point


def stationarity(point: Any) -> Any:
  """Smallest norm of a convex combination of the true gradients."""
  rows = jax.jacobian(toy_losses)(point)
  return bj.diagnostics.pareto_stationarity(bj.Jacobian(rows))


def on_front(point: Any) -> Any:
  """Whether a point is on the Pareto front, up to the noise of a run.

  The front lies below the axis, between the centres of both bowls, where the
  true gradients balance. Pareto-stationary points above it are not optimal.
  """
  return (point[1] < 0) & (stationarity(point) < 0.1)


def make_solver(settings: Settings, name: str, rate: Any, key: Any):
  """Makes a method with Adam, on noisy gradients of the two losses."""
  oracle = bj.multi_objective(noisy_losses, OBJECTIVES)
  if name in MOCO:
    published = name.endswith('published')
    share = PUBLISHED_TRACKING if published else settings.tracking
    aggregator = bj.aggregators.moco(
      OBJECTIVES,
      tracking=methods.decay(share),
      weight_step=methods.decay(WEIGHT_STEP) if name == 'moco' else None,
    )
  else:
    method = methods.METHODS[name]
    if method.samples > 1:
      split = lambda noise, samples: noise[:samples, None]
      oracle = bj.evaluation.independent(oracle, method.samples, split=split)
    own = method.own and method.own.values[0]
    own = settings.radius if name == 'cagrad' else own
    aggregator = method.make(OBJECTIVES, key, (), own)
  schedule = lambda count: rate * (count + 1.0) ** -DECAY
  return optax.chain(oracle, aggregator, optax.adam(schedule))


def run(options: harness.Options) -> harness.Trained:
  """Runs all seeds, starts, learning rates and methods."""
  settings = options.settings
  seeds, hyper = harness.members(
    options.seeds,
    rate=settings.learning_rates,
    start=tuple(range(len(STARTS))),
  )

  def solver(context):
    return methods.side_by_side(
      {
        name: make_solver(
          settings, name, context.hyper['rate'], jax.random.key(i)
        )
        for i, name in enumerate(settings.methods)
      }
    )

  def init(context):
    start = jnp.asarray(STARTS)[context.hyper['start']]
    return bj.sequences(**{name: start + 0 for name in settings.methods})

  def batch(context):
    return settings.noise * jax.random.normal(context.key, (3, 2, 2))

  def evaluate(context, params, state):
    metrics = {}
    for name in settings.methods:
      point = getattr(params, name)
      weights = bj.diagnostics.objective_weights(state.parts[name])
      values = {
        'x': point[0],
        'y': point[1],
        'stationarity': stationarity(point),
        'front': on_front(point).astype(jnp.float32),
        'weight': weights[0],
      }
      metrics |= {
        f'{name}/{metric}': jnp.where(state.stopped[name], jnp.nan, value)
        for metric, value in values.items()
      }
    return metrics

  return harness.train(
    solver,
    harness.Task(init, batch, hyper=hyper),
    harness.Training.from_options(
      options,
      steps=settings.steps,
      chunk=settings.chunk,
      seeds=seeds,
      name='toy',
      settings=harness.run_settings(settings),
    ),
    harness.Measure(evaluate, record_start=True),
  )


def reshape(options: harness.Options, values: np.ndarray) -> np.ndarray:
  """Reshapes (..., members) to (..., learning rates, starts, seeds)."""
  settings = options.settings
  shape = (len(settings.learning_rates), len(STARTS), len(options.seeds))
  return values.reshape(*values.shape[:-1], *shape)


def summarise(
  options: harness.Options, trained: harness.Trained
) -> harness.Results:
  """Collects seeds on the front and median stationarity of all methods.

  Args:
    options: options of the run.
    trained: the run.

  Returns:
    Metrics by method, learning rate and start.
  """
  results = harness.Results()
  for name in options.settings.methods:
    last = lambda measure, n=name: reshape(
      options, trained.history[f'{n}/{measure}'][-1]
    )
    front, stationarity = last('front'), last('stationarity')
    # These have left the valleys of the logarithms, and go on to the front.
    below = np.where(np.isnan(last('y')), np.nan, last('y') < 0)
    for i, rate in enumerate(options.settings.learning_rates):
      at = {'method': name, 'learning_rate': rate}
      for j in range(len(STARTS)):
        results.add(
          {**at, 'start': j + 1},
          # NaN if a seed stopped.
          seeds_on_front=harness.reduced(front[i, j], 'sum'),
          seeds_below_axis=harness.reduced(below[i, j], 'sum'),
          stationarity=harness.reduced(stationarity[i, j], 'median'),
        )
      overall = harness.reduced(stationarity[i].ravel(), 'median')
      results.note(at, {'stationarity': overall})
  return results


def columns(settings: Settings) -> list[harness.Column]:
  """Columns of the table: per learning rate, each start and their median."""
  columns = []
  for rate in settings.learning_rates:
    at, title = {'learning_rate': rate}, f'lr{rate:.0e}'.replace('e-0', 'e-')
    for start in range(1, len(STARTS) + 1):
      place = {**at, 'start': start}
      columns.append(
        harness.Column('seeds_on_front', f'{title}, start {start}', place)
      )
    columns.append(harness.Column('stationarity', f'{title}, stationarity', at))
  return columns


# Colour-blind safe, one per method.
_COLOURS = ('#0072B2', '#56B4E9', '#000000', '#D55E00', '#CC79A7', '#E69F00')


def draw_paths(
  options: harness.Options, trained: harness.Trained
) -> matplotlib.figure.Figure:
  """Draws the paths of all seeds over the sum of the losses, by method."""
  settings = options.settings
  names = [m for m in settings.methods if m != 'moco_exact_published'][:6]
  figure = matplotlib.figure.Figure(figsize=(9.6, 6.4), layout='constrained')
  grid = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
  for unused in range(len(names), len(grid)):
    grid[unused].remove()
    # The panel above is now the last of its column.
    grid[unused - 3].tick_params(labelbottom=True)
  x = y = np.linspace(-11, 11, 201)
  mesh = jnp.stack(jnp.meshgrid(jnp.asarray(x), jnp.asarray(y)), -1)
  heights = jax.vmap(jax.vmap(toy_losses))(mesh).sum(-1)
  for axes, name, colour in zip(grid, names, _COLOURS):
    axes.contour(
      x, y, np.asarray(heights), levels=24, colors='0.8', linewidths=0.6
    )
    axes.plot([-7, 7], [-8.35, -8.35], color='#009E73', lw=5, alpha=0.5)
    # (records, learning rates, starts, seeds)
    xs, ys = (reshape(options, trained.history[f'{name}/{c}']) for c in 'xy')
    for j, start in enumerate(STARTS):
      axes.plot(xs[:, 0, j], ys[:, 0, j], color=colour, lw=0.8, alpha=0.6)
      axes.plot(xs[-1, 0, j], ys[-1, 0, j], 'o', color=colour, ms=3)
      axes.plot(*start, 'k*', ms=8)
    axes.set(title=name, xlim=(-11, 11), ylim=(-11, 11))
  rate = settings.learning_rates[0]
  figure.suptitle(
    f'Paths of all seeds, learning rate {rate:g}; the front is green'
  )
  return figure


def main(options: harness.Options) -> harness.Report:
  """Runs all methods."""
  settings, trained = options.settings, run(options)
  # From the first start, at the first learning rate.
  first = lambda name, measure: reshape(
    options, trained.history[f'{name}/{measure}']
  )[:, 0, 0]
  plots = {'paths.png': draw_paths(options, trained)}
  for measure, ylabel in (
    ('stationarity', 'smallest norm of a combination'),
    ('weight', 'weight of the first loss'),
  ):
    plots[f'{measure}.png'] = harness.draw_curves(
      {
        name: (trained.steps, first(name, measure))
        for name in settings.methods
        if name in PLOTTED
      },
      xlabel='step',
      ylabel=ylabel,
      title=f'start 1, learning rate {settings.learning_rates[0]:g}',
      logy=measure == 'stationarity',
      band='range',
    )
  return harness.Report(
    summarise(options, trained),
    columns=columns(settings),
    curves={name: first(name, 'stationarity') for name in settings.methods},
    plots=plots,
  )


STUDY = harness.Study(main, PRESETS)


if __name__ == '__main__':
  harness.run(STUDY)
