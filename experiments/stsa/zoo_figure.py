"""The picture of a comparison: what is left over calls, and over time."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import matplotlib.figure
import numpy as np

from experiments.harness import files

Curve = tuple[np.ndarray, np.ndarray]


class Row(NamedTuple):
  """What the two panels of a problem show.

  Attributes:
    by_calls: by method, calls and values.
    by_time: by method, seconds and the same values.
    title: above both.
    label: of the values.
    logarithmic: whether the vertical axis is.
    references: levels to draw across, by name.
  """

  by_calls: Mapping[str, Curve]
  by_time: Mapping[str, Curve]
  title: str
  label: str
  logarithmic: bool
  references: Mapping[str, float]


def draw(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Draws two panels a problem that share colours and the legend.

  Args:
    path: the PNG file.
    rows: the problems.
  """
  figure = matplotlib.figure.Figure(
    figsize=(11, 1 + 4 * len(rows)), layout='constrained'
  )
  grid = figure.subplots(len(rows), 2, sharey='row', squeeze=False)
  names = list(dict.fromkeys(name for row in rows for name in row.by_calls))
  for row, panels in zip(rows, grid, strict=True):
    for axes, curves in zip(panels, (row.by_calls, row.by_time), strict=True):
      for name, (at, values) in curves.items():
        # Of the start, a logarithm of the time shows nothing.
        rest = slice(axes is panels[1], None)
        axes.plot(
          at[rest], values[rest], label=name, **_style(name, names.index(name))
        )
      for name, level in row.references.items():
        label = name.replace('_', ' ')
        axes.axhline(level, color='0.5', linewidth=2, zorder=0, label=label)
      axes.set_title(row.title, fontsize='medium')
      axes.grid(True, alpha=0.3)
    starts = [values[0] for _, values in row.by_calls.values()]
    finals = [values[-1] for _, values in row.by_calls.values()]
    finals += row.references.values()
    if row.logarithmic:
      panels[0].set_yscale('log')
      panels[0].set_ylim(max(min(finals) / 3, 1e-14), 2 * max(starts))
    else:
      panels[0].set_ylim(max(0, 0.9 * min(finals)), min(1, 1.1 * max(finals)))
    panels[0].set_ylabel(row.label)
    # Methods take from seconds to a minute.
    panels[1].set_xscale('log')
  grid[-1, 0].set_xlabel('calls on a batch: gradients and products')
  grid[-1, 1].set_xlabel('time of one run [s], compilation apart')
  handles = {}
  for axes in grid[:, 0]:
    handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
  figure.legend(handles.values(), handles, loc='outside right center')
  image = io.BytesIO()
  figure.savefig(image, format='png', dpi=130)
  files.write_bytes(path, image.getvalue())


def _style(name, i):
  if name.startswith('control/'):
    return {'linestyle': '-', 'color': 'black', 'linewidth': 2.5}
  colours = matplotlib.colormaps['tab20'].colors
  styles = ('-', '--', ':')
  return {
    'linestyle': styles[i % len(styles)],
    'color': colours[i % len(colours)],
    'linewidth': 1.6,
  }
