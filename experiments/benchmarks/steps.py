"""What small steps cost beside the same by hand, and what compiling costs.

    python -m experiments.benchmarks.steps

Expected: at most the bounds below. Time: some minutes on 2 cores.

Where a problem is small, what is around the mathematics shows. Three questions:

1. Is a step slower than the same in plain jax? V-PBGD, SOBA, SABA and stocBiO
   on quadratics of samples of rank one, a thousand steps in a `lax.scan`,
   against the step by hand with the losses of its last evaluations (see
   `coupled`). Bound: 1.0 times the wall time.
2. What does a call from Python cost? One compiled `solver.update` in a loop,
   on variables of two numbers each, against `optax.sgd` on their gradients:
   no less than one argument and result for each of the leaves of a state is to
   hand over. Bound: 2.5 times.
3. How long does MoCo take to compile? Two losses, with Adam, against one loss
   with Adam. Bound: 2 times.

Programs take turns in one process, in short turns, because the times are short;
medians with their range, see `measure`. On a busy machine compare the CPU
ratio.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import coupled, measure

BOUND_SCAN, BOUND_CALL, BOUND_COMPILE = 1.0, 2.5, 2.0
# Of one turn.
SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    scanned: methods whose steps are compared with the same by hand.
    called: methods whose calls are compared with those of `optax.sgd`.
    size: dimension of each variable in the first comparison.
    batch_size: samples in a batch there.
    steps: steps in one scan.
    rounds: pairs of timings of each comparison.
    compilations: of each of the two programs.
  """

  scanned: tuple[str, ...] = ('v_pbgd', 'soba', 'saba', 'stocbio')
  called: tuple[str, ...] = ('v_pbgd', 'soba', 'stocbio')
  size: int = 100
  batch_size: int = 64
  steps: int = 1_000
  rounds: int = 41
  compilations: int = 7


PRESETS = {
  'paper': Settings(),
  'quick': Settings(rounds=11, compilations=3),
}


def scanned(step: Callable[[Any, Any], Any], steps: int) -> Any:
  """So many steps as one."""

  def many(carry, batch):
    body = lambda carry, _: (step(carry, batch), None)
    return jax.lax.scan(body, carry, length=steps)[0]

  return many


def in_a_scan(method: str, settings: Settings) -> measure.Ratio:
  """Times of scans, the library's over those by hand."""
  made = coupled.make_case(settings.size, settings.batch_size)
  batch = {'upper': jnp.int32(0), 'lower': jnp.int32(1)}
  solver = coupled.solver_of(method, made)
  ours = (made.start, solver.init(made.start))
  hand, theirs = coupled.by_hand(method, made)
  many = functools.partial(scanned, steps=settings.steps)
  return measure.time_ratio(
    measure.Program(many(coupled.step_of(solver)), ours, batch).run,
    measure.Program(many(hand), theirs, batch).run,
    rounds=settings.rounds,
    seconds=SECONDS,
  )


def in_python(update: Any, given: Any, state: Any, params: Any) -> Any:
  """A function that calls a compiled update so many times, and waits."""
  step = jax.jit(update)

  def run(calls: int) -> None:
    held = state
    for _ in range(calls):
      updates, held = step(given, held, params)
    jax.block_until_ready((updates, held))

  return run


def by_call(method: str, settings: Settings) -> measure.Ratio:
  """Times of a call from Python, a solver's over that of `optax.sgd`."""
  square = lambda x, y, batch: jnp.sum((x - y) ** 2) + jnp.sum(y**2)
  params = bj.BilevelParams(jnp.ones(2), jnp.zeros(2))
  case = coupled.Case(bj.BilevelProblem(square, square), 1, params)
  solver = coupled.solver_of(method, case)
  sgd = optax.sgd(coupled.RATE)
  return measure.time_ratio(
    in_python(solver.update, None, solver.init(params), params),
    in_python(sgd.update, params, sgd.init(params), params),
    rounds=settings.rounds,
    seconds=SECONDS,
  )


def compiling(settings: Settings) -> measure.Ratio:
  """Times of compiling a step with MoCo, over that of a step of one loss."""
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

    def run(times: int) -> None:
      for _ in range(times):
        jax.clear_caches()
        jax.jit(solver.update).lower(batch, state, params).compile()

    return run

  return measure.time_ratio(
    compiles(bj.multi_objective(losses, 2), moco),
    compiles(bj.gradient(one_loss)),
    rounds=settings.compilations,
    seconds=0.0,
  )


def main(options: harness.Options) -> None:
  """Runs the comparisons, prints them and writes them down."""
  start = time.perf_counter()
  settings = options.settings
  metrics: dict[str, float] = {}
  rows = []

  def add(what, name, ratio, bound, steps=1):
    metrics[name] = ratio.wall
    metrics[f'{name}/cpu'] = ratio.cpu
    verdict = measure.judge(ratio.wall, ratio.low, ratio.high, bound)
    pair = (ratio.seconds, ratio.base_seconds)
    rows.append(
      {
        'compared': what,
        'wall (range)': str(ratio),
        'CPU': f'{ratio.cpu:.3f}',
        'us': ' / '.join(f'{1e6 * one / steps:.1f}' for one in pair),
        'bound': f'<= {bound}: {verdict}',
      }
    )

  for method in settings.scanned:
    what, name = f'{method} in a scan / by hand', f'scan/{method}'
    add(what, name, in_a_scan(method, settings), BOUND_SCAN, settings.steps)
  for method in settings.called:
    what, name = f'{method} by call / optax.sgd', f'call/{method}'
    add(what, name, by_call(method, settings), BOUND_CALL)
  what = 'compiling moco / one loss, with Adam'
  add(what, 'compile/moco', compiling(settings), BOUND_COMPILE)
  harness.write_table(options.workdir, rows)
  harness.write_results(
    options, metrics=metrics, seconds=time.perf_counter() - start
  )


STUDY = harness.Study(main, PRESETS, paper='benchmarks', binary='steps')


if __name__ == '__main__':
  harness.run(STUDY)
