"""Nash-MTL and FairGrad: larger weights for objectives with less progress."""

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows

_MAX_STEPS = 200


def _fair(factor: _rows.Factor, alpha: float) -> tuple[chex.Array, chex.Array]:
  r"""Solves :math:`G w = w^{-1/\alpha}` for the direction and the weights.

  The weights :math:`p` of unit rows solve :math:`L L^\top p = c \,
  p^{-1/\alpha}` with the rows' factor :math:`L` and a power :math:`c` of the
  lengths, the optimality condition of a convex program. Newton's method follows
  the solution from :math:`c = 1`, by at most a factor of :math:`e` per step.
  The result is NaN if it does not converge, or if a weight leaves the range of
  floats.
  """
  lengths, lower = factor.lengths, factor.lower
  size, power = lengths.shape[0], 1 / alpha
  info, nonzero = jnp.finfo(lengths.dtype), lengths > 0
  # A diagonal keeps the weights of zero rows and of cancelling rows finite. Its
  # root is the rounding of L.
  root = jnp.where(nonzero, 4 * size * info.eps, 1)
  target = (power - 1) * jnp.log(jnp.where(nonzero, lengths, 1))
  largest = jnp.max(target)
  last = jnp.min(target) - largest

  def condition(carry):
    _, change, count = carry
    moving = (change > info.eps**0.5) | (1 - count > last)
    return moving & (count < _MAX_STEPS)

  def newton(carry):
    unit_weights, _, count = carry
    scale = jnp.exp(jnp.maximum(target - largest, -count))
    pressure = scale * unit_weights**-power
    product = lower @ (lower.T @ unit_weights)
    residual = pressure - product - root**2 * unit_weights
    # The curvature is a sum of squares; its root resolves small angles.
    curve = jnp.diag(jnp.sqrt(root**2 + power * pressure / unit_weights))
    upper = jnp.linalg.qr(jnp.concatenate([lower.T, curve]), mode='r')
    solve = jax.scipy.linalg.solve_triangular
    move = solve(upper, solve(upper, residual, trans=1))
    change = jnp.max(jnp.abs(move / unit_weights))
    # Damped so that all stay positive, with full steps near the solution.
    damped = move / jnp.maximum(1, 1.2 * change)
    return unit_weights + damped, change, count + 1

  start = (jnp.ones_like(target), jnp.ones_like(largest), 0)
  data = (lengths, lower)
  unit_weights, change, count = _quadratic.loop(condition, newton, start, data)
  # Both sides of the equation give the direction, L' p. The left side loses
  # digits if large weights cancel, the right side at small angles. The side
  # with the smaller bound on its rounding is used.
  inverse, regular = _quadratic.triangular_inverse(lower)
  pressure = jnp.exp(target - largest) * unit_weights**-power
  pressure = pressure - root**2 * unit_weights
  present, norm = jnp.where(nonzero, unit_weights, 0), jnp.linalg.norm
  right = norm(inverse) * norm(pressure) < norm(present)
  direction = jnp.where(regular & right, inverse @ pressure, lower.T @ present)
  unit = jnp.exp(largest / (1 + power))
  direction, unit_weights = direction * unit, unit_weights * unit
  weights = _rows.row_weights(factor, unit_weights)
  converged = (change < 0.1) & (1 - count <= last)
  in_bounds = (weights >= info.tiny) & (weights <= info.max)
  valid = converged & jnp.all(in_bounds | ~nonzero)
  return (
    jnp.where(valid, direction, jnp.nan),
    jnp.where(valid, weights, jnp.nan),
  )


def nash_mtl(
  objectives: int,
  *,
  max_norm: float | None = None,
  normalise: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Nash-MTL: the Nash bargaining solution for the objectives' progress.

  .. math::
    d = J^\top w, \qquad J J^\top w = \frac{1}{w}, \quad w > 0

  The direction has the norm :math:`\sqrt{M}` for gradients of any length: let
  the step size decay, or normalise. A zero gradient is left out.

  Args:
    objectives: the number of rows.
    max_norm: the direction is scaled down to this norm, in units of the
      gradients; None for no limit.
    normalise: whether the equation for the weights uses the Gram matrix divided
      by its norm, so that the direction scales with the gradients.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows, or `max_norm` is not above
      zero.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.nash_mtl(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[4.0, 0.0], [0.0, 1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0].round(2))
    [1. 1.]

  References:
    Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik and Fetaya,
    `Multi-Task Learning as a Bargaining Game
    <https://arxiv.org/abs/2202.01017>`_, 2022.
  """
  if max_norm is not None:
    _checks.within('nash_mtl', 'max_norm', max_norm, 0, open_low=True)

  def choose(factor):
    direction, weights = _fair(factor, 1.0)
    scale = jnp.ones_like(direction[0])
    if normalise:
      longest = jnp.max(factor.lengths)
      share = (factor.lengths / longest)[:, None] * factor.lower
      scale = longest * jnp.sqrt(jnp.linalg.norm(share @ share.T))
    if max_norm is not None:
      length = scale * jnp.linalg.norm(direction)
      scale = scale * max_norm / jnp.maximum(length, max_norm)
    return scale * direction, scale * weights

  return _by_weights.by_factor('nash_mtl', objectives, choose)


def fair_grad(
  objectives: int, *, alpha: float = 2.0
) -> optax.GradientTransformationExtraArgs:
  r"""FairGrad: the direction of greatest alpha-fair utility of the progress.

  .. math::
    d = J^\top w, \qquad J J^\top w = w^{-1/\alpha}, \quad w > 0

  The progress of objective :math:`m` along :math:`d` is
  :math:`w_m^{-1/\alpha}`. The utility is
  :math:`\sum_m (\nabla f_m^\top d)^{1 - \alpha} / (1 - \alpha)`: a larger
  :math:`\alpha` gives more weight to the smallest progress.

  Args:
    objectives: the number of rows.
    alpha: :math:`\alpha > 0`; 1 gives `nash_mtl`.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient. A zero
    gradient is left out. The direction is NaN if the weights leave the range of
    floats: for the default in float32, with a gradient shorter than 1e-28 or
    longer than 1e28.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows, or alpha is not above zero.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.fair_grad(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[8.0, 0.0], [0.0, 1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0].round(2))
    [0.5 1. ]

  References:
    Ban and Ji, `Fair Resource Allocation in Multi-Task Learning
    <https://arxiv.org/abs/2402.15638>`_, 2024.
  """
  _checks.within('fair_grad', 'alpha', alpha, 0, open_low=True)
  choose = lambda factor: _fair(factor, alpha)
  return _by_weights.by_factor('fair_grad', objectives, choose)
