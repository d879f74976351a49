"""Rows of several upper losses and of the lower loss's value gap."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bilevel_jax import types
from bilevel_jax.oracles import _objectives, base


def multi_objective_gap(
  problem: types.BilevelProblem, objectives: int | Sequence[str]
) -> base.Oracle:
  r"""Gradients of several upper losses and of the lower loss's value gap.

  .. math::
    \nabla f_1(x, y), \; \dots, \; \nabla f_M(x, y), \;
    \nabla g(x, y) - (\nabla_x g(x, w), 0)

  where :math:`w`, the sequence named `value`, approximates a minimiser of
  :math:`g(x, \cdot)`. It is constant in the derivative, as in `value_gap`.

  Args:
    problem: the upper losses, one function to an array (objectives,) or to
      (array, auxiliary), and the lower loss.
    objectives: the number of upper losses, or their names.

  Returns:
    An oracle for the sequences `upper`, `lower` and `value`. It gives a
    `Jacobian` with a row for each upper loss and a row for the gap, and
    measures the upper losses by name, `lower` and `gap`.

  Raises:
    ValueError: if the names are not distinct, or `lower`, `gap` or `value` is
      among them.
    TypeError: at the call, if the number of losses differs or a sequence is
      missing.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.stack([y**2, x * y]),
    ...   lower=lambda x, y, batch: (x - y) ** 2,
    ... )
    >>> params = bj.sequences(
    ...   upper=jnp.float32(1.0), lower=jnp.float32(3.0), value=jnp.float32(2.0)
    ... )
    >>> oracle = bj.oracles.multi_objective_gap(problem, 2)
    >>> jacobian, _ = oracle.update(None, oracle.init(params), params)
    >>> print(jacobian.rows.upper, jacobian.rows.lower)
    [ 0.  3. -2.] [6. 1. 4.]

  References:
    Ye, Lin, Cao, Zhang and Tsang, `A First-Order Multi-Gradient Algorithm for
    Multi-Objective Bi-Level Optimization <https://arxiv.org/abs/2401.09257>`_,
    2024.
  """
  _, below = base.checked_losses(problem)
  above = _objectives.make_objectives(
    'multi_objective_gap',
    problem.upper,
    objectives,
    reserved=('lower', 'gap', 'value'),
  )

  def fn(params, batch, inner):
    value = jax.lax.stop_gradient(params.value)

    def losses(near):
      heights, one = above.full(near.upper, near.lower, batch)
      height, two = below.full(near.upper, near.lower, batch)
      gap = height - below(near.upper, value, batch)
      every = jnp.append(heights, gap.astype(heights.dtype))
      return every, (every, height, one, two)

    near = types.BilevelParams(params.upper, params.lower)
    rows, measured = _objectives.jacobian(losses, near)
    every, height, one, two = measured
    return (
      (*every[:-1], height, every[-1]),
      types.Jacobian(base.gradients(params, **rows._asdict()), None, every),
      inner,
      *base.requested_outputs(problem, upper=one, lower=two),
    )

  return base.oracle(
    fn,
    (*above.names, 'lower', 'gap'),
    counts={'gradients/upper': len(above.names), 'gradients/lower': 2},
    moves=('upper', 'lower'),
    needs=('upper', 'lower', 'value'),
    outputs=problem.outputs,
    linear=True,
  )
