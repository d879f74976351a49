"""Methods of hyper-cleaning: cost and first updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import vision
from experiments.pbgd import cleaning, cleaning_methods
from experiments.vision import classifiers
from tests.tiers import first


def batch():
  images = jax.random.uniform(jax.random.key(0), (6, 784))
  labels = jnp.array([0, 1, 2, 3, 4, 5])
  return cleaning.CleaningBatch(
    images[:4], labels[:4], vision.DigitPart(images[4:], labels[4:])
  )


@pytest.mark.parametrize('method', first(cleaning_methods.BILEVEL, count=2))
def test_cost_equals_the_counts_of_an_update(method):
  classifier = classifiers.make_classifier('linear')
  solver = cleaning_methods.make_solver(
    method,
    'linear',
    classifier,
    updates=40,
    scale=jnp.float32(0.5),
    recipe=cleaning_methods.RECIPES['v_pbgd', 'linear']
    if method == 'suggested'
    else None,
  )
  params = bj.BilevelParams(jnp.zeros(4), classifier.init(jax.random.key(1)))
  updates, state = jax.jit(solver.update)(batch(), solver.init(params), params)
  cost = cleaning_methods.total_cost(bj.counts(state))
  assert cost == cleaning_methods.cost(method, 'linear')
  assert jnp.abs(updates.lower['out']['kernel']).max() > 0
  if method in ('v_pbgd', 'g_pbgd', 'f2sa', 'suggested'):
    # The published penalty is 0 in the first step: no logit moves.
    assert not updates.upper.any()
  else:
    assert updates.upper.any()


@pytest.mark.parametrize('method', cleaning_methods.BILEVEL)
def test_budget_is_that_of_v_pbgd(method):
  updates, chunk = cleaning_methods.updates(
    method, 'linear', steps=4_000, chunk=50
  )
  assert updates % chunk == 0
  spent = updates * cleaning_methods.cost(method, 'linear')
  assert 0.6 * 16_000 < spent <= 16_000


def test_scale_multiplies_the_step():
  classifier = classifiers.make_classifier('linear')
  params = classifier.init(jax.random.key(1))
  digits = cleaning.WeightedBatch(
    batch().train_images, batch().train_labels, jnp.ones(4)
  )

  def move(scale):
    solver = cleaning_methods.make_solver(
      'plain', 'linear', classifier, updates=1, scale=scale
    )
    return solver.update(digits, solver.init(params), params)[0]

  one, three = move(1.0), move(3.0)
  np.testing.assert_allclose(
    three['out']['kernel'], 3 * one['out']['kernel'], rtol=1e-5, atol=1e-8
  )


@pytest.mark.slow
def test_suggested_steps_are_stable():
  classifier = classifiers.make_classifier('linear')
  recipe = cleaning_methods.suggested_recipe(
    classifier, batch(), jax.random.key(0)
  )
  # Descent diverges above twice the inverse curvature; that of softmax
  # regression on pixels in [0, 1] is at most half the squared pixel norm.
  largest = jnp.max(jnp.sum(batch().train_images ** 2, axis=1)) / 2
  assert 0.1 / largest < recipe.value < 100 / largest
  assert recipe.penalty > 0
  assert recipe.upper == recipe.lower > 0
