"""Fair comparisons: all methods are tuned equally, on unreported data.

    rules = comparison.Rules(
      options, settings={'problem': 'quadratic'}, score=lambda trained: ...,
      tuning_seeds=(1_000_000,))
    outcomes = comparison.compare(
      rules, methods, train, grid={'rate': (0.1, 0.3, 1.0)})
    results = harness.Results()
    comparison.add_outcomes(results, outcomes, measure)

Each method tries all points of a grid. If the best point is at the end of an
axis, the axis is extended and the new points are tried too, up to three times.
The table marks a choice that is still at an edge. All methods start with the
same number of points, and the table has the number that each tried. If a method
fails, its row has the reason, and the others continue.
"""

import dataclasses
import math
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.app import errors, flags
from experiments.harness.study.results import Results
from experiments.harness.study.search import Axis as Axis
from experiments.harness.study.search import (
  Grid,
  Point,
  Trial,
  as_axes,
  count_points,
  search,
)
from experiments.harness.study.search import among as among
from experiments.harness.train import task
from experiments.harness.train.trained import Trained


def tuning_seeds(count: int) -> tuple[int, ...]:
  """Returns unreported seeds, from a million; reported seeds start at 0."""
  return tuple(range(1_000_000, 1_000_000 + count))


class Job(NamedTuple):
  """A run to train.

  Attributes:
    method: name of the method.
    tuning: whether the run only serves the choice of a point.
    hyper: hyperparameters by name, float (members,).
    seeds: one for each member.
    name: subfolder of the workdir.
    settings: plain values that the run depends on; `tried` has the points.
    options: options of the binary.
  """

  method: str
  tuning: bool
  hyper: dict[str, Any]
  seeds: tuple[int, ...]
  name: str
  settings: Mapping[str, Any]
  options: flags.Options

  def training(self, steps: int, chunk: int, **fields: Any) -> task.Training:
    """Returns the `harness.Training` of the job.

    Args:
      steps: total number of steps.
      chunk: steps between two records.
      **fields: other fields, which replace those of the job.
    """
    own = {name: getattr(self, name) for name in ('seeds', 'name', 'settings')}
    own |= {'steps': steps, 'chunk': chunk}
    return task.Training.from_options(self.options, **own | fields)


