"""Classifiers of digits: their sizes, what they compute, their names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.vision import classifiers


@pytest.mark.parametrize(
  ('model', 'weights'), [('linear', 7850), ('mlp', 238510)]
)
def test_models_have_the_published_sizes(model, weights):
  classifier = classifiers.make_classifier(model)
  params = classifier.init(jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(params)) == weights
  assert classifier.apply(params, jnp.zeros((3, 784))).shape == (3, 10)


def test_linear_model_is_affine():
  classifier = classifiers.make_classifier('linear')
  params = classifier.init(jax.random.key(0))
  images = jax.random.uniform(jax.random.key(1), (4, 784))
  kernel, bias = params['out']['kernel'], params['out']['bias']
  np.testing.assert_allclose(
    classifier.apply(params, images), images @ kernel + bias, rtol=1e-5
  )
  assert jnp.abs(kernel).max() <= 1 / 28


def test_unknown_model_names_the_known():
  with pytest.raises(ValueError, match='linear, mlp'):
    classifiers.make_classifier('resnet')
