"""Search against teacher forcing, by how much identity features tell.

Paper: Hu, Huang and Shen, Multi-object Tracking via End-to-end Tracklet
Searching and Ranking, 2020; its features are a network's, of pictures.

    python -m experiments.tracklet.curve --preset=quick --data_dir=DATA

Expected: IDF1 falls as the noise of the features grows, from about 75 to what
motion alone gives. Time: 35 CPU-minutes.

Each condition is a run of `train`, in a folder of its own: a detector, standard
or hard, and the noise of simulated identity features, whose area under the
curve, of pairs of one person above pairs of two, is measured; or motion alone.
"""

import dataclasses
import pathlib
import time
from typing import Annotated, Any

from experiments import harness
from experiments.tracklet import train

ALONE = 'motion'


@dataclasses.dataclass(frozen=True)
class Settings:
  """Conditions, and the size of each run; see `train.Settings`.

  Attributes:
    noises: of features, with the standard detector.
    hard: noises of features, with the hard one.
    alone: whether both detectors are tried by motion alone as well.
    looks: numbers of a feature.
    warm: updates that both begin with.
    search: of search.
    forced: of teacher forcing.
    hypotheses: K.
    hidden: units.
    batch: windows of an update.
    window: steps of a window.
    simulations: of the training sequences.
    judged: simulations of the sequence that is held out.
    windows: that purities are measured on.
    members: networks of a tracker.
    seeds: of training.
  """

  noises: Annotated[tuple[float, ...], harness.Allowed(0)] = (
    *(0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
  )
  hard: Annotated[tuple[float, ...], harness.Allowed(0, empty=True)] = (
    *(1.5, 2.0, 3.0),
  )
  alone: bool = True
  looks: int = 16
  warm: int = 1_000
  search: int = 200
  forced: int = 700
  hypotheses: int = 4
  hidden: int = 64
  batch: int = 32
  window: int = 16
  simulations: int = 2
  judged: int = 4
  windows: int = 256
  members: int = 1
  seeds: int = 2


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    noises=(1.0,),
    hard=(),
    alone=False,
    looks=4,
    warm=4,
    search=2,
    forced=4,
    hypotheses=2,
    hidden=8,
    batch=4,
    window=4,
    simulations=1,
    judged=2,
    windows=8,
  ),
}


def conditions(settings: Settings) -> dict[str, train.Settings]:
  """The settings of `train` of each condition, by its name."""
  base = train.PRESETS['quick']
  own = {f.name for f in dataclasses.fields(train.Settings)}
  given = {k: v for k, v in dataclasses.asdict(settings).items() if k in own}
  # What is compared are the two ways to train.
  base = dataclasses.replace(base, full=False, **given)
  found = {}
  for detector, noises in (
    ('standard', settings.noises),
    ('hard', settings.hard),
  ):
    if settings.alone and noises:
      found[f'{detector}-{ALONE}'] = dataclasses.replace(
        base, looks=0, detector=detector
      )
    for noise in noises:
      found[f'{detector}-{noise:g}'] = dataclasses.replace(
        base, detector=detector, noise=noise
      )
  return found


def report(
  runs: dict[str, dict[str, float]],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """Metrics and rows of all conditions, from the metrics of each."""
  names = [f'idf1/{name}' for name in train.BOTH]
  names += ['idf1/search_lead', 'switches/search_lead', 'auc']
  metrics, rows = {}, []
  for condition, found in runs.items():
    row: dict[str, Any] = {'condition': condition.replace('-', ', ')}
    for name in names:
      row[name] = ''
      if name not in found:
        continue
      half = found.get(f'{name}/half_width')
      metrics[f'{name}/{condition}'] = found[name]
      row[name] = f'{found[name]:.3g}'
      if half is not None:
        metrics[f'{name}/{condition}/half_width'] = half
        row[name] += f' ± {half:.2g}'
    rows.append(row)
  return metrics, rows


def curves(
  metrics: dict[str, float], detector: str
) -> dict[str, tuple[list[float], list[list[float]]]]:
  """IDF1 by what the features tell: areas, and ends of intervals, by label.

  What motion alone gives is a level line, from features that tell nothing.
  """
  found: dict[str, list[tuple[float, list[float]]]] = {}
  for name in train.BOTH:
    label, start = name.replace('_', ' '), f'idf1/{name}/{detector}-'
    for key in (k for k in metrics if k.startswith(start)):
      noise = key.removeprefix(start)
      if '/' in noise:
        continue
      half = metrics.get(f'{key}/half_width', 0.0)
      ends = [metrics[key] - half, metrics[key] + half]
      if noise == ALONE:
        found[f'{label}, motion alone'] = [(0.5, ends), (1.0, ends)]
      else:
        area = metrics[f'auc/{detector}-{noise}']
        found.setdefault(label, []).append((area, ends))
  # By areas, along which a line is drawn.
  return {k: tuple(map(list, zip(*sorted(v)))) for k, v in found.items()}


def plot(path: pathlib.Path, metrics: dict[str, float]) -> None:
  """IDF1 by areas, with intervals, a panel for each detector."""
  panels = [
    harness.Panel(
      found,
      xlabel='area under the curve of pairs, by features',
      ylabel='IDF1',
      title=f'{detector} detections',
    )
    for detector in ('standard', 'hard')
    if (found := curves(metrics, detector))
  ]
  harness.plot_panels(path, panels, band='range')


def main(options: harness.Options) -> dict[str, float]:
  """Trains every condition, and writes table, plot and results."""
  begin = time.monotonic()
  runs = {}
  for name, settings in conditions(options.settings).items():
    print(f'Condition {name}.', flush=True)
    runs[name] = train.main(
      options._replace(
        binary='train',
        settings=settings,
        workdir=str(pathlib.Path(options.workdir) / name),
      )
    )
  metrics, rows = report(runs)
  plot(pathlib.Path(options.workdir) / 'curve.png', metrics)
  first = next(iter(conditions(options.settings).values()))
  *_, source = train.read(options._replace(settings=first))
  seconds = time.monotonic() - begin
  train.write(options, rows, metrics, source, seconds=seconds)
  return metrics


STUDY = harness.Study(main, PRESETS, paper='tracklet', binary='curve')


if __name__ == '__main__':
  harness.run(STUDY)
