"""The picture of a comparison: both losses, and each over the updates."""

from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np

from experiments import harness
from experiments.xright import methods

Place = tuple[str, float]


def draw(
  held: Mapping[Place, Mapping[str, np.ndarray]],
  steps: Mapping[Place, Any],
  names: tuple[str, str],
  middle: float,
) -> matplotlib.figure.Figure:
  """Draws the ways through the plane of both losses, and either over time.

  Args:
    held: held-out losses by method and share, then by name, from the start to
      the end of a run: (records, seeds).
    steps: of the records after the first.
    names: of both objectives.
    middle: the share of the methods that are drawn as a whole.
  """
  first, second = names
  words = ('loss of demonstrations', 'loss of comparisons')
  shown = {
    methods.TITLES[place[0]]: place
    for place in held
    if place[1] == middle or place[0] in methods.SINGLE
  }
  panels = [
    harness.Panel(
      {
        title: (held[place][first].mean(axis=1), held[place][second])
        for title, place in shown.items()
      },
      xlabel=words[0],
      ylabel=words[1],
      title='held out: from the start to the end of a run',
    )
  ]
  ends: dict[str, list[Any]] = {}
  for (method, _), losses in held.items():
    if method not in methods.SINGLE:
      point = [losses[name][-1].mean() for name in names]
      ends.setdefault(methods.TITLES[method], []).append(point)
  if max(map(len, ends.values()), default=0) > 1:
    panels.append(
      harness.Panel(
        {title: tuple(np.transpose(points)) for title, points in ends.items()},
        xlabel=words[0],
        ylabel=words[1],
        title='ends, by share of the comparisons',
      )
    )
  panels += [
    harness.Panel(
      {
        title: (np.r_[0, steps[place]], held[place][name])
        for title, place in shown.items()
      },
      xlabel='updates',
      ylabel=word,
      title='what is forgotten at equal updates',
    )
    for name, word in zip(names, words, strict=True)
  ]
  return harness.draw_panels(panels)
