"""What is compared is the same work, and costs are counted plausibly."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import seal

SMALL = seal.Settings(width=16, layers=1, vocabulary=32, rows=4, length=8)


@pytest.mark.slow
def test_a_step_of_seal_costs_what_fine_tuning_of_the_same_rows_does():
  made = seal.programs(SMALL)
  base = made['sft']
  assert made['seal'].flops <= 1.1 * base.flops
  assert made['seal_full'].flops >= 1.2 * base.flops
  for one in made.values():
    before = jax.tree.map(np.asarray, one.carry[0])
    one.run(2)
    moved = jax.tree.map(
      lambda a, b: bool(np.any(np.asarray(a) != b)), one.carry[0], before
    )
    assert all(jax.tree.leaves(moved))


def test_scores_among_many_rows_touch_no_more_memory_beside_their_table():
  few, many = (seal.selector(n, 8, dense=False) for n in (100, 10_000))
  # What is held beyond the table, which is reused.
  assert many.temporary - few.temporary <= 1.1 * 4 * 9_900
  dense = seal.selector(10_000, 8, dense=True)
  assert dense.memory > many.memory
