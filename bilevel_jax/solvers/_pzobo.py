"""PZOBO: how the lower variable responds, by differences of inner loops."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel_jax import combinators, oracles, projections, types
from bilevel_jax.oracles import _oracle
from bilevel_jax.solvers import _pbgd


def pzobo(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  step_size: types.ScalarOrSchedule,
  inner_steps: int = 10,
  smoothing: float = 1e-2,
  directions: int = 1,
  inner_batch: Callable[[Any, Any], Any] | None = None,
  upper_set: projections.Projection | None = None,
  key: Any = 0,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""PZOBO: no second derivatives, the inner loop is run from shifted points.

  .. math::
    d = \nabla_x f + \frac{1}{Q} \sum_{q=1}^{Q} \left\langle
      \frac{y^T(x + \mu u_q) - y^T(x)}{\mu}, \nabla_y f \right\rangle u_q

  with :math:`y^T(x)` the end of an inner loop of gradient descent from the
  current lower variable. The directions :math:`u_q` are orthogonal and of the
  length :math:`\sqrt{d}`, so that with as many as x has numbers the response
  is exact; with fewer, noise grows with the dimension.

  Args:
    problem: the upper and the lower loss.
    upper: optimiser of the upper variable.
    step_size: of the inner loop, a constant or a schedule.
    inner_steps: :math:`T`.
    smoothing: :math:`\mu`, in units of x.
    directions: :math:`Q`, at most the dimension of x.
    inner_batch: the batch of inner step t, from (batch, t).
    upper_set: projects the upper variable.
    key: PRNG key of the directions, or a whole number.
    wrap: wraps the oracle.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if a number is too small.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.pzobo(
    ...   bj.BilevelProblem(square, square), upper=optax.sgd(0.1), step_size=0.1
    ... )

  References:
    Sow, Ji and Liang, `On the Convergence Theory for Hessian-Free Bilevel
    Algorithms <https://arxiv.org/abs/2110.07004>`_, 2022.
  """
  if inner_steps < 1 or directions < 1 or not smoothing > 0:
    raise ValueError(
      'pzobo takes inner_steps >= 1, directions >= 1 and smoothing > 0, got '
      f'{inner_steps}, {directions} and {smoothing}.'
    )
  lower = _oracle.scalar_loss(problem.lower, 'lower')
  above = _oracle.scalar_loss(problem.upper, 'upper')
  pick = inner_batch or (lambda batch, t: batch)
  rate = step_size if callable(step_size) else lambda count: step_size

  def fn(params, batch, inner):
    count, key = inner
    key, now = jax.random.split(key)
    x, y = params
    flat, unravel = ravel_pytree(x)
    shape = (flat.size, min(directions, flat.size))
    draw = jax.random.normal(now, shape, jnp.promote_types(flat.dtype, 'f4'))
    basis = jnp.linalg.qr(draw)[0].T.astype(flat.dtype) * flat.size**0.5

    def loop(x):
      def step(y, t):
        slope = jax.grad(lower, 1)(x, y, pick(batch, t))
        return jax.tree.map(
          lambda a, g: a - jnp.asarray(rate(count), a.dtype) * g, y, slope
        ), None

      return jax.lax.scan(step, y, jnp.arange(inner_steps))[0]

    end = loop(x)
    value, (f_x, f_y) = jax.value_and_grad(above, (0, 1))(x, end, batch)

    def weight(u):
      moved = loop(unravel(flat + smoothing * u))
      return optax.tree.vdot(optax.tree.sub(moved, end), f_y) / smoothing

    weights = jax.vmap(weight)(basis).astype(flat.dtype)
    response = unravel(weights @ basis / basis.shape[0])
    directions_ = type(params)(
      optax.tree.add(f_x, response), optax.tree.sub(y, end)
    )
    return (value,), directions_, (optax.safe_increment(count), key)

  def init(params):
    del params
    made = jax.random.key(key) if isinstance(key, int) else key
    return jnp.zeros([], jnp.int32), made

  oracle = oracles.oracle(
    fn,
    ('upper',),
    init,
    counts={
      'gradients/upper': 1,
      'gradients/lower': inner_steps * (1 + directions),
    },
  )
  return optax.chain(
    wrap(oracle),
    combinators.per_sequence(upper=upper, lower=optax.sgd(1.0)),
    projections.project(upper=upper_set),
  )
