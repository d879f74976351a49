"""Ratios of rounds and the map of `regimes`."""

from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np

from experiments import harness
from experiments.aipod import regimes_problem
from experiments.aipod.regimes_cells import METHODS, Cell, Result

Table = Mapping[tuple[Cell, str], Result]
RIVALS = METHODS[1:]
COLUMNS = (
  *(harness.Column(f'rounds to goal, {name}') for name in METHODS),
  harness.Column('E-AiPOD / FedNest'),
  harness.Column('E-AiPOD / best rival'),
)


def log_ratio_interval(
  numerator: np.ndarray, denominator: np.ndarray, limit: float
) -> harness.Interval:
  """Geometric mean of the ratio per seed, with its paired 95 % t interval.

  Args:
    numerator: rounds by seed; infinity if the goal is missed.
    denominator: rounds of the rival. Where it misses the goal, `limit` counts,
      so that the ratio is an upper bound.
    limit: maximum number of rounds.

  Returns:
    The interval, with its ends; NaN if the numerator misses a goal.
  """
  if not np.all(np.isfinite(numerator)):
    count = len(numerator)
    return harness.Interval(np.nan, np.nan, 0, count, (np.nan,) * count)
  ratios = numerator / np.minimum(denominator, limit)
  logs = harness.mean_interval(np.log(ratios))
  low, high = np.exp([logs.mean - logs.half_width, logs.mean + logs.half_width])
  return logs._replace(
    mean=float(np.exp(logs.mean)),
    half_width=float((high - low) / 2),
    per_seed=tuple(ratios.tolist()),
    ends=(float(low), float(high)),
  )


def describe(
  ratio: harness.Interval, numerator: np.ndarray, denominator: np.ndarray
) -> str:
  """Describes a ratio; `≤` if the rival misses goals."""
  if not np.isfinite(numerator).all():
    missed = 'neither' if not np.isfinite(denominator).all() else 'missed'
    return missed
  sign = '' if np.isfinite(denominator).all() else '≤ '
  low, high = ratio.ends
  return f'{sign}{ratio.mean:.2f} ({low:.2f} to {high:.2f})'


def add_headroom(
  results: harness.Results,
  references: regimes_problem.References,
  seeds: tuple[int, ...],
) -> None:
  """Adds test accuracies of the references, and their difference."""
  control, best = (
    np.array([table['test'][s] for s in seeds]) for table in references
  )
  results.add(control_accuracy=control, best_accuracy=best)
  results.add(headroom=best - control)


def add_rounds(results: harness.Results, table: Table) -> None:
  """Adds rounds, vectors and tuned values of all cells."""
  for (cell, name), result in table.items():
    place = {'method': name} | cell.coordinates()
    reaching = np.isfinite(result.rounds)
    if reaching.all():
      results.put(place, {'rounds': result.rounds})
      vectors = result.rounds.mean() * cell.taking_part
      results.put(place, {'vectors': float(vectors)})
    results.put(place, {'seeds_reaching': int(reaching.sum())})
    results.put(place, {'edges': len(result.edges)})
    results.put(place, result.point)
    text = f'{np.mean(result.rounds):.0f}'
    if not reaching.all():
      text = f'- ({reaching.sum()} of {len(reaching)})'
    head = f'rounds to goal, {name}'
    results.note(cell.coordinates(), {head: text})


def best_rival(table: Table, cell: Cell) -> str:
  """Returns the rival of E-AiPOD with the best tuning score."""
  return max(RIVALS, key=lambda name: table[cell, name].score)


