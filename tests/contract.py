"""The rows of the contract, collected from the tests of the methods.

`bilevel_jax.testing` defines rows and their common problem; `contract_test`
checks each row. Rows are next to the test of their method: a test module names
its rows `ROWS`, and `collect` finds them. A row is always a complete solver
with the method in its usual place. `tests/references` checks methods on
problems whose coordinates mix.
"""

import importlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import bilevel_jax as bj
from bilevel_jax.testing import *  # noqa: F403
from bilevel_jax.testing import Row

# Public names of these packages that are not methods but types and helper
# functions. Every public name must be here or in a row.
HELPERS = frozenset(
  {
    'DelayedState',
    'DynamicBarrierState',
    'EAipodPlan',
    'FamoState',
    'GapState',
    'ImplicitState',
    'MixedState',
    'MocoState',
    'Multipliers',
    'Oracle',
    'OracleState',
    'PolicyGap',
    'ProxLinearState',
    'RandomStop',
    'RecursiveState',
    'RowScores',
    'Rule',
    'SagaState',
    'SealState',
    'ScaleByPenaltyState',
    'SelectState',
    'Solve',
    'StormState',
    'WeightsState',
    'aggregated',
    'by_gramian',
    'by_weights',
    'current',
    'deal_batch',
    'e_aipod_plan',
    'jacobian_like',
    'power_schedule',
    'unmeasured',
    'seal_penalty',
    'split_batch',
  }
)
# Records of `descend` that also have rows.
RECORDS = ('descend', 'Lazy', 'Relaxed', 'Joint')

TESTS = pathlib.Path(__file__).parent


class Collected(NamedTuple):
  """The rows of all test modules.

  Attributes:
    rows: rows by name, in the order of the modules.
    broken: by module, the error of reading its rows.
  """

  rows: dict[str, Row]
  broken: dict[str, str]


def collect(files: Iterable[pathlib.Path] | None = None) -> Collected:
  """Collects the rows of test modules; continues after a module that fails.

  Args:
    files: test modules; by default all. Modules that name `ROWS` and the
      contract are imported.
  """
  collected = Collected({}, {})
  for path in sorted(TESTS.rglob('*.py')) if files is None else files:
    text = path.read_text()
    if 'contract' not in text or not re.search(r'^ROWS\b', text, re.MULTILINE):
      continue
    parts = path.resolve().relative_to(TESTS.parent).with_suffix('').parts
    module = '.'.join(parts)
    try:
      for row in importlib.import_module(module).ROWS:
        if row.name in collected.rows:
          raise ValueError(f'two rows have the name {row.name!r}')
        collected.rows[row.name] = row
    except Exception as error:  # Any mistake in a method's module.
      collected.broken[module] = f'{type(error).__name__}: {error}'
  return collected


def public_names() -> dict[str, tuple[str, ...]]:
  """The public names that need a row, by package."""
  packages = ('aggregators', 'evaluation', 'oracles', 'solvers')
  names = {name: tuple(getattr(bj, name).__all__) for name in packages}
  return names | {'records': RECORDS}


def missing(
  public: Mapping[str, tuple[str, ...]], rows: Iterable[Row]
) -> list[str]:
  """The public names without a row that are not helpers."""
  rows = list(rows)
  covered = {row.method for row in rows}
  covered |= set(itertools.chain.from_iterable(row.covers for row in rows))
  return [
    f'{package}.{name}'
    for package, names in public.items()
    for name in names
    if name not in covered and name not in HELPERS
  ]
