"""The score function against an enumeration of all trajectories."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj

STATES, ACTIONS, STEPS = 2, 2, 2


def _trajectories(rng):
  """All paths of a dense process: states, actions and their probabilities."""
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


def test_gradients_of_preferences_match_an_enumeration(x64):
  """The mean estimate over all pairs of samples is the exact gradient.

  Costs are cross-entropies of a reward table x with labels of other rewards,
  differentiated in x and in the policy's logits.
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

  weights = np.asarray(jnp.exp(log_probs(logits))) * chance[one] * chance[two]
  samples = rng.choice(len(weights), (4, 2), p=weights / weights.sum())

  @jax.jit
  def of(picked):
    def loss(x, logits):
      return bj.rl.score_function_loss(
        costs(x)[picked], log_probs(logits)[picked]
      )

    return jax.grad(loss, (0, 1))(x, logits)

  want = jax.jit(jax.grad(exact, (0, 1)))(x, logits)
  value, slope, inner = map(
    np.asarray,
    jax.jit(
      lambda: (
        costs(x),
        jax.jacobian(log_probs)(logits),
        jax.jacobian(costs)(x),
      )
    )(),
  )

  def reference_estimate(i, j):
    """The estimate from the samples i and j, which may be arrays."""
    ahead = (value[i] - value[j])[..., None, None]
    return (slope[i] * ahead - slope[j] * ahead) / 2

  for i, j in samples:
    estimate = of(jnp.array([i, j]))
    np.testing.assert_allclose(
      estimate[1], reference_estimate(i, j), rtol=1e-10, atol=1e-14
    )
    np.testing.assert_allclose(
      estimate[0], (inner[i] + inner[j]) / 2, rtol=1e-10
    )
  # Its mean over all pairs of samples is the exact gradient.
  every = np.arange(len(weights))
  mean = sum(
    w
    * np.tensordot(
      weights, reference_estimate(np.full_like(every, i), every), 1
    )
    for i, w in enumerate(weights)
  )
  np.testing.assert_allclose(mean, want[1], rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(
    np.tensordot(weights, inner, 1), want[0], rtol=1e-10
  )


def test_one_sample_and_shapes():
  """One sample has no baseline; float32 is preserved."""
  loss = lambda z: bj.rl.score_function_loss(jnp.array([3.0]), z)
  value, slope = jax.value_and_grad(loss)(jnp.array([-1.0]))
  assert value == 3 and slope.tolist() == [3.0] and slope.dtype == jnp.float32
  with pytest.raises(ValueError, match=r'shape \(samples,\), got \(2,\) and'):
    bj.rl.score_function_loss(jnp.zeros(2), jnp.zeros(3))
