"""The problems of the zoo that settings name, and their data."""

import dataclasses
import pathlib
from typing import Annotated, Any

from experiments import harness
from experiments.stsa import (
  label_cleaning,
  methods,
  quadratic,
  regularisation,
  tables,
  zoo_problem,
)

# Shares of a table for the lower and the upper loss, where it has too few.
SHARES = (0.45, 0.3375)
Shares = Annotated[tuple[float, ...], harness.Allowed(0, 1)]


@dataclasses.dataclass(frozen=True)
class Quadratic:
  """The quadratic problem.

  Attributes:
    coupling: of its lower loss: how much its solution moves with x.
    samples: of each of its losses.
    size: dimension of each of its variables.
  """

  coupling: Annotated[float, harness.Allowed(0)] = 0.3
  samples: int = 1_024
  size: int = 100


@dataclasses.dataclass(frozen=True)
class Tables:
  """The tables of the regularisation.

  Attributes:
    names: of a9a, magic and breast_cancer (needs no data folder), or names of
      LIBSVM or csv files of your own.
    targets: the column with the two classes of a file of your own: its name in
      the header, or its number; by default the last one.
    header: whether such a csv file has one; by default if no number is in it.
    sizes: samples of the lower and of the upper loss; shares of a table that
      has too few.
  """

  names: tuple[str, ...] = ('a9a', 'magic')
  targets: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = ()
  header: bool | None = None
  sizes: tuple[int, ...] = (1_024, 4_096)


@dataclasses.dataclass(frozen=True)
class Digits:
  """The digits of the cleaning.

  Attributes:
    corruptions: shares of wrong labels.
    sizes: digits for training, validation, selection and test.
  """

  corruptions: Shares = (0.5, 0.7, 0.9)
  sizes: tuple[int, ...] = (2_048, 512, 512, 1_024)


QUADRATIC, TABLES, DIGITS = Quadratic(), Tables(), Digits()


def make_problems(
  options: harness.Options,
) -> tuple[list[zoo_problem.Problem], list[harness.Source]]:
  """The problems that the settings name, and their data, which it prints."""
  settings = options.settings
  if settings.problem == 'quadratic':
    made = quadratic.make_quadratic(
      **vars(settings.quadratic), batch_size=settings.batch_size
    )
    floor = made.series_floor(methods.TERMS, methods.SERIES)
    coupling = settings.quadratic.coupling
    title = f'Bilevel quadratics, lower coupling {coupling}'
    return [quadratic.as_problem(made, title, floor)], []
  if settings.problem == 'cleaning':
    sizes = dict(zip(label_cleaning.PARTS, settings.digits.sizes, strict=True))
    made = [
      label_cleaning.make_cleaning(
        options.data_dir,
        corruption=corruption,
        sizes=sizes,
        batch_size=settings.batch_size,
      )
      for corruption in settings.digits.corruptions
    ]
    print(f'Data: {made[0][1].words}.')
    return [problem for problem, _ in made], [made[0][1]]
  problems, sources = [], []
  names = [
    n for n in settings.table.names if options.data_dir or n not in tables.FILES
  ]
  for name in names or [tables.PACKAGED]:
    table = tables.read(
      name,
      options.data_dir,
      targets=settings.table.targets,
      header=settings.table.header,
    )
    print(f'Data: {table.source.words}.', flush=True)
    sources.append(table.source)
    sizes, count = settings.table.sizes, len(table.inputs)
    if sum(sizes) > 0.9 * count:
      sizes = [int(share * count) for share in SHARES]
    problems.append(
      regularisation.make_regularisation(
        pathlib.Path(name).name,
        table,
        train=sizes[0],
        validation=sizes[1],
        batch_size=settings.batch_size,
        workdir=options.workdir,
      )
    )
  return problems, sources


def published(settings: Any) -> list[str]:
  """The data sets that the settings are about."""
  if settings.problem == 'cleaning':
    return ['MNIST']
  named = settings.table.names if settings.problem == 'regularisation' else ()
  return [name for name in named if name in tables.FILES]
