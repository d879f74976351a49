"""Curves over steps, as PNG files."""

import io
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np

from experiments.harness import files, report

# Okabe and Ito's palette, readable for the colour-blind, without its yellow.
_COLOURS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#56B4E9',
  '#E69F00',
  '#000000',
)
_STYLES = ('-', '--', ':', '-.')


def plot_curves(
  path: files.Path,
  curves: Mapping[str, tuple[Any, Any]],
  *,
  xlabel: str,
  ylabel: str,
  title: str = '',
  logx: bool = False,
  logy: bool = False,
  band: str = 'interval',
) -> pathlib.Path:
  """Plots the mean over seeds of each curve, with a band around it.

  Args:
    path: the PNG file.
    curves: by label, steps (records,) and values (records, seeds) or
      (records,); NaN leaves a gap, or a seed out of the mean.
    xlabel: with the unit, if it has one.
    ylabel: likewise.
    title: above the plot.
    logx: whether the horizontal axis is logarithmic.
    logy: whether the vertical one is.
    band: 'interval' for the 95 % interval of the mean, or 'range' for the
      smallest and largest seed.

  Returns:
    The path.

  Raises:
    ValueError: if `band` is unknown, or a curve has another number of steps
      than of values.
    WriteError: if the file cannot be written; names the folder.
  """
  if band not in ('interval', 'range'):
    raise ValueError(f"band is 'interval' or 'range', got {band!r}.")
  # A figure of its own: pyplot would keep it, and pick a backend for all.
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), layout='constrained')
  axes = figure.subplots()
  for i, (label, (steps, values)) in enumerate(curves.items()):
    steps = np.asarray(steps, np.float64)
    values = np.asarray(values, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if len(steps) != len(values):
      raise ValueError(
        f'curve {label!r} has {len(steps)} steps, but {len(values)} values.'
      )
    mean, low, high = _summary(values, band)
    colour = _COLOURS[i % len(_COLOURS)]
    style = _STYLES[i // len(_COLOURS) % len(_STYLES)]
    axes.plot(steps, mean, style, color=colour, label=label, linewidth=1.8)
    if values.shape[1] > 1:
      axes.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
  if logx:
    axes.set_xscale('log')
  if logy:
    axes.set_yscale('log', nonpositive='clip')
  axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
  axes.grid(True, which='major', alpha=0.3)
  if curves:
    axes.legend(frameon=False)
  image = io.BytesIO()
  figure.savefig(image, format='png', dpi=150)
  path = pathlib.Path(path)
  files.write_bytes(path, image.getvalue())
  return path


def _summary(values, band):
  finite = np.where(np.isfinite(values), values, np.nan)
  intervals = [report.mean_interval(row) for row in finite]
  mean = np.array([x.mean for x in intervals])
  if band == 'interval':
    half = np.array([x.half_width for x in intervals])
    return mean, mean - half, mean + half
  # As bounds, infinities of the right sign for what is missing.
  low = np.min(np.where(np.isnan(finite), np.inf, finite), axis=1)
  high = np.max(np.where(np.isnan(finite), -np.inf, finite), axis=1)
  none = np.isnan(mean)
  return mean, np.where(none, np.nan, low), np.where(none, np.nan, high)
