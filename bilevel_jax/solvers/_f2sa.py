"""Fully first-order stochastic approximation, in two loops or in one."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _descend, _sequences, aggregators, oracles, types
from bilevel_jax.oracles import base


def _slopes(problem, names):
  """Rows (f, g) for the variables named; the value sequence in `rest`.

  All of them are evaluated at one point and on one batch: differences of the
  two lower slopes are multiplied by the penalty, and so would their noise be.
  """
  above = base.Loss(problem.upper, 'upper')
  below = base.Loss(problem.lower, 'lower')
  wanted = tuple(('upper', 'lower').index(n) for n in names)
  rows = lambda *trees: jax.tree.map(lambda *r: jnp.stack(r), *trees)

  def fn(params, batch, inner):
    x, y, z = params.upper, params.lower, params.value
    f, f_slopes = jax.value_and_grad(above, wanted)(x, y, batch)
    g, g_slopes = jax.value_and_grad(below, wanted)(x, y, batch)
    least, z_slopes = jax.value_and_grad(below, wanted)(x, z, batch)
    fields, rest = {}, {}
    for name, one, two, three in zip(
      names, f_slopes, g_slopes, z_slopes, strict=True
    ):
      if name == 'upper':
        fields[name] = rows(one, optax.tree.sub(two, three))
      else:
        fields[name], rest['value'] = rows(one, two), three
    jacobian = types.Jacobian(_sequences.only(params, **fields), rest)
    return (f, g, g - least, least), jacobian, inner

  return base.oracle(
    fn,
    ('upper', 'lower', 'gap', 'value'),
    counts={'gradients/upper': 1, 'gradients/lower': 2},
    moves=(*names, 'value') if 'lower' in names else names,
    needs=('upper', 'lower', 'value'),
    linear=True,
  )


def f2sa(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike | None = None,
  wrap: types.Wrapper | None = None,
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
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how :math:`y` moves; with `steps` above one, :math:`T`, in two loops,
      else in one.
    value: how :math:`z` moves; by default by the optimiser of `lower`, and
      always in its loop.
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper`, `lower`, `gap` and
    `value`, the lower loss at z. An update costs T + 1 upper and twice as many
    lower gradients in two loops, 1 and 2 in one.

  Raises:
    ValueError: if the penalty is negative or a set has no point in it.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.f2sa(
    ...   problem, penalty=optax.linear_schedule(1.0, 1e3, 200),
    ...   upper=optax.sgd(0.1), lower=bj.Sequence(optax.sgd(0.2), steps=10),
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
  low = types.as_sequence(lower, 'lower')
  follow = types.value_sequence(value, low, steps=low.steps)
  follow = follow._replace(batch_at=low.batch_at)
  moves: Any = {'upper': upper, 'lower': low, 'value': follow}
  if low.steps == 1:
    together = _slopes(problem, ('upper', 'lower'))
    weigh = aggregators.scale_by_penalty(penalty)
    joint = oracles.aggregated(together, weigh)
    return _descend.descend(joint, wrap=wrap, **moves)
  below = oracles.aggregated(
    _slopes(problem, ('lower',)), aggregators.scale_by_penalty(penalty)
  )
  above = oracles.aggregated(
    _slopes(problem, ('upper',)),
    aggregators.scale_by_penalty(penalty, rescale=False),
  )
  return _descend.descend(below, above, wrap=wrap, **moves)
