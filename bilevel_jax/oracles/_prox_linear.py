"""The prox-linear step on an upper loss and a nonsmooth penalty."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
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


def _norm(tree):
  return jnp.sqrt(_trees.dot(tree, tree))


class _Dual(NamedTuple):
  """The dual of a prox-linear step; see `prox_linear`.

  Attributes:
    look: from J^T u to d(u) and the gradient of the dual.
    backward: multiplies by J^T.
    penalty: the radius of the ball of u.
    step: alpha.
    slope: the norm of s.
    point: the norm of z.
  """

  look: Callable[[Any], tuple[Any, Any]]
  backward: Callable[[Any], Any]
  penalty: chex.Array
  step: chex.Array
  slope: chex.Array
  point: chex.Array

  def ascend(self, u: Any, iterations: int) -> tuple[Any, Any]:
    """Maximises the dual from u; returns u and d(u)."""
    size = _norm(u)  # The penalty may have fallen.
    inside = size <= self.penalty
    scale = jnp.where(inside, 1, self.penalty / jnp.where(inside, 1, size))
    u = _trees.scaled(scale, u)
    pulled = self.backward(u)
    d, ascent = self.look(pulled)
    change = (_norm(ascent), _norm(self.backward(ascent)))
    carry = (
      u,
      pulled,
      d,
      ascent,
      self._rate(*change),
      _trees.ratio(*change[::-1]),
    )
    u, _, d, *_ = jax.lax.fori_loop(0, iterations, self._iterate, carry)
    return u, d

  def _iterate(self, _, carry):
    u, pulled, d, ascent, rate, stiffness = carry
    change, gain = self._projected_step(u, ascent, rate)
    tug = self.backward(change)
    length, pull = _norm(change), _norm(tug)
    stiffness = jnp.maximum(stiffness, _trees.ratio(pull, length))
    # Less than this is rounding of s and J d. It would move a dual that is not
    # unique at random, along directions in which J^T is zero.
    eps = jnp.finfo(length.dtype).eps
    noise = eps * (self.slope + stiffness * (self.point + _norm(d)))
    moving = length > rate * noise
    bend = self.step * pull**2
    part = jnp.where(bend > 0, gain / jnp.where(bend > 0, bend, 1), 1)
    part = jnp.where(moving, jnp.clip(part, 0, 1), 0)
    rate = jnp.where(moving, self._rate(length, pull), rate)
    u = _trees.add_scaled(u, part, change)
    pulled = _trees.add_scaled(pulled, part, tug)
    return u, pulled, *self.look(pulled), rate, stiffness

  def _rate(self, length, pull):
    """The inverse curvature along a change of the dual."""
    bend = self.step * pull**2
    rate = jnp.where(bend > 0, length**2 / jnp.where(bend > 0, bend, 1), 1)
    return jnp.clip(rate, 1e-12, 1e12)

  def _projected_step(self, u, ascent, rate):
    """The change of u by a projected step, and the first-order gain.

    With u + rate * ascent = (1 + excess) p and the projection p, the product of
    the ascent and the change p - u is

      (|p - u|^2 + excess * p^T (p - u)) / rate,
      p^T (p - u) = (|p - u|^2 + penalty^2 - |u|^2) / 2.

    On the sphere, the product itself is a difference of large terms, and its
    rounding would end the ascent at half of the digits.
    """
    size = _norm(_trees.add_scaled(u, rate, ascent))
    outside = size > self.penalty
    safe = jnp.where(outside, size, 1)
    scale = jnp.where(outside, self.penalty / safe, 1)
    shrink = jnp.where(outside, (self.penalty - size) / safe, 0)
    change = _trees.add_scaled(_trees.scaled(shrink, u), scale * rate, ascent)
    excess = jnp.where(scale > 0, -shrink / jnp.where(scale > 0, scale, 1), 0)
    before = _norm(u)
    depth = self.penalty - before
    # Within rounding of the sphere, u is on it.
    eps = jnp.finfo(depth.dtype).eps
    depth = jnp.where(depth > 4 * eps * self.penalty, depth, 0)
    room = depth * (self.penalty + before)
    square = _trees.dot(change, change)
    return change, (square + excess * (square + room) / 2) / rate


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
    add = _trees.add_scaled
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

    def look(pulled):
      d = displacement(pulled)
      return d, optax.tree.add(slope, forward(d))

    dual = _Dual(look, backward, gamma, alpha, _norm(slope), _norm(z))
    u, d = dual.ascend(inner.dual, iterations)
    gradients = jax.tree.map(lambda leaf: -leaf / alpha.astype(leaf.dtype), d)
    state = ProxLinearState(inner.updates.next(), u)
    measured = (height, depth, _norm(slope), _norm(u))
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
