"""What is measured of models beside losses: refusals, and memory."""

from typing import Any

import jax

from experiments.lm import generation
from experiments.lm.refusals import refusal_rate
from experiments.xright import methods
from experiments.xright import problem as problem_lib


def refusals(
  problem: problem_lib.Problem, settings: Any, models: dict[Any, Any]
) -> dict[Any, float]:
  """The share of held-out prompts that models decline, greedily answered.

  Args:
    problem: the problem.
    settings: how many prompts, and how long answers are.
    models: what was trained, by any key.
  """
  made = generation.make_generator(
    problem.model.config,
    new=settings.answers.answer_length,
    end=problem.words.end,
    dtype=settings.compute_dtype,
  )
  found = {}
  for key, trained in models.items():
    texts = generation.answers(
      problem.words,
      made,
      problem.tuning.merged(trained, problem.model.params),
      problem.prompts[: settings.answers.prompts],
      key=jax.random.key(0),
      buckets=settings.rows.buckets,
    )
    found[key] = refusal_rate(texts)
  return found


def memory(
  problem: problem_lib.Problem, settings: Any, method: str, optima: Any
) -> float:
  """What an update takes beside its arguments, MB, by the compiler."""
  solver = lambda given, frozen: methods.oracle(
    method,
    problem.losses(given['train'], frozen, jax.random.key(0)),
    settings.plan(0.5, optima),
    key=jax.random.key(0),
  )

  def update(trained, state, given, frozen):
    batch = methods.batch(method, 0, given['refresh'])
    return solver(given, frozen).update(batch, state, trained)

  def start(given, frozen):
    trained = problem.tuning.init(frozen, jax.random.key(0))
    return trained, solver(given, frozen).init(trained)

  # The state is an argument: of a known one, the branch that is not taken
  # would be left out by the compiler.
  given = problem.tables, problem.frozen
  trained, state = jax.eval_shape(start, *given)
  compiled = jax.jit(update).lower(trained, state, *given).compile()
  return compiled.memory_analysis().temp_size_in_bytes / 1e6
