"""What the modes of an unrolled hypergradient cost: memory and time.

    python -m experiments.benchmarks.unrolled

Expected: `mixed` within .2 times the memory and .8 times the time of `reverse`.
Time: some minutes on 2 cores.

A decoder with four layers takes 8 steps of Adam on rows of tokens from weighted
sources; the hypergradient is that of the weights. Each mode against `reverse`,
which goes backwards through the gradient of each step and keeps all that it was
computed from:

1. What does `mixed` save, which keeps each step's state and goes through the
   gradient by a forward product? Bounds: .2 times the memory, .8 times the
   time, the same hypergradient to 1e-5 of its largest entry (in float32).
2. What do checkpoints save, in either mode?
3. And `forward`, where the upper variable is small? It carries one copy of the
   trajectory for each source.

Memory is the compiler's count of temporary buffers at their peak. Times are
medians of paired ratios with their range, see `measure`.
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

BOUND_MEMORY, BOUND_TIME = 0.2, 0.8
# Rounding of float32: gradients of weights that sum to one nearly cancel.
BOUND_DIFFERENCE = 1e-5
SOURCES = 2


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  The published experiment has models of Chinchilla's form; these sizes fit two
  cores, and activations still take several times the memory of the weights.

  Attributes:
    modes: what is compared with `reverse`; `+checkpoint` with checkpoints.
    layers: of the decoder.
    width: of the residual stream.
    heads: of the attention.
    length: tokens of a row.
    vocabulary: tokens that there are.
    rows: rows of each loss.
    steps: of Adam.
    checkpoint: steps a checkpoint, where there are any.
    rounds: pairs of timings of each comparison.
  """

  modes: tuple[str, ...] = (
    'mixed',
    'reverse+checkpoint',
    'mixed+checkpoint',
    'forward',
  )
  layers: int = 4
  width: int = 128
  heads: int = 4
  length: int = 128
  vocabulary: int = 256
  rows: int = 6
  steps: int = 8
  checkpoint: int = 3
  rounds: int = 3


PRESETS = {'paper': Settings()}


class Case(NamedTuple):
  """A problem with a start and data."""

  problem: bj.BilevelProblem
  params: bj.BilevelParams
  batch: Any


def make_decoder(settings: Settings) -> tuple[Any, Any]:
  """The weights of a decoder, and its loss of each token, (rows, length)."""
  width, heads = settings.width, settings.heads
  keys = iter(jax.random.split(jax.random.key(0), 2 + 4 * settings.layers))

  def matrix(rows, columns):
    return jax.random.normal(next(keys), (rows, columns)) / math.sqrt(rows)

  weights = {
    'tokens': matrix(settings.vocabulary, width),
    'places': matrix(settings.length, width),
    'layers': [
      {
        'attend': matrix(width, 3 * width),
        'join': matrix(width, width),
        'rise': matrix(width, 4 * width),
        'fall': matrix(4 * width, width),
      }
      for _ in range(settings.layers)
    ],
  }

  def normal(h):
    return h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)

  def attention(layer, h):
    split = lambda z: z.reshape(*z.shape[:2], heads, width // heads)
    query, key, value = map(split, jnp.split(h @ layer['attend'], 3, -1))
    out = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return out.reshape(h.shape) @ layer['join']

  def losses(weights, rows):
    seen, wanted = rows[:, :-1], rows[:, 1:]
    h = weights['tokens'][seen] + weights['places']
    for layer in weights['layers']:
      h = h + attention(layer, normal(h))
      h = h + jax.nn.gelu(normal(h) @ layer['rise']) @ layer['fall']
    logits = normal(h) @ weights['tokens'].T
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, wanted
    )

  return weights, losses


