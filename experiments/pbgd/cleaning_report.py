"""Metrics, table and plots of a comparison of hyper-cleaning methods."""

from collections.abc import Mapping
from typing import NamedTuple

import matplotlib.figure
import numpy as np

from experiments import harness
from experiments.harness.study import comparison
from experiments.pbgd import cleaning_methods


class Outcomes(NamedTuple):
  """Runs of a comparison, by method.

  Attributes:
    by_method: the runs of the methods.
    retrained: runs of a model retrained on the digits that a method keeps at
      its selected step.
    retrained_last: as `retrained`, at the last step.
    f1: F1 per seed of the control `agreement`, whose runs do not record it.
  """

  by_method: dict[str, comparison.Outcome]
  retrained: dict[str, comparison.Outcome]
  retrained_last: dict[str, comparison.Outcome]
  f1: dict[str, np.ndarray]

  def retrained_accuracies(self, method: str) -> dict[str, np.ndarray]:
    """Test accuracies of the retrained models, per seed."""
    return {
      name: at_best(runs[method], 'test_accuracy', 'selection_accuracy')
      for name, runs in (
        ('retrained_accuracy', self.retrained),
        ('last/retrained_accuracy', self.retrained_last),
      )
      if method in runs and not runs[method].failure
    }


def retraining_choice(retrained: comparison.Outcome) -> dict[str, float]:
  """The chosen step size of retraining, its edges and trials."""
  return {
    'retrained_scale': retrained.point['scale'],
    'retrained_edges': len(retrained.edges),
    'retrained_trials': max(1, len(retrained.trials)),
  }


def at_best(outcome: comparison.Outcome, metric: str, by: str) -> np.ndarray:
  """A metric at the first maximum of another one, per seed."""
  score = outcome.values(by)
  rows = np.argmax(np.where(np.isnan(score), -np.inf, score), axis=0)
  return outcome.values(metric)[rows, np.arange(score.shape[1])]


def summarise(outcomes: Outcomes, model: str) -> harness.Results:
  """Collects metrics by method and model.

  Args:
    outcomes: runs of the comparison.
    model: name of the model.

  Returns:
    Values per seed. A metric without a prefix is taken at the step chosen on
    the selection digits.
  """

  def measure(outcome):
    metrics = outcomes.retrained_accuracies(outcome.method)
    for metric in ('f1', 'test_accuracy'):
      if metric in outcome.trained.history:
        metrics[metric] = at_best(outcome, metric, 'selection_accuracy')
        metrics[f'last/{metric}'] = outcome.last(metric)
        metrics[f'best_on_test/{metric}'] = at_best(
          outcome, metric, 'test_accuracy'
        )
    step = np.asarray(outcome.trained.best.step, np.float64)
    counts = last_counts(outcome.trained)
    return metrics | {
      'selected_step': step.mean(),
      'gradients': cleaning_methods.total_cost(counts),
      **{f'count/{name}': value for name, value in counts.items()},
    }

  results = harness.Results()
  at = {'model': model}
  comparison.add_outcomes(results, outcomes.by_method, measure, at)
  for method, f1 in outcomes.f1.items():
    own = {'f1': f1} | outcomes.retrained_accuracies(method)
    results.put({'method': method, **at}, own)
  for method, retrained in outcomes.retrained.items():
    if not retrained.failure:
      place = {'method': method, **at}
      results.put(place, retraining_choice(retrained))
      results.note(place, {'retrained_scale': retrained.describe('scale')})
  return results


def last_counts(trained: harness.Trained) -> dict[str, float]:
  """Final evaluation counts of a run, by name."""
  return {
    name.removeprefix('count/'): float(np.nanmax(values[-1]))
    for name, values in trained.history.items()
    if name.startswith('count/')
  }


COLUMNS = (
  'f1',
  'retrained_accuracy',
  'test_accuracy',
  'last/f1',
  'last/retrained_accuracy',
  'last/test_accuracy',
  'best_on_test/f1',
  'best_on_test/test_accuracy',
  'selected_step',
  'gradients',
  'scale',
  'retrained_scale',
  'trials',
  'seconds',
)


def draw(
  outcomes: Mapping[str, comparison.Outcome],
) -> matplotlib.figure.Figure:
  """Draws accuracy and F1 over gradient evaluations and over time."""

  def over_gradients(trained):
    share = trained.steps / trained.step
    return share * cleaning_methods.total_cost(last_counts(trained))

  def over_time(trained):
    # Members share the run's time equally; all steps cost the same.
    members = trained.history['test_accuracy'].shape[1]
    return trained.steps / trained.step * trained.seconds / members

  panels = []
  for metric, ylabel in (
    ('test_accuracy', 'test accuracy'),
    ('f1', 'F1 of keeping clean digits'),
  ):
    for axis, xlabel in (
      (over_gradients, 'gradient evaluations'),
      (over_time, 'seconds per seed'),
    ):
      curves = {
        method: (axis(outcome.trained), outcome.trained.history[metric])
        for method, outcome in outcomes.items()
        if not outcome.failure and metric in outcome.trained.history
      }
      if curves:
        panels.append(harness.Panel(curves, xlabel, ylabel, logx=True))
  return harness.draw_panels(panels)
