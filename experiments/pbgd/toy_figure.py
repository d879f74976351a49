"""Figure of the toy: end points, and gap and steps over the penalty."""

import matplotlib.figure
import matplotlib.lines
import matplotlib.patches
import numpy as np

from experiments.pbgd import toy_problem

# Colours of Okabe and Ito, for minima and for solvers.
_BASINS = ('#D55E00', '#0072B2', '#009E73', '#56B4E9', '#E69F00')
_SOLVERS = ('#000000', '#CC79A7', '#E69F00')
_NO_MINIMUM = '#000000'
_MARKERS = 'osD^v'
_X, _Y = toy_problem.X_RANGE, toy_problem.Y_RANGE
_LABELS = {
  'known_value': 'minimum known',
  'v_pbgd': 'V-PBGD',
  'g_pbgd': 'G-PBGD',
}


def draw(*, starts, ends, basins, minima, results, settings):
  """Draws the landscape, and gap and steps over the penalty.

  Args:
    starts: initial `BilevelParams`, with a leading axis of starts.
    ends: final `BilevelParams`, with the same axis.
    basins: index of the minimum that each start reached, or -1.
    minima: x of the local minima on y = -x, the global one first.
    results: metrics of the run.
    settings: settings of the run.

  Returns:
    The figure.
  """
  figure = matplotlib.figure.Figure(figsize=(10.5, 6.0), layout='constrained')
  grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
  plane = figure.add_subplot(grid[:, 0])
  _landscape(figure, plane, starts, ends, basins, minima, settings)
  gap = figure.add_subplot(grid[0, 1])
  steps = figure.add_subplot(grid[1, 1], sharex=gap)
  _sweep(gap, 'gap', results, settings)
  _sweep(steps, 'steps', results, settings)
  gap.set(ylabel='mean gap of the lower loss', title='Gap over the penalty')
  gap.tick_params(labelbottom=False)
  steps.set(
    xlabel=r'penalty $\gamma$',
    ylabel='mean steps',
    title='Steps over the penalty',
  )
  return figure


def _landscape(figure, axes, starts, ends, basins, minima, settings):
  x, y = np.meshgrid(np.linspace(*_X, 301), np.linspace(*_Y, 601))
  height = np.asarray(toy_problem.upper_loss(x, y))
  # The doubled range keeps the background lighter than the dots.
  filled = axes.contourf(
    x, y, height, 24, cmap='Greys', vmin=height.min(), vmax=2 * height.max()
  )
  figure.colorbar(filled, ax=axes, label='upper loss $f$', shrink=0.8, pad=0.02)
  axes.plot(_X, [-_X[0], -_X[1]], color='black', linewidth=1.2)
  axes.axvspan(
    3.0, _X[1], facecolor='none', hatch='///', edgecolor='0.5', linewidth=0
  )
  for i in range(-1, len(minima)):
    reached = basins == i
    colour = _NO_MINIMUM if i < 0 else _BASINS[i % len(_BASINS)]
    begin, end = ((z.upper[reached], z.lower[reached]) for z in (starts, ends))
    dots = {'color': colour, 'zorder': 3}
    axes.scatter(*begin, s=9, alpha=0.5, color=colour, linewidths=0)
    axes.scatter(*end, s=90, edgecolors='white', linewidths=0.8, **dots)
  crosses = {'color': 'white', 's': 50, 'linewidths': 1.4, 'zorder': 4}
  axes.scatter(minima, -minima, marker='+', **crosses)
  for i, x_min in enumerate(minima):
    share = np.mean(basins == i)
    text = f'$x$ = {x_min:.3f}: {share:.0%}' + (' (global)' if i == 0 else '')
    left = x_min > sum(_X) / 2  # Keeps the text inside the axes.
    axes.annotate(
      text,
      (x_min, -x_min),
      xytext=(-8, -18) if left else (8, 10),
      ha='right' if left else 'left',
      textcoords='offset points',
      fontsize=9,
      zorder=5,
      bbox={'facecolor': 'white', 'alpha': 0.85, 'lw': 0, 'pad': 1.5},
    )
  marks = {'ls': '', 'color': '0.3'}
  line = lambda label, **style: matplotlib.lines.Line2D(
    [], [], label=label, **style
  )
  axes.legend(
    handles=[
      line('start', marker='o', ms=3, alpha=0.6, **marks),
      line('end', marker='o', ms=9, **marks),
      line('minimum of $f(x, -x)$', marker='+', ms=8, mew=1.4, **marks),
      line('lower minimisers, $y = -x$', color='black', lw=1.2),
      matplotlib.patches.Patch(
        facecolor='white', hatch='////', edgecolor='0.5', label='outside C'
      ),
    ],
    loc='upper center',
    bbox_to_anchor=(0.5, -0.1),
    ncols=3,
    fontsize=9,
    frameon=False,
  )
  count, penalty = len(ends.upper), settings.headline_penalty
  axes.set(
    xlim=_X,
    ylim=_Y,
    xlabel='$x$',
    ylabel='$y$',
    title=rf'{count:,} starts at $\gamma$ = {penalty:g}, by end point',
  )


def _sweep(axes, metric, results, settings):
  penalties = np.array(settings.penalties)
  for i, solver in enumerate(settings.solvers):
    at = {'solver': solver}
    values = np.array(
      [results.mean(metric, {**at, 'penalty': p}) for p in penalties]
    )
    power = results.mean(f'{metric}_exponent', at)
    label = f'{_LABELS.get(solver, solver)}: $\\gamma^{{{power:.2f}}}$'
    style = {'color': _SOLVERS[i % len(_SOLVERS)], 'linewidth': 1.2}
    fill = 'full' if i == 0 else 'none'
    axes.plot(
      penalties, values, f'{_MARKERS[i]}-', fillstyle=fill, label=label, **style
    )
  axes.set(xscale='log', yscale='log')
  axes.set_xticks(penalties, [f'{p:g}' for p in penalties])
  axes.minorticks_off()
  axes.grid(True, which='major', alpha=0.3)
  axes.margins(y=0.3)  # Room for the legend.
  corner = 'upper left' if metric == 'steps' else 'best'
  axes.legend(fontsize=9, frameon=False, loc=corner)
