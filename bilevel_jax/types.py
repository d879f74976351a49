"""Problems, parameters and gradients: types, and how sequences are named.

Parameters of a nested problem are a NamedTuple whose fields are its sequences.
Gradients have the same type; a field is None where a link leaves that sequence
alone, so an untouched sequence costs neither a zero buffer nor an addition.
"""

import collections
from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

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
    rest: gradients, by sequence name, that no weight may touch.
  """

  rows: Any
  rest: Mapping[str, Any] = {}


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


def is_sequences(params: Any) -> bool:
  """Whether params are named sequences, that is, a NamedTuple."""
  return isinstance(params, tuple) and hasattr(params, '_fields')


def require_sequences(params: Any, names: tuple[str, ...], who: str) -> None:
  """Raises TypeError unless params are a NamedTuple with these fields."""
  if params is None:
    raise TypeError(
      f'{who} needs the parameters: call solver.update(batch, state, params).'
    )
  missing = [n for n in names if n not in getattr(params, '_fields', ())]
  if missing:
    held = getattr(params, '_fields', None) or type(params).__name__
    raise TypeError(
      f'{who} works on the sequences {", ".join(names)}, but the parameters '
      f'are {held}: hold them in bj.BilevelParams(upper=..., lower=...) or '
      'bj.sequences(...).'
    )


def only(params: Any, **fields: Any) -> Any:
  """Gradients of params' type: the given fields, None elsewhere."""
  return type(params)(**dict.fromkeys(params._fields) | fields)


def map_sequences(fn: Callable[..., Any], params: Any, *trees: Any) -> Any:
  """Maps `fn(name, leaf tree, ...)` over sequences; None stays None.

  Args:
    fn: called once for each sequence whose field in `params` is not None.
    params: a NamedTuple of sequences.
    *trees: NamedTuples with the same fields.

  Returns:
    A NamedTuple of the type of `params`.
  """
  out = {}
  for name in params._fields:
    field = getattr(params, name)
    others = (getattr(t, name) for t in trees)
    out[name] = None if field is None else fn(name, field, *others)
  return type(params)(**out)


def apply_updates(params: Any, updates: Any) -> Any:
  """Adds updates to params, like optax's, but a None field stays as it is."""
  if is_sequences(params):
    return type(params)(
      *(
        p if u is None else optax.apply_updates(p, u)
        for p, u in zip(params, updates, strict=True)
      )
    )
  return optax.apply_updates(params, updates)


def dtype_of(params: Any) -> Any:
  """The widest dtype among the leaves, at least float32: for accumulators."""
  leaves = [jnp.asarray(x).dtype for x in jax.tree.leaves(params)]
  floats = [d for d in leaves if jnp.issubdtype(d, jnp.floating)]
  return functools.reduce(jnp.promote_types, floats, jnp.dtype(jnp.float32))
