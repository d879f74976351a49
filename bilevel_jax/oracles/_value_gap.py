"""The value-gap penalty: how far the lower loss is above its minimum."""

from collections.abc import Sequence

import jax
import optax

from bilevel_jax import types
from bilevel_jax.oracles import _penalised, base


def value_gap(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule | None = None,
  rescale: bool = True,
  proximity: float | None = None,
  of: str | Sequence[str] = ('upper', 'lower'),
) -> base.Oracle:
  r"""Gradients of the upper loss and of the value gap of the lower loss.

  .. math::
    \nabla f(x, y), \qquad
    \nabla g(x, y) - (\nabla_x g(x, w), 0)

  where :math:`w`, the sequence named `value`, stands for a minimiser of
  :math:`g(x, \cdot)`. It is held fixed: by the theorem of Danskin, the value
  function's gradient is the partial gradient at any minimiser.

  Args:
    problem: the upper and the lower loss.
    penalty: None for two rows, to be weighed by an aggregator. A weight, or a
      schedule of it, gives the fused form: one scalar loss, one backward pass
      and one gradient instead of two rows, with the same result as
      `scale_by_penalty` behind the rows.
    rescale: whether the fused form is divided by the penalty above one, as in
      `scale_by_penalty`.
    proximity: None for the value function; a length for its Moreau envelope,
      for lower losses that are not convex: the value sequence then stands for
      a minimiser of the lower loss plus its squared distance to the lower
      variable, divided by twice this length, and the gap is less by that.
    of: the one sequence, or both, to differentiate.

  Returns:
    An oracle for parameters with the sequences `upper`, `lower`, `value`. It
    measures `upper`, `lower` and `gap`. The gap is negative while the value
    sequence lags behind the lower one; it is reported as it is.

  Raises:
    ValueError: if the penalty is negative.
    TypeError: at the call, if a loss is not a scalar or a sequence is missing.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2, lower=lambda x, y, batch: (x - y) ** 2
    ... )
    >>> params = bj.sequences(
    ...   upper=jnp.float32(1.0), lower=jnp.float32(3.0), value=jnp.float32(2.0)
    ... )
    >>> link = bj.value_gap(problem)
    >>> jacobian, _ = link.update(None, link.init(params), params)
    >>> print(jacobian.rows.upper, jacobian.rows.lower)
    [ 0. -2.] [6. 4.]

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  lower = base.Loss(problem.lower, 'lower')

  def gap(x, y, params, batch, known):
    del known
    below, outputs = lower.full(x, y, batch)
    # Live in x, stopped in the value sequence.
    least = lower(x, jax.lax.stop_gradient(params.value), batch)
    if proximity is not None:
      away = optax.tree.sub(jax.lax.stop_gradient(params.value), y)
      least = least + optax.tree.norm(away, squared=True) / (2 * proximity)
    return below - least, (below, outputs)

  return _penalised.penalised(
    problem,
    gap,
    name='gap',
    sequences=('upper', 'lower', 'value'),
    counts={'gradients/upper': 1, 'gradients/lower': 2},
    penalty=penalty,
    rescale=rescale,
    of=(of,) if isinstance(of, str) else tuple(of),
  )
