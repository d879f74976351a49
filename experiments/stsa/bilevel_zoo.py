"""Stochastic bilevel methods on one problem, with equal calls and equal grids.

    python -m experiments.stsa.bilevel_zoo --problem=quadratic --preset=quick

Every method gets the same number of calls on a batch (a gradient, or a product
with a Hessian) and the same grid of step sizes, tuned with a seed that no
number in the table uses. `control/direct` drops the implicit term: what it
reaches, any method must beat.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.stsa import methods, quadratic, zoo_figure

TUNING_SEED = 1_000_000


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    problem: `quadratic`.
    methods: what is compared, by the names in `methods.METHODS`.
    calls: calls on a batch that each method gets.
    coupling: of the lower loss: how much its solution moves with x.
    samples: of each loss.
    size: dimension of each variable.
    batch_size: samples in a fixed batch.
    lower_steps: tried step sizes of the lower variable at the start.
    ratios: tried ratios of the upper step to the lower one.
    exponents: tried powers with which both fall after the first `warm` part.
    warm: share of the run before which steps stay.
    series: step of the Neumann series.
    seeds: of the start and the draws.
    correction_seeds: of SUSTAIN beside itself without its correction.
    records: how many times a run is measured.
  """

  problem: Literal['quadratic'] = 'quadratic'
  methods: tuple[str, ...] = tuple(methods.METHODS)
  calls: int = 100_000
  coupling: float = 0.3
  samples: int = 1_024
  size: int = 100
  batch_size: int = 64
  lower_steps: tuple[float, ...] = (0.1, 0.3)
  ratios: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
  exponents: tuple[float, ...] = (0.0, 1.0)
  warm: float = 0.02
  series: float = 0.3
  seeds: int = 4
  correction_seeds: int = 8
  records: int = 50


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(methods=('control/direct', 'soba', 'saba')),
  'paper': Settings(calls=1_000_000, seeds=10),
}


def check(settings: Settings) -> None:
  """Raises ValueError for settings that no run can have."""
  for name in settings.methods:
    if name not in methods.METHODS:
      known = ', '.join(methods.METHODS)
      raise ValueError(f'unknown method {name!r}; known: {known}.')
  if settings.samples % settings.batch_size:
    raise ValueError(
      f'{settings.samples} samples are no multiple of {settings.batch_size}.'
    )


