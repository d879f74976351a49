"""Implicit and unrolled hypergradients.

A network learns from weighted digits; the hypergradient is that of the weights.
Comparisons:

- implicit, with K steps of conjugate gradients from a cold start / jaxopt and
  TorchOpt, and in operations / 2 K + 2 gradients of the lower loss: a product
  costs two gradients if the first pass is shared;
- unrolled through T steps of gradient descent / jaxopt, TorchOpt and higher;
- modes of the unrolled one / `reverse`, which differentiates each step in
  reverse mode and stores its intermediate values. `mixed` stores the state of
  each step and uses a forward product. A decoder takes steps of Adam on rows of
  tokens from weighted sources;
- growth with the number of parameters.

Operations and memory are the compiler's counts. It counts the body of a loop
once, so compared loops are unrolled.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments.benchmarks import measure
from experiments.benchmarks.peers import problems

RATE, SOURCES = 0.1, 2
BOUND_PEER, BOUND_FLOPS, BOUND_GROWTH = 0.95, 1.2, 1.1
BOUND_MEMORY, BOUND_TIME = 0.2, 0.8
# Rounding of float32: gradients of weights that sum to 1 nearly cancel.
BOUND_DIFFERENCE = 1e-5


class Case(NamedTuple):
  """A problem with a start and data."""

  problem: bj.BilevelProblem
  params: bj.BilevelParams
  batch: Any


class Decoder(NamedTuple):
  """Sizes of the decoder, whose activations exceed its weights in memory."""

  layers: int = 4
  width: int = 128
  heads: int = 4
  length: int = 128
  vocabulary: int = 256
  rows: int = 6
  steps: int = 8  # Steps of Adam.
  checkpoint: int = 3  # Steps per checkpoint.


def weighted_digits(width: int, rows: int) -> Case:
  """Makes a network with two hidden layers; the upper variable is (rows,)."""
  lower, upper, y, x, batch = problems.digits(width, rows)
  return Case(bj.BilevelProblem(upper, lower), bj.BilevelParams(x, y), batch)


def choose_width(parameters: int) -> int:
  """Returns the width for which 2 width^2 + 13 width is near `parameters`."""
  return max(1, round((-13 + math.sqrt(169 + 8 * parameters)) / 4))


def hypergradient(case: Case, oracle: Any) -> measure.Program:
  """Compiles a hypergradient as a step, whose carry ends with it."""

  def step(carry, batch):
    params, state, _ = carry
    gradient, state = oracle.update(batch, state, params)
    return params, state, gradient.upper

  start = (case.params, oracle.init(case.params), case.params.upper)
  return measure.Program(step, start, case.batch)


def implicit(case: Case, products: int, *, unroll: bool) -> measure.Program:
  """Compiles an implicit hypergradient from a cold start."""
  solve = bj.linear_solvers.conjugate_gradient(
    products, unroll=products if unroll else 1
  )
  return hypergradient(
    case,
    bj.implicit(
      case.problem,
      solve=bj.linear_solvers.LinearSystem(solve, warm_start=False),
    ),
  )


def unrolled(case: Case, steps: int) -> measure.Program:
  """Compiles a hypergradient through steps of gradient descent."""
  oracle = bj.unrolled(
    case.problem, lower=bj.Sequence(optax.sgd(RATE), steps=steps)
  )
  return hypergradient(case, oracle)


def lower_gradient(case: Case) -> measure.Program:
  """Compiles a gradient of the lower loss in the network's parameters."""

  def step(carry, batch):
    (x, y), _ = carry
    return (x, y), jax.grad(case.problem.lower, 1)(x, y, batch)

  start = (tuple(case.params), case.params.lower)
  return measure.Program(step, start, case.batch)


def _peer(kind, package, width, rows, count, context):
  """Compares our hypergradient with that of another package."""
  context.peers.require(package)
  case = weighted_digits(width, rows)
  arguments: dict[str, Any] = {'width': width, 'rows': rows}
  if kind == 'implicit':
    measured = implicit(case, count, unroll=False)
    arguments |= {'products': count}
  else:
    measured = unrolled(case, count)
    arguments |= {'steps': count, 'rate': RATE}
  module = 'jax_steps' if package == 'jaxopt' else 'torch_steps'
  with context.peers.process(module, f'{kind}_{package}', **arguments) as peer:
    return measure.compare(measured, peer.run, context)


def _gradients(width, rows, products, context):
  """Compares the implicit hypergradient with 2 K + 2 gradients."""
  case = weighted_digits(width, rows)
  measured, plain = implicit(case, products, unroll=True), lower_gradient(case)
  gradients = 2 * products + 2
  return measure.compare(
    measured.run, lambda steps: plain.run(gradients * steps), context
  ) | {'flops': measured.flops / (gradients * plain.flops)}


def _growth(sizes, rows, products, context):
  make = lambda size: implicit(
    weighted_digits(choose_width(size), rows), products, unroll=False
  )
  return measure.growth(make, sizes, context.rounds)


