"""What a coupled step costs beside the same by hand, and in more sequences.

    python -m experiments.benchmarks.coupled

Expected: SOBA and SABA 1.001 times the operations by hand; the time grows with
the power 0.8 of the number of sequences. Time: a minute on 2 cores.

Two questions, on quadratics of samples of rank one (100 + 100 numbers, a batch
of 64; random, as cost does not depend on the values):

1. Does the library cost more than plain jax? SOBA, SABA, F2SA and stocBiO, each
   against the same step by hand. Bound: 1.02 times the operations.
2. How does a step grow with the number of sequences? From 2 to 32, the fitted
   exponent of the time. Bound: 1.1.

Operations are the compiler's counts, the body of a loop once in both programs.
Times are medians of paired ratios with their range, see `measure`.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure

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


class Case(NamedTuple):
  """A nested problem in fixed batches.

  Attributes:
    problem: losses of (x, y, batch); the batch holds the numbers of two.
    batches: how many fixed batches there are.
    start: the two variables.
  """

  problem: bj.BilevelProblem
  batches: int
  start: bj.BilevelParams


def make_case(size: int, batch_size: int, *, batches: int = 16) -> Case:
  """Random factors of Hessians and cross terms, and linear terms."""
  shape = (2, 6, batches, batch_size, size)
  factors = jax.random.normal(jax.random.key(0), shape) / size**0.5

  def loss_of(form, which):
    def loss(x, y, batch):
      a, b, left, right, p, q = form[:, batch[which]]
      cross = (left @ x) * (right @ y)
      square = ((a @ x) ** 2 + (b @ y) ** 2) / 2
      return jnp.mean(square + cross + p @ x + q @ y)

    return loss

  x, y = jax.random.normal(jax.random.key(1), (2, size))
  problem = bj.BilevelProblem(
    loss_of(factors[0], 'upper'), loss_of(factors[1], 'lower')
  )
  return Case(problem, batches, bj.BilevelParams(x, y))


def solver_of(method: str, made: Case) -> Any:
  """The library's solver."""
  sgd = {'upper': optax.sgd(RATE), 'lower': optax.sgd(RATE)}
  looped = sgd | {'lower': bj.Sequence(optax.sgd(RATE), steps=INNER)}
  if method == 'v_pbgd':
    return bj.v_pbgd(made.problem, penalty=PENALTY, **sgd)
  if method == 'soba':
    return bj.soba(made.problem, **sgd)
  if method == 'saba':
    part = lambda batch: batch['lower']
    return bj.saba(made.problem, parts=made.batches, index=part, **sgd)
  if method == 'f2sa':
    return bj.f2sa(made.problem, penalty=PENALTY, **looped)
  return bj.solvers.stocbio(
    made.problem, terms=TERMS, step_size=SERIES, **looped
  )


