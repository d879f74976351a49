"""Multi-MNIST: overlays by hand, and a short run."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.harness.study import report, stored
from experiments.moco import compare, multi_mnist


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
def test_multi_mnist_learns_and_writes_its_results(options, results, capsys):
  settings = multi_mnist.Settings(
    methods=('smg', 'moco', 'famo', 'moco_plus'),
    steps=60,
    chunk=60,
    batch=16,
    hidden=16,
    pool=4,
    grid=compare.Grid((1e-2, 2e-2, 3e-2), (1e-2,), max_grid_extensions=0),
    bias_batches=(8,),
    evaluated=100,
  )
  harness.execute(multi_mnist.main, options(settings))
  metrics = results()['metrics']
  for method in settings.methods:
    assert metrics[f'accuracy/{method}/multi_mnist'] > 0.12
    assert np.isfinite(metrics[f'dm/{method}/multi_mnist'])
  assert metrics['bias_ratio/moco/multi_mnist'] > 0
  left = 'accuracy/single_task/multi_mnist/left'
  assert len(results()['per_seed'][left]) == 2
  assert ' dm ' in capsys.readouterr().out


def test_pool_divides_the_canvas():
  with pytest.raises(ValueError, match='pool must divide 36, got 5'):
    multi_mnist.check(multi_mnist.Settings(pool=5))


def test_parts_of_the_packaged_digits():
  digits, source = multi_mnist.load(None)
  sizes = {part: len(digits[part].labels) for part in digits}
  assert sizes == {'train': 3_000, 'validation': 1_000, 'test': 1_000}
  assert source.name == 'packaged digits'


def test_results_with_former_settings_belong_to_their_run():
  settings = report.plain(multi_mnist.PRESETS['quick'])
  grid = settings['grid']
  for former, name in (
    ('widen', 'max_grid_extensions'),
    ('rates_beside_own', 'extra_learning_rates'),
  ):
    grid[former] = grid.pop(name)
  results = {'paper': 'moco', 'binary': 'multi_mnist', 'preset': 'quick'}
  name, _ = stored.declared({**results, 'settings': settings})
  assert name == 'multi_mnist'
