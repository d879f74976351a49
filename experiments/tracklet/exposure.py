"""Search on the tracker's own histories, against teacher forcing and a beam.

Paper: Hu, Huang and Shen, Multi-object Tracking via End-to-end Tracklet
Searching and Ranking, 2020; its search is that of one target.

    python -m experiments.tracklet.exposure --preset=quick --data_dir=DATA

Expected: the oracle has more than 3 points of headroom in IDF1, twice.
Time: about 35 CPU-minutes.

From the same pretrained weights, networks train by teacher forcing; by beam
search; and on histories of the tracker itself. The numbers of updates take
equal CPU time, which a run measures for an update of each way, side by side.
The learning rate of each way is tuned on the same grid, with other seeds, on a
sequence that is neither trained on nor reported. Trackers match by the score of
whole tracklets and report each frame at once; by the step's score for
comparison. Controls are the pretrained weights and classical trackers, tuned
like the networks. The oracle matches tracklets of more than one person by the
truth: the person of the last detection or none, the last person, or the
person of most detections. Its lead is the headroom.
Conditions are detectors with errors of real ones: embeddings that walk and mix
under occlusion, and correlated jitter.
"""

import dataclasses
import pathlib
from typing import Annotated, Any

from experiments import harness
from experiments.tracking import evaluation, near_online
from experiments.tracklet import (
  exposure_condition,
  exposure_scores,
  learning,
  rollout_training,
  rollouts,
  simulation,
  train,
)

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
_MATCHINGS = {
  'step': 'By the score of the last step.',
  'tracklet': 'By the score of whole tracklets, each frame reported at once.',
  'near_online': 'By the score of whole tracklets, reported with a delay.',
}


@dataclasses.dataclass(frozen=True)
class Settings(train.Settings):
  """Conditions, and the size of each run.

  Attributes:
    rollouts: histories of the tracker to train on.
    rollout_steps: updates on them, in the CPU time of the other ways.
    conditions: detectors to compare in.
    more_held_out: further sequences to test on, not trained on.
    validation: sequence to tune on, not trained on.
    validated: simulations of the validation sequence.
    factors: learning rates of the second stage to try, in shares of half of
      `rate`.
    tuning_seeds: networks per learning rate.
    matchings: how detections are matched; `matching` is tuned for.
  """

  rollouts: rollout_training.Rollouts = rollout_training.Rollouts()  # noqa: RUF009
  rollout_steps: int = 500
  conditions: Annotated[
    tuple[str, ...], harness.Among(CONDITIONS, MEANINGS)
  ] = tuple(CONDITIONS)
  more_held_out: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = (
    'MOT17-11',
  )
  validation: str = 'MOT17-10'
  validated: int = 2
  factors: tuple[float, ...] = (0.3, 1.0, 3.0)
  tuning_seeds: int = 2
  matchings: Annotated[
    tuple[str, ...], harness.Among(near_online.MATCHINGS, _MATCHINGS)
  ] = ('tracklet', 'step')


_TRAINED = ('MOT17-02', 'MOT17-04', 'MOT17-05')
PRESETS = {
  'quick': Settings(
    data=simulation.Data(sequences=_TRAINED, simulations=2, judged=1),
    network=learning.Network(members=1),
    # Equal CPU time after pretraining, by `cost.measure`: 6 and 1.55 times that
    # of an update of teacher forcing.
    training=learning.Training(1_000, 300, 1_800),
    rollout_steps=1_150,
    seeds=6,
  ),
  'smoke': Settings(
    data=simulation.Data(sequences=_TRAINED, simulations=1, judged=1),
    network=learning.Network(hidden=8, members=1),
    windows=learning.Windows(window=4, batch=4, measured=8),
    search=learning.Search(hypotheses=2, candidates=4),
    training=learning.Training(4, 2, 4, chunk=2),
    rollouts=rollout_training.Rollouts(redraw=2, frames=20, rows=8),
    rollout_steps=2,
    conditions=('motion',),
    more_held_out=(),
    validated=1,
    factors=(0.5, 1.0),
    tuning_seeds=1,
    seeds=2,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for inconsistent settings."""
  train.check(settings)
  names = (
    *settings.data.sequences,
    settings.data.held_out,
    *settings.more_held_out,
    settings.validation,
  )
  if len(set(names)) < len(names) or settings.network.members != 1:
    raise harness.SettingsError(
      f'more_held_out={",".join(settings.more_held_out)}, '
      f'validation={settings.validation}, '
      f'members={settings.network.members}: hold out sequences that are not '
      'trained on, once each, and train one network per seed.'
    )
  if settings.matching not in settings.matchings:
    raise harness.SettingsError(
      f'matching={settings.matching}: add it to matchings='
      f'{",".join(settings.matchings)}.'
    )
  if 'step' not in settings.matchings:
    raise harness.SettingsError(
      f'matchings={",".join(settings.matchings)}: add step, with which the '
      'oracle is compared.'
    )


def main(options: harness.Options) -> harness.Report:
  """Runs every condition."""
  evaluation.import_trackeval()  # Fails before the training, not after it.
  results, sources = harness.Results(), []
  settings = options.settings
  for condition in settings.conditions:
    print(f'Condition {condition}.', flush=True)
    data = dataclasses.replace(settings.data, **CONDITIONS[condition])
    run = options._replace(
      settings=dataclasses.replace(settings, data=data),
      workdir=str(pathlib.Path(options.workdir) / condition),
    )
    sources.append(exposure_condition.run(results, run, condition))
  return harness.Report(
    results,
    rows=('condition', 'method'),
    columns=(
      *(
        harness.Column('idf1', f'IDF1 {name}', {'matching': name})
        for name in (*settings.matchings, 'oracle_person')
      ),
      *(
        harness.Column('switches', f'switches {name}', {'matching': name})
        for name in settings.matchings
      ),
      *(harness.Column(name) for name in rollouts.Errors._fields[1:]),
      'rate',
      'updates',
      'cpu_seconds',
    ),
    plots={
      'leads.png': exposure_scores.draw(
        results, settings.conditions, settings.matching
      )
    },
    data=sources[:1],
    published=[simulation.PUBLISHED],
  )


STUDY = harness.Study(main, PRESETS, check=check)


if __name__ == '__main__':
  harness.run(STUDY)
