"""Refusals and conflicts of trained models, and memory of their updates."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from experiments.lm import generation
from experiments.lm.refusals import refusal_rate
from experiments.xright import methods
from experiments.xright import problem as problem_lib


def refusals(
  problem: problem_lib.Problem, settings: Any, models: dict[Any, Any]
) -> dict[Any, float]:
  """Fraction of held-out prompts that each model refuses, by greedy answers.

  Args:
    problem: the problem.
    settings: with the number of prompts and the length of answers.
    models: trained weights by any key.
  """
  generate = generation.make_generator(
    problem.model.config,
    new=settings.answers.answer_length,
    end=problem.tokenizer.end,
    dtype=settings.compute_dtype,
  )
  rates = {}
  for key, trained in models.items():
    texts = generation.answers(
      problem.tokenizer,
      generate,
      problem.tuning.merged(trained, problem.model.params),
      problem.prompts[: settings.answers.prompts],
      key=jax.random.key(0),
      buckets=settings.rows.buckets,
    )
    rates[key] = refusal_rate(texts)
  return rates


def cosines(
  problem: problem_lib.Problem, models: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Computes the cosine between the gradients of both objectives.

  Args:
    problem: the problem; gradients are of the losses on its rows for tuning.
    models: trained weights by name, with a leading axis of seeds.

  Returns:
    Cosines by name, (seeds,), and that of the untrained model as `start`.
    Negative: a step on one objective raises the loss of the other one.
  """
  start = problem.tuning.init(problem.frozen, jax.random.key(0))
  every = {'start': jax.tree.map(lambda leaf: leaf[None], start), **models}
  stacked = jax.tree.map(
    lambda *leaves: np.concatenate(leaves), *every.values()
  )

  @jax.jit
  def compute(stacked, frozen, rows):
    def gradient(trained, name):
      loss = lambda t: problem_lib.measure(
        problem, t, frozen, {name: rows[name]}
      )[name]
      return jax.grad(loss)(trained)

    def one(trained):
      first, second = (gradient(trained, name) for name in problem.names)
      norms = optax.tree.norm(first) * optax.tree.norm(second)
      return optax.tree.vdot(first, second) / norms

    return jax.lax.map(one, stacked)

  values = compute(stacked, problem.frozen, problem.tables['refresh'])
  sizes = [len(jax.tree.leaves(trained)[0]) for trained in every.values()]
  parts = np.split(np.asarray(values), np.cumsum(sizes)[:-1])
  return dict(zip(every, parts, strict=True))


def memory(
  problem: problem_lib.Problem, settings: Any, method: str, optima: Any
) -> float:
  """Temporary memory of a compiled update, MB."""
  solver = lambda tables, frozen: methods.oracle(
    method,
    problem.losses(tables['train'], frozen, jax.random.key(0)),
    settings.plan(0.5, optima),
    key=jax.random.key(0),
  )

  def update(trained, state, tables, frozen):
    batch = methods.batch(method, 0, tables['refresh'])
    return solver(tables, frozen).update(batch, state, trained)

  def start(tables, frozen):
    trained = problem.tuning.init(frozen, jax.random.key(0))
    return trained, solver(tables, frozen).init(trained)

  # The state is an argument: with a constant one the compiler would remove the
  # branches that are not taken.
  data = problem.tables, problem.frozen
  trained, state = jax.eval_shape(start, *data)
  compiled = jax.jit(update).lower(trained, state, *data).compile()
  return compiled.memory_analysis().temp_size_in_bytes / 1e6
