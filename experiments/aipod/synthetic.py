"""Synthetic equality-constrained problem: what lazy projections save.

Paper: Xiao, Shen, Yin and Chen, Alternating Projected SGD for
Equality-constrained Bilevel Optimization, 2023.

    python -m experiments.aipod.synthetic --preset=quick

Expected: 0.24 of AiPOD's projections at 1.1 times its upper steps (p = 0.3, T =
2). Time: 2 minutes on 2 cores.

AiPOD projects the lower variable in each of its S steps and the upper one in
each update; E-AiPOD projects below with probability p, and above once in T
steps. Both run until the running average of a stationarity measure reaches the
one of AiPOD at 80 % of its iterations; compared are projections and upper
steps until then, seed by seed.
"""

import dataclasses
import pathlib
import time
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.aipod import quadratic

# Fields that no single variant's run depends on.
OTHERS = ('probabilities', 'upper_steps', 'relaxations')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Xiao et al., 2023, section 5.1.

  Attributes:
    size: coordinates of both variables, the paper's 100.
    objective: published, or released (the sine has lost x).
    probabilities: of a lower projection; the paper's are .05 to .7.
    upper_steps: T, the paper's 1 and 2.
    lower_steps: S, the paper's 5.
    upper_rate: alpha; the published .02 fails on the published matrices.
    published_rate: that alpha, reported beside.
    lower_rate: beta.
    relaxations: delta beside 1, for probability .3 and two upper steps.
    start: standard deviation of each coordinate of the start, before it is
      projected; ours.
    noise: standard deviation in each coordinate of a gradient, the paper's.
    steps: iterations of AiPOD, whose 80 % set the target.
    cap: iterations after which a seed has not reached it.
    chunk: iterations between two records, the resolution of the results.
    uniform_steps: iterations on the published matrices; 0 leaves them out.
    seeds: of matrices, noise, coins and starts.
  """

  size: int = 100
  objective: Literal['published', 'released'] = 'published'
  probabilities: Annotated[tuple[float, ...], harness.Allowed(high=1)] = (
    0.1,
    0.3,
    0.7,
  )
  upper_steps: tuple[int, ...] = (1, 2)
  lower_steps: int = 5
  upper_rate: float = 0.002
  published_rate: float = 0.02
  lower_rate: float = 0.1
  relaxations: Annotated[tuple[float, ...], harness.Allowed(empty=True)] = (
    1.4,
    4.0,
  )
  start: Annotated[float, harness.Allowed(0)] = 0.7
  noise: Annotated[float, harness.Allowed(0)] = 0.1
  steps: int = 2_000
  cap: int = 4_000
  chunk: int = 10
  uniform_steps: Annotated[int, harness.Allowed(0)] = 2_000
  seeds: int = 10


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    probabilities=(0.3,),
    relaxations=(),
    steps=600,
    cap=1_200,
    chunk=20,
    uniform_steps=0,
    seeds=3,
  ),
  'paper': Settings(
    probabilities=(0.05, 0.1, 0.3, 0.5, 0.7),
    relaxations=(1.4, 2.0, 3.0, 4.0),
    uniform_steps=8_000,
  ),
}
HEADLINE = (0.3, 2)  # The probability and upper steps of most claims.


class Variant(NamedTuple):
  """One solver on one kind of matrices; its name is that of its folder."""

  name: str
  matrices: str = 'orthonormal'
  probability: float | None = None  # None for AiPOD.
  upper_steps: int = 1
  relaxation: float = 1.0
  control_variate: bool = True
  rate: float = 1.0  # Times the upper step size of the settings.


def variants(settings: Settings) -> list[Variant]:
  """What is run, those that set a target first."""
  p, t = HEADLINE
  lazy = Variant(f'e_aipod/p{p:g}/t{t}', 'orthonormal', p, t)
  found = [
    Variant('aipod'),
    Variant('aipod_twice_step', rate=2.0),
    *(
      Variant(f'e_aipod/p{p:g}/t{t}', 'orthonormal', p, t)
      for t in settings.upper_steps
      for p in settings.probabilities
    ),
    lazy._replace(
      name='no_control_variate', upper_steps=1, control_variate=False
    ),
    lazy._replace(name=f'no_control_variate_t{t}', control_variate=False),
    *(
      lazy._replace(name=f'relaxation{delta:g}', relaxation=delta)
      for delta in settings.relaxations
    ),
  ]
  if not settings.uniform_steps:
    return found
  prefix = 'paper_matrices'
  found += [
    Variant(f'{prefix}/aipod', 'uniform'),
    *(
      Variant(f'{prefix}/e_aipod/p{p:g}/t{t}', 'uniform', p, t)
      for t in settings.upper_steps
    ),
    Variant(
      f'{prefix}/aipod_published_step',
      'uniform',
      rate=settings.published_rate / settings.upper_rate,
    ),
  ]
  return found


def make_solver(
  variant: Variant, settings: Settings, context: harness.Context
) -> optax.GradientTransformationExtraArgs:
  """The solver of a variant, which also measures how stationary it is."""
  instance = context.hyper['instance']
  sets = quadratic.sets_of(instance)
  upper = bj.Sequence(
    optax.sgd(variant.rate * settings.upper_rate), set=sets['upper']
  )
  lower = bj.Sequence(
    optax.sgd(settings.lower_rate),
    set=sets['lower'],
    steps=settings.lower_steps,
    batch_at=quadratic.lower_batch,
  )
  make = bj.aipod
  if variant.probability is not None:
    make = bj.e_aipod
    upper = upper._replace(
      set=bj.projections.Relaxed(sets['upper'], variant.relaxation),
      steps=variant.upper_steps,
      batch_at=quadratic.upper_batch,
    )
    lower = lower._replace(
      set=bj.projections.Lazy(
        sets['lower'],
        variant.probability,
        key=context.seed_key,
        control_variate=variant.control_variate,
      )
    )
  solver = make(
    quadratic.PROBLEM,
    upper=upper,
    lower=lower,
    # Exact: the lower Hessian is the identity.
    solve=bj.linear_solvers.conjugate_gradient(1),
  )

  def measure(params, updates):
    y = params.lower + updates.lower
    return {'measure': quadratic.stationarity(instance, params.upper, y)}

  return harness.measured(solver, measure)


def running_average(history: dict[str, np.ndarray]) -> np.ndarray:
  """The mean of the measure over all steps so far, (records, seeds)."""
  means = history['loss/measure']
  return np.cumsum(means, axis=0) / np.arange(1, len(means) + 1)[:, None]


def run(
  variant: Variant,
  options: harness.Options,
  target: np.ndarray | None = None,
) -> harness.Trained:
  """Runs all seeds of a variant.

  Args:
    variant: what to run.
    options: what the flags say.
    target: the running average at which to stop, (seeds,); None runs AiPOD's
      iterations.
  """
  settings, seeds = options.settings, options.seeds
  hyper = {
    'instance': quadratic.stack_instances(
      [
        quadratic.draw_instance(
          seed, variant.matrices, settings.objective, settings.size
        )
        for seed in seeds
      ]
    ),
  }

  def init(context):
    key_x, key_y = jax.random.split(context.seed_key)
    x, y = (jax.random.normal(k, (settings.size,)) for k in (key_x, key_y))
    sets = quadratic.sets_of(context.hyper['instance'])
    x = sets['upper'](settings.start * x)
    return bj.BilevelParams(x, sets['lower'](settings.start * y, x))

  def batch(context):
    return quadratic.draw_noise(
      context.key,
      context.hyper['instance'],
      settings.noise,
      lower_steps=settings.lower_steps,
      upper_steps=variant.upper_steps,
    )

  def evaluate(context, params, state):
    upper_set = quadratic.sets_of(context.hyper['instance'])['upper']
    outside = bj.diagnostics.feasibility(params, upper=upper_set)['upper']
    return {'outside': outside}

  def reached(history):
    return bool(np.all(np.min(running_average(history), axis=0) <= target))

  steps = settings.steps if variant.matrices == 'orthonormal' else None
  steps = steps or settings.uniform_steps
  if target is not None:
    steps = settings.cap if variant.matrices == 'orthonormal' else 2 * steps
  with np.errstate(all='ignore'):
    trained = harness.train(
      lambda context: make_solver(variant, settings, context),
      init,
      batch,
      steps=steps,
      chunk=settings.chunk,
      seeds=seeds,
      workdir=options.workdir,
      save_seconds=options.save_seconds,
      name=variant.name,
      hyper=hyper,
      evaluate=evaluate,
      stop_when=None if target is None else reached,
      settings=harness.settings_of(settings, *OTHERS),
    )
  average = {'average': running_average(trained.history)}
  return trained._replace(history=trained.history | average)


class Reached(NamedTuple):
  """Where each seed reached its target; infinity where it did not.

  Attributes:
    projections: lower and upper ones until then.
    upper_steps: until then.
  """

  projections: np.ndarray
  upper_steps: np.ndarray


def projections_of(trained: harness.Trained) -> np.ndarray:
  """Projections so far, lower and upper ones, (records, seeds)."""
  levels = ('lower', 'upper')
  return sum(trained.history[f'count/projections/{n}'] for n in levels)


def reach(
  trained: harness.Trained, target: np.ndarray, upper_steps: int
) -> Reached:
  """When the running average first is at or below the target of its seed."""
  below = trained.history['average'] <= target
  row = np.argmax(below, axis=0)
  missed = ~below.any(axis=0)
  seeds = np.arange(len(missed))
  spent = projections_of(trained)[row, seeds].astype(float)
  steps = upper_steps * trained.steps[row].astype(float)
  return Reached(
    np.where(missed, np.inf, spent), np.where(missed, np.inf, steps)
  )


def released_gradient_error(settings: Settings, seeds: tuple[int, ...]):
  """Relative error of the released code's gradient at the first points."""

  def error(instance, seed):
    x = jax.random.normal(jax.random.key(seed), (settings.size,))
    x = quadratic.sets_of(instance)['upper'](x)
    exact = quadratic.hypergradient(instance, x)
    released = quadratic.hypergradient(instance, x, released=True)
    return jnp.linalg.norm(released - exact) / jnp.linalg.norm(exact)

  found = {}
  for matrices in ('orthonormal', 'uniform'):
    draws = [
      quadratic.draw_instance(s, matrices, settings.objective, settings.size)
      for s in seeds
    ]
    errors = jax.vmap(error)(
      quadratic.stack_instances(draws), jnp.asarray(seeds, jnp.uint32)
    )
    found[matrices] = harness.reduced(errors, 'median')
  return found


