"""Fully first-order stochastic approximation, in two loops or in one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import (
  _sequences,
  aggregators,
  combinators,
  projections,
  types,
)
from bilevel_jax.oracles import _oracle
from bilevel_jax.solvers import _pbgd


def _losses(problem):
  return (
    _oracle.scalar_loss(problem.upper, 'upper'),
    _oracle.scalar_loss(problem.lower, 'lower'),
  )


def _rows(one, two):
  return jax.tree.map(lambda *r: jnp.stack(r), one, two)


def _slopes(problem, *, upper: bool, lower: bool):
  """Rows (f, g) for the variables asked for; the value sequence in `rest`.

  All of them are evaluated at one point and on one batch: differences of the
  two lower slopes, multiplied by a large penalty, need the same noise in both.
  """
  above, below = _losses(problem)
  wanted = tuple(i for i, is_wanted in enumerate((upper, lower)) if is_wanted)
  names = ('upper', 'lower', 'gap') + (('value',) if lower else ())

  def fn(params, batch, inner):
    _sequences.require_sequences(params, ('upper', 'lower', 'value'), 'f2sa')
    x, y, z = params.upper, params.lower, params.value
    f, f_slopes = jax.value_and_grad(above, wanted)(x, y, batch)
    g, g_slopes = jax.value_and_grad(below, wanted)(x, y, batch)
    least, z_slopes = jax.value_and_grad(below, wanted)(x, z, batch)
    fields, rest = {}, {}
    for i, one, two, three in zip(
      wanted, f_slopes, g_slopes, z_slopes, strict=True
    ):
      if i == 0:
        fields['upper'] = _rows(one, optax.tree.sub(two, three))
      else:
        fields['lower'] = _rows(one, two)
        rest['value'] = three
    measured = (f, g, g - least) + ((least,) if lower else ())
    jacobian = types.Jacobian(_sequences.only(params, **fields), rest)
    return measured, jacobian, inner

  return _oracle.oracle(
    fn, names, counts={'gradients/upper': 1, 'gradients/lower': 2}
  )


def f2sa(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  value: optax.GradientTransformation | None = None,
  inner_steps: int | None = None,
  inner_batch: Callable[[Any, Any], Any] | None = None,
  upper_set: projections.Projection | None = None,
  lower_set: projections.Projection | None = None,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""F2SA: inner loops for the penalised and for the plain lower problem.

  .. math::
    z &\leftarrow z - \beta \nabla_y g(x_k, z), \qquad
    y \leftarrow y - \alpha c_k [ \nabla_y f(x_k, y)
      + \gamma_k \nabla_y g(x_k, y) ] \quad \text{(T times)} \\
    x_{k+1} &= \Pi \left[ x_k - \xi ( \nabla_x f(x_k, y)
      + \gamma_k (\nabla_x g(x_k, y) - \nabla_x g(x_k, z)) ) \right],
    \qquad c_k = \min(1 / \gamma_k, 1)

  First-order only. In two loops, y is near the minimiser of the penalised loss
  when x moves, and the upper gradient, whose slope does not grow with
  :math:`\gamma`, takes a step that does not shrink with it: only y's step is
  rescaled. Let the penalty grow, for instance as :math:`k^{1/3}` or linearly
  between two bounds; the bias in x is of the order :math:`1 / \gamma`. In one
  loop, all three move at once, from gradients at one point, at the cost of
  three gradients; then x's step is rescaled too.

  The two lower slopes are always evaluated on one batch: their difference is
  multiplied by :math:`\gamma`, and independent noise would be as well.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule from the number of
      updates so far.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    value: optimiser of the value sequence :math:`z`; by default that of
      `lower`.
    inner_steps: steps :math:`T` of y and z in one update; None for one loop.
    inner_batch: the batch of inner step t, from (batch, t).
    upper_set: projects the upper variable.
    lower_set: projects y and z, in each inner step.
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper`, `lower`, `gap` and
    `value`, the lower loss at z. An update costs `inner_steps` + 1 upper and
    twice as many lower gradients in two loops, 1 and 2 in one.

  Raises:
    ValueError: if the penalty is negative, a set has no point in it,
      `inner_steps` is below 1, or `inner_batch` is given without it.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.f2sa(
    ...   problem, penalty=optax.linear_schedule(1.0, 1e3, 200), inner_steps=10,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.2),
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(400):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.upper.round(2))
    [0.5 0.5]

  References:
    Kwon, Kwon, Wright and Nowak, `A Fully First-Order Method for Stochastic
    Bilevel Optimization <https://arxiv.org/abs/2301.10945>`_, 2023.

    Chen, Ma and Zhang, `Near-Optimal Nonconvex-Strongly-Convex Bilevel
    Optimization with Fully First-Order Oracles
    <https://arxiv.org/abs/2306.14853>`_, 2023.
  """
  value = lower if value is None else value
  if inner_steps is None:
    if inner_batch is not None:
      raise ValueError('inner_batch is for two loops: give inner_steps too.')
    everything = optax.chain(
      wrap(_slopes(problem, upper=True, lower=True)),
      aggregators.scale_by_penalty(penalty),
      combinators.per_sequence(upper=upper, lower=lower, value=value),
      projections.project(upper=upper_set, lower=lower_set, value=lower_set),
    )
    return combinators.auxiliary(everything, value=lambda params: params.lower)

  inner_penalty = penalty
  if callable(penalty):
    # Counted in inner steps: all those of one update see the same penalty.
    inner_penalty = lambda count: penalty(count // inner_steps)
  inner = optax.chain(
    wrap(_slopes(problem, upper=False, lower=True)),
    aggregators.scale_by_penalty(inner_penalty),
    combinators.per_sequence(lower=lower, value=value),
    projections.project(lower=lower_set, value=lower_set),
  )
  outer = optax.chain(
    wrap(_slopes(problem, upper=True, lower=False)),
    aggregators.scale_by_penalty(penalty, rescale=False),
    combinators.per_sequence(upper=upper),
    projections.project(upper=upper_set),
  )
  return combinators.auxiliary(
    combinators.alternate(
      combinators.repeat(inner, inner_steps, inner_batch), outer
    ),
    value=lambda params: params.lower,
  )
