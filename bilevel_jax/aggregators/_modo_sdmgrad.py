"""MoDo and SDMGrad: unbiased weights from two independent Jacobians."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees, types
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows


def _by_samples(name, objectives, samples, choose, start=_by_weights.no_state):
  """Makes an aggregator of several Jacobians stacked by `independent`.

  Args:
    name: the aggregator's name.
    objectives: the number of objectives.
    samples: 2, or 3 if the direction has its own sample.
    choose: maps (cross-products of two samples, state) to (weights, next inner
      state).
    start: as in `by_weights`.
  """
  if samples not in (2, 3):
    raise ValueError(f'{name} takes 2 or 3 samples, got {samples}.')

  def aggregate(jacobian, state):
    parts = [_rows.part(jacobian, i, objectives) for i in range(samples)]
    cross = _rows.products(parts[0], parts[1]).astype(state.weights.dtype)
    weights, inner = choose(cross, state)
    rows: Any = parts[-1]
    if samples == 2:
      rows = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    gradients = _rows.weigh(jacobian._replace(rows=rows), weights)
    return gradients, weights, inner

  return _by_weights.aggregator(
    name, objectives, aggregate, start, samples=samples, rows=True
  )


def modo(
  objectives: int,
  *,
  weight_step: types.ScalarOrSchedule = 0.1,
  regularisation: types.ScalarOrSchedule = 0.0,
  samples: int = 3,
) -> optax.GradientTransformationExtraArgs:
  r"""MoDo: weights from two independent samples of the Jacobian.

  .. math::
    \lambda_k = \Pi_{\Delta} [ \lambda_{k-1} - \gamma_k
      ( J_1 J_2^\top + \rho I ) \lambda_{k-1} ], \qquad
    d_k = J_3^\top \lambda_k

  The product of two independent samples is an unbiased estimate of the true
  product; the square of one sample is not. Put
  `bj.evaluation.independent(oracle, samples)` before it.

  Args:
    objectives: the number of objectives.
    weight_step: :math:`\gamma_k`, a constant or a schedule.
    regularisation: :math:`\rho`, a constant or a schedule.
    samples: 3; or 2 for a direction from the mean of the two, which is cheaper
      but not independent of the weights.

  Returns:
    A transformation from a `Jacobian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian`.
    ValueError: if they have another number of rows than objectives times
      samples.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.modo(2, weight_step=1.0, samples=2)
    >>> params = jnp.zeros(2)
    >>> rows = jnp.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    >>> _, state = link.update(bj.Jacobian(rows), link.init(params), params)
    >>> print(state.weights)
    [0.25 0.75]

  References:
    Chen, Fernando, Ying and Chen, `Three-Way Trade-Off in Multi-Objective
    Learning: Optimization, Generalization and Conflict-Avoidance
    <https://arxiv.org/abs/2305.20057>`_, 2023.
  """
  _checks.within('modo', 'weight_step', weight_step, 0, open_low=True)
  _checks.within('modo', 'regularisation', regularisation, 0)

  def choose(cross, state):
    weights = state.weights
    step = _by_weights.current(weight_step, state)
    rho = _by_weights.current(regularisation, state)
    slope = cross @ weights + rho * weights
    return _quadratic.onto_simplex(weights - step * slope), ()

  return _by_samples('modo', objectives, samples, choose)


def sdmgrad(
  objectives: int,
  *,
  weight_step: types.ScalarOrSchedule = 1.0,
  momentum: float = 0.5,
  inner_steps: int = 20,
  pull: float = 0.3,
  samples: int = 3,
) -> optax.GradientTransformationExtraArgs:
  r"""SDMGrad: a multi-gradient direction regularised towards the mean gradient.

  Several steps of projected descent with momentum, from the weights of the last
  update and with two independent samples of the Jacobian, towards

  .. math::
    \min_{w \in \Delta} \tfrac{1}{2} \| J^\top (w + \lambda \mathbf{1} / M)
      \|^2, \qquad
    d = J_3^\top \, \frac{w + \lambda \mathbf{1} / M}{1 + \lambda}

  Put `bj.evaluation.independent(oracle, samples)` before it.

  Args:
    objectives: the number of objectives.
    weight_step: step size of :math:`w`, in units of one over the largest sum of
      absolute values in a row of :math:`J_1 J_2^\top`; a constant or a
      schedule. Up to 1 the descent cannot oscillate: without noise, the default
      comes near the minimiser within one update, or within several if the
      lengths of gradients differ by a factor of ten.
    momentum: momentum of that descent, in [0, 1).
    inner_steps: descent steps per update.
    pull: :math:`\lambda \ge 0`.
    samples: 3; or 2, as in `modo`.

  Returns:
    A transformation from a `Jacobian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian`.
    ValueError: if they have another number of rows than objectives times
      samples, or a number is out of range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.sdmgrad(2, samples=2, pull=0.0)
    >>> params = jnp.zeros(2)
    >>> rows = jnp.concatenate([jnp.eye(2), jnp.eye(2)])
    >>> print(link.update(bj.Jacobian(rows), link.init(params))[0])
    [0.5 0.5]

  References:
    Xiao, Ban and Ji, `Direction-oriented Multi-objective Learning: Simple and
    Provable Stochastic Algorithms <https://arxiv.org/abs/2305.18409>`_, 2023.
  """
  _checks.within('sdmgrad', 'weight_step', weight_step, 0, open_low=True)
  _checks.within('sdmgrad', 'pull', pull, 0)
  _checks.whole_number('sdmgrad', 'inner_steps', inner_steps)
  if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum < 1:
    raise ValueError(f'sdmgrad: momentum is in [0, 1), got {momentum}.')

  def choose(cross, state):
    dtype = state.weights.dtype
    step = _by_weights.current(weight_step, state)
    steepest = jnp.max(jnp.sum(jnp.abs(cross), axis=1))
    unit = _trees.ratio(cross, steepest)
    target = jnp.full([objectives], pull / objectives, dtype)

    def descend(_, carry):
      weights, velocity = carry
      velocity = momentum * velocity + unit @ (weights + target)
      return _quadratic.onto_simplex(weights - step * velocity), velocity

    start = (state.inner, 0 * state.inner)
    weights, _ = jax.lax.fori_loop(0, inner_steps, descend, start)
    return (weights + target) / (1 + jnp.asarray(pull, dtype)), weights

  start = lambda params, dtype: jnp.full([objectives], 1 / objectives, dtype)
  return _by_samples('sdmgrad', objectives, samples, choose, start)
