"""Plots of a comparison, over calls and over time."""

from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.figure
import numpy as np

from experiments.harness.study import comparison
from experiments.stsa import zoo_problem, zoo_run


def draw(
  rows: Sequence[tuple[zoo_problem.Problem, Mapping[str, comparison.Outcome]]],
) -> matplotlib.figure.Figure:
  """Draws two panels per problem with common colours and legend.

  Args:
    rows: problems with their outcomes by method; failed ones are skipped.
  """
  figure = matplotlib.figure.Figure(
    figsize=(11, 1 + 4 * len(rows)), layout='constrained'
  )
  grid = figure.subplots(len(rows), 2, sharey='row', squeeze=False)
  names = list(dict.fromkeys(n for _, outcomes in rows for n in outcomes))
  for (problem, outcomes), (by_calls, by_time) in zip(rows, grid, strict=True):
    curves = {
      name: outcome.values(problem.judge_by).mean(axis=1)
      for name, outcome in outcomes.items()
      if not outcome.failure and name not in zoo_run.CORRECTION
    }
    for name, values in curves.items():
      outcome, style = outcomes[name], _style(name, names.index(name))
      calls = outcome.values('calls').mean(axis=1)
      by_calls.plot(calls, values, label=name, **style)
      seconds = outcome.trained.seconds / len(outcome.members)
      shares = np.linspace(0, 1, len(values))
      # A logarithmic axis cannot show the start at time 0.
      by_time.plot(seconds * shares[1:], values[1:], **style)
    for axes in (by_calls, by_time):
      for name, level in problem.references.items():
        label = name.replace('_', ' ')
        axes.axhline(level, color='0.5', linewidth=2, zorder=0, label=label)
      axes.set_title(problem.title, fontsize='medium')
      axes.grid(True, alpha=0.3)
    # A curve ends at the first stopped seed.
    starts = [np.nanmax(values) for values in curves.values()]
    finals = [np.nanmin(values[-5:]) for values in curves.values()]
    finals += problem.references.values()
    if problem.logarithmic:
      by_calls.set_yscale('log')
      by_calls.set_ylim(max(min(finals) / 3, 1e-14), 2 * max(starts))
    else:
      by_calls.set_ylim(max(0, 0.9 * min(finals)), min(1, 1.1 * max(finals)))
    by_calls.set_ylabel(problem.label)
    by_time.set_xscale('log')
  grid[-1, 0].set_xlabel('calls on a batch: gradients and products')
  grid[-1, 1].set_xlabel('time of one run [s], without compilation')
  handles = {}
  for axes in grid[:, 0]:
    handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
  figure.legend(handles.values(), handles, loc='outside right center')
  return figure


def _style(name, i):
  if name.startswith('control/'):
    return {'linestyle': '-', 'color': 'black', 'linewidth': 2.5}
  colours, styles = matplotlib.colormaps['tab20'].colors, ('-', '--', ':')
  style = {'linestyle': styles[i % 3], 'color': colours[i % len(colours)]}
  return style | {'linewidth': 1.6}
