"""Report of `rlhf`: results, plots and policies."""

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

# Returns at which an environment counts as solved.
TARGETS = {'CartPole-v1': 450.0, 'CartPole': 450.0}


def used_labels(outcome: comparison.Outcome) -> np.ndarray:
  """Numbers of labels used so far, (records, seeds)."""
  used = METHODS[outcome.method].learns_labels
  return outcome.values('count/labels') * used


def first_at(
  returns: np.ndarray, labels: np.ndarray, target: float
) -> np.ndarray:
  """Labels until the return first reaches the target, (seeds,), or NaN."""
  reached = returns >= target
  first = np.argmax(reached, axis=0)
  at_first = np.take_along_axis(labels, first[None], axis=0)[0]
  return np.where(reached.any(axis=0), at_first, np.nan)


def label_shares(outcome: comparison.Outcome) -> dict[str, np.ndarray]:
  """Shares of all drawn pairs of a run, (seeds,).

  Args:
    outcome: of a method that draws pairs.

  Returns:
    The share of untied pairs, and among them the shares that a reward of 1 per
    step orders and that are labelled like the true returns.
  """
  names = ('labels', 'untied', 'constant_orders', 'right_labels')
  labels, untied, *ordered = (outcome.last(f'count/{n}') for n in names)
  share = lambda part, total: np.where(total, part / np.maximum(total, 1), 0.0)
  constant, right = (share(x, untied) for x in ordered)
  return {
    'untied': share(untied, labels),
    'constant_orders': constant,
    'right_labels': right,
  }


def report(
  options: harness.Options,
  settings: Settings,
  outcomes: Mapping[str, comparison.Outcome],
) -> harness.Report:
  """Makes the report of a run and saves the policies.

  Args:
    options: of the binary.
    settings: resolved.
    outcomes: by method.
  """
  target = TARGETS.get(str(settings.env), np.inf)
  rollout = settings.rollouts.steps * settings.rollouts.environments // 2
  first_steps = rlhf_settings.count_start_epochs(settings) * rollout
  oracle = outcomes.get('oracle')
  true_returns = oracle.last('return') if oracle and not oracle.failure else 0

  def measure(outcome):
    method, labels = METHODS[outcome.method], used_labels(outcome)
    returns = outcome.values('return')
    steps = outcome.last('count/steps/environment').max()
    values: dict[str, Any] = {
      'true_return': returns[-1],
      'area': returns.mean(axis=0),
      'entropy': outcome.last('loss/entropy'),
      'labels': labels[-1].max(),
      'policy_steps': steps + first_steps * method.learns_labels,
    }
    if 'accuracy' in outcome.trained.history:
      values['accuracy'] = outcome.last('accuracy')
      if not settings.labels:
        values |= label_shares(outcome)
    if np.all(true_returns > 0):
      values['share_of_true_reward'] = returns[-1] / true_returns
    if np.isfinite(target) and method.learns_labels and method.true_labels:
      values['labels_to_target'] = first_at(returns, labels, target)
    if method.second_policy:
      gap = outcome.values('loss/suboptimality')
      late = gap[-max(1, len(gap) // 4) :]
      values['suboptimality'] = late.mean(axis=0)
      values['second_return'] = outcome.last('second_return')
    return values

  results = harness.Results()
  comparison.add_outcomes(results, outcomes, measure)
  finished = {m: o for m, o in outcomes.items() if not o.failure}
  for name, outcome in finished.items():
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
      column('share_of_true_reward', 'share of true reward'),
      'entropy',
      column('untied', 'untied pairs'),
      column('constant_orders', 'constant orders'),
      column('right_labels', 'right labels'),
      column('policy_steps', 'policy steps'),
      column('suboptimality', 'sub-optimality'),
      column('second_return', 'second policy'),
      'rate',
    ),
    titles=titles,
    curves={
      **{titles[m]: o.values('return') for m, o in finished.items()},
      **{
        f'{titles[m]}, entropy': o.values('loss/entropy')
        for m, o in finished.items()
      },
    },
    plots={'returns.png': _draw(settings, finished)},
    more={'sizes': harness.run_settings(settings)},
  )


def _draw(
  settings: Settings, outcomes: Mapping[str, comparison.Outcome]
) -> matplotlib.figure.Figure:
  every = [used_labels(outcome) for outcome in outcomes.values()]
  labelled = [labels for labels in every if labels[-1].max() > 0]
  returns, accuracy, entropy = {}, {}, {}
  for (name, outcome), labels in zip(outcomes.items(), every, strict=True):
    title = METHODS[name].title
    if not labels[-1].max() and labelled and len(labelled[0]) == len(labels):
      # Drawn at the labels of another method, for equal updates.
      labels, title = labelled[0], f'{title} (no labels)'
    returns[title] = (labels.mean(axis=1), outcome.values('return'))
    entropy[title] = (labels.mean(axis=1), outcome.values('loss/entropy'))
    if 'accuracy' in outcome.trained.history:
      accuracy[title] = (labels.mean(axis=1), outcome.values('accuracy'))
  label = f'true return, last {rlhf_settings.EPISODES} episodes'
  panels = [harness.Panel(returns, 'labels', label, title=str(settings.env))]
  if accuracy:
    label = 'accuracy on held-out untied pairs'
    panels.append(harness.Panel(accuracy, 'labels', label))
  panels.append(harness.Panel(entropy, 'labels', 'entropy of the policy'))
  return harness.draw_panels(panels)


def policy_file(method: str) -> str:
  """Name of the file of a method's policy."""
  return f'policy_{method.split("/")[-1]}.npz'
