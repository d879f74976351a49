"""PCD: descent on the first objective with minimal progress of the others."""

import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees, types
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows


def pcd(
  objectives: int,
  *,
  progress: types.ScalarOrSchedule = 0.02,
  decay: float = 0.999,
) -> optax.GradientTransformationExtraArgs:
  r"""PCD: turns the first gradient until the others make minimal progress.

  With gradients of about unit length, :math:`q_m = \nabla f_m / \sqrt{v_m +
  10^{-8}}`, where :math:`v` is a running mean of their squared lengths,

  .. math::
    d \propto \arg\min_d \| d - q_1 \|^2 \quad \text{where} \quad
    q_m^\top d \ge \tau \| q_m \|^2, \quad m = 2, \dots, M

  with the length of :math:`\nabla f_1`. If no direction makes progress on all
  other objectives, :math:`d = \nabla f_1`.

  Args:
    objectives: the number of rows :math:`M`; the first has priority.
    progress: :math:`\tau` in [0, 1], a constant or a schedule.
    decay: decay of the running mean, in [0, 1]. The mean starts at zero, which
      scales all objectives alike.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows, or a number is out of
      range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link, params = bj.aggregators.pcd(2, progress=0.0), jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, 0.0], [-5.0, 5.0]]))
    >>> direction, _ = link.update(jacobian, link.init(params), params)
    >>> print(direction.round(2))  # At a right angle to the second gradient.
    [0.71 0.71]

  References:
    Varam and AlHajri, `Not All Objectives Are Born Equal: Priority-Constrained
    Descent for Hierarchical Multi-Objective Optimization
    <https://arxiv.org/abs/2606.29521>`_, 2026.
  """
  _checks.within('pcd', 'progress', progress, 0, 1)
  _checks.within('pcd', 'decay', decay, 0, 1)

  def choose(gramian, state):
    lengths, cosines = gramian.lengths, gramian.cosines
    # Stores the root of the running mean, whose squares may overflow.
    old, new = jnp.sqrt(decay), jnp.sqrt(1 - decay)
    root = jnp.hypot(old * state.inner, new * lengths)
    sizes = lengths / jnp.hypot(root, 1e-4)
    # In units of the first gradient, with multipliers of unit rows.
    tau = _by_weights.current(progress, state)
    bounds = tau * sizes - cosines[0] * sizes[0]
    others = jnp.arange(objectives) > 0
    matrix = jnp.where(others[:, None] & others, cosines, 0)
    scale = jnp.max(jnp.abs(bounds))
    bounds = jnp.where(others, _trees.ratio(bounds, scale), 0)
    push = _quadratic.nonnegative_qp(matrix, bounds)
    # Unbounded multipliers mean that no direction satisfies all bounds.
    tolerance = jnp.sqrt(jnp.finfo(lengths.dtype).eps)
    feasible = jnp.all(matrix @ push >= bounds - tolerance)
    unit_weights = jnp.where(feasible, scale * push, 0).at[0].set(sizes[0])
    size = jnp.sqrt(jnp.maximum(unit_weights @ cosines @ unit_weights, 0))
    unit_weights = _trees.ratio(unit_weights, size)
    return _rows.row_weights(gramian, unit_weights, lengths[0]), root

  start = lambda params, dtype: jnp.zeros([objectives], dtype)
  return _by_weights.by_gramian('pcd', objectives, choose, start)
