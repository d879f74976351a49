"""Checks of numbers that callers give, with one wording for all of them."""

from typing import Any

import jax
import numpy as np


def whole(who: str, what: str, number: Any, least: int = 1) -> int:
  """The number as an int, or a ValueError that says what it should be.

  Args:
    who: the function that asks, for the error.
    what: what is counted, in the plural.
    number: a whole number; a bool is none.
    least: the least that is accepted.
  """
  if (
    isinstance(number, bool | np.bool_)
    or not isinstance(number, int | np.integer)
    or number < least
  ):
    raise ValueError(
      f'{who} takes a whole number of {what} >= {least}, got {number!r}.'
    )
  return int(number)


def within(
  who: str,
  what: str,
  number: Any,
  low: float,
  high: float = float('inf'),
  *,
  open_low: bool = False,
) -> None:
  """Raises ValueError unless a constant is finite and in [low, high].

  What is known only at the call, a schedule or a traced number, passes.

  Args:
    who: the function that asks, for the error.
    what: the name of the number.
    number: a number or an array, each entry of which is checked.
    low: the lower bound.
    high: the upper bound.
    open_low: whether the lower bound itself is out.
  """
  if callable(number) or isinstance(number, jax.core.Tracer):
    return
  try:
    values = np.asarray(number, np.float64)
  except (TypeError, ValueError):
    values = np.asarray(np.nan)
  above = values > low if open_low else values >= low
  if not np.all(above & (values <= high) & np.isfinite(values)):
    bounds = f'{"(" if open_low else "["}{low}, {high}]'
    if high == float('inf'):
      bounds = f'a finite number {">" if open_low else ">="} {low}'
    else:
      bounds = f'in {bounds}'
    raise ValueError(f'{who}: {what} is {bounds}, got {number}.')
