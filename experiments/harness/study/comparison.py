"""Fair comparisons: every method is tuned alike, on what is not reported.

    rules = comparison.Rules(
      options, settings={'problem': 'quadratic'}, score=lambda trained: ...,
      tuning_seeds=(1_000_000,))
    outcomes = comparison.compare(
      rules, methods, train, grid={'rate': (0.1, 0.3, 1.0)})
    results = harness.Results()
    comparison.add_outcomes(results, outcomes, measure)

A method tries all points of a grid. Where the best point lies at the end of an
axis, the axis is widened and the new points are tried too, up to three times;
an end that is still chosen then is marked in the table. All methods have as
many points at first, and the table says how many each came to. A method that
fails costs its own row, which says why.
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
  """Seeds that are not reported: a million and on; reported ones begin at 0."""
  return tuple(range(1_000_000, 1_000_000 + count))


class Job(NamedTuple):
  """One run to train.

  Attributes:
    method: its name.
    tuning: whether it is for the choice of a point only.
    hyper: hyperparameters by name, float (members,).
    seeds: one for each member.
    name: its folder in the workdir.
    settings: plain values that it depends on; `tried` has the points.
    options: what the flags say.
  """

  method: str
  tuning: bool
  hyper: dict[str, Any]
  seeds: tuple[int, ...]
  name: str
  settings: Mapping[str, Any]
  options: flags.Options

  def training(self, steps: int, chunk: int, **fields: Any) -> task.Training:
    """How it is trained.

    Args:
      steps: a field of `harness.Training`.
      chunk: another field.
      **fields: all others; they replace what the job says.
    """
    fields = {
      'seeds': self.seeds,
      'name': self.name,
      'settings': self.settings,
    } | fields
    return task.Training.from_options(
      self.options, steps=steps, chunk=chunk, **fields
    )


class Outcome(NamedTuple):
  """What a method came to.

  Attributes:
    method: its name.
    point: what was chosen.
    edges: hyperparameters whose choice is at an edge of what was tried.
    score: of the choice.
    trials: all that was tried.
    trained: the reported run; None if the method failed.
    members: the reported seeds' members there.
    looks: reported runs among which this one was chosen by what is reported; 1
      if the choice was made before.
    seconds: wall time, with tuning and compilation.
    failure: what went wrong, one line; '' if nothing did.
  """

  method: str
  point: Point
  edges: tuple[str, ...] = ()
  score: float = -math.inf
  trials: tuple[Trial, ...] = ()
  trained: Trained | None = None
  members: Any = ()
  looks: int = 1
  seconds: float = 0.0
  failure: str = ''

  @property
  def chosen(self) -> Trial:
    """The trial of the choice."""
    return next(t for t in self.trials if t.point == self.point)

  def describe(self, name: str) -> str:
    """A chosen hyperparameter in words, with `(edge)` where it is at one."""
    edge = ' (edge)' if name in self.edges else ''
    return f'{self.point[name]:.4g}{edge}'

  def values(self, metric: str) -> np.ndarray:
    """A metric of the reported seeds over records, (records, seeds)."""
    return self.trained.history[metric][:, self.members]

  def last(self, metric: str) -> np.ndarray:
    """A metric of the reported seeds at the end, (seeds,)."""
    return self.values(metric)[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """What is the same for all methods.

  Attributes:
    options: what the flags say: reported seeds, workdir.
    settings: plain values that every run depends on.
    score: from a run to a number for each member, higher is better, by what is
      not reported.
    tuning_seeds: those of the tuning runs, none of them reported. () tunes
      with the reported seeds, by validation data alone, and a tuning run is
      the reported one.
    over_seeds: the score of a point from those of its seeds.
    widenings: how often an axis may grow.
    keep: whether the trials of tuning keep params and states beside their
      histories: all of them stay in memory. Where tuning runs are the reported
      ones they do.
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
      raise ValueError(f'the seeds {sorted(shared)} are tuned on and reported.')


def compare(
  rules: Rules,
  methods: Sequence[str],
  train: Callable[[Job], Trained],
  grid: Grid | Callable[[str], Grid],
) -> dict[str, Outcome]:
  """Tunes and runs all methods.

  Args:
    rules: of the comparison.
    methods: their names.
    train: runs a `Job` by `harness.train`, with its `hyper` and its `training`.
      A point all of whose seeds stop is not chosen.
    grid: tried values by hyperparameter, or a function from a method to them.

  Returns:
    Outcomes by method, in order.

  Raises:
    ValueError: if grids have different numbers of points; a grid of one point,
      {} for a method with nothing to tune, may stand beside them.
  """
  grids = {m: as_axes(grid(m) if callable(grid) else grid) for m in methods}
  counts = {m: count_points(axes) for m, axes in grids.items()}
  if len(set(counts.values()) - {1}) > 1:
    said = ', '.join(f'{m} {n}' for m, n in counts.items())
    raise ValueError(f'methods are tried at equal numbers of points: {said}.')
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
    raise  # Of the folder, the data or the settings: no fault of the method.
  except Exception as error:
    traceback.print_exc()
    outcome = _failed(method, error)
  return outcome._replace(seconds=time.monotonic() - start)


def _failed(method, error):
  said = (str(error).splitlines() or [''])[0]
  failure = f'{type(error).__name__}: {said}'
  warnings.warn(
    f'{method} failed, the others go on ({failure})',
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
    # Nothing is chosen, so nothing is tuned.
    point = {name: axis.values[0] for name, axis in axes.items()}
    members = np.arange(len(seeds))
    return Outcome(method, point, trained=reported(point), members=members)

  def try_(points, widening):
    name = f'{method}/tuning' + (f'_{widening}' if widening else '')
    return _try(rules, method, name, train, points)

  chosen, edges, trials = search(axes, try_, widenings=rules.widenings)
  if not math.isfinite(chosen.score):
    raise errors.AllStoppedError(f'none of {len(trials)} points stays finite.')
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
        # That step sizes at the end of a grid are too large is no news.
        warnings.filterwarnings('ignore', '.*became non-finite')
      trained = _train(rules, method, name, train, points, seeds, tuning=tuning)
  except errors.AllStoppedError:
    # As beyond the edge of a grid: points that lose, not a method that fails.
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


def best_of(
  name: str, outcomes: Sequence[Outcome], key: Callable[[Outcome], float]
) -> Outcome:
  """The best of several outcomes by what is reported, under a name.

  It has looked at the reported data as often as there are outcomes, which
  favours it.

  Args:
    name: of the family.
    outcomes: of its members; failed ones are passed over.
    key: lower is better; NaN counts as infinity.

  Returns:
    The best outcome, with its number of looks.
  """
  fine = [outcome for outcome in outcomes if not outcome.failure]
  if not fine:
    return outcomes[0]._replace(method=name)
  value = lambda outcome: (math.isnan(key(outcome)), key(outcome))
  return min(fine, key=value)._replace(method=name, looks=len(fine))


def add_outcomes(
  results: Results,
  outcomes: Mapping[str, Outcome],
  measure: Callable[[Outcome], Mapping[str, Any]],
  at: Mapping[str, Any] | None = None,
) -> None:
  """Adds what a comparison came to.

  Args:
    results: to which it is added, at the coordinate `method`.
    outcomes: by method.
    measure: from an outcome that did not fail to values by name, one for each
      reported seed, or one in all. Added beside: what was chosen (in the table
      with `(edge)` where it is at one), `trials`, `edges` and `looks`.
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
      looks=outcome.looks,
    )
    results.note(place, {'seconds': round(outcome.seconds)})
