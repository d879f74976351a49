"""Search in training against teacher forcing, for multi-object tracking.

Paper: Hu, Huang and Shen, Multi-object Tracking via End-to-end Tracklet
Searching and Ranking, 2020.

    python -m experiments.tracklet.train --preset=quick --data_dir=DATA
    python -m experiments.tracklet.train --preset=quick

Expected: MOT17-09, simulated detections: IDF1 of about 65 for the networks, 57
for trackers with classical affinities. Time: 10 minutes on 2 cores.

A network scores how well a detection continues a tracklet. It is pretrained on
true histories; from the same weights, training continues on true histories
(teacher forcing), or on histories of its own beam search, with margin and rank
losses. Both are tested on a held-out sequence, by the purity of a search and in
a tracker. Controls are the pretrained weights, and trackers with classical
affinities, tuned on the training sequences. Detections are simulated from the
true trajectories of MOT17, in `DATA/mot` or `DATA/MOT17/train`; without
--data_dir, people walk at random.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.study import comparison
from experiments.tracking import (
  detections,
  evaluation,
  judging,
  models,
  near_online,
  overlay,
  scenes,
  tracker,
)
from experiments.tracklet import (
  learning,
  simulation,
  train_report,
  untrained,
)
from experiments.tracklet.train_report import BOTH, FIRST

# Rules to tune; a second overlap of 2 is no second pass. The smallest score
# stays at 0: tuned on sequences of the training, it is too low for others.
GRID = {'second_overlap': comparison.among((0.5, 2.0)), 'birth': judging.BIRTH}
_DEFAULT = (
  simulation.Data(),
  learning.Network(),
  learning.Windows(),
  learning.Search(),
  learning.Training(),
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings; the paper does not state sizes and margins, so these are ours.

  Attributes:
    data: sequences, and their simulated detections.
    network: networks of a tracker.
    windows: to train on.
    search: in training.
    training: updates.
    matching: how detections are matched: by the score of whole tracklets, among
      several hypotheses that are reported at once, or by the step's score.
    full: whether to test the pretrained weights, classical and near-online
      trackers too.
    seeds: of training.
  """

  data: simulation.Data = _DEFAULT[0]
  network: learning.Network = _DEFAULT[1]
  windows: learning.Windows = _DEFAULT[2]
  search: learning.Search = _DEFAULT[3]
  training: learning.Training = _DEFAULT[4]
  matching: Literal['tracklet', 'step'] = 'tracklet'
  full: bool = True
  seeds: int = 3


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    data=simulation.Data(simulations=1, judged=2),
    network=learning.Network(hidden=16),
    windows=learning.Windows(window=6, batch=8, measured=16),
    search=learning.Search(hypotheses=2, candidates=4),
    training=learning.Training(20, 10, 20, chunk=10),
    seeds=2,
  ),
  'paper': Settings(
    data=simulation.Data(simulations=16),
    network=learning.Network(hidden=256),
    windows=learning.Windows(measured=4_096),
    search=learning.Search(hypotheses=8),
    training=learning.Training(20_000, 10_000, 40_000),
  ),
}
# Former flags.
RENAMED = {
  'looks': 'data.embedding',
  'longest': 'windows.max_gap',
  'own': 'search.rollout_loss',
  'pairs': 'search.rank_loss',
  'warm': 'training.pretrain_steps',
  'search': 'training.search_steps',
  'forced': 'training.forcing_steps',
  'windows': 'windows.measured',
}


def check(settings: Settings) -> None:
  """Raises SettingsError for inconsistent settings."""
  settings.data.check()


class Prepared(NamedTuple):
  """Data of a run.

  Attributes:
    scene: held out.
    source: of the data.
    task: training data of the networks.
    tuning: trials to tune rules on.
    test: trials to score on.
    simulated: the detections of `task.data`, in order.
  """

  scene: scenes.Scene
  source: harness.Source
  task: learning.Task
  tuning: list[judging.Trial]
  test: list[judging.Trial]
  simulated: list[detections.Detected]


