"""Numbers of a study by measure and coordinates, and their table.

    results = Results()
    results.add({'method': 'soba', 'steps': 100}, error=values_per_seed)
    results.metrics()  # {'error/soba/steps=100': ..., '.../half_width': ...}
    results.table(rows='method')

The name of a metric has its measure (`error`) and its coordinates in order: a
name like `soba` alone, a number with the coordinate, like `steps=100`.
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
    measure: the measure that it shows.
    title: its head; None for the measure with the coordinates in `at`.
    at: coordinates of its numbers, besides those of the row.
  """

  measure: str
  title: str | None = None
  at: At = dataclasses.field(default_factory=dict)

  def head(self) -> str:
    """Returns the title, or its default."""
    if self.title is not None:
      return self.title
    return ', '.join([self.measure, *_coordinates(self.at, ' ')])


class Results:
  """Numbers by measure and coordinates."""

  def __init__(self):
    self._numbers: dict[str, report.Interval] = {}
    self._cells: list[tuple[dict[str, Any], str, Any]] = []

  def add(self, at: At | None = None, /, **measures: Any) -> None:
    """Adds numbers at coordinates; see `put`."""
    self.put(at or {}, measures)

  def put(self, at: At, measures: Mapping[str, Any]) -> None:
    """Adds numbers at coordinates.

    Args:
      at: coordinates, in the order of the metric's name.
      measures: by measure, one number, one number per seed (NaN for a stopped
        seed), or a `report.Interval`.

    Raises:
      ValueError: if a number has been added before.
    """
    for measure, values in measures.items():
      name = metric_name(measure, at)
      if name in self._numbers:
        raise ValueError(f'there are two numbers {name}.')
      number = values
      if not isinstance(values, report.Interval):
        number = report.mean_interval(math.nan if values is None else values)
      self._numbers[name] = number
      self._cells.append((dict(at), measure, number))

  def note(self, at: At, cells: Mapping[str, Any]) -> None:
    """Adds cells of the table that are no metrics, such as a setting."""
    for measure, value in cells.items():
      self._cells.append((dict(at), measure, value))

  def __getitem__(self, name: str) -> report.Interval:
    """Returns a number by its metric's name."""
    return self._numbers[name]

  def mean(self, measure: str, at: At | None = None) -> float:
    """Returns the mean of a number at coordinates."""
    return self._numbers[metric_name(measure, at or {})].mean

  def metrics(self) -> dict[str, float]:
    """Returns all metrics, with intervals of numbers with several seeds."""
    metrics: dict[str, float] = {}
    for name, number in self._numbers.items():
      single = number.total <= 1 and math.isnan(number.half_width)
      metrics |= {name: number.mean} if single else number.metrics(name)
    return metrics

  def table(
    self,
    rows: str | Sequence[str],
    columns: Sequence[str | Column] = (),
    titles: Mapping[Any, str] | None = None,
  ) -> list[dict[str, Any]]:
    """Returns the rows of a table.

    Args:
      rows: the coordinates of rows, which are the first columns.
      columns: the measures to show, with a column for each value of the other
        coordinates. All measures if empty.
      titles: titles of rows' coordinates by value.

    Returns:
      Cells by column, rows in the order of their first number.
    """
    keys = (rows,) if isinstance(rows, str) else tuple(rows)
    by_place: dict[tuple[Any, ...], dict[str, Any]] = {}
    heads = self._heads(keys, columns)
    for at, measure, value in self._cells:
      if not set(keys) <= set(at):
        continue
      place = tuple(at[key] for key in keys)
      rest = {key: x for key, x in at.items() if key not in keys}
      if head := heads.get((measure, frozenset(rest.items()))):
        by_place.setdefault(place, {})[head] = value
    names = dict(titles or {})
    return [
      {key: names.get(x, word(x)) for key, x in zip(keys, place, strict=True)}
      | {head: row[head] for head in heads.values() if head in row}
      for place, row in by_place.items()
    ]

  def heads(
    self, rows: str | Sequence[str], columns: Sequence[str | Column] = ()
  ) -> list[str]:
    """Returns the columns of a table in order; see `table` for arguments."""
    keys = (rows,) if isinstance(rows, str) else tuple(rows)
    used = {head for row in self.table(rows, columns) for head in row}
    heads = dict.fromkeys((*keys, *self._heads(keys, columns).values()))
    return [head for head in heads if head in used]

  def _heads(
    self, keys: Sequence[str], columns: Sequence[str | Column]
  ) -> dict[tuple[str, frozenset[tuple[str, Any]]], str]:
    """Returns the heads of columns by measure and coordinates."""
    known = list(dict.fromkeys(measure for _, measure, _ in self._cells))
    wanted: list[Column] = []
    for column in columns or known:
      wanted += (
        [column] if isinstance(column, Column) else self._all(column, keys)
      )
    return {(c.measure, frozenset(c.at.items())): c.head() for c in wanted}

  def _all(self, measure: str, keys: Sequence[str]) -> list[Column]:
    """Returns a column for each value of a measure's other coordinates."""
    places: list[dict[str, Any]] = []
    for at, name, _ in self._cells:
      rest = {key: x for key, x in at.items() if key not in keys}
      if name == measure and set(keys) <= set(at) and rest not in places:
        places.append(rest)
    title = measure if len(places) == 1 else None
    return [Column(measure, title, rest) for rest in places]


def metric_name(measure: str, at: At) -> str:
  """Returns the name of a metric, such as `error/soba/steps=100`."""
  return '/'.join([measure, *_coordinates(at, '=')])


def _coordinates(at: At, equals: str) -> list[str]:
  return [
    f'{key}{equals}{word(value)}' if _is_number(value) else str(value)
    for key, value in at.items()
  ]


def word(value: Any) -> str:
  """Formats a coordinate."""
  return f'{value:g}' if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(
    value, bool | np.bool_
  )
