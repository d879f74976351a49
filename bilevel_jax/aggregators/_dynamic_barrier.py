"""The dynamic barrier: the smallest penalty weight that decreases a penalty."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _trees, states, types
from bilevel_jax.aggregators import _penalty, _rows


@states.counts_updates
class DynamicBarrierState(NamedTuple):
  """State of `dynamic_barrier`.

  Attributes:
    count: updates so far, an int32 scalar.
    multiplier: the weight of the penalty in the last update, a scalar; zero if
      the gradient of the penalty was zero.
  """

  count: chex.Array
  multiplier: chex.Array


def dynamic_barrier(
  eta: types.ScalarOrSchedule = 0.5,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the smallest multiple of a penalty that decreases it at a given rate.

  .. math::
    d = \nabla f + \lambda \nabla q, \qquad
    \lambda = \max \left( \frac{\phi - \langle \nabla f, \nabla q \rangle}
      {\| \nabla q \|^2}, 0 \right), \qquad \phi = \eta \| \nabla q \|^2

  The result is the direction nearest to :math:`\nabla f` with
  :math:`\langle d, \nabla q \rangle \ge \phi`; there is no penalty weight to
  choose. It is computed from the unit vector along :math:`\nabla q`, so its
  norm stays below :math:`\| \nabla f \| + \eta \| \nabla q \|` as
  :math:`\nabla q` vanishes; for :math:`\nabla q = 0`, :math:`d = \nabla f`. It
  is not continuous there: with a constant step size the penalty may stay at a
  level of the order of the step squared, so let the step size decay.

  Args:
    eta: rate :math:`\eta \ge 0` of the penalty's decrease, dimensionless; a
      constant, or a schedule from the number of updates so far.

  Returns:
    A transformation from a `Jacobian` with two rows (objective, penalty) to
    gradients of the parameters' structure. The inner products run over all
    sequences.

  Raises:
    ValueError: if eta is negative, or if a `Jacobian` does not have two rows.
    TypeError: if the incoming gradients are not a `Jacobian`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.dynamic_barrier(0.5)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(rows=jnp.array([[1.0, 1.0], [-2.0, 0.0]]))
    >>> updates, state = link.update(jacobian, link.init(params), params)
    >>> print(updates, state.multiplier)  # (2 + 2) / 4
    [-1.  1.] 1.0

  References:
    Liu, Ye, Wright, Stone and Liu, `BOME! Bilevel Optimization Made Easy: A
    Simple First-Order Approach <https://arxiv.org/abs/2209.08709>`_, 2022.

    Gong, Liu and Liu, Automatic and Harmless Regularization with Constrained
    and Lexicographic Optimization: A Dynamic Barrier Approach, NeurIPS 2021.
  """
  rate = _penalty.checked_schedule(eta, 'eta')

  def init_fn(params):
    zero = jnp.zeros([], _trees.widest_dtype(params))
    return DynamicBarrierState(jnp.zeros([], jnp.int32), zero)

  def update_fn(jacobian, state, params=None, **extra_args):
    del params, extra_args
    _rows.require(jacobian, 'dynamic_barrier', 2, rows=True)
    dtype = state.multiplier.dtype
    gram = _rows.gramian(jacobian)
    objective, penalty = gram.lengths.astype(dtype)
    current_eta = jnp.asarray(rate(state.count), dtype)
    along = current_eta * penalty - objective * gram.cosines[0, 1].astype(dtype)
    along = jnp.maximum(along, 0)
    inverse = _trees.ratio(1, penalty)

    def add(rows):
      one, two = rows.astype(jnp.promote_types(dtype, rows.dtype))
      # Uses the unit vector, since the multiplier may overflow.
      return (one + along * (inverse * two)).astype(rows.dtype)

    gradients = jax.tree.map(add, jacobian.rows)
    count = optax.safe_increment(state.count)
    return (
      _rows.with_rest(gradients, jacobian.rest),
      DynamicBarrierState(count, along * inverse),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
