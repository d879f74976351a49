"""The experiments of MoCo: their losses, data and tables, at tiny sizes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.moco import compare, methods, multi_mnist, tabular, toy


def options(tmp_path, binary, settings, seeds=(0, 1), data_dir=None):
  return harness.Options(
    paper='moco',
    binary=binary,
    preset='quick',
    settings=settings,
    workdir=str(tmp_path),
    data_dir=data_dir,
    seeds=seeds,
  )


def read(tmp_path):
  return json.loads((tmp_path / 'results.json').read_text())['metrics']


@pytest.mark.parametrize(
  ('point', 'values'),
  [
    # Above the axis the logarithms count, below it the bowls.
    ((1.0, 0.0), (0.0, 0.0)),
    (
      (7.0, -8.0),
      (-40 * np.tanh(4.0), np.tanh(4.0) * (14.0**2 / 10 - 20)),
    ),
    (
      (3.0, 2.0),
      (
        2 * np.tanh(1.0) * (np.log(5 - np.tanh(2.0)) + 6),
        np.tanh(1.0) * (np.log(2 - np.tanh(2.0)) + 6),
      ),
    ),
  ],
)
def test_toy_losses_by_hand(point, values):
  found = toy.toy_losses(jnp.array(point))
  np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)


def test_toy_front_is_below_and_between_the_centres():
  below = jnp.array([[x, -8.35] for x in (-6.0, 0.0, 6.0)])
  assert all(bool(toy.on_front(point)) for point in below)
  others = jnp.array([[9.0, -8.35], [0.0, -4.0], [5.0, 9.0], [-5.0, 7.0]])
  assert not any(bool(toy.on_front(point)) for point in others)


def test_toy_noise_is_that_of_the_gradients():
  point, noise = jnp.array([1.0, -3.0]), jnp.arange(12.0).reshape(3, 2, 2)
  rows = jax.jacobian(toy.noisy_losses)(point, noise)
  truth = jax.jacobian(toy.toy_losses)(point)
  np.testing.assert_allclose(rows - truth, noise[0], atol=1e-5)


def test_toy_runs_and_writes_its_results(tmp_path, capsys):
  settings = toy.Settings(
    steps=20, chunk=10, methods=('moco_exact', 'moco', 'smg', 'modo')
  )
  toy.main(options(tmp_path, 'toy', settings))
  metrics = read(tmp_path)
  for method in settings.methods:
    for rate in ('lr1e-3', 'lr5e-3'):
      assert metrics[f'{method}/{rate}/front_from_start1'] == 0
  for plot in ('paths', 'stationarity', 'weight'):
    assert (tmp_path / f'{plot}.png').stat().st_size > 5_000
  assert 'moco_exact' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('module', 'settings'),
  [
    (toy, toy.Settings(methods=('guess',))),
    (multi_mnist, multi_mnist.Settings(methods=('guess',))),
    (multi_mnist, multi_mnist.Settings(pool=5)),
    (tabular, tabular.Settings(methods=('guess',))),
  ],
)
def test_settings_that_no_run_can_have(tmp_path, module, settings):
  with pytest.raises(ValueError, match=r'known|divides'):
    module.main(options(tmp_path, 'x', settings))


def test_digits_overlap_by_the_maximum():
  left, right = jnp.zeros((1, 28, 28)), jnp.zeros((1, 28, 28))
  left = left.at[0, 0, 0].set(1.0).at[0, 20, 20].set(0.25)
  right = right.at[0, 12, 12].set(0.5).at[0, 27, 27].set(0.75)
  canvas = multi_mnist.overlay(left, right, 1).reshape(36, 36)
  assert canvas[0, 0] == 1.0 and canvas[20, 20] == 0.5
  assert canvas[35, 35] == 0.75 and canvas.sum() == 2.25
  pooled = multi_mnist.overlay(left, right, 2)
  assert pooled.shape == (1, 18 * 18)
  np.testing.assert_allclose(pooled.sum(), 2.25 / 4)


@pytest.mark.slow
def test_multi_mnist_learns_and_writes_its_results(tmp_path, capsys):
  settings = multi_mnist.Settings(
    methods=('smg', 'moco', 'famo', 'moco_plus'),
    steps=60,
    chunk=60,
    batch=16,
    hidden=16,
    pool=4,
    rates=(1e-2,),
    bias_batches=(8,),
    evaluated=100,
  )
  multi_mnist.main(options(tmp_path, 'multi_mnist', settings))
  metrics = read(tmp_path)
  for method in settings.methods:
    assert metrics[f'{method}/multi_mnist/accuracy'] > 0.12
    assert np.isfinite(metrics[f'{method}/multi_mnist/dm'])
  assert metrics['multi_mnist/bias_ratio'] > 0
  assert 'dm %' in capsys.readouterr().out


@pytest.mark.slow
def test_tabular_on_made_up_data(tmp_path, capsys):
  settings = tabular.Settings(
    methods=('mean', 'moco'),
    steps=40,
    chunk=20,
    batch=16,
    hidden=8,
    rates=(1e-2,),
    bias_batches=(8,),
  )
  tabular.main(options(tmp_path, 'tabular', settings))
  metrics = read(tmp_path)
  assert metrics['mean/made_up/error'] < 1.2
  assert 'made up' in capsys.readouterr().out


def test_school_batches_and_parts_see_their_own_school():
  rng = np.random.default_rng(0)
  sizes = np.array([9, 5, 7], np.int32)
  x = np.zeros((3, 9, 4), np.float32)
  y = np.zeros((3, 9), np.float32)
  for s, size in enumerate(sizes):
    x[s, :size] = rng.normal(size=(size, 4))
    y[s, :size] = 10 * s + np.arange(size)
  part = tuple(map(jnp.asarray, (x, y, sizes)))
  data = {'train': part, 'validation': part, 'test': part}
  settings = tabular.Settings(batch=32, hidden=6)
  problem = tabular.school_problem(data, settings)
  batch = problem.batch(jax.random.key(1), data)
  assert batch[0].shape == (3, 4, 4)
  for s, size in enumerate(sizes):
    assert batch[1][s].min() >= 10 * s and batch[1][s].max() < 10 * s + size
  params = problem.init(jax.random.key(0))
  oracle = problem.oracle()
  jacobian, _ = oracle.update(batch, oracle.init(params), params)
  np.testing.assert_allclose(
    jacobian.values, problem.losses(params, batch), rtol=1e-5
  )
  halves = problem.split(batch, 2)
  np.testing.assert_allclose(halves[1][0], batch[1][:, ::2])
  # Rows of zeros that fill up the arrays do not count.
  full = problem.score(params, part)
  longer = tuple(
    jnp.pad(v, [(0, 0), (0, 3)] + [(0, 0)] * (v.ndim - 2)) for v in part[:2]
  )
  np.testing.assert_allclose(
    problem.score(params, (*longer, part[2])), full, rtol=1e-5
  )
  assert tabular.ridge_baseline(data).shape == (3,)


def test_missing_data_says_where_to_get_it(tmp_path):
  with pytest.raises(harness.MissingDataError, match='MALSAR'):
    tabular.read_school(str(tmp_path))


def test_relative_change_by_hand():
  found = methods.relative_change(
    np.array([[0.9, 2.0], [1.0, 1.0]]), np.array([1.0, 1.0]), [True, False]
  )
  np.testing.assert_allclose(found, [(10 + 100) / 2, 0.0], rtol=1e-5)


def test_side_by_side_is_each_alone():
  one = bj.gradient(lambda x, batch: batch * x**2)
  two = bj.gradient(lambda x, batch: batch * x)
  both = methods.side_by_side({'a': one, 'b': two})
  params = bj.sequences(a=jnp.float32(3.0), b=jnp.float32(1.0))
  updates, state = both.update(jnp.float32(2.0), both.init(params), params)
  assert (updates.a, updates.b) == (12.0, 2.0)
  assert bj.values(state.parts['a'])['loss'] == 18.0
  assert compare.BIAS_BATCHES == 256
