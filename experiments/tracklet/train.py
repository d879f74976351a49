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
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import jax
import numpy as np

from experiments import harness
from experiments.harness import comparison
from experiments.tracklet import (
  appearance,
  detections,
  evaluation,
  judging,
  learning,
  models,
  near_online,
  overlay,
  scenes,
  search,
  tracker,
  untrained,
)

# What the published numbers are of.
PUBLISHED = 'MOT17 test, public detections'
# Hypotheses of the searches that purities are of, and whether scores are
# normalised there.
SEARCHES = {'k1': (1, False), 'k4': (4, False), 'k4_normalised': (4, True)}
# What is tried of the networks' rules; widened where an end is chosen. A second
# pass of 2 is none. The least affinity stays at 0, the score of null: tuned on
# sequences that the networks were trained on, it comes out too low for others.
GRID = {'second': comparison.among((0.5, 2.0)), 'birth': judging.BIRTH}
TRAINING, TUNING, HELD = 1_000, 2_000, 0  # Seeds of simulations.
# What training in two ways begins with, and those.
FIRST, BOTH = 'first_weights', ('search', 'teacher_forcing')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes and margins are not in the paper; all are ours.

  Attributes:
    sequences: to train on.
    held_out: to judge on; MOT17-09 is the paper's for validation.
    detector: standard, or hard: more misses, false boxes and jitter.
    looks: numbers of an identity feature; 0 for motion alone.
    noise: of those, about its norm.
    crops: network of crops whose looks take the place of simulated ones; needs
      pictures, in the folder img1 of every sequence.
    crop_steps: its updates.
    simulations: of the training sequences.
    judged: simulations of the sequence that is held out.
    hidden: units of the LSTM and of the perceptron.
    window: steps of a window.
    hypotheses: K of the search in training.
    candidates: detections that extend a hypothesis, beside null.
    jumps: probability that a step of a window is not the next frame.
    longest: frames of such a step, at most.
    batch: windows of an update.
    warm: updates of teacher forcing that both begin with.
    growing: whether K doubles from 1 on in equal shares of these updates.
    normalised: whether the search compares log-probabilities, not scores.
    search: updates of search then.
    forced: updates of teacher forcing in its place; one of search takes as
      long as some five.
    rate: Adam's, at first; falls to a tenth. From there half of it, down to a
      hundredth.
    own: weight of the cross entropy on the search's histories, those that are
      mostly of the target.
    pairs: weight of margin and rank.
    alpha: margin of a tracklet without a right choice.
    beta: margin by the difference of purities.
    windows: that purities are measured on.
    chunk: updates between two records.
    members: networks of a tracker, whose scores are averaged; all of them are
      trained alike.
    full: whether the first weights, trackers with classical affinities, and
      near-online ones are judged too.
    seeds: of training.
  """

  sequences: tuple[str, ...] = (
    *('MOT17-02', 'MOT17-04', 'MOT17-05', 'MOT17-10', 'MOT17-11'),
  )
  held_out: str = 'MOT17-09'
  detector: Literal['standard', 'hard'] = 'standard'
  looks: Annotated[int, harness.Allowed(0)] = 0
  noise: float = 1.0
  crops: Literal['none', 'small', 'resnet50'] = 'none'
  crop_steps: int = 2_000
  simulations: int = 4
  judged: int = 10
  hidden: int = 64
  window: int = 16
  hypotheses: int = 4
  candidates: int = 8
  jumps: Annotated[float, harness.Allowed(0, 1)] = 0.35
  longest: int = 90
  batch: int = 32
  growing: bool = False
  normalised: bool = False
  warm: int = 2_000
  search: int = 400
  forced: int = 1_500
  rate: float = 2e-3
  own: Annotated[float, harness.Allowed(0)] = 0.1
  pairs: Annotated[float, harness.Allowed(0)] = 0.2
  alpha: float = 2.0
  beta: float = 1.0
  windows: int = 512
  chunk: int = 100
  members: int = 2
  full: bool = True
  seeds: int = 3


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    simulations=1,
    judged=2,
    hidden=16,
    window=6,
    hypotheses=2,
    candidates=4,
    batch=8,
    warm=20,
    search=10,
    forced=20,
    windows=16,
    chunk=10,
    members=2,
    seeds=2,
  ),
  'paper': Settings(
    simulations=16,
    hidden=256,
    hypotheses=8,
    warm=20_000,
    search=10_000,
    forced=40_000,
    windows=4_096,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  if settings.window < 2:
    raise harness.SettingsError(
      f'window={settings.window}: of one step there is no history; take 2 or '
      'more.'
    )
  names = settings.sequences
  if not names or len(set(names)) < len(names) or settings.held_out in names:
    raise harness.SettingsError(
      f'sequences={",".join(names)} and held_out={settings.held_out}: name '
      'each sequence once, and judge on one that is not trained on.'
    )


def detector_of(settings: Settings) -> detections.Detector:
  """The simulated detector."""
  known = {'standard': detections.STANDARD, 'hard': detections.HARD}
  return known[settings.detector]._replace(
    looks=settings.looks, noise=settings.noise
  )


def read(
  options: harness.Options,
) -> tuple[list[scenes.Scene], scenes.Scene, Any]:
  """The training scenes, the one that is held out, and what the data are."""
  settings = options.settings
  made_up = options.data_dir is None
  if made_up:
    long = 60 if options.preset == 'smoke' else 400
    held_out, *train_on = [scenes.make_up(i, length=long) for i in range(3)]
  else:
    held_out, *train_on = [
      scenes.read(options.data_dir, name)
      for name in (settings.held_out, *settings.sequences)
    ]
  source = scenes.source([*train_on, held_out], made_up=made_up)
  return train_on, held_out, source


def write(
  options: harness.Options,
  rows: list[dict[str, Any]],
  metrics: dict[str, float],
  source: Any,
  **more: Any,
) -> None:
  """Writes the table and the results of a run on simulated detections."""
  harness.write_table(options.workdir, rows)
  harness.write_results(
    options, metrics=metrics, data=[source], published=[PUBLISHED], **more
  )


def encoder_of(
  options: harness.Options, simulated: list[detections.Detected]
) -> tuple[appearance.Encoder, Callable[[detections.Detected], Any]] | None:
  """A network of crops, and what gives detections its looks; None without.

  Args:
    options: of the run.
    simulated: training detections with identities.

  Returns:
    The encoder, and detections to detections with looks.

  Raises:
    SettingsError: if there are no pictures, or looks of two kinds are asked
      for.
  """
  settings = options.settings
  if settings.crops == 'none':
    return None
  if options.data_dir is None or settings.looks:
    raise harness.SettingsError(
      f'--crops={settings.crops} needs pictures, by --data_dir, and --looks=0.'
    )
  names = [*settings.sequences, settings.held_out]
  folders = [scenes.images(options.data_dir, name) for name in names]
  every = len(settings.sequences)
  rng = np.random.default_rng(0)
  crops, ids = appearance.gather(
    # Those of one simulation; the others' are the same people.
    list(zip(simulated[:every], folders)),
    most=50,
    rng=rng,
  )
  keys = jax.random.split(jax.random.key(0))
  encoder, _ = appearance.train(
    appearance.init(keys[0], kind=settings.crops),
    crops,
    ids,
    steps=settings.crop_steps,
    key=keys[1],
  )

  known = {
    scenes.read(options.data_dir, name).info.name: folder
    for name, folder in zip(names, folders)
  }
  looked = lambda found: appearance.with_looks(
    encoder, found, known[found.info.name]
  )
  return encoder, looked


def networks(
  options: harness.Options, task: learning.Task
) -> Iterator[tuple[str, harness.Trained]]:
  """Trains the first weights, then both kinds from there, by name."""
  settings = options.settings
  beam = search.Beam(
    settings.hypotheses, settings.candidates, normalised=settings.normalised
  )
  losses = learning.Losses(
    beam, settings.own, settings.pairs, settings.alpha, settings.beta
  )
  teacher = learning.TEACHER._replace(beam=search.Beam(0, settings.candidates))
  common = {
    'chunk': settings.chunk,
    'options': options,
    'members': settings.members,
    'settings': harness.settings_of(
      settings, 'judged', 'windows', 'members', 'full'
    ),
  }
  warm = learning.train(
    task,
    teacher,
    name='warm',
    rate=settings.rate,
    steps=settings.warm,
    **common,
  )
  yield FIRST, warm
  more = {'rate': settings.rate / 2, 'end': 0.01, **common}
  name = 'teacher_forcing'
  yield (
    name,
    learning.train(
      task,
      teacher,
      name=name,
      steps=settings.forced,
      start=warm.params,
      **more,
    ),
  )
  searched = warm
  *before, last = learning.stages(
    settings.hypotheses, settings.search, settings.growing
  )
  for k, steps in (*before, last):
    searched = learning.train(
      task,
      losses._replace(beam=beam._replace(hypotheses=k)),
      name='search' if (k, steps) == last else f'search-{k}',
      steps=steps,
      start=searched.params,
      **more,
    )
  yield 'search', searched


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


def elsewhere(
  data_dir: str | None,
  trained: dict[str, list[tracker.Model]],
  classical: dict[str, Any],
  chosen: dict[str, judging.Tuned],
) -> dict[str, float]:
  """Metrics of all trackers on sequences that nothing was trained on."""
  held = untrained.read(data_dir)
  if held is None:
    return {}
  scores = {
    name: untrained.judge([make(**chosen[name].point)], held)
    for name, (make, _) in classical.items()
  }
  for name, every in trained.items():
    several = [
      _tracker(tracker.online, model, **chosen[name].point) for model in every
    ]
    scores[name] = untrained.judge(several, held)
  return untrained.report(scores)


def report(
  scores: dict[str, dict[str, np.ndarray]],
  chosen: dict[str, judging.Tuned],
  purity: dict[str, np.ndarray],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """Metrics by name, and the rows of the table."""
  metrics, rows = {}, []
  for method, found in scores.items():
    row: dict[str, Any] = {'method': method.replace('_', ' ')}
    for measure, values in found.items():
      row[measure] = judging.crossed(values)
      metrics |= row[measure].metrics(f'{measure}/{method}')
    row['chosen'] = chosen[method].words() if method in chosen else ''
    for k in SEARCHES:
      values = purity.get(f'{method}_{k}')
      row[f'purity {k.replace("_", " ").upper()}'] = (
        '' if values is None else harness.mean_interval(values)
      )
    rows.append(row)
  for name, values in purity.items():
    metrics |= harness.mean_interval(values).metrics(f'purity/{name}')
  lead = lambda one, two, measure: judging.crossed(
    scores[one][measure] - scores[two][measure]
  )
  for measure in judging.MEASURES:
    metrics |= lead(*BOTH, measure).metrics(f'{measure}/search_lead')
    for name in BOTH:
      if FIRST in scores:
        metrics |= lead(name, FIRST, measure).metrics(f'{measure}/gain/{name}')
      if (waiting := f'{name}_near_online') in scores:
        metrics |= lead(waiting, name, measure).metrics(
          f'{measure}/near_online_lead/{name}'
        )
  for k in SEARCHES:
    off = purity[f'search_{k}'] - purity[f'teacher_forcing_{k}']
    metrics |= harness.mean_interval(off).metrics(f'purity/search_lead_{k}')
  for method, tuned in chosen.items():
    metrics[f'edges/{method}'] = float(len(tuned.edges))
    metrics[f'tried/{method}'] = float(tuned.tried)
  # The reference is the best by what is reported, which favours it.
  best_of = lambda names: max(names, key=lambda m: metrics[f'idf1/{m}'])
  if classical := [m for m in ('overlap', 'likelihood') if m in scores]:
    learnt = best_of(BOTH)
    metrics |= lead(learnt, best_of(classical), 'idf1').metrics(
      'idf1/lead_over_classical'
    )
  return metrics, rows


def main(options: harness.Options) -> dict[str, float]:
  """Trains, judges, and writes table, plot, tracker and results."""
  begin, cpu = time.monotonic(), time.process_time()
  evaluation.import_trackeval()  # Before the training, not after it.
  settings = options.settings
  detector = detector_of(settings)
  train_on, held_out, source = read(options)
  print(f'Data: {source.words}.', flush=True)
  seeds = range(TRAINING, TRAINING + settings.simulations)
  simulated = [
    # As with any other detector, who is who is told by overlap.
    trial.found._replace(
      ids=detections.match(
        trial.scene.truth, trial.found.boxes, trial.scene.info.length
      )
    )
    for trial in judging.trials(train_on, detector, seeds)
  ]
  tuning = judging.trials(train_on, detector, [TUNING])
  held = judging.trials(
    [held_out], detector, range(HELD, HELD + settings.judged)
  )
  folder = pathlib.Path(options.workdir)
  crops = encoder_of(options, simulated)
  if crops:
    encoder, looked = crops
    simulated = [looked(found) for found in simulated]
    tuning, held = (
      [trial._replace(found=looked(trial.found)) for trial in given]
      for given in (tuning, held)
    )
    appearance.save(folder / models.APPEARANCE, encoder)
  noise = learning.fit_noise(simulated, rng=np.random.default_rng(0))
  task = learning.Task(
    detections.padded(simulated),
    noise,
    settings.hidden,
    {
      'steps': settings.window,
      'jumps': settings.jumps,
      'longest': settings.longest,
    },
    settings.batch,
  )
  classical = judging.classical(noise) if settings.full else {}
  jobs: list[Any] = [
    judging.beside(lambda: judge_classical(classical, tuning, held))
  ]
  trained, weights, several = {}, {}, {}
  for name, run in networks(options, task):
    if name == FIRST and not settings.full:
      continue
    trained[name] = run
    weights[name] = members_of(run.params, settings.members)
    several[name] = [tracker.learned(each, noise) for each in weights[name]]
    judge = functools.partial(judge_networks, name, several[name], tuning, held)
    waiting = settings.full and name in BOTH
    jobs.append(judging.beside(functools.partial(judge, waiting=waiting)))
  apart = detections.padded([trial.found for trial in held])
  purity = {
    f'{name}_{kind}': learning.purities(
      run.params,
      task,
      apart,
      hypotheses=k,
      normalised=normalised,
      count=settings.windows,
    )
    for name, run in trained.items()
    for kind, (k, normalised) in SEARCHES.items()
  }
  judged: dict[str, judging.Judged] = {}
  for job in jobs:
    judged |= job.result()
  perfect = judging.judge(judging.true_identities, held)
  judged['true_identities'] = judging.Judged(
    {k: v[None] for k, v in perfect.items()}
  )
  scores = {name: one.scores for name, one in judged.items()}
  chosen = {name: one.tuned for name, one in judged.items() if one.tuned}
  metrics, rows = report(scores, chosen, purity)
  if not task.data.looks.shape[-1]:
    metrics |= elsewhere(options.data_dir, several, classical, chosen)
  else:
    rng = np.random.default_rng(0)
    metrics['auc'] = detections.auc(held[0].found, rng)
  for name, seeds in weights.items():
    rules = tracker.Rules(**chosen[name].point)
    models.save(folder / f'{name}.npz', seeds[0], noise, rules)
  shown = tracker.online(
    several['search'][0], held[0].found, tracker.Rules(**chosen['search'].point)
  )
  overlay.write(folder / 'tracks.png', shown, held_out.info)
  harness.plot_curves(
    folder / 'losses.png',
    {
      name.replace('_', ' '): (
        trained[name].steps,
        trained[name].history['loss/loss'],
      )
      for name in BOTH
    },
    xlabel='updates after the common ones',
    ylabel='loss',
    logy=True,
  )
  write(
    options,
    rows,
    metrics,
    source,
    seconds=time.monotonic() - begin,
    cpu_seconds=round(time.process_time() - cpu, 1),
    curves={
      name.replace('_', ' '): trained[name].history['loss/loss']
      for name in BOTH
    },
    chosen={name: tuned.point for name, tuned in chosen.items()},
    edges={name: list(tuned.edges) for name, tuned in chosen.items()},
    fitted_noise=noise._asdict(),
  )
  return metrics


STUDY = harness.Study(
  main, PRESETS, paper='tracklet', binary='train', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
