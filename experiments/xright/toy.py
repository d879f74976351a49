"""Training in stages keeps a gap that no length of the run removes.

Paper: Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, Understanding
Forgetting in LLM Supervised Fine-Tuning and Preference Learning, 2024.

    python -m experiments.xright.toy --preset=quick

Expected: the gap of ALRIGHT and of MAXRIGHT falls with the length of the run,
that of training in stages does not. Time: 1 minute on 2 cores.

A log-linear policy over three responses (`toy_problem`), one sample a step, the
step 2 / sqrt(T), the last iterate: a mean over iterates would hide the gap of
the last stage. Every member takes the longest run's steps; what a shorter one
reaches is read off at its end.
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
  'mix': 'weighted sum, both losses a step',
  'alright': 'ALRIGHT',
  'maxright': 'MAXRIGHT, memo of all data',
  'maxright_stale': 'MAXRIGHT, memo of all data every 10 steps',
  'maxright_noisy': 'MAXRIGHT, memo of one sample',
}


GAPS = {'mix': 'Mix gap', 'max': 'Max gap'}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    horizons: lengths T of the runs, increasing, each a multiple of the first.
    seeds: of the samples and of the coin.
    step: the step size is step / sqrt(T).
    share: the weight lambda of the preference loss; the paper has .01 to .99.
    methods: which are run.
  """

  horizons: tuple[int, ...] = (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384)
  seeds: int = 32
  step: float = 2.0
  share: Annotated[float, harness.Allowed(high=1.0)] = 0.5
  methods: Annotated[tuple[str, ...], harness.Among(TITLES)] = tuple(TITLES)


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    horizons=(256, 1_024, 4_096), methods=('sequential', 'alright', 'maxright')
  ),
  # The paper's toy is one picture of trajectories: more seeds and lengths.
  'paper': Settings(
    horizons=(256, 1_024, 4_096, 16_384, 65_536, 262_144), seeds=128
  ),
}


def maker(
  settings: Settings, name: str, best: toy_problem.Optima
) -> Callable[[Any], optax.GradientTransformation]:
  """From a member to its solver."""
  weights = (1 - settings.share, settings.share)
  every = tuple(jnp.asarray(a, jnp.float32) for a in toy_problem.ALL_DATA)
  all_data = [lambda batch, t, rows=rows: rows for rows in every]
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
        # What a step's own sample says is noise beside all data.
        return bj.solvers.maxright(
          losses, **gap, refresh_every=10, refresh_at=all_data, share=0.0
        )
      case 'maxright_noisy':
        return bj.solvers.maxright(losses, **gap, refresh_every=10)
    parts = [bj.gradient(loss) for loss in losses]
    if name == 'mix':
      return bj.evaluation.mixed(parts, weights)
    half = context.hyper['horizon'] // 2
    return bj.evaluation.select(parts, bj.evaluation.in_sequence([half]))

  def solver(context):
    size = settings.step / jnp.sqrt(context.hyper['horizon'].astype(float))
    return optax.chain(oracle(context), optax.scale(-size))

  return solver


def run(
  options: harness.Options, name: str, best: toy_problem.Optima
) -> dict[str, np.ndarray]:
  """The gaps at the end of runs, (horizons, seeds), by kind of gap."""
  settings = options.settings
  seeds, hyper = harness.members(options.seeds, horizon=settings.horizons)

  def evaluate(context, params, state):
    del context, state
    return toy_problem.gaps(params, settings.share, best)

  trained = harness.train(
    maker(settings, name, best),
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
  found = {}
  for kind in GAPS:
    by_length = trained.history[kind].reshape(
      len(trained.steps), len(settings.horizons), -1
    )
    found[kind] = np.stack([by_length[r, i] for i, r in enumerate(rows)])
  return found


def ratio(above: np.ndarray, below: np.ndarray) -> harness.Interval:
  """Ratio of two means over the same seeds, by leaving out one at a time."""
  return harness.jackknife_interval(
    lambda seeds: above[seeds].mean() / below[seeds].mean(), len(above)
  )


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  first, lengths = settings.horizons[0], settings.horizons
  if list(lengths) != sorted(set(lengths)) or len(lengths) < 2:
    raise harness.SettingsError(
      f'horizons are two or more increasing lengths, got {lengths}.'
    )
  if any(n % first for n in lengths) or first % 2:
    raise harness.SettingsError(
      f'each of horizons={lengths} is a multiple of the first, which is even: '
      'runs are recorded at its multiples, and stages are half a run.'
    )
  if settings.share >= 1:
    raise harness.SettingsError('share is below 1: nothing is to be mixed.')


def main(options: harness.Options) -> harness.Report:
  """Runs all methods and fits exponents to their gaps."""
  settings = options.settings
  best = toy_problem.optima(settings.share)
  gaps = {name: run(options, name, best) for name in settings.methods}
  at = np.array(settings.horizons, np.float64)
  results = harness.Results()
  for name, by_kind in gaps.items():
    for kind, gap in by_kind.items():
      place = {'method': name, 'gap': kind}
      results.add(place, gap=gap[-1], gap_exponent=slopes.fit(at, gap))
    if name != 'sequential' and 'sequential' in gaps:
      # In the gap that a method is for.
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


STUDY = harness.Study(main, PRESETS, paper='xright', binary='toy', check=check)


if __name__ == '__main__':
  harness.run(STUDY)
