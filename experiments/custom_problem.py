"""The harness on a problem and a solver of one's own, in a few lines.

    python -m experiments.custom_problem --workdir=/tmp/custom

Expected: both variables end within 0.1 of 1. Time: some seconds on 2 cores.

The upper variable is pulled towards noisy batches around 1, the lower one
towards the upper one: both should end near 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the flags `--steps` and `--step_size` change."""

  steps: int = 1_000
  step_size: float = 0.1


PRESETS = {'quick': Settings(), 'paper': Settings(steps=10_000)}


def main(options: harness.Options) -> harness.Trained:
  """Trains, and writes the results."""
  settings = options.settings
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: jnp.mean((y - batch) ** 2),
    lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
  )
  sgd = optax.sgd(settings.step_size)
  solver = bj.v_pbgd(problem, penalty=10.0, upper=sgd, lower=sgd, value=sgd)
  trained = harness.train(
    solver,
    init=lambda context: bj.BilevelParams(upper=0.0, lower=0.0),
    batch=lambda context: 1 + jax.random.normal(context.key, (64,)),
    evaluate=lambda context, params, state: {'distance': abs(params.upper - 1)},
    steps=settings.steps,
    chunk=settings.steps // 10,
    seeds=options.seeds,
    workdir=options.workdir,
    settings=settings,
  )
  distance = harness.mean_interval(trained.history['distance'][-1])
  harness.write_results(
    options,
    metrics={'distance': distance.mean},
    seconds=trained.seconds,
    compile_seconds=trained.compile_seconds,
  )
  harness.write_table(
    options.workdir, [{'solver': 'V-PBGD', 'distance': distance}]
  )
  harness.plot_curves(
    f'{options.workdir}/distance.png',
    {'V-PBGD': (trained.steps, trained.history['distance'])},
    xlabel='steps',
    ylabel='|x - 1|',
    logy=True,
  )
  return trained


if __name__ == '__main__':
  harness.run(main, PRESETS, paper='custom', binary='problem')
