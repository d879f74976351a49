"""Variants of the federated methods, their tuning and selection.

Tuning chooses the lower steps S of E-AiPOD. Of FedNest, the rounds T and local
steps tau with the best reported number are taken, which favours it.
"""

from typing import Any

import numpy as np

from experiments import harness
from experiments.aipod import client_digits, federated_run
from experiments.aipod.federated_run import Method
from experiments.harness.study import comparison

# Seeds of initial weights, batches and projections of the tuning runs.
TUNING_SEEDS = (1_000_000, 1_000_001, 1_000_002)
# Settings that no single run depends on.
_COMPARISON_SETTINGS = (
  *('grid.upper_rates', 'grid.lower_rates', 'grid.max_grid_extensions'),
  *('fednest', 'taking_part', 'lower_steps', 'published_rate'),
)


def methods(settings: Any) -> dict[str, Method]:
  """Variants by name: E-AiPOD by S; FedNest by T, tau and upper steps."""
  variants = {
    f'e_aipod/s{s}': Method(lower_steps=s, probability=settings.probability)
    for s in settings.lower_steps
  }
  several = settings.fednest.upper_steps
  for t in settings.fednest.rounds:
    for i, tau in enumerate(settings.fednest.steps):
      name = f'fednest/t{t}/tau{tau}'
      variants[name] = Method(lower_rounds=t, local_steps=tau)
      if several and i == 0:
        local_upper = variants[name]._replace(upper_steps=several)
        variants[f'{name}/upper{several}'] = local_upper
  return variants


def compare(
  options: harness.Options, digits: client_digits.Digits
) -> tuple[dict[str, comparison.Outcome], dict[str, comparison.Outcome]]:
  """Tunes and runs all variants.

  Args:
    options: options of the run.
    digits: digits of all clients.

  Returns:
    Outcomes of all variants, and of those to compare: E-AiPOD with the tuned S,
    also with few participating clients and with the published step size;
    FedNest's variant with the best reported number.
  """
  settings = options.settings
  goal, variants = settings.goal / 100, methods(settings)
  rules = comparison.Rules(
    options,
    settings=harness.run_settings(settings, *_COMPARISON_SETTINGS),
    score=lambda trained: federated_run.scores(
      trained.history, goal, settings.grid.rounds
    ),
    tuning_seeds=TUNING_SEEDS,
    # The worst seed: step sizes near instability fail on other seeds.
    over_seeds=np.min,
    widenings=settings.grid.max_grid_extensions,
  )
  grid = {
    'upper_rate': settings.grid.upper_rates,
    'lower_rate': settings.grid.lower_rates,
  }
  federation = federated_run.make_federation(settings, digits)

  def done(history, job):
    if not job.tuning:
      return bool(np.all(np.isfinite(federated_run.rounds_to(history, goal))))
    points = len(job.settings['tried'])
    return federated_run.decided(history, goal, points)

  def train(job):
    return federated_run.train(
      variants[job.method],
      federation,
      digits,
      job,
      rounds=settings.grid.rounds if job.tuning else settings.rounds,
      # Until all members, in tuning the best point, reach the goal.
      stop_when=lambda history: done(history, job),
    )

  outcomes = {
    # Adds the variant's fields, which the report lists for selected variants.
    name: outcome._replace(point=outcome.point | variants[name].fields())
    for name, outcome in comparison.compare(
      rules, tuple(variants), train, grid
    ).items()
  }
  chosen = max(
    (name for name in outcomes if variants[name].lower_steps),
    key=lambda name: outcomes[name].score,
  )
  method, e_aipod = variants[chosen], outcomes[chosen]
  compared, further = {'e_aipod': e_aipod}, []
  if settings.taking_part:
    part = method._replace(taking_part=settings.taking_part)
    name = f'{chosen}/part{settings.taking_part}'
    further.append(('e_aipod_partial', name, part, grid))
  if settings.published_rate:
    lower = e_aipod.point.get('lower_rate', settings.grid.lower_rates[0])
    point = {'upper_rate': (settings.published_rate,), 'lower_rate': (lower,)}
    name = f'{chosen}/published_step'
    further.append(('e_aipod_published_step', name, method, point))
  for family, name, variants[name], points in further:
    outcomes[name] = comparison.run(rules, name, train, points)
    compared[family] = outcomes[name]
  if comparison.Axis(settings.lower_steps).side(method.lower_steps):
    edges = (*e_aipod.edges, 'lower_steps')
    compared['e_aipod'] = e_aipod._replace(edges=edges)
  for family, several in (('fednest', False), ('local_upper/fednest', True)):
    members = [
      outcome
      for name, outcome in outcomes.items()
      if variants[name].lower_rounds
      and several == (variants[name].upper_steps > 1)
    ]
    if members:
      key = lambda outcome: median(outcome, goal)
      compared[family] = comparison.select_best(family, members, key)
  return outcomes, compared


def median(outcome: comparison.Outcome, goal: float) -> float:
  """Median rounds to the goal over seeds, which may be infinite."""
  if outcome.failure:
    return np.nan
  return np.median(federated_run.rounds_to(outcome.trained.history, goal))


def rounds_ratio(rounds: float, baseline: float, limit: float) -> float:
  """Rounds over those of a baseline, which are at most `limit`.

  With a baseline that does not reach the goal, this is an upper bound. NaN if
  `rounds` is infinite.
  """
  return rounds / min(baseline, limit) if np.isfinite(rounds) else np.nan
