"""The rows of the contract, collected beside the tests of the methods.

What a row says and the problem that rows share are `bilevel_jax.testing`;
`contract_test` checks each row. A row of the contract stands beside its
method's test: a module of tests names its rows `ROWS`, and `collect` finds
them. A row is always a whole solver, the method in its natural place. That a
method is right where coordinates mix is shown by `tests/references`.
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

# Public names of these packages that are no method: types, and functions that
# solve nothing by themselves. What is neither here nor in a row is an error.
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
# Records of `descend` that have rows too.
RECORDS = ('descend', 'Lazy', 'Relaxed', 'Joint')

TESTS = pathlib.Path(__file__).parent


class Found(NamedTuple):
  """The rows of all modules of tests.

  Attributes:
    rows: by name, in the order of the modules.
    broken: by module, why its rows could not be read.
  """

  rows: dict[str, Row]
  broken: dict[str, str]


def collect(files: Iterable[pathlib.Path] | None = None) -> Found:
  """Finds the rows beside the tests; a module that fails hides no other.

  Args:
    files: modules of tests; by default all. Those that name `ROWS` and the
      contract are imported.
  """
  found = Found({}, {})
  for path in sorted(TESTS.rglob('*.py')) if files is None else files:
    text = path.read_text()
    if 'contract' not in text or not re.search(r'^ROWS\b', text, re.MULTILINE):
      continue
    parts = path.resolve().relative_to(TESTS.parent).with_suffix('').parts
    module = '.'.join(parts)
    try:
      for row in importlib.import_module(module).ROWS:
        if row.name in found.rows:
          raise ValueError(f'two rows have the name {row.name!r}')
        found.rows[row.name] = row
    except Exception as error:  # Whatever a method's author got wrong.
      found.broken[module] = f'{type(error).__name__}: {error}'
  return found


def public_names() -> dict[str, tuple[str, ...]]:
  """What needs a row, by package."""
  packages = ('aggregators', 'evaluation', 'oracles', 'solvers')
  names = {name: tuple(getattr(bj, name).__all__) for name in packages}
  return names | {'records': RECORDS}


def missing(
  public: Mapping[str, tuple[str, ...]], rows: Iterable[Row]
) -> list[str]:
  """The public names, by package, that have no row and are no helper."""
  rows = list(rows)
  covered = {row.method for row in rows}
  covered |= set(itertools.chain.from_iterable(row.covers for row in rows))
  return [
    f'{package}.{name}'
    for package, names in public.items()
    for name in names
    if name not in covered and name not in HELPERS
  ]
