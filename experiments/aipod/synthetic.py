"""Projections saved by E-AiPOD on a synthetic constrained problem.

Paper: Xiao, Shen, Yin and Chen, Alternating Projected SGD for
Equality-constrained Bilevel Optimization, 2023.

    python -m experiments.aipod.synthetic --preset=quick

Expected: 0.24 of AiPOD's projections at 1.1 times its upper steps (p = 0.3, T =
2). Time: 2 minutes on 2 cores.

AiPOD projects the lower variable in each of its S steps and the upper one in
each update. E-AiPOD projects the lower variable with probability p, and the
upper one once in T steps. Both run until the running average of a stationarity
measure reaches that of AiPOD at 80 % of its iterations. Projections and upper
steps until then are compared per seed.
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

# Settings that no single variant depends on.
SWEEP_SETTINGS = ('probabilities', 'upper_steps', 'relaxations')
HEADLINE = (0.3, 2)  # The probability and upper steps of most claims.
PUBLISHED_RATE = 0.02  # Upper step size; it fails on the published matrices.
START = 0.7  # Standard deviation of the start before projection, not published.
NOISE = 0.1  # Standard deviation per coordinate of a gradient, published.

Probabilities = Annotated[tuple[float, ...], harness.Allowed(high=1)]
Relaxations = Annotated[tuple[float, ...], harness.Allowed(empty=True)]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Xiao et al., 2023, section 5.1.

  Attributes:
    size: dimension of both variables; 100 in the paper.
    objective: published, or released (its sine does not depend on x).
    probabilities: probabilities p of a lower projection; 0.05 to 0.7 in the
      paper.
    upper_steps: upper steps T per update; 1 and 2 in the paper.
    lower_steps: lower steps S per update; 5 in the paper.
    upper_rate: upper step size alpha; the published 0.02 fails on the published
      matrices.
    lower_rate: lower step size beta.
    relaxations: values of delta besides 1, for p = 0.3 and T = 2.
    steps: iterations of AiPOD; 80 % of them define the target.
    cap: maximum number of iterations to reach the target.
    chunk: iterations between two records, the resolution of the results.
    uniform_steps: iterations on the published matrices; 0 skips them.
    seeds: number of seeds, for matrices, noise, projections and starts.
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
  """A solver on a kind of matrices; its folder has its name."""

  name: str
  matrices: str = 'orthonormal'
  probability: float | None = None  # None for AiPOD.
  upper_steps: int = 1
  relaxation: float = 1.0
  control_variate: bool = True
  rate: float = 1.0  # Factor of the upper step size of the settings.


def variants(settings: Settings) -> list[Variant]:
  """Lists all variants, AiPOD first for each kind of matrices."""
  p, t = HEADLINE
  lazy = lambda p, t: Variant(
    f'e_aipod/p{p:g}/t{t}', probability=p, upper_steps=t
  )
  orthonormal = [
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
  return orthonormal + [
    one._replace(name=f'paper_matrices/{one.name}', matrices='uniform')
    for one in uniform
    if settings.uniform_steps
  ]


def make_solver(
  variant: Variant, settings: Settings, context: harness.Context
) -> optax.GradientTransformationExtraArgs:
  """Makes the solver of a variant, which also records its stationarity."""
  instance = context.hyper['instance']
  sets = quadratic.make_sets(instance)
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
  """Running average of the stationarity measure, (records, seeds)."""
  means = history['loss/measure']
  return np.cumsum(means, axis=0) / np.arange(1, len(means) + 1)[:, None]


def draw(options: harness.Options, matrices: str) -> quadratic.Instance:
  """Draws the problems of all seeds, with matrices of a kind."""
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
    variant: variant to run.
    options: options of the run.
    target: running average at which to stop, (seeds,); None for a fixed number
      of iterations.
  """
  settings = options.settings
  hyper = {'instance': draw(options, variant.matrices)}

  def init(context):
    key_x, key_y = jax.random.split(context.seed_key)
    x, y = (jax.random.normal(k, (settings.size,)) for k in (key_x, key_y))
    sets = quadratic.make_sets(context.hyper['instance'])
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
    upper_set = quadratic.make_sets(context.hyper['instance'])['upper']
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
        settings=harness.run_settings(settings, *SWEEP_SETTINGS),
      ),
      harness.Measure(evaluate, stop_when=None if target is None else reached),
    )
  average = {'average': running_average(trained.history)}
  return trained._replace(history=trained.history | average)


def released_gradient_error(options: harness.Options, matrices: str) -> float:
  """Median relative error of the released gradient at random points."""

  def error(instance, seed):
    x = jax.random.normal(jax.random.key(seed), (options.settings.size,))
    x = quadratic.make_sets(instance)['upper'](x)
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
  all_variants = variants(options.settings)
  for variant in all_variants:
    kind = variant.matrices
    trained = runs[variant.name] = run(variant, options, targets.get(kind))
    targets.setdefault(kind, synthetic_report.target_average(trained))
  results = synthetic_report.summarise(all_variants, runs)
  for kind in ('orthonormal', 'uniform'):
    error = released_gradient_error(options, kind)
    results.add({'matrices': kind}, released_gradient_error=error)
  return harness.Report(
    results,
    rows='run',
    columns=synthetic_report.COLUMNS,
    curves={name: run.history['average'] for name, run in runs.items()},
    plots=synthetic_report.draw(all_variants, runs),
  )


STUDY = harness.Study(main, PRESETS)


if __name__ == '__main__':
  harness.run(STUDY)
