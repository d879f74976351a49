"""Settings and data of the problems of the bilevel comparison."""

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

# Fractions of a small table for the lower and the upper loss.
FRACTIONS = (0.45, 0.3375)
Fractions = Annotated[tuple[float, ...], harness.Allowed(0, 1)]


@dataclasses.dataclass(frozen=True)
class Quadratic:
  """Settings of the quadratic problem.

  Attributes:
    coupling: norm of the cross term of the lower loss.
    samples: samples per loss.
    size: dimension of each variable.
  """

  coupling: Annotated[float, harness.Allowed(0)] = 0.3
  samples: int = 1_024
  size: int = 100


@dataclasses.dataclass(frozen=True)
class Tables:
  """Tables of the regularisation.

  Attributes:
    names: a9a, magic, breast_cancer (needs no data folder), or names of your
      own LIBSVM or csv files.
    targets: column of the two classes of your own file: its name in the header,
      or its number; by default the last one.
    header: whether your csv file has a header; by default, if its first row has
      no number.
    sizes: samples of the lower and of the upper loss; small tables use
      fractions instead.
  """

  names: tuple[str, ...] = ('a9a', 'magic')
  targets: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = ()
  header: bool | None = None
  sizes: tuple[int, ...] = (1_024, 4_096)


@dataclasses.dataclass(frozen=True)
class Digits:
  """Digits of the cleaning.

  Attributes:
    corruptions: fractions of wrong labels.
    sizes: digits for training, validation, selection and test.
  """

  corruptions: Fractions = (0.5, 0.7, 0.9)
  sizes: tuple[int, ...] = (2_048, 512, 512, 1_024)


QUADRATIC, TABLES, DIGITS = Quadratic(), Tables(), Digits()


def make_problems(
  options: harness.Options,
) -> tuple[list[zoo_problem.Problem], list[harness.Source]]:
  """Makes the problems of the settings; prints the sources of their data."""
  settings = options.settings
  if settings.problem == 'quadratic':
    problem = quadratic.make_quadratic(
      **vars(settings.quadratic), batch_size=settings.batch_size
    )
    floor = problem.series_floor(methods.TERMS, methods.SERIES)
    coupling = settings.quadratic.coupling
    title = f'Bilevel quadratics, lower coupling {coupling}'
    return [quadratic.as_problem(problem, title, floor)], []
  if settings.problem == 'cleaning':
    sizes = dict(zip(label_cleaning.PARTS, settings.digits.sizes, strict=True))
    pairs = [
      label_cleaning.make_cleaning(
        options.data_dir,
        corruption=corruption,
        sizes=sizes,
        batch_size=settings.batch_size,
      )
      for corruption in settings.digits.corruptions
    ]
    problems, sources = map(list, zip(*pairs, strict=True))
    print(f'Data: {sources[0].words}.')
    return problems, sources[:1]
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
      sizes = [int(fraction * count) for fraction in FRACTIONS]
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
  """The published data sets of the settings."""
  if settings.problem == 'cleaning':
    return ['MNIST']
  names = settings.table.names if settings.problem == 'regularisation' else ()
  return [name for name in names if name in tables.FILES]
