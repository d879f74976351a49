"""Fine-tuning against preference in two dimensions, with exact optima.

One prompt with three responses and a log-linear policy over them: both
objectives are convex in the two parameters, their minimisers differ, and no
stage of one remembers the other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

# Of the three responses.
FEATURES = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
# How often each is the demonstration.
DEMONSTRATED = np.array([0.7, 0.15, 0.15])
# Pairs of (chosen, rejected), and how often each is the comparison.
PAIRS = np.array([[1, 0], [0, 1], [1, 2], [2, 1]])
COMPARED = np.array([0.45, 0.10, 0.30, 0.15])
BETA = 1.0
# Of the pairs; a uniform reference drops out of the margins.
DIFFERENCES = BETA * (FEATURES[PAIRS[:, 0]] - FEATURES[PAIRS[:, 1]])


def sft_loss(theta: jax.Array, share: jax.Array) -> jax.Array:
  """Minus the mean log-probability of responses; share is (responses,)."""
  logits = jnp.asarray(FEATURES, theta.dtype) @ theta
  return -share @ jax.nn.log_softmax(logits)


def dpo_loss(theta: jax.Array, share: jax.Array) -> jax.Array:
  """The preference loss of pairs; share is (pairs,)."""
  return share @ jax.nn.softplus(-jnp.asarray(DIFFERENCES, theta.dtype) @ theta)


LOSSES = (sft_loss, dpo_loss)
ALL_DATA = (DEMONSTRATED, COMPARED)


def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """One demonstration and one comparison, as shares of 0 and 1."""
  keys = jax.random.split(key)
  return tuple(
    jax.nn.one_hot(
      jax.random.categorical(k, jnp.log(jnp.asarray(share, jnp.float32))),
      len(share),
    )
    for k, share in zip(keys, ALL_DATA)
  )


class Optima(NamedTuple):
  """The least values that gaps are measured from.

  Attributes:
    sft: of the fine-tuning loss.
    dpo: of the preference loss.
    mix: of the weighted sum of both.
    max: of the larger weighted gap.
  """

  sft: float
  dpo: float
  mix: float
  max: float


def _plain(theta: np.ndarray) -> tuple[float, float]:
  """Both losses on all data, float64, without JAX."""
  logits = FEATURES @ theta
  sft = np.logaddexp.reduce(logits) - DEMONSTRATED @ logits
  return sft, COMPARED @ np.logaddexp(0, -DIFFERENCES @ theta)


def _least(weights: tuple[float, float]) -> float:
  """The least weighted sum; convex and smooth."""
  value = lambda theta: float(np.dot(weights, _plain(theta)))
  found = scipy.optimize.minimize(
    value, np.zeros(2), method='BFGS', options={'gtol': 1e-10}
  )
  return float(found.fun)


def optima(share: float) -> Optima:
  """Least values for a share of the preference loss.

  The least larger gap is the largest least mix of the two gaps, by duality of
  convex problems.
  """
  sft, dpo = _least((1.0, 0.0)), _least((0.0, 1.0))

  def dual(weight):
    weights = ((1 - weight) * (1 - share), weight * share)
    return _least(weights) - weights[0] * sft - weights[1] * dpo

  found = scipy.optimize.minimize_scalar(
    lambda weight: -dual(weight),
    bounds=(0.0, 1.0),
    method='bounded',
    options={'xatol': 1e-9},
  )
  return Optima(sft, dpo, _least((1 - share, share)), float(-found.fun))


def gaps(theta: jax.Array, share: float, best: Optima) -> dict[str, jax.Array]:
  """How far a policy is from the best mix, and from the best larger gap."""
  losses = [
    loss(theta, jnp.asarray(data, theta.dtype))
    for loss, data in zip(LOSSES, ALL_DATA)
  ]
  mix = (1 - share) * losses[0] + share * losses[1]
  larger = jnp.maximum(
    (1 - share) * (losses[0] - best.sft), share * (losses[1] - best.dpo)
  )
  return {'mix': mix - best.mix, 'max': larger - best.max}
