"""What a comparison of hyper-cleaning methods says: metrics, table, curves."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.pbgd import cleaning_methods


class Outcome(NamedTuple):
  """What a method came to, one value for each seed.

  Attributes:
    trained: the run.
    scale: the chosen factor of its step sizes.
    retrained: the run of a model trained anew on the kept digits, or None; its
      members are the seeds with what they keep at the selected step, then the
      same seeds at the last.
    seconds: of everything, tuning included.
  """

  trained: harness.Trained
  scale: float
  retrained: harness.Trained | None
  seconds: float


def at_best(trained: harness.Trained, metric: str, by: str) -> np.ndarray:
  """A metric where another is highest for the first time, one a seed."""
  score = np.where(np.isnan(trained.history[by]), -np.inf, trained.history[by])
  rows = np.argmax(score, axis=0)
  return trained.history[metric][rows, np.arange(score.shape[1])]


def summarise(
  outcomes: dict[str, Outcome], model: str
) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """Metrics by stable name, and rows of the table.

  Args:
    outcomes: by method.
    model: name of the model.

  Returns:
    Means over seeds with their 95 % intervals. Without a further word, a metric
    is at the step chosen on the selection digits.
  """
  metrics, rows = {}, []

  def put(name, values):
    interval = harness.mean_interval(values)
    metrics.update(interval.metrics(name))
    return interval

  for method, (trained, scale, retrained, seconds) in outcomes.items():
    prefix = f'{method}/{model}'
    row: dict[str, Any] = {'method': method}
    for metric, short in (('test_accuracy', 'accuracy'), ('f1', 'F1')):
      if metric not in trained.history:
        continue
      last = trained.history[metric][-1]
      selected = at_best(trained, metric, 'selection_accuracy')
      flattered = at_best(trained, metric, 'test_accuracy')
      row[f'{short}, selected'] = put(f'{prefix}/{metric}', selected)
      row[f'{short}, last'] = put(f'{prefix}/last/{metric}', last)
      best = put(f'{prefix}/best_on_test/{metric}', flattered)
      row[f'{short}, best on test'] = best
    if retrained is not None:
      again = at_best(retrained, 'test_accuracy', 'selection_accuracy')
      selected, last = np.split(again, 2)
      row['retrained, selected'] = put(f'{prefix}/retrained_accuracy', selected)
      name = f'{prefix}/last/retrained_accuracy'
      row['retrained, last'] = put(name, last)
    metrics[f'{prefix}/scale'] = scale
    step = np.asarray(trained.best.step, np.float64)
    row['step'] = metrics[f'{prefix}/selected_step'] = float(step.mean())
    counts = _last_counts(trained)
    for name, value in counts.items():
      metrics[f'{prefix}/count/{name}'] = value
    row['gradients'] = cleaning_methods.evaluated(counts)
    row['scale'], row['seconds'] = scale, round(seconds)
    rows.append(row)
  return metrics, rows


def _last_counts(trained: harness.Trained) -> dict[str, float]:
  return {
    name.removeprefix('count/'): float(np.nanmax(values[-1]))
    for name, values in trained.history.items()
    if name.startswith('count/')
  }


COLUMNS = (
  'method',
  'F1, selected',
  'retrained, selected',
  'accuracy, selected',
  'F1, last',
  'retrained, last',
  'accuracy, last',
  'F1, best on test',
  'accuracy, best on test',
  'step',
  'gradients',
  'scale',
  'seconds',
)


def plot(path: pathlib.Path, outcomes: dict[str, Outcome]) -> None:
  """Accuracy and F1 over the gradients evaluated and over time."""

  def over_gradients(trained):
    share = trained.steps / trained.step
    return share * cleaning_methods.evaluated(_last_counts(trained))

  def over_time(trained):
    # All members of a run share its time; all steps of a run cost the same.
    members = trained.history['test_accuracy'].shape[1]
    return trained.steps / trained.step * trained.seconds / members

  panels = []
  for metric, ylabel in (
    ('test_accuracy', 'test accuracy'),
    ('f1', 'F1 of keeping clean digits'),
  ):
    for axis, xlabel in (
      (over_gradients, 'gradients evaluated'),
      (over_time, 'seconds a seed'),
    ):
      curves = {
        method: (axis(outcome.trained), outcome.trained.history[metric])
        for method, outcome in outcomes.items()
        if metric in outcome.trained.history
      }
      if curves:
        panels.append(harness.Panel(curves, xlabel, ylabel, logx=True))
  harness.plot_panels(path, panels)