def prepare(options: harness.Options) -> Prepared:
  """Reads the sequences, simulates detections, and fits the filter's noise."""
  settings, data = options.settings, options.settings.data
  train_on, held_out, source = simulation.read(options)
  print(f'Data: {source.words}.', flush=True)
  start = simulation.TRAINING
  seeds = range(start, start + data.simulations)
  simulated = [
    # Identities come from overlaps, as with a real detector.
    trial.detected._replace(
      ids=detections.match(
        trial.scene.truth, trial.detected.boxes, trial.scene.info.length
      )
    )
    for trial in judging.trials(train_on, data.simulated_detector(), seeds)
  ]
  windows = settings.windows
  task = learning.Task(
    detections.pad(simulated),
    learning.fit_noise(simulated, rng=np.random.default_rng(0)),
    settings.network.hidden,
    {
      'steps': windows.window,
      'jumps': windows.jumps,
      'max_gap': windows.max_gap,
    },
    windows.batch,
  )
  return Prepared(
    held_out,
    source,
    task,
    data.tuning_trials(train_on),
    data.test_trials(held_out),
    simulated,
  )


def common_run(options: harness.Options) -> learning.Run:
  """What all networks of a study have in common."""
  settings = options.settings
  identity = harness.run_settings(
    settings,
    'data.judged',
    'windows.measured',
    'network.members',
    'full',
    'matching',
  )
  return learning.Run(
    options, identity, settings.training.chunk, settings.network.members
  )


def train_networks(
  options: harness.Options, task: learning.Task
) -> Iterator[tuple[str, harness.Trained]]:
  """Pretrains, then trains in both ways; yields each stage with its name."""
  settings, training = options.settings, options.settings.training
  teacher = dataclasses.replace(settings.search, hypotheses=0)
  run = functools.partial(learning.train, task, common_run(options))
  steps = training.pretrain_steps
  first = run(teacher, name='warm', rate=training.rate, steps=steps)
  yield FIRST, first
  run = functools.partial(
    run, rate=training.rate / 2, end=0.01, start=first.params
  )
  name, steps = 'teacher_forcing', training.forcing_steps
  yield name, run(teacher, name=name, steps=steps)
  yield (
    'search',
    run(settings.search, name='search', steps=training.search_steps),
  )


def split_members(params: Any, members: int) -> list[dict[str, np.ndarray]]:
  """Splits weights by seed, in numpy, with a leading axis of its networks."""
  stacked = {
    name: np.asarray(x).reshape(-1, members, *x.shape[1:])
    for name, x in params.items()
  }
  seeds = len(stacked['last'])
  return [{name: x[i] for name, x in stacked.items()} for i in range(seeds)]


def judge_classical(
  classical: dict[str, Any],
  tuning: list[judging.Trial],
  test: list[judging.Trial],
) -> dict[str, judging.Judged]:
  """Tunes and scores trackers with classical affinities, by name."""
  return {
    name: judging.tune_and_judge(name, [make], grid, tuning, test)
    for name, (make, grid) in classical.items()
  }


def judge_networks(
  name: str,
  models: list[tracker.Model],
  tuning: list[judging.Trial],
  test: list[judging.Trial],
  *,
  with_near_online: bool,
  matching: str = 'step',
) -> dict[str, judging.Judged]:
  """Tunes and scores networks, all with the rules of the first seed.

  Args:
    name: of the method.
    models: one per seed.
    tuning: trials to choose the rules on.
    test: trials to score on.
    with_near_online: whether to score near-online trackers too, by these rules.
    matching: in `near_online.MATCHINGS`; rules are tuned by the step's score.

  Returns:
    Scores by `name`, and by `name` with the suffix `_near_online`.
  """
  makers = lambda track: [
    functools.partial(judging.make_tracker, track, model) for model in models
  ]
  online = judging.tune_and_judge(
    name, makers(tracker.online), GRID, tuning, test
  )
  if online.choice is None:
    return {name: online}
  point = online.choice.point
  if matching != 'step':
    scores = judging.judge_all(
      makers(near_online.MATCHINGS[matching]), point, test
    )
    online = online._replace(scores=scores)
  if not with_near_online:
    return {name: online}
  scores = judging.judge_all(makers(near_online.track), point, test)
  return {name: online, f'{name}_near_online': judging.Judged(scores)}


