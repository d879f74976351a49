"""The benchmark's opponents take the same steps; times are never asserted."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import measure
from experiments.benchmarks import stackelberg as steps


@pytest.mark.slow
def test_both_take_the_same_steps():
  games = steps.make_games(6, (3, 2), 2)
  start = steps.draw_logits(6, (3, 2), 2)
  ours = measure.Program(*steps.library(games, *start), games)
  step, theirs = steps.by_hand(games, *start)
  for _ in range(3):
    ours.run(1)
    theirs = step(theirs)
    params, state = ours.carry
    found = (*params, state.sequences['value'])
    for one, two in zip(found[:2], theirs[:2], strict=True):
      np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(
      *(jax.nn.softmax(z) for z in (found[2], theirs[2])), atol=1e-4
    )
