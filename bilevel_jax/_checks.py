"""Checks of arguments, with one wording for all functions."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import optax

_Args = ParamSpec('_Args')
_Result = TypeVar('_Result')


@dataclasses.dataclass(frozen=True)
class _Keywords:
  """A decorator that first changes the keyword arguments of each call.

  Attributes:
    change: from (name of the function, keyword arguments) to None.
  """

  change: Callable[[str, dict[str, Any]], None]

  def __call__(
    self, function: Callable[_Args, _Result]
  ) -> Callable[_Args, _Result]:
    """The function with changed keyword arguments."""

    @functools.wraps(function)
    def changed(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
      self.change(function.__name__, kwargs)
      return function(*args, **kwargs)

    return changed


def _warn(message: str, depth: int = 4) -> None:
  warnings.warn(message, DeprecationWarning, stacklevel=depth)


def removed(**remedies: str) -> _Keywords:
  """Names the replacements of arguments that a function no longer takes.

  Args:
    **remedies: by name of a former argument, what to write instead.

  Returns:
    A decorator. The function then raises TypeError for a former argument.
  """

  def refuse(function, kwargs):
    for name in kwargs:
      if name in remedies:
        raise TypeError(
          f'{function} no longer takes {name}=: write {remedies[name]}.'
        )

  return _Keywords(refuse)


def renamed(**names: str) -> _Keywords:
  """Accepts former names of arguments, with a warning.

  Args:
    **names: by former name, the new name.

  Returns:
    A decorator.
  """

  def rename(function, kwargs):
    for name in [name for name in kwargs if name in names]:
      _warn(f'{function}: write {names[name]}= instead of {name}=.')
      kwargs[names[name]] = kwargs.pop(name)

  return _Keywords(rename)


def regrouped(argument: str, record: Any, **former: str) -> _Keywords:
  """Accepts arguments that have moved into a record, with a warning.

  Args:
    argument: the argument that takes the record.
    record: the type of the record, a NamedTuple.
    **former: by former name, the field of the record; by default the names of
      all fields.

  Returns:
    A decorator. The function then warns of a former argument and puts its value
    into the record.
  """
  fields = former or {name: name for name in record._fields}

  def regroup(function, kwargs):
    names = [name for name in kwargs if name in fields]
    if names:
      moved = {fields[name]: kwargs.pop(name) for name in names}
      content = ', '.join(f'{field}=...' for field in moved)
      _warn(
        f'{function}: write {argument}={record.__name__}({content}) instead of '
        f'{", ".join(names)}.'
      )
      new = kwargs.get(argument)
      kwargs[argument] = new._replace(**moved) if new else record(**moved)

  return _Keywords(regroup)


def former_names(module: str, **names: Any) -> Callable[[str], Any]:
  """Makes a module's `__getattr__` that serves renamed values, with a warning.

  Args:
    module: `__name__` of the module.
    **names: by former name, the renamed function or type.
  """

  def find(name: str) -> Any:
    if name not in names:
      raise AttributeError(f'module {module!r} has no attribute {name!r}')
    new = names[name].__name__
    _warn(f'{module}.{name} is now {new}.', 3)
    return names[name]

  return find


# For methods that solve a linear system; `solve` holds these settings.
system_in_solve = removed(
  linear_batch='solve=bj.linear_solvers.LinearSystem(batch_at=...)',
  warm_start='solve=bj.linear_solvers.LinearSystem(warm_start=...)',
  key='solve=bj.linear_solvers.LinearSystem(..., key=...)',
)


def whole_number(
  caller: str, quantity: str, number: Any, minimum: int = 1
) -> int:
  """Converts a number to an int; raises ValueError unless it is whole.

  Args:
    caller: name of the function, for the error.
    quantity: the plural of what is counted, for the error.
    number: a whole number; booleans are refused.
    minimum: the smallest accepted number.

  Example:
    >>> import bilevel_jax as bj
    >>> bj.checks.whole_number('my_method', 'steps', 0)
    Traceback (most recent call last):
    ...
    ValueError: my_method takes a whole number of steps >= 1, got 0.
  """
  if (
    isinstance(number, bool | np.bool_)
    or not isinstance(number, int | np.integer)
    or number < minimum
  ):
    raise ValueError(
      f'{caller} takes a whole number of {quantity} >= {minimum}, got '
      f'{number!r}.'
    )
  return int(number)


def within(
  caller: str,
  quantity: str,
  number: Any,
  low: float,
  high: float = float('inf'),
  *,
  open_low: bool = False,
) -> None:
  """Raises ValueError unless a constant is finite and in [low, high].

  Schedules and traced numbers pass: their values are known only at the call.

  Args:
    caller: name of the function, for the error.
    quantity: name of the number, for the error.
    number: a number or an array; each entry is checked.
    low: the lower bound.
    high: the upper bound.
    open_low: whether the lower bound itself is refused.

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
    raise ValueError(f'{caller}: {quantity} is {bounds}, got {number}.')


