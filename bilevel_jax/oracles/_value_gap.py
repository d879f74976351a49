"""The value-gap penalty: how far the lower loss is above its minimum."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _checks, _trees, types
from bilevel_jax.oracles import _penalised, base


def value_gap(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule | None = None,
  rescale: bool = True,
  proximity: float | None = None,
  quadrature: int | None = None,
  of: str | Sequence[str] = ('upper', 'lower'),
) -> base.Oracle:
  r"""Gradients of the upper loss and of the value gap of the lower loss.

  .. math::
    \nabla f(x, y), \qquad
    \nabla g(x, y) - (\nabla_x g(x, w), 0)

  where :math:`w`, the sequence named `value`, stands for a minimiser of
  :math:`g(x, \cdot)`. It is held fixed: by the theorem of Danskin, the value
  function's gradient is the partial gradient at any minimiser.

  **Rounding.** The gap falls as the inverse square of the penalty, but the
  difference of two losses is only known to some spacings of floats at the loss:
  in float32, the gap is rounding at penalties above about a thousand, and the
  slope in x, a difference of two gradients, is wrong by percents at 1e5.
  With `quadrature`, both are integrals along the segment from w to y,

  .. math::
    g(x, y) - g(x, w)
      = \int_0^1 \langle \nabla_y g(x, w + t (y - w)), y - w \rangle \, dt

  by Gauss and Legendre: every term has the factor :math:`y - w`, so errors are
  relative to the result. In float32 at a penalty of 1e5, the gap is right to
  some percent and the slope in x to six digits, on a quadratic and on a
  regularised logistic regression of 500 rows. One node is exact on a lower loss
  that is quadratic in y; two nodes are right to four digits on the regression
  also at a penalty of one, where y and w are far apart. The slope in y is a
  gradient and no difference: moving y by one spacing changes it by as much as
  its rounding, and only wider floats help.

  Args:
    problem: the upper and the lower loss.
    penalty: None for two rows, to be weighed by an aggregator. A weight, or a
      schedule of it, gives the fused form: one scalar loss, one backward pass
      and one gradient instead of two rows, with the same result as
      `scale_by_penalty` behind the rows.
    rescale: whether the fused form is divided by the penalty above one, as in
      `scale_by_penalty`.
    proximity: None for the value function; a length for its Moreau envelope,
      for lower losses that are not convex: the value sequence then stands for
      a minimiser of the lower loss plus its squared distance to the lower
      variable, divided by twice this length, and the gap is less by that.
    quadrature: None for the difference of two losses; a number of nodes for the
      integral. Each node costs a Hessian-vector product; the gradient at the
      value sequence is not evaluated. The lower loss then needs forward
      derivatives (no `jax.custom_vjp`).
    of: the one sequence, or both, to differentiate.

  Returns:
    An oracle for parameters with the sequences `upper`, `lower`, `value`. It
    measures `upper`, `lower`, `gap` and `gap_rounding`, an estimate of the
    rounding error of `gap`: four spacings of floats at the lower loss, or with
    `quadrature` what four spacings of y and w do to the gap. A gap below
    minus `gap_rounding` means that the value sequence lags behind the lower
    one; it is reported as it is.

  Raises:
    ValueError: if the penalty is negative or `quadrature` is below 1.
    TypeError: at the call, if a loss is not a scalar or a sequence is missing.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2, lower=lambda x, y, batch: (x - y) ** 2
    ... )
    >>> params = bj.sequences(
    ...   upper=jnp.float32(1.0), lower=jnp.float32(3.0), value=jnp.float32(2.0)
    ... )
    >>> link = bj.value_gap(problem)
    >>> jacobian, _ = link.update(None, link.init(params), params)
    >>> print(jacobian.rows.upper, jacobian.rows.lower)
    [ 0. -2.] [6. 4.]

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  if quadrature is not None:
    _checks.whole('value_gap', 'quadrature nodes', quadrature)
  lower = base.Loss(problem.lower, 'lower')

  def gap(x, y, params, batch, known):
    del known
    value = jax.lax.stop_gradient(params.value)
    if quadrature is None:
      below, outputs = lower.full(x, y, batch)
      # Live in x, stopped in the value sequence.
      floor = lower(x, value, batch)
      height, rounding = below - floor, rounding_of(below, floor)
    else:
      # The integral has the value and the slope in x, the loss that in y.
      below, outputs = lower.full(jax.lax.stop_gradient(x), y, batch)
      height, rounding = along_segment(
        lambda y: lower(x, y, batch),
        value,
        jax.lax.stop_gradient(y),
        quadrature,
      )
      height = height + (below - jax.lax.stop_gradient(below))
    if proximity is not None:
      away = optax.tree.norm(optax.tree.sub(value, y), squared=True)
      height = height - away / (2 * proximity)
    return height, (below, outputs, rounding)

  nodes = {'hessian_vector_products/lower': quadrature} if quadrature else {}
  counts = {
    'gradients/upper': 1,
    'gradients/lower': 1 if quadrature else 2,
    **nodes,
  }
  return _penalised.penalised(
    problem,
    _penalised.Penalty(gap, ('gap', 'gap_rounding'), counts),
    penalty=penalty,
    rescale=rescale,
    of=(of,) if isinstance(of, str) else tuple(of),
  )


