"""Fine-tuning and preference learning in two dimensions, with exact optima.

One prompt has three responses with a log-linear policy over them. Both
objectives are convex in the two parameters, and their minimisers differ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

# Features of the three responses.
FEATURES = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
# Frequencies of demonstrations.
DEMONSTRATED = np.array([0.7, 0.15, 0.15])
# Pairs of (chosen, rejected), and their frequencies.
PAIRS = np.array([[1, 0], [0, 1], [1, 2], [2, 1]])
COMPARED = np.array([0.45, 0.10, 0.30, 0.15])
BETA = 1.0
# Features of the margins, in which a uniform reference cancels.
DIFFERENCES = BETA * (FEATURES[PAIRS[:, 0]] - FEATURES[PAIRS[:, 1]])


def sft_loss(theta: jax.Array, frequencies: jax.Array) -> jax.Array:
  """Minus the mean log-probability; frequencies are (responses,)."""
  logits = jnp.asarray(FEATURES, theta.dtype) @ theta
  return -frequencies @ jax.nn.log_softmax(logits)


def dpo_loss(theta: jax.Array, frequencies: jax.Array) -> jax.Array:
  """The preference loss of pairs; frequencies are (pairs,)."""
  margins = jnp.asarray(DIFFERENCES, theta.dtype) @ theta
  return frequencies @ jax.nn.softplus(-margins)


LOSSES = (sft_loss, dpo_loss)
ALL_DATA = (DEMONSTRATED, COMPARED)


def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws one demonstration and one comparison, as frequencies 0 and 1."""
  keys = jax.random.split(key)
  return tuple(
    jax.nn.one_hot(
      jax.random.categorical(k, jnp.log(jnp.asarray(data, jnp.float32))),
      len(data),
    )
    for k, data in zip(keys, ALL_DATA)
  )


class Optima(NamedTuple):
  """Least values, from which gaps are measured.

  Attributes:
    sft: least fine-tuning loss.
    dpo: least preference loss.
    mix: least weighted sum of both.
    max: least larger weighted gap.
  """

  sft: float
  dpo: float
  mix: float
  max: float


def _plain(theta: np.ndarray) -> tuple[float, float]:
  """Both losses on all data, in NumPy and float64."""
  logits = FEATURES @ theta
  sft = np.logaddexp.reduce(logits) - DEMONSTRATED @ logits
  return sft, COMPARED @ np.logaddexp(0, -DIFFERENCES @ theta)


def _minimum(weights: tuple[float, float]) -> float:
  """The least weighted sum, which is convex and smooth."""
  value = lambda theta: float(np.dot(weights, _plain(theta)))
  result = scipy.optimize.minimize(
    value, np.zeros(2), method='BFGS', options={'gtol': 1e-10}
  )
  return float(result.fun)


def optima(mixing_ratio: float) -> Optima:
  """Least values for a weight of the preference loss.

  By convex duality, the least larger gap is the maximum over weights of the
  least weighted sum of both gaps.
  """
  sft, dpo = _minimum((1.0, 0.0)), _minimum((0.0, 1.0))

  def dual(weight):
    weights = ((1 - weight) * (1 - mixing_ratio), weight * mixing_ratio)
    return _minimum(weights) - weights[0] * sft - weights[1] * dpo

  result = scipy.optimize.minimize_scalar(
    lambda weight: -dual(weight),
    bounds=(0.0, 1.0),
    method='bounded',
    options={'xatol': 1e-9},
  )
  mix = _minimum((1 - mixing_ratio, mixing_ratio))
  return Optima(sft, dpo, mix, float(-result.fun))


def gaps(
  theta: jax.Array, mixing_ratio: float, best: Optima
) -> dict[str, jax.Array]:
  """Gaps of a policy to the least weighted sum and the least larger gap."""
  losses = [
    loss(theta, jnp.asarray(data, theta.dtype))
    for loss, data in zip(LOSSES, ALL_DATA)
  ]
  weights = (1 - mixing_ratio, mixing_ratio)
  mix = weights[0] * losses[0] + weights[1] * losses[1]
  larger = jnp.maximum(
    weights[0] * (losses[0] - best.sft), weights[1] * (losses[1] - best.dpo)
  )
  return {'mix': mix - best.mix, 'max': larger - best.max}
