"""MGDA under the constraint that a penalty decreases at a given rate."""

from collections.abc import Sequence

import chex
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees, types
from bilevel_jax.aggregators import _by_weights, _quadratic


def _objective_weights(gramian: types.Gramian, rate: chex.Array) -> chex.Array:
  r"""Weights of the objectives, where the last row is the penalty.

  .. math::
    \min_{\lambda \in \Delta, \; s \ge \max(0, \lambda^\top \pi)}
      \| \lambda^\top F + s q \|^2 - s \rho \| q \|^2

  Uses unit rows in units of the shortest objective, so that short rows keep
  their digits. Ratios are clipped to one over the float spacing.
  """
  lengths, penalty = gramian.lengths[:-1], gramian.lengths[-1]
  info = jnp.finfo(penalty.dtype)
  unit = jnp.minimum(
    jnp.min(jnp.where(lengths > 0, lengths, jnp.inf)), info.max
  )
  counts = jnp.where(lengths > 0, _trees.ratio(unit, lengths), 1)
  fall = jnp.minimum(rate * jnp.minimum(penalty / unit, info.max), 1 / info.eps)
  slack = counts * fall - gramian.cosines[-1, :-1]  # Each row's part of s.
  # The variables: the objectives' weights, s, and the excess of s over its
  # lower bound.
  size = len(counts)
  matrix = jnp.zeros((size + 2, size + 2), counts.dtype)
  matrix = matrix.at[:-1, :-1].set(gramian.cosines)
  linear = jnp.zeros(size + 2, counts.dtype).at[size].set(fall / 2)
  above = jnp.concatenate([-slack, jnp.array([1, -1], counts.dtype)])
  scale = jnp.max(jnp.abs(above))
  sums = jnp.concatenate(
    [jnp.maximum(counts, info.eps), jnp.zeros(2, counts.dtype)]
  )
  # Starts with all weight on the shortest row.
  shortest = jnp.argmax(counts)
  bound = slack[shortest]
  first = jnp.zeros(size + 2, counts.dtype).at[shortest].set(1)
  first = first.at[size:].set(jnp.maximum(jnp.stack([bound, -bound]), 0))
  solved = _quadratic.constrained_qp(
    matrix,
    linear,
    jnp.stack([sums, above / scale]),
    jnp.array([1, 0], counts.dtype),
    first,
  )
  weights = solved[:size] * counts
  return weights / jnp.sum(weights)


def _with_penalty(
  gramian: types.Gramian, weights: chex.Array, rate: chex.Array
) -> chex.Array:
  """The objectives' weights, and the penalty's weight for the decrease."""
  penalty = gramian.lengths[-1]
  along = _trees.ratio(gramian.cosines[-1, :-1] * gramian.lengths[:-1], penalty)
  weight = jnp.maximum(weights @ (rate - along), 0)
  return jnp.append(weights, weight)


