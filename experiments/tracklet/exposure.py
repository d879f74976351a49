"""Search on the tracker's own histories, against teacher forcing and a beam.

Paper: Hu, Huang and Shen, Multi-object Tracking via End-to-end Tracklet
Searching and Ranking, 2020; its search is that of one target.

    python -m experiments.tracklet.exposure --preset=quick --data_dir=DATA

Expected: the oracle's headroom is above 3 points of IDF1 in both conditions.
Time: about 60 CPU-minutes.

From the same pretrained weights, networks train for about equal time by teacher
forcing; by beam search; and on histories of the tracker itself. Each is scored
online by the step's score, and by whole tracklets online and near-online.
Controls are the pretrained weights and classical trackers, tuned on the
training sequences. The oracle matches tracklets of more than one person by the
truth: the person of the last detection or none, the last person, or the
person of most detections. Its lead is the headroom.
Conditions are detectors with errors of real ones: embeddings that walk and mix
under occlusion, and correlated jitter.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from experiments import harness
from experiments.tracking import (
  evaluation,
  judging,
  near_online,
  scenes,
  tracker,
)
from experiments.tracklet import (
  learning,
  rollout_training,
  rollouts,
  simulation,
  train,
)
from experiments.tracklet.train_report import FIRST

WAYS = ('teacher_forcing', 'search', 'rollouts')
MATCHINGS = near_online.MATCHINGS
ORACLES = ('last', 'person', 'majority')
# What differs from the settings of the data, by condition.
CONDITIONS: dict[str, dict[str, Any]] = {
  'motion': {'detector': 'hard', 'embedding': 0, 'correlation': 0.5},
  'mixed': {
    'detector': 'hard',
    'embedding': 16,
    'noise': 1.5,
    'walk': 0.02,
    'mixing': 0.6,
    'correlation': 0.5,
  },
}
MEANINGS = {
  'motion': 'Motion only, with correlated jitter.',
  'mixed': 'Embeddings that walk and are mixed under occlusion.',
}


@dataclasses.dataclass(frozen=True)
class Settings(train.Settings):
  """Conditions, and the size of each run.

  Attributes:
    rollouts: histories of the tracker to train on.
    rollout_steps: updates on them, in about the time of the other ways.
    conditions: detectors to compare in.
    more_held_out: further sequences to test on, not trained on.
    matchings: how detections are matched, instead of `matching`.
  """

  rollouts: rollout_training.Rollouts = rollout_training.Rollouts()  # noqa: RUF009
  rollout_steps: int = 500
  conditions: Annotated[
    tuple[str, ...], harness.Among(CONDITIONS, MEANINGS)
  ] = tuple(CONDITIONS)
  more_held_out: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = (
    'MOT17-11',
  )
  matchings: Annotated[tuple[str, ...], harness.Among(MATCHINGS)] = tuple(
    MATCHINGS
  )


PRESETS = {
  'quick': Settings(
    data=simulation.Data(
      sequences=('MOT17-02', 'MOT17-04', 'MOT17-05', 'MOT17-10'),
      simulations=2,
      judged=2,
    ),
    network=learning.Network(members=1),
    training=learning.Training(1_000, 180, 700),
    seeds=6,
  ),
  'smoke': Settings(
    data=simulation.Data(simulations=1, judged=1),
    network=learning.Network(hidden=8, members=1),
    windows=learning.Windows(window=4, batch=4, measured=8),
    search=learning.Search(hypotheses=2, candidates=4),
    training=learning.Training(4, 2, 4, chunk=2),
    rollouts=rollout_training.Rollouts(redraw=2, frames=20, rows=8),
    rollout_steps=2,
    conditions=('motion',),
    matchings=('step', 'tracklet'),
    more_held_out=(),
    seeds=2,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for inconsistent settings."""
  train.check(settings)
  common = set(settings.more_held_out) & {
    *settings.data.sequences,
    settings.data.held_out,
  }
  if common or settings.network.members != 1:
    raise harness.SettingsError(
      f'more_held_out={",".join(settings.more_held_out)}, '
      f'members={settings.network.members}: hold out sequences that are not '
      'trained on, once each, and train one network per seed.'
    )


def test_trials(
  options: harness.Options, first: list[judging.Trial]
) -> dict[str, list[judging.Trial]]:
  """The simulations of each held-out sequence, by its name."""
  settings = options.settings
  trials = {first[0].scene.info.name: first}
  for name in settings.more_held_out if options.data_dir else ():
    scene = scenes.read(options.data_dir, name)
    trials[name] = settings.data.test_trials(scene)
  return trials


def train_ways(
  options: harness.Options, prepared: train.Prepared
) -> Iterator[tuple[str, harness.Trained]]:
  """Trains the networks in each way; yields them with its name."""
  settings, first = options.settings, None
  for name, trained in train.train_networks(options, prepared.task):
    first = trained if name == FIRST else first
    yield name, trained
  yield (
    'rollouts',
    rollout_training.train(
      prepared.task,
      train.common_run(options),
      prepared.simulated,
      settings.rollouts,
      name='rollouts',
      rate=settings.training.rate / 2,
      steps=settings.rollout_steps,
      start=first.params,
    ),
  )


def judge(
  makers: Sequence[judging.Track], trials: Mapping[str, list[judging.Trial]]
) -> dict[str, np.ndarray]:
  """Scores trackers, one per seed, by measure: (seeds, sequences)."""
  scores = [
    [judging.judge(track, on) for on in trials.values()] for track in makers
  ]
  return {
    measure: np.array([[one[measure].mean() for one in row] for row in scores])
    for measure in judging.MEASURES
  }


