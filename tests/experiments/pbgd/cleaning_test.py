"""The parts of hyper-cleaning: digits, noise, models, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import vision
from experiments.pbgd import cleaning


@pytest.mark.parametrize(
  ('model', 'weights'), [('linear', 7850), ('mlp', 238510)]
)
def test_models_have_the_published_sizes(model, weights):
  classifier = vision.make_classifier(model)
  params = classifier.init(jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(params)) == weights
  assert classifier.apply(params, jnp.zeros((3, 784))).shape == (3, 10)


def test_linear_model_is_affine():
  classifier = vision.make_classifier('linear')
  params = classifier.init(jax.random.key(0))
  images = jax.random.uniform(jax.random.key(1), (4, 784))
  kernel, bias = params['out']['kernel'], params['out']['bias']
  np.testing.assert_allclose(
    classifier.apply(params, images), images @ kernel + bias, rtol=1e-5
  )
  assert jnp.abs(kernel).max() <= 1 / 28


def test_unknown_model_names_the_known():
  with pytest.raises(ValueError, match='linear, mlp'):
    vision.make_classifier('resnet')


def test_f1_by_hand():
  keep = jnp.array([True, True, True, False])
  dirty = jnp.array([True, False, False, False])
  # Two of three kept are clean, two of three clean are kept.
  np.testing.assert_allclose(cleaning.f1_score(keep, dirty), 2 / 3, rtol=1e-6)
  assert cleaning.f1_score(jnp.zeros(4, bool), dirty) == 0


class TestProblem:
  def batch(self):
    images = jax.random.uniform(jax.random.key(0), (6, 784))
    labels = jnp.array([0, 1, 2, 3, 4, 5])
    return cleaning.CleaningBatch(
      images[:4], labels[:4], vision.DigitPart(images[4:], labels[4:])
    )

  def test_losses_by_hand(self):
    classifier = vision.make_classifier('linear')
    problem = cleaning.cleaning_problem(classifier)
    params = classifier.init(jax.random.key(2))
    logits = jnp.array([-1.0, 0.0, 1.0, 2.0])
    batch = self.batch()

    def losses(images, labels):
      scores = jax.nn.log_softmax(classifier.apply(params, images))
      return -scores[jnp.arange(len(labels)), labels]

    weights = 1 / (1 + jnp.exp(-logits))
    np.testing.assert_allclose(
      problem.lower(logits, params, batch),
      jnp.mean(weights * losses(batch.train_images, batch.train_labels)),
      rtol=1e-5,
    )
    np.testing.assert_allclose(
      problem.upper(logits, params, batch),
      jnp.mean(losses(*batch.validation)),
      rtol=1e-5,
    )

  def test_plain_loss_is_a_weighted_mean(self):
    classifier = vision.make_classifier('linear')
    params = classifier.init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (4, 784))
    labels = jnp.array([0, 1, 2, 3])
    loss = cleaning.weighted_loss(classifier)
    some = loss(
      params,
      cleaning.WeightedBatch(images, labels, jnp.array([1.0, 0.0, 1.0, 0.0])),
    )
    part = loss(
      params, cleaning.WeightedBatch(images[::2], labels[::2], jnp.ones(2))
    )
    np.testing.assert_allclose(some, part, rtol=1e-6)
