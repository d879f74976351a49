"""Runs a method of the bilevel comparison for a budget of calls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import comparison
from experiments.stsa import methods, zoo_problem

# SUSTAIN with and without its correction, apart from the comparison.
CORRECTION = {
  'correction/sustain': methods.METHODS['sustain'],
  'correction/plain': methods.without_correction,
}
# Settings that no single run depends on.
COMPARISON_SETTINGS = (
  *('methods', 'grid', 'table.names', 'table.targets', 'table.header'),
  'digits.corruptions',
)
WARM = 0.02  # Fraction of a run before step sizes decay.


def train(
  settings: Any, problem: zoo_problem.Problem, job: comparison.Job
) -> harness.Trained:
  """Runs all members of a job for the method's budget of calls.

  Tuning runs one seed at a time, so that all points share the reads of each
  batch; this takes a tenth of the time.

  Args:
    settings: settings of the binary.
    problem: problem of the comparison.
    job: job with the hyperparameters `step`, `ratio` and `exponent`.

  Returns:
    The run, with records of the problem's measures and `calls`.
  """
  run = _runner(settings, problem, job.method, job.tuning)
  if not job.tuning:
    return run(job)
  parts, seeds = {}, np.array(job.seeds)
  for seed in sorted(set(job.seeds)):
    members = seeds == seed
    one = job._replace(
      name=f'{job.name}/seed{seed}',
      seeds=(seed,) * int(members.sum()),
      hyper={name: values[members] for name, values in job.hyper.items()},
    )
    parts[seed] = run(one)
  last = parts[seed]
  history = {
    name: np.zeros((len(last.steps), len(seeds))) for name in last.history
  }
  for seed, part in parts.items():
    for name, values in part.history.items():
      history[name][:, seeds == seed] = values
  return last._replace(history=history)


def _runner(settings, problem, method, tuning):
  """Makes a function that runs jobs of a method with one program."""
  size = problem.lower_size
  kind = 'sustain' if method in CORRECTION else method
  make = (methods.METHODS | CORRECTION)[method]
  small = settings.problem == 'quadratic'
  calls = settings.calls if small else settings.data_calls
  steps = calls / methods.expected_calls(kind, size)
  chunk = max(1, round(steps / settings.records))
  steps = chunk * settings.records

  def solver(context):
    hyper = context.hyper

    def schedule(count):
      done = jnp.asarray(count, jnp.float32) / (WARM * steps)
      return hyper['step'] * (1 + done) ** -hyper['exponent']

    ratio = problem.upper_scale * hyper['ratio']
    return make(
      methods.Arguments(
        problem=problem.losses,
        lower=schedule,
        upper=lambda count: ratio * schedule(count),
        series=methods.SERIES,
        batches=problem.batches,
        curvature=problem.curvature,
        progress=lambda count: jnp.minimum(count / steps, 1.0),
      )
    )

  def batch(context):
    key = context.key
    if tuning:
      # Drawn once for all members, without a mapped seed.
      seed_key = jax.random.key(context.data['seed'])
      key = jax.random.fold_in(seed_key, context.step)
    above, below = jax.random.randint(
      key,
      (2, methods.DRAWS + 1),
      0,
      jnp.array(problem.batches)[:, None],
    )
    return {
      'upper': above[0],
      'lower': below[0],
      'upper_more': above[1:],
      'lower_more': below[1:],
      'data': context.data['problem'],
    }

  def evaluate(context, params, state):
    calls = methods.count_calls(bj.counts(state), size)
    metrics = problem.measure(params, context.data['problem'])
    return metrics | {'calls': calls}

  def init(context):
    return problem.start(context.seed_key)

  def run(job):
    return harness.train(
      solver,
      harness.Task(
        init,
        batch,
        data={'problem': problem.data, 'seed': np.uint32(job.seeds[0])},
        shard=False,
        hyper=job.hyper,
      ),
      job.training(steps, chunk),
      # Reported runs record the start, for the reduction.
      harness.Measure(evaluate, record_start=not tuning),
    )

  return run
