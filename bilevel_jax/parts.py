"""Oracles and solvers as values that show their parts.

Both are optax transformations: `init, update = solver` and `optax.chain` see
two functions. What they declare besides is kept by every wrapper of this
library, and `bj.evaluation.wrapped` puts a wrapper around a solver's oracles
from outside. `optax.chain` returns two functions that declare nothing: where a
declared property is needed, chain by `bj.oracles.aggregated`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optax

from bilevel_jax import types

__all__ = ['Oracle', 'Solver']


class _Value(optax.GradientTransformationExtraArgs):
  """A transformation whose declared properties do not change."""

  def __setattr__(self, name: str, value: Any) -> None:
    kind = type(self).__name__
    raise AttributeError(
      f'{name} of a {kind} does not change: make another one, '
      f'_replace({name}=...).'
    )

  def _replace(self, **fields: Any) -> Any:
    """The same with other fields."""
    both = {'init': self.init, 'update': self.update}
    return type(self)(**(both | self.__dict__ | fields))


class Oracle(_Value):
  """A transformation from a batch to gradients.

  Attributes:
    moves: names of the sequences that it has gradients for; None where it does
      not say, as for parameters without named sequences.
    linear: whether the gradients of a batch are the mean of those of its parts,
      evaluated one after another, where the losses are means over samples.
    averaged: from a `Mean` to the oracle whose evaluations of losses are such
      means, for one that is not linear; None if there is no such form.
    within: from a wrapper to this oracle with the wrapper inside, for one that
      corrects, delays or selects what others evaluate; None if a wrapper goes
      around it.
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
    """Makes an oracle of its two functions."""
    value = super().__new__(cls, init, update)
    value.__dict__.update(
      moves=None if moves is None else tuple(moves),
      linear=linear,
      averaged=averaged,
      within=within,
    )
    return value


class Solver(_Value):
  """A transformation from a batch to updates, value of oracles and sequences.

  Attributes:
    oracles: in the order in which they are evaluated.
    sequences: by name, how each sequence moves; those with a `start` are in the
      state. Empty where the parameters have no named sequences.
    again: from as many oracles to the same solver with these; None if the
      solver depends on its own.
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
    """Makes a solver of its two functions and its parts."""
    value = super().__new__(cls, init, update)
    value.__dict__.update(
      oracles=tuple(oracles), sequences=dict(sequences or {}), again=again
    )
    return value


def as_oracle(one: Any) -> Oracle:
  """An oracle as it is; of another transformation, one that declares nothing.

  Raises:
    TypeError: for what is no transformation.
  """
  if isinstance(one, Oracle):
    return one
  if not isinstance(one, optax.GradientTransformation):
    raise TypeError(
      f'expected an oracle, got {type(one).__name__}: bj.gradient(loss) for '
      'instance.'
    )
  link = optax.with_extra_args_support(one)
  return Oracle(link.init, link.update)


def around(one: Oracle, wrapper: types.Wrapper) -> Oracle:
  """An oracle with a wrapper around it, or inside where it belongs there."""
  return as_oracle(wrapper(one) if one.within is None else one.within(wrapper))