def preferences(
  name: str, objectives: int, preference: Any, *, open_low: bool = False
) -> Any:
  """Checks a preference vector; None gives equal numbers that sum to one.

  Args:
    name: name of the function, for the error.
    objectives: the number of objectives.
    preference: a number for each objective, (objectives,), or None.
    open_low: whether zero is refused.

  Example:
    >>> import bilevel_jax as bj
    >>> print(bj.checks.preferences('mine', 4, None))
    [0.25 0.25 0.25 0.25]
  """
  if preference is None:
    return np.full(whole_number(name, 'objectives', objectives), 1 / objectives)
  within(name, 'preference', preference, 0, open_low=open_low)
  if np.shape(preference) != (objectives,):
    raise ValueError(
      f'{name}: preference has shape {np.shape(preference)}, expected a number '
      f'for each of {objectives} objectives.'
    )
  return preference


def optimiser(expected: str, value: Any) -> None:
  """Raises TypeError unless a value is an optimiser.

  Args:
    expected: the start of the error.
    value: an optax transformation; solvers and oracles are refused.
  """
  # Only solvers and oracles of this library have declared properties.
  declared = {'moves', 'oracles'} & set(getattr(value, '__dict__', ()))
  if isinstance(value, optax.GradientTransformation) and not declared:
    return
  remedy = 'write for instance optax.sgd(0.1)'
  if isinstance(value, optax.MultiSteps):
    remedy = 'write optax.MultiSteps(...).gradient_transformation()'
  elif declared:
    remedy = 'oracles are the positional arguments of bj.descend'
  name = getattr(value, '__name__', type(value).__name__)
  raise TypeError(f'{expected}, got {name}: {remedy}.')


def sequence_fields(
  projection: Any, steps: Any, batch_at: Any, start: Any, restart: Any
) -> None:
  """Raises for fields of a `Sequence` of another type; None is unset."""
  if steps is not None:
    whole_number('bj.Sequence', 'steps', steps)
  plain = isinstance(projection, bool | int | float | list | str | np.ndarray)
  if plain or type(projection) is tuple:
    raise TypeError(
      'set of a bj.Sequence is a projection, for instance lambda z: '
      f'jnp.clip(z, 0, 1), got {projection!r}; a number of steps is steps=....'
    )
  for field, value, signature in (
    ('batch_at', batch_at, 'lambda batch, t: batch[t]'),
    ('start', start, 'lambda params: params.lower'),
  ):
    if value is not None and not callable(value):
      raise TypeError(
        f'{field} of a bj.Sequence is a function, for instance {signature}, '
        f'got {type(value).__name__}.'
      )
  if not isinstance(restart, bool | None):
    raise TypeError(
      f'restart of a bj.Sequence is True or False, got {restart!r}.'
    )
