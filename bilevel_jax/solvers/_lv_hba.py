"""LV-HBA: lower inequality constraints, by a proximal Lagrangian."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _sequences, descent, oracles, states, types
from bilevel_jax.aggregators import _penalty
from bilevel_jax.oracles import base


class Multipliers(NamedTuple):
  r"""How `lv_hba` moves the multipliers of the lower constraints.

  Attributes:
    multiplier: how :math:`\lambda` moves, an optax optimiser or a `Sequence`;
      it starts at zero.
    proximal: how the proximal point :math:`z` of the multipliers moves, an
      optax optimiser or a `Sequence`; it starts at zero.
    proximity: :math:`(\gamma_1, \gamma_2)`, both positive.
    bound: the bound :math:`r` of :math:`\lambda` and :math:`z`, which are in
      [0, r].
  """

  multiplier: types.SequenceLike
  proximal: types.SequenceLike
  proximity: tuple[float, float] = (10.0, 10.0)
  bound: float = 1e3


@_checks.regrouped('multipliers', Multipliers)
def lv_hba(
  problem: types.BilevelProblem,
  constraint: Callable[[Any, Any], Any],
  *,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike,
  multipliers: Multipliers,
) -> descent.Solver:
  r"""LV-HBA: one loop for lower problems with inequality constraints.

  The lower problem is :math:`\min_y g(x, y)` where :math:`h(x, y) \le 0`. It is
  replaced by a bound on the gap between :math:`g` and the value of a Lagrangian
  that is strongly convex in :math:`w` and strongly concave in :math:`\lambda`,

  .. math::
    L = g(x, w) + \lambda^\top h(x, w) + \tfrac{1}{2 \gamma_1} \| w - y \|^2
      - \tfrac{1}{2 \gamma_2} \| \lambda - z \|^2

  In each update, with steps :math:`\eta, \alpha, \beta`,

  .. math::
    w &\leftarrow w - \eta \nabla_w L, \qquad
    \lambda \leftarrow [ \lambda + \eta \nabla_\lambda L ]_0^r \\
    (x, y) &\leftarrow \Pi_C [ (x, y) - \alpha \nabla_{(x, y)}
      ( f / c_k + g(x, y) - L ) ] \\
    z &\leftarrow [ z + \beta (\lambda - z) / \gamma_2 ]_0^r

  where :math:`C` is the set of pairs (x, y) with :math:`h \le 0`.

  Args:
    problem: the upper and the lower loss.
    constraint: :math:`h(x, y)`, to an array of any shape.
    penalty: :math:`c_k > 0`, increasing, for instance c (k + 1)^p with
      0 < p < 1/2. If a schedule gives a number that is not positive, updates
      are NaN.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, with the joint set: `bj.Sequence(
      optax.sgd(alpha), set=bj.projections.Joint(project, ('upper',)))`, where
      `project` takes (y, x) to the nearest pair in C. Only this set enforces
      :math:`h \le 0`. If h depends on y only, a set of y is enough.
    value: how :math:`w` moves; it starts at the lower variable. Its set holds
      the constraints on the lower variable other than h.
    multipliers: how :math:`\lambda` and :math:`z` move, and the numbers of the
      Lagrangian.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `saddle`, `upper`, `lower`,
    `gap`, and `bj.auxiliaries` `value`, `multiplier`, `proximal`.

  Raises:
    ValueError: if a proximity, the bound or the penalty is not positive, or if
      neither variable has a set.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(  # y = min(x, 1), nearest to 3: x >= 1
    ...   upper=lambda x, y, batch: (y - 3.0) ** 2 + (x - 2.0) ** 2,
    ...   lower=lambda x, y, batch: (y - x) ** 2,
    ... )
    >>> joint = bj.projections.Joint(
    ...   lambda yx: (jnp.minimum(yx[0], 1.0), yx[1]), ('upper',)
    ... )
    >>> step = optax.sgd(0.05)
    >>> solver = bj.solvers.lv_hba(
    ...   problem, lambda x, y: y - 1.0, penalty=lambda k: (k + 1.0) ** 0.3,
    ...   upper=step, lower=bj.Sequence(step, set=joint), value=step,
    ...   multipliers=bj.solvers.Multipliers(step, step, proximity=(1.0, 1.0)),
    ... )
    >>> params = bj.BilevelParams(jnp.zeros([]), jnp.zeros([]))
    >>> params, _ = bj.testing.run(solver, params, 2000)
    >>> print(params.upper.round(0), params.lower.round(1))
    2.0 1.0

  References:
    Yao, Yu, Zeng and Zhang, `Constrained Bi-Level Optimization: Proximal
    Lagrangian Value Function Approach and Hessian-free Algorithm
    <https://arxiv.org/abs/2401.16164>`_, 2024.
  """
  multiplier, proximal, proximity, bound = multipliers
  first, second = proximity
  if not (first > 0 and second > 0 and bound > 0):
    raise ValueError(
      f'lv_hba takes a positive proximity and bound, got {proximity}, {bound}.'
    )
  low = types.as_sequence(lower, 'lower')
  high = types.as_sequence(upper, 'upper')
  if low.set is None and high.set is None:
    raise ValueError(
      'lv_hba enforces the constraint by a set only, but neither variable has '
      "one: give lower the set bj.projections.Joint(project, ('upper',)) with "
      'the projection of (y, x) on the pairs where the constraint is <= 0.'
    )
  _sequences.refuse_batches(
    'lv_hba', 'its gradient depends on no loss', proximal=proximal
  )
  above, below = base.checked_losses(problem)
  weight = _penalty.checked_schedule(penalty, positive=True)
  square = lambda a, b: optax.tree.norm(optax.tree.sub(a, b), squared=True)
  near = lambda p, batch: square(p.multiplier, p.proximal) / (2 * second)

  def lagrangian(p, batch):
    height = below(p.upper, p.value, batch) - near(p, batch)
    pull = jnp.vdot(p.multiplier, constraint(p.upper, p.value))
    return height + pull + square(p.value, p.lower) / (2 * first)

  def fn(params, batch, updates):
    c = jnp.asarray(weight(updates.count))

    def total(fields):
      p = params._replace(**fields)
      f, one = above.full(p.upper, p.lower, batch)
      g, two = below.full(p.upper, p.lower, batch)
      gap = g - lagrangian(p, batch)
      aux = {'upper': one, 'lower': two}
      return f / c.astype(f.dtype) + gap, ((f, g, gap), aux)

    fields = {'upper': params.upper, 'lower': params.lower}
    slopes, (measured, aux) = jax.grad(total, has_aux=True)(fields)
    gradients = base.gradients(params, **slopes)
    more = base.requested_outputs(problem, **aux)
    return measured, gradients, updates.next(), *more

  gap = base.oracle(
    fn,
    ('upper', 'lower', 'gap'),
    states.no_updates,
    counts={'gradients/upper': 1, 'gradients/lower': 2},
    moves=('upper', 'lower'),
    outputs=problem.outputs,
    linear=True,
  )
  inside = lambda z: jnp.clip(z, 0, bound)

  def zeros(params):
    # Derived from a value, so that it is sharded like the value.
    return jnp.zeros_like(constraint(params.upper, params.lower))

  dual = {'set': inside, 'start': zeros}
  return descent.descend(
    oracles.gradient(
      lagrangian,
      name='saddle',
      of={'value': 1, 'multiplier': -1},
      counts_as='lower',
    ),
    gap,
    oracles.gradient(near, name='proximal', of='proximal'),
    upper=high,
    lower=low,
    value=types.as_sequence(value, 'value', start=lambda p: p.lower),
    multiplier=types.as_sequence(multiplier, 'multiplier', **dual),
    proximal=types.as_sequence(proximal, 'proximal', **dual),
  )
