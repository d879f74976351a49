"""Fits convergence rates of coupled sequences, and of failing controls.

Paper: Shen and Chen, A Single-Timescale Analysis for Stochastic Approximation
with Multiple Coupled Sequences, 2022.

    python -m experiments.stsa.rates --preset=quick

Expected: exponents of -0.98 to -0.99 (theory: -1), and of -0.49 to -0.51
(theory: -1/2). Time: 2 minutes on 2 cores.

Seeds are mapped by `vmap`. A slope is that of the log mean error over log
steps, with an interval over seeds. `chains` makes the problems and asserts the
assumptions of the theorems.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import slopes
from experiments.stsa import (
  actor_critic,
  applications,
  chains,
  risk,
  schedules,
)

NESTED: dict[str, Callable[[], applications.Nested]] = {
  'ridge': applications.ridge,
  'bilevel_quadratic': applications.bilevel_quadratic,
  'risk_averse': risk.risk_averse,
  'risk_averse/scgd': lambda: risk.risk_averse(method='scgd'),
}
APPLICATIONS = (*NESTED, 'actor_critic')
MEANINGS = {
  'ridge': 'ridge regression, whose weight decay is the upper variable.',
  'bilevel_quadratic': 'a stochastic bilevel quadratic.',
  'risk_averse': 'a risk-averse problem of three nested expectations.',
  'risk_averse/scgd': 'the same by SCGD, without the correction.',
  'actor_critic': 'actor and critic as two coupled sequences.',
}
BINS = 16  # Number of log-spaced bins of a fit.
FIXED_STEP = 0.1  # Step size of the control with equal steps for all lengths.


@dataclasses.dataclass(frozen=True)
class NonMonotone:
  """Runs of several lengths K, with the constant step size 1 / sqrt(K).

  Attributes:
    inner: numbers of inner sequences.
    ratios: inner step size over the main one, for each of `inner`.
    lengths: lengths K of the runs.
    seeds: number of seeds per length.
  """

  inner: tuple[int, ...] = (1, 3, 5)
  ratios: tuple[float, ...] = (1.0, 4.0, 8.0)
  lengths: tuple[int, ...] = (300, 600, 1_200, 2_500, 5_000, 10_000)
  seeds: int = 16


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    steps: length of the runs with decaying step sizes; fits use the last 99 %.
    chunk: steps between two records; errors are means over a chunk.
    seeds: number of seeds of noise and start.
    size: dimension of each sequence.
    inner: numbers of strongly monotone inner sequences.
    nonmonotone: runs with a non-monotone main sequence.
    applications: nested problems.
  """

  steps: int = 20_000
  chunk: int = 100
  seeds: int = 64
  size: int = 10
  inner: tuple[int, ...] = (1, 2, 3, 5)
  nonmonotone: NonMonotone = NonMonotone()
  applications: Annotated[
    tuple[str, ...],
    harness.Allowed(empty=True),
    harness.Among(APPLICATIONS, MEANINGS),
  ] = APPLICATIONS


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    inner=(1, 3),
    nonmonotone=NonMonotone((1,), (1.0,)),
    applications=(),
    seeds=32,
  ),
  # The paper has no experiments: more seeds and steps.
  'paper': Settings(
    steps=200_000, seeds=256, nonmonotone=NonMonotone(seeds=64)
  ),
}
# Former flags.
RENAMED = {
  'horizons': 'nonmonotone.lengths',
  'horizon_seeds': 'nonmonotone.seeds',
  'nonmonotone_inner': 'nonmonotone.inner',
}


def make_solver(chain: chains.Chain, steps: Mapping[str, Any]):
  """Makes a solver of a chain that records its errors at each step."""
  moves = {
    name: lambda z, batch, move=move: move(z, batch['drawn'])
    for name, move in chain.increments.items()
  }
  solver = bj.stsa(moves, steps=dict(steps))
  return harness.with_metrics(solver, lambda z, updates: chain.errors(z))


