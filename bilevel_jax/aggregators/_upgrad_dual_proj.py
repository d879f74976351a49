"""UPGrad and DualProj: projections onto the dual cone of the gradients."""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees, types
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows


def _projections(
  gram: types.Gramian, unit_weights: chex.Array, ridge: float
) -> chex.Array:
  """Projects onto the dual cone; both are weights of unit rows, (n, rows)."""
  # The ridge is relative to each row's squared length, so that short gradients
  # are protected like long ones.
  eye = jnp.eye(unit_weights.shape[1], dtype=unit_weights.dtype)
  matrix = gram.cosines + ridge * eye
  # The shortest vector whose weights are at least `w`.
  project = lambda w: w + _quadratic.nonnegative_qp(matrix, -matrix @ w)
  return jax.vmap(project)(unit_weights)


def _exact_projections(
  factor: _rows.Factor, unit_weights: chex.Array, ridge: float
) -> tuple[chex.Array, chex.Array]:
  r"""As `_projections`, from the rows' factor; also the directions, (n, rows).

  With the unit rows :math:`U = L Q`, a direction without conflicts is
  :math:`L^{-1} b` with :math:`b \ge 0`. Its terms do not cancel even if all
  such directions are short.
  """
  columns = _quadratic.full_rank(factor.lower, ridge**0.5)
  basis, upper = jnp.linalg.qr(columns)
  inverse = jax.scipy.linalg.solve_triangular(
    upper, jnp.eye(len(upper), dtype=upper.dtype)
  )

  def project(weights):
    image = _quadratic.nonnegative_factored(inverse.T, weights).image
    return basis[: len(upper)] @ image, inverse @ image

  return jax.vmap(project)(unit_weights)


def _by_projections(
  name: str,
  objectives: int,
  parts: Callable[[chex.Array], tuple[chex.Array, chex.Array]],
  ridge: float,
) -> optax.GradientTransformationExtraArgs:
  """Makes an aggregator that adds projections by weights.

  Args:
    name: the aggregator's name, for errors.
    objectives: the number of rows.
    parts: maps the lengths of the rows to the vectors to project, as weights of
      unit rows (n, rows), and to the weight of each projection, (n,), in units
      of the longest row.
    ridge: as in `upgrad`.
  """

  def choose(gram):
    unit_weights, counts = parts(gram.lengths)
    total = counts @ _projections(gram, unit_weights, ridge)
    return _rows.row_weights(gram, total, jnp.max(gram.lengths))

  def choose_exactly(factor):
    longest = jnp.max(factor.lengths)
    unit_weights, counts = parts(factor.lengths)
    directions, weights = _exact_projections(factor, unit_weights, ridge)
    weights = _rows.row_weights(factor, counts @ weights, longest)
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
  r"""UPGrad: adds the gradients, each projected to conflict with none.

  .. math::
    d = \sum_m p_m \Pi(\nabla f_m), \qquad
    \Pi \text{ projects onto } \{ d : \nabla f_i^\top d \ge 0 \; \forall i \}

  Args:
    objectives: the number of rows :math:`M`.
    preference: :math:`p \ge 0`, (objectives,); by default :math:`1 / M` each.
      The direction does not conflict with objectives of preference zero either.
    ridge: added to the diagonal of the Gram matrix of unit gradients to keep
      the quadratic programs well posed. The direction may conflict with a
      gradient by this fraction of the gradient's part in it. Almost dependent
      rows are factored by QR, so that rounding adds only a few float spacings.
      With a `Gramian`, the rounding of its cosines adds to the ridge.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
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
  r"""DualProj: projects the sum of the gradients to conflict with none.

  .. math::
    d = \Pi \left( \sum_m p_m \nabla f_m \right), \qquad
    \Pi \text{ projects onto } \{ d : \nabla f_i^\top d \ge 0 \; \forall i \}

  Args:
    objectives: the number of rows :math:`M`.
    preference: :math:`p \ge 0`, (objectives,); by default :math:`1 / M` each.
    ridge: as in `upgrad`.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
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