def _oracle(model, oracle):
  return lambda detected: rollouts.record(model, detected, oracle=oracle).boxes


def add_errors(
  results: harness.Results,
  at: Mapping[str, Any],
  models: Sequence[tracker.Model],
  trials: Mapping[str, list[judging.Trial]],
) -> None:
  """Adds shares of wrong choices on pure and mixed histories, in per cent."""
  rows = []
  for model in models:
    errors = [
      rollouts.count_errors(
        trial.detected, rollouts.record(model, trial.detected).histories
      )
      for on in trials.values()
      for trial in on[:1]
    ]
    rows.append(100 * np.mean([e[1:] for e in errors], axis=0))
  names = rollouts.Errors._fields[1:]
  results.put(at, dict(zip(names, np.transpose(rows))))


def add_condition(
  results: harness.Results,
  condition: str,
  scores: Mapping[tuple[str, str], Mapping[str, np.ndarray]],
  names: Sequence[str],
) -> None:
  """Adds the numbers of a condition, and paired differences.

  Args:
    results: to add to.
    condition: its name.
    scores: by method and matching, and by measure, (seeds, sequences).
    names: of the sequences.
  """
  for (method, matching), values in scores.items():
    at = {'condition': condition, 'method': method, 'matching': matching}
    results.put(at, {name: x.mean(axis=1) for name, x in values.items()})

  def lead(over, one, two, measures=('idf1', 'switches')):
    for measure in measures:
      difference = scores[one][measure] - scores[two][measure]
      at = {'condition': condition, **over}
      results.put(at, {f'{measure}_lead': difference.mean(axis=1)})
      for i, name in enumerate(names):
        results.put(
          {**at, 'sequence': name}, {f'{measure}_lead': difference[:, i]}
        )

  matchings = [m for way, m in scores if way == WAYS[-1]]
  for matching in matchings:
    for way, over in (
      *((way, WAYS[0]) for way in WAYS[1:]),
      *((way, FIRST) for way in WAYS),
    ):
      at = {'method': way, 'over': over, 'matching': matching}
      lead(at, (way, matching), (over, matching))
  for way in (*WAYS, FIRST):
    for matching in matchings:
      if matching != 'step':
        at = {'method': way, 'matching': matching, 'over': 'step'}
        lead(at, (way, matching), (way, 'step'))
    for oracle in ORACLES:
      if (way, f'oracle_{oracle}') in scores:
        at = {'method': way, 'headroom': oracle}
        lead(at, (way, f'oracle_{oracle}'), (way, 'step'), ('idf1',))


def run_condition(
  results: harness.Results, options: harness.Options, condition: str
) -> harness.Source:
  """Trains and scores all methods in a condition; returns the data's source."""
  prepared = train.prepare(options)
  trials = test_trials(options, prepared.test)
  scores = {}
  for name, trained in train_ways(options, prepared):
    results.put(
      {'condition': condition, 'method': name}, {'seconds': trained.seconds}
    )
    weights = train.split_members(trained.params, 1)
    models = [tracker.make_model(x, prepared.task.noise) for x in weights]
    # One set of rules for all networks, which were not tuned for any of them.
    tracks = {
      matching: [judging.make_tracker(MATCHINGS[matching], m) for m in models]
      for matching in options.settings.matchings
    }
    if name in (FIRST, WAYS[0]):
      for oracle in ORACLES:
        tracks[f'oracle_{oracle}'] = [_oracle(m, oracle) for m in models]
    for matching, one in tracks.items():
      scores[name, matching] = judge(one, trials)
      idf1 = scores[name, matching]['idf1'].mean()
      print(f'{condition}, {name}, {matching}: IDF1 {idf1:.2f}', flush=True)
    add_errors(
      results, {'condition': condition, 'method': name}, models, trials
    )
  if options.settings.full:
    classical = judging.classical(prepared.task.noise)
    for name, (make, grid) in classical.items():
      values = judging.objective(make, prepared.tuning)
      choice = judging.tune(grid, values)
      # The same tracker for every seed.
      one = judge([make(**choice.point)], trials)
      scores[name, 'step'] = one
  add_condition(results, condition, scores, list(trials))
  return prepared.source


def main(options: harness.Options) -> harness.Report:
  """Runs every condition."""
  evaluation.import_trackeval()  # Fails before the training, not after it.
  results, sources = harness.Results(), []
  for condition in options.settings.conditions:
    print(f'Condition {condition}.', flush=True)
    data = dataclasses.replace(options.settings.data, **CONDITIONS[condition])
    run = options._replace(
      settings=dataclasses.replace(options.settings, data=data),
      workdir=str(pathlib.Path(options.workdir) / condition),
    )
    sources.append(run_condition(results, run, condition))
  return harness.Report(
    results,
    rows=('condition', 'method'),
    columns=(
      *(
        harness.Column('idf1', f'IDF1 {name}', {'matching': name})
        for name in (*options.settings.matchings, 'oracle_person')
      ),
      *(
        harness.Column('switches', f'switches {name}', {'matching': name})
        for name in options.settings.matchings
      ),
      *(harness.Column(name) for name in rollouts.Errors._fields[1:]),
      'seconds',
    ),
    data=sources[:1],
    published=[simulation.PUBLISHED],
  )


STUDY = harness.Study(
  main, PRESETS, paper='tracklet', binary='exposure', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
