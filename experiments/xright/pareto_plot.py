"""Plots of a comparison: both losses, and each loss over the updates."""

from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np

from experiments import harness
from experiments.xright import methods

Place = tuple[str, float]


def draw(
  losses: Mapping[Place, Mapping[str, np.ndarray]],
  steps: Mapping[Place, Any],
  names: tuple[str, str],
  middle: float,
) -> matplotlib.figure.Figure:
  """Draws runs in the plane of both losses, and each loss over the updates.

  Args:
    losses: held-out losses by (method, mixing ratio), then by objective, from
      the start to the end of a run, (records, seeds).
    steps: updates of the records after the first, by (method, mixing ratio).
    names: of both objectives.
    middle: the mixing ratio whose runs are drawn from start to end.
  """
  first, second = names
  labels = ('loss of demonstrations', 'loss of comparisons')
  shown = {
    methods.TITLES[place[0]]: place
    for place in losses
    if place[1] == middle or place[0] in methods.SINGLE
  }
  panels = [
    harness.Panel(
      {
        title: (losses[place][first].mean(axis=1), losses[place][second])
        for title, place in shown.items()
      },
      xlabel=labels[0],
      ylabel=labels[1],
      title='held out: from the start to the end of a run',
    )
  ]
  ends: dict[str, list[Any]] = {}
  for (method, _), histories in losses.items():
    if method not in methods.SINGLE:
      point = [histories[name][-1].mean() for name in names]
      ends.setdefault(methods.TITLES[method], []).append(point)
  if max(map(len, ends.values()), default=0) > 1:
    panels.append(
      harness.Panel(
        {title: tuple(np.transpose(points)) for title, points in ends.items()},
        xlabel=labels[0],
        ylabel=labels[1],
        title='ends of runs, by mixing ratio',
      )
    )
  panels += [
    harness.Panel(
      {
        title: (np.r_[0, steps[place]], losses[place][name])
        for title, place in shown.items()
      },
      xlabel='updates',
      ylabel=label,
      title='forgetting at equal updates',
    )
    for name, label in zip(names, labels, strict=True)
  ]
  return harness.draw_panels(panels)
