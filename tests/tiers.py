"""Which cases of a parametrised test run by default."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def first(cases: Iterable[Any], count: int = 1) -> list[Any]:
  """Marks all cases after the first ones as slow.

  Args:
    cases: the cases of `pytest.mark.parametrize`.
    count: the number of cases that run by default.
  """
  return [
    case if i < count else _slow(case) for i, case in enumerate(list(cases))
  ]


def slow_where(
  names: Iterable[str], is_slow: Callable[[str], bool]
) -> list[Any]:
  """Marks the cases whose name fulfils a condition as slow."""
  return [_slow(name) if is_slow(name) else name for name in names]


def _slow(case: Any) -> Any:
  values = case if isinstance(case, tuple) else (case,)
  return pytest.param(*values, marks=pytest.mark.slow)
