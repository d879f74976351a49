"""Search against teacher forcing, by the information in embeddings.

Paper: Hu, Huang and Shen, Multi-object Tracking via End-to-end Tracklet
Searching and Ranking, 2020; its embeddings are those of an image network.

    python -m experiments.tracklet.curve --preset=quick --data_dir=DATA

Expected: IDF1 falls as the noise of the embeddings grows, from about 75 to that
of motion only. Time: 35 CPU-minutes.

Each condition is a run of `train` in a folder of its own: a detector, standard
or hard, with motion only or with simulated embeddings of some noise. The area
under the ROC curve, for pairs of one person against pairs of two, measures how
well the embeddings identify people.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

import matplotlib.figure

from experiments import harness
from experiments.tracklet import learning, simulation, train
from experiments.tracklet.train_report import BOTH

ALONE = 'motion'
DETECTORS = ('standard', 'hard')


@dataclasses.dataclass(frozen=True)
class Settings(train.Settings):
  """Conditions, and the size of each run.

  Attributes:
    noises: noises of embeddings, with the standard detector, in norms of an
      embedding.
    hard: noises of embeddings, with the hard detector.
    alone: whether to add motion only, for both detectors.
  """

  noises: Annotated[tuple[float, ...], harness.Allowed(0)] = (
    *(0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
  )
  hard: Annotated[tuple[float, ...], harness.Allowed(0, empty=True)] = (
    *(1.5, 2.0, 3.0),
  )
  alone: bool = True


PRESETS = {
  'quick': Settings(
    data=simulation.Data(embedding=16, simulations=2, judged=4),
    network=learning.Network(members=1),
    windows=learning.Windows(measured=256),
    training=learning.Training(1_000, 200, 700),
    full=False,  # Only the two ways of training are compared.
    seeds=2,
  ),
  'smoke': Settings(
    data=simulation.Data(embedding=4, simulations=1, judged=2),
    network=learning.Network(hidden=8, members=1),
    windows=learning.Windows(window=4, batch=4, measured=8),
    search=learning.Search(hypotheses=2),
    training=learning.Training(4, 2, 4),
    full=False,
    seeds=2,
    noises=(1.0,),
    hard=(),
    alone=False,
  ),
}


class Condition(NamedTuple):
  """A detector, and the noise of its embeddings: a number, or `ALONE`."""

  detector: str
  noise: float | str

  @property
  def folder(self) -> str:
    """The name of the condition's folder."""
    noise = self.noise if self.noise == ALONE else f'{self.noise:g}'
    return f'{self.detector}-{noise}'


def conditions(
  settings: Settings,
) -> Iterator[tuple[Condition, train.Settings]]:
  """Yields the conditions, each with the settings of its run of `train`."""
  fields = [field.name for field in dataclasses.fields(train.Settings)]
  base = train.Settings(**{name: getattr(settings, name) for name in fields})
  for detector in DETECTORS:
    noises = settings.noises if detector == 'standard' else settings.hard
    for noise in (*((ALONE,) if settings.alone and noises else ()), *noises):
      changes = {'embedding': 0} if noise == ALONE else {'noise': noise}
      data = dataclasses.replace(base.data, detector=detector, **changes)
      run = dataclasses.replace(base, data=data)
      yield Condition(detector, noise), run


def add(
  results: harness.Results, condition: Condition, run: harness.Results
) -> None:
  """Adds the numbers of a condition's run to the results."""
  at = {'detector': condition.detector, 'noise': condition.noise}
  metrics = run.metrics()
  for name in BOTH:
    results.add({'method': name, **at}, idf1=run[f'idf1/{name}'])
  for measure in ('idf1_lead', 'switches_lead'):
    number = run['/'.join((measure, *BOTH))]
    results.put({'method': BOTH[0], 'over': BOTH[1], **at}, {measure: number})
  if 'auc' in metrics:
    results.add(at, auc=metrics['auc'])


def curves(
  runs: Mapping[Condition, harness.Results], detector: str
) -> dict[str, tuple[list[float], list[list[float]]]]:
  """IDF1 over the ROC area: areas, and interval ends, by label.

  Motion only is a level line over all areas.
  """
  points: dict[str, list[tuple[float, list[float]]]] = {}
  for method in BOTH:
    label = method.replace('_', ' ')
    for condition, run in runs.items():
      if condition.detector != detector:
        continue
      mean, half, *_ = run[f'idf1/{method}']
      ends = [mean - half, mean + half]
      if condition.noise == ALONE:
        points[f'{label}, motion only'] = [(0.5, ends), (1.0, ends)]
      else:
        points.setdefault(label, []).append((run.mean('auc'), ends))
  return {k: tuple(map(list, zip(*sorted(v)))) for k, v in points.items()}


def draw(
  runs: Mapping[Condition, harness.Results],
) -> matplotlib.figure.Figure:
  """Draws IDF1 over the ROC area, with intervals, one panel per detector."""
  panels = [
    harness.Panel(
      lines,
      xlabel='ROC area of the embeddings',
      ylabel='IDF1',
      title=f'{detector} detections',
    )
    for detector in DETECTORS
    if (lines := curves(runs, detector))
  ]
  return harness.draw_panels(panels, band='range')


def main(options: harness.Options) -> harness.Report:
  """Runs every condition."""
  results, runs = harness.Results(), {}
  for condition, settings in conditions(options.settings):
    print(f'Condition {condition.folder}.', flush=True)
    folder = pathlib.Path(options.workdir) / condition.folder
    run = options._replace(
      binary='train', settings=settings, workdir=str(folder)
    )
    report = harness.execute(train.main, run)
    runs[condition] = report.results
    add(results, condition, report.results)
  search, forcing = ({'method': name} for name in BOTH)
  lead = {'method': BOTH[0], 'over': BOTH[1]}
  return harness.Report(
    results,
    rows=('detector', 'noise'),
    columns=(
      harness.Column('idf1', 'idf1/search', search),
      harness.Column('idf1', 'idf1/teacher_forcing', forcing),
      harness.Column('idf1_lead', at=lead),
      harness.Column('switches_lead', at=lead),
      'auc',
    ),
    plots={'curve.png': draw(runs)},
    data=report.data,
    published=report.published,
  )


STUDY = harness.Study(main, PRESETS, check=train.check, renamed=train.RENAMED)


if __name__ == '__main__':
  harness.run(STUDY)
