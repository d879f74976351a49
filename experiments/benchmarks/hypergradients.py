"""Implicit and unrolled hypergradients, against other packages and gradients.

A network learns from weighted digits; the hypergradient is that of the weights.

- Implicit, with K steps of conjugate gradients from a cold start, against
  jaxopt and TorchOpt, and in operations against 2 K + 2 gradients of the lower
  loss: a product is two gradients where the first pass is shared.
- Unrolled, through T steps of gradient descent, against jaxopt, TorchOpt and
  higher.
- Modes of the unrolled one against `reverse`, which goes backwards through the
  gradient of each step and keeps all that it was computed from. `mixed` keeps
  each step's state and goes through the gradient by a forward product. There a
  decoder takes steps of Adam on rows of tokens from weighted sources.
- Growth with the number of parameters.

Operations and memory are the compiler's counts, of loops that are unrolled
where they are compared, because the body of a loop is counted once.
"""

import functools
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
# Rounding of float32: gradients of weights that sum to one nearly cancel.
BOUND_DIFFERENCE = 1e-5


class Case(NamedTuple):
  """A problem with a start and data."""

  problem: bj.BilevelProblem
  params: bj.BilevelParams
  batch: Any


class Decoder(NamedTuple):
  """Sizes of the decoder; activations take several times its memory."""

  layers: int = 4
  width: int = 128
  heads: int = 4
  length: int = 128
  vocabulary: int = 256
  rows: int = 6
  steps: int = 8  # Of Adam.
  checkpoint: int = 3  # Steps a checkpoint, where there are any.


def weighted_digits(width: int, rows: int) -> Case:
  """A network with two hidden layers; the upper variable is (rows,)."""
  lower, upper, y, x, batch = problems.digits(width, rows)
  return Case(bj.BilevelProblem(upper, lower), bj.BilevelParams(x, y), batch)


def width_of(parameters: int) -> int:
  """The width at which 2 width^2 + 13 width is near `parameters`."""
  return max(1, round((-13 + math.sqrt(169 + 8 * parameters)) / 4))


def hypergradient(case: Case, oracle: Any) -> measure.Program:
  """A hypergradient as a step; the carry ends with it."""

  def step(carry, batch):
    params, state, _ = carry
    gradient, state = oracle.update(batch, state, params)
    return params, state, gradient.upper

  start = (case.params, oracle.init(case.params), case.params.upper)
  return measure.Program(step, start, case.batch)


def implicit(case: Case, products: int, *, unroll: bool) -> measure.Program:
  """An implicit hypergradient, from a cold start."""
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
  """A hypergradient through steps of gradient descent."""
  oracle = bj.unrolled(
    case.problem, lower=bj.Sequence(optax.sgd(RATE), steps=steps)
  )
  return hypergradient(case, oracle)


def lower_gradient(case: Case) -> measure.Program:
  """One gradient of the lower loss in the network's parameters, as a step."""

  def step(carry, batch):
    (x, y), _ = carry
    return (x, y), jax.grad(case.problem.lower, 1)(x, y, batch)

  start = (tuple(case.params), case.params.lower)
  return measure.Program(step, start, case.batch)


def _peer(kind, package, width, rows, count, context):
  """Our hypergradient against that of another package."""
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
  """The implicit hypergradient against 2 K + 2 gradients."""
  case = weighted_digits(width, rows)
  measured, plain = implicit(case, products, unroll=True), lower_gradient(case)
  gradients = 2 * products + 2
  return measure.compare(
    measured.run, lambda steps: plain.run(gradients * steps), context
  ) | {'flops': measured.flops / (gradients * plain.flops)}


def _growth(sizes, rows, products, context):
  make = lambda size: implicit(
    weighted_digits(width_of(size), rows), products, unroll=False
  )
  return measure.growth(make, sizes, context.rounds)


def make_decoder(sizes: Decoder) -> tuple[Any, Any]:
  """The weights of a decoder, and its loss of each token, (rows, length)."""
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
  """A decoder that learns from rows of weighted sources.

  Args:
    sizes: of all; the tokens are random, cost does not depend on them.

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


def of_mode(case: Case, mode: str, sizes: Decoder) -> measure.Program:
  """An unrolled hypergradient; `+checkpoint` after the mode for checkpoints."""
  mode, _, checkpoint = mode.partition('+')
  oracle = bj.unrolled(
    case.problem,
    # The derivative of a root at 0 needs a constant under it.
    lower=bj.Sequence(optax.adam(1e-3, eps_root=1e-8), steps=sizes.steps),
    mode=mode,
    checkpoint=sizes.checkpoint if checkpoint else None,
  )
  return hypergradient(case, oracle)


def compare_modes(
  mode: str, sizes: Decoder, context: measure.Context
) -> dict[str, float]:
  """A mode against `reverse`, with the difference of the hypergradients."""
  case = weighted_sources(sizes)
  program, base = (of_mode(case, name, sizes) for name in (mode, 'reverse'))
  numbers = measure.compare(program, base, context, **context.few())
  measured, peer = (np.asarray(p.carry[-1]) for p in (program, base))
  difference = np.abs(measured - peer).max() / np.abs(peer).max()
  return numbers | {
    'temporary': program.temporary / base.temporary,
    'difference': float(difference),
  }


def rows(preset: str) -> Sequence[measure.Row]:
  """The comparisons."""
  small = preset == 'smoke'
  width = 32 if small else 256
  digits, products, steps = 64, 10, 10
  partial, comparisons = functools.partial, []
  of = f'{2 * width**2 + 13 * width:,} parameters'
  for kind, count, packages in (
    ('implicit', products, ('jaxopt', 'torchopt')),
    ('unrolled', steps, ('jaxopt', 'torchopt', 'higher')),
  ):
    comparisons += [
      measure.Row(
        f'hypergradient/{kind}/{package}',
        f'{kind}, {count} {"products" if kind == "implicit" else "steps"}, '
        f'{of} / {package}',
        partial(_peer, kind, package, width, digits, count),
        {'wall': BOUND_PEER},
      )
      for package in packages
    ]
  comparisons.append(
    measure.Row(
      'hypergradient/implicit/gradients',
      f'implicit, {products} products / {2 * products + 2} gradients',
      partial(_gradients, width_of(1_000_000) if not small else 32, 64, 10),
      {'flops': BOUND_FLOPS},
    )
  )
  sizes = Decoder()
  if small:
    sizes = Decoder(0, 8, 2, 32, 16, 4, 3)
  modes = ('mixed', 'reverse+checkpoint', 'mixed+checkpoint', 'forward')
  for mode in modes[: 1 if small else None]:
    bounds = {
      'temporary': BOUND_MEMORY,
      'wall': BOUND_TIME,
      'difference': BOUND_DIFFERENCE,
    }
    comparisons.append(
      measure.Row(
        f'hypergradient/modes/{mode}',
        f'unrolled {mode}, {sizes.layers} layers / reverse',
        partial(compare_modes, mode, sizes),
        bounds if mode == 'mixed' else {},
      )
    )
  grown = (10_000, 100_000, 1_000_000) + (10_000_000,) * (preset == 'paper')
  grown = (1_000, 10_000) if small else grown
  comparisons.append(
    measure.Row(
      'growth/parameters',
      f'implicit hypergradient, parameters {grown[0]:,} to {grown[-1]:,}',
      partial(_growth, grown, 16, 4),
      {'time_exponent': BOUND_GROWTH, 'memory_exponent': BOUND_GROWTH},
    )
  )
  return comparisons
