"""Report of a comparison of recognisers: error rates, table and curves."""

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

# Errors of the reported seeds, by set and by 'words' and 'characters'.
PartErrors = dict[str, dict[str, list[scoring.Errors]]]
# Baselines of the differences, with their names in the table.
_AGAINST = {
  'supervised': 'supervised',
  'supervised_longer': 'supervised at equal gradients',
  'pretrain': 'pre-training',
}
_CONTROLS = ('supervised', 'supervised_longer')


def measure(
  problem: problem_lib.Problem, outcome: comparison.Outcome
) -> PartErrors:
  """Measures the errors of the reported seeds on all sets."""
  params = jax.tree.map(
    lambda leaf: leaf[outcome.members], outcome.trained.params
  )
  # About a thousand training utterances suffice.
  rows = problem.labelled[:: max(1, len(problem.labelled) // 1_000)]
  errors = {'training': problem_lib.errors(problem, params, 'train', rows)}
  for part in ('validation', 'test', *problem.corpus.more):
    errors[part] = problem_lib.errors(problem, params, part)
  return errors


def rates(errors: Sequence[scoring.Errors]) -> np.ndarray:
  """Returns the error rate of each seed."""
  return np.array([one.rate for one in errors])


def add(
  results: harness.Results,
  settings: presets.Settings,
  outcomes: Mapping[str, comparison.Outcome],
  errors: Mapping[str, PartErrors],
  at: Mapping[str, float],
) -> None:
  """Adds the metrics of all methods.

  Args:
    results: the results to extend.
    settings: settings of the run.
    outcomes: outcomes by method.
    errors: errors by method, without failed methods.
    at: further coordinates.
  """

  def measure(outcome):
    parts = errors[outcome.method]
    words = {part: rates(kinds['words']) for part, kinds in parts.items()}
    training = words.pop('training')
    return {
      'wer': words.pop('test'),
      'cer': rates(parts['test']['characters']),
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
    gradients = methods.gradients(plan)
    worst = rates(errors[name]['training']['words']).max()
    results.note(
      place,
      {
        'updates': len(plan),
        'gradients of transcripts, audio': f'{gradients["ctc"]}, '
        f'{gradients["ssl"]}',
        's per seed': round(results.mean('seconds', place)),
        'converged': 'yes' if worst <= settings.converged else 'not converged',
      },
    )
    for other in _AGAINST:
      if other not in errors or name in (other, *_CONTROLS):
        continue
      pair = (rates(errors[n]['test']['words']) for n in (name, other))
      place = {'method': name, 'against': other, **at}
      results.add(place, difference=np.subtract(*pair))


def columns(
  settings: presets.Settings, corpus: utterances.Corpus
) -> list[str | harness.Column]:
  """Returns the columns of the table."""
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
    's per seed',
    'converged',
    *(
      harness.Column('difference', f'against {words}', {'against': name})
      for name, words in _AGAINST.items()
    ),
  ]


def draw(
  settings: presets.Settings, outcomes: Mapping[str, comparison.Outcome]
) -> matplotlib.figure.Figure:
  """Draws the validation error by updates and by gradients."""
  by_updates, by_gradients = {}, {}
  for name, outcome in outcomes.items():
    if outcome.failure:
      continue
    values = outcome.values('validation')
    evaluated = ~np.isnan(values).all(axis=1)
    steps = np.asarray(outcome.trained.steps)[evaluated]
    losses = np.array([len(step) for step in feed.STEPS])[settings.plan(name)]
    title = methods.TITLES[name]
    # A logarithmic axis has no 0.
    values = np.maximum(values[evaluated], 1e-3)
    by_updates[title] = steps, values
    by_gradients[title] = np.cumsum(losses)[steps - 1], values
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
  """Mean test word error by the fraction with texts, for each method.

  Without bands: those of all methods would overlap.
  """
  order = np.argsort(shares)
  mean = lambda parts: rates(parts['test']['words']).mean(keepdims=True)
  return {
    methods.TITLES[name]: (
      np.asarray(shares)[order],
      np.stack([mean(errors[i][name]) for i in order]),
    )
    for name in errors[0]
    # A method that failed with some fraction has no curve.
    if all(name in one for one in errors)
  }


def draw_shares(
  shares: Sequence[float], errors: Sequence[Mapping[str, PartErrors]]
) -> matplotlib.figure.Figure:
  """Draws `share_curves`."""
  panel = harness.Panel(
    share_curves(shares, errors),
    xlabel='fraction of the utterances with a text',
    ylabel='word error, test, mean over seeds',
    logx=True,
  )
  return harness.draw_panels([panel])
