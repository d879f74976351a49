"""Steps of SEAL, which selects rows for fine-tuning of language models.

Comparisons: a step with half of the rows to rank and half of them safe /
fine-tuning on all of these rows; and an update of the selector among many rows
/ among few.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments.benchmarks import measure
from experiments.benchmarks.lm import RATE, SMALL, TINY, Sizes
from experiments.lm import decoder, tuning

BOUND_STEP, BOUND_MEMORY, BOUND_SCORES = 1.15, 1.2, 1.5


def step_programs(sizes: Sizes, few: int = 1_000) -> dict[str, measure.Program]:
  """Compiles steps of fine-tuning and of both forms of SEAL."""
  model = tuning.Tuning(sizes.config, rank=sizes.rank)
  weights = decoder.init(sizes.config, 0)
  shape = sizes.rows, sizes.length
  vocabulary = sizes.config.vocabulary
  tokens = np.random.default_rng(0).integers(vocabulary, size=shape)
  mask = np.tile(
    np.arange(sizes.length) >= sizes.length - sizes.answer, (shape[0], 1)
  )
  every = {
    'tokens': jnp.asarray(tokens, jnp.int32),
    'mask': jnp.asarray(mask, jnp.int32),
  }
  half = sizes.rows // 2

  def losses(trained, rows, frozen):
    return -model.answers(trained, frozen, rows, max_answer=sizes.answer).mean

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
      scores=bj.solvers.RowScores(optax.sgd(0.1), few, lambda b: b['index']),
      penalty=1.0,
      lower=optax.adam(RATE),
      value=optax.adam(RATE) if full else None,
    )

  start = model.init(weights, jax.random.key(0))
  programs = {
    'sft': optax.chain(bj.gradient(plain), optax.adam(RATE)),
    'seal': seal(False),
    'seal_full': seal(True),
  }
  return {
    n: measure.solver_program(s, start, batch) for n, s in programs.items()
  }


def selector(rows: int, size: int, *, dense: bool) -> measure.Program:
  """Compiles an update of the selector; the model is one number."""
  if dense:
    loss = lambda scores, b: jnp.mean(rows * jax.nn.softmax(scores)[b] * 1.5)
    solver = optax.chain(bj.gradient(loss), optax.adam(RATE))
    start = jnp.zeros(rows)
  else:
    solver = bj.solvers.seal(
      lambda y, b: y**2,
      lambda y, b: 1.5 + 0.0 * b + y,
      scores=bj.solvers.RowScores(optax.sgd(RATE), rows, lambda b: b),
      penalty=1.0,
      lower=optax.sgd(RATE),
    )
    start = jnp.float32(0.0)
  at = jnp.asarray(np.random.default_rng(0).permutation(rows)[:size])
  return measure.solver_program(solver, start, at)


def _seal(name, sizes, context):
  programs = step_programs(sizes)
  return measure.compare(programs[name], programs['sft'], context)


def _scores(counts, dense, context):
  few, many = (selector(n, 64, dense=dense) for n in counts)
  return measure.compare(many, few, context)


def rows(preset: str) -> Sequence[measure.Row]:
  """Returns the comparisons."""
  small = preset == 'smoke'
  every = measure.Rows()
  model = TINY | {'hidden_size': 128, 'vocab_size': 2_048}
  sizes = SMALL if small else Sizes(rows=8, model=model)
  for name, bounds in (
    ('seal', {'wall': BOUND_STEP, 'memory': BOUND_MEMORY}),
    ('seal_full', {}),
  ):
    what = f'{name.replace("_", ", ")} / fine-tuning on the same rows'
    every.add(f'seal/step/{name}', what, _seal, name, sizes, **bounds)
  counts = (100, 1_000) if small else (1_000, 1_000_000)
  for name, dense in (('tree', False), ('dense', True)):
    what = f'scores of {counts[1]:,} rows, {name} / {counts[0]:,} rows'
    bounds = {} if dense else {'wall': BOUND_SCORES}
    every.add(f'growth/rows/{name}', what, _scores, counts, dense, **bounds)
  return every
