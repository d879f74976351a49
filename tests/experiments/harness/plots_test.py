"""Tests of the plots: the file, what is drawn, and no global state."""

import itertools
import subprocess
import sys

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from experiments import harness
from experiments.harness.study import plots

STEPS = np.arange(1, 6)


@pytest.fixture
def figure(monkeypatch):
  """The figures that a call draws."""
  drawn = []
  original = matplotlib.figure.Figure.savefig

  def savefig(self, *arguments, **options):
    drawn.append(self)
    return original(self, *arguments, **options)

  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', savefig)
  return drawn


def plot(path, curves, **options):
  figure = harness.draw_curves(curves, xlabel='steps', ylabel='loss', **options)
  return plots.save(path, figure)


def test_writes_a_picture_with_labels(tmp_path, figure):
  values = np.outer(STEPS, [1.0, 2.0, 3.0])
  path = plot(
    tmp_path / 'new' / 'a.png',
    {'one': (STEPS, values), 'two': (STEPS, STEPS)},
    title='Title',
    logx=True,
    logy=True,
  )
  image = matplotlib.image.imread(path)
  assert image.shape[0] > 300
  assert image.std() > 0.01
  (axes,) = figure[0].axes
  assert [t.get_text() for t in axes.get_legend().get_texts()] == ['one', 'two']
  assert (axes.get_xlabel(), axes.get_ylabel()) == ('steps', 'loss')
  assert (axes.get_xscale(), axes.get_yscale()) == ('log', 'log')
  np.testing.assert_allclose(axes.lines[0].get_ydata(), 2.0 * STEPS)
  assert len(axes.collections) == 1  # No band around a single curve.


@pytest.mark.parametrize('band', ['range', 'interval'])
def test_band_by_hand(tmp_path, figure, band):
  values = np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 5.0], [np.nan] * 3])
  plot(tmp_path / 'a.png', {'one': (STEPS[:3], values)}, band=band)
  (axes,) = figure[0].axes
  np.testing.assert_allclose(axes.lines[0].get_ydata(), [2.0, 3.0, np.nan])
  ys = axes.collections[0].get_paths()[0].vertices[:, 1]
  if band == 'range':
    assert (ys.min(), ys.max()) == (1.0, 5.0)
  else:
    # Two values 1 and 5: 12.706 * sqrt(8) / sqrt(2).
    np.testing.assert_allclose(ys.max(), 3 + 25.41, 1e-3)


def test_two_seeds_have_a_range(tmp_path, figure):
  values = np.array([[1.0, 3.0], [2.0, 6.0]])
  plot(tmp_path / 'a.png', {'one': (STEPS[:2], values)}, band='interval')
  ys = figure[0].axes[0].collections[0].get_paths()[0].vertices[:, 1]
  assert (ys.min(), ys.max()) == (1.0, 6.0)


def test_many_curves_look_different(tmp_path, figure):
  plot(tmp_path / 'a.png', {str(i): (STEPS, STEPS + i) for i in range(14)})
  looks = {
    (line.get_color(), line.get_linestyle()) for line in figure[0].axes[0].lines
  }
  assert len(looks) == 14


def test_values_below_zero_on_a_logarithmic_axis(tmp_path):
  values = np.outer(STEPS, [-1.0, 2.0])
  plot(tmp_path / 'a.png', {'one': (STEPS, values)}, logy=True)


@pytest.mark.parametrize('span', [1.4, 20.0, 1e5])
def test_labels_of_a_logarithmic_axis_do_not_overlap(tmp_path, figure, span):
  curve = np.geomspace(150, 150 * span, 9)
  plot(tmp_path / 'a.png', {'one': (curve, curve)}, logx=True, logy=True)
  (axes,) = figure[0].axes
  labels = [
    label.get_window_extent()
    for label in (
      *axes.get_xticklabels(which='major'),
      *axes.get_xticklabels(which='minor'),
    )
    if label.get_text() and axes.bbox.x0 <= label.get_window_extent().x1
  ]
  ends = sorted((box.x0, box.x1) for box in labels if box.x0 <= axes.bbox.x1)
  assert len(ends) >= 2
  assert all(one[1] < two[0] for one, two in itertools.pairwise(ends))


def test_nothing_to_plot(tmp_path):
  plot(tmp_path / 'a.png', {})
  plot(tmp_path / 'a.png', {'one': ([], np.zeros((0, 3)))})


def test_wrong_arguments(tmp_path):
  with pytest.raises(ValueError, match="'one' has 5 steps, but 4 values"):
    plot(tmp_path / 'a.png', {'one': (STEPS, STEPS[:4])})
  with pytest.raises(ValueError, match="'interval' or 'range'"):
    plot(tmp_path / 'a.png', {}, band='both')


@pytest.mark.slow
def test_pyplot_is_not_imported(tmp_path):
  """It would choose a backend for the whole process."""
  code = (
    'import sys; from experiments import harness; '
    'harness.draw_curves({}, xlabel="", ylabel=""); '
    'assert "matplotlib.pyplot" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code, tmp_path / 'a.png'], check=True)
