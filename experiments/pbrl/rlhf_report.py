"""What `rlhf` ends with: numbers, a plot and policies."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np

from experiments import harness
from experiments.harness.study import comparison
from experiments.pbrl import rlhf_settings
from experiments.pbrl.rlhf_settings import METHODS, Settings
from experiments.rl import policies

# Returns that count as solved.
TARGETS = {'CartPole-v1': 450.0, 'CartPole': 450.0}


def labels_of(outcome: comparison.Outcome) -> np.ndarray:
  """Labels that were used so far, (records, seeds)."""
  used = METHODS[outcome.method].learns_labels
  return outcome.values('count/labels') * used


def first_at(
  returns: np.ndarray, labels: np.ndarray, target: float
) -> np.ndarray:
  """Labels at the first record at the target, (seeds,); NaN if never."""
  there = returns >= target
  first = np.argmax(there, axis=0)
  found = np.take_along_axis(labels, first[None], axis=0)[0]
  return np.where(there.any(axis=0), found, np.nan)


def report(
  options: harness.Options,
  settings: Settings,
  outcomes: Mapping[str, comparison.Outcome],
) -> harness.Report:
  """The report of a run; keeps the policies.

  Args:
    options: what the flags say.
    settings: resolved.
    outcomes: by method.
  """
  target = TARGETS.get(str(settings.env), np.inf)
  rollout = settings.rollouts.steps * settings.rollouts.environments // 2
  first_steps = rlhf_settings.start_epochs_of(settings) * rollout

  def measure(outcome):
    method, labels = METHODS[outcome.method], labels_of(outcome)
    returns = outcome.values('return')
    steps = outcome.last('count/steps/environment').max()
    values: dict[str, Any] = {
      'true_return': returns[-1],
      # Over the records of the run.
      'area': returns.mean(axis=0),
      'labels': labels[-1].max(),
      'policy_steps': steps + first_steps * method.learns_labels,
    }
    if 'accuracy' in outcome.trained.history:
      values['accuracy'] = outcome.last('accuracy')
    if np.isfinite(target) and method.learns_labels and method.sense:
      values['labels_to_target'] = first_at(returns, labels, target)
    if method.second:
      gap = outcome.values('loss/suboptimality')
      late = gap[-max(1, len(gap) // 4) :]
      values['suboptimality'] = late.mean(axis=0)
      values['second_return'] = outcome.last('second_return')
    return values

  results = harness.Results()
  comparison.add_outcomes(results, outcomes, measure)
  fine = {m: o for m, o in outcomes.items() if not o.failure}
  for name, outcome in fine.items():
    policies.save_best(
      pathlib.Path(options.workdir) / policy_file(name),
      str(settings.env),
      outcome.trained.params.lower.actor,
      outcome.last('return'),
      method=name,
    )
  titles = {name: method.title for name, method in METHODS.items()}
  column = harness.Column
  return harness.Report(
    results,
    columns=(
      *(column('true_return', 'true return'), 'area', 'accuracy', 'labels'),
      column('labels_to_target', f'labels at {target:g}'),
      column('policy_steps', 'policy steps'),
      column('suboptimality', 'sub-optimality'),
      column('second_return', 'second policy'),
      'rate',
    ),
    titles=titles,
    curves={titles[m]: o.values('return') for m, o in fine.items()},
    plots={'returns.png': _draw(settings, fine)},
    more={'sizes': harness.settings_of(settings)},
  )


def _draw(
  settings: Settings, outcomes: Mapping[str, comparison.Outcome]
) -> matplotlib.figure.Figure:
  every = [labels_of(outcome) for outcome in outcomes.values()]
  labelled = [labels for labels in every if labels[-1].max() > 0]
  returns, accuracy = {}, {}
  for (name, outcome), labels in zip(outcomes.items(), every, strict=True):
    title = METHODS[name].title
    if not labels[-1].max() and labelled and len(labelled[0]) == len(labels):
      # Drawn beside the others, at equal updates.
      labels, title = labelled[0], f'{title} (no labels)'
    returns[title] = (labels.mean(axis=1), outcome.values('return'))
    if 'accuracy' in outcome.trained.history:
      accuracy[title] = (labels.mean(axis=1), outcome.values('accuracy'))
  label = f'true return, last {rlhf_settings.EPISODES} episodes'
  panels = [harness.Panel(returns, 'labels', label, title=str(settings.env))]
  if accuracy:
    label = 'accuracy on untied pairs, held out'
    panels.append(harness.Panel(accuracy, 'labels', label))
  return harness.draw_panels(panels)


def policy_file(method: str) -> str:
  """The name of the file of a method's policy."""
  return f'policy_{method.split("/")[-1]}.npz'
