"""The picture of a comparison: what is left over calls, and over time."""

import io
import pathlib
from collections.abc import Mapping

import matplotlib
import matplotlib.figure
import numpy as np

from experiments.harness import files

Curve = tuple[np.ndarray, np.ndarray]


def draw(
  path: pathlib.Path,
  by_calls: Mapping[str, Curve],
  by_time: Mapping[str, Curve],
  *,
  title: str,
) -> None:
  """Draws two panels that share curves, colours and the legend.

  Args:
    path: the PNG file.
    by_calls: by method, calls and the mean squared hypergradient norm.
    by_time: by method, seconds and the same.
    title: above both.
  """
  figure = matplotlib.figure.Figure(figsize=(11, 5), layout='constrained')
  left, right = figure.subplots(1, 2, sharey=True)
  colours = matplotlib.colormaps['tab20'].colors
  styles = ('-', '--', ':')
  for axes, curves in ((left, by_calls), (right, by_time)):
    for i, (name, (at, values)) in enumerate(curves.items()):
      control = name.startswith('control/')
      axes.plot(
        at,
        values,
        '-' if control else styles[i % len(styles)],
        color='black' if control else colours[i % len(colours)],
        linewidth=2.5 if control else 1.6,
        label=name,
      )
    axes.set_yscale('log')
    axes.grid(True, alpha=0.3)
  finals = [values[-1] for _, values in by_calls.values()]
  starts = [values[0] for _, values in by_calls.values()]
  left.set_ylim(max(min(finals) / 3, 1e-14), 10 * max(starts))
  left.set(
    xlabel='calls on a batch: gradients and products',
    ylabel='squared hypergradient norm',
  )
  right.set(xlabel='time of one run [s], compilation apart')
  figure.legend(*left.get_legend_handles_labels(), loc='outside right center')
  figure.suptitle(title)
  image = io.BytesIO()
  figure.savefig(image, format='png', dpi=130)
  files.write_bytes(path, image.getvalue())
