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
import pathlib
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness import slopes
from experiments.xright import toy_problem

TITLES = {
  'sequential': 'in stages',
  'mix': 'weighted sum, both losses a step',
  'alright': 'ALRIGHT',
  'maxright': 'MAXRIGHT, memo of all data',
  'maxright_stale': 'MAXRIGHT, memo of all data every 10 steps',
  'maxright_noisy': 'MAXRIGHT, memo of one sample',
}


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
  methods: tuple[str, ...] = tuple(TITLES)


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
    lambda context: jnp.zeros(2, jnp.float32),
    lambda context: toy_problem.draw(context.key),
    steps=settings.horizons[-1],
    chunk=settings.horizons[0],
    seeds=seeds,
    hyper=hyper,
    workdir=options.workdir,
    save_seconds=options.save_seconds,
    name=name,
    evaluate=evaluate,
    settings=settings,
  )
  rows = [trained.steps.tolist().index(n) for n in settings.horizons]
  found = {}
  for kind in ('mix', 'max'):
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
  if unknown := set(settings.methods) - set(TITLES):
    raise harness.SettingsError(
      f'unknown methods {sorted(unknown)}; known: {", ".join(TITLES)}.'
    )
  if settings.share >= 1:
    raise harness.SettingsError('share is below 1: nothing is to be mixed.')


def main(options: harness.Options) -> None:
  """Runs all methods and writes exponents, gaps, table and plot."""
  start = time.monotonic()
  settings = options.settings
  best = toy_problem.optima(settings.share)
  metrics: dict[str, float] = {}
  rows, found = [], {}
  at = np.array(settings.horizons, np.float64)

  def put(name, number):
    metrics.update(number.metrics(name))

  for name in settings.methods:
    found[name] = run(options, name, best)
    fitted = {k: slopes.fit(at, g) for k, g in found[name].items()}
    row: dict[str, Any] = {'method': TITLES[name]}
    for kind, words in (('mix', 'Mix gap'), ('max', 'Max gap')):
      put(f'gap_exponent/{name}/{kind}', fitted[kind])
      last = harness.mean_interval(found[name][kind][-1])
      metrics |= last.metrics(f'gap/{name}/{kind}')
      row[words], row[f'{words}: exponent'] = last, str(fitted[kind])
    rows.append(row)
    # The gap that a method is for; of training in stages, the steeper one.
    kind = 'max' if name.startswith('maxright') else 'mix'
    if name == 'sequential':
      kind = min(fitted, key=lambda k: fitted[k].mean)
    put(f'gap_exponent/{name}', fitted[kind])
    if name != 'sequential' and 'sequential' in found:
      pair = [found[n][kind][-1] for n in ('sequential', name)]
      put(f'gap_ratio/{name}', ratio(*pair))
  harness.write_table(options.workdir, rows)
  harness.plot_panels(
    pathlib.Path(options.workdir) / 'toy.png',
    [
      harness.Panel(
        {
          TITLES[name]: (at, np.maximum(gap[kind], 1e-9))
          for name, gap in found.items()
        },
        xlabel='length of the run T',
        ylabel=words,
        title=words,
        logx=True,
        logy=True,
      )
      for kind, words in (('mix', 'Mix gap'), ('max', 'Max gap'))
    ],
  )
  path = harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'Results: {path}')


STUDY = harness.Study(main, PRESETS, paper='xright', binary='toy', check=check)


if __name__ == '__main__':
  harness.run(STUDY)