def judge_untrained(
  results: harness.Results,
  data_dir: str | None,
  trained: dict[str, list[tracker.Model]],
  classical: dict[str, Any],
  choices: dict[str, judging.Choice],
) -> None:
  """Adds the scores of all trackers on sequences of another data set."""
  draws = untrained.read(data_dir)
  if draws is None:
    return
  scores = {
    name: untrained.judge([make(**choices[name].point)], draws)
    for name, (make, _) in classical.items()
  }
  for name, networks in trained.items():
    tracks = [
      judging.make_tracker(tracker.online, model, **choices[name].point)
      for model in networks
    ]
    scores[name] = untrained.judge(tracks, draws)
  both = [scores[name] for name in BOTH]
  scores['better'] = max(both, key=lambda s: s['idf1', 'all'].mean())
  for name, values in scores.items():
    untrained.add(results, {'method': name}, values)


def main(options: harness.Options) -> harness.Report:
  """Trains and scores trackers, and writes them."""
  evaluation.import_trackeval()  # Fails before the training, not after it.
  settings = options.settings
  scene, source, task, tuning, test, _ = prepare(options)
  classical = judging.classical(task.noise) if settings.full else {}
  jobs: list[Any] = [
    judging.run_in_thread(lambda: judge_classical(classical, tuning, test))
  ]
  trained, weights, networks = {}, {}, {}
  for name, run in train_networks(options, task):
    if name == FIRST and not settings.full:
      continue
    trained[name] = run
    weights[name] = split_members(run.params, settings.network.members)
    networks[name] = [tracker.make_model(x, task.noise) for x in weights[name]]
    judge = functools.partial(
      judge_networks,
      *(name, networks[name], tuning, test),
      with_near_online=settings.full and name in BOTH,
      matching=settings.matching,
    )
    jobs.append(judging.run_in_thread(judge))
  frames = detections.pad([trial.detected for trial in test])
  purity = {
    (name, beam): learning.measure_purity(
      run.params,
      task,
      frames,
      hypotheses=k,
      normalised=normalised,
      count=settings.windows.measured,
    )
    for name, run in trained.items()
    for beam, (k, normalised) in train_report.SEARCHES.items()
  }
  judged: dict[str, judging.Judged] = {}
  for job in jobs:
    judged |= job.result()
  perfect = judging.judge(judging.true_identities, test)
  scores = {name: one.scores for name, one in judged.items()}
  scores['true_identities'] = {k: v[None] for k, v in perfect.items()}
  choices = {name: one.choice for name, one in judged.items() if one.choice}
  results = train_report.summarise(scores, choices, purity)
  if settings.data.embedding:
    auc = detections.auc(test[0].detected, np.random.default_rng(0))
    results.add(auc=auc)
  else:
    judge_untrained(results, options.data_dir, networks, classical, choices)
  folder = pathlib.Path(options.workdir)
  rules = {name: tracker.Rules(**choices[name].point) for name in weights}
  for name, seeds in weights.items():
    models.save(folder / f'{name}.npz', seeds[0], task.noise, rules[name])
  shown = tracker.online(
    networks['search'][0], test[0].detected, rules['search']
  )
  overlay.write(folder / 'tracks.png', shown, scene.info)
  curves = train_report.loss_curves(trained)
  figure = harness.draw_curves(
    curves, xlabel='updates after pretraining', ylabel='loss', logy=True
  )
  return harness.Report(
    results,
    columns=train_report.COLUMNS,
    titles={name: name.replace('_', ' ') for name in scores},
    curves={name: losses for name, (_, losses) in curves.items()},
    plots={'losses.png': figure},
    data=[source],
    published=[simulation.PUBLISHED],
    more={
      'chosen': {name: choice.point for name, choice in choices.items()},
      'edges': {name: list(choice.edges) for name, choice in choices.items()},
      'fitted_noise': task.noise._asdict(),
    },
  )


STUDY = harness.Study(main, PRESETS, check=check, renamed=RENAMED)


if __name__ == '__main__':
  harness.run(STUDY)
