"""One run of one method on a problem, as the binaries do it."""

from typing import Any

import jax
import optax

from experiments import harness
from experiments.lm import objectives
from experiments.xright import methods
from experiments.xright import problem as problem_lib


def run(
  problem: problem_lib.Problem,
  method: str,
  plan: methods.Plan,
  *,
  shape: objectives.Shape,
  rate: float,
  clip: float,
  chunk: int,
  name: str,
  options: harness.Options,
  seeds: Any,
  settings: Any,
  record_start: bool = True,
  layout: harness.Layout | None = None,
) -> harness.Trained:
  """Trains, and measures on the rows that are held out.

  Args:
    problem: the problem.
    method: its name.
    plan: its numbers.
    shape: numbers of the losses.
    rate: of Adam, constant.
    clip: the largest norm of a gradient.
    chunk: steps between two measurements.
    name: of the run.
    options: of the binary.
    seeds: of the adapters, the order of the rows and the coin.
    settings: what tells this run from others in its folder.
    record_start: whether to measure before the first step too.
    layout: how weights lie on a mesh of devices.

  Returns:
    A `Trained`; `history` has the losses on held-out rows as `held_out/NAME`.
  """

  def solver(context):
    key = context.seed_key
    losses = problem.losses(
      context.data['train'], context.frozen, shape, jax.random.fold_in(key, 1)
    )
    return optax.chain(
      methods.oracle(method, losses, plan, key=jax.random.fold_in(key, 2)),
      optax.clip_by_global_norm(clip),
      optax.adam(rate, b1=0.9, b2=0.95),
    )

  def evaluate(context, params, state):
    del state
    found = problem_lib.measure(
      problem, shape, params, context.frozen, context.data['held_out']
    )
    return {f'held_out/{n}': value for n, value in found.items()}

  return harness.train(
    solver,
    lambda context: problem.tuning.init(context.frozen, context.key),
    lambda context: methods.batch(
      method, context.step, context.data['refresh']
    ),
    steps=plan.steps,
    chunk=chunk,
    seeds=seeds,
    workdir=options.workdir,
    name=name,
    data=problem.tables,
    shard=False,
    frozen=problem.frozen,
    layout=layout,
    evaluate=evaluate,
    record_start=record_start,
    # The branch that is not taken is to cost nothing.
    at_once=1,
    settings=settings,
    save_seconds=options.save_seconds,
  )