def run(options, chain, name, solver, *, steps, seeds, hyper=()):
  """Runs all members; records means of errors over chunks as `loss/<error>`.

  Args:
    options: options of the run.
    chain: the problem.
    name: name of the run.
    solver: a solver, or a function of a `harness.Context` to one.
    steps: number of steps.
    seeds: one seed per member.
    hyper: hyperparameters per member.

  Returns:
    The trained run.
  """
  return harness.train(
    solver,
    harness.Task(
      lambda context: chain.start(context.seed_key),
      # A dictionary, because a batch with the structure of params is refused.
      lambda context: {'drawn': chain.draw(context.key)},
      hyper=hyper,
    ),
    harness.Training.from_options(
      options,
      steps=steps,
      chunk=options.settings.chunk,
      seeds=seeds,
      name=name,
      settings=options.settings,
    ),
  )


class Curve(NamedTuple):
  """Binned errors and their fitted slope."""

  steps: np.ndarray
  values: np.ndarray  # (bins, seeds).
  slope: harness.Interval


def falling(options: harness.Options, case: schedules.Case) -> dict[str, Curve]:
  """Runs a case with decaying step sizes; returns a curve per error."""
  settings = options.settings
  chain = chains.monotone_chain(case.inner, size=settings.size)
  scale, exponent, offset = case.main
  ratio = case.others[0] / scale if case.others[1] == exponent else 1.0
  chains.check_assumptions(
    chain,
    ratio=ratio,
    scale=scale if exponent == 1 else None,
    offset=offset,
    fast=case.fast,
  )
  steps = {
    name: bj.solvers.power_schedule(*case.others) for name in chain.names[1:]
  }
  steps |= {'x': bj.solvers.power_schedule(*case.main)}
  trained = run(
    options,
    chain,
    case.name,
    make_solver(chain, steps),
    steps=settings.steps,
    seeds=options.seeds,
  )
  curves = {}
  middle = trained.steps - settings.chunk / 2
  for error in case.errors:
    means = trained.history[f'loss/{error}']
    at, values = slopes.log_bins(
      middle, means, first=settings.steps / 100, bins=BINS
    )
    curves[error] = Curve(at, values, slopes.fit(at, values))
  return curves


def by_length(
  options: harness.Options,
  name: str,
  chain: chains.Chain,
  ratio: float,
  *,
  scale: float = 1.0,
  fixed: bool = False,
) -> Curve:
  """Mean squared gradient norms of runs of several lengths.

  All members run for the longest length; shorter ones are read at their length.

  Args:
    options: options of the run.
    name: name of the run.
    chain: the problem.
    ratio: inner step size over the main one.
    scale: scale of the main step size, scale / sqrt(K).
    fixed: whether all lengths use the step size `FIXED_STEP` instead.

  Returns:
    The curve over lengths.
  """
  settings = options.settings
  lengths = settings.nonmonotone.lengths
  step_sizes = [FIXED_STEP if fixed else scale * n**-0.5 for n in lengths]
  chains.check_assumptions(
    chain, ratio=ratio, scale=max(step_sizes), offset=1.0, fast=False
  )
  seeds, hyper = harness.members(settings.nonmonotone.seeds, step=step_sizes)

  def solver(context):
    step = context.hyper['step']
    steps = {name: ratio * step for name in chain.names[1:]}
    return make_solver(chain, steps | {'x': step})

  trained = run(
    options,
    chain,
    name,
    solver,
    steps=max(lengths),
    seeds=seeds,
    hyper=hyper,
  )
  total = settings.chunk * np.cumsum(trained.history['loss/main'], axis=0)
  by_length = total.reshape(len(trained.steps), len(lengths), -1)
  at = [trained.steps.tolist().index(n) for n in lengths]
  values = np.stack(
    [by_length[row, i] / n for i, (row, n) in enumerate(zip(at, lengths))]
  )
  steps = np.array(lengths, np.float64)
  return Curve(steps, values, slopes.fit(steps, values))