def by_hand(method: str, made: Case) -> tuple[Any, Any]:
  """The same step in plain jax, and its first carry.

  Like the library's, it keeps the losses of the last evaluations, and looks at
  none within a loop: they share most of their work with the gradients, but not
  all.
  """
  f, g = made.problem[:2]
  x, y = made.start
  both = (0, 1)

  def directions(x, y, v, batch):
    above, (f_x, f_y) = jax.value_and_grad(f, both)(x, y, batch)

    def slopes(y):
      value, slope = jax.value_and_grad(g, both)(x, y, batch)
      return slope, value

    (_, g_y), (cross, product), below = jax.jvp(
      slopes, (y,), (v,), has_aux=True
    )
    return (f_x - cross, g_y, product - f_y), (above, below)

  def v_pbgd(carry, batch):
    x, y, w = carry[0]
    least, slope = jax.value_and_grad(g, 1)(x, w, batch)
    w = w - RATE * slope

    def penalised(x, y):
      above, below = f(x, y, batch), g(x, y, batch)
      gap = below - g(x, w, batch)
      return above / PENALTY + gap, (above, below, gap)

    (d_x, d_y), losses = jax.grad(penalised, both, has_aux=True)(x, y)
    return (x - RATE * d_x, y - RATE * d_y, w), (least, *losses)

  def soba(carry, batch):
    moves, losses = directions(*carry[0], batch)
    moved = tuple(z - RATE * d for z, d in zip(carry[0], moves, strict=True))
    return moved, losses

  def saba(carry, batch):
    point, _, table, total, seen = carry
    i = batch['lower']
    fresh, losses = directions(*point, batch)
    change = tuple(d - t[i] for d, t in zip(fresh, table, strict=True))
    # A part not seen before is not corrected.
    share = jnp.where(seen[i], 1 / jnp.maximum(seen.sum(), 1), 0)
    moved = tuple(
      z - RATE * (c + share * s)
      for z, c, s in zip(point, change, total, strict=True)
    )
    table = tuple(t.at[i].add(c) for t, c in zip(table, change, strict=True))
    total = tuple(s + c for s, c in zip(total, change, strict=True))
    return moved, losses, table, total, seen.at[i].set(True)

  def f2sa(carry, batch):
    x, y, z = carry[0]

    def inner(pair, _):
      y, z = pair
      above, slope = jax.value_and_grad(f, 1)(x, y, batch)
      below, pull = jax.value_and_grad(g, 1)(x, y, batch)
      least, follow = jax.value_and_grad(g, 1)(x, z, batch)
      y = y - RATE * (slope / PENALTY + pull)
      return (y, z - RATE * follow), (above, below, least)

    quiet = lambda pair, t: (inner(pair, t)[0], None)
    pair, _ = jax.lax.scan(quiet, (y, z), length=INNER - 1)
    (y, z), inside = inner(pair, None)
    above, f_x = jax.value_and_grad(f)(x, y, batch)
    below, g_y = jax.value_and_grad(g)(x, y, batch)
    least, g_z = jax.value_and_grad(g)(x, z, batch)
    x = x - RATE * (f_x + PENALTY * (g_y - g_z))
    return (x, y, z), ((above, below, least), inside)

  def stocbio(carry, batch):
    x, y = carry[0]

    quiet = lambda y, _: (y - RATE * jax.grad(g, 1)(x, y, batch), None)
    y, _ = jax.lax.scan(quiet, y, length=INNER - 1)
    below, slope = jax.value_and_grad(g, 1)(x, y, batch)
    y = y - RATE * slope
    above, (f_x, f_y) = jax.value_and_grad(f, both)(x, y, batch)
    slopes = lambda y: jax.grad(g, both)(x, y, batch)
    _, product = jax.linearize(slopes, y)
    term = lambda q, _: (q + SERIES * (f_y - product(q)[1]), None)
    q, _ = jax.lax.scan(term, SERIES * f_y, length=TERMS)
    return (x - RATE * (f_x - product(q)[0]), y), (above, below)

  zeros, zero = jnp.zeros_like(y), jnp.zeros([])
  table = tuple(jnp.zeros((made.batches, y.size)) for _ in range(3))
  pair, triple = (zero,) * 2, (zero,) * 3
  unseen = jnp.zeros(made.batches, bool)

  return {
    'v_pbgd': (v_pbgd, ((x, y, y), (zero,) * 4)),
    'soba': (soba, ((x, y, zeros), pair)),
    'saba': (saba, ((x, y, zeros), pair, table, (zeros,) * 3, unseen)),
    'f2sa': (f2sa, ((x, y, y), (triple, triple))),
    'stocbio': (stocbio, ((x, y), pair)),
  }[method]


def step_of(solver: Any) -> Any:
  """A step of a carry of params and state."""

  def step(carry, batch):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return bj.apply_updates(params, updates), state

  return step


def compare(method: str, settings: Settings) -> tuple[float, measure.Ratio]:
  """Ratios of operations and of times, library over hand."""
  made = make_case(settings.size, settings.batch_size)
  batch = {'upper': jnp.int32(0), 'lower': jnp.int32(1)}
  solver, params = solver_of(method, made), made.start
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


STUDY = harness.Study(main, PRESETS, paper='benchmarks', binary='coupled')


if __name__ == '__main__':
  harness.run(STUDY)
