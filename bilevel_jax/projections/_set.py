"""Projections onto one sequence's set, and checks that it is not empty."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, _trees
from bilevel_jax.projections import _affine

# Maps a sequence to its nearest point in a set.
Projection = Callable[[Any], Any]

# The sets of optax that a negative `scale` makes empty.
_SCALED = {
  optax.projections.projection_l1_ball: 'a ball of radius',
  optax.projections.projection_l1_sphere: 'a sphere of radius',
  optax.projections.projection_l2_ball: 'a ball of radius',
  optax.projections.projection_l2_sphere: 'a sphere of radius',
  optax.projections.projection_linf_ball: 'a ball of radius',
  optax.projections.projection_hypercube: 'a hypercube with sides',
  optax.projections.projection_simplex: 'a simplex with the sum',
}


def _check_arguments(projection: Projection, name: str) -> None:
  """Raises ValueError if the arguments of one of optax's sets make it empty."""
  if not isinstance(projection, functools.partial):
    return
  keywords = projection.keywords
  if not _affine.is_concrete(keywords):
    return
  if projection.func is optax.projections.projection_box:
    low, high = keywords.get('lower'), keywords.get('upper')
    if low is None or high is None:
      return
    crossed = jax.tree.map(lambda a, b: bool(jnp.any(a > b)), low, high)
    if any(jax.tree.leaves(crossed)):
      raise ValueError(
        f'the set of the sequence {name} is empty: a box with lower {low} '
        f'above upper {high}.'
      )
  elif projection.func in _SCALED:
    scale = keywords.get('scale', 1)
    if any(bool(jnp.any(leaf < 0)) for leaf in jax.tree.leaves(scale)):
      raise ValueError(
        f'the set of the sequence {name} is empty: {_SCALED[projection.func]} '
        f'{scale}.'
      )


def check_set(projection: Projection, point: Any, name: str) -> None:
  """Checks that a projection maps a sequence to a finite point of its shape.

  Args:
    projection: maps a sequence to its nearest point in the set.
    point: the initial sequence; nothing is checked if it is traced.
    name: the name of the sequence, for the error.

  Raises:
    ValueError: if the result has another structure or shape or is not finite,
      or if the arguments of one of optax's sets make it empty.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> check = bj.projections.check_set
    >>> check(optax.projections.projection_simplex, jnp.ones(3), 'upper')
    >>> check(lambda x: x / 0, jnp.ones(3), 'upper')
    Traceback (most recent call last):
    ...
    ValueError: the projection of the sequence upper is not finite at ...
  """
  if not _affine.is_concrete(point):
    return
  # Concrete parameters are checked even inside a jitted function.
  with jax.ensure_compile_time_eval():
    _check_arguments(projection, name)
    inside = projection(point)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if shapes(inside) != shapes(point):
      raise ValueError(
        f'the projection of the sequence {name} returned another structure or '
        'shape than that of the sequence.'
      )
    leaves = jax.tree.leaves(inside)
    if _affine.is_concrete(inside) and not all(
      bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves
    ):
      raise ValueError(
        f'the projection of the sequence {name} is not finite at the start: '
        'the set is empty, or the sequence is not finite.'
      )


def require_projection(projection: Any, caller: str) -> None:
  """Raises TypeError unless a set is a function of a point, or None.

  `Lazy`, `Relaxed` and `Joint` work only in `descend`, which has their state;
  the inner loop of an oracle has no state for them.
  """
  if projection is not None and not callable(projection):
    raise TypeError(
      f'{caller} projects each step of its inner loop: its set is a function '
      'from a point to the nearest point in the set, or an affine set, got '
      f'{type(projection).__name__}.'
    )


def depends(projection: Projection) -> bool:
  """Whether a set depends on the upper variable."""
  return getattr(projection, 'coupling', None) is not None


def _coupled_upper(projection: Projection, params: Any) -> Any:
  if not depends(projection):
    return None
  _sequences.require_sequences(params, ('upper',), 'a coupled affine set')
  return params.upper


def check(projection: Projection, params: Any, name: str) -> None:
  """Checks the set of one sequence of the initial parameters."""
  point = getattr(params, name)
  if isinstance(projection, _affine.AffineSet):
    projection.check(point, _coupled_upper(projection, params), name)
  elif not callable(projection):
    raise TypeError(
      f'the set of the sequence {name} is a function from a point to the '
      f'nearest point in the set, got {type(projection).__name__}.'
    )
  else:
    check_set(projection, point, name)


def nearest(projection: Projection, point: Any, params: Any) -> Any:
  """Projects a sequence; a coupled set uses the upper variable of `params`."""
  if not isinstance(projection, _affine.AffineSet):
    inside = projection(point)
  else:
    inside = projection(point, _coupled_upper(projection, params))
  # Bounds of a wider dtype would widen the sequence.
  return _trees.cast_like(inside, point)
