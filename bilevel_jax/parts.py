"""Oracles and solvers as values with declared properties.

Both are optax transformations: `init, update = solver` and `optax.chain` see
two functions. Every wrapper of this library keeps the other properties, and
`bj.evaluation.wrapped` wraps the oracles of a solver. `optax.chain` drops all
properties; `bj.oracles.aggregated` keeps them.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optax

from bilevel_jax import types

__all__ = ['Oracle', 'Solver']


class _Value(optax.GradientTransformationExtraArgs):
  """A transformation with read-only properties."""

  def __setattr__(self, name: str, value: Any) -> None:
    kind = type(self).__name__
    raise AttributeError(
      f'{name} of a {kind} is read-only: make another one by '
      f'_replace({name}=...).'
    )

  def __repr__(self) -> str:
    """The two calls; errors of JAX show it, for instance of jax.jit(solver)."""
    kind = type(self).__name__
    return f'<{kind}: call .init(params) and .update(batch, state, params)>'

  def _replace(self, **fields: Any) -> Any:
    """Copies it with other fields."""
    both = {'init': self.init, 'update': self.update}
    return type(self)(**(both | self.__dict__ | fields))


class Oracle(_Value):
  """A transformation from a batch to gradients.

  Attributes:
    moves: names of the sequences for which it gives gradients; None if unknown,
      for instance for parameters without named sequences.
    linear: whether the gradient of a batch is the mean of the gradients of its
      parts, for losses that are means over samples.
    averaged: for an oracle that is not linear, a function from a `Mean` to the
      oracle that evaluates its losses by this mean; None without such a form.
    within: for an oracle that corrects, delays or selects other oracles, a
      function from a wrapper to this oracle with the wrapper inside; None if
      the wrapper goes around it.
  """

  moves: tuple[str, ...] | None
  linear: bool
  averaged: Callable[[Any], 'Oracle'] | None
  within: Callable[[types.Wrapper], 'Oracle'] | None

  def __new__(
    cls,
    init: Callable[[Any], Any],
    update: Callable[..., Any],
    moves: Iterable[str] | None = None,
    *,
    linear: bool = False,
    averaged: Callable[[Any], 'Oracle'] | None = None,
    within: Callable[[types.Wrapper], 'Oracle'] | None = None,
  ) -> 'Oracle':
    """Makes an oracle from its two functions."""
    value = super().__new__(cls, init, update)
    value.__dict__.update(
      moves=None if moves is None else tuple(moves),
      linear=linear,
      averaged=averaged,
      within=within,
    )
    return value


class Solver(_Value):
  """A transformation from a batch to updates, with its oracles and sequences.

  Attributes:
    oracles: in the order of evaluation.
    sequences: by name, the record of each sequence; those with a `start` are in
      the state. Empty for parameters without named sequences.
    again: from other oracles to the same solver with these; None if the solver
      depends on its own oracles.
  """

  oracles: tuple[Oracle, ...]
  sequences: Mapping[str, types.Sequence]
  again: Callable[..., 'Solver'] | None

  def __new__(
    cls,
    init: Callable[[Any], Any],
    update: Callable[..., Any],
    oracles: Iterable[Oracle] = (),
    sequences: Mapping[str, types.Sequence] | None = None,
    again: Callable[..., 'Solver'] | None = None,
  ) -> 'Solver':
    """Makes a solver from its two functions and its parts."""
    value = super().__new__(cls, init, update)
    value.__dict__.update(
      oracles=tuple(oracles), sequences=dict(sequences or {}), again=again
    )
    return value


def as_oracle(one: Any) -> Oracle:
  """Converts a transformation to an oracle without declared properties.

  Raises:
    TypeError: for anything but a transformation, for a solver, and for an
      optimiser of optax.
  """
  if isinstance(one, Oracle):
    return one
  known = isinstance(one, optax.GradientTransformation)
  if known and not isinstance(one, Solver) and not _is_from_optax(one.update):
    link = optax.with_extra_args_support(one)
    return Oracle(link.init, link.update)
  kind, remedy = type(one).__name__, 'write bj.descend(oracle, lower=optimiser)'
  if known and not isinstance(one, Solver):
    kind = 'an optimiser of optax'
  raise TypeError(
    f'expected an oracle, for instance bj.gradient(loss), got {kind}: {remedy}.'
  )


def _is_from_optax(value: Any) -> bool:
  """Whether a function and all that it closes over are optax's.

  Then it evaluates no loss. An oracle in a chain is in the chain's closure.
  """
  if isinstance(value, tuple | list):
    return all(map(_is_from_optax, value))
  if isinstance(value, functools.partial):
    return _is_from_optax((value.func, *value.args, *value.keywords.values()))
  if not callable(value) or isinstance(value, type):
    return True
  cells = getattr(value, '__closure__', None) or ()
  inside = [cell.cell_contents for cell in cells]
  module = getattr(value, '__module__', None) or ''
  return module.partition('.')[0] == 'optax' and _is_from_optax(inside)


def around(one: Oracle, wrapper: types.Wrapper) -> Oracle:
  """Puts a wrapper around an oracle, or inside if the oracle declares so."""
  return as_oracle(wrapper(one) if one.within is None else one.within(wrapper))
