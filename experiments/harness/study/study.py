"""A study: what a binary is, what it says, and how that is written down.

    STUDY = harness.Study(main, PRESETS, paper='pbgd', binary='toy')

    if __name__ == '__main__':
      harness.run(STUDY)

`main` takes the `Options` and returns a `Report`; `harness.run` writes its
table, its plots and `results.json`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.harness.app import flags
from experiments.harness.data import sources
from experiments.harness.study import plots, report
from experiments.harness.study.results import Column, Results

if TYPE_CHECKING:
  import matplotlib.figure


@dataclasses.dataclass(frozen=True)
class Report:
  """What `main` returns.

  Attributes:
    results: all numbers.
    rows: the coordinates that tell rows of the table apart.
    columns: what the table shows; see `Results.table`.
    titles: words for coordinates of rows, by value.
    curves: values of (records,) or (records, seeds) by the first cell of a row
      of the table, for the small pictures of the documents.
    plots: figures by file name, such as `curves.png`.
    data: what was read.
    published: names of the data sets of the published numbers.
    more: further plain values for `results.json`.
    folder: where in the workdir all is written; '' for the workdir itself.
  """

  results: Results
  _: dataclasses.KW_ONLY
  rows: str | Sequence[str] = 'method'
  columns: Sequence[str | Column] = ()
  titles: Mapping[Any, str] = dataclasses.field(default_factory=dict)
  curves: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  plots: Mapping[str, 'matplotlib.figure.Figure'] = dataclasses.field(
    default_factory=dict
  )
  data: Sequence[sources.Source] = ()
  published: Sequence[str] = ()
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  folder: str = ''


@dataclasses.dataclass(frozen=True)
class Study:
  """What a binary is.

  Attributes:
    main: from the `Options` to a `Report`; None of what writes no results.
    presets: a frozen dataclass instance by name; the first is the default.
      Their numbers are checked as `settings.check` says.
    paper: name of the paper's folder.
    binary: name of the module.
    check: takes the settings, before any work, and raises SettingsError for
      values that do not go together.
    modes: what else the binary does, by the word that asks for it: a function
      of the `Options` and of the files named after the word, one for each
      further parameter. The word `train`, or none, asks for `main`.
    renamed: fields of the settings by their former names, whose flags go on
      working for one version.
  """

  main: Callable[..., Report | None]
  presets: Mapping[str, Any]
  _: dataclasses.KW_ONLY
  paper: str
  binary: str
  check: Callable[[Any], None] | None = None
  modes: Mapping[str, Callable[..., Report | None]] = dataclasses.field(
    default_factory=dict
  )
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write(
  options: flags.Options, said: Report, seconds: float, cpu_seconds: float
) -> None:
  """Writes what a study says: the table, the plots and `results.json`.

  Args:
    options: what was run, and where.
    said: by `main`.
    seconds: wall time, s.
    cpu_seconds: processor time of this process, s.

  Raises:
    WriteError: if a file cannot be written; names the folder.
  """
  folder = pathlib.Path(options.workdir)
  rows = said.results.table(said.rows, said.columns, said.titles)
  heads = said.results.heads(said.rows, said.columns)
  report.write_table(folder, rows, heads)
  for name, figure in said.plots.items():
    plots.save(folder / name, figure)
  path = report.write_results(
    options,
    metrics=said.results.metrics(),
    seconds=seconds,
    cpu_seconds=cpu_seconds,
    data=said.data,
    published=said.published,
    curves=said.curves,
    **said.more,
  )
  print(f'Results: {path}')
