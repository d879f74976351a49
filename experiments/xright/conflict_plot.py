"""Plots of fronts: both losses over mixing ratios."""

from collections.abc import Mapping

import matplotlib.figure
import numpy as np

from experiments import harness
from experiments.xright import fronts, methods


def draw(
  reported: Mapping[str, fronts.Front],
  names: tuple[str, ...],
  before: Mapping[str, float],
) -> matplotlib.figure.Figure:
  """Draws fronts in the plane of both losses, and losses over mixing ratios.

  Args:
    reported: fronts by method.
    names: of both objectives.
    before: losses before the first update.
  """
  labels = ('loss of demonstrations', 'loss of comparisons')
  ends = {
    method: [front.values(f'held_out/{n}')[-1] for n in names]
    for method, front in reported.items()
  }
  plane = {}
  for method, (first, second) in ends.items():
    start = method in methods.SINGLE
    x, y = first.mean(axis=1), second
    if start:  # From the start to the end, which a single point does not show.
      x = np.r_[before[names[0]], x]
      y = np.concatenate([np.full_like(y[:1], before[names[1]]), y])
    plane[methods.TITLES[method]] = (x, y)
  panels = [
    harness.Panel(
      plane, xlabel=labels[0], ylabel=labels[1], title='held out, by ratio'
    )
  ]
  shares = {
    method: [point['share'] for point in front.points]
    for method, front in reported.items()
    if len(front.points) > 1
  }
  panels += [
    harness.Panel(
      {methods.TITLES[m]: (x, ends[m][i]) for m, x in shares.items()},
      xlabel='mixing ratio',
      ylabel=label,
      title='ends of runs',
    )
    for i, label in enumerate(labels)
  ]
  return harness.draw_panels(panels)
