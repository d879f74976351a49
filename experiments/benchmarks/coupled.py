"""Steps of coupled sequences: small problems, where what is around them shows.

On quadratics of samples, 100 + 100 numbers and a batch of 64, with dense
Hessians or of rank one; random, as cost does not depend on the values.

- A scan of steps against benchmark_bilevel's own solvers, which draw batches
  and schedules within it as ours do here.
- SOBA, SABA, F2SA and stocBiO against the same step by hand: operations, and
  time in a scan. And a scan against as many calls of the step.
- A call from Python of one compiled `solver.update`, on variables of two
  numbers each, against `optax.sgd` on their gradients: no less than one
  argument and result for each of the leaves of a state is to hand over.
- Compiling MoCo on two losses with Adam, against one loss with Adam.
- Growth with the number of sequences, and of clients.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.benchmarks import environment, measure
from experiments.benchmarks.peers import problems

BOUND_FLOPS, BOUND_GROWTH = 1.02, 1.1
BOUND_PEER = {'dense': 0.9, 'factorised': 1.0}
BOUND_SCAN, BOUND_CALL, BOUND_COMPILE = 1.0, 1.5, 2.0
RATE, INNER, TERMS, SERIES, PENALTY = 0.1, 10, 10, 0.3, 10.0


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


def make_case(size: int, batch_size: int, form: str = 'factorised') -> Case:
  """Quadratics in batches; see `problems.quadratics`."""
  upper, lower, start = problems.quadratics(form, size, batch_size)
  problem = bj.BilevelProblem(
    lambda x, y, batch: upper(x, y, batch['upper']),
    lambda x, y, batch: lower(x, y, batch['lower']),
  )
  return Case(problem, problems.BATCHES, bj.BilevelParams(*start))


def solver_of(method: str, case: Case) -> Any:
  """The library's solver."""
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
  """The same step in plain jax, and its first carry.

  Like the library's, it keeps the losses of the last evaluations, and looks at
  none within a loop: they share most of their work with the gradients, but not
  all.
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
    point, _, table, total, visited = carry
    i = batch['lower']
    fresh, losses = directions(*point, batch)
    change = tuple(d - t[i] for d, t in zip(fresh, table, strict=True))
    # A part not seen before is not corrected.
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
  """A scan of steps as one step."""

  def many(carry, batch):
    body = lambda carry, _: (step(carry, batch), None)
    return jax.lax.scan(body, carry, length=steps)[0]

  return many


def epochs(case: Case, solver: Any, steps: int) -> measure.Program:
  """Scans steps, on batches in a new random order in each epoch."""
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


def _peer(method, form, size, batch_size, steps, context):
  """A scan of our steps against one of benchmark_bilevel."""
  context.peers.require('jax')
  folder = str(environment.repository('benchmark_bilevel'))
  case = make_case(size, batch_size, form)
  measured = epochs(case, solver_of(method, case), steps)
  arguments = {'folder': folder, 'solver': method, 'form': form, 'size': size}
  arguments |= {'batch_size': batch_size, 'steps': steps}
  with context.peers.process(
    'jax_steps', 'bilevel_benchmark', **arguments
  ) as peer:
    return measure.compare(measured, peer.run, context)


def hand_pair(
  method: str, case: Case, steps: int = 1
) -> tuple[measure.Program, measure.Program]:
  """Programs of the library's step and of the same by hand, or of scans."""
  batch = {'upper': jnp.int32(0), 'lower': jnp.int32(1)}
  solver = solver_of(method, case)
  measured = (case.start, solver.init(case.start))
  hand, peer = by_hand(method, case)
  many = lambda step: step if steps == 1 else scanned(step, steps)
  return (
    measure.Program(many(measure.solver_step(solver)), measured, batch),
    measure.Program(many(hand), peer, batch),
  )


def _by_hand(method, size, batch_size, context):
  case = make_case(size, batch_size)
  return measure.compare(*hand_pair(method, case), context)


def _scan(method, size, batch_size, steps, context):
  """A scan of the library's steps against one of steps by hand."""
  pair = hand_pair(method, make_case(size, batch_size), steps)
  numbers = measure.compare(*pair, context)
  numbers.pop('flops')  # The body of a loop is counted once.
  return numbers


def _loop(method, size, batch_size, steps, context):
  """A scan of steps against as many calls of the step by hand."""
  case = make_case(size, batch_size)
  many, (_, one) = hand_pair(method, case, steps)[0], hand_pair(method, case)
  return measure.compare(
    many.run, lambda count: one.run(steps * count), context
  )


def _in_python(
  update: Any, arguments: Any, state: Any, params: Any
) -> measure.Run:
  """Makes a function that calls a compiled update and waits."""
  step = jax.jit(update)

  def run(calls):
    current = state
    for _ in range(calls):
      updates, current = step(arguments, current, params)
    jax.block_until_ready((updates, current))

  return run


def tiny(method: str, *, measured: bool) -> tuple[Any, bj.BilevelParams]:
  """A solver of two variables of two numbers each, and these.

  Args:
    method: as in `solver_of`.
    measured: whether its state has losses and counts.
  """
  square = lambda x, y, batch: jnp.sum((x - y) ** 2) + jnp.sum(y**2)
  params = bj.BilevelParams(jnp.ones(2), jnp.zeros(2))
  case = Case(bj.BilevelProblem(square, square), 1, params)
  solver = solver_of(method, case)
  return solver if measured else bj.evaluation.unmeasured(solver), params


