"""Losses and F1 score of hyper-cleaning."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import vision
from experiments.pbgd import cleaning
from experiments.vision import classifiers


def test_f1_by_hand():
  keep = jnp.array([True, True, True, False])
  dirty = jnp.array([True, False, False, False])
  # Precision and recall are both 2/3.
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
    classifier = classifiers.make_classifier('linear')
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

  def test_clean_digits_of_weight_0_do_not_count(self):
    classifier = classifiers.make_classifier('linear')
    problem = cleaning.cleaning_problem(classifier)
    params = classifier.init(jax.random.key(2))
    batch = self.batch()
    first = jax.tree.map(lambda x: x[:1], batch.validation)
    counted = batch._replace(validation_weights=jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(
      problem.upper(jnp.zeros(4), params, counted),
      problem.upper(jnp.zeros(4), params, batch._replace(validation=first)),
      rtol=1e-5,
    )

  def test_plain_loss_is_a_weighted_mean(self):
    classifier = classifiers.make_classifier('linear')
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
