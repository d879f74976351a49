"""Federated problems on digits: hyper-representation and loss tuning."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.aipod import client_digits

CLASSES = client_digits.CLASSES


class Task(NamedTuple):
  """One federated problem.

  Attributes:
    problem: losses of one client on a `client_digits.Batch`.
    init: maps a PRNG key and the number of pixels to the params of one client.
    logits: maps (params, images) to logits (n, 10).
  """

  problem: bj.BilevelProblem
  init: Callable[[chex.PRNGKey, int], bj.BilevelParams]
  logits: Callable[[bj.BilevelParams, Any], Any]


def _dense(key, inputs, outputs):
  bound = inputs**-0.5
  weights, bias = jax.random.split(key)
  uniform = lambda key, *shape: jax.random.uniform(
    key, shape, minval=-bound, maxval=bound
  )
  return {'w': uniform(weights, inputs, outputs), 'b': uniform(bias, outputs)}


def _apply(layer, inputs):
  return harness.thin_product(inputs, layer['w']) + layer['b']


def _cross_entropy(logits, labels):
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, labels
  )
  return losses.mean()


def _ridge(weights, decay):
  return decay * optax.tree.norm(weights, squared=True)


def hyper_representation(hidden: int, decay: float) -> Task:
  """Learns a hidden layer on validation digits, the last on training digits.

  Args:
    hidden: hidden units.
    decay: weight decay of the last layer.

  Returns:
    A `Task`.
  """

  def logits(params, images):
    return _apply(params.lower, jax.nn.relu(_apply(params.upper, images)))

  def upper(x, y, batch):
    images, labels = batch.validation
    return _cross_entropy(logits(bj.BilevelParams(x, y), images), labels)

  def lower(x, y, batch):
    images, labels = client_digits.train_part(batch)
    loss = _cross_entropy(logits(bj.BilevelParams(x, y), images), labels)
    return loss + _ridge(y, decay)

  def init(key, pixels):
    one, two = jax.random.split(key)
    return bj.BilevelParams(
      _dense(one, pixels, hidden), _dense(two, hidden, CLASSES)
    )

  return Task(bj.BilevelProblem(upper, lower), init, logits)


def loss_tuning(hidden: int, decay: float, prior: Any) -> Task:
  """Learns a scale and a shift per class, for imbalanced training digits.

  The lower loss is the vector-scaling loss. The upper loss is the cross-entropy
  with classes weighted by their inverse frequency.

  Args:
    hidden: hidden units; 0 for a linear network, whose lower loss is strongly
      convex.
    decay: weight decay of the network.
    prior: class frequencies of the clients' digits, (10,).

  Returns:
    A `Task`.
  """
  weights = jnp.asarray(1 / (CLASSES * np.asarray(prior)), jnp.float32)

  def network(y, images):
    if hidden:
      images = jax.nn.relu(_apply(y['first'], images))
    return _apply(y['last'], images)

  def upper(x, y, batch):
    del x
    images, labels = batch.validation
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      network(y, images), labels
    )
    return jnp.mean(weights[labels] * losses)

  def lower(x, y, batch):
    images, labels = client_digits.train_part(batch)
    scaled = jnp.exp(x['scale']) * network(y, images) + x['shift']
    return _cross_entropy(scaled, labels) + _ridge(y, decay)

  def init(key, pixels):
    one, two = jax.random.split(key)
    layers = {'last': _dense(two, hidden or pixels, CLASSES)}
    if hidden:
      layers['first'] = _dense(one, pixels, hidden)
    return bj.BilevelParams(
      {'scale': jnp.zeros(CLASSES), 'shift': jnp.zeros(CLASSES)}, layers
    )

  logits = lambda params, images: network(params.lower, images)
  return Task(bj.BilevelProblem(upper, lower), init, logits)


def accuracy(logits: Any, labels: Any, *, balanced: bool) -> Any:
  """Accuracy; if `balanced`, the mean of the accuracies per class."""
  right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
  if not balanced:
    return right.mean()
  member = jax.nn.one_hot(labels, CLASSES)
  return jnp.mean(right @ member / jnp.maximum(member.sum(axis=0), 1))
