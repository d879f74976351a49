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
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.aipod import quadratic, synthetic_report

# Settings that no single variant's run depends on.
OTHERS = ('probabilities', 'upper_steps', 'relaxations')
HEADLINE = (0.3, 2)  # The probability and upper steps of most claims.
PUBLISHED_RATE = 0.02  # Of upper steps; it fails on the published matrices.
START = 0.7  # Standard deviation of the start, before it is projected; ours.
NOISE = 0.1  # Standard deviation in each coordinate of a gradient, published.

Probabilities = Annotated[tuple[float, ...], harness.Allowed(high=1)]
Relaxations = Annotated[tuple[float, ...], harness.Allowed(empty=True)]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Xiao et al., 2023, section 5.1.

  Attributes:
    size: coordinates of both variables, the paper's 100.
    objective: published, or released (the sine has lost x).
    probabilities: of a lower projection; the paper's are 0.05 to 0.7.
    upper_steps: T, the paper's 1 and 2.
    lower_steps: S, the paper's 5.
    upper_rate: alpha; the published 0.02 fails on the published matrices.
    lower_rate: beta.
    relaxations: further delta than 1, for probability 0.3 and two upper steps.
    steps: iterations of AiPOD, whose 80 % set the target.
    cap: iterations after which a seed has not reached it.
    chunk: iterations between two records, the resolution of the results.
    uniform_steps: iterations on the published matrices; 0 leaves them out.
    seeds: of matrices, noise, coins and starts.
  """

  size: int = 100
  objective: Literal['published', 'released'] = 'published'
  probabilities: Probabilities = (0.1, 0.3, 0.7)
  upper_steps: tuple[int, ...] = (1, 2)
  lower_steps: int = 5
  upper_rate: float = 0.002
  lower_rate: float = 0.1
  relaxations: Relaxations = (1.4, 4.0)
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
  lazy = lambda p, t: Variant(
    f'e_aipod/p{p:g}/t{t}', probability=p, upper_steps=t
  )
  found = [
    Variant('aipod'),
    Variant('aipod_twice_step', rate=2.0),
    *(lazy(p, t) for t in settings.upper_steps for p in settings.probabilities),
    *(
      lazy(p, n)._replace(name=name, control_variate=False)
      for n, name in (
        (1, 'no_control_variate'),
        (t, f'no_control_variate_t{t}'),
      )
    ),
    *(
      lazy(p, t)._replace(name=f'relaxation{delta:g}', relaxation=delta)
      for delta in settings.relaxations
    ),
  ]
  uniform = [
    Variant('aipod'),
    *(lazy(p, t) for t in settings.upper_steps),
    Variant('aipod_published_step', rate=PUBLISHED_RATE / settings.upper_rate),
  ]
  return found + [
    one._replace(name=f'paper_matrices/{one.name}', matrices='uniform')
    for one in uniform
    if settings.uniform_steps
  ]


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

  return harness.with_metrics(solver, measure)


def running_average(history: dict[str, np.ndarray]) -> np.ndarray:
  """The mean of the measure over all steps so far, (records, seeds)."""
  means = history['loss/measure']
  return np.cumsum(means, axis=0) / np.arange(1, len(means) + 1)[:, None]


def draw(options: harness.Options, matrices: str) -> quadratic.Instance:
  """The problems of all seeds, with matrices of a kind."""
  settings = options.settings
  return quadratic.stack_instances(
    [
      quadratic.draw_instance(seed, matrices, settings.objective, settings.size)
      for seed in options.seeds
    ]
  )


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
  settings = options.settings
  hyper = {'instance': draw(options, variant.matrices)}

  def init(context):
    key_x, key_y = jax.random.split(context.seed_key)
    x, y = (jax.random.normal(k, (settings.size,)) for k in (key_x, key_y))
    sets = quadratic.sets_of(context.hyper['instance'])
    x = sets['upper'](START * x)
    return bj.BilevelParams(x, sets['lower'](START * y, x))

  def batch(context):
    return quadratic.draw_noise(
      context.key,
      context.hyper['instance'],
      NOISE,
      lower_steps=settings.lower_steps,
      upper_steps=variant.upper_steps,
    )

  def evaluate(context, params, state):
    upper_set = quadratic.sets_of(context.hyper['instance'])['upper']
    outside = bj.diagnostics.feasibility(params, upper=upper_set)['upper']
    return {'outside': outside}

  def reached(history):
    return bool(np.all(np.min(running_average(history), axis=0) <= target))

  published = variant.matrices == 'uniform'
  steps = settings.uniform_steps if published else settings.steps
  if target is not None:
    steps = 2 * steps if published else settings.cap
  with np.errstate(all='ignore'):
    trained = harness.train(
      lambda context: make_solver(variant, settings, context),
      harness.Task(init, batch, hyper=hyper),
      harness.Training.from_options(
        options,
        steps=steps,
        chunk=settings.chunk,
        name=variant.name,
        settings=harness.settings_of(settings, *OTHERS),
      ),
      harness.Measure(evaluate, stop_when=None if target is None else reached),
    )
  average = {'average': running_average(trained.history)}
  return trained._replace(history=trained.history | average)


def released_gradient_error(options: harness.Options, matrices: str) -> float:
  """Relative error of the released code's gradient at the first points."""

  def error(instance, seed):
    x = jax.random.normal(jax.random.key(seed), (options.settings.size,))
    x = quadratic.sets_of(instance)['upper'](x)
    exact = quadratic.hypergradient(instance, x)
    released = quadratic.hypergradient(instance, x, released=True)
    return jnp.linalg.norm(released - exact) / jnp.linalg.norm(exact)

  errors = jax.vmap(error)(
    draw(options, matrices), jnp.asarray(options.seeds, jnp.uint32)
  )
  return harness.reduced(errors, 'median')


def main(options: harness.Options) -> harness.Report:
  """Runs all variants."""
  runs: dict[str, harness.Trained] = {}
  targets: dict[str, np.ndarray] = {}
  every = variants(options.settings)
  for variant in every:
    kind = variant.matrices
    trained = runs[variant.name] = run(variant, options, targets.get(kind))
    targets.setdefault(kind, synthetic_report.target_of(trained))
  results = synthetic_report.summarise(every, runs)
  for kind in ('orthonormal', 'uniform'):
    error = released_gradient_error(options, kind)
    results.add({'matrices': kind}, released_gradient_error=error)
  return harness.Report(
    results,
    rows='run',
    columns=synthetic_report.COLUMNS,
    curves={name: run.history['average'] for name, run in runs.items()},
    plots=synthetic_report.draw(every, runs),
  )


STUDY = harness.Study(main, PRESETS, paper='aipod', binary='synthetic')


if __name__ == '__main__':
  harness.run(STUDY)
