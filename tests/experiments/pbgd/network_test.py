"""Augmentation, losses and searches of a network's hyperparameters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import bilevel_jax as bj
from experiments import harness, vision
from experiments.pbgd import cleaning_methods, network, network_problem, tuners
from experiments.vision import classifiers
from tests.tiers import first


def parts(seed=0):
  rng = np.random.default_rng(seed)
  images = rng.uniform(size=(40, 784)).astype(np.float32)
  part = vision.DigitPart(jnp.asarray(images), jnp.arange(40) % 10)
  return network_problem.Batch(jax.random.key(seed), part, part)


def test_a_shift_interpolates_between_pixels():
  images = parts().train.images[:3]
  key = jax.random.key(3)
  moved = network_problem.augment(images, 0.0, 2.5, key)
  drawn = jax.random.uniform(jax.random.split(key)[0], (2, 3, 1, 1), minval=-1)
  for i in range(3):
    # scipy moves by (-rows, +columns) for these interpolation matrices.
    offset = [-2.5 * float(drawn[0, i, 0, 0]), -2.5 * float(drawn[1, i, 0, 0])]
    expected = scipy.ndimage.shift(
      np.asarray(images[i], np.float64).reshape(28, 28),
      offset,
      order=1,
      mode='grid-constant',
    )
    np.testing.assert_allclose(
      moved[i].reshape(28, 28), expected, atol=1e-5, rtol=1e-5
    )


def test_noise_has_its_deviation_and_a_derivative():
  images = jnp.zeros((50, 784))
  add = lambda noise: network_problem.augment(
    images, noise, 0.0, jax.random.key(0)
  )
  assert abs(float(jnp.std(add(0.3))) - 0.3) < 0.01
  _, slope = jax.jvp(add, (0.3,), (1.0,))
  np.testing.assert_allclose(slope, add(1.0), rtol=1e-5)


def test_lower_loss_by_hand_without_augmentation():
  classifier = classifiers.make_classifier('mlp')
  problem = network_problem.make(classifier, 8)
  box = network_problem.space(classifier)
  weights = classifier.init(jax.random.key(1))
  batch = parts()
  least = jnp.array([-2.0, -3.0, -30.0, -30.0])
  none = least.at[:2].set(-30.0)
  assert box.names == ('decay_hidden', 'decay_out', 'noise', 'shift')
  squares = [jnp.sum(weights[k]['kernel'] ** 2) for k in ('hidden', 'out')]
  np.testing.assert_allclose(
    problem.lower(least, weights, batch) - problem.lower(none, weights, batch),
    0.5 * (1e-2 * squares[0] + 1e-3 * squares[1]),
    rtol=1e-3,
  )


@pytest.mark.parametrize('name', ['random', 'tpe'])
def test_searches_find_the_minimum_of_a_bowl(name):
  if name == 'tpe':
    pytest.importorskip('optuna')
  box = network_problem.space(classifiers.make_classifier('mlp'))
  search = tuners.make(name, box, (0, 1, 2))
  target = box.low + 0.7 * (box.high - box.low)
  widths = box.high - box.low
  loss = lambda points: np.sum(((points - target) / widths) ** 2, axis=1)
  for _ in range(60):
    points = search.ask()
    assert points.shape == (3, 4)
    assert np.all((points >= box.low) & (points <= box.high))
    search.tell(loss(points))
  middle = np.tile(box.middle, (3, 1))
  assert np.all(loss(search.best()) < loss(middle))
  search.ask()
  search.tell([np.nan] * 3)  # Ranks last.
  assert np.all(loss(search.best()) < loss(middle))


@pytest.mark.parametrize('method', first(network.BILEVEL, count=2))
def test_costs_are_the_counted_gradients(method):
  settings = network.Settings(
    inner_steps=10, batch=8, digits=network.Digits(40, 40, 40)
  )
  given = harness.Options(
    'pbgd', 'network', 'quick', settings, None, None, (0,)
  )
  study = network.Study(given)
  key = jax.random.key(0)
  context = harness.Context((), (), {'rate': 0.1}, key, key, jnp.int32(0))
  solver = study._solver(method, context)
  weights = classifiers.make_classifier('mlp').init(key)
  middle = jnp.asarray(study.space.middle, jnp.float32)
  params = bj.BilevelParams(middle, weights)
  state = solver.init(params)
  step = jax.jit(lambda state: solver.update(parts(), state, params)[1])
  counts = bj.counts(step(state))
  counted = cleaning_methods.total_cost(counts)
  assert counted == network.cost(method, settings.inner_steps), counts


@pytest.mark.slow
def test_searches_train_and_report(tmp_path):
  settings = network.PRESETS['smoke']
  harness.execute(
    network.main,
    harness.Options(
      'pbgd', 'network', 'smoke', settings, str(tmp_path), None, (0, 1)
    ),
  )
  metrics = json.loads((tmp_path / 'results.json').read_text())['metrics']
  for method in settings.methods:
    assert 0 <= metrics[f'test_accuracy/{method}'] <= 1