def weighted_sources(settings: Settings) -> Case:
  """A decoder that learns from rows of weighted sources.

  Args:
    settings: sizes; the tokens are random, cost does not depend on them.

  Returns:
    A `Case`; the upper variable is (SOURCES,).
  """
  weights, losses = make_decoder(settings)

  def upper(x, y, batch):
    del x
    return losses(y, batch['validation']).mean()

  def lower(x, y, batch):
    rows = losses(y, batch['train']).mean(-1)
    return (jax.nn.softmax(x)[batch['source']] * rows).mean()

  shape = (2, settings.rows, settings.length + 1)
  tokens = jax.random.randint(jax.random.key(1), shape, 0, settings.vocabulary)
  batch = {
    'train': tokens[0],
    'validation': tokens[1],
    'source': jnp.arange(settings.rows) % SOURCES,
  }
  params = bj.BilevelParams(jnp.zeros(SOURCES), weights)
  return Case(bj.BilevelProblem(upper, lower), params, batch)


def hypergradient_program(
  case: Case, mode: str, settings: Settings
) -> measure.Program:
  """An unrolled hypergradient as a step.

  Args:
    case: the problem.
    mode: of the oracle; `+checkpoint` after it for checkpoints.
    settings: steps and checkpoints.
  """
  mode, _, checkpoint = mode.partition('+')
  oracle = bj.unrolled(
    case.problem,
    # The derivative of a root at 0 needs a constant under it.
    lower=optax.adam(1e-3, eps_root=1e-8),
    steps=settings.steps,
    mode=mode,
    checkpoint=settings.checkpoint if checkpoint else None,
  )

  def step(carry, batch):
    params, state, _ = carry
    gradient, state = oracle.update(batch, state, params)
    return params, state, gradient.upper

  start = (case.params, oracle.init(case.params), case.params.upper)
  return measure.Program(step, start, case.batch)


class Line(NamedTuple):
  """One mode against `reverse`.

  Attributes:
    mode: which.
    megabytes: temporary memory, MB.
    memory: its ratio.
    time: ratio of times.
    difference: largest between the hypergradients, over the largest entry.
  """

  mode: str
  megabytes: float
  memory: float
  time: measure.Ratio
  difference: float


def compare(settings: Settings) -> list[Line]:
  """Every mode against `reverse`, timed in turn."""
  case = weighted_sources(settings)
  base = hypergradient_program(case, 'reverse', settings)
  lines = []
  for mode in settings.modes:
    program = hypergradient_program(case, mode, settings)
    ratio = measure.time_ratio(program.run, base.run, rounds=settings.rounds)
    found, wanted = (np.asarray(p.carry[-1]) for p in (program, base))
    lines.append(
      Line(
        mode,
        program.temporary / 1e6,
        program.temporary / base.temporary,
        ratio,
        float(np.abs(found - wanted).max() / np.abs(wanted).max()),
      )
    )
  return lines


def as_row(line: Line) -> dict[str, Any]:
  """A row of the printed table."""
  verdicts = []
  if line.mode == 'mixed':
    for what, value, bound in (
      ('memory', line.memory, BOUND_MEMORY),
      ('wall', line.time.wall, BOUND_TIME),
      ('difference', line.difference, BOUND_DIFFERENCE),
    ):
      holds = 'holds' if value <= bound else 'EXCEEDED'
      verdicts.append(f'{what} <= {bound}: {holds}')
  return {
    'compared': f'{line.mode} / reverse',
    'memory': f'{line.memory:.3f}',
    'MB': f'{line.megabytes:.1f}',
    'wall (range)': str(line.time),
    'CPU': f'{line.time.cpu:.3f}',
    's': f'{line.time.seconds:.2f} / {line.time.base_seconds:.2f}',
    'difference': f'{line.difference:.0e}',
    'bound': ', '.join(verdicts),
  }


def main(options: harness.Options) -> dict[str, float]:
  """Measures, prints and writes down."""
  start = time.perf_counter()
  lines = compare(options.settings)
  metrics = {}
  for line in lines:
    metrics[f'{line.mode}/memory'] = line.memory
    metrics[f'{line.mode}/wall'] = line.time.wall
    metrics[f'{line.mode}/cpu'] = line.time.cpu
    metrics[f'{line.mode}/difference'] = line.difference
  harness.write_table(options.workdir, [as_row(line) for line in lines])
  harness.write_results(
    options, metrics=metrics, seconds=time.perf_counter() - start
  )
  return metrics


STUDY = harness.Study(main, PRESETS, paper='benchmarks', binary='unrolled')


if __name__ == '__main__':
  harness.run(STUDY)
