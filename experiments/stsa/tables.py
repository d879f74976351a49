"""Tables of two classes: of public files, a packaged one, a user's own."""

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
    data_dir: a folder with the files, or whose subfolder tabular has them.
    targets: of other files, see `harness.read_table`.
    header: likewise.

  Returns:
    A table; its one target is -1 or 1.

  Raises:
    MissingDataError: if a file is missing; says where to get it.
    DamagedDataError: if a file is not in its format; names it and the line.
  """
  if name == PACKAGED:
    found = sklearn.datasets.load_breast_cancer()
    arrays = found.data, 2.0 * found.target[:, None] - 1
    words = "scikit-learn's breast cancer, 569 samples, 30 features"
    return harness.Table(
      *arrays, harness.source_of(words, arrays, otherwise=name)
    )
  if name in FILES:
    path = harness.find(
      data_dir,
      FILES[name],
      folders=('', 'tabular'),
      advice='a9a is among the LIBSVM data sets for binary classification, '
      'magic04.data is the MAGIC gamma telescope of the UCI repository; or '
      f'take --tables={PACKAGED}, which is packaged',
    )
    return harness.read_table(path, classes=True)
  path = harness.find_table(name, data_dir, (*FILES, PACKAGED))
  return harness.read_table(path, targets=targets, header=header, classes=True)
