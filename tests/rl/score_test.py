"""The score function against trajectories that are all enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj

STATES, ACTIONS, STEPS = 2, 2, 2


def _trajectories(rng):
  """All paths of a dense process: states, actions, and what chance adds."""
  moves = rng.dirichlet(np.ones(STATES), (STATES, ACTIONS))
  paths = []
  for first in range(STATES):
    for actions in itertools.product(range(ACTIONS), repeat=STEPS):
      for states in itertools.product(range(STATES), repeat=STEPS - 1):
        path = (first, *states)
        chance = [0.3, 0.7][first]
        for t in range(STEPS - 1):
          chance *= moves[path[t], actions[t], path[t + 1]]
        paths.append((path, actions, chance))
  states, actions, chance = map(np.array, zip(*paths, strict=True))
  assert abs((chance.sum() / ACTIONS**STEPS) - 1) < 1e-12
  return states, actions, chance


def test_preferences_of_pairs_against_enumeration(x64):
  """Mean of the estimate over all samples of two pairs: the exact gradient.

  Costs are cross-entropies under a table of rewards x, labels of other rewards:
  the gradients in x and in the policy's logits.
  """
  rng = np.random.default_rng(0)
  states, actions, chance = _trajectories(rng)
  logits = jnp.asarray(rng.normal(size=(STATES, ACTIONS)))
  x = jnp.asarray(rng.normal(size=(STATES, ACTIONS)))
  true = rng.normal(size=(STATES, ACTIONS))[states, actions].sum(1)
  count = len(chance)
  one, two = (a.ravel() for a in np.indices((count, count)))
  labels = 1 / (1 + np.exp(true[one] - true[two]))

  def costs(x):
    total = x[states, actions].sum(1)
    margin = total[two] - total[one]
    return -labels * jax.nn.log_sigmoid(margin) - (
      1 - labels
    ) * jax.nn.log_sigmoid(-margin)

  def log_probs(logits):
    each = jax.nn.log_softmax(logits)[states, actions].sum(1)
    return each[one] + each[two]

  def exact(x, logits):
    weights = jnp.exp(log_probs(logits)) * chance[one] * chance[two]
    return weights @ costs(x)

  weights = np.exp(log_probs(logits)) * chance[one] * chance[two]
  # The estimate is linear in samples but for the baseline, the other's cost.
  pairs = rng.choice(len(weights), (4_000, 2), p=weights / weights.sum())

  @jax.jit
  def of(picked):
    def loss(x, logits):
      return bj.rl.score_function_loss(
        costs(x)[picked], log_probs(logits)[picked]
      )

    return jax.grad(loss, (0, 1))(x, logits)

  want = jax.jit(jax.grad(exact, (0, 1)))(x, logits)
  # All ordered samples of two, by their weights, in one sum.
  value, slope = costs(x), jax.jacobian(log_probs)(logits)
  inner = jax.jacobian(costs)(x)
  mean_x = jnp.tensordot(weights, inner, 1)
  centred = value - weights @ value  # The other's cost is independent.
  mean_y = jnp.tensordot(weights * centred, slope, 1)
  np.testing.assert_allclose(mean_x, want[0], rtol=1e-10)
  np.testing.assert_allclose(mean_y, want[1], rtol=1e-9, atol=1e-12)
  for i, j in pairs[:3]:
    found = of(jnp.array([i, j]))
    by_hand = (
      slope[i] * (value[i] - value[j]) + slope[j] * (value[j] - value[i])
    ) / 2
    np.testing.assert_allclose(found[1], by_hand, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found[0], (inner[i] + inner[j]) / 2, rtol=1e-10)
  found = jax.tree.map(lambda g: g.mean(0), jax.vmap(of)(jnp.asarray(pairs)))
  spread = 5 * np.std(jax.vmap(of)(jnp.asarray(pairs))[1], axis=0) / 4_000**0.5
  assert np.all(np.abs(found[1] - want[1]) < spread)


def test_one_sample_and_shapes():
  """Alone, a sample has no baseline; float32 stays so."""
  loss = lambda z: bj.rl.score_function_loss(jnp.array([3.0]), z)
  value, slope = jax.value_and_grad(loss)(jnp.array([-1.0]))
  assert value == 3 and slope.tolist() == [3.0] and slope.dtype == jnp.float32
  with pytest.raises(ValueError, match=r'shape \(samples,\), got \(2,\) and'):
    bj.rl.score_function_loss(jnp.zeros(2), jnp.zeros(3))
