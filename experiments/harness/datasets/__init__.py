"""Data sets from files: found in one place, read within bounds, and named.

A loader returns its arrays and a `Source`, which says from the content which
data set it is. What is missing or damaged ends in one line that names the file.
"""

from experiments.harness.datasets.arrays import read_image, read_mat, read_npy
from experiments.harness.datasets.digits import (
  DigitPart,
  load_digits,
  pollute_labels,
  read_idx,
)
from experiments.harness.datasets.sources import (
  Source,
  check_finite,
  find,
  parsing,
  source_of,
  substituted,
)
from experiments.harness.datasets.tables import (
  Table,
  find_table,
  read_csv,
  read_libsvm,
  read_table,
)

__all__ = [
  'DigitPart',
  'Source',
  'Table',
  'check_finite',
  'find',
  'find_table',
  'load_digits',
  'parsing',
  'pollute_labels',
  'read_csv',
  'read_idx',
  'read_image',
  'read_libsvm',
  'read_mat',
  'read_npy',
  'read_table',
  'source_of',
  'substituted',
]
