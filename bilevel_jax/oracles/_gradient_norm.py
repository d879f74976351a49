"""The gradient-norm penalty: the squared slope of the lower loss."""

import jax
import optax

from bilevel_jax import types
from bilevel_jax.oracles import _penalised, base


def gradient_norm(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule | None = None,
  rescale: bool = True,
) -> base.Oracle:
  r"""Gradients of the upper loss and of the lower loss's squared slope.

  .. math::
    \nabla f(x, y), \qquad
    \nabla \tfrac{1}{2} \| \nabla_y g(x, y) \|^2
      = \nabla \nabla_y g(x, y) \, \nabla_y g(x, y)

  It costs one Hessian-vector product and needs no inner loop. The penalty also
  vanishes at lower stationary points that are not minimisers, and the penalised
  loss can have stationary points that do not solve the problem. Prefer
  `value_gap` if the lower loss is not convex.

  Args:
    problem: the upper and the lower loss.
    penalty: None for two rows; a weight or a schedule for the fused form, as in
      `value_gap`.
    rescale: for the fused form, as in `scale_by_penalty`.

  Returns:
    An oracle for parameters with the sequences `upper` and `lower`. It measures
    `upper`, `lower` and `penalty`, half the squared norm.

  Raises:
    ValueError: if the penalty is negative.
    TypeError: at the call, if a loss is not a scalar or a sequence is missing.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2, lower=lambda x, y, batch: (x - y) ** 2
    ... )
    >>> params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(3.0))
    >>> link = bj.gradient_norm(problem)
    >>> jacobian, _ = link.update(None, link.init(params), params)
    >>> print(jacobian.rows.upper, jacobian.rows.lower)
    [ 0. -8.] [6. 8.]

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  _, lower = base.checked_losses(problem)

  # Reverse over reverse. Forward over reverse takes as many operations; it was
  # not faster on a network and slower on a linear model.
  def half_squared_slope(x, y, params, batch, known):
    del params
    (below, outputs), (slope,) = lower.with_slopes(1)(x, y, batch)
    half = optax.tree.norm(slope, squared=True) / 2
    if known is not None:
      # The mean of this over the parts has the value and the gradient of the
      # whole batch.
      square = optax.tree.norm(known, squared=True)
      half = optax.tree.vdot(known, slope) - square / 2
    return half, (below, outputs)

  def mean_slope(mean, params, batch):
    slope = lambda part, x, y: jax.grad(lower, 1)(x, y, part)
    return mean.of(slope, batch, params.upper, params.lower)

  height = _penalised.Penalty(
    half_squared_slope,
    ('penalty',),
    {
      'gradients/upper': 1,
      'gradients/lower': 1,
      'hessian_vector_products/lower': 1,
    },
    ('upper', 'lower'),
    mean_slope,
  )
  return _penalised.penalised(problem, height, penalty=penalty, rescale=rescale)
