"""Projection on the directions that descend every objective."""

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax.aggregators import _quadratic, _weighted


def _project(
  gramian: chex.Array, weights: chex.Array, ridge: float
) -> chex.Array:
  """Weights of the projection of a weighted gradient on the dual cone."""
  # Rows of length one: the ridge is then a share of each row's own squared
  # norm, and a short gradient is protected as well as a long one.
  length = jnp.sqrt(jnp.diagonal(gramian))
  length = jnp.where(length > 0, length, 1)
  unit = gramian / (length[:, None] * length[None, :])
  unit = unit + ridge * jnp.eye(gramian.shape[0], dtype=gramian.dtype)
  weights = weights * length
  scale = jnp.max(weights)
  weights = weights / jnp.where(scale > 0, scale, 1)
  # Least length among weights of at least the given ones.
  found = weights + _quadratic.nonnegative_qp(unit, -unit @ weights)
  return found * scale / length


def upgrad(
  objectives: int, *, ridge: float = 1e-6
) -> optax.GradientTransformationExtraArgs:
  r"""UPGrad: the mean of the gradients, each projected to conflict with none.

  .. math::
    d = \frac{1}{M} \sum_m \Pi(\nabla f_m), \qquad
    \Pi \text{ projects on } \{ d : \nabla f_i^\top d \ge 0 \; \forall i \}

  Args:
    objectives: the number of rows.
    ridge: added to the diagonal of the Gram matrix of gradients of length one;
      it keeps the quadratic programs well posed, and :math:`d` may conflict
      with a gradient by that share of the gradient's part in it.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows, or the ridge is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.upgrad(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0].round(2))
    [0.25 0.75]

  References:
    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024.
  """
  _weighted.require_positive('upgrad', zero=True, ridge=ridge)

  def choose(seen):
    gramian = seen.gramian()
    each = jnp.eye(objectives, dtype=gramian.dtype) / objectives
    projected = jax.vmap(lambda w: _project(gramian, w, ridge))(each)
    return jnp.sum(projected, axis=0), ()

  return _weighted.by_weights('upgrad', objectives, choose)


def dual_proj(
  objectives: int, *, ridge: float = 1e-6
) -> optax.GradientTransformationExtraArgs:
  r"""DualProj: the mean gradient, projected to conflict with no objective.

  .. math::
    d = \Pi \left( \frac{1}{M} \sum_m \nabla f_m \right), \qquad
    \Pi \text{ projects on } \{ d : \nabla f_i^\top d \ge 0 \; \forall i \}

  Args:
    objectives: the number of rows.
    ridge: as in `upgrad`.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows, or the ridge is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.dual_proj(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, 0.0], [-3.0, 1.0]]))
    >>> print(jnp.abs(link.update(jacobian, link.init(params))[0]).round(3))
    [0.   0.5]

  References:
    Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
    <https://arxiv.org/abs/1706.08840>`_, 2017.
  """
  _weighted.require_positive('dual_proj', zero=True, ridge=ridge)

  def choose(seen):
    gramian = seen.gramian()
    equal = jnp.full([objectives], 1 / objectives, gramian.dtype)
    return _project(gramian, equal, ridge), ()

  return _weighted.by_weights('dual_proj', objectives, choose)
