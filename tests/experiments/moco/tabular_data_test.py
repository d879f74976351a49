"""Missing files are explained; parts are standardised by training rows."""

import numpy as np
import pytest

from experiments import harness
from experiments.moco import tabular_data


def test_missing_data_says_where_to_get_it(tmp_path):
  with pytest.raises(harness.MissingDataError, match='MALSAR'):
    tabular_data.read_school(str(tmp_path))


def test_made_up_targets_are_standardised_and_parts_apart():
  data = tabular_data.make_up(200)
  assert [len(data[part][0]) for part in data] == [120, 40, 40]
  inputs, targets = data['train']
  assert targets.shape == (120, tabular_data.TORQUES)
  np.testing.assert_allclose(targets.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(targets.std(0), 1, rtol=1e-5)
  assert not np.isin(data['test'][0][:, 0], inputs[:, 0]).any()
