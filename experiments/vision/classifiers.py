"""Classifiers of digits, their cross-entropy and accuracy."""

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments import harness
from experiments.vision.digits import CLASSES, SIDE

PIXELS, HIDDEN = SIDE**2, 300


class _Linear(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.out = _dense(PIXELS, CLASSES, rngs)

  def __call__(self, images):
    return self.out(images)


class _Mlp(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.hidden = _dense(PIXELS, HIDDEN, rngs)
    self.out = _dense(HIDDEN, CLASSES, rngs)

  def __call__(self, images):
    return self.out(jax.nn.sigmoid(self.hidden(images)))


class _Cnn(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.first = nnx.Conv(1, 8, (5, 5), strides=2, rngs=rngs)
    self.second = nnx.Conv(8, 16, (5, 5), strides=2, rngs=rngs)
    self.out = _dense(16 * (SIDE // 4) ** 2, CLASSES, rngs)

  def __call__(self, images):
    features = images.reshape(*images.shape[:-1], SIDE, SIDE, 1)
    for layer in (self.first, self.second):
      features = jax.nn.relu(layer(features))
    return self.out(features.reshape(*images.shape[:-1], -1))


def _dense(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
  # Uniform within 1 / sqrt(inputs), as in the released code.
  kernel = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
  return nnx.Linear(
    inputs,
    outputs,
    kernel_init=kernel,
    dot_general=harness.thin_dot_general,
    rngs=rngs,
  )


MODELS = {'linear': _Linear, 'mlp': _Mlp, 'cnn': _Cnn}


def make_classifier(name: str) -> harness.Network:
  """Makes a classifier.

  Args:
    name: 'linear' (784-10), 'mlp' (784-300-sigmoid-10) or 'cnn' (two
      convolutions 5 x 5 of 8 and 16 channels and stride 2, then a dense layer).
  """
  if name not in MODELS:
    raise harness.SettingsError(
      f'unknown model {name!r}; known: {", ".join(MODELS)}.'
    )
  return harness.pure(MODELS[name])


def cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Cross-entropy of each digit, (n,)."""
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def accuracy(
  logits: chex.Array,
  labels: chex.Array,
  weights: chex.Array | None = None,
) -> chex.Array:
  """Share of the digits whose largest logit is that of the label.

  Args:
    logits: (n, classes).
    labels: (n,).
    weights: (n,), nonnegative; None for equal ones.
  """
  right = jnp.argmax(logits, axis=-1) == labels
  return mean(right.astype(jnp.float32), weights)


def mean(values: chex.Array, weights: chex.Array | None = None) -> chex.Array:
  """Mean of the values (n,), weighted by weights (n,) if given."""
  if weights is None:
    return jnp.mean(values)
  return jnp.sum(weights * values) / jnp.sum(weights)
