"""What the warning of a stopped seed advises."""

import pytest

from experiments.harness.train import trained


@pytest.mark.parametrize(
  ('step', 'match'),
  [(0, 'check the data, rewards'), (7, 'non-finite. Try a smaller step size')],
)
def test_advice(step, match):
  stop = trained.Stopped(member=0, seed=0, step=step, sequences=('actor',))
  with pytest.warns(RuntimeWarning, match=match):
    trained.warn_stopped('ppo', [stop], alone=True)
