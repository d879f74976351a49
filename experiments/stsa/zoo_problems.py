"""The problems of the zoo that settings name, and their data."""

import pathlib
from typing import Any

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


def make_problems(
  options: harness.Options,
) -> tuple[list[zoo_problem.Problem], list[harness.Source]]:
  """The problems that the settings name, and their data, which it prints."""
  settings = options.settings
  if settings.problem == 'quadratic':
    made = quadratic.make_quadratic(
      coupling=settings.coupling,
      samples=settings.samples,
      size=settings.size,
      batch_size=settings.batch_size,
    )
    floor = made.series_floor(methods.TERMS, settings.series)
    title = f'Bilevel quadratics, lower coupling {settings.coupling}'
    return [quadratic.as_problem(made, title, floor)], []
  if settings.problem == 'cleaning':
    sizes = dict(zip(label_cleaning.PARTS, settings.digit_sizes, strict=True))
    made = [
      label_cleaning.make_cleaning(
        options.data_dir,
        corruption=corruption,
        sizes=sizes,
        batch_size=settings.batch_size,
      )
      for corruption in settings.corruptions
    ]
    print(f'Data: {made[0][1].words}.')
    return [problem for problem, _ in made], [made[0][1]]
  problems, sources = [], []
  names = [
    n for n in settings.tables if options.data_dir or n not in tables.FILES
  ]
  for name in names or [tables.PACKAGED]:
    table = tables.read(
      name,
      options.data_dir,
      targets=settings.targets,
      header=settings.header,
    )
    print(f'Data: {table.source.words}.', flush=True)
    sources.append(table.source)
    sizes, count = settings.table_sizes, len(table.inputs)
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
  named = settings.tables if settings.problem == 'regularisation' else ()
  return [name for name in named if name in tables.FILES]
