"""What a coupled step costs beside the same by hand, and in more sequences.

    python -m experiments.benchmarks.coupled

Two questions, on the quadratics of `experiments.stsa` (100 + 100 numbers, a
batch of 64):

1. Does the library cost more than plain jax? SOBA, SABA, F2SA and stocBiO, each
   against the same step by hand. Bound: 1.02 times the operations.
2. How does a step grow with the number of sequences? From 2 to 32, the fitted
   exponent of the time. Bound: 1.1.

Operations are the compiler's counts, the body of a loop once in both programs.
Times are medians of paired ratios with their range, see `measure`.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure
from experiments.stsa import quadratic

FLOPS_BOUND, GROWTH_BOUND = 1.02, 1.1
RATE, INNER, TERMS, SERIES, PENALTY = 0.1, 10, 10, 0.3, 10.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    methods: what is compared with the same by hand.
    size: dimension of each variable.
    batch_size: samples in a batch, 16 batches.
    rounds: pairs of timings of each comparison.
    inner: numbers of inner sequences.
    width: numbers in each of these sequences.
  """

  methods: tuple[str, ...] = ('soba', 'saba', 'f2sa', 'stocbio')
  size: int = 100
  batch_size: int = 64
  rounds: int = 5
  inner: tuple[int, ...] = (2, 4, 8, 16, 32)
  width: int = 300


PRESETS = {'paper': Settings()}


def solver_of(method: str, made: quadratic.Quadratic) -> Any:
  """The library's solver."""
  sgd = {'upper': optax.sgd(RATE), 'lower': optax.sgd(RATE)}
  if method == 'soba':
    return bj.soba(made.problem, **sgd)
  if method == 'saba':
    part = lambda batch: batch['lower']
    return bj.saba(made.problem, parts=made.batches, index=part, **sgd)
  if method == 'f2sa':
    return bj.f2sa(made.problem, penalty=PENALTY, inner_steps=INNER, **sgd)
  return bj.stocbio(
    made.problem, inner_steps=INNER, terms=TERMS, step_size=SERIES, **sgd
  )


def by_hand(method: str, made: quadratic.Quadratic) -> tuple[Any, Any]:
  """The same step in plain jax, and its first carry."""
  f, g = made.problem
  x, y = made.start(jax.random.key(0))
  grad_f, grad_g = jax.grad(f, (0, 1)), jax.grad(g, (0, 1))

  def directions(x, y, v, batch):
    f_x, f_y = grad_f(x, y, batch)
    slopes = lambda y: grad_g(x, y, batch)
    (_, g_y), (cross, product) = jax.jvp(slopes, (y,), (v,))
    return f_x - cross, g_y, product - f_y

  def soba(carry, batch):
    moves = directions(*carry, batch)
    return tuple(z - RATE * d for z, d in zip(carry, moves, strict=True))

  def saba(carry, batch):
    point, table, mean = carry
    i = batch['lower']
    fresh = directions(*point, batch)
    change = tuple(d - t[i] for d, t in zip(fresh, table, strict=True))
    moved = tuple(
      z - RATE * (c + m) for z, c, m in zip(point, change, mean, strict=True)
    )
    table = tuple(t.at[i].add(c) for t, c in zip(table, change, strict=True))
    mean = tuple(
      m + c / made.batches for m, c in zip(mean, change, strict=True)
    )
    return moved, table, mean

  def f2sa(carry, batch):
    x, y, z = carry

    def inner(pair, _):
      y, z = pair
      slope = jax.grad(f, 1)(x, y, batch)
      pull = jax.grad(g, 1)(x, y, batch)
      follow = jax.grad(g, 1)(x, z, batch)
      y = y - RATE * (slope / PENALTY + pull)
      return (y, z - RATE * follow), None

    (y, z), _ = jax.lax.scan(inner, (y, z), length=INNER)
    gap = jax.grad(g)(x, y, batch) - jax.grad(g)(x, z, batch)
    x = x - RATE * (jax.grad(f)(x, y, batch) + PENALTY * gap)
    return x, y, z

  def stocbio(carry, batch):
    x, y = carry
    descend = lambda y, _: (y - RATE * jax.grad(g, 1)(x, y, batch), None)
    y, _ = jax.lax.scan(descend, y, length=INNER)
    f_x, f_y = grad_f(x, y, batch)
    _, product = jax.linearize(lambda y: grad_g(x, y, batch), y)
    term = lambda q, _: (q + SERIES * (f_y - product(q)[1]), None)
    q, _ = jax.lax.scan(term, SERIES * f_y, length=TERMS)
    return x - RATE * (f_x - product(q)[0]), y

  zeros = jnp.zeros_like(y)
  table = tuple(jnp.zeros((made.batches, y.size)) for _ in range(3))
  start = {
    'soba': (soba, (x, y, zeros)),
    'saba': (saba, ((x, y, zeros), table, (zeros,) * 3)),
    'f2sa': (f2sa, (x, y, y)),
    'stocbio': (stocbio, (x, y)),
  }
  return start[method]


