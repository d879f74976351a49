"""What `rlhf` ends with: table, plot, metrics and policies."""

import itertools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.pbrl import feedback, rlhf_settings
from experiments.rl import policies

# Returns that count as solved.
TARGETS = {'CartPole-v1': 450.0, 'CartPole': 450.0}


class Result(NamedTuple):
  """What a method came to; arrays are (records, seeds).

  Attributes:
    returns: true returns of the last episodes, actions drawn.
    accuracy: of the reward model on untied pairs that it has not learnt from.
    labels: so far.
    steps: of all policies so far, those at the start included.
    suboptimality: the second policy's regularised return less the policy's, in
      normalised reward, a mean since the record before.
    second: true returns of the second policy.
    actors: weights of the policies, leaves (seeds, ...).
    rate: that was chosen.
    trials: rates that were tried.
  """

  returns: np.ndarray
  accuracy: np.ndarray | None
  labels: np.ndarray
  steps: np.ndarray
  suboptimality: np.ndarray | None
  second: np.ndarray | None
  actors: Any
  rate: float
  trials: int = 1


def first_at(result: Result, target: float) -> np.ndarray:
  """Labels at the first record at the target, (seeds,); NaN if never."""
  there = result.returns >= target
  first = np.argmax(there, axis=0)
  found = np.take_along_axis(result.labels, first[None], axis=0)[0]
  return np.where(there.any(axis=0), found, np.nan)


def area(result: Result) -> np.ndarray:
  """Mean of the true return over the records, (seeds,); NaN if one is."""
  return result.returns.mean(axis=0)


def report(
  options: harness.Options,
  settings: rlhf_settings.Settings,
  results: Mapping[str, Result],
  *,
  seconds: float,
  cpu_seconds: float,
) -> dict[str, float]:
  """Writes all; returns the metrics.

  Args:
    options: what the flags say.
    settings: resolved.
    results: by method.
    seconds: wall time.
    cpu_seconds: processor time of this process.
  """
  folder = pathlib.Path(options.workdir)
  target = TARGETS.get(str(settings.env))
  metrics: dict[str, float] = {}
  rows = []
  for name, result in results.items():
    method = feedback.METHODS[name]
    row: dict[str, Any] = {'method': method.title}
    columns = {
      'true return': ('true_return', result.returns[-1]),
      'area': ('area', area(result)),
    }
    if result.accuracy is not None:
      columns['accuracy'] = ('accuracy', result.accuracy[-1])
    for title, (metric, values) in columns.items():
      row[title] = harness.mean_interval(values)
      metrics |= row[title].metrics(f'{name}/{metric}')
    row.setdefault('accuracy', None)
    row['labels'] = int(result.labels[-1].max())
    metrics[f'{name}/labels'] = row['labels']
    if target is not None:
      row[f'labels at {target:g}'] = None
      if method.learns_labels and method.sense:
        at = harness.mean_interval(first_at(result, target))
        row[f'labels at {target:g}'] = at
        metrics |= at.metrics(f'{name}/labels_to_target')
    row['policy steps'] = int(result.steps[-1].max())
    metrics[f'{name}/policy_steps'] = row['policy steps']
    row['sub-optimality'] = row['second policy'] = None
    if result.suboptimality is not None:
      late = result.suboptimality[-max(1, len(result.suboptimality) // 4) :]
      row['sub-optimality'] = harness.mean_interval(late.mean(axis=0))
      metrics |= row['sub-optimality'].metrics(f'{name}/suboptimality')
    if result.second is not None:
      row['second policy'] = harness.mean_interval(result.second[-1])
      metrics |= row['second policy'].metrics(f'{name}/second_return')
    metrics |= {f'{name}/rate': result.rate, f'{name}/trials': result.trials}
    row['rate'] = result.rate
    rows.append(row)
  harness.write_table(folder, rows)
  metrics |= paired_leads(results)
  _plot(folder, settings, results)
  _keep(folder, settings, results)
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=seconds,
    cpu_seconds=round(cpu_seconds, 1),
    sizes=harness.settings_of(settings),
    curves={feedback.METHODS[n].title: r.returns for n, r in results.items()},
  )
  print(f'Results: {path}')
  return metrics


def paired_leads(results: Mapping[str, Result]) -> dict[str, float]:
  """Computes leads of PBRL over all, and of the others over the controls.

  For each seed all methods start at the same policy, so the interval is that of
  the differences.

  Args:
    results: by method.

  Returns:
    Metrics `A/lead_over_B`, of the return at the end, and `A/area_lead_over_B`.
  """
  metrics: dict[str, float] = {}
  control = lambda name: name.startswith('control/')
  for name, other in itertools.permutations(results, 2):
    if control(name) or not (name == 'pbrl' or control(other)):
      continue
    one, two = results[name], results[other]
    for lead, values in (
      ('lead', one.returns[-1] - two.returns[-1]),
      ('area_lead', area(one) - area(two)),
    ):
      interval = harness.mean_interval(values)
      metrics |= interval.metrics(f'{name}/{lead}_over_{other}')
  return metrics


def _plot(folder, settings, results):
  labelled = [r for r in results.values() if r.labels[-1].max() > 0]
  returns, accuracy = {}, {}
  for name, result in results.items():
    title = feedback.METHODS[name].title
    at = result.labels
    if not at[-1].max() and labelled and len(labelled[0].labels) == len(at):
      # Drawn beside the others, at equal updates.
      at, title = labelled[0].labels, f'{title} (no labels)'
    returns[title] = (at.mean(axis=1), result.returns)
    if result.accuracy is not None:
      accuracy[title] = (at.mean(axis=1), result.accuracy)
  panels = [
    harness.Panel(
      returns,
      'labels',
      f'true return, last {settings.episodes} episodes',
      title=str(settings.env),
    )
  ]
  if accuracy:
    panels.append(
      harness.Panel(accuracy, 'labels', 'accuracy on untied pairs, held out')
    )
  harness.plot_panels(folder / 'returns.png', panels)


def _keep(folder, settings, results):
  for name, result in results.items():
    last = result.returns[-1]
    best = int(np.nanargmax(last)) if np.isfinite(last).any() else 0
    actor = _at(result.actors, best)
    about = {'return': float(last[best]), 'method': name}
    policy = policies.Policy(str(settings.env), actor, about)
    policies.save(folder / policy_file(name), policy)


def _at(tree, index):
  if isinstance(tree, Mapping):
    return {k: _at(v, index) for k, v in tree.items()}
  return np.asarray(tree[index])


def policy_file(method: str) -> str:
  """The name of the file of a method's policy."""
  return f'policy_{method.split("/")[-1]}.npz'
