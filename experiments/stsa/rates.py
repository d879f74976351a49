"""Convergence rates of coupled sequences, fitted, beside controls that fail.

Paper: Shen and Chen, A Single-Timescale Analysis for Stochastic Approximation
with Multiple Coupled Sequences, 2022.

    python -m experiments.stsa.rates --preset=quick

Expected: exponents -0.98 to -0.99 where -1 is claimed, -0.49 to -0.51 where
-1/2 is. Time: 2 minutes on 2 cores.

Many seeds at once by `vmap`; each slope is of log mean error over log steps,
with an interval over seeds. `chains` makes the problems and asserts what the
theorems assume.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj
from experiments import harness
from experiments.harness import slopes
from experiments.stsa import (
  actor_critic,
  applications,
  chains,
  risk,
  schedules,
)

APPLICATIONS: dict[str, Callable[[], applications.Nested]] = {
  'ridge': applications.ridge,
  'bilevel_quadratic': applications.bilevel_quadratic,
  'risk_averse': risk.risk_averse,
  'risk_averse/scgd': lambda: risk.risk_averse(method='scgd'),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    steps: of the runs with falling steps; the window of the fit is the last
      99 % of them.
    chunk: steps between two records; errors are means over a chunk.
    seeds: of the noise and the start.
    size: dimension of each sequence.
    bins: of the fit, on a log scale.
    inner: numbers of inner sequences, strongly monotone.
    horizons: lengths K of runs with the constant step 1 / sqrt(K).
    horizon_seeds: seeds of each of these.
    nonmonotone_inner: their numbers of inner sequences.
    ratios: their inner steps over the main one, one for each number.
    fixed_step: the constant step of a control, the same for every horizon.
    applications: nested problems, and `actor_critic`.
  """

  steps: int = 20_000
  chunk: int = 100
  seeds: int = 64
  size: int = 10
  bins: int = 16
  inner: tuple[int, ...] = (1, 2, 3, 5)
  horizons: tuple[int, ...] = (300, 600, 1_200, 2_500, 5_000, 10_000)
  horizon_seeds: int = 16
  nonmonotone_inner: tuple[int, ...] = (1, 3, 5)
  ratios: tuple[float, ...] = (1.0, 4.0, 8.0)
  fixed_step: float = 0.1
  applications: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = (
    *APPLICATIONS,
    'actor_critic',
  )


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    inner=(1, 3),
    nonmonotone_inner=(1,),
    ratios=(1.0,),
    applications=(),
    seeds=32,
  ),
  # The paper has theorems, no runs: more seeds and steps of the same.
  'paper': Settings(steps=200_000, seeds=256, horizon_seeds=64),
}


def make_solver(chain: chains.Chain, steps: Mapping[str, Any]):
  """Coupled sequences whose errors are measured at every step."""

  def of_draw(move):
    return lambda z, batch: move(z, batch['drawn'])

  moves = {name: of_draw(move) for name, move in chain.increments.items()}
  solver = bj.stsa(moves, steps=dict(steps))
  return harness.measured(solver, lambda z, updates: chain.errors(z))


def run(options, chain, name, solver, *, steps, seeds, hyper=()):
  """Runs all members; errors are means over chunks, `loss/<error>`.

  Args:
    options: what the flags say.
    chain: the problem.
    name: of the run.
    solver: a solver, or a function of a `harness.Context` to one.
    steps: how many.
    seeds: a seed for each member.
    hyper: hyperparameters of each member.

  Returns:
    The trained run.
  """
  return harness.train(
    solver,
    lambda context: chain.start(context.seed_key),
    # In a dict: a batch that looks like params is refused.
    lambda context: {'drawn': chain.draw(context.key)},
    steps=steps,
    chunk=options.settings.chunk,
    seeds=seeds,
    workdir=options.workdir,
    save_seconds=options.save_seconds,
    name=name,
    hyper=hyper,
    settings=options.settings,
  )


class Curve(NamedTuple):
  """Binned errors and the slope through them."""

  steps: np.ndarray
  values: np.ndarray  # (bins, seeds).
  slope: harness.Interval


def falling(options: harness.Options, case: schedules.Case) -> dict[str, Curve]:
  """Runs one case; a curve for each error."""
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
  for error in ('main', 'inner', 'sum'):
    means = trained.history[f'loss/{error}']
    at, values = slopes.log_bins(
      middle, means, first=settings.steps / 100, bins=settings.bins
    )
    curves[error] = Curve(at, values, slopes.fit(at, values))
  return curves


