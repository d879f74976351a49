"""Loads tables of two classes by name."""

import pathlib
from collections.abc import Sequence

import sklearn.datasets

from experiments import harness

PACKAGED = 'breast_cancer'
FILES = {
  'a9a': ('a9a', 'a9a.gz'),
  'magic': ('magic04.data', 'magic04.data.gz'),
}


def read(
  name: str,
  data_dir: str | None,
  *,
  targets: Sequence[str] = (),
  header: bool | None = None,
) -> harness.Table:
  """Reads a table by its name.

  Args:
    name: `a9a` (a LIBSVM file, 123 features), `magic` (UCI's MAGIC gamma
      telescope, a csv file, 10 features), `breast_cancer` (in the package
      scikit-learn, 30 features), or the name of a LIBSVM or csv file.
    data_dir: folder with the files, or with a subfolder tabular of them.
    targets: targets of other files, see `harness.read_table`.
    header: whether other files have a header, see `harness.read_table`.

  Returns:
    A table with one target, -1 or 1.

  Raises:
    MissingDataError: if a file is missing; tells where to get it.
    DamagedDataError: if a file has an invalid format; names file and line.
  """
  if name == PACKAGED:
    bunch = sklearn.datasets.load_breast_cancer()
    arrays = bunch.data, 2.0 * bunch.target[:, None] - 1
    words = "scikit-learn's breast cancer, 569 samples, 30 features"
    return harness.Table(
      *arrays, harness.identify_source(words, arrays, otherwise=name)
    )
  path = harness.find(
    '' if pathlib.Path(name).is_file() else data_dir,
    FILES.get(name, (name, f'{name}.gz')),
    folders=('', 'tabular'),
    advice='a table is a LIBSVM or csv file, or a9a, which is among the LIBSVM '
    'data sets for binary classification, or magic, which is the MAGIC gamma '
    f'telescope of the UCI repository, or {PACKAGED}, which is packaged',
  )
  if name in FILES:
    targets, header = (), None
  return harness.read_table(path, targets=targets, header=header, classes=True)