def _call(method, measured, context):
  """A call of a solver against one of `optax.sgd`."""
  (solver, params), sgd = tiny(method, measured=measured), optax.sgd(RATE)
  batch = {'lower': jnp.int32(0)} if method == 'saba' else None
  return measure.compare(
    _in_python(solver.update, batch, solver.init(params), params),
    _in_python(sgd.update, params, sgd.init(params), params),
    context,
  )


def _compiling(context):
  """Compiling a step with MoCo, against that of a step of one loss."""
  params = {'w': jnp.ones((8, 4)), 'b': jnp.zeros(4)}
  batch = jnp.ones((16, 8))

  def losses(p, batch):
    out = jnp.tanh(batch @ p['w'] + p['b'])
    return jnp.stack([jnp.mean((out - 1) ** 2), jnp.mean((out + 1) ** 2)])

  adam = optax.adam(1e-3)
  moco = bj.aggregators.moco(2, tracking=0.1, weight_step=0.1)
  one_loss = lambda p, batch: jnp.sum(losses(p, batch))

  def compiles(*links):
    solver = optax.chain(*links, adam)
    state = solver.init(params)

    def run(times):
      for _ in range(times):
        jax.clear_caches()
        jax.jit(solver.update).lower(batch, state, params).compile()

    return run

  return measure.compare(
    compiles(bj.multi_objective(losses, 2), moco),
    compiles(bj.gradient(one_loss)),
    context,
    steps=1,
  )


def _sequences(inner, width):
  mix = jax.random.normal(jax.random.key(0), (width, width)) / 100
  names = [f'y{n}' for n in range(inner)]
  follow = lambda n: lambda z, batch: mix @ z[n - 1] + batch - z[n]
  moves = {name: follow(n) for n, name in enumerate(names)}
  solver = bj.stsa(moves, steps=0.1)
  params = bj.sequences(**{name: jnp.full(width, 0.1) for name in names})
  return measure.solver_program(solver, params, jnp.zeros(width))


def _clients(count, size):
  """A step of AiPOD for clients that agree on both variables."""
  targets = jax.random.normal(jax.random.key(0), (2, count, size))
  one = lambda z, target: jnp.sum((z - target) ** 2 + jnp.cos(z)) / 2
  problem = bj.BilevelProblem(
    lambda x, y, batch: jnp.mean(jax.vmap(one)(y, batch[0])),
    lambda x, y, batch: jnp.mean(jax.vmap(one)(y, x + batch[1])),
  )
  agree = bj.projections.consensus_set()
  record = bj.Sequence(optax.sgd(RATE), set=agree)
  solver = bj.aipod(problem, upper=record, lower=record)
  zeros = jnp.zeros((count, size))
  params = bj.BilevelParams(zeros, zeros)
  return measure.solver_program(solver, params, targets)


def _growth(make, sizes, width, context):
  return measure.growth(lambda n: make(n, width), sizes, 4 * context.rounds)


def rows(preset: str) -> Sequence[measure.Row]:
  """The comparisons."""
  small = preset == 'smoke'
  size, batch_size, steps = (10, 4, 10) if small else (100, 64, 1_000)
  partial, comparisons = functools.partial, []
  of = f'{size} + {size} numbers, batch of {batch_size}'

  def add(name, compared, make, *arguments, **bounds):
    comparisons.append(
      measure.Row(name, compared, partial(make, *arguments), bounds)
    )

  for form, bound in BOUND_PEER.items():
    for method in ('soba', 'saba', 'sustain', 'stocbio'):
      scan = steps if form == 'factorised' or small else 128
      add(
        f'coupled/benchmark_bilevel/{form}/{method}',
        f'{method}, {form}, {of} / benchmark_bilevel',
        *(_peer, method, form, size, batch_size, scan),
        wall=bound,
      )
  for method in ('soba', 'saba', 'f2sa', 'stocbio'):
    name, compared = f'coupled/by_hand/{method}', f'{method} / by hand'
    of_hand = (_by_hand, method, size, batch_size)
    add(name, compared, *of_hand, flops=BOUND_FLOPS)
  for method in ('v_pbgd', 'soba', 'saba', 'stocbio'):
    arguments = method, size, batch_size, steps
    what = f'{method}, {steps:,} steps in a scan'
    add(
      f'scan/{method}', f'{what} / by hand', _scan, *arguments, cpu=BOUND_SCAN
    )
    what = f'{what} / as many calls by hand'
    add(f'loop/{method}', what, _loop, *arguments, cpu=BOUND_SCAN)
  for method in ('v_pbgd', 'soba', 'saba', 'stocbio'):
    bounds = {'wall': BOUND_CALL} if method == 'v_pbgd' else {}
    what = f'a call of {method} / of optax.sgd'
    add(f'call/{method}', what, _call, method, True, **bounds)
    what = f'a call of {method} without its losses / of optax.sgd'
    add(f'call/{method}/unmeasured', what, _call, method, False, **bounds)
  what = 'compiling moco with Adam / one loss with Adam'
  add('compile/moco', what, _compiling, wall=BOUND_COMPILE)
  for name, make, counts, width in (
    ('sequences', _sequences, (2, 4, 8, 16, 32), 300),
    ('clients', _clients, (4, 16, 64, 256), 1_000),
  ):
    counts = counts[:2] if small else counts
    add(
      f'growth/{name}',
      f'{name}, {counts[0]} to {counts[-1]}',
      *(_growth, make, counts, width),
      time_exponent=BOUND_GROWTH,
    )
  return comparisons
