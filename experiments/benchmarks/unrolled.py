"""What the modes of an unrolled hypergradient cost: memory and time.

    python -m experiments.benchmarks.unrolled

A small decoder of text takes Adam steps on rows from several sources; the
hypergradient is that of the sources' weights. Each mode of the oracle against
`reverse`, which differentiates the gradient of each step backwards:

1. Does `mixed` (a forward product with the gradient of each step) save memory?
   Bound: .2 times the temporary memory, and .8 times the time.
2. What do the others cost? `reverse` and `mixed` with checkpoints, and
   `forward`, which needs a product for each source.

Memory is the compiler's count of temporary buffers. Times are medians of paired
ratios with their range, see `measure`. Takes some minutes on two cores.
"""

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure

BOUND_MEMORY, BOUND_TIME = 0.2, 0.8
SOURCES = 2


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    modes: what is compared with `reverse`.
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
    'mixed+checkpoint',
    'reverse+checkpoint',
    'forward',
  )
  layers: int = 4
  width: int = 128
  heads: int = 4
  length: int = 128
  vocabulary: int = 256
  rows: int = 8
  steps: int = 8
  checkpoint: int = 3
  rounds: int = 5


PRESETS = {'paper': Settings()}


class Case(NamedTuple):
  """A problem with a start and data."""

  problem: bj.BilevelProblem
  params: bj.BilevelParams
  batch: Any


def make_decoder(settings: Settings) -> tuple[Any, Any]:
  """The parameters of a decoder, and its loss of each row of tokens."""
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
    token = optax.losses.softmax_cross_entropy_with_integer_labels
    return token(logits, wanted).mean(-1)

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
    rows = losses(y, batch['train'])
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
