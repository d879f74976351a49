"""Construction of decision processes: defaults, checks and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from tests.rl import reference


def test_fields_and_defaults():
  moves, rewards, first, _ = reference.process()
  mdp = bj.rl.make_mdp(moves, rewards, discount=0.9, initial=first)
  assert {x.dtype for x in mdp} == {jnp.dtype(jnp.float32)}
  np.testing.assert_allclose(mdp.transitions, moves, rtol=1e-6)
  np.testing.assert_allclose(mdp.initial, first, rtol=1e-6)
  plain = bj.rl.make_mdp([[[1, 0]], [[0, 1]]], [[1], [2]], discount=0)
  np.testing.assert_array_equal(plain.initial, [0.5, 0.5])
  assert plain.rewards.dtype == jnp.float32


def test_rewards_of_the_next_state_are_averaged(x64):
  moves, _, _, _ = reference.process()
  rewards = np.random.default_rng(1).normal(size=moves.shape)
  mdp = bj.rl.make_mdp(moves, rewards, discount=0.9)
  assert mdp.rewards.dtype == jnp.float64
  np.testing.assert_allclose(
    mdp.rewards, np.einsum('sat,sat->sa', moves, rewards)
  )


@pytest.mark.parametrize(
  'changed, message',
  [
    ({'transitions': np.ones((5, 3, 5))}, r'transitions\[0, 0\] is not a prob'),
    ({'transitions': np.ones((5, 3, 4)) / 4}, r'shape \(states, actions, s'),
    ({'transitions': np.zeros((0, 3, 0))}, r'shape \(states, actions, s'),
    ({'rewards': np.zeros((5, 2))}, r'have the shape \(5, 3\) or \(5, 3, 5\)'),
    ({'rewards': np.full((5, 3), np.nan)}, r'reward at \[0, 0\] is not finite'),
    ({'initial': np.ones(5)}, 'initial is not a probability'),
    ({'initial': np.full(4, 0.25)}, r'initial has the shape \(5,\)'),
    ({'initial': np.array([2, -1, 0, 0, 0])}, 'smallest entry -1'),
    ({'discount': 1.0}, r'discount is in \[0, 1\), got 1'),
    ({'discount': -0.1}, 'discount is a finite number >= 0, got -0.1'),
    ({'discount': np.nan}, 'discount is a finite number >= 0, got nan'),
    ({'discount': np.zeros(2)}, 'discount is a scalar'),
  ],
)  # fmt: skip
def test_invalid_arguments_are_errors(changed, message):
  moves, rewards, first, _ = reference.process()
  fields = {
    'transitions': moves, 'rewards': rewards, 'initial': first, 'discount': 0.9,
  } | changed  # fmt: skip
  with pytest.raises(ValueError, match=message):
    bj.rl.make_mdp(**fields)


def test_a_row_with_a_negative_or_missing_entry_is_named():
  moves, rewards, _, _ = reference.process()
  for entry in (-0.5, np.nan):
    wrong = moves.copy()
    wrong[3, 1, 2] = entry
    with pytest.raises(ValueError, match=r'transitions\[3, 1\]'):
      bj.rl.make_mdp(wrong, rewards, discount=0.9)


def test_only_shapes_of_traced_fields_are_checked():
  moves, rewards, _, policy = reference.process()

  @jax.jit
  def value(moves, rewards, discount):
    mdp = bj.rl.make_mdp(moves, rewards, discount=discount)
    return bj.rl.expected_return(mdp, jnp.asarray(policy, jnp.float32))

  assert jnp.isfinite(value(moves, rewards, 0.9))
  with pytest.raises(ValueError, match='have the shape'):
    value(moves, rewards[:2], 0.9)


def test_random_processes_are_valid():
  one, two = (bj.rl.random_mdp(seed, states=6, actions=2) for seed in (0, 1))
  np.testing.assert_allclose(one.transitions.sum(-1), 1, rtol=1e-6)
  assert one.rewards.min() >= 0 and one.rewards.max() <= 1
  assert not np.allclose(one.rewards, two.rewards)
  with pytest.raises(ValueError, match='states >= 1'):
    bj.rl.random_mdp(0, states=0)
