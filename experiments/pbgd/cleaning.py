"""Data hyper-cleaning: the two losses.

The upper variable holds a logit for each training digit, the lower one is a
classifier. The lower loss is the weighted loss on polluted training digits, the
upper loss that on a few clean digits.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

import bilevel_jax as bj
from experiments import harness, vision
from experiments.vision import classifiers

PARTS = ('train', 'validation', 'selection', 'test')


def f1_score(keep: chex.Array, dirty: chex.Array) -> chex.Array:
  """F1 of keeping the clean digits.

  Args:
    keep: bool (n,), the digits kept.
    dirty: bool (n,), the digits whose label was redrawn.

  Returns:
    The harmonic mean of the share of clean digits among the kept ones and the
    share of kept digits among the clean ones; 0 if no clean digit is kept.
  """
  clean_kept = jnp.sum(keep & ~dirty)
  return 2 * clean_kept / jnp.maximum(jnp.sum(keep) + jnp.sum(~dirty), 1)


class CleaningBatch(NamedTuple):
  """What the two losses see: everything, the losses are full-batch.

  Attributes:
    train_images: (n, 784).
    train_labels: (n,), polluted.
    validation: the clean digits of the upper loss.
  """

  train_images: chex.Array
  train_labels: chex.Array
  validation: vision.DigitPart


def cleaning_problem(classifier: harness.Network) -> bj.BilevelProblem:
  r"""The nested problem of hyper-cleaning.

  .. math::
    f(x, y) = \frac{1}{m} \sum_{j} \ell(y; \text{clean}_j), \qquad
    g(x, y) = \frac{1}{n} \sum_{i} \sigma(x_i) \, \ell(y; \text{polluted}_i)

  Args:
    classifier: whose weights are the lower variable.

  Returns:
    A problem on `CleaningBatch`; the upper variable is (n,).
  """

  def upper(logits, weights, batch):
    del logits
    images, labels = batch.validation
    return jnp.mean(
      classifiers.cross_entropy(classifier.apply(weights, images), labels)
    )

  def lower(logits, weights, batch):
    losses = classifiers.cross_entropy(
      classifier.apply(weights, batch.train_images), batch.train_labels
    )
    return jnp.mean(jax.nn.sigmoid(logits) * losses)

  return bj.BilevelProblem(upper, lower)


class WeightedBatch(NamedTuple):
  """Digits with a weight each.

  Attributes:
    images: (n, 784).
    labels: (n,).
    weights: float (n,), not negative.
  """

  images: chex.Array
  labels: chex.Array
  weights: chex.Array


def weighted_loss(classifier: harness.Network) -> Callable[..., chex.Array]:
  """The mean loss of a classifier over weighted digits, one level."""

  def loss(params, batch):
    losses = classifiers.cross_entropy(
      classifier.apply(params, batch.images), batch.labels
    )
    return jnp.sum(batch.weights * losses) / jnp.sum(batch.weights)

  return loss
