"""What an implicit hypergradient costs, beside plain gradients, and at scale.

    python -m experiments.benchmarks.implicit

Expected: 0.85 times the operations of 22 gradients; time and memory grow with
the powers 1.0 of the parameters. Time: a minute or two on 2 cores.

A network learns from weighted digits; the hypergradient is that of the weights.
Two questions:

1. Does it cost more than its Hessian-vector products? With K conjugate-gradient
   steps, against 2 K + 2 gradients of the lower loss: a product is two
   gradients where the first pass is shared. Bound: 1.2 times the operations.
2. Does it scale? Time and memory over the number of parameters, as exponents.
   Bound: 1.1.

Operations and memory are the compiler's counts, the loop unrolled, because
counts take a loop's body once.
"""

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure

BOUND_FLOPS = 1.2
BOUND_EXPONENT = 1.1
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    parameters: of the network in the first question, about.
    rows: digits of each loss.
    products: K.
    sizes: parameters in the second question, about.
    scale_rows: digits there.
    scale_products: K there.
    rounds: timings of each program.
  """

  parameters: int = 1_000_000
  rows: int = 64
  products: int = 10
  sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
  scale_rows: int = 16
  scale_products: int = 4
  rounds: int = 5


PRESETS = {'paper': Settings()}


class Case(NamedTuple):
  """A problem with a start and data."""

  problem: bj.BilevelProblem
  params: bj.BilevelParams
  batch: Any
  count: int  # Parameters of the network.


def weighted_digits(parameters: int, rows: int) -> Case:
  """A network with two hidden layers of a width that gives so many parameters.

  Args:
    parameters: about how many.
    rows: random digits of each loss; cost does not depend on values.

  Returns:
    A `Case`; the upper variable is (rows,).
  """
  # Inputs as wide as the hidden layers: 2 width^2 + 13 width.
  width = max(1, round((-13 + math.sqrt(169 + 8 * parameters)) / 4))
  widths = (width, width, width, CLASSES)
  keys = jax.random.split(jax.random.key(0), len(widths) + 3)
  network = [
    {
      'w': jax.random.normal(key, (i, o)) / math.sqrt(i),
      'b': jnp.zeros(o),
    }
    for key, i, o in zip(keys, widths[:-1], widths[1:], strict=False)
  ]

  def logits(y, images):
    for layer in y[:-1]:
      images = jnp.tanh(images @ layer['w'] + layer['b'])
    return images @ y[-1]['w'] + y[-1]['b']

  cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels

  def upper(x, y, batch):
    del x
    images, labels = batch['validation']
    return jnp.mean(cross_entropy(logits(y, images), labels))

  def lower(x, y, batch):
    images, labels = batch['train']
    losses = cross_entropy(logits(y, images), labels)
    return jnp.mean(jax.nn.sigmoid(x) * losses)

  digits = lambda key: (
    jax.random.normal(key, (rows, width)),
    jax.random.randint(key, (rows,), 0, CLASSES),
  )
  batch = {'train': digits(keys[-1]), 'validation': digits(keys[-2])}
  params = bj.BilevelParams(jnp.zeros(rows), network)
  count = sum(leaf.size for leaf in jax.tree.leaves(network))
  return Case(bj.BilevelProblem(upper, lower), params, batch, count)


def hypergradient_program(
  case: Case, products: int, *, unroll: bool
) -> measure.Program:
  """An implicit hypergradient, from a cold start, as a step."""
  solve = bj.linear_solvers.conjugate_gradient(
    products, unroll=products if unroll else 1
  )
  oracle = bj.implicit(case.problem, solve=solve, warm_start=False)

  def step(carry, batch):
    params, state, _ = carry
    gradient, state = oracle.update(batch, state, params)
    return params, state, gradient.upper

  start = (case.params, oracle.init(case.params), case.params.upper)
  return measure.Program(step, start, case.batch)


def gradient_program(case: Case) -> measure.Program:
  """One gradient of the lower loss in the network's parameters, as a step."""

  def step(carry, batch):
    (x, y), _ = carry
    return (x, y), jax.grad(case.problem.lower, 1)(x, y, batch)

  start = (tuple(case.params), case.params.lower)
  return measure.Program(step, start, case.batch)


