"""What a comparison of recognisers says: errors, table, curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib.figure
import numpy as np

from experiments import harness
from experiments.bl_just import methods, presets
from experiments.bl_just import problem as problem_lib
from experiments.harness.study import comparison
from experiments.speech import feed, scoring, utterances

# Errors of the reported seeds, by part of the corpus and kind.
PartErrors = dict[str, dict[str, list[scoring.Errors]]]
# What others are compared with, in the words of the table.
_AGAINST = {
  'supervised': 'supervised',
  'supervised_longer': 'supervised at equal gradients',
  'pretrain': 'pre-training',
}
_CONTROLS = ('supervised', 'supervised_longer')


def measure(
  problem: problem_lib.Problem, outcome: comparison.Outcome
) -> PartErrors:
  """Errors of the reported seeds by part and kind; of training, some rows."""
  params = jax.tree.map(
    lambda leaf: leaf[outcome.members], outcome.trained.params
  )
  # Evenly over the utterances: of many, a thousand tell enough.
  rows = problem.labelled[:: max(1, len(problem.labelled) // 1_000)]
  found = {'training': problem_lib.errors(problem, params, 'train', rows)}
  for part in ('validation', 'test', *problem.corpus.more):
    found[part] = problem_lib.errors(problem, params, part)
  return found


def rates(errors: Sequence[scoring.Errors]) -> np.ndarray:
  """Error rates of all seeds."""
  return np.array([one.rate for one in errors])


def add(
  results: harness.Results,
  settings: presets.Settings,
  outcomes: Mapping[str, comparison.Outcome],
  errors: Mapping[str, PartErrors],
  at: Mapping[str, float],
) -> None:
  """Adds the numbers of all methods.

  Args:
    results: to which they are added.
    settings: of the run.
    outcomes: by method.
    errors: of those that did not fail, by method.
    at: coordinates beside the method.
  """

  def measure(outcome):
    found = errors[outcome.method]
    words = {part: rates(kinds['words']) for part, kinds in found.items()}
    training = words.pop('training')
    return {
      'wer': words.pop('test'),
      'cer': rates(found['test']['characters']),
      'training_error': training,
      'worst_training_error': training.max(),
      'validation_error': words.pop('validation'),
      **{f'wer_{part}': values for part, values in words.items()},
      'seconds': outcome.trained.seconds / len(outcome.members),
    }

  comparison.add_outcomes(results, outcomes, measure, at)
  for name in errors:
    place = {'method': name, **at}
    plan = settings.plan(name)
    taken = methods.gradients(plan)
    # One that has not converged makes others look good.
    worst = rates(errors[name]['training']['words']).max()
    results.note(
      place,
      {
        'updates': len(plan),
        'gradients of transcripts, audio': f'{taken["ctc"]}, {taken["ssl"]}',
        's a seed': round(results.mean('seconds', place)),
        'converged': 'yes' if worst <= settings.converged else 'not converged',
      },
    )
    for other in _AGAINST:
      if other not in errors or name in (other, *_CONTROLS):
        continue
      both = (rates(errors[n]['test']['words']) for n in (name, other))
      lead = np.subtract(*both)
      against = {'method': name, 'against': other, **at}
      results.add(against, difference=lead)


def columns(
  settings: presets.Settings, corpus: utterances.Corpus
) -> list[str | harness.Column]:
  """Those of the table."""
  points = [point for m in settings.methods for point in settings.axes(m)]
  return [
    harness.Column('training_error', 'training error'),
    harness.Column('validation_error', 'validation error'),
    harness.Column('wer', 'test error'),
    *(harness.Column(f'wer_{part}', f'{part} error') for part in corpus.more),
    harness.Column('cer', 'character error'),
    *dict.fromkeys(points),
    'trials',
    'updates',
    'gradients of transcripts, audio',
    's a seed',
    'converged',
    *(
      harness.Column('difference', f'against {words}', {'against': name})
      for name, words in _AGAINST.items()
    ),
  ]


def draw(
  settings: presets.Settings, outcomes: Mapping[str, comparison.Outcome]
) -> matplotlib.figure.Figure:
  """Error of the validation part, by updates and by gradients."""
  by_updates, by_gradients = {}, {}
  for name, outcome in outcomes.items():
    if outcome.failure:
      continue
    values = outcome.values('validation')
    looked = ~np.isnan(values).all(axis=1)
    steps = np.asarray(outcome.trained.steps)[looked]
    each = np.array([len(step) for step in feed.STEPS])[settings.plan(name)]
    title = methods.TITLES[name]
    # No error at all has no logarithm.
    shown = np.maximum(values[looked], 1e-3)
    by_updates[title] = steps, shown
    by_gradients[title] = np.cumsum(each)[steps - 1], shown
  return harness.draw_panels(
    [
      harness.Panel(
        curves, xlabel=label, ylabel='word error, validation', logy=True
      )
      for curves, label in (
        (by_updates, 'updates'),
        (by_gradients, 'gradients of either loss'),
      )
    ]
  )


def share_curves(
  shares: Sequence[float], errors: Sequence[Mapping[str, PartErrors]]
) -> dict[str, tuple[Any, Any]]:
  """Mean word error of the test by the share that has texts, by title.

  Means without bands, which of so many methods hide one another.
  """
  order = np.argsort(shares)
  mean = lambda found: rates(found['test']['words']).mean(keepdims=True)
  return {
    methods.TITLES[name]: (
      np.asarray(shares)[order],
      np.stack([mean(errors[i][name]) for i in order]),
    )
    for name in errors[0]
    # One that failed with some share has no line.
    if all(name in one for one in errors)
  }


def draw_shares(
  shares: Sequence[float], errors: Sequence[Mapping[str, PartErrors]]
) -> matplotlib.figure.Figure:
  """Draws `share_curves`."""
  panel = harness.Panel(
    share_curves(shares, errors),
    xlabel='share of the utterances with a text',
    ylabel='word error, test, mean of the seeds',
    logx=True,
  )
  return harness.draw_panels([panel])
