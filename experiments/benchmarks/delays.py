"""What stale parameters cost: a delayed run against the same without delays.

    python -m experiments.benchmarks.delays

Expected: at most 1.15 times the CPU time, with 16 snapshots beside the
parameters. Time: a minute on 2 cores.

Whole runs in a `lax.scan`, in turn in one process: A3C-TD(0) on the random
process of its experiment, by i.i.d. samples and by chains, and the gradient of
a perceptron, of which 17 workers hold 17 versions. The delayed run writes one
snapshot and reads one in each update; the rest is the same. Medians of paired
ratios with their range, see `measure`.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure

BOUND = 1.15


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    runs: what is compared.
    bound: the largest delay, one less than there are workers.
    steps: updates in one scan.
    rounds: pairs of timings of each comparison.
    hidden: units of the perceptron, of 64 inputs and 10 outputs.
    batch_size: of its samples.
  """

  runs: tuple[str, ...] = ('iid', 'markov', 'perceptron')
  bound: int = 16
  steps: int = 1_000
  rounds: int = 21
  hidden: int = 128
  batch_size: int = 64


PRESETS = {'paper': Settings(), 'quick': Settings(rounds=7)}


class Case(NamedTuple):
  """A solver by what goes round its oracle, and where it starts."""

  make: Callable[[Callable[[Any, int], Any], int], Any]
  params: Any
  batch: Any


def actor_critic(sampling: str) -> Case:
  """A3C-TD(0) of the experiment, its workers' chains included."""
  mdp, features = bj.rl.random_mdp(0), bj.rl.random_features(1)
  power = bj.solvers.power_schedule
  ball = lambda z: optax.projections.projection_l2_ball(z, 200.0)

  def make(wrap, workers):
    oracle = bj.rl.td_actor_critic(
      mdp, features, key=0, sampling=sampling, workers=workers
    )
    return bj.descend(
      wrap(oracle, workers),
      actor=optax.sgd(power(20.0, 0.6)),
      critic=bj.Sequence(optax.sgd(power(1.0, 0.4)), set=ball),
    )

  params = bj.sequences(
    actor=jnp.zeros(mdp.rewards.shape), critic=jnp.zeros(features.shape[1])
  )
  return Case(make, params, None)


def perceptron(settings: Settings) -> Case:
  """A regression by a layer of hidden units."""
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, *shape: jax.random.normal(key, shape)
  params = {
    'in': draw(keys[0], 64, settings.hidden) / 8,
    'out': draw(keys[1], settings.hidden, 10) / settings.hidden,
  }

  def loss(params, batch):
    found = jnp.tanh(batch['x'] @ params['in']) @ params['out']
    return jnp.mean((found - batch['y']) ** 2)

  make = lambda wrap, workers: optax.chain(
    wrap(bj.gradient(loss), workers), optax.sgd(0.01)
  )
  rows = settings.batch_size
  batch = {'x': draw(keys[2], rows, 64), 'y': draw(keys[3], rows, 10)}
  return Case(make, params, batch)


def program(case: Case, steps: int, workers: int) -> measure.Program:
  """So many updates in a scan, delayed where there are several workers."""
  wrap = lambda oracle, n: bj.evaluation.delayed(oracle, n) if n > 1 else oracle
  solver = case.make(wrap, workers)

  def many(carry, batch):
    def body(carry, _):
      params, state = carry
      updates, state = solver.update(batch, state, params)
      return (bj.apply_updates(params, updates), state), None

    return jax.lax.scan(body, carry, length=steps)[0]

  return measure.Program(
    many, (case.params, solver.init(case.params)), case.batch
  )


def compare(name: str, settings: Settings) -> measure.Ratio:
  """Times of a run with delays over those of the same without."""
  case = perceptron(settings) if name == 'perceptron' else actor_critic(name)
  late, fresh = (
    program(case, settings.steps, n) for n in (settings.bound + 1, 1)
  )
  return measure.time_ratio(late.run, fresh.run, rounds=settings.rounds)


def main(options: harness.Options) -> None:
  """Runs the comparisons, prints them and writes them down."""
  start = time.perf_counter()
  settings = options.settings
  metrics: dict[str, float] = {}
  rows = []
  for name in settings.runs:
    ratio = compare(name, settings)
    metrics[f'{name}/cpu'], metrics[f'{name}/wall'] = ratio.cpu, ratio.wall
    each = 1e6 / settings.steps
    late, fresh = ratio.seconds * each, ratio.base_seconds * each
    rows.append(
      {
        'compared': f'{name}, K0 = {settings.bound} / without delay',
        'CPU': f'{ratio.cpu:.3f}',
        'wall (range)': str(ratio),
        'us an update': f'{late:.1f} / {fresh:.1f}',
        'bound': f'CPU <= {BOUND}: '
        + ('holds' if ratio.cpu <= BOUND else 'EXCEEDED'),
      }
    )
  harness.write_table(options.workdir, rows)
  harness.write_results(
    options, metrics=metrics, seconds=time.perf_counter() - start
  )


STUDY = harness.Study(main, PRESETS, paper='benchmarks', binary='delays')


if __name__ == '__main__':
  harness.run(STUDY)
