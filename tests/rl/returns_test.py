"""Returns and advantages: a reference, closed forms, both kinds of ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from tests.references import returns as reference


def draw(dtype, steps=13, environments=5):
  """Random rollouts whose episodes terminate, are truncated, or both."""
  rng = np.random.default_rng(0)
  numbers = rng.normal(size=(3, steps, environments)).astype(dtype)
  ends = rng.uniform(size=(2, steps, environments)) < 0.2
  return [*numbers, *ends]


def check_against_reference(dtype, tolerance):
  arrays = draw(dtype)
  rewards, _, next_values, terminated, truncated = arrays
  for discount, decay in ((0.9, 0.7), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)):
    actual = jax.jit(bj.rl.generalised_advantages)(
      *arrays, discount=discount, decay=decay
    )
    assert actual.dtype == dtype
    np.testing.assert_allclose(
      actual,
      reference.advantages(*arrays, discount, decay),
      rtol=tolerance,
      atol=tolerance,
    )
  for steps in (1, 3, 13, 99):
    actual = bj.rl.n_step_returns(
      rewards, next_values, terminated, truncated, discount=0.9, steps=steps
    )
    assert actual.dtype == dtype
    np.testing.assert_allclose(
      actual,
      reference.returns(
        rewards, next_values, terminated, truncated, 0.9, steps
      ),
      rtol=tolerance,
      atol=tolerance,
    )


def test_matches_the_reference_in_float32():
  check_against_reference(np.float32, 3e-6)


def test_matches_the_reference_in_float64(x64):
  check_against_reference(np.float64, 1e-13)


def test_advantages_with_decay_one_are_returns_minus_values():
  """If the value of each next state is that of the next step."""
  rewards, values, _, terminated, _ = draw(np.float32)
  never = np.zeros_like(terminated)
  after = np.concatenate([values[1:], values[:1]])
  actual = bj.rl.generalised_advantages(
    rewards, values, after, terminated, never, discount=0.9, decay=1.0
  )
  returns = bj.rl.n_step_returns(
    rewards, after, terminated, never, discount=0.9, steps=len(rewards)
  )
  np.testing.assert_allclose(actual + values, returns, atol=1e-5)


def test_truncation_bootstraps_and_termination_does_not():
  """One of three steps ends the episode, in either way."""
  never, second = jnp.zeros(3, bool), jnp.arange(3) == 1
  arrays = (jnp.ones(3), jnp.array([0.0, 7.0, 0.0]), jnp.array([7.0, 4.0, 8.0]))
  find = lambda *ends: bj.rl.generalised_advantages(
    *arrays, *ends, discount=0.5, decay=1.0
  )
  # 1 + 7 / 2 at first, 1 + 4 / 2 - 7 or 1 - 7 at the end, 1 + 8 / 2 after it.
  np.testing.assert_allclose(find(never, second), [2.5, -4, 5])
  np.testing.assert_allclose(find(second, never), [1.5, -6, 5])
  np.testing.assert_allclose(find(second, second), [1.5, -6, 5])
  # The next episode does not affect the steps before it.
  moved = [x.at[2].add(100) for x in arrays]
  for ends in ((never, second), (second, never)):
    other = bj.rl.generalised_advantages(*moved, *ends, discount=0.5, decay=1.0)
    np.testing.assert_array_equal(other[:2], find(*ends)[:2])


def test_sums_of_bfloat16_use_float32():
  arrays = [jnp.asarray(x, jnp.bfloat16) for x in draw(np.float32)[:3]]
  never = jnp.zeros(arrays[0].shape, bool)
  actual = bj.rl.generalised_advantages(
    *arrays, never, never, discount=0.9, decay=0.9
  )
  assert actual.dtype == jnp.float32


def test_bad_input_is_an_error():
  ones, no = jnp.ones([3, 2]), jnp.zeros([3, 2], bool)
  with pytest.raises(ValueError, match=r'one shape.*values \(3,\)'):
    bj.rl.generalised_advantages(
      ones, jnp.ones(3), ones, no, no, discount=0.9, decay=0.9
    )
  with pytest.raises(ValueError, match=r'discount is in \[0, 1\], got 1.5'):
    bj.rl.n_step_returns(ones, ones, no, no, discount=1.5, steps=1)
  with pytest.raises(ValueError, match='whole number of steps >= 1'):
    bj.rl.n_step_returns(ones, ones, no, no, discount=0.5, steps=0)
  with pytest.raises(ValueError, match='decay is in'):
    bj.rl.generalised_advantages(
      ones, ones, ones, no, no, discount=0.9, decay=-0.1
    )