class Outcome(NamedTuple):
  """The outcome of a method.

  Attributes:
    method: name of the method.
    point: the chosen point.
    edges: hyperparameters whose choice is at an edge of the grid.
    score: score of the choice.
    trials: all trials.
    trained: the reported run; None if the method failed.
    members: members of the reported seeds in the run.
    evaluations_on_test: number of runs from which this one was selected by the
      reported data; 1 if the selection used other data.
    seconds: wall time with tuning and compilation.
    failure: the reason of a failure in one line, or ''.
  """

  method: str
  point: Point
  edges: tuple[str, ...] = ()
  score: float = -math.inf
  trials: tuple[Trial, ...] = ()
  trained: Trained | None = None
  members: Any = ()
  evaluations_on_test: int = 1
  seconds: float = 0.0
  failure: str = ''

  @property
  def chosen(self) -> Trial:
    """The trial of the choice."""
    return next(t for t in self.trials if t.point == self.point)

  def describe(self, name: str) -> str:
    """Formats a chosen hyperparameter, with `(edge)` if it is at an edge."""
    edge = ' (edge)' if name in self.edges else ''
    return f'{self.point[name]:.4g}{edge}'

  def values(self, metric: str) -> np.ndarray:
    """Returns a metric of the reported seeds, (records, seeds)."""
    return self.trained.history[metric][:, self.members]

  def last(self, metric: str) -> np.ndarray:
    """Returns a metric of the reported seeds at the last step, (seeds,)."""
    return self.values(metric)[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """The rules of a comparison, the same for all methods.

  Attributes:
    options: options of the binary: reported seeds, workdir.
    settings: plain values that every run depends on.
    score: from a run to a number per member, higher is better, computed from
      unreported data.
    tuning_seeds: seeds of tuning runs, disjoint from the reported seeds. () for
      tuning with the reported seeds, on validation data: the best tuning run is
      then the reported one.
    over_seeds: from the scores of a point's seeds to its score.
    widenings: maximum number of extensions of the grid.
    keep: whether the trials of tuning runs keep params and states in memory.
  """

  options: flags.Options = dataclasses.field(kw_only=False)
  settings: Mapping[str, Any]
  score: Callable[[Trained], Any]
  tuning_seeds: tuple[int, ...] = ()
  over_seeds: Callable[[Any], Any] = np.mean
  widenings: int = 3
  keep: bool = False

  def __post_init__(self):
    shared = set(self.tuning_seeds) & set(self.options.seeds)
    if shared:
      raise ValueError(
        f'the seeds {sorted(shared)} are both tuning seeds and reported.'
      )


def compare(
  rules: Rules,
  methods: Sequence[str],
  train: Callable[[Job], Trained],
  grid: Grid | Callable[[str], Grid],
) -> dict[str, Outcome]:
  """Tunes and runs all methods.

  Args:
    rules: rules of the comparison.
    methods: names of the methods.
    train: trains a `Job` by `harness.train`, with its `hyper` and `training`.
    grid: values by hyperparameter, or a function from a method to these.

  Returns:
    Outcomes by method.

  Raises:
    ValueError: if grids have different numbers of points, except for grids of a
      single point, such as {} for a method without hyperparameters.
  """
  grids = {m: as_axes(grid(m) if callable(grid) else grid) for m in methods}
  counts = {m: count_points(axes) for m, axes in grids.items()}
  if len(set(counts.values()) - {1}) > 1:
    listed = ', '.join(f'{m} {n}' for m, n in counts.items())
    raise ValueError(f'grids need equal numbers of points, got {listed}.')
  return {m: run(rules, m, train, grids[m]) for m in methods}


def run(
  rules: Rules,
  method: str,
  train: Callable[[Job], Trained],
  grid: Grid,
) -> Outcome:
  """Tunes and runs one method; see `compare`."""
  start = time.monotonic()
  try:
    outcome = _run(rules, method, train, as_axes(grid))
  except errors.AllStoppedError as error:
    outcome = _failed(method, error)
  except errors.UserError:
    raise  # The folder, the data or the settings are at fault, not the method.
  except Exception as error:
    traceback.print_exc()
    outcome = _failed(method, error)
  return outcome._replace(seconds=time.monotonic() - start)


def _failed(method, error):
  message = (str(error).splitlines() or [''])[0]
  failure = f'{type(error).__name__}: {message}'
  warnings.warn(
    f'{method} failed, the others continue ({failure})',
    RuntimeWarning,
    stacklevel=3,
  )
  return Outcome(method, {}, failure=failure)


def _run(rules, method, train, axes):
  seeds = rules.options.seeds
  reported = lambda point: _train(
    rules, method, method, train, [point], seeds, tuning=False
  )
  if rules.tuning_seeds and count_points(axes) == 1:
    # A single point needs no tuning.
    point = {name: axis.values[0] for name, axis in axes.items()}
    members = np.arange(len(seeds))
    return Outcome(method, point, trained=reported(point), members=members)

  def try_(points, widening):
    name = f'{method}/tuning' + (f'_{widening}' if widening else '')
    return _try(rules, method, name, train, points)

  chosen, edges, trials = search(axes, try_, widenings=rules.widenings)
  if not math.isfinite(chosen.score):
    raise errors.AllStoppedError(f'all {len(trials)} points became non-finite.')
  trained, members = chosen.trained, chosen.members
  if rules.tuning_seeds:
    trained = reported(chosen.point)
    members = np.arange(len(seeds))
  return Outcome(
    method, chosen.point, edges, chosen.score, tuple(trials), trained, members
  )


def _train(rules, method, name, train, points, seeds, *, tuning):
  members = tuple(seeds) * len(points)
  hyper = {
    name: np.repeat(
      np.asarray([point[name] for point in points], np.float32), len(seeds)
    )
    for name in points[0]
  }
  settings = {**rules.settings, 'tried': points}
  job = Job(method, tuning, hyper, members, name, settings, rules.options)
  return train(job)


def _try(rules, method, name, train, points):
  seeds = rules.tuning_seeds or rules.options.seeds
  tuning = bool(rules.tuning_seeds)
  try:
    with warnings.catch_warnings():
      if tuning:
        # The largest step sizes of a grid often diverge.
        warnings.filterwarnings('ignore', '.*became non-finite')
      trained = _train(rules, method, name, train, points, seeds, tuning=tuning)
  except errors.AllStoppedError:
    # The points lose; the method does not fail.
    return [
      Trial(point, -math.inf, None, np.array([], int)) for point in points
    ]
  scores = np.asarray(rules.score(trained), np.float64)
  if tuning and not rules.keep:
    trained = trained._replace(params=(), state=(), best=())
  scores = scores.reshape(len(points), -1)
  members = np.arange(scores.size).reshape(scores.shape)
  # A point with a seed that stopped is not chosen.
  finite = np.isfinite(scores).all(axis=1)
  return [
    Trial(
      point,
      float(rules.over_seeds(of_point)) if fine else -math.inf,
      trained,
      rows,
    )
    for point, of_point, fine, rows in zip(
      points, scores, finite, members, strict=True
    )
  ]


def select_best(
  name: str, outcomes: Sequence[Outcome], key: Callable[[Outcome], float]
) -> Outcome:
  """Selects the best outcome of a family by the reported data.

  This favours the family, so the outcome has the number of evaluations.

  Args:
    name: name of the family.
    outcomes: outcomes of its members; failed ones are ignored.
    key: lower is better; NaN counts as infinity.

  Returns:
    The best outcome, with `name` as its method.
  """
  fine = [outcome for outcome in outcomes if not outcome.failure]
  if not fine:
    return outcomes[0]._replace(method=name)
  value = lambda outcome: (math.isnan(key(outcome)), key(outcome))
  best = min(fine, key=value)
  return best._replace(method=name, evaluations_on_test=len(fine))


def add_outcomes(
  results: Results,
  outcomes: Mapping[str, Outcome],
  measure: Callable[[Outcome], Mapping[str, Any]],
  at: Mapping[str, Any] | None = None,
) -> None:
  """Adds the outcomes of a comparison to results.

  Args:
    results: the results, to which numbers are added at `method`.
    outcomes: outcomes by method.
    measure: from a successful outcome to values by measure, one number or one
      per reported seed. Also added: the chosen point, marked `(edge)` in the
      table if it is at an edge, and the numbers `trials`, `edges` and `looks`
      (evaluations on the reported data).
    at: coordinates after the method.
  """
  for method, outcome in outcomes.items():
    place = {'method': method, **(at or {})}
    if outcome.failure:
      results.note(place, {'trials': outcome.failure})
      continue
    results.put(place, measure(outcome))
    results.put(place, outcome.point)
    results.note(place, {n: outcome.describe(n) for n in outcome.point})
    results.add(
      place,
      trials=max(1, len(outcome.trials)),
      edges=len(outcome.edges),
      looks=outcome.evaluations_on_test,
    )
    results.note(place, {'seconds': round(outcome.seconds)})
