"""Office-31, Office-Home, NYU-v2 and Cityscapes, from folders.

Paper: Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, Mitigating Gradient
Bias in Multi-objective Learning, 2023.

    python -m experiments.moco.images --dataset=office31 --data_dir=DATA
    python -m experiments.moco.images --dataset=nyuv2 --preset=paper \
      --data_dir=DATA

Expected: not measured: the data sets are not at hand. Time: hours on an
accelerator for paper.

`image_data` says what the folders hold.
"""

import dataclasses
import pathlib
import time
from typing import Annotated

from experiments import harness
from experiments.moco import compare, image_data, image_problems, methods
from experiments.moco import problem as problems

# What a run of one method and seed does not depend on.
APART = ('methods', 'seeds', *compare.APART)
# Published: passes over the data, and images in a batch, of each domain.
PUBLISHED = {
  'office31': (100, 64),
  'office_home': (100, 64),
  'nyuv2': (200, 2),
  'cityscapes': (200, 8),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    dataset: office31, office_home, nyuv2 or cityscapes.
    methods: what is compared, of `methods.EVERY`.
    epochs: passes over the training images (over the mean domain's of Office),
      with a record after each; 0 for the published number.
    batch: images in a batch, of each domain; 0 for the published number.
    side: to which the images of Office are resized.
    width: channels of the first stage.
    stages: of SegNet.
    rates: the learning rates that are tried by a method without a
      hyperparameter of its own.
    rates_beside_own: by the others, a third as many, at each value of theirs.
    widen: how often the rates may be widened where the best is at an end.
    at_once: members that run side by side.
    seeds: of first weights and batches.
  """

  dataset: str = 'office31'
  methods: tuple[str, ...] = ('mean', 'smg', 'pcgrad', 'cagrad', 'moco')
  epochs: Annotated[int, harness.Allowed(0)] = 5
  batch: Annotated[int, harness.Allowed(0)] = 16
  side: int = 32
  width: int = 16
  stages: int = 3
  rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
  rates_beside_own: tuple[float, ...] = (1e-3,)
  widen: Annotated[int, harness.Allowed(0)] = 3
  at_once: int = 1
  seeds: int = 2


PRESETS = {
  'quick': Settings(),
  'paper': Settings(
    methods=methods.EVERY,
    epochs=0,
    batch=0,
    side=224,
    width=64,
    stages=5,
    rates=(5e-5, 1e-4, 3e-4),
    rates_beside_own=(1e-4,),
    seeds=3,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  if settings.dataset not in PUBLISHED:
    raise harness.SettingsError(
      f'unknown data set {settings.dataset!r}; known: {", ".join(PUBLISHED)}.'
    )
  compare.check(
    settings.methods, compare.Grid(settings.rates, settings.rates_beside_own)
  )


def make_problem(
  settings: Settings, data_dir: str | None
) -> tuple[problems.Problem, int, int]:
  """The problem, passes over its data, and steps in one pass."""
  name = settings.dataset
  epochs, batch = PUBLISHED[name]
  epochs, batch = settings.epochs or epochs, settings.batch or batch
  if name in image_data.OFFICE:
    problem = image_problems.office_problem(
      name, data_dir, batch=batch, side=settings.side, width=settings.width
    )
    images = problem.data['train'][2].mean()
  else:
    problem = image_problems.pixel_problem(
      name,
      data_dir,
      batch=batch,
      width=settings.width,
      stages=settings.stages,
    )
    images = len(problem.data['train']['image'])
  return problem, epochs, max(1, int(images) // batch)


def main(options: harness.Options) -> None:
  """Runs the methods and writes the table, the plots and the results."""
  start = time.monotonic()
  settings = options.settings
  grid = compare.Grid(settings.rates, settings.rates_beside_own)
  problem, epochs, steps = make_problem(settings, options.data_dir)
  metrics, rows, outcomes = compare.compare(
    problem,
    settings.methods,
    options,
    steps=epochs * steps,
    chunk=steps,
    grid=grid,
    settings=harness.settings_of(settings, *APART),
    widenings=settings.widen,
    at_once=settings.at_once,
  )
  harness.write_table(options.workdir, rows, compare.columns(rows))
  folder = pathlib.Path(options.workdir)
  title = f'{settings.dataset}, learning rate chosen on validation data'
  label = f'test {problem.metric}'
  compare.plot_both(folder, 'score', outcomes, label, title)
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - start,
    data=(image_data.source_of(settings.dataset, problem.data),),
    published=(settings.dataset,),
  )
  print(f'Results: {path}')


STUDY = harness.Study(main, PRESETS, paper='moco', binary='images', check=check)


if __name__ == '__main__':
  harness.run(STUDY)
