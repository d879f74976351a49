"""Search in training against teacher forcing, for multi-object tracking.

Paper: Hu, Huang and Shen, Multi-object Tracking via End-to-end Tracklet
Searching and Ranking, 2020.

    python -m experiments.tracklet.train --preset=quick --data_dir=DATA
    python -m experiments.tracklet.train --preset=quick

Expected: MOT17-09, simulated detections: IDF1 of about 65 for the networks, 57
for trackers with classical affinities. Time: 10 minutes on 2 cores.

A network scores how well a detection goes on with a tracklet. It is trained on
the truth's histories first; then, from the same weights, on those again
(teacher forcing), or on those of its own beam search, with margin and rank
losses. Both are judged by the purity of a search on a sequence that is held
out, and in a tracker there, beside the first weights, as the simplest control,
and trackers with classical affinities that are tuned on the training sequences.
Detections are simulated from the true trajectories of MOT17, found in
`DATA/mot` or `DATA/MOT17/train`; without --data_dir, people who walk are made
up.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.study import comparison
from experiments.tracking import (
  detections,
  evaluation,
  judging,
  models,
  motion,
  near_online,
  overlay,
  scenes,
  tracker,
)
from experiments.tracklet import (
  learning,
  search,
  simulation,
  train_report,
  untrained,
)
from experiments.tracklet.train_report import BOTH, FIRST

# What is tried of the networks' rules; widened where an end is chosen. A second
# pass of 2 is none. The least affinity stays at 0, the score of null: tuned on
# sequences that the networks were trained on, it comes out too low for others.
GRID = {'second': comparison.among((0.5, 2.0)), 'birth': judging.BIRTH}


_DEFAULT = (
  simulation.Data(),
  learning.Network(),
  learning.Windows(),
  learning.Search(),
  learning.Training(),
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes and margins are not in the paper; all are ours.

  Attributes:
    data: sequences, and detections that are simulated of them.
    network: networks of a tracker.
    windows: to train on.
    search: in training.
    training: updates.
    full: whether the first weights, trackers with classical affinities, and
      near-online ones are judged too.
    seeds: of training.
  """

  data: simulation.Data = _DEFAULT[0]
  network: learning.Network = _DEFAULT[1]
  windows: learning.Windows = _DEFAULT[2]
  search: learning.Search = _DEFAULT[3]
  training: learning.Training = _DEFAULT[4]
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
# Flags of an earlier version.
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
  """Raises SettingsError for settings that no run can have."""
  settings.data.check()


class Prepared(NamedTuple):
  """What a run works with.

  Attributes:
    scene: that is held out.
    source: of the data.
    task: what networks are trained on.
    tuning: on which rules are tuned.
    held: what is judged on.
  """

  scene: scenes.Scene
  source: harness.Source
  task: learning.Task
  tuning: list[judging.Trial]
  held: list[judging.Trial]

  @property
  def noise(self) -> motion.Noise:
    """Of the filter."""
    return self.task.noise


def prepare(options: harness.Options) -> Prepared:
  """Reads the sequences, simulates detections, and fits the filter's noise."""
  settings, data = options.settings, options.settings.data
  train_on, held_out, source = simulation.read(options)
  print(f'Data: {source.words}.', flush=True)
  start = simulation.TRAINING
  seeds = range(start, start + data.simulations)
  simulated = [
    # As with any other detector, who is who is told by overlap.
    trial.found._replace(
      ids=detections.match(
        trial.scene.truth, trial.found.boxes, trial.scene.info.length
      )
    )
    for trial in judging.trials(train_on, data.simulated_detector(), seeds)
  ]
  windows = settings.windows
  task = learning.Task(
    detections.padded(simulated),
    learning.fit_noise(simulated, rng=np.random.default_rng(0)),
    settings.network.hidden,
    {
      'steps': windows.window,
      'jumps': windows.jumps,
      'longest': windows.max_gap,
    },
    windows.batch,
  )
  return Prepared(
    held_out,
    source,
    task,
    data.tuning_trials(train_on),
    data.held_trials(held_out),
  )


def networks(
  options: harness.Options, task: learning.Task
) -> Iterator[tuple[str, harness.Trained]]:
  """Trains the first weights, then both kinds from there, by name."""
  settings, training = options.settings, options.settings.training
  losses = settings.search.losses()
  teacher = learning.TEACHER._replace(
    beam=search.Beam(0, settings.search.candidates)
  )
  place = learning.Run(
    options,
    harness.settings_of(
      settings, 'data.judged', 'windows.measured', 'network.members', 'full'
    ),
    training.chunk,
    settings.network.members,
  )
  run = functools.partial(learning.train, task, place)
  steps = training.pretrain_steps
  warm = run(teacher, name='warm', rate=training.rate, steps=steps)
  yield FIRST, warm
  run = functools.partial(
    run, rate=training.rate / 2, end=0.01, start=warm.params
  )
  name, steps = 'teacher_forcing', training.forcing_steps
  yield name, run(teacher, name=name, steps=steps)
  yield 'search', run(losses, name='search', steps=training.search_steps)