def horizons(
  options: harness.Options,
  name: str,
  chain: chains.Chain,
  ratio: float,
  *,
  scale: float = 1.0,
  fixed: bool = False,
) -> Curve:
  """Mean squared gradient norms of runs of several lengths.

  Every member takes the longest run's steps; those of a shorter one are read
  off at its end.

  Args:
    options: what the flags say.
    name: of the run.
    chain: the problem.
    ratio: of the inner steps to the main one.
    scale: of the main step, scale / sqrt(K).
    fixed: whether the step is the same for every length instead.

  Returns:
    The curve over lengths.
  """
  settings = options.settings
  lengths = settings.horizons
  step_of = lambda n: settings.fixed_step if fixed else scale * n**-0.5
  # The largest step is the first one of a schedule.
  largest = max(map(step_of, lengths))
  chains.check_assumptions(
    chain, ratio=ratio, scale=largest, offset=1.0, fast=False
  )
  seeds, hyper = harness.members(
    settings.horizon_seeds, step=[step_of(n) for n in lengths]
  )

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
  """The squared error of x in a nested problem."""
  settings = options.settings

  def init(context):
    flat, unravel = ravel_pytree(problem.params(problem.solution))
    noise = problem.distance * jax.random.normal(context.key, flat.shape)
    return unravel(flat + noise)

  def evaluate(context, params, state):
    del context, state
    return {'error': problem.error(params)}

  trained = harness.train(
    applications.nested_solver(problem),
    init,
    lambda context: problem.draw(context.key),
    steps=settings.steps,
    chunk=settings.chunk,
    seeds=options.seeds,
    workdir=options.workdir,
    save_seconds=options.save_seconds,
    name=name,
    evaluate=evaluate,
    settings=settings,
  )
  at, values = slopes.log_bins(
    trained.steps.astype(np.float64),
    trained.history['error'],
    first=settings.steps / 100,
    bins=settings.bins,
  )
  # The error falls as 1 / (k + k_0), and k_0 is no longer small beside k.
  at = at + applications.steps_for(problem).offset
  return Curve(at, values, slopes.fit(at, values))


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  lengths = (settings.steps, *settings.horizons)
  for length in lengths:
    if length % settings.chunk:
      raise harness.SettingsError(
        f'{length} steps are no multiple of chunk={settings.chunk}, over '
        'which errors are means.'
      )
  known = (*APPLICATIONS, 'actor_critic')
  if unknown := set(settings.applications) - set(known):
    raise harness.SettingsError(
      f'unknown applications {sorted(unknown)}; known: {", ".join(known)}.'
    )
  if len(settings.ratios) != len(settings.nonmonotone_inner):
    raise harness.SettingsError(
      'ratios gives one number for each of nonmonotone_inner.'
    )


def main(options: harness.Options) -> None:
  """Runs all cases and writes slopes, table and plots."""
  start = time.monotonic()
  settings = options.settings
  metrics: dict[str, float] = {}
  rows, monotone, controls, lengths, nested_curves = [], {}, {}, {}, {}

  def put(name, slope, what):
    metrics.update(slope.metrics(name))
    rows.append({'slope': name, 'of': what, 'fitted (95 %)': str(slope)})

  for case in schedules.cases(settings.inner):
    curves = falling(options, case)
    put(case.metric, curves[case.error].slope, f'{case.error} error over k')
    if case.name in ('two_timescale', 'ttsa'):
      for error in ('main', 'inner'):
        if error != case.error:
          put(f'{case.metric}/{error}', curves[error].slope, f'{error} error')
    curve = curves[case.error]
    label = schedules.TITLES.get(case.name, f'N = {case.inner}')
    label += f': {curve.slope.mean:.2f}'
    if case.inner == settings.inner[0] and case.fast:
      controls[label] = curve[:2]
    (monotone if case.fast else controls)[label] = curve[:2]
  metrics['slope/strongly_monotone/spread'] = harness.reduced(
    [metrics[f'slope/strongly_monotone/n{n}'] for n in settings.inner], 'ptp'
  )

  pairs = zip(settings.nonmonotone_inner, settings.ratios)
  runs = [(n, ratio, False) for n, ratio in pairs]
  runs.append((settings.nonmonotone_inner[0], settings.ratios[0], True))
  for inner, ratio, fixed in runs:
    chain = chains.nonmonotone_chain(inner, size=settings.size)
    run_name = f'nonmonotone_{inner}' + ('_fixed' if fixed else '')
    curve = horizons(options, run_name, chain, ratio, fixed=fixed)
    name = 'control/fixed_step' if fixed else f'slope/nonmonotone/n{inner}'
    put(name, curve.slope, 'mean squared gradient norm over K')
    label = 'control: fixed step' if fixed else f'N = {inner}'
    lengths[f'{label}: {curve.slope.mean:.2f}'] = curve[:2]

  for name in settings.applications:
    if name == 'actor_critic':
      chain = actor_critic.actor_critic_chain()
      curve = horizons(options, name, chain, 2.0, scale=4.0)
      put(f'slope/{name}', curve.slope, 'mean squared gradient norm over K')
      lengths[f'actor-critic: {curve.slope.mean:.2f}'] = curve[:2]
      continue
    curve = nested(options, name, APPLICATIONS[name]())
    put(f'slope/{name}', curve.slope, 'squared error of x over k')
    nested_curves[f'{name}: {curve.slope.mean:.2f}'] = curve[:2]
  harness.write_table(options.workdir, rows)
  folder = pathlib.Path(options.workdir)
  falling_steps = ('step k', 'squared error')
  by_length = ('length of the run K', 'mean squared gradient norm')
  for name, curves, (xlabel, ylabel), title in (
    ('monotone', monotone, falling_steps, 'Strongly monotone: slopes'),
    ('schedules', controls, falling_steps, 'Other steps, controls: slopes'),
    ('nested', nested_curves, falling_steps, 'Nested problems: slopes'),
    ('nonmonotone', lengths, by_length, 'Non-monotone main sequence: slopes'),
  ):
    if not curves:
      continue
    harness.plot_curves(
      folder / f'{name}.png',
      curves,
      xlabel=xlabel,
      ylabel=ylabel,
      title=title,
      logx=True,
      logy=True,
    )
  path = harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'Results: {path}')


STUDY = harness.Study(main, PRESETS, paper='stsa', binary='rates', check=check)


if __name__ == '__main__':
  harness.run(STUDY)