def add_ratios(
  results: harness.Results, table: Table, limit: float
) -> dict[str, Any]:
  """Adds ratios of rounds by cell, by split, and of the regime.

  Args:
    results: receives the metrics.
    table: results by cell and method.
    limit: maximum number of rounds.

  Returns:
    Coordinates of the regime: the cell with several local steps in which
    E-AiPOD leads FedNest most in tuning.
  """
  cells = list(dict.fromkeys(cell for cell, _ in table))

  def put(place, measure, title, one, other):
    ratio = log_ratio_interval(one.rounds, other.rounds, limit)
    # A missing number of the claim is not shown.
    if np.isfinite(ratio.mean) or 'choice' in place:
      results.put(place, {measure: ratio})
    if title:
      text = describe(ratio, one.rounds, other.rounds)
      results.note(place, {title: text})

  for cell in cells:
    place, own = cell.coordinates(), table[cell, 'e_aipod']
    fednest = table[cell, 'fednest']
    put(place, 'rounds_ratio', 'E-AiPOD / FedNest', own, fednest)
    rival = table[cell, best_rival(table, cell)]
    put(place, 'rival_ratio', 'E-AiPOD / best rival', own, rival)
  # With the number of local steps that each method's tuning chooses.
  full = max(cell.taking_part for cell in cells)
  for split in dict.fromkeys(cell.split for cell in cells):
    group = [c for c in cells if (c.split, c.taking_part) == (split, full)]

    chosen = {
      name: max(group, key=lambda cell, name=name: table[cell, name].score)
      for name in METHODS
    }
    for name, cell in chosen.items():
      place = {'method': name, 'split': split}
      results.put(place, {'best_steps': cell.local_steps})
      if name in RIVALS:
        one = table[chosen['e_aipod'], 'e_aipod']
        put(place, 'tuned_rounds_ratio', '', one, table[cell, name])
  lead = lambda cell: (
    table[cell, 'fednest'].score / table[cell, 'e_aipod'].score
  )
  several = [cell for cell in cells if cell.local_steps > 1]
  # Both reach the goal on all tuning seeds.
  both = [
    cell
    for cell in several
    if min(table[cell, n].score for n in ('e_aipod', 'fednest')) > -limit
  ]
  regime = max(both or several, key=lead)
  own = table[regime, 'e_aipod']
  place = {'choice': 'regime'}
  put(place, 'rounds_ratio', '', own, table[regime, 'fednest'])
  put(place, 'rival_ratio', '', own, table[regime, best_rival(table, regime)])
  for name, value in own.point.items():
    results.put(place, {name: value})
  return regime.coordinates()


def draw_map(table: Table, settings: Any) -> matplotlib.figure.Figure:
  """Draws the ratios of rounds to FedNest and to the best rival."""
  cells = list(dict.fromkeys(cell for cell, _ in table))
  columns = sorted(
    {(-c.taking_part, c.local_steps) for c in cells},
  )
  splits = list(dict.fromkeys(settings.shards))
  figure = matplotlib.figure.Figure(
    figsize=(4 + 1.9 * len(columns), 1.6 + 0.75 * len(splits)),
    layout='constrained',
  )
  both = figure.subplots(1, 2, sharey=True)
  for axes, title in zip(both, ('FedNest', 'the best rival'), strict=True):
    values = np.full((len(splits), len(columns)), np.nan)
    for cell in cells:
      at = (
        splits.index(cell.shards),
        columns.index((-cell.taking_part, cell.local_steps)),
      )
      name = 'fednest' if title == 'FedNest' else best_rival(table, cell)
      one, other = (table[cell, n].rounds for n in ('e_aipod', name))
      ratio = log_ratio_interval(one, other, settings.rounds)
      values[at] = np.log2(ratio.mean)
      text = describe(ratio, one, other).replace(' (', '\n(')
      if title != 'FedNest' and np.isfinite(ratio.mean):
        text += f'\n{name}'
      axes.text(at[1], at[0], text, ha='center', va='center', fontsize=7)
    image = axes.imshow(
      values, cmap='RdBu_r', vmin=-1.5, vmax=1.5, aspect='auto'
    )
    axes.set_facecolor('0.85')
    axes.set_xticks(
      range(len(columns)),
      [f'{steps}\n{-part} of {settings.clients}' for part, steps in columns],
    )
    axes.set_yticks(
      range(len(splits)),
      [f'{s} shards' if s > 1 else ('IID', '1 shard')[s] for s in splits],
    )
    axes.set(
      title=f'rounds of E-AiPOD / {title}',
      xlabel='local steps per round, participating clients',
    )
  bar = figure.colorbar(image, ax=both)
  bar.set_ticks([-1, 0, 1], labels=['1/2', '1', '2'])
  return figure
