"""Time before the first step: imports, tracing, compiling.

Comparisons:

- the first step of each solver / of Adam on one loss, traced and compiled each
  time, without the persistent cache;
- `import bilevel_jax` / `import jax, optax`, in new processes;
- a smoke run with a warm compilation cache / with an empty one, in new
  processes.
"""

import functools
import inspect
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.benchmarks import measure

BOUND_FIRST, BOUND_WARM = 2.5, 0.4
ROOT = pathlib.Path(__file__).parents[2]
SMOKE = 'experiments.pbgd.toy'
RECORDS = {'upper', 'lower', 'linear', 'value'}
# Arguments of solvers, except for the problem and the sequences.
NUMBERS: dict[str, Any] = {
  'averaging': 0.5,
  'decay': 0.5,
  'index': lambda batch: jnp.int32(0),
  'inner_steps': 2,
  'key': 0,
  'least_curvature': 0.1,
  'objectives': 2,
  'order': 2,
  'parts': 1,
  'penalty': 2.0,
  'period': 2,
  'proximity': 0.5,
  'step': 0.1,
  'step_size': 0.3,
  'steps': 2,
  'terms': 2,
  'tracking': 0.5,
  'value_rate': 0.3,
}


def problem() -> tuple[bj.BilevelProblem, bj.BilevelParams, Any]:
  """Makes a small perceptron with weighted rows."""
  keys = jax.random.split(jax.random.key(0), 3)
  images = jax.random.normal(keys[0], (16, 8))
  params = bj.BilevelParams(
    jnp.zeros(16),
    {'w': jax.random.normal(keys[1], (8, 4)), 'b': jnp.zeros(4)},
  )

  def errors(y, batch):
    return jnp.sum((jnp.tanh(batch @ y['w'] + y['b']) - 0.5) ** 2, axis=1)

  def lower(x, y, batch):
    decay = sum(jnp.sum(z**2) for z in jax.tree.leaves(y))
    return jnp.mean(jax.nn.sigmoid(x) * errors(y, batch)) + decay / 2

  upper = lambda x, y, batch: jnp.mean(errors(y, batch)) + jnp.mean(x**2)
  return bj.BilevelProblem(upper, lower), params, images


def solvers() -> dict[str, Callable[[], Any]]:
  """Returns a maker of each solver of a bilevel problem."""
  nested, _, _ = problem()
  sgd = optax.sgd(0.1)

  def maker(name):
    call = getattr(bj.solvers, name)
    parameters = inspect.signature(call).parameters
    if name == 't_rhg':
      return functools.partial(
        call, nested, upper=sgd, lower=bj.Sequence(sgd, steps=2), truncate=1
      )
    if name == 'lv_hba':
      below = bj.projections.Joint(lambda pair: pair, ('upper',))
      return functools.partial(
        *(call, nested, lambda x, y: jnp.sum(y['b']) - 1.0),
        upper=sgd,
        value=sgd,
        multipliers=bj.solvers.Multipliers(sgd, sgd),
        penalty=2.0,
        lower=bj.Sequence(sgd, set=below),
      )
    problem, records = nested, dict.fromkeys(RECORDS, sgd)
    if name == 'v_pbsgd':
      records['value'] = bj.solvers.RandomStop(0.1, steps=2, key=0)
    if 'objectives' in parameters:
      two = lambda x, y, batch: nested.upper(x, y, batch) * jnp.ones(2)
      problem = bj.BilevelProblem(two, nested.lower)
    required = {
      n
      for n, p in parameters.items()
      if p.default is p.empty or n in ('key', 'terms')
    }
    known = {**records, **NUMBERS}
    needed = {n: known[n] for n in required & set(known)}
    return functools.partial(call, problem, **needed)

  return {
    name: maker(name)
    for name in bj.solvers.__all__
    if 'problem' in inspect.signature(getattr(bj.solvers, name)).parameters
  }


def first_step(solver: Any, params: Any, batch: Any) -> measure.Run:
  """Makes a run that always compiles the step again."""

  def run(times):
    for _ in range(times):
      jax.clear_caches()
      state = solver.init(params)
      step = jax.jit(measure.solver_step(solver))
      jax.block_until_ready(step((params, state), batch))

  return run


def _first(name, context):
  """Compares the first step of a solver with Adam's."""
  nested, params, batch = problem()
  loss = lambda p, b: nested.upper(*p, b) + nested.lower(*p, b)
  adam = optax.chain(bj.gradient(loss), optax.adam(1e-3))
  measured, peer = (
    first_step(one, params, batch) for one in (solvers()[name](), adam)
  )
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    return measure.compare(measured, peer, context, **context.few())
  finally:
    jax.config.update('jax_enable_compilation_cache', cached)


def in_process(command: Sequence[str], **environment: str) -> measure.Run:
  """Makes a run of a command that returns its wall and CPU seconds."""

  def run(times):
    wall, before = time.perf_counter(), _children()
    for _ in range(times):
      done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
      )
      if done.returncode not in (0, 1):  # 1: a claim of a smoke run fails.
        raise RuntimeError(f'{command}: {done.stderr[-200:]}')
    return time.perf_counter() - wall, _children() - before

  return run


def _children():
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def _import(context):
  measured = in_process(['-c', 'import bilevel_jax'])
  return measure.compare(
    measured, in_process(['-c', 'import jax, optax']), context, steps=1
  )


def _warm_cache(context):
  """Compares a smoke run with a warm cache with one with an empty cache."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    runs = iter(range(1_000))

    def smoke(cache):
      command = ['-m', SMOKE, '--preset=smoke']
      command.append(f'--workdir={folder / str(next(runs))}')
      return in_process(
        command,
        JAX_COMPILATION_CACHE_DIR=str(cache),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='-1',
      )(1)

    warm = lambda _: smoke(folder / 'cache')
    cold = lambda _: smoke(folder / f'empty{next(runs)}')
    return measure.compare(warm, cold, context, **context.few())


def rows(preset: str) -> Sequence[measure.Row]:
  """Returns the comparisons."""
  every = measure.Rows()
  for name in solvers():
    what = f'first step of {name} / of Adam'
    every.add(f'first_step/{name}', what, _first, name, cpu=BOUND_FIRST)
  every.add('import', 'import bilevel_jax / jax and optax', _import)
  if preset != 'smoke':
    what = f'{SMOKE}, smoke, with a warm compilation cache / an empty one'
    every.add('warm_cache', what, _warm_cache, cpu=BOUND_WARM)
  return every
