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
  judge = lambda wall, low, **more: measure.judge(
    {'wall': wall, 'low': low, 'flops': 1.0}, {'wall': 1.0, **more}
  )
  assert judge(0.9, 0.8) == 'holds'
  assert judge(1.1, 0.9) == 'undecided'
  assert judge(1.2, 1.1) == 'EXCEEDED'
  assert judge(1.1, 0.9, flops=0.9) == 'EXCEEDED'
  assert measure.judge({'wall': 9.0}, {}) == ''
  assert measure.judge({'wall': float('nan')}, {'wall': 1.0}) == 'EXCEEDED'


def test_a_program_elsewhere_tells_its_own_seconds():
  ratio = measure.time_ratio(
    lambda steps: (3.0 * steps, 8.0 * steps),
    lambda steps: (2.0 * steps, 2.0 * steps),
    rounds=2,
    steps=1,
  )
  assert (ratio.wall, ratio.cpu) == (1.5, 4.0)
  assert (ratio.seconds, ratio.base_seconds) == (3.0, 2.0)


def test_growth_is_the_power_of_the_size():
  assert measure.exponent((1, 10, 100), (3, 30, 300)) == pytest.approx(1)

  def make(size):
    rows = jnp.ones((size, 100))
    return measure.Program(lambda carry, batch: carry + batch, rows, rows)

  found = measure.growth(make, (100, 1_000), rounds=1)
  assert found['memory_exponent'] == pytest.approx(1, abs=0.05)


def test_a_product_of_as_many_operations_is_the_base():
  size = 64
  matrix = jnp.eye(size)
  twice = measure.Program(lambda c, b: (c @ b) @ (b + 1), matrix, matrix)
  context = measure.Context(1, 0.0, None, '')
  found = measure.compare_to_product(twice, 2 * 2 * size**3, size, context)
  assert found['peak_share'] == pytest.approx(1 / found['wall'])
