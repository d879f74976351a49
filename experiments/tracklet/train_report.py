"""Metrics, table and curves of a run of `train`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import harness
from experiments.tracking import judging

# Hypotheses of each search, and whether its scores are normalised.
SEARCHES = {'k1': (1, False), 'k4': (4, False), 'k4_normalised': (4, True)}
# The weights after pretraining, and the two ways to go on from there.
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
  """Adds the differences of two methods' scores to the results.

  Args:
    results: to add to.
    scores: by method and measure, (seeds, simulations).
    at: names of the two methods in the metric.
    names: their names in `scores`, for IDF1 only; None for `at` and all
      measures.
  """
  one, two = names or at
  for measure in judging.MEASURES if names is None else ('idf1',):
    lead = scores[one][measure] - scores[two][measure]
    lead = judging.crossed_interval(lead)
    results.put({'method': at[0], 'over': at[1]}, {f'{measure}_lead': lead})


def summarise(
  scores: Mapping[str, Mapping[str, np.ndarray]],
  choices: Mapping[str, judging.Choice],
  purity: Mapping[tuple[str, str], np.ndarray],
) -> harness.Results:
  """Collects the numbers of all trackers.

  Args:
    scores: by method and measure, (seeds, simulations).
    choices: rules by method.
    purity: by method and name of the search, (networks,).

  Returns:
    The results.
  """
  results = harness.Results()
  for method, values in scores.items():
    at = {'method': method}
    results.put(
      at, {name: judging.crossed_interval(x) for name, x in values.items()}
    )
    if choice := choices.get(method):
      results.add(at, edges=len(choice.edges), tried=choice.tried)
      results.note(at, {'chosen': choice.describe()})
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
  # Chosen on the test simulations, which favours the classical reference too.
  best = lambda names: max(names, key=lambda m: scores[m]['idf1'].mean())
  if classical := [m for m in CLASSICAL if m in scores]:
    names = best(BOTH), best(classical)
    add_lead(results, scores, ('better', 'classical'), names)
  return results


def loss_curves(trained: Mapping[str, harness.Trained]) -> dict[str, Any]:
  """Losses over the updates after pretraining, by the title of a row."""
  return {
    name.replace('_', ' '): (
      trained[name].steps,
      trained[name].history['loss/loss'],
    )
    for name in BOTH
  }
