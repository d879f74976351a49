"""Keeps sequences in sets: the last link of a constrained solver."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences
from bilevel_jax.projections import _affine

# From a sequence to its nearest point in a set.
Projection = Callable[[Any], Any]

# What a negative `scale` leaves without a point, of optax's sets.
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
  """Finds sets of optax's that their arguments leave without a point."""
  if not isinstance(projection, functools.partial):
    return
  given = projection.keywords
  if not _affine.is_concrete(given):
    return
  if projection.func is optax.projections.projection_box:
    low, high = given.get('lower'), given.get('upper')
    if low is None or high is None:
      return
    crossed = jax.tree.map(lambda a, b: bool(jnp.any(a > b)), low, high)
    if any(jax.tree.leaves(crossed)):
      raise ValueError(
        f'the set of the sequence {name} has no point in it: a box with lower '
        f'{low} above upper {high}.'
      )
  elif projection.func in _SCALED:
    scale = given.get('scale', 1)
    if any(bool(jnp.any(leaf < 0)) for leaf in jax.tree.leaves(scale)):
      raise ValueError(
        f'the set of the sequence {name} has no point in it: '
        f'{_SCALED[projection.func]} {scale}.'
      )


def _check_points(first: Any, again: Any, name: str) -> None:
  """Raises unless projecting once, and once more, give one finite point."""
  for one, two in zip(
    jax.tree.leaves(first), jax.tree.leaves(again), strict=True
  ):
    if not bool(jnp.all(jnp.isfinite(one))):
      raise ValueError(
        f'the projection of the sequence {name} is not finite at the start: '
        'the set has no point in it, or the sequence is not finite.'
      )
    size = jnp.max(jnp.abs(one), initial=1)
    room = jnp.sqrt(jnp.finfo(one.dtype).eps) * size
    if not bool(jnp.all(jnp.abs(one - two) <= room)):
      raise ValueError(
        f'projecting the sequence {name} twice moves it again: the set has no '
        'point in it, or the function is not a projection.'
      )


def check_set(projection: Projection, point: Any, name: str) -> None:
  """Raises unless the projection of a point is a point of the set.

  Args:
    projection: maps a sequence to its nearest point in the set.
    point: the sequence at the start; nothing is checked while it is traced.
    name: the name of the sequence, for the error.

  Raises:
    ValueError: if the result has another structure or shape, is not finite, or
      moves when it is projected again: then the set has no point in it, or the
      function is not a projection.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> bj.check_set(optax.projections.projection_simplex, jnp.ones(3), 'upper')
    >>> bj.check_set(lambda x: x + 1, jnp.ones(3), 'upper')
    Traceback (most recent call last):
    ...
    ValueError: projecting the sequence upper twice moves it again: ...
  """
  if not _affine.is_concrete(point):
    return
  # Also where a jitted function makes the state of parameters that it closes
  # over: what is known is then still checked.
  with jax.ensure_compile_time_eval():
    _check_arguments(projection, name)
    first = projection(point)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if shapes(first) != shapes(point):
      raise ValueError(
        f'the projection of the sequence {name} returned another structure or '
        'shape than the sequence has.'
      )
    again = projection(first)
    if _affine.is_concrete((first, again)):
      _check_points(first, again, name)


def check_sets(sets: Mapping[str, Projection], params: Any) -> None:
  """Checks, at the start, the set of each sequence of params that has one."""
  for name, projection in sets.items():
    point = getattr(params, name)
    if isinstance(projection, _affine.AffineSet):
      projection.check(point, _upper_of(projection, params), name)
    else:
      check_set(projection, point, name)


def _upper_of(projection: _affine.AffineSet, params: Any) -> Any:
  if projection.coupling is None:
    return None
  _sequences.require_sequences(params, ('upper',), 'a coupled affine set')
  return params.upper


def nearest(projection: Projection, point: Any, params: Any) -> Any:
  """Projects a sequence, on a coupled set at the upper variable of params."""
  if not isinstance(projection, _affine.AffineSet):
    return projection(point)
  return projection(point, _upper_of(projection, params))


def use_of(sets: Mapping[str, Projection]) -> dict[str, int]:
  """What projecting once on each set costs, by the keys of `bj.counts`."""
  spent = {f'projections/{name}': 1 for name in sets}
  for name, projection in sets.items():
    if isinstance(projection, _affine.AffineSet) and projection.rounds:
      spent[f'rounds/{name}'] = projection.rounds
  return spent


class ProjectState(NamedTuple):
  """State of `project`.

  Attributes:
    counts: projections so far, by sequence, and communication rounds if a
      projection is a mean over clients; int32 scalars.
  """

  counts: dict[str, chex.Array]


def project(
  **sets: Projection | None,
) -> optax.GradientTransformationExtraArgs:
  r"""Changes updates so that the parameters plus the updates are in sets.

  .. math::
    \text{updates} \leftarrow \Pi(z + \text{updates}) - z

  Adding the result to the parameters rounds once more: a point on the boundary
  can be outside by the spacing of floats at the larger of the point before and
  the point after. The deviation does not build up.

  Args:
    **sets: by name of a sequence, a function that projects it: any of
      `optax.projections`, its arguments bound by `functools.partial`; an
      `AffineSet`, which may depend on the sequence `upper`; or None for the
      whole space.

  Returns:
    A transformation; it belongs last in a chain.

  Raises:
    ValueError: at init, if a set has no point in it.
    TypeError: at the call, if the updates are a `Jacobian`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> link = bj.project(upper=optax.projections.projection_non_negative)
    >>> params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(1.0))
    >>> updates = bj.BilevelParams(jnp.float32(-3.0), jnp.float32(-3.0))
    >>> moved, _ = link.update(updates, link.init(params), params)
    >>> print(moved.upper, moved.lower)
    -1.0 -3.0
  """
  given = {name: set_ for name, set_ in sets.items() if set_ is not None}
  cost = use_of(given)

  def init_fn(params):
    _sequences.require_sequences(params, tuple(given), 'project')
    check_sets(given, params)
    return ProjectState({name: jnp.zeros([], jnp.int32) for name in cost})

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    _sequences.require_sequences(params, tuple(given), 'project')
    _sequences.require_gradients(updates, params, 'project')
    moving = {name for name in given if getattr(updates, name) is not None}
    spent = use_of({name: given[name] for name in moving})
    # A coupled set is taken where the upper variable will be.
    after = _sequences.apply_updates(params, updates)

    def one(name, update, param):
      if name not in given:
        return update
      inside = nearest(given[name], getattr(after, name), after)
      return optax.tree.sub(inside, param)

    moved = _sequences.map_sequences(one, updates, params)
    return moved, ProjectState(_sequences.add_counts(state.counts, spent))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
