"""The prox-linear step on an upper loss and a nonsmooth penalty."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import (
  _checks,
  _sequences,
  _trees,
  projections,
  states,
  types,
)
from bilevel_jax.aggregators import _penalty
from bilevel_jax.oracles import base


class ProxLinearState(NamedTuple):
  """State of `prox_linear`.

  Attributes:
    updates: the number of updates, for schedules.
    dual: the multiplier of the linearised lower slope, in the structure of the
      lower variable; a warm start.
  """

  updates: states.UpdateCount
  dual: Any


def prox_linear(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  step: types.ScalarOrSchedule,
  iterations: int = 10,
  upper_set: projections.Projection | None = None,
  lower_set: projections.Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""The prox-linear step on an upper loss plus the norm of the lower slope.

  With :math:`z = (x, y)`, :math:`s = \nabla_y g(z)` and its derivative
  :math:`J = \nabla s(z)`, it solves

  .. math::
    \min_{z + d \in C \times U} \; \langle \nabla f(z), d \rangle
      + \gamma \| s + J d \| + \frac{1}{2 \alpha} \| d \|^2

  by its dual in :math:`\| u \| \le \gamma`,

  .. math::
    d(u) = \Pi_{C \times U} [ z - \alpha (\nabla f + J^\top u) ] - z, \qquad
    \nabla_u = s + J d(u),

  with projected gradient steps of spectral length and a line search that is
  exact without sets. Each step takes one product with J and one with its
  transpose. The dual starts from that of the last update.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule from the number of
      updates so far. It is exact if it is at least the norm of the multiplier
      of the constraint :math:`\nabla_y g = 0`.
    step: :math:`\alpha_k > 0`, a constant or a schedule.
    iterations: dual iterations in one update, at least 1.
    upper_set: projection on the set of the upper variable.
    lower_set: projection on the set of the lower variable.

  Returns:
    An oracle for the sequences `upper` and `lower` that gives
    :math:`-d / \alpha`; `optax.sgd` with the same step size then takes the step
    d. It measures `upper`, `lower`, `penalty`, which is
    :math:`\| \nabla_y g \|`, and `multiplier`, which is :math:`\| u \|`. The
    penalty is large enough if the multiplier is below it at the end of a run.

  Raises:
    ValueError: if a schedule is negative or `iterations` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2 / 2,
    ...   lower=lambda x, y, batch: (y - x) ** 2 / 2,
    ... )
    >>> params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(1.0))
    >>> link = bj.prox_linear(problem, penalty=10.0, step=0.1)
    >>> gradients, state = link.update(None, link.init(params), params)
    >>> print(gradients.upper.round(3), gradients.lower.round(3))  # y = x
    0.5 0.5

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.

    Drusvyatskiy and Paquette, `Efficiency of minimizing compositions of convex
    functions and smooth maps <https://arxiv.org/abs/1605.00125>`_, 2019.

    Birgin, Martinez and Raydan, Nonmonotone Spectral Projected Gradient Methods
    on Convex Sets, SIAM Journal on Optimization, 2000.
  """
  _checks.whole_number('prox_linear', 'iterations', iterations)
  weight = _penalty.checked_schedule(penalty)
  length = _penalty.checked_schedule(step, 'the step')
  above, below = base.checked_losses(problem)

  def init(params):
    _sequences.require_sequences(params, ('upper', 'lower'), 'prox_linear')
    return ProxLinearState(
      states.no_updates(), optax.tree.zeros_like(params.lower)
    )

  def fn(params, batch, inner):
    z = (params.upper, params.lower)
    dtype = _trees.widest_dtype(params)
    dot, add = _trees.dot, _trees.add_scaled
    norm = lambda tree: jnp.sqrt(dot(tree, tree))
    count = inner.updates.count
    gamma = jnp.asarray(weight(count), dtype)
    # The direction has a limit as the step size goes to zero.
    alpha = jnp.maximum(jnp.asarray(length(count), dtype), 1e-30)
    (height, one), slopes = above.with_slopes(0, 1)(*z, batch)

    def loss_and_slope(x, y):
      (depth, aux), (slope,) = below.with_slopes(1)(x, y, batch)
      return (depth, slope), aux

    (depth, slope), both, two = jax.linearize(loss_and_slope, *z, has_aux=True)
    forward = lambda d: both(*d)[1]
    transposed = jax.linear_transpose(both, *z)
    backward = lambda u: transposed((jnp.zeros_like(depth), u))

    def displacement(pulled):
      moved = add(z, -alpha, optax.tree.add(slopes, pulled))
      inside = (
        part if project is None else project(part)
        for part, project in zip(moved, (upper_set, lower_set), strict=True)
      )
      return optax.tree.sub(tuple(inside), z)

    def ball(u):
      scale = jnp.minimum(1, gamma / jnp.maximum(norm(u), gamma))
      return _trees.scaled(jnp.where(gamma > 0, scale, 0), u)

    def spectral(change, tug):
      """The inverse curvature along a change of the dual, and the curvature."""
      bend = alpha * dot(tug, tug)
      safe = jnp.where(bend > 0, bend, 1)
      rate = jnp.where(bend > 0, dot(change, change) / safe, 1)
      return jnp.clip(rate, 1e-12, 1e12), bend

    def look(pulled):
      d = displacement(pulled)
      return d, optax.tree.add(slope, forward(d))

    def iterate(_, carry):
      u, pulled, _, ascent, rate = carry
      change = optax.tree.sub(ball(add(u, rate, ascent)), u)
      tug = backward(change)
      rate, bend = spectral(change, tug)
      part = dot(ascent, change) / jnp.where(bend > 0, bend, 1)
      part = jnp.clip(jnp.where(bend > 0, part, 1), 0, 1)
      u, pulled = add(u, part, change), add(pulled, part, tug)
      return u, pulled, *look(pulled), rate

    u = ball(inner.dual)  # The penalty may have fallen.
    pulled = backward(u)
    d, ascent = look(pulled)
    rate, _ = spectral(ascent, backward(ascent))
    u, _, d, _, _ = jax.lax.fori_loop(
      0, iterations, iterate, (u, pulled, d, ascent, rate)
    )
    gradients = jax.tree.map(lambda leaf: -leaf / alpha.astype(leaf.dtype), d)
    state = ProxLinearState(inner.updates.next(), u)
    measured = (height, depth, norm(slope), norm(u))
    only = _sequences.only(params, upper=gradients[0], lower=gradients[1])
    more = base.requested_outputs(problem, upper=one, lower=two)
    return measured, only, state, *more

  counts = {
    'gradients/upper': 1,
    'gradients/lower': 1,
    'hessian_vector_products/lower': 3 + 2 * iterations,
  }
  for name, project in (('upper', upper_set), ('lower', lower_set)):
    if project is not None:
      counts[f'projections/{name}'] = 1 + iterations
  return base.oracle(
    fn,
    ('upper', 'lower', 'penalty', 'multiplier'),
    init,
    counts=counts,
    outputs=problem.outputs,
  )
