"""Steps of coupled sequences on quadratics, by the library and by hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.benchmarks import measure
from experiments.benchmarks.peers import problems

RATE, INNER, TERMS, SERIES, PENALTY = 0.1, 10, 10, 0.3, 10.0


class Case(NamedTuple):
  """A bilevel problem with fixed batches.

  Attributes:
    problem: losses of (x, y, batch); a batch has the index of a fixed batch for
      each level.
    batches: number of fixed batches.
    start: the two variables.
  """

  problem: bj.BilevelProblem
  batches: int
  start: bj.BilevelParams


def make_case(size: int, batch_size: int, form: str = 'factorised') -> Case:
  """Makes quadratics; see `problems.quadratics`."""
  upper, lower, start = problems.quadratics(form, size, batch_size)
  problem = bj.BilevelProblem(
    lambda x, y, batch: upper(x, y, batch['upper']),
    lambda x, y, batch: lower(x, y, batch['lower']),
  )
  return Case(problem, problems.BATCHES, bj.BilevelParams(*start))


def make_solver(method: str, case: Case) -> Any:
  """Makes a solver of the library."""
  sgd = {'upper': optax.sgd(RATE), 'lower': optax.sgd(RATE)}
  looped = sgd | {'lower': bj.Sequence(optax.sgd(RATE), steps=INNER)}
  if method == 'v_pbgd':
    return bj.v_pbgd(case.problem, penalty=PENALTY, **sgd)
  if method == 'soba':
    return bj.soba(case.problem, **sgd)
  if method == 'saba':
    part = lambda batch: batch['lower']
    return bj.saba(case.problem, parts=case.batches, index=part, **sgd)
  if method == 'f2sa':
    return bj.f2sa(case.problem, penalty=PENALTY, **looped)
  series = {'terms': TERMS, 'step_size': SERIES}
  if method == 'sustain':
    decay = lambda count: 0.5 / (count + 1) ** (2 / 3)
    return bj.solvers.sustain(case.problem, decay=decay, key=0, **series, **sgd)
  return bj.solvers.stocbio(case.problem, **series, **looped)


def by_hand(method: str, case: Case) -> tuple[Any, Any]:
  """Makes the same step in plain jax, and its first carry.

  Like the library, it stores the losses of the last evaluations, but computes
  none inside of loops, where they would add work to the gradients.
  """
  f, g = case.problem[:2]
  x, y = case.start
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
    value, slope = jax.value_and_grad(g, 1)(x, w, batch)
    w = w - RATE * slope

    def penalised(x, y):
      above, below = f(x, y, batch), g(x, y, batch)
      gap = below - g(x, w, batch)
      return above / PENALTY + gap, (above, below, gap)

    (d_x, d_y), losses = jax.grad(penalised, both, has_aux=True)(x, y)
    return (x - RATE * d_x, y - RATE * d_y, w), (value, *losses)

  def soba(carry, batch):
    moves, losses = directions(*carry[0], batch)
    moved = tuple(z - RATE * d for z, d in zip(carry[0], moves, strict=True))
    return moved, losses

  def saba(carry, batch):
    point, _, table, total, visited = carry
    i = batch['lower']
    fresh, losses = directions(*point, batch)
    change = tuple(d - t[i] for d, t in zip(fresh, table, strict=True))
    # A part without an entry in the table is not corrected.
    share = jnp.where(visited[i], 1 / jnp.maximum(visited.sum(), 1), 0)
    moved = tuple(
      z - RATE * (c + share * s)
      for z, c, s in zip(point, change, total, strict=True)
    )
    table = tuple(t.at[i].add(c) for t, c in zip(table, change, strict=True))
    total = tuple(s + c for s, c in zip(total, change, strict=True))
    return moved, losses, table, total, visited.at[i].set(True)

  def f2sa(carry, batch):
    x, y, z = carry[0]

    def inner(pair, _):
      y, z = pair
      above, slope = jax.value_and_grad(f, 1)(x, y, batch)
      below, pull = jax.value_and_grad(g, 1)(x, y, batch)
      value, follow = jax.value_and_grad(g, 1)(x, z, batch)
      y = y - RATE * (slope / PENALTY + pull)
      return (y, z - RATE * follow), (above, below, value)

    quiet = lambda pair, t: (inner(pair, t)[0], None)
    pair, _ = jax.lax.scan(quiet, (y, z), length=INNER - 1)
    (y, z), inside = inner(pair, None)
    above, f_x = jax.value_and_grad(f)(x, y, batch)
    below, g_y = jax.value_and_grad(g)(x, y, batch)
    value, g_z = jax.value_and_grad(g)(x, z, batch)
    x = x - RATE * (f_x + PENALTY * (g_y - g_z))
    return (x, y, z), ((above, below, value), inside)

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
  table = tuple(jnp.zeros((case.batches, y.size)) for _ in range(3))
  pair, triple = (zero,) * 2, (zero,) * 3
  unseen = jnp.zeros(case.batches, bool)

  return {
    'v_pbgd': (v_pbgd, ((x, y, y), (zero,) * 4)),
    'soba': (soba, ((x, y, zeros), pair)),
    'saba': (saba, ((x, y, zeros), pair, table, (zeros,) * 3, unseen)),
    'f2sa': (f2sa, ((x, y, y), (triple, triple))),
    'stocbio': (stocbio, ((x, y), pair)),
  }[method]


def scanned(step: Any, steps: int) -> Any:
  """Makes one step of a scan of steps."""

  def many(carry, batch):
    body = lambda carry, _: (step(carry, batch), None)
    return jax.lax.scan(body, carry, length=steps)[0]

  return many


def epochs(case: Case, solver: Any, steps: int) -> measure.Program:
  """Compiles a scan of steps, with batches in a new order in each epoch."""
  step = measure.solver_step(solver)

  def many(carry, _):
    inner, key = carry
    key, *drawn = jax.random.split(key, 3)
    order = lambda key: jax.vmap(
      lambda k: jax.random.permutation(k, case.batches)
    )(jax.random.split(key, -(-steps // case.batches))).ravel()[:steps]
    batches = dict(zip(('upper', 'lower'), map(order, drawn)))
    body = lambda carry, batch: (step(carry, batch), None)
    return jax.lax.scan(body, inner, batches)[0], key

  first = (case.start, solver.init(case.start))
  return measure.Program(many, (first, jax.random.key(0)))


def hand_pair(
  method: str, case: Case, steps: int = 1
) -> tuple[measure.Program, measure.Program]:
  """Compiles the library's step and the one by hand, or scans of them."""
  batch = {'upper': jnp.int32(0), 'lower': jnp.int32(1)}
  solver = make_solver(method, case)
  measured = (case.start, solver.init(case.start))
  hand, peer = by_hand(method, case)
  many = lambda step: step if steps == 1 else scanned(step, steps)
  return (
    measure.Program(many(measure.solver_step(solver)), measured, batch),
    measure.Program(many(hand), peer, batch),
  )


def tiny(method: str, *, measured: bool) -> tuple[Any, bj.BilevelParams]:
  """Makes a solver and its params, two variables with two numbers each.

  Args:
    method: see `make_solver`.
    measured: whether its state has losses and counts.
  """
  square = lambda x, y, batch: jnp.sum((x - y) ** 2) + jnp.sum(y**2)
  params = bj.BilevelParams(jnp.ones(2), jnp.zeros(2))
  case = Case(bj.BilevelProblem(square, square), 1, params)
  solver = make_solver(method, case)
  return solver if measured else bj.evaluation.unmeasured(solver), params
