"""What a comparison of hyper-cleaning methods says: metrics, table, curves."""

from collections.abc import Mapping
from typing import NamedTuple

import matplotlib.figure
import numpy as np

from experiments import harness
from experiments.harness.study import comparison
from experiments.pbgd import cleaning_methods


class Outcomes(NamedTuple):
  """What a comparison came to.

  Attributes:
    by_method: the runs.
    retrained: runs of a model trained anew on what a method keeps at the
      selected step, by method.
    retrained_last: likewise, at the last step.
  """

  by_method: dict[str, comparison.Outcome]
  retrained: dict[str, comparison.Outcome]
  retrained_last: dict[str, comparison.Outcome]

  def again(self, method: str) -> dict[str, np.ndarray]:
    """Test accuracies of the retrained models, one a seed."""
    return {
      name: at_best(found[method], 'test_accuracy', 'selection_accuracy')
      for name, found in (
        ('retrained_accuracy', self.retrained),
        ('last/retrained_accuracy', self.retrained_last),
      )
      if method in found and not found[method].failure
    }


def at_best(outcome: comparison.Outcome, metric: str, by: str) -> np.ndarray:
  """A metric where another is highest for the first time, one a seed."""
  score = outcome.values(by)
  rows = np.argmax(np.where(np.isnan(score), -np.inf, score), axis=0)
  return outcome.values(metric)[rows, np.arange(score.shape[1])]


def summarise(outcomes: Outcomes, model: str) -> harness.Results:
  """Numbers by method and model.

  Args:
    outcomes: of the comparison.
    model: name of the model.

  Returns:
    Means over seeds with their 95 % intervals. Without a further word, a number
    is at the step chosen on the selection digits.
  """

  def measure(outcome):
    found = outcomes.again(outcome.method)
    for metric in ('f1', 'test_accuracy'):
      if metric in outcome.trained.history:
        found[metric] = at_best(outcome, metric, 'selection_accuracy')
        found[f'last/{metric}'] = outcome.last(metric)
        found[f'best_on_test/{metric}'] = at_best(
          outcome, metric, 'test_accuracy'
        )
    step = np.asarray(outcome.trained.best.step, np.float64)
    counts = last_counts(outcome.trained)
    return found | {
      'selected_step': step.mean(),
      'gradients': cleaning_methods.evaluated(counts),
      **{f'count/{name}': value for name, value in counts.items()},
    }

  results = harness.Results()
  at = {'model': model}
  comparison.add_outcomes(results, outcomes.by_method, measure, at)
  for method, again in outcomes.retrained.items():
    if not again.failure:
      said = {'retrained_scale': again.describe('scale')}
      results.note({'method': method, **at}, said)
  return results


def last_counts(trained: harness.Trained) -> dict[str, float]:
  """What a run evaluated in all, by name."""
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
  """Accuracy and F1 over the gradients evaluated and over time."""

  def over_gradients(trained):
    share = trained.steps / trained.step
    return share * cleaning_methods.evaluated(last_counts(trained))

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
        if not outcome.failure and metric in outcome.trained.history
      }
      if curves:
        panels.append(harness.Panel(curves, xlabel, ylabel, logx=True))
  return harness.draw_panels(panels)
