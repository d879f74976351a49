"""Multi-task learning on tabular data, small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.moco import bias, compare, tabular


@pytest.mark.slow
def test_tabular_on_made_up_data(options, results, capsys):
  settings = tabular.Settings(
    methods=('mean', 'moco'),
    steps=40,
    chunk=20,
    batch=16,
    hidden=8,
    grid=compare.Grid((1e-2, 2e-2, 3e-2), (1e-2,), max_grid_extensions=0),
    bias_batches=(8,),
  )
  harness.execute(tabular.main, options(settings))
  metrics = results()['metrics']
  assert metrics['error/mean/made_up'] < 1.2
  assert 'synthetic' in capsys.readouterr().out


def test_batches_and_parts_of_schools():
  rng = np.random.default_rng(0)
  sizes = np.array([9, 5, 7], np.int32)
  x = np.zeros((3, 9, 4), np.float32)
  y = np.zeros((3, 9), np.float32)
  for s, size in enumerate(sizes):
    x[s, :size] = rng.normal(size=(size, 4))
    y[s, :size] = 10 * s + np.arange(size)
  part = tuple(map(jnp.asarray, (x, y, sizes)))
  data = {'train': part, 'validation': part, 'test': part}
  settings = tabular.Settings(hidden=6)
  problem = tabular.school_problem('school', data, settings)
  batch = problem.batch(jax.random.key(1), data, 32)
  assert batch[0].shape == (3, 4, 4)
  for s, size in enumerate(sizes):
    assert batch[1][s].min() >= 10 * s and batch[1][s].max() < 10 * s + size
  params = problem.init(jax.random.key(0))
  oracle = problem.oracle()
  jacobian, _ = jax.jit(oracle.update)(batch, oracle.init(params), params)
  np.testing.assert_allclose(
    jacobian.values, problem.losses(params, batch), rtol=1e-5
  )
  halves = problem.split(batch, 2)
  np.testing.assert_allclose(halves[1][0], batch[1][:, ::2])
  # Padding does not count.
  full = problem.score(params, part)
  longer = tuple(
    jnp.pad(v, [(0, 0), (0, 3)] + [(0, 0)] * (v.ndim - 2)) for v in part[:2]
  )
  np.testing.assert_allclose(
    problem.score(params, (*longer, part[2])), full, rtol=1e-5
  )
  assert tabular.ridge_baseline(data).shape == (3,)


def test_no_bias_without_batch_sizes():
  """School has none, because SMG would need weights of 139 gradients."""
  results = harness.Results()
  assert not bias.measure(results, None, (), {'mean': object()})
  assert not results.metrics()


def test_smallest_ratio_has_the_smallest_lower_end():
  ratios = [harness.Interval(2.0, 1.5, 3, 3), harness.Interval(1.0, 0.2, 2, 3)]
  assert tabular.smallest_ratio(ratios) == harness.Interval(1.0, 0.5, 2, 3)
