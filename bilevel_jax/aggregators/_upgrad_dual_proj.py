"""Projection on the directions that descend every objective."""

from collections.abc import Callable, Sequence

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


def _exact_projections(
  factor: _rows.Factor, pulls: chex.Array, ridge: float
) -> tuple[chex.Array, chex.Array]:
  r"""As `_projections`, from the rows' factor; also the directions, (n, rows).

  With :math:`U = L Q`, the rows of length one, a direction that conflicts with
  none of them is :math:`L^{-1} b` for :math:`b \ge 0`. Of its terms none cancel
  where only short directions conflict with none.
  """
  columns = _quadratic.full_rank(factor.lower, ridge**0.5)
  basis, upper = jnp.linalg.qr(columns)
  inverse = jax.scipy.linalg.solve_triangular(
    upper, jnp.eye(len(upper), dtype=upper.dtype)
  )

  def project(pull):
    image = _quadratic.nonnegative_factored(inverse.T, pull).image
    return basis[: len(upper)] @ image, inverse @ image

  return jax.vmap(project)(pulls)


def _by_projections(
  name: str,
  objectives: int,
  parts: Callable[[chex.Array], tuple[chex.Array, chex.Array]],
  ridge: float,
) -> optax.GradientTransformationExtraArgs:
  """Sums projections.

  Args:
    name: of the aggregator, for errors.
    objectives: the number of rows.
    parts: from the lengths of the rows to weights, of rows of length one, that
      give what is projected, (n, rows), and to how much each counts, (n,), in
      units of the longest row.
    ridge: as in `upgrad`.
  """

  def choose(found):
    pulls, counts = parts(found.lengths)
    total = counts @ _projections(found, pulls, ridge)
    return _rows.of_unit_rows(found, total, jnp.max(found.lengths))

  def choose_exactly(factor):
    longest = jnp.max(factor.lengths)
    pulls, counts = parts(factor.lengths)
    directions, weights = _exact_projections(factor, pulls, ridge)
    weights = _rows.of_unit_rows(factor, counts @ weights, longest)
    return longest * (counts @ directions), weights

  return _by_weights.by_gramian_or_factor(
    name, objectives, choose, choose_exactly
  )


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
      with a gradient by that share of the gradient's part in it. Rows that are
      almost linearly dependent are factored by QR, so that in float32 rounding
      adds a few spacings of floats. From a `Gramian`, which has only products,
      the rounding of the cosines adds to the ridge.

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
  shares = _checks.preferences('upgrad', objectives, preference)

  def parts(lengths):
    each = jnp.eye(objectives, dtype=lengths.dtype)
    share = _trees.ratio(lengths, jnp.max(lengths))
    return each, jnp.asarray(shares, lengths.dtype) * share

  return _by_projections('upgrad', objectives, parts, ridge)


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
  shares = _checks.preferences('dual_proj', objectives, preference)

  def parts(lengths):
    share = _trees.ratio(lengths, jnp.max(lengths))
    total = jnp.asarray(shares, share.dtype) * share
    return total[None], jnp.ones_like(total[:1])

  return _by_projections('dual_proj', objectives, parts, ridge)
