"""Numbers of a study, each added once, and the table that is made of them.

    results = Results()
    results.add({'method': 'soba', 'steps': 100}, error=values_per_seed)
    results.metrics()  # {'error/soba/steps=100': ..., '.../half_width': ...}
    results.table(rows='method')

A number has a measure (`error`) and coordinates, in order: a word, such as a
method, stands for itself in the name of the metric, a number is named by its
coordinate.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.harness.study import report

At = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of a table.

  Attributes:
    measure: what it shows.
    title: its head; None takes the measure, and the coordinates in `at`.
    at: coordinates of its numbers beside those of the row.
  """

  measure: str
  title: str | None = None
  at: At = dataclasses.field(default_factory=dict)

  def head(self) -> str:
    """The title, or what stands for it."""
    if self.title is not None:
      return self.title
    places = [
      f'{key} {word(value)}' if _is_number(value) else str(value)
      for key, value in self.at.items()
    ]
    return ', '.join([self.measure, *places])


class Results:
  """Numbers by measure and coordinates."""

  def __init__(self):
    self._numbers: dict[str, report.Interval] = {}
    self._cells: list[tuple[dict[str, Any], str, Any]] = []

  def add(self, at: At | None = None, /, **measures: Any) -> None:
    """Adds numbers; see `put` for measures whose name is no identifier."""
    self.put(at or {}, measures)

  def put(self, at: At, measures: Mapping[str, Any]) -> None:
    """Adds numbers at coordinates.

    Args:
      at: the coordinates, in the order in which they stand in the name.
      measures: by name, one number, one for each seed (NaN for one that
        stopped), or a `report.Interval`.

    Raises:
      ValueError: if there is such a number already.
    """
    for measure, values in measures.items():
      name = name_of(measure, at)
      if name in self._numbers:
        raise ValueError(f'there are two numbers {name}.')
      number = values
      if not isinstance(values, report.Interval):
        number = report.mean_interval(math.nan if values is None else values)
      self._numbers[name] = number
      self._cells.append((dict(at), measure, number))

  def note(self, at: At, cells: Mapping[str, Any]) -> None:
    """Adds cells that stand in the table alone, such as a setting or a word."""
    for measure, value in cells.items():
      self._cells.append((dict(at), measure, value))

  def __getitem__(self, name: str) -> report.Interval:
    """A number by its name."""
    return self._numbers[name]

  def mean(self, measure: str, at: At | None = None) -> float:
    """The mean of a number at coordinates."""
    return self._numbers[name_of(measure, at or {})].mean

  def metrics(self) -> dict[str, float]:
    """All numbers by name, those of several seeds with their intervals."""
    metrics: dict[str, float] = {}
    for name, number in self._numbers.items():
      alone = number.total <= 1 and math.isnan(number.half_width)
      metrics |= {name: number.mean} if alone else number.metrics(name)
    return metrics

  def table(
    self,
    rows: str | Sequence[str],
    columns: Sequence[str | Column] = (),
    titles: Mapping[Any, str] | None = None,
  ) -> list[dict[str, Any]]:
    """Rows of a table.

    Args:
      rows: the coordinates that tell rows apart; each is a column too.
      columns: what they show: a measure has a column for each of the other
        coordinates that it is at. All measures if empty.
      titles: words for coordinates of rows, by value.

    Returns:
      Cells by column, in the order in which rows were added.
    """
    keys = (rows,) if isinstance(rows, str) else tuple(rows)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    heads = self._heads(keys, columns)
    for at, measure, value in self._cells:
      if not set(keys) <= set(at):
        continue
      place = tuple(at[key] for key in keys)
      rest = {key: x for key, x in at.items() if key not in keys}
      if head := heads.get((measure, _frozen(rest))):
        found.setdefault(place, {})[head] = value
    names = dict(titles or {})
    return [
      {key: names.get(x, word(x)) for key, x in zip(keys, place, strict=True)}
      | {head: row[head] for head in heads.values() if head in row}
      for place, row in found.items()
    ]

  def heads(
    self, rows: str | Sequence[str], columns: Sequence[str | Column] = ()
  ) -> list[str]:
    """The columns of a table in order; see `table` for the arguments."""
    keys = (rows,) if isinstance(rows, str) else tuple(rows)
    used = {head for row in self.table(rows, columns) for head in row}
    heads = dict.fromkeys((*keys, *self._heads(keys, columns).values()))
    return [head for head in heads if head in used]

  def _heads(
    self, keys: Sequence[str], columns: Sequence[str | Column]
  ) -> dict[tuple[str, frozenset[tuple[str, Any]]], str]:
    """Heads by measure and coordinates, in order."""
    known = list(dict.fromkeys(measure for _, measure, _ in self._cells))
    wanted: list[Column] = []
    for column in columns or known:
      wanted += (
        [column] if isinstance(column, Column) else self._all(column, keys)
      )
    return {(c.measure, _frozen(c.at)): c.head() for c in wanted}

  def _all(self, measure: str, keys: Sequence[str]) -> list[Column]:
    """A column for all the coordinates of a measure that are not a row's."""
    places: list[dict[str, Any]] = []
    for at, name, _ in self._cells:
      rest = {key: x for key, x in at.items() if key not in keys}
      if name == measure and set(keys) <= set(at) and rest not in places:
        places.append(rest)
    title = measure if len(places) == 1 else None
    return [Column(measure, title, rest) for rest in places]


def name_of(measure: str, at: At) -> str:
  """The name of a number: `error/soba/steps=100`."""
  places = (
    f'{key}={word(value)}' if _is_number(value) else str(value)
    for key, value in at.items()
  )
  return '/'.join([measure, *places])


def word(value: Any) -> str:
  """A coordinate in words."""
  return f'{value:g}' if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(
    value, bool | np.bool_
  )


def _frozen(at: At) -> frozenset[tuple[str, Any]]:
  return frozenset(at.items())
