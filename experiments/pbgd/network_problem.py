"""Losses of a network with weight decays and augmentation, and their space."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness, vision
from experiments.vision import classifiers

DECAYS = (-6.0, -1.0)  # Decimal logarithms of a decay, at least and at most.
NOISE = (-2.0, 0.0)  # Of the noise of a pixel, whose range is [0, 1].
SHIFT = (-1.0, 0.8)  # Of the largest shift, in pixels.


class Space(NamedTuple):
  """A box of hyperparameters, as decimal logarithms.

  Attributes:
    names: name of each number.
    low: smallest values, (numbers,).
    high: largest values, (numbers,).
  """

  names: tuple[str, ...]
  low: np.ndarray
  high: np.ndarray

  @property
  def middle(self) -> np.ndarray:
    """The middle of the box."""
    return (self.low + self.high) / 2

  def project(self, point: Any) -> Any:
    """The nearest point of the box."""
    return jnp.clip(point, self.low, self.high)

  def named(self, point: Any) -> dict[str, Any]:
    """The numbers of a point by name."""
    return {name: point[i] for i, name in enumerate(self.names)}


def space(classifier: harness.Network) -> Space:
  """The hyperparameters of a network: a decay per layer, noise and shift."""
  layers = list(_kernels(jax.eval_shape(classifier.init, jax.random.key(0))))
  ranges = np.asarray([*[DECAYS] * len(layers), NOISE, SHIFT])
  names = (*(f'decay_{layer}' for layer in layers), 'noise', 'shift')
  return Space(names, ranges[:, 0], ranges[:, 1])


def by_hand(box: Space) -> np.ndarray:
  """Five points with equal decays and no augmentation, (5, numbers)."""
  points = np.tile(box.low, (5, 1))
  points[:, :-2] = np.linspace(-5, -1, 5)[:, None]
  return points


class Batch(NamedTuple):
  """All digits; a loss draws some.

  Attributes:
    key: PRNG key of the digits that are drawn, and of their augmentation.
    train: training digits.
    validation: digits of the upper loss.
  """

  key: chex.PRNGKey
  train: vision.DigitPart
  validation: vision.DigitPart

  def later(self, step: chex.Array) -> 'Batch':
    """The batch of an inner step."""
    return self._replace(key=jax.random.fold_in(self.key, 2 + step))


def make(classifier: harness.Network, size: int) -> bj.BilevelProblem:
  r"""Makes the problem on a `Batch`.

  .. math::
    f(y) = E \, \ell(y; \text{validation}), \qquad
    g(x, y) = E \, \ell(y; T_x(\text{train}))
      + \frac{1}{2} \sum_i 10^{x_i} \lVert y_i \rVert^2

  The transformation T shifts an image by at most :math:`10^{shift}` pixels and
  adds noise to each pixel.

  Args:
    classifier: its weights are the lower variable.
    size: digits that a loss draws.
  """

  def draw(part, key):
    rows = jax.random.randint(key, (size,), 0, len(part.labels))
    return part.images[rows], part.labels[rows]

  def mean_loss(weights, images, labels):
    logits = classifier.apply(weights, images)
    return jnp.mean(classifiers.cross_entropy(logits, labels))

  def upper(hyper, weights, batch):
    del hyper
    key = jax.random.fold_in(batch.key, 1)
    return mean_loss(weights, *draw(batch.validation, key))

  def lower(hyper, weights, batch):
    of_rows, of_images = jax.random.split(jax.random.fold_in(batch.key, 0))
    images, labels = draw(batch.train, of_rows)
    noise, shift = 10.0 ** hyper[-2], 10.0 ** hyper[-1]
    images = augment(images, noise, shift, of_images)
    decays = 10.0 ** hyper[:-2]
    squares = [jnp.sum(w**2) for w in _kernels(weights).values()]
    penalty = jnp.sum(decays * jnp.stack(squares)) / 2
    return mean_loss(weights, images, labels) + penalty

  return bj.BilevelProblem(upper, lower)


def augment(
  images: chex.Array,
  noise: chex.Numeric,
  shift: chex.Numeric,
  key: chex.PRNGKey,
) -> chex.Array:
  """Shifts each image at random and adds noise, differentiably.

  Args:
    images: (n, 784).
    noise: standard deviation of the noise of a pixel.
    shift: largest shift along each axis, in pixels; linear interpolation
      between pixels, zeros beyond the edge.
    key: PRNG key.
  """
  of_shift, of_noise = jax.random.split(key)
  side = vision.SIDE
  drawn = jax.random.uniform(of_shift, (2, len(images), 1, 1), minval=-1)
  grid = jnp.arange(side, dtype=images.dtype)
  distance = grid[:, None] - grid + shift * drawn
  rows, columns = jnp.maximum(0, 1 - jnp.abs(distance))
  square = images.reshape(-1, side, side)
  moved = jnp.einsum('nij,njk,nlk->nil', rows, square, columns)
  added = noise * jax.random.normal(of_noise, images.shape)
  return moved.reshape(images.shape) + added


def _kernels(weights: Any) -> dict[str, Any]:
  """The matrices and convolutions of a network by layer, without biases."""
  leaves = jax.tree_util.tree_leaves_with_path(weights)
  return {path[0].key: leaf for path, leaf in leaves if leaf.ndim > 1}
