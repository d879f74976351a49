"""Balanced progress: equal projections, a bargain, aligned components."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.aggregators import _quadratic, _weighted


def imtl_g(objectives: int) -> optax.GradientTransformationExtraArgs:
  r"""IMTL-G: the combination with equal projections on all unit gradients.

  .. math::
    d = J^\top w, \quad \sum_m w_m = 1, \qquad
    \frac{\nabla f_m^\top d}{\|\nabla f_m\|} \text{ equal for all } m

  Weights may be negative.

  Args:
    objectives: the number of rows.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.imtl_g(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[4.0, 0.0], [0.0, 1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0].round(3))
    [0.8 0.8]

  References:
    Liu, Li, Kuang, Xue, Chen, Yang, Liao and Zhang, Towards Impartial
    Multi-task Learning, 2021.
  """

  def choose(seen):
    gramian = _quadratic.normalised(seen.gramian())
    norms = jnp.sqrt(jnp.diagonal(gramian))
    found = jnp.linalg.pinv(gramian, hermitian=True) @ norms
    total = jnp.sum(found)
    fine = jnp.abs(total) > 1e-12
    return jnp.where(fine, found / jnp.where(fine, total, 1), 0), ()

  return _weighted.by_weights('imtl_g', objectives, choose)


def nash_mtl(
  objectives: int,
  *,
  max_norm: float | None = None,
  normalise: bool = False,
  iterations: int = 40,
) -> optax.GradientTransformationExtraArgs:
  r"""Nash-MTL: the direction on which the objectives agree when they bargain.

  .. math::
    d = J^\top w, \qquad J J^\top w = \frac{1}{w}, \quad w > 0

  The weights are the minimiser of
  :math:`\tfrac{1}{2} w^\top J J^\top w - \sum_m \log w_m`, found by Newton's
  method with the damping for which it always converges. The direction has the
  norm :math:`\sqrt{M}` however short the gradients are: let the step size
  decay, or normalise.

  Args:
    objectives: the number of rows.
    max_norm: the direction is scaled down to this norm, in units of the
      gradients; None leaves it as it is.
    normalise: whether the Gram matrix is divided by its norm in the equation
      for the weights, so that the direction scales as the gradients do.
    iterations: Newton steps, at most.

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
    _weighted.require_positive('nash_mtl', max_norm=max_norm)

  def choose(seen):
    raw = seen.gramian()
    norm = jnp.linalg.norm(raw)
    zero = norm <= 0
    size, dtype = raw.shape[0], raw.dtype
    unit = raw / jnp.where(zero, 1, norm)
    # A row that is zero would ask for an infinite weight.
    unit = unit + 16 * size * jnp.finfo(dtype).eps * jnp.eye(size, dtype=dtype)

    def newton(_, weights):
      slope = unit @ weights - 1 / weights
      curve = unit + jnp.diag(1 / weights**2)
      factor = jax.scipy.linalg.cho_factor(curve, lower=True)
      move = -jax.scipy.linalg.cho_solve(factor, slope)
      decrement = jnp.sqrt(jnp.maximum(-slope @ move, 0))
      # Full steps close to the end, damped ones before: both stay positive.
      step = jnp.where(decrement < 0.25, 1, 1 / (1 + decrement))
      return weights + step * move

    start = 1 / jnp.sqrt(size * jnp.diagonal(unit))
    weights = jax.lax.fori_loop(0, iterations, newton, start)
    if not normalise:
      weights = weights / jnp.sqrt(jnp.where(zero, 1, norm))
    if max_norm is not None:
      length = jnp.sqrt(jnp.maximum(weights @ raw @ weights, 0))
      limit = jnp.asarray(max_norm, dtype)
      weights = weights * jnp.minimum(
        1, limit / jnp.where(length > 0, length, limit)
      )
    return jnp.where(zero, 0, weights), ()

  return _weighted.by_weights('nash_mtl', objectives, choose)


def aligned_mtl(objectives: int) -> optax.GradientTransformationExtraArgs:
  r"""Aligned-MTL: rescales the principal components of the gradients alike.

  With :math:`J J^\top = V \Lambda V^\top` and its least nonzero eigenvalue
  :math:`\lambda_r`,

  .. math::
    d = J^\top w, \qquad
    w = \sqrt{\lambda_r} \, V \Lambda^{-1/2} V^\top \frac{1}{M} \mathbf{1}

  Args:
    objectives: the number of rows.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.aligned_mtl(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[4.0, 0.0], [0.0, 1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0].round(3))
    [0.5 0.5]

  References:
    Senushkin, Patakin, Kuznetsov and Konushin, `Independent Component Alignment
    for Multi-Task Learning <https://arxiv.org/abs/2305.19000>`_, 2023.
  """

  def choose(seen):
    gramian = _quadratic.normalised(seen.gramian())
    size = gramian.shape[0]
    values, vectors = jnp.linalg.eigh(gramian)
    tolerance = jnp.max(values) * size * jnp.finfo(gramian.dtype).eps
    present = values > tolerance
    least = jnp.min(jnp.where(present, values, jnp.inf))
    scale = jnp.sqrt(least / jnp.where(present, values, 1))
    scale = jnp.where(present & jnp.isfinite(least), scale, 0)
    return vectors @ (scale * jnp.sum(vectors, axis=0)) / size, ()

  return _weighted.by_weights('aligned_mtl', objectives, choose)