def main(options: harness.Options) -> dict[str, float]:
  """Runs all variants and writes the table, the plots and the results."""
  start = time.monotonic()
  settings, seeds = options.settings, options.seeds
  runs: dict[str, harness.Trained] = {}
  targets: dict[str, np.ndarray] = {}
  base: dict[str, Reached] = {}
  metrics: dict[str, float] = {}
  rows = []
  everything = variants(settings)
  for variant in everything:
    kind = variant.matrices
    trained = run(variant, options, targets.get(kind))
    runs[variant.name] = trained
    if kind not in targets:
      # AiPOD itself: the target, and what the others are compared with.
      row = int(np.searchsorted(trained.steps, 0.8 * trained.steps[-1]))
      targets[kind] = trained.history['average'][row]
      base[kind] = reach(trained, targets[kind], 1)
    found = reach(trained, targets[kind], variant.upper_steps)
    ratios = {
      'projections_ratio': ratio(found.projections, base[kind].projections),
      'upper_steps_ratio': ratio(found.upper_steps, base[kind].upper_steps),
    }
    if variant.upper_steps == 2 and kind == 'orthonormal':
      twice = reach(runs['aipod_twice_step'], targets[kind], 1)
      ratios['projections_ratio_equal_step'] = ratio(
        found.projections, twice.projections
      )
    medians = {k: harness.reduced(v, 'median') for k, v in ratios.items()}
    metrics |= {f'{variant.name}/{k}': v for k, v in medians.items()}
    reaching = int(np.sum(np.isfinite(found.projections)))
    metrics[f'{variant.name}/seeds_reaching'] = reaching
    stopped = len(trained.stopped)
    metrics[f'{variant.name}/seeds_stopped'] = stopped
    outside = trained.history['outside']
    metrics[f'{variant.name}/outside'] = harness.reduced(outside.ravel(), 'max')
    rows.append(
      {
        'run': variant.name,
        'projections': _infinite(medians['projections_ratio']),
        'upper steps': _infinite(medians['upper_steps_ratio']),
        'projections, equal step': medians.get('projections_ratio_equal_step'),
        'seeds reaching': f'{reaching} of {len(seeds)}',
        'seeds stopped': stopped,
        'iterations': int(trained.steps[-1]),
      }
    )
  for kind, error in released_gradient_error(settings, seeds).items():
    metrics[f'released_gradient_error/{kind}'] = error
  harness.write_table(options.workdir, rows)
  _plot(pathlib.Path(options.workdir), runs, everything)
  harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - start,
    curves={name: run.history['average'] for name, run in runs.items()},
  )
  return metrics


def ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """Seed by seed; infinity where ours is, also where both are."""
  finite = np.isfinite(ours)
  return np.where(finite, np.where(finite, ours, 0) / theirs, np.inf)


def _infinite(ratio: float) -> float | str:
  return ratio if np.isfinite(ratio) else 'not reached'


def _plot(folder, runs, everything):
  p, t = HEADLINE
  names = {
    'aipod': 'AiPOD',
    f'e_aipod/p{p:g}/t1': f'E-AiPOD, p = {p:g}, T = 1',
    f'e_aipod/p{p:g}/t{t}': f'E-AiPOD, p = {p:g}, T = {t}',
    'e_aipod/p0.1/t2': 'E-AiPOD, p = 0.1, T = 2',
    'no_control_variate': f'p = {p:g}, T = 1, no control variate',
  }
  steps = {variant.name: variant.upper_steps for variant in everything}
  for axis, label in (
    ('projections', 'projections, lower and upper'),
    ('upper_steps', 'upper steps'),
  ):
    curves = {}
    for name, title in names.items():
      if name not in runs:
        continue
      trained = runs[name]
      if axis == 'projections':
        x = projections_of(trained).mean(axis=1)
      else:
        x = steps[name] * trained.steps
      curves[title] = (x, trained.history['average'])
    harness.plot_curves(
      folder / f'{axis}.png',
      curves,
      xlabel=label,
      ylabel='running average of stationarity',
      logy=True,
    )


STUDY = harness.Study(main, PRESETS, paper='aipod', binary='synthetic')


if __name__ == '__main__':
  harness.run(STUDY)