def nested(
  options: harness.Options, name: str, problem: applications.Nested
) -> Curve:
  """Squared errors of x in a nested problem."""
  settings = options.settings

  def init(context):
    flat, unravel = ravel_pytree(problem.params(problem.solution))
    noise = problem.distance * jax.random.normal(context.key, flat.shape)
    return unravel(flat + noise)

  trained = harness.train(
    applications.nested_solver(problem),
    harness.Task(init, lambda context: problem.draw(context.key)),
    harness.Training.from_options(
      options,
      steps=settings.steps,
      chunk=settings.chunk,
      name=name,
      settings=settings,
    ),
    harness.Measure(
      lambda context, params, state: {'error': problem.error(params)}
    ),
  )
  at, values = slopes.log_bins(
    trained.steps.astype(np.float64),
    trained.history['error'],
    first=settings.steps / 100,
    bins=BINS,
  )
  # The error falls as 1 / (k + k_0), and k_0 is not small relative to k.
  at = at + applications.steps_for(problem).offset
  return Curve(at, values, slopes.fit(at, values))


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  for length in (settings.steps, *settings.nonmonotone.lengths):
    if length % settings.chunk:
      raise harness.SettingsError(
        f'{length} steps must be a multiple of chunk={settings.chunk}, over '
        'which errors are averaged.'
      )
  if len(settings.nonmonotone.ratios) != len(settings.nonmonotone.inner):
    raise harness.SettingsError(
      'nonmonotone.ratios must have one number per nonmonotone.inner.'
    )


def measure(
  options: harness.Options,
) -> tuple[harness.Results, dict[str, dict[str, Any]]]:
  """Runs all cases.

  Args:
    options: options of the run.

  Returns:
    The slopes, and curves by plot and label.
  """
  settings, results = options.settings, harness.Results()
  plots: dict[str, dict[str, Any]] = {}

  def add(case, curve, error, **labels):
    """Adds a slope, and its curve to the plots named by `labels`."""
    results.add({'case': case}, slope=curve.slope)
    results.note({'case': case}, {'of': error})
    for plot, label in labels.items():
      label = f'{label}: {curve.slope.mean:.2f}'
      plots.setdefault(plot, {})[label] = curve[:2]

  for case in schedules.cases(settings.inner):
    labels = {'monotone': case.title} if case.fast else {}
    if not case.fast or case.inner == settings.inner[0]:
      labels['schedules'] = case.title
    for error, curve in falling(options, case).items():
      end = f'/{error}' if len(case.errors) > 1 else ''
      add(case.name + end, curve, f'{error} error over k', **labels)
      labels = {}  # Plots only the first error.
  spread = [
    results.mean('slope', {'case': schedules.monotone(n)})
    for n in settings.inner
  ]
  results.add(
    {'case': 'strongly_monotone'}, slope_spread=harness.reduced(spread, 'ptp')
  )
  gradient_norm = 'mean squared gradient norm over K'
  inners, ratios = settings.nonmonotone.inner, settings.nonmonotone.ratios
  for inner, ratio, fixed in (
    *((n, ratio, False) for n, ratio in zip(inners, ratios, strict=True)),
    (inners[0], ratios[0], True),
  ):
    chain = chains.nonmonotone_chain(inner, size=settings.size)
    name = 'control/fixed_step' if fixed else f'nonmonotone/inner={inner}'
    curve = by_length(options, name, chain, ratio, fixed=fixed)
    label = 'control: fixed step' if fixed else f'N = {inner}'
    add(name, curve, gradient_norm, nonmonotone=label)
  for name in settings.applications:
    if name in NESTED:
      curve = nested(options, name, NESTED[name]())
      add(name, curve, 'squared error of x over k', nested=name)
    else:
      chain = actor_critic.actor_critic_chain()
      curve = by_length(options, name, chain, 2.0, scale=4.0)
      add(name, curve, gradient_norm, nonmonotone='actor-critic')
  return results, plots


def main(options: harness.Options) -> harness.Report:
  """Runs all cases and fits their slopes."""
  results, plots = measure(options)
  falling_steps = ('step k', 'squared error')
  lengths = ('length of the run K', 'mean squared gradient norm')
  figures = {
    f'{name}.png': harness.draw_curves(
      plots[name],
      xlabel=labels[0],
      ylabel=labels[1],
      title=f'{title}: slopes',
      logx=True,
      logy=True,
    )
    for name, labels, title in (
      ('monotone', falling_steps, 'Strongly monotone'),
      ('schedules', falling_steps, 'Other steps, controls'),
      ('nested', falling_steps, 'Nested problems'),
      ('nonmonotone', lengths, 'Non-monotone main sequence'),
    )
    if name in plots
  }
  return harness.Report(
    results, rows='case', columns=('of', 'slope'), plots=figures
  )


STUDY = harness.Study(main, PRESETS, check=check, renamed=RENAMED)


if __name__ == '__main__':
  harness.run(STUDY)