class Zoo:
  """Runs methods on one problem.

  Args:
    options: what the flags say.
  """

  def __init__(self, options: harness.Options) -> None:
    self._options = options
    self._settings = settings = options.settings
    self._quadratic = quadratic.make_quadratic(
      coupling=settings.coupling,
      samples=settings.samples,
      size=settings.size,
      batch_size=settings.batch_size,
    )

  def series_floor(self, terms: int) -> float:
    """What the bias of so many terms of the Neumann series leaves."""
    return self._quadratic.series_floor(terms, self._settings.series)

  def tune_and_run(self, method: str) -> tuple[dict, harness.Trained]:
    """The best of the grid on the tuning seed, and its run on the seeds."""
    settings = self._settings
    seeds, grid = harness.members(
      (TUNING_SEED,),
      step=settings.lower_steps,
      ratio=settings.ratios,
      exponent=settings.exponents,
    )
    tuned = self.train(method, f'{method}/tuning', seeds, grid)
    last = tuned.history['hypergradient'][-settings.records // 10 :]
    ends = np.where(np.isfinite(last), last, np.inf).mean(axis=0)
    winner = int(np.argmin(ends))
    chosen = {name: float(values[winner]) for name, values in grid.items()}
    seeds, hyper = harness.members(
      settings.seeds, **{name: (value,) for name, value in chosen.items()}
    )
    return chosen, self.train(method, method, seeds, hyper)

  def train(self, method, name, seeds, hyper, *, make=None):
    """Runs one method for the budget of calls, all members at once."""
    settings, problem = self._settings, self._quadratic
    steps = settings.calls / methods.expected_calls(method, settings.size)
    chunk = max(1, round(steps / settings.records))
    steps = chunk * settings.records
    make = make or methods.METHODS[method]

    def solver(hyper):
      def falling(count):
        done = jnp.asarray(count, jnp.float32) / (settings.warm * steps)
        return hyper['step'] * (1 + done) ** -hyper['exponent']

      return make(
        methods.Making(
          problem=problem.problem,
          lower=falling,
          upper=lambda count: hyper['ratio'] * falling(count),
          series=settings.series,
          batches=problem.batches,
          progress=lambda count: jnp.minimum(count / steps, 1.0),
        )
      )

    def batch(context):
      drawn = jax.random.randint(
        context.key, (2, methods.DRAWS + 1), 0, problem.batches
      )
      return {
        'upper': drawn[0, 0],
        'lower': drawn[1, 0],
        'upper_more': drawn[0, 1:],
        'lower_more': drawn[1, 1:],
      }

    def evaluate(context, params, state):
      del context
      slope = problem.hypergradient(params.upper)
      return {
        'hypergradient': jnp.vdot(slope, slope),
        'calls': methods.calls_of(bj.counts(state), settings.size),
      }

    return harness.train(
      solver,
      lambda context: problem.start(context.seed_key),
      batch,
      steps=steps,
      chunk=chunk,
      seeds=seeds,
      workdir=self._options.workdir,
      name=name,
      hyper=hyper,
      evaluate=evaluate,
      record_start=True,
      settings=_settings_of_one_run(settings),
    )


def _settings_of_one_run(settings: Settings) -> dict[str, Any]:
  given = dataclasses.asdict(settings)
  return {k: v for k, v in given.items() if k not in ('methods', 'seeds')}


def main(options: harness.Options) -> None:
  """Runs the methods and writes the table, the plots and the results."""
  start = time.monotonic()
  settings = options.settings
  check(settings)
  zoo = Zoo(options)
  print(
    'Grid: lower step '
    f'{settings.lower_steps}, ratio {settings.ratios}, exponent '
    f'{settings.exponents}.'
  )
  metrics: dict[str, float] = {}
  rows, by_calls, by_time = [], {}, {}
  for method in settings.methods:
    chosen, trained = zoo.tune_and_run(method)
    values, calls = trained.history['hypergradient'], trained.history['calls']
    final = float(np.mean(values[-1]))
    reduction = float(np.mean(values[0])) / final
    spent = float(np.mean(calls[-1]))
    seconds = trained.seconds / settings.seeds
    metrics[f'{method}/final'] = final
    metrics[f'{method}/reduction'] = reduction
    metrics[f'{method}/calls'] = spent
    metrics[f'{method}/seconds'] = seconds
    rows.append(
      {
        'method': method,
        'final': final,
        'reduction': reduction,
        'calls a step': spent / trained.step,
        's a run': seconds,
        **chosen,
      }
    )
    by_calls[method] = (calls.mean(axis=1), values.mean(axis=1))
    shares = np.linspace(0, 1, len(values))
    by_time[method] = (seconds * shares, values.mean(axis=1))

  if 'sustain' in settings.methods:
    correct = {}
    for name, make in (
      ('sustain', methods.METHODS['sustain']),
      ('plain', methods.without_correction),
    ):
      seeds, hyper = harness.members(
        settings.correction_seeds, step=(0.3,), ratio=(1.0,), exponent=(1 / 3,)
      )
      trained = zoo.train(
        'sustain', f'correction/{name}', seeds, hyper, make=make
      )
      correct[name] = float(trained.history['hypergradient'][-1].mean())
    gain = correct['plain'] / correct['sustain']
    metrics['sustain/correction_gain'] = gain
    print(f'SUSTAIN beside itself without the correction: {gain:.2f} x below.')

  control = metrics.get('control/direct/final')
  for method in settings.methods if control else ():
    metrics[f'{method}/of_control'] = metrics[f'{method}/final'] / control
  floor = zoo.series_floor(methods.TERMS)
  metrics['floor/series'] = floor
  print(
    f'Bias floor of {methods.TERMS} terms of the Neumann series (BSA, TTSA, '
    f'SUSTAIN; one term more in the others): {floor:.3g}.'
  )
  harness.write_table(options.workdir, rows)
  zoo_figure.draw(
    pathlib.Path(options.workdir) / f'{settings.problem}.png',
    by_calls,
    by_time,
    title=f'Bilevel quadratics, lower coupling {settings.coupling}',
  )
  path = harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'Results: {path}')


if __name__ == '__main__':
  harness.run(main, PRESETS, paper='stsa', binary='bilevel_zoo')
