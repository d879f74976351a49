"""Problems, parameters and gradients: types only.

Parameters of a nested problem are a NamedTuple whose fields are its sequences.
Gradients have the same type; a field is None where a link leaves that sequence
alone, so an untouched sequence costs neither a zero buffer nor an addition.
"""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax

ScalarOrSchedule = float | jax.Array | Callable[[chex.Numeric], chex.Numeric]
# (upper variable, lower variable, batch) -> scalar, or (scalar, auxiliary).
Loss = Callable[[Any, Any, Any], Any]


class BilevelProblem(NamedTuple):
  r"""A nested problem: minimise an upper loss at the lower loss's minimiser.

  .. math::
    \min_{x} f(x, y) \quad \text{where} \quad y \in \arg\min_{y'} g(x, y')

  Attributes:
    upper: the loss :math:`f(x, y, batch)`; a scalar, or (scalar, auxiliary).
    lower: the loss :math:`g(x, y, batch)`; likewise. Randomness comes in the
      batch, as a key.
  """

  upper: Loss
  lower: Loss


class BilevelParams(NamedTuple):
  """The two variables of a nested problem.

  Attributes:
    upper: the upper variable, any pytree of arrays.
    lower: the lower variable, any pytree of arrays.
  """

  upper: Any
  lower: Any


class Jacobian(NamedTuple):
  """Gradients of several objectives at one point.

  Attributes:
    rows: the parameters' structure; each leaf has a leading axis of objectives.
    rest: gradients, by sequence name, that no weight may touch; None where
      there are none.
    values: the objectives' losses, (objectives,), or None if not measured.
  """

  rows: Any
  rest: Mapping[str, Any] | None = None
  values: Any = None


class Gramian(NamedTuple):
  r"""What most aggregators need of a Jacobian :math:`J`, without its memory.

  Lengths and cosines stand for the products :math:`J J^\top`, whose squares
  leave the range of float32 for gradients shorter than 1e-19 or longer than
  1e19. It is a pytree of arrays: it may be returned from a compiled function,
  but not averaged over parts of a batch.

  Attributes:
    lengths: the norms of the rows, (objectives,).
    cosines: between all pairs of rows, (objectives, objectives); zero for a row
      that vanishes.
    combine: a `jax.tree_util.Partial` from weights (objectives,) to the
      gradient :math:`J^\top w`, with the gradients that no weight may touch in
      their places.
    values: the objectives' losses, (objectives,), or None if not measured.
  """

  lengths: Any
  cosines: Any
  combine: Callable[[Any], Any]
  values: Any = None

  @property
  def matrix(self) -> Any:
    r"""The products :math:`J J^\top`, (objectives, objectives)."""
    return self.lengths[:, None] * self.cosines * self.lengths


@functools.cache
def _sequences_type(names: tuple[str, ...]) -> type:
  # One class for each set of names: pytrees compare equal only if their
  # classes do, and a scan compares the pytrees of two traces.
  return collections.namedtuple('Sequences', names)


def sequences(**fields: Any) -> Any:
  """Makes a NamedTuple of named sequences.

  Args:
    **fields: a pytree for each name.

  Returns:
    A NamedTuple `Sequences` with these fields; the same names give the same
    type.

  Example:
    >>> import bilevel_jax as bj
    >>> bj.sequences(actor=1.0, critic=2.0)
    Sequences(actor=1.0, critic=2.0)
  """
  return _sequences_type(tuple(fields))(**fields)
