"""Step selection of the reported numbers."""

import numpy as np

from experiments import harness
from experiments.harness.study import comparison
from experiments.pbgd import cleaning_report


def test_selection_ignores_a_stopped_seed():
  history = {
    'selection_accuracy': np.array([[0.5, 0.1], [0.7, np.nan]]),
    'f1': np.array([[0.2, 0.3], [0.4, np.nan]]),
  }
  trained = harness.Trained(
    **dict.fromkeys(harness.Trained._fields, None) | {'history': history}
  )
  outcome = comparison.Outcome('m', {}, trained=trained, members=np.arange(2))
  chosen = cleaning_report.at_best(outcome, 'f1', 'selection_accuracy')
  np.testing.assert_array_equal(chosen, [0.4, 0.3])
