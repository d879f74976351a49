"""Steps of coupled sequences on small problems, where overhead shows.

The problems are quadratics with 100 + 100 variables and batches of 64 samples,
whose Hessians are dense or have rank one; values are random, since the cost
does not depend on them. Comparisons:

- a scan of steps / solvers of benchmark_bilevel, which also draw batches and
  schedules inside of the scan;
- SOBA, SABA, F2SA and stocBiO / the same step by hand: operations, and time in
  a scan; a scan / calls of the step by hand;
- a call of a compiled `solver.update` on two variables of two numbers /
  `optax.sgd` on their gradients: each leaf of a state costs time per call;
- compiling MoCo on two losses with Adam / one loss with Adam;
- growth with the number of sequences and of clients.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.benchmarks import environment, measure
from experiments.benchmarks.coupled_steps import (
  RATE,
  epochs,
  hand_pair,
  make_case,
  make_solver,
  tiny,
)

BOUND_FLOPS, BOUND_GROWTH = 1.02, 1.1
BOUND_PEER = {'dense': 0.9, 'factorised': 1.0}
BOUND_SCAN, BOUND_CALL, BOUND_COMPILE = 1.0, 1.5, 2.0


def _peer(method, form, size, batch_size, steps, context):
  """Compares a scan of our steps with one of benchmark_bilevel."""
  context.peers.require('jax')
  folder = str(environment.repository('benchmark_bilevel'))
  case = make_case(size, batch_size, form)
  measured = epochs(case, make_solver(method, case), steps)
  arguments = {'folder': folder, 'solver': method, 'form': form, 'size': size}
  arguments |= {'batch_size': batch_size, 'steps': steps}
  with context.peers.process(
    'jax_steps', 'bilevel_benchmark', **arguments
  ) as peer:
    return measure.compare(measured, peer.run, context)


def _by_hand(method, size, batch_size, context):
  case = make_case(size, batch_size)
  return measure.compare(*hand_pair(method, case), context)


def _scan(method, size, batch_size, steps, context):
  """Compares a scan of the library's steps with one of steps by hand."""
  pair = hand_pair(method, make_case(size, batch_size), steps)
  numbers = measure.compare(*pair, context)
  numbers.pop('flops')  # The compiler counts the body of a loop once.
  return numbers


def _loop(method, size, batch_size, steps, context):
  """Compares a scan of steps with as many calls of the step by hand."""
  case = make_case(size, batch_size)
  many, (_, one) = hand_pair(method, case, steps)[0], hand_pair(method, case)
  return measure.compare(
    many.run, lambda count: one.run(steps * count), context
  )


def _in_python(
  update: Any, arguments: Any, state: Any, params: Any
) -> measure.Run:
  """Makes a run of calls of a compiled update from Python."""
  step = jax.jit(update)

  def run(calls):
    current = state
    for _ in range(calls):
      updates, current = step(arguments, current, params)
    jax.block_until_ready((updates, current))

  return run


def _call(method, measured, context):
  """Compares a call of a solver with one of `optax.sgd`."""
  (solver, params), sgd = tiny(method, measured=measured), optax.sgd(RATE)
  batch = {'lower': jnp.int32(0)} if method == 'saba' else None
  return measure.compare(
    _in_python(solver.update, batch, solver.init(params), params),
    _in_python(sgd.update, params, sgd.init(params), params),
    context,
  )


def _compiling(context):
  """Compares compiling a step with MoCo with that of a step on one loss."""
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
  """Compiles a step of AiPOD for clients with consensus on both variables."""
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
  """Returns the comparisons."""
  small = preset == 'smoke'
  size, batch_size, steps = (10, 4, 10) if small else (100, 64, 1_000)
  every = measure.Rows()
  of = f'{size} + {size} numbers, batch of {batch_size}'

  for form, bound in BOUND_PEER.items():
    for method in ('soba', 'saba', 'sustain', 'stocbio'):
      scan = steps if form == 'factorised' or small else 128
      every.add(
        f'coupled/benchmark_bilevel/{form}/{method}',
        f'{method}, {form}, {of} / benchmark_bilevel',
        *(_peer, method, form, size, batch_size, scan),
        wall=bound,
      )
  for method in ('soba', 'saba', 'f2sa', 'stocbio'):
    name, compared = f'coupled/by_hand/{method}', f'{method} / by hand'
    of_hand = (_by_hand, method, size, batch_size)
    every.add(name, compared, *of_hand, flops=BOUND_FLOPS)
  for method in ('v_pbgd', 'soba', 'saba', 'stocbio'):
    arguments = method, size, batch_size, steps
    what = f'{method}, {steps:,} steps in a scan'
    every.add(
      f'scan/{method}', f'{what} / by hand', _scan, *arguments, cpu=BOUND_SCAN
    )
    what = f'{what} / as many calls by hand'
    every.add(f'loop/{method}', what, _loop, *arguments, cpu=BOUND_SCAN)
  for method in ('v_pbgd', 'soba', 'saba', 'stocbio'):
    bounds = {'wall': BOUND_CALL} if method == 'v_pbgd' else {}
    what = f'a call of {method} / of optax.sgd'
    every.add(f'call/{method}', what, _call, method, True, **bounds)
    what = f'a call of {method} without its losses / of optax.sgd'
    name = f'call/{method}/unmeasured'
    every.add(name, what, _call, method, False, **bounds)
  what = 'compiling moco with Adam / one loss with Adam'
  every.add('compile/moco', what, _compiling, wall=BOUND_COMPILE)
  for name, make, counts, width in (
    ('sequences', _sequences, (2, 4, 8, 16, 32), 300),
    ('clients', _clients, (4, 16, 64, 256), 1_000),
  ):
    counts = counts[:2] if small else counts
    every.add(
      f'growth/{name}',
      f'{name}, {counts[0]} to {counts[-1]}',
      *(_growth, make, counts, width),
      time_exponent=BOUND_GROWTH,
    )
  return every
