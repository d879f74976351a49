"""Which methods are compared, and how each is chosen.

E-AiPOD takes its lower steps S by tuning; FedNest takes the best of its rounds
T and local steps tau by the reported numbers themselves, in its favour.
"""

from typing import Any

import numpy as np

from experiments import harness
from experiments.aipod import client_digits, federated_run
from experiments.aipod.federated_run import Method
from experiments.harness.study import comparison

# First weights, batches and coins of the tuning runs.
TUNING_SEEDS = (1_000_000, 1_000_001, 1_000_002)
# On which no single run depends; which method it is, its name says.
_NOT_OF_A_RUN = (
  *('grid.upper_rates', 'grid.lower_rates', 'grid.widen', 'fednest'),
  *('taking_part', 'lower_steps', 'published_rate'),
)


def methods(settings: Any) -> dict[str, Method]:
  """E-AiPOD with each S; FedNest with each T, tau and local upper steps."""
  found = {f'e_aipod/s{s}': Method(lower_steps=s) for s in settings.lower_steps}
  several = settings.fednest.upper_steps
  for t in settings.fednest.rounds:
    for i, tau in enumerate(settings.fednest.steps):
      name = f'fednest/t{t}/tau{tau}'
      found[name] = one = Method(lower_rounds=t, local_steps=tau)
      if several and i == 0:
        found[f'{name}/upper{several}'] = one._replace(upper_steps=several)
  return found


def compare(
  options: harness.Options, digits: client_digits.Digits
) -> tuple[dict[str, comparison.Outcome], dict[str, comparison.Outcome]]:
  """Tunes and runs all.

  Args:
    options: what the flags say.
    digits: of all clients.

  Returns:
    Outcomes of all variants, and of those that are compared: E-AiPOD with the S
    that tuning chose, beside it with few clients taking part and with the
    published step; FedNest at its best by what is reported.
  """
  settings = options.settings
  goal, variants = settings.goal / 100, methods(settings)
  rules = comparison.Rules(
    options,
    settings=harness.settings_of(settings, *_NOT_OF_A_RUN),
    score=lambda trained: federated_run.scores(
      trained.history, goal, settings.grid.rounds
    ),
    tuning_seeds=TUNING_SEEDS,
    # The worst: step sizes on the brink fail on other seeds.
    over_seeds=np.min,
    widenings=settings.grid.widen,
  )
  grid = {
    'upper_rate': settings.grid.upper_rates,
    'lower_rate': settings.grid.lower_rates,
  }
  train = lambda job: federated_run.train(
    variants[job.method], settings, digits, job
  )
  found = {
    # With what its name says, for the metrics of those that are compared.
    name: outcome._replace(point=outcome.point | variants[name].given())
    for name, outcome in comparison.compare(
      rules, tuple(variants), train, grid
    ).items()
  }
  chosen = max(
    (name for name in found if variants[name].lower_steps),
    key=lambda name: found[name].score,
  )
  method, ours = variants[chosen], found[chosen]
  compared, beside = {'e_aipod': ours}, []
  if settings.taking_part:
    part = method._replace(taking_part=settings.taking_part)
    name = f'{chosen}/part{settings.taking_part}'
    beside.append(('e_aipod_partial', name, part, grid))
  if settings.published_rate:
    lower = ours.point.get('lower_rate', settings.grid.lower_rates[0])
    point = {'upper_rate': (settings.published_rate,), 'lower_rate': (lower,)}
    name = f'{chosen}/published_step'
    beside.append(('e_aipod_published_step', name, method, point))
  for family, name, variants[name], given in beside:
    found[name] = comparison.run(rules, name, train, given)
    compared[family] = found[name]
  if comparison.Axis(settings.lower_steps).side(method.lower_steps):
    compared['e_aipod'] = ours._replace(edges=(*ours.edges, 'lower_steps'))
  for family, several in (('fednest', False), ('local_upper/fednest', True)):
    of_it = [
      outcome
      for name, outcome in found.items()
      if variants[name].lower_rounds
      and several == (variants[name].upper_steps > 1)
    ]
    if of_it:
      key = lambda outcome: median(outcome, goal)
      compared[family] = comparison.select_best(family, of_it, key)
  return found, compared


def median(outcome: comparison.Outcome, goal: float) -> float:
  """Median rounds to the goal; infinite where fewer than half get there."""
  if outcome.failure:
    return np.nan
  return np.median(federated_run.rounds_to(outcome.trained.history, goal))


def quotient(ours: float, theirs: float, limit: float) -> float:
  """Ours over theirs, at most: who does not get there needs the limit at least.

  NaN where ours does not get there either.
  """
  return ours / min(theirs, limit) if np.isfinite(ours) else np.nan