def step_of(solver: Any) -> Any:
  """A step of a carry of params and state."""

  def step(carry, batch):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return bj.apply_updates(params, updates), state

  return step


def compare(method: str, settings: Settings) -> tuple[float, measure.Ratio]:
  """Ratios of operations and of times, library over hand."""
  made = quadratic.make_quadratic(
    coupling=0.3,
    samples=16 * settings.batch_size,
    size=settings.size,
    batch_size=settings.batch_size,
  )
  batch = {'upper': jnp.int32(0), 'lower': jnp.int32(1)}
  solver, params = solver_of(method, made), made.start(jax.random.key(0))
  ours = measure.Program(step_of(solver), (params, solver.init(params)), batch)
  theirs = measure.Program(*by_hand(method, made), batch)
  ratio = measure.time_ratio(ours.run, theirs.run, rounds=settings.rounds)
  return ours.flops / theirs.flops, ratio


def growth(settings: Settings) -> tuple[float, list[float]]:
  """Exponent of the time of a step in the number of sequences, and times."""
  mix = jax.random.normal(jax.random.key(0), (settings.width,) * 2) / 100
  seconds = []
  for inner in settings.inner:
    names = [f'y{n}' for n in range(inner)]
    follow = lambda n: lambda z, batch: mix @ z[n - 1] + batch - z[n]
    moves = {name: follow(n) for n, name in enumerate(names)}
    solver = bj.stsa(moves, steps=0.1)
    params = bj.sequences(
      **{name: jnp.full(settings.width, 0.1) for name in names}
    )
    program = measure.Program(
      step_of(solver), (params, solver.init(params)), jnp.zeros(settings.width)
    )
    base = program  # Only its own time is wanted.
    timed = measure.time_ratio(program.run, base.run, rounds=settings.rounds)
    seconds.append(timed.seconds)
  at, y = np.log(settings.inner), np.log(seconds)
  return float(np.polyfit(at, y, 1)[0]), seconds


def main(options: harness.Options) -> None:
  """Runs the comparisons, prints them and writes them down."""
  start = time.perf_counter()
  settings = options.settings
  metrics: dict[str, float] = {}
  rows = []
  for method in settings.methods:
    flops, ratio = compare(method, settings)
    metrics[f'{method}/flops'] = flops
    metrics[f'{method}/wall'] = ratio.wall
    holds = 'holds' if flops <= FLOPS_BOUND else 'EXCEEDED'
    rows.append(
      {
        'compared': f'{method} / by hand',
        'FLOPs': f'{flops:.4f}',
        'wall (range)': str(ratio),
        'us': f'{1e6 * ratio.seconds:.0f} / {1e6 * ratio.base_seconds:.0f}',
        'bound': f'FLOPs <= {FLOPS_BOUND}: {holds}',
      }
    )
  exponent, seconds = growth(settings)
  metrics['sequences/exponent'] = exponent
  holds = 'holds' if exponent <= GROWTH_BOUND else 'EXCEEDED'
  rows.append(
    {
      'compared': f'sequences {settings.inner}',
      'FLOPs': '-',
      'wall (range)': f'exponent {exponent:.2f}',
      'us': ', '.join(f'{1e6 * s:.0f}' for s in seconds),
      'bound': f'exponent <= {GROWTH_BOUND}: {holds}',
    }
  )
  harness.write_table(options.workdir, rows)
  harness.write_results(
    options, metrics=metrics, seconds=time.perf_counter() - start
  )


if __name__ == '__main__':
  harness.run(main, PRESETS, paper='benchmarks', binary='coupled')