def make_decoder(sizes: Decoder) -> tuple[Any, Any]:
  """Returns the weights of a decoder and its loss per token, (rows, length)."""
  width, heads = sizes.width, sizes.heads
  keys = iter(jax.random.split(jax.random.key(0), 2 + 4 * sizes.layers))

  def matrix(rows, columns):
    return jax.random.normal(next(keys), (rows, columns)) / math.sqrt(rows)

  weights = {
    'tokens': matrix(sizes.vocabulary, width),
    'places': matrix(sizes.length, width),
    'layers': [
      {
        'attend': matrix(width, 3 * width),
        'join': matrix(width, width),
        'rise': matrix(width, 4 * width),
        'fall': matrix(4 * width, width),
      }
      for _ in range(sizes.layers)
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
    inputs, targets = rows[:, :-1], rows[:, 1:]
    h = weights['tokens'][inputs] + weights['places']
    for layer in weights['layers']:
      h = h + attention(layer, normal(h))
      h = h + jax.nn.gelu(normal(h) @ layer['rise']) @ layer['fall']
    logits = normal(h) @ weights['tokens'].T
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, targets
    )

  return weights, losses


def weighted_sources(sizes: Decoder) -> Case:
  """Makes a decoder that learns from rows of weighted sources.

  Args:
    sizes: sizes of the decoder and of the random data.

  Returns:
    A `Case`; the upper variable is (SOURCES,).
  """
  weights, losses = make_decoder(sizes)

  def upper(x, y, batch):
    del x
    return losses(y, batch['validation']).mean()

  def lower(x, y, batch):
    rows = losses(y, batch['train']).mean(-1)
    return (jax.nn.softmax(x)[batch['source']] * rows).mean()

  shape = (2, sizes.rows, sizes.length + 1)
  tokens = jax.random.randint(jax.random.key(1), shape, 0, sizes.vocabulary)
  batch = {
    'train': tokens[0],
    'validation': tokens[1],
    'source': jnp.arange(sizes.rows) % SOURCES,
  }
  params = bj.BilevelParams(jnp.zeros(SOURCES), weights)
  return Case(bj.BilevelProblem(upper, lower), params, batch)


def unrolled_adam(case: Case, mode: str, sizes: Decoder) -> measure.Program:
  """Compiles an unrolled hypergradient; `+checkpoint` adds checkpoints."""
  mode, _, checkpoint = mode.partition('+')
  oracle = bj.unrolled(
    case.problem,
    # `eps_root`: the square root has no derivative at 0.
    lower=bj.Sequence(optax.adam(1e-3, eps_root=1e-8), steps=sizes.steps),
    mode=mode,
    checkpoint=sizes.checkpoint if checkpoint else None,
  )
  return hypergradient(case, oracle)


def compare_modes(
  mode: str, sizes: Decoder, context: measure.Context
) -> dict[str, float]:
  """Compares a mode with `reverse`, also in values."""
  case = weighted_sources(sizes)
  names = mode, 'reverse'
  program, base = (unrolled_adam(case, name, sizes) for name in names)
  numbers = measure.compare(program, base, context, **context.few())
  measured, peer = (np.asarray(p.carry[-1]) for p in (program, base))
  difference = np.abs(measured - peer).max() / np.abs(peer).max()
  return numbers | {
    'temporary': program.temporary / base.temporary,
    'difference': float(difference),
  }


def rows(preset: str) -> Sequence[measure.Row]:
  """Returns the comparisons."""
  small = preset == 'smoke'
  width = 32 if small else 256
  digits, products, steps = 64, 10, 10
  every = measure.Rows()
  size = f'{2 * width**2 + 13 * width:,} parameters'
  for kind, count, packages in (
    ('implicit', products, ('jaxopt', 'torchopt')),
    ('unrolled', steps, ('jaxopt', 'torchopt', 'higher')),
  ):
    unit = 'products' if kind == 'implicit' else 'steps'
    for package in packages:
      every.add(
        f'hypergradient/{kind}/{package}',
        f'{kind}, {count} {unit}, {size} / {package}',
        *(_peer, kind, package, width, digits, count),
        wall=BOUND_PEER,
      )
  large = width if small else choose_width(1_000_000)
  every.add(
    'hypergradient/implicit/gradients',
    f'implicit, {products} products / {2 * products + 2} gradients',
    *(_gradients, large, digits, products),
    flops=BOUND_FLOPS,
  )
  sizes = Decoder(0, 8, 2, 32, 16, 4, 3) if small else Decoder()
  modes = ('mixed', 'reverse+checkpoint', 'mixed+checkpoint', 'forward')
  bounds = {'temporary': BOUND_MEMORY, 'wall': BOUND_TIME}
  bounds['difference'] = BOUND_DIFFERENCE
  for mode in modes[: 1 if small else None]:
    every.add(
      f'hypergradient/modes/{mode}',
      f'unrolled {mode}, {sizes.layers} layers / reverse',
      *(compare_modes, mode, sizes),
      **bounds if mode == 'mixed' else {},
    )
  counts = (10_000, 100_000, 1_000_000) + (10_000_000,) * (preset == 'paper')
  counts = (1_000, 10_000) if small else counts
  every.add(
    'growth/parameters',
    f'implicit hypergradient, parameters {counts[0]:,} to {counts[-1]:,}',
    *(_growth, counts, 16, 4),
    time_exponent=BOUND_GROWTH,
    memory_exponent=BOUND_GROWTH,
  )
  return every
