"""Draws curves over steps."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.harness.store import files
from experiments.harness.study import report

if TYPE_CHECKING:
  import matplotlib.figure

# Okabe and Ito's palette for the colour-blind, without its yellow.
COLOURS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#56B4E9',
  '#E69F00',
  '#000000',
)
_STYLES = ('-', '--', ':', '-.')


class Panel(NamedTuple):
  """One set of axes with curves.

  Attributes:
    curves: steps (records,) and values (records, seeds) or (records,) by label;
      NaN leaves a gap, or a seed out of the mean.
    xlabel: label with the unit.
    ylabel: label with the unit.
    title: title of the axes.
    logx: whether the x axis is logarithmic.
    logy: whether the y axis is logarithmic.
  """

  curves: Mapping[str, tuple[Any, Any]]
  xlabel: str
  ylabel: str
  title: str = ''
  logx: bool = False
  logy: bool = False


def draw_panels(
  panels: Sequence[Panel], *, columns: int = 2, band: str = 'interval'
) -> 'matplotlib.figure.Figure':
  """Draws the mean over seeds of each curve with a band.

  Args:
    panels: panels row by row. A label has the same colour in all panels; a
      panel with a new label has a legend.
    columns: panels per row.
    band: 'interval' for the 95 % interval of the mean, or 'range' for the
      smallest and largest seed. The interval of two seeds would hide all else,
      so theirs is the range.

  Returns:
    The figure.

  Raises:
    ValueError: if `band` is unknown, or a curve has different numbers of steps
      and values.
  """
  if band not in ('interval', 'range'):
    raise ValueError(f"band is 'interval' or 'range', got {band!r}.")
  # Imported here: it takes time, which a run needs only at its end.
  import matplotlib.figure

  columns = min(columns, len(panels))
  rows = -(-len(panels) // columns)
  # Without pyplot, which holds on to figures and picks a global backend.
  figure = matplotlib.figure.Figure(
    figsize=(6.4 * columns, 4.0 * rows), layout='constrained'
  )
  grid = figure.subplots(rows, columns, squeeze=False).ravel()
  labels = list(dict.fromkeys(k for panel in panels for k in panel.curves))
  explained: set[str] = set()
  for axes, panel in zip(grid, panels, strict=False):
    _draw(axes, panel, labels, band)
    if set(panel.curves) - explained:
      # Translucent: it may have to cover curves.
      axes.legend(framealpha=0.7, edgecolor='none')
      explained |= set(panel.curves)
  for axes in grid[len(panels) :]:
    axes.remove()
  return figure


def draw_curves(
  curves: Mapping[str, tuple[Any, Any]],
  *,
  band: str = 'interval',
  **panel: Any,
) -> 'matplotlib.figure.Figure':
  """Draws curves on one set of axes.

  Args:
    curves: see `Panel`.
    band: see `draw_panels`.
    **panel: other fields of `Panel`.

  Returns:
    The figure.
  """
  return draw_panels([Panel(curves, **panel)], band=band)


def save(path: files.Path, figure: 'matplotlib.figure.Figure') -> pathlib.Path:
  """Writes a figure as PNG; raises WriteError if it cannot."""
  image = io.BytesIO()
  figure.savefig(image, format='png', dpi=150)
  path = pathlib.Path(path)
  files.write_bytes(path, image.getvalue())
  return path


def _draw(axes, panel, labels, band):
  for label, (steps, values) in panel.curves.items():
    steps = np.asarray(steps, np.float64)
    values = np.asarray(values, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if len(steps) != len(values):
      raise ValueError(
        f'curve {label!r} has {len(steps)} steps, but {len(values)} values.'
      )
    mean, low, high = _summary(values, band)
    i = labels.index(label)
    colour = COLOURS[i % len(COLOURS)]
    style = _STYLES[i // len(COLOURS) % len(_STYLES)]
    axes.plot(steps, mean, style, color=colour, label=label, linewidth=1.8)
    if values.shape[1] > 1:
      axes.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
  if panel.logx:
    axes.set_xscale('log')
  if panel.logy:
    axes.set_yscale('log', nonpositive='clip')
  axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
  axes.grid(True, which='major', alpha=0.3)
  for axis, logarithmic in ((axes.xaxis, panel.logx), (axes.yaxis, panel.logy)):
    if logarithmic:
      _log_ticks(axis)


def _log_ticks(axis):
  """Labels powers of ten, or also 2 and 5 times these on a short axis."""
  from matplotlib import ticker

  # Minor labels would overlap.
  axis.set_minor_formatter(ticker.NullFormatter())
  low, high = axis.get_view_interval()
  if high < 100 * low:
    few = ticker.LogLocator(subs=(1, 2, 5))
    even = ticker.MaxNLocator(5)
    axis.set_major_locator(even if high < 5 * low else few)
    axis.set_major_formatter('{x:g}')


def _summary(values, band):
  finite = np.where(np.isfinite(values), values, np.nan)
  intervals = [report.mean_interval(row) for row in finite]
  mean = np.array([x.mean for x in intervals])
  if band == 'interval' and values.shape[1] > 2:
    half = np.array([x.half_width for x in intervals])
    return mean, mean - half, mean + half
  low = np.fmin.reduce(finite, axis=1)
  return mean, low, np.fmax.reduce(finite, axis=1)