def constrained_mgda(
  objectives: int,
  *,
  rate: types.ScalarOrSchedule = 0.1,
  averaging: types.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
  r"""MGDA under the constraint that a penalty decreases at a given rate.

  With the objectives' gradients F and the penalty's q,

  .. math::
    d = \bar\lambda^\top F + s(\bar\lambda) q, \qquad
    s(\lambda) = \max(0, \lambda^\top \pi), \quad
    \pi_m = \rho - \frac{q^\top F_m}{\| q \|^2}

  so that :math:`q^\top d \ge \rho \| q \|^2`. The weights are averaged along
  the run, :math:`\bar\lambda \leftarrow \bar\lambda + \beta_k (\lambda -
  \bar\lambda)`, and

  .. math::
    \lambda = \arg\min_{\lambda \in \Delta, \; s \ge s(\lambda)}
      \| \lambda^\top F + s q \|^2 - s \rho \| q \|^2

  It is the aggregator of `bj.solvers.forum`; with one objective it equals
  `dynamic_barrier`.

  Args:
    objectives: the number of objectives, without the row of the penalty.
    rate: :math:`\rho \ge 0`, dimensionless; a constant or a schedule.
    averaging: :math:`\beta_k` in (0, 1], a constant or a schedule. The first
      update uses one.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` with the rows
    (objectives, penalty) to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows, or a number is out of
      range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.constrained_mgda(2, rate=0.5)
    >>> params = jnp.zeros(3)
    >>> rows = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    >>> direction, _ = link.update(bj.Jacobian(rows), link.init(params), params)
    >>> print(direction.round(3))
    [0.5 0.5 1. ]

  References:
    Ye, Lin, Cao, Zhang and Tsang, `A First-Order Multi-Gradient Algorithm for
    Multi-Objective Bi-Level Optimization <https://arxiv.org/abs/2401.09257>`_,
    2024.
  """
  _checks.whole_number('constrained_mgda', 'objectives', objectives)
  _checks.within('constrained_mgda', 'rate', rate, 0)
  _checks.within(
    'constrained_mgda', 'averaging', averaging, 0, 1, open_low=True
  )

  def choose(gramian, state):
    rho = _by_weights.current(rate, state)
    share = jnp.where(
      state.count == 0, 1, _by_weights.current(averaging, state)
    )
    chosen = _objective_weights(gramian, rho)
    mean = state.inner + share * (chosen - state.inner)
    return _with_penalty(gramian, mean, rho), mean

  start = lambda params, dtype: jnp.zeros([objectives], dtype)
  return _by_weights.by_gramian(
    'constrained_mgda', objectives + 1, choose, start
  )


def pmgda(
  objectives: int,
  *,
  preference: Sequence[float] | chex.Array,
  rate: types.ScalarOrSchedule = 0.1,
  tolerance: float = 1e-2,
) -> optax.GradientTransformationExtraArgs:
  r"""PMGDA: a Pareto-optimal point whose losses have given proportions.

  With the distance of the losses from the ray along the preference p,

  .. math::
    h(f) = \| f - (u^\top f) u \|, \qquad u = p / \| p \|

  the direction is that of MGDA if :math:`h` is within the tolerance. Otherwise
  h must decrease: the direction is that of `constrained_mgda` with
  :math:`q = \sum_m \partial_m h \, \nabla f_m`. The authors choose among
  mixtures of unit rows by a linear program; this quadratic program has a unique
  solution.

  Args:
    objectives: the number of rows.
    preference: :math:`p > 0`, (objectives,): the proportions of the losses, so
      that a *larger* number allows a larger loss.
    rate: :math:`\rho \ge 0`, the rate of decrease of h; a constant or a
      schedule.
    tolerance: largest accepted h, in units of losses. With a constant step
      size, h stays at the size of its change per step: let the step size decay.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` with losses to one
    gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows or no losses, or a number is
      out of range.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> losses = lambda x, batch: jnp.stack([(x - 1) ** 2, (x + 1) ** 2])
    >>> solver = optax.chain(
    ...   bj.multi_objective(losses, 2),
    ...   bj.aggregators.pmgda(2, preference=[1.0, 9.0], rate=1.0),
    ...   optax.sgd(0.02),
    ... )
    >>> params, _ = bj.testing.run(solver, jnp.float32(0.0), 400)
    >>> print(params.round(1))  # (x + 1)^2 is nine times (x - 1)^2 at 1/2.
    0.5

  References:
    Zhang, Lin and Zhang, `PMGDA: A Preference-based Multiple Gradient Descent
    Algorithm <https://arxiv.org/abs/2402.09492>`_, 2024.
  """
  shares = _checks.preferences('pmgda', objectives, preference, open_low=True)
  _checks.within('pmgda', 'rate', rate, 0)
  _checks.within('pmgda', 'tolerance', tolerance, 0)

  def choose(gramian, state):
    losses, lengths, cosines = gramian.values, gramian.lengths, gramian.cosines
    ray = jnp.asarray(shares, losses.dtype)
    ray = ray / jnp.linalg.norm(ray)
    away = losses - (ray @ losses) * ray
    distance = jnp.linalg.norm(away)
    slope = _trees.ratio(away, distance)
    # The gradient of the distance as a row, in units of its longest term.
    unit_weights = slope * lengths
    unit = jnp.max(jnp.abs(unit_weights))
    unit_weights = _trees.ratio(unit_weights, unit)
    products = cosines @ unit_weights
    size = jnp.sqrt(jnp.maximum(unit_weights @ products, 0))
    along = _trees.ratio(products, size)
    corner = jnp.sign(size)[None, None]
    longer = gramian._replace(
      lengths=jnp.append(lengths, unit * size),
      cosines=jnp.block([[cosines, along[:, None]], [along[None], corner]]),
    )
    rho = _by_weights.current(rate, state)
    chosen = _objective_weights(longer, rho)
    weights = _with_penalty(longer, chosen, rho)
    weights = weights[:-1] + weights[-1] * slope
    near = _quadratic.min_norm_weights(gramian)
    return jnp.where(distance > tolerance, weights, near), ()

  return _by_weights.by_gramian('pmgda', objectives, choose, losses=True)
