"""Fair weights: the larger, the smaller an objective's progress is."""

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows

_STEPS = 200


def _fair(factor: _rows.Factor, alpha: float) -> tuple[chex.Array, chex.Array]:
  r"""Solves :math:`G w = w^{-1/\alpha}`; the direction and the weights.

  The weights :math:`p` of rows of length one solve :math:`L L^\top p = c \,
  p^{-1/\alpha}` with the rows' factor :math:`L` and a power :math:`c` of the
  lengths, the optimality condition of a convex program. Newton's method follows
  the solution from :math:`c = 1`, by at most a factor of :math:`e` in a step.
  Not a number if it does not arrive, or if a weight leaves the range of floats.
  """
  lengths, lower = factor.lengths, factor.lower
  size, power = lengths.shape[0], 1 / alpha
  info, there = jnp.finfo(lengths.dtype), lengths > 0
  # A row that is zero would ask for an infinite weight, and so would rows that
  # cancel: a diagonal keeps both finite. Its root is the rounding of L.
  root = jnp.where(there, 4 * size * info.eps, 1)
  target = (power - 1) * jnp.log(jnp.where(there, lengths, 1))
  most = jnp.max(target)
  least = jnp.min(target) - most

  def going(carry):
    _, change, count = carry
    return ((change > info.eps**0.5) | (1 - count > least)) & (count < _STEPS)

  def newton(carry):
    pulls, _, count = carry
    pressure = jnp.exp(jnp.maximum(target - most, -count)) * pulls**-power
    left = pressure - lower @ (lower.T @ pulls) - root**2 * pulls
    # The curvature is a sum of squares; its root keeps small angles.
    curve = jnp.diag(jnp.sqrt(root**2 + power * pressure / pulls))
    upper = jnp.linalg.qr(jnp.concatenate([lower.T, curve]), mode='r')
    solve = jax.scipy.linalg.solve_triangular
    move = solve(upper, solve(upper, left, trans=1))
    change = jnp.max(jnp.abs(move / pulls))
    # Damped, so that all stay positive; full steps close to the end.
    return pulls + move / jnp.maximum(1, 1.2 * change), change, count + 1

  start = (jnp.ones_like(target), jnp.ones_like(most), 0)
  data = (lengths, lower)
  pulls, change, count = _quadratic.loop(going, newton, start, data)
  # Both sides of the equation give the direction, L' p. Where large weights
  # cancel, the left one is their rounding; the right one is divided by small
  # angles. The one of the smaller bound on its rounding counts.
  inverse, regular = _quadratic.triangular_inverse(lower)
  pressure = jnp.exp(target - most) * pulls**-power - root**2 * pulls
  pulls_there, size_of = jnp.where(there, pulls, 0), jnp.linalg.norm
  right = size_of(inverse) * size_of(pressure) < size_of(pulls_there)
  direction = jnp.where(
    regular & right, inverse @ pressure, lower.T @ pulls_there
  )
  unit = jnp.exp(most / (1 + power))
  direction, pulls = direction * unit, pulls * unit
  weights = _rows.of_unit_rows(factor, pulls)
  fine = (change < 0.1) & (1 - count <= least)
  held = (weights >= info.tiny) & (weights <= info.max)
  fine = fine & jnp.all(held | ~there)
  return jnp.where(fine, direction, jnp.nan), jnp.where(fine, weights, jnp.nan)


def nash_mtl(
  objectives: int,
  *,
  max_norm: float | None = None,
  normalise: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Nash-MTL: the direction on which the objectives agree when they bargain.

  .. math::
    d = J^\top w, \qquad J J^\top w = \frac{1}{w}, \quad w > 0

  The direction has the norm :math:`\sqrt{M}` however short the gradients are:
  let the step size decay, or normalise. A gradient that vanishes is left out.

  Args:
    objectives: the number of rows.
    max_norm: the direction is scaled down to this norm, in units of the
      gradients; None leaves it as it is.
    normalise: whether the Gram matrix is divided by its norm in the equation
      for the weights, so that the direction scales as the gradients do.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
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
  r"""FairGrad: the direction of greatest alpha-fair utility of all progress.

  .. math::
    d = J^\top w, \qquad J J^\top w = w^{-1/\alpha}, \quad w > 0

  The progress of objective :math:`m` along :math:`d` is :math:`w_m^{-1/\alpha}`
  and counts by :math:`\sum_m (\nabla f_m^\top d)^{1 - \alpha} / (1 - \alpha)`:
  the larger :math:`\alpha`, the more the least progress counts.

  Args:
    objectives: the number of rows.
    alpha: :math:`\alpha > 0`; 1 gives `nash_mtl`.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient. A
    gradient that vanishes is left out. The direction is not a number where the
    weights leave the range of floats: for the default in float32, with a
    gradient shorter than 1e-28 or longer than 1e28.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
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
