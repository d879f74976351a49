"""Shows that training in stages keeps a gap for any length of the run.

Paper: Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, Understanding
Forgetting in LLM Supervised Fine-Tuning and Preference Learning, 2024.

    python -m experiments.xright.toy --preset=quick

Expected: the gap of ALRIGHT and of MAXRIGHT falls with the length of the run,
that of training in stages does not. Time: 1 minute on 2 cores.

A log-linear policy over three responses (`toy_problem`) takes one sample per
step and steps of 2 / sqrt(T). The last iterate is reported: a mean over
iterates would hide the gap after the last stage. All members take the steps of
the longest run; the gaps of shorter runs are recorded at their ends.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import slopes
from experiments.xright import toy_problem

TITLES = {
  'sequential': 'in stages',
  'mix': 'weighted sum, both losses per step',
  'alright': 'ALRIGHT',
  'maxright': 'MAXRIGHT, all data each step',
  'maxright_stale': 'MAXRIGHT, all data every 10 steps',
  'maxright_noisy': 'MAXRIGHT, one sample',
}


GAPS = {'mix': 'Mix gap', 'max': 'Max gap'}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    horizons: lengths T of the runs, increasing, each a multiple of the first.
    seeds: of the samples and of ALRIGHT's draws.
    step: factor of the step size step / sqrt(T).
    mixing_ratio: weight lambda of the preference loss; 0.01 to 0.99 in the
      paper.
    methods: methods that are compared.
  """

  horizons: tuple[int, ...] = (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384)
  seeds: int = 32
  step: float = 2.0
  mixing_ratio: Annotated[float, harness.Allowed(high=1.0)] = 0.5
  methods: Annotated[tuple[str, ...], harness.Among(TITLES)] = tuple(TITLES)


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    horizons=(256, 1_024, 4_096), methods=('sequential', 'alright', 'maxright')
  ),
  # Our sizes: the paper's toy is one plot of trajectories.
  'paper': Settings(
    horizons=(256, 1_024, 4_096, 16_384, 65_536, 262_144), seeds=128
  ),
}


def make_solver(
  settings: Settings, name: str, best: toy_problem.Optima
) -> Callable[[Any], optax.GradientTransformation]:
  """Makes a function from a member's context to its solver."""
  weights = (1 - settings.mixing_ratio, settings.mixing_ratio)
  arrays = [jnp.asarray(a, jnp.float32) for a in toy_problem.ALL_DATA]
  all_data = [lambda batch, t, rows=rows: rows for rows in arrays]
  gap = {'weights': weights, 'optima': (best.sft, best.dpo)}

  def oracle(context):
    key = jax.random.fold_in(context.seed_key, 1)
    losses = toy_problem.LOSSES
    match name:
      case 'alright':
        return bj.solvers.alright(losses, weights=weights, key=key)
      case 'maxright':
        return bj.solvers.maxright(
          losses, **gap, refresh_every=1, refresh_at=all_data
        )
      case 'maxright_stale':
        # The loss of one sample is too noisy to update the cached losses.
        return bj.solvers.maxright(
          losses, **gap, refresh_every=10, refresh_at=all_data, share=0.0
        )
      case 'maxright_noisy':
        return bj.solvers.maxright(losses, **gap, refresh_every=10)
    oracles = [bj.gradient(loss) for loss in losses]
    if name == 'mix':
      return bj.evaluation.mixed(oracles, weights)
    half = context.hyper['horizon'] // 2
    return bj.evaluation.select(oracles, bj.evaluation.in_sequence([half]))

  def solver(context):
    size = settings.step / jnp.sqrt(context.hyper['horizon'].astype(float))
    return optax.chain(oracle(context), optax.scale(-size))

  return solver


def run(
  options: harness.Options, name: str, best: toy_problem.Optima
) -> dict[str, np.ndarray]:
  """Runs a method; gaps (horizons, seeds) at the ends of runs, by kind."""
  settings = options.settings
  seeds, hyper = harness.members(options.seeds, horizon=settings.horizons)

  def evaluate(context, params, state):
    del context, state
    return toy_problem.gaps(params, settings.mixing_ratio, best)

  trained = harness.train(
    make_solver(settings, name, best),
    harness.Task(
      lambda context: jnp.zeros(2, jnp.float32),
      lambda context: toy_problem.draw(context.key),
      hyper=hyper,
    ),
    harness.Training.from_options(
      options,
      steps=settings.horizons[-1],
      chunk=settings.horizons[0],
      seeds=seeds,
      name=name,
      settings=settings,
    ),
    harness.Measure(evaluate),
  )
  rows = [trained.steps.tolist().index(n) for n in settings.horizons]
  gaps = {}
  for kind in GAPS:
    by_length = trained.history[kind].reshape(
      len(trained.steps), len(settings.horizons), -1
    )
    gaps[kind] = np.stack([by_length[r, i] for i, r in enumerate(rows)])
  return gaps


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> harness.Interval:
  """Ratio of two means over the same seeds, with its jackknife interval."""
  return harness.jackknife_interval(
    lambda seeds: numerator[seeds].mean() / denominator[seeds].mean(),
    len(numerator),
  )


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  first, lengths = settings.horizons[0], settings.horizons
  if list(lengths) != sorted(set(lengths)) or len(lengths) < 2:
    raise harness.SettingsError(
      f'--horizons takes two or more increasing lengths, got {lengths}.'
    )
  if any(n % first for n in lengths) or first % 2:
    raise harness.SettingsError(
      f'--horizons={lengths}: each has to be a multiple of the first, which '
      'is even: runs are recorded at its multiples and halved into stages.'
    )
  if settings.mixing_ratio >= 1:
    raise harness.SettingsError('--mixing_ratio has to be below 1.')


def main(options: harness.Options) -> harness.Report:
  """Runs all methods and fits exponents to their gaps."""
  settings = options.settings
  best = toy_problem.optima(settings.mixing_ratio)
  gaps = {name: run(options, name, best) for name in settings.methods}
  at = np.array(settings.horizons, np.float64)
  results = harness.Results()
  for name, by_kind in gaps.items():
    for kind, gap in by_kind.items():
      place = {'method': name, 'gap': kind}
      results.add(place, gap=gap[-1], gap_exponent=slopes.fit(at, gap))
    if name != 'sequential' and 'sequential' in gaps:
      # The gap that the method minimises.
      kind = 'max' if name.startswith('maxright') else 'mix'
      pair = [gaps[n][kind][-1] for n in ('sequential', name)]
      results.add({'method': name}, gap_ratio=ratio(*pair))
  figure = harness.draw_panels(
    [
      harness.Panel(
        {
          TITLES[n]: (at, np.maximum(gap[kind], 1e-9))
          for n, gap in gaps.items()
        },
        xlabel='length of the run T',
        ylabel=title,
        title=title,
        logx=True,
        logy=True,
      )
      for kind, title in GAPS.items()
    ]
  )
  return harness.Report(
    results,
    columns=[
      harness.Column(measure, f'{title}{more}', {'gap': kind})
      for kind, title in GAPS.items()
      for measure, more in (('gap', ''), ('gap_exponent', ': exponent'))
    ],
    titles=TITLES,
    plots={'toy.png': figure},
  )


STUDY = harness.Study(
  main, PRESETS, check=check, renamed={'share': 'mixing_ratio'}
)


if __name__ == '__main__':
  harness.run(STUDY)
