"""Fair weights: the larger, the smaller an objective's progress is."""

import chex
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, types
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows

_STEPS = 200


def _fair(found: types.Gramian, alpha: float) -> chex.Array:
  r"""Solves :math:`G w = w^{-1/\alpha}`.

  The weights :math:`p` of rows of length one solve :math:`C p = c \,
  p^{-1/\alpha}` with cosines :math:`C` and a power :math:`c` of the lengths,
  the optimality condition of a convex program. Newton's method follows the
  solution from :math:`c = 1`, by at most a factor of :math:`e` in a step. Not a
  number if it does not arrive, or if a weight leaves the range of floats.
  """
  size, power = found.lengths.shape[0], 1 / alpha
  info, there = jnp.finfo(found.lengths.dtype), found.lengths > 0
  # A row that is zero would ask for an infinite weight, and so would rows that
  # cancel: the diagonal keeps both finite.
  cosines = found.cosines + jnp.diag(jnp.where(there, 16 * size * info.eps, 1))
  target = (power - 1) * jnp.log(jnp.where(there, found.lengths, 1))
  most = jnp.max(target)
  least = jnp.min(target) - most

  def going(carry):
    _, change, count = carry
    return ((change > info.eps**0.5) | (1 - count > least)) & (count < _STEPS)

  def newton(carry):
    pulls, _, count = carry
    pressure = jnp.exp(jnp.maximum(target - most, -count)) * pulls**-power
    curve = cosines + jnp.diag(power * pressure / pulls)
    move = _quadratic.solve(curve, pressure - cosines @ pulls)
    change = jnp.max(jnp.abs(move / pulls))
    # Damped, so that all stay positive; full steps close to the end.
    return pulls + move / jnp.maximum(1, 1.2 * change), change, count + 1

  start = (jnp.ones_like(target), jnp.ones_like(most), 0)
  pulls, change, count = _quadratic.loop(going, newton, start, found[:2])
  pulls = pulls * jnp.exp(most / (1 + power))
  weights = _rows.of_unit_rows(found, pulls)
  fine = (change < 0.1) & (1 - count <= least)
  held = (weights >= info.tiny) & (weights <= info.max)
  fine = fine & jnp.all(held | ~there)
  return jnp.where(fine, weights, jnp.nan)


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

  def choose(found, inner):
    weights = _fair(found, 1.0)
    if normalise:
      longest = jnp.max(found.lengths)
      share = found.lengths / longest
      size = jnp.linalg.norm(share[:, None] * found.cosines * share)
      weights = weights * longest * jnp.sqrt(size)
    if max_norm is not None:
      length = _rows.norm(found, weights)
      weights = weights * max_norm / jnp.maximum(length, max_norm)
    return weights, inner

  return _by_weights.by_gramian('nash_mtl', objectives, choose)


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
  choose = lambda found, inner: (_fair(found, alpha), inner)
  return _by_weights.by_gramian('fair_grad', objectives, choose)
