"""Memory per device of fine-tuning a large model, without its weights.

A step is lowered and compiled for shapes with shardings, and XLA says how many
bytes each device needs: no array is made. The steps are those of XRIGHT
(ALRIGHT on demonstrations and comparisons) and of SEAL, on the mesh fsdp=8 of
`experiments.lm.sharding`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.lm import batches, decoder, objectives, sharding, tables
from experiments.lm import config as config_lib
from experiments.lm import tuning as tuning_lib

# The published sizes; 24,000 rows as for XRIGHT.
LLAMA_3_8B = config_lib.Config(
  family='llama',
  layers=32,
  width=4096,
  hidden=14336,
  heads=32,
  kv_heads=8,
  head_width=128,
  vocabulary=128256,
  rope_base=5e5,
  norm_epsilon=1e-5,
  tied=False,
  context=8192,
)
RANK = 32
TRAINING_ROWS = 24_000


class Sizes(NamedTuple):
  """The sizes of a batch.

  Attributes:
    rows: rows of each objective.
    length: tokens of a row.
    answer: tokens of the longest answer.
  """

  rows: int = 8
  length: int = 1024
  answer: int = 512


_SIZES = Sizes()


class Step(NamedTuple):
  """A step to compile.

  Attributes:
    run: (trained, state, frozen, batch) -> (trained, state).
    arguments: its arguments, as `jax.ShapeDtypeStruct` with shardings.
  """

  run: Callable[..., Any]
  arguments: tuple[Any, ...]


def _batch(sizes: Sizes, names: tuple[str, ...]) -> tables.Rows:
  """Returns the shapes of rows for an objective."""
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  rows: tables.Rows = {n: ints(sizes.rows, sizes.length) for n in names}
  for name in names:
    rows[batches.mask_name(name)] = rows[name]
    if name != 'tokens':
      total = jax.ShapeDtypeStruct((sizes.rows,), jnp.float32)
      rows[f'reference_{name}_total'] = total
  return rows


def _xright(tuning: tuning_lib.Tuning, sizes: Sizes):
  def make(frozen):
    losses = {}
    for name in ('sft', 'dpo'):
      loss = objectives.make(name, tuning, frozen, objectives.Shape())
      losses[name] = lambda p, rows, loss=loss: loss(p, rows, sizes.answer)
    return optax.chain(
      bj.solvers.alright(
        losses.values(), tuple(losses), weights=(0.5, 0.5), key=0, even=True
      ),
      optax.clip_by_global_norm(1.0),
      optax.adam(5e-5, b1=0.9, b2=0.95),
    )

  batch = {
    'sft': _batch(sizes, ('tokens',)),
    'dpo': _batch(sizes, objectives.PAIR),
  }
  return make, batch


def _seal(tuning: tuning_lib.Tuning, sizes: Sizes):
  def make(frozen):
    losses = lambda y, rows: (
      -tuning.answers(y, frozen, rows, max_answer=sizes.answer).mean
    )
    return bj.solvers.seal(
      lambda y, b: jnp.mean(losses(y, b['safe'])),
      lambda y, b: losses(y, b['rows']),
      scores=bj.solvers.RowScores(
        optax.sgd(1.0), TRAINING_ROWS, lambda b: b['index']
      ),
      penalty=bj.solvers.seal_penalty(1.0, decay=0.03, epoch=3_000),
      lower=optax.adam(2e-4),
    )

  batch = {
    'index': jax.ShapeDtypeStruct((sizes.rows,), jnp.int32),
    'rows': _batch(sizes, ('tokens',)),
    'safe': _batch(sizes, ('tokens',)),
  }
  return make, batch


METHODS = {'XRIGHT': _xright, 'SEAL': _seal}


def abstract_step(
  method: str,
  config: config_lib.Config = LLAMA_3_8B,
  sizes: Sizes = _SIZES,
  *,
  axes: str = 'fsdp=8',
) -> Step:
  """Makes the step of a method for shapes with shardings.

  Args:
    method: name in `METHODS`.
    config: config of the model, whose weights are bfloat16.
    sizes: sizes of a batch.
    axes: mesh over all devices.

  Returns:
    The step, whose state has the optimiser's moments in float32.
  """
  layout, rows = sharding.parse_layout(config, axes)
  tuning = tuning_lib.Tuning(
    config, rank=RANK, remat=True, dtype=jnp.bfloat16, rows=rows
  )
  is_shape = lambda node: isinstance(node, tuple)
  frozen = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16),
    decoder.shapes(config),
    is_leaf=is_shape,
  )
  trained = jax.eval_shape(lambda f: tuning.init(f, jax.random.key(0)), frozen)
  make, batch = METHODS[method](tuning, sizes)
  state = jax.eval_shape(lambda p, f: make(f).init(p), trained, frozen)

  def run(trained, state, frozen, batch):
    updates, state = make(frozen).update(batch, state, trained)
    return bj.apply_updates(trained, updates), state

  def placed(tree, specs):
    return jax.tree.map(
      lambda x, spec: jax.ShapeDtypeStruct(
        x.shape,
        x.dtype,
        sharding=jax.sharding.NamedSharding(layout.mesh, spec),
      ),
      tree,
      specs,
    )

  by_rows = jax.tree.map(lambda _: rows.spec, batch)
  return Step(
    run,
    (
      # The moments have the names of the adapters, and so their shardings.
      *(placed(tree, layout.specs(tree)) for tree in (trained, state, frozen)),
      placed(batch, by_rows),
    ),
  )


def compile_step(step: Step) -> jax.stages.Compiled:
  """Compiles a step, which replaces its params and state."""
  jitted = jax.jit(step.run, donate_argnums=(0, 1))
  return jitted.lower(*step.arguments).compile()


def per_device(step: Step, compiled: jax.stages.Compiled) -> dict[str, float]:
  """Returns the memory of a device by use, GiB."""
  gib = lambda count: count / 2**30

  def count_bytes(tree):
    return sum(
      x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
      for x in jax.tree.leaves(tree)
    )

  analysis = compiled.memory_analysis()
  names = ('adapters', 'state', 'weights', 'batch')
  sizes = {
    n: gib(count_bytes(t)) for n, t in zip(names, step.arguments, strict=True)
  }
  sizes['temporaries'] = gib(analysis.temp_size_in_bytes)
  sizes['total'] = gib(
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
    + analysis.temp_size_in_bytes
  )
  return sizes
