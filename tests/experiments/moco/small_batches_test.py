"""MoCo by batch size: conflicts and biases in closed form, leads by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.moco import (
  compare,
  dense_toy,
  direction_errors,
  methods,
  small_batches,
)

NAMES = ('mean', 'smg', 'moco_exact')


def quadratic_oracle(noise):
  """Gradients of two equal parabolas at 1, each with a random sign of noise."""

  def losses(params, batch):
    x = params.trunk
    return 0.5 * x**2 + noise * x * batch

  return bj.multi_objective(losses, 2, rest=('heads',))


def draw_signs(key, size=1):
  return jax.random.rademacher(key, (size, 2), jnp.float32).mean(axis=0)


def measure(noise, size, count=4_000):
  params = bj.sequences(trunk=jnp.float32(1.0), heads=jnp.float32(0.0))
  oracle = quadratic_oracle(noise)
  links = {
    name: methods.METHODS[name].make(2, None, ('heads',), (1.0, 0.5))
    for name in NAMES
  }
  states = {name: link.init(params) for name, link in links.items()}
  draw = lambda key: oracle.update(
    draw_signs(key, size), oracle.init(params), params
  )[0]
  keys = jax.random.split(jax.random.key(0), count)
  run = jax.jit(
    lambda keys: direction_errors.measure_errors(
      links, states, draw, keys, params, {'moco_exact': links['smg']}
    )
  )
  return run(keys)


def test_bias_of_two_parabolas_in_closed_form():
  # Gradients are 3 or -1: both 3, both -1, or a conflict, where SMG stops.
  errors = measure(2.0, 1)
  assert abs(errors['smg'].bias - 0.5) < 0.06  # 3 / 4 - 1 / 4 instead of 1.
  assert abs(errors['smg'].exact - 1) < 0.1
  deviation = np.sqrt((2**2 + 2**2 + 1 + 1) / 4)
  assert abs(errors['smg'].deviation - deviation) < 0.1
  assert errors['mean'].bias < 1e-3
  # The memory is a running mean.
  assert errors['moco_exact'].bias < 0.2 < errors['smg'].bias
  assert errors['moco_exact'].deviation < 0.4 * errors['smg'].deviation
  # Larger batches have less bias.
  assert measure(2.0, 64)['smg'].bias < 0.5 * errors['smg'].bias


def test_exact_weights_are_those_of_full_batches_without_noise():
  errors = measure(0.0, 1, count=200)
  assert max(errors['smg'].bias, errors['mean'].bias) < 1e-5
  # The memory starts at the first gradient, because its first share is 1.
  assert errors['moco_exact'].deviation < 1e-5


def test_conflicts_are_counted_and_the_direction_is_passed_on():
  link = methods.METHODS['moco_exact'].make(2, None, (), (1.0, 0.5))
  watch = direction_errors.watch(link)
  params = jnp.zeros(2)
  state = watch.init(params)
  for second in ((1.0, 0.0), (-1.0, 0.5), (0.0, 1.0), (-1.0, 0.0)):
    jacobian = bj.Jacobian(jnp.array([[1.0, 0.0], second]))
    passed, state = watch.update(jacobian, state, params)
    np.testing.assert_array_equal(passed.rows, jacobian.rows)
  assert (state.steps, state.pairs, state.memory.count) == (2, 2, 4)
  three = bj.Jacobian(jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]))
  step, pairs = direction_errors.detect_conflicts(three)
  assert step == 1 and abs(pairs - 1 / 3) < 1e-6


def test_leads_by_hand():
  results = harness.Results()
  changes = {
    ('mean', 4): np.array([5.0, 7.0]),
    ('smg', 4): np.array([9.0, 9.0]),
    ('moco_exact', 4): np.array([3.0, 4.0]),
    ('mean', 64): np.array([1.0, 2.0]),
    ('smg', 64): np.array([3.0, 4.0]),
    ('moco_exact', 64): np.array([2.0, 2.0]),
  }
  leads = small_batches.add_leads(results, 'line', changes)
  np.testing.assert_allclose(leads['moco_exact', 'all'], [[4, 4], [0, 1]])
  growth = results['lead_growth/moco_exact/line']
  assert growth.per_seed == (4.0, 3.0)
  assert results['lead_growth/moco_exact/smg/line'].per_seed == (5.0, 3.0)
  assert results['lead/moco_exact/line/batch=64'].mean == 0.5


def test_images_and_their_maps():
  data, _ = dense_toy.make_images(10)
  windows, targets = data['train']
  assert windows.shape == (6, 9, 25) and targets.shape == (6, 9, 2)
  problem = dense_toy.make_problem(data)
  rows, _ = problem.batch(jax.random.key(0), problem.data, 3)
  assert rows.shape == (3 * 9, 25)
  # Both maps are functions of the window, plus noise.
  windows, targets = dense_toy.make_images(400)[0]['test']
  shade = windows.mean(axis=-1)
  edge = jnp.abs(windows[..., 12] - shade)
  expected = (1 + dense_toy.NOISE**2) ** -0.5
  for i, values in enumerate((shade, edge)):
    cosine = np.corrcoef(values.ravel(), targets[..., i].ravel())[0, 1]
    assert abs(cosine - expected) < 0.03


def test_largest_schools_are_selected():
  x, y = np.arange(12.0).reshape(3, 4, 1), np.arange(12.0).reshape(3, 4)
  data = {'train': (x, y, np.array([2, 4, 3])), 'test': (x, y, np.ones(3))}
  chosen = small_batches.select_largest(data, 2)
  np.testing.assert_array_equal(chosen['train'][2], [4, 3])
  np.testing.assert_array_equal(chosen['test'][1], y[[1, 2]])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'batches': (4,)}, 'two or more ascending'),
    ({'batches': (16, 4)}, 'two or more ascending'),
    ({'methods': ('mean', 'moco')}, 'must include mean and moco_exact'),
  ],
)
def test_invalid_settings(changes, message):
  settings = dataclasses.replace(small_batches.PRESETS['quick'], **changes)
  with pytest.raises(harness.SettingsError, match=message):
    small_batches.check(settings)


@pytest.mark.slow
def test_two_batch_sizes_of_the_dense_toy(options, results):
  settings = dataclasses.replace(
    small_batches.PRESETS['smoke'],
    grid=compare.Grid((1e-2,), (1e-2,), max_grid_extensions=0),
  )
  harness.execute(small_batches.main, options(settings))
  metrics = results()['metrics']
  assert np.isfinite(metrics['lead_growth/moco_exact/dense'])
  small, large = (
    metrics[f'bias/smg/dense/batch={batch}'] for batch in settings.batches
  )
  assert 0 < large < small
  assert 0 <= metrics['conflicting_steps/dense/batch=4'] <= 1