def exponent(sizes: Any, values: Any) -> float:
  """Slope of log value over log size, by least squares."""
  return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def seconds_of(program: measure.Program, rounds: int) -> float:
  """The shortest wall time of a step; a shared machine only adds to it."""
  program.run(1)
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    program.run(1)
    times.append(time.perf_counter() - start)
  return min(times)


def compare(settings: Settings) -> dict[str, float]:
  """The hypergradient against 2 K + 2 gradients, as ratios."""
  case = weighted_digits(settings.parameters, settings.rows)
  implicit = hypergradient_program(case, settings.products, unroll=True)
  plain = gradient_program(case)
  gradients = 2 * settings.products + 2
  timed = measure.time_ratio(
    implicit.run,
    lambda steps: plain.run(gradients * steps),
    rounds=settings.rounds,
  )
  return {
    'parameters': case.count,
    'flops_ratio': implicit.flops / (gradients * plain.flops),
    'wall_ratio': timed.wall,
    'wall_low': timed.low,
    'wall_high': timed.high,
    'cpu_ratio': timed.cpu,
  }


def scale(settings: Settings) -> list[dict[str, float]]:
  """Seconds and bytes of a hypergradient for each size."""
  rows = []
  for size in settings.sizes:
    case = weighted_digits(size, settings.scale_rows)
    program = hypergradient_program(case, settings.scale_products, unroll=False)
    rows.append(
      {
        'parameters': case.count,
        'seconds': seconds_of(program, settings.rounds),
        'bytes': float(program.memory),
      }
    )
  return rows


def main(options: harness.Options) -> dict[str, float]:
  """Measures, prints and writes down."""
  start = time.perf_counter()
  settings = options.settings
  metrics = compare(settings)
  rows = scale(settings)
  sizes = [row['parameters'] for row in rows]
  for what in ('seconds', 'bytes'):
    metrics[f'{what}_exponent'] = exponent(sizes, [row[what] for row in rows])
  for row in rows:
    label = f'{row["parameters"]:.0e}'.replace('+0', '')
    metrics[f'seconds/{label}'] = row['seconds']
    metrics[f'bytes/{label}'] = row['bytes']
  harness.write_table(
    options.workdir,
    [
      {
        'parameters': f'{row["parameters"]:,}',
        'ms': 1e3 * row['seconds'],
        'MB': row['bytes'] / 1e6,
        'copies of the network': row['bytes'] / (4 * row['parameters']),
      }
      for row in rows
    ],
  )
  holds = lambda value, bound: 'holds' if value <= bound else 'EXCEEDED'
  flops = metrics['flops_ratio']
  print(
    f'{settings.products} steps / {2 * settings.products + 2} gradients: '
    f'FLOPs {flops:.3f} (<= {BOUND_FLOPS}: {holds(flops, BOUND_FLOPS)}), '
    f'wall {metrics["wall_ratio"]:.3f} ({metrics["wall_low"]:.2f} to '
    f'{metrics["wall_high"]:.2f}), CPU {metrics["cpu_ratio"]:.3f}'
  )
  for what, name in (('seconds', 'time'), ('bytes', 'memory')):
    value = metrics[f'{what}_exponent']
    verdict = holds(value, BOUND_EXPONENT)
    print(f'{name} grows as parameters^{value:.2f} (<= 1.1: {verdict})')
  harness.write_results(
    options, metrics=metrics, seconds=time.perf_counter() - start
  )
  return metrics


STUDY = harness.Study(main, PRESETS, paper='benchmarks', binary='implicit')


if __name__ == '__main__':
  harness.run(STUDY)
