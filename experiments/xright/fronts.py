"""Tuned fronts of methods: both losses over mixing ratios."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.harness.study import comparison, search
from experiments.xright import methods, runs
from experiments.xright import problem as problem_lib


class Front(NamedTuple):
  """The reported runs of a method.

  Attributes:
    method: name of the method.
    points: hyperparameters: a point for each mixing ratio, with the step size
      that is best for it on rows for tuning.
    chosen: index of the point that is best on these rows.
    edges: hyperparameters whose choice is at an edge of the grid.
    trials: number of points that were tried.
    trained: the run; members are points and then seeds.
  """

  method: str
  points: list[search.Point]
  chosen: int
  edges: tuple[str, ...]
  trials: int
  trained: harness.Trained

  def values(self, metric: str) -> np.ndarray:
    """Returns a metric, (records, points, seeds)."""
    history = self.trained.history[metric]
    return history.reshape(len(history), len(self.points), -1)

  def chosen_params(self) -> Any:
    """Returns the weights at the chosen point, with a leading axis of seeds."""
    size = len(self.points)
    split = lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:])[self.chosen]
    return jax.tree.map(split, self.trained.params)


def hypervolume(points: Any, reference: Sequence[float]) -> float:
  """Computes the area that points dominate, for two losses.

  Args:
    points: losses, (points, 2), lower is better.
    reference: losses at the upper corner of the area; points that are not below
      both of them count nothing.

  Returns:
    The area of the union of rectangles between the points and the reference.
  """
  area, lowest = 0.0, float(reference[1])
  for first, second in sorted(map(tuple, np.asarray(points, np.float64))):
    if first < reference[0] and second < lowest:
      area += (reference[0] - first) * (lowest - second)
      lowest = second
  return area


def grid(settings: Any, method: str) -> dict[str, search.Axis]:
  """Returns the values of a method that are tried first."""
  axes = {'rate': search.Axis(settings.grid.rates)}
  if method not in (*methods.SINGLE, *methods.AGGREGATORS):
    low, high = settings.grid.limits
    axes['share'] = search.Axis(settings.mixing_ratios, (low, high))
  return axes


def updates(settings: Any, method: str) -> int:
  """Returns the updates of a method, for equal numbers of gradients."""
  return settings.steps // (2 if method in methods.BOTH else 1)


def train(
  options: harness.Options,
  problem: problem_lib.Problem,
  method: str,
  points: Sequence[search.Point],
  optima: Sequence[float],
  *,
  name: str,
  seeds: Sequence[int],
) -> harness.Trained:
  """Trains a method with each point and seed; members are points, then seeds.

  Args:
    options: options of the binary.
    problem: the problem.
    method: name of the method.
    points: hyperparameters.
    optima: estimated optima of both objectives, for MAXRIGHT.
    name: of the run.
    seeds: seeds of each point.
  """
  settings = options.settings
  steps = updates(settings, method)
  hyper = {
    n: jnp.repeat(jnp.asarray([p[n] for p in points], jnp.float32), len(seeds))
    for n in points[0]
  }

  def plan(hyper):
    ratio = hyper.get('share', 0.5)
    return settings.plan(ratio, optima or 'running')._replace(steps=steps)

  return runs.train(
    problem,
    method,
    harness.Training.from_options(
      options,
      steps=steps,
      chunk=steps // settings.records,
      seeds=tuple(seeds) * len(points),
      name=f'{method}/{name}',
      settings={
        **harness.run_settings(
          settings, 'methods', 'mixing_ratios', 'grid', 'tuning_seeds'
        ),
        'points': list(points),
        'optima': list(optima) if method == 'maxright' else [],
      },
    ),
    plan=plan,
    optimiser=lambda hyper: settings.optimiser.make(steps, hyper['rate']),
    hyper=hyper,
    splits=('refresh', 'held_out'),
    record_start=False,
  )


def score(
  problem: problem_lib.Problem,
  method: str,
  trained: harness.Trained,
  optima: Sequence[float],
) -> np.ndarray:
  """Rates each member on rows for tuning; higher is better.

  Args:
    problem: the problem.
    method: a method for one objective is rated by its loss.
    trained: the run.
    optima: estimated optima of both objectives.

  Returns:
    Negative losses, or negative distances to the optima, (members,).
  """
  losses = [trained.history[f'refresh/{n}'][-1] for n in problem.names]
  if method in methods.SINGLE:
    return -losses[methods.SINGLE.index(method)]
  gaps = [
    np.maximum(loss - optimum, 0)
    for loss, optimum in zip(losses, optima, strict=True)
  ]
  return -np.hypot(*gaps)


def tuned(
  options: harness.Options,
  problem: problem_lib.Problem,
  method: str,
  optima: Sequence[float] = (),
) -> Front:
  """Tunes a method on rows that are not reported, and trains its front.

  Args:
    options: options of the binary.
    problem: the problem.
    method: name of the method.
    optima: estimated optima of both objectives; () for one objective.

  Returns:
    The front; one point for methods without a mixing ratio.

  Raises:
    AllStoppedError: if all points become non-finite.
  """
  settings = options.settings
  tuning_seeds = comparison.tuning_seeds(settings.tuning_seeds)

  def try_points(points, widening):
    try:
      trained = train(
        *(options, problem, method, points, optima),
        name=f'tuning_{widening}',
        seeds=tuning_seeds,
      )
      scores = score(problem, method, trained, optima)
      scores = scores.reshape(len(points), -1).mean(axis=1)
    except harness.AllStoppedError:
      scores = np.full(len(points), np.nan)
    return [
      search.Trial(
        point, -math.inf if np.isnan(x) else float(x), None, np.array([], int)
      )
      for point, x in zip(points, scores, strict=True)
    ]

  chosen, edges, trials = search.search(
    grid(settings, method), try_points, widenings=settings.grid.widenings
  )
  best: dict[float, search.Trial] = {}
  for trial in sorted(trials, key=lambda trial: trial.score):
    best[trial.point.get('share', 0.5)] = trial
  points = [best[share].point for share in sorted(best)]
  trained = train(
    *(options, problem, method, points, optima),
    name='reported',
    seeds=options.seeds,
  )
  place = points.index(chosen.point)
  return Front(method, points, place, edges, len(trials), trained)
