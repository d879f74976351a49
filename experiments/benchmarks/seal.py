"""What a step of SEAL costs beside fine-tuning, and a score among a million.

    python -m experiments.benchmarks.seal

Expected: level with a step of fine-tuning on the same tokens, in operations and
in memory; a score's update among 10^6 rows exceeds its bound of 1.5 times that
among 10^3: the tree of partial sums has two more levels.
Time: 2 minutes on 2 cores.

Two questions, of a decoder with random weights, since cost does not depend on
their values:

1. Does a SEAL step (half of the rows to rank, half safe) cost more than a step
   of fine-tuning on all of these rows? Bounds: 1.15 times the time, 1.2 times
   the memory. The form with the third sequence is shown beside it, unbounded.
2. Does the selector's update grow with the number of rows? Bound: 1.5 times the
   time from 10^3 to 10^6 rows. Adam on all scores at once is shown for
   comparison.

Operations and memory are the compiler's counts. Times are medians of paired
ratios with their range, see `measure`.
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
from experiments.lm import config as config_lib
from experiments.lm import decoder, tuning

TIME_BOUND, MEMORY_BOUND, GROWTH_BOUND = 1.15, 1.2, 1.5


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    width: of the decoder.
    layers: of it, all with adapters.
    vocabulary: tokens.
    rows: of a step, half of them safe.
    length: tokens of a row.
    rounds: pairs of timings of each comparison.
    few: rows of the small table of scores.
    many: of the large one.
    batch_size: rows of a step, for the selector alone.
  """

  width: int = 128
  layers: int = 4
  vocabulary: int = 2_048
  rows: int = 8
  length: int = 64
  rounds: int = 5
  few: int = 1_000
  many: int = 1_000_000
  batch_size: int = 64


PRESETS = {'paper': Settings()}


def subject(settings: Settings) -> tuple[tuning.Tuning, Any, dict[str, Any]]:
  """A decoder, its weights, and rows of which the last half is the answer."""
  config = config_lib.Config(
    family='llama',
    layers=settings.layers,
    width=settings.width,
    hidden=3 * settings.width,
    heads=4,
    kv_heads=2,
    head_width=settings.width // 4,
    vocabulary=settings.vocabulary,
    rope_base=1e4,
    norm_epsilon=1e-5,
    tied=True,
  )
  shape = settings.rows, settings.length
  tokens = np.random.default_rng(0).integers(settings.vocabulary, size=shape)
  mask = np.tile(
    np.arange(settings.length) >= settings.length // 2, (shape[0], 1)
  )
  rows = {'tokens': jnp.asarray(tokens, jnp.int32)}
  rows['mask'] = jnp.asarray(mask, jnp.int32)
  return tuning.Tuning(config, rank=8), decoder.init(config, 0), rows


def programs(settings: Settings) -> dict[str, measure.Program]:
  """A step of fine-tuning and of both forms of SEAL, on the same rows."""
  how, weights, every = subject(settings)
  half = settings.rows // 2
  longest = settings.length // 2

  def losses(trained, rows, frozen):
    return -how.answers(trained, frozen, rows, longest=longest).mean

  parts = [
    {n: leaf[at] for n, leaf in every.items()}
    for at in (slice(None, half), slice(half, None))
  ]
  batch = {
    'rows': parts[0],
    'safe': parts[1],
    'all': every,
    'index': jnp.arange(half),
    'frozen': weights,
  }
  plain = lambda y, b: jnp.mean(losses(y, b['all'], b['frozen']))

  def seal(full):
    return bj.solvers.seal(
      lambda y, b: jnp.mean(losses(y, b['safe'], b['frozen'])),
      lambda y, b: losses(y, b['rows'], b['frozen']),
      rows=settings.few,
      index=lambda b: b['index'],
      penalty=1.0,
      selector=optax.sgd(0.1),
      lower=optax.adam(1e-3),
      value=optax.adam(1e-3) if full else None,
    )

  solvers = {
    'sft': optax.chain(bj.gradient(plain), optax.adam(1e-3)),
    'seal': seal(False),
    'seal_full': seal(True),
  }
  start = how.init(weights, jax.random.key(0))
  made = {}
  for name, solver in solvers.items():

    def step(carry, batch, solver=solver):
      params, state = carry
      updates, state = solver.update(batch, state, params)
      return optax.apply_updates(params, updates), state

    made[name] = measure.Program(step, (start, solver.init(start)), batch)
  return made


def selector(rows: int, size: int, *, dense: bool) -> measure.Program:
  """A step of scores alone: the model is one number."""
  if dense:
    loss = lambda scores, b: jnp.mean(rows * jax.nn.softmax(scores)[b] * 1.5)
    solver = optax.chain(bj.gradient(loss), optax.adam(1e-3))
    start = jnp.zeros(rows)
  else:
    solver = bj.solvers.seal(
      lambda y, b: y**2,
      lambda y, b: 1.5 + 0.0 * b + y,
      rows=rows,
      index=lambda b: b,
      penalty=1.0,
      selector=optax.sgd(1e-3),
      lower=optax.sgd(1e-3),
    )
    start = jnp.float32(0.0)

  def step(carry, batch):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return optax.apply_updates(params, updates), state

  at = jnp.asarray(np.random.default_rng(0).permutation(rows)[:size])
  return measure.Program(step, (start, solver.init(start)), at)


def main(options: harness.Options) -> None:
  """Runs both comparisons and writes a table and results."""
  start = time.monotonic()
  settings = options.settings
  metrics: dict[str, float] = {}
  rows: list[dict[str, Any]] = []

  def put(name, against, ratio, memory, bounds, more=''):
    metrics[f'time_ratio/{name}'] = ratio.wall
    metrics[f'time_ratio/{name}/low'] = ratio.low
    metrics[f'time_ratio/{name}/high'] = ratio.high
    metrics[f'cpu_ratio/{name}'] = ratio.cpu
    metrics[f'memory_ratio/{name}'] = memory
    said = '-'
    if bounds:
      said = measure.judge(ratio.wall, ratio.low, ratio.high, bounds[0])
    rows.append(
      {
        'step': name.replace('_', ' '),
        'against': against,
        'time': str(ratio),
        'processor time': ratio.cpu,
        'memory': memory,
        'operations': more,
        'bound of the time': bounds[0] if bounds else '-',
        'verdict': said,
      }
    )

  steps = programs(settings)
  base = steps['sft']
  for name in ('seal', 'seal_full'):
    one = steps[name]
    ratio = measure.time_ratio(one.run, base.run, rounds=settings.rounds)
    flops = one.flops / base.flops
    metrics[f'flops_ratio/{name}'] = flops
    bounds = (TIME_BOUND,) if name == 'seal' else ()
    put(name, 'fine-tuning', ratio, one.memory / base.memory, bounds, flops)
  sizes = {'few': settings.few, 'many': settings.many}
  for name, dense in (('scores', False), ('scores_by_dense_adam', True)):
    few, many = (
      selector(count, settings.batch_size, dense=dense)
      for count in sizes.values()
    )
    ratio = measure.time_ratio(many.run, few.run, rounds=settings.rounds)
    metrics[f'seconds/{name}/few'] = ratio.base_seconds
    metrics[f'seconds/{name}/many'] = ratio.seconds
    bounds = () if dense else (GROWTH_BOUND,)
    put(name, f'{settings.few:,} rows', ratio, many.memory / few.memory, bounds)
  harness.write_table(options.workdir, rows)
  path = harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'Results: {path}')


STUDY = harness.Study(main, PRESETS, paper='benchmarks', binary='seal')


if __name__ == '__main__':
  harness.run(STUDY)