def members_of(params: Any, members: int) -> list[dict[str, np.ndarray]]:
  """The weights of each seed, in numpy, with a leading axis of its networks."""
  several = {
    name: np.asarray(x).reshape(-1, members, *x.shape[1:])
    for name, x in params.items()
  }
  seeds = len(several['last'])
  return [{name: x[i] for name, x in several.items()} for i in range(seeds)]


def _tracker(track, model, **numbers):
  rules = tracker.Rules(**numbers)
  return lambda found: track(model, found, rules)


def judge_classical(
  classical: dict[str, Any],
  tuning: list[judging.Trial],
  held: list[judging.Trial],
) -> dict[str, judging.Judged]:
  """Tunes and judges trackers with classical affinities, by name."""
  return {
    name: judging.tuned(name, [make], grid, tuning, held)
    for name, (make, grid) in classical.items()
  }


def judge_networks(
  name: str,
  models: list[tracker.Model],
  tuning: list[judging.Trial],
  held: list[judging.Trial],
  *,
  waiting: bool,
) -> dict[str, judging.Judged]:
  """Tunes and judges what was trained, with the rules of the first seed.

  Args:
    name: of the method.
    models: of each seed.
    tuning: on which rules are chosen.
    held: what is judged on.
    waiting: whether near-online trackers are judged too, by the same rules.

  Returns:
    By the name, and with `_near_online` behind it.
  """
  several = lambda track: [
    functools.partial(_tracker, track, model) for model in models
  ]
  online = judging.tuned(name, several(tracker.online), GRID, tuning, held)
  if not waiting or online.tuned is None:
    return {name: online}
  late = judging.judge_all(several(near_online.track), online.tuned.point, held)
  return {name: online, f'{name}_near_online': judging.Judged(late)}


def judge_elsewhere(
  results: harness.Results,
  data_dir: str | None,
  trained: dict[str, list[tracker.Model]],
  classical: dict[str, Any],
  chosen: dict[str, judging.Tuned],
) -> None:
  """Adds numbers of all trackers on sequences that nothing was trained on."""
  held = untrained.read(data_dir)
  if held is None:
    return
  scores = {
    name: untrained.judge([make(**chosen[name].point)], held)
    for name, (make, _) in classical.items()
  }
  for name, every in trained.items():
    several = [
      _tracker(tracker.online, model, **chosen[name].point) for model in every
    ]
    scores[name] = untrained.judge(several, held)
  both = [scores[name] for name in BOTH]
  scores['better'] = max(both, key=lambda s: s['idf1', 'all'].mean())
  for name, found in scores.items():
    untrained.add(results, {'method': name}, found)


def main(options: harness.Options) -> harness.Report:
  """Trains and judges, and writes trackers."""
  evaluation.import_trackeval()  # Before the training, not after it.
  settings = options.settings
  prepared = prepare(options)
  _, source, task, tuning, held = prepared
  classical = judging.classical(prepared.noise) if settings.full else {}
  jobs: list[Any] = [
    judging.beside(lambda: judge_classical(classical, tuning, held))
  ]
  trained, weights, several = {}, {}, {}
  for name, run in networks(options, task):
    if name == FIRST and not settings.full:
      continue
    trained[name] = run
    weights[name] = members_of(run.params, settings.network.members)
    several[name] = [
      tracker.learned(each, prepared.noise) for each in weights[name]
    ]
    judge = functools.partial(judge_networks, name, several[name], tuning, held)
    waiting = settings.full and name in BOTH
    jobs.append(judging.beside(functools.partial(judge, waiting=waiting)))
  frames = detections.padded([trial.found for trial in held])
  purity = {
    (name, beam): learning.purities(
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
  perfect = judging.judge(judging.true_identities, held)
  scores = {name: one.scores for name, one in judged.items()}
  scores['true_identities'] = {k: v[None] for k, v in perfect.items()}
  chosen = {name: one.tuned for name, one in judged.items() if one.tuned}
  results = train_report.summarise(scores, chosen, purity)
  if settings.data.embedding:
    auc = detections.auc(held[0].found, np.random.default_rng(0))
    results.add(auc=auc)
  else:
    judge_elsewhere(results, options.data_dir, several, classical, chosen)
  folder = pathlib.Path(options.workdir)
  rules = {name: tracker.Rules(**chosen[name].point) for name in weights}
  for name, seeds in weights.items():
    path = folder / f'{name}.npz'
    models.save(path, seeds[0], prepared.noise, rules[name])
  shown = tracker.online(several['search'][0], held[0].found, rules['search'])
  overlay.write(folder / 'tracks.png', shown, prepared.scene.info)
  curves = train_report.loss_curves(trained)
  figure = harness.draw_curves(
    curves, xlabel='updates after the common ones', ylabel='loss', logy=True
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
      'chosen': {name: tuned.point for name, tuned in chosen.items()},
      'edges': {name: list(tuned.edges) for name, tuned in chosen.items()},
      'fitted_noise': prepared.noise._asdict(),
    },
  )


STUDY = harness.Study(
  main,
  PRESETS,
  paper='tracklet',
  binary='train',
  check=check,
  renamed=RENAMED,
)


if __name__ == '__main__':
  harness.run(STUDY)
