"""Projection on the directions that descend every objective."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees, types
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows


def _projections(
  found: types.Gramian, pulls: chex.Array, ridge: float
) -> chex.Array:
  """Projects on the dual cone; weights of rows of length one, (n, rows)."""
  # A share of each row's own squared length, because all have length one: a
  # short gradient is protected as well as a long one.
  unit = found.cosines + ridge * jnp.eye(pulls.shape[1], dtype=pulls.dtype)
  # Least length among weights of at least the given ones.
  lift = lambda pull: pull + _quadratic.nonnegative_qp(unit, -unit @ pull)
  return jax.vmap(lift)(pulls)


def upgrad(
  objectives: int,
  *,
  preference: Sequence[float] | chex.Array | None = None,
  ridge: float = 1e-6,
) -> optax.GradientTransformationExtraArgs:
  r"""UPGrad: a sum of the gradients, each projected to conflict with none.

  .. math::
    d = \sum_m p_m \Pi(\nabla f_m), \qquad
    \Pi \text{ projects on } \{ d : \nabla f_i^\top d \ge 0 \; \forall i \}

  Args:
    objectives: the number of rows :math:`M`.
    preference: :math:`p \ge 0`, (objectives,); by default :math:`1 / M` each.
      Objectives of preference zero are still not conflicted with.
    ridge: added to the diagonal of the Gram matrix of gradients of length one;
      it keeps the quadratic programs well posed, and :math:`d` may conflict
      with a gradient by that share of the gradient's part in it. In float32,
      the rounding of the cosines adds to it where three or more rows nearly
      cancel.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows, or if the ridge or a
      preference is negative.

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
  _checks.within('upgrad', 'ridge', ridge, 0)
  given = _by_weights.preferences('upgrad', objectives, preference)

  def choose(found, inner):
    lengths = found.lengths
    longest = jnp.max(lengths)
    each = jnp.eye(objectives, dtype=lengths.dtype)
    parts = jnp.asarray(given, lengths.dtype) * _trees.ratio(lengths, longest)
    pulls = parts @ _projections(found, each, ridge)
    return _rows.of_unit_rows(found, pulls, longest), inner

  return _by_weights.by_gramian('upgrad', objectives, choose)


def dual_proj(
  objectives: int,
  *,
  preference: Sequence[float] | chex.Array | None = None,
  ridge: float = 1e-6,
) -> optax.GradientTransformationExtraArgs:
  r"""DualProj: a sum of the gradients, projected to conflict with no objective.

  .. math::
    d = \Pi \left( \sum_m p_m \nabla f_m \right), \qquad
    \Pi \text{ projects on } \{ d : \nabla f_i^\top d \ge 0 \; \forall i \}

  Args:
    objectives: the number of rows :math:`M`.
    preference: :math:`p \ge 0`, (objectives,); by default :math:`1 / M` each.
    ridge: as in `upgrad`.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows, or if the ridge or a
      preference is negative.

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
  _checks.within('dual_proj', 'ridge', ridge, 0)
  given = _by_weights.preferences('dual_proj', objectives, preference)

  def choose(found, inner):
    longest = jnp.max(found.lengths)
    share = _trees.ratio(found.lengths, longest)
    total = jnp.asarray(given, share.dtype) * share
    pulls = _projections(found, total[None], ridge)[0]
    return _rows.of_unit_rows(found, pulls, longest), inner

  return _by_weights.by_gramian('dual_proj', objectives, choose)
