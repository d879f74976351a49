"""Losses of data hyper-cleaning.

The upper variable is one logit per training digit, the lower one a classifier.
The lower loss weights the polluted training digits; the upper loss is the mean
over a few clean digits.
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
  """F1 score of keeping the clean digits.

  Args:
    keep: bool (n,), True for a kept digit.
    dirty: bool (n,), True for a digit whose label was redrawn.

  Returns:
    The harmonic mean of precision (clean among kept) and recall (kept among
    clean); 0 if no clean digit is kept.
  """
  clean_kept = jnp.sum(keep & ~dirty)
  return 2 * clean_kept / jnp.maximum(jnp.sum(keep) + jnp.sum(~dirty), 1)


class CleaningBatch(NamedTuple):
  """Batch of both losses, which are full-batch.

  Attributes:
    train_images: (n, 784).
    train_labels: (n,), polluted.
    validation: clean digits of the upper loss.
    validation_weights: (m,), 1 for a digit that counts; None if all do.
  """

  train_images: chex.Array
  train_labels: chex.Array
  validation: vision.DigitPart
  validation_weights: chex.Array | None = None


def cleaning_problem(classifier: harness.Network) -> bj.BilevelProblem:
  r"""Makes the bilevel problem of hyper-cleaning.

  .. math::
    f(x, y) = \frac{1}{m} \sum_{j} \ell(y; \text{clean}_j), \qquad
    g(x, y) = \frac{1}{n} \sum_{i} \sigma(x_i) \, \ell(y; \text{polluted}_i)

  Args:
    classifier: its weights are the lower variable.

  Returns:
    A problem on `CleaningBatch`; the upper variable is (n,).
  """

  def upper(logits, weights, batch):
    del logits
    images, labels = batch.validation
    losses = classifiers.cross_entropy(
      classifier.apply(weights, images), labels
    )
    return classifiers.mean(losses, batch.validation_weights)

  def lower(logits, weights, batch):
    losses = classifiers.cross_entropy(
      classifier.apply(weights, batch.train_images), batch.train_labels
    )
    return jnp.mean(jax.nn.sigmoid(logits) * losses)

  return bj.BilevelProblem(upper, lower)


class WeightedBatch(NamedTuple):
  """Digits with one weight per digit.

  Attributes:
    images: (n, 784).
    labels: (n,).
    weights: float (n,), nonnegative.
  """

  images: chex.Array
  labels: chex.Array
  weights: chex.Array


def weighted_loss(classifier: harness.Network) -> Callable[..., chex.Array]:
  """Makes the single-level weighted mean loss of a classifier."""

  def loss(params, batch):
    losses = classifiers.cross_entropy(
      classifier.apply(params, batch.images), batch.labels
    )
    return classifiers.mean(losses, batch.weights)

  return loss
