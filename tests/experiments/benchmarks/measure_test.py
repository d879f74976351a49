"""Tests of the measurements: counts by hand, order of the timings."""

import jax.numpy as jnp
import pytest

from experiments.benchmarks import measure


def test_operations_and_memory_of_a_product():
  step = lambda carry, batch: batch @ carry
  batch = jnp.ones((32, 32), jnp.float32)
  program = measure.Program(step, jnp.ones((32, 8), jnp.float32), batch)
  assert program.flops == pytest.approx(2 * 32 * 32 * 8, rel=0.01)
  assert program.memory >= 4 * (32 * 32 + 32 * 8)


def test_a_program_keeps_its_carry_and_leaves_the_callers():
  first = jnp.zeros(())
  program = measure.Program(lambda carry, batch: carry + batch, first, 1.0)
  program.run(3)
  assert program.carry == 3
  assert first == 0  # Not donated.


def test_programs_take_turns_and_run_equal_steps():
  calls = []
  ratio = measure.time_ratio(
    lambda steps: calls.append(('a', steps)),
    lambda steps: calls.append(('b', steps)),
    rounds=3,
    seconds=0.0,
  )
  timed = calls[-6:]
  assert [who for who, _ in timed] == ['a', 'b'] * 3
  assert len({steps for _, steps in timed}) == 1
  assert ratio.low <= ratio.wall <= ratio.high


def test_a_bound_inside_the_range_is_undecided():
  assert measure.judge(0.9, 0.8, 1.3, 1.0) == 'holds'
  assert measure.judge(1.1, 0.9, 1.3, 1.0) == 'undecided'
  assert measure.judge(1.2, 1.1, 1.3, 1.0) == 'EXCEEDED'
