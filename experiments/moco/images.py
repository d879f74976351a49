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
from typing import Annotated

from experiments import harness
from experiments.moco import compare, image_data, image_problems, methods
from experiments.moco import problem as problems

# Published: passes over the data, and images in a batch, of each domain.
PUBLISHED = {
  'office31': (100, 64),
  'office_home': (100, 64),
  'nyuv2': (200, 2),
  'cityscapes': (200, 8),
}

GRID = compare.Grid((3e-4, 1e-3, 3e-3), (1e-3,))


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    dataset: what is learned.
    methods: what is compared.
    epochs: passes over the training images (over the mean domain's of Office),
      with a record after each; 0 for the published number.
    batch: images in a batch, of each domain; 0 for the published number.
    side: to which the images of Office are resized.
    width: channels of the first stage.
    stages: of SegNet.
    grid: what tuning tries.
    at_once: members that run side by side.
    seeds: of first weights and batches.
  """

  dataset: Annotated[str, harness.Among(PUBLISHED)] = 'office31'
  methods: compare.Methods = ('mean', 'smg', 'pcgrad', 'cagrad', 'moco')
  epochs: Annotated[int, harness.Allowed(0)] = 5
  batch: Annotated[int, harness.Allowed(0)] = 16
  side: int = 32
  width: int = 16
  stages: int = 3
  grid: compare.Grid = GRID
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
    grid=compare.Grid((5e-5, 1e-4, 3e-4), (1e-4,)),
    seeds=3,
  ),
}


def make_problem(
  settings: Settings, data_dir: str | None
) -> tuple[problems.Problem, int]:
  """The problem, and steps in one pass over its data."""
  name, batch = settings.dataset, settings.batch
  if name in image_data.OFFICE:
    problem = image_problems.office_problem(
      name, data_dir, side=settings.side, width=settings.width
    )
    images = problem.data['train'][2].mean()
  else:
    problem = image_problems.pixel_problem(
      name, data_dir, width=settings.width, stages=settings.stages
    )
    images = len(problem.data['train']['image'])
  return problem, max(1, int(images) // batch)


def main(options: harness.Options) -> harness.Report:
  """Runs the methods."""
  settings, results = options.settings, harness.Results()
  epochs, batch = PUBLISHED[settings.dataset]
  settings = dataclasses.replace(
    settings, epochs=settings.epochs or epochs, batch=settings.batch or batch
  )
  problem, steps = make_problem(settings, options.data_dir)
  runs = compare.Runs(
    problem,
    options._replace(settings=settings),
    steps=settings.epochs * steps,
    chunk=steps,
    at_once=settings.at_once,
  )
  outcomes, _ = compare.compare(runs, results, settings.methods)
  return compare.report(
    results,
    [(problem, outcomes)],
    data=(image_data.source_of(settings.dataset, problem.data),),
    published=(settings.dataset,),
  )


STUDY = harness.Study(
  main, PRESETS, paper='moco', binary='images', check=compare.check
)


if __name__ == '__main__':
  harness.run(STUDY)
