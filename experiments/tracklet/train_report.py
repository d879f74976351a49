"""What a run of `train` says: metrics, table and curves."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import harness
from experiments.tracking import judging

# Hypotheses of the searches that purities are of, and whether scores are
# normalised there.
SEARCHES = {'k1': (1, False), 'k4': (4, False), 'k4_normalised': (4, True)}
# What training in two ways begins with, and those.
FIRST, BOTH = 'first_weights', ('search', 'teacher_forcing')
CLASSICAL = ('overlap', 'likelihood')
COLUMNS = (
  *judging.MEASURES,
  'chosen',
  *(
    harness.Column(
      'purity', f'purity {name.replace("_", " ").upper()}', {'beam': name}
    )
    for name in SEARCHES
  ),
)


def add_lead(
  results: harness.Results,
  scores: Mapping[str, Mapping[str, np.ndarray]],
  at: tuple[str, str],
  names: tuple[str, str] | None = None,
) -> None:
  """Adds the differences of two methods' scores.

  Args:
    results: to which they are added.
    scores: by method and measure, (seeds, simulations).
    at: names of both in the metric.
    names: names of both in the scores, of IDF1 alone; None for `at`.
  """
  one, two = names or at
  for measure in judging.MEASURES if names is None else ('idf1',):
    lead = judging.crossed(scores[one][measure] - scores[two][measure])
    results.put({'method': at[0], 'over': at[1]}, {f'{measure}_lead': lead})


def summarise(
  scores: Mapping[str, Mapping[str, np.ndarray]],
  chosen: Mapping[str, judging.Tuned],
  purity: Mapping[tuple[str, str], np.ndarray],
) -> harness.Results:
  """Numbers of all trackers.

  Args:
    scores: by method and measure, (seeds, simulations).
    chosen: rules by method.
    purity: by method and name of the search, (networks,).
  """
  results = harness.Results()
  for method, found in scores.items():
    at = {'method': method}
    results.put(at, {n: judging.crossed(values) for n, values in found.items()})
    if tuned := chosen.get(method):
      results.add(at, edges=len(tuned.edges), tried=tuned.tried)
      results.note(at, {'chosen': tuned.words()})
  for (method, name), values in purity.items():
    results.add({'method': method, 'beam': name}, purity=values)
  search, forcing = BOTH
  for name in SEARCHES:
    lead = purity[search, name] - purity[forcing, name]
    at = {'method': search, 'over': forcing, 'beam': name}
    results.add(at, purity_lead=lead)
  add_lead(results, scores, BOTH)
  for name in BOTH:
    for one, two in ((name, FIRST), (f'{name}_near_online', name)):
      if {one, two} <= set(scores):
        add_lead(results, scores, (one, two))
  # The reference is the best by what is reported, which favours it.
  best_of = lambda names: max(names, key=lambda m: scores[m]['idf1'].mean())
  if classical := [m for m in CLASSICAL if m in scores]:
    names = best_of(BOTH), best_of(classical)
    add_lead(results, scores, ('better', 'classical'), names)
  return results


def loss_curves(trained: Mapping[str, harness.Trained]) -> dict[str, Any]:
  """Losses over the updates after the common ones, by the title of a row."""
  return {
    name.replace('_', ' '): (
      trained[name].steps,
      trained[name].history['loss/loss'],
    )
    for name in BOTH
  }
