"""A study: the declaration of a binary, and the report that it returns.

    STUDY = harness.Study(main, PRESETS)

    if __name__ == '__main__':
      harness.run(STUDY)

`main` takes `Options` and returns a `Report`, from which `harness.run` writes a
table, plots and `results.json`.
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.harness.app import errors, flags
from experiments.harness.data import sources
from experiments.harness.study import plots, report
from experiments.harness.study.results import Column, Results
from experiments.harness.train.trained import Trained

if TYPE_CHECKING:
  import matplotlib.figure


@dataclasses.dataclass(frozen=True)
class Report:
  """The report of a run.

  Attributes:
    results: all numbers.
    rows: coordinates of the table's rows.
    columns: columns of the table; see `Results.table`.
    titles: titles of rows' coordinates by value.
    curves: values (records,) or (records, seeds) by the first cell of a row,
      for the sparklines of the documents.
    plots: figures by file name, such as `curves.png`.
    data: the data that were read.
    published: names of the published data sets.
    more: further plain values for `results.json`.
    folder: subfolder of the workdir for the files; '' for the workdir.
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

  @classmethod
  def from_runs(
    cls, runs: Mapping[str, Trained], *metrics: str, **fields: Any
  ) -> 'Report':
    """Reports the last values and the curves of metrics.

    Args:
      runs: runs by method, whose members are seeds.
      *metrics: names in their histories.
      **fields: other fields of the report.

    Raises:
      SettingsError: if a run has no such metric; names the nearest ones.
    """
    results, figures = Results(), {}
    for method, run in runs.items():
      for metric in metrics:
        if metric not in run.history:
          near = difflib.get_close_matches(metric, run.history, cutoff=0.4)
          raise errors.SettingsError(
            f'from_runs: the run {method} has no metric {metric!r}; '
            f'{"the nearest are" if near else "it has"} '
            f'{", ".join(near or run.history)}.'
          )
    for method, run in runs.items():
      last = {metric: run.history[metric][-1] for metric in metrics}
      results.put({'method': method}, last)
    for metric in metrics:
      curves = {name: (x.steps, x.history[metric]) for name, x in runs.items()}
      figure = plots.draw_curves(curves, xlabel='steps', ylabel=metric)
      figures[f'{metric.replace("/", "_")}.png'] = figure
    return cls(results, plots=figures, **fields)


@dataclasses.dataclass(frozen=True)
class Study:
  """The declaration of a binary.

  Attributes:
    main: from `Options` to a `Report`, or to None without results. Without
      `modes`, it may take files, as a mode does.
    presets: frozen dataclass instances by name, checked by `settings.check`;
      the first is the default.
    paper: name of the paper's folder; by default that of the module's.
    binary: name of the module; by default that of `main`.
    check: raises SettingsError for inconsistent settings, before any work.
    modes: other functions of the binary by mode, the word before the flags:
      they take the `Options`, and a file for each further parameter. The mode
      `train`, or none, calls `main`.
    renamed: current names of settings by former names, whose flags work for one
      version.
  """

  main: Callable[..., Report | None]
  presets: Mapping[str, Any]
  _: dataclasses.KW_ONLY
  paper: str = ''
  binary: str = ''
  check: Callable[[Any], None] | None = None
  modes: Mapping[str, Callable[..., Report | None]] = dataclasses.field(
    default_factory=dict
  )
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not (self.paper and self.binary):
      # Unlike `__name__`, `__spec__` has the module's name under `python -m`.
      module = self.main.__globals__
      name = getattr(module['__spec__'], 'name', module['__name__'])
      _, paper, binary = f'.experiments.{name}'.rsplit('.', 2)
      object.__setattr__(self, 'paper', self.paper or paper)
      object.__setattr__(self, 'binary', self.binary or binary)


def write(
  options: flags.Options, content: Report, seconds: float, cpu_seconds: float
) -> None:
  """Writes the table, the plots and `results.json` of a report.

  Args:
    options: the options of the run.
    content: the report.
    seconds: wall time, s.
    cpu_seconds: CPU time of this process, s.

  Raises:
    WriteError: if a file cannot be written.
  """
  folder = pathlib.Path(options.workdir)
  rows = content.results.table(content.rows, content.columns, content.titles)
  heads = content.results.heads(content.rows, content.columns)
  report.write_table(folder, rows, heads)
  for name, figure in content.plots.items():
    plots.save(folder / name, figure)
  path = report.write_results(
    options,
    metrics=content.results.metrics(),
    seconds=seconds,
    cpu_seconds=cpu_seconds,
    data=content.data,
    published=content.published,
    curves=content.curves,
    **content.more,
  )
  print(f'Results: {path}')
