"""Checks of numbers that callers give, with one wording for all of them."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

_Args = ParamSpec('_Args')
_Result = TypeVar('_Result')


def removed(
  **remedies: str,
) -> Callable[[Callable[_Args, _Result]], Callable[_Args, _Result]]:
  """Names the replacement of arguments that a function no longer takes.

  Args:
    **remedies: by the name of a former argument, what to write instead.

  Returns:
    A decorator. The function then raises TypeError for a former argument.
  """

  def decorate(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    @functools.wraps(function)
    def checked(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
      for name in kwargs:
        if name in remedies:
          raise TypeError(
            f'{function.__name__} no longer takes {name}=: write '
            f'{remedies[name]}.'
          )
      return function(*args, **kwargs)

    return checked

  return decorate


# For methods that solve a linear system; `solve` holds these settings.
system_in_solve = removed(
  linear_batch='solve=bj.linear_solvers.LinearSystem(batch_at=...)',
  warm_start='solve=bj.linear_solvers.LinearSystem(warm_start=...)',
  key='solve=bj.linear_solvers.LinearSystem(..., key=...)',
)


def whole(who: str, what: str, number: Any, least: int = 1) -> int:
  """The number as an int, or a ValueError that says what it should be.

  Args:
    who: the function that asks, for the error.
    what: what is counted, in the plural.
    number: a whole number; a bool is none.
    least: the least that is accepted.

  Example:
    >>> import bilevel_jax as bj
    >>> bj.checks.whole('my_method', 'steps', 0)
    Traceback (most recent call last):
    ...
    ValueError: my_method takes a whole number of steps >= 1, got 0.
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

  Example:
    >>> import bilevel_jax as bj
    >>> bj.checks.within('my_method', 'rate', 2.0, 0, 1)
    Traceback (most recent call last):
    ...
    ValueError: my_method: rate is in [0, 1], got 2.0.
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


def preferences(
  name: str, objectives: int, preference: Any, *, open_low: bool = False
) -> Any:
  """A checked number for each objective; equal ones that sum to one if None.

  Args:
    name: of the function that asks, for the error.
    objectives: how many numbers there are.
    preference: the caller's, (objectives,), or None.
    open_low: whether zero is refused.

  Example:
    >>> import bilevel_jax as bj
    >>> print(bj.checks.preferences('mine', 4, None))
    [0.25 0.25 0.25 0.25]
  """
  if preference is None:
    return np.full(whole(name, 'objectives', objectives), 1 / objectives)
  within(name, 'preference', preference, 0, open_low=open_low)
  if np.shape(preference) != (objectives,):
    raise ValueError(
      f'{name}: preference has shape {np.shape(preference)}, expected a number '
      f'for each of {objectives} objectives.'
    )
  return preference