def rounding_of(*losses: chex.Array) -> chex.Array:
  """Estimates the rounding error of a difference of losses.

  Args:
    *losses: scalars.

  Returns:
    Four spacings of floats at the largest, a scalar.
  """
  largest = functools.reduce(jnp.maximum, [jnp.abs(loss) for loss in losses])
  return 4 * jnp.finfo(largest.dtype).eps * jax.lax.stop_gradient(largest)


def _forward(loss: Callable[[Any], chex.Array], at: Any, way: Any):
  return jax.jvp(loss, (at,), (way,))[1]


def _reverse(loss: Callable[[Any], chex.Array], at: Any, way: Any):
  return _trees.dot(jax.grad(loss)(at), way)


def along_segment(
  loss: Callable[[Any], chex.Array],
  start: Any,
  end: Any,
  nodes: int,
  slope_along: Callable[..., chex.Array] = _forward,
) -> tuple[chex.Array, chex.Array]:
  """Integrates a loss's derivative along a segment, by Gauss and Legendre.

  Args:
    loss: from a point to a scalar.
    start: a point, any pytree.
    end: the other point.
    nodes: how many derivatives to take.
    slope_along: the derivative of a loss at a point along a vector.

  Returns:
    The loss at the end minus that at the start, without its cancellation, and
    an estimate of the rounding error, two scalars.
  """
  way = _trees.as_dtypes_of(optax.tree.sub(end, start), start)
  slopes = []
  places, weights = np.polynomial.legendre.leggauss(nodes)
  for place, weight in zip(places.tolist(), weights.tolist(), strict=True):
    at = _trees.add_scaled(start, (1 + place) / 2, way)
    slopes.append(weight / 2 * slope_along(loss, at, way))
  # A spacing of the points changes their distance, and the slopes along it.
  sizes = [_trees.dot(tree, tree) ** 0.5 for tree in (start, end, way)]
  spacings = 4 * max(jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(way))
  share = _trees.ratio(spacings * (sizes[0] + sizes[1]), sizes[2])
  size = sum(jnp.abs(jax.lax.stop_gradient(slope)) for slope in slopes)
  return sum(slopes), size * share.astype(slopes[0].dtype)


def accurate_gap(
  lower: base.Loss, x: Any, y: Any, value: Any, batch: Any
) -> chex.Array:
  """The value gap as a difference, or along the segment where that is rounding.

  Args:
    lower: the lower loss.
    x: the upper variable.
    y: the lower variable.
    value: where the lower loss is compared with.
    batch: of the loss.

  Returns:
    A scalar that can be differentiated in x. It costs both forms.
  """
  here, there = lower(x, y, batch), lower(x, value, batch)
  # By reverse derivatives, which a loss with a custom one has too.
  loss = lambda y: lower(x, y, batch)
  near, _ = along_segment(loss, value, y, 3, _reverse)
  plain = here - there
  # Here the difference is right to a percent, and the segment is short.
  fine = jnp.abs(plain) > 100 * rounding_of(here, there)
  return jnp.where(fine, plain, near)
