"""Runs a method on a problem: its grid on the tuning seed, then the seeds."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.stsa import methods, zoo_problem

TUNING_SEED = 1_000_000


class Zoo:
  """Runs methods on one problem.

  Args:
    options: what the flags say.
    problem: of the comparison.
  """

  def __init__(
    self, options: harness.Options, problem: zoo_problem.Problem
  ) -> None:
    self._settings = settings = options.settings
    self._problem = problem
    self._save_seconds = options.save_seconds
    self._workdir = pathlib.Path(options.workdir) / problem.name
    small = settings.problem == 'quadratic'
    self._calls = settings.calls if small else settings.data_calls

  def tune_and_run(self, method: str) -> tuple[dict, harness.Trained]:
    """The best of the grid on the tuning seed, and its run on the seeds."""
    settings = self._settings
    seeds, grid = harness.members(
      (TUNING_SEED,),
      step=settings.lower_steps,
      ratio=settings.ratios,
      exponent=settings.exponents,
    )
    tuned = self.train(method, f'{method}/tuning', seeds, grid)
    last = tuned.history[self._problem.tune_by][-settings.records // 10 :]
    ends = np.where(np.isfinite(last), last, np.inf).mean(axis=0)
    winner = int(np.argmin(ends))
    chosen = {name: float(values[winner]) for name, values in grid.items()}
    seeds, hyper = harness.members(
      settings.seeds, **{name: (value,) for name, value in chosen.items()}
    )
    return chosen, self.train(method, method, seeds, hyper)

  def train(self, method, name, seeds, hyper, *, make=None):
    """Runs one method for the budget of calls, all members at once."""
    settings, problem = self._settings, self._problem
    size = problem.lower_size
    steps = self._calls / methods.expected_calls(method, size)
    chunk = max(1, round(steps / settings.records))
    steps = chunk * settings.records
    make = make or methods.METHODS[method]

    def solver(hyper):
      def falling(count):
        done = jnp.asarray(count, jnp.float32) / (settings.warm * steps)
        return hyper['step'] * (1 + done) ** -hyper['exponent']

      ratio = problem.upper_scale * hyper['ratio']
      return make(
        methods.Making(
          problem=problem.losses,
          lower=falling,
          upper=lambda count: ratio * falling(count),
          series=settings.series,
          batches=problem.batches,
          curvature=problem.curvature,
          progress=lambda count: jnp.minimum(count / steps, 1.0),
        )
      )

    def batch(context):
      above, below = jax.random.randint(
        context.key,
        (2, methods.DRAWS + 1),
        0,
        jnp.array(problem.batches)[:, None],
      )
      return {
        'upper': above[0],
        'lower': below[0],
        'upper_more': above[1:],
        'lower_more': below[1:],
        'data': context.data,
      }

    def evaluate(context, params, state):
      spent = methods.calls_of(bj.counts(state), size)
      return problem.measure(params, context.data) | {'calls': spent}

    return harness.train(
      solver,
      lambda context: problem.start(context.seed_key),
      batch,
      steps=steps,
      chunk=chunk,
      seeds=seeds,
      workdir=self._workdir,
      save_seconds=self._save_seconds,
      name=name,
      data=problem.data,
      shard=False,
      hyper=hyper,
      evaluate=evaluate,
      record_start=True,
      settings=_settings_of_one_run(settings),
    )

  def correction_gain(self) -> float:
    """How far SUSTAIN ends below itself without the correction."""
    ends = {}
    for name, make in (
      ('sustain', methods.METHODS['sustain']),
      ('plain', methods.without_correction),
    ):
      seeds, hyper = harness.members(
        self._settings.correction_seeds,
        step=(0.3,),
        ratio=(1.0,),
        exponent=(1 / 3,),
      )
      trained = self.train(
        'sustain', f'correction/{name}', seeds, hyper, make=make
      )
      ends[name] = float(trained.history[self._problem.judge_by][-1].mean())
    return ends['plain'] / ends['sustain']


def _settings_of_one_run(settings: Any) -> dict[str, Any]:
  given = dataclasses.asdict(settings)
  others = ('methods', 'seeds', 'tables', 'corruptions')
  return {k: v for k, v in given.items() if k not in others}
